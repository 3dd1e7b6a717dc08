"""Folders and archives of images: same data, same hash; anything odd refused and nothing left."""

from __future__ import annotations

import io
import lzma
import os
import stat
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from resnet_ddp import archives, beton, sources
from resnet_ddp.beton import write_beton
from resnet_ddp.cli import main
from resnet_ddp.datasets import load_dataset
from resnet_ddp.exits import UserError
from resnet_ddp.sources import prepare_beton, prepare_folder


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(write_beton.__kwdefaults__, "page_size", beton.MIN_PAGE_SIZE)


def png(seed: int, size: tuple[int, int] = (32, 32), mode: str = "RGB", kind: str = "PNG") -> bytes:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], channels), np.uint8)
    buffer = io.BytesIO()
    Image.frombytes(mode, size, pixels.tobytes()).save(buffer, kind)
    return buffer.getvalue()


def images() -> dict[str, bytes]:
    """Two classes, 11 training and 2 test images each."""
    found, seed = {}, 0
    for split, count in (("train", 11), ("test", 2)):
        for class_name in ("cat", "dog"):
            for index in range(count):
                seed += 1
                found[f"{split}/{class_name}/{index}.png"] = png(seed)
    return found


def folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def tar(path: Path, files: dict[str, bytes], mode: str = "w", extra: Any = ()) -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return path


