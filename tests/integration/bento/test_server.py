"""A real `bentoml serve` with three workers: answers, refusals, health and figures."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from prometheus_client.parser import text_string_to_metric_families

import lrai_core as lrai
from benchmarks.host import held
from benchmarks.processes import HOST
from tests.integration.bento.conftest import LIMIT_BYTES, WORKERS, Served
from tests.integration.conftest import sentence
from tests.pause import paused

pytestmark = pytest.mark.server

IDS = {"input_ids": [[3, 14, 15], [9, 2, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}
ZEROS = [[0.0] * 64]
CROWD = 10_000
CALLERS = 36  # of eight long sentences, as many as the queue takes
CALL_ROWS = lrai.LraiConfig().scheduler.max_batch_rows  # at most


def protocol(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a request of the Open Inference Protocol."""
    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    names = {"int64": "INT64", "float64": "FP32", "float32": "FP32"}
    return {
        "inputs": [
            {
                "name": name,
                "datatype": names[str(array.dtype)],
                "shape": list(array.shape),
                "data": array.ravel().tolist(),
            }
            for name, array in arrays.items()
        ]
    }


def outputs(reply: Any) -> dict[str, Any]:
    """Return the arrays of an answer of the protocol."""
    assert reply.status == 200, reply.content
    return {one["name"]: np.reshape(one["data"], one["shape"]) for one in reply.content["outputs"]}


def test_answers_are_those_of_onnxruntime(served: Served, token_source: Path) -> None:
    session = onnxruntime.InferenceSession(token_source)
    expected = session.run(None, {name: np.array(rows) for name, rows in IDS.items()})
    reply = served.ask("/mean", IDS)
    assert reply.status == 200, reply.content
    short = outputs(served.ask("/v2/models/tokens/infer", protocol(IDS)))
    for name, array in zip(("mean", "tokens"), expected, strict=True):
        np.testing.assert_allclose(reply.content[name], array, rtol=1e-5)
        np.testing.assert_allclose(short[name], array, rtol=1e-5)


def test_a_compiled_model_answers_within_its_gate(
    served: Served, classifier_int8: lrai.Artifact, classifier_rows: tuple[Path, dict[str, Any]]
) -> None:
    features = np.asarray(classifier_rows[1]["features"][:400], np.float32)
    (logits,) = onnxruntime.InferenceSession(classifier_rows[0]).run(None, {"features": features})
    wanted = np.argmax(np.asarray(logits), axis=1)
    gate = classifier_int8.manifest.variant(classifier_int8.manifest.chosen).gate
    assert gate is not None, "the classifier has a form that is faster than fp32"
    allowed = max(gate.accuracy_loss_bound or 0.0, 1 - (gate.agreement_bound or 1.0), 0.01)
    for path in ("/classify", "/classify_in_a_thread"):
        parts = [
            served.ask(path, {"features": part.tolist()}).content
            for part in np.array_split(features, 20)
        ]
        got = np.concatenate([np.asarray(part) for part in parts])
        assert np.mean(got.argmax(axis=1) != wanted) <= allowed


