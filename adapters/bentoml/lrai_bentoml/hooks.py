"""The hooks by which BentoML asks a service how it is, and tells it that it begins or ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Set
from typing import TYPE_CHECKING, Any, Final

import bentoml
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.context import server_context

import lrai_core as lrai
from lrai_import.held import Questions

if TYPE_CHECKING:
    from lrai_bentoml.runner import Runner

_questions: Final = Questions()


def install(owner: Any, name: str, runner: Runner) -> None:
    """Have the class of a service look after its attribute `name`.

    What the class defines itself is left alone.
    """
    owner.lrai_runners = {**getattr(owner, "lrai_runners", {}), name: runner}
    hooks = {"__is_ready__": _is_ready, "__is_alive__": _is_alive, "__metrics__": _metrics}
    for hook, function in hooks.items():
        if not hasattr(owner, hook):
            setattr(owner, hook, function)

    load = bentoml.on_startup(lambda service: runner.load(service.bento_service.name))
    setattr(owner, f"lrai_check_{name}", bentoml.on_deployment(lambda: runner.check()))  # noqa: PLW0108 - BentoML marks functions
    setattr(owner, f"lrai_load_{name}", load)
    setattr(owner, f"lrai_close_{name}", bentoml.on_shutdown(lambda _: runner.close()))


def workers_of(names: Set[str]) -> int:
    """Return how many workers the one service has that is meant by these names; 0: not known.

    A worker knows one alone of several that have the model, and must not decide for itself.
    """
    counts = [own.get("workers") or 1 for own in _told(names)]
    told = len(names) == 1 or server_context.service_type != "service"
    return counts[0] if told and len(counts) == 1 and isinstance(counts[0], int) else 0


def seconds_of(names: Set[str]) -> float:
    """Return for how long the services that are meant wait for an answer; 0: not known."""
    return max([own["traffic"]["timeout"] for own in _told(names)], default=0)


def _told(names: Set[str]) -> list[dict[str, Any]]:
    """Return what BentoML was told of the services of these names, of all if it has none of them.

    A service may be called otherwise than its class, or have the model from a class above it. The
    workers of one that others depend on know of no others, where the process that starts them does.
    """
    known = {**BentoMLContainer.config.get().get("services", {}), "runner_connection": None}
    services = {n: own for n, own in known.items() if isinstance(own, dict) and "traffic" in own}
    own = [services[name] for name in names if name in services]
    return own or [*services.values()] * bool(names and server_context.service_type != "service")


async def progress(runners: Collection[Runner]) -> bool:
    """Return whether every model makes progress."""
    return {"ok", "idle"} >= set(await asyncio.gather(*[_soon(one.state) for one in runners]))


async def _is_ready(self: Any) -> bool:
    return await progress(self.lrai_runners.values())


async def _is_alive(self: Any) -> bool:
    return all(await asyncio.gather(*[_soon(one.alive) for one in self.lrai_runners.values()]))


async def _metrics(self: Any, own: str) -> str:
    """Return BentoML's figures, and below them the runtime's."""
    from lrai_bentoml.metrics import exposition  # prometheus_client reads a variable at its import

    # All that share a runtime would tell the same.
    asked = {one.shared or id(one): one for one in self.lrai_runners.values()}.values()
    heard = await asyncio.gather(*[_soon(one.stats) for one in asked])
    together = Counter[str]()
    for stats in heard:
        together.update(stats or {})  # adding counters would lose the zeros
    # Without those of one all would seem to have gone down, and then to jump.
    return own + exposition(None if None in heard else together or None)


async def _soon(question: Callable[[], Any]) -> Any:
    """Return the answer, None where there is none in time; the event loop goes on meanwhile."""
    with contextlib.suppress(TimeoutError, lrai.LraiError, bentoml.exceptions.BentoMLException):
        # A runtime that says nothing for that long is not in good health.
        return await _questions.soon(question, 5.0)
    return None
