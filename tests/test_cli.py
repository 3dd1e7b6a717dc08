"""The commands as users and schedulers run them: exit codes, one or two lines, no traceback."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import Command

ENTRIES = ["train.py", "resnet-ddp train"]


def assert_refused(process: subprocess.Popen[str], *words: str) -> None:
    """Exit code 2, a line or two, the words in them."""
    output, error = process.communicate(timeout=120)
    assert process.returncode == 2, error
    assert 1 <= error.count("\n") <= 2, error
    assert "Traceback" not in output + error
    assert "torch was imported" not in error
    for word in words:
        assert word in error


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("resnet21 --data DATA", ["resnet21", "did you mean resnet20?"]),
        ("resnet20 --data DATA --recipe he2015-tinny", ["did you mean he2015-tiny?"]),
        ("resnet20 --data DATA --device cdua", ["did you mean cuda?"]),
        ("resnet20 --data DATA --sed 3", ["--sed", "did you mean --seed?"]),
        ("resnet20 --data DATA --stop-after 0", ["--stop-after", "less than 1"]),
        ("resnet20 --data nowhere", ["nowhere", "does not exist", "resnet-ddp prepare"]),
        ("resnet20 --data DAMAGED", ["DAMAGED", "dataset.json is no JSON"]),
    ],
)
def test_bad_input_is_answered_without_torch(
    entry: str,
    arguments: str,
    words: list[str],
    start: Command,
    small_data: Path,
    tmp_path: Path,
    without_torch: dict[str, str],
) -> None:
    here = tmp_path / "here"
    (here / "DATA").symlink_to(small_data)
    shutil.copytree(small_data, here / "DAMAGED")
    (here / "DAMAGED" / "dataset.json").write_text('{"name": "sm')
    assert_refused(start(entry, *arguments.split(), **without_torch), *words)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_truncated_file_is_refused(
    entry: str, start: Command, small_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    content = (data / "train.beton").read_bytes()
    (data / "train.beton").write_bytes(content[: len(content) // 2])
    assert_refused(start(entry, "resnet20", "--data", str(data)), "train.beton")
    assert not (tmp_path / "here" / "runs").exists()


@pytest.mark.parametrize("entry", ENTRIES)
def test_runs_where_nothing_can_be_written(
    entry: str, start: Command, small_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "here" / "file").touch()
    process = start(entry, "resnet20", "--data", str(small_data), "--runs", "file/runs")
    assert_refused(process, "file/runs", "cannot write there", "--runs")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("trian resnet20", ["trian", "did you mean train?"]),
        ("prepare fodler --to x", ["did you mean folder?"]),
        ("prepare folder --to x", ["--from"]),
        ("prepare folder --from nowhere --to x", ["nowhere", "no such file"]),
        ("", ["COMMAND"]),
    ],
)
def test_bad_commands(
    arguments: str, words: list[str], start: Command, without_torch: dict[str, str]
) -> None:
    assert_refused(start("resnet-ddp", *arguments.split(), **without_torch), *words)


@pytest.mark.parametrize("entry", ENTRIES)
def test_another_recipe_and_a_done_run_are_answered_without_torch(
    entry: str, start: Command, small_data: Path, tmp_path: Path, without_torch: dict[str, str]
) -> None:
    sha256 = json.loads((small_data / "dataset.json").read_text())["sha256"]
    identity = {"model": "resnet20", "seed": 0, "recipe": "he2015", "data_sha256": sha256}
    identity["recipe_hash"] = "de85ceb2734189bee70f53db1ec0976de857a4059c25f7d140d4697fda6a842c"
    run = tmp_path / "here" / "runs" / "g" / "resnet20" / "seed0"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(identity))
    result = {"test_error_rate": 0.0875, "iterations": 64_000}
    (run / "result.json").write_text(json.dumps(result))
    command = ["resnet20", "--data", str(small_data), "--grid", "g"]
    done = start(entry, *command, **without_torch)
    first, took, where = done.communicate(timeout=60)[0].splitlines()
    # The drawings of the tests are not the images that the paper's figure is of.
    assert first == (
        "done: test error 8.75% after 64,000 iterations; He et al.: 8.75%, on the original CIFAR-10"
    )
    assert took == "time: unknown"  # nothing was timed
    assert where == "in runs/g/resnet20/seed0"
    assert done.returncode == 0
    other = start(entry, *command, "--recipe", "he2015-tiny", **without_torch)
    assert_refused(other, "belongs to a run with recipe he2015, not he2015-tiny")
    assert len(list(run.iterdir())) == 2


def test_accelerate_launch(start: Command, small_data: Path, tmp_path: Path) -> None:
    command = "resnet20 --device cpu --threads 1 --recipe he2015-smoke --stop-after 2 --data"
    process = start("accelerate launch", *command.split(), str(small_data))
    _, error = process.communicate(timeout=300)
    assert process.returncode != 0  # a launcher turns 85 into 1
    run = tmp_path / "here" / "runs" / "small-he2015-smoke" / "resnet20" / "seed0"
    status = json.loads((run / "status.json").read_text())
    assert (status["exit_code"], status["iteration"]) == (85, 2), error
    assert (run / "checkpoints" / "iteration-00000002" / "model.safetensors").is_file()


def test_a_signal_saves_and_nobody_else_trains_meanwhile(
    start: Command, small_data: Path, tmp_path: Path
) -> None:
    options = "--recipe he2015-tiny --device cpu --threads 1 --log-every 1 --data"
    command = ["resnet20", *options.split(), str(small_data)]
    run = tmp_path / "here" / "runs" / "small-he2015-tiny" / "resnet20" / "seed0"
    previous = 0
    for entry, number in (("train.py", signal.SIGTERM), ("resnet-ddp train", signal.SIGINT)):
        process = start(entry, *command)
        timing = wait_for_line(run / "timing.jsonl", after=previous)
        if number == signal.SIGTERM:
            second = start("resnet-ddp train", *command)
            _, error = second.communicate(timeout=120)
            assert (second.returncode, error.count("\n")) == (75, 1), error
            assert "another process is training this run" in error
        process.send_signal(number)
        _, error = process.communicate(timeout=120)
        assert process.returncode == 85, error
        assert "Traceback" not in error
        status = json.loads((run / "status.json").read_text())
        assert (status["exit_code"], status["reason"]) == (85, number.name)
        assert status["iteration"] > previous
        assert (run / "checkpoints" / f"iteration-{status['iteration']:08d}").is_dir()
        assert timing
        previous = status["iteration"]


def wait_for_line(path: Path, *, after: int) -> bool:
    """Wait until a line of a later iteration is there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and json.loads(lines[-1])["iteration"] > after:
            return True
        time.sleep(0.05)
    return False


def test_version_and_help(start: Command, without_torch: dict[str, str]) -> None:
    version = start("resnet-ddp", "--version", **without_torch)
    assert version.communicate(timeout=60)[0] == "0.1.0\n"
    help_ = start("train.py", "--help", **without_torch)
    output, _ = help_.communicate(timeout=60)
    for name in ("MODEL", "--seed", "--data", "--recipe", "--stop-after", "--no-compile"):
        assert name in output
