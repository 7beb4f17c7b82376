"""Workers of `mlflow models serve`: one runtime for all, and what becomes of requests in faults."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lrai_core as lrai
import lrai_mlflow
from benchmarks.processes import Server
from tests.integration.mlflow_server import post, processes_with, runtime_of, start, traffic
from tests.integration.quick import until_quick
from tests.own_runtime import daemon_pids, end_runtime, own_runtime
from tests.pause import paused

pytestmark = pytest.mark.server

WORKERS = 4
ROWS = np.random.default_rng(5).normal(size=(16, 64)).round(3)
BODIES = [{"inputs": {"features": [row.tolist()]}} for row in ROWS]


@pytest.fixture(scope="module")
def saved(classifier_fp32: lrai.Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    lrai_mlflow.save_model(classifier_fp32, path)
    return path


@pytest.fixture(scope="module")
def sockets() -> Iterator[Path]:
    with own_runtime() as folder:
        yield folder


@pytest.fixture(scope="module")
def server(
    saved: Path, sockets: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with start(saved, tmp_path_factory.mktemp("logs"), workers=WORKERS) as found:
        found.wait_until_ready("/ping")
        wait_for(lambda: len(workers(found)) == WORKERS and len(clients(found)) == WORKERS)
        yield found


@pytest.fixture(scope="module")
def expected(server: Server) -> list[Any]:
    return [post(server.port, body).content["predictions"] for body in BODIES]


def test_all_workers_share_one_runtime_and_one_copy_of_the_weights(
    server: Server, sockets: Path, expected: list[Any]
) -> None:
    with traffic(server.port, BODIES, expected, callers=16) as ledger:
        wait_for(lambda: ledger.count("ok") > 50)
    assert ledger.others() == {}
    assert len(daemon_pids(sockets)) == 1
    with runtime_of(sockets) as runtime:
        (model,) = runtime.models()
        assert len(model.actor_pids) == 1
        wait_for(lambda: runtime.stats()["outstanding_rows"] == 0)
    for pid in workers(server):  # the engine is loaded in the actor alone
        assert "onnxruntime_pybind11_state" not in Path(f"/proc/{pid}/maps").read_text()
    assert "onnxruntime_pybind11_state" in Path(f"/proc/{model.actor_pids[0]}/maps").read_text()


def test_an_actor_that_is_killed_costs_no_request(
    server: Server, sockets: Path, expected: list[Any]
) -> None:
    taken = list[float]()
    for _ in until_quick(taken, 2):
        with runtime_of(sockets) as runtime, traffic(server.port, BODIES, expected) as ledger:
            time.sleep(1)
            ((killed,),) = [model.actor_pids for model in runtime.models()]
            os.kill(killed, signal.SIGKILL)
            at = time.monotonic()
            # All callers may wait for the next actor with what they had begun before.
            wait_for(partial(ledger.answered_since, at))
            ((pid,),) = [model.actor_pids for model in runtime.models()]
            assert pid != killed
            time.sleep(1)
        assert ledger.others() == {}
        taken.append(ledger.recovery_seconds(at))


def test_a_runtime_that_is_killed_costs_no_request(
    server: Server, sockets: Path, expected: list[Any]
) -> None:
    before, taken = workers(server), list[float]()
    for _ in until_quick(taken, 5):
        with traffic(server.port, BODIES, expected) as ledger:
            time.sleep(1)
            (daemon,) = daemon_pids(sockets)
            os.kill(daemon, signal.SIGKILL)
            at = time.monotonic()
            wait_for(partial(ledger.answered_since, at))
            time.sleep(1)
        assert ledger.others() == {}
        taken.append(ledger.recovery_seconds(at))
        assert workers(server) == before
        assert daemon_pids(sockets) != [daemon]


def test_a_worker_that_is_killed_costs_what_it_had_and_nothing_more(
    server: Server, expected: list[Any]
) -> None:
    taken = list[float]()
    for _ in until_quick(taken, 2):
        before = workers(server)
        with traffic(server.port, BODIES, expected) as ledger:
            time.sleep(1)
            os.kill(before[0], signal.SIGKILL)
            at = time.monotonic()
            for holds in (
                lambda: len(set(workers(server)) - set(before)) == 1,  # noqa: B023 - at once
                lambda: len(clients(server)) == WORKERS,
            ):
                wait_for(holds)
            time.sleep(1)
        lost = ledger.others()
        # its callers see a connection that breaks: at most what one worker has inside
        broken = {"BadStatusLine", "BrokenPipeError", "ConnectionResetError"}
        broken |= {"IncompleteRead", "RemoteDisconnected"}
        assert set(lost) <= broken
        assert sum(lost.values()) <= 8
        taken.append(ledger.recovery_seconds(at))


def test_a_model_that_somebody_unloads_is_back_where_it_is_asked_for(
    server: Server, sockets: Path
) -> None:
    with runtime_of(sockets) as runtime:
        wait_for(lambda: bool(runtime.models()))
        runtime.unload(runtime.models()[0].name)
    assert post(server.port, BODIES[0]).status in {200, 503}  # it may be back already
    wait_for(lambda: post_or_none(server.port) == 200)


def test_a_model_that_somebody_unloads_is_back_where_nobody_asks_for_it(
    server: Server, sockets: Path
) -> None:
    before = workers(server)
    with runtime_of(sockets) as runtime:
        wait_for(lambda: bool(runtime.models()))
        runtime.unload(runtime.models()[0].name)
        wait_for(lambda: bool(runtime.models()))
    assert workers(server) == before


def test_a_worker_whose_model_cannot_be_loaded_again_ends(
    server: Server, saved: Path, sockets: Path, expected: list[Any]
) -> None:
    before = set(workers(server))
    (manifest,) = saved.rglob("manifest.json")
    aside = manifest.rename(manifest.with_suffix(".aside"))
    try:
        with runtime_of(sockets) as runtime:
            wait_for(lambda: bool(runtime.models()))
            runtime.unload(runtime.models()[0].name)
        wait_for(lambda: not before & set(workers(server)))
    finally:
        aside.rename(manifest)
    wait_for(lambda: post_or_none(server.port) == 200)
    wait_for(lambda: len(workers(server)) == WORKERS)
    assert post(server.port, BODIES[1]).content["predictions"] == expected[1]
    said = server.log.read_text()
    assert "will not come back: it was given up or unloaded, and cannot be loaded again" in said


@pytest.fixture(scope="module")
def interrupted(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the folder of sockets of a server that Ctrl-C has ended, with all its workers."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"LRAI_RUNTIME_SOCKET_DIR": folder, "LRAI_ACTOR_THREADS": "1"}
        logs = tmp_path_factory.mktemp("logs")
        with start(saved, logs, workers=2, variables=own) as one:
            one.wait_until_ready("/ping")
            assert daemon_pids(Path(folder))
            main = one.processes()[0]
            os.killpg(main, signal.SIGINT)  # as a terminal does
            wait_for(lambda: not workers(one) and not Path(f"/proc/{main}/maps").read_text())
        yield Path(folder)
        end_runtime(Path(folder))


def test_ctrl_c_ends_a_server_and_its_workers(interrupted: Path) -> None:
    assert interrupted.exists()


def test_a_worker_ends_where_the_runtime_is_silent_for_too_long(
    saved: Path, tmp_path: Path
) -> None:
    patience = {"LRAI_ACTOR_START_TIMEOUT_SECONDS": "15"}
    with own_runtime(**patience) as folder, start(saved, tmp_path) as one:
        one.wait_until_ready("/ping")
        (worker,) = clients(one)
        (daemon,) = daemon_pids(folder)
        with paused(daemon):
            wait_for(lambda: not Path(f"/proc/{worker}").exists())
        assert "was not ready for" in one.log.read_text()


def test_where_the_runtime_was_silent_for_too_long_other_workers_take_their_place(
    saved: Path, tmp_path: Path
) -> None:
    patience = {"LRAI_ACTOR_START_TIMEOUT_SECONDS": "15"}
    with own_runtime(**patience) as folder, start(saved, tmp_path, workers=2) as one:
        one.wait_until_ready("/ping")
        wait_for(lambda: len(clients(one)) == len(workers(one)) == 2)
        before = set(workers(one))
        (daemon,) = daemon_pids(folder)
        with paused(daemon):
            wait_for(lambda: not before & set(workers(one)))
        wait_for(lambda: len(clients(one)) == len(workers(one)) == 2)
        wait_for(lambda: post_or_none(one.port) == 200)
        assert "was not ready for" in one.log.read_text()


def test_a_server_that_was_ended_does_not_keep_its_model_in_the_runtime_of_others(
    saved: Path, classifier_fp32: lrai.Artifact, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    lrai_mlflow.save_model(classifier_fp32, other, model_config={"variant": "fp32"})
    with own_runtime() as folder, runtime_of(folder) as runtime:
        with start(saved, tmp_path, workers=2) as first:
            first.wait_until_ready("/ping")
            assert len(runtime.models()) == 1
            os.killpg(first.processes()[0], signal.SIGTERM)
            wait_for(lambda: not workers(first))
            (left,) = runtime.models()
        with start(other, tmp_path) as second:
            second.wait_until_ready("/ping")
            assert post(second.port, BODIES[0]).status == 200
            (served,) = runtime.models()
            assert served.name != left.name
            os.killpg(second.processes()[0], signal.SIGINT)
            wait_for(lambda: runtime.models() == [])


def test_ctrl_c_leaves_nothing_running(interrupted: Path) -> None:
    """Last, as it waits until the runtime ends: half a minute after its last client."""
    wait_for(lambda: not processes_with(str(interrupted)))
    assert [path.name for path in interrupted.rglob("clients")] == []


def workers(server: Server) -> list[int]:
    """Return the processes of uvicorn that answer requests."""
    found = []
    for pid in server.processes():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"multiprocessing.spawn" in command or b"spawn_main" in command:
            found.append(pid)
    return found


def clients(server: Server) -> list[int]:
    """Return the processes of a server that hold a model in the runtime."""
    return [pid for pid in server.processes() if any(n.endswith(".held") for n in opened(pid))]


def opened(pid: int) -> list[str]:
    """Return the names of what a process has open now."""
    found = list[str]()
    with contextlib.suppress(OSError):  # it is gone
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # it was closed meanwhile
                found.append(fd.readlink().name)
    return found


def post_or_none(port: int) -> int | None:
    try:
        return post(port, BODIES[0], timeout_seconds=5).status
    except OSError:
        return None


def wait_for(holds: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)
