"""Assertions on training: learning rate, momentum, weight decay, the gradient's scale."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_ddp import processes
from resnet_ddp.audit.checks import Finding, equal, none_of, same_series, within
from resnet_ddp.audit.paper import (
    DEPTHS,
    MOMENTUM,
    WEIGHT_DECAY,
    learning_rates,
)
from resnet_ddp.audit.subject import Subject
from resnet_ddp.batches import Batches
from resnet_ddp.models import build_model
from resnet_ddp.step import Stepper, make_optimizer

BOUNDARIES = (0, 1, 399, 400, 401, 31_999, 32_000, 47_999, 48_000, 63_999)


def written_rates(subject: Subject, net: str) -> Finding:
    """Have the rate of each iteration written, and read it back from the optimizer."""
    stepper, _ = _line(subject, depth=DEPTHS[net])
    groups, rates = stepper.optimizer.param_groups, []
    for iteration in range(len(stepper.learning_rates)):
        stepper.seek(iteration)
        stepper.set_rate()
        rate = max(float(group["lr"]) for group in groups)
        rates.append(float(f"{rate:.7g}"))  # kept in the weights' type
    return same_series(learning_rates(DEPTHS[net]), rates)


def stepped_rates(subject: Subject, net: str) -> Finding:
    """Make steps around each change of the rate, and note with which one the weights moved."""
    moves: dict[int, float] = {}
    table = learning_rates(DEPTHS[net])
    stepper, model = _line(subject, depth=DEPTHS[net])
    for iteration in BOUNDARIES:
        stepper.optimizer.state.clear()  # no momentum
        with torch.no_grad():
            model.weight.zero_()  # and no decay
        stepper.advance(iteration, until=iteration + 1)
        # The gradient of the cross entropy of two equal logits: -1/2 and 1/2.
        moves[iteration] = round(2 * float(model.weight[0].detach()), 6)
    return equal({i: table[i] for i in BOUNDARIES}, moves)


def _line(subject: Subject, *, depth: int) -> tuple[Stepper, nn.Linear]:
    """Return the smallest net with a stepper of its own: two logits, each a weight times 1.

    Its batches are 128 times the same: input 1, label 0.
    """
    with torch.device("meta"):  # no draws from the global generator
        model = nn.Linear(1, 2, bias=False)
    model.to_empty(device="cpu")
    nn.init.zeros_(model.weight)
    optimizer = make_optimizer(model, subject.recipe)
    accelerator = processes.make_accelerator("cpu", "fp32")
    prepared_model, prepared_optimizer = processes.prepare(accelerator, model, optimizer)
    images, labels = torch.ones(128, 1), torch.zeros(128, dtype=torch.int64)
    still = cast(Batches, _Still(images, labels))
    return (
        Stepper(
            prepared_model, prepared_optimizer, still, accelerator, subject.recipe, depth=depth
        ),
        model,
    )


class _Still:
    """Batches that are always the same."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __call__(self, _iteration: Tensor) -> tuple[Tensor, Tensor]:
        return self.images, self.labels

    def seek(self, iteration: int) -> None:
        """Have any iteration come next."""


def _settings(subject: Subject, *names: str) -> list[dict[str, Any]]:
    found = []
    for net in DEPTHS:
        for group in subject.experiment(net).optimizer.param_groups:
            settings = {name: group[name] for name in names}
            if settings not in found:
                found.append(settings)
    return found


def momentum_setting(subject: Subject) -> Finding:
    """Collect the momentum of all parameter groups of all nets."""
    expected = {"momentum": MOMENTUM, "nesterov": False, "dampening": 0}
    return equal([expected], _settings(subject, *expected))


def decay_setting(subject: Subject) -> Finding:
    """Collect the weight decay of all parameter groups of all nets."""
    return equal([{"weight_decay": WEIGHT_DECAY}], _settings(subject, "weight_decay"))


def coverage(subject: Subject) -> Finding:
    """Look for parameters that the optimizer has not exactly once."""
    offenders = []
    for net in DEPTHS:
        experiment = subject.experiment(net)
        groups = experiment.optimizer.param_groups
        held = [id(parameter) for group in groups for parameter in group["params"]]
        names = {id(parameter): name for name, parameter in experiment.model.named_parameters()}
        offenders += [f"{net}: {name}" for key, name in names.items() if held.count(key) != 1]
        offenders += [f"{net}: a stranger" for key in held if key not in names]
    return none_of(offenders)


def _moved(
    subject: Subject, *, value: float, gradient: float, steps: int
) -> list[dict[str, float]]:
    """Return by how much each parameter of ResNet-20 moves in each step, at learning rate 1.

    Every parameter is `value` before every step, and its gradient always the same.
    """
    model = build_model("resnet20", num_classes=10, seed=0).double()
    optimizer = make_optimizer(model, subject.recipe)
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    moves = []
    for _ in range(steps):
        for parameter in model.parameters():
            nn.init.constant_(parameter, value)
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        moves.append(
            {name: value - float(p.detach().mean()) for name, p in model.named_parameters()}
        )
    return moves


def decay_behaviour(subject: Subject) -> Finding:
    """Look for parameters that do not shrink by 1e-4 when nothing else moves them."""
    (move,) = _moved(subject, value=1.0, gradient=0.0, steps=1)
    return none_of(
        [f"{name}: {moved:g}" for name, moved in move.items() if abs(moved - WEIGHT_DECAY) > 1e-9]
    )


def momentum_behaviour(subject: Subject) -> Finding:
    """Have a gradient of 1 three times: steps of 1, 1.9 and 2.71."""
    moves = _moved(subject, value=0.0, gradient=1.0, steps=3)
    found = [sorted({round(moved, 9) for moved in move.values()}) for move in moves]
    return equal([[1.0], [1.9], [2.71]], found)


def loss_scale(subject: Subject) -> Finding:
    """Compare the loss of the first step with the mean cross entropy over its batch."""
    step = subject.step
    mean = float(F.cross_entropy(step.logits.double(), step.labels))
    return within(1, step.loss / mean, 1e-4)


def gradient_scale(subject: Subject) -> Finding:
    """Compare the last bias's gradient with the mean over 128 images of softmax minus one-hot."""
    step = subject.step
    one_hot = F.one_hot(step.labels, 10)
    mean = (step.logits.softmax(1) - one_hot).sum(0) / 128
    return within(1, float(step.bias_gradient @ mean / (mean @ mean)), 1e-3)


def gradient_coverage(subject: Subject) -> Finding:
    """Look for parameters that the first step's backward pass left out."""
    return none_of(subject.step.without_gradient)


def step_input(subject: Subject) -> Finding:
    """See what reaches the network in a training step, and in which mode it is."""
    expected = "128x3x32x32, training mode"
    mode = "training" if subject.step.is_training else "evaluation"
    return equal(expected, f"{'x'.join(map(str, subject.step.inputs))}, {mode} mode")
