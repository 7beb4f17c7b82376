"""The façade: open an artifact, send requests, get answers. Read this first.

A request takes this way: `infer` → `protocol.validate` → `Scheduler.accept` (admission, queue) →
`planner.plan` → `Pool.dispatch` → the actor's engine → split rows → the caller's future. Embedded,
all of it but the actor is in this process; attached, all of it but this façade is in the daemon,
which any number of processes share.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, cast

from lrai_core.artifact import Artifact
from lrai_core.config import LraiConfig, load_config
from lrai_core.errors import EnvironmentProblem, QueueFull, RequestError, UsageError, shorten
from lrai_core.events import Observers
from lrai_core.protocol import InferenceRequest, InferenceResponse
from lrai_core.runtime.embedded import find_backend
from lrai_core.runtime.version import Deployment, LoadedModel, Started, State

T = TypeVar("T")
Shares = Mapping[str, float]  # by version


class Backend(Protocol):
    """Where requests go: `Embedded`, or the client of a daemon (entry point `lrai.backends`)."""

    def start(self, request: InferenceRequest) -> Future[InferenceResponse]:
        """Accept a request; cancelling the future takes it out of the queue if it has not begun.

        It may begin no sooner than somebody waits for the future, or is to be called by it.
        """

    def start_all(self, requests: Sequence[InferenceRequest]) -> list[Started]:
        """See `Runtime.start_all`."""

    def call(self, operation: str, arguments: dict[str, Any], kind: type[T]) -> T:
        """Return what an operation gives, as an instance of `kind`."""

    def drain(self) -> bool:
        """See `Runtime.drain`."""

    def close(self) -> None:
        """See `Runtime.close`."""


class Runtime:
    """Scheduler and actors behind one object; thread-safe.

    Models run in processes of their own: their crash is a delay here. `close` when done, or use it
    as a context manager.
    """

    def __init__(
        self, config: LraiConfig | None = None, *, address: str = "", observers: Observers = ()
    ) -> None:
        """Start or attach; `load` brings models.

        Args:
            config: Settings; by default from `LRAI_*` and `lrai.toml`.
            address: By default `runtime.address`. `embedded`: scheduler in this process, actors as
                its children. `auto`: those of the daemon that all processes of this user share,
                which is started if there is none. A path: of the folder of another daemon.
                `tcp://HOST:PORT?keys=FOLDER`: those of a daemon of another machine, see `lrai
                runtime keys`; artifacts are then named by their paths there, from the root on.
            observers: Told of every event, embedded only.

        Raises:
            UsageError: The address is none, or its folder does not have the keys.
            EnvironmentProblem: The daemon cannot be started or reached, or refuses the key; or
                threads are no threads here.
        """
        if threading.Lock.__module__.startswith(("gevent", "eventlet")):  # who waits stops them all
            raise EnvironmentProblem("gevent or eventlet has patched threads: real ones are needed")
        self.config = config or load_config()
        address = address or self.config.runtime.address
        if not (here := address == "embedded") and observers:
            raise UsageError("observers hear the process that runs the scheduler: embedded only")
        self._results: dict[str, Future[InferenceResponse]] = {}
        self._lock = threading.Lock()
        kind, given = ("deployments", observers) if here else ("ipc", address)
        self._backend: Backend = find_backend(kind)(self.config, given)

    @classmethod
    def open(
        cls,
        artifact: str | Path | Artifact,
        *,
        address: str = "",
        require: Mapping[str, Any] | None = None,
        name: str = "",
        config: LraiConfig | None = None,
        observers: Observers = (),
    ) -> Self:
        """Return a runtime that serves `artifact`.

        Args:
            artifact: An artifact or the path of one, where the actors run.
            address: See `Runtime`.
            require: Refuse the artifact unless its variant has a certificate with `tier`,
                `epsilon`, `delta` and `confidence` at least this good.
            name: Model name; the artifact's by default.
            config: Settings; by default from `LRAI_*` and `lrai.toml`.
            observers: Told of every event.

        Raises:
            ArtifactError: The artifact cannot be used.
            ConditionNotMet: `require` is not met.
        """
        runtime = cls(config, address=address, observers=observers)
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
        settings: Mapping[str, Any] | None = None,
        share: float | None = None,
    ) -> str:
        """Start actors for the chosen variant, wait until they are ready, return the model's name.

        A variant made for another processor class or engine version is not used: the next variant
        that was made for what is here serves in its place, else the source model, with an event.
        Where several processes share a daemon, the first loads and the others find it loaded.

        Args:
            artifact: An artifact or the path of one.
            name: Model name; the artifact's by default.
            variant: Serve this variant instead of the chosen one.
            require: See `open`.
            settings: Of this model alone, by dotted key: `actor.replicas`, `actor.threads`.
            share: Load a further version of a name that serves already, for this share of its
                requests, 0 to 1.

        Raises:
            ConditionNotMet: `require` is not met, the name is frozen, or the artifact lies outside
                `runtime.model_roots`.
            MemoryBudgetExceeded: It does not fit `runtime.memory_mib`.
        """
        arguments: dict[str, Any] = {"name": name, "variant": variant, "require": require}
        arguments |= {"artifact": _folder(artifact), "settings": settings, "share": share}
        return self._backend.call("load", arguments, str)

    def swap(
        self,
        name: str,
        artifact: str | Path | Artifact,
        *,
        variant: str = "",
        require: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> str:
        """Have another version serve in place of all versions of a name; return that version.

        It is loaded beside them, and warmed up with rows of its own evaluation sample. Then it
        serves, and the others end once they have answered what they had accepted. If anything fails
        before that, they serve on.

        Args:
            name: Model name.
            artifact: An artifact or the path of one.
            variant: Serve this variant instead of the chosen one.
            require: See `open`.
            settings: See `load`.

        Raises:
            ConditionNotMet: `require` is not met, the name is frozen, or the version refused real
                rows or lost an actor while it was warmed up.
        """
        arguments = {"name": name, "variant": variant, "require": require, "settings": settings}
        return self._backend.call("swap", {"artifact": _folder(artifact), **arguments}, str)

    def route(
        self, name: str, shares: Shares, shadow: Shares | None = None, relief: str = ""
    ) -> None:
        """Divide the requests for a name among its versions; a request may still name a version.

        If a version with less than the largest share, a canary, fails significantly more often than
        the one with the largest, all requests go to that one, and the deployment is frozen.

        Args:
            name: Model name.
            shares: By version, adding up to 1; a version that is not named gets no requests, and
                stays loaded.
            shadow: A version, and the share of the requests that are copied to it, 0 to 1. Its
                answers are compared, and never returned.
            relief: A version, such as a cheaper variant, that takes requests which the others could
                not answer in the time that the request or `scheduler.latency_slo_ms` allows. As
                always, the reply names the version that answered.
        """
        arguments = {"name": name, "shares": dict(shares), "shadow": dict(shadow or {})}
        self._backend.call("route", arguments | {"relief": relief}, type(None))

    def rollback(self, name: str) -> str:
        """Go back to the version before the last `swap` or `route`; return that version.

        While several versions share the requests, it is the one that was there before the others.
        """
        return self._backend.call("rollback", {"name": name}, str)

    def freeze(self, name: str, by: str, reason: str) -> None:
        """Keep a deployment as it is until somebody unfreezes it, also over restarts."""
        self._backend.call("freeze", {"name": name, "by": by, "reason": reason}, type(None))

    def unfreeze(self, name: str, by: str, reason: str) -> None:
        """Allow a deployment to be changed again."""
        self._backend.call("unfreeze", {"name": name, "by": by, "reason": reason}, type(None))

    def deployments(self, *, save: bool = True) -> list[Deployment]:
        """Return every name with its versions and their shares.

        `save`: first write down what was seen of the requests, for whoever reads it.
        """
        return self._backend.call("deployments", {} if save else {"save": save}, list[Deployment])

    def unload(self, name: str, version: str = "", *, drain: bool = False) -> None:
        """Stop serving a model, or one version of it.

        One version of several answers what it has accepted. Otherwise what was accepted ends with
        an error, unless `drain` is set: then it is answered first, within `runtime.drain_seconds`.
        """
        arguments = {"name": name, "version": version} | ({"drain": drain} if drain else {})
        self._backend.call("unload", arguments, type(None))

    def start(self, request: InferenceRequest) -> Future[InferenceResponse]:
        """Accept a request and return the future of its answer.

        Cancelling it takes the request out of the queue if it has not begun. What is to be called
        when it is done runs in the thread that all answers come through, so it has to be quick.

        Raises:
            RequestError, NotReady: See `infer`; it is refused at once.
        """
        future = self._backend.start(request)
        future.add_done_callback(lambda _: None)  # begins what else begins when it is waited for
        return future

    def start_all(self, requests: Sequence[InferenceRequest]) -> list[Started]:
        """Accept requests that came together; return for each its future, or its outcome.

        An outcome, an answer or an error, is there at once if the request was refused, or if the
        model runs in this process: then this thread runs it.
        """
        return self._backend.start_all(requests)

    def infer(self, request: InferenceRequest) -> InferenceResponse:
        """Return the answer; blocks the calling thread, not the others.

        Raises:
            RequestError: The request does not fit the model, came too late or found the queue full.
            NotReady: Draining, closed, or the model's process failed beyond repair.
        """
        return self._backend.start(request).result()

    async def infer_async(self, request: InferenceRequest) -> InferenceResponse:
        """Return the answer without blocking the event loop; cancelling it cancels the request."""
        return await _awaitable(self._backend.start(request))

    def submit(self, request: InferenceRequest) -> str:
        """Accept a request and return the id under which `result` gives its answer, once."""
        identity, limit = request.id or os.urandom(8).hex(), self.config.scheduler.max_queue_rows
        with self._lock:
            if identity in self._results:
                raise RequestError(f"a request with id {shorten(identity)!r} is outstanding")
            if len(self._results) >= limit:
                words = f"{limit} results wait to be fetched"
                raise QueueFull(words, limit=limit, retry_after_seconds=1.0)
            self._results[identity] = self.start(request)
        return identity

    def result(self, identity: str, timeout_seconds: float | None = None) -> InferenceResponse:
        """Wait for the answer of a submitted request and forget it.

        Raises:
            TimeoutError: It is not there yet; ask again.
            RequestError: No such request, or its answer was fetched already.
        """
        if (future := self._results.get(identity)) is None:
            raise RequestError(f"no request {shorten(identity)!r} is outstanding")
        try:
            return future.result(timeout_seconds)
        finally:
            if future.done():
                self._results.pop(identity, None)

    def models(self) -> list[LoadedModel]:
        """Return what is loaded."""
        return self._backend.call("models", {}, list[LoadedModel])

    def ready(self) -> State:
        """Return the worst state of the models: `ok`, `idle`, `stalled` or `dead`.

        Ready means progress: `stalled` is said while a model is loading, being replaced, or has let
        accepted requests wait without an answer for longer than an actor may be silent.
        """
        return cast("State", self._backend.call("ready", {}, str))

    def stats(self) -> dict[str, int]:
        """Return how often each event happened, and the rows inside now as `outstanding_rows`."""
        return self._backend.call("stats", {}, dict[str, int])

    def drain(self) -> bool:
        """Refuse new requests, wait for the accepted ones; return whether all ended in time.

        Attached, it is this process's requests that are refused and waited for.
        """
        return self._backend.drain()

    def close(self) -> None:
        """Stop, or detach; what is still inside ends with an error. Drain first to let it end."""
        self._backend.close()

    def __enter__(self) -> Self:
        """Return the runtime."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def _awaitable(future: Future[InferenceResponse]) -> Awaitable[InferenceResponse]:
    # Not in there: of a request that fails the error's traceback would keep it.
    return future if isinstance(future, Awaitable) else asyncio.wrap_future(future)


def _folder(artifact: str | Path | Artifact) -> str:
    if isinstance(artifact, Artifact):
        return str(artifact.path.absolute())
    if "://" in str(artifact):
        raise UsageError(f"{shorten(str(artifact))!r}: a folder is needed; nothing is fetched")
    return str(Path(artifact).absolute())
