"""An existing model repository, with LRAI and back again, in front of a real Triton server.

It holds MiniLM's `model.onnx`. One line of its configuration switches to `backend: "lrai"`, then
`lrai triton compile` adds the compiled variant as the next version and `lrai triton add` an image
model beside it. Every answer, over HTTP and gRPC, is checked; who gave it says a metric of LRAI's.
In the end `lrai triton remove` makes the entry what it was.

    python benchmarks/triton_demo.py
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [
    str(_ROOT),
    *(p for p in sys.path if p and Path(p).resolve() != _ROOT / "benchmarks"),
]
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402 - after the lines above
import onnxruntime  # noqa: E402
import tritonclient.grpc  # noqa: E402
import tritonclient.http  # noqa: E402
from tritonclient.utils import np_to_triton_dtype  # noqa: E402

from benchmarks import harness, images, models  # noqa: E402
from benchmarks import triton_entries as entries  # noqa: E402
from benchmarks.callers import Array, Row  # noqa: E402
from benchmarks.harness import Check, console  # noqa: E402
from benchmarks.host import end_on_sigterm  # noqa: E402
from benchmarks.kinds import Kind, make_kinds  # noqa: E402
from benchmarks.triton import one_core_server, prepared  # noqa: E402
from benchmarks.triton_load import Load  # noqa: E402
from benchmarks.triton_server import Prepared, TritonServer, prepare, variables  # noqa: E402

CALLERS: Final = 32
WARM_UP: Final = 64
COSINE, COSINE_SHARE = 0.99, 0.98
COSINE_LEAST: Final = 0.8  # what one text has with another is far below
FP32_TOLERANCE: Final = 1e-4
_COUNTED: Final = re.compile(r"^lrai_answered_total{(.*)} (\S+)$", re.MULTILINE)
_LABEL: Final = re.compile(r'(\w+)="([^"]*)"')
_TOLD_SECONDS: Final = 20.0  # a stub tells Triton now and then
_LRAI: Final = "from lrai_core.cli import main; main()"
_NAME, _IMAGES = "minilm", "efficientnet"
# Triton's own onnxruntime backend is not in the wheel; a python backend of that name stands in.
_CONFIG: Final = """\
# Sentence embeddings.
backend: "onnxruntime"
max_batch_size: 32
input [
  { name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] },
  { name: "attention_mask" data_type: TYPE_INT64 dims: [ -1 ] }
]
output [ { name: "sentence_embedding" data_type: TYPE_FP32 dims: [ 384 ] } ]
dynamic_batching { }
"""


class Stage(NamedTuple):
    """What one way of serving the model has shown."""

    name: str
    seconds: float  # from the model.onnx to the first checked answer
    rates: list[float]
    p95_ms: list[float]
    changed: float  # share of answers with a cosine to fp32 below that of the gate
    worst: float
    least: float  # cosine of any answer
    answers: int
    asked: int  # with those of the warm-up
    by: dict[str, int]  # answers that LRAI has counted, by version and variant


def main(argv: Sequence[str] | None = None) -> int:
    """Show it; return 1 where a check does not hold."""
    arguments = _arguments(argv)
    cpus = sorted(os.sched_getaffinity(0))
    end_on_sigterm()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lrai-triton-")))
        started = time.perf_counter()
        made = set_up(arguments.environment, scratch)
        console.print(f"environment: {time.perf_counter() - started:.0f} s")
        entry = scratch / "models" / _NAME
        (entry / "1").mkdir(parents=True)
        (entry / "config.pbtxt").write_text(_CONFIG)
        source = models.minilm_onnx(entry / "1" / "model.onnx")
        (kind,) = make_kinds(source, None, {"search": 240})
        os.sched_setaffinity(0, cpus[-1:])  # the server is put on the first
        server = stack.enter_context(one_core_server(entry.parent, made, cpus[0], scratch))
        load = stack.enter_context(Load(server.port, cpus[-1]))
        load.rows(kind.name, kind.rows, "sentence_embedding", kind.expected)
        demo = Demo(server, load, made, entry, kind, 2 if arguments.quick else 5)
        try:
            stages, checks = demo.run(scratch, cpus[0], quick=arguments.quick)
        except RuntimeError:
            console.print(server.log.read_text(errors="replace")[-3000:])
            raise
        versions = server.versions()
        left = server.stop()
        checks.append(Check("processes left behind", len(left), "0", not left))
    rows = [stage._asdict() for stage in stages]
    environment = harness.environment(1, ["lrai", "onnxruntime", "numpy", "tritonclient"])
    environment |= {"server": versions}
    return harness.conclude(
        "triton_demo", arguments.out, environment, rows, checks, quick=arguments.quick
    )


class Demo:
    """The steps, in front of a server."""

    def __init__(
        self, server: TritonServer, load: Load, made: Prepared, entry: Path, kind: Kind, rounds: int
    ) -> None:
        """Show the entry in that server."""
        self._server, self._load, self._made, self._entry = server, load, made, entry
        self._kind, self._rounds = kind, rounds

    def run(self, scratch: Path, cpu: int, *, quick: bool) -> tuple[list[Stage], list[Check]]:
        """Return what each stage has shown, and what has to hold."""
        config = self._entry / "config.pbtxt"
        stages = [self._stage("before", time.perf_counter())]
        begun = time.perf_counter()
        console.print('one line: backend: "lrai"')
        config.write_text(_CONFIG.replace('"onnxruntime"', '"lrai"'))
        stages.append(self._stage("one line", begun, ours=True))
        begun = time.perf_counter()
        self._compile(scratch, cpu, quick=quick)
        stages.append(self._stage("compiled", begun, ours=True))
        self._add_images(scratch)
        self._lrai("remove", str(self._entry))
        checks = [
            Check(
                "bytes of config.pbtxt that are not as before",
                float(config.read_text() != _CONFIG),
                "0",
                config.read_text() == _CONFIG,
            )
        ]
        stages.append(self._stage("switched back", time.perf_counter()))
        _show(stages)
        return stages, [*checks, *_checks(stages), *_who_answered(stages)]

    def _stage(self, name: str, begun: float, *, ours: bool = False) -> Stage:
        entries.load(self._server.port, _NAME)
        entries.wait_until_settled(self._server.port)
        before, protocols = answered(self._server, _NAME), (tritonclient.http, tritonclient.grpc)
        some = list(zip(self._kind.rows[:2], self._kind.expected[:2], strict=True))
        for row, expected in some:
            for protocol in protocols:
                got = self._ask(protocol, _NAME, row, "sentence_embedding")
                if float((got[0] * expected).sum()) < COSINE:
                    raise RuntimeError(f"{name}: a wrong answer over {protocol.__name__}")
        seconds = time.perf_counter() - begun
        indices = range(len(self._kind.rows))
        self._load.closed(_NAME, self._kind.name, indices[:WARM_UP], CALLERS)
        runs = [
            self._load.closed(_NAME, self._kind.name, indices, CALLERS) for _ in range(self._rounds)
        ]
        if any(set(run.statuses) != {200} for run in runs):
            raise RuntimeError(f"{name}: {runs[0].statuses}, {runs[0].first_error}")
        cosines = np.concatenate([run.cosines for run in runs])
        asked = len(some) * len(protocols) + WARM_UP + len(cosines)
        by = answered(self._server, _NAME, before.total() + asked * ours) - before
        stage = Stage(
            name,
            seconds,
            [run.rate for run in runs],
            [run.percentile_ms(0.95) for run in runs],
            float((cosines < COSINE).mean()),
            max(run.worst for run in runs),
            float(cosines.min()),
            len(cosines),
            asked,
            by,
        )
        console.print(f"{name}: first checked answer after {seconds:.1f} s")
        return stage

    def _compile(self, scratch: Path, cpu: int, *, quick: bool) -> None:
        """Have `lrai triton compile` add a version, on the CPU that it is served on."""
        made = models.requests(400 if quick else 1_200, 5)
        rows = models.Tokenizer().pad([request["input_ids"][0] for request in made])
        ids, mask = rows["input_ids"], rows["attention_mask"]
        np.savez(scratch / "evaluation.npz", input_ids=ids, attention_mask=mask)
        command = ["compile", str(self._entry), "--evaluation", str(scratch / "evaluation.npz")]
        command += ["--output-map", "l2_normalised", "--threads", "1"]
        self._lrai(*command, cpu=cpu)

    def _add_images(self, scratch: Path) -> None:
        """Add an image model, and ask it over both protocols."""
        model = images.efficientnet_lite0_onnx(scratch / "efficientnet.onnx")
        repository = str(self._entry.parent)
        self._lrai("add", str(model), "--model-repository", repository, "--name", _IMAGES)
        entries.load(self._server.port, _IMAGES)
        row: Row = {"image": np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)}
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        expected = session.run(None, row)[0]
        for protocol in (tritonclient.http, tritonclient.grpc):
            got = self._ask(protocol, _IMAGES, row, "logits")
            if not np.allclose(got, expected, rtol=1e-3, atol=1e-3):
                raise RuntimeError(f"{_IMAGES}: a wrong answer over {protocol.__name__}")
        console.print(f"{_IMAGES}: added, and right over HTTP and gRPC")
        entries.unload(self._server.port, _IMAGES)

    def _ask(self, protocol: Any, model: str, row: Row, output: str) -> Array:
        """Return the answer that one of Triton's clients gets."""
        url = self._server.http if protocol is tritonclient.http else self._server.grpc
        inputs = []
        for name, array in row.items():
            tensor = protocol.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        with contextlib.closing(protocol.InferenceServerClient(url)) as client:
            got: Array = client.infer(model, inputs).as_numpy(output)
        return got

    def _lrai(self, *arguments: str, cpu: int | None = None) -> None:
        python = str(self._made.environment / "bin" / "python")
        console.print(f"lrai triton {' '.join(Path(a).name for a in arguments)}", soft_wrap=True)
        pin = [] if cpu is None else ["taskset", "-c", str(cpu)]
        done = subprocess.run(
            [*pin, python, "-P", "-c", _LRAI, "triton", *arguments],
            env={**os.environ, **variables(self._made.environment)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"lrai triton {arguments[0]}: {done.stderr or done.stdout}")
        console.print(f"  {done.stdout.partition(chr(10))[0]}", soft_wrap=True)


def answered(server: TritonServer, model: str, least: int = 0) -> Counter[str]:
    """Return how many requests to a model LRAI has answered by its own metric, and how.

    By version and variant, as in "version 2, int8-row". So many at `least` are waited for a while,
    since a stub tells Triton now and then.
    """
    host, port = server.metrics.split(":")
    end = time.monotonic() + _TOLD_SECONDS
    while True:
        with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=30)) as line:
            line.request("GET", "/metrics")
            text = line.getresponse().read().decode()
        found = Counter[str]()
        for labels, count in _COUNTED.findall(text):
            said = dict(_LABEL.findall(labels))
            if said["model"] == model:
                found[f"version {said['version']}, {said['variant']}"] += int(float(count))
        if found.total() >= least or time.monotonic() > end:
            return found
        time.sleep(0.1)


