"""Coalescing in real time: LRAI against ONNX Runtime in a plain loop, on one core.

The MiniLM sentence encoder, fp32 and the variant that the compiler chose, with requests of the
lengths of search queries and of the Azure conversations. The engine, of LRAI's actor as of the
peers, has one core and one thread; scheduler and load generator share another. Peers
(`one_by_one.py`) run the same file of the same variant and have no transport: what they lose they
lose to the policy, and to huge pages, which LRAI asks for where its sessions lie and they do not.

Closed loop: 64 requests wait at any time. Open loop: Poisson arrivals at 1.5 times what one by one
can do, each due a fixed time after it.

    python benchmarks/realtime.py --data ../shared/data --quick
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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [
    str(_ROOT),
    *(p for p in sys.path if p and Path(p).resolve() != _ROOT / "benchmarks"),
]
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402 - after the lines above
from numpy.typing import NDArray  # noqa: E402

import lrai_core as lrai  # noqa: E402
from benchmarks import harness, models  # noqa: E402
from benchmarks.harness import Check, console, interval  # noqa: E402
from benchmarks.host import end_on_sigterm  # noqa: E402
from benchmarks.one_by_one import memory_mb  # noqa: E402
from benchmarks.processes import confine, on_cpus  # noqa: E402

Row = dict[str, Any]

WINDOW: Final = 64
OVERLOAD: Final = 1.5
SLO_CALLS: Final = 10  # the SLO, in mean calls of one by one
FIFO_ROWS: Final = 8
LEAST: Final = {"search": 1.15, "azure": 0.97}  # of the rate of one by one
LEAST_FIFO: Final = {"search": 1.8, "azure": 3.0}  # of the rate of FIFO batches
LEAST_BEST, LEAST_DEFAULT = 1.2, 2.0  # of the answers in time
MOST_MEMORY_MB: Final = 20.0
COSINE, COSINE_SHARE = 0.99, 0.98  # the gate's own condition for unit vectors
COSINE_LEAST = 0.8  # what one text has with another is far below
SEED: Final = 0
# Limit of the queue and timeout in shares of the SLO; the first is the default of most servers.
SETTINGS: Final[Sequence[tuple[int | None, float | None]]] = tuple(
    itertools.product((None, 4, 8, 16), (None, 0.9, 0.7))
)
SWEEP: Final = 0.6  # of the seconds of a round, for each setting


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured."""

    rounds: int
    requests: dict[str, int]  # of a round in closed loop
    open_rounds: int  # of LRAI, the best setting of the peer, and its default, in turns
    open_seconds: float  # of each
    sweeps: int  # over all settings of the peer, before
    fp32: bool


