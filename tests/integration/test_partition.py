"""A line that breaks and heals, client to daemon or runtime to actor: a proxy stops forwarding."""

from __future__ import annotations

import fcntl
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import lrai_core as lrai
from lrai_shared.client import Attached
from tests.core import small_artifact
from tests.integration.test_runtime_faults import config, counted, pid_of, wait_until
from tests.integration.test_shared_runtime import daemon_with, expected, folder, request, session

__all__ = ["folder", "session"]  # fixtures
pytestmark = pytest.mark.server


class Proxy:
    """Forwards bytes between a socket of its own and another one, until told not to."""

    def __init__(self, path: Path, target: Path) -> None:
        self._target, self._open = str(target), True
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._other: dict[socket.socket, socket.socket] = {}
        self._forwarding = threading.Event()
        self._forwarding.set()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def cut(self) -> None:
        """Forward nothing: to both sides the other one is silent."""
        self._forwarding.clear()

    def heal(self) -> None:
        """Forward again, also what has piled up."""
        self._forwarding.set()

    def close(self) -> None:
        self._open = False
        self._forwarding.set()
        self._thread.join()
        for one in [self._listener, *self._other]:
            one.close()

    def _run(self) -> None:
        while self._open:
            for key, _ in self._selector.select(0.05):
                one = key.fileobj
                assert isinstance(one, socket.socket)
                if one is self._listener:
                    self._connect(one.accept()[0])
                else:
                    self._forward(one)
                self._forwarding.wait()

    def _connect(self, near: socket.socket) -> None:
        far = socket.socket(socket.AF_UNIX)
        far.connect(self._target)
        for one, other in ((near, far), (far, near)):
            self._other[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _forward(self, one: socket.socket) -> None:
        with suppress(OSError):
            if data := one.recv(1 << 16):
                self._forwarding.wait()
                self._other[one].sendall(data)
                return
        self._selector.unregister(one)
        with suppress(OSError):
            self._other[one].shutdown(socket.SHUT_WR)


@contextmanager
def behind_a_proxy(folder: Path, artifact: lrai.Artifact) -> Iterator[tuple[Proxy, lrai.Runtime]]:
    """Yield a runtime that reaches the daemon of `folder` through a proxy only."""
    beside = folder.parent / "p"
    beside.mkdir(mode=0o700)
    with (beside / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # so that it does not start a daemon there
        proxy = Proxy(beside / "clients", folder / "clients")
        try:
            with lrai.Runtime(address=str(beside)) as runtime:
                yield proxy, runtime
        finally:
            proxy.close()


@pytest.mark.parametrize("seconds", [1.0, 4.5], ids=["shorter", "longer than its silence may last"])
def test_a_line_that_breaks_and_heals_runs_no_request_twice_and_loses_none(
    folder: Path,
    classifier_fp32: lrai.Artifact,
    session: onnxruntime.InferenceSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
) -> None:
    daemon_with(tmp_path, monkeypatch, "daemon._SILENT_SECONDS = 3")
    with lrai.Runtime.open(classifier_fp32, address="auto") as direct:
        actor = pid_of(direct, "classifier")
        with behind_a_proxy(folder, classifier_fp32) as (proxy, runtime):
            before = [runtime.submit(request(i)) for i in range(20)]
            wait_until(lambda: direct.stats().get("request_answered", 0) == 20)
            client = runtime._backend
            assert isinstance(client, Attached)
            wait_until(lambda: not (client._asked or client._greeted))
            client._greeted = True  # no sign of life goes out
            proxy.cut()
            during = [runtime.submit(request(i)) for i in range(20, 30)]
            wait_until(lambda: len(client._on_wire) == 10)
            # Now one does. It may begin a session, of which those behind it know nothing.
            client._greeted = False
            wait_until(lambda: client._greeted)
            during += [runtime.submit(request(i)) for i in range(30, 40)]
            wait_until(lambda: len(client._on_wire) == 20)
            time.sleep(seconds)
            assert direct.infer(request(1)).outputs["logits"].shape == (1, 10)
            proxy.heal()
            for i, identity in enumerate(before + during):
                logits = runtime.result(identity).outputs["logits"]
                np.testing.assert_allclose(logits, expected(session, i), atol=1e-4)
            stats = direct.stats()
        # What was answered before is not run again, and what was sent once more ran once.
        assert stats["request_answered"] == 41
        assert stats["outstanding_rows"] == 0
        assert pid_of(direct, "classifier") == actor


ACTOR = """
import os, sys, time
from pathlib import Path
from lrai_core.actor import actor

class Told:
    def __init__(self, session):
        self._session = session

    def run(self, arrays, outputs):
        with (folder / "ran").open("a") as ran:
            print(*arrays[0][:, 0].tolist(), file=ran)
        while (folder / "hold").exists():
            time.sleep(0.005)
        return self._session.run(arrays, outputs)

def load(self, message):
    ordinary(self, message)
    self._sessions = [Told(session) for session in self._sessions]

folder, ordinary = Path(__file__).parent, actor.Actor._load
actor.Actor._load = load
address, *others = sys.argv[1:]
way = folder / "way"
if not way.is_symlink():
    way.symlink_to(address.removeprefix("ipc://"))
actor.main([f"ipc://{folder}/actors", *others])
"""


class Cut:
    """A runtime whose actors reach it through a proxy only, and note what they run in a file."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        (folder / "actor.py").write_text(ACTOR)
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nshift 3\nexec {sys.executable} -P {folder}/actor.py "$@"\n')
        python.chmod(0o700)
        self.folder, self.proxy = folder, Proxy(folder / "actors", folder / "way")
        artifact = small_artifact.build(folder / "m.lrai", factor=2.0)
        try:
            settings |= {"actor.python": str(python)}
            self.runtime = lrai.Runtime.open(artifact, name="m", config=config(**settings))
        except BaseException:
            self.proxy.close()
            raise

    def __enter__(self) -> Cut:
        return self

    def __exit__(self, *_: object) -> None:
        self.runtime.close()
        self.proxy.close()

    def submit(self, *values: int) -> dict[int, str]:
        """Send a request for each, and return their numbers by what they ask for."""
        inputs = {i: {"x": np.full((1, 3), i, np.float32)} for i in values}
        requests = {i: lrai.InferenceRequest(model_name="m", inputs=inputs[i]) for i in values}
        return {i: self.runtime.submit(request) for i, request in requests.items()}

    def submit_and_cut(self, value: int) -> dict[int, str]:
        """Send a request, which runs to its end while its answer does not come through."""
        (self.folder / "hold").touch()
        sent = self.submit(value)
        wait_until(lambda: value in self.ran())
        self.proxy.cut()
        (self.folder / "hold").unlink()
        return sent

    def assert_answered(self, sent: dict[int, str]) -> None:
        for value, identity in sent.items():
            assert self.runtime.result(identity).outputs["y"].tolist() == [[2.0 * value] * 3]

    def ran(self) -> list[float]:
        """Return what was asked for by the requests that actors began, in order."""
        return [float(value) for value in (self.folder / "ran").read_text().split()]


@pytest.fixture
def near(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a short path, for sockets, in which actors note what they run."""
    folder = tmp_path_factory.mktemp("a")
    (folder / "ran").touch()
    return folder


def test_an_actor_whose_line_breaks_and_heals_runs_and_answers_each_request_once(
    near: Path,
) -> None:
    with Cut(near, **{"actor.hang_seconds": 60}) as cut:
        actor = pid_of(cut.runtime, "m")
        sent = cut.submit_and_cut(2) | cut.submit(*range(3, 20))
        time.sleep(1)
        assert cut.runtime.stats().get("request_answered", 0) == 0
        assert cut.runtime.stats()["outstanding_rows"] == 18
        cut.proxy.heal()
        cut.assert_answered(sent)
        stats = cut.runtime.stats()
        assert sorted(cut.ran()) == list(range(2, 20))
        assert (stats["request_answered"], stats["outstanding_rows"]) == (18, 0)
        assert (stats.get("actor_lost", 0), stats["dropped_frames"]) == (0, 0)
        assert pid_of(cut.runtime, "m") == actor


def test_an_idle_actor_whose_line_is_cut_is_not_taken_for_hung(near: Path) -> None:
    with Cut(near, **{"actor.hang_seconds": 2}) as cut:
        actor = pid_of(cut.runtime, "m")
        cut.proxy.cut()
        time.sleep(3)  # it shows on another line that it lives
        cut.proxy.heal()
        cut.assert_answered(cut.submit(1))
        assert cut.runtime.stats().get("actor_hung", 0) == 0
        assert pid_of(cut.runtime, "m") == actor


def test_an_answer_that_comes_after_its_actor_was_replaced_is_dropped(near: Path) -> None:
    with Cut(near, **{"actor.hang_seconds": 2}) as cut:
        actor = pid_of(cut.runtime, "m")
        sent = cut.submit_and_cut(2) | cut.submit(*range(3, 20))
        wait_until(counted(cut.runtime, "actor_started", 2))
        assert cut.runtime.stats().get("request_answered", 0) == 0
        cut.proxy.heal()
        cut.assert_answered(sent)
        wait_until(lambda: cut.runtime.stats()["dropped_frames"] == 1)
        stats, ran = cut.runtime.stats(), cut.ran()
        assert [ran.count(value) for value in sent] == [2, *[1] * 17]
        assert (stats["request_answered"], stats["outstanding_rows"]) == (18, 0)
        assert (stats["actor_hung"], stats["actor_lost"], stats["batch_retried"]) == (1, 1, 1)
        assert pid_of(cut.runtime, "m") != actor
