"""How often a run may live without making progress: the one rule for this machine and for Slurm.

A life is one process, or one launch of several, that trains a run. It made progress if the next
life finds a newer checkpoint than it found itself.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from resnet_ddp import durable
from resnet_ddp.exits import UserError
from resnet_ddp.grid.states import saved_iteration
from resnet_ddp.runs import LIVES_FILE, read_object

LIVES = 3  # without progress, and a run is given up


class Lives:
    """Counts the lives of one run.

    Args:
        directory: of the run.
        is_kept: whether to count in the run's directory, across the lives of whoever counts:
            a job that is requeued is a new process each time.
    """

    def __init__(self, directory: Path, *, is_kept: bool = False) -> None:
        self.directory = directory
        self.count = 0  # begun since the last that made progress
        self._saved = -1  # the newest checkpoint when the last one began
        self._file = directory / LIVES_FILE if is_kept else None
        there = None
        with contextlib.suppress(UserError):  # damaged: counted anew
            there = read_object(self._file) if self._file else None
        count, saved = (there or {}).get("lives"), (there or {}).get("saved")
        if isinstance(count, int) and isinstance(saved, int):
            self.count, self._saved = count, saved

    @property
    def are_spent(self) -> bool:
        """Whether another life would be one too many."""
        return self.count >= LIVES and saved_iteration(self.directory) <= self._saved

    def begin(self) -> None:
        """Count a life that begins now."""
        saved = saved_iteration(self.directory)
        self.count = self.count + 1 if saved <= self._saved else 1
        self._saved = saved
        if self._file is not None:
            durable.write_json(self._file, {"lives": self.count, "saved": saved})

    def forget(self) -> None:
        """Begin to count anew: a person has asked for the run again."""
        self.count, self._saved = 0, -1
        if self._file is not None:
            self._file.unlink(missing_ok=True)
