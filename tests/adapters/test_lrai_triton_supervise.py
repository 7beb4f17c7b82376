"""The probe that `lrai triton watch` sends, and what `serve` reads from the server's arguments."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer

import lrai_core as lrai
from lrai_triton.commands import serve, watch
from lrai_triton.commands.app import PROGRAM
from tests.core import small_artifact
from tests.own_runtime import daemon_pids, own_runtime


def tensor(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}


def test_a_probe_is_zeros_of_the_smallest_shape() -> None:
    inputs = [tensor("ids", "INT64", [-1, -1]), tensor("image", "FP16", [-1, 3, 2])]
    body, headers = watch._zeros(inputs)
    text = int(headers["Inference-Header-Content-Length"])
    sent = json.loads(body[:text])["inputs"]
    assert [given["shape"] for given in sent] == [[1, 1], [1, 3, 2]]
    assert [given["parameters"]["binary_data_size"] for given in sent] == [8, 12]
    assert body[text:] == bytes(20)


@pytest.mark.parametrize(
    ("datatype", "size"), [("BOOL", 1), ("UINT8", 1), ("BF16", 2), ("FP64", 8), ("BYTES", 4)]
)
def test_a_zero_has_the_size_of_its_datatype(datatype: str, size: int) -> None:
    body, headers = watch._zeros([tensor("x", datatype, [3])])
    assert len(body) - int(headers["Inference-Header-Content-Length"]) == 3 * size


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--http-port=81"], "81"),
        (["--http-port", "81"], "81"),
        (["--http-port=80", "--http-port", "81"], "81"),
        (["--http-port-of-another=81"], "80"),
        (["--id=--http-port=81"], "80"),
        ([], "80"),
    ],
)
def test_options_of_the_server_are_read_in_both_forms(arguments: list[str], value: str) -> None:
    assert serve._given(arguments, "http-port", "80")[-1] == value


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def planted(folder: Path, script: str) -> tuple[str, str]:
    """Return a PATH with a tritonserver that is this script, and the option for its backends."""
    backend = folder / "backends" / "lrai"
    backend.mkdir(parents=True, exist_ok=True)
    (backend / "model.py").touch()
    server = program(folder / "bin" / "tritonserver", script)
    path = f"{server.parent}{os.pathsep}{os.environ['PATH']}"
    return path, f"--backend-directory={backend.parent}"


def started(folder: Path, *arguments: str, watched: bool = True, status: int = 7) -> list[str]:
    """Return what `serve` starts a server with; that is one which ends at once, with `status`."""
    path, backends = planted(folder, f"printf '%s\\n' \"$@\" > {folder}/given\nexit {status}")
    with own_runtime(PATH=path) as sockets:
        given = [backends, *arguments]
        with pytest.raises(typer.Exit) as ended:
            serve.serve(given, watched=watched)
        assert ended.value.exit_code == status
        assert daemon_pids(sockets) == [], "the runtime that it started ends with it"
    return (folder / "given").read_text().splitlines()[1:]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_REPOSITORY_KEY", "k")  # else it stays behind


@pytest.mark.timeout(180)
def test_all_models_are_loaded_where_none_is_named(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert started(tmp_path)[:2] == ["--model-control-mode=explicit", "--load-model=*"]
    assert signal.getsignal(signal.SIGTERM) == before, "the process is as it was"


@pytest.mark.timeout(180)
def test_where_some_are_named_these_are_loaded(tmp_path: Path) -> None:
    given = started(tmp_path, "--load-model=m")
    assert given[:2] == ["--load-model=m", "--model-control-mode=explicit"]
    assert "--load-model=*" not in given


@pytest.mark.timeout(180)
def test_loading_is_restricted_whatever_the_repository_is_called(tmp_path: Path) -> None:
    given = started(tmp_path, "--model-repository=/srv/non-restricted-models")
    assert "--http-restricted-api=model-repository:lrai-key=k" in given
    assert "--grpc-restricted-protocol=model-repository:lrai-key=k" in given


HTTP, GRPC = "--http-restricted-api", "--grpc-restricted-protocol"
LOADING = "model-repository"


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("given", "added"),
    [
        (
            [f"{HTTP}=shared-memory:admin=x"],
            [f"{HTTP}={LOADING}:lrai-key=k", f"{GRPC}={LOADING}:lrai-key=k"],
        ),
        ([f"{HTTP}=trace,{LOADING}:admin=x"], [f"{GRPC}={LOADING}:admin=x"]),
        ([GRPC, f"{LOADING}:admin=x", f"{GRPC}=trace:a=b"], [f"{HTTP}={LOADING}:admin=x"]),
        ([f"{HTTP}={LOADING}:admin=x", f"{GRPC}={LOADING}:other=y"], []),
        # Names of gRPC's metadata are in lower case.
        ([f"{HTTP}={LOADING}:X-Admin=Y"], [f"{GRPC}={LOADING}:x-admin=Y"]),
    ],
)
def test_loading_is_restricted_by_every_protocol_whatever_else_is(
    tmp_path: Path, given: list[str], added: list[str]
) -> None:
    told = started(tmp_path, *given)
    assert [one for one in told if "-restricted-" in one and one not in given] == added


def test_a_key_is_without_the_end_of_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a secret has it that was made of a line: nobody could send a header with that."""
    monkeypatch.setenv("TRITON_REPOSITORY_KEY", "k\n")
    assert f"{HTTP}={LOADING}:lrai-key=k" in started(tmp_path)
    assert watch.told_key() == "lrai-key=k"


