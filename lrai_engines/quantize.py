"""Quantisation of the weights of MatMul and Gemm, each scheme a pure function from model to model.

Every scheme takes a graph of standard operators (`fusion.optimise(level="basic")`) and returns one
that `fusion.optimise(level="all")` fuses further. What has no constant float32 matrix as its second
operand, attention among it, stays in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from lrai_core.compiler.search import Quantized
from lrai_core.engine.engine import isa_class
from lrai_core.errors import CompileError

Float32 = npt.NDArray[np.float32]
Made = tuple[onnx.ModelProto, list[Quantized]]  # a model, and what was done to its operators

_ONNX = ("", "ai.onnx")  # both name the standard's own operators
_OPSET: Final = 13  # the first whose QuantizeLinear is the one written here
# On these, kernels of uint8 x int8 add two products in int16: 2 * 255 * 64 is the most that fits.
SATURATING = ("avx512", "avx2", "x86_64")
BITS: Final = 8
FLOAT32: Final = "float32"  # the scheme of what is left alone
INT4: Final = "matmul_4_bits"
_SMALL_ELEMENTS: Final = 1 << 10
_TABLE_ELEMENTS: Final = 1 << 18  # of the smallest table worth it: 1 MB
_MOST = float(np.finfo(np.float32).max) / 256  # of what integers and a scale can give back
_LARGER: Final = 1.5  # steps without a zero point at most
_BLOCK: Final = 1 << 20  # elements
_TINY = 1e-20  # keeps the scale of an all-zero row finite


class NothingToQuantize(CompileError):
    """The model holds no MatMul or Gemm with a constant float32 matrix."""


def linears(model: onnx.ModelProto) -> Iterator[Linear]:
    """Yield every operator that qualifies, with its matrix."""
    known = constants(model)
    nodes = (node for node in model.graph.node if _is_linear(node))
    found = (_linear(node, known) for node in nodes)
    return (layer for layer in found if isinstance(layer, Linear))


def weights_int8(model: onnx.ModelProto, harms: Mapping[str, float] | None = None) -> Made:
    """Return `model` with int8 weights and a scale per column, and nothing said of activations.

    DequantizeLinear and MatMul, which an engine may run as one operator of its own.

    Args:
        model: Weights inline, opset 13 or later. Not modified.
        harms: See `rewrite`.

    Raises:
        NothingToQuantize: No operator qualifies.
        CompileError: The opset is too old.

    Source: ONNX DequantizeLinear, opset 13.
    """
    return rewrite(model, _weights_int8, harms)


class Smoothing(NamedTuple):
    """How an activation becomes integers.

    Attributes:
        factor: What its columns are divided by before, float32 [K]; None for nothing.
        step: Of the integers, where it is known before.
        zero: The integer that is 0, likewise.
    """

    factor: Float32 | None
    step: float
    zero: int


@dataclass(frozen=True, slots=True)
class Linear:
    """An operator that qualifies: activation @ matrix (+ bias)."""

    activation: str
    weight: str  # prefix of all that derives from the matrix, shared by nodes that share it
    matrix: Float32  # [K, N]
    bias: str  # "" for none
    product: str  # name of the value before the bias
    output: str  # and of that with it


@dataclass(slots=True)
class Graph:
    """The graph being written; adding what is there already changes nothing."""

    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    values: set[str] = field(default_factory=set)
    errors: dict[str, float] = field(default_factory=dict)  # by `Linear.weight`

    def constant(self, name: str, value: npt.ArrayLike, dtype: npt.DTypeLike) -> str:
        """Have a constant of that name; return the name."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def add(
        self, op_type: str, inputs: list[str], *outputs: str, domain: str = "", **attributes: Any
    ) -> str:
        """Have an operator that makes `outputs`; return the first."""
        if outputs[0] not in self.values:
            self.values.update(outputs)
            self.nodes.append(
                helper.make_node(op_type, inputs, outputs, outputs[0], domain=domain, **attributes)
            )
        return outputs[0]


Emit = Callable[[Graph, Linear], str]
"""Writes a layer, and returns the name of the scheme."""


