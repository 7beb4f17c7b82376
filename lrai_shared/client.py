"""The runtime of a daemon, reached over a socket; the daemon is started if there is none.

One thread owns the socket; what callers ask while it is busy goes out as one message. The daemon
can die at any time: the client that needs it and gets its lock starts the next one, which loads
what was loaded; every client attaches to it, and sends again what was not answered. On another
machine nobody can start one: there a client goes on looking.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures._base import CANCELLED
from importlib.metadata import version
from pathlib import Path
from subprocess import Popen
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

import lrai_core as lrai
from lrai_core.runtime.version import Started, started
from lrai_core.wire import messages as wire
from lrai_core.wire.messages import Buffer, contents
from lrai_shared import messages
from lrai_shared.arena import Arena
from lrai_shared.keys import client_end
from lrai_shared.messages import Attach, Call, Infer, Requests
from lrai_shared.starting import is_running, last_line, leave, shared_folder, start_daemon
from lrai_shared.turns import unhurried

_LIFE_SECONDS: Final = 1.0  # between signs of life
_SEARCH_SECONDS: Final = 0.1  # while no daemon is known
_ANSWER_SECONDS: Final = 20.0  # beside what loading a model may take
_PROBES: Final = {"ready": 2.0, "models": 5.0}  # seconds: whoever probes does not wait for long
_GRACE_SECONDS: Final = 1.0  # for the daemon itself to say that a deadline has passed
_MOST_MS: Final = 1e300
_MOST_ITEMS: Final = 100  # of one message
_MOST_STALE: Final = 1000  # keys to be sent of requests that nobody waits for any more
_MOST_LOSSES: Final = 3  # of runtimes, after which a request is not sent to another one
_MOST_FAILURES: Final = 6  # to start one, after which the pause gets no longer
_FEW_FAILURES: Final = 3  # after which nobody waits for the next
# Bytes of one, after which it goes: what answers meanwhile is heard between two. Those of a header,
# whose size is limited, count twice.
_MOST_JOINT: Final = 2 << 20
# What is not done again where it is not known whether it was done.
_ONCE: Final = frozenset({"swap", "rollback", "route", "unload", "freeze", "unfreeze"})
_UNKNOWN: Final = "the runtime was lost while it was at it; deployments() says what was done"
_MOST_CUTS: Final = 3  # before it answers once; a daemon that starts or ends may cut a line
_log: Final = logging.getLogger("lrai.runtime")

T = TypeVar("T")


class _Asked(Future[lrai.InferenceResponse]):
    """A request until it is answered."""

    key = 0
    losses = 0  # of runtimes that it was sent to
    deadline = 0.0
    stated = False  # else the daemon knows what the model promises everybody
    nbytes = 0  # that the queue has to have room for, at most

    def __init__(self, client: Attached, form: bytes, tensors: list[Buffer], name: str) -> None:
        super().__init__()
        self._client, self.form, self.tensors, self.id = client, form, tensors, name

    def cancel(self) -> bool:
        """Cancel the request at the daemon, too."""
        cancelled = super().cancel()
        with self._condition:  # as `_settle` does: of two one comes first
            first = self._state == CANCELLED
            if first:
                self.set_running_or_notify_cancel()  # which tells those who wait for several
        if first:
            self._client.cancel(self.key)
        return cancelled


class Attached:
    """This process's share of the daemon; thread-safe."""

    def __init__(self, config: lrai.LraiConfig, address: str = "", *, stay: str = "end") -> None:
        """Attach to a daemon: of this machine, which is started if need be, or of another one.

        Args:
            config: Settings, the daemon's too if it is started.
            address: `tcp://HOST:PORT?keys=FOLDER`, or of this machine: see `shared_folder`.
            stay: Of a daemon that is started: see `start_daemon`.

        Raises:
            UsageError: The address is none, or its folder does not have the keys.
            EnvironmentProblem: It does not answer, is of another version, knows other keys, or the
                folder is unsafe.
        """
        self._config, self._stay, self._version = config, stay, version("lrai")
        takes = config.actor.start_timeout_seconds + config.runtime.drain_seconds  # a swap
        self._patience = takes + _ANSWER_SECONDS
        self._far = "://" in address
        if self._far:
            self._folder, (self._endpoint, options) = Path(), client_end(address)
        else:
            self._folder = shared_folder(config, address)
            self._endpoint, options = f"ipc://{self._folder}/clients", {}
        with unhurried():
            self._socket = wire.connect(self._endpoint, secrets.token_bytes(16), options)
        ends = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        self._lost, self._cuts = self._socket.get_monitor_socket(ends), 0
        self._arena, self._sharing = Arena(), False  # whether the daemon reads there
        if self._far:
            self._arena.close()
        self._wake_read, self._wake_write = os.pipe()
        self._awake = self._refusing = self._closed = False
        self._greeted = False  # a sign of life was not answered yet
        self._lock = threading.Lock()  # of what callers and the thread both change
        self._keys = itertools.count(1)
        self._asked: dict[int, _Asked] = {}
        self._calls: dict[int, tuple[Call, Future[Any]]] = {}
        # Keys of requests to be sent, of calls, and of requests that nobody waits for any more.
        self._outbox, self._outcalls, self._cancelled = deque[int](), deque[int](), deque[int]()
        self._session, self._credit, self._told = "", 0, ""  # the last: why there is no runtime
        self._most_bytes = 0  # of a request, as the daemon says
        self._latest, self._resent = 0, 0  # the last key sent; how many were sent again
        self._on_wire, self._bytes = dict[int, int](), 0  # bytes there, by key; of all
        self._process: Popen[bytes] | None = None
        self._failures, self._start_at = 0, 0.0  # of daemons, and when to start the next one
        self._logged = 0  # bytes of the log before it was started
        self._owner = os.getpid()
        self._attached: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="lrai-client", daemon=True)
        try:
            with unhurried():
                self._thread.start()
        except RuntimeError as error:  # there may be no more of them now
            self._let_go()
            raise lrai.OutOfResources(str(error)) from None
        patience = _ANSWER_SECONDS if self._far else self._patience  # where none is started
        try:
            self._attached.result(patience)
        except (lrai.LraiError, TimeoutError) as error:
            self.close()
            why = str(error) or f"it did not answer within {patience:g} s"
            raise lrai.EnvironmentProblem(f"no runtime at {self._endpoint}: {why}") from None

    @staticmethod
    def runs(config: lrai.LraiConfig, address: str) -> bool:
        """Return whether a daemon is there already; of another machine that is not known before."""
        return "://" in address or is_running(shared_folder(config, address))

    def start_all(self, requests: Sequence[lrai.InferenceRequest]) -> list[Started]:
        """See `Runtime.start_all`."""
        return [started(self.start, request) for request in requests]

    def start(self, request: lrai.InferenceRequest) -> Future[lrai.InferenceResponse]:
        """Send a request; cancelling the future takes it out of the queue if it has not begun."""
        given, usual_ms = request.timeout_ms, self._config.scheduler.default_timeout_ms
        timeout_ms: Any = usual_ms if given is None else given
        timeout_ms = timeout_ms.item() if isinstance(timeout_ms, np.number) else timeout_ms
        # A whole number may be larger than any other, and too long to be said.
        if not isinstance(timeout_ms, int | float) or _MOST_MS < timeout_ms < np.inf:
            kind = type(given).__name__
            raise lrai.RequestError(f"timeout_ms is {kind}, a number up to 1e300 is needed")
        room_bytes = self._most_bytes
        tensors = [_contents(name, given, room_bytes) for name, given in request.inputs.items()]
        kinds, shapes, contents = zip(*tensors, strict=True) if tensors else ((), (), ())
        named = (request.model_name, request.model_version, tuple(request.outputs))
        form = messages.Form(*named, dict(request.parameters), tuple(request.inputs), kinds, shapes)
        if (size := sum(map(len, contents))) > room_bytes:  # else the line is cut, and again
            words = f"{size} bytes; one request has {room_bytes} at most"
            raise lrai.RequestError(f"{words}, see limits.request_bytes")
        most = self._config.scheduler.max_queue_rows
        if len(self._asked) - len(self._on_wire) >= most:  # beside those on their way
            words = f"{most} requests of this process wait to be sent, the most that may"
            raise lrai.QueueFull(words, limit=most, retry_after_seconds=1.0)
        asked = _Asked(self, messages.encode_form(form), list(contents), request.id)
        asked.deadline = time.monotonic() + max(0.0, timeout_ms) / 1e3  # NaN is no time, too
        asked.stated = given is not None
        texts = [data for kind, data in zip(kinds, contents, strict=True) if kind == "BYTES"]
        asked.nbytes = size + sum(map(len, texts))  # in memory they take up to twice as much
        asked.key = self._post(self._asked, self._outbox, asked)
        return asked

    def cancel(self, key: int) -> None:
        """Take a request out of the queue, here or at the daemon."""
        self._cancelled.append(key)
        with self._lock:
            self._wake()

    def call(self, operation: str, arguments: dict[str, Any], kind: type[T]) -> T:
        """Return what an operation on the daemon's runtime gives.

        Raises:
            NotReady: The daemon does not answer, or there is none.
        """
        if operation == "ready" and self._refusing:
            return msgspec.convert("dead", kind)  # to whoever asks this process
        future, asked = Future[Any](), Call(0, operation, arguments)
        try:
            wire.encode(asked)  # here, and not where all that this process asks is sent
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise lrai.UsageError(f"{operation}: an argument cannot be sent: {error}") from None
        key, patience = self._post(self._calls, self._outcalls, (asked, future)), self._patience
        if operation == "ready" or self._session:  # else a model may have to be loaded again
            patience = _PROBES.get(operation, patience)
        try:
            value = future.result(patience)
            if operation == "stats" and isinstance(value, dict):
                value |= self._counts()
            with self._lock:  # see `artifact`: one at a time learns a type
                return msgspec.convert(value, kind)
        except TimeoutError:
            if operation == "ready":
                return msgspec.convert("stalled", kind)
            raise lrai.NotReady(f"the runtime did not answer within {patience:g} s") from None
        finally:
            self._calls.pop(key, None)

    def _counts(self) -> dict[str, int]:
        arena, own = self._arena, self._socket.counts("daemon") | {"daemon_resent": self._resent}
        own |= {"arena_copied_bytes": arena.copied_bytes, "arena_allocations": arena.allocations}
        return own | {"arena_blocks": len(arena.blocks)}

    def drain(self) -> bool:
        """See `Runtime.drain`."""
        with self._lock:
            self._refusing = True
        deadline = time.monotonic() + self._config.runtime.drain_seconds
        while self._asked and time.monotonic() < deadline:
            time.sleep(0.005)
        return not self._asked

    def close(self) -> None:
        """See `Runtime.close`."""
        if os.getpid() != self._owner:  # a fork's copy is not the runtime
            return
        with self._lock:
            self._refusing = self._closed = True
            self._wake()
        self._thread.join()

    def _post(self, box: dict[int, Any], outbox: deque[int], item: Any) -> int:
        if os.getpid() != self._owner:
            raise lrai.NotReady("this process was forked from the runtime's; open one of its own")
        with self._lock:
            if self._closed:
                raise lrai.NotReady("the runtime was closed")
            if self._refusing and box is self._asked:
                raise lrai.NotReady("the runtime is draining")
            key = next(self._keys)
            box[key] = item
            outbox.append(key)
            self._wake()
        return key

    def _wake(self) -> None:
        """Have the thread look; the lock is held."""
        if not self._awake:
            self._awake = True
            os.write(self._wake_write, b"\0")

    def _run(self) -> None:
        try:
            self._serve()
        finally:  # closed, or a bug: either way nobody waits for a thread that is gone
            with self._lock:
                self._refusing = self._closed = self._awake = True  # nobody writes any more
            _settle(self._attached, lrai.NotReady("the runtime was closed"))
            self._end_all("the runtime was closed")
            self._let_go()
            if self._process is not None:
                self._process.returncode = 0  # it lives on, as it should; Popen would warn of that
                leave(self._process.pid)

    def _let_go(self) -> None:
        """Close what the thread has used; who collects an open socket may wait for ever."""
        self._arena.close()
        self._lost.close()
        self._socket.context.destroy(linger=0)
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _serve(self) -> None:
        poller, next_sign = zmq.Poller(), 0.0
        for source in (self._socket, self._lost, self._wake_read):
            poller.register(source, zmq.POLLIN)
        while not self._closed:
            left = max(0.0, next_sign - time.monotonic())
            ready = dict(wire.poll(poller.sockets, round(left * 1e3)))
            if self._wake_read in ready:
                os.read(self._wake_read, 1)  # first: who comes from here on writes again
                self._awake = False
            # Of a line that has ended all is heard before that, though it came after the look.
            hear = self._socket in ready or self._lost in ready
            for frames in wire.receive(self._socket) if hear else ():
                with contextlib.suppress(wire.BadFrames):  # from no daemon of this version
                    self._hear(frames)
            if self._lost in ready:
                self._lose(recv_monitor_message(self._lost)["event"])
                next_sign = 0.0
            if (now := time.monotonic()) >= next_sign:  # what has come in is no longer asked for
                self._expire(now)
                self._show_life()
                next_sign = now + (_LIFE_SECONDS if self._session else _SEARCH_SECONDS)
            if self._outbox or self._outcalls or self._cancelled:
                with contextlib.suppress(zmq.Again):  # as below
                    if self._session and self._send():
                        with self._lock:
                            self._wake()  # to hear what was answered, and go on

    def _expire(self, now: float) -> None:
        """End what is long past its deadline; the daemon may be stopped, or not come back."""
        for key in list(self._asked):  # which callers add to, and this thread alone takes from
            asked = self._asked[key]
            if now > asked.deadline + (_GRACE_SECONDS if key in self._on_wire else 0.0):
                del self._asked[key]
                if key in self._on_wire:
                    self._cancelled.append(key)  # nobody waits for what may be going on there
                _settle(asked, lrai.DeadlineExceeded("the runtime did not answer in time"))
        while self._cancelled and not self._session:  # nothing is on its way
            self._asked.pop(self._cancelled.popleft(), None)
        boxes: list[tuple[dict[int, Any], deque[int]]] = [(self._asked, self._outbox)]
        for wanted, keys in [*boxes, (self._calls, self._outcalls)]:
            if len(keys) > 2 * len(wanted) + _MOST_STALE:  # nobody takes them
                with self._lock:
                    waiting = [key for key in keys if key in wanted]
                    keys.clear()
                    keys.extend(waiting)

    def _lose(self, event: int) -> None:
        """Begin anew: the line has ended, or was refused."""
        for key in () if self._far else self._on_wire:  # there a line is cut, and no more
            if asked := self._asked.get(key):
                asked.losses += 1
                if asked.losses == _MOST_LOSSES:  # it may be what ends them
                    self._asked.pop(key)
                    _settle(asked, lrai.NotReady(f"{_MOST_LOSSES} runtimes ended while it ran"))
        self._session, self._greeted, self._sharing = "", False, False
        self._on_wire, self._bytes = {}, 0
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:  # and then the line ends
            self._fail("it does not know this client, whose NAME.key has to lie in its clients")
        elif self._far:  # ZeroMQ does not always try again; and what waits there would pile up
            self._socket.disconnect(self._endpoint)
            time.sleep(_SEARCH_SECONDS)
            self._socket.connect(self._endpoint)
            self._cuts += 1
            if self._cuts == _MOST_CUTS:
                self._fail("it has another key than server.key says, or no runtime is there")

    def _show_life(self) -> None:
        """Tell the daemon that this client is there; start it where it is not and is needed."""
        status = self._process.poll() if self._process else 0
        if status:
            said = last_line(self._folder / "log", self._logged)
            self._start_later(f"it ended with exit status {status}", f": {said}")
        wanted = self._asked or self._calls or not self._attached.done()
        due = status is not None and time.monotonic() >= self._start_at
        if due and wanted and not self._session and not self._far:
            try:
                with contextlib.suppress(OSError):
                    self._logged = (self._folder / "log").stat().st_size
                self._process = start_daemon(self._folder, self._config, stay=self._stay)
            except OSError as error:
                self._start_later(f"it cannot be started: {error.strerror}")
            except lrai.EnvironmentProblem as error:  # which names the folder
                self._start_later("it cannot be started", f": {error}")
        if not self._greeted:  # else they would pile up where nobody hears them
            self._greet()

    def _start_later(self, why: str, more: str = "") -> None:
        """Try again after a while, longer each time; where that does not help, tell who waits."""
        self._start_at = time.monotonic() + _SEARCH_SECONDS * 2**self._failures
        self._process, self._failures = None, min(_MOST_FAILURES, self._failures + 1)
        self._fail(why, more, hopeless=self._failures >= _FEW_FAILURES)

    def _greet(self) -> None:
        with contextlib.suppress(zmq.Again):  # the line has just ended, and will be lost
            self._socket.say(Attach(wire.PROTOCOL_VERSION, self._version, self._arena.segment))
            self._greeted = True

    def _hear(self, frames: list[memoryview]) -> None:
        message = messages.decode_to_client(frames[0])
        if isinstance(message, messages.Attached):
            self._greeted = False
            if message.version != wire.PROTOCOL_VERSION:
                its = f"it speaks protocol {message.version} of lrai {message.lrai}"
                why = f"{its}, this process {wire.PROTOCOL_VERSION}: stop it first"
                self._fail(why, hopeless=True)
            elif message.session != self._session:
                self._begin(message)
            self._sharing = (at := self._arena.segment) is not None and at.id == message.arena
        elif isinstance(message, messages.Returned):
            self._end(message.key, message.value)
        elif isinstance(message, messages.Replies):
            for answer in message.answers:
                asked = self._asked.get(answer.key)
                response = messages.response_of(answer, asked.id if asked else "", frames[1:])
                self._end(answer.key, response)
            for offset in message.read if self._sharing else ():  # else of the arena before
                self._arena.give_back(offset)
            for failed in message.failures:
                self._end(failed.key, messages.error_of(failed))

    def _begin(self, message: messages.Attached) -> None:
        """Begin a session, which knows of nothing that was asked."""
        self._session, self._credit, self._failures = message.session, message.credit, 0
        self._most_bytes, self._told = message.request_bytes, ""
        self._on_wire, self._bytes = {}, 0
        for key in [key for key, asked in list(self._asked.items()) if asked.cancelled()]:
            del self._asked[key]
        with self._lock:
            self._outbox.clear()
            self._outbox.extend(sorted(self._asked))
            for key in self._calls.keys() - self._outcalls:
                call = self._calls.get(key)
                if call and call[0].operation in _ONCE:  # it may have been done
                    _settle(self._calls.pop(key, call)[1], lrai.NotReady(_UNKNOWN))
            self._outcalls.clear()
            self._outcalls.extend(sorted(self._calls))
        _settle(self._attached)
        # One that the last session may still read is given up.
        if self._arena.segment and (self._asked or self._arena.blocks):
            (old := self._arena).close()
            self._arena = Arena()
            self._arena.copied_bytes, self._arena.allocations = old.copied_bytes, old.allocations
        self._greet()  # the daemon reads the arena from then on

    def _fail(self, why: str, more: str = "", *, hopeless: bool = False) -> None:
        """Tell who attaches why there is no runtime; all who wait, where there is little hope.

        `more`: what is for the log, and for who attaches: callers of a host hear the rest.
        """
        _settle(self._attached, lrai.EnvironmentProblem(why + more))
        if hopeless and (self._asked or self._calls):  # and it goes on trying for who comes next
            if why != self._told:  # else it is said ten times a second
                _log.warning("no runtime at %s: %s", self._endpoint, why + more)
            self._told = why
            self._end_all(f"no runtime is there: {why}")

    def _end_all(self, why: str) -> None:
        """End all that somebody waits for."""
        for _, future in list(self._calls.values()):
            _settle(future, lrai.NotReady(why))
        for key in list(self._asked):  # as in `_expire`
            _settle(self._asked.pop(key), lrai.NotReady(why))

    def _end(self, key: int, outcome: Any) -> None:
        """Tell whoever waits for this key; an answer that comes too late counts no more."""
        self._bytes -= self._on_wire.pop(key, 0)
        if call := self._calls.get(key):
            _settle(call[1], outcome)
        elif asked := self._asked.pop(key, None):
            _settle(asked, outcome)

    def _send(self) -> bool:
        """Send what waits, as far as the daemon has given credit; return whether to go on."""
        packer = wire.Packer(self._arena.put if self._sharing else None)
        items, cancelled, now, joint = list[Infer](), list[int](), time.monotonic(), 0
        while self._outcalls:  # without credit: they are few, and tell how things are
            key = self._outcalls.popleft()
            if (call := self._calls.get(key)) is not None:
                self._socket.say(msgspec.structs.replace(call[0], key=key))
        while self._cancelled:
            key = self._cancelled.popleft()
            if key in self._on_wire:
                cancelled.append(key)  # and is answered like any other
            else:
                self._asked.pop(key, None)
        most = self._config.scheduler.max_queue_bytes  # what is beyond it the daemon would refuse
        while self._outbox and len(self._on_wire) < self._credit and len(items) < _MOST_ITEMS:
            if joint >= _MOST_JOINT:
                break
            key = self._outbox[0]
            if (asked := self._asked.get(key)) is not None:
                if self._on_wire and self._bytes + asked.nbytes > most:
                    break
                left_ms = max(0.0, (asked.deadline - now) * 1e3) if asked.stated else None
                places = tuple([packer.place(data) for data in asked.tensors])
                items.append(Infer(key, asked.form, left_ms, places))
                self._resent += key <= self._latest  # keys go up
                self._latest = max(key, self._latest)
                self._on_wire[key] = asked.nbytes
                self._bytes += asked.nbytes
                joint += 2 * (len(asked.form) + 16 * len(places))
                joint += sum([size for _, _, size in places])
            self._outbox.popleft()
        if items or cancelled:
            requests = Requests(tuple(items), tuple(cancelled), self._session)
            packer.send(self._socket, requests)
        return len(items) == _MOST_ITEMS or joint >= _MOST_JOINT


def _contents(name: str, given: Any, room_bytes: int) -> tuple[str, tuple[int, ...], Buffer]:
    if isinstance(given, lrai.Tensor):
        data = given.data if isinstance(given.data, bytes) else given.data.tobytes()
        return given.datatype, tuple(given.shape), data
    if not isinstance(given, np.ndarray):
        raise lrai.InvalidTensor(name, f"got a {type(given).__name__}, a numpy array is needed")
    try:
        return contents(given, room_bytes)  # what the daemon is sure to refuse is not encoded
    except ValueError as error:
        raise lrai.InvalidTensor(name, str(error)) from None


def _settle(future: Future[Any], outcome: Any = None) -> None:
    with contextlib.suppress(InvalidStateError):  # it was cancelled, or has ended
        if isinstance(outcome, lrai.LraiError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
