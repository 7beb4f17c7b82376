"""The façade: open an artifact, send requests, get answers. Read this first.

A request takes this way: `infer` → `protocol.validate` → `Scheduler.submit` (admission, queue) →
`planner.plan` → `Pool.dispatch` → the actor's engine → split rows → the caller's future.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

from lrai_core.actor.pool import Pool
from lrai_core.artifact import Artifact, Variant
from lrai_core.config import LraiConfig, available_cpus, load_config
from lrai_core.engine.engine import installed_version, isa_class
from lrai_core.errors import (
    ActorError,
    ConditionNotMet,
    EnvironmentProblem,
    ModelNotFound,
    NotReady,
    QueueFull,
    RequestError,
    UsageError,
    shorten,
)
from lrai_core.events import EventBus, Observer
from lrai_core.protocol import Array, InferenceRequest, InferenceResponse, Signature, validate
from lrai_core.scheduler.scheduler import Replica, Scheduler
from lrai_core.verifier.certificate import certificates
from lrai_core.verifier.check import require_certificate
from lrai_core.wire.messages import Load

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


@dataclass(frozen=True, slots=True)
class _Model:
    name: str
    version: str
    variant: str
    certificate: str | None
    signature: Signature


class Runtime:
    """Scheduler and actors of one process, behind one object; thread-safe.

    Models run in processes of their own: their crash is a delay here. `close` when done, or use it
    as a context manager.
    """

    def __init__(
        self, config: LraiConfig | None = None, *, observers: Sequence[Observer] = ()
    ) -> None:
        """Start scheduler and sockets; `load` brings models."""
        self.config = config or load_config()
        self._events = EventBus(observers)
        self._folder = _socket_folder(self.config.runtime.socket_dir)
        self._finalizer = weakref.finalize(self, _forget, self._folder, os.getpid())
        self._lock = threading.Lock()  # of the names below
        self._models: dict[str, _Model] = {}
        self._loading: set[str] = set()
        self._results: dict[str, Future[InferenceResponse]] = {}
        self._owner = os.getpid()
        self._closed = False
        self._pool = Pool(self._folder, self.config.actor, self._events)
        self._scheduler = Scheduler(self.config.scheduler, self._pool, self._events)
        self._scheduler.start()

    @classmethod
    def open(
        cls,
        artifact: str | Path | Artifact,
        *,
        address: str = "embedded",
        require: Mapping[str, Any] | None = None,
        name: str = "",
        config: LraiConfig | None = None,
        observers: Sequence[Observer] = (),
    ) -> Self:
        """Return a runtime that serves `artifact`.

        Args:
            artifact: An artifact or the path of one.
            address: `embedded`: scheduler in this process, actors as its children.
            require: Refuse the artifact unless its variant has a certificate with `tier`,
                `epsilon`, `delta` and `confidence` at least this good.
            name: Model name; the artifact's by default.
            config: Settings; by default from `LRAI_*` and `lrai.toml`.
            observers: Told of every event.

        Raises:
            ArtifactError: The artifact cannot be used.
            ConditionNotMet: `require` is not met.
        """
        if address != "embedded":
            raise UsageError(f"address {shorten(address)!r}: this version runs 'embedded' only")
        runtime = cls(config, observers=observers)
        try:
            runtime.load(artifact, name=name, require=require)
        except BaseException:
            runtime.close()
            raise
        return runtime

    def load(
        self,
        artifact: str | Path | Artifact,
        *,
        name: str = "",
        variant: str = "",
        require: Mapping[str, Any] | None = None,
    ) -> str:
        """Start an actor for the chosen variant, wait until it is ready, return the model's name.

        A variant made for another processor class or engine version is not used: the source model
        serves in its place, with an event.

        Args:
            artifact: An artifact or the path of one.
            name: Model name; the artifact's by default.
            variant: Serve this variant instead of the chosen one.
            require: See `open`.
        """
        if not isinstance(artifact, Artifact):
            artifact = Artifact.open(artifact, verify=False)  # the actor hashes what it opens
        name = name or artifact.manifest.name
        with self._lock:
            if name in self._models or name in self._loading:
                raise UsageError(f"a model {shorten(name)!r} is loaded already")
            self._loading.add(name)
        try:
            self._models[name] = self._load(artifact, name, variant, require)
        finally:
            self._loading.discard(name)
        return name

    def _load(
        self, artifact: Artifact, name: str, variant: str, require: Mapping[str, Any] | None
    ) -> _Model:
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
        self._scheduler.add(name, [Replica(name, profile, load.threads)])
        self._start_actor(name, load)
        return _Model(name, artifact.version, chosen.id, certificate, artifact.manifest.signature)

    def unload(self, name: str) -> None:
        """Stop serving a model; its unanswered requests end with an error."""
        if self._closed:
            raise NotReady("the runtime is closed")
        name = self._model(name).name
        if self._models.pop(name, None) is not None:
            self._remove(name)

    def infer(self, request: InferenceRequest) -> InferenceResponse:
        """Return the answer; blocks the calling thread, not the others.

        Raises:
            RequestError: The request does not fit the model, came too late or found the queue full.
            NotReady: Draining, closed, or the model's process failed beyond repair.
        """
        return self._start(request).result()

    async def infer_async(self, request: InferenceRequest) -> InferenceResponse:
        """Return the answer without blocking the event loop; cancelling it cancels the request."""
        return await asyncio.wrap_future(self._start(request))

    def submit(self, request: InferenceRequest) -> str:
        """Accept a request and return the id under which `result` gives its answer, once."""
        identity = request.id or os.urandom(8).hex()
        limit = self.config.scheduler.max_queue_rows
        with self._lock:
            if identity in self._results:
                raise RequestError(f"a request with id {shorten(identity)!r} is outstanding")
            if len(self._results) >= limit:
                raise QueueFull(
                    f"{limit} results wait to be fetched", limit=limit, retry_after_seconds=1.0
                )
            self._results[identity] = self._start(request)
        return identity

    def result(self, identity: str, timeout_seconds: float | None = None) -> InferenceResponse:
        """Wait for the answer of a submitted request and forget it.

        Raises:
            TimeoutError: It is not there yet; ask again.
            RequestError: No such request, or its answer was fetched already.
        """
        try:
            future = self._results[identity]
        except KeyError:
            raise RequestError(f"no request {shorten(identity)!r} is outstanding") from None
        try:
            return future.result(timeout_seconds)
        finally:
            if future.done():
                self._results.pop(identity, None)

    def models(self) -> list[LoadedModel]:
        """Return what is loaded."""
        return [
            LoadedModel(
                name=model.name,
                version=model.version,
                variant=model.variant,
                certificate=model.certificate,
                signature=model.signature,
                state=self._state(model.name),
                actor_pid=self._pool.state(model.name)[1],
            )
            for model in list(self._models.values())
        ]

    def ready(self) -> State:
        """Return the worst state of the models: `ok`, `idle`, `stalled` or `dead`.

        Ready means progress: `stalled` is said while a model is loading, being replaced, or has let
        accepted requests wait without an answer for longer than an actor may be silent.
        """
        order: list[State] = ["dead", "stalled", "ok", "idle"]
        states: set[State] = {self._state(name) for name in list(self._models)}
        states |= {"stalled"} if self._loading else set()
        return next((state for state in order if state in states), "idle")

    def stats(self) -> dict[str, int]:
        """Return how often each event happened, and the rows inside now as `outstanding_rows`."""
        return {
            **self._events.counts(),
            "outstanding_rows": self._scheduler.outstanding(),
            "dropped_frames": self._pool.dropped_frames,
        }

    def drain(self) -> bool:
        """Refuse new requests, wait for the accepted ones; return whether all ended in time."""
        return self._scheduler.drain(self.config.runtime.drain_seconds)

    def close(self) -> None:
        """Stop everything; what is still inside ends with an error. Drain first to let it end."""
        if self._closed or os.getpid() != self._owner:  # a fork's copy is not the runtime
            return
        self._closed = True
        self._scheduler.close()
        self._pool.close()
        self._events.close()
        self._finalizer()

    def __enter__(self) -> Self:
        """Return the runtime."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _start(self, request: InferenceRequest) -> Future[InferenceResponse]:
        if os.getpid() != self._owner:
            raise NotReady("this process was forked from the runtime's; open one of its own")
        model = self._model(request.model_name)
        if request.model_version and request.model_version != model.version:
            raise ModelNotFound(
                f"model {model.name!r} has version {model.version}, "
                f"not {shorten(request.model_version, 40)!r}"
            )
        valid = validate(request, model.signature, self.config.limits)
        inner = self._scheduler.submit(model.name, valid, request.timeout_ms)
        outer: Future[InferenceResponse] = Future()
        names = [model.signature.outputs[index].name for index in valid.outputs]

        def settle(done: Future[list[Array]]) -> None:
            if done.cancelled() or not outer.set_running_or_notify_cancel():
                return
            if error := done.exception():
                outer.set_exception(error)
            elif len(done.result()) != len(names):
                outer.set_exception(ActorError("the model's process answered other outputs"))
            else:
                outer.set_result(
                    InferenceResponse(
                        model_name=model.name,
                        model_version=model.version,
                        id=request.id,
                        outputs=dict(zip(names, done.result(), strict=True)),
                        parameters={"variant": model.variant, "certificate": model.certificate},
                    )
                )

        inner.add_done_callback(settle)
        outer.add_done_callback(lambda done: done.cancelled() and inner.cancel())
        return outer

    def _model(self, name: str) -> _Model:
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
        self._scheduler.call(lambda: self._pool.add(name, load, loaded))
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
            self._scheduler.remove(name)
            self._pool.remove(name)
            done.set()

        self._scheduler.call(run)
        done.wait(10)

    def _state(self, name: str) -> State:
        state, _ = self._pool.state(name)
        if state == "failed" or self._closed or not self._scheduler.alive:
            return "dead"
        waited = self._scheduler.idle_seconds()
        if state != "ready" or waited > self.config.actor.hang_seconds:
            return "stalled"
        return "ok" if self._scheduler.outstanding() else "idle"


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
