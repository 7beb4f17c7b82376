"""`lrai requalify NAME.lrai`: measure and judge again, on the machine that is to serve.

People compile on a build machine and serve on others, whose processors run other kernels: other
figures, another speed. What is found is kept beside the user's state, and the runtime goes by it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import numpy as np
import typer
from msgspec import Meta, MsgspecError, Struct, json
from msgspec.structs import replace
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lrai_core import (
    Artifact,
    ArtifactError,
    Certificate,
    ConditionNotMet,
    EnvironmentProblem,
    UsageError,
    certificates,
    load_config,
)
from lrai_core.artifact import LABELS, QUANTIZATION_LOG, Manifest, Target, Variant
from lrai_core.compiler import gate, search
from lrai_core.compiler.gate import Conditions, Judged, Metric
from lrai_core.compiler.search import Candidate
from lrai_core.config import available_cpus
from lrai_core.engine.engine import Engine, Session, find_engine, installed_version, isa_class
from lrai_core.errors import CalibrationError, EngineError, LraiError, shorten
from lrai_core.verifier.certificate import write_certificate
from lrai_core.verifier.sample import Rows
from lrai_core.verifier.verifier import environment, evaluation, failing, issue
from lrai_deployments.measured import keep

out: Final = Console(highlight=False, markup=False, emoji=False)
app: Final = typer.Typer(add_completion=False, rich_markup_mode=None)
_CELL: Final = 200
_MOST_BYTES: Final = 256 << 20  # of a file that is read line by line
_Share = Annotated[float, Meta(gt=0, lt=1)]

Report = Callable[[str, int, int], None]  # what is done, how far, of how much
Line = TypeVar("Line")


@dataclass(slots=True)
class Found:
    """What was found of an artifact here.

    Attributes:
        manifest: It, with what was measured here. What is not right here was made for elsewhere by
            it; where that is fp32 too, the source model serves.
        verdicts: By form what decided.
        certificates: Issued here, for what serves.
    """

    manifest: Manifest
    verdicts: dict[str, str] = field(default_factory=dict)
    certificates: list[Certificate] = field(default_factory=list)


class _Event(Struct, frozen=True):
    """A line of the compiler's log; what it has no field for is left out."""

    event: str
    form: str = ""
    gap: float = 0.0
    metric: Metric = "top1"
    max_accuracy_loss: _Share = 0.01
    max_disparity: _Share = 0.01


def main(arguments: Sequence[str]) -> None:
    """Run the command; what `lrai` says of errors is its own business."""
    app(args=list(arguments), prog_name="lrai requalify")


