"""The pool over processes in name only: the tests speak for the actors, and move the clock."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from lrai_core.actor import pool as module
from lrai_core.actor.pool import Pool
from lrai_core.config import ActorConfig
from lrai_core.errors import ArtifactError, EnvironmentProblem, LraiError, NotReady, OutOfResources
from lrai_core.events import EventBus
from lrai_core.protocol import ValidRequest
from lrai_core.wire import messages
from lrai_core.wire.messages import (
    PROTOCOL_VERSION,
    Execute,
    Executed,
    Hello,
    Load,
    LoadFailed,
    Ready,
    Refused,
    TensorFrame,
)
from lrai_core.wire.workers import Answered, Batch, Lost, Outcome
from tests.core.small_artifact import SIGNATURE

LOAD = Load("/folder", "model.onnx", "", "onnxruntime", False, 1, {}, SIGNATURE)
HANG_SECONDS = 1.0


class Process:
    """Stands in for `Popen`; holds the other ends of what the pool gives an actor."""

    def __init__(
        self, command: Sequence[str], *, stdin: int, stdout: int, start_new_session: bool
    ) -> None:
        del stdout, start_new_session
        self.pid = 1
        self.line = socket.socket(fileno=os.dup(stdin))
        address, identity, _ = command[-3:]
        self.socket = messages.connect(address, bytes.fromhex(identity))
        self.status: int | None = None

    def say(self, message: messages.FromActor, *frames: bytes) -> None:
        self.socket.send_multipart([messages.encode(message), *frames])

    def heard(self) -> tuple[Execute, bytes]:
        """Return the next batch that it was sent, and its first frame of tensors."""
        while self.socket.poll(60_000):
            header, *frames = self.socket.recv_multipart()
            message = messages.decode_to_actor(header)
            if isinstance(message, Execute):  # the model comes before
                return message, [*frames, b""][0]
        raise AssertionError("no batch came")

    def kill(self) -> None:
        self.status = -9 if self.status is None else self.status
        self.line.close()
        self.socket.context.destroy(linger=0)

    def poll(self) -> int | None:
        return self.status

    def wait(self) -> int:
        return self.status or 0


class Bench:
    """A pool with one actor, which is ready."""

    def __init__(self, folder: Path, clock: SimpleNamespace) -> None:
        self.clock = clock
        self.events = EventBus()
        config = ActorConfig(hang_seconds=HANG_SECONDS, hang_factor=10, heartbeat_ms=100)
        self.pool = Pool(folder, config, self.events)
        self.poller = zmq.Poller()
        self.pool.register(self.poller)
        self.pool.add("m", LOAD, Future())
        self.look()  # starts it
        self.hear(Hello(PROTOCOL_VERSION))
        self.hear(Ready(0.1))
        assert self.pool.state("m")[0] == "ready"

    @property
    def process(self) -> Process:
        process: Any = self.pool._actors["m"].process
        assert isinstance(process, Process)
        return process

    def hear(self, message: messages.FromActor, *frames: bytes) -> list[Outcome]:
        self.process.say(message, *frames)
        assert self.pool._socket.poll(60_000)
        return self.poll()

    def poll(self, seconds: float = 0.0) -> list[Outcome]:
        """Return what came of batches, that much later."""
        self.clock.now += seconds
        outcomes = self.look()
        return outcomes + self.look()  # what was killed is gone by now

    def look(self) -> list[Outcome]:
        return self.pool.poll(self.clock.now, dict(self.poller.poll(0)))

    def dispatch(self, *batches: int) -> None:
        one = ValidRequest((np.zeros((1, 1), np.float32),), 1, 0, (), ("g",), 4)
        for batch in batches:
            self.pool.dispatch("m", Batch(batch, [one], 0.01))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "Popen", Process)
    made = Bench(tmp_path, clock)
    yield made
    made.pool.close()


def done(batch: int) -> Executed:
    """Return the answer to a batch of one request that wants nothing."""
    return Executed(batch, 0.01, ())


def test_two_batches_are_answered_in_order(bench: Bench) -> None:
    bench.dispatch(1, 2)
    assert bench.hear(done(1)) == [Answered(1, [[]], 0.01)]
    assert bench.hear(done(2)) == [Answered(2, [[]], 0.01)]
    assert "actor_lost" not in bench.events.counts()


def test_of_two_batches_in_an_actor_that_dies_the_second_was_not_begun(bench: Bench) -> None:
    bench.dispatch(1, 2)
    bench.process.kill()
    why = "the model's process ended with signal SIGKILL"
    assert bench.poll() == [Lost(1, why, killed=True), Lost(2, why, begun=False, killed=True)]


@pytest.mark.parametrize(
    ("status", "how"),
    [(-signal.SIGTERM, "signal SIGTERM"), (-40, "signal 40"), (3, "exit status 3")],
)
def test_a_death_is_told_as_what_it_was(bench: Bench, status: int, how: str) -> None:
    bench.dispatch(1)
    bench.process.status = status
    bench.process.kill()
    (lost,) = bench.poll()
    assert isinstance(lost, Lost)
    assert lost.message == f"the model's process ended with {how}"
    assert not lost.killed


@pytest.mark.parametrize(("more", "says"), [(0, False), (1, True)])
def test_a_death_at_which_the_kernel_killed_for_memory_says_so(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int, says: bool
) -> None:
    told = tmp_path / "memory.events"
    monkeypatch.setattr(module, "_MEMORY", told)

    def count(kills: int) -> None:
        told.write_text(f"low 0\nmax 9\noom 4\noom_kill {kills}\noom_group_kill 0\n")

    count(3)
    bench.process.kill()  # the next one begins with this count
    bench.poll()
    while bench.pool.state("m")[0] == "waiting":
        bench.poll(1.0)
    bench.hear(Hello(PROTOCOL_VERSION))
    bench.hear(Ready(0.1))
    bench.dispatch(1)
    count(3 + more)
    bench.process.kill()
    (lost,) = bench.poll()
    assert isinstance(lost, Lost)
    assert lost.killed
    why = "the model's process ended with signal SIGKILL"
    more_words = " (memory has run out since it was started: oom_kill)"
    assert lost.message == why + more_words * says


def test_who_waits_for_an_actor_that_is_removed_is_told(bench: Bench) -> None:
    loaded: Future[None] = Future()
    bench.pool.add("n", LOAD, loaded)
    bench.poll()
    bench.pool.remove("n")
    with pytest.raises(NotReady, match="closed, or the model removed"):
        loaded.result(0)


def test_after_the_first_was_answered_the_second_was_begun(bench: Bench) -> None:
    bench.dispatch(1, 2)
    bench.hear(done(1))
    bench.process.kill()
    (lost,) = bench.poll()
    assert isinstance(lost, Lost)
    assert (lost.batch, lost.begun) == (2, True)


def test_behind_a_refused_batch_the_next_one_runs(bench: Bench) -> None:
    bench.dispatch(1, 2)
    assert bench.hear(Refused(1, "bad shape")) == [Refused(1, "bad shape")]
    assert bench.hear(done(2)) == [Answered(2, [[]], 0.01)]


@pytest.mark.parametrize(
    "message", [done(2), Refused(2, ""), Executed(1, 0.01, (TensorFrame("FP32", (0,), 0, 0, 0),))]
)
def test_an_actor_that_answers_what_it_is_not_at_is_replaced(
    bench: Bench, message: messages.FromActor
) -> None:
    bench.dispatch(1, 2)
    why = "the model's process broke the protocol"
    first, second = bench.hear(message)
    assert isinstance(first, Lost)
    assert isinstance(second, Lost)
    assert first.message.startswith(why)
    assert (first.begun, second.begun) == (True, False)


def test_a_batch_is_given_its_time_from_when_the_one_before_it_ended(bench: Bench) -> None:
    bench.dispatch(1, 2)
    bench.poll(0.8 * HANG_SECONDS)
    bench.hear(done(1))
    assert bench.poll(0.8 * HANG_SECONDS) == []
    (lost,) = bench.poll(0.3 * HANG_SECONDS)
    assert isinstance(lost, Lost)
    assert not lost.killed, "by us, which says nothing of memory"
    assert bench.events.counts()["actor_hung"] == 1


def test_neither_another_batch_nor_a_sign_of_life_gives_the_first_more_time(bench: Bench) -> None:
    bench.dispatch(1)
    bench.poll(0.8 * HANG_SECONDS)
    bench.dispatch(2)
    bench.process.line.send(b".")
    assert len(bench.poll(0.3 * HANG_SECONDS)) == 2
    assert bench.events.counts()["actor_hung"] == 1


def test_a_source_model_in_a_variants_place_may_take_as_long_as_loading(bench: Bench) -> None:
    """Nobody has measured it here, so what is predicted is made up."""
    actor = bench.pool._actors["m"]
    actor.load = msgspec.structs.replace(LOAD, optimise=True)
    bench.dispatch(1)
    waited = 0
    while not bench.poll(1.0):
        waited += 1
    assert waited == round(ActorConfig().start_timeout_seconds) - 1
    assert bench.events.counts()["actor_hung"] == 1


@pytest.mark.parametrize(
    ("first", "between", "deaths"), [(False, False, 6), (True, False, 11), (True, True, 0)]
)
def test_who_dies_of_requests_is_given_up_where_no_other_is_answered(
    bench: Bench, first: bool, between: bool, deaths: int
) -> None:
    """By a limit of 5: one that never answered, and one that six requests in a row have killed."""
    for number in range(0, 60, 2):
        if bench.pool.state("m")[0] == "failed":
            break
        if first and (between or not number):
            bench.dispatch(number)
            bench.hear(done(number))
        bench.dispatch(number + 1)
        bench.process.kill()
        bench.poll()
        while bench.pool.state("m")[0] == "waiting":
            bench.poll(1.0)
        if bench.pool.state("m")[0] != "failed":
            bench.hear(Hello(PROTOCOL_VERSION))
            bench.hear(Ready(0.1))
    counts = bench.events.counts()
    assert counts.get("model_failed", 0) == bool(deaths)
    assert counts["actor_lost"] == (deaths or 30)


def test_an_idle_actor_shows_that_it_is_alive(bench: Bench) -> None:
    for _ in range(3):
        bench.process.line.send(b".")
        bench.poll(0.8 * HANG_SECONDS)
    assert "actor_hung" not in bench.events.counts()
    bench.poll(1.1 * HANG_SECONDS)
    assert bench.events.counts()["actor_hung"] == 1


def asked(value: float, rows: int = 1, columns: int = 3) -> ValidRequest:
    array = np.full((rows, columns), value, np.float32)
    return ValidRequest((array,), rows, 0, (0,), ("g",), array.nbytes)


def test_small_requests_are_joined_before_they_are_sent_and_get_their_own_rows(
    bench: Bench,
) -> None:
    bench.pool.dispatch("m", Batch(1, [asked(1.0), asked(2.0, rows=2)], 0.01))
    execute, joined = bench.process.heard()
    ((tensor,),) = execute.parts
    assert (execute.outputs, tensor.shape) == ((0,), (3, 3))
    (answered,) = bench.hear(Executed(1, 0.01, (tensor,)), joined)
    assert isinstance(answered, Answered)
    assert [answer[0][:, 0].tolist() for answer in answered.answers] == [[1.0], [2.0, 2.0]]
    assert all(answer[0].base is None for answer in answered.answers), "everybody has a copy"


def test_large_requests_are_sent_as_they_are(bench: Bench) -> None:
    large = messages.OWN_FRAME_BYTES // 4
    requests = [asked(1.0, columns=large), asked(2.0, columns=large)]
    bench.pool.dispatch("m", Batch(1, requests, 0.01))
    execute, _ = bench.process.heard()
    assert [part[0].shape for part in execute.parts] == [(1, large), (1, large)]


def test_a_model_that_does_not_keep_rows_apart_answers_nobody(bench: Bench) -> None:
    bench.pool.dispatch("m", Batch(1, [asked(1.0), asked(2.0)], 0.01))
    whole = TensorFrame("FP32", (1, 3), 0, 0, 12)
    why = "output 'y' has shape [1, 3] for 2 rows"
    assert bench.hear(Executed(1, 0.01, (whole,)), bytes(12)) == [Refused(1, why, invalid=False)]


def test_who_was_stopped_with_its_actors_kills_none_of_them(bench: Bench) -> None:
    """A container that is paused for a while: nobody has heard of anybody."""
    bench.dispatch(1)
    before = bench.process
    bench.poll(60.0)
    assert bench.process is before
    bench.poll(HANG_SECONDS * 0.9)
    assert bench.process is before
    bench.poll(HANG_SECONDS)
    bench.poll()
    assert bench.pool.state("m")[0] != "ready", "since then it was silent for too long"


@pytest.mark.parametrize("seconds", [3, 100])
def test_an_actor_that_cannot_be_started_again_at_once_is_started_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """Where descriptors are short for a while, say: neither the model is given up nor the loop."""

    def none_left() -> object:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("socket.socketpair", none_left)
        bench.process.kill()
        for _ in range(seconds):
            bench.poll(1.0)
    assert bench.events.counts()["actor_lost"] >= 2
    assert "model_failed" not in bench.events.counts()
    while bench.pool.state("m")[0] == "waiting":
        bench.poll(1.0)
    bench.hear(Hello(PROTOCOL_VERSION))
    bench.hear(Ready(0.1))
    assert bench.pool.state("m")[0] == "ready"


def test_an_interpreter_that_is_gone_is_given_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> object:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr("lrai_core.actor.pool.Popen", gone)
    bench.process.kill()
    for _ in range(100):
        bench.poll(1.0)
    assert bench.pool.state("m")[0] == "failed"
    assert bench.events.counts()["model_failed"] == 1


def test_a_model_that_could_be_opened_before_is_opened_again(bench: Bench) -> None:
    """What it lacks for a moment, memory say, is no reason to give it up."""
    bench.process.kill()
    bench.poll()
    for _ in range(2):
        while bench.pool.state("m")[0] == "waiting":
            bench.poll(1.0)
        bench.hear(Hello(PROTOCOL_VERSION))
        bench.hear(LoadFailed("cannot allocate memory", environment=True))
        bench.poll()
        assert bench.pool.state("m")[0] != "failed"
    assert bench.events.counts()["actor_lost"] == 3
    while bench.pool.state("m")[0] == "waiting":
        bench.poll(1.0)
    bench.hear(Hello(PROTOCOL_VERSION))
    bench.hear(Ready(0.1))
    assert bench.pool.state("m")[0] == "ready"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (-signal.SIGKILL, OutOfResources),
        (-signal.SIGTERM, OutOfResources),  # to a whole service, before an actor ignores it
        (-signal.SIGSEGV, ArtifactError),
    ],
)
def test_who_is_killed_while_it_opens_a_model_may_open_it_another_time(
    bench: Bench, status: int, kind: type[LraiError]
) -> None:
    loaded: Future[None] = Future()
    bench.pool.add("n", LOAD, loaded)
    bench.poll()
    process: Any = bench.pool._actors["n"].process
    process.status = status
    process.kill()
    bench.poll()
    with pytest.raises(kind, match="while it opened the model") as raised:
        loaded.result(0)
    assert type(raised.value) is kind


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EAGAIN, OutOfResources), (errno.ENOENT, EnvironmentProblem)]
)
def test_who_cannot_be_started_for_want_of_processes_may_be_another_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[LraiError]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, "Popen", refuse)
    loaded: Future[None] = Future()
    bench.pool.add("n", LOAD, loaded)
    bench.poll()
    with pytest.raises(kind, match=f"cannot be started: {os.strerror(number)}") as raised:
        loaded.result(0)
    assert type(raised.value) is kind
