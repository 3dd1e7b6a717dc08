"""What Slurm has of a grid: which task is queued, or runs on which node. Asked of squeue alone.

A submission is a directory below the grid's own, `slurm/<number>/`: the scripts that were
submitted, `tasks.json` with the runs of each index of the array, and the logs. Its jobs carry that
directory's path as their comment, so that what is queued is known however submitting ended.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from resnet_ddp.exits import TemporaryError, UserError
from resnet_ddp.grid.cells import Grid, GridCell, read_cells

SUBMISSIONS = "slurm"  # below the grid's directory
TASKS = "tasks.json"
FIELDS = "%F|%K|%T|%r|%N|%k"  # array's job id, index in it, state, reason, nodes, comment
SUBMIT_PATIENCE = 20.0  # seconds for squeue to answer, where nothing can be done without


@dataclass(frozen=True)
class Task:
    """A job of this grid, or one index of an array, that Slurm has not done with.

    Attributes:
        job: the array's id, which dependencies name.
        index: in the array; None of a report job.
        state: in squeue's words: PENDING, RUNNING, COMPLETING, ...
        reason: why it is pending.
        nodes: that it runs on.
    """

    job: str
    index: int | None
    state: str
    reason: str
    nodes: str

    @property
    def name(self) -> str:
        """What scancel and scontrol call it."""
        return self.job if self.index is None else f"{self.job}_{self.index}"

    @property
    def is_waiting(self) -> bool:
        """Whether it has no node yet."""
        return not self.nodes or self.state == "PENDING"


@dataclass(frozen=True)
class Queue:
    """What Slurm has of a grid.

    Attributes:
        tasks: by run.
        reports: jobs that wait to write a report.
        silence: why nothing is known; "" if something is.
    """

    tasks: Mapping[GridCell, Task]
    reports: Sequence[Task] = ()
    silence: str = ""


NO_QUEUE = Queue({})


def submissions(grid: Grid) -> Path:
    """Return where a grid's submissions lie."""
    return grid.directory / SUBMISSIONS


def read_queue(grid: Grid, *, patience: float = SUBMIT_PATIENCE) -> Queue:
    """Return what Slurm has of a grid; where nothing was submitted, it is not asked.

    Args:
        patience: seconds for squeue to answer.

    Raises:
        TemporaryError: it does not answer.
    """
    if not submissions(grid).is_dir():
        return NO_QUEUE
    answer = squeue("--array", f"--user={os.getuid()}", patience=patience)
    return parse_queue(answer, grid)


def look_at_queue(grid: Grid, *, patience: float) -> Queue:
    """Return the same for a person, who sees why if nothing is known."""
    try:
        return read_queue(grid, patience=patience)
    except TemporaryError as error:
        return Queue({}, silence=str(error))


def parse_queue(answer: str, grid: Grid) -> Queue:
    """Return what lines of `FIELDS` say of a grid."""
    root = submissions(grid).resolve()
    tasks: dict[GridCell, Task] = {}
    reports = []
    cells_of: dict[Path, list[tuple[GridCell, ...]]] = {}
    for line in answer.splitlines():
        job, index, state, reason, nodes, comment = line.split("|", 5)
        directory = Path(comment)
        if directory.parent != root:
            continue
        task = Task(job, int(index) if index.isdecimal() else None, state, reason, nodes)
        if task.index is None:
            reports.append(task)
            continue
        if directory not in cells_of:
            cells_of[directory] = read_tasks(directory)
        if task.index < len(cells_of[directory]):
            tasks |= dict.fromkeys(cells_of[directory][task.index], task)
    return Queue(tasks, tuple(reports))


def read_tasks(directory: Path) -> list[tuple[GridCell, ...]]:
    """Return the runs of each index of a submission's array; none if that cannot be read."""
    try:
        lists = json.loads((directory / TASKS).read_bytes())
        return [read_cells(text) for text in lists]
    except (OSError, ValueError, TypeError, UserError):
        return []


def squeue(*arguments: str, patience: float = SUBMIT_PATIENCE) -> str:
    """Return what squeue says in `FIELDS`.

    Raises:
        TemporaryError: it is not there, or does not answer.
    """
    command = ["squeue", "--noheader", f"--format={FIELDS}", *arguments]
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=patience
        )
    except FileNotFoundError:
        raise TemporaryError("there is no squeue on this machine") from None
    except OSError as error:
        raise TemporaryError(f"squeue: {error.strerror}") from error
    except subprocess.TimeoutExpired:
        raise TemporaryError(f"squeue did not answer within {patience:g} s") from None
    if process.returncode != 0:
        raise TemporaryError(f"squeue: {last_line(process.stderr)}")
    return process.stdout


def last_line(text: str) -> str:
    """Return the last thing that a command said."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "nothing")
