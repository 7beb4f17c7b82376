"""Trees: what is converted answers as before, and what would not is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import onnxruntime
import pandas as pd
import pytest
import xgboost
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.compose import ColumnTransformer
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import (
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.feature_selection import RFE, SelectFromModel
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression, PoissonRegressor
from sklearn.model_selection import GridSearchCV, TunedThresholdClassifierCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import (
    FunctionTransformer,
    MaxAbsScaler,
    MinMaxScaler,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    PowerTransformer,
    RobustScaler,
    StandardScaler,
)
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier

from lrai_core import CompileError, EnvironmentProblem, TensorSpec
from lrai_import.onnx import load
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


@pytest.mark.parametrize("booster", ["dart", "gblinear"])
@pytest.mark.filterwarnings("ignore")  # of gblinear, which goes
def test_boosters_that_the_converter_does_not_know_are_named(booster: str) -> None:
    """It says 'gbtree_model_param'."""
    model = xgboost.XGBClassifier(n_estimators=3, booster=booster).fit(ROWS, CLASSES)
    for one in (model, model.get_booster()):
        with pytest.raises(CompileError, match="its booster is 'dart' or 'gblinear'"):
            convert_xgboost(one, [])
    with pytest.raises(CompileError, match="its booster is 'dart' or 'gblinear'"):
        convert_sklearn(make_pipeline(StandardScaler(), model).fit(ROWS, CLASSES), [])


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
        CalibratedClassifierCV(RandomForestClassifier(n_estimators=3, random_state=0), cv=2),
        StackingClassifier([("a", GradientBoostingClassifier(n_estimators=3))], cv=2),
        GridSearchCV(
            RandomForestClassifier(n_estimators=3, random_state=0), {"max_depth": [2]}, cv=2
        ),
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
        right = trained.predict_proba(ROWS)
    elif isinstance(trained, xgboost.Booster):
        right = trained.predict(xgboost.DMatrix(ROWS))
    else:
        right = trained.predict(ROWS)
    found = found[:, 1:] if np.ndim(right) == 1 and found.shape[1] == 2 else found
    np.testing.assert_allclose(found, np.reshape(right, (len(ROWS), -1)), rtol=1e-4, atol=1e-4)


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
    with pytest.raises(CompileError, match="gives other answers once it is converted"):
        convert(model(), [])


def test_what_is_small_is_compared_by_its_own_size() -> None:
    values = np.stack([VALUES, -VALUES], 1) * 1e-5  # of two columns, which the converter mixes up
    model = xgb(xgboost.XGBRegressor, values, base_score=0.0)
    for convert, trained in (
        (convert_xgboost, model),
        (convert_sklearn, make_pipeline(StandardScaler(), model).fit(ROWS, values)),
    ):
        with pytest.raises(CompileError, match="gives other answers once it is converted"):
            convert(trained, [])
    small = xgb(xgboost.XGBRegressor, VALUES * 1e-5, base_score=0.0)
    session = onnxruntime.InferenceSession(convert_xgboost(small, []).SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: ROWS})
    np.testing.assert_allclose(found[:, 0], small.predict(ROWS), rtol=1e-4, atol=1e-9)


HOLES = np.where(RANDOM.random(ROWS.shape) < 0.2, np.nan, ROWS).astype(np.float32)
FOREST = RandomForestClassifier(n_estimators=3, random_state=0)


@pytest.mark.parametrize(
    "model",
    [
        DecisionTreeClassifier(max_depth=5),
        RandomForestClassifier(n_estimators=5, random_state=0),
        ExtraTreesRegressor(n_estimators=5),
        HistGradientBoostingClassifier(max_iter=5),
        CalibratedClassifierCV(DecisionTreeClassifier(max_depth=3), cv=2),
        TunedThresholdClassifierCV(DecisionTreeClassifier(max_depth=5), thresholds=[0.5, 2], cv=2),
        make_pipeline(SelectFromModel(FOREST), DecisionTreeClassifier(max_depth=5)),
        make_pipeline(
            SelectFromModel(clone(FOREST).fit(HOLES, CLASSES), prefit=True),
            DecisionTreeClassifier(max_depth=5),
        ),
    ],
    ids=lambda model: type(model).__name__,
)
@pytest.mark.filterwarnings("ignore")  # of libraries, about one another
def test_missing_values_go_where_the_model_sends_them(model: Any) -> None:
    trained = model.fit(HOLES, CLASSES)
    session = onnxruntime.InferenceSession(convert_sklearn(trained, []).SerializeToString())
    *_, found = session.run(None, {session.get_inputs()[0].name: HOLES})
    right = getattr(trained, "predict_proba", trained.predict)(HOLES)
    np.testing.assert_allclose(np.reshape(found, right.shape), right, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (make_pipeline(SimpleImputer(add_indicator=True), LogisticRegression()), "add_indicator"),
        (HistGradientBoostingRegressor(loss="poisson", max_iter=3), "a loss with a logarithm"),
        (KNeighborsClassifier(weights="distance"), "weighs neighbours"),
        (
            make_pipeline(
                OneHotEncoder(handle_unknown="infrequent_if_exist", min_frequency=30),
                LogisticRegression(),
            ),
            "infrequent categories",
        ),
    ],
)
def test_what_the_converter_of_sklearn_passes_over_is_refused(model: Any, words: str) -> None:
    table = HOLES if "imputer" in str(model).lower() else ROWS
    with pytest.raises(CompileError, match=words):
        convert_sklearn(model.fit(table, CLASSES), [])


@pytest.mark.parametrize(
    ("estimator", "labels"),
    [
        (xgboost.XGBClassifier(**QUICK), CLASSES),
        (xgboost.XGBClassifier(**QUICK), (np.sign(VALUES) + 1).astype(int)),
        (xgboost.XGBRegressor(**QUICK), VALUES),
        (lightgbm.LGBMClassifier(**QUICK, verbose=-1), CLASSES),
        (lightgbm.LGBMClassifier(**QUICK, verbose=-1), np.sign(VALUES).astype(int)),
        (lightgbm.LGBMRegressor(**QUICK, verbose=-1), VALUES),
    ],
    ids=lambda given: type(given).__name__,
)
@pytest.mark.filterwarnings("ignore")  # of libraries, about one another
def test_boosted_trees_may_be_part_of_another_model(estimator: Any, labels: Any) -> None:
    table = np.float64(ROWS)  # of whole numbers, at which XGBoost splits
    pipeline = make_pipeline(StandardScaler(), estimator)
    for model in (pipeline, GridSearchCV(pipeline, {}, cv=2)):
        trained = model.fit(table, labels)
        session = onnxruntime.InferenceSession(convert_sklearn(trained, []).SerializeToString())
        *_, found = session.run(None, {session.get_inputs()[0].name: ROWS})
        right = getattr(trained, "predict_proba", trained.predict)(table)
        np.testing.assert_allclose(np.reshape(found, right.shape), right, rtol=1e-4, atol=1e-4)


DECIMALS = np.round(RANDOM.normal(20, 12, (1500, 4)), 1)
STEPS = {
    "StandardScaler": StandardScaler(),
    "MinMaxScaler": MinMaxScaler(),
    "RobustScaler": RobustScaler(),
    "MaxAbsScaler": MaxAbsScaler(),
    "PolynomialFeatures": PolynomialFeatures(2),
    "some": ColumnTransformer([("a", MinMaxScaler(), [0, 1])], remainder="passthrough"),
    "none": SimpleImputer(),
}


BOOSTED = {
    "XGBRegressor": xgboost.XGBRegressor(n_estimators=20, max_depth=4, n_jobs=1),
    "HistGradientBoostingRegressor": HistGradientBoostingRegressor(max_iter=20, max_depth=4),
}


@pytest.mark.parametrize(
    ("step", "estimator"),
    [
        (step, estimator)
        for step in STEPS
        for estimator in BOOSTED
        # Products that are the same but for the last bit are two to the latter.
        if (step, estimator) != ("PolynomialFeatures", "HistGradientBoostingRegressor")
    ],
)
@pytest.mark.parametrize("rows", [DECIMALS, np.rint(DECIMALS)], ids=["decimals", "whole"])
@pytest.mark.filterwarnings("ignore")  # of libraries, about one another
def test_rows_on_thresholds_go_where_the_model_sends_them(
    rows: Any, estimator: str, step: str
) -> None:
    """They lie there, as these trees split at values that rows have."""
    values = rows @ np.array([1.0, -2.0, 0.5, 0.0]) + np.sin(rows[:, 2]) + rows[:, 0] * rows[:, 1]
    model = make_pipeline(STEPS[step], BOOSTED[estimator]).fit(rows, values)
    session = onnxruntime.InferenceSession(convert_sklearn(model, []).SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: rows.astype(np.float32)})
    np.testing.assert_allclose(found[:, 0], model.predict(rows), rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore")  # of libraries, about one another
def test_rows_on_thresholds_go_there_beside_texts_too() -> None:
    table = pd.DataFrame({"kind": [*"abc"] * 500, "x": DECIMALS[:, 0], "y": DECIMALS[:, 1]})
    steps = [("a", OneHotEncoder(), ["kind"]), ("b", MinMaxScaler(), ["x", "y"])]
    chosen = ColumnTransformer(steps, sparse_threshold=0)
    values = table["x"] * table["y"] + (table["kind"] == "a")
    model = make_pipeline(chosen, xgboost.XGBRegressor(**QUICK)).fit(table, values)
    kinds = {"kind": "BYTES", "x": "FP32", "y": "FP32"}
    specs = tuple(TensorSpec(name=n, datatype=kind, shape=("n",)) for n, kind in kinds.items())
    session = onnxruntime.InferenceSession(convert_sklearn(model, specs).SerializeToString())
    feeds = {name: np.array(table[[name]], np.float32) for name in "xy"}
    (found,) = session.run(None, feeds | {"kind": np.array(table[["kind"]], object)})
    np.testing.assert_allclose(found[:, 0], model.predict(table), rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore")  # of libraries, about one another
def test_thresholds_of_what_is_not_calculated_stay() -> None:
    """Single precision has numbers so near to one another that another one would be right."""
    rows = np.arange(2.0**23, 2.0**23 + 600)[:, None] + np.array([0.0, 600.0])
    model = make_pipeline(SimpleImputer(), xgboost.XGBRegressor(**QUICK)).fit(rows, rows[:, 0] % 7)
    session = onnxruntime.InferenceSession(convert_sklearn(model, []).SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: rows.astype(np.float32)})
    np.testing.assert_allclose(found[:, 0], model.predict(rows), rtol=1e-4)


def test_boosted_trees_of_categories_are_refused_in_a_pipeline_too() -> None:
    codes = (np.abs(ROWS) % 5).astype(int)
    model = xgboost.XGBClassifier(**QUICK, enable_categorical=True, feature_types=["c", *"qqq"])
    with pytest.raises(CompileError, match="fitted on categories"):
        convert_sklearn(make_pipeline(FunctionTransformer(), model).fit(codes, CLASSES), [])


@pytest.mark.parametrize(
    "model",
    [
        LinearSVC(),
        make_pipeline(StandardScaler(), LinearSVC()),
        VotingClassifier([("a", LogisticRegression()), ("b", DecisionTreeClassifier())]),
    ],
    ids=["LinearSVC", "Pipeline", "VotingClassifier"],
)
def test_options_that_a_converter_lacks_keep_no_model_out(model: Any) -> None:
    trained = model.fit(ROWS, CLASSES)
    session = onnxruntime.InferenceSession(convert_sklearn(trained, []).SerializeToString())
    label, *_ = session.run(None, {session.get_inputs()[0].name: ROWS})
    assert np.mean(label == trained.predict(ROWS)) > 0.98


@pytest.mark.parametrize(
    "model",
    [
        LinearDiscriminantAnalysis(),
        GridSearchCV(LinearDiscriminantAnalysis(), {"tol": [1e-4]}, cv=2),
        CalibratedClassifierCV(LinearDiscriminantAnalysis(), cv=2),
        VotingClassifier(
            [("a", LinearDiscriminantAnalysis()), ("b", LogisticRegression())], voting="soft"
        ),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_discriminant_of_two_classes_is_as_sure_as_before(model: Any) -> None:
    trained = model.fit(ROWS, CLASSES)
    session = onnxruntime.InferenceSession(convert_sklearn(trained, []).SerializeToString())
    *_, scores = session.run(None, {session.get_inputs()[0].name: ROWS})
    np.testing.assert_allclose(scores, trained.predict_proba(ROWS), atol=1e-4)


@pytest.mark.parametrize("estimator", [LogisticRegression(), LinearRegression()])
def test_columns_that_were_selected_are_no_prediction(estimator: Any) -> None:
    """Of what selects columns and predicts by them, the converter writes the selection alone."""
    model = RFE(estimator, n_features_to_select=2).fit(ROWS, CLASSES)
    with pytest.raises(CompileError, match="gives other answers once it is converted"):
        convert_sklearn(model, [])


@pytest.mark.filterwarnings("ignore")  # of steps that were too few
def test_chances_of_other_labels_are_refused() -> None:
    model = MLPClassifier(max_iter=5).fit(ROWS, np.stack([CLASSES, 1 - CLASSES], axis=1))
    with pytest.raises(CompileError, match="gives other answers once it is converted"):
        convert_sklearn(model, [])


def test_what_is_infinite_in_single_precision_is_no_other_answer() -> None:
    model = PoissonRegressor().fit(ROWS, np.abs(VALUES))
    made = convert_sklearn(model, [])
    session = onnxruntime.InferenceSession(made.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: ROWS})
    np.testing.assert_allclose(found[:, 0], model.predict(ROWS), rtol=1e-4)


@pytest.mark.parametrize("weights", [np.array([1, 2]), [1, 2], (1, 2)], ids=repr)
def test_weights_of_voters_are_none_of_neighbours(weights: Any) -> None:
    voters = [("a", LogisticRegression()), ("b", DecisionTreeClassifier())]
    model = VotingClassifier(voters, weights=weights).fit(ROWS, CLASSES)
    session = onnxruntime.InferenceSession(convert_sklearn(model, []).SerializeToString())
    labels, *_ = session.run(None, {session.get_inputs()[0].name: ROWS})
    np.testing.assert_array_equal(labels, model.predict(ROWS))


def test_whole_numbers_beside_others_are_taken() -> None:
    columns = (
        TensorSpec(name="a", datatype="INT64", shape=("n",)),
        TensorSpec(name="b", datatype="FP32", shape=("n",)),
    )
    table = pd.DataFrame({"a": ROWS[:, 0].astype(int), "b": ROWS[:, 1]})
    kinds = ColumnTransformer([("all", SimpleImputer(), ["a", "b"])])
    model = make_pipeline(kinds, LogisticRegression()).fit(table, CLASSES)
    made = convert_sklearn(GridSearchCV(model, {}, cv=2).fit(table, CLASSES), columns)
    assert [given.name for given in made.graph.input] == ["a", "b"]


def test_texts_ask_for_no_locale_that_an_image_lacks() -> None:
    texts = np.array(["green is good", "red is bad"] * 20)[:, None]
    made = convert_sklearn(
        make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts.ravel(), [0, 1] * 20),
        (TensorSpec(name="text", datatype="BYTES", shape=("n",)),),
    )
    locales = [
        attribute.s
        for node in made.graph.node
        for attribute in node.attribute
        if (node.op_type, attribute.name) == ("StringNormalizer", "locale")
    ]
    assert locales == [b"C.UTF-8"]
    onnxruntime.InferenceSession(made.SerializeToString())


TEXTS = ["one word is enough", "two words are not", "a third of them", "none at all, they say"] * 10
LABELS = [0, 1, 1, 0] * 10
TEXT = (TensorSpec(name="text", datatype="BYTES", shape=("n",)),)


@pytest.mark.parametrize(
    ("vectorizer", "texts"),
    [
        (TfidfVectorizer(sublinear_tf=True), TEXTS),
        (TfidfVectorizer(ngram_range=(1, 2)), [text.replace(" ", " a ") for text in TEXTS]),
        (CountVectorizer(), [text.replace("o", "ö").replace("a", "ä") for text in TEXTS]),
    ],
    ids=["logarithms", "pairs", "letters"],
)
def test_texts_are_compared_too(vectorizer: Any, texts: list[str]) -> None:
    model = make_pipeline(vectorizer, LogisticRegression()).fit(texts, [0, 1, 1, 0] * 10)
    columns = (TensorSpec(name="text", datatype="BYTES", shape=("n",)),)
    with pytest.raises(CompileError, match="gives other answers once it is converted"):
        convert_sklearn(model, columns)
    plain = make_pipeline(CountVectorizer(), LogisticRegression()).fit(TEXTS, [0, 1, 1, 0] * 10)
    session = onnxruntime.InferenceSession(convert_sklearn(plain, columns).SerializeToString())
    label, *_ = session.run(None, {"text": np.array(TEXTS, object)[:, None]})
    np.testing.assert_array_equal(label, plain.predict(TEXTS))


def of_texts(made: Any) -> list[Any]:
    session = onnxruntime.InferenceSession(made.SerializeToString())
    return list(session.run(None, {"text": np.array(TEXTS, object)[:, None]}))


@pytest.mark.parametrize("other", [CountVectorizer(), CountVectorizer(analyzer="char")])
@pytest.mark.filterwarnings("ignore:The conversion of CountVectorizer")  # of what has few letters
def test_texts_of_a_union_are_compared_too(other: Any) -> None:
    logarithms = make_union(TfidfVectorizer(sublinear_tf=True), other)
    model = make_pipeline(logarithms, LogisticRegression()).fit(TEXTS, LABELS)
    with pytest.raises(CompileError, match="gives other answers once it is converted"):
        convert_sklearn(model, TEXT)
    model = make_pipeline(make_union(TfidfVectorizer(), other), LogisticRegression())
    _, scores = of_texts(convert_sklearn(model.fit(TEXTS, LABELS), TEXT))
    np.testing.assert_allclose(scores, model.predict_proba(TEXTS), atol=1e-4)


@pytest.mark.filterwarnings("ignore:The conversion of CountVectorizer")  # of what has few letters
def test_texts_that_a_column_has_for_several_are_compared_for_each() -> None:
    letters = CountVectorizer(analyzer="char")
    steps = [("a", letters, "text"), ("b", TfidfVectorizer(sublinear_tf=True), "text")]
    table = pd.DataFrame({"text": TEXTS})
    for chosen, right in ((steps[:1], True), (steps, False), (steps[::-1], False)):
        model = make_pipeline(ColumnTransformer(chosen), LogisticRegression()).fit(table, LABELS)
        if right:
            convert_sklearn(model, TEXT)
        else:
            with pytest.raises(CompileError, match="gives other answers once it is converted"):
                convert_sklearn(model, TEXT)


def test_texts_are_compared_behind_a_threshold_too() -> None:
    def tuned(vectorizer: Any) -> Any:
        inner = make_pipeline(vectorizer, LogisticRegression())
        return TunedThresholdClassifierCV(inner, thresholds=[0.5, 2], cv=2).fit(TEXTS, LABELS)

    with pytest.raises(CompileError, match="gives other answers once it is converted"):
        convert_sklearn(tuned(TfidfVectorizer(sublinear_tf=True)), TEXT)
    _, scores = of_texts(convert_sklearn(model := tuned(CountVectorizer()), TEXT))
    np.testing.assert_allclose(scores, model.predict_proba(TEXTS), atol=1e-4)


def test_what_makes_numbers_of_texts_is_compared_too() -> None:
    with pytest.raises(CompileError, match="gives other answers once it is converted"):
        convert_sklearn(TfidfVectorizer(sublinear_tf=True).fit(TEXTS), TEXT)
    model = TfidfVectorizer().fit(TEXTS)
    (found,) = of_texts(convert_sklearn(model, TEXT))
    np.testing.assert_allclose(found, model.transform(TEXTS).toarray(), atol=1e-4)


def test_a_model_of_texts_that_cannot_be_compared_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(table: Any) -> Any:
        raise ValueError(table)

    model = make_pipeline(CountVectorizer(), LogisticRegression()).fit(TEXTS, LABELS)
    monkeypatch.setattr(model, "predict", refuse)
    with pytest.raises(CompileError, match="Pipeline takes no made-up texts to be compared on"):
        convert_sklearn(model, TEXT)


def test_columns_beside_texts_may_have_to_be_above_nought() -> None:
    table = pd.DataFrame({"kind": [*"abc"] * 100, "x": np.abs(ROWS[:, 0]) + 1})
    steps = [("a", OneHotEncoder(), ["kind"]), ("b", PowerTransformer(method="box-cox"), ["x"])]
    model = make_pipeline(ColumnTransformer(steps), LogisticRegression()).fit(table, CLASSES)
    columns = (
        TensorSpec(name="kind", datatype="BYTES", shape=("n",)),
        TensorSpec(name="x", datatype="FP32", shape=("n",)),
    )
    session = onnxruntime.InferenceSession(convert_sklearn(model, columns).SerializeToString())
    feeds = {"kind": np.array(table[["kind"]], object), "x": np.array(table[["x"]], np.float32)}
    np.testing.assert_array_equal(session.run(None, feeds)[0], model.predict(table))


def test_inputs_have_the_names_that_they_were_given() -> None:
    """Converters make letters, digits and underscores of them, and call outputs as they like."""
    names = ["sepal length (cm)", "sepal_length__cm_", "label", "2nd"]
    table = pd.DataFrame(ROWS, columns=names)
    steps = ColumnTransformer([("all", StandardScaler(), names)])
    model = make_pipeline(steps, LogisticRegression()).fit(table, CLASSES)
    columns = [TensorSpec(name=name, datatype="FP32", shape=("n",)) for name in names]
    made = convert_sklearn(model, columns)
    assert [value.name for value in made.graph.output] == ["label_predicted", "probabilities"]
    session = onnxruntime.InferenceSession(made.SerializeToString())
    found, _ = session.run(None, {name: table[[name]].to_numpy() for name in names})
    np.testing.assert_array_equal(found, model.predict(table))


@pytest.mark.parametrize(
    ("convert", "model"),
    [
        (convert_sklearn, LogisticRegression().fit(ROWS, CLASSES)),
        (convert_lightgbm, lgbm(lightgbm.LGBMClassifier, CLASSES)),
        (convert_xgboost, xgb(xgboost.XGBClassifier, CLASSES)),
    ],
    ids=["sklearn", "lightgbm", "xgboost"],
)
@pytest.mark.filterwarnings("ignore")  # of libraries, about one another
def test_a_table_has_the_name_that_it_was_given(convert: Any, model: Any) -> None:
    made = convert(model, [TensorSpec(name="données: 1", datatype="FP32", shape=("n", 4))])
    session = onnxruntime.InferenceSession(made.SerializeToString())
    found, _ = session.run(None, {"données: 1": ROWS})
    np.testing.assert_array_equal(found, model.predict(ROWS))


def test_numbers_that_have_to_be_above_nought_are_compared_too() -> None:
    rows, steps = np.abs(ROWS) + 1, PowerTransformer(method="box-cox")
    two = make_pipeline(steps, xgboost.XGBRegressor(**QUICK)).fit(rows, np.c_[VALUES, -VALUES])
    with pytest.raises(CompileError, match="gives other answers once it is converted"):
        convert_sklearn(two, [])
    convert_sklearn(make_pipeline(steps, LogisticRegression()).fit(rows, CLASSES), [])


def test_what_makes_numbers_of_numbers_is_compared_too() -> None:
    with pytest.raises(CompileError, match="gives other answers once it is converted"):
        convert_sklearn(PowerTransformer().fit(ROWS), [])  # of missing ones
    model = StandardScaler().fit(ROWS)
    session = onnxruntime.InferenceSession(convert_sklearn(model, []).SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: HOLES})
    np.testing.assert_allclose(found, model.transform(HOLES), rtol=1e-4, atol=1e-6)


def test_missing_numbers_beside_texts_are_compared_too() -> None:
    table = pd.DataFrame({"kind": [*"abc"] * 100, "x": ROWS[:, 0]})
    table.loc[::7, "x"] = np.nan
    columns = (
        TensorSpec(name="kind", datatype="BYTES", shape=("n",)),
        TensorSpec(name="x", datatype="FP32", shape=("n",)),
    )

    def convert(step: Any) -> Any:
        both = ColumnTransformer(
            [("a", OneHotEncoder(sparse_output=False), ["kind"]), ("b", step, ["x"])]
        )
        model = make_pipeline(both, HistGradientBoostingClassifier(max_iter=5))
        return convert_sklearn(model.fit(table, CLASSES), columns)

    assert convert(StandardScaler()).graph.node
    with pytest.raises(CompileError, match="gives other answers once it is converted"):
        convert(PowerTransformer())  # whose converter has 0 for them


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", [KMeans, MiniBatchKMeans])
@pytest.mark.parametrize("scaled", [False, True])
def test_k_means_is_converted_in_whichever_precision_it_was_fitted(
    dtype: type[np.floating[Any]], kind: Any, *, scaled: bool
) -> None:
    """In single precision it takes no numbers in double."""
    rows, own = ROWS.astype(dtype), kind(5, n_init=1, random_state=0)
    model = (make_pipeline(StandardScaler(), own) if scaled else own).fit(rows)
    made = convert_sklearn(model, [])
    session = onnxruntime.InferenceSession(made.SerializeToString())
    label, distances = session.run(None, {session.get_inputs()[0].name: ROWS})
    assert np.mean(label == model.predict(rows)) > 0.98
    assert np.allclose(distances, model.transform(rows), atol=1e-2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_lies_on_a_centre_of_k_means_has_a_distance_that_is_a_number(
    dtype: type[np.floating[Any]],
) -> None:
    """Its square is less than 0 by as much as rounding takes."""
    rows = np.random.default_rng(0).standard_normal((60, 6)).astype(np.float32).astype(dtype)
    model = KMeans(60, n_init=1, random_state=0).fit(rows)
    made = convert_sklearn(model, [])
    session = onnxruntime.InferenceSession(made.SerializeToString())
    feeds = {session.get_inputs()[0].name: rows.astype(np.float32)}
    label, distances = session.run(None, feeds)
    assert (label == model.predict(rows)).all()
    assert np.allclose(distances, model.transform(rows), atol=1e-2)


def test_a_model_of_numbers_that_cannot_be_compared_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(table: Any) -> Any:
        raise ValueError(table)

    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(ROWS, CLASSES)
    monkeypatch.setattr(model, "predict", refuse)
    with pytest.raises(CompileError, match="Pipeline takes no made-up numbers to be compared on"):
        convert_sklearn(model, [])


def test_columns_of_texts_are_not_compared_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ColumnTransformer([("a", CountVectorizer(), "text")])
    table = pd.DataFrame({"text": TEXTS})
    model = make_pipeline(kinds, LogisticRegression()).fit(table, LABELS)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(EnvironmentProblem, match="pandas is needed to compare texts"):
        convert_sklearn(model, TEXT)


@pytest.mark.parametrize(
    "encoder",
    [OneHotEncoder(), ColumnTransformer([("all", OneHotEncoder(), ["size", "color"])])],
    ids=lambda encoder: type(encoder).__name__,
)
def test_columns_in_any_order_are_those_that_the_model_was_fitted_with(encoder: Any) -> None:
    table = pd.DataFrame({"color": ["red", "blue", "green"] * 100, "size": [*"smlxsmlsmx"] * 30})
    labels = (table["color"] == "red") ^ (table["size"] == "s")
    model = make_pipeline(encoder, RandomForestClassifier(random_state=0)).fit(table, labels)
    columns = tuple(TensorSpec(name=n, datatype="BYTES", shape=("n",)) for n in ("size", "color"))
    session = onnxruntime.InferenceSession(convert_sklearn(model, columns).SerializeToString())
    feeds = {name: np.array(table[[name]], object) for name in table}
    np.testing.assert_array_equal(session.run(None, feeds)[0], model.predict(table))


def test_columns_of_text_are_compared_by_what_their_encoders_know() -> None:
    table = pd.DataFrame({"kind": ["a", "b", "c"] * 100, "x": ROWS[:, 0]})
    kinds = ColumnTransformer([("kind", OneHotEncoder(), ["kind"]), ("x", "passthrough", ["x"])])
    columns = (
        TensorSpec(name="kind", datatype="BYTES", shape=("n",)),
        TensorSpec(name="x", datatype="FP32", shape=("n",)),
    )
    labels = (table["kind"] == "a") ^ (table["x"] > 0)
    forest = RandomForestClassifier(n_estimators=5, random_state=0)
    good = make_pipeline(kinds, forest).fit(table, labels)
    session = onnxruntime.InferenceSession(convert_sklearn(good, columns).SerializeToString())
    feeds = {"kind": np.array(table[["kind"]], object), "x": np.array(table[["x"]])}
    np.testing.assert_array_equal(session.run(None, feeds)[0], good.predict(table))
    steps = CalibratedClassifierCV(LogisticRegression(), method="isotonic", cv=2)
    with pytest.raises(CompileError, match="calibrates in steps"):
        convert_sklearn(make_pipeline(kinds, steps).fit(table, labels), columns)


@pytest.mark.parametrize("columns", [slice(0, 2), [0, 1], ["a", "b"], "b"], ids=str)
def test_columns_may_be_told_in_several_ways(columns: Any) -> None:
    table = pd.DataFrame({"a": ROWS[:, 0], "b": ROWS[:, 1] > 0, "c": ROWS[:, 2]}).astype(np.float32)
    step = OneHotEncoder(handle_unknown="ignore") if columns == "b" else SimpleImputer()
    own = [columns] if columns == "b" else columns
    kinds = ColumnTransformer([("some", step, own)], remainder="passthrough")
    model = make_pipeline(kinds, LogisticRegression()).fit(table, CLASSES)
    specs = tuple(TensorSpec(name=name, datatype="FP32", shape=("n",)) for name in "abc")
    session = onnxruntime.InferenceSession(convert_sklearn(model, specs).SerializeToString())
    feeds = {name: table[[name]].to_numpy() for name in "abc"}
    np.testing.assert_array_equal(session.run(None, feeds)[0], model.predict(table))


def test_columns_that_are_told_by_a_mask_are_refused() -> None:
    """Their converter takes true and false for the second column and the first."""
    table = pd.DataFrame(ROWS[:, :3], columns=[*"abc"])
    kinds = ColumnTransformer([("some", SimpleImputer(), [False, True, True])])
    model = make_pipeline(kinds, LogisticRegression()).fit(table, CLASSES)
    specs = tuple(TensorSpec(name=name, datatype="FP32", shape=("n",)) for name in "abc")
    with pytest.raises(CompileError, match="gives other answers once it is converted"):
        convert_sklearn(model, specs)


def test_a_table_whose_columns_have_no_names_is_compared_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lrai_import.sklearn._not_converted", lambda _: "")  # nor its threshold
    kinds = ColumnTransformer([("all", SimpleImputer(), [0, 1, 2, 3])])
    tuned = TunedThresholdClassifierCV(LogisticRegression(), scoring="recall", cv=3)
    model = make_pipeline(kinds, tuned).fit(ROWS, (VALUES > 8).astype(int))
    table = (TensorSpec(name="x", datatype="FP32", shape=("n", 4)),)
    with pytest.raises(CompileError, match="gives other answers once it is converted"):
        convert_sklearn(model, table)


@pytest.mark.filterwarnings("ignore:The conversion of CountVectorizer")  # it is what is tried
def test_letters_are_compared_as_texts_have_them() -> None:
    letters = CountVectorizer(analyzer="char", ngram_range=(1, 2))
    model = make_pipeline(letters, LogisticRegression()).fit(TEXTS, [0, 1, 1, 0] * 10)
    columns = (TensorSpec(name="text", datatype="BYTES", shape=("n",)),)
    session = onnxruntime.InferenceSession(convert_sklearn(model, columns).SerializeToString())
    label, *_ = session.run(None, {"text": np.array(TEXTS, object)[:, None]})
    np.testing.assert_array_equal(label, model.predict(TEXTS))


@pytest.mark.filterwarnings("ignore:The conversion of CountVectorizer")  # of what has few letters
def test_letters_of_texts_with_several_lines_are_refused() -> None:
    """The graph passes over the ends of lines."""
    texts = [text.replace(" ", "\n") for text in TEXTS]
    letters = TfidfVectorizer(analyzer="char", ngram_range=(1, 2))
    model = make_pipeline(letters, LogisticRegression()).fit(texts, LABELS)
    with pytest.raises(CompileError, match="gives other answers once it is converted"):
        convert_sklearn(model, TEXT)


def test_labels_are_compared_beside_what_they_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrai_import.sklearn._not_converted", lambda _: "")  # nor its threshold
    tuned = TunedThresholdClassifierCV(LogisticRegression(), scoring="recall", cv=3)
    with pytest.raises(CompileError, match="gives other answers once it is converted"):
        convert_sklearn(tuned.fit(ROWS, (VALUES > 8).astype(int)), [])


@pytest.mark.parametrize(
    ("estimator", "how", "own", "none"),
    [
        (LogisticRegression(), "auto", 0.45, 0.5),
        (LogisticRegression(), "decision_function", -0.2, 0.0),
        (LinearSVC(), "auto", 0.5, 0.0),
    ],
)
def test_a_threshold_that_was_tuned_is_refused_however_little_it_changes(
    estimator: Any, how: str, own: float, none: float
) -> None:
    labels = (VALUES + RANDOM.normal(0, 9, len(VALUES)) > 0).astype(int)

    def tuned(threshold: float) -> Any:
        given = [threshold, threshold + 99]
        return TunedThresholdClassifierCV(
            estimator, scoring="accuracy", thresholds=given, response_method=how, cv=2
        ).fit(ROWS, labels)

    with pytest.raises(CompileError, match="has a threshold of its own"):
        convert_sklearn(make_pipeline(StandardScaler(), tuned(own)), [])
    model = tuned(none)
    session = onnxruntime.InferenceSession(convert_sklearn(model, []).SerializeToString())
    label, *_ = session.run(None, {session.get_inputs()[0].name: ROWS})
    np.testing.assert_array_equal(label, model.predict(ROWS))


@pytest.mark.filterwarnings("ignore")  # of libraries, about one another
def test_trees_of_several_kinds_send_missing_values_their_own_way() -> None:
    voters = [
        ("boosted", HistGradientBoostingClassifier(max_iter=3)),
        ("forest", RandomForestClassifier(n_estimators=3, random_state=0)),
    ]
    stack = StackingClassifier(voters[1:], DecisionTreeClassifier(max_depth=3), cv=2)
    for model in (VotingClassifier(voters, voting="soft"), stack):
        trained = model.fit(HOLES, CLASSES)
        session = onnxruntime.InferenceSession(convert_sklearn(trained, []).SerializeToString())
        *_, found = session.run(None, {session.get_inputs()[0].name: HOLES})
        np.testing.assert_allclose(found, trained.predict_proba(HOLES), atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of libraries, about one another
def test_support_vectors_far_from_zero_are_refused_where_their_sums_cancel() -> None:
    """In single precision; up to a third of the labels was another one."""
    rows, model = ROWS / 4 + 1000, SVC(kernel="linear", max_iter=20_000)
    with pytest.raises(CompileError, match="other answers"):
        convert_sklearn(model.fit(rows, CLASSES), [])
    scaled = make_pipeline(StandardScaler(), model).fit(rows, CLASSES)
    session = onnxruntime.InferenceSession(convert_sklearn(scaled, []).SerializeToString())
    found, *_ = session.run(None, {session.get_inputs()[0].name: rows.astype(np.float32)})
    np.testing.assert_array_equal(found, scaled.predict(rows.astype(np.float32)))


@pytest.mark.parametrize("trained_on", [ROWS, HOLES], ids=["whole", "holes"])
def test_an_isolation_forest_sends_missing_values_its_own_way(trained_on: Any) -> None:
    """Its converter has the tenth tree before the second."""
    trained = IsolationForest(n_estimators=30, random_state=0).fit(trained_on)
    session = onnxruntime.InferenceSession(convert_sklearn(trained, []).SerializeToString())
    label, score = session.run(None, {session.get_inputs()[0].name: HOLES})
    np.testing.assert_array_equal(label[:, 0], trained.predict(HOLES))
    np.testing.assert_allclose(score[:, 0], trained.decision_function(HOLES), atol=1e-5)


@pytest.mark.parametrize(
    ("encoder", "column"),
    [
        (OneHotEncoder(handle_unknown="ignore", sparse_output=False), ["C", "Q", np.nan]),
        (OrdinalEncoder(), [1.0, 2.0, np.nan]),
    ],
)
def test_a_category_for_what_is_missing_is_refused(encoder: Any, column: list[Any]) -> None:
    table = pd.DataFrame({"port": column * 100})
    model = make_pipeline(encoder, HistGradientBoostingClassifier(max_iter=3)).fit(table, CLASSES)
    kind = "BYTES" if isinstance(column[0], str) else "FP32"
    with pytest.raises(CompileError, match="has a category for what is missing"):
        convert_sklearn(model, (TensorSpec(name="port", datatype=kind, shape=("n",)),))


@pytest.mark.parametrize("column", [[*"abc"], [1.0, 2.0, 5.0]], ids=["texts", "numbers"])
def test_a_category_that_an_encoder_does_not_know_is_no_answer(column: list[Any]) -> None:
    """Nor is it to the model."""
    table = pd.DataFrame({"kind": column * 100, "x": column[::-1] * 100})
    datatype, dtype, new = ("BYTES", object, "q") if column[0] == "a" else ("FP32", np.float32, 9)
    names = ["kind", "x"]
    specs = tuple(TensorSpec(name=name, datatype=datatype, shape=("n",)) for name in names)
    feeds = {name: np.array(table[[name]], dtype) for name in names}
    unknown = feeds | {"x": np.full_like(feeds["x"], new)}
    told = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    for encoder, refuses in ((OrdinalEncoder(), True), (told, False)):
        steps = ColumnTransformer([("all", encoder, names)])
        model = make_pipeline(steps, LogisticRegression()).fit(table, CLASSES)
        session = onnxruntime.InferenceSession(convert_sklearn(model, specs).SerializeToString())
        right = model.predict_proba(table)
        np.testing.assert_allclose(session.run(None, feeds)[1], right, atol=1e-4)
        if refuses:
            with pytest.raises(Exception, match=r"known_to_.*out of data bounds"):
                session.run(None, unknown)
        else:
            session.run(None, unknown)


def test_without_a_signature_a_model_of_texts_says_what_it_lacks() -> None:
    model = make_pipeline(CountVectorizer(), LogisticRegression()).fit(TEXTS, [0, 1, 1, 0] * 10)
    with pytest.raises(CompileError, match="a signature is needed"):
        convert_sklearn(model, [])


def test_classes_may_be_true_and_false() -> None:
    trained = lgbm(lightgbm.LGBMClassifier, VALUES > 0)
    session = onnxruntime.InferenceSession(convert_lightgbm(trained, []).SerializeToString())
    label, scores = session.run(None, {session.get_inputs()[0].name: ROWS})
    np.testing.assert_array_equal(label, trained.predict(ROWS).astype(int))
    np.testing.assert_allclose(scores, trained.predict_proba(ROWS), atol=1e-4)


def test_a_model_that_names_no_operator_set_of_onnx_is_one(tmp_path: Path) -> None:
    """As XGBoost's own export is."""
    made = convert_xgboost(xgb(xgboost.XGBClassifier, VALUES > 0), [])
    kept = [opset for opset in made.opset_import if opset.domain == "ai.onnx.ml"]
    del made.opset_import[:]
    made.opset_import.extend(kept)
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    found = load(tmp_path / "m.onnx", print)
    assert {opset.domain for opset in found.model.opset_import} == {"ai.onnx.ml", ""}


