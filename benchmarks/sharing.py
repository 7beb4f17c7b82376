"""Event simulation of what shares: several models one processor, and several actors one queue.

Of several models the scheduler itself is asked, with everything that it knows; for several actors
its loop is written out, around its planner and latency models. All times are seconds.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Final, NamedTuple, Protocol

import numpy as np
import zmq

from benchmarks.simulation import TICK, Actual, Flags, Server, actual_of
from lrai_core.artifact import LatencyPoint
from lrai_core.config import SchedulerConfig, available_cpus
from lrai_core.errors import DeadlineExceeded, LraiError, QueueFull
from lrai_core.events import EventBus
from lrai_core.protocol import Array, ValidRequest
from lrai_core.scheduler import scheduler
from lrai_core.scheduler.latency import LatencyModel
from lrai_core.scheduler.planner import Bounds, plan
from lrai_core.scheduler.scheduler import Scheduler
from lrai_core.scheduler.state import Pending, Replica
from lrai_core.scheduler.waiting import Queue, Waiting
from lrai_core.wire.workers import Answered, Batch, Outcome

_RATED_ROWS: Final = 8  # a mix at load 1 keeps the processor busy with calls of that many


class Arrival(NamedTuple):
    """A request for one of several models."""

    time: float
    model: int


@dataclass(frozen=True, slots=True)
class Mix:
    """Models on one processor, and what is asked of them.

    Attributes:
        models: What each one's calls take, and its SLO.
        arrivals: In order of time.
    """

    models: Sequence[Server]
    arrivals: Sequence[Arrival]


class Rule(Protocol):
    """Decides which model's requests an idle processor runs next."""

    def add(self, sequence: int, arrival: Arrival) -> None:
        """Let a request wait."""
        ...

    def next_call(self, now: float) -> tuple[int, Sequence[int]]:
        """Return a model and the sequences that it runs now; none where all were given up."""
        ...

    def ran(self, model: int, rows: int, seconds: float) -> None:
        """Learn what a call took."""
        ...

    def __len__(self) -> int:
        """Return how many requests wait."""
        ...


def mix(kind: str, skew: float, load: float, seconds: float, seed: int, count: int = 8) -> Mix:
    """Return models and arrivals for them.

    Args:
        kind: `equal` models, `mixed` ones, or ones where coalescing saves next to nothing
            (`linear`).
        skew: The model of rank r is asked for in proportion to 1 / r ** skew.
        load: 1 keeps the processor busy if every call has eight requests.
        seconds: How long requests arrive.
        seed: Of what is drawn.
        count: How many models.
    """
    random = np.random.default_rng(seed)
    models = [_model(kind, random) for _ in range(count)]
    weights = random.permutation(1 / np.arange(1, count + 1) ** skew)
    weights /= weights.sum()
    per_request = sum(
        weight * model.tau(_RATED_ROWS) / _RATED_ROWS
        for weight, model in zip(weights, models, strict=True)
    )
    arrivals: list[Arrival] = []
    for index, weight in enumerate(weights.tolist()):
        drawn = random.poisson(load / per_request * weight * seconds)
        arrivals += [Arrival(time, index) for time in random.uniform(0, seconds, drawn).tolist()]
    return Mix(models, sorted(arrivals))


def share_on_time(rule: Rule, mix: Mix) -> list[float]:
    """Return for every model the share of its requests that are answered in time, 1 of none."""
    answered, asked = [0] * len(mix.models), [0] * len(mix.models)
    good = on_time(rule, mix, [actual_of(model) for model in mix.models]).tolist()
    for arrival, in_time in zip(mix.arrivals, good, strict=True):
        asked[arrival.model] += 1
        answered[arrival.model] += in_time
    pairs = zip(answered, asked, strict=True)
    return [good / wanted if wanted else 1.0 for good, wanted in pairs]


def on_time(rule: Rule, mix: Mix, actuals: Sequence[Actual]) -> Flags:
    """Return for each arrival whether it was answered in time.

    Args:
        rule: Asked whenever the processor is idle and something waits.
        mix: Its SLOs count.
        actuals: Of each model, what its calls take; asked once for each call, in order.
    """
    arrivals, total = mix.arrivals, len(mix.arrivals)
    found = np.zeros(total, dtype=np.bool_)
    now, arrived = 0.0, 0
    while arrived < total or len(rule):
        if not len(rule):
            now = max(now, arrivals[arrived].time)
        while arrived < total and arrivals[arrived].time <= now:
            rule.add(arrived, arrivals[arrived])
            arrived += 1
        model, sequences = rule.next_call(now)
        if sequences:
            seconds = actuals[model](len(sequences), now)
            now += seconds
            rule.ran(model, len(sequences), seconds)
            first = now - mix.models[model].slo_seconds - TICK
            for sequence in sequences:
                found[sequence] = arrivals[sequence].time >= first
    return found


