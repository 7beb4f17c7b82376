"""Event simulation of one batching server, the exact clairvoyant optimum, and peers' policies.

One server runs calls of equal inputs one after the other; a call of b requests takes `tau(b)`.
Every request has the same SLO. All times are seconds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from lrai_core.artifact import LatencyPoint
from lrai_core.scheduler.latency import LatencyModel
from lrai_core.scheduler.planner import Bounds, Queue, Waiting, plan

Times = npt.NDArray[np.float64]
_MOST_DROPS_AHEAD: Final = 400  # see `clairvoyant`
_TICK: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Server:
    """What a call takes, and what is promised.

    Attributes:
        call_seconds: tau(b) = call_seconds + row_seconds * b.
        most_rows: In one call.
        slo_seconds: From arrival to the end of the call.
    """

    call_seconds: float = 0.010
    row_seconds: float = 0.00025
    most_rows: int = 128
    slo_seconds: float = 0.050

    def tau(self, rows: int) -> float:
        """Return what a call takes by the profile."""
        return self.call_seconds + self.row_seconds * rows


class Policy(Protocol):
    """Decides for an idle server; knows the profile, and of the past what it was told."""

    def decide(self, waiting: deque[float], now: float) -> tuple[int, int, float]:
        """Return how many of the oldest to drop, how many of the rest to run, when to ask again.

        Args:
            waiting: Arrival times, the oldest first; not empty.
            now: The clock.
        """
        ...

    def observe(self, rows: int, seconds: float) -> None:
        """Learn what a call took."""
        ...


def simulate(
    policy: Policy, arrivals: Times, server: Server, actual: Callable[[int, float], float]
) -> npt.NDArray[np.bool_]:
    """Return for each arrival whether it was answered in time.

    Args:
        policy: Asked whenever the server is idle and something waits.
        arrivals: Ascending.
        server: Its SLO counts; what calls take is `actual`'s to say.
        actual: Seconds that a call of so many rows, started at this time, takes.
    """
    on_time = np.zeros(len(arrivals), dtype=np.bool_)
    waiting: deque[float] = deque()
    now, arrived, head = 0.0, 0, 0  # `head`: index of the oldest that waits
    while arrived < len(arrivals) or waiting:
        if not waiting:
            now = max(now, float(arrivals[arrived]))
        while arrived < len(arrivals) and arrivals[arrived] <= now:
            waiting.append(float(arrivals[arrived]))
            arrived += 1
        drop, run, again = policy.decide(waiting, now)
        for _ in range(drop):
            waiting.popleft()
        head += drop
        if run:
            seconds = actual(run, now)
            policy.observe(run, seconds)
            now += seconds
            for index in range(head, head + run):
                on_time[index] = now <= waiting.popleft() + server.slo_seconds + _TICK
            head += run
        elif not drop:
            upcoming = float(arrivals[arrived]) if arrived < len(arrivals) else math.inf
            now = max(now + _TICK, min(again, upcoming))
    return on_time


def clairvoyant(arrivals: Times, server: Server) -> float:
    """Return the largest share of requests that any schedule answers in time.

    Dynamic program over (next request, drops) to the earliest finish. With one SLO for all, some
    optimal schedule serves in order of arrival and drops only between calls: instead of one from
    the middle of a call, its oldest can be given up, which starts no later and is due later. Of two
    states at one request, the one with more drops can only gain what runs within an SLO, so states
    further than that from the fewest drops are left out.
    """
    most, slo = server.most_rows, server.slo_seconds
    tau = np.array([server.tau(rows) for rows in range(1, most + 1)])
    width = _MOST_DROPS_AHEAD
    ring = np.full((most + 1, width), np.inf)  # row j: state at request i + j
    ring[0, 0] = 0.0
    base = 0  # drops of column 0
    for index in range(len(arrivals)):
        finish = ring[0]
        lowest = np.minimum.accumulate(finish)
        useful = np.flatnonzero((finish < np.inf) & (np.r_[np.inf, lowest[:-1]] > finish))
        due = arrivals[index] + slo
        ends = arrivals[index : index + most]
        count = int(np.searchsorted(ends + tau[: len(ends)], due + _TICK, side="right"))
        if count:
            start = np.maximum(finish[useful][None, :], ends[:count, None])
            done = start + tau[:count, None]
            done[done > due + _TICK] = np.inf
            block = ring[1 : count + 1, useful]
            ring[1 : count + 1, useful] = np.minimum(block, done)
        np.minimum(ring[1, 1:], finish[:-1], out=ring[1, 1:])
        ring[:-1] = ring[1:]
        ring[-1] = np.inf
        ahead = int(np.argmax(ring[0] < np.inf))
        if ahead:
            ring[:, :-ahead] = ring[:, ahead:]
            ring[:, -ahead:] = np.inf
            base += ahead
    return 1 - base / len(arrivals)


class Greedy:
    """Whatever waits runs at once (Triton's default, without a delay)."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def decide(self, waiting: deque[float], now: float) -> tuple[int, int, float]:
        """See `Policy.decide`."""
        del now
        return 0, min(len(waiting), self._server.most_rows), math.inf

    def observe(self, rows: int, seconds: float) -> None:
        """Learn nothing."""


class Static:
    """Waits for a fixed number of requests, or a fixed time."""

    def __init__(self, rows: int, delay_seconds: float) -> None:
        self._rows, self._delay = rows, delay_seconds

    def decide(self, waiting: deque[float], now: float) -> tuple[int, int, float]:
        """See `Policy.decide`."""
        until = waiting[0] + self._delay
        if len(waiting) >= self._rows or now >= until - _TICK:
            return 0, min(len(waiting), self._rows), math.inf
        return 0, 0, until

    def observe(self, rows: int, seconds: float) -> None:
        """Learn nothing."""


class Nexus:
    """Early drop: the first window of the planned size whose head can still be answered.

    Source: Shen et al. 2019, section 4.3.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        sizes = range(1, server.most_rows + 1)
        self._window = max((b for b in sizes if 2 * server.tau(b) <= server.slo_seconds), default=1)

    def decide(self, waiting: deque[float], now: float) -> tuple[int, int, float]:
        """See `Policy.decide`."""
        drop = 0
        for drop, arrival in enumerate(waiting):
            size = min(self._window, len(waiting) - drop)
            if now + self._server.tau(size) <= arrival + self._server.slo_seconds:
                return drop, size, math.inf
        return drop + 1, 0, now

    def observe(self, rows: int, seconds: float) -> None:
        """Learn nothing."""


class Bento:
    """BentoML's rule: drop what would end after the SLO, wait while that pays by its averages.

    Source: BentoML 1.4, `marshal/dispatcher.py`: controller and optimizer, with its decay of .95
    and tick of a millisecond; the coefficients are fitted from the last 50 calls.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._seen: deque[tuple[int, float, float]] = deque(maxlen=50)
        self._per_row, self._fixed, self._wait = server.row_seconds, server.call_seconds, 0.0
        self._last_wait = 0.0

    def decide(self, waiting: deque[float], now: float) -> tuple[int, int, float]:
        """See `Policy.decide`."""
        count, slo, tick = len(waiting), self._server.slo_seconds, 0.001
        oldest, newest = now - waiting[0], now - waiting[-1]
        if count > 1 and oldest + self._per_row * count + self._fixed >= slo:
            return 1, 0, now
        if count * (newest + tick + self._per_row) <= self._wait * 0.95:
            return 0, 0, now + tick
        self._last_wait = newest
        return 0, min(count, self._server.most_rows), math.inf

    def observe(self, rows: int, seconds: float) -> None:
        """Fit its two coefficients, as it does every few calls."""
        self._seen.append((rows, seconds, self._last_wait))
        sizes = np.array([[float(size), 1.0] for size, _, _ in self._seen])
        taken = np.array([duration for _, duration, _ in self._seen])
        if len({size for size, _, _ in self._seen}) > 1:
            self._per_row, self._fixed = np.linalg.lstsq(sizes, taken, rcond=None)[0]
            self._per_row, self._fixed = max(self._per_row, 1e-6), max(self._fixed, 0.0)
        self._wait = sum(wait for _, _, wait in self._seen) / len(self._seen)


class Ours:
    """The planner and the latency model that the scheduler runs, unchanged."""

    def __init__(self, server: Server, prior: Callable[[int], float] | None = None) -> None:
        self._server = server
        prior = prior or server.tau
        points = [1, 2, 4, 8, 16, 32, 64, 128]
        self.latency = LatencyModel(
            [LatencyPoint(rows=b, length=0, median_ms=prior(b) * 1e3, spread_ms=0) for b in points]
        )
        self._queue = Queue()
        self._next, self._oldest = 0, 0  # sequences of the next arrival and of the head

    def decide(self, waiting: deque[float], now: float) -> tuple[int, int, float]:
        """See `Policy.decide`."""
        while self._next < self._oldest + len(waiting):
            due = waiting[self._next - self._oldest] + self._server.slo_seconds
            self._queue.add(Waiting(0, due, self._next, due, 0, 1, 0))
            self._next += 1
        decision = plan(self._queue, self.latency, now, Bounds(self._server.most_rows))
        for sequence in (*decision.drop, *decision.dispatch):
            self._queue.remove(sequence)
        gone = len(decision.drop) + len(decision.dispatch)
        if max((*decision.drop, *decision.dispatch)) != self._oldest + gone - 1:
            raise RuntimeError("equal inputs are served in order of arrival")
        self._oldest += gone
        return len(decision.drop), len(decision.dispatch), now

    def observe(self, rows: int, seconds: float) -> None:
        """Learn as the scheduler does."""
        self.latency.observe(rows, 0, seconds, seconds)


def arrivals_of(name: str, rate: float, count: int, data: Path, seed: int = 0) -> Times:
    """Return arrival times of a process at a mean rate.

    Args:
        name: `poisson`, `mmpp`, `azure` or `twitter`; the last two read traces below `data`.
        rate: Requests per second in the mean.
        count: How many.
        data: Folder with `traces/`.
        seed: Of what is drawn.
    """
    random = np.random.default_rng(seed)
    if name == "poisson":
        return np.cumsum(random.exponential(1 / rate, count))
    if name == "mmpp":  # two states of half and twice the rate, for .5 s and .25 s in the mean
        times: list[Any] = []
        now, total, busy = 0.0, 0, False
        while total < count:
            seconds = random.exponential(0.25 if busy else 0.5)
            drawn = random.poisson(seconds * rate * (2.0 if busy else 0.5))
            times.append(now + np.sort(random.uniform(0, seconds, drawn)))
            now, total, busy = now + seconds, total + drawn, not busy
        return np.concatenate(times)[:count]
    if name == "azure":
        text = (data / "traces" / "azure_llm_conv.csv").read_text().splitlines()[1 : count + 1]
        stamps = np.array([line.split(",")[0][:26] for line in text], dtype="datetime64[us]")
        offsets = np.sort((stamps - stamps[0]).astype(np.float64))
        return np.asarray(offsets * ((len(offsets) - 1) / offsets[-1] / rate))
    text = (data / "traces" / "twitter_requests_per_second.csv").read_text().splitlines()[1:]
    counts = np.array(text, dtype=np.float64)
    counts = counts[: max(1, round(count / rate * 10))]  # a second of the trace lasts a tenth
    drawn = random.poisson(counts / counts.mean() * rate / 10)
    return np.concatenate(
        [np.sort(random.uniform(i / 10, (i + 1) / 10, n)) for i, n in enumerate(drawn)]
    )


def fastest_rate(find: Callable[[float], float], low: float, high: float, steps: int = 7) -> float:
    """Return the highest rate at which `find` gives .99 or more, by bisection."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if find(middle) >= 0.99 else (low, middle)
    return low


def share(on_time: Sequence[bool] | npt.NDArray[np.bool_]) -> float:
    """Return the share of true."""
    return float(np.mean(on_time))