@pytest.mark.filterwarnings("ignore")  # of libraries, about one another
@pytest.mark.parametrize(
    "model", [RandomForestClassifier(n_estimators=3, random_state=0), KNeighborsClassifier()]
)
def test_chances_of_several_labels_come_row_by_row(model: Any) -> None:
    """The converter has them label by label, of which hosts would make records for rows."""
    trained = model.fit(ROWS, np.stack([CLASSES, ROWS[:, 1] > 0, ROWS[:, 2] > 0], axis=1))
    session = onnxruntime.InferenceSession(convert_sklearn(trained, []).SerializeToString())
    labels, chances = session.run(None, {session.get_inputs()[0].name: ROWS[:3]})
    np.testing.assert_array_equal(labels, trained.predict(ROWS[:3]))
    expected = np.stack(trained.predict_proba(ROWS[:3]), axis=1)
    np.testing.assert_allclose(chances, expected, atol=1e-5)
    assert [one.shape[1:] for one in session.get_outputs()] == [[3], [3, 2]]


@pytest.mark.parametrize("kind", [KMeans, MiniBatchKMeans])
@pytest.mark.parametrize("far", [1e3, 1e5])
def test_k_means_far_from_zero_tells_the_same_clusters(kind: Any, far: float) -> None:
    """In single precision squares of such numbers say nothing of what lies between them."""
    rows = np.random.default_rng(0).standard_normal((1000, 5)).astype(np.float32) + np.float32(far)
    model = kind(8, n_init=1, random_state=0).fit(rows.astype(float))
    session = onnxruntime.InferenceSession(convert_sklearn(model, []).SerializeToString())
    label, distances = session.run(None, {session.get_inputs()[0].name: rows})
    assert np.mean(label == model.predict(rows.astype(float))) > 0.99
    assert np.allclose(distances, model.transform(rows.astype(float)), atol=1e-2)


def test_labels_are_declared_to_be_as_many_as_rows() -> None:
    """The converter of LightGBM says that there is one."""
    model = lightgbm.LGBMClassifier(n_estimators=2, verbose=-1).fit(ROWS, CLASSES)
    for value in convert_lightgbm(model, []).graph.output:
        assert not value.type.tensor_type.shape.dim[0].HasField("dim_value")
