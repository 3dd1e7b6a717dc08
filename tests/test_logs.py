"""metrics.jsonl is the truth."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from resnet_ddp import logs
from resnet_ddp.logs import JsonLines, Throughput


def test_lines_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    first.write(iteration=1, **{"train/loss": 1 / 3})
    length, sha256 = first.sync()
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    first.write(iteration=2)
    first.close()
    second = JsonLines(path, length=length)
    second.write(iteration=2, lr=0.1)
    second.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"iteration": 1, "train/loss": 1 / 3}, {"iteration": 2, "lr": 0.1}]
    assert length == len(path.read_text().splitlines()[0]) + 1


def test_a_line_that_a_killed_process_left_without_its_end_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "timing.jsonl"
    path.write_bytes(b'{"iteration": 1}\n{"itera')
    lines = JsonLines(path)
    lines.write(iteration=2)
    lines.close()
    assert path.read_bytes() == b'{"iteration": 1}\n{"iteration": 2}\n'


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        lines.write(iteration=1, loss=float("nan"))
    lines.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_throughput_leaves_out_what_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 50.0, 52.0, 90.0, 91.0])
    monkeypatch.setattr(logs.time, "perf_counter", lambda: next(clock))
    throughput = Throughput(batch_size=128)
    for _ in range(2):
        with throughput.measured(iterations=10):
            pass
    assert throughput.read() == 20 * 128 / 4
    with throughput.measured(iterations=5):
        pass
    assert throughput.read() == 5 * 128 / 1
    assert throughput.seconds == 5
