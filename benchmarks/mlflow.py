"""The same model behind MLflow three times: as it is, its compiled variant alone, and through LRAI.

Compiles the MiniLM sentence encoder, logs it with `mlflow.onnx` and `lrai_mlflow`, serves each with
`mlflow models serve` on one CPU and one engine thread, and sends all of them the same requests of
mixed lengths from another CPU, in turns. Every answer is checked. What the variant alone gains is
compilation; what LRAI gains over that is coalescing, less what a process of its own costs.

    python benchmarks/mlflow.py --quick
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

_ROOT = Path(__file__).resolve().parents[1]
# This file must not be what `import mlflow` finds; the folder above it has our own packages.
sys.path[:] = [
    str(_ROOT),
    *(p for p in sys.path if p and Path(p).resolve() != _ROOT / "benchmarks"),
]
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # the local one that mlflow-skinny has
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import mlflow.onnx  # noqa: E402 - after the lines above
import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from rich.progress import Progress  # noqa: E402

import lrai_core as lrai  # noqa: E402
import lrai_mlflow  # noqa: E402
from benchmarks import harness, load, models  # noqa: E402
from benchmarks.harness import Check, Interval, console, interval  # noqa: E402
from benchmarks.load import Round  # noqa: E402
from benchmarks.processes import HOST, Server  # noqa: E402

Array = NDArray[Any]

CONCURRENCIES: Final = (1, 8, 32)
REQUESTS: Final = 400
EVALUATION_ROWS: Final = 1_200
COSINE, COSINE_SHARE = 0.99, 0.98  # the gate's own condition for unit vectors
FP32_TOLERANCE: Final = 1e-4
NOT_BEHIND: Final = 0.97
THREADS: Final = 1
SEED: Final = 0
_TEXTS: Final = 4_200
_RUNTIME_SECONDS: Final = 60.0  # a shared runtime ends half a minute after its last client
_WARM_UP: Final = 40  # requests to each server before the first round
PLAIN, ALONE, LRAI = "mlflow.onnx fp32", "mlflow.onnx variant", "lrai"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured: rounds, and requests in each by concurrency."""

    rounds: int
    requests: dict[int, int]


QUICK: Final = Plan(rounds=14, requests={1: 30, 8: 80, 32: 96})
FULL: Final = Plan(rounds=20, requests={1: 200, 8: 400, 32: 400})


