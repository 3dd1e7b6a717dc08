"""One training step that lives on the device, and how to make many without coming back to the host.

Everything a step reads and writes is a tensor on the device, the iteration counter and the learning
rates included: nothing is copied from the host, nothing is read back, no shape depends on data. So
the same step can be made eagerly, with a compiled network, or captured once into a CUDA graph that
is replayed; `stepper.advance(iteration, until)` is all that the loop knows.

Shapes: b images of this rank, K classes, I iterations of the recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from resnet_ddp.batches import Batches
from resnet_ddp.recipe import Recipe

UNROLL = 10  # iterations in one replay of the longer graph
WARM_UP = 3  # eager steps before a capture: libraries initialise, momentum is allocated


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
        optimizer: prepared by Accelerate; its learning rate becomes a tensor that each step writes.
        depth: weighted layers, which the learning rate depends on.

    Attributes:
        iteration: (1,) int64, the finished steps.
        learning_rates: (I,) of all iterations, in the weights' type.
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
        weight = optimizer.param_groups[0]["params"][0]
        device, dtype = weight.device, weight.dtype
        rates = [recipe.lr_at(iteration, depth=depth) for iteration in range(recipe.iterations)]
        self.learning_rates = torch.tensor(rates, dtype=dtype).to(device)
        self.rate = torch.zeros((), dtype=dtype, device=device)
        for group in optimizer.param_groups:
            group["lr"] = self.rate
        self.iteration = torch.zeros(1, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), dtype=dtype, device=device)
        self.bad_iteration = torch.full((), -1, device=device)
        self._finished = 0  # what `iteration` holds

    def advance(self, iteration: int, until: int) -> int:
        """Make the steps `iteration`..`until`-1 and return `until`."""
        self.seek(iteration)
        while self._finished < until:
            self._finished += self.make(until - self._finished)
        return until

    def make(self, at_most: int) -> int:
        """Make some steps, and return how many."""
        self.step()
        return 1

    def seek(self, iteration: int) -> None:
        """Go on from another iteration than the last one left off at."""
        if iteration != self._finished:
            self.iteration.fill_(iteration)
            self._finished = iteration
            self.batches.seek(iteration)

    def step(self) -> None:
        """Draw the batch, set the learning rate, descend."""
        images, labels = self.batches(self.iteration)  # this rank's share of the batch of 128
        self.set_rate()
        logits = self.model(images)  # (b, K) float32
        # DDP averages over ranks: weighted like this, shares of any size give the global mean.
        loss = F.cross_entropy(logits, labels, reduction="sum") / self.recipe.batch_size
        self.accelerator.backward(loss * self.accelerator.num_processes)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.note(loss.detach())
        self.iteration += 1

    def set_rate(self) -> None:
        """Write the learning rate; nothing else does."""
        self.rate.copy_(self.learning_rates.index_select(0, self.iteration)[0])

    def note(self, loss: Tensor) -> None:
        """Keep the loss, and remember the first iteration at which it was not finite."""
        self.loss.copy_(loss)
        is_first = (self.bad_iteration < 0) & ~torch.isfinite(loss)
        self.bad_iteration.copy_(torch.where(is_first, self.iteration[0], self.bad_iteration))

    @property
    def learning_rate(self) -> float:
        """What the last step was made with, as the optimizer holds it, to seven digits."""
        return float(f"{float(self.optimizer.param_groups[0]['lr']):.7g}")  # synchronisation


Replay = Callable[[], None]


class Recorder(Protocol):
    """Turns work on the device into something that repeats it."""

    def warm_up(self) -> AbstractContextManager[object]:
        """Return the surroundings in which the work is to be done before it is recorded."""

    def record(self, work: Callable[[], None]) -> Replay:
        """Return a function that does the work; recording alone does not."""


class CudaGraphs:
    """Records CUDA graphs."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def warm_up(self) -> AbstractContextManager[object]:
        """Work on another stream than the default one, as a capture does."""
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def record(self, work: Callable[[], None]) -> Replay:
        """Capture the work into a graph with memory of its own."""
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay


class CapturedStepper(Stepper):
    """Record the step once, one and UNROLL iterations long, then only replay.

    The first steps of a life are made eagerly and count like all others, so that nothing has to be
    put back after the warm-up.

    Args:
        parts: those of `Stepper`.
    """

    def __init__(self, *parts: Any, depth: int, recorder: Recorder) -> None:
        super().__init__(*parts, depth=depth)
        self.recorder = recorder
        self.replays: dict[int, Replay] = {}
        self._warm_up_left = WARM_UP

    def make(self, at_most: int) -> int:
        """Make one step, or UNROLL of them if they fit."""
        if self._warm_up_left:
            self._warm_up_left -= 1
            with self.recorder.warm_up():
                self.step()
            return 1
        count = UNROLL if at_most >= UNROLL else 1
        if count not in self.replays:
            self.replays[count] = self.recorder.record(lambda: self._steps(count))
        self.replays[count]()
        return count

    def _steps(self, count: int) -> None:
        for _ in range(count):
            self.step()
