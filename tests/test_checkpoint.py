"""Checkpoints: the same bits back, and never less than what was there."""

from __future__ import annotations

import hashlib
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resnet_ddp import shapes
from resnet_ddp.cadence import default_save_every
from resnet_ddp.checkpoint import Checkpoints, Progress, restore
from resnet_ddp.datasets import in_memory
from resnet_ddp.experiment import build_experiment
from resnet_ddp.recipe import RECIPES

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors"]


class Trained:
    """A small net with an optimizer, after one step."""

    def __init__(self, seed: int = 0, steps: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)
        )
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.images = torch.randn(5, 3, 8, 8, generator=generator)
        for _ in range(steps):
            self.step(self.images)

    def step(self, images: Tensor) -> None:
        self.optimizer.zero_grad()
        self.model(images).square().mean().backward()
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        momentum = {
            f"momentum {name}": self.optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in self.model.named_parameters()
            if self.optimizer.state[parameter]
        }
        return {k: v.detach().clone() for k, v in (self.model.state_dict() | momentum).items()}

    def save(self, directory: Path, iteration: int) -> Path:
        return checkpoints(directory).save(self.model, self.optimizer, progress(iteration))

    def load(self, directory: Path) -> Progress | None:
        """Restore the newest checkpoint of a run whose metrics.jsonl has 1,000 bytes."""
        directory.with_name("metrics.jsonl").write_bytes(METRICS)
        stored = checkpoints(directory).newest()
        if stored is None:
            return None
        restore(self.model, self.optimizer, stored)
        return stored.progress


METRICS = b"0123456789" * 100
OWNER = {"model": "small", "seed": 0}


def checkpoints(directory: Path, owner: dict[str, Any] = OWNER) -> Checkpoints:
    def warn(line: str) -> None:
        warnings.warn(line, stacklevel=2)

    return Checkpoints(
        directory, metrics_path=directory.with_name("metrics.jsonl"), owner=owner, warn=warn
    )


def progress(iteration: int) -> Progress:
    """Ten bytes of metrics an iteration."""
    written = b"0123456789" * iteration
    return Progress(iteration, len(written), hashlib.sha256(written).hexdigest())


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_round_trip_bit_for_bit(folder: Path) -> None:
    first, second = Trained(seed=0), Trained(seed=1, steps=0)
    checkpoint = first.save(folder, 7)
    assert names(checkpoint) == FILES
    assert second.load(folder) == progress(7)
    assert_same_bits(first.state(), second.state())
    assert second.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    first.step(first.images)
    second.step(first.images)
    assert_same_bits(first.state(), second.state())


def test_nothing_there_is_a_fresh_start(folder: Path) -> None:
    assert Trained().load(folder / "nothing") is None


def test_the_two_newest_are_kept(folder: Path) -> None:
    for iteration in (1, 9, 10, 99):
        Trained().save(folder, iteration)
    assert names(folder) == ["iteration-00000010", "iteration-00000099"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    folder: Path, file: str, damage: Callable[[Path], Any]
) -> None:
    older = Trained(seed=0)
    older.save(folder, 1)
    damage(Trained(seed=1).save(folder, 2) / file)
    loaded = Trained(seed=2)
    with pytest.warns(UserWarning, match="set aside as .*damaged-iteration-00000002"):
        assert loaded.load(folder) == progress(1)
    assert_same_bits(loaded.state(), older.state())
    aside, kept = names(folder)
    assert aside.startswith("damaged-iteration-00000002")
    assert kept == "iteration-00000001"


def test_what_a_killed_process_left_half_written_goes(folder: Path) -> None:
    (folder / ".saving-123").mkdir()
    (folder / ".saving-123" / "model.safetensors").write_bytes(b"half")
    assert Trained().load(folder) is None
    assert names(folder) == []
    Trained().save(folder, 1)
    assert names(folder) == ["iteration-00000001"]


def test_a_checkpoint_that_lost_the_metrics_before_it_is_set_aside(folder: Path) -> None:
    older = Trained(seed=0)
    older.save(folder, 1)
    Trained(seed=1).save(folder, 101)  # 1,010 bytes of metrics, but there are 1,000
    loaded = Trained(seed=2)
    with pytest.warns(UserWarning, match="metrics.jsonl is not what it was"):
        assert loaded.load(folder) == progress(1)
    assert_same_bits(loaded.state(), older.state())


def test_a_checkpoint_whose_metrics_were_changed_is_set_aside(folder: Path) -> None:
    older = Trained(seed=0)
    older.save(folder, 1)
    checkpoints(folder).save(older.model, older.optimizer, Progress(2, 20, "ab" * 32))
    with pytest.warns(UserWarning, match="metrics.jsonl is not what it was"):
        assert Trained(seed=2).load(folder) == progress(1)


def test_another_runs_checkpoint_is_not_loaded(folder: Path) -> None:
    Trained().save(folder, 1)
    with pytest.warns(UserWarning, match="another run's"):
        assert checkpoints(folder, OWNER | {"seed": 1}).newest() is None


def test_a_checkpoint_under_another_name_is_not_loaded(folder: Path) -> None:
    Trained().save(folder, 1).rename(folder / "iteration-00000009")
    with pytest.warns(UserWarning, match="it is of iteration 1"):
        assert Trained().load(folder) is None


def test_saving_again_where_a_checkpoint_stands_replaces_it(folder: Path) -> None:
    Trained(seed=0).save(folder, 1)
    newer = Trained(seed=1)
    newer.save(folder, 1)
    loaded = Trained(seed=2)
    assert loaded.load(folder) == progress(1)
    assert_same_bits(loaded.state(), newer.state())
    assert names(folder) == ["iteration-00000001"]


def test_saving_costs_less_than_a_hundredth_of_the_time(tmp_path: Path) -> None:
    """At the default interval of a CPU, ResNet-20 on one thread; a GPU saves every 4,000."""
    data = in_memory(
        name="noise",
        source="drawn",
        classes=("a", "b"),
        train=(shapes.draw(20)[0], np.arange(200) % 2),
        test=(shapes.draw(20)[0], np.arange(200) % 2),
    )
    experiment = build_experiment(
        RECIPES["he2015"],
        model_name="resnet20",
        seed=0,
        data=data,
        device="cpu",
        precision="fp32",
        compile=False,
        threads=1,
    )
    seconds: dict[str, list[float]] = {"step": [], "save": []}
    for iteration in range(3):
        began = time.perf_counter()
        experiment.stepper.advance(iteration, until=iteration + 1)
        seconds["step"].append(time.perf_counter() - began)
        began = time.perf_counter()
        checkpoints(tmp_path / "checkpoints").save(
            experiment.model, experiment.optimizer, progress(iteration + 1)
        )
        seconds["save"].append(time.perf_counter() - began)
    step, save = min(seconds["step"]), statistics.median(seconds["save"])
    assert save < 0.01 * step * default_save_every("cpu")
