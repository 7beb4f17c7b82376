"""Traces: what is read, what is refused and how, and what a part of one keeps of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrai_report import trace as module
from lrai_report.trace import (
    MAX_BYTES,
    Arrivals,
    Counts,
    TraceError,
    fit_lengths,
    part,
    read_trace,
    slices,
)


def written(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text, encoding="utf-8")
    return path


def arrivals(folder: Path, text: str) -> Arrivals:
    found = read_trace(written(folder, text))
    assert isinstance(found, Arrivals)
    return found


def at(*seconds: float) -> Arrivals:
    when = np.array(seconds, np.float64)
    return Arrivals(when, np.arange(1, len(when) + 1), np.ones(len(when), np.int64))


@pytest.fixture
def far_east(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "FAR-9")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("far_east")
def test_columns_are_found_by_name_and_moments_without_zone_are_utc(tmp_path: Path) -> None:
    found = arrivals(
        tmp_path,
        "GeneratedTokens, TIMESTAMP ,ContextTokens\n"
        "44,2023-11-16 18:15:46.6805900,374\n"
        "\n"
        "9,2023-11-16T18:15:48.1805900Z,12\n",
    )
    assert np.allclose(found.seconds, [0, 1.5])
    assert found.lengths.tolist() == [374, 12]
    assert found.rows.tolist() == [1, 1]


def test_seconds_may_be_numbers_and_lines_out_of_order(tmp_path: Path) -> None:
    found = arrivals(tmp_path, "rows,time,length\n3,10.5,30\n1,10,10\n2,10.25,20\n")
    assert found.seconds.tolist() == [0, 0.25, 0.5]
    assert found.lengths.tolist() == [10, 20, 30]
    assert found.rows.tolist() == [1, 2, 3]


@pytest.mark.parametrize("header", ["requests_per_second\n", "", "\ufeffanything\n"])
def test_a_single_column_is_requests_per_second_with_or_without_a_name(
    tmp_path: Path, header: str
) -> None:
    found = read_trace(written(tmp_path, f"{header}5\n0\n7.5\n"))
    assert isinstance(found, Counts)
    assert found.per_second.tolist() == [5, 0, 7.5]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "the file is empty"),
        ("a,b\n1,2\n", 1, "the columns are a, b; one called timestamp or time is needed"),
        ("time,length\n1,2\n2\n", 3, "1 columns, the first line has 2"),
        ("time\n1\nsoon\n", 3, "'soon' is no number"),
        ("time\n2023-01-01\n17\n", 3, "the time is '17'; ISO 8601 as in"),
        ("time\nyesterday\n", 2, "the time is 'yesterday'; ISO 8601 as in"),
        ("time\n1\nnan\n", 3, "'nan' is no number"),
        ("time,length\n1,2.5\n", 2, "length is '2.5'; a whole number from 0"),
        ("time,tokens\n1,-1\n", 2, "tokens is '-1'; a whole number from 0"),
        ("time,rows\n1,0\n", 2, "rows is '0'; a whole number from 1"),
        ("time\n5\n5\n", 3, "2 requests at one time; two at different times are needed"),
        ("time\n", 1, "0 requests at one time"),
        ("rate\n3\n-1\n", 3, "-1 requests per second; 0 to 1e+09 are allowed"),
        ("rate\n0\n0\n", 3, "no requests: the column of requests per second holds nothing"),
        ("rate\n1,2\n", 2, "2 columns, the first line has 1"),
        ("rate\n1e300\n", 2, "'1e300' is no number, or beyond 1e+12"),
        ('time\n1\n"' + "9" * 200_000 + '"\n', 3, "field larger than field limit"),
    ],
)
def test_an_error_names_file_and_line_and_what_is_allowed(
    tmp_path: Path, text: str, line: int, words: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}, line {line}: {words}")
    assert caught.value.exit_code == 4


def test_what_is_no_text_no_file_or_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.csv"
    with pytest.raises(TraceError, match=r"trace\.csv: there is no such file"):
        read_trace(path)
    path.write_bytes(b"time\n1\n\xff\n")
    with pytest.raises(TraceError, match="this is not UTF-8 text"):
        read_trace(path)
    with pytest.raises(TraceError, match="is not a plain file"):
        read_trace(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TraceError, match="is not a plain file"):
        read_trace(tmp_path / "pipe")
    os.truncate(path, MAX_BYTES + 1)  # holds nothing on the disk
    with pytest.raises(TraceError, match="268,435,457 bytes, 268,435,456 are allowed"):
        read_trace(path)
    monkeypatch.setattr(module, "MAX_LINES", 3)
    assert isinstance(read_trace(written(tmp_path, "rate\n1\n2\n3\n")), Counts)
    with pytest.raises(TraceError, match="line 5: over 3 lines"):
        read_trace(written(tmp_path, "rate\n1\n2\n3\n4\n"))


LINES = st.lists(
    st.lists(
        st.one_of(
            st.sampled_from(["time", "timestamp", "rows", "length", "1", "2.5", "2023-01-01"]),
            st.floats().map(str),
            st.datetimes().map(str),
            st.text(max_size=5),
        ),
        min_size=1,
        max_size=3,
    ).map(",".join),
    max_size=6,
).map("\n".join)


@settings(deadline=None, max_examples=50)
@given(LINES)
def test_any_text_is_a_trace_that_can_be_cut_or_a_trace_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_text(text.encode(errors="replace").decode(), encoding="utf-8", newline="")
    try:
        found = part(read_trace(path), 10, 3)
    except TraceError:
        return
    assert len(found.seconds) == len(found.lengths) == len(found.rows)
    assert ((found.seconds >= 0) & (found.seconds < 3)).all()


TIMES = st.lists(st.floats(0, 1e6), min_size=2, max_size=40).filter(lambda t: max(t) > min(t))


@settings(deadline=None, max_examples=50)
@given(TIMES, st.floats(0.5, 50), st.floats(1, 20))
def test_a_part_has_the_rate_that_was_asked_for_and_the_order_of_the_trace(
    times: list[float], rate: float, seconds: float
) -> None:
    whole = at(*(np.sort(times) - min(times)))
    try:
        found = part(whole, rate, seconds)
    except TraceError:  # so many come at once
        assert whole.seconds[: round(rate * seconds) + 1].max() == 0
        return
    count = round(rate * seconds)
    assert len(found.seconds) == count
    assert (np.diff(found.seconds) >= 0).all()
    assert ((found.seconds >= 0) & (found.seconds < seconds)).all()
    assert found.lengths.tolist() == np.resize(whole.lengths, count).tolist()


def test_a_part_keeps_the_proportions_of_the_gaps() -> None:
    found = part(at(0, 1, 3, 4, 8, 9), rate=2, seconds=2)
    assert np.allclose(found.seconds, [0, 0.25, 0.75, 1.0])  # 8 s, where the next came, are 2 s


def test_what_comes_at_the_very_end_is_still_within_the_part() -> None:
    (first, last) = part(at(0, 1, 1, 2), rate=2, seconds=1).seconds
    assert first == 0
    assert 1 - 1e-9 < last < 1


def test_a_trace_that_is_too_short_is_repeated_a_mean_gap_after_its_end() -> None:
    found = part(at(0, 1, 4), rate=6, seconds=1)
    assert np.allclose(found.seconds * 12, [0, 1, 4, 6, 7, 10])
    assert found.lengths.tolist() == [1, 2, 3, 1, 2, 3]


def test_counts_become_as_many_arrivals_within_their_seconds() -> None:
    counts = Counts(np.array([100.0, 0.0, 300.0]))
    found = part(counts, rate=500, seconds=3)
    seen = np.bincount(found.seconds.astype(np.int64), minlength=3)
    for got, expected in zip(seen, (375, 0, 1125), strict=True):
        assert abs(got - expected) <= 6 * np.sqrt(expected)
    assert (np.diff(found.seconds) >= 0).all()
    within = np.modf(found.seconds)[0]
    assert abs(within.mean() - 0.5) < 6 / np.sqrt(12 * len(within))
    assert np.array_equal(part(counts, 500, 3).seconds, found.seconds)
    assert not np.array_equal(part(counts, 500, 3, seed=1).seconds[:9], found.seconds[:9])


def test_counts_may_be_very_small_or_large() -> None:
    for count in (2.2e-313, 1e9):
        assert abs(len(part(Counts(np.array([count])), 100, 9).seconds) - 900) < 6 * 30


def test_the_last_second_of_counts_may_be_cut() -> None:
    found = part(Counts(np.array([100.0])), rate=1000, seconds=2.5)
    assert found.seconds.max() < 2.5
    assert abs(len(found.seconds) - 2500) < 6 * 50
    assert abs((found.seconds > 2).sum() - 500) < 6 * np.sqrt(500)


def test_a_part_without_requests_is_refused() -> None:
    with pytest.raises(TraceError, match="the trace's first 2 s are without requests"):
        part(Counts(np.array([0.0, 0.0, 5.0])), 10, 2)
    with pytest.raises(TraceError, match="nothing comes from second 0 to 2"):
        slices(part(at(0, 1), 0.1, 2), 2, 1)
    with pytest.raises(TraceError, match="the trace's first 3 requests all come at one moment"):
        part(at(0, 0, 0, 5), 1, 2)


def test_lengths_are_drawn_where_the_trace_tells_none() -> None:
    counts = Counts(np.array([50.0]))
    assert not part(counts, 100, 4).lengths.any()
    drawn = part(counts, 100, 4, lengths=(3, 5)).lengths
    assert set(drawn.tolist()) == {3, 4, 5}
    told = at(0, 1, 2)
    assert part(told, 1, 2, lengths=(30, 50)).lengths.tolist() == [1, 2]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 10**9), min_size=1, max_size=50),
    st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)).map(sorted),
)
def test_fitted_lengths_are_within_the_range_and_in_the_same_order(
    lengths: list[int], ends: list[int]
) -> None:
    low, high = ends
    fitted = fit_lengths(np.array(sorted(lengths)), low, high)
    assert ((fitted >= low) & (fitted <= high)).all()
    assert (np.diff(fitted) >= 0).all()


def test_all_but_the_tails_of_the_lengths_fill_the_range_in_proportion() -> None:
    lengths = np.array([*range(1001), 10**6, 10**6])
    fitted = fit_lengths(lengths, 10, 110)
    assert fitted[[0, 500, 1000, -1]].tolist() == [10, 60, 110, 110]
    assert fit_lengths(np.array([7, 7]), 10, 20).tolist() == [10, 10]


def test_slices_are_all_of_a_part_each_from_its_own_beginning() -> None:
    first, second = slices(at(0, 0.5, 1.0, 1.75), 1, 2)
    assert first.seconds.tolist() == [0, 0.5]
    assert second.seconds.tolist() == [0, 0.75]
    assert second.lengths.tolist() == [3, 4]
    with pytest.raises(TraceError, match="nothing comes from second 1 to 2"):
        slices(at(0, 0.5), 1, 2)
