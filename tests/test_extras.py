"""Without the extra: one line that says what to install, before anything else is done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Train
from test_cli import assert_refused

from resnet_ddp import extras
from resnet_ddp.cli import main
from resnet_ddp.datasets import read_record
from resnet_ddp.exits import UserError
from resnet_ddp.grid.cells import Grid
from resnet_ddp.grid.local import train_options
from resnet_ddp.grid.slots import Slot
from resnet_ddp.machine import settle_capture
from resnet_ddp.options import GridRunOptions
from resnet_ddp.recipe import RECIPES

WORDS = ("apt-get install g++ pkg-config", "libopencv-dev libturbojpeg0-dev", "conda", '".[ffcv]"')


@pytest.fixture
def no_ffcv(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> None:
        assert name == "ffcv"

    monkeypatch.setattr(extras, "find_spec", find_spec)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_without_ffcv_a_line_says_what_to_install(
    no_ffcv: None, train: Train, capsys: pytest.CaptureFixture[str], tmp_path: Path, processes: str
) -> None:
    assert train("--data-path", "ffcv", "--processes", processes) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in WORDS:
        assert word in error
    assert not (tmp_path / "runs").exists()


def test_it_is_said_before_torch_is_imported(
    small_data: Path, tmp_path: Path, without_torch: dict[str, str]
) -> None:
    command = (
        "import sys, resnet_ddp.extras as extras; from resnet_ddp.cli import main;"
        "extras.find_spec = lambda name: None; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["train", "resnet20", "--data", str(small_data), "--data-path", "ffcv"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *arguments],
        env=without_torch,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert_refused(process, *WORDS)


def test_a_run_that_is_done_needs_nothing(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train() == 0
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert train("--data-path", "ffcv") == 0
    assert "done: test error" in capsys.readouterr().out


def test_a_grid_says_it_once(
    no_ffcv: None, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--data", str(small_data), "--runs", str(tmp_path / "runs")]
    assert main(["grid", "run", *where, "--data-path", "ffcv", "--devices", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "libturbojpeg0-dev" in error


@pytest.mark.parametrize("problem", [ImportError("libGL.so.1"), OSError("libopencv.so")])
def test_an_ffcv_that_does_not_work_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    def import_module(name: str) -> Any:
        raise problem

    monkeypatch.setattr(extras, "find_spec", lambda name: object())
    monkeypatch.setattr(extras.importlib, "import_module", import_module)
    with pytest.raises(UserError, match=str(problem)):
        extras.import_ffcv()


def test_graphs_are_not_captured_around_a_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert settle_capture("cuda", None)
    assert not settle_capture("cuda", None, data_path="ffcv")
    with pytest.raises(UserError, match="--data-path resident"):
        settle_capture("cuda", True, data_path="ffcv")


def test_a_grid_hands_the_data_path_on(small_data: Path, tmp_path: Path) -> None:
    record = read_record(small_data)
    grid = Grid(tmp_path, "g", ("resnet20",), (0,), RECIPES["he2015-smoke"])
    (cell,) = grid.cells
    slot = Slot("cpu", "cpu", threads=1)
    options = GridRunOptions(data=record.name, data_path="ffcv")
    assert train_options(options, grid, cell, slot, None).data_path == "ffcv"
