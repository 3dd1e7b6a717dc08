"""Speed, side by side with a stock loop in one process, on whatever this machine is.

First both are shown to train: the same network from the same weights in fp32, mean losses over
iterations 150-200 within 5%. Then all contenders take turns, so that whatever else the machine is
doing slows all of them, and the median over the turns is reported with its spread. What a start
costs, compilation included, is measured apart, in processes of its own: once with an empty cache
and once more.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from resnet_ddp import datasets, machine, stock
from resnet_ddp.compilation import CACHE_VARIABLE
from resnet_ddp.datasets import Dataset
from resnet_ddp.experiment import build_experiment
from resnet_ddp.models import build_model
from resnet_ddp.recipe import HE2015

TRAIN_CHECK = (150, 200)  # iterations whose mean losses are compared
TRAIN_TOLERANCE = 0.05
WARM_UP = 3  # steps after the first, before timing
PAUSE = 1.0  # seconds for a loader's workers to fill their queues and fall idle
TURN = 5.0  # seconds that a turn is to take
QUICK_TURN = 1.0


@dataclass(frozen=True)
class Contender:
    """A way to train.

    Attributes:
        kind: "stock" (DataLoader, eager, NCHW), or ours: "eager", "compiled", "captured".
        precision: "fp32" or "bf16".
    """

    kind: str
    precision: str

    @property
    def name(self) -> str:
        """For people."""
        return "stock" if self.kind == "stock" else f"{self.kind} {self.precision}"


STOCK = Contender("stock", "fp32")


@dataclass(frozen=True)
class Timing:
    """One contender's times over the turns.

    Attributes:
        turns: ms an iteration, one value a turn.
        ratios: of each turn to the stock loop's turn beside it.
        gflop: floating-point operations of an iteration, in 10**9.
        peak_gflops: this machine's measured rate for a large matrix product of the precision.
        start: what a start costs, see `measure_start`; None if it was not measured.
    """

    contender: Contender
    turns: list[float]
    ratios: list[float]
    gflop: float
    peak_gflops: float
    start: dict[str, float] | None

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
            "name": self.contender.name,
            "median_ms": self.median,
            "min_ms": min(self.turns),
            "max_ms": max(self.turns),
            "ratio": statistics.median(self.ratios),
            "images_per_second": self.images_per_second,
            "share_of_peak": self.share_of_peak,
        }


@dataclass(frozen=True)
class Setting:
    """What is measured, and with what.

    Attributes:
        turns: how often the contenders take turns.
        quick: short turns, and neither the training check nor the starts.
    """

    models: tuple[str, ...]
    data: Dataset
    device: str
    compile: bool
    threads: int
    turns: int
    quick: bool

    def contenders(self) -> list[Contender]:
        """Return all that this machine can do."""
        kinds = ["eager"]
        if self.compile:
            kinds.append("compiled")
        if self.device == "cuda":
            kinds.append("captured")
        fast = machine.pick_precision(self.device)
        precisions = ["fp32", fast] if fast != "fp32" else ["fp32"]
        return [STOCK, *(Contender(kind, p) for p in precisions for kind in kinds)]

    def steps(self, model: str, contender: Contender) -> Callable[[int], float]:
        """Return a function that makes so many steps; its loss."""
        if contender.kind == "stock":
            return self._stock(model)
        experiment = build_experiment(
            HE2015,
            model_name=model,
            seed=0,
            data=self.data,
            device=self.device,
            precision=contender.precision,
            compile=self.compile and contender.kind != "eager",
            threads=self.threads,
            capture=contender.kind == "captured",
        )
        iteration = 0

        def steps(count: int) -> float:
            nonlocal iteration
            iteration = experiment.stepper.advance(iteration, until=iteration + count)
            return float(experiment.stepper.loss)  # device synchronisation

        return steps

    def _stock(self, model: str) -> Callable[[int], float]:
        network = build_model(model, num_classes=self.data.num_classes, seed=0)
        torch.set_num_threads(self.threads)
        losses = stock.train(network, self.data, self.device)

        def steps(count: int) -> float:
            with machine.inexact_arithmetic_allowed():  # as most people leave it
                return _last(losses, count)

        return steps


def run(setting: Setting, data_directory: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and return the result as plain values.

    Args:
        data_directory: where the setting's data lies, for the processes that measure starts.
        say: shows a line to whoever waits.
    """
    training = None if setting.quick else compare_training(setting, say)
    contenders = setting.contenders()
    precisions = {contender.precision for contender in contenders}
    peaks = {name: measure_peak(setting, name) for name in precisions}
    models = {}
    for model in setting.models:
        starts = {}
        if not setting.quick:
            for contender in contenders[1:]:
                say(f"{model}: start of {contender.name}, with an empty cache and again")
                starts[contender] = measure_start(setting, model, contender, data_directory)
        models[model] = [
            timing.as_dict()
            for timing in take_turns(setting, model, contenders, peaks, starts, say)
        ]
    return {
        "data": setting.data.name,
        "threads": setting.threads,
        "quick": setting.quick,
        "training": training,
        "models": models,
        "peak_gflops": peaks,
        "memory_copy_gb_per_second": measure_copy(setting.device),
        **machine.describe(setting.device),
    }