def rewrite(model: onnx.ModelProto, emit: Emit, harms: Mapping[str, float] | None = None) -> Made:
    """Return a copy of `model` with what qualifies written by `emit`, and a line per operator.

    Large tables of embeddings become int8 too, with a scale per row: what is read of them is few
    rows, so that costs no time, and they are half of what a small encoder weighs.

    `harms`: what int8 of each matrix does to the outputs, see `sensitivity.harms`, for the lines.
    """
    graph = Graph(next((o.version for o in model.opset_import if o.domain in _ONNX), 0))
    if graph.opset < _OPSET:
        raise CompileError(f"this form needs opset {_OPSET} or later, the model has {graph.opset}")
    known, report = constants(model), []
    harms = harms or {}
    every = sum(harms.values()) or 1.0
    for node in model.graph.node:
        if (table := _table(node, known)) is not None:
            report.append(_int8_table(graph, node, table))
            continue
        if not _is_linear(node):
            graph.nodes.append(node)
            continue
        layer = _linear(node, known)
        if isinstance(layer, str):
            graph.nodes.append(node)
            report.append(Quantized(node=node.name, op_type=node.op_type, why=layer))
            continue
        scheme = emit(graph, layer)
        if layer.bias:
            graph.add("Add", [layer.product, layer.bias], node.output[0])
        report.append(
            Quantized(
                node=node.name,
                op_type=node.op_type,
                bits={FLOAT32: 32, INT4: 4}.get(scheme, BITS),
                scheme=scheme,
                weight_elements=layer.matrix.size,
                error=graph.errors[layer.weight],
                harm=harms.get(layer.weight, 0.0) / every,
            )
        )
    if not any(line.bits <= BITS and line.op_type != "Gather" for line in report):
        others = sum(line.op_type != "Gather" for line in report)
        raise NothingToQuantize(f"no MatMul or Gemm of {others} has a constant float32 matrix")
    return assemble(model, graph), report


def _table(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]
) -> onnx.TensorProto | None:
    """Return the table that an operator reads rows of, if it is a large one of float32."""
    if node.op_type != "Gather" or node.domain not in _ONNX:
        return None
    table = constants.get(node.input[0])
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    if table is None or axis or len(table.dims) != 2 or math.prod(table.dims) < _TABLE_ELEMENTS:
        return None
    inline = table.data_location != onnx.TensorProto.EXTERNAL
    return table if inline and table.data_type == onnx.TensorProto.FLOAT else None


def _int8_table(graph: Graph, node: onnx.NodeProto, tensor: onnx.TensorProto) -> Quantized:
    """Read rows as int8, and give them their scales after."""
    name, ids, y = tensor.name, node.input[1], node.output[0]
    table = numpy_helper.to_array(tensor)
    if not (np.abs(table) < _MOST).all():
        graph.nodes.append(node)
        why = "the table is not finite, or nearly so"
        return Quantized(node=node.name, op_type="Gather", why=why)
    scale = scale_of(np.abs(table).max(axis=1, keepdims=True), 127)
    integers = np.rint(table / scale)
    # By names of their own: a product of the same table has scales per column.
    whole = graph.constant(f"{name}:rows:int8", integers, np.int8)
    scales = graph.constant(f"{name}:rows:scale", scale, np.float32)
    rows = graph.add("Gather", [whole, ids], f"{y}:int8")
    rows = graph.add("Cast", [rows], f"{y}:float", to=onnx.TensorProto.FLOAT)
    graph.add("Mul", [rows, graph.add("Gather", [scales, ids], f"{y}:rescale")], y)
    return Quantized(
        node=node.name,
        op_type="Gather",
        bits=BITS,
        scheme="int8_rows",
        weight_elements=table.size,
        error=relative_error(table, integers * scale),
    )


def _is_linear(node: onnx.NodeProto) -> bool:
    return node.domain in _ONNX and node.op_type in ("MatMul", "Gemm")


def inferred(model: onnx.ModelProto, *, data_prop: bool = False) -> onnx.ModelProto:
    """Return a model with the shapes and types that can be told, and no large weights in it.

    All of them may be more than protobuf can write, and none tells a shape. `data_prop`: what is
    computed of shapes is followed, too.
    """
    opsets, functions = model.opset_import, model.functions
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=opsets, functions=functions)
    light.graph.name = model.graph.name
    for part in ("input", "output", "value_info", "node"):
        getattr(light.graph, part).extend(getattr(model.graph, part))
    for tensor in model.graph.initializer:
        bare = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        small = math.prod(tensor.dims) <= _SMALL_ELEMENTS
        light.graph.initializer.append(tensor if small else bare)
    return onnx.shape_inference.infer_shapes(light, data_prop=data_prop)


def constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Return what no caller can override, by name."""
    overridable = {i.name for i in model.graph.input}
    known = {t.name: t for t in model.graph.initializer if t.name not in overridable}
    return known | {
        n.output[0]: n.attribute[0].t
        for n in model.graph.node
        if n.op_type == "Constant" and n.attribute[0].name == "value"
    }


def _linear(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> Linear | str:
    """Return `node` as a linear layer, or why it is none."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    scaled = attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0
    if scaled or attributes.get("transA", 0):
        return "transposed activation, or alpha or beta other than 1"
    weight = constants.get(node.input[1])
    if weight is None:
        return "the second operand is not constant"
    if weight.data_type != onnx.TensorProto.FLOAT or len(weight.dims) != 2:
        kind = onnx.TensorProto.DataType.Name(weight.data_type).lower()
        return f"the weight is {kind} of rank {len(weight.dims)}"
    if weight.data_location == onnx.TensorProto.EXTERNAL:
        return "the weight is external data"
    transposed = attributes.get("transB", 0)
    matrix = numpy_helper.to_array(weight)
    if not (matrix.size and np.isfinite(matrix).all()):
        return "the weight is empty or not finite"
    bias = node.input[2] if len(node.input) > 2 else ""
    return Linear(
        activation=node.input[0],
        weight=f"{node.input[1]}:transposed" if transposed else node.input[1],
        matrix=matrix.T if transposed else matrix,
        bias=bias,
        product=f"{node.output[0]}:product" if bias else node.output[0],
        output=node.output[0],
    )


def int8_per_row(graph: Graph, layer: Linear, factor: Float32 | None = None) -> str:
    """Write a layer with int8 weights, a scale per column, and one activation scale per row.

    A row is what the last axis spans. Its scale, max |x| / 127, comes from that row alone, so its
    product has the same bits alone and in any batch. A row whose largest magnitude is below 1e-20
    counts as zero. On CPUs without VNNI or AMX weights have 7 bits, see `SATURATING`.

    Args:
        graph: Where it is written.
        layer: What is written.
        factor: float32 [K], by which the activation's columns are divided first.

    Returns:
        The scheme's name.

    Source: row-wise scales as in Dettmers et al. 2022, section 2.1 (arXiv:2208.07339), without the
    outlier path; ONNX QuantizeLinear, opset 13.
    """
    x, y = _divided(graph, layer.activation, factor), layer.product
    weight, scale = _int8_weight(graph, layer, factor)
    step = graph.constant("int8:step", 1 / 127, np.float32)
    middle = graph.constant("uint8:middle", 128, np.uint8)  # onnxruntime is slow on int8 x int8
    # opset 18 moved the axes of ReduceMax from an attribute to an input
    axes = [graph.constant("axes:last", [-1], np.int64)] if graph.opset >= 18 else []
    attributes: dict[str, Any] = {} if axes else {"axes": [-1]}
    peak = graph.add("Abs", [x], f"{x}:magnitude")
    peak = graph.add("ReduceMax", [peak, *axes], f"{x}:largest", keepdims=1, **attributes)
    peak = graph.add("Max", [peak, graph.constant("float32:tiny", _TINY, np.float32)], f"{x}:peak")
    unit = graph.add("Mul", [x, graph.add("Reciprocal", [peak], f"{x}:inverse")], f"{x}:unit")
    integers = graph.add("QuantizeLinear", [unit, step, middle], f"{x}:row_uint8")
    product = graph.add(
        "MatMulIntegerToFloat",
        [integers, weight, step, scale, middle],
        f"{y}:unscaled",
        domain="com.microsoft",
    )
    graph.add("Mul", [product, peak], y)
    return "dynamic_int8_per_row"


def int8_static(graph: Graph, layer: Linear, smoothing: Smoothing) -> str:
    """Write a layer with a scale for its activation that is known before; return the name.

    What lies beyond the range that was seen counts as its end.
    """
    x = _divided(graph, layer.activation, smoothing.factor)
    weight, scale = _int8_weight(graph, layer, smoothing.factor)
    step = graph.constant(f"{x}:static:step", smoothing.step, np.float32)
    zero = graph.constant(f"{x}:static:zero", smoothing.zero, np.uint8)
    integers = graph.add("QuantizeLinear", [x, step, zero], f"{x}:static:uint8")
    inputs = [integers, weight, step, scale, zero]
    graph.add("MatMulIntegerToFloat", inputs, layer.product, domain="com.microsoft")
    return "static_int8"


def int8_qdq(graph: Graph, layer: Linear, smoothing: Smoothing) -> str:
    """Write a layer as `int8_static` does, but for engines that fuse the standard's operators.

    Source: ONNX QuantizeLinear, DequantizeLinear and MatMul, opset 13.
    """
    x = _divided(graph, layer.activation, smoothing.factor)
    weight, scale = _int8_weight(graph, layer, smoothing.factor)
    about = about_zero(smoothing.step, smoothing.zero)
    step = smoothing.step if about is None else about
    zero = np.uint8(smoothing.zero) if about is None else np.int8(0)
    scales = [
        graph.constant(f"{x}:qdq:step", step, np.float32),
        graph.constant(f"{x}:qdq:zero", zero, zero.dtype),
    ]
    rounded = graph.add("QuantizeLinear", [x, *scales], f"{x}:qdq:integers")
    rounded = graph.add("DequantizeLinear", [rounded, *scales], f"{x}:qdq:rounded")
    restored = graph.add("DequantizeLinear", [weight, scale], f"{weight}:restored", axis=1)
    graph.add("MatMul", [rounded, restored], layer.product)
    return "static_int8"


