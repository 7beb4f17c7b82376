"""Static quantisation of convolutions and plain layers, by onnxruntime's own quantiser.

Activations get a scale per tensor that is found before, on a sample. A convolution's output has few
outliers and its weights many elements, so that costs little closeness and no time when it runs; of
transformers neither is true, and they have forms of their own: beside attention convolutions alone
are quantised here.
"""

from __future__ import annotations

import inspect
import itertools
import math
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from google.protobuf.message import EncodeError
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from lrai_core.compiler.search import Quantized, Sample
from lrai_core.engine.engine import isa_class
from lrai_core.engine.onnxruntime import reason
from lrai_core.errors import ArtifactError, CompileError, EngineError
from lrai_core.protocol import Array
from lrai_engines.fusion import curves
from lrai_engines.mixed import worst
from lrai_engines.quantize import (
    SATURATING,
    Made,
    NothingToQuantize,
    about_zero,
    constants,
    read,
    relative_error,
)  # fmt: skip
from lrai_engines.sensitivity import numbers
from lrai_engines.static_harms import ABSORBED, WEIGHTED, harms, late, restored, work
from lrai_engines.undefined import FAULTS, Pairs, goes_undefined, undefined_stays

_MOST: Final = 128  # rows
_LONGEST: Final = 60.0  # seconds for them: four times what ResNet-50 takes for all on two cores
# What may come behind the last weights without a value of its own: it is part of their operator.
_JOINED: Final = ("Relu", "Clip", "Add")
_ROUNDING: Final = ("QuantizeLinear", "DequantizeLinear")
_PRODUCTS: Final = ("MatMul", "Gemm")
_TURNED: Final = ":turned"  # what a weight is called that is read along its other axis, too
_FEW: Final = 4  # channels of a group
_LITTLE: Final = 1e-9  # what is in float32 in any case costs no work more
_SLOW: Final = "int8 is no faster here"
_LEAST_WORK: Final = 0.05  # of convolutions beside attention, which cuts images up in a transformer
_NORMS: Final = ("LayerNormalization", "InstanceNormalization")  # whose weights are few
_REMEMBERS: Final = "calibration_cache_path" in inspect.signature(quantize_static).parameters
_UNTOLD: Final = (ArtifactError, EngineError, EncodeError, MemoryError, OSError, ValueError)


class StaticForms:
    """Static int8 of one model, with precision where it is needed: ranges and harms are found once.

    Args:
        sample: Rows to see the activations of; nothing is judged on them.
        threads: Of the engine that finds what int8 does to the outputs.

    Attributes:
        harms: What int8 of each operator does to them, by its name; none until it is known.
    """

    def __init__(self, sample: Sample, threads: int) -> None:
        self._sample, self._threads = sample, threads
        self._ranges = bytearray()
        self.harms: dict[str, float] = {}
        self._work: dict[str, float] = {}
        self._tried: dict[tuple[frozenset[str], bool], float] = {}
        self._guard: Pairs | None = None
        self._failed = ""

    def build(
        self,
        model: onnx.ModelProto,
        *,
        share: float,
        guarded: bool = True,
        columns: bool = True,
        inner: bool = False,
    ) -> Made:
        """Return `model` in int8, but for the operators that do this share of the harm.

        Of those that do as much for their work the fewest stay in float32.

        Args:
            model: See `static_int8`.
            share: 0 or more, below 1.
            guarded: Rows that hold what is no number are answered as float32 answers them; else
                that is left to the caller.
            columns: See `static_int8`.
            inner: The first convolutions stay in float32 in any case, see `_narrow`.

        Raises:
            NothingToQuantize: See `static_int8`; or the same as before would be made.
            CompileError: It cannot be done, or it cannot be told what int8 does to the outputs.
        """
        if self._guard is None:
            self._guard = goes_undefined(model, self._sample)
        make = partial(
            static_int8, model, self._sample, ranges=self._ranges, columns=columns,
            guard=self._guard if guarded else frozenset(),
        )  # fmt: skip
        first = _narrow(model) if inner else set[str]()
        keep = set(first)
        if share or inner:
            self._find(model, lambda: make()[0])
            if share and self._failed:
                raise CompileError(self._failed)
            keep |= worst(self.harms, self._work | dict.fromkeys(first, _LITTLE), share)
            key = frozenset(keep), inner
            if not keep or self._tried.setdefault(key, share) != share:
                raise NothingToQuantize("it would be a form that was made before")
        made, report = make(keep=keep)
        self._find(model, lambda: made)  # where all is in int8; else it is known by now
        every = sum(self.harms.values()) or 1.0
        told = {name: self.harms.get(name, 0.0) / every for name in (one.node for one in report)}
        why = dict.fromkeys(first, _SLOW)
        return made, [
            replace(one, harm=told[one.node], why=why.get(one.node, one.why)) for one in report
        ]

    def _find(self, model: onnx.ModelProto, whole: Callable[[], onnx.ModelProto]) -> None:
        """Find what int8 of each operator does, by the model in int8, or why it cannot be told."""
        if self.harms or self._failed:
            return
        named, quantised = _named(model), whole()
        try:
            self.harms = harms(named, quantised, self._sample, self._threads)
            self._work = work(named)
        except _UNTOLD as error:
            self._failed = f"what each operator does cannot be told: {error}"


