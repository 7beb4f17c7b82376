"""`lrai fuse A.onnx B.onnx -o C.onnx`: one model of several, in which what they share runs once.

Two operators are the same if they are of one kind, have equal attributes, and read the same values;
weights are the same if they are equal in type, shape and bytes. So models that share a trunk share
it to the first weight that differs, whatever their values are called. Products of one value with
different weights become one product. An input may be fed what a model before it gives (`--feed`).
"""

from __future__ import annotations

import hashlib
import shlex
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import onnx
import onnxruntime as ort
import typer
from google.protobuf.message import EncodeError
from onnx import helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidArgument,
    NotImplemented,  # noqa: A004 - onnxruntime's own name
    RuntimeException,
)

from lrai_core import CompileError, ConditionNotMet, EnvironmentProblem, UsageError
from lrai_import.around import at_opset, opset_of
from lrai_import.onnx import NOTE, load

_RANDOM: Final = ("Bernoulli", "Multinomial")  # and what begins with Random
_REFUSALS: Final = (Fail, InvalidArgument, NotImplemented, RuntimeException)
_ROUNDS: Final = 15
_ROWS: Final = (1, 32)  # at which it is timed: what saves time alone may cost some in a batch
_FREE: Final = 8  # extent of any other free dimension meanwhile
_GAIN: Final = 1.05

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(slots=True)
class Fused:
    """Models as one.

    Attributes:
        outputs: By model the names of its outputs.
        operators: Of all models together.
        shared: Operators that need not run again.
        joined: Products that became part of another.
    """

    model: onnx.ModelProto
    outputs: dict[str, list[str]]
    operators: int
    shared: int
    joined: int


def fuse(models: Mapping[str, onnx.ModelProto], feeds: Mapping[str, str] | None = None) -> Fused:
    """Return models as one, that has the outputs of all.

    An input of one name, type and shape is one input. Other inputs and outputs keep their names if
    nothing else has them, and are called MODEL.NAME else.

    Args:
        models: By name, two or more, weights inline. Not modified.
        feeds: For inputs, as MODEL.NAME, the output of a model before it that each reads from then
            on, instead of being sent.

    Raises:
        CompileError: One has control flow or sparse weights, or they need different versions of an
            operator set.
        UsageError: There is no such input, or no such output of a model before it, or their types
            or shapes differ.
    """
    feeds = feeds or {}
    known = {f"{name}.{i.name}" for name, model in models.items() for i in _asked(model)}
    if unknown := sorted(feeds.keys() - known):
        there = ", ".join(sorted(known))
        raise UsageError(f"{unknown[0]!r} is no input to feed; there are {there}")
    opset = max(map(opset_of, models.values()))
    ends = Counter(o.name for model in models.values() for o in model.graph.output)
    sent = [(n, i.name) for n, model in models.items() for i in model.graph.input]
    ends.update({name for model, name in sent if f"{model}.{name}" not in feeds})
    twice = {name for name, times in ends.items() if times > 1}
    work = _Fusion(opset, list(models), twice, feeds)
    operators = 0
    for name, given in models.items():
        if given.graph.sparse_initializer:
            raise CompileError(f"{name} has sparse weights, which are not fused")
        model = at_opset(given, opset, f"{name} cannot be brought to opset {opset}")
        work.add(name, model)
        operators += len(model.graph.node)
    work.join()
    return Fused(work.built(), work.outputs, operators, work.shared, work.joined)


