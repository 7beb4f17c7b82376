"""Actors that are killed, stopped and crash for real; a ledger of all requests is read after."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import lrai_core as lrai
from benchmarks.models import requests
from lrai_core.wire.messages import PROTOCOL_VERSION
from tests.core import small_artifact
from tests.integration.conftest import sentence
from tests.integration.quick import until_quick
from tests.pause import pause

pytestmark = pytest.mark.server


@dataclass
class Ledger:
    """What became of every request."""

    answered: list[tuple[int, Any]] = field(default_factory=list)
    refused: list[tuple[int, Exception]] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)  # of those that were answered
    sent: int = 0


def config(**values: Any) -> lrai.LraiConfig:
    return lrai.load_config(call={"actor.threads": 1} | values)


def pid_of(runtime: lrai.Runtime, model: str) -> int:
    return next(m.actor_pids[0] for m in runtime.models() if m.name == model)


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    os.kill(pid, number)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for what happens in any case; how long that takes is a matter of who else is busy."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def counted(runtime: lrai.Runtime, kind: str, count: int) -> Callable[[], bool]:
    """Return whether events of this kind have been counted so often, to be asked again.

    Or more often: two may come between two looks.
    """
    return lambda: runtime.stats().get(kind, 0) >= count


class Load:
    """Callers in threads that send one request after the other until told to stop."""

    def __init__(
        self, runtime: lrai.Runtime, model: str, payloads: list[dict[str, Any]], callers: int
    ) -> None:
        self.ledger = Ledger()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._runtime, self._model, self._payloads = runtime, model, payloads
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(callers)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> Ledger:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a caller never got its answer"
        return self.ledger

    def _run(self, first: int) -> None:
        index = first
        while not self._stop.is_set():
            index = (index + 7) % len(self._payloads)
            with self._lock:
                self.ledger.sent += 1
            started = time.monotonic()
            try:
                request = lrai.InferenceRequest(
                    model_name=self._model, inputs=self._payloads[index]
                )
                response = self._runtime.infer(request)
            except lrai.LraiError as error:
                with self._lock:
                    self.ledger.refused.append((index, error))
            else:
                with self._lock:
                    self.ledger.answered.append((index, response.outputs))
                    self.ledger.spans.append((started, time.monotonic()))


def test_a_killed_actor_costs_no_request_and_no_neighbour(
    minilm_fp32: lrai.Artifact,
    classifier_fp32: lrai.Artifact,
    minilm_session: onnxruntime.InferenceSession,
) -> None:
    payloads = requests(60, seed=1)
    expected = [minilm_session.run(None, payload)[0] for payload in payloads]
    beside = {"features": np.ones((1, 64), np.float32)}
    unhung = config(**{"actor.hang_seconds": 600})  # by its silence no death is noticed
    with lrai.Runtime.open(minilm_fp32, name="minilm", config=unhung) as runtime:
        runtime.load(classifier_fp32, name="classifier")
        neighbour_pid = pid_of(runtime, "classifier")
        neighbour = Load(runtime, "classifier", [beside], callers=1)
        load = Load(runtime, "minilm", payloads, callers=8)
        recoveries, kills = list[float](), list[float]()
        try:
            for _ in until_quick(recoveries, 2.0, least=3, start_seconds=0.2):
                time.sleep(0.5)
                kill(pid_of(runtime, "minilm"))
                started, before = time.monotonic(), len(load.ledger.answered)
                wait_until(lambda before=before: len(load.ledger.answered) > before + 8)  # type: ignore[misc]
                recoveries.append(time.monotonic() - started)
                kills.append(started)
        finally:
            ledger, neighbours = load.stop(), neighbour.stop()
        stats = runtime.stats()
        assert pid_of(runtime, "classifier") == neighbour_pid

    assert ledger.sent == len(ledger.answered) + len(ledger.refused)
    assert not ledger.refused  # one death per batch: every request was tried once more
    for index, outputs in ledger.answered:
        np.testing.assert_allclose(outputs["sentence_embedding"], expected[index], atol=1e-4)
    assert stats["actor_lost"] == len(recoveries)
    assert stats["batch_retried"] >= 1
    assert not neighbours.refused
    # Of the time without an actor the second quarter: it is not noticed at once that one is dead.
    without = [(at + 0.25 * s, at + 0.5 * s) for at, s in zip(kills, recoveries, strict=True)]
    meanwhile = [
        any(first < begun and end < last for begun, end in neighbours.spans)
        for first, last in without
    ]
    assert any(meanwhile), "it waited at each death"


def at_work(tmp_path: Path) -> dict[str, Any]:
    """Return settings of actors that are at work on 8 rows or more for longer than a test takes."""
    endless = python(
        tmp_path,
        "import sys, time\n"
        "from lrai_core.actor.actor import Actor, main\n"
        "execute = Actor._execute\n"
        "def slowly(self, message, frames):\n"
        "    if message.parts[0][0].shape[0] >= 8:\n"
        "        time.sleep(600)\n"
        "    execute(self, message, frames)\n"
        "Actor._execute = slowly\n"
        "main(sys.argv[1:])\n",
    )
    return {"actor.python": endless, "actor.hang_seconds": 600}


def test_a_request_whose_actor_dies_twice_ends_with_one_error(
    classifier_fp32: lrai.Artifact, tmp_path: Path
) -> None:
    with lrai.Runtime.open(classifier_fp32, config=config(**at_work(tmp_path))) as runtime:
        identity = runtime.submit(request(rows=8))
        for attempt in (1, 2):
            wait_until(counted(runtime, "batch_dispatched", attempt))
            kill(pid_of(runtime, "classifier"))
        with pytest.raises(lrai.ActorError, match=r"could not be answered.*SIGKILL") as poisoned:
            runtime.result(identity)
        assert poisoned.value.http_status == 500
        assert runtime.infer(request()).outputs["logits"].shape == (1, 10)
        assert runtime.stats()["actor_lost"] == 2


def test_a_request_that_kills_again_and_again_takes_the_model_from_nobody(
    classifier_fp32: lrai.Artifact, tmp_path: Path
) -> None:
    settings = config(**at_work(tmp_path), **{"actor.restart_limit": 2})
    with lrai.Runtime.open(classifier_fp32, config=settings) as runtime:
        runtime.infer(request())
        identity = ""
        for attempt in (1, 2, 3, 4):
            if attempt % 2:
                identity = runtime.submit(request(rows=8))
            wait_until(counted(runtime, "batch_dispatched", 1 + attempt))
            kill(pid_of(runtime, "classifier"))
            if not attempt % 2:
                with pytest.raises(lrai.ActorError, match="could not be answered"):
                    runtime.result(identity)
        assert runtime.infer(request()).outputs["logits"].shape == (1, 10)
        assert (runtime.stats()["actor_lost"], runtime.stats().get("model_failed", 0)) == (4, 0)


def test_mates_of_a_request_that_kills_its_actor_are_answered(minilm_fp32: lrai.Artifact) -> None:
    with lrai.Runtime.open(minilm_fp32, config=config()) as runtime:
        payloads = [sentence(np.random.default_rng(i), rows=8, length=12) for i in range(6)]
        ids = [
            runtime.submit(lrai.InferenceRequest(model_name="minilm", inputs=p)) for p in payloads
        ]
        wait_until(lambda: runtime.stats().get("batch_dispatched", 0) >= 1)
        kill(pid_of(runtime, "minilm"))
        shapes = [runtime.result(i).outputs["sentence_embedding"].shape for i in ids]
        assert shapes == [(8, 384)] * 6


def test_a_hung_actor_is_killed_and_replaced(classifier_fp32: lrai.Artifact) -> None:
    settings = config(**{"actor.hang_seconds": 1.5, "actor.hang_factor": 10})
    seen = list[lrai.Event]()
    with lrai.Runtime.open(classifier_fp32, config=settings, observers=[seen.append]) as runtime:
        pid = pid_of(runtime, "classifier")
        pause(pid)
        answer = runtime.infer(request())
        assert answer.outputs["logits"].shape == (1, 10)
        assert pid_of(runtime, "classifier") != pid
    # Of those that follow one may be slow to start, and hang too.
    first = next(event for event in seen if event.kind == "actor_hung")
    assert first.attributes["reason"] == "the model made no progress in 1.5 s"


def test_an_idle_actor_that_falls_silent_is_replaced(classifier_fp32: lrai.Artifact) -> None:
    settings = config(**{"actor.hang_seconds": 1.5})
    with lrai.Runtime.open(classifier_fp32, config=settings) as runtime:
        pause(pid_of(runtime, "classifier"))
        wait_until(counted(runtime, "actor_ready", 2))
        assert runtime.ready() == "idle"


def test_a_crash_loop_is_stopped_and_reported(classifier_fp32: lrai.Artifact) -> None:
    settings = config(**{"actor.restart_limit": 2})
    with lrai.Runtime.open(classifier_fp32, config=settings) as runtime:
        for life in range(1, 4):
            wait_until(counted(runtime, "actor_started", life))
            kill(pid_of(runtime, "classifier"))
        wait_until(counted(runtime, "model_failed", 1))
        with pytest.raises(lrai.ActorError, match="crash loop: 3 deaths within 60 s"):
            runtime.infer(request())
        assert runtime.ready() == "dead"


def limited(tmp_path: Path, pid: int) -> str:
    """Return an interpreter whose processes may take 200 MB more than one takes now."""
    status = Path(f"/proc/{pid}/status").read_text()
    used_kib = int(status.partition("VmSize:")[2].split()[0])
    made = tmp_path / "limited"
    made.write_text(f'#!/bin/sh\nulimit -v {used_kib + 200_000}\nexec {sys.executable} "$@"\n')
    made.chmod(0o700)
    return str(made)


def test_a_call_that_memory_does_not_suffice_for_says_so_and_harms_no_other(
    minilm_fp32: lrai.Artifact, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    with lrai.Runtime.open(minilm_fp32, config=config()) as runtime:
        interpreter = limited(tmp_path, pid_of(runtime, "minilm"))
    with lrai.Runtime.open(minilm_fp32, config=config(**{"actor.python": interpreter})) as runtime:
        actor = pid_of(runtime, "minilm")
        large, small = (sentence(random, rows, length=128) for rows in (400, 2))
        with pytest.raises(lrai.ActorError, match=r"refused the request.*(alloc|memory)"):
            runtime.infer(lrai.InferenceRequest(model_name="minilm", inputs=large))
        answer = runtime.infer(lrai.InferenceRequest(model_name="minilm", inputs=small))
        assert answer.outputs["sentence_embedding"].shape == (2, 384)
        assert pid_of(runtime, "minilm") == actor


def test_calls_that_memory_does_not_suffice_for_get_smaller_and_all_are_answered(
    tmp_path: Path,
) -> None:
    artifact = small_artifact.build(tmp_path / "small.lrai", wide=500_000)  # 6 MB for a row
    seen = list[lrai.Event]()

    def threefold(number: int) -> lrai.InferenceRequest:
        inputs = {"x": np.full((1, 3), number, np.float32)}
        return lrai.InferenceRequest(model_name="small", inputs=inputs)

    with lrai.Runtime.open(artifact, config=config()) as runtime:
        runtime.infer(threefold(0))
        interpreter = limited(tmp_path, pid_of(runtime, "small"))
    settings = config(**{"actor.python": interpreter, "actor.hang_seconds": 60})
    with lrai.Runtime.open(artifact, config=settings, observers=[seen.append]) as runtime:
        actor = pid_of(runtime, "small")
        for _ in range(2):
            before = dispatched(runtime)
            pause(actor)
            ids = [runtime.submit(threefold(0))]
            wait_until(lambda before=before: dispatched(runtime) > before)  # type: ignore[misc]
            ids += [runtime.submit(threefold(number)) for number in range(1, 41)]
            kill(actor, signal.SIGCONT)
            answers = [runtime.result(identity).outputs["y"].tolist() for identity in ids]
            assert answers == [[[2 * number] * 3] for number in range(41)]
        assert pid_of(runtime, "small") == actor
        assert runtime.stats()["limit_unreachable"] == 1
        count = dispatched(runtime)
        wait_until(lambda: len(sizes(seen)) == count)  # observers hear of it later
    called = sizes(seen)
    largest = called.index(max(called))
    assert called[largest] > 34, "more than there is memory for"
    assert max(called[largest + 1 :]) == called[largest] // 2


def sizes(seen: Sequence[lrai.Event]) -> list[int]:
    """Return the rows of each call that was made."""
    return [event.attributes["rows"] for event in seen if event.kind == "batch_dispatched"]


def dispatched(runtime: lrai.Runtime) -> int:
    return runtime.stats().get("batch_dispatched", 0)


def test_calls_at_which_the_kernel_kills_the_actor_get_smaller(
    classifier_fp32: lrai.Artifact, tmp_path: Path
) -> None:
    killed = python(
        tmp_path,
        "import os, signal, sys\n"
        "from lrai_core.actor.actor import Actor, main\n"
        "execute = Actor._execute\n"
        "def with_little_memory(self, message, frames):\n"
        "    if message.parts[0][0].shape[0] >= 8:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    execute(self, message, frames)\n"
        "Actor._execute = with_little_memory\n"
        "main(sys.argv[1:])\n",
    )
    with lrai.Runtime.open(classifier_fp32, config=config(**{"actor.python": killed})) as runtime:
        for _ in range(3):
            actor, before = pid_of(runtime, "classifier"), dispatched(runtime)
            pause(actor)
            ids = [runtime.submit(request())]
            wait_until(lambda before=before: dispatched(runtime) > before)  # type: ignore[misc]
            ids += [runtime.submit(request()) for _ in range(12)]
            kill(actor, signal.SIGCONT)
            assert all(runtime.result(i).outputs["logits"].shape == (1, 10) for i in ids)
        stats = runtime.stats()
    assert (stats["actor_lost"], stats["limit_unreachable"]) == (1, 1)


def test_actors_end_with_their_parent(classifier_fp32: lrai.Artifact) -> None:
    program = (
        "import sys, time, lrai_core as l\n"
        "r = l.Runtime.open(sys.argv[1]); print(r.models()[0].actor_pids[0], flush=True)\n"
        "time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(classifier_fp32.path)], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    actor = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not alive(actor))


def test_actors_end_with_their_parent_though_a_fork_of_it_lives_on(
    classifier_fp32: lrai.Artifact,
) -> None:
    program = (
        "import os, sys, time, warnings, lrai_core as l\n"
        "warnings.simplefilter('ignore')\n"
        "r = l.Runtime.open(sys.argv[1])\n"
        "child = os.fork()\n"
        "if child: print(r.models()[0].actor_pids[0], child, r._backend.folder, flush=True)\n"
        "time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(classifier_fp32.path)], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    actor, fork, folder = parent.stdout.readline().split()
    try:
        parent.kill()
        parent.wait()
        wait_until(lambda: not alive(int(actor)))
        assert alive(int(fork))
        assert not Path(folder.decode()).exists()  # the last one turns off the light
    finally:
        kill(int(fork))
        parent.stdout.close()


def python(tmp_path: Path, program: str) -> str:
    """Return an interpreter that runs `program` in place of the actor, with its arguments."""
    script = tmp_path / "actor.py"
    script.write_text(program)
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nshift 3\nexec {sys.executable} {script} "$@"\n')
    wrapper.chmod(0o700)
    return str(wrapper)


def test_an_actor_of_another_version_is_refused_with_the_setting_to_look_at(
    classifier_fp32: lrai.Artifact, tmp_path: Path
) -> None:
    other = python(
        tmp_path,
        "import sys\n"
        "from lrai_core.wire import messages\n"
        "messages.PROTOCOL_VERSION = 99\n"
        "from lrai_core.actor.actor import main\n"
        "main(sys.argv[1:])\n",
    )
    with pytest.raises(
        lrai.EnvironmentProblem, match=rf"version 99, not {PROTOCOL_VERSION}: actor\.python"
    ):
        lrai.Runtime.open(classifier_fp32, config=config(**{"actor.python": other}))


@pytest.mark.parametrize(
    "answer", ['b"\\xff" * 40', "messages.encode(messages.Executed(0, 0.1, ()))"]
)
def test_an_actor_that_breaks_the_protocol_is_replaced_and_its_request_answered(
    classifier_fp32: lrai.Artifact, tmp_path: Path, answer: str
) -> None:
    broken = python(
        tmp_path,
        "import sys\n"
        "from pathlib import Path\n"
        "from lrai_core.wire import messages\n"
        "from lrai_core.actor.actor import Actor, main\n"
        f"once = Path({str(tmp_path / 'once')!r})\n"
        "if not once.exists():\n"
        "    once.touch()\n"
        f"    Actor._execute = lambda self, *_: self._socket.send({answer})\n"
        "main(sys.argv[1:])\n",
    )
    seen: list[lrai.Event] = []
    with lrai.Runtime.open(
        classifier_fp32, config=config(**{"actor.python": broken}), observers=[seen.append]
    ) as runtime:
        assert runtime.infer(request()).outputs["logits"].shape == (1, 10)
        stats = runtime.stats()
    assert (stats["dropped_frames"], stats["actor_lost"]) == (1, 1)
    (lost,) = [event for event in seen if event.kind == "actor_lost"]
    assert "broke the protocol" in lost.attributes["reason"]


def test_an_actor_that_prints_and_starts_programs_disturbs_nothing(
    classifier_fp32: lrai.Artifact, tmp_path: Path
) -> None:
    noisy = python(
        tmp_path,
        "import os, subprocess, sys\n"
        "from lrai_core.actor import actor\n"
        "beat = actor._beat\n"
        "def after(*arguments):\n"
        "    os.write(1, b'noise'), sys.stdin.read()\n"
        "    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "    beat(*arguments)\n"
        "actor._beat = after\n"
        "actor.main(sys.argv[1:])\n",
    )
    with lrai.Runtime.open(classifier_fp32, config=config(**{"actor.python": noisy})) as runtime:
        time.sleep(0.3)
        assert runtime.infer(request()).outputs["logits"].shape == (1, 10)
        kill(pid_of(runtime, "classifier"))
        wait_until(counted(runtime, "actor_lost", 1))  # its child does not hold the line
        assert runtime.infer(request()).outputs["logits"].shape == (1, 10)
        assert "actor_hung" not in runtime.stats()


def test_unloading_a_stopped_actor_keeps_no_other_model_waiting(
    classifier_fp32: lrai.Artifact,
) -> None:
    with lrai.Runtime.open(classifier_fp32, name="a", config=config()) as runtime:
        runtime.load(classifier_fp32, name="classifier")
        pid = pid_of(runtime, "a")
        pause(pid)
        started = time.monotonic()
        runtime.unload("a")
        assert runtime.infer(request()).outputs["logits"].shape == (1, 10)
        assert time.monotonic() - started < 10
        wait_until(lambda: not alive(pid))
        assert runtime.stats().get("actor_lost", 0) == 0


def test_drain_answers_what_was_accepted_and_refuses_the_rest(
    classifier_fp32: lrai.Artifact,
) -> None:
    with lrai.Runtime.open(classifier_fp32, config=config()) as runtime:
        ids = [runtime.submit(request()) for _ in range(50)]
        assert runtime.drain()
        with pytest.raises(lrai.NotReady, match="draining"):
            runtime.infer(request())
        assert all(runtime.result(i).outputs["logits"].shape == (1, 10) for i in ids)


def test_a_late_answer_is_refused_in_time(classifier_fp32: lrai.Artifact) -> None:
    with lrai.Runtime.open(
        classifier_fp32, config=config(**{"actor.hang_seconds": 600})
    ) as runtime:
        pause(pid_of(runtime, "classifier"))
        started = time.monotonic()
        with pytest.raises(lrai.DeadlineExceeded):
            runtime.infer(request(timeout_ms=200))
        assert time.monotonic() - started < 30  # who names no time is given 60
        kill(pid_of(runtime, "classifier"), signal.SIGCONT)
        assert runtime.infer(request()).outputs["logits"].shape == (1, 10)


def request(*, rows: int = 1, timeout_ms: float | None = None) -> lrai.InferenceRequest:
    features = np.zeros((rows, 64), np.float32)
    return lrai.InferenceRequest(
        model_name="classifier", inputs={"features": features}, timeout_ms=timeout_ms
    )


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
