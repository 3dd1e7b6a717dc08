"""Weights & Biases: one run there for each cell here, whatever number of lives it had."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnet_ddp.exits import UserError
from resnet_ddp.runs import read_object
from resnet_ddp.tracking import card
from resnet_ddp.tracking.plan import Plan, artifact_name, find_key, run_id

INIT_TIMEOUT, FINISH_TIMEOUT = 60.0, 600.0  # seconds
CONFIRMATIONS, PAUSE = 5, 2.0  # questions, and seconds between: the server counts a little later
# What W&B's own client asks when it goes on with a run.
LINE_COUNT = """
query RowsThere($project: String, $entity: String, $name: String!) {
  model(name: $project, entityName: $entity) {
    bucket(name: $name, missingOk: true) { historyLineCount }
  }
}
"""
WHOLE = "resnet-ddp.json"  # in a fragment of an offline run that is whole: the rows up to its end


class MissingError(Exception):
    """The server has not all rows."""


class WandbTracker:
    """An open W&B run.

    Online, the server says which row it wants next. Offline, every life writes a fragment, which
    begins where the last whole one ended; one that was not ended is written again.

    Args:
        directory: the run's.

    Raises:
        UserError: config.json is missing or damaged.
        Exception: what W&B raises when it cannot begin.
    """

    def __init__(self, directory: Path, plan: Plan) -> None:
        import wandb

        config = read_object(directory / "config.json")
        if config is None:
            raise UserError(f"{directory} has no config.json")
        self._directory, self._plan, self._config = directory, plan, config
        self._files = Path(os.environ.get("WANDB_DIR", directory))
        self._files.mkdir(parents=True, exist_ok=True)
        identifier = run_id(config)
        written = self._drop_fragments(identifier) if plan.offline else 0
        self._run = wandb.init(
            project=plan.project,
            entity=plan.entity,
            id=identifier,
            resume="allow",
            name=f"{config['model']}-s{config['seed']}",
            group=f"{config['grid']}/{config['model']}",
            job_type="train",
            tags=list(plan.tags) or None,
            notes=plan.notes,
            config=config,
            dir=str(self._files),
            mode="offline" if plan.offline else "online",
            settings=settings(live=plan.live),
        )
        self._run.define_metric("iteration", hidden=True)
        self._run.define_metric("*", step_metric="iteration")
        self.next_row = written if plan.offline else int(self._run.step)

    @property
    def where(self) -> str:
        """Where a person finds it."""
        return str(self._run.dir) if self._plan.offline else str(self._run.url)

    def log(self, row: int, values: dict[str, Any]) -> None:
        """Copy a row; W&B drops one that it has."""
        self._run.log(values, step=row, commit=True)
        self.next_row = row + 1

    def finish(self, summary: dict[str, Any] | None) -> None:
        """Hand over all that is left; blocks until that is done.

        Args:
            summary: of a run that is done.
        """
        if summary is not None:
            self._run.summary.update(summary)
            if self._plan.weights:
                self._log_weights()
        else:
            self._run.mark_preempting()  # saved, and to be gone on with
        import wandb

        self._run.finish(exit_code=0 if summary is not None else 1)
        wandb.teardown()  # its own process has written all
        key = find_key(os.environ)
        if self._plan.offline:
            fragment = Path(self._run.dir).parent
            (fragment / WHOLE).write_text(json.dumps({"rows": self.next_row}))
        elif key:
            self._confirm(key)

    def _confirm(self, key: str) -> None:
        """Ask the server what it has: W&B's client drops what a server refuses, and says nothing.

        Raises:
            MissingError: it has not all rows.
        """
        run = self._run
        variables = {"project": run.project, "entity": run.entity, "name": run.id}
        for last in (False,) * (CONFIRMATIONS - 1) + (True,):
            there = _ask(str(run.settings.base_url), key, LINE_COUNT, variables)
            count = there["data"]["model"]["bucket"]["historyLineCount"]
            if count >= self.next_row:
                return
            if last:
                raise MissingError(f"the server has {count} of {self.next_row} rows")
            time.sleep(PAUSE)

    def _log_weights(self) -> None:
        import wandb

        config = self._config
        name = artifact_name(config["grid"], config["model"], f"s{config['seed']}")
        result = read_object(self._directory / "result.json") or {}
        artifact = wandb.Artifact(name, type="model", metadata=result)
        artifact.add_file(str(self._directory / "model.safetensors"))
        with artifact.new_file("README.md", mode="w", encoding="utf-8") as file:
            file.write(card.model_card(config, result))
        self._run.log_artifact(artifact)

    def _drop_fragments(self, identifier: str) -> int:
        """Remove what earlier lives did not end, and return how many rows the others have."""
        rows = 0
        for fragment in (self._files / "wandb").glob(f"offline-run-*-{identifier}"):
            whole = read_object(fragment / WHOLE)
            if whole is None:
                shutil.rmtree(fragment)
            else:
                rows = max(rows, int(whole["rows"]))
        return rows


def log_report(
    identity: Sequence[str],
    plan: Plan,
    *,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    picture: Path,
    directory: Path,
) -> str:
    """Log a grid's table and its Fig. 6 to the W&B run of its reports, and return where that is.

    Args:
        identity: the grid's name first, then all that tells it from others.
        header, rows: of the table.
        picture: a PNG file.
        directory: takes W&B's files.

    Raises:
        Exception: what W&B raises when it cannot begin, or not finish in time.
    """
    import wandb

    digest = hashlib.sha256(json.dumps(list(identity)).encode()).hexdigest()[:12]
    try:
        run = wandb.init(
            project=plan.project,
            entity=plan.entity,
            id=f"report-{digest}",
            resume="allow",
            name=f"{identity[0]}-report",
            group=identity[0],
            job_type="report",
            tags=list(plan.tags) or None,
            notes=plan.notes,
            dir=str(os.environ.get("WANDB_DIR", directory)),
            mode="offline" if plan.offline else "online",
            settings=settings(live=False),
        )
        table = wandb.Table(columns=list(header), data=[list(row) for row in rows])
        run.log({"table": table, "fig6": wandb.Image(str(picture))})
        where = str(run.dir) if plan.offline else str(run.url)
        run.finish()
    finally:
        wandb.teardown()
    return where


def _ask(url: str, key: str, query: str, variables: dict[str, Any]) -> Any:
    """Ask W&B's API, whose user is called "api"."""
    token = base64.b64encode(f"api:{key}".encode()).decode()
    request = urllib.request.Request(
        f"{url.rstrip('/')}/graphql",
        data=json.dumps({"query": query, "variables": variables}).encode(),
        headers={"Authorization": f"Basic {token}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=INIT_TIMEOUT) as answer:
        return json.load(answer)


def settings(*, live: bool) -> Any:
    """Return how W&B is to behave: quietly, and beside a run that must not notice it."""
    import wandb

    return wandb.Settings(
        console="off",  # the run's output is in its log
        silent=True,
        save_code=False,
        init_timeout=INIT_TIMEOUT,
        finish_timeout=FINISH_TIMEOUT,
        finish_timeout_raises=True,
        x_save_requirements=False,  # config.json names the versions that matter
        x_disable_stats=not live,
        x_stats_pid=os.getppid(),  # the training process
    )
