"""The runtime of one process: scheduler as a thread, actors as child processes."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, cast

import msgspec

from lrai_core.actor.pool import Pool
from lrai_core.artifact import Artifact, Variant
from lrai_core.config import ActorConfig, LraiConfig, available_cpus, with_settings
from lrai_core.engine.engine import installed_version, isa_class
from lrai_core.errors import (
    ConditionNotMet,
    EnvironmentProblem,
    LraiError,
    ModelNotFound,
    NotReady,
    RequestError,
    UsageError,
    shorten,
)
from lrai_core.events import EventBus, Observer
from lrai_core.protocol import (
    Array,
    InferenceRequest,
    InferenceResponse,
    Signature,
    ValidRequest,
    validate,
)
from lrai_core.scheduler.scheduler import Pending, Replica, Scheduler
from lrai_core.verifier.certificate import certificates
from lrai_core.verifier.check import require_certificate
from lrai_core.wire.messages import Load

T = TypeVar("T")
State = Literal["ok", "idle", "stalled", "dead"]
_ONE_THREAD_BELOW_MS: Final = 2.0


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One version of a model that is loaded.

    Attributes:
        certificate: Id of the strongest certificate of the variant, None where it has none.
        actor_pids: Processes of the actors; one that is being replaced has none.
    """

    name: str
    version: str
    variant: str
    certificate: str | None
    signature: Signature
    state: State
    actor_pids: list[int]

    @property
    def actor_pid(self) -> int | None:
        """Return the process of the first actor that has one."""
        return next(iter(self.actor_pids), None)


@dataclass(frozen=True, slots=True)
class Freeze:
    """Who has said that a deployment stays as it is, why, and since when (ISO 8601, UTC)."""

    by: str
    reason: str
    since: str


@dataclass(frozen=True, slots=True)
class Deployment:
    """A name, and who answers for it.

    Attributes:
        shares: Of the requests that name no version, by version; together 1.
        shadow: Share of the requests of which a copy goes to a version, by that version.
        previous: The version that `rollback` goes back to, empty where there is none.
    """

    name: str
    shares: dict[str, float]
    shadow: dict[str, float]
    previous: str
    frozen: Freeze | None


Ended = Callable[[InferenceResponse | LraiError], None]


@dataclass(slots=True, eq=False)
class Version:
    """One version of a model, with its actors running.

    Attributes:
        version: The artifact's, made unique among those of the name.
        actors: Their names.
        inside: Requests accepted and not yet ended.
        used_at: When the last one was accepted, on the monotonic clock.
    """

    name: str
    version: str
    artifact: Artifact
    variant: Variant
    certificate: str | None
    actors: tuple[str, ...]
    inside: int = 0
    used_at: float = 0.0
    _retired: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def key(self) -> str:
        """Return its name in scheduler, pool and events."""
        return self.actors[0]

    @property
    def signature(self) -> Signature:
        """Return what it takes and gives."""
        return self.artifact.manifest.signature

    def enter(self) -> bool:
        """Count a request in; return False where none are taken any more."""
        with self._lock:
            self.inside += not self._retired
            return not self._retired

    def leave(self) -> None:
        """Count a request out, however it ended."""
        with self._lock:
            self.inside -= 1

    def retire(self, *, idle: bool = False) -> bool:
        """Take no more requests, with `idle` only if none is inside; return whether it is so."""
        with self._lock:
            self._retired = self._retired or not (idle and self.inside)
            return self._retired