QUICK: Final = Extent(3, {"search": 300, "azure": 120}, 3, 2.0, 1, fp32=False)
FULL: Final = Extent(9, {"search": 800, "azure": 300}, 9, 5.0, 2, fp32=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, measure, print, write; return 1 where a check does not hold."""
    arguments = _arguments(argv)
    end_on_sigterm()
    extent = QUICK if arguments.quick else FULL
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        console.print("two CPUs are needed: one for the engine, one for the rest")
        return 2
    lengths = {
        "search": models.search_lengths(extent.requests["search"], SEED + 1),
        "azure": azure_lengths(extent.requests["azure"], arguments.data),
    }
    rows: list[Row] = []
    checks: list[Check] = []
    with tempfile.TemporaryDirectory(prefix="lrai-realtime-") as scratch:
        artifact = arguments.artifact or compile_minilm(Path(scratch), cpus[0])
        artifact = lrai.Artifact.open(artifact)
        chosen = artifact.manifest.chosen
        checks.append(harness.int8_check(artifact.manifest))
        for variant in ["fp32", chosen] if extent.fp32 else [chosen]:
            found = measure(artifact, variant, lengths, extent, cpus, Path(scratch))
            rows += found[0]
            checks += found[1]
    report(rows, extent)
    environment = harness.environment(1, ["lrai", "onnxruntime", "numpy", "pyzmq"])
    return harness.conclude(
        "realtime",
        arguments.out,
        environment,
        rows,
        checks,
        azure="trace" if arguments.data else "lognormal of the same median and 99th percentile",
        peers="no transport: requests lie in their memory, arrivals come from the same schedule; "
        f"{harness.ON_HUGE_PAGES}",
        quick=arguments.quick,
    )


def compile_minilm(folder: Path, cpu: int) -> Path:
    """Return an artifact of the sentence encoder, compiled on the CPU that it is measured on."""
    source = models.minilm_onnx(folder / "minilm.onnx")
    requests = models.requests(1_200, SEED + 5)
    evaluation = models.Tokenizer().pad([request["input_ids"][0] for request in requests])
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    out = folder / "minilm.lrai"
    with console.status("compiling"):
        lrai.compile(
            source, out=out, evaluation=evaluation, output_map="l2_normalised", threads=1, seed=SEED
        )
    os.sched_setaffinity(0, before)
    return out


def azure_lengths(count: int, data: Path | None) -> NDArray[np.int64]:
    """Return lengths of the Azure conversations' prompts, rescaled to 8..256 tokens.

    Without the data: drawn from a lognormal with their median and 99th percentile.
    """
    if data is None:
        console.print("without --data the Azure lengths are drawn from a lognormal like theirs")
        drawn = np.random.default_rng(SEED).lognormal(np.log(1_020), 0.6, 20_000)
    else:
        text = (data / "traces" / "azure_llm_conv.csv").read_text(encoding="ascii")
        drawn = np.array([float(line.split(",")[1]) for line in text.splitlines()[1:]])
    return np.clip(8 + drawn / np.quantile(drawn, 0.99) * 248, 8, 256).astype(np.int64)[:count]


def make_requests(lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return the token ids of one row each: arbitrary words between [CLS] and [SEP]."""
    random, tokenizer = np.random.default_rng(SEED), models.Tokenizer()
    made = [random.integers(1_000, 20_000, length) for length in lengths.tolist()]
    for ids in made:
        ids[0], ids[-1] = tokenizer.cls_id, tokenizer.sep_id
    return made


def measure(
    artifact: lrai.Artifact,
    variant: str,
    lengths: dict[str, NDArray[np.int64]],
    extent: Extent,
    cpus: Sequence[int],
    scratch: Path,
) -> tuple[list[Row], list[Check]]:
    """Measure one variant with every kind of lengths; memory at the end of it all."""
    rows: list[Row] = []
    checks: list[Check] = []
    with contextlib.ExitStack() as stack:
        # Both see the same requests, and the peer runs the small calls only: its memory counts.
        files = {name: scratch / f"{variant}-{name}.npz" for name in lengths}
        requests = {name: make_requests(lengths[name]) for name in lengths}
        for name, ids in requests.items():
            np.savez(files[name], lengths=lengths[name], input_ids=np.concatenate(ids))
        start = partial(Peer, artifact, variant, cpus[0], files["search"])
        alone, fifo = stack.enter_context(start()), stack.enter_context(start())
        ours = stack.enter_context(served(artifact, variant, cpus))
        for name in lengths:
            for peer in (alone, fifo):
                peer.ask(do="requests", requests=str(files[name]))
            # In its process, as what this one maps of the weights would count for the actor, too.
            alone.ask(do="answers", file=str(answers := scratch / f"{variant}-{name}.npy"))
            ours.expected = np.load(answers)
            found, more = closed(ours, alone, fifo, requests[name], extent, f"{variant}, {name}")
            rows.append({"loop": "closed", "variant": variant, "lengths": name, **found})
            checks += more
            found, more = opened(ours, alone, requests[name], extent, f"{variant}, {name}")
            rows.append({"loop": "open", "variant": variant, "lengths": name, **found})
            checks += more
        checks += agreed(variant, np.concatenate(ours.cosines))
        actor, plain = ours.actor_memory(), alone.ask(do="memory")
    above = actor["pss_mb"] - plain["pss_mb"]
    row = {"loop": "memory", "variant": variant, "actor": actor, "one_by_one": plain}
    name = (
        f"{variant}: MB of the actor above one by one (RSS {actor['rss_mb'] - plain['rss_mb']:.0f})"
    )
    checks.append(Check(name, above, f"<= {MOST_MEMORY_MB:g}", above <= MOST_MEMORY_MB))
    return [*rows, row], checks


class Peer:
    """A process with ONNX Runtime in a plain loop."""

    def __init__(
        self,
        artifact: lrai.Artifact,
        variant: str,
        cpu: int,
        requests: Path,
        plain: Path | None = None,
    ) -> None:
        """Start it and wait until it has loaded the variant, or a `plain` file in its place."""
        chosen = artifact.manifest.variant(variant)
        with on_cpus():  # it goes to its own when it has imported onnxruntime
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from benchmarks.one_by_one import main; main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(_ROOT)},
            )
        self.ask(
            cpu=cpu,
            model=str(plain or artifact.path / chosen.model),
            weights=str(artifact.path / chosen.weights) if chosen.weights and not plain else "",
            optimised=plain is None,
            requests=str(requests),
        )

    def ask(self, **what: Any) -> dict[str, Any]:
        """Return its answer to one line."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the peer has no pipes")
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


class Ours:
    """LRAI with one model, whose actor has a core of its own.

    Attributes:
        expected: What one by one answers to the requests.
        cosines: Of all answers so far to that.
    """

    def __init__(self, runtime: lrai.Runtime) -> None:
        self._runtime = runtime
        (self._model,) = runtime.models()
        self.expected: NDArray[np.float32] = np.zeros((0, 0), np.float32)
        self.cosines: list[NDArray[np.float64]] = []

    def closed(self, requests: Sequence[NDArray[np.int64]]) -> tuple[float, float, float]:
        """Return requests per second, rows a call and the p95 in ms with `WINDOW` waiting."""
        before, latencies = self._calls(), np.zeros(len(requests))
        answers: dict[int, NDArray[Any]] = {}
        room = threading.Semaphore(WINDOW)  # whoever is answered makes room, in whatever order

        def note(index: int, sent: float, future: Future[Any]) -> None:
            (answers[index],) = future.result().outputs.values()
            latencies[index] = time.perf_counter() - sent
            room.release()

        started = time.perf_counter()
        for index, ids in enumerate(requests):
            room.acquire()
            future = self._start(ids, None)
            future.add_done_callback(partial(note, index, time.perf_counter()))
        for _ in range(WINDOW):
            if not room.acquire(timeout=60):
                raise RuntimeError("a request was not answered")
        seconds = time.perf_counter() - started
        self._compare(answers)
        calls = self._calls() - before
        p95 = float(np.quantile(latencies, 0.95)) * 1e3
        return len(requests) / seconds, len(requests) / calls, p95

    def open_loop(
        self, requests: Sequence[NDArray[np.int64]], arrivals: Sequence[float], slo: float
    ) -> list[float]:
        """Return the seconds from arrival to answer of those that were answered."""
        latencies, ended = np.full(len(arrivals), np.inf), threading.Semaphore(0)
        answers: dict[int, NDArray[Any]] = {}
        start = time.perf_counter() + 0.05

        def note(index: int, future: Future[Any]) -> None:
            if future.exception() is None:
                latencies[index] = time.perf_counter() - start - arrivals[index]
                (answers[index],) = future.result().outputs.values()
            ended.release()

        sent = 0
        for index, arrival in enumerate(arrivals):
            time.sleep(max(0.0, start + arrival - time.perf_counter()))
            # What is left of its time, since a generator may be late as well.
            left = arrival + slo - (time.perf_counter() - start)
            with contextlib.suppress(lrai.LraiError):  # refused
                future = self._start(requests[index % len(requests)], left * 1e3)
                future.add_done_callback(partial(note, index))
                sent += 1
        for _ in range(sent):
            ended.acquire()
        self._compare(answers)
        return [float(seconds) for seconds in latencies if seconds < np.inf]

    def _compare(self, answers: dict[int, NDArray[Any]]) -> None:
        """Note how near answers are to what is expected, by the number of the request."""
        if answers:
            got = np.concatenate([*answers.values()])
            meant = self.expected[[index % len(self.expected) for index in answers]]
            self.cosines.append(cosines(got, meant))

    def actor_memory(self) -> dict[str, float]:
        """Return the resident memory of the actor."""
        (model,) = self._runtime.models()
        return memory_mb(model.actor_pids[0])

    def _start(self, ids: NDArray[np.int64], timeout_ms: float | None) -> Future[Any]:
        row = ids[None]
        request = lrai.InferenceRequest(
            model_name=self._model.name,
            inputs={"input_ids": row, "attention_mask": np.ones_like(row)},
            timeout_ms=timeout_ms,
        )
        future: Future[Any] = self._runtime._backend.start(request)  # noqa: SLF001 - what `infer` waits for
        return future

    def _calls(self) -> int:
        return self._runtime.stats().get("batch_completed", 0)


def cosines(got: NDArray[Any], meant: NDArray[Any]) -> NDArray[np.float64]:
    """Return those of each row with the other one's, 0 where either is none."""
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(meant, axis=1)
    found: NDArray[np.float64] = (got * meant).sum(axis=1) / np.maximum(norms, 1e-12)
    return found


