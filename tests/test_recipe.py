"""The paper's numbers (section 4.2), literally."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest

from resnet_ddp.recipe import HE2015, RECIPES, Recipe

BORDERS = (0, 399, 400, 31_999, 32_000, 47_999, 48_000, 63_999)


@pytest.mark.parametrize(("depth", "first"), [(20, 0.1), (56, 0.1), (110, 0.01), (1202, 0.01)])
def test_learning_rate_is_the_papers(depth: int, first: float) -> None:
    expected = [first, first, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert [HE2015.lr_at(iteration, depth=depth) for iteration in BORDERS] == expected


def test_resnet110_leaves_its_warmup_for_the_full_rate() -> None:
    # Two well-known copies do not: one goes on with 0.001 after 32,000, one never leaves 0.01.
    rates = Counter(HE2015.lr_at(iteration, depth=110) for iteration in range(64_000))
    assert rates == {0.1: 31_600, 0.01: 400 + 16_000, 0.001: 16_000}


@pytest.mark.parametrize("iteration", [-1, 64_000])
def test_there_is_no_learning_rate_outside_the_run(iteration: int) -> None:
    with pytest.raises(ValueError, match=rf"{iteration} is outside 0\.\.63999"):
        HE2015.lr_at(iteration, depth=20)


def test_everything_else_is_the_papers() -> None:
    assert (HE2015.batch_size, HE2015.momentum, HE2015.weight_decay) == (128, 0.9, 1e-4)
    assert HE2015.batchnorm_group == 128
    assert (HE2015.padding, HE2015.flip, HE2015.normalisation) == (4, True, "channel")
    assert HE2015.num_val(50_000) == 5_000
    assert HE2015.num_val(10_000) == 1_000


@pytest.mark.parametrize(
    ("name", "iterations", "drops", "warmup"),
    [
        ("he2015-eighth", 8_000, (4_000, 6_000), 50),
        ("he2015-tiny", 500, (250, 375), 3),
        ("he2015-smoke", 32, (16, 24), 0),
    ],
)
def test_short_recipes_change_only_what_counts_iterations(
    name: str, iterations: int, drops: tuple[int, int], warmup: int
) -> None:
    assert differences(RECIPES[name], HE2015) == {
        "name": name,
        "iterations": iterations,
        "drops": drops,
        "warmup_iterations": warmup,
    }


def test_other_recipes_change_one_thing() -> None:
    assert differences(RECIPES["he2015-50k"], HE2015) == {
        "name": "he2015-50k",
        "validation_divisor": 0,
    }
    assert RECIPES["he2015-50k"].num_val(50_000) == 0
    assert differences(RECIPES["he2015-two-gpus"], HE2015) == {
        "name": "he2015-two-gpus",
        "batchnorm_group": 64,
    }
    assert differences(RECIPES["he2015-pixelmean"], HE2015) == {
        "name": "he2015-pixelmean",
        "normalisation": "pixel-mean",
    }


def differences(recipe: Recipe, other: Recipe) -> dict[str, Any]:
    ours, theirs = dataclasses.asdict(recipe), dataclasses.asdict(other)
    return {key: value for key, value in ours.items() if theirs[key] != value}


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        HE2015.learning_rate = 0.2  # type: ignore[misc]


def test_hash_stays_and_depends_on_every_field() -> None:
    # Run directories on disk carry this hash: whoever changes it makes them somebody else's.
    assert HE2015.hash == "de85ceb2734189bee70f53db1ec0976de857a4059c25f7d140d4697fda6a842c"
    changed = {
        "name": "x",
        "drops": (32_000, 48_001),
        "normalisation": "pixel-mean",
        "flip": False,
    }
    hashes = {HE2015.hash}
    for field in dataclasses.fields(Recipe):
        value = changed.get(field.name, getattr(HE2015, field.name) * 2)
        hashes.add(dataclasses.replace(HE2015, **{field.name: value}).hash)
    assert len(hashes) == 1 + len(dataclasses.fields(Recipe))
