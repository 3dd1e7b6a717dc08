"""Fig. 6 of He et al. 2015: training error dashed, validation error bold, over iterations.

A panel for the plain nets and one for the residual nets; the line is the mean over seeds, the band
one standard deviation. Colours are Okabe and Ito's, which colour-blind readers can tell apart, and
every line has its depth written beside it.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from resnet_ddp.architectures import ARCHITECTURES
from resnet_ddp.records import RunRecord
from resnet_ddp.report.summary import Summary
from resnet_ddp.runs import shown

TRAIN, VAL = "train/error_rate", "val/error_rate"
COLOURS = {20: "#0072B2", 32: "#009E73", 44: "#CC79A7", 56: "#D55E00", 110: "#000000"}
OTHER_COLOUR = "#56B4E9"
PAPER_TOP = 20.0  # percent; the paper's axis
DPI = 200


def draw(summary: Summary) -> Figure:
    """Draw the curves of a group."""
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    top = top_of(summary.runs)
    for axes, title, is_residual in zip(panels, ("plain", "residual"), (False, True), strict=True):
        axes.set_title(title, fontsize=11)
        _axes(axes, summary, top)
        for model in dict.fromkeys(run.model for run in summary.runs):
            if (ARCHITECTURES[model].shortcut is not None) == is_residual:
                _curves(axes, model, [run for run in summary.runs if run.model == model])
    panels[0].set_ylabel("error (%)")
    has_val = any(VAL in run.curves for run in summary.runs)
    legend = "dashed: training error, un-augmented" + (
        "; bold: validation error" if has_val else "; this recipe holds out no validation images"
    )
    group = summary.group
    original = "" if group.data_original else f" ({group.data_source})"
    figure.supxlabel(
        legend + "\n" + shown(f"{group.grid}, {group.recipe}, {group.data}{original}"),
        fontsize=8,
        parse_math=False,
    )
    return figure


def _axes(axes: Axes, summary: Summary, top: float) -> None:
    unit = _unit(summary.runs)
    axes.set_xlim(0, summary.runs[0].iterations / unit)
    axes.set_ylim(0, top)
    axes.set_xlabel(f"iterations (1e{round(math.log10(unit))})" if unit > 1 else "iterations")
    axes.set_yticks([0, 5, 10, 20] if top == PAPER_TOP else range(0, round(top) + 1, 10))
    axes.grid(axis="y", linewidth=0.4, color="0.85")
    fields = summary.runs[0].config["recipe_fields"]
    for drop in fields.get("drops", []):
        axes.axvline(drop / unit, linewidth=0.6, linestyle=":", color="0.5")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _unit(runs: Sequence[RunRecord]) -> int:
    """Return the power of ten that iterations are counted in; all runs have one recipe."""
    digits = math.floor(math.log10(runs[0].iterations))
    return int(10**digits)


def top_of(runs: Sequence[RunRecord]) -> float:
    """Return the paper's 20%, or a round number that the ends of all curves fit below."""
    ends = [
        100 * run.curves[name].values[-1]
        for run in runs
        for name in (TRAIN, VAL)
        if name in run.curves and run.curves[name].values
    ]
    highest = max(ends, default=0.0)
    return PAPER_TOP if highest < 0.9 * PAPER_TOP else min(100.0, 10 * math.ceil(0.13 * highest))


def _curves(axes: Axes, model: str, runs: Sequence[RunRecord]) -> None:
    depth = ARCHITECTURES[model].depth
    colour = COLOURS.get(depth, OTHER_COLOUR)
    unit = _unit(runs)
    for name, style, width in ((TRAIN, "--", 1.0), (VAL, "-", 2.0)):
        points: dict[int, list[float]] = {}
        for run in runs:
            if name in run.curves:
                found = run.curves[name]
                for iteration, value in zip(found.iterations, found.values, strict=True):
                    points.setdefault(iteration, []).append(100 * value)
        if not points:
            continue
        places = sorted(points)
        x = [place / unit for place in places]
        mean = [statistics.fmean(points[place]) for place in places]
        spread = [
            statistics.stdev(points[place]) if len(points[place]) > 1 else 0.0 for place in places
        ]
        label = f"{model}, {len(runs)} run{'s' * (len(runs) > 1)}" if name == VAL else None
        axes.plot(x, mean, style, color=colour, linewidth=width, label=label)
        low = [m - s for m, s in zip(mean, spread, strict=True)]
        high = [m + s for m, s in zip(mean, spread, strict=True)]
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        if name == VAL:
            axes.annotate(
                f"{depth}-layer",
                (x[-1], mean[-1]),
                xytext=(3, 0),
                textcoords="offset points",
                fontsize=8,
                color=colour,
                va="center",
                annotation_clip=False,
            )
    axes.legend(fontsize=7, loc="upper right", frameon=False)


def as_svg(figure: Figure) -> bytes:
    """Return the picture as SVG, the same bytes for the same curves."""
    text = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "resnet_ddp"}):
        FigureCanvasSVG(figure)
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def as_png(figure: Figure) -> bytes:
    """Return the picture as PNG."""
    content = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(content, format="png", dpi=DPI)
    return content.getvalue()
