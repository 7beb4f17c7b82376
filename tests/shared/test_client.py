"""The client against a daemon that the test plays itself, frame by frame."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

import lrai_core as lrai
from lrai_core.wire import messages as wire
from lrai_core.wire.arena import Arenas
from lrai_core.wire.messages import (
    PROTOCOL_VERSION,
    Packer,
    Segment,
    TensorFrame,
    encode,
    listen,
    unpack,
)
from lrai_shared import client, messages
from lrai_shared.arena import Arena
from lrai_shared.client import Attached
from lrai_shared.messages import Answer, Call, Failure, Replies, Requests, Returned, decode_form
from lrai_shared.starting import is_running, shared_folder, start_daemon


class Daemon:
    """A daemon's end of the socket, and its lock, so that no real one is started."""

    def __init__(self, folder: Path, credit: int = 100) -> None:
        self.credit, self.session, self.version = credit, "first", PROTOCOL_VERSION
        self.arenas, self.shares = Arenas(), False
        self.segment: Segment | None = None  # that the client last named
        self._begun, self._signs = "", 0  # the session that is known; signs of life so far
        self.taken: list[messages.Infer] = []
        self.clients: list[Attached] = []
        self._lock = (folder / "lock").open("ab")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._socket = listen(f"ipc://{folder}/clients")
        self._peer = b""

    def close(self) -> None:
        self._lock.close()
        self._socket.context.destroy(linger=0)

    def begin(self) -> None:
        """Answer the sign of life with which a session begins: so far no arena is read."""
        self._hear(lambda: bool(self._peer))
        self._begun = self.session
        self._attach(b"")

    def welcome(self) -> None:
        """Answer every sign of life that has come; as a session begins, one that follows, too."""
        if self._begun != self.session:
            self.begin()
            if not self.shares:
                return  # there is no more to say
            heard = self._signs
            self._hear(lambda: self._signs > heard)
        self._attach(self.segment.id if self.segment and self.shares else b"")

    def _attach(self, arena: bytes) -> None:
        self.send(messages.Attached(self.version, "0.0", self.session, self.credit, arena))

    def take(self, count: int) -> list[messages.Infer]:
        """Return so many requests, the oldest first."""
        self._hear(lambda: len(self.taken) >= count)
        taken, self.taken = self.taken[:count], self.taken[count:]
        return taken

    def call(self) -> Call:
        """Return the next call."""
        call: Call = self._hear(lambda: False, want=Call)
        return call

    def cancelled(self) -> tuple[int, ...]:
        """Return the keys that the next message with some cancels."""
        while True:
            message = self._hear(lambda: False, want=Requests)
            if message.cancelled:
                return tuple(message.cancelled)

    def quiet(self, seconds: float = 0.3) -> bool:
        """Return whether no request comes for so long."""
        deadline = time.monotonic() + seconds
        self._hear(lambda: bool(self.taken) or time.monotonic() > deadline)
        return not self.taken

    def send(self, message: messages.ToClient, frames: list[Any] | None = None) -> None:
        self._socket.send_multipart([self._peer, encode(message), *(frames or [b""])])

    def answer(self, *items: messages.Infer) -> None:
        """Answer with the key, in the wire's form."""
        packer = Packer()
        answers = tuple(
            Answer(i.key, "m", "1", {}, ("y",), packer.pack([np.array([i.key])])) for i in items
        )
        self.send(Replies(answers), list(packer.frames()))

    def garbage(self, *frames: bytes) -> None:
        self._socket.send_multipart([self._peer, *frames])

    def _hear(self, enough: Callable[[], bool], want: Any = None) -> Any:
        deadline = time.monotonic() + 60
        while not enough():
            assert time.monotonic() < deadline, "the client did not send what was expected"
            if not self._socket.poll(10):
                continue
            self._peer, header, *_ = self._socket.recv_multipart()
            message = messages.decode_from_client(header)
            if isinstance(message, Requests):
                self.taken += message.items
            if isinstance(message, messages.Attach):
                self.segment, self._signs = message.arena, self._signs + 1
            if want is not None and isinstance(message, want):
                return message
        return None


def config(folder: Path, **values: Any) -> lrai.LraiConfig:
    return lrai.load_config(call={"runtime.socket_dir": str(folder)} | values)


@pytest.fixture
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")  # short: the path of a socket has 107 characters


