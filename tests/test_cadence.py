"""What is due when, wherever a life begins."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resnet_ddp.cadence import (
    Cadence,
    default_eval_every,
    default_log_every,
    default_save_every,
    is_due,
)


def test_due_on_multiples_and_at_the_end() -> None:
    assert [done for done in range(18) if is_due(done, 5, 17)] == [5, 10, 15, 17]


def lives(cadence: Cadence, begin: int) -> list[int]:
    stops = []
    while begin < cadence.last:
        begin = cadence.next_due(begin)
        stops.append(begin)
    return stops


def test_the_loop_comes_back_where_anything_is_due() -> None:
    cadence = Cadence(log_every=4, eval_every=6, save_every=10, look_every=9, total=25, last=21)
    assert lives(cadence, 0) == [4, 6, 8, 9, 10, 12, 16, 18, 20, 21]


every = st.integers(1, 30)


@given(every, every, every, every, st.integers(1, 100), st.integers(0, 99))
def test_a_later_life_comes_back_at_the_same_iterations(
    log: int, evaluate: int, save: int, look: int, total: int, begin: int
) -> None:
    cadence = Cadence(log, evaluate, save, look, total=total, last=total)
    assert lives(cadence, begin) == [stop for stop in lives(cadence, 0) if stop > begin]


def test_defaults_suit_long_and_short_runs() -> None:
    assert [default_log_every(total) for total in (64_000, 500, 32)] == [50, 7, 1]
    assert [default_eval_every(total) for total in (64_000, 500, 3)] == [500, 100, 1]
    assert (default_save_every("cuda"), default_save_every("cpu")) == (4_000, 500)
