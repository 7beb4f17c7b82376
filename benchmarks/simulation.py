"""Event simulation of one batching server, the exact clairvoyant optimum, and peers' policies.

One server runs calls of equal inputs one after the other; a call of b requests takes `tau(b)`.
Every request has the same SLO. All times are seconds. A policy is asked whenever the server is idle
and something waits, which costs it no time: what peers lose by polling is not held against them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from lrai_core.artifact import LatencyPoint
from lrai_core.scheduler.latency import LatencyModel

Times = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Actual = Callable[[int, float], float]  # rows and start of a call to the seconds that it takes

PROFILED_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
TICK: Final = 1e-9  # what rounding may add to a time
_NOISE_SLOTS: Final = 1 << 20
_NOISE_SLOT_SECONDS: Final = 1e-4  # a call takes a hundred, so no two of one server share a draw
_DRAWN_RATE: Final = 2000.0  # requests per second at which bursts last what `arrivals_of` says


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

    def points(self, wrong: float = 1.0, more_seconds: float = 0.0) -> list[LatencyPoint]:
        """Return a profile of it: `wrong` x tau(b) + `more_seconds`."""
        return [
            LatencyPoint(
                rows=rows,
                length=0,
                median_ms=(wrong * self.tau(rows) + more_seconds) * 1e3,
                spread_ms=0,
            )
            for rows in PROFILED_ROWS
            if rows <= self.most_rows
        ]

    def profile(self, wrong: float = 1.0, more_seconds: float = 0.0) -> LatencyModel:
        """Return what the scheduler knows of it at first; see `points`."""
        return LatencyModel(self.points(wrong, more_seconds))


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


def simulate(policy: Policy, arrivals: Times, server: Server, actual: Actual) -> Flags:
    """Return for each arrival whether it was answered in time.

    Args:
        policy: Asked whenever the server is idle and something waits.
        arrivals: Ascending.
        server: Its SLO counts; what calls take is `actual`'s to say.
        actual: Asked once for each call, in order.
    """
    times: list[float] = arrivals.tolist()
    on_time = np.zeros(len(times), dtype=np.bool_)
    waiting: deque[float] = deque()
    now, arrived, head = 0.0, 0, 0  # `head`: index of the oldest that waits
    while arrived < len(times) or waiting:
        if not waiting:
            now = max(now, times[arrived])
        while arrived < len(times) and times[arrived] <= now:
            waiting.append(times[arrived])
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
                on_time[index] = now <= waiting.popleft() + server.slo_seconds + TICK
            head += run
        elif not drop:
            upcoming = times[arrived] if arrived < len(times) else math.inf
            now = max(now + TICK, min(again, upcoming))
    return on_time


def actual_of(server: Server, noise: float = 0.0, seed: int = 0) -> Actual:
    """Return calls that take tau(b), times a draw of mean 1 and standard deviation `noise`.

    The draw belongs to the moment of the start (common random numbers): where two policies start a
    call at the same time they meet the same noise, whatever they did before, so that they differ by
    what they decide and not by luck. Calls of one policy are far enough apart to be independent.
    """
    draws = np.random.default_rng(seed).standard_normal(_NOISE_SLOTS) if noise else np.zeros(1)

    def actual(rows: int, start: float) -> float:
        factor = 1 + noise * float(draws[int(start / _NOISE_SLOT_SECONDS) % len(draws)])
        return server.tau(rows) * max(0.3, factor)

    return actual


def clairvoyant(arrivals: Times, server: Server) -> float:
    """Return the largest share of requests that any schedule answers in time.

    Dynamic program over (next request, drops) to the earliest finish. With one SLO for all, some
    optimal schedule serves in order of arrival and drops only between calls: instead of one from
    the middle of a call, its oldest can be given up, which starts no later and is due later.

    At one request, a state with more drops is ahead of the one with the fewest by what it starts
    before that one is done, which is within an SLO of the last arrival. In that time calls end with
    `slo / tau(most) * most` requests at most, and one more starts. A state that has cost more drops
    than that is left out; the table holds the others, by request and drops modulo its size.
    """
    most, slo = server.most_rows, server.slo_seconds
    tau = np.array([server.tau(rows) for rows in range(1, most + 1)])
    rate = float(np.max(np.arange(1, most + 1) / tau))
    rows, width = most + 1, math.ceil(slo * rate) + most + 2
    table = np.full((rows, width), np.inf)
    table[0, 0] = 0.0
    columns = np.arange(width)
    fewest = 0  # drops of any state at the request
    for index in range(len(arrivals)):
        by_drops = (fewest + columns) % width
        here, behind = table[index % rows], table[(index + 1) % rows]
        finish = here[by_drops]
        ahead = np.empty(width, dtype=np.bool_)  # earlier than all with fewer drops
        ahead[0] = True
        np.less(finish[1:], np.minimum.accumulate(finish)[:-1], out=ahead[1:])
        useful = np.flatnonzero(ahead)
        due = arrivals[index] + slo
        ends = arrivals[index : index + most]
        count = int(np.searchsorted(ends + tau[: len(ends)], due + TICK, side="right"))
        if count:
            done = np.maximum(finish[useful], ends[:count, None]) + tau[:count, None]
            done[done > due + TICK] = np.inf
            to = np.ix_((index + 1 + np.arange(count)) % rows, by_drops[useful])
            table[to] = np.minimum(table[to], done)
        after = by_drops[1:]
        behind[after] = np.minimum(behind[after], finish[:-1])
        here[:] = np.inf
        while behind[fewest % width] == np.inf:
            fewest += 1
    return 1 - fewest / len(arrivals)


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
        if len(waiting) >= self._rows or now >= until - TICK:
            return 0, min(len(waiting), self._rows), math.inf
        return 0, 0, until

    def observe(self, rows: int, seconds: float) -> None:
        """Learn nothing."""


class Nexus:
    """Early drop: the first window of the planned size whose head can still be answered.

    The size is the largest of which a call and the one before it end within the SLO.

    Source: Shen et al. 2019, "Nexus", sections 4.1 (size) and 4.3 (early drop).
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
            if now + self._server.tau(size) <= arrival + self._server.slo_seconds + TICK:
                return drop, size, math.inf
        return drop + 1, 0, now

    def observe(self, rows: int, seconds: float) -> None:
        """Learn nothing."""


