"""How a command ends: the exit codes, and the exceptions that carry them.

Whoever finds that a run cannot go on raises one of these; only the command line turns them into a
line on stderr and an exit code. Any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar, Self


class ExitCode(IntEnum):
    """Exit codes of every command, for schedulers and scripts."""

    DONE = 0
    FAILED = 1  # a check that the command was to make did not hold
    BAD_INPUT = 2
    INCOMPLETE = 3  # a report of a grid that is not done
    NOT_FINITE = 65  # the loss is not a number: repeating the run repeats that
    TEMPORARY = 75  # no space, lock held elsewhere: worth trying again
    STOPPED = 85  # saved, wants more time


class Exit(Exception):
    """End the command with `code`; the message is the line or two that the user reads."""

    code: ClassVar[ExitCode]
    is_told = False

    def told(self) -> Self:
        """Mark that another process has told the user; return the same."""
        self.is_told = True
        return self


class UserError(Exit):
    """Bad usage or input, a line or two for the user: what is wrong and how to mend it."""

    code = ExitCode.BAD_INPUT


class NotFiniteError(Exit):
    """The loss became infinite or not a number; nothing after it reached a checkpoint."""

    code = ExitCode.NOT_FINITE


class TemporaryError(Exit):
    """Something outside the run is in the way for now; the same command may succeed later."""

    code = ExitCode.TEMPORARY
