"""What the real-time benchmark makes of LRAI's answers."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.realtime import Ours, agreed


def test_an_answer_to_another_request_is_found() -> None:
    ours: Any = Ours.__new__(Ours)
    ours.cosines, ours.expected = [], np.eye(50, dtype=np.float32)
    rows = {index: np.eye(50)[[index % 50]] for index in range(100)}
    ours._compare(rows)
    assert [check.holds for check in agreed("int8", np.concatenate(ours.cosines))] == [True, True]
    ours._compare({**rows, 7: rows[8]})
    assert [check.holds for check in agreed("int8", np.concatenate(ours.cosines))] == [True, False]
    ours._compare({index: rows[index + 1] for index in range(99)})
    assert [check.holds for check in agreed("int8", np.concatenate(ours.cosines))] == [False, False]


def test_where_nobody_was_answered_there_is_nothing_to_compare() -> None:
    ours: Any = Ours.__new__(Ours)
    ours.cosines = []
    ours._compare({})
    assert ours.cosines == []
