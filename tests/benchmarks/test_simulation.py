"""The simulated server: its optimum against brute force, and the policies on cases done by hand."""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulation import (
    TICK,
    Bento,
    Greedy,
    Nexus,
    Policy,
    Server,
    Static,
    Times,
    actual_of,
    arrivals_of,
    clairvoyant,
    fastest_rate,
    simulate,
)

SERVER = Server()
POLICIES: tuple[Callable[[Server], Policy], ...] = (
    Greedy,
    Nexus,
    Bento,
    lambda server: Static(2, 0.003),
)

small_servers = st.builds(
    Server,
    call_seconds=st.integers(1, 8).map(lambda ms: ms / 1e3),
    row_seconds=st.integers(1, 8).map(lambda quarters: quarters / 4e3),
    most_rows=st.integers(2, 8),
    slo_seconds=st.integers(4, 40).map(lambda ms: ms / 1e3),
)


def arrivals(count: int) -> st.SearchStrategy[Times]:
    """Bursts, at whole milliseconds, so that ties and exact fits are common."""
    gaps = st.lists(st.sampled_from([0, 0, 0, 1, 1, 2, 9]), min_size=count, max_size=count)
    return gaps.map(lambda ms: np.cumsum(ms) / 1e3)


def best_of_all_schedules(times: Times, server: Server) -> float:
    """Try every order of every set of calls, each started as soon as it can."""
    indices = range(len(times))
    calls = [
        frozenset(call)
        for size in range(1, server.most_rows + 1)
        for call in itertools.combinations(indices, size)
    ]

    @functools.cache
    def most(free: float, left: frozenset[int]) -> int:
        best = 0
        for call in calls:
            if call <= left:
                end = max(free, *(times[i] for i in call)) + server.tau(len(call))
                if end <= min(times[i] for i in call) + server.slo_seconds + TICK:
                    best = max(best, len(call) + most(end, left - call))
        return best

    return most(0.0, frozenset(indices)) / len(times)


def best_in_order(times: Times, server: Server) -> float:
    """Look through every state of the dynamic program; none is left out."""
    states: list[dict[int, float]] = [{0: 0.0}, *({} for _ in times)]  # drops to earliest finish

    def reach(index: int, drops: int, finish: float) -> None:
        states[index][drops] = min(finish, states[index].get(drops, math.inf))

    for index, arrival in enumerate(times):
        for drops, finish in states[index].items():
            reach(index + 1, drops + 1, finish)
            for rows in range(1, min(server.most_rows, len(times) - index) + 1):
                end = max(finish, times[index + rows - 1]) + server.tau(rows)
                if end <= arrival + server.slo_seconds + TICK:
                    reach(index + rows, drops, end)
    return 1 - min(states[-1]) / len(times)


@settings(max_examples=150, deadline=None)
@given(arrivals(7), small_servers)
def test_no_schedule_beats_the_clairvoyant_and_one_equals_it(times: Times, server: Server) -> None:
    assert clairvoyant(times, server) == pytest.approx(best_of_all_schedules(times, server))


@settings(max_examples=80, deadline=None)
@given(arrivals(50), small_servers)
def test_the_clairvoyant_loses_nothing_by_what_it_leaves_out(times: Times, server: Server) -> None:
    assert clairvoyant(times, server) == pytest.approx(best_in_order(times, server))


@pytest.mark.parametrize("rate", [2_500, 4_000])
def test_the_clairvoyant_is_exact_on_the_server_that_is_simulated(rate: int) -> None:
    times = arrivals_of("mmpp", rate, 150, None)
    assert clairvoyant(times, SERVER) == pytest.approx(best_in_order(times, SERVER))


@settings(max_examples=60, deadline=None)
@given(arrivals(50), small_servers, st.sampled_from(POLICIES))
def test_every_policy_ends_and_none_beats_the_clairvoyant(
    times: Times, server: Server, policy: Callable[[Server], Policy]
) -> None:
    found = simulate(policy(server), times, server, actual_of(server))
    assert len(found) == len(times)
    assert found.mean() <= clairvoyant(times, server) + 1e-9


def waiting(*waited_ms: float, now: float) -> deque[float]:
    return deque(now - ms / 1e3 for ms in waited_ms)


def test_greedy_runs_all_that_waits_up_to_the_most_rows() -> None:
    assert Greedy(SERVER).decide(waiting(3, 2, 1, now=1), 1)[:2] == (0, 3)
    assert Greedy(SERVER).decide(waiting(*[1] * 200, now=1), 1)[:2] == (0, 128)


def test_static_waits_for_its_rows_or_its_delay() -> None:
    static = Static(3, 0.01)
    assert static.decide(deque([1.0]), 1.004) == (0, 0, 1.0 + 0.01)
    assert static.decide(waiting(4, 3, 2, 1, now=1), 1)[:2] == (0, 3)
    assert static.decide(waiting(10, now=1), 1)[:2] == (0, 1)


