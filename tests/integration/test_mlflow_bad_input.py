"""Bad input to a real `mlflow models serve`: MLflow's own form and status, and a server that lives.

What MLflow refuses itself is refused as it refuses it for any model; the rest is lrai's to refuse.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import lrai_core as lrai
import lrai_mlflow
from benchmarks.processes import HOST, Server
from tests.integration.mlflow_server import SERVE, post, processes_with, start
from tests.many_files import many_files
from tests.own_runtime import end_runtime, own_runtime
from tests.tiny_models import token_model

pytestmark = pytest.mark.server

REQUEST_BYTES = 100_000
FLOOD_BYTES, CHUNK_BYTES = 64 << 20, 16 << 10
GOOD: dict[str, Any] = {"inputs": {"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}}
Refusals = Mapping[str, Future[str]]
INTERNALS = re.compile(r"/[t]mp/|site-packages|\.sock|ipc://|Traceback")


def tokens(ids: Any, mask: Any) -> dict[str, Any]:
    return {"inputs": {"input_ids": ids, "attention_mask": mask}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    source = token_model(folder / "tokens.onnx")
    artifact = lrai.compile(source, out=folder / "tokens.lrai", threads=1)
    lrai_mlflow.save_model(artifact, folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def sockets() -> Iterator[Path]:
    limits = {"LRAI_LIMITS_REQUEST_BYTES": str(REQUEST_BYTES), "LRAI_LIMITS_NAN_POLICY": "reject"}
    with own_runtime(**limits) as folder:
        yield folder


@pytest.fixture(scope="module")
def server(
    saved: Path, sockets: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    # Of ten thousand the first is answered after the last was read: a busy machine takes 60 s.
    patient = {"MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": "180"}
    logs = tmp_path_factory.mktemp("logs")
    with many_files(), start(saved, logs, variables=patient) as found:
        found.wait_until_ready("/ping")
        yield found


@pytest.fixture(autouse=True)
def lives(server: Server) -> Iterator[None]:
    before = server.processes()[:2]
    yield
    assert post(server.port, GOOD).status == 200
    assert server.processes()[:2] == before


@pytest.mark.parametrize(
    ("body", "content_type", "status", "why"),
    [
        pytest.param("{", "application/json", 400, "valid JSON", id="malformed"),
        pytest.param("", "application/json", 400, "valid JSON", id="empty"),
        pytest.param(b"\xff\xfe{}", "application/json", 400, "valid JSON", id="no text"),
        pytest.param("[1]", "application/json", 400, "Received a list", id="a list"),
        pytest.param("{}", "application/json", 400, "exactly one of", id="no field"),
        pytest.param({"inputs": 1, "instances": 1}, "application/json", 400, "exactly one", id="2"),
        pytest.param(
            '{"inputs":' + "[" * 900 + "]" * 900 + "}", "application/json", 400, "recursion",
            id="deep",
        ),
        pytest.param(GOOD, "application/x-foo", 415, "content types", id="unknown type"),
        pytest.param(GOOD, "application/json; charset=latin-1", 415, "UTF-8", id="charset"),
        pytest.param(
            gzip.compress(b"0" * 10_000_000), "application/json", 400, "valid JSON", id="bomb"
        ),
        pytest.param({"inputs": {"input_ids": [[1]]}}, "application/json", 400,
                     "missing inputs ['attention_mask']", id="missing input"),
        pytest.param({"dataframe_split": {"columns": ["a"], "data": [[1]]}}, "application/json",
                     400, "extra inputs: ['a']", id="wrong columns"),
        pytest.param({"dataframe_split": {"columns": ["a", "b"], "data": [[1]]}},
                     "application/json", 400, "dataframe_split", id="ragged columns"),
        pytest.param(tokens([[1, 2], [1]], [[1, 1], [1, 1]]), "application/json", 400,
                     "inhomogeneous", id="ragged rows"),
        pytest.param(tokens([["a"]], [[1]]), "application/json", 400, "invalid literal", id="text"),
        pytest.param('{"inputs":{"input_ids":[[NaN]],"attention_mask":[[1]]}}',
                     "application/json", 400, "NaN", id="NaN"),
        pytest.param(tokens([[2**70]], [[1]]), "application/json", 400, "too large", id="2^70"),
        pytest.param(tokens([], []), "application/json", 400, "Shape of input", id="no rows"),
        pytest.param(tokens([[]], [[]]), "application/json", 400, "at least 1", id="no tokens"),
        pytest.param(tokens([[1] * 20_000], [[1] * 20_000]), "application/json", 400,
                     f"one request has {REQUEST_BYTES} at most", id="too large"),
        pytest.param({"inputs": {"../../etc/passwd": [[1]]}}, "application/json", 400,
                     "missing inputs", id="a path for a name"),
        pytest.param({**GOOD, "params": {"timeout_ms": "x"}}, "application/json", 400,
                     "Invalid parameters", id="a wrong parameter"),
        pytest.param({**GOOD, "params": {"timeout_ms": 1e-9}}, "application/json", 504,
                     "allowed", id="no time"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_mlflows_form(
    server: Server, body: Any, content_type: str, status: int, why: str
) -> None:
    reply = post(server.port, body, content_type)
    assert reply.status == status
    if status == 415:
        assert why in reply.content
        return
    assert why in reply.content["message"]
    assert set(reply.content) >= {"error_code", "message"}
    assert not INTERNALS.search(json.dumps(reply.content))


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        pytest.param("[" * 200_000, "application/json", id="very deep"),
        pytest.param(GOOD, None, id="no content type"),
        pytest.param(
            '{"inputs":{"input_ids":[[' + "9" * 5000 + "]]}}", "application/json", id="5000 digits"
        ),
    ],
)
def test_what_mlflow_itself_trips_over_costs_that_request_only(
    server: Server, body: Any, content_type: str | None
) -> None:
    reply = post(server.port, body, content_type)
    assert (reply.status, reply.content) == (500, "Internal Server Error")


def test_a_flood_of_chunks_is_held_whole_and_given_back(server: Server) -> None:
    """MLflow reads a body of any size, which no flavor can keep it from: see decision 20."""
    worker = server.processes()[1]
    before = resident_bytes(worker)
    Path(f"/proc/{worker}/clear_refs").write_text("5")  # the peak is that of what comes now
    for _ in range(8):
        chunks = (b"[" * CHUNK_BYTES for _ in range(FLOOD_BYTES // CHUNK_BYTES))
        reply = post(server.port, chunks, "application/x-foo")  # read whole, then looked at
        assert reply.status == 415
        assert post(server.port, GOOD).status == 200
    assert peak_bytes(worker) - before > FLOOD_BYTES
    # Of eight. glibc keeps the pieces of one where something lies above them in its heap.
    assert resident_bytes(worker) - before < 2 * FLOOD_BYTES


def test_callers_who_hang_up_leave_the_server_to_the_others(server: Server) -> None:
    content = json.dumps(GOOD).encode()
    head = "POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    whole = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
    for cut in (len(whole), len(whole) - 5, 30):
        for _ in range(20):
            with socket.create_connection((HOST, server.port)) as caller:
                caller.sendall(whole[:cut])
                linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # a reset, not an end
                caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    # Not only when the time of those who hung up is over.
    assert post(server.port, GOOD, timeout_seconds=45).status == 200


def test_ten_thousand_at_once_are_all_answered(server: Server) -> None:
    """MLflow refuses nobody: it keeps them waiting, and says 504 when its time is up."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # which this process and the server have
    count = 10_000
    assert most >= count + 200, f"{most} open files allowed, {count + 200} are needed"
    content = json.dumps(GOOD).encode()
    head = "POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    whole = f"{head}Connection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content

    async def ask() -> str:
        for _ in range(50):  # the queue of new connections holds 2048
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(HOST, server.port)
                break
            await asyncio.sleep(0.1)
        else:
            return "no connection"
        try:
            writer.write(whole)
            reply = await asyncio.wait_for(reader.read(), 400)  # some wait until they are read
            return reply[9:12].decode()
        except OSError as error:
            return type(error).__name__
        finally:
            writer.close()

    async def ask_all() -> Counter[str]:
        return Counter(await asyncio.gather(*(ask() for _ in range(count))))

    found = asyncio.run(ask_all())
    assert sum(found.values()) == count
    assert set(found) <= {"200", "429", "503", "504"}, found
    assert found["200"] > 1000


