"""Models of LightGBM and XGBoost, in memory, to ONNX; where their libraries are installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Final

import numpy as np
import onnx
import onnx.helper

from lrai_core import CompileError, EnvironmentProblem, TensorSpec
from lrai_import.sklearn import FEATURES, ROWS, checked, first_line, is_same, session_of, width

_OPSET = 15  # what the converters write; the importer of ONNX brings it to 17
_OPERATORS: Final = {"lightgbm": "LightGbm", "xgboost": "XGBoost"}


def convert_lightgbm(model: Any, inputs: Sequence[TensorSpec]) -> onnx.ModelProto:
    """Return a booster or an estimator of LightGBM in ONNX; see `lrai_import.sklearn.convert`."""
    return _convert("lightgbm", model, inputs, {"zipmap": False})


def convert_xgboost(model: Any, inputs: Sequence[TensorSpec]) -> onnx.ModelProto:
    """Return a booster or an estimator of XGBoost in ONNX; see `lrai_import.sklearn.convert`."""
    return _convert("xgboost", model, inputs, {})


def know(part: Any) -> None:
    """Let skl2onnx know an estimator of LightGBM or XGBoost that is part of another model.

    Raises:
        CompileError: It was fitted on categories.
        EnvironmentProblem: onnxmltools is not installed.
    """
    kind = type(part).__module__.partition(".")[0]
    if kind not in _PREPARE or not part.__sklearn_is_fitted__():  # as templates of others are not
        return
    try:
        from skl2onnx import update_registered_converter
        from skl2onnx.common import shape_calculator as shapes

        home = f"onnxmltools.convert.{kind}.operator_converters.{_OPERATORS[kind]}"
        converter = getattr(import_module(home), f"convert_{kind}")
    except ImportError:
        raise EnvironmentProblem("onnxmltools is needed: pip install 'lrai[trees]'") from None
    _PREPARE[kind](part)
    what = "classifier" if hasattr(part, "predict_proba") else "regressor"
    shape = getattr(shapes, f"calculate_linear_{what}_output_shapes")
    options = {"zipmap": [True, False], "nocl": [True, False]} if what == "classifier" else None
    alias = f"{kind}.{type(part).__name__}"
    update_registered_converter(type(part), alias, shape, converter, options=options)


def converters(*, splits: bool) -> dict[str, Any]:
    """Return what has skl2onnx calculate as precisely as scikit-learn does where it matters.

    That is of k-means, and where XGBoost `splits` at values that its rows have what is scaled
    before it: on which side one is, the last bit says.
    """
    from skl2onnx.shape_calculators import k_means, scaler
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.preprocessing import StandardScaler

    shapes = k_means.calculate_sklearn_kmeans_output_shapes
    own = dict.fromkeys((KMeans, MiniBatchKMeans), (_cluster, shapes))
    if splits:
        own[StandardScaler] = _scale, scaler.calculate_sklearn_scaler_output_shapes
    names = ("custom_conversion_functions", "custom_shape_calculators")
    return {name: {kind: how[at] for kind, how in own.items()} for at, name in enumerate(names)}


def _cluster(scope: Any, operator: Any, container: Any) -> None:
    """Tell distances around the middle of all centres: squares of what is far from zero are rough.

    Rounding may have that of no distance below 0, whose root would be NaN.
    """
    from skl2onnx.algebra import onnx_ops as onnx_

    told, opset = operator.raw_operator.cluster_centers_, {"op_version": container.target_opset}
    own = (told - (middle := told.mean(axis=0).astype(np.float32))).astype(np.float32)
    moved = onnx_.OnnxCast(*operator.inputs, to=onnx.TensorProto.FLOAT, **opset)
    moved = onnx_.OnnxSub(moved, middle, **opset)
    size = onnx_.OnnxReduceSumSquare(moved, axes=[1], **opset)
    size = onnx_.OnnxAdd(size, np.square(own).sum(axis=1), **opset)
    size = onnx_.OnnxAdd(onnx_.OnnxMatMul(moved, -2 * own.T, **opset), size, **opset)
    best, far = ([one.full_name] for one in operator.outputs)
    onnx_.OnnxArgMin(size, axis=1, keepdims=0, output_names=best, **opset).add_to(scope, container)
    size = onnx_.OnnxRelu(size, **opset)
    onnx_.OnnxSqrt(size, output_names=far, **opset).add_to(scope, container)


def _scale(scope: Any, operator: Any, container: Any) -> None:
    from skl2onnx.algebra.onnx_ops import OnnxCast, OnnxDiv, OnnxSub
    from skl2onnx.operator_converters.common import concatenate_variables

    scaler, opset = operator.raw_operator, {"op_version": container.target_opset}
    made = concatenate_variables(scope, operator.inputs, container)
    made = OnnxCast(made, to=onnx.TensorProto.DOUBLE, **opset)
    made = OnnxSub(made, scaler.mean_, **opset) if scaler.with_mean else made
    made = OnnxDiv(made, scaler.scale_, **opset) if scaler.with_std else made
    opset["output_names"] = [operator.outputs[0].full_name]
    OnnxCast(made, to=onnx.TensorProto.FLOAT, **opset).add_to(scope, container)


def _prepare_lightgbm(model: Any) -> None:
    if getattr(getattr(model, "booster_", model), "pandas_categorical", None):
        raise CompileError("it was fitted on categories of pandas, whose values ONNX does not have")
    if (classes := getattr(model, "_classes", None)) is not None and classes.dtype.kind in "bu":
        vars(model)["_classes"] = classes.astype(int)  # its converter takes these for texts


def _prepare_xgboost(model: Any) -> None:
    booster = model.get_booster() if hasattr(model, "get_booster") else model
    if "c" in (booster.feature_types or ()):
        raise CompileError("it was fitted on categories, whose values ONNX does not have")
    if any(f'"name":"{kind}"' in booster.save_config() for kind in ("dart", "gblinear")):
        raise CompileError("its booster is 'dart' or 'gblinear', which its converter does not know")
    booster.feature_names = None  # its converter knows numbered ones only


_PREPARE: Final = {"lightgbm": _prepare_lightgbm, "xgboost": _prepare_xgboost}


def _convert(
    kind: str, model: Any, inputs: Sequence[TensorSpec], options: dict[str, Any]
) -> onnx.ModelProto:
    try:
        import onnxmltools
        from onnxmltools.convert.common.data_types import FloatTensorType
    except ImportError:
        raise EnvironmentProblem("onnxmltools is needed: pip install 'lrai[trees]'") from None
    if any(spec.datatype == "BYTES" for spec in inputs):
        raise CompileError("columns of text cannot be features of trees")
    _PREPARE[kind](model)
    features = width(inputs) if inputs else _features(model)
    converter: Callable[..., Any] = getattr(onnxmltools, f"convert_{kind}")
    name = inputs[0].name if len(inputs) == 1 and inputs[0].name else FEATURES
    types = [(name, FloatTensorType([None, features]))]
    try:
        made = converter(model, initial_types=types, target_opset=_OPSET, **options)
        found = checked(made, types)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        why = f"{type(model).__name__} cannot be converted: {first_line(error)}"
        raise CompileError(why) from None
    if not any(opset.domain == "" for opset in found.opset_import):  # where it uses none of it
        found.opset_import.append(onnx.helper.make_opsetid("", _OPSET))
    _compare(model, found, features)
    return found


def _compare(model: Any, made: onnx.ModelProto, features: int) -> None:
    """Refuse what answers otherwise: converters pass over objectives that they do not know.

    The rows are whole numbers of all sizes, since a category is one, and zeros and missing values.
    """
    random = np.random.default_rng(0)
    rows = random.standard_normal((ROWS, features)) * 10.0 ** random.integers(0, 4, (ROWS, 1))
    rows = np.rint(rows).astype(np.float32)
    rows[random.random(rows.shape) < 0.05] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of columns that had names
        expected = np.asarray(_predicted(model, rows), np.float64).reshape(ROWS, -1)
    session = session_of(made)
    *_, scores = session.run(None, {session.get_inputs()[0].name: rows})
    found = np.asarray(scores, np.float64).reshape(ROWS, -1)
    if (expected.shape[1], found.shape[1]) == (1, 2):  # a booster tells of one class only
        found = found[:, 1:]
    if not is_same(expected, found):
        kind = f"{type(model).__name__} with these parameters"
        raise CompileError(f"{kind} gives other answers once it is converted, so it is refused")


def _predicted(model: Any, rows: Any) -> Any:
    if type(model).__module__.startswith("xgboost") and type(model).__name__ == "Booster":
        import xgboost

        rows = xgboost.DMatrix(rows)
    return getattr(model, "predict_proba", model.predict)(rows)


def _features(model: Any) -> int:
    count = getattr(model, "num_feature", getattr(model, "num_features", None))
    return int(count() if callable(count) else model.n_features_in_)  # of LightGBM and XGBoost
