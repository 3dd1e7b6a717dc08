"""The processor cores that this process may use."""

from __future__ import annotations

import os
from pathlib import Path


def physical_cores() -> list[tuple[int, ...]]:
    """Return for each physical core the numbers of its hardware threads, this process's only."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux: respects taskset and Slurm
    numbers = sorted(affinity(0)) if affinity else range(os.cpu_count() or 1)
    cores: dict[str, list[int]] = {}
    for number in numbers:
        cores.setdefault(_siblings(number), []).append(number)
    return [tuple(core) for core in cores.values()]


def _siblings(number: int) -> str:
    """Return a name that the hardware threads of one physical core share."""
    path = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
    try:
        return path.read_text()
    except OSError:
        return str(number)