class InOrder:
    """The model of the most urgent request runs all that waits for it.

    Args:
        models: The mix's.
        by_deadline: Urgent is the earliest deadline; otherwise who came first.
        drops: Whether requests are given up that would be late alone.
    """

    def __init__(self, models: Sequence[Server], *, by_deadline: bool, drops: bool = False) -> None:
        self._models, self._by_deadline, self._drops = models, by_deadline, drops
        self._queues: list[deque[tuple[float, int]]] = [deque() for _ in models]

    def add(self, sequence: int, arrival: Arrival) -> None:
        """See `Rule.add`."""
        due = arrival.time + self._models[arrival.model].slo_seconds
        self._queues[arrival.model].append((due, sequence))

    def next_call(self, now: float) -> tuple[int, Sequence[int]]:
        """See `Rule.next_call`."""
        if self._drops:
            self._drop(now)
        asked = [index for index, queue in enumerate(self._queues) if queue]
        if not asked:
            return 0, ()
        # Sequences are in order of arrival.
        place = 0 if self._by_deadline else 1
        model = min(asked, key=lambda index: self._queues[index][0][place])
        queue = self._queues[model]
        count = min(len(queue), self._models[model].most_rows)
        return model, [queue.popleft()[1] for _ in range(count)]

    def ran(self, model: int, rows: int, seconds: float) -> None:
        """Learn nothing."""

    def _drop(self, now: float) -> None:
        for model, queue in zip(self._models, self._queues, strict=True):
            while queue and now + model.tau(1) > queue[0][0] + TICK:
                queue.popleft()

    def __len__(self) -> int:
        """See `Rule.__len__`."""
        return sum(len(queue) for queue in self._queues)


class Ours:
    """The scheduler itself, from its door to the end of a call, on a clock that jumps.

    Args:
        models: The mix's.
        profiles: What is known of each at first; the right ones where nothing is said.
        learns: Whether calls correct the latency models.
    """

    def __init__(
        self,
        models: Sequence[Server],
        profiles: Sequence[Sequence[LatencyPoint]] = (),
        *,
        learns: bool = True,
    ) -> None:
        profiles = profiles or [model.points() for model in models]
        self._processor, self._events = _Processor(), EventBus()
        with _clock_at(0.0):
            self._scheduler = Scheduler(SchedulerConfig(), self._processor, self._events)
            for index, (model, profile) in enumerate(zip(models, profiles, strict=True)):
                slo_ms = model.slo_seconds * 1e3
                config = SchedulerConfig(max_batch_rows=model.most_rows, latency_slo_ms=slo_ms)
                # A call takes the whole processor, whatever machine this is simulated on.
                replica = Replica(str(index), profile, threads=available_cpus())
                if not learns:
                    replica.latency = _Frozen(profile)
                self._scheduler.add(str(index), [replica], config)
        self._begun, self._end = 0.0, math.inf  # of the call that runs

    def add(self, sequence: int, arrival: Arrival) -> None:
        """Let a request wait, unless the scheduler refuses it."""
        if arrival.time > self._end:
            self._answer()
        request = ValidRequest((np.array(sequence),), 1, 0, (), (), 0)
        with _clock_at(arrival.time):
            with suppress(DeadlineExceeded, QueueFull):
                self._scheduler.accept(str(arrival.model), request, _tell_nobody, None, 0)
            if self._processor.call:  # else those that come at the same time wait for one another
                self._hear(arrival.time)

    def next_call(self, now: float) -> tuple[int, Sequence[int]]:
        """See `Rule.next_call`."""
        if self._processor.call:
            self._answer()
        with _clock_at(now):
            self._step()
        if not (call := self._processor.call):
            return 0, ()
        model, batch = call
        self._begun = now
        return model, [int(request.arrays[0]) for request in batch.requests]

    def ran(self, model: int, rows: int, seconds: float) -> None:
        """See `Rule.ran`."""
        del model, rows
        self._end = self._begun + seconds

    def close(self) -> None:
        """End the scheduler."""
        self._scheduler.start()  # only what runs can be ended
        self._scheduler.close()

    def _answer(self) -> None:
        if self._processor.call:
            _, batch = self._processor.call
            # By the same clock, so that nothing seems to be lost on the way to the engine.
            answered = Answered(batch.number, [[] for _ in batch.requests], self._end - self._begun)
            self._processor.call, self._processor.outcomes = None, [answered]
            with _clock_at(self._end):
                self._step()
        self._end = math.inf

    def _hear(self, now: float) -> None:
        """Do what a step does while the processor is taken, in less time."""
        scheduler = self._scheduler
        if any(model.queue.next_deadline() <= now for model in scheduler._models.values()):  # noqa: SLF001
            self._step()
        for _ in range(len(scheduler._arrived)):  # noqa: SLF001
            pending = scheduler._arrived.popleft()  # noqa: SLF001
            if isinstance(pending, Pending):
                scheduler._enqueue(pending)  # noqa: SLF001

    def _step(self) -> None:
        self._scheduler._step(())  # noqa: SLF001 - what its thread does over and over
        if self._events.counts().get("planner_failed"):
            raise RuntimeError("the planner failed, and what waits runs one by one")

    def __len__(self) -> int:
        """See `Rule.__len__`."""
        running = len(self._processor.call[1].requests) if self._processor.call else 0
        return self._scheduler.outstanding() - running


