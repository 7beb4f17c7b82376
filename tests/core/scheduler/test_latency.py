from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from lrai_core.artifact import LatencyPoint
from lrai_core.scheduler.latency import LatencyModel


def point(rows: int, length: int, seconds: float) -> LatencyPoint:
    return LatencyPoint(rows=rows, length=length, median_ms=seconds * 1e3, spread_ms=0.0)


POSITIVE = st.floats(1e-6, 10)


@given(st.floats(1e-4, 1e-2), st.floats(1e-7, 1e-4), st.floats(1e-9, 1e-6))
def test_the_coefficients_that_made_a_profile_are_found_again(
    fixed: float, linear: float, quadratic: float
) -> None:
    def cost(rows: int, length: int) -> float:
        return fixed + linear * rows * length + quadratic * rows * length**2

    measured = [(r, n) for r in (1, 4, 16) for n in (8, 32, 128)]
    model = LatencyModel([point(r, n, cost(r, n)) for r, n in measured])
    for rows, length in ((2, 16), (8, 100), (32, 256)):
        assert model.engine_seconds(rows, length) == pytest.approx(cost(rows, length), rel=1e-5)


@given(
    st.lists(
        st.builds(point, st.integers(1, 64), st.integers(1, 512), POSITIVE), min_size=1, max_size=9
    )
)
def test_no_profile_makes_more_work_cheaper(profile: list[LatencyPoint]) -> None:
    model = LatencyModel(profile)
    costs = [model.engine_seconds(r, n) for r, n in ((1, 1), (1, 100), (2, 100), (64, 512))]
    assert all(map(math.isfinite, costs))
    assert costs == sorted(costs)
    assert costs[0] >= 0


def test_calls_that_somebody_has_named_take_what_was_measured_and_tell_nothing_of_others() -> None:
    def cost(rows: int, length: int) -> float:
        return 1e-3 + 1e-5 * rows * length

    usual = [point(r, n, cost(r, n)) for r in (1, 4, 16) for n in (8, 32, 128)]
    named = [replace(point(1, 16, 4e-4), named=True), replace(point(8, 128, 5e-3), named=True)]
    model = LatencyModel([*usual, *named])
    assert model.engine_seconds(1, 16) == pytest.approx(4e-4)
    assert model.engine_seconds(8, 128) == pytest.approx(5e-3)
    assert model.engine_seconds(1, 17) == pytest.approx(cost(1, 17), rel=1e-5)
    assert model.engine_seconds(8, 127) == pytest.approx(cost(8, 127), rel=1e-5)
    other = [point(one.rows, one.length, 6e-4 + one.median_ms / 2e3) for one in (*usual, *named)]
    assert LatencyModel([*usual, *named], other).variant(1, 16) == 0
    assert LatencyModel(usual, other).variant(8, 128) == 1
    assert LatencyModel(named).engine_seconds(1, 16) == pytest.approx(4e-4)


@given(st.dictionaries(st.integers(1, 100), POSITIVE, min_size=2, max_size=6), st.floats(0, 1))
def test_between_measured_row_counts_the_prediction_is_on_the_line(
    measured: dict[int, float], where: float
) -> None:
    model = LatencyModel([point(rows, 0, seconds) for rows, seconds in measured.items()])
    known = sorted(measured)
    rows = round(known[0] + where * (known[-1] - known[0]))
    expected = np.interp(rows, known, [measured[one] for one in known])
    low = 0.5 * min(measured.values())
    assert model.engine_seconds(rows, 0) == pytest.approx(max(expected, low), rel=1e-6)


def test_beyond_the_profile_the_last_slope_goes_on() -> None:
    model = LatencyModel([point(1, 0, 0.010), point(4, 0, 0.016), point(8, 0, 0.020)])
    assert model.engine_seconds(16, 0) == pytest.approx(0.028)


def test_a_slope_that_falls_never_predicts_nothing() -> None:
    model = LatencyModel([point(1, 0, 0.010), point(4, 0, 0.004)])
    assert model.engine_seconds(1000, 0) > 0


