"""Candidates: every form that is tried, built, and measured against fp32 in interleaved rounds."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Final

import onnx
from onnx.external_data_helper import load_external_data_for_model

from lrai_core.artifact import LatencyPoint
from lrai_core.compiler import fusion, quantize
from lrai_core.compiler.model import SharedWeights
from lrai_core.compiler.quantize import Quantized
from lrai_core.engine.batching import length_of, stretch, synthetic_row
from lrai_core.engine.engine import Engine, Session
from lrai_core.errors import ArtifactError, CompileError
from lrai_core.protocol import Array, Signature

Build = Callable[[onnx.ModelProto], tuple[onnx.ModelProto, list[Quantized]]]

ROUNDS: Final = 9
_POINT_ELEMENTS: Final = 512  # padded rows x length of the largest point
_LENGTHS: Final = (8, 16, 32, 64, 128, 256, 512)
_LEAST_SECONDS: Final = 5e-4  # one timing is repeated until it takes this long


@dataclass(slots=True)
class Candidate:
    """One form of the model.

    Attributes:
        form: Id of the form: `fp32`, `int8-row`, …
        passes_off: Optimizer passes that were left out.
        graph: File of the graph, its shared weights in the source's folder.
        size_bytes: What loading it reads.
        operators: What was done to each operator.
    """

    form: str
    passes_off: tuple[str, ...]
    graph: Path
    size_bytes: int
    operators: list[Quantized]
    session: Session
    latency: list[LatencyPoint] = field(default_factory=list)
    speedup: float = 1.0

    @property
    def name(self) -> str:
        """Return the form with the passes left out, for logs."""
        return self.form + "".join(f" without {name}" for name in self.passes_off)

    @property
    def pace(self) -> str:
        """Return how fast it is, for logs."""
        return f"{self.speedup:.2f} x fp32"


FORMS: Final[Mapping[str, Build | None]] = {
    "fp32": None,
    "int8-dynamic": quantize.dynamic_int8,
    "int8-row": quantize.dynamic_int8_per_row,
    "int8-mixed": quantize.mixed_int8,
    "int8-block32": partial(quantize.matmul_nbits, block_size=32),
    "int8-block128": partial(quantize.matmul_nbits, block_size=128),
}
"""Every form and what builds it; fp32 is first and needs no builder."""


def build(
    model: onnx.ModelProto,
    wanted: Sequence[str],
    *,
    folder: Path,
    shared: SharedWeights,
    engine: Engine,
    threads: int,
    tick: Callable[[str], None],
    reject: Callable[[str, str], None],
) -> list[Candidate]:
    """Return each form under each pass set as a candidate, if it can be made and loaded.

    Args:
        model: The source's graph, its large weights external. Not modified.
        wanted: Keys of `FORMS`.
        folder: Where graphs are written.
        shared: The source's weights, which graphs refer to.
        engine: What loads the candidates.
        threads: Of the sessions.
        tick: Told the name of each candidate.
        reject: Told the name of what is no candidate, and why.
    """
    weights, candidates = shared.folder, list[Candidate]()
    basic: onnx.ModelProto | None = None
    for form in wanted:
        seen: set[bytes] = set()
        graph, operators = model, list[Quantized]()
        try:
            if transform := FORMS[form]:
                if basic is None:
                    basic = fusion.optimise(model, level="basic", threads=threads, weights=weights)
                    load_external_data_for_model(basic, str(weights))
                graph, operators = transform(basic)
        except CompileError as error:
            reject(form, str(error))
            continue
        for name, passes_off in fusion.DISABLEABLE:
            file = folder / f"{form}.{name}.onnx"
            try:
                optimised = fusion.optimise(
                    graph, level="all", disabled=passes_off, threads=threads, weights=weights
                )
                size = shared.write_variant(optimised, file)
                digest = hashlib.sha256(file.read_bytes()).digest()
                if digest in seen:
                    continue  # the passes had nothing to do
                seen.add(digest)
                session = engine.load(file, weights=weights, threads=threads)
            except (CompileError, ArtifactError) as error:
                reject(f"{form} ({name})", str(error))
                continue
            candidates.append(Candidate(form, passes_off, file, size, operators, session))
            tick(candidates[-1].name)
    return candidates


def profile(
    candidates: Sequence[Candidate],
    signature: Signature,
    rows: Sequence[list[Array]],
    points: Sequence[tuple[int, int]],
    tick: Callable[[], None],
) -> None:
    """Measure all candidates at `points` in interleaved rounds, and set latency and speedup.

    Machines drift: what is compared is measured in turn, medians are taken, ratios are reported.
    The reference of the speed-up is the fastest candidate of the form fp32.
    """
    row = max(rows, key=lambda r: length_of(r, signature)) if rows else None
    measured: list[list[LatencyPoint]] = [[] for _ in candidates]
    for count, length in points:
        base = row or synthetic_row(signature, max(length, 1))
        feed = stretch(base, signature, count, length)
        sessions = [candidate.session for candidate in candidates]
        repeats = [_repeats(session, feed) for session in sessions]
        rounds = [list(map(_seconds, sessions, repeat(feed), repeats)) for _ in range(ROUNDS)]
        for own, seconds in zip(measured, zip(*rounds, strict=True), strict=True):
            own.append(_point(count, length, seconds))
        tick()
    paces = [statistics.fmean(math.log(point.median_ms) for point in own) for own in measured]
    forms = [candidate.form for candidate in candidates]
    best = min(pace for pace, form in zip(paces, forms, strict=True) if form == "fp32")
    for candidate, pace, own in zip(candidates, paces, measured, strict=True):
        candidate.latency, candidate.speedup = own, math.exp(best - pace)


def points(signature: Signature, rows: Sequence[list[Array]]) -> list[tuple[int, int]]:
    """Return (rows, length) of every point worth measuring, given rows as long as those served."""
    if not signature.coalescible:
        return [(1, 0)]
    if signature.inputs[0].length_axis is None:
        return [(count, 0) for count in (1, 2, 4, 8, 16, 32)]
    longest = max((length_of(row, signature) for row in rows), default=128)
    lengths = [length for length in _LENGTHS if length < longest] + [longest]
    return [
        (count, length)
        for length in lengths
        for count in (1, 4, 16)
        if count == 1 or count * length <= _POINT_ELEMENTS
    ]


def _repeats(session: Session, feed: list[Array]) -> int:
    session.run(feed)
    return max(1, int(_LEAST_SECONDS / max(_seconds(session, feed, 1), 1e-7)))


def _seconds(session: Session, feed: list[Array], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        session.run(feed)
    return (time.perf_counter() - started) / repeats


def _point(rows: int, length: int, seconds: Sequence[float]) -> LatencyPoint:
    quarters = statistics.quantiles(seconds, n=4)
    return LatencyPoint(
        rows=rows,
        length=length,
        median_ms=statistics.median(seconds) * 1e3,
        spread_ms=(quarters[2] - quarters[0]) * 1e3,
    )
