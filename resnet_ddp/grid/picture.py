"""The grid for a person: a table of models and seeds, and a line for each run that is running."""

from __future__ import annotations

import json
from collections import Counter
from datetime import timedelta

from rich.console import Group
from rich.table import Table
from rich.text import Text

from resnet_ddp.grid.cells import Grid, GridCell
from resnet_ddp.grid.queue import NO_QUEUE, Queue, Task
from resnet_ddp.grid.states import RunState, State, States

STYLES = {
    State.DONE: "green",
    State.RUNNING: "cyan",
    State.WAITING: "default",
    State.STALE: "yellow",
    State.FAILED: "bold red",
}
AT_REST = (State.WAITING, State.STALE, State.FAILED)  # nobody trains it


def picture(grid: Grid, states: States, note: str = "", queue: Queue = NO_QUEUE) -> Group:
    """Return the whole: a cell a run, then who is running, then what is queued or went wrong."""
    title = Text(f"{grid.runs / grid.name}, {grid.recipe.name}")
    table = Table()
    table.add_column("")
    for seed in grid.seeds:
        table.add_column(f"seed {seed}", justify="right", no_wrap=True)
    for model in grid.models:
        cells = [GridCell(model, seed) for seed in grid.seeds]
        words = (_in_short(states[cell], grid, queue.tasks.get(cell)) for cell in cells)
        table.add_row(model, *words)
    lines = [
        *running_lines(grid, states, queue),
        *queued_lines(states, queue),
        *troubles(states, queue),
    ]
    if queue.silence:
        lines.append(f"what is queued is not known: {queue.silence}")
    end = Text(f"{summary(states)}{note and '; '}{note}")
    return Group(title, table, *(Text(line) for line in lines), end)


def _in_short(state: RunState, grid: Grid, task: Task | None) -> Text:
    """Return a run in a word; colour never says what the word does not."""
    share = f"{state.iteration / grid.recipe.iterations:.0%}"
    if task is not None and state.state in AT_REST:
        word = "queued" if task.is_waiting else "starting"
        return Text(f"{word} {share}" if state.iteration else word, style="blue")
    words = {
        State.DONE: f"{state.test_error_rate or 0:.2%}",
        State.RUNNING: f"> {share}",
        State.WAITING: share if state.iteration else "-",
        State.STALE: f"stale {share}",
        State.FAILED: "failed",
    }
    return Text(words[state.state], style=STYLES[state.state])


def running_lines(grid: Grid, states: States, queue: Queue = NO_QUEUE) -> list[str]:
    """Return a line for each run that is running, or that its job is about to begin."""
    lines = []
    for cell, state in states.items():
        task = queue.tasks.get(cell)
        job = "" if task is None or task.is_waiting else f", job {task.name} on {task.nodes}"
        if job and state.state in AT_REST:
            where = f"{state.iteration:,}/{grid.recipe.iterations:,}"
            lines.append(f"{cell.name:<18} {where:>15}  starting  ({job.removeprefix(', ')})")
        if state.state is State.RUNNING:
            speed = state.images_per_second
            speed_text = "starting" if speed is None else f"{speed:,.0f} images/s"
            left = "" if state.seconds_left is None else f"  {duration(state.seconds_left)} left"
            where = f"{state.iteration:,}/{grid.recipe.iterations:,}"
            lines.append(f"{cell.name:<18} {where:>15}  {speed_text}{left}  ({state.holder}{job})")
    return lines


def queued_lines(states: States, queue: Queue) -> list[str]:
    """Return a line for each job, and reason of Slurm's, that runs wait for."""
    waiting = Counter(
        (task.job, task.reason)
        for cell, task in queue.tasks.items()
        if task.is_waiting and states[cell].state in AT_REST
    )
    lines = [
        f"job {job}: {count} run{'s' * (count > 1)} queued ({reason})"
        for (job, reason), count in waiting.items()
    ]
    for task in queue.reports:
        how = f"queued ({task.reason})" if task.is_waiting else f"on {task.nodes}"
        lines.append(f"job {task.job}: the report, {how}")
    return lines


def troubles(states: States, queue: Queue = NO_QUEUE) -> list[str]:
    """Return a line for each run that needs a person, or had an end that one should know of."""
    return [
        f"{cell.name}: {state.state}, {state.reason}"
        for cell, state in states.items()
        if state.reason and state.state in (State.FAILED, State.STALE) and cell not in queue.tasks
    ]


def summary(states: States) -> str:
    """Return how many are in which state."""
    counts = Counter(state.state for state in states.values())
    parts = [f"{counts[state]} {state}" for state in State if counts[state]]
    return f"{', '.join(parts)} of {len(states)}"


def as_json(grid: Grid, states: States, queue: Queue = NO_QUEUE) -> str:
    """Return all that is known, for programs."""

    def task(cell: GridCell) -> dict[str, str] | None:
        found = queue.tasks.get(cell)
        if found is None:
            return None
        return {
            "job": found.name,
            "state": found.state,
            "reason": found.reason,
            "nodes": found.nodes,
        }

    cells = [
        {
            "model": cell.model,
            "seed": cell.seed,
            "path": str(grid.path(cell)),
            "state": state.state,
            "iteration": state.iteration,
            "iterations": grid.recipe.iterations,
            "images_per_second": state.images_per_second,
            "seconds_left": state.seconds_left,
            "test_error_rate": state.test_error_rate,
            "reason": state.reason,
            "holder": state.holder,
            "slurm": task(cell),
        }
        for cell, state in states.items()
    ]
    return json.dumps(
        {
            "grid": grid.name,
            "recipe": grid.recipe.name,
            "slurm_silence": queue.silence,
            "cells": cells,
        },
        indent=2,
    )


def duration(seconds: float) -> str:
    """Return seconds as a person reads them."""
    return str(timedelta(seconds=round(seconds)))
