"""The lrai flavor of MLflow: an artifact saved, logged, loaded and served as a model.

    import lrai_mlflow

    lrai_mlflow.log_model("minilm.lrai", name="minilm")  # then: mlflow models serve -m …

The name of this package is stored in saved models. What only a person calls is imported when it is
first used, so that a server does not load it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lrai_mlflow.extra import MissingExtra as MissingExtra  # first
from lrai_mlflow.flavor import _load_pyfunc as _load_pyfunc
from lrai_mlflow.flavor import load_model, log_model, save_model
from lrai_mlflow.serving import FLAVOR_NAME

if TYPE_CHECKING:  # and in `_HOMES`
    from lrai_mlflow.commands.convert import convert
    from lrai_mlflow.commands.facts import signature_of

_HOMES = {"convert": "convert", "signature_of": "facts"}

__all__ = ["FLAVOR_NAME", "convert", "load_model", "log_model", "save_model", "signature_of"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lrai_mlflow' has no attribute {name!r}")
    return getattr(import_module(f"lrai_mlflow.commands.{_HOMES[name]}"), name)
