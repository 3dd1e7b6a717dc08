"""The grid on a real Slurm: whatever the scheduler does, each run ends once, with the same bits."""

from __future__ import annotations

import collections
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import OVER, Cluster, require_slurm, wait_for
from conftest import ROOT, SCRIPTS, environment

from resnet_ddp.exits import ExitCode

pytestmark = pytest.mark.slurm

TOY = Path(__file__).with_name("toy")
OUTCOME = ("model.safetensors", "metrics.jsonl", "result.json")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_slurm()
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster", GRACE="3")
    yield cluster
    cluster.close()


class Campaign:
    """A grid of runs, submitted as a user does it; torn down by the fixture below."""

    def __init__(
        self, cluster: Cluster, home: Path, data: Path, models: str, seeds: str, **variables: str
    ) -> None:
        self.cluster, self.home = cluster, home
        home.mkdir(exist_ok=True)
        self.cells = [(model, int(seed)) for model in models.split(",") for seed in expand(seeds)]
        self.options = ["--models", models, "--seeds", seeds, "--data", str(data)]
        recipe = variables.get("REAL_TRAINER", "toy")
        self.options += ["--recipe", recipe, "--grid", "g", "--devices", "cpu"]
        self.directory = home / "runs" / "g"
        path = os.pathsep.join([str(TOY), str(ROOT)])
        self.variables = environment(home, PYTHONPATH=path, HOME=str(home), TMPDIR=str(home))
        self.variables |= {"CXX": "none"}  # no job should wait for a compiler
        self.variables |= variables | {"SLURM_CONF": cluster.environment["SLURM_CONF"]}

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(SCRIPTS / "resnet-ddp"), *command],
            cwd=self.home,
            env=self.variables | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def submit(self, *more: str, mem: str = "150M", **variables: str) -> tuple[str, str]:
        """Return the ids of the array and of the report job."""
        process = self.run("grid", "submit", *self.options, "--mem", mem, *more, **variables)
        assert process.returncode == 0, process.stdout + process.stderr
        ids = re.findall(r"^job (\d+):", process.stdout, re.MULTILINE)
        assert len(ids) == 2, process.stdout
        return ids[0], ids[1]

    def status(self) -> dict[tuple[str, int], dict]:
        process = self.run("grid", "status", *self.options[:10], "--json")
        assert process.returncode == 0, process.stderr
        return {(cell["model"], cell["seed"]): cell for cell in json.loads(process.stdout)["cells"]}

    def path(self, model: str, seed: int) -> Path:
        return self.directory / model / f"seed{seed}"

    def lives(self, model: str, seed: int) -> list[str]:
        """Return job, restart, node and first iteration of each life of the stand-in."""
        file = self.path(model, seed) / "lives"
        return file.read_text().splitlines() if file.exists() else []

    def plan(self, model: str, seed: int, words: str) -> None:
        self.path(model, seed).mkdir(parents=True)
        (self.path(model, seed) / "plan").write_text(words)

    def wait_until_saved(self, model: str, seed: int) -> None:
        wait_for(lambda: any((self.path(model, seed) / "checkpoints").glob("iteration-*")), 60)

    def is_done(self) -> bool:
        return all((self.path(*cell) / "result.json").is_file() for cell in self.cells)

    def outcomes(self) -> dict[str, bytes]:
        return {
            f"{model} {seed} {name}": (self.path(model, seed) / name).read_bytes()
            for model, seed in self.cells
            for name in OUTCOME
            if name != "metrics.jsonl" or "REAL_TRAINER" in self.variables
        }

    def log(self, index: int, submission: int = 1) -> str:
        return (self.directory / "slurm" / str(submission) / f"task-{index}.log").read_text()

    def check_bits(self) -> None:
        """Each is done once, with the weights of the stand-in's undisturbed run."""
        for model, seed in self.cells:
            path = self.path(model, seed)
            done = path / "done"  # a kill may come before it is written
            assert not done.exists() or done.read_text().count("\n") == 1, f"{model} {seed}"
            assert (path / "result.json").is_file()
            assert (path / "model.safetensors").read_text() == chain(path), f"{model} {seed}"


