"""Files that are whole or not there: written beside their place, flushed, renamed into it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resnet_ddp.exits import TemporaryError, UserError


@contextmanager
def disk_errors_named() -> Iterator[None]:
    """Turn an error of the file system into the line that a user needs.

    Raises:
        TemporaryError: no space, for now.
        UserError: no permission, a disk that is read-only or broken; with the file's name.
    """
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TemporaryError(
                f"{where}No space left on the disk; free some, and the same command goes on"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO):
            raise UserError(f"{where}{error.strerror}; mend that and try again") from error
        raise


def fsync(path: Path) -> None:
    """Flush a file, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
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
    # Named by process, so that two writers never share a half-written file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON; floats that JSON does not know are refused."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def publish_directory(temporary: Path, final: Path) -> None:
    """Flush a finished directory and all its files, then rename it into its place."""
    for file in temporary.iterdir():
        fsync(file)
    fsync(temporary)
    os.rename(temporary, final)
    fsync(final.parent)
