"""The .beton file: FFCV's format, version 2, read and written with NumPy alone.

FFCV (https://ffcv.io) keeps a whole dataset in one file that can be mapped into memory. Its own
package needs a compiler and OpenCV; the format needs neither. What is written here is byte for byte
what `ffcv.writer.DatasetWriter` with one worker writes for an `RGBImageField(write_mode="raw")`
called `image` and an `IntField` called `label`, and FFCV's Loader opens it. Little-endian:

    header           24 bytes: version, number of fields, page size, N, offset of the table
    descriptors      1041 bytes a field: type, name, arguments (zero for images and ints)
    records          one a sample, laid out like a C struct; an image record points to its pixels
    zeros            up to a multiple of the page size
    pages            pixels, rows first, RGB; no image straddles two pages, page tails are zero
    table            one (sample, offset, size) an image, up to the end of the file

Shapes: N samples, H rows, W columns.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from resnet_ddp.exits import UserError

VERSION: Final = 2
PAGE_SIZE: Final = 8 << 20  # FFCV's default
MIN_PAGE_SIZE, MAX_PAGE_SIZE = 2 << 20, 4 << 30  # a power of two, the lower one included

_JPG, _RAW = 0, 1
_INT, _RGB = 1, 2

_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("table_offset", "<u8"),
    ]
)
_DESCRIPTOR = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
_IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("offset", "<u8")])
_BYTES = np.dtype([("offset", "<u8"), ("size", "<u8")])
_ALLOCATION = np.dtype([("sample", "<u8"), ("offset", "<u8"), ("size", "<u8")])

# What a field of each type puts into a sample's record: float, int, rgb, bytes, ndarray, json,
# tensor. Type 255 is the user's own, and its size is written nowhere.
_RECORD_PARTS = {
    0: np.dtype("<f8"),
    _INT: np.dtype("<i8"),
    _RGB: _IMAGE,
    3: _BYTES,
    4: np.dtype("<u8"),
    5: _BYTES,
    6: np.dtype("<u8"),
}


@dataclass(frozen=True)
class Layout:
    """Where everything lies in a file that holds one image and one int a sample.

    Attributes:
        num_samples: N.
        image_bytes: H * W * 3.
        page_size: bytes.
    """

    num_samples: int
    image_bytes: int
    page_size: int = PAGE_SIZE

    @property
    def images_per_page(self) -> int:
        """Whole images that fit into a page."""
        return self.page_size // self.image_bytes

    @property
    def data_offset(self) -> int:
        """Offset in bytes of the first page."""
        record = _record_dtype([_RGB, _INT])
        end = _HEADER.itemsize + 2 * _DESCRIPTOR.itemsize + self.num_samples * record.itemsize
        return _round_up(end, self.page_size)

    @property
    def table_offset(self) -> int:
        """Offset in bytes of the allocation table, right after the last page."""
        num_pages = _round_up(self.num_samples, self.images_per_page) // self.images_per_page
        return self.data_offset + num_pages * self.page_size

    @property
    def file_size(self) -> int:
        """Bytes."""
        return self.table_offset + self.num_samples * _ALLOCATION.itemsize

    def image_offsets(self) -> NDArray[np.int64]:
        """Offset in bytes of every image, (N,)."""
        page, place = np.divmod(np.arange(self.num_samples, dtype=np.int64), self.images_per_page)
        offsets: NDArray[np.int64] = (
            self.data_offset + page * self.page_size + place * self.image_bytes
        )
        return offsets


class _UnreadableError(Exception):
    """Why the bytes at hand are not a file this module reads."""


class MappedImages:
    """Images that stay in their file: `images[which]` copies some of them out of it.

    What was looked at lies in the page cache, which the system takes back when it needs room.

    Attributes:
        path: the .beton file.
        fields: the names of all its fields, in order.
        image_field, label_field: two of them.
        shape: (N, H, W, 3).
    """

    dtype: Final = np.dtype(np.uint8)

    def __init__(
        self,
        path: Path,
        fields: tuple[str, ...],
        image_field: str,
        label_field: str,
        mapped: NDArray[np.uint8],
        offsets: NDArray[np.int64],
        shape: tuple[int, int, int],
    ) -> None:
        self.path = path
        self.fields = fields
        self.image_field = image_field
        self.label_field = label_field
        self.shape = (len(offsets), *shape)
        self._offsets = offsets
        # A window at every byte costs nothing, and picking N of them needs no index matrix.
        self._windows = np.lib.stride_tricks.sliding_window_view(mapped, math.prod(shape))

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, which: slice | NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        """Return (n, H, W, 3), C-contiguous."""
        return self._windows[self._offsets[which]].reshape(-1, *self.shape[1:])


Images = NDArray[np.uint8] | MappedImages


def write_beton(
    path: str | os.PathLike[str],
    images: Images,
    labels: NDArray[np.integer[Any]],
    *,
    page_size: int = PAGE_SIZE,
) -> None:
    """Write images and labels as a .beton file and flush it to the disk.

    Beside the arguments it holds one page and 48 bytes a sample in memory.

    Args:
        path: the file; replaced if it is there. A failure leaves an incomplete file.
        images: (N, H, W, 3) uint8; they may lie in another such file.
        labels: (N,) of any integer type that int64 holds.
        page_size: bytes; a power of two of at least 2 MiB, less than 4 GiB, at least one image.

    Raises:
        ValueError: the arrays or the page size do not fit the format.
        OSError: the file cannot be written.
    """
    labels = np.asarray(labels)
    _check_arrays(images, labels, page_size)
    num_samples, height, width, _ = images.shape
    layout = Layout(num_samples, height * width * 3, page_size)
    with open(path, "wb") as file:
        for piece in (_head(layout, height, width, labels), _pages(images, layout), _table(layout)):
            for part in piece:
                file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _check_arrays(images: Images, labels: NDArray[np.integer[Any]], page_size: int) -> None:
    if images.dtype != np.uint8 or len(images.shape) != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be (N, H, W, 3) uint8, not {images.shape} {images.dtype}")
    num_samples, height, width, _ = images.shape
    if min(num_samples, height, width) < 1 or max(height, width) > 0xFFFF:
        raise ValueError(f"the format holds no images of shape {images.shape}")
    if labels.shape != (num_samples,) or not np.can_cast(labels.dtype, np.int64):
        raise ValueError(f"labels must be ({num_samples},) ints, not {labels.shape} {labels.dtype}")
    if not _is_page_size(page_size) or height * width * 3 > page_size:
        raise ValueError(f"{page_size} is no page size for images of {height * width * 3} bytes")


def _head(
    layout: Layout, height: int, width: int, labels: NDArray[np.integer[Any]]
) -> Iterator[bytes]:
    header = np.zeros((), _HEADER)
    header["version"], header["num_fields"] = VERSION, 2
    header["page_size"], header["num_samples"] = layout.page_size, layout.num_samples
    header["table_offset"] = layout.table_offset
    descriptors = np.zeros(2, _DESCRIPTOR)
    descriptors["type"], descriptors["name"] = (_RGB, _INT), (b"image", b"label")
    # Zeroed, not empty: the bytes between the two parts of a record belong to the file.
    records = np.zeros(layout.num_samples, _record_dtype([_RGB, _INT]))
    image = records["0"]
    image["mode"], image["width"], image["height"] = _RAW, width, height
    image["offset"] = layout.image_offsets()
    records["1"] = labels
    head = header.tobytes() + descriptors.tobytes()
    yield head
    yield records.tobytes()
    yield bytes(layout.data_offset - len(head) - records.nbytes)


def _pages(images: Images, layout: Layout) -> Iterator[bytes]:
    for first in range(0, layout.num_samples, layout.images_per_page):
        page = images[first : first + layout.images_per_page].tobytes()
        yield page
        yield bytes(layout.page_size - len(page))


def _table(layout: Layout) -> Iterator[bytes]:
    table = np.zeros(layout.num_samples, _ALLOCATION)
    table["sample"] = np.arange(layout.num_samples)
    table["offset"], table["size"] = layout.image_offsets(), layout.image_bytes
    yield table.tobytes()


def read_beton(path: str | os.PathLike[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read the images and labels of a .beton file, ours or FFCV's.

    The image and the label are the only rgb field and the only int field, whatever they are called
    and whatever other fields there are. Nothing in the file is believed before it was checked, and
    no more memory is taken than the file's own size.

    Returns:
        images (N, H, W, 3) uint8, C-contiguous, and labels (N,) int64.

    Raises:
        UserError: there is no such file, or it is damaged, or it holds something else.
    """
    images, labels = open_beton(path)
    return images[:], labels


