"""Hostile input of every kind: exit code 2 and a line or two, or a valid run; nothing else.

Each property is tried in two sizes: everyday with the same examples every time, and thoroughly,
among the slow tests, with other examples every time.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import shutil
import time
import tracemalloc
import urllib.error
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from resnet_ddp import beton
from resnet_ddp.cli import (
    AuditOptions,
    BenchOptions,
    PrepareOptions,
    PushOptions,
    ReportOptions,
    main,
    train_main,
)
from resnet_ddp.datasets import DataRecord, Dataset, load_dataset, read_record, write_dataset
from resnet_ddp.exits import ExitCode, UserError
from resnet_ddp.options import (
    GridRunOptions,
    GridStatusOptions,
    GridSubmitOptions,
    LocalTrainOptions,
)
from resnet_ddp.recipe import HE2015
from resnet_ddp.runs import IDENTITY, Cell, RunDirectory, Settings, read_object

Profile = Callable[[int], settings]


def everyday(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=timedelta(seconds=30),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def thorough(examples: int) -> settings:
    return settings(everyday(10 * examples), derandomize=False, print_blob=True)


in_two_sizes = pytest.mark.parametrize(
    "profile", [everyday, pytest.param(thorough, marks=pytest.mark.slow)]
)


def assert_short(message: str) -> None:
    """A user reads a line or two."""
    assert message.strip()
    assert message.rstrip("\n").count("\n") <= 1, message


# Command lines

COMMANDS: dict[str, tuple[type[Any], str, str]] = {  # options, what is needed, what is allowed
    "prepare": (PrepareOptions, "folder --to new", "--from=images --from=file"),
    "train": (
        LocalTrainOptions,
        "resnet20 --data prepared",
        "--seed=3 --data=shapes --data=cifar10 --data=damaged --recipe=he2015-tiny --runs=file "
        "--grid=g --precision=fp32 --device=cpu --compile --no-compile --threads=2 --log-every=7 "
        "--stop-after=5 --max-minutes=1.5 --processes=2 --quiet --track=wandb --track=none "
        "--wandb-project=p --wandb-tags=a,b --wandb-weights",
    ),
    "bench": (
        BenchOptions,
        "resnet20 --data prepared",
        "--data=shapes --data=cifar100 --device=cpu --threads=2 --turns=1 --no-compile --json",
    ),
    "grid run": (
        GridRunOptions,
        "--data prepared --devices cpu",
        "--models=plain20 --seeds=0-2 --recipe=he2015-tiny --runs=file --grid=g --dry-run "
        "--runs-per-device=1 --processes-per-run=2 --max-minutes=0 --precision=fp32",
    ),
    "grid submit": (
        GridSubmitOptions,
        "--data prepared --dry-run",
        "--partition=gpu --time=1-0 --gres=gpu:1 --mem=4G --array-limit=2 --runs-per-task=3 --qos= "
        "--nodes=2 --ntasks-per-node=2 --sbatch=--exclude=n7 --sbatch=n7 --sbatch=' --site=file "
        "--complete --resubmission=3 --runs=file --grid=g",
    ),
    "grid status": (
        GridStatusOptions,
        "--data prepared",
        "--models=plain20 --seeds=0,7 --runs=file --runs=loop --grid=g --json --watch",
    ),
    "report": (ReportOptions, "images --out new", "--models=plain20 --seeds=0 --watch"),
    "track push": (PushOptions, "images", "--track=wandb --track=none --wandb-entity=e prepared"),
    "audit": (AuditOptions, "--device auto", "images --processes=2 --device=cpu --json"),
}
NUMBERS = ["0", "1", "2", "-1", "1025", "4294967295", "4294967296", "9" * 5000, "1e3", "nan", "٣"]
NAMES = ["resnet110", "plain20", "resnet", "he2015-tiny", "fp32", "cpu", "cuda", "auto"]
SOURCES = ["folder", "cifar10", "cifar100", "shapes"]
PATHS = ["prepared", "damaged", "images", "file", "loop", "nowhere", "new", ".", "..", "loop/new"]
UNWRITABLE = ["/dev/null", "/dev/null/new", "/proc/nowhere/new", "x" * 300, "a/" * 2100]
TEXTS = [
    "",
    " ",
    "-",
    "--",
    "-h",
    "--help",
    "--version",
    "%s",
    "{}",
    "~",
    "é",
    "\udcff",
    "x" * 9000,
]
UNPRINTABLE = ["a\nb\nc", "\r", "\x1b[2J", "\x9b", "\u2028"]
# No slash: what is written goes below the working directory, or to a path above.
words = st.text(st.characters(codec="utf-8", exclude_characters="/", exclude_categories=["Cc"]))
known = st.sampled_from(NUMBERS + NAMES + SOURCES + PATHS + UNWRITABLE + TEXTS)
values = st.one_of(known, known, words, st.sampled_from(UNPRINTABLE))


def flags_of(options: type[Any]) -> list[str]:
    names = [field.name.rstrip("_").replace("_", "-") for field in dataclasses.fields(options)]
    return [f"--{name}" for name in names] + [f"--no-{name}" for name in names]


def near_misses(word: str) -> list[str]:
    return [word[1:], word[:-1], word + "s", word.upper(), word.replace("a", "aa"), word + "="]


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command and what it needs, or not; then options, values and words in any order."""
    command = draw(st.sampled_from(sorted(COMMANDS)))
    options, needed, allowed = COMMANDS[command]
    flag = st.sampled_from(flags_of(options))
    miss = flag.flatmap(lambda flag: st.sampled_from(near_misses(flag)))
    right = st.sampled_from(allowed.split()).map(lambda word: [word])
    hostile = st.one_of(
        st.tuples(flag, values).map(list),
        st.tuples(flag | miss, values).map(lambda pair: ["=".join(pair)]),
        (flag | miss | values).map(lambda word: [word]),
    )
    pieces = draw(st.lists(right, max_size=3)) + draw(st.lists(hostile, max_size=2))
    pieces += [needed.split()] * draw(st.sampled_from([1, 1, 1, 1, 0]))
    start = draw(st.sampled_from([command] * 20 + [*near_misses(command), "", "--"]))
    return [*start.split(), *(word for piece in draw(st.permutations(pieces)) for word in piece)]


