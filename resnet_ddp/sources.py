"""Images on disk become a prepared directory (see datasets.py).

In a folder or an archive:

    train/<class>/<name>.png      test/<class>/<name>.png      (.jpg and .jpeg as well)

One enclosing folder is allowed. Classes are sorted by name, samples by class and then by name, 2
before 10, so that a folder and any archive of it give the same dataset, bit for bit.

Or in two .beton files, as FFCV's DatasetWriter or our own `write_beton` make them. These may be
larger than memory.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from resnet_ddp.archives import Member, Wanted, fingerprint, read_members, shown
from resnet_ddp.beton import open_beton
from resnet_ddp.datasets import (
    FILES,
    IMAGE_SIZE,
    check_target,
    is_prepared,
    prepared_from,
    summary,
    write_dataset,
)
from resnet_ddp.exits import UserError

SPLITS: Final = ("train", "test")
IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg")
IMAGES: Final = Wanted(
    lambda path: path.suffix.lower() in IMAGE_SUFFIXES,
    max_bytes=4 << 20,  # a 32x32 image has a few thousand
)
MAX_UNNAMED: Final = 100_000  # classes; more is a label that is none
LAYOUT: Final = "train|test/<class>/*.png or .jpg"


def prepare_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    name: str | None = None,
    progress: bool = True,
) -> str:
    """Decode a folder or an archive of images into a prepared directory.

    A repetition with the same source is recognised by its size and time, and decodes nothing.

    Args:
        source: a folder, or a .tar (.gz, .bz2, .xz) or .zip archive, with images at
            train|test/<class>/.
        target: the directory to make.
        name: of the dataset; by default that of the directory.
        progress: show a progress bar if stderr is a terminal.

    Returns:
        One line for the user: what is there now.

    Raises:
        UserError: the source is unfit or damaged, or the target holds something else.
        TemporaryError: the disk is full.
    """
    source, target = Path(source), Path(target)
    check_target(target)
    origin = fingerprint(source, IMAGES)
    if is_prepared(target) and prepared_from(target) == origin:
        return f"{summary(target)} (already prepared)"
    with _progress_bar(progress) as report, closing(read_members(source, IMAGES)) as members:
        classes, splits = _collect(source, members, report)
    write_dataset(
        target,
        name=name or Path(os.path.realpath(target)).name,
        source=f"images in {source.resolve().name!a}",
        classes=classes,
        train_images=splits["train"][0],
        train_labels=splits["train"][1],
        test_images=splits["test"][0],
        test_labels=splits["test"][1],
        prepared_from=origin,
    )
    return summary(target)


def prepare_beton(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, name: str | None = None
) -> str:
    """Bring train.beton and test.beton, whoever wrote them, into a prepared directory.

    The classes are called 0, 1, 2, ... unless classes.txt beside the files names them, one a line.

    Args:
        source: a folder with the two files, and classes.txt perhaps.
        target: the directory to make.
        name: of the dataset; by default that of the directory.

    Returns:
        One line for the user: what is there now.

    Raises:
        UserError: a file is missing, damaged or holds something else, or so does the target.
        TemporaryError: the disk is full.
    """
    source, target = Path(source), Path(target)
    check_target(target)
    (train_images, train_labels), (test_images, test_labels) = (
        open_beton(source / FILES[split]) for split in SPLITS
    )
    write_dataset(
        target,
        name=name or Path(os.path.realpath(target)).name,
        source=f".beton files in {source.resolve().name!a}",
        classes=_class_names(source, 1 + int(max(train_labels.max(), test_labels.max()))),
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
    )
    return summary(target)


def _class_names(source: Path, num_classes: int) -> list[str]:
    path = source / "classes.txt"
    if not path.exists():
        if num_classes > MAX_UNNAMED:
            raise UserError(
                f"{source}: labels go up to {num_classes - 1}; if there are so many classes, name "
                "them in classes.txt, one a line"
            )
        return [str(number) for number in range(num_classes)]
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}); write it anew") from error


class _Place(NamedTuple):
    """Where a member belongs. `top`: the enclosing folder, or nothing."""

    top: tuple[str, ...]
    split: str
    class_name: str


class _Sample(NamedTuple):
    place: _Place
    order: tuple[object, ...]
    pixels: bytes


def _collect(
    source: Path, members: Iterator[Member], report: Callable[[int, float], None]
) -> tuple[list[str], dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]]:
    """Decode all images and put them in order: class names, and images and labels by split."""
    samples: dict[PurePosixPath, _Sample] = {}
    folders: set[_Place] = set()
    # An image of many megapixels is worth a warning to Pillow; here it is not a 32x32 image.
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Image size")
        for member in members:
            place = _place(source, member)
            if place is not None and member.kind == "directory":
                folders.add(place)
            elif place is not None:
                if member.path in samples:
                    raise UserError(f"{source}: {shown(member.path)} is in it twice; pack it again")
                pixels = _pixels(member.data, f"{source}: {shown(member.path)}")
                samples[member.path] = _Sample(place, _natural(member.path.name), pixels)
                if len(samples) % 256 == 0:
                    report(len(samples), member.done)
    report(len(samples), 1.0)
    classes = _classes(source, {sample.place for sample in samples.values()}, folders)
    return classes, {split: _arrays(samples, split, classes) for split in SPLITS}


def _place(source: Path, member: Member) -> _Place | None:
    """Find a member's split and class; None if it is none of our business."""
    path, parts = member.path, member.path.parts
    ours = bool(parts) and (parts[0] in SPLITS or (len(parts) > 1 and parts[1] in SPLITS))
    if not ours:
        return None
    depth = len(parts) if member.kind == "directory" else len(parts) - 1
    if member.kind not in ("file", "directory"):
        raise UserError(
            f"{source}: {shown(path)} is a {member.kind}, not an image: "
            "pack the files themselves (tar --dereference --hard-dereference)"
        )
    if member.kind == "file" and path.suffix.lower() not in IMAGE_SUFFIXES and depth > 1:
        raise UserError(f"{source}: {shown(path)} is no .png or .jpg: convert or remove it")
    if depth == 2 and parts[0] in SPLITS:
        return _Place((), parts[0], parts[1])
    if depth == 3 and parts[1] in SPLITS:
        return _Place(parts[:1], parts[1], parts[2])
    if member.kind == "file" and path.suffix.lower() in IMAGE_SUFFIXES:
        raise UserError(f"{source}: {shown(path)} is not where images are expected: {LAYOUT}")
    return None


