"""What outlives a runtime: who serves under which name, what is frozen, and who changed what."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from lrai_core import EnvironmentProblem, UsageError
from lrai_core.artifact import disk_errors
from lrai_core.runtime.version import Freeze
from lrai_deployments.traffic import replaced

_MOST_BEFORE: Final = 32  # versions that are known to have served


Said = Mapping[str, Any] | None


class How(msgspec.Struct, frozen=True):
    """How a version was loaded, so that it can be loaded again."""

    variant: str = ""
    require: Said = None
    settings: Said = None
    version: str = ""  # once it is loaded, and where from
    artifact: str = ""
    named: str = ""  # what was said for it, which may lead elsewhere by now

    def but(self, named: str, variant: str, require: Said, settings: Said) -> How:
        """Return how another version is loaded in its place: what is not said stays as it is."""
        require = self.require if require is None else require
        settings = self.settings if settings is None else settings
        return How(variant, require, settings, named=str(Path(named).absolute()))


class Record(msgspec.Struct, frozen=True):
    """What is kept of a name. `shares` has every version, those without a share too."""

    versions: dict[str, How] = {}
    shares: dict[str, float] = {}
    shadow: dict[str, float] = {}
    relief: str = ""
    previous: How = How()
    frozen: Freeze | None = None
    alone: str = ""  # the version that had all requests before others got a share
    before: tuple[str, ...] = ()  # what was `previous` earlier
    away: bool = False  # it had to make room, and serves again for who loads what served here
    left: bool = False  # `previous` was, by a rollback, and does not come back by itself

    @property
    def sharing(self) -> list[str]:
        """Return the versions that have a share."""
        return [version for version, share in self.shares.items() if share]

    @property
    def stable(self) -> str:
        """Return the version with the largest share."""
        return max(self.shares, key=self.shares.__getitem__)

    @property
    def serves(self) -> bool:
        """Return whether somebody answers, unless nobody is there at all."""
        return any(self.shares.values()) or not self.versions

    def serving(self, version: str) -> How | None:
        """Return how an artifact's version was loaded that has a share, gets copies or relieves."""
        serves = {*self.sharing, *self.shadow, self.relief}
        shared = [how for label, how in self.versions.items() if label in serves]
        return next((how for how in shared if how.version.partition("-")[0] == version), None)

    def was(self, version: str) -> bool:
        """Return whether an artifact's version is one that served before."""
        labels = (*self.before, self.previous.version)
        return version in {label.partition("-")[0] for label in labels}

    def follows(self, record: Record) -> Record:
        """Return the record, which comes after another one whose stable version goes."""
        before = tuple(filter(None, (*record.before, record.previous.version)))[-_MOST_BEFORE:]
        return replace(self, previous=record.versions[record.stable], before=before, left=False)

    def beside(self, how: How, share: float) -> Record:
        """Return the record with another version, whose share the others give up in proportion."""
        others = self.without(how.version).shares  # it may be there, and not run
        shares = {label: own * (1 - share) for label, own in others.items()}
        versions = self.versions | {how.version: how}
        new = self._with(versions=versions, shares=shares | {how.version: share})
        return new.follows(self) if self.versions and new.stable != self.stable else new

    def _with(self, **changes: Any) -> Record:
        """Return the record with other shares, which takes note of who had all of them."""
        before, new = self.sharing, replace(self, **changes)
        alone = before[0] if len(before) == 1 else self.alone
        return replace(new, alone=alone if len(new.sharing) > 1 else "")

    def again(self, loaded: How) -> Record:
        """Return the record once a version serves again as it served, from where it lies now."""
        return replace(self, versions=self.versions | {loaded.version: loaded}, away=False)

    def without(self, *labels: str) -> Record:
        """Return the record without versions, whose shares the others take in proportion."""
        left = {known: share for known, share in self.shares.items() if known not in labels}
        total = sum(left.values()) or 1.0
        return self._with(
            versions={known: self.versions[known] for known in left},
            shares={known: share / total for known, share in left.items()},
            shadow={known: share for known, share in self.shadow.items() if known in left},
            relief=self.relief if self.relief in left else "",
        )

    def shared_out(
        self, shares: dict[str, float], shadow: dict[str, float] | None = None, relief: str = ""
    ) -> Record:
        """Return the record with these shares; another stable version is one to go back from."""
        shares = dict.fromkeys(self.versions, 0.0) | shares
        new = self._with(shares=shares, shadow=shadow or {}, relief=relief)
        return new if new.stable == self.stable else new.follows(self)


_FILE: Final = "deployments.json"


class _File(msgspec.Struct, frozen=True):
    stopped: bool  # nothing was left loaded
    deployments: dict[str, Record]


class Store:
    """`deployments.json` and `audit.jsonl` in a folder; without a folder nothing is kept."""

    def __init__(self, folder: str) -> None:
        """Take the folder, which serves one runtime at a time.

        Raises:
            EnvironmentProblem: Another one has it, or it cannot be written.
        """
        self.lock = threading.Lock()  # held while what is written changes
        self._folder = Path(folder) if folder else None
        if self._folder is None:
            return
        with disk_errors(self._folder):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # A file of its own: the log may be rotated.
            self._held = os.open(self._folder / "state.lock", os.O_CREAT | os.O_WRONLY, 0o600)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._held)
            why = "holds the state of another runtime; set runtime.state_dir"
            raise EnvironmentProblem(f"{folder} {why}") from None

    def read(self) -> tuple[dict[str, Record], bool]:
        """Return what was kept, and whether the runtime that kept it came to its end."""
        if self._folder is None or not (path := self._folder / _FILE).exists():
            return {}, True
        try:
            if not path.is_file():
                raise OSError("it is no file")  # whoever opens a pipe waits for who writes to it
            kept = msgspec.json.decode(path.read_bytes(), type=_File)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            aside = path.replace(path.with_suffix(".corrupt"))
            problem = f"{path} cannot be read ({error}): starting without it; it is now {aside}"
            logging.getLogger(__name__).warning(problem)
            return {}, True
        return kept.deployments, kept.stopped

    def write(self, deployments: dict[str, Record], *, stopped: bool = False) -> None:
        """Keep this in place of what was kept, whole or not at all."""
        if self._folder is not None:
            if stopped and not deployments:  # no file says the same, if there is no room for one
                (self._folder / _FILE).unlink(missing_ok=True)
            with disk_errors(self._folder / _FILE), replaced(self._folder / _FILE) as stream:
                content = msgspec.json.encode(_File(stopped, deployments))
                try:  # what nobody could read would cost all names
                    msgspec.json.decode(content, type=_File)
                except msgspec.ValidationError as error:
                    raise UsageError(f"an argument is none that can be kept: {error}") from None
                stream.write(content)

    def note(self, **line: Any) -> None:
        """Append a line about a change."""
        if self._folder is not None:
            path = self._folder / "audit.jsonl"
            encoded = msgspec.json.encode({"when": now()} | line)
            if path.is_fifo() or path.is_socket():  # what is full would hold up all names
                raise EnvironmentProblem(f"{path}: cannot be written: it is no file")
            with disk_errors(path), open(path, "a+b", opener=_opened) as log:
                log.seek(max(0, log.tell() - 1))
                cut = log.read(1) not in (b"", b"\n")  # the last line, by a full disk or a kill
                log.write(b"\n" * cut + encoded + b"\n")

    def close(self) -> None:
        """Leave the folder to the next one."""
        if self._folder is not None:
            fcntl.flock(self._held, fcntl.LOCK_UN)  # a fork's copy of it would go on holding it
            os.close(self._held)


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def now() -> str:
    """Return the time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
