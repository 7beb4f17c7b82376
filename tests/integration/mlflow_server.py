"""A real `mlflow models serve`, and callers that keep a ledger of what became of each request."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import pytest

import lrai_core as lrai
from benchmarks.processes import HOST, Server

SERVE = [sys.executable, "-m", "mlflow", "models", "serve"]


@dataclass(frozen=True)
class Reply:
    """An answer over HTTP; `content` is what its JSON says, or its text."""

    status: int
    content: Any


def start(
    model: Path | str,
    folder: Path,
    *,
    workers: int = 1,
    env_manager: str = "local",
    variables: dict[str, str] | None = None,
) -> Server:
    """Serve a model; its runtime is the one of `LRAI_RUNTIME_SOCKET_DIR`."""
    command = [*SERVE, "--env-manager", env_manager, "-m", str(model), "-h", HOST, "-p", "{port}"]
    log = folder / f"{Path(model).name}-{time.monotonic_ns()}.log"
    # uvicorn kills a worker that does not answer it within 5 s, as none does on a machine that
    # stands still for so long, or where it is not yet started by then.
    given = {"UVICORN_TIMEOUT_WORKER_HEALTHCHECK": "30", **(variables or {})}
    return Server([*command, "--workers", str(workers)], log, variables=given)


@contextlib.contextmanager
def own_store(folder: Path) -> Iterator[mlflow.MlflowClient]:
    """Yield a client of a tracking store of its own, which children of this process use, too."""
    before, place = mlflow.get_tracking_uri(), (folder / "store").as_uri()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", place)
        mlflow.set_tracking_uri(place)
        yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(before)


def post(
    port: int,
    body: Any,
    content_type: str | None = "application/json",
    *,
    timeout_seconds: float = 60,
    headers: dict[str, str] | None = None,
) -> Reply:
    """Send one request on a connection of its own; text, bytes and iterators are sent as is."""
    content = body if isinstance(body, str | bytes | Iterator) else json.dumps(body)
    given = {"Content-Type": content_type} if content_type is not None else {}
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout_seconds)
    with contextlib.closing(connection):
        chunked = isinstance(content, Iterator)
        given |= {"Transfer-Encoding": "chunked"} if chunked else {}
        connection.request(
            "POST", "/invocations", content, {**given, **(headers or {})}, encode_chunked=chunked
        )
        reply = connection.getresponse()
        text = reply.read().decode("utf-8", "replace")
    try:
        return Reply(reply.status, json.loads(text))
    except ValueError:
        return Reply(reply.status, text)


def runtime_of(sockets: Path) -> lrai.Runtime:
    """Return a client of the runtime whose sockets are there."""
    config = lrai.load_config(call={"runtime.socket_dir": str(sockets)})
    return lrai.Runtime(config, address="auto")


def processes_with(text: str) -> dict[int, str]:
    """Return the processes whose command line, or LRAI's setting of sockets, holds a text."""
    found = {}
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and int(process.name) != os.getpid():
                said = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
                if text.encode() in said:
                    command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(process.name)] = command.decode("utf-8", "replace")
    return found


@dataclass
class Ledger:
    """What became of each request: when it began, when it ended, and how."""

    lines: list[tuple[float, float, str]] = field(default_factory=list)

    def count(self, outcome: str) -> int:
        return sum(found == outcome for _, _, found in self.lines)

    def others(self) -> dict[str, int]:
        """Return how many ended in any other way than by the right answer."""
        found = {outcome for _, _, outcome in self.lines if outcome != "ok"}
        return {outcome: self.count(outcome) for outcome in sorted(found)}

    def answered_since(self, at: float) -> bool:
        """Return whether a request was answered well that began after a moment."""
        return any(begun > at and how == "ok" for begun, _, how in self.lines)

    def recovery_seconds(self, at: float) -> float:
        """Return how long after a moment such a request was answered."""
        return min(end for begun, end, how in self.lines if begun > at and how == "ok") - at


@contextlib.contextmanager
def traffic(port: int, bodies: Sequence[Any], expected: Sequence[Any], callers: int = 8) -> Any:
    """Send requests all the time, each caller one after the other; yield the ledger.

    The number of lines is that of the requests that were begun: each caller writes one for each.
    """
    ledger, over, begun = Ledger(), threading.Event(), [0] * callers

    def call(number: int) -> None:
        while not over.is_set():
            index = (begun[number] * callers + number) % len(bodies)
            begun[number] += 1
            started = time.monotonic()
            try:
                reply = post(port, bodies[index], timeout_seconds=30)
            except (OSError, http.client.HTTPException) as error:
                outcome = type(error).__name__
            else:
                outcome = str(reply.status)
                if reply.status == 200:
                    right = reply.content["predictions"] == expected[index]
                    outcome = "ok" if right else "wrong"
            ledger.lines.append((started, time.monotonic(), outcome))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield ledger
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert len(ledger.lines) == sum(begun), "a request vanished without a trace"
