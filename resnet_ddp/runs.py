"""A run directory: one cell's records, at a path that is a pure function of the cell.

RUNS/GRID/MODEL/seedN/
    config.json       settled at the first start, kept on resume
    metrics.jsonl     what a repetition would repeat bit for bit
    timing.jsonl      what it would not
    checkpoints/
    status.json       how the last life ended
    stop              made by whoever wants the run to save and end
    lock, lease.json  who is training it (lease.py)
    log.txt           what it printed, if a grid ran it
    lives.json        how often it lived without progress, slurm.log: the job's own log (on Slurm)
    model.safetensors, result.json      written last: done
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_ddp import durable
from resnet_ddp.datasets import DataRecord
from resnet_ddp.exits import ExitCode, UserError
from resnet_ddp.lease import Lease
from resnet_ddp.limits import MAX_INTEGER, MAX_THREADS, PRECISIONS
from resnet_ddp.recipe import Recipe
from resnet_ddp.stop import STOP_FILE

LOG = "log.txt"  # what a grid's run printed, life after life
LIVES_FILE = "lives.json"
STATUS = "status.json"
# What a run is: a directory that holds another is never touched.
IDENTITY = ("model", "seed", "recipe", "recipe_hash", "data_sha256")


@dataclass(frozen=True)
class Cell:
    """One run of a grid; its directory is a pure function of it.

    Raises:
        UserError: the grid's name is not one that a directory can have anywhere.
    """

    grid: str
    model: str
    seed: int
    recipe: Recipe
    data: DataRecord

    def __post_init__(self) -> None:
        check_grid_name(self.grid)

    def identity(self) -> dict[str, Any]:
        """Return what every record of the run says of it."""
        return {
            "grid": self.grid,
            "model": self.model,
            "seed": self.seed,
            "recipe": self.recipe.name,
            "recipe_hash": self.recipe.hash,
            "data": self.data.name,
            "data_source": self.data.source,
            "data_original": self.data.original,
            "data_sha256": self.data.sha256,
        }


@dataclass(frozen=True)
class Settings:
    """What a run's bits or records depend on besides: settled at the first start, then kept."""

    precision: str
    compile: bool
    threads: int
    log_every: int
    eval_every: int


def check_grid_name(name: str) -> None:
    """Refuse what no directory could be called everywhere.

    Raises:
        UserError: the name is of that kind.
    """
    if not re.fullmatch(r"[\w+-][\w.+ -]{0,199}", name):
        raise UserError(
            f"a grid cannot be called {name!a}: choose letters, digits, '.', '_' and '-' "
            "with --grid"
        )


def run_path(runs: Path, grid: str, model: str, seed: int) -> Path:
    """Return where a run lies."""
    return runs / grid / model / f"seed{seed}"


