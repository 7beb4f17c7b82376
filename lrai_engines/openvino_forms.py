"""The forms that OpenVINO runs.

In int8 with groups, weights have a scale per column, and while it runs activations get one per row
and group of columns: closer to float32 than a scale per tensor. In static and in smoothed int8
those of activations are found before, and without a zero point where that is as good. What is left
in float32 of these is computed in bf16 where the CPU has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, cast

import msgspec
import onnx
import openvino as ov
from google.protobuf.message import EncodeError
from onnx import numpy_helper
from onnx.shape_inference import InferenceError

from lrai_core.compiler.search import Built, Material, Reject, Sample
from lrai_core.errors import CompileError
from lrai_core.protocol import TensorSpec
from lrai_engines.forms import Build, int8, joint, standard
from lrai_engines.kept import Kept
from lrai_engines.openvino import FLOAT32, NOTES, REFUSALS, Notes, OpenVino, Shapes, reason
from lrai_engines.quantize import Made, NothingToQuantize, constants, inferred, read, weights_int8
from lrai_engines.smooth import QDQ
from lrai_engines.static import signed
from lrai_engines.undefined import goes_undefined, undefined_stays

_GROUP: Final = 128  # columns with one scale
_SAME: Final = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")  # the values are
_INDEXED: Final = ("Gather", "GatherND", "ScatterElements", "ScatterND")
# Of onnxruntime's own operators those that read tables by what they are given.
_INDEXING: Final = (
    "EmbedLayerNormalization",
    "GatherBlockQuantized",
    "GroupQueryAttention",
    "RotaryEmbedding",
)
_WIDE: Final = {  # of which it takes 32 bits
    onnx.TensorProto.INT64: (-(1 << 31), (1 << 31) - 1),
    onnx.TensorProto.UINT64: (0, (1 << 31) - 1),
    onnx.TensorProto.UINT32: (0, (1 << 31) - 1),
}
_INTEGERS: Final = {
    getattr(onnx.TensorProto, f"{u}INT{n}") for u in ("", "U") for n in (8, 16, 32, 64)
}
_FLOATS: Final = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE}
# What it computes of integers has 32 bits, or those of float32, or stays at the end of 8.
_COMPUTING: Final = (
    "Abs", "Add", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CumSum",
    "Div", "MatMul", "Mod", "Mul", "Neg", "Pow", "ReduceL1", "ReduceMean", "ReduceProd",
    "ReduceSum", "ReduceSumSquare", "Sub",
)  # fmt: skip
# What is right of integers that float32 has.
_COMPARING: Final = (
    "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "ReduceMax", "ReduceMin",
)  # fmt: skip
_CHOOSING: Final = ("Concat", "Max", "Min", "Where")  # one of which is an answer, perhaps
_SMALL: Final = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)  # at whose ends it stays
_ROUNDED: Final = (onnx.TensorProto.BOOL, onnx.TensorProto.DOUBLE)  # to which it goes by float32
_EXACT: Final = 1 << 24
_MOST: Final = (1 << 31) - 1
# Per cent of what int8 does to the outputs that is undone: of what is static, and of smoothed.
_KEPT: Final = (0, 50, 80)
_LESS: Final = (0, 50, 75, 85)
_STATIC, _SMOOTH = "openvino-int8-static", "openvino-int8-smooth"
_BF16: Final = {"INFERENCE_PRECISION_HINT": "bf16"}


@dataclass(frozen=True, slots=True)
class _Form:
    """How a form is made, and what the engine is told when it is loaded."""

    precision: str
    settings: dict[str, str]
    transform: Build | None = None


_FORMS: Final = {"openvino-fp32": _Form("fp32", {}), "openvino-bf16": _Form("bf16", _BF16)}


class OpenVinoForms:
    """Builds them; see `Builder`."""

    steps = len(_FORMS) + len(_KEPT) + len(_LESS) + 2

    def __init__(self, engine: OpenVino) -> None:
        """Build for an engine."""
        self.engine = engine

    def build(self, material: Material, reject: Reject) -> Iterator[Built]:
        """Yield each form that this CPU runs; without a sample there is none to be judged."""
        if material.sample is None:
            return
        try:
            model = standard(material)
            bounds = _bounds(model, _check_values(model))
        except (CompileError, EncodeError, InferenceError, ValueError) as error:
            reject(self.engine.name, str(error))
            return
        able = self.engine.able
        sides = material.sample.outputs, material.sample.inputs
        rows = {spec.batch_axis for spec in material.sample.inputs} == {0}
        shapes = _shapes(material.sample, reject)
        forms = _FORMS | _int8(material, material.sample, _BF16 if "BF16" in able else {})
        try:
            undefined = goes_undefined(model, material.sample)
        except CompileError as error:
            reject(f"{self.engine.name}-int8", str(error))
            undefined = frozenset()
            forms = {name: form for name, form in forms.items() if form.transform is None}

        def make(name: str, home: Path, reject: Reject) -> Iterator[Built]:
            form, graph = forms[name], home / "model.xml"
            try:
                proto, operators = form.transform(model) if form.transform else (model, [])
                if undefined and form.transform and _STATIC not in name:  # which looks for itself
                    proto = undefined_stays(proto, *sides, undefined)
                network = self.engine.core.read_model(proto.SerializeToString(), b"")
                notes = Notes(FLOAT32 | form.settings, bounds, rows, shapes)
                network.set_rt_info(msgspec.json.encode(notes).decode(), NOTES)
                ov.save_model(network, graph, compress_to_fp16=False)
                self.engine.core.read_model(graph)  # a full disk may have cut it short
            except NothingToQuantize:
                raise
            except (CompileError, MemoryError, OSError) as error:  # a temporary folder may be full
                reject(name, str(error) or "memory lacks")
            except (*REFUSALS, EncodeError) as error:
                reject(name, f"openvino cannot read the model: {reason(error)}")
            else:
                size = sum(file.stat().st_size for file in home.iterdir())
                yield Built(name, form.precision, graph, size, operators)

        kept = Kept(material, self.engine)
        for name, form in forms.items():
            if form.precision.upper() in able:
                yield from kept.forms(name, partial(make, name), reject)
            else:
                reject(name, f"this CPU has no {form.precision}")


def _int8(material: Material, sample: Sample, rest: dict[str, str]) -> dict[str, _Form]:
    """Return those in int8; `rest`: how what stays float32 of those whose scales are known runs."""
    smooth, static = int8(material, sample)
    both = partial(joint, smooth, static, QDQ)
    groups = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": str(_GROUP)}

    def convolved(
        model: onnx.ModelProto, share: float, build: Callable[..., Made] = static.build
    ) -> Made:
        clips = (node for node in model.graph.node if node.op_type == "Clip")
        made, operators = build(model, share=share)
        return signed(made, [node.output[0] for node in clips]), operators

    def grouped(model: onnx.ModelProto) -> Made:
        return weights_int8(model, smooth.known(model))

    first = {f"openvino-int8-{_GROUP}": _Form("int8", groups, grouped)}
    known = {
        name + f"-{kept}" * bool(kept): _Form("int8", rest, partial(build, share=kept / 100))
        for name, build, shares in (
            (_STATIC, convolved, _KEPT),
            (_SMOOTH, partial(smooth.build, scheme=QDQ), _LESS),
        )
        for kept in shares
    }
    known[f"{_SMOOTH}-static"] = _Form("int8", rest, partial(convolved, share=0, build=both))
    return first | known


def _shapes(sample: Sample, reject: Reject) -> tuple[Shapes, ...]:
    """Return the shapes of all inputs in the calls that come most, if these tell all of them."""

    def shape(spec: TensorSpec, rows: int, length: int) -> tuple[int | str, ...]:
        told = {spec.batch_axis: rows, spec.length_axis: length}
        return tuple(told.get(axis, extent) for axis, extent in enumerate(spec.shape))

    found = tuple(tuple(shape(spec, *call) for spec in sample.inputs) for call in sample.calls)
    if any(isinstance(extent, str) for one in found for own in one for extent in own):
        reject("calls", "openvino is compiled for none: an input has one more free dimension")
        return ()
    return cast("tuple[Shapes, ...]", found)


def _bounds(model: onnx.ModelProto, most: int = _MOST) -> dict[str, tuple[int, int]]:
    """Return what every input may hold that is wide, or goes into a table as an index, as it is.

    Args:
        model: Its inputs have the names that notes have.
        most: What `_check_values` returns.

    Raises:
        CompileError: An index is computed of what callers send, or of how much: beyond its table
            the engine reads rows of zeros, or memory that is not the table's.
    """
    inputs = {value.name: value.name for value in model.graph.input}
    tables = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    wide = _WIDE if most == _MOST else _WIDE | {onnx.TensorProto.INT32: (-most, most)}
    found = {
        n: (max(wide[k][0], ~most), min(wide[k][1], most)) for n, k in kinds.items() if k in wide
    }
    told, counted = set(inputs), set[str]()  # what values, and what their number, depends on
    for node in model.graph.node:
        if node.op_type in _SAME and node.input[0] in inputs:
            inputs[node.output[0]] = inputs[node.input[0]]
        elif node.op_type == "Gather" and node.input[0] in tables and node.input[1] in inputs:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            extent, name = tables[node.input[0]][axis], inputs[node.input[1]]
            low, high = found.get(name, (-extent, extent - 1))
            found[name] = max(low, -extent), min(high, extent - 1)
        elif node.op_type in _INDEXING or (
            node.op_type in _INDEXED
            and (node.input[1] in told or (node.input[0] in tables and node.input[1] in counted))
        ):
            raise CompileError(f"{node.op_type} by an index that the engine does not check")
        inner = list(_inner(node))
        if any(one.op_type in (*_INDEXED, *_INDEXING) for one in inner):
            raise CompileError(
                f"an index inside of {node.op_type}, which the engine does not check"
            )
        counts = node.op_type in ("Shape", "Size")  # what was sent, and not what it says
        if counts or not counted.isdisjoint(node.input):
            counted.update(node.output)
        if node.op_type == "Range" or inner or not (counts or told.isdisjoint(node.input)):
            told.update(node.output)
    return found


def _check_values(model: onnx.ModelProto) -> int:
    """Return the largest integer that may be sent, so that none is rounded.

    Raises:
        CompileError: It computes with integers that callers send, or makes some of numbers, or
            reads a place that they may not have: the engine rounds, or cuts, those, and reads
            zeros there.
        ValueError: Or `EncodeError`, or `InferenceError`: its types cannot be told.
    """
    known, full = constants(model), inferred(model, data_prop=True).graph
    values = (*full.input, *full.output, *full.value_info)
    types = {value.name: value.type.tensor_type for value in values}
    kinds = {name: one.elem_type for name, one in types.items()}
    sent = {value.name for value in model.graph.input}  # what depends on it, but for its extents
    most = _MOST
    for node in model.graph.node:
        if node.op_type in ("Shape", "Size") or sent.isdisjoint(read(node)):
            continue
        sent.update(node.output)
        given = {kinds.get(name, 0) for name in node.input if name in sent}
        to = next((one.i for one in node.attribute if one.name == "to"), 0)
        whole = not given.isdisjoint(_INTEGERS)
        if node.op_type in _COMPUTING and whole:
            raise CompileError(f"{node.op_type} of integers, which the engine does in 32 bits")
        if node.op_type == "Cast" and given <= _FLOATS and (to in _WIDE or to in _SMALL):
            raise CompileError("Cast of numbers to integers that the engine cuts otherwise")
        if node.op_type in _CHOOSING and any(_is_wide(known.get(name)) for name in node.input):
            raise CompileError(f"{node.op_type} of an integer that has more than 32 bits")
        if whole and (node.op_type in _COMPARING or (node.op_type == "Cast" and to in _ROUNDED)):
            most = _EXACT
        if node.op_type == "Gather" and node.input[0] in sent and (at := known.get(node.input[1])):
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            dims = types[node.input[0]].shape.dim if node.input[0] in types else []
            extent = max(1, dims[axis].dim_value if dims else 0)  # the first is there, or nothing
            if not all(-extent <= place < extent for place in numpy_helper.to_array(at).flat):
                raise CompileError("Gather of a place that what is sent may not have")
    return most


def _is_wide(constant: onnx.TensorProto | None) -> bool:
    if constant is None or constant.data_type not in _WIDE:
        return False
    values = numpy_helper.to_array(constant)
    return bool(values.size and not ~_MOST <= int(values.min()) <= int(values.max()) <= _MOST)


def _inner(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Yield what its bodies hold, and what theirs do."""
    for attribute in node.attribute:
        for one in attribute.g.node:
            yield one
            yield from _inner(one)
