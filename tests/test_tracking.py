"""Trackers mirror metrics.jsonl: complete, tidy, and never in the way of a run."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT, Command, Train
from wandb_server import KEY, Handler, Server, after, serving

from resnet_ddp.cli import main
from resnet_ddp.exits import UserError
from resnet_ddp.options import TrackOptions
from resnet_ddp.recipe import RECIPES
from resnet_ddp.step import Stepper
from resnet_ddp.tracking import mirror
from resnet_ddp.tracking.mirror import Mirror
from resnet_ddp.tracking.plan import Plan, make_plans, run_id
from resnet_ddp.tracking.rows import SPEED, Rows

RUN = Path("runs", "small-short", "resnet20", "seed0")
OUTCOME = ("model.safetensors", "metrics.jsonl", "result.json")
ARGUMENTS = ("--precision", "fp32", "--log-every", "1", "--eval-every", "6")
OURS = ("tracking.process", "wandb-core")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A W&B server, and a user who is logged in there."""
    with serving() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small_data: Path, one_thread: None) -> Path:
    """An uninterrupted run without any tracker."""
    runs = tmp_path_factory.mktemp("finished") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, SHORT.name, SHORT)
        command = ["train", "resnet20", "--data", str(small_data), "--runs", str(runs)]
        options = [*ARGUMENTS, "--recipe", "short", "--device", "cpu", "--threads", "1"]
        assert main([*command, *options]) == 0
    return runs.parent / RUN


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def points(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what of W&B's rows comes from metrics.jsonl."""
    return [
        {key: value for key, value in row.items() if not key.startswith("_") and key != SPEED}
        for row in rows
    ]


def assert_same_outcome(run: Path, other: Path) -> None:
    for file in OUTCOME:
        assert (run / file).read_bytes() == (other / file).read_bytes(), file


def wait_for(what: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes(run: Path) -> list[str]:
    """Return the command lines of what tracks a run, and of what that started."""
    found: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_text().replace("\0", " ")
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" and any(name in command for name in OURS):
            found[int(entry.name)] = (int(fields[1]), command)
    ours = {pid for pid, (_, command) in found.items() if str(run) in command}
    return [text for pid, (parent, text) in found.items() if pid in ours or parent in ours]


# What to track with.


def plans(options: TrackOptions | None = None, **variables: str) -> tuple[Plan, ...]:
    return make_plans(options or TrackOptions(), {"NETRC": "/nowhere", **variables})


def test_by_default_wandb_tracks_only_who_is_logged_in(tmp_path: Path) -> None:
    assert plans() == ()
    (plan,) = plans(WANDB_API_KEY=KEY)
    assert (plan.tracker, plan.offline, plan.project) == ("wandb", False, "resnet-ddp")
    assert KEY not in plan.as_line()
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    assert [one.offline for one in plans(NETRC=str(netrc))] == [False]
    assert plans(NETRC=str(netrc), WANDB_BASE_URL="https://wandb.example.org") == ()
    netrc.write_text("machine")
    assert plans(NETRC=str(netrc)) == ()


@pytest.mark.parametrize(
    ("mode", "offline"),
    [("online", [True]), ("offline", [True]), ("dryrun", [True]), ("disabled", []), ("", [])],
)
def test_wandb_mode_says_whether_and_how(mode: str, offline: list[bool]) -> None:
    assert [plan.offline for plan in plans(WANDB_MODE=mode)] == offline  # not logged in
    logged_in = plans(WANDB_MODE=mode, WANDB_API_KEY=KEY)
    expected = {"online": [False], "": [False]}.get(mode, offline)
    assert [plan.offline for plan in logged_in] == expected


def test_options_go_before_environment_variables() -> None:
    variables = {
        "WANDB_API_KEY": KEY,
        "WANDB_PROJECT": "theirs",
        "WANDB_ENTITY": "lab",
        "WANDB_TAGS": "a, b",
        "WANDB_NOTES": "some",
    }
    (plan,) = plans(**variables)
    assert (plan.project, plan.entity, plan.tags, plan.notes) == (
        "theirs",
        "lab",
        ("a", "b"),
        "some",
    )
    options = TrackOptions(
        track="tensorboard,wandb",
        wandb_project="mine",
        wandb_entity="me",
        wandb_tags="c",
        wandb_notes="other",
        wandb_weights=True,
    )
    one, two = plans(options, **variables)
    assert (one.tracker, two.tracker) == ("tensorboard", "wandb")
    assert (two.project, two.entity, two.tags, two.notes) == ("mine", "me", ("c",), "other")
    assert Plan.from_line(two.as_line()) == two
    assert plans(TrackOptions(track="none"), **variables) == ()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("wanbd", "unknown tracker 'wanbd', did you mean wandb?"),
        ("", "unknown tracker ''"),
        ("wandb,none", "none goes with no other"),
    ],
)
def test_a_wrong_tracker_is_named(text: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--track"):
        plans(TrackOptions(track=text))
    assert main(["train", "resnet20", "--data", "shapes", "--track", text]) in (2,)
    assert line in capsys.readouterr().err


def test_an_id_is_a_pure_function_of_the_cell(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    first = run_id(config)
    assert first == run_id(config | {"world_size": 7, "hardware": "another", "git_commit": None})
    assert first.startswith("resnet20-s0-")
    for key, value in {"grid": "g", "seed": 1, "recipe_hash": "0", "data_sha256": "0"}.items():
        assert run_id(config | {key: value}) != first


# What may be copied.


def test_only_what_stays_is_copied(train: Train, tmp_path: Path, finished: Path) -> None:
    run = tmp_path / RUN
    step = Stepper.step

    def crash(stepper: Stepper) -> None:
        if int(stepper.iteration) == 8:
            raise RuntimeError("power cut")
        step(stepper)

    rows = Rows(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(*ARGUMENTS, "--save-every", "5")
    assert len(lines(run)) == 9
    assert points(rows.read()) == lines(run)[:5]  # the rest comes after the checkpoint
    assert rows.summary() is None
    assert train() == 0
    assert points(rows.read()) == lines(run) == lines(finished)
    assert [row["iteration"] for row in rows.read() if SPEED in row] == list(range(1, 13))
    summary = rows.summary()
    assert summary is not None
    result = json.loads((run / "result.json").read_text())
    assert summary["test_error_rate"] == result["test_error_rate"]
    val = [row["val/error_rate"] for row in lines(run) if "val/error_rate" in row]
    assert summary["best_val_error_rate"] == min(val)
    assert summary["training_seconds"] > 0


# Weights & Biases, online.


def test_a_run_of_several_lives_is_one_run_there(
    train: Train, tmp_path: Path, server: Server, finished: Path
) -> None:
    run = tmp_path / RUN
    step = Stepper.step

    def crash(stepper: Stepper) -> None:
        if int(stepper.iteration) == 11:
            wait_for(lambda: [len(one.rows) for one in server.runs.values()] == [10 + 1])
            raise RuntimeError("power cut")
        step(stepper)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(*ARGUMENTS, "--save-every", "5", "--track", "wandb", "--wandb-tags", "a,b")
    assert train("--stop-after", "11") == 85
    assert train("--wandb-notes", "some") == 0  # logged in is enough
    (there,) = server.runs.values()
    assert server.complaints == []
    assert points(there.rows) == lines(run)
    assert [row["_step"] for row in there.rows] == list(range(len(there.rows)))
    assert_same_outcome(run, finished)
    first = there.upserts[0]
    assert first["project"] == "resnet-ddp"
    assert first["groupName"] == "small-short/resnet20"
    assert (first["displayName"], first["jobType"]) == ("resnet20-s0", "train")
    assert first["tags"] == ["a", "b"]
    assert there.exit_code == 0
    config = json.loads((run / "config.json").read_text())
    for key in ("recipe_fields", "data_sha256", "world_size", "hardware", "git_commit"):
        assert there.config[key] == config[key]
    result = json.loads((run / "result.json").read_text())
    for key in ("test_error_rate", "val_error_rate"):
        assert there.summary[key] == result[key]
    assert there.summary["training_seconds"] > 0
    assert there.summary["best_val_error_rate"] <= there.summary["val_error_rate"]
    assert processes(run) == []


def test_no_key_stands_where_it_could_be_read(
    train: Train, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def look(handler: Handler) -> bool:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen.append(path.read_text())
            except OSError:
                continue
        return False

    server.fault = look
    assert train(*ARGUMENTS) == 0
    assert any("wandb-core" in text for text in seen)
    assert not any(KEY in text for text in seen)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_it_costs_a_run_next_to_nothing_to_start(
    finished: Path, tmp_path: Path, server: Server
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    took = []
    for _ in range(5):
        began = time.perf_counter()
        one = Mirror(run, plans(WANDB_API_KEY=KEY)[0], lambda line: None)
        took.append(time.perf_counter() - began)
        one.close()
    assert sorted(took)[2] < 0.1  # a second is what may be


def test_a_killed_run_leaves_no_process(start: Command, server: Server, small_data: Path) -> None:
    variables = server.environment()
    arguments = ["--data", str(small_data), "--recipe", "he2015-tiny", "--threads", "1"]
    run = Path("runs/small-he2015-tiny/resnet20/seed0")
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = start(
            "resnet-ddp train", "resnet20", *arguments, "--save-every", "2", **variables
        )
        wait_for(lambda: any(one.rows for one in server.runs.values()))
        assert len(processes(run)) >= 2
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(60) == (-number if number == signal.SIGKILL else 85)
        wait_for(lambda: processes(run) == [], 10)
        assert time.monotonic() - began < 15
        server.runs.clear()


# Whatever happens to the server, training does not notice.


def answering(code: int, content: bytes = b"{}", path: str = "") -> Callable[[Handler], bool]:
    def fault(handler: Handler) -> bool:
        if not handler.path.endswith(path):
            return False
        handler.answer(code, content)
        return True

    return fault


def resetting(handler: Handler) -> bool:
    handler.reset()
    return True


def breaking_off(handler: Handler) -> bool:
    handler.answer(200, b'{"data": {', length=5000)
    handler.reset()
    return True


def black_hole(handler: Handler) -> bool:
    time.sleep(20)
    handler.reset()
    return True


def dying(handler: Handler) -> bool:
    """Answer a few requests, and then no more."""
    return len(handler.server.requests) > 4 and resetting(handler)


def flaky() -> Callable[[Handler], bool]:
    def fault(handler: Handler) -> bool:
        return len(handler.server.requests) % 2 == 1 and answering(503)(handler)

    return fault


FAULTS: dict[str, Callable[[Handler], bool]] = {
    "black hole": black_hole,
    "reset": resetting,
    "breaks off": breaking_off,
    "dies in the middle": dying,
    "every second request fails": flaky(),
    "slow": after(1.0),
    "500": answering(500),
    "429": answering(429),
    "401": answering(401, b'{"errors": [{"message": "who are you?"}]}'),
    "rows: 403": answering(403, path="file_stream"),
    "rows: 404": answering(404, path="file_stream"),
    "rows: 500": answering(500, path="file_stream"),
    "rows: 413": answering(413, path="file_stream"),
    "HTML": answering(200, b"<html>sign in to the hotel's network</html>"),
    "empty": answering(200),
    "GraphQL errors": answering(200, b'{"errors": [{"message": "no"}]}', path="graphql"),
}


# Those that take longest, and those that are like another, in the slow suite only.
SLOW = ("breaks off", "every second request fails", "429", "rows: 404", "rows: 500", "rows: 413",
        "GraphQL errors", "not a host", "disk read-only")  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in (*FAULTS, "refused", "not a host", "disk full", "disk read-only")
    ],
)
def test_no_fault_of_a_tracker_reaches_the_run(
    name: str,
    train: Train,
    tmp_path: Path,
    server: Server,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / RUN
    monkeypatch.setattr(mirror, "FINISH", 4.0)
    server.fault = FAULTS.get(name, server.fault)
    with pytest.MonkeyPatch.context() as patch:
        if name == "refused":
            with socket.socket() as unused:
                unused.bind(("127.0.0.1", 0))
                port = unused.getsockname()[1]
            patch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        elif name == "not a host":
            patch.setenv("WANDB_BASE_URL", "http://nowhere.invalid")
        elif name == "disk full":
            patch.setenv("WANDB_DIR", "/dev/full")
        elif name == "disk read-only":
            patch.setenv("WANDB_DIR", "/proc")
        began = time.monotonic()
        assert train(*ARGUMENTS, "--track", "wandb") == 0
        assert time.monotonic() - began < 30
    assert_same_outcome(run, finished)
    wait_for(lambda: processes(run) == [], 10)
    harmless = ("slow", "every second request fails")
    told = capfd.readouterr().err
    assert ("wandb does not have all of this run" in told) or name in harmless
    assert "Traceback" not in told
    # Later, all is well again.
    server.fault = lambda handler: False
    assert main(["track", "push", str(run)]) == 0
    (there,) = server.runs.values()
    assert points(there.rows) == lines(run)
    assert server.complaints == []


# push.


def test_push_copies_what_was_trained_without_a_tracker(
    train: Train,
    tmp_path: Path,
    server: Server,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / RUN
    assert train(*ARGUMENTS, "--track", "none") == 0
    assert train(*ARGUMENTS, "--track", "none", "--seed", "1", "--stop-after", "8") == 85
    damaged = run.with_name("seed2")
    shutil.copytree(run, damaged)
    (damaged / "config.json").write_text("{")
    assert server.runs == {}
    assert main(["track", "push", str(tmp_path / "runs"), "--wandb-project", "mine"]) == 0
    said = capsys.readouterr()
    assert "2 of 2 copied" in said.out
    assert "seed2: left out" in said.err
    by_name = {one.upserts[0]["displayName"]: one for one in server.runs.values()}
    assert by_name.keys() == {"resnet20-s0", "resnet20-s1"}
    assert points(by_name["resnet20-s0"].rows) == lines(run)
    half = run.with_name("seed1")
    assert points(by_name["resnet20-s1"].rows) == lines(half)
    assert by_name["resnet20-s1"].exit_code != 0
    assert {one.upserts[0]["project"] for one in server.runs.values()} == {"mine"}
    # There is nothing left to do.
    assert main(["track", "push", str(run), "--wandb-project", "mine"]) == 0
    assert points(by_name["resnet20-s0"].rows) == lines(run)
    # It goes on, and what is missing follows: a rewind has nothing to take back.
    assert train("--track", "none", "--seed", "1") == 0
    assert main(["track", "push", str(half), "--wandb-project", "mine"]) == 0
    assert points(by_name["resnet20-s1"].rows) == lines(half)
    assert by_name["resnet20-s1"].exit_code == 0
    assert server.complaints == []


def test_push_says_when_there_is_nothing_to_do_it_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", "/nowhere")
    monkeypatch.delenv("WANDB_MODE")
    assert main(["track", "push", str(tmp_path)]) == 2
    assert "wandb login" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert main(["track", "push", str(tmp_path)]) == 2
    assert "holds no runs" in capsys.readouterr().err
    assert main(["track", "push", str(tmp_path / "none")]) == 2
    assert "is no directory" in capsys.readouterr().err


def test_a_push_that_fails_asks_for_another(
    finished: Path, tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    server.fault = answering(401)
    assert main(["track", "push", str(run)]) == 75
    assert "0 of 1 copied" in capsys.readouterr().out


def test_a_run_that_is_being_tracked_is_left_to_its_process(
    finished: Path, tmp_path: Path, server: Server
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    said: list[str] = []
    plan = plans(WANDB_API_KEY=KEY)[0]
    first = Mirror(run, plan, lambda line: None)
    wait_for(lambda: server.runs)
    second = Mirror(run, plan, said.append)
    assert not second.finish(20)
    assert any("another process is at it" in line for line in said)
    assert first.finish(60)
    (there,) = server.runs.values()
    assert points(there.rows) == lines(run)


# Weights & Biases, offline: its own files.


def records(path: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file: a log as LevelDB's, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, block, header = path.read_bytes(), 32768, 7
    assert content[:4] == b":W&B"
    position, parts = header, b""
    while position + header <= len(content):
        if block - position % block < header:
            position += block - position % block
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]  # 1 whole, 2 first, 3 middle, 4 last
        parts += content[position + header : position + header + length]
        position += header + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def offline_rows(run: Path) -> list[dict[str, Any]]:
    rows = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                assert items["_step"] == record.history.step.num
                rows.append(items)
    return rows


def test_offline_files_hold_each_point_once_over_kills_and_resumes(
    train: Train, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / RUN
    step = Stepper.step

    for crash_at, save_every in ((4, "2"), (8, "3"), (11, "5")):

        def crash(stepper: Stepper, at: int = crash_at) -> None:
            if int(stepper.iteration) == at:
                wait_for(lambda: offline_rows(run))
                raise RuntimeError("power cut")
            step(stepper)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stepper, "step", crash)
            with pytest.raises(RuntimeError, match="power cut"):
                train(*ARGUMENTS, "--save-every", save_every)
        wait_for(lambda: processes(run) == [], 10)
    assert main(["track", "push", str(run)]) == 2  # offline means offline
    assert train() == 0
    rows = offline_rows(run)
    assert points(rows) == lines(run)
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    assert_same_outcome(run, finished)


def test_a_life_that_ended_well_is_not_written_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    whole = (run / "metrics.jsonl").read_bytes()
    result = (run / "result.json").read_bytes()
    (run / "result.json").unlink()
    (plan,) = plans(WANDB_MODE="offline")
    checkpoint = next((run / "checkpoints").iterdir()) / "manifest.json"
    manifest = json.loads(checkpoint.read_text())
    ends = [end + 1 for end, byte in enumerate(whole) if byte == ord("\n")]
    for count in (3, 7, len(ends)):
        checkpoint.write_text(json.dumps(manifest | {"metrics_bytes": ends[count - 1]}))
        if count == len(ends):
            (run / "result.json").write_bytes(result)
        assert Mirror(run, plan, print).finish(60)
        assert points(offline_rows(run)) == lines(run)[:count]
        time.sleep(1.1)  # W&B names fragments by the second
    assert len(list(run.glob("wandb/offline-run-*"))) == 3


def test_weights_go_along_with_their_card_if_asked(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (plan,) = plans(TrackOptions(wandb_weights=True), WANDB_MODE="offline")
    assert Mirror(run, plan, print).finish(60)
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    (artifact,) = [
        record.artifact
        for record in records(path)
        if record.WhichOneof("record_type") == "artifact"
    ] or [
        record.request.log_artifact.artifact
        for record in records(path)
        if record.WhichOneof("record_type") == "request"
    ]
    assert artifact.type == "model"
    assert artifact.name == "small-short-resnet20-s0"
    contents = {entry.path for entry in artifact.manifest.contents}
    assert contents == {"README.md", "model.safetensors"}


# TensorBoard.


def test_tensorboard_has_each_point_once(train: Train, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / RUN
    assert train(*ARGUMENTS, "--track", "tensorboard", "--stop-after", "5") == 85
    assert train("--track", "tensorboard") == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    names = {name for line in lines(run) for name in line if name != "iteration"}
    assert set(events.Tags()["scalars"]) == names | {SPEED}
    for name in names:
        expected = [
            (line["iteration"], torch.tensor(line[name]).item())
            for line in lines(run)
            if line.get(name) is not None
        ]
        assert [(one.step, one.value) for one in events.Scalars(name)] == expected
    (text,) = (
        events.Tensors("config/text_summary")
        if ("config/text_summary" in events.Tags()["tensors"])
        else events.Tensors("config")
    )
    assert b"| model | resnet20 |" in text.tensor_proto.string_val[0]


# The report.


def test_a_report_takes_its_table_and_figure_there(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "report"
    arguments = ["report", str(finished), "--out", str(out), "--models", "resnet20"]
    assert main([*arguments, "--seeds", "0"]) == 0
    assert not (out / "wandb").exists()  # only if asked
    assert main([*arguments, "--seeds", "0", "--track", "wandb"]) == 0
    (path,) = out.glob("wandb/offline-run-*/*.wandb")
    found = list(records(path))
    (begun,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert (begun.run_group, begun.job_type) == ("small-short", "report")
    rows = [record for record in found if record.WhichOneof("record_type") == "history"]
    (row,) = [{item.key or item.nested_key[0] for item in one.history.item} for one in rows]
    assert row >= {"table", "fig6"}


def test_a_report_that_wandb_does_not_take_is_written_all_the_same(
    finished: Path, tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault = answering(401)
    out = tmp_path / "report"
    arguments = ["--out", str(out), "--models", "resnet20", "--seeds", "0", "--track", "wandb"]
    assert main(["report", str(finished), *arguments]) == 75
    assert (out / "report.html").exists()
    told = capsys.readouterr().err
    assert "resnet-ddp: wandb: CommError: " in told
    assert "the same command tries again" in told
    assert "Traceback" not in told
