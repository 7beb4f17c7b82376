"""The servers of `hosts.py`: every host around ONNX Runtime with either file, and with LRAI."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import mlflow

from benchmarks import mlflow as with_mlflow
from benchmarks.host import Host, held
from benchmarks.hosts_fastapi import Served
from benchmarks.processes import HOST, Server, confine, cpu_seconds
from lrai_core import Artifact

_ROOT: Final = Path(__file__).resolve().parents[1]
_LOAD_SECONDS: Final = 180.0
_IMPORT_SECONDS: Final = 0.5
_ENGINE: Final = "onnxruntime_pybind11_state"  # the library that a process with a session has
MLFLOW, BENTO, SAGEMAKER = "MLflow", "BentoML", "FastAPI and SageMaker"
HOSTS: Final = (MLFLOW, BENTO, SAGEMAKER)
SERVE: Final = "lrai sagemaker serve"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to ask a server: how a peer computes, and the `FORM PATH` that has it do so."""

    name: str
    target: str


@dataclass(frozen=True, slots=True)
class Side:
    """A server to be, and what it is called in tables.

    Attributes:
        name: Of the host's form; several forms may be one server with several ways.
        path: That requests take inside the host; only sides of the same path are compared.
        ways: The best is chosen for each kind of lengths.
        file: `fp32`, `variant` (the same file as LRAI's), or `lrai`.
        server: A key: sides with the same one share the server.
    """

    host: str
    name: str
    path: str
    ways: tuple[Way, ...]
    file: str
    workers: int
    server: str

    @property
    def who(self) -> str:
        """Return it as tables show it."""
        return f"{self.name}, {self.file}" if self.file != "lrai" else self.name


@dataclass(slots=True)
class Running:
    """A server that runs, with LRAI's processes where it has any."""

    server: Server
    runtime: Host | None = None
    log: Path = field(default_factory=Path)

    def processes(self) -> dict[str, list[int]]:
        """Return the process ids by what they are: the host's, LRAI's daemon, its actors."""
        daemons = self.runtime.daemons() if self.runtime else []
        actors = self.runtime.actors() if self.runtime else []
        apart = {*daemons, *actors}
        tree = [pid for pid in self.server.processes() if pid not in apart]
        return {"host": tree, "daemon": daemons, "actors": actors}

    def memory_bytes(self) -> int:
        """Return the proportional set size of everything.

        What other servers that run map of the same files, libraries and weights, counts in parts.
        """
        return sum(held(pid).pss_bytes for pids in self.processes().values() for pid in pids)

    def cpu_seconds(self) -> dict[str, float]:
        """Return what they have used so far, by what they are."""
        found = {}
        for what, pids in self.processes().items():
            found[what] = 0.0
            for pid in pids:
                with contextlib.suppress(OSError):
                    found[what] += cpu_seconds(pid)
        return found

    def engines(self) -> int:
        """Return how many processes have the engine's library, without which none holds weights."""
        count = 0
        for pid in (pid for pids in self.processes().values() for pid in pids):
            with contextlib.suppress(OSError):
                count += _ENGINE in Path(f"/proc/{pid}/maps").read_text(errors="replace")
        return count


class Files:
    """What the servers serve, written once: models of MLflow, a store and projects of BentoML."""

    def __init__(self, source: Path, artifact: Artifact, scratch: Path) -> None:
        """Take the encoder as an ONNX file, and what was compiled from it."""
        self.scratch, self.artifact = scratch, artifact
        chosen = artifact.manifest.variant(artifact.manifest.chosen)
        weights = str(artifact.path / chosen.weights) if chosen.weights else ""
        self.served = {
            "fp32": Served(str(source)),
            "variant": Served(str(artifact.file(chosen.model)), weights),
            "lrai": Served(str(artifact.path), lrai=True),
        }
        self._logged: dict[str, Path] = {}
        self._projects: dict[int, Path] = {}
        self.store = scratch / "store"

    def logged(self, file: str) -> Path:
        """Return the folder of a logged model of MLflow."""
        if not self._logged:
            mlflow.set_tracking_uri((self.scratch / "tracking").as_uri())
        if file not in self._logged:
            if file == "lrai":
                found = with_mlflow.log_lrai(self.artifact)
            else:
                model = Path(self.served["fp32"].model)
                if file == "variant":
                    model = with_mlflow.export(self.artifact, self.scratch / "variant.onnx")
                # The variant as it is to be executed: fused further it would be slower.
                found = with_mlflow.log_plain(model, self.artifact, optimise=file == "fp32")
            self._logged[file] = found
        return self._logged[file]

    def project(self, workers: int) -> Path:
        """Return a project of BentoML as `lrai bentoml init` writes it."""
        if workers not in self._projects:
            model = "minilm:latest" if self._projects else str(self.artifact.path)
            name = [] if self._projects else ["--name", "minilm"]
            folder = self.scratch / f"project-{workers}"
            command = [str(Path(sys.executable).parent / "lrai"), "bentoml", "init", model, *name]
            subprocess.run(
                [*command, "--folder", str(folder), "--workers", str(workers)],
                check=True,
                capture_output=True,
                env={**os.environ, **self.variables()},
            )
            self._projects[workers] = folder
        return self._projects[workers]

    def variables(self) -> dict[str, str]:
        """Return what BentoML is told by the environment."""
        self.store.mkdir(exist_ok=True)
        return {"BENTOML_HOME": str(self.store), "BENTOML_DO_NOT_TRACK": "true"}


