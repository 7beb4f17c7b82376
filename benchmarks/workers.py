"""Four worker processes with one runtime together, against four with one each.

The worker processes are those of a host: each has callers that ask again as soon as they have their
answer, for MiniLM with the lengths of search queries. All sides run on all CPUs, in turns. One
runtime has an actor of one thread for every CPU, which is the setting for throughput, or one actor
with all threads, which is the one for memory, as it holds the weights once. What they take of it,
and how soon a further worker has its first answer, is seen on a model of BERT-base's size.

    python benchmarks/workers.py --quick
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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

import lrai_core as lrai  # noqa: E402
from benchmarks import harness  # noqa: E402
from benchmarks.harness import Check, Interval, console, interval  # noqa: E402
from benchmarks.host import Helper, Host, end_on_sigterm, held  # noqa: E402

WORKERS: Final = 4
CALLERS: Final = 8  # of each worker
NOT_BEHIND: Final = 0.97
MEMORY_RATIO: Final = 2.5
FIRST_SECONDS: Final = 1.0
EVALUATION_ROWS: Final = 1_200
SEED: Final = 0
ONE, ONE_WIDE, EACH = "one runtime, an actor a CPU", "one runtime, one actor", "one each"

_ATTACHES: Final = 5
_TOKENS: Final = (1_000, 20_000)  # ids of words, whatever they mean
_REQUESTS: Final = 400


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    rounds: int
    seconds: float
    variants: tuple[str, ...]


QUICK: Final = Plan(rounds=5, seconds=2.0, variants=("fp32",))
FULL: Final = Plan(rounds=10, seconds=3.0, variants=("fp32", "int8"))


Answers = dict[int, Any]  # the last one to each request


class Round(NamedTuple):
    """What one round of closed-loop requests showed, over all workers of a side."""

    requests_per_second: float
    rows_per_call: float
    p95_ms: float


@dataclass(slots=True)
class Side:
    """Workers with their runtime, or their runtimes."""

    name: str
    host: Host
    workers: list[Helper]
    rounds: list[Round] = field(default_factory=list)
    answers: list[Answers] = field(default_factory=list)  # of each worker, when all rounds are over

    def round(self, seconds: float) -> Round:
        """Have all callers ask for so long."""
        before = self._calls()
        for worker in self.workers:
            worker.line.send(("round", seconds))
        heard = [worker.hear() for worker in self.workers]
        calls = self._calls() - before
        latencies = np.concatenate([latencies for latencies, _ in heard])
        took = max(elapsed for _, elapsed in heard)
        p95_ms = float(np.quantile(latencies, 0.95)) * 1e3
        return Round(len(latencies) / took, len(latencies) / calls, p95_ms)

    def memory_bytes(self) -> int:
        """Return what workers, daemon and actors take; what they share counts once."""
        pids = [worker.pid for worker in self.workers]
        return sum(
            held(pid).pss_bytes for pid in (*pids, *self.host.daemons(), *self.host.actors())
        )

    def _calls(self) -> int:
        """Return the engine's calls so far; whoever shares a runtime sees all of them."""
        asked = self.workers if self.name == EACH else self.workers[:1]
        return sum(worker.ask("calls") for worker in asked)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; return 1 where a check does not hold."""
    arguments = _arguments(argv)
    end_on_sigterm()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # and all that it starts
    plan = QUICK if arguments.quick else FULL
    checks, content, table = list[Check](), list[dict[str, Any]](), list[list[str]]()
    with tempfile.TemporaryDirectory(prefix="lrai-workers-") as scratch:
        artifact = arguments.artifact or compile_minilm(Path(scratch), plan)
        manifest = lrai.Artifact.open(artifact).manifest
        names = {"fp32": "fp32", "int8": manifest.chosen}
        if "int8" in plan.variants:
            checks.append(harness.int8_check(manifest))
        for variant in plan.variants:
            sides = measure(artifact, names[variant], plan)
            ratios = compare(sides)
            checks += [*checks_of(variant, ratios), *agreement(variant, sides)]
            table += [_row(variant, side, ratios) for side in sides]
            content += [
                {"variant": names[variant], "side": side.name, "rounds": side.rounds}
                for side in sides
            ]
            content += [
                {"variant": names[variant], "side": side, "ratio": name, **value._asdict()}
                for side, those in ratios.items()
                for name, value in those.items()
            ]
        memory, first = large(Path(scratch), arguments.bert)
    harness.show(
        f"{WORKERS} workers, {CALLERS} callers each, closed loop, MiniLM, search lengths",
        ["variant, side", "requests/s", "ratio", "rows/call", "ratio", "p95 ms", "ratio"],
        table,
        f"medians of {plan.rounds} rounds of {plan.seconds:g} s; ratios within rounds, 95 %;\n"
        "an actor a CPU is the setting for throughput, one actor that for memory: nothing is both",
    )
    harness.show(
        "A model of BERT-base's size, fp32",
        ["side", "MB in all"],
        [[name, f"{value / 1e6:,.0f}"] for name, value in memory.items()],
        "one actor is the setting for memory, an actor a CPU that for throughput;\n"
        "a further worker's first answer: "
        + ", ".join(f"{opened:.2f} s ({whole:.2f} s from its start)" for opened, whole in first),
    )
    ratio, worst = memory[EACH] / memory[ONE_WIDE], max(opened for opened, _ in first)
    checks += [
        Check(f"memory, {EACH} / {ONE_WIDE}", ratio, f">= {MEMORY_RATIO}", ratio >= MEMORY_RATIO),
        Check(
            "first answer of a further worker, seconds, worst",
            worst,
            f"<= {FIRST_SECONDS:g}",
            worst <= FIRST_SECONDS,
        ),
    ]
    return harness.conclude(
        "workers",
        arguments.out,
        harness.environment(1, ["numpy", "onnxruntime", "pyzmq", "msgspec"]),
        [*content, {"memory_bytes": memory, "first_answer_seconds": first}],
        checks,
        quick=arguments.quick,
    )


def compile_minilm(folder: Path, plan: Plan) -> Path:
    """Compile MiniLM as `benchmarks/mlflow.py` does; without evaluation where fp32 is enough."""
    from benchmarks import models

    source, rows = models.minilm_onnx(folder / "minilm.onnx"), None
    if plan.variants != ("fp32",):
        evaluation = models.requests(EVALUATION_ROWS, SEED + 1)
        rows = models.Tokenizer().pad([request["input_ids"][0] for request in evaluation])
    with console.status("compiling MiniLM"):
        return lrai.compile(
            source,
            out=folder / "minilm.lrai",
            evaluation=rows,
            output_map="l2_normalised",
            threads=1,
            seed=SEED,
        ).path


def measure(artifact: Path, variant: str, plan: Plan) -> list[Side]:
    """Return all sides with their rounds, forwards and backwards in turns."""
    lengths = _lengths(_REQUESTS)
    with ExitStack() as stack:
        sides = [
            stack.enter_context(started(name, artifact, variant, lengths))
            for name in (ONE, ONE_WIDE, EACH)
        ]
        with console.status(f"measuring {variant}"):
            for side in sides:
                side.round(1.0)
            for turn in range(plan.rounds):
                for side in sides[:: -1 if turn % 2 else 1]:
                    side.rounds.append(side.round(plan.seconds))
        for side in sides:
            side.answers = [worker.ask("answers") for worker in side.workers]
    return sides


def large(folder: Path, model: Path | None) -> tuple[dict[str, int], list[tuple[float, float]]]:
    """Return the memory of all sides with a large model, and how soon further workers answer.

    The sides run one after the other: what two processes map of one file counts half for each.
    """
    with console.status("making and compiling a model of BERT-base's size"):
        artifact = model or _compile_bert(folder)
    memory, first = dict[str, int](), list[tuple[float, float]]()
    with console.status("measuring memory"):
        for name in (ONE_WIDE, ONE, EACH):
            with started(name, artifact, "fp32", [8]) as side:
                side.round(1.0)
                memory[name] = side.memory_bytes()
                for _ in range(_ATTACHES if name == ONE_WIDE else 0):
                    begun = time.monotonic()
                    arguments = (side.host.settings, side.host.address, str(artifact))
                    with Helper(attach, *arguments) as further:
                        seconds, ended = further.hear()
                        first.append((seconds, ended - begun))
    return memory, first


@contextmanager
def started(name: str, artifact: Path, variant: str, lengths: Sequence[int]) -> Iterator[Side]:
    """Yield a side whose workers are ready."""
    # Each of four actors has one thread, as more would only be in one another's way.
    cpus = len(os.sched_getaffinity(0))
    threads = cpus if name == ONE_WIDE else 1
    replicas = cpus if name == ONE else 1
    # Who has the model alone has it in itself, which is quickest, and takes least.
    isolation = "inline" if name == EACH else "process"
    own = {"actor__threads": threads, "actor__replicas": replicas, "actor__isolation": isolation}
    with Host(**own) as host, ExitStack() as stack:
        address = "embedded" if name == EACH else host.address
        given = (host.settings, address, str(artifact), variant, list(lengths))
        workers = [stack.enter_context(Helper(work, *given, i)) for i in range(WORKERS)]
        for worker in workers:
            worker.hear()
        yield Side(name, host, workers)


def work(
    line: Connection,
    settings: Mapping[str, Any],
    address: str,
    artifact: str,
    variant: str,
    lengths: Sequence[int],
    seed: int,
) -> None:
    """Be a worker: serve with a runtime, and have callers ask when told to."""
    with lrai.Runtime(lrai.load_config(call=settings), address=address) as runtime:
        requests = _requests(runtime.load(artifact, variant=variant), lengths, seed)
        answers: Answers = {}
        line.send("ready")
        while True:
            what, *arguments = line.recv()
            if what == "round":
                begun = time.monotonic()
                latencies = ask(runtime, requests, answers, *arguments)
                line.send((latencies, time.monotonic() - begun))
            elif what == "answers":
                line.send(answers)
            else:
                line.send(runtime.stats().get("batch_completed", 0))


def ask(
    runtime: lrai.Runtime,
    requests: Sequence[lrai.InferenceRequest],
    answers: Answers,
    seconds: float,
) -> list[float]:
    """Return the latencies of what `CALLERS` threads asked in that time, one after the other.

    What was answered last to each request is put into `answers`.
    """
    latencies, end, failed = list[float](), time.monotonic() + seconds, list[Exception]()

    def caller(first: int) -> None:
        index = first * len(requests) // CALLERS
        while not failed and (begun := time.monotonic()) < end:
            try:
                answer = runtime.infer(requests[index % len(requests)])
                (answers[index % len(requests)],) = answer.outputs.values()
            except lrai.LraiError as error:
                failed.append(error)
            latencies.append(time.monotonic() - begun)
            index += 1

    threads = [threading.Thread(target=caller, args=(first,)) for first in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:  # a round of fewer callers is none
        raise failed[0]
    return latencies


def attach(line: Connection, settings: Mapping[str, Any], address: str, artifact: str) -> None:
    """Be one more worker; send in how many seconds it had its first answer, and when that was."""
    config = lrai.load_config(call=settings)
    begun = time.monotonic()
    with lrai.Runtime.open(artifact, address=address, config=config) as runtime:
        (model,) = runtime.models()
        runtime.infer(_requests(model.name, [8], 0)[0])
        ended = time.monotonic()
        line.send((ended - begun, ended))


Ratios = dict[str, dict[str, Interval]]  # by side, by figure


def compare(sides: Sequence[Side]) -> Ratios:
    """Return the ratios to one runtime each, within rounds."""
    (each,) = [side for side in sides if side.name == EACH]
    ratios: Ratios = {}
    for side in sides:
        pairs = list(zip(side.rounds, each.rounds, strict=True))
        ratios[side.name] = {
            figure: interval([getattr(a, figure) / getattr(b, figure) for a, b in pairs], SEED)
            for figure in Round._fields
        }
    return ratios


def agreement(variant: str, sides: Sequence[Side]) -> list[Check]:
    """Return the checks that the answers of all sides are those of one runtime each.

    Each of these has one worker's requests alone, so that none is mistaken for another worker's.
    """
    from benchmarks.realtime import agreed, cosines  # here, as what workers import is counted

    (each,) = [side for side in sides if side.name == EACH]
    found: list[Check] = []
    for side in sides:
        pairs = [
            (mine[index], right[index])
            for mine, right in zip(side.answers, each.answers, strict=True)
            for index in sorted(mine.keys() & right.keys())
        ]
        if side is not each:
            got, meant = (np.concatenate(rows) for rows in zip(*pairs, strict=True))
            found += agreed(f"{variant}, {side.name}", cosines(got, meant), "one each")
    return found


def checks_of(variant: str, ratios: Ratios) -> list[Check]:
    """Return what has to hold for one variant."""
    rows, speed = ratios[ONE]["rows_per_call"], ratios[ONE]["requests_per_second"]
    return [
        Check(f"{variant}, {ONE}: rows per call, ratio", rows.median, "interval > 1", rows.low > 1),
        Check(
            f"{variant}, {ONE}: requests/s, ratio",
            speed.median,
            f"interval reaches {NOT_BEHIND}",
            speed.high >= NOT_BEHIND,
        ),
    ]


def _row(variant: str, side: Side, ratios: Ratios) -> list[str]:
    found = {} if side.name == EACH else ratios[side.name]
    cells = [f"{variant}, {side.name}"]
    for figure, text in (
        (
            "requests_per_second",
            f"{statistics.median(r.requests_per_second for r in side.rounds):,.0f}",
        ),
        ("rows_per_call", f"{statistics.median(r.rows_per_call for r in side.rounds):.2f}"),
        ("p95_ms", f"{statistics.median(r.p95_ms for r in side.rounds):.0f}"),
    ):
        cells += [text, str(found.get(figure, ""))]
    return cells


def _compile_bert(folder: Path) -> Path:
    from benchmarks import models

    source = models.bert_base_onnx(folder / "bert.onnx")
    return lrai.compile(source, out=folder / "bert.lrai", threads=1).path


def _requests(name: str, lengths: Sequence[int], seed: int) -> list[lrai.InferenceRequest]:
    random, made = np.random.default_rng(seed), []
    for length in random.permutation(lengths):
        ids = random.integers(*_TOKENS, (1, length))
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        made.append(lrai.InferenceRequest(model_name=name, inputs=inputs))
    return made


def _lengths(count: int) -> list[int]:
    from benchmarks import models  # here, as what workers import is counted

    lengths: list[int] = models.search_lengths(count, SEED).tolist()
    return lengths


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, fp32 only")
    parser.add_argument("--artifact", type=Path, help="MiniLM, compiled before")
    parser.add_argument("--bert", type=Path, help="the large model, compiled before")
    parser.add_argument("--data", type=Path, help="not needed here")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
