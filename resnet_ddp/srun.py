"""`--srun`: the processes of one run on all nodes of a Slurm job, started by srun.

Like `launcher.launch` beyond one machine: whoever starts them holds the store that they meet at, on
a port that the system chose, and it outlives them. Each learns from srun who it is. Before anything
else all of them report at the store (the preflight): a node that cannot be reached, or reaches
nobody, is named within a minute instead of being waited for.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any

from resnet_ddp.exits import ExitCode, TemporaryError, UserError
from resnet_ddp.launcher import without_launch
from resnet_ddp.stop import SIGNALS

STEP_VARIABLE = "RESNET_DDP_STEP"  # for the processes of such a launch
MEETING = 60.0  # seconds between the first process's report and the last one's
FIRST_REPORT = 600.0  # seconds for the first: Slurm may have to prepare the nodes
GRACE = 20  # seconds between the end of the first process and the end of patience with the others
POLL = 0.1  # seconds
SCONTROL_PATIENCE = 30.0  # seconds
ALL_HERE = "preflight/all"


def launch_with_srun(module: str, arguments: Sequence[str]) -> int:
    """Run `python -m MODULE ARGUMENTS` once for each task of this Slurm job; return the exit code.

    A signal that asks to stop is passed on, and the processes agree among themselves.

    Returns:
        DONE if all processes are done; the code that they ended with, if it is one of ours; else
        TEMPORARY: a process or a node was lost.

    Raises:
        UserError: this is no job with srun.
    """
    nodes = ranks_by_node(os.environ)
    num_processes = len(nodes)
    if shutil.which("srun") is None:
        raise UserError("--srun: there is no srun on this machine; leave it away")
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    head = os.environ.get("SLURMD_NODENAME") or platform.node()
    environment = {
        **without_launch(os.environ),
        "MASTER_ADDR": head,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store above, not one of rank 0's
        STEP_VARIABLE: "1",
    }
    process = subprocess.Popen(
        [*srun_command(num_processes), sys.executable, "-m", module, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
    )

    def pass_on(number: int, frame: FrameType | None) -> None:
        if process.poll() is None:
            process.send_signal(signal.SIGUSR1)  # srun forwards it; others it takes for itself

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        missing = _preflight(store, nodes, process)
        if missing:
            print(f"resnet-ddp: {missing}", file=sys.stderr)
            return ExitCode.TEMPORARY
        return _meaning(process.wait())
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def srun_command(num_processes: int, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return srun with what it needs to start one process for each task of this job."""
    command = ["srun", f"--ntasks={num_processes}", "--distribution=block"]
    # Whoever is left names the process that was lost, and has this long for it.
    command += ["--kill-on-bad-exit=0", f"--wait={GRACE}"]
    if "SLURM_CPUS_PER_TASK" in environment:  # since 22.05 a step does not inherit it
        command.append(f"--cpus-per-task={environment['SLURM_CPUS_PER_TASK']}")
    return command


def ranks_by_node(environment: Mapping[str, str]) -> list[str]:
    """Return for each rank of this job the name of its node, in order.

    Raises:
        UserError: this is no Slurm job.
        TemporaryError: Slurm does not tell the names of its nodes.
    """
    nodes = environment.get("SLURM_JOB_NODELIST")
    layout = environment.get("SLURM_TASKS_PER_NODE")
    if not nodes or not layout:
        raise UserError("--srun: this is no Slurm job; submit one with sbatch, or leave it away")
    counts = task_counts(layout)
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            capture_output=True,
            text=True,
            timeout=SCONTROL_PATIENCE,
            check=True,
        ).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise TemporaryError(f"scontrol does not tell the nodes of {nodes}: {error}") from error
    return [name for name, count in zip(names, counts, strict=True) for _ in range(count)]


def task_counts(layout: str) -> list[int]:
    """Return the tasks of each node from Slurm's way to write them: "2(x3),1" is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in layout.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"SLURM_TASKS_PER_NODE={layout}: not a list of numbers")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def take_place() -> None:
    """In a process that `launch_with_srun` started: learn who it is, and meet the others.

    Sets the variables by which torch and Accelerate know a process; elsewhere it does nothing.

    Raises:
        TemporaryError: the others cannot be reached, or did not all come.
    """
    if os.environ.pop(STEP_VARIABLE, None) is None:
        return
    variables = os.environ
    counts = task_counts(variables["SLURM_STEP_TASKS_PER_NODE"])
    rank, node = variables["SLURM_PROCID"], int(variables["SLURM_NODEID"])
    variables["RANK"], variables["LOCAL_RANK"] = rank, variables["SLURM_LOCALID"]
    variables["WORLD_SIZE"], variables["LOCAL_WORLD_SIZE"] = str(sum(counts)), str(counts[node])
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    address, port = variables["MASTER_ADDR"], int(variables["MASTER_PORT"])
    here = variables.get("SLURMD_NODENAME") or platform.node()
    try:
        patience = timedelta(seconds=MEETING)
        store = TCPStore(address, port, is_master=False, timeout=patience)
        store.set(f"preflight/{rank}", here)
        store.wait([ALL_HERE], timedelta(seconds=MEETING + GRACE))
    except (RuntimeError, DistError) as error:
        text = str(error).splitlines()[0]
        raise TemporaryError(
            f"{here} cannot meet the others at {address}:{port}: {text}"
        ) from error


def _preflight(store: Any, nodes: Sequence[str], process: subprocess.Popen[bytes]) -> str:
    """Wait until all ranks have reported; return what to say if they did not."""
    waiting = set(range(len(nodes)))
    deadline = time.monotonic() + FIRST_REPORT
    while waiting and process.poll() is None:
        arrived = {rank for rank in waiting if store.check([f"preflight/{rank}"])}
        if arrived and len(waiting) == len(nodes):
            deadline = time.monotonic() + MEETING
        waiting -= arrived
        if waiting and time.monotonic() > deadline:
            lost = ", ".join(dict.fromkeys(nodes[rank] for rank in sorted(waiting)))
            ranks = ", ".join(map(str, sorted(waiting)))
            return (
                f"preflight: {lost} did not reach {nodes[0]} within {MEETING:.0f} s (rank {ranks} "
                f"of {len(nodes)}); have that node looked at, or exclude it: --exclude={lost}"
            )
        time.sleep(POLL)
    store.set(ALL_HERE, "")
    return ""


def _meaning(code: int) -> int:
    """Return srun's exit code, its tasks' highest, if one of our commands can have ended with it.

    A bug's 1 cannot be told from srun's own: it counts as temporary, and the lives are counted.
    """
    ours = {ExitCode.DONE, ExitCode.BAD_INPUT, ExitCode.NOT_FINITE, ExitCode.STOPPED}
    if code in ours:
        return code
    if code != ExitCode.TEMPORARY:
        print(f"resnet-ddp: srun ended with {code}", file=sys.stderr)
    return ExitCode.TEMPORARY
