"""Requests for a model that runs here, on the threads that bring them, or that wait for them.

Nothing is handed over and nobody is woken, which is all that is left of the way to such a model.
They are planned as the scheduler would, in calls of what costs least together. Where several are
brought together, their answers leave together, when the last is there: there, what is run is what
can all be in time. What comes one by one is combined, see `combining.py`.
"""

from __future__ import annotations

import heapq
import itertools
import math
import numbers
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from lrai_core.engine.batching import MEASURED_ELEMENTS
from lrai_core.engine.engine import Session
from lrai_core.errors import (
    ActorError,
    Cancelled,
    DeadlineExceeded,
    LraiError,
    NotReady,
    RequestError,
)
from lrai_core.protocol import Array, InferenceRequest, InferenceResponse, ValidRequest
from lrai_core.runtime.embedded import Embedded, priority_of
from lrai_core.runtime.version import Started, Version, settle
from lrai_core.scheduler.admission import Admission
from lrai_core.scheduler.latency import LatencyModel
from lrai_core.scheduler.planner import PROBE_SECONDS, Bounds, Decision, plan, probe
from lrai_core.scheduler.waiting import Queue, Waiting
from lrai_core.wire.forms import validate_by_form
from lrai_core.wire.messages import Load, Refused
from lrai_core.wire.workers import Answered, Batch
from lrai_deployments.combining import Combiner, Helped
from lrai_deployments.inline import run

_LATE: Final = "the deadline cannot be met any more; it was not run"
_PATIENCE_MS: Final = 100.0  # at least, before who names no time is as urgent as who is due
_LEARN_EVERY: Final = 8  # of the calls with one request: they are many, alike, and quick

T = TypeVar("T")
Outcome = tuple[int, list[Array] | LraiError]  # of the request with this index


@dataclass(slots=True, eq=False)
class _Accepted:
    """A request that was taken, until it has its outcome."""

    request: InferenceRequest
    valid: ValidRequest
    place: Waiting  # its sequence is its index among those it was brought with, or that wait
    began: float
    variant: int = 0  # that has run it last


