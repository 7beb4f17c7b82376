"""Calls of every size that was measured, before a version serves: real rows where it has some."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Final

import lrai_core as lrai
from lrai_core.artifact import EVALUATION
from lrai_core.engine.batching import MEASURED_ELEMENTS, length_of, stretch, synthetic_row
from lrai_core.runtime.embedded import Embedded
from lrai_core.runtime.version import Version
from lrai_core.verifier.sample import load_rows

_LENGTH: Final = 8  # where none was measured
_MOST_ROWS: Final = 64  # of the kept ones: each takes a look before it is run


def warm_up(core: Embedded, version: Version) -> None:
    """Run a version that serves nobody yet who does not name it, on the way that requests take.

    Raises:
        ConditionNotMet: It lost an actor, did not answer in time, or refused real rows.
    """
    artifact, signature, pids = version.artifact, version.signature, core.pids(version)
    bounds = version.limits
    most_rows = min(bounds.max_batch_rows, core.config.limits.request_rows)
    most_elements = bounds.max_batch_elements or MEASURED_ELEMENTS
    most_bytes = min(core.config.limits.request_bytes, bounds.max_queue_bytes)
    measured = {(point.rows, point.length) for point in version.variant.latency}
    fits = ((n, m) for n, m in measured if n <= most_rows)  # a row alone runs, however long
    sizes = [(n, m) for n, m in fits if n == 1 or n * m <= most_elements]
    kept = EVALUATION in artifact.manifest.files
    real = load_rows(artifact.file(EVALUATION), signature, _MOST_ROWS).inputs if kept else []
    names = [spec.name for spec in signature.inputs]
    limit_ms = core.config.actor.start_timeout_seconds * 1e3
    for i, (rows, length) in enumerate(sorted(sizes) or [(1, 0)]):
        row = real[i % len(real)] if real else synthetic_row(signature, length or _LENGTH)
        extent = length or (length_of(row, signature) if real else _LENGTH)
        inputs = dict(zip(names, stretch(row, signature, rows, extent), strict=True))
        if rows > 1 and sum(array.nbytes for array in inputs.values()) > most_bytes:
            continue  # no request may have so many
        request = lrai.InferenceRequest(model_name="", inputs=inputs, timeout_ms=limit_ms)
        size = f"with {rows} row(s)" + f" of length {length}" * bool(length)
        try:
            _ask(core, request, version)
        except lrai.LraiError as error:  # a made-up row may be no valid input
            if real or error.http_status != 400:
                raise lrai.ConditionNotMet(f"warming up {version.key} {size}: {error}") from None
        if core.pids(version) != pids:
            raise lrai.ConditionNotMet(f"warming up {version.key} {size}: it lost an actor")


def _ask(core: Embedded, request: lrai.InferenceRequest, version: Version) -> None:
    """Have every actor of the version run the request, as far as that can be had."""
    deadline = time.monotonic() + core.config.actor.start_timeout_seconds
    asked = list[Future[lrai.InferenceResponse]]()
    while len(asked) < len(version.actors):
        try:
            asked.append(core.start(request, version))
        except lrai.QueueFull:  # of what others ask: that says nothing of this version
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    for future in asked:
        future.result()
