"""Several models on one processor, and several actors of one model, in small."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.sharing import Arrival, InOrder, Mix, Ours, Rule, closed_queue, mix, share_on_time
from benchmarks.simulation import Greedy, Server, actual_of, arrivals_of, simulate
from benchmarks.simulation import Ours as OneServer

PATIENT, URGENT = Server(slo_seconds=0.2), Server(slo_seconds=0.02)


def test_greedy_goes_by_arrival_and_edf_by_deadline() -> None:
    arrivals = [Arrival(0.0, 0), Arrival(0.001, 1), Arrival(0.002, 0)]
    chosen = []
    for by_deadline in (False, True):
        rule = InOrder([PATIENT, URGENT], by_deadline=by_deadline)
        for sequence, arrival in enumerate(arrivals):
            rule.add(sequence, arrival)
        chosen.append(rule.next_call(0.002))
        assert len(rule) == 3 - len(chosen[-1][1])
    assert chosen == [(0, [0, 2]), (1, [1])]


def test_what_is_late_is_given_up_only_by_the_rule_that_drops() -> None:
    for drops, expected in ((False, (1, [0])), (True, (0, ()))):
        rule = InOrder([PATIENT, URGENT], by_deadline=True, drops=drops)
        rule.add(0, Arrival(0.0, 1))
        assert rule.next_call(0.015) == expected
        assert not len(rule)


def test_a_model_is_served_in_time_that_the_others_let_wait() -> None:
    arrivals = [*(Arrival(0.0, 0) for _ in range(100)), Arrival(0.0, 1)]
    both = Mix([Server(0.01, 0.0005, slo_seconds=0.2), URGENT], arrivals)
    assert share_on_time(InOrder(both.models, by_deadline=False), both) == [1.0, 0.0]
    assert share_on_time(InOrder(both.models, by_deadline=True), both) == [1.0, 1.0]
    assert share_on_time(Ours(both.models), both) == [1.0, 1.0]


@pytest.mark.parametrize("rate", [1_800, 3_000])
def test_one_model_alone_is_the_simulation_of_one_server(rate: int) -> None:
    server = Server()
    times = arrivals_of("mmpp", rate, 3_000, None)
    one = Mix([server], [Arrival(time, 0) for time in times.tolist()])
    greedy = simulate(Greedy(server), times, server, actual_of(server))
    ours = simulate(OneServer(server), times, server, actual_of(server))
    for rule, expected in ((InOrder([server], by_deadline=False), greedy), (Ours([server]), ours)):
        assert share_on_time(rule, one) == [pytest.approx(expected.mean())]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["equal", "mixed", "linear"]),
    st.floats(0, 3),
    st.floats(0.1, 3),
    st.integers(0, 1_000),
)
def test_every_rule_comes_to_an_end(kind: str, skew: float, load: float, seed: int) -> None:
    drawn = mix(kind, skew, load, 0.3, seed)
    rules: list[Rule] = [
        InOrder(drawn.models, by_deadline=False),
        InOrder(drawn.models, by_deadline=True, drops=True),
        Ours(drawn.models),
    ]
    for rule in rules:
        shares = share_on_time(rule, drawn)
        assert len(shares) == len(drawn.models) == 8
        assert all(0 <= share <= 1 for share in shares)
        assert not len(rule)


def test_a_mix_is_skewed_loaded_and_in_order() -> None:
    drawn = mix("equal", skew=1, load=0.5, seconds=20, seed=1)
    times = [arrival.time for arrival in drawn.arrivals]
    assert times == sorted(times)
    asked = np.sort(np.bincount([arrival.model for arrival in drawn.arrivals]))
    assert asked[-1] / asked[-2] == pytest.approx(2, rel=0.15)
    seconds = len(times) * drawn.models[0].tau(8) / 8
    assert seconds / 20 == pytest.approx(0.5, rel=0.1)


def test_a_closed_queue_keeps_one_actor_full_and_shares_by_speed() -> None:
    fast, slow = Server(slo_seconds=0.5), Server(0.02, 0.0005, slo_seconds=0.5)
    alone = [closed_queue([actor], 256, 5.0) for actor in (fast, slow)]
    assert alone[0] == pytest.approx(128 / fast.tau(128))
    assert alone[1] == pytest.approx(alone[0] / 2)
    assert closed_queue([slow, fast], 256, 5.0) == pytest.approx(sum(alone), rel=0.02)
    assert closed_queue([fast], 8, 5.0) == pytest.approx(8 / fast.tau(8))
