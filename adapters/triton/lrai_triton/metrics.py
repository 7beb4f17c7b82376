"""What Triton shows of LRAI beside its own figures, on its metrics port."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import suppress
from typing import Any

from lrai_core import InferenceResponse, LraiError


class Metrics:
    """Counters of one instance, handed to Triton now and then: each addition is a message.

    `lrai_answered_total` by variant and `lrai_refused_total` by reason, both by model and version.
    """

    def __init__(self, pb_utils: Any, model: str, version: str) -> None:
        """Register the families, as every instance does."""
        counted, family = {"variant": "answered", "reason": "refused"}, pb_utils.MetricFamily
        self._families = {
            label: family(f"lrai_{what}_total", f"Requests {what}, by {label}", family.COUNTER)
            for label, what in counted.items()
        }
        self._labels = {"model": model, "version": version}
        self._metrics: dict[tuple[str, str], Any] = {}
        # All, and those of them that Triton was told.
        self._counts, self._told = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        self._lock = threading.Lock()

    def count(self, outcome: InferenceResponse | LraiError) -> None:
        """Count a request that ended."""
        key = ("reason", type(outcome).__name__)
        if isinstance(outcome, InferenceResponse):
            key = ("variant", str(outcome.parameters.get("variant", "")))
        with self._lock:
            self._counts[key] += 1

    def write(self) -> None:
        """Tell Triton what was counted since."""
        with suppress(Exception):  # edge: where Triton lacks the memory, next time
            for (label, value), number in list(self._counts.items()):
                if (label, value) not in self._metrics:
                    labels = self._labels | {label: value}
                    self._metrics[label, value] = self._families[label].Metric(labels=labels)
                if (new := number - self._told[label, value]) > 0:
                    self._metrics[label, value].increment(new)
                    self._told[label, value] += new
