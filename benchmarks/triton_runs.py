"""The measurements of `triton.py`: a sweep of settings, closed loops, open loops, the overhead."""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from benchmarks import triton_entries as entries
from benchmarks.callers import Answers, Figures
from benchmarks.harness import console
from benchmarks.kinds import Kind, share
from benchmarks.processes import cpu_seconds
from benchmarks.triton_entries import Entry, Ours, Peer, Queue, Repository
from benchmarks.triton_load import Load
from benchmarks.triton_server import TritonServer

T = TypeVar("T")
Costed = tuple[Figures, dict[str, float]]

SWEPT_AT: Final = 32
SLO_CALLS: Final = 10  # the deadline, in mean calls of one by one
OVERLOAD: Final = 1.5
NOOP_WIDTH: Final = 256
_BURST_SECONDS: Final = 0.5  # the mean length of a burst, at twice the rate


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured."""

    ways: tuple[Peer, ...]
    queues: tuple[Queue, ...]
    executions: tuple[str, ...]
    instances: tuple[int, ...]
    sweep_fp32: bool  # else it runs with the settings that were best for the variant
    rows: dict[str, int]  # distinct ones, by kind
    swept: int  # rows of each try of the sweep; for Azure's see `share`
    tries: int  # of each setting in it; the best one counts
    rounds: int
    requests: dict[int, int]  # by callers, in a round; for Azure's see `share`
    open_rounds: int
    open_seconds: float
    open_kinds: tuple[str, ...]
    open_loads: tuple[float, ...]
    bursts: bool
    overhead_rounds: int
    overhead_requests: dict[int, int]  # by callers


class Bench:
    """A server with explicit model control, its callers, and what is found."""

    def __init__(
        self, server: TritonServer, load: Load, repository: Repository, extent: Extent
    ) -> None:
        """Measure with these."""
        self.server, self.load, self.repository, self.extent = server, load, repository, extent
        self.answers: dict[str, Answers] = defaultdict(Answers)
        self._numbers = itertools.count(1)

    def peer(self, variant: str, setting: Peer, slo_us: float = 0.0) -> Entry:
        """Write an entry under a new name."""
        return self.repository.peer(f"p{next(self._numbers)}", variant, setting, slo_us)

    def ours(self, variant: str, setting: Ours) -> Entry:
        """Likewise one of LRAI's."""
        return self.repository.ours(f"l{next(self._numbers)}", variant, setting)

    @contextlib.contextmanager
    def loaded(self, *models: Entry) -> Iterator[None]:
        """Have these in the server, and no others."""
        try:
            for entry in models:
                entries.load(self.server.port, entry.name)
            entries.wait_until_settled(self.server.port)
            yield
        finally:
            for entry in models:
                entries.unload(self.server.port, entry.name)

    def closed(self, entry: Entry, kind: Kind, first: int, count: int, callers: int) -> Figures:
        """Send so many rows from the `first` on; every one has to be answered, and rightly."""
        indices = [(first + i) % len(kind.rows) for i in range(count)]
        figures = self.load.closed(entry.name, kind.name, indices, callers)
        if set(figures.statuses) != {200}:
            raise RuntimeError(
                f"{entry.variant}, {entry.setting}: answered {figures.statuses}, "
                f"{figures.first_error}"
            )
        self.answers[entry.side].add(figures)
        return figures

    def costed(
        self, entry: Entry, kind: Kind, first: int, count: int, callers: int
    ) -> tuple[Figures, dict[str, float]]:
        """Do what `closed` does; return the us of CPU time of a request, too, by process."""
        before = self.cpu_seconds()
        figures = self.closed(entry, kind, first, count, callers)
        after = self.cpu_seconds()
        return figures, {name: (after[name] - before[name]) / count * 1e6 for name in after}

    def sweep(self, entry: Entry, kinds: Sequence[Kind]) -> dict[str, tuple[float, float]]:
        """Return the rate of one setting with each kind of lengths, and the us of CPU time."""
        rates = {}
        with self.loaded(entry):
            for kind in kinds:
                count = share(kind, self.extent.swept, SWEPT_AT)
                self.closed(entry, kind, 0, SWEPT_AT, SWEPT_AT)
                tries = [
                    self.costed(entry, kind, turn * count, count, SWEPT_AT)
                    for turn in range(self.extent.tries)
                ]
                rates[kind.name] = (
                    max(figures.rate for figures, _ in tries),
                    min(sum(parts.values()) for _, parts in tries),
                )
        return rates

    def rounds(self, models: Sequence[Entry], kind: Kind) -> dict[tuple[str, int], list[Costed]]:
        """Return the figures of every round in turns, by the entry's name and the callers."""
        found: dict[tuple[str, int], list[Costed]] = defaultdict(list)
        for entry in models:
            self.closed(entry, kind, 0, 2 * SWEPT_AT, SWEPT_AT)
        for turn in range(self.extent.rounds):
            for callers, requests in self.extent.requests.items():
                count = share(kind, requests, callers)
                for entry in in_turns(models, turn):
                    costed = self.costed(entry, kind, turn * count, count, callers)
                    found[entry.name, callers].append(costed)
        return dict(found)

    def in_time(
        self, entry: Entry, kind: Kind, arrivals: Sequence[float], slo: float
    ) -> tuple[float, Figures]:
        """Return the share of requests that are answered within the deadline `slo`, in seconds."""
        figures = self.load.open(entry.name, kind.name, arrivals, int(slo * 1e6))
        self.answers[entry.side].add(figures)
        return figures.in_time(slo), figures

    def overhead(self) -> list[dict[str, Any]]:
        """Compare what a request costs when the model costs nothing."""
        made = self.repository.noop
        models = [
            *(
                self.repository.noop_peer(name, "constant", NOOP_WIDTH, batches=batches)
                for name, batches in zip(entries.CONSTANTS, (True, False), strict=True)
            ),
            self.repository.noop_peer("onnxruntime", "one", NOOP_WIDTH),
        ]
        models += [
            self.repository.ours(f"lrai-{execution}", "noop", Ours(execution), made)
            for execution in entries.EXECUTIONS
        ]
        row = {"x": np.ones((1, NOOP_WIDTH), np.float32)}
        self.load.rows("noop", [row], "y", np.ones((1, 1), np.float32))
        kind = Kind("noop", [row], np.ones((1, 1), np.float32))
        found: dict[tuple[str, int], list[Costed]] = defaultdict(list)
        with self.loaded(*models):
            for entry in models:
                self.closed(entry, kind, 0, 200, 1)
            for turn in range(self.extent.overhead_rounds):
                for callers, count in self.extent.overhead_requests.items():
                    for entry in in_turns(models, turn):
                        costed = self.costed(entry, kind, 0, count, callers)
                        found[entry.name, callers].append(costed)
        return [_overhead_row(who, callers, runs) for (who, callers), runs in found.items()]

    def cpu_seconds(self) -> dict[str, float]:
        """Return what each kind of process in the server's tree has used so far."""
        folder = str(self.server.runtime.folder)
        found = {"triton": 0.0, "stubs": 0.0, "daemon": 0.0, "actors": 0.0}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (process / "cmdline").read_bytes().decode(errors="replace")
                pid = int(process.name)
                if pid == self.server.pid:
                    found["triton"] += cpu_seconds(pid)
                elif "triton_python_backend_stub" in command.partition("\0")[0]:
                    if str(self.repository.folder) in command:
                        found["stubs"] += cpu_seconds(pid)
                elif folder in command and "lrai_shared.daemon" in command:
                    found["daemon"] += cpu_seconds(pid)
                elif folder in command and "lrai_core.actor" in command:
                    found["actors"] += cpu_seconds(pid)
        return found


