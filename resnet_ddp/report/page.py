"""report.html: all of a report in one file that needs no network.

Tables, states and records are plain HTML, escaped here; the curves travel as JSON and are drawn by
page.js, which writes text nodes only. What lies in a run directory is never markup.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from resnet_ddp.architectures import ARCHITECTURES
from resnet_ddp.audit.checks import Check
from resnet_ddp.audit.trained import audit_run
from resnet_ddp.exits import UserError
from resnet_ddp.grid.states import RunState, State, read_state
from resnet_ddp.lease import Observer
from resnet_ddp.recipe import RECIPES
from resnet_ddp.records import Curve, RunRecord, Skipped
from resnet_ddp.report.figure import top_of
from resnet_ddp.report.summary import Summary
from resnet_ddp.report.table import HEADER, headline, rows_of
from resnet_ddp.runs import shown

HERE = Path(__file__).parent
MOST_POINTS = 700  # of a curve; longer ones are thinned, their ends kept
RECORDS = ("config.json", "metrics.jsonl", "timing.jsonl", "status.json", "result.json", "log.txt")
# What metrics.jsonl calls them, and the page; errors in percent there.
CURVES = {"loss": ("train/loss", 1), "lr": ("lr", 1), "train": ("train/error_rate", 100),
          "val": ("val/error_rate", 100)}  # fmt: skip
CHARTS = {
    "loss": "training loss",
    "lr": "learning rate",
    "train val": "errors, % (dashed: training; bold: validation)",
    "speed": "images/s",
}
ENVIRONMENT = ("hardware", "device", "precision", "compile", "kernels", "threads", "world_size",
               "os", "git_commit")  # fmt: skip


def page(summaries: Sequence[Summary], skipped: Sequence[Skipped], out: Path) -> bytes:
    """Return the file.

    Args:
        out: the directory that it will lie in; links are relative to it.
    """
    sections = [_section(index, summary, out) for index, summary in enumerate(summaries)]
    if skipped:
        items = (f"<li>{_text(one.path)}: {_text(one.reason)}</li>" for one in skipped)
        sections.append(f"<section><h2>Left out</h2><ul>{''.join(items)}</ul></section>")
    data = {"groups": [_group_data(summary) for summary in summaries]}
    parts = {
        "title": "ResNets on CIFAR-10: what was trained",
        "css": (HERE / "page.css").read_text(),
        "js": (HERE / "page.js").read_text(),
        "nav": "".join(
            f'<a href="#group-{index}">{_text(summary.group.grid)}</a>'
            for index, summary in enumerate(summaries)
        ),
        "body": "\n".join(sections),
        # "<" could end the script element that holds it.
        "data": json.dumps(data).replace("<", "\\u003c"),
    }
    template = (HERE / "page.html").read_text()
    pieces = template.split("@")  # text and names in turn
    return "".join(
        parts[piece] if index % 2 else piece for index, piece in enumerate(pieces)
    ).encode()


def _text(value: object) -> str:
    """Return a value as text that is no markup."""
    return html.escape(shown(value, limit=1000))


def _section(index: int, summary: Summary, out: Path) -> str:
    original = "" if summary.group.data_original else ' class="warning"'
    statements = "".join(f"<li>{_text(str(one))}</li>" for one in summary.comparisons)
    states = {run.path: _state(run) for run in summary.runs}
    models = list(dict.fromkeys(run.model for run in summary.runs))
    boxes = {
        "model": [(model, _swatch(model)) for model in models],
        "seed": [(str(seed), "") for seed in sorted({run.seed for run in summary.runs})],
    }
    choices = "".join(_choices(name, values) for name, values in boxes.items())
    panels = "".join(
        f'<figure class="fig6" data-panel="{panel}"><figcaption>{panel} nets</figcaption>'
        '<div class="readout" aria-live="polite"></div></figure>'
        for panel in ("plain", "residual")
    )
    runs = "".join(_run(_id(index, run), run, states[run.path], out) for run in summary.runs)
    return f"""<section id="group-{index}">
