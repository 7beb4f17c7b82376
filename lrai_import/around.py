"""Operators around a model: what becomes its inputs is put there, labels come of its output."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
import onnx
from google.protobuf.message import EncodeError
from msgspec import Meta
from onnx import TensorProto, helper, numpy_helper
from onnx.version_converter import ConvertError, convert_version

from lrai_core import CompileError, Imported

_IR: Final = 8
_LARGE: Final = 1 << 14  # elements of a weight, which checker and converter need not see
_FLOATS: Final = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


class Post(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is made of an output, float [batch, classes] or [batch, width].

    Attributes:
        output: The first by default.
        pool: Of an output [batch, length, width] for text: the mean of its tokens, or the first.
        map: Along the last axis; the output keeps its name. Say the same to the gate, as
            `--output-map`: by default that compares numbers, to 1 %.
        labels: File with a label in each line. Adds the outputs `label` and `score`.
        top_k: How many, the best first: [batch, top_k]. To the gate another label is as far as can
            be, whatever its rank: with more than one, few forms are close enough.
    """

    output: str = ""
    pool: Literal["mean", "first"] | None = None
    map: Literal["softmax", "l2_normalised"] | None = None
    labels: str = ""
    top_k: Annotated[int, Meta(ge=1, le=16_384)] = 1


