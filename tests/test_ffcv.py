"""The .beton format against the real ffcv package: it reads what we write, we read what it writes.

Of the real images where they have been prepared in data/cifar10, else of as many made up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from numpy.typing import NDArray

from resnet_ddp import datasets
from resnet_ddp.beton import PAGE_SIZE, read_beton, write_beton
from resnet_ddp.exits import UserError

pytestmark = [pytest.mark.ffcv, pytest.mark.usefixtures("ffcv")]

COUNTS = {"train": 50_000, "test": 10_000}
PAGE = 2 << 20


class Samples(Sequence[tuple[Any, ...]]):
    """What FFCV's DatasetWriter is given: columns, sample by sample."""

    def __init__(self, *columns: Sequence[Any]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: Any) -> tuple[Any, ...]:
        return tuple(column[index] for column in self.columns)


def made_up(count: int, size: int = 32) -> tuple[NDArray[Any], NDArray[Any]]:
    generator = np.random.default_rng(count)
    images = generator.integers(0, 256, (count, size, size, 3), np.uint8)
    return images, generator.integers(0, 10, count)


def write(path: Path, fields: dict[str, Any], *columns: Sequence[Any], **options: Any) -> Path:
    """Write a file with FFCV's own writer."""
    from ffcv.writer import DatasetWriter

    options = {"num_workers": 1, "page_size": PAGE} | options
    DatasetWriter(str(path), fields, **options).from_indexed_dataset(
        Samples(*columns), chunksize=50
    )
    return path


def image_field(**options: Any) -> Any:
    from ffcv.fields import RGBImageField

    return RGBImageField(**({"write_mode": "raw"} | options))


def int_field() -> Any:
    from ffcv.fields import IntField

    return IntField()


@pytest.fixture(scope="module")
def originals() -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    directory = ROOT / "data" / "cifar10"
    if not datasets.is_prepared(directory):
        return {split: made_up(count) for split, count in COUNTS.items()}
    data = datasets.load_dataset(directory)
    return {
        "train": (data.train_images[:], data.train_labels),
        "test": (data.test_images[:], data.test_labels),
    }


@pytest.fixture(scope="module")
def ours(
    originals: dict[str, tuple[NDArray[Any], NDArray[Any]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Path]]:
    directory = tmp_path_factory.mktemp("ours")
    paths = {split: directory / f"{split}.beton" for split in originals}
    for split, path in paths.items():
        write_beton(path, *originals[split])
    yield paths
    for path in paths.values():
        path.unlink()


@pytest.mark.parametrize(
    ("split", "num_workers", "order", "os_cache"),
    [
        ("train", 1, "SEQUENTIAL", True),
        ("train", 2, "RANDOM", True),
        ("train", 2, "QUASI_RANDOM", False),
        ("train", 1, "RANDOM", False),
        ("test", 2, "SEQUENTIAL", False),
        ("test", 1, "QUASI_RANDOM", True),
    ],
)
def test_ffcv_reads_every_image_and_label_of_ours(
    originals: dict[str, tuple[NDArray[Any], NDArray[Any]]],
    ours: dict[str, Path],
    split: str,
    num_workers: int,
    order: str,
    os_cache: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ffcv.loader import Loader, OrderOption

    loader = Loader(
        str(ours[split]),
        batch_size=500,
        num_workers=num_workers,
        order=OrderOption[order],
        os_cache=os_cache,
        drop_last=False,
        seed=1,
    )
    assert list(loader.pipeline_specs) == ["image", "label"]
    numbers = np.asarray(loader.next_traversal_order())
    monkeypatch.setattr(loader, "next_traversal_order", lambda: numbers)  # it may draw anew
    images, labels = originals[split]
    assert np.array_equal(np.sort(numbers), np.arange(len(images)))
    assert (order == "SEQUENTIAL") == np.array_equal(numbers, np.arange(len(images)))
    done = 0
    for pixels, answers in loader:
        expected = numbers[done : done + len(pixels)]
        assert np.array_equal(pixels.numpy(), images[expected])
        assert np.array_equal(answers.numpy()[:, 0], labels[expected])
        done += len(pixels)
    assert done == COUNTS[split] == len(images)


def test_ffcvs_own_writer_writes_the_same_bytes(
    originals: dict[str, tuple[NDArray[Any], NDArray[Any]]], ours: dict[str, Path], tmp_path: Path
) -> None:
    fields = {"image": image_field(), "label": int_field()}
    theirs = write(tmp_path / "a.beton", fields, *originals["test"], page_size=PAGE_SIZE)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (theirs, ours["test"])]
    assert digests[0] == digests[1]


def test_we_read_what_several_workers_wrote(tmp_path: Path) -> None:
    images, labels = made_up(3000)  # five pages
    fields = {"image": image_field(), "label": int_field()}
    path = write(tmp_path / "a.beton", fields, images, labels, num_workers=3)
    read_images, read_labels = read_beton(path)
    assert np.array_equal(read_images, images)
    assert np.array_equal(read_labels, labels)


def test_we_read_other_names_orders_and_further_fields(tmp_path: Path) -> None:
    import torch
    from ffcv.fields import BytesField, FloatField, JSONField, NDArrayField, TorchTensorField

    count = 200
    images, labels = made_up(count)
    noise = np.random.default_rng(1)
    fields: dict[str, Any] = {
        "weight": FloatField(),
        "klasse": int_field(),
        "note": JSONField(),
        "raw_bytes": BytesField(),
        "bild": image_field(),
        "embedding": NDArrayField(np.dtype("<f4"), (7,)),
        "tensor": TorchTensorField(torch.float32, (3,)),
    }
    columns = (
        noise.random(count),
        labels,
        [{"n": n, "pad": "x" * (n % 5)} for n in range(count)],
        [noise.integers(0, 256, n % 9, np.uint8) for n in range(count)],  # some of them empty
        images,
        noise.random((count, 7), np.float32),
        torch.from_numpy(noise.random((count, 3), np.float32)),
    )
    path = write(tmp_path / "a.beton", fields, *columns, num_workers=2)
    read_images, read_labels = read_beton(path)
    assert np.array_equal(read_images, images)
    assert np.array_equal(read_labels, labels)


@pytest.mark.parametrize(
    "options",
    [
        {"write_mode": "jpg"},
        {"write_mode": "smart", "smart_threshold": 2000},
        {"write_mode": "proportion", "compress_probability": 0.5},
    ],
    ids=lambda options: options["write_mode"],
)
def test_jpgs_are_refused_whatever_wrote_them(tmp_path: Path, options: dict[str, Any]) -> None:
    images, labels = made_up(40)
    fields = {"image": image_field(**options), "label": int_field()}
    path = write(tmp_path / "a.beton", fields, images, labels)
    with pytest.raises(UserError, match=r"sample \d+ is a jpg, as the write modes jpg, smart and"):
        read_beton(path)


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    images = [*made_up(3, 32)[0], *made_up(3, 48)[0]]
    fields = {"image": image_field(), "label": int_field()}
    path = write(tmp_path / "a.beton", fields, images, np.arange(6))
    with pytest.raises(UserError, match="sample 0 is 32x32, sample 3 is 48x48"):
        read_beton(path)


def test_an_older_version_is_refused(tmp_path: Path) -> None:
    images, labels = made_up(3)
    fields = {"image": image_field(), "label": int_field()}
    path = write(tmp_path / "a.beton", fields, images, labels)
    with open(path, "r+b") as file:
        file.write(b"\1\0")
    with pytest.raises(UserError, match=r"no \.beton file of version 2, but of 1"):
        read_beton(path)
