"""The bench: it measures what it says it measures."""

import inspect
import json
from pathlib import Path

import pytest

from resnet_ddp import bench, shapes
from resnet_ddp.bench import Setting, count_gflop, markdown


@pytest.mark.parametrize(("model", "gflop"), [("resnet20", 31.0), ("resnet110", 194.1)])
def test_operations_of_a_step(model: str, gflop: float) -> None:
    """Forward, and backward at twice that but for the images' gradient."""
    assert count_gflop(model, 10) == pytest.approx(gflop, rel=0.005)


def setting(*, quick: bool = False) -> Setting:
    return Setting(
        models=("resnet20",),
        data=shapes.dataset(40, 10),
        device="cpu",
        compile=False,
        threads=1,
        turns=2,
        quick=quick,
    )


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("TRAIN_CHECK", (1, 3)),
        ("TRAIN_TOLERANCE", 0.5),
        ("PAUSE", 0.0),
        ("WARM_UP", 1),
        ("TURN", 0.1),
        ("QUICK_TURN", 0.1),
    ):
        monkeypatch.setattr(bench, name, value)


def test_the_whole_bench_in_small(
    short: None, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resnet_ddp.machine.pick_precision", lambda device: "bf16")
    said: list[str] = []
    result = bench.run(setting(), small_data, said.append)
    assert [timing["name"] for timing in result["models"]["resnet20"]] == [
        "stock",
        "eager fp32",
        "eager bf16",
    ]
    assert result["training"]["within_tolerance"]
    for timing in result["models"]["resnet20"]:
        assert len(timing["turns"]) == len(timing["ratios"]) == 2
        assert 0 < timing["min_ms"] <= timing["median_ms"] <= timing["max_ms"]
        assert timing["images_per_second"] == pytest.approx(128e3 / timing["median_ms"])
        assert 0 < timing["share_of_peak"] < 1.5
        if timing["name"] == "stock":
            assert timing["ratios"] == [1, 1]
        else:
            assert timing["start"]["cold"] > 1  # a process that imports torch
            assert 0.1 < timing["start"]["gb"] < 20
    table = markdown(result)
    assert result["hardware"] in table and "| resnet20 | eager bf16 |" in table
    assert any("mean loss" in line for line in said)


def test_a_quick_bench_measures_no_starts(
    short: None, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resnet_ddp.machine.pick_precision", lambda device: "fp32")
    result = bench.run(setting(quick=True), small_data, lambda line: None)
    assert result["training"] is None
    assert [timing["start"] for timing in result["models"]["resnet20"]] == [None, None]
    assert "eager fp32" in markdown(result)


def test_a_trace_opens(short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resnet_ddp.machine.pick_precision", lambda device: "fp32")
    bench.write_trace(setting(), tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert "aten::convolution_backward" in names


def test_the_stock_loop_is_short() -> None:
    assert len(inspect.getsource(bench.stock).splitlines()) <= 60
