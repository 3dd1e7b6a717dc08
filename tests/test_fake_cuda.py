"""The step can be captured: shown without a GPU, on a CUDA device that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment

TESTS = ROOT / "tests"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a torch without CUDA needs for fake CUDA tensors."""
    if torch.version.cuda is not None:
        return ""
    compiled = tmp_path_factory.mktemp("fake-cuda") / "fake_cuda.so"
    there = Path(torch.__file__).parent
    options = ["-std=c++20", "-shared", "-fPIC", f"-I{there}/include"]
    libraries = [f"-L{there}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{there}/lib"]
    subprocess.run(
        ["g++", *options, TESTS / "fake_cuda.cpp", "-o", compiled, *libraries], check=True
    )
    return str(compiled)


def make_steps(library: str, home: Path, planted: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(TESTS)])
    return subprocess.run(
        [sys.executable, TESTS / "on_fake_cuda.py", library, planted],
        env=environment(home, LD_PRELOAD=library, PYTHONPATH=paths),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_step_can_be_captured(library: str, tmp_path: Path) -> None:
    process = make_steps(library, tmp_path, "")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "groups of 128" in process.stdout
    assert "groups of 64" in process.stdout


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("item", "_local_scalar_dense"),
        ("host tensor", "a tensor on cpu"),
        ("copy to the host", "a tensor on cpu"),
        ("shape", "its shape depends on data"),
    ],
)
def test_what_cannot_be_captured_is_found(
    library: str, tmp_path: Path, planted: str, found: str
) -> None:
    process = make_steps(library, tmp_path, planted)
    assert process.returncode == 1, process.stdout + process.stderr
    assert found in process.stdout
