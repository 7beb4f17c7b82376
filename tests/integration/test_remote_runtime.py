"""The shared runtime reached from other machines: keys prove who is there, and nothing goes else.

Real daemons and clients over the loopback, with a line between them that can be watched and cut.
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import zmq

import lrai_core as lrai
from benchmarks.processes import free_ports
from lrai_core.wire.messages import PROTOCOL_VERSION, encode
from lrai_shared import client, keys, messages
from lrai_shared.arena import Arena
from lrai_shared.keys import client_end, make_keys
from lrai_shared.starting import is_running, start_daemon
from tests.integration.test_cli import LRAI, run
from tests.integration.test_runtime_faults import kill, pid_of, wait_until
from tests.integration.test_shared_runtime import (
    LARGE,
    daemon_with,
    daemons,
    expected,
    folder,
    mapped,
    output,
    outstanding,
    program,
    request,
    session,
    stop_at_work,
)
from tests.pause import pause

__all__ = ["folder", "session"]  # fixtures
pytestmark = pytest.mark.server

ASK = """
import json, sys
import numpy as np
import lrai_core as lrai
with lrai.Runtime.open(sys.argv[1]) as runtime:  # where, LRAI_RUNTIME says
    features = np.full((1, 64), float(sys.argv[2]), np.float32)
    request = lrai.InferenceRequest(model_name="classifier", inputs={"features": features})
    logits = runtime.infer(request).outputs["logits"].tolist()
    heavy = {"onnxruntime", "onnx", "typer", "lrai_core.compiler"} & set(sys.modules)
    print(json.dumps([logits, runtime.models()[0].actor_pids[0], sorted(heavy)]))
"""
QUEUE = """
import sys, time
import numpy as np
import lrai_core as lrai
runtime = lrai.Runtime()
for _ in range(10):
    features = np.zeros((1, 64), np.float32)
    runtime.submit(lrai.InferenceRequest(model_name="classifier", inputs={"features": features}))
time.sleep(60)
"""


def free_port() -> int:
    return free_ports(1)[0]


def listeners(endpoint: str) -> set[str]:
    """Return the addresses that something listens at on that port, as the kernel shows them."""
    port = int(endpoint.rpartition(":")[2])
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ends = [row[1].split(":") for row in rows if row[3] == "0A"]
    return {address for address, number in ends if int(number, 16) == port}


class Site:
    """A daemon that listens, the keys on its machine, and those on the machines of its clients."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.keys = folder, folder.parent / "keys"
        self.endpoint = f"tcp://127.0.0.1:{free_port()}"
        self.listen = f"{self.endpoint}?keys={self.keys}"
        self._daemons: list[subprocess.Popen[bytes]] = []
        make_keys(self.keys)

    def start(self) -> subprocess.Popen[bytes]:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        daemon = start_daemon(self.folder, lrai.load_config(), stay=self.listen)
        assert daemon is not None
        self._daemons.append(daemon)
        wait_until(lambda: daemon.poll() is not None or listeners(self.endpoint) != set())
        return daemon

    def client(self, name: str, endpoint: str = "") -> str:
        """Return the address for a client, which has got its two files."""
        machine = self.folder.parent / name
        machine.mkdir()
        for file in make_keys(self.keys, name):
            shutil.copy(file, machine)
        return f"{endpoint or self.endpoint}?keys={machine}"

    def close(self) -> None:
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()


