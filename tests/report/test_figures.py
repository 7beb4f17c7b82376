"""Figures and verdicts, on outcomes that are made up."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lrai_report.figures import Figures, figures, load_over_time, median, p95_over_time, verdict
from lrai_report.replay import Outcome
from lrai_report.trace import Arrivals

FASTER = "p95 20 ms where planner has 30 ms"


def outcome(*latencies: float, refused: int = 0, seconds: float = 2.0) -> Outcome:
    return Outcome(np.array(latencies), refused, seconds, rows=6, calls=2, lag_seconds=0.0)


def at(*seconds: float) -> Arrivals:
    when = np.array(seconds)
    return Arrivals(when, np.zeros(len(when), np.int64), np.ones(len(when), np.int64))


def of(on_time: float, p95_ms: float = 50.0) -> Figures:
    return Figures(on_time, 10.0, p95_ms, 90.0, 100.0, 0.0, 2.0)


def test_what_is_late_refused_or_never_answered_is_not_on_time() -> None:
    found = figures(
        outcome(0.01, 0.05, 0.0501, math.inf, refused=1), deadline_seconds=0.05, seconds=1
    )
    assert found.on_time == 0.5
    assert found.answered_per_second == 1.5
    assert found.refused == 0.25
    assert found.rows_per_call == 3


def test_answers_per_second_are_of_the_whole_round_and_of_what_of_it_lasts_longer() -> None:
    quiet_end = outcome(0.01, 0.01, seconds=0.5)
    assert figures(quiet_end, deadline_seconds=1, seconds=2).answered_per_second == 1
    long_end = outcome(0.01, 0.01, seconds=4)
    assert figures(long_end, deadline_seconds=1, seconds=2).answered_per_second == 0.5


def test_percentiles_are_of_all_requests_and_not_of_those_that_survived() -> None:
    found = figures(outcome(*[0.01] * 90, *[math.inf] * 10), deadline_seconds=1, seconds=1)
    assert (found.p50_ms, found.p95_ms) == (10, math.inf)


def test_no_answer_at_all_has_figures_too() -> None:
    nothing = Outcome(np.array([math.inf]), 1, 1.0, rows=0, calls=0, lag_seconds=0.0)
    found = figures(nothing, deadline_seconds=1, seconds=1)
    assert (found.on_time, found.p50_ms, found.rows_per_call) == (0, math.inf, 0)


def test_the_median_is_taken_of_each_figure() -> None:
    found = median([of(0.9, 10), of(0.5, 30), of(0.7, math.inf)])
    assert (found.on_time, found.p95_ms) == (0.7, 30)


def test_latency_and_load_over_time_follow_one_round_after_the_other() -> None:
    rounds = [at(0.0, 0.1, 0.9), at(0.6)]
    outcomes = [outcome(1, 2, 3), outcome(math.inf)]
    found = p95_over_time(rounds, outcomes, seconds=1, columns=4)
    assert found[[0, 1, 3]].tolist() == [2, 3, math.inf]
    assert np.isnan(found[2])
    assert load_over_time(rounds, seconds=1, columns=4).tolist() == [4, 2, 0, 2]


@pytest.mark.parametrize(
    ("planner", "alone", "said"),
    [
        (
            [of(0.97), of(0.98), of(0.96)],
            [of(0.75), of(0.74), of(0.76)],
            "planner: 97.0% on time, 1.3 times as many as alone",
        ),
        ([of(0.97)] * 3, [of(0.95)] * 3, "planner: 97.0% on time, 2.0 points more than alone"),
        ([of(0.5)], [of(0.0)], "planner: 50.0% on time, of which alone answers none"),
        (  # one round says the opposite
            [of(0.97), of(0.98), of(0.90)],
            [of(0.91), of(0.91), of(0.91)],
            "no gain here at 12 requests/s: alone is as good as planner, 97.0% on time",
        ),
        (  # too little to matter
            [of(0.974)] * 3,
            [of(0.97)] * 3,
            "no gain here at 12 requests/s: alone is as good as planner, 97.4% on time",
        ),
        (
            [of(0.9)] * 2,
            [of(0.93)] * 2,
            "alone is better here: 93.0% on time; planner: 90.0% on time",
        ),
        (
            [of(1.0, 20)] * 3,
            [of(1.0, 30)] * 3,
            "planner: 100.0% on time, p95 20 ms where alone has 30 ms",
        ),
        (
            [of(1.0, 30)] * 3,
            [of(1.0, 20)] * 3,
            f"alone is better here: as many in time, {FASTER}; planner: 100.0% on time",
        ),
        (
            [of(0.94, 30)] * 3,
            [of(0.94, math.inf)] * 3,
            "planner: 94.0% on time, p95 30 ms where alone has none",
        ),
        (  # of 100 ms, these few do not matter
            [of(1.0, 4)] * 3,
            [of(1.0, 8)] * 3,
            "no gain here at 12 requests/s: alone is as good as planner, 100.0% on time",
        ),
        (
            [of(0.0, math.inf)] * 3,
            [of(0.0, math.inf)] * 3,
            "no gain here at 12 requests/s: alone is as good as planner, 0.0% on time",
        ),
    ],
)
def test_the_verdict_says_what_every_round_shows(
    planner: list[Figures], alone: list[Figures], said: str
) -> None:
    assert verdict({"planner": planner, "alone": alone}, rate=12.0, deadline_ms=100) == said


def test_the_verdict_tells_each_of_several_others() -> None:
    rounds = {"planner": [of(0.9)], "alone": [of(0.5)], "fifo-8": [of(0.95)], "other": [of(0.9)]}
    assert verdict(rounds, 12, 100) == (
        "fifo-8 is better here: 95.0% on time; "
        "planner: 90.0% on time, 1.8 times as many as alone, no more than other"
    )
    equal = {"planner": [of(0.9)], "alone": [of(0.9)], "fifo-8": [of(0.9)]}
    assert verdict(equal, 12, 100) == (
        "no gain here at 12 requests/s: alone and fifo-8 are as good as planner, 90.0% on time"
    )
    assert verdict({"planner": [of(0.9)]}, 12, 100) == "planner: 90.0% on time"
