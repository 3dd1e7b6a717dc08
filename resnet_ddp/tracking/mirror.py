"""The run's side of a tracking process: start it, start it again, and let it go in time."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from resnet_ddp.exits import ExitCode
from resnet_ddp.launcher import LAUNCH_VARIABLES
from resnet_ddp.tracking.plan import Plan
from resnet_ddp.tracking.process import DONE

FINISH = 60.0  # seconds that a run waits at its end for trackers to take what is left
LEAVE = 5.0  # seconds that a tracking process has to leave
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 300.0  # seconds before a tracker that failed is tried again
LOG = "tracking.log"  # in a run directory: what trackers print


class Mirror:
    """Has the rows of one run copied to one tracker, by a process of its own.

    Nothing here waits or raises but `finish`, which has a limit. A process that fails is started
    again after a while: it asks the tracker what is there and goes on.

    Args:
        say: takes a line for the user; called from another thread.
    """

    def __init__(self, directory: Path, plan: Plan, say: Callable[[str], None]) -> None:
        self.directory, self.plan = directory, plan
        self._say = say
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()  # over who starts, tells and ends the process
        self._is_done = threading.Event()  # the run; what is left is to be handed over
        self._is_over = threading.Event()  # nothing more is to be done
        self._is_copied = False
        self._thread = threading.Thread(target=self._look_after, name="mirror", daemon=True)
        self._thread.start()

    def finish(self, limit: float) -> bool:
        """Wait until all is handed over, or for so many seconds.

        Returns:
            Whether it was.
        """
        with self._lock:
            self._is_done.set()
            self._tell(DONE)
        self._thread.join(limit)
        self.close()
        if not self._is_copied:
            self._say(
                f"{self.plan.tracker} does not have all of this run; "
                f"resnet-ddp track push {self.directory} copies the rest"
            )
        return self._is_copied

    def close(self) -> None:
        """Let the process go, whatever it has still to do."""
        with self._lock:
            self._is_over.set()
            self._is_done.set()
            process = self._process
            if process is not None and process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        if process is not None:
            try:
                process.wait(LEAVE)
            except subprocess.TimeoutExpired:
                process.kill()
        self._thread.join(LEAVE)

    def _look_after(self) -> None:
        """Start the process, pass on what it says, and start it again if it fails."""
        pause = FIRST_PAUSE
        while not self._is_over.is_set():
            was_done = self._is_done.is_set()
            code = self._live()
            if code == ExitCode.DONE:
                self._is_copied = True
                return
            # A run that is over does not wait for the next attempt, but it makes one.
            if was_done and self._is_done.is_set():
                return
            self._is_done.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _live(self) -> int:
        """Start a process, listen until it ends, and return its exit code."""
        try:
            with self._lock:
                if self._is_over.is_set():
                    return ExitCode.STOPPED
                process = self._process = self._start()
                self._tell(self.plan.as_line())
                if self._is_done.is_set():
                    self._tell(DONE)
        except OSError as error:
            self._say(f"{self.plan.tracker}: {error.strerror or error}")
            return ExitCode.TEMPORARY
        assert process.stdout is not None and process.stdin is not None
        with contextlib.suppress(OSError, ValueError), process.stdout:
            for line in process.stdout:
                self._say(line.rstrip())
        code = process.wait()
        with self._lock, contextlib.suppress(OSError):
            process.stdin.close()
        return code

    def _start(self) -> subprocess.Popen[str]:
        kept = {key: value for key, value in os.environ.items() if key not in LAUNCH_VARIABLES}
        with (self.directory / LOG).open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "resnet_ddp.tracking.process", str(self.directory)],
                env=kept,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # a Ctrl-C is for the run
            )

    def _tell(self, line: str) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it is gone, which its listener sees
            self._process.stdin.write(line)
            self._process.stdin.flush()


class Mirrors:
    """Those of a run, which has none, one or several."""

    def __init__(self, directory: Path, plans: Iterable[Plan], say: Callable[[str], None]) -> None:
        self._mirrors = [Mirror(directory, plan, say) for plan in plans]

    def finish(self) -> None:
        """Wait for all, but not for long."""
        deadline = time.monotonic() + FINISH
        for mirror in self._mirrors:
            mirror.finish(max(LEAVE, deadline - time.monotonic()))

    def close(self) -> None:
        """Let all go at once."""
        for mirror in self._mirrors:
            mirror.close()
