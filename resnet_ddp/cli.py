"""The command line: `resnet-ddp`, and `train.py`, its `train` behind a launcher.

A wrong command line, missing data and a run that is done are answered before torch is imported.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from resnet_ddp import __version__, datasets, durable, extras
from resnet_ddp.architectures import ARCHITECTURES, PAPER_MODELS
from resnet_ddp.durable import disk_errors_named
from resnet_ddp.exits import Exit, ExitCode, UserError
from resnet_ddp.grid.cells import Grid, read_models, read_seeds
from resnet_ddp.launcher import end_with_launcher, is_alone, is_main_process, launch
from resnet_ddp.limits import MAX_THREADS
from resnet_ddp.options import (
    DEVICES,
    MAX_PROCESSES,
    GridOptions,
    GridRunOptions,
    GridStatusOptions,
    GridSubmitOptions,
    GridTaskOptions,
    LocalTrainOptions,
    Parser,
    TrackOptions,
    TrainOptions,
    add_options,
    as_arguments,
    option,
    read_options,
)
from resnet_ddp.published import HE_ET_AL
from resnet_ddp.recipe import HE2015, RECIPES
from resnet_ddp.records import read_run
from resnet_ddp.runs import Cell, RunDirectory, check_grid_name, shown
from resnet_ddp.srun import launch_with_srun, ranks_by_node, take_place
from resnet_ddp.tracking.plan import WANDB, make_plans

DATA_ROOT = Path("data")  # where data sets known by name lie
REPORT_INTERVAL = 10.0  # seconds between two reports of --watch
NAMED_DATA = ("shapes", "cifar10", "cifar100")


@dataclass(frozen=True)
class PrepareOptions:
    """Turn images on disk into a prepared directory: train.beton, test.beton, dataset.json."""

    source: str = option(
        metavar="SOURCE",
        choices=("folder", "beton", "cifar10", "cifar100"),
        help="folder: images at train|test/<class>/*.png|jpg; beton: a folder with train.beton and "
        "test.beton, as FFCV writes them; cifar10, cifar100: as published",
    )
    from_: str | None = option(
        None,
        metavar="PATH",
        help="a folder, or an archive (.tar, .tar.gz, .tar.xz, .zip); without it, download",
    )
    to: str = option(None, metavar="DIR", required=True, help="the directory to make")


@dataclass(frozen=True)
class PushOptions(TrackOptions):
    """Copy what a tracker misses of runs: after an outage, from an offline cluster, or all."""

    directory: str = option(
        "runs", positional=True, metavar="RUNS", help="a directory of runs, of grids, or one run"
    )


@dataclass(frozen=True)
class ReportOptions(TrackOptions):
    """Write the paper's table and its Fig. 6 from what was trained so far."""

    directory: str = option(
        "runs", positional=True, metavar="RUNS", help="a directory of runs, of grids, or one run"
    )
    out: str = option("report", metavar="DIR", help="the directory to write to")
    watch: bool = option(False, help="write it again as runs go on, until all are done")
    models: str = option(
        ",".join(PAPER_MODELS), metavar="LIST", help="that there should be; default: the paper's"
    )
    seeds: str = option("0-4", metavar="LIST", help="that there should be: 0-4, or 0,2,7-9")


@dataclass(frozen=True)
class BenchOptions:
    """Measure our speed side by side with a stock loop: all five networks, or one."""

    model: str | None = option(
        None,
        metavar="MODEL",
        choices=(*ARCHITECTURES, "data"),
        positional=True,
        help="default: all five; data: the ways to load images, without a network",
    )
    data: str = option("shapes", metavar="DIR", help="as for train")
    device: str = option("auto", choices=DEVICES, help="as for train")
    compile: bool | None = option(None, help="measure compiled nets; default: if that works here")
    threads: int | None = option(
        None, minimum=1, maximum=MAX_THREADS, metavar="N", help="CPU threads of all contenders"
    )
    turns: int = option(5, minimum=1, metavar="N", help="how often the contenders take turns")
    quick: bool = option(False, help="ResNet-20, short turns, no starts: under two minutes")
    trace: str | None = option(
        None, metavar="FILE", help="write a profile instead, for https://ui.perfetto.dev"
    )
    out: str | None = option(None, metavar="DIR", help="also write bench.json and bench.md there")
    json: bool = option(False, help="print JSON instead of a table")


