"""Models saved, moved, damaged and loaded; answers compared with those of `mlflow.onnx`."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import queue
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import mlflow.onnx
import mlflow.pyfunc
import msgspec
import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import yaml  # type: ignore[import-untyped]
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature, infer_signature
from mlflow.pyfunc import PyFuncModel

import lrai_core as lrai
import lrai_mlflow
from benchmarks.models import classifier
from lrai_import.held import Held
from lrai_mlflow.serving import ServedModel, from_lrai, mlflow_errors, to_lrai
from lrai_mlflow.watch import Watch, tell_cap
from tests.own_runtime import own_runtime
from tests.tiny_models import column_model, text_model, token_model

Predict = Callable[[Any], Any]
Loaded = Callable[[str, str, bool], Predict]

MODELS: dict[str, Callable[[Path], Path]] = {
    "classifier": lambda path: classifier(path, seed=0)[0],
    "tokens": token_model,
    "columns": column_model,
}


@pytest.fixture(scope="module", autouse=True)
def runtime_folder() -> Iterator[Path]:
    with own_runtime() as folder:
        yield folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    return {name: make(folder / f"{name}.onnx") for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def artifacts(
    sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, lrai.Artifact]:
    folder = tmp_path_factory.mktemp("artifacts")
    return {
        name: lrai.compile(path, out=folder / f"{name}.lrai", threads=1)
        for name, path in sources.items()
    }


@pytest.fixture(scope="module")
def artifact(artifacts: dict[str, lrai.Artifact]) -> lrai.Artifact:
    return artifacts["classifier"]


@pytest.fixture(scope="module")
def saved(artifact: lrai.Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    lrai_mlflow.save_model(artifact, path)
    return path


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture(scope="module")
def loaded(
    sources: dict[str, Path],
    artifacts: dict[str, lrai.Artifact],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Loaded]:
    """Return a function from flavor, model, and whether it has a signature, to what is served."""
    folder = tmp_path_factory.mktemp("loaded")
    cache: dict[Path, PyFuncModel] = {}

    def load(flavor: str, name: str, signature: bool) -> Predict:
        path = folder / f"{flavor}-{name}-{signature}"
        if path not in cache:
            found = lrai_mlflow.signature_of(artifacts[name]) if signature else None
            if flavor == "lrai":
                lrai_mlflow.save_model(artifacts[name], path, signature=found or False)
            else:
                mlflow.onnx.save_model(
                    onnx.load(sources[name]),
                    str(path),
                    signature=found,
                    pip_requirements=["onnxruntime"],
                    onnx_execution_providers=["CPUExecutionProvider"],
                )
            cache[path] = mlflow.pyfunc.load_model(str(path))
        return cache[path].predict

    yield load
    cache.clear()
    gc.collect()


def rows(count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(1).normal(size=(count, 64)).astype(np.float32)


def runtime_of(model: PyFuncModel) -> lrai.Runtime:
    served = model._model_impl
    assert isinstance(served, ServedModel)
    return served.held.runtime


def served_by(model: PyFuncModel) -> Any:
    served = model._model_impl
    assert isinstance(served, ServedModel)
    return next(m for m in served.held.runtime.models() if m.name == served.held.name)


TOKENS = {
    "input_ids": np.array([[3, 14, 15], [9, 2, 0]]),
    "attention_mask": np.array([[1, 1, 1], [1, 1, 0]]),
}
COLUMNS = {
    "price": np.array([1.5, 2.0, 0.25], dtype=np.float32),
    "count": np.array([1, 2, 3], dtype=np.int32),
}


@pytest.mark.parametrize(
    ("name", "signature", "data"),
    [
        pytest.param("classifier", True, {"features": rows(3)}, id="array by name"),
        pytest.param("classifier", True, rows(3), id="bare array"),
        pytest.param(
            "classifier", True, pd.DataFrame({"features": list(rows(3))}), id="column of arrays"
        ),
        pytest.param(
            "classifier",
            True,
            pd.DataFrame({"features": [row.tolist() for row in rows(3)]}),
            id="column of lists",
        ),
        pytest.param(
            "classifier", False, {"features": rows(3).astype(float)}, id="float64 without signature"
        ),
        pytest.param("classifier", False, rows(3).astype(float), id="bare float64"),
        pytest.param("classifier", False, pd.DataFrame(rows(3)), id="column per feature"),
        pytest.param(
            "classifier", False, pd.DataFrame(rows(3)).astype(float), id="float64 per feature"
        ),
        pytest.param("tokens", True, TOKENS, id="tokens"),
        pytest.param("tokens", False, TOKENS, id="tokens without signature"),
        pytest.param("columns", True, COLUMNS, id="columns as arrays"),
        pytest.param("columns", True, pd.DataFrame(COLUMNS), id="columns"),
        pytest.param(
            "columns", True, pd.DataFrame(COLUMNS).astype("float64"), id="columns as JSON has them"
        ),
        pytest.param("columns", False, pd.DataFrame(COLUMNS), id="columns without signature"),
    ],
)
def test_answers_are_those_of_mlflow_onnx(
    loaded: Loaded, name: str, signature: bool, data: Any
) -> None:
    expected = loaded("onnx", name, signature)(data)
    answer = loaded("lrai", name, signature)(data)
    assert type(answer) is type(expected)
    assert list(answer) == list(expected)
    for output in expected:
        wanted, got = np.asarray(expected[output]), np.asarray(answer[output])
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_records_of_lists_are_answered_row_by_row(loaded: Loaded) -> None:
    predict = loaded("lrai", "tokens", False)
    expected = loaded("onnx", "tokens", False)(TOKENS)
    records = pd.DataFrame({name: array.tolist() for name, array in TOKENS.items()})
    answer = predict(records)
    assert len(answer) == 2
    np.testing.assert_allclose(np.stack(list(answer["mean"])), expected["mean"], rtol=1e-5)
    assert answer["tokens"][0].shape == (3, 4)
    as_dictionaries = predict(records.to_dict(orient="records"))
    np.testing.assert_array_equal(as_dictionaries["mean"], np.stack(list(answer["mean"])))


@pytest.mark.parametrize("dtype", ["int64", "float64", "int16"])
def test_numbers_are_cast_where_nothing_is_lost(loaded: Loaded, dtype: str) -> None:
    data = {"price": np.array([1, 2], dtype=dtype), "count": np.array([3, 4], dtype=dtype)}
    total = loaded("lrai", "columns", False)(data)["total"]
    assert total.dtype == np.float32
    assert total.tolist() == [3, 8]


@pytest.mark.parametrize("count", [[1.5], [2**40], [float("nan")], ["many"]])
def test_numbers_that_do_not_fit_are_refused(loaded: Loaded, count: list[Any]) -> None:
    data = {"price": np.array([1.0]), "count": np.array(count)}
    with pytest.raises(MlflowException, match=r"'count'.*the model takes INT32") as refused:
        loaded("lrai", "columns", False)(data)
    assert refused.value.get_http_status_code() == 400


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"price": [1.0]}, "'count': missing"),
        ({"price": [1.0], "count": [1], "size": [1]}, "no such input"),
        ({"price": [[1.0], [1.0, 2.0]], "count": [1]}, "different shapes"),
        ({"price": [[1.0]], "count": [1]}, "2 dimensions"),
        (np.zeros(3), "needed: values by input name"),
        ([1.0, 2.0], "needed: values by input name"),
        (pd.DataFrame({"price": [1.0]}), "'count': missing"),
        ("text", "needed: values by input name"),
    ],
)
def test_what_does_not_fit_the_model_is_a_clear_400(
    loaded: Loaded, data: Any, message: str
) -> None:
    with pytest.raises(MlflowException, match=message) as refused:
        loaded("lrai", "columns", False)(data)
    assert refused.value.get_http_status_code() == 400


@pytest.mark.parametrize("kind", ["Int64", "Float64", "boolean", "object"])
def test_what_pandas_has_as_missing_is_nan_among_real_numbers(kind: Any) -> None:
    table = pd.DataFrame({"a": pd.array([1, None], dtype=kind), "b": pd.array([0, 1], "Int64")})
    features = lrai.TensorSpec(name="features", datatype="FP32", shape=("n", 2))
    columns = [lrai.TensorSpec(name=name, datatype="FP32", shape=("n", 1)) for name in "ab"]
    whole = to_lrai(table, [features], {}, "m").inputs["features"]
    np.testing.assert_array_equal(whole, np.array([[1, 0], [np.nan, 1]], np.float32))
    each = to_lrai(table, columns, {}, "m").inputs
    np.testing.assert_array_equal(each["a"], np.array([[1], [np.nan]], np.float32))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (lrai.InvalidTensor("x", "missing"), 400),
        (lrai.ModelNotFound("no model"), 404),
        (lrai.QueueFull("full", limit=1, retry_after_seconds=2.5), 429),
        (lrai.ActorError("lost"), 503),
        (lrai.DeadlineExceeded("late"), 504),
        (lrai.LraiError("a bug"), 500),
    ],
)
def test_errors_keep_their_status(error: lrai.LraiError, status: int) -> None:
    with pytest.raises(MlflowException, match=re.escape(str(error))) as raised, mlflow_errors():
        raise error
    assert raised.value.get_http_status_code() == status
    wait = raised.value.json_kwargs.get("retry_after_seconds")
    assert wait == getattr(error, "retry_after_seconds", None)
    assert (wait is not None) == (status in (429, 503, 504))


def test_any_number_of_rows_is_scored(saved: Path, sources: dict[str, Path]) -> None:
    model = mlflow.pyfunc.load_model(str(saved))
    features = rows(5000)  # more than a request may have
    found = model.predict({"features": features})["logits"]
    session = onnxruntime.InferenceSession(sources["classifier"])
    (expected,) = session.run(None, {"features": features})
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_any_number_of_rows_is_scored_within_the_limits_of_a_runtime_that_others_started(
    saved: Path, sources: dict[str, Path]
) -> None:
    features = rows(500)
    with own_runtime(LRAI_LIMITS_REQUEST_ROWS="256"), lrai.Runtime(address="auto"):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("LRAI_LIMITS_REQUEST_ROWS")
            served = ServedModel(saved / "model.lrai")
        assert served.held.runtime.config.limits.request_rows == 4096
        found = served.predict({"features": features})["logits"]
        served.held.close()
    session = onnxruntime.InferenceSession(sources["classifier"])
    (expected,) = session.run(None, {"features": features})
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_no_rows_get_no_answers(artifacts: dict[str, lrai.Artifact], tmp_path: Path) -> None:
    lrai_mlflow.save_model(artifacts["columns"], tmp_path / "model", signature=False)
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    names = [spec.name for spec in artifacts["columns"].manifest.signature.inputs]
    answer = model.predict(pd.DataFrame({name: [] for name in names}))
    outputs = artifacts["columns"].manifest.signature.outputs
    assert list(answer.columns) == [spec.name for spec in outputs]
    assert len(answer) == 0


def test_a_model_that_could_not_be_saved_can_be_saved_again(
    artifact: lrai.Artifact, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="Only one of"):
        lrai_mlflow.save_model(
            artifact, tmp_path / "m", conda_env={"name": "x"}, pip_requirements=["numpy"]
        )
    assert not (tmp_path / "m").exists()
    lrai_mlflow.save_model(artifact, tmp_path / "m")


def test_a_deadline_is_a_parameter(saved: Path) -> None:
    served = ServedModel(saved / "model.lrai", {})
    with pytest.raises(MlflowException, match="allowed") as late:
        served.predict(rows(1), params={"timeout_ms": 1e-9})
    assert late.value.get_http_status_code() == 504


@pytest.mark.parametrize(
    ("settings", "timeout_ms"), [({}, 300_000), ({"scheduler": {"default_timeout_ms": 5000}}, 5000)]
)
def test_in_a_worker_the_servers_time_is_that_of_who_states_none(
    saved: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], timeout_ms: float
) -> None:
    """A longer one: the runtime is others', too, so that a shorter one is not theirs."""
    monkeypatch.setenv("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "300")  # as `serve -t 300` does
    monkeypatch.setattr("lrai_mlflow.serving.is_worker", lambda: True)
    monkeypatch.setattr("lrai_mlflow.serving.Watch", lambda *_: None)  # which ends processes
    served = ServedModel(saved / "model.lrai", settings)
    assert served.held.runtime.config.scheduler.default_timeout_ms == timeout_ms


def test_a_worker_tells_of_the_cap_of_what_it_serves(
    saved: Path, artifact: lrai.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[tuple[str, str]]()

    def tell(served: lrai.Artifact, variant: str) -> None:
        told.append((served.sha256, variant))

    monkeypatch.setattr("lrai_mlflow.serving.Watch", lambda *_: None)  # which ends processes
    monkeypatch.setattr("lrai_mlflow.serving.tell_cap", tell)
    ServedModel(saved / "model.lrai")
    assert told == [], "nobody caps who is no worker"
    monkeypatch.setattr("lrai_mlflow.serving.is_worker", lambda: True)
    ServedModel(saved / "model.lrai")
    assert told == [(artifact.sha256, "fp32")]


def test_only_in_a_worker_is_it(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "10")
    served = ServedModel(saved / "model.lrai", {})
    assert served.held.runtime.config.scheduler.default_timeout_ms == 60_000


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("tokens", ["tokens"]),
        (" tokens, mean", ["tokens", "mean"]),
        ("", ["mean", "tokens"]),
        (None, ["mean", "tokens"]),
    ],
)
def test_some_outputs_can_be_asked_for(
    artifacts: dict[str, lrai.Artifact], tmp_path: Path, wanted: str | None, names: list[str]
) -> None:
    lrai_mlflow.save_model(artifacts["tokens"], tmp_path / "model")
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    assert list(model.predict(TOKENS, params={"outputs": wanted})) == names
    with pytest.raises(MlflowException, match="median") as refused:
        model.predict(TOKENS, params={"outputs": "median"})
    assert refused.value.get_http_status_code() == 400


