from __future__ import annotations

import math
from collections.abc import Iterable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrai_core.artifact import LatencyPoint
from lrai_core.scheduler import planner
from lrai_core.scheduler.latency import LatencyModel
from lrai_core.scheduler.planner import Bounds, Decision, Offer, choose, plan
from lrai_core.scheduler.waiting import Queue, Waiting

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
    length: int = 8, *, rows: int = 1, group: str = "g", left: float = 60, priority: int = 0
) -> Waiting:
    return Waiting(priority, NOW + left, -1, NOW + left, group, rows, length)


def numbered(requests: Iterable[Waiting]) -> list[Waiting]:
    return [one._replace(sequence=index) for index, one in enumerate(requests)]


def queue_of(requests: Iterable[Waiting]) -> Queue:
    queue = Queue()
    for one in requests:
        queue.add(one)
    return queue


def decide(
    requests: list[Waiting], latency: LatencyModel = CHEAP_TOGETHER, bounds: Bounds = WIDE
) -> Decision:
    return plan(queue_of(numbered(requests)), latency, NOW, bounds)


def dispatched(
    requests: list[Waiting], latency: LatencyModel = CHEAP_TOGETHER, bounds: Bounds = WIDE
) -> list[int]:
    return sorted(decide(requests, latency, bounds).dispatch)


def test_an_empty_queue_needs_nothing() -> None:
    assert decide([]) == Decision((), (), 0.0)


def test_requests_run_together_where_that_is_faster() -> None:
    assert dispatched([waiting(), waiting(), waiting()]) == [0, 1, 2]


def test_requests_run_one_by_one_where_coalescing_does_not_pay() -> None:
    assert dispatched([waiting(0)] * 5, NO_GAIN) == [0]


def test_a_learned_cost_around_the_call_makes_coalescing_pay() -> None:
    latency = LatencyModel([LatencyPoint(rows=1, length=0, median_ms=5.0, spread_ms=0.0)])
    latency.observe(1, 0, total_seconds=0.006, seconds=0.005)
    assert dispatched([waiting(0)] * 5, latency) == [0, 1, 2, 3, 4]


def test_what_is_in_time_by_less_than_the_model_may_be_wrong_is_late() -> None:
    latency = LatencyModel([LatencyPoint(rows=1, length=0, median_ms=10.0, spread_ms=0.0)])
    assert dispatched([waiting(0, left=0.0105)], latency) == [0]
    latency.margin = 1.1
    assert decide([waiting(0, left=0.0105)], latency).drop == (0,)
    assert dispatched([waiting(0, left=0.0115)], latency) == [0]


@pytest.mark.parametrize("seconds", [math.nan, math.inf])
def test_a_prediction_that_is_no_number_is_an_error(seconds: float) -> None:
    latency = LatencyModel([])
    latency.overhead_seconds = seconds
    with pytest.raises(ValueError, match=f"predicted {seconds} seconds"):
        decide([waiting(0)], latency)


def test_padding_that_costs_more_than_it_saves_is_left_out() -> None:
    latency = model(1e-3, 1e-5)
    queue = [waiting(10), waiting(500), waiting(12)]
    assert dispatched(queue, latency) == [0, 2]


def test_the_nearest_lengths_join_first() -> None:
    queue = [waiting(30), waiting(8), waiting(31), waiting(60), waiting(29)]
    assert dispatched(queue, bounds=Bounds(rows=3)) == [0, 2, 4]


def test_other_groups_wait_for_their_own_call() -> None:
    queue = [waiting(group="a"), waiting(group="b"), waiting(group="a")]
    assert dispatched(queue) == [0, 2]


def test_rows_and_padded_elements_are_bounded() -> None:
    assert dispatched([waiting(rows=3)] * 5, bounds=Bounds(rows=7)) == [0, 1]
    assert dispatched([waiting(10)] * 5, bounds=Bounds(rows=99, elements=30)) == [0, 1, 2]
    assert dispatched([waiting(5), waiting(20)], bounds=Bounds(99, elements=39)) == [0]