def open_beton(path: str | os.PathLike[str]) -> tuple[MappedImages, NDArray[np.int64]]:
    """Check a .beton file as `read_beton` does, and leave its images where they are.

    Returns:
        images (N, H, W, 3), and labels (N,) int64.

    Raises:
        UserError: there is no such file, or it is damaged, or it holds something else.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; prepare the data again")
    try:
        if path.stat().st_size < _HEADER.itemsize:
            raise _UnreadableError("it is shorter than a .beton header")
        return _decode(path, np.memmap(path, np.uint8, mode="r"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); check it and its disk"
        ) from error
    except _UnreadableError as error:
        raise UserError(f"{path}: {error}; prepare the data again") from None


def _decode(path: Path, mapped: NDArray[np.uint8]) -> tuple[MappedImages, NDArray[np.int64]]:
    header = _items(mapped, 0, 1, _HEADER, "header")[0]
    if header["version"] != VERSION:
        older = f", but of {header['version']}" if header["version"] < VERSION else ""
        raise _UnreadableError(f"it is no .beton file of version {VERSION}{older}")
    num_samples, page_size = int(header["num_samples"]), int(header["page_size"])
    if num_samples == 0:
        raise _UnreadableError("it holds no samples")
    if not _is_page_size(page_size):
        raise _UnreadableError(f"it is damaged (page size {page_size})")

    types, names = _fields(mapped, int(header["num_fields"]))
    rgb, label = _only(_RGB, "rgb", types, names), _only(_INT, "int", types, names)
    start = _HEADER.itemsize + len(types) * _DESCRIPTOR.itemsize
    dtype = _record_dtype(types)
    records = _items(mapped, start, num_samples, dtype, "records")
    height, width = _image_shape(records[str(rgb)])
    data_start = _round_up(start + num_samples * dtype.itemsize, page_size)
    offsets = _image_offsets(
        mapped,
        records[str(rgb)]["offset"],
        size=height * width * 3,
        pages=range(data_start, int(header["table_offset"]), page_size),
    )
    shape = (height, width, 3)
    images = MappedImages(path, tuple(names), names[rgb], names[label], mapped, offsets, shape)
    return images, records[str(label)].astype(np.int64)


def _items(
    mapped: NDArray[np.uint8], start: int, count: int, dtype: np.dtype[Any], what: str
) -> NDArray[Any]:
    """View `count` items of the file, if it has them. Python's ints do not overflow."""
    if start + count * dtype.itemsize > mapped.size:
        raise _UnreadableError(f"it is damaged or cut short (its {what} would not fit into it)")
    return np.frombuffer(mapped, dtype, count, start)


