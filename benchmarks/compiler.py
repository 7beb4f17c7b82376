"""The compiler against what else quantises and runs an ONNX model on this CPU.

Every form of a model runs in turn with the others, round by round, on the same rows in the same
batches; what counts is the ratio to ONNX Runtime in float32 with its defaults. Peers of the base
install: ONNX Runtime in float32 and its quantiser, dynamic and static, each with its default
optimizer passes and without those that cost int8 speed. With `--extras` OpenVINO too, in float32
and bfloat16, and in int8 as NNCF quantises it, where that is installed.

A form that does not say what the source model says is no peer: each is judged on rows that nothing
else has seen, as the gate does (98 % of rows agree). Networks with random weights (BERT-base, and
EfficientNet-Lite0 without `--data`) say nothing of that, so all their forms count.

    python benchmarks/compiler.py --data ../shared/data --quick
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from numpy.typing import NDArray  # noqa: E402
from onnxruntime.quantization import CalibrationDataReader  # noqa: E402

import lrai_core as lrai  # noqa: E402
from benchmarks import harness, images, models  # noqa: E402
from benchmarks.harness import Check, Interval, console, interval  # noqa: E402
from lrai_core.engine.engine import find_engine  # noqa: E402
from lrai_core.scheduler.latency import latency_of  # noqa: E402
from lrai_core.verifier.spec import agreement  # noqa: E402

Array = NDArray[Any]
Feed = dict[str, Array]
Run = Callable[[Feed], list[Array]]

MOST_BEHIND: Final = 1.03  # of the latency of the fastest peer that passes
LEAST_AGREEMENT: Final = 0.98
REFERENCE: Final = "onnxruntime fp32"
TUNED: Final = ("SkipLayerNormFusion",)  # passes that cost int8 speed
SEED: Final = 0


@dataclass(frozen=True, slots=True)
class Model:
    """A model, rows to compile it with, and rows that nothing has seen.

    Attributes:
        cells: Rows and length of the calls that are timed; length 0 where there is none.
        trained: Whether what it says means something.
        smaller: Least share by which its int8 has to be smaller than its float32, 0 for none.
    """

    name: str
    source: Path
    evaluation: Mapping[str, Array]
    unseen: list[Feed]
    output_map: str
    cells: Sequence[tuple[int, int]]
    trained: bool = True
    smaller: float = 0.0


@dataclass(slots=True)
class Form:
    """One way to run a model."""

    name: str
    run: Run
    size_mb: float
    build_seconds: float
    agrees: float = 1.0
    seconds: dict[tuple[int, int], list[float]] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, judge, measure, print, write; return 1 where a check does not hold."""
    arguments = _arguments(argv)
    rounds = 5 if arguments.quick else 30
    cpus = sorted(os.sched_getaffinity(0))
    rows: list[dict[str, Any]] = []
    checks: list[Check] = []
    with tempfile.TemporaryDirectory(prefix="lrai-compiler-") as scratch:
        for threads in (1,) if arguments.quick else (1, 2):
            os.sched_setaffinity(0, cpus[:threads])
            for model in _models(Path(scratch), arguments.data, quick=arguments.quick):
                folder = Path(scratch, f"{model.name}-{threads}")
                folder.mkdir()
                forms = _forms(model, folder, threads, extras=arguments.extras)
                _judge(model, forms)
                _measure(model, forms, rounds)
                rows += _show(model, forms, threads)
                checks += _checks(model, forms, threads)
        os.sched_setaffinity(0, cpus)
    packages = ["lrai", "onnxruntime", "numpy", *(["openvino"] if arguments.extras else [])]
    checks.append(_together(rows))
    environment = harness.environment(1, packages)
    return harness.conclude("compiler", arguments.out, environment, rows, checks, rounds=rounds)


