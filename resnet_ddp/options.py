"""Options as frozen dataclasses: each field is a command-line option, its metadata the help.

Nothing here imports torch, so that a wrong command line is answered at once. No option reaches
inside a recipe.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, NoReturn, TypeVar

from resnet_ddp.architectures import ARCHITECTURES, PAPER_MODELS
from resnet_ddp.exits import ExitCode
from resnet_ddp.limits import DATA_PATHS, MAX_INTEGER, MAX_THREADS, PRECISIONS
from resnet_ddp.recipe import HE2015, RECIPES

Options = TypeVar("Options")

DEVICES = ("auto", "cuda", "mps", "cpu")
MAX_PROCESSES = HE2015.batch_size  # each has an image of every batch


def option(
    default: Any = MISSING,
    *,
    help: str,
    metavar: str | None = None,
    choices: Iterable[str] | None = None,
    minimum: int | None = None,
    maximum: int = MAX_INTEGER,
    required: bool = False,
    positional: bool = False,
) -> Any:
    """Declare an option; without a default it is a positional argument that has to be there."""
    metadata = {
        "help": help,
        "metavar": metavar,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "required": required,
        "positional": positional or default is MISSING,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrackOptions:
    """Where runs can be followed."""

    track: str | None = option(
        None,
        metavar="LIST",
        help="wandb, tensorboard, none; default: wandb if logged in or WANDB_MODE says so",
    )
    wandb_project: str | None = option(
        None, metavar="NAME", help="default: WANDB_PROJECT, or resnet-ddp"
    )
    wandb_entity: str | None = option(None, metavar="NAME", help="default: WANDB_ENTITY, or yours")
    wandb_tags: str | None = option(None, metavar="LIST", help="default: WANDB_TAGS")
    wandb_notes: str | None = option(None, metavar="TEXT", help="default: WANDB_NOTES")
    wandb_weights: bool = option(False, help="copy the final weights and their card there, too")


@dataclass(frozen=True)
class RunOptions:
    """One run: what is trained, and how."""

    model: str = option(
        metavar="MODEL", choices=ARCHITECTURES, help="resnet20, resnet56, resnet110, plain20, ..."
    )
    seed: int = option(
        0, minimum=0, metavar="N", help="of initialisation, sample order and augmentation"
    )
    data: str = option(
        "cifar10",
        metavar="DIR",
        help="a prepared directory; or shapes, cifar10, cifar100, made on first use",
    )
    recipe: str = option("he2015", metavar="NAME", choices=RECIPES, help=", ".join(RECIPES))
    runs: str = option("runs", metavar="DIR", help="where run directories lie")
    grid: str | None = option(None, metavar="NAME", help="group of runs; default <data>-<recipe>")
    precision: str | None = option(
        None, choices=PRECISIONS, help="default: bf16 where the hardware has it fast"
    )
    device: str = option("auto", choices=DEVICES, help="default: the fastest that is there")
    data_path: str = option(
        "resident",
        choices=DATA_PATHS,
        help="images on the device, or from their file through FFCV's Loader; the same bits",
    )
    compile: bool | None = option(None, help="compile the network; default: where it pays")
    capture: bool | None = option(
        None, help="replay the step from CUDA graphs; default: on CUDA, one process"
    )
    threads: int | None = option(
        None,
        minimum=1,
        maximum=MAX_THREADS,
        metavar="N",
        help="CPU threads; default: this process's share of the cores",
    )
    log_every: int | None = option(
        None, minimum=1, metavar="N", help="iterations between two logged losses"
    )
    eval_every: int | None = option(
        None, minimum=1, metavar="N", help="iterations between two evaluations"
    )
    save_every: int | None = option(
        None, minimum=1, metavar="N", help="iterations between two checkpoints"
    )
    stop_after: int | None = option(
        None, minimum=1, metavar="N", help="save and exit 85 once N iterations are done"
    )
    max_minutes: float | None = option(
        None, minimum=0, metavar="M", help="save and exit 85 in time to be gone after M minutes"
    )
    copy_data_to: str | None = option(
        None, metavar="DIR", help="copy the data there first, once a machine: a fast local disk"
    )
    quiet: bool = option(False, help="show no progress, only the lines that matter")


@dataclass(frozen=True)
class TrainOptions(TrackOptions, RunOptions):
    """Train one network by one recipe, or go on where the same command was interrupted."""


@dataclass(frozen=True)
class LocalTrainOptions(TrainOptions):
    """Train one network by one recipe, or go on where the same command was interrupted."""

    processes: int = option(
        1,
        minimum=1,
        maximum=MAX_PROCESSES,
        metavar="W",
        help="processes on this machine that share each batch",
    )
    srun: bool = option(False, help="start one process for each task of this Slurm job, all nodes")


@dataclass(frozen=True)
class GridOptions:
    """What a grid is; the defaults are the paper's."""

    models: str = option(
        ",".join(PAPER_MODELS), metavar="LIST", help="resnet20,plain20; default: the paper's five"
    )
    seeds: str = option("0-4", metavar="LIST", help="0-4, or 0,2,7-9")
    recipe: str = option("he2015", metavar="NAME", choices=RECIPES, help="as for train")
    data: str = option("cifar10", metavar="DIR", help="as for train")
    runs: str = option("runs", metavar="DIR", help="where run directories lie")
    grid: str | None = option(None, metavar="NAME", help="group of runs; default <data>-<recipe>")