@app.command()
def command(
    path: Annotated[Path, typer.Argument(help="Artifact, a directory NAME.lrai.")],
    threads: Annotated[int, typer.Option(min=0, max=4096, help="Of the engine; 0: as served.")] = 0,
) -> None:
    """Measure and judge every variant on this machine, and have the best that is right here serve.

    It is judged on the rows that the artifact kept, as it was where it was compiled: by labels and
    groups, or by agreement with the source model, and by the closeness that was demanded. What is
    found is kept in runtime.state_dir, the artifact stays as it is; what is loaded from now on goes
    by it. Exit 3: no variant is better than fp32.
    """
    artifact = Artifact.open(path)
    with Progress(
        TextColumn("{task.description}", markup=False), BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(), console=out, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("load", total=None)

        def report(words: str, done: int, total: int) -> None:
            bar.update(task, description=shorten(words), completed=done, total=total)

        found = requalify(artifact, threads=threads, report=report)
    home, manifest = artifact.manifest.variant(artifact.manifest.chosen), found.manifest
    _say(f"made for {artifact.manifest.made_for(home)}; this is {environment(home)}")
    serving = [v.id for v in manifest.serving() if manifest.made_for(v) == environment(v)]
    table = Table("variant", "here", "at home", "1 row here", "what decided")
    for own in manifest.variants:
        alone = next((point for point in own.latency if point.rows == 1), None)
        right = manifest.made_for(own) == environment(own)
        table.add_row(
            f"{own.id} *" if own.id in serving else own.id,
            f"{own.speedup:.2f} x fp32" if right else "-",
            f"{artifact.manifest.variant(own.id).speedup:.2f} x fp32",
            f"{alone.median_ms:.3g} ms" if alone and right else "-",
            shorten(found.verdicts[own.id], _CELL),
        )
    out.print(table)
    _say(f"kept in {keep(artifact, manifest, load_config())}")
    for certificate in found.certificates:
        try:
            write_certificate(artifact.path, certificate)
        except EnvironmentProblem as problem:
            _say(f"certificate {certificate.id} was not kept: {problem}")
        else:
            _say(f"certificate {certificate.id}: {certificate.statement()}")
    if manifest.chosen == "fp32":
        what = "fp32" if serving else "the source model, optimised when it is loaded,"
        raise ConditionNotMet(f"no variant but fp32 is right here and faster: {what} serves")
    _say(f"* serves here, from the next load on: {', '.join(serving)}")


def requalify(artifact: Artifact, *, threads: int = 0, report: Report = lambda *_: None) -> Found:
    """Return what gate and timing say of an artifact's variants on this machine.

    They are judged as at home, by what the log says was demanded there, each by an equal part of
    the error. Where rows are too few for parts, it has all of it, from the one on that was closest
    on the search rows until one fails. Where no labels were kept, or too few for that, agreement
    judges, and nothing that was judged by groups.

    Args:
        artifact: Its files are as the manifest says.
        threads: Engine threads to measure with; 0 for the CPUs that there are, or one where all
            calls take less than 2 ms.
        report: Told of every step.

    Raises:
        UsageError: It kept no rows to judge with, or is slim: it has nothing to compare with.
        CalibrationError: It kept too few of them.
        ArtifactError: Its rows, their labels or its log cannot be read.
    """
    manifest, rows = artifact.manifest, _rows(artifact)
    signature = manifest.signature
    source = artifact.file(manifest.source.file)
    if not len(rows):
        how = "compile it with --evaluation, and --keep-evaluation N"
        raise UsageError(f"the artifact kept no evaluation rows: {how}")
    log = _lines(artifact, QUANTIZATION_LOG, _Event)
    conditions = _demanded(log, manifest, rows)
    try:
        gate.check_row_count(rows, conditions, 0, signature)
    except CalibrationError:  # then agreement judges, for which fewer do
        rows = Rows(rows.inputs, None, rows.hashes)
        gate.check_row_count(rows, conditions, 0, signature)
    engine = find_engine("onnxruntime")
    longest = search.longest(rows.inputs, signature)
    calls = search.Calls(signature, longest, search.points(signature, rows.inputs))
    threads = threads or _threads(engine.load(source, threads=1, optimise=True), calls)
    plain = engine.load(source, threads=threads, optimise=True)
    there, verdicts = _those_that_run(artifact, log, threads, calls)
    candidates = [_candidate("fp32", source, plain, engine), *there]
    tick = _ticking(report, "measure", 2 * search.ROUNDS)
    given = candidates, calls, tick
    search.profile(*given)
    with suppress(EngineError):  # of long calls, for which memory may lack
        search.profile(*given)
    tick = _ticking(report, "judge", len(rows) * (1 + 2 * (len(candidates) - 1)))
    reference = gate.run_alone(engine.load(source, threads=threads), rows, threads, tick)
    judged: dict[str, tuple[Candidate, Judged]] = {}
    # As many as were judged on these rows at home: what is here was chosen among them.
    forms = max(manifest.candidates - 1, sum(c.form != "fp32" for c in candidates))
    parts = gate.errors(rows, conditions, forms)
    if alike := parts[-1] > 0:  # which of them are here, these rows have told at home:
        parts = [(1 - gate.LEVEL) / len(parts)] * len(parts)  # so none is handed on, either
    left = iter(parts)
    chance, failed = 0.0, ""  # how surely who is judged has to pass, as at home
    for candidate in candidates[1:]:
        form, fp32 = candidate.form, candidate.form == "fp32"
        home = manifest.variant(form).gate
        if home and home.disparities and not (fp32 or rows.groups):
            verdicts[form] = "groups can only be judged at home"
            continue
        chance = (0.0 if alike else chance) + (0.0 if fp32 else next(left))
        if not (fp32 or chance):
            verdicts[form] = f"{failed} is closer, and failed"
            continue
        try:
            level = gate.LEVEL if fp32 else 1 - chance
            runs = gate.run(candidate.session, rows, signature, threads, tick)
            own = gate.judge(runs, reference, rows, signature.outputs, conditions, level)
            verdicts[form] = f"{candidate.pace}; {own.result.why}"
        except (EngineError, ValueError) as error:
            own, verdicts[form] = None, str(error)
        if own and own.result.passed:
            judged[form] = candidate, own
        elif not fp32:
            chance, failed = 0.0, form
    names = _serving([candidate for candidate, _ in judged.values()], manifest)
    if names == ["fp32"] and "fp32" not in judged:
        judged.clear()  # nothing is to serve in place of the source model
    elif names == ["fp32"] and judged["fp32"][0].speedup <= 1 / search.WORTH:
        verdicts["fp32"] += "; the source model, optimised here, is faster"
        judged.clear()
    found = Found(_manifest(artifact, judged, names, threads), verdicts)
    changed = Artifact(artifact.path, found.manifest, artifact.sha256)
    found.certificates = list(_certified(changed, rows, judged, names))
    return found


def _those_that_run(
    artifact: Artifact, log: Sequence[_Event], threads: int, calls: search.Calls
) -> tuple[list[Candidate], dict[str, str]]:
    """Return what runs here of one row and of several, the closest first, and why others do not."""
    candidates, verdicts = list[Candidate](), dict[str, str]()
    searched = (event for event in reversed(log) if event.event == "searched")
    gaps = {event.form.partition(" ")[0]: event.gap for event in searched} | {"fp32": -1.0}
    for variant in sorted(artifact.manifest.variants, key=lambda one: gaps.get(one.id, math.inf)):
        try:
            candidates.append(_loaded(artifact, variant, threads, calls.rows[0]))
        except (LraiError, ValueError) as error:
            verdicts[variant.id] = str(error)
    refusing = search.refusing(candidates, calls)
    verdicts |= {candidate.form: why for candidate, why in refusing}
    return [one for one in candidates if one.form not in verdicts], verdicts


def _threads(alone: Session, calls: search.Calls) -> int:
    """Return the threads that a model is served with, by what one takes."""
    return 1 if search.is_short(alone, calls) else available_cpus()


def _lines(artifact: Artifact, name: str, kind: type[Line]) -> list[Line]:
    """Return the lines of a file, none where the artifact has no such file.

    Raises:
        ArtifactError: It cannot be read, or is too large.
    """
    if (entry := artifact.manifest.files.get(name)) is None:
        return []
    try:
        if entry.size_bytes > _MOST_BYTES:
            raise ValueError(f"it is over {_MOST_BYTES >> 20} MB")
        lines = artifact.file(name).read_bytes().splitlines()
        return [json.decode(line, type=kind) for line in lines]
    except (MsgspecError, ValueError) as error:
        raise ArtifactError(f"{name} cannot be read: {error}") from None


def _rows(artifact: Artifact) -> Rows:
    """Return the rows that were kept, with what was kept of their labels and groups.

    Raises:
        VerificationError: The rows cannot be read.
        ArtifactError: The labels cannot, or are those of other rows.
    """
    rows = evaluation(artifact)
    if not (lines := _lines(artifact, LABELS, list[bool | int | str])):
        return rows
    try:
        if len(lines) != len(rows) + 1:
            raise ValueError(f"{len(lines) - 1} lines of {len(rows)} rows")
        (_, *labels), *columns = zip(*lines, strict=True)
        groups = {str(name): np.array([*map(str, own)], object) for name, *own in columns}
        return Rows(rows.inputs, np.array(labels, np.int64), rows.hashes, groups)
    except (ValueError, OverflowError) as error:
        raise ArtifactError(f"{LABELS} cannot be read: {error}") from None


def _demanded(log: Sequence[_Event], manifest: Manifest, rows: Rows) -> Conditions:
    """Return what was demanded at home; where the log does not say that, what is by default."""
    told = next((event for event in log if event.event == "asked"), _Event("asked"))
    epsilon, delta = manifest.demanded or (None, 0.01)
    groups, most = tuple(rows.groups), told.max_disparity
    return Conditions(told.metric, told.max_accuracy_loss, epsilon, delta, groups, most)


def _serving(right: Sequence[Candidate], manifest: Manifest) -> list[str]:
    """Return what is to serve of forms that passed: the fastest, then what makes calls faster.

    As in `compile`; where memory was the objective, of what is not slower than fp32 and as small as
    the smallest the fastest, alone.
    """
    if manifest.objective == "memory":
        small = [one for one in right if one.speedup >= 1 or one.form == "fp32"]
        sizes = {one.form: manifest.variant(one.form).size_bytes for one in small}
        least = min(sizes.values(), default=0) * search.WORTH
        alike = [one for one in small if sizes[one.form] <= least]
        return [max(alike, key=lambda one: one.speedup).form] if alike else ["fp32"]
    fp32 = [one for one in right if one.form == "fp32"]
    worth = [one for one in right if one.speedup >= search.WORTH and one not in fp32]
    worth = [one for one in worth if not any(map(one.little, fp32))]
    if not worth:
        return ["fp32"]
    first = max(worth, key=lambda one: one.speedup)
    others = sorted(right, key=lambda one: -one.gain([first]))
    return [one.form for one in (first, *search.beside(first, others))]


def _manifest(
    artifact: Artifact,
    judged: Mapping[str, tuple[Candidate, Judged]],
    names: list[str],
    threads: int,
) -> Manifest:
    """Return the manifest with what was measured here; what is not right here fits no machine."""
    manifest = artifact.manifest
    variants = [
        _measured(variant, *judged[variant.id])
        if variant.id in judged
        else replace(variant, engine_version=f"{manifest.made_for(variant)}, not here")
        for variant in manifest.variants
    ]
    version = installed_version("onnxruntime")
    target = Target(isa=isa_class(), engine="onnxruntime", engine_version=version, threads=threads)
    return replace(
        manifest,
        variants=tuple(variants),
        chosen=names[0],
        together=tuple(names[1:]),
        demanded=None,  # a bound at the whole level is of where it was judged in its order
        target=target,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _measured(variant: Variant, candidate: Candidate, judged: Judged) -> Variant:
    labels = variant.gate is not None and variant.gate.accuracy_loss is not None
    labels = labels and judged.result.accuracy_loss is None
    home = "; accuracy was judged at home" if labels else ""
    return replace(
        variant,
        engine_version=installed_version(variant.engine),
        latency=tuple(candidate.latency),
        speedup=candidate.speedup,
        gate=judged.result,
        batch_effect=judged.batch_effect,
        why=f"measured again: {candidate.pace}; {judged.result.why}{home}",
    )


def _certified(
    artifact: Artifact,
    rows: Rows,
    judged: Mapping[str, tuple[Candidate, Judged]],
    names: Sequence[str],
) -> Iterator[Certificate]:
    """Yield for what serves a certificate of each closeness that was certified before.

    Another one would have to be chosen by other rows than those that it is judged on.
    """
    for name in names:
        if name in judged:
            given = {c.epsilon: c for c in certificates(artifact, name) if not c.radius}
            for epsilon, certificate in given.items():
                yield issue(artifact, certificate, rows, failing(judged[name][1].gaps, epsilon))


def _loaded(artifact: Artifact, variant: Variant, threads: int, row: Sequence[Any]) -> Candidate:
    """Return a variant as it runs here.

    Raises:
        EngineError: It does not run.
        EnvironmentProblem: Its engine is not installed.
        ArtifactError: The engine cannot open what was made for another machine.
    """
    engine = find_engine(variant.engine)
    graph = artifact.file(variant.model)
    weights = artifact.path / variant.weights if variant.weights else None
    session = engine.load(graph, weights=weights, threads=threads)
    session.run(row)
    return _candidate(variant.id, graph, session, engine, variant.size_bytes)


def _candidate(
    form: str, graph: Path, session: Session, engine: Engine, size_bytes: int = 0
) -> Candidate:
    return Candidate(
        form=form, precision="", graph=graph, size_bytes=size_bytes, session=session, engine=engine
    )


def _ticking(report: Report, words: str, total: int) -> Callable[[], None]:
    done = count(1)
    report(words, 0, total)
    return lambda: report(words, next(done), total)


def _say(line: str) -> None:
    out.print(shorten(line, 2000))
