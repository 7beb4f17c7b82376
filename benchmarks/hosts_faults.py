"""MLflow, BentoML and a SageMaker container with LRAI: what callers see when a process is killed.

MiniLM in the variant that the compiler chose, two workers that share a runtime, the whole tree on
one CPU, and callers on another, each in a closed loop with a connection of its own for every
request. In turn the actor, the runtime and a worker are killed. Each request ends in a ledger, by
its status, or by what became of its connection; each answer is compared with that of float32 within
the artifact's gate; and the host is asked all the time whether it is ready.

Back is the service when nobody has had to wait, or was refused, any more.

    python benchmarks/hosts_faults.py --quick
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

_ROOT = Path(__file__).resolve().parents[1]
# `benchmarks/mlflow.py` must not be what `import mlflow` finds.
sys.path[:] = [
    str(_ROOT),
    *(p for p in sys.path if p and Path(p).resolve() != _ROOT / "benchmarks"),
]
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402 - after the lines above

from benchmarks import harness  # noqa: E402
from benchmarks import hosts_load as wire  # noqa: E402
from benchmarks.harness import Check, console  # noqa: E402
from benchmarks.host import end_on_sigterm  # noqa: E402
from benchmarks.hosts_servers import (  # noqa: E402
    BENTO,
    HOSTS,
    MLFLOW,
    SAGEMAKER,
    SERVE,
    Files,
    Running,
    Side,
    running,
    sides_of,
)
from benchmarks.kinds import Kind, make_kinds, open_encoder  # noqa: E402
from benchmarks.processes import HOST  # noqa: E402

WORKERS: Final = 2
CALLERS: Final = 8
MOST_SECONDS: Final = {"actor": 2.0, "runtime": 5.0, "worker": 2.0}
QUIET_SECONDS: Final = 2.0  # of load before a fault, and after it
COSINE, COSINE_SHARE = 0.99, 0.98
COSINE_LEAST: Final = 0.8  # what one text has with another is far below
_WAIT_SECONDS: Final = 30.0
_PROBE_SECONDS: Final = 0.05
_OUTPUT: Final = "sentence_embedding"
_SERVED: Final = {MLFLOW: "lrai", BENTO: "lrai", SAGEMAKER: SERVE}
_READY: Final = {MLFLOW: "/ping", BENTO: "/readyz", SAGEMAKER: "/ping"}
_WORKER: Final = {  # in the command line of a process that takes requests
    MLFLOW: b"spawn_main",
    BENTO: b"_bentoml_impl.worker.service",
    SAGEMAKER: b"lrai_sagemaker.worker",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """The end of a request: when, its status or what became of its line, and how right it was."""

    at: float
    end: int | str
    cosine: float = 1.0


@dataclass(slots=True)
class Load:
    """Callers in a closed loop, a caller that asks whether the host is ready, and their ledger."""

    port: int
    target: str  # `FORM PATH`
    ready: str
    kind: Kind
    asked: int = 0
    entries: list[Entry] = field(default_factory=list)
    probes: list[Entry] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        """Begin, and return when it has gone on for a while."""
        self._threads = [threading.Thread(target=self._call, args=(n,)) for n in range(CALLERS)]
        self._threads.append(threading.Thread(target=self._probe))
        for thread in self._threads:
            thread.start()
        time.sleep(QUIET_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        """Let what was asked end."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def back_after(self, begun: float) -> float:
        """Wait; return the longest silence since `begun`, or until the last who had no answer."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while self._answered(begun) <= 4 * CALLERS and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(QUIET_SECONDS)
        with self._lock:
            since = sorted((e for e in self.entries if e.at > begun), key=lambda e: e.at)
        answered = [entry.at for entry in since if entry.end == http.client.OK]
        silences = [b - a for a, b in pairwise([begun, *answered, time.monotonic()])]
        return max([*silences, *(e.at - begun for e in since if e.end != http.client.OK)])

    def _answered(self, begun: float) -> int:
        with self._lock:
            return sum(e.end == http.client.OK and e.at > begun for e in self.entries)

    def _call(self, number: int) -> None:
        random = np.random.default_rng(number)
        form, _, path = self.target.partition(" ")
        while not self._ended.is_set():
            index = int(random.integers(len(self.kind.rows)))
            with self._lock:
                self.asked += 1
            body = wire.body_of(form, self.kind.rows[index])
            end, content = _asked(self.port, "POST", path, body)
            cosine = 1.0
            if end == http.client.OK:
                found = wire.answer(b"", content, _OUTPUT).reshape(-1)
                right = self.kind.expected[index]
                cosine = float(found @ right / np.linalg.norm(found) / np.linalg.norm(right))
            with self._lock:
                self.entries.append(Entry(time.monotonic(), end, cosine))

    def _probe(self) -> None:
        while not self._ended.wait(_PROBE_SECONDS):
            end, _ = _asked(self.port, "GET", self.ready, None)
            self.probes.append(Entry(time.monotonic(), end))


def main(argv: Sequence[str] | None = None) -> int:
    """Serve, kill, print, write; return 1 where a check does not hold."""
    arguments = _arguments(argv)
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        console.print("two CPUs are needed: one for the server, one for the callers")
        return 2
    end_on_sigterm()
    times, rows = 1 if arguments.quick else 5, list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="lrai-hosts-") as folder:
        scratch = Path(folder)
        artifact, source = open_encoder(arguments.artifact, scratch, cpus[0])
        os.sched_setaffinity(0, cpus[1:])  # servers are put on the first
        (kind,) = make_kinds(source, None, {"search": 200})
        files = Files(source, artifact, scratch)
        for host in arguments.host or HOSTS:
            (side,) = [s for s in sides_of(host, [], [WORKERS]) if s.name == _SERVED[host]]
            with running([side], files, cpus[0]) as servers:
                for victim in MOST_SECONDS:
                    rows.append(kill(servers[side.server], side, kind, victim, times))
    report(rows)
    packages = ["lrai", "onnxruntime", "numpy", "mlflow-skinny", "bentoml", "uvicorn"]
    return harness.conclude(
        "hosts_faults",
        arguments.out,
        harness.environment(1, packages),
        rows,
        checks(rows),
        quick=arguments.quick,
    )


def kill(server: Running, side: Side, kind: Kind, victim: str, times: int) -> dict[str, Any]:
    """Kill what is named under load, so many times, and return what callers saw."""
    target, ready = side.ways[0].target, _READY[side.host]
    taken = list[float]()
    with (
        console.status(f"{side.host}: {victim}"),
        Load(server.server.port, target, ready, kind) as load,
    ):
        for _ in range(times):
            pid, begun = _victim(server, side.host, victim), time.monotonic()
            os.kill(pid, signal.SIGKILL)
            taken.append(load.back_after(begun))
            _wait_until_whole(server, side.host)
        settled = time.monotonic()
        time.sleep(QUIET_SECONDS)
    ends = Counter(entry.end for entry in load.entries)
    broken = {end: count for end, count in ends.items() if isinstance(end, str)}
    later = [probe.end for probe in load.probes if probe.at > settled]
    return {
        "host": side.host,
        "killed": victim,
        "times": times,
        "back_s": taken,
        "requests": load.asked,
        "answered": ends[http.client.OK],
        "declared": sum(n for end, n in ends.items() if isinstance(end, int) and end != 200),
        "statuses": {str(end): count for end, count in ends.items()},
        "broken": sum(broken.values()),
        "silent": load.asked - len(load.entries),
        "cosines": [e.cosine for e in load.entries if e.end == http.client.OK],
        "not_ready": sum(probe.end != http.client.OK for probe in load.probes),
        "not_ready_later": sum(end != http.client.OK for end in later),
        "probes_later": len(later),
    }


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    harness.show(
        "Killed under load",
        ["host", "killed", "times", "back, s", "worst", "asked", "refused", "broken", "silent"],
        [
            (
                row["host"],
                row["killed"],
                row["times"],
                f"{np.median(row['back_s']):.2f}",
                f"{max(row['back_s']):.2f}",
                f"{row['requests']:,}",
                row["declared"],
                row["broken"],
                row["silent"],
            )
            for row in rows
        ],
        f"{CALLERS} callers, {WORKERS} workers; back: until nobody waits or is refused any more; "
        "refused: with a status; broken: the line was, with a worker; silent: no end at all",
    )


def checks(rows: Sequence[dict[str, Any]]) -> list[Check]:
    """Return whether the service was back in time, and nobody was forgotten or told wrongly."""
    found = []
    for row in rows:
        name, most = f"{row['host']}, {row['killed']} killed", MOST_SECONDS[row["killed"]]
        worst = max(row["back_s"])
        found.append(
            Check(f"{name}: seconds until it is back", worst, f"<= {most:g}", worst <= most)
        )
        lost = row["silent"]
        found.append(Check(f"{name}: requests without an end", lost, "0", lost == 0))
        failed = row["broken"] + row["declared"]
        allowed = CALLERS * row["times"] if row["killed"] == "worker" else 0
        found.append(
            Check(f"{name}: requests that failed", failed, f"<= {allowed}", failed <= allowed)
        )
        unready = row["not_ready_later"]
        told = f"{name}: not ready, of {row['probes_later']} asked once it was back"
        found.append(Check(told, unready, "0", row["probes_later"] > 0 and unready == 0))
    cosines = np.array([cosine for row in rows for cosine in row["cosines"]])
    share, least = float((cosines >= COSINE).mean()), float(cosines.min())
    words = f"share of {len(cosines):,} answers with cosine >= {COSINE}"
    found.append(Check(words, share, f">= {COSINE_SHARE}", share >= COSINE_SHARE))
    found.append(Check("least cosine", least, f">= {COSINE_LEAST}", least >= COSINE_LEAST))
    for row in rows:
        del row["cosines"]
    return found


def _victim(server: Running, host: str, victim: str) -> int:
    processes = server.processes()
    if victim == "worker":
        return _workers(server, host)[0]
    return processes["actors" if victim == "actor" else "daemon"][0]


def _workers(server: Running, host: str) -> list[int]:
    found = []
    for pid in server.processes()["host"]:
        with contextlib.suppress(OSError):
            if _WORKER[host] in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def _wait_until_whole(server: Running, host: str) -> None:
    """Return when every process is there again."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < deadline:
        processes = server.processes()
        if processes["daemon"] and processes["actors"] and len(_workers(server, host)) == WORKERS:
            return
        time.sleep(0.05)
    raise RuntimeError(f"{host}: not all processes came back within {_WAIT_SECONDS:g} s")


def _asked(port: int, method: str, path: str, body: bytes | None) -> tuple[int | str, bytes]:
    """Return the status of a request and its content, or what became of its line."""
    line = http.client.HTTPConnection(HOST, port, timeout=_WAIT_SECONDS)
    try:
        headers = {"Content-Type": "application/json"} if body else {}
        line.request(method, path, body, headers)
        reply = line.getresponse()
        return reply.status, reply.read()
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__, b""
    finally:
        line.close()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--artifact", type=Path, help="compiled before; by default MiniLM, here")
    parser.add_argument("--data", type=Path, help="not needed: the texts are made here")
    parser.add_argument("--host", choices=HOSTS, action="append", help="this one; repeatable")
    parser.add_argument("--quick", action="store_true", help="each is killed once, not five times")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
