"""What the scheduler and the pool of actors say to one another, inside one process.

The scheduler hands over batches and hears outcomes; it never sees a process or a socket. Every
batch that was dispatched has exactly one outcome.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import zmq

from lrai_core.protocol import Array, ValidRequest
from lrai_core.wire.messages import Refused


class Answered(NamedTuple):
    """The engine ran the batch: per request one array per output that it wanted."""

    batch: int
    answers: list[list[Array]]
    engine_seconds: float


class Batch(NamedTuple):
    """A call of one variant, for an actor."""

    number: int
    requests: Sequence[ValidRequest]
    predicted_seconds: float
    variant: int = 0

    def outputs(self) -> tuple[int, ...]:
        """Return the outputs that any of its requests wants, each once."""
        return tuple(sorted({index for request in self.requests for index in request.outputs}))


class Lost(NamedTuple):
    """The actor died with the batch in it, which it may not have begun; it may have been killed."""

    batch: int
    message: str
    begun: bool = True
    killed: bool = False


class GaveUp(NamedTuple):
    """The actor of that name cannot be brought back; nothing will run there any more."""

    actor: str
    message: str


Outcome = Answered | Refused | Lost | GaveUp


class Workers(Protocol):
    """The pool, as the scheduler uses it, always from the scheduler's thread.

    Actors go by the names under which they were added; several may run one model.
    """

    def register(self, poller: zmq.Poller) -> None:
        """Register whatever wakes `poll`, now and whenever it changes."""

    def poll(self, now: float, ready: Collection[object]) -> list[Outcome]:
        """Receive, supervise, restart; never wait. Return what came of dispatched batches.

        `ready`: the sockets, and numbers of files, of which the poller has said so.
        """

    def next_check(self, now: float) -> float:
        """Return when `poll` must run again even if nothing wakes it, on the monotonic clock.

        The scheduler asks before it waits, and has told everybody what there was to tell.
        """

    def state(self, name: str) -> tuple[str, int | None]:
        """Return what the actor is at, and its process id if any.

        If `ready` it takes batches, which it runs in order; if `failed` it was given up.
        """

    def dispatch(self, actor: str, batch: Batch) -> None:
        """Send an actor a call, behind those that it has."""