def _models(scratch: Path, data: Path | None, *, quick: bool) -> Iterator[Model]:
    """Yield the models, small ones first."""
    source, held = models.classifier(scratch / "classifier.onnx", SEED, hidden=1024)
    rows = held["features"]
    yield Model(
        "classifier",
        source,
        {"features": rows[:2_000], "label": held["label"][:2_000]},
        [{"features": row[None]} for row in rows[2_000:3_000]],
        "softmax",
        [(count, 0) for count in (1, 8, 32)],
    )
    tokenizer = models.Tokenizer()
    texts = models.sst2(data, "test")[0][:500] if data else models.sentences(500, SEED + 9)
    requests = models.requests(1_200, SEED + 5)
    yield Model(
        "minilm",
        models.minilm_onnx(scratch / "minilm.onnx"),
        tokenizer.pad([request["input_ids"][0] for request in requests]),
        [_tokens(np.asarray(ids).ravel()) for ids in tokenizer.encode(texts)],
        "l2_normalised",
        [(count, length) for length in (16, 64, 128) for count in (1, 8, 32)][: 5 if quick else 9],
        smaller=0.6,
    )
    if quick:
        return
    random = np.random.default_rng(SEED)
    pictures = random.standard_normal((330, 3, 224, 224), np.float32)
    yield Model(
        "efficientnet-lite0",
        images.efficientnet_lite0_onnx(scratch / "efficientnet.onnx"),
        {"image": pictures},
        [{"image": row[None]} for row in pictures[:8]],
        "softmax",
        [(1, 0), (8, 0)],
        trained=False,
        smaller=0.4,
    )
    ids = random.integers(1_000, 30_000, (330, 64))
    yield Model(
        "bert-base",
        models.bert_base_onnx(scratch / "bert.onnx"),
        {"input_ids": ids, "attention_mask": np.ones_like(ids)},
        [_tokens(row) for row in ids[:8]],
        "l2_normalised",
        [(1, 128), (8, 128)],
        trained=False,
        smaller=0.6,
    )


def _tokens(ids: Array) -> Feed:
    row = ids[None].astype(np.int64)
    return {"input_ids": row, "attention_mask": np.ones_like(row)}


def _mb(file: Path) -> float:
    return file.stat().st_size / 1e6


def _forms(model: Model, folder: Path, threads: int, *, extras: bool) -> list[Form]:
    """Return every form that can be made, the reference first and ours last."""
    made = [Form(REFERENCE, _ort(model.source, threads), _mb(model.source), 0.0)]
    made.append(
        Form(f"{REFERENCE}, tuned", _ort(model.source, threads, TUNED), _mb(model.source), 0.0)
    )
    for kind, build in (("dynamic int8", _dynamic), ("static int8", _static), ("blocks", _blocks)):
        file, began = folder / f"{kind.replace(' ', '-')}.onnx", time.perf_counter()
        with console.status(f"{model.name}: onnxruntime's quantiser, {kind}"):
            build(model, file)
        seconds = time.perf_counter() - began
        for passes, words in (((), ""), (TUNED, ", tuned")):
            run = _ort(file, threads, passes)
            made.append(Form(f"onnxruntime {kind}{words}", run, _mb(file), seconds))
    if extras:
        made += _openvino(model, threads)
    for name, engines in (("lrai", ()), *((("lrai with openvino", ("openvino",)),) * extras)):
        out, began = folder / f"{name.replace(' ', '-')}.lrai", time.perf_counter()
        with console.status(f"{model.name}: lrai compiles"):
            artifact = lrai.compile(
                model.source,
                out=out,
                evaluation=model.evaluation,
                output_map=model.output_map,  # type: ignore[arg-type] # one of the three
                # Of random weights nothing is asked but speed.
                max_accuracy_loss=0.01 if model.trained else 0.99,
                engines=engines,
                threads=threads,
                keep=3 if engines else 2,
                seed=SEED,
            )
        seconds = time.perf_counter() - began
        made.append(_ours(name, artifact, threads, seconds))
    return made


def _ours(name: str, artifact: lrai.Artifact, threads: int, seconds: float) -> Form:
    """Return an artifact as an actor runs it: each call by the variant predicted to be fastest."""
    serving = artifact.manifest.serving()
    sessions = []
    for variant in serving:
        weights = artifact.path / variant.weights if variant.weights else None
        engine = find_engine(variant.engine)
        sessions.append(engine.load(artifact.file(variant.model), weights=weights, threads=threads))
    latency = latency_of([variant.latency for variant in serving])
    names = [spec.name for spec in artifact.manifest.signature.inputs]
    axis = artifact.manifest.signature.inputs[0].length_axis

    def run(feed: Feed) -> list[Array]:
        first, at = feed[names[0]], 0
        if len(sessions) > 1:
            at = latency.variant(len(first), 0 if axis is None else first.shape[axis])
        return sessions[at].run([feed[one] for one in names])

    ids = " + ".join(variant.id for variant in serving)
    size = sum(variant.size_bytes for variant in serving) / 1e6
    return Form(f"{name}: {ids}", run, size, seconds)


