"""What this machine can train at a time: GPUs, or CPU cores shared out among runs."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from resnet_ddp.cores import physical_cores
from resnet_ddp.exits import UserError

CPU_RUN_BYTES = 2 * 1024**3  # memory that a run on the CPU may take, ResNet-110's with room
NVIDIA_SMI_PATIENCE = 30.0  # seconds

Core = tuple[int, ...]  # the hardware threads of a physical core


@dataclass(frozen=True)
class Slot:
    """Room for one run.

    Attributes:
        name: what a person calls it.
        device: for `train --device`.
        threads: CPU threads a process.
        cores: hardware threads that the run keeps to; empty where it may use all.
        variables: of its environment.
    """

    name: str
    device: str
    threads: int
    cores: tuple[int, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


def find_slots(
    devices: str, *, num_runs: int, runs_per_device: int | None, processes_per_run: int
) -> list[Slot]:
    """Return room for up to `num_runs` runs.

    Args:
        devices: "auto"; or a list of "cuda", "cuda:1", "mps", "cpu".
        runs_per_device: on each GPU, or on the CPU; None for what suits: one a GPU, and as many as
            there are cores on the CPU, where two runs of one thread get further than one of two.
        processes_per_run: a run on GPUs takes so many of them; on the CPU it shares out its cores.

    Raises:
        UserError: a device is not there, or the machine is too small for so many.
    """
    cores, gpus = physical_cores(), visible_gpus()
    chosen_gpus, others = _read_devices(devices, gpus)
    if processes_per_run > 1 and "mps" in others:
        raise UserError("--processes-per-run: on mps a run has one process")
    if processes_per_run > max(len(chosen_gpus), 1) and chosen_gpus:
        raise UserError(
            f"--processes-per-run {processes_per_run}: there are {len(chosen_gpus)} GPUs; "
            "name a smaller number"
        )
    per_gpu = runs_per_device or 1
    teams = [
        chosen_gpus[start : start + processes_per_run]
        for start in range(0, len(chosen_gpus) - processes_per_run + 1, processes_per_run)
    ]
    num_others = len(teams) * per_gpu + ("mps" in others)
    threads = max(1, len(cores) // (max(1, num_others) * processes_per_run))
    slots = [
        Slot(
            name=f"gpu {','.join(team)}" + (f" #{place}" if per_gpu > 1 else ""),
            device="cuda",
            threads=threads,
            variables={"CUDA_VISIBLE_DEVICES": ",".join(team)},
        )
        for place in range(per_gpu)
        for team in teams
    ]
    if "mps" in others:
        slots.append(Slot("mps", "mps", threads))
    if "cpu" in others:
        room = num_runs - len(slots)
        slots += _cpu_slots(cores, room, runs_per_device, processes_per_run)
    return slots[: max(1, num_runs)]


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the names of this process's NVIDIA GPUs, as CUDA_VISIBLE_DEVICES has them.

    The driver's tool is asked: torch is not imported for it.
    """
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_PATIENCE,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = answer.split() if visible is None else visible.split(",")
    return [name.strip() for name in names if name.strip() not in ("", "-1")]


def _read_devices(text: str, gpus: Sequence[str]) -> tuple[list[str], set[str]]:
    """Return the GPUs that are meant, and of "mps" and "cpu" those that are."""
    if text == "auto":
        if gpus:
            return list(gpus), set()
        is_apple = platform.system() == "Darwin" and platform.machine() == "arm64"
        return [], {"mps"} if is_apple else {"cpu"}
    chosen: list[str] = []
    others: set[str] = set()
    for name in text.split(","):
        kind, _, number = name.partition(":")
        if name in ("mps", "cpu"):
            others.add(name)
        elif kind == "cuda" and not number and name == "cuda" and gpus:
            chosen += gpus
        elif kind == "cuda" and number.isdecimal() and int(number) < len(gpus):
            chosen.append(gpus[int(number)])
        elif kind == "cuda":
            there = f"the machine has {len(gpus)} GPUs" if gpus else "nvidia-smi finds no GPU"
            raise UserError(f"--devices {text}: no {name}; {there}")
        else:
            raise UserError(f"--devices {text}: write auto, or a list of cuda, cuda:1, mps, cpu")
    return list(dict.fromkeys(chosen)), others


def _cpu_slots(
    cores: Sequence[Core], num_runs: int, asked: int | None, processes: int
) -> list[Slot]:
    most = len(cores) // processes
    if most < (asked or 1):
        raise UserError(
            f"{asked or 1} runs of {processes} processes take {(asked or 1) * processes} cores; "
            f"this machine has {len(cores)}; name fewer with --runs-per-device or "
            "--processes-per-run"
        )
    count = asked or min(most, max(1, _free_memory() // (CPU_RUN_BYTES * processes)))
    count = max(1, min(count, num_runs))
    slots = []
    for place in range(count):
        mine = cores[len(cores) * place // count : len(cores) * (place + 1) // count]
        numbers = tuple(number for core in mine for number in core)
        name = f"cpu {place}" if count > 1 else "cpu"
        slots.append(Slot(name, "cpu", max(1, len(mine) // processes), numbers))
    return slots


def _free_memory() -> int:
    """Return the bytes that new processes may take; where nothing says so, plenty."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 50
    free = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(next(free, "0")) * 1024 or 1 << 50
