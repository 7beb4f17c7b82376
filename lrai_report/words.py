"""How figures are written, and which are none."""

from __future__ import annotations

import math
from typing import Final

from lrai_core import UsageError
from lrai_core.verifier.spec import FAR

FEW: Final = 100  # requests a round: a single one moves a share of them by a point


def figure(value: float, digits: int = 3) -> str:
    """Return a figure with so many digits, and large ones whole, without a power of ten."""
    return f"{value:,.0f}" if 10 ** (digits - 1) <= abs(value) < 1e15 else f"{value:.{digits}g}"


def distance(gap: float, digits: int = 2) -> str:
    """Return a difference with so many digits; of texts and NaN there is none."""
    return f"{gap:.{digits}g}" if gap < FAR else "not comparable"


def check_numbers(**options: float | None) -> None:
    """Refuse NaN, which older typers find in every range.

    Raises:
        UsageError: One is NaN.
    """
    for name, value in options.items():
        if value is not None and math.isnan(value):
            raise UsageError(f"--{name.replace('_', '-')} is no number: {value}")
