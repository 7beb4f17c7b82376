"""A line between client and daemon that breaks and heals, by a proxy that stops forwarding."""

from __future__ import annotations

import fcntl
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import lrai_core as lrai
from tests.integration.test_runtime_faults import pid_of, wait_until
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
            proxy.cut()
            during = [runtime.submit(request(i)) for i in range(20, 40)]
            time.sleep(seconds)
            assert direct.infer(request(1)).outputs["logits"].shape == (1, 10)
            proxy.heal()
            for i, identity in enumerate(before + during):
                logits = runtime.result(identity, 15).outputs["logits"]
                np.testing.assert_allclose(logits, expected(session, i), atol=1e-4)
            stats = direct.stats()
        # What was answered before is not run again, and what was sent once more ran once.
        assert stats["request_answered"] == 41
        assert stats["outstanding_rows"] == 0
        assert pid_of(direct, "classifier") == actor
