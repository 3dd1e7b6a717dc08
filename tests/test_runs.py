"""A run directory belongs to one run, and says so."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from resnet_ddp.datasets import DataRecord
from resnet_ddp.exits import ExitCode, TemporaryError, UserError
from resnet_ddp.recipe import HE2015, RECIPES
from resnet_ddp.runs import Cell, RunDirectory, Settings

DATA = DataRecord(name="cifar10", source="somewhere", original=None, sha256="ab" * 32)
CELL = Cell(grid="cifar10-he2015", model="resnet20", seed=3, recipe=HE2015, data=DATA)
SETTINGS = Settings(precision="bf16", compile=False, threads=2, log_every=50, eval_every=500)
OPEN = dict.fromkeys(dataclasses.asdict(SETTINGS))


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[RunDirectory]:
    run = RunDirectory(tmp_path, CELL)
    run.acquire()
    run.settle_config(SETTINGS, world_size=1, environment={"device": "cpu"})
    yield run
    run.release()


def test_path_is_a_function_of_the_cell(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path, CELL).path == tmp_path / "cifar10-he2015" / "resnet20" / "seed3"


def test_config_says_all_that_the_run_is(directory: RunDirectory) -> None:
    config = json.loads((directory.path / "config.json").read_text())
    assert config["recipe_fields"]["drops"] == [32_000, 48_000]
    assert config | {"recipe_fields": None, "recipe_hash": None} == {
        "grid": "cifar10-he2015",
        "model": "resnet20",
        "seed": 3,
        "recipe": "he2015",
        "recipe_hash": None,
        "recipe_fields": None,
        "data": "cifar10",
        "data_source": "somewhere",
        "data_original": None,
        "data_sha256": "ab" * 32,
        "precision": "bf16",
        "compile": False,
        "threads": 2,
        "log_every": 50,
        "eval_every": 500,
        "world_size": 1,
        "device": "cpu",
    }


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"model": "plain20"}, "model resnet20, not plain20"),
        ({"seed": 4}, "seed 3, not 4"),
        ({"recipe": RECIPES["he2015-50k"]}, "recipe he2015, not he2015-50k"),
        ({"recipe": dataclasses.replace(HE2015, momentum=0.8)}, "recipe_hash"),
        ({"data": dataclasses.replace(DATA, sha256="cd" * 32)}, f"{'ab' * 32}, not {'cd' * 32}"),
    ],
)
def test_another_run_is_refused_with_both_values(
    directory: RunDirectory, change: dict[str, object], values: str
) -> None:
    directory.check_identity()
    other = RunDirectory(directory.path, dataclasses.replace(CELL, **change))
    other.config_path = directory.config_path
    with pytest.raises(UserError, match=values):
        other.check_identity()


def test_settings_are_kept_on_resume(directory: RunDirectory, tmp_path: Path) -> None:
    other = dataclasses.replace(SETTINGS, threads=64, precision="fp32")
    assert directory.settle(OPEN, other, world_size=1) == SETTINGS
    fresh = RunDirectory(tmp_path / "elsewhere", CELL)
    settled = fresh.settle(OPEN | {"threads": 5}, other, world_size=1)
    assert settled == dataclasses.replace(other, threads=5)


def test_threads_fit_another_number_of_processes(directory: RunDirectory) -> None:
    fewer = dataclasses.replace(SETTINGS, threads=1)
    assert directory.settle(OPEN, fewer, world_size=2) == fewer
    asked = directory.settle(OPEN | {"threads": 7}, fewer, world_size=2)
    assert asked == dataclasses.replace(SETTINGS, threads=7)


@pytest.mark.parametrize(
    ("asked", "values"),
    [
        ({"precision": "fp32"}, "precision bf16, not fp32"),
        ({"compile": True}, "compile False, not True"),
        ({"threads": 1}, "threads 2, not 1"),
        ({"eval_every": 50}, "eval_every 500, not 50"),
    ],
)
def test_other_settings_are_refused_with_both_values(
    directory: RunDirectory, asked: dict[str, object], values: str
) -> None:
    with pytest.raises(UserError, match=values):
        directory.settle(OPEN | asked, SETTINGS, world_size=1)


@pytest.mark.parametrize("content", ["", "[]", '{"seed": 3', "\x00"])
def test_a_damaged_config_is_named(directory: RunDirectory, content: str) -> None:
    directory.config_path.write_text(content)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        directory.check_identity()


def test_one_process_at_a_time(directory: RunDirectory) -> None:
    second = RunDirectory(directory.path.parents[2], CELL)
    with pytest.raises(TemporaryError, match="another process is training this run"):
        second.acquire()
    directory.release()
    second.acquire()
    second.release()


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another directory with --runs"):
        RunDirectory(tmp_path / "file" / "runs", CELL).acquire()


def test_status_says_how_the_last_life_ended(directory: RunDirectory) -> None:
    directory.write_status(ExitCode.STOPPED, reason="SIGTERM", iteration=7)
    status = json.loads((directory.path / "status.json").read_text())
    assert status == {"exit_code": 85, "reason": "SIGTERM", "iteration": 7}


def test_what_an_earlier_life_was_asked_or_left_half_written_is_removed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, CELL)
    run.path.mkdir(parents=True)
    (run.path / "stop").touch()
    (run.path / f".status.json.{'0a' * 8}").write_text("{")
    (run.path / ".notes.txt").write_text("a user's own")
    run.acquire()
    run.release()
    assert sorted(path.name for path in run.path.iterdir()) == [".notes.txt", "lock"]


def test_what_may_change_the_bits_is_named(directory: RunDirectory) -> None:
    before = {"hardware": "EPYC", "versions": {"torch": "2.13.0", "python": "3.11.2"}}
    directory.config_path.unlink()
    directory.settle_config(SETTINGS, world_size=1, environment=before)
    assert directory.changes(world_size=1, environment=before) == ""
    now = {"hardware": "H200", "versions": {"torch": "2.11.0", "python": "3.11.2"}}
    assert directory.changes(world_size=2, environment=now) == (
        "hardware H200 instead of EPYC, processes 2 instead of 1, torch 2.11.0 instead of 2.13.0"
    )
