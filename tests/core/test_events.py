from __future__ import annotations

import threading

import pytest

from lrai_core.events import Event, EventBus


def test_every_event_is_counted_without_an_observer() -> None:
    bus = EventBus()
    bus.emit("request_accepted", "model")
    bus.emit("request_accepted", "model", count=2)
    bus.emit("actor_lost")
    bus.close()
    assert bus.counts() == {"request_accepted": 3, "actor_lost": 1}


def test_an_observer_hears_every_event_in_order_with_its_attributes() -> None:
    heard: list[Event] = []
    bus = EventBus([heard.append])
    for rows in range(20):
        bus.emit("batch_dispatched", "model", rows=rows)
    bus.close()
    assert [event.attributes["rows"] for event in heard] == list(range(20))
    assert {(event.kind, event.model) for event in heard} == {("batch_dispatched", "model")}
    times = [event.monotonic_s for event in heard]
    assert times == sorted(times)


def test_what_an_observer_raises_is_counted_and_keeps_no_event_from_the_others() -> None:
    heard: list[Event] = []

    def broken(event: Event) -> None:
        raise RuntimeError(event.kind)

    bus = EventBus([broken, heard.append])
    bus.emit("actor_ready")
    bus.emit("actor_lost")
    bus.close()
    assert [event.kind for event in heard] == ["actor_ready", "actor_lost"]
    assert bus.counts()["observer_errors"] == 2


def test_a_stuck_observer_makes_emit_drop_the_oldest_and_never_wait() -> None:
    release, stuck = threading.Event(), threading.Event()
    heard: list[int] = []

    def slow(event: Event) -> None:
        stuck.set()
        release.wait(10)
        heard.append(event.attributes["number"])

    bus = EventBus([slow], capacity=3)
    bus.emit("actor_ready", number=0)
    assert stuck.wait(10)
    for number in range(1, 11):
        bus.emit("actor_ready", number=number)
    release.set()
    bus.close()
    assert heard == [0, 8, 9, 10]
    assert bus.counts() == {"actor_ready": 11, "events_dropped": 7}


def test_counts_are_a_copy() -> None:
    bus = EventBus()
    bus.emit("actor_ready")
    bus.counts()["actor_ready"] = 99
    assert bus.counts() == {"actor_ready": 1}


def test_what_somebody_has_to_know_is_logged_with_its_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bus = EventBus()
    bus.emit("request_failed", "model", reason="late")
    bus.emit("actor_lost", "model@1", reason="the model's process ended with signal SIGKILL")
    bus.close()
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("lrai.runtime", "WARNING")
    said = "model@1: actor lost (reason the model's process ended with signal SIGKILL)"
    assert record.getMessage() == said


def test_a_limit_that_cannot_be_reached_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    bus = EventBus()
    bus.emit("limit_unreachable", "m", setting="latency_slo_ms", reason="1 ms, it takes 2")
    bus.close()
    (record,) = caplog.records
    said = "m: limit unreachable (setting latency_slo_ms, reason 1 ms, it takes 2)"
    assert record.getMessage() == said
