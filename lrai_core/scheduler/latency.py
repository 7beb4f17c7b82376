"""What a call costs: predicted seconds for rows and length, from the measured profile and online.

With a length axis the profile is fitted by `a + b e + c e x length` of e = rows x length elements
(calls, elements, attention), but for calls that somebody has named, which take what was measured;
without one it is linear between the measured row counts. From the answers corrections are learned,
`scale x profile + fixed`, and `grown x e^2` with a length axis: a machine is seldom as fast as when
it was measured, lengths may be others, and large calls outgrow the caches that calls of one shape
after the other keep warm. Apart from them it is learned what a call costs outside the engine,
because coalescing saves that too.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from statistics import median_low
from typing import Final

import numpy as np

from lrai_core.artifact import LatencyPoint

_UNKNOWN_SECONDS: Final = 1e-3
_LEAST_SECONDS: Final = 1e-7
_MOST_KNOWN: Final = 1 << 14
_DOWN, _UP = 0.2, 0.005
_MEMORY: Final = 0.98  # weight of a call after the next one: about fifty count
_FADE: Final = 0.99  # what is left of it for each call that another variant takes
# Weight of the profile at first, of two calls, which fades like that of a call; see `_normal`.
_PRIOR: Final = (2.0, 0.0, 2.0, 2.0, 0.0, 0.0, 0.0, 2.0, 0.0)
_RIDGE: Final = 0.1  # what stays of it, so that calls of one size only still have a solution
_SHIFT: Final = 0.1  # mean relative error of late that means another speed
_SHIFT_CALLS: Final = 6.0  # that many calls decide what is "of late"
_MOST_WRONG: Final = 1.0  # of one call's relative error: a pause of the machine is no speed
_CAUTION: Final = 0.5  # standard deviations between prediction and what a deadline is held against


class LatencyModel:
    """Predicted time of a call, which goes to the variant that takes least for it.

    Attributes:
        overhead_seconds: What a call costs outside the engine.
        scale: How much slower than its profile the variant is that ran last.
        margin: Times a prediction, for a deadline to be held against it.
    """

    def __init__(self, *profiles: Sequence[LatencyPoint]) -> None:
        """Know of each variant what was measured; where nothing was, guess."""
        self._curves = [_Curve(profile) for profile in profiles]
        self.overhead_seconds, self.scale, self.margin = 0.0, 1.0, 1.0
        self._usual_length = median_low([point.length for point in profiles[0]] or [1])

    def call_seconds(self, rows: int, length: int) -> float:
        """Return the predicted seconds of a call, engine and everything around it."""
        return self.engine_seconds(rows, length) + self.overhead_seconds

    def engine_seconds(self, rows: int, length: int) -> float:
        """Return the predicted seconds inside the engine for `rows` padded to `length`."""
        return min([curve.seconds(rows, length) for curve in self._curves])

    def alone_seconds(self) -> float:
        """Return the predicted seconds inside the engine for a row as long as rows usually are."""
        return self.engine_seconds(1, self._usual_length)

    def variant(self, rows: int, length: int) -> int:
        """Return the index of the variant that takes such a call."""
        return min((curve.seconds(rows, length), i) for i, curve in enumerate(self._curves))[1]

    def observe(
        self, rows: int, length: int, total_seconds: float | None, seconds: float, variant: int = 0
    ) -> bool:
        """Learn from a call that was answered; return whether the speed has just changed.

        Args:
            rows: Of the call.
            length: To which they were padded.
            total_seconds: From the dispatch; None where the actor was not idle then.
            seconds: Inside the engine.
            variant: That ran it.
        """
        if total_seconds is not None:
            around = max(0.0, total_seconds - seconds)
            # Of the first alone it is not known what it was.
            self.overhead_seconds = self.overhead_seconds or min(around, 50 * _UNKNOWN_SECONDS)
            # What else the machine did meanwhile is not the cost of a call, so the estimate follows
            # the cheap calls quickly and the dear ones slowly.
            gap = around - self.overhead_seconds
            self.overhead_seconds += (_DOWN if gap < 0 else _UP) * min(gap, self.overhead_seconds)
        one = self._curves[variant]
        for other in [curve for curve in self._curves if curve is not one]:
            other.fade()
        shifted = one.observe(rows, length, seconds)
        self.margin, self.scale = one.margin, one.scale
        return shifted


# Seconds of calls that are known; weights of calls, elements and attention; the most elements
# measured; seconds over their square.
_Fitted = tuple[Mapping[tuple[int, int], float], tuple[float, float, float], int, float]


class _Curve:
    """Predicted time of a call inside the engine of one variant."""

    def __init__(self, profile: Sequence[LatencyPoint]) -> None:
        if any(point.length for point in profile):
            # Of calls that it is compiled for others say nothing, nor they of others.
            named = {(p.rows, p.length): p.median_ms / 1e3 for p in profile if p.named}
            others = [point for point in profile if not point.named] or profile
            most, ms = max((point.rows * point.length, point.median_ms) for point in others)
            measured = partial(_by_length, (named, _fit(others), most, ms / 1e3 / most**2))
        else:
            known = {0: 0.0} | {point.rows: point.median_ms / 1e3 for point in profile}
            points = sorted((known if profile else known | {1: _UNKNOWN_SECONDS}).items())
            measured = partial(_by_rows, points)
        self._profile = lru_cache(_MOST_KNOWN)(measured)  # a plan asks for the same ones often
        self.scale, self._fixed, self._grown, self.margin = 1.0, 0.0, 0.0, 1.0
        self._unit = self._profile(1, 32)[0]
        # Sums over calls of 1, x, x^2, y, xy, z, xz, z^2, yz: x, y and z are the unit, the seconds
        # and the growth over the profile.
        self._normal, self._variance, self._drift = list(_PRIOR), 0.0, 0.0

    def seconds(self, rows: int, length: int) -> float:
        """Return what is predicted for `rows` padded to `length`."""
        profile, growth = self._profile(rows, length)
        return self.scale * profile + self._fixed + self._grown * growth

    def observe(self, rows: int, length: int, seconds: float) -> bool:
        """Learn what a call took; return whether the speed has just changed."""
        profile, growth = self._profile(rows, length)
        predicted = self.seconds(rows, length)
        clipped = max(-_MOST_WRONG, min(_MOST_WRONG, seconds / predicted - 1))
        self._drift += (clipped - self._drift) / _SHIFT_CALLS
        self._variance += (clipped * clipped - self._variance) / (4 * _SHIFT_CALLS)
        shifted = abs(self._drift) > max(_SHIFT, 3 * math.sqrt(self._variance / _SHIFT_CALLS))
        keep, self._drift = (0.2, 0.0) if shifted else (_MEMORY, self._drift)
        x, y, z = self._unit / profile, predicted * (1 + clipped) / profile, growth / profile
        seen = (1.0, x, x * x, y, x * y, z, x * z, z * z, y * z)
        self._normal = [keep * old + new for old, new in zip(self._normal, seen, strict=True)]
        self._solve()
        self.margin = 1 + _CAUTION * min(0.5, math.sqrt(self._variance))
        return shifted

    def fade(self) -> None:
        """Believe the profile a little more: another variant runs, of this one nothing is heard.

        What made it seem slow may be over; it is seen again once it seems worth it.
        """
        self._normal = [p + _FADE * (n - p) for p, n in zip(_PRIOR, self._normal, strict=True)]
        self._solve()

    def _solve(self) -> None:
        """Set the corrections by least squares of the relative errors, held to the profile.

        First the others as if `grown` were right, then that one: with the calls they converge.
        """
        n, sx, sxx, sy, sxy, sz, sxz, szz, syz = self._normal
        n, sxx, sy, szz = n + _RIDGE, sxx + _RIDGE, sy + _RIDGE, szz + _RIDGE
        sy, sxy = sy - self._grown * sz, sxy - self._grown * sxz
        fixed = max(0.0, (n * sxy - sx * sy) / (n * sxx - sx * sx))
        self.scale = max(0.01, (sy - fixed * sx) / n)
        self._fixed = fixed * self._unit
        self._grown = max(0.0, (syz - self.scale * sz - fixed * sxz) / szz)


def _by_length(fitted: _Fitted, rows: int, length: int) -> tuple[float, float]:
    """Return the seconds, and how they would grow: as those of the largest call at its size."""
    (named, (fixed, linear, quadratic), most, growth), elements = fitted, rows * length
    seconds = named.get((rows, length)) or fixed + linear * elements + quadratic * elements * length
    return max(_LEAST_SECONDS, seconds), growth * elements * min(elements, most)


def _by_rows(points: Sequence[tuple[int, float]], rows: int, _: int) -> tuple[float, float]:
    at = min(max(bisect.bisect_left(points, (rows, 0.0)), 1), len(points) - 1)
    (rows_0, seconds_0), (rows_1, seconds_1) = points[at - 1], points[at]
    least, share = min(seconds_0, seconds_1) * 0.5, (rows - rows_0) / (rows_1 - rows_0)
    return max(_LEAST_SECONDS, least, seconds_0 + share * (seconds_1 - seconds_0)), 0.0


def _fit(profile: Sequence[LatencyPoint]) -> tuple[float, float, float]:
    """Return non-negative coefficients that minimise the relative squared error."""
    seconds = np.array([point.median_ms / 1e3 for point in profile])
    terms = np.array([(1.0, p.rows * p.length, p.rows * p.length**2) for p in profile], float)
    weighted = terms / seconds[:, None]
    active = [0, 1, 2][: max(2, len(profile))]  # of few points there is no telling a square
    while active:
        found = np.linalg.lstsq(weighted[:, active], np.ones(len(seconds)), rcond=None)[0]
        if (found >= 0).all():
            known = dict(zip(active, found.tolist(), strict=True))
            return known.get(0, 0.0), known.get(1, 0.0), known.get(2, 0.0)
        active.pop(int(np.argmin(found)))
    return float(np.median(seconds)), 0.0, 0.0
