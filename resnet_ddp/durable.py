"""Files that are whole or not there: written beside their place, flushed, renamed into it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resnet_ddp.exits import TemporaryError, UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
           errno.ENAMETOOLONG, errno.ELOOP)  # fmt: skip
# What a disk, or a file server that is away for a while, answers.
FAILING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENXIO, errno.ENOLCK, errno.EMFILE,
           errno.ENFILE, errno.ENOMEM)  # fmt: skip


@contextmanager
def disk_errors_named() -> Iterator[None]:
    """Turn an error of the file system into the line that a user needs.

    Raises:
        TemporaryError: no space, or a disk that fails: the same command may succeed later.
        UserError: no permission, or a file system that is read-only; with the file's name.
    """
    try:
        yield
    except OSError as error:
        name = error.filename2 or error.filename  # of a rename, the place that it was meant for
        where = f"{name}: " if name else ""
        if error.errno in FULL:
            raise TemporaryError(
                f"{where}No space left on the disk; free some, and the same command goes on"
            ) from error
        if error.errno in REFUSED:
            raise UserError(f"{where}{error.strerror}; mend that and try again") from error
        if error.errno in FAILING:
            raise TemporaryError(
                f"{where}{error.strerror}; once that is mended, the same command goes on"
            ) from error
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name into an error of a call that knows its descriptor only."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_all(descriptor: int, content: bytes) -> None:
    """Write all of it: one call may take less than it is given."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet, and flush it to the disk.

    Raises:
        FileExistsError: it is there.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with naming(path):
            write_all(descriptor, content)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync(path: Path) -> None:
    """Flush a file, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that other processes wait for; the file stays."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step; a reader sees the old or the new file whole."""
    # Named at random: a process that has the number of one that was killed must not trip over
    # what that one left.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        write_new(temporary, content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON; floats that JSON does not know are refused."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def remove_leftovers(directory: Path) -> None:
    """Remove what a process that was killed in `write_bytes` left beside the file it meant."""
    for path in directory.glob(".*.*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{16}", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def publish_directory(temporary: Path, final: Path) -> None:
    """Flush a finished directory and all its files, then rename it into its place."""
    for file in temporary.iterdir():
        fsync(file)
    fsync(temporary)
    os.rename(temporary, final)
    fsync(final.parent)
