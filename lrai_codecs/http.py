"""A request of HTTP from its first byte to its answer, whatever the framework."""

from __future__ import annotations

import asyncio
import math
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec

from lrai_codecs.bodies import decode, encode
from lrai_codecs.forms import TRITON, Form, UnsupportedMediaType
from lrai_core import (
    InferenceRequest,
    InferenceResponse,
    LraiError,
    QueueFull,
    RequestError,
    TensorSpec,
)

T = TypeVar("T")

_AUTOMATIC: Final = zlib.MAX_WBITS | 32  # gzip or zlib, as its first bytes say
# Where headers of one's own do not come through, as in SageMaker, the type says how long the JSON
# before binary tensors is: application/vnd.sagemaker-triton.binary+json;json-header-size=NUMBER.
_JSON_SIZE: Final = "json-header-size="
# What is compressed more than so many times is no data of a model; little of it does no harm.
_MOST_TIMES, _PLAIN_BYTES = 100, 4 << 20
_LOOK_SECONDS: Final = 0.02  # until somebody looks whether the caller is still there
_OBJECT_BYTES: Final = 64
_THREAD_ABOVE_BYTES: Final = 1 << 18  # parsing that takes milliseconds must not hold the event loop


class PayloadTooLarge(RequestError):
    """The body is larger than the host allows, as sent or once it is decompressed."""

    http_status = 413


class HungUp(RequestError):
    """The caller is gone; nobody reads what is answered."""

    http_status = 499


class Later:
    """What is asked for in an event loop only where the answer takes long, or somebody wants it.

    An answer that is there sooner is not worth the task.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[Any]],
        done: Callable[[asyncio.Future[Any]], None] | None = None,
    ) -> None:
        """Ask in 20 ms; `done`: told when it is answered or cancelled."""
        self._ask, self._done, self._wanted = ask, done, True
        self._task: asyncio.Future[Any] | None = None
        self._timer = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self.now)

    def now(self) -> asyncio.Future[Any]:
        """Ask, if it was not yet."""
        if self._task is None:
            self._task = asyncio.ensure_future(self._ask())
            if self._done is not None:
                self._task.add_done_callback(self._done)
            if not self._wanted:
                self._task.cancel()
        return self._task

    def cancel(self) -> None:
        """Want it no more."""
        self._wanted = False
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()


class Room:
    """The bytes of bodies that may be in this process together; for one event loop."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._held_bytes = most_bytes, 0

    @contextmanager
    def held(self) -> Iterator[Callable[[int], None]]:
        """Count a body as it arrives: what it may become takes nobody's place.

        What it yields is told how many bytes of it are here by now.

        Raises:
            QueueFull: By what it yields: there is no room for them beside the others.
        """
        own = 0

        def took(size: int) -> None:
            nonlocal own
            if (others := self._held_bytes - own) and others + size > self._most_bytes:
                full = f"other bodies have {others} bytes, {self._most_bytes} are allowed"
                raise QueueFull(full, limit=self._most_bytes, retry_after_seconds=1.0)
            self._held_bytes, own = others + size, size

        try:
            yield took
        finally:
            self._held_bytes -= own


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer of HTTP."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


async def read(
    chunks: AsyncIterator[bytes],
    headers: Mapping[str, str],
    limit_bytes: int,
    took: Callable[[int], None] = lambda _: None,
) -> bytes:
    """Return a body, decompressed, without ever holding more than the limit.

    Args:
        chunks: The body as it arrives.
        headers: By name in lower case.
        limit_bytes: Of the body as sent, and of the body decompressed.
        took: Told how many bytes are here, decompressed; see `Room.held`.

    Raises:
        PayloadTooLarge: It is larger, or its header says so.
        UnsupportedMediaType: It is compressed in a way that is not read here.
        RequestError: It is cut short or damaged.
    """
    declared = _stated(headers)
    if declared.isdecimal() and int(declared) > limit_bytes:
        raise PayloadTooLarge(f"the body has {declared} bytes, at most {limit_bytes} are allowed")
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", "gzip", "deflate", ""):
        raise UnsupportedMediaType(f"content coding {coding[:40]!r}; read are gzip and deflate")
    inflate = None if coding in ("identity", "") else zlib.decompressobj(_AUTOMATIC)
    parts, received, size = list[bytes](), 0, 0
    sent = int(declared) if declared.isdecimal() else 0
    async for chunk in chunks:
        received += len(chunk)
        part = chunk
        if inflate is not None:
            try:
                most = min(limit_bytes, max(_PLAIN_BYTES, _MOST_TIMES * max(sent, received)))
                part = inflate.decompress(chunk, most - size + 1)
                if inflate.unused_data:  # kept aside, and copied with each chunk that follows
                    raise zlib.error
            except zlib.error:
                raise RequestError(f"the body is no {coding}") from None
        size += len(part)
        if max(size, received) > limit_bytes:
            raise PayloadTooLarge(f"the body has more than the {limit_bytes} bytes allowed")
        if size > max(_PLAIN_BYTES, _MOST_TIMES * max(sent, received)):
            raise PayloadTooLarge(f"the body is over {_MOST_TIMES} times as large as it was sent")
        took(size)
        parts.append(part)
    if inflate is not None and not inflate.eof:
        raise RequestError(f"the body is no whole {coding}")
    return b"".join(parts)


