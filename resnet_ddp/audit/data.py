"""Assertions on data: split, order, crops and flips, preprocessing, evaluation."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import cast

import torch
from torch import Tensor, nn

from resnet_ddp.audit.checks import Finding, equal, within
from resnet_ddp.audit.coded import FIRST_TEST, Windows
from resnet_ddp.audit.paper import (
    BATCH_SIZE,
    ITERATIONS,
    NUM_TEST,
    NUM_TRAIN,
    NUM_VAL,
    PASSES,
)
from resnet_ddp.audit.subject import Subject
from resnet_ddp.augment import draw
from resnet_ddp.batches import sample_order
from resnet_ddp.models import CifarNet

SEEDS = 5
CHI_SQUARE = 160  # 80 degrees of freedom: 6 deviations above their mean
DRAWN_PASSES = 4
ODD = 1_234  # images, which no block size divides


def split_sizes(subject: Subject) -> Finding:
    """Count the images trained on, held out and tested."""
    experiment = subject.experiment()
    sizes = (len(experiment.samples), len(experiment.val_samples), len(experiment.test_labels))
    return equal((NUM_TRAIN, NUM_VAL, NUM_TEST), sizes)


def split_covers(subject: Subject) -> Finding:
    """See whether every training image is in one part of the split."""
    experiment = subject.experiment()
    together = torch.cat([experiment.samples, experiment.val_samples])
    times = torch.bincount(together, minlength=50_000)
    found = {f"images {n} times": int((times == n).sum()) for n in torch.unique(times).tolist()}
    return equal({"images 1 times": 50_000}, found)


def split_seeds(subject: Subject) -> Finding:
    """Count the splits of five seeds."""
    experiments = [subject.experiment("resnet20", seed) for seed in range(SEEDS)]
    return equal(1, len({_digest(experiment.val_samples) for experiment in experiments}))


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def iterations(subject: Subject) -> Finding:
    """Count the iterations that there are batches for."""
    return equal(ITERATIONS, len(subject.whole.stepper.batches.order))


def batch_size(subject: Subject) -> Finding:
    """Collect the sizes of all batches: sample numbers of all, drawn images and labels of some."""
    batches = subject.whole.stepper.batches
    sizes = {len(batches.samples_at(iteration)) for iteration in range(len(batches.order))}
    sizes |= {size for pair in subject.drawn.sizes for size in pair}
    return equal([BATCH_SIZE], sorted(sizes))


def passes(subject: Subject) -> Finding:
    """Count the whole passes, laid end to end, that see each of 45,000 images once."""
    order, samples = subject.order, subject.whole.samples
    is_train = torch.bincount(samples, minlength=50_000) == 1
    whole = [
        torch.equal(torch.bincount(some, minlength=50_000), is_train.long())
        for some in torch.split(order, NUM_TRAIN)
        if len(some) == NUM_TRAIN
    ]
    return Finding(
        f"{PASSES} of {PASSES}",
        f"{sum(whole)} of {len(whole)}",
        len(whole) == PASSES and all(whole) and int(is_train.sum()) == NUM_TRAIN,
    )


def held_out(subject: Subject) -> Finding:
    """Count training draws of held-out images, over the whole schedule."""
    return equal(0, int(torch.isin(subject.order, subject.whole.val_samples).sum()))


def test_apart(subject: Subject) -> Finding:
    """Count test images in drawn batches; each image carries its number."""
    return equal(0, int((subject.drawn.windows.numbers >= FIRST_TEST).sum()))


def own_label(subject: Subject) -> Finding:
    """Count drawn images whose label is another image's."""
    drawn = subject.drawn
    return equal(0, int((drawn.windows.numbers % 10 != drawn.labels).sum()))


def permutations(subject: Subject) -> Finding:
    """Count the distinct orders of all whole passes of five seeds."""
    digests = set()
    for seed in range(SEEDS):
        # Seed 0's are at hand.
        order = (
            subject.order
            if seed == 0
            else sample_order(
                subject.recipe, seed=seed, samples=subject.whole.samples, device="cpu"
            ).flatten()
        )
        digests |= {_digest(some.int()) for some in torch.split(order, NUM_TRAIN)[:PASSES]}
    return equal(SEEDS * PASSES, len(digests))


def _offsets(subject: Subject) -> tuple[Tensor, Tensor, Tensor]:
    """Return first row, first column and flip of 45,000 images in each of a few passes, (4, n)."""

    def make() -> tuple[Tensor, Tensor, Tensor]:
        samples = subject.experiment().samples
        drawn = [
            draw(subject.recipe, seed=0, passes=torch.full_like(samples, number), samples=samples)
            for number in range(DRAWN_PASSES)
        ]
        return (
            torch.stack([d.dy for d in drawn]),
            torch.stack([d.dx for d in drawn]),
            torch.stack([d.flip for d in drawn]),
        )

    return subject.once("offsets", make)


def crop_distribution(subject: Subject) -> Finding:
    """Test whether all 81 windows are equally frequent."""
    dy, dx, _ = _offsets(subject)
    low, high = int(torch.stack([dy, dx]).min()), int(torch.stack([dy, dx]).max())
    actual = f"offsets {low}..{high}"
    if (low, high) == (0, 8):
        counts = torch.bincount((9 * dy + dx).flatten(), minlength=81).double()
        mean = dy.numel() / 81
        chi_square = float(((counts - mean).square() / mean).sum())
        actual += f", chi-square {chi_square:.0f}"
        passed = chi_square < CHI_SQUARE
    else:
        passed = False
    return Finding(f"offsets 0..8, chi-square below {CHI_SQUARE}", actual, passed)


