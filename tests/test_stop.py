"""Signals, a file and deadlines ask, and the loop decides."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from resnet_ddp import stop
from resnet_ddp.stop import Deadline, StopRequest, slurm_deadline, slurm_job, slurm_seconds_left

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")


class Clock:
    """A monotonic clock that stands still unless it is moved."""

    now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stop, "time", clock)
    return clock


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A squeue that prints what stands in a file, whatever job is asked for."""
    answer, command = tmp_path / "answer", tmp_path / "bin" / "squeue"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncat {answer}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
    return answer


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_is_only_noted(name: str) -> None:
    before = [signal.getsignal(signal.Signals[name]) for name in SIGNALS]
    request = StopRequest()
    with request.listening():
        assert request.reason is None
        os.kill(os.getpid(), signal.Signals[name])
        assert request.reason == name
    assert before == [signal.getsignal(signal.Signals[name]) for name in SIGNALS]


def test_only_a_second_ctrl_c_after_a_second_means_at_once(clock: Clock) -> None:
    with StopRequest().listening():
        os.kill(os.getpid(), signal.SIGINT)
        clock.now += 0.5
        os.kill(os.getpid(), signal.SIGINT)  # the launcher's copy of the same Ctrl-C
        clock.now += 1.5
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_first_ctrl_c_after_a_deadline_waits_for_the_save(clock: Clock) -> None:
    request = StopRequest(None, Deadline("--max-minutes", 0))
    with request.listening():
        assert request.reason == "--max-minutes"
        os.kill(os.getpid(), signal.SIGINT)
        assert request.reason == "--max-minutes"


def test_a_file_asks_and_is_gone_once_it_was_heard(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "stop"
    request = StopRequest(file)
    with request.listening():
        clock.now += 2
        assert request.reason is None
        file.touch()
        clock.now += 2
        assert request.reason == "the file stop"
    assert not file.exists()


def test_a_deadline_leaves_time_for_the_longest_work_between_two_looks(clock: Clock) -> None:
    request = StopRequest(None, Deadline("--max-minutes", 100, reserve=5))
    with request.listening():
        for clock.now in range(1_010, 1_075):
            if clock.now % 10 == 0:
                assert request.reason is None
        clock.now = 1_075  # 5 s of reserve, and twice 10 s
        assert request.reason == "--max-minutes"


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        ("1-02:03:04", 93_784.0),
        ("2:03:04", 7_384.0),
        ("12:34", 754.0),
        ("0:00", 0.0),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("", None),
        ("slurm_load_jobs error: Unable to contact slurm controller", None),
    ],
)
def test_the_time_left_as_squeue_says_it(squeue: Path, answer: str, seconds: float | None) -> None:
    squeue.write_text(answer + "\n")
    assert slurm_seconds_left("7_3") == seconds
    asked = squeue.with_name("asked").read_text()
    assert asked == "--noheader --jobs 7_3 --format %L\n"


def test_without_squeue_there_is_no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert slurm_seconds_left("7") is None


def test_a_task_of_an_array_asks_for_itself_alone() -> None:
    assert slurm_job({}) is None
    assert slurm_job({"SLURM_JOB_ID": "8"}) == "8"
    array = {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "24"}
    assert slurm_job(array) == "8_24"


def test_the_end_of_a_slurm_job_is_a_deadline(squeue: Path) -> None:
    squeue.write_text("1:40\n")
    assert slurm_deadline({}) is None
    deadline = slurm_deadline({"SLURM_JOB_ID": "8"})
    assert deadline is not None
    until = time.monotonic() + 10
    while deadline.moment == float("inf") and time.monotonic() < until:
        time.sleep(0.02)
    assert deadline.moment - time.monotonic() == pytest.approx(100, abs=10)
    assert deadline.reserve == 25  # a minute would be most of this job