def take_turns(
    setting: Setting,
    model: str,
    contenders: Sequence[Contender],
    peaks: dict[str, float],
    starts: dict[Contender, dict[str, float]],
    say: Callable[[str], None],
) -> list[Timing]:
    """Time the contenders side by side."""
    say(f"{model}: warming up")
    steps = {contender: setting.steps(model, contender) for contender in contenders}
    length = QUICK_TURN if setting.quick else TURN
    counts = {}
    for contender, make in steps.items():
        make(WARM_UP)
        counts[contender] = max(2, round(length / _seconds(make, 1)))
    turns: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    for turn in range(setting.turns):
        say(f"{model}: turn {turn + 1} of {setting.turns}")
        for contender, make in steps.items():
            time.sleep(PAUSE)
            count = counts[contender]
            turns[contender].append(_seconds(make, count) / count * 1e3)
    gflop = count_gflop(model, setting.data.num_classes)
    return [
        Timing(
            contender,
            turns[contender],
            [ours / other for ours, other in zip(turns[contender], turns[STOCK], strict=True)],
            gflop,
            peaks[contender.precision],
            starts.get(contender),
        )
        for contender in contenders
    ]


def compare_training(setting: Setting, say: Callable[[str], None]) -> dict[str, Any]:
    """Train both in fp32 from the same weights and compare their mean losses."""
    first, last = TRAIN_CHECK
    model, mean = setting.models[0], {}
    say(f"do both train? {last} iterations of {model} each in fp32")
    eager = replace(setting, compile=False)
    for contender in (STOCK, Contender("eager", "fp32")):
        steps = eager.steps(model, contender)
        steps(first)
        mean[contender.kind] = statistics.fmean(steps(1) for _ in range(last - first))
    gc.collect()  # the stock loop's workers end with their loader
    difference = abs(mean["eager"] / mean["stock"] - 1)
    say(
        f"mean loss over iterations {first}-{last}: stock {mean['stock']:.3f}, "
        f"ours {mean['eager']:.3f}, {difference:.1%} apart"
    )
    return {**mean, "difference": difference, "within_tolerance": difference <= TRAIN_TOLERANCE}


def measure_start(
    setting: Setting, model: str, contender: Contender, data_directory: Path
) -> dict[str, float]:
    """Return seconds from a process's start to the end of its first steps, and its peak memory.

    "cold" is with empty caches, "warm" the same again; "gb" on the device, or of the process.
    """
    order = {
        "directory": str(data_directory),
        "model": model,
        "contender": asdict(contender),
        "device": setting.device,
        "compile": setting.compile,
        "threads": setting.threads,
    }
    measured: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        places = {"XDG_CACHE_HOME": cache, CACHE_VARIABLE: f"{cache}/inductor"}
        for which in ("cold", "warm"):
            began = time.perf_counter()
            answer = subprocess.run(
                [sys.executable, "-m", "resnet_ddp.bench", json.dumps(order)],
                env=os.environ | places,
                stdout=subprocess.PIPE,
                check=True,
            ).stdout
            measured[which] = time.perf_counter() - began
            measured["gb"] = float(answer) / 1e9
    return measured


def start_once(order: dict[str, Any]) -> None:
    """Be a process of `measure_start`: make the first steps, print the peak memory in bytes."""
    setting = Setting(
        models=(order["model"],),
        data=datasets.load_dataset(order["directory"]),
        device=order["device"],
        compile=order["compile"],
        threads=order["threads"],
        turns=1,
        quick=True,
    )
    setting.steps(order["model"], Contender(**order["contender"]))(WARM_UP + 2)
    if setting.device == "cuda":
        print(torch.cuda.max_memory_allocated())
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def write_trace(setting: Setting, path: Path) -> None:
    """Write a profile of a few steps of the first model, as trained by default, for Perfetto."""
    contender = setting.contenders()[-1]
    steps = setting.steps(setting.models[0], contender)
    steps(WARM_UP + 1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if setting.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        steps(3)
    profile.export_chrome_trace(str(path))


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
        f"{result['hardware']}, {result['threads']} threads, torch {result['versions']['torch']}, "
        f"batch {HE2015.batch_size}, {result['data']}",
        "",
        "| | | ms an iteration | spread | of the stock loop's time | images/s | share of peak "
        "| start, s: cold, warm | GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, timings in result["models"].items():
        for timing in timings:
            start = timing["start"]
            ratios = timing["ratios"]
            lines.append(
                f"| {model} | {timing['name']} | {timing['median_ms']:.2f} "
                f"| {timing['min_ms']:.2f}-{timing['max_ms']:.2f} "
                f"| {timing['ratio']:.2f} ({min(ratios):.2f}-{max(ratios):.2f}) "
                f"| {timing['images_per_second']:,.0f} | {timing['share_of_peak']:.0%} "
                + (f"| {start['cold']:.1f}, {start['warm']:.1f} | {start['gb']:.2f} |"
                   if start else "| | |")
            )  # fmt: skip
    peaks = ", ".join(f"{name} {rate:,.0f}" for name, rate in result["peak_gflops"].items())
    lines += [
        "",
        f"Peak: a large matrix product, GFLOP/s: {peaks}; a memory copy, read plus written: "
        f"{result['memory_copy_gb_per_second']:.1f} GB/s.",
        "stock: torchvision on PIL images, DataLoader with two workers, eager fp32, NCHW.",
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


if __name__ == "__main__":
    start_once(json.loads(sys.argv[1]))
