"""The public tests of BentoML that hold for a runner and its services, as our cases.

What tests/adapters/test_lrai_bentoml_peer.py has of `test_frameworks.py` is not repeated. Cases below
bear the names of theirs; what other tests of ours hold already:

| there | here |
|---|---|
| `test_frameworks.py`: `test_get_service` | `test_a_project_has_what_build_and_serve_need` |
| `models/onnx.py`: `onnx_bert_model`, inputs by name | `test_it_answers_as_bentoml_onnx_does` |
| `test_onnx_impl.py`: metadata, `test_get_model_info_exc` | `test_generic_arguments`, `test_wrong_module_load_exc` |
| the same: the models that a runner requires; a file | `test_a_runner_is_one_of_the_models_of_its_service`, `test_an_onnx_file_is_imported` |
| `test_model.py`: `test_model_equal`, `test_load_bad_model` | `test_get`, `test_a_file_that_changed_since_is_found` |
| `test_quickstart.py`: clients, a Bento that is served; `test_load_service_from_bento` | `test_the_clients_of_bentoml_are_answered`, `test_a_bento_serves_where_nothing_was_with_the_network_cut` |
| `test_container.py`: arrays of different rows | `test_runner_batching` |
| `test_io.py`: `test_numpy` | `test_bad_requests_have_the_status_and_the_form_of_bentoml` |
| `test_meta.py`: pages, readiness, figures; `test_client.py` | `test_the_pages_of_bentoml_are_where_they_were`, `test_it_is_not_ready_before_every_model_is`, `test_metrics_have_the_runtime_beside_bentoml` |
| `test_serve.py`: a server; 504 and 429, there of limits of BentoML | test_server.py, `test_a_time_that_is_too_short_is_a_504_that_says_when_to_come_again`, `test_ten_thousand_at_once_are_answered_or_told_to_come_again` |

What differs, and why:

* Numbers are cast where no value changes; theirs casts whatever comes.
* Sequences of maps (`ZipMap`) are no tensors, and refused on import; without them forests are taken.
* A model is imported from a file or a tag: a `ModelProto` is neither.
* Two runners of one model are one model, as its first one loads it; theirs is a name taken twice.
* A request of more rows than a batch is a call of its own; theirs is split.

Nothing here is like runnables, their names, strategies, GPUs and options, gRPC (for legacy services
only) or payloads between runners; and of BentoML alone are files, images, CORS, contexts, custom
commands, its clocks and threads, its dispatcher's observers, its clients' caches, Spark and MLflow.
"""  # noqa: E501 - a table

# BentoML reads bare arrays only, and its decorators have no types that mypy knows.
# mypy: disable-error-code="type-arg, untyped-decorator, attr-defined"

from __future__ import annotations

import asyncio
import contextlib
import copy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
import onnx
import pandas as pd
import pytest
from _bentoml_impl.server.serving import server_on_deployment  # type: ignore[import-untyped]
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml.exceptions import BentoMLException, NotFound
from onnx import TensorProto, helper
from starlette.testclient import TestClient

import lrai_bentoml
from tests.own_runtime import own_runtime
from tests.pause import paused
from tests.tiny_models import column_model

pytestmark = [
    pytest.mark.server,
    # BentoML asks a model for what pydantic has moved to its class, in each request
    pytest.mark.filterwarnings("ignore:Accessing the 'model_fields' attribute"),
]

TAG = "peers-columns:first"
COLUMNS = {"price": [1.5, 2.0], "count": [2, 3]}
TOTAL = [3.0, 6.0]
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64

runner = lrai_bentoml.runner(TAG)
other = lrai_bentoml.runner(TAG)


