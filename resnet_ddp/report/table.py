"""The table, for people and for papers: Markdown, CSV, JSON, LaTeX."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from resnet_ddp.published import HE_ET_AL, NABLA0001, Published
from resnet_ddp.records import LONGEST
from resnet_ddp.report.summary import Row, Sample, Summary
from resnet_ddp.runs import shown

HEADER = (
    *("network", "layers", "parameters", "runs", "test error, %", "95% interval", "He et al."),
    *("nabla0001", "training error, %", "time a run", "hardware", "missing seeds"),
)
NOTHING = "-"


def headline(summary: Summary) -> str:
    """Say which recipe and data these runs had; data that may be another's comes first."""
    group = summary.group
    what = f"Recipe {group.recipe}, grid {group.grid}, data {group.data} ({group.data_source})"
    if group.data_original:
        return f"{what}."
    return (
        f"{what}: not shown to be the original files of {group.data}; compare with runs on the "
        "same data only."
    )


def cells(row: Row) -> tuple[str, ...]:
    """Return a row of the table as text, in the order of HEADER."""
    seconds = row.seconds
    return (
        row.model,
        str(row.layers),
        NOTHING if row.parameters is None else f"{row.parameters:,}",
        f"{row.n} of {row.n + len(row.missing)}",
        _mean(row.test),
        _interval(row.test),
        _published(HE_ET_AL.get(row.model)),
        _published(NABLA0001.get(row.model)),
        _mean(row.train),
        NOTHING if seconds is None else str(timedelta(seconds=round(seconds.mean))),
        ", ".join(row.hardware) or NOTHING,
        ", ".join(map(str, row.missing)) or NOTHING,
    )


def _mean(sample: Sample | None) -> str:
    if sample is None:
        return NOTHING
    return f"{sample.mean:.2f}" + ("" if sample.std is None else f" +- {sample.std:.2f}")


def _interval(sample: Sample | None) -> str:
    if sample is None or sample.half_width is None:
        return NOTHING
    low, high = sample.mean - sample.half_width, sample.mean + sample.half_width
    return f"{low:.2f} to {high:.2f}"


def _published(value: Published | None) -> str:
    return NOTHING if value is None else str(value)


def rows_of(summary: Summary) -> list[tuple[str, ...]]:
    """Return all rows as text."""
    return [cells(row) for row in summary.rows]


def as_markdown(summaries: Sequence[Summary]) -> str:
    """Return a section for each group."""
    parts = []
    for summary in summaries:
        rows = [HEADER, tuple("---" for _ in HEADER), *rows_of(summary)]
        lines = ["| " + " | ".join(map(_for_markdown, row)) + " |" for row in rows]
        statements = [f"- {_for_markdown(str(one))}" for one in summary.comparisons]
        parts.append("\n".join([_for_markdown(headline(summary)), "", *lines, "", *statements]))
    return "\n\n".join(parts) + "\n"


def _for_markdown(text: str) -> str:
    text = shown(text, limit=LONGEST)
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", text) if text.strip("-") else text


def as_csv(summaries: Sequence[Summary]) -> str:
    """Return a line for each model of each group; errors in percent, times in seconds."""
    names = ("grid", "recipe", "data", "data_original", "model", "layers", "parameters", "n")
    numbers = ("mean", "std", "half_width", "lowest", "highest")
    columns = [f"{kind}_{name}" for kind in ("test", "train", "val") for name in numbers]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *columns, "training_seconds", "hardware", "missing_seeds"])
    for summary in summaries:
        group = summary.group
        for row in summary.rows:
            samples = (row.test, row.train, row.val)
            values = [
                "" if sample is None or getattr(sample, name) is None else getattr(sample, name)
                for sample in samples
                for name in numbers
            ]
            writer.writerow(
                [
                    *(group.grid, group.recipe, group.data, group.data_original),
                    *(row.model, row.layers, row.parameters, row.n),
                    *values,
                    "" if row.seconds is None else row.seconds.mean,
                    "; ".join(row.hardware),
                    " ".join(map(str, row.missing)),
                ]
            )
    return text.getvalue()


def as_object(summary: Summary) -> dict[str, Any]:
    """Return a group for JSON; errors in percent, times in seconds."""
    return {
        **dataclasses.asdict(summary.group),
        "seeds": list(summary.seeds),
        "is_complete": summary.is_complete,
        "models": [dataclasses.asdict(row) for row in summary.rows],
        "comparisons": [
            {**dataclasses.asdict(one), "statement": str(one)} for one in summary.comparisons
        ],
    }


def as_latex(summaries: Sequence[Summary]) -> str:
    """Return a tabular for each group, for a document that loads booktabs."""
    parts = []
    for summary in summaries:
        lines = [
            f"% {_for_latex(headline(summary))}",
            r"\begin{tabular}{lrrrrrr}",
            r"\toprule",
            r"network & layers & parameters & runs & test error (\%) & He et al. & nabla0001 \\",
            r"\midrule",
        ]
        for row in rows_of(summary):
            lines.append(" & ".join(map(_for_latex, (*row[:5], *row[6:8]))) + r" \\")
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join(parts) + "\n"


def _for_latex(text: str) -> str:
    text = shown(text, limit=LONGEST)
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    text = "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
    return text.replace("+-", r"$\pm$")