def test_a_large_request_does_not_keep_those_behind_it_out() -> None:
    queue = [waiting(rows=3), waiting(rows=6), waiting(rows=2), waiting(rows=3)]
    assert dispatched(queue, bounds=Bounds(rows=8)) == [0, 2, 3]


def test_a_request_over_the_bounds_runs_alone_rather_than_never() -> None:
    queue = [waiting(100, rows=50), waiting()]
    assert dispatched(queue, bounds=Bounds(rows=8, elements=10)) == [0]


def test_what_cannot_be_answered_in_time_is_dropped_before_it_costs_anything() -> None:
    queue = [waiting(left=0.001), waiting(left=-1), waiting()]
    decision = decide(queue)
    assert (decision.dispatch, sorted(decision.drop)) == ((2,), [0, 1])


def test_nobody_joins_who_would_make_another_late() -> None:
    latency = model(10e-3, 1e-4)
    tight = latency.call_seconds(1, 8) + 1e-4
    assert dispatched([waiting(left=tight), waiting()], latency) == [0]
    assert dispatched([waiting(), waiting(left=tight), waiting()], latency) == [1]


def test_who_is_due_first_leads_whenever_it_came() -> None:
    queue = [waiting(8), waiting(64, left=1), waiting(9)]
    assert dispatched(queue, model(1e-6, 1e-4)) == [1]


def test_a_lower_number_is_served_first_and_never_given_up_for_others() -> None:
    steep = model(10e-3, 1e-4)
    tight = steep.call_seconds(1, 8) + 1e-4
    queue = [waiting(priority=1) for _ in range(50)] + [waiting(left=tight, priority=0)]
    assert decide(queue, steep) == Decision((50,), (), steep.call_seconds(1, 8), NOW + tight)


def test_who_leaves_room_for_a_small_call_only_is_given_up_for_a_large_one() -> None:
    steep = model(10e-3, 1e-4)
    tight = steep.call_seconds(1, 8) + 1e-4
    queue = [waiting(left=tight)] + [waiting(left=tight * 5) for _ in range(30)]
    decision = decide(queue, steep)
    assert decision.drop == (0,)
    assert len(decision.dispatch) == 30


def test_nobody_is_given_up_while_the_others_have_time() -> None:
    steep = model(10e-3, 1e-4)
    tight = steep.call_seconds(1, 8) + 1e-4
    queue = [waiting(left=tight)] + [waiting(left=tight * 20) for _ in range(30)]
    assert decide(queue, steep) == Decision((0,), (), steep.call_seconds(1, 8), NOW + tight)


def test_nobody_is_given_up_for_one_who_is_late_whatever_is_done() -> None:
    costly = model(15e-3, 1e-5)
    late = waiting(group="b", left=-1, priority=1)
    queue = [waiting(19, group="b", left=0.05), waiting(1, group="a", left=0.05), late]
    decision = decide(queue, costly)
    assert (decision.dispatch, decision.drop) == ((0,), ())


def test_nobody_is_given_up_where_a_larger_call_serves_no_more_per_second() -> None:
    queue = [waiting(0, left=0.006)] + [waiting(0, left=1) for _ in range(30)]
    decision = decide(queue, NO_GAIN)
    assert (decision.dispatch, decision.drop) == ((0,), ())


def test_the_longest_waits_where_not_all_can_be_in_time() -> None:
    latency = model(1e-6, 1e-3)  # a millisecond for each element: 64 for the long one
    short = [waiting(8, left=0.080 + index / 1e4) for index in range(5)]
    decision = decide([waiting(64, left=0.070), *short], latency)
    assert (decision.dispatch[0], decision.drop) == (1, ())


