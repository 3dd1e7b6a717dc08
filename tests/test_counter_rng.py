"""Philox4x32-10 against the known answers of Random123 (Salmon et al. 2011), in both libraries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_ddp.counter_rng import Stream, below, philox4x32

ONES = 0xFFFFFFFF
KNOWN = [  # counter, key, answer: kat_vectors of Random123
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
word = st.integers(0, ONES)


def in_numpy(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c0, c1, c2, c3 = (np.array([value], np.uint64) for value in counter)
    return tuple(int(value[0]) for value in philox4x32((c0, c1, c2, c3), key))


def in_torch(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c0, c1, c2, c3 = (torch.tensor([value]) for value in counter)
    return tuple(int(value[0]) for value in philox4x32((c0, c1, c2, c3), key))


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    assert in_numpy(counter, key) == answer
    assert in_torch(counter, key) == answer


@given(st.tuples(word, word, word, word), st.tuples(word, word))
def test_numpy_and_torch_give_the_same_bits(counter: tuple[int, ...], key: tuple[int, int]) -> None:
    assert in_numpy(counter, key) == in_torch(counter, key)


def test_a_stream_is_a_plain_word_of_the_key() -> None:
    assert in_numpy((1, 2, 3, 4), (5, Stream.ORDER)) == in_numpy((1, 2, 3, 4), (5, 1))
    assert len(set(Stream)) == len(Stream.__members__)  # no two uses share bits


def test_below_covers_its_range_evenly() -> None:
    ends = torch.tensor([0, (ONES + 1) // 9 - 1, (ONES + 1) // 9 + 1, ONES])
    assert below(ends, 9).tolist() == [0, 0, 1, 8]
    assert below(np.array([0, ONES // 2, ONES // 2 + 1, ONES], np.uint64), 2).tolist() == [
        0,
        0,
        1,
        1,
    ]
