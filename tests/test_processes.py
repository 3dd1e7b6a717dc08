"""Several processes as one run, with real ones: launchers, losses of a process, disagreements."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATIENCE = 60.0  # seconds in which everything has to be over


@pytest.fixture
def workplace(tmp_path: Path, small_data: Path) -> Iterator[Path]:
    """An empty directory; whatever is started in it is gone at the end."""
    (tmp_path / "data").symlink_to(small_data)
    yield tmp_path
    left = _processes_in(tmp_path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "processes were left behind"


def _processes_in(directory: Path) -> list[int]:
    pids = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            is_zombie = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if not is_zombie and (entry / "cwd").resolve() == directory.resolve():
                pids.append(int(entry.name))
        except OSError:
            continue  # it has just ended
    return pids


def arguments(*more: str) -> list[str]:
    return [
        *("resnet20", "--data", "data", "--recipe", "he2015-smoke", "--device", "cpu"),
        *("--threads", "1", "--eval-every", "16", "--log-every", "1", "--precision", "fp32"),
        *more,
    ]


def start(directory: Path, *command: str, **environment: str) -> subprocess.Popen[str]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE", "MASTER", "RANK", "WORLD", "LOCAL"))
    }
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=directory,
        env=clean | {"PYTHONPATH": str(ROOT)} | environment,
        preexec_fn=_heed_ctrl_c,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _heed_ctrl_c() -> None:
    """A shell starts what runs in its background deaf to it, these tests perhaps."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ended(process: subprocess.Popen[str], within: float = 120.0) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


def run_directory(directory: Path) -> Path:
    (path,) = directory.glob("runs/*/resnet20/seed0")
    return path


def losses(directory: Path) -> list[float]:
    lines = (run_directory(directory) / "metrics.jsonl").read_text().splitlines()
    return [record["train/loss"] for record in map(json.loads, lines) if "train/loss" in record]


def status(directory: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((run_directory(directory) / "status.json").read_text())
    return content


def wait_for_iteration(directory: Path, iteration: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        found = list(directory.glob("runs/*/resnet20/seed0/metrics.jsonl"))
        if found and found[0].read_text().count("train/loss") >= iteration:
            return
        time.sleep(0.1)
    process.kill()
    pytest.fail(f"never reached iteration {iteration}: {process.communicate()[0]}")


OURS = ("-m", "resnet_ddp", "train")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "train.py"))
ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch/cpu.yaml")),
    str(ROOT / "train.py"),
)


TORCHRUN_ONE = ("-m", "torch.distributed.run", "--nproc_per_node", "1", str(ROOT / "train.py"))
ACCELERATE_ONE = (
    *("-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"),
    str(ROOT / "train.py"),
)
LAUNCHES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "alone": (OURS, ()),
    "ours": (OURS, ("--processes", "2")),
    "torchrun": (TORCHRUN, ()),
    "torchrun, one": (TORCHRUN_ONE, ()),
    "accelerate": (ACCELERATE, ()),
    "accelerate, one": (ACCELERATE_ONE, ()),
}
REQUESTS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "the file stop", "--max-minutes")
SAMPLE = {
    ("ours", "SIGUSR2"),
    ("torchrun", "SIGTERM"),
    ("torchrun, one", "SIGUSR1"),
    ("accelerate", "SIGINT"),
    ("accelerate, one", "SIGTERM"),
    ("accelerate, one", "SIGUSR1"),
    ("accelerate", "the file stop"),
    ("torchrun", "--max-minutes"),
}


