"""Random bits as a pure function of (key, counter): Philox4x32-10, the same in NumPy and torch.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". A run draws nothing from a
generator that remembers: which images an iteration sees, and how each is cropped and flipped, is
computed from (seed, iteration) alone. So resuming needs no generator state, and any number of
processes draws the same numbers.

The key is (seed, stream); a stream is one use of randomness, so that no two uses share bits.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

    Words = TypeVar("Words", np.ndarray[Any, Any], torch.Tensor)

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


class Stream(IntEnum):
    """The second word of the key: what the bits are for."""

    ORDER = 1
    AUGMENTATION = 2
    SPLIT = 3
    SHAPES = 4
    CURVE = 5


def philox4x32(
    counter: tuple[Words, Words, Words, Words], key: tuple[int, int]
) -> tuple[Words, Words, Words, Words]:
    """Return four random 32-bit words for each counter.

    Args:
        counter: four arrays of one shape that hold 32-bit words, as uint64 in NumPy or int64 in
            torch (whose products then wrap around to the right bits).
        key: two 32-bit words.

    Returns:
        Four arrays of the counter's shape and type with values in 0..2**32-1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = int(key[0]), int(key[1])  # NumPy would take an IntEnum for a signed word
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & MASK) ^ c1 ^ k0,
            product1 & MASK,
            ((product0 >> 32) & MASK) ^ c3 ^ k1,
            product0 & MASK,
        )
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK, (k1 + KEY_INCREMENTS[1]) & MASK
    return c0, c1, c2, c3


def below(words: Words, bound: int) -> Words:
    """Map 32-bit words to 0..bound-1 (multiply and shift; the bias is under bound / 2**32)."""
    return (words * bound) >> 32
