"""What this machine is, and what suits it: device, precision, threads."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import accelerate
import torch

from resnet_ddp import __version__
from resnet_ddp.cores import physical_cores
from resnet_ddp.exits import UserError


def pick_device(requested: str) -> str:
    """Return "cuda", "mps" or "cpu"; "auto" takes the first of them that is there.

    Raises:
        UserError: if the requested device is not there.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if requested == "auto":
        return next(name for name, is_there in present.items() if is_there)
    if not present[requested]:
        there = ", ".join(name for name, is_there in present.items() if is_there)
        raise UserError(f"--device {requested}: not on this machine, which has: {there}")
    return requested


def pick_precision(device: str) -> str:
    """Return "bf16" where the hardware multiplies bf16 fast, else "fp32"."""
    if device == "cuda":
        fast = torch.cuda.get_device_capability() >= (8, 0)
    elif device == "cpu":
        # AVX512 without its bf16 extension would only emulate. Other processors: not measured.
        fast = _cpu_has("_is_avx512_bf16_supported") or _cpu_has("_is_amx_tile_supported")
    else:
        fast = False
    return "bf16" if fast else "fp32"


def _cpu_has(query: str) -> bool:
    # torch asks the processor, but under names that it may change.
    return bool(getattr(torch.cpu, query, lambda: False)())


def pick_compile(device: str) -> bool:
    """Say whether compiling pays without being asked for: on CUDA, if there is what it takes.

    On a CPU it takes most of a minute, too long for a default.
    """
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"  # with DDP around it: not measured yet
    return device == "cuda" and is_alone and missing_for_compile(device) is None


def settle_capture(device: str, requested: bool | None, *, data_path: str = "resident") -> bool:
    """Return whether to replay the step from CUDA graphs: by default where that can be done.

    Args:
        data_path: a graph reads images that are on the device, not what a thread brings.

    Raises:
        UserError: it is asked for where it cannot be done.
    """
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    # Between processes the gradients' all-reduce would be part of the graph: not measured yet.
    possible = device == "cuda" and is_alone and data_path == "resident"
    if requested and not possible:
        raise UserError(
            "--capture is for one process on CUDA with --data-path resident; leave it away"
        )
    return possible if requested is None else requested


def settle_compile(device: str, requested: bool | None) -> bool:
    """Return whether to compile.

    Raises:
        UserError: it is asked for, and what it takes is missing.
    """
    if requested is None:
        return pick_compile(device)
    if requested and (missing := missing_for_compile(device)):
        raise UserError(f"compiling needs {missing}, which this machine lacks; install it")
    return requested


def missing_for_compile(device: str) -> str | None:
    """Return what torch.compile would miss on this machine, or None."""
    if device == "cuda" and find_spec("triton") is None:
        return "Triton"
    names = ("gcc", "clang", "cc") if device == "cuda" else ("g++", "clang++", "c++")
    compiler = os.environ.get("CC" if device == "cuda" else "CXX")
    if not any(shutil.which(name) for name in (compiler, *names) if name):
        return f"a compiler ({names[0]})"
    return None


def forbid_inexact_arithmetic() -> None:
    """Make fp32 mean fp32, and the same run give the same bits."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


@contextmanager
def inexact_arithmetic_allowed() -> Iterator[None]:
    """Put torch's defaults back for a while."""
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.deterministic = False
    try:
        yield
    finally:
        forbid_inexact_arithmetic()


def pick_threads() -> int:
    """Return this process's share of the cores: physical cores, divided by the local ranks."""
    return max(1, len(physical_cores()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def describe(device: str) -> dict[str, Any]:
    """Return what a result must say about where it was made: hardware, versions, code."""
    return {
        "device": device,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "os": f"{platform.system()} {platform.machine()}",
        "versions": {
            "resnet_ddp": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
            "numpy": metadata.version("numpy"),
            "cuda": torch.version.cuda,
        },
        "git_commit": _git_commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git_commit() -> str | None:
    """Return the commit of the source tree, "-dirty" appended if it has changes, else None."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None  # an installed wheel, which may lie inside somebody else's repository
    command = ["git", "-C", str(here), "describe", "--always", "--exclude=*", "--abbrev=40"]
    try:
        git = subprocess.run([*command, "--dirty"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return git.stdout.strip()
