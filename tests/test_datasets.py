"""The prepared directory: what it says, that it is whole or not there, that nothing slips by."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resnet_ddp import beton, datasets
from resnet_ddp.beton import read_beton, write_beton
from resnet_ddp.datasets import (
    channel_statistics,
    content_sha256,
    is_prepared,
    load_dataset,
    prepared_from,
    write_dataset,
)
from resnet_ddp.exits import TemporaryError, UserError


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 2 MiB in place of 8: the tests write many files."""
    assert write_beton.__kwdefaults__ == {"page_size": beton.PAGE_SIZE}
    monkeypatch.setitem(write_beton.__kwdefaults__, "page_size", beton.MIN_PAGE_SIZE)


def content(seed: int = 0, train: int = 12, test: int = 6) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return {
        "name": "tiny",
        "source": "made up",
        "classes": ("cat", "dog", "eel"),
        "train_images": generator.integers(0, 256, (train, 32, 32, 3), np.uint8),
        "train_labels": np.arange(train) % 3,
        "test_images": generator.integers(0, 256, (test, 32, 32, 3), np.uint8),
        "test_labels": np.arange(test) % 3,
    }


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "dataset.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "tiny", **content())
    return tmp_path / "tiny"


def test_round_trip(prepared: Path) -> None:
    given, dataset = content(), load_dataset(prepared)
    for key in ("train_images", "train_labels", "test_images", "test_labels"):
        assert np.array_equal(getattr(dataset, key), given[key])
    assert (dataset.name, dataset.source, dataset.original) == ("tiny", "made up", None)
    assert dataset.classes == ("cat", "dog", "eel")
    assert dataset.num_classes == 3
    assert dataset.train_labels.dtype == np.int64
    assert dataset.sha256 == content_sha256(*(v for k, v in given.items() if k[:2] in ("tr", "te")))


def test_description(prepared: Path) -> None:
    description = json.loads((prepared / "dataset.json").read_text())
    assert sorted(path.name for path in prepared.iterdir()) == [
        "dataset.json", "test.beton", "train.beton",
    ]  # fmt: skip
    assert description["format_version"] == 1
    assert description["image_size"] == [32, 32]
    assert description["original"] is None
    assert description["splits"] == {
        "train": {
            "file": "train.beton",
            "count": 12,
            "class_counts": {"cat": 4, "dog": 4, "eel": 4},
        },
        "test": {"file": "test.beton", "count": 6, "class_counts": {"cat": 2, "dog": 2, "eel": 2}},
    }
    assert len(description["sha256"]) == 64
    assert len(read_beton(prepared / "train.beton")[0]) == 12


def test_the_hash_is_the_documented_one() -> None:
    given = content()
    expected = hashlib.sha256(b"resnet-ddp dataset 1\n")
    for split, count in (("train", 12), ("test", 6)):
        expected.update(f"{split} images uint8 {count}x32x32x3\n".encode())
        expected.update(given[f"{split}_images"].tobytes())
        expected.update(f"{split} labels int64 {count}\n".encode())
        expected.update(given[f"{split}_labels"].astype("<i8").tobytes())
    arrays = [
        given[f"{split}_{kind}"] for split in ("train", "test") for kind in ("images", "labels")
    ]
    assert content_sha256(*arrays) == expected.hexdigest()


def test_the_hash_of_a_known_dataset_is_pinned() -> None:
    images = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, 32, 32, 3)
    labels = np.array([0, 1])
    digest = content_sha256(images, labels, images[::-1], labels)
    assert digest == "e03efa62e9f1cc6a9d285e6a68028d89de39e279f282fb89b456fd46ff735bef"


def test_samples_moved_from_train_to_test_change_the_hash() -> None:
    images, labels = np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int64)
    digests = {content_sha256(images[:n], labels[:n], images[n:], labels[n:]) for n in range(5)}
    assert len(digests) == 5


def test_channel_statistics_of_known_images() -> None:
    images = np.zeros((2, 32, 32, 3), np.uint8)
    images[1, :, :, 0], images[:, :, :, 1] = 255, 51
    images[0, 0, 0, 2] = 255
    mean, std = channel_statistics(images)
    assert mean == (0.5, 0.2, 1 / 2048)
    assert std == (0.5, 0.0, math.sqrt(2047) / 2048)


