"""A run is killed, or its disk fails, at every kind of moment: the same bits come out."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, environment
from faulty import RECIPE, Order, as_line
from test_checkpoint import OWNER, Trained, checkpoints, progress

OUTCOME = ("model.safetensors", "metrics.jsonl", "result.json")
DOCUMENTED = {
    *OUTCOME,
    *("config.json", "timing.jsonl", "checkpoints", "status.json", "lock"),
}


class Lives:
    """Starts lives of one run after the other."""

    def __init__(self, data: Path, home: Path) -> None:
        self.data = data
        self.server = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "faulty.py"],
            env=environment(home),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def live(self, runs: Path, **fault: object) -> tuple[int, str]:
        """Return a life's exit code, negative if a signal ended it, and what it printed."""
        assert self.server.stdin is not None and self.server.stdout is not None
        runs.parent.mkdir(parents=True, exist_ok=True)  # as many events in any directory
        order = Order(self.arguments(runs), str(runs.resolve()), **fault)  # type: ignore[arg-type]
        self.server.stdin.write(as_line(order))
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        return answer["code"], answer["output"]

    def arguments(self, runs: Path) -> list[str]:
        command = ["train", "resnet20", "--data", str(self.data), "--recipe", RECIPE]
        options = "--device cpu --precision fp32 --threads 1 --log-every 1 --eval-every 5"
        return [*command, "--runs", str(runs), *options.split(), "--save-every", "3"]

    def close(self) -> None:
        self.server.communicate()