def test_the_longest_is_served_in_turn_where_all_can_be_in_time() -> None:
    latency = model(1e-6, 1e-3)
    short = [waiting(8, left=0.080 + index / 1e4) for index in range(2)]
    assert decide([waiting(64, left=0.070), *short], latency).dispatch[0] == 0
    late = [waiting(8, left=0.120 + index / 1e4) for index in range(5)]
    assert decide([waiting(64, left=0.070), *late], latency).dispatch[0] == 0


def test_the_longest_does_not_wait_for_those_of_a_lower_priority() -> None:
    latency = model(1e-6, 1e-3)
    short = [waiting(8, left=0.080 + index / 1e4, priority=1) for index in range(5)]
    assert decide([waiting(64, left=0.070), *short], latency).dispatch[0] == 0


def test_nobody_waits_because_of_equal_lengths_that_are_too_many() -> None:
    latency = model(1e-6, 1e-3)
    queue = [waiting(8, left=0.020 + index / 1e4) for index in range(9)]
    assert decide(queue, latency).dispatch[0] == 0


def test_the_queue_knows_its_deadlines_and_forgets_who_left() -> None:
    queue = queue_of(numbered([waiting(left=3), waiting(left=1), waiting(left=2)]))
    assert (list(queue), queue.next_deadline()) == ([1, 2, 0], NOW + 1)
    for _ in range(2):  # who has left already is no fault
        queue.remove(1)
    assert (queue.expire(NOW + 1.5), queue.next_deadline()) == ([], NOW + 2)
    assert (queue.expire(NOW + 2), list(queue), len(queue)) == ([2], [0], 1)
    queue.remove(0)
    assert queue.next_deadline() == math.inf


def test_who_left_is_forgotten_though_somebody_due_sooner_waits() -> None:
    queue = queue_of(numbered([waiting(left=1), *[waiting(left=1e9)] * 999]))
    for sequence in range(1, 998):
        queue.remove(sequence)
    assert len(queue._deadlines) < 100
    assert (queue.next_deadline(), list(queue)) == (NOW + 1, [0, 998, 999])
    assert queue.expire(NOW + 1) == [0]
    assert queue.next_deadline() == NOW + 1e9


def test_models_take_turns_by_deadline_and_in_need_the_least_serving_waits() -> None:
    slow, quick = Offer(NOW + 1.0, 0.9, 1), Offer(NOW + 1.1, 0.2, 8)
    assert choose([quick, slow], NOW) == 0  # both cannot end in time: 1 request against 8
    assert choose([quick, slow._replace(seconds=0.7)], NOW) == 1  # both can: who is due first
    # Worth half decides between these, and not for eight to one.
    rival = Offer(NOW + 1.1, 0.6, 1)
    assert choose([rival, slow], NOW) == 0
    assert choose([rival._replace(worth=0.5), slow], NOW) == 1
    assert choose([quick._replace(worth=4), slow], NOW) == 0
    assert choose([slow._replace(due=NOW)], NOW) == 0  # better late than never


@given(st.lists(st.builds(
    Offer, st.floats(NOW, NOW + 1), st.floats(1e-4, 1), st.floats(1e-3, 1e9)
), min_size=1, max_size=8))  # fmt: skip
def test_some_model_is_always_chosen(offers: list[Offer]) -> None:
    assert choose(offers, NOW) in range(len(offers))


