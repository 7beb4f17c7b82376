"""Names, their versions and the share of each: what may change about who serves, and how.

Every change is written to disk before it is made, and made at once: a request sees the deployment
as it was or as it will be. Whatever fails on the way leaves it as it was.
"""

from __future__ import annotations

import logging
import os
import resource
import threading
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated, Any, Final

import msgspec
from msgspec.structs import replace

import lrai_core as lrai
from lrai_core.config import SchedulerConfig, available_cpus, with_settings
from lrai_core.runtime.embedded import Embedded, Terms
from lrai_core.runtime.version import Deployment, Ended, Freeze, Started, State, Version, started
from lrai_core.scheduler.scheduler import Pending
from lrai_deployments.here import Here
from lrai_deployments.inline import InlinePool
from lrai_deployments.measured import measured_here
from lrai_deployments.routing import Route
from lrai_deployments.state import How, Record, Store, now
from lrai_deployments.traffic import Watch, forget_aged, watch
from lrai_deployments.warmup import warm_up

_log = logging.getLogger(__name__)
_STARTS: Final = 8  # versions that start at the same time
_LOST: Final = (lrai.ArtifactError, lrai.ConditionNotMet, lrai.UsageError, TypeError)  # for good
_SHARES: Final = dict[str, Annotated[float, msgspec.Meta(ge=0, le=1)]]


