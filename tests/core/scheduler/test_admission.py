from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrai_core.config import SchedulerConfig
from lrai_core.errors import QueueFull, RequestError
from lrai_core.scheduler.admission import Admission


def door(rows: int = 10, nbytes: int = 100) -> Admission:
    return Admission(SchedulerConfig(max_queue_rows=rows, max_queue_bytes=nbytes))


def test_the_queue_fills_to_its_limit_exactly() -> None:
    admission = door(rows=10)
    admission.enter(10, 0, 0.0)
    with pytest.raises(QueueFull, match="holds 10 rows, 1 more exceed its 10") as caught:
        admission.enter(1, 0, 0.0)
    assert caught.value.limit == 10
    assert caught.value.http_status == 429


def test_bytes_are_bounded_like_rows() -> None:
    admission = door(nbytes=100)
    admission.enter(1, 60, 0.0)
    with pytest.raises(QueueFull, match="holds 60 bytes, 41 more exceed its 100"):
        admission.enter(1, 41, 0.0)
    admission.enter(1, 40, 0.0)


def test_a_refused_request_leaves_no_trace() -> None:
    admission = door()
    admission.enter(1, 50, 0.0)
    with pytest.raises(QueueFull):
        admission.enter(1, 60, 0.0)
    assert (admission.rows, admission.nbytes) == (1, 50)


def test_what_is_larger_than_the_queue_is_not_told_to_come_again() -> None:
    admission = door(rows=4)
    for rows, nbytes, words in (
        (5, 1, "5 rows, more than the 4"),
        (1, 101, "101 bytes, more than"),
    ):
        with pytest.raises(RequestError, match=words) as caught:
            admission.enter(rows, nbytes, 0.0)
        assert caught.value.http_status == 400
    assert (admission.rows, admission.nbytes) == (0, 0)


def test_room_is_given_back() -> None:
    admission = door(rows=1)
    admission.enter(1, 1, 0.0)
    admission.leave(1, 1)
    admission.enter(1, 1, 0.0)


def test_the_retry_hint_is_when_a_tenth_of_the_queue_has_run_and_never_at_once() -> None:
    admission = door(rows=1000)
    admission.enter(1000, 1, 0.0)
    for seconds_per_row, expected in ((0.05, 5.0), (0.0, 0.1), (1e-6, 0.1)):
        with pytest.raises(QueueFull) as caught:
            admission.enter(1, 1, seconds_per_row)
        assert caught.value.retry_after_seconds == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 60)), max_size=30))
def test_the_bounds_are_never_exceeded(requests: list[tuple[int, int]]) -> None:
    admission = door()
    inside: list[tuple[int, int]] = []
    for rows, nbytes in requests:
        fits = admission.rows + rows <= 10 and admission.nbytes + nbytes <= 100
        try:
            admission.enter(rows, nbytes, 0.0)
        except QueueFull:
            assert not fits
            if inside:
                admission.leave(*inside.pop())
        else:
            assert fits
            inside.append((rows, nbytes))
        assert admission.rows == sum(one[0] for one in inside)
        assert admission.nbytes == sum(one[1] for one in inside)


def test_threads_count_together() -> None:
    admission = door(rows=4000, nbytes=4000)

    def come_and_stay(_: int) -> None:
        for _ in range(500):
            admission.enter(1, 1, 0.0)
            admission.leave(1, 1)
            admission.enter(1, 1, 0.0)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(come_and_stay, range(8)))
    assert (admission.rows, admission.nbytes) == (4000, 4000)
