"""The repository's own promises: the checks of CI, the launch files, the wheel."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

SCRIPTS = Path(sysconfig.get_path("scripts"))


@pytest.mark.parametrize(
    "command", ["ruff check", "ruff format --check", "mypy", "lint-imports"], ids=str
)
def test_checks_of_the_commit_hook(command: str) -> None:
    tool, *arguments = command.split()
    process = subprocess.run(
        [SCRIPTS / tool, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"entry: {command}" in (ROOT / ".pre-commit-config.yaml").read_text()


def test_ci_runs_the_readmes_test_command() -> None:
    command = 'pip install -e ".[test]" && pytest'
    readme = (ROOT / "README.md").read_text().splitlines()
    ci = (ROOT / ".ci" / "run").read_text().replace("--quiet ", "").splitlines()
    assert command in readme
    assert command in ci


@pytest.mark.parametrize("path", sorted((ROOT / "launch").iterdir()), ids=lambda path: path.name)
def test_launch_files(path: Path) -> None:
    configuration = yaml.safe_load(path.read_text())
    # MULTI_CPU silently starts one process.
    expected = "MULTI_GPU" if configuration["num_processes"] > 1 else "NO"
    assert configuration["distributed_type"] == expected
    assert configuration["mixed_precision"] == "no"  # --precision decides


SHELL = [
    *sorted((ROOT / "slurm").glob("*.sbatch")),
    *sorted((ROOT / "tests" / "slurm").glob("*.sh")),
    ROOT / ".ci" / "run",
]


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_scripts_parse(path: Path) -> None:
    process = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.slow
def test_the_wheel_brings_launch_and_slurm_along(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("resnet_ddp-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "resnet_ddp/launch/cpu.yaml" in names
    assert "resnet_ddp/slurm/array.sbatch" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