def _fields(mapped: NDArray[np.uint8], num_fields: int) -> tuple[list[int], list[str]]:
    descriptors = _items(mapped, _HEADER.itemsize, num_fields, _DESCRIPTOR, "field descriptors")
    types = [int(kind) for kind in descriptors["type"]]
    names = [name.decode("ascii", "replace") for name in descriptors["name"]]
    for kind, name in zip(types, names, strict=True):
        if kind not in _RECORD_PARTS:
            raise _UnreadableError(f"its field {name!r} has the unknown type {kind}")
    return types, names


def _only(kind: int, called: str, types: list[int], names: list[str]) -> int:
    """Find the one field of a type."""
    found = [index for index, other in enumerate(types) if other == kind]
    if not found:
        raise _UnreadableError(f"it has no {called} field, only {_listed(names) or 'no field'}")
    if len(found) > 1:
        several = _listed([names[index] for index in found])
        raise _UnreadableError(f"it has several {called} fields ({several}) where one is expected")
    return found[0]


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:8]))


def _image_shape(images: NDArray[Any]) -> tuple[int, int]:
    """Check that all images are raw and of one size; return its (H, W)."""
    if (not_raw := np.flatnonzero(images["mode"] != _RAW)).size:
        if images["mode"][not_raw[0]] == _JPG:
            raise _UnreadableError(
                f"sample {not_raw[0]} is a jpg, as the write modes jpg, smart and proportion make "
                "them, which decodes differently from library to library; write it with "
                "write_mode='raw'"
            )
        raise _UnreadableError(f"it is damaged (the record of sample {not_raw[0]})")
    height, width = int(images["height"][0]), int(images["width"][0])
    differs = np.flatnonzero((images["height"] != height) | (images["width"] != width))
    if differs.size:
        other = images[differs[0]]
        raise _UnreadableError(
            f"its images differ in size (sample 0 is {width}x{height}, "
            f"sample {differs[0]} is {other['width']}x{other['height']})"
        )
    if height * width == 0:
        raise _UnreadableError("it is damaged (images without pixels)")
    return height, width


