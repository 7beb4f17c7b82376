"""Against published table values and against exact rational sums, never against the code itself."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrai_core.confidence import lower_bound, paired_loss_bound, percent, rows_needed, upper_bound


def exact_tail(failures: int, n: int, p: float) -> Fraction:
    """Return P(X <= failures) for X ~ Binomial(n, p), in rational arithmetic."""
    rate = Fraction(p)
    return sum(
        (math.comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(failures + 1)),
        start=Fraction(0),
    )


@pytest.mark.parametrize(
    ("failures", "n", "confidence", "expected"),
    [
        # Two-sided 95 % limits of the usual tables are one-sided 97.5 % limits.
        (0, 10, 0.975, 0.3085),
        (1, 10, 0.975, 0.4450),
        (2, 10, 0.975, 0.5561),
        (5, 10, 0.975, 0.8129),
        (10, 10, 0.975, 1.0),
        (0, 20, 0.975, 0.1684),
        (5, 20, 0.975, 0.4910),
        (10, 100, 0.975, 0.1762),
        (0, 59, 0.95, 0.0495),  # the first n at which 95 % reach a rate of 5 %
    ],
)
def test_the_upper_bound_is_the_one_in_the_tables(
    failures: int, n: int, confidence: float, expected: float
) -> None:
    assert upper_bound(failures, n, confidence) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [(1, 10, 0.0025), (5, 10, 0.1871), (9, 10, 0.5550), (0, 10, 0.0)],
)
def test_the_lower_bound_is_the_one_in_the_tables(successes: int, n: int, expected: float) -> None:
    assert lower_bound(successes, n, 0.975) == pytest.approx(expected, abs=6e-5)


@given(st.integers(1, 60), st.data(), st.sampled_from([0.05, 0.5, 0.9, 0.95, 0.975, 0.999]))
def test_the_upper_bound_solves_the_exact_tail(
    n: int, data: st.DataObject, confidence: float
) -> None:
    failures = data.draw(st.integers(0, n - 1))
    bound = upper_bound(failures, n, confidence)
    error = 1 - confidence
    assert exact_tail(failures, n, bound * (1 + 1e-9)) <= error
    assert exact_tail(failures, n, bound * (1 - 1e-9)) >= error


@pytest.mark.parametrize("n", [1, 10, 1_000, 1_000_000])
def test_without_failures_the_bound_has_its_closed_form(n: int) -> None:
    assert upper_bound(0, n) == pytest.approx(-math.expm1(math.log(0.05) / n), rel=1e-8)


@pytest.mark.parametrize(("failures", "n"), [(100_000, 1_000_000), (10_000, 1_000_000)])
@pytest.mark.parametrize(("confidence", "z"), [(0.05, -1.644854), (0.95, 1.644854)])
def test_a_million_samples_agree_with_the_normal_limit(
    failures: int, n: int, confidence: float, z: float
) -> None:
    rate = failures / n
    deviation = math.sqrt(rate * (1 - rate) / n)
    assert upper_bound(failures, n, confidence) == pytest.approx(
        rate + z * deviation, abs=0.02 * deviation
    )


@given(st.integers(1, 200), st.data())
def test_more_failures_never_lower_the_bound(n: int, data: st.DataObject) -> None:
    failures = data.draw(st.integers(0, n - 1))
    assert failures / n <= upper_bound(failures, n) <= upper_bound(failures + 1, n) <= 1


def test_the_bound_holds_as_often_as_it_says() -> None:
    n, rate, confidence = 40, 0.1, 0.95
    covered = sum(
        math.comb(n, k) * rate**k * (1 - rate) ** (n - k)
        for k in range(n + 1)
        if upper_bound(k, n, confidence) >= rate
    )
    assert covered >= confidence


def test_the_paired_loss_bound_is_above_the_loss_and_pays_for_both_sides() -> None:
    bound = paired_loss_bound(lost=8, won=5, n=1000)
    assert bound > 3 / 1000
    assert bound == pytest.approx(upper_bound(8, 1000, 0.975) - lower_bound(5, 1000, 0.975))


def test_the_paired_loss_bound_holds_for_any_dependence() -> None:
    n, lost_rate, won_rate = 30, 0.2, 0.1
    covered = 0.0
    for lost in range(n + 1):
        for won in range(n + 1 - lost):
            ways = math.comb(n, lost) * math.comb(n - lost, won)
            rest = (1 - lost_rate - won_rate) ** (n - lost - won)
            if paired_loss_bound(lost, won, n) >= lost_rate - won_rate:
                covered += ways * lost_rate**lost * won_rate**won * rest
    assert covered >= 0.95


@pytest.mark.parametrize(
    ("delta", "expected"), [(0.05, 59), (0.01, 299), (0.02, 149), (0.001, 2995)]
)
def test_rows_needed_without_failures_are_the_known_numbers(delta: float, expected: int) -> None:
    assert rows_needed(delta) == expected


@given(st.floats(0.01, 0.9), st.floats(0, 0.8))
def test_rows_needed_reach_the_bound(delta: float, share: float) -> None:
    rate = share * delta
    n = rows_needed(delta, failure_rate=rate)
    assert upper_bound(math.ceil(rate * n), n) <= delta * (1 + 1e-9)


@pytest.mark.parametrize("delta", [1e-9, 1e-12, 1e-15])
def test_where_hardly_any_may_fail_as_many_rows_are_needed_as_that_takes(delta: float) -> None:
    assert rows_needed(delta) == pytest.approx(math.log(0.05) / math.log1p(-delta), rel=1e-9)


def test_no_number_of_rows_shows_a_rate_that_is_not_there() -> None:
    assert rows_needed(0.01, failure_rate=0.01) == -1
    assert rows_needed(0.01, failure_rate=0.5) == -1


def test_rows_needed_answers_at_once_where_hundreds_of_millions_are_needed() -> None:
    assert rows_needed(0.02, failure_rate=0.01999) > 100_000_000  # solving every bound took minutes


@pytest.mark.parametrize(
    ("failures", "n", "confidence"), [(0, 0, 0.95), (-1, 10, 0.95), (11, 10, 0.95), (1, 10, 1.0)]
)
def test_figures_that_no_sample_has_are_refused(failures: int, n: int, confidence: float) -> None:
    with pytest.raises(ValueError, match=r"failures of|confidence is"):
        upper_bound(failures, n, confidence)


@given(st.floats(-1, 1), st.sampled_from([1, -1]))
def test_a_bound_that_is_printed_still_holds_and_says_as_much_as_two_decimals_can(
    bound: float, up: int
) -> None:
    told, exact = Fraction(percent(bound, up).removesuffix("%")) / 100, Fraction(repr(bound))
    assert 0 <= up * (told - exact) < Fraction(1, 10_000)


@pytest.mark.parametrize(
    ("bound", "up", "told"),
    [
        (0.010000001, 1, "1.01%"),
        (0.01004, 1, "1.01%"),
        (0.07, 1, "7.00%"),  # though 100 times that is more than 7
        (-0.00003, 1, "0.00%"),
        (0.97996, -1, "97.99%"),
        (0.98, -1, "98.00%"),
        (1.0, -1, "100.00%"),
    ],
)
def test_an_upper_bound_is_rounded_up_and_a_lower_one_down(
    bound: float, up: int, told: str
) -> None:
    assert percent(bound, up) == told
