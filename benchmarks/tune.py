"""`lrai tune` from end to end, in front of real servers: MLflow, then Triton.

MiniLM is served in float32 and asked sentences of SST-2 (with `--data`), of which the runtime keeps
a sample. While requests go on, `lrai tune --apply` makes forms for them, measures, has copies of
live requests answered, and switches over; `lrai runtime rollback` goes back. No request may fail,
before, meanwhile or after, and every answer is compared with onnxruntime's in float32. How much
faster the server got, its callers measure: before, after the switch, and after the way back. In the
end a model is tuned that nothing makes faster.

    python benchmarks/tune.py --data ../shared/data --quick
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [
    str(_ROOT),
    *(p for p in sys.path if p and Path(p).resolve() != _ROOT / "benchmarks"),
]
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # the local one that mlflow-skinny has
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import mlflow  # noqa: E402 - after the lines above
import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

import lrai_core as lrai  # noqa: E402
import lrai_mlflow  # noqa: E402
from benchmarks import harness, models  # noqa: E402
from benchmarks import triton_entries as entries  # noqa: E402
from benchmarks.harness import Check, console  # noqa: E402
from benchmarks.host import Host, end_on_sigterm  # noqa: E402
from benchmarks.mlflow import run_alone  # noqa: E402
from benchmarks.processes import HOST, Server  # noqa: E402
from benchmarks.triton import one_core_server, prepared  # noqa: E402

Array = NDArray[Any]
Say = Callable[[models.Arrays], tuple[str, Any]]  # path and body of a request
Hear = Callable[[Any], Any]  # the embedding in an answer

SENTENCES: Final = 600  # that are asked one by one, and as many others by several callers
CALLERS: Final = 8
CAPTURE: Final = {"LRAI_RUNTIME_CAPTURE_ROWS": "2000", "LRAI_ACTOR_THREADS": "1"}
COSINE: Final = 0.99
LEAST_ALIKE: Final = 0.98
FLOAT32_COSINE: Final = 0.99999  # of what float32 answers with what onnxruntime does
LEAST_COSINE: Final = 0.8  # what one text has with another is far below
LEAST_GAIN: Final = 1.0
PAUSE_SECONDS: Final = 0.05  # between requests: callers are there, and the machine is not full
_OUTPUT: Final = "sentence_embedding"
_CONFIG: Final = 'backend: "lrai"\nmax_batch_size: 32\n'


@dataclass(slots=True)
class Ledger:
    """Every request that was sent, and what became of it."""

    cosines: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Served:
    """A model in a host, and how it is asked."""

    host: str
    port: int
    sockets: Path
    say: Say
    hear: Hear


def main(argv: Sequence[str] | None = None) -> int:
    """Serve, tune, switch, go back; print, write, and return 1 where a check does not hold."""
    arguments = _arguments(argv)
    end_on_sigterm()
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cpus[-1:])  # callers; servers have the first
    rows: list[dict[str, Any]] = []
    checks: list[Check] = []
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lrai-tune-")))
        source = models.minilm_onnx(scratch / "minilm.onnx")
        data = arguments.data
        texts = models.sst2(data, "test")[0] if data else models.sentences(2 * SENTENCES, 3)
        count = 2 * (SENTENCES // 3 if arguments.quick else SENTENCES)
        ids = models.Tokenizer().encode(list(dict.fromkeys(texts))[:count])
        asked = [_tokens(np.asarray(one).ravel()) for one in ids]
        right = [row[0] for row in run_alone(source, asked, optimise=True)]
        minutes = 0.1 if arguments.quick else 0.5
        hosts = {"mlflow": _mlflow, "triton": _triton}
        wanted = [arguments.only] if arguments.only else list(hosts)[: 1 if arguments.quick else 2]
        for serve in (hosts[name] for name in wanted):
            with serve(source, scratch, cpus[0]) as served:
                found = _tuned(served, asked, right, scratch, cpus[-1], minutes)
                rows.append(found)
                checks += _checks(found)
        checks.append(_nothing_found(scratch, cpus[0]))
    packages = ["lrai", "onnxruntime", "mlflow-skinny", "numpy"]
    return harness.conclude(
        "tune", arguments.out, harness.environment(1, packages), rows, checks, quick=arguments.quick
    )


def _tokens(ids: Array) -> models.Arrays:
    row = ids[None].astype(np.int64)
    return {"input_ids": row, "attention_mask": np.ones_like(row)}


@contextlib.contextmanager
def _mlflow(source: Path, scratch: Path, cpu: int) -> Iterator[Served]:
    """Serve the model in float32 with the lrai flavor."""
    plain = lrai.compile(source, out=scratch / "minilm.lrai", output_map="l2_normalised", threads=1)
    mlflow.set_tracking_uri((scratch / "tracking").as_uri())
    logged = lrai_mlflow.log_model(plain, name="minilm")
    folder = Path(mlflow.artifacts.download_artifacts(logged.model_uri))
    runtime = Host()
    with contextlib.closing(runtime):
        command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
        command += ["--host", HOST, "--port", "{port}", "--model-uri", str(folder)]
        own = CAPTURE | {"LRAI_RUNTIME_SOCKET_DIR": str(runtime.folder)}
        with Server(command, scratch / "mlflow.log", cpus=[cpu], variables=own) as server:
            server.wait_until_ready("/ping")
            yield Served("mlflow", server.port, runtime.folder, _say_mlflow, _hear_mlflow)


def _say_mlflow(row: models.Arrays) -> tuple[str, Any]:
    return "/invocations", {"inputs": {name: value.tolist() for name, value in row.items()}}


def _hear_mlflow(answer: Any) -> Any:
    return answer["predictions"][_OUTPUT]


@contextlib.contextmanager
def _triton(source: Path, scratch: Path, cpu: int) -> Iterator[Served]:
    """Serve the model.onnx of a model repository by its one line."""
    entry = scratch / "models" / "minilm"
    (entry / "1").mkdir(parents=True)
    (entry / "config.pbtxt").write_text(_CONFIG)
    os.link(source, entry / "1" / "model.onnx")
    made = prepared(None, scratch)
    with pinned_environment(CAPTURE), one_core_server(entry.parent, made, cpu, scratch) as server:
        entries.load(server.port, "minilm")
        yield Served("triton", server.port, server.runtime.folder, _say_triton, _hear_triton)


@contextlib.contextmanager
def pinned_environment(variables: dict[str, str]) -> Iterator[None]:
    """Have these variables in the environment of what is started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _say_triton(row: models.Arrays) -> tuple[str, Any]:
    inputs = [
        {"name": name, "shape": list(v.shape), "datatype": "INT64", "data": v.ravel().tolist()}
        for name, v in row.items()
    ]
    return "/v2/models/minilm/infer", {"inputs": inputs}


