"""What is written beside weights and curves for a person who finds them elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from resnet_ddp.runs import shown

NAMED = ("model", "seed", "recipe", "recipe_hash", "data", "data_source", "data_original",
         "data_sha256", "precision", "world_size", "hardware", "git_commit")  # fmt: skip


def as_table(values: Mapping[str, Any]) -> str:
    """Return a Markdown table of what has one value."""
    rows = [
        f"| {name} | {_escaped(value)} |"
        for name, value in values.items()
        if not isinstance(value, dict | list)
    ]
    return "\n".join(["| | |", "|---|---|", *rows])


def model_card(config: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Return the card of a run's final weights, in Markdown.

    Args:
        config: the content of config.json.
        result: the content of result.json.
    """
    errors = {name: value for name, value in result.items() if name.endswith("_error_rate")}
    told = {name: config.get(name) for name in NAMED} | errors
    return f"""# {config["model"]}, seed {config["seed"]}

Final weights of one run of section 4.2 of He et al. 2015, "Deep Residual Learning for Image
Recognition", as a safetensors file. Inputs are RGB images of 32x32 pixels, normalised as the recipe
says.

{as_table(told)}

The recipe:

{as_table(config.get("recipe_fields") or {})}
"""


def _escaped(value: Any) -> str:
    return shown(value).replace("|", "\\|")