@pytest.mark.parametrize(
    ("mode", "option"),
    [("PREDICTION", ""), ("", "--allow-vertex-ai=true"), ("", "--allow-sagemaker=true")],
)
def test_a_port_that_would_load_models_without_a_key_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, option: str
) -> None:
    path, backends = planted(tmp_path, "exit 7")
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("AIP_MODE", mode)
    with pytest.raises(lrai.UsageError, match=r"Vertex AI or SageMaker would .* without a key"):
        serve.serve([backends, option], watched=True)


def test_the_watch_has_the_key_that_the_server_demands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = f"until test -s {tmp_path}/key; do sleep 0.02; done\nexit 7"
    watch = f"echo $TRITON_REPOSITORY_KEY > {tmp_path}/key\nexec sleep 60"
    given = ("--model-control-mode=explicit", f"{HTTP}=statistics,{LOADING}:admin=x=y")
    assert ended(tmp_path, monkeypatch, server, watch, *given) == 7
    assert (tmp_path / "key").read_text() == "admin=x=y\n"


def test_a_stub_of_a_repository_in_a_cloud_is_known_by_its_instance(tmp_path: Path) -> None:
    model = tmp_path / "folderAb" / "1" / "model.py"
    model.parent.mkdir(parents=True)
    model.touch()
    argv = ["/python_backend_stub", str(model), "region", "1", "2", "3", "b", "lone_0_1", "r", "-f"]
    program, quiet = shutil.which("tail"), subprocess.DEVNULL  # which waits
    with subprocess.Popen(argv, executable=program, stdout=quiet, stderr=quiet) as stub:
        try:
            while not Path(f"/proc/{stub.pid}/cmdline").read_bytes():  # it is not quite there yet
                time.sleep(0.005)
            assert watch._stubs("lone") == {"1": [stub.pid]}
            assert watch._stubs("lone_0") == {}
        finally:
            stub.kill()


@pytest.mark.timeout(180)
def test_a_server_that_the_watch_could_not_ask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lrai.UsageError, match="--no-watch"):
        started(tmp_path, "--allow-http=false")
    assert started(tmp_path, "--allow-http=false", watched=False) == ["--allow-http=false"]


# What `serve` does while, and before, it runs both


def ended(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: str,
    watch: str = "exec sleep 60",
    *arguments: str,
) -> int:
    """Return the exit status of `serve` with these scripts as tritonserver and as the watch."""
    monkeypatch.setattr(serve, "_RESTART_SECONDS", 0.01)
    stand_in = program(folder / "lrai", f'test "$2" != watch && exit 0\n{watch}')
    monkeypatch.setattr(serve, "PROGRAM", (str(stand_in),))
    path, backends = planted(folder, server)
    monkeypatch.setenv("PATH", path)
    with pytest.raises(typer.Exit) as caught:
        serve.serve([backends, *arguments])
    return caught.value.exit_code


WAITS = "while :; do sleep 0.02; done"


def test_where_the_watch_has_given_all_up_the_server_ends_and_the_status_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = f"trap 'touch {tmp_path}/told; exit 0' TERM\ntouch {tmp_path}/up\n{WAITS}"
    watch = f"while ! test -e {tmp_path}/up; do sleep 0.02; done; exit 3"
    assert ended(tmp_path, monkeypatch, server, watch=watch) == 3
    assert (tmp_path / "told").exists()


