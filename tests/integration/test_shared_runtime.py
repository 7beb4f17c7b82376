"""The runtime that processes share: real daemons, real clients, real signals."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import zmq

import lrai_core as lrai
from lrai_core.wire.messages import PROTOCOL_VERSION, Segment, encode
from lrai_deployments.deployments import Deployments
from lrai_shared import messages
from lrai_shared.arena import Arena
from lrai_shared.daemon import Daemon, _touch
from lrai_shared.starting import is_running, start_daemon
from tests.core import small_artifact
from tests.integration.test_cli import LRAI, in_small_filesystem, run
from tests.integration.test_runtime_faults import Load, alive, kill, pid_of, wait_until
from tests.integration.test_serving import BARE
from tests.pause import pause

pytestmark = pytest.mark.server

PYTHON = sys.executable  # also where tests have another one start daemons
START = """
import json, sys, time
import numpy as np
import lrai_core as lrai
def request(value=0.0, rows=1):
    features = np.full((rows, 64), value, np.float32)
    return lrai.InferenceRequest(model_name="classifier", inputs={"features": features})
runtime = lrai.Runtime.open(sys.argv[1], address="auto")
"""
ASK = f"""{START}
answer = runtime.infer(request(float(sys.argv[2])))
pid = runtime.models()[0].actor_pids[0]
logits = answer.outputs["logits"].tolist()
print(json.dumps({{"logits": logits, "actor": pid, "modules": sorted(sys.modules)}}))
"""
SUBMIT = f"""{START}
count, rows = map(int, sys.argv[2:])
ids = [runtime.submit(request(i, rows)) for i in range(count)]
print(json.dumps([runtime.result(i).outputs["logits"][-1:].tolist() for i in ids]))
"""
FORK = f"""{START}
import os, warnings
warnings.simplefilter("ignore")
child = os.fork()
if not child:
    for action in (lambda: runtime.infer(request()), runtime.models):
        try:
            action()
            os._exit(1)
        except lrai.NotReady as error:
            print(error, flush=True)
    runtime.close()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert runtime.infer(request()).outputs["logits"].shape == (1, 10)
"""


@pytest.fixture
def folder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Return the folder of the daemon; whatever runs there afterwards is killed."""
    parent = tmp_path_factory.mktemp("s")  # short: the path of a socket has 107 characters
    monkeypatch.setenv("LRAI_RUNTIME_SOCKET_DIR", str(parent))
    monkeypatch.setenv("LRAI_ACTOR_THREADS", "1")
    monkeypatch.setenv("LRAI_ACTOR_HANG_SECONDS", "60")  # actors are stopped here to fill queues
    folder = parent / f"lrai-{os.geteuid()}"
    yield folder
    for pid in processes(f"{parent}/"):
        with contextlib.suppress(ProcessLookupError):  # an actor ends with its daemon
            kill(pid)
    wait_until(lambda: not processes(f"{parent}/"))


def daemons(folder: Path) -> list[int]:
    """Return the daemons of the folder."""
    return processes(f"\0{folder}\0")


def processes(words: str) -> list[int]:
    """Return the processes whose command line holds these words."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if words.encode() in command:
            found.append(int(process.name))
    return found


def daemon_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *changes: str, before: str = ""
) -> None:
    """Have this process start daemons that run `changes` first."""
    script, python = tmp_path / "daemon.py", tmp_path / "python"
    imports = "import sys\nfrom lrai_core.runtime import embedded\nfrom lrai_shared import daemon\n"
    script.write_text("\n".join([imports, *changes, "daemon.main(sys.argv[1:])\n"]))
    python.write_text(f'#!/bin/sh\nshift 3\n{before}\nexec {sys.executable} -P {script} "$@"\n')
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))


def impatient(once: Path) -> tuple[str, ...]:
    """Return what has a daemon end soon after its last client, from when this file is there.

    Before that a client whom a busy machine keeps from showing life would be taken for gone.
    """
    return (
        "import pathlib, threading, time",
        "def watch():",
        f"    while not pathlib.Path({str(once)!r}).exists():",
        "        time.sleep(0.05)",
        "    daemon._SILENT_SECONDS, daemon._IDLE_SECONDS = 0.5, 0.3",
        "threading.Thread(target=watch, daemon=True).start()",
    )


def program(source: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [PYTHON, "-P", "-c", source, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def output(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


def request(value: float = 0.0, rows: int = 1, **more: Any) -> lrai.InferenceRequest:
    features = np.full((rows, 64), value, np.float32)
    given: dict[str, Any] = {"model_name": "classifier", "inputs": {"features": features}}
    return lrai.InferenceRequest(**(given | more))


def stop_at_work(runtime: lrai.Runtime) -> tuple[int, str]:
    """Return the actor, stopped, and the request that it has begun: what comes now has to wait."""
    actor, before = pid_of(runtime, "classifier"), runtime.stats().get("batch_dispatched", 0)
    pause(actor)
    identity = runtime.submit(request())
    wait_until(lambda: runtime.stats().get("batch_dispatched", 0) > before)
    return actor, identity


def outstanding(runtime: lrai.Runtime) -> int:
    return runtime.stats()["outstanding_rows"]


@pytest.fixture(scope="module")
def certified(
    classifier_rows: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> lrai.Artifact:
    out = tmp_path_factory.mktemp("artifacts") / "certified.lrai"
    model, rows = classifier_rows
    return lrai.compile(model, out=out, evaluation=rows, output_map="softmax", keep=1, threads=1)


@pytest.fixture(scope="module")
def session(classifier_rows: tuple[Path, dict[str, Any]]) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(classifier_rows[0])


def expected(session: onnxruntime.InferenceSession, value: float) -> Any:
    return session.run(["logits"], {"features": np.full((1, 64), value, np.float32)})[0]


def test_eight_processes_that_race_share_one_daemon_and_one_actor(
    folder: Path, classifier_fp32: lrai.Artifact, session: onnxruntime.InferenceSession
) -> None:
    clients = [program(ASK, classifier_fp32.path, i) for i in range(8)]
    answers = [json.loads(output(client)) for client in clients]
    assert len(daemons(folder)) == 1
    assert len({answer["actor"] for answer in answers}) == 1
    for i, answer in enumerate(answers):
        np.testing.assert_allclose(answer["logits"], expected(session, i), atol=1e-4)
        heavy = {"onnxruntime", "onnx", "typer", "lrai_core.compiler", "lrai_import"}
        assert not heavy & set(answer["modules"])
    with lrai.Runtime(address="auto") as runtime:
        stats = runtime.stats()
    assert (stats["actor_started"], stats["request_answered"]) == (1, 8)


def test_requests_of_different_processes_share_a_call(
    folder: Path, classifier_fp32: lrai.Artifact, session: onnxruntime.InferenceSession
) -> None:
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        actor = pid_of(runtime, "classifier")
        pause(actor)
        ids = [runtime.submit(request(i)) for i in range(3)]
        other = program(SUBMIT, classifier_fp32.path, 3, 1)
        wait_until(lambda: outstanding(runtime) == 6)
        kill(actor, signal.SIGCONT)
        theirs = json.loads(output(other))
        mine = [runtime.result(i).outputs["logits"] for i in ids]
        assert runtime.stats()["batch_dispatched"] <= 3
    for i in range(3):
        np.testing.assert_allclose(mine[i], expected(session, i), atol=1e-4)
        np.testing.assert_allclose(theirs[i], expected(session, i), atol=1e-4)


def test_killed_daemons_cost_no_request(
    folder: Path, classifier_fp32: lrai.Artifact, session: onnxruntime.InferenceSession
) -> None:
    payloads = [{"features": np.full((1, 64), i, np.float32)} for i in range(20)]
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        load = Load(runtime, "classifier", payloads, callers=8)
        for _ in range(2):
            time.sleep(0.5)
            (daemon,) = daemons(folder)
            actor = pid_of(runtime, "classifier")
            kill(daemon)
            before = len(load.ledger.answered)
            wait_until(lambda before=before: len(load.ledger.answered) > before + 50)  # type: ignore[misc]
            assert pid_of(runtime, "classifier") != actor
        ledger = load.stop()
        assert len(daemons(folder)) == 1
    assert not ledger.refused
    assert ledger.sent == len(ledger.answered)
    for index, outputs in ledger.answered[::7]:
        np.testing.assert_allclose(outputs["logits"], expected(session, index), atol=1e-4)
    assert [path.name for path in folder.parent.glob("lrai-*/actors")] == ["actors"]  # of the last


def test_a_scheduler_that_fails_costs_no_request(
    folder: Path, classifier_fp32: lrai.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug = f"""
