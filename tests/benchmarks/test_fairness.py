"""What the benchmark of fairness checks of rows that the compiler has not seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.fairness import LEAST_ROWS, Case, widened
from benchmarks.harness import Check
from lrai_core.fairness import Disparity, disparities, rows_needed

MARGIN = 0.02


def checks(
    rows: int, changed: int, gate: float | None = 0.01, told: tuple[str, ...] = ("sex",)
) -> list[Check]:
    """Return what is checked where so many of each group and label are unseen.

    `changed`: of the last group so many of each label get what the others get.
    """
    labels = np.tile([True, False], 2 * rows)
    member = np.arange(4 * rows) < 2 * rows
    before = labels.copy()
    after = before.copy()
    flipped = np.flatnonzero(~member)[: 2 * changed]
    after[flipped] = ~after[flipped]
    case = Case("c", Path("m.onnx"), {}, {}, ("sex",), told, MARGIN)
    members = {"a": member, "b": ~member}
    seen, sure = (
        disparities("sex", members, labels, before, after, least, 0.95)
        for least in (LEAST_ROWS, rows_needed(MARGIN, 0.95))
    )
    names = ("demographic_parity", "equalised_odds")
    gated = [Disparity("sex", name, 0.0, 0.0, gate, ("a", "b")) for name in names]
    return list(widened(case, "sex", seen, sure, gated))


def failing(found: list[Check]) -> list[str]:
    return [check.name for check in found if not check.holds]


def test_what_did_not_widen_on_enough_rows_holds_with_confidence() -> None:
    found = checks(600, 0)
    assert failing(found) == []
    bounds = [check for check in found if check.name.endswith("unseen: wider by at most")]
    assert len(bounds) == 2
    assert all(0 < check.value <= MARGIN for check in bounds)


def test_an_estimate_within_the_margin_is_not_enough() -> None:
    found = failing(checks(600, 4))  # 0.7 points of the odds
    assert found == ["c: equalised_odds by sex, unseen: wider by at most"]


def test_where_unseen_rows_are_too_few_the_gate_has_to_say_it() -> None:
    assert failing(checks(250, 0)) == []  # demographic parity has twice as many rows
    (name,) = failing(checks(250, 0, gate=0.03))
    assert (
        name == "c: equalised_odds by sex, the gate's rows, as too few are unseen: wider by at most"
    )


@pytest.mark.parametrize("gate", [None, 0.01])
def test_a_measure_that_nothing_tells_does_not_hold(gate: float | None) -> None:
    (name,) = failing(checks(100, 0, gate))
    assert "insufficient data for equalised_odds" in name
    assert failing(checks(100, 0, gate, told=())) == []
