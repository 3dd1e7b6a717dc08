"""Folders and archives, read member by member; archives are never unpacked.

An archive may come from anywhere: what lies outside its root, links, and whatever unpacks to more
than a dataset of 32x32 images could need is refused.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, Self

from resnet_ddp.exits import UserError

MAX_FILES = 1_000_000
MAX_TOTAL_BYTES = 4 << 30
MAX_TAR_HEADERS = 1 << 20  # bytes of headers for one member; tarfile keeps them in memory

# What tarfile, zipfile and the decompressors raise on damaged input. RuntimeError: an encrypted
# zip, an unknown method of compression, headers nested beyond all measure.
_DAMAGE = (
    OSError,
    EOFError,
    MemoryError,
    RuntimeError,
    ValueError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
)


class Member(NamedTuple):
    """A file, directory or link of a source. `done`: fraction of the source read so far."""

    path: PurePosixPath
    kind: str  # "file", "directory", or what else it is
    data: bytes
    done: float


@dataclass(frozen=True)
class Wanted:
    """Which members to read; the others are listed without their data.

    Attributes:
        matches: whether a path is wanted.
        max_bytes: more than a wanted file can have.
    """

    matches: Callable[[PurePosixPath], bool]
    max_bytes: int


def read_members(source: Path, wanted: Wanted) -> Generator[Member, None, None]:
    """Read whatever kind of source this is, leaving out what operating systems strew about.

    Raises:
        UserError: the source is missing, damaged, unsafe or absurdly large.
    """
    with _damage_named(source):
        for member in _kind_of(source)(source, _Budget(source, wanted)):
            hidden = any(part.startswith(".") or part == "__MACOSX" for part in member.path.parts)
            if not hidden and member.path.name.lower() not in ("thumbs.db", "desktop.ini"):
                yield member


def _kind_of(source: Path) -> Callable[[Path, _Budget], Iterator[Member]]:
    if source.is_dir():
        return _folder_members
    with open(source, "rb") as file:
        return _zip_members if file.read(2) == b"PK" else _tar_members


@contextmanager
def _damage_named(source: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file or folder; check the path") from error
    except PermissionError as error:
        raise UserError(f"{error.filename}: may not be read; check its permissions") from error
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(
            f"{source} is damaged, or no folder, .tar(.gz|.bz2|.xz) or .zip ({reason}): "
            "fetch or pack it again"
        ) from error


@dataclass
class _Budget:
    """What a source may still unpack to."""

    source: Path
    wanted: Wanted
    files: int = field(default_factory=lambda: MAX_FILES)
    total: int = field(default_factory=lambda: MAX_TOTAL_BYTES)

    def charge(self, name: str, size: int) -> PurePosixPath:
        """Account for a member before it is read, and return its path."""
        path = PurePosixPath(name)
        self.files -= 1
        self.total -= size
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{self.source}: {shown(path)} leads out of the archive; pack it again")
        if not 0 <= size <= self.wanted.max_bytes:
            raise UserError(
                f"{self.source}: {shown(path)} has {size:,} bytes, too many for what is expected "
                "there; remove it"
            )
        if self.files < 0 or self.total < 0:
            raise UserError(
                f"{self.source} unpacks to more than {MAX_FILES:,} files or {MAX_TOTAL_BYTES:,} "
                "bytes; is it the right one?"
            )
        return path


def _walk(
    folder: Path, below: PurePosixPath, budget: _Budget
) -> Iterator[tuple[PurePosixPath, os.DirEntry[str]]]:
    """List a folder and all below it. Links are followed: they are the user's own."""
    with os.scandir(folder / below) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        size = entry.stat().st_size if budget.wanted.matches(below / entry.name) else 0
        path = budget.charge(str(below / entry.name), size)
        yield path, entry
        if entry.is_dir():
            yield from _walk(folder, path, budget)