def environment(**variables: str) -> dict[str, str]:
    """Return this process's, in which MLflow finds uvicorn by its name, activated or not."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, **variables}


def refused(model: Path, *, port: int = 0, **variables: str) -> str:
    """Serve a model that cannot be, and return what the server says before it ends."""
    command = [*SERVE, "--env-manager", "local", "-m", str(model), "-h", HOST, "-p", str(port)]
    done = subprocess.run(
        command, cwd=model.parent, capture_output=True, text=True, timeout=300, check=False,
        env=environment(**variables),
    )  # fmt: skip
    assert done.returncode != 0
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def alone() -> Iterator[Path]:
    """Yield the folder of a runtime that one server has for itself."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        end_runtime(Path(folder))


@pytest.fixture(scope="module")
def refusals(
    saved: Path, alone: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Refusals]:
    """Yield what servers say that cannot be; they start side by side, as each takes its time."""
    folder = tmp_path_factory.mktemp("refused")
    models = {name: folder / name / "model" for name in ("changed", "elsewhere", "newer", "taken")}
    for model in models.values():
        shutil.copytree(saved, model)

    weights = models["changed"] / "model.lrai" / "source" / "weights.bin"
    content = bytearray(weights.read_bytes())
    content[0] ^= 0xFF
    weights.write_bytes(content)

    description = models["elsewhere"] / "MLmodel"
    (models["elsewhere"] / "model.lrai").rename(folder / "elsewhere" / "model.lrai")
    text = description.read_text()
    description.write_text(text.replace("data: model.lrai", "data: ../model.lrai"))

    manifest = models["newer"] / "model.lrai" / "manifest.json"
    found = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**found, "schema_version": found["schema_version"] + 1}))

    with socket.create_server((HOST, 0)) as taken, ThreadPoolExecutor(2) as pool:
        port, own = taken.getsockname()[1], str(alone)
        begun = {
            "taken": pool.submit(
                refused, models.pop("taken"), port=port, LRAI_RUNTIME_SOCKET_DIR=own
            )
        }
        begun |= {name: pool.submit(refused, model) for name, model in models.items()}
        begun["nowhere"] = pool.submit(refused, saved, LRAI_RUNTIME_SOCKET_DIR="/proc/nowhere")
        yield begun
        pool.shutdown(cancel_futures=True)


