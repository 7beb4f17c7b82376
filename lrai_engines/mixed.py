"""Several schemes in one model: what a matrix does to the outputs says which of them it gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx

from lrai_core.compiler.search import Quantized
from lrai_engines.blocks import INT8_ACTIVATIONS, nbits
from lrai_engines.quantize import (
    FLOAT32,
    Graph,
    Linear,
    NothingToQuantize,
    int8_per_row,
    linears,
    rewrite,
)

_BLOCK: Final = 64  # the largest whose bits do not depend on the batch
_NARROW_BLOCK: Final = 32  # with 4 bits


def mixed_int8(
    model: onnx.ModelProto, harms: Mapping[str, float], *, share: float, exact: float = 0.0
) -> tuple[onnx.ModelProto, list[Quantized]]:
    """Return `model` with a scale per row, but per block of 64 on the few matrices that harm most.

    Blocks are closer to float32 and slower. They go to the matrices that do the most harm for
    their size, as many as make up `share` of it; of these the first stay in float32.

    Args:
        model: Weights inline, opset 13 or later. Not modified.
        harms: What a scale per row does to the outputs, by matrix, see `sensitivity.harms`.
        share: Of the harm, above 0 and below 1.
        exact: Of the harm too: what is left in float32.

    Raises:
        NothingToQuantize: No operator qualifies, or all would be kept closer.
        CompileError: The opset is too old.
    """
    total, sizes = sum(harms.values()), {one.weight: one.matrix.size for one in linears(model)}
    closer, left = worst(harms, sizes, share), worst(harms, sizes, exact)
    if len(closer) in (0, len(harms)):
        raise NothingToQuantize("no matrix, or every matrix would be kept closer")

    def emit(graph: Graph, layer: Linear) -> str:
        graph.harms[layer.weight] = harms[layer.weight] / (total or 1)
        if layer.weight in left:
            graph.errors[layer.weight] = 0.0
            weight = graph.constant(f"{layer.weight}:float32", layer.matrix, np.float32)
            graph.add("MatMul", [layer.activation, weight], layer.product)
            return FLOAT32
        if layer.weight in closer:
            return nbits(graph, layer, _BLOCK, INT8_ACTIVATIONS)
        return int8_per_row(graph, layer)

    return rewrite(model, emit)


def mixed_int4(
    model: onnx.ModelProto, harms: Mapping[str, float], *, share: float
) -> tuple[onnx.ModelProto, list[Quantized]]:
    """Return `model` with 4 bits a weight, and 8 on the few matrices that harm most; in blocks.

    Blocks have 32 weights and a scale; of the largest weight, what a block's range ends at is
    where its squared error is least. It is what takes least memory, and seldom the fastest.

    Args:
        model: Weights inline, opset 13 or later. Not modified.
        harms: See `mixed_int8`.
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
        graph.harms[layer.weight] = harms[layer.weight] / (sum(harms.values()) or 1)
        bits = 8 if layer.weight in closer else 4
        return nbits(graph, layer, _NARROW_BLOCK, INT8_ACTIVATIONS, bits)

    return rewrite(model, emit)


def worst(harms: Mapping[str, float], work: Mapping[str, float], share: float) -> set[str]:
    """Return what makes up this share of the harm, by what does most for its work."""
    left, found = share * sum(harms.values()), set[str]()
    for name in sorted(harms, key=lambda one: -harms[one] / work.get(one, 1)):
        if left <= 0:
            break
        found.add(name)
        left -= harms[name]
    return found
