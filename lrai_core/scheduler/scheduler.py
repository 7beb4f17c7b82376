"""The loop around the planner: one thread per runtime, the only one that touches queues and actors.

Callers hand requests over with `accept` from any thread and wait on a future. Every accepted
request ends exactly once: with its outputs, or with one error.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Final, TypeVar

import zmq

from lrai_core import errors
from lrai_core.config import ActorConfig, SchedulerConfig, available_cpus
from lrai_core.engine.batching import MEASURED_ELEMENTS
from lrai_core.errors import ActorError, DeadlineExceeded, LraiError, NotReady, PoisonRequest
from lrai_core.events import EventBus
from lrai_core.protocol import Array, ValidRequest
from lrai_core.scheduler.admission import Admission
from lrai_core.scheduler.planner import PROBE_SECONDS, Bounds, Decision, Offer, choose, plan, probe
from lrai_core.scheduler.state import BACKGROUND, Call, Done, Model, Pending, Replica
from lrai_core.scheduler.waiting import Waiting
from lrai_core.wire.messages import Refused, poll
from lrai_core.wire.workers import Answered, Batch, GaveUp, Lost, Outcome, Workers

T = TypeVar("T")
Start = tuple[Model, Replica, Decision]  # of a call: of whom, where, and with whom

_log: Final = logging.getLogger("lrai.runtime")
_ATTEMPTS: Final = 2  # deliveries of one request to an actor that dies of it
_SHARE_SECONDS: Final = 1.0  # over which a model's use of the processor is remembered
_OVER_SHARE: Final = 0.5  # what a request counts of a model that has had more than its share
_SLO_MS, _SLO_CALLS = 100.0, 20.0  # who names no time becomes urgent after the larger of both
_RECENT: Final = 200  # requests that count as of late
_HOPE: Final = 0.9  # of its time a request may have to wait for those before it


class Scheduler:
    """Queues, plans and settles requests of all models of a runtime."""

    def __init__(self, config: SchedulerConfig, workers: Workers, events: EventBus) -> None:
        self._config, self._workers, self._events = config, workers, events
        self._admission = Admission(config)
        self._models: dict[str, Model] = {}
        self._calls: dict[int, Call] = {}
        self._ended: deque[tuple[Pending, list[Array]]] = deque()  # answered, and not told yet
        # When it was last seen who may have a call, and brought up to date what models used; how
        # exactly the thread can wait.
        self._looked, self._used_at, self.tick_seconds = 0.0, 0.0, 1e-3
        self._cpus, self._owner = available_cpus(), os.getpid()
        self._batches, self._sequences = itertools.count(1), itertools.count(1)
        self._arrived: deque[Pending | Callable[[], None]] = deque()
        self._state_lock = threading.Lock()
        self.accepting = True  # not draining, not closed, not failed
        # Stopped: nothing that arrives now would be seen. Awake: a byte is in the pipe, or soon.
        self._closed = self._stopped = self._awake = False
        self._wake_read, self._wake_write = os.pipe()
        self._poller = zmq.Poller()
        self._poller.register(self._wake_read, zmq.POLLIN)
        self.thread = threading.Thread(target=self._run, name="lrai-scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread; from now on `workers` belong to it."""
        self._workers.register(self._poller)
        self.thread.start()

    def add(self, model: str, replicas: Sequence[Replica], config: SchedulerConfig) -> None:
        """Open a queue for `model`; its actors are the workers' business.

        Args:
            model: Its name.
            replicas: Its actors.
            config: Settings of this model.
        """
        most = config.max_batch_rows, config.max_batch_elements or MEASURED_ELEMENTS
        alone_ms = 1e3 * min(replica.latency.alone_seconds() for replica in replicas)
        slo_ms = config.latency_slo_ms or max(_SLO_MS, _SLO_CALLS * alone_ms)
        timeout_ms = config.latency_slo_ms or config.default_timeout_ms
        paces = (Bounds(*most, len(replicas)), slo_ms, timeout_ms, alone_ms / 1e3, config.weight)
        for replica in replicas:
            replica.seen = time.monotonic()
        self._models[model] = Model(model, {r.actor: r for r in replicas}, *paces)

    def accept(
        self, model: str, request: ValidRequest, done: Done, timeout_ms: float | None, priority: int
    ) -> Pending:
        """Accept a request, or refuse it at once.

        Args:
            model: A model that was added.
            request: As `protocol.validate` returned it.
            done: Called once, in the scheduler's thread, with one array per wanted output or with
                the error that the request ended with, and the variant. Quick, and does not fail.
            timeout_ms: How long the caller waits; None for what the model promises everybody.
            priority: The lower are served first.

        Raises:
            QueueFull: The queue has no room.
            DeadlineExceeded: The time allowed is less than the model alone takes.
            NotReady: Draining or closed, or the model failed for good.
            ModelNotFound: No such model.
        """
        if (owner := self._models.get(model)) is None:
            raise errors.ModelNotFound(f"no model {errors.shorten(model)!r} is loaded")
        now, timeout = time.monotonic(), owner.timeout_ms if timeout_ms is None else timeout_ms
        patience = owner.slo_ms if timeout_ms is None else self._config.default_timeout_ms
        key = (priority, now + min(timeout, patience) / 1e3, next(self._sequences))
        size = (request.group, request.rows, request.length)
        pending = Pending(Waiting(*key, now + timeout / 1e3, *size), owner, request, done, now)
        try:
            self._admit(pending, timeout / 1e3)
        except LraiError as error:
            self._events.emit("request_refused", model, reason=type(error).__name__)
            raise
        self._events.emit("request_accepted", model, rows=request.rows)
        self._hand_over(pending)
        return pending

    def cancel(self, pending: Pending) -> None:
        """Take a request out of the queue whose caller is gone; what has started runs to its end.

        It holds its place until then, and nobody is told of its answer.
        """
        self._hand_over(lambda: self._cancel(pending))

    def call(self, action: Callable[[], None]) -> None:
        """Run `action` in the scheduler's thread, soon.

        Raises:
            NotReady: The thread has ended.
        """
        if not self._hand_over(action):
            raise NotReady("the runtime was closed")

    def ask(self, model: str, otherwise: T, question: Callable[..., T], *arguments: Any) -> T:
        """Return what planner or latency model say; `otherwise`, and an event, where they fail.

        That costs a better plan, and no request.
        """
        try:
            return question(*arguments)
        except Exception as error:  # noqa: BLE001 - edge: a broken plan means one by one, not silence
            self._events.emit("planner_failed", model, reason=repr(error))
            return otherwise

    def remove(self, model: str) -> None:
        """Forget a model; what waits for it or runs is refused. Runs in the scheduler's thread."""
        if gone := self._models.pop(model, None):
            self._fail(gone, f"model {model!r} was unloaded")
            for batch in [b for b, call in self._calls.items() if call.model is gone]:
                self._settle_with(self._calls.pop(batch).pending, ActorError(gone.failed))

    def outstanding(self) -> int:
        """Return the rows accepted and not yet ended."""
        return self._admission.rows

    def stalled(self, name: str, actor: ActorConfig) -> bool:
        """Return whether a model's requests wait for longer without an answer than a call may take.

        That is a call of its own, or one of another model that it waits behind. It has not waited
        until that ends: from then on it has its turn, or waits for one of several.
        """
        model, calls = self._models.get(name), list(self._calls.values())
        if model is None or not model.inside:
            return False
        last = max([call.begun for call in calls if call.model is model], default=math.inf)
        limits = [actor.hang_factor * call.seconds for call in calls if call.begun <= last]
        return time.monotonic() - model.since > max([actor.hang_seconds, *limits])

    def drain(self, timeout_seconds: float) -> bool:
        """Refuse new requests and wait for the accepted ones; return whether all ended."""
        with self._state_lock:
            self.accepting = False
        deadline = time.monotonic() + timeout_seconds
        while self._admission.rows and time.monotonic() < deadline:
            time.sleep(0.005)
        return self._admission.rows == 0

    def close(self) -> None:
        """Stop the thread; what is still inside ends with an error."""
        with self._state_lock:
            if self._closed:
                return
            self.accepting, self._closed = False, True
        self._wake()
        self.thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _admit(self, pending: Pending, allowed: float) -> None:
        """Count a request in that has so many seconds, or refuse it."""
        model, request, rows = pending.model, pending.request, pending.request.rows
        if model.failed:
            raise ActorError(model.failed)
        replicas, urgent, now = list(model.replicas.values()), model.queue.urgent, pending.arrival
        needed = self.ask(model.name, 0.0, _least_seconds, replicas, rows, request.length)
        # No number is no reason to refuse: what waits then runs one by one.
        if not allowed > 0 or (allowed <= needed and any(r.is_known(now) for r in replicas)):
            given = f"{allowed * 1e3:g} ms allowed"
            raise DeadlineExceeded(f"{given}, the model takes {needed * 1e3:.3g} ms")
        before, room = bisect_left(urgent, pending.place), allowed * len(replicas) * _HOPE
        if before * model.pace > room:
            # They are like it in calls of the best size, or as they have been of late.
            most = max(1, model.bounds.rows // rows)
            each = self.ask(model.name, 0.0, _least_seconds, replicas, rows, request.length, most)
            # Nobody waits for those who will be late when the first actor is free, who are among
            # the first, and of whom hardly more than a few calls' come while one runs.
            free = min([c.begun + c.seconds for r in replicas for c in [*r.calls][:1]], default=0.0)
            near = urgent[: min(before, 4 * model.bounds.rows)]
            before -= sum([one.deadline < free + needed for one in near])
            if before * each > room:
                raise DeadlineExceeded(f"{before} requests have to be answered before it")
        with self._state_lock:  # `drain` sees a request either refused or counted
            if not self.accepting:
                raise NotReady("the runtime is draining")
            self._admission.enter(rows, request.nbytes, needed / rows)
            if not model.inside:
                model.since = pending.arrival
            if pending.place.priority < BACKGROUND:  # others may wait for as long as it takes
                model.inside.add(pending)
                if pending.arrival - model.asked > PROBE_SECONDS:
                    model.wants = pending.arrival
                model.asked = pending.arrival

    def _cancel(self, pending: Pending) -> None:
        error = errors.Cancelled("cancelled")
        self._tell(pending, None, error)
        if pending.place.sequence in pending.model.waiting:
            self._settle_with(self._take(pending.model, [pending.place.sequence]), error)

    def _hand_over(self, item: Pending | Callable[[], None]) -> bool:
        with self._state_lock:
            if not self._stopped and os.getpid() == self._owner:  # a fork's copy has no thread
                self._arrived.append(item)
                self._wake()
                return True
        if isinstance(item, Pending):
            self._settle_with([item], NotReady("the runtime was closed"))
        return False

    def _wake(self) -> None:
        if not self._awake and threading.get_ident() != self.thread.ident:  # it looks anyway
            self._awake = True
            os.write(self._wake_write, b"\0")

    def _run(self) -> None:
        end = NotReady("the runtime was closed")
        try:
            while not self._closed:
                now = time.monotonic()
                pause = math.ceil(max(0.0, self._next_check(now) - now) * 1e3)
                ready = dict(poll(self._poller.sockets, 0 if self._arrived else pause))
                if self._awake:
                    os.read(self._wake_read, 1)  # first: who comes from here on writes again
                    self._awake = False
                self._step(ready)
        except BaseException as bug:
            end = NotReady(f"the scheduler failed: {type(bug).__name__}")
            raise
        finally:  # closed, or a bug: either way nobody waits for a thread that is gone
            with self._state_lock:
                self.accepting, self._stopped = False, True
            inside = [item for item in self._arrived if isinstance(item, Pending)]
            inside += [pending for call in self._calls.values() for pending in call.pending]
            inside += [pending for pending, _ in self._ended]
            for model in list(self._models.values()):
                inside += model.waiting.values()
                model.waiting.clear()
            self._settle_with(inside, end)

    def _step(self, ready: Collection[object]) -> None:
        now = time.monotonic()
        outcomes = self._workers.poll(now, ready)  # a daemon's hear of requests, too
        while self._arrived:
            item = self._arrived.popleft()
            if isinstance(item, Pending):
                self._enqueue(item)
            else:
                item()
        for outcome in outcomes:
            self._settle(outcome)
        now = self._looked = time.monotonic()  # a call that begins here may have its next one here
        # Callers are told in time; a request keeps its place until the engine is done with it.
        for pending in [pending for call in self._calls.values() for pending in call.pending]:
            if pending.place.deadline <= now:
                self._tell(pending, None, DeadlineExceeded("the deadline passed while it ran"))
        models = list(self._models.values())  # `add` runs in other threads
        for model in models:
            if model.waiting and (late := self._take(model, model.queue.expire(now))):
                self._settle_with(late, DeadlineExceeded("the deadline passed in the queue"))
        while waiting := [model.name for model in models if model.waiting]:
            # A start is not undone, so it is none of what may fail.
            starts = self.ask(waiting[0], self._one_by_one(), self._due, now)
            if (start := next(iter(starts), None)) is None:
                break
            self._start(*start, now)
        while self._ended:  # told after the engines have their calls
            self._end(*self._ended.popleft(), None)

    def _next_check(self, now: float) -> float:
        checks = [model.queue.next_deadline() for model in list(self._models.values())]
        for call in self._calls.values():
            checks += [p.place.deadline for p in call.pending if p.done]
            soon = call.next_from if call.model.waiting else call.overdue  # else for nobody
            checks += [at for at in (soon, call.overdue) if at > self._looked]
        return min([self._workers.next_check(now), *checks])

    def _enqueue(self, pending: Pending) -> None:
        model = pending.model  # that it was checked against, whatever has its name now
        if model.failed:
            self._settle_with([pending], ActorError(model.failed))
        else:
            model.waiting[pending.place.sequence] = pending
            model.queue.add(pending.place)

    def _take(self, model: Model, sequences: Sequence[int]) -> list[Pending]:
        for sequence in sequences:
            model.queue.remove(sequence)
        return [model.waiting.pop(sequence) for sequence in sequences]

    def _one_by_one(self) -> Iterable[Start]:
        """Yield what may start where it cannot be decided: the most urgent of each model, alone."""
        for m in list(self._models.values()):
            yield from [(m, r, self._alone(m, r)) for r in self._wanted(m) if not r.calls]

    def _alone(self, model: Model, replica: Replica) -> Decision:
        """Return a call of the most urgent request alone, which takes what it is known to take."""
        first, seconds = model.queue.urgent[0], replica.latency.call_seconds
        # That may be no number; `max` then returns its first.
        takes = max(0.0, self.ask(model.name, 0.0, seconds, first.rows, first.length))
        return Decision((first.sequence,), (), takes)

    def _due(self, now: float) -> Iterable[Start]:
        """Return the call that is due first among those there are CPUs for, or else what is next.

        More calls than CPUs would only make one another late.
        """
        at_work = [call.replica for call in self._calls.values() if now < call.overdue]
        busy, taken = sum([r.threads for r in at_work]), [cpu for r in at_work for cpu in r.cpus]
        offers: list[Start] = []
        for model in list(self._models.values()):
            idle = [r for r in self._wanted(model) if not r.calls and busy < self._cpus]
            for replica in self.ask(model.name, idle, _in_order, idle, taken) if idle[1:] else idle:
                decision = self._decide(model, replica, now)
                if decision.dispatch:  # else another one may still be in time
                    offers.append((model, replica, decision))
                    break
        turns = [model.turn(now) for model, _, _ in offers] if offers[1:] else [0] * len(offers)
        offers = [one for one, turn in zip(offers, turns, strict=True) if turn == min(turns)]
        if offers:
            first = offers[self._choose(offers, now) if len(offers) > 1 else 0]
            # Not until there are enough: others would never leave as many at a time.
            if not busy or busy + first[1].threads <= self._cpus:
                return [first]
        return self._next(now)

    def _next(self, now: float) -> Iterable[Start]:
        """Return the next call of an actor that is almost done, lest it wait for one, if any may.

        Not while an idle one waits for a CPU: whose turn is next is decided when one is free. What
        may be to blame for a death has the actor for itself, so that nobody else is blamed.
        """
        busy = [(m, r) for m in list(self._models.values()) for r in self._wanted(m)]
        for model, replica in busy if all(r.calls for m, r in busy if m.turn(now) < 2) else ():
            if len(replica.calls) == 1 and (call := replica.calls[0]).almost_done(now):
                decision = self._decide(model, replica, max(now, call.begun + call.seconds))
                if decision.dispatch and not model.waiting[decision.dispatch[0]].alone:
                    return [(model, replica, decision)]
        return ()

    def _wanted(self, model: Model) -> list[Replica]:
        """Return the actors that are up, none where nothing waits for them."""
        replicas = model.replicas.values() if model.waiting else ()
        return [replica for replica in replicas if self._workers.state(replica.actor)[0] == "ready"]

    def _choose(self, offers: Sequence[Start], now: float) -> int:
        fade, self._used_at = math.exp((self._used_at - now) / _SHARE_SECONDS), now
        for model in list(self._models.values()):  # `add` runs in other threads
            model.used_seconds *= fade
        # The sum counts most, yet none is starved for a small gain of it.
        share = sum(model.used_seconds for model, _, _ in offers) / len(offers)
        over = _OVER_SHARE * min(model.weight for model, _, _ in offers)
        each = [(d, over if m.used_seconds > share else m.weight) for m, _, d in offers]
        calls = [Offer(d.due, d.predicted_seconds, len(d.dispatch) * count) for d, count in each]
        return self.ask(offers[0][0].name, 0, choose, calls, now)

    def _start(self, model: Model, replica: Replica, decision: Decision, now: float) -> None:
        # From here on a request holds its place until the engine is done with it, cancelled or not.
        started = self._take(model, decision.dispatch)
        batch, seconds = next(self._batches), decision.predicted_seconds
        requests = [pending.request for pending in started]
        rows, length = sum([r.rows for r in requests]), max([r.length for r in requests])
        variant = self.ask(model.name, 0, replica.latency.variant, rows, length)
        for pending in started:
            pending.variant = variant
        own = (rows, length, seconds, variant, bool(replica.calls))
        call = self._calls[batch] = Call(model, replica, started, *own)
        replica.calls.append(call)
        if not call.queued:
            call.begin(now, self.tick_seconds)
        size = {"requests": len(started), "rows": rows, "length": length}
        self._events.emit("batch_dispatched", model.name, **size, predicted_seconds=seconds)
        try:
            self._workers.dispatch(replica.actor, Batch(batch, requests, seconds, variant))
        except MemoryError:  # to join them: each goes alone
            replica.calls.remove(self._calls.pop(batch))
            self._again(call, ActorError("no call could be made"), 0 if started[1:] else _ATTEMPTS)

    def _decide(self, model: Model, replica: Replica, start: float) -> Decision:
        """Return what the actor runs next, after those were told whom nobody will run."""
        decision = self.ask(model.name, None, self._planned, model, replica, start)
        decision = decision or self._alone(model, replica)
        late = DeadlineExceeded("the deadline cannot be met any more; it was not run")
        self._settle_with(self._take(model, decision.drop), late)
        return decision

    def _planned(self, model: Model, replica: Replica, start: float) -> Decision:
        decision = plan(model.queue, replica.latency, start, model.bounds)
        for other in self._wanted(model) if decision.drop else ():
            # What a slow actor is too late for waits where another one will be in time.
            free = max([start, *(call.begun + call.seconds for call in other.calls)])
            if free + other.latency.alone_seconds() < start + replica.latency.alone_seconds():
                told = plan(model.queue, other.latency, free, model.bounds).drop
                decision = decision._replace(drop=tuple({*decision.drop}.intersection(told)))
        idle = [one for one in self._wanted(model) if not one.calls] if decision.drop else []
        # A CPU that another one can use for who is left is not spent on it.
        spare = idle == [replica] or (replica in idle and len(decision.drop) == len(model.queue))
        if spare and not (decision.dispatch or replica.is_known(start)):
            decision = probe([model.waiting[s].place for s in decision.drop], replica.latency)
        named = [*decision.dispatch, *decision.drop]
        if len(model.waiting.keys() & named) < len(named):
            raise ValueError("a plan of who does not wait, or of one twice")
        return decision

    def _settle(self, outcome: Outcome) -> None:
        if isinstance(outcome, GaveUp):
            for model in list(self._models.values()):
                if len(model.replicas) > 1:
                    model.replicas.pop(outcome.actor, None)  # the others go on
                    model.bounds = model.bounds._replace(actors=len(model.replicas))
                elif outcome.actor in model.replicas:
                    self._fail(model, outcome.message)
        elif call := self._calls.pop(outcome.batch, None):
            self._end_call(call, outcome)

    def _end_call(self, call: Call, outcome: Answered | Refused | Lost) -> None:
        now = call.model.ran = time.monotonic()
        shared = call.rows * max(1, call.length) if len(call.pending) > 1 else 0
        call.model.used_seconds += (now - call.begun) / call.model.weight
        call.replica.calls.popleft()  # an actor runs them in order
        if behind := call.replica.calls:
            behind[0].begin(now, self.tick_seconds)
        for model in list(self._models.values()):
            if self._wanted(model) and not any(one.calls for one in model.replicas.values()):
                model.since = now  # it waits for its turn, and not for its actors
        match outcome:
            case Answered(answers=answers, engine_seconds=seconds):
                total, name = None if call.queued else now - call.begun, call.model.name
                latency, size = call.replica.latency, (call.rows, call.length)
                if self.ask(name, None, latency.observe, *size, total, seconds, call.variant):
                    self._events.emit("speed_changed", name, scale=latency.scale)
                took = now - call.begun - call.model.pace * len(call.pending)
                call.model.pace += took / max(_RECENT, len(call.pending))
                call.model.fits = max(call.model.fits, shared)
                self._events.emit("batch_completed", name, engine_seconds=seconds)
                # Who is faster than thought is tried again at once: it is not known what it takes.
                slow, call.model.since = now - call.begun > call.seconds / 2, now
                call.replica.seen = now if slow else call.replica.seen
                self._ended += zip(call.pending, answers, strict=True)
            case Refused(message=message, invalid=invalid):
                kind, call.model.since = (errors.RequestError if invalid else ActorError), now
                error = kind(f"the engine refused the request: {message}")
                # One that was refused alone is refused for good: it is the request's own fault.
                self._again(call, error, 0 if shared else _ATTEMPTS)
                if not invalid and shared:  # it had not the memory for so many
                    self._shrink(call)
            case Lost(message=message, begun=begun, killed=killed):
                if killed and begun and shared:  # perhaps for the memory it took
                    if shared > call.model.fits:
                        self._shrink(call)
                    call.model.fits = 0
                kind = ActorError if call.pending[0].attempts + begun < _ATTEMPTS else PoisonRequest
                self._again(call, kind(f"the request could not be answered: {message}"), int(begun))

    def _shrink(self, call: Call) -> None:
        """Have later calls be half as large as one that was too large."""
        model, rows = call.model, max(1, min(call.model.bounds.rows, call.rows) // 2)
        model.bounds = model.bounds._replace(rows=rows)
        told = f"one of {call.rows} rows was too large, {rows} is the most from now on"
        self._events.emit("limit_unreachable", model.name, setting="max_batch_rows", reason=told)

    def _again(self, call: Call, error: LraiError, attempts: int) -> None:
        """Run the requests of a failed call once more, each alone.

        Args:
            call: What failed.
            error: What a request ends with that may not run again.
            attempts: That this one counts for.
        """
        retried = 0
        for pending in call.pending:
            pending.attempts += attempts
            if pending.done is None or pending.attempts >= _ATTEMPTS or call.model.failed:
                self._settle_with([pending], error)
            else:
                # Its own group: what ruined a call must not ruin others again.
                pending.place = pending.place._replace(group=pending.place.sequence)
                retried += 1
                self._enqueue(pending)
        if retried:
            self._events.emit("batch_retried", call.model.name, requests=retried)

    def _fail(self, model: Model, message: str) -> None:
        model.failed = message
        self._settle_with(self._take(model, list(model.queue)), ActorError(message))

    def _settle_with(self, pending: Sequence[Pending], error: LraiError) -> None:
        for one in pending:
            self._end(one, None, type(error)(*error.args))  # its own: a traceback grows on each

    def _end(self, pending: Pending, answer: list[Array] | None, error: LraiError | None) -> None:
        self._admission.leave(pending.request.rows, pending.request.nbytes)
        pending.model.inside.discard(pending)
        self._tell(pending, answer, error)

    def _tell(self, pending: Pending, answer: list[Array] | None, error: LraiError | None) -> None:
        done, pending.done = pending.done, None  # let go of: it holds what it was told
        if done is None:
            return
        name = pending.model.name
        if error is None:
            seconds = time.monotonic() - pending.arrival
            self._events.emit("request_answered", name, seconds=seconds, rows=pending.request.rows)
        else:
            self._events.emit("request_failed", name, reason=type(error).__name__)
        try:
            done(answer, error, pending.variant)
        except Exception:  # noqa: BLE001 - edge: what one is told with cannot end it for the others
            _log.exception("%s: an answer could not be handed over", name)


def _least_seconds(replicas: Sequence[Replica], rows: int, length: int, most: int = 1) -> float:
    """Return what a request takes, alone or as its share of a call with so many like it."""
    return min([r.latency.call_seconds(n * rows, length) / n for r in replicas for n in {1, most}])


def _in_order(idle: Sequence[Replica], taken: Sequence[int]) -> list[Replica]:
    """Return first the actor whose CPUs the fewest calls have already, and the fastest of such."""
    return sorted(idle, key=lambda r: (sum(map(taken.count, r.cpus)), r.latency.alone_seconds()))
