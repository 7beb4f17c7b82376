"""MLflow, BentoML and a SageMaker container with LRAI: what callers see when a process is killed.

MiniLM in the variant that the compiler chose, two workers that share a runtime, the whole tree on
one CPU, and callers on another, each in a closed loop with a connection of its own for every
request. In turn the actor, the runtime and a worker are killed, and the runtime is held up for
longer than any host has patience with it. Each request ends in a ledger, by its status, or by what
became of its connection; each answer is compared with that of float32 within the artifact's gate;
and the host is asked all the time whether it is ready, of MLflow the runtime, too.

Back is the service when nobody is refused any more, or waits half a second and twice as long as
anybody did before: who is answered within that has noticed no death.

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
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

_ROOT = Path(__file__).resolve().parents[1]
# `benchmarks/mlflow.py` must not be what `import mlflow` finds.
sys.path[:] = [
    str(_ROOT),
    *(p for p in sys.path if p and Path(p).resolve() != _ROOT / "benchmarks"),
]
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402 - after the lines above

import lrai_core as lrai  # noqa: E402
from benchmarks import harness  # noqa: E402
from benchmarks import hosts_load as wire  # noqa: E402
from benchmarks.harness import Check, console  # noqa: E402
from benchmarks.host import Host, end_on_sigterm  # noqa: E402
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
HELD: Final = "runtime held up"
HELD_SECONDS: Final = 6.0  # BentoML calls a runtime silent after five, the others sooner
MOST_SECONDS: Final = {
    "actor killed": 2.0,
    "runtime killed": 5.0,
    "worker killed": 2.0,
    HELD: HELD_SECONDS + 2.0,
}
QUIET_SECONDS: Final = 2.0  # of load before a fault, and after it
COSINE, COSINE_SHARE = 0.99, 0.98
COSINE_LEAST: Final = 0.8  # what one text has with another is far below
AGAIN_SECONDS: Final = 1.0  # from the first answer until it is called ready
_WAIT_SECONDS: Final = 30.0
_PROBE_SECONDS: Final = 0.05
_PROBE_MOST_SECONDS: Final = 1.0  # as an orchestrator waits
_NOTICED_SECONDS: Final = 0.5
_SILENT_SECONDS: Final = 1.5  # without an answer to anybody, where nothing was done to it
# Ready means progress: a death is noticed at once, and who is back has a first call to answer.
_DEATH_SECONDS, _CALL_SECONDS = 0.1, 0.2
_SILENT_AT_FAULT_SECONDS: Final = _DEATH_SECONDS + _CALL_SECONDS + _PROBE_SECONDS
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
    """A request: begin and end, its status or what became of its line, and how right it was."""

    begun: float
    at: float
    end: int | str
    cosine: float = 1.0

    @property
    def answered(self) -> bool:
        """Whether it was."""
        return self.end == http.client.OK


class Told(NamedTuple):
    """What was said of readiness: silences in which it was asked, where it was said, or too late.

    In vain is most of what was said in a silence; late is what was not said soon after one.
    """

    silences: int
    in_vain: int
    late: int


def told(answers: Sequence[float], probes: Sequence[Entry], faults: Sequence[float]) -> Told:
    """Return what was said of readiness while nobody was answered, and when somebody was again.

    What was said counts where the question came after a death is noticed, and the reply before the
    first answer could be under way.

    Args:
        answers: When somebody was answered.
        probes: Questions whether it is ready.
        faults: When something was done to it.
    """
    silences = in_vain = late = 0
    for last, first in pairwise(sorted(answers)):
        causes = [fault for fault in faults if last - _NOTICED_SECONDS < fault < first]
        begun = max([last, *causes])
        if first - begun <= (_SILENT_AT_FAULT_SECONDS if causes else _SILENT_SECONDS):
            continue
        said = [
            probe.answered
            for probe in probes
            if begun + _DEATH_SECONDS < probe.begun and probe.at < first - _CALL_SECONDS
        ]
        silences += bool(said)
        in_vain += sum(said) > len(said) / 2
        again = [p.at - first for p in probes if p.answered and p.at > first - _CALL_SECONDS]
        late += min(again, default=np.inf) > AGAIN_SECONDS
    return Told(silences, in_vain, late)


@dataclass(slots=True)
class Load:
    """Callers in a closed loop, others that ask whether the host is ready, and their ledger."""

    port: int
    target: str  # `FORM PATH`
    questions: Sequence[Callable[[], int | str]]  # whether it is ready; the last is told the truth
    kind: Kind
    asked: int = 0
    noticed_seconds: float = _NOTICED_SECONDS  # who waits longer has noticed
    entries: list[Entry] = field(default_factory=list)
    probes: list[list[Entry]] = field(default_factory=list)  # by question
    faults: list[float] = field(default_factory=list)
    _inside: dict[int, float] = field(default_factory=dict)  # by caller: since when
    _ended: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        """Begin, and return when it has gone on for a while."""
        self._threads = [threading.Thread(target=self._call, args=(n,)) for n in range(CALLERS)]
        self.probes = [[] for _ in self.questions]
        self._threads += [
            threading.Thread(target=self._probe, args=pair)
            for pair in zip(self.questions, self.probes, strict=True)
        ]
        for thread in self._threads:
            thread.start()
        time.sleep(QUIET_SECONDS)
        with self._lock:
            before = [e.at - e.begun for e in self.entries if e.answered]
        self.noticed_seconds = max(_NOTICED_SECONDS, 2 * max(before, default=0.0))
        return self

    def __exit__(self, *_: object) -> None:
        """Let what was asked end."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def back_after(self, killed: float) -> float:
        """Wait; return until when after `killed` anybody has had to wait, or had no answer."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(QUIET_SECONDS)
            now, most = time.monotonic(), self.noticed_seconds
            with self._lock:  # what began before has ended, and everybody has asked again since
                old = [since for since in self._inside.values() if since < killed + QUIET_SECONDS]
                since = [entry for entry in self.entries if entry.at > killed]
                inside = [now - max(begun, killed) for begun in self._inside.values()]
            late = [
                entry.at - killed
                for entry in since
                if not entry.answered or entry.at - max(entry.begun, killed) > most
            ] + [now - killed for one in inside if one > most]
            enough = sum(e.answered and e.begun > killed for e in since) > 4 * CALLERS
            if enough and not old and max(late, default=0.0) < now - killed - QUIET_SECONDS:
                return max(late, default=0.0)
        return np.inf

    def _call(self, number: int) -> None:
        random = np.random.default_rng(number)
        form, _, path = self.target.partition(" ")
        while not self._ended.is_set():
            index = int(random.integers(len(self.kind.rows)))
            body = wire.body_of(form, self.kind.rows[index])
            begun = time.monotonic()
            with self._lock:
                self.asked += 1
                self._inside[number] = begun
            end, content = _asked(self.port, "POST", path, body)
            at, cosine = time.monotonic(), 1.0
            if end == http.client.OK:
                found = wire.answer(b"", content, _OUTPUT).reshape(-1)
                right = self.kind.expected[index]
                cosine = float(found @ right / np.linalg.norm(found) / np.linalg.norm(right))
            with self._lock:
                del self._inside[number]
                self.entries.append(Entry(begun, at, end, cosine))

    def _probe(self, question: Callable[[], int | str], probes: list[Entry]) -> None:
        while not self._ended.wait(_PROBE_SECONDS):
            begun = time.monotonic()
            end = question()
            probes.append(Entry(begun, time.monotonic(), end))


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
                for fault in MOST_SECONDS:
                    rows.append(disturb(servers[side.server], side, kind, fault, times))
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


def disturb(server: Running, side: Side, kind: Kind, fault: str, times: int) -> dict[str, Any]:
    """Kill what is named under load, or hold it up, so many times; return what callers saw."""
    target, port = side.ways[0].target, server.server.port
    questions = [partial(_readiness, port, _READY[side.host])]
    taken, whole, victim = list[float](), list[float](), fault.partition(" ")[0]
    with contextlib.ExitStack() as stack:
        stack.enter_context(console.status(f"{side.host}: {fault}"))
        if side.host == MLFLOW and server.runtime:  # whose ping says that a worker lives, no more
            cpus = os.sched_getaffinity(server.server.processes()[0])
            runtime = stack.enter_context(_client(server.runtime, cpus))
            questions.append(partial(_state, runtime))
        load = stack.enter_context(Load(port, target, questions, kind))
        beside = stack.enter_context(ThreadPoolExecutor(1))
        while len(taken) < times and np.inf not in whole:
            victims, begun = _victims(server, side.host, victim), time.monotonic()
            if victims:
                gone = {victims[0], *(server.processes()["actors"] if victim != "worker" else ())}
                load.faults.append(begun)
                if fault == HELD:
                    gone = set()
                    _hold_up(victims[0])
                else:
                    os.kill(victims[0], signal.SIGKILL)
                again = beside.submit(_whole_after, server, side.host, begun, gone)
                taken.append(load.back_after(begun))
                whole.append(again.result())
            else:  # it has not come back from what was killed before
                taken.append(np.inf)
                whole.append(np.inf)
        settled = time.monotonic()
        time.sleep(QUIET_SECONDS)
    ends = Counter(entry.end for entry in load.entries)
    answers = [entry.at for entry in load.entries if entry.answered]
    later = [probe.answered for probe in chain(*load.probes) if probe.begun > settled]
    return {
        "host": side.host,
        "fault": fault,
        "times": len(taken),
        "back_s": taken,
        "whole_s": whole,
        "requests": load.asked,
        "answered": ends[http.client.OK],
        "refused": sum(n for end, n in ends.items() if isinstance(end, int) and end != 200),
        "broken": sum(n for end, n in ends.items() if isinstance(end, str)) - ends["TimeoutError"],
        "silent": load.asked - len(load.entries) + ends["TimeoutError"],
        "ends": {str(end): count for end, count in ends.items()},
        "cosines": [entry.cosine for entry in load.entries if entry.answered],
        "ready": told(answers, load.probes[-1], load.faults)._asdict(),
        "not_ready_later": later.count(False),
        "asked_later": len(later),
    }


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    columns = ["host", "fault", "times", "back, s", "worst", "whole, s"]
    counts = ("requests", "refused", "broken", "silent")
    harness.show(
        "Faults under load",
        [*columns, *counts],
        [
            (
                row["host"],
                row["fault"],
                str(row["times"]),
                f"{np.median(row['back_s']):.2f}",
                f"{max(row['back_s']):.2f}",
                f"{np.median(row['whole_s']):.1f}",
                *(f"{row[name]:,}" for name in counts),
            )
            for row in rows
        ],
        f"{CALLERS} callers, {WORKERS} workers; held up: for {HELD_SECONDS:g} s, which count; "
        "back: until nobody has\nto wait, or is refused; whole: until every process is there "
        "again; refused: with a\nstatus; broken: the line was, with a worker; silent: no end",
    )


def checks(rows: Sequence[dict[str, Any]]) -> list[Check]:
    """Return whether the service was back in time, and nobody was forgotten or told wrongly."""
    found = []
    for row in rows:
        name, most = f"{row['host']}, {row['fault']}", MOST_SECONDS[row["fault"]]
        back, whole = max(row["back_s"]), max(row["whole_s"])
        found.append(_at_most(f"{name}: seconds until it is back", back, most))
        found.append(_at_most(f"{name}: seconds until it is whole", whole, _WAIT_SECONDS))
        found.append(_at_most(f"{name}: requests without an end", row["silent"], 0))
        allowed = CALLERS * row["times"] if row["fault"] == "worker killed" else 0
        found.append(_at_most(f"{name}: requests broken off", row["broken"], allowed))
        found.append(_at_most(f"{name}: requests refused", row["refused"], 0))
        who, said = "its runtime" if row["host"] == MLFLOW else "it", Told(**row["ready"])
        # A kill may be over too soon to be asked in.
        heard = said.silences >= (row["times"] if row["fault"] == HELD else 0)
        words = f"{name}: silences, of {said.silences}, in which {who} was called ready"
        found.append(_at_most(words, said.in_vain if heard else np.inf, 0))
        words = f"{name}: times that {who} was not called ready within {AGAIN_SECONDS:g} s of one"
        found.append(_at_most(words, said.late, 0))
        words = f"{name}: times not ready, of {row['asked_later']} once it was whole"
        unready = row["not_ready_later"] if row["asked_later"] else np.inf
        found.append(_at_most(words, unready, 0))
    cosines = np.array([cosine for row in rows for cosine in row["cosines"]])
    share, least = float((cosines >= COSINE).mean()), float(cosines.min())
    words = f"share of {len(cosines):,} answers with cosine >= {COSINE}"
    found.append(Check(words, share, f">= {COSINE_SHARE}", share >= COSINE_SHARE))
    found.append(Check("least cosine", least, f">= {COSINE_LEAST}", least >= COSINE_LEAST))
    for row in rows:
        del row["cosines"]
    return found


def _at_most(name: str, value: float, most: float) -> Check:
    return Check(name, value, f"<= {most:g}", value <= most)


def _victims(server: Running, host: str, victim: str) -> list[int]:
    if victim == "worker":
        return _workers(server, host)
    return server.processes()["actors" if victim == "actor" else "daemon"]


def _hold_up(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(HELD_SECONDS)
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def _client(host: Host, cpus: Set[int]) -> Iterator[lrai.Runtime]:
    """Yield the runtime that is there; who asks it has these CPUs, for it may start the next."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        runtime = lrai.Runtime(host.config, address=host.address)
    finally:
        os.sched_setaffinity(0, own)
    with runtime:
        yield runtime


