"""What a model is served with: `model_config` of MLflow, or the options of a deployment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrai_import.hosted import Asked, asked


def settings_of(tree: Mapping[str, Any] | None, saved: Mapping[str, Any] | None = None) -> Asked:
    """Return what a tree of any depth, or dotted names, say; values may be text.

    `saved`: what was saved with the model, of the same kind; it counts where `tree` says nothing.

    Raises:
        UsageError: An unknown setting, or a value that is not allowed.
    """
    return asked(flat(saved or {}) | flat(tree or {}))


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree's values by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{below}": deep for below, deep in flat(value).items()}
        else:
            found[name] = value
    return found
