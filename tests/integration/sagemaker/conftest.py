"""Real `lrai sagemaker serve` processes, and what the tests of this folder do with them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from botocore.config import Config

import lrai_core as lrai
from benchmarks.processes import free_ports
from tests.integration.quick import Stalls
from tests.many_files import many_files
from tests.own_runtime import end_runtime
from tests.tiny_models import column_model, token_model

HOST = "127.0.0.1"
LRAI = (sys.executable, "-P", "-c", "from lrai_core.cli import main; main()")
JSON = "application/json"
TOKENS = {"input_ids": [[3, 14, 15]], "attention_mask": [[1, 1, 1]]}


@dataclass(frozen=True)
class Reply:
    """An answer over HTTP."""

    status: int
    body: bytes
    headers: http.client.HTTPMessage

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def free_port() -> int:
    return free_ports(1)[0]


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class Container:
    """One `lrai sagemaker serve`, and the runtime that it shares with its workers."""

    def __init__(self, arguments: list[str], folder: Path, sockets: Path, **variables: str) -> None:
        self.port, self.sockets = free_port(), sockets
        self._log = folder / f"{self.port}.log"
        own = {
            "LRAI_RUNTIME": "auto",  # also where one worker alone would have the model in itself
            "LRAI_ACTOR_THREADS": "1",
            "LRAI_RUNTIME_SOCKET_DIR": str(sockets),
            "SAGEMAKER_BIND_TO_PORT": str(self.port),
        }
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*LRAI, "sagemaker", "serve", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={k: v for k, v in {**os.environ, **own, **variables}.items() if v},
                cwd=folder,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_until_ready(self, seconds: float = 120) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.log
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self.get("/ping").status == 200
            return False

        wait_until(ready, seconds)

    def send(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=60)
        with contextlib.closing(connection):
            content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, content, {"Content-Type": JSON, **(headers or {})})
            reply = connection.getresponse()
            return Reply(reply.status, reply.read(), reply.headers)

    def get(self, path: str) -> Reply:
        return self.send("GET", path)

    def post(self, body: Any, path: str = "/invocations", **headers: str) -> Reply:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.send("POST", path, body, named)

    def boto(self) -> Any:
        """Return a client of SageMaker's runtime that asks this container."""
        return boto3.client(
            "sagemaker-runtime",
            endpoint_url=f"http://{HOST}:{self.port}",
            region_name="eu-west-1",
            aws_access_key_id="nobody",
            aws_secret_access_key="nothing",
            config=Config(retries={"total_max_attempts": 1}),
        )

    def workers(self) -> list[int]:
        """Return the worker processes."""
        return [pid for pid, command in self._children() if "lrai_sagemaker.worker" in command]

    @contextlib.contextmanager
    def runtime(self) -> Iterator[lrai.Runtime]:
        settings = lrai.load_config(call={"runtime.socket_dir": str(self.sockets)})
        with lrai.Runtime(settings, address="auto") as runtime:
            yield runtime

    def actor(self) -> int:
        with self.runtime() as runtime:
            (pid,) = [pid for model in runtime.models() for pid in model.actor_pids]
            return pid

    def daemon(self) -> int:
        (pid,) = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if f"lrai_shared.daemon\0{self.sockets}" in _text(path)
        ]
        return pid

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()
        end_runtime(self.sockets)

    def _children(self) -> list[tuple[int, str]]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = [int(pid) for pid in _text(path).split()]
        return [(pid, _text(Path(f"/proc/{pid}/cmdline"))) for pid in found]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""  # it has just ended


@dataclass
class Load:
    """Callers in threads, one request after the other, and what became of each."""

    container: Container
    body: Any
    sent: int = 0
    statuses: list[int] = field(default_factory=list)
    lost: list[Exception] = field(default_factory=list)
    wrong: int = 0
    answered_at: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.expected = self.container.post(self.body).json
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._run) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(70)
            assert not thread.is_alive(), "a caller never got its answer"

    def longest_silence(self, since: float, stalls: Stalls) -> float:
        """Return the longest time without an answer, in seconds, but for those of stalls."""
        times = [since, *(at for at in sorted(self.answered_at) if at > since)]
        return max(end - begun - stalls.between(begun, end) for begun, end in pairwise(times))

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                self.sent += 1
            try:
                reply = self.container.post(self.body)
            except (OSError, http.client.HTTPException) as error:
                with self._lock:
                    self.lost.append(error)
                time.sleep(0.02)
                continue
            with self._lock:
                self.statuses.append(reply.status)
                if reply.status == 200:
                    self.answered_at.append(time.monotonic())
                    close = np.allclose(
                        reply.json["outputs"]["mean"], self.expected["outputs"]["mean"], atol=1e-4
                    )
                    self.wrong += not close


@pytest.fixture
def sockets() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lrai-") as short:  # pytest's are too long for sockets
        yield Path(short)
        end_runtime(Path(short))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with tokens.lrai and columns.lrai, and the ONNX files of both."""
    folder = tmp_path_factory.mktemp("models")
    for name, make in (("tokens", token_model), ("columns", column_model)):
        lrai.compile(make(folder / f"{name}.onnx"), out=folder / f"{name}.lrai", threads=1)
    return folder


@pytest.fixture(scope="module")
def tokens(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """Yield a container of two workers that serves the token model."""
    yield from serving(["tokens.lrai", "--workers", "2"], models, tmp_path_factory)


@pytest.fixture(scope="module")
def columns(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """Yield a container that serves the model with an input per column."""
    yield from serving(["columns.lrai"], models, tmp_path_factory)


def serving(
    arguments: list[str], models: Path, folders: pytest.TempPathFactory
) -> Iterator[Container]:
    model, *options = arguments
    with (
        many_files(),
        tempfile.TemporaryDirectory(prefix="lrai-") as short,
        Container(
            [str(models / model), *options], folders.mktemp("container"), Path(short)
        ) as container,
    ):
        container.wait_until_ready()
        yield container
