"""A real `bentoml serve` with several workers, a runtime of its own, and what it is asked."""

from __future__ import annotations

import http.client
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import lrai_bentoml
import lrai_core as lrai
from benchmarks.host import Host
from benchmarks.models import classifier
from benchmarks.processes import HOST, Server
from tests.many_files import many_files
from tests.tiny_models import token_model

WORKERS = 3
MAX_QUEUE_ROWS = 300
LIMIT_BYTES = 1 << 20
VARIABLES = {
    "LRAI_ACTOR_THREADS": "1",
    "LRAI_ACTOR_HANG_SECONDS": "300",  # some are stopped
    "LRAI_LIMITS_REQUEST_BYTES": str(LIMIT_BYTES),
    "LRAI_SCHEDULER_MAX_QUEUE_ROWS": str(MAX_QUEUE_ROWS),
    "BENTOML_DO_NOT_TRACK": "true",
}


@dataclass(frozen=True)
class Reply:
    """An answer over HTTP, by what it says."""

    status: int
    content: Any
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Served:
    """A server, and the runtime that its workers share."""

    server: Server
    host: Host

    def ask(
        self,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        method: str = "POST",
    ) -> Reply:
        """Return the answer to a body, which is JSON unless it is bytes."""
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection(HOST, self.server.port, timeout=290)
        try:
            given = {"Content-Type": "application/json", **(headers or {})}
            connection.request(method, path, content, given)
            reply = connection.getresponse()
            return _reply(reply)
        finally:
            connection.close()

    def get(self, path: str) -> Reply:
        """Return what a path says."""
        return self.ask(path, method="GET")

    def workers(self) -> list[int]:
        """Return the processes that take requests."""
        found = []
        for pid in self.server.processes():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if b"_bentoml_impl.worker.service" in command:
                found.append(pid)
        return found

    def actor(self, model: str) -> int:
        """Return the process that computes for a model."""
        with lrai.Runtime(self.host.config, address="auto") as runtime:
            (found,) = [m.actor_pids for m in runtime.models() if m.name.startswith(f"{model}:")]
        (pid,) = found
        return pid


def _reply(reply: http.client.HTTPResponse) -> Reply:
    content: Any = reply.read()
    if "json" in reply.headers.get("Content-Type", ""):
        content = json.loads(content)
    return Reply(reply.status, content, {k.lower(): v for k, v in reply.headers.items()})


def start(project: Path, host: Host, **variables: str) -> Server:
    """Start `bentoml serve` on a project or a Bento."""
    command = [sys.executable, "-m", "bentoml", "serve", str(project), "--host", HOST]
    sockets = {"LRAI_RUNTIME_SOCKET_DIR": str(host.folder)}
    return Server(
        [*command, "-p", "{port}"],
        project.parent / f"{project.name}.log",
        variables={**VARIABLES, **sockets, **variables},
    )


@pytest.fixture(scope="session")
def token_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_model(tmp_path_factory.mktemp("tokens") / "tokens.onnx")


@pytest.fixture(scope="session")
def classifier_rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    # Wide enough for int8 to be faster on any processor.
    return classifier(tmp_path_factory.mktemp("classifier") / "wide.onnx", seed=0, hidden=1024)


@pytest.fixture(scope="session")
def classifier_int8(
    classifier_rows: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> lrai.Artifact:
    """The classifier, compiled to what passes its gate."""
    model, rows = classifier_rows
    out = tmp_path_factory.mktemp("artifacts") / "classifier.lrai"
    return lrai.compile(model, out=out, evaluation=rows, output_map="softmax", threads=1)


@pytest.fixture(scope="session")
def project(
    token_source: Path,
    classifier_int8: lrai.Artifact,
    minilm_fp32: lrai.Artifact,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return a folder with a service; its models are in the store."""
    folder = tmp_path_factory.mktemp("bento") / "shop"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("service.py"), folder)
    tokens = lrai.compile(token_source, out=folder.parent / "tokens.lrai", threads=1)
    lrai_bentoml.save_model("tokens", tokens)
    lrai_bentoml.save_model("classifier", classifier_int8)
    lrai_bentoml.save_model("minilm", minilm_fp32)
    return folder


@pytest.fixture(scope="module")
def served(project: Path) -> Iterator[Served]:
    yield from serving(project)


def serving(project: Path, **variables: str) -> Iterator[Served]:
    with many_files(), Host() as host, start(project, host, **variables) as server:
        server.wait_until_ready("/readyz")
        yield Served(server, host)
