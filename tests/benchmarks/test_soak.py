"""When the soak benchmark says that something grows, and how it counts ends."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, cast

import numpy as np
import pytest

import lrai_core as lrai
from benchmarks.soak import (
    MOST_MB,
    MOST_STEP_FILES,
    MOST_STEP_MB,
    STEP_MB,
    Ledger,
    flat,
    level,
    trend,
)

ENDED = np.arange(0, 1_000_001, 2_000)


def noise(seed: int) -> Any:
    return np.random.default_rng(seed).normal(0, 0.2, len(ENDED))


def test_a_slope_is_found_under_noise_and_visits() -> None:
    values = 100 + 5 * ENDED / 1e6 + noise(0)
    values[::7] += 3  # while a visitor is there
    found = trend(ENDED.tolist(), values.tolist())
    assert found.slope == pytest.approx(5, abs=0.2)
    assert found.span == pytest.approx(0.8)
    assert found.grown == pytest.approx(4, abs=0.2)
    assert not flat("", found, MOST_MB).holds


@pytest.mark.parametrize("at", [0.35, 0.5, 0.85])
def test_one_step_that_stays_is_found_though_it_has_no_slope(at: float) -> None:
    values = 100 + 3.0 * (at * ENDED[-1] < ENDED) + noise(0) / 10
    values[::7] += 3  # while a visitor is there
    found = trend(ENDED.tolist(), values.tolist())
    assert found.step == pytest.approx(3, abs=0.1)
    assert not level("", found, MOST_STEP_MB).holds
    files = trend(ENDED.tolist(), (20 + 3 * (at * ENDED[-1] < ENDED)).tolist())
    assert files.slope == 0
    assert not level("", files, MOST_STEP_FILES).holds


def test_what_visits_take_and_give_back_is_no_step() -> None:
    values = 100 + 1.05 * (0.6 * ENDED[-1] < ENDED) + noise(2) / 10
    values[::7] += 3
    assert level("", trend(ENDED.tolist(), values.tolist()), MOST_STEP_MB).holds
    files = 38 + (np.arange(len(ENDED)) > 300) + 5 * (np.arange(len(ENDED)) % 9 == 0)
    assert level("", trend(ENDED.tolist(), files.tolist()), MOST_STEP_FILES).holds


def test_what_fills_up_at_first_is_no_growth() -> None:
    values = 100 + np.minimum(ENDED, 150_000) / 1e4 + noise(1)
    found = trend(ENDED.tolist(), values.tolist())
    assert abs(found.grown) < 0.1
    assert flat("", found, MOST_MB).holds


def test_a_descriptor_a_visit_is_a_slope_and_one_for_a_moment_is_none() -> None:
    steps = 20 + ENDED // 50_000
    assert trend(ENDED.tolist(), steps.tolist()).slope > 10
    moments = 20 + (np.arange(len(ENDED)) % 5 == 0)
    assert trend(ENDED.tolist(), moments.tolist()).slope == 0


def test_a_short_run_may_take_one_step_of_the_allocator() -> None:
    ended = ENDED[:20]
    for step, holds in ((0.9, True), (3.0, False)):
        values = 100 + step * np.linspace(0, 1, len(ended))
        assert flat("", trend(ended.tolist(), values.tolist()), MOST_MB).holds is holds
    assert STEP_MB < MOST_MB


def test_without_progress_there_is_no_trend() -> None:
    assert trend([0, 0, 0], [1.0, 2.0, 3.0]).slope == 0


class Backend:
    """Answers as it is told to, or refuses."""

    def __init__(self, *outcomes: Any) -> None:
        self._outcomes = iter(outcomes)
        self._backend = self

    def start(self, request: Any) -> Future[Any]:
        outcome = next(self._outcomes)
        if outcome == "refuse":
            raise lrai.QueueFull("full", limit=1, retry_after_seconds=1)
        future: Future[Any] = Future()
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        elif outcome != "never":
            response = lrai.InferenceResponse(
                model_name="m",
                model_version="1",
                id="",
                outputs={"y": np.full((1, 1), outcome)},
                parameters={},
            )
            future.set_result(response)
        return future


def test_a_ledger_counts_every_end_once_and_gives_its_place_back() -> None:
    late = lrai.DeadlineExceeded("late")
    runtime = cast("lrai.Runtime", Backend(7, 8, late, "refuse", "never", "never"))
    request = lrai.InferenceRequest(model_name="m", inputs={})
    ledger = Ledger(0)
    futures = [ledger.send(runtime, request, 7) for _ in range(6)]
    assert futures[3] is None
    assert futures[4] is not None
    futures[4].cancel()
    assert ledger.counts == {
        "sent": 6,
        "answered": 1,
        "wrong": 1,
        "DeadlineExceeded": 1,
        "QueueFull": 1,
        "cancelled": 1,
    }
    assert sum(ledger.free.acquire(blocking=False) for _ in range(9)) == 5
