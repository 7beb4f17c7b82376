"""How figures are written."""

from __future__ import annotations


def figure(value: float, digits: int = 3) -> str:
    """Return a figure with so many digits, and large ones whole, without a power of ten."""
    return f"{value:,.0f}" if 10 ** (digits - 1) <= abs(value) < 1e15 else f"{value:.{digits}g}"
