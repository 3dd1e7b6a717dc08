"""The table and the figure: right numbers, nothing averaged that differs, nothing guessed."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from resnet_ddp.cli import main
from resnet_ddp.exits import ExitCode, UserError
from resnet_ddp.recipe import RECIPES
from resnet_ddp.records import find_runs, read_run
from resnet_ddp.report import figure
from resnet_ddp.report.summary import Comparison, Sample, summarise, welch
from resnet_ddp.report.table import as_latex, as_markdown, headline
from resnet_ddp.report.write import summaries_of

RECIPE = RECIPES["he2015-tiny"]
MARKUP = "<script>alert('x')</script>|*_`[a](b)&\\ \x1b[31m$%"

MakeRun = Callable[..., Path]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run(model, seed, test, train, ...)` writes a run's directory."""

    def make(
        model: str = "resnet20",
        seed: int = 0,
        test: float | None = 0.1,
        train: float = 0.05,
        *,
        recipe: Any = RECIPE,
        every: int = 100,
        grid: str = "g",
        **config: Any,
    ) -> Path:
        path = tmp_path / "runs" / grid / model / f"seed{seed}"
        path.mkdir(parents=True)
        identity = {
            "grid": grid,
            "model": model,
            "seed": seed,
            "recipe": recipe.name,
            "recipe_hash": recipe.hash,
            "data": "cifar10",
            "data_source": "the archive",
            "data_original": True,
            "data_sha256": "0" * 64,
        } | config
        settled = {"recipe_fields": recipe.fields(), "hardware": "a computer"}
        (path / "config.json").write_text(json.dumps(identity | settled | config))
        points = range(every, recipe.iterations + 1, every)
        losses = [{"iteration": i, "train/loss": 1 / i, "lr": 0.1} for i in points]
        errors = {"train/error_rate": train, "val/error_rate": 0.12}
        write_lines(path / "metrics.jsonl", [*losses, {"iteration": recipe.iterations} | errors])
        timing = [{"iteration": i, "images_per_second": 1280.0} for i in points]
        write_lines(path / "timing.jsonl", [{"event": "start", "iteration": 0}, *timing])
        if test is not None:
            result = {"train_error_rate": train, "val_error_rate": 0.12, "test_error_rate": test}
            whole = identity | result | {"num_parameters": 269722, "iterations": recipe.iterations}
            (path / "result.json").write_text(json.dumps(whole))
        return path

    return make


def report(tmp_path: Path, *more: str) -> int:
    return main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), *more])


def test_mean_deviation_and_interval_are_students() -> None:
    sample = Sample.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (sample.n, sample.mean, sample.lowest, sample.highest) == (5, 3, 1, 5)
    assert sample.std == pytest.approx(1.5811388)
    assert sample.half_width == pytest.approx(2.7764451 * 1.5811388 / 5**0.5)  # t of 4, 0.975
    one = Sample.of([7.0])
    assert one.std is None and one.half_width is None


def test_the_p_value_is_welchs() -> None:
    # scipy.stats.ttest_ind(..., equal_var=False, alternative="greater")
    first, second = [13.0, 12.7, 13.2, 12.9, 12.8], [9.8, 9.6, 13.5, 9.9, 9.7]
    assert welch(first, second) == pytest.approx(0.015879624, rel=1e-4)
    assert welch([1.0, 1.0], [1.0, 1.0]) is None


def test_the_degradation_statement(make_run: MakeRun, tmp_path: Path) -> None:
    for seed in range(3):
        make_run("plain20", seed, train=0.05 + 0.001 * seed)
        make_run("plain56", seed, train=0.09 + 0.001 * seed)
        make_run("resnet20", seed, train=0.05 + 0.001 * seed)
    runs, _ = find_runs(tmp_path)
    plain, residual = summaries_of(runs, ("plain20",), (0, 1, 2))[0].comparisons
    assert plain.difference == pytest.approx(4.0) and plain.p_value is not None
    assert plain.p_value < 1e-4 and "yes (+4.00 points" in str(plain)
    assert str(residual) == "resnet20's training error is above resnet56's: not enough runs"
    assert "not shown" in str(Comparison("plain56", "plain20", 0.1, 0.4))


