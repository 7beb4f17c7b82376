"""Networks that `models` writes as ONNX, in torch: with the weights of the files, as people do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import numpy_helper

Module = Callable[..., Any]  # of tensors, one per input

_EPSILON: Final = 1e-12  # of BERT's layer norms
_MASKED: Final = 10_000.0  # below all scores, as in the file


def mlp(source: Path) -> Module:
    """Return the layers of a file by `models.mlp_onnx`."""
    import torch
    from torch import nn

    tables, layers = _tables(source), list[nn.Module]()
    for index in range(len(tables) // 2):
        weight, bias = (tables[f"layers.{index}.{name}"] for name in ("weight", "bias"))
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def encoder(source: Path) -> Module:
    """Return the sentence encoder of a file by `models.encoder_onnx`."""
    from torch.nn import functional

    tables = _tables(source)
    for name, table in tables.items():  # there a product's right side, here a layer's weight
        if name.startswith("encoder.") and table.ndim == 2:
            tables[name] = table.T.contiguous()
    heads = int(tables["split_heads"][2])
    count = sum(name.endswith("attention.self.query.weight") for name in tables)
    words, positions = (tables[f"embeddings.{of}_embeddings.weight"] for of in ("word", "position"))

    def dense(name: str, x: Any) -> Any:
        return functional.linear(x, tables[f"{name}.weight"], tables[f"{name}.bias"])

    def norm(name: str, x: Any) -> Any:
        weight, bias = tables[f"{name}.weight"], tables[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias, _EPSILON)

    def attention(name: str, x: Any, bias: Any) -> Any:
        query, key, value = (
            dense(f"{name}.{part}", x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return mixed.transpose(1, 2).flatten(2)

    def encode(ids: Any, mask: Any) -> Any:
        bias = (mask[:, None, None, :] - 1.0) * _MASKED
        hidden = functional.embedding(ids, words) + positions[: ids.shape[1]]
        hidden = norm("embeddings.LayerNorm", hidden)
        for name in (f"encoder.layer.{index}" for index in range(count)):
            mixed = attention(f"{name}.attention.self", hidden, bias)
            mixed = dense(f"{name}.attention.output.dense", mixed)
            hidden = norm(f"{name}.attention.output.LayerNorm", mixed + hidden)
            grown = functional.gelu(dense(f"{name}.intermediate.dense", hidden))
            grown = dense(f"{name}.output.dense", grown)
            hidden = norm(f"{name}.output.LayerNorm", grown + hidden)
        there = mask[..., None].float()
        mean = (hidden * there).sum(1) / there.sum(1).clamp(min=1e-9)
        return functional.normalize(mean, dim=-1)

    return encode


def _tables(source: Path) -> dict[str, Any]:
    import torch

    graph = onnx.load(source).graph
    return {
        table.name: torch.from_numpy(numpy_helper.to_array(table).copy())
        for table in graph.initializer
    }