def static_int8(
    model: onnx.ModelProto,
    sample: Sample,
    *,
    keep: Collection[str] = (),
    ranges: bytearray | None = None,
    guard: Pairs | None = None,
    columns: bool = True,
) -> Made:
    """Return `model` with QuantizeLinear and DequantizeLinear around what onnxruntime can quantise.

    Weights are int8 with a scale per output channel, activations uint8 from the least to the
    largest value seen; what the last products give is float32. Where activations are multiplied
    with one another convolutions alone are int8. On CPUs without VNNI or AMX weights have 7 bits.

    Args:
        model: Standard operators, weights inline, opset 13 or later. Not modified. Of what is
            quantised already, or has no weights, there is nothing to quantise.
        sample: Rows to see the activations of, 128 at most, or as many as a minute allows; nothing
            is judged on them.
        keep: Names of operators with weights that stay in float32, and with them what has no
            weights and computes with what they give.
        ranges: Of the activations, in onnxruntime's words, if they were found before; else they
            are written there.
        guard: Integers have no value for what is none. Where float32's answer is NaN then, which
            these say (`goes_undefined`; by default everywhere), to a row that holds NaN or infinity
            it is NaN here: the row times noughts is added to it.
        columns: Weights have a scale per output channel; else one for all, which kernels of small
            products are faster with (a third of 10 us, at two layers of 512): they make what they
            multiply the integers of all columns by in each call.

    Raises:
        NothingToQuantize: It multiplies activations with one another, as transformers do, and has
            hardly a convolution, or all that there is was left out. Without `columns`: it has
            convolutions, beside which a scale per channel takes no time.
        CompileError: The quantiser cannot do it, or the model does not run on the sample.

    Source: onnxruntime 1.32 `quantization/quantize.py`, QDQ format.
    """
    if _is_quantised(model) or not any(n.op_type in WEIGHTED for n in model.graph.node):
        raise NothingToQuantize("it is quantised already, or has no operator that could be")
    marked = _named(model)
    marked.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    weighted = [node for node in marked.graph.node if node.op_type in WEIGHTED]
    if attends(model):
        products, by_node = {n.name for n in weighted if n.op_type in _PRODUCTS}, work(marked)
        convolved = sum(by_node[n.name] for n in weighted if n.name not in products)
        if convolved < _LEAST_WORK * sum(by_node.values()):
            raise NothingToQuantize("static scales are not for what multiplies activations")
        keep = products.union(keep)
    # Integers of its own have 8 bits: what multiplies them would saturate.
    made = {v: n.op_type for n in marked.graph.node for v in n.output if isa_class() in SATURATING}
    keep = {n.name for n in weighted if made.get(n.input[1]) == _ROUNDING[1]}.union(keep)
    if not columns and any(node.op_type not in _PRODUCTS for node in weighted):
        raise NothingToQuantize("beside convolutions a scale per channel takes no time")
    rows = numbers(sample, _MOST)
    if not rows:
        raise CompileError("no row to see activations of: none is there, or none is finite")
    exact = _float32(marked, keep)
    _part(marked, exact)
    with tempfile.TemporaryDirectory(prefix="lrai-static-") as folder:
        target, known = Path(folder, "static.onnx"), Path(folder, "ranges.json")
        if ranges:
            known.write_bytes(ranges)
        try:
            quantize_static(
                marked,
                target,
                _Rows([value.name for value in model.graph.input], rows),
                quant_format=QuantFormat.QDQ,
                per_channel=columns,
                reduce_range=isa_class() in SATURATING,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=exact,
                **({"calibration_cache_path": known} if _REMEMBERS else {}),
            )
            quantised = onnx.load(target)
            if ranges is not None and known.exists():
                ranges[:] = known.read_bytes()
        except FAULTS as error:
            raise CompileError(f"onnxruntime cannot quantise the model: {reason(error)}") from None
    _unround(quantised, {v: node.name for node in marked.graph.node for v in node.output})
    report = list(_report(model, quantised, weighted, keep))
    if not any(line.weight_elements for line in report):
        raise NothingToQuantize("no operator is left that could be quantised")
    if guard is None or guard:
        quantised = undefined_stays(quantised, sample.outputs, sample.inputs, guard)
    return quantised, report


