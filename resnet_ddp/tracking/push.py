"""`resnet-ddp track push`: copy what a tracker misses of runs, however they were trained."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from resnet_ddp.exits import ExitCode, UserError
from resnet_ddp.records import find_runs
from resnet_ddp.tracking.mirror import Mirror
from resnet_ddp.tracking.plan import Plan

LIMIT = 600.0  # seconds for a run; its weights may be part of it


def push(directory: Path, plans: Sequence[Plan], *, limit: float = LIMIT) -> ExitCode:
    """Copy what is missing of all runs in and below a directory.

    A run's rows are copied up to its newest checkpoint, a finished one's all. A run whose own
    process tracks it at the moment is left to that.

    Returns:
        DONE, or TEMPORARY if a tracker does not have it all: the same command goes on.

    Raises:
        UserError: there is nothing to copy, or nowhere to copy it to.
    """
    if not plans:
        raise UserError(
            "nowhere to copy to: run wandb login (and have WANDB_MODE say nothing else), or name "
            "--track tensorboard"
        )
    runs, skipped = find_runs(directory)
    for one in skipped:
        print(f"{one.path}: left out, {one.reason}", file=sys.stderr)
    if not runs:
        raise UserError(f"{directory} holds no runs; name the directory that --runs was")
    missing = 0
    for run in runs:
        for plan in plans:
            later = dataclasses.replace(plan, live=False)
            missing += not Mirror(run.path, later, partial(_say, run.path)).finish(limit)
    total = len(runs) * len(plans)
    print(f"{total - missing} of {total} copied")
    return ExitCode.TEMPORARY if missing else ExitCode.DONE


def _say(path: Path, line: str) -> None:
    print(f"{path}: {line}", flush=True)
