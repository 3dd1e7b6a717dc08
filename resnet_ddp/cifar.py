"""CIFAR-10 and CIFAR-100 as published (Krizhevsky 2009) become a prepared directory.

Two forms of the same images exist, https://www.cs.toronto.edu/~kriz/cifar.html: the python version,
whose files are pickles, and the binary version, a label byte or two and 3,072 pixel bytes an image.
Both keep an image as 1,024 red, 1,024 green and 1,024 blue bytes, rows first.

A pickle can do anything, so none is loaded as such: see `_read_pickle`.

Shapes: N images of a file.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from resnet_ddp.archives import Wanted, fingerprint, read_members
from resnet_ddp.datasets import (
    check_target,
    is_prepared,
    prepared_from,
    read_record,
    summary,
    write_dataset,
)
from resnet_ddp.exits import UserError

PIXELS: Final = 3 * 32 * 32
MAX_FILE_BYTES: Final = 256 << 20  # the largest official file has 155 MB

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Variant:
    """One of the two data sets and the names and checksums of its published files.

    Attributes:
        python_files: MD5 by name; the training files first, then the test file, then the names.
        python_label_key: of the labels in a python file.
        python_names_key: of the class names in the python file of names.
        binary_files: training files, then the test file, then the names.
        binary_label_bytes: label bytes before an image; the last one counts.
        archive_md5: of the archives, by file name.
    """

    title: str
    num_classes: int
    python_files: dict[str, str]
    python_label_key: str
    python_names_key: str
    binary_files: tuple[str, ...]
    binary_label_bytes: int
    archive_md5: dict[str, str]


VARIANTS: Final = {
    "cifar10": Variant(
        title="CIFAR-10",
        num_classes=10,
        python_files={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
        python_label_key="labels",
        python_names_key="label_names",
        binary_files=(
            *(f"data_batch_{number}.bin" for number in range(1, 6)),
            "test_batch.bin",
            "batches.meta.txt",
        ),
        binary_label_bytes=1,
        archive_md5={
            "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
            "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
        },
    ),
    "cifar100": Variant(
        title="CIFAR-100",
        num_classes=100,
        python_files={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
        python_label_key="fine_labels",
        python_names_key="fine_label_names",
        binary_files=("train.bin", "test.bin", "fine_label_names.txt"),
        binary_label_bytes=2,
        archive_md5={
            "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
            "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
        },
    ),
}


def prepare_cifar(name: str, source: Path, target: Path) -> str:
    """Turn the published files into a prepared directory.

    Args:
        name: "cifar10" or "cifar100".
        source: the python or the binary archive, or a folder that holds what is in one.
        target: the directory to make.

    Returns:
        One line for the user: what is there now, and whether it is the original.

    Raises:
        UserError: the source is unfit or damaged, or the target holds something else.
        TemporaryError: the disk is full.
    """
    variant = VARIANTS[name]
    check_target(target)
    known = {*variant.python_files, *variant.binary_files}
    wanted = Wanted(lambda path: path.name in known, MAX_FILE_BYTES)
    origin = fingerprint(source, wanted)
    if is_prepared(target) and prepared_from(target) == origin:
        return f"{_summary(variant, target)} (already prepared)"
    files = _read_files(source, wanted)
    names = tuple(variant.python_files)
    if files.keys() >= set(names):
        parts = [_read_python(variant, f"{source}: {file}", files[file]) for file in names[:-1]]
        classes = _python_names(variant, f"{source}: {names[-1]}", files[names[-1]])
        original = all(_md5(files[file]) == md5 for file, md5 in variant.python_files.items())
    elif files.keys() >= set(names := variant.binary_files):
        parts = [_read_binary(variant, f"{source}: {file}", files[file]) for file in names[:-1]]
        classes = _lines(f"{source}: {names[-1]}", files[names[-1]])
        # No checksums of the single binary files are published.
        original = source.is_file() and _md5(source.read_bytes()) in variant.archive_md5.values()
    else:
        raise UserError(f"{source} is not {variant.title}: {_missing(variant, files)}")
    write_dataset(
        target,
        name=name,
        source=f"{variant.title} from {source.resolve().name!a}",
        classes=classes,
        train_images=np.concatenate([images for images, _ in parts[:-1]]),
        train_labels=np.concatenate([labels for _, labels in parts[:-1]]),
        test_images=parts[-1][0],
        test_labels=parts[-1][1],
        original=original,
        prepared_from=origin,
    )
    return _summary(variant, target)


def download_and_prepare(name: str, target: Path) -> str:
    """Let torchvision download the python version, then prepare it.

    Raises:
        UserError: it cannot be downloaded; the line says what to fetch by hand.
    """
    variant = VARIANTS[name]
    check_target(target)
    if is_prepared(target):
        return f"{_summary(variant, target)} (already prepared)"
    archive = next(iter(variant.archive_md5))
    download = target.resolve().with_name(f"{target.name}-download")
    try:
        from resnet_ddp.vision import import_torchvision

        class_name = variant.title.replace("-", "")
        getattr(import_torchvision().datasets, class_name)(root=str(download), download=True)
        return prepare_cifar(name, download / archive, target)
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{variant.title} cannot be downloaded here ({reason}). Fetch {archive} from "
            "https://www.cs.toronto.edu/~kriz/cifar.html, then:\n"
            f"resnet-ddp prepare {name} --from {archive} --to {target}"
        ) from error
    finally:
        shutil.rmtree(download, ignore_errors=True)


def _summary(variant: Variant, target: Path) -> str:
    is_original = read_record(target).original
    origin = "the original" if is_original else f"NOT the original {variant.title}"
    return summary(target, origin=f"{origin}, ")


def _read_files(source: Path, wanted: Wanted) -> dict[str, bytes]:
    """Return the known files of a source by name."""
    files: dict[str, bytes] = {}
    with closing(read_members(source, wanted)) as members:
        for member in members:
            if member.kind == "file" and wanted.matches(member.path):
                if member.path.name in files:
                    raise UserError(f"{source}: {member.path.name} is in it twice; name one of two")
                files[member.path.name] = member.data
    return files


def _missing(variant: Variant, files: dict[str, bytes]) -> str:
    """Say which files of the version that is nearest to complete are not there."""
    versions = (tuple(variant.python_files), variant.binary_files)
    nearest = min(versions, key=lambda names: len(set(names) - files.keys()))
    missing = [name for name in nearest if name not in files]
    return f"it lacks {', '.join(missing)}; fetch {' or '.join(variant.archive_md5)}"


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _images(planes: Images) -> Images:
    """(N, 3072), colour planes -> (N, 32, 32, 3)."""
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _damaged(where: str, why: object) -> UserError:
    return UserError(f"{where} is damaged or not a CIFAR file ({why}): fetch it again")


# The binary version


def _read_binary(variant: Variant, where: str, content: bytes) -> tuple[Images, Labels]:
    record = variant.binary_label_bytes + PIXELS
    if not content or len(content) % record:
        raise _damaged(where, f"{len(content)} bytes are no multiple of {record}")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    labels = records[:, variant.binary_label_bytes - 1].astype(np.int64)
    return _images(records[:, variant.binary_label_bytes :]), labels


def _lines(where: str, content: bytes) -> tuple[str, ...]:
    try:
        return tuple(line for line in content.decode("ascii").split("\n") if line.strip())
    except UnicodeDecodeError as error:
        raise _damaged(where, "not text") from error


# The python version


def _read_python(variant: Variant, where: str, content: bytes) -> tuple[Images, Labels]:
    batch = _read_pickle(where, content)
    data, labels = batch.get("data"), batch.get(variant.python_label_key)
    if not isinstance(data, _Array) or not isinstance(labels, list):
        raise _damaged(where, "no data or no labels")
    if not all(type(label) is int and 0 <= label < variant.num_classes for label in labels):
        raise _damaged(where, "a label out of range")
    if len(data.content) != len(labels) * PIXELS:
        raise _damaged(where, f"{len(labels)} labels, {len(data.content)} bytes of pixels")
    pixels = np.frombuffer(data.content, np.uint8).reshape(-1, PIXELS)
    return _images(pixels), np.array(labels, np.int64)


def _python_names(variant: Variant, where: str, content: bytes) -> tuple[str, ...]:
    names = _read_pickle(where, content).get(variant.python_names_key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _damaged(where, "no class names")
    return tuple(names)


def _read_pickle(where: str, content: bytes) -> dict[Any, Any]:
    """Return the dictionary in a pickle of CIFAR's, and refuse every other pickle.

    A pickle names functions to call. The three that these files need are answered by stand-ins of
    our own, which only carry bytes, and any other name is refused: nothing in the file is ever run.
    """
    try:
        value = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # an unpickler raises nearly anything on damaged input
        raise _damaged(where, " ".join(str(error).split())[:120]) from error
    if not isinstance(value, dict):
        raise _damaged(where, "no dictionary")
    return value


class _Array:
    """Stands in for a NumPy array of bytes."""

    content = b""

    def __setstate__(self, state: tuple[object, ...]) -> None:
        _version, _shape, dtype, is_fortran, content = state
        if isinstance(content, str):
            content = content.encode("latin1")  # Python 2's string
        if not isinstance(dtype, _Dtype) or is_fortran or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array of something else than bytes in rows")
        self.content = content


class _Dtype:
    """Stands in for a NumPy type; only that of bytes is admitted."""

    def __setstate__(self, state: object) -> None:
        pass  # byte order and alignment: nothing that bytes have


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _dtype(name: object, *_: object) -> _Dtype:
    if name not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"an array of {name!a}")
    return _Dtype()


def _encode(text: str, _encoding: str) -> bytes:
    return text.encode("latin1")


_STAND_INS: Final[dict[tuple[str, str], Callable[..., Any]]] = {
    ("numpy", "ndarray"): _reconstruct,
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,  # how Python 3 writes bytes for Python 2
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}"[:80]) from None
