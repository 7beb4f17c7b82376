"""The compiler against what else quantises and runs an ONNX model on this CPU.

Every form of a model runs in turn with the others, round by round in another order, on the same
rows in the same batches; what counts is the ratio to ONNX Runtime in float32 with its defaults.
Peers of the base install: ONNX Runtime in float32 and its quantiser, dynamic and static, each with
its default optimizer passes and without those that cost int8 speed. With `--extras` OpenVINO too,
in float32 and bfloat16, and in int8 as NNCF quantises it, where that is installed.

A form that does not say what the source model says is no peer: each is judged on rows that nothing
else has seen, by accuracy (with 95 % confidence one point is lost at most; of ours what is lost is
checked), or where there are no labels by agreement (98 % of rows). Networks with random weights
(BERT-base, ResNet-50, and EfficientNet-Lite0 without `--data`) say nothing of that, so all their
forms count.

    python benchmarks/compiler.py --data ../shared/data --quick
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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
from onnxruntime.quantization import CalibrationDataReader  # noqa: E402

import lrai_core as lrai  # noqa: E402
from benchmarks import compiler_memory, harness  # noqa: E402
from benchmarks.compiler_models import Array, Feed, Model, made  # noqa: E402
from benchmarks.harness import Check, Interval, console, interval  # noqa: E402
from benchmarks.host import end_on_sigterm  # noqa: E402
from lrai_core import fairness  # noqa: E402
from lrai_core.confidence import paired_loss_bound, upper_bound  # noqa: E402
from lrai_core.engine.engine import find_engine  # noqa: E402
from lrai_core.scheduler.latency import LatencyModel  # noqa: E402
from lrai_core.verifier.spec import agreement, difference  # noqa: E402

Run = Callable[[Feed], list[Array]]
Open = Callable[[int], Run]  # with so many threads

AHEAD: Final = 1.05
MOST_BEHIND: Final = 1.03  # of the latency of the fastest peer that passes
LEAST_AGREEMENT: Final = 0.98
REFERENCE: Final = "onnxruntime fp32"
TUNED: Final = ("SkipLayerNormFusion", "BiasGeluFusion")  # passes that cost int8 speed
MOST_LOSS: Final = 0.01  # of accuracy, on rows that nothing has seen
EPSILON: Final = 0.01
CLOSE_TIMES: Final = 1.2  # as fast as the fastest peer that is as close, on one model at least
SEED: Final = 0
_CLOSE: Final = f"lrai within {EPSILON}"
_CLOSE_TOO: Final = f"lrai with openvino within {EPSILON}"
_ASLEEP: Final = 0.06  # seconds
MOST_DISPARITY: Final = 0.01  # the default of `lrai.compile`
_SMALL_MB: Final = 30.0
_QUICK_MINUTES: Final = 1.5
# After so many rounds who takes so many times as long as the fastest that passes drops out.
_ALL_ROUNDS, _TOO_SLOW = 5, 1.5


@dataclass(slots=True)
class Form:
    """One way to run a model.

    Attributes:
        agrees: Share of unseen rows on which it says what the reference says.
        loss: Accuracy of the reference on unseen rows less its own, where there are labels.
        loss_bound: One-sided 95 % upper bound of that, as the gate has it.
        widened: Bound of what lies between groups, wider than the reference's, as the gate has it.
        beyond: Share of unseen rows that differ by more than epsilon after the output map.
        beyond_bound: One-sided 95 % upper bound of that.
        memory_mb: Of a process that has it loaded, above one with a model of one operator; of
            ours the chosen variant.
        beside_mb: What serves beside that one adds to memory; to the files `beside_file_mb`.
    """

    name: str
    opens: Callable[[], Run]
    size_mb: float
    build_seconds: float
    agrees: float = 1.0
    loss: float = 0.0
    loss_bound: float = 0.0
    widened: float = 0.0
    beyond: float = 0.0
    beyond_bound: float = 0.0
    memory_mb: float = float("nan")
    beside_mb: float = 0.0
    beside_file_mb: float = 0.0
    seconds: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    run: Run = field(init=False)

    def __post_init__(self) -> None:
        """Load it."""
        self.run = self.opens()


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, judge, measure, print, write; return 1 where a check does not hold."""
    arguments = _arguments(argv)
    end_on_sigterm()
    rounds = 5 if arguments.quick else 30
    cpus = sorted(os.sched_getaffinity(0))
    rows: list[dict[str, Any]] = []
    checks: list[Check] = []
    with tempfile.TemporaryDirectory(prefix="lrai-compiler-") as scratch:
        for model in made(Path(scratch), arguments.data, arguments.only, quick=arguments.quick):
            folder = Path(scratch, model.name)
            folder.mkdir()
            peers = _peers(model, folder, extras=arguments.extras)
            known, stayed = dict[str, Form](), list[str]()
            for threads in (1,) if arguments.quick or model.heavy else (1, 2):
                os.sched_setaffinity(0, cpus[:threads])
                try:
                    # Who has dropped out of every cell with one thread does not come again.
                    left = [p for p in peers if p.name in (REFERENCE, *stayed) or not stayed]
                    forms = [peer.form(threads, known) for peer in left]
                    forms += _ours(model, folder, threads, cpus, arguments)
                    _judge(model, forms, known)
                    _measure(model, forms, rounds, threads)
                except lrai.LraiError as error:  # the other models are measured all the same
                    words = f"{model.name}, {threads} thread(s): {error}"
                    checks.append(Check(words, float("nan"), "it compiles", holds=False))
                    continue
                finally:
                    os.sched_setaffinity(0, cpus)
                known = {form.name: form for form in forms if not form.name.startswith("lrai")}
                stayed = [n for n, f in known.items() if rounds in map(len, f.seconds.values())]
                rows += _show(model, forms, threads)
                checks += _checks(model, forms, threads)
    packages = ["lrai", "onnxruntime", "numpy", *(["openvino"] if arguments.extras else [])]
    checks += _together(rows, extras=arguments.extras)
    environment = harness.environment(1, packages)
    return harness.conclude(
        "compiler", arguments.out, environment, rows, checks, rounds=rounds, quick=arguments.quick
    )