def test_the_table_says_what_is_there_and_what_is_missing(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, error in enumerate([0.085, 0.087, 0.089]):
        make_run("resnet20", seed, error)
    make_run("resnet20", 3, test=None)
    make_run("plain20", 0)
    assert report(tmp_path, "--models", "resnet20,plain56", "--seeds", "0-4") == 3
    lines = capsys.readouterr().out.splitlines()
    assert "he2015-tiny" in lines[0] and "archive" in lines[0]
    assert (
        "| resnet20 | 20 | 269,722 | 3 of 5 | 8.70 +- 0.20 | 8.20 to 9.20 | 8.75 | 8.51 +- 0.22 "
        "| 5.00 +- 0.00 | 0:00:50 | a computer | 3, 4 |"
    ) in lines
    row = "| plain56 | 56 | - | 0 of 5 | - | - | about 13 | 12.95 +- 0.22 | - | - | - |"
    assert any(line.startswith(row) and "0, 1, 2, 3, 4" in line for line in lines)
    assert any(line.startswith("| plain20 | 20 | 269,722 | 1 of") for line in lines)
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert not table["groups"][0]["is_complete"]
    assert table["groups"][0]["models"][0]["test"]["mean"] == pytest.approx(8.7)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "table.csv").read_text())))
    assert rows[0]["model"] == "resnet20" and float(rows[0]["test_mean"]) == pytest.approx(8.7)
    assert rows[0]["missing_seeds"] == "3 4" and rows[1]["test_mean"] == ""
    latex = (tmp_path / "out" / "table.tex").read_text()
    assert r"resnet20 & 20 & 269,722 & 3 of 5 & 8.70 $\pm$ 0.20" in latex


def test_a_complete_grid_ends_with_0(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("plain20", 0)
    assert report(tmp_path, "--models", "plain20", "--seeds", "0") == 0


def test_data_that_is_not_the_original_is_named_first(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(data_original=None, data_source="a JPEG copy")
    runs, _ = find_runs(tmp_path)
    text = as_markdown(summaries_of(runs, (), ()))
    assert "a JPEG copy" in text.splitlines()[0] and "not shown to be" in text.splitlines()[0]


@pytest.mark.parametrize(
    "other",
    [
        {"recipe": RECIPES["he2015-smoke"], "every": 8},
        {"data_sha256": "1" * 64},
        {"data_original": None},
    ],
)
def test_what_differs_is_never_averaged(
    make_run: MakeRun, tmp_path: Path, other: dict[str, Any]
) -> None:
    make_run(seed=0, test=0.1)
    make_run(seed=1, test=0.2, **other)
    runs, _ = find_runs(tmp_path)
    summaries = summaries_of(runs, ("resnet20",), (0, 1))
    assert [summary.rows[0].test.n for summary in summaries if summary.rows[0].test] == [1, 1]
    assert len({headline(summary) for summary in summaries}) >= 1
    report(tmp_path)
    assert len(list((tmp_path / "out").glob("*.svg"))) == 2


def test_one_run_in_two_places_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run()
    shutil.copytree(path, tmp_path / "runs" / "copy")
    runs, _ = find_runs(tmp_path / "runs")
    with pytest.raises(UserError, match="hold the same run"):
        summaries_of(runs, (), ())


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("config.json", "{", "damaged"),
        ("config.json", "[]", "not a JSON object"),
        ("config.json", '{"model": "resnet21"}', "model"),
        ("config.json", '{"model": ["resnet20"]}', "model"),
        ("result.json", '{"test_error_rate": 7}', "another run"),
        ("metrics.jsonl", "x\n", "line 1"),
        ("metrics.jsonl", '{"iteration": 1, "train/loss": "x"}\n', "train/loss"),
        ("metrics.jsonl", '{"iteration": 1, "train/loss": NaN}\n', "train/loss"),
        ("metrics.jsonl", "[" * 100000 + "\n", "line 1"),
        ("timing.jsonl", '{"iteration": -1.5, "images_per_second": 3}\n', "images_per_second"),
    ],
)
def test_a_damaged_run_is_named_and_left_out(
    make_run: MakeRun, tmp_path: Path, name: str, content: str, word: str
) -> None:
    (make_run("resnet20", 0) / name).write_text(content)
    make_run("resnet20", 1)
    assert report(tmp_path, "--models", "resnet20", "--seeds", "1") == ExitCode.INCOMPLETE
    text = (tmp_path / "out" / "table.md").read_text()
    assert "left out" in text and word in text and "seed0" in text
    assert "1 of 1" in text


