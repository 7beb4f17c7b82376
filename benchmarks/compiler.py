"""The compiler against what else quantises and runs an ONNX model on this CPU.

Every form of a model runs in turn with the others, round by round in another order, on the same
rows in the same batches; what counts is the ratio to ONNX Runtime in float32 with its defaults.
Peers of the base install: ONNX Runtime in float32 and its quantiser, dynamic and static, each with
its default optimizer passes and without those that cost int8 speed. With `--extras` also torch, not
compiled, OpenVINO in float32 and bfloat16, and OpenVINO in int8 as NNCF quantises it, each where it
is installed; those of OpenVINO with free shapes, and compiled for the shapes that are timed. With
`--olive` what Olive's automatic optimisation makes in float32 and int8, in an environment of its
own.

A form that does not say what the source model says is no peer: each is judged on rows that nothing
else has seen, by accuracy (with 95 % confidence one point is lost at most; of ours what is lost is
checked), or where there are no labels by agreement (98 % of rows). Of ours, of which other variants
may take larger calls, that is what is worst in calls of one row and of these sizes. Of embeddings
what a linear classifier of theirs is right on is shown beside that, and checked of ours. Networks
with random weights (BERT-base, ResNet-50, and EfficientNet-Lite0 without `--data`) say nothing of
that, so all their forms count.

    python benchmarks/compiler.py --data ../shared/data --quick
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, NamedTuple

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [
    str(_ROOT),
    *(p for p in sys.path if p and Path(p).resolve() != _ROOT / "benchmarks"),
]
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402 - after the lines above

import lrai_core as lrai  # noqa: E402
from benchmarks import compiler_memory, harness  # noqa: E402
from benchmarks.compiler_judge import EPSILON, MOST_DISPARITY, QUANTILES, Judge, Run, Said  # noqa: E402
from benchmarks.compiler_models import Array, Feed, Model, made  # noqa: E402
from benchmarks.compiler_olive import Olive  # noqa: E402
from benchmarks.compiler_peers import REFERENCE, Peer, peers_of  # noqa: E402
from benchmarks.harness import Check, Interval, console, interval  # noqa: E402
from benchmarks.host import end_on_sigterm  # noqa: E402
from benchmarks.processes import on_cpus  # noqa: E402
from lrai_core.artifact import QUANTIZATION_LOG  # noqa: E402
from lrai_core.engine.engine import find_engine, isa_class  # noqa: E402
from lrai_core.scheduler.latency import LatencyModel  # noqa: E402

AHEAD: Final = 1.05
MOST_BEHIND: Final = 1.03  # of the latency of the fastest peer that passes
LEAST_AGREEMENT: Final = 0.98
MOST_LOSS: Final = 0.01  # of accuracy, on rows that nothing has seen
CLOSE_TIMES: Final = 1.2  # as fast as the fastest peer that is as close, on one model at least
SEED: Final = 0
_CLOSE: Final = f"lrai within {EPSILON}"
_CLOSE_TOO: Final = f"lrai with openvino within {EPSILON}"
_GRID_ROWS, _GRID_THREADS = (1, 8, 32), (1, 2)  # of every model, were there the time for it
_ASLEEP: Final = 0.06  # seconds
_QUICK_MINUTES: Final = 1.5
# After these rounds a peer drops out of a cell if all of the interval of its ratio to the fastest
# that it competes with lies above this. Long calls of two sessions on one file take the same; short
# ones do not, and cost nothing.
_LONG_SECONDS: Final = 0.01
_LOOKS, _SLOWER = (5, 10, 20), 1.5
_LOOKS_LONG, _SLOWER_LONG = (3, 10, 20), 1.1

Cell = tuple[int, int]  # rows and length of a call


@dataclass(slots=True, eq=False)
class Form:
    """One way to run a model.

    Attributes:
        key: Of what says the same, whatever threads it runs on.
        threads: Of a call.
        sizes: Rows of the calls that it is judged in.
        said: What it says of unseen rows.
        memory_mb: Of a process that has it loaded, above one with a model of one operator; of
            ours the chosen variant.
        beside_mb: What serves beside that one adds to memory; to the files `beside_file_mb`.
        idle_file_mb: What is kept in the artifact beside what serves: fp32, the source.
        mix: Of ours see `mix_of`.
    """

    name: str
    key: Hashable
    threads: int
    opens: Callable[[], Run]
    size_mb: float
    build_seconds: float
    sizes: Sequence[int] = (1,)
    said: Said = field(default_factory=Said)
    memory_mb: float = float("nan")
    beside_mb: float = 0.0
    beside_file_mb: float = 0.0
    idle_file_mb: float = 0.0
    mix: str = ""
    seconds: dict[Cell, list[float]] = field(default_factory=dict)
    run: Run = field(init=False)

    def __post_init__(self) -> None:
        """Load it."""
        self.run = self.opens()

    @property
    def is_ours(self) -> bool:
        """Return whether LRAI has made it."""
        return self.name.startswith("lrai")

    @property
    def kind(self) -> str:
        """Return how ours was compiled."""
        return self.name.partition(":")[0]


class Kind(NamedTuple):
    """How a model is compiled, and with how many threads what comes of it is measured."""

    name: str
    engines: tuple[str, ...]
    epsilon: float | None
    counts: tuple[int, ...]


class Compiled(NamedTuple):
    """What came of it, how long it took, and the memory of each variant that serves."""

    artifact: lrai.Artifact
    seconds: float
    memory_mb: Sequence[float]
    idle_mb: float = 0.0
    mix: str = ""


@dataclass(slots=True)
class Whole:
    """What is asked of a run, and what it has found and taken so far.

    Attributes:
        seconds: By what they were spent on.
    """

    arguments: argparse.Namespace
    rounds: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add what the block takes to a part."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, judge, measure, print, write; return 1 where a check does not hold."""
    arguments = _arguments(argv)
    end_on_sigterm()
    whole = Whole(arguments, 5 if arguments.quick else 30)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lrai-compiler-")))
        olive = stack.enter_context(Olive(arguments.olive, scratch)) if arguments.olive else None
        models = made(scratch, arguments.data, arguments.only, quick=arguments.quick)
        while True:
            with whole.timed("models"):
                model = next(models, None)
            if model is None:
                break
            folder = scratch / model.name
            folder.mkdir()
            with whole.timed("peers"):
                peers = peers_of(model, folder, extras=arguments.extras, olive=olive)
            _compare(model, folder, peers, whole)
            shutil.rmtree(folder)  # or it would be written to the disk while others are timed
    packages = ["lrai", "onnxruntime", "numpy", *(["openvino"] if arguments.extras else [])]
    packages += filter(importlib.util.find_spec, ["torch", *(["nncf"] if arguments.extras else [])])
    checks = [*whole.checks, *_together(whole.rows, extras=arguments.extras)]
    spent = ", ".join(f"{part} {seconds:.0f}" for part, seconds in whole.seconds.items())
    console.print(f"seconds: {spent}")
    _say_not_measured(left := not_measured(whole.rows))
    return harness.conclude(
        "compiler",
        arguments.out,
        harness.environment(1, packages),
        whole.rows,
        checks,
        quick=arguments.quick,
        rounds=whole.rounds,
        seconds=whole.seconds,
        not_measured=left,
    )


