"""One run on the nodes of a Slurm job: who is where, and who did not come."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from resnet_ddp import srun
from resnet_ddp.exits import TemporaryError, UserError

STEP = {
    srun.STEP_VARIABLE: "1",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURMD_NODENAME": "n2",
    "MASTER_ADDR": "127.0.0.1",
}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scontrol that knows two nodes."""
    tool = tmp_path / "scontrol"
    tool.write_text("#!/bin/sh\nprintf 'n1\\nn2\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tool


def test_ranks_are_laid_out_node_after_node(scontrol: Path) -> None:
    variables = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "2,1"}
    assert srun.ranks_by_node(variables) == ["n1", "n1", "n2"]
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(TemporaryError, match="scontrol"):
        srun.ranks_by_node(variables)


def test_slurms_way_to_write_how_many_each_node_has() -> None:
    assert srun.task_counts("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(UserError):
        srun.task_counts("many")


def test_outside_a_job_it_is_refused() -> None:
    with pytest.raises(UserError, match="no Slurm job"):
        srun.ranks_by_node({})


def test_a_step_gets_the_cpus_of_its_job() -> None:
    assert "--cpus-per-task=8" in srun.srun_command(3, {"SLURM_CPUS_PER_TASK": "8"})
    assert "--ntasks=3" in srun.srun_command(3, {})


@pytest.mark.parametrize(
    ("code", "meaning"),
    [(0, 0), (2, 2), (65, 65), (75, 75), (85, 85), (1, 75), (137, 75), (143, 75)],
)
def test_only_codes_of_ours_are_believed(code: int, meaning: int) -> None:
    assert srun._meaning(code) == meaning


@pytest.fixture
def store() -> Iterator[TCPStore]:
    yield TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def step() -> Iterator[subprocess.Popen[bytes]]:
    """What srun started, still there."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_whoever_does_not_come_is_named(
    store: TCPStore, step: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(srun, "MEETING", 0.5)
    for rank in (0, 1, 3):
        store.set(f"preflight/{rank}", "here")
    began = time.monotonic()
    said = srun._preflight(store, ["n1", "n1", "n2", "n3"], step)
    assert 0.5 <= time.monotonic() - began < 5
    assert said.startswith("preflight: n2 did not reach n1") and "rank 2 of 4" in said
    assert not store.check([srun.ALL_HERE])


def test_a_step_that_ends_is_not_waited_for(store: TCPStore) -> None:
    with subprocess.Popen(["false"]) as ended:
        ended.wait()
        assert srun._preflight(store, ["n1", "n2"], ended) == ""


def test_all_meet_and_know_who_they_are(
    store: TCPStore, step: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**STEP, "MASTER_PORT": str(store.port)}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # and is put back
    for rank in (0, 1):
        store.set(f"preflight/{rank}", "n1")
    said: list[str] = []
    nodes = ["n1", "n1", "n2"]
    thread = threading.Thread(target=lambda: said.append(srun._preflight(store, nodes, step)))
    thread.start()
    srun.take_place()
    thread.join()
    assert said == [""] and store.get("preflight/2") == b"n2"
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    assert [os.environ[name] for name in names] == ["2", "0", "3", "1"]
    srun.take_place()  # once


def test_who_cannot_reach_the_others_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(srun, "MEETING", 1.0)
    free = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = free.port
    del free
    for name, value in {**STEP, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    with pytest.raises(TemporaryError, match=f"n2 cannot meet the others at 127.0.0.1:{port}"):
        srun.take_place()
