"""The `parameters` of a model configuration, as LRAI's settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast, get_args

from lrai_core import OWN_SETTINGS, LraiConfig, UsageError, load_config

Execution = Literal["auto", "lists", "sender", "inline"]
_REQUIRE: Final = "require."


@dataclass(frozen=True, slots=True)
class Settings:
    """What a model configuration asks for.

    Attributes:
        config: Of this process, and of a shared runtime that it starts.
        own: Of the model alone, by dotted key.
        require: Of its certificate; None for nothing.
        variant: To serve instead of the chosen one; empty for that.
        execution: How requests are answered.
        instances: Of the model, 1 where nothing is said.
    """

    config: LraiConfig
    own: dict[str, Any]
    require: dict[str, Any] | None
    variant: str
    execution: Execution
    instances: int

    @property
    def latency_slo_ms(self) -> float:
        """Return the time that the model promises, 0 for none."""
        slo_ms = self.own.get("scheduler.latency_slo_ms")
        return self.config.scheduler.latency_slo_ms if slo_ms is None else float(slo_ms)


def settings_of(model_config: Mapping[str, Any]) -> Settings:
    """Return what the parameters of a configuration say; the rest is as everywhere.

    Raises:
        UsageError: An unknown parameter, or a value that is not allowed.
    """
    given = {
        key: str(value["string_value"])
        for key, value in model_config.get("parameters", {}).items()
        if "." in key or key in ("variant", "execution")  # others are not meant for us
    }
    variant, execution = given.pop("variant", ""), given.pop("execution", "auto")
    if execution not in (allowed := get_args(Execution)):
        raise UsageError(f"execution is {execution!r}, allowed: {', '.join(allowed)}")
    require: dict[str, Any] = {}
    for key in [key for key in given if key.startswith(_REQUIRE)]:
        what, value = key.removeprefix(_REQUIRE), given.pop(key)
        try:
            require[what] = value if what == "tier" else float(value)
        except ValueError:
            raise UsageError(f"{key} is {value!r}, a number is needed") from None
    own = {key: given.pop(key) for key in list(given) if key in OWN_SETTINGS}
    load_config(environ={}, host=own)  # for its errors: a runtime that serves others keeps its own
    # Unless a variable says otherwise, all instances and models of a host share one runtime.
    config = load_config(environ={"LRAI_RUNTIME": "auto", **os.environ}, host=given)
    instances = sum(group.get("count", 1) for group in model_config.get("instance_group", []))
    chosen = cast("Execution", execution)
    return Settings(config, own, require or None, variant, chosen, max(1, instances))