class _Form(NamedTuple):
    """One form of a host: its name, the path that its requests take inside, and its ways."""

    name: str
    path: str
    ways: tuple[Way, ...]


_INVOCATIONS: Final = Way("", "inputs /invocations")
_PLAIN: Final = {
    MLFLOW: (_Form("mlflow.onnx", "API", (_INVOCATIONS,)),),
    BENTO: (
        _Form(
            "async",
            "API",
            (Way("in the loop", "named /predict"), Way("in threads", "named /threaded")),
        ),
        _Form(
            "batchable", "API", (Way("one by one", "rows /batched"), Way("equal", "rows /grouped"))
        ),
        _Form("mounted", "mount", (Way("in the loop", "inputs /invocations"),)),
    ),
    SAGEMAKER: (
        _Form(
            "FastAPI",
            "API",
            (Way("in the loop", "inputs /invocations"), Way("in a thread", "inputs /threaded")),
        ),
    ),
}
_OURS: Final = {
    MLFLOW: (_Form("lrai", "API", (_INVOCATIONS,)),),
    BENTO: (
        _Form("lrai", "API", (Way("", "named /predict"),)),
        _Form("lrai, mounted", "mount", (Way("", "inputs /v2/models/minilm/infer"),)),
    ),
    SAGEMAKER: (
        _Form("lrai in FastAPI", "API", (_INVOCATIONS,)),
        _Form(SERVE, "API", (_INVOCATIONS,)),
    ),
}


def sides_of(host: str, workers: Sequence[int], ours_too: Sequence[int] = ()) -> list[Side]:
    """Return everything that is compared in a host.

    Args:
        host: One of `HOSTS`.
        workers: How many processes take requests; each is a comparison of its own.
        ours_too: Further numbers of them that LRAI alone is started with.
    """
    found = []
    for count in [*workers, *ours_too]:
        for file in ("fp32", "variant") if count in workers else ():
            server = f"plain {file} {count}"
            found += [Side(host, *form, file, count, server) for form in _PLAIN[host]]
        for form in _OURS[host]:
            server = f"{'lrai' if host == BENTO else form.name} {count}"
            found.append(Side(host, *form, "lrai", count, server))
    return found


@contextlib.contextmanager
def running(sides: Sequence[Side], files: Files, cpu: int) -> Iterator[dict[str, Running]]:
    """Start the servers of these sides on one CPU; yield them by key when all are ready."""
    with contextlib.ExitStack() as stack:
        started: dict[str, tuple[Running, str]] = {}
        least: dict[str, int] = {}
        for side in sides:
            if side.server in started:
                continue
            runtime = stack.enter_context(Host()) if side.file == "lrai" else None
            command, ready, variables = _command(side, files)
            more = {"OPENBLAS_NUM_THREADS": "1", "LRAI_ACTOR_THREADS": "1"}
            if runtime is not None:
                more["LRAI_RUNTIME_SOCKET_DIR"] = str(runtime.folder)
            log = files.scratch / f"{side.host}-{side.server}.log".replace(" ", "-")
            # On its CPU when all workers have the engine: the first one says that it is ready.
            server = Server(command, log, variables={**more, **variables})
            stack.enter_context(server)
            started[side.server] = Running(server, runtime, log), ready
            least[side.server] = side.workers if side.file != "lrai" else 1
        for key, (one, ready) in started.items():
            one.server.wait_until_ready(ready, _LOAD_SECONDS)
            _wait_for_engines(one, least[key])
        for one, _ in started.values():
            for _ in range(2):  # who was just about to be started
                confine(itertools.chain(*one.processes().values()), [cpu])
        yield {key: one for key, (one, _) in started.items()}


def _wait_for_engines(one: Running, least: int) -> None:
    """Return once so many processes have imported onnxruntime, and gone on from there."""
    deadline = time.monotonic() + _LOAD_SECONDS
    while one.engines() < least:
        if time.monotonic() > deadline:
            raise RuntimeError(f"not {least} processes have the engine; see {one.log}")
        time.sleep(0.1)
    time.sleep(_IMPORT_SECONDS)  # a library is mapped before it looks for CPUs


def _command(side: Side, files: Files) -> tuple[list[str], str, Mapping[str, str]]:
    """Return what starts a server, where it says that it is ready, and its variables."""
    python, workers = [sys.executable, "-m"], str(side.workers)
    where = ["--host", HOST, "--port", "{port}"]
    variables = {"HOSTS_SERVED": files.served[side.file].text(), "HOSTS_WORKERS": workers}
    if side.host == MLFLOW:
        model = str(files.logged(side.file))
        command = [*python, "mlflow", "models", "serve", "--env-manager", "local", *where]
        return [*command, "--workers", workers, "--model-uri", model], "/ping", {}
    if side.host == BENTO:
        # The variables are JSON, whose braces are no placeholders, so they are no arguments.
        command = [*python, "bentoml", "serve"]
        if side.file == "lrai":
            command.append(str(files.project(side.workers)))
        else:
            command += ["benchmarks.hosts_bento:Plain", "--working-dir", str(_ROOT)]
        return [*command, *where], "/readyz", {**variables, **files.variables()}
    if side.name == SERVE:
        program = str(Path(sys.executable).parent / "lrai")
        command = [program, "sagemaker", "serve", str(files.artifact.path), *where]
        return [*command, "--workers", workers], "/ping", {}
    command = [*python, "benchmarks.hosts_fastapi", "{port}", workers]
    return command, "/ping", {**variables, "PYTHONPATH": str(_ROOT)}