import pathlib
own = daemon.Door.dispatch
def dispatch(self, *arguments):
    failed = pathlib.Path({str(tmp_path / "failed")!r})
    if not failed.exists():
        failed.touch()
        raise RuntimeError
    own(self, *arguments)
daemon.Door.dispatch = dispatch
"""
    daemon_with(tmp_path, monkeypatch, bug)
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        (first,) = daemons(folder)
        assert runtime.infer(request(1.0)).outputs["logits"].shape == (1, 10)
        assert daemons(folder) != [first]
        assert (tmp_path / "failed").exists()
        assert runtime.stats()["daemon_resent"] == 1


def test_a_request_that_ends_runtimes_is_not_sent_to_a_fourth(
    folder: Path, classifier_fp32: lrai.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon_with(tmp_path, monkeypatch, "daemon.Door._start = lambda *_: daemon.os._exit(9)")
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        with pytest.raises(lrai.NotReady, match="3 runtimes ended while it ran"):
            runtime.infer(request(1.0))
        assert runtime.models()


def test_what_a_killed_client_had_queued_is_dropped(
    folder: Path, classifier_fp32: lrai.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon_with(tmp_path, monkeypatch, "daemon._SILENT_SECONDS = 3")
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        actor, _ = stop_at_work(runtime)
        client = program(SUBMIT, classifier_fp32.path, 10, 1)
        wait_until(lambda: outstanding(runtime) == 11)
        client.kill()
        client.communicate()
        wait_until(lambda: outstanding(runtime) == 1)
        kill(actor, signal.SIGCONT)
        wait_until(lambda: outstanding(runtime) == 0)
        assert runtime.infer(request()).outputs["logits"].shape == (1, 10)


@pytest.mark.parametrize("rows", [1, 512])  # small, and in a block of its own
def test_a_client_that_was_given_up_asks_again_when_it_is_back(
    folder: Path,
    classifier_fp32: lrai.Artifact,
    session: onnxruntime.InferenceSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
) -> None:
    daemon_with(tmp_path, monkeypatch, "daemon._SILENT_SECONDS = 3")
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        actor, _ = stop_at_work(runtime)
        client = program(SUBMIT, classifier_fp32.path, 4, rows)
        wait_until(lambda: outstanding(runtime) == 1 + 4 * rows)
        pause(client.pid)
        wait_until(lambda: outstanding(runtime) == 1)
        client.send_signal(signal.SIGCONT)
        wait_until(lambda: outstanding(runtime) == 1 + 4 * rows)
        kill(actor, signal.SIGCONT)
        answers = json.loads(output(client))
    for i, logits in enumerate(answers):
        np.testing.assert_allclose(logits, expected(session, i), atol=1e-4)


def test_a_daemon_ends_by_itself_after_its_last_client(
    folder: Path, classifier_fp32: lrai.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("daemon._SILENT_SECONDS = 3", "daemon._IDLE_SECONDS = 0.5")
    daemon_with(tmp_path, monkeypatch, *changes)
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        actor = pid_of(runtime, "classifier")
        time.sleep(4)  # at rest, and yet there
        assert pid_of(runtime, "classifier") == actor
        assert (folder / "deployments.json").is_file()
    wait_until(lambda: not daemons(folder))
    assert_gone(folder, actor)


def test_a_daemon_that_a_client_has_started_stays_when_it_is_told_to(
    folder: Path, classifier_fp32: lrai.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "left"
    daemon_with(tmp_path, monkeypatch, *impatient(left))
    with lrai.Runtime.open(classifier_fp32, address="auto"):
        assert "runs already" in run("runtime", "start", code=0)
    left.touch()
    time.sleep(3)
    assert len(daemons(folder)) == 1


def test_who_comes_while_an_idle_daemon_ends_is_served_by_the_next_one(
    folder: Path, classifier_fp32: lrai.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending, left = tmp_path / "ending", tmp_path / "left"
    daemon_with(
        tmp_path,
        monkeypatch,
        *impatient(left),
        "drain = embedded.Embedded.drain",
        "def slowly(self):",
        f"    drain(self), pathlib.Path({str(ending)!r}).touch(), time.sleep(1)",
        "embedded.Embedded.drain = slowly",
    )
    lrai.Runtime.open(classifier_fp32, address="auto").close()
    (first,) = daemons(folder)
    left.touch()
    wait_until(ending.exists)
    left.unlink()  # the next one is to stay
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        assert runtime.infer(request()).outputs["logits"].shape == (1, 10)
        assert first not in daemons(folder)


def assert_gone(folder: Path, actor: int) -> None:
    """Nothing is left but a lock that nobody holds, a log without complaints, and no deployment."""
    wait_until(lambda: not is_running(folder))
    assert {path.name for path in folder.iterdir()} == {
        "lock",
        "log",
        "audit.jsonl",
        "deployments.json",
        "state.lock",
        *(["traffic"] if (folder / "traffic").exists() else []),
    }
    assert (folder / "log").read_text() == ""
    assert list(folder.parent.iterdir()) == [folder]
    assert not Path(f"/proc/{actor}").exists()


def test_what_is_logged_is_seen_where_the_runtime_was_started_if_asked_for(
    folder: Path, classifier_fp32: lrai.Artifact, tmp_path: Path
) -> None:
    said = tmp_path / "said"
    with said.open("w") as line:
        own = {**os.environ, "LRAI_LOG": "stderr"}
        subprocess.run([LRAI, "runtime", "start"], env=own, stderr=line, check=True)
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        kill(pid_of(runtime, "classifier"))
        wait_until(lambda: "actor lost" in said.read_text())
    assert "actor lost" in (folder / "log").read_text()
    run("runtime", "stop", code=0)


def test_a_daemon_that_is_told_to_end_answers_what_it_accepted(
    folder: Path, classifier_fp32: lrai.Artifact, session: onnxruntime.InferenceSession
) -> None:
    folder.mkdir(mode=0o700)
    daemon = start_daemon(folder, lrai.load_config())
    assert daemon is not None
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        actor = pid_of(runtime, "classifier")
        pause(actor)
        ids = [runtime.submit(request(i)) for i in range(20)]
        wait_until(lambda: outstanding(runtime) == 20)
        daemon.terminate()
        wait_until(lambda: runtime.ready() == "dead")
        with pytest.raises(lrai.NotReady, match="draining"):
            runtime.infer(request())
        assert daemon.poll() is None
        kill(actor, signal.SIGCONT)
        for i, identity in enumerate(ids):
            answer = runtime.result(identity).outputs["logits"]
            np.testing.assert_allclose(answer, expected(session, i), atol=1e-4)
        assert daemon.wait(60) == 0
        time.sleep(0.3)
        assert not daemons(folder)  # its client has nothing to ask, and starts none
        assert_gone(folder, actor)


def test_a_slow_client_gets_its_answers_though_the_daemon_ends(
    folder: Path,
    classifier_fp32: lrai.Artifact,
    session: onnxruntime.InferenceSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LRAI_SCHEDULER_MAX_QUEUE_ROWS", str(10 * 4096))
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        (daemon,) = daemons(folder)
        actor = pid_of(runtime, "classifier")
        pause(actor)
        client = program(SUBMIT, classifier_fp32.path, 9, 4096)  # more than a socket buffers
        wait_until(lambda: outstanding(runtime) == 9 * 4096)
        pause(client.pid)
        kill(daemon, signal.SIGTERM)
        kill(actor, signal.SIGCONT)
        wait_until(lambda: not alive(actor))  # all was answered
        time.sleep(0.3)
        client.send_signal(signal.SIGCONT)
        answers = json.loads(output(client))
    for i, logits in enumerate(answers):
        np.testing.assert_allclose(logits, expected(session, i), atol=1e-4)


def test_what_does_not_end_in_time_is_told_so(
    folder: Path, classifier_fp32: lrai.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRAI_RUNTIME_DRAIN_SECONDS", "0.3")
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        (daemon,) = daemons(folder)
        actor = pid_of(runtime, "classifier")
        pause(actor)
        ids = [runtime.submit(request()) for _ in range(5)]
        wait_until(lambda: outstanding(runtime) == 5)
        kill(daemon, signal.SIGTERM)
        for identity in ids:
            with pytest.raises(lrai.NotReady, match="the runtime was closed"):
                runtime.result(identity)
        wait_until(lambda: not daemons(folder))
        assert_gone(folder, actor)


def test_a_deadline_and_a_cancellation_reach_the_queue_of_the_daemon(
    folder: Path, classifier_fp32: lrai.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The daemon says so, and not the client, which has other words where a busy one is late.
    monkeypatch.setattr("lrai_shared.client._GRACE_SECONDS", 20.0)
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        actor, identity = stop_at_work(runtime)
        with pytest.raises(lrai.DeadlineExceeded, match=r"in the queue|cannot be met|while it ran"):
            runtime.infer(request(timeout_ms=2000))

        async def cancel() -> None:
            waiting = asyncio.create_task(runtime.infer_async(request()))
            while outstanding(runtime) < 2:  # noqa: ASYNC110 - it is another process
                await asyncio.sleep(0.01)
            waiting.cancel()

        asyncio.run(cancel())
        wait_until(lambda: outstanding(runtime) == 1)
        kill(actor, signal.SIGCONT)
        assert runtime.result(identity).outputs["logits"].shape == (1, 10)
        assert runtime.drain()


def test_what_a_model_promises_holds_for_who_names_no_time(
    folder: Path, classifier_fp32: lrai.Artifact
) -> None:
    with lrai.Runtime(address="auto") as runtime:
        runtime.load(classifier_fp32, settings={"scheduler.latency_slo_ms": 1e-3})
        with pytest.raises(lrai.DeadlineExceeded, match=r"0\.001 ms allowed|in the queue"):
            runtime.infer(request(1.0))
        patient = request(1.0, timeout_ms=10_000)
        assert runtime.infer(patient).outputs["logits"].shape == (1, 10)


def test_errors_are_the_same_as_in_one_process(
    folder: Path, classifier_fp32: lrai.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRAI_SCHEDULER_MAX_QUEUE_ROWS", "4")
    raw = lrai.Tensor(name="features", datatype="FP32", shape=(1, 64), data=b"short")

    def errors(runtime: lrai.Runtime) -> Iterator[tuple[Any, ...]]:
        for bad in (
            request(rows=5),
            request(inputs={"featurez": np.zeros((1, 64), np.float32)}),
            request(inputs={"features": np.zeros((1, 64))}),
            request(inputs={"features": raw}),
            request(inputs={}),
            request(outputs=("loggits",)),
            request(model_name="other"),
            request(model_version="other"),
            request(timeout_ms=0.0),
            request(timeout_ms=float("nan")),
            request(parameters={"priority": "high"}),
        ):
            with pytest.raises(lrai.LraiError) as caught:
                runtime.infer(bad)
            yield type(caught.value), vars(caught.value), str(caught.value).split(" ms ")[-1]
        for attempt in (
            lambda: runtime.load(tmp_path / "absent.lrai"),
            lambda: runtime.load(classifier_fp32, variant="int3", name="x"),
            lambda: runtime.load(classifier_fp32, require={"sigma": 1}, name="x"),
            lambda: runtime.unload("other"),
        ):
            with pytest.raises(lrai.LraiError) as caught:
                attempt()
            yield type(caught.value), vars(caught.value), str(caught.value)

    with lrai.Runtime.open(classifier_fp32) as embedded:
        there = list(errors(embedded))
    # At a sign of life the client tells by itself, in other words, what has no time left.
    monkeypatch.setattr("lrai_shared.client._LIFE_SECONDS", 60.0)
    daemon_with(tmp_path, monkeypatch, "daemon._SILENT_SECONDS = 90")
    with lrai.Runtime.open(classifier_fp32, address="auto") as attached:
        here = list(errors(attached))
    assert here == there
    assert here[0][0] is lrai.RequestError
    assert here[0][2] == "5 rows, more than the 4 that may wait"
    assert here[1][:2] == (lrai.InvalidTensor, {"tensor": "featurez"})


def test_hostile_frames_are_dropped_counted_and_harm_nobody(
    folder: Path, classifier_fp32: lrai.Artifact
) -> None:
    import pickle  # noqa: TID251 - what an attacker would send

    form = messages.Form("classifier", "", (), {}, ("features",), ("FP32",), ((1, 64),))
    infer = messages.Infer(1, messages.encode_form(form), None, ((0, 0, 256),))
    wrong = msgspec.structs.replace(infer, places=((9, 0, 256),))
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        (daemon,) = daemons(folder)
        with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.connect(f"ipc://{folder}/clients")

            def send(message: messages.FromClient, *frames: bytes) -> None:
                stranger.send_multipart([encode(message), *frames])

            send(messages.Requests((infer,)), bytes(256))  # before it attached: not heard
            for frames in ([b""], [b"\x00" * 40], [pickle.dumps(print)], [b"x"] * 9):
                stranger.send_multipart(frames)
            send(messages.Attach(99, "9.9"))
            refused = messages.decode_to_client(stranger.recv_multipart()[0])
            assert isinstance(refused, messages.Attached)
            assert (refused.version, refused.session) == (PROTOCOL_VERSION, "")
            wait_until(lambda: runtime.stats()["dropped_frames"] == 5)
            send(messages.Attach(PROTOCOL_VERSION, "0"))
            assert messages.decode_to_client(stranger.recv_multipart()[0]).session  # type: ignore[union-attr]
            send(messages.Requests((wrong,)), bytes(256))
            wait_until(lambda: runtime.stats()["dropped_frames"] == 6)
            for call in (
                messages.Call(1, "close", {}),
                messages.Call(2, "__init__", {}),
                messages.Call(3, "load", {"shared": "no"}),
                messages.Call(4, "load", {"artifact": str(classifier_fp32.path), "name": {"a": 1}}),
                messages.Call(5, "ready", {"now": None}),
                messages.Call(6, "load", {"artifact": "\0"}),
            ):
                send(call)
                reply = messages.decode_to_client(stranger.recv_multipart()[0])
                assert isinstance(reply, messages.Replies)
                (failed,) = reply.failures
                assert failed.key == call.key
                assert str(folder.parent) not in failed.message
            chance = random.Random(0)
            whole = encode(messages.Requests((infer,), (3,)))
            for _ in range(2000):
                header = bytearray(whole)
                for _ in range(chance.randint(1, 3)):
                    header[chance.randrange(len(header))] = chance.randrange(256)
                stranger.send_multipart([bytes(header), bytes(256)])
            send(messages.Call(1 << 40, "ready", {}))
            while True:  # until all of them have been heard
                reply = messages.decode_to_client(stranger.recv_multipart()[0])
                if isinstance(reply, messages.Returned) and reply.key == 1 << 40:
                    break
        assert runtime.stats()["dropped_frames"] > 500
        assert runtime.infer(request()).outputs["logits"].shape == (1, 10)
        assert daemons(folder) == [daemon]


def mapped(pid: int) -> int:
    """Return how many arenas a process has mapped."""
    return (Path(f"/proc/{pid}/maps").read_text()).count("/memfd:lrai")


def quiet(runtime: lrai.Runtime) -> dict[str, int]:
    """Return the counters once nobody reads the arena any more."""
    wait_until(lambda: runtime.stats()["arena_blocks"] == 0)
    return runtime.stats()


LARGE = 512  # rows, of a tensor that has a block of its own


def test_a_large_request_is_copied_once_and_not_on_the_way_to_the_engine(
    folder: Path, classifier_fp32: lrai.Artifact, session: onnxruntime.InferenceSession
) -> None:
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        actor = pid_of(runtime, "classifier")
        (daemon,) = daemons(folder)
        before = runtime.stats()
        for value in range(3):
            answer = runtime.infer(request(value, LARGE)).outputs["logits"]
            np.testing.assert_allclose(answer[-1:], expected(session, value), atol=1e-4)
        stats = quiet(runtime)
        changed = {name: stats[name] - before.get(name, 0) for name in stats}
        assert changed["arena_copied_bytes"] == 3 * LARGE * 64 * 4
        assert (changed["arena_allocations"], changed["daemon_resent"]) == (1, 0)
        for hop in ("daemon", "actor"):  # from here to it
            assert (changed[f"{hop}_copied_bytes"], changed[f"{hop}_inline_large"]) == (0, 0)
        assert mapped(daemon) == mapped(actor) == 1


ASK_BARE = f"""{START}
import os, subprocess
assert os.getuid() == 12345
assert os.statvfs("/dev/shm").f_blocks == 1
for path in ("/x", "/dev/shm/x"):
    try:
        open(path, "w")
    except OSError as error:
        assert error.errno == 30  # read-only file system
