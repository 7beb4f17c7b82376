"""What the benchmark of `lrai tune` concludes from what it has seen of the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lrai_core as lrai
from benchmarks.tune import _checks, answering
from tests.core import small_artifact
from tests.own_runtime import own_runtime

OLD, NEW = {"m": ["1a"]}, {"m": ["2b"]}


def failing(**changes: Any) -> list[str]:
    """Return the checks that fail of a run that went well but for these."""
    found: dict[str, Any] = {
        "host": "h",
        "exit_status": 0,
        "rolled_back": 0,
        "gain": 1.5,
        "gain_told": 1.5,
        "applied": True,
        "serving": {"before": OLD, "tuned": NEW, "back": OLD},
        "requests": {"before": 9},
        "failures": [],
        "least_cosine": 0.95,
        "least_cosine_back": 0.999999,
        "alike": {"before": 1.0},
    }
    return [check.name for check in _checks(found | changes) if not check.holds]


@pytest.mark.parametrize(
    "serving",
    [
        {"before": OLD, "tuned": NEW, "back": NEW},
        {"before": OLD, "tuned": NEW, "back": {"m": ["1a", "2b"]}},
        {"before": OLD, "tuned": OLD, "back": OLD},  # then nothing was switched over
    ],
)
def test_it_is_switched_back_where_what_served_before_serves(serving: dict[str, Any]) -> None:
    assert failing() == []
    (name,) = failing(serving=serving)
    assert "switched back" in name


def test_answers_after_the_way_back_are_those_of_float32() -> None:
    (name,) = failing(least_cosine_back=0.9995)  # which int8 has
    assert "after switching back" in name


@pytest.mark.server
def test_the_versions_that_answer_are_those_that_the_runtime_tells(tmp_path: Path) -> None:
    one, two = (
        lrai.Artifact.open(small_artifact.build(tmp_path / f"{factor}.lrai", factor=factor))
        for factor in (2.0, 3.0)
    )
    with own_runtime() as sockets, lrai.Runtime(address="auto") as runtime:
        runtime.load(one, name="m")
        before = answering(sockets)
        runtime.swap("m", two)
        tuned = answering(sockets)
        runtime.rollback("m")
        assert (before, tuned) == ({"m": [one.version]}, {"m": [two.version]})
        assert answering(sockets) == before