def test_a_table_without_rows_gets_the_outputs_that_it_asks_for(
    artifacts: dict[str, lrai.Artifact], tmp_path: Path
) -> None:
    signature = ModelSignature(params=lrai_mlflow.signature_of(artifacts["tokens"]).params)
    lrai_mlflow.save_model(artifacts["tokens"], tmp_path / "model", signature=signature)
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    table = pd.DataFrame({name: [] for name in TOKENS})
    assert list(model.predict(table, params={"outputs": "tokens"}).columns) == ["tokens"]


def test_a_loaded_model_is_the_artifact_that_was_saved(
    artifact: lrai.Artifact, saved: Path
) -> None:
    assert lrai_mlflow.load_model(str(saved)).sha256 == artifact.sha256


def test_a_moved_model_serves(copied: Path, sources: dict[str, Path]) -> None:
    model = mlflow.pyfunc.load_model(str(copied.rename(copied.with_name("elsewhere"))))
    session = onnxruntime.InferenceSession(sources["classifier"])
    expected = session.run(None, {"features": rows(2)})[0]
    np.testing.assert_allclose(model.predict(rows(2))["logits"], expected, rtol=1e-4, atol=1e-4)


def test_two_versions_of_lrai_are_named(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = version("lrai")
    description = yaml.safe_load((copied / "MLmodel").read_text())
    description["flavors"]["lrai"]["lrai_version"] = "9.9.9"
    (copied / "MLmodel").write_text(yaml.safe_dump(description))
    logger = logging.getLogger("mlflow.lrai")  # MLflow's loggers tell no other
    logger.addHandler(caplog.handler)
    try:
        for load in (lrai_mlflow.load_model, mlflow.pyfunc.load_model):
            caplog.clear()
            assert load(str(copied))
            assert f"was saved by lrai 9.9.9, and is served by lrai {ours}" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
    manifest = copied / "model.lrai" / "manifest.json"
    newer = {"schema_version": 9, "lrai_version": "9.9.9"}
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | newer))
    named = f"written by lrai 9.9.9, this is lrai {ours}: install that one"
    for load in (lrai_mlflow.load_model, mlflow.pyfunc.load_model):
        with pytest.raises(MlflowException, match=re.escape(named)):
            load(str(copied))


