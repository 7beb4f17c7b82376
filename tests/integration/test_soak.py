"""Many requests through the shared runtime leave nothing behind, neither memory nor descriptors.

In short what `benchmarks/soak.py` shows of a million.
"""

from __future__ import annotations

import operator
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import lrai_core as lrai
from benchmarks.host import Held, Host, held
from benchmarks.soak import Ledger
from tests.core import small_artifact
from tests.integration.test_runtime_faults import wait_until

pytestmark = pytest.mark.server

WARM_UP, REQUESTS = 8_000, 12_000
VISITS, WINDOW = 5, 128
ROWS = 6_000  # of a large request, which goes through shared memory
# Of each process, over all the requests between: less than 200 bytes of one. That of a large one
# that is kept, of which there are 120, is 72 kB.
MOST_GROWN_BYTES = 2 << 20


def request(value: int, rows: int) -> lrai.InferenceRequest:
    x = np.full((rows, 3), value, np.float32)
    return lrai.InferenceRequest(model_name="small", inputs={"x": x})


SMALL, LARGE = ([request(value, rows) for value in range(16)] for rows in (1, ROWS))


def ask(runtime: lrai.Runtime, count: int) -> Counter[str]:
    """Return how so many requests ended; one in a hundred is large, and one is cancelled."""
    ledger = Ledger(WINDOW)
    for index in range(count):
        ledger.free.acquire()
        value = index % len(SMALL)
        future = ledger.send(runtime, (LARGE if index % 100 == 50 else SMALL)[value], 2 * value)
        if future and index % 100 == 99:
            future.cancel()
    for _ in range(WINDOW):
        assert ledger.free.acquire(timeout=60), "a request has no end"
    return ledger.counts


def visit(host: Host) -> None:
    for _ in range(VISITS):
        with lrai.Runtime(host.config, address=host.address) as visitor:
            for asked in (SMALL[1], LARGE[1]):
                assert (visitor.infer(asked).outputs["y"] == 2).all()


def files(pids: dict[str, int]) -> list[int]:
    """Return the descriptors of each process, and how many of them are of memory files."""
    return [count for pid in pids.values() for count in held(pid)[3:]]


def test_many_requests_leave_nothing_behind(tmp_path: Path) -> None:
    settings = {
        "actor__threads": 1,
        "limits__request_rows": ROWS,
        "scheduler__max_queue_rows": WINDOW * ROWS,
        "scheduler__default_timeout_ms": 600_000.0,  # by its profile a row takes a millisecond
    }
    artifact = small_artifact.build(tmp_path / "small.lrai")
    seen = list[dict[str, Held]]()
    with Host(**settings) as host, lrai.Runtime(host.config, address=host.address) as runtime:
        runtime.load(artifact)
        (actor,), (daemon,) = runtime.models()[0].actor_pids, host.daemons()
        pids, before = {"daemon": daemon, "actor": actor, "client": os.getpid()}, list[int]()
        for count in (WARM_UP, REQUESTS, REQUESTS):
            counts = ask(runtime, count)
            assert counts["sent"] == count == counts["answered"] + counts["cancelled"]
            before = before or files(pids)
            visit(host)
            seen.append({name: held(pid) for name, pid in pids.items()})
        # What the last visitor had goes when it is missed.
        wait_until(lambda: all(map(operator.le, files(pids), before)))
        assert (runtime.models()[0].actor_pids, host.daemons()) == ([actor], [daemon])
    for name in pids:
        for what in ("own_bytes", "shared_bytes"):
            one, other, last = (getattr(look[name], what) for look in seen)
            # What leaks grows between any two looks, what an allocator takes at once only once.
            grown = other - one, last - other
            assert min(grown) <= MOST_GROWN_BYTES, (name, what, grown)
