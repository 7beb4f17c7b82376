"""The hooks by which BentoML asks a service how it is, and tells it that it begins or ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import bentoml

import lrai_core as lrai
from lrai_bentoml.metrics import exposition

if TYPE_CHECKING:
    from lrai_bentoml.runner import Runner

T = TypeVar("T")

_PROBE_SECONDS: Final = 5.0  # a runtime that says nothing for that long is not in good health


def install(owner: Any, runner: Runner) -> None:
    """Have the class of a service look after a runner, beside others that it looks after.

    What the class defines itself is left alone.
    """
    owner.lrai_runners = (*getattr(owner, "lrai_runners", ()), runner)
    for name, function in _HOOKS.items():
        if not hasattr(owner, name):
            setattr(owner, name, function)

    def lrai_check() -> None:
        for one in owner.lrai_runners:
            one.check()

    owner.lrai_check = bentoml.on_deployment(lrai_check)  # has no instance, so knows the class


async def soon(question: Callable[[], T]) -> T | None:
    """Return the answer, None where there is none in time; the event loop goes on meanwhile."""
    with contextlib.suppress(TimeoutError, lrai.LraiError, bentoml.exceptions.BentoMLException):
        return await asyncio.wait_for(asyncio.to_thread(question), _PROBE_SECONDS)
    return None


async def _is_ready(self: Any) -> bool:
    """Return whether every model makes progress."""
    return {"ok", "idle"}.issuperset(await _states(self.lrai_runners))


async def _is_alive(self: Any) -> bool:
    """Return whether every model makes progress, or will again by itself."""
    return {"ok", "idle", "stalled"}.issuperset(await _states(self.lrai_runners))


async def _states(runners: tuple[Runner, ...]) -> list[str | None]:
    return await asyncio.gather(*[soon(one.state) for one in runners])


async def _metrics(self: Any, own: str) -> str:
    """Return BentoML's figures, and below them the runtime's."""
    runners: tuple[Runner, ...] = self.lrai_runners
    asked = runners[:1] if runners[0].shared else runners  # a shared one tells everybody the same
    heard = await asyncio.gather(*[soon(one.stats) for one in asked])
    known = [Counter(stats) for stats in heard if stats is not None]
    return own + exposition(sum(known, Counter[str]()) if known else None)


def _start(self: Any) -> None:
    for one in self.lrai_runners:
        one.load()


def _end(self: Any) -> None:
    for one in self.lrai_runners:
        one.close()


_HOOKS: Final[dict[str, Any]] = {
    "__is_ready__": _is_ready,
    "__is_alive__": _is_alive,
    "__metrics__": _metrics,
    "lrai_start": bentoml.on_startup(_start),
    "lrai_end": bentoml.on_shutdown(_end),
}