def test_one_point_scales_with_the_rows_and_no_point_is_a_guess() -> None:
    assert LatencyModel([point(4, 0, 0.02)]).engine_seconds(8, 0) == pytest.approx(0.04)
    assert LatencyModel([]).engine_seconds(3, 0) == pytest.approx(0.003)


def test_the_same_row_count_measured_twice_is_no_division_by_zero() -> None:
    model = LatencyModel([point(1, 0, 0.01), point(1, 0, 0.02)])
    assert model.engine_seconds(1, 0) == pytest.approx(0.02)


def test_what_a_call_costs_around_the_engine_is_learned() -> None:
    model = LatencyModel([point(1, 0, 0.01)])
    assert model.call_seconds(1, 0) == pytest.approx(0.01)
    model.observe(1, 8, total_seconds=0.013, seconds=0.010)
    assert model.call_seconds(1, 0) == pytest.approx(0.013)
    for _ in range(500):
        model.observe(1, 8, total_seconds=0.015, seconds=0.010)
    assert model.overhead_seconds == pytest.approx(0.005, rel=0.05)


def test_the_estimate_follows_cheap_calls_faster_than_dear_ones() -> None:
    model = LatencyModel([])
    model.observe(1, 8, 0.010, 0.0)
    for _ in range(20):
        model.observe(1, 8, 0.002, 0.0)
    fallen = 0.010 - model.overhead_seconds
    low = model.overhead_seconds
    for _ in range(20):
        model.observe(1, 8, 0.010, 0.0)
    assert fallen > 2 * (model.overhead_seconds - low) > 0


def test_one_pause_of_the_machine_hardly_moves_the_overhead() -> None:
    model = LatencyModel([])
    model.observe(1, 8, 0.003, 0.001)
    model.observe(1, 8, 10.0, 0.001)
    assert model.overhead_seconds < 0.0022


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), max_size=20))
def test_the_overhead_is_never_negative_even_when_clocks_disagree(
    calls: list[tuple[float, float]],
) -> None:
    model = LatencyModel([])
    for total, engine in calls:
        model.observe(1, 8, total, engine)
        assert 0 <= model.overhead_seconds < math.inf


def two_variants() -> LatencyModel:
    """Return one that is quicker for up to four rows, and one that is for more."""
    quick = [point(1, 0, 0.010), point(8, 0, 0.080)]
    broad = [point(1, 0, 0.030), point(8, 0, 0.044)]
    return LatencyModel(quick, broad)


def test_each_call_is_predicted_as_the_variant_takes_it_that_is_fastest_at_it() -> None:
    model = two_variants()
    assert [model.variant(rows, 0) for rows in (1, 2, 8, 20)] == [0, 0, 1, 1]
    assert model.engine_seconds(1, 0) == pytest.approx(0.010)
    assert model.engine_seconds(8, 0) == pytest.approx(0.044)
    assert model.call_seconds(8, 0) == model.engine_seconds(8, 0)


def test_a_variant_that_turns_out_slow_loses_its_calls_and_only_those() -> None:
    model = two_variants()
    calls = 0
    while model.variant(8, 0) == 1:
        model.observe(8, 0, 0.2, 0.19, 1)
        calls += 1
    assert 0 < calls < 20
    assert model.engine_seconds(1, 0) == pytest.approx(0.010)
    assert model.engine_seconds(8, 0) == pytest.approx(0.080)


def test_a_new_speed_of_any_variant_is_told_and_the_way_is_learned_for_all() -> None:
    model = two_variants()
    assert not any(model.observe(8, 0, 0.066, 0.044, 1) for _ in range(60))
    assert [model.observe(8, 0, 0.110, 0.088, 1) for _ in range(20)].count(True) == 1
    assert model.overhead_seconds == pytest.approx(0.022)
    assert model.call_seconds(1, 0) == pytest.approx(0.032, rel=0.01)
    assert 1.3 < model.scale < 2.2


def test_of_one_variant_there_is_nothing_to_choose() -> None:
    model = LatencyModel([point(1, 0, 0.010)])
    assert model.variant(1, 0) == model.variant(100, 0) == 0


