"""The worker process of one model.

Started as `python -P -m lrai_core.actor.actor ADDRESS IDENTITY HEARTBEAT_MS`, it opens what `Load`
names, answers `Execute` until `Stop`, and ends by itself when its parent does.
The main thread owns one socket and runs the engine; a second thread with a socket of its own sends
heartbeats that carry the number of finished calls, so that a live process that makes no progress
shows. Model files are parsed here first: if that kills the process, nothing else is lost.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Final

import numpy as np
import zmq

from lrai_core.artifact import FileEntry, check_files
from lrai_core.engine.batching import coalesce, split, synthetic_row
from lrai_core.engine.engine import Session, find_engine
from lrai_core.errors import EngineError, EnvironmentProblem, LraiError
from lrai_core.protocol import Signature
from lrai_core.wire import messages
from lrai_core.wire.messages import BadFrames, Execute, Load, Stop

HEARTBEAT_SUFFIX: Final = b"/heartbeat"


class Actor:
    """One model in one process."""

    def __init__(self, address: str, identity: bytes, heartbeat_seconds: float) -> None:
        self._context = zmq.Context()
        self._socket = _dealer(self._context, address, identity)
        self._finished = 0
        threading.Thread(
            target=self._beat, args=(address, identity, heartbeat_seconds), daemon=True
        ).start()
        self._send(messages.Hello(messages.PROTOCOL_VERSION))

    def run(self) -> None:
        """Serve until told to stop."""
        session: Session | None = None
        signature: Signature | None = None
        while True:
            frames = [frame.buffer for frame in self._socket.recv_multipart(copy=False)]
            try:
                message = messages.decode_to_actor(frames[0])
            except BadFrames:
                continue
            if isinstance(message, Stop):
                return
            if isinstance(message, Load):
                session, signature = self._load(message), message.signature
            elif session is None or signature is None:
                self._send(messages.ExecuteFailed(message.batch, "nothing is loaded"))
            else:
                self._execute(session, signature, message, frames[1:])
                self._finished += 1

    def _load(self, load: Load) -> Session | None:
        started = time.monotonic()
        folder = Path(load.folder)
        try:
            check_files(
                folder, {n: FileEntry(sha256=h, size_bytes=s) for n, (h, s) in load.files.items()}
            )
            session = find_engine(load.engine).load(
                folder / load.model,
                weights=folder / load.weights if load.weights else None,
                threads=load.threads,
                optimise=load.optimise,
            )
        except LraiError as error:
            here = isinstance(error, EnvironmentProblem)
            self._send(messages.LoadFailed(str(error), environment=here))
            return None
        # Once, so that the first caller does not pay for what engines put off until then. A made-up
        # row may be no valid input.
        with contextlib.suppress(EngineError):
            session.run(synthetic_row(load.signature, length=8))
        self._send(messages.Ready(time.monotonic() - started))
        return session

    def _execute(
        self, session: Session, signature: Signature, execute: Execute, frames: list[memoryview]
    ) -> None:
        try:
            wanted = sorted({index for item in execute.items for index in item.outputs})
            requests = [
                [messages.unpack(t, frames) for t in item.tensors] for item in execute.items
            ]
            arrays = coalesce(requests, signature)
            started = time.perf_counter()
            outputs = session.run(arrays, wanted)
            seconds = time.perf_counter() - started
            answers = split(
                outputs,
                [signature.outputs[index] for index in wanted],
                [item.rows for item in execute.items],
                [item.length for item in execute.items],
            )
            packer = messages.Packer()
            items = tuple(
                tuple(
                    packer.add(np.asarray(answer[wanted.index(index)], order="C"))
                    for index in item.outputs
                )
                for item, answer in zip(execute.items, answers, strict=True)
            )
        except EngineError as error:
            self._send(messages.ExecuteFailed(execute.batch, str(error), invalid=error.invalid))
            return
        except Exception as error:  # noqa: BLE001 - edge: whatever a model raises is the batch's outcome
            self._send(messages.ExecuteFailed(execute.batch, type(error).__name__))
            return
        packer.send(self._socket, messages.encode(messages.Executed(execute.batch, seconds, items)))

    def _send(self, message: messages.FromActor) -> None:
        self._socket.send(messages.encode(message))

    def _beat(self, address: str, identity: bytes, seconds: float) -> None:
        socket = _dealer(self._context, address, identity + HEARTBEAT_SUFFIX)
        parent = os.getppid()
        # A fork of the parent may hold the pipe open that `_end_with_parent` waits on.
        while os.getppid() == parent:
            socket.send(messages.encode(messages.Heartbeat(self._finished)))
            time.sleep(seconds)
        _end(address)


def main(argv: list[str]) -> None:
    """Run an actor until it is told to stop."""
    address, identity, heartbeat_ms = argv
    # Ctrl-C goes to the whole foreground group; when an actor ends is its parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(address,), daemon=True).start()
    Actor(address, bytes.fromhex(identity), int(heartbeat_ms) / 1000).run()
    # Skips the engine's destructors: the parent waits for this exit, and the kernel frees faster.
    os._exit(0)


def _end_with_parent(address: str) -> None:
    """End this process at once when its parent is gone: the pipe on standard input closes."""
    while os.read(0, 1):
        pass
    _end(address)


def _end(address: str) -> None:
    """End, and take along the socket that a parent which was killed has left."""
    socket = Path(address.removeprefix("ipc://"))
    with contextlib.suppress(OSError):
        socket.unlink()
        socket.parent.rmdir()
    os._exit(0)


def _dealer(
    context: zmq.Context[zmq.Socket[bytes]], address: str, identity: bytes
) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.ROUTING_ID, identity)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.connect(address)
    return socket


if __name__ == "__main__":
    main(sys.argv[1:])
