"""Checkpoints: written atomically, verified before use, newest valid first; no pickle anywhere.

    checkpoints/iteration-00000500/
        model.safetensors       weights and BatchNorm buffers
        optimizer.safetensors   momentum, by parameter name
        manifest.json           iteration, whose it is, length and SHA-256 of metrics.jsonl up to
                                there, size and SHA-256 of each file

A run's state is its weights, momentum, BatchNorm buffers and iteration, so that is all there is.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from resnet_ddp import durable
from resnet_ddp.exits import TemporaryError
from resnet_ddp.lease import nobody_else

GENERATIONS = 2  # checkpoints kept: the newest, and one to fall back on
FORMAT = 2
MODEL_FILE, OPTIMIZER_FILE, MANIFEST = "model.safetensors", "optimizer.safetensors", "manifest.json"
MAX_MANIFEST = 1 << 20  # bytes; ours has about a thousand


@dataclass(frozen=True)
class Progress:
    """Where a checkpoint stands.

    Attributes:
        iteration: finished optimizer steps.
        metrics_bytes: length of metrics.jsonl at that moment.
        metrics_sha256: of those bytes.
    """

    iteration: int = 0
    metrics_bytes: int = 0
    metrics_sha256: str = hashlib.sha256().hexdigest()


@dataclass(frozen=True)
class Stored:
    """A verified checkpoint: where it stands, and its tensors."""

    progress: Progress
    weights: dict[str, Tensor]
    momentum: dict[str, Tensor]


class DamagedError(Exception):
    """A checkpoint that is not what was once written, or not this run's."""


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses channels-last.
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _momentum(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        name: optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in model.named_parameters()
    }


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def weights(model: nn.Module) -> bytes:
    """Return weights and BatchNorm buffers as the content of a safetensors file."""
    return save_tensors(_plain(model.state_dict()))


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: made at the first save.
        metrics_path: metrics.jsonl, which a checkpoint has to fit.
        owner: whose they are: recorded, and another's are not loaded.
        check_lease: called before anything is written, renamed or removed; raises if this process
            may not.
        warn: takes a line for the user.
    """

    def __init__(
        self,
        directory: Path,
        *,
        metrics_path: Path,
        owner: dict[str, Any],
        check_lease: Callable[[], None] = nobody_else,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.directory = directory
        self.metrics_path = metrics_path
        self.owner = owner
        self.check_lease = check_lease
        self.warn = warn

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
        """Write one checkpoint, then drop what is older than `GENERATIONS`.

        Returns:
            The checkpoint's directory.

        Raises:
            OSError: no space, or another error of the disk. The checkpoints before are untouched.
            TemporaryError: another process has the run, or the disk gave back something else than
                was written.
        """
        final = self.directory / f"iteration-{progress.iteration:08d}"
        temporary = self.directory / f".saving-{secrets.token_hex(8)}"
        contents = {
            MODEL_FILE: weights(model),
            OPTIMIZER_FILE: save_tensors(_plain(_momentum(model, optimizer))),
        }
        self.check_lease()
        os.makedirs(self.directory, exist_ok=True)
        self._remove(*self._unfinished())
        try:
            os.mkdir(temporary)
            for name, content in contents.items():
                durable.write_new(temporary / name, content)
            durable.write_new(temporary / MANIFEST, self._manifest(contents, progress))
            self.check_lease()
            if final.exists():  # a life that went back to an older checkpoint comes by again
                os.rename(final, self.directory / f".saving-{secrets.token_hex(8)}")
            durable.publish_directory(temporary, final)
        except BaseException:
            self._remove(temporary)
            raise
        try:
            self._verified(final)
        except DamagedError as error:
            self._set_aside(final, error)
            raise TemporaryError(f"{final}: not what was just written ({error})") from error
        self.check_lease()
        self._remove(*self._unfinished(), *self._newest_first()[GENERATIONS:])
        return final

    def newest(self) -> Stored | None:
        """Return the newest checkpoint that verifies, or None if there is none.

        A damaged one, one of another run, and one that has lost the metrics from before it is
        renamed to `damaged-...`, with a warning.

        Raises:
            OSError: the disk cannot be read: that says nothing against the checkpoint.
        """
        self.check_lease()
        self._remove(*self._unfinished())
        try:
            metrics = self.metrics_path.read_bytes()
        except FileNotFoundError:
            metrics = b""
        for checkpoint in self._newest_first():
            try:
                stored = self._verified(checkpoint)
                before = metrics[: stored.progress.metrics_bytes]
                if hashlib.sha256(before).hexdigest() != stored.progress.metrics_sha256:
                    raise DamagedError(f"{self.metrics_path.name} is not what it was then")
                self._remove(*self._newest_first()[GENERATIONS:])
                return stored
            except DamagedError as error:
                self._set_aside(checkpoint, error)
        return None

    def _manifest(self, contents: dict[str, bytes], progress: Progress) -> bytes:
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "owner": self.owner,
            "iteration": progress.iteration,
            "metrics_bytes": progress.metrics_bytes,
            "metrics_sha256": progress.metrics_sha256,
            "files": {
                name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                for name, content in contents.items()
            },
        }
        manifest["digest"] = _digest(manifest)
        return (json.dumps(manifest, indent=2) + "\n").encode()

    def _unfinished(self) -> list[Path]:
        """Return what a save or a removal that was interrupted left."""
        return list(self.directory.glob(".saving-*"))

    def _newest_first(self) -> list[Path]:
        there = self.directory.glob("iteration-*")
        return sorted(filter(_is_checkpoint, there), reverse=True)

    def _verified(self, checkpoint: Path) -> Stored:
        """Read a checkpoint; never more of a file than its manifest says it has.

        Raises:
            DamagedError: if anything differs from what the manifest says.
        """
        try:
            manifest = json.loads(_read(checkpoint / MANIFEST, at_most=MAX_MANIFEST))
            if manifest.pop("digest") != _digest(manifest):
                raise DamagedError(f"{MANIFEST} has changed")
            if manifest["format"] != FORMAT:
                raise DamagedError(f"it is of format {manifest['format']}, not {FORMAT}")
            if manifest["owner"] != self.owner:
                raise DamagedError(f"it is another run's, {manifest['owner']}")
            if manifest["iteration"] != _iteration(checkpoint):
                raise DamagedError(f"it is of iteration {manifest['iteration']}")
            tensors = []
            for name in (MODEL_FILE, OPTIMIZER_FILE):
                stated = manifest["files"][name]
                content = _read(checkpoint / name, at_most=stated["bytes"])
                if hashlib.sha256(content).hexdigest() != stated["sha256"]:
                    raise DamagedError(f"{name} has changed")
                tensors.append(load_tensors(content))
            length = manifest["metrics_bytes"]
            if type(length) is not int or length < 0:
                raise DamagedError(f"{MANIFEST} says that metrics.jsonl had {length} bytes")
            progress = Progress(_iteration(checkpoint), length, manifest["metrics_sha256"])
            return Stored(progress, *tensors)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
                raise
            raise DamagedError(f"{Path(error.filename).name} is missing") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedError(f"{MANIFEST}: {type(error).__name__}: {error}") from error
        except SafetensorError as error:
            raise DamagedError(str(error)) from error

    def _set_aside(self, checkpoint: Path, error: DamagedError) -> None:
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}-{secrets.token_hex(4)}")
        os.rename(checkpoint, aside)
        self.warn(f"warning: checkpoint set aside as {aside}: {error}")

    def _remove(self, *directories: Path) -> None:
        """Remove directories as far as the disk lets us: what stays is no checkpoint."""
        for directory in directories:
            with contextlib.suppress(OSError):
                if _is_checkpoint(directory):
                    # Half removed, it must not be taken for a damaged one.
                    directory = directory.rename(
                        directory.with_name(f".saving-{secrets.token_hex(8)}")
                    )
                shutil.rmtree(directory)


def _is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"iteration-\d{8}", path.name) is not None


def _iteration(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("iteration-"))


def _read(path: Path, *, at_most: int) -> bytes:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # what a device or a pipe would give has no end
        raise DamagedError(f"{path.name} is no file")
    if status.st_size > at_most:
        raise DamagedError(f"{path.name} is longer than it was")
    return path.read_bytes()


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, stored: Stored) -> None:
    """Put a checkpoint's tensors into model and optimizer, in place."""
    state = model.state_dict()
    parameters = dict(model.named_parameters())
    assert _shapes(stored.weights) == _shapes(state), "a checkpoint has its own model's tensors"
    assert _shapes(stored.momentum) == _shapes(parameters), "every parameter has its momentum"
    with torch.no_grad():
        for name, tensor in stored.weights.items():
            state[name].copy_(tensor)  # keeps device and memory layout
        for name, parameter in parameters.items():
            buffer = torch.empty_like(parameter).copy_(stored.momentum[name])
            optimizer.state[parameter]["momentum_buffer"] = buffer


def _shapes(tensors: dict[str, Any]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
