"""What is audited: networks, optimizers and batches, built as a run builds them.

Everything is made when it is first asked for, so that a few assertions do not pay for all.

Shapes: B images in a batch, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from resnet_ddp.audit.coded import Windows, coded_dataset
from resnet_ddp.datasets import Dataset
from resnet_ddp.experiment import Experiment, build_experiment
from resnet_ddp.recipe import RECIPES

Value = TypeVar("Value")

# Past the warm-up. The order of the samples is what takes long to build, so most are cut short.
FEW_ITERATIONS = 450
# The first ones, those in which a pass ends, both drops, the last.
DRAWN_ITERATIONS = (
    *range(8),
    350,
    351,
    352,
    702,
    703,
    1054,
    31_999,
    32_000,
    48_000,
    63_998,
    63_999,
)


@dataclass(frozen=True)
class Drawn:
    """Some training batches of seed 0, as they reach the network, and what can be read from them.

    Attributes:
        sizes: images and labels of each batch.
        images: (B, 32, 32, 3) float32, of all batches, normalised.
        passes: (B,) int64, how many times 45,000 images had gone before.
    """

    sizes: list[tuple[int, int]]
    images: Tensor
    labels: Tensor
    passes: Tensor
    windows: Windows


@dataclass(frozen=True)
class Step:
    """What was seen in the first training step of ResNet-20.

    Attributes:
        inputs: shape of what reached the network.
        is_training: mode of the network, and of each BatchNorm.
        bias_gradient: (K,) the last layer's, as the optimizer got it.
    """

    inputs: tuple[int, ...]
    is_training: bool
    logits: Tensor
    labels: Tensor
    loss: float
    bias_gradient: Tensor
    without_gradient: list[str]


class Subject:
    """One recipe's networks, optimizers and batches.

    Args:
        data: `coded_dataset()`, if it is there already.
    """

    def __init__(self, recipe_name: str, data: Dataset | None = None) -> None:
        self.recipe = RECIPES[recipe_name]
        self._data = data
        self._made: dict[Any, Any] = {}

    @cached_property
    def data(self) -> Dataset:
        """Images that say where each pixel comes from."""
        return self._data or coded_dataset()

    def once(self, key: object, make: Callable[[], Value]) -> Value:
        """Return what `make` returned when it was first called for this key."""
        if key not in self._made:
            self._made[key] = make()
        value: Value = self._made[key]
        return value

    def experiment(self, net: str = "resnet20", seed: int = 0) -> Experiment:
        """Return a network with all that trains it for a few iterations; nobody trains it."""
        return self.once(("few", net, seed), lambda: self.build(net, seed, FEW_ITERATIONS))

    @cached_property
    def whole(self) -> Experiment:
        """ResNet-20, seed 0, with the batches of all iterations."""
        return self.build("resnet20", 0, self.recipe.iterations)

    def build(self, net: str, seed: int, iterations: int) -> Experiment:
        """Build an experiment that ends after so many iterations."""
        return build_experiment(
            dataclasses.replace(self.recipe, iterations=iterations),
            model_name=net,
            seed=seed,
            data=self.data,
            device="cpu",
            precision="fp32",
            compile=False,
            threads=1,
            fuse=False,  # its layers are looked into; the kernels are tried against them
        )

    def levels(self, images: Tensor) -> Tensor:
        """Turn network input (B, 3, 32, 32) back into grey levels (B, 32, 32, 3)."""
        mean, std = (torch.tensor(v) for v in (self.data.channel_mean, self.data.channel_std))
        return (255 * (images.permute(0, 2, 3, 1).double() * std + mean)).float()

    @cached_property
    def order(self) -> Tensor:
        """The image numbers of all batches of seed 0 on end, asked for one iteration at a time."""
        batches = self.whole.stepper.batches
        return torch.cat([batches.samples_at(iteration) for iteration in range(len(batches.order))])

    @cached_property
    def drawn(self) -> Drawn:
        """Draw some batches."""
        batches = self.whole.stepper.batches
        pairs = [batches(i) for i in DRAWN_ITERATIONS if i < len(batches.order)]
        places = [128 * i + torch.arange(128) for i in DRAWN_ITERATIONS if i < len(batches.order)]
        images = torch.cat([images for images, _ in pairs])
        return Drawn(
            sizes=[(len(images), len(labels)) for images, labels in pairs],
            images=images.permute(0, 2, 3, 1),
            labels=torch.cat([labels for _, labels in pairs]),
            passes=torch.cat(places) // 45_000,
            windows=Windows.read(self.levels(images)),
        )

    @cached_property
    def step(self) -> Step:
        """Make the first step of ResNet-20."""
        experiment = self.build("resnet20", 0, FEW_ITERATIONS)
        model = experiment.model
        seen: dict[str, Any] = {}

        def look(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            seen["inputs"], seen["logits"] = tuple(inputs[0].shape), output.detach().clone()
            seen["is_training"] = all(module.training for module in model.modules())

        def look_at_gradients(*_: object) -> None:
            seen["without_gradient"] = [
                name for name, parameter in model.named_parameters() if parameter.grad is None
            ]
            gradient = model.linear.bias.grad
            seen["bias_gradient"] = torch.zeros(10) if gradient is None else gradient.clone()

        model.register_forward_hook(look)
        experiment.optimizer.register_step_pre_hook(look_at_gradients)
        experiment.stepper.step()
        return Step(
            labels=experiment.stepper.batches(0)[1], loss=float(experiment.stepper.loss), **seen
        )
