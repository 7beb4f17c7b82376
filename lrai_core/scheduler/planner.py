"""From what waits to what runs next: pure decisions, without clock, locks or sockets.

The most urgent request leads the next call. Others join it, nearest in length first, where the
latency model says that they take less time there than alone, and less than in a call with those of
their own length that may wait too: padding is work. Where
its deadline leaves room for a small call only, leading costs more than it is worth: then the most
urgent are given up for a call that serves more per second (the early drop of Nexus, with the number
dropped chosen by what it buys). Where coalescing does not pay, the plan is one by one.

Where not all can be in time, those are left out first whose rows take longest: so most are.

Sources: Shen et al. 2019, "Nexus", section 4.3 (early drop); Moore 1968, "An n job, one machine
sequencing algorithm for minimizing the number of late jobs".
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from math import inf
from typing import Final, NamedTuple

from lrai_core.scheduler.latency import LatencyModel
from lrai_core.scheduler.waiting import Lane, Queue, Waiting

PROBE_SECONDS: Final = 1.0  # without an answer, after which what was learned is not trusted
_DROP_COST: Final = 0.02  # requests that must be gained for each that is given up
_SPARE: Final = 2.0  # durations of the call after the next that its deadline has to leave for it
_MOST_GIVEN_UP: Final = 4096  # by one decision
_AHEAD: Final = 24  # of the most urgent, among whom it is seen whether all can be in time,
_ROOM: Final = 0.25  # with so much of their time left for what arrives meanwhile
_PEERS: Final = 8  # of its own length a neighbour is thought to find, at most
_SHARED: Final = 3  # by so many a call is shared where time is short, if it takes them
_NEARLY: Final = 1.5  # at most so many times what it takes each where all share it
_MOST_SKIPPED: Final = 8  # neighbours too large for a call, before a side is left alone


class Bounds(NamedTuple):
    """Hard limits of one call."""

    rows: int
    elements: int = 0  # padded rows x length; 0 for none
    actors: int = 1  # that run calls at the same time


class Decision(NamedTuple):
    """Sequences of what runs now as one call, and of what is not worth running any more."""

    dispatch: tuple[int, ...]
    drop: tuple[int, ...]
    predicted_seconds: float
    due: float = 0.0  # the earliest deadline among what runs


def plan(queue: Queue, latency: LatencyModel, now: float, bounds: Bounds) -> Decision:
    """Return the next call of a model whose actor is idle.

    Args:
        queue: Not modified.
        latency: Predicts what a call costs.
        now: The clock of the deadlines, in seconds.
        bounds: Limits of a call; a single request that exceeds them runs alone.
    """
    urgent, late, costs = queue.urgent, 0, _Costs(latency)
    while late < len(urgent) and costs.late(urgent[late], now):
        late += 1
    if late == len(urgent):
        return Decision((), tuple(queue), 0.0)
    near = urgent[late : late + _AHEAD]
    if aside := _longest(queue.lanes[near[0].group], near, costs, now, bounds):
        near = [one for one in near if one.sequence not in aside]
    situation = _Situation(queue, costs, now, bounds, late, aside, near)
    call, given_up = situation.lead(near[0]), list[Waiting]()
    if call.short_of_time and not situation.rest_fits(call):
        call, given_up = situation.give_up(call)
    drop = tuple([waiting.sequence for waiting in (*urgent[:late], *given_up)])
    return Decision(tuple([one.sequence for one in call.members]), drop, call.seconds, call.due)


def probe(late: Sequence[Waiting], latency: LatencyModel) -> Decision:
    """Return a call of the one with the most time left, to see what it takes, not to be in time.

    Where all seem too late an actor would never be seen again, however fast it is by now.
    """
    one = max(late, key=lambda waiting: waiting.deadline)
    return Decision((one.sequence,), (), latency.call_seconds(one.rows, one.length), one.deadline)


class _Costs(dict[tuple[int, int], float]):
    """What calls of rows and length take, in seconds: a decision asks for the same ones often."""

    __slots__ = ("_predict", "margin")

    def __init__(self, latency: LatencyModel) -> None:
        self._predict, self.margin = latency.call_seconds, latency.margin

    def __missing__(self, call: tuple[int, int]) -> float:
        self[call] = seconds = self._predict(*call)
        if not seconds < inf:
            raise ValueError(f"predicted {seconds} seconds")
        return seconds

    def late(self, one: Waiting, now: float) -> bool:
        """Return whether a request is late even if it runs now and alone."""
        return now + self[one.rows, one.length] * self.margin > one.deadline


def _longest(
    lane: Lane, ahead: Sequence[Waiting], costs: _Costs, now: float, bounds: Bounds
) -> Set[int]:
    """Return who is left aside of those `ahead`, so that as many as can be are in time.

    In order of urgency: while they do not all end in time, in calls that they share, what takes
    longest is left aside. Nobody is for one of a lower priority, or where all are of one length.
    """
    if lane[0][0] == lane[-1][0]:
        return frozenset()
    head, most = ahead[0], max(1, bounds.rows // ahead[0].rows)
    shared, few = min(_AHEAD, len(lane), most), min(_SHARED, most)
    each = costs[shared * head.rows, head.length] / shared
    if costs[few * head.rows, head.length] < few * _NEARLY * each:
        shared = few
    if now + _AHEAD * costs[shared * lane[-1][1].rows, lane[-1][0]] / shared < head.deadline:
        return frozenset()  # there is time for all
    horizon = [one for one in ahead if one.priority == head.priority]
    in_turn = costs.margin / shared / bounds.actors
    takes = [costs[shared * one.rows, one.length] * in_turn for one in horizon]
    kept, aside = list[tuple[float, int]](), set[int]()  # a heap: what takes longest first
    end, least = now, min(takes)
    for one, seconds in zip(horizon, takes, strict=True):
        if seconds > least and costs.late(one, now):
            aside.add(one.sequence)
            continue
        heapq.heappush(kept, (-seconds, one.sequence))
        end += seconds
        room = _ROOM * (one.deadline - now) if aside else 0.0
        while end > one.deadline - room and kept and -kept[0][0] > least:
            longest, sequence = heapq.heappop(kept)
            aside.add(sequence)
            end += longest
    return aside


class Offer(NamedTuple):
    """The call that a model would run next, as one among several that want the same processor."""

    due: float  # the earliest deadline in it
    seconds: float  # predicted
    worth: float  # of its requests, by what those of their model count


def choose(offers: Sequence[Offer], now: float) -> int:
    """Return the index of the call that runs first on a processor for which several models wait.

    In order of deadlines, without those that have to be late: while the calls do not all end in
    time, the one that is worth least per second is left out.

    Source: Moore 1968, "An n job, one machine sequencing algorithm", with weights.
    """
    order = sorted(range(len(offers)), key=lambda index: offers[index].due)
    worth = [offer.worth / (offer.seconds or 1e-9) for offer in offers]
    kept, end = list[int](), now
    for index in order:
        kept.append(index)
        end += offers[index].seconds
        if end > offers[index].due:
            kept.remove(least := min(kept, key=worth.__getitem__))
            end -= offers[least].seconds
    return kept[0] if kept else order[0]


class _Call(NamedTuple):
    """A call that has grown."""

    members: list[Waiting]
    due: float  # the earliest deadline
    seconds: float  # predicted
    short_of_time: bool = False  # it would have grown further, but for `due`


_Other = tuple[Waiting, float, float]  # who may join a call, and seconds; see `_others`


@dataclass(slots=True)
class _Situation:
    """What a decision is made from; `first`: index of the most urgent who can be answered."""

    queue: Queue
    costs: _Costs
    now: float
    bounds: Bounds
    first: int
    aside: Set[int]  # who neither leads nor joins a call now
    near: Sequence[Waiting]  # of the first `_AHEAD`, who are not left aside: the others are none

    def able(self, at: int) -> Waiting:
        """Return who is in place `at` of urgency among those who are not left aside."""
        behind = at - len(self.near)
        return self.near[at] if behind < 0 else self.queue.urgent[self.first + _AHEAD + behind]

    def lead(self, head: Waiting, gone: Set[int] = frozenset(), wait_seconds: float = 0) -> _Call:
        """Grow a call from `head` to both sides in order of length while it saves time.

        Nobody is let in who would make another, or be made, miss a deadline, who is more urgent
        than the head and so was given up, who is left aside or `gone`.
        """
        gone, costs = gone or self.aside, self.costs
        most_rows, most_elements = self.bounds.rows, self.bounds.elements or inf
        start, margin = self.now + wait_seconds, costs.margin
        members, rows, length, due = [head], head.rows, head.length, head.deadline
        seconds, short_of_time = costs[rows, length], False
        lane = self.queue.lanes[head.group]
        # Left of the head only shorter ones: those of its length that are more urgent are given up.
        shorter = bisect_left(lane, (length,)) if lane[0][0] < length else 0
        at = bisect_left(lane, (length, head), shorter)
        places = range(at + 1, len(lane)), range(shorter - 1, -1, -1)
        sides = [self._others(lane, side, head, gone) for side in places if side]
        nearest, skipped = [next(side, None) for side in sides], [0, 0]
        while rows < most_rows:
            best, best_saving, best_seconds, padded = None, 0.0, 0.0, length
            for side, neighbours in enumerate(sides):
                if best_saving and padded == length:
                    break  # who is shorter saves less than who is not padded
                while (neighbour := nearest[side]) is not None:
                    other, alone, apart = neighbour
                    joint, padded = rows + other.rows, max(length, other.length)
                    takes = costs[joint, padded]
                    fits = joint <= most_rows and joint * padded <= most_elements
                    if fits and (saving := seconds + apart - takes) <= 0:
                        nearest[side] = None  # those behind are longer, or padded more
                        break
                    end = start + takes * margin
                    if fits and end <= due and end <= other.deadline:
                        if saving > best_saving:
                            best, best_saving, best_seconds = side, saving, takes
                        break
                    if fits and start + alone <= other.deadline:  # else it is late whatever is done
                        short_of_time = True
                    # A call only grows: who may not join now never may, nor who is behind and takes
                    # as much. After some it is let be.
                    skipped[side] += 1 if other.rows > 1 or end > other.deadline else _MOST_SKIPPED
                    let_be = skipped[side] >= _MOST_SKIPPED
                    nearest[side] = None if let_be else next(neighbours, None)
            if best is None or (neighbour := nearest[best]) is None:
                break
            nearest[best] = next(sides[best], None)
            members.append(other := neighbour[0])
            rows, length, seconds = rows + other.rows, max(length, other.length), best_seconds
            due = min(due, other.deadline)
        return _Call(members, due, seconds, short_of_time)

    def _others(self, lane: Lane, places: range, head: Waiting, gone: Set[int]) -> Iterator[_Other]:
        """Yield who may join `head`, with what each takes alone, and in a call without it."""
        # The more wait, the likelier each finds others of its own length to share a call with.
        costs, peers = self.costs, min(_PEERS, len(lane))
        for place in places:
            one = lane[place][1]
            if one > head and one.sequence not in gone:
                alone = costs[one.rows, one.length]
                yield one, alone, min(alone, costs[peers * one.rows, one.length] / peers)

    def rest_fits(self, call: _Call) -> bool:
        """Return whether what `call` leaves behind can follow whole, with time to spare.

        Time to spare, since what arrives meanwhile will want the same.
        """
        gone = self.aside | {one.sequence for one in call.members}
        for index in range(self.first, len(self.queue)):
            if (waiting := self.queue.urgent[index]).sequence not in gone:
                follows = self.lead(waiting, gone, call.seconds)
                end = self.now + call.seconds + _SPARE * follows.seconds
                return end <= follows.due and not follows.short_of_time
        return True

    def give_up(self, call: _Call) -> tuple[_Call, list[Waiting]]:
        """Return the call that serves the most per second, and who is given up for it."""

        def worth(call: _Call, given_up: int) -> tuple[float, int, _Call]:
            return (len(call.members) - _DROP_COST * given_up) / call.seconds, -given_up, call

        best, low, high, short = worth(call, 0), 0, 4, True
        most = min(_MOST_GIVEN_UP, len(self.queue) - self.first - len(self.aside))
        while short or high - low > 1:  # gallop to where time is no longer short, then bisect
            at = high if short else (low + high) // 2
            still_short = False
            # Nobody is given up for those of a lower priority.
            if at < most and (head := self.able(at)).priority == self.near[0].priority:
                found = worth(self.lead(head), at)
                if len(found[2].members) > len(call.members):
                    best = max(best, found, key=lambda one: one[:2])
                still_short = found[2].short_of_time
            short = short and still_short
            low, high = (at, 2 * at if short else high) if still_short else (low, at)
        return best[2], [self.able(at) for at in range(-best[1])]
