"""The rows of a run that a tracker may have: lines of metrics.jsonl that stay as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from resnet_ddp.exits import UserError
from resnet_ddp.records import read_run
from resnet_ddp.runs import settled_bytes

SPEED = "images_per_second"


class Rows:
    """The settled rows of a run directory, in order.

    What a run wrote after its last checkpoint it may write again, after a kill. Only what lies
    before a checkpoint, or belongs to a run that is done, is settled; a tracker that never gets
    anything else has nothing to take back.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._rows: list[dict[str, Any]] = []
        self._offset = 0
        self._timing_offset = 0
        self._speeds: dict[int, float] = {}

    def read(self) -> list[dict[str, Any]]:
        """Return all settled rows: number k is line k of metrics.jsonl, with its images/s.

        Raises:
            UserError: the files are damaged.
            OSError: they cannot be read.
        """
        end = settled_bytes(self.directory)
        if end <= self._offset:
            return self._rows
        self._read_speeds()
        content = _read_from(self.directory / "metrics.jsonl", self._offset)
        for line in content[: end - self._offset].splitlines():
            row = _object(line, self.directory / "metrics.jsonl")
            speed = self._speeds.get(row.get("iteration", -1))
            if speed is not None and "lr" in row:
                row[SPEED] = speed
            self._rows.append(row)
        self._offset = end
        return self._rows

    def summary(self) -> dict[str, Any] | None:
        """Return what a finished run ended with; None before it is done.

        Raises:
            UserError: the records are damaged.
        """
        run = read_run(self.directory)
        if run.result is None:
            return None
        val = run.curves.get("val/error_rate")
        return {
            **{name: value for name, value in run.result.items() if name.endswith("_error_rate")},
            "best_val_error_rate": min(val.values) if val and val.values else None,
            "training_seconds": run.training_seconds,
            "num_parameters": run.result.get("num_parameters"),
        }

    def _read_speeds(self) -> None:
        path = self.directory / "timing.jsonl"
        try:
            content = _read_from(path, self._timing_offset)
        except FileNotFoundError:
            return
        whole = content[: content.rfind(b"\n") + 1]
        self._timing_offset += len(whole)
        for line in whole.splitlines():
            values = _object(line, path)
            speed = values.get(SPEED)
            if isinstance(speed, float) and isinstance(values.get("iteration"), int):
                self._speeds[values["iteration"]] = speed


def _read_from(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read()


def _object(line: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged")
    return value