def test_a_watch_that_has_ended_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    server = f"until test $(wc -l < {runs}) -ge 2; do sleep 0.02; done\nexit 7"
    runs.touch()
    once = f"echo >> {runs}\ntest $(wc -l < {runs}) -ge 2 || exit 1\nexec sleep 60"
    assert ended(tmp_path, monkeypatch, server, watch=once) == 7
    said = capfd.readouterr().out
    assert said.count("the watch has ended with status 1: it is started again") == 1


def test_a_server_outlives_a_watch_that_cannot_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where no process may be added: it is tried again."""
    runs, tries = tmp_path / "runs", list[int]()
    server = f"until test $(wc -l < {runs}) -ge 2; do sleep 0.02; done\nexit 7"
    runs.touch()

    class Refusing(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], **how: Any) -> None:
            if "watch" in command:
                tries.append(len(tries))
                if tries[-1] in (1, 2):
                    raise BlockingIOError("Resource temporarily unavailable")
            super().__init__(command, **how)

    monkeypatch.setattr("lrai_triton.commands.serve.subprocess.Popen", Refusing)
    once = f"echo >> {runs}\ntest $(wc -l < {runs}) -ge 2 || exit 1\nexec sleep 60"
    assert ended(tmp_path, monkeypatch, server, watch=once) == 7
    assert len(tries) == 4


@pytest.mark.parametrize(("sent", "heard"), [("HUP", "TERM"), ("TERM", "TERM"), ("INT", "INT")])
def test_what_would_end_a_program_ends_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: str, heard: str
) -> None:
    server = f"trap 'exit 4' {heard}\nkill -{sent} $PPID\n{WAITS}"
    number = signal.Signals[f"SIG{sent}"]
    before = signal.signal(number, signal.SIG_DFL)  # nohup, which this may run under, ignores one
    try:
        assert ended(tmp_path, monkeypatch, server) == 4
    finally:
        signal.signal(number, before)


@pytest.mark.timeout(180)
def test_a_signal_before_there_is_a_server_leaves_nothing(tmp_path: Path) -> None:
    path, backends = planted(tmp_path, f"touch {tmp_path}/given\nexit 0")
    with own_runtime(PATH=path) as sockets:
        served = serve_until(lambda pid: runs_below(pid, "runtime\0start"), backends)
        assert served == 128 + signal.SIGTERM
        assert daemon_pids(sockets) == []
    assert not (tmp_path / "given").exists()


# As of an actor that is started while `held` is there, and whose runtime lives.
LATE = (
    'while test -e {held}; do test -d /proc/$PPID || exit 1; sleep 0.02; done\nexec {python} "$@"'
)


@pytest.mark.timeout(180)
def test_a_signal_is_heard_while_the_runtime_restores_its_models(tmp_path: Path) -> None:
    held = tmp_path / "held"
    python = program(tmp_path / "python", LATE.format(held=held, python=sys.executable))
    path, backends = planted(tmp_path, f"touch {tmp_path}/given\nexit 0")
    model = small_artifact.build(tmp_path / "m.lrai")
    late = {"LRAI_ACTOR_PYTHON": str(python), "LRAI_ACTOR_START_TIMEOUT_SECONDS": "600"}
    with own_runtime(PATH=path, **late) as sockets:
        for arguments in (["start"], ["load", str(model)]):
            subprocess.run([*PROGRAM, "runtime", *arguments], check=True)
        held.touch()
        (killed,) = daemon_pids(sockets)
        os.kill(killed, signal.SIGKILL)

        def restores(_: int) -> bool:
            return any(runs_below(pid, str(python)) for pid in daemon_pids(sockets))

        try:
            assert serve_until(restores, backends) == 128 + signal.SIGTERM
        finally:
            held.unlink()
        assert daemon_pids(sockets) == []
    assert not (tmp_path / "given").exists()


def test_a_runtime_that_is_still_not_there_when_its_start_gives_up_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, seen, known = tmp_path / "begun", tmp_path / "seen", watch.parent_of
    looks = list[int]()

    def parent(pid: int) -> int:
        found = known(pid)
        if begun.exists() and begun.read_text() == f"{pid}\n":
            looks.append(pid)
            if len(looks) == 2:  # the first one is over, and has seen it
                seen.touch()
        return found

    monkeypatch.setattr(serve, "parent_of", parent)
    begins = f"({WAITS}) >/dev/null &\necho $! > {begun}"
    # It outlives the look that sees what it has begun.
    waits = f"for _ in $(seq 3000); do test -e {seen} && break; sleep 0.02; done"
    stand_in = program(tmp_path / "lrai", f"{begins}\n{waits}\nexit 5")
    monkeypatch.setattr(serve, "PROGRAM", (str(stand_in),))
    path, backends = planted(tmp_path, f"touch {tmp_path}/given\nexit 0")
    monkeypatch.setenv("PATH", path)
    try:
        with pytest.raises(lrai.EnvironmentProblem, match="cannot be started, see above"):
            serve.serve([backends])
        assert known(int(begun.read_text())) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(begun.read_text()), signal.SIGKILL)
    assert not (tmp_path / "given").exists()


@pytest.mark.timeout(180)
def test_a_runtime_that_ran_before_stays_though_it_serves_no_more(tmp_path: Path) -> None:
    path, backends = planted(tmp_path, "exit 0")
    with own_runtime(PATH=path) as sockets:
        for command in ("start", "drain"):
            subprocess.run([*PROGRAM, "runtime", command], check=True)
        (before,) = daemon_pids(sockets)
        with pytest.raises(lrai.EnvironmentProblem, match="cannot be started, see above"):
            serve.serve([backends])
        assert daemon_pids(sockets) == [before]


def test_where_a_second_signal_comes_nothing_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime that was begun does not end: it may be at a folder that hangs."""
    begun, up = tmp_path / "begun", tmp_path / "up"
    deaf = f"trap 'kill -INT {os.getpid()}' TERM; touch {up}; {WAITS}"
    script = f"({deaf}) >/dev/null &\necho $! > {begun}\nwhile ! test -e {up}; do sleep 0.02; done"
    stand_in = program(tmp_path / "lrai", f"{script}\nkill -TERM $PPID\nwait")
    monkeypatch.setattr(serve, "PROGRAM", (str(stand_in),))
    path, backends = planted(tmp_path, "exit 0")
    monkeypatch.setenv("PATH", path)
    try:
        with pytest.raises(typer.Exit) as caught:
            serve.serve([backends])
    finally:
        os.kill(int(begun.read_text()), signal.SIGKILL)
    assert caught.value.exit_code == 128 + signal.SIGTERM


