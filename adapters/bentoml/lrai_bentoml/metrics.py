"""What a runtime has counted, for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

# What alerts go by is there before it happens: a rate of what comes from nothing is no rate.
_TOLD = ["actor_hung", "actor_lost", "model_failed", "planner_failed", "variant_refused"]
_ALWAYS = dict.fromkeys([*_TOLD, "request_failed", "request_refused"], 0)


def exposition(stats: Mapping[str, int] | None) -> str:
    """Return `Runtime.stats()` as text; None where the runtime has not answered."""
    told: list[Metric] = [GaugeMetricFamily("lrai_runtime_up", "If it answers", stats is not None)]
    for name, value in sorted((_ALWAYS | dict(stats) if stats else {}).items()):
        if not name.startswith(("arena_", "daemon_")):  # of the worker that is asked
            kind = GaugeMetricFamily if name == "outstanding_rows" else CounterMetricFamily
            told.append(kind(f"lrai_{name}", f"`{name}`, of all workers", value=value))
    return generate_latest(SimpleNamespace(collect=lambda: told)).decode()