def agreed(variant: str, found: NDArray[np.float64], other: str = "one by one") -> list[Check]:
    """Return the checks of the answers: rows of int8 that share a call may differ by a little."""
    share, least = float((found >= COSINE).mean()), float(found.min())
    name = f"{variant}: share of {len(found):,} answers with cosine >= {COSINE} to {other}"
    return [
        Check(name, share, f">= {COSINE_SHARE}", share >= COSINE_SHARE),
        Check(
            f"{variant}: least cosine of an answer",
            least,
            f">= {COSINE_LEAST}",
            least >= COSINE_LEAST,
        ),
    ]


@contextlib.contextmanager
def served(artifact: lrai.Artifact, variant: str, cpus: Sequence[int]) -> Iterator[Ours]:
    """Yield LRAI with the actor on the first of these CPUs, and this process on the second."""
    config = lrai.load_config(call={"actor.threads": 1})
    with lrai.Runtime(config) as runtime:
        runtime.load(artifact, variant=variant)
        (model,) = runtime.models()
        confine(model.actor_pids, cpus[:1])
        confine([os.getpid()], cpus[1:2])
        try:
            yield Ours(runtime)
        finally:
            os.sched_setaffinity(0, cpus)


def closed(
    ours: Ours,
    alone: Peer,
    fifo: Peer,
    requests: Sequence[NDArray[np.int64]],
    extent: Extent,
    what: str,
) -> tuple[Row, list[Check]]:
    """Compare the rates while 64 requests wait, in turns."""
    kind = what.rpartition(" ")[2]
    pad = models.Tokenizer().pad_id
    ours.closed(requests)  # so that its model of the latency is that of this machine
    ask: dict[str, Callable[[], float]] = {
        "alone": lambda: alone.ask(do="closed", batch=1, pad=pad)["seconds"],
        "fifo": lambda: fifo.ask(do="closed", batch=FIFO_ROWS, pad=pad)["seconds"],
    }
    for peer in ask.values():
        peer()  # as warm
    rates: list[tuple[float, float, float]] = []
    figures: list[tuple[float, float, float]] = []
    with console.status(f"closed loop: {what}"):
        for turn in range(extent.rounds):
            seconds = {}
            for at in range(3):  # who is first, is so a third of the times
                who = ("ours", "alone", "fifo")[(at + turn) % 3]
                if who == "ours":
                    figures.append(ours.closed(requests))
                else:
                    seconds[who] = ask[who]()
            alone_s, fifo_s = seconds["alone"], seconds["fifo"]
            rates.append((figures[-1][0], len(requests) / alone_s, len(requests) / fifo_s))
    to_alone = interval([mine / one for mine, one, _ in rates])
    to_fifo = interval([mine / eight for mine, _, eight in rates])
    mine, one, eight = (float(np.median(column)) for column in zip(*rates, strict=True))
    row = {
        "lrai": mine,
        "one_by_one": one,
        "fifo": eight,
        "to_one_by_one": to_alone._asdict(),
        "to_fifo": to_fifo._asdict(),
        "rows_per_call": float(np.median([figure[1] for figure in figures])),
        "p95_ms": float(np.median([figure[2] for figure in figures])),
        "rounds": extent.rounds,
    }
    least, more = LEAST[kind], LEAST_FIFO[kind]
    return row, [
        Check(
            f"{what}: rate to one by one",
            to_alone.median,
            f">= {least:g}",
            to_alone.median >= least,
        ),
        Check(
            f"{what}: rate to FIFO of {FIFO_ROWS}, padded",
            to_fifo.median,
            f">= {more:g}",
            to_fifo.median >= more,
        ),
    ]


