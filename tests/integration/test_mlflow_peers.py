"""The public tests of MLflow for a flavor and for the scoring server, as our cases.

Of `tests/onnx/test_onnx_model_export.py`, whose flavor ours stands in for, and of
`tests/pyfunc/test_scoring_server.py`, the latter as MLflow 2 has it: a case here names theirs. The
server is MLflow's own application in this process. What theirs check of a saved model and again of
a logged one is checked once.

Theirs that are cases of ours elsewhere:

* test_model_save_load, test_model_save_load_multiple_inputs: in test_lrai_mlflow.py
  test_a_loaded_model_is_the_artifact_that_was_saved, test_a_damaged_model_is_not_loaded.
* test_model_log, test_model_log_with_metadata, test_log_model_calls_register_model: in
  test_lrai_mlflow_log.py test_without_a_run_none_is_begun, test_metadata_says_what_the_gate_and…,
  test_registry_aliases_and_rollback_by_alias.
* test_model_log_evaluate_pyfunc_format, test_pyfunc_representation_of_float32_model_casts…,
  test_model_save_evaluate_pyfunc_format_multi_tensor: in test_lrai_mlflow.py
  test_answers_are_those_of_mlflow_onnx, test_numbers_are_cast_where_nothing_is_lost,
  test_what_does_not_fit_the_model_is_a_clear_400.
* test_model_save_accepts_conda_env_as_dict: in test_lrai_mlflow_log.py
  test_extra_files_code_and_a_conda_environment_are_kept.
* test_model_{save,log}_without_specified_conda_env…: in test_lrai_mlflow.py
  test_requirements_are_this_environment_and_our_wheel.
* malformed JSON, an unsupported content type: in test_mlflow_bad_input.py
  test_what_is_wrong_is_said_in_mlflows_form; `instances` of rows, `inputs` by name: in
  test_mlflow.py test_answers_are_those_of_mlflow_onnx.

What differs, and why:

* Without a signature a model gets the artifact's own, without an example a row of its sample.
* Integers for a real number are taken, as nothing is lost; `mlflow.onnx` refuses them.
* An environment that is given is kept, and lrai's own wheel is added to it.
* A refusal of the model's has no `stack_trace`: what it says is in the message.
* Sequences of maps (scikit-learn's ZipMap) are no tensors: such a model is not converted.
* What is cast by a signature, MLflow casts, for any flavor, before a model sees it: a fraction for
  an integer is cut off there. Without a signature it is refused.
* CSV is refused by MLflow, for any flavor, where a signature is of tensors, as an artifact's is.

What does not apply: external data (test_model_log_load, test_model_save_load_nonexternal_data:
an artifact has one form), session options and providers (the artifact and the settings say
them), MLflow's own functions with no model in them (test_parse_json_input_{records,split}_oriented,
test_get_jsonnable_obj, test_get_cmd, test_split_data_and_params_for_llm_input), completions,
embeddings and a model that wraps another one (pyfuncs of text), binary and datetime columns
(no datatypes of tensors).
"""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import mlflow
import mlflow.onnx
import mlflow.pyfunc
import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import uvicorn
import yaml  # type: ignore[import-untyped]
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.models.utils import _read_example
from mlflow.pyfunc import scoring_server
from mlflow.pyfunc.scoring_server.client import ScoringServerClient
from mlflow.types import ColSpec, Schema
from onnx import TensorProto, helper
from starlette.testclient import TestClient

import lrai_core as lrai
import lrai_mlflow
from benchmarks.processes import HOST
from tests.core import small_artifact
from tests.integration.mlflow_server import Reply, own_store
from tests.own_runtime import own_runtime
from tests.tiny_models import DATATYPES, column_model, datatype_model, token_model

pytestmark = [
    pytest.mark.server,
    pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning"),  # as MLflow uses it
]

Signature = ModelSignature | Literal[False] | None
JSON, CSV = "application/json", "text/csv"

PRICES, COUNTS, TOTALS = [1.5, 2.0, 0.25], [1, 2, 3], [1.5, 4.0, 0.75]
TABLE = pd.DataFrame(
    {"count": np.array(COUNTS, np.int32), "price": np.array(PRICES, np.float32)}
)  # not in the model's order
FEATURES = pd.DataFrame(np.arange(6, dtype=float).reshape(2, 3))  # columns without names
TEXT = ["95120", "http://foo.com", "aaa://bbb", "address:/path"]
NAMED = ModelSignature(Schema([ColSpec("integer", "count"), ColSpec("float", "price")]))


