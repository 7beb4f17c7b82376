"""Models as the platform puts them into a container: a folder with one artifact in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lrai_codecs import dtype_of
from lrai_core import Artifact, ArtifactError, InferenceRequest, LraiError, Runtime, Signature

_SUFFIX: Final = ".lrai"
# Of zeros, which a model need not take; not those of a queue that is full, or of no such model.
_REFUSALS: Final = frozenset(range(400, 429)) - {404}


def artifact_in(place: Path) -> Artifact:
    """Return the artifact that a folder is, or the one that it holds.

    Raises:
        ArtifactError: There is none, or more than one.
    """
    if (place / "manifest.json").exists():
        return Artifact.open(place, verify=False)  # the actor hashes what it opens
    try:
        entries = sorted(path.name for path in place.iterdir())
    except OSError as error:
        raise ArtifactError(f"no model at {place}: {error.strerror}") from None
    found = [name for name in entries if name.endswith(_SUFFIX)]
    if len(found) != 1:
        names = ", ".join(entries[:10]) or "nothing"
        raise ArtifactError(f"{place} has to hold one NAME{_SUFFIX}; it holds {names}")
    return Artifact.open(place / found[0], verify=False)


def zeros(signature: Signature) -> dict[str, NDArray[Any]]:
    """Return one row of zeros and empty texts, of the smallest shape."""
    return {
        spec.name: np.full(
            [extent if isinstance(extent, int) else 1 for extent in spec.shape],
            "" if spec.datatype == "BYTES" else 0,
            dtype_of(spec.datatype),
        )
        for spec in signature.inputs
    }


def warm_up(runtime: Runtime, name: str, signature: Signature) -> None:
    """Have a model answer a row of zeros, which it may refuse.

    Raises:
        LraiError: It does not answer.
    """
    try:
        runtime.infer(InferenceRequest(model_name=name, inputs=zeros(signature)))
    except LraiError as error:
        if error.http_status not in _REFUSALS:
            raise
