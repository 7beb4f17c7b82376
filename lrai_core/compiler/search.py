"""Candidates: every form that is tried, built, and measured against fp32 in interleaved rounds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, cast

import msgspec
import numpy as np
import onnx
from msgspec.structs import asdict

from lrai_core.artifact import LatencyPoint
from lrai_core.compiler.model import SharedWeights
from lrai_core.engine.batching import length_of, stretch, synthetic_row
from lrai_core.engine.engine import SHORT_CALL_MS, Engine, Session, find_engine
from lrai_core.errors import ArtifactError, EngineError, UsageError, shorten
from lrai_core.protocol import Array, Signature, TensorSpec

ROUNDS, MOST_ROUNDS = 3, 63  # at least, and as many as fit into
_ROUNDS_SECONDS: Final = 12.0  # a machine is slower and faster for seconds at a time
_LONG_ROUND: Final = 1.0  # seconds: of a shorter one a single pause would decide
# After so many rounds those stay that are at most so much slower: than fp32, than their form with
# other passes.
_LOOKS: Final = {1: (math.log(1.3), math.log(1.15)), 3: (math.log(1.1), math.log(1.03))}
# Times as fast that calls get by a form that is worth its difference; or, for noise, of one size.
WORTH, _WORTH_SOME = 1.04, 1.15
_FEW_BYTES: Final = 8 << 20  # of fp32: then it may stay in memory beside what serves
# Of a call that one of several forms is chosen for, at most: to choose, and for each byte of its
# weights that a cache of that size had until another form ran.
_CHOICE_MS, _CACHE_BYTES, _BYTE_MS = 0.01, 2 << 20, 1e-7
_POINT_ELEMENTS: Final = 1024  # padded rows x length of the largest point
_LENGTHS: Final = (8, 16, 32, 64, 128, 256, 512)
_LEAST_SECONDS: Final = 5e-4  # one timing is repeated until it takes this long
OBJECTIVES: Final = ("latency", "memory")
# Seconds of a call of several rows: longer ones are not worth the time of all, or of any form.
_LONG, _LONGEST = 0.2, 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What was done to one MatMul or Gemm.

    Attributes:
        bits: Of the stored weight; 32 where the operator was left alone.
        scheme: What was done to it; "float32" where the operator was left alone.
        weight_elements: 0 where the operator was left alone as it was.
        error: Relative L2 error of the dequantised weight.
        harm: Its share of what int8, of one operator at a time, does to the outputs; 0 where that
            is not known.
        why: Reason for leaving it alone, empty otherwise.
    """

    node: str
    op_type: str
    bits: int = 32
    scheme: str = "float32"
    weight_elements: int = 0
    error: float = 0.0
    harm: float = 0.0
    why: str = ""


class Built(msgspec.Struct):
    """A form of the model, as its builder made it.

    Attributes:
        form: Id of the form: `fp32`, `int8-row`, …
        graph: File of the graph, in a folder of its own with what it reads.
        size_bytes: What loading it reads.
        operators: What was done to each operator.
        passes_off: Optimizer passes that were left out.
        shared: It reads the source's weights too, which stay where they are.
    """

    form: str
    precision: str
    graph: Path
    size_bytes: int
    operators: list[Quantized] = msgspec.field(default_factory=list)
    passes_off: tuple[str, ...] = ()
    shared: bool = False


