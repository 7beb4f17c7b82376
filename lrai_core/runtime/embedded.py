"""The runtime of one process: scheduler as a thread, actors as child processes."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from lrai_core import errors
from lrai_core.actor.pool import Pool
from lrai_core.artifact import Artifact, Variant
from lrai_core.config import ActorConfig, LraiConfig, available_cpus
from lrai_core.engine.engine import SHORT_CALL_MS
from lrai_core.errors import ConditionNotMet, EnvironmentProblem, LraiError, NotReady, shorten
from lrai_core.events import EventBus, Observers
from lrai_core.protocol import Array, InferenceRequest
from lrai_core.runtime.version import Answer, Ended, LoadedModel, State, Version, settle
from lrai_core.scheduler.scheduler import Scheduler
from lrai_core.scheduler.state import Pending, Replica
from lrai_core.verifier.certificate import certificates
from lrai_core.verifier.check import require_certificate
from lrai_core.verifier.verifier import environment
from lrai_core.wire.forms import validate_by_form
from lrai_core.wire.messages import Load

T = TypeVar("T")
MakePool = Callable[[Path, ActorConfig, EventBus], Pool]
Terms = Mapping[str, Any] | None  # that a certificate has to meet; None for none


class Embedded:
    """Scheduler and actors of this process; thread-safe.

    It runs versions. Which there are, and who answers for a name, is decided by what builds on it:
    `lrai_deployments`, found by the entry point `lrai.backends`.
    """

    pool: type[Pool] = Pool  # of who names none

    def __init__(
        self, config: LraiConfig, observers: Observers = (), *, pool: MakePool | None = None
    ) -> None:
        """Start scheduler and sockets; `add` brings models."""
        self.config = config
        self.begin()
        self.events = EventBus(observers)
        self.folder = _socket_folder(config.runtime.socket_dir)
        self._finalizer = weakref.finalize(self, _forget, self.folder, os.getpid())
        self._condition = threading.Condition()  # of what is being changed, by what builds on this
        self._changing: set[str] = set()
        self._leaving: set[str] = set()  # of these, those that nobody is to serve
        self.current: dict[str, Version] = {}  # what serves who asks for no version
        self.versions: dict[tuple[str, str], Version] = {}  # what may be asked for
        self._owner, self._closed = os.getpid(), False
        self._pool = (pool or self.pool)(self.folder, config.actor, self.events)
        self.scheduler = Scheduler(config.scheduler, self._pool, self.events)
        self.scheduler.start()

    def begin(self) -> None:
        """Called once, before anything is started: for what builds on this class."""

    def call(self, operation: str, arguments: dict[str, Any], _: type[T]) -> T:
        """Return what an operation gives, by its name, as over the wire."""
        return cast("T", getattr(self, operation)(**arguments))

    def add(
        self, artifact: Artifact, name: str, variant: str, terms: Terms, own: LraiConfig, label: str
    ) -> Version:
        """Return a version whose actors run, and that nobody can ask for: it is in no `versions`.

        `terms`: see `Runtime.open`, `require`. `own`: its settings. `label`: what it is called, if
        not what its artifact is.
        """
        config, limits = own.actor, own.scheduler
        chosen, *others = self._choose(artifact, name, variant) or (None,)
        # A certificate speaks of the graph as it was compiled, not of one optimised at load.
        if chosen is None and (terms is not None or not artifact.manifest.source.file):
            made = "the variant was made for another processor class or engine version"
            why = "no certificate speaks of it, or it was left out"
            raise ConditionNotMet(f"{made}, and the source model cannot serve in its place: {why}")
        beside: list[tuple[Variant, str | None]] = []
        for one in () if chosen is None or limits.deterministic else others:
            with contextlib.suppress(ConditionNotMet):  # the chosen one may meet it alone
                beside.append((one, self._certificate(artifact, one, terms)))
        certificate = self._certificate(artifact, chosen, terms) if chosen else None
        load = _load(artifact, chosen, [one for one, _ in beside])
        # What was measured elsewhere says nothing of the source model's speed here.
        profile = chosen.latency if chosen else ()
        chosen = chosen or artifact.manifest.variant("fp32")
        label, places = label or self._unique(name, artifact), enumerate(config.device_of_each)
        actors = tuple(f"{name}@{label}" + f"#{i}" * (i > 0) for i, _ in places)
        if limits.deterministic and chosen.batch_effect:
            limits = replace(limits, max_batch_rows=1)
        version = Version(name, label, artifact, chosen, certificate, actors, limits, tuple(beside))
        version.used_at = time.monotonic()
        threads = config.threads or self._threads(artifact, chosen, name, len(actors))
        alone_ms = min((point.median_ms for point in profile), default=0.0)
        if 0 < limits.latency_slo_ms <= alone_ms:
            reason = f"{limits.latency_slo_ms:g} ms, the least that it takes is {alone_ms:.3g}"
            self.events.emit("limit_unreachable", name, setting="latency_slo_ms", reason=reason)
        if limits.max_batch_rows > (most := self.config.scheduler.max_queue_rows):
            reason = f"{limits.max_batch_rows} rows, of which {most} may wait (max_queue_rows)"
            self.events.emit("limit_unreachable", name, setting="max_batch_rows", reason=reason)
        profiles = [profile, *(one.latency for one, _ in beside)]
        replicas = [Replica(actor, *profiles, threads=threads) for actor in actors]
        self.scheduler.add(version.key, replicas, limits)
        load = msgspec.structs.replace(load, threads=threads, inline=config.isolation == "inline")
        try:
            self._start_actors(replicas, load, config.device_of_each)
        except BaseException:
            self._end(version)
            raise
        return version

    def remove(self, version: Version, *, drain: bool = True) -> None:
        """Let what a version has accepted end, within the time for draining; end its actors."""
        self.versions.pop((version.name, version.version), None)
        if self.current.get(version.name) is version:
            del self.current[version.name]
        version.retire()
        deadline = time.monotonic() + self.config.runtime.drain_seconds * drain
        while version.inside and time.monotonic() < deadline:
            time.sleep(0.005)
        self._end(version)

    def pids(self, version: Version) -> list[int]:
        """Return the processes of its actors, without those that are being replaced."""
        return [pid for actor in version.actors if (pid := self._pool.state(actor)[1])]

    def start(self, request: InferenceRequest, version: Version | None = None) -> Answer:
        """Accept a request; cancelling the future takes it out of the queue if it has not begun."""
        reply: Answer = Future()
        pending = self.accept(request, partial(settle, reply), version)
        reply.add_done_callback(lambda f: self.scheduler.cancel(pending) if f.cancelled() else None)
        return reply

    def accept(
        self, request: InferenceRequest, done: Ended, version: Version | None = None
    ) -> Pending:
        """Accept a request; `done` is called once, in the scheduler's thread.

        `version`: who answers it, by default whom the request names.
        """
        if os.getpid() != self._owner:
            raise NotReady("this process was forked from the runtime's; open one of its own")
        priority = priority_of(request)
        gone: Version | None = None
        while True:
            model = version or self.find(request.model_name, request.model_version)
            if model is gone:
                raise NotReady(f"model {model.name!r} is being unloaded")
            valid = validate_by_form(request, model.signature, self.config.limits)
            if model.enter():
                break
            version, gone = None, model  # another one has just taken its place

        def ended(arrays: list[Array] | None, error: LraiError | None, variant: int) -> None:
            model.leave()
            done(error or model.response(request.id, valid.outputs, arrays or [], variant))

        try:
            if model.watch is not None:
                model.watch(valid)
            pending = self.scheduler.accept(model.key, valid, ended, request.timeout_ms, priority)
        except BaseException:
            model.leave()
            raise
        model.used_at = pending.arrival
        return pending

    def models(self) -> list[LoadedModel]:
        """See `Runtime.models`."""
        found = []
        for model in [one for one in list(self.versions.values()) if one.name in self.current]:
            known = (model.name, model.version, model.variant.id, model.certificate)
            found.append(LoadedModel(*known, model.signature, self._state(model), self.pids(model)))
        return found

    def ready(self) -> State:
        """See `Runtime.ready`."""
        order: list[State] = ["dead", "stalled", "ok", "idle"]
        states: set[State] = {self._state(model) for model in list(self.current.values())}
        states |= {"stalled"} if self._changing - self._leaving - self.current.keys() else set()
        nothing: State = "idle" if self.scheduler.accepting else "dead"
        return next((state for state in order if state in states), nothing)

    def stats(self) -> dict[str, int]:
        """See `Runtime.stats`."""
        stats = self.events.counts() | {"outstanding_rows": self.scheduler.outstanding()}
        stats["dropped_frames"] = self._pool.dropped_frames
        for peer, line in self._pool.lines.items():
            stats |= line.counts(peer)
        return stats

    def drain(self) -> bool:
        """See `Runtime.drain`."""
        return self.scheduler.drain(self.config.runtime.drain_seconds)

    def close(self) -> None:
        """See `Runtime.close`."""
        if self._closed or os.getpid() != self._owner:  # a fork's copy is not the runtime
            return
        self._closed = True
        self.scheduler.close()
        self._pool.close()
        self.events.close()
        self._finalizer()

    def find(self, name: str, version: str = "") -> Version:
        """Return the version that serves a name, or the one of that name that is asked for.

        Raises:
            ModelNotFound: There is none.
        """
        if not name and len(names := list(self.current)) == 1:  # another thread may unload it
            name = names[0]
        if (model := self.current.get(name)) is None:
            known = ", ".join(map(repr, self.current)) or "none"
            raise errors.ModelNotFound(f"no model {shorten(name)!r} is loaded; loaded: {known}")
        found = model if version in ("", model.version) else self.versions.get((name, version))
        if found is None:
            other = shorten(version, 40)
            raise errors.ModelNotFound(f"model {name!r} has version {model.version}, not {other!r}")
        return found

    def _unique(self, name: str, artifact: Artifact) -> str:
        """Return the artifact's version, with a number where it is loaded under this name."""
        labels = (artifact.version + f"-{i}" * (i > 1) for i in itertools.count(1))
        return next(label for label in labels if (name, label) not in self.versions)

    def _choose(self, artifact: Artifact, name: str, variant: str) -> list[Variant]:
        """Return the variants that serve here: those that were made for this machine.

        None where there is none: then the source model is to serve.
        """
        manifest = artifact.manifest
        wanted, *others = manifest.serving(variant)
        known = (wanted, *others, *(() if variant else manifest.variants))
        fitting = [one for one in known if manifest.made_for(one) == environment(one)]
        if fitting[:1] == [wanted]:
            return fitting[: 1 + sum(other in fitting for other in others)]
        made_for, here = manifest.made_for(wanted), environment(wanted)
        self.events.emit("variant_refused", name, variant=wanted.id, made_for=made_for, here=here)
        # What is slower in the mean was kept for some calls, beside what was chosen.
        return [one for one in fitting if one.speedup >= 1 or one.id == "fp32"][:1]

    def _certificate(self, artifact: Artifact, variant: Variant, terms: Terms) -> str | None:
        """Return the id of the certificate that speaks of a variant, None where there is none.

        Raises:
            ConditionNotMet: None meets what is required.
        """
        if terms is not None:
            return require_certificate(artifact, variant.id, terms).id
        here, own = environment(variant), certificates(artifact, variant.id)
        return next((c.id for c in own if c.environment == here), None)

    def _threads(self, artifact: Artifact, variant: Variant, name: str, replicas: int) -> int:
        """Return the engine threads of an actor: a share of the CPUs, one where calls are short.

        That is what they would take with one: several save all but one part in so many, at most.
        """
        longest = max((point.median_ms for point in variant.latency), default=math.inf)
        short = longest * artifact.manifest.target.threads < SHORT_CALL_MS
        names = self.current.keys() | self._changing | {name}
        return 1 if short else max(1, available_cpus() // len(names) // replicas)

    def _start_actors(self, replicas: Sequence[Replica], load: Load, devices: list[str]) -> None:
        """Start the actors of a version, each on CPUs of its own where there are enough."""
        cpus = sorted(os.sched_getaffinity(0))
        share = len(cpus) // len(replicas) if len(replicas) > 1 else 0
        futures = [Future[None]() for _ in replicas]
        for i, (replica, loaded) in enumerate(zip(replicas, futures, strict=True)):
            replica.cpus = tuple(cpus[i * share : (i + 1) * share])
            own = msgspec.structs.replace(load, cpus=replica.cpus, device=devices[i])
            self.scheduler.call(partial(self._pool.add, replica.actor, own, loaded))
        try:
            for loaded in futures:
                loaded.result(self.config.actor.start_timeout_seconds + 5)
        except TimeoutError:
            raise EnvironmentProblem("the actor did not answer") from None

    def _end(self, version: Version) -> None:
        done = threading.Event()
        self.scheduler.call(partial(self.scheduler.remove, version.key))
        for actor in version.actors:
            self.scheduler.call(partial(self._pool.remove, actor))
        self.scheduler.call(done.set)
        done.wait(10)

    def _state(self, version: Version) -> State:
        states = {self._pool.state(actor)[0] for actor in version.actors}
        if states == {"failed"} or not self.scheduler.accepting:
            return "dead"
        if "ready" not in states or self.scheduler.stalled(version.key, self.config.actor):
            return "stalled"
        return "ok" if self.scheduler.outstanding() else "idle"


def _load(artifact: Artifact, chosen: Variant | None, beside: Sequence[Variant]) -> Load:
    """Return what an actor opens; for no variant the source model, which it optimises."""
    manifest = artifact.manifest
    first = chosen or manifest.variant("fp32")
    model = first.model if chosen else manifest.source.file
    weights = first.weights if chosen else str(Path(manifest.source.file).parent)
    files = {model: manifest.files[model]}
    for variant in (first, *beside):
        files |= artifact.files_of(variant)
    where = (str(artifact.path.absolute()), model, weights, first.engine)
    return Load(
        *where,
        optimise=chosen is None,
        threads=0,  # as its settings say
        files={file: (entry.sha256, entry.size_bytes) for file, entry in files.items()},
        signature=manifest.signature,
        beside=tuple((one.engine, one.model, one.weights) for one in beside),
    )


def priority_of(request: InferenceRequest) -> int:
    """Return the priority that a request states, 0 by default; the lower are served first."""
    priority = request.parameters.get("priority", 0)
    if not isinstance(priority, int):
        raise errors.RequestError(f"priority is {shorten(repr(priority))}, an integer is needed")
    return priority


def find_backend(name: str) -> type[Any]:
    """Return what serves: `deployments`, `Embedded` with names, or `ipc`, a daemon's client."""
    for entry in entry_points(group="lrai.backends", name=name):
        return cast("type[Any]", entry.load())
    raise EnvironmentProblem(f"no backend {name!r} is here: install lrai again")


def _forget(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _socket_folder(parent: str) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="lrai-", dir=parent or None))  # mode 0700
    except OSError as error:
        why = f"no folder for sockets can be made in {parent or tempfile.tempdir or 'TMPDIR'}"
        raise EnvironmentProblem(f"{why}: {error.strerror}; set runtime.socket_dir") from None
