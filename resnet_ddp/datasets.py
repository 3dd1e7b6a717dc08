"""A prepared dataset: one directory that says what it holds, written at once and checked when read.

    train.beton, test.beton   images and labels (see beton.py)
    dataset.json              names, counts, channel statistics and a SHA-256 of all of it

Whatever a result is compared with, it was trained on these very pixels: `load_dataset` checks the
hash every time, and runs record it. Pixels are stored as they came, without mean subtraction
(He et al. 2015, section 4.2); the channel statistics for that are those of the training images.

Shapes: N samples of one split, H = W = 32.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from resnet_ddp import durable
from resnet_ddp.beton import Images, open_beton, read_beton, write_beton
from resnet_ddp.exits import Exit, TemporaryError, UserError

FORMAT_VERSION: Final = 1
IMAGE_SIZE: Final = 32  # pixels, height and width
DESCRIPTION: Final = "dataset.json"
FILES: Final = {"train": "train.beton", "test": "test.beton"}
BLOCK: Final = 256  # images gone through at a time: few enough for the cache, and for uint32
_MAX_DESCRIPTION = 16 << 20  # bytes; ours has about a thousand


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset, in memory or with its images left in their files (then they are MappedImages).

    Attributes:
        name: short name, for instance of the directory.
        source: where the images came from, one line.
        classes: class names; a label is an index into them.
        train_images: (N, 32, 32, 3) uint8, RGB.
        train_labels: (N,) int64.
        test_images: (N, 32, 32, 3) uint8, RGB.
        test_labels: (N,) int64.
        channel_mean: mean of red, green, blue over all training pixels, in 0..1.
        channel_std: population standard deviation of the same, in 0..1.
        sha256: hash of pixels and labels, see `content_sha256`.
        original: whether this is CIFAR as published, bit for bit; None if nobody knows.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    train_images: Images
    train_labels: NDArray[np.int64]
    test_images: Images
    test_labels: NDArray[np.int64]
    channel_mean: tuple[float, float, float]
    channel_std: tuple[float, float, float]
    sha256: str
    original: bool | None

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are below it."""
        return len(self.classes)


@dataclass(frozen=True)
class DataRecord:
    """What the records of a run say of its data; the attributes are those of `Dataset`."""

    name: str
    source: str
    original: bool | None
    sha256: str


def write_dataset(
    directory: str | os.PathLike[str],
    *,
    name: str,
    source: str,
    classes: Sequence[str],
    train_images: Images,
    train_labels: NDArray[np.integer[Any]],
    test_images: Images,
    test_labels: NDArray[np.integer[Any]],
    original: bool | None = None,
    prepared_from: Mapping[str, object] | None = None,
) -> None:
    """Write a prepared directory in one step: it is there whole or not at all.

    Nothing happens if the directory already holds these pixels, labels and classes.

    Args:
        directory: made, with its parents, unless it exists and is empty.
        prepared_from: what `prepared_from` is to return, a JSON object.
        name, source, classes, train_images, train_labels, test_images, test_labels, original:
            see `Dataset`.

    Raises:
        UserError: the directory holds something else or cannot be written, or the data is unfit.
        TemporaryError: the disk is full.
    """
    directory = Path(directory)
    dataset = _assemble(
        directory, name, source, classes, (train_images, train_labels), (test_images, test_labels),
        original,
    )  # fmt: skip
    # A link to an empty directory cannot be renamed onto, what it points to can.
    final = Path(os.path.realpath(directory))
    try:
        if _holds_same(directory, dataset):
            return
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            temporary.mkdir()
            write_beton(temporary / FILES["train"], dataset.train_images, dataset.train_labels)
            write_beton(temporary / FILES["test"], dataset.test_images, dataset.test_labels)
            description = _describe(dataset) | {"prepared_from": prepared_from}
            durable.write_json(temporary / DESCRIPTION, description)
            durable.publish_directory(temporary, final)
        except OSError:
            # Another process may have been first, with the same data.
            if not _holds_same(directory, dataset):
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise _cannot_write(directory, error) from error