def _readiness(port: int, path: str) -> int | str:
    """Return what a host answers, or what became of the line."""
    end, _ = _asked(port, "GET", path, None, _PROBE_MOST_SECONDS)
    return end


def _state(runtime: lrai.Runtime) -> int | str:
    """Return 200 where the runtime makes progress, or how it is."""
    try:
        state = runtime.ready()
    except lrai.LraiError as error:
        return type(error).__name__
    return http.client.OK if state in ("ok", "idle") else state


def _workers(server: Running, host: str) -> list[int]:
    """Return the processes that take requests, and are attached to the runtime."""
    found = []
    for pid in server.processes()["host"]:
        with contextlib.suppress(OSError):
            process = Path(f"/proc/{pid}")
            attached = any("memfd:lrai" in str(fd.readlink()) for fd in (process / "fd").iterdir())
            if attached and _WORKER[host] in (process / "cmdline").read_bytes():
                found.append(pid)
    return found


def _whole_after(server: Running, host: str, killed: float, gone: Set[int]) -> float:
    """Return how long after `killed` every process is there again, without those that are gone.

    Infinite if they are not.
    """
    deadline = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < deadline:
        processes = server.processes()
        there = [set(processes[name]) - gone for name in ("daemon", "actors")]
        if all(there) and len(set(_workers(server, host)) - gone) == WORKERS:
            whole = time.monotonic() - killed
            time.sleep(QUIET_SECONDS)  # a worker that has just come takes requests, too
            return whole
        time.sleep(0.05)
    return float("inf")


def _asked(
    port: int, method: str, path: str, body: bytes | None, most_seconds: float = _WAIT_SECONDS
) -> tuple[int | str, bytes]:
    """Return the status of a request and its content, or what became of its line."""
    line = http.client.HTTPConnection(HOST, port, timeout=most_seconds)
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
