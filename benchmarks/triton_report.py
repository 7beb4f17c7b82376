"""The tables of `triton.py`, and what has to hold."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from benchmarks import harness
from benchmarks.callers import Answers
from benchmarks.harness import Check, Interval, console, interval
from benchmarks.triton_entries import CONSTANTS, Ours, Peer
from benchmarks.triton_runs import OVERLOAD, SWEPT_AT, Extent

LEAST_TO_FP32: Final = 1.7
LEAST_OF_BARE: Final = 0.85  # of the speed-up of the bare engine
LEAST_TO_VARIANT: Final = 1.15
NOT_BEHIND: Final = 0.97
LEAST_BEST, LEAST_DEFAULT = 1.2, 2.0  # of the answers in time
MOST_ADDED_US: Final = 300.0
MOST_INLINE: Final = 1.1
SAME: Final = 1.5  # times of a rate that another tool may measure, at another time
COSINE, COSINE_SHARE = 0.99, 0.98  # the gate's own condition for unit vectors
COSINE_LEAST = 0.8  # what one text has with another is far below
MOST_OFF: Final = {"fp32": 1e-4, "noop": 0.0}  # of any element of an answer

Rows = Sequence[Mapping[str, Any]]
Bare = Mapping[tuple[str, str], Sequence[float]]


def checks(rows: Rows, answers: Mapping[str, Answers], bare: Bare, chosen: str) -> list[Check]:
    """Return what has to hold."""
    speed = ratio(rows, "lrai", "peer fp32", "search", SWEPT_AT)
    in_turns = zip(bare[chosen, "search"], bare["fp32", "search"], strict=True)
    alone = float(np.median([quick / slow for quick, slow in in_turns]))
    of_bare = speed.median / alone
    variant = ratio(rows, "lrai", "peer variant", "search", SWEPT_AT)
    found = [
        _at_least(f"search at {SWEPT_AT}: to the fp32 peer", speed.median, LEAST_TO_FP32),
        _at_least(
            f"search at {SWEPT_AT}: of the bare engine's speed-up, {alone:.2f}",
            of_bare,
            LEAST_OF_BARE,
        ),
        _at_least(
            f"search at {SWEPT_AT}: to the peer with the same variant",
            variant.median,
            LEAST_TO_VARIANT,
        ),
    ]
    for row in rows:
        if row["loop"] == "closed" and row["who"] == "lrai" and row["callers"] >= 8:
            one = ratio(rows, "lrai", "peer variant", row["lengths"], row["callers"])
            name = f"{row['lengths']} at {row['callers']}: to the same variant, {one}"
            if (row["lengths"], row["callers"]) == ("azure", SWEPT_AT):
                found.append(_at_least(name, one.median, NOT_BEHIND))
                continue
            goal = f"interval reaches {NOT_BEHIND:g}"
            found.append(Check(name, one.median, goal, one.high >= NOT_BEHIND))
    for row in rows:
        if row["loop"] == "open" and row["load"] == OVERLOAD:
            what = f"{row['lengths']}, {row['arrivals']} at {OVERLOAD:g} x: in time, to"
            for who, least in (("best", LEAST_BEST), ("default", LEAST_DEFAULT)):
                value = row["times_in_time"][who]
                found.append(_at_least(f"{what} the {who} peer", value, least))
    lists, inline = (np.array(_overhead(rows, who)) for who in ("lrai-lists", "lrai-inline"))
    bare_p50 = np.array(min((_overhead(rows, who) for who in CONSTANTS), key=np.median))
    added, times = interval(list(lists - bare_p50)), interval(list(inline / bare_p50))
    found += [
        _at_most("us that a request of one caller takes longer, p50", added.median, MOST_ADDED_US),
        _at_most("p50 in the stub, to who returns a constant", times.median, MOST_INLINE),
    ]
    for side, shown in answers.items():
        if (form := side.rpartition(", ")[2]) in MOST_OFF:
            found.append(_at_most(f"{side}: worst difference", shown.worst, MOST_OFF[form]))
            continue
        cosines = np.concatenate(shown.cosines)
        name = f"{side}: share of {len(cosines):,} answers with cosine >= {COSINE}"
        found.append(_at_least(name, float((cosines >= COSINE).mean()), COSINE_SHARE))
        least = float(cosines.min())  # an answer that is another caller's
        found.append(_at_least(f"{side}: least cosine of an answer", least, COSINE_LEAST))
    return found


def second_opinion(rows: Rows) -> list[Check]:
    """Return that Triton's own tool was heard, and measures what our callers do."""
    found = []
    for who, protocol in itertools.product(("peer variant", "lrai"), ("http", "grpc")):
        wanted, told = ("perf_analyzer", who, protocol), 0.0
        for row in rows:
            if (row["loop"], row.get("who"), row.get("protocol")) == wanted:
                told = row["rate"] / float(np.median(_rates(rows, who, "fixed", SWEPT_AT)))
        name = f"perf_analyzer over {protocol}, {who}: requests/s to those of our callers"
        goal, holds = f"{1 / SAME:.2f} to {SAME:g}", 1 / SAME <= told <= SAME
        found.append(Check(name, told, goal, holds))
    return found