def in_memory(
    *,
    name: str,
    source: str,
    classes: Sequence[str],
    train: tuple[NDArray[np.uint8], NDArray[np.integer[Any]]],
    test: tuple[NDArray[np.uint8], NDArray[np.integer[Any]]],
) -> Dataset:
    """Return a data set that is on no disk.

    Raises:
        UserError: the data is unfit.
    """
    return _assemble(Path(name), name, source, classes, train, test, original=None)


def load_dataset(directory: str | os.PathLike[str], *, mapped: bool = False) -> Dataset:
    """Read a prepared directory and verify all of it, the hash included.

    Args:
        mapped: leave the images in their files, for data that does not fit into memory.

    Raises:
        UserError: it is missing, incomplete, damaged, or not what its description says.
    """
    directory = Path(directory)
    record = read_record(directory)
    recorded = _read_description(directory)
    classes = recorded.get("classes")
    if not isinstance(classes, list):
        raise _damaged(directory, f"{DESCRIPTION} lacks the list of classes")
    read = open_beton if mapped else read_beton
    train, test = (read(directory / FILES[split]) for split in ("train", "test"))
    dataset = _assemble(
        directory, record.name, record.source, classes, train, test, record.original
    )
    if difference := _difference(recorded, _describe(dataset)):
        raise _damaged(directory, f"{DESCRIPTION} and the images disagree: {difference}")
    return dataset


def is_prepared(directory: str | os.PathLike[str]) -> bool:
    """Say whether all files of a prepared directory are there, without reading them."""
    return all(os.path.isfile(Path(directory) / file) for file in (DESCRIPTION, *FILES.values()))


def copy_once(directory: Path, to: Path) -> Path:
    """Copy a prepared directory below another, unless the same data lies there; return the copy.

    For a fast local disk: of all processes of a machine one copies, the others wait for it. If that
    disk does not take it, the original is as good.
    """
    copy = to / read_record(directory).sha256[:16]
    try:
        to.mkdir(parents=True, exist_ok=True)
        with durable.locked(to / ".lock"):
            if not is_prepared(copy):
                temporary = to / f".{copy.name}.{secrets.token_hex(8)}"
                shutil.rmtree(copy, ignore_errors=True)
                try:
                    temporary.mkdir()
                    for file in (DESCRIPTION, *FILES.values()):
                        shutil.copyfile(directory / file, temporary / file)
                    durable.publish_directory(temporary, copy)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        trouble = error.strerror or error
        print(f"{to}: {trouble}; reading {directory} instead", file=sys.stderr, flush=True)
        return directory
    return copy


def summary(directory: str | os.PathLike[str], *, origin: str = "") -> str:
    """Return one line for the user: what the disk gives back, not what was meant to be written.

    Args:
        origin: what else to say of the images.
    """
    data = load_dataset(directory, mapped=True)
    return (
        f"{directory}: {len(data.train_labels):,} training and {len(data.test_labels):,} test "
        f"images in {data.num_classes} classes, {origin}sha256 {data.sha256[:12]}..."
    )


def prepared_from(directory: str | os.PathLike[str]) -> object:
    """Return what `write_dataset` was told of the origin, without reading the images."""
    return _read_description(Path(directory)).get("prepared_from")


def read_record(directory: str | os.PathLike[str]) -> DataRecord:
    """Return what a prepared directory says of itself; the images are not read.

    Raises:
        UserError: the directory is missing, incomplete, or its description damaged.
    """
    directory = Path(directory)
    recorded = _read_description(directory)
    name, source, original, sha256 = (
        recorded.get(key) for key in ("name", "source", "original", "sha256")
    )
    if not all(isinstance(text, str) for text in (name, source, sha256)):
        raise _damaged(directory, f"{DESCRIPTION} lacks a name, a source or a sha256")
    if original is not None and not isinstance(original, bool):
        raise _damaged(directory, f"{DESCRIPTION}: 'original' must be true, false or null")
    return DataRecord(str(name), str(source), original, str(sha256))


