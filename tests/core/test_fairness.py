"""Group measures against fairlearn, and the bound on what a variant adds against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from fairlearn import metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from lrai_core import fairness
from lrai_core.fairness import Bools, Disparity, disparities

LEVEL = 0.95


def drawn(seed: int, count: int, groups: int) -> tuple[dict[str, Bools], Bools, Bools, Bools]:
    """Return members, labels, and the decisions of two models that agree on most rows."""
    random = np.random.default_rng(seed)
    group = random.integers(groups, size=count)
    labels = random.random(count) < 0.2 + 0.1 * group
    source = np.where(random.random(count) < 0.8, labels, random.random(count) < 0.5)
    variant = np.where(random.random(count) < 0.95, source, random.random(count) < 0.5)
    return {f"g{i}": group == i for i in range(groups)}, labels, source, variant


def names_of(members: dict[str, Bools]) -> list[str]:
    table = np.array(list(members.values()))
    return [list(members)[i] for i in table.argmax(axis=0)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_differences_are_fairlearns(seed: int, groups: int) -> None:
    members, labels, source, variant = drawn(seed, 400, groups)
    parity, odds = disparities("g", members, labels, source, variant, 1, LEVEL)
    assert (parity.measure, odds.measure) == ("demographic_parity", "equalised_odds")
    for predicted, field in ((source, "source"), (variant, "variant")):
        features = {"sensitive_features": names_of(members)}
        expected = metrics.demographic_parity_difference(labels, predicted, **features)
        assert getattr(parity, field) == pytest.approx(expected, abs=1e-12)
        expected = metrics.equalized_odds_difference(labels, predicted, **features)
        assert getattr(odds, field) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_rates_are_fairlearns(seed: int) -> None:
    members, labels, source, _ = drawn(seed, 300, 2)
    for own in members.values():
        found = fairness.rates(source[own], labels[own])
        y, p = labels[own], source[own]
        assert found == pytest.approx(
            {
                "rows": own.sum(),
                "accuracy": (y == p).mean(),
                "selection_rate": metrics.selection_rate(y, p),
                "false_positive_rate": metrics.false_positive_rate(y, p),
                "false_negative_rate": metrics.false_negative_rate(y, p),
            }
        )


def test_a_rate_that_no_row_tells_is_left_out() -> None:
    none = np.zeros(3, bool)
    assert set(fairness.rates(none, none)) == {
        "rows", "accuracy", "selection_rate", "false_positive_rate",
    }  # fmt: skip
    assert fairness.rates(none[:0], none[:0]) == {"rows": 0}


def simulated(random: np.random.Generator, per_group: int, widening: float) -> Disparity:
    """Return what is found of a variant that truly selects one group more often by `widening`."""
    group = np.repeat([0, 1], per_group)
    labels = random.random(2 * per_group) < 0.5
    source = random.random(2 * per_group) < 0.4 + 0.2 * group
    variant = source | ((group == 1) & (random.random(2 * per_group) < widening / 0.4))
    members = {"a": group == 0, "b": group == 1}
    return disparities("g", members, labels, source, variant, 1, LEVEL)[0]


def test_the_bound_covers_what_is_really_added() -> None:
    random, widening = np.random.default_rng(5), 0.03
    bounds = [simulated(random, 600, widening).widened_bound or 0.0 for _ in range(400)]
    assert np.mean(np.array(bounds) >= widening) >= 0.95
    assert np.median(bounds) < 3 * widening  # and says something


def test_nothing_is_bounded_where_groups_are_too_small() -> None:
    members, labels, source, variant = drawn(0, 400, 2)
    sizes = [int(own.sum()) for own in members.values()]
    for least, judged in ((min(sizes), 2), (max(sizes), 1)):
        parity, odds = disparities("g", members, labels, source, variant, least, LEVEL)
        assert len(parity.groups) == judged
        assert (parity.widened_bound is None) == (judged < 2)
        assert odds.widened_bound is None  # each label has fewer rows still


@pytest.mark.parametrize("margin", [0.01, 0.05, 0.2])
def test_the_rows_needed_are_the_fewest_that_show_the_margin(margin: float) -> None:
    n = fairness.rows_needed(margin, LEVEL)
    for count, shown in ((n, True), (n - 1, False)):
        members = {"a": np.arange(2 * count) < count, "b": np.arange(2 * count) >= count}
        same = np.zeros(2 * count, bool)
        parity, _ = disparities("g", members, same, same, same, 1, LEVEL)
        assert ((parity.widened_bound or 0) <= margin) == shown
