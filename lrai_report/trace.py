"""Traces of traffic: read from CSV, and cut and scaled for a replay."""

from __future__ import annotations

import csv
import math
import stat
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Final, TextIO

import numpy as np
from numpy.typing import NDArray

from lrai_core import EnvironmentProblem, LraiError

MAX_BYTES: Final = 256 << 20
MAX_LINES: Final = 5_000_000
_TIME: Final = ("timestamp", "time")
_LENGTH: Final = ("length", "tokens", "contexttokens")
_ROWS: Final = ("rows",)
_LARGEST: Final = 1e12  # of any number
_MOST: Final = 1e9  # of a length, of rows and of requests per second
_TAILS: Final = (1, 99)  # percentiles of the lengths that are laid over a range


class TraceError(LraiError):
    """The file is no trace that can be used."""

    exit_code = 4


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Requests in order of arrival, one element each.

    Attributes:
        seconds: When, from the first moment on.
        lengths: Extent of the length axis, 0 where the trace does not tell.
        rows: Rows, at least 1.
    """

    seconds: NDArray[np.float64]
    lengths: NDArray[np.int64]
    rows: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Counts:
    """How many requests came in each second."""

    per_second: NDArray[np.float64]


Trace = Arrivals | Counts
Range = tuple[int, int]  # both ends belong to it


def read_trace(path: Path) -> Trace:
    """Return what a CSV file tells of traffic.

    Columns are found by name, whatever their case: `timestamp` or `time` (ISO 8601, without a zone
    in UTC, or seconds as a number), and, where there are such, `length`, `tokens` or
    `ContextTokens`, and `rows`. A single column of another name, or of none, holds requests per
    second. Lines need not be in order of time; where all times are whole seconds, the requests of
    one are spread over it.

    Raises:
        TraceError: It cannot be used; names the line.
        EnvironmentProblem: It cannot be read.
    """
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise TraceError(f"{path} is not a plain file")
        if info.st_size > MAX_BYTES:
            raise TraceError(f"{path} has {info.st_size:,} bytes, {MAX_BYTES:,} are allowed")
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return _parse(stream, str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise TraceError(f"{path}: there is no such file") from None
    except OSError as error:
        raise EnvironmentProblem(f"{path} cannot be read: {error.strerror}") from None


def part(
    trace: Trace, rate: float, seconds: float, *, lengths: Range | None = None, seed: int = 0
) -> Arrivals:
    """Return the beginning of a trace, with a mean of `rate` requests per second over `seconds`.

    Arrivals come closer together or farther apart, `rate` x `seconds` of them. Of counts per second
    the seconds stay as they are: in each a Poisson number of requests comes, at any moment of it. A
    trace that is too short is repeated.

    Args:
        trace: Whole.
        rate: Of this part.
        seconds: How long it is.
        lengths: They are drawn from here where the trace tells none.
        seed: Of all that is drawn.

    Raises:
        TraceError: Nothing comes in this part, or all of it at one moment.
    """
    random = np.random.default_rng(seed)
    if isinstance(trace, Counts):
        arrivals = _expand(trace.per_second, rate, seconds, random)
    else:
        arrivals = _scale(trace, rate, seconds)
    if lengths is None or arrivals.lengths.any():
        return arrivals
    low, high = lengths
    drawn = random.integers(low, high, len(arrivals.seconds), endpoint=True)
    return replace(arrivals, lengths=drawn)


def fit_lengths(lengths: NDArray[np.int64], low: int, high: int) -> NDArray[np.int64]:
    """Return lengths between `low` and `high`, the longer ones of the trace still the longer ones.

    The 1st and the 99th percentile come to lie on the ends, the rest between them in proportion;
    what is outside is cut. Lengths that are all alike are only cut.
    """
    least, most = np.percentile(lengths, _TAILS)
    scaled = lengths if most <= least else low + (lengths - least) * ((high - low) / (most - least))
    return np.clip(np.rint(scaled), low, high).astype(np.int64)


def slices(arrivals: Arrivals, seconds: float, count: int) -> list[Arrivals]:
    """Return `count` parts of `seconds` each, one after the other, each from its own beginning on.

    Raises:
        TraceError: Nothing comes in one of them.
    """
    found = []
    for index in range(count):
        begin, end = np.searchsorted(arrivals.seconds, (index * seconds, (index + 1) * seconds))
        if begin == end:
            raise TraceError(
                f"nothing comes from second {index * seconds:g} to {(index + 1) * seconds:g}; "
                "more seconds or a higher rate is needed"
            )
        when = arrivals.seconds[begin:end] - index * seconds
        found.append(Arrivals(when, arrivals.lengths[begin:end], arrivals.rows[begin:end]))
    return found


def _scale(trace: Arrivals, rate: float, seconds: float) -> Arrivals:
    count, there = round(rate * seconds), len(trace.seconds)
    span = float(trace.seconds[-1])
    lap, index = np.divmod(np.arange(count + 1), there)
    when = trace.seconds[index] + lap * (span + span / (there - 1))
    if count and when[-1] <= 0:
        raise TraceError(f"the trace's first {count + 1} requests all come at one moment")
    index = index[:-1]
    scaled = np.minimum(when[:-1] / when[-1] * seconds, np.nextafter(seconds, 0))
    return Arrivals(scaled, trace.lengths[index], trace.rows[index])


def _expand(
    per_second: NDArray[np.float64], rate: float, seconds: float, random: np.random.Generator
) -> Arrivals:
    expected = np.resize(per_second, math.ceil(seconds))
    extent = np.ones_like(expected)
    extent[-1] = seconds - (len(extent) - 1)
    expected = expected * extent
    if expected.sum() <= 0:
        raise TraceError(f"the trace's first {seconds:g} s are without requests")
    counts = random.poisson(expected / expected.sum() * (rate * seconds))
    second = np.repeat(np.arange(len(counts)), counts)
    when = np.sort(second + random.random(len(second)) * extent[second])
    when = np.minimum(when, np.nextafter(seconds, 0))
    return Arrivals(when, np.zeros(len(when), np.int64), np.ones(len(when), np.int64))


def _parse(stream: TextIO, name: str) -> Trace:
    reader = csv.reader(stream)
    try:
        lines = _lines(reader)
        header = next(lines, None)
        if header is None:
            raise ValueError("the file is empty; a line of column names is needed")
        columns = [cell.strip().lower() for cell in header]
        if _find(columns, _TIME) is not None:
            return _arrivals(columns, lines)
        if len(columns) == 1:
            return _counts(columns[0], lines)
        raise ValueError(
            f"the columns are {', '.join(columns)[:200]}; one called timestamp or time is needed, "
            "or a single column, of requests per second"
        )
    except UnicodeDecodeError:
        raise TraceError(f"{name}, after line {reader.line_num}: this is not UTF-8 text") from None
    except (ValueError, csv.Error) as error:
        raise TraceError(f"{name}, line {max(reader.line_num, 1)}: {error}") from None


def _lines(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """Yield the lines that hold something; a bounded number of them."""
    for number, line in enumerate(reader):
        if number > MAX_LINES:
            raise ValueError(f"over {MAX_LINES:,} lines, no more are allowed")
        if line and any(cell.strip() for cell in line):
            yield line


def _arrivals(columns: Sequence[str], lines: Iterator[list[str]]) -> Trace:
    when, long, wide = (_find(columns, names) for names in (_TIME, _LENGTH, _ROWS))
    times, lengths, rows = array("d"), array("d"), array("d")
    parse: Callable[[str], float] | None = None
    for line in lines:
        if len(line) != len(columns):
            raise ValueError(f"{len(line)} columns, the first line has {len(columns)}")
        text = line[when or 0].strip()
        if parse is None:
            parse = _number if _is_number(text) else _moment
        times.append(parse(text))
        lengths.append(_whole(line[long], columns[long], 0) if long is not None else 0)
        rows.append(_whole(line[wide], columns[wide], 1) if wide is not None else 1)
    if len(times) < 2 or min(times) == max(times):
        raise ValueError(f"{len(times)} requests at one time; two at different times are needed")
    seconds = np.asarray(times)
    order = np.argsort(seconds, kind="stable")
    sizes = (np.asarray(found)[order].astype(np.int64) for found in (lengths, rows))
    return Arrivals(_spread(seconds[order] - seconds.min()), *sizes)


def _spread(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return moments, those of a log of whole seconds evenly within theirs: it cut them off."""
    if np.any(seconds % 1):
        return seconds
    _, of, counts = np.unique(seconds, return_inverse=True, return_counts=True)
    place = np.arange(len(seconds)) - (np.cumsum(counts) - counts)[of]
    spread: NDArray[np.float64] = seconds + place / counts[of]
    return spread


