"""Models in memory, of PyTorch, scikit-learn, LightGBM and XGBoost, to an ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import onnx
from numpy.typing import ArrayLike

from lrai_core import CompileError, TensorSpec, UsageError

_CONVERTERS: Final = {  # by the package that a class of the model comes from
    "torch": "torch:convert",
    "lightgbm": "trees:convert_lightgbm",
    "xgboost": "trees:convert_xgboost",
    "sklearn": "sklearn:convert",  # last: estimators of the others are of its classes, too
}
_KINDS: Final = dict.fromkeys("OSU", "BYTES") | {"b": "BOOL", "i": "INT", "u": "UINT", "f": "FP"}
_INLINE_BYTES: Final = 1024  # larger tensors lie in a file beside: one has 2 GB at most


def to_onnx(
    model: Any, inputs: Mapping[str, ArrayLike] | Sequence[TensorSpec], out: str | Path
) -> Path:
    """Write a model as an ONNX file, and its weights as `NAME.data` beside it; return the file.

    Args:
        model: A module or an exported program of PyTorch, or a fitted estimator, pipeline or
            booster of scikit-learn, LightGBM or XGBoost. Some converters leave a mark on it.
        inputs: By name an array of rows as callers send them, whose first dimension is free and
            whose others are not; or what the model declares, with a symbol for each free dimension.
            A module has them by the names of its `forward`, or in its order.
        out: The file to write.

    Raises:
        UsageError: The model is of no library that is known, or an array of no datatype that is.
        CompileError: It cannot be converted.
        UnsupportedOperator: It has no form in ONNX.
        EnvironmentProblem: The converter is not installed.
    """
    packages = [kind.__module__.partition(".")[0] for kind in type(model).__mro__]
    package = next((name for name in _CONVERTERS if name in packages), "")
    if not package:
        got, known = f"{type(model).__module__}.{type(model).__name__}", ", ".join(_CONVERTERS)
        raise UsageError(f"the model is a {got[:120]}; what can be converted is of {known}")
    if type(model).__name__ == "ExportedProgram":
        model = model.module()
    home, _, name = _CONVERTERS[package].partition(":")
    convert: Callable[..., onnx.ModelProto] = getattr(import_module(f"lrai_import.{home}"), name)
    specs = _declared(inputs) if isinstance(inputs, Mapping) else tuple(inputs)
    made, out = convert(model, specs), Path(out)
    beside = out.with_name(f"{out.name}.data")
    try:
        beside.unlink(missing_ok=True)  # onnx would add to it
        onnx.save(
            made,
            out,
            save_as_external_data=True,
            location=beside.name,
            size_threshold=_INLINE_BYTES,
        )
    except OSError as error:
        raise CompileError(f"{out} cannot be written: {error.strerror}") from None
    return out


def refuse(path: Path, _: object) -> NoReturn:
    """Refuse an exported program of PyTorch in a file: an importer, which runs no code of others.

    Raises:
        CompileError: Always. Pickles may be in it, and names of functions that are looked up.
    """
    name = path.name[:120]
    why = f"{name!r} may run code of whoever made it when torch opens it; where you trust it, "
    how = f'lrai_import.objects.to_onnx(torch.export.load({name!r}), inputs, "model.onnx")'
    raise CompileError(f"{why}{how} makes an ONNX file of it")


def _declared(inputs: Mapping[str, ArrayLike]) -> tuple[TensorSpec, ...]:
    """Return what these arrays are rows of."""
    specs = []
    for name, given in inputs.items():
        rows = np.asarray(given)
        kind, shape = rows.dtype.kind, ("batch", *rows.shape[1:])
        if kind not in _KINDS or not rows.ndim:
            got = f"{rows.dtype} {list(rows.shape)}"
            raise UsageError(f"input {name[:120]!r} is {got}; needed are rows of numbers or texts")
        bits = 8 * rows.dtype.itemsize if kind in "iuf" else ""
        specs.append(TensorSpec(name=name, datatype=f"{_KINDS[kind]}{bits}", shape=shape))
    return tuple(specs)
