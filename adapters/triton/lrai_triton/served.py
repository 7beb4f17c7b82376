"""Which file a version of a model is served from, and in what way."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from lrai_core import Artifact, ArtifactError, EnvironmentProblem, UsageError
from lrai_import.held import Held
from lrai_triton.settings import Settings


def hold(name: str, artifact: Artifact, settings: Settings, execution: str) -> Held:
    """Return the model of this stub, loaded in a runtime, or found loaded there by others.

    Every instance and every reload of one artifact in one place under one name and version finds
    it; the last one that lets go unloads it.

    Raises:
        LraiError: It cannot be served as the settings demand.
    """
    asked, inline = settings.asked, execution == "inline"
    if inline and float(asked.own.get("runtime.capture_rows", asked.config.runtime.capture_rows)):
        raise UsageError("execution is inline: nothing is captured; leave it auto")
    own = asked.in_process() if inline else asked
    # By its path, too, which actors are started from: it is a copy of its own for each load of a
    # repository in a cloud, and a release's for who replaces one by the next.
    place = hashlib.sha256(bytes(artifact.path.resolve())).hexdigest()[:6]
    try:
        return Held(artifact, own, f"{name}:{artifact.version[:12]}{place}{asked.mark}")
    except EnvironmentProblem as error:
        where = "see runtime.address, runtime.socket_dir and its log"
        raise EnvironmentProblem(f"the runtime: {error}; {where}") from None


def execution_of(artifact: Artifact, settings: Settings) -> str:
    """Return how requests are answered where nothing is said.

    By what the model takes alone; several instances would each have a copy of it in their stubs.
    Where Triton makes no lists, one is answered before the next comes, unless each is for itself.
    """
    if settings.execution != "auto":
        return settings.execution
    if settings.asked.placed(artifact, settings.instances).here:
        return "inline"
    one_by_one = settings.size == 0 and artifact.manifest.signature.coalescible
    return "sender" if settings.asked.latency_slo_ms or one_by_one else "lists"


def source_of(folder: Path, filename: str) -> Path:
    """Return the ONNX model, see `onnx_of`, or the `model.lrai/` of a version directory.

    Raises:
        ArtifactError: There is neither, or both.
        EnvironmentProblem: This user may not look.
    """
    if os.path.isdir(folder) and not os.access(folder, os.X_OK):  # noqa: PTH112 - is_dir may raise
        raise EnvironmentProblem(f"version directory {folder.name}: no permission to read it")
    onnx = onnx_of(folder, filename)
    found = [path for path in (onnx, folder / "model.lrai") if path.exists()]
    if len(found) != 1:
        it = f"both {onnx.name} and" if found else f"neither {onnx.name} nor"
        raise ArtifactError(f"version directory {folder.name} holds {it} model.lrai, one is needed")
    return found[0]


def onnx_of(folder: Path, filename: str) -> Path:
    """Return where the ONNX model of a version directory is, if it has one.

    It is called `model.onnx`, or as `default_model_filename` says. One with weights in files of
    their own lies with them, as `model.onnx`, in a folder of that name.

    Raises:
        UsageError: It says a path, which may lead anywhere.
    """
    if "/" in filename or filename in (".", ".."):
        raise UsageError(f"default_model_filename is {filename!r}: a name without / is needed")
    model = folder / (filename or "model.onnx")
    return model / "model.onnx" if model.is_dir() else model
