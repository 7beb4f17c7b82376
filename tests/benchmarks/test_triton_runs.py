"""In which order the benchmark of Triton measures its sides."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import triton, triton_grpc
from benchmarks.callers import Answers, Figures
from benchmarks.kinds import Kind
from benchmarks.triton_entries import AS_GIVEN, Entry


def test_over_grpc_another_side_begins_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, one = list[str](), np.ones(1)

    def closed(_: str, model: str, *__: Any) -> Figures:
        asked.append(model)
        return Figures(float(len(asked)), one, one, {200: 1}, "", 0.0, one)

    monkeypatch.setattr(triton_grpc, "closed", closed)
    extent = SimpleNamespace(rounds=4, requests={32: 1})
    server = SimpleNamespace(grpc="localhost:8001")
    bench: Any = SimpleNamespace(extent=extent, server=server, answers=defaultdict(Answers))
    who = {name: Entry(name, AS_GIVEN, "fp32") for name in "abc"}
    rows = triton.over_grpc(bench, Kind("search", [{}], np.ones((1, 1), np.float32)), who)
    assert " ".join(asked) == "a b c b c a c a b a b c"
    # Each has its own figures all the same.
    seconds = {row["who"]: [round(1 / rate) for rate in row["rates"]] for row in rows}
    assert seconds == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}
