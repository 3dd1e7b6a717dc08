"""What a run writes down as it goes: metrics.jsonl, which is the truth, and timing.jsonl.

metrics.jsonl holds only what a repetition of the run would repeat bit for bit; all that depends on
the clock goes to timing.jsonl. Trackers, tables and plots mirror them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resnet_ddp import durable
from resnet_ddp.lease import nobody_else


class JsonLines:
    """A file of JSON objects, one a line, that is appended to.

    Args:
        length: bytes to keep, the rest is cut off: what a life wrote after the checkpoint that is
            now gone back to. None keeps all but a line that a killed process left without its end.
        check_lease: called before anything is written; raises if this process may not.
    """

    def __init__(
        self,
        path: Path,
        *,
        length: int | None = None,
        check_lease: Callable[[], None] = nobody_else,
    ) -> None:
        self.path = path
        self._check_lease = check_lease
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        there = path.read_bytes()
        kept = there.rfind(b"\n") + 1 if length is None else length
        self._sha256 = hashlib.sha256(there[:kept])
        self._length = kept
        if len(there) != kept:
            check_lease()
            with durable.naming(path):
                os.ftruncate(self._file, kept)

    def write(self, **values: Any) -> None:
        """Append one object; floats keep all their digits."""
        line = (json.dumps(values, allow_nan=False) + "\n").encode()
        self._check_lease()
        with durable.naming(self.path):
            durable.write_all(self._file, line)
        self._sha256.update(line)
        self._length += len(line)

    def sync(self) -> tuple[int, str]:
        """Flush to disk and return length in bytes and SHA-256 of the file."""
        with durable.naming(self.path):
            os.fsync(self._file)
        return self._length, self._sha256.hexdigest()

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class NoLines(JsonLines):
    """What every process but the main one writes its lines to."""

    def __init__(self) -> None:
        super().__init__(Path(os.devnull))

    def sync(self) -> tuple[int, str]:
        """Return what is on disk, nothing."""
        return 0, ""


class Throughput:
    """Images per second since the last reading, evaluations and saves left out.

    Args:
        batch_size: images in an iteration.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.seconds = 0.0  # in training steps, over this life
        self._iterations = 0
        self._interval = 0.0

    @contextmanager
    def measured(self, iterations: int) -> Iterator[None]:
        """Count the steps that are made inside."""
        began = time.perf_counter()
        yield
        elapsed = time.perf_counter() - began
        self._iterations += iterations
        self._interval += elapsed
        self.seconds += elapsed

    def read(self) -> float:
        """Return images/s since the last call, and start anew."""
        images = self._iterations * self.batch_size
        rate = images / self._interval if self._interval else 0.0
        self._iterations, self._interval = 0, 0.0
        return rate