class Bento:
    """BentoML's rule: drop what would end after the SLO, wait while that pays by its averages.

    What a call takes, and how long the oldest in it waited, is estimated from the last 50 calls
    every 5 seconds. It starts with the right coefficients, as if its warm-up had met no noise.

    Source: BentoML 1.4.40, `_internal/marshal/dispatcher.py`, `CorkDispatcher.controller` and
    `Optimizer`, with max_latency_ms set to the SLO.
    """

    _KEPT: Final = 50
    _REFRESH_SECONDS: Final = 5.0
    _TICKET_SECONDS: Final = 0.001
    _DECAY: Final = 0.95

    def __init__(self, server: Server) -> None:
        self._server = server
        self._seen: deque[tuple[int, float, float]] = deque(maxlen=self._KEPT)
        self._per_row, self._fixed, self._wait = server.row_seconds, server.call_seconds, 0.0
        self._asleep_until, self._started, self._waited = 0.0, 0.0, 0.0
        self._refreshed = -math.inf

    def decide(self, waiting: deque[float], now: float) -> tuple[int, int, float]:
        """See `Policy.decide`."""
        if now < self._asleep_until:
            return 0, 0, self._asleep_until
        count, slo, ticket = len(waiting), self._server.slo_seconds, self._TICKET_SECONDS
        oldest, newest = now - waiting[0], now - waiting[-1]
        if oldest + (self._per_row * count + self._fixed if count > 1 else 0) >= slo:
            return 1, 0, now
        worth = count * (newest + ticket + self._per_row) <= self._wait * self._DECAY
        if count < self._server.most_rows and worth:
            self._asleep_until = now + ticket
            return 0, 0, self._asleep_until
        self._started, self._waited = now, oldest
        return 0, min(count, self._server.most_rows), math.inf

    def observe(self, rows: int, seconds: float) -> None:
        """Keep the call; estimate anew where that is due."""
        self._seen.append((rows, seconds, self._waited))
        now = self._started + seconds
        if len(self._seen) < self._KEPT or now < self._refreshed + self._REFRESH_SECONDS:
            return
        self._refreshed = now
        sizes = np.array([[float(size), 1.0] for size, _, _ in self._seen])
        taken = np.array([duration for _, duration, _ in self._seen])
        per_row, fixed = np.linalg.lstsq(sizes, taken, rcond=None)[0]
        self._per_row, self._fixed = max(float(per_row), 1e-6), max(float(fixed), 0.0)
        self._wait = sum(wait for _, _, wait in self._seen) / len(self._seen)


