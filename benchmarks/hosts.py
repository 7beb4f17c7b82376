"""Models in MLflow, BentoML and a SageMaker container: with LRAI, and as they are run without.

One server at a time computes, whose whole tree (workers, LRAI's daemon and actors) has one core,
with one engine thread everywhere, and callers on another core. The MiniLM sentence encoder in fp32
and the variant that the compiler chose; requests of search queries' lengths, of a fixed one and of
the Azure conversations'. Peers run the same files, unpadded, in the best of the ways in which each
host can, and LRAI the variant; both get the same body wherever the host allows it.

    python benchmarks/hosts.py --data ../shared/data --quick
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

_ROOT = Path(__file__).resolve().parents[1]
# `benchmarks/mlflow.py` must not be what `import mlflow` finds.
sys.path[:] = [
    str(_ROOT),
    *(p for p in sys.path if p and Path(p).resolve() != _ROOT / "benchmarks"),
]
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from benchmarks import harness  # noqa: E402
from benchmarks import hosts_parts as parts  # noqa: E402
from benchmarks import hosts_report as report  # noqa: E402
from benchmarks.callers import Answers, Load  # noqa: E402
from benchmarks.harness import console  # noqa: E402
from benchmarks.host import Helper, end_on_sigterm  # noqa: E402
from benchmarks.hosts_load import WIRE  # noqa: E402
from benchmarks.hosts_runs import Extent, give_rows, measure  # noqa: E402
from benchmarks.hosts_servers import HOSTS, Files  # noqa: E402
from benchmarks.kinds import make_kinds, measure_bare, open_encoder  # noqa: E402

QUICK: Final = Extent(
    rows={"search": 240},
    workers=(1,),
    ours_too=(4,),
    swept=48,
    tries=1,
    rounds=4,
    requests={1: 24, 8: 64, 32: 96},
)
FULL: Final = Extent(
    rows={"search": 400, "fixed": 200, "azure": 120},
    workers=(1, 4),
    ours_too=(),
    swept=64,
    tries=2,
    rounds=8,
    requests={1: 32, 8: 96, 32: 160},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, measure, print, write; return 1 where a check does not hold."""
    arguments = _arguments(argv)
    extent = QUICK if arguments.quick else FULL
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        console.print("two CPUs are needed: one for the servers, one for the callers")
        return 2
    end_on_sigterm()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lrai-hosts-")))
        return run(arguments, extent, cpus, scratch, stack)


def run(
    arguments: argparse.Namespace,
    extent: Extent,
    cpus: Sequence[int],
    scratch: Path,
    stack: contextlib.ExitStack,
) -> int:
    """Measure and report."""
    artifact, source = open_encoder(arguments.artifact, scratch, cpus[0])
    chosen = artifact.manifest.chosen
    os.sched_setaffinity(0, cpus[1:])  # servers are put on the first
    with console.status("what fp32 answers alone"):
        kinds = make_kinds(source, arguments.data, extent.rows)
    with console.status(f"bare ONNX Runtime, {chosen} against fp32"):
        alone = measure_bare(artifact, source, kinds, extent.rounds, cpus[0], scratch)
    bare = {
        ("fp32" if file == "fp32" else "variant", lengths): rates
        for (file, lengths), rates in alone.items()
    }
    files = Files(source, artifact, scratch)
    taken = _parts(files, kinds[0].rows, cpus[0])
    load = stack.enter_context(Load(0, cpus[1], WIRE))
    give_rows(load, kinds)
    rows: list[dict[str, Any]] = []
    answers: dict[str, Answers] = defaultdict(Answers)
    for host in arguments.host or HOSTS:
        begun = time.perf_counter()
        rows += measure(host, kinds, extent, files, load, cpus[0], answers)
        console.print(f"{host}: measured in {time.perf_counter() - begun:.0f} s")
    report.show(rows, bare, taken, extent.rounds, chosen)
    packages = ["lrai", "onnxruntime", "numpy", "mlflow-skinny", "bentoml", "fastapi", "uvicorn"]
    for row in rows:
        if row["loop"] == "closed":
            row["shares"] = report.shares(row, bare, taken)._asdict()
    return harness.conclude(
        "hosts",
        arguments.out,
        harness.environment(1, packages),
        rows,
        report.checks(rows, bare, answers),
        variant=chosen,
        memory=report.MEMORY_SHARED,
        bare={f"{file}, {lengths}": rates for (file, lengths), rates in bare.items()},
        parts_us={f"{host}, {form}": one._asdict() for (host, form), one in taken.items()},
        azure="trace" if arguments.data else "lognormal of the same median and 99th percentile",
        answers={who: {"checked": one.count, "worst": one.worst} for who, one in answers.items()},
        quick=arguments.quick,
    )


def _parts(files: Files, rows: Sequence[Any], cpu: int) -> report.PartsOf:
    variables = {"HOSTS_SERVED": files.served["fp32"].text(), **files.variables()}
    given = (cpu, list(rows), str(files.artifact.path), variables)
    with console.status("reading and writing bodies"), Helper(parts.measure, *given) as helper:
        taken: report.PartsOf = helper.hear()
        return taken


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Models in MLflow, BentoML and SageMaker.")
    parser.add_argument("--quick", action="store_true", help="three minutes, beside compiling")
    parser.add_argument("--data", type=Path, help="folder of data sets: lengths of a trace")
    parser.add_argument("--artifact", type=Path, help="of MiniLM, instead of compiling it")
    parser.add_argument("--host", action="append", choices=HOSTS, help="only this one")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
