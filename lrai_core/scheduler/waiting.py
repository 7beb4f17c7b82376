"""What waits for a model, in the orders that the planner asks for."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator
from typing import Final, NamedTuple


class Waiting(NamedTuple):
    """One queued request as the planner sees it; compares by urgency."""

    priority: int  # lower is served first
    urgency: float  # of two the lower is served first: the deadline, or when nobody waits longer
    sequence: int  # unique, in order of arrival
    deadline: float  # on the clock of `now`
    group: Hashable  # requests of one group may share a call
    rows: int
    length: int  # 0 where there is no length axis


_FEW: Final = 64  # who have left, and are still remembered

Lane = list[tuple[int, Waiting]]  # of one group, by length


class Queue:
    """Requests of one model, by urgency and, per group, by length.

    The place of a change is found in O(log n); what lies behind it in its list is moved by one
    `memmove`, of 8 bytes each.
    """

    def __init__(self) -> None:
        self.urgent: list[Waiting] = []
        self.lanes: dict[Hashable, Lane] = {}
        self._known: dict[int, Waiting] = {}
        self._deadlines: list[tuple[float, int]] = []  # a heap, with what has left meanwhile

    def __len__(self) -> int:
        """Return how many requests wait."""
        return len(self.urgent)

    def __iter__(self) -> Iterator[int]:
        """Yield the sequences, the most urgent first."""
        return (waiting.sequence for waiting in self.urgent)

    def add(self, waiting: Waiting) -> None:
        """Let a request wait."""
        self._known[waiting.sequence] = waiting
        insort(self.urgent, waiting)
        insort(self.lanes.setdefault(waiting.group, []), (waiting.length, waiting))
        heapq.heappush(self._deadlines, (waiting.deadline, waiting.sequence))

    def remove(self, sequence: int) -> None:
        """Take a request out, if it waits."""
        if (waiting := self._known.pop(sequence, None)) is None:
            return
        # Most are at the front when they leave.
        del self.urgent[0 if self.urgent[0] is waiting else bisect_left(self.urgent, waiting)]
        lane = self.lanes[waiting.group]
        del lane[bisect_left(lane, (waiting.length, waiting))]
        if not lane:
            del self.lanes[waiting.group]
        if len(self._deadlines) > 2 * len(self._known) + _FEW:  # of who was to wait for longer
            self._deadlines = [(one.deadline, one.sequence) for one in self._known.values()]
            heapq.heapify(self._deadlines)

    def next_deadline(self) -> float:
        """Return the earliest deadline, infinity where nothing waits."""
        heap = self._deadlines
        while heap and heap[0][1] not in self._known:
            heapq.heappop(heap)
        return heap[0][0] if heap else float("inf")

    def expire(self, now: float) -> list[int]:
        """Take out and return what is past its deadline."""
        late = []
        while self.next_deadline() <= now:
            late.append(self._deadlines[0][1])
            self.remove(late[-1])
        return late