def _hear_triton(answer: Any) -> Any:
    return answer["outputs"][0]["data"]


@contextlib.contextmanager
def _asking(
    served: Served, asked: Sequence[models.Arrays], right: Sequence[Array]
) -> Iterator[Ledger]:
    """Have requests on their way all the time."""
    over, ledger = threading.Event(), Ledger()

    def ask() -> None:
        index = 0
        while not over.is_set():
            _ask(served, asked[index % len(asked)], right[index % len(asked)], ledger)
            index += 1
            over.wait(PAUSE_SECONDS)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield ledger
    finally:
        over.set()
        thread.join(60)


def _rate(served: Served, pairs: Sequence[tuple[models.Arrays, Array]], ledger: Ledger) -> float:
    """Return requests per second of callers who wait for each of their answers."""
    began = time.perf_counter()
    with ThreadPoolExecutor(CALLERS) as callers:
        list(callers.map(lambda pair: _ask(served, pair[0], pair[1], ledger), pairs))
    return len(pairs) / (time.perf_counter() - began)


def _ask(served: Served, row: models.Arrays, expected: Array, ledger: Ledger) -> None:
    path, body = served.say(row)
    try:
        connection = http.client.HTTPConnection(HOST, served.port, timeout=60)
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json"}
            connection.request("POST", path, json.dumps(body), headers)
            reply = connection.getresponse()
            content = json.loads(reply.read())
        if reply.status != http.client.OK:
            ledger.failures.append(f"{reply.status}: {content}"[:200])
            return
    except (OSError, http.client.HTTPException, ValueError) as error:
        ledger.failures.append(f"{type(error).__name__}: {error}"[:200])
        return
    got = np.asarray(served.hear(content), np.float64).ravel()
    ledger.cosines.append(float(got @ expected.ravel() / np.linalg.norm(got)))