try:
    asked = [(1.0, {LARGE}), (2.0, 1), (3.0, {LARGE})]
    ids = [(v, runtime.submit(request(v, rows))) for v, rows in asked]
    answers = [[v, runtime.result(i).outputs["logits"].tolist()] for v, i in ids]
    print(json.dumps({{"answers": answers, "stats": runtime.stats()}}))
finally:
    command = "from lrai_core.cli import main; main()"
    stop = [sys.executable, "-P", "-c", command, "runtime", "stop"]
    subprocess.run(stop, check=True, stdout=subprocess.DEVNULL)
"""


@pytest.mark.parametrize("shared", [True, False], ids=["with memory to share", "with none"])
def test_it_is_shared_on_a_read_only_root_without_network_dev_shm_or_a_known_user(
    classifier_fp32: lrai.Artifact, session: onnxruntime.InferenceSession, *, shared: bool
) -> None:
    bare = ["unshare", "--map-root-user", "--mount", "--net", "sh", "-ec", BARE, "sh"]
    # Of 512 KB: then a file of 256 MB cannot be made, as which an arena begins.
    bare += [] if shared else ["sh", "-c", 'ulimit -f 1000 && exec "$@"', "sh"]
    done = subprocess.run(
        [*bare, PYTHON, "-P", "-c", ASK_BARE, classifier_fp32.path],
        env={name: value for name, value in os.environ.items() if not name.startswith("LRAI_")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [len(logits) for _, logits in said["answers"]] == [LARGE, 1, LARGE]
    for value, logits in said["answers"]:
        right = np.repeat(expected(session, value), len(logits), axis=0)
        np.testing.assert_allclose(logits, right, atol=1e-4)
    stats = said["stats"]
    copied, inline = (2 * LARGE * 64 * 4, 0) if shared else (0, 2)
    assert (stats["arena_copied_bytes"], stats["daemon_inline_large"]) == (copied, inline)
    assert (stats["dropped_frames"], stats["outstanding_rows"]) == (0, 0)


def test_a_small_request_costs_one_message_on_each_hop_and_less_where_many_wait(
    folder: Path, classifier_fp32: lrai.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        names = [
            f"{peer}_messages_{way}" for peer in ("actor", "client") for way in ("sent", "received")
        ]
        actor, identity = stop_at_work(runtime)
        before = runtime.stats()
        backend: Any = runtime._backend
        all_wait, send = threading.Event(), backend._send
        monkeypatch.setattr(backend, "_send", lambda: all_wait.wait() and send())
        ids = [runtime.submit(request()) for _ in range(200)]
        all_wait.set()
        looks = itertools.count()
        wait_until(lambda: next(looks) >= 0 and outstanding(runtime) == 201)
        kill(actor, signal.SIGCONT)
        for one in (identity, *ids):
            runtime.result(one)
        stats = runtime.stats()
        asked = stats["daemon_messages_sent"] - before["daemon_messages_sent"]
        assert asked < 200 + stats["client_messages_sent"] - before["client_messages_sent"]
        # Signs of life are messages too; and each look is a question and its answer.
        seen = next(looks)
        for name in names:
            more = seen if name.startswith("client") else 0
            assert stats[name] - before[name] - more < 100, name


SCHEDULED = f"""
import ctypes, os, threading
from pathlib import Path
policy, priority = ctypes.c_int(), ctypes.c_int()
me = ctypes.c_ulong(threading.get_ident())
# As grpc does; from then on glibc tells this thread's children what it was told here.
assert not ctypes.CDLL(None).pthread_getschedparam(me, ctypes.byref(policy), ctypes.byref(priority))
{START}
policies = {{t.name: os.sched_getscheduler(t.native_id) for t in threading.enumerate()}}
for task in Path("/proc/self/task").iterdir():
    if (name := (task / "comm").read_text().strip()).startswith("ZMQ"):
        policies[name] = os.sched_getscheduler(int(task.name))