@pytest.fixture
def daemon(parent: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    """Return a daemon whose clients end before it does, and before what was patched is as it was.

    One with a request that is open would start a real one in its place.
    """
    made = Daemon(shared_folder(config(parent)))
    yield made
    for one in made.clients:
        one.close()
    made.close()


def attach(daemon: Daemon, parent: Path, **values: Any) -> Attached:
    """Return a client that `daemon` has welcomed, and is closed with it."""
    thread = threading.Thread(target=daemon.welcome)
    thread.start()
    made = Attached(config(parent, **values))
    daemon.clients.append(made)
    thread.join()
    deadline = time.monotonic() + 20
    while made._sharing != daemon.shares:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return made


@pytest.fixture
def attached(daemon: Daemon, parent: Path) -> Attached:
    return attach(daemon, parent)


def request(**changes: Any) -> lrai.InferenceRequest:
    given: dict[str, Any] = {"model_name": "m", "inputs": {"x": np.zeros(2, np.float32)}}
    return lrai.InferenceRequest(**(given | changes))


def value(future: Future[lrai.InferenceResponse]) -> int:
    return int(future.result(20).outputs["y"][0])


def let_pass(attached: Attached, item: messages.Infer) -> None:
    """Have the deadline of a request be over, which was far away so that it was sent."""
    attached._asked[item.key].deadline = time.monotonic()


def call(attached: Attached, operation: str, results: list[Any]) -> threading.Thread:
    thread = threading.Thread(target=lambda: results.append(attached.call(operation, {}, str)))
    thread.start()
    return thread


def test_every_caller_gets_its_own_answer_in_whatever_order_they_come(
    daemon: Daemon, attached: Attached
) -> None:
    futures = [attached.start(request(id=str(i))) for i in range(5)]
    items = daemon.take(5)
    daemon.answer(*items[3:])
    daemon.answer(*reversed(items[:3]))
    assert [value(f) for f in futures] == [item.key for item in items]
    assert [f.result().id for f in futures] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("shares", [False, True])
def test_large_tensors_wait_for_the_room_that_the_queue_has_wherever_they_lie(
    daemon: Daemon, parent: Path, *, shares: bool
) -> None:
    daemon.shares = shares
    attached = attach(daemon, parent, **{"scheduler.max_queue_bytes": 1 << 20})
    large = {"x": np.zeros(1 << 17, np.float32)}  # half of it
    futures = [attached.start(request(inputs=large)) for _ in range(5)]
    first = daemon.take(2)
    assert daemon.quiet()
    daemon.answer(first[0])
    third = daemon.take(1)
    assert daemon.quiet()
    daemon.answer(first[1], *third)
    daemon.answer(*daemon.take(2))
    assert [value(future) for future in futures] == [1, 2, 3, 4, 5]
    huge = attached.start(request(inputs={"x": np.zeros(1 << 20, np.float32)}))
    daemon.answer(*daemon.take(1))  # alone it may
    value(huge)


def test_what_would_be_too_much_beside_others_waits_for_them(daemon: Daemon, parent: Path) -> None:
    attached = attach(daemon, parent, **{"scheduler.max_queue_bytes": 1 << 20})
    sizes = (200_000, 200_000, 100)  # numbers of 4 bytes
    inputs = [{"x": np.zeros(size, np.float32)} for size in sizes]
    inputs.append({"x": np.array(["a" * 600_000])})  # in memory as large again, at most
    futures = [attached.start(request(inputs=each)) for each in inputs]
    for count in (1, 2, 1):
        items = daemon.take(count)
        assert daemon.quiet()
        daemon.answer(*items)
    assert [value(future) for future in futures] == [1, 2, 3, 4]


def test_a_request_that_is_too_large_is_told_by_which_setting(attached: Attached) -> None:
    attached._most_bytes = 7
    words = "8 bytes; one request has 7 at most, see limits.request_bytes"
    with pytest.raises(lrai.RequestError, match=words):
        attached.start(request())


@pytest.mark.parametrize("dtype", [np.object_, np.str_, np.bytes_])
def test_more_texts_than_the_daemon_would_read_are_not_made_bytes(
    daemon: Daemon, attached: Attached, dtype: type[np.generic], monkeypatch: pytest.MonkeyPatch
) -> None:
    attached._most_bytes = 10 * 64
    future = attached.start(request(inputs={"s": np.full((5, 2), "a", dtype)}))
    daemon.answer(*daemon.take(1))
    assert value(future) == 1
    monkeypatch.setattr("lrai_core.protocol._text", lambda _: pytest.fail("one was read"))
    with pytest.raises(lrai.InvalidTensor, match="'s': 11 elements, at most 10 are left"):
        attached.start(request(inputs={"s": np.full(11, "a", dtype)}))


def test_what_waits_together_is_sent_together_but_never_too_much(
    daemon: Daemon, attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_MOST_ITEMS", 3)
    futures = [attached.start(request()) for _ in range(20)]
    sizes: list[int] = []
    while sum(sizes) < 20:
        message = daemon._hear(lambda: False, want=Requests)
        sizes.append(len(message.items))
    assert max(sizes) <= 3
    daemon.answer(*daemon.taken)
    assert len({value(f) for f in futures}) == 20


def test_what_requests_say_beside_tensors_counts_for_the_size_of_a_message(
    daemon: Daemon, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message whose header is too large is dropped, and all that was asked with it."""
    monkeypatch.setattr(client, "_MOST_JOINT", 60_000)
    daemon.credit = 0
    attached = attach(daemon, parent)
    futures = [attached.start(request(parameters={"a": "b" * 10_000})) for _ in range(20)]
    daemon.credit, daemon.session = 100, "second"  # now all of them may go
    daemon.welcome()
    for _ in range(7):
        message = daemon._hear(lambda: False, want=Requests)
        assert len(message.items) <= 3
    daemon.answer(*daemon.take(20))
    assert len({value(f) for f in futures}) == 20


def test_no_more_requests_are_on_their_way_than_there_is_credit(
    daemon: Daemon, parent: Path
) -> None:
    daemon.credit = 2
    attached = attach(daemon, parent)
    futures = [attached.start(request()) for _ in range(4)]
    first, second = daemon.take(2)
    assert daemon.quiet()
    daemon.answer(second)
    (third,) = daemon.take(1)
    assert daemon.quiet()
    daemon.answer(first, third)
    daemon.answer(*daemon.take(1))
    assert len({value(f) for f in futures}) == 4


@pytest.mark.parametrize("none", [float("nan"), -(10**400)], ids=["nan", "negative"])
def test_what_is_no_time_is_not_waited_for(attached: Attached, none: float) -> None:
    future = attached.start(request(timeout_ms=none))  # of a daemon that does not answer
    with pytest.raises(lrai.DeadlineExceeded):
        future.result(20)


def test_a_time_of_numpy_is_a_time_and_ends_nobody(daemon: Daemon, attached: Attached) -> None:
    times: list[Any] = [np.float64(5e3), 5e3, np.float32(5e3), np.int64(5000)]
    for pair in (times[:2], times[2:]):
        futures = [attached.start(request(timeout_ms=time)) for time in pair]
        items = daemon.take(2)
        assert [type(item.timeout_ms) for item in items] == [float, float]
        daemon.answer(*items)
        assert len({value(future) for future in futures}) == 2


def test_no_more_requests_wait_to_be_sent_than_a_queue_takes(daemon: Daemon, parent: Path) -> None:
    daemon.credit = 2
    attached = attach(daemon, parent, **{"scheduler.max_queue_rows": 3})
    waiting = [attached.start(request()) for _ in range(2)]
    daemon.take(2)
    waiting += [attached.start(request()) for _ in range(3)]
    with pytest.raises(lrai.QueueFull, match="3 requests of this process wait to be sent") as full:
        attached.start(request())
    assert full.value.limit == 3
    waiting[-1].cancel()


def test_operations_use_up_no_credit_and_need_none(daemon: Daemon, parent: Path) -> None:
    daemon.credit = 1
    attached = attach(daemon, parent)
    future, results = attached.start(request()), list[Any]()
    (item,) = daemon.take(1)
    for _ in range(3):
        thread = call(attached, "ready", results)
        daemon.send(Returned(daemon.call().key, "ok"))
        thread.join(20)
    assert results == ["ok"] * 3
    daemon.answer(item)
    assert value(future) == item.key
    future = attached.start(request())
    daemon.answer(*daemon.take(1))
    value(future)


def test_a_new_session_gets_what_was_not_answered_once_more(
    daemon: Daemon, attached: Attached
) -> None:
    futures = [attached.start(request(model_name=name)) for name in "abc"]
    items = daemon.take(3)
    daemon.answer(items[0])
    assert value(futures[0]) == items[0].key
    daemon.session = "second"
    daemon.welcome()
    again = daemon.take(2)
    assert [(i.key, i.form) for i in again] == [(i.key, i.form) for i in items[1:]]
    assert [decode_form(i.form).model_name for i in again] == ["b", "c"]
    daemon.answer(items[1])  # of the first session, on its way when the second began
    daemon.answer(*again)
    assert [value(f) for f in futures[1:]] == [i.key for i in again]


def test_an_operation_is_asked_again_of_the_next_daemon(daemon: Daemon, attached: Attached) -> None:
    results: list[Any] = []
    thread = call(attached, "load", results)
    key = daemon.call().key
    daemon.session = "second"
    daemon.welcome()
    assert daemon.call().key == key
    daemon.send(Returned(key, "m"))
    thread.join(20)
    assert results == ["m"]


def test_a_change_that_may_have_been_made_is_not_asked_for_again(
    daemon: Daemon, attached: Attached
) -> None:
    """Going back twice would lead forward."""
    with ThreadPoolExecutor(1) as caller:
        lost = caller.submit(attached.call, "rollback", {}, str)
        daemon.call()
        daemon.session = "second"
        daemon.welcome()
        with pytest.raises(lrai.NotReady, match="was lost while it was at it"):
            lost.result(20)
    results: list[Any] = []
    thread = call(attached, "ready", results)
    asked = daemon.call()
    assert asked.operation == "ready"
    daemon.send(Returned(asked.key, "ok"))
    thread.join(20)
    assert results == ["ok"]


def test_the_same_session_is_sent_nothing_twice(daemon: Daemon, attached: Attached) -> None:
    future = attached.start(request())
    (item,) = daemon.take(1)
    daemon.welcome()
    assert daemon.quiet()
    daemon.answer(item)
    value(future)


def test_a_cancelled_request_is_cancelled_at_the_daemon_at_once(
    daemon: Daemon, attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_LIFE_SECONDS", 30)  # what would send it along next
    future = attached.start(request())
    (item,) = daemon.take(1)
    time.sleep(0.3)  # nothing else is to be sent now
    started = time.monotonic()
    assert future.cancel()
    assert daemon.cancelled() == (item.key,)
    assert time.monotonic() - started < 10
    daemon.send(Replies(failures=(Failure(item.key, "DeadlineExceeded", "cancelled", {}),)))
    assert attached.drain()


def test_who_waits_for_several_hears_of_what_was_cancelled(
    daemon: Daemon, attached: Attached
) -> None:
    first, second = attached.start(request()), attached.start(request())
    items = daemon.take(2)
    assert first.cancel()
    assert first.cancel()
    assert not wait([first], timeout=20).not_done
    daemon.answer(*items)
    value(second)


def test_what_is_cancelled_before_it_is_sent_is_never_sent_and_not_waited_for(
    daemon: Daemon, parent: Path
) -> None:
    daemon.credit = 1
    attached = attach(daemon, parent)
    first, second = attached.start(request()), attached.start(request())
    assert second.cancel()
    daemon.answer(*daemon.take(1))
    value(first)
    assert attached.drain()
    assert daemon.quiet()


def test_a_daemon_that_does_not_answer_is_waited_for_until_the_deadline(
    daemon: Daemon, attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_GRACE_SECONDS", 0.1)
    future = attached.start(request(timeout_ms=100_000))
    (item,) = daemon.take(1)
    assert item.timeout_ms is not None
    assert 0 < item.timeout_ms <= 100_000
    assert 0 < attached._asked[item.key].deadline - time.monotonic() <= 100
    let_pass(attached, item)
    with pytest.raises(lrai.DeadlineExceeded, match="did not answer in time"):
        future.result(20)
    daemon.answer(item)  # too late, and harmless
    later = attached.start(request())
    daemon.answer(*daemon.take(1))
    value(later)


def test_without_a_timeout_the_daemon_knows_it_and_the_default_one_ends_the_wait(
    daemon: Daemon, parent: Path
) -> None:
    attached = attach(daemon, parent, **{"scheduler.default_timeout_ms": 100_000})
    answer = attached.start(request())
    (item,) = daemon.take(1)
    assert item.timeout_ms is None
    assert 30 < attached._asked[item.key].deadline - time.monotonic() <= 100  # 30 is usual
    let_pass(attached, item)
    with pytest.raises(lrai.DeadlineExceeded, match="did not answer in time"):
        answer.result(20)


def test_an_operation_without_an_answer_ends_in_one_sentence(
    daemon: Daemon, attached: Attached
) -> None:
    attached._patience = 0.1
    with pytest.raises(lrai.NotReady, match=r"did not answer within 0\.1 s"):
        attached.call("stats", {}, dict[str, int])
    assert not attached._calls


def test_a_daemon_of_another_version_is_refused_with_both_versions(
    daemon: Daemon, parent: Path
) -> None:
    daemon.version = 99
    with pytest.raises(
        lrai.EnvironmentProblem, match=rf"protocol 99 of lrai 0\.0, this process {PROTOCOL_VERSION}"
    ):
        attach(daemon, parent)


def test_whoever_probes_a_daemon_that_does_not_answer_is_told_soon(
    daemon: Daemon, attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is stopped; else they would wait as long as loading a model may take."""
    monkeypatch.setattr(client, "_PROBES", {"ready": 0.1, "models": 0.1})
    assert attached.call("ready", {}, str) == "stalled"
    with pytest.raises(lrai.NotReady, match=r"did not answer within 0\.1 s"):
        attached.call("models", {}, list[Any])
    results: list[Any] = []
    monkeypatch.setattr(client, "_PROBES", {})
    thread = call(attached, "stats", results)
    while (asked := daemon.call()).operation != "stats":
        pass
    daemon.send(Returned(asked.key, "told"))
    thread.join(20)
    assert results == ["told"]


def test_where_no_daemon_can_be_started_any_more_who_waits_is_told_why(
    daemon: Daemon,
    attached: Attached,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried: list[Path] = []

    def start(folder: Path, *_: Any, **__: Any) -> None:
        tried.append(folder)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "python")

    monkeypatch.setattr(client, "_SEARCH_SECONDS", 0.01)
    monkeypatch.setattr(client, "start_daemon", start)
    running = attached.start(request())
    daemon.take(1)
    daemon.close()
    why = "cannot be started: No such file or directory"
    with pytest.raises(lrai.NotReady, match=why):
        running.result(10)
    assert len(tried) >= client._FEW_FAILURES, "one failure is not the end"
    with pytest.raises(lrai.NotReady, match=why):
        attached.start(request()).result(10)
    with pytest.raises(lrai.NotReady, match=why):
        attached.call("stats", {}, dict[str, int])
    assert caplog.text.count(why) == 1


def test_no_daemon_is_started_in_a_folder_that_others_may_enter_by_now(
    daemon: Daemon,
    attached: Attached,
    parent: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = shared_folder(config(parent))
    monkeypatch.setattr(client, "_SEARCH_SECONDS", 0.01)
    running = attached.start(request())
    daemon.take(1)
    folder.chmod(0o755)
    daemon.close()
    with pytest.raises(lrai.NotReady, match=r"no runtime is there: it cannot be started$"):
        running.result(10)
    assert f"{folder} has to be a folder that only its owner, you, may enter" in caplog.text


def test_what_a_daemon_has_said_at_its_end_is_for_the_log_and_no_caller(
    daemon: Daemon,
    attached: Attached,
    parent: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = parent / "python"
    broken.write_text("#!/bin/sh\ncat > /dev/null\necho 'no /home/me/state' >&2\nexit 3\n")
    broken.chmod(0o700)
    monkeypatch.setattr(client, "_SEARCH_SECONDS", 0.01)
    monkeypatch.setattr(sys, "executable", str(broken))
    running = attached.start(request())
    daemon.take(1)
    daemon.close()
    with pytest.raises(lrai.NotReady, match=r"no runtime is there: it ended with exit status 3$"):
        running.result(10)
    assert "exit status 3: no /home/me/state" in caplog.text


def test_what_a_daemon_of_another_version_has_taken_over_ends_with_both_versions(
    daemon: Daemon, attached: Attached, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "start_daemon", lambda *_, **__: None)
    waiting = attached.start(request())
    daemon.take(1)
    daemon.close()
    other = Daemon(shared_folder(config(parent)))
    other.version = 99
    other.welcome()
    with pytest.raises(lrai.NotReady, match=rf"protocol 99.*this process {PROTOCOL_VERSION}"):
        waiting.result(10)
    other.close()
    own = Daemon(shared_folder(config(parent)))
    own.session = "second"
    own.welcome()  # it goes on looking
    later = attached.start(request())
    own.answer(*own.take(1))
    value(later)
    own.close()


def test_what_does_not_decode_is_dropped(daemon: Daemon, attached: Attached) -> None:
    future = attached.start(request())
    (item,) = daemon.take(1)
    tensor = TensorFrame("FP32", (1,), 5, 0, 4)
    for frames in (
        [b"\xff" * 9],
        [b""],
        [encode(Requests(()))],
        [encode(Replies((Answer(item.key, "m", "1", {}, ("y",), (tensor,)),)))],
        [encode(Replies((Answer(item.key, "m", "1", {}, ("y",), ()),)))],
    ):
        daemon.garbage(*frames)
    daemon.answer(item)
    assert value(future) == item.key


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"parameters": {"x": object()}}, lrai.RequestError),
        ({"parameters": {"x": 1 << 70}}, lrai.RequestError),
        ({"parameters": {"x": "y" * (1 << 20)}}, lrai.RequestError),
        ({"parameters": {"x": "\ud800"}}, lrai.RequestError),
        ({"outputs": (1,)}, lrai.RequestError),
        ({"model_name": None}, lrai.RequestError),
        ({"timeout_ms": "soon"}, lrai.RequestError),
        ({"timeout_ms": 10**400}, lrai.RequestError),
        ({"timeout_ms": 10**5000}, lrai.RequestError),  # which has no repr
        ({"inputs": {1: np.zeros(1)}}, lrai.RequestError),
        ({"inputs": {"x": [1, 2]}}, lrai.InvalidTensor),
        ({"inputs": {"x": np.zeros(1, "c16")}}, lrai.RequestError),
        ({"inputs": {"x": np.array([3], object)}}, lrai.InvalidTensor),
        ({"inputs": {"x": np.array(["\ud800"], object)}}, lrai.InvalidTensor),
        (
            {"inputs": {"x": lrai.Tensor(name="x", datatype="FP32", shape=(1 << 70,), data=b"")}},
            lrai.RequestError,
        ),
    ],
)
def test_what_cannot_be_sent_is_its_callers_error_and_nobody_elses(
    daemon: Daemon, attached: Attached, changes: dict[str, Any], error: type[lrai.LraiError]
) -> None:
    good = attached.start(request())
    with pytest.raises(error):
        attached.start(request(**changes))
    later = attached.start(request())
    daemon.answer(*daemon.take(2))
    assert value(good) < value(later)


@pytest.mark.parametrize("value", [np.float64(0.5), object(), "\ud800", 1 << 70])
def test_an_argument_that_cannot_be_sent_ends_nothing_but_its_own_call(
    daemon: Daemon, attached: Attached, value: object
) -> None:
    good = attached.start(request())
    with pytest.raises(lrai.UsageError, match="route: an argument cannot be sent"):
        attached.call("route", {"name": "m", "shares": {"a": value}}, object)
    later = attached.start(request())
    daemon.answer(*daemon.take(2))
    assert globals()["value"](good) < globals()["value"](later)


def test_tensors_arrive_as_they_were_given(daemon: Daemon, attached: Attached) -> None:
    words = np.array([["ä", ""]], object)
    wide = np.arange(6, dtype=np.float32).reshape(2, 3).data
    raw = lrai.Tensor(name="r", datatype="FP32", shape=(2, 3), data=wide)
    large = np.arange(1 << 15, dtype=np.float64)[::-1]
    inputs = {"w": words, "r": raw, "l": large}
    attached.start(request(inputs=inputs))
    while True:
        _, header, *frames = daemon._socket.recv_multipart()
        message = messages.decode_from_client(header)
        if isinstance(message, Requests):
            break
    (item,) = message.items
    form = decode_form(item.form)
    w, r, big = (
        unpack(TensorFrame(datatype, shape, *place), frames)
        for datatype, shape, place in zip(form.datatypes, form.shapes, item.places, strict=True)
    )
    assert w.tolist() == words.tolist()
    assert r.tolist() == [[0, 1, 2], [3, 4, 5]]
    np.testing.assert_array_equal(big, large)


LARGE = np.arange(1 << 15, dtype=np.float32)


def stats(daemon: Daemon, attached: Attached) -> dict[str, int]:
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(attached.call("stats", {}, dict[str, int]))
    )
    thread.start()
    daemon.send(Returned(daemon.call().key, {"events": 1}))
    thread.join(20)
    found: dict[str, int] = results[0]
    return found


