"""Real `mlflow models serve` processes over HTTP, compared with those of `mlflow.onnx`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.onnx
import numpy as np
import onnx
import onnxruntime
import pytest

import lrai_core as lrai
import lrai_mlflow
from benchmarks.processes import Server
from tests.integration.mlflow_server import Reply, post, start
from tests.own_runtime import own_runtime
from tests.tiny_models import column_model, token_model

pytestmark = pytest.mark.server

MAX_QUEUE_ROWS = 100


@dataclass(frozen=True)
class Served:
    """A server, and the model that it was made of."""

    server: Server
    source: Path

    def post(self, body: Any, content_type: str = "application/json") -> Reply:
        return post(self.server.port, body, content_type)

    def ask(self, body: Any, content_type: str = "application/json") -> Any:
        reply = self.post(body, content_type)
        assert reply.status == 200, reply.content
        return reply.content["predictions"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="module")
def sockets() -> Iterator[Path]:
    with own_runtime(LRAI_SCHEDULER_MAX_QUEUE_ROWS=str(MAX_QUEUE_ROWS)) as found:
        yield found


@pytest.fixture(scope="module")
def served(
    folder: Path, sockets: Path, classifier_rows: tuple[Path, Any], classifier_fp32: lrai.Artifact
) -> Iterator[Mapping[str, Served]]:
    """Yield a server per flavor and model; the one of the token model has no signature."""
    tokens, columns = token_model(folder / "tokens.onnx"), column_model(folder / "columns.onnx")
    models: dict[str, tuple[Path, Path]] = {}
    for name, source in (("classifier", classifier_rows[0]), ("columns", columns)):
        artifact = classifier_fp32
        if name != "classifier":
            artifact = lrai.compile(source, out=folder / f"{name}.lrai", threads=1)
        models[f"lrai {name}"] = (folder / f"lrai-{name}", source)
        models[f"onnx {name}"] = (folder / f"onnx-{name}", source)
        lrai_mlflow.save_model(artifact, models[f"lrai {name}"][0])
        mlflow.onnx.save_model(
            onnx.load(source),
            str(models[f"onnx {name}"][0]),
            signature=lrai_mlflow.signature_of(artifact),
            pip_requirements=["onnxruntime"],
            onnx_execution_providers=["CPUExecutionProvider"],
        )
    models["lrai tokens"] = (folder / "lrai-tokens", tokens)
    artifact = lrai.compile(tokens, out=folder / "tokens.lrai", threads=1)
    lrai_mlflow.save_model(artifact, models["lrai tokens"][0], signature=False)
    with ExitStack() as stack:
        servers = {
            name: Served(stack.enter_context(start(model, folder)), source)
            for name, (model, source) in models.items()
        }
        for one in servers.values():
            one.server.wait_until_ready("/ping")
        yield servers


FEATURES = np.random.default_rng(2).normal(size=(3, 64)).tolist()
PRICES, COUNTS = [1.5, 2.0, 0.25], [1, 2, 3]


@pytest.mark.parametrize(
    ("model", "body"),
    [
        pytest.param("classifier", {"inputs": {"features": FEATURES}}, id="tensors"),
        pytest.param("classifier", {"inputs": FEATURES}, id="one bare tensor"),
        pytest.param("classifier", {"instances": FEATURES}, id="instances"),
        pytest.param(
            "classifier",
            {"instances": [{"features": row} for row in FEATURES]},
            id="named instances",
        ),
        pytest.param(
            "classifier",
            {"dataframe_split": {"columns": ["features"], "data": [[row] for row in FEATURES]}},
            id="a column of rows",
        ),
        pytest.param(
            "classifier",
            {"dataframe_records": [{"features": row} for row in FEATURES]},
            id="records of rows",
        ),
        pytest.param("columns", {"inputs": {"price": PRICES, "count": COUNTS}}, id="two tensors"),
        pytest.param(
            "columns",
            {
                "dataframe_split": {
                    "columns": ["count", "price"],
                    "data": [list(row) for row in zip(COUNTS, PRICES, strict=True)],
                }
            },
            id="columns",
        ),
        pytest.param(
            "columns",
            {
                "dataframe_records": [
                    {"price": price, "count": count}
                    for price, count in zip(PRICES, COUNTS, strict=True)
                ]
            },
            id="records",
        ),
    ],
)
def test_answers_are_those_of_mlflow_onnx(
    served: Mapping[str, Served], model: str, body: dict[str, Any]
) -> None:
    expected = served[f"onnx {model}"].ask(body)
    answer = served[f"lrai {model}"].ask(body)
    assert list(answer) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(answer[name], values, rtol=1e-5, atol=1e-5)


def test_records_of_token_lists_are_answered_row_by_row(served: Mapping[str, Served]) -> None:
    records = [
        {"input_ids": [3, 14, 15], "attention_mask": [1, 1, 1]},
        {"input_ids": [9, 2, 0], "attention_mask": [1, 1, 0]},
    ]
    answer = served["lrai tokens"].ask({"dataframe_records": records})
    session = onnxruntime.InferenceSession(served["lrai tokens"].source)
    feeds = {name: np.array([record[name] for record in records]) for name in records[0]}
    mean, tokens = session.run(None, feeds)
    np.testing.assert_allclose([row["mean"] for row in answer], mean, rtol=1e-5)
    np.testing.assert_allclose([row["tokens"] for row in answer], tokens, rtol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "status", "message"),
    [
        ({"input_ids": [[1, 2]]}, 400, "'attention_mask': missing"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, 400, "has length 1"),
        ({"input_ids": [[1.5]], "attention_mask": [[1]]}, 400, "the model takes INT64"),
        ({"input_ids": [["a"]], "attention_mask": [[1]]}, 400, "the model takes INT64"),
        ({"input_ids": [[1000]], "attention_mask": [[1]]}, 400, "the engine refused the request"),
        (
            {name: [[1]] * (MAX_QUEUE_ROWS + 1) for name in ("input_ids", "attention_mask")},
            400,
            f"more than the {MAX_QUEUE_ROWS} that may wait",
        ),
    ],
)
def test_refusals_have_their_status_and_say_why(
    served: Mapping[str, Served], inputs: dict[str, Any], status: int, message: str
) -> None:
    reply = served["lrai tokens"].post({"inputs": inputs})
    assert reply.status == status
    assert message in reply.content["message"]
    assert ("retry_after_seconds" in reply.content) == (status == 429)


def test_each_of_many_callers_gets_its_own_answer(served: Mapping[str, Served]) -> None:
    random = np.random.default_rng(3)
    requests = [random.integers(0, 100, (1, length)) for length in random.integers(2, 12, 200)]
    session = onnxruntime.InferenceSession(served["lrai tokens"].source)
    waiting, answers = iter(range(len(requests))), dict[int, Any]()

    def caller() -> None:
        for index in waiting:
            ids = requests[index].tolist()
            body = {"inputs": {"input_ids": ids, "attention_mask": [[1] * len(ids[0])]}}
            answers[index] = served["lrai tokens"].ask(body)

    threads = [threading.Thread(target=caller) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == len(requests)
    for index, ids in enumerate(requests):
        mean, tokens = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        np.testing.assert_allclose(answers[index]["mean"], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(answers[index]["tokens"], tokens, rtol=1e-5)
