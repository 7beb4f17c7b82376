"""A model in a runtime, for as long as some process of this user serves it.

All workers of a server, and all servers of one artifact, find it loaded. A lock on a file says who
holds it, so that a worker that was killed does not; what nobody holds is unloaded by whoever comes
or goes next, and with the runtime at the latest.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

from lrai_core import Artifact, LraiConfig, LraiError, Runtime
from lrai_import.hosted import Asked


class Held:
    """One artifact in a runtime.

    Attributes:
        name: Under which the runtime knows it.
        runtime: That serves it.
        variant: That answers; another one than was asked for where that is for other machines.
    """

    def __init__(self, artifact: Artifact, settings: Asked) -> None:
        """Load it, or find it loaded with the same settings.

        Raises:
            LraiError: It cannot be served as the settings demand.
        """
        asked = json.dumps([settings.own, settings.require, settings.variant], sort_keys=True)
        self.name = f"{artifact.manifest.name}:{artifact.version}-{_digest(asked)[:8]}"
        self.runtime = Runtime(settings.config)
        self._locks = lock_folder(settings.config)
        self._lock: BinaryIO | None = None
        try:
            if self._locks is not None:
                file = self._locks / f"{_digest(self.name)[:32]}.held"
                self._lock = file.open("ab")
                fcntl.flock(self._lock, fcntl.LOCK_SH)  # waits while another one unloads it
                file.write_text(self.name, encoding="utf-8")
            self.runtime.load(artifact, name=self.name, **settings.how)
            served = [m.variant for m in self.runtime.models() if m.name == self.name]
            self.variant = served[0] if served else artifact.manifest.chosen
            self._sweep()
        except BaseException:
            self.close()
            raise

    def state(self) -> str:
        """Return the model's state: `ok`, `idle`, `stalled`, `dead`; `dead` too if it is gone.

        Raises:
            NotReady: The runtime does not answer.
        """
        states = [model.state for model in self.runtime.models() if model.name == self.name]
        return states[0] if states else "dead"

    def close(self) -> None:
        """Let go of the model; where nobody else holds it, it is unloaded."""
        if self._lock is not None:
            self._lock.close()
        self._sweep()
        self.runtime.close()

    def _sweep(self) -> None:
        """Unload what nobody holds any more: a server that SIGTERM ends does not get to it."""
        for path in self._locks.glob("*.held") if self._locks else ():
            with path.open("r+b") as lock, contextlib.suppress(BlockingIOError, LraiError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if name := lock.read().decode("utf-8", "replace"):
                    lock.truncate(0)
                    self.runtime.unload(name)


def lock_folder(config: LraiConfig) -> Path | None:
    """Return the folder of locks beside a shared runtime of this machine; None for any other.

    The runtime has made the folder that it lies in, which is this user's alone.
    """
    address = config.runtime.address
    if address == "embedded" or "://" in address:
        return None
    own = Path(config.runtime.socket_dir or tempfile.gettempdir(), f"lrai-{os.geteuid()}")
    folder = (own if address == "auto" else Path(address)) / "mlflow"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
