"""Names as they are written down: what serves them outlives who serves it.

Every change is written to disk before it is made, and made at once: a request sees the deployment
as it was or as it will be. Whatever fails on the way leaves it as it was.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final

from msgspec.structs import replace

import lrai_core as lrai
from lrai_core.runtime.version import Freeze, Version
from lrai_deployments.routing import Route
from lrai_deployments.running import Running
from lrai_deployments.state import How, Record, Store, now
from lrai_deployments.traffic import forget_aged

_log = logging.getLogger(__name__)
_OPENED: Final = 64  # names at a time that were served before
LOST: Final = (lrai.ArtifactError, lrai.ConditionNotMet, lrai.UsageError, TypeError)  # for good


class Kept(Running):
    """An embedded runtime whose names and versions are kept, and restored; thread-safe."""

    keeps = False  # at its end, what it serves for the next one, as if it had been killed
    _ended = False  # what is kept stays as it is

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """See `Embedded`."""
        try:
            super().__init__(*arguments, **options)
        except BaseException as error:
            with suppress(AttributeError):  # it did not come so far
                self._store.close()
                self._pool.close()  # who collects an open socket may wait for ever
            if isinstance(error, RuntimeError):  # there may be no more threads now
                raise lrai.OutOfResources(str(error)) from None
            raise

    def begin(self) -> None:
        """See `Embedded.begin`. Of what was kept, take over what is frozen."""
        super().begin()
        self._store = Store(self.config.runtime.state_dir)
        self._fell: dict[str, float] = {}  # names that fell back, and until when they do not again
        self._kept, self._stopped = self._store.read()
        forget_aged(self.config.runtime, self._kept, halves=True)
        self._records = {name: record for name, record in self._kept.items() if record.frozen}

    def restore(self, ending: Callable[[], bool] = bool) -> None:
        """Serve again what was served when the runtime before this one was killed.

        `ending`: whether it is to end; what has not begun by then is not started.
        """
        if self._stopped:
            return
        self._records = dict(self._kept)  # all: whoever is killed at it leaves the rest to the next
        # Few start at once, see `_room`; one whose folder does not answer stands in nobody's way.
        with ThreadPoolExecutor(max(1, min(_OPENED, len(self._kept)))) as threads:
            for _ in threads.map(partial(self._restore, ending), self._kept.items()):
                pass

    def _restore(self, ending: Callable[[], bool], kept_as: tuple[str, Record]) -> None:
        name, kept = kept_as
        with self.changing(name, wait=True):  # who starts beside it has so many CPUs less
            known = self._records.get(name)
            if known is kept and not (kept.away or self._served(name)):  # nobody was quicker
                self._restore_name(ending, name, kept)

    def _restore_name(self, ending: Callable[[], bool], name: str, kept: Record) -> None:
        record, missing = kept, False
        for label, how in kept.versions.items():
            if ending():
                return
            try:
                with self._started(name, self._reopen(how), how, label):
                    pass
            # Whoever needs it is told, too; a mount that is gone has errors of its own.
            except (lrai.LraiError, TypeError, OSError) as error:
                self.events.emit("deployment_changed", name, change="lost", reason=str(error))
                _log.warning("%s: version %s is not served again: %s", name, label, error)
                lost = isinstance(error, LOST) and not kept.frozen  # which stays as it is
                missing = missing or not lost
                if lost:
                    record = record.without(label)
        if missing:  # for now: its share is kept for it, and others answer meanwhile
            self._apply_what_runs(name, record)
            return
        if not record.serves:  # what had no share is not switched to
            record = record.without(*record.versions)
            for version in self._served(name):
                self.remove(version)
        if record.versions or not record.frozen:
            try:
                self._commit(name, record, "restore")
            except (lrai.EnvironmentProblem, OSError):  # a full disk; it is right but for this
                with self._store.lock:
                    self._apply(name, record)

    @contextmanager
    def changing(self, name: str, *, wait: bool = False) -> Iterator[None]:
        """Hold a name while it is being changed.

        Raises:
            UsageError: Another thread is at it, and `wait` is not set.
        """
        if self._closed or os.getpid() != self._owner:
            raise lrai.NotReady("the runtime is closed, or another process's")
        with self._condition:
            while wait and name in self._changing:
                self._condition.wait()
            if name in self._changing:
                raise lrai.UsageError(f"another change of {name[:120]!r} is under way")
            self._changing.add(name)
        try:
            yield
        finally:
            with self._condition:
                self._changing.discard(name)
                self._leaving.discard(name)
                self._condition.notify_all()

    @contextmanager
    def _changed(self, name: str, *, wait: bool = False) -> Iterator[tuple[str, Record]]:
        """Hold a name that is loaded and may be changed; yield it and its record."""
        name = self.find(name).name
        with self.changing(name, wait=wait):
            self.find(name)  # it may be gone by now
            yield name, self._free(name)

    def close(self) -> None:
        """See `Runtime.close`. What is loaded is forgotten, what is frozen is not."""
        if self._closed or os.getpid() != self._owner:
            return
        for watching in list(self._watches.values()):
            watching.save()
        with self._store.lock:  # what is under way is written before this, or not at all
            self._ended = True
            if self.scheduler.thread.is_alive() and not self.keeps:  # else who comes next serves on
                frozen = {name: record for name, record in self._records.items() if record.frozen}
                with suppress(lrai.LraiError, OSError):
                    self._store.write(frozen, stopped=True)
        super().close()
        for here in list(self._here.values()):
            here.close()
        self._worker.shutdown(cancel_futures=True)
        self._changers.shutdown(wait=False, cancel_futures=True)  # one may be where nobody answers
        with self._store.lock:
            self._store.close()

    def give_up(self, route: Route, version: Version, why: str) -> None:
        """Take all requests from a canary, and have it stay so."""
        with self._store.lock:
            if self._routes.get(version.name) is not route:
                return  # it was judged beside others than those that serve now
            del self._routes[version.name]  # at once; the rest may have to wait
        self.submit(self._take_back, version, why, waits=True)

    def _take_back(self, version: Version, why: str) -> None:
        name, label = version.name, version.version
        with suppress(lrai.LraiError), self.changing(name, wait=True):
            record = self._records.get(name, Record())
            if name in self._routes or label not in record.sharing or record.stable == label:
                return  # what was under way has changed who serves
            by, left = "canary guard", record.without(label)
            # Another version gets copies, or relieves, as before.
            back = record.shared_out({record.stable: 1.0}, left.shadow, left.relief)
            back = replace(back, frozen=record.frozen or freeze_of(by, why))
            _log.warning("%s: %s", name, why)
            try:
                self._commit(name, back, "canary_failed", by, why)
            except (lrai.LraiError, OSError) as error:  # a full disk: so until the end, and said
                _log.warning("%s: that is not kept: %s", name, error)
                with self._store.lock:
                    self._records = self._records | {name: back}
                    self._apply(name, back)

    def may_go(self, version: Version) -> bool:
        """See `Running.may_go`. One that is frozen may not, and none that shares the requests."""
        record = self._records.get(version.name, Record())
        shares = version.version in record.sharing and len(record.sharing) > 1
        return record.frozen is None and not shares and super().may_go(version)

    def evict(self, version: Version) -> bool:
        """See `Running.evict`."""
        with suppress(lrai.LraiError), self._changed(version.name) as (name, record):
            left = record.without(version.version)
            others = [one for one in self._served(name) if one is not version]
            if not others:  # what does not run goes with the last that does; not what it replaced
                alone = record.without(*record.versions.keys() - {version.version})
                left = replace(alone, away=True) if record.previous.version else Record()
            serves = not (others and record.shares.get(version.version))
            if serves and version.retire(idle=True):
                try:
                    self._commit(name, left, "unload", why="runtime.memory_mib")
                except BaseException:
                    version.retire(retired=False)  # it serves on
                    raise
                self.remove(version)
                return True
        return False  # it is at work, being changed, or frozen

    def _reopen(self, how: How) -> lrai.Artifact:
        try:
            artifact = self.open(how.artifact)
        except lrai.ArtifactError:  # it is gone; the same may lie where a link leads to by now
            artifact = self.open(how.named or how.artifact)
        if artifact.version != how.version.partition("-")[0]:
            raise lrai.ConditionNotMet(f"{artifact.path} no longer holds {how.version}")
        return artifact

    def _free(self, name: str) -> Record:
        """Return the record of a name, empty where there is none.

        Raises:
            ConditionNotMet: It is frozen.
        """
        record = self._records.get(name, Record())
        if frozen := record.frozen:
            said = f"by {frozen.by} at {frozen.since}: {frozen.reason}"
            thaw = "`lrai unfreeze` lets it be changed"
            raise lrai.ConditionNotMet(f"model {name!r} was frozen {said}; {thaw}")
        return record

    def _commit(self, name: str, record: Record, what: str, by: str = "", why: str = "") -> None:
        """Write a change down, make it, and tell of it."""
        by = by or f"uid {os.geteuid()}"  # who may have no name
        with self._store.lock:
            if self._ended:  # the next runtime may have the folder
                raise lrai.NotReady("the runtime is closed")
            records = {**self._records, name: record}
            if not record.versions:
                del records[name]
            self._store.write(records)
            try:
                self._store.note(change=what, model=name, by=by, reason=why, shares=record.shares)
            except (lrai.EnvironmentProblem, OSError):  # no descriptor is left, say
                with suppress(lrai.EnvironmentProblem, OSError):
                    self._store.write(self._records)  # what is not told of is not done
                raise
            self._records = records
            if record.away or not record.versions:
                self._leaving.add(name)
            self._apply(name, record)
        self.events.emit("deployment_changed", name, change=what, by=by, reason=why)

    def _apply(self, name: str, record: Record) -> None:
        """Have requests go where the record says."""
        there = self._served(name)
        shares = {v: share for v in there if (share := record.shares.get(v.version))}
        for version in there:  # what warms it up, and copies, are not its traffic
            watching = self._watches.get(version.key) if version in shares else None
            version.watch = watching.see if watching else None
        shadow = {v: share for v in there if (share := record.shadow.get(v.version))}
        if shares:
            self.current[name] = max(shares, key=shares.__getitem__)
        relief = next((v for v in there if v.version == record.relief), None)
        if shares and (len(shares) > 1 or shadow or relief):
            slo_ms = self._limits(record.versions[record.stable]).latency_slo_ms
            self._routes[name] = Route(self, shares, shadow, relief, slo_ms)
        else:
            self._routes.pop(name, None)

    def _apply_what_runs(self, name: str, record: Record) -> None:
        """Have requests go where the record says, though not all of it runs.

        Where nobody has a share who runs, nobody stays loaded: who loads it then starts anew.
        """
        with self._store.lock:
            self._apply(name, record)
        there = self._served(name)
        if not any(record.shares.get(version.version) for version in there):
            for version in there:
                self.remove(version, drain=False)


def freeze_of(by: str, reason: str) -> Freeze:
    """Return a freeze of now.

    Raises:
        UsageError: One of the two is blank.
    """
    if not by.strip() or not reason.strip():
        raise lrai.UsageError("a name and a reason are needed")
    return Freeze(by, reason, now())
