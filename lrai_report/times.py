"""Where the time of a call goes, by kind of operator: as the engine's profiler sees it here."""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from lrai_core import Artifact, EnvironmentProblem, LraiError, TaskError, Variant, run_task
from lrai_core.engine.batching import synthetic_row
from lrai_core.engine.engine import find_engine
from lrai_core.engine.onnxruntime import REFUSALS, open_session, session_options
from lrai_core.verifier.verifier import environment, evaluation

_CALLS, _FIRST = 20, 5  # and how many of them only warm up
_LENGTH: Final = 64  # of a made-up row
_MEMORY_BYTES: Final = 32 << 30  # address space
_SECONDS: Final = 120.0
_AROUND: Final = ("If", "Loop", "Scan")  # their times are of what is in them, which is told as well
_Taken = tuple[str, str, float]  # kind and name of an operator, milliseconds of a call


class _Arguments(msgspec.Struct, frozen=True):
    op_name: str = ""


class _Event(msgspec.Struct, frozen=True):
    """One entry of the profile."""

    name: str
    cat: str = ""
    dur: int = 0  # microseconds
    args: _Arguments = _Arguments()


def times(artifact: Artifact, variants: tuple[Variant, ...]) -> tuple[dict[str, list[float]], str]:
    """Return milliseconds of one row by kind of operator for each variant, and else why not.

    A child process runs them: a graph that crashes its engine costs the table. Other engines than
    onnxruntime have kinds of their own, which their names tell.
    """
    found: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(variants))
    for at, variant in enumerate(variants):
        if (made := artifact.manifest.made_for(variant)) != (here := environment(variant)):
            return {}, f"made for {made}, this is {here}"
        asked = (str(artifact.path.absolute()), variant.id)
        try:
            own = run_task(profiled, asked, memory_bytes=_MEMORY_BYTES, timeout_seconds=_SECONDS)
        except (TaskError, LraiError) as error:
            return {}, str(error)
        of = "" if variant.engine == "onnxruntime" else f" ({variant.engine})"
        for kind, milliseconds in own.items():
            found[kind + of][at] = milliseconds
    return dict(sorted(found.items(), key=lambda one: -max(one[1]))), ""


def profiled(asked: tuple[str, str]) -> dict[str, float]:
    """Return milliseconds of one row by kind of operator: of each operator the median, summed up.

    Args:
        asked: The artifact's folder, and the variant.

    Raises:
        EnvironmentProblem: Its engine does not run it, or does not tell.
        EngineError: Likewise.
    """
    artifact = Artifact.open(asked[0], verify=False)
    manifest, variant = artifact.manifest, artifact.manifest.variant(asked[1])
    rows = evaluation(artifact).inputs
    row = rows[0] if rows else synthetic_row(manifest.signature, _LENGTH)
    profile = getattr(find_engine(variant.engine), "profile", None)
    if variant.engine == "onnxruntime":
        events = _profile(artifact, variant, row)
    elif profile is None:
        raise EnvironmentProblem(f"{variant.engine} does not tell it")
    else:
        events = profile(artifact.file(variant.model), row, manifest.target.threads, _CALLS)
    taken: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kind, name, milliseconds in events:
        taken[kind, name].append(milliseconds)
    sums: dict[str, float] = defaultdict(float)
    for (kind, _), durations in taken.items():
        sums[kind] += statistics.median(durations[_FIRST:] or durations)
    return {kind: milliseconds for kind, milliseconds in sums.items() if milliseconds}


def _profile(artifact: Artifact, variant: Variant, row: Sequence[Any]) -> Iterator[_Taken]:
    """Yield what every operator takes in each call, by onnxruntime."""
    weights = artifact.path / variant.weights if variant.weights else None
    options = session_options(artifact.manifest.target.threads, "none", weights)
    graph = artifact.file(variant.model)
    with tempfile.TemporaryDirectory(prefix="lrai-report-") as folder:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "profile"))
        try:
            session = open_session(str(graph) if weights is None else graph.read_bytes(), options)
            feed = dict(zip((one.name for one in session.get_inputs()), row, strict=True))
            for _ in range(_CALLS):
                session.run(None, feed)
            file = Path(session.end_profiling())
        except REFUSALS as error:
            raise EnvironmentProblem(f"it does not run: {type(error).__name__}") from None
        events = msgspec.json.decode(file.read_bytes(), type=list[_Event])
    taken: dict[tuple[str, str], float] = defaultdict(float)  # in a loop one has several turns
    for event in events:
        if event.name == "model_run":  # a call, behind all that it ran
            yield from ((*which, ms) for which, ms in taken.items() if which[0] not in _AROUND)
            taken.clear()
        elif event.cat == "Node" and event.name.endswith("_kernel_time"):
            taken[event.args.op_name, event.name] += event.dur / 1e3
