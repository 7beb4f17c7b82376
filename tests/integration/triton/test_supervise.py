"""`lrai triton watch` and `serve`: real servers, and stubs that are killed, stopped and crash."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from benchmarks.host import Host
from benchmarks.processes import HOST, Server, free_ports
from benchmarks.triton_server import Prepared, TritonServer, stubs, variables
from tests.integration.test_cli import run
from tests.integration.test_runtime_faults import kill, wait_until
from tests.integration.triton.models import WIDTH, config, identity, plain
from tests.integration.triton.server import Triton
from tests.pause import pause

pytestmark = pytest.mark.server

LRAI = (sys.executable, "-P", "-c", "from lrai_core.cli import main; main()")
BACK_SECONDS = 60  # five, says benchmarks/triton_faults.py
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, WIDTH], "data": [1, 2, 3, 4]}]}


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what a watch keeps lie in a folder of the test's own."""
    monkeypatch.setenv("LRAI_RUNTIME_SOCKET_DIR", str(tmp_path))


def answers(address: str, model: str, seconds: float = 60.0) -> bool:
    """Return whether the model answers a request, and rightly."""
    connection = http.client.HTTPConnection(address, timeout=seconds)
    try:
        connection.request("POST", f"/v2/models/{model}/infer", json.dumps(BODY))
        reply = connection.getresponse()
        content = json.loads(reply.read())
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return reply.status == 200 and content["outputs"][0]["data"] == [1, 2, 3, 4]


