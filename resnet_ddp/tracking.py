"""What a run tells: metrics.jsonl (the truth), timing.jsonl, and the display.

metrics.jsonl holds only what a repetition of the run would repeat bit for bit; all that depends on
the clock goes to timing.jsonl. Displays are interchangeable, and the loop does not know which one
it has.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL = 10.0  # seconds between two lines where there is no terminal


class JsonLines:
    """A file of JSON objects, one a line, that is appended to.

    Args:
        length: bytes to keep, the rest is cut off: what a life wrote after the checkpoint that is
            now gone back to. None keeps all.
    """

    def __init__(self, path: Path, *, length: int | None = None) -> None:
        self._file = open(path, "ab")
        if length is not None:
            self._file.truncate(length)

    def write(self, **values: Any) -> None:
        """Append one object; floats keep all their digits."""
        self._file.write((json.dumps(values, allow_nan=False) + "\n").encode())
        self._file.flush()

    def sync(self) -> int:
        """Flush to disk and return the file's length in bytes."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class NoLines(JsonLines):
    """What every process but the main one writes its lines to."""

    def __init__(self) -> None:
        super().__init__(Path(os.devnull))

    def sync(self) -> int:
        """Return 0: there is nothing on disk."""
        return 0


class Throughput:
    """Images per second since the last reading, evaluations and saves left out.

    Args:
        batch_size: images in an iteration.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.seconds = 0.0  # in training steps, over this life
        self._iterations = 0
        self._interval = 0.0

    @contextmanager
    def measured(self, iterations: int) -> Iterator[None]:
        """Count the steps that are made inside."""
        began = time.perf_counter()
        yield
        elapsed = time.perf_counter() - began
        self._iterations += iterations
        self._interval += elapsed
        self.seconds += elapsed

    def read(self) -> float:
        """Return images/s since the last call, and start anew."""
        images = self._iterations * self.batch_size
        rate = images / self._interval if self._interval else 0.0
        self._iterations, self._interval = 0, 0.0
        return rate


class Display(Protocol):
    """Shows one run to a person."""

    def update(self, iteration: int, *, loss: float, lr: float, images_per_second: float) -> None:
        """Show where the run stands."""

    def note(self, text: str) -> None:
        """Show a line that stays."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class BarDisplay:
    """A progress bar on a terminal."""

    def __init__(self, name: str, *, start: int, total: int) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self._console,
        )
        self._progress.start()
        self._task = self._progress.add_task(name, total=total, completed=start, state="starting")

    def update(self, iteration: int, *, loss: float, lr: float, images_per_second: float) -> None:
        """Show where the run stands."""
        state = f"{images_per_second:,.0f} images/s  loss {loss:.3f}  lr {lr:g}"
        self._progress.update(self._task, completed=iteration, state=state)

    def note(self, text: str) -> None:
        """Show a line that stays, above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()


class PlainDisplay:
    """A line now and then, for log files."""

    def __init__(self, name: str, *, start: int, total: int) -> None:
        self._name = name
        self._start, self._total = start, total
        self._began = self._last = time.monotonic()

    def update(self, iteration: int, *, loss: float, lr: float, images_per_second: float) -> None:
        """Show where the run stands, if the last line is old enough."""
        now = time.monotonic()
        if now - self._last < PLAIN_INTERVAL and iteration < self._total:
            return
        self._last = now
        pace = (now - self._began) / max(1, iteration - self._start)
        left = timedelta(seconds=round(pace * (self._total - iteration)))
        self.note(
            f"{self._name}  iteration {iteration:,}/{self._total:,}  "
            f"{images_per_second:,.0f} images/s  loss {loss:.3f}  lr {lr:g}  {left} left"
        )

    def note(self, text: str) -> None:
        """Show a line."""
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Do nothing."""


class NoDisplay:
    """What every process but the main one shows."""

    def update(self, iteration: int, *, loss: float, lr: float, images_per_second: float) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Do nothing."""


def make_display(name: str, *, start: int, total: int) -> Display:
    """Return a bar on a terminal, else plain lines."""
    display = BarDisplay if sys.stderr.isatty() else PlainDisplay
    return display(name, start=start, total=total)
