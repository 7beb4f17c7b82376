"""How a daemon is started: who gets the lock starts it, and it keeps the lock for life."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import BinaryIO, Final

import msgspec

import lrai_core as lrai
from lrai_shared.keys import private_folder

SETTINGS: Final = "settings"  # of a daemon that runs, or was killed
_LOG_BYTES: Final = 1 << 20  # of the log that a start goes on with

_left: Final = set[int]()  # daemons of this process that it is no longer attached to
# Held while a lock is open that a fork in another thread would keep: nobody is forked meanwhile.
_gate: Final = threading.RLock()  # of which a handler of a signal, or gevent's Popen, may fork
os.register_at_fork(
    before=_gate.acquire, after_in_parent=_gate.release, after_in_child=_gate.release
)


def shared_folder(config: lrai.LraiConfig, address: str = "") -> Path:
    """Return the folder of the daemon's socket and lock, made if it is not there.

    Args:
        config: Its `runtime.socket_dir` holds the folder of each user.
        address: Another folder, for a daemon beside this user's first; for that, none or `auto`.

    Raises:
        EnvironmentProblem: It is not this user's alone: what lies there could be anybody's;
            or there is no temporary folder, and none is named.
    """
    address = "" if address == "auto" else address
    try:
        parent = config.runtime.socket_dir or address or tempfile.gettempdir()
    except FileNotFoundError as error:
        raise lrai.EnvironmentProblem(f"{error.strerror}; set runtime.socket_dir") from None
    return private_folder(Path(address or Path(parent, f"lrai-{os.geteuid()}")).absolute())


def start_daemon(
    folder: Path, config: lrai.LraiConfig, *, stay: str = "end"
) -> Popen[bytes] | None:
    """Start the daemon if its lock is free; return its process, None where another one runs.

    Args:
        folder: From `shared_folder`.
        config: Its settings.
        stay: Until when: `end` with its last client, unless one was killed that was to stay, as
            which it is started, with the settings of that one; or `stay`; or stay and listen for
            other machines, at `tcp://HOST:PORT?keys=FOLDER`.

    Raises:
        EnvironmentProblem: As `shared_folder`.
    """
    private_folder(folder)  # it may be gone by now, and what is there somebody else's
    with _gate, (folder / "lock").open("ab") as lock:
        if not _take(lock):
            return None
        config, stay = (config, stay) if stay != "end" else _as_before(folder, config)
        for pid in list(_left):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    continue
            _left.discard(pid)
        shorten_log(folder / "log")
        with (folder / "log").open("ab") as log, contextlib.ExitStack() as after:
            argv = [sys.executable, "-P", "-m", "lrai_shared.daemon", str(folder), stay]
            held = [lock.fileno()]  # it is of the open file, which the daemon keeps for life
            if os.environ.get("LRAI_LOG") == "stderr":
                with contextlib.suppress(OSError):  # this process has none
                    held.append(os.dup(2))
                    after.callback(os.close, held[1])
                    argv.append(str(held[1]))
            daemon = Popen(
                argv, stdin=PIPE, stdout=DEVNULL, stderr=log, start_new_session=True, pass_fds=held
            )
        with daemon.stdin as stream:  # type: ignore[union-attr] # a pipe, which a fork would keep
            stream.write(msgspec.msgpack.encode(config))
    return daemon


def _as_before(folder: Path, config: lrai.LraiConfig) -> tuple[lrai.LraiConfig, str]:
    """Return the settings of the daemon that was killed there, so that the next one has them."""
    with contextlib.suppress(OSError, msgspec.MsgspecError, ValueError):
        content = (folder / SETTINGS).read_bytes()
        before, stay = msgspec.msgpack.decode(content, type=tuple[lrai.LraiConfig, str])
        # What programs run is not for a folder to say, which may have been unpacked here.
        return replace(before, actor=replace(before.actor, python=config.actor.python)), stay
    return config, "end"


def is_running(folder: Path) -> bool:
    """Return whether a daemon holds the lock of the folder."""
    with _gate, (folder / "lock").open("ab") as lock:
        return not _take(lock, fcntl.LOCK_SH)  # which several that look may have


def _take(lock: BinaryIO, kind: int = fcntl.LOCK_EX) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
        return True
    return False


def leave(pid: int) -> None:
    """Take note of a daemon of this process that lives on without it."""
    _left.add(pid)


def shorten_log(log: Path) -> None:
    """Begin a log anew that has become long."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > _LOG_BYTES:
            os.truncate(log, 0)


def last_line(log: Path, before: int) -> str:
    """Return the last line behind what earlier daemons have said."""
    with contextlib.suppress(OSError, IndexError):
        content = log.read_bytes()
        own = content[before:] if len(content) >= before else content  # it was begun anew
        return own.decode("utf-8", "replace").splitlines()[-1][:300]
    return "it said nothing"
