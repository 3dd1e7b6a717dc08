"""The batch scripts in slurm/, filled in: directives, a few variables at their top, and setup()."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def template(name: str) -> str:
    """Return a script as it lies in slurm/, of the installed package or of a clone."""
    folder = PACKAGE / "slurm"
    return ((folder if folder.is_dir() else PACKAGE.parent / "slurm") / name).read_text()


def with_directives(script: str, directives: Mapping[str, str | None]) -> str:
    """Return the script with these `#SBATCH --name=value`.

    Args:
        directives: a value each, "" for an option that has none, None to leave the option out. What
            the script has already is replaced in its place, the rest follows the last one.
    """
    lines = script.splitlines(keepends=True)
    for name, value in directives.items():
        pattern = re.compile(rf"#SBATCH --{re.escape(name)}(?:[=\s].*)?\n")
        there = [place for place, line in enumerate(lines) if pattern.fullmatch(line)]
        new = (
            []
            if value is None
            else [f"#SBATCH --{name}{value and '='}{shlex.quote(value) if value else ''}\n"]
        )
        if there:
            lines[there[0] : there[0] + 1] = new
        else:
            last = max(place for place, line in enumerate(lines) if line.startswith("#SBATCH"))
            lines[last + 1 : last + 1] = new
    return "".join(lines)


def with_variable(script: str, name: str, value: str | Sequence[str]) -> str:
    """Return the script with another value of one of the variables at its top.

    Args:
        value: a list for an array, each in a line of its own; a string is written as it is, so that
            the shell expands it.
    """
    if isinstance(value, str):
        new = f"{name}={value}\n"
    else:
        new = f"{name}=(\n{''.join(f'  {shlex.quote(one)}{chr(10)}' for one in value)})\n"
    pattern = rf"^{name}=(?:\([^)]*\)|.*)\n"
    found, count = re.subn(pattern, lambda _: new, script, count=1, flags=re.MULTILINE)
    assert count == 1, name
    return found


def with_setup(script: str, lines: Sequence[str]) -> str:
    """Return the script with these lines in setup()."""
    body = "".join(f"  {line}\n" for line in lines)
    found, count = re.subn(
        r"^setup\(\) \{\n(?:  .*\n)*\}\n",
        lambda _: f"setup() {{\n{body}}}\n",
        script,
        count=1,
        flags=re.MULTILINE,
    )
    assert count == 1
    return found


def read_sbatch_options(text: str) -> dict[str, str]:
    """Return the options of "--exclude=n7 --mem 4G --exclusive" by name.

    Raises:
        ValueError: that is not what it says.
    """
    found: dict[str, str] = {}
    name = None
    for word in shlex.split(text):
        if word.startswith("--") and len(word) > 2:
            name, has_value, value = word[2:].partition("=")
            found[name] = value
            name = None if has_value else name
        elif name is not None:
            found[name], name = word, None
        else:
            raise ValueError(f"{word!r}: write sbatch's options out, as in --exclude=n7")
    return found