@dataclass(slots=True)
class _Fusion:
    """One graph, while models are added to it."""

    opset: int
    models: list[str]
    twice: set[str]  # names of ends that more than one model has, or that are input and output
    feeds: Mapping[str, str]  # by input, both as MODEL.NAME, the output that it reads
    outputs: dict[str, list[str]] = field(default_factory=dict)
    symbols: set[str] = field(default_factory=set)
    rows: str | None = None  # the free extent that is first in all inputs; empty: there is none
    shared: int = 0
    joined: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    owner: dict[str, str] = field(default_factory=dict)  # model of a node's first output
    weights: dict[str, onnx.TensorProto] = field(default_factory=dict)
    inputs: dict[str, onnx.ValueInfoProto] = field(default_factory=dict)
    results: list[onnx.ValueInfoProto] = field(default_factory=list)
    domains: dict[str, int] = field(default_factory=dict)
    known: dict[Any, list[str]] = field(default_factory=dict)  # values by what they are
    given: dict[str, tuple[str, onnx.ValueInfoProto]] = field(default_factory=dict)  # by MODEL.NAME

    def add(self, name: str, model: onnx.ModelProto) -> None:
        """Add a model."""
        used = {node.domain for node in model.graph.node} | {"", "ai.onnx"}
        for needed in [one for one in model.opset_import if one.domain in used]:
            version = self.domains.setdefault(needed.domain or "", needed.version)
            if version != needed.version:
                raise CompileError(f"{name} needs version {needed.version} of {needed.domain!r}")
        symbols: dict[str, str] = {}
        values = {"": ""} | self._inputs(name, model, symbols)
        for tensor in model.graph.initializer:
            values[tensor.name] = self._weight(name, tensor)
        for node in model.graph.node:
            if any(a.type in (a.GRAPH, a.GRAPHS) for a in node.attribute):
                raise CompileError(f"{name}: {node.op_type} is control flow, which is not fused")
            if (constant := _constant(node)) is not None:
                before = len(self.weights)
                values[constant.name] = self._weight(name, constant)
                self.shared += len(self.weights) == before
                continue
            for old, new in zip(node.output, self._node(name, node, values), strict=True):
                values[old] = new
        self.outputs[name] = []
        for output in model.graph.output:
            own = f"{name}.{output.name}" if output.name in self.twice else output.name
            own = self._free(own, name)
            self.nodes.append(helper.make_node("Identity", [values[output.name]], [own]))
            self.owner[own] = name
            self.results.append(_renamed(output, own, symbols))
            self.given[f"{name}.{output.name}"] = values[output.name], self.results[-1]
            self.outputs[name].append(own)

    def _inputs(self, name: str, model: onnx.ModelProto, symbols: dict[str, str]) -> dict[str, str]:
        asked, values = _asked(model), dict[str, str]()
        firsts = [_dims(given)[:1] for given in asked]
        found = {first[0].dim_param if first else "" for first in firsts}
        rows = found.pop() if len(found) == 1 else ""
        self.rows = rows if self.rows is None else self.rows
        if rows and self.rows:
            symbols[rows] = self.rows
        for given in asked:
            value, there = given.name, self.inputs.get(given.name)
            if source := self.feeds.get(f"{name}.{given.name}"):
                value, there = self._fed(name, given, source)
            elif there is None or _extents(there) != _extents(given):
                continue
            values[given.name] = value
            for mine, theirs in zip(_dims(given), _dims(there), strict=True):
                if mine.dim_param and theirs.dim_param:  # one free extent, one name
                    symbols.setdefault(mine.dim_param, theirs.dim_param)
        for given in (one for one in asked if one.name not in values):
            own = self._free(given.name, name)
            for dim in _dims(given):  # of another name than any that another model has
                if dim.dim_param:
                    taken = dim.dim_param in self.symbols
                    symbols.setdefault(dim.dim_param, f"{name}." * taken + dim.dim_param)
            self.inputs[own] = _renamed(given, own, symbols)
            values[given.name] = own
        self.symbols.update(symbols.values())
        return values

    def _fed(
        self, name: str, given: onnx.ValueInfoProto, source: str
    ) -> tuple[str, onnx.ValueInfoProto]:
        """Return the value of an output that an input is to read, and what is declared of it."""
        if source not in self.given:
            outputs = ", ".join(self.given) or "none"
            raise UsageError(f"no output {source!r} before {name}: {outputs}")
        value, there = self.given[source]
        (kind, extents), (own, wanted) = _extents(there), _extents(given)
        both = list(zip(extents, wanted, strict=False))
        if (kind, len(extents)) != (own, len(wanted)) or any(a != b for a, b in both if a and b):
            said = [helper.printable_value_info(one) for one in (there, given)]
            raise UsageError(f"{name} cannot be fed {source}: {said[0]} is no {said[1]}")
        return value, there

    def _free(self, wanted: str, model: str) -> str:
        """Return the name, or one that nothing has yet."""
        taken = {*self.inputs, *self.owner, *self.weights}
        numbered = (f"{model}.{wanted}.{number}" for number in count(1))
        names = chain((wanted, f"{model}.{wanted}"), numbered)
        return next(name for name in names if name not in taken)

    def _weight(self, name: str, tensor: onnx.TensorProto) -> str:
        array = numpy_helper.to_array(tensor)
        content = array.tolist() if array.dtype == object else array.tobytes()
        digest = hashlib.sha256(repr(content).encode() if array.dtype == object else content)
        key = ("weight", tensor.data_type, array.shape, digest.hexdigest())
        if key not in self.known:
            own = self._free(f"{name}/{tensor.name}", name)
            self.weights[own] = numpy_helper.from_array(array, own)
            self.known[key] = [own]
        return self.known[key][0]

    def _node(self, name: str, node: onnx.NodeProto, values: Mapping[str, str]) -> Sequence[str]:
        read = [values[value] for value in node.input]
        attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
        there = tuple(bool(value) for value in node.output)
        key = (node.op_type, node.domain, tuple(attributes), tuple(read), there)
        random = node.op_type in _RANDOM or node.op_type.startswith("Random")
        if not random and key in self.known:
            self.shared += 1
            return self.known[key]
        own = onnx.NodeProto()
        own.CopyFrom(node)
        own.name = f"{name}/{node.name}" if node.name else ""
        own.input[:] = read
        own.output[:] = [value and self._free(f"{name}/{value}", name) for value in node.output]
        self.nodes.append(own)
        self.owner |= dict.fromkeys(own.output, name)
        self.known[key] = list(own.output)
        return self.known[key]

    def join(self) -> None:
        """Have products of one value with weights of different models be one product."""
        groups: dict[Any, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            if (weight := self._matrix(node)) is not None:
                groups[node.op_type, node.input[0], len(weight)].append(node)
        for (kind, value, _), found in groups.items():
            owners = [self.owner[node.output[0]] for node in found]
            if len(found) > 1 and len(set(owners)) == len(found):  # one each: not Q, K and V
                self._joined(kind, value, found)

    def _matrix(self, node: onnx.NodeProto) -> Any:
        """Return the weight of a product as [inputs, outputs], None for any other operator."""
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in self.weights:
            return None
        set_ = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = set_.get("alpha", 1.0) == set_.get("beta", 1.0) == 1.0 and not set_.get("transA")
        matrix = numpy_helper.to_array(self.weights[node.input[1]])
        bias = node.input[2] if len(node.input) > 2 else ""
        if not plain or matrix.ndim != 2 or (bias and bias not in self.weights):
            return None
        matrix = matrix.T if set_.get("transB") else matrix
        shape = self.weights[bias].dims if bias else []
        row = len(shape) < 2 or (len(shape) == 2 and shape[0] == 1)
        return matrix if row and (not shape or shape[-1] in (1, matrix.shape[1])) else None

    def _joined(self, kind: str, value: str, found: Sequence[onnx.NodeProto]) -> None:
        matrices = [self._matrix(node) for node in found]
        sizes = [matrix.shape[1] for matrix in matrices]
        name = found[0].output[0]
        read = [value, self._constant(f"{name}:joined", np.concatenate(matrices, axis=1))]
        if kind == "Gemm":
            biases = []
            for node, size in zip(found, sizes, strict=True):
                there = len(node.input) > 2 and node.input[2]
                given = numpy_helper.to_array(self.weights[node.input[2]]) if there else np.zeros(1)
                biases.append(np.broadcast_to(given, (1, size))[0].astype(matrices[0].dtype))
            read.append(self._constant(f"{name}:bias", np.concatenate(biases)))
        parts = self._constant(f"{name}:sizes", np.array(sizes, np.int64))
        product = helper.make_node(kind, read, [f"{name}:all"])
        outputs = [node.output[0] for node in found]
        split = helper.make_node("Split", [f"{name}:all", parts], outputs, axis=-1)
        place = self.nodes.index(found[0])
        gone = {node.output[0] for node in found}
        before = [n for n in self.nodes[:place] if n.output[0] not in gone]
        after = [n for n in self.nodes[place:] if n.output[0] not in gone]
        self.nodes = [*before, product, split, *after]
        self.joined += len(found) - 1

    def _constant(self, name: str, array: Any) -> str:
        self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def built(self) -> onnx.ModelProto:
        """Return the model, without weights that nothing reads any more."""
        read = {value for node in self.nodes for value in node.input}
        weights = [tensor for name, tensor in self.weights.items() if name in read]
        graph = helper.make_graph(
            self.nodes, "+".join(self.models), list(self.inputs.values()), self.results, weights
        )
        opsets = [helper.make_opsetid(*pair) for pair in self.domains.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """Return the tensor of a Constant by the name of what it gives, None of any other operator.

    The tensor's own name, which is part of the attribute, says nothing of what it is.
    """
    told = next((a.t for a in node.attribute if a.name == "value"), None)
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx") or told is None:
        return None
    tensor = onnx.TensorProto()
    tensor.CopyFrom(told)
    tensor.name = node.output[0]
    return tensor


def _asked(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Return the inputs that are no weights."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [given for given in model.graph.input if given.name not in constants]


def _dims(value: onnx.ValueInfoProto) -> list[Any]:
    return list(value.type.tensor_type.shape.dim)


def _extents(value: onnx.ValueInfoProto) -> tuple[int, list[int | None]]:
    kind = value.type.tensor_type.elem_type
    return kind, [d.dim_value if d.HasField("dim_value") else None for d in _dims(value)]


def _renamed(
    value: onnx.ValueInfoProto, name: str, symbols: Mapping[str, str]
) -> onnx.ValueInfoProto:
    own = onnx.ValueInfoProto()
    own.CopyFrom(value)
    own.name = name
    for dim in _dims(own):
        if dim.dim_param in symbols:
            dim.dim_param = symbols[dim.dim_param]
    return own


@app.command()
def command(
    files: Annotated[list[Path], typer.Argument(help="ONNX files, two or more.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="ONNX file to write.")],
    feed: Annotated[
        list[str] | None,
        typer.Option(help="MODEL.INPUT=MODEL.OUTPUT of an earlier model; repeatable."),
    ] = None,
) -> None:
    """Make one model of several, in which what they have in common runs once.

    Nothing is written, and the exit status is 3, if that saves no time, or costs some, at one row
    or at 32. A chain (--feed), which saves its callers a request, is written in any case.

    A request names the outputs that it wants, but sends the inputs of all models. `lrai compile`
    takes the file like any other.
    """
    [(stem, same)] = Counter(file.stem for file in files).most_common(1)
    if len(files) < 2 or same > 1:
        raise UsageError(f"several files of different names are needed, got {same} called {stem!r}")
    if output.exists() or not output.absolute().parent.is_dir():
        raise UsageError(f"{output} {'exists' if output.exists() else 'is in a missing folder'}")
    models = {file.stem: load(file, typer.echo).model for file in files}
    feeds = dict[str, str]()
    for text in feed or ():
        reads, *given = text.split("=")
        if len(given) != 1 or reads in feeds:
            needed = "MODEL.INPUT=MODEL.OUTPUT is needed, for each input once"
            raise UsageError(f"--feed is {text[:200]!r}, {needed}")
        feeds[reads] = given[0]
    fused = fuse(models, feeds)
    again = f"{fused.shared} of {fused.operators} operators need not run again"
    said = [f"{again}, {fused.joined} products are part of another"]
    typer.echo(said[0])
    try:
        apart, one = sum(model.ByteSize() for model in models.values()), fused.model.ByteSize()
        times = {rows: _times([*models.values()], fused.model, rows) for rows in _ROWS}
    except EncodeError:
        raise CompileError("together they have over 2 GB, which is more than one file") from None
    except _REFUSALS as error:
        why = str(error).partition("\n")[0][:300]
        raise CompileError(f"they do not run on ones, so nothing can be measured: {why}") from None
    taken = [
        f"{rows} row(s): {a * 1e3:.3g} ms apart, {b * 1e3:.3g} ms as one"
        for rows, (a, b) in times.items()
    ]
    said += [f"{apart / 1e6:.3g} MB apart, {one / 1e6:.3g} MB as one", *taken]
    typer.echo("\n".join(said[1:]))
    gains = [apart / together for apart, together in times.values()]
    words = f"{min(gains):.2f} to {max(gains):.2f} times as fast"
    if not feeds and (min(gains) < 1 or max(gains) < _GAIN):  # a chain saves a request
        raise ConditionNotMet(f"not fused: {words}; {'; '.join(taken)}")
    ends = [f"{name}: {', '.join(outputs)}" for name, outputs in fused.outputs.items()]
    ends += [f"every request sends {', '.join(i.name for i in fused.model.graph.input)}"]
    asked = shlex.join([*(file.name for file in files), *(f"--feed={text}" for text in feed or ())])
    note = "; ".join([f"fused: {asked}", *said, *ends])
    helper.set_model_props(fused.model, {NOTE: note})
    try:
        output.write_bytes(fused.model.SerializeToString())
    except BaseException as error:
        output.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise EnvironmentProblem(f"{output}: cannot be written: {error.strerror}") from None
    typer.echo("\n".join([words, *ends]))


def _times(
    models: Sequence[onnx.ModelProto], fused: onnx.ModelProto, rows: int
) -> tuple[float, float]:
    """Return the seconds of all models in turn, and of them as one; medians of rounds in turns."""
    runs = [[_run(model, rows) for model in models], [_run(fused, rows)]]
    seconds: list[list[float]] = [[], []]
    for index in range(_ROUNDS + 1):
        for own, sessions in zip(seconds, runs, strict=True):
            began = time.perf_counter()
            for session, feed in sessions:
                session.run(None, feed)
            if index:  # the first warms up
                own.append(time.perf_counter() - began)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _run(model: onnx.ModelProto, rows: int) -> tuple[ort.InferenceSession, dict[str, Any]]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session, dict(_feed(model, rows))


def _feed(model: onnx.ModelProto, rows: int) -> Iterator[tuple[str, Any]]:
    """Yield ones for each input, of which none is a weight: of those that are read, and as one."""
    first = {d.dim_param for v in model.graph.input for d in _dims(v)[:1] if d.dim_param}
    for value in model.graph.input:
        kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = [d.dim_value or (rows if d.dim_param in first else _FREE) for d in _dims(value)]
        shape[:1] = [d.dim_value or rows for d in _dims(value)[:1]]  # which may have no name
        yield value.name, np.ones(shape, kind)


def main(arguments: Sequence[str]) -> None:
    """Run the command; what `lrai` says of errors is its own business."""
    app(args=list(arguments), prog_name="lrai fuse")