def in_turns(sides: Sequence[T], turn: int) -> list[T]:
    """Return the sides in the order of a round: in each another one begins."""
    first = turn % len(sides)
    return [*sides[first:], *sides[:first]]


def arrivals_of(rate: float, seconds: float, seed: int, *, bursts: bool) -> list[float]:
    """Return arrival times of a Poisson process, or of one whose rate is 2 and .5 times in turns.

    Bursts are a Markov-modulated Poisson process with two states: a third of the time it is at
    twice the rate, so that the mean is the same.
    """
    random = np.random.default_rng(seed)
    if not bursts:
        count = int(rate * seconds * 1.5 + 50)
        times = np.cumsum(random.exponential(1 / rate, count))
        return [float(time) for time in times[times < seconds]]
    found: list[float] = []
    begin, high = 0.0, False
    while begin < seconds:
        mean, factor = (_BURST_SECONDS, 2.0) if high else (2 * _BURST_SECONDS, 0.5)
        end = min(begin + random.exponential(mean), seconds)
        count = random.poisson(rate * factor * (end - begin))
        found += sorted(float(time) for time in random.uniform(begin, end, count))
        begin, high = end, not high
    return found


def measure_open(
    bench: Bench, kind: Kind, default: Peer, variant: str, rate: float
) -> list[dict[str, Any]]:
    """Compare how many are answered in time, beside the peer as it is and at its best.

    Args:
        bench: What measures.
        kind: Lengths.
        default: The peer's best setting in closed loop, which has no limits.
        variant: That both serve.
        rate: What one by one can do, requests per second.
    """
    extent, slo = bench.extent, SLO_CALLS / rate
    best = _best_queue(bench, kind, default, variant, rate)
    models = [
        bench.ours(variant, entries.AS_GIVEN),
        bench.peer(variant, best, slo * 1e6),
        bench.peer(variant, default),
    ]
    names = ["lrai", "best", "default"]
    sides = list(zip(names, models, strict=True))
    rows = []
    with bench.loaded(*models):
        for entry in models:
            warm = range(share(kind, 2 * SWEPT_AT))
            warmed = bench.load.closed(entry.name, kind.name, warm, 4)  # some may be refused
            bench.answers[entry.side].add(warmed)
        cases = itertools.product((False, True) if extent.bursts else (False,), extent.open_loads)
        for bursts, load in cases:
            shares: dict[str, list[float]] = defaultdict(list)
            p95: dict[str, list[float]] = defaultdict(list)
            statuses: dict[str, dict[int, int]] = {}
            for turn in range(extent.open_rounds):
                arrivals = arrivals_of(load * rate, extent.open_seconds, turn, bursts=bursts)
                for name, entry in in_turns(sides, turn):
                    value, figures = bench.in_time(entry, kind, arrivals, slo)
                    shares[name].append(value)
                    p95[name].append(figures.percentile_ms(0.95))
                    statuses[name] = figures.statuses
            rows.append(
                {
                    "loop": "open",
                    "lengths": kind.name,
                    "arrivals": "bursts" if bursts else "Poisson",
                    "load": load,
                    "slo_ms": slo * 1e3,
                    "asked_per_s": load * rate,
                    "in_time": {name: float(np.median(shares[name])) for name in names},
                    "times_in_time": {name: _times(shares, name) for name in names[1:]},
                    "p95_ms": {name: float(np.median(v)) for name, v in p95.items()},
                    "statuses": statuses,
                    "lrai": str(entries.AS_GIVEN),
                    "best": str(best),
                    "default": str(default),
                }
            )
    return rows


