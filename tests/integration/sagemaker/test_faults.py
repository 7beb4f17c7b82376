"""What is killed under an endpoint comes back; nobody waits for ever, and ping says how it is."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

import lrai_core as lrai
from tests.integration.quick import Stalls, scaled, until_quick
from tests.integration.sagemaker.conftest import HOST, TOKENS, Container, Load, wait_until
from tests.own_runtime import end_runtime
from tests.pause import pause, paused

pytestmark = pytest.mark.server

BODY = {"inputs": TOKENS}
WORKERS = 3


def serve(models: Path, folder: Path, sockets: Path) -> Container:
    container = Container([str(models / "tokens.lrai"), "--workers", str(WORKERS)], folder, sockets)
    container.wait_until_ready()
    return container


class Pings:
    """What ping said, in a thread of its own, and how often not in the two seconds allowed."""

    def __init__(self, container: Container, stalls: Stalls) -> None:
        self.said, self.slow = list[int](), 0
        self._container, self._stalls, self._stop = container, stalls, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            begun = time.monotonic()
            try:
                self.said.append(self._container.get("/ping").status)
            except (OSError, http.client.HTTPException):
                self.said.append(0)  # the worker that it was sent to was killed
            ended = time.monotonic()
            self.slow += ended - begun - self._stalls.between(begun, ended) > 2.0
            time.sleep(0.02)


def answered(load: Load, count: int) -> bool:
    return len(load.answered_at) >= count


@pytest.mark.parametrize(("victim", "seconds"), [("actor", 2.0), ("worker", 2.0), ("daemon", 5.0)])
def test_what_is_killed_under_load_is_back_in_time(
    victim: str, seconds: float, models: Path, tmp_path: Path, sockets: Path
) -> None:
    with serve(models, tmp_path, sockets) as container, Stalls() as stalls:
        find: dict[str, Callable[[], int]] = {
            "actor": container.actor,
            "worker": lambda: container.workers()[0],
            "daemon": container.daemon,
        }
        load, pings = Load(container, BODY), Pings(container, stalls)
        silences, starts, spoiled, slow = list[float](), list[float](), list[bool](), 0
        try:
            for _ in until_quick(silences, seconds, spoiled=spoiled, starts=starts):
                wait_until(lambda: container.get("/ping").status == 200)
                time.sleep(0.5)
                pid, killed_at = find[victim](), time.monotonic()
                os.kill(pid, signal.SIGKILL)
                wait_until(partial(answered, load, len(load.answered_at) + 40))
                silences.append(load.longest_silence(killed_at, stalls))
                spoiled.append(pings.slow > slow)
                slow = pings.slow
        finally:
            pings.stop()
            load.stop()
        container.wait_until_ready()
        wait_until(lambda: len(container.workers()) == WORKERS)
        assert "Traceback" not in container.log

    assert load.sent == len(load.statuses) + len(load.lost)  # nobody was forgotten
    assert load.wrong == 0
    assert set(load.statuses) <= {200, 503}
    assert max(silences) < 5 * scaled(seconds, starts), silences
    assert set(pings.said) <= {200, 503, 0}
    if victim == "worker":
        assert (
            len(load.lost) <= len(silences) * 4
        )  # those on their way in it, who were told by its end
        assert f"ended with status -{int(signal.SIGKILL)}" in container.log
    else:
        assert not load.lost
        assert load.statuses.count(503) == 0  # they were asked again, and answered


def test_one_worker_alone_is_replaced(models: Path, tmp_path: Path, sockets: Path) -> None:
    with Container([str(models / "tokens.lrai")], tmp_path, sockets) as container:
        container.wait_until_ready()
        taken = list[float]()
        for _ in until_quick(taken, 2):
            (pid,) = container.workers()
            begun = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            container.wait_until_ready()
            assert container.post(BODY).status == 200
            taken.append(time.monotonic() - begun)
            assert container.workers() != [pid]


def test_workers_that_keep_dying_end_the_container(
    models: Path, tmp_path: Path, sockets: Path
) -> None:
    with serve(models, tmp_path, sockets) as container:
        while container.process.poll() is None:
            for pid in container.workers():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        assert container.process.wait() == 5
        assert "deaths of workers in 60 s" in container.log.splitlines()[-1]


def test_a_runtime_that_was_stopped_is_started_and_loaded_again(
    models: Path, tmp_path: Path, sockets: Path
) -> None:
    with serve(models, tmp_path, sockets) as container:
        wait_until(lambda: container.log.count("is loaded") == 1)  # said after the first ping
        end_runtime(sockets)
        wait_until(lambda: container.log.count("is loaded") == 2)
        container.wait_until_ready()
        assert container.post(BODY).status == 200


def test_a_container_takes_its_model_out_of_a_runtime_that_goes_on(
    models: Path, tmp_path: Path, sockets: Path
) -> None:
    (tmp_path / "other").mkdir()
    given = [str(models / "tokens.lrai")]
    config = lrai.load_config(call={"runtime.socket_dir": str(sockets)})
    with (
        lrai.Runtime(config, address="auto") as runtime,  # somebody else's, too
        Container(given, tmp_path, sockets) as one,
        Container(given, tmp_path / "other", sockets) as other,
    ):
        one.wait_until_ready()
        other.wait_until_ready()
        assert len(runtime.models()) == 1
        assert other.stop() == 0
        assert len(runtime.models()) == 1
        assert one.post(BODY).status == 200
        assert one.stop() == 0
        wait_until(lambda: runtime.models() == [])  # for which it waits no longer than it may


def test_a_runtime_that_hangs_makes_ping_false_in_time(
    models: Path, tmp_path: Path, sockets: Path
) -> None:
    with serve(models, tmp_path, sockets) as container:
        daemon = container.daemon()
        with paused(daemon):
            taken = list[float]()
            for _ in until_quick(taken, 4, least=3):
                begun = time.monotonic()
                assert container.get("/ping").status == 503
                taken.append(time.monotonic() - begun)
            late = container.post(BODY, X_Amzn_SageMaker_Custom_Attributes="timeout_ms=500")
            assert late.status == 504
        container.wait_until_ready()
        assert container.post(BODY).status == 200


def test_what_has_not_begun_is_dropped_when_its_caller_hangs_up(
    models: Path, tmp_path: Path, sockets: Path
) -> None:
    content = json.dumps(BODY).encode()
    head = "POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    whole = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
    # Calls of one row: the first one would hold the whole burst if that came to the queue at once.
    variables = {"LRAI_ACTOR_HANG_SECONDS": "60", "LRAI_SCHEDULER_MAX_BATCH_ROWS": "1"}
    with Container([str(models / "tokens.lrai")], tmp_path, sockets, **variables) as container:
        container.wait_until_ready()
        actor = container.actor()
        with container.runtime() as runtime:

            def inside() -> int:
                return runtime.stats()["outstanding_rows"]

            pause(actor)
            lines = []
            for _ in range(40):
                lines.append(socket.create_connection((HOST, container.port)))
                lines[-1].sendall(whole)
            wait_until(lambda: inside() == 40)
            for line in lines:
                line.close()
            wait_until(lambda: inside() <= 2)  # what the actor has, and has next, is not taken back
            os.kill(actor, signal.SIGCONT)
            wait_until(lambda: inside() == 0)
        assert container.post(BODY).status == 200
