"""Trees: what is converted answers as before, and what would not is refused."""

from __future__ import annotations

from typing import Any

import lightgbm
import numpy as np
import onnxruntime
import pandas as pd
import pytest
import xgboost
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    StackingClassifier,
)
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from lrai_core import CompileError
from lrai_import.sklearn import convert as convert_sklearn
from lrai_import.trees import convert_lightgbm, convert_xgboost

RANDOM = np.random.default_rng(0)
ROWS = np.rint(RANDOM.normal(0, 4, (300, 4))).astype(np.float32)
VALUES = ROWS @ np.array([1.0, -2.0, 0.5, 0.0]) + ROWS[:, 0] * ROWS[:, 1]
CLASSES = (VALUES > 0).astype(int)
QUICK: dict[str, Any] = {"n_estimators": 12, "max_depth": 3, "n_jobs": 1}


def lgbm(kind: Any, labels: Any, **more: Any) -> Any:
    return kind(**(QUICK | {"verbose": -1, "random_state": 0} | more)).fit(ROWS, labels)


def xgb(kind: Any, labels: Any, **more: Any) -> Any:
    return kind(**(QUICK | {"random_state": 0} | more)).fit(ROWS, labels)


def test_categories_of_a_table_are_refused() -> None:
    """ONNX would take their codes, and callers send their values."""
    column = pd.Series([10, 20, 30] * 100, dtype="category")
    table = pd.DataFrame({"c": column, "x": ROWS[:, 0]})
    model = lightgbm.LGBMClassifier(**QUICK, verbose=-1).fit(table, CLASSES)
    with pytest.raises(CompileError, match="categories of pandas"):
        convert_lightgbm(model, [])
    other = xgboost.XGBClassifier(**QUICK, enable_categorical=True).fit(table, CLASSES)
    with pytest.raises(CompileError, match="fitted on categories"):
        convert_xgboost(other, [])


def test_splits_by_categories_are_refused() -> None:
    codes = np.abs(ROWS) % 5
    model = HistGradientBoostingClassifier(categorical_features=[0], max_iter=3)
    made = make_pipeline(FunctionTransformer(), model).fit(codes, CLASSES)
    with pytest.raises(CompileError, match="HistGradientBoostingClassifier splits by categories"):
        convert_sklearn(made, [])


@pytest.mark.parametrize(
    "model",
    [
        GradientBoostingClassifier(n_estimators=3),
        CalibratedClassifierCV(RandomForestClassifier(n_estimators=3), cv=2),
        StackingClassifier([("a", GradientBoostingClassifier(n_estimators=3))], cv=2),
        GridSearchCV(RandomForestClassifier(n_estimators=3), {"max_depth": [2]}, cv=2),
    ],
    ids=lambda model: type(model).__name__,
)
def test_models_of_models_are_converted(model: Any) -> None:
    made = convert_sklearn(model.fit(ROWS, CLASSES), [])
    session = onnxruntime.InferenceSession(made.SerializeToString())
    label, *_ = session.run(None, {session.get_inputs()[0].name: ROWS})
    assert np.mean(label == model.predict(ROWS)) > 0.98


@pytest.mark.parametrize(
    ("convert", "model"),
    [
        (convert_lightgbm, lambda: lgbm(lightgbm.LGBMRegressor, VALUES)),
        (convert_lightgbm, lambda: lgbm(lightgbm.LGBMClassifier, CLASSES)),
        (convert_lightgbm, lambda: lgbm(lightgbm.LGBMClassifier, np.sign(VALUES).astype(int))),
        (convert_lightgbm, lambda: lgbm(lightgbm.LGBMClassifier, CLASSES).booster_),
        (convert_xgboost, lambda: xgb(xgboost.XGBRegressor, VALUES)),
        (convert_xgboost, lambda: xgb(xgboost.XGBClassifier, VALUES > 0)),
        (convert_xgboost, lambda: xgb(xgboost.XGBClassifier, VALUES > 0).get_booster()),
    ],
)
def test_what_is_converted_answers_as_before(convert: Any, model: Any) -> None:
    made = convert(trained := model(), [])
    session = onnxruntime.InferenceSession(made.SerializeToString())
    *_, found = session.run(None, {session.get_inputs()[0].name: ROWS})
    if hasattr(trained, "predict_proba"):
        np.testing.assert_allclose(found, trained.predict_proba(ROWS), atol=1e-4)


@pytest.mark.parametrize(
    ("convert", "model"),
    [
        (convert_lightgbm, lambda: lgbm(lightgbm.LGBMRegressor, np.abs(VALUES), reg_sqrt=True)),
        (convert_lightgbm, lambda: lgbm(lightgbm.LGBMRegressor, VALUES, linear_tree=True)),
        (
            convert_lightgbm,
            lambda: lgbm(
                lightgbm.LGBMRegressor, VALUES, boosting_type="rf", subsample_freq=1, subsample=0.5
            ),
        ),
        (convert_xgboost, lambda: xgb(xgboost.XGBRegressor, np.stack([VALUES, -VALUES], 1))),
        (convert_xgboost, lambda: xgb(xgboost.XGBRegressor, VALUES > 0, objective="reg:logistic")),
    ],
)
def test_what_the_converter_gets_wrong_is_refused(convert: Any, model: Any) -> None:
    with pytest.raises(CompileError, match="answers otherwise once it is converted"):
        convert(model(), [])
