"""What suits this machine, and what a record says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from resnet_ddp import __version__, cores, machine
from resnet_ddp.cli import main
from resnet_ddp.exits import UserError


def has(monkeypatch: pytest.MonkeyPatch, *, cuda: bool, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_fastest(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
) -> None:
    has(monkeypatch, cuda=cuda, mps=mps)
    assert machine.pick_device("auto") == expected
    assert machine.pick_device("cpu") == "cpu"


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, cuda=False, mps=False)
    with pytest.raises(UserError, match="--device cuda: not on this machine, which has: cpu"):
        machine.pick_device("cuda")


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((9, 0), "bf16")])
def test_bf16_where_a_gpu_has_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert machine.pick_precision("cuda") == expected
    assert machine.pick_precision("mps") == "fp32"


@pytest.mark.parametrize(("ranks", "expected"), [("1", 4), ("2", 2), ("3", 1), ("64", 1)])
def test_threads_are_physical_cores_shared_by_local_ranks(
    monkeypatch: pytest.MonkeyPatch, ranks: str, expected: int
) -> None:
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "_siblings", lambda core: str(core // 2))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert machine.pick_threads() == expected


def test_fp32_means_fp32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    machine.forbid_inexact_arithmetic()
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def test_a_record_names_hardware_versions_and_code() -> None:
    record = json.loads(json.dumps(machine.describe("cpu")))
    assert record["device"] == "cpu"
    assert record["hardware"]
    assert record["versions"]["resnet_ddp"] == __version__ == "0.1.0"
    assert record["versions"]["torch"] == torch.__version__
    assert {"cores", "os", "git_commit"} < record.keys()


def test_compiling_without_a_compiler_is_refused_in_a_line(
    small_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    arguments = ["train", "resnet20", "--data", str(small_data), "--runs", str(tmp_path / "runs")]
    assert main([*arguments, "--device", "cpu", "--compile"]) == 2
    assert "compiling needs a compiler (g++)" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