def _stated(headers: Mapping[str, str]) -> str:
    """Return the length that counts: of what comes in chunks none is stated (RFC 9112, 6.3)."""
    return "" if "transfer-encoding" in headers else headers.get("content-length", "")


async def _aside(work: Callable[[], T]) -> T:
    """Run it in a thread, and wait for that when cancelled, too: it holds what was counted."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # nobody is told
        raise


async def respond(
    infer: Callable[[InferenceRequest], Awaitable[InferenceResponse]],
    inputs: Sequence[TensorSpec],
    headers: Mapping[str, str],
    body: bytes,
    took: Callable[[int], None] = lambda _: None,
) -> Reply:
    """Return the answer to a body that was read: decoded, inferred, encoded.

    Args:
        infer: Answers a request that names no model yet.
        inputs: What the model declares.
        headers: By name in lower case.
        body: See `read`.
        took: Likewise; told what a large body may take while it is parsed.

    Raises:
        LraiError: The request cannot be answered; `failure` says it in HTTP.
    """
    parts = [part.strip() for part in headers.get("content-type", "").split(";")]
    sizes = [part.removeprefix(_JSON_SIZE) for part in parts if part.startswith(_JSON_SIZE)]
    kind, size = ";".join(p for p in parts if not p.startswith(_JSON_SIZE)), "".join(sizes[:1])
    stated = size if size else headers.get("inference-header-content-length")
    if stated is not None and not (stated.isdecimal() and len(stated) < 16):
        raise RequestError("inference-header-content-length is no number of bytes")
    length = None if stated is None else int(stated)

    def parsed() -> tuple[InferenceRequest, Form]:
        return decode(body, kind, inputs, header_length=length)

    # One of CSV may wait for others: the longest field is a setting of the process.
    large = len(body) > _THREAD_ABOVE_BYTES or kind.lower().startswith("text/csv")
    if large and length is None:  # of lists and lines each is an object
        took(len(body) + _OBJECT_BYTES * sum(map(body.count, (b"[", b"{", b"\n"))))
    request, form = await _aside(parsed) if large else parsed()
    took(len(body))
    response = await infer(request)

    def written() -> tuple[bytes, dict[str, str]]:
        return encode(response, form, headers.get("accept", ""))

    large = sum(output.nbytes for output in response.outputs.values()) > _THREAD_ABOVE_BYTES
    content, more = await _aside(written) if large else written()
    # By its type the caller finds out where tensors begin, if he has asked, or asks, like that.
    wanted = TRITON if TRITON in headers.get("accept", "").lower() else kind if size else ""
    if wanted and "Inference-Header-Content-Length" in more:
        more["Content-Type"] = f"{wanted};{_JSON_SIZE}{more['Inference-Header-Content-Length']}"
    return Reply(headers=more, body=content)


async def unless_gone(
    receive: Callable[[], Awaitable[Mapping[str, Any]]], answer: Awaitable[T]
) -> T:
    """Return what is awaited; where the caller hangs up first, it is cancelled.

    Args:
        receive: Of ASGI, once the body was read.
        answer: To be waited for.

    Raises:
        HungUp: The caller is gone.
    """
    task, gone = asyncio.current_task(), False

    async def leave() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = task is not None and task.cancel()

    leaving = Later(leave)
    try:
        return await answer
    except asyncio.CancelledError:
        if not gone or (task and task.uncancel()):  # somebody else has cancelled it
            raise
        raise HungUp("the caller has hung up") from None
    finally:
        leaving.cancel()


def failure(error: LraiError) -> Reply:
    """Return an error as the Open Inference Protocol writes it, and when to try again."""
    headers = {"Content-Type": "application/json"}
    wait: float | None = getattr(error, "retry_after_seconds", None)
    if wait is not None:
        headers["Retry-After"] = str(max(1, math.ceil(wait)))
    body = msgspec.json.encode({"error": str(error)})
    return Reply(status=error.http_status, headers=headers, body=body)


def counted(seconds: float) -> Iterator[str | None]:
    """Yield, each time that something happens, how often it has since that was last said.

    In words to be put behind others, none of what has happened once; None where that was said less
    than so many seconds ago.
    """
    count, due = 0, -math.inf
    while True:
        count, now = count + 1, time.monotonic()
        yield f" ({count} times)" * (count > 1) if now >= due else None
        count, due = (0, now + seconds) if now >= due else (count, due)
