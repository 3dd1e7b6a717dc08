"""TensorBoard: event files in a run's directory, written anew by every life."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from resnet_ddp.exits import UserError
from resnet_ddp.runs import read_object
from resnet_ddp.tracking import card
from resnet_ddp.tracking.plan import Plan

EVENTS = "tensorboard"  # in a run directory


class TensorboardTracker:
    """An open event file that begins with row 0: the rows are few, and so none stands twice.

    Raises:
        UserError: config.json is missing or damaged.
        OSError: the file cannot be written.
    """

    def __init__(self, directory: Path, plan: Plan) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        config = read_object(directory / "config.json")
        if config is None:
            raise UserError(f"{directory} has no config.json")
        self._path = directory / EVENTS
        shutil.rmtree(self._path, ignore_errors=True)
        self._writer = EventFileWriter(str(self._path))
        self.next_row = 0
        self._text("config", card.as_table(config), step=0)

    @property
    def where(self) -> str:
        """Where a person finds it."""
        return f"tensorboard --logdir {self._path.parent}"

    def log(self, row: int, values: dict[str, Any]) -> None:
        """Copy a row, its iteration as the step."""
        for name, value in values.items():
            if name != "iteration" and value is not None:
                self._scalar(name, float(value), values["iteration"])
        self.next_row = row + 1

    def finish(self, summary: dict[str, Any] | None) -> None:
        """Write what is left, and the summary of a run that is done."""
        if summary is not None:
            self._text("result", card.as_table(summary), step=0)
        self._writer.close()

    def _scalar(self, name: str, value: float, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(Summary(value=[Summary.Value(tag=name, simple_value=value)]), step)

    def _text(self, name: str, text: str, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=shape)
        plugin = SummaryMetadata.PluginData(plugin_name="text")
        metadata = SummaryMetadata(plugin_data=plugin)
        self._add(Summary(value=[Summary.Value(tag=name, metadata=metadata, tensor=tensor)]), step)

    def _add(self, summary: Any, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
