"""The daemon: one scheduler and one set of actors for every process that attaches.

Started by the first client as `python -m lrai_core.runtime.daemon FOLDER STAY`, with its settings
on standard input and the lock on the folder already held, which it keeps for life: whoever gets the
lock knows that no daemon is there. It ends when told to, or half a minute after the last client.
What was loaded when a daemon is killed, the next one loads again before it hears anybody.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import zmq

from lrai_core.actor.pool import Pool
from lrai_core.config import ActorConfig, LraiConfig
from lrai_core.engine.engine import installed_version
from lrai_core.errors import LraiError, NotReady, UsageError, shorten
from lrai_core.events import EventBus
from lrai_core.protocol import Array, InferenceRequest, Tensor
from lrai_core.runtime.embedded import Embedded, Served
from lrai_core.scheduler.scheduler import Pending
from lrai_core.wire import messages
from lrai_core.wire.messages import Answer, Attach, Attached, BadFrames, Call, Infer, Requests
from lrai_core.wire.workers import Outcome

_SILENT_SECONDS: Final = 5.0  # without a sign of life a client is gone
_IDLE_SECONDS: Final = 30.0
_OPERATIONS: Final = frozenset({"load", "unload", "models", "ready", "stats", "drain", "stop"})


@dataclass(slots=True)
class _Client:
    """One attached process."""

    heard: float
    running: dict[int, Pending] = field(default_factory=dict)
    answered: list[tuple[int, Served, list[Array]]] = field(default_factory=list)
    failed: list[messages.Failure] = field(default_factory=list)


class Door(Pool):
    """The pool of a daemon, which hears its clients too: all in the scheduler's thread."""

    opened = False  # until then nobody is heard

    def __init__(
        self, daemon: Daemon, address: Path, folder: Path, config: ActorConfig, events: EventBus
    ) -> None:
        """Bind the socket that clients connect to, and that of the actors."""
        super().__init__(folder, config, events)
        address.unlink(missing_ok=True)
        self._daemon, self._clients, self._flushing = daemon, dict[bytes, _Client](), False
        self._door = messages.listen(f"ipc://{address}")
        self.idle_since = time.monotonic()

    def register(self, poller: zmq.Poller) -> None:
        """See `Workers.register`."""
        super().register(poller)
        poller.register(self._door, zmq.POLLIN)

    def close(self) -> None:
        """Close both sockets, and end every actor."""
        super().close()
        self._door.context.destroy(linger=0)

    def poll(self, now: float) -> list[Outcome]:
        """See `Workers.poll`."""
        while self.opened and self._door.poll(0):
            sender, *frames = [part.buffer for part in self._door.recv_multipart(copy=False)]
            try:
                self._hear(bytes(sender), messages.decode_from_client(frames[0]), frames[1:], now)
            except (BadFrames, IndexError):
                self.dropped_frames += 1
        for identity, client in list(self._clients.items()):
            if now - client.heard > _SILENT_SECONDS:  # what it asked for and was not begun goes
                for pending in list(self._clients.pop(identity).running.values()):
                    self._daemon.runtime.scheduler.cancel(pending)
        self.idle_since = now if self._clients else self.idle_since
        return super().poll(now)

    def _hear(
        self, sender: bytes, message: messages.FromClient, frames: list[memoryview], now: float
    ) -> None:
        client = self._clients.get(sender)
        if isinstance(message, Attach):
            if client is None and message.version == messages.PROTOCOL_VERSION:
                client = self._clients[sender] = _Client(now)
            self.send(sender, self._daemon.attached)
        if client is None:
            return  # it attaches again, and sends again what it asked
        client.heard = now
        if isinstance(message, Requests):
            for item in message.items:
                if item.key not in client.running:
                    self._start(client, item, frames)
            for key in message.cancelled:
                if key in client.running:
                    self._daemon.runtime.scheduler.cancel(client.running[key])
        elif isinstance(message, Call):
            self._daemon.operate(message, partial(self.send, sender))

    def send(self, receiver: bytes, message: messages.ToClient) -> None:
        """Send a message without tensors. Runs in the scheduler's thread."""
        self._door.send_multipart([receiver, messages.encode(message)])

    def _start(self, client: _Client, item: Infer, frames: list[memoryview]) -> None:
        inputs = {
            name: Tensor(
                name=name, datatype=t.datatype, shape=t.shape, data=messages.view(t, frames)
            )
            for name, t in zip(item.names, item.tensors, strict=False)
        }
        request = InferenceRequest(
            model_name=item.model_name,
            model_version=item.model_version,
            inputs=inputs,
            outputs=item.outputs,
            timeout_ms=item.timeout_ms,
            parameters=item.parameters,
        )
        ended = partial(self._settle, client, item.key)
        try:
            client.running[item.key] = self._daemon.runtime.accept(request, ended)
        except LraiError as error:
            ended(None, None, error)

    def _settle(
        self,
        client: _Client,
        key: int,
        served: Served | None,
        arrays: list[Array] | None,
        error: LraiError | None,
    ) -> None:
        client.running.pop(key, None)
        if served is not None and arrays is not None:
            client.answered.append((key, served, arrays))
        elif error is not None:
            client.failed.append(messages.failure(key, error))
        if not self._flushing:  # once for all that end in this step
            self._flushing = True
            self._daemon.runtime.scheduler.call(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        for identity, client in self._clients.items():
            if client.answered or client.failed:
                packer = messages.Packer()
                answers = tuple(
                    Answer(
                        key,
                        served.model.name,
                        served.model.version,
                        served.parameters,
                        served.outputs,
                        packer.pack(arrays),
                    )
                    for key, served, arrays in client.answered
                )
                replies = messages.Replies(answers, tuple(client.failed))
                client.answered, client.failed = [], []
                packer.send(self._door, identity, messages.encode(replies))


class Daemon:
    """A runtime behind a door, from its start to its end."""

    def __init__(self, folder: Path, config: LraiConfig, *, stay: bool) -> None:
        """Load what the last daemon had loaded when it was killed, then open the door."""
        version = installed_version("lrai")
        credit = config.scheduler.max_queue_rows
        self.attached = Attached(messages.PROTOCOL_VERSION, version, secrets.token_hex(8), credit)
        self._stay = stay
        self._ended = threading.Event()
        self._work = ThreadPoolExecutor(1, "lrai-operations")  # one load after the other
        self._record = folder / "loaded.json"
        self._loaded: dict[str, dict[str, Any]] = {}
        self.runtime = Embedded(config, pool=partial(self._make_door, folder / "clients"))
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            content = msgspec.json.decode(self._record.read_bytes(), type=dict[str, dict[str, Any]])
            for arguments in content.values():
                with contextlib.suppress(LraiError):  # whoever needs it loads it, and is told why
                    self._operate("load", arguments)
        self._door.opened = True

    def _make_door(self, *arguments: Any) -> Door:
        self._door = Door(self, *arguments)
        return self._door

    def run(self) -> None:
        """Serve until told to stop, or until nobody needs it any more."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._ended.set())
        while not self._ended.wait(1.0):
            idle = time.monotonic() - self._door.idle_since
            if idle > _IDLE_SECONDS and not self._stay:
                break
        self._record.unlink(missing_ok=True)
        self.runtime.drain()
        self._work.shutdown()
        self.runtime.close()

    def operate(self, call: Call, reply: Any) -> None:
        """Run an operation beside the scheduler's thread, and reply in it."""
        work = self._work.submit(self._operate, call.operation, call.arguments)
        work.add_done_callback(partial(self._reply, call.key, reply))

    def _operate(self, operation: str, arguments: dict[str, Any]) -> Any:
        if operation not in _OPERATIONS:
            known = ", ".join(sorted(_OPERATIONS))
            raise UsageError(f"operation {shorten(operation)!r} is unknown; known: {known}")
        if operation == "stop":
            return self._ended.set()
        if operation == "load":
            result: Any = self.runtime.load(**arguments, shared=True)
            self._loaded[result] = arguments
        else:
            result = getattr(self.runtime, operation)(**arguments)
        if operation == "unload":
            self._loaded.pop(arguments["name"], None)
        if operation in ("load", "unload"):
            self._record.write_bytes(msgspec.json.encode(self._loaded))
        return result

    def _reply(self, key: int, reply: Any, work: Future[Any]) -> None:
        error = work.exception()
        message: messages.ToClient
        if error is None:
            message = messages.Returned(key, work.result())
        else:
            known = error if isinstance(error, LraiError) else UsageError(f"{error}")
            message = messages.Replies(failures=(messages.failure(key, known),))
        with contextlib.suppress(NotReady):  # it is closing, and its clients find out
            self.runtime.scheduler.call(partial(reply, message))


def main(argv: list[str]) -> None:
    """Run the daemon."""
    folder, stay = argv
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=LraiConfig)
    Daemon(Path(folder), config, stay=stay == "stay").run()


if __name__ == "__main__":
    main(sys.argv[1:])
