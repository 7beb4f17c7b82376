"""A version of a model as it runs, and what is told of versions and of the names they serve."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from lrai_core.artifact import Artifact, Variant
from lrai_core.errors import LraiError
from lrai_core.protocol import InferenceResponse, Signature, ValidRequest

State = Literal["ok", "idle", "stalled", "dead"]
Ended = Callable[[InferenceResponse | LraiError], None]


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


@dataclass(slots=True, eq=False)
class Version:
    """One version of a model, with its actors running.

    Attributes:
        version: The artifact's, made unique among those of the name.
        actors: Their names.
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
