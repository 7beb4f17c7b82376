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

# How exactly a thread can wait: as a poller does, and where it waits for its turn besides, which is
# for a tick of most kernels (CONFIG_HZ=250), less what has passed of it.
POLL_SECONDS, TURN_SECONDS = 1e-3, 3e-3


@contextmanager
def unhurried() -> Iterator[None]:
    """Have threads that are started meanwhile wait for their turn, unless somebody chose theirs."""
    changed = _change(0, os.SCHED_OTHER, os.SCHED_BATCH)
    try:
        yield
    finally:
        if changed:
            _change(0, os.SCHED_BATCH, os.SCHED_OTHER)


def wait_for_turns(*, wait: bool) -> bool:
    """Have all threads of this process wait for their turn, or none, and those they start.

    Returns:
        Whether the one that calls this does now.
    """
    change = (os.SCHED_OTHER, os.SCHED_BATCH) if wait else (os.SCHED_BATCH, os.SCHED_OTHER)
    with suppress(OSError):  # no descriptor is left: they stay as they are; or a sandbox
        for thread in Path("/proc/self/task").iterdir():
            _change(int(thread.name), *change)
        return os.sched_getscheduler(0) == os.SCHED_BATCH
    return False


def _change(thread: int, before: int, after: int) -> bool:
    """Return whether the thread had that policy, and has the other one now."""
    with suppress(OSError):  # it has ended, or a sandbox knows of one policy only
        if os.sched_getscheduler(thread) == before:  # else somebody chose another one
            os.sched_setscheduler(thread, after, os.sched_param(0))
            return True
    return False
