"""An endpoint of one model, asked by boto3's client and by whoever means no good."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import gzip
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import tritonclient.http as triton
from botocore.exceptions import ClientError
from numpy.typing import NDArray

import lrai_core as lrai
from benchmarks.models import classifier, requests
from lrai_sagemaker.commands.tars import package
from lrai_sagemaker.settings import Settings
from tests.integration.quick import until_quick
from tests.integration.sagemaker.conftest import (
    HOST,
    JSON,
    TOKENS,
    Container,
    Reply,
    free_port,
    wait_until,
)
from tests.pause import pause

pytestmark = pytest.mark.server


def softmax(logits: NDArray[Any]) -> NDArray[Any]:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def session(model: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model)


def test_boto3_gets_the_answers_of_the_source_model(tokens: Container, models: Path) -> None:
    reply = tokens.boto().invoke_endpoint(
        EndpointName="any", Body=json.dumps({"inputs": TOKENS}), ContentType=JSON
    )
    mean, each = session(models / "tokens.onnx").run(
        None, {name: np.array(value) for name, value in TOKENS.items()}
    )
    answer = json.loads(reply["Body"].read())["outputs"]
    np.testing.assert_allclose(answer["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(answer["tokens"], each, rtol=1e-5)
    assert reply["ContentType"] == JSON
    assert reply["CustomAttributes"].startswith("variant=fp32;version=")


def test_boto3_gets_the_answers_of_a_compiled_model_within_its_gate(
    tmp_path: Path, sockets: Path
) -> None:
    # Wide enough for int8 to be faster on any processor.
    source, rows = classifier(tmp_path / "classifier.onnx", 0, hidden=1024)
    artifact = lrai.compile(
        source, out=tmp_path / "c.lrai", evaluation=rows, output_map="softmax", threads=1
    )
    known = {one.variant: one for one in lrai.certificates(artifact)}  # fp32 may serve beside it
    certificate = known[artifact.manifest.chosen]
    gate = artifact.manifest.variant(artifact.manifest.chosen).gate
    assert gate is not None
    assert artifact.manifest.chosen != "fp32"
    demanded = f"epsilon={certificate.epsilon},delta=0.05"
    given = [str(artifact.path), "--require", demanded, "--max-payload-mb", "20"]
    with Container(given, tmp_path, sockets) as container:
        container.wait_until_ready()
        body = io.BytesIO()
        np.save(body, rows["features"][:2000])  # two thousand rows are one request
        reply = container.boto().invoke_endpoint(
            EndpointName="any", Body=body.getvalue(), ContentType="application/x-npy"
        )
        answer = np.load(io.BytesIO(reply["Body"].read()))
        said = reply["CustomAttributes"]
        assert any(f"certificate={one.id}" in said for one in known.values())
    expected = session(source).run(None, {"features": rows["features"][:2000]})[0]
    differences = np.abs(softmax(answer) - softmax(expected)).max(axis=1)
    assert np.mean(differences > certificate.epsilon) < 0.05
    assert np.quantile(differences, 0.99) <= gate.difference["max"]
    assert np.mean(answer.argmax(axis=1) == expected.argmax(axis=1)) > 0.98


def test_clients_of_triton_in_sagemaker_are_answered(tokens: Container, models: Path) -> None:
    inputs = []
    for name, values in TOKENS.items():
        array = np.array(values)
        inputs.append(triton.InferInput(name, array.shape, "INT64"))
        inputs[-1].set_data_from_numpy(array)
    make = triton.InferenceServerClient.generate_request_body
    body, size = make(inputs, outputs=[triton.InferRequestedOutput("mean")])
    kind = "application/vnd.sagemaker-triton.binary+json;json-header-size="
    reply = tokens.boto().invoke_endpoint(
        EndpointName="any", Body=body, ContentType=f"{kind}{size}"
    )
    size = int(reply["ContentType"].removeprefix(kind))
    parse = triton.InferenceServerClient.parse_response_body
    answer = parse(reply["Body"].read(), header_length=size).as_numpy("mean")
    feeds = {name: np.array(value) for name, value in TOKENS.items()}
    np.testing.assert_allclose(
        answer, session(models / "tokens.onnx").run(["mean"], feeds)[0], rtol=1e-5
    )


def test_sentences_get_the_embeddings_of_the_source_model(
    minilm_fp32: lrai.Artifact,
    minilm_session: onnxruntime.InferenceSession,
    tmp_path: Path,
    sockets: Path,
) -> None:
    with Container([str(minilm_fp32.path)], tmp_path, sockets) as container:
        container.wait_until_ready()
        for payload in requests(10, seed=3):
            lists = {name: array.tolist() for name, array in payload.items()}
            answer = container.post({"inputs": lists}).json["outputs"]["sentence_embedding"]
            expected = minilm_session.run(None, payload)[0]
            np.testing.assert_allclose(answer, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("content_type", "accept", "body", "answered"),
    [
        (
            JSON,
            "",
            {"inputs": {"price": [1.5, 2], "count": [2, 3]}},
            {"outputs": {"total": [3, 6]}},
        ),
        (JSON, "", {"instances": [{"price": 1.5, "count": 2}]}, {"predictions": [3.0]}),
        ("text/csv", JSON, b"1.5,2\n2,3\n", {"predictions": [3.0, 6.0]}),
        ("application/jsonlines", JSON, b'{"price": 2, "count": 3}\n', {"predictions": [6.0]}),
    ],
)
def test_bodies_are_read_and_answered_by_their_types(
    content_type: str, accept: str, body: Any, answered: Any, columns: Container
) -> None:
    reply = columns.post(body, Content_Type=content_type, Accept=accept)
    assert reply.status == 200, reply.body
    assert reply.json == answered


def test_csv_is_answered_as_csv_and_npy_on_demand(columns: Container) -> None:
    reply = columns.post(b"price,count\n1.5,2\n", Content_Type="text/csv")
    assert list(csv.reader(io.StringIO(reply.body.decode()))) == [["3.0"]]
    reply = columns.post(b"1.5,2\n", Content_Type="text/csv", Accept="application/x-npy")
    np.testing.assert_array_equal(np.load(io.BytesIO(reply.body)), [3.0])


@pytest.mark.parametrize(("policy", "status"), [("pass", 200), ("reject", 400)])
def test_nan_is_passed_or_refused_as_the_limits_say(
    policy: str, status: int, models: Path, tmp_path: Path, sockets: Path
) -> None:
    variables = {"LRAI_LIMITS_NAN_POLICY": policy}
    with Container([str(models / "columns.lrai")], tmp_path, sockets, **variables) as container:
        container.wait_until_ready()
        reply = container.post({"price": [None, 2], "count": [1, 1]})
        assert reply.status == status
        if status == 200:
            assert reply.json == {"outputs": {"total": [None, 2]}}
        else:
            assert "'price': holds NaN" in reply.json["error"]
        in_csv = container.post(b"nan,1\n", Content_Type="text/csv")
        assert in_csv.status == status


def test_custom_attributes_name_outputs_and_a_time(tokens: Container) -> None:
    asked = {"X_Amzn_SageMaker_Custom_Attributes": "outputs=mean; trace=7c3"}
    assert list(tokens.post({"inputs": TOKENS}, **asked).json["outputs"]) == ["mean"]
    late = tokens.post({"inputs": TOKENS}, X_Amzn_SageMaker_Custom_Attributes="timeout_ms=0.0001")
    assert late.status == 504
    wrong = tokens.post({"inputs": TOKENS}, X_Amzn_SageMaker_Custom_Attributes="timeout_ms=soon")
    told = "timeout_ms is 'soon', a number above 0 is needed"
    assert (wrong.status, told in wrong.json["error"]) == (400, True)
    unknown = tokens.post({"inputs": TOKENS}, X_Amzn_SageMaker_Custom_Attributes="outputs=medium")
    assert (unknown.status, "no output 'medium'" in unknown.json["error"]) == (400, True)


DEEP = b'{"inputs": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"


@pytest.mark.parametrize(
    ("body", "headers", "status", "said"),
    [
        (b'{"inputs": [', {}, 400, "no JSON"),
        (DEEP, {}, 400, "no JSON"),
        (b"", {}, 400, "no JSON"),
        (b"{}", {}, 400, "neither inputs"),
        (b"\x93NUMPY", {"Content-Type": "application/x-npy"}, 400, "no npy"),
        ({"inputs": {"input_ids": [[1]]}}, {}, 400, "'attention_mask': missing"),
        ({"inputs": {**TOKENS, "more": [1]}}, {}, 400, "no such input"),
        ({"inputs": {**TOKENS, "input_ids": [["a"]]}}, {}, 400, "input_ids"),
        (b'{"inputs": {"input_ids": [[NaN]], "attention_mask": [[1]]}}', {}, 400, "no int64"),
        ({"inputs": {**TOKENS, "input_ids": [[10**6, 1, 1]]}}, {}, 400, "refused"),
        (b"<a/>", {"Content-Type": "text/xml"}, 415, "'text/xml' is not read"),
        (b"", {"Content-Encoding": "br"}, 415, "'br'"),
        ({"inputs": TOKENS}, {"Accept": "image/png"}, 406, "'image/png'"),
        (bytes(7 << 20), {}, 413, "6291456"),
        (gzip.compress(bytes(64 << 20)), {"Content-Encoding": "gzip"}, 413, "6291456"),
        (b"\x1f\x8b", {"Content-Encoding": "gzip"}, 400, "no whole gzip"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else "",
)
def test_what_is_wrong_with_a_request_is_said_with_its_status(
    tokens: Container, body: Any, headers: dict[str, str], status: int, said: str
) -> None:
    reply = tokens.send("POST", "/invocations", body, headers)
    assert reply.status == status, reply.body
    assert said in reply.json["error"]
    assert not re.search(r"(^|[ '])/", reply.json["error"])  # no path
    assert tokens.post({"inputs": TOKENS}).status == 200


def test_boto3_is_told_the_status(tokens: Container) -> None:
    with pytest.raises(ClientError) as caught:
        tokens.boto().invoke_endpoint(EndpointName="any", Body=b"{", ContentType=JSON)
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/invocations", 405),
        ("POST", "/ping", 405),
        ("GET", "/models", 404),
        ("POST", "/models", 404),
    ],
)
def test_other_paths_do_not_exist(tokens: Container, method: str, path: str, status: int) -> None:
    reply = tokens.send(method, path)
    assert (reply.status, set(reply.json)) == (status, {"error"})


def own_bytes(container: Container) -> int:
    """Return the memory of the workers that lies in no file: not what they share with others."""
    total = 0
    for pid in container.workers():
        status = Path(f"/proc/{pid}/status").read_text()
        total += int(status.partition("RssAnon:")[2].split()[0]) << 10
    return total


def pour(line: socket.socket) -> None:
    """Send chunks of 64 KiB until that is no longer possible."""
    with contextlib.suppress(OSError):
        while True:
            line.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")


def test_a_flood_of_chunks_is_refused_and_not_held(tokens: Container) -> None:
    before = own_bytes(tokens)
    with socket.create_connection((HOST, tokens.port)) as line:
        line.sendall(
            b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        flood = threading.Thread(target=pour, args=(line,))
        flood.start()
        received = line.recv(1 << 16)
        line.shutdown(socket.SHUT_RDWR)
        flood.join()
    assert received.startswith(b"HTTP/1.1 413"), received[:100]
    assert own_bytes(tokens) - before < 64 << 20


def test_tiny_chunks_are_put_together(tokens: Container) -> None:
    body = json.dumps({"inputs": TOKENS}).encode() + b" " * 20_000
    with socket.create_connection((HOST, tokens.port)) as line:
        line.sendall(
            b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        line.sendall(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
        received = b"".join(iter(lambda: line.recv(1 << 16), b""))
    assert received.startswith(b"HTTP/1.1 200")


BURST = 10_000


def test_a_burst_is_answered_or_refused_to_the_last_one(tokens: Container) -> None:
    body = json.dumps({"inputs": TOKENS}).encode()
    head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nConnection: close\r\n"
    whole = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def one() -> int:
        reader, writer = await asyncio.open_connection(HOST, tokens.port)
        writer.write(whole)
        status = int((await reader.readline()).split()[1])
        await reader.read()
        writer.close()
        return status

    async def burst() -> list[int]:
        return await asyncio.gather(*(one() for _ in range(BURST)))

    statuses = asyncio.run(burst())
    assert len(statuses) == BURST
    assert set(statuses) <= {200, 429, 503}
    assert statuses.count(200) > 200
    assert tokens.get("/ping").status == 200


def test_who_hangs_up_leaves_nothing_behind(tokens: Container) -> None:
    body = json.dumps({"inputs": TOKENS}).encode()
    for stated in (len(body), len(body) + 10):  # a whole one, and one that never comes
        for _ in range(50):
            with socket.create_connection((HOST, tokens.port)) as line:
                line.sendall(
                    f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\n"
                    f"Content-Length: {stated}\r\n\r\n".encode()
                    + body
                )
    assert tokens.post({"inputs": TOKENS}).status == 200
    with tokens.runtime() as runtime:
        wait_until(lambda: runtime.stats()["outstanding_rows"] == 0)
    assert "Traceback" not in tokens.log


def test_ping_is_false_until_the_model_is_loaded_and_while_it_is_stopped(
    models: Path, tmp_path: Path, sockets: Path
) -> None:
    with Container([str(models / "tokens.lrai")], tmp_path, sockets) as container:
        container.wait_until_ready()
        slowest = list[float]()
        for _ in until_quick(slowest, 4):
            slowest.append(slowest_ping_while_stopped(container))
        assert "ping: " in container.log


def slowest_ping_while_stopped(container: Container) -> float:
    """Return the most seconds that a ping takes until it is false; after that all is well again."""
    actor = container.actor()
    pause(actor)
    threads = [
        threading.Thread(target=container.post, args=({"inputs": TOKENS},)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    deadline, pings, slowest = time.monotonic() + 60, set[int](), 0.0
    while pings != {200, 503} and time.monotonic() < deadline:
        begun = time.monotonic()
        pings.add(container.get("/ping").status)
        slowest = max(slowest, time.monotonic() - begun)
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert pings == {200, 503}
    container.wait_until_ready()  # it was replaced
    assert container.actor() != actor
    return slowest


def test_ping_is_false_as_long_as_a_model_has_never_answered(
    models: Path, tmp_path: Path, sockets: Path
) -> None:
    given = [str(models / "tokens.lrai"), "--timeout-seconds", "0.5"]
    variables = {"LRAI_ACTOR_HANG_SECONDS": "60"}  # nobody else finds out that it is stopped
    with Container(given, tmp_path, sockets, **variables) as container:
        wait_until(lambda: "is loaded" in container.log, 120)
        pause(actor := container.actor())
        pings = [container.get("/ping").status for _ in range(3)]
        os.kill(actor, signal.SIGCONT)
        assert pings == [503] * 3
        container.wait_until_ready()


def test_a_required_certificate_that_is_not_there_ends_the_container(
    models: Path, tmp_path: Path, sockets: Path
) -> None:
    given = [str(models / "tokens.lrai"), "--require", "epsilon=0.1,delta=0.01"]
    with Container(given, tmp_path, sockets) as container:
        pings = set[int]()
        while container.process.poll() is None:
            try:
                pings.add(container.get("/ping").status)
            except OSError:
                time.sleep(0.01)
        assert container.process.wait(30) == 3
        assert pings <= {503}
        assert "certificate" in container.log.splitlines()[-1]
        assert "Traceback" not in container.log


def test_who_asks_before_the_model_is_loaded_is_told_to_come_again(
    models: Path, tmp_path: Path, sockets: Path
) -> None:
    slow, may_start = tmp_path / "python", tmp_path / "start"  # of the actor
    waits = f"while [ ! -e {may_start} ]; do sleep 0.05; done"
    slow.write_text(f'#!/bin/sh\n{waits}\nexec {sys.executable} "$@"\n')
    slow.chmod(0o700)
    variables = {"LRAI_ACTOR_PYTHON": str(slow)}
    with Container([str(models / "tokens.lrai")], tmp_path, sockets, **variables) as container:
        early, deadline = list[Reply](), time.monotonic() + 120
        while not early or early[-1].status == 503:
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError):
                ping = container.get("/ping")
                early.append(container.post({"inputs": TOKENS}))
                may_start.touch()
                assert ping.status == early[-1].status or early[-1].status == 200
                time.sleep(0.05)
    *early, last = early
    assert last.status == 200
    assert early
    for reply in early:
        assert reply.json == {"error": "the model is not loaded"}
        assert int(reply.headers["Retry-After"]) >= 1


def ended(arguments: list[str], folder: Path, sockets: Path, **variables: str) -> tuple[int, str]:
    """Return exit status and last line of a container that cannot serve."""
    with Container(arguments, folder, sockets, **variables) as container:
        status = container.process.wait(120)
        assert "Traceback" not in container.log
        return status, container.log.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("SAGEMAKER_BATCH_STRATEGY", "MultiRecord", "is not one of 'SINGLE_RECORD'"),
        ("SAGEMAKER_MODEL_SERVER_WORKERS", "0", "greater than or equal to 1"),
        ("LRAI_SAGEMAKER_REQUIRE", "epsilon=x", "a number is needed"),
    ],
)
def test_the_last_line_says_which_variable_is_wrong(
    models: Path, tmp_path: Path, sockets: Path, name: str, value: str, why: str
) -> None:
    given = [str(models / "tokens.lrai")]
    status, line = ended(given, tmp_path, sockets, **{name: value})
    assert (status, why in line) == (2, True), line


def test_a_model_that_changed_is_refused(models: Path, tmp_path: Path, sockets: Path) -> None:
    shutil.copytree(models / "tokens.lrai", tmp_path / "m" / "model.lrai")
    (file,) = (tmp_path / "m" / "model.lrai" / "variants" / "fp32").glob("*.onnx")
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    status, line = ended([str(tmp_path / "m")], tmp_path, sockets)
    assert (status, "has changed" in line) == (4, True), line


def test_a_model_of_a_newer_lrai_is_refused(models: Path, tmp_path: Path, sockets: Path) -> None:
    shutil.copytree(models / "tokens.lrai", tmp_path / "model.lrai")
    manifest = tmp_path / "model.lrai" / "manifest.json"
    text = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**text, "schema_version": 99}))
    status, line = ended([str(tmp_path)], tmp_path, sockets)
    assert (status, "install a newer lrai" in line) == (4, True), line


def test_a_folder_without_a_model_is_explained(tmp_path: Path, sockets: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.onnx").write_bytes(b"")
    status, line = ended([str(tmp_path / "m")], tmp_path, sockets)
    assert status == 4
    assert "has to hold one NAME.lrai; it holds model.onnx" in line


def test_a_port_that_is_taken_is_explained(models: Path, tmp_path: Path, sockets: Path) -> None:
    with socket.create_server((HOST, free_port())) as taken:
        port = taken.getsockname()[1]
        given = [str(models / "tokens.lrai"), "--port", str(port)]
        status, line = ended(given, tmp_path, sockets)
    assert status == 5
    assert f"{HOST}:{port} cannot be served: Address already in use" in line


def test_a_temporary_folder_that_is_not_there_is_explained(
    models: Path, tmp_path: Path, sockets: Path
) -> None:
    gone = str(tmp_path / "gone")
    variables = {"LRAI_RUNTIME_SOCKET_DIR": gone}
    status, line = ended([str(models / "tokens.lrai")], tmp_path, sockets, **variables)
    assert (status, "temporary folder" in line) == (5, True), line


def test_a_runtime_of_ones_own_is_refused(models: Path, tmp_path: Path, sockets: Path) -> None:
    variables = {"LRAI_RUNTIME": "embedded"}
    status, line = ended([str(models / "tokens.lrai")], tmp_path, sockets, **variables)
    assert (status, "workers share a runtime" in line) == (2, True), line


def test_a_missing_extra_is_explained(models: Path, tmp_path: Path, sockets: Path) -> None:
    hide = "import sys, importlib.util as u; find = u.find_spec; "
    hide += "u.find_spec = lambda n, *a: None if n == 'uvicorn' else find(n, *a); "
    program = hide + "from lrai_core.cli import main; main()"
    command = [sys.executable, "-P", "-c", program, "sagemaker", "serve"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert "pip install 'lrai[sagemaker]'" in done.stderr


def test_a_tar_is_served_and_unpacked_safely(models: Path, tmp_path: Path, sockets: Path) -> None:
    (tmp_path / "model").mkdir()
    package(lrai.Artifact.open(models / "tokens.lrai"), tmp_path / "model" / "model.tar.gz")
    with Container([str(tmp_path / "model")], tmp_path, sockets) as container:
        container.wait_until_ready()
        assert container.post({"inputs": TOKENS}).status == 200
        assert container.stop() == 0
    assert not list(sockets.glob("lrai-sagemaker-*"))


def test_what_a_container_that_was_killed_had_unpacked_the_next_one_removes(
    models: Path, tmp_path: Path, sockets: Path
) -> None:
    def unpacked() -> set[Path]:
        return set(sockets.glob("lrai-sagemaker-*/model-*"))

    def container(name: str, model: str) -> Container:
        (tmp_path / name).mkdir()
        tar = tmp_path / name / "model.tar.gz"
        package(lrai.Artifact.open(models / f"{model}.lrai"), tar)
        return Container([str(tar)], tmp_path / name, sockets)

    with container("lives", "tokens") as lives:
        lives.wait_until_ready()
        kept = unpacked()
        with container("killed", "columns") as killed:
            killed.wait_until_ready()
            (worker,) = killed.workers()
            assert len(unpacked()) == 2
            assert killed.stop(signal.SIGKILL) == -signal.SIGKILL
            wait_until(lambda: not _runs(worker))
        with container("next", "tokens") as following:
            following.wait_until_ready()
            assert unpacked() == kept  # of one tar both have the model together
            assert following.post({"inputs": TOKENS}).status == 200
            assert following.stop() == 0
            assert unpacked() == kept
            assert lives.stop() == 0
    assert not list(sockets.glob("lrai-sagemaker-*"))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_model_outlives_the_container_that_has_unpacked_it(
    models: Path, tmp_path: Path, sockets: Path, how: int
) -> None:
    package(lrai.Artifact.open(models / "tokens.lrai"), tmp_path / "model.tar.gz")
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
    model = [str(tmp_path / "model.tar.gz")]
    with Container(model, tmp_path / "second", sockets) as other:
        other.wait_until_ready()
        with Container(model, tmp_path / "first", sockets) as first:
            first.wait_until_ready()
            assert other.stop() == 0  # whose place the runtime has it from
            with Container(model, tmp_path / "third", sockets) as second:
                second.wait_until_ready()
                (worker,) = first.workers()
                assert first.stop(how) in (0, -signal.SIGKILL)
                wait_until(lambda: not _runs(worker))
                os.kill(second.actor(), signal.SIGKILL)
                reply = second.post({"inputs": TOKENS})
                assert reply.status == 200, reply.body
                assert second.stop() == 0
    assert not list(sockets.glob("lrai-sagemaker-*"))


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    return False


def test_sigterm_has_what_was_accepted_answered(
    minilm_fp32: lrai.Artifact, tmp_path: Path, sockets: Path
) -> None:
    random = np.random.default_rng(0)
    ids = random.integers(1000, 29000, (8, 128)).tolist()
    body = {"inputs": {"input_ids": ids, "attention_mask": np.ones((8, 128), int).tolist()}}
    given = [str(minilm_fp32.path), "--workers", "2"]
    variables = {"LRAI_ACTOR_HANG_SECONDS": "60"}  # it is stopped
    with Container(given, tmp_path, sockets, **variables) as container:
        container.wait_until_ready()
        replies = list[int]()
        threads = [
            threading.Thread(target=lambda: replies.append(container.post(body).status))
            for _ in range(4)
        ]
        with container.runtime() as runtime:
            (actor,) = [pid for model in runtime.models() for pid in model.actor_pids]
            pause(actor)
            for thread in threads:
                thread.start()
            wait_until(lambda: runtime.stats()["outstanding_rows"] == 4 * 8)
            begun = time.monotonic()
            container.process.send_signal(signal.SIGTERM)  # before an answer is there
            os.kill(actor, signal.SIGCONT)
        assert container.process.wait(60) == 0
        assert time.monotonic() - begun < 30
        for thread in threads:
            thread.join()
        assert replies == [200] * 4


def test_who_never_sends_the_rest_does_not_keep_a_container_from_ending(
    models: Path, tmp_path: Path, sockets: Path
) -> None:
    given = [str(models / "tokens.lrai"), "--drain-seconds", "2"]
    with Container(given, tmp_path, sockets) as container:
        container.wait_until_ready()
        address = HOST, container.port
        with socket.create_connection(address, 60) as line, line.makefile("rb") as answer:
            head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\n"
            line.sendall(f"{head}Content-Length: 100\r\nExpect: 100-continue\r\n\r\n".encode())
            assert answer.readline().startswith(b"HTTP/1.1 100"), "a worker has read it"
            answer.readline()
            line.sendall(b"{")
            begun = time.monotonic()
            assert container.stop() == 0
            assert 1.5 < time.monotonic() - begun < 20
            assert b"503 Service Unavailable" in answer.readline()
        assert "Traceback" not in container.log, container.log


def test_bodies_that_come_slowly_have_their_room_and_their_time(
    models: Path, tmp_path: Path, sockets: Path
) -> None:
    allowed = 8  # seconds: enough to see how full it is, whatever else this machine does
    given = [str(models / "tokens.lrai"), "--timeout-seconds", str(allowed)]
    variables = {"LRAI_SCHEDULER_MAX_QUEUE_BYTES": "1000000"}  # less than one body may have
    with Container(given, tmp_path, sockets, **variables) as container:
        container.wait_until_ready()
        head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\n"
        begun = time.monotonic()  # before the container's time does, which may end too soon
        with socket.create_connection((HOST, container.port)) as line:
            line.sendall(f"{head}Content-Length: 6000000\r\n\r\n".encode() + b" " * 5_900_000)
            full = container.post(b" " * 400_000)
            # Until all of that was read.
            while full.status == 400 and time.monotonic() < begun + allowed - 0.5:
                time.sleep(0.1)
                full = container.post(b" " * 400_000)
            assert (full.status, full.headers["Retry-After"]) == (429, "1")
            assert container.post({"inputs": TOKENS}).status == 200  # there is room for little
            assert line.recv(1 << 16).startswith(b"HTTP/1.1 504")
            assert allowed - 0.5 < time.monotonic() - begun < allowed + 18
        assert container.post(b" " * 400_000).status == 400


def test_ctrl_c_ends_it_and_its_workers(models: Path, tmp_path: Path, sockets: Path) -> None:
    with Container([str(models / "tokens.lrai"), "--workers", "2"], tmp_path, sockets) as container:
        container.wait_until_ready()
        workers = container.workers()
        assert container.stop(signal.SIGINT) == 130
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
        assert "Traceback" not in container.log


def test_workers_do_not_outlive_their_supervisor(
    models: Path, tmp_path: Path, sockets: Path
) -> None:
    with Container([str(models / "tokens.lrai")], tmp_path, sockets) as container:
        container.wait_until_ready()
        (worker,) = container.workers()
        container.process.kill()
        container.process.wait()
        wait_until(lambda: not _runs(worker))


def test_a_worker_whose_supervisor_had_died_before_it_looked_ends(
    tmp_path: Path, sockets: Path
) -> None:
    settings = Settings(folder=str(tmp_path), multi_model=True, scratch=str(tmp_path))
    told = msgspec.json.encode(settings).decode()
    with socket.create_server((HOST, 0)) as listening:
        number = listening.fileno()
        command = [sys.executable, "-P", "-m", "lrai_sagemaker.worker", told, str(number), "1"]
        own = {"LRAI_RUNTIME": "auto", "LRAI_RUNTIME_SOCKET_DIR": str(sockets)}
        done = subprocess.run(
            command, pass_fds=[number], env=os.environ | own, timeout=120, check=False
        )
    assert done.returncode == 0
