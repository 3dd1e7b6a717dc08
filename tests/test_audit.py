"""The audit: it passes on this recipe, and a planted bug trips the line that is about it."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from resnet_ddp import augment, models, step
from resnet_ddp.architectures import ARCHITECTURES, Architecture
from resnet_ddp.audit.checks import Check, as_json, render, verdict
from resnet_ddp.audit.coded import FIRST_TEST, Windows, coded_dataset, coded_images
from resnet_ddp.audit.paper import DEVIATIONS, DIVISORS, learning_rates, parameters_of
from resnet_ddp.audit.recipe import ASSERTIONS, run_audit
from resnet_ddp.audit.subject import Subject
from resnet_ddp.audit.trained import audit_run, deviations_of
from resnet_ddp.augment import Draws, as_network_input, crop_and_flip, draw
from resnet_ddp.batches import Batches, sample_order, split
from resnet_ddp.cli import main
from resnet_ddp.datasets import Dataset
from resnet_ddp.evaluate import error_rate
from resnet_ddp.exits import ExitCode, UserError
from resnet_ddp.models import (
    Block,
    CifarNet,
    IdentityShortcut,
    MaxPoolShortcut,
    ProjectionShortcut,
)
from resnet_ddp.recipe import RECIPES, Recipe
from resnet_ddp.step import Stepper, make_optimizer

# Quick ones of every kind, which a bug elsewhere must leave alone.
OTHERS = {
    "batchnorm-running",
    "momentum-behaviour",
    "lr-in-steps-resnet20",
    "split-covers",
    "split-sizes",
    "crop-distribution",
    "flip-distribution",
    "augmentation-fresh",
    "normalisation",
}
NETS = ("resnet20", "resnet56", "resnet110", "plain20", "plain56")
RATES = {f"learning-rate-{net}" for net in NETS}
RATES_110 = {"learning-rate-resnet110", "lr-in-steps-resnet110"}
STEPS = {"lr-in-steps-resnet20", "lr-in-steps-resnet110"}
RESIDUAL_PARAMETERS = {f"parameters-{net}" for net in NETS if net.startswith("resnet")}
PARAMETERS = {f"parameters-{net}" for net in NETS} | {"parameters-others"}

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def data() -> Dataset:
    return coded_dataset()


def failed(checks: list[Check]) -> set[str]:
    return {check.id for check in checks if not check.passed}


def test_the_recipe_is_the_papers(data: Dataset) -> None:
    subject = Subject("he2015", data)
    checks = run_audit(subject=subject)
    assert [check for check in checks if not check.passed] == []
    assert verdict(checks) is ExitCode.DONE
    assert len({check.id for check in checks}) == len(checks) == len(ASSERTIONS) > 50
    assert not torch.isnan(subject.drawn.images).any()
    text = render(checks, DEVIATIONS)
    assert max(map(len, text.splitlines())) <= 100
    assert f"PASS: all {len(checks)}" in text
    assert "Deviations from the paper" in text
    assert json.loads(as_json(checks))["verdict"] == "PASS"


# --- Bugs, one at a time. Each is a function that plants it.


def everywhere(patch: Patch, original: object, replacement: object) -> None:
    """Replace a function under every name that a module of ours has for it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("resnet_ddp"):
            for key, value in list(vars(module).items()):
                if value is original:
                    patch.setattr(module, key, replacement)


def rate(new: Callable[[int, int], float]) -> Callable[[Patch], None]:
    """Plant a schedule (iteration, depth) -> learning rate."""

    def lr_at(self: Recipe, iteration: int, *, depth: int) -> float:
        if iteration >= self.iterations:
            raise ValueError
        return new(iteration, depth)

    return lambda patch: patch.setattr(Recipe, "lr_at", lr_at)


def paper_rate(iteration: int, depth: int) -> float:
    if depth >= 110 and iteration < 400:
        return 0.01
    return 0.1 if iteration < 32_000 else 0.01 if iteration < 48_000 else 0.001


def seed_projects_rate(iteration: int, depth: int) -> float:
    wrong = depth >= 110 and iteration >= 32_000
    return paper_rate(iteration, depth) / (10 if wrong else 1)


def stuck_rate(iteration: int, depth: int) -> float:
    return 0.01 if depth >= 110 else paper_rate(iteration, depth)


