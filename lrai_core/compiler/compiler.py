"""`compile`: the passes in order, from a model file to an artifact. Read this first.

load → axes → rows → candidates → profile → gate → choose → certify → write. Each pass needs what
the one before ensures; the state they share is `_Compilation`.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import numpy as np
import onnx

from lrai_core import artifact as store
from lrai_core.artifact import Artifact, Manifest, Source, Target, Variant
from lrai_core.compiler import gate, search
from lrai_core.compiler.axes import apply_axes, assume_axes, confirm_axes, with_choices
from lrai_core.compiler.gate import Conditions, Judged, Metric, Outputs, Tick
from lrai_core.compiler.model import SharedWeights, declared, find_importer, load_model
from lrai_core.compiler.search import Builder, Calls, Candidate, Material, Sample
from lrai_core.config import available_bytes, available_cpus
from lrai_core.engine.engine import Engine, Session, find_engine, isa_class
from lrai_core.errors import VERSION, CompileError, EngineError, UsageError, shorten
from lrai_core.protocol import OutputMap, Signature
from lrai_core.verifier.certificate import Spec, write_certificate
from lrai_core.verifier.sample import Data, Rows, disjoint, read_rows, save_rows
from lrai_core.verifier.spec import FAR, MEASURES, round_up
from lrai_core.verifier.verifier import failing, issue

_SEARCH_SHARE: Final = 0.2  # of the evaluation rows; the rest is the gate's
_HELD: Final = 6  # answers to a row, at a time: of the source, alone and in batches, in half of all
_log: Final = logging.getLogger("lrai.compiler")


class Step(NamedTuple):
    """Where a compilation is: the pass, what it works on, and how far it is."""

    name: str
    detail: str = ""
    done: int = 0
    total: int = 0


Progress = Callable[[Step], None]


def compile(
    model: str | Path | Any,
    *,
    out: str | Path,
    calibration: Data | None = None,
    evaluation: Data | None = None,
    metric: Metric = "top1",
    output_map: OutputMap = "raw",
    max_accuracy_loss: float = 0.01,
    epsilon: float | None = None,
    delta: float = 0.01,
    groups: Sequence[str] = (),
    max_disparity: float = 0.01,
    axes: str | Path | None = None,
    calls: Sequence[tuple[int, int]] = (),
    objective: str = "latency",
    keep: int | None = None,
    engines: Sequence[str] = (),
    threads: int = 0,
    keep_evaluation: int | None = None,
    seed: int = 0,
    minutes: float | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Compile an ONNX model into an artifact: fp32, and the fastest forms that pass the gate.

    Args:
        model: ONNX file, opset 17 or later (lower is upgraded where possible); or what another
            installed importer reads: a `.toml`, the folder of a SavedModel, a file of XGBoost,
            LightGBM or skops; or a model in memory, which `lrai_import.objects.compile` then
            compiles.
        out: Directory to write, `NAME.lrai`; must not exist.
        calibration: Rows to make forms with: they show ranges of activations, and where int8 does
            harm; 128 of them are drawn by `seed`. By default a tenth of the evaluation rows.
        evaluation: `.npz` with an array per input and optionally `label`, or the same as a mapping.
            A fifth serves calibration and search, the rest the gate. Without it only fp32 is kept.
        metric: What labels judge, `top1` or `top5`. They are of the first output with scores of
            classes; or else of the first with one score a row, which means 1 above 0.5, or above 0
            if the scores of fp32 are not all between 0 and 1.
        output_map: How outputs are compared: `raw`, `softmax` or `l2_normalised`.
        max_accuracy_loss: Largest loss in the metric, as a share, at 95 % confidence.
        epsilon: Difference to certify, and to demand that all but `delta` of inputs stay within. Of
            outputs that are compared as `raw` it decides in place of the 1 per cent. By default the
            99th percentile on the search rows is certified, and nothing is demanded.
        delta: Share of inputs that may differ by more than epsilon.
        groups: Names of arrays of the evaluation that say to which group a row belongs, for models
            of two classes with labels. Demographic parity and equalised odds may not widen between
            groups that have enough rows to tell; it is said which have not. Rows with equal inputs
            count once, as one that is drawn of them: let what tells people apart be an input.
        max_disparity: By how much these may widen, as a share, at 95 % confidence.
        axes: TOML file that states batch and length axes instead of finding them.
        calls: Rows and length (0 where there is none) of the calls that come most, as (8, 128):
            forms are measured and judged in these, too, and OpenVINO is compiled for each, which
            takes memory for the weights once more.
        objective: Which of the forms that pass is chosen: that of least `latency`, or that of least
            `memory` among those that are not slower than fp32; then forms with 4 bits are tried,
            too.
        keep: How many variants to keep, fp32 among them; at least 1, by default 2, or 3 if other
            engines are tried. With 3 or more, a variant that is faster than the chosen one for
            calls of some size serves those, and is loaded beside it.
        engines: Engines to try beside onnxruntime: `openvino`. Where the artifact serves, the
            chosen variant may need them; if they are missing there, the next one that can serves.
        threads: Engine threads to measure with; 0 for the CPUs that there are, or one where all
            calls take less than 2 ms, as it is served then.
        keep_evaluation: Gate rows to keep in the artifact, with their labels and groups, for
            certificates and for measuring it elsewhere; by default as many as fit 16 MiB, at most
            what fit 256 MiB.
        seed: Decides how the evaluation rows are split.
        minutes: About how long it may take; then the best so far is kept. A quarter of the time is
            for making forms; after half of it they have been measured, in three rounds at least;
            after three quarters no further ones are looked at. What has not been judged when the
            time is up is not kept. fp32 is always made and judged, and one of those looked at, too.
        cache: Folder to keep forms in. Another compilation of the same model with the same rows and
            engines, after this one or instead of it, finds them there. Timings are taken anew:
            those of two times cannot be compared.
        progress: Told of every step.

    Raises:
        CompileError: The model, or the data, cannot be used.
        UsageError: `out` exists, or an argument is out of range.
        EnvironmentProblem: The disk is full or read-only, or an engine is not installed.
    """
    if not (isinstance(model, str) or hasattr(model, "__fspath__")):
        return cast("Artifact", find_importer("Object")(**locals()))
    model, out = Path(model), Path(out)
    conditions = Conditions(metric, max_accuracy_loss, epsilon, delta, tuple(groups), max_disparity)
    choices = {"output_map": (output_map, MEASURES), "objective": (objective, search.OBJECTIVES)}
    for name, (got, known) in choices.items():
        if got not in known:
            raise UsageError(f"{name} {shorten(got)!r} is unknown; known: {', '.join(known)}")
    keep = (3 if engines else 2) if keep is None else keep
    counts = {"keep": keep, "seed": seed, "threads": threads, "keep_evaluation": keep_evaluation}
    for name, given in counts.items():
        if (given or 0) < (least := int(name == "keep")):  # fp32 is always kept
            raise UsageError(f"{name} is {given}, at least {least} is needed")
    if minutes is not None and not minutes > 0:
        raise UsageError(f"minutes is {minutes}, it must be above 0")
    if evaluation is None and (judged := "epsilon" * bool(epsilon) or "groups" * bool(groups)):
        raise UsageError(f"{judged} needs evaluation rows to be judged on")
    if not out.name.isprintable():
        raise UsageError(f"{shorten(repr(out.name))}: a name of an artifact is printable UTF-8")
    builders = list(map(search.find_builder, dict.fromkeys(("onnxruntime", *engines))))
    report = progress or (lambda _: None)
    with store.writing(out) as folder:
        # On the disk of the artifact, which is the one that is said to be full, and gone with it.
        scratch = Path(cache) if cache else folder / ".scratch"
        with store.disk_errors(Path(cache or out)):
            scratch.mkdir(parents=True, exist_ok=True)
        work = _Compilation(folder, scratch, conditions, threads or available_cpus(), report)
        work.seconds, work.objective = 60 * (minutes or math.inf), objective
        asked = {"event": "asked", **asdict(conditions), "keep_evaluation": keep_evaluation}
        asked |= {"axes": axes is not None, "calibration": calibration is not None, "seed": seed}
        work.log.append(asked | {"engines": [*engines], "keep": keep, "minutes": minutes})
        work.load(model)
        work.find_axes(None if axes is None else Path(axes), evaluation)
        work.signature = with_choices(work.signature, output_map, calls)
        work.split_rows(calibration, evaluation, seed)
        if not threads:
            work.settle_threads()
        with store.disk_errors(Path(cache or out)):
            work.build(builders)
        work.measure()
        work.judge(keep)
        work.write(out.name.removesuffix(".lrai"), keep_evaluation)
    return Artifact.open(out, verify=False)


