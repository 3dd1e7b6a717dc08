"""Checkpoints: written atomically, verified before use, newest valid first; no pickle anywhere.

    checkpoints/iteration-00000500/
        model.safetensors       weights and BatchNorm buffers
        optimizer.safetensors   momentum, by parameter name
        manifest.json           iteration, length of metrics.jsonl, size and SHA-256 of each file

A run's state is its weights, momentum, BatchNorm buffers and iteration, so that is all there is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from resnet_ddp import durable
from resnet_ddp.exits import TemporaryError

GENERATIONS = 2  # checkpoints kept: the newest, and one to fall back on
MODEL_FILE, OPTIMIZER_FILE, MANIFEST = "model.safetensors", "optimizer.safetensors", "manifest.json"


@dataclass(frozen=True)
class Progress:
    """Where a checkpoint stands.

    Attributes:
        iteration: finished optimizer steps.
        metrics_bytes: length of metrics.jsonl at that moment.
    """

    iteration: int
    metrics_bytes: int


@dataclass(frozen=True)
class Stored:
    """A verified checkpoint: where it stands, and its files' contents by name."""

    progress: Progress
    contents: dict[str, bytes]


class DamagedError(Exception):
    """A checkpoint that is not what was once written."""


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses channels-last.
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _momentum(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        name: optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in model.named_parameters()
        if "momentum_buffer" in optimizer.state.get(parameter, {})
    }


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def weights(model: nn.Module) -> bytes:
    """Return weights and BatchNorm buffers as the content of a safetensors file."""
    return save_tensors(_plain(model.state_dict()))


def save(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> Path:
    """Write one checkpoint below `directory` and drop what is older than `GENERATIONS`.

    Returns:
        The checkpoint's directory.

    Raises:
        TemporaryError: no space, or another error of the disk. Older checkpoints are untouched.
    """
    final = directory / f"iteration-{progress.iteration:08d}"
    temporary = directory / f".saving-{os.getpid()}"
    contents = {
        MODEL_FILE: weights(model),
        OPTIMIZER_FILE: save_tensors(_plain(_momentum(model, optimizer))),
    }
    manifest: dict[str, Any] = {
        "format": 1,
        "iteration": progress.iteration,
        "metrics_bytes": progress.metrics_bytes,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        },
    }
    manifest["digest"] = _digest(manifest)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob(".saving-*"):
            shutil.rmtree(stale)
        temporary.mkdir()
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        if final.exists():  # written by a life that went back to an older checkpoint
            shutil.rmtree(final)
        durable.publish_directory(temporary, final)
        _verified(final)
    except (OSError, DamagedError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise TemporaryError(f"checkpoint {final} could not be saved: {error}") from error
    for old in _newest_first(directory)[GENERATIONS:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _newest_first(directory: Path) -> list[Path]:
    return sorted(directory.glob("iteration-*"), reverse=True)


def _verified(checkpoint: Path) -> Stored:
    """Read a checkpoint.

    Raises:
        DamagedError: if anything differs from what the manifest says.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        stated = manifest.pop("digest")
        if stated != _digest(manifest):
            raise DamagedError(f"{MANIFEST} has changed")
        contents = {}
        for name, expected in manifest["files"].items():
            contents[name] = (checkpoint / name).read_bytes()
            if hashlib.sha256(contents[name]).hexdigest() != expected["sha256"]:
                raise DamagedError(f"{name} has changed")
        return Stored(Progress(manifest["iteration"], manifest["metrics_bytes"]), contents)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{type(error).__name__}: {error}") from error


def read_newest(directory: Path, *, metrics_path: Path) -> Stored | None:
    """Return the newest checkpoint that verifies, or None if there is none.

    A damaged one, or one that has lost the metrics from before it, is renamed to `damaged-...`,
    with a warning.
    """
    metrics_bytes = metrics_path.stat().st_size if metrics_path.exists() else 0
    for checkpoint in _newest_first(directory):
        try:
            stored = _verified(checkpoint)
            if stored.progress.metrics_bytes > metrics_bytes:
                raise DamagedError(f"{metrics_path} is shorter than it was")
            return stored
        except DamagedError as error:
            aside = checkpoint.with_name(f"damaged-{checkpoint.name}-{os.getpid()}")
            checkpoint.rename(aside)
            warnings.warn(f"checkpoint set aside as {aside}: {error}", stacklevel=2)
    return None


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, stored: Stored) -> None:
    """Put a checkpoint's tensors into model and optimizer, in place."""
    tensors = load_tensors(stored.contents[MODEL_FILE])
    state = model.state_dict()
    assert tensors.keys() == state.keys(), "a run directory holds its own model's checkpoints only"
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)  # keeps device and memory layout
        momentum = load_tensors(stored.contents[OPTIMIZER_FILE])
        for name, parameter in model.named_parameters():
            if name in momentum:
                buffer = torch.empty_like(parameter).copy_(momentum[name])
                optimizer.state[parameter]["momentum_buffer"] = buffer
