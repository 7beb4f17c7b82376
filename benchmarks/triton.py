"""Models in Triton: `backend: "lrai"` against the plain python backend with ONNX Runtime.

One server, whose whole tree (stubs, LRAI's daemon and actors) has one core, one engine thread
everywhere, and callers on another core. The MiniLM sentence encoder in fp32 and the variant that
the compiler chose; requests of a fixed length, of search queries' and of the Azure conversations'.
Peers run the same files; a sweep finds the best setting of each for each kind of lengths, and only
that one runs in full, in turns with ours. It is the best at 32 callers, and what the peer has with
fewer and with more, too. What the gain comes from is split up: the variant, coalescing, and several
instances that share one actor. All of that is over HTTP; of search queries over gRPC there are rows
beside it, which no check goes by.

    python benchmarks/triton.py --data ../shared/data --quick
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

_ROOT = Path(__file__).resolve().parents[1]
# This file must not be what `import triton` finds.
sys.path[:] = [
    str(_ROOT),
    *(p for p in sys.path if p and Path(p).resolve() != _ROOT / "benchmarks"),
]
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402 - after the lines above

from benchmarks import harness, transport, triton_grpc  # noqa: E402
from benchmarks import triton_entries as entries  # noqa: E402
from benchmarks import triton_report as report  # noqa: E402
from benchmarks.callers import Figures  # noqa: E402
from benchmarks.harness import console  # noqa: E402
from benchmarks.host import end_on_sigterm  # noqa: E402
from benchmarks.kinds import Kind, make_kinds, measure_bare, open_encoder, share  # noqa: E402
from benchmarks.triton_entries import AS_GIVEN, Entry, Ours, Peer, Repository  # noqa: E402
from benchmarks.triton_load import Load  # noqa: E402
from benchmarks.triton_runs import SWEPT_AT, Bench, Extent, in_turns, measure_open, median_parts  # noqa: E402
from benchmarks.triton_server import Prepared, TritonServer, make_backends, prepare  # noqa: E402

Rates = dict[str, tuple[float, float]]

QUICK: Final = Extent(
    ways=entries.QUICK_WAYS,
    queues=entries.QUICK_QUEUES,
    executions=("inline", "lists"),
    instances=(1,),
    sweep_fp32=False,
    rows={"search": 240, "azure": 40},
    swept=48,
    tries=1,
    rounds=3,
    requests={32: 128},
    open_rounds=1,
    open_seconds=4.0,
    open_kinds=("search",),
    open_loads=(1.5,),
    bursts=False,
    overhead_rounds=3,
    overhead_requests={1: 300, 32: 600},
)
FULL: Final = Extent(
    ways=entries.WAYS,
    queues=entries.QUEUES,
    executions=entries.EXECUTIONS,
    instances=(1, 2),
    sweep_fp32=True,
    rows={"fixed": 200, "search": 400, "azure": 120},
    swept=160,
    tries=2,
    rounds=7,
    requests={1: 120, 8: 240, 32: 320, 128: 384},
    open_rounds=3,
    open_seconds=6.0,
    open_kinds=("search", "azure"),
    open_loads=(0.7, 1.0, 1.5),
    bursts=True,
    overhead_rounds=9,
    overhead_requests={1: 500, 32: 1_500},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, measure, print, write; return 1 where a check does not hold."""
    arguments = _arguments(argv)
    extent = QUICK if arguments.quick else FULL
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        console.print("two CPUs are needed: one for the server, one for the callers")
        return 2
    end_on_sigterm()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lrai-triton-")))
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
    os.sched_setaffinity(0, cpus[1:])  # the server is put on the first
    with console.status("what fp32 answers alone"):
        kinds = make_kinds(source, arguments.data, extent.rows)
    noop = transport._first_element(scratch / "noop.onnx", np.float32, [256])  # noqa: SLF001
    repository = Repository(scratch / "models", source, artifact, noop)
    console.print(f"bare ONNX Runtime, {chosen} against fp32")
    compared = kinds if not arguments.quick else [kind for kind in kinds if kind.name == "search"]
    bare = measure_bare(artifact, source, compared, extent.rounds, cpus[0], scratch)

    made = prepared(arguments.environment, scratch)
    server = stack.enter_context(one_core_server(repository.folder, made, cpus[0], scratch))
    load = stack.enter_context(Load(server.port, cpus[1]))
    for kind in kinds:
        load.rows(kind.name, kind.rows, "sentence_embedding", kind.expected)
    bench = Bench(server, load, repository, extent)
    found: list[dict[str, Any]] = []
    try:
        settings = measure(bench, kinds, chosen, found)
        if not arguments.quick:
            perf_analyzer(bench, kinds[0], settings, found)
    except RuntimeError:
        console.print(server.log.read_text(errors="replace")[-3000:])
        raise
    checks = report.checks(found, bench.answers, bare, chosen)
    checks += [] if arguments.quick else report.second_opinion(found)
    report.show(found, extent)
    packages = ["lrai", "onnxruntime", "numpy", "tritonclient"]
    return harness.conclude(
        "triton",
        arguments.out,
        harness.environment(1, packages) | {"server": server.versions()},
        found,
        checks,
        variant=chosen,
        bare={f"{v}, {n}": values for (v, n), values in bare.items()},
        azure="trace" if arguments.data else "lognormal of the same median and 99th percentile",
        answers={v: {"checked": a.count, "worst": a.worst} for v, a in bench.answers.items()},
        quick=arguments.quick,
    )


