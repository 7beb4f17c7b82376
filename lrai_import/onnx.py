"""The importer of ONNX files: probed in a child, then read, inlined and brought to opset 17."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import onnx
import onnx.helper
import onnx.inliner
from google.protobuf.message import EncodeError

from lrai_core import CompileError, Imported, TaskError, run_task
from lrai_import.probe import MIN_OPSET, probe, upgrade

_BYTES: Final = 64 << 30  # address space, of which libraries reserve much and use little
_SECONDS: Final = 900
_NOTE: Final = 2000  # characters
NOTE: Final = "lrai.note"  # metadata: what of the making of a file its artifact is to tell
Told = TypeVar("Told")


class Job(msgspec.Struct, frozen=True):
    """What a child converts.

    Attributes:
        source: File or folder.
        kind: What the converter is told of it: its library, say.
        out: Where the ONNX file goes.
    """

    source: str
    kind: str
    out: str


def load_converted(
    convert: Callable[[Job], Told], source: Path, kind: str, notify: Callable[[str], None]
) -> tuple[Imported, Told]:
    """Return a model that a child process makes ONNX, which may die of it, and what that tells.

    Raises:
        CompileError: It cannot be converted; see `load`, too.
    """
    with tempfile.TemporaryDirectory(prefix="lrai-import-") as folder:
        job = Job(str(source), kind, str(Path(folder, "model.onnx")))
        try:
            told = run_task(convert, job, memory_bytes=_BYTES, timeout_seconds=_SECONDS)
        except TaskError as error:
            raise CompileError(f"{source.name} cannot be converted: {error}") from None
        return load(Path(job.out), notify), told


def load(path: Path, notify: Callable[[str], None]) -> Imported:
    """Return the model in the file, after a child process has survived reading it.

    Its local functions are inlined, and its opset is 17 or later; `notify` is told of an upgrade,
    and what `lrai fuse` has noted.
    The hash is of the file, and of its external data in order of name; or of a model without that.

    Raises:
        CompileError: Missing, not ONNX, cut short, or it cannot be brought to opset 17.
        UnsupportedOperator: It holds an operator that cannot be run or upgraded.
    """
    found = probe(path)
    digest = hashlib.sha256()
    for file in (path, *(path.parent / name for name in found.external)):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    model = onnx.load(path)
    if note := next((one for one in model.metadata_props if one.key == NOTE), None):
        notify("".join(filter(str.isprintable, str(note.value)[:_NOTE])))
        model.metadata_props.remove(note)
        with suppress(EncodeError):  # times in it are of one run, the model is the same after all
            digest = hashlib.sha256(model.SerializeToString(deterministic=True))
    if not any(opset.domain in ("", "ai.onnx") for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("", MIN_OPSET))  # it uses none of it
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value < 0:  # as some exporters write what is free
                dim.Clear()
    if model.functions:
        try:
            model = onnx.inliner.inline_local_functions(model)
        except (ValueError, EncodeError):
            why = "over 2 GB with local functions: export it without them"
            raise CompileError(why) from None
    if found.opset < MIN_OPSET:
        model = upgrade(model, found.opset)
        notify(f"opset {found.opset} upgraded to {MIN_OPSET}")
    # Until IR 4 every weight was an input, too; what has a value here is none.
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) < len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        model.ir_version = max(4, model.ir_version)
    return Imported(model=model, sha256=digest.hexdigest(), opset=max(found.opset, MIN_OPSET))
