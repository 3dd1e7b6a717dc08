"""Requests to stop: a signal only sets a flag, and the loop looks at it where something is due."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# One Ctrl-C can arrive twice, from the terminal and from a launcher; a person takes longer.
IMPATIENCE = 1.0  # seconds


class StopRequest:
    """Whether SIGINT or SIGTERM asked the run to stop, and which.

    A second Ctrl-C more than a second after the first raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._asked_at = 0.0

    @property
    def reason(self) -> str | None:
        """The name of the signal, or None while nothing asked."""
        return self._signal.name if self._signal else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the signals, and give them back."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for number in before:
                signal.signal(number, self._on_signal)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._asked_at = signal.Signals(number), now
        elif number == signal.SIGINT and now - self._asked_at > IMPATIENCE:
            raise KeyboardInterrupt