class Candidate(Built, kw_only=True, eq=False):
    """A form that runs, and what was found of it.

    Attributes:
        gaps: Per search row its largest difference to the source, after the output maps.
    """

    session: Session
    engine: Engine
    latency: list[LatencyPoint] = msgspec.field(default_factory=list)
    speedup: float = 1.0
    gaps: list[float] = msgspec.field(default_factory=list)

    @property
    def name(self) -> str:
        """Return the form with the passes left out, for logs."""
        return self.form + "".join(f" without {name}" for name in self.passes_off)

    def gains(self, others: Sequence[Candidate], more: float = 0.0) -> list[float]:
        """Return by point how many times as fast as by these calls are; below 1 it loses.

        `more`: milliseconds that it takes to choose between them.
        """
        at = zip(self.latency, *(other.latency for other in others), strict=True)
        each = ((own.median_ms + more, min(o.median_ms for o in theirs)) for own, *theirs in at)
        return [theirs / own for own, theirs in each] or [1.0]

    def worth(self, others: Sequence[Candidate], more: float = 0.0) -> bool:
        """Return whether these gain by it: 4 % in the mean, or 15 % for calls of some size."""
        gains = [max(1.0, gain) for gain in self.gains(others, more)]
        return statistics.geometric_mean(gains) >= WORTH or max(gains) >= _WORTH_SOME

    def gain(self, others: Sequence[Candidate]) -> float:
        """Return the geometric mean of that, as of `speedup`: single points are noisy."""
        return statistics.geometric_mean(max(1.0, gain) for gain in self.gains(others))

    def little(self, fp32: Candidate) -> bool:
        """Return whether it is no match for all calls: too slow, or some lose more than all gain.

        Where fp32 would serve beside it, it takes those that lose.
        """
        loses = self.speedup * min(self.gains([fp32])) < 1 and not beside(self, [fp32])
        return loses or self.speedup < WORTH

    @property
    def distance(self) -> float:
        """Return the root mean square of the gaps: single rows tell too little of the tail."""
        # Bounded, so that of rows that differ utterly the number counts, and no sum overflows.
        bounded = [min(gap, 1e150) for gap in self.gaps]
        return math.hypot(*bounded) / math.sqrt(max(1, len(bounded)))

    @property
    def pace(self) -> str:
        """Return how fast it is, for logs."""
        return f"{self.speedup:.2f} x fp32"


class Sample(NamedTuple):
    """Rows that forms may be made for; nothing is judged on them."""

    rows: Sequence[list[Array]]
    outputs: Sequence[TensorSpec]
    inputs: Sequence[TensorSpec] = ()
    calls: Sequence[tuple[int, int]] = ()  # of the signature


@dataclass(frozen=True, slots=True)
class Material:
    """What forms are made of.

    Attributes:
        model: The source's graph, its large weights external. Not to be modified.
        shared: The source's weights, which graphs may refer to.
        folder: Where each form is written, in a folder of its own.
        sample: None where nothing can be judged: only fp32 is wanted.
        threads: Of the sessions.
        objective: One of `OBJECTIVES`: which forms are worth making.
        until: When this is past, by `time.monotonic`, no more are made; fp32 is in any case.
        found: What one builder tells the next of the model.
    """

    model: onnx.ModelProto
    shared: SharedWeights
    folder: Path
    sample: Sample | None
    threads: int
    objective: str = OBJECTIVES[0]
    until: float = math.inf
    found: dict[str, Any] = field(default_factory=dict)


Reject = Callable[[str, str], None]


class Builder(Protocol):
    """What makes the forms that an engine runs; by the entry point `lrai.builders`."""

    engine: Engine
    steps: int  # forms at most

    def build(self, material: Material, reject: Reject) -> Iterator[Built]:
        """Yield the forms that can be made here; `reject` is told of each that cannot, and why."""


def find_builder(name: str) -> Builder:
    """Return what builds for the engine of that name.

    Raises:
        UsageError: Nothing builds for an engine of that name.
        EnvironmentProblem: The engine is not installed.
    """
    known = {entry.name: entry for entry in entry_points(group="lrai.builders")}
    if name not in known:
        raise UsageError(f"engine {shorten(name)!r} is unknown; known: {', '.join(sorted(known))}")
    engine = find_engine(name)  # first, for it says what is not installed
    return cast("Builder", known[name].load()(engine))


