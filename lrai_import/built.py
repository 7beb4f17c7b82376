"""A model that a host points at, as an artifact; what an ONNX file needs is built once."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, Final

from lrai_core import Artifact, ArtifactError, EnvironmentProblem, LraiConfig
from lrai_core.engine.engine import installed_version, isa_class

_log: Final = logging.getLogger("lrai.hosted")
_BUILD_SECONDS: Final = 900
_END_SECONDS: Final = 30


def artifact_of(source: Path, config: LraiConfig) -> Artifact:
    """Return the artifact that `source` is, or that is built from it: fp32, kept by its content.

    Raises:
        ArtifactError: It cannot be used, or not be built.
        EnvironmentProblem: There is no place for what is built.
    """
    if source.is_dir():
        return Artifact.open(source, verify=False)  # the actor hashes what it opens
    key = _key(source)
    built = state_folder(config) / f"{key}.lrai"
    with locked(built.with_suffix(".lock"), fcntl.LOCK_EX) as lock:  # of several one builds
        with contextlib.suppress(ArtifactError):
            return Artifact.open(built, verify=False)
        # What is left where files go by their age, and of a build that was killed.
        for left in (built, *built.parent.glob(f".{built.name}.*")):
            shutil.rmtree(left, ignore_errors=True)
        _build(source, built, lock.fileno())
        if _key(source) != key:  # it is not kept as what it is not
            shutil.rmtree(built)
            raise ArtifactError(f"{source.name} changed while it was built")
        return Artifact.open(built, verify=False)


def state_folder(config: LraiConfig) -> Path:
    """Return the folder of what outlives a host's process, made if it is not there.

    Raises:
        EnvironmentProblem: It cannot be made, or is not this user's alone.
    """
    try:
        parent = config.runtime.state_dir or config.runtime.socket_dir or tempfile.gettempdir()
        state = Path(config.runtime.state_dir or Path(parent, f"lrai-{os.geteuid()}"))
        folder = state / "built"
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        above = state.stat() if config.runtime.state_dir else state.lstat()  # a link may be moved
        # One that is not configured lies where anybody may have made it, who could exchange it.
        own = stat.S_ISDIR(above.st_mode) and above.st_uid == os.geteuid()
        mine = own and not above.st_mode & 0o022
        if not (config.runtime.state_dir or mine):
            raise EnvironmentProblem("the folder of runtime.state_dir has to be this user's alone")
        with locked(state / "built.lock", fcntl.LOCK_EX):
            now = folder.lstat() if folder.exists() else None
            ours = now and stat.S_ISDIR(now.st_mode) and now.st_uid == os.geteuid()
            if now and ours and now.st_mode & 0o022:
                _log.warning("others could write to the folder built: it is made anew")  # fsGroup
                shutil.rmtree(folder)
            elif now and ours:
                folder.chmod(0o700)
            folder.mkdir(mode=0o700, exist_ok=True)
        made = folder.lstat()
    except OSError as error:
        why = f"no folder for state, runtime.state_dir: {error.strerror}"
        raise EnvironmentProblem(why) from None
    alone = made.st_uid == os.geteuid() and not made.st_mode & 0o077
    if not stat.S_ISDIR(made.st_mode) or not alone:
        why = "the folder built in runtime.state_dir has to be this user's alone"
        raise EnvironmentProblem(why)
    return folder


@contextlib.contextmanager
def locked(path: Path, how: int) -> Iterator[BinaryIO]:
    """Hold a lock on a file, which is made; a process that dies lets go of it."""
    with path.open("ab") as file:
        fcntl.flock(file, how)
        yield file


def _key(source: Path) -> str:
    """Return a name for what is built here from a model file: its bytes, and those beside it."""
    made_for = f"{version('lrai')} {isa_class()} {installed_version('onnxruntime')}"
    digest = hashlib.sha256(made_for.encode())
    beside = sorted(set(source.parent.rglob("*")) - {source})  # weights in files of their own
    for path in (source, *beside):
        if path.is_file():  # by its content: there are folders in which all times are the same
            digest.update(path.name.encode() * (path != source))
            try:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                if path == source:
                    raise ArtifactError(f"{path.name}: {error.strerror}") from None
    return digest.hexdigest()[:32]


def _build(source: Path, built: Path, lock: int) -> None:
    """Build in another process, which holds the lock too: it may outlive this one."""
    program = "import sys; from lrai_core.cli import main; sys.exit(main())"
    command = [sys.executable, "-P", "-c", program, "compile", str(source)]
    child = subprocess.Popen(
        [*command, "--output", str(built)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        pass_fds=(lock,),
    )
    try:
        told, complained = child.communicate(timeout=_BUILD_SECONDS)
    except BaseException as error:
        child.terminate()  # then it leaves nothing
        try:
            child.communicate(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise ArtifactError(f"{source.name} was not built in {_BUILD_SECONDS} s") from None
    if child.returncode:
        said = (complained.strip() or told.strip() or "it said nothing").splitlines()[-1]
        raise ArtifactError(f"{source.name} cannot be used: {said[:300]}")
