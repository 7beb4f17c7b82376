"""What a machine that does other things too says of a time limit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Final

# At this distance half a minute in which others are busy spoils few tries, and an actor that each
# of them kills dies no more often in a minute than `actor.restart_limit` allows.
_PAUSE_SECONDS: Final = 12.0


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
