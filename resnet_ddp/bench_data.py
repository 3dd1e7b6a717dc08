"""Ways to get augmented batches of 128, side by side: images/s, CPU time, memory.

Each way has a process of its own, so that its threads, its workers and its memory are counted for
it alone; they work in turns, the others waiting, so that whatever else the machine is doing slows
all of them.

Every batch is (128, 3, 32, 32) float32 on the device: cropped, flipped, normalised.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from resnet_ddp import datasets, extras, fused, machine, stock
from resnet_ddp.batches import Batches, as_on_device, split
from resnet_ddp.exits import UserError
from resnet_ddp.experiment import normalisation
from resnet_ddp.recipe import HE2015

BATCH: Final = HE2015.batch_size
WARM_UP: Final = 20  # batches, compilation before them
TURN, QUICK_TURN = 5.0, 1.0  # seconds
PAUSE = 0.5  # seconds for queues to fill before a turn
TICKS: Final = os.sysconf("SC_CLK_TCK")
STOCK: Final = "DataLoader"
CONTENDERS: Final = {
    STOCK: "DataLoader, per-image transforms, 2 workers",
    "ffcv": "FFCV with its own augmentations",
    "ours": "--data-path ffcv",
    "resident": "--data-path resident",
}
NEED_FFCV: Final = ("ffcv", "ours")

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """What is measured, and with what.

    Attributes:
        directory: the prepared data.
        threads: of torch; of FFCV where it augments.
        turns: how often the contenders take turns.
        seconds: that a turn is to take.
    """

    directory: Path
    device: str
    threads: int
    turns: int
    seconds: float


def run(setting: Setting, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and return the result as plain values.

    Args:
        say: shows a line to whoever waits.
    """
    names = list(CONTENDERS)
    try:
        extras.check_ffcv()
    except UserError as error:
        say(f"left out what needs ffcv. {error}")
        names = [name for name in names if name not in NEED_FFCV]
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in names:
            say(f"{CONTENDERS[name]}: starting")
            workers[name] = stack.enter_context(contextlib.closing(Worker(setting, name)))
        for turn in range(setting.turns):
            say(f"turn {turn + 1} of {setting.turns}")
            for name, worker in workers.items():
                time.sleep(PAUSE)
                turns[name].append(worker.turn(setting.seconds))
    return {
        "data": datasets.read_record(setting.directory).name,
        "threads": setting.threads,
        "seconds": setting.seconds,
        "contenders": {name: summary(turns[name], turns[STOCK]) for name in names},
        **machine.describe(setting.device),
    }


def summary(turns: list[dict[str, float]], others: list[dict[str, float]]) -> dict[str, Any]:
    """Return one contender's figures over the turns; ratios are to the turns of another."""
    rates = [turn["images_per_second"] for turn in turns]
    return {
        "images_per_second": statistics.median(rates),
        "min": min(rates),
        "max": max(rates),
        "ratio": statistics.median(
            rate / other["images_per_second"] for rate, other in zip(rates, others, strict=True)
        ),
        "cpu_us_per_image": statistics.median(turn["cpu_us_per_image"] for turn in turns),
        "memory_mb": max(turn["memory_mb"] for turn in turns),
        "turns": turns,
    }


