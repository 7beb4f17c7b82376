"""Artifacts in BentoML's model store, found and read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import bentoml
from bentoml.exceptions import BentoMLException, NotFound

import lrai_core as lrai
from lrai_bentoml.errors import bento_errors

MODULE: Final = "lrai_bentoml"  # stored in saved models
DATA: Final = "model.lrai"
_log: Final = logging.getLogger("bentoml.lrai")


def get(tag_like: bentoml.Tag | str) -> bentoml.Model:
    """Return the model of a tag, or of the alias that a Bento gives to one.

    Raises:
        NotFound: There is none, or it was saved by something else.
    """
    model = bentoml.models.get(tag_like)
    if model.info.module != MODULE:
        raise NotFound(f"{model.tag} was saved by {model.info.module or 'hand'}, not by {MODULE}")
    return model


def load_model(bento_model: bentoml.Tag | str | bentoml.Model) -> lrai.Artifact:
    """Return the artifact inside a model, every file of it checked.

    Raises:
        NotFound: See `get`.
        BentoMLException: The artifact has changed since it was saved, is newer than this version,
            or lies outside the model.
    """
    tag = bento_model.tag if isinstance(bento_model, bentoml.Model) else bento_model
    return artifact_of(get(tag))


def artifact_of(model: bentoml.Model, *, verify: bool = True) -> lrai.Artifact:
    """Return the artifact inside a model that `get` gave; `verify` as in `Artifact.open`."""
    its, ours = model.info.context.framework_versions.get("lrai", "?"), lrai.__version__
    with bento_errors():
        artifact = lrai.Artifact.open(path_inside(model, DATA), verify=verify)
    if its != ours:
        _log.warning("%s was saved by lrai %s, and is served by lrai %s", model.tag, its, ours)
    return artifact


def path_inside(model: bentoml.Model, name: str) -> Path:
    """Return a path in the folder of a model.

    Raises:
        NotFound: There is none.
        BentoMLException: A link leads out of the folder.
    """
    root = Path(model.path).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise BentoMLException(f"{name} of {model.tag} leads out of the model")
    if not path.exists():
        raise NotFound(f"{model.tag} has no {name}")
    return path
