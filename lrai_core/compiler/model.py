"""The model as given: imported, what it declares, its weights stored once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Final, cast

import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, set_external_data

from lrai_core.artifact import Source
from lrai_core.compiler.axes import assume_axes
from lrai_core.engine.batching import synthetic_row
from lrai_core.engine.onnxruntime import OnnxRuntime, refusal
from lrai_core.errors import ArtifactError, CompileError, EngineError, EnvironmentProblem, shorten
from lrai_core.protocol import DATATYPES, OutputMap, Signature, TensorSpec

_SOURCE: Final = "source/model.onnx"
_WEIGHTS: Final = "weights.bin"
_SHARED_BYTES: Final = 1024  # smaller tensors stay in the graph
_ALIGNMENT: Final = 4096  # so that the engine can map a tensor instead of copying it
_DATATYPES: dict[int, str] = {helper.np_dtype_to_tensor_dtype(d): n for n, d in DATATYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What an importer, an entry point of the group `lrai.importers`, makes of a model.

    Attributes:
        model: Opset 17 or later, without local functions, its weights inline.
        sha256: Of all that was given, external data too.
        opset: Of the default domain.
        DERIVED: What the graph says, as its documentation, of an output that is; see `TensorSpec`.
    """

    DERIVED: ClassVar = "derived from another output"
    model: onnx.ModelProto
    sha256: str
    opset: int


def find_importer(kind: str) -> Callable[..., Any]:
    """Return the importer, an entry point of the group `lrai.importers`, of that name.

    Those of files take the path, and what is told of each change that they make in the model, and
    return `Imported`. `Object`, of models in memory, takes what `compile` does, and returns that.

    Raises:
        EnvironmentProblem: It is not installed, or not whole.
    """
    try:
        return cast("Callable[..., Any]", entry_points(group="lrai.importers")[kind].load())
    except (KeyError, ImportError, AttributeError) as error:
        problem = f"the importer of {kind} files is not installed, or not whole: {error!r}"
        raise EnvironmentProblem(f"{problem}; install lrai again") from None


def load_model(path: Path, notify: Callable[[str], None]) -> tuple[onnx.ModelProto, Source]:
    """Return the model in the file, weights inline, read by the importer of its kind.

    An importer is named like the suffix that it reads, that of a folder `SavedModel`. What is of no
    such suffix is read as ONNX.

    Raises:
        CompileError: The importer cannot use the file.
        EnvironmentProblem: The importer is not installed, or not whole.
    """
    known = entry_points(group="lrai.importers").names
    suffix = "SavedModel" if os.path.isdir(path) else path.suffix.removeprefix(".").lower()  # noqa: PTH112 - is_dir may raise
    kind = suffix if suffix in known else "onnx"
    try:
        found: Imported = find_importer(kind)(path, notify)
    except CompileError as error:
        if kind == suffix:
            raise
        there = f"no importer is for {shorten(path.suffix)!r}, there are {', '.join(sorted(known))}"
        raise type(error)(f"{error} (read as ONNX: {there})") from None
    operators = len(found.model.graph.node)
    source = Source(file=_SOURCE, sha256=found.sha256, opset=found.opset, operators=operators)
    return found.model, source


def declared(model: onnx.ModelProto) -> Signature:
    """Return inputs and outputs as the graph declares them, no axis assigned yet.

    Raises:
        CompileError: There are no inputs, one is no tensor or of no rank, or a datatype that the
            protocol does not have.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if not inputs:
        raise CompileError("the model has no inputs")
    for value in (*inputs, *model.graph.output):
        if (kind := str(value.type.WhichOneof("value")).removesuffix("_type")) != "tensor":
            remedy = "; for skl2onnx: options={'zipmap': False}" if kind == "sequence" else ""
            raise CompileError(f"{shorten(value.name)!r} is a {kind}, no tensor{remedy}")
        if value in inputs and not value.type.tensor_type.HasField("shape"):
            raise CompileError(f"input {shorten(value.name)!r} has a dynamic rank; give it a shape")
    outputs = model.graph.output
    if not all(value.type.tensor_type.HasField("shape") for value in outputs):
        outputs = onnx.shape_inference.infer_shapes(model).graph.output
    return Signature(inputs=tuple(map(_spec, inputs)), outputs=tuple(map(_spec, outputs)))


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    if tensor.elem_type not in _DATATYPES:
        problem = f"has datatype {onnx.TensorProto.DataType.Name(tensor.elem_type)}"
        raise CompileError(f"tensor {shorten(value.name)!r} {problem}, which is not supported")
    shape: list[int | str] = []
    for index, dim in enumerate(tensor.shape.dim):
        fixed = max(0, dim.dim_value)  # some exporters write -1 for what is free
        name = not dim.dim_param.startswith("unk__") and dim.dim_param  # which tf2onnx makes up
        shape.append(fixed or name or f"{value.name}.{index}")
    kind, told = _DATATYPES[tensor.elem_type], value.doc_string == Imported.DERIVED
    how: OutputMap = "derived" if told else "raw"
    return TensorSpec(name=value.name, datatype=kind, shape=tuple(shape), output_map=how)


def check_loads(path: Path) -> None:
    """Load an ONNX file into onnxruntime, as it is and optimised, and run it on a made-up row.

    That row it may refuse. A hostile file may kill the process: see `run_task`.

    Raises:
        UnsupportedOperator: It holds an operator that onnxruntime does not have.
        CompileError: onnxruntime refuses it.
    """
    assumed = assume_axes(declared(onnx.load(path, load_external_data=False)))
    for optimise in (False, True):
        try:
            with suppress(EngineError):  # real rows will tell
                OnnxRuntime().load(path, optimise=optimise).run(synthetic_row(assumed, 8))
        except ArtifactError as error:
            raise refusal(error, str(error)) from None


class SharedWeights:
    """One file of weights that the source and every variant refer to, each tensor in it once.

    Attributes:
        folder: Where the file is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / _WEIGHTS).touch()
        self._places: dict[bytes, tuple[int, int]] = {}  # offset and length, by content

    def write(self, proto: onnx.ModelProto, graph: Path, *, add: bool = True) -> int:
        """Write a graph that refers to the file for its weights; return the bytes it reads.

        What the file does not have yet is added to it, or else stays in the graph: of what may not
        be kept.
        """
        with (self.folder / _WEIGHTS).open("r+b") as stream:
            stream.seek(0, os.SEEK_END)
            for tensor, content in _large_tensors(proto):
                if add and content not in self._places:
                    stream.seek(-stream.tell() % _ALIGNMENT, os.SEEK_CUR)
                    self._places[content] = (stream.tell(), stream.write(tensor.raw_data))
                if content in self._places:
                    set_external_data(tensor, _WEIGHTS, *self._places[content])
                    tensor.ClearField("raw_data")
        graph.write_bytes(proto.SerializeToString())
        external: Iterator[Any] = map(ExternalDataInfo, proto.graph.initializer)
        return sum(place.length or 0 for place in external) + graph.stat().st_size


def _large_tensors(proto: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, bytes]]:
    """Yield what is worth sharing, with the hash of its type, shape and bytes."""
    for tensor in proto.graph.initializer:
        if tensor.data_location == tensor.EXTERNAL or tensor.data_type == tensor.STRING:
            continue
        if not tensor.HasField("raw_data"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
        if len(tensor.raw_data) >= _SHARED_BYTES:
            content = hashlib.sha256(f"{tensor.data_type}:{list(tensor.dims)}:".encode())
            content.update(tensor.raw_data)
            yield tensor, content.digest()
