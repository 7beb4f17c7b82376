"""The scheduler over workers that are no processes, on a clock that only the tests move."""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lrai_core.artifact import LatencyPoint
from lrai_core.config import ActorConfig, SchedulerConfig
from lrai_core.errors import (
    ActorError,
    DeadlineExceeded,
    LraiError,
    ModelNotFound,
    NotReady,
    PoisonRequest,
    QueueFull,
    RequestError,
)
from lrai_core.events import EventBus
from lrai_core.protocol import Array, ValidRequest
from lrai_core.scheduler import scheduler as module
from lrai_core.scheduler.latency import LatencyModel
from lrai_core.scheduler.planner import Decision, plan
from lrai_core.scheduler.scheduler import Scheduler
from lrai_core.scheduler.state import BACKGROUND, Call, Model, Replica
from lrai_core.wire.messages import Refused
from lrai_core.wire.workers import Answered, Batch, GaveUp, Lost, Outcome

PROFILE = [  # 10 ms a call, hardly more for more rows
    LatencyPoint(rows=1, length=0, median_ms=10.0, spread_ms=0.0),
    LatencyPoint(rows=64, length=0, median_ms=12.0, spread_ms=0.0),
]
serial = itertools.count(1)


class Clock(SimpleNamespace):
    """Stands in for the module `time`; sleeping passes the time at once."""

    def __init__(self) -> None:
        super().__init__(now=1000.0)

    def monotonic(self) -> float:
        return float(self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeWorkers:
    """Actors in name only: the tests say what comes of each batch."""

    def __init__(self) -> None:
        self.calls: dict[str, deque[tuple[int, list[ValidRequest]]]] = {}  # none is empty
        self.outcomes: list[Outcome] = []
        self.dispatched: list[list[int]] = []  # the numbers in the requests of each batch
        self.begun: list[list[int]] = []  # of those that were the first of their actor
        self.variants: list[int] = []  # that each batch was sent to
        self.down: set[str] = set()
        self.when_asked: Callable[[], object] = lambda: None

    def register(self, poller: zmq.Poller) -> None:
        pass

    def poll(self, now: float, ready: Collection[object]) -> list[Outcome]:
        found, self.outcomes = self.outcomes, []
        return found

    def next_check(self, now: float) -> float:
        return now + 1

    def state(self, model: str) -> tuple[str, int | None]:
        self.when_asked()
        return "starting" if model in self.down else "ready", None

    def dispatch(self, model: str, batch: Batch) -> None:
        assert len(self.calls.get(model, ())) < 2, "one runs and one is next"
        assert batch.requests, "no empty batch"
        self.calls.setdefault(model, deque()).append((batch.number, list(batch.requests)))
        self.dispatched.append([number(request) for request in batch.requests])
        self.variants.append(batch.variant)
        if len(self.calls[model]) == 1:
            self.begun.append(self.dispatched[-1])

    def end(self, model: str) -> tuple[int, list[ValidRequest]]:
        ended = self.calls[model].popleft()
        if self.calls[model]:
            self.begun.append([number(request) for request in self.calls[model][0][1]])
        else:
            del self.calls[model]
        return ended

    def answer(self, model: str = "m") -> None:
        batch, requests = self.end(model)
        self.outcomes.append(Answered(batch, [[one.arrays[0] * 2] for one in requests], 0.01))

    def refuse(self, model: str = "m", *, invalid: bool = True) -> None:
        self.outcomes.append(Refused(self.end(model)[0], "bad shape", invalid))

    def lose(self, model: str = "m", *, killed: bool = False) -> None:
        how = "signal SIGKILL" if killed else "signal SIGSEGV"
        for place, (batch, _) in enumerate(self.calls.pop(model)):
            self.outcomes.append(Lost(batch, how, begun=place == 0, killed=killed))

    def give_up(self, model: str = "m") -> None:
        if model in self.calls:
            self.lose(model)
        self.down.add(model)
        self.outcomes.append(GaveUp(model, "crash loop"))


def request(rows: int = 1, *, group: str = "g", nbytes: int = 8) -> ValidRequest:
    """Return a request whose tensor holds a number that no other has."""
    array = np.full((rows, 1), next(serial), dtype=np.int64)
    return ValidRequest((array,), rows, 0, (0,), (group,), nbytes)


def number(one: ValidRequest) -> int:
    return int(one.arrays[0][0, 0])


def submit(
    scheduler: Scheduler,
    model: str,
    one: ValidRequest,
    timeout_ms: float | None = None,
    priority: int = 0,
) -> Future[list[Array]]:
    """Return a future of the answer, as the runtime makes one."""
    future: Future[list[Array]] = Future()

    def done(answer: list[Array] | None, error: LraiError | None, _: int) -> None:
        if future.set_running_or_notify_cancel():
            if answer is not None:
                future.set_result(answer)
            else:
                future.set_exception(error)

    pending = scheduler.accept(model, one, done, timeout_ms, priority)
    future.add_done_callback(lambda f: scheduler.cancel(pending) if f.cancelled() else None)
    return future


class Bench:
    """A scheduler that runs a step when told to, in the thread of the test."""

    def __init__(self, **config: Any) -> None:
        self.workers = FakeWorkers()
        self.events = EventBus()
        self.scheduler = Scheduler(SchedulerConfig(**config), self.workers, self.events)
        self.scheduler._cpus = 2  # however many this process may use
        self.add("m")

    def add(self, model: str) -> None:
        self.scheduler.add(model, [Replica(model, PROFILE)], self.scheduler._config)

    def submit(
        self,
        one: ValidRequest | None = None,
        model: str = "m",
        timeout_ms: float | None = None,
        priority: int = 0,
    ) -> Future[list[Array]]:
        return submit(self.scheduler, model, one or request(), timeout_ms, priority)

    def step(self) -> None:
        self.scheduler._step({})

    def latency(self) -> LatencyModel:
        return self.scheduler._models["m"].replicas["m"].latency

    def hand_over_two(self, clock: Clock) -> tuple[Future[list[Array]], Future[list[Array]]]:
        """Return what the actor runs, and what it has next."""
        self.latency().overhead_seconds = self.latency().overhead_seconds or 1e-6
        first = self.submit()
        self.step()
        clock.now += 0.0095
        second = self.submit()
        self.step()
        assert len(self.workers.calls["m"]) == 2
        return first, second

    def counts(self, *kinds: str) -> tuple[int, ...]:
        return tuple(self.events.counts().get(kind, 0) for kind in kinds)

    def close(self) -> None:
        self.scheduler.start()
        self.scheduler.close()
        self.events.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def bench(clock: Clock) -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()
    accepted, answered, failed = made.counts(
        "request_accepted", "request_answered", "request_failed"
    )
    assert accepted == answered + failed
    assert made.scheduler.outstanding() == 0
    assert not any(model.inside for model in made.scheduler._models.values())


def failure(future: Future[list[Array]]) -> BaseException:
    error = future.exception(timeout=0)
    assert error is not None
    return error


# Coalescing


def test_what_waits_together_runs_as_one_call_and_each_gets_its_own_rows(bench: Bench) -> None:
    requests = [request(rows) for rows in (1, 3, 2)]
    futures = [bench.submit(one) for one in requests]
    bench.step()
    assert bench.workers.dispatched == [[number(one) for one in requests]]
    bench.workers.answer()
    bench.step()
    for one, future in zip(requests, futures, strict=True):
        np.testing.assert_array_equal(future.result(0)[0], one.arrays[0] * 2)
    assert bench.counts("batch_dispatched", "batch_completed", "request_answered") == (1, 1, 3)


def test_while_the_actor_is_busy_requests_wait_and_then_go_together(bench: Bench) -> None:
    bench.submit()
    bench.step()
    for _ in range(5):
        bench.submit()
        bench.step()
    bench.workers.answer()
    bench.step()
    assert [len(batch) for batch in bench.workers.dispatched] == [1, 5]


def test_two_models_do_not_wait_for_one_another(bench: Bench) -> None:
    bench.add("other")
    first, second = bench.submit(), bench.submit(model="other")
    bench.step()
    bench.workers.answer("other")
    bench.step()
    assert (first.done(), second.done()) == (False, True)


def test_the_rows_of_a_call_are_bounded_by_the_config(clock: Clock) -> None:
    bench = Bench(max_batch_rows=4)
    for _ in range(6):
        bench.submit()
    bench.step()
    bench.close()
    assert len(bench.workers.dispatched[0]) == 4


# The next call, before the running one ends


def test_where_waiting_is_less_exact_the_next_call_is_handed_over_sooner(
    bench: Bench, clock: Clock
) -> None:
    bench.latency().overhead_seconds = 1e-6
    bench.scheduler.tick_seconds = 4e-3  # of calls of 10 ms
    bench.submit()
    bench.step()
    clock.now += 5e-3
    bench.submit()
    for at, calls in ((5e-3, 1), (6.5e-3, 2)):
        bench.step()
        assert len(bench.workers.calls["m"]) == calls, at
        clock.now += 1.5e-3


def test_an_actor_that_is_almost_done_is_handed_its_next_call(bench: Bench, clock: Clock) -> None:
    bench.latency().overhead_seconds = 1e-6
    first = bench.submit()
    bench.step()
    clock.now += 0.008
    second = bench.submit()
    bench.step()
    assert len(bench.workers.dispatched) == 1
    assert bench.scheduler._next_check(clock.now) == pytest.approx(clock.now + 0.001)
    clock.now += 0.001
    bench.step()
    assert len(bench.workers.dispatched) == 2
    bench.submit()
    bench.step()
    assert len(bench.workers.dispatched) == 2  # one is next, not two
    bench.workers.answer()
    bench.step()
    assert (first.done(), second.done()) == (True, False)


@pytest.mark.parametrize("overhead_seconds", [0.015, 0.0])
def test_where_the_way_takes_longer_than_the_engine_or_is_not_known_the_next_call_waits(
    bench: Bench, clock: Clock, overhead_seconds: float
) -> None:
    bench.latency().overhead_seconds = overhead_seconds
    bench.submit()
    bench.step()
    clock.now += 0.024
    bench.submit()
    bench.step()
    assert len(bench.workers.dispatched) == 1


def test_an_actor_that_is_overdue_is_not_handed_another_call(bench: Bench, clock: Clock) -> None:
    bench.latency().overhead_seconds = 1e-6
    bench.submit()
    bench.step()
    clock.now += 0.2
    bench.submit()
    bench.step()
    assert len(bench.workers.dispatched) == 1


def test_what_would_be_late_behind_the_running_call_is_not_handed_over(
    bench: Bench, clock: Clock
) -> None:
    bench.latency().overhead_seconds = 1e-6
    bench.submit()
    bench.step()
    clock.now += 0.0092
    late = bench.submit(timeout_ms=10.5)  # alone it takes 10 ms, the other one .8 ms more
    bench.step()
    assert "cannot be met any more" in str(failure(late))


def test_the_call_that_an_actor_has_next_takes_no_cpu(bench: Bench, clock: Clock) -> None:
    bench.scheduler._cpus = 2
    bench.add("other")
    bench.hand_over_two(clock)
    bench.submit(model="other")
    bench.step()
    assert "other" in bench.workers.calls


def test_while_another_model_waits_for_the_cpu_its_turn_is_not_given_away(
    bench: Bench, clock: Clock
) -> None:
    bench.scheduler._cpus = 1
    bench.latency().overhead_seconds = 1e-6
    bench.add("other")
    bench.submit()
    bench.step()
    bench.submit(model="other", timeout_ms=1000)
    bench.submit()
    clock.now += 0.0095
    bench.step()
    assert len(bench.workers.dispatched) == 1
    bench.workers.answer()
    bench.step()
    assert list(bench.workers.calls) == ["other"]


def test_a_call_uses_the_processor_and_is_timed_from_when_it_was_its_turn(
    bench: Bench, clock: Clock
) -> None:
    bench.latency().overhead_seconds = 0.002
    bench.hand_over_two(clock)
    clock.now += 0.003
    bench.workers.answer()
    bench.step()
    learned = bench.latency().overhead_seconds
    assert 0.002 < learned < 0.0025  # the engine took 10 ms of 12.5
    (second,) = bench.scheduler._calls.values()
    assert second.overdue == pytest.approx(clock.now + 3 * 0.012 + 0.05)
    clock.now += 0.011
    bench.workers.answer()
    bench.step()
    # The way of the second was hidden behind the first: it says nothing of what a way takes.
    assert bench.latency().overhead_seconds == learned
    assert bench.scheduler._models["m"].used_seconds == pytest.approx(0.0125 + 0.011)


@pytest.mark.parametrize("weight", [0.25, 1.0, 3.0])
def test_models_that_cannot_all_be_in_time_share_the_processor_by_weight(
    bench: Bench, clock: Clock, weight: float
) -> None:
    bench.scheduler._cpus = 1
    bench.scheduler.add("other", [Replica("other", PROFILE)], SchedulerConfig(weight=weight))
    ran: Counter[str] = Counter()
    for turn in range(400):
        for name in ("m", "other"):
            bench.submit(request(group=f"{turn}"), model=name, timeout_ms=40)
        bench.step()
        (running,) = bench.workers.calls
        ran[running] += 1
        clock.now += 0.01
        bench.workers.answer(running)
        bench.step()
    assert ran["other"] / ran["m"] == pytest.approx(weight, rel=0.25)


def test_a_model_whose_requests_cannot_wait_long_has_its_turn_too(
    bench: Bench, clock: Clock
) -> None:
    """Nobody is starved by one whose calls are worth more, however soon its requests are given up.

    Each of the favoured model's calls holds 64 requests, and is due before the other's.
    """
    bench.scheduler._cpus = 1
    bench.add("small")
    ran, future = Counter[str](), bench.submit(model="small", timeout_ms=300)
    bench.submit()
    bench.step()
    for _ in range(400):
        clock.now += 0.012
        for _ in range(64):
            bench.submit(timeout_ms=15)
        if future.done():
            future = bench.submit(model="small", timeout_ms=300)
        (running,) = bench.workers.calls
        ran[running] += 1
        bench.workers.answer(running)
        bench.step()
    assert 3 <= ran["small"] < 100  # about once a second


def test_the_call_behind_a_refused_one_runs(bench: Bench, clock: Clock) -> None:
    bad, good = bench.hand_over_two(clock)
    bench.workers.refuse()
    bench.step()
    bench.workers.answer()
    bench.step()
    assert isinstance(failure(bad), RequestError)
    assert good.exception(0) is None


def test_a_death_does_not_count_for_the_call_that_was_next(bench: Bench, clock: Clock) -> None:
    poison, good = bench.hand_over_two(clock)
    bench.workers.lose()
    bench.step()
    bench.workers.lose()
    bench.step()
    assert isinstance(failure(poison), ActorError)
    bench.workers.lose()  # the first death in which it ran
    bench.step()
    bench.workers.answer()
    bench.step()
    assert good.exception(0) is None


def test_what_was_in_an_actor_that_died_has_the_next_one_for_itself(
    bench: Bench, clock: Clock
) -> None:
    bench.hand_over_two(clock)
    bench.workers.lose()
    for calls in (3, 4, 5):
        bench.submit()
        bench.step()
        clock.now += 0.0095
        bench.step()
        assert len(bench.workers.dispatched) == calls
        bench.workers.answer()
    assert [len(batch) for batch in bench.workers.dispatched[2:]] == [1, 1, 3]


def test_what_failed_is_not_handed_over_behind_others(bench: Bench, clock: Clock) -> None:
    bench.submit()  # with the next one in one call, that is refused
    bench.hand_over_two(clock)
    bench.workers.refuse()
    bench.step()
    clock.now += 0.0095
    bench.step()
    assert len(bench.workers.dispatched) == 2
    bench.workers.answer()
    bench.step()
    assert len(bench.workers.dispatched) == 3


def test_a_machine_that_gets_slower_is_told_of(bench: Bench, clock: Clock) -> None:
    def run(seconds: float) -> None:
        bench.submit()
        bench.step()
        batch, asked = bench.workers.end("m")
        clock.now += seconds
        bench.workers.outcomes.append(Answered(batch, [[one.arrays[0]] for one in asked], seconds))
        bench.step()

    for _ in range(40):
        run(0.01)
    assert bench.counts("speed_changed") == (0,)
    for _ in range(40):
        run(0.03)
    assert bench.counts("speed_changed") == (1,)


# Failures of a call


def test_after_a_lost_batch_each_runs_once_more_alone(bench: Bench) -> None:
    futures = [bench.submit() for _ in range(3)]
    bench.step()
    bench.workers.lose()
    for _ in range(3):
        bench.step()
        bench.workers.answer()
    bench.step()
    first, *again = bench.workers.dispatched
    assert again == [[one] for one in first]
    assert all(future.exception(0) is None for future in futures)
    assert bench.counts("batch_retried", "request_answered") == (1, 3)


def test_a_request_whose_actor_dies_twice_ends_and_the_others_are_answered(bench: Bench) -> None:
    poison, good = bench.submit(), bench.submit()
    bench.step()
    bench.workers.lose()
    bench.step()
    bench.workers.lose()
    bench.step()
    found = failure(poison)
    assert isinstance(found, PoisonRequest)
    assert "signal SIGSEGV" in str(found)
    assert (found.http_status, found.retry_after_seconds) == (500, None), "it is not to come again"
    bench.workers.answer()
    bench.step()
    assert good.exception(0) is None
    bench.step()
    assert len(bench.workers.dispatched) == 3  # nobody tries a third time


def test_a_lost_request_runs_before_what_came_later_and_not_with_it(bench: Bench) -> None:
    lost = request()
    bench.submit(lost)
    bench.step()
    later = request()
    bench.submit(later)
    bench.workers.lose()
    bench.step()
    assert bench.workers.dispatched == [[number(lost)]] * 2


def test_a_refused_batch_is_tried_one_by_one_and_only_the_bad_one_ends(bench: Bench) -> None:
    bad, good = bench.submit(), bench.submit()
    bench.step()
    bench.workers.refuse()
    bench.step()
    bench.workers.refuse()
    bench.step()
    bench.workers.answer()
    bench.step()
    assert isinstance(failure(bad), RequestError)
    assert (failure(bad).http_status, str(failure(bad))) == (  # type: ignore[attr-defined]
        400,
        "the engine refused the request: bad shape",
    )
    assert good.exception(0) is None
    assert [len(batch) for batch in bench.workers.dispatched] == [2, 1, 1]


def test_after_a_call_without_the_memory_for_it_later_ones_are_half_as_large(bench: Bench) -> None:
    futures = [bench.submit() for _ in range(6)]
    bench.step()
    bench.workers.refuse(invalid=False)
    bench.step()
    for _ in range(6):
        bench.workers.answer()
        bench.step()
    futures += [bench.submit() for _ in range(4)]
    bench.step()
    bench.workers.answer()
    bench.step()
    bench.workers.answer()
    bench.step()
    assert [len(batch) for batch in bench.workers.dispatched] == [6, 1, 1, 1, 1, 1, 1, 3, 1]
    assert all(future.exception(0) is None for future in futures)


def test_one_request_that_is_refused_makes_no_later_call_smaller(bench: Bench) -> None:
    large = bench.submit(request(2))
    bench.step()
    bench.workers.refuse(invalid=False)
    bench.step()
    assert isinstance(failure(large), ActorError)
    futures = [bench.submit() for _ in range(6)]
    bench.step()
    bench.workers.answer()
    bench.step()
    assert all(future.exception(0) is None for future in futures)
    assert [len(batch) for batch in bench.workers.dispatched] == [1, 6]


def rows_of_calls(bench: Bench, count: int) -> list[int]:
    """Return how many rows each of the calls has in which so many requests are answered."""
    before = len(bench.workers.dispatched)
    futures = [bench.submit() for _ in range(count)]
    while not all(future.done() for future in futures):
        bench.step()
        if bench.workers.calls:
            bench.workers.answer()
    assert all(future.exception(0) is None for future in futures)
    return [len(batch) for batch in bench.workers.dispatched[before:]]


def lose_call(bench: Bench, count: int, *, killed: bool) -> None:
    """Have an actor end at a call of so many requests, which are then answered."""
    futures = [bench.submit() for _ in range(count)]
    bench.step()
    assert len(bench.workers.dispatched[-1]) == count
    bench.workers.lose(killed=killed)
    while not all(future.done() for future in futures):
        bench.step()
        if bench.workers.calls:
            bench.workers.answer()
    assert all(future.exception(0) is None for future in futures)


def test_after_an_actor_was_killed_at_a_call_later_ones_are_half_as_large(bench: Bench) -> None:
    """As the kernel does where no memory is left: the next such call would end as this did."""
    lose_call(bench, 6, killed=True)
    assert rows_of_calls(bench, 6) == [3, 3]
    assert bench.counts("limit_unreachable") == (1,)
    lose_call(bench, 3, killed=True)
    assert rows_of_calls(bench, 3) == [3], "so many were answered meanwhile"
    lose_call(bench, 3, killed=True)
    lose_call(bench, 3, killed=True)
    assert rows_of_calls(bench, 3) == [1, 1, 1]


def test_who_kills_actors_now_and_then_makes_no_call_smaller(bench: Bench) -> None:
    for _ in range(3):
        assert rows_of_calls(bench, 6) == [6]
        lose_call(bench, 6, killed=True)
    assert rows_of_calls(bench, 10) == [10]
    assert bench.counts("limit_unreachable") == (0,)


def test_an_actor_that_crashes_says_nothing_of_memory(bench: Bench) -> None:
    lose_call(bench, 6, killed=False)
    assert rows_of_calls(bench, 6) == [6]


def test_who_was_refused_for_memory_and_then_lost_once_may_come_again(bench: Bench) -> None:
    first, second = bench.submit(), bench.submit()
    bench.step()
    bench.workers.refuse(invalid=False)
    bench.step()
    bench.workers.lose(killed=True)
    bench.step()
    assert not first.done(), "one death is not two"
    for _ in range(2):
        bench.workers.answer()
        bench.step()
    assert first.exception(0) is second.exception(0) is None


def test_a_request_refused_alone_is_not_tried_again(bench: Bench) -> None:
    future = bench.submit()
    bench.step()
    bench.workers.refuse()
    bench.step()
    assert isinstance(failure(future), RequestError)
    assert len(bench.workers.dispatched) == 1


def test_when_the_model_is_given_up_everything_of_it_ends_and_nothing_is_accepted(
    bench: Bench,
) -> None:
    bench.add("other")
    running = bench.submit(request(group="a"))
    bench.step()
    waiting, arrived, other = bench.submit(), bench.submit(), bench.submit(model="other")
    bench.workers.give_up()
    bench.step()
    for future in (running, waiting, arrived):
        error = failure(future)
        assert isinstance(error, ActorError)
        assert (error.http_status, error.retry_after_seconds) == (503, 1.0)
    assert "crash loop" in str(failure(waiting))
    with pytest.raises(ActorError, match="crash loop"):
        bench.submit()
    bench.workers.answer("other")
    bench.step()
    assert other.exception(0) is None


def test_a_request_that_was_accepted_while_the_model_was_given_up_ends_too(bench: Bench) -> None:
    bench.workers.give_up()
    bench.step()
    bench.scheduler._models["m"].failed = ""  # as `submit` saw it a moment earlier
    future = bench.submit()
    bench.scheduler._models["m"].failed = "crash loop"
    bench.step()
    assert isinstance(failure(future), ActorError)


def test_an_outcome_nobody_waits_for_is_ignored(bench: Bench) -> None:
    bench.workers.outcomes += [Answered(99, [], 0.0), Lost(98, ""), GaveUp("stranger", "")]
    bench.step()


# Deadlines


@pytest.mark.parametrize("timeout_ms", [0, -1, 5, 10, math.nan, -math.inf])
def test_a_deadline_that_is_past_or_unreachable_at_arrival_is_refused_at_once(
    bench: Bench, timeout_ms: float
) -> None:
    with pytest.raises(DeadlineExceeded, match="ms allowed, the model takes 10 ms") as caught:
        bench.submit(timeout_ms=timeout_ms)
    assert caught.value.http_status == 504
    bench.step()
    assert bench.workers.dispatched == []
    assert bench.counts("request_refused", "request_accepted") == (1, 0)
    assert bench.scheduler.outstanding() == 0


def test_an_endless_deadline_is_a_deadline(bench: Bench) -> None:
    future = bench.submit(timeout_ms=math.inf)
    bench.step()
    bench.workers.answer()
    bench.step()
    assert future.exception(0) is None


def test_a_deadline_that_passes_in_the_queue_ends_the_request_unrun(
    bench: Bench, clock: Clock
) -> None:
    bench.hand_over_two(clock)
    late = bench.submit(timeout_ms=50)
    bench.step()
    assert bench.scheduler._next_check(clock.now) == pytest.approx(clock.now + 0.05)
    clock.now += 0.05
    bench.step()
    assert "passed in the queue" in str(failure(late))
    bench.workers.answer()
    bench.step()
    assert len(bench.workers.dispatched) == 2


def test_who_cannot_be_answered_in_time_for_those_before_it_is_refused_at_once(
    bench: Bench,
) -> None:
    bench.scheduler.add("m", [Replica("m", PROFILE)], SchedulerConfig(max_batch_rows=2))
    bench.workers.down.add("m")  # two in 10 ms, when it is up
    for _ in range(20):
        bench.submit(timeout_ms=110)
    bench.step()
    with pytest.raises(DeadlineExceeded, match="20 requests have to be answered before it"):
        bench.submit(timeout_ms=111)
    hopeful, urgent = bench.submit(timeout_ms=130), bench.submit(timeout_ms=50)
    bench.workers.down.clear()
    while bench.scheduler.outstanding():
        bench.step()
        if bench.workers.calls:
            bench.workers.answer()
    assert hopeful.exception(0) is urgent.exception(0) is None


def test_those_who_share_a_call_before_a_large_request_do_not_keep_it_out(
    bench: Bench, clock: Clock
) -> None:
    for _ in range(20):  # a call for each large one, and one for the small ones together
        for rows in 3 * [64] + 40 * [1]:
            bench.submit(request(rows))
        while bench.scheduler.outstanding():
            bench.step()
            clock.now += 0.012
            bench.workers.answer()
            bench.step()
    bench.workers.down.add("m")
    small = [bench.submit(timeout_ms=300) for _ in range(40)]
    bench.step()
    large = bench.submit(request(64), timeout_ms=301)
    bench.workers.down.clear()
    while bench.scheduler.outstanding():
        bench.step()
        bench.workers.answer()
        bench.step()
    assert [one.exception(0) for one in (*small, large)] == 41 * [None]


def test_those_who_will_be_late_themselves_do_not_keep_who_comes_after_them_out(
    bench: Bench, clock: Clock
) -> None:
    bench.submit()
    bench.step()
    late = [bench.submit(timeout_ms=12) for _ in range(100)]
    bench.step()
    clock.now += 0.009
    in_time = bench.submit(timeout_ms=12)
    for _ in range(2):
        clock.now += 0.001
        bench.workers.answer()
        bench.step()
    assert in_time.exception(0) is None
    assert all("cannot be met any more" in str(failure(one)) for one in late)


def test_what_can_no_longer_be_answered_in_time_is_not_run(bench: Bench, clock: Clock) -> None:
    bench.submit()
    bench.step()
    late = bench.submit(timeout_ms=50)
    clock.now += 0.045
    bench.workers.answer()
    bench.step()
    assert "cannot be met any more" in str(failure(late))
    assert len(bench.workers.dispatched) == 1


def test_what_a_slow_actor_is_too_late_for_waits_for_a_fast_one(bench: Bench, clock: Clock) -> None:
    slow = [LatencyPoint(rows=1, length=0, median_ms=100.0, spread_ms=0.0)]
    bench.scheduler._cpus = 2
    replicas = [Replica("fast", PROFILE), Replica("slow", slow)]
    bench.scheduler.add("two", replicas, SchedulerConfig())
    first = bench.submit(model="two")
    bench.step()
    clock.now += 0.005
    urgent, hopeless = (bench.submit(model="two", timeout_ms=ms) for ms in (30, 12))
    bench.step()
    assert list(bench.workers.calls) == ["fast"]
    assert "cannot be met any more" in str(failure(hopeless))
    for _ in (first, urgent):
        bench.workers.answer("fast")
        bench.step()
    assert [first.exception(0), urgent.exception(0)] == [None, None]


@pytest.mark.parametrize("quiet_seconds", [0.0, 5.0])
def test_where_the_actor_on_free_cpus_is_too_slow_an_idle_one_in_time_is_asked(
    bench: Bench, clock: Clock, quiet_seconds: float
) -> None:
    """Also of a model that nobody has seen for a while: the slow one is not tried instead."""
    bench.scheduler._cpus = 4
    slow = [replace_ms(point, 10 * point.median_ms) for point in PROFILE]
    for name, second in (("a", slow), ("b", PROFILE)):
        replicas = [Replica(f"{name}{i}", p, threads=2) for i, p in enumerate((PROFILE, second))]
        for replica, cpus in zip(replicas, ((0, 1), (2, 3)), strict=True):
            replica.cpus = cpus
        bench.scheduler.add(name, replicas, SchedulerConfig())
    clock.now += quiet_seconds
    other = bench.submit(model="b")
    bench.step()
    urgent, hopeless = (bench.submit(model="a", timeout_ms=ms) for ms in (50, 12))
    clock.now += 0.005
    bench.step()
    assert list(bench.workers.calls) == ["b0", "a0"]
    assert "cannot be met any more" in str(failure(hopeless))
    for actor in ("b0", "a0"):
        bench.workers.answer(actor)
    bench.step()
    assert [other.exception(0), urgent.exception(0)] == [None, None]


def test_a_caller_is_told_at_its_deadline_but_holds_its_place_until_the_engine_is_done(
    bench: Bench, clock: Clock
) -> None:
    late = bench.submit(request(3), timeout_ms=50)
    bench.step()
    clock.now += 0.05
    bench.step()
    assert "passed while it ran" in str(failure(late))
    assert bench.scheduler.outstanding() == 3
    bench.workers.answer()
    bench.step()
    assert bench.scheduler.outstanding() == 0


def test_each_caller_has_an_error_of_its_own(bench: Bench, clock: Clock) -> None:
    """Raised in several, one would hold the frames of all of them."""
    bench.workers.down.add("m")
    first, second = (bench.submit(timeout_ms=50) for _ in range(2))
    bench.step()
    clock.now += 0.05
    bench.step()
    assert str(failure(first)) == str(failure(second))
    assert failure(first) is not failure(second)


def test_a_lost_request_past_its_deadline_is_not_run_again(bench: Bench, clock: Clock) -> None:
    late = bench.submit(timeout_ms=50)
    bench.step()
    clock.now += 0.05
    bench.workers.lose()
    bench.step()
    assert isinstance(failure(late), DeadlineExceeded)
    assert len(bench.workers.dispatched) == 1
    assert bench.scheduler.outstanding() == 0


def test_a_lost_request_that_nobody_waits_for_is_not_run_again(bench: Bench) -> None:
    left = bench.submit()
    bench.step()
    left.cancel()
    bench.step()
    bench.workers.lose()
    bench.step()
    assert len(bench.workers.dispatched) == 1
    assert bench.scheduler.outstanding() == 0


def test_without_a_timeout_the_configured_one_holds(clock: Clock) -> None:
    bench = Bench(default_timeout_ms=100)
    bench.workers.down.add("m")
    future = bench.submit()
    bench.step()
    clock.now += 0.1
    bench.step()
    assert isinstance(failure(future), DeadlineExceeded)
    bench.close()


def test_who_names_no_time_is_promised_that_of_the_model(bench: Bench, clock: Clock) -> None:
    bench.scheduler.add("m", [Replica("m", PROFILE)], SchedulerConfig(latency_slo_ms=50))
    bench.workers.down.add("m")
    promised, patient = bench.submit(), bench.submit(timeout_ms=200)
    bench.step()
    clock.now += 0.05
    bench.step()
    assert isinstance(failure(promised), DeadlineExceeded)
    assert not patient.done()
    clock.now += 0.16
    bench.step()
    assert patient.done()


def test_who_names_no_time_is_not_kept_waiting_by_who_named_a_long_one(
    bench: Bench, clock: Clock
) -> None:
    bench.workers.down.add("m")
    one = {name: request(group=name) for name in ("none", "long", "short")}
    bench.submit(one["none"])
    bench.submit(one["long"], timeout_ms=30_000)
    bench.submit(one["short"], timeout_ms=90)
    bench.step()
    bench.workers.down.clear()
    for _ in range(3):
        bench.step()
        bench.workers.answer()
    bench.step()
    order = [number(one[name]) for name in ("short", "none", "long")]
    assert bench.workers.dispatched == [[at] for at in order]


def test_a_model_may_have_bounds_of_its_own(bench: Bench) -> None:
    bench.scheduler.add("one", [Replica("one", PROFILE)], SchedulerConfig(max_batch_rows=1))
    for model in ("one", "m"):
        for _ in range(2):
            bench.submit(model=model)
    while bench.scheduler.outstanding():
        bench.step()
        for model in list(bench.workers.calls):
            bench.workers.answer(model)
    assert sorted(len(batch) for batch in bench.workers.dispatched) == [1, 1, 2]


# The bounded queue


def test_a_full_queue_refuses_the_next_request_at_once(clock: Clock) -> None:
    bench = Bench(max_queue_rows=4)
    futures = [bench.submit(request(2)) for _ in range(2)]
    with pytest.raises(QueueFull, match="holds 4 rows, 1 more exceed its 4") as caught:
        bench.submit()
    assert caught.value.retry_after_seconds > 0
    assert bench.counts("request_accepted", "request_refused") == (2, 1)
    bench.step()
    bench.workers.answer()
    bench.step()
    assert all(future.done() for future in futures)
    bench.submit()  # there is room again
    bench.close()


def test_bytes_fill_the_queue_like_rows(clock: Clock) -> None:
    bench = Bench(max_queue_bytes=100)
    bench.submit(request(nbytes=100))
    with pytest.raises(QueueFull, match="bytes"):
        bench.submit(request(nbytes=1))
    bench.close()


def test_a_model_that_is_not_there_is_refused_in_a_short_sentence(bench: Bench) -> None:
    for name in ("other", "../../m", "\0" * (1 << 20)):
        with pytest.raises(ModelNotFound) as caught:
            bench.submit(model=name)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 200


# Cancellation


def test_cancelled_before_it_started_a_request_is_not_run_and_gives_its_room_back(
    bench: Bench,
) -> None:
    bench.workers.down.add("m")
    future = bench.submit(request(5))
    bench.step()
    assert future.cancel()
    bench.step()
    assert bench.scheduler.outstanding() == 0
    bench.workers.down.clear()
    bench.step()
    assert bench.workers.dispatched == []
    assert bench.counts("request_failed", "request_answered") == (1, 0)


def test_cancelled_on_its_way_into_the_queue_a_request_is_not_run(bench: Bench) -> None:
    assert bench.submit().cancel()
    bench.step()
    assert bench.workers.dispatched == []
    assert bench.scheduler.outstanding() == 0


def test_cancelled_between_the_look_and_the_start_a_request_harms_nobody(bench: Bench) -> None:
    gone, stays = bench.submit(), bench.submit()
    bench.workers.when_asked = gone.cancel
    bench.step()
    bench.workers.answer()
    bench.step()
    assert stays.exception(0) is None
    assert gone.cancelled()


def test_a_batch_of_which_everybody_left_ends_like_any_other(bench: Bench) -> None:
    bench.workers.when_asked = bench.submit().cancel
    bench.step()
    bench.workers.answer()
    bench.step()
    assert bench.scheduler.outstanding() == 0


def test_cancelled_after_it_started_a_request_holds_its_place_until_the_engine_is_done(
    bench: Bench,
) -> None:
    future = bench.submit(request(2))
    bench.step()
    assert future.cancel()
    bench.step()
    assert bench.scheduler.outstanding() == 2
    bench.workers.answer()
    bench.step()
    assert bench.scheduler.outstanding() == 0
    assert bench.counts("request_failed", "request_answered") == (1, 0)


# The planner's own failures


def fails(*_: object) -> float:
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize(
    "named",
    [
        fails,
        lambda first: Decision((first, 999), (), 0.01),
        lambda first: Decision((first,), (999,), 0.01),
        lambda first: Decision((first, first), (), 0.01),
        lambda first: Decision((first,), (first,), 0.01),
    ],
)
def test_a_plan_that_fails_or_names_who_does_not_wait_means_one_by_one_and_an_event(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, named: Callable[[int], Decision]
) -> None:
    monkeypatch.setattr(module, "plan", lambda queue, *_: named(next(iter(queue))))
    futures = [bench.submit() for _ in range(3)]
    for _ in futures:
        bench.step()
        bench.workers.answer()
    bench.step()
    assert all(future.exception(0) is None for future in futures)
    assert [len(batch) for batch in bench.workers.dispatched] == [1, 1, 1]
    assert bench.counts("planner_failed") == (3,)


def no_number(*_: object) -> float:
    return math.nan


@pytest.mark.parametrize("broken", [fails, no_number])
def test_a_latency_model_that_fails_means_one_by_one_and_an_event(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, broken: Callable[..., float]
) -> None:
    bench.scheduler.add("m", [Replica("m", PROFILE), Replica("m2", PROFILE)], SchedulerConfig())
    asked = ["engine_seconds", "call_seconds", "alone_seconds"]
    asked += ["variant", "observe"] if broken is fails else []
    for method in asked:
        monkeypatch.setattr(LatencyModel, method, broken)
    futures = [bench.submit(timeout_ms=timeout_ms) for timeout_ms in (5, None, 30_000, None, 5)]
    with pytest.raises(DeadlineExceeded):
        bench.submit(timeout_ms=0)
    while not all(future.done() for future in futures):
        bench.step()
        for actor in list(bench.workers.calls):
            bench.workers.answer(actor)
    assert all(future.exception(0) is None for future in futures)
    assert [len(batch) for batch in bench.workers.dispatched] == [1] * 5
    assert bench.counts("planner_failed")[0] >= 5


def test_another_actors_latency_model_that_fails_costs_no_more_than_a_plan(
    bench: Bench, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    replicas = [Replica("one", PROFILE), Replica("other", PROFILE)]
    bench.scheduler.add("two", replicas, SchedulerConfig())
    late = bench.submit(model="two", timeout_ms=50)
    clock.now += 0.045
    monkeypatch.setattr(replicas[1].latency, "alone_seconds", fails)
    bench.step()
    bench.workers.answer("one")
    bench.step()
    assert late.exception(0) is None
    assert bench.counts("planner_failed") == (2,), "who is asked first, and what it would run"


def test_a_choice_among_models_that_raises_means_one_after_the_other_and_an_event(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("policy")

    monkeypatch.setattr(module, "choose", broken)
    bench.scheduler._cpus = 1
    bench.add("other")
    futures = [bench.submit(), bench.submit(model="other")]
    for name in ("m", "other"):
        bench.step()
        bench.workers.answer(name)
    bench.step()
    assert all(future.exception(0) is None for future in futures)
    assert bench.counts("planner_failed") == (1,)


def test_where_no_turn_can_be_told_requests_run_one_by_one_and_there_is_an_event(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "turn", fails)
    bench.scheduler._cpus = 1
    bench.add("other")
    futures = [bench.submit(model=name) for _ in range(3) for name in ("m", "other")]
    while not all(future.done() for future in futures):
        bench.step()
        for name in list(bench.workers.calls):
            bench.workers.answer(name)
    assert [future.exception(0) for future in futures] == [None] * 6
    assert [len(batch) for batch in bench.workers.dispatched] == [1] * 6
    assert bench.counts("batch_dispatched", "request_answered") == (6, 6)
    assert bench.counts("planner_failed")[0] >= 6


@pytest.mark.parametrize("broken", [fails, no_number])
def test_where_it_cannot_be_decided_what_is_next_a_call_still_has_the_time_it_takes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, broken: Callable[..., float]
) -> None:
    profile = [replace_ms(point, 8000) for point in PROFILE]
    bench.scheduler.add("slow", [Replica("slow", profile)], SchedulerConfig())
    monkeypatch.setattr(module, "plan", fails)
    for takes in (8.0, 0.0):
        bench.submit(model="slow", timeout_ms=60_000)
        bench.step()
        (call,) = bench.scheduler._calls.values()
        assert call.seconds == takes
        bench.workers.answer("slow")
        bench.step()
        monkeypatch.setattr(LatencyModel, "call_seconds", broken)


def test_where_it_cannot_be_told_who_is_almost_done_the_next_call_waits_for_the_end(
    bench: Bench, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Call, "almost_done", fails)
    first, second = bench.submit(), list[Future[list[Array]]]()
    bench.step()
    for _ in range(2):
        second.append(bench.submit())
        clock.now += 0.0095
        bench.step()
        assert len(bench.workers.dispatched) == 1
    for _ in range(2):
        bench.workers.answer()
        bench.step()
    assert [future.exception(0) for future in (first, *second)] == [None] * 3
    assert bench.counts("planner_failed") == (2,)


# Leaving


def test_draining_refuses_what_is_new_and_answers_what_was_accepted(
    bench: Bench, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    future = bench.submit()

    def sleep(seconds: float) -> None:
        clock.now += seconds
        with pytest.raises(NotReady, match="draining"):
            bench.submit()
        bench.step()
        if bench.workers.calls:
            bench.workers.answer()

    monkeypatch.setattr(clock, "sleep", sleep)
    assert bench.scheduler.drain(30)
    assert future.exception(0) is None


def test_draining_says_when_it_did_not_end_in_time(bench: Bench, clock: Clock) -> None:
    bench.submit()
    started, accepting = clock.now, [bench.scheduler.accepting]
    assert not bench.scheduler.drain(3)
    assert [*accepting, bench.scheduler.accepting] == [True, False]
    assert clock.now - started == pytest.approx(3, abs=0.1)


def test_whoever_fails_to_hear_an_answer_keeps_it_from_nobody_else(
    bench: Bench, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    bench.submit()
    bench.step()  # then what comes next waits
    bench.scheduler.accept("m", request(), fails, 100, 0)
    late, good = bench.submit(timeout_ms=100), bench.submit()
    clock.now += 0.2
    bench.step()
    assert isinstance(failure(late), DeadlineExceeded)
    for _ in range(2):
        bench.workers.answer()
        bench.step()
    assert good.exception(0) is None
    assert bench.scheduler.outstanding() == 0
    assert "could not be handed over" in caplog.text


def test_closing_ends_what_arrived_what_waits_and_what_runs(clock: Clock) -> None:
    bench = Bench()
    running = bench.submit(request(group="a"))
    bench.step()
    waiting = bench.submit()
    bench.step()
    arrived = bench.submit()
    bench.close()
    for future in (running, waiting, arrived):
        assert "the runtime was closed" in str(failure(future))
        assert isinstance(failure(future), NotReady)
    assert bench.scheduler.outstanding() == 0
    assert bench.counts("request_accepted", "request_failed") == (3, 3)


def test_after_closing_everything_is_refused_and_closing_again_is_harmless(clock: Clock) -> None:
    bench = Bench()
    bench.close()
    with pytest.raises(NotReady):
        bench.submit()
    with pytest.raises(NotReady):
        bench.scheduler.call(lambda: pytest.fail("nobody is there to run it"))
    bench.scheduler.close()


def test_a_request_accepted_just_before_the_end_ends_too(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, ends = Bench(), list[LraiError | None]()
    hand_over = bench.scheduler._hand_over

    def closed_meanwhile(item: Any) -> bool:
        bench.close()
        return hand_over(item)

    monkeypatch.setattr(bench.scheduler, "_hand_over", closed_meanwhile)
    bench.scheduler.accept("m", request(), lambda _, error, __: ends.append(error), None, 0)
    assert isinstance(ends[0], NotReady)


def test_removing_a_model_ends_what_waits_and_what_runs_of_it(bench: Bench) -> None:
    running = bench.submit(request(group="a"))
    bench.step()
    waiting = bench.submit()
    bench.step()
    bench.scheduler.remove("m")
    for future in (running, waiting):
        assert "'m' was unloaded" in str(failure(future))
    assert bench.scheduler.outstanding() == 0
    bench.workers.answer()  # too late
    bench.step()
    with pytest.raises(ModelNotFound):
        bench.submit()
    bench.scheduler.remove("m")


def test_a_request_on_its_way_to_a_removed_model_ends_too(bench: Bench) -> None:
    future = bench.submit()
    bench.scheduler.remove("m")
    bench.step()
    assert "'m' was unloaded" in str(failure(future))


# Progress


def test_silence_is_counted_from_the_first_who_waits_not_from_the_last_answer(
    bench: Bench, clock: Clock
) -> None:
    limits = ActorConfig(hang_seconds=6, hang_factor=10)
    clock.now += 3600
    bench.submit()
    assert not bench.scheduler.stalled("m", limits)
    bench.step()
    clock.now += 7
    assert bench.scheduler.stalled("m", limits)
    bench.workers.answer()
    bench.step()
    clock.now += 7
    assert not bench.scheduler.stalled("m", limits)


def test_a_call_that_was_predicted_to_take_long_may(bench: Bench, clock: Clock) -> None:
    limits = ActorConfig(hang_seconds=6, hang_factor=10)
    bench.submit()
    bench.step()
    (call,) = bench.scheduler._calls.values()
    call.seconds = 8.0
    clock.now += 79
    assert not bench.scheduler.stalled("m", limits)
    clock.now += 2
    assert bench.scheduler.stalled("m", limits)


def test_a_model_without_an_answer_is_stalled_while_another_one_is_answered(
    bench: Bench, clock: Clock
) -> None:
    limits = ActorConfig(hang_seconds=6, hang_factor=10)
    bench.scheduler._cpus = 2
    bench.add("other")
    clock.now += 3600  # nothing was asked of either
    silent = bench.submit(model="other", timeout_ms=60_000)
    for seconds in range(7):
        assert not bench.scheduler.stalled("other", limits), f"after {seconds} s"
        bench.submit()
        bench.step()
        clock.now += 1
        bench.workers.answer()
        bench.step()
    assert bench.scheduler.stalled("other", limits)
    assert not bench.scheduler.stalled("m", limits)
    bench.workers.answer("other")
    bench.step()
    assert silent.done()
    clock.now += 7
    bench.submit(model="other")
    bench.step()
    assert not bench.scheduler.stalled("other", limits), "its first request for long"
    bench.workers.refuse("other")
    bench.step()
    assert not bench.scheduler.stalled("not loaded", limits)


def test_a_model_may_wait_behind_a_long_call_of_another_one_and_is_silent_by_its_own(
    bench: Bench, clock: Clock
) -> None:
    limits = ActorConfig(hang_seconds=6, hang_factor=10)
    bench.scheduler._cpus = 1
    slow = [replace_ms(point, 8000) for point in PROFILE]
    bench.scheduler.add("slow", [Replica("slow", slow)], SchedulerConfig())
    bench.add("third")
    bench.submit(model="slow", timeout_ms=60_000)
    bench.step()
    for name in ("m", "third"):
        bench.submit(model=name, timeout_ms=60_000)
        clock.now += 4
        bench.step()
    bench.workers.answer("slow")
    bench.step()
    for _ in range(2):  # one of them waits for the other one's call, too
        assert len(bench.workers.calls) == 1
        assert not any(bench.scheduler.stalled(name, limits) for name in ("m", "third"))
        clock.now += 0.01
        bench.workers.answer(next(iter(bench.workers.calls)))
        bench.step()
    bench.scheduler._cpus = 2
    bench.submit(timeout_ms=60_000)
    bench.step()
    clock.now += 0.001
    bench.submit(model="slow", timeout_ms=60_000)
    bench.step()
    clock.now += 7
    assert bench.scheduler.stalled("m", limits), "the long call began after its own"
    assert not bench.scheduler.stalled("slow", limits)
    for name in ("m", "slow"):
        bench.workers.answer(name)
    bench.step()


def test_many_models_that_take_turns_at_one_cpu_are_not_stalled_but_one_without_an_actor(
    bench: Bench, clock: Clock
) -> None:
    limits = ActorConfig(hang_seconds=3, hang_factor=1)
    bench.scheduler._cpus = 1
    names = [f"m{i}" for i in range(12)]
    for name in names:
        profile = [replace_ms(point, 1000) for point in PROFILE]
        bench.scheduler.add(name, [Replica(name, profile)], SchedulerConfig())
        bench.submit(model=name, timeout_ms=60_000)
    bench.workers.down.add("m")
    bench.submit(timeout_ms=60_000)
    for done in range(12):
        bench.step()
        assert not any(bench.scheduler.stalled(name, limits) for name in names)
        assert bench.scheduler.stalled("m", limits) == (done > 3)
        clock.now += 1
        bench.workers.answer(next(iter(bench.workers.calls)))
    bench.step()
    bench.workers.down.clear()
    bench.step()
    bench.workers.answer()
    bench.step()


def test_copies_that_nobody_waits_for_may_wait_for_long(bench: Bench, clock: Clock) -> None:
    limits = ActorConfig(hang_seconds=6, hang_factor=10)
    bench.scheduler._cpus = 1
    bench.add("copies")
    bench.submit(model="copies", timeout_ms=60_000, priority=BACKGROUND)
    bench.submit()
    bench.step()
    clock.now += 7
    bench.submit(model="copies", timeout_ms=60_000)
    assert not bench.scheduler.stalled("copies", limits)


# The thread


class PromptWorkers(FakeWorkers):
    """Answers at the next poll, and kills, refuses or loses every so often."""

    def __init__(self, failing: bool = False) -> None:
        super().__init__()
        self.failing = failing

    def poll(self, now: float, ready: Collection[object]) -> list[Outcome]:
        for model in list(self.calls):
            turn = len(self.dispatched)
            if self.failing and turn % 7 == 3:
                self.lose(model)
            elif self.failing and turn % 7 == 5:
                self.refuse(model)
            else:
                self.answer(model)
        return super().poll(now, ready)

    def next_check(self, now: float) -> float:
        return now if self.calls else now + 1


@pytest.fixture
def events() -> Iterator[EventBus]:
    made = EventBus()
    yield made
    made.close()


@pytest.mark.parametrize("failing", [False, True])
def test_many_threads_get_their_own_answer_or_one_error_each(
    events: EventBus, failing: bool
) -> None:
    scheduler = Scheduler(SchedulerConfig(), PromptWorkers(failing), events)
    scheduler.add("m", [Replica("m", PROFILE)], SchedulerConfig())
    scheduler.start()

    def caller(_: int) -> Counter[str]:
        ends: Counter[str] = Counter()
        for _ in range(40):
            one = request()
            try:
                answer = submit(scheduler, "m", one).result(10)
            except LraiError as error:
                ends[type(error).__name__] += 1
            else:
                assert answer[0][0, 0] == 2 * number(one)
                ends["answered"] += 1
        return ends

    with ThreadPoolExecutor(8) as threads:
        ends = sum(threads.map(caller, range(8)), Counter[str]())
    assert scheduler.drain(10)
    scheduler.close()
    counts = events.counts()
    assert sum(ends.values()) == counts["request_accepted"] == 320
    assert ends["answered"] == counts["request_answered"]
    assert failing or ends["answered"] == 320


def test_an_action_runs_in_the_schedulers_thread(events: EventBus) -> None:
    scheduler = Scheduler(SchedulerConfig(), FakeWorkers(), events)
    scheduler.start()
    ran: Future[str] = Future()
    scheduler.call(lambda: ran.set_result(threading.current_thread().name))
    assert ran.result(10) == "lrai-scheduler"
    scheduler.close()


def test_a_model_may_be_added_while_the_scheduler_goes_through_the_others(bench: Bench) -> None:
    bench.workers.when_asked = lambda: bench.add("new")
    bench.submit()
    bench.step()
    late = bench.submit(model="new")
    bench.step()
    bench.workers.answer("new")
    bench.step()
    assert late.exception(0) is None


def test_a_model_may_be_added_while_one_of_several_is_chosen(bench: Bench) -> None:
    """Another thread may come between any two models that are looked at."""

    class Watched(dict[str, Any]):
        def values(self) -> Any:
            return Looked(super().values(), self)

    class Looked(list[Any]):
        def __init__(self, values: Any, models: Watched) -> None:
            super().__init__(values)
            self._models, self._seen = models, set(models)

        def __iter__(self) -> Iterator[Any]:
            for value in super().__iter__():
                yield value
                if set(self._models) != self._seen:
                    raise RuntimeError("dictionary changed size during iteration")

    bench.add("other")
    bench.scheduler._models = Watched(bench.scheduler._models)
    added = iter(range(9))

    class Used(float):
        def __mul__(self, factor: Any) -> float:
            bench.add(f"new {next(added)}")
            return 0.0

    for model in list(bench.scheduler._models.values()):
        model.used_seconds = Used()
    futures = [bench.submit(model=name) for name in ("m", "other")]
    bench.step()
    for name in ("m", "other"):
        bench.workers.answer(name)
    bench.step()
    assert [future.exception(0) for future in futures] == [None, None]


def test_a_call_that_cannot_be_made_is_made_one_by_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch = bench.workers.dispatch

    def without_memory_to_join(model: str, batch: Batch) -> None:
        if len(batch.requests) > 1:
            raise MemoryError
        dispatch(model, batch)

    monkeypatch.setattr(bench.workers, "dispatch", without_memory_to_join)
    futures = [bench.submit() for _ in range(3)]
    for _ in futures:
        bench.step()
        bench.workers.answer()
    bench.step()
    assert [future.exception(0) for future in futures] == [None] * 3
    assert [len(batch) for batch in bench.workers.dispatched] == [1, 1, 1]


def test_one_request_that_cannot_be_handed_over_ends_and_the_next_one_runs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(bench.workers, "dispatch", without_memory)
        ended = bench.submit()
        bench.step()
    assert isinstance(failure(ended), ActorError)
    following = bench.submit()
    bench.step()
    bench.workers.answer()
    bench.step()
    assert following.exception(0) is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("method", ["dispatch", "poll", "state"])
def test_even_if_the_thread_dies_of_a_bug_nobody_waits_for_ever(
    method: str, events: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = FakeWorkers()
    scheduler = Scheduler(SchedulerConfig(), workers, events)
    scheduler.add("m", [Replica("m", PROFILE)], SchedulerConfig())

    def bug(*_: object) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(workers, method, bug)
    future = submit(scheduler, "m", request())
    scheduler.start()
    assert isinstance(future.exception(10), NotReady)
    scheduler.thread.join(10)
    with pytest.raises(NotReady):
        submit(scheduler, "m", request())
    assert scheduler.outstanding() == 0
    scheduler.close()


# What nobody has seen for a while


def test_a_model_that_was_slow_once_is_tried_again(bench: Bench, clock: Clock) -> None:
    """What was learned holds for a second; then one is run, late or not, to see how it is now."""
    latency = bench.latency()
    for _ in range(50):
        latency.observe(1, 0, 0.2, 0.2)
    with pytest.raises(DeadlineExceeded, match="the model takes"):
        bench.submit(timeout_ms=50)
    clock.now += 1.5
    tried, other = bench.submit(timeout_ms=50), bench.submit(timeout_ms=40)
    bench.step()
    assert not tried.done()
    assert len(bench.workers.dispatched) == 1
    clock.now += 0.2
    bench.workers.answer()
    bench.step()
    assert isinstance(failure(other), DeadlineExceeded)
    with pytest.raises(DeadlineExceeded, match="the model takes"):
        bench.submit(timeout_ms=50)  # one call, and it is known again


def test_a_model_that_is_fast_again_is_believed_from_its_next_answer_on(
    bench: Bench, clock: Clock
) -> None:
    for _ in range(50):
        bench.latency().observe(1, 0, 0.2, 0.2)
    clock.now += 1.5
    for _ in range(20):
        tried = bench.submit(timeout_ms=50)
        bench.step()
        clock.now += 0.01
        bench.workers.answer()
        bench.step()
        assert tried.exception(0) is None


def test_an_actor_that_was_slow_once_is_tried_again_though_another_one_answers(
    bench: Bench, clock: Clock
) -> None:
    bench.scheduler._cpus = 2
    replicas = [Replica("one", PROFILE), Replica("other", PROFILE)]
    bench.scheduler.add("two", replicas, SchedulerConfig())
    for _ in range(50):
        replicas[1].latency.observe(1, 0, None, 0.2)
    clock.now += 2.0
    ends = [bench.submit(model="two")]
    bench.step()
    clock.now += 0.01
    bench.workers.answer("one")
    ends += [bench.submit(model="two")]
    bench.step()
    ends += [bench.submit(model="two", timeout_ms=15)]  # too late for both, by what is known
    bench.step()
    assert bench.workers.calls.keys() == {"one", "other"}
    for actor in ("one", "other"):
        clock.now += 0.005
        bench.workers.answer(actor)
        bench.step()
    assert [end.exception(0) for end in ends] == [None, None, None]


def test_a_model_with_more_threads_gets_its_cpus_in_its_turn(bench: Bench, clock: Clock) -> None:
    """Others that leave one CPU at a time, and are never without work, would keep it from them."""
    bench.scheduler._cpus = 2
    bench.scheduler.add("wide", [Replica("wide", PROFILE, threads=2)], SchedulerConfig())
    bench.add("n")
    bench.submit()
    bench.submit(model="n")
    bench.step()
    wide = bench.submit(model="wide")
    clock.now += 0.005
    bench.submit()
    bench.submit(model="n")
    bench.workers.answer("m")
    bench.step()
    assert "m" not in bench.workers.calls, "its turn comes after the wide one's"
    bench.workers.answer("n")
    bench.step()
    assert set(bench.workers.calls) == {"wide"}
    bench.workers.answer("wide")
    bench.step()
    assert wide.exception(0) is None
    for model in ("m", "n"):
        bench.workers.answer(model)
    bench.step()


def test_who_was_answered_is_told_after_the_engine_has_its_next_call(bench: Bench) -> None:
    order: list[str] = []
    first = bench.submit()
    first.add_done_callback(lambda _: order.append("told"))
    bench.step()
    bench.submit()
    bench.workers.when_asked = lambda: order.append("dispatched")
    bench.workers.answer()
    bench.step()
    assert order[-1] == "told"
    assert len(bench.workers.dispatched) == 2
    bench.workers.when_asked = lambda: None
    bench.workers.answer()
    bench.step()


# Several models


def test_copies_that_nobody_waits_for_have_the_cpu_that_others_leave(
    bench: Bench, clock: Clock
) -> None:
    bench.scheduler._cpus = 1
    bench.scheduler.add("copies", [Replica("copies", PROFILE)], SchedulerConfig(max_batch_rows=1))
    for _ in range(3):
        bench.submit(model="copies", priority=BACKGROUND)
    clock.now += 5  # they have waited for long
    for _ in range(3):
        bench.submit(timeout_ms=50_000)
        bench.step()
        assert list(bench.workers.calls) == ["m"]
        clock.now += 0.01
        bench.submit(timeout_ms=50_000)
        bench.workers.answer()
    bench.step()
    bench.workers.answer()
    for _ in range(3):
        bench.step()
        bench.workers.answer("copies")
    bench.step()
    assert bench.scheduler.outstanding() == 0


def test_copies_keep_no_actor_from_its_next_call(bench: Bench, clock: Clock) -> None:
    bench.scheduler._cpus = 1
    bench.latency().overhead_seconds = 1e-6
    bench.add("copies")
    bench.submit()
    bench.step()
    bench.submit(model="copies", priority=BACKGROUND)
    clock.now += 0.0095
    bench.submit()
    bench.step()
    assert len(bench.workers.calls["m"]) == 2
    assert "copies" not in bench.workers.calls


def test_what_is_refused_keeps_nobody_else_from_the_cpu(bench: Bench, clock: Clock) -> None:
    bench.scheduler._cpus = 1
    bench.add("other")
    bad = [bench.submit(request(group=f"{i}"), timeout_ms=50_000) for i in range(100)]
    clock.now += 5  # nothing was answered for long
    good, served = list[Future[list[Array]]](), 0
    for _ in range(40):
        good.append(bench.submit(model="other", timeout_ms=200))
        bench.step()
        (at_work,) = bench.workers.calls
        clock.now += 0.01
        served += at_work == "other"
        if at_work == "other":
            bench.workers.answer(at_work)
        else:
            bench.workers.refuse(at_work)
    assert served >= 10
    while not all(future.done() for future in (*bad, *good)):
        bench.step()
        for model in list(bench.workers.calls):
            bench.workers.answer(model)


def test_a_model_that_others_keep_from_the_cpu_has_a_call_every_second(
    bench: Bench, clock: Clock
) -> None:
    """As one that is warmed up, whose requests have minutes, beside one that is never idle."""
    bench.scheduler._cpus = 1
    bench.add("new")
    new = [bench.submit(request(group=group), "new", timeout_ms=120_000) for group in "ab"]
    turns = list[float]()
    began = clock.now
    for _ in range(300):
        bench.submit(timeout_ms=200)
        bench.step()
        (at_work,) = bench.workers.calls
        if at_work == "new":
            turns.append(clock.now - began)
        clock.now += 0.01
        bench.submit(timeout_ms=200)
        bench.workers.answer(at_work)
    bench.step()
    assert [future.exception(0) for future in new] == [None, None]
    assert turns == [pytest.approx(1, abs=0.02), pytest.approx(2, abs=0.04)]
    bench.workers.answer()
    bench.step()


def test_of_two_models_with_two_actors_each_calls_are_on_different_cpus(bench: Bench) -> None:
    bench.scheduler._cpus = 2
    for name in ("a", "b"):
        replicas = [Replica(f"{name}{cpu}", PROFILE) for cpu in (0, 1)]
        for cpu, replica in enumerate(replicas):
            replica.cpus = (cpu,)
        bench.scheduler.add(name, replicas, SchedulerConfig())
    bench.submit(model="a")
    bench.submit(model="b")
    bench.step()
    assert sorted(bench.workers.calls) == ["a0", "b1"]
    for actor in ("a0", "b1"):
        bench.workers.answer(actor)
    bench.step()


def test_who_names_no_time_may_wait_as_long_as_rows_of_usual_length_take(bench: Bench) -> None:
    usual = LatencyPoint(rows=1, length=256, median_ms=50.0, spread_ms=0.0)
    bench.scheduler.add(
        "text", [Replica("text", [usual])], SchedulerConfig()
    )  # a second: twenty times that
    bench.workers.down.add("text")
    for name, timeout_ms in (("none", None), ("soon", 500)):
        bench.submit(request(group=name), "text", timeout_ms)
    bench.step()
    bench.workers.down.clear()
    first, second = (waiting.group for waiting in bench.scheduler._models["text"].queue.urgent)
    assert (first, second) == (("soon",), ("none",))
    for _ in range(2):
        bench.step()
        bench.workers.answer("text")
    bench.step()


# Whatever happens, in any order


class Anything(RuleBasedStateMachine):
    """Every accepted request ends exactly once, with its own answer or one error."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.clock = Clock()
        self.patch.setattr(module, "time", self.clock)
        self.bench = Bench(max_queue_rows=20, max_batch_rows=6)
        self.bench.add("n")
        self.ends: Counter[int] = Counter()
        self.accepted: list[tuple[ValidRequest, Future[list[Array]]]] = []
        self.planner_works = True
        working = plan

        def plan_or_fail(*args: Any) -> Any:
            if not self.planner_works:
                raise RuntimeError("planner")
            return working(*args)

        self.patch.setattr(module, "plan", plan_or_fail)

    models = st.sampled_from(["m", "n"])

    @rule(
        model=models,
        rows=st.integers(1, 8),
        group=st.sampled_from("ab"),
        timeout_ms=st.sampled_from([None, 0, 11, 30, 200]),
    )
    def submit(self, model: str, rows: int, group: str, timeout_ms: float | None) -> None:
        one = request(rows, group=group)
        try:
            future = self.bench.submit(one, model, timeout_ms)
        except LraiError:
            return
        future.add_done_callback(lambda _: self.ends.update([number(one)]))
        self.accepted.append((one, future))

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from([future for _, future in self.accepted])).cancel()

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def cancel_while_the_scheduler_looks(self, data: st.DataObject) -> None:
        future = data.draw(st.sampled_from([future for _, future in self.accepted]))
        self.bench.workers.when_asked = future.cancel

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.1]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def step(self) -> None:
        self.bench.step()

    @precondition(lambda self: self.bench.workers.calls)
    @rule(data=st.data(), outcome=st.sampled_from(["answer", "answer", "refuse", "lose"]))
    def finish(self, data: st.DataObject, outcome: str) -> None:
        model = data.draw(st.sampled_from(sorted(self.bench.workers.calls)))
        getattr(self.bench.workers, outcome)(model)

    @rule(works=st.booleans())
    def planner(self, works: bool) -> None:
        self.planner_works = works

    @rule(model=models)
    def give_up_and_load_again(self, model: str) -> None:
        self.bench.workers.give_up(model)
        self.bench.step()
        self.bench.scheduler.remove(model)
        self.bench.workers.down.discard(model)
        self.bench.add(model)

    @rule(model=models)
    def unload_and_load_again(self, model: str) -> None:
        self.bench.scheduler.remove(model)
        self.bench.workers.calls.pop(model, None)
        self.bench.add(model)

    @invariant()
    def nobody_ends_twice_and_answers_are_their_callers(self) -> None:
        assert not [number for number, times in self.ends.items() if times > 1]
        for one, future in self.accepted:
            if future.done() and not future.cancelled() and future.exception() is None:
                np.testing.assert_array_equal(future.result()[0], one.arrays[0] * 2)

    @invariant()
    def the_bounds_hold(self) -> None:
        assert 0 <= self.bench.scheduler.outstanding() <= 20

    @invariant()
    def nobody_runs_more_than_twice_and_the_second_time_alone(self) -> None:
        runs: dict[int, list[int]] = {}
        for batch in self.bench.workers.begun:
            for one in batch:
                runs.setdefault(one, []).append(len(batch))
        assert all(len(sizes) <= 2 and sizes[1:] in ([], [1]) for sizes in runs.values())

    def teardown(self) -> None:
        try:
            self.bench.close()
            assert self.ends == Counter(number(one) for one, _ in self.accepted)
            for _, future in self.accepted:
                try:
                    error = future.exception(0)
                except CancelledError:
                    continue
                assert error is None or isinstance(error, LraiError)
            assert self.bench.scheduler.outstanding() == 0
            assert not any(model.inside for model in self.bench.scheduler._models.values())
            accepted, answered, failed = self.bench.counts(
                "request_accepted", "request_answered", "request_failed"
            )
            assert len(self.accepted) == accepted == answered + failed
        finally:
            self.patch.undo()


TestAnythingInAnyOrder = Anything.TestCase
TestAnythingInAnyOrder.settings = settings(max_examples=60, stateful_step_count=40)


def test_each_call_goes_to_the_variant_that_is_fastest_at_it_and_its_answers_say_which(
    bench: Bench, clock: Clock
) -> None:
    broad = [replace_ms(PROFILE[0], 11.0), replace_ms(PROFILE[1], 2.0)]
    bench.scheduler.add("two", [Replica("two", PROFILE, broad)], SchedulerConfig())
    by: list[int] = []
    for count in (1, 64):
        for _ in range(count):
            bench.scheduler.accept("two", request(), lambda *ended: by.append(ended[2]), None, 0)
        bench.step()
        bench.workers.answer("two")
        bench.step()
    assert bench.workers.variants == [0, 1]
    assert by == [0] + 64 * [1]


def replace_ms(point: LatencyPoint, median_ms: float) -> LatencyPoint:
    return msgspec.structs.replace(point, median_ms=median_ms)