class Watch:
    """`lrai triton watch` as a process, and what it has said."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*LRAI, "triton", "watch", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def said(self, words: str) -> bool:
        return any(words in line for line in self.lines)

    def wait(self, seconds: float) -> int:
        status = self.process.wait(seconds)
        self._thread.join()
        return status

    def close(self) -> None:
        self.process.terminate()
        self.wait(60)

    def _read(self) -> None:
        with self.process.stdout as stream:  # type: ignore[union-attr] # a pipe
            self.lines.extend(line.rstrip("\n") for line in stream)


@contextmanager
def watching(
    triton: Triton, *models: str, interval: float = 1.0, silent: float = 30.0
) -> Iterator[Watch]:
    names = [word for model in models for word in ("--model", model)]
    url = f"http://{triton.server.http}"
    seconds = ["--interval", str(interval), "--silent-seconds", str(silent)]
    watch = Watch("--url", url, *seconds, *names)
    try:
        wait_until(lambda: watch.said("watching"))
        yield watch
    finally:
        watch.close()


def wait_until_answer(triton: Triton, model: str) -> None:
    wait_until(lambda: answers(triton.server.http, model, 5.0), BACK_SECONDS)


def test_a_killed_stub_of_ours_is_back_and_a_plain_one_stays_dead(
    triton: Triton, tmp_path: Path
) -> None:
    with (
        triton.serving("beside", {1: plain(tmp_path)}, config("python")),
        triton.serving("ours", {1: identity(tmp_path / "m.onnx")}, config("lrai")),
        watching(triton) as watch,
    ):
        for _ in range(2):
            assert answers(triton.server.http, "ours")
            for model in ("beside", "ours"):
                for stub in triton.server.stub_pids().get(model, []):
                    kill(stub)
            wait_until_answer(triton, "ours")
            assert not answers(triton.server.http, "beside")
            assert triton.http.is_model_ready("beside")  # or so it says
            assert "beside" not in triton.server.stub_pids()
    assert not watch.said("beside")
    assert was_reloaded(watch, "ours")


def was_reloaded(watch: Watch, model: str) -> bool:
    """Whether a killed stub was seen to be gone, or a probe found it first."""
    why = "its stub is gone", "its stub is not healthy"
    return any(watch.said(f"{model}: {one}; reloading it") for one in why)


def test_a_killed_stub_is_found_under_load(triton: Triton, tmp_path: Path) -> None:
    ended = threading.Event()

    def call() -> None:
        while not ended.is_set():
            if not answers(triton.server.http, "loaded", 5.0):
                time.sleep(0.05)  # a client that spins on refusals would starve the reload

    with (
        triton.serving("loaded", {1: identity(tmp_path / "m.onnx")}, config("lrai")),
        watching(triton, "loaded"),
        ThreadPoolExecutor(16) as callers,
    ):
        try:
            for _ in range(16):
                callers.submit(call)
            kill(*triton.server.stub_pids()["loaded"])
            wait_until_answer(triton, "loaded")
        finally:
            ended.set()


def test_a_stub_that_hangs_is_reloaded(triton: Triton, tmp_path: Path) -> None:
    held = tmp_path / "held"
    model = plain(tmp_path, f"while os.path.exists({str(held)!r}): time.sleep(0.05)")
    with triton.serving("hangs", {1: model}, config("python")):
        (stub,) = triton.server.stub_pids()["hangs"]
        with watching(triton, "hangs", interval=0.1, silent=3.0) as watch:
            held.touch()
            wait_until(lambda: watch.said("hangs: it has given no answer for"), 60)
            held.unlink()
            wait_until(lambda: watch.said("hangs: reloaded"), 60)
            assert answers(triton.server.http, "hangs")
        assert triton.server.stub_pids()["hangs"] != [stub]


def test_a_stub_that_is_stopped_is_reloaded(triton: Triton, tmp_path: Path) -> None:
    with triton.serving("stopped", {1: plain(tmp_path)}, config("python")):
        (stub,) = triton.server.stub_pids()["stopped"]
        pause(stub)
        with watching(triton, "stopped", interval=0.1, silent=600.0) as watch:
            wait_until_answer(triton, "stopped")
        assert watch.said("stopped: its stub is not healthy; reloading it")
        kill(stub)  # which Triton does not do


def test_a_model_that_refuses_the_probe_lives(triton: Triton, tmp_path: Path) -> None:
    model = plain(tmp_path, 'raise pb_utils.TritonModelException("no rows of zeros here")')
    with triton.serving("refuses", {1: model}, config("python", dims=-1)):
        with watching(triton, "refuses", interval=0.1) as watch:
            before = counted(triton, "refuses", "fail")
            wait_until(lambda: counted(triton, "refuses", "fail") > before + 5)
        assert not watch.said("reloading")


def test_a_probe_is_for_the_stub_and_not_for_the_model(triton: Triton, tmp_path: Path) -> None:
    """What is captured, and what is unloaded for want of use, goes by what users ask."""
    text = config("lrai") + 'parameters { key: "execution" value { string_value: "lists" } }\n'
    with triton.serving("asked", {1: identity(tmp_path / "m.onnx")}, text):
        assert answers(triton.server.http, "asked")
        before = triton.stats()["request_accepted"]
        with watching(triton, "asked", interval=0.1) as watch:
            probed = counted(triton, "asked", "success") + 5
            wait_until(lambda: counted(triton, "asked", "success") > probed)
            assert triton.stats()["request_accepted"] == before
            kill(*triton.server.stub_pids()["asked"])
            wait_until_answer(triton, "asked")
        assert was_reloaded(watch, "asked")


def test_one_of_two_stubs_that_dies_is_found(triton: Triton, tmp_path: Path) -> None:
    text = config("lrai") + "instance_group [{ count: 2 kind: KIND_CPU }]\n"
    with (
        triton.serving("two", {1: identity(tmp_path / "m.onnx")}, text),
        watching(triton, "two", silent=2.0) as watch,
        ThreadPoolExecutor(4) as callers,
    ):
        first, second = triton.server.stub_pids()["two"]
        kill(first)

        def found() -> bool:  # the one that lives answers, the other one's fail
            # One request at a time may never come to that one.
            list(callers.map(lambda _: answers(triton.server.http, "two", 5.0), range(8)))
            return watch.said("; reloading it")  # a slow machine has it silent first

        def renewed() -> bool:  # the other one, too, which Triton forgets
            there = triton.server.stub_pids().get("two", [])
            return len(there) == 2 and {first, second}.isdisjoint(there)

        wait_until(found, 60)
        wait_until(lambda: watch.said("two: reloaded"), 60)
        wait_until(renewed, 60)
        assert answers(triton.server.http, "two")


def counted(triton: Triton, model: str, what: str) -> int:
    (stats,) = triton.http.get_inference_statistics(model)["model_stats"]
    count: int = stats["inference_stats"][what]["count"]
    return count


def test_a_model_that_always_dies_is_given_up_and_no_longer_called_ready(
    triton: Triton, tmp_path: Path
) -> None:
    with triton.serving("dies", {1: plain(tmp_path, "os._exit(1)")}, config("python")):
        with watching(triton, "dies", interval=0.1) as watch:
            assert watch.wait(300) == 3
        assert (
            sum("reloading it" in line for line in watch.lines) >= 5
        )  # more where each takes long
        assert watch.said("after 5 reloads in a minute: unloaded, given up")
        assert watch.said("no model is left to watch; given up: dies")
        assert not triton.http.is_model_ready("dies")


def test_a_model_that_does_not_load_again_is_tried_again(triton: Triton, tmp_path: Path) -> None:
    with triton.serving("broken", {1: plain(tmp_path)}, config("python")):
        source = triton.repository / "broken" / "1" / "model.py"
        with watching(triton, "broken", interval=0.1) as watch:
            source.write_text("raise ValueError('not now')\n")
            kill(*triton.server.stub_pids()["broken"])
            wait_until(lambda: watch.said("broken: it did not load"))
            plain(source.parent)
            wait_until_answer(triton, "broken")


def test_what_somebody_has_unloaded_stays_unloaded(triton: Triton, tmp_path: Path) -> None:
    with triton.serving("leaves", {1: plain(tmp_path)}, config("python")):
        with watching(triton, "leaves", interval=0.1) as watch:
            triton.http.unload_model("leaves")
            time.sleep(2)
            assert not triton.http.is_model_ready("leaves")
        assert not watch.said("reloading")


class Front(ThreadingHTTPServer):
    """In front of a server, which hears of no load until `passes` is set.

    Attributes:
        stopped: Set when somebody has asked for one.
        looks: How often somebody has asked what is ready.
        counts: How often somebody has asked what a model has answered; before that, `asks` runs.
        probes: How often somebody has asked a version of a model to answer.
    """

    daemon_threads = True

    def __init__(self, behind: str, asks: Callable[[], object] = lambda: None) -> None:
        super().__init__((HOST, 0), Passing)
        self.behind, self.url, self.asks = behind, f"http://{HOST}:{self.server_port}", asks
        self.passes, self.stopped = threading.Event(), threading.Event()
        self.looks = self.counts = self.probes = 0
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    def __enter__(self) -> Front:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.passes.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


class Passing(BaseHTTPRequestHandler):
    server: Front

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.looks += self.path.endswith("/index")
        self.server.probes += bool(re.search(r"/versions/\w+/infer$", self.path))
        if self.path.endswith("/stats"):
            self.server.asks()
            self.server.counts += 1
        if self.path.endswith("/load") and not self.server.passes.is_set():
            self.server.stopped.set()
            self.server.passes.wait()
            return  # who asked was killed meanwhile, before he asked
        connection = http.client.HTTPConnection(self.server.behind, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers))
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.headers["Content-Type"])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_model_that_answers_its_requests_is_not_probed(triton: Triton, tmp_path: Path) -> None:
    answered = list[bool]()

    def ask() -> None:
        for _ in range(2):  # the first one is counted when the second one is answered
            answered.append(answers(triton.server.http, "busy"))

    with (
        triton.serving("busy", {1: plain(tmp_path)}, config("python")),
        Front(triton.server.http, ask) as front,
    ):
        watch = Watch("--url", front.url, "--interval", "0.1", "--model", "busy")
        try:
            wait_until(lambda: front.counts > 20, 60)
        finally:
            watch.close()
        assert front.probes == 1  # before it knew
    assert all(answered)


def test_what_a_watch_was_reloading_when_it_was_killed_the_next_one_loads(
    triton: Triton, tmp_path: Path
) -> None:
    with (
        triton.serving("cut", {1: identity(tmp_path / "m.onnx")}, config("lrai")),
        Front(triton.server.http) as front,
    ):
        asked = ("--url", front.url, "--interval", "0.1")
        watch = Watch(*asked)
        wait_until(lambda: watch.said("cut is watched"))
        kill(*triton.server.stub_pids()["cut"])
        assert front.stopped.wait(60)
        kill(watch.process.pid)
        watch.wait(60)
        assert not triton.http.is_model_ready("cut")
        front.passes.set()
        watch = Watch(*asked)
        try:
            wait_until(lambda: watch.said("cut: reloaded"), 60)
            assert answers(triton.server.http, "cut")
        finally:
            watch.close()
        triton.http.unload_model("cut")  # by hand
        looks, watch = front.looks, Watch(*asked)
        try:
            wait_until(lambda: front.looks > looks + 5)
        finally:
            watch.close()
        assert not watch.said("cut")


def test_a_server_of_another_mode_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    with TritonServer(tmp_path, **prepared._asdict()) as server:
        said = run("triton", "watch", "--url", f"http://{server.http}", code=5)
    assert "lacks --model-control-mode=explicit" in said


def test_a_server_that_wants_another_key_is_refused_by_what_it_restricts(
    prepared: Prepared, tmp_path: Path
) -> None:
    apis = "model-config,statistics,metadata,inference,model-repository"
    more = ("--model-control-mode=explicit", f"--http-restricted-api={apis}:admin=x")
    with TritonServer(tmp_path, **prepared._asdict(), arguments=more) as server:
        said = run("triton", "watch", "--url", f"http://{server.http}", code=5)
    assert f"restricts {apis.replace(',', ', ')} to who has another key" in said.replace("\n", " ")


def test_the_watch_waits_for_a_server_and_refuses_what_is_no_address() -> None:
    run("triton", "watch", "--url", "localhost:8000", code=2)
    watch = Watch("--url", f"http://{HOST}:9", "--interval", "0.1")
    wait_until(lambda: watch.said(f"no answer from http://{HOST}:9"))
    time.sleep(0.5)
    watch.close()
    assert sum("no answer" in line for line in watch.lines) == 1


@pytest.fixture
def host() -> Iterator[Host]:
    """Yield the shared runtime of a server of the test's own."""
    with Host() as host:
        yield host


