"""Who may write into a directory: one process at a time, also among hosts that share it.

Two locks, because neither is enough alone:

    lock         flock: the kernel lets it go the moment its holder dies, however it dies, so that
                 the next life starts at once. Not every shared file system tells other hosts.
    lease.json   names the holder and a beat that it renews. Another host takes it over only when it
                 has stood still for STANDSTILL seconds of that host's own monotonic clock.

A holder that was frozen for longer than that, or cut off from the disk, finds the lease gone when
it looks before its next write.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import secrets
import sys
import threading
import time
from pathlib import Path

from resnet_ddp import durable
from resnet_ddp.exits import TemporaryError, UserError

LEASE = "lease.json"
BEAT = 10.0  # seconds between two renewals
STANDSTILL = 60.0  # seconds
POLL = 1.0  # seconds
ATTEMPTS, PAUSE = 3, 0.02  # to lock, and seconds between


def nobody_else() -> None:
    """Check nothing, where who writes is alone: stands in for `Lease.check`."""


class Lease:
    """The right to write into a directory.

    Args:
        directory: made if it is not there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / LEASE
        self._holder = secrets.token_hex(16)
        self._lock: int | None = None
        self._file: int | None = None
        self._thread: threading.Thread | None = None
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the directory for this process, until `release`.

        Raises:
            UserError: it cannot be written.
            TemporaryError: another process has it.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno not in durable.REFUSED:
                raise  # no space, a disk that fails: another time it may work
            raise UserError(
                f"{error.filename or self.directory}: cannot write there "
                f"({error.strerror or error}); "
                "choose another directory with --runs"
            ) from error
        try:
            self._take(has_flock=self._flock())
        except BaseException:
            self.release()
            raise
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure that the directory is still ours.

        Raises:
            TemporaryError: it is not.
        """
        if not (self._content() or b"").startswith(self._beginning()):
            raise TemporaryError(
                f"{self.directory}: another process has taken this run over, because this one gave "
                "no sign of life or its lease was removed; nothing was written since"
            )

    def release(self) -> None:
        """Let others have the directory."""
        self._released.set()
        if self._thread is not None:
            self._thread.join(timeout=POLL)
            if self._thread.is_alive():
                return  # held up by the disk: its descriptor has to stay
        if self._file is not None:
            with contextlib.suppress(OSError, TemporaryError):
                self.check()
                os.unlink(self.path)
            os.close(self._file)
            self._file = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _flock(self) -> bool:
        """Lock, and say whether this file system can."""
        assert self._lock is not None
        for attempt in range(ATTEMPTS):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if attempt + 1 < ATTEMPTS:
                    time.sleep(PAUSE)  # an observer lets it go at once
            except OSError:
                return False  # the lease alone has to do
        raise self._is_taken() from None

    def _take(self, *, has_flock: bool) -> None:
        there = self._content()
        if there is not None:
            # On the holder's own kernel, its flock would stand if it lived.
            if not (has_flock and _kernel_in(there) == kernel()):
                self._wait_for_standstill(there)
            self._move_aside(there)
        self._create()
        durable.fsync(self.directory)
        self.check()

    def _create(self) -> None:
        """Make the lease, whole or not at all, unless there is one."""
        whole = self._aside()
        try:
            self._file = os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self._renew(0)
            os.link(whole, self.path)
        except FileExistsError:
            raise self._is_taken() from None
        finally:
            with contextlib.suppress(OSError):
                os.unlink(whole)

    def _aside(self) -> Path:
        """Return the name of a file that `durable.remove_leftovers` knows."""
        return self.path.with_name(f".{LEASE}.{secrets.token_hex(8)}")

    def _wait_for_standstill(self, there: bytes) -> None:
        print(
            f"{self.directory}: looking for {STANDSTILL:.0f} s whether its last process, on "
            "another host, still lives",
            file=sys.stderr,
        )
        until = time.monotonic() + STANDSTILL
        while time.monotonic() < until:
            time.sleep(POLL)
            if self._content() != there:
                raise self._is_taken()

    def _move_aside(self, there: bytes) -> None:
        """Remove the lease that stood still, not one that another process has just made."""
        aside = self._aside()
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            raise self._is_taken() from None
        try:
            if aside.read_bytes() != there:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
                raise self._is_taken()
        finally:
            os.unlink(aside)

    def _beat(self) -> None:
        beat = 0
        while not self._released.wait(BEAT):
            beat += 1
            # Our own file: it never overwrites the lease of one who took over. What the disk
            # refuses here, the next check finds.
            with contextlib.suppress(OSError):
                self._renew(beat)

    def _renew(self, beat: int) -> None:
        if self._file is not None:
            with durable.naming(self.path):
                os.pwrite(self._file, self._beginning() + f'{beat:012d}"}}\n'.encode(), 0)
                os.fsync(self._file)

    def _beginning(self) -> bytes:
        """Return the lease up to its beat, which has a fixed width."""
        facts = {
            "holder": self._holder,
            "host": platform.node(),
            "kernel": kernel(),
            "pid": os.getpid(),
            "beat": "",
        }
        return json.dumps(facts)[:-2].encode()

    def _content(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def _is_taken(self) -> TemporaryError:
        return TemporaryError(f"{self.directory}: another process is training this run")


class Observer:
    """Tells who holds directories, without writing there.

    A holder on another host counts as alive while its beat moves, by this process's own monotonic
    clock; the first time, while the beat is no older than STANDSTILL by the clocks of both hosts.
    """

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[bytes, float]] = {}  # content, and since when

    def holder(self, directory: Path) -> str | None:
        """Return "host, process N" of who holds the directory, None if nobody does."""
        path = directory / LEASE
        try:
            content = path.read_bytes()
            age = time.time() - path.stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            self._seen.pop(directory, None)
            return None
        now = time.monotonic()
        before = self._seen.get(directory)
        if before is None:
            self._seen[directory] = (content, now - min(max(age, 0.0), STANDSTILL))
        elif before[0] != content:
            self._seen[directory] = (content, now)
        is_held = None
        if _kernel_in(content) == kernel():
            is_held = _is_locked(directory / "lock")
        if is_held is None:
            is_held = now - self._seen[directory][1] < STANDSTILL
        return _name_of(content) if is_held else None


def _is_locked(path: Path) -> bool | None:
    """Say whether a process of this kernel has the lock, None if that cannot be told."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(file)


def _name_of(content: bytes) -> str:
    try:
        facts = json.loads(content)
        return f"{facts['host']}, process {facts['pid']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "an unknown process"


def kernel() -> str:
    """Return a name of the running kernel: what shares it, shares its locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()  # not Linux


def _kernel_in(content: bytes) -> str | None:
    try:
        return str(json.loads(content)["kernel"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
