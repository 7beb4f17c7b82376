"""Several models on one processor, and several actors of one model, in small."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.sharing import (
    Arrival,
    InOrder,
    Mix,
    Ours,
    Rule,
    closed_queue,
    mix,
    on_time,
    share_on_time,
)
from benchmarks.simulation import (
    Flags,
    Greedy,
    Server,
    Times,
    actual_of,
    arrivals_of,
    clairvoyant,
    simulate,
)
from tests.benchmarks.test_simulation import arrivals as bursts
from tests.benchmarks.test_simulation import small_servers

SERVER = Server()
PATIENT, URGENT = Server(slo_seconds=0.2), Server(slo_seconds=0.02)


def alone(
    times: Times, server: Server, ours: Callable[[Sequence[Server]], Ours] = Ours, noise: float = 0
) -> Flags:
    """Return what the scheduler answers in time of one model."""
    one = Mix([server], [Arrival(time, 0) for time in times.tolist()])
    with closing(ours([server])) as rule:
        found = on_time(rule, one, [actual_of(server, noise)])
        assert not len(rule)
    return found


def offered(rule: Ours, *arrivals: Arrival) -> Ours:
    for sequence, arrival in enumerate(arrivals):
        rule.add(sequence, arrival)
    return rule


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
    with closing(Ours(both.models)) as ours:
        assert share_on_time(ours, both) == [1.0, 1.0]


@pytest.mark.parametrize("rate", [1_800, 3_000])
def test_one_model_alone_is_the_simulation_of_one_server(rate: int) -> None:
    times = arrivals_of("mmpp", rate, 3_000, None)
    one = Mix([SERVER], [Arrival(time, 0) for time in times.tolist()])
    greedy = simulate(Greedy(SERVER), times, SERVER, actual_of(SERVER))
    found = on_time(InOrder([SERVER], by_deadline=False), one, [actual_of(SERVER)])
    assert found.tolist() == greedy.tolist()


@pytest.mark.parametrize("name", ["poisson", "mmpp"])
@pytest.mark.parametrize("rate", [2_300, 3_500])  # at, and at 1.5 times, what can be done
def test_ours_is_within_three_points_of_the_clairvoyant(name: str, rate: int) -> None:
    times = arrivals_of(name, rate, 2_000, None)
    found = alone(times, SERVER).mean()
    assert clairvoyant(times, SERVER) - found <= 0.03
    assert found >= simulate(Greedy(SERVER), times, SERVER, actual_of(SERVER)).mean()


class StepByStep(Ours):
    """Runs a whole step of the scheduler at each arrival."""

    def _hear(self, now: float) -> None:
        del now
        self._step()


@pytest.mark.parametrize("rate", [1_500, 2_300, 5_000])
def test_what_comes_while_a_call_runs_is_heard_as_in_a_whole_step(rate: int) -> None:
    times = arrivals_of("mmpp", rate, 3_000, None)
    ours, whole = (alone(times, SERVER, kind, noise=0.15) for kind in (Ours, StepByStep))
    assert ours.tolist() == whole.tolist()


@pytest.mark.parametrize("kind", ["equal", "mixed", "linear"])
def test_models_that_share_a_processor_hear_it_likewise(kind: str) -> None:
    drawn = mix(kind, skew=1, load=1.2, seconds=3, seed=7)
    found = []
    for rule in (Ours(drawn.models), StepByStep(drawn.models)):
        with closing(rule):
            found.append(on_time(rule, drawn, [actual_of(one) for one in drawn.models]).tolist())
    assert found[0] == found[1]


@settings(max_examples=60, deadline=None)
@given(times=bursts(10), server=small_servers)
def test_ours_never_beats_the_clairvoyant(times: Times, server: Server) -> None:
    assert alone(times, server).mean() <= clairvoyant(times, server) + 1e-9


@settings(max_examples=60, deadline=None)
@given(
    times=bursts(50),
    server=small_servers,
    wrong=st.floats(0.05, 20),
    more=st.floats(0, 0.02),
    noise=st.floats(0, 1),
    learns=st.booleans(),
)
def test_ours_ends_whatever_it_believes_and_whatever_calls_take(
    times: Times, server: Server, wrong: float, more: float, noise: float, learns: bool
) -> None:
    ours = partial(Ours, profiles=[server.points(wrong, more)], learns=learns)
    assert len(alone(times, server, ours, noise)) == len(times)


def test_ours_gives_up_two_where_that_serves_sixty() -> None:
    # The two have 12 ms, which a call of 8 takes; the others have 30 ms, of which 60 take 25.
    times = [1 - 0.0379] * 2 + [1 - 0.020] * 60
    with closing(Ours([SERVER])) as ours:
        offered(ours, *(Arrival(time, 0) for time in times))
        assert ours.next_call(1) == (0, list(range(2, 62)))
        assert not len(ours)


def test_ours_gives_up_nobody_where_the_rest_can_wait() -> None:
    times = [1 - 0.0379] * 2 + [1 - 0.001] * 10
    with closing(Ours([SERVER])) as ours:
        offered(ours, *(Arrival(time, 0) for time in times))
        assert ours.next_call(1) == (0, list(range(8)))
        assert len(ours) == 4


def test_ours_refuses_at_once_what_cannot_be_answered_any_more() -> None:
    with closing(Ours([SERVER])) as ours:
        offered(ours, Arrival(0.0, 0))
        assert ours.next_call(0.0) == (0, [0])
        ours.ran(0, 1, SERVER.tau(1))
        for sequence in range(1, 1_000):  # a call of 128 takes 42 ms
            ours.add(sequence, Arrival(0.001, 0))
        assert len(ours) < 150


def test_ours_serves_first_whom_nobody_has_served_for_a_second() -> None:
    often, rare = Server(0.001, 0.0001, slo_seconds=0.02), Server(0.9, 0.0, slo_seconds=5)
    with closing(Ours([often, rare])) as ours:
        ours.add(0, Arrival(0.0, 1))
        now, calls = 0.0, list[tuple[float, int]]()
        for first in range(1, 10_001, 100):
            for sequence in range(first, first + 100):
                ours.add(sequence, Arrival(now, 0))
            model, sequences = ours.next_call(now)
            calls.append((now, model))
            seconds = (often, rare)[model].tau(len(sequences))
            ours.ran(model, len(sequences), seconds)
            now += seconds
    (started,) = [at for at, model in calls if model == 1]
    # Its own deadline is far away, and the other one is worth more per second.
    assert 1 <= started <= 1.02


def test_ours_tries_a_model_that_was_not_seen_for_a_second() -> None:
    times = np.arange(400) / 100
    ours = partial(Ours, profiles=[SERVER.points(wrong=10)])
    found = alone(times, SERVER, ours)
    assert not found[times < 1].any()
    assert found[100]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["equal", "mixed", "linear"]),
    st.floats(0, 3),
    st.floats(0.1, 3),
    st.integers(0, 1_000),
)
def test_every_rule_comes_to_an_end(kind: str, skew: float, load: float, seed: int) -> None:
    drawn = mix(kind, skew, load, 0.3, seed)
    with closing(Ours(drawn.models)) as ours:
        rules: list[Rule] = [
            InOrder(drawn.models, by_deadline=False),
            InOrder(drawn.models, by_deadline=True, drops=True),
            ours,
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