def measure(
    bench: Bench, kinds: Sequence[Kind], chosen: str, found: list[dict[str, Any]]
) -> list[Entry]:
    """Run the sweep, then everything in full with what it chose; rows are added to `found`.

    Returns:
        The variant at its best with the first kind of lengths: the peer's entry, and ours.
    """
    console.print("overhead: a model that computes nothing")
    found += bench.overhead()
    peers: dict[tuple[str, str], Peer] = {}  # the best setting by variant and kind of lengths
    for variant in (chosen, "fp32") if bench.extent.sweep_fp32 else (chosen,):
        console.print(f"sweep of settings: {variant}")
        best = sweep(bench, kinds, variant, found)
        peers |= {(variant, name): setting for name, setting in best.items()}
    peers = {("fp32", name): setting for (_, name), setting in peers.items()} | peers
    for kind in kinds:
        console.print(f"closed loop: {kind.name}")
        who = {
            "peer fp32": bench.peer("fp32", peers["fp32", kind.name]),
            "peer variant": bench.peer(chosen, peers[chosen, kind.name]),
            "lrai fp32": bench.ours("fp32", AS_GIVEN),
            "lrai": bench.ours(chosen, AS_GIVEN),
        }
        found += closed(bench, kind, who)
    for kind in kinds:
        if kind.name in bench.extent.open_kinds:
            console.print(f"open loop: {kind.name}")
            alone = bench.peer(chosen, entries.WAYS[0])
            with bench.loaded(alone):  # what it can do through the server, one by one
                count = share(kind, 160, SWEPT_AT)
                tries = [bench.closed(alone, kind, 0, count, SWEPT_AT).rate for _ in range(3)]
            rate = float(np.median(tries))
            found += measure_open(bench, kind, peers[chosen, kind.name], chosen, rate)
    return [bench.peer(chosen, peers[chosen, kinds[0].name]), bench.ours(chosen, AS_GIVEN)]


def sweep(
    bench: Bench, kinds: Sequence[Kind], variant: str, found: list[dict[str, Any]]
) -> dict[str, Peer]:
    """Return the peer's best setting for each kind of lengths.

    LRAI has the one that it takes by itself; what the others give is shown.
    """
    peers, ours = dict[Peer, Rates](), dict[Ours, Rates]()
    for setting in entries.peers_of(bench.extent.ways, bench.extent.instances):
        peers[setting] = bench.sweep(bench.peer(variant, setting), kinds)
    for execution in bench.extent.executions:
        for count in bench.extent.instances:
            mine = Ours(execution, count)
            ours[mine] = bench.sweep(bench.ours(variant, mine), kinds)
    swept = [("peer", str(s), r) for s, r in peers.items()]
    swept += [("lrai", str(s), r) for s, r in ours.items()]
    found += [
        {"loop": "sweep", "variant": variant, "who": who, "setting": setting, "rates": rates}
        for who, setting, rates in swept
    ]
    best = {}
    for kind in kinds:
        of_kind = {setting: rates[kind.name][0] for setting, rates in peers.items()}
        best[kind.name] = max(of_kind, key=of_kind.__getitem__)
    return best


