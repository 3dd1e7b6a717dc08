"""The second data path: through FFCV's Loader, and yet the resident path's batches, bit for bit."""

from __future__ import annotations

import dataclasses
import gc
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT, Train
from torch import Tensor

from resnet_ddp.augment import Normalisation
from resnet_ddp.batches import Batches, ImagesInFile, as_on_device, split
from resnet_ddp.beton import Images, open_beton, read_beton, write_beton
from resnet_ddp.exits import UserError
from resnet_ddp.recipe import HE2015, RECIPES, Recipe

pytestmark = [pytest.mark.ffcv, pytest.mark.usefixtures("ffcv")]
CPU = torch.device("cpu")
# Trained on are 270 of 300 images: passes end within batches.
RECIPE = dataclasses.replace(HE2015, name="small", iterations=40, batch_size=64)
RUN = Path("small-short", "resnet20", "seed0")


def arguments(path: Path, *, mapped: bool, recipe: Recipe = RECIPE, **more: Any) -> dict[str, Any]:
    images: Images
    images, labels = open_beton(path) if mapped else read_beton(path)
    return {
        "recipe": recipe,
        "seed": 3,
        "images": as_on_device(images, CPU),
        "labels": torch.from_numpy(labels),
        "samples": split(recipe, len(labels))[0],
        "normalise": Normalisation.channel((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), CPU),
        **more,
    }


def resident(path: Path, **more: Any) -> Batches:
    return Batches(**arguments(path, mapped=False, **more))


def loaded(path: Path, **more: Any) -> Any:
    from resnet_ddp.loader import LoadedBatches

    return LoadedBatches(**arguments(path, mapped=True, **more))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if type(thread).__name__ == "Epoch"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "train.beton"
    images = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), np.uint8)
    write_beton(path, images, np.arange(300) % 10)
    return path


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert threads() == []


