"""The names of a multi-model endpoint: which model of the runtime each stands for.

The runtime knows what is loaded, and unloads what was not used for longest where memory is short.
What it does not know, from which path a name came, is in a file per name that all workers read.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec

import lrai_core as lrai
from lrai_core.artifact import disk_errors
from lrai_import.hosted import load, warm_up
from lrai_sagemaker.models import artifact_in
from lrai_sagemaker.settings import Settings

_LONGEST: Final = 512
_AGED_SECONDS: Final = 3600.0  # by then what was still being loaded when it was given up is there


class AlreadyLoaded(lrai.RequestError):
    """The name is loaded already."""

    http_status = 409


class Named(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A name of the platform's.

    Attributes:
        url: The path that it was loaded from.
        key: What the runtime calls the model.
        signature: What the model takes and gives.
    """

    name: str
    url: str
    key: str
    signature: lrai.Signature


class Names:
    """The names of one endpoint, in all its workers; its methods block."""

    def __init__(self, settings: Settings, runtime: lrai.Runtime) -> None:
        self._settings, self._runtime = settings, runtime
        self._scratch, self._root = Path(settings.scratch), Path(settings.folder).resolve()

    def load(self, name: str, url: str) -> None:
        """Load the model at a path below the root under a name, and have it answer once.

        Raises:
            AlreadyLoaded: The name is.
            RequestError: No name, or a path that leaves the root, or leads nowhere.
            LraiError: The model cannot be loaded; 507 says that memory is short.
        """
        if not 0 < len(name) <= _LONGEST or not (name + url).isprintable():
            raise lrai.RequestError(f"names are 1 to {_LONGEST} long, and printable, as is url")
        place = Path(self._root, url).resolve()
        if not place.is_relative_to(self._root):
            raise lrai.RequestError("url leads out of the folder that models lie in")
        if not os.access(place, os.F_OK):  # nor where it is too long
            raise lrai.ModelNotFound("nothing lies at url")
        with disk_errors(self._scratch), self._changing(name):
            if any(name == loaded.name for loaded in self.loaded()):
                raise AlreadyLoaded(f"model {name!r} is loaded already")
            with suppress(lrai.ModelNotFound):  # it was given up, and another one may lie there
                self._runtime.unload(self.find(name).key)
            self._forget()
            artifact = artifact_in(place)
            # Two artifacts, or two containers, never meet under one name.
            key = f"{name}:{artifact.version}:{self._scratch.name.rpartition('-')[2]}"
            partial = self._file(name, ".partial")
            named = Named(name=name, url=url, key=key, signature=artifact.manifest.signature)
            # First: what comes late has to have a name. Of a full disk no part of one stays.
            try:
                partial.write_bytes(msgspec.json.encode(named))
                partial.rename(self._file(name, ".name"))
            finally:
                partial.unlink(missing_ok=True)
            load(self._runtime, artifact, key, require=self._settings.require)
            try:
                with suppress(lrai.QueueFull):  # it answers others
                    warm_up(self._runtime, key, named.signature)
            except lrai.LraiError as error:
                with suppress(lrai.ModelNotFound):
                    self._runtime.unload(key)
                self._file(name, ".name").unlink()
                if isinstance(error, lrai.ModelNotFound):  # whose words name other models
                    raise lrai.MemoryBudgetExceeded("another model took its room") from None
                raise

    def unload(self, name: str) -> None:
        """Unload a name, once what it has accepted is answered.

        Raises:
            ModelNotFound: It is not loaded.
        """
        with disk_errors(self._scratch), self._changing(name):
            try:  # first: who is told that it failed asks again
                self._runtime.unload(self.find(name).key, drain=True)
            except lrai.ModelNotFound:
                self._file(name, ".name").unlink(missing_ok=True)
                raise unknown(name) from None
            self._file(name, ".name").unlink()

    def find(self, name: str) -> Named:
        """Return what a name stands for; whether it is still in memory, the runtime says.

        Raises:
            ModelNotFound: It was not loaded, or is unloaded.
        """
        try:
            return msgspec.json.decode(self._file(name, ".name").read_bytes(), type=Named)
        except FileNotFoundError:
            raise unknown(name) from None

    def loaded(self) -> dict[Named, str]:
        """Return what is in memory, by name, and how it is.

        What was given up is not: it may be loaded again, and is no more in anybody's way than what
        was never there.
        """
        there = {one.name: one.state for one in self._runtime.models() if one.state != "dead"}
        return {named: there[named.key] for named in sorted(self._all()) if named.key in there}

    def unready(self) -> str:
        """Return why the endpoint cannot answer, nothing if it can: a model at work, or none."""
        states = set(self.loaded().values())
        return "" if not states or {"ok", "idle"} & states else "all models are stalled"

    def _all(self) -> Iterator[Named]:
        for file in self._scratch.glob("*.name"):
            with suppress(FileNotFoundError):  # it has just been unloaded
                yield msgspec.json.decode(file.read_bytes(), type=Named)

    def _forget(self) -> None:
        """Forget names whose models were unloaded to make room, a while after they were loaded."""
        there = {one.name for one in self._runtime.deployments(save=False)}  # or will be again
        for named in self._all():
            file = self._file(named.name, ".name")
            with suppress(OSError), self._changing(named.name, fcntl.LOCK_NB):
                age = time.time() - file.stat().st_mtime  # noqa: TID251 - of a file
                if named.key not in there and age > _AGED_SECONDS:
                    file.unlink()

    def _file(self, name: str, suffix: str) -> Path:
        return self._scratch / (sha256(name.encode(errors="surrogatepass")).hexdigest() + suffix)

    @contextmanager
    def _changing(self, name: str, more: int = 0) -> Iterator[None]:
        # Of many names, so that there are not as many of these.
        with self._scratch.joinpath(self._file(name, ".lock").name[-8:]).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | more)
            yield


def unknown(name: str) -> lrai.ModelNotFound:
    """Return the error for a name that stands for nothing in memory."""
    return lrai.ModelNotFound(f"model {name[:120]!r} is not loaded")
