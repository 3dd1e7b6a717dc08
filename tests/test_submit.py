"""The grid on Slurm, without one: scripts, site files, what squeue says, and what becomes of it."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Command
from test_grid import write

from resnet_ddp.cli import main
from resnet_ddp.exits import ExitCode, UserError
from resnet_ddp.grid import local, script, task
from resnet_ddp.grid.cells import Grid, GridCell, longest_first, read_cells
from resnet_ddp.grid.lives import LIVES, Lives
from resnet_ddp.grid.queue import Queue, Task, parse_queue
from resnet_ddp.grid.site import read_site, with_site
from resnet_ddp.grid.states import RunState, State
from resnet_ddp.grid.submit import clean_environment, fill, read_time
from resnet_ddp.options import GridSubmitOptions, GridTaskOptions
from resnet_ddp.recipe import RECIPES

RECIPE = RECIPES["he2015-tiny"]
PAPER = ("resnet20", "resnet56", "resnet110", "plain20", "plain56")


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    return Grid(tmp_path / "runs", "g", ("resnet20", "plain20"), (0, 1), RECIPE)


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """`tool(name, script)` puts a command of Slurm's on the PATH, and no other of them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("cat", "sleep"):
        (folder / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(folder))

    def make(name: str, text: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)

    return make


# ---- scripts


def tasks_of(text: str) -> list[str]:
    body = re.search(r"^tasks=\(([^)]*)\)", text, re.MULTILINE)
    assert body
    return body[1].split()


def test_by_hand_the_array_is_the_papers_grid_longest_first() -> None:
    text = script.template("array.sbatch")
    papers = Grid(Path(), "g", PAPER, tuple(range(5)), RECIPE)
    cells = [cell for word in tasks_of(text) for cell in read_cells(word)]
    assert cells == longest_first(papers.cells)
    assert "#SBATCH --array=0-24\n" in text and "#SBATCH --open-mode=append\n" in text


@pytest.mark.parametrize("name", ["array.sbatch", "multinode.sbatch"])
def test_a_script_starts_its_task_as_options_can_be_read(tmp_path: Path, name: str) -> None:
    """What the script hands to `resnet-ddp` is seen by a stand-in."""
    stand_in = tmp_path / "resnet-ddp"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "$XDG_CACHE_HOME"\n')
    stand_in.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "0"}
    process = subprocess.run(
        ["bash", ROOT / "slurm" / name],
        env=environment | {"SLURM_TMPDIR": "/scratch/1"},
        capture_output=True,
        text=True,
        check=True,
    )
    *words, cache = process.stdout.splitlines()
    assert words[:2] == ["grid", "task"] and "--cells=resnet110/0" in words
    assert ("--srun" in words) == (name == "multinode.sbatch")
    assert cache.startswith("/scratch/1/resnet-ddp-")
    process = subprocess.run(
        ["bash", ROOT / "slurm" / name],
        env=environment | {"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == ExitCode.BAD_INPUT and "setup()" in process.stderr


def filled(grid: Grid, site: str = "", directory: Path = Path("/r/slurm/1"), **options: object):
    path = grid.runs.parent / "site.toml"
    path.write_text(site)
    found = read_site(str(path))
    asked = dataclasses.replace(GridSubmitOptions(), data="d", runs="runs", **options)
    return fill(with_site(asked, found), grid, found, longest_first(grid.cells), directory)


def test_the_same_files_are_filled(grid: Grid) -> None:
    scripts = filled(grid, partition="gpu", gres="gpu:1", time="1-0", array_limit=3)
    changed = set(scripts.array.splitlines()) - set(script.template("array.sbatch").splitlines())
    directives = sorted(line for line in changed if line.startswith("#SBATCH"))
    assert directives == [
        *("#SBATCH --array=0-3%3", "#SBATCH --comment=/r/slurm/1", "#SBATCH --gres=gpu:1"),
        *("#SBATCH --job-name='resnet-ddp g'", "#SBATCH --output=/r/slurm/1/task-%a.log"),
        *("#SBATCH --partition=gpu", "#SBATCH --time=1-0"),
    ]
    assert tasks_of(scripts.array) == ["resnet20/0", "resnet20/1", "plain20/0", "plain20/1"]
    assert "#SBATCH --partition=gpu" in scripts.report and "gres" not in scripts.report
    for text in (scripts.array, scripts.report):
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_odd_names_reach_the_task_whole(grid: Grid, tmp_path: Path) -> None:
    odd = dataclasses.replace(grid, runs=Path("my runs/$x'y"), name="a b")
    text = filled(dataclasses.replace(odd, runs=tmp_path / "x")).array
    assert "--grid='a b'" in text or "'--grid=a b'" in text
    text = filled(grid, directory=Path("/50% of/it")).array
    assert "--output='/50%% of/it/task-%a.log'" in text


def test_several_runs_a_task_and_several_nodes_a_run(grid: Grid) -> None:
    assert tasks_of(filled(grid, runs_per_task=3).array) == [
        "resnet20/0,resnet20/1,plain20/0",
        "plain20/1",
    ]
    text = filled(grid, nodes=2, ntasks_per_node=4).array
    assert "#SBATCH --nodes=2\n" in text and "#SBATCH --ntasks-per-node=4\n" in text
    assert "grid task --srun" in text


def test_a_short_limit_has_no_signal_that_may_come_at_once(grid: Grid) -> None:
    assert "--signal" not in filled(grid, time="5").array
    assert "--signal=B:USR1@90\n" in filled(grid, time="15").array
    assert "--signal=B:USR1@120\n" in filled(grid, time="8:00:00").array
    assert "--requeue" not in filled(grid, sbatch="--no-requeue").array.replace("--no-requeue", "")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *[("30", 1800), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400)],
        *[("2-0:0:5", 172805), ("soon", None), ("1-", None), ("UNLIMITED", None)],
    ],
)
def test_slurms_ways_to_write_a_time(text: str, seconds: float | None) -> None:
    assert read_time(text) == seconds


