"""Callers of a Triton server over gRPC: Triton's own client, in this process."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import np_to_triton_dtype

from benchmarks.callers import Figures, Row
from benchmarks.kinds import Kind


def closed(
    address: str, model: str, kind: Kind, output: str, indices: Sequence[int], callers: int
) -> Figures:
    """Send these rows, so many at a time, and return what became of them.

    What the client does is in the latencies, and takes more time than that of `callers.py`.

    Raises:
        RuntimeError: Not all were answered.
        ValueError: There are fewer rows than callers, who would not all ask.
    """
    if len(indices) < callers:
        raise ValueError(f"{len(indices)} requests are too few for {callers} callers")
    asked = {index: _inputs(kind.rows[index]) for index in set(indices)}
    wanted = [triton.InferRequestedOutput(output)]
    free, answers, errors = threading.Semaphore(callers), dict[int, Any](), list[str]()
    begun, ended = np.zeros(len(indices)), np.zeros(len(indices))

    def done(place: int, result: Any, error: Any) -> None:
        ended[place] = time.perf_counter()
        if error is None:
            answers[place] = result
        else:
            errors.append(str(error))
        free.release()

    with triton.InferenceServerClient(address) as client:
        start = time.perf_counter()
        for place, index in enumerate(indices):
            free.acquire()
            begun[place] = time.perf_counter()
            client.async_infer(model, asked[index], partial(done, place), outputs=wanted)
        for _ in range(callers):
            free.acquire()
    if errors:
        raise RuntimeError(f"{model} over gRPC: {len(errors)} were refused, {errors[0][:300]}")
    got = np.concatenate([answers[place].as_numpy(output) for place in range(len(indices))])
    meant = kind.expected[list(indices)]
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(meant, axis=1)
    return Figures(
        seconds=float(ended.max()) - start,
        latencies=ended - begun,
        ended=ended - start,
        statuses={http.client.OK: len(indices)},
        first_error="",
        worst=float(np.abs(got - meant).max()),
        cosines=(got * meant).sum(axis=1) / np.maximum(norms, 1e-12),
    )


def _inputs(row: Row) -> list[triton.InferInput]:
    inputs = []
    for name, array in row.items():
        inputs.append(triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    return inputs
