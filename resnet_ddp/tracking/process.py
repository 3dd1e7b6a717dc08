"""The process beside a run that copies its rows: `python -m resnet_ddp.tracking.process RUN`.

Its standard input is its lifeline. The first line says what to do, a plan. The line "done" says
that the run is over and that what is left should be handed over; the end of the stream, without
that line, that the run was interrupted or killed: then it leaves at once, and takes what it started
along. What it prints is for the run's display.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn, Protocol

from resnet_ddp.exits import ExitCode
from resnet_ddp.tracking.plan import WANDB, Plan
from resnet_ddp.tracking.rows import Rows

DONE = "done\n"
POLL = 1.0  # seconds between two looks at the files
LONGEST = 300  # characters of an error
NICENESS = 10  # training goes first


class Tracker(Protocol):
    """Takes rows, each once and in order."""

    next_row: int

    @property
    def where(self) -> str:
        """Where a person finds it."""

    def log(self, row: int, values: dict[str, Any]) -> None:
        """Copy a row."""

    def finish(self, summary: dict[str, Any] | None) -> None:
        """Hand over all that is left."""


class Lifeline:
    """What the run's process tells this one."""

    def __init__(self) -> None:
        self.plan = Plan.from_line(sys.stdin.readline())
        self.is_done = threading.Event()
        self._parent = os.getppid()
        for watch in (self._listen, self._look_up):
            threading.Thread(target=watch, daemon=True).start()

    def _listen(self) -> None:
        while sys.stdin.readline() == DONE:
            self.is_done.set()
        leave(ExitCode.STOPPED)

    def _look_up(self) -> None:
        # The stream does not end while another child of the run's process holds it, too.
        while os.getppid() == self._parent:
            time.sleep(POLL)
        leave(ExitCode.STOPPED)


def main(argv: list[str]) -> int:
    """Copy a run's rows until it is done or gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run decides when it is over
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    directory, life = Path(argv[0]), Lifeline()
    # Whatever goes wrong, in a tracker or on the disk, is a line and another attempt.
    try:
        with open(directory / f".{life.plan.tracker}.lock", "a") as lock:
            if _lock(lock.fileno(), life.is_done):
                copy(directory, life.plan, life.is_done)
                return ExitCode.DONE
        say(life.plan, "another process is at it")
    except Exception as error:
        say(life.plan, f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST]}")
    return ExitCode.TEMPORARY


def copy(directory: Path, plan: Plan, is_done: threading.Event) -> None:
    """Copy rows as they settle, and what is left once the run is done.

    Raises:
        Exception: the tracker's, or the disk's; another process may go on where it stands.
    """
    rows, tracker = Rows(directory), open_tracker(directory, plan)
    say(plan, tracker.where)
    is_last = False
    while not is_last:
        is_last = is_done.wait(POLL)
        settled = rows.read()
        for row in range(tracker.next_row, len(settled)):
            tracker.log(row, settled[row])
    tracker.finish(rows.summary())


def open_tracker(directory: Path, plan: Plan) -> Tracker:
    """Return the tracker that the plan names."""
    if plan.tracker == WANDB:
        from resnet_ddp.tracking.weights_and_biases import WandbTracker

        return WandbTracker(directory, plan)
    from resnet_ddp.tracking.tensorboard import TensorboardTracker

    return TensorboardTracker(directory, plan)


def say(plan: Plan, text: str) -> None:
    """Print a line for the run's display."""
    with contextlib.suppress(OSError):
        print(f"{plan.tracker}: {text}", flush=True)


def leave(code: int) -> NoReturn:
    """End this process and those that it started, whatever it is doing."""
    for child in _children():
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)
    os._exit(code)


def _children() -> list[int]:
    """Return the processes that this one started (Linux; elsewhere they see themselves to it)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                found.append(int(entry.parent.name))
    return found


def _lock(descriptor: int, is_done: threading.Event) -> bool:
    """Take the lock, waiting for a process that is about to leave; not for ever."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if is_done.wait(POLL):
                return False
        else:
            return True


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
