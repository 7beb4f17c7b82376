"""What int8 with a scale per tensor does to the outputs, one operator with weights at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from lrai_core.compiler.search import Sample
from lrai_engines.quantize import Graph, assemble, inferred
from lrai_engines.sensitivity import SWITCHES, switched_on

WEIGHTED: Final = ("Conv", "ConvTranspose", "MatMul", "Gemm")
ABSORBED: Final = ("Relu", "Clip")  # by the scale of what they give

Float32 = npt.NDArray[np.float32]


def harms(
    model: onnx.ModelProto, quantised: onnx.ModelProto, sample: Sample, threads: int = 1
) -> dict[str, float]:
    """Return for each operator with weights the mean squared difference that its int8 makes.

    What it reads and what it gives is rounded too, as it is where it runs in int8.

    Args:
        model: Standard operators with names, weights inline. Not modified.
        quantised: All of it, with QuantizeLinear and DequantizeLinear: its scales are taken.
        sample: As for `sensitivity.harms`, which says what is raised.
        threads: Of the engine.
    """
    weights = restored(quantised)
    return switched_on(_switched(model, quantised, weights), list(weights), sample, threads)


def work(model: onnx.ModelProto) -> dict[str, float]:
    """Return for each operator with weights how many products it computes for one row."""
    model = inferred(model)
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    places: dict[str, list[int]] = {}
    for value in (*model.graph.value_info, *model.graph.output):
        extents = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        places[value.name] = extents

    def count(node: onnx.NodeProto) -> int:
        extents = places.get(node.output[0], [])  # a convolution's places come last, else columns
        return math.prod(extents[2:] if "Conv" in node.op_type else extents[1:-1])

    return {
        node.name: float(sizes.get(node.input[1], 1) * count(node))
        for node in model.graph.node
        if node.op_type in WEIGHTED
    }


def restored(quantised: onnx.ModelProto) -> dict[str, Float32]:
    """Return by operator the float32 weights that its int8 weights stand for."""
    constants = {tensor.name: tensor for tensor in quantised.graph.initializer}
    linear = [n for n in quantised.graph.node if n.op_type == "DequantizeLinear"]
    found = {n.output[0]: n for n in linear if _is_plain(n, constants)}
    return {
        node.name: _restored(found[node.input[1]], constants)
        for node in quantised.graph.node
        if node.op_type in WEIGHTED and node.input[1] in found
    }


def _is_plain(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Return whether it gives a weight: of constants, with one scale or one of a channel."""
    known = all(name in constants for name in node.input if name)
    return known and len(constants[node.input[1]].dims) < 2


def _restored(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> Float32:
    """Return what a DequantizeLinear gives."""
    integers, scale, *zeros = (numpy_helper.to_array(constants[n]) for n in node.input if n)
    zero = zeros[0] if zeros else np.zeros_like(scale)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    shape = [1] * integers.ndim
    if scale.ndim:
        shape[axis] = scale.size
    return np.asarray((integers.astype(np.float32) - zero.reshape(shape)) * scale.reshape(shape))


def _switched(
    model: onnx.ModelProto, quantised: onnx.ModelProto, weights: Mapping[str, Float32]
) -> onnx.ModelProto:
    """Return `model` with one more input, float32 [weights]: 1 at the place of what is int8.

    Both are computed, and one is taken: a convolution whose weights are chosen while it runs takes
    many times as long as two whose weights are known before.
    """
    graph, names = Graph(0), list(weights)
    graph.initializers = {t.name: t for t in quantised.graph.initializer}
    scales = {n.input[0]: n for n in quantised.graph.node if n.op_type == "QuantizeLinear"}

    def rounded(value: str, name: str, to: str) -> str:
        """Have `to` be a value, rounded as the quantised graph rounds the one of that name."""
        scale = list(scales[name].input[1:3])
        integers = graph.add("QuantizeLinear", [value, *scale], f"{to}:integer")
        return graph.add("DequantizeLinear", [integers, *scale], to)

    ends = _ends(model, scales)
    rounds: dict[str, str] = {}  # values that an operator in int8 rounds, and its switch
    for node in model.graph.node:
        own, value = deepcopy(node), node.output[0]
        own.ClearField("name")  # which may be that of what it gives, as new nodes have it
        switch = ""
        if (name := node.name) in weights:
            place = graph.constant(f"{name}:place", [names.index(name)], np.int64)
            number = graph.add("Gather", [SWITCHES, place], f"{name}:number")
            switch = graph.add("Cast", [number], f"{name}:switch", to=TensorProto.BOOL)
            rounds |= dict.fromkeys(ends.get(name, ()), switch)
        exact = f"{value}:exact" if value in rounds else value
        own.output[0] = f"{value}:float32" if switch else exact
        graph.nodes.append(own)
        if switch:
            low = deepcopy(node)
            if node.input[0] in scales:
                low.input[0] = rounded(node.input[0], node.input[0], f"{name}:read")
            low.input[1] = graph.constant(f"{name}:weight", weights[name], np.float32)
            low.name = low.output[0] = f"{value}:int8"
            graph.nodes.append(low)
            graph.add("Where", [switch, low.output[0], own.output[0]], exact)
        if value in rounds:
            low_value = rounded(exact, value, f"{value}:rounded")
            graph.add("Where", [rounds[value], low_value, exact], value)
    made = assemble(model, graph)
    given = onnx.helper.make_tensor_value_info(SWITCHES, TensorProto.FLOAT, [len(names)])
    made.graph.input.append(given)
    return made


def _ends(model: onnx.ModelProto, scales: Mapping[str, object]) -> dict[str, list[str]]:
    """Return by operator the value that its int8 kernel would round: behind a Relu, its own."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    ends = {}
    for node in model.graph.node:
        value, after = node.output[0], readers.get(node.output[0], [])
        if value not in scales and len(after) == 1 and after[0].op_type in ABSORBED:
            value = after[0].output[0]
        ends[node.name] = [value] if value in scales else []
    return ends


def late(model: onnx.ModelProto) -> tuple[set[str], set[str]]:
    """Return what operators with weights give, directly or not, and what they read beside it."""
    given, beside = set[str](), set[str]()
    for node in model.graph.node:
        if node.op_type in WEIGHTED or not given.isdisjoint(node.input):
            beside |= set(node.input) - given
            given.update(node.output)
    return given, beside