def _ort(file: Path, threads: int, disabled: Sequence[str] = ()) -> Run:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = ort.InferenceSession(
        str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
    )
    return lambda feed: list(session.run(None, feed))


def _dynamic(model: Model, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(model.source, out, per_channel=True, weight_type=QuantType.QInt8)


def _blocks(model: Model, out: Path) -> None:
    """Weights and activations in int8 by blocks of 32: the closest that onnxruntime has."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantiser = MatMulNBitsQuantizer(
        onnx.load(model.source), bits=8, block_size=32, is_symmetric=True, accuracy_level=4
    )
    quantiser.process()
    quantiser.model.save_model_to_file(str(out))


def _static(model: Model, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = out.with_suffix(".ready.onnx")
    quant_pre_process(model.source, ready, skip_symbolic_shape=True)
    quantize_static(
        ready,
        out,
        _Reader(_calibration(model)),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


class _Reader(CalibrationDataReader):  # type: ignore[misc] # without types
    """Rows for onnxruntime's quantiser."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def _calibration(model: Model) -> list[Feed]:
    """Return 100 of the rows that the model is compiled with, without padding."""
    names = [name for name in model.evaluation if name != "label"]
    feeds = []
    for index in range(100):
        feed = {name: model.evaluation[name][index : index + 1] for name in names}
        if "attention_mask" in feed:
            length = int(feed["attention_mask"].sum())
            feed = {name: array[:, :length] for name, array in feed.items()}
        feeds.append(feed)
    return feeds


def _openvino(model: Model, threads: int) -> Iterator[Form]:
    import openvino as ov

    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}

    def run_of(network: Any, precision: str) -> Run:
        config = settings | {"INFERENCE_PRECISION_HINT": precision}
        request = core.compile_model(network, "CPU", config).create_infer_request()
        return lambda feed: list(request.infer(feed).values())

    for precision, words in (("f32", "fp32"), ("bf16", "bf16")):
        run = run_of(core.read_model(model.source), precision)
        yield Form(f"openvino {words}", run, _mb(model.source), 0.0)
    if importlib.util.find_spec("nncf") is None:
        console.print("nncf is not installed: OpenVINO's int8 is left out")
        return
    import nncf

    began, kind = time.perf_counter(), {}
    if "attention_mask" in model.evaluation:
        kind = {"model_type": nncf.ModelType.TRANSFORMER}
    quantised = nncf.quantize(
        core.read_model(model.source), nncf.Dataset(_calibration(model)), **kind
    )
    seconds = time.perf_counter() - began
    yield Form("openvino int8, nncf", run_of(quantised, "f32"), float("nan"), seconds)


def _judge(model: Model, forms: Sequence[Form]) -> None:
    """Set the share of unseen rows on which each form agrees with the reference."""
    if not model.trained:
        return
    spec = lrai.TensorSpec(
        name="y",
        datatype="FP32",
        shape=("batch",),
        output_map=model.output_map,  # type: ignore[arg-type]
    )
    right = [forms[0].run(feed)[:1] for feed in model.unseen]
    for form in forms[1:]:
        own = (form.run(feed)[:1] for feed in model.unseen)
        same = [agreement(f, g, [spec]) for f, g in zip(right, own, strict=True)]
        form.agrees = float(np.mean(same))


def _measure(model: Model, forms: Sequence[Form], rounds: int) -> None:
    """Time every form at every cell in turn, from cell to cell as traffic does."""
    feeds = {cell: _feed(model, *cell) for cell in model.cells}
    repeats = {}
    for cell, feed in feeds.items():
        for form in forms:
            form.run(feed)
            form.seconds[cell] = []
        began = time.perf_counter()
        forms[0].run(feed)
        repeats[cell] = max(1, int(2e-3 / max(time.perf_counter() - began, 1e-6)))
    with console.status(f"{model.name}: {len(forms)} forms, {rounds} rounds"):
        for _ in range(rounds):
            for cell, feed in feeds.items():
                for form in forms:
                    began = time.perf_counter()
                    for _ in range(repeats[cell]):
                        form.run(feed)
                    form.seconds[cell].append((time.perf_counter() - began) / repeats[cell])


def _feed(model: Model, rows: int, length: int) -> Feed:
    names = [name for name in model.evaluation if name != "label"]
    feed = {name: np.repeat(model.unseen[0][name], rows, axis=0) for name in names}
    if length:
        feed = {name: np.resize(array[0], (rows, length)) for name, array in feed.items()}
    return {name: np.ascontiguousarray(array) for name, array in feed.items()}