def test_only_what_is_allowed_is_resubmitted_and_three_times(grid: Grid) -> None:
    def arguments(**options: object) -> str:
        body = re.search(r"^resubmit=\(([^)]*)\)", filled(grid, **options).report, re.MULTILINE)
        assert body
        return body[1]

    assert arguments() == ""
    assert "--resubmission=1" in arguments(complete=True)
    assert "--resubmission=3" in arguments(complete=True, resubmission=2)
    assert arguments(complete=True, resubmission=3) == ""
    assert "--keep-lives" in filled(grid, complete=True, resubmission=1).array
    assert "--keep-lives" not in filled(grid, complete=True).array


# ---- site files


def test_a_site_file_says_what_the_command_line_does_not(grid: Grid) -> None:
    site = """
partition = "gpu"
cpus-per-task = 8
array-limit = 10
sbatch = ["--qos=low", "--mail-type", "END"]
modules = ["python/3.11", "cuda"]
conda = "resnet"
scratch = "$LOCAL"
copy-data = true
[report]
partition = "cpu"
mem = "4G"
"""
    scripts = filled(grid, site, partition="other")
    for line in (
        *("--partition=other", "--cpus-per-task=8", "--array=0-3%10", "--qos=low"),
        "--mail-type=END",
    ):
        assert f"#SBATCH {line}\n" in scripts.array
    assert 'scratch="$LOCAL"\ncopy_data=yes\n' in scripts.array
    body = scripts.array[scripts.array.index("setup() {") : scripts.array.index("scratch=")]
    order = [
        body.index(word) for word in ("module load python/3.11", "load cuda", "conda activate")
    ]
    assert order == sorted(order)
    assert "#SBATCH --partition=cpu\n" in scripts.report
    assert re.findall("--mem=.*", scripts.report) == ["--mem=4G"]
    assert "conda activate" in scripts.report


def test_without_an_environment_jobs_take_the_one_submitted_from(grid: Grid) -> None:
    assert re.search(r"setup\(\) \{\n  PATH=.*/bin.*:\$PATH\n\}", filled(grid).array)
    assert "/my/env/bin/activate" in filled(grid, 'venv = "/my/env"').array


