"""One run, end to end: the same bits however often it was interrupted, one look at the test set."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT, Train
from safetensors.torch import load_file
from torch import Tensor

from resnet_ddp import durable, logs
from resnet_ddp.batches import Batches
from resnet_ddp.cli import main
from resnet_ddp.evaluate import Pause
from resnet_ddp.experiment import Experiment
from resnet_ddp.recipe import RECIPES
from resnet_ddp.step import Stepper

RUN = Path("runs", "small-short", "resnet20", "seed0")
OUTCOME = ("model.safetensors", "metrics.jsonl", "result.json")


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small_data: Path, one_thread: None) -> Path:
    """An uninterrupted run."""
    runs = tmp_path_factory.mktemp("finished") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, SHORT.name, SHORT)
        options = "--recipe short --device cpu --precision fp32 --threads 1 --log-every 1"
        command = ["train", "resnet20", "--data", str(small_data), "--runs", str(runs)]
        assert main([*command, *options.split(), "--eval-every", "6"]) == 0
    return runs.parent / RUN


FINISHED = ("--precision", "fp32", "--log-every", "1", "--eval-every", "6")


def assert_same_outcome(run: Path, other: Path) -> None:
    for file in OUTCOME:
        assert (run / file).read_bytes() == (other / file).read_bytes(), file


def test_a_run_stopped_twice_ends_with_the_bits_of_an_undisturbed_one(
    train: Train, tmp_path: Path, finished: Path
) -> None:
    assert train(*FINISHED, "--stop-after", "4") == 85
    assert checkpoints(tmp_path / RUN) == ["iteration-00000004"]
    assert read_json(tmp_path / RUN / "status.json") == {
        "exit_code": 85,
        "reason": "--stop-after",
        "iteration": 4,
    }
    assert not (tmp_path / RUN / "result.json").exists()
    assert train("--stop-after", "7") == 85  # settings are kept
    assert train() == 0
    assert_same_outcome(tmp_path / RUN, finished)


def test_a_crash_repeats_what_was_not_saved(
    train: Train, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Stepper.step

    def crash(stepper: Stepper) -> None:
        if int(stepper.iteration) == 8:
            raise RuntimeError("power cut")
        step(stepper)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(*FINISHED, "--save-every", "5")
    assert checkpoints(tmp_path / RUN) == ["iteration-00000005"]
    assert len(read_lines(tmp_path / RUN / "metrics.jsonl")) == 8 + 1
    assert train() == 0
    assert_same_outcome(tmp_path / RUN, finished)


def test_a_crash_while_the_result_is_written_leaves_one_test_error(
    train: Train, tmp_path: Path, finished: Path
) -> None:
    shutil.copytree(finished, tmp_path / RUN)
    (tmp_path / RUN / "result.json").unlink()
    (tmp_path / RUN / "model.safetensors").unlink()
    assert train() == 0
    assert_same_outcome(tmp_path / RUN, finished)


def test_metrics(finished: Path) -> None:
    lines = read_lines(finished / "metrics.jsonl")
    losses = [line for line in lines if "train/loss" in line]
    assert [line["iteration"] for line in losses] == list(range(1, 13))
    # `iteration` counts finished steps; `lr` is that of the last one.
    assert [line["lr"] for line in losses] == 6 * [0.1] + 3 * [0.01] + 3 * [0.001]
    curve = [line for line in lines if "val/error_rate" in line]
    assert [line["iteration"] for line in curve] == [6, 12]
    for line in curve:
        assert line["train/error_rate"] * 270 == pytest.approx(
            round(line["train/error_rate"] * 270)
        )
        assert line["val/error_rate"] * 30 == pytest.approx(round(line["val/error_rate"] * 30))
    assert ["test/error_rate" in line for line in lines] == [False] * (len(lines) - 1) + [True]


def test_result_and_config(finished: Path) -> None:
    result, config = read_json(finished / "result.json"), read_json(finished / "config.json")
    for record in (result, config):
        assert record["model"] == "resnet20"
        assert record["seed"] == 0
        assert record["recipe"] == "short"
        assert record["recipe_hash"] == SHORT.hash
        assert len(record["data_sha256"]) == 64
    assert (result["iterations"], result["num_parameters"]) == (12, 269_722)
    last = read_lines(finished / "metrics.jsonl")[-1]
    assert result["test_error_rate"] == last["test/error_rate"]
    for split in ("train", "val", "test"):
        assert 0 <= result[f"{split}_error_rate"] <= 1
    assert (config["world_size"], config["threads"], config["compile"]) == (1, 1, False)
    assert config["precision"] == "fp32"
    assert config["recipe_fields"]["batch_size"] == 16
    assert {"torch", "accelerate", "python"} < config["versions"].keys()
    assert read_json(finished / "status.json") == {
        "exit_code": 0,
        "reason": "done",
        "iteration": 12,
    }


def test_a_finished_run_has_nothing_to_do(
    train: Train, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / RUN)
    before = contents(tmp_path / RUN)
    assert train() == 0
    assert contents(tmp_path / RUN) == before
    rate = read_json(finished / "result.json")["test_error_rate"]
    assert f"test error {rate:.2%} after 12 iterations" in capsys.readouterr().out


@pytest.mark.parametrize("cadence", [("--log-every", "1"), ("--log-every", "12")])
def test_a_loss_that_is_not_a_number_ends_the_run(
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cadence: tuple[str, str],
) -> None:
    call, poisoned = Batches.__call__, []

    def poison(batches: Batches, iteration: int) -> tuple[Tensor, Tensor]:
        images, labels = call(batches, iteration)
        if iteration == 5:
            poisoned[:] = batches.samples_at(5).tolist()
        return (images * torch.nan if iteration == 5 else images), labels

    monkeypatch.setattr(Batches, "__call__", poison)
    for _ in range(2):  # the same command again ends the same way
        assert train(*cadence, "--eval-every", "6", "--save-every", "2") == 65
        error = capsys.readouterr().err
        assert "iteration 5 is not finite" in error
        assert str(poisoned) in error
        assert read_json(tmp_path / RUN / "status.json")["exit_code"] == 65
        assert checkpoints(tmp_path / RUN) == ["iteration-00000002", "iteration-00000004"]
        lines = read_lines(tmp_path / RUN / "metrics.jsonl")
        assert max((line["iteration"] for line in lines), default=0) <= 5
    assert not (tmp_path / RUN / "result.json").exists()


def test_another_run_in_the_directory_stays_as_it_is(
    train: Train,
    tmp_path: Path,
    finished: Path,
    other_data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(finished, tmp_path / RUN)
    shutil.copytree(finished, (tmp_path / RUN).with_name("seed1"))
    (tmp_path / RUN / "result.json").unlink()
    before = contents(tmp_path / "runs")
    for arguments, values in (
        (["--seed", "1"], "seed 0, not 1"),
        (["--recipe", "he2015", "--grid", "small-short"], "recipe short, not he2015"),
        (["--data", str(other_data)], "data_sha256"),
        (["--precision", "bf16"], "precision fp32, not bf16"),
        (["--threads", "3"], "threads 1, not 3"),
    ):
        assert train(*arguments) == 2
        assert values in capsys.readouterr().err
        assert contents(tmp_path / "runs") == before


def test_bf16_keeps_weights_and_momentum_in_fp32(train: Train, tmp_path: Path) -> None:
    assert train("--precision", "bf16", "--stop-after", "1") == 85
    for file in ("model", "optimizer"):
        (path,) = (tmp_path / RUN / "checkpoints").glob(f"*/{file}.safetensors")
        for name, tensor in load_file(path).items():
            expected = torch.int64 if name.endswith("num_batches_tracked") else torch.float32
            assert tensor.dtype == expected, name


def test_without_held_out_images_val_is_null(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(SHORT, name="short-50k", iterations=2, validation_divisor=0)
    monkeypatch.setitem(RECIPES, recipe.name, recipe)
    assert train("--recipe", "short-50k") == 0
    run = tmp_path / "runs" / "small-short-50k" / "resnet20" / "seed0"
    assert read_json(run / "result.json")["val_error_rate"] is None
    assert read_lines(run / "metrics.jsonl")[-2]["val/error_rate"] is None


def test_fewer_images_than_a_batch_are_refused(
    train: Train,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(
        RECIPES, "short", dataclasses.replace(SHORT, batch_size=271, batchnorm_group=271)
    )
    assert train() == 2
    assert "270 training images are less than a batch of 271" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["metrics.jsonl", "timing.jsonl", "result.json"])
def test_a_full_disk_is_temporary(
    train: Train,
    tmp_path: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
) -> None:
    full = [True]

    def fail_for(path: Path) -> None:
        if full[0] and path.name in (file, "status.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    write, write_bytes = logs.JsonLines.write, durable.write_bytes

    def write_line(lines: logs.JsonLines, **values: Any) -> None:
        fail_for(lines.path)
        write(lines, **values)

    def write_whole(path: Path, content: bytes) -> None:
        fail_for(path)
        write_bytes(path, content)

    monkeypatch.setattr(logs.JsonLines, "write", write_line)
    monkeypatch.setattr(durable, "write_bytes", write_whole)
    assert train(*FINISHED, "--save-every", "3") == 75
    assert "No space left" in capsys.readouterr().err
    full[0] = False
    assert train() == 0
    assert_same_outcome(tmp_path / RUN, finished)


def test_a_stop_in_the_last_evaluation_costs_only_that(
    train: Train, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Experiment.test_error_rate

    def interrupted(experiment: Experiment, pause: Pause) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(experiment, pause)

    run = tmp_path / RUN
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "test_error_rate", interrupted)
        assert train(*FINISHED) == 85
    assert read_json(run / "status.json")["reason"] == "SIGTERM"
    assert not (run / "result.json").exists()
    assert train(*FINISHED) == 0
    assert all((run / name).read_bytes() == (finished / name).read_bytes() for name in OUTCOME)
