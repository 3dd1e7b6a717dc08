"""`resnet-ddp grid task`: the runs of one task of an array, inside its Slurm job.

The same supervisor as on one machine. When the job's time ends, or a node is wanted for something
else, the runs save, and this task, not its array, is requeued; the index keeps its runs, because
they stand in the script that Slurm keeps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from resnet_ddp.cores import physical_cores
from resnet_ddp.exits import ExitCode, TemporaryError, UserError
from resnet_ddp.grid.cells import Grid, GridCell, read_cells
from resnet_ddp.grid.display import PlainDisplay
from resnet_ddp.grid.lives import Lives
from resnet_ddp.grid.local import train_options
from resnet_ddp.grid.queue import last_line, squeue
from resnet_ddp.grid.slots import Slot, find_slots, visible_gpus
from resnet_ddp.grid.states import State, read_states
from resnet_ddp.grid.supervisor import Supervisor
from resnet_ddp.lease import Observer
from resnet_ddp.options import DEVICES, GridTaskOptions, as_arguments
from resnet_ddp.stop import STOP_FILE_REASON, Deadline, StopRequest, slurm_deadline, slurm_job

LOG_LINK = "slurm.log"  # in a run's directory: the log of its newest job
OUTAGE = 1800.0  # seconds in which a controller that does not answer may come back
OUTAGE_PAUSE = 10.0  # seconds between two attempts
PATIENCE = 30.0  # seconds for one of Slurm's commands
# How Slurm ends a job that may be requeued all the same; one that a person cancelled stays so.
REQUEUED_REASONS = ("TimeLimit",)


def run(options: GridTaskOptions, grid: Grid, *, prepare: Callable[[], object]) -> ExitCode:
    """Train the runs of this task until they are done or the job has to end.

    Args:
        prepare: makes sure of the data.

    Returns:
        DONE; FAILED if a run was given up; STOPPED if one wants more time, requeued or not.

    Raises:
        UserError: bad options, or this is no Slurm job.
    """
    grid = dataclasses.replace(grid, chosen=read_cells(options.cells))
    job = slurm_job(os.environ)
    if job is None:
        raise UserError("grid task is for Slurm jobs; here, use grid run or train")
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    moment = datetime.now().astimezone().isoformat(timespec="seconds")
    say(f"--- {moment} job {job} on {platform.node()}, restart {restarts}: {options.cells}")
    for cell in grid.cells:
        link_log(grid.path(cell))
    failed: list[GridCell] = []
    if restarts == "0" and not options.keep_lives:  # a person asked for these runs
        for cell in grid.cells:
            Lives(grid.path(cell), is_kept=True).forget()
    else:
        states = read_states(grid, Observer())
        failed = [cell for cell in grid.cells if states[cell].state is State.FAILED]
        for cell in failed:
            say(f"{cell.name}: failed before, not tried again: {states[cell].reason}")
        left = tuple(cell for cell in grid.cells if cell not in failed)
        grid = dataclasses.replace(grid, chosen=left)
    prepare()
    deadlines = [slurm_deadline()]
    if options.max_minutes is not None:
        deadlines.append(Deadline("--max-minutes", 60 * options.max_minutes))
    stop = StopRequest(None, *(one for one in deadlines if one is not None))

    def command(cell: GridCell, slot: Slot) -> Sequence[str]:
        train = dataclasses.replace(
            train_options(options, grid, cell, slot, None), copy_data_to=options.copy_data_to
        )
        if options.srun:  # how many there are, the job says
            train = dataclasses.replace(train, srun=True, processes=1)
        return [sys.executable, "-m", "resnet_ddp", "train", *as_arguments(train)]

    with contextlib.closing(PlainDisplay()) as display, stop.listening():
        slots = room(options)
        supervisor = Supervisor(grid, slots, command, display, stop, keeps_lives=True)
        supervisor.run()
        code = conclude(supervisor, job)
    return ExitCode.FAILED if failed and code is ExitCode.DONE else code


def conclude(supervisor: Supervisor, job: str) -> ExitCode:
    """Say how the runs came out, and have the job requeued if one of them wants more time.

    Called while signals are still heard: Slurm's own must not end this process before it is done.
    """
    unfinished = []
    for cell, state in supervisor.states.items():
        stopped_by = supervisor.put_aside.get(cell, "")
        if state.state is State.DONE or cell in supervisor.given_up:
            continue
        if stopped_by == STOP_FILE_REASON:
            say(f"{cell.name}: stays as it is, stopped by {stopped_by}; submit it again to go on")
            continue
        unfinished.append(cell)
    if unfinished:
        names = ", ".join(cell.name for cell in unfinished)
        trouble = requeue(job)
        if trouble:
            say(f"{names}: saved; {trouble}; grid submit goes on")
        else:
            say(f"{names}: saved, job {job} is requeued")
        return ExitCode.STOPPED
    if supervisor.given_up:
        return ExitCode.FAILED
    return ExitCode.STOPPED if supervisor.put_aside else ExitCode.DONE


def requeue(job: str) -> str:
    """Have Slurm run this job again; return why it will not, or "".

    While the controller does not answer, it cannot end the job either: it is waited for.
    """
    if shutil.which("scontrol") is None:
        return "there is no scontrol on this machine"
    until = time.monotonic() + OUTAGE
    while True:
        try:
            return requeue_once(job)
        except TemporaryError as error:
            if "Invalid job id" in str(error):
                return "the job is gone"
            if time.monotonic() > until:
                return str(error)
            say(f"{error}; asking again")
        time.sleep(OUTAGE_PAUSE)


def requeue_once(job: str) -> str:
    """Do it, unless Slurm is ending the job by itself.

    Raises:
        TemporaryError: the controller does not answer.
    """
    _, _, state, reason, _, _ = (
        squeue(f"--jobs={job}", patience=PATIENCE).strip() or "|" * 5
    ).split("|", 5)
    if state not in ("RUNNING", "COMPLETING", "SUSPENDED"):
        return f"the job is {state or 'gone'}"
    if state == "COMPLETING" and reason not in REQUEUED_REASONS:
        # Requeueing would bring back what a person cancelled.
        return "the job was cancelled, or Slurm requeues it by itself"
    try:
        process = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=PATIENCE
        )
    except OSError as error:
        return f"scontrol: {error.strerror}"
    except subprocess.TimeoutExpired:
        raise TemporaryError("scontrol did not answer") from None
    if process.returncode == 0:
        return ""
    answer = last_line(process.stdout + process.stderr)
    if "contact" in answer:  # "Unable to contact slurm controller"
        raise TemporaryError(answer)
    return f"not requeued: {answer}"


def room(options: GridTaskOptions) -> list[Slot]:
    """Return the task's GPUs or cores, shared out among as many runs as it has room for."""
    if options.srun:
        if options.devices not in DEVICES:
            raise UserError(f"--devices {options.devices}: with --srun, {', '.join(DEVICES)}")
        threads = int(os.environ.get("SLURM_CPUS_PER_TASK", "1"))
        return [Slot("all nodes of the job", options.devices, threads)]
    runs, each, processes = (
        options.runs_per_task,
        options.runs_per_device,
        options.processes_per_run,
    )
    num_gpus = len(visible_gpus()) if options.devices == "auto" else 0
    if each is None and num_gpus:
        each = -(-runs * processes // num_gpus)
    found = find_slots(
        options.devices, num_runs=runs, runs_per_device=each, processes_per_run=processes
    )
    cpus = os.environ.get("SLURM_CPUS_ON_NODE", "")
    if not cpus.isdecimal() or int(cpus) >= sum(map(len, physical_cores())):
        return found
    # Slurm gave fewer than this process could use: it counts, but does not confine.
    most = max(1, int(cpus) // processes)
    kept = [slot for slot in found if slot.device != "cpu"]
    kept += [slot for slot in found if slot.device == "cpu"][:most]
    threads = max(1, int(cpus) // (len(kept) * processes))
    return [dataclasses.replace(slot, threads=threads, cores=()) for slot in kept]


def link_log(directory: Path) -> None:
    """Have a run's directory point at the log of this job."""
    link = directory / LOG_LINK
    with contextlib.suppress(OSError):  # no /proc, or no right to: then there is no link
        log = Path(os.readlink("/proc/self/fd/1"))
        if log.is_file():
            directory.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(log, directory.resolve()))


def say(line: str) -> None:
    """Write a line into the job's log."""
    print(line, file=sys.stderr, flush=True)
