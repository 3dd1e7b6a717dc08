"""The .beton format: literal bytes, round trips, and refusal of anything else."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from resnet_ddp import beton
from resnet_ddp.beton import Layout, read_beton, write_beton
from resnet_ddp.exits import UserError

PAGE = 2 << 20  # the smallest that the format allows
HEAD = 24 + 2 * 1041


def samples(count: int, height: int = 32, width: int = 32) -> tuple[NDArray[Any], NDArray[Any]]:
    generator = np.random.default_rng(count)
    images = generator.integers(0, 256, (count, height, width, 3), np.uint8)
    return images, generator.integers(-5, 1 << 40, count)


def foreign_file(
    path: Path,
    types: list[int],
    images: NDArray[Any],
    labels: NDArray[Any],
    mode: int = 1,
    names: list[str] | None = None,
) -> Path:
    """Write a file of any fields, sample by sample, as another implementation would."""
    parts = {0: "d", 1: "q", 2: None, 3: "QQ", 4: "Q", 5: "QQ", 6: "Q"}
    record, places = b"", []
    for kind in types:
        packed = struct.calcsize("<BHHQ") if kind == 2 else struct.calcsize("<" + parts[kind])
        if kind in (0, 1, 4, 6):
            record += bytes(-len(record) % 8)
        places.append(len(record))
        record += bytes(packed)
    if set(types) & {0, 1, 4, 6}:
        record += bytes(-len(record) % 8)
    size = images[0].nbytes
    start = 24 + 1041 * len(types)
    data = -(-(start + len(record) * len(images)) // PAGE) * PAGE
    order = np.random.default_rng(0).permutation(len(images))  # as several workers would
    table_offset = data + PAGE
    content = bytearray(table_offset + 24 * len(images))
    struct.pack_into("<HHIQQ", content, 0, 2, len(types), PAGE, len(images), table_offset)
    for index, kind in enumerate(types):
        name = (names or [f"field{i}" for i in range(len(types))])[index]
        struct.pack_into("<B16s", content, 24 + 1041 * index, kind, name.encode())
    for slot, sample in enumerate(order):
        offset = data + slot * size
        content[offset : offset + size] = images[sample].tobytes()
        struct.pack_into("<QQQ", content, table_offset + 24 * slot, sample, offset, size)
        for kind, place in zip(types, places, strict=True):
            at = start + len(record) * int(sample) + place
            if kind == 1:
                struct.pack_into("<q", content, at, labels[sample])
            if kind == 2:
                height, width = images.shape[1:3]
                struct.pack_into("<BHHQ", content, at, mode, width, height, offset)
    path.write_bytes(content)
    return path


def test_header_descriptors_records_and_table_are_the_formats(tmp_path: Path) -> None:
    images, labels = samples(3, height=4, width=5)
    write_beton(tmp_path / "a.beton", images, labels, page_size=PAGE)
    content = (tmp_path / "a.beton").read_bytes()

    assert struct.unpack_from("<HHIQQ", content) == (2, 2, PAGE, 3, 2 * PAGE)
    assert content[24:41] == b"\x02image".ljust(17, b"\0")
    assert content[1065:1082] == b"\x01label".ljust(17, b"\0")
    assert not any(content[41:1065])
    assert not any(content[1082:HEAD])
    for index in range(3):
        record = struct.unpack_from("<BHHQ3xq", content, HEAD + 24 * index)
        assert record == (1, 5, 4, PAGE + 60 * index, labels[index])
        allocation = struct.unpack_from("<QQQ", content, 2 * PAGE + 24 * index)
        assert allocation == (index, PAGE + 60 * index, 60)
        assert content[PAGE + 60 * index :][:60] == images[index].tobytes()
    assert not any(content[HEAD + 72 : PAGE])
    assert not any(content[PAGE + 180 : 2 * PAGE])
    assert len(content) == 2 * PAGE + 72


def test_cifar_10_has_the_size_that_ffcv_writes() -> None:
    train, test = Layout(50_000, 3072), Layout(10_000, 3072)
    assert train.images_per_page == 2730
    assert (train.data_offset, train.table_offset) == (8 << 20, 160 << 20)
    assert train.file_size == 168_972_160
    assert test.file_size == 42_183_040
    assert train.image_offsets()[[0, 2729, 2730]].tolist() == [8388608, 16772096, 16777216]


def test_no_image_straddles_pages_and_page_tails_are_zero(tmp_path: Path) -> None:
    images, labels = samples(7, height=500, width=500)  # 750,000 bytes: two a page
    write_beton(tmp_path / "a.beton", images, labels, page_size=PAGE)
    content = (tmp_path / "a.beton").read_bytes()
    for page in range(1, 5):
        used = 750_000 if page == 4 else 1_500_000
        assert any(content[page * PAGE :][:used])
        assert not any(content[page * PAGE + used : (page + 1) * PAGE])
    assert len(content) == Layout(7, 750_000, PAGE).file_size == 5 * PAGE + 168
    read_images, read_labels = read_beton(tmp_path / "a.beton")
    assert np.array_equal(read_images, images)
    assert np.array_equal(read_labels, labels)


def test_an_exactly_full_last_page_is_followed_by_none() -> None:
    assert Layout(2730, 3072).table_offset == 16 << 20
    assert Layout(2731, 3072).table_offset == 24 << 20


@pytest.mark.parametrize("count", [1, 2, 683])  # 683: one more than a page of 2 MiB holds
def test_round_trip(tmp_path: Path, count: int) -> None:
    images, labels = samples(count)
    write_beton(tmp_path / "a.beton", images, labels, page_size=PAGE)
    read_images, read_labels = read_beton(tmp_path / "a.beton")
    assert np.array_equal(read_images, images)
    assert np.array_equal(read_labels, labels)
    assert (read_images.dtype, read_labels.dtype) == (np.uint8, np.int64)
    assert type(read_images) is np.ndarray
    assert read_images.flags.c_contiguous
    assert read_images.flags.writeable


def test_writing_accepts_strided_arrays_and_small_ints(tmp_path: Path) -> None:
    images, _ = samples(6)
    write_beton(tmp_path / "a.beton", images[::-2], np.array([3, 1, 2], np.uint8))
    read_images, read_labels = read_beton(tmp_path / "a.beton")
    assert np.array_equal(read_images, images[::-2])
    assert read_labels.tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("images", "labels", "page_size"),
    [
        (np.zeros((0, 32, 32, 3), np.uint8), np.zeros(0, int), PAGE),
        (np.zeros((2, 32, 32, 3), np.float32), np.zeros(2, int), PAGE),
        (np.zeros((2, 32, 32), np.uint8), np.zeros(2, int), PAGE),
        (np.zeros((2, 32, 32, 3), np.uint8), np.zeros(3, int), PAGE),
        (np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2), PAGE),
        (np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2, np.uint64), PAGE),
        (np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2, int), PAGE + 1),
        (np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2, int), PAGE // 2),
        (np.zeros((1, 1000, 1000, 3), np.uint8), np.zeros(1, int), PAGE),
    ],
)
def test_writing_refuses_what_the_format_cannot_hold(
    tmp_path: Path, images: NDArray[Any], labels: NDArray[Any], page_size: int
) -> None:
    with pytest.raises(ValueError, match=r"must be|no images|no page size"):
        write_beton(tmp_path / "a.beton", images, labels, page_size=page_size)
    assert not (tmp_path / "a.beton").exists()


@pytest.mark.parametrize("types", [[2, 1], [1, 2], [0, 2, 3, 1], [5, 4, 1, 6, 2], [3, 2, 1]])
def test_fields_are_found_by_type(tmp_path: Path, types: list[int]) -> None:
    images, labels = samples(9)
    read_images, read_labels = read_beton(foreign_file(tmp_path / "a.beton", types, images, labels))
    assert np.array_equal(read_images, images)
    assert np.array_equal(read_labels, labels)


@pytest.mark.parametrize(
    ("types", "mode", "message"),
    [
        ([2], 1, "no int field, only 'field0'"),
        ([1, 0], 1, "no rgb field, only 'field0', 'field1'"),
        ([2, 1, 1], 1, r"several int fields \('field1', 'field2'\)"),
        ([2, 1, 2], 1, r"several rgb fields \('field0', 'field2'\)"),
        ([2, 1], 0, "sample 0 is a jpg"),
        ([2, 1], 9, "record of sample 0"),
    ],
)
def test_other_fields_are_refused_by_name(
    tmp_path: Path, types: list[int], mode: int, message: str
) -> None:
    path = foreign_file(tmp_path / "a.beton", types, *samples(2), mode=mode)
    with pytest.raises(UserError, match=message) as caught:
        read_beton(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("beton") / "intact.beton"
    write_beton(path, *samples(5), page_size=PAGE)
    return path


SIZE = 2 * PAGE + 5 * 24


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (0, "<H", 1, "no .beton file of version 2"),
        (2, "<H", 0, "no rgb field, only no field"),
        (2, "<H", 65535, "field descriptors"),
        (4, "<I", 0, "page size 0"),
        (4, "<I", 3 << 20, "page size"),
        (8, "<Q", 0, "no samples"),
        (8, "<Q", 4, "disagree"),
        (8, "<Q", 6, "sample 5 is a jpg"),
        (8, "<Q", 2**64 - 1, "records would not fit"),
        (8, "<Q", 10**11, "records would not fit"),
        (16, "<Q", SIZE, "disagree"),
        (16, "<Q", SIZE + 24, "incomplete"),
        (16, "<Q", 2**64 - 24, "incomplete"),
        (16, "<Q", PAGE, "outside its pages"),
        (24, "<B", 255, "unknown type 255"),
        (HEAD + 1, "<H", 0, "differ in size"),
        (HEAD + 25, "<H", 31, "sample 0 is 32x32, sample 1 is 31x32"),
        (HEAD + 5, "<Q", 2**64 - 1, "outside its pages"),
        (HEAD + 5, "<Q", 0, "outside its pages"),
        (HEAD + 5, "<Q", PAGE + 1, "overlap"),
        (HEAD + 5, "<Q", PAGE + 9 * 3072, "disagree"),
        (2 * PAGE, "<Q", 1, "disagree"),
        (2 * PAGE, "<Q", 2**63, "disagree"),
        (2 * PAGE + 16, "<Q", 3071, "disagree"),
    ],
)
def test_damage_is_named(
    intact: Path, tmp_path: Path, offset: int, layout: str, value: int, message: str
) -> None:
    content = bytearray(intact.read_bytes())
    struct.pack_into(layout, content, offset, value)
    path = tmp_path / "damaged.beton"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_beton(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith("prepare the data again")


@pytest.mark.parametrize("size", [0, 1, 23, 24, 1065, HEAD, HEAD + 119, PAGE, SIZE - 24, SIZE - 1])
def test_a_file_cut_short_is_refused(intact: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "short.beton"
    path.write_bytes(intact.read_bytes()[:size])
    with pytest.raises(UserError, match="prepare the data again"):
        read_beton(path)


def test_missing_file_and_directory_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.beton", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            read_beton(path)


# The places that matter: header, both descriptors' first bytes, records, first pixels, table.
PLACES = [*range(42), *range(1065, 1082), *range(HEAD, HEAD + 122), *range(2 * PAGE, SIZE)]


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    edits=st.lists(st.tuples(st.sampled_from(PLACES), st.integers(0, 255)), max_size=4),
    size=st.one_of(st.just(SIZE), st.integers(0, SIZE)),
)
def test_mutated_files_are_refused_or_read_alike(
    intact: Path, edits: list[tuple[int, int]], size: int
) -> None:
    original = intact.read_bytes()
    images, labels = samples(5)
    try:
        with open(intact, "r+b") as file:
            for place, value in edits:
                file.seek(place)
                file.write(bytes([value]))
            file.truncate(size)
        read_images, read_labels = read_beton(intact)
        # A record and its entry in the table can be changed alike: that is another, valid file.
        regions = {place >= 2 * PAGE for place, _ in edits if place >= HEAD}
        assert len(regions) == 2 or np.array_equal(read_images, images)
        assert (read_images.ndim, read_images.dtype, len(read_labels)) == (4, np.uint8, 5)
        # A label has nothing in this format to check it against.
        touched = {(place - HEAD) // 24 for place, _ in edits if (place - HEAD) % 24 >= 16}
        kept = [index for index in range(5) if index not in touched]
        assert np.array_equal(read_labels[kept], labels[kept])
    except UserError:
        pass  # as good an answer
    finally:
        with open(intact, "r+b") as file:
            file.truncate(SIZE)
            for start, stop in ((0, PAGE + 3072), (2 * PAGE, SIZE)):
                file.seek(start)
                file.write(original[start:stop])
            if size < 2 * PAGE:
                file.seek(0)
                file.write(original)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=3000))
def test_arbitrary_bytes_are_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("beton") / "noise.beton"
    path.write_bytes(content)
    with pytest.raises(UserError):
        read_beton(path)


def test_many_images_that_share_pixels_are_refused(tmp_path: Path) -> None:
    """Else a small file of N records on one big image would take N times its memory."""
    path = foreign_file(tmp_path / "a.beton", [2, 1], *samples(40))
    content = bytearray(path.read_bytes())
    for index in range(40):
        struct.pack_into("<Q", content, HEAD + 24 * index + 5, PAGE)
        struct.pack_into("<QQQ", content, 2 * PAGE + 24 * index, index, PAGE, 3072)
    path.write_bytes(content)
    with pytest.raises(UserError, match="two images overlap"):
        read_beton(path)


def test_the_default_page_is_ffcvs() -> None:
    assert beton.PAGE_SIZE == 8_388_608
    assert Layout(1, 3072).page_size == 8_388_608