@dataclass(frozen=True)
class LocalGridOptions(GridOptions):
    """A grid, and how it is trained on this machine."""

    devices: str = option(
        "auto", metavar="LIST", help="cuda, or cuda:0,cuda:2, mps, cpu; default: all GPUs, else cpu"
    )
    runs_per_device: int | None = option(
        None, minimum=1, metavar="K", help="runs at a time on each GPU, or on the CPU"
    )
    processes_per_run: int = option(
        1, minimum=1, maximum=MAX_PROCESSES, metavar="P", help="processes that share each run"
    )
    precision: str | None = option(None, choices=PRECISIONS, help="as for train")
    data_path: str = option("resident", choices=DATA_PATHS, help="as for train")
    compile: bool | None = option(None, help="as for train")
    log_every: int | None = option(None, minimum=1, metavar="N", help="as for train")
    eval_every: int | None = option(None, minimum=1, metavar="N", help="as for train")
    save_every: int | None = option(None, minimum=1, metavar="N", help="as for train")
    max_minutes: float | None = option(
        None, minimum=0, metavar="M", help="have all runs save and stop in time to be gone then"
    )
    dry_run: bool = option(False, help="show the plan, start nothing")


@dataclass(frozen=True)
class GridRunOptions(TrackOptions, LocalGridOptions):
    """Train all runs of a grid on this machine, or go on with those that are not done."""


@dataclass(frozen=True)
class GridSubmitOptions(GridRunOptions):
    """Hand what is not done of a grid to Slurm: an array job, and a report when it is over.

    What stands first here may stand in a site file as well, under the same names.
    """

    partition: str | None = option(None, metavar="NAME", help="as for sbatch")
    account: str | None = option(None, metavar="NAME", help="as for sbatch")
    qos: str | None = option(None, metavar="NAME", help="as for sbatch")
    time: str | None = option(
        None, metavar="LIMIT", help="of a task; shorter than a run is fine, it goes on"
    )
    gres: str | None = option(None, metavar="LIST", help="as for sbatch: gpu:1")
    constraint: str | None = option(None, metavar="LIST", help="as for sbatch")
    cpus_per_task: int | None = option(None, minimum=1, metavar="N", help="as for sbatch")
    mem: str | None = option(None, metavar="SIZE", help="as for sbatch: 16G")
    array_limit: int | None = option(None, minimum=1, metavar="N", help="tasks at a time")
    sbatch: str | None = option(None, metavar="OPTIONS", help='any others: --sbatch="--exclude=n7"')
    runs_per_task: int | None = option(
        None, minimum=1, metavar="K", help="runs that share a task's GPU or cores"
    )
    nodes: int | None = option(None, minimum=1, metavar="N", help="each run on so many nodes")
    ntasks_per_node: int | None = option(
        None, minimum=1, metavar="G", help="with --nodes: processes of a run on each, one a GPU"
    )
    site: str | None = option(None, metavar="FILE", help="what your cluster wants; docs/slurm.md")
    complete: bool = option(
        False, help="have the report job submit again what is missing, at most three times"
    )
    resubmission: int = option(
        0, minimum=0, maximum=3, metavar="N", help="which of these this is; the report job says it"
    )
    dry_run: bool = option(False, help="print the scripts, submit nothing")


@dataclass(frozen=True)
class GridTaskOptions(GridRunOptions):
    """Train some runs of a grid inside a Slurm job, which is requeued while they want more time."""

    cells: str = option(None, metavar="LIST", required=True, help="resnet20/0,resnet20/1")
    runs_per_task: int = option(
        1, minimum=1, metavar="K", help="runs that the task has room for; the last may have fewer"
    )
    copy_data_to: str | None = option(None, metavar="DIR", help="as for train")
    srun: bool = option(False, help="as for train")
    keep_lives: bool = option(
        False, help="go on counting lives without progress where an earlier job left off"
    )


