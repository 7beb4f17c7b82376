"""What the availability benchmark makes of its ledger, on ledgers written by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

import lrai_core as lrai
from benchmarks.availability import (
    End,
    Event,
    Ledger,
    arrivals,
    bursting,
    count_lost,
    events_of,
    least_admitted,
    recoveries,
    timeline,
    was_refused,
    within_capacity,
)


def ledger(*requests: tuple[float, float, End]) -> Ledger:
    """Return a ledger of requests that were sent in time: when, when they ended, and how."""
    made = Ledger.empty(np.array([sent for sent, _, _ in requests]))
    made.sent[:] = made.due
    made.ended[:] = [ended for _, ended, _ in requests]
    made.how[:] = [how for _, _, how in requests]
    made.ends[:] = 1
    return made


def test_requests_come_at_the_rate_and_faster_in_bursts() -> None:
    times = arrivals(100, 2.0, 600, 0)
    assert np.all(np.diff(times) >= 0)
    inside = bursting(times)
    assert inside.sum() / 60 == pytest.approx(200, rel=0.05)
    assert (~inside).sum() / 540 == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize(("seconds", "actors"), [(120, 4), (600, 20)])
def test_an_actor_dies_in_every_period_and_nothing_happens_at_once(
    seconds: float, actors: int
) -> None:
    for seed in range(20):
        found = events_of(seconds, seed)
        kinds = Counter(event.kind for event in found)
        assert kinds == {"actor": actors, "daemon": 2, "switch": 2}
        times = np.array([event.at for event in found])
        assert np.all(np.diff(times) > 0)
        others = np.array([event.at for event in found if event.kind != "actor"])
        for event in found:
            if event.kind == "actor":
                assert np.abs(others - event.at).min() > 3
        assert times[0] >= 0
        assert times[-1] < seconds


def test_recovery_is_the_first_answer_to_a_request_sent_after_the_kill() -> None:
    found = ledger(
        (0.9, 1.1, End.ANSWERED),  # was on its way already
        (1.2, 1.3, End.FAILED),
        (1.2, 1.4, End.WRONG),
        (1.3, 2.5, End.ANSWERED),
        (1.6, 2.0, End.ANSWERED),
    )
    kills = [Event(1.0, "actor"), Event(9.0, "daemon")]
    assert recoveries(found, kills) == [pytest.approx(1.0), np.inf]


def test_capacity_excepts_bursts_and_two_seconds_after_a_kill() -> None:
    found = ledger(*((at, at, End.ANSWERED) for at in (4.9, 5.0, 6.9, 7.0, 12.0, 14.9, 15.0)))
    inside = within_capacity(found, [Event(5.0, "actor")])
    assert inside.tolist() == [True, False, False, True, False, False, True]


def test_one_bad_period_is_not_averaged_away() -> None:
    ends = [End.REFUSED, *[End.ANSWERED] * 3]
    second = [(35 + at, 35.5 + at, how) for at, how in enumerate(ends)]
    found = ledger(*((at / 10, 30.0, End.ANSWERED) for at in range(100)), *second)
    inside = within_capacity(found, [])
    assert 1 - found.are(End.REFUSED)[inside].mean() > 0.99
    assert least_admitted(found, inside, 60.0) == 0.75
    assert least_admitted(found, within_capacity(found, [Event(34.0, "actor")]), 60.0) == 1.0
    assert least_admitted(found, inside, 90.0) == 0.0  # nothing is known of the third


def test_a_failure_of_an_admitted_request_is_no_refusal() -> None:
    full = lrai.QueueFull("full", limit=1, retry_after_seconds=1)
    early = lrai.DeadlineExceeded("5 ms allowed, the model takes 7 ms")
    assert all(was_refused(e, 0.1) for e in (full, early, lrai.NotReady("draining")))
    assert not was_refused(early, 4.9)  # by another daemon than the one that admitted it
    late = lrai.DeadlineExceeded("the deadline passed in the queue")
    assert not any(was_refused(e, 0.1) for e in (late, lrai.ActorError("died"), ValueError("bug")))


def test_what_a_killed_daemon_may_have_admitted_is_not_refused_by_the_next_one() -> None:
    found = ledger(
        (0.9, 0.95, End.REFUSED),
        (0.99, 1.01, End.REFUSED),
        (0.99, 1.3, End.ANSWERED),
        (1.01, 1.02, End.REFUSED),
    )
    count_lost(found, [Event(1.0, "daemon")])
    assert found.how.tolist() == [End.REFUSED, End.FAILED, End.ANSWERED, End.REFUSED]


def test_the_chart_shows_each_second_and_what_was_done() -> None:
    found = ledger(
        (0.1, 0.2, End.ANSWERED),
        (0.3, 0.4, End.ANSWERED),
        (1.1, 2.2, End.ANSWERED),
        (3.1, 3.1, End.REFUSED),
        (3.2, 3.3, End.WRONG),
    )
    done = [Event(1.5, "actor"), Event(2.5, "daemon"), Event(2.9, "begin"), Event(3.5, "switch")]
    marks, offered, answered, refused, failed, _ = timeline(found, done, 4.0)
    assert marks.endswith("  aDS")
    assert offered.endswith("█▄ █")
    assert answered.endswith("█ ▄ ")
    assert refused.endswith("   ▄")
    assert failed.endswith("   ▄")


def test_a_joined_ledger_holds_every_request_and_error() -> None:
    parts = [ledger((0.0, 1.0, End.ANSWERED)), ledger((2.0, 3.0, End.FAILED))]
    for part in parts:
        part.errors["x"] += 2
    whole = Ledger.joined(parts)
    assert whole.due.tolist() == [0, 2]
    assert whole.are(End.ANSWERED, End.WRONG).tolist() == [True, False]
    assert whole.errors == {"x": 4}