def _narrow(model: onnx.ModelProto) -> set[str]:
    """Return the first convolutions of few channels each: one of an image, and by channel behind.

    onnxruntime's kernel of integers has little to add up there, and none in blocks of channels: of
    one of 28x28, 32 filters of 3x3, it takes six times as long as that of float32, of three of
    224x224 1.9 times. What they give is rounded then, behind a pooling.
    """
    known = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    linear = (n for n in _named(model).graph.node if n.op_type in WEIGHTED)
    first = itertools.takewhile(
        lambda n: n.op_type == "Conv" and math.prod(known.get(n.input[1], (0, _FEW))[1:2]) < _FEW,
        linear,
    )
    return {node.name for node in first}


def attends(model: onnx.ModelProto) -> bool:
    """Return whether activations are multiplied with one another, as attention does."""
    known = {tensor.name for tensor in model.graph.initializer}
    return any(n.op_type == "MatMul" and n.input[1] not in known for n in model.graph.node)


def signed(model: onnx.ModelProto, clipped: Collection[str] = ()) -> onnx.ModelProto:
    """Return `model` with int8 without a zero point where `about_zero` says so.

    Args:
        model: As the quantiser makes it. Not modified.
        clipped: Values whose range is to end where it does: it is in place of an operator.
    """
    result = deepcopy(model)
    known = {tensor.name: tensor for tensor in result.graph.initializer}
    fixed = {value.name for value in result.graph.output}.union(clipped)
    pairs = dict[tuple[str, ...], list[onnx.NodeProto]]()  # a scale and its zero point, by readers
    for node in (node for node in result.graph.node if node.op_type in _ROUNDING):
        pairs.setdefault(tuple(node.input[1:]), []).append(node)
    read = Counter(name for node in result.graph.node for name in node.input)
    for pair, nodes in pairs.items():
        made = [node.output[0] for node in nodes if node.op_type == _ROUNDING[0]]
        own = Counter(node.input[0] for node in nodes if node.op_type == _ROUNDING[1])
        whole = len(pair) == 2 and all(name in known and read[name] == len(nodes) for name in pair)
        ends = [name for n in nodes for name in (n.input[0], n.output[0])]
        if not whole or {name: read[name] for name in made} != own or not fixed.isdisjoint(ends):
            continue
        scale, point = (known[name] for name in pair)
        step, zero = map(numpy_helper.to_array, (scale, point))
        plain = zero.dtype == np.uint8 and not (zero.ndim or step.ndim)
        if plain and (about := about_zero(float(step), int(zero))) is not None:
            scale.CopyFrom(numpy_helper.from_array(np.array(about, step.dtype), scale.name))
            point.CopyFrom(numpy_helper.from_array(np.array(0, np.int8), point.name))
    return result