def _compare(model: Model, folder: Path, peers: Sequence[Peer], whole: Whole) -> None:
    """Compile a model, measure it beside its peers, and add rows and checks."""
    judge, stayed, cpus = Judge(model), list[str](), sorted(os.sched_getaffinity(0))
    arguments, rounds = whole.arguments, whole.rounds
    counts: tuple[int, ...] = (1,) if arguments.quick or model.heavy else (1, 2)
    compiled = cache(partial(_compiled, model, folder, arguments))
    for threads in counts:
        try:
            with on_cpus(cpus[:threads]):
                # Who has dropped out of every cell with one thread does not come again.
                left = [peer for peer in peers if peer.name in (REFERENCE, *stayed) or not stayed]
                with whole.timed("loading"):
                    forms = [_theirs(peer, threads) for peer in left]
                with whole.timed("compiling"), on_cpus(cpus):
                    served = [
                        (kind, serving(kind, threads, compiled))
                        for kind in _kinds(model, counts, arguments)
                        if threads in kind.counts
                    ]
                forms += [_ours(model, kind.name, found, threads) for kind, found in served]
                with whole.timed("judging"), on_cpus(cpus):
                    asked = [(form.key, form.run, form.sizes) for form in forms]
                    said = judge.said(asked, threads)
                for form, one in zip(forms, said, strict=True):
                    form.said = one
                with whole.timed("measuring"):
                    _measure(model, forms, rounds, threads)
        except lrai.LraiError as error:  # the other models are measured all the same
            words = f"{model.name}, {threads} thread(s): {error}"
            whole.checks.append(Check(words, float("nan"), "it compiles", holds=False))
            continue
        theirs = [form for form in forms if not form.is_ours]
        stayed = [form.name for form in theirs if rounds in map(len, form.seconds.values())]
        whole.rows += _show(model, forms, threads, olive=bool(arguments.olive))
        whole.checks += _checks(model, forms, threads)