print(json.dumps(policies))
"""


def scheduled(pid: int, only: str = "") -> dict[int, int]:
    """Return the policies of the threads of a process, or of those of such a name."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            if only in (task / "comm").read_text():
                found[int(task.name)] = os.sched_getscheduler(int(task.name))
    return found


def test_a_daemon_and_what_asks_it_interrupt_no_call_but_of_several_threads(
    folder: Path, classifier_fp32: lrai.Artifact
) -> None:
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        (daemon,), actor = daemons(folder), pid_of(runtime, "classifier")
        asks = json.loads(output(program(SCHEDULED, classifier_fp32.path)))  # there is no other
        lines = set(scheduled(actor, "ZMQ").values())
        assert asks.pop("MainThread") == os.SCHED_OTHER
        # The second is pyzmq's, which lets go of what was sent without a copy.
        assert asks.keys() == {"lrai-client", "Thread-1", "ZMQbg/IO/0", "ZMQbg/Reaper"}
        assert set(asks.values()) == lines == {os.SCHED_BATCH}
        assert set(scheduled(daemon).values()) == {os.SCHED_BATCH}
        assert os.sched_getscheduler(actor) == os.SCHED_OTHER  # the engine's
        runtime.load(classifier_fp32, name="wide", settings={"actor.threads": 2})
        assert set(scheduled(daemon).values()) == {os.SCHED_OTHER}
        runtime.unload("wide")
        assert set(scheduled(daemon, "ZMQ").values()) == {os.SCHED_BATCH}