def _unround(model: onnx.ModelProto, makers: Mapping[str, str]) -> None:
    """Have products give float32 where float32 reads them, as a model's scores are.

    Their kernels can, for nothing; of scores from -25 to 28 a step of 1/255 is .2.

    Args:
        model: As the quantiser makes it; changed.
        makers: In float32, by value the operator that gives it: a product that gives another one's
            is that operator, too, by where its range ends (Relu, Clip).
    """
    made = {name: node for node in model.graph.node for name in node.output}
    readers = defaultdict[str, list[onnx.NodeProto]](list)
    for node in model.graph.node:
        for name in read(node):
            readers[name].append(node)
    given = {value.name for value in model.graph.output}
    for end in [node for node in model.graph.node if node.op_type == _ROUNDING[1]]:
        start = made.get(end.input[0])
        product = made.get(start.input[0]) if start is not None else None
        if start is None or product is None or product.op_type not in _PRODUCTS:
            continue
        if product.name not in {makers.get(start.input[0]), makers.get(end.output[0])}:
            continue
        alone = len(readers[start.input[0]]) == len(readers[start.output[0]]) == 1
        alone = alone and start.input[0] not in given
        after = [value for reader in readers[end.output[0]] for value in reader.output]
        if alone and not any(r.op_type in _ROUNDING for value in after for r in readers[value]):
            product.output[0] = end.output[0]
            model.graph.node.remove(start)
            model.graph.node.remove(end)


class _Rows(CalibrationDataReader):  # type: ignore[misc] # without types
    """The sample, as the quantiser asks for it: an input by its name, row after row."""

    def __init__(self, names: Sequence[str], rows: Sequence[list[Array]]) -> None:
        self._until, self._feeds = math.inf, (dict(zip(names, row, strict=True)) for row in rows)

    def get_next(self) -> dict[str, Array] | None:
        """Return the next row, None where there is none, or the first was long ago."""
        row = next(self._feeds, None) if time.monotonic() < self._until else None
        self._until = min(self._until, time.monotonic() + _LONGEST)
        return row


def _report(
    model: onnx.ModelProto,
    quantised: onnx.ModelProto,
    weighted: Sequence[onnx.NodeProto],
    keep: Collection[str],
) -> Iterator[Quantized]:
    """Yield what was done to each operator with weights."""
    before = {tensor.name: tensor for tensor in model.graph.initializer}
    after = restored(quantised)
    for node in weighted:
        name, kind, source = node.name, node.op_type, node.input[1].removesuffix(_TURNED)
        if name not in after or source not in before:
            why = "kept closer" if name in keep else "the quantiser left it alone"
            yield Quantized(node=name, op_type=kind, why=why)
            continue
        weight = numpy_helper.to_array(before[source])
        yield Quantized(
            node=name,
            op_type=kind,
            bits=8,
            scheme="static_int8",
            weight_elements=weight.size,
            error=relative_error(weight, after[name]),
        )


