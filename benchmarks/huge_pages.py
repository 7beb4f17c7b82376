"""Engines on huge pages against the same engines on the system's own: same file, same options.

Both sessions lie in one process, on one CPU and one engine thread, and run in turns. How much is
gained depends on the machine, and on who else uses its caches; nothing is to be lost anywhere.

    python benchmarks/huge_pages.py --quick
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [
    str(_ROOT),
    *(p for p in sys.path if p and Path(p).resolve() != _ROOT / "benchmarks"),
]
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402 - after the lines above
import onnxruntime as ort  # noqa: E402

from benchmarks import harness, images, models  # noqa: E402
from benchmarks.harness import Check, interval  # noqa: E402
from lrai_core.engine.engine import find_engine, huge_pages  # noqa: E402

_TOKENS: Final = 30_522  # of MiniLM's vocabulary
_CELLS: Final = {"minilm": ((1, 16), (8, 16), (1, 128), (8, 64)), "efficientnet": ((1, 0), (8, 0))}
_NAMES: Final = {"minilm": "MiniLM-L6", "efficientnet": "EfficientNet-Lite0"}
_OPTIONS: Final = {"INFERENCE_NUM_THREADS": "1", "PERFORMANCE_HINT": "LATENCY"}
Feed = dict[str, Any]
Call = Callable[[Feed], object]


def main(argv: Sequence[str] | None = None) -> int:
    """Run both, print, write; return 1 where huge pages cost time."""
    arguments = _arguments(argv)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rounds = 5 if arguments.quick else 31
    rows, lines, checks, ratios = list[Any](), list[Any](), list[Check](), list[float]()
    before = _huge_mb()
    with tempfile.TemporaryDirectory(prefix="lrai-huge-pages-") as scratch:
        models.minilm_onnx(Path(scratch, "minilm.onnx"))
        images.efficientnet_lite0_onnx(Path(scratch, "efficientnet.onnx"))
        for model, cells in _CELLS.items():
            for engine, plain, huge in _engines(Path(scratch, f"{model}.onnx")):
                for cell in cells:
                    found = _ratios(plain, huge, _feed(model, *cell), rounds)
                    case = f"{_NAMES[model]}, {engine}"
                    size = "x".join(map(str, filter(None, cell)))
                    rows.append({"model": model, "engine": engine, "cell": cell, **found})
                    ms, ratio = [f"{found[k]:.2f}" for k in ("plain_ms", "huge_ms")], found["ratio"]
                    lines.append([case, size, *ms, str(ratio)])
                    ratios.append(ratio.median)
                    goal = ("interval reaches 1", ratio.low <= 1)
                    checks.append(Check(f"{case}, {size}", ratio.median, *goal))
    mean = float(np.exp(np.mean(np.log(ratios))))
    checks.append(Check("all cells", mean, "<= 1", mean <= 1))
    harness.show(
        f"on huge pages, to without; float32, one thread; {_huge_mb() - before:.0f} MB are on some",
        ["", "rows x length", "ms without", "ms with", "ratio"],
        lines,
        f"medians of {rounds} rounds in turns, 95 % bootstrap intervals; below 1 is faster",
    )
    packages = ["lrai", "onnxruntime", "numpy"]
    environment = harness.environment(1, packages)
    return harness.conclude(
        "huge_pages", arguments.out, environment, rows, checks, quick=arguments.quick
    )


def _engines(model: Path) -> Iterator[tuple[str, Call, Call]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    plain = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    ours = find_engine("onnxruntime").load(model, threads=1, optimise=True)
    yield "onnxruntime", lambda feed: plain.run(None, feed), lambda feed: ours.run([*feed.values()])
    if importlib.util.find_spec("openvino") is not None:
        import openvino as ov

        core = ov.Core()
        made = [core.compile_model(core.read_model(model), "CPU", _OPTIONS).create_infer_request()]
        with huge_pages():
            compiled = core.compile_model(core.read_model(model), "CPU", _OPTIONS)
            made.append(compiled.create_infer_request())
        yield "openvino", made[0].infer, made[1].infer


def _feed(model: str, rows: int, length: int) -> Feed:
    random = np.random.default_rng(0)
    if model == "minilm":
        ids = random.integers(0, _TOKENS, (rows, length))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return {"image": random.random((rows, 3, 224, 224), np.float32)}


def _ratios(plain: Call, huge: Call, feed: Feed, rounds: int) -> dict[str, Any]:
    seconds: dict[Call, list[float]] = {plain: [], huge: []}
    for call in (plain, huge):  # what is taken for a size is taken once
        call(feed)
    for turn in range(rounds):
        for call in (plain, huge)[:: -1 if turn % 2 else 1]:  # each goes first in turn
            began = time.perf_counter()
            call(feed)
            seconds[call].append(time.perf_counter() - began)
    pairs = zip(seconds[huge], seconds[plain], strict=True)
    return {
        "plain_ms": 1e3 * float(np.median(seconds[plain])),
        "huge_ms": 1e3 * float(np.median(seconds[huge])),
        "ratio": interval([own / other for own, other in pairs]),
    }


def _huge_mb() -> float:
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return int(text.partition("AnonHugePages:")[2].split()[0]) / 1e3


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="taken for the sake of all; nothing is read")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
