"""What XGBoost, LightGBM and skops save is compiled as it is; what may run code is not opened."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pandas as pd
import pytest
import skops.io
import torch
import xgboost
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import (
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

import lrai_core as lrai
from lrai_core import CompileError, EnvironmentProblem
from lrai_core.engine.engine import find_engine
from lrai_import.boosters import convert, load
from lrai_import.objects import refuse
from lrai_import.onnx import Job

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.normal(0, 4, (300, 5)).astype(np.float32)
VALUES = ROWS @ np.array([1.0, -2.0, 0.5, 0.0, 0.0]) + ROWS[:, 0] * ROWS[:, 1]
CLASSES = (VALUES > 0).astype(int)
QUICK: dict[str, Any] = {"n_estimators": 12, "max_depth": 3, "n_jobs": 1, "random_state": 0}


def answers(model: Any) -> Any:
    return getattr(model, "predict_proba", model.predict)(ROWS)


@pytest.mark.parametrize("suffix", ["json", "ubj"])
@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        (xgboost.XGBClassifier, CLASSES),
        (xgboost.XGBClassifier, np.digitize(VALUES, [-5, 5])),
        (xgboost.XGBRegressor, VALUES),
    ],
)
def test_a_file_of_xgboost_answers_as_what_was_saved(
    tmp_path: Path, kind: Any, labels: Any, suffix: str
) -> None:
    model = kind(**QUICK).fit(ROWS, labels)
    model.save_model(file := tmp_path / f"m.{suffix}")
    check(load(file, print), file, answers(model))


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        (xgboost.XGBClassifier, CLASSES),
        (xgboost.XGBClassifier, np.digitize(VALUES, [-5, 5])),
        (xgboost.XGBRegressor, VALUES),
    ],
)
def test_a_file_of_what_was_stopped_early_answers_as_the_estimator(
    tmp_path: Path, kind: Any, labels: Any
) -> None:
    # Nothing is to be learnt, so that it stops, whichever tests have run before.
    noisy = np.random.default_rng(1).permutation(labels[:150])
    model = kind(**QUICK | {"n_estimators": 40}, early_stopping_rounds=5)
    model.fit(ROWS[:150], noisy, eval_set=[(ROWS[150:], labels[150:])], verbose=False)
    assert model.best_iteration + 1 < model.get_booster().num_boosted_rounds()
    model.save_model(file := tmp_path / "m.json")
    check(load(file, print), file, answers(model))


def test_a_booster_has_no_use_for_its_best_iteration(tmp_path: Path) -> None:
    """It predicts with all of its trees, unless it is asked for some."""
    rows = xgboost.DMatrix(ROWS, CLASSES)
    model = xgboost.train({"objective": "binary:logistic", "max_depth": 3}, rows, 5)
    model.set_attr(best_iteration="1")
    model.save_model(file := tmp_path / "m.json")
    right = model.predict(rows)
    check(load(file, print), file, np.stack([1 - right, right], 1))


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        (lightgbm.LGBMClassifier, CLASSES),
        (lightgbm.LGBMClassifier, np.digitize(VALUES, [-5, 5])),
        (lightgbm.LGBMRegressor, VALUES),
    ],
)
def test_a_file_of_lightgbm_answers_as_what_was_saved(
    tmp_path: Path, kind: Any, labels: Any
) -> None:
    model = kind(**QUICK, verbose=-1).fit(ROWS, labels)
    model.booster_.save_model(file := tmp_path / "m.txt")
    check(load(file, print), file, answers(model))


@pytest.mark.parametrize(
    "model",
    [
        make_pipeline(StandardScaler(), LogisticRegression()),
        RandomForestClassifier(n_estimators=9, max_depth=4, random_state=0),
        HistGradientBoostingClassifier(max_iter=9, random_state=0),
        GradientBoostingRegressor(n_estimators=9, random_state=0),
    ],
)
def test_a_file_of_skops_answers_as_what_was_saved(tmp_path: Path, model: Any) -> None:
    model.fit(ROWS, CLASSES if hasattr(model, "predict_proba") else VALUES)
    skops.io.dump(model, file := tmp_path / "m.skops")
    check(load(file, print), file, answers(model))


def test_a_file_of_skops_says_which_columns_it_takes(tmp_path: Path) -> None:
    table = pd.DataFrame({"city": ["a", "b", "c"] * 100, "x": ROWS[:, 0], "y": ROWS[:, 1]})
    steps = [("c", OneHotEncoder(), ["city"]), ("x", StandardScaler(), ["y", "x"])]
    model = make_pipeline(ColumnTransformer(steps), LogisticRegression()).fit(table, CLASSES)
    skops.io.dump(model, file := tmp_path / "m.skops")
    artifact = lrai.compile(file, out=tmp_path / "m.lrai", threads=1)
    inputs = [(one.name, one.datatype) for one in artifact.manifest.signature.inputs]
    assert inputs == [("city", "BYTES"), ("x", "FP32"), ("y", "FP32")]
    made = tmp_path / "m.onnx"
    made.write_bytes(load(file, print).model.SerializeToString())
    columns = [table[name].to_numpy()[:, None] for name in table]
    *_, got = find_engine("onnxruntime").load(made).run(columns)
    np.testing.assert_allclose(got, model.predict_proba(table), atol=1e-4)


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        (FunctionTransformer(os.getcwd), r"it holds posix\.getcwd, which skops does not trust; "),
        ([1, 2], "^m.skops cannot be converted: "),
        (LogisticRegression(), "how many columns"),
    ],
)
def test_what_skops_does_not_trust_or_is_no_model_is_refused(
    tmp_path: Path, saved: Any, says: str
) -> None:
    skops.io.dump(saved, file := tmp_path / "m.skops")
    with pytest.raises(CompileError, match=says):
        load(file, print)


def test_a_skops_that_may_run_code_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skops.io.dump(LogisticRegression().fit(ROWS, CLASSES), file := tmp_path / "m.skops")
    monkeypatch.setattr(skops, "__version__", "0.12.1")
    with pytest.raises(EnvironmentProblem, match=r"skops 0\.13 or later is needed: pip install "):
        convert(Job(str(file), "skops", str(tmp_path / "m.onnx")))


def check(found: lrai.Imported, file: Path, right: Any) -> None:
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    made = file.with_suffix(".onnx")
    made.write_bytes(found.model.SerializeToString())
    *_, got = find_engine("onnxruntime").load(made).run([ROWS])
    np.testing.assert_allclose(np.reshape(got, right.shape), right, rtol=1e-4, atol=1e-4)


def test_the_suffix_says_who_reads_it(tmp_path: Path) -> None:
    model = xgboost.XGBClassifier(**QUICK).fit(ROWS, CLASSES)
    model.save_model(file := tmp_path / "m.json")
    artifact = lrai.compile(file, out=tmp_path / "m.lrai", threads=1)
    (given,) = artifact.manifest.signature.inputs
    assert (given.name, given.shape[1:], given.batch_axis) == ("features", (5,), 0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.json", b'{"a": 1}'),
        ("m.json", b"no JSON"),
        ("m.ubj", b""),
        ("m.txt", b"a line\nand another\n"),
        ("m.txt", b""),
        ("m.skops", b"no archive"),
        ("m.skops", b""),
    ],
)
def test_what_is_none_is_refused_in_a_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CompileError, match=rf"^{name} cannot be converted: \S") as refused:
        load(tmp_path / name, print)
    assert "\n" not in str(refused.value)
    assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "wanted"), [("skops", r"'lrai\[trees\]'$"), ("xgboost", "xgboost$")]
)
def test_who_lacks_a_library_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, wanted: str
) -> None:
    monkeypatch.setitem(sys.modules, kind, None)
    (tmp_path / "m").touch()
    with pytest.raises(EnvironmentProblem, match=f"^{kind}.* is needed: pip install {wanted}"):
        convert(Job(source=str(tmp_path / "m"), out=str(tmp_path / "o"), kind=kind))


def test_a_file_that_is_not_there_is_said_not_to_be(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"^none\.json: No such file or directory$"):
        load(tmp_path / "none.json", print)


@pytest.mark.filterwarnings("ignore")  # of torch, about itself
def test_an_exported_program_is_not_opened_but_told_how(tmp_path: Path) -> None:
    program = torch.export.export(torch.nn.Linear(5, 2).eval(), (torch.from_numpy(ROWS),))
    torch.export.save(program, file := tmp_path / "m.pt2")
    says = r"^'m\.pt2' may run code of .* lrai_core\.compile\(torch\.export\.load\('m"
    with pytest.raises(CompileError, match=says):
        refuse(file, print)
    with pytest.raises(CompileError, match=says):
        lrai.compile(file, out=tmp_path / "m.lrai")
