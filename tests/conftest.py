"""What several test modules share: a small data set, a short recipe, and commands as users run."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from resnet_ddp import extras, shapes
from resnet_ddp.cli import main
from resnet_ddp.datasets import write_dataset
from resnet_ddp.recipe import RECIPES, Recipe

ROOT = Path(__file__).resolve().parent.parent
SHORT = Recipe(name="short", iterations=12, batch_size=16, batchnorm_group=16, drops=(6, 9))
# What a launcher around the tests may have set, and must not reach the commands.
# And what would have the tests' runs tracked where the developer's are.
LAUNCHERS = (
    "WANDB_",
    "NETRC",
    "ACCELERATE_",
    "MASTER_",
    "OMP_",
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "PYTHON",
)

for name in [name for name in os.environ if name.startswith(("WANDB_", "NETRC"))]:
    del os.environ[name]
os.environ["WANDB_MODE"] = "disabled"  # whoever runs the tests may be logged in


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The test processes share few cores, and equal threads mean equal bits."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps the first Accelerator's precision for the life of the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def ffcv(one_thread: None) -> Iterator[None]:
    """The package, imported, or the test is skipped."""
    if find_spec("ffcv") is None:
        assert "CI" not in os.environ, "ffcv is missing"
        pytest.skip("no ffcv")
    extras.import_ffcv()
    torch.set_num_threads(1)
    yield
    left = [thread for thread in threading.enumerate() if type(thread).__name__ == "Epoch"]
    assert left == [], "threads of FFCV's Loader were left behind"


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared directory: ten classes, 300 training and 100 test images."""
    images, labels = shapes.draw(40)
    return write_small(tmp_path_factory.mktemp("data") / "small", images, labels)


@pytest.fixture(scope="session")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same name and sizes as `small_data`, other pixels."""
    images, labels = shapes.draw(40)
    return write_small(tmp_path_factory.mktemp("other") / "small", 255 - images, labels)


def write_small(directory: Path, images: shapes.Array, labels: shapes.Array) -> Path:
    write_dataset(
        directory,
        name="small",
        source="drawn for the tests",
        classes=tuple(shapes.SHAPES),
        train_images=images[:300],
        train_labels=labels[:300],
        test_images=images[300:],
        test_labels=labels[300:],
    )
    return directory


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe of 12 iterations of 16 images, known to the command line as "short"."""
    monkeypatch.setitem(RECIPES, SHORT.name, SHORT)
    return SHORT


Train = Callable[..., int]


@pytest.fixture
def train(short: Recipe, small_data: Path, tmp_path: Path) -> Train:
    """`train(*arguments)` trains ResNet-20 by the short recipe below `tmp_path / runs`."""
    common = ["--data", str(small_data), "--recipe", "short", "--threads", "1", "--device", "cpu"]
    runs = ["--runs", str(tmp_path / "runs")]

    def run(*arguments: str) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        return main(["train", "resnet20", *common, *runs, *arguments])

    return run


def environment(home: Path, **extra: str) -> dict[str, str]:
    """This environment without launchers' variables and without the user's own configuration."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    untracked = {"WANDB_MODE": "disabled"}
    return kept | untracked | {"HF_HOME": str(home), "COLUMNS": "200"} | extra


Command = Callable[..., subprocess.Popen[str]]

SCRIPTS = Path(sysconfig.get_path("scripts"))
ENTRIES = {
    "train.py": [sys.executable, str(ROOT / "train.py")],
    "resnet-ddp train": [str(SCRIPTS / "resnet-ddp"), "train"],
    "resnet-ddp": [str(SCRIPTS / "resnet-ddp")],
    "accelerate launch": [str(SCRIPTS / "accelerate"), "launch", str(ROOT / "train.py")],
}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Command]:
    """`start(entry, *arguments)` starts a command of the user's, in an empty directory."""
    started: list[subprocess.Popen[str]] = []
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()

    def run(entry: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*ENTRIES[entry], *arguments],
            cwd=here,
            env=environment(home, **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """Variables for a command that dies if it imports torch."""
    module = tmp_path / "no-torch" / "torch.py"
    module.parent.mkdir()
    module.write_text("raise SystemExit('torch was imported')\n")
    return {"PYTHONPATH": str(module.parent)}