def test_a_model_says_what_is_inside(artifact: lrai.Artifact, saved: Path) -> None:
    flavors = mlflow.models.Model.load(saved).flavors
    assert flavors["python_function"]["loader_module"] == "lrai_mlflow"
    assert flavors["lrai"] == {
        "data": "model.lrai",
        "code": None,
        "lrai_version": version("lrai"),
        "artifact_version": artifact.version,
        "manifest_sha256": artifact.sha256,
        "variant": "fp32",
        "certificate": None,
    }


def test_the_signature_is_the_artifacts_own(artifacts: dict[str, lrai.Artifact]) -> None:
    found = lrai_mlflow.signature_of(artifacts["tokens"])
    assert [(spec.name, str(spec.type), spec.shape) for spec in found.inputs.inputs] == [
        ("input_ids", "int64", (-1, -1)),
        ("attention_mask", "int64", (-1, -1)),
    ]
    assert [(spec.name, str(spec.type), spec.shape) for spec in found.outputs.inputs] == [
        ("mean", "float32", (-1, 4)),
        ("tokens", "float32", (-1, -1, 4)),
    ]


@pytest.mark.parametrize("given", [False, infer_signature({"features": rows(1)})])
def test_another_signature_or_none_can_be_given(
    artifact: lrai.Artifact, tmp_path: Path, given: ModelSignature | Literal[False]
) -> None:
    lrai_mlflow.save_model(artifact, tmp_path / "model", signature=given)
    assert mlflow.models.Model.load(tmp_path / "model").signature == (given or None)