class Here:
    """A version whose engine runs on the threads that ask, one call at a time."""

    def __init__(
        self, runtime: Embedded, version: Version, load: Load, sessions: Sequence[Session]
    ) -> None:
        """Serve a version that is loaded in this process."""
        self._runtime, self._version = runtime, version
        self._load, self._sessions = load, sessions
        limits = version.limits
        elements = limits.max_batch_elements or MEASURED_ELEMENTS
        self._bounds = Bounds(limits.max_batch_rows, elements)
        self._timeout_ms = limits.latency_slo_ms or limits.default_timeout_ms
        first = () if load.optimise else version.variant.latency
        self._latency = LatencyModel(first, *(variant.latency for variant, _ in version.beside))
        alone_ms = 1e3 * self._latency.alone_seconds()
        self._patience_ms = limits.latency_slo_ms or max(_PATIENCE_MS, 20 * alone_ms)
        self._lock = threading.Lock()
        self._calls, self._seen = 0, time.monotonic()  # when an answer came, or it was loaded
        self._overdue = math.inf  # when the call that runs counts as hung
        self._together = 0  # rows that are answered together
        self._admission = Admission(limits)
        self._indices = itertools.count()
        self._queue, self._waits = Queue(), dict[int, _Accepted]()  # what its combiner waits for
        self._combiner = Combiner(self._step, self._withdraw)

    def close(self) -> None:
        """Let go of what ran requests, once nothing waits."""
        self._combiner.close()

    def answer(self, requests: Sequence[InferenceRequest]) -> list[Started]:
        """Return the outcome of each request, in their order."""
        now = time.monotonic()
        asked = [self._accept(index, request, now) for index, request in enumerate(requests)]
        inside = {index: one for index, one in enumerate(asked) if isinstance(one, _Accepted)}
        not_run = NotReady("it was not run")
        ended: list[Started] = [not_run if isinstance(o, _Accepted) else o for o in asked]
        rows = sum(one.valid.rows for one in inside.values())
        self._count(rows)
        try:
            with self._lock:
                for index, outcome in self._run(dict(inside)):
                    ended[index] = self._end(inside.pop(index), outcome)
        finally:
            self._count(-rows)
            for one in inside.values():  # a bug: they are counted out, and it is not hidden
                self._end(one, not_run)
        return ended

    def _count(self, rows: int) -> None:
        with self._combiner.door:
            self._together += rows

    def start(self, request: InferenceRequest) -> Future[InferenceResponse]:
        """Accept a request; see `Helped` for who runs it.

        Raises:
            LraiError: It is refused.
        """
        one = self._accept(next(self._indices), request, time.monotonic())
        if isinstance(one, LraiError):
            raise one
        if not isinstance(one, _Accepted):
            return one  # type: ignore[return-value] # the future of the version that has it now
        size, index = one.valid, one.place.sequence
        try:
            alone = self._ask(0.0, self._latency.call_seconds, size.rows, size.length)
            self._admission.enter(size.rows, size.nbytes, alone / size.rows)
        except LraiError as error:
            self._end(one, error)
            raise
        future = Helped(self._combiner, index)
        with self._combiner.door:
            self._queue.add(one.place)
            self._waits[index], self._combiner.waiting[index] = one, future
        return future

    def outstanding(self) -> int:
        """Return the rows that were started, and have not ended."""
        return self._admission.rows + self._together

    def hangs(self) -> bool:
        """Return whether the call that runs now has taken longer than one may."""
        return time.monotonic() > self._overdue

    def _accept(self, index: int, request: InferenceRequest, now: float) -> _Accepted | Started:
        """Return a request that is checked and counted in, or what became of it."""
        runtime, version = self._runtime, self._version
        try:
            priority = priority_of(request)
            given = time_of(request)
            valid = validate_by_form(request, version.signature, runtime.config.limits)
            if not runtime.scheduler.accepting:
                raise NotReady("the runtime is draining")
            if not version.enter():
                return runtime.start(request, version)  # another one has just taken its place
        except LraiError as error:
            return error
        try:
            if version.watch is not None:
                version.watch(valid)
        except BaseException:  # no memory is left for the sample
            version.leave()
            raise
        version.used_at = now
        runtime.events.emit("request_accepted", version.key, rows=valid.rows)
        timeout_ms = self._timeout_ms if given is None else max(0.0, given)  # NaN is no time, too
        deadline = now + timeout_ms / 1e3
        size = (valid.group, valid.rows, valid.length)
        usual_ms = runtime.config.scheduler.default_timeout_ms
        patience_ms = self._patience_ms if request.timeout_ms is None else usual_ms
        urgency = now + min(timeout_ms, patience_ms) / 1e3
        place = Waiting(priority, urgency, index, deadline, *size)
        return _Accepted(request, valid, place, now)

    def _step(self) -> None:
        """Run the next call of what waits, and drop what would be late."""
        left: dict[int, tuple[_Accepted, Helped]] = {}
        ended: list[tuple[int, list[Array] | LraiError]] = []
        try:
            with self._lock:
                with self._combiner.door:
                    late = self._queue.expire(time.monotonic())  # wherever in the order they stand
                    some = len(self._queue)
                    decision = self._decide(self._queue) if some else Decision((), (), 0.0)
                    gone = (*late, *decision.drop)
                    for index in gone or decision.dispatch:
                        left[index] = self._take(index)
                ended += [(index, DeadlineExceeded(_LATE)) for index in gone]
                if not gone and decision.dispatch:  # who is late is told before a call
                    inside = {index: one for index, (one, _) in left.items()}
                    ended += self._call(decision.dispatch, inside)
        finally:  # without the lock: what is told of it may ask for more
            try:
                for index, outcome in ended:
                    self._settle(*left[index], outcome)
                    del left[index]
            finally:
                for one, future in left.values():  # as above
                    self._settle(one, future, NotReady("it was not run"))

    def _withdraw(self, index: int) -> None:
        """Take out what was cancelled, if it has not begun."""
        with self._combiner.door:
            taken = self._take(index) if index in self._waits else None
        if taken is not None:
            self._leave(taken[0], Cancelled("cancelled"))
            taken[1].set_running_or_notify_cancel()  # which tells those who wait for several

    def _take(self, index: int) -> tuple[_Accepted, Helped]:
        """Take a request out of what waits; the door is held."""
        self._queue.remove(index)
        return self._waits.pop(index), self._combiner.waiting.pop(index)

    def _settle(self, one: _Accepted, future: Helped, outcome: list[Array] | LraiError) -> None:
        settle(future, self._leave(one, outcome))
        future.woken.set()

    def _leave(
        self, one: _Accepted, outcome: list[Array] | LraiError
    ) -> InferenceResponse | LraiError:
        self._admission.leave(one.valid.rows, one.valid.nbytes)
        return self._end(one, outcome)

    def _run(self, inside: Mapping[int, _Accepted]) -> Iterator[Outcome]:
        """Run what can be in time, call after call; yield the outcome of each request."""
        now = time.monotonic()
        places, everybody = [one.place for one in inside.values()], set(inside)
        chosen = self._ask(everybody, self._choose, places, now)
        for index in everybody - chosen:
            yield index, DeadlineExceeded(_LATE)
        if len(chosen) == 1:
            yield from self._call(tuple(chosen), inside)
            return
        queue = Queue()
        for index in chosen:
            queue.add(inside[index].place)
        while len(queue):
            decision = self._decide(queue)
            for index in (*decision.drop, *decision.dispatch):
                queue.remove(index)
            for index in decision.drop:
                yield index, DeadlineExceeded(_LATE)
            if decision.dispatch:
                yield from self._call(decision.dispatch, inside)

    def _choose(self, places: Sequence[Waiting], now: float) -> set[int]:
        """Return who can all be in time."""
        latency = self._latency
        last = sum(latency.call_seconds(one.rows, one.length) for one in places) * latency.margin
        due = min((one.deadline for one in places), default=math.inf)
        if now + last <= due or not _late(places, latency, now, self._bounds, len(places)):
            return {one.sequence for one in places}
        chosen = choose_together(places, latency, now, self._bounds)
        if not chosen and now - self._seen > PROBE_SECONDS:
            return {max(places, key=lambda one: one.deadline).sequence}
        return chosen

    def _decide(self, queue: Queue) -> Decision:
        now, first = time.monotonic(), Decision((next(iter(queue)),), (), 0.0)
        decision = self._ask(first, plan, queue, self._latency, now, self._bounds)
        if not decision.dispatch and now - self._seen > PROBE_SECONDS:
            return self._ask(first, probe, queue.urgent, self._latency)
        return decision

    def _ask(self, otherwise: T, question: Callable[..., T], *arguments: Any) -> T:
        return self._runtime.scheduler.ask(self._version.key, otherwise, question, *arguments)

    def _call(self, indices: Sequence[int], inside: Mapping[int, _Accepted]) -> Iterator[Outcome]:
        """Run a call; where the engine refuses several, each alone: one may be to blame."""
        valid = [inside[index].valid for index in indices]
        rows, length = sum(one.rows for one in valid), max(one.length for one in valid)
        variant = self._ask(0, self._latency.variant, rows, length)
        for index in indices:
            inside[index].variant = variant
        name, emit = self._version.key, self._runtime.events.emit
        emit("batch_dispatched", name, requests=len(valid), rows=rows, length=length)
        began, actor = time.monotonic(), self._runtime.config.actor
        predicted = self._ask(0.0, self._latency.engine_seconds, rows, length)
        self._overdue = began + max(actor.hang_seconds, actor.hang_factor * predicted)
        try:
            outcome = run(self._load, self._sessions[variant], Batch(0, valid, predicted))
        finally:
            self._overdue = math.inf
        match outcome:
            case Answered(answers=answers, engine_seconds=seconds):
                self._calls, now = self._calls + 1, time.monotonic()
                # Who is faster than thought is tried again at once: it is not known what it takes.
                known = seconds > predicted / 2
                self._seen = now if known else self._seen
                if len(valid) > 1 or not known or self._calls % _LEARN_EVERY == 0:
                    seen = (rows, length, now - began, seconds, variant)
                    if self._ask(None, self._latency.observe, *seen):
                        emit("speed_changed", name, scale=self._latency.scale)
                emit("batch_completed", name, engine_seconds=seconds)
                yield from zip(indices, answers, strict=True)
            case Refused(message=message, invalid=invalid) if len(indices) == 1:
                kind = RequestError if invalid else ActorError
                yield indices[0], kind(f"the engine refused the request: {message}")
            case _:
                emit("batch_retried", name, requests=len(indices))
                for index in indices:
                    yield from self._call([index], inside)

    def _end(
        self, one: _Accepted, outcome: list[Array] | LraiError
    ) -> InferenceResponse | LraiError:
        version, emit = self._version, self._runtime.events.emit
        version.leave()
        if isinstance(outcome, LraiError):
            emit("request_failed", version.key, reason=type(outcome).__name__)
            return outcome
        seconds = time.monotonic() - one.began
        emit("request_answered", version.key, seconds=seconds, rows=one.valid.rows)
        return version.response(one.request.id, one.valid.outputs, outcome, one.variant)


