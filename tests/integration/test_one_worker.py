"""A host with one worker: a quick model runs in it, with no runtime beside, and is looked after."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

import lrai_bentoml
import lrai_core as lrai
import lrai_mlflow
from benchmarks.processes import HOST, Server
from tests.integration import mlflow_server
from tests.integration.quick import until_quick
from tests.integration.sagemaker.conftest import Container
from tests.integration.test_inline import held_up
from tests.integration.test_runtime_faults import wait_until
from tests.own_runtime import daemon_pids, own_runtime
from tests.tiny_models import token_model

pytestmark = pytest.mark.server

BODY = {"input_ids": [[3, 14, 15]], "attention_mask": [[1, 1, 1]]}
UNKNOWN = {**BODY, "input_ids": [[1000, 1, 1]]}  # which the engine refuses
CALLERS = 16
SERVICE = """
import time
from pathlib import Path

import bentoml, lrai_bentoml
from lrai_core.engine.onnxruntime import OnnxRuntimeSession

run, hang = OnnxRuntimeSession.run, Path("HANG")

def held_up(*arguments, **more):
    while hang.exists():
        time.sleep(0.01)
    return run(*arguments, **more)

OnnxRuntimeSession.run = held_up

@bentoml.service(name="called_otherwise")
class Tokens:
    model = lrai_bentoml.runner("one:latest")

    @bentoml.api
    async def predict(self, input_ids: list, attention_mask: list) -> list:
        return (await self.model.async_run(input_ids, attention_mask))[0].tolist()
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> lrai.Artifact:
    folder = tmp_path_factory.mktemp("one")
    return lrai.compile(token_model(folder / "tokens.onnx"), out=folder / "tokens.lrai", threads=1)


@pytest.fixture(scope="module")
def expected(artifact: lrai.Artifact) -> Any:
    with lrai.Runtime.open(artifact, address="embedded") as runtime:
        inputs = {name: np.array(values, np.int64) for name, values in BODY.items()}
        request = lrai.InferenceRequest(model_name="tokens", inputs=inputs)
        return runtime.infer(request).outputs["mean"].tolist()


@pytest.fixture
def sockets() -> Iterator[Path]:
    with own_runtime(LRAI_RUNTIME="") as folder:  # nothing says where the model runs
        yield folder


def status(port: int, path: str, body: Any, seconds: float = 60, **headers: str) -> int:
    """Return how a request ends, 0 for one that has no answer in so many seconds."""
    line = http.client.HTTPConnection(HOST, port, timeout=seconds)
    with contextlib.closing(line), contextlib.suppress(OSError):
        content = None if body is None else json.dumps(body)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        line.request(
            "GET" if body is None else "POST",
            path,
            content,
            {"Content-Type": "application/json", **named},
        )
        return line.getresponse().status
    return 0