def _image_offsets(
    mapped: NDArray[np.uint8], recorded: NDArray[np.uint64], *, size: int, pages: range
) -> NDArray[np.int64]:
    """Check every image's offset against the pages and the allocation table.

    That no two images overlap is what bounds the memory for them by the file's size.
    """
    if int(recorded.min()) < pages.start or int(recorded.max()) + size > pages.stop:
        raise _UnreadableError("it is damaged (an image would lie outside its pages)")
    table_size = mapped.size - pages.stop
    if table_size < 0 or table_size % _ALLOCATION.itemsize:
        raise _UnreadableError("it is damaged or cut short (its allocation table is incomplete)")
    offsets = recorded.astype(np.int64)
    if np.any(offsets // pages.step != (offsets + size - 1) // pages.step):
        raise _UnreadableError("it is damaged (an image would straddle two pages)")
    if np.any(np.diff(np.sort(offsets)) < size):
        raise _UnreadableError("it is damaged (two images overlap)")

    count = table_size // _ALLOCATION.itemsize
    table = _items(mapped, pages.stop, count, _ALLOCATION, "allocation table")
    if count == 0 or int(table["sample"].max()) >= len(offsets):
        raise _UnreadableError("it is damaged (its header and its allocation table disagree)")
    # Other fields allocate too, and an empty one at the very place of the next image.
    table = table[table["size"] == size]
    table = table[np.argsort(table["offset"])]
    entry = np.searchsorted(table["offset"], recorded)
    if entry.max() >= len(table) or np.any(
        (table["offset"][entry] != recorded) | (table["sample"][entry] != np.arange(len(offsets)))
    ):
        raise _UnreadableError("it is damaged (its records and its allocation table disagree)")
    return offsets


def _record_dtype(types: list[int]) -> np.dtype[Any]:
    # Named by position: FFCV allows any names. Aligned, as FFCV does it.
    parts = [(str(index), _RECORD_PARTS[kind]) for index, kind in enumerate(types)]
    return np.dtype(parts, align=True)


def _is_page_size(page_size: int) -> bool:
    return MIN_PAGE_SIZE <= page_size < MAX_PAGE_SIZE and page_size.bit_count() == 1


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
