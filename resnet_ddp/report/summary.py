"""Many runs in a few numbers: each model's errors, and whether depth degrades.

Errors are in percent from here on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit

from resnet_ddp.architectures import ARCHITECTURES
from resnet_ddp.records import Group, RunRecord

CONFIDENCE = 0.95
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Sample:
    """Several measurements of one thing.

    Attributes:
        std: with n - 1 below; None for one measurement.
        half_width: of the 95% interval of the mean, by Student's t; None for one measurement.
    """

    n: int
    mean: float
    std: float | None
    half_width: float | None
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        """Describe at least one value."""
        n, mean = len(values), statistics.fmean(values)
        std = statistics.stdev(values) if n > 1 else None
        half_width = None
        if std is not None:
            half_width = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * std / math.sqrt(n)
        return cls(n, mean, std, half_width, min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One model of a group.

    Attributes:
        missing: seeds that are not done.
        test, train, val: final errors in percent; None where no run is done.
        seconds: of training a run, steps alone.
        hardware: on which, every kind once.
    """

    model: str
    layers: int
    parameters: int | None
    missing: tuple[int, ...]
    test: Sample | None
    train: Sample | None
    val: Sample | None
    seconds: Sample | None
    hardware: tuple[str, ...]

    @property
    def n(self) -> int:
        """How many runs are done."""
        return 0 if self.test is None else self.test.n


@dataclass(frozen=True)
class Comparison:
    """Whether one model's final training error is above another's: the paper's degradation.

    Attributes:
        p_value: of Welch's test against "it is not"; None with fewer than two runs of either, or
            without any spread.
    """

    higher: str
    lower: str
    difference: float | None
    p_value: float | None

    def __str__(self) -> str:
        claim = f"{self.higher}'s training error is above {self.lower}'s"
        if self.difference is None or self.p_value is None:
            return f"{claim}: not enough runs"
        verdict = "yes" if self.p_value < SIGNIFICANT else "not shown"
        return f"{claim}: {verdict} ({self.difference:+.2f} points, p = {self.p_value:.2g})"


@dataclass(frozen=True)
class Summary:
    """A group of runs.

    Attributes:
        runs: done or not.
    """

    group: Group
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    runs: tuple[RunRecord, ...]

    @property
    def is_complete(self) -> bool:
        """Whether every cell is done."""
        return not any(row.missing for row in self.rows)


def summarise(
    group: Group, runs: Sequence[RunRecord], models: Sequence[str], seeds: Sequence[int]
) -> Summary:
    """Describe the runs of one group.

    Args:
        models, seeds: the cells that there should be; others that are there are shown too.
    """
    there = [run.model for run in runs]
    all_models = [*models, *dict.fromkeys(model for model in there if model not in models)]
    all_seeds = sorted({*seeds, *(run.seed for run in runs)})
    rows = []
    for model in all_models:
        done = [run for run in runs if run.model == model and run.result is not None]
        expected = all_seeds if model not in models else seeds
        has = {run.seed for run in done}
        rows.append(_row(model, done, tuple(seed for seed in expected if seed not in has)))
    comparisons = (
        _compare(runs, "plain56", "plain20"),
        _compare(runs, "resnet20", "resnet56"),
    )
    return Summary(group, tuple(all_seeds), tuple(rows), comparisons, tuple(runs))


def _row(model: str, done: Sequence[RunRecord], missing: tuple[int, ...]) -> Row:
    def sample(values: Sequence[float | None], scale: float = 1.0) -> Sample | None:
        known = [scale * value for value in values if value is not None]
        return Sample.of(known) if known else None

    counts = {run.result.get("num_parameters") for run in done if run.result is not None}
    count = counts.pop() if len(counts) == 1 else None
    return Row(
        model=model,
        layers=ARCHITECTURES[model].depth,
        parameters=count if isinstance(count, int) else None,
        missing=missing,
        test=sample([run.final("test") for run in done], 100),
        train=sample([run.final("train") for run in done], 100),
        val=sample([run.final("val") for run in done], 100),
        seconds=sample([run.training_seconds for run in done]),
        hardware=tuple(dict.fromkeys(run.config["hardware"] for run in done)),
    )


def _compare(runs: Sequence[RunRecord], higher: str, lower: str) -> Comparison:
    def errors(model: str) -> list[float]:
        found = (run.final("train") for run in runs if run.model == model)
        return [100 * value for value in found if value is not None]

    first, second = errors(higher), errors(lower)
    if len(first) < 2 or len(second) < 2:
        return Comparison(higher, lower, None, None)
    difference = statistics.fmean(first) - statistics.fmean(second)
    return Comparison(higher, lower, difference, welch(first, second))


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the p-value against "the first mean is not above the second" (Welch 1947)."""
    a, b = (statistics.variance(sample) / len(sample) for sample in (first, second))
    if a + b == 0:
        return None
    t = (statistics.fmean(first) - statistics.fmean(second)) / math.sqrt(a + b)
    degrees = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    return float(stdtr(degrees, -t))
