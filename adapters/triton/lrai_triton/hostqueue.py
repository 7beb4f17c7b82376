"""What Triton does not tell: how long requests have waited in its queue before a list was taken.

The queue is emptied by every list that is not full, in order of arrival. So what comes in the next
one has come since, evenly; and nobody has waited where the stub had nothing to do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Final

from lrai_triton.settings import Settings

_WAY_SECONDS: Final = 1e-3  # of a request into the stub, and of its answer out of the server
_IDLE_SECONDS: Final = 2e-3  # after an answer without a list: the queue was empty


class HostQueue:
    """Triton's queue of a model with one instance, as far as its stub can tell.

    Attributes:
        ran: Seconds that the longest list before the last one took, halved by each that followed:
            Triton makes up some ahead.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        """See it through lists of at most `max_batch_size` rows."""
        self._size, self._alone = settings.size, settings.instances == 1 and settings.size > 1
        self._usual_ms, self._clock = settings.asked.latency_slo_ms, clock
        self._since = self._answered = -math.inf
        self.ran, self._took = 0.0, math.inf
        self._largest = 1  # rows of a request in the last list

    def take(self, timeouts_us: Sequence[int], rows: Sequence[int] = ()) -> list[float | None]:
        """Return the ms that are left for each request of a list; None where nothing is said.

        Args:
            timeouts_us: Of each; 0 for none.
            rows: Of each, one by default: a list is full by its rows.
        """
        now, count = self._clock(), len(timeouts_us)
        self.ran, self._took = max(self._answered - self._took, self.ran / 2), now
        idle = now - self._answered > _IDLE_SECONDS
        since = now if idle or not self._alone else self._since
        before, self._largest = self._largest, max(rows, default=1)
        if idle or (sum(rows) or count) + max(before, self._largest) <= self._size:
            self._since = now
        given_ms = [us / 1e3 if us else self._usual_ms for us in timeouts_us]
        waited = [(now - since) * (1 - index / count) + _WAY_SECONDS for index in range(count)]
        return [ms - 1e3 * s if ms else None for ms, s in zip(given_ms, waited, strict=True)]

    def answered(self) -> None:
        """Take note that a list was answered."""
        self._answered = self._clock()
