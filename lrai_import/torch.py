"""Models of PyTorch, in memory, to ONNX."""

from __future__ import annotations

import inspect
import re
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import is_dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import onnx

from lrai_core import CompileError, EnvironmentProblem, TensorSpec
from lrai_import.compared import compare, made_up
from lrai_import.onnx import NOTE

_OPSET: Final = 18
_ESCAPES: Final = re.compile("\x1b\\[[0-9;]*m")
_UNLIKE: Final = "torch answers no made-up rows twice alike: what was traced is not compared"


def convert(model: Any, inputs: Sequence[TensorSpec]) -> onnx.ModelProto:
    """Return the module in ONNX, traced with made-up values: zeros where they are integers.

    Args:
        model: A module, set to evaluation here; what torch.export gives runs as it was exported.
        inputs: By the names that its `forward` has for them, or else in its order; with symbols
            for free dimensions.

    Raises:
        EnvironmentProblem: torch or onnxscript is not installed.
        CompileError: It cannot be traced.
    """
    try:
        import torch

        if find_spec("onnxscript") is None:
            raise ImportError("torch says too late that it is missing", name="onnxscript")
    except ImportError as error:
        raise EnvironmentProblem(f"{error.name} is needed: pip install 'lrai[torch]'") from None
    if not inputs:
        raise CompileError("a module is traced with inputs: give rows, or a signature of tensors")
    if texts := [spec.name for spec in inputs if spec.datatype == "BYTES"]:
        raise CompileError(f"input {texts[0]!r} is of BYTES, which torch does not have")
    inputs = _in_order(model, inputs)
    given = {spec.name: made_up(spec) for spec in inputs}
    auto = torch.export.Dim.AUTO
    free = tuple(
        {i: auto for i, extent in enumerate(spec.shape) if not isinstance(extent, int)}
        for spec in inputs
    )
    unset = ""
    try:
        model.eval()
    except NotImplementedError:  # of what was exported as it runs, while it learnt perhaps
        model, unset = deepcopy(model), "; or it was exported in training: call eval() before that"

    def answer(rows: Mapping[str, Any]) -> list[tuple[str, Any]]:
        with torch.no_grad():
            return _named(model(*map(torch.from_numpy, rows.values())))

    with tempfile.TemporaryDirectory(prefix="lrai-torch-") as folder:
        path = Path(folder, "model.onnx")
        try:
            program = torch.onnx.export(
                model, tuple(map(torch.from_numpy, given.values())), dynamo=True,
                dynamic_shapes=free, opset_version=_OPSET, verbose=False,
            )  # fmt: skip
            if program is None:
                raise CompileError("torch gave no program")
            _name(program.model.graph, [*given], [name for name, _ in answer(given)])
            program.save(path)
        except (torch.onnx.OnnxExporterError, RuntimeError, TypeError, ValueError) as error:
            cause = error.__cause__ or error
            plain = _ESCAPES.sub("", str(cause)).strip()
            lines = plain.splitlines() or [type(cause).__name__]
            why = f"{type(model).__name__} cannot be converted: {lines[0][:300]}"
            raise CompileError(why) from None
        made = onnx.load(path)
        _check_free(made, inputs)
        what = f"{type(model).__name__}, traced,"
        why = "it may branch on an extent; use torch.cond, or fix it in the signature" + unset

        def arrays(rows: Mapping[str, Any]) -> list[Any]:
            return [torch.as_tensor(one).detach().numpy() for _, one in answer(rows)]

        if not compare(arrays, path, inputs, what=what, why=why):
            made.metadata_props.add(key=NOTE, value=_UNLIKE)
    return made


def _in_order(model: Any, inputs: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
    """Return inputs as `forward` takes them, where it has their names: a signature may differ."""
    try:
        takes = list(inspect.signature(model.forward).parameters)
    except (AttributeError, TypeError, ValueError):
        return inputs
    places = [takes.index(spec.name) if spec.name in takes else -1 for spec in inputs]
    if all(place in (-1, index) for index, place in enumerate(places)):
        return inputs
    if sorted(places) == list(range(len(inputs))):
        return sorted(inputs, key=lambda spec: takes.index(spec.name))
    given, known = (", ".join(names)[:200] for names in ([s.name for s in inputs], takes))
    raise CompileError(f"the signature has {given}, which is not how forward begins: {known}")


def _named(answer: Any, at: str = "") -> list[tuple[str, Any]]:
    """Return the tensors in what a module gives, in order, by keys and fields that lead to them."""
    if hasattr(answer, "_asdict") or (is_dataclass(answer) and not isinstance(answer, Mapping)):
        answer = getattr(answer, "_asdict", partial(vars, answer))()
    if isinstance(answer, Mapping):
        parts = [(f"{at}.{key}" if at else str(key), part) for key, part in answer.items()]
    elif isinstance(answer, list | tuple):
        parts = [(at and f"{at}.{place}", part) for place, part in enumerate(answer)]
    else:  # a whole number is an extent
        return [(at, answer)] if hasattr(answer, "numpy") or isinstance(answer, int) else []
    return [one for name, part in parts for one in _named(part, name)]


def _name(graph: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give inputs and outputs their names, and what is inside no such ones: torch has two alike."""
    own = [str(value.name) for value in graph.outputs]
    told = [name or old for name, old in zip(outputs, own, strict=False)]
    told = told if len({*told}) == len(outputs) == len(own) else own  # caches have no names
    given = [f"{name}_output" if name in inputs else name for name in told]
    names = dict(zip((*graph.outputs, *graph.inputs), (*given, *inputs), strict=True))
    inside = {value for node in graph.all_nodes() for value in node.outputs}
    for value in (inside | {*graph.initializers.values()}) - {*names}:
        value.name += ":inside" * (value.name in names.values())
    for value, name in names.items():
        value.name = name


def _check_free(made: onnx.ModelProto, inputs: Sequence[TensorSpec]) -> None:
    """Refuse what takes the extents only that it was traced with."""
    for spec, value in zip(inputs, made.graph.input, strict=True):
        dims = value.type.tensor_type.shape.dim
        for axis, (extent, dim) in enumerate(zip(spec.shape, dims, strict=True)):
            if not isinstance(extent, int) and dim.HasField("dim_value"):
                free = f"input {spec.name!r}: dimension {axis} is free in the signature"
                raise CompileError(f"{free}; the module, traced, takes {dim.dim_value} only")
