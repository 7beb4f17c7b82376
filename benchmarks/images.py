"""EfficientNet-Lite0 as an ONNX file: the image model that speed is measured with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import numpy as np
from onnx import TensorProto, helper

from benchmarks.models import _Graph

# Repeats, kernel, stride, expansion, channels: of EfficientNet-B0, which Lite0 keeps.
_STAGES: Final = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD, _CLASSES = 32, 1_280, 1_000


def efficientnet_lite0_onnx(path: Path, seed: int = 0) -> Path:
    """Write EfficientNet-Lite0 with random weights (about 19 MB) to `path`, and return `path`.

    Batch normalisation is folded into the convolutions, as exporters do. Input: `image`, float32
    [batch, 3, 224, 224]. Output: `logits`, float32 [batch, 1000].

    Source: Tan and Le 2019 (arXiv:1905.11946), table 1; Lite0 has neither squeeze-and-excitation
    nor swish, but ReLU6.
    """
    graph, random = _Graph(), np.random.default_rng(seed)
    limits = graph.scalar("zero", 0.0), graph.scalar("six", 6.0)

    def convolution(
        value: str, name: str, inputs: int, outputs: int, kernel: int, stride: int, *, groups: int
    ) -> str:
        shape = (outputs, inputs // groups, kernel, kernel)
        scale = math.sqrt(2 / (shape[1] * kernel * kernel))
        weight = random.standard_normal(shape, np.float32) * np.float32(scale)
        return graph.node(
            "Conv",
            value,
            graph.constant(f"{name}.weight", weight),
            graph.constant(f"{name}.bias", np.zeros(outputs, np.float32)),
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
            group=groups,
        )

    def relu6(value: str) -> str:
        return graph.node("Clip", value, *limits)

    value = relu6(convolution("image", "stem", 3, _STEM, 3, 2, groups=1))
    channels = _STEM
    for stage, (repeats, kernel, stride, expansion, outputs) in enumerate(_STAGES):
        for repeat in range(repeats):
            name, entering, width = f"blocks.{stage}.{repeat}", value, channels * expansion
            if expansion > 1:
                value = relu6(convolution(value, f"{name}.expand", channels, width, 1, 1, groups=1))
            step = stride if repeat == 0 else 1
            value = convolution(
                value, f"{name}.depthwise", width, width, kernel, step, groups=width
            )
            value = convolution(relu6(value), f"{name}.project", width, outputs, 1, 1, groups=1)
            if step == 1 and channels == outputs:
                value = graph.node("Add", value, entering)
            channels = outputs
    value = relu6(convolution(value, "head", channels, _HEAD, 1, 1, groups=1))
    value = graph.node("Flatten", graph.node("GlobalAveragePool", value), axis=1)
    weight = random.standard_normal((_HEAD, _CLASSES), np.float32) * np.float32(0.02)
    bias = graph.constant("classifier.bias", np.zeros(_CLASSES, np.float32))
    weights = graph.constant("classifier.weight", weight)
    graph.node("Gemm", value, weights, bias, output="logits")
    return graph.save(
        path,
        inputs=[helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 224, 224])],
        outputs=[helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", _CLASSES])],
    )
