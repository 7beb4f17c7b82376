from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lrai_core.protocol import Array
from lrai_core.verifier import statistics
from lrai_core.verifier.sample import Rows
from tests.core import small_artifact

ROWS = Rows(
    [[np.full((1, 3), n, np.float32), np.full((1, 2), n, np.int64)] for n in range(5)], None, []
)


class Times:
    """A session that multiplies its first input."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def run(self, arrays: Sequence[Array], outputs: Sequence[int] | None = None) -> list[Array]:
        return [arrays[0] * self.factor]


def test_an_evaluation_draw_is_the_row_itself() -> None:
    for index in range(5):
        assert statistics.draw("evaluation", ROWS, index, 7, 0.0) is ROWS.inputs[index]


@given(st.integers(0, 10_000), st.integers(0, 1 << 40), st.floats(1e-6, 0.4))
def test_a_box_draw_is_a_row_with_noise_within_the_radius_and_its_integers_untouched(
    index: int, seed: int, radius: float
) -> None:
    noisy, whole = statistics.draw("box", ROWS, index, seed, radius)
    base = whole[0, 0]
    assert (whole == base).all()
    assert noisy.dtype == np.float32
    assert (np.abs(noisy - base) <= radius * (1 + 1e-6) + 1e-6).all()


def test_the_same_draw_gives_the_same_bits_and_another_gives_others() -> None:
    def bits(index: int, seed: int) -> bytes:
        return statistics.draw("box", ROWS, index, seed, 0.1)[0].tobytes()

    assert bits(3, 1) == bits(3, 1)
    assert len({bits(3, 1), bits(4, 1), bits(3, 2)}) == 3


def test_a_box_draws_from_all_rows_and_to_both_sides() -> None:
    drawn = [statistics.draw("box", ROWS, index, 0, 0.1) for index in range(200)]
    assert {int(whole[0, 0]) for _, whole in drawn} == set(range(5))
    noise = np.concatenate([noisy - whole[0, 0] for noisy, whole in drawn])
    assert abs(noise.mean()) < 0.01
    assert noise.max() > 0.09
    assert noise.min() < -0.09


def test_differences_come_row_by_row_each_run_alone() -> None:
    inputs = [[np.full((1, 3), n, np.float32)] for n in (1, 2, 4)]
    gaps = statistics.differences(Times(2), Times(3), inputs, small_artifact.SIGNATURE)
    assert list(gaps) == [1, 2, 4]


def test_failing_are_those_above_epsilon_and_those_that_are_no_number() -> None:
    assert statistics.failing([0.1, 0.2, 0.3, math.nan, math.inf], 0.2) == (2, 3, 4)


def test_the_bound_pays_for_every_candidate() -> None:
    alone = statistics.bound(0, 59, 0.95, 1)
    assert alone == pytest.approx(1 - 0.05 ** (1 / 59))
    assert statistics.bound(0, 59, 0.95, 5) == pytest.approx(1 - 0.01 ** (1 / 59))


@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False), st.integers(1, 6))
@example(5e-324, 2)
@example(1.7e308, 2)
@example(0.29, 2)
def test_rounding_up_never_rounds_down_and_adds_less_than_a_last_digit(
    value: float, digits: int
) -> None:
    rounded = statistics.round_up(value, digits)
    assert rounded >= value
    if 1e-290 < value < 1e300:
        assert rounded <= value * (1 + 10.0 ** (1 - digits)) * (1 + 1e-12)
        assert float(f"{rounded:.{digits - 1}e}") == pytest.approx(rounded, rel=1e-12)


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0123, 0.013), (1e-4, 1e-4), (0.0991, 0.1), (11.1, 12)]
)
def test_rounding_up_to_two_digits(value: float, expected: float) -> None:
    assert statistics.round_up(value) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf])
def test_what_has_no_digits_is_not_rounded(value: float) -> None:
    assert statistics.round_up(value) == value
