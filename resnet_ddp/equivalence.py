"""The same experiment on any number of processes: shown by training on W of them and on one.

In float64 the two differ by rounding that is far below anything that training could see, so that an
error in weighting, in the statistics or in the shares stands out by many orders of magnitude.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor

from resnet_ddp import machine, processes
from resnet_ddp.datasets import Dataset, in_memory
from resnet_ddp.exits import TemporaryError
from resnet_ddp.experiment import Experiment, build_experiment
from resnet_ddp.launcher import launch
from resnet_ddp.recipe import RECIPES
from resnet_ddp.srun import launch_with_srun, take_place

NUM_TRAIN, NUM_TEST, NUM_CLASSES = 400, 100, 10


@dataclass(frozen=True)
class Trial:
    """What is trained: a few steps on images of noise, seed 0.

    Attributes:
        precision: "fp64" or "fp32".
        iterations: steps.
    """

    model: str
    precision: str = "fp64"
    iterations: int = 3
    recipe: str = "he2015"
    device: str = "auto"
    threads: int = 1


def trace(trial: Trial) -> dict[str, Tensor]:
    """Train, in this process or in all of this launch; return what came out.

    Returns:
        "loss" (iterations,), "error_rate" of the test images, and by name "gradient/..." of the
        first and the last step, "weight/..." and "buffer/..." (the running statistics).
    """
    experiment = build_experiment(
        RECIPES[trial.recipe],
        model_name=trial.model,
        seed=0,
        data=noise(),
        device=machine.pick_device(trial.device),
        precision=trial.precision,
        compile=False,
        threads=trial.threads,
    )
    steps = {0: "first", trial.iterations - 1: "last"}
    traced: dict[str, Tensor] = {}
    losses = []
    for iteration in range(trial.iterations):
        with _gradients_kept(experiment, traced, steps.get(iteration)):
            experiment.stepper.advance(iteration, until=iteration + 1)
        loss = processes.total(experiment.accelerator.state, experiment.stepper.loss)
        losses.append(loss.clone())  # the step writes into its own again
    traced["loss"] = torch.stack(losses)
    traced["error_rate"] = torch.tensor(experiment.test_error_rate())
    for name, parameter in experiment.model.named_parameters():
        traced[f"weight/{name}"] = parameter.detach()
    for name, buffer in experiment.model.named_buffers():
        traced[f"buffer/{name}"] = buffer
    return {name: tensor.detach().cpu().contiguous() for name, tensor in traced.items()}


def noise() -> Dataset:
    """Return images of noise with labels in turn: no structure that would magnify rounding."""
    images = np.random.default_rng(0).integers(
        0, 256, (NUM_TRAIN + NUM_TEST, 32, 32, 3), dtype=np.uint8
    )
    labels = np.arange(len(images)) % NUM_CLASSES
    return in_memory(
        name="noise",
        source="noise",
        classes=[str(label) for label in range(NUM_CLASSES)],
        train=(images[:NUM_TRAIN], labels[:NUM_TRAIN]),
        test=(images[NUM_TRAIN:], labels[NUM_TRAIN:]),
    )


@contextmanager
def _gradients_kept(
    experiment: Experiment, kept: dict[str, Tensor], step: str | None
) -> Iterator[None]:
    """Keep a copy of the gradients that the optimizer is about to use, if the step has a name."""

    def keep(*_: object) -> None:
        for name, parameter in experiment.model.named_parameters():
            if step is not None and parameter.grad is not None:
                kept[f"gradient/{step}/{name}"] = parameter.grad.clone()

    hook = experiment.optimizer.register_step_pre_hook(keep)
    try:
        yield
    finally:
        hook.remove()


def trace_on(num_processes: int, trial: Trial, *, srun: bool = False) -> list[dict[str, Tensor]]:
    """Train on W processes of this machine; return what came out in each.

    Args:
        srun: on all nodes of this Slurm job instead, which have this directory in common.

    Raises:
        TemporaryError: the processes failed.
    """
    module = "resnet_ddp.equivalence"
    with tempfile.TemporaryDirectory(dir=os.curdir if srun else None) as directory:
        arguments = [os.path.abspath(directory), json.dumps(asdict(trial))]
        if srun:
            code = launch_with_srun(module, arguments)
        else:
            code = launch(num_processes, module, arguments)
        if code != 0:
            raise TemporaryError(
                f"training on {num_processes} processes ended with exit code {code}"
            )
        return [load_file(Path(directory) / str(rank)) for rank in range(num_processes)]


def differences(reference: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Return, by kind of tensor, the largest difference relative to the tensor's norm."""
    assert reference.keys() == other.keys()
    worst: dict[str, float] = {}
    for name, expected in reference.items():
        kind = name.partition("/")[0]
        norm = float(expected.double().norm()) or 1.0
        difference = float((other[name].double() - expected.double()).norm()) / norm
        worst[kind] = max(worst.get(kind, 0.0), difference)
    return worst


def main(directory: str, trial_json: str) -> None:
    """Be one process of a launch: train and write what came out."""
    take_place()
    traced = trace(Trial(**json.loads(trial_json)))
    state = PartialState()
    save_file(traced, Path(directory) / str(state.process_index))
    processes.leave_together(state)


if __name__ == "__main__":
    main(*sys.argv[1:])
