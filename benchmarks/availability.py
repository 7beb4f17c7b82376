"""Whether everybody is answered while actors and the scheduler are killed and versions switched.

Client processes send requests at their times (open loop) at .7 of the measured capacity, in bursts
at 1.5 times. Meanwhile an actor is killed every half minute, the daemon, in which the scheduler
runs, twice, and the version that serves is switched twice. Every answer is compared with what the
version that it names gives for its own row; a ledger holds every request with each of its ends.

    python benchmarks/availability.py --quick
"""

from __future__ import annotations

import argparse
import enum
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NamedTuple

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [
    str(_ROOT),
    *(p for p in sys.path if p and Path(p).resolve() != _ROOT / "benchmarks"),
]
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402 - after the lines above
import numpy.typing as npt  # noqa: E402

import lrai_core as lrai  # noqa: E402
from benchmarks import harness  # noqa: E402
from benchmarks.harness import Check, console  # noqa: E402
from benchmarks.host import Helper, Host, end_on_sigterm, percentile  # noqa: E402

Times = npt.NDArray[np.float64]

CLIENTS: Final = 3
LOAD: Final = 0.7  # of capacity
BURST: Final = 1.5
PERIOD_SECONDS: Final = 30.0  # in each of them one burst, and one actor is killed
BURST_AT, BURST_SECONDS = 12.0, 3.0
DEADLINE_MS: Final = 5_000.0
ANSWERED: Final = 0.9999  # of the admitted
ADMITTED: Final = 0.99  # within capacity
EXCEPTED_SECONDS: Final = 2.0  # after each kill
BACK_SECONDS: Final = {"actor": 2.0, "daemon": 5.0}  # until an answer, in the median
REFUSED_SECONDS: Final = 0.5
TOLERANCE: Final = 1e-4  # of unit vectors' elements, as for fp32 in the other benchmarks
SEED: Final = 0
NAME: Final = "encoder"

_SECONDS, _QUICK_SECONDS = 600.0, 120.0
_CAPACITY_ROUNDS, _CAPACITY_SECONDS, _WINDOW = 3, 5.0, 24
_REQUESTS: Final = 256
_TICK_SECONDS: Final = 0.001
_PAUSE_SECONDS: Final = 3.0
_LEFT_SECONDS: Final = 30.0  # after the last deadline
_COLUMNS: Final = 100
_BARS: Final = " ▁▂▃▄▅▆▇█"


class End(enum.IntEnum):
    """How a request ended."""

    NOT_YET = 0
    ANSWERED = 1
    WRONG = 2  # an answer, but not to this request
    FAILED = 3  # after it was admitted
    REFUSED = 4


class Event(NamedTuple):
    """What was done to the runtime, and when, in seconds from the start."""

    at: float
    kind: str  # actor | daemon | switch


