"""From what waits to what runs next: a pure function, without clock, locks or sockets.

The oldest request is always in the next call, so nobody starves. Others join it only where the
profile says that running together takes less time than running one after the other: the next
neighbours by length, since padding is work. Where coalescing does not pay, the plan is one by one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lrai_core.scheduler.latency import LatencyModel


class Waiting(NamedTuple):
    """One queued request as the planner sees it."""

    group: Hashable  # requests of one group may share a call
    rows: int
    length: int  # 0 where there is no length axis
    deadline: float  # on the clock of `now`
    alone: bool = False  # after a failed call: what ruined it must not ruin others again


@dataclass(frozen=True, slots=True)
class Bounds:
    """Hard limits of one call."""

    rows: int
    elements: int = 0  # padded rows x length; 0 for none


@dataclass(frozen=True, slots=True)
class Decision:
    """Indices into the queue: what runs now as one call, and what cannot be answered in time."""

    dispatch: tuple[int, ...]
    drop: tuple[int, ...]
    predicted_seconds: float


def plan(queue: Sequence[Waiting], latency: LatencyModel, now: float, bounds: Bounds) -> Decision:
    """Return the next call of a model whose actor is idle.

    Args:
        queue: In order of arrival.
        latency: Predicts what a call costs.
        now: The clock of the deadlines, in seconds.
        bounds: Limits of a call; a single request that exceeds them runs alone.
    """
    drop: list[int] = []
    head = -1
    for index, waiting in enumerate(queue):
        if now + latency.engine_seconds(waiting.rows, waiting.length) > waiting.deadline:
            drop.append(index)
        else:
            head = index
            break
    if head < 0:
        return Decision((), tuple(drop), 0.0)
    first = queue[head]
    if first.alone:
        cost = latency.call_seconds(first.rows, first.length)
        return Decision((head,), tuple(drop), cost)
    mates = [
        index
        for index in range(head + 1, len(queue))
        if queue[index].group == first.group
        and not queue[index].alone
        and queue[index].deadline > now
    ]
    batch, cost = _extend(queue, head, mates, latency, now, bounds)
    return Decision(tuple(sorted(batch)), tuple(drop), cost)


class _Call(NamedTuple):
    """A call while it grows."""

    rows: int
    length: int
    due: float  # the earliest deadline
    cost: float  # predicted seconds

    def joined_by(self, other: Waiting, latency: LatencyModel) -> _Call:
        rows, length = self.rows + other.rows, max(self.length, other.length)
        due = min(self.due, other.deadline)
        return _Call(rows, length, due, latency.call_seconds(rows, length))

    def is_allowed(self, now: float, bounds: Bounds) -> bool:
        within = not bounds.elements or self.rows * self.length <= bounds.elements
        return within and self.rows <= bounds.rows and now + self.cost <= self.due


def _extend(
    queue: Sequence[Waiting],
    head: int,
    mates: list[int],
    latency: LatencyModel,
    now: float,
    bounds: Bounds,
) -> tuple[list[int], float]:
    """Grow the call from the head to both sides in order of length while it saves time.

    Nobody is let in who would make another, or be made, miss a deadline.
    """
    first = queue[head]
    cost = latency.call_seconds(first.rows, first.length)
    call, batch = _Call(first.rows, first.length, first.deadline, cost), [head]
    order = sorted([head, *mates], key=lambda index: (queue[index].length, index))
    at = order.index(head)
    sides = deque(reversed(order[:at])), deque(order[at + 1 :])
    while True:
        best, best_call, best_saving = None, call, 0.0
        for side in sides:
            # A call only grows: who may not join now never may, and must not stand in the way.
            while side and not call.joined_by(queue[side[0]], latency).is_allowed(now, bounds):
                side.popleft()
            if not side:
                continue
            other = queue[side[0]]
            joint = call.joined_by(other, latency)
            saving = call.cost + latency.call_seconds(other.rows, other.length) - joint.cost
            if saving > best_saving:
                best, best_call, best_saving = side, joint, saving
        if best is None:
            return batch, call.cost
        batch.append(best.popleft())
        call = best_call
