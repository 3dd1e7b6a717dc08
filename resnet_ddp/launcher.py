"""`resnet-ddp train --processes W`: start W processes on this machine and keep their exit code.

Unlike `torchrun` and `accelerate launch` it ends with the code of the run (0, 2, 65, 75, 85), not
with 1. The launcher holds the store that the processes meet at, on a port that the system chose, so
that no two launches can collide.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from resnet_ddp.exits import ExitCode
from resnet_ddp.stop import SIGNALS

GRACE = 20.0  # seconds between the end of the first process and the end of patience with the others
POLL = 0.1  # seconds
LAUNCHER_VARIABLE = "RESNET_DDP_LAUNCHER"  # its process number, for the processes it starts
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What torchrun and Accelerate tell the processes that they start, besides.
LAUNCH_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_")
TORCHRUN_VARIABLES = (
    *("LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE"),
)
LAUNCHED = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", LAUNCHER_VARIABLE)  # by one of these
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def without_launch(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without ranks and ports: what is started in it is a launch of its own.

    What a user sets for Accelerate is among what goes: only its launcher reads that.
    """
    names = (*LAUNCH_VARIABLES, *TORCHRUN_VARIABLES, LAUNCHER_VARIABLE)
    return {
        name: value
        for name, value in environment.items()
        if name not in names and not name.startswith(LAUNCH_PREFIXES)
    }


def end_with_launcher() -> None:
    """Have the kernel ask this process to stop when its launcher dies (Linux).

    Only behind a launcher or a grid: what a person started from a shell may outlive the shell.
    """
    launched = any(name in os.environ for name in LAUNCHED)
    if not launched or not sys.platform.startswith("linux"):
        return
    # Ours says who it is: it may have died while this process was starting.
    parent = int(os.environ.get(LAUNCHER_VARIABLE, os.getppid()))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def is_main_process() -> bool:
    """Say whether this process is the one of its launch that talks to the user."""
    return os.environ.get("RANK", "0") == "0"


def is_alone() -> bool:
    """Say whether this process was started without siblings."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def launch(num_processes: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m MODULE ARGUMENTS` in so many processes; return the code of the first to fail.

    A signal that asks to stop is passed on, and the processes agree among themselves.

    Returns:
        DONE if all processes are done; TEMPORARY if a signal killed one.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | _identity(rank, num_processes, store.port),
        )
        for rank in range(num_processes)
    ]

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        return _wait(children)
    finally:
        for child in children:
            child.kill()
            child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _identity(rank: int, num_processes: int, port: int) -> dict[str, str]:
    """Return the environment by which torch and Accelerate know a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store above, not one of rank 0's
        LAUNCHER_VARIABLE: str(os.getpid()),
    }


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; once one has ended, give the others time to end by themselves."""
    first: int | None = None  # the rank that failed first
    deadline = float("inf")
    while time.monotonic() < deadline:
        ended = [rank for rank, child in enumerate(children) if child.poll() is not None]
        if ended and deadline == float("inf"):  # they leave together
            deadline = time.monotonic() + GRACE
        if first is None:
            first = next((rank for rank in ended if children[rank].returncode), None)
        if len(ended) == len(children):
            break
        time.sleep(POLL)
    if first is None:
        stuck = [rank for rank, child in enumerate(children) if child.returncode is None]
        if stuck:
            print(f"resnet-ddp: process {stuck[0]} did not end with the others", file=sys.stderr)
        return ExitCode.TEMPORARY if stuck else ExitCode.DONE
    code = children[first].returncode
    if code < 0:
        name = signal.Signals(-code).name
        print(f"resnet-ddp: process {first} was killed by {name}", file=sys.stderr)
        return ExitCode.TEMPORARY
    return code