def opened(
    ours: Ours, alone: Peer, requests: Sequence[NDArray[np.int64]], extent: Extent, what: str
) -> tuple[Row, list[Check]]:
    """Compare how many are answered in time at 1.5 times the rate of one by one.

    The peer's best setting is found first. Then it, its default and LRAI run in turns, each with
    the load that one by one can do at that moment: a machine that others use too is not always as
    fast.
    """
    rates: list[float] = []
    p95: list[float] = []

    def in_time(
        setting: tuple[int | None, float | None] | None, turn: int, share: float = 1.0
    ) -> float:
        rate = len(requests) / alone.ask(do="closed", batch=1, pad=0)["seconds"]
        rates.append(rate)
        slo, random = SLO_CALLS / rate, np.random.default_rng([SEED, turn + 99])  # alike in a turn
        asked = int(OVERLOAD * rate * extent.open_seconds * share)
        arrivals = np.cumsum(random.exponential(1 / (OVERLOAD * rate), asked)).tolist()
        if setting is None:
            latencies = ours.open_loop(requests, arrivals, slo)
            p95.append(float(np.quantile(latencies, 0.95)) * 1e3 if latencies else 0.0)
        else:
            limit, timeout = setting
            timeout = timeout and timeout * slo
            answer = alone.ask(do="open", arrivals=arrivals, limit=limit, timeout=timeout)
            latencies = answer["latencies"]
        return float(np.sum(np.asarray(latencies) <= slo) / asked)

    with console.status(f"open loop: {what}"):
        turns = range(-extent.sweeps, 0)
        swept = [[in_time(one, turn, SWEEP) for one in SETTINGS] for turn in turns]
        best = SETTINGS[int(np.median(swept, axis=0).argmax())]
        sides = (None, best, SETTINGS[0])
        shares: list[list[float]] = []
        for turn in range(extent.open_rounds):
            row = [0.0, 0.0, 0.0]
            for at in range(3):  # who is first, is so a third of the times
                side = (at + turn) % 3
                row[side] = in_time(sides[side], turn)
            shares.append(row)
    ratios = [interval([mine / max(row[at], 1e-3) for mine, *row in shares]) for at in range(2)]
    mine, peer, default = np.median(shares, axis=0).tolist()
    found = {
        "slo_ms": SLO_CALLS / float(np.median(rates)) * 1e3,
        "asked_per_s": OVERLOAD * float(np.median(rates)),
        "in_time": {"lrai": mine, _setting(*best): peer, _setting(*SETTINGS[0]): default},
        "to_best": ratios[0]._asdict(),
        "to_default": ratios[1]._asdict(),
        "best": _setting(*best),
        "p95_ms": float(np.median(p95)),
        "rounds": extent.open_rounds,
    }
    names = (f"best one by one ({_setting(*best)})", "one by one without limits")
    checks = [
        Check(
            f"{what}, {OVERLOAD:g} x load: in time, to {name}, {ratio}",
            ratio.median,
            f">= {least:g}",
            ratio.median >= least,
        )
        for name, ratio, least in zip(names, ratios, (LEAST_BEST, LEAST_DEFAULT), strict=True)
    ]
    return found, checks


