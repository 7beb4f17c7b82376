from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrai_core.artifact import LatencyPoint
from lrai_core.scheduler.latency import LatencyModel
from lrai_core.scheduler.planner import Bounds, Decision, Waiting, plan

NOW = 100.0
WIDE = Bounds(rows=1000)
SLACK = 1e-9


def model(fixed: float, linear: float = 0.0, quadratic: float = 0.0) -> LatencyModel:
    """Return a model of calls with costs per call, per element, and per element and length."""
    return LatencyModel(
        [
            LatencyPoint(
                rows=r,
                length=n,
                median_ms=1e3 * (fixed + linear * r * n + quadratic * r * n * n),
                spread_ms=0.0,
            )
            for r in (1, 8)
            for n in (8, 64)
        ]
    )


CHEAP_TOGETHER = model(10e-3, 1e-6)
NO_GAIN = LatencyModel([LatencyPoint(rows=1, length=0, median_ms=5.0, spread_ms=0.0)])


def waiting(
    length: int = 8, *, rows: int = 1, group: str = "g", left: float = 60, alone: bool = False
) -> Waiting:
    return Waiting(group, rows, length, NOW + left, alone)


def decide(
    queue: list[Waiting], latency: LatencyModel = CHEAP_TOGETHER, bounds: Bounds = WIDE
) -> Decision:
    return plan(queue, latency, NOW, bounds)


def test_an_empty_queue_needs_nothing() -> None:
    assert decide([]) == Decision((), (), 0.0)


def test_requests_run_together_where_that_is_faster() -> None:
    assert decide([waiting(), waiting(), waiting()]).dispatch == (0, 1, 2)


def test_requests_run_one_by_one_where_coalescing_does_not_pay() -> None:
    assert decide([waiting(0)] * 5, NO_GAIN).dispatch == (0,)


def test_a_learned_cost_around_the_call_makes_coalescing_pay() -> None:
    latency = LatencyModel([LatencyPoint(rows=1, length=0, median_ms=5.0, spread_ms=0.0)])
    latency.observe(total_seconds=0.006, engine_seconds=0.005)
    assert decide([waiting(0)] * 5, latency).dispatch == (0, 1, 2, 3, 4)


def test_padding_that_costs_more_than_it_saves_is_left_out() -> None:
    latency = model(1e-3, 1e-5)
    queue = [waiting(10), waiting(500), waiting(12)]
    assert decide(queue, latency).dispatch == (0, 2)


def test_the_nearest_lengths_join_first() -> None:
    queue = [waiting(30), waiting(8), waiting(31), waiting(60), waiting(29)]
    assert decide(queue, bounds=Bounds(rows=3)).dispatch == (0, 2, 4)


def test_other_groups_wait_for_their_own_call() -> None:
    queue = [waiting(group="a"), waiting(group="b"), waiting(group="a")]
    assert decide(queue).dispatch == (0, 2)


def test_rows_and_padded_elements_are_bounded() -> None:
    assert decide([waiting(rows=3)] * 5, bounds=Bounds(rows=7)).dispatch == (0, 1)
    assert decide([waiting(10)] * 5, bounds=Bounds(rows=99, elements=30)).dispatch == (0, 1, 2)
    assert decide([waiting(5), waiting(20)], bounds=Bounds(99, elements=39)).dispatch == (0,)


def test_a_large_request_does_not_keep_those_behind_it_out() -> None:
    queue = [waiting(rows=3), waiting(rows=6), waiting(rows=2), waiting(rows=3)]
    assert decide(queue, bounds=Bounds(rows=8)).dispatch == (0, 2, 3)


def test_a_request_over_the_bounds_runs_alone_rather_than_never() -> None:
    queue = [waiting(100, rows=50), waiting()]
    assert decide(queue, bounds=Bounds(rows=8, elements=10)).dispatch == (0,)


def test_what_failed_before_runs_alone_and_joins_nobody() -> None:
    assert decide([waiting(alone=True), waiting()]).dispatch == (0,)
    assert decide([waiting(), waiting(alone=True), waiting()]).dispatch == (0, 2)


