"""What a run is to be tracked with, and under which name it is known there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import netrc
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from resnet_ddp.exits import UserError
from resnet_ddp.options import TrackOptions, nearest
from resnet_ddp.runs import IDENTITY

WANDB, TENSORBOARD, NONE = "wandb", "tensorboard", "none"
NAMES = (WANDB, TENSORBOARD, NONE)
PROJECT = "resnet-ddp"
OFFLINE_MODES = ("offline", "dryrun")
API = "https://api.wandb.ai"


@dataclass(frozen=True)
class Plan:
    """What a tracking process is told.

    Attributes:
        tracker: which one it is.
        offline: W&B writes files only.
        weights: the final weights are to be copied, too.
        live: the run is being trained beside it, and the load of its machine is of interest.
    """

    tracker: str
    offline: bool
    project: str
    entity: str | None
    tags: tuple[str, ...]
    notes: str | None
    weights: bool
    live: bool = True

    def as_line(self) -> str:
        """Return it as a line for another process."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Plan:
        """Return what `as_line` wrote."""
        values = json.loads(line)
        return cls(**values | {"tags": tuple(values["tags"])})


def make_plans(options: TrackOptions, environment: Mapping[str, str]) -> tuple[Plan, ...]:
    """Return what to track with: what was asked for, else W&B where the user is known there.

    Raises:
        UserError: an unknown tracker, or one that is not installed.
    """
    logged_in = is_logged_in(environment)
    mode = environment.get("WANDB_MODE", "")
    if options.track is not None:
        names = read_trackers(options.track)
    else:
        names = (WANDB,) if mode in ("online", *OFFLINE_MODES) or (logged_in and not mode) else ()
    if mode == "disabled":
        names = tuple(name for name in names if name != WANDB)
    tags = options.wandb_tags or environment.get("WANDB_TAGS", "")
    return tuple(
        Plan(
            tracker=name,
            offline=name == WANDB and (mode in OFFLINE_MODES or not logged_in),
            project=options.wandb_project or environment.get("WANDB_PROJECT") or PROJECT,
            entity=options.wandb_entity or environment.get("WANDB_ENTITY") or None,
            tags=tuple(tag for tag in (part.strip() for part in tags.split(",")) if tag),
            notes=options.wandb_notes or environment.get("WANDB_NOTES") or None,
            weights=options.wandb_weights,
        )
        for name in names
    )


def read_trackers(text: str) -> tuple[str, ...]:
    """Return the names in a list such as "wandb,tensorboard", each once; none for "none".

    Raises:
        UserError: one is unknown, or not installed.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in NAMES:
            guess = nearest(name, NAMES) or f", choose from {', '.join(NAMES)}"
            raise UserError(f"--track: unknown tracker {name!a}{guess}")
        if name != NONE and find_spec(name) is None:
            raise UserError(f"--track {name}: it is not installed; pip install {name}")
    if NONE in names and len(names) > 1:
        raise UserError("--track: none goes with no other tracker")
    return tuple(name for name in names if name != NONE)


def is_logged_in(environment: Mapping[str, str]) -> bool:
    """Say whether W&B would find a key, or the token that some sites have in its place."""
    has_token = bool(environment.get("WANDB_IDENTITY_TOKEN_FILE"))
    return has_token or find_key(environment) is not None


def find_key(environment: Mapping[str, str]) -> str | None:
    """Return the user's key: from the environment, or from where `wandb login` puts it."""
    if environment.get("WANDB_API_KEY"):
        return environment["WANDB_API_KEY"]
    path = Path(environment.get("NETRC", "~/.netrc")).expanduser()
    host = urlsplit(environment.get("WANDB_BASE_URL", API)).hostname
    try:
        entry = netrc.netrc(path).authenticators(host or "")
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return None
    return entry[2] if entry else None


def run_id(config: Mapping[str, Any]) -> str:
    """Return the id of a run's only tracker run: a pure function of the cell, as its directory is.

    Args:
        config: the content of config.json, or a cell's identity.
    """
    identity = [config[key] for key in ("grid", *IDENTITY)]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    return f"{config['model']}-s{config['seed']}-{digest}"


def artifact_name(*parts: object) -> str:
    """Return a name that W&B takes: letters, digits, '.', '_' and '-'."""
    return re.sub(r"[^\w.-]", "-", "-".join(str(part) for part in parts), flags=re.ASCII)[:128]