def set_up(environment: Path | None, scratch: Path) -> Prepared:
    """Return what the server runs from, with backends of its own in `scratch`: one is added."""
    made = prepared(environment or prepare().environment, scratch)
    stand_in(made.backends)
    return made


def stand_in(backends: Path) -> None:
    """Write a backend of the name `onnxruntime`, with ONNX Runtime in it."""
    folder = backends / "onnxruntime"
    folder.mkdir(exist_ok=True)
    peer = Path(__file__).with_name("triton_peer.py").read_text(encoding="utf-8")
    by_default = 'given.get("way", "one")'  # as the real one runs a list: those of a length at once
    (folder / "model.py").write_text(peer.replace(by_default, 'given.get("way", "grouped")'))


def _show(stages: Sequence[Stage]) -> None:
    harness.show(
        f"MiniLM in Triton, one core, {CALLERS} callers, lengths of search queries",
        ["", "requests/s", "p95 ms", "answers changed", "worst difference", "seconds", "by LRAI"],
        [
            (
                stage.name,
                f"{np.median(stage.rates):.0f}",
                f"{np.median(stage.p95_ms):.0f}",
                f"{stage.changed:.2%}",
                f"{stage.worst:.1g}",
                f"{stage.seconds:.0f}",
                "; ".join(stage.by) or "-",
            )
            for stage in stages
        ],
        f"changed: cosine to fp32 below {COSINE}; worst difference of any element; seconds from "
        "model.onnx to the first checked answer; by LRAI: what it says has answered",
    )


