"""The grid for a person: a table of models and seeds, and a line for each run that is running."""

from __future__ import annotations

import json
from collections import Counter
from datetime import timedelta

from rich.console import Group
from rich.table import Table
from rich.text import Text

from resnet_ddp.grid.cells import Grid, GridCell
from resnet_ddp.grid.states import RunState, State, States

STYLES = {
    State.DONE: "green",
    State.RUNNING: "cyan",
    State.WAITING: "default",
    State.STALE: "yellow",
    State.FAILED: "bold red",
}


def picture(grid: Grid, states: States, note: str = "") -> Group:
    """Return the whole: a cell a run, then who is running, then what went wrong."""
    title = Text(f"{grid.runs / grid.name}, {grid.recipe.name}")
    table = Table()
    table.add_column("")
    for seed in grid.seeds:
        table.add_column(f"seed {seed}", justify="right", no_wrap=True)
    for model in grid.models:
        states_here = [states[GridCell(model, seed)] for seed in grid.seeds]
        table.add_row(model, *(_in_short(state, grid) for state in states_here))
    lines = [Text(line) for line in [*running_lines(grid, states), *troubles(states)]]
    return Group(title, table, *lines, Text(f"{summary(states)}{note and '; '}{note}"))


def _in_short(state: RunState, grid: Grid) -> Text:
    """Return a run in a word; colour never says what the word does not."""
    share = f"{state.iteration / grid.recipe.iterations:.0%}"
    words = {
        State.DONE: f"{state.test_error_rate or 0:.2%}",
        State.RUNNING: f"> {share}",
        State.WAITING: share if state.iteration else "-",
        State.STALE: f"stale {share}",
        State.FAILED: "failed",
    }
    return Text(words[state.state], style=STYLES[state.state])


def running_lines(grid: Grid, states: States) -> list[str]:
    """Return a line for each run that is running."""
    lines = []
    for cell, state in states.items():
        if state.state is State.RUNNING:
            speed = state.images_per_second
            speed_text = "starting" if speed is None else f"{speed:,.0f} images/s"
            left = "" if state.seconds_left is None else f"  {duration(state.seconds_left)} left"
            where = f"{state.iteration:,}/{grid.recipe.iterations:,}"
            lines.append(f"{cell.name:<18} {where:>15}  {speed_text}{left}  ({state.holder})")
    return lines


def troubles(states: States) -> list[str]:
    """Return a line for each run that needs a person, or had an end that one should know of."""
    return [
        f"{cell.name}: {state.state}, {state.reason}"
        for cell, state in states.items()
        if state.reason and state.state in (State.FAILED, State.STALE)
    ]


def summary(states: States) -> str:
    """Return how many are in which state."""
    counts = Counter(state.state for state in states.values())
    parts = [f"{counts[state]} {state}" for state in State if counts[state]]
    return f"{', '.join(parts)} of {len(states)}"


def as_json(grid: Grid, states: States) -> str:
    """Return all that is known, for programs."""
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
        }
        for cell, state in states.items()
    ]
    return json.dumps({"grid": grid.name, "recipe": grid.recipe.name, "cells": cells}, indent=2)


def duration(seconds: float) -> str:
    """Return seconds as a person reads them."""
    return str(timedelta(seconds=round(seconds)))
