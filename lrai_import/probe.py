"""First look at a model file, in a process that may die.

A child parses it, checks external data, loads the graph into onnxruntime and runs it once. Hostile
files have crashed parsers, and operators; here that costs a child.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import onnx
import onnx.helper
import onnx.inliner
import onnx.version_converter
import onnxruntime
from google.protobuf.message import DecodeError, EncodeError
from onnx.external_data_helper import ExternalDataInfo, _get_all_tensors

from lrai_core import (
    CompileError,
    EnvironmentProblem,
    TaskError,
    TensorSpec,
    UnsupportedOperator,
    check_loads,
    declared,
    limit_memory,
    run_task,
)
from lrai_import.compared import compare

MIN_OPSET: Final = 17
_TIMEOUT_SECONDS: Final = 600
_BASE_MEMORY_BYTES: Final = 8 << 30  # address space, of which libraries reserve much and use little
_MEMORY_FACTOR: Final = 4  # the file, its parsed form, and the engine's packed copy
_NOT_UPGRADED: Final = (RuntimeError, ValueError, EncodeError, onnx.version_converter.ConvertError)
_MAX_PROTOBUF_BYTES: Final = 1 << 31
_RESIZES: Final = 11  # the first operator set whose Resize knows other coordinates than asymmetric
_GUARANTEED: Final = 7
_TEXTS: Final = "ai.onnx.contrib"  # of what `described` puts before a model
_OF_TEXTS: Final = {
    *("BertTokenizer", "GPT2Tokenizer", "SentencepieceTokenizer"),
    *("StringEqual", "StringRegexReplace"),
}
_ENGINE_DOMAINS: Final = {"com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc"}


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """What the child found.

    Attributes:
        opset: Of the default domain.
        external: Files of external data, relative to the model's folder.
    """

    opset: int
    external: tuple[str, ...]


def probe(model: Path) -> Probe:
    """Return what a child process found out about the model file.

    Raises:
        CompileError: The file cannot be compiled, or reading it killed the child.
        UnsupportedOperator: It holds an operator that onnxruntime does not have.
        EnvironmentProblem: There is no room for temporary files.
    """
    try:
        info = model.stat()
    except OSError as error:
        raise CompileError(f"{model}: {error.strerror}") from None
    if not stat.S_ISREG(info.st_mode):
        raise CompileError(f"{model} is not a file")
    memory = _memory_bytes(info.st_size)
    try:
        # Made here, or it would outlive a child that is killed.
        with tempfile.TemporaryDirectory(prefix="lrai-probe-") as folder:
            paths = (os.fsencode(model), os.fsencode(folder))
            return run_task(inspect, paths, memory_bytes=memory, timeout_seconds=_TIMEOUT_SECONDS)
    except TaskError as error:
        problem = f"{model.name} cannot be read: {error}; the file may be damaged or hostile"
        raise CompileError(problem) from None
    except OSError as error:
        raise EnvironmentProblem(f"no folder for temporary files: {error.strerror}") from None
    except CompileError as error:
        raise type(error)(f"{model.name}: {error}") from None


def inspect(paths: tuple[bytes, bytes]) -> Probe:
    """Look at the file in this process, with a folder to write to; see `probe`.

    External data is onnx's to guard: since 1.21 its loader refuses what leaves the model's folder,
    links of both kinds, and places beyond the end of a file.
    """
    path, folder = (Path(os.fsdecode(one)) for one in paths)  # a name need not be text
    if path.stat().st_size >= _MAX_PROTOBUF_BYTES:
        raise CompileError("over 2 GB in one file: store its weights as external data")
    try:
        proto = onnx.load(path, load_external_data=False)
        own = MIN_OPSET if proto.opset_import else 0  # of one that uses other operators alone
        opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), own)
        if not (proto.graph.node and proto.graph.output and opset):
            raise CompileError("not an ONNX model: no operators, outputs or opset")
        _check_operators(proto)
        declared(proto)
        # those of attributes and subgraphs, too
        outside = (t for t in _get_all_tensors(proto) if t.data_location == t.EXTERNAL)
        external = sorted({ExternalDataInfo(tensor).location for tensor in outside})
        files = [path, *(path.parent / name for name in external)]
        limit_memory(_memory_bytes(sum(file.stat().st_size for file in files if file.is_file())))
        onnx.checker.check_model(path)
        whole = onnx.load(path) if external else proto
        _open(path, whole, opset, folder)
    except DecodeError as error:
        raise CompileError(f"not an ONNX model, or cut short: {error}") from None
    except (onnx.checker.ValidationError, ValueError, OSError) as error:
        text = " ".join(str(error).split()).replace(f"{path.parent}/", "")
        # One may lead to what is not for whoever made the model.
        if any(words in text for words in ("symbolic link", "hard links", "outside model")):
            text = f"{text[:200]} Name a copy without links, as cp -rL FOLDER COPY makes it"
        raise CompileError(f"not a valid ONNX model: {text[:300]}") from None
    return Probe(opset=opset, external=tuple(external))


def _check_operators(model: onnx.ModelProto) -> None:
    """Refuse the first operator that neither ONNX nor onnxruntime defines, by its name."""
    imported = model.opset_import
    versions = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in imported}
    local = {(f.domain, f.name) for f in model.functions}
    for node in _nodes(model.graph):
        domain = "" if node.domain == "ai.onnx" else node.domain
        known = (node.domain, node.op_type)
        texts = domain == _TEXTS and node.op_type in _OF_TEXTS
        if known in local or texts or domain in _ENGINE_DOMAINS:
            continue
        version = versions.get(domain, versions.get("", 0))
        if not onnx.defs.has(node.op_type, version, domain):
            name = f"{domain}:{node.op_type}" if domain else node.op_type
            raise UnsupportedOperator(
                f"operator {name} (node {node.name[:80]!r}) is unknown in opset {version}; "
                "custom operators are not supported"
            )


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _nodes(body)


def upgrade(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Return the model at opset 17.

    Raises:
        UnsupportedOperator: An operator of an older opset cannot be brought forward.
    """
    try:
        upgraded = onnx.version_converter.convert_version(model, MIN_OPSET)
        for node in _nodes(upgraded.graph) if opset < _RESIZES else ():
            if node.op_type == "Resize":  # which its converter takes for today's
                how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
                node.attribute.extend(onnx.helper.make_attribute(*pair) for pair in how.items())
        onnx.checker.check_model(upgraded)
    except (*_NOT_UPGRADED, onnx.checker.ValidationError) as error:
        text = " ".join(str(error).split()).rpartition("failed: ")[2][:200]
        why = f"the model has opset {opset} and cannot be upgraded to {MIN_OPSET}: {text}"
        raise UnsupportedOperator(why) from None
    return upgraded


def _open(path: Path, model: onnx.ModelProto, opset: int, folder: Path) -> None:
    """Load and run the model, upgraded where it has to be, as it is and optimised."""
    if opset < MIN_OPSET:
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        before, path = path, folder / path.name
        path.write_bytes(upgrade(model, opset).SerializeToString())
        check_loads(path)
        if opset >= _GUARANTEED:  # of an older one onnxruntime promises nothing
            _compare(before, path, declared(model).inputs)
    else:
        check_loads(path)


def _compare(model: Path, upgraded: Path, inputs: Sequence[TensorSpec]) -> None:
    """Refuse what answers otherwise at opset 17, on made-up values where it takes such.

    Raises:
        UnsupportedOperator: It does.
    """
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    what = f"brought to opset {MIN_OPSET} the model"
    why = f"export it with opset {MIN_OPSET} or later"
    try:
        compare(lambda rows: session.run(None, rows), upgraded, inputs, what=what, why=why)
    except CompileError as error:
        raise UnsupportedOperator(str(error)) from None


def _memory_bytes(model_bytes: int) -> int:
    return _BASE_MEMORY_BYTES + _MEMORY_FACTOR * model_bytes
