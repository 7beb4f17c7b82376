"""The runtime of one process: scheduler as a thread, actors as child processes."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
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
from lrai_core.protocol import Array, InferenceRequest, InferenceResponse, Signature
from lrai_core.runtime.forms import validate_by_form
from lrai_core.scheduler.scheduler import Pending, Replica, Scheduler
from lrai_core.verifier.certificate import certificates
from lrai_core.verifier.check import require_certificate
from lrai_core.wire.messages import Load

T = TypeVar("T")
State = Literal["ok", "idle", "stalled", "dead"]
_ONE_THREAD_BELOW_MS: Final = 2.0


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What serves under a name.

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
        self._lock = threading.Lock()  # of the names below
        self._models: dict[str, LoadedModel] = {}
        self._loading: set[str] = set()
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
        with self._lock:
            known = self._models.get(name)
            same = known and known.version == opened.version and variant in ("", known.variant)
            if known and shared and same:
                if require is not None:
                    if known.certificate is None:  # the source model may serve in its place
                        raise ConditionNotMet(f"no certificate speaks of what serves {name!r}")
                    require_certificate(opened, known.variant, require)
                return name
            if known or name in self._loading:
                raise UsageError(f"a model {shorten(name)!r} is loaded already")
            self._loading.add(name)
        try:
            self._models[name] = self._load(opened, name, variant, require)
        finally:
            self._loading.discard(name)
        return name

    def _load(
        self, artifact: Artifact, name: str, variant: str, require: Mapping[str, Any] | None
    ) -> LoadedModel:
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
        self.scheduler.add(name, [Replica(name, profile, load.threads)])
        self._start_actor(name, load)
        signature = artifact.manifest.signature
        return LoadedModel(
            name, artifact.version, chosen.id, certificate, signature, state="idle", actor_pid=None
        )

    def unload(self, name: str) -> None:
        """See `Runtime.unload`."""
        if self._closed:
            raise NotReady("the runtime is closed")
        name = self._model(name).name
        if self._models.pop(name, None) is not None:
            self._remove(name)

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
        model = self._model(request.model_name)
        if request.model_version and request.model_version != model.version:
            raise ModelNotFound(
                f"model {model.name!r} has version {model.version}, "
                f"not {shorten(request.model_version, 40)!r}"
            )
        priority = request.parameters.get("priority", 0)
        if not isinstance(priority, int):
            raise RequestError(f"priority is {shorten(repr(priority))}, an integer is needed")
        valid = validate_by_form(request, model.signature, self.config.limits)
        names = [model.signature.outputs[index].name for index in valid.outputs]

        def ended(arrays: list[Array] | None, error: LraiError | None) -> None:
            done(
                error
                or InferenceResponse(
                    model_name=model.name,
                    model_version=model.version,
                    id=request.id,
                    outputs=dict(zip(names, arrays or [], strict=True)),
                    parameters={"variant": model.variant, "certificate": model.certificate},
                )
            )

        return self.scheduler.accept(model.name, valid, ended, request.timeout_ms, priority)

    def models(self) -> list[LoadedModel]:
        """See `Runtime.models`."""
        return [
            replace(model, state=self._state(name), actor_pid=self._pool.state(name)[1])
            for name, model in list(self._models.items())
        ]

    def ready(self) -> State:
        """See `Runtime.ready`."""
        order: list[State] = ["dead", "stalled", "ok", "idle"]
        states: set[State] = {self._state(name) for name in list(self._models)}
        states |= {"stalled"} if self._loading else set()
        nothing: State = "idle" if self.scheduler.accepting else "dead"
        return next((state for state in order if state in states), nothing)

    def stats(self) -> dict[str, int]:
        """See `Runtime.stats`."""
        stats = {
            **self._events.counts(),
            "outstanding_rows": self.scheduler.outstanding(),
            "dropped_frames": self._pool.dropped_frames,
        }
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
        self._events.close()
        self._finalizer()

    def _model(self, name: str) -> LoadedModel:
        if not name and len(self._models) == 1:
            return next(iter(self._models.values()))
        try:
            return self._models[name]
        except KeyError:
            known = ", ".join(map(repr, self._models)) or "none"
            raise ModelNotFound(f"no model {shorten(name)!r} is loaded; loaded: {known}") from None

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
            threads=self._threads(chosen),
            files={file: (entry.sha256, entry.size_bytes) for file, entry in files.items()},
            signature=manifest.signature,
        )

    def _threads(self, variant: Variant) -> int:
        """Return the engine threads of an actor: a share of the CPUs, one where calls are short."""
        if self.config.actor.threads:
            return self.config.actor.threads
        alone = sorted(point.median_ms for point in variant.latency if point.rows == 1)
        if alone and alone[len(alone) // 2] < _ONE_THREAD_BELOW_MS:
            return 1
        return max(1, available_cpus() // (len(self._models) + 1))

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
