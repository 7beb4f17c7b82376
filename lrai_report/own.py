"""The settings of runtimes that only measure: beside what serves, and as it would serve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lrai_core import LraiConfig, load_config

_PATIENCE_MS: Final = 3_600_000.0


def own_config(more: Mapping[str, Any]) -> LraiConfig:
    """Return the settings of an embedded runtime of one's own, those of `more` as given.

    Nothing is kept of what it is asked, nobody is in a hurry, who names no time waits, and what is
    measured may lie anywhere. What `lrai requalify` has found
    of an artifact counts, which lies in the state folder: that is one runtime's, so it is named as
    the address, where it is looked for too.
    """
    own: dict[str, Any] = {"runtime.state_dir": "", "runtime.capture_rows": 0}
    own |= {"scheduler.latency_slo_ms": 0, "scheduler.default_timeout_ms": _PATIENCE_MS}
    own["runtime.model_roots"] = ""
    if state := load_config().runtime.state_dir:
        own["runtime.address"] = str(Path(state).absolute())
    return load_config(call={**own, **more})
