"""Exact error rates: every image counted once, in the same blocks whatever the number of processes.

Shapes: N images in a file, n of them evaluated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from resnet_ddp.augment import Images, Normalisation, as_network_input

BLOCK = 500  # images in a forward pass: fixed, so that rounding does not depend on the processes
ROUND = 4  # blocks of each process between two pauses

Pause = Callable[[], None]


def never() -> None:
    """Do not pause."""


@torch.no_grad()
def error_rate(
    model: nn.Module,
    *,
    images: Images,
    labels: Tensor,
    samples: Tensor,
    normalise: Normalisation,
    accelerator: Accelerator,
    pause: Pause = never,
) -> float:
    """Return the fraction of the chosen images that the model labels wrongly.

    Every process calls it, with the unwrapped module; block k is computed by process k mod W.

    Args:
        images: (N, 32, 32, 3) uint8.
        labels: (N,) int64.
        samples: (n,) int64, the image numbers to evaluate, un-augmented.
        pause: called now and then, by all processes as often; may raise.
    """
    was_training = model.training
    model.eval()
    dtype = next(model.parameters()).dtype
    errors = torch.zeros((), dtype=torch.int64, device=images.device)
    blocks = torch.split(samples.to(images.device), BLOCK)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    for start in range(0, len(blocks), ROUND * world_size):
        for block in blocks[start : start + ROUND * world_size][rank::world_size]:
            with accelerator.autocast():
                logits = model(as_network_input(normalise(images.index_select(0, block))).to(dtype))
            errors += (logits.argmax(dim=1) != labels[block]).sum()
        pause()
    model.train(was_training)
    total: Tensor = accelerator.reduce(errors, reduction="sum")
    return int(total) / len(samples)  # device synchronisation
