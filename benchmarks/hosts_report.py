"""The tables of `hosts.py`, and what has to hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from benchmarks import harness
from benchmarks.callers import Answers
from benchmarks.harness import Check, Interval, interval
from benchmarks.hosts_parts import Parts
from benchmarks.hosts_servers import HOSTS, SAGEMAKER

LEAST_TO_FP32: Final = 1.7
LEAST_OF_BARE: Final = 0.85  # of the speed-up of the bare engine
LEAST_TO_VARIANT: Final = 1.1
NOT_BEHIND: Final = 0.97
MEMORY_SHARED: Final = (
    "read while all servers of the host run: of libraries and weights that several of them map, "
    "each is counted a part"
)
COSINE, COSINE_SHARE = 0.99, 0.98  # the gate's own condition for unit vectors
COSINE_LEAST = 0.8  # what one text has with another is far below
FP32_TOLERANCE: Final = 1e-4

Row = Mapping[str, Any]
Rows = Sequence[Row]
Bare = Mapping[tuple[str, str], Sequence[float]]  # rows a second by file and lengths
PartsOf = Mapping[tuple[str, str], Parts]  # by host and form


class Shares(NamedTuple):
    """Where the latency of a request goes, as shares of its mean; each is an estimate.

    The queue is what the others leave of the whole: None where they leave nothing.
    """

    decode: float
    queue: float | None
    engine: float
    encode: float


def checks(rows: Rows, bare: Bare, answers: Mapping[str, Answers]) -> list[Check]:
    """Return what has to hold."""
    found = []
    for row in _closed(rows):
        if row["file"] == "lrai" and _peers(rows, row, "fp32"):
            found += _of_cell(rows, row, bare)
    found += [
        Check(
            f"{row['host']}, {row['who']}, {row['workers']} workers: processes with the engine",
            row["engines"],
            "exactly 1",
            row["engines"] == 1,
        )
        for row in rows
        if row["loop"] == "memory" and row["file"] == "lrai" and row["path"] == "API"
        if row["workers"] > 1
    ]
    for who, shown in answers.items():
        if who.endswith(", fp32"):
            name = f"{who}: worst difference of {shown.count:,} answers"
            holds = shown.worst <= FP32_TOLERANCE
            found.append(Check(name, shown.worst, f"<= {FP32_TOLERANCE:g}", holds))
        else:
            agree = float((np.concatenate(shown.cosines) >= COSINE).mean())
            name = f"{who}: share of {shown.count:,} answers with cosine >= {COSINE}"
            found.append(_at_least(name, agree, COSINE_SHARE))
            least = float(np.concatenate(shown.cosines).min())  # what is another caller's
            found.append(_at_least(f"{who}: least cosine of an answer", least, COSINE_LEAST))
    return found


def ratio(one: Row, other: Row) -> Interval:
    """Return how the rates of two sides compare within each round."""
    pairs = zip(one["rates"], other["rates"], strict=True)
    return interval([mine / theirs for mine, theirs in pairs])


def best_peer(rows: Rows, ours: Row, file: str) -> Row:
    """Return the fastest that serves this file under the same conditions as a row of LRAI's."""
    return max(_peers(rows, ours, file), key=lambda row: float(np.median(row["rates"])))


def shares(row: Row, bare: Bare, parts: PartsOf) -> Shares:
    """Return where a request's latency goes; what is not its own work is the queue.

    That is waiting for the work of others on the same CPU, and what the host does besides: HTTP,
    threads, and LRAI's way to its runtime. The engine's part is, where LRAI has actors, their CPU
    time by request, which calls of several rows share; else the bare engine's time.
    """
    total = float(np.median(row["mean_ms"])) * 1e3
    own = parts[row["host"], row["form"]]
    ours = row["file"] == "lrai"
    alone = bare["variant" if ours else row["file"], row["lengths"]]
    engine = (ours and row["cpu_us"]["actors"]) or 1e6 / float(np.median(alone))
    decode, engine, encode = (part / total for part in (own.decode, engine, own.encode))
    left = 1 - decode - engine - encode
    return Shares(decode, left if left >= 0 else None, engine, encode)


