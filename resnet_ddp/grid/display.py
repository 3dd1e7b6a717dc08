"""What a person sees while a grid runs: one picture on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Protocol

from rich.console import Console
from rich.live import Live

from resnet_ddp.grid.cells import Grid
from resnet_ddp.grid.picture import duration, picture, running_lines, summary
from resnet_ddp.grid.states import States

PLAIN_INTERVAL = 60.0  # seconds between two lines where there is no terminal


class GridDisplay(Protocol):
    """Shows a grid to a person."""

    def update(self, grid: Grid, states: States, seconds_left: float | None) -> None:
        """Show how all runs stand."""

    def note(self, text: str) -> None:
        """Show a line that stays."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class LiveDisplay:
    """The picture, with the lines that stay above it."""

    def __init__(self) -> None:
        self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
        self._live.start()

    def update(self, grid: Grid, states: States, seconds_left: float | None) -> None:
        """Show how all runs stand."""
        self._live.update(picture(grid, states, _when(seconds_left)), refresh=True)

    def note(self, text: str) -> None:
        """Show a line that stays, above the picture."""
        self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._live.stop()


class PlainDisplay:
    """A line now and then, for log files."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def update(self, grid: Grid, states: States, seconds_left: float | None) -> None:
        """Show how all runs stand, if the last time is long enough ago."""
        if time.monotonic() - self._last < PLAIN_INTERVAL:
            return
        self._last = time.monotonic()
        for line in (*running_lines(grid, states), f"{summary(states)}; {_when(seconds_left)}"):
            self.note(line)

    def note(self, text: str) -> None:
        """Show a line."""
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Do nothing."""


def make_display() -> GridDisplay:
    """Return the picture on a terminal, else plain lines."""
    return LiveDisplay() if sys.stderr.isatty() else PlainDisplay()


def _when(seconds_left: float | None) -> str:
    return "nothing measured yet" if seconds_left is None else f"{duration(seconds_left)} left"