@dataclass(frozen=True)
class GridStatusOptions(GridOptions):
    """Show how all runs of a grid stand, from their directories alone."""

    watch: bool = option(False, help="again and again, until Ctrl-C")
    json: bool = option(False, help="print JSON instead of a picture")


class Parser(argparse.ArgumentParser):
    """Answers a wrong command line with one line, the nearest right word in it, and exit code 2."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit."""
        line = f"{self.prog}: {message} (see {self.prog} --help)"
        print(line.replace("\n", " "), file=sys.stderr)
        raise SystemExit(ExitCode.BAD_INPUT)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and suggest the nearest option for an unknown one."""
        for word in sys.argv[1:] if args is None else args:
            if re.search("[\\x00-\\x1f\\x7f-\\x9f]", word):
                self.error(f"control characters in {word!a}")
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(unknown_message(unknown[0], self.known_options(args)))
        return parsed

    def known_options(self, args: Sequence[str] | None) -> list[str]:
        """Return the options of the subcommand in `args`, or of this parser."""
        parser: argparse.ArgumentParser = self
        for word in sys.argv[1:] if args is None else args:
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction) and word in action.choices:
                    parser = action.choices[word]
        return list(parser._option_string_actions)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, choice_message(value, list(action.choices)))


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ", did you mean X?" for the known word that `word` most resembles, or nothing."""
    matches = difflib.get_close_matches(word, list(known), n=5, cutoff=0.5)
    # difflib sees no difference between resnet20 and resnet32 for resnet21; the beginning tells.
    best = max(matches, key=lambda match: _likeness(word, match), default=None)
    return f", did you mean {best}?" if best else ""


def _likeness(word: str, other: str) -> tuple[float, int]:
    return difflib.SequenceMatcher(None, other, word).ratio(), _common_prefix(word, other)


def _common_prefix(word: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(word, other, strict=False)) if a != b), len(word))


def unknown_message(word: str, known: Iterable[str]) -> str:
    """Say that a word on the command line is not known."""
    return f"unknown argument {word}{nearest(word.partition('=')[0], known)}"


def choice_message(value: str, choices: Sequence[str]) -> str:
    """Say that a value is none of the choices."""
    suggestion = nearest(str(value), choices)
    return f"unknown value {value!r}" + (suggestion or f", choose from {', '.join(choices)}")


def add_options(parser: argparse.ArgumentParser, options: type[Any]) -> None:
    """Add every field of a dataclass to the parser."""
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        kwargs: dict[str, Any] = {"help": field.metadata["help"]}
        flag = _flag(field)
        value_type = _value_type(hints[field.name])
        if value_type is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=field.default, **kwargs
            )
            continue
        kwargs["metavar"] = field.metadata["metavar"]
        if field.metadata["choices"] is not None:
            kwargs["choices"] = tuple(field.metadata["choices"])
        if value_type is int:
            kwargs["type"] = _integer(field.metadata["minimum"], field.metadata["maximum"])
        elif value_type is float:
            kwargs["type"] = _number(field.metadata["minimum"])
        if field.default is MISSING:
            parser.add_argument(field.name, **kwargs)
        elif field.metadata["positional"]:
            parser.add_argument(field.name, nargs="?", default=field.default, **kwargs)
        else:
            kwargs |= {"dest": field.name, "required": field.metadata["required"]}
            parser.add_argument(flag, default=field.default, **kwargs)


def read_options(namespace: argparse.Namespace, options: type[Options]) -> Options:
    """Return what was parsed as an instance of the dataclass."""
    names = [field.name for field in dataclasses.fields(options)]  # type: ignore[arg-type]
    return options(**{name: getattr(namespace, name) for name in names})


def as_arguments(options: Any) -> list[str]:
    """Return command-line arguments that `read_options` reads back as the same options."""
    arguments = []
    for field in dataclasses.fields(options):
        value, flag = getattr(options, field.name), _flag(field)
        if field.default is MISSING:
            arguments.append(str(value))
        elif isinstance(value, bool):
            arguments.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            arguments.append(f"{flag}={value}")
    return arguments


def _flag(field: dataclasses.Field[Any]) -> str:
    return "--" + field.name.rstrip("_").replace("_", "-")


def _value_type(hint: Any) -> Any:
    """Return T for T and for T | None."""
    if isinstance(hint, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    return hint


def _integer(minimum: int | None, maximum: int) -> Any:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if minimum is not None and value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        if value > MAX_INTEGER:
            raise argparse.ArgumentTypeError(f"{value} does not fit in 32 bits")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"{value} is more than {maximum}")
        return value

    return integer


def _number(minimum: float | None) -> Any:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not finite")
        if minimum is not None and value < minimum:
            raise argparse.ArgumentTypeError(f"{value:g} is less than {minimum}")
        return value

    return number
