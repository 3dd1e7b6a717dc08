"""One step: the paper's SGD, written out by hand in float64, and nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from resnet_ddp.step import CapturedStepper, Stepper, make_optimizer

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
        stepper.step()
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
        rates.append(stepper.learning_rate)
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
        stepper.seek(iteration)
        stepper.note(torch.tensor(loss))
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
        stepper.step()
        batch_seconds.append(middle - began)
        step_seconds.append(time.perf_counter() - middle)
    assert statistics.median(batch_seconds) < 0.1 * statistics.median(step_seconds)


class Tape:
    """Records work by remembering it: the CPU's stand-in for CUDA graphs."""

    def __init__(self) -> None:
        self.recorded: list[int] = []  # replays of each recording
        self.is_warming_up = False

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        self.is_warming_up = True
        yield
        self.is_warming_up = False

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        number = len(self.recorded)
        self.recorded.append(0)

        def replay() -> None:
            self.recorded[number] += 1
            work()

        return replay


def test_a_replayed_step_does_what_the_eager_one_does() -> None:
    """Through all that depends on the iteration: the batch, the learning rate, the counters."""
    recipe = dataclasses.replace(RECIPE, iterations=40, drops=(9, 30))
    ends = []
    for kind in ("eager", "captured"):
        model = build_model("resnet20", num_classes=10, seed=0)
        stepper = make_stepper(model, make_batches(recipe), recipe)
        tape = Tape()
        if kind == "captured":
            stepper = CapturedStepper(
                stepper.model, stepper.optimizer, stepper.batches, stepper.accelerator, recipe,
                depth=20, recorder=tape,
            )  # fmt: skip
        seen = []
        for iteration, until in itertools.pairwise((0, 2, 6, 27, 28, 40)):
            assert stepper.advance(iteration, until) == until
            seen.append((stepper.loss.clone(), stepper.learning_rate, int(stepper.iteration)))
        ends.append((seen, model.state_dict(), int(stepper.bad_iteration)))
    (eager, weights, _), (captured, replayed, _) = ends
    # Three eager steps; then 3 + (2 x 10 + 1) + 1 + (10 + 2) = 3 x 10 + 7 x 1.
    assert sorted(tape.recorded) == [3, 7]
    assert eager == captured
    assert [rate for _, rate, _ in eager] == [0.1, 0.1, 0.01, 0.01, 0.001]
    for name, tensor in weights.items():
        assert torch.equal(tensor, replayed[name]), name


def test_a_step_goes_on_from_anywhere() -> None:
    recipe = dataclasses.replace(RECIPE, iterations=40, drops=(9, 30))
    stepper = make_stepper(
        build_model("resnet20", num_classes=10, seed=0), make_batches(recipe), recipe
    )
    assert stepper.advance(29, until=31) == 31
    assert (stepper.learning_rate, int(stepper.iteration)) == (0.001, 31)
    assert stepper.advance(3, until=4) == 4
    assert (stepper.learning_rate, int(stepper.iteration)) == (0.1, 4)
