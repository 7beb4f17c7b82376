"""Columns of an activation that are much larger than the others, computed in several parts.

Of what a transformer's GELU gives one column may be five times as large as the next, and a scale
for all leaves these a fifth of its steps. Where elementwise operators alone lie between matrices,
the first can give such a column n times over, and the next take each with an nth of its row: the
product is the same, and what is rounded for each is an nth. That takes no operator, and a few
columns more.

Source: outlier channel splitting, Zhao et al. 2019, "Improving Neural Network Quantization without
Retraining using Outlier Channel Splitting" (arXiv:1901.09504), section 3.1; here of activations,
until there are so many columns more, and with the factors of Xiao et al. 2023 beside it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from lrai_engines.quantize import Float32, Graph, assemble, constants, linears, read

Columns = Mapping[str, npt.NDArray[np.int64]]  # by activation: which column each is, or a part of

_ELEMENTWISE: Final = frozenset((
    "Abs", "Add", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish",
    "Identity", "LeakyRelu", "Mul", "Neg", "Pow", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign",
    "Sqrt", "Sub", "Swish", "Tanh",
))  # fmt: skip
_PRODUCTS: Final = ("MatMul", "Gemm")
_FEWEST: Final = 512  # columns: of fewer, those that come to it would take time
_MORE: Final = 96  # columns for each that comes to it; twice or four times as many gain nothing
_BLOCK: Final = 16  # columns that kernels compute at a time
_WORTH: Final = 1.25  # times as small as the largest column must become


class Between(NamedTuple):
    """What gives an activation, whose columns are computed each by itself, and what takes it."""

    nodes: list[onnx.NodeProto]  # from matrices on
    after: list[onnx.NodeProto]


def parts(low: Float32, high: Float32) -> npt.NDArray[np.int64] | None:
    """Return in how many parts each column is computed; None where that is not worth it.

    Args:
        low: The least value of each column, float32 [K].
        high: The largest.
    """
    whole = np.maximum(high, -low)
    counts = np.ones(len(whole), np.int64)
    for _ in range(-(-len(whole) // (_MORE * _BLOCK)) * _BLOCK):
        counts[np.argmax(whole / counts)] += 1
    return counts if whole.max() > _WORTH * (whole / counts).max() else None


def divisible(model: onnx.ModelProto) -> dict[str, Between]:
    """Return the activations of many columns that can be computed in parts.

    Args:
        model: Standard operators, weights inline.
    """
    known, layers = constants(model), {layer.output: layer for layer in linears(model)}
    made = {name: node for node in model.graph.node for name in node.output}
    readers, after = defaultdict[str, set[int]](set), defaultdict[str, list[onnx.NodeProto]](list)
    for node in model.graph.node:
        for name in read(node):
            readers[name].add(id(node))
    for layer in layers.values():
        after[layer.activation].append(made[layer.output])
    answers = {value.name for value in model.graph.output}
    found = dict[str, Between]()
    for activation, theirs in after.items():
        columns = layers[theirs[0].output[0]].matrix.shape[0]
        if columns < _FEWEST:
            continue
        nodes, todo = dict[str, onnx.NodeProto](), [activation]
        while todo:
            name = todo.pop()
            if (node := made.get(name)) is None or name in answers:
                break
            nodes[name] = node
            inputs = [n for n in node.input if n and n not in known]
            if name in layers and layers[name].matrix.shape[1] == columns:
                inputs = []  # where it begins
            elif node.op_type not in _ELEMENTWISE or node.domain not in ("", "ai.onnx"):
                break
            if not all(_fits(known[n], columns) for n in _vectors(node) if n in known):
                break
            todo += {*inputs}.difference(nodes, todo)
        else:
            own = {id(node) for node in (*nodes.values(), *theirs)}
            alone = all(own.issuperset(readers[name]) for name in nodes)
            if alone and not any(activation in node.input[1:] for node in theirs):
                found[activation] = Between(list(nodes.values()), theirs)
    return found


def split(model: onnx.ModelProto, columns: Columns) -> onnx.ModelProto:
    """Return `model` with these columns in place of each activation's; it computes the same.

    Args:
        model: Not modified.
        columns: Of activations that are `divisible`; each of their columns is there once or more.
    """
    if not columns:
        return model
    known, found = constants(model), divisible(model)
    graph, others = Graph(0), dict[tuple[str, int], str]()  # inputs in place of these
    wider = set[str]()

    def put(node: onnx.NodeProto, place: int, end: str, array: Float32) -> None:
        name = f"{node.input[place]}:{end}"
        others[node.output[0], place] = graph.constant(name, array, array.dtype)

    for activation, which in columns.items():
        between = found[activation]
        for node in between.nodes:
            wider.update(node.output)
            for place, name in enumerate(node.input):
                if name not in known:
                    continue
                array = numpy_helper.to_array(known[name])
                if place == 1 and node.op_type in _PRODUCTS:
                    own = array.take(which, 0 if _is_turned(node) else 1)
                    put(node, place, f"to {activation}", own)
                elif array.size > 1:
                    put(node, place, f"columns {activation}", array.take(which, -1))
        counts = np.bincount(which).astype(np.float32)
        for node in between.after:
            array, turned = numpy_helper.to_array(known[node.input[1]]), _is_turned(node)
            own = array / (counts if turned else counts[:, None]).astype(array.dtype)
            put(node, 1, f"of {activation}", own.take(which, 1 if turned else 0))
    for node in model.graph.node:
        own_node, inputs = (
            node,
            [others.get((node.output[0], i), n) for i, n in enumerate(node.input)],
        )
        if inputs != list(node.input):
            own_node = deepcopy(node)
            own_node.input[:] = inputs
        graph.nodes.append(own_node)
    result = assemble(model, graph)
    told = [value for value in result.graph.value_info if value.name not in wider]
    del result.graph.value_info[:]
    result.graph.value_info.extend(told)
    return result


def _vectors(node: onnx.NodeProto) -> list[str]:
    """Return the inputs that may have a value per column: a matrix is none."""
    return [n for at, n in enumerate(node.input) if at != 1 or node.op_type not in _PRODUCTS]


def _fits(vector: onnx.TensorProto, columns: int) -> bool:
    """Return whether it is one number, or one for each column."""
    size = math.prod(vector.dims)
    return bool(size == 1 or size == columns == vector.dims[-1])


def _is_turned(node: onnx.NodeProto) -> bool:
    return any(one.name == "transB" and one.i for one in node.attribute)