@bentoml.service(metrics={"enabled": False})
class Model:
    """One model, asked in each way that BentoML has."""

    model = runner
    other = other

    @bentoml.api
    async def total(self, price: np.ndarray, count: np.ndarray) -> np.ndarray:
        return np.asarray(await self.model.async_run(price, count))

    @bentoml.api
    def rows(self, frame: pd.DataFrame, /) -> np.ndarray:
        return np.asarray(self.model.run(**frame))

    @bentoml.api
    def prices(self, price: np.ndarray, /) -> np.ndarray:
        return np.asarray(self.other.run(price, np.ones_like(price)))

    @bentoml.task
    def later(self, price: np.ndarray, count: np.ndarray) -> np.ndarray:
        return np.asarray(self.model.run(price, count))


@bentoml.service(metrics={"enabled": False})
class Composed:
    """A service that asks another one."""

    inner = bentoml.depends(Model)

    @bentoml.api
    async def total(self, price: np.ndarray, count: np.ndarray) -> dict[str, np.ndarray]:
        return {"value": await self.inner.total(price, count)}


@bentoml.service(path_prefix="/shop")
@bentoml.asgi_app(lrai_bentoml.asgi_app(runner), path="/short")
class Prefixed:
    """All paths of this one are below one."""

    model = runner

    @bentoml.api
    async def total(self, price: np.ndarray, count: np.ndarray) -> np.ndarray:
        return np.asarray(await self.model.async_run(price, count))


Prefixed.add_asgi_middleware(lrai_bentoml.Guard)


@pytest.fixture(scope="module", autouse=True)
def columns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bentoml.Model]:
    """Save the model that the services above ask, in a runtime of their own."""
    before = copy.deepcopy(BentoMLContainer.config.get())  # which services add themselves to
    source = column_model(tmp_path_factory.mktemp("columns") / "columns.onnx")
    with own_runtime():
        for one in (runner, other):  # as if they had been made here
            one._here.asked = lrai_bentoml.runner(TAG)._here.asked
        yield saved(TAG, source)
        for one in (runner, other):
            one.close()
    BentoMLContainer.config.set(before)


def saved(name: str, source: Path) -> bentoml.Model:
    return lrai_bentoml.import_model(name, source, options={"threads": 1})


def onnx_model(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> Path:
    given, made = ([helper.make_tensor_value_info(*v) for v in side] for side in (inputs, outputs))
    graph = helper.make_graph(nodes, path.stem, given, made)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


@contextlib.contextmanager
def running(tag: Any, **settings: Any) -> Iterator[lrai_bentoml.Runner]:
    """Yield a runner of this process alone."""
    own = {"runtime.address": "embedded", "actor.threads": 1}
    one = lrai_bentoml.runner(tag, settings={**own, **settings})
    with contextlib.closing(one):
        yield one


class TestModels:
    def test_onnx_le_model(self, tmp_path: Path) -> None:
        node = helper.make_node(
            "LabelEncoder", ["labels"], ["numbers"], domain="ai.onnx.ml",
            keys_int64s=[2, 3, 5], values_floats=[0.0, 1.0, 2.0],
        )  # fmt: skip
        values = [("labels", INT64, ["batch", 1])], [("numbers", FLOAT, ["batch", 1])]
        model = saved("peers-labels", onnx_model(tmp_path / "labels.onnx", [node], *values))
        with running(model.tag) as one:
            assert one.run([[5], [2]]).tolist() == [[2.0], [0.0]]

    def test_onnx_rf_model(self, tmp_path: Path) -> None:
        scores = [("scores", FLOAT, ["batch", 3])]
        nodes = [
            helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0),
            helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1),
        ]
        outputs = [("label", INT64, ["batch"]), ("probabilities", FLOAT, ["batch", 3])]
        model = saved("peers-forest", onnx_model(tmp_path / "f.onnx", nodes, scores, outputs))
        with running(model.tag) as one:
            label, probabilities = one.run(np.array([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]))
        assert label.tolist() == probabilities.argmax(axis=1).tolist() == [1, 0]
        np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-6)

    def test_onnx_rf_model_with_maps(self, tmp_path: Path) -> None:
        node = helper.make_node(
            "ZipMap", ["scores"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2]
        )
        source = onnx_model(tmp_path / "m.onnx", [node], [("scores", FLOAT, ["batch", 3])], [])
        model = onnx.load(source)
        each = helper.make_map_type_proto(INT64, helper.make_tensor_type_proto(FLOAT, None))
        kind = helper.make_sequence_type_proto(each)
        model.graph.output.append(helper.make_value_info("maps", kind))
        onnx.save(model, source)
        with pytest.raises(BentoMLException, match=r"'maps' is a sequence.*'zipmap': False"):
            saved("peers-maps", source)

    def test_onnx_runner_with_partial_inputs(self, tmp_path: Path) -> None:
        nodes = [
            helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1]),
            helper.make_node("Add", ["mean", "bias"], ["y"]),
        ]
        inputs = [("x", FLOAT, ["batch", 4]), ("bias", FLOAT, [1])]
        source = onnx_model(tmp_path / "b.onnx", nodes, inputs, [("y", FLOAT, ["batch", 1])])
        tag, x = saved("peers-bias", source).tag, np.eye(3, 4)
        with running(tag) as one, running(tag) as other:
            for biases in ((0.0, 1.0), (-0.212, 1.1392)):
                first, second = one.run(x, biases[:1]), other.run(x, biases[1:])
                np.testing.assert_allclose(second - first, biases[1] - biases[0], rtol=1e-5)


