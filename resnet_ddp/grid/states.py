"""How each run of a grid stands, from its directory alone; nothing is written, nothing locked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from resnet_ddp.exits import ExitCode, UserError
from resnet_ddp.grid.cells import Grid, GridCell, makespan
from resnet_ddp.lease import Observer
from resnet_ddp.recipe import Recipe
from resnet_ddp.runs import read_object, shown

TAIL = 16384  # bytes at the end of a file that hold its last lines
RETRIED = (ExitCode.STOPPED, ExitCode.TEMPORARY)


class State(StrEnum):
    """What a run is doing."""

    DONE = "done"
    RUNNING = "running"
    WAITING = "waiting"  # not begun, or saved and to be gone on with
    STALE = "stale"  # its last life ended without a word; the same command goes on
    FAILED = "failed"


@dataclass(frozen=True)
class RunState:
    """One run.

    Attributes:
        iteration: the last one heard of.
        images_per_second: the last measured.
        seconds_left: at that speed; of a running one.
        test_error_rate: of a done one.
        reason: of a failed one, or why a waiting one ended last time.
        exit_code: of the last life, of one that is at rest.
        holder: the host and process number of a running one.
    """

    state: State
    iteration: int = 0
    images_per_second: float | None = None
    seconds_left: float | None = None
    test_error_rate: float | None = None
    reason: str = ""
    exit_code: int | None = None
    holder: str = ""


States = Mapping[GridCell, RunState]


def read_state(path: Path, recipe: Recipe, observer: Observer) -> RunState:
    """Return how the run in a directory stands; what is damaged has failed, and says so."""
    try:
        result = read_object(path / "result.json")
        iteration, speed = _last_timing(path / "timing.jsonl")
        if result is not None:
            return _done(path, result, recipe, speed)
        holder = observer.holder(path)
        if holder is not None:
            left = max(0, recipe.iterations - iteration) * recipe.batch_size
            seconds_left = left / speed if speed else None
            return RunState(State.RUNNING, iteration, speed, seconds_left, holder=holder)
        return _at_rest(read_object(path / "status.json"), iteration, speed)
    except UserError as error:
        return RunState(State.FAILED, reason=str(error))
    except OSError as error:
        return RunState(State.FAILED, reason=f"{path}: {error.strerror or error}")


def seconds_left(
    grid: Grid, states: States, waiting: Sequence[GridCell], slots: int
) -> float | None:
    """Return when all will be done, from the speeds that were measured; None before there are any.

    Args:
        waiting: in the order in which they are taken.
        slots: how many are trained at a time.
    """
    running_cells = [cell for cell in states if states[cell].state is State.RUNNING]
    if not waiting and not running_cells:
        return 0.0
    # Every run's speed tells what an iteration of cost 1 takes.
    paces = sorted(
        grid.recipe.batch_size / (state.images_per_second * cell.cost)
        for cell, state in states.items()
        if state.images_per_second
    )
    if not paces:
        return None
    pace = paces[len(paces) // 2]

    def left(cell: GridCell) -> float:
        state = states[cell]
        if state.seconds_left is not None:
            return state.seconds_left
        return (grid.recipe.iterations - state.iteration) * cell.cost * pace

    running = [left(cell) for cell in running_cells]
    slots = max(1, slots, len(running))
    return makespan(running, [left(cell) for cell in waiting], slots)


def read_states(grid: Grid, observer: Observer) -> dict[GridCell, RunState]:
    """Return how all runs of a grid stand."""
    return {cell: read_state(grid.path(cell), grid.recipe, observer) for cell in grid.cells}


def is_hopeless(state: RunState) -> bool:
    """Say whether trying again would repeat what happened: a loss that is not finite."""
    return state.state is State.FAILED and state.exit_code == ExitCode.NOT_FINITE


def last_lines(path: Path) -> list[bytes]:
    """Return the last lines of a file, the first of them perhaps not whole."""
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        return file.read().splitlines()


def saved_iteration(path: Path) -> int:
    """Return the iteration of a run's newest checkpoint, 0 if there is none."""
    names = (checkpoint.name for checkpoint in (path / "checkpoints").glob("iteration-*"))
    numbers = (name.removeprefix("iteration-") for name in names)
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def _done(path: Path, result: dict[str, Any], recipe: Recipe, speed: float | None) -> RunState:
    if result.get("recipe_hash") != recipe.hash:
        other = shown(result.get("recipe"))
        return RunState(State.FAILED, reason=f"{path} holds a run of another recipe ({other})")
    rate = result.get("test_error_rate")
    if not isinstance(rate, float) or not 0 <= rate <= 1:
        return RunState(State.FAILED, reason=f"{path / 'result.json'} is damaged (test_error_rate)")
    return RunState(State.DONE, recipe.iterations, speed, test_error_rate=rate)


def _at_rest(status: dict[str, Any] | None, iteration: int, speed: float | None) -> RunState:
    if status is None:
        return RunState(State.WAITING, iteration, speed)
    code, reason = status.get("exit_code"), shown(status.get("reason"))
    if code is None:
        return RunState(State.STALE, iteration, speed, reason="its process is gone")
    saved = status.get("iteration")
    if isinstance(saved, int) and not isinstance(saved, bool) and saved >= 0:
        iteration = saved
    state = State.WAITING if code in RETRIED else State.FAILED
    exit_code = code if isinstance(code, int) else None
    return RunState(state, iteration, speed, reason=reason, exit_code=exit_code)


def _last_timing(path: Path) -> tuple[int, float | None]:
    """Return the iteration and images/s of the last line that has both."""
    try:
        lines = last_lines(path)
    except FileNotFoundError:
        return 0, None
    for line in reversed(lines):
        try:
            values = json.loads(line)
            iteration, speed = int(values["iteration"]), float(values["images_per_second"])
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            continue  # another event, or a line that is being written
        if iteration >= 0 and 0 < speed < float("inf"):
            return iteration, speed
    return 0, None
