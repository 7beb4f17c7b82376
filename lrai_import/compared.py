"""A converted model beside what it was made from: both answer made-up rows, of several sizes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lrai_codecs import dtype_of
from lrai_core import CompileError, TensorSpec

_ROWS: Final = 2  # torch takes a free dimension of 1 for a fixed one
_EXTENT: Final = 8
# Rows, extents, and by how much each of another name is more than the one before: a model may ask
# whether two are the same, or which is larger.
_SIZES: Final = ((1, 5, 0), (3, 40, 0), (2, 20, 3), (2, 20, -3))

Model = Callable[[Mapping[str, NDArray[Any]]], Sequence[Any]]  # inputs by name to outputs in order


def compare(model: Model, made: Path, inputs: Sequence[TensorSpec], *, what: str, why: str) -> bool:
    """Refuse what was converted at one size, and answers otherwise than the model at others.

    Sizes that the model refuses itself are passed over, and so is one that answers the same input
    twice differently.

    Args:
        model: What was converted.
        made: The ONNX file that came of it.
        inputs: Of the model, with symbols for free dimensions.
        what: It is called in the error.
        why: It may be so.

    Returns:
        Whether there was a size to compare them at.

    Raises:
        CompileError: They differ.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    compared, tried = False, set[object]()
    # Whole numbers of 1 too: a mask of 0 would hide everything, and 1 may be beyond a table.
    free = dict.fromkeys(one for s in inputs for one in s.shape[1:] if isinstance(one, str))
    for (rows, extent, more), fill in product(_SIZES, (0, 1)):
        extents = {name: max(2, extent + more * k) for k, name in enumerate(free)}
        values = {spec.name: made_up(spec, rows, extents, fill) for spec in inputs}
        fixed = all(value.dtype.kind == "f" for value in values.values())
        case = (*(value.shape for value in values.values()), fixed or fill)
        if case in tried:  # nothing is free, or no input is of whole numbers
            continue
        tried.add(case)
        answers = list[Sequence[Any]]()
        with suppress(Exception):  # of a model anything may come
            answers += (model(values) for _ in range(2))
        if len(answers) < 2 or not alike(*answers):
            continue
        converted: list[Any] | None = None
        with suppress(Exception):  # the graph refuses what the model takes
            converted = session.run(None, {name: values[name] for name in names})
        if converted is None or not alike(answers[0], converted):
            sizes = ", ".join(map(str, dict.fromkeys(extents.values()))) or str(extent)
            size = f"{rows} rows and free extents of {sizes}"
            raise CompileError(f"{what} gives other answers for {size}: {why}")
        compared = True
    return compared


def made_up(
    spec: TensorSpec, rows: int = _ROWS, free: Mapping[str, int] | None = None, fill: int = 0
) -> NDArray[Any]:
    """Return rows for an input: random numbers where they are real, `fill` in every place else."""
    shape = [
        extent if isinstance(extent, int) else (free or {}).get(extent, _EXTENT) if i else rows
        for i, extent in enumerate(spec.shape)
    ]
    dtype = dtype_of(spec.datatype)
    if dtype.kind == "f":
        # Each has other numbers, or nobody would see that two have changed places.
        values = np.random.default_rng(zlib.crc32(spec.name.encode())).normal(size=shape)
        return values.astype(dtype)
    return np.full(shape, str(fill) if dtype.hasobject else fill, dtype)


def alike(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Return whether they are the same but for rounding; what graphs lack, as caches, is not."""
    if len(first) != len(second):
        return True
    for a, b in zip(first, second, strict=True):
        if a.dtype.hasobject:  # texts, as bytes here and as strings there
            continue
        # Those of a thousand classes are small: what is alike is told by their own size.
        size = float(np.abs(a.astype(np.float64)).max(initial=0.01, where=np.isfinite(a)))
        if a.shape != b.shape or not np.allclose(a, b, 1e-3, 1e-3 * size, equal_nan=True):
            return False
    return True
