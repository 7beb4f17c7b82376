"""What is compared: outputs after their map, row by row."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

import numpy as np

from lrai_core.protocol import Array, OutputMap, TensorSpec

FAR: Final = sys.float_info.max  # infinity, but for JSON, which has none


def mapped(output: Array, output_map: OutputMap) -> Array:
    """Return an output in float64 after its map, which works along the last axis."""
    values = output.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        if output_map == "softmax":
            powers = np.exp(values - values.max(axis=-1, keepdims=True))
            return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
        if output_map == "l2_normalised":
            norms = np.linalg.norm(values, axis=-1, keepdims=True)
            return np.asarray(values / np.maximum(norms, 1e-30))
    return values


def difference(f: Sequence[Array], g: Sequence[Array], specs: Sequence[TensorSpec]) -> float:
    """Return the largest absolute element difference of one row after each output's map.

    A shape that differs, a NaN on one side only, and a map that is undefined where the outputs
    differ, count as infinity.
    """
    worst = 0.0
    for a, b, spec in zip(f, g, specs, strict=True):
        if a.dtype.kind in "OSU" or b.dtype.kind in "OSU":
            if not np.array_equal(a, b):
                return FAR
            continue
        if a.shape != b.shape:
            return FAR
        x, y = mapped(a, spec.output_map), mapped(b, spec.output_map)
        with np.errstate(invalid="ignore", over="ignore"):
            gap = np.where((x == y) | (np.isnan(x) & np.isnan(y) & _same(a, b)), 0.0, np.abs(x - y))
        worst = max(worst, float(np.nan_to_num(gap, nan=FAR, posinf=FAR).max(initial=0.0)))
    return worst


def _same(a: Array, b: Array) -> Array:
    return np.asarray((a == b) | ((a != a) & (b != b)))  # NaN alone differs from itself


def agreement(f: Sequence[Array], g: Sequence[Array], specs: Sequence[TensorSpec]) -> bool:
    """Return whether one row of g says the same as f, in the sense of each output's map."""
    return all(
        a.shape == b.shape and _agrees(a, b, spec.output_map)
        for a, b, spec in zip(f, g, specs, strict=True)
    )


MEASURES: dict[OutputMap, str] = {
    "raw": "relative error <= 1 %",
    "softmax": "same top-1",
    "l2_normalised": "cosine >= 0.99",
}


def _agrees(a: Array, b: Array, output_map: OutputMap) -> bool:
    if (same := np.array_equal(a, b)) or a.dtype.kind in "OSU":
        return same
    x, y = a.astype(np.float64), b.astype(np.float64)
    if output_map == "softmax":
        sound = np.isfinite(y) | (x == y)  # a masked class is minus infinity on both sides
        return bool((x.argmax(axis=-1) == y.argmax(axis=-1)).all() and sound.all())
    if output_map == "l2_normalised":
        cosine = (mapped(a, output_map) * mapped(b, output_map)).sum(axis=-1)
        return bool(((cosine >= 0.99) | (x == y).all(axis=-1)).all())  # a zero vector has none
    with np.errstate(invalid="ignore", over="ignore"):
        return bool(np.linalg.norm(x - y) <= 0.01 * np.linalg.norm(x))
