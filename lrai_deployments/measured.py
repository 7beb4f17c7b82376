"""What `lrai requalify` found of an artifact on this machine: a manifest beside its user's state.

The artifact stays as it is, and so do its version and its files. What differs is what was measured:
latency, the gate's result, and so which variants serve.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from lrai_core import Artifact, ArtifactError, EnvironmentProblem, LraiConfig
from lrai_core.artifact import Manifest, Variant, disk_errors, read_record
from lrai_core.engine.engine import installed_version, isa_class
from lrai_deployments.traffic import replaced

_MOST_BYTES: Final = 64 << 20
_log: Final = logging.getLogger("lrai.deployments")


@dataclass(frozen=True, slots=True)
class Measured(Artifact):
    """An artifact with what was measured of it here.

    Attributes:
        demanded: Of it at home, and so of answers; its manifest has none, for certificates of here
            are by no order of what was judged there.
    """

    demanded: tuple[float, float] | None = None


def place(artifact: Artifact, config: LraiConfig) -> Path:
    """Return the file in which is kept what was measured of an artifact on this kind of machine.

    Raises:
        EnvironmentProblem: There is no temporary folder, and none is named.
    """
    given = config.runtime
    # The folder of a daemon is its state folder.
    state = given.state_dir or given.address * given.address.startswith("/")
    try:
        folder = state or Path(given.socket_dir or tempfile.gettempdir(), f"lrai-{os.geteuid()}")
    except FileNotFoundError as error:
        raise EnvironmentProblem(f"{error.strerror}; set runtime.state_dir") from None
    return Path(folder, "requalified", f"{artifact.version}-{isa_class()}.json")


def measured_here(artifact: Artifact, config: LraiConfig) -> Artifact:
    """Return the artifact with what was measured of it here, and as it is where nothing was.

    What is not of this artifact, or in a folder that others may write to, is left alone, with a
    line in the log; what was measured with another version of onnxruntime, without.
    """
    path = place(artifact, config)
    try:
        for part in (path.parent.parent, path.parent, path):
            _check(part, (0, os.geteuid()))
        found, _ = read_record(path, Manifest, _MOST_BYTES)
        if not _is_of(found, artifact.manifest):
            raise ArtifactError("it is not of this artifact")
    except FileNotFoundError:
        return artifact
    except (OSError, ArtifactError) as error:
        _log.warning("what was measured of %s is not used: %s", artifact.manifest.name, error)
        return artifact
    made = (found.target.isa, found.target.engine_version)
    if made != (isa_class(), installed_version(found.target.engine)):
        return artifact
    return Measured(artifact.path, found, artifact.sha256, artifact.manifest.demanded)


def keep(artifact: Artifact, found: Manifest, config: LraiConfig) -> Path:
    """Write what was measured, and return where.

    Raises:
        EnvironmentProblem: The disk is full, read-only or not permitted, or the folder is not this
            user's alone.
    """
    path = place(artifact, config)
    with disk_errors(path):
        for folder in (path.parent.parent, path.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                _check(folder, (os.geteuid(),))
            except ArtifactError as error:
                raise EnvironmentProblem(f"{folder} cannot keep it: {error}") from None
        content = msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n"
        with replaced(path) as stream:
            stream.write(content)
    return path


def _check(part: Path, owners: tuple[int, ...]) -> None:
    """Refuse a link, and what others own or may write to.

    Raises:
        ArtifactError: It is such a thing.
        OSError: It cannot be looked at.
    """
    info = part.lstat()
    plain = stat.S_ISREG(info.st_mode) if part.suffix == ".json" else stat.S_ISDIR(info.st_mode)
    if not plain or info.st_uid not in owners or info.st_mode & 0o022:
        raise ArtifactError("others may write to it")


def _is_of(found: Manifest, own: Manifest) -> bool:
    """Return whether the one differs from the other by what was measured and nothing else."""
    known = {variant.id: variant for variant in own.variants}
    if known.keys() != {v.id for v in found.variants} or found.chosen not in known:
        return False
    names = ("chosen", "together", "variants", "target", "created")
    measured: dict[str, Any] = {name: getattr(found, name) for name in names}
    fixed = msgspec.structs.replace(own, demanded=None, **measured) == found
    serves = set(found.together) <= known.keys()
    return fixed and serves and all(_fixed(v) == _fixed(known[v.id]) for v in found.variants)


def _fixed(variant: Variant) -> tuple[object, ...]:
    """Return what no measurement changes."""
    files = (variant.model, variant.weights, variant.size_bytes)
    return (*files, variant.engine, variant.precision, variant.passes_off)