@dataclass(slots=True)
class Candidate:
    """One server with what was found about it."""

    name: str
    model: Path
    server: Server
    disk_bytes: int
    memory_bytes: int = 0
    rounds: dict[int, list[Round]] = field(default_factory=dict)
    answers: list[tuple[int, Array]] = field(default_factory=list)  # request, its embedding

    def worst(self, expected: Sequence[Array]) -> float:
        """Return the largest element difference of any answer to `expected`, by request."""
        gaps = [float(np.abs(got - expected[index]).max()) for index, got in self.answers]
        return max(gap if np.isfinite(gap) else np.inf for gap in gaps)

    def median(self, concurrency: int, which: str) -> float:
        """Return the median over the rounds of one figure of `Round`."""
        values = [float(getattr(figures, which)) for figures in self.rounds[concurrency]]
        return statistics.median(values)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a check fails."""
    arguments = _arguments(argv)
    signal.signal(signal.SIGTERM, _end)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lrai-demo-")))
        return run(arguments, scratch, stack)


def run(arguments: argparse.Namespace, scratch: Path, stack: contextlib.ExitStack) -> int:
    """Compile, log, serve, measure, check and report."""
    plan = QUICK if arguments.quick else FULL
    cpus = sorted(os.sched_getaffinity(0))
    serving, asking = cpus[:1], cpus[1:] or cpus
    texts = _texts(arguments.data)
    payloads = models.requests(REQUESTS, SEED, texts[: _TEXTS // 2])
    # The gate judges rows like those that will be served: same lengths, other text.
    evaluation = models.requests(EVALUATION_ROWS, SEED + 1, texts[_TEXTS // 2 :])
    source = arguments.model or _cached_minilm()

    started = time.perf_counter()
    artifact = compile_model(source, evaluation, scratch / "minilm.lrai", serving)
    variant = artifact.manifest.variant(artifact.manifest.chosen)
    exported = export(artifact, scratch / "variant.onnx")
    alone = run_alone(exported, payloads, optimise=False)
    command = [sys.executable, "-m", "mlflow", "models", "serve"]
    command += ["--env-manager", arguments.env_manager, "--host", HOST, "--port", "{port}"]
    serve = functools.partial(start, command=command, scratch=scratch, cpus=serving, stack=stack)
    with console.status("logging and serving the model three times"):
        mlflow.set_tracking_uri((scratch / "tracking").as_uri())
        candidates = [serve(LRAI, log_lrai(artifact))]
        (first,) = ask(candidates[0], payloads[:1], 1)[1]
        seconds_to_answer = time.perf_counter() - started
        if not np.abs(first - alone[0]).max() <= variant.batch_effect:
            raise RuntimeError("the first answer is not the variant's")
        candidates.insert(0, serve(PLAIN, log_plain(source, artifact)))
        candidates.insert(1, serve(ALONE, log_plain(exported, artifact, optimise=False)))
    console.print(f"from {source.name} to the first checked answer: {seconds_to_answer:.0f} s")
    fp32 = run_alone(source, payloads, optimise=True)

    os.sched_setaffinity(0, asking)
    measure(candidates, payloads, plan)
    for candidate in candidates:  # of all, while what they share is shared by all
        candidate.memory_bytes = candidate.server.memory_bytes()
    for candidate in candidates:
        if left := candidate.server.stop(_RUNTIME_SECONDS):
            raise RuntimeError(f"{candidate.name} left processes behind: {left}")
    ratios = compare(candidates)
    chart = arguments.out / "mlflow.png"
    draw(chart, candidates, artifact)
    report(candidates, ratios, variant, fp32, plan)
    console.print(f"chart: {chart}")
    return harness.conclude(
        "mlflow",
        arguments.out,
        harness.environment(THREADS, ["lrai", "mlflow-skinny", "onnxruntime", "numpy", "uvicorn"]),
        [_row(c, concurrency, fp32) for c in candidates for concurrency in CONCURRENCIES],
        checks(candidates, ratios, variant, fp32, alone),
        variant=variant.id,
        seconds_to_first_answer=seconds_to_answer,
        rounds=plan.rounds,
        ratios=[
            {"of": key[0], "to": key[1], "concurrency": key[2], "figure": key[3], **value._asdict()}
            for key, value in ratios.items()
        ],
        quick=arguments.quick,
    )


def compile_model(
    source: Path, evaluation: Sequence[models.Arrays], out: Path, cpus: Sequence[int]
) -> lrai.Artifact:
    """Return the artifact, compiled on the CPUs that it will be served on."""
    rows = models.Tokenizer().pad([request["input_ids"][0] for request in evaluation])
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    started = time.perf_counter()
    try:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("compiling", total=None)

            def progress(step: Any) -> None:
                bar.update(
                    task,
                    description=f"compiling: {step.name} {step.detail}",
                    completed=step.done,
                    total=step.total or None,
                )

            artifact = lrai.compile(
                source,
                out=out,
                evaluation=rows,
                output_map="l2_normalised",
                threads=THREADS,
                seed=SEED,
                progress=progress,
            )
    finally:
        os.sched_setaffinity(0, before)
    chosen = artifact.manifest.variant(artifact.manifest.chosen)
    console.print(f"compiled in {time.perf_counter() - started:.0f} s: {chosen.id}, {chosen.why}")
    return artifact


def export(artifact: lrai.Artifact, path: Path) -> Path:
    """Write the chosen variant as one ONNX file that needs nothing of the artifact."""
    variant = artifact.manifest.variant(artifact.manifest.chosen)
    model = onnx.load(str(artifact.file(variant.model)), load_external_data=False)
    if variant.weights:
        onnx.load_external_data_for_model(model, str(artifact.path / variant.weights))
    onnx.save(model, path)
    return path


def run_alone(model: Path, payloads: Sequence[models.Arrays], *, optimise: bool) -> list[Array]:
    """Return the model's output for each request run by itself, without any server."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [session.run(None, payload)[0] for payload in payloads]


def log_plain(model: Path, artifact: lrai.Artifact, *, optimise: bool = True) -> Path:
    """Log an ONNX file with MLflow's own flavor and return the folder of the logged model.

    A variant is as it is to be executed: fused further, it may lose what was left out of it. Level
    1 has the least that MLflow passes on.
    """
    logged = mlflow.onnx.log_model(
        onnx.load(model),
        name="plain",
        signature=lrai_mlflow.signature_of(artifact),
        pip_requirements=mlflow.onnx.get_default_pip_requirements(),
        onnx_execution_providers=["CPUExecutionProvider"],
        onnx_session_options={
            "intra_op_num_threads": THREADS,
            "inter_op_num_threads": 1,
            "execution_mode": "sequential",
            **({} if optimise else {"graph_optimization_level": 1}),
        },
    )
    return Path(mlflow.artifacts.download_artifacts(logged.model_uri))


def log_lrai(artifact: lrai.Artifact) -> Path:
    """Log the artifact with our flavor and return the folder of the logged model."""
    logged = lrai_mlflow.log_model(artifact, name="lrai")
    return Path(mlflow.artifacts.download_artifacts(logged.model_uri))


