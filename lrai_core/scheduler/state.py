"""What the scheduler knows: requests that were accepted, models, and the calls at their actors."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from lrai_core.artifact import LatencyPoint
from lrai_core.errors import LraiError
from lrai_core.protocol import Array, ValidRequest
from lrai_core.scheduler.latency import LatencyModel
from lrai_core.scheduler.planner import PROBE_SECONDS, Bounds
from lrai_core.scheduler.waiting import Queue, Waiting

Done = Callable[[list[Array] | None, LraiError | None, int], None]

BACKGROUND: Final = 1 << 30  # a priority: nobody waits for it, nor for what is above
# Times its prediction, and on top of it, a call may take before its CPUs count as free: who hangs
# must not stop the others.
_OVERDUE, _OVERDUE_SECONDS = 3.0, 0.05


@dataclass(slots=True, eq=False)
class Pending:
    """One accepted request until it ends."""

    place: Waiting  # in the queue, now or at another time
    model: Model
    request: ValidRequest
    done: Done | None  # None once it was called, though the engine may still be at it
    arrival: float
    attempts: int = 0
    variant: int = 0  # that has run it last

    @property
    def alone(self) -> bool:
        """Whether it shares neither a call nor the actor, after a call of it that failed."""
        return self.place.group == self.place.sequence


@dataclass(slots=True, eq=False)
class Model:
    """One model: what waits for it, and the actors that run it."""

    name: str
    replicas: dict[str, Replica]
    bounds: Bounds
    slo_ms: float  # after which who names no time is as urgent as can be,
    timeout_ms: float  # and after which it is given up
    pace: float  # seconds of its actors for a request, lately
    weight: float  # what a request counts, and of its share of the processor
    queue: Queue = field(default_factory=Queue)
    waiting: dict[int, Pending] = field(default_factory=dict)
    used_seconds: float = 0.0  # of the processor, lately, by its weight
    ran: float = 0.0  # when a call ended, whatever came of it
    asked: float = -math.inf  # when a request was accepted, and the first of those that have come
    wants: float = -math.inf  # without a pause of a second
    fits: int = 0  # padded elements, at most, of a shared call answered since a kill at one
    failed: str = ""
    inside: set[Pending] = field(default_factory=set)  # accepted, not ended; without copies
    since: float = 0.0  # when the first came, one was answered or refused, or its turn could come

    def turn(self, now: float) -> int:
        """Return when it has the CPU: 0 first, where nothing has run for long; 2 last."""
        if self.queue.urgent[0].priority >= BACKGROUND:
            return 2
        # Where requests are given up sooner than that, others have waited before those that do.
        wants = min(self.wants, next(iter(self.waiting.values())).arrival)
        return int(max(self.ran, wants) > now - PROBE_SECONDS)


@dataclass(slots=True, eq=False)
class Call:
    """A batch at an actor, which runs it or has it next."""

    model: Model
    replica: Replica
    pending: list[Pending]
    rows: int
    length: int
    seconds: float  # predicted
    variant: int
    queued: bool  # it was handed over while another one ran
    begun: float = 0.0  # when it was the first of its actor; the others follow from that
    overdue: float = 0.0  # from then on its CPUs count as free
    next_from: float = 0.0  # from then on its actor may have the next one

    def begin(self, now: float, tick_seconds: float) -> None:
        """Take note that it runs from now on; `tick_seconds`: see `Scheduler`."""
        self.begun, self.overdue = now, now + _OVERDUE * self.seconds + _OVERDUE_SECONDS
        way = 2 * self.replica.latency.overhead_seconds
        # Where the engine takes less than the way to it, waiting for more requests saves more; of a
        # model that has not answered yet, nobody knows.
        due = now + max(0.0, self.seconds - way - tick_seconds)
        self.next_from = due if 0 < way < self.seconds else math.inf

    def almost_done(self, now: float) -> bool:
        """Whether its actor may have the next call; one that hangs may not."""
        return self.next_from <= now < self.overdue and not self.pending[0].alone


class Replica:
    """One actor of a model: what it costs there, and how many CPUs a call takes."""

    def __init__(self, actor: str, *profiles: Sequence[LatencyPoint], threads: int = 1) -> None:
        self.actor, self.threads, self.latency = actor, threads, LatencyModel(*profiles)
        self.cpus: tuple[int, ...] = ()  # that it keeps to, if to some
        self.calls: deque[Call] = deque()  # the first one runs
        self.seen = 0.0  # when an answer came, or it was loaded

    def is_known(self, now: float) -> bool:
        """Whether it was seen of late what its calls take."""
        return now - self.seen < PROBE_SECONDS
