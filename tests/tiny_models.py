"""ONNX models of a few operators, for what the real ones do not have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def token_model(path: Path) -> Path:
    """Write a model with a length axis: the masked mean of embeddings, and each token's own.

    `input_ids` and `attention_mask`, int64 [batch, sequence], to `mean`, float32 [batch, 4], and
    `tokens`, float32 [batch, sequence, 4].
    """
    table = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        helper.make_node("Cast", ["attention_mask"], ["weights"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["weights", "last"], ["mask"]),
        helper.make_node("Mul", ["embedded", "mask"], ["tokens"]),
        helper.make_node("ReduceSum", ["tokens", "middle"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "middle"], ["count"], keepdims=0),
        helper.make_node("Div", ["total", "count"], ["mean"]),
    ]
    constants = {"table": table, "last": np.array([-1]), "middle": np.array([1])}
    ids, free = int(TensorProto.INT64), ["batch", "sequence"]
    return _save(
        path,
        nodes,
        constants,
        inputs=[("input_ids", ids, free), ("attention_mask", ids, free)],
        outputs=[
            ("mean", TensorProto.FLOAT, ["batch", 4]),
            ("tokens", TensorProto.FLOAT, ["batch", "sequence", 4]),
        ],
    )


def column_model(path: Path) -> Path:
    """Write a model with an input per column: `price` float32, `count` int32 [batch] to `total`."""
    nodes = [
        helper.make_node("Cast", ["count"], ["factor"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["price", "factor"], ["total"]),
    ]
    return _save(
        path,
        nodes,
        {},
        inputs=[("price", TensorProto.FLOAT, ["batch"]), ("count", TensorProto.INT32, ["batch"])],
        outputs=[("total", TensorProto.FLOAT, ["batch"])],
    )


DATATYPES = (
    *("BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"),
    *("FLOAT16", "FLOAT", "DOUBLE", "STRING"),
)


def datatype_model(path: Path) -> Path:
    """Write a model that returns a column of every datatype: `in_INT8` [batch] as `out_INT8`."""
    kinds = {name: int(TensorProto.DataType.Value(name)) for name in DATATYPES}
    return _save(
        path,
        [helper.make_node("Identity", [f"in_{name}"], [f"out_{name}"]) for name in kinds],
        {},
        inputs=[(f"in_{name}", kind, ["batch"]) for name, kind in kinds.items()],
        outputs=[(f"out_{name}", kind, ["batch"]) for name, kind in kinds.items()],
    )


Values = Sequence[tuple[str, int, Sequence[str | int]]]


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]],
    inputs: Values,
    outputs: Values,
) -> Path:
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