def start(
    name: str,
    model: Path,
    *,
    command: Sequence[str],
    scratch: Path,
    cpus: Sequence[int],
    stack: contextlib.ExitStack,
) -> Candidate:
    """Serve a logged model, and return it when it is ready."""
    server = Server(
        [*command, "--model-uri", str(model)],
        scratch / f"{name.replace(' ', '-')}.log",
        cpus=cpus,
        variables={"LRAI_ACTOR_THREADS": str(THREADS), "LRAI_RUNTIME_SOCKET_DIR": str(scratch)},
    )
    stack.enter_context(server)
    server.wait_until_ready("/ping")
    size = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
    return Candidate(name, model, server, size)


def measure(candidates: Sequence[Candidate], payloads: Sequence[models.Arrays], plan: Plan) -> None:
    """Send the requests in rounds, to one server after the other, each round another one first."""
    for candidate in candidates:
        ask(candidate, payloads[:_WARM_UP], 4)
        candidate.rounds = {concurrency: [] for concurrency in CONCURRENCIES}
    cursor = dict.fromkeys(CONCURRENCIES, 0)
    with Progress(console=console, transient=True) as bar:
        total = plan.rounds * len(CONCURRENCIES) * len(candidates)
        task = bar.add_task("measuring", total=total)
        for turn in range(plan.rounds):
            order = [*candidates[turn % 3 :], *candidates[: turn % 3]]
            for concurrency in CONCURRENCIES:
                first, count = cursor[concurrency], plan.requests[concurrency]
                chosen = [(first + i) % len(payloads) for i in range(count)]
                cursor[concurrency] = first + count
                for candidate in order:
                    sent = [payloads[index] for index in chosen]
                    figures, answers = ask(candidate, sent, concurrency)
                    candidate.rounds[concurrency].append(figures)
                    candidate.answers += zip(chosen, answers, strict=True)
                    bar.advance(task)


def ask(
    candidate: Candidate, payloads: Sequence[models.Arrays], concurrency: int
) -> tuple[Round, list[Array]]:
    """Send every request once, `concurrency` at a time, and return the figures and the answers."""
    bodies = [
        json.dumps({"inputs": {name: value.tolist() for name, value in payload.items()}}).encode()
        for payload in payloads
    ]
    figures, contents = load.send(candidate.server.port, "/invocations", bodies, concurrency)
    predictions = [json.loads(content)["predictions"] for content in contents]
    return figures, [np.array(p["sentence_embedding"], dtype=np.float32) for p in predictions]


Ratios = dict[tuple[str, str, int, str], Interval]


def compare(candidates: Sequence[Candidate]) -> Ratios:
    """Return, for pairs of servers, the ratios of requests/s and p95 within each round."""
    plain, compiled, ours = candidates
    ratios: Ratios = {}
    for one, other in ((ours, plain), (ours, compiled), (compiled, plain)):
        for concurrency in CONCURRENCIES:
            pairs = list(zip(one.rounds[concurrency], other.rounds[concurrency], strict=True))
            for figure in ("requests_per_second", "p95_ms"):
                values = [getattr(a, figure) / getattr(b, figure) for a, b in pairs]
                ratios[one.name, other.name, concurrency, figure] = interval(values, SEED)
    return ratios


def checks(
    candidates: Sequence[Candidate],
    ratios: Ratios,
    variant: Any,
    fp32: Sequence[Array],
    alone: Sequence[Array],
) -> list[Check]:
    """Return what has to hold."""
    plain, compiled, ours = candidates
    found = []
    for n in CONCURRENCIES[1:]:
        speed = ratios[LRAI, PLAIN, n, "requests_per_second"]
        p95 = ratios[LRAI, PLAIN, n, "p95_ms"]
        found += [
            Check(f"lrai / fp32 at {n}, requests/s", speed.median, "interval > 1", speed.low > 1),
            Check(f"lrai / fp32 at {n}, p95", p95.median, "interval < 1", p95.high < 1),
        ]
    speed = ratios[LRAI, PLAIN, 1, "requests_per_second"]
    found.append(
        Check(
            "lrai / fp32 at 1, requests/s",
            speed.median,
            f"interval reaches {NOT_BEHIND}",
            speed.high >= NOT_BEHIND,
        )
    )
    for name, value, most in (
        ("lrai, difference to its variant alone", ours.worst(alone), variant.batch_effect),
        ("fp32, difference to the model alone", plain.worst(fp32), FP32_TOLERANCE),
    ):
        found.append(Check(name, value, f"<= {most:g}", value <= most))
    for one in (compiled, ours):
        share = _share_that_agrees(one, fp32)
        name = f"{one.name}, share with cosine >= {COSINE}"
        found.append(Check(name, share, f">= {COSINE_SHARE}", share >= COSINE_SHARE))
    return found


