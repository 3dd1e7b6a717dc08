"""A run is killed, or its disk fails, at every kind of moment: the same bits come out."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Command, environment
from faulty import RECIPE, Order, as_line
from test_checkpoint import OWNER, Trained, checkpoints, progress

from resnet_ddp import shapes
from resnet_ddp.datasets import write_dataset

OUTCOME = ("model.safetensors", "metrics.jsonl", "result.json")
DOCUMENTED = {
    *OUTCOME,
    *("config.json", "timing.jsonl", "checkpoints", "status.json", "lock"),
}
FILES = ("model.safetensors", "optimizer.safetensors", "manifest.json")
SAVING, HIDDEN = "checkpoints/temporary", ("open", "write", "fsync", "replace")
# Every kind of call that a life makes on its files, from the lease to the result.
KINDS = {
    *("mkdir", "open lock", "fsync", "unlink stop", "unlink lease.json"),
    *(f"{call} temporary/lease.json" for call in ("open", "pwrite", "fsync", "link", "unlink")),
    *(f"{call} temporary/{name}" for call in HIDDEN for name in ("config.json", "status.json")),
    *(f"{call} temporary/{name}" for call in HIDDEN for name in OUTCOME if name != "metrics.jsonl"),
    *(
        "open metrics.jsonl",
        "write metrics.jsonl",
        "fsync metrics.jsonl",
        "ftruncate metrics.jsonl",
    ),
    *("open timing.jsonl", "write timing.jsonl", "step", "evaluation"),
    *("mkdir checkpoints", f"mkdir {SAVING}", f"fsync {SAVING}", f"rename {SAVING}"),
    *(f"{call} {SAVING}/{file}" for call in ("open", "write", "fsync") for file in FILES),
    *("fsync checkpoints", "rename checkpoints/iteration", f"rmdir {SAVING}"),
    *(f"unlink {SAVING}/{file}" for file in FILES),
}


class Lives:
    """Starts lives of one run after the other."""

    def __init__(self, data: Path, home: Path) -> None:
        self.data, self.home = data, home
        self.server = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "faulty.py"],
            env=environment(home, CXX="none"),  # no life should wait for a compiler
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def live(
        self, runs: Path, *more: str, data: Path | None = None, **fault: Any
    ) -> tuple[int, str]:
        """Return a life's exit code, negative if a signal ended it, and what it printed."""
        assert self.server.stdin is not None and self.server.stdout is not None
        runs.parent.mkdir(parents=True, exist_ok=True)  # as many events in any directory
        self.server.stdin.write(as_line(self.order(runs, *more, data=data, **fault)))
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        return answer["code"], answer["output"]

    def order(self, runs: Path, *more: str, data: Path | None = None, **fault: Any) -> Order:
        command = ["train", "resnet20", "--data", str(data or self.data), "--recipe", RECIPE]
        options = "--device cpu --precision fp32 --threads 1 --log-every 1 --eval-every 5"
        command += ["--runs", str(runs), *options.split(), "--save-every", "3", *more]
        return Order(command, str(runs.resolve()), **fault)

    def close(self) -> None:
        self.server.communicate()


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training and 20 test images: evaluations are most of what a short life does."""
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny", train=60, test=20)


@pytest.fixture(scope="module")
def wider_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the recipes that users know, with batches of 128."""
    return write_tiny(tmp_path_factory.mktemp("data") / "wider", train=180, test=20)


