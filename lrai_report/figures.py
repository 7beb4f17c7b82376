"""What outcomes say: figures per round, what they are over time, and a verdict in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lrai_report.replay import Outcome
from lrai_report.trace import Arrivals
from lrai_report.words import figure

_POINTS: Final = 0.005  # of the share in time: less is no difference
_FASTER: Final = 0.9  # of the other's p95: more is no difference,
_OF_DEADLINE: Final = 0.05  # nor is it if the two are as close as that
_AS_RATIO: Final = 1.1  # smaller ratios are told in points


@dataclass(frozen=True, slots=True)
class Figures:
    """What one policy showed in one round, or in the median of the rounds.

    Attributes:
        on_time: Share of the requests that were answered within the deadline.
        p50_ms: Of all requests; what was not answered took for ever. So p95 and p99.
        answered_per_second: Of the round, which lasts until the last answer if that comes later.
        refused: Share that was refused or given up.
        rows_per_call: Rows of answered requests; calls that came too late for anybody count too.
    """

    on_time: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    answered_per_second: float
    refused: float
    rows_per_call: float


def figures(outcome: Outcome, deadline_seconds: float, seconds: float) -> Figures:
    """Return the figures of one round of `seconds`."""
    count = len(outcome.latencies)
    answered = int(np.isfinite(outcome.latencies).sum())
    p50, p95, p99 = 1e3 * np.percentile(outcome.latencies, (50, 95, 99), method="higher")
    return Figures(
        on_time=float(np.mean(outcome.latencies <= deadline_seconds)),
        p50_ms=float(p50),
        p95_ms=float(p95),
        p99_ms=float(p99),
        answered_per_second=answered / max(outcome.seconds, seconds),
        refused=outcome.refused / count,
        rows_per_call=outcome.rows / max(outcome.calls, 1),
    )


def median(rounds: Sequence[Figures]) -> Figures:
    """Return the median of each figure."""
    return Figures(*map(float, np.median([astuple(found) for found in rounds], axis=0)))


def p95_over_time(
    rounds: Sequence[Arrivals], outcomes: Sequence[Outcome], seconds: float, columns: int
) -> NDArray[np.float64]:
    """Return the p95 latency in so many equal parts of all rounds, one round after the other.

    NaN where nothing came; infinite where over a twentieth had no answer.
    """
    column = _columns(rounds, seconds, columns)
    latencies = np.concatenate([outcome.latencies for outcome in outcomes])
    found = np.full(columns, np.nan)
    for index in np.unique(column):
        found[index] = np.percentile(latencies[column == index], 95, method="higher")
    return found


def load_over_time(rounds: Sequence[Arrivals], seconds: float, columns: int) -> NDArray[np.float64]:
    """Return the requests per second in the same parts."""
    counts = np.bincount(_columns(rounds, seconds, columns), minlength=columns)
    return np.asarray(counts * (columns / (seconds * len(rounds))), np.float64)


def verdict(results: Mapping[str, Sequence[Figures]], rate: float, deadline_ms: float) -> str:
    """Return in a sentence whether the first policy serves this traffic better than the others.

    A difference counts if every round shows it, and if it is not too small to matter: first that in
    the share on time, and where there is none, that in the p95 latency.
    """
    (subject, own), *others = results.items()
    worse, more, equal = list[str](), list[str](), list[str]()
    for name, rounds in others:
        sign, words = _compare((subject, own), (name, rounds), _OF_DEADLINE * deadline_ms)
        (equal if sign == 0 else more if sign > 0 else worse).append(words)
    share = f"{median(own).on_time:.1%} on time"
    alike = " and ".join(equal)
    if others and not worse and not more:
        verb = "is" if len(equal) == 1 else "are"
        here = f"no gain here at {figure(rate)} requests/s"
        return f"{here}: {alike} {verb} as good as {subject}, {share}"
    own_words = ", ".join(
        [f"{subject}: {share}", *more, *([f"no more than {alike}"] if equal else [])]
    )
    return "; ".join([*worse, own_words])


def _compare(
    one: tuple[str, Sequence[Figures]], other: tuple[str, Sequence[Figures]], least_ms: float
) -> tuple[int, str]:
    """Return 1, 0 or -1 where the one is better, equal or worse than the other, and in what."""
    (name, own), (rival, theirs) = one, other
    pairs = list(zip(own, theirs, strict=True))
    gains = [a.on_time - b.on_time for a, b in pairs]
    mine, its = median(own), median(theirs)
    if min(gains) > 0 and np.median(gains) >= _POINTS:
        if mine.on_time < _AS_RATIO * its.on_time:
            return 1, f"{100 * (mine.on_time - its.on_time):.1f} points more than {rival}"
        if its.on_time > 0:
            return 1, f"{mine.on_time / its.on_time:.1f} times as many as {rival}"
        return 1, f"of which {rival} answers none"
    if max(gains) < 0 and np.median(gains) <= -_POINTS:
        return -1, f"{rival} is better here: {its.on_time:.1%} on time"
    if all(a.p95_ms < min(_FASTER * b.p95_ms, b.p95_ms - least_ms) for a, b in pairs):
        return 1, f"p95 {figure(mine.p95_ms)} ms where {rival} has {_ms(its.p95_ms)}"
    if all(b.p95_ms < min(_FASTER * a.p95_ms, a.p95_ms - least_ms) for a, b in pairs):
        said = f"as many in time, p95 {figure(its.p95_ms)} ms where {name} has {_ms(mine.p95_ms)}"
        return -1, f"{rival} is better here: {said}"
    return 0, rival


def _ms(value: float) -> str:
    return f"{figure(value)} ms" if np.isfinite(value) else "none"


def _columns(rounds: Sequence[Arrivals], seconds: float, columns: int) -> NDArray[np.int64]:
    moments = [arrivals.seconds + index * seconds for index, arrivals in enumerate(rounds)]
    share = np.concatenate(moments) / (seconds * len(rounds))
    return np.minimum((share * columns).astype(np.int64), columns - 1)