@dataclass(frozen=True)
class AuditOptions:
    """Prove the recipe assertion by assertion, or what a run's records say was really trained."""

    run: str | None = option(
        None, metavar="RUN", positional=True, help="a run directory; default: the recipe itself"
    )
    processes: int = option(
        1,
        minimum=1,
        maximum=MAX_PROCESSES,
        metavar="W",
        help="train on W processes and on one, and compare",
    )
    srun: bool = option(False, help="the same with all processes of this Slurm job, all nodes")
    device: str = option("auto", choices=DEVICES, help="of --processes")
    json: bool = option(False, help="print JSON instead of text")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `resnet-ddp` and return its exit code."""
    parser = Parser(prog="resnet-ddp", description=sys.modules["resnet_ddp"].__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    add_commands(
        parser,
        {
            "prepare": (PrepareOptions, prepare),
            "train": (LocalTrainOptions, train_locally),
            "grid": {
                "run": (GridRunOptions, grid_run),
                "submit": (GridSubmitOptions, grid_submit),
                "status": (GridStatusOptions, grid_status),
                "task": (GridTaskOptions, grid_task),
            },
            "report": (ReportOptions, report),
            "track": {"push": (PushOptions, track_push)},
            "bench": (BenchOptions, bench),
            "audit": (AuditOptions, audit),
        },
    )
    return _run(parser, argv)


def add_commands(parser: argparse.ArgumentParser, table: Mapping[str, Any]) -> None:
    """Add commands, each with its options and its function, and groups of commands."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for name, entry in table.items():
        if isinstance(entry, Mapping):
            help_line = f"{', '.join(entry)}: many runs"
            add_commands(commands.add_parser(name, help=help_line), entry)
            continue
        options, run = entry
        help_line = (options.__doc__ or "").strip()
        command = commands.add_parser(name, help=help_line, description=help_line)
        add_options(command, options)
        command.set_defaults(function=run, options=options)


def train_main(argv: Sequence[str] | None = None) -> int:
    """Run `train.py`, which is `resnet-ddp train` for launchers, and return its exit code."""
    parser = Parser(prog="train.py", description=TrainOptions.__doc__)
    add_options(parser, TrainOptions)
    parser.set_defaults(function=train, options=TrainOptions)
    return _run(parser, argv)