def test_an_input_example_is_kept(artifact: lrai.Artifact, tmp_path: Path) -> None:
    lrai_mlflow.save_model(artifact, tmp_path / "model", input_example={"features": rows(1)})
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    np.testing.assert_array_equal(model.input_example["features"], rows(1))


def test_requirements_are_this_environment_and_our_wheel(saved: Path) -> None:
    requirements = (saved / "requirements.txt").read_text().splitlines()
    own = requirements.pop()
    assert re.fullmatch(rf"lrai=={version('lrai')}\+g[0-9a-f]{{12}}", own)
    (wheel,) = (saved / "wheels").iterdir()
    assert wheel.name == f"{own.replace('==', '-')}-py3-none-any.whl"
    assert requirements.pop() == "--find-links wheels"
    assert requirements.pop() == "-c constraints.txt"
    names = ["mlflow-skinny", "pandas", "numpy", "msgspec", "onnx"]
    names += ["onnxruntime", "pyzmq"]
    assert requirements == [f"{name}=={version(name)}" for name in names]
    assert own in (saved / "conda.yaml").read_text()


def test_the_wheel_is_found_from_wherever_pip_runs(saved: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-index"]
    command += ["--ignore-installed", "--report", "-", "--quiet", "-r"]
    own = tmp_path / "requirements.txt"
    lines = (saved / "requirements.txt").read_text().splitlines()[-2:]
    shutil.copytree(saved / "wheels", tmp_path / "wheels")
    own.write_text("\n".join(lines))
    done = subprocess.run([*command, str(own)], capture_output=True, check=True, cwd="/")
    (found,) = json.loads(done.stdout)["install"]
    assert found["download_info"]["url"].startswith((tmp_path / "wheels").as_uri())


def test_a_model_that_takes_text_requires_its_tokenizer(tmp_path: Path) -> None:
    lrai.compile(text_model(tmp_path / "t.onnx"), out=tmp_path / "t.lrai", threads=1)
    lrai_mlflow.save_model(tmp_path / "t.lrai", tmp_path / "saved")
    pin = f"onnxruntime-extensions=={version('onnxruntime-extensions')}"
    assert pin in (tmp_path / "saved" / "requirements.txt").read_text().splitlines()
    assert pin in (tmp_path / "saved" / "constraints.txt").read_text().splitlines()


def test_constraints_pin_what_the_requirements_bring(saved: Path) -> None:
    pins = dict(line.split("==") for line in (saved / "constraints.txt").read_text().split())
    assert {"numpy", "protobuf", "starlette", "rich", "uvicorn"} <= set(pins)
    assert not {"torch", "lrai", "pytest", "matplotlib"} & set(pins)
    assert pins == {name: version(name) for name in pins}


def test_given_requirements_replace_ours_but_for_the_wheel(
    artifact: lrai.Artifact, tmp_path: Path
) -> None:
    lrai_mlflow.save_model(artifact, tmp_path / "a", pip_requirements=["numpy"])
    mlflow_pin, numpy, _, own = (tmp_path / "a" / "requirements.txt").read_text().splitlines()
    assert (mlflow_pin.partition("==")[0], numpy) == ("mlflow", "numpy")
    assert own.startswith("lrai==")
    assert len(list((tmp_path / "a" / "wheels").iterdir())) == 1
    assert not (tmp_path / "a" / "constraints.txt").exists()

    lrai_mlflow.save_model(artifact, tmp_path / "b", pip_requirements=["lrai", "mlflow-skinny"])
    assert (tmp_path / "b" / "requirements.txt").read_text().split() == ["lrai", "mlflow-skinny"]
    assert not (tmp_path / "b" / "wheels").exists()


def test_more_requirements_join_ours(artifact: lrai.Artifact, tmp_path: Path) -> None:
    wanted = tmp_path / "wanted.txt"
    wanted.write_text("idna\n-c limits.txt\n")
    (tmp_path / "limits.txt").write_text("packaging<100\n")
    lrai_mlflow.save_model(artifact, tmp_path / "model", extra_pip_requirements=str(wanted))
    requirements = (tmp_path / "model" / "requirements.txt").read_text().splitlines()
    assert {"idna", f"numpy=={version('numpy')}", "-c constraints.txt"} <= set(requirements)
    constraints = (tmp_path / "model" / "constraints.txt").read_text().splitlines()
    assert {"packaging<100", f"starlette=={version('starlette')}"} <= set(constraints)


def test_a_changed_artifact_is_not_saved(artifact: lrai.Artifact, tmp_path: Path) -> None:
    broken = shutil.copytree(artifact.path, tmp_path / "broken.lrai")
    damage(broken / "source" / "weights.bin")
    with pytest.raises(MlflowException, match=r"weights\.bin has changed"):
        lrai_mlflow.save_model(broken, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_that_is_no_artifact_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(MlflowException, match=r"not an artifact: there is no manifest\.json"):
        lrai_mlflow.save_model(tmp_path / "nothing.lrai", tmp_path / "model")


def test_a_damaged_model_is_not_loaded(copied: Path) -> None:
    damage(copied / "model.lrai" / "source" / "weights.bin")
    with pytest.raises(MlflowException, match=r"weights\.bin has changed"):
        lrai_mlflow.load_model(str(copied))
    with pytest.raises(MlflowException, match=r"weights\.bin has changed"):
        mlflow.pyfunc.load_model(str(copied))


def test_a_model_without_its_artifact_is_not_loaded(copied: Path) -> None:
    shutil.rmtree(copied / "model.lrai")
    with pytest.raises(MlflowException, match="not an artifact"):
        lrai_mlflow.load_model(str(copied))
    with pytest.raises(MlflowException, match="not an artifact"):
        mlflow.pyfunc.load_model(str(copied))


def test_a_folder_in_use_is_not_written_to(artifact: lrai.Artifact, saved: Path) -> None:
    with pytest.raises(MlflowException, match="exists and is not empty"):
        lrai_mlflow.save_model(artifact, saved)


def test_settings_travel_in_the_model_and_give_way_to_the_caller(
    artifact: lrai.Artifact, tmp_path: Path
) -> None:
    lrai_mlflow.save_model(
        artifact,
        tmp_path / "model",
        model_config={"limits": {"request_rows": 2}, "actor.replicas": 1},
    )
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config={"actor.replicas": 2})
    assert runtime_of(model).config.limits.request_rows == 2
    assert len(served_by(model).actor_pids) == 2


def test_an_unknown_setting_is_refused_when_it_is_saved(
    artifact: lrai.Artifact, tmp_path: Path
) -> None:
    with pytest.raises(MlflowException, match=r"unknown setting 'scheduler\.speed'"):
        lrai_mlflow.save_model(artifact, tmp_path / "m", model_config={"scheduler": {"speed": 1}})


def test_a_model_that_is_let_go_leaves_no_process(artifact: lrai.Artifact, tmp_path: Path) -> None:
    lrai_mlflow.save_model(artifact, tmp_path / "model", model_config={"variant": "fp32"})
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    (pid,) = served_by(model).actor_pids
    process = Path("/proc", str(pid))
    assert process.exists()
    del model
    gc.collect()
    deadline = time.monotonic() + 60
    while process.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not process.exists()


def test_a_logged_model_is_tried_with_its_example_and_loaded_by_its_address(
    artifact: lrai.Artifact,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> None:
    request.addfinalizer(partial(mlflow.set_tracking_uri, mlflow.get_tracking_uri()))
    mlflow.set_tracking_uri((tmp_path / "tracking").as_uri())
    with mlflow.start_run():
        logged = lrai_mlflow.log_model(
            artifact, name="classifier", input_example={"features": rows(1)}
        )
    assert logged.flavors["lrai"]["artifact_version"] == artifact.version
    assert lrai_mlflow.load_model(logged.model_uri).sha256 == artifact.sha256
    assert "Failed to validate serving input" not in caplog.text


@dataclasses.dataclass
class Looked:
    """Stands for a model in a runtime, which says what it is told to say."""

    says: str | lrai.LraiError
    name: str = "model"

    def kept_state(self) -> str:
        if isinstance(self.says, lrai.LraiError):
            raise self.says
        return self.says


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrai_mlflow.watch._LOOK_SECONDS", 0.2)


@pytest.mark.usefixtures("quick_looks")
@pytest.mark.parametrize(
    ("says", "patience_seconds", "why"),
    [
        ("dead", 60.0, "it was given up or unloaded, and cannot be loaded again"),
        ("stalled", 0.2, "it was not ready for"),
        (lrai.NotReady("no answer"), 0.2, "it was not ready for"),
    ],
)
def test_a_model_that_will_not_come_back_ends_the_worker(
    says: str | lrai.LraiError, patience_seconds: float, why: str
) -> None:
    ended = queue.Queue[str]()
    Watch(cast("Held", Looked(says)), patience_seconds, ended.put)
    assert why in ended.get(timeout=60)
    time.sleep(0.5)
    assert ended.empty(), "it is told once"


@pytest.mark.usefixtures("quick_looks")
@pytest.mark.parametrize("says", ["ok", "idle", "stalled"])
def test_a_model_that_works_or_is_slow_does_not(says: str) -> None:
    ended = queue.Queue[str]()
    watch = Watch(cast("Held", Looked(says)), 60.0 if says == "stalled" else 0.2, ended.put)
    time.sleep(1.5)
    watch.close()
    assert ended.empty()


@pytest.mark.parametrize(
    ("workers", "told"), [("1", True), ("2", True), ("16", False), ("many", True)]
)
@pytest.mark.parametrize("cpus", [{"cpu_count": 2}, {"cpu_count": 28, "process_cpu_count": 2}])
def test_a_cap_that_keeps_calls_small_is_told(
    artifact: lrai.Artifact,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cpus: dict[str, int],
    workers: str,
    told: bool,
) -> None:
    variant = artifact.manifest.variant("fp32")
    profile = tuple(
        msgspec.structs.replace(variant.latency[0], rows=rows, length=0, median_ms=milliseconds)
        for rows, milliseconds in ((1, 1.0), (4, 2.0), (16, 4.0), (64, 8.0))
    )
    variants = (msgspec.structs.replace(variant, latency=profile),)
    manifest = msgspec.structs.replace(artifact.manifest, variants=variants)
    monkeypatch.delattr("os.process_cpu_count", raising=False)  # which Python has from 3.13 on
    for name, count in cpus.items():
        monkeypatch.setattr(f"os.{name}", partial(int, count), raising=False)
    monkeypatch.setattr("sys.argv", ["uvicorn", "--workers", workers, "app"])
    tell_cap(dataclasses.replace(artifact, manifest=manifest), "fp32")
    assert ("at most 6 requests at a time (CPUs + 4, to 32)" in caplog.text) == told
    assert ("--workers 11 reaches them" in caplog.text) == told


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("by_row", [True, False])
def test_an_answer_to_a_table_has_the_index_of_its_rows(*, by_row: bool) -> None:
    """Pandas joins by it: a table that was split has its rows in any order."""
    table = pd.DataFrame({"x": [1.0, 2.0, 3.0]}, index=[7, 2, 5])

    def answer(**outputs: Any) -> Any:
        told = lrai.InferenceResponse(
            model_name="m", model_version="1", id="", outputs=outputs, parameters={}
        )
        return from_lrai(told, table, by_row=by_row)

    table["y"] = answer(y=np.arange(3))["y"]
    assert table["y"].tolist() == [0, 1, 2]
    wide = answer(y=np.zeros((3, 2)))
    assert wide.index.tolist() == ([7, 2, 5] if by_row else [0, 1, 2, 3, 4, 5])
