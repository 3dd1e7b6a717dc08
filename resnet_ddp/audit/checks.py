"""What an audit says: checks with expected and actual values, and deviations that are on purpose.

It is read on a terminal, by a person who decides whether to believe a number, and by programs.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from resnet_ddp.exits import ExitCode

WIDTH = 100  # columns
ID_WIDTH = 24


@dataclass(frozen=True)
class Check:
    """One assertion and how it came out.

    Attributes:
        id: a short name that stays.
        claim: what is asserted.
        source: who says so: a section of the paper, a reference.
        expected, actual: for a person to compare.
    """

    id: str
    claim: str
    source: str
    expected: str
    actual: str
    passed: bool


@dataclass(frozen=True)
class Deviation:
    """What is different from the paper, knowingly, and what that changes."""

    what: str
    paper: str
    effect: str


@dataclass(frozen=True)
class Finding:
    """Expected and actual value, before the check has a name."""

    expected: str
    actual: str
    passed: bool


def equal(expected: object, actual: object) -> Finding:
    """Find whether two values are the same."""
    return Finding(show(expected), show(actual), expected == actual)


def within(expected: float, actual: float, tolerance: float) -> Finding:
    """Find whether a number lies at most `tolerance` from another; one that is NaN does not."""
    passed = math.isfinite(actual) and abs(actual - expected) <= tolerance
    return Finding(f"{expected:g} +- {tolerance:g}", f"{actual:.6g}", passed)


def none_of(offenders: Sequence[object]) -> Finding:
    """Find whether there is no offender; the first few are shown."""
    more = f" and {len(offenders) - 3:,} more" if len(offenders) > 3 else ""
    actual = ", ".join(map(show, offenders[:3])) + more if offenders else "none"
    return Finding("none", actual, not offenders)


def show(value: object) -> str:
    """Return a value as a person writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(show, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {show(item)}" for key, item in value.items())
    return str(value)


def runs_of(values: Sequence[float]) -> list[tuple[float, int]]:
    """Return equal neighbours as (value, how many)."""
    runs: list[tuple[float, int]] = []
    for value in values:
        if runs and math.isclose(runs[-1][0], value, rel_tol=1e-9):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    return runs


def same_series(expected: Sequence[float], actual: Sequence[float]) -> Finding:
    """Find whether two long series agree at every place; they are shown as runs of equal values."""
    passed = len(expected) == len(actual) and all(
        math.isclose(left, right, rel_tol=1e-9)
        for left, right in zip(expected, actual, strict=True)
    )
    return Finding(_show_runs(expected), _show_runs(actual), passed)


def _show_runs(values: Sequence[float]) -> str:
    runs = runs_of(values)
    shown = [f"{value:g} ({count:,} times)" for value, count in runs[:6]]
    return ", ".join(shown) + (f" and {len(runs) - 6:,} more changes" if len(runs) > 6 else "")


def verdict(checks: Sequence[Check]) -> ExitCode:
    """Return DONE if everything passed, else FAILED."""
    return ExitCode.DONE if all(check.passed for check in checks) else ExitCode.FAILED


def render(checks: Sequence[Check], deviations: Sequence[Deviation] = ()) -> str:
    """Return checks, deviations and the verdict as plain text."""
    lines = []
    for check in checks:
        word = "PASS" if check.passed else "FAIL"
        lines += _hanging(f"{word}  {check.id:<{ID_WIDTH}}", f"{check.claim} [{check.source}]")
        if check.passed and check.expected == check.actual:
            lines += _hanging("", f"expected and found: {check.actual}")
        else:
            lines += _hanging("", f"expected: {check.expected}")
            lines += _hanging("", f"found:    {check.actual}")
    if deviations:
        lines += ["", "Deviations from the paper, and what each changes:"]
        for deviation in deviations:
            text = f"{deviation.what}. Paper: {deviation.paper}. Effect: {deviation.effect}."
            lines += textwrap.wrap(
                text, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False
            )
    failed = [check.id for check in checks if not check.passed]
    lines.append("")
    if failed:
        lines += _hanging(
            "", f"FAIL: {len(failed)} of {len(checks)}: {', '.join(failed)}", indent=0
        )
    else:
        lines.append(f"PASS: all {len(checks)}")
    return "\n".join(lines)


def _hanging(head: str, text: str, *, indent: int = ID_WIDTH + 7) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{head:<{indent}}",
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )


def as_json(checks: Sequence[Check], deviations: Sequence[Deviation] = ()) -> str:
    """Return the same as a JSON object: verdict, checks, deviations."""
    return json.dumps(
        {
            "verdict": "PASS" if verdict(checks) is ExitCode.DONE else "FAIL",
            "checks": [asdict(check) for check in checks],
            "deviations": [asdict(deviation) for deviation in deviations],
        },
        indent=2,
    )