def test_a_line_that_is_being_written_is_not_damage(make_run: MakeRun) -> None:
    path = make_run(test=None)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 600, "train/lo')
    assert read_run(path).curves["train/loss"].iterations[-1] == 500


def test_time_that_was_lost_to_a_kill_counts_once(make_run: MakeRun) -> None:
    path = make_run()
    lines = [{"iteration": i, "images_per_second": 128.0} for i in (100, 200)]
    again = [{"iteration": i, "images_per_second": 64.0} for i in (200, 300)]
    write_lines(path / "timing.jsonl", [*lines, *again])
    assert read_run(path).training_seconds == pytest.approx(100 + 200 + 200)


def test_markup_stays_text(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(hardware=MARKUP, data_source=MARKUP, data=MARKUP, grid="g", recipe_hash=MARKUP)
    runs, _ = find_runs(tmp_path)
    summaries = summaries_of(runs, (), ())
    markdown, latex = as_markdown(summaries), as_latex(summaries)
    assert "<script>" not in markdown and "\x1b" not in markdown + latex
    row = next(line for line in markdown.splitlines() if line.startswith("| resnet20"))
    assert row.replace(r"\|", "").count("|") == 13
    ET.fromstring(figure.as_svg(figure.draw(summaries[0])))


def test_the_figure_is_the_same_again(make_run: MakeRun, tmp_path: Path) -> None:
    for model in ("resnet20", "plain56"):
        for seed in (0, 1):
            make_run(model, seed)
    runs, _ = find_runs(tmp_path)
    summary = summarise(runs[0].group, runs, ("resnet20",), (0, 1))
    first, again = (figure.as_svg(figure.draw(summary)) for _ in range(2))
    assert first == again
    text = " ".join(ET.fromstring(first).itertext())
    assert figure.as_png(figure.draw(summary)).startswith(b"\x89PNG")
    plain, residual = figure.draw(summary).axes
    assert [line.get_linestyle() for line in residual.lines[-2:]] == ["--", "-"]
    assert residual.lines[-1].get_linewidth() > residual.lines[-2].get_linewidth()
    assert plain.get_ylim() == (0, 20) and text is not None


def test_nothing_to_report_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    assert report(tmp_path) == ExitCode.BAD_INPUT
    assert main(["report", str(tmp_path / "nowhere")]) == ExitCode.BAD_INPUT
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_25_full_runs_take_less_than_ten_seconds_and_no_torch(
    make_run: MakeRun, tmp_path: Path, start: Command, without_torch: dict[str, str]
) -> None:
    for model in ("resnet20", "resnet56", "resnet110", "plain20", "plain56"):
        for seed in range(5):
            make_run(model, seed, recipe=RECIPES["he2015"], every=50)
    began = time.monotonic()
    process = start(
        *("resnet-ddp", "report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")),
        **without_torch,
    )
    out, err = process.communicate()
    assert process.returncode == 0 and not err and "resnet110" in out
    assert time.monotonic() - began < 10