def time_of(request: InferenceRequest) -> float | None:
    """Return how long a caller waits, in ms; None where it does not say.

    Raises:
        RequestError: What it says is no number, or larger than any time.
    """
    given: Any = request.timeout_ms
    with suppress(OverflowError):
        if given is None or isinstance(given, numbers.Real):
            return None if given is None else float(given)
    kind = type(given).__name__
    raise RequestError(f"timeout_ms is {kind}, a number up to 1e300 is needed")


def choose_together(
    waiting: Sequence[Waiting], latency: LatencyModel, now: float, bounds: Bounds
) -> set[int]:
    """Return the sequences of the most requests that all end in time where answers leave together.

    In calls that they share, or each alone where that lets more be in time, as it may of unequal
    lengths. Nobody is left out for the sake of a lower priority.
    """
    sharing: list[Waiting] = []  # of each priority those with the latest deadlines
    for _, level in itertools.groupby(sorted(waiting), key=lambda one: one.priority):
        order = sharing + sorted(level, key=lambda one: -one.deadline)
        late = partial(_late, order, latency, now, bounds)
        sharing = order[: bisect_left(range(len(order)), x=True, lo=len(sharing), key=late)]
    ways = {one.sequence for one in sharing}, _alone(waiting, latency, now)
    priority = {one.sequence: one.priority for one in waiting}
    return min(ways, key=lambda some: [*sorted(map(priority.__getitem__, some)), math.inf])


