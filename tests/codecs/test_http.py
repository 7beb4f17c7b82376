"""Bodies in chunks, compressed or not, against their limits; and errors as HTTP says them."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import zlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lrai_codecs import (
    HungUp,
    PayloadTooLarge,
    Room,
    UnsupportedMediaType,
    counted,
    failure,
    read,
    respond,
    unless_gone,
)
from lrai_core import (
    InferenceRequest,
    InferenceResponse,
    NotReady,
    QueueFull,
    RequestError,
    Tensor,
    TensorSpec,
)

X = TensorSpec(name="x", datatype="FP32", shape=("n", 3), batch_axis=0)


def read_all(body: bytes, headers: dict[str, str], limit: int = 1000, step: int = 7) -> bytes:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), step):
            yield body[start : start + step]

    return asyncio.run(read(chunks(), headers, limit))


@pytest.mark.parametrize(
    ("body", "coding"),
    [
        (b"a" * 1000, "identity"),
        (gzip.compress(b"a" * 1000, mtime=0), "gzip"),
        (zlib.compress(b"a" * 1000), "deflate"),
        (b"a" * 1000, ""),
    ],
)
def test_a_body_up_to_the_limit_is_read(body: bytes, coding: str) -> None:
    assert read_all(body, {"content-encoding": coding}) == b"a" * 1000


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"a" * 1001, {}),
        (b"", {"content-length": "1001"}),
        (b"", {"content-length": "9" * 100}),
        (gzip.compress(b"a" * 1001, mtime=0), {"content-encoding": "gzip"}),
        (gzip.compress(bytes(1 << 26), mtime=0), {"content-encoding": "gzip"}),
    ],
)
def test_more_is_refused_before_it_is_held(body: bytes, headers: dict[str, str]) -> None:
    with pytest.raises(PayloadTooLarge) as caught:
        read_all(body, headers)
    assert caught.value.http_status == 413


def test_a_flood_of_chunks_ends_at_the_limit() -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 100
            yield b"a" * 100

    with pytest.raises(PayloadTooLarge):
        asyncio.run(read(endless(), {}, 1000))
    assert sent == 1100


@pytest.mark.parametrize(
    "body",
    [
        gzip.compress(b"abc", mtime=0)[:-1],
        b"abc",
        gzip.compress(b"a", mtime=0) + b"b",
        b"",
        gzip.compress(b"a", mtime=0) * 2,
    ],
)
def test_a_damaged_compressed_body_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match=r"no .*gzip"):
        read_all(body, {"content-encoding": "gzip"})


def test_what_follows_a_compressed_body_is_not_kept() -> None:
    """It would be held beside what is counted, and copied with each chunk that comes."""
    heard = list[bytes]()

    async def chunks() -> AsyncIterator[bytes]:
        for chunk in (gzip.compress(b"{}"), *[b"x" * 1000] * 10):
            heard.append(chunk)
            yield chunk

    with pytest.raises(RequestError, match="no gzip"):
        asyncio.run(read(chunks(), {"content-encoding": "gzip"}, 1 << 20))
    assert len(heard) == 2


def test_another_content_coding_is_refused() -> None:
    with pytest.raises(UnsupportedMediaType, match="'br'; read are gzip"):
        read_all(b"", {"content-encoding": "br"})


@pytest.mark.parametrize("rows", [2, 100_000])
def test_a_body_is_answered_as_it_was_asked(rows: int) -> None:
    async def double(request: InferenceRequest) -> InferenceResponse:
        x = request.inputs["x"]
        assert isinstance(x, np.ndarray)
        return InferenceResponse(
            model_name="m", model_version="1", id="", outputs={"y": x * 2}, parameters={}
        )

    body = json.dumps({"instances": [[1, 2, 3]] * rows}).encode()
    reply = asyncio.run(respond(double, [X], {"content-type": "application/json"}, body))
    assert reply.status == 200
    assert json.loads(reply.body) == {"predictions": [[2, 4, 6]] * rows}


def test_the_length_of_the_json_may_stand_in_the_type() -> None:
    async def double(request: InferenceRequest) -> InferenceResponse:
        x = request.inputs["x"]
        assert isinstance(x, Tensor)
        values = np.frombuffer(x.data, np.float32).reshape(x.shape)
        return InferenceResponse(
            model_name="m", model_version="1", id="", outputs={"y": values * 2}, parameters={}
        )

    size = {"binary_data_size": 12}
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "parameters": size}
    wanted = {"binary_data_output": True}
    head = json.dumps({"inputs": [tensor], "parameters": wanted}).encode()
    kind = "application/vnd.sagemaker-triton.binary+json"
    headers = {"content-type": f"{kind}; json-header-size={len(head)}"}
    body = head + np.array([[1, 2, 3]], np.float32).tobytes()
    reply = asyncio.run(respond(double, [X], headers, body))
    media, _, length = reply.headers["Content-Type"].partition(";json-header-size=")
    assert media == kind
    np.testing.assert_array_equal(np.frombuffer(reply.body[int(length) :], np.float32), [2, 4, 6])
    for wrong in ("x", "-1", str(len(body) + 1)):
        headers = {"content-type": f"{kind};json-header-size={wrong}"}
        with pytest.raises(RequestError):
            asyncio.run(respond(double, [X], headers, body))


def test_a_wrong_length_of_the_head_is_refused() -> None:
    async def never(request: InferenceRequest) -> InferenceResponse:
        raise AssertionError(request)

    for wrong in ("-1", "x", "9" * 20, ""):
        with pytest.raises(RequestError, match="no number of bytes"):
            asyncio.run(respond(never, [X], {"inference-header-content-length": wrong}, b"{}"))


@pytest.mark.parametrize(
    ("error", "status", "wait"),
    [
        (RequestError("wrong"), 400, None),
        (QueueFull("full", limit=3, retry_after_seconds=0.2), 429, "1"),
        (NotReady("draining"), 503, "1"),
        (PayloadTooLarge("large"), 413, None),
    ],
)
def test_errors_have_their_status_and_say_when_to_try_again(
    error: RequestError | NotReady, status: int, wait: str | None
) -> None:
    reply = failure(error)
    assert (reply.status, reply.headers.get("Retry-After")) == (status, wait)
    assert json.loads(reply.body) == {"error": str(error)}


def test_bodies_beyond_what_a_process_may_hold_are_refused() -> None:
    room = Room(1000)
    with room.held() as first:
        first(600)
        with room.held() as second:
            second(300)
            second(400)
            with room.held() as third, pytest.raises(QueueFull, match="1000 bytes, 1000 a") as full:
                third(1)
            assert full.value.retry_after_seconds == 1
        with room.held() as fourth:
            fourth(400)
    with room.held() as alone:
        alone(5000)  # is for the limit of one to refuse


def test_what_has_not_come_takes_nobodys_place() -> None:
    """Of uploads that stand still there may be as many as connections."""
    room, headers = Room(1000), {"content-length": "900"}

    async def stands() -> AsyncIterator[bytes]:
        yield b"x" * 10
        await asyncio.sleep(60)

    async def upload() -> None:
        with room.held() as took:
            await read(stands(), headers, 900, took)

    async def comes() -> AsyncIterator[bytes]:
        yield b"y" * 450
        yield b"y" * 450

    async def ask() -> None:
        uploads = [asyncio.create_task(upload()) for _ in range(10)]
        await asyncio.sleep(0.01)
        with room.held() as took:
            assert await read(comes(), headers, 900, took) == b"y" * 900
            with room.held() as more, pytest.raises(QueueFull):
                await read(comes(), headers, 900, more)
        for one in uploads:
            one.cancel()
        await asyncio.wait(uploads)
        with room.held() as took:
            took(1000)
            assert room._held_bytes == 1000

    asyncio.run(ask())


def test_an_answer_is_cancelled_when_its_caller_hangs_up() -> None:
    ended = list[str]()

    async def slow() -> str:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")
        return "late"

    async def quick() -> str:
        return "here"

    async def stays() -> dict[str, str]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def leaves() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def both() -> str:
        with pytest.raises(HungUp):
            await unless_gone(leaves, slow())
        await asyncio.sleep(0)
        assert ended == ["cancelled"]
        return await unless_gone(stays, quick())

    assert asyncio.run(both()) == "here"


def test_who_is_cancelled_for_another_reason_is_not_said_to_have_hung_up() -> None:
    async def stays() -> dict[str, str]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def cancelled() -> None:
        asked = asyncio.ensure_future(unless_gone(stays, asyncio.sleep(60)))
        await asyncio.sleep(0.05)  # somebody looks for who has left by now
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked

    asyncio.run(cancelled())


def test_what_an_answer_ends_with_is_passed_on() -> None:
    async def stays() -> dict[str, str]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def fails() -> str:
        raise NotReady("draining")

    with pytest.raises(NotReady, match="draining"):
        asyncio.run(unless_gone(stays, fails()))


def test_what_is_compressed_beyond_measure_is_no_data() -> None:
    body = gzip.compress(bytes(20 << 20), mtime=0)
    with pytest.raises(PayloadTooLarge, match="over 100 times as large as it was sent"):
        read_all(body, {"content-encoding": "gzip"}, limit=64 << 20, step=1 << 16)
    plain = np.random.default_rng(0).integers(0, 4, 8 << 20, np.uint8).tobytes()
    packed = gzip.compress(plain, mtime=0)
    assert read_all(packed, {"content-encoding": "gzip"}, limit=64 << 20, step=1 << 16) == plain


def test_of_what_comes_in_chunks_no_stated_length_counts() -> None:
    headers = {"content-length": "1", "transfer-encoding": "chunked"}
    assert read_all(b"x" * 500, headers, 600) == b"x" * 500


def test_a_cancelled_request_counts_until_its_thread_lets_go_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began, go_on = threading.Event(), threading.Event()

    def slow(*_: object, **__: object) -> None:
        began.set()
        assert go_on.wait(10)

    monkeypatch.setattr("lrai_codecs.http.decode", slow)
    room = Room(1000)

    async def ask() -> None:
        with room.held() as took:
            took(900)
            await respond(never, [], {"content-type": "text/csv"}, b"1")

    async def never(_: object) -> Any:
        raise AssertionError

    async def cancel() -> None:
        task = asyncio.create_task(ask())
        await asyncio.to_thread(began.wait, 10)
        task.cancel()
        await asyncio.sleep(0.05)
        with pytest.raises(QueueFull), room.held() as took:
            took(900)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        with room.held() as took:
            took(900)

    asyncio.run(cancel())


def test_what_a_body_may_become_takes_room_while_it_is_parsed() -> None:
    """Each of many small lists takes twenty times of what it takes as text."""
    told = list[int]()

    async def none(_: InferenceRequest) -> InferenceResponse:
        raise NotReady("it is asked nothing")

    body = b'{"instances": [' + b"[1, 2, 3]," * 100_000 + b"[1, 2, 3]]}"
    with pytest.raises(NotReady):
        asyncio.run(respond(none, [X], {"content-type": "application/json"}, body, told.append))
    assert told == [len(body) + 64 * 100_003, len(body)]


def test_what_happens_often_is_said_once_in_a_while_with_a_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("lrai_codecs.http.time", SimpleNamespace(monotonic=lambda: now))
    often = counted(10.0)
    assert [next(often) for _ in range(5)] == ["", None, None, None, None]
    now += 10
    assert [next(often) for _ in range(3)] == [" (5 times)", None, None]
    now += 11
    assert next(often) == " (3 times)"
    now += 100
    assert next(often) == ""
