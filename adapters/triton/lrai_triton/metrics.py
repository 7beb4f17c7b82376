"""What Triton shows of LRAI beside its own figures, on its metrics port."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import suppress
from typing import Any, Final

from lrai_core import InferenceResponse, LraiError

_WRITE_SECONDS: Final = 1.0


class Metrics:
    """Counters of one instance, handed to Triton once a second: each addition is a message.

    `lrai_answered_total` by variant and `lrai_refused_total` by reason, both by model and version.
    """

    def __init__(self, pb_utils: Any, model: str, version: str) -> None:
        """Register the families, as every instance does, and begin to write."""
        counted, family = {"variant": "answered", "reason": "refused"}, pb_utils.MetricFamily
        self._families = {
            label: family(f"lrai_{what}_total", f"Requests {what}, by {label}", family.COUNTER)
            for label, what in counted.items()
        }
        self._labels = {"model": model, "version": version}
        self._metrics: dict[tuple[str, str], Any] = {}
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def count(self, outcome: InferenceResponse | LraiError) -> None:
        """Count a request that ended."""
        if isinstance(outcome, LraiError):
            key = ("reason", type(outcome).__name__)
        else:
            key = ("variant", str(outcome.parameters.get("variant", "")))
        with self._lock:
            self._counts[key] += 1

    def close(self) -> None:
        """Write what is left."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(_WRITE_SECONDS)
            with suppress(Exception):  # edge: where Triton lacks the memory, next time
                self._write()

    def _write(self) -> None:
        with self._lock:
            counts = self._counts.copy()
        for (label, value), number in counts.items():
            if (label, value) not in self._metrics:
                labels = self._labels | {label: value}
                self._metrics[label, value] = self._families[label].Metric(labels=labels)
            if number:
                self._metrics[label, value].increment(number)
            with self._lock:  # only what was told is not told again
                self._counts[label, value] -= number
