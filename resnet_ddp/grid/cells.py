"""Which runs a grid has, how long each takes beside the others, and when all will be done."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from resnet_ddp.architectures import ARCHITECTURES
from resnet_ddp.exits import UserError
from resnet_ddp.limits import MAX_INTEGER
from resnet_ddp.options import choice_message
from resnet_ddp.recipe import Recipe
from resnet_ddp.runs import run_path

MAX_SEEDS = 1000


@dataclass(frozen=True)
class GridCell:
    """One run: a model and a seed."""

    model: str
    seed: int

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"{self.model} seed {self.seed}"

    @property
    def word(self) -> str:
        """The same in a word, which `read_cells` reads."""
        return f"{self.model}/{self.seed}"

    @property
    def cost(self) -> float:
        """Time of an iteration, in units that all cells share; for its place in the queue.

        Work goes with the depth; shortcuts take a little besides.
        """
        architecture = ARCHITECTURES[self.model]
        return architecture.depth * (1.0 if architecture.shortcut is None else 1.05)


@dataclass(frozen=True)
class Grid:
    """Models times seeds.

    Attributes:
        runs: the directory that grids lie in.
        name: of this one below it.
        chosen: of all these runs the ones that are meant; None for all.
    """

    runs: Path
    name: str
    models: tuple[str, ...]
    seeds: tuple[int, ...]
    recipe: Recipe
    chosen: tuple[GridCell, ...] | None = None

    @property
    def directory(self) -> Path:
        """Where all of it lies."""
        return self.runs / self.name

    @property
    def cells(self) -> list[GridCell]:
        """All runs, model by model."""
        if self.chosen is not None:
            return list(self.chosen)
        return [GridCell(model, seed) for model in self.models for seed in self.seeds]

    def path(self, cell: GridCell) -> Path:
        """Return a run's directory."""
        return run_path(self.runs, self.name, cell.model, cell.seed)


def read_models(text: str) -> tuple[str, ...]:
    """Return the models of "resnet20,plain20".

    Raises:
        UserError: one of them does not exist.
    """
    models = tuple(dict.fromkeys(text.split(",")))
    for model in models:
        if model not in ARCHITECTURES:
            raise UserError(f"--models: {choice_message(model, list(ARCHITECTURES))}")
    return models


def read_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds of "0-4" or "0,2,7-9", ascending.

    Raises:
        UserError: it is not such a list.
    """
    seeds: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last > MAX_INTEGER:
            raise UserError(f"--seeds {text}: write 0-4, or 0,2,7-9")
        if last - first >= MAX_SEEDS:
            raise UserError(f"--seeds {text}: more than {MAX_SEEDS} seeds")
        seeds.update(range(first, last + 1))
    if len(seeds) > MAX_SEEDS:
        raise UserError(f"--seeds {text}: more than {MAX_SEEDS} seeds")
    return tuple(sorted(seeds))


def read_cells(text: str) -> tuple[GridCell, ...]:
    """Return the runs of "resnet20/0,plain20/3".

    Raises:
        UserError: it is not such a list, or one of the models does not exist.
    """
    cells = []
    for word in text.split(","):
        model, _, seed = word.partition("/")
        if not re.fullmatch(r"\d{1,10}", seed, re.ASCII) or int(seed) > MAX_INTEGER:
            raise UserError(f"{text}: write MODEL/SEED, or several: resnet20/0,resnet20/1")
        if model not in ARCHITECTURES:
            raise UserError(f"{word}: {choice_message(model, list(ARCHITECTURES))}")
        cells.append(GridCell(model, int(seed)))
    return tuple(dict.fromkeys(cells))


def longest_first(cells: Iterable[GridCell]) -> list[GridCell]:
    """Return the order in which cells are taken: a long one begun last would be waited for."""
    return sorted(cells, key=lambda cell: -cell.cost)  # stable: by model and seed otherwise


def makespan(running: Sequence[float], waiting: Sequence[float], slots: int) -> float:
    """Return the time after which all are done.

    Args:
        running: what each running one still takes; at most `slots` of them.
        waiting: what each other takes, in the order in which they are taken.
    """
    free = [*running, *[0.0] * (slots - len(running))]
    heapq.heapify(free)
    for duration in waiting:
        heapq.heapreplace(free, free[0] + duration)
    return max(free, default=0.0)
