"""The model as given: loaded, brought to opset 17, its weights stored once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx
import onnx.inliner

from lrai_core.compiler.probe import MIN_OPSET, probe, upgrade
from lrai_core.errors import CompileError, shorten
from lrai_core.protocol import Signature, TensorSpec

WEIGHTS: Final = "weights.bin"
_SHARED_BYTES: Final = 1024  # smaller tensors stay in the graph
_ALIGNMENT: Final = 4096  # so that the engine can map a tensor instead of copying it
_DATATYPES: Final[Mapping[int, str]] = {
    onnx.TensorProto.BOOL: "BOOL",
    onnx.TensorProto.UINT8: "UINT8",
    onnx.TensorProto.UINT16: "UINT16",
    onnx.TensorProto.UINT32: "UINT32",
    onnx.TensorProto.UINT64: "UINT64",
    onnx.TensorProto.INT8: "INT8",
    onnx.TensorProto.INT16: "INT16",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.FLOAT16: "FP16",
    onnx.TensorProto.FLOAT: "FP32",
    onnx.TensorProto.DOUBLE: "FP64",
    onnx.TensorProto.STRING: "BYTES",
}

Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model; weights inline.

    Attributes:
        proto: The graph, opset 17 or later.
        sha256: Of the file as given and its external data.
        opset: Of the default domain.
    """

    proto: onnx.ModelProto
    name: str
    sha256: str
    opset: int


def load_model(path: Path, notify: Notify) -> Model:
    """Return the model in the file, after a child process has survived reading it.

    Raises:
        CompileError: Missing, not ONNX, cut short, or it cannot be brought to opset 17.
        UnsupportedOperator: It holds an operator that cannot be run or upgraded.
    """
    found = probe(path)
    digest = hashlib.sha256()
    for file in (path, *(path.parent / name for name in found.external)):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    proto = onnx.load(path)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    if found.opset < MIN_OPSET:
        proto = upgrade(proto, found.opset)
        notify(f"opset {found.opset} upgraded to {MIN_OPSET}")
    return Model(proto, path.stem, digest.hexdigest(), max(found.opset, MIN_OPSET))


def declared(proto: onnx.ModelProto) -> Signature:
    """Return inputs and outputs as the graph declares them, no axis assigned yet.

    Raises:
        CompileError: A datatype that the protocol does not have.
    """
    weights = {tensor.name for tensor in proto.graph.initializer}
    return Signature(
        inputs=tuple(_spec(value) for value in proto.graph.input if value.name not in weights),
        outputs=tuple(_spec(value) for value in proto.graph.output),
    )


class SharedWeights:
    """One file of weights that the source and every variant refer to, each tensor in it once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[bytes, tuple[int, int]] = {}
        self._end = 0

    def write_source(self, proto: onnx.ModelProto, graph: Path) -> None:
        """Move the model's weights into the file, which `proto` then refers to, and write it."""
        with self._path.open("wb") as stream:
            for tensor in _large_tensors(proto):
                key = _key(tensor)
                if key not in self._places:
                    self._end += -self._end % _ALIGNMENT
                    stream.seek(self._end)
                    stream.write(tensor.raw_data)
                    self._places[key] = (self._end, len(tensor.raw_data))
                    self._end += len(tensor.raw_data)
                self._refer(tensor, key)
        graph.write_bytes(proto.SerializeToString())

    def write_variant(self, proto: onnx.ModelProto, graph: Path) -> int:
        """Write a graph that refers to the file for what it has; return the bytes it reads."""
        for tensor in _large_tensors(proto):
            key = _key(tensor)
            if key in self._places:
                self._refer(tensor, key)
        graph.write_bytes(proto.SerializeToString())
        external = sum(
            int(entry.value)
            for tensor in proto.graph.initializer
            for entry in tensor.external_data
            if entry.key == "length"
        )
        return external + graph.stat().st_size

    def _refer(self, tensor: onnx.TensorProto, key: bytes) -> None:
        offset, length = self._places[key]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        del tensor.external_data[:]
        for name, value in (("location", WEIGHTS), ("offset", offset), ("length", length)):
            entry = tensor.external_data.add()
            entry.key, entry.value = name, str(value)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    if tensor.elem_type not in _DATATYPES:
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
        raise CompileError(
            f"tensor {shorten(value.name)!r} has datatype {kind}, which is not supported"
        )
    shape: list[int | str] = []
    for index, dim in enumerate(tensor.shape.dim):
        fixed = dim.dim_value if dim.HasField("dim_value") else 0
        shape.append(fixed or dim.dim_param or f"{value.name}.{index}")
    return TensorSpec(name=value.name, datatype=_DATATYPES[tensor.elem_type], shape=tuple(shape))


def _large_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for tensor in proto.graph.initializer:
        if tensor.data_type != onnx.TensorProto.STRING and not tensor.HasField("raw_data"):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                continue
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name)
            )
        if len(tensor.raw_data) >= _SHARED_BYTES:
            yield tensor


def _key(tensor: onnx.TensorProto) -> bytes:
    head = f"{tensor.data_type}:{list(tensor.dims)}:".encode()
    return hashlib.sha256(head + hashlib.sha256(tensor.raw_data).digest()).digest()
