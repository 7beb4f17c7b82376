"""SavedModels of TensorFlow to ONNX, in a child process, which TensorFlow has for itself.

It is no sandbox: a SavedModel is a program, which TensorFlow runs to see what it answers.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import onnx

from lrai_core import CompileError, EnvironmentProblem, Imported, check_loads, declared
from lrai_import.compared import alike, compare, made_up
from lrai_import.onnx import Job, load_converted

_GRAPH: Final = "saved_model.pb"


def load(path: Path, notify: Callable[[str], None], signature: str = "") -> Imported:
    """Return a signature of the SavedModel in a folder; inputs and outputs have its names for them.

    `notify` is told where TensorFlow answers nothing that is made up, so that they could not be
    compared. The hash is of all files in the folder, in order of their names.

    Raises:
        CompileError: It is no SavedModel, has no such signature, or cannot be converted.
        UnsupportedOperator: It holds an operator that has no form in ONNX.
        EnvironmentProblem: TensorFlow or tf2onnx is not installed.
    """
    path = path.resolve()
    if not (path / _GRAPH).is_file():
        raise CompileError(f"{path.name} is a folder without {_GRAPH}; needed is a SavedModel")
    found, compared = load_converted(convert, path, signature, notify)
    if not compared:
        notify("TensorFlow takes no made-up rows, so that what was converted is not compared")
    found.model.graph.ClearField("doc_string")  # in which tf2onnx names the folder
    digest = hashlib.sha256()
    for file in sorted(one for one in path.rglob("*") if one.is_file()):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return replace(found, sha256=digest.hexdigest())


def convert(job: Job) -> bool:
    """Write a SavedModel as ONNX; return whether it was compared with what TensorFlow answers.

    `job.kind` is the signature; empty for `serving_default`, or the only one.

    Raises:
        CompileError: It cannot be read or converted, or answers otherwise than TensorFlow.
        UnsupportedOperator: It holds an operator that has no form in ONNX.
        EnvironmentProblem: TensorFlow or tf2onnx is not installed.
    """
    try:
        import tensorflow as tf
        from tf2onnx.convert import main
    except ImportError as error:
        needed = f"{error.name} is needed: pip install 'lrai[tensorflow]'"
        raise EnvironmentProblem(needed) from None
    tf.config.set_visible_devices([], "GPU")
    try:
        model = tf.saved_model.load(job.source)
        name = _signature(model, job.kind)
        # Its command line is what tf2onnx promises to keep.
        command = ["--saved-model", job.source, f"--signature_def={name}", "--opset", "18"]
        sys.argv[1:] = [*command, "--output", job.out]
        main()
    except (tf.errors.OpError, OSError, RuntimeError, ValueError, TypeError, LookupError) as error:
        said = str(error).replace(f"{Path(job.source).parent}/", "").strip() or type(error).__name__
        why = f"the SavedModel cannot be converted: {said.splitlines()[0][:300]}"
        raise CompileError(why) from None
    check_loads(Path(job.out))
    made = onnx.shape_inference.infer_shapes(onnx.load(job.out))  # some outputs come without
    served = declared(made)

    def answer(rows: Mapping[str, Any]) -> list[Any]:
        outputs = model.signatures[name](**{key: tf.constant(rows[key]) for key in rows})
        return [outputs[one.name].numpy() for one in served.outputs]

    def first(rows: int, more: int = 0) -> list[Any] | None:
        """Return what comes first in answers to so many rows, of each input more than before.

        None where they are refused.
        """
        values = {s.name: made_up(s, rows + more * k) for k, s in enumerate(served.inputs)}
        with suppress(Exception):
            return [one[:1] for one in answer(values)]
        return None

    unequal, two, one = first(2, 1), first(2), first(1)
    # Rows of several inputs go together where they have to, or where each is answered by itself.
    if len(served.inputs) == 1 or not unequal or (two and one and alike(two, one)):
        for dim in (d for given in made.graph.input for d in given.type.tensor_type.shape.dim[:1]):
            if dim.dim_param:  # free, which is to say that there are as many as rows
                dim.dim_param = "batch"
    onnx.save(made, job.out)
    what, why = "the SavedModel, converted,", "tf2onnx has taken something for something else"
    return compare(answer, Path(job.out), declared(made).inputs, what=what, why=why)


def _signature(model: Any, wanted: str) -> str:
    """Return the name of the signature that is wanted, whose inputs all have a rank."""
    known = [name for name in model.signatures if not name.startswith("_")]
    name = wanted or (known[0] if len(known) == 1 else "serving_default")
    if name not in known:
        has = f"the SavedModel has no signature {name!r}, its own are: {', '.join(known) or 'none'}"
        raise CompileError(f"{has}; a .toml names one: signature = 'NAME'")
    for given in model.signatures[name].structured_input_signature[1].values():
        if given.shape.rank is None:  # which tf2onnx takes for a single number
            raise CompileError(f"input {given.name!r} has a dynamic rank; give it a shape")
    return name
