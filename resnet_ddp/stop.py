"""Requests to stop: signals, a stop file, deadlines; the loop looks where something is due.

A signal only sets a flag: nothing is ever saved inside a handler.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# One Ctrl-C can arrive twice, from the terminal and from a launcher; a person takes longer.
IMPATIENCE = 1.0  # seconds
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOP_FILE_POLL = 1.0  # seconds
STOP_FILE = "stop"
STOP_FILE_REASON = f"the file {STOP_FILE}"
SLURM_POLL = 300.0  # seconds: an administrator may change the end of a job
SLURM_PATIENCE = 60.0  # seconds for squeue to answer
SLURM_RESERVE = (
    60.0  # seconds before the end of the job; a quarter of what is left, if that is less
)


class Deadline:
    """A moment of the monotonic clock by which this process wants to be gone.

    Args:
        seconds: from now; None if there is none (yet).
        reserve: seconds to stop earlier than the work between two looks demands.
    """

    def __init__(self, name: str, seconds: float | None, *, reserve: float = 0.0) -> None:
        self.name = name
        self.reserve = reserve
        self.moment = float("inf")
        if seconds is not None:
            self.put(seconds)

    def put(self, seconds: float) -> None:
        """Move it to so many seconds from now."""
        self.moment = time.monotonic() + seconds


class StopRequest:
    """Whether something asked the run to stop, and what.

    A second Ctrl-C more than a second after the first raises KeyboardInterrupt.

    Args:
        file: whose appearance asks.
        deadlines: they ask early enough for twice what was the longest time between two looks,
            with the evaluations and saves in it.
    """

    def __init__(self, file: Path | None = None, *deadlines: Deadline) -> None:
        self.file = file
        self.deadlines = deadlines
        self._reason: str | None = None
        self._signalled_at: float | None = None
        self._looked_at = self._file_looked_at = time.monotonic()
        self._longest = 0.0

    @property
    def reason(self) -> str | None:
        """What asked, or None while nothing did. Each reading counts as a look."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._looked_at)
        self._looked_at = now
        if self._reason is None:
            for deadline in self.deadlines:
                if now + 2 * self._longest + deadline.reserve >= deadline.moment:
                    self._reason = deadline.name
        is_time = now - self._file_looked_at >= STOP_FILE_POLL
        if self._reason is None and self.file is not None and is_time:
            self._file_looked_at = now
            if self.file.exists():
                self._reason = f"the file {self.file.name}"
        return self._reason

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the signals, and give them back; a stop file is gone afterwards."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self._looked_at = time.monotonic()
        try:
            for number in before:
                signal.signal(number, self._on_signal)
            yield
            if self.file is not None:
                self.file.unlink(missing_ok=True)  # it was heard
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at = now
            self._reason = self._reason or signal.Signals(number).name
        elif number == signal.SIGINT and now - self._signalled_at > IMPATIENCE:
            raise KeyboardInterrupt


def slurm_deadline(environment: Mapping[str, str] = os.environ) -> Deadline | None:
    """Return the end of the Slurm job that this process belongs to, None outside Slurm.

    A thread of its own asks squeue, now and then again: a controller that does not answer holds
    nothing up.
    """
    job = slurm_job(environment)
    if job is None:
        return None
    deadline = Deadline("the end of the Slurm job", None)

    def keep_asking() -> None:
        while True:
            left = slurm_seconds_left(job)
            if left is not None:
                if deadline.reserve == 0.0:
                    deadline.reserve = min(SLURM_RESERVE, left / 4)
                deadline.put(left)
            time.sleep(SLURM_POLL)

    threading.Thread(target=keep_asking, name="squeue", daemon=True).start()
    return deadline


def slurm_job(environment: Mapping[str, str]) -> str | None:
    """Return the name of this job for squeue: of an array, this task only.

    One task of an array has the number of the array itself, which would name them all.
    """
    array, task = (environment.get(name) for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"))
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID")


def slurm_seconds_left(job: str) -> float | None:
    """Ask squeue how long a job may still run; None if it does not say or knows no end.

    The time left, not the moment of the end: clocks may differ and jump.
    """
    try:
        answer = subprocess.run(
            ["squeue", "--noheader", "--jobs", job, "--format", "%L"],
            capture_output=True,
            text=True,
            timeout=SLURM_PATIENCE,
        ).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", answer.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
