"""The loop around the planner: one thread per runtime, the only one that touches queues and actors.

Callers hand requests over with `submit` from any thread and wait on a future. Every accepted
request ends exactly once: with its outputs, or with one error.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

import zmq

from lrai_core.artifact import LatencyPoint
from lrai_core.config import SchedulerConfig
from lrai_core.engine.batching import MEASURED_ELEMENTS
from lrai_core.errors import (
    ActorError,
    DeadlineExceeded,
    LraiError,
    ModelNotFound,
    NotReady,
    RequestError,
    shorten,
)
from lrai_core.events import EventBus
from lrai_core.protocol import Array, ValidRequest
from lrai_core.scheduler.admission import Admission
from lrai_core.scheduler.latency import LatencyModel
from lrai_core.scheduler.planner import Bounds, Decision, Waiting, plan
from lrai_core.wire.messages import Refused
from lrai_core.wire.workers import Answered, GaveUp, Lost, Outcome, Workers

_ATTEMPTS: Final = 2  # deliveries of one request to an actor that dies of it


@dataclass(slots=True, eq=False)
class _Pending:
    """One accepted request until it ends."""

    model: str
    queue: _Queue
    request: ValidRequest
    future: Future[list[Array]]
    arrival: float
    deadline: float
    attempts: int = 0
    alone: bool = False
    running: bool = False
    told: bool = False  # its future is settled, though the engine may still be at it


@dataclass(slots=True)
class _Queue:
    """One model's waiting requests, in order of arrival."""

    latency: LatencyModel
    waiting: list[_Pending] = field(default_factory=list)
    failed: str = ""


@dataclass(slots=True)
class _Call:
    """A batch at an actor."""

    queue: _Queue
    pending: list[_Pending]
    dispatched: float


