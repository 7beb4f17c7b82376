"""What int8 answers to what is no number: integers have no value for NaN, nor for infinity.

So a row that holds one is answered with NaN where float32 would, and nowhere else.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any, Final

import numpy as np
import onnx
from google.protobuf.message import EncodeError

from lrai_core.compiler.search import Sample
from lrai_core.engine.onnxruntime import REFUSALS, open_session, reason, session_options
from lrai_core.errors import CompileError
from lrai_core.protocol import Array, TensorSpec
from lrai_engines.quantize import Graph, assemble, constants
from lrai_engines.sensitivity import finite
from lrai_engines.static_harms import late

Pairs = frozenset[tuple[str, ...]]  # of an input and an output, and with a sign of infinity

# What onnxruntime raises, and its quantiser.
FAULTS: Final = (*REFUSALS, AssertionError, AttributeError, EncodeError, IndexError, KeyError)
_SECONDS: Final = 2.0  # for the columns of an input
_MOST_COLUMNS: Final = 1 << 10  # that are tried one by one
_MOST_FREE: Final = 1 << 6  # likewise, along a free extent, as that of a sound
_MOST_NOUGHTS: Final = 1 << 16  # elements of what keeps a row undefined
_FLOAT: Final = onnx.TensorProto.FLOAT
_REAL: Final = (_FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


def goes_undefined(model: onnx.ModelProto, sample: Sample) -> Pairs:
    """Return where the model answers NaN with NaN, and not as one that looks for it.

    Again with a sign where it answers infinity of that sign otherwise, in whatever columns, as one
    that bounds what it is given first of all: no operator with weights has infinity to read there.

    Raises:
        CompileError: It answers NaN where some columns are, and a number where others are: it looks
            for NaN, or does not read them. Or it may look for NaN, and cannot be asked.
    """
    inputs, outputs = ([v.name for v in side] for side in (model.graph.input, model.graph.output))
    everything = frozenset(itertools.product(inputs, outputs))
    if not sample.rows:
        return everything
    given, found = dict(zip(inputs, sample.rows[0], strict=True)), set[tuple[str, ...]]()
    floats = {name: array for name, array in given.items() if array.dtype.kind == "f"}
    extents = {v.name: v.type.tensor_type.shape.dim[1:] for v in model.graph.input}
    entered = late(model)[1] - constants(model).keys() - {""}
    names = [*outputs, *entered.difference(inputs, outputs)]
    more = onnx.GraphProto(output=[onnx.ValueInfoProto(name=n) for n in names[len(outputs) :]])
    try:
        # What is appended is merged when it is read: a copy would hold the weights once more.
        content = model.SerializeToString() + onnx.ModelProto(graph=more).SerializeToString()
        session = open_session(content, session_options(1, "all", None))
        began = time.monotonic()
        session.run(names, given)
        seconds = max(1e-6, time.monotonic() - began)
        for name, array in floats.items():
            seen = set[frozenset[tuple[str, str]]]()
            most = _MOST_COLUMNS if all(d.dim_value for d in extents[name]) else _MOST_FREE
            most = max(1, min(most, int(_SECONDS / seconds)))
            for probe in _no_numbers(array, most, np.nan):
                told = zip(outputs, session.run(outputs, given | {name: probe}), strict=True)
                nan = [y for y, a in told if a.dtype.kind == "f" and np.isnan(a).any()]
                seen.add(frozenset((name, y) for y in nan))
                if len(seen) > 1:
                    why = "float32 answers NaN where some of its columns are, not where others are"
                    raise CompileError(f"input {name!r}: {why}; int8 would not tell them apart")
            found |= (pairs := seen.pop())
            for sign in "+-" if name not in entered and array.dtype == np.float32 else "":
                bounded = set(names)
                for probe in _no_numbers(array, most, float(f"{sign}inf")):
                    told = zip(names, session.run(names, given | {name: probe}), strict=True)
                    bounded &= {value for value, array in told if finite(array)}
                if bounded.issuperset(entered.difference(inputs)):
                    found |= {(name, y, sign) for _, y in pairs if y in bounded}
    except FAULTS as error:  # as of 2 GB
        if any(node.op_type == "IsNaN" for node in model.graph.node):
            raise CompileError(f"float32 cannot be asked about NaN: {reason(error)}") from None
        return everything
    return frozenset(found)


def _no_numbers(array: Array, most: int, none: float) -> Iterator[Array]:
    """Yield the array with `none` alone and, unless of planes, with it in one column each.

    Of more than `most` columns some of them, all over it.
    """
    columns = range(0, array.size if array.ndim < 3 else 0, -(-array.size // most) or 1)
    for place in (slice(None), *columns):
        probe = array.copy()
        probe.flat[place] = none
        yield probe


def undefined_stays(
    model: onnx.ModelProto,
    outputs: Sequence[TensorSpec],
    inputs: Sequence[TensorSpec] = (),
    pairs: Pairs | None = None,
) -> onnx.ModelProto:
    """Return `model`, with NaN for what reads NaN or infinity: a row, or all without a batch axis.

    That an input of integers holds neither is known. `inputs`: by default all have rows. `pairs`:
    of input and output where that is so, see `goes_undefined`; by default in all.
    """
    graph = Graph(0)
    types = {v.name: v.type.tensor_type for v in (*model.graph.input, *model.graph.output)}
    floats = [v.name for v in model.graph.input if types[v.name].elem_type in _REAL]
    reads = {s.name: [x for x in floats if pairs is None or (x, s.name) in pairs] for s in outputs}
    made = {name for node in model.graph.node for name in node.output}
    given = [s for s in outputs if s.name in made and types[s.name].elem_type in _REAL]
    given = [s for s in given if reads[s.name]]
    before = {spec.name: f"{spec.name}:defined" for spec in given}
    whole = {spec.name for spec in inputs if spec.batch_axis is None}
    for node in model.graph.node:
        own = deepcopy(node)
        own.input[:] = [before.get(name, name) for name in node.input]
        own.output[:] = [before.get(name, name) for name in node.output]
        graph.nodes.append(own)
    for spec in given:
        value, rank, kind = before[spec.name], len(spec.shape), types[spec.name].elem_type
        for x in reads[spec.name]:
            end = spec.name if x == reads[spec.name][-1] else f"{spec.name}:{x}"
            signs = [sign for sign in "+-" if (x, spec.name, sign) in (pairs or ())]
            own = ":".join([x, *signs])
            if signs:  # infinity that has an answer is as good as a number
                what: Any = {"detect_positive": "+" in signs, "detect_negative": "-" in signs}
                where = graph.add("IsInf", [x], f"{own}:infinite", **what)
                graph.add("Where", [where, graph.constant("float32:0", 0, np.float32), x], own)
            first = int(spec.batch_axis == 0 and x not in whole)
            dims = [dim.dim_value for dim in types[x].shape.dim]
            if first and rank == 2 and isinstance(spec.shape[1], int) and len(dims) > 1:
                plain = types[x].elem_type == kind == _FLOAT
                sums = _sums(graph, own, dims, spec.shape[1]) if plain else None
                if sums is not None:  # one operator for three, at half of what they cost
                    noughts = np.zeros((sums[1], spec.shape[1]), np.float32)
                    name = graph.constant(f"{own}:noughts:{spec.shape[1]}", noughts, np.float32)
                    value = graph.add("Gemm", [sums[0], name, value], end)
                    graph.nodes[-1].name = f"{end}:stays"  # what gave it may be named like it
                    continue
            nought = _nought(graph, own, types[x].elem_type, first, len(dims))
            if first and rank > 1:
                shape = graph.constant(f"rows:{rank}", [-1] + [1] * (rank - 1), np.int64)
                nought = graph.add("Reshape", [nought, shape], f"{nought}:{rank}")
            if kind != _FLOAT:
                nought = graph.add("Cast", [nought], f"{nought}:as {kind}", to=kind)
            value = graph.add("Add", [value, nought], end)
            graph.nodes[-1].name = f"{end}:stays"
    return assemble(model, graph)


def _nought(graph: Graph, x: str, kind: int, first: int, rank: int) -> str:
    """Add what is 0, or NaN where `x` holds what is none: float32, of its rows or of it all."""
    axes = graph.constant(f"axes:{x}:{first}", list(range(first, rank)), np.int64)
    noughts = graph.add("Sub", [x, x], f"{x}:noughts")  # before the sum, which could be too large
    nought = f"{x}:nought:{first}"
    graph.add("ReduceSum", [noughts, axes], nought, keepdims=0, noop_with_empty_axes=1)
    if kind != _FLOAT:
        nought = graph.add("Cast", [nought], f"{nought}:float", to=_FLOAT)
    return nought


def _sums(graph: Graph, x: str, dims: Sequence[int], columns: int) -> tuple[str, int] | None:
    """Have noughts [rows, width] that are NaN where a row of `x` is none; None: extents are free.

    Args:
        graph: Where they are written.
        x: A tensor of rows.
        dims: Of it, 0 where one is free.
        columns: Of what they are multiplied to: with many that costs more than it saves.
    """
    size = math.prod(dims[1:])
    if 0 < size * columns <= _MOST_NOUGHTS:  # noughts times what is finite
        return (graph.add("Flatten", [x], f"{x}:flat") if len(dims) > 2 else x), size
    if dims[-2 if len(dims) > 2 else 1] <= 0:
        return None
    if len(dims) == 2:
        right = graph.constant(f"noughts:{size}x1", np.zeros((size, 1)), np.float32)
        return graph.add("MatMul", [x, right], f"{x}:sums"), 1
    # From the left: weights on the right would be packed, and made sixteen columns of one.
    left = graph.constant(f"noughts:1x{dims[-2]}", np.zeros((1, dims[-2])), np.float32)
    axes = graph.constant(f"axes:{len(dims)}", list(range(1, len(dims))), np.int64)
    noughts = graph.add("MatMul", [left, x], f"{x}:noughts")
    sums = graph.add("ReduceSum", [noughts, axes], f"{x}:sums")
    return graph.add("Flatten", [sums], f"{x}:sums:flat"), 1