@pytest.fixture
def sharing(daemon: Daemon, parent: Path) -> Attached:
    """Return a client whose arena the daemon reads."""
    daemon.shares = True
    return attach(daemon, parent)


def test_a_large_tensor_is_copied_once_and_sent_by_its_place(
    daemon: Daemon, sharing: Attached
) -> None:
    future = sharing.start(request(inputs={"x": LARGE}))
    (item,) = daemon.take(1)
    ((index, offset, size),) = item.places
    assert index == -1
    assert daemon.segment is not None
    memory = daemon.arenas.open(daemon.segment)
    np.testing.assert_array_equal(np.frombuffer(memory[offset : offset + size], "f4"), LARGE)
    found = stats(daemon, sharing)
    assert (found["arena_blocks"], found["arena_copied_bytes"]) == (1, LARGE.nbytes)
    assert (found["daemon_copied_bytes"], found["daemon_inline_large"]) == (0, 0)
    daemon.answer(item)
    value(future)
    assert stats(daemon, sharing)["arena_blocks"] == 1  # somebody may still be reading
    daemon.send(Replies(read=(offset,)))
    assert stats(daemon, sharing)["arena_blocks"] == 0
    sharing.start(request(inputs={"x": LARGE}))
    assert daemon.take(1)[0].places == item.places


