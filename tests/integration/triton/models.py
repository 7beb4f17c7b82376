"""Models of Triton's plain Python backend, and our backend's: each returns its input `x` as `y`."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

WIDTH = 4
_PLAIN = """
import os
import time

import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        {first}
        inputs = [pb_utils.get_input_tensor_by_name(request, "x") for request in requests]
        outputs = [pb_utils.Tensor("y", given.as_numpy()) for given in inputs]
        return [pb_utils.InferenceResponse([output]) for output in outputs]
"""


def config(backend: str, *, dims: int = WIDTH) -> str:
    """Return the configuration of a model of either backend."""
    tensors = (
        f'{kind} [{{ name: "{name}" data_type: TYPE_FP32 dims: [{dims}] }}]'
        for kind, name in (("input", "x"), ("output", "y"))
    )
    return f'backend: "{backend}"\nmax_batch_size: 8\n' + "\n".join(tensors) + "\n"


def plain(folder: Path, first: str = "pass") -> Path:
    """Write a model of the plain backend.

    Args:
        folder: Where; made if it is not there.
        first: Statement that runs before requests are answered.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(_PLAIN.format(first=first))
    return folder / "model.py"


def identity(path: Path) -> Path:
    """Write an ONNX model that returns float32 [batch, 4] as it is."""
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in "xy"
    )
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "graph", [x], [y])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path