class Embedded:
    """Scheduler and actors of this process; thread-safe."""

    def __init__(
        self,
        config: LraiConfig,
        observers: Sequence[Observer] = (),
        *,
        pool: Callable[[Path, ActorConfig, EventBus], Pool] = Pool,
    ) -> None:
        """Start scheduler and sockets; `load` brings models."""
        self.config = config
        self.events = EventBus(observers)
        self.folder = _socket_folder(config.runtime.socket_dir)
        self._finalizer = weakref.finalize(self, _forget, self.folder, os.getpid())
        self._condition = threading.Condition()  # of what is being changed
        self._changing: set[str] = set()
        self.current: dict[str, Version] = {}  # what serves who asks for no version
        self.versions: dict[tuple[str, str], Version] = {}  # what may be asked for
        self._owner = os.getpid()
        self._closed = False
        self._pool = pool(self.folder, config.actor, self.events)
        self.scheduler = Scheduler(config.scheduler, self._pool, self.events)
        self.scheduler.start()

    def call(self, operation: str, arguments: dict[str, Any], kind: type[T]) -> T:
        """Return what an operation gives, by its name, as over the wire."""
        del kind
        if not hasattr(self, operation):
            raise EnvironmentProblem(f"{operation} needs lrai_deployments: install lrai again")
        result: T = getattr(self, operation)(**arguments)
        return result

    def load(
        self,
        artifact: str,
        *,
        name: str = "",
        variant: str = "",
        require: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        shared: bool = False,
    ) -> str:
        """See `Runtime.load`. `shared`: to find the same version and variant loaded is no error."""
        opened = self.open(artifact)
        name = name or opened.manifest.name
        with self.changing(name, wait=shared):
            known = self.current.get(name)
            if not (known and shared and self.is_served(known, opened, variant, require)):
                if known:
                    raise UsageError(f"a model {shorten(name)!r} is loaded already")
                self.show(self.add(opened, name, variant, require, settings))
        return name

    def open(self, artifact: str) -> Artifact:
        """Return an artifact from a folder that may be loaded from."""
        path, roots = Path(artifact), self.config.runtime.model_roots
        if roots:
            path = path.resolve()  # where links and dots lead to, and what is opened then
            if not any(path.is_relative_to(Path(root).resolve()) for root in roots.split(":")):
                raise ConditionNotMet(
                    f"{shorten(artifact)!r} lies in none of the folders that artifacts may be "
                    "loaded from, see runtime.model_roots"
                )
        return Artifact.open(path, verify=False)  # the actor hashes what it opens

    def is_served(
        self, known: Version, artifact: Artifact, variant: str, require: Mapping[str, Any] | None
    ) -> bool:
        """Return whether a version is the artifact's, and of this variant if one is named.

        Raises:
            ConditionNotMet: It is, but does not meet `require`.
        """
        same = known.artifact.version == artifact.version
        if not same or variant not in ("", known.variant.id):
            return False
        if require is not None:
            if known.certificate is None:  # the source model may serve in its place
                raise ConditionNotMet(f"no certificate speaks of what serves {known.name!r}")
            require_certificate(artifact, known.variant.id, require)
        return True

    @contextmanager
    def changing(self, name: str, *, wait: bool = False) -> Iterator[None]:
        """Hold a name while it is being changed.

        Raises:
            UsageError: Another thread is at it, and `wait` is not set.
        """
        if self._closed:
            raise NotReady("the runtime is closed")
        with self._condition:
            while wait and name in self._changing:
                self._condition.wait()
            if name in self._changing:
                raise UsageError(f"another change of {shorten(name)!r} is under way")
            self._changing.add(name)
        try:
            yield
        finally:
            with self._condition:
                self._changing.discard(name)
                self._condition.notify_all()

    def add(
        self,
        artifact: Artifact,
        name: str,
        variant: str,
        require: Mapping[str, Any] | None,
        settings: Mapping[str, Any] | None,
        label: str = "",
    ) -> Version:
        """Return a version whose actors run, and that nobody can ask for until it is shown.

        `label`: what it is called, by default what its artifact is.
        """
        config = with_settings(self.config, settings or {}).actor
        chosen, load = self._choose(artifact, name, variant)
        # A certificate speaks of the graph as it was compiled, not of one optimised at load.
        own = [] if load.optimise else certificates(artifact, chosen.id)
        if require is not None:
            if load.optimise:
                raise ConditionNotMet(
                    "the variant was made for another processor class or engine version, and no "
                    "certificate speaks of the source model that would serve in its place"
                )
            own = [require_certificate(artifact, chosen.id, require)]
        # What was measured elsewhere says nothing of the source model's speed here.
        profile = () if load.optimise else chosen.latency
        label = label or self._unique(name, artifact)
        actors = tuple(f"{name}@{label}" + f"#{i}" * (i > 0) for i in range(config.replicas))
        version = Version(
            name,
            label,
            artifact,
            chosen,
            own[0].id if own else None,
            actors,
            used_at=time.monotonic(),
        )
        threads = config.threads or self._threads(chosen, name, config.replicas)
        self.scheduler.add(version.key, [Replica(actor, profile, threads) for actor in actors])
        load = msgspec.structs.replace(load, threads=threads)
        try:
            self._start_actors(actors, load)
        except BaseException:
            self._end(version)
            raise
        return version

    def show(self, version: Version, *, current: bool = True) -> None:
        """Have requests find a version: who asks for it, and if `current` who asks for none."""
        self.versions[version.name, version.version] = version
        if current:
            self.current[version.name] = version

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

    def unload(self, name: str, version: str = "") -> None:
        """See `Runtime.unload`."""
        with self.changing(self.find(name, version).name):
            self.remove(self.find(name, version), drain=False)

    def start(
        self, request: InferenceRequest, version: Version | None = None
    ) -> Future[InferenceResponse]:
        """Accept a request; cancelling the future takes it out of the queue if it has not begun."""
        future: Future[InferenceResponse] = Future()

        def done(outcome: InferenceResponse | LraiError) -> None:
            if not future.set_running_or_notify_cancel():
                return
            if isinstance(outcome, LraiError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        pending = self.accept(request, done, version)
        future.add_done_callback(
            lambda f: self.scheduler.cancel(pending) if f.cancelled() else None
        )
        return future

    def accept(
        self, request: InferenceRequest, done: Ended, version: Version | None = None
    ) -> Pending:
        """Accept a request; `done` is called once, in the scheduler's thread.

        `version`: who answers it, by default whom the request names.
        """
        if os.getpid() != self._owner:
            raise NotReady("this process was forked from the runtime's; open one of its own")
        priority = request.parameters.get("priority", 0)
        if not isinstance(priority, int):
            raise RequestError(f"priority is {shorten(repr(priority))}, an integer is needed")
        model, valid = self._enter(request, version)
        names = [model.signature.outputs[index].name for index in valid.outputs]

        def ended(arrays: list[Array] | None, error: LraiError | None) -> None:
            model.leave()
            done(
                error
                or InferenceResponse(
                    model_name=model.name,
                    model_version=model.version,
                    id=request.id,
                    outputs=dict(zip(names, arrays or [], strict=True)),
                    parameters={"variant": model.variant.id, "certificate": model.certificate},
                )
            )

        try:
            pending = self.scheduler.accept(model.key, valid, ended, request.timeout_ms, priority)
        except LraiError:
            model.leave()
            raise
        model.used_at = pending.arrival
        return pending

    def models(self) -> list[LoadedModel]:
        """See `Runtime.models`."""
        return [
            LoadedModel(
                name,
                version,
                model.variant.id,
                model.certificate,
                model.signature,
                state=self._state(model),
                actor_pids=self.pids(model),
            )
            for (name, version), model in list(self.versions.items())
        ]

    def ready(self) -> State:
        """See `Runtime.ready`."""
        order: list[State] = ["dead", "stalled", "ok", "idle"]
        states: set[State] = {self._state(model) for model in list(self.current.values())}
        states |= {"stalled"} if self._changing - self.current.keys() else set()
        nothing: State = "idle" if self.scheduler.accepting else "dead"
        return next((state for state in order if state in states), nothing)

    def stats(self) -> dict[str, int]:
        """See `Runtime.stats`."""
        return {
            **self.events.counts(),
            "outstanding_rows": self.scheduler.outstanding(),
            "dropped_frames": self._pool.dropped_frames,
        }

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

    def _enter(
        self, request: InferenceRequest, version: Version | None
    ) -> tuple[Version, ValidRequest]:
        """Return the version that takes the request, which it counts, and the request checked."""
        while True:
            model = version or self.find(request.model_name, request.model_version)
            valid = validate(request, model.signature, self.config.limits)
            if model.enter():
                return model, valid
            version = None  # another one has just taken its place

    def find(self, name: str, version: str = "") -> Version:
        """Return the version that serves a name, or the one of that name that is asked for.

        Raises:
            ModelNotFound: There is none.
        """
        if not name and len(self.current) == 1:
            name = next(iter(self.current))
        try:
            model = self.current[name]
        except KeyError:
            known = ", ".join(map(repr, self.current)) or "none"
            raise ModelNotFound(f"no model {shorten(name)!r} is loaded; loaded: {known}") from None
        if version in ("", model.version):
            return model
        try:
            return self.versions[name, version]
        except KeyError:
            raise ModelNotFound(
                f"model {name!r} has version {model.version}, not {shorten(version, 40)!r}"
            ) from None

    def _unique(self, name: str, artifact: Artifact) -> str:
        """Return the artifact's version, with a number where it is loaded under this name."""
        version, number = artifact.version, 1
        while (name, version) in self.versions:
            number += 1
            version = f"{artifact.version}-{number}"
        return version

    def _choose(self, artifact: Artifact, name: str, variant: str) -> tuple[Variant, Load]:
        manifest = artifact.manifest
        chosen = manifest.variant(variant or manifest.chosen)
        target = manifest.target
        here = (isa_class(), installed_version(chosen.engine))
        fits = here == (target.isa, target.engine_version)
        if not fits:
            self.events.emit(
                "variant_refused",
                name,
                variant=chosen.id,
                made_for=f"{target.isa}, {chosen.engine} {target.engine_version}",
                here=f"{here[0]}, {chosen.engine} {here[1]}",
            )
            chosen = manifest.variant("fp32")
        model = chosen.model if fits else manifest.source.file
        weights = chosen.weights if fits else str(Path(manifest.source.file).parent)
        files = artifact.files_of(chosen)
        files[model] = manifest.files[model]
        return chosen, Load(
            folder=str(artifact.path.absolute()),
            model=model,
            weights=weights,
            engine=chosen.engine,
            optimise=not fits,
            threads=0,  # as its settings say
            files={file: (entry.sha256, entry.size_bytes) for file, entry in files.items()},
            signature=manifest.signature,
        )

    def _threads(self, variant: Variant, name: str, replicas: int) -> int:
        """Return the engine threads of an actor: a share of the CPUs, one where calls are short."""
        alone = sorted(point.median_ms for point in variant.latency if point.rows == 1)
        if alone and alone[len(alone) // 2] < _ONE_THREAD_BELOW_MS:
            return 1
        return max(1, available_cpus() // len(self.current.keys() | {name}) // replicas)

    def _start_actors(self, actors: Sequence[str], load: Load) -> None:
        """Start the actors of a version, each on CPUs of its own where there are enough."""
        cpus = sorted(os.sched_getaffinity(0))
        share = len(cpus) // len(actors) if len(actors) > 1 else 0
        futures = []
        for i, actor in enumerate(actors):
            loaded: Future[None] = Future()
            own = msgspec.structs.replace(load, cpus=tuple(cpus[i * share : (i + 1) * share]))
            self.scheduler.call(partial(self._pool.add, actor, own, loaded))
            futures.append(loaded)
        try:
            for loaded in futures:
                loaded.result(self.config.actor.start_timeout_seconds + 5)
        except TimeoutError:
            raise EnvironmentProblem("the actor did not answer") from None

    def _end(self, version: Version) -> None:
        done = threading.Event()

        def run() -> None:
            self.scheduler.remove(version.key)
            for actor in version.actors:
                self._pool.remove(actor)
            done.set()

        self.scheduler.call(run)
        done.wait(10)

    def _state(self, version: Version) -> State:
        states = {self._pool.state(actor)[0] for actor in version.actors}
        if states == {"failed"} or not self.scheduler.accepting:
            return "dead"
        waited = self.scheduler.idle_seconds()
        if "ready" not in states or waited > self.config.actor.hang_seconds:
            return "stalled"
        return "ok" if self.scheduler.outstanding() else "idle"


def find_embedded() -> type[Embedded]:
    """Return what serves in one process: with deployments where `lrai_deployments` is there."""
    for entry in entry_points(group="lrai.backends", name="deployments"):
        return cast("type[Embedded]", entry.load())
    return Embedded


def _forget(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _socket_folder(parent: str) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="lrai-", dir=parent or None))  # mode 0700
    except OSError as error:
        where = parent or tempfile.gettempdir()
        raise EnvironmentProblem(
            f"no folder for sockets can be made in {where}: {error.strerror}; "
            "set runtime.socket_dir"
        ) from None