def about_zero(step: float, zero: int) -> float | None:
    """Return the step of int8 without a zero point for the range of uint8 with one, if there is.

    Engines compute faster without. A range that lies mostly on one side of 0 would lose too many
    steps: GELU's outputs do.
    """
    larger = max(zero, 255 - zero) / 127
    return step * larger if larger <= _LARGER else None


def _divided(graph: Graph, x: str, factor: Float32 | None) -> str:
    if factor is None:
        return x
    return graph.add("Mul", [x, graph.constant(f"{x}:factor", 1 / factor, np.float32)], f"{x}:even")


def _weights_int8(graph: Graph, layer: Linear) -> str:
    restored = f"{layer.weight}:restored"
    graph.add("DequantizeLinear", [*_int8_weight(graph, layer)], restored, axis=1)
    graph.add("MatMul", [layer.activation, restored], layer.product)
    return "weights_int8"


def _int8_weight(graph: Graph, layer: Linear, factor: Float32 | None = None) -> tuple[str, str]:
    """Add the matrix as int8 [K, N] with a scale per column; return the names of both.

    `factor`: float32 [K], by which its rows are multiplied.
    """
    name = layer.weight if factor is None else f"{layer.weight}:{layer.activation}"
    if f"{name}:int8" not in graph.initializers:
        unit = np.float32(1) if factor is None else factor[:, None]
        integers, scale = int8_weight(layer.matrix * unit)
        graph.errors[layer.weight] = relative_error(layer.matrix, integers * scale / unit)
        graph.constant(f"{name}:int8", integers, np.int8)
        graph.constant(f"{name}:scale", scale, np.float32)
    return f"{name}:int8", f"{name}:scale"


def int8_weight(matrix: Float32) -> tuple[Float32, Float32]:
    """Return a matrix [K, N] as integers, and the scale of each column [N]."""
    scale = scale_of(np.abs(matrix).max(axis=0), 64 if isa_class() in SATURATING else 127)
    return np.rint(matrix / scale), scale


def scale_of(peak: Float32, levels: int) -> Float32:
    """Return peak / levels, and 1 where that is zero or subnormal: it could not divide."""
    scale = peak / np.float32(levels)
    return np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)


def relative_error(weight: Float32, restored: Float32) -> float:
    """Return the L2 norm of the difference over that of the weight, 0 where that is 0."""
    whole, apart, rows = 0.0, 0.0, max(1, _BLOCK * len(weight) // max(1, weight.size))
    for start in range(0, len(weight), rows):  # a copy of all would take twice its memory
        own = weight[start : start + rows].astype(np.float64)
        whole += float(np.vdot(own, own))
        own -= restored[start : start + rows]
        apart += float(np.vdot(own, own))
    return math.sqrt(apart / whole) if whole else 0.0


def assemble(model: onnx.ModelProto, graph: Graph) -> onnx.ModelProto:
    """Return `model` around the nodes of `graph`, without the weights that nothing reads."""
    used = {o.name for o in model.graph.output}.union(*map(read, graph.nodes))
    # built field by field: copying the model first would copy the weights that are dropped here
    result = onnx.ModelProto(
        ir_version=model.ir_version,
        opset_import=[o for o in model.opset_import if o.domain != "com.microsoft"],
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        functions=model.functions,
        metadata_props=model.metadata_props,
    )
    result.opset_import.add(domain="com.microsoft", version=1)
    result.graph.name = model.graph.name
    result.graph.input.extend(model.graph.input)
    result.graph.output.extend(model.graph.output)
    result.graph.value_info.extend(model.graph.value_info)
    result.graph.sparse_initializer.extend(model.graph.sparse_initializer)
    result.graph.node.extend(
        n for n in graph.nodes if n.op_type != "Constant" or n.output[0] in used
    )
    initializers = {t.name: t for t in model.graph.initializer} | graph.initializers
    result.graph.initializer.extend(t for name, t in initializers.items() if name in used)
    return result


def read(node: onnx.NodeProto) -> Iterator[str]:
    """Yield what `node` reads, the bodies of If, Loop and Scan included."""
    yield from node.input
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            yield from (o.name for o in body.output)
            for inner in body.node:
                yield from read(inner)