def flip_distribution(subject: Subject) -> Finding:
    """Measure how many images are mirrored."""
    flips = _offsets(subject)[2]
    return within(0.5, float(flips.double().mean()), 0.006)


def fresh_augmentation(subject: Subject) -> Finding:
    """Measure how many images look in the next pass as they do in this one: 1 in 162 by chance."""
    dy, dx, flip = _offsets(subject)
    looks = 18 * dy + 2 * dx + flip
    return within(1 / 162, float((looks[1:] == looks[:-1]).double().mean()), 0.01)


def applied_augmentation(subject: Subject) -> Finding:
    """Count images of drawn batches that are not the drawn window of themselves, pixel by pixel."""
    drawn = subject.drawn
    windows = drawn.windows
    draws = draw(subject.recipe, seed=0, passes=drawn.passes, samples=windows.numbers)
    is_drawn = (windows.dy == draws.dy) & (windows.dx == draws.dx) & (windows.flips == draws.flip)
    levels, inside = windows.cut()
    off = (subject.levels(drawn.images.permute(0, 3, 1, 2)) - levels).abs().amax(-1) > 0.01
    is_whole = ~(off & inside).flatten(1).any(1)
    return equal(0, int((~(is_drawn & is_whole)).sum()))


def padding_value(subject: Subject) -> Finding:
    """Collect the values, after normalisation, of all pixels of drawn batches that are padding."""
    _, inside = subject.drawn.windows.cut()
    values = torch.unique(subject.drawn.images[~inside]).tolist()
    return equal([0.0], values[:5])


def normalisation(subject: Subject) -> Finding:
    """Measure each channel of normalised, un-augmented training images: mean 0, deviation 1."""
    experiment = subject.experiment()
    normalise = experiment.stepper.batches.normalise
    images = normalise(experiment.train_images[::10]).double().flatten(0, 2)
    off = [images.mean(0).abs().max(), (images.std(0) - 1).abs().max()]
    return within(0, float(max(off)), 0.02)


class _Marker(nn.Module):
    """A network that notes what it is shown, and labels all but the first `num_wrong` rightly."""

    def __init__(self, subject: Subject, first: int, num_wrong: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.subject, self.first, self.num_wrong = subject, first, num_wrong
        self.windows: list[Windows] = []
        self.num_damaged = 0
        self.modes: set[bool] = set()

    def forward(self, images: Tensor) -> Tensor:
        levels = self.subject.levels(images)
        windows = Windows.read(levels)
        expected, inside = windows.cut()
        is_damaged = ((levels - expected).abs().amax(-1) > 0.01) | ~inside
        self.num_damaged += int(is_damaged.flatten(1).any(1).sum())
        self.windows.append(windows)
        self.modes.add(self.training)
        is_wrong = (windows.numbers - self.first < self.num_wrong).long()
        return nn.functional.one_hot((windows.numbers + is_wrong) % 10, 10).float()


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What an evaluation of the test set and one of some held-out images did."""

    test: _Marker
    val: _Marker
    test_error: float
    val_numbers: Tensor
    mode_after: bool


def _evaluated(subject: Subject) -> Evaluated:
    def make() -> Evaluated:
        experiment = subject.experiment()
        test, val = _Marker(subject, FIRST_TEST, ODD), _Marker(subject, 0, 0)
        val_numbers = experiment.val_samples[:ODD]
        test.train()
        test_error = dataclasses.replace(experiment, model=cast(CifarNet, test)).test_error_rate()
        dataclasses.replace(
            experiment, model=cast(CifarNet, val), val_samples=val_numbers
        ).val_error_rate()
        return Evaluated(test, val, test_error, val_numbers, test.training)

    return subject.once("evaluated", make)


def evaluation_count(subject: Subject) -> Finding:
    """Count how often each test image, and each of 1,234 held-out ones, was evaluated."""
    evaluated = _evaluated(subject)
    found = []
    for marker, numbers in (
        (evaluated.test, FIRST_TEST + torch.arange(NUM_TEST)),
        (evaluated.val, evaluated.val_numbers),
    ):
        seen = torch.cat([windows.numbers for windows in marker.windows])
        once = torch.equal(seen.sort().values, numbers)
        found.append(f"{len(seen):,} {'once each' if once else 'not once each'}")
    return equal([f"{NUM_TEST:,} once each", f"{ODD:,} once each"], found)


def evaluation_error(subject: Subject) -> Finding:
    """Compare the error rate of a network that labels 1,234 of 10,000 images wrongly."""
    return equal(0.1234, _evaluated(subject).test_error)


def evaluation_images(subject: Subject) -> Finding:
    """Count evaluated images that are not the stored ones, whole and unmirrored."""
    evaluated = _evaluated(subject)
    changed = 0
    for marker in (evaluated.test, evaluated.val):
        changed += marker.num_damaged
        for windows in marker.windows:
            is_plain = (windows.dy == 4) & (windows.dx == 4) & (windows.flips == 0)
            changed += int((~is_plain).sum())
    return equal(0, changed)


def evaluation_mode(subject: Subject) -> Finding:
    """See in which mode the network was during the evaluation, and after it."""
    evaluated = _evaluated(subject)
    during = sorted(evaluated.test.modes | evaluated.val.modes)
    names = ["training" if mode else "evaluation" for mode in during]
    after = "training" if evaluated.mode_after else "evaluation"
    return equal("evaluation, then training", f"{', '.join(names)}, then {after}")