class RunDirectory:
    """The paths and the small JSON files of one run."""

    def __init__(self, runs: Path, cell: Cell) -> None:
        self.cell = cell
        self.path = run_path(runs, cell.grid, cell.model, cell.seed)
        self.lease = Lease(self.path)
        self.config_path = self.path / "config.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.timing_path = self.path / "timing.jsonl"
        self.checkpoints_path = self.path / "checkpoints"
        self.status_path = self.path / STATUS
        self.weights_path = self.path / "model.safetensors"
        self.result_path = self.path / "result.json"
        self.stop_path = self.path / STOP_FILE

    def acquire(self) -> None:
        """Make the directory and take it for this process, until `release`.

        Raises:
            UserError: it cannot be written.
            TemporaryError: another process has it.
        """
        self.lease.acquire()
        durable.remove_leftovers(self.path)
        self.stop_path.unlink(missing_ok=True)  # it was for a life that is over

    def release(self) -> None:
        """Let others have the directory."""
        self.lease.release()

    def config(self) -> dict[str, Any] | None:
        """Return the settled configuration, or None before the first start."""
        return read_object(self.config_path)

    def result(self) -> dict[str, Any] | None:
        """Return the result, or None while the run is not done."""
        return read_object(self.result_path)

    def check_identity(self) -> None:
        """Compare the run that lies here, if any, with the one that is asked for.

        Raises:
            UserError: if they differ, with both values.
        """
        config = self.config()
        if config is None:
            return
        asked = self.cell.identity()
        for key in IDENTITY:
            if config.get(key) != asked[key]:
                raise UserError(
                    f"{self.path} belongs to a run with {key} {shown(config.get(key))}, not "
                    f"{asked[key]}; choose another --grid or --runs, or remove it"
                )

    def settle(self, requested: dict[str, Any], default: Settings, *, world_size: int) -> Settings:
        """Return the settings to run with: recorded ones, else requested ones, else defaults.

        Args:
            requested: a value for each setting, None where the user left it open.
            default: what a first start takes where the user left it open.
            world_size: processes of this life. With another number than before other threads fit,
                and the bits differ anyway.

        Raises:
            UserError: if something else is requested than what is recorded.
        """
        config = self.config()
        asked = {key: value for key, value in requested.items() if value is not None}
        if config is None:
            return dataclasses.replace(default, **asked)
        for key, value in dataclasses.asdict(default).items():
            if type(config.get(key)) is not type(value) or not _is_possible(key, config[key]):
                raise UserError(
                    f"{self.config_path} is damaged ({key}: {shown(config.get(key))}); "
                    f"remove {self.path} to start anew"
                )
            if key == "threads" and config.get("world_size") != world_size:
                config[key] = asked.get(key, value)
            if asked.get(key, config[key]) != config[key]:
                raise UserError(
                    f"{self.path} was started with {key} {config[key]}, not {asked[key]}; "
                    "leave that option away to go on, or choose another --grid"
                )
        return Settings(**{key: config[key] for key in dataclasses.asdict(default)})

    def settle_config(
        self, settings: Settings, *, world_size: int, environment: dict[str, Any]
    ) -> None:
        """Write down what this run is, at its first start; later it stays as it is."""
        if self.config() is not None:
            return
        config = {
            **self.cell.identity(),
            "recipe_fields": self.cell.recipe.fields(),
            **dataclasses.asdict(settings),
            "world_size": world_size,
            **environment,
        }
        self._write(self.config_path, config)

    def changes(self, *, world_size: int, environment: dict[str, Any]) -> str:
        """Say in what this life differs from the first start, as far as its bits may; "" if not."""
        config = self.config() or {}
        recorded = config.get("versions")
        now: dict[str, Any] = {
            "hardware": environment["hardware"],
            "processes": world_size,
            "kernels": environment.get("kernels"),
            **environment["versions"],
        }
        before: dict[str, Any] = {
            "hardware": config.get("hardware"),
            "processes": config.get("world_size"),
            "kernels": config.get("kernels"),
            **(recorded if isinstance(recorded, dict) else {}),
        }
        return ", ".join(
            f"{name} {value} instead of {shown(before.get(name))}"
            for name, value in now.items()
            if value != before.get(name)
        )

    def write_result(self, **values: Any) -> None:
        """Write the result, which says that the run is done."""
        self._write(self.result_path, {**self.cell.identity(), **values})

    def write_weights(self, content: bytes) -> None:
        """Write the final weights, a safetensors file's content."""
        self.lease.check()
        durable.write_bytes(self.weights_path, content)

    def write_status(self, code: ExitCode | None, *, reason: str, iteration: int | None) -> None:
        """Record how this life ended, None while it goes on: a foreign launcher's code is lost."""
        exit_code = None if code is None else int(code)
        status = {"exit_code": exit_code, "reason": reason, "iteration": iteration}
        self._write(self.status_path, status)

    def _write(self, path: Path, value: dict[str, Any]) -> None:
        self.lease.check()
        durable.write_json(path, value)


def read_object(path: Path) -> dict[str, Any] | None:
    """Return a JSON object from a file, or None if there is none.

    Raises:
        UserError: if the file is not a JSON object.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("no file")  # reading a pipe would wait for ever
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({shown(str(error))}); remove it or its run to go on"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (not a JSON object); remove it or its run to go on")
    return value


def settled_bytes(path: Path) -> int:
    """Return how much of a run's metrics.jsonl no later life will cut off again.

    Raises:
        UserError: a manifest or the result is damaged.
        OSError: metrics.jsonl cannot be read.
    """
    if read_object(path / "result.json") is not None:
        return (path / "metrics.jsonl").stat().st_size
    newest_first = sorted((path / "checkpoints").glob("iteration-*"), reverse=True)
    for checkpoint in newest_first:
        manifest = read_object(checkpoint / "manifest.json")
        length = None if manifest is None else manifest.get("metrics_bytes")
        if isinstance(length, int):
            return length
    return 0


def shown(value: object, *, limit: int = 80) -> str:
    """Return a value that may have come from a damaged file as a piece of one line.

    Args:
        limit: characters at the most.
    """
    return "".join(c if c.isprintable() else " " for c in str(value)[:limit])


def _is_possible(setting: str, value: Any) -> bool:
    """Say whether a recorded setting is one that the options could have had."""
    if setting == "precision":
        return value in PRECISIONS
    if setting == "threads":
        return bool(1 <= value <= MAX_THREADS)
    return isinstance(value, bool) or bool(1 <= value <= MAX_INTEGER)
