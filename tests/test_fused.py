"""The CPU's kernels compute what PyTorch does, at least as exactly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_ddp import fused
from resnet_ddp.batchnorm import GroupBatchNorm2d, Groups, convert
from resnet_ddp.fused import Kernels
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
    if not kernels.has_bf16_products:
        pytest.skip("no AVX512-bf16")
    return kernels


def distance(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def tensors_of(
    name: str,
    *,
    kernels: Kernels | None = None,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    groups: Groups | None = None,
) -> tuple[Tensors, Tensors]:
    """Return gradients and running statistics of one training step."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 32, 32, generator=generator)
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


@pytest.mark.parametrize("channels", [16, 32, 64])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("has_second", [False, True])
@pytest.mark.parametrize("group_size", [12, 4])
def test_one_layer_is_float64s(
    kernels: Kernels, channels: int, has_residual: bool, has_second: bool, group_size: int
) -> None:
    generator = torch.Generator().manual_seed(channels)
    shape = (12, channels, 5, 7)
    x = 3 + torch.randn(shape, generator=generator)
    residual = torch.randn(shape, generator=generator) if has_residual else None
    grads = torch.randn(2, *shape, generator=generator)
    groups = Groups(12, group_size, slice(0, 12), is_distributed=False)
    results = []
    for dtype in (torch.float64, torch.float32):
        bn = GroupBatchNorm2d(channels, groups).to(dtype)
        with torch.no_grad():
            bn.weight.copy_(torch.linspace(-1, 2, channels))
            bn.bias.copy_(torch.linspace(-1, 1, channels))
        inputs = [t.to(dtype).requires_grad_() for t in (x, residual) if t is not None]
        if dtype == torch.float32:
            first, second = fused.batchnorm_relu(kernels, bn, *inputs)
        else:
            first = second = F.relu(bn(inputs[0]) + (inputs[1] if has_residual else 0))
        loss = (first * grads[0]).sum() + ((second * grads[1]).sum() if has_second else 0)
        loss.backward()
        results.append(
            [
                *(first, *(t.grad for t in inputs), bn.weight.grad, bn.bias.grad),
                *(bn.running_mean, bn.running_var),
            ]
        )
    for expected, actual in zip(*results, strict=True):
        assert distance(actual, expected) < 2e-6


@pytest.mark.parametrize(("channels", "size"), [(16, 32), (32, 16), (64, 8), (16, 4)])
def test_weight_gradient(bf16_kernels: Kernels, channels: int, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x, grad = torch.randn(2, 5, channels, size, size, generator=generator).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    grad = grad.contiguous(memory_format=torch.channels_last)
    expected = torch.nn.grad.conv2d_weight(
        x.double(), (channels, channels, 3, 3), grad.double(), padding=1
    )
    assert distance(bf16_kernels.weight_gradient(x, grad), expected) < 1e-5


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


def test_groups_go_through(kernels: Kernels) -> None:
    groups = Groups(64, 32, slice(0, 64), is_distributed=False)
    expected, _ = tensors_of("resnet20", dtype=torch.float64, groups=groups)
    actual, _ = tensors_of("resnet20", kernels=kernels, groups=groups)
    assert max(distance(actual[key], expected[key]) for key in expected) < 1e-2


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
