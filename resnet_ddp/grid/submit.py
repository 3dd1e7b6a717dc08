"""`resnet-ddp grid submit`: what is open of a grid as an array job, and a report after it."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from resnet_ddp import durable
from resnet_ddp.exits import ExitCode, TemporaryError, UserError
from resnet_ddp.grid import script
from resnet_ddp.grid.cells import Grid, GridCell, longest_first
from resnet_ddp.grid.lives import LIVES, Lives
from resnet_ddp.grid.queue import (
    NO_QUEUE,
    SUBMIT_PATIENCE,
    TASKS,
    Queue,
    last_line,
    read_queue,
    submissions,
)
from resnet_ddp.grid.site import DIRECTIVES, REPORT_INHERITS, Site, read_site, with_site
from resnet_ddp.grid.states import State, States, is_hopeless, read_states
from resnet_ddp.launcher import without_launch
from resnet_ddp.lease import Observer
from resnet_ddp.options import GridSubmitOptions, GridTaskOptions, as_arguments

RESUBMISSIONS = 3  # of --complete
NOTICE = 120.0  # seconds before its end that a task is told; a tenth of its time, if that is less
SHORT = 600.0  # seconds: the signal may come a minute early, too much of less than this
# sbatch's own variables for what stands in the scripts: they would win over it.
SBATCH_VARIABLES = {
    **{name: f"SBATCH_{name.upper()}" for name in ("partition", "account", "qos", "constraint")},
    "time": "SBATCH_TIMELIMIT",
    "gres": "SBATCH_GRES",
    "mem": "SBATCH_MEM_PER_NODE",
}
ALWAYS_OURS = ("ARRAY_INX", "JOB_NAME", "OPEN_MODE", "OUTPUT", "REQUEUE", "NO_REQUEUE", "SIGNAL",
               "COMMENT", "EXPORT")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scripts:
    """What is submitted: an array's script, the runs of each index, and the report's script."""

    array: str
    tasks: Sequence[Sequence[GridCell]]
    report: str


def submit(options: GridSubmitOptions, grid: Grid, *, prepare: Callable[[], object]) -> ExitCode:
    """Submit what is neither done nor queued nor running.

    Args:
        prepare: makes sure of the data, here, where there is a network.

    Returns:
        DONE, also if there is nothing to submit because all is done or under way; FAILED if what is
        left cannot be helped by submitting it.

    Raises:
        UserError: bad options or site file, no Slurm, or sbatch refuses.
        TemporaryError: Slurm does not answer.
    """
    site = read_site(options.site)
    options = with_site(options, site)
    check(options)
    if options.dry_run:
        queue = read_queue(grid) if shutil.which("squeue") else NO_QUEUE
        cells, line = choose(options, grid, queue)
        print(line)
        if cells:
            scripts = fill(options, grid, site, cells, submissions(grid).absolute() / "N")
            print(f"\n# {submissions(grid)}/N/array.sbatch\n{scripts.array}", end="")
            print(f"\n# {submissions(grid)}/N/report.sbatch\n{scripts.report}", end="")
        return ExitCode.DONE
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch on this machine: submit where you log in to the cluster"
        )
    submissions(grid).mkdir(parents=True, exist_ok=True)
    with durable.locked(submissions(grid) / "lock"):  # two at a time would submit the same twice
        queue = read_queue(grid)
        cells, line = choose(options, grid, queue)
        if not cells:
            print(line)
            is_helped = queue.tasks or line.startswith("done:")
            return ExitCode.DONE if is_helped else ExitCode.FAILED
        prepare()
        directory = new_directory(submissions(grid))
        scripts = fill(options, grid, site, cells, directory.resolve())
        durable.write_bytes(
            directory / "array.sbatch", scripts.array.encode(errors="surrogateescape")
        )
        durable.write_bytes(
            directory / "report.sbatch", scripts.report.encode(errors="surrogateescape")
        )
        words = [",".join(cell.word for cell in task) for task in scripts.tasks]
        durable.write_json(directory / TASKS, words)
        hand_over(options, directory, queue, line, len(scripts.tasks))
    return ExitCode.DONE


def check(options: GridSubmitOptions) -> None:
    """Refuse what does not go together.

    Raises:
        UserError: with the options.
    """
    is_multinode = bool(options.nodes or options.ntasks_per_node)
    if is_multinode and (options.runs_per_task or 1) > 1:
        raise UserError("--runs-per-task shares one node's GPU: leave it or --nodes away")
    if is_multinode and options.processes_per_run > 1:
        raise UserError("--nodes: say --ntasks-per-node instead of --processes-per-run")
    try:
        script.read_sbatch_options(options.sbatch or "")
    except ValueError as error:
        raise UserError(f"--sbatch: {error}") from error
    for name in ("partition", "account", "qos", "time", "gres", "constraint", "mem"):
        if getattr(options, name) == "":
            raise UserError(f"--{name}: it is empty; leave it away")


def choose(options: GridSubmitOptions, grid: Grid, queue: Queue) -> tuple[list[GridCell], str]:
    """Return the runs to submit, longest first, and a line on them and the others."""
    states = read_states(grid, Observer())
    open_cells, left_out = [], []
    for cell in longest_first(grid.cells):
        state = states[cell]
        if state.state in (State.DONE, State.RUNNING) or cell in queue.tasks:
            continue
        # What a person asks for is tried once more; a job by itself would try for ever.
        is_given_up = options.resubmission > 0 and (
            state.state is State.FAILED or Lives(grid.path(cell), is_kept=True).are_spent
        )
        if is_hopeless(state):
            left_out.append(f"{cell.name} has failed for good: {state.reason}")
        elif is_given_up:
            left_out.append(f"{cell.name} is given up: {state.reason or f'{LIVES} lives in vain'}")
        else:
            open_cells.append(cell)
    return open_cells, "\n".join([_summary(grid, states, queue, open_cells), *left_out])


def _summary(grid: Grid, states: States, queue: Queue, cells: Sequence[GridCell]) -> str:
    num_done = sum(state.state is State.DONE for state in states.values())
    if num_done == len(states):
        return f"done: all {len(states)} runs of {grid.directory}"
    num_running = sum(state.state is State.RUNNING for state in states.values())
    num_queued = sum(
        state.state not in (State.DONE, State.RUNNING) and cell in queue.tasks
        for cell, state in states.items()
    )
    counts = f"{num_done} done, {num_running} running, {num_queued} queued of {len(states)}"
    what = f"{len(cells)} to submit" if cells else "nothing to submit"
    return f"{grid.directory}: {what}, {counts}"


def fill(
    options: GridSubmitOptions,
    grid: Grid,
    site: Site,
    cells: Sequence[GridCell],
    directory: Path,
) -> Scripts:
    """Fill in the scripts.

    Args:
        cells: longest first.
        directory: of this submission, absolute.
    """
    each = options.runs_per_task or 1
    tasks = [cells[start : start + each] for start in range(0, len(cells), each)]
    is_multinode = bool(options.nodes or options.ntasks_per_node)
    limit = f"%{options.array_limit}" if options.array_limit else ""
    directives: dict[str, str | None] = {
        "job-name": f"resnet-ddp {grid.name}",
        "array": f"0-{len(tasks) - 1}{limit}",
        "output": _pattern(directory) + "/task-%a.log",
        "comment": str(directory),
        **_directives(options),
    }
    if options.time is not None and (seconds := read_time(options.time)) is not None:
        notice = min(NOTICE, seconds / 10)
        directives["signal"] = f"B:USR1@{notice:.0f}" if seconds > SHORT else None
    if is_multinode:
        directives["nodes"] = str(options.nodes or 1)
        directives["ntasks-per-node"] = str(options.ntasks_per_node or 1)
    others = script.read_sbatch_options(options.sbatch or "")
    if "no-requeue" in others:
        directives["requeue"] = None
    directives |= others
    array = script.template("multinode.sbatch" if is_multinode else "array.sbatch")
    array = script.with_directives(array, directives)
    words = [",".join(cell.word for cell in task) for task in tasks]
    array = script.with_variable(array, "tasks", words)
    array = script.with_variable(array, "options", task_arguments(options, grid))
    if site.scratch is not None:
        array = script.with_variable(array, "scratch", f'"{site.scratch}"')
    if site.copy_data:
        array = script.with_variable(array, "copy_data", "yes")
    return Scripts(
        script.with_setup(array, site.setup), tasks, _fill_report(options, grid, site, directory)
    )


def _fill_report(options: GridSubmitOptions, grid: Grid, site: Site, directory: Path) -> str:
    inherited = {name: getattr(options, name) for name in REPORT_INHERITS}
    values = {**inherited, **site.report}
    directives: dict[str, str | None] = {
        "job-name": f"resnet-ddp report {grid.name}",
        "output": _pattern(directory) + "/report.log",
        "comment": str(directory),
        **{_flag(name): str(values[name]) for name in DIRECTIVES if values.get(name) is not None},
        **script.read_sbatch_options(values.get("sbatch") or ""),
    }
    report = script.with_directives(script.template("report.sbatch"), directives)
    report = script.with_variable(report, "runs", shlex.quote(str(grid.directory)))
    arguments = [f"--out={grid.directory / 'report'}"]
    arguments += [f"--models={options.models}", f"--seeds={options.seeds}"]
    report = script.with_variable(report, "options", arguments)
    if options.complete and options.resubmission < RESUBMISSIONS:
        again = dataclasses.replace(options, resubmission=options.resubmission + 1)
        report = script.with_variable(report, "resubmit", said(again))
    return script.with_setup(report, site.setup)


def task_arguments(options: GridSubmitOptions, grid: Grid) -> list[str]:
    """Return the arguments of `grid task` that all tasks share."""
    shared = {field.name for field in dataclasses.fields(GridTaskOptions)}
    values = {name: value for name, value in _values(options).items() if name in shared}
    values |= {"grid": grid.name, "dry_run": False}
    # The array says which runs there are.
    for name in ("models", "seeds"):
        del values[name]
    values["runs_per_task"] = options.runs_per_task or 1
    task = GridTaskOptions(**values, cells="", keep_lives=options.resubmission > 0)
    always = ("grid", "data", "recipe", "runs")
    return [one for one in said(task, *always) if not one.startswith("--cells")]


def said(options: Any, *always: str) -> list[str]:
    """Return the arguments in which options differ from their defaults, and those named."""
    fields = {field.name: field for field in dataclasses.fields(options)}
    default = {
        name: None if name not in always and value == fields[name].default else value
        for name, value in _values(options).items()
    }
    return as_arguments(dataclasses.replace(options, **default))


def hand_over(
    options: GridSubmitOptions, directory: Path, queue: Queue, line: str, num_tasks: int
) -> None:
    """Have sbatch take both scripts, and print their ids.

    Raises:
        UserError: it refuses.
        TemporaryError: it does not answer.
    """
    environment = clean_environment(os.environ, options)
    try:
        array = sbatch(directory / "array.sbatch", environment)
    except UserError:
        shutil.rmtree(directory)  # nothing came of it
        raise
    print(f"{line}\njob {array}: {num_tasks} task{'s' * (num_tasks > 1)}, logs in {directory}")
    # What others of this grid still train belongs into the report too.
    others = sorted({task.job for task in queue.tasks.values()} - {array}, key=int)
    dependency = f"--dependency=afterany:{':'.join([array, *others])}"
    try:
        report = sbatch(directory / "report.sbatch", environment, dependency)
    except UserError as error:
        raise UserError(
            f"{error}. The array is submitted; when it is over: resnet-ddp report "
            f"{directory.parents[1]}"
        ) from error
    print(f"job {report}: the report, when {'they are' if others else 'it is'} over")
    print(f"how they stand: resnet-ddp grid status; to end both: scancel {array} {report}")


def sbatch(path: Path, environment: Mapping[str, str], *options: str) -> str:
    """Submit a script and return the job's id.

    Raises:
        UserError: sbatch refuses, or is not there.
        TemporaryError: it does not answer; perhaps the job is submitted.
    """
    try:
        process = subprocess.run(
            ["sbatch", "--parsable", *options, str(path)],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SUBMIT_PATIENCE,
        )
    except OSError as error:
        raise UserError(f"sbatch: {error.strerror}") from error
    except subprocess.TimeoutExpired:
        raise TemporaryError(
            f"sbatch did not answer within {SUBMIT_PATIENCE:g} s; the same command submits what is "
            "not queued by then"
        ) from None
    job = process.stdout.strip().partition(";")[0]
    if process.returncode == 0 and job.isdecimal():
        return job
    answer = last_line(process.stderr).removeprefix("sbatch: ").removeprefix("error: ")
    if "contact" in answer or "timed out" in answer:
        raise TemporaryError(f"sbatch: {answer}; try again later")
    raise UserError(f"sbatch refuses {path.name}: {answer}")


def clean_environment(environment: Mapping[str, str], options: GridSubmitOptions) -> dict[str, str]:
    """Return what the jobs inherit: nothing of a job or a launch that this may run in.

    Slurm's own variables of a job (its memory, its tasks) would be taken for wishes; its clients'
    settings stay, and so do sbatch's defaults of the user's where the scripts say nothing.
    """
    said_here = {SBATCH_VARIABLES[name] for name in SBATCH_VARIABLES if getattr(options, name)}
    said_here |= {f"SBATCH_{name}" for name in ALWAYS_OURS}
    return {
        name: value
        for name, value in without_launch(environment).items()
        if name not in said_here
        and (not name.startswith(("SLURM_", "SRUN_")) or name in ("SLURM_CONF", "SLURM_CLUSTERS"))
        and name not in ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES")
    }


def new_directory(parent: Path) -> Path:
    """Make the next of the numbered directories."""
    numbers = [int(path.name) for path in parent.iterdir() if path.name.isdecimal()]
    directory = parent / str(max(numbers, default=0) + 1)
    directory.mkdir()
    return directory


def read_time(text: str) -> float | None:
    """Return the seconds of a time limit in Slurm's ways to write one, None if it is none.

    minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes,
    days-hours:minutes:seconds.
    """
    days, dash, rest = text.rpartition("-")
    if not re.fullmatch(r"\d+(:\d+){0,2}", rest) or (dash and not days.isdecimal()):
        return None
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return float(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)


def _values(options: Any) -> dict[str, Any]:
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _directives(options: GridSubmitOptions) -> dict[str, str]:
    values = {name: getattr(options, name) for name in DIRECTIVES}
    return {_flag(name): str(value) for name, value in values.items() if value is not None}


def _pattern(path: Path) -> str:
    """Return a path as sbatch's --output takes it, where a % stands for something else."""
    return str(path).replace("%", "%%")