def _late(
    order: Sequence[Waiting], latency: LatencyModel, end: float, bounds: Bounds, last: int
) -> bool:
    """Return whether the first ones, up to `last`, do not all end in time in calls they share."""
    queue, due = Queue(), min(one.deadline for one in order[: last + 1])
    for one in order[: last + 1]:
        queue.add(one)
    while len(queue):
        decision = plan(queue, latency, end, bounds)
        if decision.drop or not decision.dispatch:
            return True
        for index in decision.dispatch:
            queue.remove(index)
        end += decision.predicted_seconds * latency.margin
    return end > due


def _alone(waiting: Sequence[Waiting], latency: LatencyModel, now: float) -> set[int]:
    """Return who ends in time if each takes what it takes alone.

    Of those whose deadline is not before a certain one the shortest are taken, as many as end by
    then; that deadline is the one with which they are the most. O(n log n).
    """
    chosen, end, due = set[int](), now, math.inf
    for _, level in itertools.groupby(sorted(waiting), key=lambda one: one.priority):
        order = sorted(level, key=lambda one: -one.deadline)
        sizes = [len(kept) for kept, _, _ in _fits(order, latency, end, due)]
        most = sizes.index(max(sizes)) + 1
        *_, (kept, end, due) = _fits(order[:most], latency, end, due)
        chosen |= {sequence for _, sequence in kept}
    return chosen


# What ends in time of those with the latest deadlines, a heap of -seconds and sequence; their end;
# the first deadline.
_Fit = tuple[list[tuple[float, int]], float, float]


def _fits(
    order: Sequence[Waiting], latency: LatencyModel, end: float, due: float
) -> Iterator[_Fit]:
    """Yield what is kept, the same list, after each request in order of deadlines, latest first."""
    kept: list[tuple[float, int]] = []
    for one in order:
        alone, until = latency.call_seconds(one.rows, one.length), min(due, one.deadline)
        heapq.heappush(kept, (-alone * latency.margin, one.sequence))
        end += alone * latency.margin
        while kept and end > until:
            end += heapq.heappop(kept)[0]
        yield kept, end, until