def _mb(file: Path) -> float:
    return file.stat().st_size / 1e6


@dataclass(frozen=True, slots=True)
class Peer:
    """A form of somebody else's, before it is opened."""

    name: str
    opens: Open
    size_mb: float
    build_seconds: float = 0.0
    memory_mb: float = float("nan")

    def form(self, threads: int, known: Mapping[str, Form]) -> Form:
        """Return it as it is served with so many threads; what it says is known from another."""
        form = Form(self.name, partial(self.opens, threads), self.size_mb, self.build_seconds)
        form.memory_mb = self.memory_mb
        if other := known.get(self.name):
            form.agrees, form.loss, form.loss_bound = other.agrees, other.loss, other.loss_bound
            form.widened, form.beyond = other.widened, other.beyond
            form.beyond_bound = other.beyond_bound
        return form


def _peers(model: Model, folder: Path, *, extras: bool) -> list[Peer]:
    """Return every peer that can be made, the reference first.

    Each once: of several copies of one graph the luckiest would be the fastest.
    """
    memory_mb = compiler_memory.loaded_mb(model.source, optimise=True)
    opens = partial(_ort, model.source, ())
    made = [Peer(REFERENCE, opens, _mb(model.source), memory_mb=memory_mb)]
    settings = [((), ""), (TUNED, ", tuned")][: 1 + _is_tunable(model.source)]
    for passes, words in settings[1:]:
        tuned = partial(_ort, model.source, passes)
        made.append(Peer(f"{REFERENCE}{words}", tuned, _mb(model.source)))
    for kind, build in (("dynamic int8", _dynamic), ("static int8", _static), ("blocks", _blocks)):
        file, began = folder / f"{kind.replace(' ', '-')}.onnx", time.perf_counter()
        with console.status(f"{model.name}: onnxruntime's quantiser, {kind}"):
            build(model, file)
        seconds = time.perf_counter() - began
        if _operators(file) == _operators(model.source):
            continue  # it has found nothing to do
        for passes, words in settings:
            opens = partial(_ort, file, passes)
            made.append(Peer(f"onnxruntime {kind}{words}", opens, _mb(file), seconds))
    if model.module is not None:
        made.append(Peer("torch eager", partial(_torch, model), _mb(model.source)))
    return [*made, *_openvino(model)] if extras else made