def test_a_model_that_was_changed_after_saving_is_not_served(refusals: Refusals) -> None:
    said = refusals["changed"].result()
    assert "weights.bin has changed since the artifact was written" in said


def test_a_model_whose_data_lies_elsewhere_is_not_served(refusals: Refusals) -> None:
    assert "no model.lrai beside an MLmodel" in refusals["elsewhere"].result()


def test_a_model_of_a_newer_lrai_is_not_served(refusals: Refusals) -> None:
    assert "install a newer lrai" in refusals["newer"].result()


def test_a_place_for_sockets_that_cannot_be_written_is_named(refusals: Refusals) -> None:
    said = refusals["nowhere"].result()
    assert "/proc/nowhere" in said
    assert "socket_dir" in said or "cannot be" in said or "No such file" in said


def test_ping_is_silent_until_the_model_is_loaded(saved: Path, tmp_path: Path) -> None:
    """MLflow's `/ping` knows nothing of the model: it answers from when it is loaded, always."""
    with own_runtime(), start(saved, tmp_path) as one:
        seen = set()
        while "200" not in seen:
            with socket.socket() as caller:
                seen.add("no" if caller.connect_ex((HOST, one.port)) else "200")
            if "Application startup complete" not in one.log.read_text():  # said before it listens
                assert seen <= {"no"}
        one.wait_until_ready("/ping")
        assert post(one.port, GOOD).status == 200


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import lrai_mlflow", 1),
        ("sys.argv = ['lrai', 'mlflow']; from lrai_core.cli import main; main()", 5),
    ],
)
def test_without_mlflow_the_flavor_says_what_to_install(code: str, status: int) -> None:
    hide = (
        "import sys, importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'mlflow' else found(name, *a)\n"
    )
    command = [sys.executable, "-c", hide + code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert "pip install 'lrai[mlflow]'" in done.stderr


def test_a_port_that_is_taken_is_said_and_leaves_nothing(refusals: Refusals, alone: Path) -> None:
    assert "address already in use" in refusals["taken"].result()
    deadline = time.monotonic() + 120
    while processes_with(str(alone)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def resident_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


def peak_bytes(pid: int) -> int:
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(line) << 10
