"""The bench: it measures what it says it measures."""

import inspect

import pytest

from resnet_ddp import bench, shapes
from resnet_ddp.bench import Setting, count_gflop, markdown


@pytest.mark.parametrize(("model", "gflop"), [("resnet20", 31.0), ("resnet110", 194.1)])
def test_operations_of_a_step(model: str, gflop: float) -> None:
    """Forward, and backward at twice that but for the images' gradient."""
    assert count_gflop(model, 10) == pytest.approx(gflop, rel=0.005)


def test_the_whole_bench_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TRAIN_CHECK", (1, 3))
    monkeypatch.setattr(bench, "TRAIN_TOLERANCE", 0.5)
    monkeypatch.setattr(bench, "PAUSE", 0.0)
    monkeypatch.setattr(bench, "WARM_UP", 0)
    setting = Setting(
        model="resnet20",
        data=shapes.dataset(40, 10),
        device="cpu",
        precision="fp32",
        compile=False,
        threads=1,
        turns=2,
        iterations=1,
    )
    said: list[str] = []
    result = bench.run(setting, said.append)
    stock, ours = result["timings"]
    assert len(stock["turns"]) == len(ours["turns"]) == len(result["ratios"]) == 2
    assert result["training"]["within_tolerance"]
    for timing in (stock, ours):
        assert 0 < timing["min_ms"] <= timing["median_ms"] <= timing["max_ms"]
        assert timing["images_per_second"] == pytest.approx(128e3 / timing["median_ms"])
        assert 0 < timing["share_of_peak"] < 1.5
    assert "ours takes" in markdown(result)
    assert any("mean loss" in line for line in said)


def test_the_stock_loop_is_short() -> None:
    assert len(inspect.getsource(bench.stock).splitlines()) <= 60