def test_channel_statistics_agree_with_numpy() -> None:
    images = np.random.default_rng(1).integers(0, 256, (700, 32, 32, 3), np.uint8)
    mean, std = channel_statistics(images)
    pixels = images.reshape(-1, 3) / 255
    assert mean == pytest.approx(pixels.mean(axis=0), abs=1e-12)
    assert std == pytest.approx(pixels.std(axis=0), abs=1e-12)


def test_channel_sums_do_not_overflow_on_white_images() -> None:
    images = np.full((300, 32, 32, 3), 255, np.uint8)
    assert channel_statistics(images) == ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))


def test_writing_the_same_again_changes_nothing(prepared: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()}
    write_dataset(prepared, **content() | {"source": "from elsewhere"})
    assert {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


@pytest.mark.parametrize("change", [{}, {"classes": ("cat", "dog", "emu")}])
def test_other_content_is_never_overwritten(prepared: Path, change: dict[str, Any]) -> None:
    before = load_dataset(prepared).sha256
    with pytest.raises(UserError, match=r"already holds another dataset \('tiny'"):
        write_dataset(prepared, **content(seed=0 if change else 1) | change)
    assert load_dataset(prepared).sha256 == before
    assert [path.name for path in prepared.parent.iterdir()] == ["tiny"]


def test_an_empty_directory_or_a_link_to_one_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    write_dataset(tmp_path / "link", **content())
    assert is_prepared(tmp_path / "empty")
    assert (tmp_path / "link").is_symlink()


def test_missing_parents_are_made(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a" / "b", **content())
    assert is_prepared(tmp_path / "a" / "b")


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        write_dataset(tmp_path, **content())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        write_dataset(tmp_path / "file", **content())
    with pytest.raises(UserError, match="cannot be written"):
        write_dataset(tmp_path / "file" / "below", **content())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "notes.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug"), MemoryError()])
@pytest.mark.parametrize(
    "where", ["write_beton", "durable.write_json", "durable.publish_directory"]
)
def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, where: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"resnet_ddp.datasets.{where}", interrupted)
    with pytest.raises(type(error)):
        write_dataset(tmp_path / "tiny", **content())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, TemporaryError, "no space left"),
        (errno.EACCES, UserError, "cannot be written"),
        (errno.EROFS, UserError, "name a directory where you may write"),
    ],
)
def test_a_disk_that_refuses_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[Exception],
    message: str,
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(datasets, "write_beton", refused)
    with pytest.raises(kind, match=message):
        write_dataset(tmp_path / "tiny", **content())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", [0, 1])
def test_a_lost_race_is_fine_if_the_winner_wrote_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    target, publish = tmp_path / "tiny", datasets.durable.publish_directory
    write_dataset(tmp_path / "winner", **content(seed))

    def too_late(temporary: Path, final: Path) -> None:
        shutil.move(tmp_path / "winner", target)
        publish(temporary, final)

    monkeypatch.setattr("resnet_ddp.datasets.durable.publish_directory", too_late)
    if seed == 0:
        write_dataset(target, **content())
    else:
        with pytest.raises(UserError, match="already holds another dataset"):
            write_dataset(target, **content())
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert load_dataset(target).sha256 == content_sha256(
        *(value for key, value in content(seed).items() if key[:2] in ("tr", "te"))
    )