def _named(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which every operator has a name of its own: by it they are told apart.

    A bias [1, N], or of one number, is one [N] there: the quantiser gives it N scales along its
    first axis. A weight whose outputs lie along one axis for some operators and along another for
    others is two: the quantiser gives each one scale per output of who reads it first, with which
    others do not run, or end the process (OpenVINO 2026.4, in bf16).
    """
    named, seen, ways = deepcopy(model), {""}, dict[str, bool]()
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    for index, node in enumerate(named.graph.node):
        turned = any(a.name == "transB" and a.i for a in node.attribute)
        turned |= node.op_type == "ConvTranspose"
        weight = known.get(node.input[1]) if node.op_type in WEIGHTED else None
        if weight is not None and ways.setdefault(weight.name, turned) != turned:
            node.input[1] = f"{weight.name}{_TURNED}"
            if node.input[1] not in ways:
                ways[node.input[1]] = turned
                named.graph.initializer.add().CopyFrom(weight)
                named.graph.initializer[-1].name = node.input[1]
        bias = known.get(node.input[2]) if node.op_type == "Gemm" and len(node.input) > 2 else None
        if bias is not None and (math.prod(bias.dims) == 1 or list(bias.dims[:-1]) == [1]):
            vector = numpy_helper.to_array(bias).ravel()
            if vector.size == 1 and weight is not None:
                vector = np.repeat(vector, weight.dims[0 if turned else 1])
            node.input[2] = f"{bias.name}:vector:{index}"
            named.graph.initializer.append(numpy_helper.from_array(vector, node.input[2]))
        if node.name in seen:
            node.name = f"lrai:{index}"
        seen.add(node.name)
    return named


def _part(model: onnx.ModelProto, exact: Collection[str]) -> None:
    """Have operators with weights that stay in float32 constants of their own.

    What int8 reads, too, as biases of nought in networks that nobody has trained, is computed from
    integers then: not as close, and convolutions do not run in blocks of channels (six times as
    slow).
    """
    kept = [node for node in model.graph.node if node.name in exact and node.op_type in WEIGHTED]
    others = (node for node in model.graph.node if node.name not in exact)
    shared = {name for node in others for name in read(node)}
    for node in kept:
        for place, name in enumerate(node.input):
            known = next((t for t in model.graph.initializer if t.name == name in shared), None)
            if known is not None:
                node.input[place] = own = f"{name}:float32"
                if all(tensor.name != own for tensor in model.graph.initializer):
                    model.graph.initializer.add().CopyFrom(known)
                    model.graph.initializer[-1].name = own


def _is_quantised(model: onnx.ModelProto) -> bool:
    """Return whether more than weights is: for the range of such a value the quantiser waits."""
    others = [node for node in model.graph.node if node.op_type not in WEIGHTED]
    found = {node.output[0] for node in others if node.op_type == _ROUNDING[1]}
    return any(n.op_type == _ROUNDING[0] or not found.isdisjoint(n.input) for n in others)


def _float32(model: onnx.ModelProto, keep: Collection[str]) -> list[str]:
    """Return what is not to be quantised: `keep`, and what has no weights and reads what they give.

    Rounding what is in float32 on both sides would cost closeness and time. Nor is what comes
    before the first weights (pixels are made floats there), or behind the last: a softmax in steps
    of 1/256 says little. A bound other than 0 is no end of a range, so such a Clip stays; and for
    norms integers have no kernel. For a number times a curve of it (SiLU, HardSwish) they have two,
    which take longer than float32 does. The quantiser leaves a Relu or Clip out by who reads it in
    the graph: where a body of If, Loop or Scan reads what is on either side of it, it stays.
    """
    known = constants(model)
    inner = {v for n in model.graph.node for v in itertools.islice(read(n), len(n.input), None)}
    given, wanted = late(model)[0], set[str]()  # by operators with weights, directly or not
    for node in reversed(model.graph.node):
        if node.op_type in WEIGHTED or not wanted.isdisjoint(node.output):
            wanted.update(node.input)
    exact, found = set[str](), list[str]()
    curved = {node.name for pair in curves(model) for node in pair}
    for node in model.graph.node:
        before = given.isdisjoint(node.input) and node.op_type != "Gather"  # of a table
        behind = wanted.isdisjoint(node.output) and node.op_type not in _JOINED
        low = known.get(node.input[1]) if len(node.input) > 1 else None
        bound = node.op_type == "Clip" and (low is None or numpy_helper.to_array(low).any())
        follows = behind or bound or not exact.isdisjoint(node.input)
        kept = node.name in keep or node.op_type in _NORMS
        kept |= node.op_type in ABSORBED and not inner.isdisjoint([*node.input, *node.output])
        if kept or (node.op_type not in WEIGHTED and (before or follows)):
            exact.update(node.output if kept or not before else ())
            found.append(node.name)
        elif node.name in curved:  # what reads it may be int8
            found.append(node.name)
    return found
