"""Faults and changes under load: what callers of a Triton server see of them.

MiniLM behind `backend: "lrai"`, callers in open loop: as it is by default (`auto`, whose speed
`triton.py` measures: the engine is in the stub), and in an actor (`lists`). First the actor is
killed, where there is one, then the stub, beside that of a plain python backend, while `lrai triton
watch` looks after the server; then the model is reloaded, and a new version put in the place of the
old one, and back. Every answer is checked, and which version gave it.

    python benchmarks/triton_faults.py --quick
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [
    str(_ROOT),
    *(p for p in sys.path if p and Path(p).resolve() != _ROOT / "benchmarks"),
]
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402 - after the lines above
from numpy.typing import NDArray  # noqa: E402

import lrai_core as lrai  # noqa: E402
from benchmarks import harness, models, realtime, transport  # noqa: E402
from benchmarks import triton_entries as entries  # noqa: E402
from benchmarks.callers import Figures  # noqa: E402
from benchmarks.harness import Check, console  # noqa: E402
from benchmarks.host import end_on_sigterm  # noqa: E402
from benchmarks.kinds import Kind, make_kinds  # noqa: E402
from benchmarks.one_by_one import memory_mb  # noqa: E402
from benchmarks.triton import one_core_server, prepared  # noqa: E402
from benchmarks.triton_entries import Entry, Ours, Repository  # noqa: E402
from benchmarks.triton_load import Load  # noqa: E402
from benchmarks.triton_runs import arrivals_of  # noqa: E402
from benchmarks.triton_server import Prepared, TritonServer, variables  # noqa: E402

RATE: Final = 200.0  # requests per second while models are changed
FAULT_RATE: Final = 60.0  # while processes are killed
ACTOR_SECONDS, STUB_SECONDS = 2.0, 5.0  # until the service is back
COSINE, COSINE_SHARE = 0.99, 0.98
COSINE_LEAST: Final = 0.8  # what one text has with another is far below
_STAYS_DEAD_SECONDS: Final = 10.0
_BACK_SECONDS: Final = 30.0
_TRY_SECONDS: Final = 0.05
_EXECUTIONS: Final = ("auto", "lists")  # the first has no actor yet when it is loaded
_LRAI: Final = "from lrai_core.cli import main; main()"


def main(argv: Sequence[str] | None = None) -> int:
    """Kill, reload, print, write; return 1 where a check does not hold."""
    arguments = _arguments(argv)
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        console.print("two CPUs are needed: one for the server, one for the callers")
        return 2
    end_on_sigterm()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lrai-triton-")))
        path = arguments.artifact or realtime.compile_minilm(scratch, cpus[0])
        source = scratch / "minilm.onnx"
        if not source.exists():
            models.minilm_onnx(source)
        (kind,) = make_kinds(source, None, {"search": 200})
        noop = transport._first_element(scratch / "noop.onnx", np.float32, [256])  # noqa: SLF001
        repository = Repository(scratch / "models", source, lrai.Artifact.open(path), noop)
        made = prepared(arguments.environment, scratch)
        server = stack.enter_context(one_core_server(repository.folder, made, cpus[0], scratch))
        load = stack.enter_context(Load(server.port, cpus[1]))
        load.rows(kind.name, kind.rows, "sentence_embedding", kind.expected)
        seconds = 10.0 if arguments.quick else 60.0
        rows = [
            {"execution": execution, **row}
            for execution in _EXECUTIONS
            for row in measure(server, load, made, repository, kind, execution, seconds)
        ]
        versions = server.versions()
    report(rows)
    return harness.conclude(
        "triton_faults",
        arguments.out,
        harness.environment(1, ["lrai", "onnxruntime", "numpy", "tritonclient"])
        | {"server": versions},
        rows,
        checks(rows),
        quick=arguments.quick,
    )


def measure(
    server: TritonServer,
    load: Load,
    made: Prepared,
    repository: Repository,
    kind: Kind,
    execution: str,
    seconds: float,
) -> list[dict[str, Any]]:
    """Return what callers saw of one way to answer them; each change takes so many seconds."""
    entry = repository.ours(f"minilm-{execution}", "artifact", Ours(execution))
    plain = repository.peer(f"plain-{execution}", "fp32", entries.WAYS[0])
    took = {}
    for one in (entry, plain):
        begun = time.perf_counter()
        entries.load(server.port, one.name)
        took[one.name] = time.perf_counter() - begun
    for one in (entry, plain):
        load.closed(one.name, kind.name, range(64), 8)
    pids = server.stub_pids()
    stubs = [{"load_s": took[n], "mb": memory_mb(pids[n][0])["pss_mb"]} for n in took]
    rows = []
    if execution == "lists":  # with `auto` the engine is in the stub
        rows.append(kill_actor(server, load, entry, kind, min(15.0, 0.4 * seconds)))
    killed = kill_stubs(server, load, made, entry, plain, kind)
    rows.append(killed | {"stub": stubs[0], "plain_stub": stubs[1]})
    entries.unload(server.port, plain.name)
    rows += [
        change(server, load, repository, entry, kind, seconds, what)
        for what in ("reload", "version switch")
    ]
    entries.unload(server.port, entry.name)
    return rows


def kill_actor(
    server: TritonServer, load: Load, entry: Entry, kind: Kind, seconds: float
) -> dict[str, Any]:
    """Kill the actor in the middle of the load, and say what callers saw."""
    arrivals = arrivals_of(FAULT_RATE, seconds, 0, bursts=False)
    load.start_open(entry.name, kind.name, arrivals, None)
    time.sleep(seconds / 2)
    (pid,) = _actors(server)
    os.kill(pid, signal.SIGKILL)
    return {"what": "actor killed", "back_s": None, **_seen(load.hear())}


def kill_stubs(
    server: TritonServer, load: Load, made: Prepared, entry: Entry, plain: Entry, kind: Kind
) -> dict[str, Any]:
    """Kill the stubs of ours and of a plain backend, and say when each is back.

    While requests come; what fails of them is counted. Whether they are answered again, a caller
    beside them looks.
    """
    arrivals = arrivals_of(FAULT_RATE, _STAYS_DEAD_SECONDS, 2, bursts=False)
    with _watching(server, made), Load(server.port, max(os.sched_getaffinity(0))) as beside:
        beside.rows(kind.name, kind.rows, "sentence_embedding", kind.expected)
        time.sleep(2.0)
        load.start_open(entry.name, kind.name, arrivals, None)
        time.sleep(1.0)
        stubs = server.stub_pids()
        for name in (entry.name, plain.name):
            for pid in stubs[name]:
                os.kill(pid, signal.SIGKILL)
        killed = time.perf_counter()
        back = None
        while back is None and time.perf_counter() - killed < _BACK_SECONDS:
            time.sleep(_TRY_SECONDS)
            figures = beside.closed(entry.name, kind.name, [0], 1)
            if figures.statuses == {200: 1} and figures.cosines.min() >= COSINE:
                back = time.perf_counter() - killed
        seen = _seen(load.hear())
        time.sleep(max(0.0, killed + _STAYS_DEAD_SECONDS - time.perf_counter()))
        dead = load.closed(plain.name, kind.name, [0], 1)
    return {
        "what": "stub killed",
        **seen,
        "back_s": back,
        "plain_is_back": dead.statuses == {200: 1},
        "plain_is_ready": _is_ready(server, plain.name),
    }


def change(
    server: TritonServer,
    load: Load,
    repository: Repository,
    entry: Entry,
    kind: Kind,
    seconds: float,
    what: str,
) -> dict[str, Any]:
    """Load the model anew every few seconds while requests come.

    Versions have the same artifact, as fp32 could not answer so many: who answered says which.
    """
    arrivals = arrivals_of(RATE, seconds, 1, bursts=False)
    load.start_open(entry.name, kind.name, arrivals, None)
    config, begun = repository.folder / entry.name / "config.pbtxt", time.monotonic()
    written, times, followed = config.read_text(), 0, 0
    while time.monotonic() < begun + seconds - 3.0:
        time.sleep(2.0)
        times += 1
        if what == "version switch":
            repository.version(entry.name, 2)
            policy = f"version_policy {{ specific {{ versions: [ {1 + times % 2} ] }} }}"
            config.write_text(f"{written}{policy}\n")
        else:  # a model whose files have not changed is not loaded again
            config.write_text(f"{written}# {times}\n")
        entries.load(server.port, entry.name)
        followed += time.monotonic() < begun + seconds - 0.5  # by requests
    figures = load.hear()
    config.write_text(written)
    row = {"what": f"{times} x {what}", "times": times, **_seen(figures)}
    return row | (_versions(figures, followed) if what == "version switch" else {})


@contextlib.contextmanager
def _watching(server: TritonServer, made: Prepared) -> Iterator[None]:
    python = str(made.environment / "bin" / "python")
    command = [python, "-P", "-c", _LRAI, "triton", "watch", "--url", f"http://{server.http}"]
    process = subprocess.Popen(
        command, env={**os.environ, **variables(made.environment)}, stdout=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


def _actors(server: TritonServer) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            if "lrai_core.actor" in command and str(server.runtime.folder) in command:
                found.append(int(process.name))
    return found


def _is_ready(server: TritonServer, model: str) -> bool:
    host, port = server.http.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    connection.request("GET", f"/v2/models/{model}/ready")
    with connection.getresponse() as reply:
        ready = reply.status == http.client.OK
    connection.close()
    return ready


def _seen(figures: Figures) -> dict[str, Any]:
    """Return what callers saw; `gap_s` is the longest time in which nothing was answered."""
    ended = np.sort(figures.ended[np.isfinite(figures.latencies)])
    return {
        "asked": len(figures.latencies),
        "failed": int((~np.isfinite(figures.latencies)).sum()),
        "first_error": figures.first_error,
        "p50_ms": figures.percentile_ms(0.5),
        "max_ms": figures.percentile_ms(1.0),
        "gap_s": float(np.diff(ended).max()) if len(ended) > 1 else 0.0,
        **_kept(figures.cosines),
    }


def _versions(figures: Figures, switches: int) -> dict[str, Any]:
    """Return what each version has answered, and how often it was another than the one before."""
    by = np.array(figures.versions)
    answered = {
        version: {"answers": int((by == version).sum()), **_kept(figures.cosines[by == version])}
        for version in sorted({*figures.versions})
    }
    return {"switches": switches, "changes": int((by[1:] != by[:-1]).sum()), "versions": answered}


def _kept(cosines: NDArray[np.float64]) -> dict[str, float]:
    return {"agree": float((cosines >= COSINE).mean()), "least_cosine": float(cosines.min())}


def checks(rows: Sequence[dict[str, Any]]) -> list[Check]:
    """Return what has to hold."""
    found, named = [], [(f"{row['execution']}, {row['what']}", row) for row in rows]
    answered = list(named)
    for what, row in named:
        if row["what"] == "stub killed":
            back = row["back_s"] if row["back_s"] is not None else float("inf")
            found.append(_at_most(f"{what}: s until it answers", back, STUB_SECONDS))
            came = float(row["plain_is_back"])
            found.append(_at_most(f"{what}: plain backends that came back", came, 0))
            if row["execution"] == "lists":  # else the engine is in the stub
                size, plain = row["stub"]["mb"], row["plain_stub"]["mb"]
                found.append(_at_most(f"MB of a stub, to {plain:.0f} of a plain one", size, plain))
        else:
            found.append(_at_most(f"{what}: requests that failed", row["failed"], 0))
        if row["what"] == "actor killed":
            found.append(_at_most(f"{what}: s without an answer", row["gap_s"], ACTOR_SECONDS))
        if "versions" in row:
            least, changes = max(1, row["switches"]), row["changes"]
            name = f"{what}: times that another one answers"
            found.append(Check(name, changes, f">= {least}", changes >= least))
            each = row["versions"].items()
            answered += [(f"{what}, by version {version}", one) for version, one in each]
    for name, key, least in (
        (f"answers with cosine >= {COSINE}", "agree", COSINE_SHARE),
        ("least cosine of an answer", "least_cosine", COSINE_LEAST),
    ):
        found += [
            Check(f"{what}: {name}", row[key], f">= {least}", row[key] >= least)
            for what, row in answered
        ]
    return found


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    harness.show(
        "MiniLM in Triton, with LRAI: what callers see",
        ["answered", "what", "asked", "failed", "p50 ms", "longest ms", "s without answers"],
        [
            (
                row["execution"],
                row["what"],
                str(row["asked"]),
                str(row["failed"]),
                f"{row['p50_ms']:.0f}",
                f"{row['max_ms']:.0f}",
                f"{row['gap_s']:.2f}",
            )
            for row in rows
        ],
        f"{FAULT_RATE:g} requests/s while processes are killed, {RATE:g} while models change",
    )
    for row in [row for row in rows if "versions" in row]:
        shares = [f"version {name} {one['answers']}" for name, one in row["versions"].items()]
        console.print(f"{row['execution']}, {row['what']}: answers by {', '.join(shares)}")
    for stub in [row for row in rows if row["what"] == "stub killed"]:
        console.print(
            f"after its stub was killed: lrai, {stub['execution']}, answers after "
            f"{stub['back_s']} s; the plain backend "
            f"{'answers' if stub['plain_is_back'] else 'does not answer'} after "
            f"{_STAYS_DEAD_SECONDS:g} s, and Triton calls it "
            f"{'ready' if stub['plain_is_ready'] else 'not ready'}"
        )
        mine, plain = stub["stub"], stub["plain_stub"]
        console.print(
            f"loaded, and the memory of its stub: lrai, {stub['execution']}, {mine['load_s']:.1f} "
            f"s, {mine['mb']:.0f} MB; the plain backend with fp32 {plain['load_s']:.1f} s, "
            f"{plain['mb']:.0f} MB"
        )


def _at_most(name: str, value: float, most: float) -> Check:
    return Check(name, value, f"<= {most:g}", value <= most)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Faults and changes under load, in Triton.")
    parser.add_argument("--quick", action="store_true", help="10 s of each change")
    parser.add_argument("--data", type=Path, help="not needed here")
    parser.add_argument("--artifact", type=Path, help="of MiniLM, instead of compiling it")
    parser.add_argument("--environment", type=Path, help="with the server, instead of .triton")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
