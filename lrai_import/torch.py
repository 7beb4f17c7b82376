"""Models of PyTorch, in memory, to ONNX."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from lrai_core import CompileError, EnvironmentProblem, TensorSpec

_OPSET: Final = 18
_ROWS: Final = 2  # torch takes a free dimension of 1 for a fixed one
_EXTENT: Final = 8
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
        inputs: In the order of its `forward`, with symbols for free dimensions.

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
            lines = str(error).strip().splitlines() or [type(error).__name__]
            why = f"{type(model).__name__} cannot be converted: {lines[0][:300]}"
            raise CompileError(why) from None
        made = onnx.load(path)
    _check_free(made, inputs)
    return made


def _check_free(made: onnx.ModelProto, inputs: Sequence[TensorSpec]) -> None:
    """Refuse what takes the extents only that it was traced with."""
    for spec, value in zip(inputs, made.graph.input, strict=True):
        dims = value.type.tensor_type.shape.dim
        for axis, (extent, dim) in enumerate(zip(spec.shape, dims, strict=True)):
            if not isinstance(extent, int) and dim.HasField("dim_value"):
                free = f"input {spec.name!r}: dimension {axis} is free in the signature"
                raise CompileError(f"{free}; the module, traced, takes {dim.dim_value} only")


def _made_up(spec: TensorSpec) -> np.ndarray[Any, Any]:
    if spec.datatype not in _DTYPES:
        raise CompileError(f"input {spec.name!r} is of {spec.datatype}, which torch does not have")
    shape = [
        extent if isinstance(extent, int) else (_EXTENT if i else _ROWS)
        for i, extent in enumerate(spec.shape)
    ]
    if spec.datatype.startswith("FP"):
        values = np.random.default_rng(0).normal(size=shape)
        return values.astype(_DTYPES[spec.datatype])
    return np.zeros(shape, _DTYPES[spec.datatype])
