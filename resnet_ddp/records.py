"""Runs as they lie below a directory. What is damaged or half-written is named and left out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_ddp.architectures import ARCHITECTURES
from resnet_ddp.exits import UserError
from resnet_ddp.runs import read_object, shown

LONGEST = 500  # characters of a reason
DEEPEST = 4  # levels below the directory that is named: RUNS/GRID/MODEL/seedN


@dataclass(frozen=True)
class Curve:
    """A quantity over iterations, both of the same length, iterations ascending."""

    iterations: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Group:
    """What may be averaged: runs of one grid, by one recipe, on the same data."""

    grid: str
    recipe: str
    recipe_hash: str
    data: str
    data_source: str
    data_original: bool | None
    data_sha256: str


@dataclass(frozen=True)
class RunRecord:
    """A run, done or not.

    Attributes:
        result: of one that is done.
        curves: by the names that metrics.jsonl has: "train/loss", "lr", "train/error_rate", ...
        speed: images/s.
        training_seconds: in steps alone, over all lives; None where nothing was timed.
    """

    path: Path
    model: str
    seed: int
    group: Group
    config: dict[str, Any]
    result: dict[str, Any] | None
    curves: dict[str, Curve]
    speed: Curve
    training_seconds: float | None

    @property
    def iterations(self) -> int:
        """The recipe's."""
        return int(self.config["recipe_fields"]["iterations"])

    def final(self, name: str) -> float | None:
        """Return "train", "val" or "test" error rate of a run that is done."""
        value = (self.result or {}).get(f"{name}_error_rate")
        return value if isinstance(value, float) else None


@dataclass(frozen=True)
class Skipped:
    """A directory that could not be read as a run, and why."""

    path: Path
    reason: str


def find_runs(directory: Path) -> tuple[list[RunRecord], list[Skipped]]:
    """Return the runs in and below a directory, by path.

    Raises:
        UserError: there is no such directory.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory; name the one that --runs was")
    found, skipped = [], []
    for path in sorted(_candidates(directory, DEEPEST)):
        try:
            found.append(read_run(path))
        except UserError as error:
            skipped.append(Skipped(path, shown(error, limit=LONGEST)))
        except OSError as error:
            skipped.append(Skipped(path, shown(error.strerror or error)))
    return found, skipped


def _candidates(directory: Path, levels: int) -> Iterator[Path]:
    """Yield the directories that hold records of a run."""
    try:
        entries = list(directory.iterdir())
    except OSError:
        return
    if any(entry.name in ("config.json", "result.json", "metrics.jsonl") for entry in entries):
        yield directory
    elif levels:
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
                yield from _candidates(entry, levels - 1)


def read_run(path: Path) -> RunRecord:
    """Read one run.

    Raises:
        UserError: it is damaged, with the file and what is wrong with it.
    """
    config_path = path / "config.json"
    config, result = read_object(config_path), read_object(path / "result.json")
    if config is None:
        raise UserError(f"{path} has no config.json")
    model, seed = config.get("model"), config.get("seed")
    fields = config.get("recipe_fields")
    iterations = fields.get("iterations") if isinstance(fields, dict) else None
    batch_size = fields.get("batch_size") if isinstance(fields, dict) else None
    for name, value, is_right in (
        ("model", model, isinstance(model, str) and model in ARCHITECTURES),
        ("seed", seed, _is_count(seed)),
        ("iterations", iterations, _is_count(iterations) and iterations != 0),
        ("batch_size", batch_size, _is_count(batch_size) and batch_size != 0),
        ("hardware", config.get("hardware"), isinstance(config.get("hardware"), str)),
    ):
        if not is_right:
            raise UserError(f"{config_path} is damaged ({name}: {shown(value)})")
    group = _group(config, config_path)
    if result is not None:
        _check_result(result, config, path / "result.json")
    metrics = _read_lines(path / "metrics.jsonl")
    timing = [line for line in _read_lines(path / "timing.jsonl") if "images_per_second" in line]
    speed = curve(timing, "images_per_second", path / "timing.jsonl")
    names = {name for line in metrics for name in line if name != "iteration"}
    curves = {name: curve(metrics, name, path / "metrics.jsonl") for name in sorted(names)}
    assert isinstance(model, str) and isinstance(seed, int) and isinstance(batch_size, int)
    return RunRecord(
        path=path,
        model=model,
        seed=seed,
        group=group,
        config=config,
        result=result,
        curves=curves,
        speed=speed,
        training_seconds=_training_seconds(speed, batch_size),
    )


def _group(config: dict[str, Any], path: Path) -> Group:
    values: dict[str, Any] = {name: config.get(name) for name in Group.__dataclass_fields__}
    for name, value in values.items():
        is_right = value in (True, False, None) if name == "data_original" else bool(value)
        if not is_right or (name != "data_original" and not isinstance(value, str)):
            raise UserError(f"{path} is damaged ({name}: {shown(value)})")
    return Group(**values)


def _check_result(result: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    for name in ("model", "seed", "recipe_hash", "data_sha256"):
        if result.get(name) != config.get(name):
            raise UserError(f"{path} is of another run than config.json ({name})")
    for name in ("train_error_rate", "test_error_rate"):
        if not _is_rate(result.get(name)):
            raise UserError(f"{path} is damaged ({name}: {shown(result.get(name))})")
    if not (result.get("val_error_rate") is None or _is_rate(result["val_error_rate"])):
        raise UserError(f"{path} is damaged (val_error_rate)")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_rate(value: object) -> bool:
    return isinstance(value, float) and 0 <= value <= 1


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of lines; the last may be half-written, and is then left out."""
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    lines = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise UserError(f"{path} is damaged (line {number})")
        lines.append(value)
    return lines


def curve(lines: list[dict[str, Any]], name: str, path: Path) -> Curve:
    """Return a quantity of the lines that have it; of several at an iteration, the last.

    timing.jsonl repeats what a life did again that its predecessor lost.
    """
    points: dict[int, float] = {}
    for line in lines:
        value = line.get(name)
        if value is None:
            continue
        iteration = line.get("iteration")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and isinstance(iteration, int)):
            raise UserError(f"{path} is damaged ({name}: {shown(value)})")
        points[iteration] = float(value)
    iterations = sorted(points)
    return Curve(tuple(iterations), tuple(points[iteration] for iteration in iterations))


def _training_seconds(speed: Curve, batch_size: int) -> float | None:
    """Return the time of all steps that led to the last one, each counted once."""
    if not speed.values:
        return None
    starts = (0, *speed.iterations[:-1])
    return sum(
        (stop - start) * batch_size / value
        for start, stop, value in zip(starts, speed.iterations, speed.values, strict=True)
        if value > 0
    )