def serve_until(seen: Callable[[int], bool], backends: str) -> int:
    """Return how `serve` ends that is told to when this is so of its process."""
    with subprocess.Popen([*PROGRAM, "triton", "serve", "--", backends]) as serve:
        try:
            while not seen(serve.pid):
                assert serve.poll() is None
                time.sleep(0.005)
            serve.terminate()
            return serve.wait(90)
        finally:
            serve.kill()


def runs_below(parent: int, words: str) -> bool:
    """Return whether a child of a process has these words in its command."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            mine = watch.parent_of(int(process.parent.name)) == parent
            if mine and words in process.read_text(errors="replace"):
                return True
    return False


# Two watches of one server


class Dying(ThreadingHTTPServer):
    """As a server whose model m has no healthy stub until it is loaded the second time.

    Attributes:
        loads: How often that was asked for; the first one does not end.
        looks: How often, at least, watches have asked which models there are.
        begun: Set when the first load is asked for.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.url, self.loads, self.loaded = f"http://127.0.0.1:{self.server_port}", 0, True
        self.looks = 0
        self.begun, self.over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    def __enter__(self) -> Dying:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def load(self) -> None:
        self.loads += 1
        self.begun.set()
        if self.loads == 1:
            self.over.wait()
        self.loaded = True


class Answering(BaseHTTPRequestHandler):
    server: Dying

    def do_POST(self) -> None:
        its, body = self.server, self.rfile.read(int(self.headers["Content-Length"] or 0))
        path = self.path.removeprefix("/v2/")
        if path == "repository/models/m/load":
            its.load()
        its.looks += path == "repository/index"
        its.loaded = its.loaded and path != "repository/models/m/unload"
        listed, never = its.loaded or b"true" not in body, {"count": 0, "ns": 0}
        stats = {"version": "1", "inference_stats": {"success": never, "fail": never}}
        said = {
            "repository/index": [{"name": "m", "state": "READY"}] * listed,
            "models/m/config": {"backend": "lrai"},
            "models/m/stats": {"model_stats": [stats] * its.loaded},
            "models/m/versions/1/infer": {"error": "Stub process"} if its.loads < 2 else {},
        }
        with contextlib.suppress(OSError):  # who has asked was killed
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(said.get(path, {})).encode())

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def watching(url: str, *more: str) -> Iterator[tuple[subprocess.Popen[str], Iterator[str]]]:
    """Yield a watch, and what it says of m."""
    command = [*PROGRAM, "triton", "watch", "--url", url, "--interval", "0.05", *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
        words = (line.partition(" ")[2].rstrip("\n") for line in watch.stdout or ())
        try:
            yield watch, (said for said in words if said.startswith(("m ", "m:")))
        finally:
            watch.kill()


def test_what_one_watch_reloads_another_leaves_alone_until_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRAI_RUNTIME_STATE_DIR", str(tmp_path))
    with Dying() as server, watching(server.url) as (first, its):
        assert next(its) == "m is watched"
        assert next(its) == "m: its stub is not healthy; reloading it"
        server.begun.wait()
        with watching(server.url) as (_, said):
            assert next(said) == f"m is left to another watch of {server.url} until that ends"
            seen = server.looks
            while server.looks < seen + 20:
                time.sleep(0.01)
            assert server.loads == 1, "that of the first"
            first.kill()
            assert next(said) == "m is watched"
            assert next(said) == "m: a watch was killed while it reloaded it; reloading it"
            assert next(said).startswith("m: reloaded in")
    assert server.loads == 2


def test_what_somebody_unloads_is_no_longer_watched_until_it_is_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRAI_RUNTIME_STATE_DIR", str(tmp_path))
    with Dying() as server:
        server.loads = 2  # it has a stub that is healthy
        model = watch._Model(server.url, "m", 0.01, 30.0, tmp_path)
        server.loaded = False
        model.join(60)  # and with it the descriptor of its mark
        assert not model.is_alive()
        server.loaded = True
        for named in ((), ("--model", "m")):
            with watching(server.url, *named) as (process, its):
                assert next(its) == "m is watched"
                server.loaded, seen = False, server.looks
                while server.looks < seen + 20:
                    time.sleep(0.01)
                assert process.poll() is None
                server.loaded = True
                assert next(its) == "m is watched"
    assert server.loads == 2


# A server whose models have signs in their names


class Literal(BaseHTTPRequestHandler):
    """As Triton, which takes a model's name as it stands in the path."""

    name = "a!#$%&'()*;<>[\\]^`{|}b+b,c=d:e@f~g"

    def do_POST(self) -> None:
        listed, config = [{"name": self.name, "state": "READY"}], {"backend": "lrai"}
        said = {"repository/index": listed, f"models/{self.name}/config": config}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(said.get(self.path.removeprefix("/v2/"), {})).encode())

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_model_with_signs_in_its_name_is_found() -> None:
    with serving(Literal) as url:
        assert watch._models(url, ()) == [Literal.name]


