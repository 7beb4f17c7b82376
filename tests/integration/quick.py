"""What a machine that does other things too says of a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Final

# At this distance half a minute in which others are busy spoils few tries, and an actor that each
# of them kills dies no more often in a minute than `actor.restart_limit` allows.
_PAUSE_SECONDS: Final = 12.0
_STALL_SECONDS: Final = 0.5  # later than that a thread is not merely because others have work


def until_quick(
    taken: Sequence[float], seconds: float, *, least: int = 1, most: int = 7
) -> Iterator[None]:
    """Yield for each try, until the median of an odd number is no longer.

    A single one may meet what else this machine does, so the next ones keep away from it.

    Args:
        taken: Seconds of each, to which every try adds its own.
        seconds: That it may take.
        least: Tries that are made in any case, one after the other.
        most: Tries.
    """
    for count in range(1, most + 1):
        if count > least:
            time.sleep(_PAUSE_SECONDS)
        yield
        if count >= least and count % 2 and median(taken) <= seconds:
            return
    raise AssertionError(f"{taken} s, and not {seconds}")


class Stalls:
    """When this machine stood still, as a thread notes that does nothing but sleep a little."""

    def __init__(self) -> None:
        self._found, self._looked = list[tuple[float, float]](), time.monotonic()
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Stalls:
        self._looked = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def between(self, begun: float, ended: float) -> float:
        """Return for how many of the seconds between two moments it stood still."""
        with self._lock:  # the last may have just ended, and not be noted yet
            found = [*self._found, (self._looked, time.monotonic())]
        longer = [stall for stall in found if stall[1] - stall[0] > _STALL_SECONDS]
        return sum(max(0.0, min(end, ended) - max(start, begun)) for start, end in longer)

    def _look(self) -> None:
        while not self._over.wait(0.02):
            with self._lock:
                before, self._looked = self._looked, time.monotonic()
                if self._looked - before > _STALL_SECONDS:
                    self._found.append((before, self._looked))
