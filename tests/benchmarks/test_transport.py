"""How the benchmark of the transport sends, and what it makes of the answers."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.transport import Load, arrivals, wrong

LOAD = Load("no-op", "1 KB", [np.zeros((1, 1))] * 3, np.array([[0.0], [1.0], [2.0]]))


def test_arrivals_are_drawn_and_come_in_the_time_for_them() -> None:
    times = arrivals(10_000, 2_000)
    assert times.tolist() == arrivals(10_000, 2_000).tolist(), "alike in every round"
    assert times[-1] == pytest.approx(5.0)
    gaps = np.diff(times)
    assert gaps.min() > 0
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05), "exponential, and not all the same"


def test_an_answer_that_is_another_rows_is_wrong() -> None:
    answers = np.array([[0.0], [1.0], [2.0], [0.0], [2.0]])
    everybody = np.ones(5, bool)
    assert wrong(LOAD, answers, everybody) == 1
    answers[4] = 1.0 + 1e-6
    assert wrong(LOAD, answers, everybody) == 0
    answers[4] = np.nan
    assert wrong(LOAD, answers, everybody) == 1
    assert wrong(LOAD, answers, np.arange(5) < 4) == 0, "who was refused has no answer"
