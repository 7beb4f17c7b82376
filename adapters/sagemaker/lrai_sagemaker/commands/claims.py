"""Whose models are, in a runtime and on a disk that outlive their container.

A lock on a file says that a container lives: its supervisor holds it, and so do its workers, which
go on for a moment without one that was killed. What nobody holds any more, the next container lets
go of. The file lies where those of single models do, see `lrai_import.held`: beside the runtime's
record, too, which may outlive all else, as on a volume, and has the next runtime load the models.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, Final

from lrai_core import Artifact, LraiError, ModelNotFound, Runtime
from lrai_import.held import folders

PREFIX: Final = "lrai-sagemaker-"
_SUFFIX: Final = ".models"
_OWN: Final = "own"  # in a folder; its lock says that a container uses that
_LATE_SECONDS: Final = 3600.0


def own(scratch: Path) -> BinaryIO:
    """Return what says that a container lives, for as long as it is open; forget those that do not.

    Raises:
        OSError: No file can be made.
    """
    mine = (scratch / f".{_OWN}").open("wb")  # so that nobody sees it before it is locked
    with suppress(OSError):  # no locks there, so that nobody finds it free either
        fcntl.flock(mine, fcntl.LOCK_EX)
    Path(mine.name).rename(scratch / _OWN)
    forget(scratch)
    return mine


def forget(scratch: Path) -> None:
    """Remove the folders beside `scratch` that nobody uses any more, with what was unpacked."""
    for own in scratch.parent.glob(f"{PREFIX}*/{_OWN}"):
        # Another user's is left to him.
        with suppress(OSError), own.open("rb+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else somebody does
            if os.path.samestat(os.fstat(lock.fileno()), own.stat()):  # else it is made anew
                gone = own.parent.rename(scratch / own.parent.name)  # who comes now makes another
                shutil.rmtree(gone, ignore_errors=True)


def together(artifact: Artifact, scratch: Path) -> tuple[Artifact, list[BinaryIO]]:
    """Return where containers of one tar have its model, and what says that this one uses it.

    A runtime that they share has it from one place, which has to outlive the container that came
    first. The folder that it was unpacked to, whose name has the tar's hash, is moved there, or
    stays where it is, with nothing that says so, if that cannot be done.
    """
    if not artifact.path.is_relative_to(scratch):  # it was in no tar
        return artifact, []
    inside = artifact.path.relative_to(scratch)
    mine = scratch / inside.parts[0]
    place = scratch.parent / f"{PREFIX}{mine.name}-{os.geteuid()}"
    with suppress(OSError, LraiError), ExitStack() as unless_there:
        lock, came = unless_there.enter_context(_used(place)), False
        with suppress(OSError):  # it is there
            mine.rename(place / mine.name)
            came = True
        # Not whole, perhaps, where who cleans up temporary folders has taken old files.
        there = Artifact.open(place / inside, verify=not came)
        shutil.rmtree(mine, ignore_errors=True)
        unless_there.pop_all()
        return there, [lock]
    return artifact, []


def _used(place: Path) -> BinaryIO:
    """Return a lock on a folder, which is made; not on one that was removed meanwhile."""
    while True:
        place.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError), ExitStack() as unless_used:
            if place.is_symlink() or place.stat().st_uid != os.geteuid():
                raise PermissionError(place)
            lock = unless_used.enter_context((place / _OWN).open("ab"))
            fcntl.flock(lock, fcntl.LOCK_SH)  # waits while another one removes it
            if os.path.samestat(os.fstat(lock.fileno()), (place / _OWN).stat()):
                unless_used.pop_all()
                return lock


def claim(runtime: Runtime, container: str) -> BinaryIO | None:
    """Return what says that the models of a container are its own, for as long as it is open.

    None where the runtime is another machine's, or no file can be made: then nobody takes them.
    """
    with suppress(OSError, ValueError):
        first, *others = folders(runtime.config)
        lock = (first / f".{container}").open("wb")  # so that nobody sees it before it is locked
        fcntl.flock(lock, fcntl.LOCK_EX)
        Path(lock.name).rename(first / f"{container}{_SUFFIX}")
        for place in others:
            with suppress(OSError):
                (place / f"{container}{_SUFFIX}").touch()
        return lock
    return None


def sweep(runtime: Runtime, scratch: Path) -> None:
    """Let go of the models of containers that are gone, and remove their folders beside `scratch`.

    For an hour, and not once: a load that was under way when its container ended ends later.

    Raises:
        LraiError: The runtime does not answer.
    """
    places = folders(runtime.config)
    for name in {path.name for place in places for path in place.glob(f"{PREFIX}*{_SUFFIX}")}:
        # What is no file, or another user's, is left to him.
        with suppress(OSError), (places[0] / name).open("ab", buffering=0) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else it lives
            if not lock.tell():
                lock.write(b"it has ended")  # at the time of this file
            whole = let_go(runtime, container := name.removesuffix(_SUFFIX))
            shutil.rmtree(scratch.with_name(container), ignore_errors=True)
            age = time.time() - os.fstat(lock.fileno()).st_mtime  # noqa: TID251 - of a file
            if whole and age > _LATE_SECONDS:
                for place in places:
                    (place / name).unlink(missing_ok=True)


def let_go(runtime: Runtime, container: str) -> bool:
    """Unload what a container has loaded; return whether nothing of it stays.

    Raises:
        LraiError: The runtime does not answer.
    """
    whole = True
    for model in runtime.deployments(save=False):  # those too that had to make room
        if model.name.endswith(f":{container.removeprefix(PREFIX)}"):  # see `Names.load`
            try:
                runtime.unload(model.name)
            except ModelNotFound:
                pass
            except LraiError:  # it is frozen, say
                whole = False
    return whole
