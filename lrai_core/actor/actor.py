"""The worker process of one model.

Started as `python -P -m lrai_core.actor.actor ADDRESS IDENTITY HEARTBEAT_MS`, it opens what `Load`
names and answers `Execute` until it is killed, or ends by itself when its parent does.
The main thread owns one socket and runs the engine. Standard input is one end of a line to the
parent, on which a second thread beats: a process that is stopped shows by its silence, and either
side's death by the line's end. Model files are parsed here first: if that kills the process,
nothing else is lost.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from lrai_core.artifact import FileEntry, check_files
from lrai_core.engine.batching import coalesce, stretch, synthetic_row
from lrai_core.engine.engine import Session, find_engine
from lrai_core.errors import EngineError, EnvironmentProblem, LraiError
from lrai_core.wire import messages
from lrai_core.wire.arena import Arenas


class Actor:
    """One model in one process."""

    def __init__(self, address: str, identity: bytes) -> None:
        self._socket, self._arenas = messages.connect(address, identity), Arenas()

    def run(self) -> NoReturn:
        """Serve until killed. What does not decode is not from a parent of this version: raise."""
        self._socket.say(messages.Hello(messages.PROTOCOL_VERSION))
        while True:
            header, *frames = self._socket.hear()
            message = messages.decode_to_actor(header)
            if isinstance(message, messages.Load):
                self._load(message)
            elif isinstance(message, messages.Execute):
                self._execute(message, frames)
            else:
                self._arenas.forget(message.segment)
            del message, frames  # an idle actor keeps no tensors

    def _load(self, load: messages.Load) -> None:
        started, self._signature = time.monotonic(), load.signature
        # Before the engine is imported, which looks there, and starts threads, which inherit.
        os.environ.update({"CUDA_VISIBLE_DEVICES": load.device} if load.device else {})
        with contextlib.suppress(OSError):  # a sandbox knows of one policy only
            if os.sched_getscheduler(0) == os.SCHED_BATCH:  # as a daemon's threads are
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        with contextlib.suppress(OSError):  # it names none, or those are gone by now
            os.sched_setaffinity(0, load.cpus)
        try:
            self._sessions = open_sessions(load)
            self._socket.say(messages.Ready(time.monotonic() - started))
        except LraiError as error:
            self._socket.say(messages.LoadFailed(str(error), isinstance(error, EnvironmentProblem)))

    def _execute(self, call: messages.Execute, frames: list[memoryview]) -> None:
        try:
            shared = [self._arenas.open(segment) for segment in call.segments]
            parts = [[messages.unpack(t, frames, shared) for t in part] for part in call.parts]
            arrays = coalesce(parts, self._signature)
            started = time.perf_counter()
            outputs = self._sessions[call.variant].run(arrays, call.outputs)
            seconds, packer = time.perf_counter() - started, messages.Packer()
            packer.send(self._socket, messages.Executed(call.batch, seconds, packer.pack(outputs)))
        except Exception as error:  # noqa: BLE001 - edge: whatever a model raises is the batch's outcome
            known = (str(error), error.invalid) if isinstance(error, EngineError) else None
            gone = isinstance(error, messages.BadFrames)  # with who sent them
            self._socket.say(messages.Refused(call.batch, *known or (type(error).__name__, gone)))


def open_sessions(load: messages.Load) -> list[Session]:
    """Return what `load` names, its variants in order, once files are checked and each has run.

    Raises:
        ArtifactError, EnvironmentProblem: See `check_files` and `Engine.load`.
    """
    folder = Path(load.folder)
    check_files(folder, {n: FileEntry(sha256=h, size_bytes=s) for n, (h, s) in load.files.items()})
    sessions = list[Session]()
    for engine, model, external in ((load.engine, load.model, load.weights), *load.beside):
        graph, weights = folder / model, folder / external if external else None
        start = find_engine(engine).load
        sessions.append(start(graph, weights=weights, threads=load.threads, optimise=load.optimise))
        # So that the first caller does not pay for what engines put off until then: once, and in
        # the calls that come most. A made-up row may be no valid input.
        for n, at in ((1, 8), *load.signature.calls):
            with contextlib.suppress(EngineError):
                sessions[-1].run(stretch(synthetic_row(load.signature, 8), load.signature, n, at))
    return sessions


def main(argv: list[str]) -> NoReturn:
    """Run an actor until its parent kills it or ends."""
    address, identity, heartbeat_ms = argv
    # A private copy: what the engine starts must not keep the line open after this process.
    line = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # to a whole service: its runtime drains first
    threading.Thread(target=_beat, args=(line, address, int(heartbeat_ms)), daemon=True).start()
    Actor(address, bytes.fromhex(identity)).run()


def _beat(line: socket.socket, address: str, heartbeat_ms: int) -> NoReturn:
    """Show the parent that this process runs, and end it at once when the parent is gone."""
    parent = os.getppid()
    # The parent never writes, so readable means ended. A fork of the parent may hold its end of the
    # line open, hence the second condition.
    while not select.select([line], [], [], heartbeat_ms / 1000)[0] and os.getppid() == parent:
        with contextlib.suppress(OSError):  # full: the parent is busy, and hears enough later
            line.send(b".", socket.MSG_DONTWAIT)
    endpoint = Path(address.removeprefix("ipc://"))  # which a parent that was killed has left
    with contextlib.suppress(OSError):
        endpoint.unlink()
        endpoint.parent.rmdir()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
