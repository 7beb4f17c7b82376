"""Supervisor of actors: starts them, hears them, kills what hangs, brings back what died.

Single-threaded: everything runs in the scheduler's thread, and nothing waits but `close`. Messages
go over one socket; beside it every actor holds one end of a line of its own, on which it shows its
progress, and whose end is its death, noticed at once. An actor keeps nothing that a kill could
harm, so killing is how it is stopped.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Final, Literal

import zmq

from lrai_core.config import ActorConfig
from lrai_core.engine.batching import coalesce, split
from lrai_core.errors import ArtifactError, EnvironmentProblem, LraiError, NotReady, OutOfResources
from lrai_core.events import EventBus
from lrai_core.protocol import Array
from lrai_core.wire import messages
from lrai_core.wire.arena import Arenas
from lrai_core.wire.messages import BadFrames, Executed, FromActor, Load, Packer, Refused
from lrai_core.wire.workers import Answered, Batch, GaveUp, Lost, Outcome

# Between looks, of which one is due every second at the latest; whether a killed process has ended.
_STOPPED_SECONDS, _REAP_SECONDS = 2.0, 0.005
_SIGNALS: Final = {one.value: one.name for one in signal.Signals}  # others have numbers only
_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 0.1, 5.0
_MEMORY: Final = Path("/sys/fs/cgroup/memory.events")  # version 2's, as a container sees its own
_SHORT: Final = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}  # later it may go


@dataclass(slots=True, eq=False)
class _Actor:
    """One life of an actor; the next one is another object under the same name."""

    name: str
    load: Load
    loaded: Future[None]  # settled by the first life
    due: float = 0.0  # waiting: starts then; starting, ready: killed then; ending: next look
    deaths: list[float] = field(default_factory=list)  # of earlier lives
    answered: bool = False  # in this life or an earlier one
    fatal: int = 0  # lives that requests have ended since
    identity: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    state: Literal["waiting", "starting", "ready", "ending"] = "waiting"
    was_ready: bool = False
    process: Popen[bytes] | None = None
    oom_kills: str = ""  # of the cgroup, when it was started
    line: socket.socket | None = None  # until it is killed
    batches: deque[Batch] = field(default_factory=deque)  # the first one runs
    why: str = ""  # it was killed, or will be when nothing is heard of it before `due`

    def expect(self, seconds: float, complaint: str) -> None:
        """Give it so long until it has to be heard of."""
        self.due, self.why = time.monotonic() + seconds, f"{complaint} in {round(seconds, 1):g} s"


class Pool:
    """All actors of a runtime, behind the `Workers` protocol."""

    def __init__(self, folder: Path, config: ActorConfig, events: EventBus) -> None:
        """Bind the socket that actors connect to, in `folder`, which only this user may enter."""
        self._config, self._events = config, events
        self._actors: dict[str, _Actor] = {}
        self._lives: dict[bytes, _Actor] = {}  # by identity, also those that nobody wants any more
        self._outcomes: list[Outcome] = []
        self._address = f"ipc://{folder}/actors"
        self._socket = messages.listen(self._address)
        self.lines = {"actor": self._socket}  # by whom they lead to
        self.arenas, self.dropped_frames, self._polled = Arenas(), 0, time.monotonic()

    def add(self, name: str, load: Load, loaded: Future[None]) -> None:
        """Start an actor that opens `load`; `loaded` is settled when it has, or cannot."""
        self._enlist(_Actor(name, load, loaded))

    def remove(self, name: str) -> None:
        """Kill the actor, if there is one; a batch in it is lost."""
        if actor := self._actors.pop(name, None):
            self._kill(actor, "the actor was removed")
            if not actor.loaded.done():
                actor.loaded.set_exception(NotReady("the runtime was closed, or the model removed"))

    def close(self) -> None:
        """Kill every actor, wait until all are gone, and close the socket."""
        for name in list(self._actors):
            self.remove(name)
        for actor in list(self._lives.values()):
            if actor.process is not None:
                self._ended(actor, actor.process.wait(), time.monotonic())
        self._socket.context.destroy(linger=0)

    def register(self, poller: zmq.Poller) -> None:
        """See `Workers.register`."""
        self._poller = poller
        poller.register(self._socket, zmq.POLLIN)

    def state(self, name: str) -> tuple[str, int | None]:
        """See `Workers.state`."""
        if actor := self._actors.get(name):
            return actor.state, actor.process.pid if actor.process else None
        return "failed", None

    def next_check(self, now: float) -> float:
        """See `Workers.next_check`."""
        return min([now + 1.0, *(actor.due for actor in self._lives.values())])

    def dispatch(self, name: str, batch: Batch) -> None:
        """See `Workers.dispatch`."""
        actor, requests = self._actors[name], batch.requests
        parts: list[Sequence[Array]] = [request.arrays for request in requests]
        if all(request.nbytes < messages.OWN_FRAME_BYTES for request in requests):
            # Copied either way, and what is done here is not done on the engine's CPU.
            parts = [coalesce(parts, actor.load.signature)]
        packer = Packer(self.arenas.find)
        tensors = tuple([packer.pack(part) for part in parts])
        told = (batch.number, batch.outputs(), tensors, packer.segments, batch.variant)
        packer.send(self._socket, messages.Execute(*told), actor.identity)
        actor.batches.append(batch)  # which there had to be the memory to send
        if len(actor.batches) == 1:
            self._watch(actor)

    def poll(self, now: float, ready: Collection[object]) -> list[Outcome]:
        """See `Workers.poll`."""
        slept, self._polled = self.slept(now), now
        for actor in self._lives.values():  # before what they say now gives them their time anew
            actor.due += slept
        lines = [a.line for a in self._lives.values() if a.line and a.line.fileno() in ready]
        if lines or self._socket in ready:
            self._receive()  # before the lines: an answer counts though its actor died after it
        for actor in list(self._lives.values()):
            if actor.line and actor.line in lines:
                if not actor.line.recv(4096):
                    self._kill(actor, "")  # the line ended, so it is dead or as good as that
                elif actor.state == "ready" and not actor.batches:
                    self._watch(actor)  # at a batch, only the answer is progress
            if now >= actor.due:
                self._supervise(actor, now)
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def slept(self, now: float) -> float:
        """Return for how long this process was stopped since the last look; so was all it hears."""
        return gap if (gap := now - self._polled) > _STOPPED_SECONDS else 0.0

    def _receive(self) -> None:
        for identity, *frames in messages.receive(self._socket):
            actor = self._lives.get(bytes(identity))
            if actor is None or actor.state == "ending" or not frames:
                self.dropped_frames += 1  # a stranger, or an actor already given up
                continue
            try:
                self._take(actor, messages.decode_from_actor(frames[0]), frames[1:])
            except BadFrames as error:
                self.dropped_frames += 1
                self._kill(actor, f"the model's process broke the protocol ({error})")

    def _take(self, actor: _Actor, message: FromActor, frames: list[memoryview]) -> None:
        match message:
            case messages.Hello(version=version):
                if version != (own := messages.PROTOCOL_VERSION):
                    raise BadFrames(f"version {version}, not {own}: actor.python has another lrai")
                self._socket.say(actor.load, actor.identity)
            case messages.Ready(load_seconds=seconds):
                actor.state, actor.was_ready = "ready", True
                self._watch(actor)
                self._events.emit("actor_ready", actor.name, load_seconds=seconds)
                if not actor.loaded.done():
                    actor.loaded.set_result(None)
            case messages.LoadFailed(message=text) if actor.loaded.done():
                self._kill(actor, text)  # it could be opened before: that counts as a death
            case messages.LoadFailed(message=text, environment=here):
                self._give_up(actor, EnvironmentProblem(text) if here else ArtifactError(text))
            case Executed() | Refused():
                self._outcomes.append(_outcome(actor, message, frames))
                actor.answered, actor.fatal = True, 0
                actor.batches.popleft()
                self._watch(actor)

    def _watch(self, actor: _Actor) -> None:
        """Expect the end of the batch that runs now, or a sign of life where none does."""
        if actor.batches:
            given, predicted = self._config, actor.batches[0].predicted_seconds
            # Of a source model that serves in a variant's place nobody has measured what it takes.
            unknown = given.start_timeout_seconds * actor.load.optimise
            limit = max(given.hang_seconds, given.hang_factor * predicted, unknown)
            actor.expect(limit, "the model made no progress")
        else:
            actor.expect(self._config.hang_seconds, "the model's process gave no sign of life")

    def _supervise(self, actor: _Actor, now: float) -> None:
        """Do what is due."""
        if actor.state in ("starting", "ready"):
            self._events.emit("actor_hung", actor.name, reason=actor.why)
            self._kill(actor, actor.why)
        elif actor.process is None:
            self._spawn(actor)
        elif (status := actor.process.poll()) is None:
            actor.due = now + _REAP_SECONDS
        else:
            self._ended(actor, status, now)

    def _ended(self, actor: _Actor, status: int, now: float) -> None:
        """Take note of a death, and plan the next life if one is wanted."""
        del self._lives[actor.identity]
        how = f"signal {_SIGNALS.get(-status, -status)}" if status < 0 else f"exit status {status}"
        why = actor.why or f"the model's process ended with {how}"
        killed = status == -signal.SIGKILL and not actor.why  # by somebody else
        if killed and _oom_kills() != actor.oom_kills:
            why += " (memory has run out since it was started: oom_kill)"
        self._outcomes += [Lost(b.number, why, i == 0, killed) for i, b in enumerate(actor.batches)]
        if self._actors.get(actor.name) is not actor:  # removed or given up: nobody misses it
            return
        self._events.emit("actor_lost", actor.name, reason=why)
        window, deaths, pause = self._config.restart_window_seconds, actor.deaths, 0.0
        if actor.was_ready:
            deaths = [death for death in deaths if now - death <= window]
        else:  # lives that never get ready add up, however long they take
            pause = min(_BACKOFF_SECONDS * 2 ** len(deaths), _MAX_BACKOFF_SECONDS)
        # Each request is tried twice, so what befell it counts half, and no more once another is
        # answered: who asks what kills, and tries again, must not take the model from all.
        fatal = actor.fatal + (blamed := bool(actor.batches) and actor.answered)
        deaths = deaths if blamed else [*deaths, now]
        if not actor.loaded.done():
            # Killed for want of memory or time, or with a whole service: that may be another time.
            kind = OutOfResources if -status in (signal.SIGKILL, signal.SIGTERM) else ArtifactError
            self._give_up(actor, kind(f"{why} while it opened the model"))
        elif len(deaths) + fatal / 2 > self._config.restart_limit:
            span = max([window, *(now - death for death in deaths[:1])])
            loop = f"crash loop: {len(deaths) + fatal} deaths within {span:.0f} s; the last: {why}"
            self._give_up(actor, ArtifactError(loop))
        else:
            known = (actor.load, actor.loaded, now + pause, deaths, actor.answered, fatal)
            self._enlist(_Actor(actor.name, *known))

    def _give_up(self, actor: _Actor, error: LraiError) -> None:
        """Stop for good, and say why: to the scheduler, the first time to the loader too."""
        if not actor.loaded.done():
            actor.loaded.set_exception(error)
        self.remove(actor.name)
        self._events.emit("model_failed", actor.name, reason=str(error))
        self._outcomes.append(GaveUp(actor.name, str(error)))

    def _enlist(self, actor: _Actor) -> None:
        self._actors[actor.name] = self._lives[actor.identity] = actor

    def _spawn(self, actor: _Actor) -> None:
        command = [self._config.python or sys.executable, "-P", "-m", "lrai_core.actor.actor"]
        command += [self._address, actor.identity.hex(), str(self._config.heartbeat_ms)]
        try:
            actor.line, theirs = socket.socketpair()
            with theirs:  # in a session of its own, out of reach of a terminal's signals
                end = theirs.fileno()
                actor.process = Popen(command, stdin=end, stdout=DEVNULL, start_new_session=True)
        except OSError as error:
            if actor.line is not None:
                actor.line.close()
            actor.why = f"the interpreter of actor.python cannot be started: {error.strerror}"
            short = error.errno in _SHORT
            if not actor.loaded.done():
                self._give_up(actor, (OutOfResources if short else EnvironmentProblem)(actor.why))
            elif short:  # it could be before: that is no death, and tried again
                actor.line, actor.due = None, time.monotonic() + 10 * _BACKOFF_SECONDS
                self._events.emit("actor_lost", actor.name, reason=actor.why)
            else:
                self._ended(actor, 1, time.monotonic())
            return
        self._poller.register(actor.line, zmq.POLLIN)
        actor.expect(self._config.start_timeout_seconds, "the model was not loaded")
        actor.oom_kills, actor.state = _oom_kills(), "starting"
        self._events.emit("actor_started", actor.name, pid=actor.process.pid)

    def _kill(self, actor: _Actor, why: str) -> None:
        """End this life; `poll` sees to the rest once the process is gone."""
        if actor.process is None:
            self._lives.pop(actor.identity, None)
        elif actor.line is not None:
            actor.process.kill()  # first: the line's end would say that the parent is gone
            self._poller.unregister(actor.line)
            actor.line.close()
            actor.state, actor.line, actor.due, actor.why = "ending", None, 0.0, why


def _oom_kills() -> str:
    """Return how many processes of this cgroup the kernel has killed for memory, if it tells."""
    with contextlib.suppress(OSError):
        return _MEMORY.read_text(encoding="ascii").partition("oom_kill ")[2].partition("\n")[0]
    return ""


def _outcome(actor: _Actor, message: Executed | Refused, frames: Sequence[memoryview]) -> Outcome:
    if not actor.batches or message.batch != actor.batches[0].number:
        raise BadFrames("it speaks of a batch at which it is not")
    if isinstance(message, Refused):
        return message
    batch = actor.batches[0]
    if len(message.outputs) != len(batch.outputs()):
        raise BadFrames("other outputs than the requests want")
    outputs = [messages.unpack(tensor, frames) for tensor in message.outputs]
    return answered(batch, outputs, message.engine_seconds, actor.load)


def answered(batch: Batch, outputs: Sequence[Array], seconds: float, load: Load) -> Outcome:
    """Return a copy of every request's own rows of what it wants, after `seconds` of engine."""
    wanted = batch.outputs()
    specs = [load.signature.outputs[index] for index in wanted]
    rows, lengths = [r.rows for r in batch.requests], [r.length for r in batch.requests]
    try:
        parts = zip(batch.requests, split(outputs, specs, rows, lengths), strict=True)
        answers = [[part[wanted.index(i)].copy() for i in r.outputs] for r, part in parts]
    except (ValueError, IndexError, MemoryError) as error:  # not what the model declares
        return Refused(batch.number, str(error), invalid=False)
    return Answered(batch.number, answers, seconds)