@contextlib.contextmanager
def accepted(port: int, path: str, body: Any) -> Iterator[Callable[[], int]]:
    """Have a server wait for the body of a request; what is yielded sends it, and tells the end."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection((HOST, port), timeout=30) as line, line.makefile("rb") as answer:
        line.sendall(head.encode())
        assert answer.readline().startswith(b"HTTP/1.1 100"), "it is inside"
        answer.readline()

        def rest() -> int:
            line.sendall(content)
            return int(answer.readline().split()[1])

        yield rest


def post(port: int, path: str, body: Any) -> Any:
    request = urllib.request.Request(
        f"http://{HOST}:{port}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310 - likewise
        return json.load(reply)


def many(port: int, path: str, body: Any) -> list[Any]:
    with ThreadPoolExecutor(CALLERS) as callers:
        return list(callers.map(lambda _: post(port, path, body), range(4 * CALLERS)))


def test_mlflow(artifact: lrai.Artifact, expected: Any, tmp_path: Path, sockets: Path) -> None:
    with mlflow_server.own_store(tmp_path):
        saved = tmp_path / "model"
        lrai_mlflow.save_model(artifact, saved)
    assert "lrai" in mlflow.models.Model.load(saved).flavors
    with mlflow_server.start(saved, tmp_path) as server:
        server.wait_until_ready("/ping")
        answers = many(server.port, "/invocations", {"inputs": BODY})
        assert daemon_pids(sockets) == []
        assert len(server.processes()) <= 2, "no actor"  # the command, and its worker
        for inputs, params, end in (
            (UNKNOWN, {}, 400),
            (BODY, {"timeout_ms": 1e-9}, 504),
            (BODY, {}, 200),
        ):
            body = {"inputs": inputs, "params": params}
            assert status(server.port, "/invocations", body) == end
        with accepted(server.port, "/invocations", {"inputs": BODY}) as rest:
            os.killpg(server.processes()[0], signal.SIGTERM)
            assert rest() == 200, "what was accepted is answered"
    for answer in answers:
        np.testing.assert_allclose(answer["predictions"]["mean"], expected, atol=1e-5)


def actors(pids: Sequence[int]) -> set[int]:
    """Return which of these processes, or of what they have started, are actors."""
    found = set[int]()
    for task in Path("/proc").glob("[0-9]*/task/*/children"):
        with contextlib.suppress(OSError):
            if int(task.parts[2]) in pids:
                found |= set(map(int, task.read_text().split()))
    every = {*pids, *found}
    return {pid for pid in every if b"lrai_core.actor.actor" in _command(pid)}


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def test_bentoml(artifact: lrai.Artifact, expected: Any, tmp_path: Path, sockets: Path) -> None:
    hang = tmp_path / "hang"
    lrai_bentoml.save_model("one", artifact)
    (tmp_path / "service.py").write_text(SERVICE.replace("HANG", str(hang)))
    command = [sys.executable, "-m", "bentoml", "serve", ".", "--host", HOST, "-p", "{port}"]
    variables = {"LRAI_ACTOR_HANG_SECONDS": "1"}
    with Server(command, tmp_path / "log", variables=variables) as server:
        server.wait_until_ready("/readyz")
        answers = many(server.port, "/predict", BODY)
        metrics = f"http://{HOST}:{server.port}/metrics"
        with urllib.request.urlopen(metrics, timeout=60) as reply:
            figures = reply.read().decode()
        assert daemon_pids(sockets) == []
        assert not actors(server.processes())
        assert status(server.port, "/predict", UNKNOWN) == 400
        with ThreadPoolExecutor(1) as caller:
            hang.touch()
            slow = caller.submit(post, server.port, "/predict", BODY)
            for path in ("/livez", "/readyz"):  # on one CPU nobody answers at all
                deadline = time.monotonic() + 60
                while status(server.port, path, None, 5) == 200:
                    assert time.monotonic() < deadline
            server._process.terminate()
            hang.unlink()
            answers.append(slow.result())
    for answer in answers:
        np.testing.assert_allclose(answer, expected, atol=1e-5)
    assert f"lrai_request_answered_total {len(answers) - 1}" in figures


def test_sagemaker(artifact: lrai.Artifact, expected: Any, tmp_path: Path, sockets: Path) -> None:
    with Container([str(artifact.path)], tmp_path, sockets, LRAI_RUNTIME="") as container:
        container.wait_until_ready()
        answers = many(container.port, "/invocations", {"inputs": BODY})
        assert daemon_pids(sockets) == []
        assert container.workers()
        assert not actors(container.workers())
        taken = list[float]()
        for _ in until_quick(taken, 2):
            (worker,) = container.workers()
            os.kill(worker, signal.SIGKILL)  # with the model in it
            begun = time.monotonic()
            container.wait_until_ready()
            taken.append(time.monotonic() - begun)
            assert container.workers() != [worker]
        answers += many(container.port, "/invocations", {"inputs": BODY})
        for path, body, how, end in (
            ("/invocations", {"inputs": UNKNOWN}, "", 400),
            ("/invocations", {"inputs": BODY}, "timeout_ms=0.0001", 504),
            ("/models", {}, "", 404),
            ("/invocations", {"inputs": BODY}, "", 200),
        ):
            ended = status(container.port, path, body, X_Amzn_SageMaker_Custom_Attributes=how)
            assert ended == end
        with accepted(container.port, "/invocations", {"inputs": BODY}) as rest:
            container.process.terminate()
            assert rest() == 200, "what was accepted is answered"
        assert container.process.wait(60) == 0
    for answer in answers:
        np.testing.assert_allclose(answer["outputs"]["mean"], expected, atol=1e-5)


def test_a_container_whose_model_cannot_be_opened_ends_and_says_why(
    artifact: lrai.Artifact, tmp_path: Path, sockets: Path
) -> None:
    broken = tmp_path / "tokens.lrai"
    shutil.copytree(artifact.path, broken)
    for model in [*broken.glob("variants/*/model.onnx"), broken / "source" / "model.onnx"]:
        model.write_bytes(model.read_bytes()[:-1] + b"\0")
    with Container([str(broken)], tmp_path, sockets, LRAI_RUNTIME="") as container:
        assert container.process.wait(60) == lrai.ArtifactError.exit_code
        assert "model.onnx" in container.log.splitlines()[-1]


def test_a_container_refuses_what_has_no_certificate(
    artifact: lrai.Artifact, tmp_path: Path, sockets: Path
) -> None:
    demand = ["--require", "epsilon=0.0001,delta=0.0001"]
    with Container([str(artifact.path), *demand], tmp_path, sockets, LRAI_RUNTIME="") as container:
        assert container.process.wait(60) == lrai.ConditionNotMet.exit_code
        assert "certificate" in container.log.splitlines()[-1]


def test_what_a_loop_and_threads_ask_of_a_runtime_shares_calls(artifact: lrai.Artifact) -> None:
    inputs = {name: np.array(values, np.int64) for name, values in BODY.items()}
    request = lrai.InferenceRequest(model_name="tokens", inputs=inputs)
    config = lrai.load_config(call={"actor.isolation": "inline", "scheduler.max_queue_rows": 64})
    with lrai.Runtime.open(artifact, address="embedded", config=config) as runtime:

        async def ask() -> list[lrai.InferenceResponse]:
            return await asyncio.gather(*[runtime.infer_async(request) for _ in range(40)])

        with ThreadPoolExecutor(5) as callers, held_up(runtime, 30) as (began, go_on):
            loop = callers.submit(lambda: asyncio.run(ask()))
            others = [callers.submit(runtime.infer, request) for _ in range(20)]
            assert began.wait(60)
            wait_until(lambda: runtime.stats()["request_accepted"] == 44)  # four of the threads
            go_on.set()
            answers = loop.result() + [other.result() for other in others]
        assert len({answer.outputs["mean"].tobytes() for answer in answers}) == 1
        stats = runtime.stats()
        assert stats["batch_completed"] < stats["request_answered"] == 60
        assert runtime.stats()["outstanding_rows"] == 0
        identity = runtime.submit(request)
        assert runtime.result(identity, 10).model_name == "tokens"
        with held_up(runtime, 30) as (began, go_on):
            first = runtime.start(request)
            assert began.wait(60)
            waiting = [runtime.start(request) for _ in range(63)]
            with pytest.raises(lrai.QueueFull):
                runtime.start(request)
            assert runtime.ready() == "ok"
            assert [future.cancel() for future in waiting] == [True] * 63
            assert runtime.stats()["outstanding_rows"] == 1
            go_on.set()
            assert first.result().outputs
        assert runtime.drain()
