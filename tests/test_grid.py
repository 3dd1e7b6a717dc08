"""Many runs: in which order, on what, what becomes of those that fail, and what a person sees."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from conftest import Command, environment

from resnet_ddp import lease
from resnet_ddp.cli import main
from resnet_ddp.exits import ExitCode, UserError
from resnet_ddp.grid import slots, supervisor
from resnet_ddp.grid.cells import (
    Grid,
    GridCell,
    longest_first,
    makespan,
    read_models,
    read_seeds,
)
from resnet_ddp.grid.picture import as_json, picture, summary
from resnet_ddp.grid.slots import Slot, find_slots, visible_gpus
from resnet_ddp.grid.states import RunState, State, read_state, seconds_left
from resnet_ddp.grid.supervisor import Supervisor
from resnet_ddp.lease import Lease, Observer
from resnet_ddp.recipe import RECIPES
from resnet_ddp.stop import StopRequest

CELL = Path(__file__).with_name("cell.py")
RECIPE = RECIPES["he2015-tiny"]


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    return Grid(tmp_path / "runs", "g", ("resnet20", "plain20"), (0, 1), RECIPE)


# ---- cells


def test_lists_of_models_and_seeds_are_read() -> None:
    assert read_models("plain20,resnet20,plain20") == ("plain20", "resnet20")
    assert read_seeds("0-2,7,1") == (0, 1, 2, 7)


@pytest.mark.parametrize(
    "text", ["", "3-1", "a", "0-", "-1", "0,,1", "0-4294967296", "0-1000", "3\u0663"]
)
def test_bad_lists_of_seeds_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--seeds"):
        read_seeds(text)


def test_the_longest_run_comes_first() -> None:
    models = ("resnet20", "resnet56", "resnet110", "plain20", "plain56")
    order = longest_first(Grid(Path(), "g", models, (0, 1), RECIPE).cells)
    assert [cell.model for cell in order[::2]] == [
        *("resnet110", "resnet56", "plain56", "resnet20", "plain20")
    ]
    assert order[:2] == [GridCell("resnet110", 0), GridCell("resnet110", 1)]


def test_the_end_is_that_of_whoever_is_free_taking_the_next() -> None:
    assert makespan([], [3, 2, 2], slots=2) == 4
    assert makespan([5.0], [1, 1, 1], slots=2) == 5
    assert makespan([], [], slots=1) == 0


# ---- states


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def state_of(path: Path) -> RunState:
    return read_state(path, RECIPE, Observer())


@pytest.mark.parametrize(
    ("files", "state", "word"),
    [
        ({}, State.WAITING, ""),
        ({"status": {"exit_code": 85, "reason": "SIGTERM", "iteration": 7}}, State.WAITING, ""),
        ({"status": {"exit_code": 75, "reason": "no space"}}, State.WAITING, "no space"),
        ({"status": {"exit_code": None, "reason": "running"}}, State.STALE, "gone"),
        ({"status": {"exit_code": 65, "reason": "not finite"}}, State.FAILED, "not finite"),
        ({"status": {"exit_code": "x", "reason": [1]}}, State.FAILED, "1"),
        ({"status": "{"}, State.FAILED, "status.json is damaged"),
        ({"result": "[]"}, State.FAILED, "result.json is damaged"),
        ({"result": {"recipe_hash": RECIPE.hash}}, State.FAILED, "test_error_rate"),
        ({"result": {"recipe_hash": "0", "recipe": "a\x1b[31m"}}, State.FAILED, "another recipe"),
        ({"result": {"recipe_hash": RECIPE.hash, "test_error_rate": 0.5}}, State.DONE, ""),
    ],
)
def test_a_directory_tells_how_its_run_stands(
    tmp_path: Path, files: Mapping[str, object], state: State, word: str
) -> None:
    for name, value in files.items():
        write(tmp_path / f"{name}.json", value)
    found = state_of(tmp_path)
    assert found.state is state and word in found.reason and "\x1b" not in found.reason


def test_a_running_one_tells_how_far_it_is(tmp_path: Path) -> None:
    lines = ['{"event": "start"}', '{"iteration": 100, "images_per_second": 512.0}', '{"iterat']
    write(tmp_path / "timing.jsonl", "\n".join(lines))
    holder = Lease(tmp_path)
    holder.acquire()
    try:
        found = state_of(tmp_path)
    finally:
        holder.release()
    assert found.state is State.RUNNING and found.iteration == 100
    assert found.seconds_left == (RECIPE.iterations - 100) * 128 / 512
    assert str(os.getpid()) in found.holder
    assert state_of(tmp_path).state is State.WAITING


def test_a_lease_of_another_host_counts_while_its_beat_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(lease.time, "monotonic", lambda: now)
    observer = Observer()

    def beat(number: int) -> None:
        facts = {"host": "there", "kernel": "another", "pid": 7, "beat": number}
        write(tmp_path / "lease.json", facts)

    beat(1)
    assert observer.holder(tmp_path) == "there, process 7"
    now += 59
    assert observer.holder(tmp_path)
    beat(2)
    now += 59
    assert observer.holder(tmp_path)
    now += 60
    assert observer.holder(tmp_path) is None
    os.utime(tmp_path / "lease.json", (0, 0))
    assert Observer().holder(tmp_path) is None  # old at the first look


def test_observers_take_no_lease_away(tmp_path: Path) -> None:
    holder = Lease(tmp_path)
    ended = threading.Event()

    def look() -> None:
        observer = Observer()
        while not ended.is_set():
            observer.holder(tmp_path)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            holder = Lease(tmp_path)
            holder.acquire()
            holder.release()
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_what_was_measured_tells_when_all_is_done(grid: Grid) -> None:
    states = dict.fromkeys(grid.cells, RunState(State.WAITING))
    assert seconds_left(grid, states, longest_first(grid.cells), 1) is None
    first, *others = longest_first(grid.cells)
    speed = 128.0  # an iteration a second
    states[first] = RunState(State.RUNNING, 100, speed, seconds_left=400.0)
    alone = seconds_left(grid, states, others, 1)
    assert alone == pytest.approx(400 + 500 + 2 * 500 / 1.05)
    assert seconds_left(grid, states, others, 2) < 0.7 * alone
    done = dict.fromkeys(grid.cells, RunState(State.DONE, 500, speed))
    assert seconds_left(grid, done, [], 1) == 0


def test_the_picture_has_a_word_for_every_state(grid: Grid) -> None:
    from rich.console import Console

    kinds = [
        RunState(State.DONE, test_error_rate=0.0875),
        RunState(State.RUNNING, 250, 512.0, 60.0, holder="there, process 7"),
        RunState(State.FAILED, reason="the loss is [red]not finite"),
        RunState(State.STALE, 5, reason="its process is gone"),
    ]
    states = dict(zip(grid.cells, kinds, strict=True))
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        console.print(picture(grid, states))
    text = capture.get()
    for word in (
        "8.75%",
        "> 50%",
        "failed",
        "stale 1%",
        "512 images/s",
        "0:01:00 left",
        "[red]not",
    ):
        assert word in text
    assert summary(states) == "1 done, 1 running, 1 stale, 1 failed of 4"
    assert [cell["state"] for cell in json.loads(as_json(grid, states))["cells"]] == [
        *("done", "running", "failed", "stale")
    ]


# ---- slots


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`cores(n)` makes this a machine of n cores of two threads each and no GPU."""
    monkeypatch.setattr(slots, "visible_gpus", list)
    monkeypatch.setattr(slots, "_free_memory", lambda: 1 << 40)

    def set_cores(count: int) -> None:
        found = [(2 * core, 2 * core + 1) for core in range(count)]
        monkeypatch.setattr(slots, "physical_cores", lambda: found)

    return set_cores