class ImpatientTime:
    """A clock for commands that go on until Ctrl-C."""

    monotonic = time.monotonic

    @staticmethod
    def sleep(_: float) -> None:
        raise KeyboardInterrupt


@pytest.fixture
def cheap_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes minutes ends at once, and there is no network."""

    def train(
        _options: object, _directory: object, load_data: Callable[[], Dataset], _plans: object
    ) -> ExitCode:
        load_data()
        return ExitCode.DONE

    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    measured = {"training": {"within_tolerance": True}}
    monkeypatch.setattr("resnet_ddp.trainer.train", train)
    monkeypatch.setattr("resnet_ddp.cli.launch", lambda *_: 0)
    monkeypatch.setattr("resnet_ddp.bench.run", lambda *_, **__: measured)
    monkeypatch.setattr("resnet_ddp.bench.markdown", str)
    monkeypatch.setattr("resnet_ddp.audit.recipe.run_audit", list)
    monkeypatch.setattr("resnet_ddp.grid.local.Supervisor.run", lambda _: ExitCode.DONE)
    monkeypatch.setattr("resnet_ddp.grid.local.time", ImpatientTime)
    monkeypatch.setattr("resnet_ddp.cli.time", ImpatientTime)
    monkeypatch.setattr("resnet_ddp.audit.together.run_together", lambda *_, **__: [])
    monkeypatch.setattr("urllib.request.urlopen", no_network)


@pytest.fixture
def here(tmp_path: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the paths above name; it is not alone in its parent."""
    here = tmp_path / "here"
    (here / "data").mkdir(parents=True)
    (here / "prepared").symlink_to(small_data)
    (here / "data" / "shapes").symlink_to(small_data)
    (here / "damaged").mkdir()
    for path in small_data.iterdir():
        (here / "damaged" / path.name).write_text('{"format_version": 1')
    (here / "file").touch()
    (here / "loop").symlink_to("loop")
    for split, kind in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
        (here / "images" / split / kind).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(here / "images" / split / kind / "1.png")
    monkeypatch.chdir(here)
    return here


