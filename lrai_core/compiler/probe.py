"""First look at a model file, in a process that may die.

Started as `python -P -m lrai_core.compiler.probe FILE`, it parses, checks external data, loads the
graph into onnxruntime, and prints one JSON object. Parsers have crashed on hostile files; here that
costs a child.
"""

from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from lrai_core.errors import CompileError, EnvironmentProblem, UnsupportedOperator

if TYPE_CHECKING:
    import onnx  # imported in the child only

MIN_OPSET: Final = 17
_TIMEOUT_SECONDS: Final = 600
_BASE_MEMORY_BYTES: Final = 8 << 30  # address space, of which libraries reserve much and use little
_MEMORY_FACTOR: Final = 4  # the file, its parsed form, and the engine's packed copy
_MAX_PROTOBUF_BYTES: Final = 1 << 31
_ENGINE_DOMAINS: Final = {"com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc"}


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """What the child found.

    Attributes:
        problem: Why the model cannot be compiled, empty where it can.
        unsupported: Whether the problem is an operator.
        opset: Of the default domain.
        external: Files of external data, relative to the model's folder.
    """

    problem: str = ""
    unsupported: bool = False
    opset: int = 0
    external: tuple[str, ...] = ()


def probe(model: Path) -> Probe:
    """Return what a child process found out about the model file.

    Raises:
        CompileError: The file cannot be compiled, or reading it killed the child.
        UnsupportedOperator: It holds an operator that onnxruntime does not have.
    """
    try:
        info = model.stat()
    except OSError as error:
        raise CompileError(f"{model}: {error.strerror}") from None
    if not stat.S_ISREG(info.st_mode):
        raise CompileError(f"{model} is not a file")
    command = [sys.executable, "-P", "-m", "lrai_core.compiler.probe", str(model)]
    try:
        child = subprocess.run(
            command,
            capture_output=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise CompileError(f"{model.name}: reading it took over {_TIMEOUT_SECONDS} s") from None
    except OSError as error:
        raise EnvironmentProblem(f"{sys.executable} cannot be started: {error.strerror}") from None
    if child.returncode < 0:
        raise CompileError(
            f"{model.name} killed the process that read it (signal {-child.returncode}); "
            "the file is damaged or hostile"
        )
    try:
        found = msgspec.json.decode(child.stdout, type=Probe)
    except msgspec.MsgspecError:
        last = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise CompileError(f"{model.name} cannot be read: {' '.join(last)[:300]}") from None
    if found.problem:
        kind = UnsupportedOperator if found.unsupported else CompileError
        raise kind(f"{model.name}: {found.problem}")
    return found


def inspect(path: Path) -> Probe:
    """Look at the file in this process; see `probe`.

    External data is onnx's to guard: since 1.21 its loader refuses what leaves the model's folder,
    links of both kinds, and places beyond the end of a file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if path.stat().st_size >= _MAX_PROTOBUF_BYTES:
        return Probe(problem="over 2 GB in one file: store its weights as external data")
    try:
        model = onnx.load(path, load_external_data=False)
        opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
        if not (model.graph.node and model.graph.output and opset):
            return Probe(problem="not an ONNX model: no operators, outputs or opset")
        if unknown := _unknown_operator(model):
            return Probe(problem=unknown, unsupported=True)
        if problem := _unusable_interface(model):
            return Probe(problem=problem)
        external = sorted(set(_external(model)))
        files = [path.parent / name for name in external]
        _limit_memory(sum(file.stat().st_size for file in (path, *files) if file.is_file()))
        onnx.checker.check_model(str(path))
        whole = onnx.load(path) if external else model
        problem, unsupported = _engine_refuses(path, whole, opset)
    except DecodeError as error:
        return Probe(problem=f"not an ONNX model, or cut short: {error}")
    except (onnx.checker.ValidationError, ValueError, OSError) as error:
        text = " ".join(str(error).split()).replace(f"{path.parent}/", "")
        return Probe(problem=f"not a valid ONNX model: {text[:300]}")
    return Probe(problem=problem, unsupported=unsupported, opset=opset, external=tuple(external))


def _external(model: onnx.ModelProto) -> Iterator[str]:
    """Yield the location of every tensor that is stored outside the file."""
    from onnx.external_data_helper import ExternalDataInfo, _get_all_tensors

    for tensor in _get_all_tensors(model):  # those of attributes and subgraphs, too
        if tensor.data_location == tensor.EXTERNAL:
            yield ExternalDataInfo(tensor).location


def _unknown_operator(model: onnx.ModelProto) -> str:
    """Name the first operator that neither ONNX nor onnxruntime defines, empty if none."""
    import onnx

    versions = {o.domain: o.version for o in model.opset_import}
    local = {(f.domain, f.name) for f in model.functions}
    for node in _nodes(model.graph):
        domain = "" if node.domain == "ai.onnx" else node.domain
        if (node.domain, node.op_type) in local or domain in _ENGINE_DOMAINS:
            continue
        version = versions.get(node.domain, versions.get("", 0))
        if not onnx.defs.has(node.op_type, version, domain):
            name = f"{domain}:{node.op_type}" if domain else node.op_type
            return (
                f"operator {name} (node {node.name[:80]!r}) is unknown in opset {version}; "
                "custom operators are not supported"
            )
    return ""


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _unusable_interface(model: onnx.ModelProto) -> str:
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if not inputs:
        return "the model has no inputs"
    for value in inputs:
        if value.type.WhichOneof("value") != "tensor_type":
            return f"input {value.name[:80]!r} is not a tensor"
        if not value.type.tensor_type.HasField("shape"):
            return f"input {value.name[:80]!r} has a dynamic rank; give it a shape"
    return ""


def upgrade(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Return the model at opset 17.

    Raises:
        UnsupportedOperator: An operator of an older opset cannot be brought forward.
    """
    import onnx
    import onnx.version_converter

    try:
        upgraded = onnx.version_converter.convert_version(model, MIN_OPSET)
        onnx.checker.check_model(upgraded)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        text = " ".join(str(error).split()).rpartition("failed: ")[2][:200]
        raise UnsupportedOperator(
            f"the model has opset {opset} and cannot be upgraded to {MIN_OPSET}: {text}"
        ) from None
    return upgraded


def _engine_refuses(path: Path, model: onnx.ModelProto, opset: int) -> tuple[str, bool]:
    """Return why the engine does not open the model, and whether an operator is the reason."""
    from lrai_core.engine.onnxruntime import OnnxRuntime, is_about_operator
    from lrai_core.errors import ArtifactError

    with tempfile.TemporaryDirectory(prefix="lrai-probe-") as folder:
        try:
            if opset < MIN_OPSET:
                path = Path(folder, path.name)
                path.write_bytes(upgrade(model, opset).SerializeToString())
            for optimise in (False, True):
                OnnxRuntime().load(path, optimise=optimise)
        except UnsupportedOperator as error:
            return str(error), True
        except ArtifactError as error:
            return str(error), is_about_operator(error)
    return "", False


def _limit_memory(model_bytes: int) -> None:
    """Keep a constant that claims more memory than there is from taking the machine's."""
    memory = _BASE_MEMORY_BYTES + _MEMORY_FACTOR * model_bytes
    resource.setrlimit(resource.RLIMIT_AS, (memory, resource.RLIM_INFINITY))


def main(argv: list[str]) -> None:
    """Print what `inspect` finds."""
    path = Path(argv[0])
    _limit_memory(path.stat().st_size)
    with Path(os.devnull).open("wb") as nowhere:
        answer = os.dup(1)
        os.dup2(nowhere.fileno(), 1)  # libraries may print; the answer is one JSON object
        found = inspect(path)
        os.write(answer, json.dumps(msgspec.structs.asdict(found)).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
