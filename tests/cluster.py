"""A real Slurm for tests: a throw-away cluster of virtual nodes on loopback.

Everything runs in a process namespace of its own whose first process dies with pytest, so that even
`kill -9` of pytest leaves nothing, and nothing is written outside a temporary directory. See the
scripts in tests/slurm.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).with_name("slurm")
SYSTEM = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "srun")
OVER = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("BOOT_FAIL", "DEADLINE", "PREEMPTED"),
}


def require_slurm() -> None:
    """Skip without Slurm; in CI it has to be there."""
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=SYSTEM)]
    if missing:
        assert "CI" not in os.environ, f"Slurm is not installed: {missing}"
        pytest.skip(f"no Slurm ({', '.join(missing)}): slurmctld slurmd slurm-client munge")


def free_ports() -> int:
    """Return the first of the ports that a cluster takes; each xdist worker has its own thousand.

    They lie below the range from which the system gives out ports by itself.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    first = 17000 + 1000 * (worker % 15)
    for base in range(first, first + 1000, 250):
        try:
            for offset in (1, 2, 11, 12, 100):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", base + offset))
        except OSError:
            continue
        return base
    raise RuntimeError("no free ports")


class Cluster:
    """Two nodes of eight cores and four GPUs, as far as Slurm knows.

    Args:
        directory: to be made; all of the cluster lies in it.
    """

    def __init__(self, directory: Path, **settings: str) -> None:
        self.directory = directory
        is_root = os.geteuid() == 0
        prefixes = ("SLURM", "SBATCH", "SRUN", "SALLOC")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
        self.environment = kept | {"SLURM_CONF": f"{directory}/etc/slurm.conf"}
        own = ["unshare", "-m", "-p", "-f", "--kill-child", "--mount-proc"] if is_root else []
        self.is_isolated = is_root
        wait = 'trap "exit 0" TERM; while :; do wait -n 2>/dev/null || sleep 0.2; done'
        start = f'"{SCRIPTS}/start.sh" "{directory}" && echo up > "{directory}/up"; {wait}'
        output = directory.with_suffix(".out")
        with output.open("wb") as log:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *own, "bash", "-c", start],
                env=self.environment
                | {"NODES": "2", "BASE_PORT": str(free_ports()), "ISOLATE": str(int(is_root))}
                | settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_for(
            lambda: (directory / "up").exists() or self.process.poll() is not None,
            30,
            output.read_text,
        )
        assert self.process.poll() is None, output.read_text()[-3000:]

    def _inside(self, *command: str) -> None:
        """Run a command among the cluster's processes: their numbers are its own."""
        enter: list[str] = []
        if self.is_isolated:
            pid = self.process.pid
            (init, *_) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            enter = ["nsenter", "-t", init, "-p", "-m", "--"]
        subprocess.run([*enter, *command], env=self.environment, check=True, timeout=60)

    def node(self, command: str, name: str) -> None:
        """Start, crash, partition, rejoin, freeze or thaw a node."""
        self._inside(str(SCRIPTS / "node.sh"), command, name, str(self.directory))

    def controller(self, signal: str) -> None:
        """Stop or continue the controller, which answers nobody in between."""
        pid = (self.directory / "pids" / "slurmctld").read_text().strip()
        self._inside("kill", f"-{signal}", pid)

    def __call__(self, *command: str, check: bool = True, timeout: float = 30) -> str:
        """Run one of Slurm's commands and return what it says."""
        return subprocess.run(
            command,
            env=self.environment,
            check=check,
            timeout=timeout,
            text=True,
            capture_output=True,
        ).stdout.strip()

    def jobs(self, *ids: str) -> dict[str, tuple[str, str, str]]:
        """Return state, reason and nodes of each job or task."""
        which = ["--jobs", ",".join(ids)] if ids else []
        lines = self("squeue", "-h", "-r", "-t", "all", *which, "-o", "%i|%T|%r|%N").splitlines()
        rows = (line.split("|") for line in lines)
        return {row[0]: (row[1], row[2], row[3]) for row in rows}

    def wait_for(
        self, *ids: str, state: Callable[[str], bool] = OVER.__contains__, seconds: float = 90
    ) -> dict[str, tuple[str, str, str]]:
        """Wait until all these jobs are over, or in another state."""
        found: dict[str, tuple[str, str, str]] = {}

        def are_there() -> bool:
            found.clear()
            found.update(self.jobs(*ids))
            return bool(found) and all(state(one[0]) for one in found.values())

        wait_for(are_there, seconds, lambda: f"{found}")
        return found

    def crash(self, name: str) -> None:
        """Cut a node's power, and tell the controller, which would notice later."""
        self.node("crash", name)
        self("scontrol", "update", f"nodename={name}", "state=down", "reason=crash")

    def boot(self, name: str) -> None:
        """Start a node that crashed."""
        self.node("start", name)
        self("scontrol", "update", f"nodename={name}", "state=resume")

    def reset(self) -> None:
        """Cancel all jobs."""
        user = str(os.geteuid())
        self("scancel", "-t", "PENDING", "-u", user, check=False)
        self("scancel", "-f", "-s", "KILL", "-u", user, check=False)
        self("scancel", "-u", user, check=False)
        wait_for(lambda: not self("squeue", "-h"), 30, lambda: self("squeue"))

    def close(self) -> None:
        """End the cluster."""
        try:
            self._inside(str(SCRIPTS / "stop.sh"), str(self.directory))
        finally:
            self.process.kill()
            self.process.wait(10)


def wait_for(
    happened: Callable[[], object], seconds: float, what: Callable[[], str] = lambda: ""
) -> None:
    """Wait until something happened, and fail if it does not."""
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, f"it did not happen: {what()}"
        time.sleep(0.1)
