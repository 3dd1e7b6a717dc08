"""`resnet-ddp grid run` on this machine, and `grid status` of runs wherever they are."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields

from rich.console import Console

from resnet_ddp import extras
from resnet_ddp.exits import ExitCode
from resnet_ddp.grid.cells import Grid, GridCell, longest_first
from resnet_ddp.grid.display import make_display
from resnet_ddp.grid.picture import as_json, duration, picture, summary
from resnet_ddp.grid.queue import NO_QUEUE, look_at_queue
from resnet_ddp.grid.slots import Slot, find_slots
from resnet_ddp.grid.states import State, States, read_states, seconds_left
from resnet_ddp.grid.supervisor import Supervisor
from resnet_ddp.lease import Observer
from resnet_ddp.options import GridRunOptions, LocalTrainOptions, TrackOptions, as_arguments
from resnet_ddp.stop import Deadline, StopRequest, slurm_deadline

WATCH_INTERVAL = 2.0  # seconds
QUEUE_INTERVAL = 10.0  # seconds between two questions to Slurm's controller, which all users share
QUEUE_PATIENCE = 1.0  # seconds for its answer


def run(options: GridRunOptions, grid: Grid, *, prepare: Callable[[], object]) -> ExitCode:
    """Train what is not done.

    Args:
        prepare: makes sure of the data, before many runs look for it.

    Returns:
        DONE, FAILED if a run was given up, or STOPPED if some were saved before their end.

    Raises:
        UserError: the machine lacks what was asked for.
    """
    states = read_states(grid, Observer())
    open_cells = [cell for cell in grid.cells if states[cell].state is not State.DONE]
    where = grid.runs / grid.name
    if not open_cells and not options.dry_run:
        print(f"done: all {len(grid.cells)} runs of {where}")
        return ExitCode.DONE
    slots = find_slots(
        options.devices,
        # All of them: threads, and so bits, must not depend on how many are left by now.
        num_runs=len(grid.cells),
        runs_per_device=options.runs_per_device,
        processes_per_run=options.processes_per_run,
    )
    if options.dry_run:
        print(plan(grid, states, slots))
        return ExitCode.DONE
    if options.data_path == "ffcv":
        extras.check_ffcv()
    prepare()
    deadlines = [slurm_deadline()]
    if options.max_minutes is not None:
        deadlines.append(Deadline("--max-minutes", 60 * options.max_minutes))
    stop = StopRequest(None, *(one for one in deadlines if one is not None))
    began = time.monotonic()

    def command(cell: GridCell, slot: Slot) -> Sequence[str]:
        minutes = options.max_minutes
        if minutes is not None:
            minutes = max(0.0, minutes - (time.monotonic() - began) / 60)
        arguments = as_arguments(train_options(options, grid, cell, slot, minutes))
        return [sys.executable, "-m", "resnet_ddp", "train", *arguments]

    with contextlib.closing(make_display()) as display, stop.listening():
        supervisor = Supervisor(grid, slots, command, display, stop)
        code = supervisor.run()
    states = supervisor.states
    if code is ExitCode.DONE:
        print(f"done: all {len(grid.cells)} runs of {where}")
        return code
    Console(soft_wrap=True).print(picture(grid, states))
    if code is ExitCode.STOPPED:
        reason = stop.reason or next(iter(supervisor.put_aside.values()))
        print(f"stopped by {reason}, every run is saved; the same command goes on")
    else:
        print(f"{len(supervisor.given_up)} failed; mend that, and the same command goes on")
    return code


def train_options(
    options: GridRunOptions, grid: Grid, cell: GridCell, slot: Slot, minutes: float | None
) -> LocalTrainOptions:
    """Return what one run is started with."""
    # What is settled at a run's first start is kept: another share of the cores would be refused.
    is_new = not (grid.path(cell) / "config.json").exists()
    return LocalTrainOptions(
        model=cell.model,
        seed=cell.seed,
        data=options.data,
        recipe=grid.recipe.name,
        runs=str(grid.runs),
        grid=grid.name,
        precision=options.precision,
        device=slot.device,
        data_path=options.data_path,
        compile=options.compile,
        threads=slot.threads if is_new else None,
        log_every=options.log_every,
        eval_every=options.eval_every,
        save_every=options.save_every,
        max_minutes=minutes,
        processes=options.processes_per_run,
        **{field.name: getattr(options, field.name) for field in fields(TrackOptions)},
    )


def plan(grid: Grid, states: States, slots: Sequence[Slot]) -> str:
    """Say what would be trained, where, in which order, and when all would be done."""
    waiting = [
        cell
        for cell in longest_first(grid.cells)
        if states[cell].state not in (State.DONE, State.RUNNING)
    ]
    total = grid.recipe.iterations
    threads = "threads" if any(slot.threads > 1 for slot in slots) else "thread"
    lines = [
        f"{grid.runs / grid.name}, {grid.recipe.name}: {summary(states)}",
        f"{len(slots)} at a time: {', '.join(slot.name for slot in slots)}, "
        f"{max(slot.threads for slot in slots)} {threads} a process",
        *(
            f"{place:>3}. {cell.name:<18} from {states[cell].iteration:,}/{total:,}"
            for place, cell in enumerate(waiting, 1)
        ),
    ]
    left = seconds_left(grid, states, waiting, len(slots))
    if left is None:
        lines.append("estimated time: unknown, no run of this grid has been measured yet")
    else:
        lines.append(f"estimated time: {duration(left)}, from what was measured so far")
    return "\n".join(lines)


def show(grid: Grid, *, watch: bool, as_json_: bool) -> ExitCode:
    """Print how all runs stand, once or until interrupted."""
    observer, console = Observer(), Console(soft_wrap=True)
    queue, asked_at = NO_QUEUE, float("-inf")
    while True:
        states = read_states(grid, observer)
        if time.monotonic() - asked_at >= QUEUE_INTERVAL:
            queue = look_at_queue(grid, patience=QUEUE_PATIENCE)
            asked_at = time.monotonic()
        if as_json_:
            print(as_json(grid, states, queue), flush=True)
        else:
            if watch and console.is_terminal:
                console.clear()
            console.print(picture(grid, states, queue=queue))
        if not watch or all(state.state is State.DONE for state in states.values()):
            return ExitCode.DONE
        time.sleep(WATCH_INTERVAL)