def closed(bench: Bench, kind: Kind, who: Mapping[str, Entry]) -> list[dict[str, Any]]:
    """Return the rows of closed loops with one kind of lengths."""
    with bench.loaded(*who.values()):
        figures = bench.rounds(list(who.values()), kind)
        rows = over_grpc(bench, kind, who) if kind.name == "search" else []
    for name, entry in who.items():
        for callers in bench.extent.requests:
            runs = [run for run, _ in figures[entry.name, callers]]
            rows.append(
                {
                    "loop": "closed",
                    "lengths": kind.name,
                    "who": name,
                    "setting": str(entry.setting),
                    "callers": callers,
                    "rates": [run.rate for run in runs],
                    "p50_ms": [run.percentile_ms(0.5) for run in runs],
                    "p95_ms": [run.percentile_ms(0.95) for run in runs],
                    "cpu_us": median_parts(figures[entry.name, callers]),
                }
            )
    return rows


def over_grpc(bench: Bench, kind: Kind, who: Mapping[str, Entry]) -> list[dict[str, Any]]:
    """Return rows of the same entries over gRPC, by Triton's own client."""
    count = share(kind, bench.extent.requests[SWEPT_AT], SWEPT_AT)
    figures = dict[str, list[Figures]]()
    for turn in range(bench.extent.rounds):
        indices = [(turn * count + i) % len(kind.rows) for i in range(count)]
        for name, entry in in_turns(list(who.items()), turn):
            asked = (entry.name, kind, "sentence_embedding", indices, SWEPT_AT)
            figures.setdefault(name, []).append(triton_grpc.closed(bench.server.grpc, *asked))
            bench.answers[entry.side].add(figures[name][-1])
    return [
        {
            "loop": "grpc",
            "lengths": kind.name,
            "who": name,
            "callers": SWEPT_AT,
            "rates": [run.rate for run in runs],
            "p50_ms": [run.percentile_ms(0.5) for run in runs],
            "p95_ms": [run.percentile_ms(0.95) for run in runs],
        }
        for name, runs in figures.items()
    ]


def perf_analyzer(
    bench: Bench, kind: Kind, settings: Sequence[Entry], found: list[dict[str, Any]]
) -> None:
    """Add what Triton's own tool says, where it is installed."""
    tool = Path(sys.executable).parent / "perf_analyzer"
    if not tool.exists():
        console.print(
            f"no second opinion: {tool} is not there, which PyPI's perf-analyzer installs"
        )
        return
    data = bench.repository.folder.parent / "perf.json"
    rows = [  # shapes, as the model's are free
        {n: {"content": a[0].tolist(), "shape": [*a[0].shape]} for n, a in row.items()}
        for row in kind.rows
    ]
    data.write_text(json.dumps({"data": rows}))
    out = data.with_suffix(".csv")
    addresses = {"http": bench.server.http, "grpc": bench.server.grpc}
    pairs = zip(("peer variant", "lrai"), settings, strict=True)
    for (who, entry), protocol in itertools.product(pairs, addresses):
        command = [str(tool), "-m", entry.name, "-i", protocol, "-u", addresses[protocol]]
        command += ["--input-data", str(data), "-s", "999", "-f", str(out)]
        command += ["--concurrency-range", str(SWEPT_AT)]
        out.unlink(missing_ok=True)  # the status is 0 whatever happens
        with bench.loaded(entry):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not out.exists():
            console.print(f"perf_analyzer failed: {(done.stderr or done.stdout)[-300:]}")
            return
        header, values = out.read_text().splitlines()[:2]
        figures = dict(zip(header.split(","), values.split(","), strict=False))
        rate, p95 = float(figures["Inferences/Second"]), float(figures["p95 latency"]) / 1e3
        row = {"loop": "perf_analyzer", "who": who, "protocol": protocol}
        found.append(row | {"rate": rate, "p95_ms": p95})


def one_core_server(folder: Path, made: Prepared, cpu: int, scratch: Path) -> TritonServer:
    """Return a server of a repository, on one core, that loads models when told."""
    return TritonServer(
        folder,
        environment=made.environment,
        backends=made.backends,
        arguments=["--model-control-mode=explicit"],
        cpus=[cpu],
        env={"LRAI_ACTOR_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        log=scratch / "tritonserver.log",
    )


def prepared(environment: Path | None, scratch: Path) -> Prepared:
    """Return what the server runs from: the project's own, or another environment."""
    if environment is None:
        return prepare()
    make_backends(environment, scratch / "backends")
    return Prepared(environment, scratch / "backends")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Models in Triton, with LRAI and without it.")
    parser.add_argument("--quick", action="store_true", help="three minutes, beside compiling")
    parser.add_argument("--data", type=Path, help="folder of data sets: lengths of a trace")
    parser.add_argument("--artifact", type=Path, help="of MiniLM, instead of compiling it")
    parser.add_argument("--environment", type=Path, help="with the server, instead of .triton")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