class _Frozen(LatencyModel):
    """Knows what it was told."""

    def observe(self, *_: object) -> bool:
        """Learn nothing."""
        return False


class _Processor:
    """The actors of all models, of which one runs at a time."""

    def __init__(self) -> None:
        self.call: tuple[int, Batch] | None = None  # a model's, which runs
        self.outcomes: list[Outcome] = []

    def register(self, poller: zmq.Poller) -> None:
        """See `Workers.register`."""

    def poll(self, now: float, ready: Collection[object]) -> list[Outcome]:
        """See `Workers.poll`."""
        del now, ready
        found, self.outcomes = self.outcomes, []
        return found

    def next_check(self, now: float) -> float:
        """See `Workers.next_check`."""
        return now + 1.0

    def state(self, name: str) -> tuple[str, int | None]:
        """See `Workers.state`."""
        del name
        return "ready", None

    def dispatch(self, actor: str, batch: Batch) -> None:
        """See `Workers.dispatch`."""
        if self.call:
            raise RuntimeError("two calls at a time")
        self.call = int(actor), batch


@contextmanager
def _clock_at(now: float) -> Iterator[None]:
    """Have the scheduler see this time."""
    names = vars(scheduler)
    real, names["time"] = names["time"], SimpleNamespace(monotonic=lambda: now)
    try:
        yield
    finally:
        names["time"] = real


def _tell_nobody(answer: list[Array] | None, error: LraiError | None, variant: int) -> None:
    """Let an end go unheard: what is in time is counted by the clock."""


def closed_queue(actors: Sequence[Server], clients: int, seconds: float) -> float:
    """Return the answers in time per second of one model's actors.

    Every client asks again as soon as it has its answer or is refused. An idle actor, the fastest
    first, runs what its own latency model plans; deadlines are those of the first actor's SLO.

    Args:
        actors: What a call takes at each.
        clients: How many requests are inside at any time.
        seconds: How long.
    """
    queue, sequence = Queue(), 0
    latencies = [actor.profile() for actor in actors]
    speed = sorted(range(len(actors)), key=lambda index: actors[index].tau(1))
    running: list[tuple[float, int, list[float]]] = []  # end, actor, deadlines
    now, answered, asking = 0.0, 0, clients
    while now < seconds:
        busy = {index for _, index, _ in running}
        for index in speed:
            if index in busy:
                continue
            due = now + actors[0].slo_seconds
            for _ in range(asking):
                queue.add(Waiting(0, due, sequence, due, 0, 1, 0))
                sequence += 1
            asking = 0
            if not len(queue):
                continue
            decision = plan(queue, latencies[index], now, Bounds(actors[index].most_rows))
            chosen = set(decision.dispatch)
            deadlines = [one.deadline for one in queue.urgent if one.sequence in chosen]
            for gone in (*decision.drop, *decision.dispatch):
                queue.remove(gone)
            asking = len(decision.drop)
            if deadlines:
                end = now + actors[index].tau(len(deadlines))
                heapq.heappush(running, (end, index, deadlines))
        now, index, deadlines = heapq.heappop(running)
        answered += sum(now <= deadline + TICK for deadline in deadlines)
        asking += len(deadlines)
        took = actors[index].tau(len(deadlines))
        latencies[index].observe(len(deadlines), 0, took, took)
    return answered / now


def _model(kind: str, random: np.random.Generator) -> Server:
    if kind == "equal":
        return Server(0.005, 0.0005, slo_seconds=0.1)
    if kind == "linear":
        return Server(0.0003, random.uniform(0.001, 0.006), slo_seconds=random.uniform(0.05, 0.2))
    return Server(
        random.uniform(0.001, 0.02),
        random.uniform(0.0002, 0.004),
        slo_seconds=random.uniform(0.05, 0.3),
    )