class TestStore:
    def test_model_info(self, columns: bentoml.Model) -> None:
        start = datetime.now(UTC)
        metadata = {"acc": 0.876, "test": True, "c": np.array([2, 3, 4], np.uint32)}
        artifact = lrai_bentoml.load_model(columns)
        model = lrai_bentoml.save_model("peers-info:myversion", artifact, metadata=metadata)
        assert start <= model.creation_time <= datetime.now(UTC)  # test_model_creationtime
        assert model.info.version == "myversion"  # test_model_version
        told = {key: model.info.metadata[key] for key in metadata}
        assert told == {"acc": 0.876, "test": True, "c": [2, 3, 4]}
        assert model.info.context.bentoml_version == bentoml.__version__
        assert model.info.context.framework_name == "lrai"
        with pytest.raises(BentoMLException, match="'peers-info:myversion' already exists"):
            lrai_bentoml.save_model("peers-info:myversion", artifact)

    def test_models(self, columns: bentoml.Model, tmp_path: Path) -> None:
        artifact = lrai_bentoml.load_model(columns)
        first, second = (lrai_bentoml.save_model(f"peers-kept:{n}", artifact).tag for n in "12")
        assert {first, second} <= {model.tag for model in bentoml.models.list()}
        assert lrai_bentoml.get("peers-kept").tag == second
        file = bentoml.models.export_model(second, str(tmp_path / "kept.bentomodel"))
        bentoml.models.delete(second)
        with pytest.raises(NotFound):
            lrai_bentoml.get(second)
        assert lrai_bentoml.get("peers-kept").tag == first
        bentoml.models.import_model(file)  # test_model_export_import
        assert lrai_bentoml.get("peers-kept:latest").tag == second
        assert lrai_bentoml.load_model(second).sha256 == artifact.sha256
        with running(second) as one:
            assert one.run(**COLUMNS).tolist() == TOTAL

    def test_onnx_save_load_proto(self, columns: bentoml.Model) -> None:
        source = lrai_bentoml.load_model(columns).path / "source" / "model.onnx"
        with pytest.raises(TypeError, match="ModelProto is neither a file nor a saved model"):
            lrai_bentoml.import_model("peers-proto", onnx.load(source))

    def test_load_raise_exc(self) -> None:
        with pytest.raises(BentoMLException, match="no variant 'not-supported'"):
            lrai_bentoml.runner(TAG, variant="not-supported").load()