def build(
    builder: Builder, material: Material, tick: Callable[[str], None], reject: Reject
) -> list[Candidate]:
    """Return the forms of one engine that can be made and loaded.

    Args:
        builder: Of the engine.
        material: What they are made of.
        tick: Told the name of each candidate.
        reject: Told the name of what is no candidate, and why.
    """
    candidates = []
    for made in builder.build(material, reject):
        weights = material.shared.folder if made.shared else None
        try:
            session = builder.engine.load(made.graph, weights=weights, threads=material.threads)
        except ArtifactError as error:
            reject(made.form, str(error))
        else:
            candidates.append(Candidate(**asdict(made), session=session, engine=builder.engine))
            tick(candidates[-1].name)
        if candidates and time.monotonic() > material.until:
            reject(f"what follows {made.form}", "not made: the minutes are up")
            break
    return candidates


class Calls(NamedTuple):
    """What candidates are measured with.

    Attributes:
        signature: Of the model.
        rows: The longest of those served; where there are none, one is made up.
        points: (rows, length) of each call.
    """

    signature: Signature
    rows: Sequence[list[Array]]
    points: Sequence[tuple[int, int]]

    def feed(self, rows: int, length: int) -> list[Array]:
        """Return the longest row, brought to this length, so many times."""
        row = self.rows[0] if self.rows else synthetic_row(self.signature, max(length, 1))
        return stretch(row, self.signature, rows, length)


def longest(rows: Sequence[list[Array]], signature: Signature) -> list[list[Array]]:
    """Return the longest row alone, nothing of nothing; rows of a file are read for it once."""
    return [max(rows, key=lambda row: length_of(row, signature))] if rows else []


def refusing(candidates: Sequence[Candidate], calls: Calls) -> list[tuple[Candidate, str]]:
    """Return what does not run in a call of several rows, and why; fp32 is not asked."""
    several = min((at for at in calls.points if at[0] > 1), default=calls.points[0])
    feed, found = calls.feed(*several), []
    for candidate in (one for one in candidates if one.form != "fp32"):
        try:
            candidate.session.run(feed)
        except EngineError as error:
            found.append((candidate, str(error)))
    return found


def profile(
    candidates: Sequence[Candidate], calls: Calls, tick: Callable[[], None], until: float = math.inf
) -> None:
    """Measure all candidates with these calls in interleaved rounds, and set latency and speedup.

    Machines drift: what is compared is measured in turn, medians are taken, ratios are reported.
    Each timing follows a smallest call of the same candidate: those before it have left nothing in
    the caches, which costs short calls three times what they take, and no more than what serves.
    Points of several rows that take over 0.2 s are left for the second time, when what is worth
    judging is measured, and such of over 0.6 s are left out: smaller ones tell. After a long round
    what is far slower than fp32, or than its form with other passes, is left out, and after three
    what is slower by a tenth, or 3 %; when the clock, `time.monotonic`, is past `until`, or this
    has taken 12 s, there are no more rounds than these three, which `tick` is told of. Short calls
    get more, as their forms differ by less than a machine does from one second to the next.
    The speed-up is over the fastest candidate of the form fp32 in the same round, reached in three
    of four rounds: the luckiest of many would win by their median, and be slower when it serves. It
    is that of the first time.
    """
    before = [(point.rows, point.length) for point in candidates[0].latency]
    most, sessions = _LONGEST if before else _LONG, [candidate.session for candidate in candidates]
    late = before and time.monotonic() >= until
    feeds = {at: calls.feed(*at) for at in calls.points if not late and at not in before}
    feeds = {at: f for at, f in feeds.items() if at[0] == 1 or _seconds(sessions[0], f, 1) <= most}
    if not feeds:
        return
    smallest = calls.feed(*calls.points[0])
    each = [(f, [_repeats(session, f) for session in sessions]) for f in feeds.values()]
    taken = np.full((len(each), MOST_ROUNDS, len(candidates)), np.nan)
    forms = [candidate.form for candidate in candidates]
    still, began = list(range(len(forms))), time.monotonic()
    for done in range(MOST_ROUNDS):  # from point to point, as traffic goes from shape to shape
        if done >= ROUNDS and time.monotonic() > min(until, began + _ROUNDS_SECONDS):
            break
        if done in _LOOKS and (done > 1 or time.monotonic() - began > _LONG_ROUND):
            logs = np.log(taken[:, :done, still]).mean(axis=(0, 1)).tolist()
            still = _promising(forms, dict(zip(still, logs, strict=True)), *_LOOKS[done])
        for (point, (feed, repeats)), i in product(enumerate(each), still):
            sessions[i].run(smallest)  # then its weights are in a cache, as where it serves
            taken[point, done, i] = _seconds(sessions[i], feed, repeats[i])
        if done < ROUNDS:
            tick()
    paces = np.log(taken).mean(axis=0)  # by round and candidate
    best = min(still, key=lambda i: (forms[i] != "fp32", float(np.nanmedian(paces[:, i]))))
    gains = np.exp(np.nanquantile(paces[:, [best]] - paces, 0.25, axis=0))
    for i, candidate in enumerate(candidates):
        candidate.speedup = candidate.speedup if before else float(gains[i])
        own = zip(feeds, taken[..., i], strict=True)
        named = calls.signature.calls
        candidate.latency += [_point(*at, s[s > 0], at in named) for at, s in own]


