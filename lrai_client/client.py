"""The runtime of a daemon, reached over a socket; the daemon is started if there is none.

One thread owns the socket; what callers ask while it is busy goes out as one message. The daemon
can die at any time: whoever gets its lock starts the next one, and every client attaches to it,
loads again what it had loaded, and sends again what was not answered.
"""

from __future__ import annotations

import fcntl
import itertools
import math
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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeVar

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
    Tensor,
)
from lrai_core.wire import messages
from lrai_core.wire.messages import Attach, Buffer, Call, Infer, Packer, Requests

_LIFE_SECONDS: Final = 1.0  # between signs of life
_SEARCH_SECONDS: Final = 0.1  # while no daemon is known
_START_SECONDS: Final = 20.0

T = TypeVar("T")
Contents = tuple[str, tuple[int, ...], Buffer]


@dataclass(slots=True, eq=False)
class _Asked:
    """A request that was not answered yet."""

    request: InferenceRequest
    tensors: list[Contents]
    future: Future[InferenceResponse]
    deadline: float


class Attached:
    """This process's share of the daemon; thread-safe."""

    def __init__(self, config: LraiConfig, address: str = "") -> None:
        """Attach to the daemon in the folder `address`, by default this user's, or start it.

        Raises:
            EnvironmentProblem: It does not answer, is of another version, or the folder is unsafe.
        """
        self.config = config
        self._folder = shared_folder(config, address)
        self._socket = messages.connect(f"ipc://{self._folder}/clients", secrets.token_bytes(16))
        self._lost = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._wake_read, self._wake_write = os.pipe()
        self._awake = False
        self._lock = threading.Lock()
        self._keys = itertools.count(1)
        self._asked: dict[int, _Asked] = {}
        self._calls: dict[int, tuple[Call, Future[Any]]] = {}
        self._outbox: deque[int] = deque()  # keys of what is to be sent, or was cancelled
        self._daemon, self._credit, self._on_wire = "", 0, 0
        self._process: subprocess.Popen[bytes] | None = None
        self._refusing = self._closed = False
        self._owner = os.getpid()
        self._attached: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="lrai-client", daemon=True)
        self._thread.start()
        try:
            self._attached.result(_START_SECONDS)
        except (LraiError, TimeoutError) as error:
            self.close()
            why = str(error) or f"it did not answer within {_START_SECONDS:g} s"
            raise EnvironmentProblem(f"no runtime in {self._folder}: {why}") from None

    def start(self, request: InferenceRequest) -> Future[InferenceResponse]:
        """Send a request; cancelling the future takes it out of the queue if it has not begun."""
        deadline = math.inf
        if request.timeout_ms is not None:
            deadline = time.monotonic() + request.timeout_ms / 1e3
        tensors = [_contents(name, given) for name, given in request.inputs.items()]
        asked = _Asked(request, tensors, Future(), deadline)
        key = self._post(self._asked, asked)
        asked.future.add_done_callback(
            lambda f: self._outbox.append(key) if f.cancelled() else None
        )
        return asked.future

    def call(self, operation: str, arguments: dict[str, Any], kind: type[T]) -> T:
        """Return what an operation on the daemon's runtime gives."""
        future: Future[Any] = Future()
        self._post(self._calls, (Call(0, operation, arguments), future))
        seconds = self.config.actor.start_timeout_seconds + _START_SECONDS
        return msgspec.convert(future.result(seconds), kind)

    def drain(self) -> bool:
        """See `Runtime.drain`."""
        self._refusing = True
        deadline = time.monotonic() + self.config.runtime.drain_seconds
        while self._asked and time.monotonic() < deadline:
            time.sleep(0.005)
        return not self._asked

    def close(self) -> None:
        """See `Runtime.close`."""
        with self._lock:
            if self._closed or os.getpid() != self._owner:
                return
            self._refusing = self._closed = True
            self._wake()
        self._thread.join()
        ends = [asked.future for asked in self._asked.values()]
        for future in [*ends, *(future for _, future in self._calls.values())]:
            _settle(future, NotReady("the runtime was closed"))
        self._lost.close()
        self._socket.context.destroy(linger=0)
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _post(self, box: dict[int, Any], item: Any) -> int:
        if os.getpid() != self._owner:
            raise NotReady("this process was forked from the runtime's; open one of its own")
        with self._lock:
            if self._refusing:
                raise NotReady("the runtime is draining")
            key = next(self._keys)
            box[key] = item
            self._outbox.append(key)
            self._wake()
        return key

    def _wake(self) -> None:
        if not self._awake:
            self._awake = True
            os.write(self._wake_write, b"\0")

    def _run(self) -> None:
        poller, next_sign = zmq.Poller(), 0.0
        for source in (self._socket, self._lost, self._wake_read):
            poller.register(source, zmq.POLLIN)
        while not self._closed:
            now = time.monotonic()
            if now >= next_sign:
                next_sign = now + (_LIFE_SECONDS if self._daemon else _SEARCH_SECONDS)
                self._show_life()
            ready = dict(poller.poll(round(max(0.0, next_sign - now) * 1e3)))
            if self._wake_read in ready:
                os.read(self._wake_read, 1)  # first: who comes from here on writes again
                self._awake = False
            if self._lost in ready:
                self._lost.recv_multipart()
                self._daemon, next_sign = "", 0.0
            while self._socket.poll(0):
                self._hear([part.buffer for part in self._socket.recv_multipart(copy=False)])
            if self._daemon:
                self._send()

    def _show_life(self) -> None:
        """Tell the daemon that this client is there; start the daemon if its lock is free."""
        try:
            # A daemon that has ended is a child like any other, and wants to be waited for.
            if self._process is None or self._process.poll() is not None:
                self._process = start_daemon(self._folder, self.config)
        except OSError as error:
            _settle(self._attached, EnvironmentProblem(f"it cannot be started: {error.strerror}"))
        life = Attach(messages.PROTOCOL_VERSION, version("lrai"))
        self._socket.send(messages.encode(life))

    def _hear(self, frames: list[memoryview]) -> None:
        message = messages.decode_to_client(frames[0])
        if isinstance(message, messages.Attached):
            if message.version != messages.PROTOCOL_VERSION:
                versions = f"protocol {message.version} of lrai {message.lrai}"
                mine = f"this process {messages.PROTOCOL_VERSION}: stop it first"
                _settle(self._attached, EnvironmentProblem(f"it speaks {versions}, {mine}"))
            elif message.daemon != self._daemon:  # it has never heard of this client
                self._daemon, self._credit, self._on_wire = message.daemon, message.credit, 0
                with self._lock:
                    self._outbox = deque(sorted([*self._asked, *self._calls]))
                _settle(self._attached)
        elif isinstance(message, messages.Returned):
            if (call := self._calls.pop(message.key, None)) is not None:
                _settle(call[1], message.value)
        elif isinstance(message, messages.Replies):
            for answer in message.answers:
                if (asked := self._asked.pop(answer.key, None)) is not None:
                    arrays = [messages.unpack(t, frames[1:]).copy() for t in answer.tensors]
                    response = InferenceResponse(
                        model_name=answer.model_name,
                        model_version=answer.model_version,
                        id=asked.request.id,
                        outputs=dict(zip(answer.names, arrays, strict=True)),
                        parameters=answer.parameters,
                    )
                    _settle(asked.future, response)
            for failed in message.failures:
                if (call := self._calls.pop(failed.key, None)) is not None:
                    _settle(call[1], messages.error_of(failed))
                elif (asked := self._asked.pop(failed.key, None)) is not None:
                    _settle(asked.future, messages.error_of(failed))
            self._on_wire -= len(message.answers) + len(message.failures)

    def _send(self) -> None:
        """Send what waits, as far as the daemon has given credit."""
        packer, items, cancelled, now = Packer(), list[Infer](), list[int](), time.monotonic()
        while self._outbox and self._on_wire < self._credit:
            key = self._outbox.popleft()
            if (call := self._calls.get(key)) is not None:
                self._socket.send(messages.encode(msgspec.structs.replace(call[0], key=key)))
                self._on_wire += 1
            elif (asked := self._asked.get(key)) is None:
                continue
            elif asked.future.cancelled():
                cancelled.append(key)
            elif asked.deadline <= now:
                del self._asked[key]
                _settle(asked.future, DeadlineExceeded("the deadline passed on the way"))
            else:
                self._on_wire += 1
                left_ms = (asked.deadline - now) * 1e3
                items.append(
                    Infer(
                        key,
                        asked.request.model_name,
                        asked.request.model_version,
                        asked.request.outputs,
                        left_ms if left_ms < math.inf else None,
                        dict(asked.request.parameters),
                        tuple(asked.request.inputs),
                        tuple(packer.place(*contents) for contents in asked.tensors),
                    )
                )
        if items or cancelled:
            message = Requests(tuple(items), tuple(cancelled))
            packer.send(self._socket, messages.encode(message))