def _times(shares: dict[str, list[float]], peer: str) -> float:
    """Return how many times as many are in time as of a peer, the median over the rounds."""
    pairs = zip(shares["lrai"], shares[peer], strict=True)
    return float(np.median([mine / max(theirs, 1e-3) for mine, theirs in pairs]))


def _best_queue(bench: Bench, kind: Kind, default: Peer, variant: str, rate: float) -> Peer:
    """Return the setting with the most answers in time at the heaviest load, in a short sweep."""
    slo_us = SLO_CALLS / rate * 1e6
    ways = dict.fromkeys(
        [*entries.OPEN_WAYS, Peer(default.way, default.rows, default.ragged, default.instances)]
    )
    found: dict[Peer, float] = {}
    for way, queue in itertools.product(ways, bench.extent.queues):
        setting = replace(way, queue=queue)
        found[setting] = _overloaded(bench, kind, bench.peer(variant, setting, slo_us), rate)
    best = max(found, key=found.__getitem__)
    console.print(
        f"  {kind.name}: the best of {len(found)} queues is {best}, {found[best]:.0%} in time"
    )
    return best


def _overloaded(bench: Bench, kind: Kind, entry: Entry, rate: float) -> float:
    """Return the share in time at the heaviest load."""
    arrivals = arrivals_of(OVERLOAD * rate, bench.extent.open_seconds, 99, bursts=False)
    with bench.loaded(entry):
        warmed = bench.load.closed(entry.name, kind.name, range(share(kind, 32)), 2)
        bench.answers[entry.side].add(warmed)  # of which some are refused
        return bench.in_time(entry, kind, arrivals, SLO_CALLS / rate)[0]


def median_parts(runs: Sequence[Costed]) -> dict[str, float]:
    """Return the us of CPU time of a request by process, medians over the runs."""
    return {name: float(np.median([parts[name] for _, parts in runs])) for name in runs[0][1]}


def _overhead_row(who: str, callers: int, runs: Sequence[Costed]) -> dict[str, Any]:
    return {
        "loop": "overhead",
        "who": who,
        "callers": callers,
        "p50_us": [figures.percentile_ms(0.5) * 1e3 for figures, _ in runs],
        "requests_per_s": float(np.median([figures.rate for figures, _ in runs])),
        "cpu_us": median_parts(runs),
    }