def ratio(rows: Rows, one: str, other: str, lengths: str, callers: int) -> Interval:
    """Return how the rates of two servers compare within each round."""
    pairs = zip(
        _rates(rows, one, lengths, callers), _rates(rows, other, lengths, callers), strict=True
    )
    return interval([mine / theirs for mine, theirs in pairs])


def show(rows: Rows, extent: Extent) -> None:
    """Print the tables."""
    _show_overhead([row for row in rows if row["loop"] == "overhead"])
    swept = [row for row in rows if row["loop"] == "sweep"]
    kinds = list(swept[0]["rates"])
    harness.show(
        f"Settings, {SWEPT_AT} callers: requests per second",
        ["variant", "who", "setting", *kinds, *(f"{kind}, us" for kind in kinds)],
        [
            (
                row["variant"],
                row["who"],
                row["setting"],
                *(f"{row['rates'][k][index]:,.0f}" for index in (0, 1) for k in kinds),
            )
            for row in swept
        ],
        f"the best of {extent.tries} short tries; lrai: how requests are answered; us: CPU time of "
        "a request in all processes, which says what a quiet core would do",
    )
    closed = [row for row in rows if row["loop"] == "closed"]
    harness.show(
        "Closed loop",
        [
            *("lengths", "callers", "who", "requests/s", "p50 ms", "p95 ms", "CPU us", "not model"),
            *("to fp32", "to variant"),
        ],
        [
            (
                row["lengths"],
                str(row["callers"]),
                row["who"],
                *(f"{np.median(row[name]):.1f}" for name in ("rates", "p50_ms", "p95_ms")),
                f"{sum(row['cpu_us'].values()):,.0f}",
                f"{_not_model(row):,.0f}",
                *(
                    str(ratio(rows, row["who"], other, row["lengths"], row["callers"]))
                    for other in ("peer fp32", "peer variant")
                ),
            )
            for row in closed
        ],
        f"medians of {extent.rounds} rounds in turns, 95 % bootstrap intervals; peers at their "
        "best setting for these lengths; not model: of the CPU time of a request, what is spent "
        f"outside the process with the model\n{harness.ON_HUGE_PAGES}",
    )
    _show_split(rows, [row for row in closed if row["who"] == "lrai"])
    _show_sharing(swept)
    harness.show(
        "Open loop: % answered in time",
        ["lengths", "arrivals", "load", "asked/s", "SLO ms", "lrai", "best peer", "default peer"],
        [
            (
                row["lengths"],
                row["arrivals"],
                f"{row['load']:g}",
                f"{row['asked_per_s']:.0f}",
                f"{row['slo_ms']:.0f}",
                *(f"{100 * row['in_time'][who]:.1f}" for who in ("lrai", "best", "default")),
            )
            for row in rows
            if row["loop"] == "open"
        ],
        f"load 1 is what the variant's peer does one by one; {extent.open_rounds} rounds of "
        f"{extent.open_seconds:g} s",
    )
    _show_grpc(rows, [row for row in rows if row["loop"] == "grpc"])
    for row in rows:
        if row["loop"] == "perf_analyzer":
            console.print(
                f"perf_analyzer over {row['protocol']}, fixed lengths, {SWEPT_AT} callers: "
                f"{row['who']} {row['rate']:.0f} requests/s, p95 {row['p95_ms']:.0f} ms"
            )