def test_what_a_dead_process_left_is_harmless(tmp_path: Path) -> None:
    stale = tmp_path / ".tiny.123.deadbeef"
    stale.mkdir()
    (stale / "train.beton").write_bytes(b"half")
    write_dataset(tmp_path / "tiny", **content())
    assert load_dataset(tmp_path / "tiny").name == "tiny"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ("cat",)}, "two different class names"),
        ({"classes": ("cat", "dog", "cat")}, "two different class names"),
        ({"classes": ("cat", "dog", "a\nb")}, "printable"),
        ({"classes": ("cat", "dog")}, "labels run from 0 to 2, but there are 2 classes"),
        ({"train_labels": np.arange(12) - 1}, "train labels run from -1 to 10"),
        ({"test_labels": np.zeros(5, int)}, "6 test images with labels of shape"),
        ({"test_images": np.zeros((6, 28, 28, 3), np.uint8)}, "test images are 28x28x3 uint8"),
        (
            {"test_images": np.zeros((0, 32, 32, 3), np.uint8), "test_labels": np.zeros(0, int)},
            "0 test images",
        ),
    ],
)
def test_unfit_data_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_dataset(tmp_path / "tiny", **content() | change)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_dataset_says_how_to_prepare_it(tmp_path: Path, prepared: Path) -> None:
    with pytest.raises(UserError, match="does not exist") as caught:
        load_dataset(tmp_path / "none")
    assert f"resnet-ddp prepare folder --from PATH --to {tmp_path / 'none'}" in str(caught.value)
    assert not is_prepared(tmp_path / "none")
    (prepared / "test.beton").unlink()
    assert not is_prepared(prepared)
    with pytest.raises(UserError, match="is incomplete"):
        load_dataset(prepared)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("format_version"), "not of format version 1"),
        (lambda d: d.update(format_version=2), "not of format version 1"),
        (lambda d: d.pop("name"), "lacks a name"),
        (lambda d: d.update(source=3), "lacks a name, a source or a sha256"),
        (lambda d: d.update(original="yes"), "'original' must be"),
        (lambda d: d.update(classes="cat"), "lacks the list of classes"),
        (lambda d: d.update(classes=["cat", "dog", 3]), "printable text"),
        (lambda d: d.update(classes=["cat", "dog"]), "2 classes"),
        (lambda d: d.update(classes=["cat", "dog", "eel", "fox"]), "class_counts.fox is not"),
        (lambda d: d.update(image_size=[28, 28]), "image_size is not what was found"),
        (lambda d: d.update(splits=[]), "splits.train.file is not"),
        (
            lambda d: d["splits"]["train"].update(count=13),
            "train.count is recorded as '13', found 12",
        ),
        (lambda d: d["splits"]["test"].update(count=True), "test.count is recorded as 'True'"),
        (lambda d: d["splits"]["test"]["class_counts"].update(cat=1), "cat is recorded as '1'"),
        (lambda d: d["splits"]["test"].update(file="../x"), "test.file is recorded as '../x'"),
        (lambda d: d["splits"].pop("test"), "splits.test.file is not"),
        (lambda d: d.update(sha256="0" * 64), "sha256 is recorded as '000"),
        (lambda d: d.update(sha256=None), "lacks a name, a source or a sha256"),
        (lambda d: d.update(channel_mean=[0.5, 0.5, 0.5]), "channel_mean is not"),
        (lambda d: d.update(channel_std=[math.nan] * 3), "channel_std is not"),
    ],
)
def test_a_description_that_is_not_true_is_refused(
    prepared: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(prepared, change)
    with pytest.raises(UserError, match=message) as caught:
        load_dataset(prepared)
    assert str(prepared) in str(caught.value)
    assert str(caught.value).count("\n") <= 1


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"format_version": ' + b"9" * 5000 + b"}",
        b"[1]",
    ],
)
def test_a_damaged_description_is_refused(prepared: Path, text: bytes) -> None:
    (prepared / "dataset.json").write_bytes(text)
    with pytest.raises(UserError, match=r"no JSON|format version"):
        load_dataset(prepared)


def test_one_flipped_bit_is_found(prepared: Path) -> None:
    path = prepared / "train.beton"
    damaged = bytearray(path.read_bytes())
    damaged[beton.MIN_PAGE_SIZE + 5000] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="sha256 is recorded as"):
        load_dataset(prepared)
    with pytest.raises(UserError, match="sha256 is recorded as"):
        write_dataset(prepared, **content())


def test_exchanged_splits_are_found(tmp_path: Path) -> None:
    write_dataset(tmp_path / "tiny", **content(train=6, test=6))
    (tmp_path / "tiny" / "train.beton").rename(tmp_path / "train")
    (tmp_path / "tiny" / "test.beton").rename(tmp_path / "tiny" / "train.beton")
    (tmp_path / "train").rename(tmp_path / "tiny" / "test.beton")
    with pytest.raises(UserError, match="sha256 is recorded as"):
        load_dataset(tmp_path / "tiny")


def test_a_truncated_image_file_is_refused(prepared: Path) -> None:
    path = prepared / "test.beton"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"test.beton: it is damaged or cut short"):
        load_dataset(prepared)


def test_the_origin_is_kept(tmp_path: Path) -> None:
    write_dataset(
        tmp_path / "a", **content(), original=True, prepared_from={"path": "x", "size": 3}
    )
    assert prepared_from(tmp_path / "a") == {"path": "x", "size": 3}
    assert load_dataset(tmp_path / "a").original is True