def _setting(limit: int | None, timeout: float | None) -> str:
    queue = "no limit" if limit is None else f"limit {limit}"
    return f"{queue}, " + ("no timeout" if timeout is None else f"timeout {timeout:g} SLO")


def report(rows: Sequence[Row], extent: Extent) -> None:
    """Print the tables."""
    by_loop = {loop: [row for row in rows if row["loop"] == loop] for loop in ("closed", "open")}
    harness.show(
        f"{WINDOW} requests waiting: requests per second",
        [
            "variant",
            "lengths",
            "lrai",
            "one by one",
            "FIFO 8",
            "to one by one",
            "rows/call",
            "p95 ms",
        ],
        [
            (
                row["variant"],
                row["lengths"],
                *(f"{row[which]:.0f}" for which in ("lrai", "one_by_one", "fifo")),
                str(harness.Interval(**row["to_one_by_one"])),
                f"{row['rows_per_call']:.1f}",
                f"{row['p95_ms']:.0f}",
            )
            for row in by_loop["closed"]
        ],
        f"medians of {extent.rounds} rounds in turns; 95 % bootstrap intervals; p95 of lrai\n"
        f"{harness.ON_HUGE_PAGES}",
    )
    harness.show(
        f"{OVERLOAD:g} times the load that one by one can do: % answered in time",
        ["variant", "lengths", "asked/s", "SLO ms", "lrai", "best peer", "no limits", "p95 ms"],
        [
            (
                row["variant"],
                row["lengths"],
                f"{row['asked_per_s']:.0f}",
                f"{row['slo_ms']:.0f}",
                *(
                    f"{100 * row['in_time'][name]:.1f}"
                    for name in ("lrai", row["best"], _setting(*SETTINGS[0]))
                ),
                f"{row['p95_ms']:.0f}",
            )
            for row in by_loop["open"]
        ],
        f"medians of {extent.open_rounds} rounds of {extent.open_seconds:g} s in turns; best peer: "
        f"of {len(SETTINGS)} settings, found before; p95 of what lrai answered",
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Coalescing in real time, on one core.")
    parser.add_argument("--quick", action="store_true", help="three minutes; not fp32")
    parser.add_argument("--data", type=Path, help="folder of data sets: lengths of a trace")
    parser.add_argument("--artifact", type=Path, help="of MiniLM, instead of compiling it")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
