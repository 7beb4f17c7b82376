"""Small ONNX graphs for the compiler's tests, some of them hostile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def value(
    name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Sequence[onnx.TensorProto] = (),
    *,
    opset: int = 17,
    domains: Sequence[tuple[str, int]] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(weights))
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(*d) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def linear(features: int = 8, classes: int = 4, *, opset: int = 17) -> onnx.ModelProto:
    """Return x [batch, features] -> y [batch, classes] with fixed weights."""
    weight = np.random.default_rng(0).standard_normal((features, classes)).astype(np.float32)
    return model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        [value("x", ["batch", features])],
        [value("y", ["batch", classes])],
        [numpy_helper.from_array(weight, "w")],
        opset=opset,
    )


def sharing() -> list[onnx.NodeProto]:
    """Return (x w + x v) w: layers that share an activation, and two that share a weight."""
    return [
        helper.make_node("MatMul", ["x", "w"], ["a"], "first"),
        helper.make_node("MatMul", ["x", "v"], ["b"], "second"),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("MatMul", ["c", "w"], ["y"], "third"),
    ]


def save(proto: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def with_external_data(
    path: Path, location: str, *, offset: str = "0", length: str = "128"
) -> Path:
    """Write `linear()` with its weight stored at `location`, whatever that names."""
    proto = linear()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in (("location", location), ("offset", offset), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, text
    return save(proto, path)
