"""Where the time of a call goes, by kind of operator: as onnxruntime's profiler sees it here."""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Final

import msgspec

from lrai_core import Artifact, EnvironmentProblem, LraiError, TaskError, Variant, run_task
from lrai_core.engine.batching import synthetic_row
from lrai_core.engine.onnxruntime import REFUSALS, open_session, session_options
from lrai_core.verifier.verifier import environment, evaluation

_CALLS, _FIRST = 20, 5  # and how many of them only warm up
_LENGTH: Final = 64  # of a made-up row
_MEMORY_BYTES: Final = 32 << 30  # address space
_SECONDS: Final = 120.0


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

    A child process runs them: a graph that crashes onnxruntime costs the table.
    """
    found: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(variants))
    for at, variant in enumerate(variants):
        if variant.engine != "onnxruntime":
            return {}, f"{variant.engine} does not tell it"
        if (made := artifact.manifest.made_for(variant)) != (here := environment(variant)):
            return {}, f"made for {made}, this is {here}"
        asked = (str(artifact.path.absolute()), variant.id)
        try:
            own = run_task(profiled, asked, memory_bytes=_MEMORY_BYTES, timeout_seconds=_SECONDS)
        except (TaskError, LraiError) as error:
            return {}, str(error)
        for kind, milliseconds in own.items():
            found[kind][at] = milliseconds
    return dict(sorted(found.items(), key=lambda one: -max(one[1]))), ""


def profiled(asked: tuple[str, str]) -> dict[str, float]:
    """Return milliseconds of one row by kind of operator: of each operator the median, summed up.

    Args:
        asked: The artifact's folder, and the variant.

    Raises:
        EnvironmentProblem: onnxruntime does not run it.
    """
    artifact = Artifact.open(asked[0], verify=False)
    manifest, variant = artifact.manifest, artifact.manifest.variant(asked[1])
    rows = evaluation(artifact).inputs
    row = rows[0] if rows else synthetic_row(manifest.signature, _LENGTH)
    weights = artifact.path / variant.weights if variant.weights else None
    options = session_options(manifest.target.threads, "none", weights)
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
    taken: dict[tuple[str, str], list[int]] = defaultdict(list)
    for event in events:
        if event.cat == "Node" and event.name.endswith("_kernel_time"):
            taken[event.args.op_name, event.name].append(event.dur)
    sums: dict[str, float] = defaultdict(float)
    for (kind, _), durations in taken.items():
        sums[kind] += statistics.median(durations[_FIRST:] or durations) / 1e3
    return dict(sums)
