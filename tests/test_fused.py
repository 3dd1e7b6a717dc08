"""The CPU's kernels compute what PyTorch does, at least as exactly."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_ddp import fused
from resnet_ddp.augment import Draws, Normalisation, crop_and_flip
from resnet_ddp.batchnorm import GroupBatchNorm2d, Groups, convert
from resnet_ddp.kernels import Kernels
from resnet_ddp.models import build_model

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = fused.load()
    if found is None:
        assert "CI" not in os.environ, "g++ is missing"
        pytest.skip("no compiler")
    return found


@pytest.fixture(scope="module")
def bf16_kernels(kernels: Kernels) -> Kernels:
    if not kernels.library.has_convolutions_bf16():
        pytest.skip("no AVX512-bf16")
    return kernels


def distance(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def fused_network(kernels: Kernels) -> fused.FusedNet:
    network = fused.fuse(build_model("resnet20", num_classes=10, seed=0), kernels)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def tensors_of(
    name: str,
    *,
    kernels: Kernels | None = None,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    groups: Groups | None = None,
    size: int = 32,
) -> tuple[Tensors, Tensors]:
    """Return gradients and running statistics of one training step."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, size, size, generator=generator)
    labels = torch.randint(10, (64,), generator=generator)
    model = build_model(name, num_classes=10, seed=0)
    if groups:
        convert(model, groups)
    model = model.to(dtype)
    if kernels or autocast:
        model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    network = fused.fuse(model, kernels) if kernels else model
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = network(images.to(dtype))
    F.cross_entropy(logits.to(dtype), labels).backward()  # type: ignore[no-untyped-call]
    gradients = {
        key: value.grad for key, value in model.named_parameters() if value.grad is not None
    }
    return gradients, dict(model.named_buffers())


def tensors_of_layer(
    kernels: Kernels | None,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    *,
    group_size: int = 12,
    has_residual: bool = True,
    has_second: bool = True,
    threads: int = 1,
) -> list[Tensor]:
    """Return output, gradients and running statistics of one layer.

    Args:
        kernels: None computes it with PyTorch, in float64 from numbers rounded to `dtype`.
        shape: channels in and out, height, width, stride.
    """
    torch.set_num_threads(threads)
    channels_in, channels, height, width, stride = shape
    wide = torch.float64 if kernels is None else torch.float32
    generator = torch.Generator().manual_seed(channels)
    conv = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
    bn = GroupBatchNorm2d(channels, Groups(12, group_size, slice(0, 12), is_distributed=False))
    out_shape = (12, channels, height // stride, width // stride)
    x = 3 + torch.randn(12, channels_in, height, width, generator=generator)
    residual = torch.randn(out_shape, generator=generator)
    grads = torch.randn(2, *out_shape, generator=generator)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator).to(dtype))
        bn.weight.copy_(torch.linspace(-1, 2, channels))
        bn.bias.copy_(torch.linspace(-1, 1, channels))
    conv.to(wide, memory_format=torch.channels_last)  # type: ignore[call-overload]
    bn.to(wide)
    leaves = [t.to(dtype).to(wide).requires_grad_() for t in (x, residual)[: 1 + has_residual]]
    grads = grads.to(dtype)
    if kernels is None:
        out = bn(conv(leaves[0]))
        first = second = F.relu(out + leaves[1] if has_residual else out)
    else:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            residual_of = fused.INPUT if has_residual else None
            first, second = fused.Chain(kernels, [fused.Link(conv, bn, residual_of)])(*leaves)
    loss = (first * grads[0]).sum() + ((second * grads[1]).sum() if has_second else 0)
    loss.backward()
    parameters = (*leaves, conv.weight, bn.weight, bn.bias)
    torch.set_num_threads(1)
    return [first, *(cast(Tensor, p.grad) for p in parameters), *bn.buffers()][:-1]


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("has_second", [False, True])
@pytest.mark.parametrize("group_size", [12, 4])
@pytest.mark.parametrize(
    "shape",
    [
        *[(16, 16, 32, 32, 1), (32, 32, 16, 16, 1), (64, 64, 8, 8, 1), (16, 16, 8, 8, 1)],
        *[(16, 32, 32, 32, 2), (32, 64, 16, 16, 2), (64, 16, 8, 8, 1), (16, 32, 24, 24, 1)],
        *[(3, 16, 32, 32, 1), (16, 32, 5, 7, 1)],  # PyTorch's convolution
    ],
)
def test_one_layer_is_float64s(
    kernels: Kernels,
    shape: tuple[int, int, int, int, int],
    has_residual: bool,
    has_second: bool,
    group_size: int,
) -> None:
    exact, actual = (
        tensors_of_layer(
            each,
            shape,
            torch.float32,
            group_size=group_size,
            has_residual=has_residual,
            has_second=has_second,
        )
        for each in (None, kernels)
    )
    for expected, found in zip(exact, actual, strict=True):
        assert distance(found, expected) < 5e-6


