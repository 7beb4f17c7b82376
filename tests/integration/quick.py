"""What a machine that does other things too says of a time limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def until_quick(taken: Sequence[float], seconds: float, most: int = 5) -> Iterator[None]:
    """Yield for each try, until one is no longer: others may meet what else this machine does.

    Args:
        taken: Seconds of each, to which every try adds its own.
        seconds: That it may take.
        most: Tries.
    """
    for _ in range(most):
        yield
        if min(taken) <= seconds:
            return
    raise AssertionError(f"{taken} s, and not {seconds}")
