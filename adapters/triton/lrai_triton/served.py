"""A model of this stub, loaded in a runtime, for as long as Triton wants it.

Every instance and every reload of one artifact under one name and version finds it loaded; the last
one that lets go unloads it. A lock on a file says who holds it, so that a stub that was killed does
not.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from pathlib import Path

from lrai_core import Artifact, ArtifactError, LraiError, Runtime
from lrai_import.built import state_folder
from lrai_import.hosted import is_quick, load
from lrai_triton.settings import Settings


class Served:
    """One model in a runtime.

    Attributes:
        name: Under which the runtime knows it.
        runtime: That serves it.
        execution: How requests are answered: `lists`, `sender` or `inline`.
    """

    def __init__(self, name: str, artifact: Artifact, settings: Settings) -> None:
        """Load it, or find it loaded.

        Raises:
            LraiError: It cannot be served as the settings demand.
        """
        self.execution = execution_of(artifact, settings)
        asked = settings.asked
        own, config = dict(asked.own), asked.config
        self.name = f"{name}:{artifact.version[:12]}{asked.mark}"
        if self.execution == "inline":
            own["actor.isolation"] = "inline"
        held = hashlib.sha256(self.name.encode()).hexdigest()[:32]
        self._lock = (state_folder(config) / f"{held}.held").open("ab")
        self.runtime = Runtime(config, address="embedded" if self.execution == "inline" else "")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_SH)  # waits while another one unloads it
            load(self.runtime, artifact, self.name, **{**asked.how, "settings": own})
        except BaseException:
            self.close()
            raise

    def ready(self) -> bool:
        """Return whether the runtime answers, and the model makes progress or has nothing to do."""
        with contextlib.suppress(LraiError):
            mine = [model for model in self.runtime.models() if model.name == self.name]
            return any(model.state in ("ok", "idle") for model in mine)
        return False

    def close(self) -> None:
        """Let go of the model; where nobody else holds it, it is unloaded."""
        with contextlib.suppress(BlockingIOError, LraiError):  # others do, or it is gone
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.runtime.unload(self.name)
        self.runtime.close()
        self._lock.close()


def execution_of(artifact: Artifact, settings: Settings) -> str:
    """Return how requests are answered where nothing is said.

    By what the model takes alone; several instances would each have a copy of it in their stubs.
    """
    if settings.execution != "auto":
        return settings.execution
    alone = settings.instances == 1 and settings.asked.free
    if alone and is_quick(artifact, settings.asked.variant):
        return "inline"
    return "sender" if settings.latency_slo_ms else "lists"


def source_of(folder: Path) -> Path:
    """Return the `model.onnx` or the `model.lrai/` of a version directory.

    Raises:
        ArtifactError: There is neither, or both.
    """
    found = [path for path in (folder / "model.onnx", folder / "model.lrai") if path.exists()]
    if len(found) != 1:
        what = "both model.onnx and model.lrai" if found else "neither model.onnx nor model.lrai"
        raise ArtifactError(f"version directory {folder.name} holds {what}, one is needed")
    return found[0]