def test_what_cannot_be_answered_in_time_is_dropped_before_it_costs_anything() -> None:
    queue = [waiting(left=0.001), waiting(left=-1), waiting()]
    decision = decide(queue)
    assert (decision.dispatch, decision.drop) == ((2,), (0, 1))


def test_nobody_joins_who_would_make_another_late() -> None:
    latency = model(10e-3, 1e-4)
    tight = latency.call_seconds(1, 8) + 1e-4
    assert decide([waiting(left=tight), waiting()], latency).dispatch == (0,)
    assert decide([waiting(), waiting(left=tight), waiting()], latency).dispatch == (0, 2)


@st.composite
def queues(draw: st.DrawFn) -> list[Waiting]:
    one = st.builds(
        Waiting,
        st.sampled_from(["a", "b"]),
        st.integers(1, 20),
        st.integers(1, 64),
        st.sampled_from([NOW - 1, NOW, NOW + 0.005, NOW + 0.05, NOW + 60, math.inf]),
        st.booleans() if draw(st.booleans()) else st.just(value=False),
    )
    return draw(st.lists(one, max_size=12))


MODELS = st.builds(model, st.floats(1e-5, 0.02), st.floats(0, 1e-4), st.floats(0, 1e-6))
BOUNDS = st.builds(Bounds, st.integers(1, 64), st.sampled_from([0, 1, 100, 1000]))


def violations(
    queue: list[Waiting], decision: Decision, latency: LatencyModel, bounds: Bounds
) -> list[str]:
    """Return every promise of the planner that the decision breaks."""
    chosen = [queue[index] for index in decision.dispatch]
    rows, length = sum(one.rows for one in chosen), max((one.length for one in chosen), default=0)
    together = latency.call_seconds(rows, length)
    apart = sum(latency.call_seconds(one.rows, one.length) for one in chosen)
    rest = [index for index in range(len(queue)) if index not in decision.drop]
    several = len(chosen) > 1
    promises = {
        "nothing is decided twice": len({*decision.dispatch, *decision.drop})
        == len(decision.dispatch) + len(decision.drop),
        "in order of arrival": list(decision.dispatch) == sorted(decision.dispatch),
        "something happens": bool(decision.dispatch or decision.drop) == bool(queue),
        "the oldest is served": decision.dispatch[:1] == tuple(rest[:1]),
        "one group": len({one.group for one in chosen}) <= 1,
        "within the rows": not several or rows <= bounds.rows,
        "within the elements": not several
        or not bounds.elements
        or rows * length <= bounds.elements,
        "alone means alone": not several or not any(one.alone for one in chosen),
        "never slower than one by one": together <= apart + SLACK or not several,
        "no deadline is crossed": not several
        or all(NOW + together <= one.deadline + SLACK for one in chosen),
        "only the hopeless are dropped": all(
            NOW + latency.engine_seconds(queue[i].rows, queue[i].length) > queue[i].deadline
            for i in decision.drop
        ),
        "the prediction is the model's": not chosen
        or decision.predicted_seconds == pytest.approx(together),
    }
    return [promise for promise, kept in promises.items() if not kept]


@given(queues(), MODELS, BOUNDS)
def test_every_decision_keeps_every_promise(
    queue: list[Waiting], latency: LatencyModel, bounds: Bounds
) -> None:
    before = list(queue)
    decision = plan(queue, latency, NOW, bounds)
    assert violations(queue, decision, latency, bounds) == []
    assert queue == before
    assert plan(queue, latency, NOW, bounds) == decision


@given(queues(), MODELS, BOUNDS)
def test_a_queue_is_emptied_with_every_request_decided_once(
    queue: list[Waiting], latency: LatencyModel, bounds: Bounds
) -> None:
    left, decided = list(enumerate(queue)), list[int]()
    while left:
        decision = plan([one for _, one in left], latency, NOW, bounds)
        gone = {*decision.dispatch, *decision.drop}
        assert gone
        decided += [left[index][0] for index in gone]
        left = [entry for index, entry in enumerate(left) if index not in gone]
    assert sorted(decided) == list(range(len(queue)))
