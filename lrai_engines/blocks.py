"""Weights of 8 or 4 bits with a scale per block, which onnxruntime multiplies as they are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

import numpy as np
import onnx

from lrai_engines.quantize import (
    BITS,
    INT4,
    Float32,
    Graph,
    Linear,
    Made,
    relative_error,
    rewrite,
    scale_of,
)

INT8_ACTIVATIONS: Final = 4  # MatMulNBits' accuracy_level
_SHRUNK: Final = (1.0, 0.95, 0.9, 0.85, 0.8)  # of its largest weight, where a block's range ends


def matmul_nbits(
    model: onnx.ModelProto,
    *,
    block_size: int,
    accuracy_level: int = INT8_ACTIVATIONS,
    harms: Mapping[str, float] | None = None,
) -> Made:
    """Return `model` with int8 weights and a scale per block of `block_size` along K.

    Args:
        model: Weights inline, opset 13 or later. Not modified.
        block_size: A power of two from 16 on. Up to 64 a row's bits were the same alone and in any
            batch (onnxruntime 1.32, AVX-512 VNNI); above, the last bits depend on the batch size.
        accuracy_level: 4 quantises activations to int8, per row and block, inside the kernel; 1
            keeps them in float32.
        harms: See `rewrite`.

    Raises:
        NothingToQuantize: No operator qualifies.
        CompileError: The opset is too old.

    Source: onnxruntime contrib operator MatMulNBits, version 1.
    """
    emit = partial(nbits, block_size=block_size, accuracy_level=accuracy_level)
    return rewrite(model, emit, harms)


def nbits(
    graph: Graph, layer: Linear, block_size: int, accuracy_level: int, bits: int = BITS
) -> str:
    """Write a layer as `matmul_nbits` does; return the scheme's name."""
    name, (k, n) = layer.weight, layer.matrix.shape
    if name not in graph.errors:
        blocks = np.pad(layer.matrix.T, ((0, 0), (0, -k % block_size)))
        blocks = blocks.reshape(n, -1, block_size)
        scale = scale_of(np.abs(blocks).max(axis=2, keepdims=True), 127)  # float32 [N, blocks, 1]
        scale = scale if bits == BITS else _narrow_scale(blocks)
        middle = 1 << (bits - 1)  # the kernel's zero point, where none is given
        integers = np.clip(np.rint(blocks / scale), -middle, middle - 1)
        graph.errors[name] = relative_error(blocks, integers * scale)
        packed = (integers + middle).astype(np.uint8)
        if bits < BITS:  # two in a byte, the first in its lower half
            packed = packed[..., ::2] | packed[..., 1::2] << bits
        graph.constant(f"{name}:packed", packed, np.uint8)
        graph.constant(f"{name}:scale", scale.reshape(n, -1), np.float32)
    graph.add(
        "MatMulNBits",
        [layer.activation, f"{name}:packed", f"{name}:scale"],
        layer.product,
        domain="com.microsoft",
        K=k,
        N=n,
        bits=bits,
        block_size=block_size,
        accuracy_level=accuracy_level,
    )
    return f"matmul_nbits_{block_size}" if bits == BITS else INT4


def _narrow_scale(blocks: Float32) -> Float32:
    """Return what a step of 4 bits is for each block [..., 1]: the one with the least error.

    The largest weight is eight steps off, on the side of which the integers have one more.
    """
    at = np.abs(blocks).argmax(axis=2, keepdims=True)
    whole = np.take_along_axis(blocks, at, axis=2) / np.float32(-8)
    tiny = np.abs(whole) < np.finfo(np.float32).tiny
    whole = np.where(tiny, np.float32(1), whole)
    best, least = whole, np.full_like(whole, np.inf)
    for share in _SHRUNK:
        scale = whole * np.float32(share)
        restored = np.clip(np.rint(blocks / scale), -8, 7) * scale
        error = np.square(blocks - restored).sum(axis=2, keepdims=True)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best
