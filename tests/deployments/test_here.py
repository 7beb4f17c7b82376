"""Which of the requests that came together are run: the most that can all be in time."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrai_core.artifact import LatencyPoint
from lrai_core.scheduler.latency import LatencyModel
from lrai_core.scheduler.planner import Bounds
from lrai_core.scheduler.waiting import Waiting
from lrai_deployments.here import choose_together

NOW = 100.0
APART = Bounds(1)
PROFILE = [
    LatencyPoint(rows=rows, length=length, median_ms=rows * length, spread_ms=0.0)
    for rows in (1, 4)
    for length in (8, 32)
]


def waiting(index: int, left_ms: float, length: int, priority: int = 0) -> Waiting:
    deadline = NOW + (left_ms + 0.5) / 1e3  # between what calls take: no sum is on the line
    return Waiting(priority, deadline, index, deadline, "", 1, length)


def seconds(model: LatencyModel, one: Waiting) -> float:
    return model.call_seconds(one.rows, one.length) * model.margin


def most(model: LatencyModel, requests: list[Waiting]) -> int:
    """Return the size of the largest set that ends before the first deadline in it."""
    best = 0
    for size in range(1, len(requests) + 1):
        for some in itertools.combinations(requests, size):
            end = NOW + sum(seconds(model, one) for one in some)
            if end <= min(one.deadline for one in some):
                best = size
    return best


@given(st.lists(st.tuples(st.integers(0, 120), st.integers(1, 40)), max_size=7))
@settings(deadline=None)
def test_no_other_choice_has_more_in_time(drawn: list[tuple[int, int]]) -> None:
    model = LatencyModel(PROFILE)
    requests = [waiting(index, *one) for index, one in enumerate(drawn)]
    chosen = choose_together(requests, model, NOW, APART)
    some = [one for one in requests if one.sequence in chosen]
    assert NOW + math.fsum(seconds(model, one) for one in some) <= (
        min((one.deadline for one in some), default=math.inf) + 1e-9
    )
    assert len(some) == most(model, requests)


def test_who_has_time_is_never_left_out() -> None:
    requests = [waiting(index, 60_000, 8) for index in range(64)]
    assert choose_together(requests, LatencyModel(PROFILE), NOW, APART) == set(range(64))
    assert choose_together([], LatencyModel(PROFILE), NOW, APART) == set()


@pytest.mark.parametrize("short", [8, 16])
def test_nobody_is_left_out_for_a_lower_priority(short: int) -> None:
    first = waiting(0, 50, 40, priority=0)
    others = [waiting(index, 50, short, priority=1) for index in range(1, 5)]
    chosen = choose_together([*others, first], LatencyModel(PROFILE), NOW, APART)
    assert 0 in chosen
    assert len(chosen) == 1 + (short == 8)


@given(st.lists(st.integers(0, 60), max_size=9), st.sampled_from([3, 8]))
@settings(deadline=None)
def test_no_other_choice_has_more_in_time_in_calls_that_they_share(
    drawn: list[int], rows: int
) -> None:
    flat = [LatencyPoint(rows=n, length=0, median_ms=10.0, spread_ms=0.0) for n in (1, 8)]
    requests = [waiting(index, ms, 0) for index, ms in enumerate(drawn)]
    best = 0
    for size in range(1, len(drawn) + 1):
        in_time = sorted(drawn)[-size] >= 10 * math.ceil(size / rows)
        best = size if in_time else best
    chosen = choose_together(requests, LatencyModel(flat), NOW, Bounds(rows))
    assert len(chosen) == best
    assert all(drawn[index] >= 10 * math.ceil(best / rows) for index in chosen)


def test_one_who_is_late_keeps_nobody_else_out_of_the_call_that_they_share() -> None:
    flat = [LatencyPoint(rows=n, length=0, median_ms=10.0, spread_ms=0.0) for n in (1, 64)]
    late, *others = [waiting(index, 12 * bool(index), 0) for index in range(65)]
    chosen = choose_together([*others, late], LatencyModel(flat), NOW, Bounds(64))
    assert chosen == {one.sequence for one in others}
