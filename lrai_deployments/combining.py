"""Flat combining: one of those that wait runs the calls, for all of them.

Who waits for an answer while nobody computes does it himself, in calls for all that wait, until he
has his own; then the next who waits takes over. So a lone request is handed to no other thread, and
what comes while a call runs shares the next one. A coroutine cannot wait: where there is one CPU
the event loop computes, a call at a time between its other work, as a thread would only take turns
with it; else a thread does.

Source: Hendler, Incze, Shavit and Tzafrir 2010, "Flat combining and the synchronization-parallelism
tradeoff".
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from threading import get_ident
from typing import Any, Final

from lrai_core import InferenceResponse
from lrai_core.config import available_cpus

Loop = asyncio.AbstractEventLoop
# Of an event loop, between two calls: an HTTP request has some ten from its first byte to its last.
_ROUNDS: Final = 5
_LOOP_SECONDS: Final = 0.05  # between looks whether a loop that leads does


class Helped(Future[InferenceResponse]):
    """An answer that is computed by who waits for it, or soon where it has a callback.

    Attributes:
        index: Under which it waits.
        woken: It is done, or who waits for it is to lead.
        waiters: Threads that wait for it.
        leading: One of them leads.
        told: Somebody is told when it is done.
        loop: Where that was said, if it may lead.
    """

    def __init__(self, combiner: Combiner, index: int) -> None:
        super().__init__()
        self._combiner, self.index = combiner, index
        self.woken, self.waiters, self.leading = threading.Event(), 0, False
        self.told = False
        self.loop: Loop | None = None

    def result(self, timeout: float | None = None) -> InferenceResponse:
        """See `Future.result`."""
        self._combiner.wait(self, timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """See `Future.exception`."""
        self._combiner.wait(self, timeout)
        return super().exception(0)

    def add_done_callback(self, fn: Callable[[Future[InferenceResponse]], Any]) -> None:
        """See `Future.add_done_callback`."""
        super().add_done_callback(fn)
        self._combiner.run_soon(self)

    def __await__(self) -> Generator[Any, None, InferenceResponse]:
        """Wait in an event loop, as `asyncio.wrap_future` does.

        Where that loop computed the answer it need not be woken, which takes calls of the system.
        """
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()

        def tell() -> None:
            if not waiter.done():
                waiter.set_result(None)

        def done(_: object) -> None:
            if _loop_here() is loop:
                tell()
            elif not loop.is_closed():
                loop.call_soon_threadsafe(tell)

        self.add_done_callback(done)
        try:
            yield from waiter
        except asyncio.CancelledError:
            self.cancel()
            raise
        if self.cancelled():
            raise asyncio.CancelledError
        try:
            return super().result(0)
        finally:  # an error's traceback would keep the request until the collector comes
            del self

    def cancel(self) -> bool:
        """See `Future.cancel`."""
        cancelled = super().cancel()
        if cancelled:
            self.woken.set()
            self._combiner.withdraw(self.index)
        return cancelled


class Combiner:
    """Who leads: a future, which means one that waits for it, an event loop, or its own thread.

    Attributes:
        door: Held by whoever looks at, or changes, what waits.
        waiting: By index, in order of arrival.
    """

    def __init__(self, step: Callable[[], None], withdraw: Callable[[int], None]) -> None:
        """Lead nothing yet.

        Args:
            step: Runs the next call; what that ends, it takes out of `waiting`.
            withdraw: Takes out what was cancelled.
        """
        self.door, self.waiting = threading.Lock(), dict[int, Helped]()
        self._step, self.withdraw = step, withdraw
        self._leader: Helped | Loop | threading.Thread | None = None
        self._one_cpu: Final = available_cpus() == 1
        self._work, self._thread = threading.Semaphore(0), threading.Thread()
        self._closed, self._steps, self._turn = False, 0, 0  # calls that were run; loops that led
        self._inside = set[int]()  # threads that run a call, or tell of one

    def close(self) -> None:
        """End the thread, once nothing waits: it would keep the engine for ever."""
        with self.door:
            self._closed = True
        self._work.release()

    def wait(self, mine: Helped, timeout: float | None) -> None:
        """Return when a request is done, having led where nobody else did; or after the time.

        Who leads in a loop may be kept from it, by other work there or by waiting for this thread:
        where nothing has run for a while, this thread leads instead.
        """
        end = math.inf if timeout is None else time.monotonic() + timeout
        stuck: Loop | None = None
        while not mine.done():
            with self.door:
                lead = not self._is_led() or (self._leader is mine and not mine.leading)
                # Or what is told of an answer asks in here for another.
                lead = lead or self._leader in (_loop_here(), stuck) or get_ident() in self._inside
                if lead:
                    self._leader, mine.leading = mine, True
                mine.woken.clear()
                mine.waiters += 1
                loop, steps = self._leader if isinstance(self._leader, Loop) else None, self._steps
            late = True  # nobody may come back to wait
            try:
                while lead and not mine.done() and time.monotonic() < end:
                    self._run()
                left = min(end - time.monotonic(), math.inf if loop is None else _LOOP_SECONDS)
                woken = mine.done() or mine.woken.wait(None if left == math.inf else max(0.0, left))
                late = not woken and time.monotonic() >= end
            finally:
                with self.door:
                    mine.waiters -= 1
                    mine.leading = mine.leading and not lead
                    mine.told = mine.told or late
                    gone = mine.done() or (late and not mine.waiters)
                    if (lead or gone) if self._leader is mine else not self._is_led():
                        self._appoint()
            if late:
                return
            stuck = None if woken or self._inside or steps != self._steps else loop
        if self._leader is mine:  # it was cancelled after it was appointed, before it led
            with self.door:
                if self._leader is mine and not mine.waiters:
                    self._appoint()

    def _run(self) -> None:
        here, first = get_ident(), get_ident() not in self._inside
        self._inside.add(here)
        try:
            self._step()
        finally:
            self._steps += 1
            if first:
                self._inside.discard(here)

    def run_soon(self, mine: Helped) -> None:
        """Have a request run that somebody is to be told of."""
        if self._one_cpu:
            mine.loop = _loop_here()
        with self.door:
            mine.told = True
            other = isinstance(self._leader, Loop) and self._leader is not mine.loop
            if not mine.done() and ((other and not self._inside) or not self._is_led()):
                self._appoint()

    def _is_led(self) -> bool:
        """Whether somebody leads, a loop or a thread that runs. The door is held."""
        leader = self._leader
        if isinstance(leader, Loop):
            return leader.is_running()
        if isinstance(leader, Helped):
            return leader.waiters > 0  # else nobody comes back to lead
        return leader is not None and leader.is_alive()

    def _appoint(self) -> None:
        """Have somebody lead while something waits. The door is held."""
        waiting = self.waiting.values()
        heir = next((one for one in waiting if one.waiters), None)
        told = {one.loop for one in waiting if one.told}
        # One that leads for another loop may itself be waiting for what only that one can do.
        loop = next(iter(told)) if len(told) == 1 else None
        if heir is not None:
            self._leader = heir
            heir.woken.set()
        elif loop is not None and loop.is_running():
            self._leader, self._turn = loop, self._turn + 1
            # In its own thread it need not be woken, which takes two calls of the system.
            soon = loop.call_soon if _loop_here() is loop else loop.call_soon_threadsafe
            soon(self._lead_in, loop, self._turn)
        elif told:
            if not self._thread.is_alive():
                self._thread = threading.Thread(target=self._lead, name="lrai-lead", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # none can be had now: who comes next leads, or tries again
                    self._thread, self._leader = threading.Thread(), None
                    return
            self._leader = self._thread
            self._work.release()
        else:
            self._leader = None

    def _lead_in(self, loop: Loop, turn: int, rounds: int = _ROUNDS) -> None:
        """Run a call in an event loop, and let that do what else it has to before the next."""
        if self._leader is not loop or turn != self._turn:
            return
        if rounds:
            loop.call_soon(self._lead_in, loop, turn, rounds - 1)
            return
        try:
            self._run()
        finally:
            with self.door:
                self._appoint()

    def _lead(self) -> None:
        try:
            while True:
                self._work.acquire()
                while self.waiting:
                    self._run()
                with self.door:
                    self._appoint()
                    if self._closed and not self.waiting:
                        self._thread = threading.Thread()
                        return
        except BaseException:  # a bug, which is told of below; the next thread goes on
            with self.door:
                self._thread = threading.Thread()
                self._appoint()
            raise


def _loop_here() -> Loop | None:
    """Return the event loop that runs in this thread."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
