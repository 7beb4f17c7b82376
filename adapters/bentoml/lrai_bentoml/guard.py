"""What BentoML's server leaves open: endless bodies, callers who left, when to try again."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any, Final

from bentoml.exceptions import BentoMLException

import lrai_core as lrai
from lrai_bentoml.errors import waiting

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CLIENT_CLOSED_REQUEST: Final = 499  # nginx's; only logs and metrics hear it


class TooLarge(BentoMLException):
    """The body is larger than `limits.request_bytes`."""

    error_code = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class Guard:
    """Middleware of a service: `Service.add_asgi_middleware(lrai_bentoml.Guard)`.

    A body over the limit is refused with 413 before it is in memory. A caller who leaves takes the
    request along, out of the queue if it has not begun. An error says in `Retry-After` when trying
    again makes sense.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        """Stand before `app`, the rest of the service."""
        self._app, self._limit = app, lrai.load_config().limits.request_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Have a request answered, or dropped where nobody waits for the answer any more."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told, size, begun = list[float](), 0, False
        leaving: asyncio.Future[Message] | None = None
        waiting.set(told)

        async def receiving() -> Message:
            nonlocal size, leaving
            if leaving is not None:
                return await asyncio.shield(leaving)
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limit:
                raise TooLarge(f"the body has more than the {self._limit} bytes allowed")
            if not message.get("more_body", False):  # what comes next is that the caller has left
                leaving = asyncio.ensure_future(receive())
                leaving.add_done_callback(lambda one: one.cancelled() or answering.cancel())
            return message

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            if told and message["type"] == "http.response.start" and message["status"] >= 400:
                seconds = str(max(1, math.ceil(told[-1]))).encode()
                message["headers"] = [*message.get("headers", ()), (b"retry-after", seconds)]
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                if leaving is not None:  # the server says it of who has the answer too, and
                    leaving.cancel()  # BentoML has tasks that begin then
            await send(message)

        answering = asyncio.ensure_future(self._app(scope, receiving, sending))
        try:
            await answering
        except asyncio.CancelledError:
            if leaving is None or not leaving.done():
                raise  # it is the server that gives up
            if not begun:  # else BentoML's own timer would wait for a beginning
                await send({"type": "http.response.start", "status": CLIENT_CLOSED_REQUEST})
                await send({"type": "http.response.body"})
        finally:
            answering.cancel()
            if leaving is not None:
                leaving.cancel()
