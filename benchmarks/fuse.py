"""Several models as one against the same models one after the other, in onnxruntime.

Two classifiers on one MiniLM trunk, exported each with a copy of it, and an ensemble of four small
networks that read one input. Both ways answer the same, in turns, on one thread.

    python benchmarks/fuse.py --quick
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [
    str(_ROOT),
    *(p for p in sys.path if p and Path(p).resolve() != _ROOT / "benchmarks"),
]
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402 - after the lines above
import onnx  # noqa: E402
import onnxruntime as ort  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from benchmarks import harness, models  # noqa: E402
from benchmarks.harness import Check, Interval, interval  # noqa: E402
from lrai_import.fuse import fuse  # noqa: E402

LEAST: Final = {"two heads": 1.7, "ensemble": 1.3}
TOLERANCE: Final = 1e-4
_WIDTHS: Final = (64, 128, 128, 10)


def main(argv: Sequence[str] | None = None) -> int:
    """Fuse, compare, print, write; return 1 where a check does not hold."""
    arguments = _arguments(argv)
    rounds = 9 if arguments.quick else 31
    rows, checks, lines = [], list[Check](), []
    with tempfile.TemporaryDirectory(prefix="lrai-fuse-") as scratch:
        cases = {"two heads": _heads(Path(scratch)), "ensemble": _ensemble(Path(scratch))}
    for name, parts in cases.items():
        fused = fuse(parts)
        apart = [_session(model) for model in parts.values()]
        together = _session(fused.model)
        for feed in _feeds(name):
            times, gap = _compare(apart, together, feed, rounds)
            shape = " x ".join(map(str, next(iter(feed.values())).shape))
            lines.append([name, shape, str(times), f"{fused.shared}", f"{fused.joined}"])
            rows.append({"case": name, "shape": shape, "times": list(times), "gap": gap})
            goal = LEAST[name]
            at = f"{name}, {shape}: times as fast as one after the other"
            checks.append(Check(at, times.median, f">= {goal}", times.median >= goal))
            at = f"{name}, {shape}: largest difference"
            checks.append(Check(at, gap, f"<= {TOLERANCE}", gap <= TOLERANCE))
    harness.show(
        "as one, one thread",
        ["", "input", "times as fast", "operators shared", "products joined"],
        lines,
        f"medians of {rounds} rounds in turns, 95 % bootstrap intervals",
    )
    environment = harness.environment(1, ["lrai", "onnxruntime", "numpy"])
    return harness.conclude("fuse", arguments.out, environment, rows, checks, quick=arguments.quick)


def _heads(folder: Path) -> dict[str, onnx.ModelProto]:
    """Return two classifiers on the sentence encoder; the second's values have other names."""
    trunk = onnx.load(models.minilm_onnx(folder / "minilm.onnx"))
    random, made = np.random.default_rng(0), {}
    for name, classes in (("mood", 2), ("topic", 5)):
        model = onnx.ModelProto()
        model.CopyFrom(trunk)
        weight = random.standard_normal((384, classes)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, f"{name}.weight"))
        read = [model.graph.output[0].name, f"{name}.weight"]
        model.graph.node.append(helper.make_node("MatMul", read, [name]))
        del model.graph.output[:]
        scores = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", classes])
        model.graph.output.append(scores)
        made[name] = model
    for node in made["topic"].graph.node:
        node.name = f"other.{node.name}"
    return made


def _ensemble(folder: Path) -> dict[str, onnx.ModelProto]:
    made = {}
    for index in range(4):
        random = np.random.default_rng(index)
        layers = [
            ((random.standard_normal((n, m)) / n**0.5).astype(np.float32), np.zeros(m, np.float32))
            for n, m in itertools.pairwise(_WIDTHS)
        ]
        made[f"m{index}"] = onnx.load(models.mlp_onnx(folder / f"m{index}.onnx", layers))
    return made


def _feeds(case: str) -> list[dict[str, Any]]:
    random = np.random.default_rng(7)
    if case == "ensemble":
        return [{"features": random.standard_normal((n, 64)).astype(np.float32)} for n in (1, 8)]
    ids = [random.integers(1_000, 30_000, shape) for shape in ((1, 16), (8, 32))]
    return [{"input_ids": one, "attention_mask": np.ones_like(one)} for one in ids]


def _session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _compare(
    apart: Sequence[ort.InferenceSession],
    together: ort.InferenceSession,
    feed: Mapping[str, Any],
    rounds: int,
) -> tuple[Interval, float]:
    """Return how many times as fast one is, and by how much its answers differ."""
    right = [session.run(None, feed)[0] for session in apart]
    gap = max(
        float(np.abs(a - b).max()) for a, b in zip(right, together.run(None, feed), strict=True)
    )
    began = time.perf_counter()
    together.run(None, feed)
    repeats = max(1, int(5e-3 / (time.perf_counter() - began)))
    ratios = []
    sides = [apart, [together]]
    for turn in range(rounds):
        seconds = [0.0, 0.0]
        for at in (0, 1)[:: -1 if turn % 2 else 1]:  # each goes first in turn
            began = time.perf_counter()
            for _ in range(repeats):
                for session in sides[at]:
                    session.run(None, feed)
            seconds[at] = time.perf_counter() - began
        ratios.append(seconds[0] / seconds[1])
    return interval(ratios), gap


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="not needed: inputs are drawn")
    parser.add_argument("--quick", action="store_true", help="a third of the rounds")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
