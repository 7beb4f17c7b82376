"""A request of many rows asked as several requests, and their answers as one."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from lrai_codecs.tensors import dtype_of
from lrai_core import (
    InferenceRequest,
    InferenceResponse,
    LraiConfig,
    QueueFull,
    RequestError,
    Signature,
    Tensor,
)

_AT_A_TIME: Final = 2  # one runs, one waits; the queue is not for one caller alone
_TEXT_BYTES: Final = 64  # that the runtime has to have room for, at least, for a text

Infer = Callable[[InferenceRequest], Awaitable[InferenceResponse]]


async def in_parts(
    infer: Infer, request: InferenceRequest, signature: Signature, config: LraiConfig
) -> InferenceResponse:
    """Return the answer to a request that is asked in parts: calls of their own, within the limits.

    Args:
        infer: Answers a request.
        request: Its time, if it states one, is that of all parts together.
        signature: Of the model.
        config: Its limits and `scheduler.max_batch_rows`; what cannot be divided is asked as it is.

    Raises:
        LraiError: The first that a part ended with; the others are cancelled. Where the queue is
            full after some were answered, a part comes again, as long as there is time.
    """
    most_rows = min(config.scheduler.max_batch_rows, rows_at_a_time(request, config))
    several = parts(request, signature, most_rows)
    if len(several) == 1:
        return await infer(request)
    begun, answers = time.monotonic(), dict[int, InferenceResponse]()
    most_ms = request.timeout_ms or config.scheduler.default_timeout_ms
    todo = iter(enumerate(several))

    async def in_turns() -> None:
        for index, part in todo:
            while index not in answers:
                try:
                    answers[index] = await infer(_within(part, begun))
                except QueueFull as full:  # for those that were answered it comes again
                    wait = full.retry_after_seconds
                    if not answers or (time.monotonic() - begun + wait) * 1e3 > most_ms:
                        raise
                    await asyncio.sleep(wait)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(_AT_A_TIME):
                group.create_task(in_turns())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return joined([answers[index] for index in range(len(several))])


def in_turn(
    infer: Callable[[InferenceRequest], InferenceResponse],
    request: InferenceRequest,
    signature: Signature,
    most_rows: int,
    config: LraiConfig,
) -> InferenceResponse:
    """Return the same as `in_parts`, where nothing is awaited: one part after the other.

    A part of several that finds the queue full comes again, as long as there is time. Where none is
    stated that is the default time of a request from the last answer on: of a table that takes an
    hour what was answered is not lost to somebody else's rush.
    """
    begun = since = time.monotonic()
    most_ms = request.timeout_ms or config.scheduler.default_timeout_ms
    several, answers = parts(request, signature, most_rows), list[InferenceResponse]()
    while len(answers) < len(several):
        try:
            answers.append(infer(_within(several[len(answers)], begun)))
            since = begun if request.timeout_ms else time.monotonic()
        except QueueFull as full:
            taken_ms = (time.monotonic() - since + full.retry_after_seconds) * 1e3
            if len(several) == 1 or taken_ms > most_ms:
                raise
            time.sleep(full.retry_after_seconds)
    return joined(answers) if len(answers) > 1 else answers[0]


def rows_at_a_time(request: InferenceRequest, config: LraiConfig) -> int:
    """Return of how many rows a part may be that is within the limits, with room for others."""
    given = request.inputs.values()
    row_bytes = sum(_bytes(one) / max(1, one.shape[0]) for one in given if one.shape)
    most = min(config.limits.request_rows, config.scheduler.max_queue_rows)
    return max(1, int(min(most, config.limits.request_bytes / max(1, row_bytes)) / 4))


def _bytes(array: NDArray[Any] | Tensor) -> int:
    if isinstance(array, Tensor):
        return memoryview(array.data).nbytes
    least = _TEXT_BYTES * array.size if array.dtype.kind in "OSU" else 0
    if array.dtype.kind != "O":
        return max(least, array.nbytes)
    return max(least, sum(len(one) if isinstance(one, str | bytes) else 0 for one in array.flat))


def _within(part: InferenceRequest, begun: float) -> InferenceRequest:
    """Return a part with what is left of the time that the whole was given, if it was."""
    if part.timeout_ms is None:
        return part
    left_ms = part.timeout_ms - (time.monotonic() - begun) * 1e3
    return msgspec.structs.replace(part, timeout_ms=max(0.0, left_ms))


def parts(
    request: InferenceRequest, signature: Signature, most_rows: int
) -> list[InferenceRequest]:
    """Return requests of at most so many rows; the request alone where it cannot be divided.

    That is one for a model whose rows belong together, one of binary texts, or one whose tensors
    differ in rows or are not as they say, which the runtime refuses.
    """
    counts = {_count(given) for given in request.inputs.values()}
    if not signature.coalescible or len(counts) != 1:
        return [request]
    (count,) = counts
    if count <= most_rows:
        return [request]
    return [
        msgspec.structs.replace(
            request,
            inputs={
                name: _cut(given, start, min(count, start + most_rows))
                for name, given in request.inputs.items()
            },
        )
        for start in range(0, count, most_rows)
    ]


def _count(given: NDArray[Any] | Tensor) -> int:
    """Return the rows, 0 where they cannot be told apart, or there is nothing in them."""
    if min(given.shape, default=0) < 1:  # of nothing there may be any number of rows
        return 0
    if isinstance(given, Tensor):
        each = 0 if given.datatype == "BYTES" else dtype_of(given.datatype).itemsize
        if each * math.prod(given.shape) != _bytes(given):
            return 0
    return int(given.shape[0])


def _cut(given: NDArray[Any] | Tensor, start: int, end: int) -> NDArray[Any] | Tensor:
    if not isinstance(given, Tensor):
        return given[start:end]
    row = memoryview(given.data).nbytes // given.shape[0]
    data = memoryview(given.data).cast("B")[start * row : end * row]
    return msgspec.structs.replace(given, shape=(end - start, *given.shape[1:]), data=data)


def joined(answers: Sequence[InferenceResponse]) -> InferenceResponse:
    """Return the rows of all answers, in their order, as the answer to one request.

    Args:
        answers: Of `parts`. Where different versions, or variants, gave them, all are named;
            a certificate is where each was given under one.

    Raises:
        RequestError: The shape of a row depends on those beside it.
    """
    outputs = {}
    for name in answers[0].outputs:
        try:
            outputs[name] = np.concatenate([answer.outputs[name] for answer in answers])
        except ValueError:
            what = f"output {name!r} has another shape in each part of so many rows"
            raise RequestError(f"{what}: ask for fewer at a time") from None
    names = answers[0].parameters
    said = {name: _together([one.parameters.get(name) for one in answers]) for name in names}
    version = _together([answer.model_version for answer in answers])
    own = {"model_version": version, "outputs": outputs, "parameters": said}
    return msgspec.structs.replace(answers[-1], **own)


def _together(values: Sequence[Any]) -> Any:
    """Return what all say, or else what each does, and None where one says nothing."""
    if len(different := dict.fromkeys(values)) == 1:
        return values[0]
    return None if None in different else ",".join(map(str, different))