def zipped(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def special(name: str, kind: bytes, target: str = "train/cat/0.png") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def refused(source: Path, message: str) -> str:
    """Assert that a source is refused, briefly, and that nothing is left behind."""
    target = source.parent / "target"
    with pytest.raises(UserError, match=message) as caught:
        prepare_folder(source, target, progress=False)
    assert str(caught.value).count("\n") <= 1
    assert str(caught.value).isprintable()
    assert str(source) in str(caught.value)
    assert not [path for path in source.parent.iterdir() if "target" in path.name]
    return str(caught.value)


def test_folder(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", images())
    line = prepare_folder(source, tmp_path / "tiny")
    dataset = load_dataset(tmp_path / "tiny")
    assert line == (
        f"{tmp_path / 'tiny'}: 22 training and 4 test images in 2 classes, "
        f"sha256 {dataset.sha256[:12]}..."
    )
    assert (dataset.name, dataset.classes) == ("tiny", ("cat", "dog"))
    assert dataset.source == "images in 'source'"
    assert dataset.train_labels.tolist() == [0] * 11 + [1] * 11
    assert dataset.test_labels.tolist() == [0, 0, 1, 1]
    # 2 comes before 10.
    for index in range(11):
        with Image.open(source / f"train/cat/{index}.png") as image:
            assert np.array_equal(dataset.train_images[index], np.asarray(image))


def test_every_kind_of_archive_gives_the_same_dataset(tmp_path: Path) -> None:
    files = images()
    backwards = dict(reversed(files.items()))
    below = {f"./cifar10/{name}": data for name, data in files.items()}
    junk = {"README.md": b"x", "__MACOSX/train/cat/._0.png": b"x", "train/.DS_Store": b"x",
            "train/cat/Thumbs.db": b"x", "train/cat/._0.png": b"x"}  # fmt: skip
    found = [
        folder(tmp_path / "folder", files | junk),
        folder(tmp_path / "enclosed", {f"cifar10/{name}": data for name, data in files.items()}),
        tar(tmp_path / "a.tar", backwards | junk),
        tar(tmp_path / "a.tar.gz", below, "w:gz"),
        tar(tmp_path / "a.tgz", files, "w:gz"),
        tar(tmp_path / "a.tar.xz", files, "w:xz"),
        tar(tmp_path / "a.tar.bz2", backwards, "w:bz2"),
        zipped(tmp_path / "a.zip", below | {"__MACOSX/._cifar10": b"x"}),
        zipped(tmp_path / "b.zip", backwards | junk, zipfile.ZIP_LZMA),
        zipped(tmp_path / "c.zip", {k.replace("/", "\\"): v for k, v in files.items()}),
    ]
    hashes = set()
    for index, source in enumerate(found):
        prepare_folder(source, tmp_path / f"out{index}", name="x", progress=False)
        hashes.add(load_dataset(tmp_path / f"out{index}").sha256)
    assert len(hashes) == 1


def test_jpegs_are_decoded(tmp_path: Path) -> None:
    files = {
        f"{split}/{name}/0.JPG": png(1, kind="JPEG") for split in ("train", "test") for name in "ab"
    }
    prepare_folder(folder(tmp_path / "source", files), tmp_path / "out", progress=False)
    assert load_dataset(tmp_path / "out").train_images.shape == (2, 32, 32, 3)


def test_natural_order() -> None:
    names = [
        "b2.png",
        "10.png",
        "2.png",
        "02.png",
        "a.png",
        "b10.png",
        "9" * 5000 + ".png",
        "1.png",
    ]
    assert sorted(names, key=sources._natural) == [
        "1.png", "02.png", "2.png", "10.png", "9" * 5000 + ".png", "a.png", "b2.png", "b10.png",
    ]  # fmt: skip


@pytest.mark.parametrize("packed", [True, False])
def test_a_repetition_decodes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    pack = tar if packed else folder
    source = pack(tmp_path / "a", images())
    first = prepare_folder(source, tmp_path / "out", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_pixels", lambda *_: pytest.fail("decoded again"))
        again = prepare_folder(source, tmp_path / "out", progress=False)
    assert again == f"{first} (already prepared)"


def test_a_repetition_notices_a_damaged_target(tmp_path: Path) -> None:
    source = tar(tmp_path / "a.tar", images())
    prepare_folder(source, tmp_path / "out", progress=False)
    (tmp_path / "out" / "train.beton").write_bytes(b"")
    with pytest.raises(UserError, match="prepare the data again"):
        prepare_folder(source, tmp_path / "out", progress=False)


def test_another_source_of_the_same_images_is_welcome_and_of_others_is_not(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", images())
    first = prepare_folder(source, tmp_path / "out", progress=False)
    os.utime(source / "train/cat/0.png")
    assert prepare_folder(source, tmp_path / "out", progress=False) == first
    other = images() | {"train/cat/0.png": png(99)}
    with pytest.raises(UserError, match="already holds another dataset"):
        prepare_folder(tar(tmp_path / "b.tar", other), tmp_path / "out", progress=False)
    assert load_dataset(tmp_path / "out").sha256[:12] in first


def test_a_target_with_other_files_is_refused_before_decoding(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", images())
    with pytest.raises(UserError, match="holds other files"):
        prepare_folder(source, source)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        prepare_folder(source, tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        prepare_folder(source, tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(1, (28, 28)), "is 28x28 RGB, not 32x32 RGB"),
        (png(1, (32, 33)), "is 32x33 RGB"),
        (png(1, mode="L"), "is 32x32 L, not"),
        (png(1, mode="RGBA"), "is 32x32 RGBA"),
        (png(1, mode="CMYK", kind="JPEG"), "is 32x32 CMYK"),
        (png(1, kind="BMP"), "damaged or no image"),
        (png(1, kind="GIF"), "damaged or no image"),
        (png(1)[:-200], "damaged or no image"),
        (png(1, kind="JPEG")[:300], "damaged or no image"),
        (png(1)[:20], "damaged or no image"),
        (b"", "damaged or no image"),
        (b"not an image", "damaged or no image"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_an_unfit_image_is_named(tmp_path: Path, data: bytes, message: str, packed: bool) -> None:
    files = images() | {"train/dog/3.png": data}
    source = tar(tmp_path / "a.tar", files) if packed else folder(tmp_path / "a", files)
    assert "'train/dog/3.png'" in refused(source, message)


def chunks(width: int, height: int, depth: int, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG put together by hand."""
    row = b"\0" + bytes(width * 3 * depth // 8)
    head = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    pixels = zlib.compress(row * min(height, 32))
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", head), *more, (b"IDAT", pixels), (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(kind + body))
        data += struct.pack(">I", len(body)) + kind + body + check
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (chunks(60_000, 60_000, 8), "far larger than 32x32"),
        (chunks(10_000, 10_000, 8), "far larger than 32x32"),
        (chunks(32, 32, 16), "is 32x32 RGB of 16 bits"),
        (chunks(32, 32, 8, (b"tRNS", bytes(6))), "is 32x32 RGB with transparency"),
        (
            chunks(32, 32, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 24)))),
            "damaged or no image",
        ),
    ],
)
def test_bombs_and_silent_losses_within_an_image(tmp_path: Path, data: bytes, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as for a user: no filter of pytest's
        refused(zipped(tmp_path / "a.zip", images() | {"test/cat/1.png": data}), message)
    assert chunks(32, 32, 8) != data


def test_a_plain_handmade_png_is_accepted(tmp_path: Path) -> None:
    files = images() | {"test/cat/1.png": chunks(32, 32, 8)}
    prepare_folder(zipped(tmp_path / "a.zip", files), tmp_path / "out", progress=False)
    assert not load_dataset(tmp_path / "out").test_images[1].any()


def without(*starts: str) -> dict[str, bytes]:
    return {name: data for name, data in images().items() if not name.startswith(starts)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no train images"),
        ({"0.png": png(1), "readme.txt": b"x"}, "holds no train images"),
        (without("test/"), "holds no test images"),
        (without("train/"), "holds no train images"),
        (without("test/dog"), "'test/dog' holds no images"),
        (without("train/dog"), "'train/dog' holds no images"),
        (without("train/dog", "test/dog"), "'cat' is the only class"),
        (images() | {"train/1.png": png(1)}, "'train/1.png' is not where images are expected"),
        (images() | {"train/cat/old/1.png": png(1)}, "is not where images are expected"),
        (images() | {"train/cat/labels.csv": b"x"}, r"is no .png or .jpg"),
        (images() | {"train/cat/1.webp": b"x"}, r"is no .png or .jpg"),
        (images() | {"again/train/cat/1.png": png(1)}, "images lie below both '.' and 'again'"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_half_and_misplaced_data_is_refused(
    tmp_path: Path, files: dict[str, bytes], message: str, packed: bool
) -> None:
    if packed:
        source = zipped(tmp_path / "a.zip", files)
    else:
        (tmp_path / "a").mkdir()
        source = folder(tmp_path / "a", files)
    refused(source, message)


def test_an_empty_class_folder_is_refused(tmp_path: Path) -> None:
    message = "'train/eel' holds no images"
    source = folder(tmp_path / "a", images())
    (source / "train" / "eel").mkdir()
    refused(source, message)
    refused(
        tar(tmp_path / "a.tar", images(), extra=[special("train/eel", tarfile.DIRTYPE)]), message
    )
    refused(zipped(tmp_path / "a.zip", images() | {"train/eel/": b""}), message)


@pytest.mark.parametrize(
    "name", ["../x.png", "train/../../x.png", "/train/cat/x.png", "/etc/passwd"]
)
def test_paths_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    for pack in (tar, zipped):
        refused(pack(tmp_path / "archive", images() | {name: png(1)}), "leads out of the archive")
    refused(zipped(tmp_path / "b", images() | {name.replace("/", "\\"): png(1)}), "leads out")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, "is a link, not an image"),
        (tarfile.LNKTYPE, "is a link, not an image"),
        (tarfile.FIFOTYPE, "is a special file"),
        (tarfile.CHRTYPE, "is a special file"),
    ],
)
def test_links_and_devices_are_refused_where_they_matter(
    tmp_path: Path, kind: bytes, message: str
) -> None:
    for name in ("train/cat/99.png", "train/eel", "top/train"):
        refused(tar(tmp_path / "a.tar", images(), extra=[special(name, kind)]), message)
    source = tar(tmp_path / "b.tar", images(), extra=[special("latest", kind)])
    assert "22 training" in prepare_folder(source, tmp_path / "out", progress=False)


def test_links_in_a_zip_are_refused(tmp_path: Path) -> None:
    source = zipped(tmp_path / "a.zip", images())
    info = zipfile.ZipInfo("train/cat/99.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(source, "a") as archive:
        archive.writestr(info, "0.png")
    refused(source, "is a link")


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    source = tar(tmp_path / "a.tar", images())
    with tarfile.open(source, "a") as archive:
        info = tarfile.TarInfo("train/cat/0.png")
        info.size = len(png(5))
        archive.addfile(info, io.BytesIO(png(5)))
    refused(source, "'train/cat/0.png' is in it twice")


def test_bombs_are_refused_by_size_and_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = images() | {"train/cat/big.png": bytes(5 << 20)}
    for pack in (tar, zipped):
        refused(pack(tmp_path / "a", big), "'train/cat/big.png' has 5,242,880 bytes, too many")
    refused(tar(tmp_path / "a.tar.xz", big, "w:xz"), "too many")
    refused(folder(tmp_path / "f", big), "too many")
    refused(tar(tmp_path / "b", images() | {"padding.bin": bytes(5 << 20)}, "w:xz"), "too many")
    monkeypatch.setattr(archives, "MAX_TOTAL_BYTES", 50_000)
    for pack in (tar, zipped, folder):
        refused(pack(tmp_path / f"{pack.__name__}-total", images()), "unpacks to more than")
    monkeypatch.setattr(archives, "MAX_TOTAL_BYTES", 1 << 30)
    monkeypatch.setattr(archives, "MAX_FILES", 20)
    for pack in (tar, zipped, folder):
        refused(pack(tmp_path / f"{pack.__name__}-files", images()), "more than 20 files")


def test_a_gigabyte_of_tar_header_is_not_read_into_memory(tmp_path: Path) -> None:
    """150 kB that unpack to a pax header of 1 GB; tarfile alone would keep all of it."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 30
    compressor = lzma.LZMACompressor(preset=0)
    with open(tmp_path / "a.tar.xz", "wb") as file:
        file.write(compressor.compress(header.tobuf()))
        for _ in range(64):
            file.write(compressor.compress(bytes(1 << 20)))
        file.write(compressor.flush())
    refused(tmp_path / "a.tar.xz", "headers of absurd size")


def test_a_zip_that_lies_about_sizes_is_refused(tmp_path: Path) -> None:
    source = zipped(tmp_path / "a.zip", images() | {"train/cat/big.png": bytes(5 << 20)})
    content = source.read_bytes().replace(struct.pack("<I", 5 << 20), struct.pack("<I", 3000))
    source.write_bytes(content)
    refused(source, "damaged")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2", "zip"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.7, 0.995])
def test_an_archive_cut_short_is_refused(tmp_path: Path, mode: str, kept: float) -> None:
    source = tmp_path / "archive"
    if mode == "zip":
        zipped(source, images())
    else:
        tar(source, images(), mode)
    content = source.read_bytes().rstrip(b"\0") if mode == "w" else source.read_bytes()
    source.write_bytes(content[: int(len(content) * kept)])
    refused(source, "damaged")


def test_a_tar_cut_between_two_members_is_refused(tmp_path: Path) -> None:
    """tarfile takes that for the end of the archive, and the rest would silently be missing."""
    source = tar(tmp_path / "a.tar", images())
    with tarfile.open(source) as archive:
        cut = archive.getmembers()[-1].offset
    source.write_bytes(source.read_bytes()[:cut])
    refused(source, "cut short")


def test_a_tar_with_a_damaged_header_in_the_middle_is_refused(tmp_path: Path) -> None:
    source = tar(tmp_path / "a.tar", images())
    with tarfile.open(source) as archive:
        place = archive.getmembers()[-2].offset
    content = bytearray(source.read_bytes())
    content[place + 5] ^= 1
    source.write_bytes(content)
    refused(source, "cut short or not a tar: bad checksum")


@pytest.mark.parametrize("content", [b"", b"Rar!\x1a\x07", b"PK\x03\x04", b"\x1f\x8b", png(1)])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "thing"
    source.write_bytes(content)
    refused(source, "is damaged, or no folder")


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "none.tar", "no such file or folder")


def test_names_that_would_play_with_the_terminal_are_escaped(tmp_path: Path) -> None:
    files = images() | {"train/cat/\x1b[2J\n.png": b"x"}
    assert "\\x1b[2J\\n.png" in refused(tar(tmp_path / "a.tar", files), "damaged or no image")
    files = {name.replace("cat", "c\nat"): data for name, data in images().items()}
    with pytest.raises(UserError, match="printable"):
        prepare_folder(tar(tmp_path / "b.tar", files), tmp_path / "out", progress=False)


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    source = tar(tmp_path / "a.tar.gz", images(), "w:gz")
    monkeypatch.setattr(sources, "_pixels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_folder(source, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


def test_no_output_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_folder(tar(tmp_path / "a.tar", images()), tmp_path / "out")
    assert capsys.readouterr() == ("", "")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(["w", "w:gz", "w:xz", "zip"]),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=5),
)
def test_mutated_archives_raise_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, kind: str, edits: list[tuple[float, int]]
) -> None:
    directory = tmp_path_factory.mktemp("fuzz")
    small = {name: data for name, data in images().items() if name.endswith(("/0.png", "/1.png"))}
    source = directory / "archive"
    if kind == "zip":
        zipped(source, small)
    else:
        tar(source, small, kind)
    content = bytearray(source.read_bytes())
    for place, value in edits:
        content[int(place * (len(content) - 1))] = value
    source.write_bytes(content)
    try:
        prepare_folder(source, directory / "out", progress=False)
    except UserError as error:
        assert str(directory) in str(error)
        assert not (directory / "out").exists()


def test_importing_needs_neither_torch_nor_pillow() -> None:
    code = (
        "import sys, resnet_ddp.sources; print(sorted({'torch', 'PIL', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def betons(tmp_path: Path) -> Path:
    folder = tmp_path / "betons"
    folder.mkdir()
    for split, count in (("train", 30), ("test", 20)):
        write_beton(folder / f"{split}.beton", *some_images(count))
    return folder


def some_images(count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), np.uint8)
    return images, np.arange(count) % 3


def test_beton_files_become_a_prepared_directory(
    betons: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prepare", "beton", "--from", str(betons), "--to", str(tmp_path / "mine")]
    assert main(arguments) == 0
    assert "30 training and 20 test images in 3 classes" in capsys.readouterr().out
    data = load_dataset(tmp_path / "mine")
    assert (data.name, data.classes) == ("mine", ("0", "1", "2"))
    for images, labels, count in (
        (data.train_images, data.train_labels, 30),
        (data.test_images, data.test_labels, 20),
    ):
        assert np.array_equal(images[:], some_images(count)[0])
        assert np.array_equal(labels, some_images(count)[1])
    assert main(arguments) == 0  # the same again


def test_classes_of_beton_files_may_have_names(betons: Path, tmp_path: Path) -> None:
    (betons / "classes.txt").write_text("cat\ndog\nmüde Maus\n")
    prepare_beton(betons, tmp_path / "mine")
    assert load_dataset(tmp_path / "mine").classes == ("cat", "dog", "müde Maus")


@pytest.mark.parametrize(
    ("names", "label", "message"),
    [
        (None, 2**60, "labels go up to 1152921504606846976"),
        (b"cat\ndog\n", 2, "labels run from 0 to 2, but there are 2 classes"),
        (b"\xff\xfe", 2, "cannot be read as text"),
        (None, -1, "labels run from -1 to 2"),
    ],
)
def test_unfit_labels_of_beton_files(
    betons: Path, tmp_path: Path, names: bytes | None, label: int, message: str
) -> None:
    images, labels = some_images(30)
    labels[7] = label
    write_beton(betons / "train.beton", images, labels)
    if names is not None:
        (betons / "classes.txt").write_bytes(names)
    with pytest.raises(UserError, match=message):
        prepare_beton(betons, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_missing_and_large_betons_are_refused(betons: Path, tmp_path: Path) -> None:
    images = np.zeros((30, 48, 48, 3), np.uint8)
    write_beton(betons / "train.beton", images, np.arange(30) % 3)
    with pytest.raises(UserError, match="train images are 48x48x3 uint8, not 32x32x3"):
        prepare_beton(betons, tmp_path / "mine")
    (betons / "test.beton").unlink()
    with pytest.raises(UserError, match=r"test\.beton: no such file"):
        prepare_beton(betons, tmp_path / "mine")
    assert main(["prepare", "beton", "--to", str(tmp_path / "mine")]) == 2