def served(
    prepared: Prepared, folder: Path, host: Host, *more: str, options: Sequence[str] = ()
) -> Server:
    """Start `lrai triton serve` on a repository with one model of ours, `ours`."""
    repository = folder / "repository"
    (repository / "ours" / "1").mkdir(parents=True)
    (repository / "ours" / "config.pbtxt").write_text(config("lrai"))
    identity(repository / "ours" / "1" / "model.onnx")
    command = [str(prepared.environment / "bin" / "lrai"), "triton", "serve", *options, "--"]
    command += [f"--model-repository={repository}", "--backend-directory", str(prepared.backends)]
    command += [f"--http-address={HOST}", "--http-port={port}", "--exit-timeout-secs=5"]
    grpc, metrics = free_ports(2)
    command += [
        f"--grpc-port={grpc}",
        f"--metrics-port={metrics}",
        "--allow-gpu-metrics=false",
        *more,
    ]
    needed = variables(prepared.environment)
    _, rest = needed["PATH"].split(os.pathsep, 1)  # it puts its own interpreter there itself
    own = {"PATH": rest, "LRAI_RUNTIME_SOCKET_DIR": str(host.folder), "LRAI_ACTOR_THREADS": "1"}
    return Server(command, folder / "log", variables=needed | own)


def end(server: Server, pid: int, number: int) -> int:
    """Send a signal to a process of the server's; return the exit status of `serve`."""
    tree = server.processes()
    kill(pid, number)
    status = server._process.wait(90)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in tree), 60)
    return status


