"""Supervisor of actors: starts them, hears them, kills what hangs, brings back what died.

Single-threaded: everything runs in the scheduler's thread. A death is noticed at once through a
process descriptor where the system has them, otherwise at the next heartbeat.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import zmq

from lrai_core.actor.actor import HEARTBEAT_SUFFIX
from lrai_core.config import ActorConfig, actor_python
from lrai_core.errors import ArtifactError, EnvironmentProblem, LraiError
from lrai_core.events import EventBus
from lrai_core.protocol import ValidRequest
from lrai_core.wire import messages
from lrai_core.wire.messages import BadFrames, Item, Load
from lrai_core.wire.workers import Answered, GaveUp, Lost, Outcome, Refused

_LOOK_SECONDS: Final = 0.005  # a death is seen as late as this; a system call each step is dear
_MAX_IPC_PATH: Final = 100  # a Unix socket's path has 108 bytes
_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 0.1, 5.0
_STOP_SECONDS: Final = 2.0

Loaded = Callable[[LraiError | None], None]


@dataclass(slots=True)
class _Actor:
    """One model's process, over all its lives."""

    model: str
    load: Load
    loaded: Loaded | None  # told once, of the first life
    state: Literal["waiting", "starting", "ready", "failed"] = "waiting"
    process: subprocess.Popen[bytes] | None = None
    descriptor: int = -1
    identity: bytes = b""
    start_at: float = 0.0  # when waiting: not before
    deadline: float = 0.0  # when starting: ready by then
    last_heard: float = 0.0
    batch: int | None = None
    batch_outputs: tuple[int, ...] = ()  # how many each of its requests wants
    batch_since: float = 0.0
    batch_limit: float = 0.0  # seconds
    finished: int = 0  # calls, as its heartbeats say
    looked: float = 0.0  # when its process was last asked for
    deaths: deque[float] = field(default_factory=deque)
    unready_deaths: int = 0
    reason: str = ""


