"""Models without a process of their own: the engine runs in the scheduler's thread.

Requests that are brought together run on the thread that brings them, see `here.py`.

For models that take less time than the way to another process. What that gives up: a model that
crashes takes this process with it, one that hangs stops every model of this runtime, and while it
runs nothing else is decided. So a runtime that processes share has none.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from pathlib import Path

from lrai_core.actor.actor import open_sessions
from lrai_core.actor.pool import Pool, answered
from lrai_core.config import ActorConfig
from lrai_core.engine.batching import coalesce
from lrai_core.engine.engine import Session
from lrai_core.errors import ArtifactError, EngineError, LraiError, OutOfResources
from lrai_core.events import EventBus
from lrai_core.wire.messages import Load, Refused
from lrai_core.wire.workers import Batch, Outcome


class InlinePool(Pool):
    """The pool of one process: an actor whose `Load` says so runs in it."""

    def __init__(self, folder: Path, config: ActorConfig, events: EventBus) -> None:
        """See `Pool`."""
        super().__init__(folder, config, events)
        self._inline: dict[str, tuple[Load, list[Session]]] = {}  # none while it is opened

    def add(self, name: str, load: Load, loaded: Future[None]) -> None:
        """See `Pool.add`; a model that runs here is opened beside the scheduler's thread."""
        if not load.inline:
            super().add(name, load, loaded)
            return
        self._inline[name] = load, []
        try:
            threading.Thread(target=self._open, args=(name, load, loaded), daemon=True).start()
        except RuntimeError as error:  # of those that this process may have; others go on
            del self._inline[name]
            loaded.set_exception(OutOfResources(str(error)))

    def _open(self, name: str, load: Load, loaded: Future[None]) -> None:
        started = time.monotonic()
        try:
            sessions = open_sessions(load)
        except LraiError as error:
            loaded.set_exception(error)
        except Exception as error:  # noqa: BLE001 - edge, as in an actor: nobody waits for ever
            loaded.set_exception(ArtifactError(f"the model cannot be opened: {error!r}"))
        else:
            if name in self._inline:  # else it was removed meanwhile
                self._inline[name] = load, sessions
            self._events.emit("actor_ready", name, load_seconds=time.monotonic() - started)
            loaded.set_result(None)

    def remove(self, name: str) -> None:
        """See `Pool.remove`."""
        if self._inline.pop(name, None) is None:
            super().remove(name)

    def opened(self, name: str) -> tuple[Load, list[Session]] | None:
        """Return a model that runs here and its variants, None where it does not."""
        load, sessions = self._inline.get(name, (None, []))
        return (load, sessions) if load and sessions else None

    def state(self, name: str) -> tuple[str, int | None]:
        """See `Workers.state`."""
        if (known := self._inline.get(name)) is None:
            return super().state(name)
        return ("ready" if known[1] else "starting"), None

    def next_check(self, now: float) -> float:
        """See `Workers.next_check`."""
        return now if self._outcomes else super().next_check(now)

    def dispatch(self, name: str, batch: Batch) -> None:
        """See `Workers.dispatch`; what runs here has its outcome when this returns."""
        if opened := self.opened(name):
            load, sessions = opened
            self._outcomes.append(run(load, sessions[batch.variant], batch))
        else:
            super().dispatch(name, batch)


def run(load: Load, session: Session, batch: Batch) -> Outcome:
    """Return the outcome of a call that runs on this thread."""
    wanted = batch.outputs()
    try:
        arrays = coalesce([request.arrays for request in batch.requests], load.signature)
        started = time.perf_counter()
        outputs = session.run(arrays, wanted)
        return answered(batch, outputs, time.perf_counter() - started, load)
    except EngineError as error:
        return Refused(batch.number, str(error), error.invalid)
    except Exception as error:  # noqa: BLE001 - edge, as in an actor: it is the batch's outcome
        return Refused(batch.number, type(error).__name__, invalid=False)
