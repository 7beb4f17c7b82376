"""Processes killed and stopped under load: what callers see, and what readiness says."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from benchmarks.host import Host
from benchmarks.processes import HOST, Server
from tests.integration.bento.conftest import WORKERS, Served, serving, start
from tests.integration.conftest import sentence
from tests.integration.quick import until_quick
from tests.pause import pause, paused

pytestmark = pytest.mark.server

CALLERS = 8
QUIET_SECONDS = 2.0  # of load before a fault and after it
ACTOR_SECONDS, RUNTIME_SECONDS = 2.0, 5.0  # until every caller is answered again


@dataclass(frozen=True)
class Entry:
    """A request, and its only end: a status, or what became of the line."""

    ended_s: float
    end: int | str
    right: bool


@dataclass
class Load:
    """Callers in a closed loop, who alternate between both ways in; and the ledger of it all."""

    port: int
    bodies: list[bytes]
    expected: list[Any]
    entries: list[Entry] = field(default_factory=list)
    asked: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._call, args=(n,)) for n in range(CALLERS)]
        for thread in self._threads:
            thread.start()
        time.sleep(QUIET_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def back_after(self, begun_s: float) -> float:
        """Wait; return the longest time without an answer, or until the last that was none."""
        wait_until(lambda: self._answered(begun_s) > 4 * CALLERS)
        time.sleep(QUIET_SECONDS)
        with self._lock:
            late = [entry.ended_s for entry in self.entries if entry.end != 200]
            ends = [e.ended_s for e in self.entries if e.end == 200 and e.ended_s > begun_s]
        moments = [begun_s, *sorted(ends), time.monotonic()]
        silences = [after - before for before, after in pairwise(moments)]
        return max([*silences, *[moment - begun_s for moment in late if moment > begun_s]])

    def _answered(self, begun_s: float) -> int:
        with self._lock:
            return sum(e.end == 200 and e.ended_s > begun_s for e in self.entries)

    def _call(self, number: int) -> None:
        chance = np.random.default_rng(number)
        while not self._ended.is_set():
            index = int(chance.integers(len(self.bodies)))
            with self._lock:
                self.asked += 1
            end, right = self._one(index)
            with self._lock:
                self.entries.append(Entry(time.monotonic(), end, right))

    def _one(self, index: int) -> tuple[int | str, bool]:
        line = http.client.HTTPConnection(HOST, self.port, timeout=120)
        try:
            kind = {"Content-Type": "application/json"}
            line.request("POST", "/embed", self.bodies[index], kind)
            reply = line.getresponse()
            content = reply.read()
            if reply.status != 200:
                return reply.status, True
            return 200, np.allclose(json.loads(content), self.expected[index], atol=1e-4)
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__, True
        finally:
            line.close()


@pytest.fixture(scope="module")
def served(project: Path) -> Iterator[Served]:
    yield from serving(project, LRAI_ACTOR_HANG_SECONDS="2")


@pytest.fixture(scope="module")
def requests(minilm_session: onnxruntime.InferenceSession) -> tuple[list[bytes], list[Any]]:
    random = np.random.default_rng(11)
    feeds = [sentence(random, 1, int(length)) for length in random.integers(3, 24, 40)]
    bodies = [json.dumps({k: v.tolist() for k, v in one.items()}).encode() for one in feeds]
    return bodies, [minilm_session.run(None, one)[0] for one in feeds]


@pytest.fixture
def load(served: Served, requests: tuple[list[bytes], list[Any]]) -> Iterator[Load]:
    made = Load(served.server.port, *requests)
    with made:
        yield made
    assert made.asked == len(made.entries), "a request was lost without a word"
    assert all(entry.right for entry in made.entries), "an answer was another request's"
    # Models that nobody asks for may be back later than the one that is asked.
    wait_until(lambda: served.get("/readyz").status == 200)
    assert len(served.workers()) == WORKERS


def ends(load: Load) -> set[int | str]:
    return {entry.end for entry in load.entries}


def test_a_killed_actor_is_a_delay(served: Served, load: Load) -> None:
    before, taken = served.host.actors(), list[float]()
    for _ in until_quick(taken, ACTOR_SECONDS):
        actor, begun = served.actor("minilm"), time.monotonic()
        os.kill(actor, signal.SIGKILL)
        taken.append(load.back_after(begun))
    assert ends(load) == {200}
    assert len(served.host.actors()) == len(before)


def test_a_killed_runtime_is_a_delay(served: Served, load: Load) -> None:
    taken = list[float]()
    for _ in until_quick(taken, RUNTIME_SECONDS):
        (before,) = served.host.daemons()
        begun = time.monotonic()
        os.kill(before, signal.SIGKILL)
        taken.append(load.back_after(begun))
        assert served.host.daemons() != [before]
    assert ends(load) == {200}


def test_a_killed_worker_takes_only_its_own_requests_along(served: Served, load: Load) -> None:
    taken = list[float]()
    for _ in until_quick(taken, ACTOR_SECONDS):
        runtime = served.host.daemons()
        begun = time.monotonic()
        os.kill(served.workers()[0], signal.SIGKILL)
        taken.append(load.back_after(begun))
        assert served.host.daemons() == runtime
        wait_until(lambda: len(served.workers()) == WORKERS)
    cut = [entry for entry in load.entries if entry.end != 200]
    broken = {"BrokenPipeError", "ConnectionResetError", "RemoteDisconnected", "IncompleteRead"}
    assert ends(load) <= {200, *broken}
    assert len(cut) <= len(taken) * CALLERS


def test_readiness_tells_when_a_model_hangs_and_when_it_is_back(served: Served, load: Load) -> None:
    pause(served.actor("minilm"))
    # It heals by itself; asked together, as it may be back by the next question.
    paths = ("/readyz", "/livez", "/v2/models/minilm/ready")
    wait_until(lambda: [served.get(path).status for path in paths] == [503, 200, 503])
    wait_until(lambda: served.get("/readyz").status == 200)
    assert ends(load) == {200}


def test_a_runtime_that_hangs_is_neither_ready_nor_alive(served: Served) -> None:
    (runtime,) = served.host.daemons()
    with paused(runtime):
        with ThreadPoolExecutor() as pool:  # each waits until the runtime's patience is over
            replies = pool.map(served.get, ("/readyz", "/livez", "/metrics"))
        ready, alive, figures = replies
        assert (ready.status, alive.status) == (503, 503)
        assert b"lrai_runtime_up 0.0" in figures.content
    paths = ("/readyz", "/livez")  # whichever workers answer: each has to find out
    wait_until(lambda: [served.get(path).status for path in paths] == [200, 200])


def test_a_port_that_is_taken_is_named(served: Served, project: Path) -> None:
    with Host() as host:
        port = str(served.server.port)
        command = [sys.executable, "-m", "bentoml", "serve", str(project), "--host", HOST]
        log = project.parent / "taken.log"
        sockets = {"LRAI_RUNTIME_SOCKET_DIR": str(host.folder)}
        with Server([*command, "-p", port], log, variables=sockets) as second:
            wait_until(lambda: len(second.processes()) == 1 and "in use" in log.read_text())
    assert served.get("/readyz").status == 200


@pytest.fixture(scope="module")
def ended(served: Served) -> set[int]:
    """Return the processes of the server, which has been told to end: no test after has it."""
    processes = {*served.server.processes(), *served.host.daemons(), *served.host.actors()}
    assert served.host.daemons()
    served.server._process.terminate()
    return processes


@pytest.mark.usefixtures("ended")  # so that its runtime is idle meanwhile
def test_a_model_that_was_unloaded_is_not_said_to_be_ready_until_it_is_back(project: Path) -> None:
    import lrai_core as lrai

    with Host() as host, start(project, host) as server:
        server.wait_until_ready("/readyz")
        one = Served(server, host)
        with lrai.Runtime(host.config, address="auto") as runtime:
            (name,) = [m.name for m in runtime.models() if m.name.startswith("classifier:")]
            runtime.unload(name)
        assert one.get("/readyz").status == 503
        assert one.get("/livez").status == 200, "it heals by itself"
        wait_until(lambda: one.get("/readyz").status == 200)  # who asks has it loaded again
        assert one.ask("/classify", {"features": [[0.0] * 64]}).status == 200
        with lrai.Runtime(host.config, address="auto") as runtime:
            runtime.unload(name)
        statuses = list[int]()

        def classified() -> bool:
            statuses.append(one.ask("/classify", {"features": [[0.0] * 64]}).status)
            return statuses[-1] == 200

        wait_until(classified)  # requests have it loaded, too
        assert set(statuses) <= {200, 503}


def test_it_is_not_ready_before_every_model_is(project: Path) -> None:
    with Host() as host, start(project, host) as server:
        one, states = Served(server, host), list[int]()
        deadline = time.monotonic() + 120
        while not states or states[-1] != 200:
            assert time.monotonic() < deadline
            try:
                states.append(one.get("/readyz").status)
            except OSError:
                time.sleep(0.02)
        assert len(host.actors()) == 3
        assert set(states) <= {200, 503}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LRAI_RUNTIME_SOCKET_DIR": "/proc/lrai"}, "/proc/lrai"),
        ({"LRAI_RUNTIME_MODEL_ROOTS": "/nowhere"}, "runtime.model_roots"),
        ({"LRAI_ACTOR_THREAD": "1"}, "LRAI_ACTOR_THREAD is no setting"),
    ],
)
def test_what_stands_in_the_way_ends_the_server_with_a_sentence(
    project: Path, variables: dict[str, str], message: str
) -> None:
    with Host() as host, start(project, host, **variables) as server:
        wait_until(lambda: server._process.poll() is not None)
        assert message in server.log.read_text()
        assert server._process.poll() != 0


def test_a_server_that_ends_leaves_the_runtime_to_the_others(project: Path) -> None:
    with Host() as host, start(project, host) as first:
        first.wait_until_ready("/readyz")
        (runtime,) = host.daemons()
        second_project = project.with_name("second")
        shutil.copytree(project, second_project)
        with start(second_project, host) as second:
            second.wait_until_ready("/readyz")
            first._process.send_signal(signal.SIGINT)
            wait_until(lambda: first._process.poll() is not None)
            one = Served(second, host)
            for _ in range(10):
                assert one.ask("/classify", {"features": [[0.0] * 64]}).status == 200
            assert one.get("/readyz").status == 200
            assert host.daemons() == [runtime]


def test_a_model_that_changed_since_it_was_saved_ends_the_server(
    token_source: Path, tmp_path: Path
) -> None:
    import lrai_bentoml
    import lrai_core as lrai

    artifact = lrai.compile(token_source, out=tmp_path / "spoilt.lrai", threads=1)
    stored = lrai_bentoml.save_model("spoilt", artifact)
    graph = Path(stored.path, "model.lrai", "source", "model.onnx")
    graph.write_bytes(graph.read_bytes() + b"x")
    folder = tmp_path / "spoilt"
    folder.mkdir()
    (folder / "service.py").write_text(
        "import bentoml\nimport lrai_bentoml\n\n\n@bentoml.service\nclass Spoilt:\n"
        "    model = lrai_bentoml.runner('spoilt:latest')\n\n"
        "    @bentoml.api\n    def one(self) -> int:\n        return 1\n"
    )
    with Host() as host, start(folder, host) as server:
        wait_until(lambda: server.processes()[1:] == [] and server._process.poll() is not None)
        assert "source/model.onnx" in server.log.read_text()
        assert server._process.poll() != 0
        assert host.daemons() == []


def test_who_ends_the_server_ends_everything(ended: set[int]) -> None:
    """Last, as the runtime ends half a minute after its last client."""
    wait_until(lambda: not any(map(_is_alive, ended)))


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
