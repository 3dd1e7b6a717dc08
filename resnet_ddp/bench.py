"""Speed, side by side with a stock loop in one process, on whatever this machine is.

First both are shown to train: the same network from the same weights in fp32, mean losses over
iterations 150-200 within 5%. Then they take turns, so that whatever else the machine is doing slows
both, and the median over the turns is reported with its spread. The first step, with compilation
and the workers' start, is reported apart.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from resnet_ddp import machine, stock
from resnet_ddp.datasets import Dataset
from resnet_ddp.experiment import build_experiment
from resnet_ddp.models import build_model
from resnet_ddp.recipe import HE2015

TRAIN_CHECK = (150, 200)  # iterations whose mean losses are compared
TRAIN_TOLERANCE = 0.05
WARM_UP = 3  # steps after the first, before timing
PAUSE = 1.0  # seconds for a loader's workers to fill their queues and fall idle


@dataclass(frozen=True)
class Timing:
    """One contender's times over the turns.

    Attributes:
        first_step: seconds, with compilation or the start of workers.
        turns: ms an iteration, one value a turn.
        gflop: floating-point operations of an iteration, in 10**9.
        peak_gflops: this machine's measured rate for a large matrix product of the precision.
    """

    name: str
    first_step: float
    turns: list[float]
    gflop: float
    peak_gflops: float

    @property
    def median(self) -> float:
        """Ms an iteration."""
        return statistics.median(self.turns)

    @property
    def images_per_second(self) -> float:
        """At the median."""
        return HE2015.batch_size / self.median * 1e3

    @property
    def share_of_peak(self) -> float:
        """Floating-point rate at the median over the machine's."""
        return self.gflop / (self.median * 1e-3) / self.peak_gflops

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self) | {
            "median_ms": self.median,
            "min_ms": min(self.turns),
            "max_ms": max(self.turns),
            "images_per_second": self.images_per_second,
            "share_of_peak": self.share_of_peak,
        }


@dataclass(frozen=True)
class Setting:
    """What is measured, and with what."""

    model: str
    data: Dataset
    device: str
    precision: str
    compile: bool
    threads: int
    turns: int
    iterations: int  # of a turn

    def stock(self) -> Callable[[int], float]:
        """Return a function that makes so many steps of the stock loop; its loss."""
        model = build_model(self.model, num_classes=self.data.num_classes, seed=0)
        torch.set_num_threads(self.threads)
        losses = stock.train(model, self.data, self.device)

        def steps(count: int) -> float:
            with machine.inexact_arithmetic_allowed():  # as most people leave it
                return _last(losses, count)

        return steps

    def ours(self, precision: str) -> Callable[[int], float]:
        """Return a function that makes so many of our steps; its loss."""
        experiment = build_experiment(
            HE2015,
            model_name=self.model,
            seed=0,
            data=self.data,
            device=self.device,
            precision=precision,
            compile=self.compile,
            threads=self.threads,
        )
        iteration = 0

        def steps(count: int) -> float:
            nonlocal iteration
            iteration = experiment.stepper.advance(iteration, until=iteration + count)
            return float(experiment.stepper.loss)  # device synchronisation

        return steps


