"""The daemon: one scheduler and one set of actors for every process that attaches.

Started by the first client as `python -m lrai_shared.daemon FOLDER STAY`, with its settings
on standard input and the lock on the folder already held, which it keeps for life: whoever gets the
lock knows that no daemon is there. It ends when told to, or half a minute after the last client,
unless it listens for other machines, which could not start the next one.
What was loaded when a daemon is killed, the next one loads again before it hears anybody.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import logging
import math
import os
import resource
import secrets
import signal
import sys
import time
import weakref
from collections import deque
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import zmq

from lrai_core.actor.pool import Pool
from lrai_core.config import ActorConfig, LraiConfig
from lrai_core.engine.engine import installed_version
from lrai_core.errors import Cancelled, LraiError, NotReady, UsageError, shorten
from lrai_core.events import EventBus
from lrai_core.protocol import InferenceResponse
from lrai_core.runtime.embedded import find_backend
from lrai_core.scheduler.state import Pending
from lrai_core.wire import messages as wire
from lrai_core.wire.workers import Outcome
from lrai_shared import messages
from lrai_shared.keys import Listener
from lrai_shared.messages import Attach, Attached, Call, Requests
from lrai_shared.starting import SETTINGS, shorten_log
from lrai_shared.turns import POLL_SECONDS, TURN_SECONDS, wait_for_turns

_SILENT_SECONDS: Final = 5.0  # without a sign of life a client is gone;
_FAR_SILENT_SECONDS: Final = 30.0  # of another machine it may be behind tensors on a slow line
_IDLE_SECONDS: Final = 30.0
_LAST_WORDS_MS: Final = 5000  # for answers on their way when it ends
_MOST_ITEMS: Final = 1_000  # of a message; a client sends a tenth of it
_MOST_HEARD: Final = 100  # messages of one door, before actors and deadlines have their turn
_TOUCH_SECONDS: Final = 3600.0  # what is old in the temporary folder is deleted where days are few
_AGING: Final = "captured.npz"  # as `lrai_deployments.traffic` has it
_CHANGES: Final = 256  # that may be under way; most wait for another one of the same name
_MOST_OUTCOMES: Final = 500  # of one message
_QUICK: Final = frozenset({"models", "ready", "stats", "stay", "stop"})
_SLOW: Final = frozenset(
    {"load", "unload", "swap", "route", "rollback", "freeze", "unfreeze", "drain", "deployments"}
)
_CHANGING: Final = _SLOW - {"drain", "deployments"}
# For what was served before: more than a model may take to start; and once it is told to end.
_OPEN_SECONDS, _END_SECONDS = 30.0, 5.0
_log: Final = logging.getLogger("lrai.runtime")

Peer = tuple[wire.Line, bytes]  # by which socket, and who there


@dataclass(slots=True)
class _Client:
    """One attached process, until it falls silent."""

    heard: float
    session: str = field(default_factory=lambda: secrets.token_hex(8))
    running: dict[int, Pending] = field(default_factory=dict)
    answered: list[tuple[int, InferenceResponse]] = field(default_factory=list)
    failed: list[messages.Failure] = field(default_factory=list)
    arena: wire.Segment | None = None
    memory: list[memoryview] = field(default_factory=list)  # of the arena, if it is one
    read: list[int] = field(default_factory=list)  # offsets there, to be told

    def lend(self, place: wire.Place) -> memoryview:
        """Return bytes of its arena; when the last view of them is gone, it is told."""
        lent = np.frombuffer(wire.view(place, (), self.memory), np.uint8)
        weakref.finalize(lent, self.read.append, place[1])
        return lent.data


class Door(Pool):
    """The pool of a daemon, which hears its clients too: all in the scheduler's thread."""

    def __init__(
        self, daemon: Daemon, address: Path, folder: Path, config: ActorConfig, events: EventBus
    ) -> None:
        """Bind the socket that clients connect to, and that of the actors."""
        super().__init__(folder, config, events)
        address.unlink(missing_ok=True)
        self._address_of_clients = address
        self._daemon, self._clients = daemon, dict[Peer, _Client]()
        self._said: deque[tuple[Peer, messages.ToClient]] = deque()
        self._door = self.lines["client"] = wire.listen(f"ipc://{address}")
        self._own = address.stat().st_ino  # where files are deleted by age, another may be there
        self.lines |= {name: one.line for name, one in daemon.listeners.items()}
        self._doors = [line for peer, line in self.lines.items() if peer != "actor"]
        self.opened, self.idle_since = False, time.monotonic()

    def open(self) -> None:
        """Hear clients from now on. Runs in the scheduler's thread."""
        for door in self._doors:
            self._poller.register(door, zmq.POLLIN)
        self.opened, self.idle_since = True, time.monotonic()

    def add(self, name: str, load: wire.Load, loaded: Future[None]) -> None:
        """See `Pool.add`. A crash in this process would be everybody's, so no model runs in it."""
        if load.inline:
            own = "actor.isolation inline is for a runtime of its own: this one is shared"
            loaded.set_exception(UsageError(own))
        else:
            super().add(name, load, loaded)
            self._take_turns()

    def remove(self, name: str) -> None:
        """See `Pool.remove`."""
        super().remove(name)
        self._take_turns()

    def _take_turns(self) -> None:
        """Interrupt no call, unless one has several threads: those would wait for one another."""
        wait = all(actor.load.threads == 1 for actor in self._actors.values())
        tick = TURN_SECONDS if wait_for_turns(wait=wait) else POLL_SECONDS
        self._daemon.runtime.scheduler.tick_seconds = tick

    def close(self) -> None:
        """Send what is left to send, end every actor, and close all sockets."""
        self._flush()
        super().close()
        for listener in self._daemon.listeners.values():
            listener.close(_LAST_WORDS_MS)
        self._door.context.destroy(linger=_LAST_WORDS_MS)
        with contextlib.suppress(OSError):
            if self._address_of_clients.stat().st_ino == self._own:
                self._address_of_clients.unlink()

    def poll(self, now: float, ready: Collection[object]) -> list[Outcome]:
        """See `Workers.poll`."""
        slept = self.slept(now)
        for client in self._clients.values():
            client.heard += slept
        for door in [door for door in self._doors if self.opened and door in ready]:
            for sender, *frames in itertools.islice(wire.receive(door), _MOST_HEARD):
                try:
                    self._hear((door, bytes(sender)), frames, now)
                except (wire.BadFrames, IndexError):
                    self.dropped_frames += 1
        for peer, client in list(self._clients.items()):
            limit = _SILENT_SECONDS if peer[0] is self._door else _FAR_SILENT_SECONDS
            if now - client.heard > limit:  # what it asked for and was not begun goes
                del self._clients[peer]
                self._adopt(client, None)
                for pending in list(client.running.values()):
                    self._daemon.runtime.scheduler.cancel(pending)
        self.idle_since = math.inf if self._clients else min(self.idle_since, now)
        return super().poll(now, ready)

    def next_check(self, now: float) -> float:
        """See `Workers.next_check`; before it waits, everybody is told what there is to tell."""
        self._flush()
        return super().next_check(now)

    def _hear(self, sender: Peer, frames: list[memoryview], now: float) -> None:
        message = messages.decode_from_client(frames[0])
        client = self._clients.get(sender)
        if isinstance(message, Attach):
            client = client or _Client(now)
            self._attach(sender, client, message)
        if client is None:
            return  # it attaches again, and sends again what it asked
        client.heard = now
        if isinstance(message, Requests) and message.session in ("", client.session):
            if len(message.items) > _MOST_ITEMS:
                raise wire.BadFrames("more requests than a message has")
            for item in message.items:
                if item.key not in client.running:
                    self._start(client, item, frames[1:])
                elif client.memory:  # sent again, as a session began: nobody reads these blocks
                    client.read += [offset for frame, offset, _ in item.places if frame < 0]
            for key in message.cancelled:
                if key in client.running:
                    self._daemon.runtime.scheduler.cancel(client.running[key])
                elif len(client.failed) < self._daemon.welcome.credit:  # it may have been dropped
                    client.failed.append(messages.failure(key, Cancelled("it does not run here")))
        elif isinstance(message, Call):
            self._daemon.operate(message, partial(self.say, sender))

    def _attach(self, sender: Peer, client: _Client, message: Attach) -> None:
        if message.version != wire.PROTOCOL_VERSION:
            self.say(sender, self._daemon.welcome)
            raise wire.BadFrames("another version")
        known, self._clients[sender] = sender in self._clients, client
        if sender[0] is self._door:  # else its numbers are of another machine
            # Of who begins anew the client gives up what it has sent before it hears of that.
            self._adopt(client, message.arena if known else None)
        arena = client.arena.id if client.arena and client.memory else b""
        own = msgspec.structs.replace(self._daemon.welcome, session=client.session, arena=arena)
        self.say(sender, own)

    def say(self, receiver: Peer, message: messages.ToClient) -> None:
        """Send a message without tensors, soon. Any thread may call it."""
        self._said.append((receiver, message))
        with contextlib.suppress(NotReady):  # it is closing, which flushes
            self._daemon.runtime.scheduler.call(self._flush)

    def _adopt(self, client: _Client, arena: wire.Segment | None) -> None:
        """Read what a client sends in `arena` from now on; of an earlier one no more is said."""
        if arena == client.arena:
            return
        if client.arena is not None:
            self.arenas.forget(client.arena)
            for actor in self._lives.values():
                if actor.state == "ready":
                    self._socket.say(wire.Forget(client.arena), actor.identity)
        client.arena, client.memory, client.read = arena, [], []
        # Where addresses are few, an actor could lack those for what this process has mapped.
        few = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
        if arena is not None and not few:
            try:
                client.memory = [self.arenas.open(arena)]
            except wire.BadFrames:  # it is told, and sends everything inline
                self.dropped_frames += 1

    def _start(self, client: _Client, item: messages.Infer, frames: list[memoryview]) -> None:
        ended = partial(self._settle, client, item.key)
        try:
            request = messages.request_of(item, frames, client.lend)
            client.running[item.key] = self._daemon.runtime.accept(request, ended)
        except LraiError as error:
            ended(error)
        except (wire.BadFrames, IndexError):  # no request: the frame is dropped
            raise
        except Exception as bug:  # noqa: BLE001 - edge: one request must not end everybody's runtime
            ended(LraiError(f"the runtime failed: {type(bug).__name__}"))

    def _settle(self, client: _Client, key: int, outcome: InferenceResponse | LraiError) -> None:
        client.running.pop(key, None)
        if isinstance(outcome, LraiError):
            client.failed.append(messages.failure(key, outcome))
        else:
            client.answered.append((key, outcome))

    def _flush(self) -> None:
        while self._said:
            (door, identity), message = self._said.popleft()
            door.say(message, identity)
        for (door, identity), client in self._clients.items():
            # So many at a time, that a header has room for them.
            while client.answered or client.failed or client.read:
                packer, most = wire.Packer(), _MOST_OUTCOMES
                answers = tuple([messages.answer(*o, packer) for o in client.answered[:most]])
                failed, read = tuple(client.failed[:most]), tuple(client.read[:most])
                # Deleted by count: more may come to be read at any time.
                del client.answered[: len(answers)], client.failed[: len(failed)]
                del client.read[: len(read)]
                packer.send(door, messages.Replies(answers, failed, read), identity)