def answer(command: Callable[[list[str]], int], argv: list[str]) -> tuple[object, str]:
    """Return the exit code and what stands on stderr, on a terminal that shows UTF-8 only."""
    output = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict")
    error = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    code: object
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        try:
            code = command(argv)
        except SystemExit as exit_:
            code = exit_.code
    error.seek(0)
    return code, error.read()


@pytest.mark.usefixtures("cheap_commands")
@in_two_sizes
def test_a_command_line_runs_or_is_answered_in_a_line_or_two(profile: Profile, here: Path) -> None:
    siblings, there = set(here.parent.iterdir()), set(here.rglob("*"))

    @profile(500)
    @given(command_lines())
    @example(["train", "resnet20", "--data", "a\nb\nc"])
    @example(["prepare", "cifar10", "--to", "loop"])
    @example(["prepare", "folder", "--from", "images", "--to", "\udcff"])
    def answered(argv: list[str]) -> None:
        behind_launcher = argv[:1] == ["train"]
        for command, words in [(main, argv)] + [(train_main, argv[1:])] * behind_launcher:
            code, error = answer(command, words)
            assert code in (0, 2, 3, 130), (code, error)
            assert "Traceback" not in error
            if code == 2:
                assert_short(error)
        assert set(here.parent.iterdir()) == siblings
        for path in set(here.iterdir()) - there:
            shutil.rmtree(path)

    answered()


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to(path)])
@pytest.mark.parametrize("data", ["shapes", "cifar10"])
def test_something_else_called_data_is_named(
    make: Callable[[Path], None], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    code, error = answer(main, ["train", "resnet20", "--data", data])
    assert code == 2
    assert_short(error)
    assert "data" in error


@pytest.mark.parametrize(
    "command",
    [
        "train resnet20 --threads 1025",
        "train resnet20 --processes 129",
        "bench resnet20 --threads 4294967295",
        "audit --processes 4294967295",
    ],
)
def test_more_than_a_machine_can_start_is_refused(command: str) -> None:
    code, error = answer(main, command.split())
    assert code == 2
    assert_short(error)
    assert "is more than" in error


# JSON files

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=20)
    | st.sampled_from([10**4000, -(2**63), 2**64, 1e308, "\ud800", "a\nb\nc", "x" * 100_000])
)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of everything inside a JSON value."""
    keys = value if isinstance(value, dict) else range(len(value) if type(value) is list else 0)
    return [place for key in keys for place in [(value, key), *places_in(value[key])]]


@st.composite
def other_values(draw: st.DrawFn, valid: dict[str, Any]) -> bytes:
    """The text of a JSON object with a few values replaced, removed, added or exchanged."""
    value = copy.deepcopy(valid)
    for change in draw(st.lists(st.sampled_from(["replace", "remove", "add", "swap"]), max_size=3)):
        container, key = draw(st.sampled_from(places_in(value) or [({0: 0}, 0)]))
        if change == "replace":
            container[key] = draw(json_values)
        elif change == "remove":
            del container[key]
        elif change == "swap":
            other, place = draw(st.sampled_from(places_in(value)))
            container[key], other[place] = copy.deepcopy((other[place], container[key]))
        elif isinstance(container, dict):
            container[draw(st.text())] = draw(json_values)
        else:
            container.insert(key, draw(json_values))
    return json.dumps(value).encode()


@st.composite
def other_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """A text with some bytes changed, taken out or put in, or cut short."""
    content = bytearray(valid)
    places = st.tuples(st.integers(0, len(valid)), st.integers(0, 8), st.binary(max_size=8))
    for start, length, new in draw(st.lists(places, max_size=3)):
        content[start : start + length] = new
    return bytes(content[: draw(st.just(None) | st.integers(0, len(content)))])


def other_texts(valid: bytes) -> st.SearchStrategy[bytes]:
    deep = st.integers(1, 5000).map(lambda depth: b'{"a":' * depth + b"1" + b"}" * depth)
    return other_values(json.loads(valid)) | other_bytes(valid) | deep | st.binary(max_size=50)


SPLITS = ("train", "test")


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A prepared directory of small files; no two classes have equally many images."""
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        f"{split}_{kind}": array
        for split, counts in zip(SPLITS, ((150, 100, 50), (3, 2, 1)), strict=True)
        for kind, array in (
            ("images", random.integers(0, 256, (sum(counts), 32, 32, 3), np.uint8)),
            ("labels", random.permutation(np.repeat(np.arange(3), counts))),
        )
    }
    directory = tmp_path / "prepared"
    write_dataset(directory, name="a", source="b", classes=("cat", "dog", "eel"), **arrays)
    for split in SPLITS:  # a page of 2 MiB in place of 8: quicker to write again and again
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        path = directory / f"{split}.beton"
        beton.write_beton(path, images, labels, page_size=beton.MIN_PAGE_SIZE)
    return directory


