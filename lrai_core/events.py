"""What happened to requests, models and variants, and who is told of it.

Emitting never waits and never fails: counting is done at once, observers are called by a thread of
their own from a bounded queue, and what an observer raises is counted, not passed on. What somebody
has to know who runs this is logged, too, as a warning of `lrai.runtime`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Final, Literal

Kind = (
    Literal["request_accepted", "request_refused", "request_answered", "request_failed"]
    | Literal["batch_dispatched", "batch_completed", "batch_retried", "planner_failed"]
    | Literal["actor_started", "actor_ready", "actor_lost", "actor_hung", "model_failed"]
    | Literal["variant_refused", "speed_changed", "limit_unreachable", "deployment_changed"]
    | Literal["shadow_compared", "shadow_differs", "shadow_failed"]
)


_log: Final = logging.getLogger("lrai.runtime")
_LOGGED = {"actor_hung", "actor_lost", "limit_unreachable"}
_LOGGED |= {"model_failed", "planner_failed", "variant_refused"}


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: What.
        model: Name of the model concerned.
        attributes: Figures and names, units in the keys.
        monotonic_s: When, on the monotonic clock.
    """

    kind: Kind
    model: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    monotonic_s: float = field(default_factory=time.monotonic)


Observers = Sequence[Callable[[Event], None]]


class EventBus:
    """Counts every event and hands it to the observers."""

    def __init__(self, observers: Observers = (), *, capacity: int = 10_000) -> None:
        self._observers, self._all = (*observers, _log_it), bool(observers)
        self._counts, self._capacity = Counter[str](), capacity
        self._queue: SimpleQueue[Event | None] = SimpleQueue()  # None ends it
        self._lock = threading.Lock()  # callers and the scheduler count at the same time
        self._thread = threading.Thread(target=self._deliver, name="lrai-events", daemon=True)

    def emit(self, kind: Kind, model: str = "", /, count: int = 1, **attributes: Any) -> None:
        """Count the event and queue it for the observers; the oldest is dropped when they lag."""
        with self._lock:
            self._counts[kind] += count
        if not self._all and kind not in _LOGGED:
            return
        if self._queue.qsize() >= self._capacity:
            with suppress(Empty):  # the thread was quicker
                self._queue.get_nowait()
                self._counts["events_dropped"] += 1
        self._queue.put(Event(kind, model, attributes))
        with self._lock, suppress(RuntimeError):  # where no thread can be had, the next one tries
            if not self._thread.ident:  # most runtimes have nothing to tell
                self._thread.start()

    def counts(self) -> dict[str, int]:
        """Return how often each kind was emitted, with `events_dropped` and `observer_errors`."""
        return dict(self._counts)

    def close(self) -> None:
        """Deliver what is queued, then stop."""
        self._queue.put(None)
        if self._thread.ident:
            self._thread.join(timeout=5)

    def _deliver(self) -> None:
        while (event := self._queue.get()) is not None:
            for observer in self._observers:
                try:
                    observer(event)
                except Exception:  # noqa: BLE001 - edge: an observer can never fail a request
                    self._counts["observer_errors"] += 1


def _log_it(event: Event) -> None:
    if event.kind in _LOGGED:
        told = ", ".join(f"{name} {value}" for name, value in event.attributes.items())
        _log.warning("%s: %s (%s)", event.model, event.kind.replace("_", " "), told)