class Scheduler:
    """Queues, plans and settles requests of all models of a runtime."""

    def __init__(self, config: SchedulerConfig, workers: Workers, events: EventBus) -> None:
        self._config = config
        self._workers = workers
        self._events = events
        self._admission = Admission(config)
        self._bounds = Bounds(config.max_batch_rows, config.max_batch_elements or MEASURED_ELEMENTS)
        self._queues: dict[str, _Queue] = {}
        self._calls: dict[int, _Call] = {}
        self._batches = itertools.count(1)
        self._arrived: deque[_Pending | Callable[[], None]] = deque()
        self._state_lock = threading.Lock()
        self._accepting = True
        self._closed = False
        self._stopped = False  # nothing that arrives now would be seen
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        os.set_blocking(self._wake_read, False)
        self._poller = zmq.Poller()
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._last_answer = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="lrai-scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread; from now on `workers` belong to it."""
        self._workers.register(self._poller)
        self._thread.start()

    def add(self, model: str, profile: Sequence[LatencyPoint]) -> None:
        """Open a queue for `model`; its actor is the workers' business."""
        self._queues[model] = _Queue(LatencyModel(profile))

    def submit(
        self, model: str, request: ValidRequest, timeout_ms: float | None
    ) -> Future[list[Array]]:
        """Accept a request, or refuse it at once.

        Args:
            model: A model that was added.
            request: As `protocol.validate` returned it.
            timeout_ms: How long the caller waits; None for the configured default.

        Returns:
            A future of one array per wanted output. Cancelling it takes the request out of the
            queue if it has not started.

        Raises:
            QueueFull: The queue has no room.
            DeadlineExceeded: The time allowed is less than the model alone takes.
            NotReady: Draining or closed, or the model failed for good.
            ModelNotFound: No such model.
        """
        try:
            queue = self._queues[model]
        except KeyError:
            raise ModelNotFound(f"no model {shorten(model)!r} is loaded") from None
        try:
            pending = self._admit(model, queue, request, timeout_ms)
        except LraiError as error:
            self._events.emit("request_refused", model, reason=type(error).__name__)
            raise
        self._events.emit("request_accepted", model, rows=request.rows)
        self._hand_over(pending)
        return pending.future

    def call(self, action: Callable[[], None]) -> None:
        """Run `action` in the scheduler's thread, soon.

        Raises:
            NotReady: The thread has ended.
        """
        if not self._hand_over(action):
            raise NotReady("the runtime was closed")

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def remove(self, model: str) -> None:
        """Forget a model; what waits for it or runs is refused. Runs in the scheduler's thread."""
        queue = self._queues.pop(model, None)
        if queue is not None:
            queue.failed = f"model {model!r} was unloaded"
            self._fail_all(queue, queue.failed)
            for batch in [b for b, call in self._calls.items() if call.queue is queue]:
                self._settle_with(self._calls.pop(batch).pending, ActorError(queue.failed))

    def outstanding(self) -> int:
        """Return the rows accepted and not yet ended."""
        return self._admission.rows

    def idle_seconds(self) -> float:
        """Return for how long accepted requests wait without any answer, 0 where none is inside."""
        return time.monotonic() - self._last_answer if self._admission.rows else 0.0

    def drain(self, timeout_seconds: float) -> bool:
        """Refuse new requests and wait for the accepted ones; return whether all ended."""
        with self._state_lock:
            self._accepting = False
        deadline = time.monotonic() + timeout_seconds
        while self._admission.rows and time.monotonic() < deadline:
            time.sleep(0.005)
        return self._admission.rows == 0

    def close(self) -> None:
        """Stop the thread; what is still inside ends with an error."""
        with self._state_lock:
            if self._closed:
                return
            self._accepting, self._closed = False, True
        self._wake()
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _admit(
        self, model: str, queue: _Queue, request: ValidRequest, timeout_ms: float | None
    ) -> _Pending:
        if queue.failed:
            raise ActorError(queue.failed)
        timeout = self._config.default_timeout_ms if timeout_ms is None else timeout_ms
        needed_ms = queue.latency.engine_seconds(request.rows, request.length) * 1e3
        if not timeout > needed_ms:
            raise DeadlineExceeded(f"{timeout:g} ms allowed, the model takes {needed_ms:.3g} ms")
        now = time.monotonic()
        with self._state_lock:  # `drain` sees a request either refused or counted
            if not self._accepting:
                raise NotReady("the runtime is draining")
            if not self._admission.rows:
                self._last_answer = now  # nobody waited until now
            self._admission.enter(request.rows, request.nbytes, needed_ms / 1e3 / request.rows)
        return _Pending(model, queue, request, Future(), now, now + timeout / 1e3)

    def _hand_over(self, item: _Pending | Callable[[], None]) -> bool:
        with self._state_lock:
            if not self._stopped:
                self._arrived.append(item)
                self._wake()
                return True
        if isinstance(item, _Pending):
            self._settle_with([item], NotReady("the runtime was closed"))
        return False

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # the pipe is full of wake-ups already
            os.write(self._wake_write, b"\0")

    def _run(self) -> None:
        end = NotReady("the runtime was closed")
        try:
            while not self._closed:
                now = time.monotonic()
                pause = max(0.0, self._next_check(now) - now)
                self._poller.poll(math.ceil(pause * 1e3))
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
                self._step()
        except BaseException as bug:
            end = NotReady(f"the scheduler failed: {type(bug).__name__}")
            raise
        finally:  # closed, or a bug: either way nobody waits for a thread that is gone
            self._end_all(end)

    def _end_all(self, error: LraiError) -> None:
        with self._state_lock:
            self._accepting, self._stopped = False, True
        inside = [item for item in self._arrived if isinstance(item, _Pending)]
        for call in self._calls.values():
            inside += call.pending
        for queue in list(self._queues.values()):
            inside += queue.waiting
            queue.waiting = []
        self._arrived.clear()
        self._calls.clear()
        self._settle_with(inside, error)

    def _step(self) -> None:
        while self._arrived:
            item = self._arrived.popleft()
            if isinstance(item, _Pending):
                self._enqueue(item)
            else:
                item()
        now = time.monotonic()
        for outcome in self._workers.poll(now):
            self._settle(outcome)
        self._expire_running(now)
        for model, queue in list(self._queues.items()):  # `add` runs in other threads
            self._expire(queue, now)
            if queue.waiting and self._workers.idle(model):
                self._dispatch(model, queue, now)

    def _next_check(self, now: float) -> float:
        checks = [self._workers.next_check(now)]
        for queue in list(self._queues.values()):
            checks += [p.deadline for p in queue.waiting]
        for call in self._calls.values():
            checks += [p.deadline for p in call.pending if not p.told]
        return min(checks)

    def _enqueue(self, pending: _Pending) -> None:
        queue = pending.queue  # of the model that it was checked against, whatever has its name now
        if queue.failed:
            self._settle_with([pending], ActorError(queue.failed))
        else:
            queue.waiting.append(pending)

    def _expire(self, queue: _Queue, now: float) -> None:
        late = [p for p in queue.waiting if p.deadline <= now or p.future.cancelled()]
        if late:
            self._take_out(queue, late)
            self._settle_with(late, DeadlineExceeded("the deadline passed in the queue"))

    def _expire_running(self, now: float) -> None:
        """Tell callers in time; the request keeps its place until the engine is done with it."""
        for call in self._calls.values():
            for pending in call.pending:
                if pending.deadline <= now:
                    self._tell(pending, None, DeadlineExceeded("the deadline passed while it ran"))

    def _dispatch(self, model: str, queue: _Queue, now: float) -> None:
        decision = self._decide(model, queue, now)
        dropped = [queue.waiting[index] for index in decision.drop]
        chosen = [queue.waiting[index] for index in decision.dispatch]
        self._take_out(queue, [*dropped, *chosen])
        self._settle_with(
            dropped,
            DeadlineExceeded("the deadline cannot be met any more, the request was not run"),
        )
        # From here on a request holds its place until the engine is done with it, cancelled or not.
        started = []
        for pending in chosen:
            if pending.running or pending.future.set_running_or_notify_cancel():
                pending.running = True
                started.append(pending)
            else:  # cancelled since the queue was looked through; its future knows
                pending.told = True
                self._events.emit("request_failed", model, reason="cancelled")
                self._settle_with([pending], DeadlineExceeded("cancelled"))
        if not started:
            return
        batch = next(self._batches)
        self._calls[batch] = _Call(queue, started, now)
        self._workers.dispatch(
            model, batch, [p.request for p in started], decision.predicted_seconds
        )
        self._events.emit(
            "batch_dispatched",
            model,
            requests=len(started),
            rows=sum(p.request.rows for p in started),
            length=max(p.request.length for p in started),
            predicted_seconds=decision.predicted_seconds,
        )

    def _decide(self, model: str, queue: _Queue, now: float) -> Decision:
        try:
            waiting = [
                Waiting(p.request.group, p.request.rows, p.request.length, p.deadline, p.alone)
                for p in queue.waiting
            ]
            return plan(waiting, queue.latency, now, self._bounds)
        except Exception as error:  # noqa: BLE001 - edge: a broken plan means one by one, not silence
            self._events.emit("planner_failed", model, reason=repr(error))
            return Decision((0,), (), 0.0)

    def _settle(self, outcome: Outcome) -> None:
        if isinstance(outcome, GaveUp):
            queue = self._queues.get(outcome.actor)  # named like its model
            if queue is not None:
                queue.failed = outcome.message
                self._fail_all(queue, outcome.message)
            return
        call = self._calls.pop(outcome.batch, None)
        if call is None:
            return
        match outcome:
            case Answered(answers=answers, engine_seconds=engine_seconds):
                now = time.monotonic()
                call.queue.latency.observe(now - call.dispatched, engine_seconds)
                self._events.emit(
                    "batch_completed", call.pending[0].model, engine_seconds=engine_seconds
                )
                self._last_answer = now
                for pending, answer in zip(call.pending, answers, strict=True):
                    self._end(pending, answer, None)
            case Refused(message=message, invalid=invalid):
                kind = RequestError if invalid else ActorError
                self._again(call, kind(f"the engine refused the request: {message}"), once=True)
            case Lost(message=message):
                self._again(
                    call, ActorError(f"the request could not be answered: {message}"), once=False
                )

    def _again(self, call: _Call, error: LraiError, *, once: bool) -> None:
        """Run the requests of a failed call once more, each alone; what failed alone ends.

        Args:
            call: What failed.
            error: What a request ends with that may not run again.
            once: Whether having run alone is enough to end: an engine's refusal is the request's
                own, a death may have been chance.
        """
        ended, retried = list[_Pending](), list[_Pending]()
        for pending in call.pending:
            pending.attempts += 1
            own = len(call.pending) == 1
            over = own if once else pending.attempts >= _ATTEMPTS
            (ended if over or call.queue.failed else retried).append(pending)
            pending.alone = True
        self._settle_with(ended, error)
        if retried:
            self._events.emit("batch_retried", retried[0].model, requests=len(retried))
            call.queue.waiting[:0] = retried

    def _fail_all(self, queue: _Queue, message: str) -> None:
        waiting, queue.waiting = queue.waiting, []
        self._settle_with(waiting, ActorError(message))

    def _settle_with(self, pending: Sequence[_Pending], error: LraiError) -> None:
        for one in pending:
            self._end(one, None, error)

    def _end(self, pending: _Pending, answer: list[Array] | None, error: LraiError | None) -> None:
        self._admission.leave(pending.request.rows, pending.request.nbytes)
        self._tell(pending, answer, error)

    def _tell(self, pending: _Pending, answer: list[Array] | None, error: LraiError | None) -> None:
        if pending.told:
            return
        pending.told = True
        if not pending.running and not pending.future.set_running_or_notify_cancel():
            self._events.emit("request_failed", pending.model, reason="cancelled")
        elif answer is not None:
            self._events.emit(
                "request_answered",
                pending.model,
                seconds=time.monotonic() - pending.arrival,
                rows=pending.request.rows,
            )
            pending.future.set_result(answer)
        else:
            self._events.emit("request_failed", pending.model, reason=type(error).__name__)
            pending.future.set_exception(error)

    def _take_out(self, queue: _Queue, gone: Sequence[_Pending]) -> None:
        if gone:
            leaving = set(map(id, gone))
            queue.waiting = [p for p in queue.waiting if id(p) not in leaving]
