"""One step: the paper's SGD, written out by hand in float64, and nothing else."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from resnet_ddp import shapes
from resnet_ddp.augment import Normalisation
from resnet_ddp.batches import Batches
from resnet_ddp.models import CifarNet, build_model
from resnet_ddp.recipe import HE2015, Recipe
from resnet_ddp.step import Stepper, make_optimizer

CPU = torch.device("cpu")
# Two iterations at 0.1, one at 0.01, one at 0.001.
RECIPE = dataclasses.replace(HE2015, name="short", iterations=4, batch_size=16, drops=(2, 3))


def make_stepper(model: CifarNet, batches: Batches, recipe: Recipe, *, depth: int = 20) -> Stepper:
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    optimizer = make_optimizer(model, recipe)
    prepared = accelerator.prepare(model, optimizer)
    return Stepper(*prepared, batches, accelerator, recipe, depth=depth)


def make_batches(recipe: Recipe, **kinds: Any) -> Batches:
    images, labels = (torch.from_numpy(array) for array in shapes.draw(20))
    return Batches(
        recipe,
        seed=0,
        images=images,
        labels=labels,
        samples=torch.arange(200),
        normalise=Normalisation.channel((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), CPU),
        **kinds,
    )


@pytest.mark.parametrize(
    ("dtype", "rates", "tolerance"),
    [(torch.float64, [0.1, 0.1, 0.01, 0.001], 1e-10), (torch.float32, [0.1], 1e-5)],
)
def test_steps_equal_sgd_written_out(
    dtype: torch.dtype, rates: list[float], tolerance: float
) -> None:
    # torch's BatchNorm on a CPU loses two digits in channels-last float32.
    batches = make_batches(RECIPE, dtype=dtype, layout=torch.contiguous_format)
    model = build_model("resnet20", num_classes=10, seed=0).to(dtype)
    stepper = make_stepper(model, batches, RECIPE)
    reference = build_model("resnet20", num_classes=10, seed=0).double()
    parameters = list(reference.parameters())
    velocity = [torch.zeros_like(parameter) for parameter in parameters]
    for iteration, learning_rate in enumerate(rates):
        images, labels = batches(iteration)
        loss = F.cross_entropy(reference(images.double()), labels)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for w, v, g in zip(parameters, velocity, gradients, strict=True):
                v.mul_(0.9).add_(g + 1e-4 * w)  # weight decay on BatchNorm and bias, too
                w.sub_(learning_rate * v)
        stepper.step(iteration)
        assert stepper.loss.item() == pytest.approx(loss.item(), rel=tolerance)
    for name, theirs in reference.state_dict().items():
        ours = model.state_dict()[name]
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance)


def test_weight_decay_covers_every_parameter() -> None:
    groups = make_optimizer(build_model("resnet20", num_classes=10, seed=0), HE2015).param_groups
    covered = [p.numel() for group in groups for p in group["params"]]
    assert sum(covered) == 269_722
    assert {(g["momentum"], g["weight_decay"], g["dampening"], g["nesterov"]) for g in groups} == {
        (0.9, 1e-4, 0, False)
    }


def test_a_deep_net_is_warmed_up() -> None:
    recipe = dataclasses.replace(RECIPE, warmup_iterations=1)
    model = build_model("resnet20", num_classes=10, seed=0)
    stepper = make_stepper(model, make_batches(recipe), recipe, depth=110)
    rates = []
    for iteration in range(3):
        stepper.advance(iteration, until=iteration + 1)
        rates.append(stepper.optimizer.param_groups[0]["lr"])
    assert rates == [0.01, 0.1, 0.01]


def test_advance_makes_each_step_once() -> None:
    model = build_model("resnet20", num_classes=10, seed=0)
    stepper = make_stepper(model, make_batches(RECIPE), RECIPE)
    assert stepper.advance(1, until=4) == 4
    assert model.bn.num_batches_tracked.item() == 3


def test_the_first_bad_iteration_is_remembered() -> None:
    stepper = make_stepper(
        build_model("resnet20", num_classes=10, seed=0), make_batches(RECIPE), RECIPE
    )
    seen = []
    for iteration, loss in enumerate((2.3, float("inf"), 2.2, float("nan"))):
        stepper.note(iteration, torch.tensor(loss))
        seen.append(int(stepper.bad_iteration))
    assert seen == [-1, 1, 1, 1]


def test_batch_and_augmentation_cost_less_than_a_tenth_of_a_step() -> None:
    recipe = dataclasses.replace(HE2015, iterations=10)
    batches = make_batches(recipe)
    model = build_model("resnet20", num_classes=10, seed=0)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    stepper = make_stepper(model, batches, recipe)
    batch_seconds, step_seconds = [], []
    for iteration in range(7):
        began = time.perf_counter()
        batches(iteration)
        middle = time.perf_counter()
        stepper.step(iteration)
        batch_seconds.append(middle - began)
        step_seconds.append(time.perf_counter() - middle)
    assert statistics.median(batch_seconds) < 0.1 * statistics.median(step_seconds)
