"""Models of scikit-learn, in memory, to ONNX."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import onnx

from lrai_core import CompileError, EnvironmentProblem, TensorSpec, UnsupportedOperator

OPSET: Final = {"": 17, "ai.onnx.ml": 3}
_HELD: Final = ("best_estimator_", "final_estimator_", "estimator")
FEATURES: Final = "features"
_INTEGERS: Final = (
    "BOOL",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
)
_REALS: Final = ("FP16", "FP32", "FP64")


def convert(model: Any, inputs: Sequence[TensorSpec]) -> onnx.ModelProto:
    """Return the model in ONNX, in single precision.

    Args:
        model: Fitted: an estimator or a pipeline.
        inputs: Columns of one dimension, or one table of two; empty for a table as wide as the
            model was fitted with. Columns of numbers become one table, `features`, unless the model
            asks for columns by their names.

    Raises:
        EnvironmentProblem: skl2onnx is not installed.
        UnsupportedOperator: It has no form in ONNX.
    """
    try:
        import skl2onnx
        from skl2onnx.common.exceptions import MissingConverter, MissingShapeCalculator
    except ImportError:
        raise EnvironmentProblem("skl2onnx is needed: pip install 'lrai[trees]'") from None
    from sklearn.base import is_classifier

    for part in _parts(model):
        if np.any(getattr(part, "is_categorical_", None)):
            what = f"{type(part).__name__} splits by categories"
            raise CompileError(f"{what}, which its converter takes for numbers")
    options = {id(model): {"zipmap": False}} if is_classifier(model) else None
    try:
        found = skl2onnx.convert_sklearn(
            model, initial_types=_types(model, inputs), options=options, target_opset=OPSET
        )
    except (MissingConverter, MissingShapeCalculator) as error:
        raise UnsupportedOperator(f"{type(model).__name__}: {_first_line(error)}") from None
    except (RuntimeError, ValueError, TypeError) as error:
        why = f"{type(model).__name__} cannot be converted: {_first_line(error)}"
        raise CompileError(why) from None
    return _checked(found)


def width(inputs: Sequence[TensorSpec]) -> int:
    """Return how many features a table has that is made of these inputs.

    Raises:
        CompileError: They are no columns, and no table.
    """
    if len(inputs) == 1 and len(inputs[0].shape) == 2 and isinstance(inputs[0].shape[1], int):
        return inputs[0].shape[1]
    if inputs and all(len(spec.shape) == 1 for spec in inputs):
        return len(inputs)
    shapes = ", ".join(f"{spec.name!r} {list(spec.shape)}" for spec in inputs) or "none"
    raise CompileError(f"columns, or one table of known width, are needed; the inputs: {shapes}")


def _types(model: Any, inputs: Sequence[TensorSpec]) -> list[tuple[str, Any]]:
    from skl2onnx.common import data_types as kinds

    if not inputs:
        return [(FEATURES, kinds.FloatTensorType([None, int(model.n_features_in_)]))]
    numbers = all(spec.datatype in (*_INTEGERS, *_REALS) for spec in inputs)
    if numbers and not _asks_for_names(model):
        name = inputs[0].name if len(inputs) == 1 else FEATURES
        return [(name or FEATURES, kinds.FloatTensorType([None, width(inputs)]))]
    wide = width(inputs)
    of_each = wide if len(inputs) == 1 and len(inputs[0].shape) == 2 else 1
    types = dict.fromkeys(_INTEGERS, kinds.Int64TensorType)
    types |= dict.fromkeys(_REALS, kinds.FloatTensorType)
    types["BYTES"] = kinds.StringTensorType
    return [(spec.name, types[spec.datatype]([None, of_each])) for spec in inputs]


def _parts(model: Any) -> Iterator[Any]:
    """Yield a model, and the models that it is made of."""
    yield model
    steps = [*getattr(model, "steps", []), *getattr(model, "transformers_", [])]
    held = [getattr(model, name, None) for name in _HELD]
    held += [step for _, step, *_ in steps]
    for name in ("estimators_", "calibrated_classifiers_"):  # lists, or arrays of several axes
        held += np.ravel(np.array(getattr(model, name, []), object)).tolist()
    for part in held:
        if part is not None and not isinstance(part, str):  # "passthrough", "drop"
            yield from _parts(part)


def _asks_for_names(model: Any) -> bool:
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import Pipeline

    steps = [step for _, step in model.steps] if isinstance(model, Pipeline) else [model]
    return any(isinstance(step, ColumnTransformer) for step in steps)


def _checked(found: Any) -> onnx.ModelProto:
    if not isinstance(found, onnx.ModelProto):
        raise CompileError(f"the converter gave a {type(found).__name__}")
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
