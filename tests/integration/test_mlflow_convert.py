"""Logged models of other flavors converted: answers, lineage, and pickles that stay closed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightgbm
import mlflow
import mlflow.lightgbm
import mlflow.onnx
import mlflow.pyfunc
import mlflow.pytorch
import mlflow.sklearn
import mlflow.xgboost
import numpy as np
import onnx
import pandas as pd
import pytest
import torch
import xgboost
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature, infer_signature
from mlflow.models.model import ModelInfo
from mlflow.types.schema import ColSpec, Schema
from sklearn.compose import ColumnTransformer
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

import lrai_core as lrai
import lrai_mlflow
from lrai_mlflow.commands.app import main
from lrai_mlflow.commands.convert import _rows, options_of
from lrai_mlflow.commands.facts import saved_model
from tests.core.compiler.onnx_files import linear
from tests.integration.mlflow_server import own_store
from tests.integration.test_cli import in_small_filesystem
from tests.own_runtime import own_runtime
from tests.tiny_models import column_model

pytestmark = [
    pytest.mark.server,
    pytest.mark.filterwarnings("ignore"),  # of a dozen libraries that meet here
]

RANDOM = np.random.default_rng(11)
TABLE = pd.DataFrame(RANDOM.normal(size=(200, 4)).round(3), columns=list("abcd"))
LABELS = (TABLE.a + TABLE.b > 0).astype(int)


@pytest.fixture(scope="module", autouse=True)
def runtime_folder() -> Iterator[Path]:
    with own_runtime() as folder:
        yield folder


@pytest.fixture(scope="module", autouse=True)
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[mlflow.MlflowClient]:
    with own_store(tmp_path_factory.mktemp("tracking")) as client:
        yield client


def pipeline() -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression()).fit(TABLE, LABELS)


def log_sklearn(model: Any, table: pd.DataFrame = TABLE, **options: Any) -> ModelInfo:
    signature = infer_signature(table, model.predict(table))
    return logged_by(mlflow.sklearn.log_model, model, signature=signature, **options)


def logged_by(log: Callable[..., Any], model: Any, **options: Any) -> ModelInfo:
    """Log a model; told what it requires, MLflow need not find it out in a process of its own."""
    logged: ModelInfo = log(model, name="source", pip_requirements=["numpy"], **options)
    return logged


def answers(logged: ModelInfo, table: pd.DataFrame) -> Any:
    return mlflow.pyfunc.load_model(logged.model_uri).predict(table)


def test_a_pipeline_keeps_its_requests_and_its_answers(client: mlflow.MlflowClient) -> None:
    model = pipeline()
    told: dict[str, Any] = {"input_example": TABLE.head(2), "metadata": {"team": "ann"}}
    source = log_sklearn(
        model, serialization_format="skops", registered_model_name="eu.risk", **told
    )
    made = lrai_mlflow.convert("models:/eu.risk/1", threads=1)
    assert str(made.registered_model_version) == "2"
    answer = answers(made, TABLE[["d", "c", "b", "a"]].head(20))
    assert answer["label"].tolist() == model.predict(TABLE.head(20)).tolist()
    expected = model.predict_proba(TABLE.head(20))
    np.testing.assert_allclose(np.stack(list(answer["probabilities"])), expected, atol=1e-5)
    assert made.signature is not None
    assert source.signature is not None
    assert made.signature.inputs == source.signature.inputs
    tags = client.get_model_version("eu.risk", "2").tags
    assert tags["lrai.source_uri"] == "models:/eu.risk/1"
    assert tags["lrai.source_model_id"] == source.model_id
    assert tags["lrai.source_flavor"] == "sklearn"
    assert made.metadata is not None
    assert made.metadata["lrai_origin"]["source_model_id"] == source.model_id
    assert made.metadata["team"] == "ann"
    example = mlflow.pyfunc.load_model(made.model_uri).input_example
    pd.testing.assert_frame_equal(example, TABLE.head(2))


def test_mlflow_evaluate_judges_a_converted_model(client: mlflow.MlflowClient) -> None:
    prices = TABLE.a * 2 - TABLE.c + 1
    model = LinearRegression().fit(TABLE, prices)
    source = log_sklearn(model, serialization_format="skops")
    made = lrai_mlflow.convert(source.model_uri, threads=1)
    with mlflow.start_run():
        result = mlflow.models.evaluate(
            made.model_uri,
            TABLE.assign(price=prices),
            targets="price",
            model_type="regressor",
            evaluator_config={"log_model_explainability": False},
        )
    assert result.metrics["mean_absolute_error"] < 1e-4
    assert result.metrics["example_count"] == len(TABLE)


def test_columns_of_text_stay_columns() -> None:
    table = pd.DataFrame({"kind": ["x", "y", "z", "x"] * 20, "size": RANDOM.normal(size=80)})
    encoder = ColumnTransformer(
        [
            ("kind", OneHotEncoder(handle_unknown="ignore"), ["kind"]),
            ("size", "passthrough", ["size"]),
        ]
    )
    model = make_pipeline(encoder, LinearRegression()).fit(table, RANDOM.normal(size=80))
    made = lrai_mlflow.convert(
        log_sklearn(model, table, serialization_format="skops").model_uri, threads=1
    )
    answer = answers(made, table.head(6))
    np.testing.assert_allclose(answer.iloc[:, 0], model.predict(table.head(6)), atol=1e-4)


def test_a_column_that_a_model_was_not_fitted_with_need_not_be_sent() -> None:
    encoder = ColumnTransformer([("scale", StandardScaler(), ["a", "b"])])
    model = make_pipeline(encoder, LinearRegression()).fit(TABLE[["a", "b"]], TABLE.c)
    columns = [ColSpec("double", "b"), ColSpec("string", "note", required=False)]
    signature = ModelSignature(Schema([*columns, ColSpec("double", "a")]))
    kind = {"serialization_format": "skops"}
    source = logged_by(mlflow.sklearn.log_model, model, signature=signature, **kind)
    made = lrai_mlflow.convert(source.model_uri, threads=1)
    for table in (TABLE[["a", "b"]], TABLE[["a", "b"]].assign(note="as before")):
        found = answers(made, table).iloc[:, 0]
        np.testing.assert_allclose(found, answers(source, table), atol=1e-4)


def test_rows_to_evaluate_on_can_be_the_table_itself() -> None:
    source = log_sklearn(pipeline(), serialization_format="skops")
    made = lrai_mlflow.convert(source.model_uri, evaluation=TABLE, threads=1)
    assert made.metadata is not None
    assert made.metadata["lrai"]["gate"]["rows"] > 100


def test_labels_of_a_table_judge_and_more_can_be_said_to_the_compiler_and_the_log() -> None:
    source = log_sklearn(pipeline(), serialization_format="skops", metadata={"team": "ann"})
    made = lrai_mlflow.convert(
        source.model_uri,
        evaluation=TABLE.assign(label=LABELS),
        options={"max_accuracy_loss": 0.05, "threads": 1},
        metadata={"ticket": 7},
        tags={"owner": "bob"},
        model_config={"scheduler": {"max_batch_rows": 16}},
    )
    assert made.metadata is not None
    assert made.metadata["lrai"]["gate"]["measure"].startswith("top1 on labels")
    assert (made.metadata["team"], made.metadata["ticket"]) == ("ann", 7)
    assert made.metadata["lrai_origin"]["source_flavor"] == "sklearn"
    tags = mlflow.get_logged_model(made.model_id).tags
    assert (tags["owner"], tags["lrai.source_flavor"]) == ("bob", "sklearn")
    config = mlflow.pyfunc.load_model(made.model_uri).model_config
    assert config["scheduler"]["max_batch_rows"] == 16


def test_what_neither_takes_is_refused_before_the_work() -> None:
    nowhere = "models:/nobody/1"  # which is not looked for
    with pytest.raises(TypeError, match="'colour'"):
        lrai_mlflow.convert(nowhere, colour="red")
    for name in ("colour", "out", "evaluation"):
        with pytest.raises(MlflowException, match=f"no option '{name}'; there are .*max_disparity"):
            lrai_mlflow.convert(nowhere, options={name: "red"})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("max_accuracy_loss=0.02", 0.02),
        ("epsilon=1e-3", 0.001),
        ("keep=3", 3),
        ("groups=sex,race", ["sex", "race"]),
        ("objective=memory", "memory"),
        ("cache=/a=b", "/a=b"),
    ],
)
def test_options_are_read_as_what_they_are(text: str, value: Any) -> None:
    assert options_of([text, "seed=1"]) == {text.partition("=")[0]: value, "seed": 1}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("colour=red", r"no option 'colour'; there are .*max_accuracy_loss"),
        ("progress=x", "no option 'progress'"),
        ("keep=1.5", "keep is '1.5', int is needed"),
        ("keep", "keep is '', int is needed"),
        ("epsilon=small", "epsilon is 'small', float is needed"),
    ],
)
def test_an_option_that_is_none_is_named(text: str, problem: str) -> None:
    with pytest.raises(lrai.UsageError, match=problem):
        options_of([text])


def test_a_table_to_evaluate_on_goes_by_its_names(tmp_path: Path) -> None:
    source = tmp_path / "m.onnx"
    nodes = [onnx.helper.make_node("Identity", ["x"], ["y"])]
    x, y = (onnx.helper.make_tensor_value_info(n, 1, ["n", 4]) for n in "xy")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [y])), source)
    turned = TABLE[list("dcba")].assign(label=LABELS)
    rows: Any = _rows(turned, source, infer_signature(TABLE, LABELS))
    np.testing.assert_array_equal(rows["x"], TABLE.to_numpy(np.float32))
    np.testing.assert_array_equal(rows["label"], LABELS)
    rows = _rows(turned, source, None, list("abcd"))  # that it was fitted with
    np.testing.assert_array_equal(rows["x"], TABLE.to_numpy(np.float32))
    np.testing.assert_array_equal(rows["label"], LABELS)
    wide: list[Any] = [None, infer_signature(TABLE.to_numpy(), LABELS.to_numpy())]
    for signature in wide:  # that name no columns
        rows = _rows(TABLE.assign(label=LABELS), source, signature)
        np.testing.assert_array_equal(rows["x"], TABLE.to_numpy(np.float32))
        np.testing.assert_array_equal(rows["label"], LABELS)
    labels = TABLE.rename(columns={"d": "label"})  # which is one of the four
    for signature in (None, infer_signature(labels, LABELS)):
        rows = _rows(labels, source, signature)
        assert list(rows) == ["x"]
        np.testing.assert_array_equal(rows["x"], TABLE.to_numpy(np.float32))
    with pytest.raises(lrai.UsageError, match=r"no columns \['a'\]"):
        _rows(TABLE.drop(columns="a"), source, infer_signature(TABLE, LABELS))


def test_several_numbers_a_row_stay_one_row() -> None:
    targets = np.stack([TABLE.a, TABLE.b - TABLE.c], axis=1)
    model = LinearRegression().fit(TABLE, targets)
    source = log_sklearn(model, serialization_format="skops")
    answer = answers(lrai_mlflow.convert(source.model_uri, threads=1), TABLE)
    (column,) = answer.columns
    np.testing.assert_allclose(np.stack(list(answer[column])), model.predict(TABLE), atol=1e-4)


def test_a_model_without_a_signature_takes_tables_as_before() -> None:
    model = pipeline()
    log = mlflow.sklearn.log_model
    source = logged_by(log, model, serialization_format="skops")
    made = lrai_mlflow.convert(source.model_uri, threads=1)
    assert made.signature is None
    tables: list[Any] = [TABLE, TABLE.to_numpy()]
    for table in tables:
        answer = answers(made, table)
        assert list(answer["label"]) == model.predict(TABLE).tolist()


def test_an_example_that_lies_outside_of_the_model_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("[1.0]")
    folder, example = tmp_path / "model", TABLE[:1]
    options: dict[str, Any] = {"serialization_format": "skops", "pip_requirements": ["numpy"]}
    mlflow.sklearn.save_model(pipeline(), folder, input_example=example, **options)
    description = (folder / "MLmodel").read_text()
    assert "artifact_path: input_example.json" in description
    outside = description.replace("input_example.json", "../secret.json", 1)
    (folder / "MLmodel").write_text(outside)
    with pytest.raises(MlflowException, match="example lies outside of it"):
        lrai_mlflow.convert(str(folder), threads=1)


@pytest.mark.parametrize("kind", ["sklearn", "xgboost", "xgboost booster"])
def test_without_a_signature_columns_go_by_the_names_that_a_model_was_fitted_with(
    kind: str,
) -> None:
    log, model, told = mlflow.sklearn.log_model, pipeline(), {"serialization_format": "skops"}
    if kind != "sklearn":
        trees, told = xgboost.XGBClassifier(n_estimators=5).fit(TABLE, LABELS), {}
        log, model = mlflow.xgboost.log_model, trees.get_booster() if "booster" in kind else trees
    made = lrai_mlflow.convert(logged_by(log, model, **told).model_uri, threads=1)
    assert made.signature is None
    served = mlflow.pyfunc.load_model(made.model_uri)
    expected = served.predict(TABLE.to_numpy())["label"].tolist()
    assert len(set(expected)) == 2
    for table in (TABLE[list("dcba")], TABLE.set_axis(range(4), axis=1), TABLE.assign(e="more")):
        assert served.predict(table)["label"].tolist() == expected
    with pytest.raises(MlflowException, match=r"columns \['a'\] are missing") as refused:
        served.predict(TABLE.rename(columns={"a": "x"}))
    assert refused.value.get_http_status_code() == 400
    folder = mlflow.artifacts.download_artifacts(made.model_uri)
    assert saved_model(folder)[1]["columns"] == list("abcd")  # of a deployment


def boosted() -> dict[str, tuple[Callable[..., ModelInfo], Any]]:
    forest = lightgbm.LGBMClassifier(n_estimators=5, verbose=-1).fit(TABLE, LABELS)
    trees = xgboost.XGBClassifier(n_estimators=5).fit(TABLE, LABELS)
    return {
        "lightgbm booster": (mlflow.lightgbm.log_model, forest.booster_),
        "lightgbm": (mlflow.lightgbm.log_model, forest),
        "xgboost": (mlflow.xgboost.log_model, trees),
    }


@pytest.mark.parametrize("kind", ["lightgbm booster", "lightgbm", "xgboost"])
def test_boosted_trees_answer_as_before(kind: str) -> None:
    log, model = boosted()[kind]
    source = logged_by(log, model, signature=infer_signature(TABLE, LABELS))
    answer = answers(lrai_mlflow.convert(source.model_uri, threads=1), TABLE)
    found = np.stack(list(answer["probabilities"]))
    expected = model.predict(TABLE) if "booster" in kind else model.predict_proba(TABLE)[:, 1]
    np.testing.assert_allclose(found[:, 1], expected, atol=1e-5)


def network() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()


@pytest.mark.parametrize("form", ["pt2", "pickle"])
def test_a_module_of_torch_answers_as_before(form: str) -> None:
    rows, module = TABLE.to_numpy(np.float32), network()
    expected = module(torch.from_numpy(rows)).detach().numpy()
    options = {"input_example": rows[:3]} if form == "pt2" else {}
    source = logged_by(
        mlflow.pytorch.log_model,
        module,
        signature=infer_signature(rows, expected),
        serialization_format=form,
        **options,
    )
    with pytest.raises(MlflowException, match=r"holds a pickle \(data\)"):
        lrai_mlflow.convert(source.model_uri)
    made = lrai_mlflow.convert(source.model_uri, allow_pickle=True, threads=1)
    (found,) = mlflow.pyfunc.load_model(made.model_uri).predict(rows).values()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_module_of_torch_that_takes_a_table_answers_as_before() -> None:
    module = torch.nn.Sequential(network(), torch.nn.Linear(2, 1)).eval()
    expected = module(torch.from_numpy(TABLE.to_numpy(np.float32))).detach().numpy()
    signature = infer_signature(TABLE, pd.DataFrame({"score": expected[:, 0]}))
    source = logged_by(
        mlflow.pytorch.log_model, module, signature=signature, serialization_format="pickle"
    )
    made = lrai_mlflow.convert(source.model_uri, allow_pickle=True, threads=1)
    found = mlflow.pyfunc.load_model(made.model_uri).predict(TABLE)
    np.testing.assert_allclose(found.to_numpy().ravel().tolist(), expected[:, 0], atol=1e-5)


@pytest.mark.parametrize("form", ["pickle", "cloudpickle"])
def test_a_pickle_is_opened_only_if_that_is_allowed(form: str) -> None:
    source = log_sklearn(pipeline(), serialization_format=form)
    with pytest.raises(MlflowException, match="allow_pickle=True") as refused:
        lrai_mlflow.convert(source.model_uri)
    assert refused.value.get_http_status_code() == 400
    made = lrai_mlflow.convert(source.model_uri, allow_pickle=True, threads=1)
    assert answers(made, TABLE.head(3))["label"].tolist() == pipeline().predict(TABLE[:3]).tolist()


def test_a_pickle_is_opened_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    source = log_sklearn(pipeline(), serialization_format="pickle")
    monkeypatch.setattr("mlflow.sklearn.load_model", lambda *_, **__: pytest.fail("it was opened"))
    made = lrai_mlflow.convert(source.model_uri, allow_pickle=True, threads=1)
    assert made.metadata is not None
    assert made.metadata["lrai_origin"]["source_model_id"] == source.model_id


def save_sklearn(path: Path, form: str) -> None:
    mlflow.sklearn.save_model(
        pipeline(), str(path), serialization_format=form, pip_requirements=["numpy"]
    )


@pytest.mark.parametrize("name", ["model.pkl", "model.txt", "model.unknown"])
def test_a_hostile_pickle_is_found_before_it_is_opened(tmp_path: Path, name: str) -> None:
    made = tmp_path / "made"
    save_sklearn(tmp_path / "m", "pickle")
    change(tmp_path / "m", "pickled_model: model.pkl", f"pickled_model: {name}")
    command = f"touch {made}"  # what this pickle runs when it is opened
    hostile = b"cposix\nsystem\n(V" + command.encode() + b"\ntR."
    (tmp_path / "m" / "model.pkl").unlink()
    (tmp_path / "m" / name).write_bytes(hostile)
    with pytest.raises(MlflowException, match=r"picklescan refuses the model.*system"):
        lrai_mlflow.convert(str(tmp_path / "m"), allow_pickle=True)
    assert not made.exists()


def test_a_file_that_is_not_opened_hides_none_that_is(tmp_path: Path) -> None:
    """MLflow's loader of LightGBM reads `data`, whatever else a model names."""
    booster = lightgbm.LGBMClassifier(n_estimators=2, verbose=-1).fit(TABLE, LABELS)
    mlflow.lightgbm.save_model(booster, str(tmp_path / "m"), pip_requirements=["numpy"])
    model = Model.load(str(tmp_path / "m"))
    own = model.flavors["lightgbm"]
    (tmp_path / "m" / own["data"]).rename(tmp_path / "m" / "clean.pkl")
    hostile = b"cposix\nsystem\n(Vtouch " + str(tmp_path / "made").encode() + b"\ntR."
    (tmp_path / "m" / "evil.xyz").write_bytes(hostile)
    own |= {"pickled_model": "clean.pkl", "data": "evil.xyz"}
    model.save(str(tmp_path / "m" / "MLmodel"))
    with pytest.raises(MlflowException, match=r"picklescan refuses the model.*system"):
        lrai_mlflow.convert(str(tmp_path / "m"), allow_pickle=True)
    assert not (tmp_path / "made").exists()