def report(
    candidates: Sequence[Candidate], ratios: Ratios, variant: Any, fp32: Sequence[Array], plan: Plan
) -> None:
    """Print the table and what it comes from."""
    rows = []
    for concurrency in CONCURRENCIES:
        for candidate in candidates:
            row = _row(candidate, concurrency, fp32)
            rows.append(
                (
                    str(concurrency),
                    candidate.name,
                    f"{row['requests_per_second']:.0f}",
                    f"{row['p50_ms']:.1f}",
                    f"{row['p95_ms']:.1f}",
                    f"{row['disk_bytes'] / 1e6:.0f}",
                    f"{row['memory_bytes'] / 1e6:.0f}",
                    f"{row['worst_difference']:.1g}",
                )
            )
    columns = ["callers", "server", "requests/s", "p50 ms", "p95 ms"]
    columns += ["disk\nMB", "memory\nMB", "worst\ndiff."]
    answers = sum(len(candidate.answers) for candidate in candidates)
    harness.show(
        "MiniLM behind `mlflow models serve`, one CPU, one engine thread",
        columns,
        rows,
        f"the variant is {variant.id}; medians of {plan.rounds} rounds; {answers} answers, "
        "all checked; worst diff.: of any element to fp32 run alone",
    )
    console.print("ratios within rounds, medians with 95 % bootstrap intervals:")
    for one, other, meaning in (
        (LRAI, PLAIN, "in all"),
        (ALONE, PLAIN, "what is the variant"),
        (LRAI, ALONE, "what is coalescing, less what a process for the model costs"),
    ):
        console.print(f"  {meaning}: {one} / {other}")
        for figure, label in (("requests_per_second", "requests/s"), ("p95_ms", "p95")):
            found = [f"{ratios[one, other, n, figure]} at {n}" for n in CONCURRENCIES]
            console.print(f"    {label:11} {', '.join(found)}")


def draw(path: Path, candidates: Sequence[Candidate], artifact: lrai.Artifact) -> None:
    """Draw requests/s and p95 by concurrency."""
    chosen, target = artifact.manifest.chosen, artifact.manifest.target
    labels = {PLAIN: PLAIN, ALONE: f"mlflow.onnx {chosen} (the variant alone)", LRAI: LRAI}

    def series(which: str) -> dict[str, list[float]]:
        return {labels[c.name]: [c.median(n, which) for n in CONCURRENCIES] for c in candidates}

    harness.bar_chart(
        path,
        "MiniLM behind mlflow models serve",
        [f"{n} caller" if n == 1 else f"{n} callers" for n in CONCURRENCIES],
        {
            "requests per second (more is better)": series("requests_per_second"),
            "95th percentile of latency, ms (less is better)": series("p95_ms"),
        },
        f"one CPU ({target.isa}), one engine thread, mixed lengths, medians over rounds",
    )


def _row(candidate: Candidate, concurrency: int, fp32: Sequence[Array]) -> dict[str, Any]:
    return {
        "server": candidate.name,
        "concurrency": concurrency,
        **{which: candidate.median(concurrency, which) for which in Round._fields},
        "disk_bytes": candidate.disk_bytes,
        "memory_bytes": candidate.memory_bytes,
        "worst_difference": candidate.worst(fp32),
        "rounds": [figures._asdict() for figures in candidate.rounds[concurrency]],
    }


def _share_that_agrees(candidate: Candidate, fp32: Sequence[Array]) -> float:
    cosines = [float((got * fp32[index]).sum()) for index, got in candidate.answers]
    return float(np.mean(np.array(cosines) >= COSINE))


def _texts(data: Path | None) -> list[str]:
    if data is None:
        return models.sentences(_TEXTS, SEED)
    texts, _ = models.sst2(data, "train")
    distinct = list(dict.fromkeys(texts))
    order = np.random.default_rng(SEED).permutation(len(distinct))
    return [distinct[index] for index in order[:_TEXTS]]


def _cached_minilm() -> Path:
    path = _ROOT / ".cache" / "minilm.onnx"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        temporary = models.minilm_onnx(path.with_suffix(".partial"))
        temporary.replace(path)
    return path


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="MiniLM behind MLflow: as it is, and with LRAI.")
    parser.add_argument("--quick", action="store_true", help="two to three minutes")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results")
    parser.add_argument("--data", type=Path, help="folder of data sets: sentences from SST-2")
    parser.add_argument("--env-manager", default="local", help="of `mlflow models serve`")
    parser.add_argument("--model", type=Path, help="another encoder with the inputs of MiniLM")
    return parser.parse_args(argv)


def _end(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # what was started is ended by now
        sys.exit(128 + signal.SIGINT)