def _promising(forms: list[str], paces: dict[int, float], most: float, twin: float) -> list[int]:
    """Return who may be the fastest of its form, and faster than fp32; all are logarithms."""
    best = {forms[i]: one for i, one in sorted(paces.items(), key=itemgetter(1), reverse=True)}
    return [i for i, one in paces.items() if one <= min(best[forms[i]] + twin, best["fp32"] + most)]


def beside(first: Candidate, others: Iterable[Candidate]) -> list[Candidate]:
    """Return which others serve beside the first, each the calls that it is fastest at.

    fp32 is one of them where its weights are few.
    """
    serving = [first]
    for one in others:
        more = _CHOICE_MS + min(one.size_bytes, _CACHE_BYTES) * _BYTE_MS
        if (one.form != "fp32" or one.size_bytes <= _FEW_BYTES) and one.worth(serving, more):
            serving.append(one)
    return serving[1:]


def points(signature: Signature, rows: Sequence[list[Array]]) -> list[tuple[int, int]]:
    """Return (rows, length) of every point worth measuring, given rows as long as those served."""
    if not signature.coalescible:
        return [(1, max((length_of(row, signature) for row in rows), default=0))]
    if all(spec.length_axis is None for spec in signature.inputs):
        return [(n, 0) for n in sorted({1, 2, 4, 8, 16, 32, *(at[0] for at in signature.calls)})]
    seen = [length_of(row, signature) for row in rows] or [128]  # shorter ones may not run at all
    lengths = [n for n in _LENGTHS if min(seen) // 16 <= n < max(seen)] + [max(seen)]
    each = [(n, at) for at in lengths for n in (1, 4, 16) if n * at <= max(at, _POINT_ELEMENTS)]
    return list(dict.fromkeys((*each, *signature.calls)))


def is_short(session: Session, calls: Calls) -> bool:
    """Return whether even the largest call takes so little that it is served with one thread."""
    feed = calls.feed(*max(calls.points, key=lambda at: (at[0] * max(at[1], 1), at)))
    each = [_seconds(session, feed, _repeats(session, feed)) for _ in range(ROUNDS)]
    return statistics.median(each) < SHORT_CALL_MS / 1e3


def _repeats(session: Session, feed: list[Array]) -> int:
    session.run(feed)  # the first takes longer, by the memory that it takes
    if _seconds(session, feed, 1) > 200 * _LEAST_SECONDS:
        return 1
    least = min(_seconds(session, feed, 1) for _ in range(ROUNDS))
    return max(1, int(_LEAST_SECONDS / max(least, 1e-7)))


def _seconds(session: Session, feed: list[Array], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        session.run(feed)
    return (time.perf_counter() - started) / repeats


def _point(rows: int, length: int, seconds: Array, named: bool) -> LatencyPoint:  # noqa: FBT001
    low, ms, high = np.quantile(seconds * 1e3, (0.25, 0.5, 0.75), method="weibull").tolist()
    return LatencyPoint(rows=rows, length=length, median_ms=ms, spread_ms=high - low, named=named)