def check_target(directory: str | os.PathLike[str]) -> None:
    """Check that a directory is new, empty or prepared, so that nothing foreign is in the way.

    Raises:
        UserError: it is a file, has other contents, or cannot be read.
    """
    directory = Path(directory)
    try:
        occupied = not is_prepared(directory) and os.listdir(directory)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _cannot_write(directory, error) from error
    if occupied:
        raise UserError(
            f"{directory} holds other files, or an incomplete dataset: nothing was changed.\n"
            "Name a new directory, or remove this one first."
        )


def content_sha256(
    train_images: Images,
    train_labels: NDArray[np.int64],
    test_images: Images,
    test_labels: NDArray[np.int64],
) -> str:
    """Hash all pixels and labels.

    SHA-256 over the line "resnet-ddp dataset 1", then for each of the four arrays, in the order of
    the arguments, a line such as "train images uint8 50000x32x32x3" and the array's bytes in sample
    order: pixels row by row as RGB, labels as little-endian int64. The other lines read
    "train labels int64 50000", "test images ..." and "test labels ..."; each ends in a newline, all
    are ASCII. The lines tell where an array ends, so that no two datasets feed the same bytes.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(b"resnet-ddp dataset 1\n")
    parts = {
        "train images uint8": train_images,
        "train labels int64": train_labels.astype("<i8", copy=False),
        "test images uint8": test_images,
        "test labels int64": test_labels.astype("<i8", copy=False),
    }
    for title, array in parts.items():
        digest.update(f"{title} {'x'.join(map(str, array.shape))}\n".encode("ascii"))
        for block in _blocks(array):
            digest.update(np.ascontiguousarray(block).data)
    return digest.hexdigest()


def _blocks(array: Images | NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    """Go through an array some items at a time: images may be more than fit into memory."""
    for first in range(0, len(array), BLOCK):
        yield array[first : first + BLOCK]


def channel_statistics(
    images: Images,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and population standard deviation of each channel over all pixels, in 0..1.

    The sums are integers and the divisions are Python's, correctly rounded: the same on every
    machine, to the last bit.

    Args:
        images: (N, H, W, 3) uint8.
    """
    size = math.prod(images.shape[1:])
    totals = np.zeros(size, np.int64)
    squares = np.zeros(size, np.int64)
    for block in _blocks(images):
        rows = block.reshape(len(block), size).astype(np.uint16)
        totals += rows.sum(axis=0, dtype=np.uint32)
        squares += (rows * rows).sum(axis=0, dtype=np.uint32)  # 255 * 255 fits into uint16
    count = len(images) * size // 3
    mean, std = [], []
    for channel in range(3):
        total, square = int(totals[channel::3].sum()), int(squares[channel::3].sum())
        mean.append(total / (255 * count))
        std.append(math.sqrt((count * square - total * total) / (255 * count) ** 2))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _assemble(
    directory: Path,
    name: str,
    source: str,
    classes: Sequence[object],
    train: tuple[Images, NDArray[np.integer[Any]]],
    test: tuple[Images, NDArray[np.integer[Any]]],
    original: bool | None,
) -> Dataset:
    names = _class_names(directory, classes)
    for split, (images, labels) in (("train", train), ("test", test)):
        _check_split(directory, split, images, labels, len(names))
    train_labels, test_labels = (labels.astype(np.int64, copy=False) for _, labels in (train, test))
    arrays = (train[0], train_labels, test[0], test_labels)
    mean, std = channel_statistics(arrays[0])
    return Dataset(name, source, names, *arrays, mean, std, content_sha256(*arrays), original)


def _class_names(directory: Path, classes: Sequence[object]) -> tuple[str, ...]:
    names = tuple(name for name in classes if isinstance(name, str))
    if len(names) != len(classes) or not all(name and name.isprintable() for name in names):
        raise UserError(
            f"{directory}: class names must be printable text; rename and prepare again"
        )
    if len(set(names)) != len(names) or len(names) < 2:
        raise UserError(
            f"{directory}: two different class names at least are needed, not {str(names)[:200]}"
        )
    return names


