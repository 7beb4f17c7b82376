"""What a machine that does other things too says of a time limit."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Final

# At this distance half a minute in which others are busy spoils few tries, and an actor that each
# of them kills dies no more often in a minute than `actor.restart_limit` allows.
_PAUSE_SECONDS: Final = 12.0
_STALL_SECONDS: Final = 0.5  # later than that a thread is not merely because others have work
_BARE_START: Final = (sys.executable, "-c", "import onnxruntime")
_START_SECONDS: Final = 0.5  # it takes less on a quiet machine, also beside what a test does


def until_quick(
    taken: Sequence[float],
    seconds: float,
    *,
    least: int = 1,
    most: int = 7,
    spoiled: Sequence[bool] = (),
    starts: list[float] | None = None,
    start_seconds: float = _START_SECONDS,
) -> Iterator[None]:
    """Yield for each try, until the median of an odd number is no longer than it may be.

    A single one may meet what else this machine does, so the next ones keep away from it. And
    where others are busy all the time, it takes as much longer as a bare start of a process does,
    of which most of what is timed consists.

    Args:
        taken: Seconds of each, to which every try adds its own.
        seconds: That it may take on a quiet machine.
        least: Tries that are made in any case, one after the other.
        most: Tries.
        spoiled: Whether something else was wrong in a try, which fewer than half may be.
        starts: Gets the seconds of a bare start after each try.
        start_seconds: Of a bare start on a machine so slow that `seconds` begin to be too few.
    """
    starts = [] if starts is None else starts
    for count in range(1, most + 1):
        if count > least:
            time.sleep(_PAUSE_SECONDS)
        yield
        begun = time.monotonic()
        subprocess.run(_BARE_START, check=True)
        starts.append(time.monotonic() - begun)
        quick = median(taken) <= scaled(seconds, starts, start_seconds) and 2 * sum(spoiled) < count
        if count >= least and count % 2 and quick:
            return
    raise AssertionError(f"{taken} s, and not {seconds}; bare starts: {starts} s; {spoiled}")


def scaled(seconds: float, starts: Sequence[float], start_seconds: float = _START_SECONDS) -> float:
    """Return what may take so many seconds on a quiet machine where bare starts took those."""
    return seconds * max(1.0, median(starts) / start_seconds)


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
