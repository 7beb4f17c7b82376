"""The `parameters` of a model configuration, as LRAI's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple, cast, get_args

from lrai_core import UsageError
from lrai_import.hosted import Asked, asked

Execution = Literal["auto", "lists", "sender", "inline"]

WATCH: Final = "lrai-watch"  # id of the requests by which `lrai triton watch` asks who is alive
_OTHERS: Final = ("session.", "memory.", "ep.")  # of Triton's onnxruntime backend, not for us


class Settings(NamedTuple):
    """What a model configuration asks for.

    Attributes:
        asked: Of LRAI.
        execution: How requests are answered.
        instances: Of the model, 1 where nothing is said.
        size: `max_batch_size`; 0 where Triton hands requests over one by one.
    """

    asked: Asked
    execution: Execution
    instances: int
    size: int

    @property
    def latency_slo_ms(self) -> float:
        """Return the time that the model promises, 0 for none."""
        slo_ms = self.asked.own.get("scheduler.latency_slo_ms")
        return self.asked.config.scheduler.latency_slo_ms if slo_ms is None else float(slo_ms)


def settings_of(model_config: Mapping[str, Any]) -> Settings:
    """Return what the parameters of a configuration say; the rest is as everywhere.

    Raises:
        UsageError: An unknown parameter, or a value that is not allowed.
    """
    given = {
        key: str(value["string_value"])
        for key, value in model_config.get("parameters", {}).items()
        if ("." in key and not key.startswith(_OTHERS)) or key in ("variant", "execution")
    }
    execution = given.pop("execution", "auto")
    if execution not in (allowed := get_args(Execution)):
        raise UsageError(f"execution is {execution!r}, allowed: {', '.join(allowed)}")
    groups = model_config.get("instance_group", [])  # each has so many instances on each GPU
    instances = sum(one.get("count", 1) * max(1, len(one.get("gpus", []))) for one in groups)
    size = int(model_config.get("max_batch_size", 0))
    return Settings(asked(given), cast("Execution", execution), max(1, instances), size)
