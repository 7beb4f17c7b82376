"""Models in memory, of PyTorch, scikit-learn, LightGBM and XGBoost: compiled, or as ONNX files."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NoReturn
from zipfile import BadZipFile, ZipFile

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray

import lrai_core
from lrai_codecs.tensors import datatype_of
from lrai_core import Artifact, CompileError, TensorSpec, UsageError
from lrai_import.sklearn import FEATURES

_CONVERTERS: Final = {  # by the package that a class of the model comes from
    "torch": "torch:convert",
    "lightgbm": "trees:convert_lightgbm",
    "xgboost": "trees:convert_xgboost",
    "sklearn": "sklearn:convert",  # last: estimators of the others are of its classes, too
}
_INLINE: Final = 1024  # bytes; larger tensors lie in a file beside: one has 2 GB at most


def compile(
    model: Any, inputs: Mapping[str, ArrayLike] | Sequence[TensorSpec] | None = None, **options: Any
) -> Artifact:
    """Compile a model as `to_onnx` writes it; `lrai_core.compile` comes here with what is no file.

    Args:
        model: See `to_onnx`, as of `inputs`.
        inputs: By default the arrays of `calibration`, or else of `evaluation` without `label` and
            `groups`, unless the model was fitted with columns of these names; in single precision
            where they are in double precision and no parameter of the model is. Columns of numbers
            are one table, `features`, but where a ColumnTransformer asks for them by name.
        options: Of `lrai_core.compile`.

    Raises:
        UsageError: See `to_onnx` and `lrai_core.compile`, as of all others.
    """
    inspect.signature(lrai_core.compile).bind(model, **options)  # before the work
    specs = _declared(_rows(model, options)) if inputs is None else inputs
    with TemporaryDirectory(prefix="lrai-object-") as folder:
        return lrai_core.compile(to_onnx(model, specs, Path(folder, "model.onnx")), **options)


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
        # What is there stays until both are whole.
        with TemporaryDirectory(prefix=".lrai-", dir=out.parent) as folder:
            new = Path(folder, out.name)
            onnx.save(
                made, new, save_as_external_data=True, location=beside.name, size_threshold=_INLINE
            )
            beside.unlink(missing_ok=True)
            for one in sorted(Path(folder).iterdir(), reverse=True):
                one.replace(out.with_name(one.name))
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
    how = f'lrai_core.compile(torch.export.load({name!r}), out="model.lrai", …)'
    raise CompileError(f"{why}{how} compiles it")


def _rows(model: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the arrays given that are inputs, by name and without rows."""
    data, groups = options.get("calibration"), ()  # which has inputs alone, groups among them
    if data is None:
        data, groups = options.get("evaluation"), options.get("groups", ())
    apart, given = {"label", *groups} - {*getattr(model, "feature_names_in_", ())}, _told(data)
    weights = getattr(model, "parameters", tuple)
    double = not isinstance(model, type) and any(str(w.dtype) == "torch.float64" for w in weights())
    rows = {name: _native(np.atleast_1d(given[name])[:0]) for name in given if name not in apart}
    single = [name for name, own in rows.items() if own.dtype == np.float64 and not double]
    return rows | {name: rows[name].astype(np.float32) for name in single}


def _told(data: Any) -> Mapping[str, Any]:
    """Return arrays by name; of a file without rows, which may be too many for memory."""
    if data is None or isinstance(data, Mapping):
        return data or {}
    path, found = Path(data), dict[str, Any]()
    try:
        if path.suffix == ".npy":
            return {FEATURES: np.load(path, mmap_mode="r")}
        with ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as stream:
                    np.lib.format.read_magic(stream)
                    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
                    found[name.removesuffix(".npy")] = np.empty((0, *shape[1:]), dtype)
    except (OSError, ValueError, EOFError, RuntimeError, zlib.error, BadZipFile) as error:
        raise CompileError(f"{path.name} cannot be read: {str(error)[:200]}") from None
    return found


def _native(rows: NDArray[Any]) -> NDArray[Any]:
    return rows.astype(rows.dtype.newbyteorder("="), copy=False)


def _declared(inputs: Mapping[str, ArrayLike]) -> tuple[TensorSpec, ...]:
    """Return what these arrays are rows of."""
    specs = []
    for name, given in inputs.items():
        rows = _native(np.asarray(given))
        if rows.dtype.kind not in "OSUbiuf" or not rows.ndim:
            got = f"{rows.dtype} {list(rows.shape)}"
            raise UsageError(f"input {name[:120]!r} is {got}; needed are rows of numbers or texts")
        shape = ("batch", *rows.shape[1:])
        specs.append(TensorSpec(name=name, datatype=datatype_of(rows), shape=shape))
    return tuple(specs)
