"""Calls of every size that was measured, before a version serves: real rows where it has some."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Final

from lrai_core import (
    ConditionNotMet,
    DeadlineExceeded,
    InferenceRequest,
    InferenceResponse,
    LraiError,
    QueueFull,
)
from lrai_core.artifact import EVALUATION
from lrai_core.engine.batching import MEASURED_ELEMENTS, stretch, synthetic_row
from lrai_core.runtime.embedded import Embedded, Version
from lrai_core.verifier.sample import load_rows

_LENGTH: Final = 8  # where none was measured


def warm_up(core: Embedded, version: Version) -> None:
    """Run a version that nobody can ask for yet, on the way that requests take.

    Raises:
        ConditionNotMet: It lost an actor, did not answer in time, or refused real rows.
    """
    artifact, signature, pids = version.artifact, version.signature, core.pids(version)
    bounds = core.config.scheduler
    most_rows = min(bounds.max_batch_rows, core.config.limits.request_rows)
    most_elements = bounds.max_batch_elements or MEASURED_ELEMENTS
    measured = {(point.rows, point.length) for point in version.variant.latency}
    sizes = [(n, m) for n, m in measured if n <= most_rows and n * m <= most_elements]
    real = []
    if EVALUATION in artifact.manifest.files:
        real = load_rows(artifact.file(EVALUATION), signature).inputs
    for i, (rows, length) in enumerate(sorted(sizes) or [(1, 0)]):
        row = real[i % len(real)] if real else synthetic_row(signature, length or _LENGTH)
        arrays = stretch(row, signature, rows, length or _LENGTH)
        names = [spec.name for spec in signature.inputs]
        request = InferenceRequest(
            model_name=version.name,
            inputs=dict(zip(names, arrays, strict=True)),
            timeout_ms=core.config.actor.start_timeout_seconds * 1e3,
        )
        size = f"with {rows} row(s)" + f" of length {length}" * bool(length)
        try:
            _ask(core, request, version)
        except LraiError as error:  # a made-up row may be no valid input
            if real or isinstance(error, DeadlineExceeded):
                raise ConditionNotMet(f"warming up {version.key} {size}: {error}") from None
        if core.pids(version) != pids:
            raise ConditionNotMet(f"warming up {version.key} {size}: it lost an actor")


def _ask(core: Embedded, request: InferenceRequest, version: Version) -> None:
    """Have every actor of the version run the request, as far as that can be had."""
    deadline = time.monotonic() + core.config.actor.start_timeout_seconds
    asked = list[Future[InferenceResponse]]()
    while len(asked) < len(version.actors):
        try:
            asked.append(core.start(request, version))
        except QueueFull:  # of what others ask: that says nothing of this version
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    for future in asked:
        future.result()