def _tuned(
    served: Served,
    asked: Sequence[models.Arrays],
    right: Sequence[Array],
    scratch: Path,
    cpu: int,
    minutes: float,
) -> dict[str, Any]:
    """Ask, tune, switch, go back; return what was seen."""
    before, back, pairs = Ledger(), Ledger(), list(zip(asked, right, strict=True))
    serving = {"before": answering(served.sockets)}
    alone, together = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    with console.status(f"{served.host}: {len(pairs)} sentences"):
        for row, expected in alone:
            _ask(served, row, expected, before)
        rates = [_rate(served, together, before)]
    figures, out = scratch / f"{served.host}.json", scratch / f"{served.host}-tuned.lrai"
    command = ["tune", "models/minilm", "--apply", "--minutes", str(minutes), "-o", str(out)]
    command += ["--output-map", "l2_normalised", "--json", str(figures), "--price-per-hour", "0.1"]
    began = time.perf_counter()
    with _asking(served, asked, right) as meanwhile:
        done = _lrai(command, served.sockets, scratch, cpu)
    seconds = time.perf_counter() - began
    console.print(done.stdout + done.stderr)
    rates.append(_rate(served, together, meanwhile))
    with _asking(served, asked, right) as after:
        time.sleep(5)
        name = next(
            (w.split()[-1] for w in done.stdout.splitlines() if "runtime rollback" in w), ""
        )
        serving["tuned"] = answering(served.sockets)
        undone = _lrai(["runtime", "rollback", name], served.sockets, scratch, cpu)
        time.sleep(2)
    serving["back"] = answering(served.sockets)
    rates.append(_rate(served, together, back))
    ledgers = {"before": before, "meanwhile": meanwhile, "after": after, "back": back}
    told = json.loads(figures.read_text()) if figures.is_file() else {"gains": [0.0]}
    return {
        "host": served.host,
        "exit_status": done.returncode,
        "rolled_back": undone.returncode,
        "seconds": seconds,
        "requests_per_s": rates,
        "gain": rates[1] / float(np.mean([rates[0], rates[2]])),
        "gain_told": float(np.median(told["gains"])),
        "share_changed": told.get("share_changed"),
        "applied": "is served by" in done.stdout,
        "serving": serving,
        "requests": {which: len(ledger.cosines) for which, ledger in ledgers.items()},
        "failures": [why for ledger in ledgers.values() for why in ledger.failures],
        "least_cosine": min(min(ledger.cosines, default=-1.0) for ledger in ledgers.values()),
        "least_cosine_back": min(back.cosines, default=-1.0),
        "alike": {
            which: float(np.mean(np.array(ledger.cosines or [-1.0]) >= COSINE))
            for which, ledger in ledgers.items()
        },
    }


def answering(sockets: Path) -> dict[str, list[str]]:
    """Return by name the versions that answer requests, as the runtime below a folder tells it."""
    config = lrai.load_config(call={"runtime.socket_dir": str(sockets)})
    with lrai.Runtime(config, address="auto") as runtime:
        found = runtime.deployments()
    return {one.name: [version for version, share in one.shares.items() if share] for one in found}


def _lrai(
    arguments: Sequence[str], sockets: Path, folder: Path, cpu: int
) -> subprocess.CompletedProcess[str]:
    """Run the command line on a CPU beside the server's."""
    program = f"import os; os.sched_setaffinity(0, [{cpu}]); from lrai_core.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "LRAI_RUNTIME_SOCKET_DIR": str(sockets), "LRAI_ACTOR_THREADS": "1"},
        timeout=1_200,
        check=False,
    )


def _checks(found: dict[str, Any]) -> list[Check]:
    host, failed = found["host"], len(found["failures"])
    for why in found["failures"][:5]:
        console.print(why)
    asked = sum(found["requests"].values())
    alike, least = min(found["alike"].values()), found["least_cosine"]
    before, tuned, back = (found["serving"][when] for when in ("before", "tuned", "back"))
    same, float32 = before == back != tuned, found["least_cosine_back"]
    status = float(found["exit_status"])
    told = f"{found['gain_told']:.2f} as the tool says"
    return [
        Check(f"{host}: exit status of lrai tune --apply", status, "0", status == 0),
        Check(f"{host}: switched over", float(found["applied"]), "1", found["applied"]),
        Check(f"{host}: failed of {asked} requests", failed, "0", failed == 0),
        Check(f"{host}: times as many requests/s of {CALLERS} callers ({told})", found["gain"],
              f"> {LEAST_GAIN}",
              found["gain"] > LEAST_GAIN),
        Check(f"{host}: least share of answers with a cosine >= {COSINE}", alike,
              f">= {LEAST_ALIKE}", alike >= LEAST_ALIKE),
        Check(f"{host}: least cosine of an answer", least, f">= {LEAST_COSINE}",
              least >= LEAST_COSINE),
        Check(f"{host}: exit status of lrai runtime rollback", found["rolled_back"], "0",
              found["rolled_back"] == 0),
        Check(f"{host}: served before {before}, tuned {tuned}, switched back {back}", float(same),
              "1: what served before, which tuning replaced", same),
        Check(f"{host}: least cosine of an answer after switching back", float32,
              f">= {FLOAT32_COSINE}: float32's", float32 >= FLOAT32_COSINE),
    ]  # fmt: skip


def _nothing_found(scratch: Path, cpu: int) -> Check:
    """Tune a classifier of 64 units, which takes a few microseconds."""
    source, rows = models.classifier(scratch / "small.onnx", 0, hidden=64)
    np.savez(scratch / "small.npz", features=rows["features"][:600])
    command = ["tune", str(source), "--requests", str(scratch / "small.npz")]
    done = _lrai([*command, "--output-map", "softmax"], scratch, scratch, cpu)
    console.print(done.stderr.strip())
    says = done.returncode == 3 and "no gain" in done.stderr
    return Check("a small model: exit status, and it says that nothing is gained",
                 float(done.returncode), "3", says)  # fmt: skip


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="folder of benchmark data: real sentences")
    parser.add_argument("--quick", action="store_true", help="MLflow only, and a shorter shadow")
    parser.add_argument("--only", choices=["mlflow", "triton"], default="", help="mlflow or triton")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