@dataclass(slots=True)
class _Compilation:
    """What the passes share; each documents what it requires and ensures."""

    folder: Path
    scratch: Path
    conditions: Conditions
    threads: int
    progress: Progress
    engine: Engine = field(default_factory=lambda: find_engine("onnxruntime"))
    log: list[dict[str, Any]] = field(default_factory=list)
    shared: SharedWeights = field(init=False)
    source: Source = field(init=False)
    reference: Session = field(init=False)
    signature: Signature = field(init=False)
    proto: onnx.ModelProto = field(init=False)
    rows: Rows | None = None
    sample: Rows | None = None
    search: Rows | None = None
    gate: Rows | None = None
    candidates: list[Candidate] = field(default_factory=list)
    judged: int = 1
    began: float = field(default_factory=time.monotonic)
    seconds: float = math.inf
    objective: str = "latency"
    kept: list[tuple[Candidate, Judged | None]] = field(default_factory=list)

    def load(self, path: Path) -> None:
        """Ensure: source stored, its graph referring to the weights' file; a session on it."""
        self.progress(Step("load", path.name))
        self.proto, self.source = load_model(path, self._notify)
        graph = self.folder / self.source.file
        graph.parent.mkdir()
        self.shared = SharedWeights(graph.parent)
        self.shared.write(self.proto, graph)
        self.signature = declared(self.proto)  # its weights are elsewhere
        self.reference = self.engine.load(graph, weights=graph.parent, threads=self.threads)

    def find_axes(self, axes: Path | None, evaluation: Data | None) -> None:
        """Require: reference. Ensure: signature with axes, distinct rows read with it."""
        self.progress(Step("axes"))
        if axes is not None:
            self.signature = apply_axes(self.signature, axes)
            self._read(evaluation, self.signature)
        else:
            assumed = assume_axes(self.signature)
            self._read(evaluation, assumed)
            some = self.rows.inputs[:256] if self.rows else []
            try:
                self.signature, found = confirm_axes(self.signature, assumed, self.reference, some)
            except EngineError as error:
                if some:
                    raise
                found = f"axes unknown, the model does not run on ones: {error}; state --axes"
            self._notify(found)
            if self.signature.inputs != assumed.inputs:
                self._read(evaluation, self.signature)

    def split_rows(self, calibration: Data | None, evaluation: Data | None, seed: int) -> None:
        """Require: rows. Ensure: disjoint sample, search and gate rows, enough of them."""
        read = partial(read_rows, signature=self.signature, what="calibration")
        given = None if calibration is None else read(calibration)[0]
        if self.rows is None or evaluation is None:
            self._notify("no evaluation data: fp32 alone; rows (--evaluation) buy int8, certified")
            return
        if given is not None:
            disjoint(given, self.rows, "calibration and evaluation")
            # Forms may be made of the first ones only, and they may be sorted.
            given = given.take(np.random.default_rng(seed).permutation(len(given)).tolist())
        order = np.random.default_rng(seed).permutation(len(self.rows)).tolist()
        answer = self.reference.run(search.longest(self.rows.inputs, self.signature)[0])
        each = _HELD * max(1, sum(array.nbytes for array in answer))
        if (most := available_bytes() // each) < len(order):
            self._notify(f"{len(order) - most} rows left out: memory lacks for their answers")
            order = order[:most]
        cut = round(len(order) * _SEARCH_SHARE)
        own = 0 if given is not None else cut // 2  # of the search rows, what forms are made for
        self.sample = given or self.rows.take(order[:own])
        self.search, self.gate = self.rows.take(order[own:cut]), self.rows.take(order[cut:])
        disjoint(self.search, self.gate, "search and gate")
        gate.check_row_count(self.gate, self.conditions, cut, self.signature)
        gate.check_labels(self.reference.run(self.gate.inputs[0]), self.gate, self.conditions)

    def settle_threads(self) -> None:
        """Require: search rows. Ensure: one thread where that is what calls are served with."""
        graph = self.folder / self.source.file
        one = self.engine.load(graph, weights=graph.parent, threads=1)
        if self.search and search.is_short(one, self._calls()):
            self.reference, self.threads = one, 1

    def build(self, builders: Sequence[Builder]) -> None:
        """Require: proto. Ensure: a candidate per form and pass set, fp32 first."""
        rows, it = self.sample, self.signature
        sample = None if rows is None else Sample(rows.inputs, it.outputs, it.inputs, it.calls)
        of = (self.proto, self.shared, self.scratch, sample, self.threads, self.objective)
        material = Material(*of, until=self._at(0.25))
        tick = self._begin("build", sum(builder.steps for builder in builders), "fp32")
        for builder in builders:
            self.candidates += search.build(builder, material, tick, self._reject)
        if not self.candidates or self.candidates[0].form != "fp32":
            raise CompileError(f"no form runs: {next(x['why'] for x in self.log if 'kept' in x)}")

    def measure(self) -> None:
        """Require: candidates. Ensure: latency of each, one pass set per form: the fastest."""
        tick = self._begin("profile", search.ROUNDS, f"{len(self.candidates)} candidates")
        try:
            for candidate, why in search.refusing(self.candidates, self._calls()):
                self.candidates.remove(candidate)
                self._reject(candidate.name, why)
            search.profile(self.candidates, self._calls(), tick, self._at(0.5))
        except EngineError as error:
            if self.search:
                raise
            self._notify(f"not measured, the model does not run on ones: {error}")
        fastest: dict[str, Candidate] = {}
        for candidate in sorted(self.candidates, key=lambda c: -c.speedup):
            best = fastest.setdefault(candidate.form, candidate)
            if best is not candidate:
                self._reject(candidate.name, f"{candidate.pace}, slower than {best.name}")
        self.candidates = list(fastest.values())

    def judge(self, keep: int) -> None:
        """Require: measured candidates. Ensure: those to keep, the chosen one first, fp32 last.

        What would serve best is judged first, and no more once enough have passed; each has its own
        part of the error, whatever becomes of the others. Where that would be too little
        (`gate.errors`), each has all of it, from the closest of the search rows on, until one
        fails. So none passes by luck (Angelopoulos et al. 2021, "Learn then Test").
        """
        fp32 = next(candidate for candidate in self.candidates if candidate.form == "fp32")
        if self.gate is None or self.search is None:
            self.kept = [(fp32, None)]
            return
        front = self._front(self.search, keep, fp32)
        self.judged = 1 + len(front)  # fp32 is one that may be chosen
        tick = self._begin("profile", search.ROUNDS, "long calls")
        with suppress(EngineError):  # which may be memory: then smaller ones tell
            search.profile([fp32, *front], self._calls(), tick, self._at(0.5))
        tick = self._begin("gate", len(self.gate) * (3 + 2 * len(front)), "source")
        reference = gate.run_alone(self.reference, self.gate, self.threads, tick)
        verdict = partial(self._judge, self.gate, reference)
        last, passed = (fp32, verdict(fp32, gate.LEVEL, tick)), dict[str, Judged | None]()
        memory = self.objective == "memory"
        order = sorted(front, key=lambda one: (one.size_bytes * memory, -one.speedup))
        parts = gate.errors(self.gate, self.conditions, len(order))
        errors = dict(zip((one.form for one in order), parts, strict=False))
        if not parts[-1]:
            each = ((one.form, verdict(one, gate.LEVEL, partial(tick, one.form))) for one in front)
            passed = dict(takewhile(lambda one: one[1], each))
            order = [one for one in order if one.form in passed]
            for one in front[len(passed) + 1 :]:
                self._reject(one.name, f"{one.pace}; closer {front[len(passed)].name} did not pass")
        while order and len(self.kept) < keep - 1:  # then what makes most calls faster beside it
            kept = [one for one, _ in self.kept]
            alone = [one for one in order if not (kept or memory or one.little(fp32))] or order
            order.remove(best := self._best(alone, kept))
            told = partial(tick, f"{best.form}; best so far {(kept or [fp32])[0].form}")
            if best.little(fp32) and not (memory or (kept and best.worth(kept))):
                self._reject(best.name, f"{best.pace}: too little to serve all calls")
            elif found := passed.get(best.form) or verdict(best, 1 - errors[best.form], told):
                self.kept.append((best, found))
        for one in order if not passed else ():
            self._reject(one.name, f"{one.pace}; not judged, as it would not serve")
        self.kept.append(last)

    def _best(self, left: Sequence[Candidate], kept: Sequence[Candidate]) -> Candidate:
        """Return the fastest, or beside others what most calls gain by; or of the smallest."""
        if self.objective == "memory":
            most = search.WORTH * min(one.size_bytes for one in left)
            left = [one for one in left if one.size_bytes <= most]
        return max(left, key=lambda one: (one.gain(kept) if kept else 0.0, one.speedup))

    def _front(self, rows: Rows, keep: int, fp32: Candidate) -> list[Candidate]:
        """Return what is worth judging, the closest first: faster than closer ones, by engine."""
        others = [one for one in self.candidates if one is not fp32]
        worth = [fp32, *(one for one in others if self._worth(one, [], keep))]
        for one in (one for one in others if one not in worth):
            self._reject(one.name, f"{one.pace}: a gain of {search.WORTH} is needed")
        tick = self._begin("search", len(rows) * (1 + 2 * len(worth)), "source")
        reference = gate.run_alone(self.reference, rows, self.threads, tick)
        for candidate in tuple(worth):
            try:
                if sum(bool(one.gaps) for one in worth) > 1 and time.monotonic() > self._at(0.75):
                    raise ValueError("not looked at: the minutes are up")
                told = partial(tick, candidate.name)
                runs = gate.run(candidate.session, rows, self.signature, self.threads, told)
                candidate.gaps = gate.worst_gaps(reference, runs, self.signature.outputs)
                measured = {"speedup": round(candidate.speedup, 4), "gap": candidate.distance}
                self._record("searched", form=candidate.name, **measured)
                gate.check_search(candidate.gaps, self.conditions)
            except (EngineError, ValueError) as error:  # it does not run, or not in batches
                self._reject(candidate.name, f"{candidate.pace}; {error}")
                worth.remove(candidate)
        worth.sort(key=lambda candidate: (candidate.distance, -candidate.speedup))
        front = list[Candidate]()
        for own in (one for one in worth if one.form != "fp32"):
            # What serves some calls is no match for what serves all.
            least, some = min(own.speedup, search.WORTH), own.little(fp32)
            closer = [one for one in front if one.speedup >= least and one.little(fp32) <= some]
            closer = [one for one in closer if one.engine is own.engine]
            if not closer or self._worth(own, closer, keep):
                front.append(own)
            else:
                self._reject(own.name, f"{own.pace}; closer ones are as good")
        return front

    def _worth(self, candidate: Candidate, others: Sequence[Candidate], keep: int) -> bool:
        """Return whether it gains over others, or fp32: is faster, or smaller, or both."""
        others = others or [one for one in self.candidates if one.form == "fp32"]
        if self.objective == "latency":
            # One of more than two, beside fp32 and another, may serve some calls only.
            return (keep > 2 or candidate.speedup >= search.WORTH) and candidate.worth(others)
        smallest = min(other.size_bytes for other in others)
        smaller = smallest / candidate.size_bytes * (candidate.speedup >= 1)
        alike = [one for one in others if one.size_bytes <= search.WORTH * candidate.size_bytes]
        return smaller >= search.WORTH or (smaller * search.WORTH >= 1 and candidate.worth(alike))

    def _judge(
        self, rows: Rows, source: Outputs, candidate: Candidate, level: float, tick: Tick
    ) -> Judged | None:
        """Return what the gate says of a form at a level, None where it does not pass."""
        fp32 = candidate.form == "fp32"
        # One beside fp32, which is the first, may take its time: else all was for nothing.
        if sum("batch_effect" in line for line in self.log) > 1 and time.monotonic() > self._at(1):
            self._reject(candidate.name, f"{candidate.pace}; not judged: the minutes are up")
            return None
        try:
            runs = gate.run(candidate.session, rows, self.signature, self.threads, tick)
            found = gate.judge(runs, source, rows, self.signature.outputs, self.conditions, level)
        except (EngineError, ValueError) as error:
            if fp32:
                raise CompileError(f"the model does not run as its axes say: {error}") from None
            self._reject(candidate.name, str(error))
            return None
        if fp32 and not found.result.passed:
            wrong = "the optimised fp32 model does not give the source model's answers"
            axes = "its axes, found or stated, are wrong (see --axes), or it answers NaN"
            if self.conditions.epsilon is not None:
                axes += "; or epsilon is less than what float32 is rounded by"
            raise CompileError(f"{wrong}: {found.result.why}; {axes}")
        result, why = found.result, f"{candidate.pace}; {found.result.why}"
        measured = {"batch_effect": found.batch_effect, "difference": result.difference}
        measured["speedup"] = round(candidate.speedup, 4)
        self._record("candidate", form=candidate.name, kept=result.passed, why=why, **measured)
        return found if result.passed else None

    def write(self, name: str, keep_evaluation: int | None) -> None:
        """Require: forms to keep. Ensure: the folder is a whole artifact with its certificate."""
        self.progress(Step("write", name))
        variants = [self._variant(candidate, found) for candidate, found in self.kept]
        shutil.rmtree(self.folder / ".scratch", ignore_errors=self.scratch.parent != self.folder)
        chosen = variants[0]
        asked, engine, isa, threads = self.conditions, self.engine, isa_class(), self.threads
        self._record("decision", chosen=chosen.id, why=chosen.why)
        first, *others = [candidate for candidate, _ in self.kept]
        beside = [] if self.objective == "memory" else search.beside(first, others)
        together = tuple(one.form for one in beside)
        for one in beside:
            why = f"beside {chosen.id}: calls get {one.gain([first]):.2f} x as fast, in the mean"
            self._record("decision", chosen=one.form, why=why)
        made = [c for c, _ in self.kept if c.operators]
        near = [c for c in self.candidates if c.gaps and c.operators]
        for one in made or sorted(near, key=lambda c: c.distance)[:1]:  # or what came closest
            for operator in one.operators:
                self._record("operator", variant=one.form, **asdict(operator))
        store.write_lines(self.folder / store.QUANTIZATION_LOG, self.log)
        if self.gate is not None:
            # What a certificate speaks of can be run again: rows that are not kept do not count.
            self.gate = save_rows(self.folder / store.EVALUATION, self.gate, keep_evaluation)
            if self.gate.labels is not None:
                columns = [c.tolist() for c in (self.gate.labels, *self.gate.groups.values())]
                lines = [["label", *self.gate.groups], *zip(*columns, strict=True)]
                store.write_lines(self.folder / store.LABELS, lines)
        target = Target(isa=isa, engine=engine.name, engine_version=engine.version, threads=threads)
        manifest = Manifest(
            schema_version=store.SCHEMA_VERSION,
            lrai_version=VERSION,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            name=name,
            source=self.source,
            signature=self.signature,
            variants=tuple(variants),
            chosen=chosen.id,
            objective=self.objective,
            together=together,
            candidates=self.judged,
            demanded=(asked.epsilon, asked.delta) if asked.epsilon else None,
            target=target,
            files={},
        )
        store.write_manifest(self.folder, manifest)
        for candidate, found in self.kept:
            if candidate.form in (chosen.id, *together):
                self._certify(candidate, found)

    def _certify(self, candidate: Candidate, found: Judged | None) -> None:
        if found is None or not self.gate:
            return
        most = float(np.quantile(candidate.gaps or [0.0], 0.99, method="higher"))
        epsilon = self.conditions.epsilon or round_up(max(most, 1e-6))
        if epsilon >= FAR:
            return  # there is nothing to state
        failures = failing(found.gaps[: len(self.gate)], epsilon)
        artifact = Artifact.open(self.folder, verify=False)
        spec = Spec(epsilon=epsilon, variant=candidate.form)
        write_certificate(self.folder, issue(artifact, spec, self.gate, failures))

    def _variant(self, candidate: Candidate, found: Judged | None) -> Variant:
        graph = self.folder / "variants" / candidate.form / candidate.graph.name
        shutil.copytree(candidate.graph.parent, graph.parent)
        if candidate.shared:  # its own weights, too, are mapped by who loads them, and not copied
            self.shared.write(onnx.load(graph, load_external_data=False), graph)
        why = candidate.pace if candidate.form != "fp32" else "always kept"
        why += f"; {found.result.why}" if found else ""
        return Variant(
            id=candidate.form,
            engine=candidate.engine.name,
            engine_version="" if candidate.shared else candidate.engine.version,
            precision=candidate.precision,
            model=f"variants/{candidate.form}/{candidate.graph.name}",
            weights="source" if candidate.shared else "",
            size_bytes=candidate.size_bytes,
            passes_off=candidate.passes_off,
            latency=tuple(candidate.latency),
            speedup=candidate.speedup,
            gate=found.result if found else None,
            batch_effect=found.batch_effect if found else gate.EFFECT_FLOOR,
            why=f"chosen: {why}" if self.kept[0][0] is candidate else why,
        )

    def _read(self, evaluation: Data | None, signature: Signature) -> None:
        if evaluation is not None:
            groups = self.conditions.groups
            self.rows, repeated = read_rows(evaluation, signature, "evaluation", groups)
            if repeated:
                self._notify(f"evaluation: {repeated} repeated rows left out")

    def _calls(self) -> Calls:
        rows = self.search.inputs if self.search else []
        row = search.longest(rows, self.signature)
        return Calls(self.signature, row, search.points(self.signature, rows))

    def _at(self, share: float) -> float:
        """Return when this share of the time is gone, by `time.monotonic`."""
        return self.began + share * self.seconds

    def _begin(self, name: str, total: int, detail: str) -> Callable[..., None]:
        """Report a pass of `total` steps begun; return what reports each step."""
        done = count(1)
        self.progress(Step(name, detail, 0, total))
        return lambda detail="": self.progress(Step(name, detail, next(done), total))

    def _notify(self, message: str) -> None:
        _log.info(message)
        self._record("note", why=message)
        self.progress(Step("note", message))

    def _reject(self, form: str, why: str) -> None:
        self._record("candidate", form=form, kept=False, why=why)

    def _record(self, event: str, **fields: Any) -> None:
        self.log.append({"event": event, **fields})
