"""What a runtime has counted, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_GAUGES: Final = frozenset({"outstanding_rows"})
_OF_ONE_WORKER: Final = ("arena_", "daemon_")  # of the worker that happens to be asked


class Counts(Collector):
    """Yields `Runtime.stats()` as `lrai_NAME_total`, and what goes up and down as `lrai_NAME`."""

    def __init__(self, stats: Mapping[str, int] | None) -> None:
        """Take what a runtime has said, None where it did not answer."""
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        """Yield a family per figure."""
        up = "Whether the runtime answered"
        yield GaugeMetricFamily("lrai_runtime_up", up, value=float(self._stats is not None))
        for name, value in sorted((self._stats or {}).items()):
            if name.startswith(_OF_ONE_WORKER):
                continue
            words = name.replace("_", " ").capitalize()
            kind = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
            yield kind(f"lrai_{name}", f"{words}, in the runtime of all workers", value=value)


def exposition(stats: Mapping[str, int] | None) -> str:
    """Return the figures as text."""
    registry = CollectorRegistry()
    registry.register(Counts(stats))
    return generate_latest(registry).decode()