@pytest.mark.parametrize(
    ("text", "word"),
    [
        *[("partitoin = 'x'", "did you mean partition"), ("[report]\ngres = 'x'", "report")],
        *[("nodes = 'two'", "whole number"), ("time = 30", "quotes"), ("a", "site.toml")],
        *[("modules = 'x'", "list"), ("copy-data = 1", "true or false"), ("venv = 1", "text")],
        *[("scratch = '$(a \"b\")'", "plain path"), ("nodes = 0", "from 1")],
    ],
)
def test_a_wrong_site_file_is_a_line(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "site.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_site(str(path))
    assert word in str(error.value) and "\n" not in str(error.value).strip()


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--site", "nowhere.toml"], ["--sbatch", "exclude n7"], ["--partition="]),
        *(["--nodes", "2", "--runs-per-task", "2"], ["--nodes=2", "--processes-per-run=2"]),
        *(["--resubmission", "4"], ["--array-limit", "0"]),
    ],
)
def test_what_does_not_go_together_is_a_line_or_two(
    tmp_path: Path, small_data: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    command = ["grid", "submit", "--dry-run", "--data", str(small_data), "--runs", str(tmp_path)]
    try:
        code = main([*command, *arguments])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == ExitCode.BAD_INPUT
    assert len(capsys.readouterr().err.splitlines()) <= 2


def test_a_dry_run_and_a_machine_without_slurm(
    tmp_path: Path,
    small_data: Path,
    start: Command,
    without_torch: dict[str, str],
) -> None:
    command = ["grid", "submit", "--data", str(small_data), "--runs", str(tmp_path / "runs")]
    variables = {"PATH": str(tmp_path), "PYTHONPATH": f"{without_torch['PYTHONPATH']}:{ROOT}"}
    dry = start("resnet-ddp", *command, "--dry-run", **variables)
    out, err = dry.communicate()
    assert dry.returncode == 0 and not err and not (tmp_path / "runs").exists()
    assert len(tasks_of(out)) == 25 and "report.sbatch" in out
    real = start("resnet-ddp", *command, **variables)
    _, err = real.communicate()
    assert (
        real.returncode == ExitCode.BAD_INPUT
        and "sbatch" in err
        and not (tmp_path / "runs").exists()
    )


def test_nothing_of_a_job_or_a_launch_is_handed_on() -> None:
    around = {
        *("RANK", "MASTER_PORT", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_CPU"),
        *("SLURM_NTASKS", "SLURM_JOB_ID", "SRUN_CPUS_PER_TASK", "SBATCH_ARRAY_INX"),
        *("SBATCH_PARTITION", "CUDA_VISIBLE_DEVICES", "RESNET_DDP_LAUNCHER"),
    }
    kept = {"SLURM_CONF", "SBATCH_ACCOUNT", "HOME", "WANDB_API_KEY"}
    environment = dict.fromkeys(around | kept, "1")
    options = dataclasses.replace(GridSubmitOptions(), partition="gpu")
    assert set(clean_environment(environment, options)) == kept
    assert "SBATCH_PARTITION" in clean_environment(environment, GridSubmitOptions())


# ---- what Slurm has


def test_what_is_queued_is_known_by_the_submission_in_its_comment(grid: Grid) -> None:
    directory = grid.directory / "slurm" / "1"
    write(directory / "tasks.json", ["resnet20/0,resnet20/1", "plain20/0"])
    where = directory.resolve()
    answer = (
        f"12|0|RUNNING|None|n1|{where}\n12|1|PENDING|Priority||{where}\n"
        f"12|2|PENDING|Priority||{where}\n13|N/A|PENDING|Dependency||{where}\n"
        "14|0|RUNNING|None|n2|another's | comment\n15|0|RUNNING|None|n2|/elsewhere/slurm/1\n"
    )
    queue = parse_queue(answer, grid)
    running, waiting = (
        Task("12", 0, "RUNNING", "None", "n1"),
        Task("12", 1, "PENDING", "Priority", ""),
    )
    assert queue.tasks == {
        GridCell("resnet20", 0): running,
        GridCell("resnet20", 1): running,
        GridCell("plain20", 0): waiting,
    }
    assert [one.name for one in queue.reports] == ["13"] and running.name == "12_0"


def test_the_picture_says_who_waits_for_what(grid: Grid) -> None:
    from rich.console import Console

    from resnet_ddp.grid.picture import as_json, picture

    states = dict.fromkeys(grid.cells, RunState(State.WAITING, 250))
    states[GridCell("resnet20", 1)] = RunState(
        State.RUNNING, 250, 512.0, 60.0, holder="n1, process 7"
    )
    tasks = {
        GridCell("resnet20", 0): Task("12", 0, "PENDING", "Priority", ""),
        GridCell("resnet20", 1): Task("12", 1, "RUNNING", "None", "n1"),
        GridCell("plain20", 0): Task("12", 2, "RUNNING", "None", "n2"),
    }
    queue = Queue(tasks, [Task("13", None, "PENDING", "Dependency", "")])
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        console.print(picture(grid, states, queue=queue))
        console.print(picture(grid, states, queue=Queue({}, silence="squeue is away")))
    text = capture.get()
    for words in (
        *("queued 50%", "starting 50%", "(n1, process 7, job 12_1 on n1)", "(job 12_2 on n2)"),
        *("job 12: 1 run queued (Priority)", "job 13: the report, queued (Dependency)"),
        "not known: squeue is away",
    ):
        assert words in text
    found = json.loads(as_json(grid, states, queue))["cells"]
    assert [cell["slurm"] and cell["slurm"]["nodes"] for cell in found] == ["", "n1", "n2", None]


@pytest.mark.parametrize(
    ("squeue", "words"),
    [
        (None, "there is no squeue"),
        ("exec sleep 60", "did not answer"),
        ("echo squeue: error: Unable to contact >&2; exit 1", "Unable to contact"),
    ],
)
def test_the_status_comes_without_an_answer_of_slurms(
    grid: Grid,
    tool: Callable[[str, str], None],
    squeue: str | None,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (grid.directory / "slurm").mkdir(parents=True)
    if squeue is not None:
        tool("squeue", squeue)
    began = time.monotonic()
    assert local.show(grid, watch=False, as_json_=False) is ExitCode.DONE
    assert time.monotonic() - began < 2
    assert words in capsys.readouterr().out


# ---- in a job


@pytest.mark.parametrize(
    ("squeue", "scontrol", "answer"),
    [
        ("echo '1|0|RUNNING|None|n1|'", "exit 0", ""),
        ("echo '1|0|COMPLETING|TimeLimit|n1|'", "exit 0", ""),
        # Requeueing would bring back what a person cancelled.
        ("echo '1|0|COMPLETING|None|n1|'", "exit 0", "cancelled"),
        ("true", "exit 0", "gone"),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", "exit 0", "gone"),
        ("echo '1|0|RUNNING|None|n1|'", "echo presently disabled >&2; exit 1", "disabled"),
    ],
)
def test_when_a_job_is_requeued(
    tool: Callable[[str, str], None], tmp_path: Path, squeue: str, scontrol: str, answer: str
) -> None:
    tool("squeue", squeue)
    tool("scontrol", f'echo "$@" >> {tmp_path}/asked\n{scontrol}')
    found = task.requeue("1_0")
    assert answer in found and bool(answer) == bool(found)
    if not answer:
        assert (tmp_path / "asked").read_text() == "requeue 1_0\n"


def test_a_controller_that_is_away_is_waited_for(
    tool: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "OUTAGE_PAUSE", 0.01)
    tool("squeue", "echo '1|0|RUNNING|None|n1|'")
    tool(
        "scontrol",
        f"echo x >> {tmp_path}/asked; set -- $(cat {tmp_path}/asked); test $# -ge 3 || "
        "{ echo Unable to contact slurm controller >&2; exit 1; }",
    )
    assert task.requeue("1_0") == ""
    monkeypatch.setattr(task, "OUTAGE", 0.02)
    (tmp_path / "asked").unlink()
    tool("scontrol", "echo Unable to contact slurm controller >&2; exit 1")
    assert "contact" in task.requeue("1_0")


def test_where_there_is_no_slurm_a_task_says_so(
    grid: Grid, tool: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "scontrol" in task.requeue("1_0")
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    options = GridTaskOptions(cells="resnet20/0")
    with pytest.raises(UserError, match="grid run"):
        task.run(options, grid, prepare=lambda: None)


def test_lives_are_counted_across_jobs(tmp_path: Path) -> None:
    def lives() -> Lives:
        return Lives(tmp_path, is_kept=True)

    for life in range(1, LIVES + 1):
        assert not lives().are_spent
        lives().begin()
        assert lives().count == life
    assert lives().are_spent
    (tmp_path / "checkpoints" / "iteration-00000007").mkdir(parents=True)
    assert not lives().are_spent
    lives().begin()
    assert lives().count == 1
    lives().forget()
    assert lives().count == 0 and not Lives(tmp_path).are_spent
    (tmp_path / "lives.json").write_text("{")
    assert lives().count == 0


@pytest.mark.parametrize("text", ["", "resnet20", "resnet20/x", "resnet21/0", "resnet20/-1", "/0"])
def test_cells_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        read_cells(text)