class Around:
    """A graph while something is put around it.

    Attributes:
        opset: Of the default domain.
        model: As it is by now; what comes before and after it is apart until `built`.
        before: Operators that come before it.
        masks: Values that say which tokens of a text are there, for each text.
        lengths: Names of the extents of tokens.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        """Begin with a model, weights inline; it is changed."""
        self.model = model
        self.before: list[onnx.NodeProto] = []
        self._after: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self.masks: list[str] = []
        self.lengths: set[str] = set()
        graph = model.graph
        weights = {tensor.name for tensor in graph.initializer}
        self._open = {value.name: value for value in graph.input if value.name not in weights}
        self._taken = weights | {value.name for value in graph.input}
        self._taken |= {name for node in graph.node for name in (*node.input, *node.output)}

    @property
    def opset(self) -> int:
        """Return the version of the default domain."""
        return opset_of(self.model)

    def post(self, spec: Post, labels: Sequence[str]) -> None:
        """Map an output, and add the labels of its largest elements with their scores.

        Raises:
            CompileError: There is no such output, or it has not as many classes as labels.
        """
        outputs = {value.name: value for value in self.model.graph.output}
        name = spec.output or next(iter(outputs))
        if name not in outputs:
            got, known = name[:120], ", ".join(outputs)[:200]
            raise CompileError(f"postprocess.output {got!r} is none of the model's: {known}")
        dims = outputs[name].type.tensor_type.shape.dim
        if (kind := outputs[name].type.tensor_type.elem_type) not in _FLOATS:
            got = TensorProto.DataType.Name(kind)
            raise CompileError(f"postprocess.output {name[:120]!r} is {got}, needed is a float")
        if spec.pool is not None:
            self._pool(name, dims, spec.pool, kind)
        if spec.map == "softmax":
            self.add("Softmax", [self._moved(name)], name, after=True, axis=-1)
        elif spec.map == "l2_normalised":
            self.add("LpNormalization", [self._moved(name)], name, after=True, axis=-1, p=2)
        if labels:
            self._label(name, dims, kind, labels, spec.top_k)

    def _label(self, name: str, dims: Any, kind: int, labels: Sequence[str], top_k: int) -> None:
        """Add the labels of an output's largest elements, and what those are."""
        if len(dims) != 2 or dims[1].dim_value not in (0, len(labels)):
            problem = f"output {name!r} has shape {[d.dim_value or d.dim_param for d in dims]}"
            raise CompileError(f"{len(labels)} labels are given, and {problem}")
        if top_k > len(labels):
            raise CompileError(f"postprocess.top_k is {top_k}, of {len(labels)} labels")
        outputs = {value.name for value in self.model.graph.output}
        for added in ("label", "score"):
            if added in outputs or added in self._taken:
                raise CompileError(f"the model has something called {added!r} already")
        scores = name
        if not dims[1].dim_value:  # then the engine refuses another number of classes
            scores = self.add("Reshape", [name, self.ints([0, len(labels)])], after=True)
        self._after.append(
            helper.make_node("TopK", [scores, self.ints([top_k])], ["score", "lrai:top"])
        )
        texts = self.constant(np.array(labels, dtype=np.object_))
        self.add("Gather", [texts, "lrai:top"], "label", after=True)
        rows = extent(dims[0], "batch")
        for added, of in (("label", TensorProto.STRING), ("score", kind)):
            made = helper.make_tensor_value_info(added, of, [rows, top_k])
            made.doc_string = Imported.DERIVED if added == "score" else ""
            self.model.graph.output.append(made)

    def built(self) -> onnx.ModelProto:
        """Return the model.

        Raises:
            CompileError: What has come of it is no valid model.
        """
        graph = self.model.graph
        for value in graph.output if self.masks else ():
            dims = value.type.tensor_type.shape.dim[1:]
            free = [dim.dim_param for dim in dims if not dim.dim_value]
            if free and (len(dims) > 1 or free[0] in ("", *self.lengths)):
                problem = f"output {value.name[:120]!r} has an element for each token"
                remedy = (
                    "callers cannot know: pool it (postprocess.pool), or leave it out of the model"
                )
                raise CompileError(f"{problem}, and how many there are {remedy}")
        for name, value in self._open.items():
            free = [dim.dim_param for dim in value.type.tensor_type.shape.dim]
            if self.lengths.intersection(free) - {""}:
                problem = f"input {name[:120]!r} wants an element for each token"
                raise CompileError(f"{problem}: name it in preprocess, as mask or types")
        self.model.ir_version = max(self.model.ir_version, _IR)  # weights need be no inputs
        inputs = [*self._inputs, *self._open.values()]
        nodes = [*self.before, *graph.node, *self._after]
        del graph.input[:], graph.node[:], graph.value_info[:]
        graph.input.extend(inputs)
        graph.node.extend(nodes)
        try:
            onnx.checker.check_model(_light(self.model)[0])
        except (onnx.checker.ValidationError, ValueError, EncodeError) as error:
            text = " ".join(str(error).split())[:200]
            raise CompileError(f"not valid with what is put around it: {text}") from None
        return self.model

    def _pool(self, name: str, dims: Any, pool: str, kind: int) -> None:
        """Make one vector of those of all tokens."""
        if len(self.masks) != 1 or len(dims) != 3:
            problem = f"{name[:120]!r} is no output [batch, length, width] of one text"
            raise CompileError(f"postprocess.pool: {problem}")
        inner, middle = self._moved(name), self.ints([1])
        if pool == "first":
            self.add("Gather", [inner, self.ints(0)], name, after=True, axis=1)
        else:
            mask = self.add("Cast", self.masks, after=True, to=kind)
            mask = self.add("Unsqueeze", [mask, self.ints([-1])], after=True)
            total = self.add("Mul", [inner, mask], after=True)
            total = self.add("ReduceSum", [total, middle], after=True, keepdims=0)
            count = self.add("ReduceSum", [mask, middle], after=True, keepdims=0)
            least = self.constant(np.ones(1, helper.tensor_dtype_to_np_dtype(kind)))
            count = self.add("Max", [count, least], after=True)  # of an empty text nothing is there
            self.add("Div", [total, count], name, after=True)
        del dims[1]

    def take(self, name: str, kinds: Sequence[int], rank: int) -> onnx.ValueInfoProto:
        """Return an input that is no longer one."""
        if name not in self._open:
            known = ", ".join(self._open)[:200] or "none is left"
            raise CompileError(f"the model has no input {name[:120]!r}: {known}")
        value: onnx.ValueInfoProto = self._open.pop(name)
        tensor = value.type.tensor_type
        if tensor.elem_type not in kinds or len(tensor.shape.dim) != rank:
            wanted = " or ".join(TensorProto.DataType.Name(kind) for kind in kinds)
            got = f"{TensorProto.DataType.Name(tensor.elem_type)} of rank {len(tensor.shape.dim)}"
            raise CompileError(f"input {name[:120]!r} is {got}, needed is {wanted} of rank {rank}")
        return value

    def declare(self, name: str, kind: int, shape: list[int | str]) -> None:
        """Add an input of the whole."""
        if name in self._taken:
            raise CompileError(f"preprocess.{name[:120]}: the model has something of that name")
        self._taken.add(name)
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))

    def upgrade(self, opset: int, what: str) -> None:
        """Bring the model to the operator set that something put around it takes.

        Raises:
            CompileError: It cannot be brought there.
        """
        problem = f"{what} needs opset {opset}, which the model cannot be brought to"
        self.model = at_opset(self.model, opset, problem)

    def _moved(self, output: str) -> str:
        """Return the new name of an output inside the graph."""
        inner = self.fresh()
        for node in (*self.model.graph.node, *self._after):
            for ends in (node.input, node.output):
                ends[:] = [inner if name == output else name for name in ends]
        return inner

    def fresh(self) -> str:
        """Return a name that nothing has."""
        name = next(name for n in count() if (name := f"lrai:{n}") not in self._taken)
        self._taken.add(name)
        return name

    def add(
        self,
        kind: str,
        inputs: list[str],
        output: str = "",
        *,
        after: bool = False,
        **attributes: Any,
    ) -> str:
        """Add an operator before the model, or after it; return the name of its output."""
        output = output or self.fresh()
        nodes = self._after if after else self.before
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, array: Any) -> str:
        """Add a constant; return its name."""
        name = self.fresh()
        self.model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def ints(self, values: int | list[int]) -> str:
        """Add a constant of int64; return its name."""
        return self.constant(np.array(values, np.int64))


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of the default domain."""
    return max(int(o.version) * (o.domain in ("", "ai.onnx")) for o in model.opset_import)


def at_opset(model: onnx.ModelProto, opset: int, problem: str) -> onnx.ModelProto:
    """Return the model at an operator set, or as it is where that is a later one.

    Raises:
        CompileError: It cannot be brought there, which is the problem.
    """
    if opset_of(model) >= opset:
        return model
    light, large = _light(model)
    try:
        made = convert_version(light, opset)
    except (RuntimeError, ValueError, EncodeError, ConvertError) as error:
        raise CompileError(f"{problem}: {str(error)[:200]}") from None
    del made.graph.input[len(model.graph.input) :]
    made.graph.initializer.extend(large)
    return made


def _light(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[onnx.TensorProto]]:
    """Return a model whose large weights are its last inputs, and these: protobuf writes 2 GB."""
    opsets, functions = model.opset_import, model.functions
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=opsets, functions=functions)
    light.graph.name = model.graph.name
    for part in ("input", "output", "value_info", "node", "sparse_initializer"):
        getattr(light.graph, part).extend(getattr(model.graph, part))
    large = {w.name: w for w in model.graph.initializer if np.prod(w.dims, dtype=np.int64) > _LARGE}
    given = (helper.make_tensor_value_info(n, w.data_type, w.dims) for n, w in large.items())
    light.graph.input.extend(given)
    light.graph.initializer.extend(w for w in model.graph.initializer if w.name not in large)
    return light, list(large.values())


def extent(dim: Any, name: str) -> int | str:
    """Return an extent that is fixed, or its name, or this one."""
    return dim.dim_value or dim.dim_param or name
