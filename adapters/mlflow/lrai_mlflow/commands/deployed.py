"""What is kept of the deployments of a runtime: artifacts, and which columns their models take.

Both lie in the runtime's own state, so that they last as long as the deployments do. Of a runtime
of another machine nothing is kept: what can be seen of it here is read where it lies.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlparse

from mlflow.exceptions import MlflowException
from mlflow.tracking.artifact_utils import _download_artifact_from_uri

import lrai_core as lrai
from lrai_core.artifact import sync, writing
from lrai_import.held import lock_folder
from lrai_mlflow.commands.facts import saved_model

_SCHEMES: Final = ("", "file", "models", "runs", "mlflow-artifacts", "s3", "gs", "wasbs", "abfss")
_READ: Final = ", ".join(f"{name}:" for name in _SCHEMES if name)
_MOST_SAID: Final = 32  # versions of a deployment of which it is kept what they take


class Deployed:
    """The deployments of one runtime, and what is kept of them on this machine."""

    def __init__(self, runtime: lrai.Runtime) -> None:
        self._runtime = runtime

    def found(self) -> dict[str, Any]:
        """Return the deployments by name; models that hosts hold are not among them."""
        # Nobody here reads what it would write; what is away for room, create loads again.
        here = [one for one in self._runtime.deployments(save=False) if one.shares and not one.away]
        return {one.name: one for one in here if ":" not in one.name}

    def versions(self, name: str) -> set[str]:
        """Return the artifacts of a deployment's versions, none where it is none."""
        found = self.found().get(name)
        return set(map(artifact_of, found.shares)) if found else set()

    def keep(self, model_uri: str) -> tuple[lrai.Artifact, dict[str, Any]]:
        """Return the artifact of a model, copied to where it stays, and what else it says.

        Raises:
            UsageError: The address is of no kind that is read here.
        """
        scheme = urlparse(str(model_uri)).scheme
        if scheme not in _SCHEMES:
            raise lrai.UsageError(f"{scheme[:40]}: is not read here; a path is, and {_READ}")
        if self.copies is None:  # the runtime of another machine
            return saved_model(_download_artifact_from_uri(str(model_uri)))
        with tempfile.TemporaryDirectory(prefix="lrai-deploy-") as scratch:
            model = _download_artifact_from_uri(str(model_uri), output_path=scratch)
            artifact, said = saved_model(model)
            kept = self.copies / f"{artifact.version}.lrai"
            self.copies.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                lrai.Artifact.open(kept)
            except lrai.ArtifactError:  # none is there; or, in a temporary folder, a part is gone
                shutil.rmtree(kept, ignore_errors=True)
                try:
                    with writing(kept) as partial:  # whole on the disk before the runtime knows it
                        shutil.copytree(artifact.path, partial, dirs_exist_ok=True)
                except shutil.Error as error:  # of each file that it could not copy
                    why = f"{artifact.path} cannot be copied: {error.args[0][0][2]}"
                    raise lrai.EnvironmentProblem(why) from None
            issued = artifact.path / "certificates"  # of which there may be more by now
            if issued.is_dir():
                shutil.copytree(issued, kept / issued.name, dirs_exist_ok=True)
        return lrai.Artifact.open(kept), said

    def said(self, name: str) -> dict[str, Any]:
        """Return what is known of a deployment's models, by version, the latest last."""
        if self.copies is None:
            return self._seen(name)
        file = self._file(name, self.copies)
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    def _seen(self, name: str) -> dict[str, Any]:
        """Return the same of what another machine serves, if it lies there where it lies here."""
        if found := self.found().get(name):
            # It may not, by now.
            with contextlib.suppress(lrai.LraiError, MlflowException, OSError):
                artifact, said = saved_model(str(Path(found.artifact).parent), verify=False)
                if artifact.version in map(artifact_of, found.shares):
                    return {artifact.version: said}
        return {}

    @contextlib.contextmanager
    def saying(self, name: str, version: str, said: Mapping[str, Any]) -> Iterator[None]:
        """Keep what is known of a version's model, if the block has it serve."""
        before, served = self.said(name), self.versions(name)
        latest = next(reversed(before.values()), None)
        # What others have put in the place of a version takes what that took, whatever comes later.
        pinned = dict.fromkeys(served - before.keys(), latest) if latest else {}
        before = pinned | before
        self._write(name, {version: said} | before)  # what serves already is what it was
        try:
            yield
        except BaseException:
            came = set[str]()
            with contextlib.suppress(lrai.LraiError):  # it may serve all the same
                came = self.versions(name) - served
            self._write(name, before | {version: said} if version in came else before)
            raise
        rest = {one: known for one, known in before.items() if one != version}
        self._write(name, dict([*rest.items(), (version, said)][-_MOST_SAID:]))

    def _file(self, name: str, copies: Path) -> Path:
        """Return where it is kept what a deployment's models take: in the runtime's own state."""
        one = self.found().get(name)
        place = self._place(Path(one.traffic).parents[1]) if one and one.traffic else copies
        return place / f"{_digest(name)}.said"

    def _write(self, name: str, said: Mapping[str, Any]) -> None:
        if self.copies is not None:
            file = self._file(name, self.copies)
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            written = file.with_suffix(".new")
            written.write_text(json.dumps(said), encoding="utf-8")
            sync(written)  # else a power cut may leave an empty one
            written.replace(file)  # which others may be reading

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the copies: what somebody is loading, the runtime does not list yet."""
        with contextlib.ExitStack() as stack:
            if self._locks is not None:
                lock = stack.enter_context((self._locks / "deployed.lock").open("ab"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @cached_property
    def _locks(self) -> Path | None:
        return lock_folder(self._runtime.config)  # the runtime has made it; None: another machine's

    @cached_property
    def copies(self) -> Path | None:
        """Where artifacts are kept; None where the runtime is another machine's."""
        if self._locks is None:
            return None
        state = self._runtime.config.runtime.state_dir
        return self._place(Path(state).absolute() if state else self._locks.parent)

    def _place(self, state: Path) -> Path:
        """Return the folder of this runtime's deployments in a state folder."""
        return state / "deployed" / _digest(str(self._locks))[:8]

    def forget(self) -> None:
        """Remove the copies that no deployment serves, or could go back to."""
        found = self._runtime.deployments(save=False)
        needed = {artifact_of(version) for one in found for version in (*one.shares, one.previous)}
        names = {_digest(one.name) for one in found}
        states = {Path(one.traffic).parents[1] for one in found if one.traffic}
        places = {self.copies, *map(self._place, states)} if self.copies else set[Path]()
        for kept in [path for place in places for path in place.glob("*")]:
            # A part is of a copy that was cut off: this is done `alone`.
            part = kept.match(".*.lrai.*") or kept.suffix == ".partial"  # as they were once called
            if part or (kept.suffix == ".lrai" and kept.stem not in needed):
                shutil.rmtree(kept)
            elif kept.suffix == ".said" and kept.stem not in names:
                kept.unlink()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]


def artifact_of(label: str) -> str:
    """Return the artifact of a version, which has a number behind it where that is loaded twice."""
    return label.partition("-")[0]
