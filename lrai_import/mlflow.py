"""Models that MLflow has logged, to ONNX: opened in a child process that may die of it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from mlflow.models import Model
from mlflow.types import ColSpec, DataType

from lrai_codecs.tensors import datatype_of
from lrai_core import (
    ArtifactError,
    CompileError,
    ConditionNotMet,
    EnvironmentProblem,
    TaskError,
    TensorSpec,
    UsageError,
    run_task,
)
from lrai_core.engine.engine import installed_version
from lrai_import import objects
from lrai_import.boosters import skops_is_safe

# By flavor which extra of ours brings what opens it; what is of several is of the first.
_EXTRAS: Final = {"pytorch": "torch", "lightgbm": "trees", "xgboost": "trees", "sklearn": "trees"}
_ONNX: Final = "onnx"
_NAMING: Final = ("sklearn", "xgboost")  # LightGBM goes by the place of a column, as ONNX
_BYTES: Final = 64 << 30  # address space, of which torch reserves much and uses little
_SECONDS: Final = 900
_PLAIN: Final = {"lightgbm": "lightgbm.basic.Booster", "xgboost": "xgboost.core.Booster"}
# Where MLflow finds what it opens, whatever else is said.
_DATA: Final = {"sklearn": "pickled_model", "pytorch": "model_data"}  # data of others
_NO_PICKLE: Final = "pickle_module_info.txt"  # in a folder of PyTorch's
_PICKLES: Final = (".pkl", ".pickle", ".pth", ".pt", ".pt2", ".joblib", ".cloudpickle")
# By the whole name what skops does not trust by itself, and does nothing but hold what was fitted:
# a module may hold a function of another one, which runs programs.
_TRUSTED: Final = frozenset((
    "collections.OrderedDict", "lightgbm.basic.Booster", "lightgbm.sklearn.LGBMClassifier",
    "lightgbm.sklearn.LGBMModel", "lightgbm.sklearn.LGBMRanker", "lightgbm.sklearn.LGBMRegressor",
    "numpy.dtype", "sklearn._loss.loss.HalfTweedieLossIdentity",
    "sklearn.calibration._CalibratedClassifier", "sklearn.calibration._SigmoidCalibration",
    "sklearn.cluster._bisect_k_means._BisectingTree",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.feature_selection._univariate_selection.f_classif",
    "sklearn.gaussian_process._gpc._BinaryGaussianProcessClassifierLaplace",
    "sklearn.gaussian_process.kernels.ConstantKernel", "sklearn.gaussian_process.kernels.Product",
    "sklearn.gaussian_process.kernels.RBF", "sklearn.gaussian_process.kernels.Sum",
    "sklearn.gaussian_process.kernels.WhiteKernel",
    "sklearn.metrics._dist_metrics.EuclideanDistance64", "sklearn.neighbors._ball_tree.BallTree",
    "sklearn.neighbors._kd_tree.KDTree",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
    "sklearn.tree._tree.Tree",
))  # fmt: skip
_NO_TENSORS: Final = (DataType.binary, DataType.datetime)  # of the types of columns


class Job(msgspec.Struct, frozen=True):
    """What the child opens.

    Attributes:
        folder: Of the model.
        flavor: Of the converter.
        inputs: What it takes.
        out: Where the ONNX file goes.
        scan: Whether there is something to look through first.
        data: File or folder below `folder` that is opened.
    """

    folder: str
    flavor: str
    inputs: tuple[TensorSpec, ...]
    out: str
    scan: bool
    data: str = "data"


def to_onnx(folder: Path, out: Path, *, allow_pickle: bool) -> tuple[Path, str, list[str]]:
    """Return a model as an ONNX file, the flavor that it was made from, and `fitted_with`.

    Args:
        folder: Of the model, with its `MLmodel`.
        out: Folder for the file, unless the model has one already.
        allow_pickle: Open what could run code of whoever made it; in a child process, and not where
            picklescan finds something. That is a precaution, no sandbox.

    Raises:
        UsageError: It is of no flavor that can be converted.
        ConditionNotMet: It could run code.
        UnusableFile: It cannot be opened or converted, or picklescan refuses it.
        EnvironmentProblem: A library that it takes is not installed.
    """
    model = Model.load(str(folder))
    flavor = next((f for f in (_ONNX, *_EXTRAS) if f in model.flavors), "")
    if not flavor:
        got, known = ", ".join(model.flavors), ", ".join((_ONNX, *_EXTRAS))
        raise UsageError(f"the model has the flavors {got}; what can be converted: {known}")
    configuration = model.flavors[flavor]
    own = str(configuration.get(_DATA.get(flavor, "data"), "data"))
    source = (folder / own).resolve()
    if not source.is_relative_to(folder.resolve()):  # it would be published
        raise ArtifactError("the model's data lies outside of it")
    if flavor == _ONNX:
        return source, flavor, []
    why = runs_code(folder, flavor, configuration)
    if why and not allow_pickle:
        raise ConditionNotMet(
            f"the {flavor} model may run code of whoever made it when it is opened: {why}; "
            "allow_pickle=True (--allow-pickle) opens it in a child process, after picklescan"
        )
    made = out / "model.onnx"
    job = Job(str(folder), flavor, inputs_of(model), str(made), bool(why), own)
    try:
        columns = run_task(open_and_convert, job, memory_bytes=_BYTES, timeout_seconds=_SECONDS)
    except TaskError as error:
        raise CompileError(f"the {flavor} model cannot be opened: {error}") from None
    return made, flavor, columns


def runs_code(folder: Path, flavor: str, configuration: dict[str, Any]) -> str:
    """Return why opening a model could run code of whoever made it; empty if it could not."""
    if configuration.get("code"):
        return "it carries Python code of its own"
    if flavor == "pytorch":  # every form that MLflow has is or holds a pickle
        return f"it is or holds a pickle ({configuration.get('model_data', 'data')})"
    # What xgboost's loader imports, and what LightGBM's takes for no plain booster but a model of
    # scikit-learn; exactly as MLflow compares it.
    made_of = str(configuration.get("model_class", _PLAIN.get(flavor, flavor)))
    as_sklearn = flavor == "sklearn" or (flavor == "lightgbm" and made_of != _PLAIN[flavor])
    if as_sklearn and configuration.get("serialization_format", "pickle") != "skops":
        file = configuration.get("pickled_model", configuration.get("data", "model.pkl"))
        return f"it is a pickle ({file})"
    if as_sklearn and not skops_is_safe(installed_version("skops")):
        return "it is of skops, which below 0.13 may run code"
    trusted = configuration.get("skops_trusted_types") or ()
    if any(str(name) not in _TRUSTED for name in trusted):
        return f"it names types that skops is to trust: {', '.join(map(str, trusted))[:200]}"
    if made_of.split(".", maxsplit=1)[0] != flavor:
        return f"it is to be loaded as a {made_of[:100]}"
    pickles = [path for path in folder.rglob("*") if path.suffix.lower() in _PICKLES]
    return f"it is or holds a pickle ({pickles[0].relative_to(folder)})" if pickles else ""


def inputs_of(model: Model) -> tuple[TensorSpec, ...]:
    """Return what a model's signature says of its inputs; nothing where it has none.

    Raises:
        CompileError: A column is of a type that no tensor has.
    """
    found = []
    schema = model.signature.inputs if model.signature is not None else None
    if schema and "pytorch" in model.flavors and not schema.is_tensor_spec():
        # `mlflow.pytorch` gives a module all columns of a table as one tensor.
        return (TensorSpec(name="features", datatype="FP32", shape=("batch", len(schema.inputs))),)
    for index, spec in enumerate(schema.inputs if schema else ()):
        name = spec.name or f"input_{index}"
        shape, kind = list[int | str](["batch"]), spec.type
        if isinstance(spec, ColSpec):
            if not isinstance(kind, DataType) or kind in _NO_TENSORS:
                raise CompileError(f"column {name!r} is of type {kind}, which no tensor has")
            kind = kind.to_numpy()
        else:
            shape = [
                (f"{name}.{axis}" if axis else "batch") if extent == -1 else extent
                for axis, extent in enumerate(spec.shape)
            ]
        datatype = datatype_of(np.empty(0, kind))
        found.append(TensorSpec(name=name, datatype=datatype, shape=tuple(shape)))
    return tuple(found)


def open_and_convert(job: Job) -> list[str]:
    """Write a model as ONNX; return `fitted_with`.

    Raises:
        CompileError: picklescan found something, or it cannot be converted.
        EnvironmentProblem: A library that it takes is not installed.
    """
    if job.scan:
        _scan(Path(job.folder), job.data)
    how = {"map_location": "cpu"} if job.flavor == "pytorch" else {}  # wherever it was trained
    try:
        model = importlib.import_module(f"mlflow.{job.flavor}").load_model(job.folder, **how)
    except ImportError as error:
        needed = f"{error.name} is needed to open it: pip install 'lrai[{_EXTRAS[job.flavor]}]'"
        own = f" and {job.flavor}" * (job.flavor in ("lightgbm", "xgboost"))
        raise EnvironmentProblem(f"{needed}{own} ({error})") from None
    columns = fitted_with(model) if job.flavor in _NAMING else []
    # A signature may have more, which nobody has to send.
    fitted = [one for one in job.inputs if one.name in columns]
    try:
        objects.to_onnx(model, fitted if len(fitted) == len(columns) > 0 else job.inputs, job.out)
    except UsageError as error:  # which is not carried back
        raise CompileError(str(error)) from None
    return columns


def fitted_with(model: Any) -> list[str]:
    """Return the columns that a table has to have for a model, in order; none if it takes any.

    Else it refuses the table, but ONNX has no names for them.
    """
    names = getattr(model, "feature_names_in_", getattr(model, "feature_names", None))
    return list(map(str, () if names is None else names))


def _scan(folder: Path, data: str) -> None:
    own = folder / data
    try:
        from picklescan.scanner import SafetyLevel, scan_bytes, scan_directory_path
    except ImportError:
        how = "pip install 'lrai[trees]', or 'lrai[torch]' for a model of PyTorch"
        why = f"picklescan is needed before a pickle is opened: {how}"
        raise EnvironmentProblem(why) from None
    found = scan_directory_path(str(folder))
    # It passes over names that it does not know, and MLflow opens what the model names.
    inside = [path for path in own.rglob("*") if path.is_file() and path.name != _NO_PICKLE]
    for file in (own,) if own.is_file() else inside:
        with file.open("rb") as stream:
            found.merge(scan_bytes(stream, str(file), file.suffix.lower()))
    bad = [f"{g.module}.{g.name}" for g in found.globals if g.safety is SafetyLevel.Dangerous]
    if found.issues_count or found.scan_err:
        what = f"uses {', '.join(sorted(bad))[:200]}" if bad else "cannot be looked through"
        raise CompileError(f"picklescan refuses the model: a pickle in it {what}")
