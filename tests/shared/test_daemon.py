"""Parts of the daemon that a real one is seldom seen at: a bug at a request, a full disk."""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from lrai_core.config import load_config
from lrai_core.wire.messages import BadFrames
from lrai_shared import daemon, messages
from lrai_shared.starting import SETTINGS


def start(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[Any]:
    """Return what a client is told of a request at which the runtime raises."""

    def accept(*_: object) -> None:
        raise error

    monkeypatch.setattr(messages, "request_of", lambda *_: None)
    told = list[Any]()
    client = SimpleNamespace(running={}, failed=told, answered=[], lend=None)
    door = SimpleNamespace(_daemon=SimpleNamespace(runtime=SimpleNamespace(accept=accept)))
    door._settle = partial(daemon.Door._settle, cast("Any", door))
    daemon.Door._start(
        cast("Any", door), cast("Any", client), cast("Any", SimpleNamespace(key=7)), []
    )
    return told


def test_a_bug_at_one_request_ends_that_request_and_not_the_runtime(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (told,) = start(monkeypatch, StopIteration())
    assert told.key == 7
    assert "StopIteration" in str(messages.error_of(told))


def test_what_is_no_request_is_left_to_who_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadFrames):
        start(monkeypatch, BadFrames("no frame"))


def test_a_full_disk_leaves_the_settings_of_whoever_is_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    config = load_config(environ={})
    made = cast("Any", SimpleNamespace(_folder=tmp_path, _given=config, _stay="stay"))
    daemon.Daemon._keep_settings(made)
    kept = (tmp_path / SETTINGS).read_bytes()
    assert msgspec.msgpack.decode(kept)[1] == "stay"
    monkeypatch.setattr(Path, "write_bytes", full)
    daemon.Daemon._keep_settings(made)
    assert (tmp_path / SETTINGS).read_bytes() == kept
    assert [file.name for file in tmp_path.iterdir()] == [SETTINGS]
