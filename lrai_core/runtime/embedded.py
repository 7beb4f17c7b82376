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
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from lrai_core.actor.pool import Pool
from lrai_core.artifact import Artifact, Variant
from lrai_core.config import ActorConfig, LraiConfig, available_cpus
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
        actor_pid: Process of the actor, None while it is being replaced.
    """

    name: str
    version: str
    variant: str
    certificate: str | None
    signature: Signature
    state: State
    actor_pid: int | None


Ended = Callable[[InferenceResponse | LraiError], None]


@dataclass(slots=True, eq=False)
class Version:
    """One version of a model, with its actors running.

    Attributes:
        version: The artifact's, made unique among those of the name.
        inside: Requests accepted and not yet ended.
    """

    name: str
    version: str
    artifact: Artifact
    variant: Variant
    certificate: str | None
    inside: int = 0
    _retired: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def key(self) -> str:
        """Return its name in scheduler, pool and events."""
        return f"{self.name}@{self.version}"

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

    def retire(self) -> None:
        """Take no more requests."""
        with self._lock:
            self._retired = True


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
        self._events = EventBus(observers)
        self.folder = _socket_folder(config.runtime.socket_dir)
        self._finalizer = weakref.finalize(self, _forget, self.folder, os.getpid())
        self._condition = threading.Condition()  # of what is being changed
        self._changing: set[str] = set()
        self._current: dict[str, Version] = {}  # what serves who asks for no version
        self._versions: dict[tuple[str, str], Version] = {}  # what may be asked for
        self._owner = os.getpid()
        self._closed = False
        self._pool = pool(self.folder, config.actor, self._events)
        self.scheduler = Scheduler(config.scheduler, self._pool, self._events)
        self.scheduler.start()

    def call(self, operation: str, arguments: dict[str, Any], kind: type[T]) -> T:
        """Return what an operation gives, by its name, as over the wire."""
        del kind
        result: T = getattr(self, operation)(**arguments)
        return result

    def load(
        self,
        artifact: str,
        *,
        name: str = "",
        variant: str = "",
        require: Mapping[str, Any] | None = None,
        shared: bool = False,
    ) -> str:
        """See `Runtime.load`. `shared`: to find the same version and variant loaded is no error."""
        opened = Artifact.open(artifact, verify=False)  # the actor hashes what it opens
        name = name or opened.manifest.name
        with self.changing(name, wait=shared):
            known = self._current.get(name)
            if known and shared and is_same(known, opened, variant):
                if require is not None:
                    if known.certificate is None:  # the source model may serve in its place
                        raise ConditionNotMet(f"no certificate speaks of what serves {name!r}")
                    require_certificate(opened, known.variant.id, require)
            elif known:
                raise UsageError(f"a model {shorten(name)!r} is loaded already")
            else:
                self.show(self.add(opened, name, variant, require))
        return name

    def swap(
        self,
        name: str,
        artifact: str,
        *,
        variant: str = "",
        require: Mapping[str, Any] | None = None,
    ) -> str:
        """See `Runtime.swap`."""
        opened = Artifact.open(artifact, verify=False)
        with self.changing(name):
            old = self._model(name)
            new = self.add(opened, name, variant, require)
            self.show(new)
            self.remove(old)
        return new.version

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
        self, artifact: Artifact, name: str, variant: str, require: Mapping[str, Any] | None
    ) -> Version:
        """Return a version whose actors run, and that nobody can ask for until it is shown."""
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
        certificate = own[0].id if own else None
        # What was measured elsewhere says nothing of the source model's speed here.
        profile = () if load.optimise else chosen.latency
        version = Version(name, self._unique(name, artifact), artifact, chosen, certificate)
        self.scheduler.add(version.key, [Replica(version.key, profile, load.threads)])
        self._start_actor(version.key, load)
        return version

    def show(self, version: Version) -> None:
        """Have a version serve who asks for its name, in place of the one that does."""
        self._versions[version.name, version.version] = version
        self._current[version.name] = version

    def remove(self, version: Version, *, drain: bool = True) -> None:
        """Let what a version has accepted end, within the time for draining; end its actors."""
        self._versions.pop((version.name, version.version), None)
        if self._current.get(version.name) is version:
            del self._current[version.name]
        version.retire()
        deadline = time.monotonic() + self.config.runtime.drain_seconds * drain
        while version.inside and time.monotonic() < deadline:
            time.sleep(0.005)
        self._remove(version.key)

    def unload(self, name: str) -> None:
        """See `Runtime.unload`."""
        with self.changing(self._model(name).name):
            self.remove(self._model(name), drain=False)

    def start(self, request: InferenceRequest) -> Future[InferenceResponse]:
        """Accept a request; cancelling the future takes it out of the queue if it has not begun."""
        future: Future[InferenceResponse] = Future()

        def done(outcome: InferenceResponse | LraiError) -> None:
            if not future.set_running_or_notify_cancel():
                return
            if isinstance(outcome, LraiError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        pending = self.accept(request, done)
        future.add_done_callback(
            lambda f: self.scheduler.cancel(pending) if f.cancelled() else None
        )
        return future

    def accept(self, request: InferenceRequest, done: Ended) -> Pending:
        """Accept a request; `done` is called once, in the scheduler's thread."""
        if os.getpid() != self._owner:
            raise NotReady("this process was forked from the runtime's; open one of its own")
        priority = request.parameters.get("priority", 0)
        if not isinstance(priority, int):
            raise RequestError(f"priority is {shorten(repr(priority))}, an integer is needed")
        model, valid = self._enter(request)
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
            return self.scheduler.accept(model.key, valid, ended, request.timeout_ms, priority)
        except LraiError:
            model.leave()
            raise

    def models(self) -> list[LoadedModel]:
        """See `Runtime.models`."""
        return [
            LoadedModel(
                name,
                version,
                model.variant.id,
                model.certificate,
                model.signature,
                state=self._state(model.key),
                actor_pid=self._pool.state(model.key)[1],
            )
            for (name, version), model in list(self._versions.items())
        ]

    def ready(self) -> State:
        """See `Runtime.ready`."""
        order: list[State] = ["dead", "stalled", "ok", "idle"]
        states: set[State] = {self._state(model.key) for model in list(self._current.values())}
        states |= {"stalled"} if self._changing - self._current.keys() else set()
        nothing: State = "idle" if self.scheduler.accepting else "dead"
        return next((state for state in order if state in states), nothing)

    def stats(self) -> dict[str, int]:
        """See `Runtime.stats`."""
        return {
            **self._events.counts(),
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
        self._events.close()
        self._finalizer()

    def _enter(self, request: InferenceRequest) -> tuple[Version, ValidRequest]:
        """Return the version that takes the request, which it counts, and the request checked."""
        while True:
            model = self._model(request.model_name, request.model_version)
            valid = validate(request, model.signature, self.config.limits)
            if model.enter():  # else another one has just taken its place
                return model, valid

    def _model(self, name: str, version: str = "") -> Version:
        if not name and len(self._current) == 1:
            name = next(iter(self._current))
        try:
            model = self._current[name]
        except KeyError:
            known = ", ".join(map(repr, self._current)) or "none"
            raise ModelNotFound(f"no model {shorten(name)!r} is loaded; loaded: {known}") from None
        if version in ("", model.version):
            return model
        try:
            return self._versions[name, version]
        except KeyError:
            raise ModelNotFound(
                f"model {name!r} has version {model.version}, not {shorten(version, 40)!r}"
            ) from None

    def _unique(self, name: str, artifact: Artifact) -> str:
        """Return the artifact's version, with a number where it is loaded under this name."""
        version, number = artifact.version, 1
        while (name, version) in self._versions:
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
            self._events.emit(
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
            threads=self._threads(chosen, name),
            files={file: (entry.sha256, entry.size_bytes) for file, entry in files.items()},
            signature=manifest.signature,
        )

    def _threads(self, variant: Variant, name: str) -> int:
        """Return the engine threads of an actor: a share of the CPUs, one where calls are short."""
        if self.config.actor.threads:
            return self.config.actor.threads
        alone = sorted(point.median_ms for point in variant.latency if point.rows == 1)
        if alone and alone[len(alone) // 2] < _ONE_THREAD_BELOW_MS:
            return 1
        return max(1, available_cpus() // len(self._current.keys() | {name}))

    def _start_actor(self, name: str, load: Load) -> None:
        loaded: Future[None] = Future()
        self.scheduler.call(lambda: self._pool.add(name, load, loaded))
        try:
            loaded.result(self.config.actor.start_timeout_seconds + 5)
        except BaseException as error:
            self._remove(name)
            if isinstance(error, TimeoutError):
                raise EnvironmentProblem("the actor did not answer") from None
            raise

    def _remove(self, name: str) -> None:
        done = threading.Event()

        def run() -> None:
            self.scheduler.remove(name)
            self._pool.remove(name)
            done.set()

        self.scheduler.call(run)
        done.wait(10)

    def _state(self, name: str) -> State:
        state, _ = self._pool.state(name)
        if state == "failed" or not self.scheduler.accepting:
            return "dead"
        waited = self.scheduler.idle_seconds()
        if state != "ready" or waited > self.config.actor.hang_seconds:
            return "stalled"
        return "ok" if self.scheduler.outstanding() else "idle"


def is_same(model: Version, artifact: Artifact, variant: str) -> bool:
    """Return whether a version is the artifact's, and of this variant if one is named."""
    same = model.artifact.version == artifact.version
    return same and variant in ("", model.variant.id)


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