def arrivals_of(name: str, rate: float, count: int, data: Path | None, seed: int = 0) -> Times:
    """Return arrival times of a process at a mean rate.

    At every rate it is the same realisation, faster or slower, its bursts too.

    Args:
        name: `poisson`, `mmpp`, `azure` or `twitter`. `mmpp` has half and twice the mean rate in
            turns, at 2,000 requests per second for .5 s and .25 s in the mean; at that rate a
            second of `twitter` lasts a tenth.
        rate: Requests per second in the mean.
        count: How many; of `azure` there are 19,366 at most.
        data: Folder with `traces/`, for `azure` and `twitter`.
        seed: Of what is drawn.
    """
    if name in ("poisson", "mmpp"):
        random = np.random.default_rng(seed)
        times = _poisson(count, random) if name == "poisson" else _mmpp(count, random)
    elif data is None:
        raise ValueError(f"{name} is a trace, and no folder of data was given")
    elif name == "azure":
        times = _azure(count, data)
    else:
        times = _twitter(count, data, np.random.default_rng(seed))
    return np.asarray(times * (len(times) / times[-1] / rate))


def fastest_rate(share: Callable[[float], float], low: float, high: float, steps: int) -> float:
    """Return the highest rate at which `share` is .99 or more, by bisection."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) >= 0.99 else (low, middle)
    return low


def _poisson(count: int, random: np.random.Generator) -> Times:
    return np.cumsum(random.exponential(1.0, count))


def _mmpp(count: int, random: np.random.Generator) -> Times:
    times: list[Times] = []
    now, total, busy = 0.0, 0, False
    while total < count:
        seconds = random.exponential(0.25 if busy else 0.5)
        drawn = random.poisson(seconds * _DRAWN_RATE * (2.0 if busy else 0.5))
        times.append(now + np.sort(random.uniform(0, seconds, drawn)))
        now, total, busy = now + seconds, total + drawn, not busy
    return np.concatenate(times)[:count]


def _azure(count: int, data: Path) -> Times:
    text = (data / "traces" / "azure_llm_conv.csv").read_text().splitlines()[1 : count + 1]
    stamps = np.array([line.split(",")[0][:26] for line in text], dtype="datetime64[us]")
    return np.sort((stamps - stamps[0]).astype(np.float64))


def _twitter(count: int, data: Path, random: np.random.Generator) -> Times:
    text = (data / "traces" / "twitter_requests_per_second.csv").read_text().splitlines()[1:]
    slot = 0.1
    counts = np.array(text[: math.ceil(count / _DRAWN_RATE / slot)], dtype=np.float64)
    drawn = random.poisson(counts / counts.mean() * _DRAWN_RATE * slot)
    return np.concatenate(
        [slot * (index + np.sort(random.uniform(0, 1, n))) for index, n in enumerate(drawn)]
    )