class Daemon:
    """A runtime behind a door, from its start to its end."""

    def __init__(self, folder: Path, config: LraiConfig, *, stay: str) -> None:
        """Serve what the last daemon served when it was killed, then open the doors."""
        version, rows = installed_version("lrai"), config.scheduler.max_queue_rows
        # Requests of a row each from one process leave room for others, and fill a call.
        credit = max(rows // 2, min(rows, config.scheduler.max_batch_rows))
        most = config.limits.request_bytes
        self.welcome = Attached(wire.PROTOCOL_VERSION, version, "", credit, request_bytes=most)
        self._stay, self.ending, self._keeps = stay, False, False
        self._folder, self._under_way = folder, set[Future[Any]]()
        self.listeners = {"remote": Listener(stay, config)} if "://" in stay else {}
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._end(told=False))
        # Of many threads: a model that is being loaded must not keep another from being frozen.
        self._quick, self._slow = ThreadPoolExecutor(1), ThreadPoolExecutor(_CHANGES)
        # Absolute, for whoever starts the next one with these may do so from elsewhere.
        state = str(Path(config.runtime.state_dir or folder).absolute())
        # Empty ones stay: where there are no others, nothing may be loaded, and not anything.
        roots = [one and str(Path(one).absolute()) for one in config.runtime.model_roots.split(":")]
        runtime = replace(config.runtime, state_dir=state, model_roots=":".join(roots))
        config = replace(config, runtime=runtime)
        make_door = partial(self._make_door, folder / "clients")
        self.runtime: Any = find_backend("deployments")(config, pool=make_door)
        self._restore(config.actor.start_timeout_seconds + _OPEN_SECONDS)
        self._given = config
        self._keep_settings()
        self.runtime.scheduler.call(self._door.open)

    def _restore(self, patience: float) -> None:
        """Serve what was served; what a folder that does not answer keeps from it, some time later.

        `patience`: seconds without any version that is there again. A hung mount of one model must
        not take the others; who loads that name is kept waiting.
        """
        how, left, there = {"ending": lambda: self.ending}, patience, 0
        self.restoring = self._slow.submit(self.runtime.call, "restore", how, object)
        while left > 0:
            with contextlib.suppress(TimeoutError):
                self.restoring.result(0.1)
                return
            if len(self.runtime.versions) > there:  # it goes on
                left, there = patience, len(self.runtime.versions)
            left = min(left, _END_SECONDS if self.ending else left) - 0.1
        _log.warning("not all that was served is there again: a folder does not answer")

    def _make_door(self, *arguments: Any) -> Door:
        self._door = Door(self, *arguments)
        return self._door

    def _keep_settings(self) -> None:
        """Have who starts the next one, should this one be killed, start it as this one was."""
        half = self._folder / f".{SETTINGS}"
        with contextlib.suppress(OSError):  # on a full disk what is there stays whole
            half.write_bytes(msgspec.msgpack.encode((self._given, self._stay)))
            half.replace(self._folder / SETTINGS)

    def run(self) -> None:
        """Serve until told to stop, or until nobody needs it any more."""
        touched = -math.inf
        while self.runtime.scheduler.thread.is_alive() and not self.ending:
            time.sleep(0.1)
            now = time.monotonic()
            if now - touched > _TOUCH_SECONDS:
                touched = now
                _touch(self._folder)
                shorten_log(self._folder / "log")
                # Which lets go of captured requests that are too old, where the disk answers.
                self._slow.submit(self.runtime.deployments)
            idle = self._door.opened and not self._under_way and now - self._door.idle_since
            if idle > _IDLE_SECONDS and self._stay == "end":
                self._door.opened = False  # who comes now is not refused: it starts the next one
                break
        if not self.runtime.scheduler.thread.is_alive():
            os._exit(1)  # of a bug: the next one answers what was asked of this one
        self.runtime.drain()
        self._quick.shutdown()
        wait(self._under_way, _END_SECONDS)  # what lies where nobody answers, for no longer
        self._slow.shutdown(wait=False)
        # If it failed, or is only started anew, the next one is to be what this one was.
        if self.runtime.scheduler.thread.is_alive() and not self._keeps:
            (self._folder / SETTINGS).unlink(missing_ok=True)
        self.runtime.keeps = self._keeps
        self.runtime.close()

    def operate(self, call: Call, reply: Any) -> None:
        """Run an operation beside the scheduler's thread, and reply."""
        if self.ending and call.operation in ("load", "stay"):
            return  # its client asks the next one
        executor = self._slow if call.operation in _SLOW else self._quick
        with contextlib.suppress(RuntimeError):  # it is closing, and its clients find out
            work = executor.submit(self._operate, call.operation, call.arguments)
            self._under_way.add(work)
            work.add_done_callback(partial(self._reply, call.key, reply))
            work.add_done_callback(self._under_way.discard)

    def _operate(self, operation: str, arguments: dict[str, Any]) -> Any:
        if operation not in _QUICK | _SLOW:
            known = ", ".join(sorted(_QUICK | _SLOW))
            raise UsageError(f"operation {shorten(operation)!r} is unknown; known: {known}")
        if operation == "stop":
            self._end()
            return os.getpid()
        if self.ending and operation in _CHANGING:
            raise NotReady("the runtime is ending")  # what it says now, the next one does not know
        if operation == "stay":
            if not self.runtime.scheduler.accepting:
                raise NotReady("it was drained, for good: lrai runtime stop, and start anew")
            if arguments["how"] not in ("stay", self._stay):
                raise UsageError("a runtime runs that does not listen there: stop it first")
            self._stay = "stay" if self._stay == "end" else self._stay
            self._keep_settings()
            return None
        arguments |= {"shared": True} if operation == "load" else {}
        return self.runtime.call(operation, arguments, object)

    def _end(self, *, told: bool = True) -> None:
        """End soon; no more is done here, for signals interrupt anything.

        `told`: by somebody who wants an end; else a machine goes down, or a service is started
        anew, and one that was to stay has the next one serve what it served.
        """
        self._keeps = not told and self._stay != "end" and (self._keeps or not self.ending)
        self.ending = True

    def _reply(self, key: int, reply: Any, work: Future[Any]) -> None:
        if error := work.exception():
            reply(messages.Replies(failures=(messages.failure(key, error),)))
        else:
            reply(messages.Returned(key, work.result()))