def test_serve_reloads_a_model_whose_stub_was_killed_and_leaves_nothing(
    prepared: Prepared, tmp_path: Path, host: Host
) -> None:
    with served(prepared, tmp_path, host) as server:
        server.wait_until_ready("/v2/health/ready")
        address = f"{HOST}:{server.port}"
        assert answers(address, "ours")
        assert len(host.daemons()) == 1
        wait_until(lambda: "ours is watched" in server.log.read_text())
        connection = http.client.HTTPConnection(address, timeout=10)
        connection.request("POST", "/v2/repository/models/ours/unload", "{}")
        assert connection.getresponse().status == 403  # who infers may not load code of his own
        connection.close()
        kill(*stubs(server.processes())["ours"])
        wait_until(lambda: answers(address, "ours", 5.0), BACK_SECONDS)
        status = end(server, server._process.pid, signal.SIGTERM)
    # Triton mostly keeps a model whose stub has died until its time to exit is over, and says so.
    assert status == int("Exit timeout expired" in server.log.read_text())
    assert host.daemons() == []


@pytest.mark.parametrize(
    "apis", ["shared-memory", "shared-memory,model-config,model-repository,statistics,trace"]
)
def test_serve_watches_what_is_restricted_and_lets_nobody_load(
    prepared: Prepared, tmp_path: Path, host: Host, apis: str
) -> None:
    (grpc,) = free_ports(1)
    more = (f"--http-restricted-api={apis}:admin=x", f"--grpc-port={grpc}")
    with served(prepared, tmp_path, host, *more) as server:
        server.wait_until_ready("/v2/health/ready")
        address = f"{HOST}:{server.port}"
        wait_until(lambda: "ours is watched" in server.log.read_text())
        for client in (
            triton_http.InferenceServerClient(address),
            triton_grpc.InferenceServerClient(f"{HOST}:{grpc}"),
        ):
            with client, pytest.raises(InferenceServerException, match="restricted"):
                client.unload_model("ours")
        kill(*stubs(server.processes())["ours"])
        wait_until(lambda: answers(address, "ours", 5.0), BACK_SECONDS)
        end(server, server._process.pid, signal.SIGTERM)
    assert "Traceback" not in server.log.read_text()