@pytest.fixture
def site(
    folder: Path, classifier_fp32: lrai.Artifact, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    monkeypatch.setenv("LRAI_RUNTIME_MODEL_ROOTS", str(classifier_fp32.path.parent))
    made = Site(folder)
    yield made
    made.close()


class Line:
    """A line in the middle that can be watched, be silent, or break for the client alone."""

    def __init__(self, endpoint: str) -> None:
        host, port = endpoint.removeprefix("tcp://").split(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.seen = bytearray()
        self._near: list[socket.socket] = []
        self._far: list[socket.socket] = []
        self._hiding = False
        self._forwarding = threading.Event()
        self._forwarding.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._forwarding.clear()

    def heal(self) -> None:
        self._forwarding.set()

    def break_for_the_client(self) -> None:
        """End its connections; those to the daemon stay, as if a machine in between had gone."""
        self.hide()
        for one in self._near:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def hide(self) -> None:
        """Do not tell one end when the other one is gone."""
        self._hiding = True

    def close(self) -> None:
        self._forwarding.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for one in (self._listener, *self._near, *self._far):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._target)
                except ConnectionRefusedError:
                    near.close()
                    continue
                self._near.append(near)
                self._far.append(far)
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=ends, daemon=True).start()

    def _forward(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                self._forwarding.wait()
                self.seen += data
                other.sendall(data)
        if not self._hiding:
            with suppress(OSError):
                other.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def line(site: Site) -> Iterator[Line]:
    made = Line(site.endpoint)
    yield made
    made.close()


def refused(attempt: Callable[[], object], kind: type[Exception], words: str) -> None:
    """Check that an attempt to get in ends with these words, before it is given up after 20 s."""
    started = time.monotonic()
    with pytest.raises(kind, match=words):
        attempt()
    assert time.monotonic() - started < 15


def test_a_client_with_keys_is_answered_as_one_of_the_same_machine(
    site: Site, line: Line, classifier_fp32: lrai.Artifact
) -> None:
    site.start()
    path = classifier_fp32.path
    with (
        lrai.Runtime.open(path, address=site.client("ann", line.endpoint)) as far,
        lrai.Runtime.open(path, address="auto") as near,
    ):
        for sent in (request(1.5), request(2.5, LARGE), request(inputs={"features": "no"})):
            outcomes = []
            for runtime in (far, near):
                try:
                    outcomes.append(runtime.infer(sent).outputs["logits"].tolist())
                except lrai.InvalidTensor as error:
                    outcomes.append([str(error)])
            assert outcomes[0] == outcomes[1]
        assert far.models() == near.models()
        assert far.ready() == "idle"
        stats = far.stats()
        assert (stats["arena_copied_bytes"], stats["daemon_inline_large"]) == (0, 1)
        backend: Any = far._backend
        assert backend._arena.segment is None
        with pytest.raises(lrai.ConditionNotMet, match=r"runtime\.model_roots"):
            far.load(path.parent.parent)
        assert far.drain()
    assert len(line.seen) > LARGE * 64 * 4
    assert b"CURVE" in line.seen
    for plain in (b"classifier", b"features", b"Attach", bytes(np.full(16, 2.5, np.float32))):
        assert plain not in line.seen
    assert len(daemons(site.folder)) == 1


def test_processes_that_the_environment_sends_to_another_machine_share_its_actor(
    site: Site,
    classifier_fp32: lrai.Artifact,
    session: onnxruntime.InferenceSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site.start()
    clients = []
    for i in range(6):  # some of them have a key in common
        if i % 2 == 0:
            monkeypatch.setenv("LRAI_RUNTIME", site.client(f"machine-{i}"))
        clients.append(program(ASK, classifier_fp32.path, i))
    answers = [json.loads(output(asking)) for asking in clients]
    assert len({actor for _, actor, _ in answers}) == 1
    for i, (logits, _, heavy) in enumerate(answers):
        np.testing.assert_allclose(logits, expected(session, i), atol=1e-4)
        assert not heavy


def test_who_has_no_key_or_a_wrong_one_is_refused_and_not_heard(
    site: Site, classifier_fp32: lrai.Artifact, tmp_path: Path
) -> None:
    daemon = site.start()
    known, stranger = site.client("ann"), Site(tmp_path)
    machine = Path(known.partition("=")[2])
    wrong_server, unknown = tmp_path / "wrong", tmp_path / "unknown"
    shutil.copytree(machine, wrong_server)
    shutil.copy(stranger.keys / "server.key", wrong_server)
    shutil.copytree(machine, unknown)
    for file in unknown.glob("*.key_secret"):
        file.unlink()
    shutil.copy(make_keys(stranger.keys, "eve")[1], unknown)
    with lrai.Runtime.open(classifier_fp32, address="auto") as local:

        def heard() -> list[int]:
            names = ("remote_messages_received", "remote_messages_sent", "dropped_frames")
            return [local.stats()[name] for name in names]

        for address, kind, words in (
            (site.endpoint, lrai.UsageError, r"tcp://HOST:PORT\?keys=FOLDER is needed"),
            (f"{site.endpoint}?keys={tmp_path}", lrai.UsageError, "needs server.key and one"),
            (f"{site.endpoint}?keys={wrong_server}", lrai.EnvironmentProblem, "another key"),
            (f"{site.endpoint}?keys={unknown}", lrai.EnvironmentProblem, "does not know this"),
        ):
            refused(lambda address=address: lrai.Runtime(address=address), kind, words)  # type: ignore[misc]
        with zmq.Context() as context, context.socket(zmq.DEALER) as plain:
            plain.setsockopt(zmq.LINGER, 0)
            plain.connect(site.endpoint)
            for message in (
                messages.Attach(PROTOCOL_VERSION, "0"),
                messages.Call(1, "load", {"artifact": str(classifier_fp32.path), "name": "x"}),
                messages.Call(2, "stop", {}),
            ):
                plain.send_multipart([encode(message), b""])
            assert not plain.poll(1000)
        host, port = site.endpoint.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port)), 20) as raw:
            raw.sendall(b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x01CURVE" + bytes(47))
            started = time.monotonic()
            with suppress(ConnectionResetError, BrokenPipeError):
                raw.sendall(
                    b"\x06" + (1 << 31).to_bytes(8, "big") + bytes(1 << 20)
                )  # a huge command
                while raw.recv(1 << 16):
                    pass
            assert time.monotonic() - started < 10
        assert heard() == [0, 0, 0]
        with lrai.Runtime(address=known) as far:
            assert [model.name for model in far.models()] == ["classifier"]
            assert far.infer(request()).outputs["logits"].shape == (1, 10)
        assert heard() > [0, 0, 0]
    assert daemon.poll() is None
    assert (site.folder / "log").read_text() == ""


def test_keys_that_come_and_go_count_at_once_and_rubbish_beside_them_shuts_nobody_out(
    site: Site,
) -> None:
    site.start()
    clients = site.keys / "clients"
    lrai.Runtime(address=site.client("ann")).close()
    (clients / "rubbish.key").write_bytes(b"\xff\x00")
    (clients / "cut.key").write_text("curve\n    public-key\n")
    (clients / "folder.key").mkdir()
    address = site.client("bob")  # made after the daemon has started
    lrai.Runtime(address=address).close()
    (clients / "bob.key").rename(clients / "bob.gone")
    refused(lambda: lrai.Runtime(address=address), lrai.EnvironmentProblem, "does not know this")


def test_a_daemon_that_is_killed_and_started_by_hand_answers_what_was_open(
    site: Site,
    classifier_fp32: lrai.Artifact,
    session: onnxruntime.InferenceSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(client, "start_daemon", lambda *_, **__: started.append(1))
    daemon = site.start()
    with lrai.Runtime.open(classifier_fp32, address=site.client("ann")) as runtime:
        pause(pid_of(runtime, "classifier"))
        ids = [runtime.submit(request(i, LARGE if i == 3 else 1)) for i in range(5)]
        wait_until(lambda: outstanding(runtime) == 4 + LARGE)
        daemon.kill()
        daemon.wait()
        ids.append(runtime.submit(request(5)))  # while there is none
        time.sleep(1)
        assert not started  # nobody starts one on another machine, nor here in its place
        site.start()
        for i, identity in enumerate(ids):
            logits = runtime.result(identity).outputs["logits"][-1:]
            np.testing.assert_allclose(logits, expected(session, i), atol=1e-4)


def test_a_client_whose_key_was_taken_away_waits_no_longer_than_its_deadlines(
    site: Site, classifier_fp32: lrai.Artifact
) -> None:
    daemon = site.start()
    key = site.keys / "clients" / "ann.key"
    with lrai.Runtime.open(classifier_fp32, address=site.client("ann")) as runtime:
        key.rename(key.with_suffix(".gone"))
        daemon.terminate()
        daemon.wait()
        site.start()
        with pytest.raises(lrai.DeadlineExceeded, match="did not answer in time"):
            runtime.infer(request(timeout_ms=2000))
        key.with_suffix(".gone").rename(key)
        runtime.load(classifier_fp32)
        assert runtime.infer(request()).outputs["logits"].shape == (1, 10)
        key.unlink()
        kill(daemons(site.folder)[0])
        time.sleep(1)
        started = time.monotonic()
    assert time.monotonic() - started < 15  # it waits for no answer, which would be for 20


def test_a_line_that_breaks_for_the_client_alone_costs_no_request(
    site: Site, line: Line, classifier_fp32: lrai.Artifact, session: onnxruntime.InferenceSession
) -> None:
    site.start()
    address = site.client("ann", line.endpoint)
    with (
        lrai.Runtime.open(classifier_fp32, address=address) as far,
        lrai.Runtime(address="auto") as near,
    ):
        actor, _ = stop_at_work(near)
        ids = [far.submit(request(i)) for i in range(5)]
        wait_until(lambda: outstanding(near) == 6)
        line.break_for_the_client()
        ids.append(far.submit(request(5)))
        wait_until(lambda: outstanding(near) == 7)  # nothing is twice, as it would be for 30 s
        kill(actor, signal.SIGCONT)
        for i, identity in enumerate(ids):
            logits = far.result(identity).outputs["logits"]
            np.testing.assert_allclose(logits, expected(session, i), atol=1e-4)
        assert near.stats()["request_answered"] == 7


def test_a_line_on_which_nobody_answers_is_given_up(
    site: Site, line: Line, classifier_fp32: lrai.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_TCP", {zmq.HEARTBEAT_IVL: 100, zmq.HEARTBEAT_TIMEOUT: 1000})
    daemon = site.start()
    address = site.client("ann", line.endpoint)
    with lrai.Runtime.open(classifier_fp32, address=address) as runtime:
        line.hide()
        daemon.kill()
        daemon.wait()
        site.start()
        assert runtime.infer(request(timeout_ms=60_000)).outputs["logits"].shape == (1, 10)


def test_a_client_behind_a_slow_line_is_given_more_time_and_a_killed_one_not_for_ever(
    site: Site,
    line: Line,
    classifier_fp32: lrai.Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = ("daemon._SILENT_SECONDS = 3", "daemon._FAR_SILENT_SECONDS = 8")
    daemon_with(tmp_path, monkeypatch, *changes)
    site.start()
    monkeypatch.setenv("LRAI_RUNTIME", site.client("ann", line.endpoint))
    with lrai.Runtime.open(classifier_fp32, address="auto") as near:
        actor, _ = stop_at_work(near)
        queued = program(QUEUE)
        wait_until(lambda: outstanding(near) == 11)
        line.cut()
        time.sleep(4.5)
        assert outstanding(near) == 11
        line.heal()
        time.sleep(1)
        assert outstanding(near) == 11
        queued.kill()
        queued.communicate()
        wait_until(lambda: outstanding(near) == 1)
        kill(actor, signal.SIGCONT)


def test_numbers_of_memory_that_come_from_another_machine_are_not_looked_at(site: Site) -> None:
    daemon = site.start()
    endpoint, options = client_end(site.client("ann"))
    arena = Arena(1 << 20)
    with zmq.Context() as context, context.socket(zmq.DEALER) as far:
        for option, value in options.items():
            far.setsockopt(option, value)
        far.connect(endpoint)
        for _ in range(2):  # as a session begins, none is looked at anyway
            far.send_multipart([encode(messages.Attach(PROTOCOL_VERSION, "0", arena.segment)), b""])
            assert far.poll(60_000)
            welcome = messages.decode_to_client(far.recv_multipart()[0])
            assert isinstance(welcome, messages.Attached)
            assert (bool(welcome.session), welcome.arena) == (True, b"")
        assert mapped(daemon.pid) == 0
        form = messages.Form("m", "", (), {}, ("x",), ("FP32",), ((64,),))
        infer = messages.Infer(1, messages.encode_form(form), None, ((-1, 0, 256),))
        far.send_multipart([encode(messages.Requests((infer,))), b""])
        with lrai.Runtime(address="auto") as near:
            wait_until(lambda: near.stats()["dropped_frames"] == 1)
    arena.close()


def test_a_daemon_that_listens_stays_though_nobody_is_there(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("daemon._FAR_SILENT_SECONDS = 1.2", "daemon._IDLE_SECONDS = 0.2")
    daemon_with(tmp_path, monkeypatch, *changes)
    daemon = site.start()
    lrai.Runtime(address=site.client("ann")).close()
    time.sleep(2.5)
    assert daemon.poll() is None


def test_nothing_listens_without_keys_and_folders_to_load_from(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = ("runtime", "start", "--listen", site.endpoint)
    assert "?keys=FOLDER is needed" in run(*start, code=2)
    assert "--keys goes with --listen" in run("runtime", "start", "--keys", site.keys, code=2)
    assert "server.key_secret has to hold" in run(*start, "--keys", site.folder.parent, code=5)
    (site.keys / "server.key_secret").chmod(0o640)
    assert "others may not read it" in run(*start, "--keys", site.keys, code=5)
    (site.keys / "server.key_secret").chmod(0o600)
    site.keys.chmod(0o720)
    assert "only its owner" in run(*start, "--keys", site.keys, code=5)
    site.keys.chmod(0o700)
    monkeypatch.delenv("LRAI_RUNTIME_MODEL_ROOTS")
    told = "runtime.model_roots is ''; to listen, set it to the folders"
    assert told in run(*start, "--keys", site.keys, code=2)
    daemon = site.start()  # however it is started
    assert daemon.wait(60) != 0
    assert told in (site.folder / "log").read_text()
    assert not is_running(site.folder)


def test_the_command_line_makes_keys_and_listens_on_the_loopback_unless_told(
    site: Site, classifier_fp32: lrai.Artifact
) -> None:
    for command, words in (("start", ("--listen", "--keys")), ("keys", ("--client", "{folder}"))):
        said = run("runtime", command, "--help", code=0)
        assert all(word in said for word in words)
    assert "keys" in run("runtime", "--help", code=0)
    port = site.endpoint.rpartition(":")[2]
    listen = ("--listen", f"tcp://:{port}", "--keys", site.keys)
    assert "was started" in run("runtime", "start", *listen, code=0)
    assert "runs already" in run("runtime", "start", *listen, code=0)
    assert "runs already" in run("runtime", "start", code=0)
    assert listeners(site.endpoint) == {"0100007F"}
    elsewhere = ("--listen", f"tcp://:{free_port()}", "--keys", site.keys)
    assert "stop it first" in run("runtime", "start", *elsewhere, code=2)
    taken = ("--listen", f"tcp://:{port}", "--keys", site.keys)
    other = ("--address", site.folder.parent / "other")
    assert "Address already in use" in run("runtime", "start", *other, *taken, code=5)

    said = run("runtime", "keys", site.keys, "--client", "ann", code=0)
    machine = site.folder.parent / "ann"
    machine.mkdir()
    for file in said.splitlines()[-2:]:
        shutil.copy(file, machine)
    there = ("--address", f"{site.endpoint}?keys={machine}")
    assert "m is loaded" in run(
        "runtime", "load", classifier_fp32.path, "--name", "m", *there, code=0
    )
    shown = run("runtime", "status", *there, code=0)
    assert "remote_messages_received" in shown
    assert "m" in shown
    for command in ("start", "stop"):
        assert "on its own machine" in run("runtime", command, *there, code=2)
    run("runtime", "drain", *there, code=0)
    assert subprocess.run([LRAI, "runtime", "stop"], check=False).returncode == 0
    assert listeners(site.endpoint) == set()
    assert not is_running(site.folder)
