"""Kinds of lengths that hosts are asked with, and what ONNX Runtime does in a plain loop."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

import lrai_core as lrai
from benchmarks import models, realtime
from benchmarks.callers import Row

FIXED_LENGTH: Final = 32
SEED: Final = 0
_EACH: Final = 3  # requests of every caller at least, or they would hardly ever all wait at a time


@dataclass(frozen=True, slots=True)
class Kind:
    """Rows of one kind of lengths."""

    name: str
    rows: list[Row]
    expected: NDArray[np.float32]  # of fp32 run alone, [rows, 384]


def open_encoder(given: Path | None, scratch: Path, cpu: int) -> tuple[lrai.Artifact, Path]:
    """Return the artifact of MiniLM, compiled on one CPU unless it is given, and the ONNX file."""
    artifact = lrai.Artifact.open(given or realtime.compile_minilm(scratch, cpu))
    if artifact.manifest.chosen == "fp32":
        raise SystemExit("fp32 was chosen here: there is no variant to compare it with")
    source = scratch / "minilm.onnx"
    return artifact, source if source.exists() else models.minilm_onnx(source)


def make_kinds(source: Path, data: Path | None, counts: Mapping[str, int]) -> list[Kind]:
    """Return rows of real text of each kind of lengths, with what fp32 answers to each alone."""
    lengths: dict[str, Any] = {}
    for kind, count in counts.items():
        if kind == "fixed":
            lengths[kind] = np.full(count, FIXED_LENGTH)
        elif kind == "search":
            lengths[kind] = models.search_lengths(count, SEED + 1)
        else:
            lengths[kind] = realtime.azure_lengths(count, data)
    tokenizer = models.Tokenizer()
    stream = np.concatenate(
        [ids[1:-1] for ids in tokenizer.encode(models.sentences(3_000, SEED + 11))]
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    kinds = []
    for name, tokens in lengths.items():
        starts = np.random.default_rng(SEED).integers(0, len(stream) - 600, len(tokens))
        rows = []
        for start, length in zip(starts, tokens, strict=True):
            body = stream[start : start + length - 2]
            ids = np.concatenate([[tokenizer.cls_id], body, [tokenizer.sep_id]])[None]
            rows.append({"input_ids": ids, "attention_mask": np.ones_like(ids)})
        answers = [session.run(None, row)[0] for row in rows]
        kinds.append(Kind(name, rows, np.concatenate(answers)))
    return kinds


def measure_bare(
    artifact: lrai.Artifact,
    source: Path,
    kinds: Sequence[Kind],
    rounds: int,
    cpu: int,
    scratch: Path,
) -> dict[tuple[str, str], list[float]]:
    """Return rows a second of ONNX Runtime in a plain loop, by variant and lengths, each round.

    fp32 is the source as ONNX Runtime opens it by default, which is what the hosts' peers serve.
    """
    found: dict[tuple[str, str], list[float]] = {}
    variants = {"fp32": source, artifact.manifest.chosen: None}
    files = {kind.name: scratch / f"{kind.name}.npz" for kind in kinds}
    for kind in kinds:
        ids = [row["input_ids"][0] for row in kind.rows]
        lengths = [len(row) for row in ids]
        np.savez(files[kind.name], lengths=lengths, input_ids=np.concatenate(ids))
    with contextlib.ExitStack() as stack:
        peers = {
            variant: stack.enter_context(
                realtime.Peer(artifact, variant, cpu, files[kinds[0].name], plain)
            )
            for variant, plain in variants.items()
        }
        for kind in kinds:
            for peer in peers.values():
                peer.ask(do="requests", requests=str(files[kind.name]))
            for _ in range(rounds):
                for variant, peer in peers.items():
                    seconds = peer.ask(do="closed", batch=1, pad=0)["seconds"]
                    found.setdefault((variant, kind.name), []).append(len(kind.rows) / seconds)
    return found


def share(kind: Kind, count: int, callers: int = 1) -> int:
    """Return how many rows of a kind take about as long as `count` of the others.

    With several callers there are more where that would be less than a few for each.
    """
    return max(max(count // 4, 8) if kind.name == "azure" else count, _EACH * callers)