def test_a_variant_that_lost_its_calls_to_a_slow_phase_gets_them_back() -> None:
    """Of what does not run nothing is heard, so what was learned of it is not for ever."""
    model = LatencyModel([point(1, 0, 0.001)], [point(1, 0, 0.002)])
    for _ in range(60):  # a neighbour has the machine for a while
        model.observe(1, 0, None, 0.0023, 0)
        if model.variant(1, 0) == 1:
            break
    assert model.variant(1, 0) == 1
    calls = 0
    while model.variant(1, 0) == 1:
        model.observe(1, 0, None, 0.002, 1)
        calls += 1
        assert calls < 300
    for _ in range(50):
        model.observe(1, 0, None, 0.001, 0)
        assert model.variant(1, 0) == 0


def test_the_more_calls_differ_the_more_is_held_against_a_deadline() -> None:
    steady, unsteady = LatencyModel([point(1, 0, 0.010)]), LatencyModel([point(1, 0, 0.010)])
    assert steady.margin == 1
    for call in range(200):
        steady.observe(1, 0, None, 0.010)
        unsteady.observe(1, 0, None, (0.008, 0.012)[call % 2])
    assert 1 <= steady.margin < 1.01
    assert unsteady.engine_seconds(1, 0) == pytest.approx(0.010, rel=0.05)
    assert 1.05 < unsteady.margin < 1.2  # half a standard deviation


def test_one_call_that_a_pause_of_the_machine_fell_into_is_no_speed() -> None:
    model = LatencyModel([point(1, 0, 0.010)])
    for call in range(51):
        model.observe(1, 0, None, 10.0 if call == 25 else 0.010)
        assert model.engine_seconds(1, 0) == pytest.approx(0.010, rel=0.1)


def test_a_row_alone_is_thought_to_be_as_long_as_rows_usually_are() -> None:
    def cost(rows: int, length: int) -> float:
        return 1e-3 + 1e-4 * rows * length

    model = LatencyModel([point(r, n, cost(r, n)) for r in (1, 4) for n in (8, 64, 512)])
    assert model.alone_seconds() == pytest.approx(cost(1, 64))
    assert LatencyModel([point(1, 0, 0.010)]).alone_seconds() == pytest.approx(0.010)
    assert LatencyModel([]).alone_seconds() == pytest.approx(0.001)


def learned(cost: Callable[[int, int], float], shapes: Sequence[tuple[int, int]]) -> LatencyModel:
    """Return what knew small calls, whose elements cost alike, and has seen such calls since."""
    measured = [point(r, n, 0.002 + 6e-5 * r * n) for r in (1, 4, 16) for n in (8, 16, 32)]
    model = LatencyModel(measured)
    for rows, length in itertools.islice(itertools.cycle(shapes), 200):
        seconds = cost(rows, length)
        model.observe(rows, length, seconds, seconds)
    return model


def test_it_is_learned_that_large_calls_cost_more_an_element_than_any_that_was_measured() -> None:
    def cost(rows: int, length: int) -> float:
        elements = rows * length
        return 0.002 + 6e-5 * elements + 5e-8 * elements**2

    model = learned(cost, [(1, 200), (2, 60), (16, 16), (1, 12), (7, 70), (3, 120)])
    for rows, length in ((1, 8), (4, 32), (8, 32), (2, 128), (4, 110)):
        assert model.call_seconds(rows, length) == pytest.approx(cost(rows, length), rel=0.07)
    # So of equal rows those share a call that is cheapest for each.
    shares = {rows: model.call_seconds(rows, 64) / rows for rows in (1, 2, 4, 8, 16, 32)}
    assert min(shares, key=shares.__getitem__) in (2, 4)


def test_calls_that_grow_as_they_were_measured_stay_so_and_of_one_size_nothing_grows() -> None:
    for shapes in ([(1, 8), (4, 16), (16, 32), (2, 100)], [(4, 16)]):
        model = learned(lambda rows, length: 1.3 * (0.002 + 6e-5 * rows * length), shapes)
        for rows, length in ((1, 8), (16, 64), (32, 128)):
            expected = 1.3 * (0.002 + 6e-5 * rows * length)
            assert model.call_seconds(rows, length) == pytest.approx(expected, rel=0.1)
