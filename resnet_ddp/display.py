"""What a person sees while a run trains: a bar on a terminal, else a line now and then.

Displays are interchangeable, and the loop does not know which one it has.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Seconds between two lines where there is no terminal: soon at first, then a line a minute, so that
# the log of a day can still be read.
SHORTEST, LONGEST = 10.0, 60.0


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
        interval = min(LONGEST, max(SHORTEST, (now - self._began) / 10))
        if now - self._last < interval and iteration < self._total:
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


class QuietDisplay(PlainDisplay):
    """Only the lines that stay."""

    def update(self, iteration: int, *, loss: float, lr: float, images_per_second: float) -> None:
        """Show nothing."""


class NoDisplay:
    """What every process but the main one shows."""

    def update(self, iteration: int, *, loss: float, lr: float, images_per_second: float) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Do nothing."""


def make_display(name: str, *, start: int, total: int, quiet: bool = False) -> Display:
    """Return a bar on a terminal, else plain lines; neither if it is to be quiet."""
    if quiet:
        return QuietDisplay(name, start=start, total=total)
    display = BarDisplay if sys.stderr.isatty() else PlainDisplay
    return display(name, start=start, total=total)
