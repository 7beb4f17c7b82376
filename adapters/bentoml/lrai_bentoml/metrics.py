"""What a runtime has counted, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


def exposition(stats: Mapping[str, int] | None) -> str:
    """Return `Runtime.stats()` as text; None where the runtime has not answered."""
    registry = CollectorRegistry()
    registry.register(_Counts(stats))
    return generate_latest(registry).decode()


class _Counts(Collector):
    def __init__(self, stats: Mapping[str, int] | None) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("lrai_runtime_up", "Whether it answers", self._stats is not None)
        for name, value in sorted((self._stats or {}).items()):
            if not name.startswith(("arena_", "daemon_")):  # of the worker that is asked
                kind = GaugeMetricFamily if name == "outstanding_rows" else CounterMetricFamily
                yield kind(f"lrai_{name}", f"`{name}` of the runtime of all workers", value=value)
