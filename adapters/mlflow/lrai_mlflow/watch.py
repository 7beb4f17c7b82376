"""What a worker of `mlflow models serve` does beside answering: tell its cap, and end when it must.

MLflow answers `/ping` with 200 as long as the process lives, whatever became of the model. So the
one honest thing that a worker can do about a model that will not come back is to end: the server
starts another worker, which loads it anew, or ends, which whoever looks after it sees.

Nothing that a request does ends a worker, however long it takes: only what the runtime says of the
model, or that it says nothing, for as long as a model may take to start.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

from lrai_core import Artifact, LraiError
from lrai_import.held import Held

_APP: Final = "mlflow.pyfunc.scoring_server.app"  # what uvicorn runs, and nobody else imports
_WORKERS: Final = "--workers"
_LOOK_SECONDS: Final = 1.0
_DEAD_LOOKS: Final = 3  # a runtime that is being replaced may not know the model for one
_GRACE_SECONDS: Final = 30.0  # for what is being answered when a worker ends
_WORTH: Final = 1.1  # of larger calls: rows per second that they have to bring
_log: Final = logging.getLogger("lrai.mlflow")


def is_worker() -> bool:
    """Return whether this process is a worker of MLflow's scoring server."""
    return _APP in sys.modules


def workers_told() -> int:
    """Return how many workers the server was told to have; 0 where that is not known."""
    count = sys.argv[sys.argv.index(_WORKERS) + 1] if _WORKERS in sys.argv[:-1] else ""
    return int(count) if count.isdecimal() else 0


def tell_cap(artifact: Artifact, variant: str) -> None:
    """Warn where MLflow hands over too few requests at a time for the calls that pay most."""
    # Of asyncio.to_thread, from Python 3.13 on by the CPUs that this process may use.
    threads = min(32, (getattr(os, "process_cpu_count", os.cpu_count)() or 1) + 4)
    workers, profile = workers_told() or 1, artifact.manifest.variant(variant).latency
    length = max((point.length for point in profile), default=0)
    speed = {p.rows: p.rows / p.median_ms for p in profile if p.length == length}
    here = max((rows for rows in speed if rows <= threads * workers), default=0)
    best = min((rows for rows in speed if speed[rows] * _WORTH >= max(speed.values())), default=0)
    if here and best > here and speed[best] >= _WORTH * speed[here]:
        gain = speed[best] / speed[here]
        _log.warning(
            "MLflow hands a worker at most %d requests at a time (CPUs + 4, to 32), and there are "
            "%d worker(s); calls of %d rows would serve %.1f times as many a second. All workers "
            "share one runtime: %s %d reaches them, or several rows in a request",
            *(threads, workers, best, gain, _WORKERS, -(-best // threads)),
        )


class Watch:
    """Looks after a model in a thread of its own; calls `end` once, when it will not come back."""

    def __init__(
        self, held: Held, patience_seconds: float, end: Callable[[str], None] | None = None
    ) -> None:
        """Start looking.

        Args:
            held: What is looked at.
            patience_seconds: How long it may be neither ready nor dead, or the runtime silent.
            end: Told why; by default it ends this process, as SIGTERM does.
        """
        self._held, self._end = held, end or _end
        self._patience = patience_seconds + _DEAD_LOOKS * _LOOK_SECONDS
        self._well_at, self._dead, self._over = time.monotonic(), 0, False
        # Asking a runtime that is stopped blocks for long, so somebody else looks at the clock.
        for work in (self._ask, self._judge):
            threading.Thread(target=work, name="lrai-watch", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._over = True

    def _ask(self) -> None:
        while not self._over:
            try:
                state = self._held.kept_state()
            except LraiError:
                state = "silent"
            self._dead = self._dead + 1 if state == "dead" else 0
            if state in ("ok", "idle"):
                self._well_at = time.monotonic()
            time.sleep(_LOOK_SECONDS)

    def _judge(self) -> None:
        while not self._over:
            began = time.monotonic()
            time.sleep(_LOOK_SECONDS)
            late = time.monotonic() - began - _LOOK_SECONDS
            if late > _LOOK_SECONDS:  # it was stopped, not the runtime
                self._well_at = min(time.monotonic(), self._well_at + late)
            silent = time.monotonic() - self._well_at
            if self._dead >= _DEAD_LOOKS or silent > self._patience:
                dead = "it was given up or unloaded, and cannot be loaded again"
                why = dead if self._dead else f"it was not ready for {silent:.0f} s"
                self._over = True
                self._end(f"model {self._held.name!r} will not come back: {why}")


def _end(why: str) -> None:
    """End this process as its server would: requests inside are answered first."""
    _log.critical("%s; this worker ends, so that another one takes its place", why)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os._exit(1)  # a call hangs, and the server would wait for it