@st.composite
def queues(draw: st.DrawFn) -> list[Waiting]:
    left = st.sampled_from([-1, 0, 0.005, 0.05, 60, math.inf])
    one = st.builds(
        lambda length, rows, group, left, priority: waiting(
            length, rows=rows, group=group, left=left, priority=priority
        ),
        st.integers(1, 64),
        st.integers(1, 20),
        st.sampled_from(["a", "b"]),
        left,
        st.integers(0, 2) if draw(st.booleans()) else st.just(0),
    )
    return numbered(draw(st.lists(one, max_size=12)))


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
    order = [one.sequence for one in sorted(queue)]
    several = len(chosen) > 1
    before = order[: order.index(chosen[0].sequence)] if chosen else []
    passed = [index for index in before if index not in decision.drop]
    work = [(one.rows * one.length, one.rows * one.length**2) for one in queue]
    needless = [
        index
        for index in decision.drop
        if NOW + latency.engine_seconds(queue[index].rows, queue[index].length)
        <= queue[index].deadline
    ]
    promises = {
        "nothing is decided twice": len({*decision.dispatch, *decision.drop})
        == len(decision.dispatch) + len(decision.drop),
        "something happens": bool(decision.dispatch or decision.drop) == bool(queue),
        "the most urgent are dropped": list(decision.drop)
        == [index for index in order if index not in passed][: len(decision.drop)],
        "the most urgent of the rest leads": not chosen
        or decision.dispatch[0]
        == [index for index in order if index not in passed][len(decision.drop)],
        "only what is more work is passed over": all(
            any(
                less < more for other in work for less, more in zip(other, work[index], strict=True)
            )
            for index in passed
        ),
        "nobody is passed over for a lower priority": {queue[index].priority for index in passed}
        <= {one.priority for one in chosen[:1]},
        "one group": len({one.group for one in chosen}) <= 1,
        "within the rows": not several or rows <= bounds.rows,
        "within the elements": not several
        or not bounds.elements
        or rows * length <= bounds.elements,
        "never slower than one by one": together <= apart + SLACK or not several,
        "no deadline is crossed": not several
        or all(NOW + together <= one.deadline + SLACK for one in chosen),
        "who is given up makes room for more": not needless or len(chosen) > 1,
        "nobody is given up for a lower priority": not needless
        or {queue[index].priority for index in needless} == {chosen[0].priority},
        "the prediction is the model's": not chosen
        or decision.predicted_seconds == pytest.approx(together),
        "due with the first": not chosen or decision.due == min(one.deadline for one in chosen),
    }
    return [promise for promise, kept in promises.items() if not kept]


@given(queues(), MODELS, BOUNDS)
def test_every_decision_keeps_every_promise(
    queue: list[Waiting], latency: LatencyModel, bounds: Bounds
) -> None:
    waits = queue_of(queue)
    decision = plan(waits, latency, NOW, bounds)
    assert violations(queue, decision, latency, bounds) == []
    assert list(waits) == [one.sequence for one in sorted(queue)]
    assert plan(waits, latency, NOW, bounds) == decision


@given(queues(), MODELS, BOUNDS)
def test_a_queue_is_emptied_with_every_request_decided_once(
    queue: list[Waiting], latency: LatencyModel, bounds: Bounds
) -> None:
    waits, decided = queue_of(queue), list[int]()
    while len(waits):
        decision = plan(waits, latency, NOW, bounds)
        gone = [*decision.dispatch, *decision.drop]
        assert gone
        before = len(waits)
        for sequence in gone:
            waits.remove(sequence)
        assert len(waits) == before - len(gone)
        decided += gone
    assert sorted(decided) == list(range(len(queue)))


@pytest.mark.parametrize("left", [0.02, 60.0])  # seconds of the first: too few for all, and enough
def test_a_plan_asks_hardly_more_where_ten_times_as_many_wait(
    left: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[tuple[int, int]]()

    def look_up(costs: dict[tuple[int, int], float], call: tuple[int, int]) -> float:
        asked.append(call)
        return dict.__getitem__(costs, call)

    monkeypatch.setattr(planner._Costs, "__getitem__", look_up)

    def cost(count: int) -> int:
        chance = Random(0)
        queue = [
            waiting(chance.randint(28, 36), left=chance.uniform(left, 2 * left))
            for _ in range(count)
        ]
        asked.clear()
        assert decide(queue, model(10e-3, 1e-4), Bounds(rows=64)).dispatch
        return len(asked)

    assert cost(10_000) < 2 * cost(1_000)
