"""The bounded door: how many rows and bytes may be inside at once."""

from __future__ import annotations

import threading

from lrai_core.config import SchedulerConfig
from lrai_core.errors import QueueFull, RequestError


class Admission:
    """Counts rows and bytes from acceptance to the answer; thread-safe."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config, self._lock = config, threading.Lock()
        self.rows = self.nbytes = 0

    def enter(self, rows: int, nbytes: int, seconds_per_row: float) -> None:
        """Count a request in.

        Raises:
            RequestError: It is larger than the queue.
            QueueFull: No room; `retry_after_seconds` is when a tenth of the queue will have run.
        """
        with self._lock:
            by_rows = (self.rows, rows, self._config.max_queue_rows, "rows")
            by_bytes = (self.nbytes, nbytes, self._config.max_queue_bytes, "bytes")
            for inside, more, limit, unit in (by_rows, by_bytes):
                if more > limit:  # coming again is no help
                    raise RequestError(f"{more} {unit}, more than the {limit} that may wait")
                if inside + more > limit:
                    full = f"the queue holds {inside} {unit}, {more} more exceed its {limit}"
                    wait = max(0.1, self.rows * seconds_per_row / 10)
                    raise QueueFull(full, limit=limit, retry_after_seconds=wait)
            self.rows, self.nbytes = self.rows + rows, self.nbytes + nbytes

    def leave(self, rows: int, nbytes: int) -> None:
        """Count a request out, however it ended."""
        with self._lock:
            self.rows, self.nbytes = self.rows - rows, self.nbytes - nbytes
