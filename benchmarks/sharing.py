"""Event simulation of what shares: several models one processor, and several actors one queue.

The planner, the choice among models and the latency models are the scheduler's own; only its loop
is written out here, with a clock that jumps. All times are seconds.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import numpy as np

from benchmarks.simulation import TICK, Server
from lrai_core.scheduler.planner import Bounds, Decision, Offer, choose, plan
from lrai_core.scheduler.waiting import Queue, Waiting

# The scheduler's: over which a model's use is remembered, and what a request counts of more.
_SHARE_SECONDS, _OVER_SHARE = 1.0, 0.5
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
    arrivals, total = mix.arrivals, len(mix.arrivals)
    answered, asked = [0] * len(mix.models), [0] * len(mix.models)
    now, arrived = 0.0, 0
    while arrived < total or len(rule):
        if not len(rule):
            now = max(now, arrivals[arrived].time)
        while arrived < total and arrivals[arrived].time <= now:
            rule.add(arrived, arrivals[arrived])
            asked[arrivals[arrived].model] += 1
            arrived += 1
        model, sequences = rule.next_call(now)
        if sequences:
            seconds = mix.models[model].tau(len(sequences))
            now += seconds
            rule.ran(model, len(sequences), seconds)
            first = now - mix.models[model].slo_seconds - TICK
            answered[model] += sum(arrivals[sequence].time >= first for sequence in sequences)
    pairs = zip(answered, asked, strict=True)
    return [good / wanted if wanted else 1.0 for good, wanted in pairs]


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
    """The scheduler's way: every model plans its next call, and `choose` picks one of them."""

    def __init__(self, models: Sequence[Server]) -> None:
        self._models = models
        self._queues = [Queue() for _ in models]
        self._latencies = [model.profile() for model in models]
        self._used = [0.0] * len(models)
        self._used_at = 0.0

    def add(self, sequence: int, arrival: Arrival) -> None:
        """See `Rule.add`."""
        due = arrival.time + self._models[arrival.model].slo_seconds
        self._queues[arrival.model].add(Waiting(0, due, sequence, due, 0, 1, 0))

    def next_call(self, now: float) -> tuple[int, Sequence[int]]:
        """See `Rule.next_call`."""
        offers: list[tuple[int, Decision]] = []
        for index, (queue, model) in enumerate(zip(self._queues, self._models, strict=True)):
            if not len(queue):
                continue
            decision = plan(queue, self._latencies[index], now, Bounds(model.most_rows))
            for sequence in decision.drop:
                queue.remove(sequence)
            if decision.dispatch:
                offers.append((index, decision))
        if not offers:
            return 0, ()
        chosen, decision = offers[self._choose(offers, now) if len(offers) > 1 else 0]
        for sequence in decision.dispatch:
            self._queues[chosen].remove(sequence)
        return chosen, decision.dispatch

    def ran(self, model: int, rows: int, seconds: float) -> None:
        """See `Rule.ran`."""
        self._used[model] += seconds
        self._latencies[model].observe(rows, 0, seconds, seconds)

    def _choose(self, offers: Sequence[tuple[int, Decision]], now: float) -> int:
        fade = math.exp((self._used_at - now) / _SHARE_SECONDS)
        self._used_at = now
        self._used = [seconds * fade for seconds in self._used]
        share = sum(self._used[model] for model, _ in offers) / len(offers)
        return choose(
            [
                Offer(d.due, d.predicted_seconds, len(d.dispatch) * _OVER_SHARE**over)
                for over, d in [(self._used[model] > share, d) for model, d in offers]
            ],
            now,
        )

    def __len__(self) -> int:
        """See `Rule.__len__`."""
        return sum(len(queue) for queue in self._queues)


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
