"""The networks that a command can name."""

from __future__ import annotations

import pytest

from resnet_ddp.architectures import ARCHITECTURES, Architecture


def test_names_are_the_papers_and_the_variants() -> None:
    residual = [f"resnet{depth}" for depth in (20, 32, 44, 56, 110, 1202)]
    plain = [f"plain{depth}" for depth in (20, 32, 44, 56, 110)]
    variants = [f"{name}-{variant}" for variant in ("b", "maxpool") for name in residual]
    assert sorted(ARCHITECTURES) == sorted(residual + plain + variants)


@pytest.mark.parametrize(("name", "n"), [("resnet20", 3), ("plain56", 9), ("resnet1202-b", 200)])
def test_depth_is_6n_plus_2(name: str, n: int) -> None:
    assert ARCHITECTURES[name].blocks_per_stage == n


def test_option_a_is_the_default() -> None:
    assert ARCHITECTURES["resnet56"] == Architecture(depth=56, shortcut="A")
    assert ARCHITECTURES["plain56"] == Architecture(depth=56, shortcut=None)
