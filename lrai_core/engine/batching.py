"""Rows of several requests into one call, and its outputs back to their callers.

Pure; the actor, the gate and the certificates share it, so what was measured is what runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, Final

import numpy as np

from lrai_core.engine.engine import Session
from lrai_core.errors import EngineError
from lrai_core.protocol import DATATYPES, Array, Signature, Specs, TensorSpec

# Padded rows x length that the gate measures the batch effect with, and the default of a call. On
# CPUs calls of more elements run no faster per element (MiniLM: from 256 tokens on they run
# slower), and what they need stays with the process: twice as many cost a sentence encoder 20 MB.
MEASURED_ELEMENTS: Final = 512
_BATCH_ROWS: Final = (2, 3, 5, 8, 13, 64)
_MOST_ELEMENTS: Final = 1 << 28
Several = Sequence[Sequence[Array]]  # of each request, or row, one array per input


def coalesce(requests: Several, signature: Signature, length: int = 0) -> list[Array]:
    """Return one array per input: the requests' rows in order, padded to the longest.

    Args:
        requests: Per request one array per input; shapes agree but for batch and length axis.
        signature: Of the model. A single request is passed through uncopied.
        length: To which they are padded, if that is longer.
    """
    if len(requests) == 1 and not length:
        return list(requests[0])
    return [_join(a, spec, length) for spec, *a in zip(signature.inputs, *requests, strict=True)]


def split(
    outputs: Sequence[Array], specs: Specs, rows: Sequence[int], lengths: Sequence[int]
) -> list[list[Array]]:
    """Return per request its rows of every output, sliced back to its length; views, not copies.

    Args:
        outputs: Of the call, one per entry of `specs`.
        specs: The outputs' declarations.
        rows: Rows of each request, in the order of `coalesce`.
        lengths: Length of each request, 0 where the model has no length axis.

    Raises:
        ValueError: An output has not the rows that went in.
    """
    if len(rows) == 1:
        return [[_cut(o, spec, lengths[0]) for o, spec in zip(outputs, specs, strict=True)]]
    total = sum(rows)
    for output, spec in zip(outputs, specs, strict=True):
        if output.shape[:1] != (total,):
            raise ValueError(f"output {spec.name!r} has shape {[*output.shape]} for {total} rows")
    answers, start = [], 0
    for count, length in zip(rows, lengths, strict=True):
        own = [output[start : start + count] for output in outputs]
        answers.append([_cut(part, spec, length) for part, spec in zip(own, specs, strict=True)])
        start += count
    return answers


def run_together(
    session: Session, rows: Several, signature: Signature, length: int = 0
) -> list[list[Array]]:
    """Return the outputs of each of these single rows, run in one call and padded; see `coalesce`.

    Raises:
        ValueError: An output has not the rows that went in.
    """
    lengths = [length_of(row, signature) for row in rows]
    joint = session.run(coalesce(rows, signature, length))
    return split(joint, signature.outputs, [1] * len(rows), lengths)


def shuffled_batches(rows: Several, signature: Signature) -> Iterator[tuple[list[int], int]]:
    """Yield the rows' indices, shuffled, in batches of uneven sizes, each with a length to pad to.

    None but a single row has more than `MEASURED_ELEMENTS`. Those before are of the shapes of the
    signature's `calls`, each of which has as many rows, if so many are short enough.
    """
    random, lengths = np.random.default_rng(0), [length_of(row, signature) for row in rows]
    order = random.permutation(len(rows)).tolist()
    for count, length in sorted(signature.calls, key=lambda call: (call[1], -call[0])):
        fit = [index for index in order if lengths[index] <= length]
        most = max(count, len(rows) // (1 + len(signature.calls)))
        fit = fit[: min(len(fit), most) // count * count]
        order = random.permutation(sorted({*order} - {*fit})).tolist()
        yield from ((fit[at : at + count], length) for at in range(0, len(fit), count))
    while order:
        longest, batch = 0, list[int]()
        for index in order[: int(random.choice(_BATCH_ROWS))]:
            longest = max(longest, lengths[index])
            if batch and longest * (len(batch) + 1) > MEASURED_ELEMENTS:
                break
            batch.append(index)
        order = order[len(batch) :]
        yield batch, 0


def synthetic_row(signature: Signature, length: int) -> list[Array]:
    """Return a row that most models accept: bits, normal noise for floats, texts of one letter."""
    random, row = Random(length), list[Array]()  # numpy's own is 2 MB more in every actor
    for spec in signature.inputs:
        shape = [extent if isinstance(extent, int) else 4 for extent in spec.shape]
        for axis, extent in ((spec.batch_axis, 1), (spec.length_axis, length)):
            if axis is not None:
                shape[axis] = extent
        if (count := math.prod(shape)) > _MOST_ELEMENTS:
            raise EngineError(f"input {spec.name!r}: a row of {shape} is too large")
        kind = (dtype := DATATYPES[spec.datatype]).kind
        # Nought and one are tokens, segments and masks alike.
        draw = random.gauss if kind == "f" else lambda: random.getrandbits(1)
        # Of texts of one length none would be padded, as they are where callers share a call.
        text = " ".join("a" * max(1, length))
        values: list[Any] = [text] if kind == "O" else [draw() for _ in range(min(count, 4096))]
        row.append(np.resize(np.array(values, dtype), shape))
        if kind in "iub":
            row[-1][(..., slice(1)) if shape else ()] = 1  # the first is never masked
    return row


def stretch(row: Sequence[Array], signature: Signature, rows: int, length: int) -> list[Array]:
    """Return `row` repeated to `rows`, and along its length axis repeated or cut to `length`."""
    stretched = []
    for array, spec in zip(row, signature.inputs, strict=True):
        axis = spec.length_axis
        result = array if axis is None else array.take(np.arange(length) % array.shape[axis], axis)
        if spec.batch_axis is not None and rows != 1:
            result = np.repeat(result, rows, axis=0)
        stretched.append(np.asarray(result, order="C"))  # which leaves a scalar one
    return stretched


def length_of(row: Sequence[Array], signature: Signature) -> int:
    """Return the extent of the length axis, 0 where there is none."""
    for array, spec in zip(row, signature.inputs, strict=True):
        if spec.length_axis is not None:
            return int(array.shape[spec.length_axis])
    return 0


def _join(arrays: list[Array], spec: TensorSpec, length: int) -> Array:
    axis = spec.length_axis
    if axis is None or {max(length, a.shape[axis]) for a in arrays} == {arrays[0].shape[axis]}:
        return np.concatenate(arrays)
    shape, dtype = list(arrays[0].shape), arrays[0].dtype
    shape[0] = sum(array.shape[0] for array in arrays)
    shape[axis] = max(length, *(array.shape[axis] for array in arrays))
    joined = np.full(shape, "" if dtype.kind == "O" else spec.pad_value, dtype)
    start = 0
    for array in arrays:
        _cut(joined[start : start + array.shape[0]], spec, array.shape[axis])[...] = array
        start += array.shape[0]
    return joined


def _cut(rows: Array, spec: TensorSpec, length: int) -> Array:
    """Return the rows up to this length, a view."""
    axis = spec.length_axis
    return rows if axis is None else rows[(slice(None),) * axis + (slice(length),)]
