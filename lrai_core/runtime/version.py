"""A version of a model as it runs, and what is told of versions and of the names they serve."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from lrai_core.artifact import Artifact, Variant
from lrai_core.config import SchedulerConfig
from lrai_core.errors import LraiError
from lrai_core.protocol import Array, InferenceRequest, InferenceResponse, Signature, ValidRequest

State = Literal["ok", "idle", "stalled", "dead"]
Ended = Callable[[InferenceResponse | LraiError], None]
Answer = Future[InferenceResponse]  # that is to come
Started = Answer | InferenceResponse | LraiError


def settle(future: Answer, outcome: InferenceResponse | LraiError) -> None:
    """End a future with its outcome, unless it was cancelled."""
    if future.set_running_or_notify_cancel():
        if isinstance(outcome, LraiError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def started(start: Callable[[InferenceRequest], Answer], request: InferenceRequest) -> Started:
    """Return the future of a request, or the error that it was refused with."""
    try:
        return start(request)
    except LraiError as error:
        return error


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
        relief: The version that takes what the others could not answer in time, empty for none.
        previous: The version that `rollback` goes back to, empty where there is none.
        artifact: Path of what serves most requests, where the runtime runs.
        traffic: Folder there of what was captured of its requests, up to now; empty where nothing
            is kept.
        away: Nobody serves it now: it made room for others, and serves again, as is said here, for
            who loads what served.
    """

    name: str
    shares: dict[str, float]
    shadow: dict[str, float]
    relief: str
    previous: str
    frozen: Freeze | None
    artifact: str = ""
    traffic: str = ""
    away: bool = False


@dataclass(slots=True, eq=False)
class Version:
    """One version of a model, with its actors running.

    Attributes:
        version: The artifact's, made unique among those of the name.
        actors: Their names.
        limits: Of its calls and of its requests' time.
        beside: Variants that take the calls at which they are faster, each with its certificate.
        inside: Requests accepted and not yet ended.
        used_at: When the last one was accepted, on the monotonic clock.
        watch: Sees every request that it takes.
    """

    name: str
    version: str
    artifact: Artifact
    variant: Variant
    certificate: str | None
    actors: tuple[str, ...]
    limits: SchedulerConfig
    beside: tuple[tuple[Variant, str | None], ...] = ()
    inside: int = 0
    used_at: float = 0.0
    watch: Callable[[ValidRequest], None] | None = None
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

    def response(
        self, identity: str, wanted: Sequence[int], arrays: Sequence[Array], by: int = 0
    ) -> InferenceResponse:
        """Return the answer to a request that wanted the outputs of these indices.

        `by`: the variant that gave it, or one of those beside it.
        """
        variant, certificate = ((self.variant, self.certificate), *self.beside)[by]
        names = [self.signature.outputs[index].name for index in wanted]
        return InferenceResponse(
            model_name=self.name,
            model_version=self.version,
            id=identity,
            outputs=dict(zip(names, arrays, strict=True)),
            parameters={"variant": variant.id, "certificate": certificate},
        )

    def enter(self) -> bool:
        """Count a request in; return False where none are taken any more."""
        with self._lock:
            self.inside += not self._retired
            return not self._retired

    def leave(self) -> None:
        """Count a request out, however it ended."""
        with self._lock:
            self.inside -= 1

    def retire(self, *, idle: bool = False, retired: bool = True) -> bool:
        """Take no more requests, with `idle` only if none is inside; return whether it is so.

        Not `retired`: take them again.
        """
        with self._lock:
            self._retired = retired and (self._retired or not (idle and self.inside))
            return self._retired
