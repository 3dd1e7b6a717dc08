"""Runs the cells of a grid: each in a process of its own, as many at a time as there are slots.

One queue, longest first. What is temporary (75, a signal) is tried again, what is not (2, 65, a
bug) is not, and no run's end touches another's. How a life ended is read from the run's own record,
status.json; from its process's exit code only if it came to no record. A request to stop goes to
all; they save and leave. Other grid runs, here or on hosts that share the directory, may work on
the same grid: who has a run is told by its lease.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from resnet_ddp.exits import ExitCode
from resnet_ddp.grid.cells import Grid, GridCell, longest_first
from resnet_ddp.grid.display import GridDisplay
from resnet_ddp.grid.lives import LIVES, Lives
from resnet_ddp.grid.slots import Slot
from resnet_ddp.grid.states import (
    RunState,
    State,
    is_hopeless,
    last_lines,
    read_state,
    read_states,
    saved_iteration,
    seconds_left,
)
from resnet_ddp.launcher import LAUNCHER_VARIABLE, without_launch
from resnet_ddp.lease import Observer
from resnet_ddp.runs import LOG, STATUS, shown
from resnet_ddp.stop import SIGNALS, StopRequest

POLL = 0.2  # seconds between two looks at the processes
REFRESH = 2.0  # seconds between two looks at all directories, which may lie on a slow file system
PAUSE = 5.0  # seconds before a run is tried again; times the number of its lives without progress
LONGEST = 4096  # characters of a reason

SIGNAL_NAMES = [number.name for number in SIGNALS]

Command = Callable[[GridCell, Slot], Sequence[str]]


@dataclass
class Job:
    """A run that is being trained by a process of ours."""

    cell: GridCell
    slot: Slot
    process: subprocess.Popen[bytes]
    record: tuple[int, int] | None  # which status.json there was before


class Supervisor:
    """Trains all cells of a grid.

    Args:
        command: returns that which trains a run in a slot.
        stop: whether something asks to stop; looked at several times a second.
        keeps_lives: whether lives without progress are counted in the runs' directories.
    """

    def __init__(
        self,
        grid: Grid,
        slots: Sequence[Slot],
        command: Command,
        display: GridDisplay,
        stop: StopRequest,
        *,
        keeps_lives: bool = False,
    ) -> None:
        self.grid = grid
        self.slots = slots
        self.command = command
        self.display = display
        self.stop = stop
        self.queue = longest_first(grid.cells)  # neither ours at the moment nor settled
        self.jobs: list[Job] = []
        self.given_up: dict[GridCell, str] = {}  # and why
        self.put_aside: dict[GridCell, str] = {}  # stopped by somebody else, and by what
        self.states: dict[GridCell, RunState] = {}
        self._observer = Observer()
        self.lives = {cell: Lives(grid.path(cell), is_kept=keeps_lives) for cell in grid.cells}
        self._not_before = dict.fromkeys(grid.cells, 0.0)
        self._looked_at = -REFRESH
        self._is_stopping = False

    def run(self) -> ExitCode:
        """Train until all is done or given up, or until asked to stop and all have saved.

        Returns:
            DONE, FAILED if a run was given up, or STOPPED.
        """
        try:
            while self._has_more():
                self._reap()
                if not self._is_stopping and self.stop.reason is not None:
                    self._stop_all()
                if not self._is_stopping:
                    self._fill()
                self._show()
                time.sleep(POLL)
        finally:
            self._kill_all()
        self._look()
        if self._is_stopping or self.put_aside:
            return ExitCode.STOPPED
        return ExitCode.FAILED if self.given_up else ExitCode.DONE

    def _has_more(self) -> bool:
        return bool(self.jobs) or (bool(self.queue) and not self._is_stopping)

    def _fill(self) -> None:
        """Give every free slot the longest run that nobody has."""
        busy = {job.slot.name for job in self.jobs}
        free = [slot for slot in self.slots if slot.name not in busy]
        is_time = time.monotonic() - self._looked_at >= REFRESH
        if not free and not is_time:
            return
        for cell in list(self.queue):
            if not free and not is_time:
                return
            if time.monotonic() < self._not_before[cell]:
                continue
            state = self._state(cell)
            if state.state is State.DONE:
                self.queue.remove(cell)
            elif is_hopeless(state):
                self.queue.remove(cell)
                self._give_up(cell, state.reason)
            elif state.state is State.RUNNING:  # elsewhere
                self._not_before[cell] = time.monotonic() + REFRESH
            elif free:
                self.queue.remove(cell)
                if not self._start(cell, free[0]):
                    continue
                del free[0]

    def _start(self, cell: GridCell, slot: Slot) -> bool:
        path, lives = self.grid.path(cell), self.lives[cell]
        if lives.are_spent:
            self._give_up(cell, f"{LIVES} lives without progress")
            return False
        arguments = self.command(cell, slot)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lives.begin()
            record = _stamp(path)
            with (path / LOG).open("ab") as log, _keeping_to(slot.cores):
                moment = datetime.now().astimezone().isoformat(timespec="seconds")
                line = f"--- {moment} {platform.node()}, {slot.name}: {' '.join(arguments)}\n"
                log.write(line.encode(errors="replace"))
                log.flush()
                process = subprocess.Popen(
                    arguments,
                    env=_environment(slot),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # a Ctrl-C reaches it from here, once
                )
        except OSError as error:
            self._try_again(cell, f"{error.filename or path}: {error.strerror or error}")
            return False
        self.jobs.append(Job(cell, slot, process, record))
        self.display.note(f"{cell.name}: started on {slot.name}")
        return True

    def _reap(self) -> None:
        """See who has ended, and what that means."""
        for job in list(self.jobs):
            if job.process.poll() is None:
                continue
            self.jobs.remove(job)
            cell, state = job.cell, self._state(job.cell)
            code = self._code(job, state)
            if state.state is State.DONE:
                self.display.note(f"{cell.name}: done, test error {state.test_error_rate:.2%}")
            elif self._is_stopping:
                self.queue.append(cell)
            elif code == ExitCode.STOPPED and state.reason in SIGNAL_NAMES:
                self._try_again(cell, f"saved after {state.reason}")
            elif code == ExitCode.STOPPED:
                self.put_aside[cell] = state.reason
                self.display.note(f"{cell.name}: saved and stopped by {state.reason}")
            elif state.state is State.RUNNING:
                self.queue.append(cell)  # another grid run was quicker
                self.queue = longest_first(self.queue)
            elif code is None:
                self._try_again(cell, _without_a_word(job.process.returncode))
            elif code == ExitCode.TEMPORARY:
                self._try_again(cell, self._last_line(cell))
            else:
                self._give_up(cell, self._last_line(cell), code)

    def _code(self, job: Job, state: RunState) -> int | None:
        """Return what a life ended with, None if it ended without a word."""
        if _stamp(self.grid.path(job.cell)) != job.record:
            return state.exit_code
        code = job.process.returncode
        return code if code >= 0 else None

    def _try_again(self, cell: GridCell, reason: str) -> None:
        lives = self.lives[cell]
        if lives.are_spent:
            self._give_up(cell, f"{LIVES} lives without progress: {reason}")
            return
        saved = saved_iteration(self.grid.path(cell))
        self._not_before[cell] = time.monotonic() + PAUSE * max(1, lives.count)
        self.queue = longest_first([*self.queue, cell])
        self.display.note(f"{cell.name}: {reason}; trying again from iteration {saved:,}")

    def _give_up(self, cell: GridCell, reason: str, code: int | None = None) -> None:
        self.given_up[cell] = reason
        with_code = "" if code is None else f" (exit code {code})"
        log = self.grid.path(cell) / LOG
        self.display.note(f"{cell.name}: failed{with_code}: {reason}; more in {log}")

    def _stop_all(self) -> None:
        self._is_stopping = True
        if self.jobs:
            count = f"{len(self.jobs)} run{'s' * (len(self.jobs) > 1)}"
            self.display.note(f"{self.stop.reason}: waiting for {count} to save")
        for job in self.jobs:
            job.process.terminate()

    def _kill_all(self) -> None:
        """Leave nothing behind, whatever happened here."""
        for job in self.jobs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()

    def _state(self, cell: GridCell) -> RunState:
        return read_state(self.grid.path(cell), self.grid.recipe, self._observer)

    def _look(self) -> None:
        self.states = read_states(self.grid, self._observer)
        for cell, reason in self.given_up.items():
            if self.states[cell].state is not State.DONE:
                self.states[cell] = RunState(State.FAILED, reason=reason)
        self._looked_at = time.monotonic()

    def _show(self) -> None:
        if time.monotonic() - self._looked_at >= REFRESH:
            self._look()
            left = seconds_left(self.grid, self.states, self.queue, len(self.slots))
            self.display.update(self.grid, self.states, left)

    def _last_line(self, cell: GridCell) -> str:
        """Return the last thing that the run said."""
        with contextlib.suppress(OSError):
            lines = [line for line in last_lines(self.grid.path(cell) / LOG) if line.strip()]
            last = shown(lines[-1].decode(errors="replace"), limit=LONGEST) if lines else ""
            return last.partition(": ")[2] or last
        return "no log"


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes whenever a run's status is written: each writing makes a new file."""
    try:
        found = (path / STATUS).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _without_a_word(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"ended without a word (exit code {code})"


def _environment(slot: Slot) -> dict[str, str]:
    """Return that of a run: no ranks and ports of whatever started the grid."""
    return {**without_launch(os.environ), **slot.variables, LAUNCHER_VARIABLE: str(os.getpid())}


@contextlib.contextmanager
def _keeping_to(cores: Sequence[int]) -> Iterator[None]:
    """Have processes that are started inside keep to these cores, where the system can do that."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
