"""The settings of runtimes that only measure: beside what serves, and as it would serve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrai_core import LraiConfig, load_config


def own_config(more: Mapping[str, Any]) -> LraiConfig:
    """Return the settings of an embedded runtime of one's own, those of `more` as given.

    Nothing is kept of what it is asked, and nobody is in a hurry. What `lrai requalify` has found
    of an artifact counts, which lies in the state folder: that is one runtime's, so it is named as
    the address, where it is looked for too.
    """
    own: dict[str, Any] = {"runtime.state_dir": "", "runtime.capture_rows": 0}
    own["scheduler.latency_slo_ms"] = 0
    if state := load_config().runtime.state_dir:
        own["runtime.address"] = str(Path(state).absolute())
    return load_config(call={**own, **more})
