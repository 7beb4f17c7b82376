"""What `lrai requalify` found of an artifact on this machine: a manifest beside its user's state.

The artifact stays as it is, and so do its version and its files. What differs is what was measured:
latency, the gate's result, and so which variants serve.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec

from lrai_core import Artifact, ArtifactError, LraiConfig
from lrai_core.artifact import Manifest, disk_errors, read_record
from lrai_core.engine.engine import isa_class

_MOST_BYTES: Final = 64 << 20
_log: Final = logging.getLogger("lrai.deployments")


def place(artifact: Artifact, config: LraiConfig) -> Path:
    """Return the file in which is kept what was measured of an artifact on this kind of machine."""
    parent = config.runtime.socket_dir or tempfile.gettempdir()
    state = Path(config.runtime.state_dir or Path(parent, f"lrai-{os.geteuid()}"))
    return state / "requalified" / f"{artifact.version}-{isa_class()}.json"


def measured_here(artifact: Artifact, config: LraiConfig) -> Artifact:
    """Return the artifact with what was measured of it here, and as it is where nothing was.

    What is not of this artifact, or in a folder that others may write to, is left alone, with a
    line in the log.
    """
    path = place(artifact, config)
    try:
        for part, kind in ((path.parent, stat.S_ISDIR), (path, stat.S_ISREG)):
            info = part.lstat()
            owned = info.st_uid in (0, os.geteuid()) and not info.st_mode & 0o022
            if not kind(info.st_mode) or not owned:
                raise ArtifactError("others may write to it")
        found, _ = read_record(path, Manifest, _MOST_BYTES)
        if not _is_of(found, artifact.manifest):
            raise ArtifactError("it is not of this artifact")
    except FileNotFoundError:
        return artifact
    except (OSError, ArtifactError) as error:
        _log.warning("what was measured of %s is not used: %s", artifact.manifest.name, error)
        return artifact
    return replace(artifact, manifest=found)


def keep(artifact: Artifact, found: Manifest | None, config: LraiConfig) -> None:
    """Write what was measured, or for None forget it.

    Raises:
        EnvironmentProblem: The disk is full, read-only or not permitted.
    """
    path = place(artifact, config)
    with disk_errors(path):
        if found is None:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        temporary.touch(mode=0o600)
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
        temporary.replace(path)


def _is_of(found: Manifest, own: Manifest) -> bool:
    """Return whether the one differs from the other by what was measured and nothing else."""
    what = {
        variant.id: (variant.engine, variant.model, variant.weights) for variant in own.variants
    }
    same = all(what.get(v.id) == (v.engine, v.model, v.weights) for v in found.variants)
    serving = {found.chosen, *found.together} <= {variant.id for variant in found.variants}
    fixed = (found.files, found.signature, found.source) == (own.files, own.signature, own.source)
    return same and serving and fixed
