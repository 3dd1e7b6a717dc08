"""Images that say where each pixel comes from, so that a drawn batch tells what was done to it.

Red is the row, green the column, blue the image's number: low byte in even columns, high byte in
odd ones. From a crop, mirrored or not, number and window can be read back, and with them what every
one of its pixels has to be.

Shapes: N images, B in a batch, H rows, W columns (32).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnet_ddp.datasets import Dataset, in_memory

SIZE = 32
PADDING = 4  # pixels on each side (He et al. 2015, section 4.2)
NUM_TRAIN, NUM_TEST = 50_000, 10_000
FIRST_TEST = 51_200  # numbers of test images: none of them is a training image's
FIRST_LEVEL, STEP = 16, 7  # grey levels of row or column 0, and between neighbours


def coded_dataset() -> Dataset:
    """Return a data set of CIFAR-10's size; image k has label k mod 10."""
    train, test = np.arange(NUM_TRAIN), np.arange(NUM_TEST)
    return in_memory(
        name="coded",
        source="made by resnet_ddp.audit",
        classes=tuple("0123456789"),
        train=(coded_images(train), train % 10),
        test=(coded_images(FIRST_TEST + test), test % 10),
    )


def coded_images(numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return images (N, 32, 32, 3) with these numbers, below 2**16."""
    places = np.arange(SIZE)
    images = np.empty((len(numbers), SIZE, SIZE, 3), np.uint8)
    images[..., 0] = FIRST_LEVEL + STEP * places[:, None]
    images[..., 1] = FIRST_LEVEL + STEP * places
    images[:, :, 0::2, 2] = (numbers & 255)[:, None, None]
    images[:, :, 1::2, 2] = (numbers >> 8)[:, None, None]
    return images


@dataclass(frozen=True)
class Windows:
    """Which part of which image each one of a batch is; four tensors (B,) of int64.

    Attributes:
        numbers: of the image.
        dy, dx: first row and column of the crop in the padded image, 0..8; 4 is the centre.
        flips: 1 where the crop is mirrored.
    """

    numbers: Tensor
    dy: Tensor
    dx: Tensor
    flips: Tensor

    @classmethod
    def read(cls, levels: Tensor) -> Windows:
        """Read images (B, 32, 32, 3) in grey levels; the pixels at the centre are never padding."""
        left, right = levels[:, 16, 16].round().long(), levels[:, 16, 17].round().long()
        row = (left[:, 0] - FIRST_LEVEL) // STEP
        column = (left[:, 1] - FIRST_LEVEL) // STEP
        flips = (right[:, 1] < left[:, 1]).long()
        low = torch.where(column % 2 == 0, left[:, 2], right[:, 2])
        high = torch.where(column % 2 == 0, right[:, 2], left[:, 2])
        # Column 16 of a mirrored crop was column 15 before.
        return cls(
            numbers=low + 256 * high,
            dy=row - 16 + PADDING,
            dx=column - 16 + flips + PADDING,
            flips=flips,
        )

    def cut(self) -> tuple[Tensor, Tensor]:
        """Return what the images have to be.

        Returns:
            (B, 32, 32, 3) float32 in grey levels, and (B, 32, 32) bool: where the image itself is,
            and not its padding.
        """
        places = torch.arange(SIZE)
        rows = (self.dy[:, None] + places - PADDING)[:, :, None]  # (B, H, 1)
        mirrored = torch.where(self.flips[:, None] == 1, SIZE - 1 - places, places)  # (B, W)
        columns = (self.dx[:, None] + mirrored - PADDING)[:, None, :]  # (B, 1, W)
        low, high = self.numbers % 256, self.numbers // 256
        blue = torch.where(columns % 2 == 0, low[:, None, None], high[:, None, None])
        shape = (len(self.numbers), SIZE, SIZE)
        levels = torch.stack(
            [
                (FIRST_LEVEL + STEP * rows).expand(shape),
                (FIRST_LEVEL + STEP * columns).expand(shape),
                blue.expand(shape),
            ],
            dim=-1,
        )
        inside = (rows >= 0) & (rows < SIZE) & (columns >= 0) & (columns < SIZE)
        return levels.float(), inside
