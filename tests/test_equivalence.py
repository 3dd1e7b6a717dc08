"""The same experiment on any number of processes, with real processes (see equivalence.py)."""

import hashlib

import pytest
import torch

from resnet_ddp.augment import draw
from resnet_ddp.batches import sample_order, share, split
from resnet_ddp.equivalence import Trial, differences, trace, trace_on
from resnet_ddp.recipe import RECIPES

WORLD_SIZES = (2, 3, 4, 8)


def check_float64(trial: Trial, world_sizes: tuple[int, ...]) -> None:
    reference = trace(trial)
    for world_size in world_sizes:
        traces = trace_on(world_size, trial)
        for traced in traces:
            worst = differences(reference, traced)
            assert worst["error_rate"] == 0, world_size
            for kind in ("loss", "gradient", "weight", "buffer"):
                assert worst[kind] <= 1e-10, (world_size, kind, worst)
        for name, tensor in traces[0].items():  # all processes hold the same bits
            assert all(torch.equal(tensor, traced[name]) for traced in traces), name


@pytest.mark.parametrize("model", ["resnet20", "plain20"])
def test_three_iterations_in_float64(model: str) -> None:
    check_float64(Trial(model), WORLD_SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet20", "plain20"])
def test_twenty_iterations_in_float64(model: str) -> None:
    check_float64(Trial(model, iterations=20), WORLD_SIZES)


def test_groups_of_64_whatever_the_number_of_processes() -> None:
    check_float64(Trial("resnet20", recipe="he2015-two-gpus", iterations=2), (3,))


def test_the_groups_of_the_two_gpu_recipe_matter() -> None:
    """An equivalence that could not fail would show nothing."""
    together = trace(Trial("resnet20", iterations=1))
    apart = trace(Trial("resnet20", recipe="he2015-two-gpus", iterations=1))
    assert differences(together, apart)["gradient"] > 1e-3


def test_losses_in_fp32() -> None:
    trial = Trial("resnet20", precision="fp32", iterations=5)
    reference = trace(trial)["loss"]
    for world_size in WORLD_SIZES:
        losses = trace_on(world_size, trial)[0]["loss"]
        relative = ((losses - reference) / reference).abs()
        assert relative[:2].max() <= 1e-5, (world_size, relative)
        assert relative.max() <= 1e-3, (world_size, relative)


def schedule_hash(world_size: int, every: int) -> str:
    """Hash sample numbers and draws of a whole schedule as the processes of a launch see them.

    Args:
        every: draws are hashed at every so many iterations, sample numbers at all.
    """
    recipe = RECIPES["he2015"]
    samples, _ = split(recipe, 50_000)
    order = sample_order(recipe, seed=3, samples=samples, device="cpu")
    shares = [share(128, rank=rank, world_size=world_size) for rank in range(world_size)]
    digest = hashlib.sha256(torch.cat([order[:, places] for places in shares], dim=1).numpy())
    iterations = torch.arange(0, recipe.iterations, every)[:, None]
    draws = []
    for places in shares:
        positions = iterations * 128 + torch.arange(128)[places]
        numbers = order[::every, places].long()
        drawn = draw(recipe, seed=3, passes=positions // len(samples), samples=numbers)
        draws.append(torch.stack([drawn.dy, drawn.dx, drawn.flip]).to(torch.uint8))
    digest.update(torch.cat(draws, dim=2).numpy())
    return digest.hexdigest()


def test_sample_numbers_and_draws_are_the_same_for_some_world_sizes() -> None:
    expected = schedule_hash(1, every=100)
    assert all(schedule_hash(world_size, every=100) == expected for world_size in (2, 7, 128))


@pytest.mark.slow
def test_sample_numbers_and_draws_are_the_same_for_every_world_size() -> None:
    expected = schedule_hash(1, every=1)
    assert all(schedule_hash(world_size, every=1) == expected for world_size in range(2, 129))
