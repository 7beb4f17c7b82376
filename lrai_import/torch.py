"""Models of PyTorch, in memory, to ONNX."""

from __future__ import annotations

import inspect
import re
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from lrai_core import CompileError, EnvironmentProblem, TensorSpec

_OPSET: Final = 18
_ROWS: Final = 2  # torch takes a free dimension of 1 for a fixed one
_EXTENT: Final = 8
# Rows, extents, and by how much each of another name is more than the one before, at which it is
# compared with the module: which may ask whether two are the same, or which is larger.
_OTHERS: Final = ((1, 5, 0), (3, 40, 0), (2, 20, 3), (2, 20, -3))
_ESCAPES: Final = re.compile("\x1b\\[[0-9;]*m")
_DTYPES: Final = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}


def convert(model: Any, inputs: Sequence[TensorSpec]) -> onnx.ModelProto:
    """Return the module in ONNX, traced with made-up values: zeros where they are integers.

    Args:
        model: A module, set to evaluation here.
        inputs: By the names that its `forward` has for them, or else in its order; with symbols
            for free dimensions.

    Raises:
        EnvironmentProblem: torch or onnxscript is not installed.
        CompileError: It cannot be traced.
    """
    try:
        import torch

        if find_spec("onnxscript") is None:
            raise ImportError("torch says too late that it is missing", name="onnxscript")
    except ImportError as error:
        raise EnvironmentProblem(f"{error.name} is needed: pip install 'lrai[torch]'") from None
    if not inputs:
        raise CompileError("a signature of tensors is needed to trace a module: it has none")
    inputs = _in_order(model, inputs)
    values = tuple(torch.from_numpy(_made_up(spec)) for spec in inputs)
    auto = torch.export.Dim.AUTO
    free = tuple(
        {i: auto for i, extent in enumerate(spec.shape) if not isinstance(extent, int)}
        for spec in inputs
    )
    names = [spec.name for spec in inputs]
    if not isinstance(model, torch.fx.GraphModule):  # which was exported as it is to run
        model.eval()
    with tempfile.TemporaryDirectory(prefix="lrai-torch-") as folder:
        path = Path(folder, "model.onnx")
        try:
            program = torch.onnx.export(
                model, values, dynamo=True, dynamic_shapes=free, input_names=names,
                opset_version=_OPSET, verbose=False,
            )  # fmt: skip
            if program is None:
                raise CompileError("torch gave no program")
            program.save(path)
        except (torch.onnx.OnnxExporterError, RuntimeError, TypeError, ValueError) as error:
            cause = error.__cause__ or error
            plain = _ESCAPES.sub("", str(cause)).strip()
            lines = plain.splitlines() or [type(cause).__name__]
            why = f"{type(model).__name__} cannot be converted: {lines[0][:300]}"
            raise CompileError(why) from None
        made = onnx.load(path)
        _check_free(made, inputs)
        _compare(model, path, inputs)
    return made


def _in_order(model: Any, inputs: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
    """Return inputs as `forward` takes them, where it has their names: a signature may differ."""
    try:
        takes = list(inspect.signature(model.forward).parameters)
    except (AttributeError, TypeError, ValueError):
        return inputs
    places = [takes.index(spec.name) if spec.name in takes else -1 for spec in inputs]
    if all(place in (-1, index) for index, place in enumerate(places)):
        return inputs
    if sorted(places) == list(range(len(inputs))):
        return sorted(inputs, key=lambda spec: takes.index(spec.name))
    given, known = (", ".join(names)[:200] for names in ([s.name for s in inputs], takes))
    raise CompileError(f"the signature has {given}, which is not how forward begins: {known}")


def _compare(model: Any, path: Path, inputs: Sequence[TensorSpec]) -> None:
    """Refuse what was traced at one size and answers otherwise at others.

    A module that branches on an extent has one branch in its graph. Sizes that it refuses itself
    are passed over, and so is one that answers the same input twice differently.
    """
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    # Whole numbers of 1 too: a mask of 0 would hide everything, and 1 may be beyond a table.
    free = dict.fromkeys(one for s in inputs for one in s.shape[1:] if isinstance(one, str))
    for (rows, extent, more), fill in product(_OTHERS, (0, 1)):
        extents = {name: max(2, extent + more * k) for k, name in enumerate(free)}
        values = [_made_up(spec, rows, extents, fill) for spec in inputs]
        feeds = {s.name: v for s, v in zip(inputs, values, strict=True) if s.name in names}
        answers = list[list[Any]]()
        with torch.no_grad(), suppress(Exception):  # of a module anything may come
            answers += (_arrays(model(*map(torch.from_numpy, values))) for _ in range(2))
        if len(answers) < 2 or not _alike(*answers):
            continue
        made: list[Any] | None = None
        with suppress(Exception):  # the graph refuses what the module takes
            made = session.run(None, feeds)
        if made is None or not _alike(answers[0], made):
            sizes = ", ".join(map(str, dict.fromkeys(extents.values()))) or str(extent)
            size = f"{rows} rows and free extents of {sizes}"
            why = "it may branch on an extent; use torch.cond, or fix it in the signature"
            raise CompileError(
                f"{type(model).__name__}, traced, answers otherwise for {size}: {why}"
            )


def _arrays(answer: Any) -> list[Any]:
    """Return the tensors in what a module gives, in order."""
    if isinstance(answer, Mapping):
        answer = list(answer.values())
    if isinstance(answer, list | tuple):
        return [array for part in answer for array in _arrays(part)]
    return [answer.numpy()] if hasattr(answer, "numpy") else []


def _alike(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Return whether they are the same but for rounding; what graphs lack, as caches, is not."""
    if len(first) != len(second):
        return True
    for a, b in zip(first, second, strict=True):
        size = float(np.abs(a.astype(np.float64)).max(initial=1.0, where=np.isfinite(a)))
        if a.shape != b.shape or not np.allclose(a, b, 1e-3, 1e-3 * size, equal_nan=True):
            return False
    return True


def _check_free(made: onnx.ModelProto, inputs: Sequence[TensorSpec]) -> None:
    """Refuse what takes the extents only that it was traced with."""
    for spec, value in zip(inputs, made.graph.input, strict=True):
        dims = value.type.tensor_type.shape.dim
        for axis, (extent, dim) in enumerate(zip(spec.shape, dims, strict=True)):
            if not isinstance(extent, int) and dim.HasField("dim_value"):
                free = f"input {spec.name!r}: dimension {axis} is free in the signature"
                raise CompileError(f"{free}; the module, traced, takes {dim.dim_value} only")


def _made_up(
    spec: TensorSpec, rows: int = _ROWS, free: Mapping[str, int] | None = None, fill: int = 0
) -> np.ndarray[Any, Any]:
    if spec.datatype not in _DTYPES:
        raise CompileError(f"input {spec.name!r} is of {spec.datatype}, which torch does not have")
    shape = [
        extent if isinstance(extent, int) else (free or {}).get(extent, _EXTENT) if i else rows
        for i, extent in enumerate(spec.shape)
    ]
    if spec.datatype.startswith("FP"):
        # Each has other numbers, or nobody would see that two have changed places.
        values = np.random.default_rng(zlib.crc32(spec.name.encode())).normal(size=shape)
        return values.astype(_DTYPES[spec.datatype])
    return np.full(shape, fill, _DTYPES[spec.datatype])