def _theirs(peer: Peer, threads: int) -> Form:
    """Return a peer as it is served with so many threads."""
    opens = partial(peer.opens, threads)
    form = Form(peer.name, peer.name, threads, opens, peer.size_mb, peer.build_seconds)
    form.memory_mb, form.sizes = peer.memory_mb, peer.sizes
    return form


def _kinds(model: Model, counts: tuple[int, ...], arguments: argparse.Namespace) -> list[Kind]:
    """Return how it is compiled; they share what was made of it before."""
    engines = ("openvino",) if arguments.extras else ()
    kinds = [Kind("lrai", (), None, counts)]
    kinds += [Kind("lrai with openvino", engines, None, counts)] * bool(engines)
    if model.delta and not arguments.quick:
        kinds.append(Kind(_CLOSE, (), EPSILON, (1,)))
        kinds += [Kind(_CLOSE_TOO, engines, EPSILON, (1,))] * bool(engines)
    return kinds


def serving(kind: Kind, threads: int, compiled: Callable[[Kind, int], Compiled]) -> Compiled:
    """Return what serves a kind with so many threads, compiled for all CPUs, 0, or for one.

    What is quick is served with one thread wherever it is: that is compiled once.
    """
    if max(kind.counts) > 1:
        found = compiled(kind, 0)
        if threads > 1 or found.artifact.manifest.target.threads == 1:
            return found
    return compiled(kind, 1)


def _compiled(
    model: Model, folder: Path, arguments: argparse.Namespace, kind: Kind, threads: int
) -> Compiled:
    out, began = folder / f"{kind.name.replace(' ', '-')}-{threads}.lrai", time.perf_counter()
    with console.status(f"{model.name}: lrai compiles"):
        artifact = lrai.compile(
            model.source,
            out=out,
            evaluation=model.evaluation,
            output_map=model.output_map,  # type: ignore[arg-type] # one of the three
            max_accuracy_loss=model.max_accuracy_loss,
            groups=model.groups,
            calls=model.cells,  # as peers that are compiled for fixed shapes are told
            engines=kind.engines,
            epsilon=kind.epsilon,
            delta=model.delta or 0.01,
            minutes=_QUICK_MINUTES if arguments.quick else None,
            # Every CPU runs rows all the same; with several, short calls are served with one.
            threads=threads,
            seed=SEED,
            cache=folder / "cache",
        )
    seconds, memory_mb = time.perf_counter() - began, list[float]()
    if kind.name == "lrai":  # before this process maps the same file, and shares it
        for variant in artifact.manifest.serving():
            memory_mb.append(compiler_memory.variant_mb(artifact, variant))
    idle_mb = compiler_memory.idle_mb(artifact)
    return Compiled(artifact, seconds, memory_mb, idle_mb, mix_of(artifact))


def mix_of(artifact: lrai.Artifact) -> str:
    """Return what the chosen variant leaves in float32, and why, "" where it is no mix.

    The why is the share of the harm that each operator does, in the log. What could not be in int8
    at all has none there, and is no choice.
    """
    text = artifact.file(QUANTIZATION_LOG).read_text(encoding="utf-8")
    told = [line for line in map(json.loads, text.splitlines()) if line["event"] == "operator"]
    own = [line for line in told if line["variant"] == artifact.manifest.chosen]
    low = [line for line in own if line["bits"] < 32 and line["op_type"] != "Gather"]
    harms = [line["harm"] for line in own if line["bits"] == 32 and line["harm"]]
    kept = f"{len(harms)} of {len(harms) + len(low)} operators in float32"
    return f"{kept}, which do {sum(harms):.0%} of the harm" if low and harms else ""


