"""A runtime folder of the test's own, so that no test shares a daemon with anybody else."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import lrai_core as lrai
from lrai_shared.client import Attached
from lrai_shared.starting import is_running, shared_folder


@contextlib.contextmanager
def own_runtime(**variables: str) -> Iterator[Path]:
    """Yield the folder of sockets that this process and its children use; end what runs there.

    Args:
        variables: Further settings, `LRAI_…`; an empty one is not set.
    """
    given = {"LRAI_RUNTIME": "auto", "LRAI_ACTOR_THREADS": "1", **variables}
    # pytest's own folders have names that are too long for a socket
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in {**given, "LRAI_RUNTIME_SOCKET_DIR": folder}.items():
            patch.setenv(name, value) if value else patch.delenv(name, raising=False)
        try:
            yield Path(folder)
        finally:
            end_runtime(Path(folder))


def end_runtime(folder: Path) -> None:
    """Stop the daemon of a folder of sockets, if one runs; clients that live on start the next."""
    config = lrai.load_config(call={"runtime.socket_dir": str(folder)})
    own = Path(folder, f"lrai-{os.geteuid()}")
    if own.exists() and is_running(shared_folder(config)):
        with contextlib.closing(Attached(config)) as client:
            ending = set(daemon_pids(folder))  # by now: as it is started, it looks like who does
            client.call("stop", {}, int)
        deadline = time.monotonic() + 60
        while ending.intersection(daemon_pids(folder)):
            assert time.monotonic() < deadline, "the runtime does not end"
            time.sleep(0.02)


def daemon_pids(folder: Path) -> list[int]:
    """Return the daemons of a folder of sockets, without what one is about to start as an actor."""
    wanted = f"lrai_shared.daemon\0{folder}".encode()
    parents: dict[int, int] = {}
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and wanted in (process / "cmdline").read_bytes():
                stat = (process / "stat").read_text()
                parents[int(process.name)] = int(stat.rpartition(")")[2].split()[1])
    return [pid for pid, parent in parents.items() if parent not in parents]
