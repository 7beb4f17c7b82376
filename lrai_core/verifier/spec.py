"""What is compared: outputs after their map, row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, Context
from typing import Final

import numpy as np
from msgspec.structs import replace

from lrai_core.protocol import Array, OutputMap, TensorSpec

_MASK: Final = 1e4  # in size, and the same on both sides, what stands for minus infinity
FAR: Final = float(np.finfo(np.float64).max)  # infinity, but for JSON, which has none


def mapped(output: Array, output_map: OutputMap) -> Array:
    """Return an output in float64 after its map, which works along the last axis.

    Of a single element a map would leave nothing, or its sign: it stays as it is.
    """
    values = output.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        if output_map == "softmax" and values.shape[-1:] not in ((), (1,)):
            values = np.exp(values - values.max(axis=-1, keepdims=True, initial=-np.inf))
            values /= values.sum(axis=-1, keepdims=True)
        elif output_map == "l2_normalised" and values.shape[-1:] not in ((), (1,)):
            size = np.linalg.norm(values, axis=-1, keepdims=True)
            values /= np.where(np.isfinite(size), np.maximum(size, 1e-30), np.nan)
    return values


def difference(f: Sequence[Array], g: Sequence[Array], specs: Sequence[TensorSpec]) -> float:
    """Return the largest absolute element difference of one row after each output's map.

    A shape that differs, a NaN on one side only, a map that is undefined where the outputs differ,
    and integers that only float64 takes for the same, count as infinity.
    """
    worst = 0.0
    for a, b, spec in zip(f, g, specs, strict=True):
        if a.shape != b.shape or a.dtype.kind in "OSU" or b.dtype.kind in "OSU":
            worst = max(worst, 0.0 if np.array_equal(a, b) else FAR)
            continue
        with np.errstate(invalid="ignore", over="ignore"):
            x, y = (mapped(one, _to_apply(spec.output_map, np.atleast_1d(a))) for one in (a, b))
            if math.isfinite(most := float(np.abs(x - y).max(initial=0.0))):
                alike = (a != b) & (x == y) if a.dtype.kind in "iu" else np.zeros(1)
                blind = alike.any() and (not most or spec.output_map in ("raw", "derived"))
                worst = max(worst, FAR if blind else most)
                continue
            same = (a == b) | ((a != a) & (b != b))  # NaN alone differs from itself
            gap = np.where((x == y) | (np.isnan(x) & np.isnan(y) & same), 0.0, np.abs(x - y))
        worst = max(worst, float(np.nan_to_num(gap, nan=FAR, posinf=FAR).max(initial=0.0)))
    return worst


def _to_apply(output_map: OutputMap, reference: Array) -> OutputMap:
    """Return the map, or `raw` where the reference is probabilities, as from a graph's own softmax.

    Another softmax would leave next to nothing of what they differ by. They add up to 1 but for the
    rounding of half precision: of two scores some add up to about 1, too.
    """
    total = reference.sum(axis=-1, dtype=np.float64) if output_map == "softmax" else 0.0
    return "raw" if np.all(abs(total - 1) <= 1e-3) and np.all(reference >= 0) else output_map


def raw_as(output_map: OutputMap, specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Return the specs with this map in the place of `raw`."""
    return [replace(s, output_map=output_map) if s.output_map == "raw" else s for s in specs]


def agreement(f: Sequence[Array], g: Sequence[Array], specs: Sequence[TensorSpec]) -> bool:
    """Return whether one row of g says the same as f, in the sense of each output's map."""
    return all(_agrees(a, b, spec.output_map) for a, b, spec in zip(f, g, specs, strict=True))


MEASURES: dict[OutputMap, str] = {"raw": "relative error <= 1 %", "softmax": "same top-1"}
MEASURES["l2_normalised"] = "cosine >= 0.99"


def _agrees(a: Array, b: Array, output_map: OutputMap) -> bool:
    if (same := np.array_equal(a, b)) or a.shape != b.shape or a.dtype.kind in "OSUbi":
        return same  # a label, or the number of one; pixels may differ
    x, y = a.astype(np.float64), b.astype(np.float64)
    if output_map == "derived":  # what it derives from is judged
        return bool((np.isfinite(y) | (x == y)).all())
    output_map = "raw" if a.shape[-1:] in ((), (1,)) else output_map  # as `mapped`
    if output_map == "softmax":
        sound = np.isfinite(y) | (x == y)  # a masked class is minus infinity on both sides
        return bool((x.argmax(axis=-1) == y.argmax(axis=-1)).all() and sound.all())
    if output_map == "l2_normalised":
        cosine = (mapped(a, output_map) * mapped(b, output_map)).sum(axis=-1)
        return bool(((cosine >= 0.99) | (x == y).all(axis=-1)).all())  # a zero vector has none
    with np.errstate(invalid="ignore", over="ignore"):  # infinite on both sides is no difference
        masked = ~np.isfinite(x) | ((x == y) & (abs(x) >= _MASK))  # which says nothing of the rest
        gap, size = np.where(x == y, 0.0, x - y), np.where(masked, 0.0, x)
        # Of channels each: beside boxes in pixels no score of a detector would count. They lie
        # along the first axis or the last. One of noise alone is as near as a millionth of the
        # largest; along the longer axis, which may be that of places, as the usual one.
        wide = [axis for axis in range(a.ndim) if a.shape[axis] > 1]
        for part in {wide[0], wide[-1]} if len(wide) > 1 else {-1}:
            over = tuple(axis for axis in range(a.ndim) if axis != part)
            far, most = (np.sqrt((one * one).sum(axis=over)) for one in (gap, size))
            longer = len(wide) > 1 and a.shape[part] > min(a.shape[axis] for axis in wide)
            least = np.median(most) if longer else 1e-4 * np.max(most)
            if not (far <= 0.01 * np.maximum(most, least)).all():
                return False
        return True


def round_up(value: float, digits: int = 2) -> float:
    """Return `value` rounded up to `digits` significant digits."""
    return max(value, min(FAR, float(Context(digits, ROUND_CEILING).create_decimal(str(value)))))
