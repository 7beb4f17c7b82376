"""Parts of the daemon that a real one is seldom seen at: a bug at a request, a full disk."""

from __future__ import annotations

import ctypes
import errno
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from lrai_core.config import load_config
from lrai_core.errors import Cancelled
from lrai_core.wire.arena import Arenas
from lrai_core.wire.messages import PROTOCOL_VERSION, BadFrames, encode
from lrai_shared import daemon, messages
from lrai_shared.arena import Arena
from lrai_shared.daemon import Door
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


def test_who_no_longer_waits_for_what_was_dropped_is_told_that_it_does_not_run() -> None:
    """Else it would count as under way there for ever."""
    cancelled = list[str]()
    client = daemon._Client(0.0, running=cast("Any", {1: "one"}))
    runtime = SimpleNamespace(scheduler=SimpleNamespace(cancel=cancelled.append))
    known = SimpleNamespace(runtime=runtime, welcome=SimpleNamespace(credit=3))
    door, sender = SimpleNamespace(_clients={0: client}, _daemon=known), cast("Any", 0)
    for keys in ((1, 2), range(10, 20)):
        told = memoryview(encode(messages.Requests((), tuple(keys))))
        daemon.Door._hear(cast("Any", door), sender, [told], 1.0)
    assert cancelled == ["one"]
    assert [failed.key for failed in client.failed] == [2, 10, 11], "no more than may be under way"
    assert isinstance(messages.error_of(client.failed[0]), Cancelled)


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


def test_what_a_client_names_as_a_session_begins_is_read_only_once_it_knows_of_it() -> None:
    """Before that it sends what lies in an arena which it then gives up."""
    said, line, arena = list[Any](), object(), Arena(1 << 16)
    hello = messages.Attached(PROTOCOL_VERSION, "0", "", 3)
    door = cast("Any", SimpleNamespace(_clients={}, _door=line, _lives={}, arenas=Arenas()))
    door._daemon = SimpleNamespace(welcome=hello)
    door.say, door._adopt = lambda _, message: said.append(message), partial(Door._adopt, door)
    door._attach, sender = partial(Door._attach, door), cast("Any", (line, b"client"))
    sign = memoryview(encode(messages.Attach(PROTOCOL_VERSION, "0", arena.segment)))
    assert arena.segment
    read, none = arena.segment.id, b""
    for given_up in (False, True):
        if given_up:
            client = door._clients.pop(sender)
            door._adopt(client, None)
        for named in (none, read, read):
            Door._hear(door, sender, [sign], 1.0)
            assert (said[-1].arena, said[-1].session) == (named, door._clients[sender].session)
    assert len({one.session for one in said}) == 2
    arena.close()


def test_where_addresses_are_few_nobody_maps_what_an_actor_may_have_no_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arena = Arena(1 << 16)
    door = cast("Any", SimpleNamespace(_lives={}, arenas=Arenas(), dropped_frames=0))
    for limit, maps in ((resource.RLIM_INFINITY, 1), (8 << 30, 0)):
        client = daemon._Client(0.0)
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        Door._adopt(door, client, arena.segment)
        assert len(client.memory) == maps
        assert client.arena == arena.segment, "nothing is told of it twice"
    assert door.dropped_frames == 0
    arena.close()


def test_what_is_sent_again_while_it_runs_is_not_run_twice_and_its_blocks_are_free() -> None:
    client = daemon._Client(0.0, running=cast("Any", {1: "one"}), memory=[memoryview(bytes(9))])
    door, sender = cast("Any", SimpleNamespace(_clients={0: client})), cast("Any", 0)
    again = messages.Infer(1, b"", None, ((-1, 64, 8), (0, 0, 4), (-1, 128, 8)))
    Door._hear(door, sender, [memoryview(encode(messages.Requests((again,))))], 1.0)
    assert client.read == [64, 128]
    assert (list(client.running), client.failed) == ([1], [])


def test_a_state_folder_that_cannot_be_listed_ends_no_daemon(tmp_path: Path) -> None:
    def listed() -> None:
        made.ending = True
        raise OSError(errno.EIO, "broken")

    ended, pool = list[str](), ThreadPoolExecutor(1)
    scheduler = SimpleNamespace(thread=SimpleNamespace(is_alive=lambda: True))
    runtime = SimpleNamespace(scheduler=scheduler, deployments=listed, drain=lambda: None)
    runtime.close = lambda: ended.append("in order")
    made = cast("Any", SimpleNamespace(_folder=tmp_path, ending=False, runtime=runtime))
    made._door = SimpleNamespace(opened=False, idle_since=0.0)
    made._stay, made._keeps, made._under_way = "stay", False, set()
    made._quick = made._slow = pool
    daemon.Daemon.run(made)
    assert ended == ["in order"]


_LARGE_TWICE = """
import ctypes, sys
from lrai_shared.daemon import return_large_memory
if sys.argv[1] == "daemon":
    return_large_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
fields = [(name, ctypes.c_size_t) for name in "abcdefghij"]  # the fifth: outside the heap
libc.mallinfo2.restype = type("mallinfo2", (ctypes.Structure,), {"_fields_": fields})
libc.free(libc.malloc(4 << 20))
before = libc.mallinfo2().e
libc.malloc(3 << 20)
print(libc.mallinfo2().e - before >> 20)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc's, since 2.33")
@pytest.mark.parametrize(("where", "outside_mb"), [("daemon", 3), ("elsewhere", 0)])
def test_large_messages_leave_no_memory_behind(where: str, outside_mb: int) -> None:
    command = [sys.executable, "-P", "-c", _LARGE_TWICE, where]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) == outside_mb
