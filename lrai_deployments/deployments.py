"""Names, their versions and the share of each: what may change about who serves, and how.

Every change is written to disk before it is made, and made at once: a request sees the deployment
as it was or as it will be. Whatever fails on the way leaves it as it was.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Annotated, Any, Final

import msgspec
from msgspec.structs import replace

import lrai_core as lrai
from lrai_core.runtime.embedded import Terms
from lrai_core.runtime.version import Deployment, Freeze, Version
from lrai_deployments.routing import Route
from lrai_deployments.running import Running
from lrai_deployments.state import How, Record, Store, now
from lrai_deployments.traffic import forget_aged
from lrai_deployments.warmup import warm_up

_log = logging.getLogger(__name__)
_OPENED: Final = 64  # names at a time that were served before
_LOST: Final = (lrai.ArtifactError, lrai.ConditionNotMet, lrai.UsageError, TypeError)  # for good
_SHARES: Final = dict[str, Annotated[float, msgspec.Meta(ge=0, le=1)]]


class Deployments(Running):
    """An embedded runtime whose names have versions; thread-safe."""

    keeps = False  # at its end, what it serves for the next one, as if it had been killed

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """See `Embedded`."""
        try:
            super().__init__(*arguments, **options)
        except BaseException:
            with suppress(AttributeError):  # it did not come so far
                self._store.close()
            raise

    def begin(self) -> None:
        """See `Embedded.begin`. Of what was kept, take over what is frozen."""
        super().begin()
        self._store = Store(self.config.runtime.state_dir)
        forget_aged(self.config.runtime, halves=True)
        self._kept, self._stopped = self._store.read()
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
            if self._records.get(name) is kept and not self._served(name):  # nobody was quicker
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
                lost = isinstance(error, _LOST) and not kept.frozen  # which stays as it is
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
                self._condition.notify_all()

    def _is_served(
        self, known: Version, artifact: lrai.Artifact, variant: str, terms: Terms
    ) -> bool:
        """Return whether a version is the artifact's, and of this variant if one is named.

        Raises:
            ConditionNotMet: It is, but does not meet the terms.
        """
        same = known.artifact.version == artifact.version
        if not same or variant not in ("", known.variant.id):
            return False
        if terms is not None:
            if known.certificate is None:  # the source model may serve in its place
                raise lrai.ConditionNotMet(f"no certificate speaks of what serves {known.name!r}")
            self._certificate(artifact, known.variant, terms)
        return True

    def load(
        self,
        artifact: str,
        *,
        name: str = "",
        variant: str = "",
        require: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        shared: bool = False,
        share: float | None = None,
    ) -> str:
        """See `Runtime.load`. `shared`: to find the same version and variant loaded is no error."""
        opened = self.open(artifact)
        name, part = name or opened.manifest.name, _shares({"share": share or 0.0})["share"]
        with self.changing(name, wait=shared):
            if shared and not self.scheduler.accepting:  # it has ended meanwhile
                raise lrai.NotReady("the runtime is draining")
            again = self.scheduler.accepting and self._restart_dead(name, opened)
            served, record = self._served(name), self._records.get(name, Record())
            for one in served if shared or again else ():
                # Who asks for the same again means what serves in its place, where it cannot.
                same = record.versions.get(one.version, How()).variant == variant
                if self._is_served(one, opened, "" if same else variant, require):
                    has_now = record.shares.get(one.version, 0.0)
                    if share is not None and has_now != part:
                        has = f"{one.version} is loaded with a share of {has_now:g}"
                        raise lrai.UsageError(f"{has}: route gives it another one")
                    return name
            plain = share is None and require is None
            kept = record.serving(opened.version)
            if shared and served and share is None and record.was(opened.version) and not kept:
                # Whoever starts anew with what was replaced gets what replaced it.
                self._is_served(now := self.current[name], now.artifact, "", require)
                return name
            there = kept is not None and (name, kept.version) in self.versions
            meanwhile = bool(served) and plain and settings is None  # others answer for it
            if (
                (record.frozen or meanwhile)
                and kept
                and not there
                and variant in {"", kept.variant}
            ):
                own = replace(kept, require=kept.require if require is None else require)
                with self._started(name, opened, own, kept.version):
                    self._commit(name, record, "load")  # it serves again as it served
                return name
            record = self._free(name)
            if not served:  # nobody who runs: what was there, if anything, is what served before
                fresh = Record(previous=record.previous, before=record.before)
                record = Record().follows(record) if record.versions else fresh
            if share is not None and not served:
                none = f"no version of {name[:120]!r} serves"
                raise lrai.UsageError(f"{none} beside which it could have a share: load without")
            self._is_alike(name, opened)
            if served and share is None:
                many = "swap replaces it, a share has both serve"
                raise lrai.UsageError(f"a model {name[:120]!r} is loaded already: {many}")
            part = part if served else 1.0
            # Beside others it is to be as good as they are, and what is not said stays as it is.
            old = record.versions[record.stable] if record.versions else How()
            how = How(
                variant,
                old.require if require is None else require,
                old.settings if settings is None else settings,
            )
            with self._started(name, opened, how, tried=not part) as (new, loaded):
                if served:
                    warm_up(self, new)
                self._commit(name, record.beside(loaded, part), "load")
        return name

    def swap(
        self,
        name: str,
        artifact: str,
        *,
        variant: str = "",
        require: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> str:
        """See `Runtime.swap`."""
        with self._changed(name) as (name, record):
            old = record.versions[record.stable]  # what is not said stays as it is
            how = How(
                variant,
                old.require if require is None else require,
                old.settings if settings is None else settings,
            )
            return self._swap(name, record, self.open(artifact), how, "swap")

    def rollback(self, name: str) -> str:
        """See `Runtime.rollback`."""
        with self._changed(name) as (name, record):
            how = record.versions.get(record.alone, record.previous)  # first, others go again
            if not how.version:
                raise lrai.ConditionNotMet(f"model {name!r} has had no version to go back to")
            there = self.versions.get((name, how.version))
            if how in record.versions.values() and there and self._state(there) != "dead":
                self._commit(name, record.shared_out({how.version: 1.0}), "rollback")
                return how.version
            return self._swap(name, record, self._reopen(how), how, "rollback")

    def route(
        self,
        name: str,
        shares: Mapping[str, float],
        shadow: Mapping[str, float] | None = None,
        relief: str = "",
    ) -> None:
        """See `Runtime.route`."""
        given, copies = _shares(shares), _shares(shadow or {})
        with self._changed(name) as (name, record):
            named = given.keys() | copies.keys() | ({relief} if relief else set())
            for label in named - record.versions.keys():
                known = ", ".join(record.versions)
                raise lrai.ModelNotFound(f"{name!r} has versions {known}, not {label[:40]!r}")
            if round(sum(given.values()), 6) != 1 or len(copies) > 1:
                raise lrai.UsageError("shares that add up to 1, and at most one shadow, are needed")
            for label in {label for label, share in given.items() if share} | named - given.keys():
                if not self.runs(self.find(name, label)):
                    raise lrai.ConditionNotMet(f"version {label} of {name!r} does not run any more")
            if relief and any(self._limits(how).deterministic for how in record.versions.values()):
                raise lrai.UsageError(
                    "relief steps to another version under pressure, which a model with "
                    "scheduler.deterministic never does"
                )
            self._commit(name, record.shared_out(given, copies, relief), "route")

    def freeze(self, name: str, by: str, reason: str) -> None:
        """See `Runtime.freeze`."""
        with self._changed(name, wait=True) as (name, record):
            self._commit(name, replace(record, frozen=_freeze(by, reason)), "freeze", by, reason)

    def unfreeze(self, name: str, by: str, reason: str) -> None:
        """See `Runtime.unfreeze`."""
        _freeze(by, reason)
        with self.changing(name, wait=True):
            record = self._records.get(name, Record())
            if record.frozen is None:
                raise lrai.UsageError(f"no model {name[:120]!r} is frozen")
            there = replace(record, frozen=None) if self._served(name) else Record()
            self._commit(name, there, "unfreeze", by, reason)

    def deployments(self) -> list[Deployment]:
        """See `Runtime.deployments`."""
        found = []
        forget_aged(self.config.runtime)
        for name, record in list(self._records.items()):
            version = self.current.get(name)
            if watching := self._watches.get(version.key) if version else None:
                watching.save()  # for who comes to read it
            artifact = str(version.artifact.path.absolute()) if version else ""
            traffic = str(watching.folder.absolute()) if watching else ""
            shown = (record.shares, record.shadow, record.relief, record.previous.version)
            found.append(Deployment(name, *shown, record.frozen, artifact, traffic))
        return found

    def unload(self, name: str, version: str = "") -> None:
        """See `Runtime.unload`."""
        if not version and name in self._records and not self._served(name):
            with self.changing(name, wait=True):  # what could not be restored is listed, too
                if name in self._records and not self._served(name):
                    self._free(name)
                    self._commit(name, Record(), "unload")
                    return
        with self._changed(name, wait=True) as (name, record):
            gone = [one for one in self._served(name) if version in ("", one.version)]
            if version not in ("", *record.versions):
                self.find(name, version)  # for its error
            left = record.without(version) if version else Record()
            if not left.serves:
                raise lrai.UsageError(f"{version} answers for {name!r}: route requests elsewhere")
            self._commit(name, left, "unload")
            answers = {*record.sharing, record.relief}
            for one in gone:  # where others stay; copies nobody waits for
                copies = one.version in record.shadow and one.version not in answers
                self.remove(one, drain=bool(left.versions) and not copies)

    def close(self) -> None:
        """See `Runtime.close`. What is loaded is forgotten, what is frozen is not."""
        if self._closed or os.getpid() != self._owner:
            return
        for watching in list(self._watches.values()):
            watching.save()
        if self.scheduler.thread.is_alive() and not self.keeps:  # else who comes next serves on
            frozen = {name: record for name, record in self._records.items() if record.frozen}
            with suppress(lrai.LraiError):
                self._store.write(frozen, stopped=True)
        super().close()
        for here in list(self._here.values()):
            here.close()
        self._worker.shutdown(cancel_futures=True)
        self._store.close()

    def give_up(self, route: Route, version: Version, why: str) -> None:
        """Take all requests from a canary, and have it stay so."""
        name = version.name
        with self._store.lock:
            if self._routes.get(name) is not route:
                return  # it was judged beside others than those that serve now
            del self._routes[name]  # at once; the rest may have to wait
        with suppress(lrai.LraiError), self.changing(name, wait=True):
            record = self._records.get(name, Record())
            share = record.shares.get(version.version)
            if name in self._routes or not share or record.stable == version.version:
                return  # what was under way has changed who serves
            by, back = "canary guard", record.shared_out({record.stable: 1.0})
            back = replace(back, frozen=record.frozen or _freeze(by, why))
            _log.warning("%s: %s", name, why)
            try:
                self._commit(name, back, "canary_failed", by, why)
            except lrai.LraiError as error:  # a full disk: it is so until the end, and said
                _log.warning("%s: that is not kept: %s", name, error)
                with self._store.lock:
                    self._records = self._records | {name: back}
                    self._apply(name, back)

    def _swap(self, name: str, record: Record, new: lrai.Artifact, how: How, what: str) -> str:
        self._is_alike(name, new, back=what == "rollback")
        old = self._served(name)
        with self._started(name, new, how) as (version, loaded):
            warm_up(self, version)
            self._commit(name, Record().beside(loaded, 1.0).follows(record), what)
        for gone in old:
            self.remove(gone)
        return version.version

    def _restart_dead(self, name: str, artifact: lrai.Artifact) -> bool:
        """Start what was given up again, or what is in its place: it is wanted by who loads it.

        Return whether something was: beside others; else it is for who loads it to start it.
        """
        record, version = self._records.get(name, Record()), artifact.version
        replaced = record.was(version) and not record.serving(version)
        same = [v for v in self._served(name) if replaced or v.artifact.version == version]
        started = False
        for dead in [v for v in same if self._state(v) == "dead"]:
            self.remove(dead, drain=False)
            if self._served(name):  # beside the others; else it is loaded as if for the first time
                try:
                    how = record.versions.get(dead.version, How())
                    own = self._reopen(how) if dead.artifact.version != version else artifact
                    with self._started(name, own, how, dead.version):
                        started = True
                finally:
                    self._apply_what_runs(name, record)
        return started

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

    def _is_alike(self, name: str, artifact: lrai.Artifact, *, back: bool = False) -> None:
        """Raise where requests for a name would be none for the artifact.

        `back`: it served them before, so that it need not have the outputs that came after it.
        """
        if (there := self.current.get(name)) is None:
            return
        old, new = there.signature, artifact.manifest.signature
        outputs = {spec.name for spec in old.outputs} - {spec.name for spec in new.outputs}
        if list(map(_form, old.inputs)) != list(map(_form, new.inputs)) or (outputs and not back):
            takes = "takes other inputs, or has not all outputs of what serves"
            raise lrai.ConditionNotMet(f"{artifact.version} {takes}; load it under another name")

    def _reopen(self, how: How) -> lrai.Artifact:
        artifact = self.open(how.artifact)
        if artifact.version != how.version.partition("-")[0]:
            raise lrai.ConditionNotMet(f"{how.artifact} no longer holds {how.version}")
        return artifact

    @contextmanager
    def _changed(self, name: str, *, wait: bool = False) -> Iterator[tuple[str, Record]]:
        """Hold a name that is loaded and may be changed; yield it and its record."""
        name = self.find(name).name
        with self.changing(name, wait=wait):
            self.find(name)  # it may be gone by now
            yield name, self._free(name)

    def may_go(self, version: Version) -> bool:
        """See `Running.may_go`. One that is frozen may not."""
        record = self._records.get(version.name, Record())
        return record.frozen is None and super().may_go(version)

    def evict(self, version: Version) -> bool:
        """See `Running.evict`."""
        with suppress(lrai.LraiError), self._changed(version.name) as (name, record):
            left = record.without(version.version)
            others = [one for one in self._served(name) if one is not version]
            left = left if others else Record()  # what does not run goes with the last that does
            serves = not others or any(left.shares[one.version] for one in others)
            if serves and version.retire(idle=True):
                try:
                    self._commit(name, left, "unload", why="runtime.memory_mib")
                except BaseException:
                    version.retire(retired=False)  # it serves on
                    raise
                self.remove(version)
                return True
        return False  # it is at work, being changed, or frozen

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
            records = {**self._records, name: record}
            if not record.versions:
                del records[name]
            self._store.write(records)
            try:
                self._store.note(change=what, model=name, by=by, reason=why, shares=record.shares)
            except lrai.EnvironmentProblem:
                with suppress(lrai.EnvironmentProblem):
                    self._store.write(self._records)  # what is not told of is not done
                raise
            self._records = records
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


def _shares(given: Mapping[str, Any]) -> dict[str, float]:
    try:
        return msgspec.convert(dict(given), _SHARES)
    except msgspec.ValidationError as error:
        raise lrai.UsageError(f"a share is a number from 0 to 1: {error}") from None


def _form(spec: lrai.TensorSpec) -> tuple[object, ...]:
    """Return what a request has to know of an input."""
    fixed = tuple(size if isinstance(size, int) else "" for size in spec.shape)
    return spec.name, spec.datatype, fixed


def _freeze(by: str, reason: str) -> Freeze:
    if not by.strip() or not reason.strip():
        raise lrai.UsageError("a name and a reason are needed")
    return Freeze(by, reason, now())