# A server that is asked with the wrong key


class Restricting(BaseHTTPRequestHandler):
    """As of a Triton that has one of its APIs for those alone who send `admin: x`."""

    api = ""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        apis = {"stats": "statistics", "config": "model-config", "infer": "inference"}
        own = "model-repository" if "/repository/" in self.path else "metadata"
        mine = apis.get(self.path.rpartition("/")[2], own) == self.api
        self.send_response(403 if mine and self.headers["admin"] != "x" else 400)
        self.end_headers()
        self.wfile.write(b"{}")

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def restricting(api: str) -> Iterator[str]:
    """Yield the address of such a server."""
    with serving(type("Handler", (Restricting,), {"api": api})) as url:
        yield url


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Yield the address of a server with this handler."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    "api", ["model-repository", "model-config", "statistics", "metadata", "inference"]
)
def test_a_server_that_wants_another_key_is_said_and_for_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    monkeypatch.setenv("LRAI_RUNTIME_STATE_DIR", str(tmp_path))
    words = f"restricts {api} to who has another key: set TRITON_REPOSITORY_KEY to HEADER=VALUE"
    with restricting(api) as url, pytest.raises(lrai.EnvironmentProblem, match=words):
        watch.watch(url, interval=0.01)


def test_the_name_of_a_header_goes_before_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_REPOSITORY_KEY", "admin=x")
    with restricting("model-repository") as url:
        assert watch._ask(url, "/repository/index", b"{}")[0] == 400
    assert watch.named_key("a-b=c=d") == "a-b=c=d"
    for value in ("plain", "Zm9v=", "Zm8==", ""):  # base64 ends like this
        assert watch.named_key(value) == f"lrai-key={value}"