def slots_of(devices: str = "auto", runs: int = 25, each: int | None = None, processes: int = 1):
    return find_slots(devices, num_runs=runs, runs_per_device=each, processes_per_run=processes)


@pytest.mark.parametrize(
    ("count", "runs", "each", "processes", "threads"),
    [
        *[(1, 25, None, 1, [1]), (2, 25, None, 1, [1, 1]), (2, 1, None, 1, [2])],
        *[(64, 25, None, 1, [2] * 11 + [3] * 14), (8, 25, 2, 1, [4, 4]), (8, 25, 2, 2, [2, 2])],
        (7, 25, None, 3, [1, 1]),
    ],
)
def test_cores_are_shared_out_once(
    cores: Callable[[int], None],
    count: int,
    runs: int,
    each: int | None,
    processes: int,
    threads: list[int],
) -> None:
    cores(count)
    found = slots_of(runs=runs, each=each, processes=processes)
    assert sorted(slot.threads for slot in found) == threads
    numbers = [number for slot in found for number in slot.cores]
    assert len(numbers) == len(set(numbers)) and len({slot.name for slot in found}) == len(found)
    assert sum(slot.threads * processes for slot in found) <= count


def test_memory_bounds_the_runs_at_a_time(
    cores: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(64)
    monkeypatch.setattr(slots, "_free_memory", lambda: 7 * 1024**3)
    assert [slot.threads for slot in slots_of()] == [21, 21, 22]


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four GPUs, as far as nvidia-smi knows."""
    tool = tmp_path / "bin" / "nvidia-smi"
    write(tool, "#!/bin/sh\nprintf '0\\n1\\n2\\n3\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_gpus_are_those_that_the_environment_leaves(gpus: None) -> None:
    assert visible_gpus({}) == ["0", "1", "2", "3"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2, GPU-ab"}) == ["2", "GPU-ab"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []


def test_each_gpu_has_its_runs(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def visible(found: list[Slot]) -> list[str]:
        return [slot.variables["CUDA_VISIBLE_DEVICES"] for slot in found]

    assert visible(slots_of()) == ["0", "1", "2", "3"]
    assert visible(slots_of(runs=3)) == ["0", "1", "2"]
    assert visible(slots_of("cuda:1,cuda:3", each=2)) == ["1", "3", "1", "3"]
    assert visible(slots_of(processes=2)) == ["0,1", "2,3"]
    assert [slot.device for slot in slots_of("cuda:0,cpu", each=1)] == ["cuda", "cpu"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert visible(slots_of("cuda:1")) == ["1"]


@pytest.mark.parametrize("devices", ["gpu", "cuda:4", "cuda:x", "cuda:", "", "cpu:0", "cuda:-1"])
def test_devices_that_are_not_there_are_refused(gpus: None, devices: str) -> None:
    with pytest.raises(UserError, match="--devices"):
        slots_of(devices)


def test_a_machine_that_is_too_small_is_named(cores: Callable[[int], None]) -> None:
    cores(2)
    with pytest.raises(UserError, match="this machine has 2"):
        slots_of(each=3)
    with pytest.raises(UserError, match="nvidia-smi finds no GPU"):
        slots_of("cuda")


# ---- supervisor, with runs that live by a plan


class Notes:
    """Keeps what a person would be shown."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def update(self, *_: object) -> None:
        pass

    def note(self, text: str) -> None:
        self.lines.append(text)

    def close(self) -> None:
        pass


@pytest.fixture
def supervise(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Supervisor]:
    """`supervise(plan, ...)` returns a supervisor of runs that live as the plan says."""
    monkeypatch.setattr(supervisor, "PAUSE", 0.05)
    monkeypatch.setattr(supervisor, "POLL", 0.02)

    def make(stop: StopRequest | None = None, slots: int = 2, **plans: str) -> Supervisor:
        for name, plan in plans.items():
            write(tmp_path / f"{name}.plan", plan)

        def command(cell: GridCell, slot: Slot) -> list[str]:
            plan = tmp_path / f"{cell.model}_{cell.seed}.plan"
            arguments = (str(grid.path(cell)), RECIPE.hash, str(plan))
            return [sys.executable, str(CELL), *arguments]

        places = [Slot(f"place {number}", "cpu", 1) for number in range(slots)]
        return Supervisor(grid, places, command, Notes(), stop or StopRequest())

    return make


def lives(grid: Grid, model: str, seed: int) -> int:
    return len((grid.path(GridCell(model, seed)) / "lives").read_text().split())


def test_all_are_trained_once(grid: Grid, supervise: Callable[..., Supervisor]) -> None:
    assert supervise().run() is ExitCode.DONE
    assert [lives(grid, cell.model, cell.seed) for cell in grid.cells] == [1, 1, 1, 1]
    assert supervise().run() is ExitCode.DONE  # nothing to do
    assert [lives(grid, cell.model, cell.seed) for cell in grid.cells] == [1, 1, 1, 1]


def test_what_is_temporary_is_tried_again(grid: Grid, supervise: Callable[..., Supervisor]) -> None:
    plans = {"resnet20_0": "75 kill", "resnet20_1": "save save save save", "plain20_0": "kill"}
    assert supervise(**plans).run() is ExitCode.DONE
    assert [lives(grid, cell.model, cell.seed) for cell in grid.cells] == [3, 5, 2, 1]


@pytest.mark.parametrize("code", [1, 2, 65])
def test_what_is_not_temporary_is_not_tried_again_and_touches_nobody(
    grid: Grid, supervise: Callable[..., Supervisor], code: int
) -> None:
    one = supervise(resnet20_0=f"{code}")
    assert one.run() is ExitCode.FAILED
    assert [lives(grid, cell.model, cell.seed) for cell in grid.cells] == [1, 1, 1, 1]
    assert one.given_up == {GridCell("resnet20", 0): f"ended with {code}"}
    assert [state.state for state in one.states.values()] == [State.FAILED, *3 * [State.DONE]]
    line = next(line for line in one.display.lines if "failed" in line)
    assert f"exit code {code}" in line and "log.txt" in line
    # The same command tries once more, unless that would only repeat what happened.
    assert supervise().run() is (ExitCode.FAILED if code == 65 else ExitCode.DONE)
    assert lives(grid, "resnet20", 0) == (1 if code == 65 else 2)


def test_three_lives_without_progress_end_it(
    grid: Grid, supervise: Callable[..., Supervisor]
) -> None:
    one = supervise(resnet20_0="75 75 75 75", plain20_1="save 75 75 75")
    assert one.run() is ExitCode.FAILED
    assert lives(grid, "resnet20", 0) == 3 and lives(grid, "plain20", 1) == 4
    assert set(one.given_up) == {GridCell("resnet20", 0), GridCell("plain20", 1)}


def test_a_run_that_somebody_stopped_stays_stopped(
    grid: Grid, supervise: Callable[..., Supervisor]
) -> None:
    one = supervise(plain20_0="stopped")
    assert one.run() is ExitCode.STOPPED
    assert one.put_aside == {GridCell("plain20", 0): "the file stop"}
    assert supervise().run() is ExitCode.DONE


def test_a_request_to_stop_reaches_all(grid: Grid, supervise: Callable[..., Supervisor]) -> None:
    stop = StopRequest()
    one = supervise(stop, resnet20_0="wait", resnet20_1="wait")
    with stop.listening():
        timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        assert one.run() is ExitCode.STOPPED
        timer.join()
    assert [state.state for state in one.states.values()] == [State.WAITING] * 4
    assert one.states[GridCell("resnet20", 0)].reason == "SIGTERM"
    assert supervise().run() is ExitCode.DONE


def test_a_second_ctrl_c_ends_at_once_and_leaves_nothing(
    grid: Grid, supervise: Callable[..., Supervisor]
) -> None:
    one = supervise(resnet20_0="wait")
    code = "import time\nwhile True:\n try: time.sleep(9)\n except BaseException: pass"
    one.command = lambda cell, slot: [
        sys.executable,
        "-c",
        f"import signal\nsignal.signal(15, signal.SIG_IGN)\n{code}",
    ]
    with one.stop.listening():
        timers = [threading.Timer(t, os.kill, (os.getpid(), signal.SIGINT)) for t in (0.5, 2.0)]
        for timer in timers:
            timer.start()
        with pytest.raises(KeyboardInterrupt):
            one.run()
    assert all(job.process.poll() is not None for job in one.jobs) and one.jobs


def test_two_supervisors_share_the_work(grid: Grid, supervise: Callable[..., Supervisor]) -> None:
    both = [supervise(slots=1), supervise(slots=1)]
    codes: list[ExitCode] = []
    threads = [threading.Thread(target=lambda one=one: codes.append(one.run())) for one in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [ExitCode.DONE] * 2
    assert [lives(grid, cell.model, cell.seed) for cell in grid.cells] == [1, 1, 1, 1]


def test_a_disk_that_refuses_a_log_is_temporary(
    grid: Grid, supervise: Callable[..., Supervisor]
) -> None:
    log = grid.path(GridCell("resnet20", 0)) / "log.txt"
    log.mkdir(parents=True)
    one = supervise()
    threading.Timer(0.1, log.rmdir).start()
    assert one.run() is ExitCode.DONE


# ---- the commands


def test_the_plan_is_shown_and_nothing_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_data: Path
) -> None:
    arguments = ["--data", str(small_data), "--runs", str(tmp_path / "runs"), "--devices", "cpu"]
    assert main(["grid", "run", *arguments, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "25 waiting of 25" in lines[0] and "resnet110 seed 0" in lines[2]
    assert "plain20 seed 4" in lines[-2] and "unknown" in lines[-1]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--models", "resnet21"], ["--seeds", "4-1"], ["--grid", "a/b"], ["--devices", "gpu"]),
        *(["--recipe", "he2016"], ["--data", "nowhere"], ["--runs-per-device", "0"]),
        ["--devices", "cpu", "--runs-per-device", "5000"],
    ],
)
def test_bad_input_is_a_line_or_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_data: Path, arguments: list[str]
) -> None:
    command = ["grid", "run", "--data", str(small_data), "--runs", str(tmp_path), *arguments]
    try:
        code = main(command)
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == ExitCode.BAD_INPUT
    assert len(capsys.readouterr().err.splitlines()) <= 2