def assert_equal(batch: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(batch[0], other[0])
    assert torch.equal(batch[1], other[1])
    assert [part.dtype for part in batch] == [part.dtype for part in other]
    assert [part.stride() for part in batch] == [part.stride() for part in other]


@pytest.mark.parametrize(
    ("rank", "world_size", "num_workers"),
    [(0, 1, 1), (0, 1, 2), (0, 2, 1), (1, 2, 2), (0, 3, 1), (1, 3, 1), (6, 7, 2), (63, 64, 1)],
)
def test_the_batch_has_the_resident_paths_bits(
    file: Path, rank: int, world_size: int, num_workers: int
) -> None:
    ranks = {"rank": rank, "world_size": world_size}
    expected, batches = resident(file, **ranks), loaded(file, num_workers=num_workers, **ranks)
    for iteration in range(40):  # nine passes, most of which end within a batch
        assert_equal(batches(iteration), expected(iteration))
    for iteration in (4, 39, 4, 0, 17, 18, 8):  # as after resumes
        assert_equal(batches(iteration), expected(iteration))
    batches.close()


def test_a_seed_has_an_order_of_its_own(file: Path) -> None:
    batches = loaded(file, seed=4)
    assert_equal(batches(5), resident(file, seed=4)(5))
    assert not torch.equal(batches(6)[1], resident(file, seed=3)(6)[1])
    batches.close()


def test_a_step_that_does_not_look_at_the_iteration_gets_the_one_sought(file: Path) -> None:
    """On a GPU the iteration is on the device, and reading it would wait for all that goes on."""
    expected, batches = resident(file), loaded(file)
    for first in (0, 7, 3):
        batches.seek(first)
        for iteration in range(first, first + 4):
            number = torch.tensor([iteration])
            assert_equal(batches(number), expected(number))
    batches.close()


def test_the_ffcv_loader_is_told_of_some_iterations_at_a_time(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resnet_ddp.loader.SEGMENT", 3)
    expected, batches = resident(file), loaded(file)
    for iteration in range(2, 40):
        assert_equal(batches(iteration), expected(iteration))
        assert len(threads()) <= 1
    batches.close()


def test_batches_that_are_kept_are_not_written_over(file: Path) -> None:
    """FFCV yields views of a ring of five buffers."""
    expected, batches = resident(file), loaded(file)
    kept = [batches(iteration) for iteration in range(20)]
    samples = [expected.samples_at(iteration) for iteration in range(20, 40)]
    raw = [batches.load(numbers) for numbers in samples]  # uint8, before anything is done to it
    time.sleep(0.2)
    for iteration, batch in enumerate(kept):
        assert_equal(batch, expected(iteration))
    for numbers, batch in zip(samples, raw, strict=True):
        images, which, labels = expected.load(numbers)
        assert_equal((batch[0], batch[2]), (images.index_select(0, which), labels))
        assert batch[0].dtype == torch.uint8
    batches.close()


def test_two_at_a_time_do_not_disturb_each_other(file: Path) -> None:
    first, second, expected = loaded(file), loaded(file), resident(file)
    for iteration in range(10):
        assert_equal(first(iteration), expected(iteration))
        assert_equal(second(39 - iteration), expected(39 - iteration))
    first.close()
    second.close()


def test_threads_are_released(file: Path) -> None:
    batches = loaded(file)
    assert threads() == []  # nothing was asked for yet
    for _ in range(3):
        batches(0)
        time.sleep(0.1)  # until it waits for room
        assert len(threads()) == 1
        began = time.perf_counter()
        batches.close()
        assert threads() == []
        assert time.perf_counter() - began < 0.4  # FFCV looks every half second
    batches(38)
    batches(39)  # the last: its thread has nothing to do
    batches.close()
    batches(5)
    del batches
    gc.collect()
    assert threads() == []


def test_torchs_threads_stay_as_they_were(file: Path) -> None:
    found: list[int] = []

    def look() -> None:
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        found.append(torch.get_num_threads())

    torch.set_num_threads(3)
    try:
        for num_workers in (1, 2):
            batches = loaded(file, num_workers=num_workers)
            look()
            batches(0)
            look()
            batches(7)
            look()
            batches.close()
            look()
    finally:
        torch.set_num_threads(1)
    assert found == [3] * 16


def test_numpys_generator_is_left_alone(file: Path) -> None:
    before = repr(np.random.get_state())
    batches = loaded(file)
    batches(0)
    batches.close()
    assert repr(np.random.get_state()) == before


def break_at(monkeypatch: pytest.MonkeyPatch, batch: int, error: BaseException) -> None:
    """Have FFCV's thread fail."""
    from ffcv.loader.epoch_iterator import EpochIterator

    intact = EpochIterator.run_pipeline

    def broken(self: Any, number: int, *rest: Any) -> Any:
        if number == batch:
            raise error
        return intact(self, number, *rest)

    monkeypatch.setattr(EpochIterator, "run_pipeline", broken)


@pytest.mark.parametrize("batch", [0, 6])
@pytest.mark.parametrize("error", [RuntimeError("no such page"), MemoryError(), SystemExit(3)])
def test_an_error_in_the_thread_comes_out(
    file: Path, monkeypatch: pytest.MonkeyPatch, batch: int, error: BaseException
) -> None:
    break_at(monkeypatch, batch, error)
    expected, batches = resident(file), loaded(file)
    for iteration in range(batch):  # what was loaded before is good
        assert_equal(batches(iteration), expected(iteration))
    with pytest.raises(UserError, match=f"failed at iteration {batch}, {type(error).__name__}"):
        batches(batch)
    assert threads() == []


def test_an_error_in_the_thread_ends_the_run(
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--data-path", "ffcv", "--precision", "fp32", "--save-every", "4")
    with monkeypatch.context() as patch:
        break_at(patch, 6, OSError("the disk is gone"))
        assert train(*options) == 2
    error = capsys.readouterr().err
    assert "FFCV's Loader failed at iteration 6, OSError: the disk is gone" in error
    assert "Traceback" not in error
    run = tmp_path / "runs" / RUN
    status = json.loads((run / "status.json").read_text())
    assert status["exit_code"] == 2 and "the disk is gone" in status["reason"]
    assert train(*options) == 0
    assert "going on from iteration 4" in capsys.readouterr().err


OUTCOME = ("model.safetensors", "metrics.jsonl", "result.json", "config.json")


@pytest.mark.parametrize("recipe", [SHORT, dataclasses.replace(SHORT, normalisation="pixel-mean")])
def test_a_run_may_change_its_data_path_and_keeps_its_bits(
    train: Train, tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "short", recipe)
    options = ("--precision", "fp32", "--log-every", "1", "--eval-every", "6")
    assert train(*options) == 0
    changed = (*options, "--runs", str(tmp_path / "changed"))
    assert train(*changed, "--data-path", "ffcv", "--stop-after", "3") == 85
    assert train(*changed, "--stop-after", "7") == 85
    assert train(*changed, "--data-path", "ffcv") == 0
    for name in OUTCOME:
        files = [tmp_path / runs / RUN / name for runs in ("runs", "changed")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    lines = map(json.loads, (tmp_path / "changed" / RUN / "timing.jsonl").read_text().splitlines())
    starts = [line["data_path"] for line in lines if line.get("event") == "start"]
    assert starts == ["ffcv", "resident", "ffcv"]


def test_a_file_of_ffcvs_with_further_fields(tmp_path: Path) -> None:
    """Labels before images, other names, and empty allocations where the next image begins."""
    from ffcv.fields import BytesField
    from test_ffcv import image_field, int_field, made_up, write

    images, labels = made_up(300)
    empty = [np.zeros(number % 2, np.uint8) for number in range(300)]
    fields = {"klasse": int_field(), "leer": BytesField(), "bild": image_field()}
    path = write(tmp_path / "a.beton", fields, labels, empty, images)
    expected, batches = resident(path), loaded(path)
    for iteration in range(8):
        assert_equal(batches(iteration), expected(iteration))
    batches.close()


def test_a_mean_image_is_the_same_from_the_file(file: Path) -> None:
    images = open_beton(file)[0]
    from_file = Normalisation.pixel_mean(ImagesInFile(images, CPU))
    assert torch.equal(from_file.mean, Normalisation.pixel_mean(torch.from_numpy(images[:])).mean)


def limited(limit: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that may hold so many bytes besides what it maps from files."""
    return subprocess.run(
        [sys.executable, "-m", "resnet_ddp", *arguments],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.slow
def test_data_larger_than_memory(tmp_path: Path) -> None:
    """Training holds some 0.7 GB itself, of which the images are no part."""
    count, limit = 300_000, 1 << 30
    noise = np.random.default_rng(0).integers(0, 256, 7 * count + 3072, np.uint8)
    # Each image begins 7 bytes after the last: many of them in little memory.
    images = np.lib.stride_tricks.as_strided(noise, (count, 32, 32, 3), (7, 96, 3, 1))
    (tmp_path / "betons").mkdir()
    write_beton(tmp_path / "betons" / "train.beton", images, np.arange(count) % 10)
    write_beton(tmp_path / "betons" / "test.beton", images[:500], np.arange(500) % 10)
    data = tmp_path / "data"
    prepared = limited(
        limit, "prepare", "beton", "--from", str(tmp_path / "betons"), f"--to={data}"
    )
    assert prepared.returncode == 0, prepared.stderr
    train = (
        *("train", "resnet20", "--data", str(data), "--recipe", "he2015-smoke"),
        *("--threads", "1", "--device", "cpu", "--precision", "fp32"),
        *("--eval-every", "32", "--stop-after", "4", "--runs"),
    )
    ffcv = limited(limit, *train, str(tmp_path / "ffcv"), "--data-path", "ffcv")
    assert ffcv.returncode == 85, ffcv.stderr
    resident = limited(limit, *train, str(tmp_path / "resident"))
    assert resident.returncode == 2 and "--data-path ffcv" in resident.stderr
    shutil.rmtree(tmp_path)