def _touch(folder: Path) -> None:
    """Make what lies in a folder look as if it was read just now, but for users' rows.

    When it was written stays: a sketch is forgotten by that.
    """
    for inside, _, names in os.walk(folder):
        for path in (Path(inside), *(Path(inside, name) for name in names)):
            with contextlib.suppress(OSError):  # some come and go
                if path.name != _AGING:
                    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def return_large_memory() -> None:
    """Have pieces of 1 MB and more go back to the system when they are free.

    By itself glibc keeps what is as large as one that was freed before, between small pieces: each
    burst of messages that hold tensors would leave a little more of the daemon.
    """
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def main(argv: list[str]) -> None:
    """Run the daemon."""
    folder, stay, *also = argv
    config = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=LraiConfig)
    logging.raiseExceptions = False  # nobody may read `also` any more
    lines = [sys.stderr, *(os.fdopen(int(line), "w") for line in also)]  # the first: the file `log`
    handlers = list(map(logging.StreamHandler, lines))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", handlers=handlers)
    daemon = Daemon(Path(folder), config, stay=stay)
    # Requests are many small objects without cycles: looking for these took a twelfth of the time.
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    return_large_memory()
    daemon.run()
    os._exit(0)  # its threads, at a folder that hangs, would be waited for


if __name__ == "__main__":
    main(sys.argv[1:])
