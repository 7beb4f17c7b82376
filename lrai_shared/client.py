"""The runtime of a daemon, reached over a socket; the daemon is started if there is none.

One thread owns the socket; what callers ask while it is busy goes out as one message. The daemon
can die at any time: the client that needs it and gets its lock starts the next one, which loads
what was loaded; every client attaches to it, and sends again what was not answered.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import secrets
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

import msgspec
import numpy as np
import zmq

from lrai_core import (
    DeadlineExceeded,
    EnvironmentProblem,
    InferenceRequest,
    InferenceResponse,
    InvalidTensor,
    LraiConfig,
    LraiError,
    NotReady,
    RequestError,
    Tensor,
)
from lrai_core.errors import shorten
from lrai_core.wire import messages as wire
from lrai_core.wire.messages import contents
from lrai_shared import messages
from lrai_shared.arena import Arena
from lrai_shared.messages import Attach, Call, Infer, Requests

_LIFE_SECONDS: Final = 1.0  # between signs of life
_SEARCH_SECONDS: Final = 0.1  # while no daemon is known
_ANSWER_SECONDS: Final = 20.0  # beside what loading a model may take
_GRACE_SECONDS: Final = 1.0  # for the daemon itself to say that a deadline has passed
_MOST_ITEMS: Final = 100  # of one message

T = TypeVar("T")
Contents = tuple[str, tuple[int, ...], wire.Buffer]


class _Asked(Future[InferenceResponse]):
    """A request until it is answered."""

    key = 0

    def __init__(
        self,
        client: Attached,
        form: bytes,
        tensors: list[wire.Buffer],
        identity: str,
        timeout_ms: float,
    ) -> None:
        super().__init__()
        self._client, self.form, self.tensors, self.id = client, form, tensors, identity
        self.deadline = time.monotonic() + timeout_ms / 1e3

    def cancel(self) -> bool:
        """Cancel the request at the daemon, too."""
        cancelled = super().cancel()
        if cancelled:
            self._client.cancel(self.key)
        return cancelled


class Attached:
    """This process's share of the daemon; thread-safe."""

    def __init__(self, config: LraiConfig, address: str = "", *, stay: bool = False) -> None:
        """Attach to the daemon in the folder `address`, by default this user's, or start it.

        Args:
            config: Settings, the daemon's too if it is started.
            address: See `shared_folder`.
            stay: Whether a daemon that is started goes on without clients.

        Raises:
            EnvironmentProblem: It does not answer, is of another version, or the folder is unsafe.
        """
        self._folder = shared_folder(config, address)
        self._config, self._stay = config, stay
        self._patience = config.actor.start_timeout_seconds + _ANSWER_SECONDS
        self._socket = wire.connect(f"ipc://{self._folder}/clients", secrets.token_bytes(16))
        self._arena, self._sharing = Arena(), False  # whether the daemon reads there
        self._lost = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._wake_read, self._wake_write = os.pipe()
        self._awake = self._refusing = self._closed = False
        self._greeted = False  # a sign of life was not answered yet
        self._lock = threading.Lock()  # of what callers and the thread both change
        self._keys = itertools.count(1)
        self._asked: dict[int, _Asked] = {}
        self._calls: dict[int, tuple[Call, Future[Any]]] = {}
        # Keys of requests to be sent, of calls, and of requests that nobody waits for any more.
        self._outbox, self._outcalls, self._cancelled = deque[int](), deque[int](), deque[int]()
        self._session, self._credit, self._on_wire = "", 0, set[int]()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._attached: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="lrai-client", daemon=True)
        self._thread.start()
        try:
            self._attached.result(self._patience)
        except (LraiError, TimeoutError) as error:
            self.close()
            why = str(error) or f"it did not answer within {self._patience:g} s"
            raise EnvironmentProblem(f"no runtime in {self._folder}: {why}") from None

    def start(self, request: InferenceRequest) -> Future[InferenceResponse]:
        """Send a request; cancelling the future takes it out of the queue if it has not begun."""
        timeout_ms = request.timeout_ms
        if timeout_ms is None:
            timeout_ms = self._config.scheduler.default_timeout_ms
        if not isinstance(timeout_ms, int | float):
            raise RequestError(f"timeout_ms is {shorten(repr(timeout_ms))}, a number is needed")
        tensors = [_contents(name, given) for name, given in request.inputs.items()]
        form = messages.Form(
            request.model_name,
            request.model_version,
            tuple(request.outputs),
            dict(request.parameters),
            tuple(request.inputs),
            tuple([datatype for datatype, _, _ in tensors]),
            tuple([shape for _, shape, _ in tensors]),
        )
        contents = [data for _, _, data in tensors]
        asked = _Asked(self, messages.encode_form(form), contents, request.id, timeout_ms)
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
            NotReady: The daemon does not answer.
        """
        if operation == "ready" and self._refusing:
            return msgspec.convert("dead", kind)  # to whoever asks this process
        future: Future[Any] = Future()
        made = Call(0, operation, arguments)
        key = self._post(self._calls, self._outcalls, (made, future))
        try:
            value = future.result(self._patience)
            if operation == "stats" and isinstance(value, dict):
                value |= self._counts()
            with self._lock:  # see `artifact`: one at a time learns a type
                return msgspec.convert(value, kind)
        except TimeoutError:
            raise NotReady(f"the runtime did not answer within {self._patience:g} s") from None
        finally:
            self._calls.pop(key, None)

    def _counts(self) -> dict[str, int]:
        arena = {"blocks": len(self._arena.blocks), "copied_bytes": self._arena.copied_bytes}
        return self._socket.counts("daemon") | {f"arena_{name}": n for name, n in arena.items()}

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
            raise NotReady("this process was forked from the runtime's; open one of its own")
        with self._lock:
            if self._closed:
                raise NotReady("the runtime was closed")
            if self._refusing and box is self._asked:
                raise NotReady("the runtime is draining")
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
            ends: list[Future[Any]] = list(self._asked.values())
            ends += [future for _, future in list(self._calls.values())]
            for future in [self._attached, *ends]:
                _settle(future, NotReady("the runtime was closed"))
            self._asked.clear()
            self._arena.close()
            self._lost.close()
            self._socket.context.destroy(linger=0)
            os.close(self._wake_read)
            os.close(self._wake_write)
            if self._process is not None:
                self._process.returncode = 0  # it lives on, as it should; Popen would warn of that

    def _serve(self) -> None:
        poller, next_sign = zmq.Poller(), 0.0
        for source in (self._socket, self._lost, self._wake_read):
            poller.register(source, zmq.POLLIN)
        while not self._closed:
            now = time.monotonic()
            if now >= next_sign:
                self._expire(now)
                self._show_life()
                next_sign = now + (_LIFE_SECONDS if self._session else _SEARCH_SECONDS)
            ready = dict(poller.poll(round(max(0.0, next_sign - now) * 1e3)))
            if self._wake_read in ready:
                os.read(self._wake_read, 1)  # first: who comes from here on writes again
                self._awake = False
            if self._lost in ready:
                self._lost.recv_multipart()
                self._session, self._greeted, next_sign = "", False, 0.0
                self._sharing = False
                self._on_wire.clear()
            for frames in wire.receive(self._socket):
                with contextlib.suppress(wire.BadFrames):  # from no daemon of this version
                    self._hear(frames)
            while self._session and self._send():
                pass

    def _expire(self, now: float) -> None:
        """End what is long past its deadline; the daemon may be stopped, or not come back."""
        for key, asked in list(self._asked.items()):
            if now > asked.deadline + (_GRACE_SECONDS if key in self._on_wire else 0.0):
                del self._asked[key]
                _settle(asked, DeadlineExceeded("the runtime did not answer in time"))

    def _show_life(self) -> None:
        """Tell the daemon that this client is there; start it where it is not and is needed."""
        status = self._process.poll() if self._process else 0
        if status:
            self._fail(f"it ended with exit status {status}: {_last_line(self._folder / 'log')}")
        wanted = self._asked or self._calls or not self._attached.done()
        if status is not None and wanted and not self._session:
            try:
                self._process = start_daemon(self._folder, self._config, stay=self._stay)
            except OSError as error:
                self._fail(f"it cannot be started: {error.strerror}")
        if not self._greeted:  # else they would pile up where nobody hears them
            self._greet()

    def _greet(self) -> None:
        self._greeted = True
        self._socket.say(Attach(wire.PROTOCOL_VERSION, version("lrai"), self._arena.segment))

    def _hear(self, frames: list[memoryview]) -> None:
        message = messages.decode_to_client(frames[0])
        if isinstance(message, messages.Attached):
            self._greeted = False
            if message.version != wire.PROTOCOL_VERSION:
                versions = f"protocol {message.version} of lrai {message.lrai}"
                mine = f"this process {wire.PROTOCOL_VERSION}: stop it first"
                self._fail(f"it speaks {versions}, {mine}")
            elif message.session != self._session:  # it knows of nothing that was asked
                self._session, self._credit = message.session, message.credit
                self._on_wire.clear()
                with self._lock:
                    self._outbox.clear()
                    self._outbox.extend(sorted(self._asked))
                    self._outcalls.clear()
                    self._outcalls.extend(sorted(self._calls))
                _settle(self._attached)
                if self._asked or self._arena.blocks:  # which the last session may still read
                    self._arena.close()
                    self._arena = Arena()
                    self._greet()
            segment = self._arena.segment
            self._sharing = segment is not None and segment.id == message.arena
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

    def _fail(self, why: str) -> None:
        _settle(self._attached, EnvironmentProblem(why))  # once attached, it goes on trying

    def _end(self, key: int, outcome: Any) -> None:
        """Tell whoever waits for this key; an answer that comes too late counts no more."""
        self._on_wire.discard(key)
        if call := self._calls.get(key):
            _settle(call[1], outcome)
        elif asked := self._asked.pop(key, None):
            _settle(asked, outcome)

    def _send(self) -> bool:
        """Send what waits, as far as the daemon has given credit; return whether to go on."""
        packer = wire.Packer(self._arena.put if self._sharing else None)
        items, cancelled, now = list[Infer](), list[int](), time.monotonic()
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
        while self._outbox and len(self._on_wire) < self._credit and len(items) < _MOST_ITEMS:
            key = self._outbox.popleft()
            if (asked := self._asked.get(key)) is not None:
                self._on_wire.add(key)
                left_ms = max(0.0, (asked.deadline - now) * 1e3)
                places = tuple([packer.place(data) for data in asked.tensors])
                items.append(Infer(key, asked.form, left_ms, places))
        if items or cancelled:
            packer.send(self._socket, Requests(tuple(items), tuple(cancelled)))
        return len(items) == _MOST_ITEMS


def shared_folder(config: LraiConfig, address: str = "") -> Path:
    """Return the folder of the daemon's socket and lock, made if it is not there.

    Args:
        config: Its `runtime.socket_dir` holds the folder of each user.
        address: Another folder, for a daemon beside this user's first one; empty for that.

    Raises:
        EnvironmentProblem: It is not this user's alone: what lies there could be anybody's.
    """
    parent = config.runtime.socket_dir or tempfile.gettempdir()
    folder = Path(address or Path(parent, f"lrai-{os.geteuid()}")).absolute()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        info = folder.lstat()
    except OSError as error:
        raise EnvironmentProblem(f"no folder {folder} for sockets: {error.strerror}") from None
    mine = stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid()
    if not mine or info.st_mode & 0o077:
        raise EnvironmentProblem(f"{folder} has to be a folder that only its owner, you, may enter")
    return folder


def start_daemon(
    folder: Path, config: LraiConfig, *, stay: bool = False
) -> subprocess.Popen[bytes] | None:
    """Start the daemon if its lock is free; return its process, None where another one runs.

    Args:
        folder: From `shared_folder`.
        config: Its settings.
        stay: Whether it goes on when its last client has been gone for long.
    """
    with (folder / "lock").open("ab") as lock:
        if not _take(lock):
            return None
        with (folder / "log").open("wb") as log:
            # The lock belongs to the open file, which the daemon inherits and keeps for life.
            command = [sys.executable, "-P", "-m", "lrai_shared.daemon", str(folder)]
            daemon = subprocess.Popen(
                [*command, "stay" if stay else "end"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
                pass_fds=(lock.fileno(),),
            )
    with daemon.stdin as stream:  # type: ignore[union-attr] # a pipe
        stream.write(msgspec.msgpack.encode(config))
    return daemon


def is_running(folder: Path) -> bool:
    """Return whether a daemon holds the lock of the folder."""
    with (folder / "lock").open("ab") as lock:
        return not _take(lock)


def _take(lock: BinaryIO) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _contents(name: str, given: Any) -> Contents:
    if isinstance(given, Tensor):
        data = given.data if isinstance(given.data, bytes) else given.data.tobytes()
        return given.datatype, tuple(given.shape), data
    if not isinstance(given, np.ndarray):
        raise InvalidTensor(name, f"got a {type(given).__name__}, a numpy array is needed")
    try:
        return contents(given)
    except ValueError as error:
        raise InvalidTensor(name, str(error)) from None


def _last_line(log: Path) -> str:
    with contextlib.suppress(OSError, IndexError):
        return log.read_text(errors="replace").splitlines()[-1][:300]
    return "it said nothing"


def _settle(future: Future[Any], outcome: Any = None) -> None:
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, LraiError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