def _ours(
    model: Model, folder: Path, threads: int, cpus: Sequence[int], arguments: argparse.Namespace
) -> list[Form]:
    """Return our forms; they are compiled on all CPUs, and share what of them was made before."""
    made, extras, quick = list[Form](), arguments.extras, arguments.quick
    kinds: list[tuple[str, tuple[str, ...], float | None]] = [("lrai", (), None)]
    kinds += [("lrai with openvino", ("openvino",), None)] * extras
    if model.delta and threads == 1 and not quick:  # with the extras that are there
        kinds.append((_CLOSE_TOO, ("openvino",), EPSILON) if extras else (_CLOSE, (), EPSILON))
    for name, engines, epsilon in kinds:
        out, began = folder / f"{name.replace(' ', '-')}-{threads}.lrai", time.perf_counter()
        os.sched_setaffinity(0, cpus)
        with console.status(f"{model.name}: lrai compiles"):
            artifact = lrai.compile(
                model.source,
                out=out,
                evaluation=model.evaluation,
                output_map=model.output_map,  # type: ignore[arg-type] # one of the three
                max_accuracy_loss=model.max_accuracy_loss,
                groups=model.groups,
                engines=engines,
                epsilon=epsilon,
                delta=model.delta or 0.01,
                minutes=_QUICK_MINUTES if quick else None,
                # Every CPU runs rows all the same; with several, short calls are served with one.
                threads=1 if threads == 1 else 0,
                seed=SEED,
                cache=folder / "cache",
            )
        os.sched_setaffinity(0, cpus[:threads])
        seconds = time.perf_counter() - began
        serving, each = artifact.manifest.serving(), list[float]()
        if name == "lrai":  # before this process maps the same file, and shares it
            each = [compiler_memory.variant_mb(artifact, variant) for variant in serving]
        made.append(_form(name, artifact, threads, seconds))
        if name == "lrai":
            made[-1].memory_mb, made[-1].beside_mb = each[0], sum(each[1:])
            made[-1].beside_file_mb = sum(variant.size_bytes for variant in serving[1:]) / 1e6
    return made


def _operators(file: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(file, load_external_data=False).graph.node)


def _is_tunable(source: Path) -> bool:
    """Return whether there is a layer norm or a GELU, all that `TUNED` says anything of."""
    kinds = _operators(source)
    norms = kinds["LayerNormalization"] or (kinds["ReduceMean"] and kinds["Sqrt"])
    return bool(norms or kinds["Gelu"] or kinds["Erf"])


def _form(name: str, artifact: lrai.Artifact, threads: int, seconds: float) -> Form:
    serving, own = artifact.manifest.serving(), artifact.manifest.target.threads
    ids = " + ".join(variant.id for variant in serving)
    ids += f", {own} thread(s)" * (own != threads)  # what is quick is served with one
    opens = partial(_serve, artifact)
    return Form(f"{name}: {ids}", opens, serving[0].size_bytes / 1e6, seconds)


def _serve(artifact: lrai.Artifact) -> Run:
    """Return an artifact as an actor runs it: each call by the variant predicted to be fastest."""
    serving, threads = artifact.manifest.serving(), artifact.manifest.target.threads
    sessions = []
    for variant in serving:
        weights = artifact.path / variant.weights if variant.weights else None
        engine = find_engine(variant.engine)
        sessions.append(engine.load(artifact.file(variant.model), weights=weights, threads=threads))
    latency = LatencyModel(*(variant.latency for variant in serving))
    names = [spec.name for spec in artifact.manifest.signature.inputs]
    axis = artifact.manifest.signature.inputs[0].length_axis

    def run(feed: Feed) -> list[Array]:
        first, at = feed[names[0]], 0
        if len(sessions) > 1:
            at = latency.variant(len(first), 0 if axis is None else first.shape[axis])
        return sessions[at].run([feed[one] for one in names])

    return run