def _folder_members(source: Path, budget: _Budget) -> Iterator[Member]:
    listing = list(_walk(source, PurePosixPath(), budget))
    for index, (path, entry) in enumerate(listing):
        data, kind = b"", "directory" if entry.is_dir() else "file"
        if kind == "file" and budget.wanted.matches(path):
            if not entry.is_file():
                raise UserError(f"{source}: {shown(path)} is not a regular file: remove it")
            data = Path(entry.path).read_bytes()
        yield Member(path, kind, data, index / len(listing))


def _zip_members(source: Path, budget: _Budget) -> Iterator[Member]:
    with zipfile.ZipFile(source) as archive:
        infos = archive.infolist()
        for index, info in enumerate(infos):
            path = budget.charge(info.filename.replace("\\", "/"), info.file_size)
            data, kind = b"", "directory" if info.is_dir() else "file"
            if stat.S_ISLNK(info.external_attr >> 16):
                kind = "link"
            elif kind == "file" and budget.wanted.matches(path):
                with archive.open(info) as file:  # gives no more than the announced size
                    data = file.read()
            yield Member(path, kind, data, index / len(infos))


def _tar_members(source: Path, budget: _Budget) -> Iterator[Member]:
    size = max(source.stat().st_size, 1)
    with open(source, "rb") as raw, _decompressed(raw) as plain:
        stream = _MeteredStream(plain)
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictTarInfo) as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it keeps them all
                path = budget.charge(info.name, info.size)
                stream.allow(info.size)
                data, kind = b"", "directory" if info.isdir() else "file"
                if not (info.isdir() or info.isreg()):
                    kind = "link" if info.issym() or info.islnk() else "special file"
                elif kind == "file" and budget.wanted.matches(path):
                    file = archive.extractfile(info)
                    data = file.read() if file is not None else b""
                yield Member(path, kind, data, raw.tell() / size)
        stream.allow(budget.wanted.max_bytes)
        while stream.read(1 << 16):  # so that the decompressor compares its checksum
            pass


@contextmanager
def _decompressed(raw: IO[bytes]) -> Iterator[IO[bytes]]:
    magic = raw.read(6)
    raw.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        with gzip.GzipFile(fileobj=raw) as plain:
            yield io.BufferedReader(plain)
    elif magic.startswith(b"BZh"):
        with bz2.BZ2File(raw) as plain:
            yield plain
    elif magic == b"\xfd7zXZ\x00":
        with lzma.LZMAFile(raw) as plain:
            yield plain
    else:
        yield raw


class _MeteredStream(io.RawIOBase):
    """Stop a tar whose headers unpack to gigabytes before tarfile has read them into memory."""

    def __init__(self, plain: IO[bytes]) -> None:
        self._plain = plain
        self.allow(0)

    def allow(self, size: int) -> None:
        """Permit a member of so many bytes, and the headers of the next."""
        self._left = size + MAX_TAR_HEADERS

    def read(self, size: int = -1) -> bytes:
        data = self._plain.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise tarfile.ReadError("headers of absurd size")
        return data


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged header, and the end of a file cut short, for the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # the archive's proper end
            raise tarfile.ReadError(f"cut short or not a tar: {error}") from error


def fingerprint(source: Path, wanted: Wanted) -> dict[str, object]:
    """Return what tells cheaply whether a source is the one of the last time: sizes and times."""
    with _damage_named(source):
        return _fingerprint(source, wanted)


def _fingerprint(source: Path, wanted: Wanted) -> dict[str, object]:
    path = str(source.resolve())
    if not source.is_dir():
        status = source.stat()
        return {"path": path, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    digest = hashlib.sha256()
    for name, entry in _walk(source, PurePosixPath(), _Budget(source, wanted)):
        if not entry.is_dir():
            status = entry.stat()
            digest.update(f"{str(name)!a} {status.st_size} {status.st_mtime_ns}\n".encode("ascii"))
    return {"path": path, "listing_sha256": digest.hexdigest()}


def shown(path: PurePosixPath) -> str:
    """A path as it may be printed: names in archives hold anything, escape sequences included."""
    text = ascii(str(path))
    return text if len(text) <= 200 else f"{text[:90]}...{text[-90:]}"