def _ours(model: Model, name: str, compiled: Compiled, threads: int) -> Form:
    artifact, memory_mb = compiled.artifact, compiled.memory_mb
    variants, own = artifact.manifest.serving(), artifact.manifest.target.threads
    ids = " + ".join(variant.id for variant in variants)
    ids += f", {own} thread(s)" * (own != threads)  # what is quick is served with one
    opens, size_mb = partial(_serve, artifact), variants[0].size_bytes / 1e6
    form = Form(f"{name}: {ids}", artifact.path, own, opens, size_mb, compiled.seconds)
    form.beside_file_mb = sum(variant.size_bytes for variant in variants[1:]) / 1e6
    form.idle_file_mb, form.mix = compiled.idle_mb, compiled.mix
    latency = LatencyModel(*(variant.latency for variant in variants))
    # What serves larger calls alone, beside another, says nothing of a single row.
    least = {latency.variant(*cell): cell[0] for cell in sorted(model.cells, reverse=True)}
    form.sizes = sorted({1, *least.values()})
    if memory_mb:
        form.memory_mb, form.beside_mb = memory_mb[0], sum(memory_mb[1:])
    return form


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


def _measure(model: Model, forms: Sequence[Form], rounds: int, threads: int) -> None:
    """Time every form at every cell, from cell to cell as traffic does, in an order of chance.

    Who follows whom would be part of the result else: what one leaves in the caches, and threads
    of an engine that go on waiting for work on the only CPU for a while. Peers that after some
    rounds of a cell cannot be the fastest that ours is compared with drop out of it, and with them
    those that do not pass, which none is compared with: those rounds show them.
    With several threads a form has all its cells in turn, once the threads of the one before it, if
    it has several, have gone to sleep: onnxruntime's go on for 45 ms.
    Where calls are short, all are loaded anew twice on the way: where their weights come to lie
    makes two sessions on one file differ by up to 12 % in calls of 40 us.
    """
    order, random = list(forms), np.random.default_rng(SEED)
    feeds = {cell: _feed(model, *cell) for cell in model.cells}
    repeats, left = dict[Cell, int](), dict[Cell, Sequence[Form]]()
    for cell, feed in feeds.items():
        for form in forms:
            form.run(feed)
            form.seconds[cell] = []
        began = time.perf_counter()
        forms[0].run(feed)
        repeats[cell] = max(1, int(2e-3 / max(time.perf_counter() - began, 1e-6)))
        left[cell] = forms
    last: Form | None = None
    with console.status(f"{model.name}: {len(forms)} forms, {rounds} rounds"):
        for done in range(rounds):
            if done and done % -(-rounds // 3) == 0 and max(repeats.values()) > 1:
                _load_anew([f for f in forms if any(f in on for on in left.values())], feeds)
                last = None
            turns = []
            for cell in feeds:
                random.shuffle(order)
                turns += [(form, cell) for form in order if form in left[cell]]
            if threads > 1:
                turns.sort(key=lambda turn: order.index(turn[0]))
            last = _take(turns, feeds, repeats, threads, last)
            left = {cell: still_in(model, on, cell) for cell, on in left.items()}


def _load_anew(forms: Sequence[Form], feeds: Mapping[Cell, Feed]) -> None:
    for form in forms:
        form.run = form.opens()
        for feed in feeds.values():
            form.run(feed)


def _take(
    turns: Sequence[tuple[Form, Cell]],
    feeds: Mapping[Cell, Feed],
    repeats: Mapping[Cell, int],
    threads: int,
    before: Form | None,
) -> Form | None:
    """Time a call of each, or the mean of several, after one another; return who came last."""
    for form, cell in turns:
        if threads > 1 and form is not before:
            if before is None or before.threads > 1:
                time.sleep(_ASLEEP)
            for feed in feeds.values():  # one may have a session for short calls, one for long ones
                form.run(feed)
        began = time.perf_counter()
        for _ in range(repeats[cell]):
            form.run(feeds[cell])
        form.seconds[cell].append((time.perf_counter() - began) / repeats[cell])
        before = form
    return before


def still_in(model: Model, forms: Sequence[Form], cell: Cell) -> Sequence[Form]:
    """Return the reference, ours, and the peers that may be the fastest that one is compared with.

    All, but after the rounds of a look; of these there are few, as each is a chance to be wrong.
    """
    seconds = forms[0].seconds[cell]
    is_long = float(np.median(seconds)) > _LONG_SECONDS
    looks, slower = (_LOOKS_LONG, _SLOWER_LONG) if is_long else (_LOOKS, _SLOWER)
    if len(seconds) not in looks:
        return forms
    stay = {forms[0], *(form for form in forms if form.is_ours)}
    for own in (form for form in forms if form.is_ours):
        rivals = _rivals(model, forms, own)
        best = _fastest(rivals, cell)
        stay |= {rival for rival in rivals if _ratio(rival, best, cell).low <= slower}
    return [form for form in forms if form in stay]


def _feed(model: Model, rows: int, length: int) -> Feed:
    names = list(model.unseen[0])
    feed = {name: np.repeat(model.unseen[0][name], rows, axis=0) for name in names}
    if length:
        feed = {name: np.resize(array[0], (rows, length)) for name, array in feed.items()}
    return {name: np.ascontiguousarray(array) for name, array in feed.items()}


def _ratio(form: Form, other: Form, cell: Cell) -> Interval:
    pairs = zip(form.seconds[cell], other.seconds[cell], strict=False)  # who dropped out has fewer
    return interval([own / theirs for own, theirs in pairs])


def _fastest(forms: Sequence[Form], cell: Cell) -> Form:
    """Return the fastest of those that have gone through all rounds of a cell."""
    most = max(len(form.seconds[cell]) for form in forms)
    through = (form for form in forms if len(form.seconds[cell]) == most)
    return min(through, key=lambda form: float(np.median(form.seconds[cell])))


def _rivals(model: Model, forms: Sequence[Form], ours: Form) -> list[Form]:
    """Return the peers that one of ours is compared with: those of its own engines that pass."""
    peers = [form for form in forms if not form.is_ours and _is_rival(model, form, ours)]
    if "openvino" not in ours.kind:
        peers = [peer for peer in peers if peer.name.startswith(("onnxruntime", "olive"))]
    if ours.kind in (_CLOSE, _CLOSE_TOO):
        peers = [p for p in peers if p is forms[0] or p.said.beyond_bound <= model.delta]
    return peers


def _passes(model: Model, form: Form) -> bool:
    """Return whether a form says what the source says: where labels are known, by accuracy."""
    said = form.said
    if model.labels is not None:
        return said.widened <= MOST_DISPARITY and said.loss_bound <= model.max_accuracy_loss
    return said.agrees >= LEAST_AGREEMENT


def _is_rival(model: Model, peer: Form, ours: Form) -> bool:
    """Return whether a peer passes, or is shown to be no worse than ours, where few rows tell."""
    theirs, own = peer.said, ours.said
    if model.labels is None:
        return _passes(model, peer) or theirs.agrees >= own.agrees
    is_fair = theirs.widened <= max(own.widened, MOST_DISPARITY)
    return _passes(model, peer) or (is_fair and theirs.loss_bound <= own.loss_bound)


def _show(
    model: Model, forms: Sequence[Form], threads: int, *, olive: bool
) -> list[dict[str, Any]]:
    """Print two tables, how fast forms are and what they say and take; return their rows."""
    reference, isa = forms[0], isa_class()
    columns = [f"{rows}" + f"x{length}" * bool(length) for rows, length in model.cells]
    rows, paces, lines = [], [], []
    for form in forms:
        ratios = {cell: _ratio(form, reference, cell) for cell in model.cells}
        who, _, what = form.name.partition(": " if ": " in form.name else " ")
        paces.append([who, what, *(f"{ratio.median:.2f}" for ratio in ratios.values())])
        lines.append([who, what * (not form.is_ours), *_figures(model, form)])
        rows.append(_row(model, forms, form, ratios) | {"threads": threads, "isa": isa})
    title = f"{model.name}, {threads} thread(s), {isa}"
    harness.show(
        title,
        ["", "form", *columns],
        paces,
        "latency to onnxruntime fp32 with its defaults, medians of rounds in turn; rows x length\n"
        + harness.ON_HUGE_PAGES
        + "\nolive: not given (--olive)" * (not olive),
    )
    harness.show(
        title,
        [
            *("", "form", _metric(model) or "", "lost", "agrees", *QUANTILES, f"> {EPSILON}"),
            *("MB", "memory", "s"),
        ],
        lines,
        "of unseen rows: accuracy, what of it is lost, and by how much the mapped output differs\n"
        "s: to make; ours take from one another what is made, so the first takes longest",
    )
    return rows


def _figures(model: Model, form: Form) -> list[str]:
    """Return what a form says, takes and took, as the table shows it."""
    said, shows = form.said, model.trained
    return [
        f"{said.accuracy:.4f}" if _metric(model) else "",
        f"{said.loss:+.4f}" if _metric(model) else "",
        f"{said.agrees:.3f}" if shows else "",
        *(f"{gap:.2g}" if shows else "" for gap in said.gaps),
        f"{said.beyond:.3f}" if shows else "",
        "" if np.isnan(form.size_mb) else f"{form.size_mb:.1f}",
        "" if np.isnan(form.memory_mb) else f"{form.memory_mb:.0f}",
        f"{form.build_seconds:.0f}",
    ]


def _row(
    model: Model, forms: Sequence[Form], form: Form, ratios: Mapping[Cell, Interval]
) -> dict[str, Any]:
    """Return what is written of a form; what is no number is written as null."""
    said, ours = form.said, [other for other in forms if other.is_ours]
    base = next(other for other in ours if other.kind == "lrai")
    return {
        "model": model.name,
        "form": form.name,
        "ratios": {_name(cell): list(ratio) for cell, ratio in ratios.items()},
        "rounds": {_name(cell): len(seconds) for cell, seconds in form.seconds.items()},
        "metric": _metric(model),
        "accuracy": said.accuracy,
        "accuracy_loss": said.loss if _metric(model) else None,
        "accuracy_loss_bound": said.loss_bound if _metric(model) else None,
        "agreement": said.agrees if model.trained else None,
        "widened_bound": said.widened if model.groups else None,
        "differences": dict(zip(QUANTILES, said.gaps, strict=True)) if model.trained else None,
        "beyond_epsilon": said.beyond if model.trained else None,
        "beyond_epsilon_bound": said.beyond_bound if model.trained else None,
        "delta": model.delta,
        "passes": not model.trained or _is_rival(model, form, base),
        "rival_of": [own.kind for own in ours if form in _rivals(model, forms, own)],
        "memory_mb": form.memory_mb,
        "beside_mb": form.beside_mb,
        "beside_file_mb": form.beside_file_mb,
        "idle_file_mb": form.idle_file_mb,
        "mix": form.mix,
        "size_mb": form.size_mb,
        "build_seconds": form.build_seconds,
    }


def _metric(model: Model) -> str | None:
    """Return what accuracy is of."""
    if model.labels is not None:
        return "top-1"
    return "probe" if model.probe else None


def _name(cell: Cell) -> str:
    return f"{cell[0]}x{cell[1]}"


def _checks(model: Model, forms: Sequence[Form], threads: int) -> Iterator[Check]:
    """Compare each of ours with the fastest peer that passes: of its own engines, and of all."""
    reference = forms[0]
    for ours in (form for form in forms if form.is_ours):
        kind, name = ours.kind, f"{model.name}, {threads} thread(s)"
        rivals, said = _rivals(model, forms, ours), ours.said
        if kind in (_CLOSE, _CLOSE_TOO):
            goal, bound = f"<= {model.delta}", said.beyond_bound  # float32 is within any epsilon
            words = f"{name}: {ours.name}, share beyond, bound"
            yield Check(words, bound, goal, bound <= model.delta)
        for cell in model.cells:
            at = f"{name}, {cell[0]}" + (f" x {cell[1]}" if cell[1] else "")
            best = _fastest(rivals, cell)
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
        if _metric(model):
            what = "accuracy of the probe" if model.probe else "accuracy"
            goal, most = f"<= {MOST_LOSS}", said.loss <= MOST_LOSS
            yield Check(f"{name}: {kind}, {what} lost on unseen rows", said.loss, goal, most)
        if model.labels is None and model.trained:
            goal, alike = f">= {LEAST_AGREEMENT}", _passes(model, ours)
            yield Check(f"{name}: {kind} agrees on unseen rows", said.agrees, goal, alike)
        if model.smaller and kind == "lrai":
            saved = 1 - ours.size_mb / reference.size_mb
            goal = f">= {model.smaller}"
            words = f"{name}: {kind}, share smaller, file: {ours.size_mb:.0f} MB"
            words += f" (+ {ours.beside_file_mb:.0f} beside it, + {ours.idle_file_mb:.0f} of fp32"
            words += f" and the source, idle) of {reference.size_mb:.0f}"
            yield Check(words, saved, goal, saved >= model.smaller)
            saved = 1 - ours.memory_mb / reference.memory_mb
            words = f"{name}: {kind}, share of memory less, loaded alone: {ours.memory_mb:.0f} MB"
            words += f" (+ {ours.beside_mb:.0f} beside it) of {reference.memory_mb:.0f}"
            yield Check(words, saved, goal, saved >= model.smaller)


def _together(rows: Sequence[Mapping[str, Any]], *, extras: bool) -> Iterator[Check]:
    """Compare ours with the best peer that passes over all cells, as geometric means."""
    for who, engine in ((_CLOSE, "onnxruntime"), (_CLOSE_TOO, "")):
        close = _paces(rows, who)
        mixes = {r["model"]: r["mix"] for r in rows if r["form"].startswith(f"{who}:") and r["mix"]}
        peer, goal = "the fastest peer" + f" of {engine}" * bool(engine), f">= {CLOSE_TIMES}"
        if mixes:
            paces = {model: -np.mean(close[model]) for model in mixes}
            best = max(paces, key=paces.__getitem__)
            times, where = float(np.exp(paces[best])), f"on {best}: {mixes[best]}"
            said = f"{who}, a mix, times as fast as {peer}, {where}"
            yield Check(said, times, goal, times >= CLOSE_TIMES)
        elif close:
            yield Check(f"{who}: no mix was chosen", float("nan"), goal, holds=False)
    kinds = {"lrai": "onnxruntime"} | ({"lrai with openvino": ""} if extras else {})
    for kind, engine in kinds.items():
        if not (logs := _paces(rows, kind)):
            continue
        value = float(np.exp(np.mean([one for own in logs.values() for one in own])))
        who = f"{kind} to the fastest peer" + f" of {engine}" * bool(engine)
        yield Check(f"all cells: {who}", value, "<= 1", value <= 1)
        if not engine and len(logs) >= 3:
            ahead = [model for model, own in logs.items() if np.exp(-np.mean(own)) >= AHEAD]
            said = f"models on which it is {AHEAD} times as fast: {', '.join(ahead) or 'none'}"
            yield Check(said, len(ahead), ">= 3", len(ahead) >= 3)


def _paces(rows: Sequence[Mapping[str, Any]], kind: str) -> dict[str, list[float]]:
    """Return by model what one kind of ours takes to its fastest rival, cell by cell, in logs."""
    logs: dict[str, list[float]] = {}
    for ours in (row for row in rows if row["form"].startswith(f"{kind}:")):
        alike = [r for r in rows if (r["model"], r["threads"]) == (ours["model"], ours["threads"])]
        rivals = [row for row in alike if kind in row["rival_of"]]
        for cell, found in ours["ratios"].items():
            # Who has dropped out of a cell is not the fastest.
            left = [r for r in rivals if r["rounds"][cell] == ours["rounds"][cell]]
            best = min(row["ratios"][cell][0] for row in left)
            logs.setdefault(ours["model"], []).append(float(np.log(found[0] / best)))
    return logs


def not_measured(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return by model which cells of the whole grid no row has: 1, 8, 32 rows with 1, 2 threads.

    Lengths, where there are any, are those that the model is measured with.
    """
    found: dict[str, list[str]] = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        seen = {(cell, row["threads"]) for row in own for cell in row["ratios"]}
        lengths = dict.fromkeys(cell.partition("x")[2] for cell, _ in sorted(seen))
        grid = itertools.product(_GRID_ROWS, lengths, _GRID_THREADS)
        left = [(f"{count}x{length}", threads) for count, length, threads in grid]
        found[model] = [
            f"{cell}, {threads}" for cell, threads in left if (cell, threads) not in seen
        ]
    return {model: cells for model, cells in found.items() if cells}


def _say_not_measured(left: Mapping[str, Sequence[str]]) -> None:
    for model, cells in left.items():
        words = f"not measured of {model} (rows x length, threads): {'; '.join(cells)}"
        console.print(words.replace("x0,", ","), markup=False)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="folder of benchmark data: real sentences")
    parser.add_argument("--extras", action="store_true", help="with OpenVINO, ours and as a peer")
    parser.add_argument("--olive", type=Path, help="Python of an environment that has Olive")
    parser.add_argument("--quick", action="store_true", help="three minutes instead of forty")
    parser.add_argument("--only", nargs="*", default=(), help="these models")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