def test_a_grid_that_is_done_says_so_at_once_and_without_torch(
    tmp_path: Path, start: Command, without_torch: dict[str, str], small_data: Path
) -> None:
    grid = Grid(tmp_path / "runs", "g", ("plain20",), (0, 1), RECIPE)
    for cell in grid.cells:
        result = {"recipe_hash": RECIPE.hash, "test_error_rate": 0.25}
        write(grid.path(cell) / "result.json", result)
    which = ["--models", "plain20", "--seeds", "0-1", "--recipe", RECIPE.name]
    where = ["--runs", str(grid.runs), "--grid", "g", "--data", str(small_data)]
    began = time.monotonic()
    run = start("resnet-ddp", "grid", "run", *which, *where, **without_torch)
    out, err = run.communicate()
    assert run.returncode == 0 and out.startswith("done: all 2 runs") and not err
    assert time.monotonic() - began < 2
    status = start("resnet-ddp", "grid", "status", *which, *where, "--json", **without_torch)
    cells = json.loads(status.communicate()[0])["cells"]
    assert [cell["test_error_rate"] for cell in cells] == [0.25, 0.25]
    watch = start("resnet-ddp", "grid", "status", *which, *where, "--watch", **without_torch)
    assert "25.00%" in watch.communicate()[0] and watch.returncode == 0


