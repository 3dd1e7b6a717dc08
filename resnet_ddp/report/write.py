"""`resnet-ddp report RUNS`: write down what is there, complete or not."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

from resnet_ddp import durable
from resnet_ddp.exits import ExitCode, TemporaryError, UserError
from resnet_ddp.records import LONGEST, Group, RunRecord, Skipped, find_runs
from resnet_ddp.report import figure, table
from resnet_ddp.report.page import page
from resnet_ddp.report.summary import Summary, summarise
from resnet_ddp.runs import shown
from resnet_ddp.tracking.plan import Plan
from resnet_ddp.tracking.weights_and_biases import log_report


def write(runs: Path, out: Path, *, models: Sequence[str], seeds: Sequence[int]) -> ExitCode:
    """Write report.html, table.md, .csv, .json, .tex and, a group each, fig6-*.svg and .png.

    Args:
        models, seeds: the cells that each group should have.

    Returns:
        DONE, or INCOMPLETE if cells are missing or directories were skipped.

    Raises:
        UserError: there is nothing to report.
    """
    found, skipped = find_runs(runs)
    if not found and not skipped:
        raise UserError(f"no run lies in {runs}; train one first, or name another directory")
    summaries = summaries_of(found, models, seeds)
    out.mkdir(parents=True, exist_ok=True)
    report = {
        "groups": [table.as_object(summary) for summary in summaries],
        "skipped": [{"path": str(one.path), "reason": one.reason} for one in skipped],
    }
    files = {
        "table.md": (table.as_markdown(summaries) + _skipped_lines(skipped)).encode(),
        "table.csv": table.as_csv(summaries).encode(),
        "table.tex": table.as_latex(summaries).encode(),
        "table.json": (json.dumps(report, indent=2) + "\n").encode(),
        "report.html": page(summaries, skipped, out),
    }
    for name, summary in zip(names(summaries), summaries, strict=True):
        picture = figure.draw(summary)
        files[f"{name}.svg"], files[f"{name}.png"] = figure.as_svg(picture), figure.as_png(picture)
    for name, content in files.items():
        durable.write_bytes(out / name, content)
    is_complete = all(summary.is_complete for summary in summaries) and not skipped
    return ExitCode.DONE if is_complete else ExitCode.INCOMPLETE


def track(
    runs: Path, out: Path, plan: Plan, *, models: Sequence[str], seeds: Sequence[int]
) -> None:
    """Log the table and the figure of each group, as they were written, to Weights & Biases.

    Raises:
        TemporaryError: it cannot be reached, or does not take them.
    """
    summaries = summaries_of(find_runs(runs)[0], models, seeds)
    for name, summary in zip(names(summaries), summaries, strict=True):
        try:
            where = log_report(
                list(map(str, dataclasses.astuple(summary.group))),
                plan,
                header=table.HEADER,
                rows=table.rows_of(summary),
                picture=out / f"{name}.png",
                directory=out,
            )
        except Exception as error:  # W&B's own, and those of all that it stands on
            raise TemporaryError(
                f"wandb: {type(error).__name__}: {shown(error, limit=LONGEST)}; "
                f"the report is in {out}, and the same command tries again"
            ) from error
        print(f"wandb: {where}")


def summaries_of(
    runs: Sequence[RunRecord], models: Sequence[str], seeds: Sequence[int]
) -> list[Summary]:
    """Return a summary for each group, by name.

    Raises:
        UserError: two directories hold the same run.
    """
    groups: dict[Group, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    for members in groups.values():
        seen: dict[tuple[str, int], RunRecord] = {}
        for run in members:
            other = seen.setdefault((run.model, run.seed), run)
            if other is not run:
                raise UserError(
                    f"{other.path} and {run.path} hold the same run; name a directory with one"
                )
    order = sorted(groups, key=lambda group: (group.grid, group.recipe, group.data_sha256))
    return [summarise(group, groups[group], models, seeds) for group in order]


def names(summaries: Sequence[Summary]) -> list[str]:
    """Return what the groups' figures are called: after their grids, numbered where these meet."""
    found: list[str] = []
    for summary in summaries:
        # The grid's name is read from a file, and becomes one here.
        base = "fig6-" + re.sub(r"[^\w.+-]", "-", summary.group.grid)[:100]
        numbered = (f"{base}-{number}" for number in itertools.count(2))
        candidates = itertools.chain([base], numbered)
        found.append(next(name for name in candidates if name not in found))
    return found


def _skipped_lines(skipped: Sequence[Skipped]) -> str:
    return "".join(f"\n- left out: {one.path}: {one.reason}\n" for one in skipped)