def _classes(source: Path, places: set[_Place], folders: set[_Place]) -> list[str]:
    """Check that both splits have images of the same classes; return their names in order."""
    tops = {place.top for place in places}
    if len(tops) > 1:
        found = " and ".join(sorted(shown(PurePosixPath(*top)) for top in tops)[:2])
        raise UserError(f"{source}: images lie below both {found}; keep one dataset only")
    for split in SPLITS:
        if not any(place.split == split for place in places):
            raise UserError(f"{source} holds no {split} images; expected at {LAYOUT}")
    classes = sorted({place.class_name for place in places | folders if place.top in tops})
    for split in SPLITS:
        for class_name in classes:
            if _Place(min(tops), split, class_name) not in places:
                raise UserError(
                    f"{source}: {shown(PurePosixPath(split, class_name))} holds no images; "
                    "every class needs some for training and for testing"
                )
    if len(classes) < 2:
        raise UserError(f"{source}: {classes[0]!a} is the only class; at least two are needed")
    return classes


def _arrays(
    samples: dict[PurePosixPath, _Sample], split: str, classes: list[str]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    chosen = [sample for sample in samples.values() if sample.place.split == split]
    chosen.sort(key=lambda sample: (sample.place.class_name, sample.order))
    images = np.empty((len(chosen), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for image, sample in zip(images, chosen, strict=True):
        image[:] = np.frombuffer(sample.pixels, np.uint8).reshape(image.shape)
    index = {class_name: label for label, class_name in enumerate(classes)}
    return images, np.array([index[sample.place.class_name] for sample in chosen], np.int64)


def _natural(name: str) -> tuple[object, ...]:
    """Sort key: text as text, digits as numbers; the name itself decides between 1 and 01."""
    pieces: list[object] = list(re.split("([0-9]+)", name))
    for index in range(1, len(pieces), 2):
        digits = str(pieces[index]).lstrip("0")
        pieces[index] = (len(digits), digits)  # int() refuses thousands of digits
    return (*pieces, name)


def _pixels(data: bytes, where: str) -> bytes:
    """Decode one image, which must be what it is to become: nothing is converted in silence."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            found = f"{image.width}x{image.height} {image.mode}"
            if "transparency" in image.info:
                found += " with transparency"
            if image.format == "PNG" and data[24] > 8:  # Pillow would drop the lower bits
                found += f" of {data[24]} bits"
            if found != f"{IMAGE_SIZE}x{IMAGE_SIZE} RGB":
                raise UserError(f"{where} is {found}, not 32x32 RGB: convert it and prepare again")
            return image.tobytes()
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{where} is far larger than 32x32: resize it and prepare again") from None
    except Exception as error:
        # Pillow's decoders raise nearly anything on damaged input, SyntaxError included.
        raise UserError(f"{where} is damaged or no image: replace it and prepare again") from error


@contextmanager
def _progress_bar(wanted: bool) -> Iterator[Callable[[int, float], None]]:
    """Yield report(images so far, fraction done); silent unless stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    images = TextColumn("{task.fields[images]:,} images")
    columns = (TextColumn("decoding"), BarColumn(), TaskProgressColumn(), images)
    disable = not (wanted and console.is_terminal)
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=disable) as bar:
        task = bar.add_task("", total=1.0, images=0)
        yield lambda count, done: bar.update(task, completed=done, images=count)