def _show_overhead(rows: Rows) -> None:
    harness.show(
        "A model that computes nothing",
        ["who", "callers", "p50 us", "requests/s", "CPU us", "triton", "stub", "daemon", "actor"],
        [
            (
                row["who"],
                str(row["callers"]),
                f"{np.median(row['p50_us']):.0f}",
                f"{row['requests_per_s']:.0f}",
                f"{sum(row['cpu_us'].values()):.0f}",
                *(f"{row['cpu_us'][n]:.0f}" for n in ("triton", "stubs", "daemon", "actors")),
            )
            for row in rows
        ],
        "CPU time of a request, and in which processes; constant, onnxruntime: plain python "
        "backends without a model, and with it;\nalone: without Triton's own batcher; lrai is "
        "compared with the faster of those that are constant",
    )


def _show_split(rows: Rows, cells: Rows) -> None:
    """Print what each part of the gain is."""
    parts = [
        ("the variant", "peer variant", "peer fp32"),
        ("to the peer's best with the same variant", "lrai", "peer variant"),
        ("in all", "lrai", "peer fp32"),
    ]
    harness.show(
        "Where the gain comes from: requests per second within rounds",
        ["lengths", "callers", *(name for name, _, _ in parts)],
        [
            (
                row["lengths"],
                str(row["callers"]),
                *(
                    str(ratio(rows, one, other, row["lengths"], row["callers"]))
                    for _, one, other in parts
                ),
            )
            for row in cells
        ],
        "medians with 95 % bootstrap intervals",
    )


def _show_sharing(swept: Rows) -> None:
    """Print what coalescing gains, what the way to an actor costs, and what sharing it gains."""
    rates = {(row["variant"], row["who"], row["setting"]): row["rates"] for row in swept}
    parts = [
        ("coalescing", ("lrai", Ours("inline")), ("peer", Peer("one"))),
        ("the way to an actor", ("lrai", Ours("lists")), ("lrai", Ours("inline"))),
        ("two instances that share it", ("lrai", Ours("lists", 2)), ("lrai", Ours("lists"))),
    ]
    shown = []
    for variant in dict.fromkeys(row["variant"] for row in swept):
        for kind in swept[0]["rates"]:
            found = [
                [rates.get((variant, who, str(setting))) for who, setting in pair]
                for _, *pair in parts
            ]
            times = [f"{a[kind][0] / b[kind][0]:.2f}" if a and b else "" for a, b in found]
            shown.append((variant, kind, *times))
    harness.show(
        f"Parts of the gain, {SWEPT_AT} callers: requests per second, one to the other",
        ["variant", "lengths", *(name for name, *_ in parts)],
        shown,
        "of the sweep's short tries, the best of each; coalescing: in the stub, to one by one",
    )


def _show_grpc(rows: Rows, cells: Rows) -> None:
    shown = []
    for row in cells:
        over_http = _rates(rows, row["who"], row["lengths"], row["callers"])
        figures = [float(np.median(row[name])) for name in ("rates", "p50_ms", "p95_ms")]
        times = figures[0] / float(np.median(over_http))
        shown.append((row["who"], *(f"{value:.1f}" for value in figures), f"{times:.2f}"))
    harness.show(
        f"Search lengths over gRPC, {SWEPT_AT} callers",
        ["who", "requests/s", "p50 ms", "p95 ms", "to HTTP"],
        shown,
        "by Triton's own client, whose time is in it; no check goes by these",
    )


def _not_model(row: Mapping[str, Any]) -> float:
    inside = row["who"].startswith("peer") or not row["cpu_us"]["actors"]
    where = "stubs" if inside else "actors"
    return float(sum(used for name, used in row["cpu_us"].items() if name != where))


def _rates(rows: Rows, who: str, lengths: str, callers: int) -> list[float]:
    wanted = ("closed", who, lengths, callers)
    for row in rows:
        if tuple(row.get(name) for name in ("loop", "who", "lengths", "callers")) == wanted:
            rates: list[float] = row["rates"]
            return rates
    raise KeyError(wanted)


def _overhead(rows: Rows, who: str) -> list[float]:
    """Return the p50 in us of one caller, by round."""
    for row in rows:
        if (row["loop"], row.get("callers"), row.get("who")) == ("overhead", 1, who):
            p50: list[float] = row["p50_us"]
            return p50
    raise KeyError(who)


def _at_least(name: str, value: float, least: float) -> Check:
    return Check(name, value, f">= {least:g}", value >= least)


def _at_most(name: str, value: float, most: float) -> Check:
    return Check(name, value, f"<= {most:g}", value <= most)
