"""What the benchmark of faults in Triton takes for a change of the version."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import triton_faults, triton_load
from benchmarks.callers import Figures


def failing(versions: Sequence[str], cosines: Sequence[float], switches: int) -> list[str]:
    """Return the checks of a version switch under load that do not hold."""
    some = np.ones(len(cosines))
    figures = Figures(
        1.0, some, some, {200: len(cosines)}, "", 0.0, np.array(cosines), tuple(versions)
    )
    row: dict[str, Any] = {"execution": "lists", "what": "switch", **triton_faults._seen(figures)}
    row |= triton_faults._versions(figures, switches)
    return [check.name for check in triton_faults.checks([row]) if not check.holds]


def test_a_switch_that_does_nothing_is_a_failure() -> None:
    right = [1.0] * 6
    assert failing("112211", right, 2) == []
    assert failing("111111", right, 2) == ["lists, switch: times that another one answers"]
    assert failing("111222", right, 2) == ["lists, switch: times that another one answers"]
    assert failing("111111", right, 0) == ["lists, switch: times that another one answers"]


def test_wrong_answers_of_one_version_are_a_failure_of_it() -> None:
    seldom = failing("1" * 199 + "2", [1.0] * 199 + [0.9], 1)
    assert seldom == [f"lists, switch, by version 2: answers with cosine >= {triton_faults.COSINE}"]


def test_an_answer_says_which_version_gave_it() -> None:
    content = json.dumps({"model_name": "m", "model_version": "2", "outputs": []}).encode()
    assert triton_load._version(b"HTTP/1.1 200 OK\r\nContent-Length: 1", content) == "2"
    head = f"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: {len(content)}".encode()
    assert triton_load._version(head, content + bytes(8)) == "2"
