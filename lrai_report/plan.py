"""What the policies will be asked: sizes that the model takes, and a deadline that makes sense."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from lrai_core import Artifact, UsageError
from lrai_report.trace import Arrivals, Range, Trace, fit_lengths
from lrai_report.words import figure

_FACTOR: Final = 10
_LEAST_DEADLINE_MS: Final = 10.0
_LARGE: Final = 95  # percentile of what the requests cost
_MOST_LENGTH: Final = 1 << 20
_MOST: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Plan:
    """What every policy is asked.

    Attributes:
        capacity: Requests per second that one by one answers here; 0 where it was not measured.
        deadline_is: Where the deadline comes from.
        rounds: The parts of the trace, of `seconds` each.
    """

    artifact: Artifact
    rate: float
    capacity: float
    deadline_ms: float
    deadline_is: str
    seconds: float
    rounds: list[Arrivals]


def check_size(rate: float, seconds: float, rounds: int) -> None:
    """Refuse what would not be done in a day, or not fit into memory.

    Raises:
        UsageError: Too many requests.
    """
    if rate * seconds * rounds > _MOST:
        raise UsageError(
            f"{figure(rate, 4)} requests/s x {seconds:g} s x {rounds} rounds: over {_MOST:,}"
            " requests; a lower --rate, or fewer --seconds or --rounds are needed"
        )


def parse_range(text: str) -> Range | None:
    """Return the ends of `LOW..HIGH`, None of an empty text.

    Raises:
        UsageError: It is something else.
    """
    if not text:
        return None
    ends = re.fullmatch(r"([0-9]{1,9})\.\.([0-9]{1,9})", text)
    if ends is None or not 1 <= int(ends[1]) <= int(ends[2]) <= _MOST_LENGTH:
        raise UsageError(
            f"--lengths is {text[:40]!r}; LOW..HIGH from 1 to {_MOST_LENGTH} is needed, as in 8..64"
        )
    return int(ends[1]), int(ends[2])


def sized(
    trace: Trace, artifact: Artifact, wanted: Range | None
) -> tuple[Trace, Range | None, str]:
    """Return the trace in sizes that the model takes, what to draw lengths from, and words on it.

    Raises:
        UsageError: Lengths are wanted where the model has none, or unknown where it has.
    """
    inputs = artifact.manifest.signature.inputs
    if isinstance(trace, Arrivals):
        words = f"{len(trace.seconds):,} requests in {trace.seconds[-1]:,.0f} s"
        if trace.rows.max() > 1 and not all(spec.batch_axis == 0 for spec in inputs):
            words += "; of one row each, for the model has no batch axis"
            trace = replace(trace, rows=np.ones_like(trace.rows))
    else:
        words = f"{len(trace.per_second):,} s, {figure(trace.per_second.mean(), 4)} requests/s"
    if not any(spec.length_axis is not None for spec in inputs):
        if wanted is not None:
            raise UsageError("--lengths: the model has no length axis")
        if isinstance(trace, Arrivals) and trace.lengths.any():
            words += "; its lengths are not used, for the model has no length axis"
            trace = replace(trace, lengths=np.zeros_like(trace.lengths))
        return trace, None, words
    low, high = wanted or _profiled(artifact)
    if isinstance(trace, Arrivals) and trace.lengths.any():
        least, most = int(trace.lengths.min()), int(trace.lengths.max())
        words += f", lengths {least}..{most}"
        if wanted or not 1 <= least <= most <= high:
            trace = replace(trace, lengths=fit_lengths(trace.lengths, low, high))
            words += f" as {low}..{high}"
        return trace, None, words
    return trace, (low, high), f"{words}; lengths drawn from {low}..{high}"


def suggest_deadline(artifact: Artifact, arrivals: Arrivals) -> tuple[float, str]:
    """Return the deadline in ms that the profile suggests, and how it came to it.

    Raises:
        UsageError: There is no profile.
    """
    manifest = artifact.manifest
    alone = {
        p.length: p.median_ms for p in manifest.variant(manifest.chosen).latency if p.rows == 1
    }
    if not alone:
        raise UsageError("the artifact has no profile to take a deadline from; give --deadline-ms")
    known = np.array(sorted(alone))
    costs = np.interp(arrivals.lengths, known, [alone[length] for length in known])
    costs *= np.maximum(arrivals.lengths / max(known[-1], 1), 1) * arrivals.rows
    large = float(np.percentile(costs, _LARGE))
    words = f"{_FACTOR} x a large request (p{_LARGE}) alone, {figure(large)} ms by the profile"
    if large * _FACTOR < _LEAST_DEADLINE_MS:
        return _LEAST_DEADLINE_MS, f"{words}, but at least {_LEAST_DEADLINE_MS:g} ms"
    return large * _FACTOR, words


def _profiled(artifact: Artifact) -> Range:
    manifest = artifact.manifest
    known = [point.length for point in manifest.variant(manifest.chosen).latency if point.length]
    if not known:
        raise UsageError("the artifact has no profile that tells of lengths; --lengths is needed")
    return min(known), max(known)
