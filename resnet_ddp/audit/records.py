"""The records of a run as an audit reads them, damaged ones refused."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays

from resnet_ddp.audit.paper import DIVISORS, depth_of, learning_rates
from resnet_ddp.exits import UserError
from resnet_ddp.runs import read_object

# What the audit reads of config.json.
CONFIG: dict[str, type] = {
    "model": str,
    "seed": int,
    "recipe": str,
    "recipe_hash": str,
    "recipe_fields": dict,
    "data": str,
    "data_sha256": str,
    "precision": str,
    "log_every": int,
    "eval_every": int,
}


@dataclass(frozen=True)
class Records:
    """What lies in a run directory.

    Attributes:
        metrics: the lines of metrics.jsonl.
        result: None while the run is not done.
    """

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    result: dict[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> Records:
        """Read a run directory.

        Raises:
            UserError: it is none, or a file is damaged.
        """
        config = read_object(path / "config.json")
        if config is None:
            raise UserError(
                f"{path} is not a run's directory (no config.json); "
                "name one like runs/cifar10-he2015/resnet20/seed0"
            )
        for name, kind in CONFIG.items():
            value = config.get(name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UserError(f"{path / 'config.json'} is damaged ({name}: {value!r})")
        if (
            not re.search(r"\d", config["model"])
            or min(config["log_every"], config["eval_every"]) < 1
        ):
            raise UserError(f"{path / 'config.json'} is damaged (model, log_every or eval_every)")
        result = read_object(path / "result.json")
        return cls(path, config, _read_lines(path / "metrics.jsonl", result is not None), result)

    @property
    def divisor(self) -> int:
        """By how much the schedule is shortened."""
        return DIVISORS[self.config["recipe"]]

    @property
    def rates(self) -> list[float]:
        """The paper's learning rate of each iteration of this run."""
        return learning_rates(depth_of(self.config["model"]), self.divisor)

    def lines(self, key: str) -> list[dict[str, Any]]:
        """Return the lines that hold a number, or null, under this key."""
        return [line for line in self.metrics if key in line]

    @cached_property
    def weights(self) -> dict[str, NDArray[np.generic]]:
        """The trained weights and BatchNorm buffers.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = self.path / "model.safetensors"
        try:
            return load_arrays(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error})") from error


def _read_lines(path: Path, is_done: bool) -> list[dict[str, Any]]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    *texts, rest = content.split(b"\n")
    if rest and is_done:  # while a run lives, its last line may be half written
        texts.append(rest)
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged in line {number} ({error})") from error
        if not isinstance(line, dict) or type(line.get("iteration")) is not int:
            raise UserError(f"{path} is damaged in line {number} (no iteration)")
        lines.append(line)
    return lines
