"""Site files: what one's cluster wants, written down once instead of typed each time.

TOML, with the names of `grid submit`'s options, and besides

    modules = ["python/3.11"]     module load, in this order
    conda = "NAME"                conda activate
    venv = "DIR"                  activate a virtual environment; default: the one submitted from
    setup = "LINES"               any other lines of bash, after these
    scratch = "$SLURM_TMPDIR"     a directory on the node itself, for caches
    copy-data = true              have the data copied there, once a node
    [report]                      partition, account, qos, time, mem, cpus-per-task, sbatch: its own
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resnet_ddp.exits import UserError
from resnet_ddp.options import GridSubmitOptions, nearest

# What is an option of sbatch under the same name; "sbatch" holds any others.
DIRECTIVES = ("partition", "account", "qos", "time", "gres", "constraint", "cpus_per_task", "mem")
OPTIONS = (*DIRECTIVES, "sbatch", "array_limit", "runs_per_task", "nodes", "ntasks_per_node")
NUMBERS = ("cpus_per_task", "array_limit", "runs_per_task", "nodes", "ntasks_per_node")
REPORT = ("partition", "account", "qos", "time", "mem", "cpus_per_task", "sbatch")
# A report wants none of the GPUs; what says who pays, and where, holds for it too.
REPORT_INHERITS = ("partition", "account", "qos")


@dataclass(frozen=True)
class Site:
    """What a site file says, and nothing where it is silent.

    Attributes:
        options: for `grid submit`, by the names of its fields.
        setup: lines of bash by which a job finds the project's Python.
        scratch: a directory on the node, with variables that the node expands.
        report: options of the report job, by the same names.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    scratch: str | None = None
    copy_data: bool = False
    report: Mapping[str, Any] = field(default_factory=dict)


def read_site(path: str | None) -> Site:
    """Read a site file; without one, jobs use the Python that runs now.

    Raises:
        UserError: it is not there, or says something that is not known.
    """
    found: dict[str, Any] = {}
    if path is not None:
        try:
            found = tomllib.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"--site {path}: {getattr(error, 'strerror', '') or error}") from error
    names = {key.replace("-", "_"): value for key, value in found.items()}
    texts = ("conda", "venv", "setup", "scratch")
    known = (*OPTIONS, *texts, "modules", "copy_data", "report")
    for name, value in names.items():
        if name not in known:
            shown = name.replace("_", "-")
            near = nearest(shown, (one.replace("_", "-") for one in known))
            raise UserError(f"{path}: unknown name {shown!a}{near}")
        if name in texts and not isinstance(value, str):
            raise UserError(f"{path}: {name} = {value!r}: it has to be a text")
    modules = _texts(path, "modules", names.get("modules", []))
    copy_data = names.get("copy_data", False)
    if not isinstance(copy_data, bool):
        raise UserError(f"{path}: copy-data = {copy_data!r}: it has to be true or false")
    scratch = names.get("scratch")
    if scratch is not None and any(sign in scratch for sign in '"`\n\\'):
        raise UserError(f"{path}: scratch = {scratch!r}: it has to be a plain path")
    return Site(
        options={name: _value(path, name, names[name]) for name in OPTIONS if name in names},
        setup=_setup(modules, names.get("conda"), names.get("venv"), names.get("setup")),
        scratch=scratch,
        copy_data=copy_data,
        report=_report(path, names.get("report", {})),
    )


def with_site(options: GridSubmitOptions, site: Site) -> GridSubmitOptions:
    """Return the options, those of the site where the command line left them open."""
    left_open = {
        name: value for name, value in site.options.items() if getattr(options, name) is None
    }
    return dataclasses.replace(options, **left_open)


def _report(path: str | None, table: Any) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise UserError(f"{path}: report: write a table, [report]")
    names = {key.replace("-", "_"): value for key, value in table.items()}
    for name in names:
        if name not in REPORT:
            raise UserError(f"{path}: [report]: unknown name {name!a}{nearest(name, REPORT)}")
    return {name: _value(path, name, value) for name, value in names.items()}


def _value(path: str | None, name: str, value: Any) -> Any:
    shown = name.replace("_", "-")
    if name in NUMBERS:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{path}: {shown} = {value!r}: it has to be a whole number from 1")
        return value
    if name == "sbatch" and isinstance(value, list):
        return shlex.join(_texts(path, name, value))
    if not isinstance(value, str) or "\n" in value:
        raise UserError(f"{path}: {shown} = {value!r}: it has to be a text in quotes")
    return value


def _texts(path: str | None, name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise UserError(f"{path}: {name} = {value!r}: it has to be a list of texts")
    return value


def _setup(
    modules: list[str], conda: str | None, venv: str | None, lines: str | None
) -> tuple[str, ...]:
    found = []
    if modules:
        found.append("type module >/dev/null 2>&1 || . /etc/profile")
        found += [f"module load {shlex.quote(module)} || return" for module in modules]
    if conda:
        found.append('eval "$(conda shell.bash hook)" || return')
        found.append(f"conda activate {shlex.quote(conda)} || return")
    if venv:
        activate = os.path.join(os.path.expanduser(venv), "bin", "activate")
        found.append(f". {shlex.quote(activate)} || return")
    if lines:
        found += lines.strip().splitlines()
    if not (conda or venv or lines):
        found.append(f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH")
    return tuple(found)
