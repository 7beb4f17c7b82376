"""Models as the platform puts them into a container: a folder with one artifact in it."""

from __future__ import annotations

from pathlib import Path

from lrai_core import Artifact, ArtifactError, __version__
from lrai_sagemaker.logs import log, one_line


def artifact_in(place: Path) -> Artifact:
    """Return the artifact that a folder is, or the one that it holds.

    A warning where another lrai has compiled it.

    Raises:
        ArtifactError: There is none, or more than one.
    """
    try:
        if not (place / "manifest.json").exists():
            entries = sorted(path.name for path in place.iterdir())
            found = [name for name in entries if name.endswith(".lrai")]
            if len(found) != 1:
                names = ", ".join(entries[:10]) or "nothing"
                raise ArtifactError(f"{place} has to hold one NAME.lrai; it holds {names}")
            place /= found[0]
    except OSError as error:
        raise ArtifactError(f"no model at {place}: {error.strerror}") from None
    artifact = Artifact.open(place, verify=False)  # the actor hashes what it opens
    if (its := artifact.manifest.lrai_version) != __version__:
        told = f"{place.name} was compiled by lrai {its}, and is served by lrai {__version__}"
        log.warning("%s", one_line(told))
    return artifact
