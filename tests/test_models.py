"""The networks: counts from the literature, shapes from the paper, weights from the seed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from resnet_ddp.architectures import ARCHITECTURES
from resnet_ddp.models import (
    Block,
    CifarNet,
    IdentityShortcut,
    MaxPoolShortcut,
    build_model,
    num_parameters,
)

PARAMETERS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "resnet1202": 19_421_274,
    "plain20": 269_722,
    "plain32": 464_154,
    "plain44": 658_586,
    "plain56": 853_018,
    "plain110": 1_727_962,
    "resnet20-b": 272_474,
    "resnet20-maxpool": 269_722,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_and_depth(name: str) -> None:
    with torch.device("meta"):
        model = CifarNet(ARCHITECTURES[name], num_classes=10)
    assert num_parameters(model) == PARAMETERS[name]
    weighted = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3))
    ]
    assert len(weighted) == int("".join(filter(str.isdigit, name)))


def test_class_count_reaches_the_last_layer() -> None:
    model = build_model("resnet20", num_classes=100, seed=0)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
    assert num_parameters(model) == 269_722 + 90 * 65


@pytest.mark.parametrize("name", ["resnet20", "resnet20-b", "resnet20-maxpool", "plain20"])
def test_shapes_at_the_stage_borders(name: str) -> None:
    model, shapes = build_model(name, num_classes=10, seed=0), []

    def record(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shapes.append(tuple(output.shape[1:]))

    for block in model.blocks:
        block.register_forward_hook(record)
    model(torch.zeros(2, 3, 32, 32))
    assert shapes == 3 * [(16, 32, 32)] + 3 * [(32, 16, 16)] + 3 * [(64, 8, 8)]


@pytest.mark.parametrize(
    ("shortcut", "kept"),
    [
        (IdentityShortcut(1, 3, 2), [[0, 2], [8, 10]]),
        (MaxPoolShortcut(1, 3, 2), [[5, 7], [13, 15]]),
    ],
)
def test_shortcut_without_weights(shortcut: nn.Module, kept: list[list[int]]) -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    zeros = [[0, 0], [0, 0]]  # the new channels come last
    assert shortcut(x)[0].tolist() == [kept, zeros, zeros]
    assert num_parameters(shortcut) == 0


def test_only_a_residual_block_passes_its_input_on() -> None:
    x = torch.linspace(-1, 1, 2 * 16 * 8 * 8).view(2, 16, 8, 8)
    for shortcut, expected in ((None, torch.zeros_like(x)), ("A", x.clamp(min=0))):
        block = Block(16, 16, 1, shortcut).eval()
        nn.init.zeros_(block.conv2.weight)
        torch.testing.assert_close(block(x), expected, rtol=0, atol=0)


def test_option_b_projects_at_the_two_stage_borders_only() -> None:
    model = build_model("resnet56-b", num_classes=10, seed=0)
    projections = [
        tuple(module.weight.shape)
        for module in model.modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
    ]
    assert projections == [(32, 16, 1, 1), (64, 32, 1, 1)]


def test_initial_convolutions_are_normal_with_deviation_of_fan_out() -> None:
    model = build_model("resnet56", num_classes=10, seed=0)
    normalised = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = 9 * module.out_channels
            z = module.weight.detach().flatten() / math.sqrt(2 / fan_out)
            assert abs(z.std().item() - 1) < 5 / math.sqrt(2 * len(z))
            normalised.append(z)
    z = torch.cat(normalised)  # 848,304 numbers
    assert abs(z.mean().item()) < 0.005
    assert abs(z.std().item() - 1) < 0.004
    assert abs((z.abs() > 2).float().mean().item() - 0.0455) < 0.002


def test_initial_linear_layer_and_batchnorm_are_torchs() -> None:
    model = build_model("resnet20", num_classes=1000, seed=0)
    weight, bias = model.linear.weight, model.linear.bias
    assert 0.1249 < weight.abs().max().item() <= 0.125  # 1 / sqrt(64)
    assert 0.124 < bias.abs().max().item() <= 0.125
    assert abs(weight.std().item() - 0.0722) < 0.001  # uniform: 0.125 / sqrt(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (1e-5, 0.1)
            assert set(module.weight.tolist()) == set(module.running_var.tolist()) == {1}
            assert set(module.bias.tolist()) == set(module.running_mean.tolist()) == {0}
            assert module.num_batches_tracked.item() == 0


def test_initial_weights_depend_on_the_seed_and_nothing_else() -> None:
    def initial(seed: int) -> dict[str, Tensor]:
        return build_model("resnet20", num_classes=10, seed=seed).state_dict()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = initial(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = initial(0), initial(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in first:
        if "conv" in name or "linear" in name:
            assert not torch.equal(first[name], other[name]), name