@dataclass(slots=True)
class Ledger:
    """Every request, as its client saw it; one entry each. Times in seconds from the start."""

    due: Times
    sent: Times  # nan: never
    ended: Times
    how: npt.NDArray[np.int8]  # End
    ends: npt.NDArray[np.int8]  # how many there were
    version: npt.NDArray[np.int8]  # index, -1 without an answer
    errors: Counter[str]

    @classmethod
    def empty(cls, due: Times) -> Ledger:
        """Return a ledger of requests that are to be sent."""
        nothing = np.full(len(due), np.nan)
        return cls(
            due,
            nothing,
            nothing.copy(),
            np.zeros(len(due), np.int8),
            np.zeros(len(due), np.int8),
            np.full(len(due), -1, np.int8),
            Counter(),
        )

    @classmethod
    def joined(cls, ledgers: Sequence[Ledger]) -> Ledger:
        """Return one ledger of all requests."""
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(one, name) for one in ledgers])
            for name in ("due", "sent", "ended", "how", "ends", "version")
        }
        return cls(**arrays, errors=sum((one.errors for one in ledgers), Counter()))

    def are(self, *how: End) -> npt.NDArray[np.bool_]:
        """Return which requests ended in one of these ways."""
        return np.isin(self.how, how)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; return 1 where a check does not hold."""
    arguments = _arguments(argv)
    end_on_sigterm()
    seconds = arguments.seconds or (_QUICK_SECONDS if arguments.quick else _SECONDS)
    plan = events_of(seconds, SEED)
    with (
        tempfile.TemporaryDirectory(prefix="lrai-availability-") as scratch,
        Host(actor__threads=1) as host,
        ExitStack() as stack,
    ):
        artifacts, expected = two_versions(Path(scratch))
        given = (host.settings, host.address, [str(path) for path in artifacts])
        saved = Path(scratch, "expected.npz")
        np.savez(saved, allow_pickle=False, **expected)
        clients = [stack.enter_context(Helper(client, *given, str(saved))) for _ in range(CLIENTS)]
        for one in clients:
            one.hear()
        capacity = measured_capacity(clients)
        runtime = stack.enter_context(lrai.Runtime(host.config, address=host.address))
        start = time.monotonic() + 1.0
        for index, one in enumerate(clients):
            due = arrivals(capacity * LOAD / CLIENTS, BURST / LOAD, seconds, SEED + index)
            one.line.send(("open", due, start))
        with console.status(f"{seconds:g} s of load"):
            done, problems = strike(host, runtime, plan, artifacts, start)
            parts = [one.hear(seconds + DEADLINE_MS / 1e3 + 2 * _LEFT_SECONDS) for one in clients]
        after = measured_capacity(clients)
        console.print(f"capacity: {capacity:,.0f} requests/s before, {after:,.0f} after")
    return report(arguments, seconds, capacity, Ledger.joined(parts), done, problems)


def two_versions(folder: Path) -> tuple[list[Path], dict[str, npt.NDArray[Any]]]:
    """Return MiniLM compiled, then the same with its answers negated, and requests with answers.

    So an answer of the wrong version is as wrong as that to another request.
    """
    import onnx
    import onnxruntime
    from onnx import helper

    from benchmarks import models

    with console.status("compiling two versions of MiniLM"):
        source = models.minilm_onnx(folder / "one.onnx")
        other = onnx.load(source)
        (output,) = other.graph.output
        inner = f"{output.name}_of_one"
        for node in other.graph.node:
            node.output[:] = [inner if name == output.name else name for name in node.output]
        other.graph.node.append(helper.make_node("Neg", [inner], [output.name]))
        onnx.save(other, folder / "two.onnx")
        artifacts = [
            lrai.compile(folder / f"{name}.onnx", out=folder / f"{name}.lrai", threads=1).path
            for name in ("one", "two")
        ]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        alone = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        expected: dict[str, npt.NDArray[Any]] = {}
        for index, request in enumerate(models.requests(_REQUESTS, SEED)):
            expected[f"input{index}"] = request["input_ids"]
            expected[f"output{index}"] = alone.run(None, request)[0]
    return artifacts, expected


def arrivals(rate: float, burst: float, seconds: float, seed: int) -> Times:
    """Return when requests are sent: a Poisson process, faster by `burst` during bursts."""
    random = np.random.default_rng(seed)
    count = random.poisson(rate * burst * seconds)
    times = np.sort(random.uniform(0, seconds, count))
    kept = bursting(times) | (random.uniform(size=count) < 1 / burst)
    return times[kept]


def bursting(times: Times) -> npt.NDArray[np.bool_]:
    """Return which times lie in a burst."""
    phase = times % PERIOD_SECONDS
    return (phase >= BURST_AT) & (phase < BURST_AT + BURST_SECONDS)


def events_of(seconds: float, seed: int) -> list[Event]:
    """Return what is done and when.

    An actor is killed once in every period, at random, so now and then in a burst; twice the daemon
    is killed, in a third and two thirds of the run; versions are switched in a sixth and a half,
    all of it a few seconds apart, so that it can be said what recovery belongs to.
    """
    random = np.random.default_rng(seed)
    found = [Event(seconds * share, "daemon") for share in (1 / 3, 2 / 3)]
    found += [Event(seconds * share, "switch") for share in (1 / 6, 1 / 2)]
    for period in range(int(seconds // PERIOD_SECONDS)):
        while True:
            at = (period + random.uniform(0.1, 0.9)) * PERIOD_SECONDS
            if min(abs(at - other.at) for other in found) > _PAUSE_SECONDS:
                break
        found.append(Event(at, "actor"))
    return sorted(found)


def measured_capacity(clients: Sequence[Helper]) -> float:
    """Return the requests per second of all clients together when they never let up."""
    rates = []
    for _ in range(_CAPACITY_ROUNDS):
        for one in clients:
            one.line.send(("closed", _CAPACITY_SECONDS))
        rates.append(sum(one.hear() for one in clients))
    return float(np.median(rates))


def strike(
    host: Host,
    runtime: lrai.Runtime,
    plan: Sequence[Event],
    artifacts: Sequence[Path],
    start: float,
) -> tuple[list[Event], list[str]]:
    """Do what is planned; return what was done, and what went wrong with it."""
    done, problems, switched = list[Event](), list[str](), 0
    for event in plan:
        time.sleep(max(0.0, start + event.at - time.monotonic()))
        if event.kind == "switch":
            switched += 1
            at = time.monotonic() - start
            try:
                runtime.swap(NAME, artifacts[switched % 2])
            except lrai.LraiError as error:
                problems.append(f"switch {switched}: {error}")
            else:
                done += [Event(at, "begin"), Event(time.monotonic() - start, "switch")]
            continue
        pids = host.actors() if event.kind == "actor" else host.daemons()
        if not pids:
            problems.append(f"no {event.kind} to kill at {event.at:.0f} s")
            continue
        os.kill(pids[0], signal.SIGKILL)
        done.append(Event(time.monotonic() - start, event.kind))
    return done, problems


def client(
    line: Connection,
    settings: Mapping[str, Any],
    address: str,
    artifacts: Sequence[str],
    expected: str,
) -> None:
    """Be a client: send requests when told to, and say how they ended."""
    versions = [lrai.Artifact.open(path).version for path in artifacts]
    with (
        np.load(expected) as content,
        lrai.Runtime(lrai.load_config(call=settings), address=address) as runtime,
    ):
        runtime.load(artifacts[0], name=NAME)
        rows = [_request(content[f"input{index}"]) for index in range(_REQUESTS)]
        outputs = np.stack([content[f"output{index}"] for index in range(_REQUESTS)])
        sender = Sender(runtime, rows, outputs, versions)
        line.send("ready")
        while True:
            what, *arguments = line.recv()
            line.send(sender.closed(*arguments) if what == "closed" else sender.open(*arguments))


class Sender:
    """The requests of one client, and what their answers have to be."""

    def __init__(
        self,
        runtime: lrai.Runtime,
        requests: Sequence[lrai.InferenceRequest],
        outputs: npt.NDArray[Any],
        versions: Sequence[str],
    ) -> None:
        self._runtime, self._requests, self._versions = runtime, requests, list(versions)
        self._outputs = np.stack([outputs, -outputs])  # float32 [version, request, 1, 384]

    def closed(self, seconds: float) -> float:
        """Return how many requests per second are answered when some are always on their way."""
        places, end, sent = threading.Semaphore(_WINDOW), time.monotonic() + seconds, 0
        begun, answered = time.monotonic(), Counter[bool]()

        def ended(future: Future[Any]) -> None:
            answered[future.exception() is None] += 1
            places.release()

        while time.monotonic() < end:
            places.acquire()
            future = self._runtime._backend.start(self._requests[sent % _REQUESTS])  # noqa: SLF001 - what `infer` waits for
            future.add_done_callback(ended)
            sent += 1
        for _ in range(_WINDOW):
            places.acquire()
        return answered[True] / (time.monotonic() - begun)

    def open(self, due: Times, start: float) -> Ledger:
        """Send requests at their times, and return the ledger when all should have ended."""
        ledger = Ledger.empty(due)
        which = np.random.default_rng(SEED).integers(_REQUESTS, size=len(due)).tolist()
        for index, at in enumerate(due.tolist()):
            if (early := start + at - time.monotonic()) > _TICK_SECONDS:
                time.sleep(early)
            ledger.sent[index] = time.monotonic() - start
            try:
                future = self._runtime._backend.start(self._requests[which[index]])  # noqa: SLF001 - likewise
            except lrai.LraiError as error:
                self._failed(ledger, start, index, error)
                continue
            future.add_done_callback(partial(self._ended, ledger, start, index, which[index]))
        end = time.monotonic() + DEADLINE_MS / 1e3 + _LEFT_SECONDS
        while not ledger.ends.all() and time.monotonic() < end:
            time.sleep(0.05)
        return ledger

    def _ended(
        self, ledger: Ledger, start: float, index: int, which: int, future: Future[Any]
    ) -> None:
        if error := future.exception():
            self._failed(ledger, start, index, error)
            return
        response, off = future.result(), np.inf
        if response.model_version in self._versions:
            ledger.version[index] = version = self._versions.index(response.model_version)
            (output,) = response.outputs.values()
            off = np.abs(output - self._outputs[version, which]).max()
        self._end(ledger, start, index, End.ANSWERED if off <= TOLERANCE else End.WRONG)

    def _failed(self, ledger: Ledger, start: float, index: int, error: BaseException) -> None:
        refused = was_refused(error, time.monotonic() - start - ledger.sent[index])
        ledger.errors[f"{type(error).__name__}: {error}"[:70]] += 1
        self._end(ledger, start, index, End.REFUSED if refused else End.FAILED)

    def _end(self, ledger: Ledger, start: float, index: int, how: End) -> None:
        ledger.ends[index] += 1
        ledger.ended[index] = time.monotonic() - start
        ledger.how[index] = how


def was_refused(error: BaseException, seconds: float) -> bool:
    """Return whether a request was refused at the door; otherwise it was admitted, and failed.

    Args:
        error: What it ended with.
        seconds: How long that took: what a daemon had admitted that was killed, and the next one
            refuses, is no refusal any more.
    """
    if isinstance(error, lrai.ActorError) or seconds > REFUSED_SECONDS:
        return False
    if isinstance(error, lrai.QueueFull | lrai.NotReady):
        return True
    at_the_door = ("the model takes" in str(error), "answered before it" in str(error))
    return isinstance(error, lrai.DeadlineExceeded) and any(at_the_door)


def count_lost(ledger: Ledger, kills: Sequence[Event]) -> None:
    """Count what was on its way when a daemon was killed, and was refused then, as failed.

    The one that was killed may have admitted it; who sends it again has to have it answered.
    """
    for kill in kills:
        lost = ledger.are(End.REFUSED) & (ledger.sent < kill.at) & (ledger.ended > kill.at)
        ledger.how[lost] = End.FAILED


def recoveries(ledger: Ledger, kills: Sequence[Event]) -> list[float]:
    """Return for each kill the seconds to the first answer to a request that was sent after it."""
    good = ledger.are(End.ANSWERED)
    sent, ended = ledger.sent[good], ledger.ended[good]
    return [float(np.min(ended[sent > kill.at], initial=np.inf)) - kill.at for kill in kills]


def within_capacity(ledger: Ledger, kills: Sequence[Event]) -> npt.NDArray[np.bool_]:
    """Return which requests were sent outside of bursts, and not right after a kill."""
    inside = ~bursting(ledger.due)
    for kill in kills:
        inside &= (ledger.sent < kill.at) | (ledger.sent >= kill.at + EXCEPTED_SECONDS)
    return inside


def least_admitted(ledger: Ledger, inside: npt.NDArray[np.bool_], seconds: float) -> float:
    """Return the share that was admitted of those `inside`, in the period where it was least.

    Of a period without any nothing is known, so it counts as none admitted.
    """
    refused = ledger.are(End.REFUSED)
    periods = range(max(1, math.ceil(seconds / PERIOD_SECONDS)))
    those = [inside & (ledger.due // PERIOD_SECONDS == period) for period in periods]
    return min(1 - float(refused[one].mean()) if one.any() else 0.0 for one in those)


def timeline(ledger: Ledger, done: Sequence[Event], seconds: float) -> list[str]:
    """Return a chart of what happened when, a column for some seconds."""
    width = max(1.0, np.ceil(seconds / _COLUMNS))
    edges = np.arange(0, seconds + width, width)
    answered = ledger.ended[ledger.are(End.ANSWERED)]
    lines = {
        "offered": np.histogram(ledger.due, edges)[0],
        "answered": np.histogram(answered, edges)[0],
        "refused": np.histogram(ledger.ended[ledger.are(End.REFUSED)], edges)[0],
        "failed": np.histogram(ledger.ended[ledger.are(End.FAILED, End.WRONG)], edges)[0],
    }
    top = max(1, *(int(counts.max()) for counts in lines.values()))
    marks = [" "] * (len(edges) - 1)
    for event in done:
        if event.kind != "begin":
            column = min(int(event.at / width), len(marks) - 1)
            marks[column] = event.kind[0].upper() if event.kind != "actor" else "a"
    found = [f"{'':>9} {''.join(marks)}"]
    for name, counts in lines.items():
        steps = np.ceil(counts / top * (len(_BARS) - 1)).astype(int)
        found.append(f"{name:>9} {''.join(_BARS[step] for step in steps)}")
    found.append(
        f"{'':>9} a column: {width:g} s; full: {top / width:,.0f}/s; "
        "a: an actor, D: the daemon killed, S: version switched"
    )
    return found


def report(
    arguments: argparse.Namespace,
    seconds: float,
    capacity: float,
    ledger: Ledger,
    done: Sequence[Event],
    problems: Sequence[str],
) -> int:
    """Print the chart and the table, check, and write."""
    for line in timeline(ledger, done, seconds):
        console.print(line)
    for problem in problems:
        console.print(f"[bold red]{problem}[/]")
    kills = {kind: [e for e in done if e.kind == kind] for kind in ("actor", "daemon")}
    every = [*kills["actor"], *kills["daemon"]]
    count_lost(ledger, kills["daemon"])
    total, refused = len(ledger.due), int(ledger.are(End.REFUSED).sum())
    answered, wrong = (int(ledger.are(end).sum()) for end in (End.ANSWERED, End.WRONG))
    failed = int(ledger.are(End.FAILED).sum())
    good = ledger.are(End.ANSWERED)
    latencies = (ledger.ended - ledger.due)[good] * 1e3
    served = [int((ledger.version[good] == version).sum()) for version in (0, 1)]
    inside = within_capacity(ledger, every)
    admitted_inside = 1 - float(ledger.are(End.REFUSED)[inside].mean())
    admitted_least = least_admitted(ledger, inside, seconds)
    odd = int((ledger.ends != 1).sum())
    share = answered / max(1, total - refused)
    times = {kind: recoveries(ledger, those) for kind, those in kills.items()}
    begins, switches = ([e.at for e in done if e.kind == k] for k in ("begin", "switch"))
    harness.show(
        f"{seconds:g} s at {LOAD:g} of {capacity:,.0f} requests/s, {BURST:g} in bursts",
        ["", "figure"],
        [
            ["requests", f"{total:,}"],
            ["answered correctly", f"{answered:,}"],
            ["answered by each version", " + ".join(f"{n:,}" for n in served)],
            ["refused", f"{refused:,}"],
            ["failed", f"{failed:,}"],
            ["wrong", f"{wrong:,}"],
            ["not ended", f"{int(ledger.are(End.NOT_YET).sum()):,}"],
            ["ms, median and 99th percentile", _pair(latencies, 0.5, 0.99, 0)],
            [
                "ms late that a request was sent, worst",
                f"{np.nanmax(ledger.sent - ledger.due) * 1e3:.0f}",
            ],
            *(
                [f"s from killing the {kind} to an answer, median and worst", _pair(t, 0.5, 1, 2)]
                for kind, t in times.items()
            ),
            [
                "s that switches took",
                ", ".join(f"{e - b:.1f}" for b, e in zip(begins, switches, strict=True)),
            ],
        ],
        "; ".join(f"{count} x {error}" for error, count in ledger.errors.most_common(6))
        or "no errors",
    )
    planned = Counter(event.kind for event in events_of(seconds, SEED))
    checks = [
        Check("admitted and answered correctly", share, f">= {ANSWERED}", share >= ANSWERED),
        Check(
            "admitted within capacity",
            admitted_inside,
            f">= {ADMITTED}",
            admitted_inside >= ADMITTED,
        ),
        Check(
            f"admitted within capacity, least of any {PERIOD_SECONDS:g} s",
            admitted_least,
            f">= {ADMITTED}",
            admitted_least >= ADMITTED,
        ),
        Check("requests without exactly one end", odd, "0", odd == 0),
        Check("wrong answers", wrong, "0", wrong == 0),
        *(
            Check(f"{kind} killed", len(kills[kind]), f"{n}", len(kills[kind]) == n)
            for kind, n in planned.items()
            if kind in kills
        ),
        Check(
            "versions switched",
            len(switches),
            f"{planned['switch']}",
            len(switches) == planned["switch"],
        ),
        Check("answers of the version served less", min(served), "> 0", min(served) > 0),
        *(
            Check(
                f"s from killing the {kind} to an answer, median",
                median,
                f"<= {most:g}",
                median <= most,
            )
            for kind, most in BACK_SECONDS.items()
            if times[kind]
            for median in [float(np.median(times[kind]))]
        ),
    ]
    return harness.conclude(
        "availability",
        arguments.out,
        harness.environment(1, ["numpy", "onnxruntime", "pyzmq", "msgspec"]),
        [{"event": event.kind, "at_seconds": event.at} for event in done],
        checks,
        capacity_per_second=capacity,
        seconds=seconds,
        ends={end.name.lower(): int(ledger.are(end).sum()) for end in End},
        errors=dict(ledger.errors),
        recovery_seconds=times,
        problems=list(problems),
        quick=arguments.quick,
    )


def _pair(values: Any, first: float, second: float, digits: int) -> str:
    return ", ".join(f"{percentile(values, share):,.{digits}f}" for share in (first, second))


def _request(ids: npt.NDArray[np.int64]) -> lrai.InferenceRequest:
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return lrai.InferenceRequest(model_name=NAME, inputs=inputs, timeout_ms=DEADLINE_MS)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{_QUICK_SECONDS:g} s of load")
    parser.add_argument("--seconds", type=float, help=f"of load; by default {_SECONDS:g}")
    parser.add_argument("--data", type=Path, help="not needed here")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
