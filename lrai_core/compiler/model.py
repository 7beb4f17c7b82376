"""The model as given: loaded, brought to opset 17, its weights stored once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import onnx
import onnx.inliner
from onnx.external_data_helper import ExternalDataInfo, set_external_data

from lrai_core.artifact import Source
from lrai_core.compiler.probe import MIN_OPSET, probe, upgrade

_SOURCE: Final = "source/model.onnx"
_WEIGHTS: Final = "weights.bin"
_SHARED_BYTES: Final = 1024  # smaller tensors stay in the graph
_ALIGNMENT: Final = 4096  # so that the engine can map a tensor instead of copying it


def load_model(path: Path, notify: Callable[[str], None]) -> tuple[onnx.ModelProto, Source]:
    """Return the model in the file, weights inline, after a child process has survived reading it.

    Its opset is 17 or later; `notify` is told of an upgrade.

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
    return proto, Source(
        file=_SOURCE,
        sha256=digest.hexdigest(),
        opset=max(found.opset, MIN_OPSET),
        operators=len(proto.graph.node),
    )


class SharedWeights:
    """One file of weights that the source and every variant refer to, each tensor in it once.

    Attributes:
        folder: Where the file is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[bytes, tuple[int, int]] = {}  # offset and length, by content

    def write_source(self, proto: onnx.ModelProto, graph: Path) -> None:
        """Move the model's weights into the file, which `proto` then refers to, and write it."""
        with (self.folder / _WEIGHTS).open("wb") as stream:
            for tensor, content in _large_tensors(proto):
                if content not in self._places:
                    stream.seek(-stream.tell() % _ALIGNMENT, os.SEEK_CUR)
                    self._places[content] = (stream.tell(), stream.write(tensor.raw_data))
                self._refer(tensor, content)
        graph.write_bytes(proto.SerializeToString())

    def write_variant(self, proto: onnx.ModelProto, graph: Path) -> int:
        """Write a graph that refers to the file for what it has; return the bytes it reads."""
        for tensor, content in _large_tensors(proto):
            if content in self._places:
                self._refer(tensor, content)
        graph.write_bytes(proto.SerializeToString())
        external: Iterator[Any] = map(ExternalDataInfo, proto.graph.initializer)
        return sum(place.length or 0 for place in external) + graph.stat().st_size

    def _refer(self, tensor: onnx.TensorProto, content: bytes) -> None:
        set_external_data(tensor, _WEIGHTS, *self._places[content])
        tensor.ClearField("raw_data")


def _large_tensors(proto: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, bytes]]:
    """Yield what is worth sharing, with the hash of its type, shape and bytes."""
    for tensor in proto.graph.initializer:
        if tensor.data_location == tensor.EXTERNAL or tensor.data_type == tensor.STRING:
            continue
        if not tensor.HasField("raw_data"):
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name)
            )
        if len(tensor.raw_data) >= _SHARED_BYTES:
            content = hashlib.sha256(f"{tensor.data_type}:{list(tensor.dims)}:".encode())
            content.update(tensor.raw_data)
            yield tensor, content.digest()
