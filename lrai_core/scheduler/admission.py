"""The bounded door: how many rows and bytes may be inside at once."""

from __future__ import annotations

import threading
from typing import NoReturn

from lrai_core.config import SchedulerConfig
from lrai_core.errors import QueueFull


class Admission:
    """Counts rows and bytes from acceptance to the answer; thread-safe."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self.rows = 0
        self.nbytes = 0

    def enter(self, rows: int, nbytes: int, seconds_per_row: float) -> None:
        """Count a request in.

        Raises:
            QueueFull: No room; `retry_after_seconds` is when a tenth of the queue will have run.
        """
        with self._lock:
            total_rows, total_bytes = self.rows + rows, self.nbytes + nbytes
            limits = self._config
            if total_rows > limits.max_queue_rows:
                self._refuse(self.rows, rows, limits.max_queue_rows, "rows", seconds_per_row)
            if total_bytes > limits.max_queue_bytes:
                self._refuse(self.nbytes, nbytes, limits.max_queue_bytes, "bytes", seconds_per_row)
            self.rows, self.nbytes = total_rows, total_bytes

    def _refuse(
        self, inside: int, more: int, limit: int, unit: str, seconds_per_row: float
    ) -> NoReturn:
        raise QueueFull(
            f"the queue holds {inside} {unit}, {more} more exceed its {limit}",
            limit=limit,
            retry_after_seconds=max(0.1, self.rows * seconds_per_row / 10),
        )

    def leave(self, rows: int, nbytes: int) -> None:
        """Count a request out, however it ended."""
        with self._lock:
            self.rows -= rows
            self.nbytes -= nbytes
