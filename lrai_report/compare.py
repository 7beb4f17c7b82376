"""Two variants of an artifact side by side: served in turns, with real requests."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrai_core import Artifact, ConditionNotMet, InferenceRequest, LraiError, Runtime
from lrai_core.errors import shorten
from lrai_core.verifier.sample import Rows
from lrai_core.verifier.spec import FAR, MEASURES, agreement, difference, raw_as
from lrai_report.own import own_config

_SHOWN: Final = 8  # numbers of an answer
_WARM: Final = 32  # requests


class Worst(NamedTuple):
    """A request that two variants answer differently."""

    gap: float
    agrees: bool
    first: str
    second: str


@dataclass(slots=True)
class Side:
    """One variant in a runtime of its own, and what it showed, round by round."""

    variant: str
    runtime: Runtime
    requests_per_second: list[float] = field(default_factory=list)
    p95_ms: list[float] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)

    @property
    def memory_mb(self) -> float:
        """Return what its actors hold in memory."""
        (model,) = self.runtime.models()
        total = 0
        for pid in model.actor_pids:
            with suppress(OSError, IndexError):  # it has just ended, or is a zombie
                text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
                total += int(text.partition("\nVmRSS:")[2].split()[0])
        return total * 1024 / 1e6

    def figures(self, price: float) -> dict[str, Any]:
        """Return what was measured, and what a million requests cost at a price an hour, if any."""
        rates = self.requests_per_second
        cost = price / 3600 * 1e6 / statistics.median(rates)
        found = {"requests_per_second": rates, "p95_ms": self.p95_ms, "answers": self.answers}
        return found | {"memory_mb": self.memory_mb} | ({"cost_per_million": cost} if price else {})


@contextmanager
def sides(pairs: Sequence[tuple[Artifact, str]]) -> Iterator[list[Side]]:
    """Serve each of these variants; an empty name is what the artifact serves by itself."""
    # A process has memory of its own; and whoever calls them asks no more at once than fits here.
    room = {"scheduler.max_queue_rows": 1 << 30, "scheduler.max_queue_bytes": 1 << 60}
    config = own_config({"actor.isolation": "process"} | room)
    opened: list[Side] = []
    try:
        for artifact, variant in pairs:
            runtime = Runtime(config, address="embedded")
            opened.append(Side(variant, runtime))
            runtime.load(artifact, variant=variant)
            opened[-1].variant = runtime.models()[0].variant  # it may be for other machines
        yield opened
    finally:
        for side in opened:
            side.runtime.close()


def answered(artifact: Artifact, file: Path, tick: Callable[[], None]) -> dict[str, NDArray[Any]]:
    """Return the captured rows that the model answers: what it refused was captured, too.

    Args:
        artifact: That served them.
        file: `captured.npz`.
        tick: Called after each row.
    """
    kept, specs = [], artifact.manifest.signature.inputs
    try:
        with np.load(file, allow_pickle=False) as archive:
            columns = {name: archive[name] for name in archive}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ConditionNotMet(f"{file.name} cannot be read, it may have aged: {error}") from None
    if columns.keys() != {spec.name for spec in specs}:
        raise ConditionNotMet(f"{file.name} holds the requests of another model: {sorted(columns)}")
    with sides([(artifact, "")]) as (side,):
        for row in range(len(next(iter(columns.values())))):
            inputs = {s.name: columns[s.name][row : row + 1] for s in specs}
            flat = {s.name: inputs[s.name][0] for s in specs if s.batch_axis is None}
            with suppress(LraiError):
                side.runtime.infer(InferenceRequest(model_name="", inputs=inputs | flat))
                kept.append(row)
            tick()
    return {name: column[kept] for name, column in columns.items()}


def measure_of(artifact: Artifact) -> str:
    """Return what answers that agree have in common."""
    specs, epsilon = _alike(artifact)
    words = [MEASURES[s.output_map] for s in specs if s.output_map in MEASURES]
    words += [f"difference <= {epsilon:g}"] * (epsilon < FAR)
    return ", ".join(dict.fromkeys(words))


def _alike(artifact: Artifact) -> tuple[Sequence[Any], float]:
    """Return how outputs have to agree, and by how much they may differ, as its gate saw it."""
    specs, demanded = artifact.manifest.signature.outputs, artifact.manifest.demanded
    return (raw_as("derived", specs), demanded[0]) if demanded else (specs, FAR)


def requests_of(rows: Rows, artifact: Artifact) -> list[InferenceRequest]:
    """Return a request for each row."""
    names = [spec.name for spec in artifact.manifest.signature.inputs]
    inputs = (dict(zip(names, row, strict=True)) for row in rows.inputs)
    return [InferenceRequest(model_name="", inputs=each) for each in inputs]


def measure(
    both: Sequence[Side],
    requests: Sequence[InferenceRequest],
    *,
    callers: int,
    seconds: float,
    rounds: int,
    tick: Callable[[], None],
) -> None:
    """Have callers ask each side in turn, round by round, as fast as they are answered."""
    with asyncio.Runner() as runner:
        for side in both:
            for request in requests[:_WARM]:
                side.runtime.infer(request)
        for index in range(rounds):
            # A round may end before all were asked: each begins at others, the same for both.
            first = index * len(requests) // rounds
            asked = [*requests[first:], *requests[:first]]
            for side in both if index % 2 else reversed(both):
                latencies, took = runner.run(_asked(side.runtime, asked, callers, seconds))
                side.answers.append(len(latencies))
                side.requests_per_second.append(len(latencies) / took)
                side.p95_ms.append(1e3 * float(np.percentile(latencies, 95, method="higher")))
                tick()


async def _asked(
    runtime: Runtime, requests: Sequence[InferenceRequest], callers: int, seconds: float
) -> tuple[list[float], float]:
    """Return the latencies of a round, and how long it took."""
    source, latencies = itertools.cycle(requests), list[float]()
    began = time.perf_counter()

    async def caller() -> None:
        while True:  # the first time in any case: a round without answers says nothing
            asked = time.perf_counter()
            await runtime.infer_async(next(source))
            latencies.append((answered := time.perf_counter()) - asked)
            if answered >= began + seconds:
                return

    await asyncio.gather(*(caller() for _ in range(callers)))
    return latencies, time.perf_counter() - began


def differing(
    both: Sequence[Side],
    requests: Sequence[InferenceRequest],
    artifact: Artifact,
    tick: Callable[[], None],
) -> list[Worst]:
    """Return every request with what the two say to it, the farthest apart first.

    Of several outputs it is the one that is farthest apart, or does not agree, by its name.
    """
    specs, found = artifact.manifest.signature.outputs, list[Worst]()
    alike, epsilon = _alike(artifact)
    for request in requests:
        first, second = (side.runtime.infer(request).outputs for side in both)
        each = list[Worst]()
        for spec, like in zip(specs, alike, strict=True):
            f, g, name = first[spec.name], second[spec.name], spec.name if specs[1:] else ""
            gap = difference([f], [g], [spec])
            agrees = agreement([f], [g], [like]) and gap <= epsilon
            each.append(Worst(gap, agrees, _short(f, name), _short(g, name)))
        found.append(min(each, key=_order))
        tick()
    return sorted(found, key=_order)


def _order(one: Worst) -> tuple[bool, float]:
    return one.agrees, -one.gap


def _short(answer: NDArray[Any], name: str) -> str:
    """Return the start of an output, or its best class, behind its name."""
    values, label = answer.ravel(), f"{shorten(name, 60)}: " if name else ""
    real = values.dtype.kind == "f"
    if real and len(values) > 1:
        best = int(values.argmax())
        return f"{label}[{best}] {values[best]:.4g}"
    some = [f"{v:.4g}" if real else shorten(str(v), 60) for v in values[:_SHOWN]]
    return label + ", ".join(some) + ", …" * (len(values) > _SHOWN)
