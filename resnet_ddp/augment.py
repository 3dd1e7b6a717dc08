"""Preprocessing on the device: normalise, pad 4, crop 32, flip; uint8 in, float32 out.

He et al. 2015, section 4.2: "4 pixels are padded on each side, and a 32x32 crop is randomly sampled
from the padded image or its horizontal flip"; the mean is subtracted first, so the padding is the
mean colour: exactly 0 after normalisation.

Shapes: N images in the set, B in the batch, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_ddp.counter_rng import Stream, below, philox4x32
from resnet_ddp.recipe import Recipe

SUMMED_AT_ONCE = 4096  # images; bounds the memory that the mean image takes to compute


class Images(Protocol):
    """Images (N, H, W, 3) uint8 of which some are had on the device: a tensor, or a stand-in."""

    @property
    def device(self) -> torch.device:
        """Where those asked for come to lie."""

    def __len__(self) -> int: ...

    def __getitem__(self, which: slice, /) -> Tensor: ...

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Return those of these numbers; of a tensor several times faster than by brackets."""


@dataclass(frozen=True)
class Normalisation:
    """Subtract `mean`, multiply by `scale`; both float32 in units of grey levels (0..255).

    Attributes:
        mean: (3,) or (H, W, 3).
        scale: (3,), one over the standard deviation; 1/255 where nothing is divided by it.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def channel(
        cls, mean: Sequence[float], std: Sequence[float], device: torch.device
    ) -> Normalisation:
        """Subtract each channel's mean, divide by its deviation; both of the set, in 0..1."""
        # A constant channel has no deviation to divide by.
        scale = [1 / (255 * deviation) if deviation > 0 else 1 / 255 for deviation in std]
        return cls(
            torch.tensor([255 * value for value in mean], dtype=torch.float32, device=device),
            torch.tensor(scale, dtype=torch.float32, device=device),
        )

    @classmethod
    def pixel_mean(cls, train_images: Images) -> Normalisation:
        """Subtract the mean image of the training images (N, H, W, 3) uint8, and bring to 0..1."""
        device = train_images.device
        blocks = range(0, len(train_images), SUMMED_AT_ONCE)
        sums = [
            train_images[first : first + SUMMED_AT_ONCE].sum(dim=0, dtype=torch.int64)
            for first in blocks
        ]
        total = torch.stack(sums).sum(dim=0).cpu()  # exact on every device
        mean = (total.double() / len(train_images)).float().to(device)
        return cls(mean, torch.full((3,), 1 / 255, device=device))

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise images (B, H, W, 3) uint8 to float32 of the same shape."""
        return (images.float() - self.mean) * self.scale


@dataclass(frozen=True)
class Draws:
    """How each image of a batch is cropped and flipped: three tensors (B,) of int64.

    Attributes:
        dy, dx: the crop's first row and column in the padded image, 0..2 * padding.
        flip: 1 to mirror the crop.
    """

    dy: Tensor
    dx: Tensor
    flip: Tensor


def draw(recipe: Recipe, *, seed: int, passes: Tensor, samples: Tensor) -> Draws:
    """Return each sample's crop and flip, keyed by (seed, pass, sample number).

    Args:
        passes: (B,) int64, how many times the training set had been gone through before.
        samples: (B,) int64, image numbers in the training file.
    """
    zero = torch.zeros_like(samples)
    u0, u1, u2, _ = philox4x32((passes, samples, zero, zero), (seed, Stream.AUGMENTATION))
    offsets = 2 * recipe.padding + 1
    flip = below(u2, 2) if recipe.flip else zero
    return Draws(dy=below(u0, offsets), dx=below(u1, offsets), flip=flip)


def crop_and_flip(images: Tensor, draws: Draws, padding: int) -> Tensor:
    """Cut one HxW window out of each zero-padded image and mirror it where `draws` says so.

    Args:
        images: (B, H, W, 3) float32, normalised.

    Returns:
        (B, H, W, 3), contiguous.
    """
    batch, height, width, _ = images.shape
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    mirrored = torch.where(draws.flip[:, None] == 1, width - 1 - columns, columns)  # (B, W)
    return padded[
        torch.arange(batch, device=images.device)[:, None, None],
        (draws.dy[:, None] + rows)[:, :, None],
        (draws.dx[:, None] + mirrored)[:, None, :],
    ]


def as_network_input(images: Tensor) -> Tensor:
    """View images (B, H, W, 3) as (B, 3, H, W), which is channels-last without a copy."""
    return images.permute(0, 3, 1, 2)