@pytest.fixture(scope="module")
def lives(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    server = Lives(small_data, tmp_path_factory.mktemp("home"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def undisturbed(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that nothing happened to, and its events."""
    directory = tmp_path_factory.mktemp("undisturbed")
    code, output = lives.live(directory / "runs", log=str(directory / "events"))
    assert code == 0, output
    return run_in(directory / "runs"), (directory / "events").read_text().splitlines()


def run_in(runs: Path) -> Path:
    (run,) = runs.glob("*/resnet20/seed0")
    return run


def starts(run: Path) -> list[int]:
    """The iterations at which lives began."""
    lines = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    return [line["iteration"] for line in lines if line.get("event") == "start"]


def assert_as_undisturbed(run: Path, undisturbed: Path) -> None:
    for file in OUTCOME:
        assert (run / file).read_bytes() == (undisturbed / file).read_bytes(), file
    # Killed between its result and its end, a run keeps its lease.
    assert {path.name for path in run.iterdir()} - {"lease.json"} == DOCUMENTED
    for name in os.listdir(run / "checkpoints"):
        assert name.startswith("iteration-")
    starts(run)  # timing.jsonl is JSON, line by line


def has_checkpoint(runs: Path) -> bool:
    return any(runs.glob("*/resnet20/seed0/checkpoints/iteration-*"))


def kill_until_done(
    lives: Lives, runs: Path, undisturbed: Path, generator: random.Random
) -> collections.Counter[str]:
    """Kill life after life at random events; return what the kills that count hit."""
    hit: collections.Counter[str] = collections.Counter()
    log = runs.with_name("events")
    for _ in range(200):
        runs.parent.mkdir(exist_ok=True)
        log.unlink(missing_ok=True)
        counts = has_checkpoint(runs)
        fault = generator.choice(["before", "half", "after"])
        # Each life gets beyond its next checkpoint about every other time.
        code, output = lives.live(runs, at=generator.randrange(110), fault=fault, log=str(log))
        assert code in (0, -signal.SIGKILL), output
        if code == 0:
            break
        if counts or has_checkpoint(runs):
            kind, _, where = log.read_text().splitlines()[-1].partition(" ")
            hit[f"{kind} {what(where)}".strip()] += 1
    else:
        pytest.fail("never done")
    assert_as_undisturbed(run_in(runs), undisturbed)
    begun = starts(run_in(runs))
    # Lives that were killed before they could say where they began left no line.
    assert begun == sorted(begun) or len(begun) < 3
    return hit


def what(where: str) -> str:
    """Return what kind of file a path is, without numbers drawn at random."""
    names = []
    for name in Path(where).parts[3:]:
        hidden = name.startswith(".")
        names.append("temporary" if hidden else name.split("-")[0])
    return "/".join(names)


def test_killed_at_random_events(
    lives: Lives, undisturbed: tuple[Path, list[str]], tmp_path: Path
) -> None:
    hit = kill_until_done(lives, tmp_path / "runs", undisturbed[0], random.Random(1))
    assert hit.total() >= 3


@pytest.mark.slow
def test_killed_200_times(
    lives: Lives,
    undisturbed: tuple[Path, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hit: collections.Counter[str] = collections.Counter()
    runs = 0
    while hit.total() < 200:
        hit += kill_until_done(
            lives, tmp_path / str(runs) / "runs", undisturbed[0], random.Random(100 + runs)
        )
        shutil.rmtree(tmp_path / str(runs))
        runs += 1
    with capsys.disabled():
        print(f"\n{hit.total()} kills in {runs} runs:")
        for kind, number in hit.most_common():
            print(f"{number:5}  {kind}")


def events_of_a_save(events: list[str]) -> range:
    """Where the third save lies among the events: the first that removes an older one."""
    begins = [
        number for number, event in enumerate(events)
        if event.startswith("mkdir") and ".saving-" in event
    ]  # fmt: skip
    first = begins[2]
    last = next(n for n in range(first, len(events)) if events[n].startswith("step"))
    return range(first, last)


@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_killed_in_a_save(
    lives: Lives, undisturbed: tuple[Path, list[str]], tmp_path: Path, when: str
) -> None:
    """A sample of its calls, another one for each `when`."""
    save = events_of_a_save(undisturbed[1])
    for number in save[("before", "half", "after").index(when) :: 12]:
        runs = tmp_path / str(number) / "runs"
        code, output = lives.live(runs, at=number, fault=when)
        assert code == -signal.SIGKILL, output
        code, output = lives.live(runs)
        assert code == 0, output
        assert starts(run_in(runs))[1] >= 6, undisturbed[1][number]
        assert_as_undisturbed(run_in(runs), undisturbed[0])


@pytest.mark.slow
def test_killed_at_every_call_of_a_save(
    lives: Lives, undisturbed: tuple[Path, list[str]], tmp_path: Path
) -> None:
    for number in events_of_a_save(undisturbed[1]):
        for when in ("before", "half", "after"):
            runs = tmp_path / f"{number}-{when}" / "runs"
            assert lives.live(runs, at=number, fault=when)[0] == -signal.SIGKILL
            assert lives.live(runs)[0] == 0
            assert starts(run_in(runs))[1] >= 6, undisturbed[1][number]
            assert_as_undisturbed(run_in(runs), undisturbed[0])
            shutil.rmtree(runs)


def fail_in_a_save(
    lives: Lives, undisturbed: tuple[Path, list[str]], tmp_path: Path, step: int, fault: str
) -> None:
    code_expected = 2 if fault == "EROFS" else 75
    for number in events_of_a_save(undisturbed[1])[::step]:
        event, runs = undisturbed[1][number], tmp_path / str(number) / "runs"
        code, output = lives.live(runs, at=number, fault=fault)
        if event.startswith(("unlink", "rmdir", "rename")) and code == 0:
            # An old checkpoint could not be removed, which does no harm.
            assert "iteration-" in event or ".saving-" in event
        else:
            assert code == code_expected, (event, output)
            assert "Traceback" not in output
            assert len([line for line in output.splitlines() if "resnet-ddp" in line]) == 1
            code, output = lives.live(runs)
            assert code == 0, output
            assert starts(run_in(runs))[1] >= 6, event
        for file in OUTCOME:
            assert (run_in(runs) / file).read_bytes() == (undisturbed[0] / file).read_bytes()
        shutil.rmtree(runs)


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "EROFS"])
def test_a_disk_that_fails_in_a_save(
    lives: Lives, undisturbed: tuple[Path, list[str]], tmp_path: Path, fault: str
) -> None:
    fail_in_a_save(lives, undisturbed, tmp_path, 13, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "EDQUOT", "EROFS"])
def test_a_disk_that_fails_at_every_call_of_a_save(
    lives: Lives, undisturbed: tuple[Path, list[str]], tmp_path: Path, fault: str
) -> None:
    fail_in_a_save(lives, undisturbed, tmp_path, 1, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["ENOSPC", "EIO"])
def test_a_disk_that_fails_at_any_call_of_a_run(
    lives: Lives, undisturbed: tuple[Path, list[str]], tmp_path: Path, fault: str
) -> None:
    """Also in the lease, config.json, a log line, the result."""
    events = undisturbed[1]
    numbers = [
        n for n, event in enumerate(events) if event.split()[0] not in ("step", "evaluation")
    ]
    for number in numbers[::3]:
        runs = tmp_path / str(number) / "runs"
        code, output = lives.live(runs, at=number, fault=fault)
        assert code in (0, 2, 75), (events[number], output)
        assert "Traceback" not in output, (events[number], output)
        assert lives.live(runs)[0] == 0
        for file in OUTCOME:
            assert (run_in(runs) / file).read_bytes() == (undisturbed[0] / file).read_bytes()
        shutil.rmtree(runs)


def test_a_clock_that_jumps(
    lives: Lives, undisturbed: tuple[Path, list[str]], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    assert lives.live(runs, at=60, clock=True)[0] == -signal.SIGKILL
    code, output = lives.live(runs, clock=True)
    assert code == 0, output
    assert_as_undisturbed(run_in(runs), undisturbed[0])


def test_of_several_processes_one_trains(
    small_data: Path, undisturbed: tuple[Path, list[str]], tmp_path: Path
) -> None:
    command = ["train", "resnet20", "--data", str(small_data), "--recipe", "he2015-smoke"]
    options = ["--device", "cpu", "--precision", "fp32", "--threads", "1", "--stop-after", "4"]
    started = [
        subprocess.Popen(
            [str(SCRIPTS / "resnet-ddp"), *command, "--runs", str(tmp_path / "runs"), *options],
            env=environment(tmp_path),
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    ended = [(process.communicate()[1], process.returncode) for process in started]
    assert sorted(code for _, code in ended) == [75, 75, 85], ended
    for output, code in ended:
        if code == 75:
            assert "another process is training this run" in output
            assert len(output.splitlines()) == 1
    assert starts(run_in(tmp_path / "runs")) == [0]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, where this user may make one."""
    place = tmp_path / "small-disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_really_full(
    lives: Lives, undisturbed: tuple[Path, list[str]], mount: Path
) -> None:
    runs = mount / "runs"
    # Room for one checkpoint, of 2.2 MB, but not for two.
    code, output = lives.live(runs)
    assert code == 75, output
    assert "No space left on the disk; free some" in output
    subprocess.run(["mount", "-o", "remount,size=30m", mount], check=True)
    code, output = lives.live(runs)
    assert code == 0, output
    assert starts(run_in(runs)) == [0, 3]
    assert_as_undisturbed(run_in(runs), undisturbed[0])


def test_a_file_system_that_is_read_only(lives: Lives, mount: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
    code, output = lives.live(mount / "runs")
    assert code == 2, output
    assert "Read-only file system" in output and "Traceback" not in output


class Mutations:
    """Changes to a checkpoint, none of which may be loaded in silence."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def apply(self, checkpoint: Path) -> str:
        """Change something; return what."""
        kinds = [name for name in dir(self) if name.startswith("do_")]
        kind = self.random.choice(kinds)
        file = self.random.choice(sorted(checkpoint.iterdir()))
        getattr(self, kind)(checkpoint, file)
        return f"{kind} {file.name}"

    def do_flip(self, checkpoint: Path, file: Path) -> None:
        content = bytearray(file.read_bytes())
        for _ in range(self.random.choice([1, 1, 1, 50])):
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        file.write_bytes(content)

    def do_truncate(self, checkpoint: Path, file: Path) -> None:
        os.truncate(file, self.random.randrange(file.stat().st_size))

    def do_extend(self, checkpoint: Path, file: Path) -> None:
        with open(file, "ab") as stream:
            stream.write(self.random.randbytes(self.random.choice([1, 8, 1 << 16])))

    def do_zero(self, checkpoint: Path, file: Path) -> None:
        """As a file system may after a power cut."""
        content = file.read_bytes()
        start = self.random.randrange(len(content))
        file.write_bytes(content[:start] + bytes(len(content) - start))

    def do_remove(self, checkpoint: Path, file: Path) -> None:
        file.unlink()

    def do_make_directory(self, checkpoint: Path, file: Path) -> None:
        file.unlink()
        file.mkdir()

    def do_link_to_itself(self, checkpoint: Path, file: Path) -> None:
        file.unlink()
        file.symlink_to(file)

    def do_swap(self, checkpoint: Path, file: Path) -> None:
        one, other = checkpoint / "model.safetensors", checkpoint / "optimizer.safetensors"
        one.rename(checkpoint / "between")
        other.rename(one)
        (checkpoint / "between").rename(other)

    def do_take_from_the_older(self, checkpoint: Path, file: Path) -> None:
        shutil.copy(checkpoint.with_name("iteration-00000001") / file.name, file)

    def do_change_the_manifest(self, checkpoint: Path, file: Path) -> None:
        """With a right digest half of the time, as one who edits it would."""
        path = checkpoint / "manifest.json"
        manifest = json.loads(path.read_text())
        key = self.random.choice(sorted(manifest))
        values = [None, -1, 3, 2**70, "", "x", [], {}, 1.5, True]
        manifest[key] = self.random.choice([value for value in values if value != manifest[key]])
        if key != "digest" and self.random.random() < 0.5:
            manifest.pop("digest")
            text = json.dumps(manifest, sort_keys=True).encode()
            manifest["digest"] = hashlib.sha256(text).hexdigest()
        path.write_text(json.dumps(manifest))

    def do_nest_the_manifest(self, checkpoint: Path, file: Path) -> None:
        (checkpoint / "manifest.json").write_text("[" * self.random.choice([10, 100_000]))


def mutate(folder: Path, number: int, seed: int) -> collections.Counter[str]:
    """Save two checkpoints, change the newer, and load: the older one has to come out."""
    older, newer = Trained(seed=0), Trained(seed=1)
    folder.with_name("metrics.jsonl").write_bytes(progress(100).metrics_bytes * b"0")
    mutations, done = Mutations(seed), collections.Counter[str]()
    for _ in range(number):
        shutil.rmtree(folder, ignore_errors=True)
        older.save(folder, 1)
        change = mutations.apply(newer.save(folder, 2))
        loaded = Trained(seed=2)
        with pytest.warns(UserWarning, match="set aside as .*damaged-iteration-00000002"):
            assert loaded.load(folder) == progress(1), change
        for name, tensor in older.state().items():
            assert torch.equal(loaded.state()[name], tensor), change
        done[change.removesuffix(".json").removesuffix(".safetensors")] += 1
    return done


def test_changed_checkpoints_are_not_loaded(tmp_path: Path) -> None:
    mutate(tmp_path / "checkpoints", 60, seed=0)


@pytest.mark.slow
def test_2000_changed_checkpoints_are_not_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = mutate(tmp_path / "checkpoints", 2000, seed=1)
    with capsys.disabled():
        print(f"\n{done.total()} changes, {len(done)} kinds of them, none loaded")


@pytest.mark.parametrize("damage", ["pixel", "truncate", "remove"])
def test_a_damaged_beton_trains_nothing(
    lives: Lives, small_data: Path, tmp_path: Path, damage: str
) -> None:
    copy = tmp_path / "small"
    shutil.copytree(small_data, copy)
    if damage == "pixel":
        content = bytearray((copy / "train.beton").read_bytes())
        content[8 << 20] ^= 1  # the first one: pixels begin with the second page
        (copy / "train.beton").write_bytes(content)
    else:
        getattr(Mutations(7), f"do_{damage}")(copy, copy / "train.beton")
    lives_there = Lives(copy, tmp_path)
    code, output = lives_there.live(tmp_path / "runs")
    lives_there.close()
    assert code == 2, output
    assert "Traceback" not in output and len(output.splitlines()) <= 2
    assert not list(tmp_path.glob("runs/*/*/*/config.json"))


@pytest.mark.slow
def test_killed_processes_of_a_launch(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks and the launcher of two processes, killed at random times."""
    generator, kills = random.Random(0), 0
    options = "--device cpu --precision fp32 --threads 1 --processes 2 --log-every 1"
    command = [str(SCRIPTS / "resnet-ddp"), "train", "resnet20", "--data", str(small_data)]
    command += ["--recipe", "he2015-smoke", "--save-every", "2", *options.split()]

    def start(runs: Path) -> subprocess.Popen[bytes]:
        with open(tmp_path / "stderr", "a") as log:
            return subprocess.Popen(
                [*command, "--runs", str(runs)],
                env=environment(tmp_path, RESNET_DDP_TIMEOUT="10"),
                stderr=log,
            )

    assert start(tmp_path / "undisturbed").wait() == 0
    runs = tmp_path / "runs"
    for _ in range(60):
        process = start(runs)
        until = time.monotonic() + generator.uniform(4, 16)
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        if process.poll() == 0:
            break
        counts = has_checkpoint(runs)
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        victim = generator.choice([process.pid, *map(int, children)])
        os.kill(victim, signal.SIGKILL)
        assert process.wait(timeout=60) in (75, 85, -signal.SIGKILL)
        while any(Path(f"/proc/{child}").exists() for child in children):
            time.sleep(0.1)
        kills += counts
    else:
        pytest.fail("never done")
    for file in OUTCOME:
        here, there = run_in(runs) / file, run_in(tmp_path / "undisturbed") / file
        assert here.read_bytes() == there.read_bytes(), file
    with capsys.disabled():
        print(f"\n{kills} kills of a launch of two")


def test_the_owner_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    """What the mutations rely on: another run's checkpoint, whole as it is, is not loaded."""
    Trained().save(tmp_path / "checkpoints", 1)
    with pytest.warns(UserWarning, match="another run's"):
        assert checkpoints(tmp_path / "checkpoints", OWNER | {"seed": 9}).newest() is None
