"""Static quantisation of networks with convolutions, by onnxruntime's own quantiser.

Activations get a scale per tensor that is found before, on a sample. A convolution's output has few
outliers and its weights many elements, so that costs little closeness and no time when it runs; of
transformers neither is true, and they have forms of their own. So have plain layers: static scales
are a little faster there, but make a number of an input that is none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from google.protobuf.message import EncodeError
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from lrai_core.compiler.search import Quantized, Sample
from lrai_core.engine.engine import isa_class
from lrai_core.engine.onnxruntime import REFUSALS, reason
from lrai_core.errors import CompileError
from lrai_core.protocol import Array
from lrai_engines.quantize import SATURATING, NothingToQuantize, relative_error

_MOST: Final = 128  # rows
_WEIGHTED: Final = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_FAULTS: Final = (*REFUSALS, AssertionError, AttributeError, EncodeError, IndexError, KeyError)


def static_int8(
    model: onnx.ModelProto, sample: Sample, *, keep_ends: bool = False
) -> tuple[onnx.ModelProto, list[Quantized]]:
    """Return `model` with QuantizeLinear and DequantizeLinear around what onnxruntime can quantise.

    Weights are int8 with a scale per output channel, activations uint8 from the least to the
    largest value seen. On CPUs without VNNI or AMX weights have 7 bits.

    Args:
        model: Standard operators, weights inline, opset 13 or later. Not modified.
        sample: Rows to see the activations of, 128 at most; nothing is judged on them.
        keep_ends: Leave the first and the last operator with weights in float32.

    Raises:
        NothingToQuantize: There is no convolution, or all that there is was left out.
        CompileError: The quantiser cannot do it, or the model does not run on the sample.

    Source: onnxruntime 1.32 `quantization/quantize.py`, QDQ format.
    """
    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    marked.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    for index, node in enumerate(marked.graph.node):
        node.name = node.name or f"lrai:{index}"  # the quantiser knows operators by their names
    weighted = [node for node in marked.graph.node if node.op_type in _WEIGHTED]
    if not any(node.op_type.startswith("Conv") for node in weighted):
        raise NothingToQuantize("no convolution: static scales are for networks that have some")
    rows = [row for row in sample.rows if all(map(_finite, row))][:_MOST]
    if not rows:
        raise CompileError("no row to see activations of: none is there, or none is finite")
    ends = [weighted[0].name, weighted[-1].name] if keep_ends else []
    with tempfile.TemporaryDirectory(prefix="lrai-static-") as folder:
        target = Path(folder, "static.onnx")
        try:
            quantize_static(
                marked,
                target,
                _Rows([value.name for value in model.graph.input], rows),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=isa_class() in SATURATING,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=ends,
            )
            quantised = onnx.load(target)
        except _FAULTS as error:
            raise CompileError(f"onnxruntime cannot quantise the model: {reason(error)}") from None
    report = list(_report(model, quantised, weighted, ends))
    if not any(line.weight_elements for line in report):
        raise NothingToQuantize("no operator is left that could be quantised")
    return quantised, report


class _Rows(CalibrationDataReader):  # type: ignore[misc] # without types
    """The sample, as the quantiser asks for it: an input by its name, row after row."""

    def __init__(self, names: Sequence[str], rows: Sequence[list[Array]]) -> None:
        self._feeds = (dict(zip(names, row, strict=True)) for row in rows)

    def get_next(self) -> dict[str, Array] | None:
        """Return the next row, None where there is none."""
        return next(self._feeds, None)


def _finite(array: Array) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _report(
    model: onnx.ModelProto,
    quantised: onnx.ModelProto,
    weighted: Sequence[onnx.NodeProto],
    ends: Sequence[str],
) -> Iterator[Quantized]:
    """Yield what was done to each operator with weights."""
    before, after = ({t.name: t for t in one.graph.initializer} for one in (model, quantised))
    nodes = {node.name: node for node in quantised.graph.node}
    restore = {n.output[0]: n for n in nodes.values() if n.op_type == "DequantizeLinear"}
    for node in weighted:
        name, kind = node.name, node.op_type
        found = restore.get(nodes[name].input[1]) if name in nodes else None
        if found is None or found.input[0] not in after or node.input[1] not in before:
            why = "first or last, kept closer" if name in ends else "the quantiser left it alone"
            yield Quantized(node=name, op_type=kind, why=why)
            continue
        weight = numpy_helper.to_array(before[node.input[1]])
        yield Quantized(
            node=name,
            op_type=kind,
            bits=8,
            scheme="static_int8",
            weight_elements=weight.size,
            error=relative_error(weight, _restored(found, after)),
        )


def _restored(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> Any:
    """Return the float32 weight that a DequantizeLinear gives."""
    integers, scale, zero = (numpy_helper.to_array(constants[name]) for name in node.input[:3])
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    shape = [1] * integers.ndim
    if scale.ndim:
        shape[axis] = scale.size
    return (integers.astype(np.float32) - zero.reshape(shape)) * scale.reshape(shape)