def _ort(file: Path, disabled: Sequence[str], threads: int) -> Run:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = ort.InferenceSession(
        str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
    )
    return lambda feed: list(session.run(None, feed))


def _torch(model: Model, threads: int) -> Run:
    import torch

    torch.set_num_threads(threads)
    module, names = model.module, [name for name in model.unseen[0] if name != "label"]

    def run(feed: Feed) -> list[Array]:
        with torch.inference_mode():
            return [module(*(torch.from_numpy(feed[name]) for name in names)).numpy()]

    return run


def _dynamic(model: Model, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.registry import IntegerOpsRegistry

    # Without convolutions, which this makes 4 to 12 times slower: nobody would serve that.
    kinds = [kind for kind in IntegerOpsRegistry if kind != "Conv"]
    quantize_dynamic(
        model.source, out, op_types_to_quantize=kinds, per_channel=True, weight_type=QuantType.QInt8
    )


def _blocks(model: Model, out: Path) -> None:
    """Weights and activations in int8 by blocks of 32: the closest that onnxruntime has."""
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
    # Of a transformer the products alone: with what lies between them it is wrong, nobody's peer.
    products = ["MatMul", "Gemm"] if "attention_mask" in model.evaluation else None
    quantize_static(
        ready,
        out,
        _Reader(_calibration(model)),
        op_types_to_quantize=products,
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
    """Return 100 of the rows that the model is compiled with, or all, without padding."""
    names = list(model.unseen[0])
    feeds = []
    for index in range(min(100, len(model.evaluation[names[0]]))):
        feed = {name: model.evaluation[name][index : index + 1] for name in names}
        if "attention_mask" in feed:
            length = int(feed["attention_mask"].sum())
            feed = {name: array[:, :length] for name, array in feed.items()}
        feeds.append(feed)
    return feeds


def _openvino(model: Model) -> Iterator[Peer]:
    import openvino as ov

    core = ov.Core()

    def run_of(network: Any, precision: str, threads: int) -> Run:
        config = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        config |= {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
        request = core.compile_model(network, "CPU", config).create_infer_request()
        return lambda feed: list(request.infer(feed).values())

    for precision, words in (("f32", "fp32"), ("bf16", "bf16")):
        opens = partial(run_of, core.read_model(model.source), precision)
        yield Peer(f"openvino {words}", opens, _mb(model.source))
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
    for precision, words in (("f32", ""), ("bf16", ", the rest in bf16")):
        opens = partial(run_of, quantised, precision)
        yield Peer(f"openvino int8, nncf{words}", opens, float("nan"), seconds)
    if _operators(model.source)["Conv"]:
        return  # whose weights it leaves: the same graph a second time
    began = time.perf_counter()
    weights = nncf.compress_weights(core.read_model(model.source))
    seconds = time.perf_counter() - began
    for precision, words in (("f32", ""), ("bf16", ", the rest in bf16")):
        opens = partial(run_of, weights, precision)
        yield Peer(f"openvino int8 weights, nncf{words}", opens, float("nan"), seconds)


def _judge(model: Model, forms: Sequence[Form], known: Mapping[str, Form]) -> None:
    """Set the share of unseen rows on which each form agrees with the reference, if not known."""
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
        if form.name in known:
            continue
        own = [form.run(feed)[:1] for feed in model.unseen]
        pairs = list(zip(right, own, strict=True))
        form.agrees = float(np.mean([agreement(f, g, [spec]) for f, g in pairs]))
        far = sum(difference(f, g, [spec]) > EPSILON for f, g in pairs)
        form.beyond, form.beyond_bound = far / len(pairs), upper_bound(far, len(pairs))
        if model.labels is not None:
            before, after = (
                np.array([row[0].argmax() for row in outputs]) == model.labels
                for outputs in (right, own)
            )
            lost, won = int((before & ~after).sum()), int((after & ~before).sum())
            form.loss = (lost - won) / len(model.labels)
            form.loss_bound = paired_loss_bound(lost, won, len(model.labels))
            form.widened = _widened(model, right, own)


def _widened(model: Model, right: Sequence[list[Array]], own: Sequence[list[Array]]) -> float:
    """Return by how much what lies between groups may be wider than the reference's, as gated."""
    labels = np.asarray(model.labels) == 1
    source, variant = (np.array([row[0].argmax() == 1 for row in of]) for of in (right, own))
    least, worst = fairness.rows_needed(MOST_DISPARITY, 0.95), 0.0
    for column, values in model.unseen_groups.items():
        members = {str(group): values == group for group in np.unique(values)}
        told = fairness.disparities(column, members, labels, source, variant, least, 0.95)
        worst = max(worst, *(one.widened_bound or 0.0 for one in told))
    return worst


def _measure(model: Model, forms: Sequence[Form], rounds: int, threads: int) -> None:
    """Time every form at every cell, from cell to cell as traffic does, in an order of chance.

    Who follows whom would be part of the result else: what one leaves in the caches, and threads
    of an engine that go on waiting for work on the only CPU for a while. Peers that after some
    rounds of a cell take half as long again as the fastest that ours is compared with drop out of
    it, and with them those that do not pass, which none is compared with: those rounds show them.
    With several threads a form has all its cells in turn, once the threads of the one before it
    have gone to sleep: onnxruntime's go on for 45 ms.
    Small models are loaded anew twice on the way: where their weights come to lie makes two
    sessions on one file differ by up to 12 % in calls of 40 us.
    """
    order, random = list(forms), np.random.default_rng(SEED)
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
        for done in range(rounds):
            if done and done % -(-rounds // 3) == 0 and _mb(model.source) <= _SMALL_MB:
                for form in forms:
                    form.run = form.opens()
                    for feed in feeds.values():
                        form.run(feed)
            turns = []
            for cell in feeds:
                random.shuffle(order)
                left = _left(model, order, cell) if done >= _ALL_ROUNDS else order
                turns += [(form, cell) for form in left]
            if threads > 1:
                turns.sort(key=lambda turn: order.index(turn[0]))
            before = None
            for form, cell in turns:
                if threads > 1 and form is not before:
                    time.sleep(_ASLEEP)
                    form.run(feeds[cell])
                began = time.perf_counter()
                for _ in range(repeats[cell]):
                    form.run(feeds[cell])
                form.seconds[cell].append((time.perf_counter() - began) / repeats[cell])
                before = form


def _left(model: Model, forms: Sequence[Form], cell: tuple[int, int]) -> list[Form]:
    """Return which peers may be the fastest that one of ours is compared with, and ours."""
    ours = [form for form in forms if form.name.startswith("lrai")]
    peers = [form for form in forms if not form.name.startswith("lrai")]
    rivals = [form for form in peers if any(_is_rival(model, form, own) for own in ours)]
    alike = [form for form in rivals if form.name.startswith("onnxruntime")]
    close = [form for form in rivals if form.beyond_bound <= model.delta]
    names = {form.name for form in ours} | {REFERENCE}
    for group in (rivals, alike, close):
        medians = {form.name: float(np.median(form.seconds[cell])) for form in group}
        most = _TOO_SLOW * min(medians.values(), default=0.0)
        names |= {name for name, median in medians.items() if median <= most}
    return [form for form in forms if form.name in names]


def _feed(model: Model, rows: int, length: int) -> Feed:
    names = list(model.unseen[0])
    feed = {name: np.repeat(model.unseen[0][name], rows, axis=0) for name in names}
    if length:
        feed = {name: np.resize(array[0], (rows, length)) for name, array in feed.items()}
    return {name: np.ascontiguousarray(array) for name, array in feed.items()}


def _ratio(form: Form, other: Form, cell: tuple[int, int]) -> Interval:
    pairs = zip(form.seconds[cell], other.seconds[cell], strict=False)  # who dropped out has fewer
    return interval([own / theirs for own, theirs in pairs])


def _passes(model: Model, form: Form) -> bool:
    """Return whether a form says what the source says: where labels are known, by accuracy."""
    if model.labels is not None:
        fair = form.widened <= MOST_DISPARITY
        return fair and form.loss_bound <= model.max_accuracy_loss
    return form.agrees >= LEAST_AGREEMENT


def _is_rival(model: Model, peer: Form, ours: Form) -> bool:
    """Return whether a peer passes, or is shown to be no worse than ours, where few rows tell."""
    if model.labels is None:
        return _passes(model, peer) or peer.agrees >= ours.agrees
    alike = peer.loss_bound <= ours.loss_bound and peer.widened <= max(ours.widened, MOST_DISPARITY)
    return _passes(model, peer) or alike


def _show(model: Model, forms: Sequence[Form], threads: int) -> list[dict[str, Any]]:
    reference, own = forms[0], next(form for form in forms if form.name.startswith("lrai:"))
    columns = [f"{rows}" + (f" x {length}" if length else "") for rows, length in model.cells]
    rows, lines = [], []
    for form in forms:
        ratios = {cell: _ratio(form, reference, cell) for cell in model.cells}
        agrees = f"{form.agrees:.3f}" if model.trained else ""
        beyond = f"{form.beyond:.3f}" if model.trained else ""
        loss = f"{form.loss:+.4f}" if model.labels is not None else ""
        figures = [f"{ratio.median:.2f}" for ratio in ratios.values()]
        size = "" if np.isnan(form.size_mb) else f"{form.size_mb:.1f}"
        who, _, what = form.name.partition(": " if ": " in form.name else " ")
        lines.append([who, what, *figures, agrees, loss, beyond, size, f"{form.build_seconds:.0f}"])
        rows.append(
            {
                "model": model.name,
                "threads": threads,
                "form": form.name,
                "ratios": {f"{n}x{length}": list(r) for (n, length), r in ratios.items()},
                "agreement": form.agrees if model.trained else None,
                "accuracy_loss": form.loss if model.labels is not None else None,
                "widened_bound": form.widened if model.groups else None,
                "beyond_epsilon": form.beyond if model.trained else None,
                "beyond_epsilon_bound": form.beyond_bound if model.trained else None,
                "delta": model.delta,
                "passes": not model.trained or _is_rival(model, form, own),
                "memory_mb": None if np.isnan(form.memory_mb) else form.memory_mb,
                "beside_mb": form.beside_mb,
                "beside_file_mb": form.beside_file_mb,
                "size_mb": None if np.isnan(form.size_mb) else form.size_mb,
                "build_seconds": form.build_seconds,
            }
        )
    harness.show(
        f"{model.name}, {threads} thread(s)",
        ["", "form", *columns, "agrees", "loss", "> eps", "MB", "s to make"],
        lines,
        "latency to onnxruntime fp32 with its defaults, medians of rounds in turn; rows x length\n"
        f"of unseen rows: accuracy lost, share that differs by more than {EPSILON}\n"
        "ours take from one another what of them is made, so the first takes longest to make",
    )
    return rows


def _checks(model: Model, forms: Sequence[Form], threads: int) -> Iterator[Check]:
    """Compare each of ours with the fastest peer that passes: of its own engines, and of all."""
    reference, peers = forms[0], [form for form in forms if not form.name.startswith("lrai")]
    for ours in (form for form in forms if form.name.startswith("lrai")):
        kind, name = ours.name.partition(":")[0], f"{model.name}, {threads} thread(s)"
        alike = [p for p in peers if "openvino" in kind or p.name.startswith("onnxruntime")]
        rivals = [peer for peer in alike if _is_rival(model, peer, ours)]
        if kind in (_CLOSE, _CLOSE_TOO):
            rivals = [p for p in rivals if p is reference or p.beyond_bound <= model.delta]
            goal, bound = f"<= {model.delta}", ours.beyond_bound
            yield Check(f"{name}: {kind}, share beyond, bound", bound, goal, bound <= model.delta)
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
            if kind not in (_CLOSE, _CLOSE_TOO) and (least := model.faster.get(cell, 0)):
                times = 1 / _ratio(ours, reference, cell).median
                yield Check(f"{at}: {kind}, times fp32", times, f">= {least}", times >= least)
        slowest = max((_ratio(ours, reference, cell) for cell in model.cells), key=lambda r: r.low)
        words = f"{name}: {kind}, slowest to fp32, {slowest}"
        yield Check(words, slowest.median, "interval reaches 1", slowest.low <= 1)
        if model.labels is not None:
            goal, most = f"<= {MOST_LOSS}", ours.loss <= MOST_LOSS
            yield Check(f"{name}: {kind}, accuracy lost on unseen rows", ours.loss, goal, most)
        elif model.trained:
            goal, said = f">= {LEAST_AGREEMENT}", _passes(model, ours)
            yield Check(f"{name}: {kind} agrees on unseen rows", ours.agrees, goal, said)
        if model.smaller and kind == "lrai":
            saved = 1 - ours.size_mb / reference.size_mb
            goal = f">= {model.smaller}"
            words = f"{name}: {kind}, share smaller, file: {ours.size_mb:.0f} MB"
            words += f" (+ {ours.beside_file_mb:.0f} beside it) of {reference.size_mb:.0f}"
            yield Check(words, saved, goal, saved >= model.smaller)
            saved = 1 - ours.memory_mb / reference.memory_mb
            words = f"{name}: {kind}, share of memory less, loaded alone: {ours.memory_mb:.0f} MB"
            words += f" (+ {ours.beside_mb:.0f} beside it) of {reference.memory_mb:.0f}"
            yield Check(words, saved, goal, saved >= model.smaller)


def _together(rows: Sequence[Mapping[str, Any]], *, extras: bool) -> Iterator[Check]:
    """Compare ours with the best peer that passes over all cells, as geometric means."""
    for who, engine in ((_CLOSE, "onnxruntime"), (_CLOSE_TOO, "")):
        near = [row for row in rows if str(row["form"]).startswith(f"{who}:")]
        close = {row["model"]: _times_as_close(row, rows, engine) for row in near}
        if close:
            best = max(close, key=close.__getitem__)
            peer = "the fastest peer" + f" of {engine}" * bool(engine)
            said = f"{who}, times as fast as {peer}, on {best}"
            yield Check(said, close[best], f">= {CLOSE_TIMES}", close[best] >= CLOSE_TIMES)
    kinds = {"lrai:": "onnxruntime"} | ({"lrai with openvino:": ""} if extras else {})
    for kind, engine in kinds.items():
        logs: dict[str, list[float]] = {}
        for model, threads in sorted({(row["model"], row["threads"]) for row in rows}):
            group = [r for r in rows if (r["model"], r["threads"]) == (model, threads)]
            ours = next(r for r in group if r["form"].startswith(kind))
            peers = [r for r in group if not r["form"].startswith("lrai") and r["passes"]]
            rivals = [r for r in peers if r["form"].startswith(engine)]
            for cell, found in ours["ratios"].items():
                best = min(r["ratios"][cell][0] for r in rivals)
                logs.setdefault(model, []).append(float(np.log(found[0] / best)))
        value = float(np.exp(np.mean([one for own in logs.values() for one in own])))
        who = f"{kind.rstrip(':')} to the fastest peer" + f" of {engine}" * bool(engine)
        yield Check(f"all cells: {who}", value, "<= 1", value <= 1)
        if not engine and len(logs) >= 3:
            ahead = [model for model, own in logs.items() if np.exp(-np.mean(own)) >= AHEAD]
            said = f"models on which it is {AHEAD} times as fast: {', '.join(ahead) or 'none'}"
            yield Check(said, len(ahead), ">= 3", len(ahead) >= 3)


def _times_as_close(
    ours: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], engine: str
) -> float:
    """Return how many times as fast it is as the fastest peer that is as close, in the mean."""
    peers = [
        row
        for row in rows
        if (row["model"], row["threads"]) == (ours["model"], ours["threads"])
        and row["form"].startswith(engine)
        and not row["form"].startswith("lrai")
        and row["passes"]
        and (row["form"] == REFERENCE or row["beyond_epsilon_bound"] <= ours["delta"])
    ]
    logs = [
        np.log(min(peer["ratios"][cell][0] for peer in peers) / found[0])
        for cell, found in ours["ratios"].items()
    ]
    return float(np.exp(np.mean(logs)))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="folder of benchmark data: real sentences")
    parser.add_argument("--extras", action="store_true", help="with OpenVINO, ours and as a peer")
    parser.add_argument("--quick", action="store_true", help="three minutes instead of thirty")
    parser.add_argument("--only", nargs="*", default=(), help="these models")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
