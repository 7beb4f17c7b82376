"""What a model is served with: `model_config` of MLflow, or the options of a deployment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from lrai_core import OWN_SETTINGS, LraiConfig, UsageError, load_config

_REQUIRE: Final = "require."


class Settings(NamedTuple):
    """What was asked for.

    Attributes:
        config: Of this process, and of a shared runtime that it starts.
        own: Of the model alone, by dotted key.
        require: Of its certificate; None for nothing.
        variant: To serve instead of the chosen one; empty for that.
    """

    config: LraiConfig
    own: dict[str, Any]
    require: dict[str, Any] | None
    variant: str

    @property
    def how(self) -> Any:
        """Return what `Runtime.load` and `swap` want to be told by name."""
        return {"variant": self.variant, "require": self.require, "settings": self.own}


def settings_of(tree: Mapping[str, Any] | None) -> Settings:
    """Return what a tree of any depth, or dotted names, say; values may be text.

    Unless a variable, a file or the tree says otherwise, the runtime is the one that all processes
    of this user share.

    Raises:
        UsageError: An unknown setting, or a value that is not allowed.
    """
    given = _flat(tree or {})
    require: dict[str, Any] = {}
    for key in [key for key in given if key.startswith(_REQUIRE)]:
        what, value = key.removeprefix(_REQUIRE), given.pop(key)
        try:
            require[what] = value if what == "tier" else float(value)
        except (TypeError, ValueError):
            raise UsageError(f"{key} is {value!r}, a number is needed") from None
    variant = str(given.pop("variant", ""))
    own = {key: given.pop(key) for key in list(given) if key in OWN_SETTINGS}
    load_config(environ={}, host=own)  # for its errors: a runtime that serves others keeps its own
    config = load_config(environ={"LRAI_RUNTIME": "auto", **os.environ}, host=given)
    return Settings(config, own, require or None, variant)


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{below}": deep for below, deep in _flat(value).items()}
        else:
            flat[name] = value
    return flat