def _ratio(form: Form, other: Form, cell: tuple[int, int]) -> Interval:
    pairs = zip(form.seconds[cell], other.seconds[cell], strict=True)
    return interval([own / theirs for own, theirs in pairs])


def _passes(form: Form) -> bool:
    return form.agrees >= LEAST_AGREEMENT


def _show(model: Model, forms: Sequence[Form], threads: int) -> list[dict[str, Any]]:
    reference = forms[0]
    columns = [f"{rows}" + (f" x {length}" if length else "") for rows, length in model.cells]
    rows, lines = [], []
    for form in forms:
        ratios = {cell: _ratio(form, reference, cell) for cell in model.cells}
        agrees = f"{form.agrees:.3f}" if model.trained else ""
        figures = [f"{ratio.median:.2f}" for ratio in ratios.values()]
        size = "" if np.isnan(form.size_mb) else f"{form.size_mb:.1f}"
        who, _, what = form.name.partition(": " if ": " in form.name else " ")
        lines.append([who, what, *figures, agrees, size, f"{form.build_seconds:.0f}"])
        rows.append(
            {
                "model": model.name,
                "threads": threads,
                "form": form.name,
                "ratios": {f"{n}x{length}": list(r) for (n, length), r in ratios.items()},
                "agreement": form.agrees if model.trained else None,
                "size_mb": None if np.isnan(form.size_mb) else form.size_mb,
                "build_seconds": form.build_seconds,
            }
        )
    harness.show(
        f"{model.name}, {threads} thread(s)",
        ["", "form", *columns, "agrees", "MB", "s to make"],
        lines,
        "latency to onnxruntime fp32 with its defaults, medians of rounds in turn; rows x length",
    )
    return rows


def _checks(model: Model, forms: Sequence[Form], threads: int) -> Iterator[Check]:
    """Compare each of ours with the fastest peer that passes: of its own engines, and of all."""
    reference, peers = forms[0], [form for form in forms if not form.name.startswith("lrai")]
    for ours in (form for form in forms if form.name.startswith("lrai")):
        kind, name = ours.name.partition(":")[0], f"{model.name}, {threads} thread(s)"
        rivals = [p for p in peers if _passes(p) and ("with" in kind or "openvino" not in p.name)]
        for cell in model.cells:
            at = f"{name}, {cell[0]}" + (f" x {cell[1]}" if cell[1] else "")
            best = min(rivals, key=lambda peer, cell=cell: np.median(peer.seconds[cell]))  # type: ignore[misc]
            found = _ratio(ours, best, cell)
            yield Check(
                f"{at}: {kind} to {best.name}, {found}",
                found.median,
                f"interval reaches {MOST_BEHIND}",
                found.low <= MOST_BEHIND,
            )
        slowest = max(_ratio(ours, reference, cell).low for cell in model.cells)
        yield Check(f"{name}: {kind}, slowest to fp32", slowest, "<= 1", slowest <= 1)
        if model.trained:
            goal = f">= {LEAST_AGREEMENT}"
            yield Check(f"{name}: {kind} agrees on unseen rows", ours.agrees, goal, _passes(ours))
        if model.smaller and kind == "lrai":
            saved = 1 - ours.size_mb / reference.size_mb
            goal = f">= {model.smaller}"
            yield Check(f"{name}: {kind}, share smaller", saved, goal, saved >= model.smaller)


def _together(rows: Sequence[Mapping[str, Any]]) -> Check:
    """Return the geometric mean, over all cells, of ours to the best peer that passes."""
    logs = []
    for model, threads in {(row["model"], row["threads"]) for row in rows}:
        group = [r for r in rows if (r["model"], r["threads"]) == (model, threads)]
        ours = next(r for r in group if r["form"].startswith("lrai:"))
        rivals = [
            r
            for r in group
            if r["form"].startswith("onnxruntime")
            and (r["agreement"] is None or r["agreement"] >= LEAST_AGREEMENT)
        ]
        for cell, found in ours["ratios"].items():
            logs.append(np.log(found[0] / min(r["ratios"][cell][0] for r in rivals)))
    value = float(np.exp(np.mean(logs)))
    return Check("all cells: lrai to the fastest peer of onnxruntime", value, "<= 1", value <= 1)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="folder of benchmark data: real sentences")
    parser.add_argument("--extras", action="store_true", help="with OpenVINO, ours and as a peer")
    parser.add_argument("--quick", action="store_true", help="three minutes instead of thirty")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
