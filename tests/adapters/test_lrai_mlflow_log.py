"""What a logged model tells of itself: metadata, tags, metrics, example; registry, evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import mlflow.models
import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import yaml  # type: ignore[import-untyped]
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.models.model import ModelInfo

import lrai_core as lrai
import lrai_mlflow
from benchmarks.models import classifier
from lrai_core import certificates
from lrai_mlflow.commands.facts import facts_of, metrics_of
from tests.own_runtime import own_runtime


@pytest.fixture(scope="module", autouse=True)
def runtime_folder() -> Iterator[Path]:
    with own_runtime() as folder:
        yield folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return classifier(tmp_path_factory.mktemp("onnx") / "classifier.onnx", seed=0)


@pytest.fixture(scope="module")
def artifact(
    rows: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> lrai.Artifact:
    out = tmp_path_factory.mktemp("artifacts") / "classifier.lrai"
    return lrai.compile(rows[0], out=out, evaluation=rows[1], threads=1)


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[mlflow.MlflowClient]:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path_factory.mktemp("tracking") / "store").as_uri())
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def logged(artifact: lrai.Artifact, tracking: mlflow.MlflowClient) -> ModelInfo:
    alone = {"variant": artifact.manifest.chosen}  # which one answers may change between two calls
    with mlflow.start_run():
        return lrai_mlflow.log_model(
            artifact, name="classifier", metadata={"team": "search"}, tags={"owner": "ann"}, step=3,
            model_config=alone,
        )  # fmt: skip


def test_metadata_says_what_the_gate_and_the_certificates_say(
    artifact: lrai.Artifact, logged: ModelInfo
) -> None:
    assert logged.metadata is not None
    assert logged.metadata["team"] == "search"
    said, chosen = logged.metadata["lrai"], artifact.manifest.variant(artifact.manifest.chosen)
    assert (said["variant"], said["speedup"]) == (chosen.id, chosen.speedup)
    assert chosen.gate is not None
    assert said["gate"]["passed"] is True
    assert said["gate"]["agreement_bound"] == chosen.gate.agreement_bound
    (strongest, *_) = certificates(artifact, chosen.id)
    assert said["certificates"][0]["id"] == strongest.id
    assert said["certificates"][0]["statement"] == strongest.statement()
    local = Path(mlflow.artifacts.download_artifacts(logged.model_uri))
    assert Model.load(local).metadata == logged.metadata


def test_tags_name_variant_version_and_certificate(
    artifact: lrai.Artifact, logged: ModelInfo
) -> None:
    tags = mlflow.get_logged_model(logged.model_id).tags
    assert tags["lrai.variant"] == artifact.manifest.chosen
    assert tags["lrai.artifact_version"] == artifact.version
    assert tags["lrai.version"] == lrai.__version__
    assert tags["lrai.certificate"] == certificates(artifact, artifact.manifest.chosen)[0].id
    assert tags["owner"] == "ann"


def test_what_was_measured_are_metrics_of_the_run_and_of_the_model(
    artifact: lrai.Artifact, logged: ModelInfo, tracking: mlflow.MlflowClient
) -> None:
    assert logged.run_id is not None
    metrics = tracking.get_run(logged.run_id).data.metrics
    chosen = artifact.manifest.variant(artifact.manifest.chosen)
    assert metrics["lrai.speedup"] == pytest.approx(chosen.speedup)
    assert chosen.gate is not None
    assert metrics["lrai.difference_p99"] == pytest.approx(chosen.gate.difference["p99"])
    assert {"lrai.batch_effect", "lrai.size_bytes", "lrai.certificate_epsilon"} <= set(metrics)
    of_model = {m.key: m for m in mlflow.get_logged_model(logged.model_id).metrics or []}
    assert of_model["lrai.speedup"].value == pytest.approx(chosen.speedup)
    assert of_model["lrai.speedup"].step == 3


def test_without_rows_no_batch_effect_was_measured(artifact: lrai.Artifact) -> None:
    said = facts_of(artifact)
    assert "lrai.batch_effect" in metrics_of(said)
    assert "lrai.batch_effect" not in metrics_of(said | {"gate": None})


def test_the_compilers_log_is_an_artifact_of_the_run(
    artifact: lrai.Artifact, logged: ModelInfo, tmp_path: Path
) -> None:
    place = f"runs:/{logged.run_id}/lrai/{logged.model_id}/quantization.jsonl"
    found = Path(mlflow.artifacts.download_artifacts(place, dst_path=str(tmp_path)))
    assert found.read_bytes() == artifact.file("quantization.jsonl").read_bytes()
    lines = found.read_text().splitlines()
    assert any(json.loads(line)["event"] == "decision" for line in lines)


def test_without_a_run_none_is_begun(artifact: lrai.Artifact, tracking: Any) -> None:
    info = lrai_mlflow.log_model(artifact, name="alone")
    assert str(info.run_id) == "None"
    assert mlflow.get_logged_model(info.model_id).tags["lrai.variant"] == artifact.manifest.chosen


def test_the_example_is_a_row_of_the_evaluation_sample(
    logged: ModelInfo, rows: tuple[Path, dict[str, Any]]
) -> None:
    model = mlflow.pyfunc.load_model(logged.model_uri)
    example = model.input_example
    assert list(example) == ["features"]
    assert example["features"].shape == (1, 64)
    assert (rows[1]["features"] == example["features"]).all(axis=1).any()
    assert model.predict(example)["logits"].shape == (1, 10)


def test_an_example_can_be_declined(artifact: lrai.Artifact, tmp_path: Path) -> None:
    lrai_mlflow.save_model(artifact, tmp_path / "model", input_example=False)
    assert Model.load(tmp_path / "model").saved_input_example_info is None


def test_extra_files_code_and_a_conda_environment_are_kept(
    artifact: lrai.Artifact, tmp_path: Path
) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    (tmp_path / "own.py").write_text("ANSWER = 42\n")
    environment = {"name": "mine", "dependencies": ["python=3.11", {"pip": ["numpy"]}]}
    lrai_mlflow.save_model(
        artifact,
        tmp_path / "model",
        extra_files=[str(tmp_path / "labels.txt")],
        code_paths=[str(tmp_path / "own.py")],
        conda_env=environment,
    )
    model = Model.load(tmp_path / "model")
    assert model.flavors["lrai"]["extra_files"] == [{"path": "extra_files/labels.txt"}]
    assert (tmp_path / "model" / "extra_files" / "labels.txt").read_text() == "cat\ndog\n"
    assert (tmp_path / "model" / "code" / "own.py").is_file()
    conda = yaml.safe_load((tmp_path / "model" / "conda.yaml").read_text())
    assert conda["name"] == "mine"
    (pip,) = [found["pip"] for found in conda["dependencies"] if isinstance(found, dict)]
    assert {"numpy"} < set(pip)
    assert "--find-links wheels" in pip
    assert any(line.startswith("lrai==") for line in pip)
    assert (tmp_path / "model" / "requirements.txt").read_text().split("\n")[:-1] == pip


@pytest.mark.parametrize(
    "address",
    ["lrai @ git+https://host/x.git", "git+https://host/lrai.git@v1#egg=lrai", "./lrai-0.1.whl"],
)
def test_who_names_an_lrai_gets_no_second_one(
    artifact: lrai.Artifact, tmp_path: Path, address: str
) -> None:
    lrai_mlflow.save_model(artifact, tmp_path / "model", pip_requirements=["numpy", address])
    lines = (tmp_path / "model" / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if "lrai" in line] == [address]
    assert not (tmp_path / "model" / "wheels").exists()


def test_two_environments_are_refused(artifact: lrai.Artifact, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Only one of `conda_env`"):
        lrai_mlflow.save_model(
            artifact, tmp_path / "model", conda_env={"name": "a"}, pip_requirements=["numpy"]
        )


def test_every_parameter_of_mlflow_onnx_is_there_or_has_no_meaning_here() -> None:
    import inspect

    import mlflow.onnx

    for name in ("save_model", "log_model"):
        theirs = set(inspect.signature(getattr(mlflow.onnx, name)).parameters)
        ours = set(inspect.signature(getattr(lrai_mlflow, name)).parameters)
        assert theirs - ours <= {
            "onnx_model",  # lrai_model
            "artifact_path",  # deprecated there
            "onnx_execution_providers",  # the artifact's own
            "onnx_session_options",
            "save_as_external_data",
            "kwargs",
        }


def test_a_deadline_reaches_the_model_through_its_signature(logged: ModelInfo) -> None:
    model = mlflow.pyfunc.load_model(logged.model_uri)
    example = model.input_example
    assert model.predict(example, params={"timeout_ms": 60_000.0})["logits"].shape == (1, 10)
    with pytest.raises(MlflowException, match="allowed") as late:
        model.predict(example, params={"timeout_ms": 1e-9})
    assert late.value.get_http_status_code() == 504


def test_registry_aliases_and_rollback_by_alias(
    artifact: lrai.Artifact, tracking: mlflow.MlflowClient
) -> None:
    for number in (1, 2):
        info = lrai_mlflow.log_model(
            artifact,
            name="classifier",
            registered_model_name="search",
            model_config={"limits": {"request_rows": number}},
        )
        assert str(info.registered_model_version) == str(number)
        tags = tracking.get_model_version("search", str(number)).tags
        assert tags["lrai.variant"] == artifact.manifest.chosen

    def allowed() -> Any:
        served = mlflow.pyfunc.load_model("models:/search@champion")
        impl: Any = served._model_impl
        return impl.held.runtime.config.limits.request_rows

    tracking.set_registered_model_alias("search", "champion", "1")
    assert allowed() == 1
    tracking.set_registered_model_alias("search", "champion", "2")
    assert allowed() == 2
    tracking.set_registered_model_alias("search", "champion", "1")  # rollback
    assert allowed() == 1


def test_mlflow_models_predict_answers(
    logged: ModelInfo, rows: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    features = rows[1]["features"][:2]
    mlflow.models.predict(
        model_uri=logged.model_uri,
        input_data={"features": features},
        env_manager="local",
        content_type="json",
        output_path=str(tmp_path / "out.json"),
    )
    answer = json.loads((tmp_path / "out.json").read_text())["predictions"]
    model = mlflow.pyfunc.load_model(logged.model_uri)
    expected = model.predict({"features": features})
    np.testing.assert_allclose(answer["logits"], expected["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")  # as MLflow uses it
def test_mlflow_evaluate_judges_it(
    artifact: lrai.Artifact, rows: tuple[Path, dict[str, Any]], tracking: Any, tmp_path: Path
) -> None:
    """MLflow's evaluator wants one prediction a row, so it is told how to make it of the logits."""
    alone = {"variant": artifact.manifest.chosen}
    lrai_mlflow.save_model(artifact, tmp_path / "model", signature=False, model_config=alone)
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    features = pd.DataFrame(rows[1]["features"][:50])
    logits = np.stack(model.predict(rows[1]["features"][:50])["logits"])
    labels = logits.argmax(axis=1)
    labels[:5] = (labels[:5] + 1) % logits.shape[1]

    def predict(data: pd.DataFrame) -> Any:
        return model.predict(data.to_numpy(np.float32))["logits"].argmax(axis=1)

    with mlflow.start_run():
        result = mlflow.models.evaluate(
            predict,
            features.assign(label=labels),
            targets="label",
            model_type="classifier",
            evaluator_config={"log_model_explainability": False},
        )
    assert result.metrics["accuracy_score"] == pytest.approx(0.9)