def facts(dataset: Dataset) -> list[object]:
    """All that follows from images, labels and classes; name, source and origin do not."""
    free = ("name", "source", "original")
    return [
        value.tobytes() if isinstance(value, np.ndarray) else value
        for name, value in vars(dataset).items()
        if name not in free
    ]


@in_two_sizes
def test_a_description_is_refused_or_says_what_was_true(profile: Profile, prepared: Path) -> None:
    expected = facts(load_dataset(prepared))
    description = prepared / "dataset.json"
    valid = description.read_bytes()
    many = json.loads(valid) | {"classes": ["cat"] * 10_000}

    @profile(400)
    @given(other_texts(valid))
    @example(json.dumps(many).encode())
    @example(b'{"format_version": 1, "name": "a", "source": "b", "sha256": ' + b"9" * 4300 + b"}")
    def refused_or_true(text: bytes) -> None:
        description.write_bytes(text)
        for read in (read_record, load_dataset):
            try:
                found = read(prepared)
            except UserError as error:
                assert_short(str(error))
                assert len(str(error)) < 1000
                continue
            says = json.loads(text)
            assert all(
                getattr(found, key) == says.get(key)
                for key in ("name", "source", "original", "sha256")
            )
            assert not isinstance(found, Dataset) or facts(found) == expected

    refused_or_true()


DATA = DataRecord(name="cifar10", source="somewhere", original=None, sha256="ab" * 32)
SETTINGS = Settings(precision="bf16", compile=False, threads=2, log_every=50, eval_every=500)
OTHER_SETTINGS = Settings(precision="fp32", compile=True, threads=3, log_every=5, eval_every=50)
OPEN = dict.fromkeys(vars(SETTINGS))


@in_two_sizes
def test_a_configuration_is_refused_or_kept(profile: Profile, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, Cell("grid", "resnet20", 3, HE2015, DATA))
    run.acquire()
    run.settle_config(SETTINGS, world_size=1, environment={"device": "cpu", "cores": None})
    run.release()
    identity = run.cell.identity()

    @profile(400)
    @given(other_texts(run.config_path.read_bytes()))
    def refused_or_kept(text: bytes) -> None:
        run.config_path.write_bytes(text)
        try:
            config = read_object(run.config_path)
            run.check_identity()
            settled = run.settle(OPEN, OTHER_SETTINGS, world_size=1)
        except UserError as error:
            assert_short(str(error))
            assert len(str(error)) < 1000
            return
        assert config is not None
        assert settled.precision in ("bf16", "fp32")
        assert min(settled.threads, settled.log_every, settled.eval_every) >= 1
        assert all(config[key] == identity[key] for key in IDENTITY)
        # Threads are kept for the number of processes that they were chosen for.
        kept = config if config.get("world_size") == 1 else config | {"threads": 3}
        assert vars(settled) == {key: kept[key] for key in OPEN}

    refused_or_kept()