def _run(parser: Parser, argv: Sequence[str] | None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths hold what a terminal may not show
    namespace: argparse.Namespace = parser.parse_args(argv)
    function: Callable[[object], int] = namespace.function
    try:
        with disk_errors_named():
            return int(function(read_options(namespace, namespace.options)))
    except Exit as error:
        if not error.is_told:
            print(f"{parser.prog}: {error}", file=sys.stderr)
        return int(error.code)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130


def prepare(options: PrepareOptions) -> ExitCode:
    """Prepare a data set."""
    target = Path(options.to)
    if options.source in ("folder", "beton"):
        if options.from_ is None:
            what = {
                "folder": "a folder or an archive of images",
                "beton": "a folder with train.beton and test.beton",
            }
            raise UserError(f"prepare {options.source} needs --from PATH, {what[options.source]}")
        from resnet_ddp import sources

        is_folder = options.source == "folder"
        bring = sources.prepare_folder if is_folder else sources.prepare_beton
        print(bring(Path(options.from_), target))
        return ExitCode.DONE
    from resnet_ddp.cifar import download_and_prepare, prepare_cifar

    if options.from_ is None:
        print(download_and_prepare(options.source, target))
    else:
        print(prepare_cifar(options.source, Path(options.from_), target))
    return ExitCode.DONE


def train(options: TrainOptions) -> ExitCode:
    """Train one run, unless it is done."""
    end_with_launcher()
    plans = make_plans(options, os.environ)
    data_directory, directory = find_run(options)
    # Of several processes, one must not leave for a result that the others came too early to see.
    if not is_alone() or directory.result() is None:
        from resnet_ddp.trainer import train as train_run

        if options.copy_data_to is not None:
            data_directory = datasets.copy_once(data_directory, Path(options.copy_data_to))

        def load_data() -> datasets.Dataset:
            is_mapped = options.data_path == "ffcv"
            if is_mapped:
                extras.import_ffcv()
            try:
                return datasets.load_dataset(data_directory, mapped=is_mapped)
            except MemoryError as error:
                raise UserError(
                    f"{data_directory} does not fit into memory; --data-path ffcv leaves it on disk"
                ) from error

        code = train_run(options, directory, load_data, plans)
        if code is not ExitCode.DONE:
            return code
    if is_main_process():
        print(result_lines(directory))
    return ExitCode.DONE


def train_locally(options: LocalTrainOptions) -> int:
    """Train one run in this process, or in several of this machine."""
    take_place()
    end_with_launcher()
    is_launched = "RANK" in os.environ
    if options.srun and not is_launched and find_run(options)[1].result() is None:
        return launch_with_srun("resnet_ddp", ["train", *as_arguments(options)])
    if options.processes == 1 or is_launched or find_run(options)[1].result() is not None:
        return train(options)
    return launch(options.processes, "resnet_ddp", ["train", *as_arguments(options)])


def find_run(options: TrainOptions) -> tuple[Path, RunDirectory]:
    """Return the prepared directory and the run directory that the options name."""
    data_directory = find_data(options.data)
    data = datasets.read_record(data_directory)
    recipe = RECIPES[options.recipe]
    grid = options.grid or f"{data.name}-{recipe.name}"
    directory = RunDirectory(
        Path(options.runs), Cell(grid, options.model, options.seed, recipe, data)
    )
    directory.check_identity()
    if options.data_path == "ffcv" and directory.result() is None:
        extras.check_ffcv()
    return data_directory, directory


def grid_run(options: GridRunOptions) -> ExitCode:
    """Train the runs of a grid."""
    from resnet_ddp.grid import local

    return local.run(options, find_grid(options), prepare=lambda: find_data(options.data))


def grid_submit(options: GridSubmitOptions) -> ExitCode:
    """Hand the runs of a grid to Slurm."""
    from resnet_ddp.grid import submit

    return submit.submit(options, find_grid(options), prepare=lambda: find_data(options.data))


def grid_task(options: GridTaskOptions) -> ExitCode:
    """Train some runs of a grid inside a Slurm job."""
    from resnet_ddp.grid import task

    return task.run(options, find_grid(options), prepare=lambda: find_data(options.data))


def grid_status(options: GridStatusOptions) -> ExitCode:
    """Show the runs of a grid."""
    from resnet_ddp.grid import local

    return local.show(find_grid(options), watch=options.watch, as_json_=options.json)


def track_push(options: PushOptions) -> ExitCode:
    """Copy what is missing."""
    from resnet_ddp.tracking.push import push

    plans = make_plans(options, os.environ)
    return push(Path(options.directory), [plan for plan in plans if not plan.offline])


def report(options: ReportOptions) -> ExitCode:
    """Write the report and print its table."""
    from resnet_ddp.report.write import track, write

    # Only if asked: a report is often looked at, and seldom worth an entry there.
    plans = make_plans(options, os.environ) if options.track is not None else ()
    if any(plan.tracker != WANDB for plan in plans):
        raise UserError("report --track: it goes to wandb only")
    models, seeds = read_models(options.models), read_seeds(options.seeds)
    out = Path(options.out)
    code = write(Path(options.directory), out, models=models, seeds=seeds)
    while options.watch and code is not ExitCode.DONE:
        time.sleep(REPORT_INTERVAL)
        code = write(Path(options.directory), out, models=models, seeds=seeds)
    print((out / "table.md").read_text())
    print(out / "report.html")
    for plan in plans:
        track(Path(options.directory), out, plan, models=models, seeds=seeds)
    return code


def find_grid(options: GridOptions) -> Grid:
    """Return the grid that the options name; data with a name need not be there for it."""
    models, seeds = read_models(options.models), read_seeds(options.seeds)
    name = options.grid
    if name is None:
        has_name = options.data in NAMED_DATA
        data_name = options.data if has_name else datasets.read_record(Path(options.data)).name
        name = f"{data_name}-{options.recipe}"
    check_grid_name(name)
    return Grid(Path(options.runs), name, models, seeds, RECIPES[options.recipe])


def bench(options: BenchOptions) -> ExitCode:
    """Measure and print."""
    directory = find_data(options.data)
    if options.model == "data":
        return bench_data(options, directory)
    data = datasets.load_dataset(directory)
    from resnet_ddp import bench, machine

    device = machine.pick_device(options.device)
    can_compile = machine.missing_for_compile(device) is None
    compile = not options.quick and can_compile if options.compile is None else options.compile
    setting = bench.Setting(
        models=(options.model,) if options.model else PAPER_MODELS[: 1 if options.quick else None],
        data=data,
        device=device,
        compile=machine.settle_compile(device, compile),
        threads=options.threads or machine.pick_threads(),
        turns=options.turns,
        quick=options.quick,
    )
    if options.trace:
        bench.write_trace(setting, Path(options.trace))
        return ExitCode.DONE
    result = bench.run(
        setting, directory, say=lambda line: print(line, file=sys.stderr, flush=True)
    )
    show(options, "bench", result, bench.markdown(result))
    training = result["training"]
    return ExitCode.DONE if training is None or training["within_tolerance"] else ExitCode.FAILED


def bench_data(options: BenchOptions, directory: Path) -> ExitCode:
    """Measure the ways to load images."""
    if options.trace or options.compile:
        raise UserError("bench data has no network: leave --trace and --compile away")
    from resnet_ddp import bench_data, machine

    setting = bench_data.Setting(
        directory=directory,
        device=machine.pick_device(options.device),
        threads=options.threads or machine.pick_threads(),
        turns=options.turns,
        seconds=bench_data.QUICK_TURN if options.quick else bench_data.TURN,
    )
    result = bench_data.run(setting, say=lambda line: print(line, file=sys.stderr, flush=True))
    show(options, "bench-data", result, bench_data.markdown(result))
    return ExitCode.DONE


def show(options: BenchOptions, name: str, result: dict[str, Any], table: str) -> None:
    """Print what was measured, and write it where it was asked for."""
    as_json = json.dumps(result, indent=2)
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        durable.write_bytes(Path(options.out, f"{name}.json"), f"{as_json}\n".encode())
        durable.write_bytes(Path(options.out, f"{name}.md"), f"{table}\n".encode())
    print(as_json if options.json else table)


def audit(options: AuditOptions) -> int:
    """Audit the recipe, a run, or the equivalence of W processes and one."""
    from resnet_ddp.audit import checks, paper

    deviations: Sequence[checks.Deviation] = ()
    if options.processes > 1 or options.srun:
        from resnet_ddp.audit.together import run_together

        processes = len(ranks_by_node(os.environ)) if options.srun else options.processes
        found = run_together(processes, options.device, srun=options.srun)
    elif options.run is not None:
        from resnet_ddp.audit.trained import audit_run, deviations_of

        found, deviations = audit_run(options.run), deviations_of(options.run)
    else:
        from resnet_ddp.audit.recipe import run_audit

        found, deviations = run_audit(), paper.DEVIATIONS
    render = checks.as_json if options.json else checks.render
    print(render(found, deviations))
    return int(checks.verdict(found))


def find_data(data: str) -> Path:
    """Return the prepared directory behind `--data`; what has a name is prepared on first use."""
    if data not in NAMED_DATA:
        return Path(data)
    directory = DATA_ROOT / data
    if datasets.is_prepared(directory):
        return directory
    try:
        DATA_ROOT.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise UserError(
            f"{DATA_ROOT} is no directory: remove it, or name one with --data"
        ) from error
    with durable.locked(DATA_ROOT / f".{data}.lock"):  # a grid's first runs all come here at once
        if datasets.is_prepared(directory):
            return directory
        if data == "shapes":
            from resnet_ddp.shapes import prepare_shapes

            prepare_shapes(directory)
        else:
            from resnet_ddp.cifar import download_and_prepare

            print(download_and_prepare(data, directory), file=sys.stderr)
    return directory


def result_lines(directory: RunDirectory) -> str:
    """Say how a finished run came out: its error beside the paper's, its time, and where it is."""
    result = directory.result() or {}
    rate = result.get("test_error_rate")
    error = f"{rate:.2%}" if isinstance(rate, float) and 0 <= rate <= 1 else "unknown"
    iterations = result.get("iterations")
    if isinstance(iterations, int):
        iterations = f"{iterations:,}"
    return "\n".join(
        [
            f"done: test error {error} after {shown(iterations)} iterations; {beside(directory)}",
            f"time: {training_time(directory.path)}",
            f"in {directory.path}",
        ]
    )


def beside(directory: RunDirectory) -> str:
    """Say what the paper has for this network, and whether it may be compared."""
    cell = directory.cell
    published = HE_ET_AL.get(cell.model)
    if published is None:
        return "the paper has no such network"
    differs = []
    if cell.recipe.fields() != HE2015.fields():
        differs.append(f"by {HE2015.name}")
    if not cell.data.original:
        differs.append("on the original CIFAR-10")
    only = f", {' and '.join(differs)}" if differs else ""
    return f"He et al.: {published}%{only}"


def training_time(path: Path) -> str:
    """Return how long a run's steps took, and how fast they were, as far as it is known."""
    try:
        run = read_run(path)
    except (UserError, OSError):
        return "unknown"
    if run.training_seconds is None:
        return "unknown"
    images = run.iterations * run.config["recipe_fields"]["batch_size"]
    speed = images / run.training_seconds
    duration = timedelta(seconds=round(run.training_seconds))
    return f"{duration} in training steps, {speed:,.0f} images/s"