def write_tiny(directory: Path, *, train: int, test: int) -> Path:
    images, labels = shapes.draw((train + test) // 10)
    write_dataset(
        directory,
        name=directory.name,
        source="drawn for the tests",
        classes=tuple(shapes.SHAPES),
        train_images=images[:train],
        train_labels=labels[:train],
        test_images=images[train:],
        test_labels=labels[train:],
    )
    return directory


@pytest.fixture(scope="module")
def lives(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    server = Lives(tiny_data, tmp_path_factory.mktemp("home"))
    yield server
    server.close()


@dataclass(frozen=True)
class Undisturbed:
    """What a run that nothing happened to came to.

    Attributes:
        run: its directory.
        events: of its only life.
        seconds: that it took.
        midway: the runs directory of one that was stopped at iteration 12, its third save.
        resumed: the events of a life that goes on from there.
    """

    run: Path
    events: list[str]
    seconds: float
    midway: Path
    resumed: list[str]


@pytest.fixture(scope="module")
def undisturbed(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    directory = tmp_path_factory.mktemp("undisturbed")
    began = time.monotonic()
    code, output = lives.live(directory / "runs", log=str(directory / "events"))
    seconds = time.monotonic() - began
    assert code == 0, output
    code, output = lives.live(directory / "midway", "--stop-after", "12")
    assert code == 85, output
    shutil.copytree(directory / "midway", directory / "resumed")
    with open(run_in(directory / "resumed") / "metrics.jsonl", "a") as metrics:
        metrics.write("{")  # to be cut off
    code, output = lives.live(directory / "resumed", log=str(directory / "events-resumed"))
    assert code == 0, output
    return Undisturbed(
        run=run_in(directory / "runs"),
        events=(directory / "events").read_text().splitlines(),
        seconds=seconds,
        midway=directory / "midway",
        resumed=(directory / "events-resumed").read_text().splitlines(),
    )


def run_in(runs: Path) -> Path:
    (run,) = runs.glob("*/resnet20/seed0")
    return run


def starts(runs: Path) -> list[int]:
    """The iterations at which lives began; one that was killed before it could say has no line."""
    lines = [
        json.loads(line)
        for path in runs.glob("*/resnet20/seed0/timing.jsonl")
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]
    return [line["iteration"] for line in lines if line.get("event") == "start"]


def assert_same_outcome(runs: Path, undisturbed: Path) -> None:
    for file in OUTCOME:
        assert (run_in(runs) / file).read_bytes() == (undisturbed / file).read_bytes(), file


def assert_as_undisturbed(runs: Path, undisturbed: Path) -> None:
    """Also nothing is left that the README does not name."""
    assert_same_outcome(runs, undisturbed)
    run = run_in(runs)
    # A process that was killed while it left has left its lease, which binds nobody.
    assert {path.name for path in run.iterdir()} - {"lease.json"} == DOCUMENTED
    assert json.loads((run / "status.json").read_text())["exit_code"] == 0
    assert len(os.listdir(run / "checkpoints")) == 2
    for name in os.listdir(run / "checkpoints"):
        assert name.startswith("iteration-")
    for line in (run / "timing.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line), dict)


def has_checkpoint(runs: Path) -> bool:
    return any(runs.glob("*/resnet20/seed0/checkpoints/iteration-*"))


def what(event: str) -> str:
    """Return the kind of an event: which call, on what, without numbers drawn at random."""
    call, _, where = event.partition(" ")
    names = []
    for name in Path(where).parts[3:]:
        is_file = name.count(".") > 1  # .config.json.0123456789abcdef
        hidden = "temporary/" + name[1:].rpartition(".")[0] if is_file else "temporary"
        names.append(hidden if name.startswith(".") else name.split("-")[0])
    return f"{call} {'/'.join(names)}".strip()


def kill_until_done(
    lives: Lives, runs: Path, undisturbed: Undisturbed, generator: random.Random
) -> collections.Counter[str]:
    """Kill life after life, at random events and at random times.

    Returns:
        What the kills hit that count: they came after a first checkpoint, and the next life
        began above iteration 0.
    """
    hit: collections.Counter[str] = collections.Counter()
    log = runs.with_name("events")
    last = ""  # what the last life was killed at, if that may count
    for _ in range(200):
        log.write_text("")
        before = len(starts(runs))
        fault: dict[str, Any] = {"seconds": generator.uniform(0.2, 0.8) * undisturbed.seconds}
        if generator.random() < 0.7:  # each life gets beyond its next checkpoint now and then
            fault = {
                "at": generator.randrange(10, 80),
                "fault": generator.choice(["before", "half", "after"]),
            }
        code, output = lives.live(runs, log=str(log), **fault)
        assert code in (0, -signal.SIGKILL), output
        begun = starts(runs)[before:]
        assert len(begun) <= 1
        if last and begun:
            assert begun[0] > 0
            hit[last] += 1
        if code == 0:
            break
        events = log.read_text().splitlines()
        kind = what(events[-1]) if events else "import"
        last = ("at any time, in or after " * ("seconds" in fault) + kind) * has_checkpoint(runs)
    else:
        pytest.fail("never done")
    assert_as_undisturbed(runs, undisturbed.run)
    return hit


def show(capsys: pytest.CaptureFixture[str], title: str, hit: collections.Counter[str]) -> None:
    with capsys.disabled():
        print(f"\n{title}")
        for kind, number in sorted(hit.items()):
            print(f"{number:5}  {kind}")


def test_a_forked_life_has_the_bits_of_a_fresh_process(
    lives: Lives, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """What all that follows relies on."""
    runs = tmp_path / "runs"
    order = json.dumps(dataclasses.asdict(lives.order(runs)))
    command = [sys.executable, str(ROOT / "tests" / "faulty.py"), order]
    alone = environment(tmp_path, CXX="none")
    subprocess.run(command, env=alone, check=True, capture_output=True)
    assert_as_undisturbed(runs, undisturbed.run)


def test_every_kind_of_call_is_watched(undisturbed: Undisturbed) -> None:
    assert {what(event) for event in undisturbed.events + undisturbed.resumed} == KINDS


def test_killed_at_random(lives: Lives, undisturbed: Undisturbed, tmp_path: Path) -> None:
    hit, seed = collections.Counter[str](), 0
    while hit.total() < 3:
        seed += 1
        runs = tmp_path / str(seed) / "runs"
        runs.parent.mkdir()
        hit += kill_until_done(lives, runs, undisturbed, random.Random(seed))


@pytest.mark.slow
def test_killed_200_times(
    lives: Lives, undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hit: collections.Counter[str] = collections.Counter()
    runs = 0
    while hit.total() < 200:
        here = tmp_path / str(runs)
        here.mkdir()
        hit += kill_until_done(lives, here / "runs", undisturbed, random.Random(100 + runs))
        shutil.rmtree(here)
        runs += 1
    show(capsys, f"{hit.total()} kills that count, in {runs} runs, all with the same bits:", hit)


def kill_midway(
    lives: Lives, undisturbed: Undisturbed, tmp_path: Path, numbers: list[int]
) -> collections.Counter[str]:
    """Kill a life that went on from iteration 12 at each of these events, and go on."""
    hit: collections.Counter[str] = collections.Counter()
    for number in numbers:
        event = undisturbed.resumed[number]
        for fault in ("before", "half") if event.startswith("write") else ("before",):
            runs = tmp_path / f"{number}-{fault}"
            shutil.copytree(undisturbed.midway, runs)
            with open(run_in(runs) / "metrics.jsonl", "a") as metrics:
                metrics.write("{")
            code, output = lives.live(runs, at=number, fault=fault)
            assert code == -signal.SIGKILL, (event, output)
            is_done = (run_in(runs) / "result.json").exists()
            before = len(starts(runs))
            code, output = lives.live(runs)
            assert code == 0, (event, output)
            assert_as_undisturbed(runs, undisturbed.run)
            begun = starts(runs)[before:]
            assert len(begun) == (not is_done), event
            assert all(iteration >= 12 for iteration in begun), event
            hit[what(event)] += not is_done
            shutil.rmtree(runs)
    return hit


def test_killed_in_a_save(lives: Lives, undisturbed: Undisturbed, tmp_path: Path) -> None:
    numbers = list(save_in(undisturbed.resumed))[::5]
    assert kill_midway(lives, undisturbed, tmp_path, numbers).total() >= len(numbers)


@pytest.mark.slow
def test_killed_at_every_call(
    lives: Lives, undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the event: what is after it, is before the next."""
    hit = kill_midway(lives, undisturbed, tmp_path, list(range(len(undisturbed.resumed))))
    missed = KINDS - {kind for kind, number in hit.items() if number}
    show(capsys, f"{hit.total()} kills that count, at {len(hit)} kinds of calls:", hit)
    # config.json is written before there is a checkpoint; with a result the run is done.
    config = {f"{call} temporary/config.json" for call in HIDDEN}
    assert missed == config | {"unlink stop", "unlink lease.json"} & missed


@pytest.mark.slow
def test_killed_at_every_call_before_the_first_checkpoint(
    lives: Lives, undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = undisturbed.events
    first_save = save_in(events)
    hit: collections.Counter[str] = collections.Counter()
    for number in range(first_save.stop):
        if events[number] == "step ":
            continue
        for fault in ("before", "half") if events[number].startswith("write") else ("before",):
            runs = tmp_path / f"{number}-{fault}"
            code, output = lives.live(runs, at=number, fault=fault)
            assert code == -signal.SIGKILL, output
            code, output = lives.live(runs)
            assert code == 0, (events[number], output)
            assert_as_undisturbed(runs, undisturbed.run)
            shutil.rmtree(runs, ignore_errors=True)
            hit[what(events[number])] += 1
    assert {f"{call} temporary/config.json" for call in HIDDEN} <= hit.keys()
    show(capsys, f"{hit.total()} kills before or in the first save:", hit)


def save_in(events: list[str]) -> range:
    """Where the first save lies among the events."""
    first = next(n for n, event in enumerate(events) if event.startswith("fsync") and
                 event.endswith("metrics.jsonl"))  # fmt: skip
    after = (n for n in range(first, len(events)) if events[n].startswith(("step", "eval")))
    return range(first, next(after))


def fail_midway(
    lives: Lives, undisturbed: Undisturbed, tmp_path: Path, numbers: list[int], fault: str
) -> collections.Counter[str]:
    """Have the disk fail at each of these events, and go on with one that works."""
    ended: collections.Counter[str] = collections.Counter()
    for number in numbers:
        event, runs = undisturbed.resumed[number], tmp_path / str(number)
        shutil.copytree(undisturbed.midway, runs)
        with open(run_in(runs) / "metrics.jsonl", "a") as metrics:
            metrics.write("{")
        code, output = lives.live(runs, at=number, fault=fault)
        assert "Traceback" not in output, (event, output)
        ended[f"exit {code}: {what(event)}"] += 1
        if code == 0:
            # What could not be removed, or made because it is there, does no harm.
            assert event.startswith(("unlink", "rmdir", "rename", "mkdir")), (event, output)
        else:
            assert code == (2 if fault == "EROFS" else 75), (event, output)
            assert output.count("resnet-ddp: ") == 1, (event, output)
            before = len(starts(runs))
            code, output = lives.live(runs)
            assert code == 0, (event, output)
            assert "set aside" not in output
            assert all(begun >= 12 for begun in starts(runs)[before:]), event
        assert_same_outcome(runs, undisturbed.run)
        shutil.rmtree(runs)
    return ended


@pytest.mark.parametrize(
    ("fault", "offset"), [("ENOSPC", 0), ("EIO", 3), ("EDQUOT", 6), ("EROFS", 9)]
)
def test_a_disk_that_fails_in_a_save(
    lives: Lives, undisturbed: Undisturbed, tmp_path: Path, fault: str, offset: int
) -> None:
    fail_midway(lives, undisturbed, tmp_path, list(save_in(undisturbed.resumed)[offset::12]), fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "EDQUOT", "EROFS"])
def test_a_disk_that_fails_at_every_call(
    lives: Lives,
    undisturbed: Undisturbed,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    """In the lease, the logs, a save, the result: of one life that goes on from iteration 12."""
    numbers = [
        n for n, event in enumerate(undisturbed.resumed) if event not in ("step ", "evaluation ")
    ]
    ended = fail_midway(lives, undisturbed, tmp_path, numbers, fault)
    show(capsys, f"{ended.total()} times {fault}:", ended)


def test_a_clock_that_jumps(lives: Lives, undisturbed: Undisturbed, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert lives.live(runs, at=60, clock=True)[0] == -signal.SIGKILL
    code, output = lives.live(runs, clock=True)
    assert code == 0, output
    assert starts(runs) == [0, 3]
    assert_as_undisturbed(runs, undisturbed.run)


@pytest.mark.parametrize("processes", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_of_several_processes_one_trains(
    wider_data: Path, start: Command, tmp_path: Path, processes: int
) -> None:
    options = "resnet20 --recipe he2015-tiny --device cpu --precision fp32 --threads 1"
    runs = tmp_path / "runs"
    command = [*options.split(), "--data", str(wider_data), "--runs", str(runs)]
    started = [start("resnet-ddp train", *command) for _ in range(processes)]
    # The one that trains is stopped once the others have ended.
    while (living := sum(process.poll() is None for process in started)) > 1:
        time.sleep(0.05)
    until = time.monotonic() + 120
    while living and not starts(runs) and time.monotonic() < until:
        time.sleep(0.05)
    (run_in(runs) / "stop").touch()
    ended = [(process.communicate()[1], process.returncode) for process in started]
    assert sorted(code for _, code in ended) == [75] * (processes - 1) + [85], ended
    for output, code in ended:
        if code == 75:
            assert "another process is training this run" in output
            assert len(output.splitlines()) == 1
    assert starts(runs) == [0]


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


def test_a_disk_that_is_really_full(lives: Lives, undisturbed: Undisturbed, mount: Path) -> None:
    runs = mount / "runs"
    # Room for one checkpoint, of 2.2 MB, but not for two.
    code, output = lives.live(runs)
    assert code == 75, output
    assert "No space left on the disk; free some" in output
    subprocess.run(["mount", "-o", "remount,size=30m", mount], check=True)
    code, output = lives.live(runs)
    assert code == 0, output
    assert starts(runs) == [0, 3]
    assert_as_undisturbed(runs, undisturbed.run)


def test_a_file_system_that_is_read_only(
    lives: Lives, undisturbed: Undisturbed, mount: Path
) -> None:
    """A run that would go on, and one that would begin."""
    subprocess.run(["mount", "-o", "remount,size=30m", mount], check=True)
    shutil.copytree(undisturbed.midway, mount / "midway")
    subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
    for runs in (mount / "midway", mount / "runs"):
        code, output = lives.live(runs)
        assert code == 2, output
        assert "Read-only file system" in output and "Traceback" not in output


RECORDS = ("metrics.jsonl", "timing.jsonl", "status.json", "config.json", "checkpoints", "lock",
           "lease.json", "stop", "model.safetensors", "result.json")  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_something_else_in_a_files_place_is_named(
    lives: Lives, undisturbed: Undisturbed, tmp_path: Path, name: str
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(undisturbed.midway, runs)
    path = run_in(runs) / name
    if path.is_dir():
        shutil.rmtree(path)
        path.touch()
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
    code, output = lives.live(runs)
    assert code == 2, output
    assert "resnet-ddp: " in output and name in output and "Traceback" not in output


Manifest = dict[str, Any]


class Mutations:
    """Changes to a checkpoint, none of which may be loaded in silence."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.kinds = [name for name in dir(self) if name.startswith("do_")]

    def apply(self, checkpoint: Path) -> str:
        """Change something; return what."""
        kind = self.random.choice(self.kinds)
        file = self.random.choice(sorted(checkpoint.iterdir()))
        getattr(self, kind)(checkpoint, file)
        return f"{kind.removeprefix('do_')} {file.stem}"

    def do_flip(self, checkpoint: Path, file: Path) -> None:
        content = bytearray(file.read_bytes())
        for _ in range(self.random.choice([1, 1, 1, 51])):
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        file.write_bytes(content)

    def do_truncate(self, checkpoint: Path, file: Path) -> None:
        os.truncate(file, self.random.randrange(file.stat().st_size))

    def do_empty(self, checkpoint: Path, file: Path) -> None:
        os.truncate(file, 0)

    def do_extend(self, checkpoint: Path, file: Path) -> None:
        with open(file, "ab") as stream:
            stream.write(self.random.randbytes(self.random.choice([1, 8, 1 << 16])) + b"}")

    def do_zero(self, checkpoint: Path, file: Path) -> None:
        """As a file system may after a power cut."""
        content = file.read_bytes()
        start = self.random.randrange(len(content) - 8)  # the last bytes are not zero
        file.write_bytes(content[:start] + bytes(len(content) - start))

    def do_remove(self, checkpoint: Path, file: Path) -> None:
        file.unlink()

    def do_make_directory(self, checkpoint: Path, file: Path) -> None:
        file.unlink()
        file.mkdir()

    def do_make_pipe(self, checkpoint: Path, file: Path) -> None:
        """Whoever opens it waits for a writer."""
        file.unlink()
        os.mkfifo(file)

    def do_link_elsewhere(self, checkpoint: Path, file: Path) -> None:
        file.unlink()
        file.symlink_to(self.random.choice([file, Path("/dev/zero"), checkpoint, Path("nothing")]))

    def do_swap(self, checkpoint: Path, file: Path) -> None:
        one, other = checkpoint / "model.safetensors", checkpoint / "optimizer.safetensors"
        one.rename(checkpoint / "between")
        other.rename(one)
        (checkpoint / "between").rename(other)

    def do_take_from_the_other(self, checkpoint: Path, file: Path) -> None:
        number = 3 - int(checkpoint.name[-1])
        shutil.copy(UNTOUCHED(checkpoint) / f"iteration-0000000{number}" / file.name, file)

    def do_replace_all_by(self, checkpoint: Path, file: Path) -> None:
        shutil.rmtree(checkpoint)
        if self.random.random() < 0.5:
            checkpoint.touch()
        else:
            checkpoint.symlink_to(self.random.choice([checkpoint, Path("nothing")]))

    def do_change_the_manifest(self, checkpoint: Path, file: Path) -> None:
        """With a right digest half of the time, as one who edits it would."""
        path = checkpoint / "manifest.json"
        manifest: Manifest = json.loads(path.read_text())
        inner = [manifest["owner"], manifest["files"], *manifest["files"].values()]
        part = self.random.choice([manifest, manifest, *inner])
        key = self.random.choice(sorted(part))
        values = [None, -1, 3, "", "x", [], {}, 1.5, True]
        if self.random.random() < 0.2:
            part.pop(key)
        else:
            part[key] = self.random.choice([value for value in values if value != part[key]])
        if self.random.random() < 0.5:
            manifest.pop("digest", None)
            text = json.dumps(manifest, sort_keys=True).encode()
            manifest["digest"] = hashlib.sha256(text).hexdigest()
            if part is manifest and key == "digest":
                manifest["digest"] = manifest["digest"].upper()
        path.write_text(json.dumps(manifest))

    def do_write_other_json(self, checkpoint: Path, file: Path) -> None:
        texts = ["[" * 100_000, "[[]]", "null", "1e999", "NaN", '{"digest": 1}', "\ufeff{}", "\0"]
        (checkpoint / "manifest.json").write_text(self.random.choice(texts))


def UNTOUCHED(checkpoint: Path) -> Path:  # noqa: N802
    return checkpoint.parent.with_name("untouched")


def mutate(folder: Path, number: int, seed: int) -> collections.Counter[str]:
    """Change the newer of two checkpoints, or both, and load: what is whole comes out, or none."""
    saved = {1: Trained(seed=0), 2: Trained(seed=1)}
    untouched = folder.with_name("untouched")
    for iteration, trained in saved.items():
        trained.save(untouched, iteration)
    mutations, done = Mutations(seed), collections.Counter[str]()
    for _ in range(number):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(untouched, folder)
        changed = [2, 1] if mutations.random.random() < 0.2 else [2]
        changes = [mutations.apply(folder / f"iteration-0000000{one}") for one in changed]
        loaded = Trained(seed=2)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            there = loaded.load(folder)
        assert len(warned) == len(changed), changes
        for warning, one in zip(warned, changed, strict=True):
            assert f"damaged-iteration-0000000{one}" in str(warning.message), changes
        if changed == [2]:
            assert there == progress(1), changes
            for name, tensor in saved[1].state().items():
                assert torch.equal(loaded.state()[name], tensor), changes
        else:
            assert there is None, changes
        done.update(changes)
    return done


def test_changed_checkpoints_are_not_loaded(tmp_path: Path) -> None:
    mutate(tmp_path / "checkpoints", 100, seed=0)


@pytest.mark.slow
def test_2000_changed_checkpoints_are_not_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = mutate(tmp_path / "checkpoints", 2000, seed=1)
    show(capsys, f"{done.total()} changed checkpoints, none of them loaded:", done)


@pytest.mark.parametrize("damage", ["pixel", "header", "truncate", "empty", "remove"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_damaged_beton_trains_nothing(
    lives: Lives, tiny_data: Path, tmp_path: Path, split: str, damage: str
) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(tiny_data, copy)
    path = copy / f"{split}.beton"
    if damage in ("pixel", "header"):
        content = bytearray(path.read_bytes())
        content[(8 << 20) if damage == "pixel" else 4] ^= 1  # pixels begin with the second page
        path.write_bytes(content)
    else:
        getattr(Mutations(7), f"do_{damage}")(copy, path)
    code, output = lives.live(tmp_path / "runs", data=copy)
    assert code == 2, output
    assert "Traceback" not in output and len(output.splitlines()) <= 2
    assert not list(tmp_path.glob("runs/*/*/*/config.json"))


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_commands_of_a_user_killed_at_any_time(
    wider_data: Path,
    start: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    processes: int,
) -> None:
    """`train.py`, and the ranks and the launcher of `--processes 2`, each life anew from disk."""
    generator = random.Random(processes)
    entry = "train.py" if processes == 1 else "resnet-ddp train"
    options = "resnet20 --recipe he2015-smoke --device cpu --precision fp32 --threads 1"
    options += " --log-every 1 --eval-every 8 --save-every 2"
    command = [*options.split(), "--data", str(wider_data)]
    command += ["--processes", "2"] if processes == 2 else []

    def life(runs: Path) -> subprocess.Popen[str]:
        return start(entry, *command, "--runs", str(runs), RESNET_DDP_TIMEOUT="20")

    process = life(tmp_path / "undisturbed")
    assert process.wait() == 0, process.communicate()
    runs, counted, lost, may_count = tmp_path / "runs", 0, 0, False
    hit: collections.Counter[str] = collections.Counter()
    for _ in range(100):
        before, process, victims = len(starts(runs)), life(runs), ["launcher"]
        # Let it begin, mostly, then a random time of training.
        until = time.monotonic() + generator.uniform(0, 300)
        while process.poll() is None and time.monotonic() < until and len(starts(runs)) == before:
            time.sleep(0.02)
        until = min(until, time.monotonic() + generator.uniform(0, 6))
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        if process.poll() is None:
            pids = [process.pid, *children_of(process.pid)]
            victim = generator.randrange(len(pids))
            os.kill(pids[victim], signal.SIGKILL)
            victims = [str(victim - 1) if victim else "launcher" if processes == 2 else "it"]
            process.wait(timeout=120)
            while any(Path(f"/proc/{pid}").exists() for pid in pids[1:]):
                time.sleep(0.05)
        begun = starts(runs)[before:]
        if may_count and begun:
            assert begun[0] > 0
            counted += 1
        lost += 1
        if process.returncode == 0:
            break
        assert process.returncode in (75, 85, -signal.SIGKILL), process.communicate()
        may_count = has_checkpoint(runs)
        hit[victims[0]] += 1
    else:
        pytest.fail("never done")
    assert_as_undisturbed(runs, run_in(tmp_path / "undisturbed"))
    show(capsys, f"{counted} kills that count, in {lost} lives of {entry}:", hit)


def test_the_owner_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    """What the mutations rely on: another run's checkpoint, whole as it is, is not loaded."""
    Trained().save(tmp_path / "checkpoints", 1)
    with pytest.warns(UserWarning, match="another run's"):
        assert checkpoints(tmp_path / "checkpoints", OWNER | {"seed": 9}).newest() is None
