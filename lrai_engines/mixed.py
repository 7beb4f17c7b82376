"""Several schemes in one model: what a matrix does to the outputs says which of them it gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

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


class Step(NamedTuple):
    """Operators that may have another precision, all at once.

    Attributes:
        names: Of those; what is closer already stays so.
        level: Place of their precision among the `harms`.
        time: What it adds to a call, in any unit.
    """

    names: Sequence[str]
    level: int
    time: float


def cheapest(
    harms: Sequence[Mapping[str, float]], steps: Sequence[Step], share: float
) -> dict[str, int]:
    """Return the level of each operator, with which all together do this share less harm.

    One after another that step is taken which saves most harm for the time that it adds.

    Args:
        harms: What each operator does to the outputs, as a mean square, by level: with the first
            all begin, and the harm is a share of that. What one lacks does none.
        steps: From one level to another.
        share: 0 or more, below 1.
    """
    found = dict.fromkeys(harms[0], 0)
    allowed = (1 - share) * sum(harms[0].values())

    def harm(name: str, level: int) -> float:
        return harms[level].get(name, 0.0)

    def saved(step: Step) -> float:
        lower = [name for name in step.names if found[name] < step.level]
        return sum(harm(n, found[n]) - harm(n, step.level) for n in lower) / step.time

    while sum(harm(*one) for one in found.items()) > allowed:
        if saved(best := max(steps, key=saved)) <= 0:
            break
        found |= {name: max(found[name], best.level) for name in best.names}
    return found


def worst(harms: Mapping[str, float], work: Mapping[str, float], share: float) -> set[str]:
    """Return what makes up this share of the harm, by what does most for its work."""
    left, found = share * sum(harms.values()), set[str]()
    for name in sorted(harms, key=lambda one: -harms[one] / work.get(one, 1)):
        if left <= 0:
            break
        found.add(name)
        left -= harms[name]
    return found