def run(setting: Setting, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and return the result as plain values.

    Args:
        say: shows a line to whoever waits.
    """
    say("do both train? 200 iterations each in fp32")
    training = compare_training(setting)
    say(
        f"mean loss over iterations 150-200: stock {training['stock']:.3f}, "
        f"ours {training['ours']:.3f}, {training['difference']:.1%} apart"
    )
    gflop = count_gflop(setting.model, setting.data.num_classes)
    peaks = {name: measure_peak(setting, name) for name in {"fp32", setting.precision}}
    contenders = {"stock": setting.stock(), "ours": setting.ours(setting.precision)}
    first = {name: _seconds(steps, 1) for name, steps in contenders.items()}
    for steps in contenders.values():
        steps(WARM_UP)
    turns: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(setting.turns):
        say(f"turn {turn + 1} of {setting.turns}")
        for name, steps in contenders.items():
            time.sleep(PAUSE)
            turns[name].append(_seconds(steps, setting.iterations) / setting.iterations * 1e3)
    timings = [
        Timing("stock", first["stock"], turns["stock"], gflop, peaks["fp32"]),
        Timing("ours", first["ours"], turns["ours"], gflop, peaks[setting.precision]),
    ]
    ratios = [ours / other for ours, other in zip(turns["ours"], turns["stock"], strict=True)]
    return {
        "model": setting.model,
        "data": setting.data.name,
        "precision": setting.precision,
        "compile": setting.compile,
        "threads": setting.threads,
        "iterations_a_turn": setting.iterations,
        "training": training,
        "timings": [timing.as_dict() for timing in timings],
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "memory_copy_gb_per_second": measure_copy(setting.device),
        **machine.describe(setting.device),
    }


def compare_training(setting: Setting) -> dict[str, Any]:
    """Train both in fp32 from the same weights and compare their mean losses."""
    first, last = TRAIN_CHECK
    mean = {}
    for name, steps in (("stock", setting.stock()), ("ours", setting.ours("fp32"))):
        steps(first)
        mean[name] = statistics.fmean(steps(1) for _ in range(last - first))
    gc.collect()  # the stock loop's workers end with their loader
    difference = abs(mean["ours"] / mean["stock"] - 1)
    return {**mean, "difference": difference, "within_tolerance": difference <= TRAIN_TOLERANCE}


def count_gflop(model_name: str, num_classes: int) -> float:
    """Return the operations of a step, forward and backward, counted by torch, in 10**9."""
    model = build_model(model_name, num_classes=num_classes, seed=0).to("meta")
    images = torch.empty(HE2015.batch_size, 3, 32, 32, device="meta")
    labels = torch.empty(HE2015.batch_size, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops()) / 1e9


def measure_peak(setting: Setting, precision: str, size: int = 2048) -> float:
    """Return the rate of a large matrix product in 10**9 operations a second: best of ten."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.set_num_threads(setting.threads)
    a = torch.randn(size, size, device=setting.device).to(dtype)
    b = torch.randn(size, size, device=setting.device).to(dtype)
    return 2 * size**3 / _best_of_ten(lambda: a @ b, setting.device) / 1e9


def measure_copy(device: str, num_bytes: int = 1 << 28) -> float:
    """Return the rate of a large copy in 10**9 bytes a second, read plus written: best of ten."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _best_of_ten(lambda: target.copy_(source), device) / 1e9


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a table with the hardware's name."""
    lines = [
        f"{result['model']}, batch {HE2015.batch_size}, {result['data']}, {result['hardware']}, "
        f"{result['threads']} threads, torch {result['versions']['torch']}",
        "",
        "| | ms an iteration | spread | images/s | share of peak | first step, s |",
        "|---|---|---|---|---|---|",
    ]
    described = {
        "stock": "stock: DataLoader, eager fp32, NCHW",
        "ours": f"ours: {result['precision']}, {'compiled' if result['compile'] else 'eager'}",
    }
    lines += [
        f"| {described[timing['name']]} | {timing['median_ms']:.1f} "
        f"| {timing['min_ms']:.1f}-{timing['max_ms']:.1f} | {timing['images_per_second']:,.0f} "
        f"| {timing['share_of_peak']:.0%} of {timing['peak_gflops']:,.0f} GFLOP/s "
        f"| {timing['first_step']:.1f} |"
        for timing in result["timings"]
    ]
    low, high = min(result["ratios"]), max(result["ratios"])
    lines += [
        "",
        f"ours takes {result['ratio']:.2f} of the stock loop's time ({low:.2f}-{high:.2f} over "
        f"{len(result['ratios'])} turns)",
        f"memory copy, read plus written: {result['memory_copy_gb_per_second']:.1f} GB/s",
    ]
    return "\n".join(lines)


def _last(losses: Iterator[float], count: int) -> float:
    loss = 0.0
    for _ in range(count):
        loss = next(losses)
    return loss


def _seconds(steps: Callable[[int], float], count: int) -> float:
    began = time.perf_counter()
    steps(count)
    return time.perf_counter() - began


def _best_of_ten(work: Callable[[], object], device: str) -> float:
    """Return seconds; the best, because a peak is what nothing else disturbed."""
    seconds = []
    for _ in range(11):
        began = time.perf_counter()
        work()
        if device != "cpu":
            getattr(torch, device).synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