@pytest.fixture(scope="module", autouse=True)
def sockets() -> Iterator[Path]:
    with own_runtime(LRAI_RUNTIME="embedded") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")  # set by what is served, for good
        patch.setattr(sys, "path", [*sys.path])  # likewise, by a model that carries code
        yield folder


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[mlflow.MlflowClient]:
    with own_store(tmp_path_factory.mktemp("tracking")) as client:
        yield client


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    makers = {"columns": column_model, "tokens": token_model, "types": datatype_model}
    made = {name: make(folder / f"{name}.onnx") for name, make in makers.items()}
    made["colons"] = folder / "colons.onnx"  # as the inputs of TensorFlow's models are named
    onnx.save(onnx.compose.add_prefix(onnx.load(made["columns"]), "0:"), made["colons"])
    return made


@pytest.fixture(scope="module")
def artifacts(
    sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, lrai.Artifact]:
    folder = tmp_path_factory.mktemp("artifacts")
    made = {
        name: lrai.compile(source, out=folder / f"{name}.lrai", threads=1)
        for name, source in sources.items()
    }
    made["features"] = lrai.Artifact.open(small_artifact.build(folder / "features.lrai"))
    return made


class Scored:
    """A saved model, and MLflow's scoring server of it."""

    def __init__(self, artifact: lrai.Artifact, path: Path, signature: Signature) -> None:
        lrai_mlflow.save_model(artifact, path, signature=signature)
        self.app = scoring_server.init(mlflow.pyfunc.load_model(str(path)))
        self.client = TestClient(self.app)

    def post(self, body: Any, content_type: str = JSON) -> Reply:
        content = body if isinstance(body, str | bytes) else json.dumps(body)
        headers = {"Content-Type": content_type}
        reply = self.client.post("/invocations", content=content, headers=headers)
        is_json = reply.headers["Content-Type"] == JSON
        return Reply(reply.status_code, reply.json() if is_json else reply.text)

    def ask(self, body: Any, content_type: str = JSON) -> Any:
        reply = self.post(body, content_type)
        assert reply.status == 200, reply.content
        return reply.content["predictions"]


Serve = Callable[[str, Signature], Scored]


@pytest.fixture(scope="module")
def serve(
    artifacts: dict[str, lrai.Artifact], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serve]:
    """Yield a function from a model and its signature to what serves it."""
    folder = tmp_path_factory.mktemp("served")
    cache: dict[str, Scored] = {}

    def scored(name: str, signature: Signature = None) -> Scored:
        kind = "named" if isinstance(signature, ModelSignature) else signature
        path = folder / f"{name}-{kind}"
        if path.name not in cache:
            cache[path.name] = Scored(artifacts[name], path, signature)
        return cache[path.name]

    yield scored
    cache.clear()
    gc.collect()  # or their actors live as long as this process


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of what a model is logged with."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "a.txt").write_text("idna\n")
    (folder / "own_of_the_peers.py").write_text("ANSWER = 42\n")
    pip = {"pip": ["mlflow", "idna"]}
    environment = {"name": "mine", "channels": ["x"], "dependencies": ["python=3.11", pip]}
    (folder / "env.yaml").write_text(yaml.safe_dump(environment))
    return folder


@pytest.fixture(scope="module")
def logged(
    artifacts: dict[str, lrai.Artifact], files: Path, client: mlflow.MlflowClient
) -> ModelInfo:
    with mlflow.start_run():
        return lrai_mlflow.log_model(
            artifacts["columns"],
            name="columns",
            conda_env=str(files / "env.yaml"),
            code_paths=[str(files / "own_of_the_peers.py")],
            metadata={"team": "search"},
            input_example=TABLE,
        )


@pytest.fixture(scope="module")
def local(logged: ModelInfo) -> Path:
    return Path(mlflow.artifacts.download_artifacts(logged.model_uri))


# test_onnx_model_export.py