def _checks(stages: Sequence[Stage]) -> list[Check]:
    before, line, compiled, after = stages
    found = [
        Check(f"{s.name}: worst difference", s.worst, f"<= {FP32_TOLERANCE:g}", s.worst <= 1e-4)
        for s in (before, line, after)
    ]
    share, least = 1 - compiled.changed, compiled.least
    found.append(Check("compiled: answers kept", share, f">= {COSINE_SHARE}", share >= 0.98))
    goal = f">= {COSINE_LEAST}"
    found.append(Check("compiled: least cosine", least, goal, least >= COSINE_LEAST))
    for stage in (line, compiled):
        ratio = float(np.median(stage.rates) / np.median(before.rates))
        found.append(Check(f"{stage.name}: requests/s to before", ratio, "> 1", ratio > 1))
    return found


def _who_answered(stages: Sequence[Stage]) -> list[Check]:
    """Return that LRAI answered where it was to, and with what."""
    before, line, compiled, after = stages
    found = []
    for stage in (before, after):
        ours = sum(stage.by.values())
        found.append(Check(f"{stage.name}: answers of LRAI", ours, "0", ours == 0))
    for stage, version in ((line, 1), (compiled, 2)):
        mine = sum(n for who, n in stage.by.items() if who.startswith(f"version {version}, "))
        name = f"{stage.name}: answers of LRAI's version {version}"
        found.append(Check(name, mine, f"{stage.asked}", mine == stage.asked))
    fp32 = compiled.by.get("version 2, fp32", 0) / compiled.asked
    found.append(Check("compiled: share of its answers in fp32", fp32, "< 0.5", fp32 < 0.5))
    return found


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A model repository, with LRAI and back again.")
    parser.add_argument("--quick", action="store_true", help="compiles with fewer rows")
    parser.add_argument("--environment", type=Path, help="with the server, instead of .triton")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
