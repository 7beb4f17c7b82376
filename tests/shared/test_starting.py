"""The lock of a daemon's folder, beside processes that fork."""

from __future__ import annotations

import fcntl
import io
import os
import stat
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

import lrai_core as lrai
from lrai_shared import starting
from lrai_shared.starting import is_running, shared_folder, start_daemon

# Its children do nothing but wait, or look at a file.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def test_a_process_that_is_forked_meanwhile_keeps_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, found, ended = starting._take, list[bool](), threading.Event()

    def slowly(*how: Any) -> bool:
        taken = take(*how)
        time.sleep(0.002)
        return taken

    def look() -> None:
        while not ended.is_set():
            found.append(is_running(tmp_path))

    monkeypatch.setattr(starting, "_take", slowly)
    looking = threading.Thread(target=look)
    looking.start()
    children = list[int]()
    for _ in range(10):
        if not (child := os.fork()):
            time.sleep(1)
            os._exit(0)
        children.append(child)
    ended.set()
    looking.join()
    found.append(is_running(tmp_path))
    for child in children:
        os.waitpid(child, 0)
    assert not any(found)


def test_who_looks_is_not_taken_for_a_daemon_by_others_who_look(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("ab") as lock:
        assert starting._take(lock, fcntl.LOCK_SH)  # as another process does meanwhile
        assert not is_running(tmp_path)
        assert start_daemon(tmp_path, lrai.LraiConfig()) is None  # it looks again soon


def test_who_forks_while_he_looks_is_not_kept_waiting(tmp_path: Path) -> None:
    with starting._gate:  # as a handler of a signal
        if not (child := os.fork()):
            os._exit(is_running(tmp_path))
    assert os.waitpid(child, 0) == (child, 0)


def test_nobody_is_forked_while_the_settings_are_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child would keep the pipe's end, and the daemon wait for the rest of them."""
    free = list[bool]()

    def look() -> None:
        free.append(starting._gate.acquire(blocking=False))

    class Pipe(io.BytesIO):
        def write(self, content: Any) -> int:
            looking = threading.Thread(target=look)
            looking.start()
            looking.join()
            return super().write(content)

        def close(self) -> None:
            self.write(b"")
            super().close()

    daemon = SimpleNamespace(stdin=Pipe())
    monkeypatch.setattr(starting, "Popen", lambda *_, **__: daemon)
    start_daemon(tmp_path, lrai.load_config(environ={}))
    assert free == [False, False]


def test_a_folder_that_is_gone_is_made_again_for_a_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon, folder = SimpleNamespace(stdin=io.BytesIO()), tmp_path / "gone"
    monkeypatch.setattr(starting, "Popen", lambda *_, **__: daemon)
    start_daemon(folder, lrai.load_config(environ={}))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_does_not_say_what_program_actors_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been unpacked here, with settings of a daemon that never was."""
    left = lrai.load_config(environ={}, call={"actor.python": "./evil", "actor.threads": 3})
    (tmp_path / starting.SETTINGS).write_bytes(msgspec.msgpack.encode((left, "stay")))
    tmp_path.chmod(0o700)
    pipe = io.BytesIO()
    monkeypatch.setattr(pipe, "close", lambda: None)
    monkeypatch.setattr(starting, "Popen", lambda *_, **__: SimpleNamespace(stdin=pipe))
    start_daemon(tmp_path, lrai.load_config(environ={}))
    given = msgspec.msgpack.decode(pipe.getvalue(), type=lrai.LraiConfig)
    assert (given.actor.python, given.actor.threads) == ("", 3)


def test_a_long_log_is_begun_anew(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for size, left in ((starting._LOG_BYTES, starting._LOG_BYTES), (starting._LOG_BYTES + 1, 0)):
        log.write_bytes(bytes(size))
        starting.shorten_log(log)
        assert log.stat().st_size == left


@pytest.mark.usefixtures("no_temporary_folder")
def test_without_a_temporary_folder_the_setting_to_use_is_named(tmp_path: Path) -> None:
    config = lrai.load_config(environ={})
    with pytest.raises(lrai.EnvironmentProblem, match=r"set runtime\.socket_dir"):
        shared_folder(config)
    assert shared_folder(config, str(tmp_path / "own")) == tmp_path / "own"
