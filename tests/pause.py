"""A process that hangs: it is there, and does nothing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_STOPPED: Final = "TtZX"  # states, see proc(5): those of threads that end too
_MOST_SECONDS: Final = 30.0


def pause(pid: int) -> None:
    """Stop a process; from here on it does nothing until it is told to go on.

    `kill` returns before that: the other threads run until the first one has seen the signal, and
    may answer what is asked next.
    """
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + _MOST_SECONDS
    while not set(_states(pid)) <= set(_STOPPED):
        assert time.monotonic() < deadline, f"process {pid} does not stop"
        time.sleep(0.001)


@contextmanager
def paused(pid: int) -> Iterator[None]:
    """Stop a process for a while, however that ends: what cleans up may need it."""
    pause(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _states(pid: int) -> Iterator[str]:
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):  # it has ended
            yield thread.read_text().rpartition(")")[2].split()[0]
