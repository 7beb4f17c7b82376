"""Charts of block characters: lines of pieces of text with their styles."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lrai_report.words import figure

_RISING, _GROWING = " ▁▂▃▄▅▆▇█", " ▏▎▍▌▋▊▉█"
_PANEL_ROWS: Final = 4  # the lower half is within the deadline
MARGIN: Final = 12  # columns, for names

Curve = NDArray[np.float64]  # a value per column
Line = list[tuple[str, str]]  # text, style


def bar_line(name: str, share: float, width: int) -> Line:
    """Return a bar of `share` of the width, and the share."""
    eighths = round(share * width * 8)
    drawn = "█" * (eighths // 8) + _GROWING[eighths % 8].strip()
    return [(_label(name), ""), (drawn.ljust(width), "green"), (f" {share:6.1%}", "")]


def load_line(load: Curve) -> Line:
    """Return a column per value, in proportion to the largest."""
    blocks = "".join(_RISING[math.ceil(value / load.max() * 8)] for value in load)
    return [(_label("requests"), ""), (blocks, "cyan")]


def panel(name: str, heights_ms: Curve, deadline_ms: float) -> list[Line]:
    """Return lines in which each value is a column, cut at twice the deadline; NaN is a gap."""
    levels = [
        0 if math.isnan(value) else math.ceil(min(value / (2 * deadline_ms), 1) * _PANEL_ROWS * 8)
        for value in heights_ms
    ]
    middle = _PANEL_ROWS // 2
    labels = {_PANEL_ROWS - 1: name, middle: f"{figure(deadline_ms)} ms"}
    lines: list[Line] = [[]]  # apart from what is above
    for row in reversed(range(_PANEL_ROWS)):
        line = [(_label(labels.get(row, "")), "")]
        for level in levels:
            block = _RISING[max(0, min(level - 8 * row, 8))]
            if row == middle and block == " ":
                line.append(("_", "dim"))
            else:
                line.append((block, "green" if row < middle else "red"))
        lines.append(line)
    return lines


def _label(name: str) -> str:
    return f"{name:<{MARGIN}}"