@pytest.mark.parametrize(
    "shape",
    [
        *[(16, 16, 32, 32, 1), (32, 32, 16, 16, 1), (64, 64, 8, 8, 1)],
        *[(16, 32, 32, 32, 2), (32, 64, 16, 16, 2), (64, 16, 8, 8, 1), (16, 32, 24, 24, 1)],
    ],
)
def test_one_layer_in_bf16_is_float64s_but_for_rounding(
    bf16_kernels: Kernels, shape: tuple[int, int, int, int, int]
) -> None:
    exact = tensors_of_layer(None, shape, torch.bfloat16)
    actual = tensors_of_layer(bf16_kernels, shape, torch.bfloat16)
    # ReLU's mask is that of rounded maps: gradients where the output is near 0 are another's.
    for expected, found in zip(exact, actual, strict=True):
        assert distance(found, expected) < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(
    bf16_kernels: Kernels, dtype: torch.dtype
) -> None:
    shape = (64, 64, 8, 8, 1)
    one, *more = (
        tensors_of_layer(bf16_kernels, shape, dtype, group_size=4, threads=threads)
        for threads in (1, 2, 3)
    )
    for other in more:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["resnet20", "plain20", "resnet20-b", "resnet20-maxpool"])
def test_fp32_is_as_close_to_float64_as_eager(kernels: Kernels, name: str) -> None:
    expected, expected_buffers = tensors_of(name, dtype=torch.float64)
    eager, _ = tensors_of(name)
    actual, buffers = tensors_of(name, kernels=kernels)
    assert actual.keys() == expected.keys() and buffers.keys() == expected_buffers.keys()
    worst = max(distance(eager[key], expected[key]) for key in expected)
    assert max(distance(actual[key], expected[key]) for key in expected) < 2 * worst + 1e-5
    for key, value in expected_buffers.items():
        assert distance(buffers[key], value) < 1e-5


@pytest.mark.parametrize("name", ["resnet20", "plain20"])
def test_bf16_is_as_close_to_float64_as_eager(bf16_kernels: Kernels, name: str) -> None:
    expected, _ = tensors_of(name, dtype=torch.float64)
    eager, _ = tensors_of(name, autocast=True)
    actual, _ = tensors_of(name, kernels=bf16_kernels, autocast=True)

    def total(gradients: Tensors) -> float:
        squares = sum(
            float((g.double() - expected[k]).square().sum()) for k, g in gradients.items()
        )
        return squares**0.5

    assert total(actual) < 1.1 * total(eager)  # roundings fall differently


@pytest.mark.parametrize("size", [24, 40])
def test_chains_of_our_convolutions_and_pytorchs(kernels: Kernels, size: int) -> None:
    expected, _ = tensors_of("resnet20", dtype=torch.float64, size=size)
    actual, _ = tensors_of("resnet20", kernels=kernels, size=size)
    assert max(distance(actual[key], expected[key]) for key in expected) < 1e-2


def test_maps_go_with_their_network(kernels: Kernels) -> None:
    network = fused_network(kernels)
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    maps = weakref.ref(network.chains[-1][1].maps(torch.randn(2, 16, 32, 32)))
    gc.disable()
    try:
        del network
        assert maps() is None
    finally:
        gc.enable()


def test_weights_changed_before_backward_are_noticed(kernels: Kernels) -> None:
    network = fused_network(kernels)
    loss = network(torch.randn(2, 3, 32, 32)).sum()
    with torch.no_grad():
        network.conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_groups_go_through(kernels: Kernels) -> None:
    groups = Groups(64, 32, slice(0, 64), is_distributed=False)
    expected, _ = tensors_of("resnet20", dtype=torch.float64, groups=groups)
    actual, _ = tensors_of("resnet20", kernels=kernels, groups=groups)
    assert max(distance(actual[key], expected[key]) for key in expected) < 1e-2


@pytest.mark.parametrize("padding", [0, 2, 4])
@pytest.mark.parametrize("mean", ["channel", "pixel"])
def test_augmentation_has_torchs_bits(kernels: Kernels, padding: int, mean: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50, 32, 32, 3), generator=generator, dtype=torch.uint8)
    which = torch.randint(50, (700,), generator=generator)  # all 162 ways to cut and mirror
    dy, dx, flip = (
        torch.randint(high, (700,), generator=generator)
        for high in (2 * padding + 1, 2 * padding + 1, 2)
    )
    draws = Draws(dy=dy, dx=dx, flip=flip)
    normalise = Normalisation.pixel_mean(images)
    if mean == "channel":
        normalise = Normalisation.channel((0.4, 0.5, 0.6), (0.2, 0.3, 0.25), torch.device("cpu"))
    expected = crop_and_flip(normalise(images[which]), draws, padding)
    assert torch.equal(kernels.augment(images, which, draws, normalise, padding), expected)


def test_backward_after_another_forward_is_refused(kernels: Kernels) -> None:
    network = fused_network(kernels)
    images = torch.randn(2, 3, 32, 32)
    first = network(images).sum()
    network(images)
    with pytest.raises(RuntimeError, match="overwritten"):
        first.backward()


def test_same_bits_again(kernels: Kernels) -> None:
    first, _ = tensors_of("resnet20", kernels=kernels, autocast=True)
    again, _ = tensors_of("resnet20", kernels=kernels, autocast=True)
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_without_a_compiler_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert fused.load() is None


def test_a_compiler_that_fails_leaves_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fused.load() is None


def test_what_a_killed_process_was_compiling_goes(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    old, new = (tmp_path / "resnet_ddp" / f"compiling-{name}" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    assert fused.load() is not None
    assert not old.exists() and new.exists()