class Deployments(Embedded):
    """An embedded runtime whose names have versions; thread-safe."""

    pool = InlinePool
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
        # Who connects while no descriptor is left would end this process: libzmq asserts.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self._store = Store(self.config.runtime.state_dir)
        forget_aged(self.config.runtime, halves=True)
        self._kept, self._stopped = self._store.read()
        self._records = {name: record for name, record in self._kept.items() if record.frozen}
        self._routes: dict[str, Route] = {}
        self._watches: dict[str, Watch] = {}  # by key of the version
        self._here: dict[str, Here] = {}  # the same, of those that run in this process
        self.random = Random()
        # With a budget one version starts at a time, so that what it takes can be counted.
        at_a_time = 1 if self.config.runtime.memory_mib else _STARTS
        self._room = threading.Semaphore(at_a_time)
        self._worker = ThreadPoolExecutor(1, "lrai-deployments")

    def open(self, artifact: str) -> lrai.Artifact:
        """See `Embedded.open`. What was measured of it on this machine counts."""
        return measured_here(super().open(artifact), self.config)

    def restore(self, ending: Callable[[], bool] = bool) -> None:
        """Serve again what was served when the runtime before this one was killed.

        `ending`: whether it is to end; what has not begun by then is not started.
        """
        if self._stopped:
            return
        self._records = dict(self._kept)  # all: whoever is killed at it leaves the rest to the next
        # Each is given so long to open, and all the memory that there is: not all of them at once.
        with ThreadPoolExecutor(min(_STARTS, available_cpus())) as threads:
            for _ in threads.map(partial(self._restore, ending), self._kept.items()):
                pass

    def _restore(self, ending: Callable[[], bool], kept_as: tuple[str, Record]) -> None:
        name, kept = kept_as
        with self.changing(name):  # who starts beside it has so many CPUs less
            self._restore_name(ending, name, kept)

    def _restore_name(self, ending: Callable[[], bool], name: str, kept: Record) -> None:
        record, missing = kept, False
        for label, how in kept.versions.items():
            if ending():
                return
            try:
                with self._started(name, self._reopen(how), how, label):
                    pass
            except (lrai.LraiError, TypeError) as error:  # whoever needs it is told, too
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
            except lrai.EnvironmentProblem:  # a full disk; what it holds is right but for this
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
            if shared and self.scheduler.accepting:
                self._restart_dead(name, opened)
            served, record = self._served(name), self._records.get(name, Record())
            for one in served if shared else ():
                # Who asks for the same again means what serves in its place, where it cannot.
                again = record.versions.get(one.version, How()).variant == variant
                if self._is_served(one, opened, "" if again else variant, require):
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
            record = record if served else Record(previous=record.previous, before=record.before)
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
            if relief and any(map(self._is_deterministic, record.versions.values())):
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
                self.remove(one, drain=bool(left.versions) and one.version in answers)

    def start_all(self, requests: Sequence[lrai.InferenceRequest]) -> list[Started]:
        """See `Runtime.start_all`. Requests for one version that is here run on this thread."""
        asked = {(request.model_name, request.model_version) for request in requests}
        here = self._here_for(*asked.pop()) if len(asked) == 1 else None
        return here.answer(requests) if here else [started(self._begin, one) for one in requests]

    def start(
        self, request: lrai.InferenceRequest, version: Version | None = None
    ) -> Future[lrai.InferenceResponse]:
        """See `Embedded.start`. What a version that is here answers, who waits for it runs."""
        here = None if version else self._here_for(request.model_name, request.model_version)
        return here.start(request) if here else super().start(request, version)

    def _begin(self, request: lrai.InferenceRequest) -> Future[lrai.InferenceResponse]:
        """Start a request, and have it run although nobody waits for it."""
        future = self.start(request)
        future.add_done_callback(lambda _: None)
        return future

    def _here_for(self, name: str, label: str) -> Here | None:
        """Return who answers such requests, if it is one version, and that is here."""
        if self._here and os.getpid() == self._owner:
            with suppress(lrai.ModelNotFound):  # which each of them is told
                version = self.find(name, label)
                if label or version.name not in self._routes:
                    return self._here.get(version.key)
        return None

    def stats(self) -> dict[str, int]:
        """See `Runtime.stats`."""
        stats = super().stats()
        stats["outstanding_rows"] += sum(here.outstanding() for here in list(self._here.values()))
        return stats

    def drain(self) -> bool:
        """See `Runtime.drain`."""
        deadline = time.monotonic() + self.config.runtime.drain_seconds
        drained = super().drain()
        while (inside := self.stats()["outstanding_rows"]) and time.monotonic() < deadline:
            time.sleep(0.005)
        return drained and not inside

    def accept(
        self, request: lrai.InferenceRequest, done: Ended, version: Version | None = None
    ) -> Pending:
        """See `Embedded.accept`."""
        if version is None and self._routes:
            name, asked = request.model_name or self.find("").name, request.model_version
            named = self.versions.get((name, asked)) if asked else None
            # What is asked of one of several counts for it, too.
            if (route := self._routes.get(name)) is not None and (named or not asked):
                return route.accept(request, done, named)
        return super().accept(request, done, version)

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

    def remove(self, version: Version, *, drain: bool = True) -> None:
        """See `Embedded.remove`. What was seen of its traffic is written down."""
        serves = self.current.get(version.name) is version
        super().remove(version, drain=drain)
        if (here := self._here.pop(version.key, None)) is not None:
            here.close()
        watching = self._watches.pop(version.key, None)
        if watching and (serves or not self._served(version.name)):  # all of a name share a folder
            watching.save()

    def _state(self, version: Version) -> State:
        here = self._here.get(version.key)
        state = "stalled" if here is not None and here.hangs() else super()._state(version)
        return "ok" if state == "idle" and here is not None and here.outstanding() else state

    def runs(self, version: Version) -> bool:
        """Return whether a version was not given up."""
        return self._state(version) != "dead"

    def submit(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run a function soon, in a thread that no request waits for."""
        with suppress(RuntimeError):  # it is closing
            self._worker.submit(function, *arguments)

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

    def _restart_dead(self, name: str, artifact: lrai.Artifact) -> None:
        """Start what was given up again, or what is in its place: it is wanted by who loads it."""
        record, version = self._records.get(name, Record()), artifact.version
        replaced = record.was(version)
        same = [v for v in self._served(name) if replaced or v.artifact.version == version]
        for dead in [v for v in same if self._state(v) == "dead"]:
            self.remove(dead, drain=False)
            if self._served(name):  # beside the others; else it is loaded as if for the first time
                try:
                    how = record.versions.get(dead.version, How())
                    own = self._reopen(how) if dead.artifact.version != version else artifact
                    with self._started(name, own, how, dead.version):
                        pass
                finally:
                    self._apply_what_runs(name, record)

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

    @contextmanager
    def _started(
        self, name: str, artifact: lrai.Artifact, how: How, label: str = "", *, tried: bool = False
    ) -> Iterator[tuple[Version, How]]:
        """Yield a version that runs, and how it was loaded; end it if the block fails.

        `tried`: it answers nobody, and so nobody else is unloaded for it.
        """
        config = with_settings(self.config, how.settings or {})
        signature = artifact.manifest.signature
        watching = watch(name, signature, config.runtime, self.submit)
        others = [self._watches.get(version.key) for version in self._served(name)]
        if watching is not None:  # all of a name share a folder, and so what is seen of it
            alike = (one for one in others if one and one.captures == watching.captures)
            watching = next(alike, watching)
        files = ChainMap(*map(artifact.files_of, artifact.manifest.serving(how.variant)))
        size = sum(entry.size_bytes for entry in files.values())
        with self._room:
            self._make_room(name, config.actor.replicas * size, tried=tried)
            new = self.add(artifact, name, how.variant, how.require, config, label)
            pool = self._pool
            if isinstance(pool, InlinePool) and (opened := pool.opened(new.key)):
                self._here[new.key] = Here(self, new, *opened)
            if watching is not None:
                self._watches[new.key] = watching
            self.show(new)
        try:
            with self._room if self.config.runtime.memory_mib else nullcontext():
                self._make_room(name, 0, tried=tried)  # now that it is known what it takes
            yield new, replace(how, version=new.version, artifact=str(artifact.path.absolute()))
        except BaseException:
            self.remove(new, drain=False)
            raise

    def _make_room(self, name: str, needed: int, *, tried: bool = False) -> None:
        """Unload what was not used for longest, as far as a new version of a name needs it."""
        budget = self.config.runtime.memory_mib << 20
        while budget:
            takes = {v: memory_bytes(self.pids(v)) for v in list(self.versions.values())}
            used = sum(takes.values())
            if used + needed <= budget:
                return
            others = [v for v in takes if v.name != name and takes[v] and not tried]
            frozen = {name for name, record in self._records.items() if record.frozen}
            others = [v for v in others if not v.inside and v.name not in frozen]
            enough = used + needed - sum(takes[version] for version in others) <= budget
            others.sort(key=lambda version: version.used_at)
            if not enough or not any(map(self._evict, others)):
                have = f"{used >> 20} of {budget >> 20} MiB are in use, by it and by models at work"
                needs = f"{name!r} needs {needed >> 20} MiB more"
                raise lrai.MemoryBudgetExceeded(f"{needs}; {have}, frozen or needed")

    def _evict(self, version: Version) -> bool:
        """Unload a version if nobody needs it now; return whether it is gone."""
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

    def _is_deterministic(self, how: How) -> bool:
        return self._limits(how).deterministic

    def _limits(self, how: How) -> SchedulerConfig:
        return with_settings(self.config, how.settings or {}).scheduler

    def _served(self, name: str) -> list[Version]:
        return [version for (known, _), version in list(self.versions.items()) if known == name]

    def _free(self, name: str) -> Record:
        """Return the record of a name, empty where there is none.

        Raises:
            ConditionNotMet: It is frozen.
        """
        record = self._records.get(name, Record())
        if frozen := record.frozen:
            said = f"by {frozen.by} at {frozen.since}: {frozen.reason}"
            raise lrai.ConditionNotMet(f"model {name!r} was frozen {said}")
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


def memory_bytes(pids: Sequence[int]) -> int:
    """Return the memory of processes, what they share with others in proportion."""
    total = 0
    for pid in pids:
        with suppress(OSError):  # it has just ended
            text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
            total += int(text.partition("\nPss:")[2].split()[0]) << 10
    return total


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