def test_each_of_many_callers_gets_its_own_sentence(
    served: Served, minilm_session: onnxruntime.InferenceSession
) -> None:
    random = np.random.default_rng(3)
    asked = [sentence(random, 1, length) for length in random.integers(3, 40, 120)]
    waiting, answers = iter(range(len(asked))), dict[int, Any]()

    def caller() -> None:
        for index in waiting:
            body = {name: array.tolist() for name, array in asked[index].items()}
            if index % 2:
                answers[index] = served.ask("/embed", body).content
            else:
                path = "/v2/models/minilm/infer"
                answers[index] = outputs(served.ask(path, protocol(asked[index])))[
                    "sentence_embedding"
                ]

    threads = [threading.Thread(target=caller) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == len(asked)
    for index, feeds in enumerate(asked):
        (expected,) = minilm_session.run(None, feeds)
        np.testing.assert_allclose(answers[index], expected, atol=1e-4)


def test_all_workers_share_one_runtime_and_one_actor_for_each_model(served: Served) -> None:
    for path, body in (("/mean", IDS), ("/classify", {"features": ZEROS})):
        for _ in range(20):
            assert served.ask(path, body).status == 200
    assert len(served.workers()) == WORKERS
    assert len(served.host.daemons()) == 1
    assert len(served.host.actors()) == 3  # of three models, not nine


def test_metrics_have_the_runtime_beside_bentoml(served: Served) -> None:
    assert served.ask("/classify", {"features": ZEROS}).status == 200

    def figures() -> dict[str, Any]:
        text = served.get("/metrics").content.decode()
        return {one.name: one for one in text_string_to_metric_families(text)}

    before = figures()
    assert "bentoml_service_request" in before
    assert before["lrai_runtime_up"].samples[0].value == 1
    for _ in range(10):
        served.ask("/classify", {"features": ZEROS})
    after = figures()  # whichever worker answers
    answered = [one["lrai_request_answered"].samples[0].value for one in (before, after)]
    assert answered[1] >= answered[0] + 10


def test_a_model_says_what_it_is(served: Served) -> None:
    reply = served.get("/v2/models/minilm")
    assert [one["name"] for one in reply.content["inputs"]] == ["input_ids", "attention_mask"]
    assert served.get("/v2/health/ready").content == {"ready": True}
    assert served.get("/readyz").status == served.get("/livez").status == 200


NESTED = b"[" * 100_000
BAD = [
    pytest.param(b"{nope", {}, 400, id="malformed"),
    pytest.param(NESTED, {}, 400, id="nested deeply"),
    pytest.param(b'{"features": ' + NESTED, {}, 400, id="nested deeply in a tensor"),
    pytest.param(b"", {}, 400, id="empty"),
    pytest.param(b"null", {}, 400, id="null"),
    pytest.param({"feature": ZEROS}, {}, 400, id="another name"),
    pytest.param({"features": [[0.0] * 63]}, {}, 400, id="a column too few"),
    pytest.param({"features": [[0.0] * 64, [0.0]]}, {}, 400, id="rows of different shapes"),
    pytest.param({"features": [["a"] * 64]}, {}, 400, id="text for numbers"),
    pytest.param({"features": []}, {}, 400, id="no rows"),
    pytest.param(gzip.compress(bytes(100 << 20)), {"Content-Encoding": "gzip"}, 400, id="bomb"),
    pytest.param(b"x" * (LIMIT_BYTES + 1), {}, 413, id="too large"),
]


@pytest.mark.parametrize(("body", "headers", "status"), BAD)
def test_bad_requests_have_the_status_and_the_form_of_bentoml(
    served: Served, body: Any, headers: dict[str, str], status: int
) -> None:
    reply = served.ask("/classify", body, headers)
    assert reply.status == status, reply.content
    said = reply.content[0] if isinstance(reply.content, list) else reply.content
    assert said["error"]
    assert "/" not in str(said["error"]).replace("check the server log", "")
    assert served.ask("/classify", {"features": ZEROS}).status == 200


SHORT = [
    (b"{nope", {}, 400),
    (NESTED, {}, 400),
    (b"", {}, 400),
    ({"features": [[0.0] * 63]}, {}, 400),
    (gzip.compress(bytes(100 << 20)), {"Content-Encoding": "gzip"}, 413),
    (b"x" * (LIMIT_BYTES + 1), {}, 413),
    (b"x", {"Content-Type": "application/x-unknown"}, 415),
    (b"x", {"Content-Encoding": "br"}, 415),
]


@pytest.mark.parametrize(("body", "headers", "status"), SHORT)
def test_bad_requests_of_the_short_path_have_the_form_of_the_protocol(
    served: Served, body: Any, headers: dict[str, str], status: int
) -> None:
    reply = served.ask("/v2/models/classifier/infer", body, headers)
    assert reply.status == status, reply.content
    assert list(reply.content) == ["error"]


def test_bytes_that_are_a_pickle_are_refused(served: Served) -> None:
    kind = {"Content-Type": "application/vnd.bentoml+pickle"}
    assert served.ask("/classify", b"\x80\x05N.", kind).status == 415


@pytest.mark.parametrize("path", ["/classify", "/v2/models/classifier/infer"])
def test_what_is_no_number_passes_and_so_does_its_answer(served: Served, path: str) -> None:
    body = b'{"features": [[' + b", ".join([b"null"] * 64) + b"]]}"
    reply = served.ask(path, body)
    assert reply.status == 200, reply.content
    rows = reply.content if path == "/classify" else reply.content["outputs"]["logits"]
    assert rows == [[None] * 10]


def test_bentoml_reads_what_it_does_not_know_as_json(served: Served) -> None:
    kind = {"Content-Type": "application/x-unknown"}
    assert served.ask("/classify", {"features": ZEROS}, kind).status == 200
    assert served.ask("/classify", b"x", kind).status == 400


@pytest.mark.parametrize("path", ["", "docs.json", "schema.json", "healthz", "livez", "readyz"])
def test_the_pages_of_bentoml_are_where_they_were(served: Served, path: str) -> None:
    assert served.get(f"/{path}").status == 200


CLIENTS = """
import asyncio, json, sys
import bentoml
import numpy as np

address, tokens = sys.argv[1], {name: np.array(x) for name, x in json.loads(sys.argv[2]).items()}
with bentoml.SyncHTTPClient(address) as client:
    told = {"sync": client.call("embed", **tokens).tolist()}
    try:
        client.call("classify", features=np.zeros((3, 5), np.float32))
    except bentoml.exceptions.BentoMLException as error:
        told["error"] = str(error)

async def awaited():
    async with bentoml.AsyncHTTPClient(address) as client:
        return (await client.call("embed", **tokens)).tolist()

told["async"] = asyncio.run(awaited())
print(json.dumps(told))
"""


def test_the_clients_of_bentoml_are_answered(served: Served) -> None:
    # Of the model with one form: which one takes a call may change between two calls.
    tokens = {name: x.tolist() for name, x in sentence(np.random.default_rng(1), 3, 8).items()}
    address = f"http://{HOST}:{served.server.port}"
    done = subprocess.run(  # of its own: the clients leave temporary folders to the collector
        [sys.executable, "-c", CLIENTS, address, json.dumps(tokens)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = json.loads(done.stdout)
    expected = served.ask("/embed", tokens).content
    np.testing.assert_allclose(told["sync"], expected, rtol=1e-5)
    np.testing.assert_allclose(told["async"], expected, rtol=1e-5)
    assert "dimension 1" in told["error"]


def test_a_flood_of_chunks_is_refused_and_not_kept(served: Served) -> None:
    before = own_bytes(served)
    with ThreadPoolExecutor() as pool:
        floods = [
            pool.submit(flood, served.server.port, path)
            for path in ("/classify", "/v2/models/classifier/infer")
        ]
    for answer, sent in (one.result() for one in floods):
        assert answer.startswith(b"HTTP/1.1 413"), answer[:200]
        assert sent <= 4 * LIMIT_BYTES
    assert own_bytes(served) - before < 64 << 20
    assert served.ask("/classify", {"features": ZEROS}).status == 200


def own_bytes(served: Served) -> int:
    """Return the memory of the server that lies in no file.

    Its share of libraries grows when others end that use them, too.
    """
    return sum(held(pid).own_bytes for pid in served.server.processes())


def flood(port: int, path: str) -> tuple[bytes, int]:
    """Send chunks of a byte each until there is an answer; return it, and how many were sent."""
    with socket.create_connection((HOST, port), timeout=290) as line:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        line.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
        sent = 0
        try:
            while sent < 64 << 20:
                line.sendall(b"1\r\nx\r\n" * 4096)
                sent += 4096
                if _readable(line):
                    break
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has said what it had to say, and hears no more
        try:
            return line.recv(4096), sent
        except ConnectionResetError:
            return b"", sent


def test_a_time_that_is_too_short_is_a_504_that_says_when_to_come_again(served: Served) -> None:
    reply = served.ask("/hurry", {"features": ZEROS, "timeout_ms": 0.001})
    assert reply.status == 504, reply.content
    assert reply.headers["retry-after"] == "1"
    assert served.ask("/hurry", {"features": ZEROS, "timeout_ms": 60_000}).status == 200


@pytest.mark.parametrize("path", ["/embed", "/v2/models/minilm/infer"])
def test_who_hangs_up_leaves_nothing_behind(served: Served, path: str) -> None:
    random = np.random.default_rng(5)
    body = {name: a.tolist() for name, a in sentence(random, 8, 128).items()}
    lines = [
        http.client.HTTPConnection(HOST, served.server.port, timeout=30) for _ in range(CALLERS)
    ]

    def inside() -> int:
        return _stats(served)["outstanding_rows"]

    with paused(served.actor("minilm")):  # so that no row is gone because it was answered
        for line in lines:
            kind = {"Content-Type": "application/json"}
            line.request("POST", path, json.dumps(body).encode(), kind)
        _wait_until(lambda: inside() == 8 * CALLERS)
        for line in lines:
            line.close()
        # What the actor has, and has next, is not taken back.
        _wait_until(lambda: inside() <= 2 * CALL_ROWS)
    _wait_until(lambda: inside() == 0)
    left = f'endpoint="{path}",http_response_code="499"'
    _wait_until(lambda: left in served.get("/metrics").content.decode())
    assert "Exception in ASGI application" not in served.server.log.read_text()


def _wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _stats(served: Served) -> dict[str, int]:
    with lrai.Runtime(served.host.config, address="auto") as runtime:
        return runtime.stats()


def test_ten_thousand_at_once_are_answered_or_told_to_come_again(served: Served) -> None:
    body = json.dumps({"features": ZEROS}).encode()
    head = f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    request = f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + body

    async def caller(all_there: asyncio.Barrier) -> tuple[int, bool]:
        reader, writer = await asyncio.open_connection(HOST, served.server.port)
        await all_there.wait()
        writer.write(request)
        answer = await reader.read()
        writer.close()
        head, _, content = answer.partition(b"\r\n\r\n")
        assert content, answer
        return int(head.split()[1]), b"retry-after" in head.lower()

    async def crowd() -> Counter[tuple[int, bool]]:
        all_there = asyncio.Barrier(CROWD)
        return Counter(await asyncio.gather(*[caller(all_there) for _ in range(CROWD)]))

    ended = asyncio.run(crowd())
    assert sum(ended.values()) == CROWD
    assert set(ended) <= {(200, False), (429, True)}, ended
    assert ended[200, False] > CROWD / 10, ended
    assert served.ask("/classify", {"features": ZEROS}).status == 200
    assert served.get("/readyz").status == 200


def _readable(line: socket.socket) -> bool:
    patience = line.gettimeout()
    line.setblocking(False)
    try:
        return bool(line.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        line.settimeout(patience)
