"""What BentoML's server leaves open: endless bodies, callers who left, when to try again."""

from __future__ import annotations

import asyncio
import math
from http import HTTPStatus
from typing import Final, cast

from bentoml.exceptions import BentoMLException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import lrai_core as lrai
from lrai_bentoml.errors import waiting
from lrai_codecs import Later

CLIENT_LEFT: Final = 499  # nginx's; only logs and metrics hear it


class TooLarge(BentoMLException):
    """The body is larger than `limits.request_bytes`."""

    error_code = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class Guard:
    """Middleware of a service: `Service.add_asgi_middleware(lrai_bentoml.Guard)`.

    `limit_bytes` after it: of a body, by default `limits.request_bytes` of `LRAI_*`, `lrai.toml`.

    A body over the limit is refused with 413 before it is in memory. A caller who leaves takes the
    request along, out of the queue if it has not begun. An error says in `Retry-After` when trying
    again makes sense.
    """

    def __init__(self, app: ASGIApp, limit_bytes: int = 0) -> None:
        """Stand before `app`, the rest of the service."""
        self._app, self._limit = app, limit_bytes or lrai.load_config().limits.request_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have a request answered, or dropped where nobody waits for the answer any more."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, told = _Body(receive, self._limit), list[float]()
        waiting.set(told)

        async def sending(message: Message) -> None:
            body.begun = True
            if told and message["type"] == "http.response.start" and message["status"] >= 400:
                rest = [one for one in message.get("headers", ()) if one[0] != b"retry-after"]
                message["headers"] = [*rest, (b"retry-after", b"%d" % max(1, math.ceil(told[-1])))]
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                body.wanted = False  # for the server says it of who has the answer, too
            await send(message)

        try:
            await self._app(scope, body.receive, sending)
        except (asyncio.CancelledError, Exception) as error:
            left = body.left and isinstance(error, asyncio.CancelledError)
            if not body.begun and (left or isinstance(error, Exception)):
                # Else BentoML's own timer would wait for a beginning.
                status = CLIENT_LEFT if left else 500
                await send({"type": "http.response.start", "status": status, "headers": []})
                await send({"type": "http.response.body"})
            if not left:
                raise  # it is the server that gives up, or a bug
            body.task.uncancel()
        finally:
            body.close()


class _Body:
    """The messages of a request, counted; behind the last one it watches for who leaves.

    Attributes:
        wanted: Whether it matters that somebody leaves.
        begun: Whether the answer has.
        left: Whether the caller has, and the task was cancelled for it.
    """

    def __init__(self, receive: Receive, limit_bytes: int) -> None:
        self._receive, self._limit, self._size = receive, limit_bytes, 0
        self._leaving: Later | None = None
        self.wanted, self.begun, self.left = True, False, False
        self.task = cast("asyncio.Task[None]", asyncio.current_task())

    async def receive(self) -> Message:
        if self._leaving is not None:
            return cast("Message", await asyncio.shield(self._leaving.now()))
        message = await self._receive()
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            raise TooLarge(f"the body has more than the {self._limit} bytes allowed")
        if not message.get("more_body", False):
            self._leaving = Later(self._receive, self._cancel)
        return message

    def close(self) -> None:
        self.wanted = False
        if self._leaving is not None:
            self._leaving.cancel()

    def _cancel(self, leaving: asyncio.Future[Message]) -> None:
        if self.wanted and not leaving.cancelled():
            self.left = True
            self.task.cancel()
