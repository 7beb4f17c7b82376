"""What a machine that does other things too says of a time limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median


def until_quick(taken: Sequence[float], seconds: float, most: int = 5) -> Iterator[None]:
    """Yield for each try, until the median of an odd number is no longer.

    A single one may meet what else this machine does.

    Args:
        taken: Seconds of each, to which every try adds its own.
        seconds: That it may take.
        most: Tries.
    """
    for count in range(1, most + 1):
        yield
        if count % 2 and median(taken) <= seconds:
            return
    raise AssertionError(f"{taken} s, and not {seconds}")
