"""ONNX models of a few operators, for what the real ones do not have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def token_model(path: Path) -> Path:
    """Write a model with a length axis: the masked mean of embeddings, and each token's own.

    `input_ids` and `attention_mask`, int64 [batch, sequence], to `mean`, float32 [batch, 4], and
    `tokens`, float32 [batch, sequence, 4].
    """
    table = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        helper.make_node("Cast", ["attention_mask"], ["weights"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["weights", "last"], ["mask"]),
        helper.make_node("Mul", ["embedded", "mask"], ["tokens"]),
        helper.make_node("ReduceSum", ["tokens", "middle"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "middle"], ["count"], keepdims=0),
        helper.make_node("Div", ["total", "count"], ["mean"]),
    ]
    constants = {"table": table, "last": np.array([-1]), "middle": np.array([1])}
    ids, free = int(TensorProto.INT64), ["batch", "sequence"]
    return _save(
        path,
        nodes,
        constants,
        inputs=[("input_ids", ids, free), ("attention_mask", ids, free)],
        outputs=[
            ("mean", TensorProto.FLOAT, ["batch", 4]),
            ("tokens", TensorProto.FLOAT, ["batch", "sequence", 4]),
        ],
    )


def column_model(path: Path) -> Path:
    """Write a model with an input per column: `price` float32, `count` int32 [batch] to `total`."""
    nodes = [
        helper.make_node("Cast", ["count"], ["factor"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["price", "factor"], ["total"]),
    ]
    return _save(
        path,
        nodes,
        {},
        inputs=[("price", TensorProto.FLOAT, ["batch"]), ("count", TensorProto.INT32, ["batch"])],
        outputs=[("total", TensorProto.FLOAT, ["batch"])],
    )


_LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,!?'", "the", "##ing"),
    *(*_LETTERS, *(f"##{letter}" for letter in _LETTERS)),
)


def text_model(path: Path) -> Path:
    """Write `token_model` for text: BYTES `text` [batch], and return its description."""
    path.parent.joinpath("tokenizer.json").write_text(json.dumps(tokenizer(WORDS)))
    token_model(path.with_suffix(".onnx"))
    path.with_suffix(".toml").write_text(
        f"""
model = "{path.stem}.onnx"
[preprocess.text]
tokenizer = "tokenizer.json"
mask = "attention_mask"
max_length = 16
[postprocess]
output = "tokens"
pool = "mean"
"""
    )
    return path.with_suffix(".toml")


def tokenizer(words: Sequence[str], **changes: object) -> dict[str, object]:
    """Return what `tokenizer.json` of a WordPiece tokenizer with these words holds."""
    vocabulary = {word: index for index, word in enumerate(words)}
    ends = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ("[CLS]", "[SEP]")]
    special = {
        n: {"id": n, "ids": [vocabulary.get(n, 0)], "tokens": [n]} for n in ("[CLS]", "[SEP]")
    }
    return {
        "version": "1.0",
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [ends[0], {"Sequence": {"id": "A", "type_id": 0}}, ends[1]],
            "pair": [ends[0], {"Sequence": {"id": "A", "type_id": 0}}, ends[1]],
            "special_tokens": special,
        },
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
    } | changes


def picture_model(path: Path) -> Path:
    """Write a model of pictures, labelled by their colour, and return its description.

    uint8 `photo` [batch, height, width, 3] to `scores` float32, and `label`, the two best.
    """
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["means"]),
        helper.make_node("Flatten", ["means"], ["scores"]),
    ]
    _save(
        path.with_suffix(".onnx"),
        nodes,
        {},
        inputs=[("image", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        outputs=[("scores", TensorProto.FLOAT, ["batch", 3])],
    )
    path.parent.joinpath("labels.txt").write_text("red\ngreen\nbleu céleste\n")
    path.with_suffix(".toml").write_text(
        f"""
model = "{path.stem}.onnx"
[preprocess.photo]
input = "image"
resize = 10
crop = [8, 8]
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
[postprocess]
map = "softmax"
labels = "labels.txt"
top_k = 2
"""
    )
    return path.with_suffix(".toml")


DATATYPES = (
    *("BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"),
    *("FLOAT16", "FLOAT", "DOUBLE", "STRING"),
)


def datatype_model(path: Path) -> Path:
    """Write a model that returns a column of every datatype: `in_INT8` [batch] as `out_INT8`."""
    kinds = {name: int(TensorProto.DataType.Value(name)) for name in DATATYPES}
    return _save(
        path,
        [helper.make_node("Identity", [f"in_{name}"], [f"out_{name}"]) for name in kinds],
        {},
        inputs=[(f"in_{name}", kind, ["batch"]) for name, kind in kinds.items()],
        outputs=[(f"out_{name}", kind, ["batch"]) for name, kind in kinds.items()],
    )


Values = Sequence[tuple[str, int, Sequence[str | int]]]


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]],
    inputs: Values,
    outputs: Values,
) -> Path:
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
