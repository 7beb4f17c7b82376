"""Who computes for those that wait: never nobody, never two, and whoever waits before a thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait

import pytest

from lrai_core import InferenceResponse
from lrai_deployments.combining import Combiner, Helped
from tests.integration.test_runtime_faults import wait_until

ANSWER = InferenceResponse(model_name="m", model_version="1", id="", outputs={}, parameters={})


class Calls:
    """Calls of at most `most` requests, and by whom each was run."""

    def __init__(self, most: int = 4, seconds: float = 0.0) -> None:
        self.combiner = Combiner(self.step, self.withdraw)
        self.most, self.seconds, self.count = most, seconds, 0
        self.threads: list[int] = []
        self.sizes: list[int] = []
        self.inside = threading.Lock()
        self.may_end = threading.Event()  # calls do
        self.may_end.set()

    def ask(self) -> Helped:
        with self.combiner.door:
            self.count += 1
            future = self.combiner.waiting[self.count] = Helped(self.combiner, self.count)
        return future

    def step(self) -> None:
        assert self.inside.acquire(blocking=False), "two threads compute at once"
        with self.combiner.door:
            taken = [self.combiner.waiting.pop(i) for i in list(self.combiner.waiting)[: self.most]]
        self.threads.append(threading.get_ident())
        self.sizes.append(len(taken))
        time.sleep(self.seconds)
        assert self.may_end.wait(30)
        self.inside.release()
        for future in taken:
            if future.set_running_or_notify_cancel():
                future.set_result(ANSWER)
            future.woken.set()

    def withdraw(self, index: int) -> None:
        with self.combiner.door:
            self.combiner.waiting.pop(index, None)


@pytest.fixture
def one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrai_deployments.combining.available_cpus", lambda: 1)


def in_threads(count: int, work: Callable[[], object]) -> None:
    with ThreadPoolExecutor(count) as pool:
        done, running = wait([pool.submit(work) for _ in range(count)], timeout=30)
        assert not running, "somebody waits for ever"
        for future in done:
            future.result()


def test_who_is_alone_computes_himself() -> None:
    calls = Calls()
    for _ in range(3):
        assert calls.ask().result() is ANSWER
    assert set(calls.threads) == {threading.get_ident()}


def test_nothing_runs_before_somebody_waits() -> None:
    calls = Calls()
    future = calls.ask()
    time.sleep(0.05)
    assert not future.done()
    assert not calls.sizes


def test_many_threads_share_calls_and_all_are_answered() -> None:
    calls = Calls(most=8, seconds=0.001)

    def work() -> None:
        for _ in range(50):
            assert calls.ask().result() is ANSWER

    in_threads(16, work)
    assert sum(calls.sizes) == 16 * 50
    assert len(calls.sizes) < 16 * 50 / 2, "requests share calls"
    assert len(set(calls.threads)) > 1, "who has his answer leaves the rest to others"


def test_several_threads_may_wait_for_one_answer() -> None:
    calls = Calls(seconds=0.005)
    for _ in range(20):
        future = calls.ask()
        in_threads(4, future.result)


def test_who_does_not_wait_any_more_leaves_the_lead_to_another() -> None:
    calls = Calls(most=1, seconds=0.02)

    def work() -> None:
        for _ in range(20):
            future = calls.ask()
            try:
                future.result(0.001)
            except TimeoutError:
                future.exception()

    in_threads(6, work)
    assert sum(calls.sizes) == 120


def test_a_callback_has_it_run_in_a_thread() -> None:
    calls, told = Calls(), threading.Event()
    calls.ask().add_done_callback(lambda _: told.set())
    assert told.wait(10)
    assert calls.threads != [threading.get_ident()]


def test_its_thread_ends_with_it() -> None:
    calls, told = Calls(), threading.Event()
    calls.ask().add_done_callback(lambda _: told.set())
    assert told.wait(10)
    thread = calls.combiner._thread
    calls.combiner.close()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.usefixtures("one_cpu")
def test_on_one_cpu_coroutines_have_their_event_loop_compute() -> None:
    calls = Calls(most=4)

    async def ask() -> None:
        await asyncio.gather(*[asyncio.wrap_future(calls.ask()) for _ in range(10)])

    for _ in range(3):
        asyncio.run(ask())
    assert set(calls.threads) == {threading.get_ident()}
    assert calls.sizes == [4, 4, 2] * 3


@pytest.mark.usefixtures("one_cpu")
def test_a_loop_that_was_stopped_leads_nobody() -> None:
    calls = Calls()

    async def leave() -> None:
        asyncio.wrap_future(calls.ask()).add_done_callback(lambda _: None)

    asyncio.run(leave())  # it ends before it has computed
    assert calls.ask().result(10) is ANSWER


@pytest.mark.usefixtures("one_cpu")
def test_threads_and_coroutines_beside_one_another() -> None:
    calls = Calls(most=2, seconds=0.001)

    async def ask() -> None:
        for _ in range(30):
            await asyncio.gather(*[asyncio.wrap_future(calls.ask()) for _ in range(3)])

    def work() -> None:
        for _ in range(30):
            assert calls.ask().result() is ANSWER

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(work) for _ in range(4)]
        asyncio.run(asyncio.wait_for(ask(), 30))
        assert not wait(asked, timeout=30).not_done
    assert sum(calls.sizes) == 30 * 3 + 30 * 4


def test_what_is_cancelled_is_not_run() -> None:
    calls = Calls()
    first, second = calls.ask(), calls.ask()
    assert first.cancel()
    assert second.result() is ANSWER
    assert calls.sizes == [1]
    with pytest.raises(CancelledError):
        first.result()


@pytest.mark.usefixtures("one_cpu")
def test_who_waits_in_the_thread_of_the_loop_that_leads_computes() -> None:
    calls = Calls(most=1)

    async def ask() -> None:
        first = asyncio.wrap_future(calls.ask())  # has the loop lead
        await asyncio.sleep(0)
        assert calls.ask().result(10) is ANSWER
        assert await first is ANSWER

    asyncio.run(asyncio.wait_for(ask(), 20))


@pytest.mark.usefixtures("one_cpu")
def test_a_loop_that_leads_does_its_other_work_too() -> None:
    calls = Calls(most=1, seconds=0.02)

    async def ask() -> int:
        many = [asyncio.wrap_future(calls.ask()) for _ in range(40)]
        for _ in range(10):  # as a request to another endpoint takes
            await asyncio.sleep(0)
        done = sum(one.done() for one in many)
        await asyncio.gather(*many)
        return done

    assert asyncio.run(ask()) <= 3


@pytest.mark.usefixtures("one_cpu")
def test_a_loop_that_is_kept_from_leading_is_replaced_by_who_waits() -> None:
    """Even where it waits for that thread itself."""
    calls = Calls(most=1)

    async def ask() -> None:
        asyncio.wrap_future(calls.ask()).add_done_callback(lambda _: None)  # has the loop lead
        with ThreadPoolExecutor(1) as pool:  # and now it waits in there
            assert pool.submit(lambda: calls.ask().result(10)).result(10) is ANSWER

    asyncio.run(asyncio.wait_for(ask(), 20))


@pytest.mark.usefixtures("one_cpu")
def test_a_loop_that_waits_for_another_keeps_that_one_from_nothing() -> None:
    """As code that runs a loop of its own in the thread of the first."""
    calls = Calls(most=1)

    async def other() -> InferenceResponse:
        return await asyncio.wrap_future(calls.ask())

    async def ask() -> None:
        first = asyncio.wrap_future(calls.ask())  # has this loop lead
        with ThreadPoolExecutor(1) as pool:  # and now it waits in there
            assert pool.submit(asyncio.run, other()).result(10) is ANSWER
        assert await first is ANSWER

    asyncio.run(asyncio.wait_for(ask(), 20))


@pytest.mark.usefixtures("one_cpu")
def test_a_loop_that_has_ended_keeps_nobody_waiting() -> None:
    calls, waits = Calls(most=1), list[object]()
    loop = asyncio.new_event_loop()

    async def leave() -> None:
        first = asyncio.wrap_future(calls.ask())
        with calls.combiner.door:
            other = calls.combiner.waiting[99] = Helped(calls.combiner, 99)
        waits.append(pool.submit(lambda: other.result(10)))
        while not (other.waiters or other.done()):  # noqa: ASYNC110 - it is another thread
            await asyncio.sleep(0)
        first.cancel()

    with ThreadPoolExecutor(1) as pool:
        loop.run_until_complete(leave())
        loop.close()
        (waiting,) = waits
        assert waiting.result(10) is ANSWER  # type: ignore[attr-defined]


def test_who_leads_does_so_no_longer_than_he_waits() -> None:
    calls = Calls(most=1, seconds=0.05)
    others = [calls.ask() for _ in range(40)]
    mine = calls.ask()
    with pytest.raises(TimeoutError):
        mine.result(0.1)
    assert calls.threads.count(threading.get_ident()) <= 3  # 41, were he to wait for his own
    for one in others:
        one.add_done_callback(lambda _: None)
    assert mine.result(30) is ANSWER


def test_an_heir_that_is_cancelled_hands_on() -> None:
    calls = Calls(most=1)
    calls.may_end.clear()
    with ThreadPoolExecutor(3) as pool:
        leader = pool.submit(calls.ask().result)
        wait_until(lambda: bool(calls.threads))
        heir = calls.ask()
        waits = pool.submit(heir.result)
        wait_until(lambda: heir.waiters == 1)
        with calls.combiner.door:  # the leader cannot appoint anybody yet
            last = Helped(calls.combiner, 99)
        heir.cancel()
        calls.combiner.waiting[99] = last
        calls.may_end.set()
        assert pool.submit(last.result).result(10) is ANSWER
        assert leader.result(10) is ANSWER
        with pytest.raises(CancelledError):
            waits.result(10)


def test_a_thread_that_fails_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    calls = Calls()
    real, failures = calls.combiner._step, [MemoryError(), None]

    def step() -> None:
        if failures and (error := failures.pop(0)):
            raise error
        real()

    calls.combiner._step = step
    told = threading.Event()
    calls.ask().add_done_callback(lambda _: told.set())
    assert told.wait(10)
    assert calls.ask().result(10) is ANSWER


def test_what_nobody_waits_for_any_more_is_run_all_the_same() -> None:
    calls = Calls(most=1)
    calls.may_end.clear()
    with ThreadPoolExecutor(1) as pool:
        leader = pool.submit(calls.ask().result)
        wait_until(lambda: bool(calls.threads))
        left = calls.ask()
        with pytest.raises(TimeoutError):
            left.result(0.001)
        calls.may_end.set()
        assert leader.result(10) is ANSWER
    wait_until(left.done)


async def answer_of(future: Helped) -> InferenceResponse:
    return await future


@pytest.mark.usefixtures("one_cpu")
def test_a_loop_that_computed_the_answer_is_not_woken_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = Calls(most=4)
    woken = list[object]()

    async def ask() -> None:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "call_soon_threadsafe", woken.append)
        found = await asyncio.gather(*[answer_of(calls.ask()) for _ in range(10)])
        assert found == [ANSWER] * 10

    asyncio.run(asyncio.wait_for(ask(), 20))
    assert (calls.sizes, woken) == ([4, 4, 2], [])


def test_a_loop_is_woken_by_the_thread_that_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrai_deployments.combining.available_cpus", lambda: 2)
    calls = Calls(most=2)

    async def ask() -> None:
        assert await asyncio.gather(*[answer_of(calls.ask()) for _ in range(5)]) == [ANSWER] * 5

    asyncio.run(asyncio.wait_for(ask(), 20))
    assert threading.get_ident() not in calls.threads


@pytest.mark.usefixtures("one_cpu")  # else a thread may compute first
@pytest.mark.parametrize("who", ["the caller", "another thread"])
def test_what_is_cancelled_while_a_loop_awaits_it_is_not_run(who: str) -> None:
    calls = Calls()

    async def ask() -> None:
        calls.combiner._leader = asyncio.get_running_loop()  # which computes nothing yet
        future = calls.ask()
        asked = asyncio.ensure_future(answer_of(future))
        await asyncio.sleep(0)
        if who == "the caller":
            asked.cancel()
        else:
            await asyncio.to_thread(future.cancel)
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert future.cancelled()
        assert not calls.combiner.waiting

    asyncio.run(asyncio.wait_for(ask(), 20))
    assert calls.sizes == []


def test_who_awaits_a_request_that_fails_is_told_why() -> None:
    calls = Calls()
    future = calls.ask()
    future.set_exception(TimeoutError("too late"))
    with pytest.raises(TimeoutError, match="too late"):
        asyncio.run(answer_of(future))


def test_who_is_cancelled_before_he_leads_leaves_the_lead_to_others() -> None:
    calls = Calls()
    heir = calls.ask()
    calls.combiner._leader = heir  # as who led before has appointed him
    heir.cancel()
    assert calls.ask().result(10) is ANSWER


def test_where_no_thread_can_be_had_who_comes_next_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    calls, told = Calls(), list[object]()
    monkeypatch.setattr(threading.Thread, "start", full)
    calls.ask().add_done_callback(told.append)
    assert calls.ask().result(10) is ANSWER
    assert told
