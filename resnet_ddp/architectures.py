"""The networks of section 4.2 by name: depth and shortcut, without importing torch.

A net of depth 6n+2 has one 3x3 convolution, three stages of n blocks (two 3x3 convolutions each)
with 16, 32 and 64 channels on 32x32, 16x16 and 8x8 maps, and a linear layer (paper, section 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Shortcut = Literal["A", "B", "maxpool"]

RESIDUAL_DEPTHS = (20, 32, 44, 56, 110, 1202)
PLAIN_DEPTHS = (20, 32, 44, 56, 110)


@dataclass(frozen=True)
class Architecture:
    """One network of the paper's family.

    Attributes:
        depth: weighted layers, 6n+2.
        shortcut: None for a plain net. "A": identity, every second pixel, new channels zero
            (paper, section 3.3, option A). "B": 1x1 projection with BatchNorm where the shape
            changes (option B). "maxpool": option A with 2x2 max pooling in place of every second
            pixel, a variant that nabla0001/resnet explored and the paper does not have.
    """

    depth: int
    shortcut: Shortcut | None

    @property
    def blocks_per_stage(self) -> int:
        """The n of depth = 6n+2."""
        return (self.depth - 2) // 6


ARCHITECTURES: dict[str, Architecture] = {
    **{f"resnet{depth}": Architecture(depth, "A") for depth in RESIDUAL_DEPTHS},
    **{f"plain{depth}": Architecture(depth, None) for depth in PLAIN_DEPTHS},
    **{f"resnet{depth}-b": Architecture(depth, "B") for depth in RESIDUAL_DEPTHS},
    **{f"resnet{depth}-maxpool": Architecture(depth, "maxpool") for depth in RESIDUAL_DEPTHS},
}

PAPER_MODELS = ("resnet20", "resnet56", "resnet110", "plain20", "plain56")  # the grid's