@pytest.mark.parametrize("example", [None, TABLE])
@pytest.mark.parametrize("signature", [None, NAMED])
def test_signature_and_example_are_saved_in_any_combination(
    artifacts: dict[str, lrai.Artifact],
    tmp_path: Path,
    signature: ModelSignature | None,
    example: pd.DataFrame | None,
) -> None:
    """test_signature_and_examples_are_saved_correctly."""
    artifact, path = artifacts["columns"], tmp_path / "model"
    lrai_mlflow.save_model(artifact, path, signature=signature, input_example=example)
    saved = Model.load(path)
    assert saved.signature == (signature or lrai_mlflow.signature_of(artifact))
    if example is None:
        assert saved.saved_input_example_info is None  # no sample was kept of this one
    else:
        pd.testing.assert_frame_equal(_read_example(saved, str(path)), example, check_dtype=False)


def test_columns_with_names_of_tensorflow_are_answered(serve: Serve) -> None:
    """test_model_save_load_evaluate_pyfunc_format_multiple_inputs."""
    table = TABLE.add_prefix("0:").astype({"0:price": "float64"})
    scored = serve("colons", False)
    answer = scored.ask({"dataframe_split": table.to_dict(orient="split")})
    assert answer == [{"0:total": total} for total in TOTALS]


def test_what_is_not_to_be_registered_is_not(
    logged: ModelInfo, client: mlflow.MlflowClient
) -> None:
    """test_log_model_no_registered_model_name."""
    assert mlflow.get_logged_model(logged.model_id).name == "columns"
    assert logged.registered_model_version is None
    assert list(client.search_registered_models()) == []


def test_an_environment_of_a_file_is_kept_and_has_our_wheel(local: Path, files: Path) -> None:
    """test_model_{save,log}_persists_{specified_conda_env,requirements}_in_mlflow_model_directory.

    And test_virtualenv_subfield_points_to_correct_path.
    """
    names = Model.load(local).flavors["python_function"]["env"]
    kept = yaml.safe_load((local / names["conda"]).read_text())
    given = yaml.safe_load((files / "env.yaml").read_text())
    assert {**kept, "dependencies": []} == {**given, "dependencies": []}
    (*others, before), (*same, after) = given["dependencies"], kept["dependencies"]
    assert same == others
    *first, links, own = after["pip"]
    assert (first, links) == (before["pip"], "--find-links wheels")
    assert own.startswith(f"lrai=={version('lrai')}+g")
    assert (local / "requirements.txt").read_text().splitlines() == after["pip"]
    python = yaml.safe_load((local / names["virtualenv"]).read_text())
    assert python["python"] == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize(
    ("wanted", "lines", "constraint"),
    [
        pytest.param("a file", ["idna"], None, id="a file"),
        pytest.param(["-r {}", "tomli"], ["idna", "tomli"], None, id="a list with a file"),
        pytest.param(["-c {}", "tomli"], ["tomli", "-c constraints.txt"], "idna", id="constraints"),
    ],
)
@pytest.mark.parametrize("keyword", ["pip_requirements", "extra_pip_requirements"])
def test_requirements_are_given_in_any_form(
    artifacts: dict[str, lrai.Artifact],
    files: Path,
    tmp_path: Path,
    keyword: str,
    wanted: str | list[str],
    lines: list[str],
    constraint: str | None,
) -> None:
    """test_log_model_with_{,extra_}pip_requirements."""
    file = files / "a.txt"
    given = [line.format(file) for line in wanted] if isinstance(wanted, list) else str(file)
    options: dict[str, Any] = {keyword: given}
    lrai_mlflow.save_model(artifacts["columns"], tmp_path / "model", **options)
    requirements = (tmp_path / "model" / "requirements.txt").read_text().splitlines()
    (pip,) = yaml.safe_load((tmp_path / "model" / "conda.yaml").read_text())["dependencies"][-1:]
    assert pip["pip"] == requirements
    ours = {f"numpy=={version('numpy')}", f"onnxruntime=={version('onnxruntime')}"}
    if keyword == "extra_pip_requirements":
        assert ours | set(lines) <= set(requirements)
    else:
        (host, *rest), wheel = requirements[:-2], requirements[-1]
        assert host.startswith("mlflow==")  # MLflow adds itself
        assert rest == lines
        assert wheel.startswith("lrai==")
    pins = tmp_path / "model" / "constraints.txt"
    if constraint:
        assert constraint in pins.read_text().splitlines()
    assert pins.exists() == ("-c constraints.txt" in requirements)


