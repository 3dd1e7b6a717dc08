"""`bench data`: every contender makes batches in a process of its own, and is counted for it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from resnet_ddp import bench_data, extras
from resnet_ddp.bench_data import CONTENDERS, Setting, Worker
from resnet_ddp.cli import main

COMMAND = ["bench", "data", "--quick", "--turns", "2", "--threads", "1", "--device", "cpu"]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("QUICK_TURN", 0.1), ("PAUSE", 0.0), ("WARM_UP", 2)):
        monkeypatch.setattr(bench_data, name, value)


def order(data: Path, name: str) -> dict[str, object]:
    return {"directory": str(data), "name": name, "device": "cpu", "threads": 1}


@pytest.mark.ffcv
def test_all_four(
    ffcv: None, short: None, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, "--data", str(small_data), "--out", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "bench-data.json").read_text()) == result
    assert list(result["contenders"]) == list(CONTENDERS)
    for found in result["contenders"].values():
        assert len(found["turns"]) == 2
        assert 0 < found["min"] <= found["images_per_second"] <= found["max"]
        assert 100 < found["memory_mb"] < 4000
    assert result["contenders"]["DataLoader"]["ratio"] == 1
    table = (tmp_path / "bench-data.md").read_text()
    assert all(f"| {title} |" in table for title in CONTENDERS.values())


class Still:
    """Stands in for a process."""

    def __init__(self, setting: Setting, name: str) -> None:
        self.rate = 10.0 if name == "DataLoader" else 50.0

    def turn(self, seconds: float) -> dict[str, float]:
        return {"images_per_second": self.rate, "cpu_us_per_image": 1.0, "memory_mb": 1.0}

    def close(self) -> None:
        pass


def test_without_ffcv_the_others_are_measured(
    short: None,
    small_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    monkeypatch.setattr(bench_data, "Worker", Still)
    assert main([*COMMAND, "--data", str(small_data), "--json"]) == 0
    output, error = capsys.readouterr()
    contenders = json.loads(output)["contenders"]
    assert {name: found["ratio"] for name, found in contenders.items()} == {
        "DataLoader": 1,
        "resident": 5,
    }
    assert "left out what needs ffcv" in error and "libturbojpeg0-dev" in error


@pytest.mark.parametrize(
    "name", ["DataLoader", "resident", pytest.param("ffcv", marks=pytest.mark.ffcv)]
)
def test_a_contenders_batches_are_what_a_network_takes(
    name: str, small_data: Path, request: pytest.FixtureRequest
) -> None:
    if name in bench_data.NEED_FFCV:
        request.getfixturevalue("ffcv")
    batches = bench_data.batches_of(order(small_data, name))
    images, labels = next(batches)
    assert images.shape == (128, 3, 32, 32) and images.dtype == torch.float32
    assert labels.shape == (128,)
    assert 0.5 < float(images.std()) < 1.5  # normalised, and padded


def test_time_and_memory_of_a_process_and_its_children(short: None, small_data: Path) -> None:
    setting = Setting(small_data, "cpu", threads=1, turns=1, seconds=0.1)
    worker = Worker(setting, "DataLoader")
    try:
        assert len(bench_data._tree(worker.process.pid)) == 3  # two workers
        before, began = worker.cpu_seconds(), time.perf_counter()
        worker.make(30)
        seconds = time.perf_counter() - began
        assert 0 < worker.cpu_seconds() - before < 4 * seconds
        assert 100 << 20 < worker.memory() < 4 << 30
    finally:
        worker.close()
    assert worker.process.returncode == 0


def test_what_has_no_meaning_is_refused(
    small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, "--data", str(small_data), "--trace", "trace.json"]) == 2
    assert "--trace" in capsys.readouterr().err
