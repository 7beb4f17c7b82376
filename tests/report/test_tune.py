"""`lrai tune` without a runtime: what it refuses, says and leaves."""

from __future__ import annotations

import pytest

from lrai_report.tune import main


def test_a_price_that_is_no_number_is_refused_before_anything_is_looked_for() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["nothing-of-that-name", "--price-per-hour", "inf"])
    assert ended.value.code == 2