def test_serve_drains_on_sigterm(prepared: Prepared, tmp_path: Path, host: Host) -> None:
    more = ("--model-control-mode=none", "--exit-timeout-secs=30")
    with served(prepared, tmp_path, host, *more) as server:
        server.wait_until_ready("/v2/health/ready")
        wait_until(lambda: "lacks --model-control-mode=explicit" in server.log.read_text())
        assert answers(f"{HOST}:{server.port}", "ours")
        assert end(server, server._process.pid, signal.SIGTERM) == 0
    assert host.daemons() == []
    assert "Traceback" not in server.log.read_text()


def test_serve_ends_as_the_server_ends_and_leaves_a_runtime_that_ran_before(
    prepared: Prepared, tmp_path: Path, host: Host
) -> None:
    environ = {**os.environ, "LRAI_RUNTIME_SOCKET_DIR": str(host.folder)}
    subprocess.run([*LRAI, "runtime", "start"], env=environ, check=True)
    daemons = host.daemons()
    with served(prepared, tmp_path, host, options=["--no-watch"]) as server:
        server.wait_until_ready("/v2/health/ready")
        assert answers(f"{HOST}:{server.port}", "ours")
        (triton,) = [pid for pid in server.processes() if name_of(pid) == "tritonserver"]
        assert end(server, triton, signal.SIGKILL) == 128 + signal.SIGKILL
    assert host.daemons() == daemons
    assert "watch" not in server.log.read_text()


def name_of(pid: int) -> str:
    with contextlib.suppress(OSError):  # it has just ended
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    return ""


def test_serve_says_what_is_missing(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no tritonserver on PATH" in run("triton", "serve", "--", "--http-port=1", code=5)
    monkeypatch.setenv("PATH", variables(prepared.environment)["PATH"])
    said = run("triton", "serve", "--", f"--backend-directory={tmp_path}", code=5)
    assert f"lrai triton install --backend-directory {tmp_path}" in said.replace("\n", " ")
