"""The measurements of `hosts.py`: the best way of each peer, then everything in turns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from benchmarks.callers import Answers, Figures, Load
from benchmarks.harness import console
from benchmarks.hosts_servers import Files, Running, Side, Way, running, sides_of
from benchmarks.kinds import Kind, share

Costed = tuple[Figures, dict[str, float]]

SWEPT_AT: Final = 32
_MANY: Final = 8  # callers, from which on the best way is that for 32
_OUTPUT: Final = "sentence_embedding"


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured.

    Attributes:
        rows: Distinct ones, by kind of lengths.
        workers: Numbers of processes that take requests, of all sides.
        ours_too: Further ones of LRAI alone, for their memory.
        swept: Requests of each try of a way; of the Azure conversations' see `share`; by a single
            caller a quarter of them.
        tries: Of every way, in turns; the best one counts.
        rounds: In which every side has its turn.
        requests: By callers, in a round; of the Azure conversations' likewise.
    """

    rows: dict[str, int]
    workers: tuple[int, ...]
    ours_too: tuple[int, ...]
    swept: int
    tries: int
    rounds: int
    requests: dict[int, int]


class Bench:
    """The servers of one host, their callers, and what is found."""

    def __init__(
        self,
        sides: Sequence[Side],
        servers: Mapping[str, Running],
        load: Load,
        extent: Extent,
        answers: dict[str, Answers],
    ) -> None:
        """Measure with these; what answers show is added to `answers`, by side."""
        self.sides, self.servers, self.load, self.extent = sides, servers, load, extent
        self.answers = answers

    def run(self, kinds: Sequence[Kind]) -> list[dict[str, Any]]:
        """Return the rows of all kinds of lengths, and of memory."""
        found: list[dict[str, Any]] = []
        for kind in kinds:
            many, few = (
                {side: self._best(side, kind, callers) for side in self.sides}
                for callers in (SWEPT_AT, 1)
            )
            found += self._rounds(few, many, kind)
        for side in self.sides:
            one = self.servers[side.server]
            row = {"loop": "memory", "memory_bytes": one.memory_bytes(), "engines": one.engines()}
            row["processes"] = {what: len(pids) for what, pids in one.processes().items()}
            found.append({**_named(side), **row})
        return found

    def _best(self, side: Side, kind: Kind, callers: int) -> Way:
        """Return the fastest way of a side for so many callers, first for many, which warms up."""
        few, rates = callers == 1, defaultdict[Way, float](float)
        count = share(kind, self.extent.swept, callers)
        for way in () if few else side.ways:
            self._closed(side, way, kind, 0, count, callers)
        count = -(-count // 4) if few else count
        for turn in range(self.extent.tries if len(side.ways) > 1 else 0):
            for way in side.ways:
                run, _ = self._closed(side, way, kind, turn * count, count, callers)
                rates[way] = max(rates[way], run.rate)
        return max(rates, key=rates.__getitem__, default=side.ways[0])

    def _rounds(
        self, few: Mapping[Side, Way], many: Mapping[Side, Way], kind: Kind
    ) -> list[dict[str, Any]]:
        """Return what was measured; each side has the way that is its best for few, or many."""
        figures: dict[tuple[Side, int], list[Costed]] = defaultdict(list)
        sides = [side for side in self.sides if side.workers in self.extent.workers]
        for turn in range(self.extent.rounds):
            first = turn // 2 % len(sides)
            order = [*sides[first:], *sides[:first]][:: -1 if turn % 2 else 1]
            for callers, requests in self.extent.requests.items():
                count = share(kind, requests, callers)
                for side in order:
                    ways = many if callers >= _MANY else few
                    costed = self._closed(side, ways[side], kind, turn * count, count, callers)
                    figures[side, callers].append(costed)
        return [
            {
                **_named(side),
                "loop": "closed",
                "lengths": kind.name,
                "callers": callers,
                "way": (many if callers >= _MANY else few)[side].name,
                "rates": [run.rate for run, _ in runs],
                "p50_ms": [run.percentile_ms(0.5) for run, _ in runs],
                "p95_ms": [run.percentile_ms(0.95) for run, _ in runs],
                "mean_ms": [float(np.nanmean(run.latencies)) * 1e3 for run, _ in runs],
                "cpu_us": {
                    what: float(np.median([parts[what] for _, parts in runs]))
                    for what in runs[0][1]
                },
            }
            for (side, callers), runs in figures.items()
        ]

    def _closed(
        self, side: Side, way: Way, kind: Kind, first: int, count: int, callers: int
    ) -> Costed:
        """Send so many rows from the `first` on; every one has to be answered.

        Returns:
            The figures, and the us of CPU time of a request by what used it.
        """
        one = self.servers[side.server]
        indices = [(first + i) % len(kind.rows) for i in range(count)]
        self.load.port = one.server.port
        before = one.cpu_seconds()
        figures = self.load.closed(way.target, kind.name, indices, callers)
        after = one.cpu_seconds()
        if set(figures.statuses) != {200}:
            tail = one.log.read_text(errors="replace")[-2000:]
            said = f"answered {figures.statuses}, {figures.first_error}"
            raise RuntimeError(f"{side.host}, {side.who}: {said}\n{tail}")
        self.answers[f"{side.host}, {side.who}"].add(figures)
        return figures, {what: (after[what] - before[what]) / count * 1e6 for what in after}


def measure(
    host: str,
    kinds: Sequence[Kind],
    extent: Extent,
    files: Files,
    load: Load,
    cpu: int,
    answers: dict[str, Answers],
) -> list[dict[str, Any]]:
    """Return the rows of one host."""
    sides = sides_of(host, extent.workers, extent.ours_too)
    with console.status(f"{host}: starting servers"), running(sides, files, cpu) as servers:
        return Bench(sides, servers, load, extent, answers).run(kinds)


def give_rows(load: Load, kinds: Sequence[Kind]) -> None:
    """Give the callers what they send, and what it is to be answered."""
    for kind in kinds:
        load.rows(kind.name, kind.rows, _OUTPUT, kind.expected)


def _named(side: Side) -> dict[str, Any]:
    return {
        "host": side.host,
        "form": side.name,
        "path": side.path,
        "file": side.file,
        "who": side.who,
        "workers": side.workers,
    }
