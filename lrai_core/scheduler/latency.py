"""What a call costs: predicted seconds for rows and length, from the measured profile.

With a length axis the model is `a + b rows x length + c rows x length^2` (calls, elements,
attention); without one it is linear between the measured row counts. What a call costs outside the
engine is learned from the answers, because coalescing saves that too.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Final

import numpy as np

from lrai_core.artifact import LatencyPoint

_UNKNOWN_SECONDS: Final = 1e-3
_DOWN, _UP = 0.2, 0.005


class LatencyModel:
    """Predicted time of one call of one variant."""

    def __init__(self, profile: Sequence[LatencyPoint]) -> None:
        self._by_rows: list[tuple[int, float]] = []
        self._terms: tuple[float, float, float] | None = None
        if any(point.length for point in profile):
            self._terms = _fit(profile)
        else:
            self._by_rows = sorted({point.rows: point.median_ms / 1e3 for point in profile}.items())
        self.overhead_seconds = 0.0

    def call_seconds(self, rows: int, length: int) -> float:
        """Return the predicted seconds of a call, engine and everything around it."""
        return self.engine_seconds(rows, length) + self.overhead_seconds

    def engine_seconds(self, rows: int, length: int) -> float:
        """Return the predicted seconds inside the engine for `rows` padded to `length`."""
        if self._terms is not None:
            fixed, linear, quadratic = self._terms
            elements = rows * length
            return fixed + linear * elements + quadratic * elements * length
        return self._interpolate(rows)

    def observe(self, total_seconds: float, engine_seconds: float) -> None:
        """Learn what a call costs outside the engine from one that was answered."""
        around = max(0.0, total_seconds - engine_seconds)
        if self.overhead_seconds == 0.0:
            self.overhead_seconds = around
        # What else the machine did meanwhile is not the cost of a call, so the estimate follows the
        # cheap calls quickly and the dear ones slowly.
        weight = _DOWN if around < self.overhead_seconds else _UP
        around = min(around, 2 * self.overhead_seconds)
        self.overhead_seconds += weight * (around - self.overhead_seconds)

    def _interpolate(self, rows: int) -> float:
        points = self._by_rows
        if not points:
            return _UNKNOWN_SECONDS * rows
        if len(points) == 1:
            return points[0][1] * rows / points[0][0]
        at = min(max(bisect.bisect_left(points, (rows, 0.0)), 1), len(points) - 1)
        (rows_0, seconds_0), (rows_1, seconds_1) = points[at - 1], points[at]
        slope = (seconds_1 - seconds_0) / (rows_1 - rows_0)
        return max(seconds_0 + slope * (rows - rows_0), min(seconds_0, seconds_1) * 0.5)


def _fit(profile: Sequence[LatencyPoint]) -> tuple[float, float, float]:
    """Return non-negative coefficients that minimise the relative squared error."""
    seconds = np.array([point.median_ms / 1e3 for point in profile])
    elements = np.array([float(point.rows * point.length) for point in profile])
    lengths = np.array([float(point.length) for point in profile])
    terms = np.stack([np.ones_like(elements), elements, elements * lengths], axis=1)
    weighted = terms / seconds[:, None]
    active = [0, 1, 2]
    while active:
        found = np.linalg.lstsq(weighted[:, active], np.ones(len(seconds)), rcond=None)[0]
        if (found >= 0).all():
            result = [0.0, 0.0, 0.0]
            for index, value in zip(active, found, strict=True):
                result[index] = float(value)
            return result[0], result[1], result[2]
        active.pop(int(np.argmin(found)))
    return float(np.median(seconds)), 0.0, 0.0
