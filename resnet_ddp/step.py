"""One training step, and how to make many of them without coming back to the host.

`stepper.advance(iteration, until)` is all that the loop knows.

Shapes: b images of this rank, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from resnet_ddp.batches import Batches
from resnet_ddp.recipe import Recipe


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """Return SGD over every parameter, weight decay on all of them (paper, section 4.2)."""
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


class Stepper:
    """Make steps one after the other, the eager way; a compiled model makes them compiled.

    Args:
        model: prepared by Accelerate.
        optimizer: prepared by Accelerate.
        depth: weighted layers, which the learning rate depends on.

    Attributes:
        loss: this rank's part of the last step's loss; the sum over ranks is the global mean.
        bad_iteration: the first iteration whose loss was not finite, -1 while there is none. It
            stays on the device, and is read when something is due.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        optimizer: AcceleratedOptimizer,
        batches: Batches,
        accelerator: Accelerator,
        recipe: Recipe,
        *,
        depth: int,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.batches = batches
        self.accelerator = accelerator
        self.recipe = recipe
        self.depth = depth
        self.loss = torch.zeros((), device=batches.images.device)
        self.bad_iteration = torch.full((), -1, device=batches.images.device)

    def advance(self, iteration: int, until: int) -> int:
        """Make the steps `iteration`..`until`-1 and return `until`."""
        while iteration < until:
            self.step(iteration)
            iteration += 1
        return iteration

    def step(self, iteration: int) -> None:
        """Draw the batch, set the learning rate, descend."""
        images, labels = self.batches(iteration)  # this rank's share of the global batch of 128
        self.set_lr(self.recipe.lr_at(iteration, depth=self.depth))
        logits = self.model(images)  # (b, K) float32
        # DDP averages over ranks: weighted like this, shares of any size give the global mean.
        loss = F.cross_entropy(logits, labels, reduction="sum") / self.recipe.batch_size
        self.accelerator.backward(loss * self.accelerator.num_processes)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.note(iteration, loss.detach())

    @property
    def learning_rate(self) -> float:
        """What the last step was made with, read back from the optimizer."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set_lr(self, learning_rate: float) -> None:
        """Write the learning rate; nothing else does."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def note(self, iteration: int, loss: Tensor) -> None:
        """Keep the loss, and remember the first iteration at which it was not finite."""
        self.loss = loss
        is_first = (self.bad_iteration < 0) & ~torch.isfinite(loss)
        self.bad_iteration = torch.where(is_first, iteration, self.bad_iteration)
