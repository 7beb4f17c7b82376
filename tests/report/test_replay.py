"""Requests that are made up, the classic batcher, and a replay, on a runtime that is played."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import numpy as np
import pytest

from lrai_core import (
    ActorError,
    DeadlineExceeded,
    InferenceRequest,
    LraiConfig,
    QueueFull,
    Runtime,
    Signature,
    TensorSpec,
    UsageError,
    load_config,
)
from lrai_core.protocol import validate
from lrai_report.replay import MadeUp, Outcome, Server, capacity, join, precise_loop, replay
from lrai_report.trace import Arrivals
from tests.report.played import IDS, Played, server

T = TypeVar("T")

NOISE = TensorSpec(name="noise", datatype="FP16", shape=("n", 2, "free"), batch_axis=0)
FLAG = TensorSpec(name="flag", datatype="BOOL", shape=("n",), batch_axis=0)
WORD = TensorSpec(name="word", datatype="BYTES", shape=("n", 1), batch_axis=0)
SIGNATURE = Signature(inputs=(IDS, NOISE, FLAG, WORD), outputs=(FLAG,))


def arrivals(seconds: list[float], lengths: int = 4, rows: list[int] | None = None) -> Arrivals:
    count = len(seconds)
    return Arrivals(
        np.array(seconds, np.float64), np.full(count, lengths), np.array(rows or [1] * count)
    )


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        return runner.run(coroutine)


def replayed(policy: str, runtime: Any, given: Arrivals, deadline: float = 5.0) -> Outcome:
    made_up = MadeUp(Signature(inputs=(IDS,), outputs=()), given, 1 << 20)
    return run(replay(server(policy, runtime), given, made_up, deadline, lambda _: None))


def test_made_up_inputs_of_every_size_are_valid_requests() -> None:
    made_up = MadeUp(SIGNATURE, arrivals([0, 1], lengths=7, rows=[1, 3]), 1 << 20)
    for rows, length in ((3, 7), (1, 7), (2, 3)):
        inputs = made_up.cut(rows, length)
        request = InferenceRequest(model_name="", inputs=inputs)
        valid = validate(request, SIGNATURE, load_config().limits)
        assert (valid.rows, valid.length) == (rows, length)
        assert set(np.unique(inputs["ids"])) <= {0, 1}
        assert inputs["ids"][:, 0].all(), "the first of a mask is one"


@pytest.mark.parametrize("datatype", ["FP32", "INT64", "BOOL", "BYTES"])
def test_an_input_without_dimensions_is_made_up_as_an_array(datatype: str) -> None:
    """As a temperature for all rows, or a number of steps."""
    scalar = TensorSpec(name="t", datatype=datatype, shape=())
    signature = Signature(inputs=(scalar,), outputs=())
    inputs = MadeUp(signature, arrivals([0, 1]), 1 << 20).cut(1, 4)
    valid = validate(InferenceRequest(model_name="", inputs=inputs), signature, LraiConfig().limits)
    assert valid.arrays[0].shape == ()


def test_texts_and_sizes_that_no_trace_tells_are_those_of_real_rows() -> None:
    def row(size: int, text: str) -> list[np.ndarray[Any, Any]]:
        noise, flag = np.full((1, 2, size), size, np.float16), np.array([True])
        return [np.zeros((1, 5), np.int64), noise, flag, np.array([[text]], object)]

    kept = [row(30, "a long text"), row(8, "of another size"), row(30, "another one")]
    made_up = MadeUp(SIGNATURE, arrivals([0, 1], lengths=7, rows=[1, 3]), 1 << 20, kept)
    texts = set()
    for turn, (rows, length) in enumerate(((3, 7), (1, 7), (1, 2), (1, 2))):
        inputs = made_up.cut(rows, length, turn)
        for name, array in made_up.cut(rows, length, turn).items():
            np.testing.assert_array_equal(array, inputs[name])  # for every policy the same
        request = InferenceRequest(model_name="", inputs=inputs)
        valid = validate(request, SIGNATURE, load_config().limits)
        assert (valid.rows, valid.length) == (rows, length)
        assert inputs["noise"].shape == (rows, 2, 30)
        assert (inputs["noise"] == 30).all()
        texts |= set(inputs["word"].ravel())
    assert texts == {"a long text", "another one"}
    with pytest.raises(UsageError, match="1000 rows of length 1"):
        MadeUp(SIGNATURE, arrivals([0], lengths=1, rows=[1000]), 100_000, kept)


def test_a_request_that_no_runtime_takes_is_refused_before_it_is_made() -> None:
    with pytest.raises(UsageError, match=r"1000 rows of length 1000 has .* allows 1,000,000"):
        MadeUp(SIGNATURE, arrivals([0], lengths=1000, rows=[1000]), 1_000_000)


def test_joined_rows_are_in_order_and_padded_with_the_value_of_the_input() -> None:
    requests = [{"ids": np.array([[1, 2]])}, {"ids": np.array([[3, 4, 5], [6, 7, 8]])}]
    joined = join(requests, (IDS,))
    assert joined["ids"].tolist() == [[1, 2, 9], [3, 4, 5], [6, 7, 8]]
    assert join(requests[:1], (IDS,)) is requests[0]


def test_joined_texts_are_padded_with_empty_ones() -> None:
    words = TensorSpec(
        name="words", datatype="BYTES", shape=("n", "l"), batch_axis=0, length_axis=1, pad_value=9
    )
    signature = Signature(inputs=(words,), outputs=())
    joined = join([{"words": np.array([[*text]], object)} for text in ("ab", "cde")], (words,))
    valid = validate(
        InferenceRequest(model_name="", inputs=joined), signature, load_config().limits
    )
    assert valid.arrays[0].tolist() == [["a", "b", ""], ["c", "d", "e"]]


def test_fifo_takes_what_waits_in_order_up_to_its_limit_of_rows() -> None:
    runtime = Played(1.0)
    given = arrivals([0, *np.linspace(0.01, 0.02, 7)], rows=[1, 3, 3, 2, 1, 12, 1, 1])
    outcome = replayed("fifo-8", runtime, given)
    sizes = [len(np.asarray(request.inputs["ids"])) for request in runtime.sent]
    assert sizes == [1, 8, 1, 12, 2]
    assert (outcome.calls, outcome.rows) == (5, 24)
    answered = outcome.latencies + given.seconds
    assert np.ptp(answered[1:4]) < 0.5 < answered[1] - answered[0], "one call, one answer"
    assert all(request.timeout_ms is None for request in runtime.sent), "it knows no deadlines"


def test_the_other_policies_send_each_request_with_the_time_that_is_left() -> None:
    runtime = Played()
    replayed("planner", runtime, arrivals([0, 0.02]), deadline=30)
    assert len(runtime.sent) == 2
    assert all(0 < cast("float", request.timeout_ms) <= 30_000 for request in runtime.sent)


@pytest.mark.parametrize("policy", ["planner", "fifo-8"])
@pytest.mark.parametrize(
    "error", [DeadlineExceeded("late"), QueueFull("full", limit=1, retry_after_seconds=1)]
)
def test_refusals_are_counted(policy: str, error: Exception) -> None:
    outcome = replayed(policy, Played(error=error), arrivals([0, 0.01]))
    assert outcome.refused == 2
    assert np.isinf(outcome.latencies).all()


@pytest.mark.parametrize("policy", ["planner", "fifo-8"])
def test_other_errors_end_the_replay(policy: str) -> None:
    with pytest.raises(ActorError, match="gone"):
        replayed(policy, Played(error=ActorError("gone")), arrivals([0, 0.5, 60]))


@pytest.mark.parametrize("policy", ["planner", "fifo-8"])
def test_a_backlog_is_left_when_nobody_waits_for_it_any_more(policy: str) -> None:
    runtime = Played(0.2)
    outcome = replayed(policy, runtime, arrivals([0] * 30, rows=[8] * 30), deadline=0.01)
    assert outcome.refused == 0
    assert np.isinf(outcome.latencies).all()
    assert runtime.inside == 0, "the next round starts on an idle runtime"


def test_fifo_refuses_what_its_bounded_queue_does_not_hold() -> None:
    runtime = Played(1.0)
    runtime.config = load_config(call={"scheduler.max_queue_rows": 4})
    outcome = replayed("fifo-8", runtime, arrivals([0, *[0.01] * 3], rows=[1, 3, 1, 1]))
    assert outcome.refused == 1
    assert np.isinf(outcome.latencies).tolist() == [False, False, False, True]


def test_latency_counts_from_the_moment_in_the_trace_however_late_it_was_sent() -> None:
    class Busy(Played):
        async def infer_async(self, request: InferenceRequest) -> None:
            stop = asyncio.get_running_loop().time() + 0.05
            while asyncio.get_running_loop().time() < stop:
                pass  # the sender is held up
            await super().infer_async(request)

    outcome = replayed("planner", Busy(), arrivals([0, 0, 0]))
    assert outcome.latencies.max() >= 0.15
    assert outcome.lag_seconds >= 0.04


def test_the_ticks_tell_how_far_the_trace_is() -> None:
    ticks: list[float] = []
    given = arrivals([0, 0.3, 1.0])
    made_up = MadeUp(Signature(inputs=(IDS,), outputs=()), given, 1 << 20)
    run(replay(server("planner", Played()), given, made_up, 1, ticks.append))
    assert len(ticks) == 2
    assert 0.3 <= ticks[0] <= ticks[1]


def test_capacity_is_what_is_answered_while_there_is_always_more() -> None:
    class OneAtATime(Played):
        def __init__(self) -> None:
            super().__init__(0.01)
            self._turn = asyncio.Lock()

        async def infer_async(self, request: InferenceRequest) -> None:
            async with self._turn:
                await super().infer_async(request)

    given = arrivals([0, 1], rows=[1, 2])
    made_up = MadeUp(Signature(inputs=(IDS,), outputs=()), given, 1 << 20)
    runtime = OneAtATime()
    found = run(capacity(server("one-by-one", runtime), given, made_up, 0.6))
    assert 5 < found <= 105
    assert {len(np.asarray(request.inputs["ids"])) for request in runtime.sent} == {1, 2}


def test_the_loop_sleeps_less_than_a_millisecond_where_that_is_asked_for() -> None:
    async def shortest() -> float:
        loop, found = asyncio.get_running_loop(), math.inf
        end = loop.time() + 30  # as long as others have the CPU, none is so short
        while found >= 0.0009 and loop.time() < end:
            start = loop.time()
            await asyncio.sleep(0.0002)
            found = min(found, loop.time() - start)
        return found

    assert run(shortest()) < 0.0009


def test_only_the_planner_may_share_calls_among_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[LraiConfig] = []

    def fake(artifact: object, *, config: LraiConfig, address: str) -> object:
        assert address == "embedded"  # whatever the environment says
        opened.append(config)
        return SimpleNamespace(config=config)

    monkeypatch.setattr(Runtime, "open", fake)
    monkeypatch.setenv("LRAI_ACTOR_REPLICAS", "2")  # fifo has one call at a time, whatever there is
    monkeypatch.setenv("LRAI_ACTOR_DEVICES", "0,1")
    manifest = SimpleNamespace(signature=SIGNATURE)
    for policy in ("planner", "one-by-one", "fifo-8"):
        Server.open(policy, cast("Any", SimpleNamespace(manifest=manifest)))
    default = LraiConfig().scheduler.max_batch_rows
    assert [config.scheduler.max_batch_rows for config in opened] == [default, 1, 1]
    # What fifo puts together is no request of one caller.
    limits = LraiConfig().limits
    assert [config.limits == limits for config in opened] == [True, True, False]
    assert [config.actor.device_of_each for config in opened] == [[""]] * 3