def _counts(column: str, lines: Iterator[list[str]]) -> Trace:
    first = [[column]] if _is_number(column) else []
    counts = array("d")
    for line in chain(first, lines):
        if len(line) != 1:
            raise ValueError(f"{len(line)} columns, the first line has 1")
        count = _number(line[0])
        if not 0 <= count <= _MOST:
            raise ValueError(f"{count:g} requests per second; 0 to {_MOST:g} are allowed")
        counts.append(count)
    if not counts or not max(counts):
        raise ValueError("no requests: the column of requests per second holds nothing above 0")
    return Counts(np.asarray(counts))


def _find(columns: Sequence[str], names: Sequence[str]) -> int | None:
    return next((columns.index(name) for name in names if name in columns), None)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(text: str) -> float:
    if not _is_number(text) or not abs(float(text)) <= _LARGEST:
        raise ValueError(f"{text[:40]!r} is no number, or beyond {_LARGEST:g}")
    return float(text)


def _moment(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"the time is {text[:40]!r}; ISO 8601 as in 2023-11-16 18:15:46.68, or seconds as a "
            "number in every line, is needed"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _whole(text: str, column: str, least: int) -> float:
    value = _number(text)
    if not least <= value <= _MOST or value != int(value):
        raise ValueError(
            f"{column} is {text[:40]!r}; a whole number from {least} to {_MOST:g} is needed"
        )
    return value
