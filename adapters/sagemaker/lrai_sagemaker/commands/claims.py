"""Whose the models of a multi-model endpoint are, in a runtime that outlives their container.

A lock on a file says that a container lives: its supervisor holds it, and so do its workers, which
go on for a moment without one that was killed. What nobody holds any more, the next container lets
go of. The file lies where those of single models do, see `lrai_import.held`: beside the runtime's
record, too, which may outlive all else, as on a volume, and has the next runtime load the models.
"""

from __future__ import annotations

import fcntl
import shutil
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

from lrai_core import LraiError, ModelNotFound, Runtime
from lrai_import.held import folders

PREFIX: Final = "lrai-sagemaker-"
_SUFFIX: Final = ".models"


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

    Raises:
        LraiError: The runtime does not answer.
        OSError: The disk does not.
    """
    places = folders(runtime.config)
    for name in {path.name for place in places for path in place.glob(f"{PREFIX}*{_SUFFIX}")}:
        with suppress(BlockingIOError), (places[0] / name).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else it lives
            let_go(runtime, container := name.removesuffix(_SUFFIX))
            shutil.rmtree(scratch.with_name(container), ignore_errors=True)


def let_go(runtime: Runtime, container: str) -> None:
    """Unload what a container has loaded, and forget that it has, unless something stays.

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
    for place in folders(runtime.config) if whole else ():
        (place / f"{container}{_SUFFIX}").unlink(missing_ok=True)