def test_nexus_skips_to_the_first_whose_whole_window_ends_in_time() -> None:
    # Of 60 rows a call takes 25 ms, half of the SLO: that is the window.
    assert Nexus(SERVER).decide(waiting(*[1] * 100, now=1), 1)[:2] == (0, 60)
    assert Nexus(SERVER).decide(waiting(*[26] * 5, *[24] * 70, now=1), 1)[:2] == (5, 60)
    # The window is shorter where less waits: 10 rows take 12.5 ms.
    assert Nexus(SERVER).decide(waiting(*[40] * 3, *[37] * 10, now=1), 1)[:2] == (3, 10)
    assert Nexus(SERVER).decide(waiting(45, 44, now=1), 1)[:2] == (2, 0)


def test_bentoml_drops_the_oldest_that_would_be_late_with_all_that_waits() -> None:
    bento = Bento(SERVER)
    queue = waiting(*[20] * 90, now=1)  # 20 + 10 + .25 n < 50 ms from 79 on
    dropped = 0
    while (decision := bento.decide(queue, 1))[0]:
        queue.popleft()
        dropped += 1
    assert (dropped, decision[1]) == (11, 79)


def test_bentoml_never_drops_a_single_one_that_is_not_late_yet() -> None:
    assert Bento(SERVER).decide(waiting(49, now=1), 1)[:2] == (0, 1)
    assert Bento(SERVER).decide(waiting(50, now=1), 1)[:2] == (1, 0)


def test_bentoml_waits_a_millisecond_at_a_time_while_few_are_there_for_its_averages() -> None:
    bento = Bento(SERVER)
    for call in range(50):  # in all of them the oldest waited 20 ms
        now, rows = 1 + call / 10, 2 + call % 2
        assert bento.decide(waiting(*[20] * rows, now=now), now)[1] == rows
        bento.observe(rows, SERVER.tau(rows))
    # n x (newest + 1 ms + .25 ms) <= .95 x 20 ms
    assert bento.decide(waiting(5, 4, 3, now=10), 10) == (0, 0, 10 + 0.001)
    assert bento.decide(waiting(5.5, 4.5, 3.5, 0, now=10.0005), 10.0005)[:2] == (0, 0)  # asleep
    assert bento.decide(waiting(7.2, 6.2, 5.2, now=10.002), 10.002)[:2] == (0, 3)
    assert bento.decide(waiting(*[0] * 15, now=11), 11)[:2] == (0, 0)
    assert bento.decide(waiting(*[0] * 16, now=12), 12)[:2] == (0, 16)


def test_a_late_answer_does_not_count() -> None:
    times = np.array([0.0, 0.001])
    found = simulate(Greedy(SERVER), times, SERVER, lambda rows, start: 0.03)
    assert found.tolist() == [True, False]


@pytest.mark.parametrize("noise", [0.05, 0.15])
def test_noise_keeps_the_mean_and_belongs_to_the_seed_and_the_moment(noise: float) -> None:
    first, again, other = (
        actual_of(SERVER, noise, 3),
        actual_of(SERVER, noise, 3),
        actual_of(SERVER, noise, 4),
    )
    starts = [0.003 * call for call in range(4_000)]
    drawn = [first(8, start) / SERVER.tau(8) for start in starts]
    backwards = [again(4, start) / SERVER.tau(4) for start in reversed(starts)]
    assert drawn == pytest.approx(backwards[::-1])
    assert drawn != pytest.approx([other(8, start) / SERVER.tau(8) for start in starts], rel=0.01)
    assert np.mean(drawn) == pytest.approx(1, abs=0.01)
    assert np.std(drawn) == pytest.approx(noise, rel=0.1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    traces = tmp_path / "traces"
    traces.mkdir()
    stamps = [f"2023-11-16 18:15:{second:02}.{second}000000,3,4" for second in range(10, 40)]
    (traces / "azure_llm_conv.csv").write_text("\n".join(["TIMESTAMP,In,Out", *stamps]))
    counts = [str(40 + 30 * (second % 3)) for second in range(200)]
    (traces / "twitter_requests_per_second.csv").write_text("\n".join(["count", *counts]))
    return tmp_path


@pytest.mark.parametrize("name", ["poisson", "mmpp", "azure", "twitter"])
def test_a_process_is_the_same_at_every_rate_only_faster(name: str, data: Path) -> None:
    slow, fast = (arrivals_of(name, rate, 3_000, data) for rate in (100, 250))
    assert np.all(np.diff(slow) >= 0)
    assert slow == pytest.approx(fast * 2.5)
    assert len(slow) / slow[-1] == pytest.approx(100)


def test_a_trace_needs_its_folder() -> None:
    with pytest.raises(ValueError, match="azure is a trace"):
        arrivals_of("azure", 100, 10, None)


def test_the_fastest_rate_is_where_the_share_falls_below_99_percent() -> None:
    found = fastest_rate(lambda rate: 1.0 if rate <= 700 else 0.5, 0, 1_000, steps=12)
    assert 699 < found <= 700