def expand(seeds: str) -> range:
    first, _, last = seeds.partition("-")
    return range(int(first), int(last or first) + 1)


def chain(path: Path) -> str:
    """Return the stand-in's weights after all iterations."""
    import hashlib

    digest = ""
    for iteration in range(20):
        text = f"{digest} {path.parent.name} {path.name} {iteration}"
        digest = hashlib.sha256(text.encode()).hexdigest()
    return digest


@pytest.fixture
def campaign(slurm: Cluster, tmp_path: Path, small_data: Path) -> Iterator[Callable[..., Campaign]]:
    """`campaign(models, seeds, ...)` returns a grid in a directory of its own."""
    yield lambda models="resnet20", seeds="0-1", **variables: Campaign(
        slurm,
        tmp_path / f"home{len(list(tmp_path.iterdir()))}",
        small_data,
        models,
        seeds,
        **variables,
    )
    slurm.reset()


def restarts(slurm: Cluster, *tasks: str) -> list[int]:
    shown = (slurm("scontrol", "show", "job", task) for task in tasks)
    return [int(re.search(r"Restarts=(\d+)", text)[1]) for text in shown]


def test_the_whole_grid_with_a_tiny_recipe(
    slurm: Cluster, campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    models = "resnet20,resnet32,plain20,resnet20-b,resnet20-maxpool"
    grid = campaign(models, "0-4", REAL_TRAINER="tiny")
    site = tmp_path / "site.toml"
    site.write_text(
        'copy-data = true\nscratch = "$HOME/node-disk"\narray-limit = 2\ngres = "gpu:1"\n'
    )
    began = time.monotonic()
    array, report = grid.submit("--site", str(site), mem="1500M")
    assert time.monotonic() - began < 4  # two seconds, on a machine that others use too
    again = grid.run("grid", "submit", *grid.options)
    assert "nothing to submit" in again.stdout and again.returncode == 0
    found = slurm.wait_for(report, seconds=600)
    assert {state for state, _, _ in found.values()} == {"COMPLETED"}, grid.log(0)
    tasks = slurm.jobs(array)
    assert len(tasks) == 25 and {state for state, _, _ in tasks.values()} == {"COMPLETED"}
    assert (grid.directory / "report" / "report.html").is_file()
    assert "done: all 25 runs" in grid.run("grid", "submit", *grid.options).stdout
    # The deepest first; a log that one finds from the run; the data once a node, on its own disk.
    assert "resnet32/0" in grid.log(0) and "resnet32/4" in grid.log(4)
    link = grid.path("resnet32", 3) / "slurm.log"
    assert link.is_symlink() and link.read_text() == grid.log(3)
    copies = list((grid.home / "node-disk").glob("resnet-ddp-*/data/*/train.beton"))
    assert len(copies) == 1


def test_a_signal_requeues_this_task_only(
    slurm: Cluster, campaign: Callable[..., Campaign]
) -> None:
    grid = campaign("resnet20,plain20", "0-1", TOY_SECONDS="0.15")
    array, report = grid.submit()
    # The last task of an array has the array's own id: here its requeueing would take all along.
    grid.wait_until_saved("plain20", 1)
    slurm("scancel", "--batch", "--signal=USR1", f"{array}_3", check=False)
    wait_for(lambda: len(grid.lives("plain20", 1)) > 1, 60)
    slurm.wait_for(report)
    grid.check_bits()
    assert restarts(slurm, f"{array}_0", f"{array}_1", f"{array}_2") == [0, 0, 0]
    assert "is requeued" in grid.log(3)
    # The index kept its run, and the log went on in the same file.
    starts = [line for line in grid.log(3).splitlines() if line.startswith("---")]
    assert len(starts) > 1 and all(line.endswith(": plain20/1") for line in starts)
    assert int(grid.lives("plain20", 1)[1].split()[3]) > 0


def test_a_node_that_crashes(slurm: Cluster, campaign: Callable[..., Campaign]) -> None:
    grid = campaign(TOY_SECONDS="0.3")
    array, report = grid.submit()
    grid.wait_until_saved("resnet20", 0)
    node = slurm.jobs(f"{array}_0")[f"{array}_0"][2]
    assert grid.status()["resnet20", 0]["slurm"]["nodes"] == node
    slurm.crash(node)
    slurm.wait_for(report)
    slurm.boot(node)
    grid.check_bits()
    lives = grid.lives("resnet20", 0)
    assert len(lives) == 2 and lives[0].split()[2] == node != lives[1].split()[2]


def test_the_time_limit(slurm: Cluster, campaign: Callable[..., Campaign]) -> None:
    grid = campaign("resnet20", "0", TOY_SECONDS="2.5")
    array, _ = grid.submit()
    wait_for(lambda: grid.lives("resnet20", 0), 30)
    slurm("scontrol", "update", f"jobid={array}_0", "EndTime=now+1")
    wait_for(lambda: len(grid.lives("resnet20", 0)) == 2, 60, lambda: grid.log(0))
    assert "TIME LIMIT" in grid.log(0) and "is requeued" in grid.log(0)
    assert int(grid.lives("resnet20", 0)[1].split()[3]) > 0
    slurm.reset()


def test_the_end_of_the_job_is_seen_coming(
    slurm: Cluster, campaign: Callable[..., Campaign]
) -> None:
    grid = campaign("resnet20", "0", TOY_SECONDS="3")
    grid.submit("--time", "1")
    wait_for(lambda: len(grid.lives("resnet20", 0)) == 2, 80, lambda: grid.log(0))
    assert "the end of the Slurm job" in grid.log(0) and "TIME LIMIT" not in grid.log(0)
    slurm.reset()


def test_preemption(slurm: Cluster, campaign: Callable[..., Campaign]) -> None:
    grid = campaign("resnet20", "0", TOY_SECONDS="0.4")
    _, report = grid.submit("--partition", "low", "--sbatch", "--nodelist=n1 --exclusive")
    grid.wait_until_saved("resnet20", 0)
    urgent = ["-p", "main", "-w", "n1", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"]
    slurm("sbatch", *urgent)
    slurm.wait_for(report)
    grid.check_bits()
    assert len(grid.lives("resnet20", 0)) > 1


def test_two_copies_of_a_task(slurm: Cluster, campaign: Callable[..., Campaign]) -> None:
    grid = campaign("resnet20", "0", TOY_SECONDS="1.0")
    array, report = grid.submit()
    grid.wait_until_saved("resnet20", 0)
    node = slurm.jobs(f"{array}_0")[f"{array}_0"][2]
    slurm.node("partition", node)  # its processes live on
    slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=partition")
    wait_for(lambda: grid.log(0).count("---") == 2, 30, lambda: grid.log(0))
    slurm.wait_for(report)
    assert len(grid.lives("resnet20", 0)) == 1, "the second copy has to leave it alone"
    grid.check_bits()
    slurm.node("crash", node)
    slurm.boot(node)


def test_what_was_cancelled_is_submitted_again_and_nothing_else(
    slurm: Cluster, campaign: Callable[..., Campaign]
) -> None:
    grid = campaign("resnet20", "0-2", TOY_SECONDS="0.3")
    array, report = grid.submit("--array-limit", "2")
    grid.wait_until_saved("resnet20", 0)
    slurm("scancel", f"{array}_0", f"{array}_2")
    wait_for(lambda: "cancelled" in grid.log(0), 30, lambda: grid.log(0))
    slurm.wait_for(f"{array}_0", f"{array}_2")
    state = grid.status()
    assert state["resnet20", 0]["slurm"] is None and state["resnet20", 0]["state"] == "waiting"
    _, second_report = grid.submit()
    scripts = [grid.directory / "slurm" / str(number) / "array.sbatch" for number in (1, 2)]
    assert "resnet20/1" in scripts[0].read_text() and "resnet20/1" not in scripts[1].read_text()
    slurm.wait_for(report, second_report)
    grid.check_bits()
    assert int(grid.lives("resnet20", 0)[1].split()[3]) > 0


def test_what_is_not_requeued_and_what_only_so_often(
    slurm: Cluster, campaign: Callable[..., Campaign]
) -> None:
    grid = campaign("resnet20", "0-4")
    plans = ["2", "65", "kill 75", "75 75 75 75", "freeze freeze freeze freeze"]
    for seed, plan in enumerate(plans):
        grid.plan("resnet20", seed, plan)
    array, report = grid.submit("--complete")
    for life in (1, 2, 3):  # three without progress: a node is lost each time
        wait_for(lambda life=life: len(grid.lives("resnet20", 4)) == life, 60)
        slurm("scontrol", "requeue", f"{array}_4")
    slurm.wait_for(array)
    lives = [len(grid.lives("resnet20", seed)) for seed in range(5)]
    assert lives == [1, 1, 3, 3, 3]
    # The report says so, and what is given up is not submitted again by a job.
    found = slurm.wait_for(report)
    assert "3 lives without progress" in grid.log(4)
    assert found[report][0] == "FAILED"
    shown = slurm("scontrol", "show", "job", report)
    assert f"ExitCode={int(ExitCode.INCOMPLETE)}:0" in shown
    text = (grid.directory / "slurm" / "1" / "report.log").read_text()
    assert "nothing to submit" in text and "for good" in text and text.count("given up") == 3
    assert not (grid.directory / "slurm" / "2").exists()
    # A person's submission tries again, but not what can only fail again.
    grid.submit()
    script = (grid.directory / "slurm" / "2" / "array.sbatch").read_text()
    assert all(f"resnet20/{seed}" in script for seed in (0, 3, 4))
    assert "resnet20/1" not in script and "resnet20/2" not in script


def test_what_is_missing_is_submitted_again_three_times(
    slurm: Cluster, campaign: Callable[..., Campaign]
) -> None:
    """The site forbids requeueing: a life is a job."""
    grid = campaign("resnet20", "0", TOY_SECONDS="1")
    ids = grid.submit("--complete", "--sbatch=--no-requeue")
    for number in (1, 2, 3, 4):
        wait_for(lambda number=number: len(grid.lives("resnet20", 0)) == number, 60)
        array = grid.lives("resnet20", 0)[-1].split("_")[0]
        time.sleep(1.2)
        slurm("scancel", "--batch", "--signal=TERM", f"{array}_0", check=False)
        wait_for(lambda number=number: "not requeued" in grid.log(0, number), 30)
    assert ids
    wait_for(lambda: not slurm.jobs() or all(one[0] in OVER for one in slurm.jobs().values()), 60)
    assert len(grid.lives("resnet20", 0)) == 4
    starts = [int(life.split()[3]) for life in grid.lives("resnet20", 0)]
    assert starts == sorted(set(starts))  # each went on where the one before was


def test_runs_that_share_a_task(slurm: Cluster, campaign: Callable[..., Campaign]) -> None:
    grid = campaign("resnet20,plain20", "0-2", TOY_SECONDS="0.3")
    grid.plan("resnet20", 1, "2")
    array, report = grid.submit("--runs-per-task", "4", "--cpus-per-task", "4")
    grid.wait_until_saved("resnet20", 0)
    slurm("timeout", "2", "scancel", "--batch", "--signal=USR1", f"{array}_0", check=False)
    slurm.wait_for(report)
    assert len(grid.lives("resnet20", 0)) > 1
    assert len(grid.lives("resnet20", 1)) == 1, "what ended with 2 is not tried again"
    states = [cell["state"] for cell in grid.status().values()]
    assert states == ["done", "failed", "done", "done", "done", "done"]
    assert len(slurm.jobs(array)) == 2
    assert slurm.jobs(array)[f"{array}_0"][0] == "FAILED"
    assert slurm.jobs(array)[f"{array}_1"][0] == "COMPLETED"


def test_a_controller_that_is_away(slurm: Cluster, campaign: Callable[..., Campaign]) -> None:
    grid = campaign("resnet20", "0", TOY_SECONDS="0.5")
    _, report = grid.submit()
    grid.wait_until_saved("resnet20", 0)
    slurm.controller("STOP")
    try:
        began = time.monotonic()
        process = grid.run("grid", "status", *grid.options[:10])
        assert process.returncode == 0 and "squeue did not answer" in process.stdout
        assert time.monotonic() - began < 5  # one of them for Slurm
        time.sleep(8)
    finally:
        slurm.controller("CONT")
    slurm.wait_for(report)
    grid.check_bits()
    assert len(grid.lives("resnet20", 0)) == 1


def test_nothing_of_the_launch_around_it_gets_into_a_job(
    slurm: Cluster, campaign: Callable[..., Campaign]
) -> None:
    grid = campaign("resnet20", "0")
    around = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "29500"}
    job = {"SLURM_NTASKS": "64", "SLURM_MEM_PER_NODE": "99999", "SLURM_JOB_ID": "1"}
    job |= {"SLURM_ARRAY_TASK_ID": "7", "SBATCH_ARRAY_INX": "0-99", "SLURM_RESTART_COUNT": "9"}
    _, report = grid.submit("--sbatch=--export=ALL", **around, **job)
    slurm.wait_for(report)
    grid.check_bits()
    assert "restart 0" in grid.log(0)


def test_two_nodes_are_one_process(
    slurm: Cluster, campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    grid = campaign("resnet20", "0", REAL_TRAINER="tiny", RESNET_DDP_TIMEOUT="60")
    _, report = grid.submit("--nodes", "2", "--ntasks-per-node", "1", mem="2G")
    slurm.wait_for(report, seconds=300)
    assert "done, test error" in grid.log(0), (grid.path("resnet20", 0) / "log.txt").read_text()
    starts = (grid.path("resnet20", 0) / "timing.jsonl").read_text().splitlines()
    assert json.loads(starts[0])["world_size"] == 2
    # The audit's comparison, of one network.
    code = (
        "from resnet_ddp.audit import together; together.MODELS = ('resnet20',); "
        "from resnet_ddp.cli import main; "
        "raise SystemExit(main(['audit', '--srun', '--device', 'cpu']))"
    )
    out = tmp_path / "audit"
    command = ["sbatch", "--parsable", "-N2", "--ntasks-per-node=1", "--mem=2G", "-o", str(out)]
    job = subprocess.run(
        [*command, "--wrap", f'{sys.executable} -c "{code}"'],
        cwd=grid.home,
        env=grid.variables,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    found = slurm.wait_for(job, seconds=300)
    text = out.read_text()
    assert found[job][0] == "COMPLETED", text
    assert "gradient on 2 processes and on one" in text


@pytest.mark.slow
def test_two_nodes_are_requeued_together(slurm: Cluster, campaign: Callable[..., Campaign]) -> None:
    """A signal to the job's script reaches all ranks; they save, and go on as if nothing was."""
    grid = campaign("resnet20", "0", REAL_TRAINER="short", RESNET_DDP_TIMEOUT="60")
    array, report = grid.submit("--nodes", "2", "--save-every", "4", mem="2G")
    grid.wait_until_saved("resnet20", 0)
    slurm("timeout", "2", "scancel", "--batch", "--signal=USR1", f"{array}_0", check=False)
    slurm.wait_for(report, seconds=300)
    timing = (grid.path("resnet20", 0) / "timing.jsonl").read_text().splitlines()
    starts = [line for line in map(json.loads, timing) if line.get("event") == "start"]
    assert [start["world_size"] for start in starts] == [2] * len(starts) and len(starts) > 1
    assert starts[1]["iteration"] > 0 and grid.is_done()


SCHEDULES, TOGETHER = int(os.environ.get("SCHEDULES", "50")), 5
EVENTS = 6  # for each schedule


class Weather:
    """What a scheduler and its machines may do, drawn at random."""

    def __init__(self, slurm: Cluster, draw: random.Random) -> None:
        self.slurm, self.draw = slurm, draw
        self.counts: collections.Counter[str] = collections.Counter()

    def strike(self, task: str) -> None:
        names = ["signal", "signal", "limit", "requeue", "requeue", "cancel", "preempt", "preempt"]
        name = self.draw.choice([*names, "crash", "partition", "outage"])
        self.counts[name] += 1
        getattr(self, name)(task)

    def ask(self, *command: str) -> None:
        """Whatever comes of it: a task may be over. scancel would try again and again."""
        self.slurm("timeout", "2", *command, check=False)

    def signal(self, task: str) -> None:
        number = self.draw.choice(["USR1", "TERM"])
        self.ask("scancel", "--batch", f"--signal={number}", task)

    def limit(self, task: str) -> None:
        self.ask("scontrol", "update", f"jobid={task}", "EndTime=now+1")

    def requeue(self, task: str) -> None:
        self.ask("scontrol", "requeue", task)

    def cancel(self, task: str) -> None:
        self.ask("scancel", task)

    def preempt(self, task: str) -> None:
        node = self.draw.choice(["n1", "n2"])
        where = ["-p", "main", "-w", node, "--exclusive", "-o", "/dev/null", "-t", "5"]
        self.ask("sbatch", *where, "--wrap", "sleep 1")

    def crash(self, task: str) -> None:
        node = self.draw.choice(["n1", "n2"])
        self.slurm.crash(node)
        time.sleep(self.draw.uniform(0, 3))
        self.slurm.boot(node)

    def partition(self, task: str) -> None:
        node = self.draw.choice(["n1", "n2"])
        self.slurm.node("partition", node)
        self.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=partition")
        time.sleep(self.draw.uniform(6, 9))  # until the tasks run twice
        self.slurm.node("crash", node)
        self.slurm.boot(node)

    def outage(self, task: str) -> None:
        self.slurm.controller("STOP")
        try:
            time.sleep(self.draw.uniform(1, 8))
        finally:
            self.slurm.controller("CONT")


@pytest.mark.slow
def test_random_schedules(slurm: Cluster, campaign: Callable[..., Campaign]) -> None:
    counts: collections.Counter[str] = collections.Counter()
    num_lives = 0
    for first in range(0, SCHEDULES, TOGETHER):
        draw = random.Random(first)
        weather = Weather(slurm, draw)
        numbers = range(first, min(SCHEDULES, first + TOGETHER))
        grids = [campaign("resnet20,plain20", "0-1", TOY_SECONDS="0.4") for _ in numbers]
        options = ["--partition", "low"]
        arrays = {grid.home: grid.submit(*options)[0] for grid in grids}
        left, until = EVENTS * len(grids), time.monotonic() + 600
        while going_on := [grid for grid in grids if not grid.is_done()]:
            assert time.monotonic() < until, [grid.home for grid in going_on]
            time.sleep(draw.uniform(0.1, 1.5))
            grid = draw.choice(going_on)
            if left:
                left -= 1
                weather.strike(f"{arrays[grid.home]}_{draw.randrange(4)}")
            elif all(one[0] in OVER for one in slurm.jobs(arrays[grid.home]).values()):
                process = grid.run("grid", "submit", *grid.options, "--mem=150M", *options)
                found = re.search(r"^job (\d+):", process.stdout, re.MULTILINE)
                arrays[grid.home] = found[1] if found else arrays[grid.home]
        for grid in grids:
            grid.check_bits()
            num_lives += sum(len(grid.lives(*cell)) for cell in grid.cells)
        counts += weather.counts
        print(f"{numbers.stop} schedules: {num_lives} lives, {dict(counts)}", flush=True)
        slurm.reset()
    assert num_lives > 4 * SCHEDULES
