"""In which order forms are judged, and what that is worth: no lucky one among many passes."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrai_core import confidence
from lrai_core.artifact import LatencyPoint
from lrai_core.compiler import gate, search
from lrai_core.compiler.compiler import _Compilation
from lrai_core.compiler.gate import Conditions
from lrai_core.compiler.search import Candidate
from lrai_core.engine.engine import find_engine
from lrai_core.protocol import Array, Signature, TensorSpec
from lrai_core.verifier.sample import Rows

EPSILON, DELTA, GATE, SEARCH = 0.1, 0.05, 200, 30
_ALL_CPUS = 1 << 10  # threads of an engine, so that its calls come one after the other
SIGNATURE = Signature(  # without a batch axis: each row is run once
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(1, 2)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(1, 2)),),
)


class Model:
    """The identity, that strays beyond epsilon on this share of rows, and else by `gap`."""

    def __init__(self, gap: float, strays: float, seed: int) -> None:
        self._gap, self._strays, self._seed = gap, strays, seed.to_bytes(8, "big")

    def run(self, arrays: Sequence[Array], outputs: Sequence[int] | None = None) -> list[Array]:
        drawn = hashlib.blake2b(arrays[0].tobytes(), digest_size=4, key=self._seed).digest()
        gap = 0.9 if int.from_bytes(drawn, "big") < self._strays * (1 << 32) else self._gap
        return [arrays[0] + np.float32(gap)]


def compilation(
    forms: Sequence[tuple[str, float, float, float]],
    seed: int = 0,
    gate: int = GATE,
    sizes: Sequence[int] = (),
) -> _Compilation:
    """Return one that measured these forms: name, times as fast as fp32, gap, share that strays.

    Args:
        forms: Without fp32, which is one of them.
        seed: Of rows and answers.
        gate: Rows of it.
        sizes: Bytes of fp32 and of these forms, where memory is the objective.
    """
    random = np.random.default_rng(seed)
    conditions = Conditions(epsilon=EPSILON, delta=DELTA)
    work = _Compilation(Path(), Path(), conditions, _ALL_CPUS, lambda _: None)
    work.signature, work.reference = SIGNATURE, Model(0, 0, 0)
    data = [[row[None]] for row in random.uniform(100, 200, (gate + SEARCH, 2)).astype(np.float32)]
    hashes = [bytes([i % 256]) * 32 for i in range(len(data))]
    rows = Rows(data, None, hashes)
    work.gate, work.search = rows.take(range(gate)), rows.take(range(gate, gate + SEARCH))
    engine = find_engine("onnxruntime")
    for place, (form, speed, gap, strays) in enumerate((("fp32", 1.0, 0.0, 0.0), *forms)):
        session = Model(gap, strays, 100 * seed + place)
        candidate = Candidate(form, "int8", Path(), 1, shared=True, session=session, engine=engine)
        point = LatencyPoint(rows=1, length=0, median_ms=1 / speed, spread_ms=0)
        candidate.latency, candidate.speedup = [point], speed
        work.candidates.append(candidate)
    work.objective = "memory" if sizes else "latency"
    for candidate, size in zip(work.candidates, sizes, strict=False):
        candidate.size_bytes = size
    return work


def kept(work: _Compilation) -> list[str]:
    return [candidate.form for candidate, _ in work.kept]


def why(work: _Compilation, form: str) -> str:
    lines = [line for line in work.log if line["event"] == "candidate" and line["form"] == form]
    assert len(lines) == 1, lines
    return str(lines[0]["why"])


@pytest.mark.parametrize("gate", [160, 400])
def test_where_memory_is_wanted_the_smallest_that_passes_and_is_not_slower_is_chosen(
    gate: int,
) -> None:
    forms = [("wild", 4, 0.08, 0.1), ("small", 1.1, 0.02, 0), ("slow", 0.9, 0.03, 0)]
    forms += [("fast", 3, 0.01, 0), ("same", 0.98, 0.005, 0), ("as small", 2, 0.04, 0)]
    work = compilation(forms, gate=gate, sizes=(1000, 100, 200, 150, 300, 980, 204))
    work.judge(4)
    assert kept(work) == ["as small", "small", "fast", "fp32"]
    assert "a gain of 1.04 is needed" in why(work, "slow")
    assert "a gain of 1.04 is needed" in why(work, "same")
    assert "delta 5.00% allowed" in why(work, "wild")


def test_others_serve_beside_what_is_chosen_where_that_makes_calls_faster() -> None:
    work = compilation([("near", 2, 0.01, 0), ("far", 2, 0.02, 0), ("slow", 1.2, 0.005, 0)])
    times = {"fp32": (0.5, 8.0), "near": (1.0, 3.0), "far": (3.0, 1.0), "slow": (1.2, 3.2)}
    for candidate in work.candidates:
        candidate.latency = [
            LatencyPoint(rows=rows, length=0, median_ms=ms, spread_ms=0)
            for rows, ms in zip((1, 8), times[candidate.form], strict=True)
        ]
    fp32, near, far, slow = work.candidates
    assert search.beside(near, [slow, far, fp32]) == [far, fp32]
    assert search.beside(fp32, [near, far]) == [near, far]
    fp32.size_bytes = 9 << 20  # too much to have in memory twice
    assert search.beside(near, [slow, far, fp32]) == [far]


@pytest.mark.parametrize(("pace", "serves"), [(0.01, False), (1.0, True)])
def test_weights_that_another_form_puts_out_of_the_cache_count(
    pace: float, *, serves: bool
) -> None:
    """Of short calls they take as long as the call, of long ones nothing to speak of."""
    work = compilation([("small", 2, 0.01, 0), ("large", 2, 0.02, 0)])
    times = {"fp32": (1.0, 9.0), "small": (0.5, 8.0), "large": (1.0, 5.0)}
    for candidate in work.candidates:
        candidate.size_bytes = 1 << 20
        candidate.latency = [
            LatencyPoint(rows=rows, length=0, median_ms=pace * ms, spread_ms=0)
            for rows, ms in zip((1, 8), times[candidate.form], strict=True)
        ]
    _, small, large = work.candidates
    assert search.beside(small, [large]) == [large] * serves


@pytest.mark.parametrize(("some", "serves"), [(0.8, True), (0.9, False)])
def test_a_gain_for_calls_of_some_size_is_worth_it_beside_the_chosen(
    some: float, *, serves: bool
) -> None:
    """In the mean over the profile it is below what is worth it."""
    work = compilation([("near", 2, 0.01, 0), ("large", 2, 0.02, 0)])
    for candidate, last in zip(work.candidates[1:], (1.0, some), strict=True):
        candidate.latency = [
            LatencyPoint(rows=rows, length=0, median_ms=last if rows == 8 else 1, spread_ms=0)
            for rows in range(1, 9)
        ]
    _, near, large = work.candidates
    assert large.gain([near]) < search.WORTH
    assert search.beside(near, [large]) == [large] * serves


@pytest.mark.parametrize("gate", [160, 400])
@pytest.mark.parametrize("keep", [2, 3])
def test_what_serves_some_calls_alone_does_not_stand_in_the_way(keep: int, gate: int) -> None:
    """It is closer, and another that is hardly faster than it serves all calls."""
    speeds = {"fp32": (1.0, 1.0), "some": (0.85, 1.25), "all": (0.88, 1.27)}
    work = compilation([("some", 1.03, 0.01, 0), ("all", 1.057, 0.02, 0)], gate=gate)
    work.threads = 1
    for candidate in work.candidates:
        candidate.latency = [
            LatencyPoint(rows=rows, length=0, median_ms=1 / speed, spread_ms=0)
            for rows, speed in zip((1, 8), speeds[candidate.form], strict=True)
        ]
    work.judge(keep)
    assert kept(work) == ["all", "fp32"]
    assert work.judged == keep, "what cannot serve takes no part of the error"


@pytest.mark.parametrize("gate", [160, 400])
def test_what_is_faster_for_large_calls_alone_is_kept_beside_what_is_faster(gate: int) -> None:
    """And not where it would serve alone: then small calls would be slower than in fp32."""
    paces = {"fp32": (1.0, 8.0), "near": (0.5, 6.0), "large": (3.0, 4.0)}
    for forms, expected in ((["near", "large"], ["near", "large", "fp32"]), (["large"], ["fp32"])):
        gaps = {"near": 0.01, "large": 0.02}
        work = compilation([(name, 1.0, gaps[name], 0) for name in forms], gate=gate)
        work.threads = 1
        for candidate in work.candidates:
            candidate.latency = [
                LatencyPoint(rows=rows, length=0, median_ms=ms, spread_ms=0)
                for rows, ms in zip((1, 8), paces[candidate.form], strict=True)
            ]
            logs = zip(paces["fp32"], paces[candidate.form], strict=True)
            candidate.speedup = math.prod(a / b for a, b in logs) ** 0.5
        work.judge(3)
        assert kept(work) == expected


@pytest.mark.parametrize(
    ("row_ms", "many_ms", "fp32_bytes", "serves"),
    [
        (1.2, 6.0, 9 << 20, False),
        (1.02, 6.0, 9 << 20, True),
        (1.2, 6.0, 1 << 20, False),
        (1.3, 5.0, 1 << 20, True),
        (1.3, 5.0, 9 << 20, False),
    ],
)
def test_what_costs_some_calls_more_than_all_gain_does_not_serve_alone(
    row_ms: float, many_ms: float, fp32_bytes: int, *, serves: bool
) -> None:
    """Where fp32 serves beside it, that takes the calls that lose."""
    pace = math.sqrt(8 / many_ms / row_ms)
    assert pace > search.WORTH
    work = compilation([("form", pace, 0.01, 0)], gate=FEW)
    work.candidates[0].size_bytes = fp32_bytes
    for candidate, times in zip(work.candidates, ((1.0, 8.0), (row_ms, many_ms)), strict=True):
        candidate.latency = [
            LatencyPoint(rows=rows, length=0, median_ms=ms, spread_ms=0)
            for rows, ms in zip((1, 8), times, strict=True)
        ]
    work.judge(2)
    assert kept(work) == ["form"] * serves + ["fp32"]


@pytest.mark.parametrize("gate", [160, 400])
@pytest.mark.parametrize("closer", ["some", "all"])
def test_it_serves_beside_what_costs_no_calls_anything(closer: str, gate: int) -> None:
    """Though it is the faster in the mean, or the closer, and would be chosen."""
    paces = {"fp32": (1.0, 8.0), "some": (1.6, 2.5), "all": (0.8, 7.2)}
    speeds = {form: math.sqrt(8 / math.prod(own)) for form, own in paces.items()}
    gaps = {form: 0.01 if form == closer else 0.02 for form in ("some", "all")}
    work = compilation([(form, speeds[form], gap, 0) for form, gap in gaps.items()], gate=gate)
    work.threads = 1
    work.candidates[0].size_bytes = 9 << 20
    for candidate in work.candidates:
        candidate.latency = [
            LatencyPoint(rows=rows, length=0, median_ms=ms, spread_ms=0)
            for rows, ms in zip((1, 8), paces[candidate.form], strict=True)
        ]
    work.judge(3)
    assert kept(work) == ["all", "some", "fp32"]


FORMS = [("far", 4, 0.08, 0), ("bad", 2, 0.01, 0.1), ("near", 1.5, 0.001, 0)]
FEW = 160  # rows, enough for the whole error alone
UNLUCKY, UNLUCKY_FEW = (
    23,
    14,
)  # seed: none of the search rows strays, so that the bad one looks closer than the far
ENOUGH = 2 * confidence.rows_needed(0.02, 0.95)  # rows for three parts of the error


def judged(work: _Compilation) -> list[str]:
    lines = [line for line in work.log if line["event"] == "candidate" and "difference" in line]
    return [line["form"] for line in lines]


def bound(error: float) -> str:
    return f"at most {confidence.percent(confidence.upper_bound(0, ENOUGH, 1 - error), 1)}; delta"


STRAYS = 2 * DELTA  # too often, and not enough for the search rows to show it


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_the_fastest_is_judged_first_and_no_more_than_are_kept(keep: int) -> None:
    forms = [("wild", 4, 0.08, STRAYS), ("near", 2, 0.01, 0), ("nearer", 1.5, 0.001, 0)]
    work = compilation(forms, gate=ENOUGH)
    work.judge(keep)
    assert kept(work) == [*["near", "nearer"][: keep - 1], "fp32"]
    assert judged(work) == ["fp32", "wild", "near", "nearer"][: keep + 1 if keep > 1 else 1]
    if keep < 3:
        assert "not judged, as it would not serve" in why(work, "nearer")
    if keep > 1:
        assert "delta 5.00% allowed" in why(work, "wild")


def test_each_has_a_part_of_the_error_the_fastest_the_largest() -> None:
    """Whatever becomes of the others: so the order in which they are judged may depend on that."""
    work = compilation(FORMS, UNLUCKY, ENOUGH)
    work.judge(4)
    assert kept(work) == ["far", "near", "fp32"]
    assert judged(work) == ["fp32", "far", "bad", "near"]
    assert bound(0.025 * (1 / 2 + 1 / 3)) in why(work, "far")
    assert bound(0.025 * (1 / 4 + 1 / 3)) in why(work, "near")
    assert "delta 5.00% allowed" in why(work, "bad")
    alone = compilation([("near", 1.5, 0.001, 0)], UNLUCKY, ENOUGH)
    alone.judge(4)
    assert bound(0.05) in why(alone, "near")


@pytest.mark.parametrize("forms", [1, 2, 3, 10])
def test_the_parts_add_up_and_none_is_too_small_for_a_form_without_a_fault(forms: int) -> None:
    conditions, enough = Conditions(), list[bool]()
    for count in range(100, 500, 20):
        rows = Rows([[np.zeros(1)]] * count, None, [b""] * count)
        parts = gate.errors(rows, conditions, forms)
        assert sum(parts) == pytest.approx(0.05)
        assert sorted(parts, reverse=True) == parts
        assert len(parts) == forms
        enough.append(bool(parts[-1]))
        if forms > 1 and enough[-1]:
            assert confidence.upper_bound(0, count, 1 - parts[-1]) <= 1 - gate.AGREEMENT
        grouped = replace(rows, groups={"sex": np.zeros(count)})
        assert gate.errors(grouped, conditions, forms) == [1 - gate.LEVEL] + [0.0] * (forms - 1)
    assert enough == sorted(enough), "with more rows there are no fewer parts"
    assert enough[-1]


def test_of_many_the_closest_passes_where_it_alone_is_right() -> None:
    forms = [(f"f{i}", 4 - i / 4, 0.08 - i / 200, STRAYS) for i in range(8)]
    work = compilation([*forms, ("near", 1.5, 0.001, 0)], gate=2 * ENOUGH)
    work.judge(2)
    assert kept(work) == ["near", "fp32"]
    assert judged(work)[-1] == "near"


def test_what_the_search_rows_show_to_be_too_far_is_not_judged() -> None:
    work = compilation([("wild", 4, 0.08, 0.6), ("near", 2, 0.01, 0)], gate=ENOUGH)
    work.judge(2)
    assert kept(work) == ["near", "fp32"]
    assert judged(work) == ["fp32", "near"]
    assert "of 30 search rows are beyond epsilon 0.1" in why(work, "wild")
    assert work.judged == 2


def test_where_rows_are_few_each_has_the_whole_error_from_the_closest_on() -> None:
    """With a part of it none might pass."""
    forms = [("wild", 4, 0.08, STRAYS), ("near", 2, 0.01, 0), ("nearer", 1.5, 0.001, 0)]
    work = compilation(forms, gate=FEW)
    work.judge(2)
    assert kept(work) == ["near", "fp32"]
    assert judged(work) == ["fp32", "nearer", "near", "wild"]
    assert "delta 5.00% allowed" in why(work, "wild")


def test_where_rows_are_few_the_first_that_fails_ends_it() -> None:
    work = compilation(FORMS, UNLUCKY_FEW, FEW)
    work.judge(4)
    assert kept(work) == ["near", "fp32"]
    assert judged(work) == ["fp32", "near", "bad"]
    assert "closer bad did not pass" in why(work, "far")


@pytest.mark.parametrize(
    ("gate", "first", "other"), [(FEW, "near", "far"), (ENOUGH, "far", "near")]
)
def test_when_the_time_is_up_what_has_passed_is_kept(
    monkeypatch: pytest.MonkeyPatch, gate: int, first: str, other: str
) -> None:
    work = compilation([("far", 4, 0.08, 0), ("near", 1.5, 0.001, 0)], gate=gate)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    work.began, work.seconds = 0.0, 60.0
    judge = work._judge

    def slowly(*arguments: Any) -> Any:
        found = judge(*arguments)
        clock[0] += 40
        return found

    monkeypatch.setattr(_Compilation, "_judge", lambda self, *arguments: slowly(*arguments))
    work.judge(4)
    assert kept(work) == [first, "fp32"]
    assert "not judged: the minutes are up" in why(work, other)


@pytest.mark.parametrize(("gate", "best"), [(FEW, "f3"), (ENOUGH, "f0")])
def test_when_the_time_goes_by_while_forms_are_looked_at_one_is_judged_all_the_same(
    monkeypatch: pytest.MonkeyPatch, gate: int, best: str
) -> None:
    """Of those that there was time for: with fp32 alone all that it took would be for nothing."""
    work = compilation([(f"f{i}", 4 - i / 4, 0.08 - i / 100, 0) for i in range(8)], gate=gate)
    clock, run = [300.0], Model.run

    def slowly(self: Model, arrays: Sequence[Array], outputs: Any = None) -> list[Array]:
        clock[0] += 1
        return run(self, arrays, outputs)

    monkeypatch.setattr(Model, "run", slowly)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    work.began, work.seconds = 0.0, 600.0
    work.judge(4)
    assert kept(work) == [best, "fp32"]
    assert judged(work) == ["fp32", best]
    assert [line["form"] for line in work.log if line["event"] == "searched"] == [
        *("fp32", "f0", "f1", "f2", "f3")
    ]
    assert all("not looked at: the minutes are up" in why(work, f"f{i}") for i in range(4, 8))


def test_what_closer_forms_are_as_fast_as_is_not_judged() -> None:
    work = compilation([("far", 2.02, 0.05, 0), ("near", 2, 0.01, 0), ("slow", 1.03, 0, 0)])
    work.judge(4)
    assert kept(work) == ["near", "fp32"]
    assert "closer ones are as good" in why(work, "far")
    assert "a gain of 1.04 is needed" in why(work, "slow")
    assert work.judged == 2  # fp32 is the other one that may be chosen


def test_a_form_that_does_not_run_is_a_reason() -> None:
    work = compilation([("near", 2, 0.01, 0), ("broken", 3, 0.02, 0)])
    work.candidates[-1].session = Broken()
    work.judge(2)
    assert kept(work) == ["near", "fp32"]
    assert "does not run on this" in why(work, "broken")


class Broken:
    def run(self, arrays: Sequence[Array], outputs: Sequence[int] | None = None) -> list[Array]:
        raise ValueError("does not run on this")


@pytest.mark.timeout(300)  # a hundred compilations
@pytest.mark.parametrize("gate", [GATE, ENOUGH])
def test_of_many_that_stray_too_often_hardly_ever_does_one_pass(gate: int) -> None:
    """Judged each by itself, one of eight would pass in a sixth of all compilations."""
    trials, forms, lucky, apart = 100, 8, 0, 0
    for trial in range(trials):
        given = [(f"f{i}", 1.5 * 1.1**i, 0.01 + 0.001 * i, DELTA * 1.02) for i in range(forms)]
        work = compilation(given, trial + 1, gate)
        work.judge(2)
        lucky += kept(work) != ["fp32"]
        strayed = np.random.default_rng(trial).binomial(gate, DELTA * 1.02, forms)
        apart += any(confidence.upper_bound(int(k), gate) <= DELTA for k in strayed)
    assert apart / trials > 0.1
    # Two standard errors above the level.
    assert lucky / trials <= 0.05 + 2 * (0.05 * 0.95 / trials) ** 0.5
