"""Requests of many rows: asked in parts, answered as one, whatever happens to a part."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrai_codecs import in_parts, in_turn, rows_at_a_time
from lrai_codecs.rows import joined
from lrai_core import (
    InferenceRequest,
    InferenceResponse,
    LraiError,
    NotReady,
    QueueFull,
    RequestError,
    Signature,
    Tensor,
    TensorSpec,
    load_config,
)


def spec(name: str, axis: int | None = 0) -> TensorSpec:
    return TensorSpec(name=name, datatype="FP32", shape=("n", 3), batch_axis=axis)


FOUR = load_config(call={"scheduler.max_batch_rows": 4})
SIGNATURE = Signature(inputs=(spec("x"), spec("z")), outputs=(spec("y"),))
TOGETHER = Signature(inputs=(spec("x"), spec("z")), outputs=(spec("y", None),))


class Model:
    """Adds its inputs, and remembers what it was asked."""

    def __init__(
        self, seconds: float = 0.0, fails_at: int = -1, error: LraiError | None = None
    ) -> None:
        self.asked, self.at_once, self.most_at_once = list[InferenceRequest](), 0, 0
        self._seconds, self._fails_at, self._error = seconds, fails_at, error

    async def infer(self, request: InferenceRequest) -> InferenceResponse:
        self.asked.append(request)
        number = len(self.asked)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self._seconds)
            if number == self._fails_at and self._error is not None:
                raise self._error
        finally:
            self.at_once -= 1
        x: Any = request.inputs["x"]
        z: Any = request.inputs["z"]
        return InferenceResponse(
            model_name="m", model_version="1", id="", outputs={"y": x + z}, parameters={}
        )


def ask(model: Model, request: InferenceRequest, signature: Signature = SIGNATURE) -> Any:
    return asyncio.run(in_parts(model.infer, request, signature, FOUR)).outputs["y"]


def request(rows: int, **more: Any) -> InferenceRequest:
    values = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    return InferenceRequest(model_name="m", inputs={"x": values, "z": values * 2}, **more)


@given(st.integers(1, 40))
def test_rows_come_back_in_their_order_in_parts_that_are_small_enough(rows: int) -> None:
    model, given_rows = Model(), request(rows)
    answer = ask(model, given_rows)
    np.testing.assert_array_equal(answer, np.arange(rows * 3).reshape(rows, 3) * 3)
    sizes = [len(part.inputs["x"]) for part in model.asked]  # type: ignore[arg-type]
    assert sum(sizes) == rows
    assert max(sizes) <= 4
    assert len(sizes) == -(-rows // 4)


def test_two_parts_are_asked_at_a_time() -> None:
    model = Model(seconds=0.01)
    ask(model, request(40))
    assert model.most_at_once == 2


def test_all_parts_share_the_time_of_the_request() -> None:
    model = Model(seconds=0.05)
    begun = time.monotonic()
    ask(model, request(16, timeout_ms=10_000))
    spent_ms = (time.monotonic() - begun) * 1e3
    first, *_, last = [part.timeout_ms for part in model.asked]
    assert first is not None
    assert last is not None
    assert 10_000 - spent_ms <= last <= first - 50 <= 10_000 - 50


def test_without_a_loop_the_parts_are_asked_one_after_the_other() -> None:
    model = Model(seconds=0.02)

    def infer(part: InferenceRequest) -> InferenceResponse:
        return asyncio.run(model.infer(part))

    asked = request(11, timeout_ms=5000)
    found = in_turn(infer, asked, SIGNATURE, 4, FOUR).outputs["y"]
    np.testing.assert_array_equal(found, np.asarray(asked.inputs["x"]) * 3)
    times = [part.timeout_ms or 0.0 for part in model.asked]
    assert len(times) == 3
    assert times == sorted(times, reverse=True)
    assert times[0] - times[-1] >= 40
    assert model.most_at_once == 1


@pytest.mark.parametrize(("rows", "timeout_ms"), [(3, None), (11, 200), (11, None)])
def test_a_part_that_finds_the_queue_full_comes_again_while_there_is_time(
    rows: int, timeout_ms: float | None
) -> None:
    model, full = Model(), iter([True, False, True, True])

    def infer(part: InferenceRequest) -> InferenceResponse:
        if next(full, False):
            raise QueueFull("full", limit=1, retry_after_seconds=0.15)
        return asyncio.run(model.infer(part))

    asked = request(rows, timeout_ms=timeout_ms)
    if (rows, timeout_ms) != (11, None):
        with pytest.raises(QueueFull):
            in_turn(infer, asked, SIGNATURE, 4, FOUR)
        return
    found = in_turn(infer, asked, SIGNATURE, 4, FOUR).outputs["y"]
    np.testing.assert_array_equal(found, np.asarray(asked.inputs["x"]) * 3)


def test_where_no_time_is_stated_the_default_one_is_how_long_a_part_waits() -> None:
    def full(_: InferenceRequest) -> InferenceResponse:
        raise QueueFull("full", limit=1, retry_after_seconds=0.01)

    short = load_config(call={"scheduler.default_timeout_ms": 100})
    with pytest.raises(QueueFull):
        in_turn(full, request(11), SIGNATURE, 4, short)


def test_where_no_time_is_stated_what_goes_on_is_not_given_up() -> None:
    model, refusals = Model(seconds=0.3), itertools.cycle([True, False])

    def infer(part: InferenceRequest) -> InferenceResponse:
        if next(refusals):
            raise QueueFull("full", limit=1, retry_after_seconds=0.01)
        return asyncio.run(model.infer(part))

    own, asked = load_config(call={"scheduler.default_timeout_ms": 500}), request(11)
    found = in_turn(infer, asked, SIGNATURE, 4, own).outputs["y"]  # of three parts
    np.testing.assert_array_equal(found, np.asarray(asked.inputs["x"]) * 3)


def test_long_texts_make_parts_of_few_rows() -> None:
    texts = np.array(["a" * 1_000] * 50, np.object_)
    asked = InferenceRequest(model_name="m", inputs={"x": texts})
    assert (
        rows_at_a_time(asked, load_config(environ={}, call={"limits.request_bytes": 16_000})) == 4
    )


@pytest.mark.parametrize("dtype", [np.object_, np.str_, np.bytes_])
def test_short_texts_make_parts_of_no_more_than_a_request_may_hold(dtype: type[np.generic]) -> None:
    """The runtime counts 64 bytes for each, however short it is."""
    asked = InferenceRequest(model_name="m", inputs={"x": np.full((5_000, 2), "a", dtype)})
    own = load_config(environ={}, call={"limits.request_bytes": 1 << 16})
    assert rows_at_a_time(asked, own) == (1 << 16) // (2 * 64) // 4


@pytest.mark.parametrize(
    ("limits", "rows"),
    [
        ({}, 1024),
        ({"limits.request_rows": 100}, 25),
        ({"scheduler.max_queue_rows": 2}, 1),
        ({"limits.request_bytes": 24 * 64}, 16),
    ],
)
def test_a_part_is_within_every_limit_and_leaves_room(limits: dict[str, Any], rows: int) -> None:
    assert rows_at_a_time(request(50), load_config(environ={}, call=limits)) == rows


def test_the_error_of_a_part_is_the_error_of_all_and_ends_the_others() -> None:
    model = Model(seconds=0.01, fails_at=2, error=NotReady("no"))
    with pytest.raises(NotReady, match="no"):
        ask(model, request(400))
    assert len(model.asked) < 10


@pytest.mark.parametrize(("fails_at", "timeout_ms"), [(1, None), (9, 5.0), (9, None)])
def test_for_parts_that_were_answered_a_full_queue_is_waited_for(
    fails_at: int, timeout_ms: float | None
) -> None:
    full = QueueFull("full", limit=1, retry_after_seconds=0.05)
    model, asked = Model(fails_at=fails_at, error=full), request(40, timeout_ms=timeout_ms)
    if (fails_at, timeout_ms) == (9, None):
        np.testing.assert_array_equal(ask(model, asked), np.asarray(asked.inputs["x"]) * 3)
        assert len(model.asked) == 11
        return
    with pytest.raises(QueueFull):
        ask(model, asked)


@pytest.mark.parametrize("shape", [(1 << 40, 0), (0, 3)])
def test_of_nothing_there_are_no_parts(shape: tuple[int, ...]) -> None:
    """However many rows of nothing there are said to be: they are for the runtime to refuse."""
    nothing = np.zeros(0, np.float32).reshape(shape)
    model = Model()
    ask(model, InferenceRequest(model_name="m", inputs={"x": nothing, "z": nothing}))
    assert len(model.asked) == 1


@pytest.mark.parametrize(
    ("inputs", "signature"),
    [
        (dict(request(9).inputs), TOGETHER),
        ({"x": np.zeros((9, 3), np.float32), "z": np.zeros((8, 3), np.float32)}, SIGNATURE),
        ({"x": np.float32(1), "z": np.float32(1)}, SIGNATURE),
    ],
)
def test_what_cannot_be_divided_is_asked_as_it_is(
    inputs: dict[str, Any], signature: Signature
) -> None:
    model = Model()
    whole = InferenceRequest(model_name="m", inputs=inputs)
    with contextlib.suppress(ValueError):  # of the model, which has no rules for rows that differ
        asyncio.run(in_parts(model.infer, whole, signature, FOUR))
    assert model.asked == [whole]


def test_the_answer_names_all_that_gave_parts_of_it() -> None:
    """A call of few rows may have another variant, or go to another version."""

    def answer(version: str, **parameters: Any) -> InferenceResponse:
        y = {"y": np.ones((1, 1), np.float32)}
        return InferenceResponse(
            model_name="m", model_version=version, id="", outputs=y, parameters=parameters
        )

    one = answer("1", variant="int8", certificate="int8-aa", batch_effect=None)
    other = answer("1", variant="fp32", certificate="fp32-bb", batch_effect=None)
    bare = answer("2", variant="fp32", certificate=None, batch_effect=None)
    assert joined([one, one]).parameters == one.parameters
    both = joined([one, other, one])
    assert both.parameters["variant"] == "int8,fp32"
    assert both.parameters["certificate"] == "int8-aa,fp32-bb"
    assert both.model_version == "1"
    several = joined([one, bare])
    assert several.parameters["variant"] == "int8,fp32"
    assert several.parameters["certificate"] is None
    assert several.model_version == "1,2"


def test_parts_are_within_the_bytes_of_a_request() -> None:
    """However few rows a call might have."""
    own = load_config(call={"limits.request_bytes": 4096, "scheduler.max_batch_rows": 64})
    sizes = list[int]()

    async def infer(asked: InferenceRequest) -> InferenceResponse:
        sizes.append(sum(np.asarray(array).nbytes for array in asked.inputs.values()))
        outputs = {"y": np.asarray(asked.inputs["x"])}
        return InferenceResponse(
            model_name="m", model_version="1", id="", outputs=outputs, parameters={}
        )

    wide = {name: np.ones((40, 64), np.float32) for name in ("x", "z")}
    whole = InferenceRequest(model_name="m", inputs=wide)
    found = asyncio.run(in_parts(infer, whole, SIGNATURE, own)).outputs["y"]
    assert found.shape == (40, 64)
    assert max(sizes) <= 4096


def tensor(name: str, rows: int, **more: Any) -> Tensor:
    data = np.arange(rows * 3, dtype="<f4").tobytes()
    given: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": (rows, 3), "data": data}
    return Tensor(**(given | more))


def test_binary_tensors_are_divided_like_arrays() -> None:
    class Counts(Model):
        async def infer(self, request: InferenceRequest) -> InferenceResponse:
            arrays = {
                name: np.frombuffer(given.data, "<f4").reshape(given.shape)
                for name, given in request.inputs.items()
                if isinstance(given, Tensor)
            }
            return await Model.infer(self, msgspec.structs.replace(request, inputs=arrays))

    inputs = {"x": tensor("x", 10), "z": tensor("z", 10)}
    model = Counts()
    answer = ask(model, InferenceRequest(model_name="m", inputs=inputs))
    np.testing.assert_array_equal(answer, np.arange(30).reshape(10, 3) * 2)
    assert [len(part.inputs["x"]) for part in model.asked] == [4, 4, 2]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "more", [{"data": b"abc"}, {"shape": (10, -3)}, {"shape": ()}, {"datatype": "BYTES"}]
)
def test_a_binary_tensor_that_is_not_as_it_says_is_for_the_runtime_to_refuse(
    more: dict[str, Any],
) -> None:
    inputs = {"x": tensor("x", 10), "z": tensor("z", 10, **more)}
    given, seen = InferenceRequest(model_name="m", inputs=inputs), list[InferenceRequest]()

    async def infer(request: InferenceRequest) -> InferenceResponse:
        seen.append(request)
        return InferenceResponse(
            model_name="m", model_version="1", id="", outputs={"y": np.zeros(1)}, parameters={}
        )

    asyncio.run(in_parts(infer, given, SIGNATURE, FOUR))
    assert seen == [given]


def test_parts_of_many_rows_are_no_tasks_before_their_turn() -> None:
    model, most = Model(), 0

    async def ask_all() -> None:
        nonlocal most

        async def infer(one: InferenceRequest) -> InferenceResponse:
            nonlocal most
            most = max(most, len(asyncio.all_tasks()))
            return await model.infer(one)

        await in_parts(infer, request(4_000), SIGNATURE, FOUR)

    asyncio.run(ask_all())
    assert len(model.asked) == 1_000
    assert most <= 4


def test_parts_whose_rows_have_other_shapes_are_refused() -> None:
    async def infer(one: InferenceRequest) -> InferenceResponse:
        x: Any = one.inputs["x"]
        wide = np.ones((len(x), 2 + int(x[0, 0] > 0)), np.float32)
        return InferenceResponse(
            model_name="m", model_version="1", id="", outputs={"y": wide}, parameters={}
        )

    with pytest.raises(RequestError, match="output 'y' has another shape in each part"):
        asyncio.run(in_parts(infer, request(8), SIGNATURE, FOUR))
