"""Models of LightGBM and XGBoost, in memory, to ONNX; where their libraries are installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import onnx
import onnx.helper
import onnxruntime

from lrai_core import CompileError, EnvironmentProblem, TensorSpec
from lrai_import.sklearn import FEATURES, width

_OPSET = 15  # what the converters write; the importer of ONNX brings it to 17
_ROWS: Final = 256  # on which what they wrote is compared with the model
_SAME: Final = 0.95  # of them: a threshold in single precision may send a few elsewhere


def convert_lightgbm(model: Any, inputs: Sequence[TensorSpec]) -> onnx.ModelProto:
    """Return a booster or an estimator of LightGBM in ONNX; see `lrai_import.sklearn.convert`."""
    if getattr(getattr(model, "booster_", model), "pandas_categorical", None):
        raise CompileError("it was fitted on categories of pandas, whose values ONNX does not have")
    if (classes := getattr(model, "_classes", None)) is not None and classes.dtype.kind in "bu":
        vars(model)["_classes"] = classes.astype(int)  # its converter takes these for texts
    return _convert("lightgbm", model, inputs, {"zipmap": False})


def convert_xgboost(model: Any, inputs: Sequence[TensorSpec]) -> onnx.ModelProto:
    """Return a booster or an estimator of XGBoost in ONNX; see `lrai_import.sklearn.convert`."""
    booster = model.get_booster() if hasattr(model, "get_booster") else model
    if "c" in (booster.feature_types or ()):
        raise CompileError("it was fitted on categories, whose values ONNX does not have")
    booster.feature_names = None  # its converter knows numbered ones only
    return _convert("xgboost", model, inputs, {})


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
    features = width(inputs) if inputs else _features(model)
    converter: Callable[..., Any] = getattr(onnxmltools, f"convert_{kind}")
    name = inputs[0].name if len(inputs) == 1 and inputs[0].name else FEATURES
    types = [(name, FloatTensorType([None, features]))]
    try:
        found = converter(model, initial_types=types, target_opset=_OPSET, **options)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        why = (str(error) or type(error).__name__)[:300]
        raise CompileError(f"{type(model).__name__} cannot be converted: {why}") from None
    if not isinstance(found, onnx.ModelProto):
        raise CompileError(f"the converter gave a {type(found).__name__}")
    if not any(opset.domain == "" for opset in found.opset_import):  # where it uses none of it
        found.opset_import.append(onnx.helper.make_opsetid("", _OPSET))
    _compare(model, found, features)
    return found


def _compare(model: Any, made: onnx.ModelProto, features: int) -> None:
    """Refuse what answers otherwise: converters pass over objectives that they do not know.

    The rows are whole numbers of all sizes, since a category is one, and zeros and missing values.
    """
    random = np.random.default_rng(0)
    rows = random.standard_normal((_ROWS, features)) * 10.0 ** random.integers(0, 4, (_ROWS, 1))
    rows = np.rint(rows).astype(np.float32)
    rows[random.random(rows.shape) < 0.05] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of columns that had names
        expected = np.asarray(_predicted(model, rows), np.float64).reshape(_ROWS, -1)
    session = onnxruntime.InferenceSession(
        made.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    *_, scores = session.run(None, {session.get_inputs()[0].name: rows})
    found = np.asarray(scores, np.float64).reshape(_ROWS, -1)
    if (expected.shape[1], found.shape[1]) == (1, 2):  # a booster tells of one class only
        found = found[:, 1:]
    same = expected.shape == found.shape and np.isclose(found, expected, 1e-3, 1e-4).all(axis=1)
    if np.mean(same) < _SAME:
        kind = f"{type(model).__name__} with these parameters"
        raise CompileError(f"{kind} answers otherwise once it is converted, so it is not")


def _predicted(model: Any, rows: Any) -> Any:
    if hasattr(model, "predict_proba"):
        return model.predict_proba(rows)
    if type(model).__module__.startswith("xgboost") and type(model).__name__ == "Booster":
        import xgboost

        rows = xgboost.DMatrix(rows)
    return model.predict(rows)


def _features(model: Any) -> int:
    for name in ("num_feature", "num_features"):  # of LightGBM and XGBoost
        if callable(count := getattr(model, name, None)):
            return int(count())
    return int(model.n_features_in_)