def test_code_that_a_model_carries_is_not_run_unasked(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("raise SystemExit('it was run')\n")
    source = log_sklearn(
        pipeline(), serialization_format="skops", code_paths=[str(tmp_path / "own.py")]
    )
    with pytest.raises(MlflowException, match="it carries Python code of its own"):
        lrai_mlflow.convert(source.model_uri)


def test_a_pickle_that_calls_itself_something_else_is_refused(tmp_path: Path) -> None:
    save_sklearn(tmp_path / "m", "pickle")
    change(tmp_path / "m", "serialization_format: pickle", "serialization_format: skops")
    with pytest.raises(MlflowException, match=r"a pickle \(model\.pkl\)"):
        lrai_mlflow.convert(str(tmp_path / "m"))


def test_data_outside_of_the_model_is_not_read(tmp_path: Path) -> None:
    plain = onnx.load(column_model(tmp_path / "columns.onnx"))
    mlflow.onnx.save_model(plain, str(tmp_path / "m"), pip_requirements=["onnxruntime"])
    change(tmp_path / "m", "data: model.onnx", "data: ../columns.onnx")
    with pytest.raises(MlflowException, match="lies outside of it"):
        lrai_mlflow.convert(str(tmp_path / "m"))


def test_a_flavor_that_is_not_converted_is_named(tmp_path: Path) -> None:
    Model(flavors={"spacy": {"data": "x"}}).save(str(tmp_path / "MLmodel"))
    with pytest.raises(
        MlflowException, match=r"has the flavors spacy; what can be converted: onnx, py"
    ):
        lrai_mlflow.convert(str(tmp_path))


def test_a_model_that_has_no_form_in_onnx_is_named() -> None:
    source = log_sklearn(KernelRidge().fit(TABLE, LABELS), serialization_format="pickle")
    with pytest.raises(MlflowException, match="KernelRidge"):
        lrai_mlflow.convert(source.model_uri, allow_pickle=True)


def change(model: Path, old: str, new: str) -> None:
    description = model / "MLmodel"
    text = description.read_text()
    assert old in text
    description.write_text(text.replace(old, new))


def test_the_command_converts_too(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    log_sklearn(pipeline(), serialization_format="pickle", registered_model_name="cli")
    lrai = Path(sys.executable).with_name("lrai")
    command = [str(lrai), "mlflow", "convert", "models:/cli/1"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 3
    assert "--allow-pickle" in refused.stderr
    for wrong in (["--output-map", "cosine"], ["--metric", "top9"], ["--option", "colour=red"]):
        command_ = [*command, "--allow-pickle", *wrong]
        assert subprocess.run(command_, capture_output=True, check=False).returncode == 2
    np.savez(tmp_path / "rows.npz", features=TABLE.to_numpy(np.float32), label=LABELS)
    more = ["--evaluation", str(tmp_path / "rows.npz"), "--threads", "1", "--metric", "top1"]
    more += ["--option", "max_accuracy_loss=0.05", "--allow-pickle"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing in it can be quantised: fp32 serves, batched" in done.stdout
    assert done.stdout.startswith("models:/m-")
    assert "version 2" in done.stdout
    version = client.get_model_version("cli", "2")
    assert version.tags["lrai.source_uri"] == "models:/cli/1"
    assert version.run_id  # it has begun one
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["lrai.accuracy_loss"] == 0
    (folder,) = [one.path for one in client.list_artifacts(version.run_id, "lrai")]
    (log,) = client.list_artifacts(version.run_id, folder)
    assert log.path.endswith("/quantization.jsonl")
    again = [*command, "--allow-pickle", "--threads", "1", "--run-id", version.run_id]
    done = subprocess.run(again, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert client.get_model_version("cli", "3").run_id == version.run_id
    for unknown in ([*again, "--run-id", "none"], [*command[:-1], "models:/nobodys/1"]):
        assert subprocess.run(unknown, capture_output=True, check=False).returncode == 2
    lost = os.environ | {"MLFLOW_TRACKING_URI": "nowhere://"}
    assert subprocess.run(again, capture_output=True, env=lost, check=False).returncode == 2


@pytest.mark.parametrize(
    ("disk", "why"),
    [("ro", "Read-only file system"), ("size=16k", "No space left"), ("size=64k", "No space left")],
)
def test_the_command_says_what_the_disk_refuses(tmp_path: Path, disk: str, why: str) -> None:
    mlflow.onnx.save_model(linear(), str(tmp_path / "source"), pip_requirements=["numpy"])
    lrai = Path(sys.executable).with_name("lrai")
    command = [str(lrai), "mlflow", "convert", str(tmp_path / "source"), "--threads", "1"]
    store = {"MLFLOW_TRACKING_URI": (tmp_path / "disk" / "store").as_uri()}
    done = subprocess.run(
        [*in_small_filesystem(tmp_path, disk), *command],
        capture_output=True, text=True, env=os.environ | store, check=False,
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("lrai: ")]
    assert why in said


def test_the_command_says_where_no_form_passes(tmp_path: Path) -> None:
    source = logged_by(mlflow.onnx.log_model, linear())
    rows = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=rows)
    arguments = ["--evaluation", str(tmp_path / "rows.npz"), "--threads", "1"]
    arguments += ["--option", "epsilon=1e-5", "--option", "delta=0.05"]
    says = r"^no form but fp32 passed the gate and was faster; runs:/\S+/quantization\.jsonl tells"
    with pytest.raises(lrai.ConditionNotMet, match=says):
        main(["convert", source.model_uri, *arguments])