def _check_split(
    directory: Path,
    split: str,
    images: Images,
    labels: NDArray[np.integer[Any]],
    num_classes: int,
) -> None:
    if images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3) or images.dtype != np.uint8:
        shape = "x".join(map(str, images.shape[1:]))
        raise UserError(
            f"{directory}: {split} images are {shape} {images.dtype}, not 32x32x3 uint8; "
            "resize them and prepare again"
        )
    if len(images) == 0 or labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{directory}: {len(images)} {split} images with labels of shape {labels.shape}; "
            "prepare again with one label an image and one image at least"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"{directory}: {split} labels run from {labels.min()} to {labels.max()}, but there are "
            f"{num_classes} classes; prepare again"
        )


def _describe(dataset: Dataset) -> dict[str, object]:
    """What dataset.json says, in the order in which a reader wants to know of a difference."""
    splits = {}
    for split, labels in (("train", dataset.train_labels), ("test", dataset.test_labels)):
        counts = np.bincount(labels, minlength=dataset.num_classes).tolist()
        splits[split] = {
            "file": FILES[split],
            "count": len(labels),
            "class_counts": dict(zip(dataset.classes, counts, strict=True)),
        }
    return {
        "format_version": FORMAT_VERSION,
        "name": dataset.name,
        "source": dataset.source,
        "original": dataset.original,
        "classes": list(dataset.classes),
        "image_size": [IMAGE_SIZE, IMAGE_SIZE],
        "splits": splits,
        "sha256": dataset.sha256,
        "channel_mean": list(dataset.channel_mean),
        "channel_std": list(dataset.channel_std),
    }


def _difference(recorded: object, actual: object, key: str = "") -> str | None:
    """Return the first difference as text. It follows `actual`: the other may be anything."""
    if isinstance(actual, dict):
        for name, value in actual.items():
            other = recorded.get(name) if isinstance(recorded, dict) else None
            if found := _difference(other, value, f"{key}.{name}" if key else name):
                return found
        return None
    if type(recorded) is type(actual) and recorded == actual:
        return None
    if isinstance(recorded, str | int | float) and not isinstance(actual, list):
        return f"{key} is recorded as {str(recorded)[:64]!r}, found {actual!r}"
    return f"{key} is not what was found"


def _read_description(directory: Path) -> dict[str, Any]:
    if not is_prepared(directory):
        state = "is incomplete" if os.path.isdir(directory) else "does not exist"
        raise UserError(
            f"{directory}: this prepared dataset {state}. Prepare it:\n"
            f"resnet-ddp prepare folder --from PATH --to {directory}"
        )
    path = directory / DESCRIPTION
    try:
        if path.stat().st_size > _MAX_DESCRIPTION:
            raise ValueError("too long")
        recorded = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its rights") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(directory, f"{DESCRIPTION} is no JSON") from error
    if not isinstance(recorded, dict):
        raise _damaged(directory, f"{DESCRIPTION} is no JSON object")
    if recorded.get("format_version") != FORMAT_VERSION:
        raise _damaged(directory, f"{DESCRIPTION} is not of format version {FORMAT_VERSION}")
    return recorded


def _holds_same(directory: Path, dataset: Dataset) -> bool:
    """Say whether the directory holds this dataset (True) or nothing (False); refuse all else."""
    check_target(directory)
    if not is_prepared(directory):
        return False
    present = load_dataset(directory, mapped=True)
    if (present.sha256, present.classes) == (dataset.sha256, dataset.classes):
        return True
    raise UserError(
        f"{directory} already holds another dataset ({present.name!r}, sha256 "
        f"{present.sha256[:12]}..., not {dataset.sha256[:12]}...): nothing was changed.\n"
        "Name another directory, or remove this one first."
    )


def _damaged(directory: Path, why: str) -> UserError:
    return UserError(f"{directory}: {why}.\nRemove the directory and prepare it again.")


def _cannot_write(directory: Path, error: OSError) -> Exit:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TemporaryError(f"{directory}: no space left; about 190 MB are needed for CIFAR-10")
    return UserError(
        f"{directory}: cannot be written ({error.strerror or error}); "
        "name a directory where you may write"
    )
