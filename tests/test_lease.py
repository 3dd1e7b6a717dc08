"""Who may write: one process, also where the kernel's locks do not reach."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from resnet_ddp import lease
from resnet_ddp.exits import TemporaryError
from resnet_ddp.lease import Lease


class Clock:
    """A monotonic clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lease, "time", clock)
    return clock


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's locks reach nobody, as between hosts on some file systems."""
    monkeypatch.setattr(Lease, "_flock", lambda self: False)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the directory."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import pathlib, sys, time; from resnet_ddp.lease import Lease\n"
            "Lease(pathlib.Path(sys.argv[1])).acquire(); print(flush=True); time.sleep(600)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def abandoned(directory: Path) -> bytes:
    """What a process on another host left when that host died."""
    content = b'{"holder": "0123", "host": "gone", "kernel": "another", "pid": 1, "beat": "07"}\n'
    (directory / "lease.json").write_bytes(content)
    return content


def test_the_lease_names_its_holder_and_is_gone_afterwards(tmp_path: Path) -> None:
    mine = Lease(tmp_path / "run")
    mine.acquire()
    content = json.loads((tmp_path / "run" / "lease.json").read_text())
    assert (content["pid"], content["kernel"]) == (os.getpid(), lease.kernel())
    mine.check()
    mine.release()
    assert os.listdir(tmp_path / "run") == ["lock"]


def test_a_living_holder_keeps_it(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(TemporaryError, match="another process is training this run"):
        Lease(tmp_path).acquire()


def test_a_frozen_holder_on_this_host_keeps_it(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(TemporaryError, match="another process"):
        Lease(tmp_path).acquire()


def test_a_holder_that_was_killed_on_this_host_is_followed_at_once(
    holder: subprocess.Popen[str], tmp_path: Path, clock: Clock
) -> None:
    holder.kill()
    holder.wait()
    successor = Lease(tmp_path)
    successor.acquire()
    successor.check()
    successor.release()
    assert clock.now == 1_000.0


def test_another_hosts_lease_is_taken_over_after_a_minute_of_standstill(
    tmp_path: Path, clock: Clock
) -> None:
    abandoned(tmp_path)
    successor = Lease(tmp_path)
    successor.acquire()
    assert clock.now >= 1_060.0
    successor.check()
    successor.release()


def test_another_hosts_lease_that_moves_stays(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = abandoned(tmp_path)
    until = clock.now + 59

    def sleep(seconds: float) -> None:
        clock.now += seconds
        if clock.now >= until:  # the other host was slow
            (tmp_path / "lease.json").write_bytes(content.replace(b"07", b"08"))

    monkeypatch.setattr(clock, "sleep", sleep)
    with pytest.raises(TemporaryError, match="another process"):
        Lease(tmp_path).acquire()
    assert b"08" in (tmp_path / "lease.json").read_bytes()


def test_a_wall_clock_that_jumps_changes_nothing(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandoned(tmp_path)
    os.utime(tmp_path / "lease.json", (0, 0))  # it looks half a century old
    monkeypatch.setattr(time, "time", lambda: 4e9)
    successor = Lease(tmp_path)
    successor.acquire()
    successor.release()
    assert clock.now >= 1_060.0


def test_a_holder_that_was_taken_over_finds_out_before_it_writes(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, elsewhere: None
) -> None:
    first, second = Lease(tmp_path), Lease(tmp_path)
    monkeypatch.setattr(Lease, "_beat", lambda self: None)  # frozen
    first.acquire()
    second.acquire()
    second.check()
    with pytest.raises(TemporaryError, match="taken this run over"):
        first.check()
    first._renew(5)  # it wakes up
    second.check()
    first.release()
    second.check()
    second.release()
    assert os.listdir(tmp_path) == ["lock"]


def test_of_two_that_take_over_at_once_one_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: None
) -> None:
    monkeypatch.setattr(lease, "STANDSTILL", 0.3)
    monkeypatch.setattr(lease, "POLL", 0.1)
    for turn in range(20):
        run = tmp_path / str(turn)
        run.mkdir()
        abandoned(run)
        leases, endings = [Lease(run) for _ in range(4)], []

        def attempt(one: Lease, endings: list[str] = endings) -> None:
            try:
                one.acquire()
                one.check()
                endings.append("got it")
            except TemporaryError:
                endings.append("taken")

        threads = [threading.Thread(target=attempt, args=(one,)) for one in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert endings.count("got it") <= 1, endings
        for one in leases:
            one.release()


def test_the_beat_goes_on_beside_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.02)
    mine = Lease(tmp_path)
    mine.acquire()
    before = (tmp_path / "lease.json").read_bytes()
    deadline = time.monotonic() + 10
    while (tmp_path / "lease.json").read_bytes() == before and time.monotonic() < deadline:
        time.sleep(0.01)
    after = json.loads((tmp_path / "lease.json").read_text())
    mine.release()
    assert int(after["beat"]) > int(json.loads(before)["beat"])


def test_a_removed_lease_counts_as_lost(tmp_path: Path) -> None:
    mine = Lease(tmp_path)
    mine.acquire()
    (tmp_path / "lease.json").unlink()
    with pytest.raises(TemporaryError, match="its lease was removed"):
        mine.check()
    mine.release()


def test_an_empty_lease_is_taken_over_after_a_minute(tmp_path: Path, clock: Clock) -> None:
    """As a file system may leave it after a power cut."""
    (tmp_path / "lease.json").touch()
    mine = Lease(tmp_path)
    mine.acquire()
    mine.release()
    assert clock.now >= 1_060.0
