"""Operators around a model: pixels and text become its inputs, labels come of its output."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
import onnx.version_converter
from google.protobuf.message import EncodeError
from onnx import TensorProto, helper, numpy_helper

from lrai_core import CompileError
from lrai_import.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lrai_import.described import Pixels, Post, Text

MOST: Final = 16_384  # pixels of a side
EXTENSIONS: Final = "ai.onnx.contrib"  # the domain of onnxruntime-extensions
_IR: Final = 8
_RESIZES: Final = 18  # the operator set whose Resize looks at all pixels that it shrinks
_MODES: Final[dict[str, dict[str, Any]]] = {
    "bilinear": {"mode": "linear"},
    "bicubic": {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1},  # Pillow's own
}
_EACH: Final = (  # values while one text is made tokens
    *("turn", "going", "on", "single", "one", "ids", "types", "mask", "offsets"),
    *("all", "end", "last", "most", "cut", "first", "kept", "length", "short", "pads", "padded"),
    *("nought", "unit", "limit", "wide", "blank"),
)
_INTEGERS: Final = (TensorProto.INT32, TensorProto.INT64)
_FLOATS: Final = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


class Around:
    """A graph while something is put around it.

    Attributes:
        opset: Of the default domain.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        """Begin with a model, weights inline; it is changed."""
        self._model = model
        self._before: list[onnx.NodeProto] = []
        self._after: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._masks: list[str] = []  # which tokens of a text are there, for each text
        self._lengths: set[str] = set()  # names of the extents of tokens
        graph = model.graph
        weights = {tensor.name for tensor in graph.initializer}
        self._open = {value.name: value for value in graph.input if value.name not in weights}
        self._taken = weights | {value.name for value in graph.input}
        self._taken |= {name for node in graph.node for name in (*node.input, *node.output)}

    @property
    def opset(self) -> int:
        """Return the version of the default domain."""
        own = (o.version for o in self._model.opset_import if o.domain in ("", "ai.onnx"))
        return int(next(own))

    def pixels(self, name: str, spec: Pixels) -> None:
        """Let an input take uint8 [batch, height, width, channels], under another name.

        Raises:
            CompileError: The model has no such input, or it is no picture of that kind.
        """
        given = self._take(spec.input, (TensorProto.FLOAT,), 4)
        dims = given.type.tensor_type.shape.dim
        axes = (0, 2, 3, 1) if spec.layout == "NCHW" else (0, 1, 2, 3)
        batch, height, width, channels = (dims[axis] for axis in axes)
        if (colours := channels.dim_value) not in (1, 3):
            where = f"in the layout {spec.layout}"
            raise CompileError(f"input {spec.input!r} has {colours} channels {where}, not 1 or 3")
        for what, values in (("mean", spec.mean), ("std", spec.std)):
            if len(values) not in (1, colours):
                got = f"{len(values)} numbers for {colours} channels"
                raise CompileError(f"preprocess.{name}.{what} has {got}")
        self._check_extents(name, spec, (height.dim_value, width.dim_value))
        extents: list[int | str] = [height.dim_value or "height", width.dim_value or "width"]
        if spec.resize is not None or spec.crop is not None:
            extents = [f"{name}.height", f"{name}.width"]
        self._declare(name, TensorProto.UINT8, [_extent(batch, "batch"), *extents, colours])
        value = name
        if spec.channels == "BGR":
            value = self._add("Gather", [value, self._ints([2, 1, 0][-colours:])], axis=3)
        value = self._add("Transpose", [value], perm=[0, 3, 1, 2])
        if spec.resize is not None:
            value = self._resized(value, spec)
        if spec.crop is not None:
            value = self._cropped(value, spec.crop)
        value = self._add("Cast", [value], to=TensorProto.FLOAT)
        mean, std = (
            np.broadcast_to(np.array(numbers, np.float64), colours).reshape(1, colours, 1, 1)
            for numbers in (spec.mean, spec.std)
        )
        value = self._add("Mul", [value, self._constant((spec.scale / std).astype(np.float32))])
        value = self._add("Sub", [value, self._constant((mean / std).astype(np.float32))])
        if spec.layout == "NCHW":
            self._add("Identity", [value], spec.input)
        else:
            self._add("Transpose", [value], spec.input, perm=[0, 2, 3, 1])

    def text(self, name: str, spec: Text, tokenizer: Tokenizer) -> None:
        """Let the inputs of an encoder take BYTES [batch], under another name.

        Raises:
            CompileError: The model has no such input, or fewer tokens than the tokenizer.
        """
        given = [(spec.ids, self._take(spec.ids, _INTEGERS, 2))]
        given += [(own, self._take(own, _INTEGERS, 2)) for own in (spec.mask, spec.types) if own]
        tokens = self._tokens(spec.ids)
        if tokens is not None and tokens < len(tokenizer.vocabulary):
            got = f"{len(tokenizer.vocabulary)} tokens, the model's table {tokens}"
            raise CompileError(f"the tokenizer does not match the model: it has {got}")
        batch = _extent(given[0][1].type.tensor_type.shape.dim[0], "batch")
        self._declare(name, TensorProto.STRING, [batch])
        length = given[0][1].type.tensor_type.shape.dim[1]
        fixed = length.dim_value
        self._lengths.add(length.dim_param)
        most = min(spec.max_length, fixed) if fixed else spec.max_length
        ids, lengths = self._tokenised(name, most, fixed or most, tokenizer)
        longest = self._ints(fixed)
        if not fixed:
            longest = self._add("ReduceMax", [lengths], keepdims=0)
            nought, one = self._ints([0]), self._ints([1])
            end = self._add("Unsqueeze", [longest, nought])
            ids = self._add("Slice", [ids, nought, end, one])
        places = self._add("Range", [self._ints(0), longest, self._ints(1)])
        mask = self._add("Less", [places, lengths])
        self._masks.append(mask)
        values = {spec.ids: ids, spec.mask: mask}
        if spec.types:
            values[spec.types] = self._add("Mul", [ids, self._ints([0])])
        for own, declared in given:
            kind = declared.type.tensor_type.elem_type
            self._add("Cast", [values[own]], own, to=kind)

    def post(self, spec: Post, labels: Sequence[str]) -> None:
        """Map an output, and add the labels of its largest elements with their scores.

        Raises:
            CompileError: There is no such output, or it has not as many classes as labels.
        """
        outputs = {value.name: value for value in self._model.graph.output}
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
            self._add("Softmax", [self._moved(name)], name, after=True, axis=-1)
        elif spec.map == "l2_normalised":
            self._add("LpNormalization", [self._moved(name)], name, after=True, axis=-1, p=2)
        if not labels:
            return
        if len(dims) != 2 or dims[1].dim_value not in (0, len(labels)):
            got = [dim.dim_value or dim.dim_param for dim in dims]
            problem = f"output {name!r} has shape {got}"
            raise CompileError(f"{len(labels)} labels are given, and {problem}")
        if spec.top_k > len(labels):
            raise CompileError(f"postprocess.top_k is {spec.top_k}, of {len(labels)} labels")
        for added in ("label", "score"):
            if added in outputs or added in self._taken:
                raise CompileError(f"the model has something called {added!r} already")
        self._after.append(
            helper.make_node("TopK", [name, self._ints([spec.top_k])], ["score", "lrai:top"])
        )
        texts = self._constant(np.array(labels, dtype=np.object_))
        self._add("Gather", [texts, "lrai:top"], "label", after=True)
        rows = _extent(dims[0], "batch")
        for added, of in (("label", TensorProto.STRING), ("score", kind)):
            made = helper.make_tensor_value_info(added, of, [rows, spec.top_k])
            self._model.graph.output.append(made)

    def built(self) -> onnx.ModelProto:
        """Return the model.

        Raises:
            CompileError: What has come of it is no valid model.
        """
        graph = self._model.graph
        for value in graph.output if self._masks else ():
            dims = value.type.tensor_type.shape.dim[1:]
            free = [dim.dim_param for dim in dims if not dim.dim_value]
            if free and (len(dims) > 1 or free[0] in ("", *self._lengths)):
                problem = f"output {value.name[:120]!r} has an element for each token"
                remedy = "pool it (postprocess.pool), or leave it out of the model"
                raise CompileError(
                    f"{problem}, and how many there are callers cannot know: {remedy}"
                )
        for name, value in self._open.items():
            free = [dim.dim_param for dim in value.type.tensor_type.shape.dim]
            if self._lengths.intersection(free) - {""}:
                problem = f"input {name[:120]!r} wants an element for each token"
                raise CompileError(f"{problem}: name it in preprocess, as mask or types")
        self._model.ir_version = max(self._model.ir_version, _IR)  # weights need be no inputs
        inputs = [*self._inputs, *self._open.values()]
        nodes = [*self._before, *graph.node, *self._after]
        del graph.input[:], graph.node[:], graph.value_info[:]
        graph.input.extend(inputs)
        graph.node.extend(nodes)
        try:
            onnx.checker.check_model(self._model)
        except (onnx.checker.ValidationError, ValueError, EncodeError) as error:
            text = " ".join(str(error).split())[:200]
            raise CompileError(f"not valid with what is put around it: {text}") from None
        return self._model

    def _pool(self, name: str, dims: Any, pool: str, kind: int) -> None:
        """Make one vector of those of all tokens."""
        if len(self._masks) != 1 or len(dims) != 3:
            problem = f"{name[:120]!r} is no output [batch, length, width] of one text"
            raise CompileError(f"postprocess.pool: {problem}")
        inner, middle = self._moved(name), self._ints([1])
        if pool == "first":
            self._add("Gather", [inner, self._ints(0)], name, after=True, axis=1)
        else:
            mask = self._add("Cast", self._masks, after=True, to=kind)
            mask = self._add("Unsqueeze", [mask, self._ints([-1])], after=True)
            total = self._add("Mul", [inner, mask], after=True)
            total = self._add("ReduceSum", [total, middle], after=True, keepdims=0)
            count = self._add("ReduceSum", [mask, middle], after=True, keepdims=0)
            self._add("Div", [total, count], name, after=True)
        del dims[1]

    def _take(self, name: str, kinds: Sequence[int], rank: int) -> onnx.ValueInfoProto:
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

    def _declare(self, name: str, kind: int, shape: list[int | str]) -> None:
        if name in self._taken:
            raise CompileError(f"preprocess.{name[:120]}: the model has something of that name")
        self._taken.add(name)
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))

    @staticmethod
    def _check_extents(name: str, spec: Pixels, model: tuple[int, int]) -> None:
        """Refuse what does not lead to the extents that the model wants; 0 is any."""
        least = [spec.resize] * 2 if isinstance(spec.resize, int) else spec.resize
        if least is not None and (len(least) != 2 or not 1 <= min(least) <= max(least) <= MOST):
            got = f"resize is {str(spec.resize)[:60]}, needed are one or two extents up to {MOST}"
            raise CompileError(f"preprocess.{name}.{got}")
        if spec.crop and least and any(c > r for c, r in zip(spec.crop, least, strict=True)):
            raise CompileError(f"preprocess.{name}: crop {list(spec.crop)} exceeds {list(least)}")
        made = spec.crop or (None if isinstance(spec.resize, int) else spec.resize)  # the last word
        if made and any(w not in (0, m) for w, m in zip(model, made, strict=True)):
            got = f"gives {list(made)}, the model wants {list(model)}"
            raise CompileError(f"preprocess.{name} {got}")
        if spec.resize is not None and made is None and any(model):
            raise CompileError(f"preprocess.{name}: resize to a shorter side needs crop here")

    def _resized(self, value: str, spec: Pixels) -> str:
        if self.opset < _RESIZES:
            self._upgrade()
        shape = self._add("Shape", [value])
        kept = self._add("Slice", [shape, self._ints([0]), self._ints([2])])
        if isinstance(spec.resize, int):
            sides = self._add("Slice", [shape, self._ints([2]), self._ints([4])])
            shorter = self._add("ReduceMin", [sides], keepdims=1)
            wanted = self._add("Mul", [sides, self._ints([spec.resize])])
            sides = self._add("Div", [wanted, shorter])
            sides = self._add("Min", [sides, self._ints([MOST])])  # of a sliver, no gigabytes
        else:
            sides = self._ints(list(spec.resize or ()))
        sizes = self._add("Concat", [kept, sides], axis=0)
        how = _MODES[spec.interpolation]
        return self._add("Resize", [value, "", "", sizes], antialias=1, **how)

    def _cropped(self, value: str, extents: tuple[int, int]) -> str:
        """Return the centre; a half is rounded to even, as torchvision does."""
        crop = self._ints(list(extents))
        shape = self._add("Shape", [value])
        sides = self._add("Slice", [shape, self._ints([2]), self._ints([4])])
        left = self._add("Cast", [self._add("Sub", [sides, crop])], to=TensorProto.FLOAT)
        half = self._add("Mul", [left, self._constant(np.array([0.5], np.float32))])
        start = self._add("Cast", [self._add("Round", [half])], to=TensorProto.INT64)
        start = self._add("Max", [start, self._ints([0])])
        end = self._add("Add", [start, crop])
        value = self._add("Slice", [value, start, end, self._ints([2, 3])])
        # What is smaller than the crop is refused here, by the engine.
        return self._add("Reshape", [value, self._ints([0, 0, *extents])])

    def _tokenised(self, text: str, most: int, width: int, tokenizer: Tokenizer) -> tuple[str, str]:
        """Return tokens, int64 [batch, width], padded, and how many there are, int64 [batch, 1].

        The operator takes one text at a time.
        """
        own = {name: self._name() for name in _EACH}
        integer = TensorProto.INT64
        nought = numpy_helper.from_array(np.array([0], np.int64), own["nought"])
        unit = numpy_helper.from_array(np.array([1], np.int64), own["unit"])
        limit = numpy_helper.from_array(np.array([most], np.int64), own["limit"])
        wide = numpy_helper.from_array(np.array([width], np.int64), own["wide"])
        blank = np.array(tokenizer.vocabulary.index("[PAD]"), np.int64)
        padding = numpy_helper.from_array(blank, own["blank"])
        tokenize = helper.make_node(
            "BertTokenizer",
            [own["one"]],
            [own["ids"], own["types"], own["mask"], own["offsets"]],
            domain=EXTENSIONS,
            **tokenizer.attributes,
        )
        body = helper.make_graph(
            [
                helper.make_node("Gather", [text, own["turn"]], [own["single"]], axis=0),
                helper.make_node("Unsqueeze", [own["single"], own["nought"]], [own["one"]]),
                tokenize,
                # The operator's own truncation gives wrong tokens (0.15): so all, cut here.
                helper.make_node("Shape", [own["ids"]], [own["all"]]),
                helper.make_node("Sub", [own["all"], own["unit"]], [own["end"]]),
                helper.make_node("Slice", [own["ids"], own["end"], own["all"]], [own["last"]]),
                helper.make_node("Sub", [own["limit"], own["unit"]], [own["most"]]),
                helper.make_node("Min", [own["end"], own["most"]], [own["cut"]]),
                helper.make_node("Slice", [own["ids"], own["nought"], own["cut"]], [own["first"]]),
                helper.make_node("Concat", [own["first"], own["last"]], [own["kept"]], axis=0),
                helper.make_node("Shape", [own["kept"]], [own["length"]]),
                helper.make_node("Sub", [own["wide"], own["length"]], [own["short"]]),
                helper.make_node("Concat", [own["nought"], own["short"]], [own["pads"]], axis=0),
                helper.make_node("Pad", [own["kept"], own["pads"], own["blank"]], [own["padded"]]),
                helper.make_node("Identity", [own["going"]], [own["on"]]),
            ],
            "tokenize",
            [
                helper.make_tensor_value_info(own["turn"], integer, []),
                helper.make_tensor_value_info(own["going"], TensorProto.BOOL, []),
            ],
            [
                helper.make_tensor_value_info(own["on"], TensorProto.BOOL, []),
                helper.make_tensor_value_info(own["padded"], integer, [width]),
                helper.make_tensor_value_info(own["length"], integer, [1]),
            ],
            initializer=[nought, unit, limit, wide, padding],
        )
        rows = self._add("Squeeze", [self._add("Shape", [text]), self._ints([0])])
        always = self._constant(np.array([1], np.bool_).reshape(()))
        ids, lengths = self._name(), self._name()
        self._before.append(helper.make_node("Loop", [rows, always], [ids, lengths], body=body))
        if all(o.domain != EXTENSIONS for o in self._model.opset_import):
            self._model.opset_import.append(helper.make_opsetid(EXTENSIONS, 1))
        return ids, lengths

    def _tokens(self, ids: str) -> int | None:
        """Return the rows of the table that the ids are looked up in, None where there is none."""
        tables = {tensor.name: tensor.dims for tensor in self._model.graph.initializer}
        same = {ids}
        for node in self._model.graph.node:
            if node.op_type in ("Cast", "Identity") and node.input[0] in same:
                same.add(node.output[0])
            if node.op_type == "Gather" and node.input[1] in same and node.input[0] in tables:
                return int(tables[node.input[0]][0])
        return None

    def _upgrade(self) -> None:
        """Bring the model to the operator set that what is put around it takes."""
        try:
            upgraded = onnx.version_converter.convert_version(self._model, _RESIZES)
        except (
            *(RuntimeError, ValueError, EncodeError),
            onnx.version_converter.ConvertError,
        ) as error:
            problem = f"resize needs opset {_RESIZES}, which the model cannot be brought to"
            raise CompileError(f"{problem}: {str(error)[:200]}") from None
        self._model = upgraded

    def _moved(self, output: str) -> str:
        """Return the new name of an output inside the graph."""
        inner = self._name()
        for node in (*self._model.graph.node, *self._after):
            for index, name in enumerate(node.output):
                if name == output:
                    node.output[index] = inner
            for index, name in enumerate(node.input):
                if name == output:
                    node.input[index] = inner
        return inner

    def _name(self) -> str:
        name = next(name for n in count() if (name := f"lrai:{n}") not in self._taken)
        self._taken.add(name)
        return name

    def _add(
        self,
        kind: str,
        inputs: list[str],
        output: str = "",
        *,
        after: bool = False,
        **attributes: Any,
    ) -> str:
        output = output or self._name()
        nodes = self._after if after else self._before
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def _constant(self, array: Any) -> str:
        name = self._name()
        self._model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def _ints(self, values: int | list[int]) -> str:
        return self._constant(np.array(values, np.int64))


def _extent(dim: Any, name: str) -> int | str:
    return dim.dim_value or dim.dim_param or name
