"""Models of LightGBM and XGBoost, in memory, to ONNX; where their libraries are installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx.helper

from lrai_core import CompileError, EnvironmentProblem, TensorSpec
from lrai_import.sklearn import FEATURES, width

_OPSET = 15  # what the converters write; the importer of ONNX brings it to 17


def convert_lightgbm(model: Any, inputs: Sequence[TensorSpec]) -> onnx.ModelProto:
    """Return a booster or an estimator of LightGBM in ONNX; see `lrai_import.sklearn.convert`."""
    return _convert("lightgbm", model, inputs, {"zipmap": False})


def convert_xgboost(model: Any, inputs: Sequence[TensorSpec]) -> onnx.ModelProto:
    """Return a booster or an estimator of XGBoost in ONNX; see `lrai_import.sklearn.convert`."""
    booster = model.get_booster() if hasattr(model, "get_booster") else model
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
    features = width(inputs) if inputs else _features(model)
    converter: Callable[..., Any] = getattr(onnxmltools, f"convert_{kind}")
    name = inputs[0].name if len(inputs) == 1 and inputs[0].name else FEATURES
    types = [(name, FloatTensorType([None, features]))]
    try:
        found = converter(model, initial_types=types, target_opset=_OPSET, **options)
    except (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        why = (str(error) or type(error).__name__)[:300]
        raise CompileError(f"{type(model).__name__} cannot be converted: {why}") from None
    if not isinstance(found, onnx.ModelProto):
        raise CompileError(f"the converter gave a {type(found).__name__}")
    if not any(opset.domain == "" for opset in found.opset_import):  # where it uses none of it
        found.opset_import.append(onnx.helper.make_opsetid("", _OPSET))
    return found


def _features(model: Any) -> int:
    for name in ("num_feature", "num_features"):  # of LightGBM and XGBoost
        if callable(count := getattr(model, name, None)):
            return int(count())
    return int(model.n_features_in_)
