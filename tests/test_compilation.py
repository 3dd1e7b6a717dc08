"""A compiled network trains only if it computes what the eager one does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resnet_ddp.compilation import CACHE_VARIABLE, Network, compile_checked
from resnet_ddp.models import CifarNet, build_model

NETWORK = Callable[[nn.Module], Network]


def check(compile: NETWORK, precision: str = "fp32") -> tuple[Network, str, CifarNet]:
    model = build_model("resnet20", num_classes=10, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network, trouble = compile_checked(
        model,
        num_images=16,
        num_classes=10,
        precision=precision,
        layout=torch.contiguous_format,
        compile=compile,
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    return network, trouble, model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_numbers_pass(precision: str) -> None:
    def faithful(model: nn.Module) -> Network:
        return lambda images: model(images)

    network, trouble, model = check(faithful, precision)
    assert trouble == ""
    assert network is not model


def wrong_output(model: nn.Module) -> Network:
    return lambda images: 1.1 * model(images)


def one_wrong_channel(model: nn.Module) -> Network:
    def network(images: Tensor) -> Tensor:
        wrong = torch.ones(3)
        wrong[2] = 0.5
        logits: Tensor = model(images * wrong.view(3, 1, 1))
        return logits

    return network


def not_a_number(model: nn.Module) -> Network:
    return lambda images: model(images) * torch.nan


def no_gradient(model: nn.Module) -> Network:
    def network(images: Tensor) -> Tensor:
        model.get_parameter("conv.weight").requires_grad_(False)
        logits: Tensor = model(images)
        model.get_parameter("conv.weight").requires_grad_(True)
        return logits

    return network


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("wrong", [wrong_output, one_wrong_channel, not_a_number, no_gradient])
def test_other_numbers_fall_back(wrong: NETWORK, precision: str) -> None:
    network, trouble, model = check(wrong, precision)
    assert network is model
    assert "gradient of" in trouble


def test_what_does_not_compile_falls_back() -> None:
    def broken(model: nn.Module) -> Network:
        raise RuntimeError("no such kernel\nand a long story")

    network, trouble, model = check(broken)
    assert network is model
    assert trouble == "RuntimeError: no such kernel"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in its compiler
def test_the_compiler_passes_and_keeps_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    _, trouble, _ = check(torch.compile)
    assert trouble == ""
    assert os.environ[CACHE_VARIABLE] == str(tmp_path / "resnet_ddp" / "inductor")
    assert any((tmp_path / "resnet_ddp" / "inductor").rglob("*"))
