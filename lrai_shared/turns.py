"""Which threads interrupt others at their work when there is something for them.

For every message the kernel stops who has the CPU in favour of who has slept: mostly a call of the
engine, for some microseconds in cold caches. Threads of SCHED_BATCH wait for their turn where no
CPU is free, and then find more to do at once.

Source: sched(7).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def unhurried() -> Iterator[None]:
    """Have threads that are started meanwhile wait for their turn, unless somebody chose theirs."""
    usual = os.sched_getscheduler(0)
    _set(0, os.SCHED_BATCH if usual == os.SCHED_OTHER else usual)
    try:
        yield
    finally:
        _set(0, usual)


def wait_for_turns(*, wait: bool) -> None:
    """Have all threads of this process wait for their turn, or none, and those they start."""
    for thread in Path("/proc/self/task").iterdir():
        _set(int(thread.name), os.SCHED_BATCH if wait else os.SCHED_OTHER)


def _set(thread: int, policy: int) -> None:
    with suppress(OSError):  # it has ended, or a sandbox knows of one policy only
        os.sched_setscheduler(thread, policy, os.sched_param(0))