# ---- real runs

SHORT = """
from resnet_ddp.recipe import RECIPES, Recipe
RECIPES["short"] = Recipe(
    name="short", iterations=12, batch_size=16, batchnorm_group=16, drops=(6, 9)
)
"""
OUTCOME = ("model.safetensors", "metrics.jsonl", "result.json")


class Workplace:
    """Starts `grid run` on a small grid of real runs, and finds the processes that it has."""

    def __init__(self, directory: Path, data: Path, *, last_seed: int = 1) -> None:
        self.runs = directory / "runs"
        seeds = tuple(range(last_seed + 1))
        self.grid = Grid(self.runs, "g", ("resnet20", "plain20"), seeds, RECIPE)
        self.which = ["--models", "resnet20,plain20", "--seeds", f"0-{last_seed}"]
        write(directory / "short" / "sitecustomize.py", SHORT)
        self.variables = environment(directory, PYTHONPATH=str(directory / "short"))
        self.options = ["--data", str(data), "--recipe", "short", "--runs", str(self.runs)]

    def start(self, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "resnet_ddp", "grid", "run", "--devices", "cpu"]
        often = ["--grid", "g", "--log-every", "1", "--eval-every", "6", "--save-every", "1"]
        return subprocess.Popen(
            [*command, *self.which, *self.options, *often, *more],
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def processes(self) -> list[int]:
        """Return those that train a run of this grid."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
                is_zombie = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except (OSError, ValueError):
                continue
            is_ours = f"--runs={self.runs}".encode() in command
            if entry.name.isdecimal() and is_ours and not is_zombie:
                found.append(int(entry.name))
        return found

    def wait_for(self, happened: Callable[[], object], seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < until, "it did not happen"
            time.sleep(0.05)

    def outcomes(self) -> dict[str, bytes]:
        return {
            f"{cell.name} {name}": (self.grid.path(cell) / name).read_bytes()
            for cell in self.grid.cells
            for name in OUTCOME
        }

    def is_saved(self) -> bool:
        return any(self.runs.glob("g/*/*/checkpoints/iteration-*"))


@pytest.fixture
def workplace(tmp_path: Path, small_data: Path) -> Workplace:
    return Workplace(tmp_path, small_data)


def undisturbed(directory: Path, data: Path, *, last_seed: int = 1) -> dict[str, bytes]:
    other = Workplace(directory, data, last_seed=last_seed)
    process = other.start()
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return other.outcomes()


def test_interrupted_killed_and_gone_on_with_the_bits_are_the_same(
    workplace: Workplace, tmp_path: Path, small_data: Path
) -> None:
    first = workplace.start()
    workplace.wait_for(workplace.is_saved)
    first.send_signal(signal.SIGINT)
    out, _ = first.communicate(timeout=60)
    assert first.returncode == ExitCode.STOPPED and "the same command goes on" in out
    assert not workplace.processes()
    second = workplace.start()
    workplace.wait_for(workplace.processes)
    second.kill()
    second.communicate()
    workplace.wait_for(lambda: not workplace.processes())
    third = workplace.start()
    out, _ = third.communicate(timeout=120)
    assert third.returncode == 0 and out.endswith(f"done: all 4 runs of {workplace.runs / 'g'}\n")
    assert workplace.outcomes() == undisturbed(tmp_path / "other", small_data)


def test_nothing_is_left_of_runs_of_two_processes_when_the_launcher_is_killed(
    workplace: Workplace,
) -> None:
    one = workplace.start("--processes-per-run", "2") if len(os.sched_getaffinity(0)) > 1 else None
    if one is None:
        pytest.skip("one core")
    workplace.wait_for(lambda: len(workplace.processes()) >= 3)
    one.kill()
    one.communicate()
    workplace.wait_for(lambda: not workplace.processes())


@pytest.mark.slow
def test_killed_at_random_until_all_is_done(tmp_path: Path, small_data: Path) -> None:
    workplace = Workplace(tmp_path, small_data, last_seed=4)
    draw = random.Random(0)
    kills = {"run": 0, "grid": 0}
    process = workplace.start()
    while process.poll() is None:
        time.sleep(draw.uniform(3.0, 9.0))  # a life begins with seconds of imports
        if draw.random() < 0.5:
            process.kill()
            process.communicate()
            kills["grid"] += 1
            process = workplace.start()
        elif pids := workplace.processes():
            os.kill(draw.choice(pids), draw.choice([signal.SIGKILL, signal.SIGTERM]))
            kills["run"] += 1
        if process.poll() == ExitCode.FAILED:  # three lives without progress
            process = workplace.start()
    out, _ = process.communicate()
    assert process.returncode == 0, out
    print(kills)
    assert kills["run"] > 5 and kills["grid"] > 5, kills
    assert workplace.outcomes() == undisturbed(tmp_path / "other", small_data, last_seed=4)