<h2>{_text(summary.group.grid)}</h2>
<p{original}>{_text(headline(summary))}</p>
<div class="wide">{_table(summary)}</div>
<ul>{statements}</ul>
<h3>Fig. 6: error over iterations</h3>
<p class="note">Dashed: training error, un-augmented. Bold: validation error. The line is the mean
over the seeds, the band one standard deviation; dotted: the learning rate drops. Point at the
curves, or focus them and use the arrow keys.</p>
{choices}
<div class="charts">{panels}</div>
<h3>Every run</h3>
<div class="wide">{_states(index, summary, states)}</div>
{runs}
</section>"""


def _table(summary: Summary) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in HEADER)
    rows = []
    for row in rows_of(summary):
        name, *values = (value.replace("+-", "±") for value in row)
        cells = [
            f"<td{' class=main' if HEADER[place] == 'test error, %' else ''}>{_text(value)}</td>"
            for place, value in enumerate(values, 1)
        ]
        rows.append(f'<tr><th scope="row">{_text(name)}</th>{"".join(cells)}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _swatch(model: str) -> str:
    depth = ARCHITECTURES[model].depth
    return f'<span class="swatch" style="background: var(--c{depth}, var(--ink))"></span>'


def _choices(name: str, values: Sequence[tuple[str, str]]) -> str:
    boxes = "".join(
        f'<label><input type="checkbox" name="{name}" value="{_text(value)}" checked> '
        f"{swatch}{_text(value)}</label>"
        for value, swatch in values
    )
    return f"<fieldset><legend>{name}s</legend>{boxes}</fieldset>"


def _state(run: RunRecord) -> RunState:
    recipe = RECIPES.get(run.group.recipe)
    if recipe is None or recipe.hash != run.group.recipe_hash:
        rate = run.final("test")
        return RunState(State.WAITING if rate is None else State.DONE, test_error_rate=rate)
    return read_state(run.path, recipe, Observer())


def _states(index: int, summary: Summary, states: Mapping[Path, RunState]) -> str:
    """Return models by seeds: how each run stands, with a link to it."""
    runs = {(run.model, run.seed): run for run in summary.runs}
    head = "".join(f'<th scope="col">seed {seed}</th>' for seed in summary.seeds)
    rows = []
    for row in summary.rows:
        cells = []
        for seed in summary.seeds:
            run = runs.get((row.model, seed))
            if run is None:
                cells.append('<td class="missing">missing</td>')
                continue
            state = states[run.path]
            rate = state.test_error_rate
            words = str(state.state) if rate is None else f"{100 * rate:.2f}"
            link = f'<a href="#{_id(index, run)}">{_text(words)}</a>'
            cells.append(f'<td class="{state.state}">{link}</td>')
        rows.append(f'<tr><th scope="row">{_text(row.model)}</th>{"".join(cells)}</tr>')
    return (
        f"<table><thead><tr><th>test error, %</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _id(index: int, run: RunRecord) -> str:
    return f"run-{index}-{run.model}-{run.seed}"


def _run(identity: str, run: RunRecord, state: RunState, out: Path) -> str:
    """Return a run's page: what it was, its curves, the audit, links to its records."""
    facts = {
        "state": f"{state.state}{f', {state.reason}' if state.reason else ''}",
        **{
            f"{name} error": f"{100 * rate:.2f}%"
            for name in ("test", "val", "train")
            if (rate := run.final(name)) is not None
        },
        **{name: run.config[name] for name in ENVIRONMENT if name in run.config},
    }
    versions = run.config.get("versions")
    if isinstance(versions, dict):
        facts["versions"] = ", ".join(f"{name} {value}" for name, value in versions.items())
    items = "".join(
        f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items()
    )
    links = " ".join(
        f'<a href="{html.escape(quote(os.path.relpath(run.path / name, out)))}">{name}</a>'
        for name in RECORDS
        if (run.path / name).exists()
    )
    charts = "".join(
        f'<figure data-curves="{names}"><figcaption>{caption}</figcaption>'
        '<div class="readout" aria-live="polite"></div></figure>'
        for names, caption in CHARTS.items()
    )
    return (
        f'<details class="run" id="{identity}"><summary>{_text(run.model)} seed {run.seed}: '
        f"{_text(state.state)}</summary><dl>{items}<dt>records</dt><dd>{links}</dd></dl>"
        f'{_audit(run)}<div class="charts">{charts}</div></details>'
    )


def _audit(run: RunRecord) -> str:
    """Return what `resnet-ddp audit` says of the run."""
    try:
        checks = audit_run(str(run.path))
    except UserError as error:
        return f'<p class="warning">audit: {_text(error)}</p>'
    failed = [check for check in checks if not check.passed]
    if not failed:
        return f'<p class="done">audit: all {len(checks)} assertions hold</p>'
    items = "".join(f"<li>{_finding(check)}</li>" for check in failed)
    return (
        f'<p class="failed">audit: {len(failed)} of {len(checks)} assertions do not hold</p>'
        f"<ul>{items}</ul>"
    )


def _finding(check: Check) -> str:
    return f"{_text(check.claim)}: {_text(check.actual)}, expected {_text(check.expected)}"


def _group_data(summary: Summary) -> dict[str, Any]:
    fields = summary.runs[0].config["recipe_fields"]
    drops = fields.get("drops")
    return {
        "top": top_of(summary.runs),
        "iterations": max(run.iterations for run in summary.runs),
        "drops": [drop for drop in drops if isinstance(drop, int)] if drops else [],
        "runs": [
            {
                "model": run.model,
                "seed": run.seed,
                "depth": ARCHITECTURES[run.model].depth,
                "panel": "plain" if ARCHITECTURES[run.model].shortcut is None else "residual",
                "curves": {
                    **{
                        name: _points(run.curves[key], scale)
                        for name, (key, scale) in CURVES.items()
                        if key in run.curves
                    },
                    "speed": _points(run.speed, 1),
                },
            }
            for run in summary.runs
        ],
    }


def _points(curve: Curve, scale: float) -> dict[str, list[float]]:
    step = -(-len(curve.iterations) // MOST_POINTS) or 1
    places = [*range(0, len(curve.iterations), step)]
    if places and places[-1] != len(curve.iterations) - 1:
        places.append(len(curve.iterations) - 1)
    return {
        "x": [curve.iterations[place] for place in places],
        "y": [float(f"{scale * curve.values[place]:.5g}") for place in places],
    }