@pytest.mark.parametrize(
    ("launch", "request_"),
    [
        pytest.param(*pair, marks=() if pair in SAMPLE else pytest.mark.slow)
        for pair in itertools.product(LAUNCHES, REQUESTS)
    ],
)
def test_whatever_asks_to_stop_behind_whatever_launcher(
    workplace: Path, launch: str, request_: str
) -> None:
    """Sent to the process that the user started: a foreign launcher may die of it at once."""
    command, more = LAUNCHES[launch]
    limit = ("--max-minutes", "0.001") if request_ == "--max-minutes" else ()
    process = start(workplace, *command, *arguments(*more, *limit))
    if not limit:
        wait_for_iteration(workplace, 1, process)
    asked = time.monotonic()
    if request_.startswith("SIG"):
        process.send_signal(signal.Signals[request_])
    elif request_ == "the file stop":
        (run_directory(workplace) / "stop").touch()
    returned, output = ended(process, within=PATIENCE)
    while _processes_in(workplace) and time.monotonic() < asked + PATIENCE:
        time.sleep(0.2)
    assert not _processes_in(workplace)
    if launch in ("alone", "ours"):
        assert returned == 85, output
        assert "the same command goes on" in output
    ending = status(workplace)
    assert ending["exit_code"] == 85, output
    # A launcher that dies has the kernel ask its processes to stop, with a signal of its own.
    assert ending["reason"] in {request_, "SIGTERM", "another process"}
    assert checkpoint_iterations(workplace) == [ending["iteration"]]
    assert not (run_directory(workplace) / "stop").exists()


def checkpoint_iterations(directory: Path) -> list[int]:
    there = (run_directory(directory) / "checkpoints").iterdir()
    return [int(path.name.removeprefix("iteration-")) for path in there]


def test_every_launcher_trains_the_same_run(workplace: Path) -> None:
    """One process or two, ours or theirs: the losses agree, and two processes agree in all bits."""
    seen = {}
    for name, command, processes, code in (
        ("one", OURS, (), 85),
        ("ours", OURS, ("--processes", "2"), 85),
        ("torchrun", TORCHRUN, (), 1),
        ("accelerate", ACCELERATE, (), 1),
    ):
        directory = workplace / name
        directory.mkdir()
        (directory / "data").symlink_to(workplace / "data")
        process = start(directory, *command, *arguments("--stop-after", "2", *processes))
        returned, output = ended(process)
        assert returned == code, output
        assert status(directory) == {"exit_code": 85, "reason": "--stop-after", "iteration": 2}
        seen[name] = losses(directory)
        config = json.loads((run_directory(directory) / "config.json").read_text())
        assert config["world_size"] == (1 if name == "one" else 2)
    assert seen["ours"] == seen["torchrun"] == seen["accelerate"]
    assert seen["ours"] == pytest.approx(seen["one"], rel=1e-3)
    weights = {
        name: (run_directory(workplace / name) / "checkpoints/iteration-00000002/model.safetensors")
        for name in seen
    }
    assert weights["ours"].read_bytes() == weights["torchrun"].read_bytes()
    assert weights["ours"].read_bytes() == weights["accelerate"].read_bytes()


def test_a_run_goes_on_with_another_number_of_processes(workplace: Path) -> None:
    for more in (("--stop-after", "4", "--processes", "2"), ("--stop-after", "6"), ()):
        returned, output = ended(start(workplace, *OURS, *arguments(*more)), within=300)
        assert returned == (85 if more else 0), output
    records = [
        json.loads(line)
        for line in (run_directory(workplace) / "metrics.jsonl").read_text().splitlines()
    ]
    iterations = [record["iteration"] for record in records if "train/loss" in record]
    assert iterations == list(range(1, 33))


@pytest.mark.parametrize("lost", ["child", "launcher"])
def test_a_killed_process_ends_the_run(workplace: Path, lost: str) -> None:
    process = start(workplace, *OURS, *arguments("--processes", "3"))
    wait_for_iteration(workplace, 2, process)
    killed = time.monotonic()
    children = [pid for pid in _processes_in(workplace) if pid != process.pid]
    assert len(children) == 3
    os.kill(process.pid if lost == "launcher" else max(children), signal.SIGKILL)
    returned, output = ended(process, within=PATIENCE)
    while _processes_in(workplace) and time.monotonic() < killed + PATIENCE:
        time.sleep(0.2)
    assert not _processes_in(workplace)
    if lost == "child":
        assert returned == 75, output
        assert "lost process 2" in output and "Traceback" not in output
    else:  # asked to stop by the kernel, they saved
        assert status(workplace)["exit_code"] == 85


