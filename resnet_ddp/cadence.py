"""When things are due: a log line, an evaluation, a checkpoint.

All of it lies on fixed multiples of the iteration, never of the time or of where a life began, so
that a resumed run does what an undisturbed one does.
"""

from __future__ import annotations

from dataclasses import dataclass


def is_due(done: int, every: int, total: int) -> bool:
    """Say whether what happens every so many iterations happens when `done` are finished."""
    return done == total or (done > 0 and done % every == 0)


@dataclass(frozen=True)
class Cadence:
    """How often things are due, in iterations; none of it touches what is computed.

    Attributes:
        look_every: how often the host looks whether it was asked to stop.
        total: iterations of the whole run.
        last: where this life ends, at most `total`.
    """

    log_every: int
    eval_every: int
    save_every: int
    look_every: int
    total: int
    last: int

    def next_due(self, done: int) -> int:
        """Return the first iteration after `done` at which anything is due."""
        everies = (self.log_every, self.eval_every, self.save_every, self.look_every)
        return min(self.last, *(done - done % every + every for every in everies))


def default_log_every(total: int) -> int:
    """Return a spacing of log lines at which a short run, too, shows a curve."""
    return min(50, max(1, total // 64))


def default_eval_every(total: int) -> int:
    """Return a spacing of evaluations that costs a few percent of the training time."""
    return min(500, max(1, total // 5))


def default_save_every(device: str) -> int:
    """Return a spacing of checkpoints: under a minute of ResNet-20 on a CPU, seconds on a GPU."""
    return 4000 if device == "cuda" else 500


def default_look_every(device: str) -> int:
    """Return a spacing of looks at stop requests: a few seconds of the largest net at the most."""
    return 50 if device == "cuda" else 5
