"""Figures as people read them."""

from __future__ import annotations

import pytest

from lrai_core.verifier.spec import FAR
from lrai_report.words import distance, figure


@pytest.mark.parametrize(
    ("value", "digits", "written"),
    [
        (0.012345, 3, "0.0123"),
        (12.345, 3, "12.3"),
        (999.4, 3, "999"),
        (1234.5, 3, "1,234"),
        (12345.0, 4, "12,345"),
        (0.0, 3, "0"),
        (float("inf"), 3, "inf"),
        (1e-7, 2, "1e-07"),
    ],
)
def test_a_figure_has_its_digits_and_no_power_of_ten_where_it_is_large(
    value: float, digits: int, written: str
) -> None:
    assert figure(value, digits) == written


def test_what_no_number_says_is_not_written_as_one() -> None:
    assert (distance(0.1234), distance(0.1234, 3)) == ("0.12", "0.123")
    assert distance(FAR) == "not comparable"
