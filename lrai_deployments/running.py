"""Versions that run: which of them gets a request, what is seen of it, and what room they take."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from random import Random
from typing import Any, Final

from msgspec.structs import replace

import lrai_core as lrai
from lrai_core.config import SchedulerConfig, with_settings
from lrai_core.runtime.embedded import Embedded
from lrai_core.runtime.version import Ended, Started, State, Version, started
from lrai_core.scheduler.state import Pending
from lrai_deployments.here import Here, time_of
from lrai_deployments.inline import InlinePool
from lrai_deployments.measured import measured_here
from lrai_deployments.routing import Route
from lrai_deployments.state import How
from lrai_deployments.traffic import Watch, watch

STARTS: Final = 8  # versions that start at the same time


class Running(Embedded):
    """An embedded runtime that runs several versions of a name; what may change is not its own."""

    pool = InlinePool

    def begin(self) -> None:
        """See `Embedded.begin`."""
        # Who connects while no descriptor is left would end this process: libzmq asserts.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self._routes: dict[str, Route] = {}  # of names that several versions answer for
        self._watches: dict[str, Watch] = {}  # by key of the version
        self._here: dict[str, Here] = {}  # the same, of those that run in this process
        self.random = Random()
        # With a budget one version starts at a time, so that what it takes can be counted.
        self._room = threading.Semaphore(1 if self.config.runtime.memory_mib else STARTS)
        self._worker = ThreadPoolExecutor(1, "lrai-deployments")
        self._changers = ThreadPoolExecutor(STARTS, "lrai-changes")

    def open(self, artifact: str) -> lrai.Artifact:
        """Return an artifact from a folder that may be loaded from, as it was measured here."""
        roots = self.config.runtime.model_roots
        if "\0" in artifact:  # which would be a bug of ours wherever it is looked for
            raise lrai.ConditionNotMet(f"{artifact[:120]!r}: no path has a NUL in it")
        # Where links and dots lead to now: that is opened again by the process that comes after one
        # that died, and gone back to, though a link may lead elsewhere by then.
        path = Path(os.path.realpath(artifact))
        folders = [Path(one).resolve() for one in roots.split(":") if one]
        if roots and not any(map(path.is_relative_to, folders)):
            where = "in none of the folders to load from, see runtime.model_roots"
            raise lrai.ConditionNotMet(f"{artifact[:120]!r} lies {where}")
        # Neither could be kept, or told an actor.
        if any("\ud800" <= letter <= "\udfff" for letter in f"{artifact}{path}"):
            raise lrai.ConditionNotMet(f"{str(path)[:120]!r}: a path has to be UTF-8")
        opened = lrai.Artifact.open(path, verify=False)  # the actor hashes what it opens
        return measured_here(opened, self.config)

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
                if version.name not in self._routes:  # what is asked of one of several counts
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
        """See `Embedded.accept`. Who finds that nobody answers for a name has it fall back."""
        time_of(request)  # for its error
        try:
            return self._accept(request, done, version)
        except lrai.ActorError:
            if version is None and not request.model_version:
                self.lost(request.model_name or self.find("").name)
            raise

    def lost(self, name: str) -> None:
        """Take note that who has a share of a name was given up; for what builds on this class."""

    def _accept(
        self, request: lrai.InferenceRequest, done: Ended, version: Version | None
    ) -> Pending:
        if version is None and self._routes:
            name, asked = request.model_name or self.find("").name, request.model_version
            named = self.versions.get((name, asked)) if asked else None
            # What is asked of one of several counts for it, too.
            if (route := self._routes.get(name)) is not None and (named or not asked):
                return route.accept(request, done, named)
        return super().accept(request, done, version)

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

    def submit(self, function: Callable[..., None], *arguments: Any, waits: bool = False) -> None:
        """Run a function soon, in a thread that no request waits for.

        `waits`: it may have to, for a model to start say, and is in nobody's way meanwhile.
        """
        with suppress(RuntimeError):  # it is closing
            (self._changers if waits else self._worker).submit(function, *arguments)

    @contextmanager
    def _started(
        self, name: str, artifact: lrai.Artifact, how: How, label: str = "", *, tried: bool = False
    ) -> Iterator[tuple[Version, How]]:
        """Yield a version that runs, and how it was loaded; end it if the block fails.

        `tried`: it answers nobody, and so nobody else is unloaded for it.
        """
        config = with_settings(self.config, how.settings or {})
        others = [self._watches.get(version.key) for version in self._served(name)]
        watching = watch(name, artifact, config.runtime, self.submit, others)
        files = ChainMap(*map(artifact.files_of, artifact.manifest.serving(how.variant)))
        size = sum(entry.size_bytes for entry in files.values())
        with self._room:
            self._make_room(name, len(config.actor.device_of_each) * size, tried=tried)
            new = self.add(artifact, name, how.variant, how.require, config, label)
            if isinstance(self._pool, InlinePool) and (opened := self._pool.opened(new.key)):
                self._here[new.key] = Here(self, new, *opened)
            if watching is not None:
                self._watches[new.key] = watching
            self.versions[name, new.version] = new  # requests that ask for it find it
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
            others = [v for v in takes if v.name != name and takes[v] and self.may_go(v)]
            others = [] if tried else sorted(others, key=lambda version: version.used_at)
            enough = used + needed - sum(takes[version] for version in others) <= budget
            if not enough or not any(map(self.evict, others)):
                have = f"{used >> 20} of {budget >> 20} MiB are in use, by it and by models at work"
                needs = f"{name!r} needs {needed >> 20} MiB more"
                raise lrai.MemoryBudgetExceeded(f"{needs}; {have}, frozen or needed")

    def _limits(self, how: How) -> SchedulerConfig:
        return with_settings(self.config, how.settings or {}).scheduler

    def _served(self, name: str) -> list[Version]:
        return [version for (known, _), version in list(self.versions.items()) if known == name]

    def may_go(self, version: Version) -> bool:
        """Return whether a version may be unloaded to make room; for what builds on this class."""
        return not version.inside

    def evict(self, version: Version) -> bool:
        """Unload a version if nobody needs it now; return whether it is gone; see `may_go`."""
        self.remove(version)
        return True


def memory_bytes(pids: Sequence[int]) -> int:
    """Return the memory of processes, what they share with others in proportion."""
    total = 0
    for pid in pids:
        with suppress(OSError):  # it has just ended
            text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
            total += int(text.partition("\nPss:")[2].split()[0]) << 10
    return total
