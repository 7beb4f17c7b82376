"""Several schemes in one model: what a matrix does to the outputs says which of them it gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import onnx

from lrai_engines.blocks import INT8_ACTIVATIONS, nbits
from lrai_engines.quantize import Graph, Linear, Made, NothingToQuantize, linears, rewrite

_NARROW_BLOCK: Final = 32  # with 4 bits


def mixed_int4(model: onnx.ModelProto, harms: Mapping[str, float], *, share: float) -> Made:
    """Return `model` with 4 bits a weight, and 8 on the few matrices that harm most; in blocks.

    Blocks have 32 weights and a scale; of the largest weight, what a block's range ends at is
    where its squared error is least. It is what takes least memory, and seldom the fastest.

    Args:
        model: Weights inline, opset 13 or later. Not modified.
        harms: What int8 of each matrix does to the outputs, see `sensitivity.harms`.
        share: Of the harm, what is left in int8: 0 or more, below 1.

    Raises:
        NothingToQuantize: No operator qualifies, or all would be kept closer.
        CompileError: The opset is too old.

    Source: onnxruntime contrib operator MatMulNBits, version 1, `bits` 4.
    """
    sizes = {one.weight: one.matrix.size for one in linears(model)}
    closer = worst(harms, sizes, share)
    if len(closer) == len(harms) or bool(share) > len(closer):
        raise NothingToQuantize("no matrix, or every matrix would be kept closer")

    def emit(graph: Graph, layer: Linear) -> str:
        bits = 8 if layer.weight in closer else 4
        return nbits(graph, layer, _NARROW_BLOCK, INT8_ACTIVATIONS, bits)

    return rewrite(model, emit, harms)


def worst(harms: Mapping[str, float], work: Mapping[str, float], share: float) -> set[str]:
    """Return what makes up this share of the harm, by what does most for its work."""
    left, found = share * sum(harms.values()), set[str]()
    for name in sorted(harms, key=lambda one: -harms[one] / work.get(one, 1)):
        if left <= 0:
            break
        found.add(name)
        left -= harms[name]
    return found