def show(rows: Rows, bare: Bare, parts: PartsOf, rounds: int, variant: str) -> None:
    """Print the tables."""
    for host in HOSTS:
        cells = [row for row in _closed(rows) if row["host"] == host]
        if not cells:
            continue
        harness.show(
            f"MiniLM in {host}: one CPU, one engine thread",
            [
                *("lengths, callers", "workers", "who", "best way", "requests/s", "p50 ms"),
                *("p95 ms", "to fp32", "to variant"),
            ],
            [_line(rows, row) for row in sorted(cells, key=_order)],
            f"medians of {rounds} rounds in turns, 95 % bootstrap intervals, each to the best peer "
            f"with that file; the variant is {variant}; mounted: an application inside the host\n"
            f"{harness.ON_HUGE_PAGES}",
        )
        harness.show(
            f"Where the latency goes in {host}: % of its mean, and CPU us of a request",
            [
                *("lengths, callers", "who", "decode", "queue", "engine", "encode"),
                *("CPU host", "daemon", "actors"),
            ],
            [
                (
                    f"{row['lengths']}, {row['callers']}",
                    row["who"],
                    *map(_percent, shares(row, bare, parts)),
                    *(f"{row['cpu_us'][what]:,.0f}" for what in ("host", "daemon", "actors")),
                )
                for row in sorted(cells, key=_order)
                if row["workers"] == 1
            ],
            "one worker; estimated: decode and encode by the host's own functions alone on this "
            "CPU; engine\nby the bare one, of lrai by the actors' CPU time; queue, with HTTP and "
            "hops, by what these leave\nof the whole: where that is less than nothing they do not "
            "add up, and it is -",
        )
    harness.show(
        "Memory",
        ["host", "who", "workers", "MB", "processes", "of them with the engine"],
        [
            (
                row["host"],
                row["who"],
                str(row["workers"]),
                f"{row['memory_bytes'] / 1e6:,.0f}",
                str(sum(row["processes"].values())),
                str(row["engines"]),
            )
            for row in rows
            if row["loop"] == "memory" and row["path"] == "API"
        ],
        "proportional set size of the whole tree, LRAI's daemon and actors included, after all "
        "requests; who shares a server has one line too;\n"
        f"{MEMORY_SHARED}",
    )


def _of_cell(rows: Rows, ours: Row, bare: Bare) -> list[Check]:
    """Return the checks of one row of LRAI's."""
    lengths, callers = ours["lengths"], ours["callers"]
    name = f"{ours['host']}, {ours['who']}, {_workers(ours)}, {lengths} at {callers}"
    fp32 = ratio(ours, best_peer(rows, ours, "fp32"))
    found = []
    if callers == 1:
        found.append(_not_behind(f"{name}: to fp32", fp32))
    else:
        pairs = zip(bare["variant", lengths], bare["fp32", lengths], strict=True)
        alone = float(np.median([variant / plain for variant, plain in pairs]))
        share = fp32.median / alone
        title = f"{name}: of the bare engine's speed-up, {alone:.2f}"
        found.append(_at_least(title, share, LEAST_OF_BARE))
        if lengths == "search":
            found.append(_at_least(f"{name}: to fp32, {fp32}", fp32.median, LEAST_TO_FP32))
    variant = ratio(ours, best_peer(rows, ours, "variant"))
    title = f"{name}: to the same file, {variant}"
    if (lengths, callers, ours["host"]) == ("search", 32, SAGEMAKER):
        found.append(_at_least(title, variant.median, LEAST_TO_VARIANT))
    else:
        found.append(_not_behind(title, variant))
    return found


def _line(rows: Rows, row: Row) -> tuple[str, ...]:
    compared = bool(_peers(rows, row, "fp32"))
    return (
        f"{row['lengths']}, {row['callers']}",
        str(row["workers"]),
        row["who"],
        row["way"],
        *(f"{np.median(row[name]):.1f}" for name in ("rates", "p50_ms", "p95_ms")),
        *(
            str(ratio(row, best_peer(rows, row, file))) if compared else ""
            for file in ("fp32", "variant")
        ),
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _closed(rows: Rows) -> list[Row]:
    return [row for row in rows if row["loop"] == "closed"]


def _peers(rows: Rows, ours: Row, file: str) -> list[Row]:
    same = ("host", "path", "workers", "lengths", "callers")
    return [
        row
        for row in _closed(rows)
        if row["file"] == file and all(row[key] == ours[key] for key in same)
    ]


def _order(row: Row) -> tuple[str, int, int]:
    return row["lengths"], row["callers"], row["workers"]


def _workers(row: Row) -> str:
    return "1 worker" if row["workers"] == 1 else f"{row['workers']} workers"


def _not_behind(name: str, value: Interval) -> Check:
    goal = f"interval reaches {NOT_BEHIND:g}"
    return Check(name, value.median, goal, value.high >= NOT_BEHIND)


def _at_least(name: str, value: float, least: float) -> Check:
    return Check(name, value, f">= {least:g}", value >= least)