def rate_not_written(patch: Patch) -> None:
    patch.setattr(Stepper, "set_rate", lambda self: None)


def sgd(**settings: Any) -> Callable[[Patch], None]:
    def make(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
        paper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
        return torch.optim.SGD(model.parameters(), **(paper | settings))

    return lambda patch: everywhere(patch, make_optimizer, make)


def no_decay_of_batchnorm(patch: Patch) -> None:
    def make(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-4)

    everywhere(patch, make_optimizer, make)


def forgotten_bias(patch: Patch) -> None:
    def make(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
        parameters = [p for name, p in model.named_parameters() if name != "linear.bias"]
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)

    everywhere(patch, make_optimizer, make)


def padding_at_both_ends(patch: Patch) -> None:
    def forward(self: IdentityShortcut, x: Tensor) -> Tensor:
        half = self.new_channels // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))

    patch.setattr(IdentityShortcut, "forward", forward)


def odd_pixels(patch: Patch) -> None:
    def forward(self: IdentityShortcut, x: Tensor) -> Tensor:
        return F.pad(x[:, :, 1::2, 1::2], (0, 0, 0, 0, 0, self.new_channels))

    patch.setattr(IdentityShortcut, "forward", forward)


def shortcut(kind: type[nn.Module]) -> Callable[[Patch], None]:
    return lambda patch: patch.setitem(models.SHORTCUTS, "A", kind)


def added_after_relu(patch: Patch) -> None:
    def forward(self: Block, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return out if self.shortcut is None else out + self.shortcut(x)

    patch.setattr(Block, "forward", forward)


def no_relu_between(patch: Patch) -> None:
    def forward(self: Block, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return F.relu(out if self.shortcut is None else out + self.shortcut(x))

    patch.setattr(Block, "forward", forward)


def max_pooled_end(patch: Patch) -> None:
    def forward(self: CifarNet, images: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.conv(images))))
        logits: Tensor = self.linear(x.amax(dim=(2, 3)))
        return logits

    patch.setattr(CifarNet, "forward", forward)


def stride_on_second(patch: Patch) -> None:
    original = Block.__init__

    def init(self: Block, *arguments: Any) -> None:
        original(self, *arguments)
        self.conv1.stride, self.conv2.stride = self.conv2.stride, self.conv1.stride

    patch.setattr(Block, "__init__", init)


def convolution(**settings: Any) -> Callable[[Patch], None]:
    def make(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
        options = {"kernel_size": 3, "padding": 1, "bias": False} | settings
        conv = nn.Conv2d(in_channels, out_channels, stride=stride, **options)
        return conv

    return lambda patch: patch.setattr(models, "conv3x3", make)


def plain_with_shortcut(patch: Patch) -> None:
    patch.setitem(ARCHITECTURES, "plain20", Architecture(20, "A"))


def too_shallow(patch: Patch) -> None:
    patch.setitem(ARCHITECTURES, "resnet56", Architecture(50, "A"))


def fan_in(patch: Patch) -> None:
    original = nn.init.kaiming_normal_

    def init(weight: Tensor, *, mode: str, **options: Any) -> Tensor:
        return original(weight, mode="fan_in", **options)

    patch.setattr(nn.init, "kaiming_normal_", init)


def uniform(patch: Patch) -> None:
    def init(weight: Tensor, *, generator: torch.Generator, **_: Any) -> Tensor:
        return nn.init.kaiming_uniform_(
            weight, mode="fan_out", nonlinearity="relu", generator=generator
        )

    patch.setattr(nn.init, "kaiming_normal_", init)


def wide_linear(patch: Patch) -> None:
    patch.setattr(models, "math", SimpleNamespace(sqrt=lambda number: math.sqrt(number) / 2))


def frozen_layer(patch: Patch) -> None:
    original = models.build_model

    def build(name: str, *, num_classes: int, seed: int) -> CifarNet:
        model = original(name, num_classes=num_classes, seed=seed)
        model.conv.weight.requires_grad_(False)
        return model

    everywhere(patch, original, build)


def one_seed(patch: Patch) -> None:
    original = models.build_model
    everywhere(patch, original, lambda name, *, num_classes, seed: original(
        name, num_classes=num_classes, seed=0
    ))  # fmt: skip


def batchnorm(**settings: Any) -> Callable[[Patch], None]:
    original = nn.BatchNorm2d.__init__

    def init(self: nn.BatchNorm2d, num_features: int, *rest: Any) -> None:
        original(self, num_features, **settings)

    return lambda patch: patch.setattr(nn.BatchNorm2d, "__init__", init)


def zero_gamma(patch: Patch) -> None:
    patch.setattr(
        nn.BatchNorm2d, "reset_parameters", lambda self: [
            self.reset_running_stats(), nn.init.zeros_(self.weight), nn.init.zeros_(self.bias)
        ],
    )  # fmt: skip


def black_padding(patch: Patch) -> None:
    def crop(images: Tensor, draws: Draws, padding: int) -> Tensor:
        marks = crop_and_flip(torch.ones_like(images), draws, padding)
        return crop_and_flip(images, draws, padding) - 1.9 * (1 - marks)

    everywhere(patch, crop_and_flip, crop)


def not_augmented(patch: Patch) -> None:
    everywhere(patch, crop_and_flip, lambda images, draws, padding: images)


def flipped_before_crop(patch: Patch) -> None:
    # As likely windows, but not those that were drawn.
    def crop(images: Tensor, draws: Draws, padding: int) -> Tensor:
        dx = torch.where(draws.flip == 1, 8 - draws.dx, draws.dx)
        return crop_and_flip(images, Draws(draws.dy, dx, draws.flip), padding)

    everywhere(patch, crop_and_flip, crop)


def drawn(change: Callable[[Draws], Draws]) -> Callable[[Patch], None]:
    def new(recipe: Recipe, **keys: Any) -> Draws:
        return change(draw(recipe, **keys))

    return lambda patch: everywhere(patch, draw, new)


def same_crops_in_every_pass(patch: Patch) -> None:
    def new(recipe: Recipe, *, seed: int, passes: Tensor, samples: Tensor) -> Draws:
        return draw(recipe, seed=seed, passes=torch.zeros_like(passes), samples=samples)

    everywhere(patch, draw, new)


def evaluation(
    *, augmented: bool = False, drop_last: bool = False, training: bool = False
) -> Callable[[Patch], None]:
    @torch.no_grad()
    def new(model: nn.Module, *, images: Tensor, labels: Tensor, samples: Tensor, normalise: Any,
            accelerator: Any) -> float:  # fmt: skip
        model.train(training)
        errors = 0
        for block in torch.split(samples, 128):
            if drop_last and len(block) < 128:
                continue
            shown = normalise(images[block])
            if augmented:
                zero = torch.zeros_like(block)
                shown = crop_and_flip(shown, Draws(zero + 3, zero + 4, zero), 4)
            errors += int((model(as_network_input(shown)).argmax(1) != labels[block]).sum())
        model.train()
        return errors / len(samples)

    return lambda patch: everywhere(patch, error_rate, new)


def padded_count(patch: Patch) -> None:
    def new(*arguments: Any, samples: Tensor, **rest: Any) -> float:
        padded = -(-len(samples) // 128) * 128
        return error_rate(*arguments, samples=samples, **rest) * len(samples) / padded

    everywhere(patch, error_rate, new)


def short_last_batch(patch: Patch) -> None:
    def samples_at(self: Batches, iteration: int) -> Tensor:
        whole = self.order[int(iteration)].long()
        return whole[:72] if iteration % 352 == 351 else whole

    patch.setattr(Batches, "samples_at", samples_at)


def seed_plus_pass(patch: Patch) -> None:
    def new(recipe: Recipe, *, seed: int, samples: Tensor, device: Any) -> Tensor:
        total, orders = 128 * recipe.iterations, []
        for number in range(-(-total // len(samples))):
            generator = torch.Generator().manual_seed(seed + number)
            orders.append(samples[torch.randperm(len(samples), generator=generator)].int())
        return torch.cat(orders)[:total].view(-1, 128)

    everywhere(patch, sample_order, new)


def with_replacement(patch: Patch) -> None:
    def new(recipe: Recipe, *, seed: int, samples: Tensor, device: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (recipe.iterations, 128)
        return samples[torch.randint(len(samples), shape, generator=generator)].int()

    everywhere(patch, sample_order, new)


def trained_on_held_out(patch: Patch) -> None:
    def new(recipe: Recipe, *, seed: int, samples: Tensor, device: Any) -> Tensor:
        return torch.arange(128 * recipe.iterations).remainder(50_000).int().view(-1, 128)

    everywhere(patch, sample_order, new)


def split_of_its_own(patch: Patch) -> None:
    calls = itertools.count()

    def new(recipe: Recipe, num_images: int) -> tuple[Tensor, Tensor]:
        order = torch.arange(num_images).roll(next(calls))
        return order[5_000:].sort().values, order[:5_000].sort().values

    everywhere(patch, split, new)


def overlapping_split(patch: Patch) -> None:
    def new(recipe: Recipe, num_images: int) -> tuple[Tensor, Tensor]:
        return torch.arange(45_000), torch.arange(40_000, 45_000)

    everywhere(patch, split, new)


def no_split(patch: Patch) -> None:
    def new(recipe: Recipe, num_images: int) -> tuple[Tensor, Tensor]:
        return torch.arange(50_000), torch.arange(5_000)

    everywhere(patch, split, new)


def summed_loss(patch: Patch) -> None:
    def loss(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        return 128 * F.cross_entropy(logits, labels, reduction=reduction)

    patch.setattr(step, "F", SimpleNamespace(cross_entropy=loss))


def trained_in_evaluation_mode(patch: Patch) -> None:
    original = Stepper.step

    def frozen(self: Stepper) -> None:
        self.model.eval()  # type: ignore[attr-defined]
        original(self)

    patch.setattr(Stepper, "step", frozen)


def batches_of(
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Callable[[Patch], None]:
    """Plant a change of images and labels between data set and batches."""
    original = Batches.__init__

    def init(self: Batches, recipe: Recipe, *, images: Tensor, labels: Tensor, **rest: Any) -> None:
        images, labels = change(images, labels)
        original(self, recipe, images=images, labels=labels, **rest)

    return lambda patch: patch.setattr(Batches, "__init__", init)


def with_test_images(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    test = torch.from_numpy(coded_images(FIRST_TEST + np.arange(5_000)))
    return torch.cat([test, images[5_000:]]), labels


def not_divided(patch: Patch) -> None:
    original = augment.Normalisation.channel
    patch.setattr(
        augment.Normalisation,
        "channel",
        classmethod(lambda cls, mean, std, device: original(mean, (1.0, 1.0, 1.0), device)),
    )


Bug = Callable[[Patch], None]

# What is planted, and the lines that have to fail.
BUGS: dict[str, tuple[Bug, set[str]]] = {
    "seed project's schedule": (rate(seed_projects_rate), RATES_110),
    "never leaves 0.01": (rate(stuck_rate), RATES_110),
    "drop one late": (rate(lambda i, depth: paper_rate(max(0, i - 1), depth)), RATES | STEPS),
    "a step per process": (rate(lambda i, depth: paper_rate(2 * i, depth)), RATES | STEPS),
    "all nets warmed up": (
        rate(lambda i, depth: paper_rate(i, 110)),
        RATES - RATES_110 | {"lr-in-steps-resnet20"},
    ),
    "rate not written": (rate_not_written, RATES | STEPS),
    "no decay of BatchNorm": (
        no_decay_of_batchnorm,
        {"weight-decay", "weight-decay-behaviour"},
    ),
    "decay 5e-4": (sgd(weight_decay=5e-4), {"weight-decay", "weight-decay-behaviour"}),
    "nesterov": (sgd(nesterov=True), {"momentum", "momentum-behaviour"} | STEPS),
    "momentum 0.85": (sgd(momentum=0.85), {"momentum", "momentum-behaviour"}),
    "dampening": (sgd(dampening=0.1), {"momentum", "momentum-behaviour"}),
    "forgotten bias": (
        forgotten_bias,
        {"optimizer-coverage", "weight-decay-behaviour", "momentum-behaviour"},
    ),
    "channels at both ends": (padding_at_both_ends, {"shortcut-option-a"}),
    "odd pixels": (odd_pixels, {"shortcut-option-a"}),
    "max pooling": (shortcut(MaxPoolShortcut), {"shortcut-option-a"}),
    "projection": (
        shortcut(ProjectionShortcut),
        RESIDUAL_PARAMETERS | {"weighted-layers", "convolution-kind", "shortcut-option-a"},
    ),
    "added after the ReLU": (added_after_relu, {"shortcut-option-a"}),
    "no ReLU between": (no_relu_between, {"layer-order"}),
    "max pooling at the end": (max_pooled_end, {"network-end"}),
    "linear layer twice as wide": (wide_linear, {"init-linear"}),
    "frozen layer": (frozen_layer, {"gradient-coverage"}),
    "evaluation counts padding": (padded_count, {"evaluation-error"}),
    "stride on the second": (stride_on_second, {"strides"}),
    "convolution with bias": (convolution(bias=True), PARAMETERS | {"convolution-kind"}),
    "mirrored padding": (convolution(padding_mode="reflect"), {"convolution-kind"}),
    "plain with shortcut": (plain_with_shortcut, {"plain-nets"}),
    "depth 50": (too_shallow, {"parameters-resnet56", "weighted-layers", "widths"}),
    "fan_in": (fan_in, {"init-convolutions"}),
    "uniform": (uniform, {"init-normal"}),
    "one seed for all": (one_seed, {"init-seeds"}),
    "eps 1e-3": (batchnorm(eps=1e-3), {"batchnorm-constants", "batchnorm-batch"}),
    "BatchNorm momentum 0.01": (
        batchnorm(momentum=0.01),
        {"batchnorm-constants", "batchnorm-running"},
    ),
    "zero gamma": (zero_gamma, {"init-batchnorm", "batchnorm-batch"}),
    "black padding": (black_padding, {"padding-value"}),
    "not augmented": (not_augmented, {"augmentation-applied"}),
    "another window": (flipped_before_crop, {"augmentation-applied"}),
    "crops 0..7": (
        drawn(lambda d: Draws(d.dy % 8, d.dx % 8, d.flip)),
        {"crop-distribution"},
    ),
    "crops that favour the corner": (
        drawn(lambda d: Draws(torch.minimum(d.dy, d.dx), d.dx, d.flip)),
        {"crop-distribution", "augmentation-fresh"},
    ),
    "never flipped": (
        drawn(lambda d: Draws(d.dy, d.dx, 0 * d.flip)),
        {"flip-distribution"},
    ),
    "same crops in every pass": (
        same_crops_in_every_pass,
        {"augmentation-fresh", "crop-distribution"},
    ),
    "evaluation augmented": (evaluation(augmented=True), {"evaluation-images"}),
    "evaluation drops its last batch": (
        evaluation(drop_last=True),
        {"evaluation-count"},
    ),
    "evaluation in training mode": (evaluation(training=True), {"evaluation-mode"}),
    "batch of 72": (short_last_batch, {"batch-size"}),
    "seed + pass": (seed_plus_pass, {"permutations"}),
    "with replacement": (with_replacement, {"passes"}),
    "held-out images trained on": (trained_on_held_out, {"passes", "held-out"}),
    "every seed its split": (split_of_its_own, {"split-seeds"}),
    "overlapping split": (overlapping_split, {"split-covers"}),
    "nothing held out": (no_split, {"split-sizes", "split-covers"}),
    "loss summed": (summed_loss, {"loss-scale", "gradient-scale"} | STEPS),
    "trained in evaluation mode": (trained_in_evaluation_mode, {"step-input"}),
    "test images in training": (batches_of(with_test_images), {"test-apart"}),
    "another's label": (batches_of(lambda x, y: (x, y.roll(1))), {"own-label"}),
    "not divided": (not_divided, {"normalisation"}),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_trips_its_lines(
    name: str, monkeypatch: pytest.MonkeyPatch, data: Dataset
) -> None:
    plant, lines = BUGS[name]
    plant(monkeypatch)
    checks = run_audit(only=lines | OTHERS, subject=Subject("he2015", data))
    assert failed(checks) == lines, render(checks)
    assert verdict(checks) is ExitCode.FAILED


@pytest.mark.parametrize(
    ("recipe", "lines"),
    [
        ("he2015-two-gpus", {"batchnorm-batch", "batchnorm-running"}),
        ("he2015-eighth", {"learning-rate-resnet20", "iterations"} | STEPS),
        ("he2015-50k", {"split-sizes"}),
    ],
)
def test_another_recipe_fails_where_it_departs_from_the_paper(
    recipe: str, lines: set[str], data: Dataset
) -> None:
    subject = Subject(recipe, data)
    assert failed(run_audit(recipe, only=lines | OTHERS, subject=subject)) == lines


def test_every_line_is_tripped_by_a_bug() -> None:
    tripped = set[str]().union(*(lines for _, lines in BUGS.values()))
    never = {assertion.id for assertion in ASSERTIONS} - tripped
    assert never == {"iterations"}  # of another recipe, above


def test_what_cannot_be_measured_has_failed(monkeypatch: pytest.MonkeyPatch, data: Dataset) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of order")

    everywhere(monkeypatch, draw, broken)
    (check,) = run_audit(only={"flip-distribution"}, subject=Subject("he2015", data))
    assert (check.passed, check.actual) == (False, "RuntimeError: out of order")


def test_windows_of_coded_images_are_read_back() -> None:
    numbers = torch.tensor([0, 255, 256, 49_999, FIRST_TEST + 9_999])
    expected = Draws(
        dy=torch.tensor([0, 4, 8, 3, 1]),
        dx=torch.tensor([8, 4, 0, 3, 2]),
        flip=torch.tensor([0, 1, 1, 0, 1]),
    )
    images = torch.from_numpy(coded_images(numbers.numpy())).float()
    crops = crop_and_flip(images, expected, 4)
    windows = Windows.read(crops)
    assert torch.equal(windows.numbers, numbers)
    assert torch.equal(windows.dy, expected.dy)
    assert torch.equal(windows.dx, expected.dx)
    assert torch.equal(windows.flips, expected.flip)
    levels, inside = windows.cut()
    assert torch.equal(crops, levels * inside[..., None])
    assert inside[1].all() and not inside[0].all()


def test_paper_literals() -> None:
    table = learning_rates(110)
    assert len(table) == 64_000
    places = (0, 399, 400, 31_999, 32_000, 47_999, 48_000, 63_999)
    assert [table[i] for i in places] == [0.01, 0.01, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert learning_rates(20, 2000) == [0.1] * 16 + [0.01] * 8 + [0.001] * 8
    assert parameters_of("resnet20-b", 10) == 272_474
    assert parameters_of("plain20", 100) == 269_722 + 90 * 65
    assert set(DIVISORS) == set(RECIPES)


# --- Runs.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Iterator[Path]:
    """A run of 12 iterations, done; its recipe is known to the audit."""
    runs = tmp_path_factory.mktemp("audited")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, SHORT.name, SHORT)
        patch.setitem(DIVISORS, SHORT.name, 5333)  # drops at 6 and 9, end at 12
        code = main(
            ["train", "resnet20", "--data", str(small_data), "--recipe", "short", "--runs",
             str(runs), "--grid", "g", "--threads", "1", "--device", "cpu", "--precision", "fp32"]
        )  # fmt: skip
        assert code == 0
        yield runs / "g" / "resnet20" / "seed0"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "resnet20" / "seed0"
    shutil.copytree(trained, copy)
    return copy


def test_a_run_passes(run: Path) -> None:
    checks = audit_run(run)
    assert [check for check in checks if not check.passed] == []
    assert len(checks) == 16
    text = render(checks, deviations_of(run))
    assert "12 iterations, the whole schedule divided by 5,333" in text
    assert "not known to be CIFAR-10 as published (drawn for the tests)" in text
    assert "warmed up" not in text


def test_the_command_audits_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "PASS"
    change_object("result.json", num_parameters=1)(run)
    assert main(["audit", str(run)]) == 1
    assert "FAIL: 1 of" in capsys.readouterr().out
    assert main(["audit", str(run / "nowhere")]) == 2


def change_lines(
    change: Callable[[list[dict[str, Any]]], object],
) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        path = run / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        change(lines)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    return apply


def change_object(name: str, **values: Any) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        path = run / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def change_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        tensors = load_file(run / "model.safetensors")
        change(tensors)
        save_file(tensors, run / "model.safetensors")

    return apply


def renamed(run: Path) -> None:
    run.rename(run.with_name("seed9"))
    run.symlink_to("seed9")


RECIPE_FIELDS = SHORT.fields()
LINES: list[tuple[Callable[[Path], None], set[str]]] = [
    (change_lines(lambda lines: lines[8].update(lr=0.2)), {"run-learning-rate"}),
    (change_lines(lambda lines: lines.pop(3)), {"run-logged"}),
    (change_lines(lambda lines: lines.insert(1, lines[0])), {"run-logged"}),
    (
        change_lines(lambda lines: lines.remove(next(x for x in lines if "val/error_rate" in x))),
        {"run-evaluated"},
    ),
    (change_lines(lambda lines: lines[0].update({"train/loss": float("nan")})), {"run-losses"}),
    (
        change_lines(lambda lines: lines.insert(0, {"iteration": 1, "test/error_rate": 0.5})),
        {"run-tested-once"},
    ),
    (change_lines(lambda lines: lines.insert(0, lines.pop())), {"run-tested-once"}),
    (change_object("result.json", test_error_rate=0.01), {"run-result-errors"}),
    (change_object("result.json", seed=4), {"run-result-identity"}),
    (change_object("result.json", num_parameters=1), {"run-parameters"}),
    (change_object("config.json", data_sha256="x"), {"run-data", "run-result-identity"}),
    (change_object("config.json", recipe_hash="x"), {"run-recipe-hash", "run-result-identity"}),
    (
        change_object("config.json", recipe_fields=RECIPE_FIELDS | {"momentum": 0.85}),
        {"run-recipe-fields"},
    ),
    (change_weights(lambda tensors: tensors["conv.weight"].fill_(float("nan"))), {"run-finite"}),
    (change_weights(lambda tensors: tensors.pop("bn.weight")), {"run-parameters"}),
    (change_weights(lambda tensors: tensors["bn.num_batches_tracked"].sub_(1)), {"run-steps"}),
    (renamed, {"run-place"}),
]


@pytest.mark.parametrize("case", range(len(LINES)))
def test_records_that_were_tampered_with_are_found_out(run: Path, case: int) -> None:
    change, lines = LINES[case]
    change(run)
    assert failed(audit_run(run)) == lines


def test_a_run_that_is_not_done_is_audited_as_far_as_it_goes(run: Path) -> None:
    (run / "result.json").unlink()
    (run / "model.safetensors").unlink()
    change_lines(lambda lines: lines.__delitem__(slice(7, None)))(run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 9, "trai')  # half a line, while the run goes on
    checks = {check.id: check for check in audit_run(run)}
    assert failed(list(checks.values())) == set()
    assert checks["run-progress"].actual.endswith("of 12: not done, audited as far as it goes")
    assert "run-finite" not in checks


def test_a_run_of_an_unknown_recipe_fails(run: Path) -> None:
    change_object("config.json", recipe="mine")(run)
    assert failed(audit_run(run)) == {
        "run-recipe",
        "run-recipe-hash",
        "run-recipe-fields",
        "run-result-identity",
    }


@pytest.mark.parametrize("recipe", ["he2015-50k", "he2015-two-gpus", "he2015-pixelmean"])
def test_deviations_are_those_of_the_runs_recipe(run: Path, recipe: str) -> None:
    change_object(
        "config.json", recipe=recipe, model="resnet110", precision="bf16", data_original=True
    )(run)
    effects = {deviation.what for deviation in deviations_of(run)}
    assert any("bf16" in what for what in effects)
    assert any("400 iterations" in what for what in effects)
    assert any("50,000" in what for what in effects) == (recipe == "he2015-50k")
    assert any("128 images" in what for what in effects) == (recipe != "he2015-two-gpus")
    assert any("channel" in what for what in effects) == (recipe != "he2015-pixelmean")
    assert not any("published" in what for what in effects)


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run's directory \(no config\.json\)"):
        audit_run(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "damaged"),
        ("config.json", b"[]", "not a JSON object"),
        ("config.json", b"{}", "model: None"),
        ("result.json", b"\xff", "damaged"),
        ("metrics.jsonl", b"{}\n", "line 1"),
        ("metrics.jsonl", b'{"iteration": 1}\nx', "line 2"),
        ("model.safetensors", b"x", "cannot be read"),
    ],
)
def test_damaged_records_are_refused(run: Path, name: str, content: bytes, message: str) -> None:
    (run / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as refusal:
        audit_run(run)
    assert str(run / name) in str(refusal.value)
    assert len(str(refusal.value).splitlines()) <= 2