class Tensor:
    """What numpy can read, as tensors of other libraries are."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.array(self.values, dtype)


class TestRunner:
    def test_pandas_container(self) -> None:
        frame = pd.DataFrame(COLUMNS)
        assert runner.run(**frame).tolist() == TOTAL
        assert runner.run(frame["price"], count=Tensor(COLUMNS["count"])).tolist() == TOTAL

    def test_numbers_are_cast(self) -> None:
        price, count = (np.array(values, np.float64) for values in COLUMNS.values())
        assert runner.run(price, count).tolist() == TOTAL
        with pytest.raises(BentoMLException, match=r"'count'.* the model takes INT32"):
            runner.run(price, count + 0.5)

    def test_runner_cpu_multi_threading(self) -> None:
        found = []
        for threads in (1, 3):  # test_runner_cpu
            with running(TAG, **{"actor.threads": threads}) as one:
                assert one.run(**COLUMNS).tolist() == TOTAL
                found.append(threads_of(actor(one)))
        assert found[1] - found[0] == 2  # the engine's

    def test_service_init_checks(self) -> None:
        same, other = (
            lrai_bentoml.runner(TAG),
            lrai_bentoml.runner(TAG, settings={"actor.threads": 3}),
        )
        with contextlib.closing(same), contextlib.closing(other):
            for one in (same, other, runner):
                assert one.run(**COLUMNS).tolist() == TOTAL
            assert actor(same) == actor(runner)
            assert actor(other) != actor(runner)  # its settings would not hold there

    def test_split_results_remain_in_original_order(self) -> None:
        with running(TAG, **{"scheduler.max_batch_rows": 2}) as one:
            assert one.run(np.arange(5), np.full(5, 2)).tolist() == [0, 2, 4, 6, 8]
            assert one.stats()["batch_dispatched"] == 1

    def test_cancelled_requests_are_not_dispatched(self) -> None:
        with running(TAG, **{"actor.hang_seconds": 60}) as one:  # it is stopped
            one.load()
            calls = asyncio.run(self.crowd(one, cancelled=range(4)))
            stats = one.stats()
        # test_cancelling_inflight_request_preserves_other_batch_results: the first is in flight
        assert all(isinstance(call, asyncio.CancelledError) for call in calls[:4])
        # test_controller_skips_cancelled_queue_and_serves_next_request
        assert [call.tolist() for call in calls[4:]] == [[2.0 * n] for n in range(4, 11)]
        assert stats["request_answered"] == 7
        assert stats["batch_dispatched"] == 2  # test_batch_size_limit: what waits goes together

    def test_all_cancelled_batch_does_not_call_model(self) -> None:
        with running(TAG, **{"actor.hang_seconds": 60}) as one:  # it is stopped
            one.load()
            calls = asyncio.run(self.crowd(one, cancelled=range(1, 11)))
            stats = one.stats()
        assert calls[0].tolist() == [0.0]
        assert all(isinstance(call, asyncio.CancelledError) for call in calls[1:])
        assert stats["batch_dispatched"] == 1

    async def crowd(self, one: lrai_bentoml.Runner, cancelled: range) -> list[Any]:
        """Have a call begin, ten wait behind it, and some of them give up meanwhile."""

        async def until(holds: Callable[[], bool]) -> None:
            async with asyncio.timeout(30):
                while not holds():  # noqa: ASYNC110 - polled
                    await asyncio.sleep(0.005)

        pid, calls = actor(one), list[asyncio.Task[Any]]()
        with paused(pid):
            for n in range(11):
                calls.append(asyncio.create_task(one.async_run([float(n)], [2])))
                await until(lambda: one.stats()["outstanding_rows"] == len(calls))
                await until(lambda: one.stats().get("batch_dispatched") == 1)  # the first alone
            for n in cancelled:
                calls[n].cancel()
            left = 11 - len(set(cancelled) - {0})  # an engine does not stop halfway
            await until(lambda: one.stats()["outstanding_rows"] == left)
        return await asyncio.gather(*calls, return_exceptions=True)


def actor(one: lrai_bentoml.Runner) -> int:
    """Return the process that computes for a runner."""
    held = one.load().held
    (pid,) = (pid for m in held.runtime.models() if m.name == held.name for pid in m.actor_pids)
    return pid


def threads_of(pid: int) -> int:
    """Return how many threads a process has, once two looks see as many."""
    counts = [0]
    while (count := len(list(Path(f"/proc/{pid}/task").iterdir()))) != counts[-1]:
        counts.append(count)
        assert len(counts) < 100, counts
        time.sleep(0.2)
    return count


class TestService:
    def test_simple_service(self) -> None:
        with TestClient(Model.to_asgi()) as client:
            assert client.post("/total", json=COLUMNS).json() == TOTAL
            assert client.get("/readyz").status_code == 200

    def test_composed_service(self) -> None:
        with TestClient(Composed.to_asgi()) as client:
            assert client.post("/total", json=COLUMNS).json() == {"value": TOTAL}
            refused = client.post("/total", json={**COLUMNS, "count": [0.5, 1]})
        assert refused.status_code == 400
        assert "the model takes INT32" in refused.text

    def test_service_root_input(self) -> None:
        rows = pd.DataFrame(COLUMNS).to_dict(orient="records")
        with TestClient(Model.to_asgi()) as client:
            assert client.post("/prices", json=[1.5, 2.0]).json() == [1.5, 2.0]
            assert client.post("/rows", json=rows).json() == TOTAL  # test_pandas

    def test_service_with_path_prefix(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
        with TestClient(Prefixed.to_asgi()) as client:
            for path in ("", "/livez", "/readyz", "/short/v2/health/ready"):
                assert client.get(f"/shop{path}").status_code == 200, path
            assert "lrai_runtime_up 1.0" in client.get("/shop/metrics").text
            assert client.post("/shop/total", json=COLUMNS).json() == TOTAL
            short = client.post("/shop/short/v2/models/peers-columns/infer", json=COLUMNS)
            assert short.json()["outputs"] == {"total": TOTAL}
            assert client.post("/total", json=COLUMNS).status_code == 404

    def test_task_submit_status_get_retry(self) -> None:
        server_on_deployment(Model)
        with TestClient(Model.to_asgi()) as client:
            task = client.post("/later/submit", json=COLUMNS).json()
            asked = {"task_id": task["task_id"]}
            assert client.get("/later/status", params=asked).json()["status"] == "completed"
            assert client.get("/later/get", params=asked).json() == TOTAL
            retried = client.post("/later/retry", params=asked).json()
            assert retried["task_id"] != task["task_id"]
            again = {"task_id": retried["task_id"]}
            assert client.get("/later/get", params=again).json() == TOTAL

    def test_load_service_from_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "peers_service.py").write_text(SERVICE)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.path", [*sys.path])
        service: Any = bentoml.load("peers_service:Two", working_dir=str(tmp_path))
        assert [str(model.tag) for model in service.models] == [TAG, "peers-columns:latest"]
        total = service().total(*map(np.array, COLUMNS.values()))  # test_local_prediction
        assert total.tolist() == TOTAL
        service.inner.model.close()
        del sys.modules["peers_service"]

    def test_inject_config_pollution_regression(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("LRAI_RUNTIME")
        alone, several = lrai_bentoml.runner(TAG), lrai_bentoml.runner(TAG)

        @bentoml.service(workers=1)
        class Alone:
            model = alone

        @bentoml.service(workers=3)
        class Several:
            model = several

        services: Any = ((Alone, alone, False), (Several, several, True)) * 2
        for service, one, shared in services:
            service.inject_config()
            assert bool(one.shared) == shared  # one worker alone has the model in itself


SERVICE = f"""
import bentoml
import lrai_bentoml
import numpy as np

@bentoml.service
class Two:
    model = lrai_bentoml.runner("{TAG}")
    other = lrai_bentoml.runner("peers-columns:latest")

    @bentoml.api
    def total(self, price: np.ndarray, count: np.ndarray) -> np.ndarray:
        return self.model.run(price, count)
"""


def test_bentoml_metrics_does_not_import_prometheus_client_eagerly() -> None:
    program = "import lrai_bentoml, sys; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