def shared_folder(config: LraiConfig, address: str = "") -> Path:
    """Return the folder of the daemon's socket and lock, made if it is not there.

    Args:
        config: Its `runtime.socket_dir` holds the folder of each user.
        address: Another folder, for a daemon beside this user's first one.

    Raises:
        EnvironmentProblem: It is not this user's alone: what lies there could be anybody's.
    """
    parent = config.runtime.socket_dir or tempfile.gettempdir()
    folder = Path(address or Path(parent, f"lrai-{os.geteuid()}"))
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
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        with (folder / "log").open("wb") as log:
            # The lock belongs to the open file, which the daemon inherits and keeps for life.
            command = [sys.executable, "-P", "-m", "lrai_core.runtime.daemon", str(folder)]
            daemon = subprocess.Popen(
                [*command, "stay" if stay else "end"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
                pass_fds=(lock.fileno(),),
            )
    with daemon.stdin as stream:  # type: ignore[union-attr] # a pipe
        stream.write(msgspec.json.encode(config))
    return daemon


def is_running(folder: Path) -> bool:
    """Return whether a daemon holds the lock of the folder."""
    with (folder / "lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _contents(name: str, given: Any) -> Contents:
    if isinstance(given, Tensor):
        return given.datatype, given.shape, memoryview(given.data)
    if not isinstance(given, np.ndarray):
        raise InvalidTensor(name, f"got a {type(given).__name__}, a numpy array is needed")
    return messages.contents(given)


def _settle(future: Future[Any], outcome: Any = None) -> None:
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, LraiError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