def test_a_stalled_process_is_named(workplace: Path) -> None:
    process = start(workplace, *OURS, *arguments("--processes", "2"), RESNET_DDP_TIMEOUT="5")
    wait_for_iteration(workplace, 2, process)
    stalled = max(pid for pid in _processes_in(workplace) if pid != process.pid)
    os.kill(stalled, signal.SIGSTOP)
    returned, output = ended(process, within=PATIENCE)
    assert returned == 75, output
    assert "process 0 lost process 1" in output and "Traceback" not in output


def test_a_request_to_stop_is_agreed_on(workplace: Path) -> None:
    process = start(workplace, *OURS, *arguments("--processes", "2"))
    wait_for_iteration(workplace, 2, process)
    stopped = max(pid for pid in _processes_in(workplace) if pid != process.pid)
    os.kill(stopped, signal.SIGTERM)  # one of the two only
    returned, output = ended(process, within=PATIENCE)
    assert returned == 85, output
    assert status(workplace)["exit_code"] == 85
    checkpoints = list((run_directory(workplace) / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == [
        f"iteration-{status(workplace)['iteration']:08d}"
    ]


@pytest.mark.parametrize(
    ("environment", "command", "words"),
    [
        ({"WORLD_SIZE": "2"}, OURS, "half a launch"),
        ({"MASTER_ADDR": "localhost"}, OURS, "half a launch"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, OURS, "half a launch"),
        (
            {},
            (*ACCELERATE[:2], "--cpu", "--num_processes", "2", str(ROOT / "train.py")),
            "asked for 2 processes and started one",
        ),
    ],
)  # fmt: skip
def test_processes_that_would_train_apart_are_refused(
    workplace: Path, environment: dict[str, str], command: tuple[str, ...], words: str
) -> None:
    returned, output = ended(start(workplace, *command, *arguments(), **environment))
    assert returned == (1 if "accelerate" in command[1] else 2)
    assert words in output
    assert not (workplace / "runs").exists()


def test_processes_that_disagree_are_told_both_values(workplace: Path) -> None:
    """Two processes of one launch, started with different seeds."""
    script = workplace / "start.py"
    script.write_text(
        "import os, sys\n"
        "from resnet_ddp.cli import train_main\n"
        "sys.exit(train_main([*sys.argv[1:], '--seed', os.environ['RANK']]))\n"
    )
    command = (*TORCHRUN[:-1], str(script), *arguments())
    _, output = ended(start(workplace, *command))
    assert "the processes differ in seed: 0 in process 0, 1 in process 1" in output
    assert not list(workplace.glob("runs/*/*/*/checkpoints"))


def test_a_result_that_only_some_processes_saw_keeps_none_waiting(workplace: Path) -> None:
    """The run is done while two processes start: the one that looks later must still join."""
    returned, output = ended(start(workplace, *OURS, *arguments()))
    assert returned == 0, output
    result = run_directory(workplace) / "result.json"
    script = workplace / "start.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "from resnet_ddp import runs\n"
        "from resnet_ddp.cli import train_main\n"
        "read = runs.read_object\n"
        "def late(path):\n"
        "    there = read(path)\n"
        "    first = path.name == 'result.json' and not late.looked\n"
        "    late.looked |= path.name == 'result.json'\n"
        "    return None if first and os.environ['RANK'] == '1' else there\n"
        "late.looked = False\n"
        "runs.read_object = late\n"
        "sys.exit(train_main(sys.argv[1:]))\n"
    )
    before = result.read_bytes()
    command = (*TORCHRUN[:-1], str(script), *arguments())
    returned, output = ended(start(workplace, *command), within=PATIENCE)
    assert returned == 0, output
    assert result.read_bytes() == before