class Pool:
    """All actors of a runtime, behind the `Workers` protocol."""

    def __init__(self, folder: Path, config: ActorConfig, events: EventBus) -> None:
        """Bind the socket that actors connect to, in `folder`, which only this user may enter."""
        path = folder / "actors"
        if len(os.fsencode(path)) > _MAX_IPC_PATH:
            raise EnvironmentProblem(
                f"the socket folder {folder} has a path over {_MAX_IPC_PATH - 7} bytes; "
                "set runtime.socket_dir to a shorter one"
            )
        self._config = config
        self._events = events
        self._actors: dict[str, _Actor] = {}
        self._by_identity: dict[bytes, _Actor] = {}
        self._poller: zmq.Poller | None = None
        self._address = f"ipc://{path}"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # bounded by admission: one batch per actor
        self._socket.setsockopt(zmq.MAXMSGSIZE, 1 << 32)
        try:
            self._socket.bind(self._address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise EnvironmentProblem(f"no socket in {folder}: {error.strerror}") from None
        self.dropped_frames = 0

    def add(self, model: str, load: Load, loaded: Loaded) -> None:
        """Start an actor for `model`; `loaded` is told once, of an error or None."""
        self._actors[model] = _Actor(model=model, load=load, loaded=loaded)
        self._spawn(self._actors[model], time.monotonic(), [])

    def remove(self, model: str) -> None:
        """Stop the model's actor; a batch in it is lost."""
        actor = self._actors.pop(model, None)
        if actor is not None:
            self._stop([actor])

    def close(self) -> None:
        """Stop every actor and close the socket."""
        self._stop(list(self._actors.values()))
        self._actors.clear()
        self._socket.close()
        self._context.term()

    def register(self, poller: zmq.Poller) -> None:
        """See `Workers.register`."""
        self._poller = poller
        poller.register(self._socket, zmq.POLLIN)

    def idle(self, model: str) -> bool:
        """See `Workers.idle`."""
        actor = self._actors.get(model)
        return actor is not None and actor.state == "ready" and actor.batch is None

    def state(self, model: str) -> tuple[str, str]:
        """Return the state of the model's actor and, where it failed, why."""
        actor = self._actors.get(model)
        return (actor.state, actor.reason) if actor else ("failed", "not loaded")

    def pid(self, model: str) -> int | None:
        """Return the process id of the model's actor, None while there is none."""
        actor = self._actors.get(model)
        process = actor.process if actor else None  # read once: the scheduler's thread replaces it
        return process.pid if process else None

    def next_check(self, now: float) -> float:
        """See `Workers.next_check`."""
        checks = [now + 1.0]
        for actor in self._actors.values():
            if actor.state == "waiting":
                checks.append(actor.start_at)
            elif actor.state == "starting":
                checks.append(actor.deadline)
            elif actor.batch is not None:
                checks.append(actor.batch_since + actor.batch_limit)
            if actor.process is not None and actor.descriptor < 0:
                checks.append(now + self._config.heartbeat_ms / 1000)
        return min(checks)

    def dispatch(
        self, model: str, batch: int, requests: Sequence[ValidRequest], predicted_seconds: float
    ) -> None:
        """See `Workers.dispatch`."""
        actor = self._actors[model]
        packer = messages.Packer()
        items = tuple(
            Item(r.rows, r.length, r.outputs, tuple(packer.add(array) for array in r.arrays))
            for r in requests
        )
        actor.batch, actor.batch_outputs = batch, tuple(len(r.outputs) for r in requests)
        actor.batch_since = time.monotonic()
        actor.batch_limit = max(
            self._config.hang_seconds, self._config.hang_factor * predicted_seconds
        )
        packer.send(self._socket, actor.identity, messages.encode(messages.Execute(batch, items)))

    def poll(self, now: float) -> list[Outcome]:
        """See `Workers.poll`."""
        outcomes: list[Outcome] = []
        self._receive(now, outcomes)
        for actor in list(self._actors.values()):
            self._supervise(actor, now, outcomes)
        return outcomes

    def _receive(self, now: float, outcomes: list[Outcome]) -> None:
        while self._socket.poll(0):
            parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            identity = parts[0].bytes
            actor = self._by_identity.get(identity.removesuffix(HEARTBEAT_SUFFIX))
            if actor is None or len(parts) < 2:
                self.dropped_frames += 1  # a stranger, or an actor already given up
                continue
            try:
                message = messages.decode_from_actor(parts[1].buffer)
                self._take(actor, message, [part.buffer for part in parts[2:]], now, outcomes)
            except BadFrames:
                self.dropped_frames += 1
                if actor.process is not None:  # it no longer speaks the protocol: start afresh
                    actor.process.kill()

    def _take(
        self,
        actor: _Actor,
        message: messages.FromActor,
        frames: list[memoryview],
        now: float,
        outcomes: list[Outcome],
    ) -> None:
        actor.last_heard = now
        match message:
            case messages.Hello(version=version):
                if version != messages.PROTOCOL_VERSION:
                    self._fail(
                        actor,
                        f"the actor speaks protocol {version}, this runtime "
                        f"{messages.PROTOCOL_VERSION}: actor.python has another version of lrai",
                        outcomes,
                    )
                else:
                    self._send(actor, actor.load)
            case messages.Ready(load_seconds=seconds):
                actor.state = "ready"
                actor.unready_deaths = 0
                self._events.emit("actor_ready", actor.model, load_seconds=seconds)
                self._tell(actor, None)
            case messages.LoadFailed(message=text, environment=here):
                kind = EnvironmentProblem if here else ArtifactError
                self._fail(actor, text, outcomes, kind)
            case messages.Executed(batch=batch, engine_seconds=seconds, items=items):
                if batch == actor.batch:
                    if tuple(map(len, items)) != actor.batch_outputs:
                        raise BadFrames("other outputs than the requests want")
                    answers = [[messages.unpack(t, frames).copy() for t in item] for item in items]
                    actor.batch = None
                    outcomes.append(Answered(batch, answers, seconds))
            case messages.ExecuteFailed(batch=batch, message=text, invalid=invalid):
                if batch == actor.batch:
                    actor.batch = None
                    outcomes.append(Refused(batch, text, invalid))
            case messages.Heartbeat(finished=finished):
                if finished != actor.finished:  # progress, whatever became of the replies
                    actor.finished, actor.batch_since = finished, now

    def _supervise(self, actor: _Actor, now: float, outcomes: list[Outcome]) -> None:
        if actor.state == "waiting" and now >= actor.start_at:
            self._spawn(actor, now, outcomes)
        if actor.process is None or now < actor.looked + _LOOK_SECONDS:
            return
        actor.looked = now
        status = actor.process.poll()
        if status is None and (problem := self._overdue(actor, now)):
            self._events.emit("actor_hung", actor.model, reason=problem)
            actor.process.kill()
            status = actor.process.wait()
            self._died(actor, problem, now, outcomes)
        elif status is not None:
            self._died(actor, f"the model's process ended with {_status(status)}", now, outcomes)

    def _overdue(self, actor: _Actor, now: float) -> str:
        """Return what the actor has not done in time, empty where it is well."""
        if actor.state == "starting":
            if now >= actor.deadline:
                return f"the model was not loaded within {self._config.start_timeout_seconds:g} s"
        elif actor.batch is not None:
            if now - actor.batch_since >= actor.batch_limit:
                return f"the model made no progress for {actor.batch_limit:.1f} s"
        elif now - actor.last_heard >= self._config.hang_seconds:
            return f"the model's process was silent for {self._config.hang_seconds:g} s"
        return ""

    def _died(self, actor: _Actor, why: str, now: float, outcomes: list[Outcome]) -> None:
        self._events.emit("actor_lost", actor.model, reason=why)
        was_ready = actor.state == "ready"
        self._forget_process(actor)
        if actor.batch is not None:
            outcomes.append(Lost(actor.batch, why))
            actor.batch = None
        if actor.loaded is not None:
            self._fail(actor, f"{why} while it opened the model", outcomes)
            return
        actor.deaths.append(now)
        while actor.deaths and now - actor.deaths[0] > self._config.restart_window_seconds:
            actor.deaths.popleft()
        actor.unready_deaths = 0 if was_ready else actor.unready_deaths + 1
        if max(len(actor.deaths), actor.unready_deaths) > self._config.restart_limit:
            self._fail(
                actor,
                f"crash loop: {len(actor.deaths)} deaths within "
                f"{self._config.restart_window_seconds:g} s; the last: {why}",
                outcomes,
            )
            return
        backoff = _BACKOFF_SECONDS * 2**actor.unready_deaths if actor.unready_deaths else 0.0
        backoff = min(backoff, _MAX_BACKOFF_SECONDS)
        actor.state, actor.start_at = "waiting", now + backoff
        if not backoff:
            self._spawn(actor, now, outcomes)

    def _fail(
        self,
        actor: _Actor,
        why: str,
        outcomes: list[Outcome],
        kind: type[LraiError] = ArtifactError,
    ) -> None:
        """Stop for good, and say why: to the loader the first time, to the scheduler later."""
        self._stop([actor])
        if actor.batch is not None:
            outcomes.append(Lost(actor.batch, why))
            actor.batch = None
        actor.state, actor.reason = "failed", why
        self._events.emit("model_failed", actor.model, reason=why)
        if actor.loaded is not None:
            self._tell(actor, kind(why))
        else:
            outcomes.append(GaveUp(actor.model, why))

    def _tell(self, actor: _Actor, error: LraiError | None) -> None:
        loaded, actor.loaded = actor.loaded, None
        if loaded is not None:
            loaded(error)

    def _spawn(self, actor: _Actor, now: float, outcomes: list[Outcome]) -> None:
        actor.identity = secrets.token_bytes(16)
        command = [actor_python(self._config), "-P", "-m", "lrai_core.actor.actor"]
        command += [self._address, actor.identity.hex(), str(self._config.heartbeat_ms)]
        # Its own session: signals of a terminal reach the runtime, which decides for its actors.
        try:
            actor.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            why = f"the interpreter of actor.python cannot be started: {error.strerror}"
            self._fail(actor, why, outcomes, EnvironmentProblem)
            return
        self._by_identity[actor.identity] = actor
        actor.state, actor.finished = "starting", 0
        actor.deadline = now + self._config.start_timeout_seconds
        actor.last_heard = now
        with contextlib.suppress(OSError, AttributeError):  # else the next check finds a death
            actor.descriptor = os.pidfd_open(actor.process.pid)
            if self._poller is not None:
                self._poller.register(actor.descriptor, zmq.POLLIN)
        self._events.emit("actor_started", actor.model, pid=actor.process.pid)

    def _send(self, actor: _Actor, message: messages.ToActor) -> None:
        self._socket.send_multipart([actor.identity, messages.encode(message)])

    def _stop(self, actors: list[_Actor]) -> None:
        """Ask politely, wait for all together, kill what is left."""
        running = [actor for actor in actors if actor.process is not None]
        for actor in running:
            if actor.state == "ready":
                self._send(actor, messages.Stop())
            elif actor.process is not None:
                actor.process.kill()
        deadline = time.monotonic() + _STOP_SECONDS
        for actor in running:
            if actor.process is None:
                continue
            try:
                actor.process.wait(
                    max(0.0, deadline - time.monotonic()) if actor.batch is None else 0
                )
            except subprocess.TimeoutExpired:
                actor.process.kill()
                actor.process.wait()
            self._forget_process(actor)

    def _forget_process(self, actor: _Actor) -> None:
        self._by_identity.pop(actor.identity, None)
        if actor.descriptor >= 0:
            if self._poller is not None:
                self._poller.unregister(actor.descriptor)
            os.close(actor.descriptor)
            actor.descriptor = -1
        if actor.process is not None and actor.process.stdin is not None:
            actor.process.stdin.close()
        actor.process = None


def _status(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