def test_a_block_that_the_engine_may_read_is_kept_though_its_caller_is_gone(
    folder: Path, classifier_fp32: lrai.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrai_shared.client._GRACE_SECONDS", 20.0)  # the daemon is to say it
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        actor = pid_of(runtime, "classifier")
        runtime.infer(request(rows=LARGE))
        quiet(runtime)
        pause(actor)
        with pytest.raises(lrai.DeadlineExceeded, match="while it ran"):
            runtime.infer(request(rows=LARGE, timeout_ms=3000))
        time.sleep(0.3)
        assert runtime.stats()["arena_blocks"] == 1
        with pytest.raises(lrai.DeadlineExceeded):  # which never began
            runtime.infer(request(rows=LARGE, timeout_ms=300))
        wait_until(lambda: runtime.stats()["arena_blocks"] == 1)
        kill(actor, signal.SIGCONT)
        quiet(runtime)


def test_a_block_is_given_back_though_its_request_was_refused_or_its_actor_died(
    folder: Path, classifier_fp32: lrai.Artifact
) -> None:
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        wrong = {"features": np.zeros((LARGE, 65), np.float32)}
        with pytest.raises(lrai.InvalidTensor):
            runtime.infer(request(inputs=wrong))
        quiet(runtime)
        actor = pid_of(runtime, "classifier")
        pause(actor)
        identity = runtime.submit(request(rows=LARGE))
        wait_until(lambda: outstanding(runtime) == LARGE)
        kill(actor)
        assert runtime.result(identity).outputs["logits"].shape == (LARGE, 10)
        quiet(runtime)


def test_large_requests_survive_the_death_of_the_daemon(
    folder: Path, classifier_fp32: lrai.Artifact, session: onnxruntime.InferenceSession
) -> None:
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        (daemon,) = daemons(folder)
        pause(pid_of(runtime, "classifier"))
        ids = [runtime.submit(request(value, LARGE)) for value in range(4)]
        wait_until(lambda: outstanding(runtime) == 4 * LARGE)
        kill(daemon)
        for value, identity in enumerate(ids):
            answer = runtime.result(identity).outputs["logits"]
            np.testing.assert_allclose(answer[-1:], expected(session, value), atol=1e-4)
        assert runtime.infer(request(rows=LARGE)).outputs["logits"].shape == (LARGE, 10)
        assert quiet(runtime)["arena_copied_bytes"] > 0


def test_the_memory_of_a_client_that_is_gone_is_unmapped_everywhere(
    folder: Path, classifier_fp32: lrai.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon_with(tmp_path, monkeypatch, "daemon._SILENT_SECONDS = 3")
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        runtime.infer(request(rows=LARGE))
        actor, (daemon,) = pid_of(runtime, "classifier"), daemons(folder)
        client = program(SUBMIT + "time.sleep(60)", classifier_fp32.path, 1, LARGE)
        wait_until(lambda: mapped(actor) == mapped(daemon) == 2)
        client.kill()
        client.communicate()
        wait_until(lambda: mapped(actor) == mapped(daemon) == 1)
        assert runtime.infer(request(rows=LARGE)).outputs["logits"].shape == (LARGE, 10)


def test_hostile_numbers_of_shared_memory_are_counted_and_harm_nobody(
    folder: Path, classifier_fp32: lrai.Artifact
) -> None:
    form = messages.Form("classifier", "", (), {}, ("features",), ("FP32",), ((1, 64),))
    encoded, chance, key = messages.encode_form(form), random.Random(0), 0
    with (
        lrai.Runtime.open(classifier_fp32, address="auto") as runtime,
        Stranger(folder) as stranger,
    ):
        (daemon,) = daemons(folder)
        arena = Arena(1 << 20)
        good = arena.segment
        assert good is not None
        fifo = os.pipe()
        assert stranger.attach(good) == b"", "none is read as a session begins"
        for changes in ({"fd": fifo[0]}, {"fd": -1}, {"pid": 1}, {"size": 1 << 62}, {"id": b""}):
            before = runtime.stats()["dropped_frames"]
            assert stranger.attach(msgspec.structs.replace(good, **changes)) == b""
            assert runtime.stats()["dropped_frames"] == before + 1
        assert stranger.attach(good) == good.id
        before = runtime.stats()["dropped_frames"]
        numbers = [-(1 << 63), -(1 << 20), -1, 0, 1, 256, (1 << 20) - 255, 1 << 20, 1 << 62]
        for _ in range(500):
            key += 1
            place = (
                chance.choice([-3, -2, -1, -1, -1]),
                chance.choice(numbers),
                chance.choice(numbers),
            )
            stranger.send(messages.Requests((messages.Infer(key, encoded, None, (place,)),)))
        place = (-1, 256, 256)
        stranger.send(messages.Requests((messages.Infer(1 << 40, encoded, None, (place,)),)))
        while 1 << 40 not in {answer.key for answer in stranger.hear().answers}:
            pass
        assert runtime.stats()["dropped_frames"] > before + 300
        arena.close()
        for fd in fifo:
            os.close(fd)
        assert runtime.infer(request(rows=LARGE)).outputs["logits"].shape == (LARGE, 10)
        assert daemons(folder) == [daemon]


class Stranger:
    """A client that says what it likes."""

    def __init__(self, folder: Path) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(f"ipc://{folder}/clients")

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def send(self, message: messages.FromClient) -> None:
        self._socket.send_multipart([encode(message), b""])

    def attach(self, segment: Segment) -> bytes:
        self.send(messages.Attach(PROTOCOL_VERSION, "0", segment))
        reply = messages.decode_to_client(self._socket.recv_multipart()[0])
        assert isinstance(reply, messages.Attached)
        return reply.arena

    def hear(self) -> messages.Replies:
        while True:
            assert self._socket.poll(60_000)
            reply = messages.decode_to_client(self._socket.recv_multipart()[0])
            if isinstance(reply, messages.Replies):
                return reply


def test_a_fork_of_an_attached_process_is_refused_and_does_no_harm(
    folder: Path, classifier_fp32: lrai.Artifact
) -> None:
    said = output(program(FORK, classifier_fp32.path))
    assert (
        said.splitlines() == ["this process was forked from the runtime's; open one of its own"] * 2
    )


def test_one_artifact_is_loaded_once_and_another_refused(
    folder: Path, classifier_fp32: lrai.Artifact, certified: lrai.Artifact
) -> None:
    with (
        lrai.Runtime.open(classifier_fp32, address="auto", name="m") as first,
        lrai.Runtime.open(classifier_fp32, address="auto", name="m") as second,
    ):
        assert pid_of(first, "m") == pid_of(second, "m")
        with pytest.raises(lrai.UsageError, match="'m' is loaded already"):
            second.load(certified, name="m")
        second.unload("m")
        assert first.models() == []
        second.load(certified, name="m")
        assert first.models()[0].version == certified.version


def test_a_required_certificate_is_demanded_of_what_another_process_loaded(
    folder: Path, classifier_fp32: lrai.Artifact, certified: lrai.Artifact
) -> None:
    with lrai.Runtime.open(certified, address="auto", name="m") as first:
        first.load(classifier_fp32, name="bare")
        with pytest.raises(lrai.ConditionNotMet, match="delta=1e-05"):
            lrai.Runtime.open(certified, address="auto", name="m", require={"delta": 1e-5})
        with pytest.raises(lrai.ConditionNotMet, match="no certificate"):
            lrai.Runtime.open(classifier_fp32, address="auto", name="bare", require={"delta": 1})
        strict = {"tier": "STATISTICAL", "delta": 0.5}
        with lrai.Runtime.open(certified, address="auto", name="m", require=strict) as second:
            assert pid_of(second, "m") == pid_of(first, "m")


def test_a_required_certificate_is_demanded_of_all_variants_that_another_process_loaded(
    folder: Path, certified: lrai.Artifact, tmp_path: Path
) -> None:
    path = tmp_path / "several.lrai"
    shutil.copytree(certified.path, path)
    one = msgspec.to_builtins(certified.manifest.variant(certified.manifest.chosen))
    variants = [one, one | {"id": "other"}]
    small_artifact.rewrite(path, {"variants": variants, "together": ["other"]})
    several = lrai.Artifact.open(path)
    lrai.verify(several, lrai.Spec(epsilon=1.0))  # of the chosen one alone
    terms = {"epsilon": 1.0, "delta": 0.5}
    with lrai.Runtime.open(several, require=terms) as alone:
        assert alone.ready() == "idle"  # the other one is left out
    with lrai.Runtime.open(several, address="auto") as first:
        assert first.ready() == "idle"
        with pytest.raises(lrai.ConditionNotMet, match="no certificate"):
            lrai.Runtime.open(several, address="auto", require=terms)


def test_a_certificate_does_not_speak_of_the_source_that_another_process_was_given(
    folder: Path, certified: lrai.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon_with(tmp_path, monkeypatch, "embedded.environment = lambda _: 'other'")
    with lrai.Runtime.open(certified, address="auto", name="m") as runtime:
        assert runtime.models()[0].variant == "fp32"
        with pytest.raises(lrai.ConditionNotMet, match="no certificate speaks of what serves"):
            runtime.load(certified, name="m", require={"delta": 1.0})


def test_what_a_killed_daemon_had_loaded_the_next_one_loads_and_no_more(
    folder: Path, classifier_fp32: lrai.Artifact, tmp_path: Path
) -> None:
    gone = tmp_path / "gone.lrai"
    shutil.copytree(classifier_fp32.path, gone)
    with lrai.Runtime.open(classifier_fp32, address="auto", name="a") as runtime:
        for name in "bc":
            runtime.load(classifier_fp32, name=name)
        runtime.load(gone, name="gone")
        runtime.unload("b")
        shutil.rmtree(gone)
        (daemon,) = daemons(folder)
        kill(daemon)
        assert runtime.infer(request(model_name="a")).model_name == "a"
        assert {model.name for model in runtime.models()} == {"a", "c"}
        content = json.loads((folder / "deployments.json").read_text())
        assert set(content["deployments"]) == {"a", "c"}


def test_who_is_killed_while_it_restores_leaves_the_rest_to_the_next(
    classifier_fp32: lrai.Artifact, tmp_path: Path
) -> None:
    state = {"runtime.state_dir": str(tmp_path / "state"), "actor.threads": 1}
    config, names = lrai.load_config(call=state), {"a", "b", "c"}
    first = Deployments(config)
    for name in names:
        first.load(str(classifier_fp32.path), name=name)
    content = (tmp_path / "state" / "deployments.json").read_bytes()
    first.close()
    (tmp_path / "state" / "deployments.json").write_bytes(content)  # as of one that was killed

    class Killed(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        committed: list[str] = []
        commit = Deployments._commit

        def once(self: Deployments, name: str, *arguments: Any) -> None:
            if committed:
                raise Killed
            commit(self, name, *arguments)
            committed.append(name)

        patch.setattr(Deployments, "_commit", once)
        patch.setattr("lrai_deployments.kept._OPENED", 1)  # one after the other
        second = Deployments(config)
        with pytest.raises(Killed):
            second.restore()
    kept = json.loads((tmp_path / "state" / "deployments.json").read_bytes())
    assert set(kept["deployments"]) == names
    second.close()


def test_many_refusals_at_once_all_come_with_their_reason(
    folder: Path, classifier_fp32: lrai.Artifact
) -> None:
    """More than one message can hold, of a model that names all that it takes."""
    with lrai.Runtime.open(classifier_fp32, address="auto", name="n" * 400) as runtime:
        for number in range(6):
            runtime.load(classifier_fp32, name=f"{number}" * 400)
        wrong = [request(model_name=f"not {number}") for number in range(4000)]
        futures = [runtime._backend.start(one) for one in wrong]
        refused = [future.exception(30) for future in futures]
        assert {type(error) for error in refused} == {lrai.ModelNotFound}
        assert runtime.infer(request(model_name="n" * 400)).outputs["logits"].shape == (1, 10)


def test_a_record_that_cannot_be_read_keeps_no_daemon_from_starting(
    folder: Path, classifier_fp32: lrai.Artifact
) -> None:
    folder.mkdir(mode=0o700)
    how = '{"variant": "", "require": null, "settings": null, "artifact": "/absent"}'
    absent = f'{{"a": {{"versions": {{"1": {how}}}, "shares": {{"1": 1}}}}}}'
    kept = [f'{{"stopped": false, "deployments": {a}}}' for a in ('{"a": 1}', absent)]
    for content in ("{", '{"a": 1}', *kept):
        (folder / "deployments.json").write_text(content)
        with lrai.Runtime(address="auto") as runtime:
            assert runtime.models() == []
            (daemon,) = daemons(folder)
            kill(daemon)
        wait_until(lambda: not is_running(folder))


def test_questions_are_answered_while_a_model_is_loaded(
    folder: Path, classifier_fp32: lrai.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, may_start = tmp_path / "slow", tmp_path / "start"
    waits = f"while [ ! -e {may_start} ]; do sleep 0.05; done"
    slow.write_text(f'#!/bin/sh\n{waits}\nexec {sys.executable} "$@"\n')
    slow.chmod(0o700)
    monkeypatch.setenv("LRAI_ACTOR_PYTHON", str(slow))
    with lrai.Runtime(address="auto") as runtime:
        thread = threading.Thread(target=runtime.load, args=(classifier_fp32,))
        thread.start()
        wait_until(lambda: runtime.ready() == "stalled")
        assert thread.is_alive()
        may_start.touch()
        thread.join()
        assert runtime.ready() == "idle"


def test_a_process_beside_another_finds_the_daemon_at_its_address(
    folder: Path, classifier_fp32: lrai.Artifact
) -> None:
    other = folder.parent / "other"
    with (
        lrai.Runtime.open(classifier_fp32, address="auto"),
        lrai.Runtime(address=str(other)) as beside,
    ):
        assert beside.models() == []
        assert len(daemons(other)) == 1
        kill(daemons(other)[0])


@pytest.mark.usefixtures("folder")
def test_a_runtime_whose_folders_to_load_from_are_all_empty_loads_from_none(
    classifier_fp32: lrai.Artifact,
) -> None:
    """They are of variables that nobody has set, as `$MODELS:$MORE`; embedded it is so, too."""
    given = lrai.load_config(call={"runtime.model_roots": ":"})
    for address in ("embedded", "auto"):
        with (
            lrai.Runtime(given, address=address) as runtime,
            pytest.raises(lrai.ConditionNotMet, match=r"runtime\.model_roots"),
        ):
            runtime.load(classifier_fp32)


def test_the_command_to_stop_returns_when_the_daemon_has_ended(
    folder: Path, classifier_fp32: lrai.Artifact
) -> None:
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        actor, identity = stop_at_work(runtime)
        stop = subprocess.Popen([LRAI, "runtime", "stop"])
        wait_until(lambda: runtime.ready() == "dead")
        with pytest.raises(subprocess.TimeoutExpired):
            stop.wait(1)
        kill(actor, signal.SIGCONT)
        assert runtime.result(identity).outputs["logits"].shape == (1, 10)
        assert stop.wait(60) == 0
        assert not is_running(folder)


def test_the_command_line_asks_the_runtime_that_the_variable_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = folder.parent / "other"
    monkeypatch.setenv("LRAI_RUNTIME", str(other))
    assert f"no runtime runs in {other}" in run("runtime", "status", code=5)
    assert f"was started in {other}" in run("runtime", "start", code=0)
    run("runtime", "status", code=0)
    run("runtime", "stop", code=0)
    assert not daemons(other)
    monkeypatch.setenv("LRAI_RUNTIME", "embedded")  # of hosts; a command still means the shared one
    assert f"no runtime runs in {folder}" in run("runtime", "status", code=5)
    monkeypatch.setenv("LRAI_RUNTIME", "tcp://127.0.0.1:1?keys=/nowhere")
    monkeypatch.setenv("COLUMNS", "200")  # one line
    meant = "its own machine, not at 'tcp://127.0.0.1:1?keys=/nowhere' (runtime.address);"
    for command in ("start", "stop"):
        assert f"{meant} give --address auto" in run("runtime", command, code=2)


def test_a_runtime_that_ends_takes_on_nothing_more() -> None:
    daemon = object.__new__(Daemon)
    daemon.ending = True
    for operation in ("swap", "route", "unload", "freeze"):
        with pytest.raises(lrai.NotReady, match="is ending"):
            daemon._operate(operation, {})
    replies = list[Any]()
    for operation in ("load", "stay"):
        daemon.operate(messages.Call(1, operation, {}), replies.append)
    assert not replies  # the client asks the next one


def test_what_lies_in_the_folder_is_kept_young(folder: Path) -> None:
    (folder / "held").mkdir(parents=True)
    for name in ("lock", "deployments.json", "held/m.columns", "sketch.json", "captured.npz"):
        (folder / name).touch()
        os.utime(folder / name, (0, 0))
    _touch(folder)
    for path in folder.rglob("*"):
        assert (path.stat().st_atime > 1e9) == (path.name != "captured.npz")
        assert path.is_dir() or path.stat().st_mtime == 0  # a sketch is forgotten by it


def test_a_runtime_that_ends_leaves_the_socket_of_the_next_one(
    folder: Path, classifier_fp32: lrai.Artifact
) -> None:
    """As when its files were deleted by age, and another runtime was started."""
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        (folder / "clients").unlink()
        (folder / "clients").touch()
        backend: Any = runtime._backend
        backend.call("stop", {}, object)
        wait_until(lambda: not daemons(folder))
        assert (folder / "clients").exists()
        (folder / "clients").unlink()


def test_a_process_is_left_with_no_dead_daemons(
    folder: Path, classifier_fp32: lrai.Artifact
) -> None:
    before = set[int]()
    for _ in range(2):
        with lrai.Runtime.open(classifier_fp32, address="auto"):
            (daemon,) = daemons(folder)
            assert not any(Path(f"/proc/{pid}").exists() for pid in before)
        kill(daemon)
        os.waitid(os.P_PID, daemon, os.WEXITED | os.WNOWAIT)  # until all its threads have ended
        before.add(daemon)


def test_an_operation_that_comes_while_the_daemon_ends_harms_nobody() -> None:
    daemon, replies = object.__new__(Daemon), list[Any]()
    daemon.ending, daemon._quick = True, ThreadPoolExecutor(1)
    daemon._quick.shutdown()
    daemon.operate(messages.Call(1, "ready", {}), replies.append)
    assert not replies


def test_the_command_line_starts_shows_and_stops_the_runtime(
    folder: Path, classifier_fp32: lrai.Artifact
) -> None:
    assert {"freeze", "runtime", "unfreeze"} <= set(run("--help", code=0).split())
    for command in (("status",), ("stop",), ("drain",), ("unload", "m")):
        assert "lrai runtime start starts one" in run("runtime", *command, code=5)
    assert "was started" in run("runtime", "start", code=0)
    assert "runs already" in run("runtime", "start", code=0)
    terms = ("--variant", "fp32", "--setting", "actor.replicas=1")
    assert "KEY=VALUE" in run("runtime", "load", classifier_fp32.path, "--require", "0.5", code=2)
    lacks = run("runtime", "load", classifier_fp32.path, "--require", "epsilon=1e-12", code=3)
    assert "no certificate that meets the requirement (epsilon=1e-12)" in lacks
    wrong = run("runtime", "load", classifier_fp32.path, "--setting", "actor.copies=2", code=2)
    assert "'actor.copies' is no setting of one model" in wrong
    loaded = run("runtime", "load", classifier_fp32.path, "--name", "m", *terms, code=0)
    assert "m is loaded" in loaded
    shown = run("runtime", "status", code=0)
    for words in ("idle", "m", "fp32", "actor_ready", "outstanding_rows"):
        assert words in shown
    run("runtime", "load", folder / "absent", code=4)
    assert "loaded: 'm'" in run("runtime", "unload", "x", code=2)
    with lrai.Runtime(address="auto") as runtime:
        actor = pid_of(runtime, "m")
        run("runtime", "drain", code=0)
        with pytest.raises(lrai.NotReady, match="draining"):
            runtime.infer(request(model_name="m"))
        assert runtime.ready() == "dead"
        assert "it was drained, for good: lrai runtime stop" in run("runtime", "start", code=5)
        assert "is not ready: it is dead" in run("runtime", "status", code=3)
        run("runtime", "stop", code=0)
        assert_gone(folder, actor)  # at once, though a client is still there
        with pytest.raises(lrai.ModelNotFound, match="loaded: none"):
            runtime.infer(request(model_name="m"))  # which starts the next one, with nothing in it
    assert len(daemons(folder)) == 1


def test_what_takes_the_place_of_a_killed_runtime_is_as_that_was(
    folder: Path, classifier_fp32: lrai.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRAI_RUNTIME_MODEL_ROOTS", str(classifier_fp32.path.parent))
    run("runtime", "start", code=0)
    monkeypatch.delenv("LRAI_RUNTIME_MODEL_ROOTS")
    (before,) = daemons(folder)
    kill(before)
    with lrai.Runtime(address="auto") as runtime:
        runtime.load(classifier_fp32)
        with pytest.raises(lrai.ConditionNotMet, match="model_roots"):
            runtime.load(folder / "elsewhere.lrai")
    (after,) = daemons(folder)
    assert b"\0stay\0" in Path(f"/proc/{after}/cmdline").read_bytes()
    run("runtime", "stop", code=0)
    with lrai.Runtime(address="auto"):  # which was told to end: the next one is anybody's
        (last,) = daemons(folder)
        assert b"\0end\0" in Path(f"/proc/{last}/cmdline").read_bytes()


def test_a_runtime_that_was_to_stay_serves_on_after_a_machine_went_down(
    folder: Path, classifier_fp32: lrai.Artifact
) -> None:
    run("runtime", "start", code=0)
    run("runtime", "load", classifier_fp32.path, code=0)
    (daemon,) = daemons(folder)
    kill(daemon, signal.SIGTERM)
    wait_until(lambda: daemons(folder) == [])
    with lrai.Runtime(address="auto") as runtime:  # whoever comes first starts it as it was
        assert [model.name for model in runtime.models()] == ["classifier"]
    (after,) = daemons(folder)
    assert b"\0stay\0" in Path(f"/proc/{after}/cmdline").read_bytes()
    run("runtime", "stop", code=0)
    run("runtime", "start", code=0)
    with lrai.Runtime(address="auto") as runtime:
        assert runtime.models() == []


def test_a_folder_that_does_not_answer_takes_no_other_model(
    folder: Path,
    classifier_fp32: lrai.Artifact,
    minilm_fp32: lrai.Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of a mount that is gone: what lies there is waited for, the rest serves, and it ends."""
    hangs = tmp_path / "hangs"
    daemon_with(
        tmp_path,
        monkeypatch,
        "import os, time",
        "from lrai_deployments.deployments import Deployments",
        "before = Deployments._reopen",
        "def reopen(self, how):",
        f"    while 'minilm' in how.artifact and os.path.exists({str(hangs)!r}):",
        "        time.sleep(0.1)",
        "    return before(self, how)",
        "Deployments._reopen = reopen",
        "daemon._OPEN_SECONDS = -105",  # of 120 that a model may take to start
    )
    with lrai.Runtime(address="auto") as runtime:
        for artifact in (minilm_fp32, classifier_fp32):
            runtime.load(artifact)
        (before,) = daemons(folder)
        hangs.touch()
        kill(before)
        patient = request(timeout_ms=300_000)  # the next one waits for a quarter of a minute
        assert runtime.infer(patient).outputs["logits"].shape == (1, 10)
        with pytest.raises(lrai.ModelNotFound, match="loaded: 'classifier'"):
            runtime.infer(request(model_name="minilm"))
        assert "a folder does not answer" in (folder / "log").read_text()
        (after,) = daemons(folder)
        assert after != before
        kill(after, signal.SIGTERM)
        wait_until(lambda: after not in daemons(folder))


def test_a_load_that_hangs_keeps_no_runtime_from_ending(
    folder: Path, classifier_fp32: lrai.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a mount that is gone."""
    hangs = str(tmp_path / "hangs.lrai")
    daemon_with(
        tmp_path,
        monkeypatch,
        "import time",
        "from lrai_deployments.deployments import Deployments",
        "before = Deployments.open",
        "def open(self, artifact):",
        f"    while artifact == {hangs!r}:",
        "        time.sleep(0.1)",
        "    return before(self, artifact)",
        "Deployments.open = open",
        "daemon._END_SECONDS = 0.5",
    )
    with lrai.Runtime.open(classifier_fp32, address="auto") as runtime:
        (daemon,) = daemons(folder)
        actor = pid_of(runtime, "classifier")
        with Stranger(folder) as stranger:
            stranger.send(messages.Attach(PROTOCOL_VERSION, "0"))
            stranger.send(messages.Call(1, "load", {"artifact": hangs}))
            stranger.send(messages.Call(2, "no such operation", {}))
            assert stranger.hear().failures[0].key == 2  # and so the load is under way
            kill(daemon, signal.SIGTERM)
            wait_until(lambda: not daemons(folder))
    assert_gone(folder, actor)


FULL = """
import errno, json, os, sys
from pathlib import Path
import numpy as np
import lrai_core as lrai

old, new, state, address = sys.argv[1:]
state, ones = Path(state), {"x": np.ones((1, 3), np.float32)}

def ask():
    request = lrai.InferenceRequest(model_name="m", inputs=ones)
    return float(runtime.infer(request).outputs["y"][0, 0])

def fill():
    with open(state / "others", "wb", 0) as others:
        while True:
            try:
                others.write(b"x" * 4096)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                return

def changes():
    return [json.loads(line)["change"] for line in (state / "audit.jsonl").open()]

def refused(change):
    try:
        change()
    except lrai.OutOfResources as error:
        assert str(error) == f"{state}/deployments.json: the disk is full", error
    else:
        raise AssertionError("it was done")
    (found,) = runtime.deployments()  # for which captured rows are to be written, too
    assert (found.shares, found.frozen) == (before.shares, None)
    assert json.loads((state / "deployments.json").read_bytes()) == kept
    assert ask() == 2.0

settings = {"runtime.state_dir": str(state), "actor.threads": 1}
with lrai.Runtime(lrai.load_config(call=settings), address=address) as runtime:
    runtime.load(old, name="m", settings={"runtime.capture_rows": 20})
    (before,) = runtime.deployments()
    kept, captured = json.loads((state / "deployments.json").read_bytes()), Path(before.traffic)
    fill()
    assert ask() == 2.0
    refused(lambda: runtime.swap("m", new))
    refused(lambda: runtime.freeze("m", by="me", reason="it is so"))
    assert changes() == ["load"]
    assert not (captured / "captured.npz").exists()
    assert len(runtime.models()) == 1
    (state / "others").unlink()
    runtime.deployments()
    with np.load(captured / "captured.npz") as rows:
        assert len(rows["x"]) == 3
    runtime.swap("m", new)
    runtime.freeze("m", by="me", reason="it is so")
    assert ask() == 3.0
    assert changes() == ["load", "swap", "freeze"]
    assert runtime.deployments()[0].frozen.by == "me"
    left = sorted(one.name for one in state.iterdir())
    assert left == ["audit.jsonl", "deployments.json", "state.lock", "traffic"]
"""


@pytest.mark.parametrize("address", ["auto", "embedded"])
def test_a_full_disk_costs_what_cannot_be_written_no_request_and_no_later_change(
    folder: Path, tmp_path: Path, address: str
) -> None:
    artifacts = [
        small_artifact.build(tmp_path / f"{times:g}.lrai", factor=times) for times in (2.0, 3.0)
    ]
    full = in_small_filesystem(tmp_path, "size=256k")
    done = subprocess.run(
        [*full, PYTHON, "-P", "-c", FULL, *artifacts, tmp_path / "disk" / "state", address],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = done.stderr if address == "embedded" else (folder / "log").read_text()
    assert "traffic is not kept: [Errno 28]" in log
    assert "Traceback" not in log
