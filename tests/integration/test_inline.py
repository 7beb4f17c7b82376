"""Models that run in the runtime's own process: the same answers, and no process of theirs."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import lrai_core as lrai
from lrai_core.scheduler.latency import LatencyModel
from lrai_core.wire.messages import Refused
from lrai_deployments.inline import InlinePool, run
from tests.integration.test_runtime_faults import wait_until
from tests.own_runtime import own_runtime

pytestmark = pytest.mark.server

INLINE = {"actor.isolation": "inline"}


def config(**values: Any) -> lrai.LraiConfig:
    return lrai.load_config(call={"actor.threads": 1} | values)


def request(value: float, rows: int = 1, columns: int = 64) -> lrai.InferenceRequest:
    features = np.full((rows, columns), value, np.float32)
    return lrai.InferenceRequest(model_name="classifier", inputs={"features": features})


def children() -> set[int]:
    """Return the processes that this one has started and that still run.

    What `/proc/self/task/*/children` says misses some where a thread ends meanwhile.
    """
    found = set[int]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
    return found


@pytest.fixture
def inline(classifier_fp32: lrai.Artifact) -> Iterator[lrai.Runtime]:
    with lrai.Runtime(config()) as runtime:
        runtime.load(classifier_fp32, settings=INLINE)
        yield runtime


def test_who_gets_no_thread_to_load_a_model_is_told_and_harms_no_other(
    inline: lrai.Runtime, monkeypatch: pytest.MonkeyPatch, classifier_fp32: lrai.Artifact
) -> None:
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if "_open" in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(lrai.OutOfResources, match="can't start new thread"):
        inline.load(classifier_fp32, name="other", settings=INLINE)
    assert inline.infer(request(1.0)).outputs["logits"].shape == (1, 10)


def test_many_callers_get_the_answers_that_a_process_gives(
    inline: lrai.Runtime, classifier_fp32: lrai.Artifact
) -> None:
    requests = [request(0.01 * i, rows=1 + i % 3) for i in range(300)]
    with ThreadPoolExecutor(32) as callers, held_up(inline, 30) as (began, go_on):
        asked = callers.map(inline.infer, requests)
        assert began.wait(60)
        wait_until(lambda: inline.stats()["request_accepted"] == 32)  # one of each thread
        go_on.set()
        here = list(asked)
    stats = inline.stats()
    assert stats["request_answered"] == len(requests)
    assert stats["batch_completed"] < len(requests), "requests share calls"
    with lrai.Runtime.open(classifier_fp32, config=config()) as runtime:
        for one, answer in zip(requests[:40], here, strict=False):
            expected = runtime.infer(one).outputs["logits"]
            np.testing.assert_allclose(answer.outputs["logits"], expected, atol=1e-4)


def test_it_starts_no_process_and_sends_nothing(classifier_fp32: lrai.Artifact) -> None:
    before = children()  # of earlier tests, and they may end meanwhile
    with lrai.Runtime.open(classifier_fp32, config=config(**INLINE)) as runtime:
        runtime.infer(request(1.0))
        (model,) = runtime.models()
        assert (children() - before, model.actor_pids) == (set(), [])
        assert runtime.stats()["actor_messages_sent"] == 0
        assert runtime.ready() == "idle"
    with lrai.Runtime.open(classifier_fp32, config=config()) as runtime:
        assert children() - before, "which is what would be seen"


def test_what_the_engine_refuses_ends_alone(
    inline: lrai.Runtime, minilm_fp32: lrai.Artifact
) -> None:
    inline.load(minilm_fp32, settings=INLINE)

    def ask(token: int) -> Any:
        ids = np.full((1, 5), token, np.int64)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        try:
            return inline.infer(lrai.InferenceRequest(model_name="minilm", inputs=inputs))
        except lrai.LraiError as error:
            return error

    with ThreadPoolExecutor(16) as callers:
        outcomes = list(callers.map(ask, [2_000_000 if i == 7 else 2_000 + i for i in range(16)]))
    bad = outcomes.pop(7)
    assert isinstance(bad, lrai.RequestError | lrai.ActorError), bad
    assert all(isinstance(outcome, lrai.InferenceResponse) for outcome in outcomes)


def test_a_model_moves_in_and_out_of_the_process_while_it_serves(
    inline: lrai.Runtime, classifier_fp32: lrai.Artifact
) -> None:
    expected = inline.infer(request(0.5)).outputs["logits"]
    inline.swap("classifier", classifier_fp32, settings={"actor.isolation": "process"})
    (model,) = inline.models()
    assert model.actor_pids
    np.testing.assert_allclose(inline.infer(request(0.5)).outputs["logits"], expected, atol=1e-4)
    inline.rollback("classifier")
    (model,) = inline.models()
    assert not model.actor_pids
    np.testing.assert_allclose(inline.infer(request(0.5)).outputs["logits"], expected, atol=1e-4)
    inline.unload("classifier")
    with pytest.raises(lrai.ModelNotFound):
        inline.infer(request(0.5))


def test_a_model_that_cannot_be_opened_says_why_and_leaves_nothing(
    classifier_fp32: lrai.Artifact, tmp_path: Path
) -> None:
    broken = tmp_path / "classifier.lrai"
    shutil.copytree(classifier_fp32.path, broken)
    for model in broken.glob("variants/*/model.onnx"):
        model.write_bytes(model.read_bytes()[:-1] + b"\0")
    with lrai.Runtime(config()) as runtime:
        with pytest.raises(lrai.ArtifactError, match=r"model\.onnx"):
            runtime.load(broken, settings=INLINE)
        assert runtime.models() == []
        runtime.load(classifier_fp32, settings=INLINE)
        assert runtime.infer(request(1.0)).outputs["logits"].shape == (1, 10)


def test_a_runtime_that_processes_share_has_no_model_in_its_own(
    classifier_fp32: lrai.Artifact,
) -> None:
    with own_runtime(), lrai.Runtime(config(), address="auto") as runtime:
        with pytest.raises(lrai.UsageError, match=r"actor\.isolation inline .* this one is shared"):
            runtime.load(classifier_fp32, settings=INLINE)
        runtime.load(classifier_fp32)
        assert runtime.infer(request(1.0)).outputs["logits"].shape == (1, 10)
        runtime.unload("classifier")


def test_isolation_is_one_of_two_words() -> None:
    with pytest.raises(lrai.UsageError, match=r"isolation .*'thread'"):
        config(**{"actor.isolation": "thread"})


def together(runtime: lrai.Runtime, requests: list[lrai.InferenceRequest]) -> list[Any]:
    """Return what becomes of requests that are brought together."""
    return [one.result() if isinstance(one, Future) else one for one in runtime.start_all(requests)]


def test_what_is_brought_together_runs_on_the_thread_that_brings_it(
    inline: lrai.Runtime, classifier_fp32: lrai.Artifact
) -> None:
    requests = [request(0.01 * i, rows=1 + i % 3) for i in range(40)]
    answers = inline.start_all(requests)
    assert all(isinstance(answer, lrai.InferenceResponse) for answer in answers)
    stats = inline.stats()
    assert stats["request_answered"] == stats["request_accepted"] == 40
    assert stats["batch_completed"] < 40, "requests share calls"
    with lrai.Runtime.open(classifier_fp32, config=config()) as elsewhere:
        for one, answer in zip(requests, together(elsewhere, requests), strict=True):
            mine = together(inline, [one])[0]
            assert mine.parameters == answer.parameters
            np.testing.assert_allclose(mine.outputs["logits"], answer.outputs["logits"], atol=1e-4)


def test_each_is_refused_for_itself(inline: lrai.Runtime) -> None:
    wrong = request(1.0, columns=63)
    hurried = lrai.InferenceRequest(
        model_name="classifier", inputs=request(1.0).inputs, timeout_ms=1e-6
    )
    nobody = lrai.InferenceRequest(model_name="nobody", inputs={})
    good = request(1.0)
    answers = together(inline, [wrong, good, hurried, good])
    assert isinstance(answers[0], lrai.InvalidTensor)
    assert isinstance(answers[2], lrai.DeadlineExceeded)
    assert all(isinstance(answers[i], lrai.InferenceResponse) for i in (1, 3))
    other = together(inline, [nobody, good])  # for two models: not on this thread
    assert isinstance(other[0], lrai.ModelNotFound)
    assert isinstance(other[1], lrai.InferenceResponse)
    assert inline.stats()["request_failed"] == 1


def test_what_the_engine_refuses_ends_alone_here_too(
    inline: lrai.Runtime, minilm_fp32: lrai.Artifact
) -> None:
    inline.load(minilm_fp32, settings=INLINE)

    def tokens(token: int) -> lrai.InferenceRequest:
        ids = np.full((1, 5), token, np.int64)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        return lrai.InferenceRequest(model_name="minilm", inputs=inputs)

    outcomes = together(inline, [tokens(2_000_000 if i == 3 else 2_000 + i) for i in range(8)])
    assert isinstance(outcomes.pop(3), lrai.RequestError | lrai.ActorError)
    assert all(isinstance(outcome, lrai.InferenceResponse) for outcome in outcomes)


def test_a_broken_plan_means_one_by_one(
    inline: lrai.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr("lrai_deployments.here.plan", broken)
    answers = together(inline, [request(float(i)) for i in range(5)])
    assert all(isinstance(answer, lrai.InferenceResponse) for answer in answers)
    stats = inline.stats()
    assert (stats["planner_failed"], stats["batch_completed"]) == (5, 5)


@pytest.mark.parametrize("answer", [None, math.nan])
def test_a_broken_latency_model_means_one_by_one(
    inline: lrai.Runtime, monkeypatch: pytest.MonkeyPatch, answer: float | None
) -> None:
    def broken(*_: Any) -> float:
        if answer is None:
            raise ZeroDivisionError
        return answer

    for method in ("engine_seconds", "call_seconds", *(["variant", "observe"] * (answer is None))):
        monkeypatch.setattr(LatencyModel, method, broken)
    answers = together(inline, [request(float(i)) for i in range(5)])
    answers.append(inline.infer(request(1.0)))
    assert all(isinstance(answer, lrai.InferenceResponse) for answer in answers)
    stats = inline.stats()
    assert (stats["batch_completed"], stats["outstanding_rows"]) == (6, 0)
    assert stats["planner_failed"] >= 6


def test_together_they_follow_a_swap_a_canary_and_an_end(
    inline: lrai.Runtime, classifier_fp32: lrai.Artifact
) -> None:
    good = [request(0.5), request(0.6)]
    (first,) = {answer.model_version for answer in together(inline, good)}
    second = inline.swap("classifier", classifier_fp32, settings=INLINE)
    assert {answer.model_version for answer in together(inline, good)} == {second}
    inline.load(classifier_fp32, name="classifier", settings=INLINE, share=0.5)
    versions = {answer.model_version for answer in together(inline, good * 40)}
    assert len(versions) == 2, "shares are kept"
    assert first != second
    inline.unload("classifier")
    assert all(isinstance(answer, lrai.ModelNotFound) for answer in together(inline, good))


def test_what_is_asked_of_a_canary_by_name_counts_for_it(
    inline: lrai.Runtime, classifier_fp32: lrai.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    stable = inline.models()[0].version
    inline.load(classifier_fp32, name="classifier", settings=INLINE, share=0.01)
    (canary,) = {model.version for model in inline.models()} - {stable}
    pool: InlinePool = inline._backend._pool  # type: ignore[attr-defined]
    opened = pool.opened(f"classifier@{canary}")
    assert opened is not None

    def run_but(load: Any, session: Any, batch: Any) -> Any:
        broken = Refused(batch.number, "out of memory", invalid=False)
        return broken if session in opened[1] else run(load, session, batch)

    for module in ("here", "inline"):
        monkeypatch.setattr(f"lrai_deployments.{module}.run", run_but)
    for version, times in [(stable, 200), (canary, 20)]:
        asked = msgspec.structs.replace(request(0.5), model_version=version)
        for _ in range(times):
            with contextlib.suppress(lrai.ActorError):
                inline.infer(asked)
    wait_until(lambda: inline.deployments()[0].frozen is not None)
    assert inline.deployments()[0].shares == {stable: 1.0, canary: 0.0}


@contextmanager
def held_up(
    inline: lrai.Runtime, hang_seconds: float = 0.5
) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Have calls wait; yield what says that one has begun, and what lets them go on.

    One that takes longer than a hang is one, unless it was foreseen.
    """
    began, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        began.set()
        go_on.wait(300)
        return run(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrai_deployments.here.run", slow)
        hang = replace(inline.config.actor, hang_seconds=hang_seconds)
        patch.setattr(inline._backend, "config", replace(inline.config, actor=hang))
        try:
            yield began, go_on
        finally:
            go_on.set()


def test_a_call_that_hangs_here_is_told(inline: lrai.Runtime) -> None:
    with held_up(inline) as (began, go_on):
        caller = threading.Thread(target=together, args=(inline, [request(1.0)]))
        caller.start()
        assert began.wait(60)
        deadline = time.monotonic() + 10
        while inline.ready() != "stalled" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert inline.ready() == "stalled"
        go_on.set()
        caller.join()
    assert inline.ready() == "idle"


def test_a_long_call_that_was_foreseen_is_no_hang(inline: lrai.Runtime) -> None:
    (here,) = inline._backend._here.values()  # type: ignore[attr-defined]
    here._latency.engine_seconds = lambda *_: 10.0
    with held_up(inline) as (began, go_on):
        caller = threading.Thread(target=inline.infer, args=(request(1.0),))
        caller.start()
        assert began.wait(60)
        time.sleep(0.8)
        assert inline.ready() == "ok"
        go_on.set()
        caller.join()


def test_who_waits_for_several_hears_of_what_was_cancelled(inline: lrai.Runtime) -> None:
    futures = [inline._backend.start(request(1.0)) for _ in range(2)]
    assert futures[0].cancel()
    assert futures[0].cancel()
    assert not wait(futures[:1], timeout=60).not_done
    assert futures[1].result(60).outputs["logits"].shape == (1, 10)
    assert inline.stats()["outstanding_rows"] == 0


def test_draining_waits_for_what_was_brought_together(inline: lrai.Runtime) -> None:
    answers = list[Any]()
    with held_up(inline) as (began, go_on):
        some = [request(float(i)) for i in range(3)]
        caller = threading.Thread(target=lambda: answers.extend(together(inline, some)))
        caller.start()
        assert began.wait(60)
        assert inline.stats()["outstanding_rows"] == 3
        threading.Timer(0.5, go_on.set).start()
        assert inline.drain()
        caller.join()
    assert all(isinstance(answer, lrai.InferenceResponse) for answer in answers)


def test_what_is_told_of_an_answer_may_ask_for_more(inline: lrai.Runtime) -> None:
    more, done = list[Any](), threading.Semaphore(0)

    def ask_again(_: object) -> None:
        more.extend([*together(inline, [request(2.0)]), inline.infer(request(3.0))])
        done.release()

    future = inline._backend.start(request(1.0))
    future.add_done_callback(ask_again)
    assert done.acquire(timeout=60)
    waiting = [inline._backend.start(request(1.0)) for _ in range(2)]
    for one in waiting:
        one.add_done_callback(ask_again)
    assert waiting[0].result(60).outputs["logits"].shape == (1, 10)
    for _ in waiting:
        assert done.acquire(timeout=60)
    assert all(isinstance(answer, lrai.InferenceResponse) for answer in more)


def test_a_time_that_is_text_is_refused_and_nobody_counts_it(inline: lrai.Runtime) -> None:
    wrong: Any = "100"
    bad = msgspec.structs.replace(request(1.0), timeout_ms=wrong)
    refused, answered = together(inline, [bad, request(1.0)])
    assert isinstance(refused, lrai.RequestError)
    assert isinstance(answered, lrai.InferenceResponse)
    with pytest.raises(lrai.RequestError, match="timeout_ms is str, a number up to 1e300"):
        inline.infer(bad)
    (version,) = inline._backend.versions.values()  # type: ignore[attr-defined]
    assert version.inside == 0


def test_who_waits_behind_others_is_told_in_time_and_nothing_is_left_of_anybody(
    inline: lrai.Runtime,
) -> None:
    """A low priority is no reason to be kept waiting beyond the time that was given."""
    stop, (here,) = threading.Event(), inline._backend._here.values()  # type: ignore[attr-defined]

    def busy() -> None:
        while not stop.is_set():
            inline.infer(request(1.0))

    threads = [threading.Thread(target=busy) for _ in range(4)]
    for thread in threads:
        thread.start()
    low = request(2.0)
    low = msgspec.structs.replace(low, timeout_ms=30.0, parameters={"priority": 7})
    began, outcomes = time.monotonic(), list[object]()
    for _ in range(20):
        try:
            outcomes.append(inline.infer(low))
        except lrai.DeadlineExceeded as error:
            outcomes.append(error)
    seconds = time.monotonic() - began
    stop.set()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 20
    assert seconds < 20 * 1.0, "each within its time, and a call"
    assert len(here._queue._deadlines) < 50, "of the many that were answered nothing is kept"


@pytest.mark.parametrize("timeout_ms", [10**400, "soon"])
def test_a_time_that_is_none_is_refused_and_leaves_nothing_inside(
    inline: lrai.Runtime, timeout_ms: Any
) -> None:
    wrong = msgspec.structs.replace(request(1.0), timeout_ms=timeout_ms)
    with pytest.raises(lrai.RequestError, match="timeout_ms is"):
        inline.infer(wrong)
    good, bad = together(inline, [request(1.0), wrong])
    assert isinstance(good, lrai.InferenceResponse)
    assert isinstance(bad, lrai.RequestError)
    assert inline.stats()["outstanding_rows"] == 0


def test_a_model_that_was_slow_once_is_tried_again(inline: lrai.Runtime) -> None:
    (here,) = inline._backend._here.values()  # type: ignore[attr-defined]
    (curve,) = here._latency._curves
    curve.scale = 1e9  # as it was learned
    hurried = msgspec.structs.replace(request(1.0), timeout_ms=5000.0)
    here._seen = time.monotonic() + 60  # not long ago, however long that takes
    with pytest.raises(lrai.DeadlineExceeded):
        inline.infer(hurried)
    here._seen = time.monotonic() - 2.0  # seconds ago
    assert inline.infer(hurried).outputs["logits"].shape == (1, 10)
    curve.scale, here._seen = 1e9, time.monotonic() + 60
    assert isinstance(together(inline, [hurried, hurried])[0], lrai.DeadlineExceeded)
    here._seen = time.monotonic() - 2.0
    answers = together(inline, [hurried, hurried])
    assert [type(answer) for answer in answers].count(lrai.InferenceResponse) >= 1


def test_a_model_that_is_fast_again_is_believed_from_its_next_answer_on(
    inline: lrai.Runtime,
) -> None:
    (here,) = inline._backend._here.values()  # type: ignore[attr-defined]
    while here._latency.call_seconds(1, 0) < 30.0:
        here._latency.observe(1, 0, None, 60.0)
    here._seen = time.monotonic() - 2.0
    hurried = msgspec.structs.replace(request(1.0), timeout_ms=5000.0)
    for _ in range(100):
        assert inline.infer(hurried).outputs["logits"].shape == (1, 10)
    assert here._latency.call_seconds(1, 0) < 5.0


def test_what_can_be_in_time_in_calls_that_are_shared_is_not_refused(inline: lrai.Runtime) -> None:
    """One after the other they would be late."""
    (here,) = inline._backend._here.values()  # type: ignore[attr-defined]
    latency = here._latency
    latency.overhead_seconds = 0.5
    alone = latency.call_seconds(1, 0) * latency.margin
    given_ms = 32 * alone * 1e3 / 3
    some = [msgspec.structs.replace(request(float(i)), timeout_ms=given_ms) for i in range(32)]
    answers = together(inline, some)
    assert all(isinstance(answer, lrai.InferenceResponse) for answer in answers)


def test_a_runtime_that_drains_takes_nothing_together_either(inline: lrai.Runtime) -> None:
    assert inline.drain()
    assert isinstance(together(inline, [request(1.0)])[0], lrai.NotReady)


@pytest.mark.parametrize("timeout_ms", [float("nan"), -1.0, 0.0])
def test_a_time_that_is_none_harms_nobody_else(inline: lrai.Runtime, timeout_ms: float) -> None:
    bad = lrai.InferenceRequest(
        model_name="classifier", inputs=request(1.0).inputs, timeout_ms=timeout_ms
    )
    answers = together(inline, [request(1.0), bad, request(2.0), request(3.0)])
    assert isinstance(answers.pop(1), lrai.DeadlineExceeded)
    assert all(isinstance(answer, lrai.InferenceResponse) for answer in answers)
    assert isinstance(inline.infer(request(4.0)), lrai.InferenceResponse)
    assert inline.stats()["outstanding_rows"] == 0