def test_what_is_cancelled_or_late_keeps_its_block_until_the_daemon_has_read_it(
    daemon: Daemon, sharing: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_GRACE_SECONDS", 0.1)
    cancelled = sharing.start(request(inputs={"x": LARGE}))
    late = sharing.start(request(inputs={"x": LARGE}, timeout_ms=100_000))
    items = daemon.take(2)
    let_pass(sharing, items[1])
    assert cancelled.cancel()
    with pytest.raises(lrai.DeadlineExceeded):
        late.result(20)
    third = sharing.start(request(inputs={"x": LARGE}))
    items += daemon.take(1)
    assert len({item.places for item in items}) == 3
    daemon.send(Replies(read=tuple(offset for i in items for _, offset, _ in i.places)))
    assert stats(daemon, sharing)["arena_blocks"] == 0
    daemon.answer(items[2])
    value(third)


def test_a_daemon_that_reads_no_arena_gets_everything_inline(
    daemon: Daemon, attached: Attached
) -> None:
    attached.start(request(inputs={"x": LARGE}))
    assert daemon.take(1)[0].places == ((1, 0, LARGE.nbytes),)
    found = stats(daemon, attached)
    assert (found["arena_copied_bytes"], found["daemon_inline_large"]) == (0, 1)


def test_what_finds_no_room_in_the_arena_goes_inline_and_is_counted(
    daemon: Daemon, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "Arena", lambda: Arena(3 * LARGE.nbytes))
    daemon.shares = True
    attached = attach(daemon, parent)
    for _ in range(4):
        attached.start(request(inputs={"x": LARGE}))
    assert [item.places[0][0] for item in daemon.take(4)].count(-1) == 2
    assert stats(daemon, attached)["daemon_inline_large"] == 2


def test_a_new_session_has_an_arena_of_its_own(daemon: Daemon, sharing: Attached) -> None:
    futures = [sharing.start(request(inputs={"x": LARGE})) for _ in range(2)]
    (first, _), old = daemon.take(2), daemon.segment
    daemon.answer(first)
    value(futures[0])
    daemon.session = "second"
    daemon.begin()
    (again,) = daemon.take(1)
    assert again.places == ((1, 0, LARGE.nbytes),)  # inline until the daemon reads the new one
    daemon.send(Replies(read=(first.places[0][1],)))  # of the first session
    daemon._hear(lambda: daemon.segment != old)
    daemon.welcome()
    daemon.answer(again)
    value(futures[1])
    assert stats(daemon, sharing)["arena_blocks"] == 0
    sharing.start(request(inputs={"x": LARGE}))
    assert daemon.take(1)[0].places[0][0] == -1


def test_of_each_session_the_client_greets_once_more_and_then_shares(
    daemon: Daemon, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that begins the daemon reads no arena: what came first may lie in one given up."""
    monkeypatch.setattr(client, "_LIFE_SECONDS", 30)  # what would name it next
    daemon.shares = True
    attached = attach(daemon, parent)
    assert daemon.quiet()  # of the first session nothing is on its way any more
    old, daemon.session = daemon.segment, "second"
    daemon.begin()
    heard = daemon._signs
    daemon._hear(lambda: daemon._signs > heard)
    inline = attached.start(request(inputs={"x": LARGE}))
    (item,) = daemon.take(1)
    assert item.places == ((1, 0, LARGE.nbytes),)
    daemon.welcome()
    daemon.answer(item)
    value(inline)
    attached.start(request(inputs={"x": LARGE}))
    assert daemon.take(1)[0].places[0][0] == -1
    assert daemon.segment == old, "nobody read there, so it may stay"


def test_what_nobody_waits_for_any_more_is_not_sent_to_the_next_session(
    daemon: Daemon, attached: Attached
) -> None:
    gone, waiting = attached.start(request()), attached.start(request())
    _, item = daemon.take(2)
    assert gone.cancel()
    daemon.cancelled()
    daemon.session = "second"
    daemon.welcome()
    assert [again.key for again in daemon.take(1)] == [item.key]
    assert daemon.quiet()
    daemon.answer(item)
    assert value(waiting) == item.key
    assert attached.drain()


def test_draining_refuses_requests_waits_for_the_accepted_and_answers_questions(
    daemon: Daemon, attached: Attached
) -> None:
    future = attached.start(request())
    ended: list[bool] = []
    thread = threading.Thread(target=lambda: ended.append(attached.drain()))
    thread.start()
    while not attached._refusing:
        time.sleep(0.01)
    with pytest.raises(lrai.NotReady, match="draining"):
        attached.start(request())
    assert attached.call("ready", {}, str) == "dead"
    assert not ended
    daemon.answer(*daemon.take(1))
    thread.join(20)
    assert ended == [True]
    value(future)
    results: list[Any] = []
    asking = call(attached, "name", results)
    daemon.send(Returned(daemon.call().key, "told"))
    asking.join(20)
    assert results == ["told"]


def test_closing_ends_what_is_open_and_refuses_the_rest(daemon: Daemon, parent: Path) -> None:
    attached = attach(daemon, parent)
    future = attached.start(request())
    attached.close()
    attached.close()
    with pytest.raises(lrai.NotReady, match="closed"):
        future.result(0)
    with pytest.raises(lrai.NotReady, match="closed"):
        attached.start(request())
    assert attached.call("ready", {}, str) == "dead"


def test_nobody_waits_for_a_thread_that_a_bug_has_ended(
    daemon: Daemon, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached = attach(daemon, parent)
    failed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    monkeypatch.setattr(attached, "_hear", lambda frames: 1 / 0)
    future = attached.start(request())
    daemon.answer(*daemon.take(1))
    with pytest.raises(lrai.NotReady):
        future.result(20)
    attached.close()
    assert failed


@pytest.mark.parametrize("kind", ["open to others", "a link", "a file", "another user's"])
def test_a_folder_that_is_not_ours_alone_is_refused(parent: Path, kind: str) -> None:
    folder = parent / f"lrai-{os.geteuid()}"
    if kind == "a link":
        (parent / "real").mkdir(mode=0o700)
        folder.symlink_to(parent / "real")
    elif kind == "a file":
        folder.touch(0o600)
    else:
        folder.mkdir(mode=0o700)
    if kind == "open to others":
        folder.chmod(0o710)
    if kind == "another user's":
        if os.geteuid():
            pytest.skip("only root can give a folder away")
        os.chown(folder, 12345, -1)
    with pytest.raises(lrai.EnvironmentProblem, match=r"only its owner|File exists"):
        Attached(config(parent))


def test_the_folder_is_where_the_setting_says_and_closed_to_others(parent: Path) -> None:
    folder = shared_folder(config(parent))
    assert folder == parent / f"lrai-{os.geteuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert shared_folder(config(parent), str(parent / "other")) == parent / "other"


def test_a_place_for_no_socket_is_explained(parent: Path) -> None:
    deep = parent / ("d" * 100)
    deep.mkdir()
    with pytest.raises(lrai.EnvironmentProblem, match="shorter path"):
        Attached(config(deep))
    with pytest.raises(lrai.EnvironmentProblem, match="no folder"):
        Attached(config(parent / "absent"))


def test_a_daemon_that_cannot_be_started_is_explained(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(parent / "absent"))
    with pytest.raises(lrai.EnvironmentProblem, match="cannot be started: No such file"):
        Attached(config(parent))
    broken = parent / "python"
    broken.write_text("#!/bin/sh\ncat > /dev/null\necho 'it is broken' >&2\nexit 3\n")
    broken.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(lrai.EnvironmentProblem, match="exit status 3: it is broken"):
        Attached(config(parent))


def test_a_lock_that_is_held_means_that_a_daemon_runs(parent: Path) -> None:
    folder = shared_folder(config(parent))
    assert not is_running(folder)
    daemon = Daemon(folder)
    assert is_running(folder)
    assert start_daemon(folder, config(parent)) is None
    daemon.close()
    assert not is_running(folder)


def test_a_client_without_a_wish_starts_no_daemon_when_it_loses_one(
    parent: Path, daemon: Daemon, attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Path] = []

    def start(folder: Path, *_: Any, **__: Any) -> subprocess.Popen[bytes] | None:
        started.append(folder)
        return None

    monkeypatch.setattr(client, "start_daemon", start)
    daemon.close()
    time.sleep(0.5)
    assert not started
    attached.start(request())
    deadline = time.monotonic() + 20
    while not started:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_a_daemon_said_as_it_ended_begins_no_session(
    daemon: Daemon, attached: Attached, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come after the socket was looked at, and before the end of the line is."""
    started, poll, missed = list[bool](), wire.poll, list[bool]()
    looking = threading.Event()

    def poll_before(sources: Any, milliseconds: float) -> Any:
        looking.set()
        ready = dict(poll(sources, milliseconds))
        if attached._lost in ready and not missed:  # both may have come after the look at one
            missed.append(bool(poll([(attached._socket, zmq.POLLIN)], 0)))
            ready.pop(attached._socket, None)
        return [] if attached._socket in ready and not missed else list(ready.items())

    def start(*_: Any, **__: Any) -> None:
        started.append(True)

    monkeypatch.setattr(client, "start_daemon", start)
    monkeypatch.setattr(wire, "poll", poll_before)
    attached.cancel(-1)  # of nothing: it looks once more
    assert looking.wait(10)
    daemon.session = "second"
    daemon._attach(b"")
    daemon._socket.context.destroy(linger=1000)
    deadline = time.monotonic() + 20
    while not missed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert missed == [True]
    future = attached.start(request(timeout_ms=60_000))
    while not started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    future.cancel()


def test_a_client_that_waits_for_long_piles_up_nothing(
    daemon: Daemon, attached: Attached, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_SEARCH_SECONDS", 0.001)
    monkeypatch.setattr(client, "start_daemon", lambda *_, **__: None)
    daemon.close()
    future = attached.start(request(timeout_ms=60_000))
    time.sleep(1)
    successor = Daemon(shared_folder(config(parent)))
    successor.session = "second"
    assert successor._socket.poll(60_000)
    signs, deadline = 0, time.monotonic() + 0.1
    while time.monotonic() < deadline and successor._socket.poll(1):
        successor._peer, *_ = successor._socket.recv_multipart()
        signs += 1
    assert signs <= 300  # a thousand a second were made
    successor.welcome()
    successor.answer(*successor.take(1))
    value(future)
    successor.close()


@pytest.mark.parametrize("gone", [True, False])
def test_what_nobody_waits_for_any_more_takes_no_memory(
    daemon: Daemon, parent: Path, monkeypatch: pytest.MonkeyPatch, *, gone: bool
) -> None:
    monkeypatch.setattr(client, "_SEARCH_SECONDS", 0.001)
    monkeypatch.setattr(client, "_LIFE_SECONDS", 0.001)
    monkeypatch.setattr(client, "_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(client, "_MOST_STALE", 10)
    monkeypatch.setattr(client, "_PROBES", {"ready": 0.001})
    monkeypatch.setattr(client, "start_daemon", lambda *_, **__: None)
    daemon.credit = 1
    attached = attach(daemon, parent)
    first = attached.start(request())  # uses up the credit
    assert len(daemon.take(1)) == 1
    if gone:
        daemon.close()
    ended = [attached.start(request(timeout_ms=1)) for _ in range(100)]
    ended[0].cancel()
    for _ in range(50):
        assert attached.call("ready", {}, str) == "stalled"
    deadline = time.monotonic() + 20
    while max(len(attached._outbox), len(attached._outcalls)) > 15 or attached._cancelled:
        assert time.monotonic() < deadline, (len(attached._outbox), attached._outcalls)
        time.sleep(0.01)
    assert not first.done()


def test_a_stopped_daemon_blocks_no_client(
    daemon: Daemon, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_MOST_ITEMS", 1)
    daemon.credit = 5000
    attached = attach(daemon, parent, **{"scheduler.max_queue_rows": 5000})
    large = np.zeros(1 << 14, np.float32)  # nobody reads: sockets and queues fill up
    for _ in range(3000):
        attached.start(request(inputs={"x": large}))
    started = time.monotonic()
    attached.close()
    assert time.monotonic() - started < 60


def test_the_socket_is_not_polled_by_a_client_at_rest(attached: Attached) -> None:
    assert attached._thread.ident is not None
    clock = time.pthread_getcpuclockid(attached._thread.ident)  # other threads are of other tests
    before = time.clock_gettime(clock)
    time.sleep(1)
    assert time.clock_gettime(clock) - before < 0.2


@pytest.mark.parametrize("address", ["auto", "embedded"])
def test_who_gets_no_thread_for_a_runtime_is_told_and_leaves_no_socket_open(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A socket that is collected while it is open may keep the process waiting for ever."""
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name in ("lrai-client", "lrai-scheduler"):
            raise RuntimeError("can't start new thread")
        start(thread)

    def sockets() -> int:  # of each there is an eventfd, too
        links = [str(one.readlink()) for one in Path("/proc/self/fd").iterdir() if one.exists()]
        return sum("socket" in link or "eventfd" in link for link in links)

    monkeypatch.setattr(threading.Thread, "start", refused)
    own = lrai.load_config(call={"runtime.socket_dir": str(tmp_path)})
    opened = []
    for _ in range(3):
        with pytest.raises(lrai.OutOfResources, match="can't start new thread"):
            lrai.Runtime(own, address=address)
        opened.append(sockets())
    assert opened[2] == opened[0]  # which may have opened what all share