def test_code_that_is_carried_can_be_imported_when_the_model_is_loaded(
    local: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """test_log_model_with_code_paths."""
    flavors = Model.load(local).flavors
    assert flavors["lrai"]["code"] == flavors["python_function"]["code"] == "code"
    name = "own_of_the_peers"
    carried = local / "code" / f"{name}.py"
    assert carried.read_text() == (files / f"{name}.py").read_text()
    others = [place for place in sys.path if Path(place).name != "code"]  # of other loads
    monkeypatch.setattr(sys, "path", others)
    assert importlib.util.find_spec(name) is None
    lrai_mlflow.load_model(str(local))
    found = importlib.util.find_spec(name)
    assert found is not None
    assert found.origin == str(carried)


def test_metadata_is_that_of_the_loaded_model(local: Path) -> None:
    """test_model_save_load_with_metadata."""
    metadata = mlflow.pyfunc.load_model(str(local)).metadata.metadata
    assert metadata is not None
    assert metadata["team"] == "search"
    assert metadata["lrai"]["variant"] == "fp32"


def test_a_model_of_lists_of_maps_is_not_converted(tmp_path: Path) -> None:
    """test_pyfunc_predict_supports_models_with_list_outputs."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])
    of_maps = helper.make_sequence_type_proto(
        helper.make_map_type_proto(
            TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, [])
        )
    )
    node = helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    graph = helper.make_graph([node], "g", [x], [helper.make_value_info("y", of_maps)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    mlflow.onnx.save_model(model, str(tmp_path / "m"), pip_requirements=["onnxruntime"])
    with pytest.raises(MlflowException, match=r"'y' is a sequence.*'zipmap': False") as refused:
        lrai_mlflow.convert(str(tmp_path / "m"))
    assert refused.value.get_http_status_code() == 400


# test_scoring_server.py


FIELDS = "The input must be a JSON dictionary with exactly one of the input fields"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        # …responds_to_invalid_json_format…
        pytest.param("1", FIELDS, id="a number"),
        pytest.param('"1"', FIELDS, id="text"),
        pytest.param(
            {"dataframe_records": [], "dataframe_split": {"data": []}}, FIELDS, id="two tables"
        ),
        # …responds_to_invalid_pandas_input_format…
        pytest.param(
            {"dataframe_records": TABLE.to_dict(orient="split")}, "Got dictionary", id="no records"
        ),
        pytest.param(
            {"dataframe_split": TABLE.to_dict(orient="records")}, "Got list", id="no split"
        ),
        # …responds_to_invalid_dataframe…
        pytest.param(
            {"dataframe_split": {"index": [1, 2], "data": [[1], [2], [3]]}},
            "not a valid dataframe representation",
            id="more rows than names",
        ),
        # …responds_to_incompatible_inference_dataframe…
        pytest.param(
            {"dataframe_split": {"data": [[number] for number in range(10)]}},
            "tensor 'price': missing",
            id="another table",
        ),
        # …allows_payloads_with_llm_chat_keys_for_pyfunc: a model of tensors takes no messages
        pytest.param(
            {"messages": [{"role": "user", "content": "hello!"}], "max_tokens": 20},
            "no such input",
            id="a chat",
        ),
    ],
)
def test_what_is_no_request_is_said_in_mlflows_form(serve: Serve, body: Any, why: str) -> None:
    reply = serve("columns", False).post(body)
    assert (reply.status, reply.content["error_code"]) == (400, "BAD_REQUEST")
    assert why in reply.content["message"]
    assert "stack_trace" not in reply.content


def test_a_content_type_with_other_parameters_is_refused(serve: Serve) -> None:
    """…with_unrecognized_content_param."""
    body = {"dataframe_split": TABLE.to_dict(orient="split")}
    reply = serve("columns", False).post(body, f"{JSON}; something=something")
    assert reply.status == 415
    assert "Unrecognized content type parameters: something" in reply.content


@pytest.mark.parametrize("content_type", [JSON, f"{JSON}; charset=UTF-8"])
@pytest.mark.parametrize("orient", ["records", "split"])
def test_tables_whose_columns_are_numbers_are_answered(
    serve: Serve, orient: Literal["records", "split"], content_type: str
) -> None:
    """…correct_dataframes_with_pandas_{records,split}_orientation."""
    body = {f"dataframe_{orient}": FEATURES.to_dict(orient=orient)}
    answer = serve("features", False).ask(body, content_type)
    assert [row["y"] for row in answer] == [0, 2, 4, 6, 8, 10]


def test_instances_by_name_of_several_tensors(serve: Serve, sources: dict[str, Path]) -> None:
    """…correct_tf_serving_keras_instances."""
    rows = {"input_ids": [[3, 14, 15], [9, 2, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}
    instances = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    answer = serve("tokens", None).ask({"instances": instances})
    session = onnxruntime.InferenceSession(sources["tokens"])
    mean, tokens = session.run(None, {name: np.array(row) for name, row in rows.items()})
    np.testing.assert_allclose(answer["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(answer["tokens"], tokens, rtol=1e-5)


@pytest.mark.parametrize("signature", [None, False])
@pytest.mark.parametrize("form", ["dataframe_split", "dataframe_records", "inputs"])
def test_every_datatype_in_any_order_of_columns(
    serve: Serve, form: str, signature: Literal[False] | None
) -> None:
    """test_serving_model_with_schema, test_parse_with_schema, test_{records,split}_oriented_…

    And test_parse_json_input_including_path: text of digits or of addresses stays text.
    """
    columns: dict[str, list[Any]] = {f"in_{name}": [0, 1, 2, 3] for name in DATATYPES}
    columns |= {f"in_{name}": [0.5, -1.25, 0, 3] for name in ("FLOAT16", "FLOAT", "DOUBLE")}
    columns |= {"in_BOOL": [True, False, True, True], "in_STRING": TEXT}
    table = pd.DataFrame({name: columns[name] for name in reversed(columns)})
    body: Any = columns
    if form != "inputs":
        body = table.to_dict(orient=form.removeprefix("dataframe_"))  # type: ignore[call-overload]
    answer = serve("types", signature).ask({form: body})
    found = pd.DataFrame(answer).to_dict(orient="list")
    assert found == {name.replace("in_", "out_"): values for name, values in columns.items()}


def test_csv_is_read_by_the_names_of_its_columns(serve: Serve) -> None:
    """test_parse_with_schema_csv."""
    content = TABLE.to_csv(index=False)
    for signature in (NAMED, False):
        answer = serve("columns", signature).ask(content, CSV)
        assert [row["total"] for row in answer] == TOTALS
    refused = serve("columns", None).post(content, CSV)
    assert refused.status == 400
    assert "TensorSpec only supports numpy types" in refused.content["message"]


@pytest.mark.parametrize(
    ("content", "why"), [("", "No columns to parse"), (b"\xff\xfe", "valid UTF-8")]
)
def test_what_is_no_csv_is_refused(serve: Serve, content: str | bytes, why: str) -> None:
    """…responds_to_invalid_csv_input…"""
    reply = serve("columns", False).post(content, CSV)
    assert (reply.status, reply.content["error_code"]) == (400, "BAD_REQUEST")
    assert why in reply.content["message"]


@pytest.mark.parametrize("form", ["inputs", "dataframe_split"])
def test_a_fraction_for_an_integer_is_cut_by_a_signature_only(serve: Serve, form: str) -> None:
    """test_parse_with_schema."""
    table = pd.DataFrame({"count": [2.5], "price": [3.0]})
    body = table.to_dict(orient="list" if form == "inputs" else "split")
    assert serve("columns", None).ask({form: body})["total"] == [6.0]
    refused = serve("columns", False).post({form: body})
    assert refused.status == 400
    assert "tensor 'count': datatype FP64, the model takes INT32" in refused.content["message"]


@pytest.mark.parametrize("params", [{}, {"params": {}}, {"params": {"other": "value"}}])
def test_params_that_are_not_declared_are_passed_over(serve: Serve, params: Any) -> None:
    """test_serving_model_with_param_schema; a wrong value: in test_mlflow_bad_input.py."""
    body = {"inputs": {"price": PRICES, "count": COUNTS}, **params}
    assert serve("columns", None).ask(body) == {"total": TOTALS}


def test_mlflows_client_is_answered(serve: Serve) -> None:
    """test_scoring_server_client, test_model_save_load_evaluate_pyfunc_format."""
    application = serve("features", False).app
    config = uvicorn.Config(application, HOST, 0, ws="none", lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        client = ScoringServerClient(host=HOST, port=port)
        client.wait_server_ready()
        found = client.invoke(FEATURES).get_predictions().to_numpy().ravel()
        assert found.tolist() == [0, 2, 4, 6, 8, 10]
        assert client.get_version() == mlflow.__version__
    finally:
        server.should_exit = True
        thread.join()