class Worker:
    """The process of a contender, which makes as many batches as it is told to."""

    def __init__(self, setting: Setting, name: str) -> None:
        order = asdict(setting) | {"directory": str(setting.directory), "name": name}
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "resnet_ddp.bench_data", json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.make(WARM_UP)
        self.rate = WARM_UP / self.make(WARM_UP)  # batches a second

    def make(self, count: int) -> float:
        """Have it make so many batches, and return the seconds it took."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(f"{count}\n")
            self.process.stdin.flush()
            return float(self.process.stdout.readline())
        except (BrokenPipeError, ValueError):
            raise UserError(f"bench data: the process of {CONTENDERS[self.name]} failed") from None

    def turn(self, seconds: float) -> dict[str, float]:
        """Measure about so many seconds."""
        count = max(2, round(seconds * self.rate))
        cpu = self.cpu_seconds()
        taken = self.make(count)
        cpu = self.cpu_seconds() - cpu
        self.rate = count / taken
        return {
            "images_per_second": count * BATCH / taken,
            "cpu_us_per_image": cpu / (count * BATCH) * 1e6,
            "memory_mb": self.memory() / 2**20,
        }

    def cpu_seconds(self) -> float:
        """Return the CPU time so far of the process and of those it started."""
        total = 0
        for pid in _tree(self.process.pid):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += int(fields[11]) + int(fields[12])  # user and system
        return total / TICKS

    def memory(self) -> int:
        """Return the bytes that it and those it started hold, pages of files not among them.

        What several of them share is counted once.
        """
        total = 0
        for pid in _tree(self.process.pid):
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                        total += int(line.split()[1]) * 1024
        return total

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()  # the end of its input is the end of its work


def _tree(pid: int) -> list[int]:
    """Return a process and all that it started; Linux only, elsewhere the sums are 0."""
    pids = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in path.read_text().split():
                pids += _tree(int(child))
    return pids


def batches_of(order: dict[str, Any]) -> Iterator[Batch]:
    """Yield a contender's batches for ever."""
    data = datasets.load_dataset(order["directory"], mapped=order["name"] in NEED_FFCV)
    device = torch.device(order["device"])
    if order["name"] == STOCK:
        return _repeated(stock.make_loader(data), device)
    if order["name"] == "ffcv":
        return _repeated(_ffcv_loader(data, order["threads"]), device)
    make: type[Batches] = Batches
    if order["name"] == "ours":
        extras.import_ffcv()
        torch.set_num_threads(order["threads"])
        from resnet_ddp.loader import LoadedBatches

        make = LoadedBatches
    images = as_on_device(data.train_images, device)
    batches = make(
        HE2015,
        seed=0,
        images=images,
        labels=torch.from_numpy(data.train_labels).to(device),
        samples=split(HE2015, len(data.train_labels))[0],
        normalise=normalisation(HE2015, data, images),
        kernels=fused.load() if order["device"] == "cpu" else None,
    )
    return map(batches, itertools.cycle(range(HE2015.iterations)))


def _repeated(loader: Any, device: torch.device) -> Iterator[Batch]:
    for images, labels in itertools.chain.from_iterable(itertools.repeat(loader)):
        yield images.to(device), labels.to(device)


def _ffcv_loader(data: datasets.Dataset, num_workers: int) -> Any:
    """Return what FFCV's documentation does for CIFAR."""
    extras.import_ffcv()
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import (
        NormalizeImage,
        RandomHorizontalFlip,
        RandomTranslate,
        Squeeze,
        ToTensor,
        ToTorchImage,
    )

    mean, std = (255 * np.array(values) for values in (data.channel_mean, data.channel_std))
    file: Any = data.train_images
    image = [
        SimpleRGBImageDecoder(),
        RandomHorizontalFlip(),
        RandomTranslate(padding=4, fill=tuple(int(value) for value in mean)),
        NormalizeImage(mean, std, np.dtype(np.float32)),
        ToTensor(),
        ToTorchImage(),
    ]
    return Loader(
        str(file.path),
        BATCH,
        num_workers=num_workers,
        order=OrderOption.RANDOM,
        seed=0,
        drop_last=True,
        pipelines={
            file.image_field: image,
            file.label_field: [IntDecoder(), ToTensor(), Squeeze()],
        },
    )


def work(order: dict[str, Any]) -> None:
    """Be the process of a contender."""
    torch.set_num_threads(order["threads"])
    batches = batches_of(order)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            images, _ = next(batches)
        images[0, 0, 0, 0].item()  # device synchronisation
        print(time.perf_counter() - began, flush=True)


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a table with the hardware's name."""
    lines = [
        f"{result['hardware']}, {result['threads']} threads, torch {result['versions']['torch']}, "
        f"batch {BATCH}, {result['data']}, device {result['device']}",
        "",
        "| | images/s | spread | of the DataLoader | CPU time, us an image | memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in result["contenders"].items():
        lines.append(
            f"| {CONTENDERS[name]} | {found['images_per_second']:,.0f} "
            f"| {found['min']:,.0f}-{found['max']:,.0f} | {found['ratio']:.1f} "
            f"| {found['cpu_us_per_image']:.1f} | {found['memory_mb']:,.0f} |"
        )
    lines += ["", "Memory of all processes of a contender, without pages of files."]
    return "\n".join(lines)


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