# .beton files

RECORDS = 24 + 2 * 1041
HEADER = {"version": (0, 2), "fields": (2, 2), "page": (4, 4), "samples": (8, 8), "table": (16, 8)}
DESCRIPTORS = {"image": (24, 1), "label": (24 + 1041, 1)}
RECORD = {"mode": (0, 1), "width": (1, 2), "height": (3, 2), "offset": (5, 8), "label": (16, 8)}
ALLOCATION = {"sample": (0, 8), "offset": (8, 8), "size": (16, 8)}
Edit = tuple[int, bytes]  # where, and what to write there


@st.composite
def numbers_changed(draw: st.DrawFn, content: bytes) -> Edit:
    """An integer of the header, a descriptor, a record or the table, replaced by a hostile one."""
    samples, table = np.frombuffer(content, "<u8", 2, 8).tolist()
    sample = draw(st.integers(0, samples - 1) | st.just(0))
    here = [(0, HEADER), (0, DESCRIPTORS), (RECORDS + 24 * sample, RECORD)]
    start, fields = draw(st.sampled_from([*here, (table + 24 * sample, ALLOCATION)]))
    offset, size = draw(st.sampled_from(list(fields.values())))
    place, limit = start + offset, 256**size
    value = int.from_bytes(content[place : place + size], "little")
    near = st.integers(-2, 2).map(lambda step: value + step)
    far = st.sampled_from([0, 1, limit - 1, limit // 2, limit // 2 - 1, 2 * value, value // 2])
    far |= st.sampled_from([beton.MIN_PAGE_SIZE, 4 * beton.MIN_PAGE_SIZE, table, len(content)])
    new = draw(near | far | st.integers(0, limit - 1)) % limit
    return place, new.to_bytes(size, "little")


def bytes_changed(content: bytes) -> st.SearchStrategy[Edit]:
    return st.tuples(st.integers(0, len(content) - 1), st.binary(min_size=1, max_size=4))


@st.composite
def other_betons(draw: st.DrawFn, valid: bytes) -> bytes:
    """A file with a few numbers or bytes changed, cut short or made longer."""
    content = bytearray(valid)
    for place, new in draw(st.lists(numbers_changed(valid) | bytes_changed(valid), max_size=4)):
        content[place : place + len(new)] = new
    near_end = st.integers(-50, 50).map(lambda step: len(valid) + step)
    size = draw(st.just(len(valid)) | near_end | st.integers(0, len(valid)))
    return bytes(content[:size]).ljust(size, b"\0")


@in_two_sizes
def test_a_beton_is_refused_or_read_in_the_memory_that_its_size_justifies(
    profile: Profile, prepared: Path
) -> None:
    expected = facts(load_dataset(prepared))
    path = prepared / "train.beton"
    valid = path.read_bytes()

    @profile(300)
    @given(other_betons(valid))
    def refused_or_read(content: bytes) -> None:
        path.write_bytes(content)
        tracemalloc.start()
        try:
            images, labels = beton.read_beton(path)
            assert images.shape == (len(labels), *images.shape[1:3], 3)
            assert (str(images.dtype), str(labels.dtype)) == ("uint8", "int64")
        except UserError as error:
            assert_short(str(error))
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < 2 * len(content) + (1 << 20)
        try:
            assert facts(load_dataset(prepared)) == expected
        except UserError as error:
            assert_short(str(error))

    refused_or_read()
