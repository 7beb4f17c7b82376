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
        body, told, begun = _Body(receive, self._limit), list[float](), False
        waiting.set(told)

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            if told and message["type"] == "http.response.start" and message["status"] >= 400:
                seconds = str(max(1, math.ceil(told[-1]))).encode()
                message["headers"] = [*message.get("headers", ()), (b"retry-after", seconds)]
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                body.left.cancel()  # the server says it of who has the answer too
            await send(message)

        answering = asyncio.ensure_future(self._app(scope, body.receive, sending))
        body.left.add_done_callback(lambda left: left.cancelled() or answering.cancel())
        try:
            await answering
        except asyncio.CancelledError:
            if body.left.cancelled() or not body.left.done():
                raise  # it is the server that gives up
            if not begun:  # else BentoML's own timer would wait for a beginning
                await send({"type": "http.response.start", "status": CLIENT_CLOSED_REQUEST})
                await send({"type": "http.response.body"})
        finally:
            answering.cancel()
            body.left.cancel()


class _Body:
    """The messages of a request, counted; `left` is done when the caller has left."""

    def __init__(self, receive: Receive, limit_bytes: int) -> None:
        self._receive, self._limit, self._size = receive, limit_bytes, 0
        self._read = asyncio.Event()
        self.left = asyncio.ensure_future(self._leaving())

    async def receive(self) -> Message:
        if self._read.is_set():
            return await asyncio.shield(self.left)
        message = await self._receive()
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            raise TooLarge(f"the body has more than the {self._limit} bytes allowed")
        if not message.get("more_body", False):
            self._read.set()
        return message

    async def _leaving(self) -> Message:
        await self._read.wait()
        return await self._receive()
