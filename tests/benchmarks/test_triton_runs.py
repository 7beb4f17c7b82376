"""In which order the benchmark of Triton measures its sides, and which answers it checks."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import triton, triton_grpc
from benchmarks import triton_entries as entries
from benchmarks import triton_report as report
from benchmarks.callers import Answers, Figures, Load
from benchmarks.kinds import Kind, share
from benchmarks.triton_entries import AS_GIVEN, Entry, Peer
from benchmarks.triton_runs import Bench


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


def test_every_caller_asks_a_few_times_whatever_the_lengths() -> None:
    azure, search = (Kind(name, [], np.ones((1, 1), np.float32)) for name in ("azure", "search"))
    assert [share(azure, 384, callers) for callers in (1, 8, 32, 128)] == [96, 96, 96, 384]
    assert [share(search, 48, callers) for callers in (1, 8, 32)] == [48, 48, 96]


def test_callers_that_would_not_ask_are_refused() -> None:
    kind = Kind("azure", [{}], np.ones((1, 1), np.float32))
    with pytest.raises(ValueError, match="too few for 3 callers"):
        Load.__new__(Load).closed("m", "azure", [0, 0], 3)
    with pytest.raises(ValueError, match="too few for 3 callers"):
        triton_grpc.closed("", "m", kind, "y", [0, 0], 3)


def failing(**worst: float) -> list[str]:
    """Return the checks of answers with these differences that do not hold."""
    one = np.ones(1)
    answers = {name.replace("_", ", "): Answers() for name in worst}
    for shown, off in zip(answers.values(), worst.values(), strict=True):
        shown.add(Figures(1.0, one, one, {200: 1}, "", off, one))
    cells = [("peer fp32", 1.0), ("peer variant", 2.0), ("lrai", 2.4)]
    rows: list[dict[str, Any]] = [
        {"loop": "closed", "lengths": "search", "callers": 32, "who": who, "rates": [rate]}
        for who, rate in cells
    ]
    rows += [
        {"loop": "overhead", "callers": 1, "who": who, "p50_us": [100.0]}
        for who in (*entries.CONSTANTS, "lrai-lists", "lrai-inline")
    ]
    bare = {(form, "search"): [rate] for form, rate in (("fp32", 1.0), ("int8", 2.0))}
    return [check.name for check in report.checks(rows, answers, bare, "int8") if not check.holds]


def overhead(**p50_us: float) -> dict[str, float]:
    """Return what is checked of these p50 of what computes nothing."""
    rows: list[dict[str, Any]] = [
        {"loop": "overhead", "callers": 1, "who": who.replace("_", "-"), "p50_us": [p50] * 3}
        for who, p50 in p50_us.items()
    ]
    rows += [
        {"loop": "closed", "lengths": "search", "callers": 32, "who": who, "rates": [1.0]}
        for who in ("peer fp32", "peer variant", "lrai")
    ]
    bare = {(form, "search"): [1.0] for form in ("fp32", "int8")}
    found = {check.name: check.value for check in report.checks(rows, {}, bare, "int8")}
    return {name: value for name, value in found.items() if "p50" in name}


def test_the_faster_that_returns_a_constant_counts_with_a_batcher_or_without() -> None:
    ours = {"lrai_lists": 180.0, "lrai_inline": 120.0}
    for alone, batched in ((80.0, 100.0), (100.0, 80.0)):
        found = overhead(constant=batched, constant_alone=alone, **ours)
        assert sorted(found.values()) == [1.5, 100.0]


def test_a_batcher_is_in_the_configuration_where_lists_are_wanted(tmp_path: Path) -> None:
    artifact: Any = None
    repository = entries.Repository(tmp_path / "r", tmp_path / "m.onnx", artifact, tmp_path)
    for batches in (True, False):
        repository.noop_peer(f"m{batches}", "constant", 256, batches=batches)
        text = (tmp_path / "r" / f"m{batches}" / "config.pbtxt").read_text()
        assert ("dynamic_batching" in text) is batches


def test_what_computes_nothing_has_to_answer_rightly_too() -> None:
    assert failing(lrai_noop=0.0, peer_noop=0.0, lrai_fp32=9e-5) == []
    assert failing(lrai_noop=1e-6, peer_noop=0.0) == ["lrai, noop: worst difference"]


def test_the_answers_of_what_computes_nothing_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load", "unload", "wait_until_settled"):
        monkeypatch.setattr(entries, name, lambda *_: None)
    monkeypatch.setattr(Bench, "cpu_seconds", lambda _: {"stubs": 0.0})
    one = np.ones(1)
    wrong = Figures(1.0, one, one, {200: 1}, "", 0.5, one)
    load: Any = SimpleNamespace(rows=lambda *_: None, closed=lambda *_: wrong)
    repository: Any = SimpleNamespace(
        noop="noop.onnx",
        noop_peer=lambda name, way, *_, **__: Entry(name, Peer(way, 64), "noop"),
        ours=lambda name, variant, ours, _: Entry(name, ours, variant),
    )
    extent: Any = SimpleNamespace(overhead_rounds=1, overhead_requests={1: 1})
    server: Any = SimpleNamespace(port=1)
    bench = Bench(server, load, repository, extent)
    bench.overhead()
    assert {who: shown.worst for who, shown in bench.answers.items()} == {
        "peer, noop": 0.5,
        "lrai, noop": 0.5,
    }


@pytest.mark.parametrize(
    ("rates", "held"),
    [
        ({"http": 150.0, "grpc": 260.0}, [True] * 4),
        ({"http": 150.0, "grpc": 20.0}, [True, False] * 2),
        ({"http": 150.0}, [True, False] * 2),
        ({}, [False] * 4),
    ],
)
def test_tritons_own_tool_has_to_be_heard_and_to_agree(
    rates: dict[str, float], held: list[bool]
) -> None:
    rows: list[dict[str, Any]] = []
    for who in ("peer variant", "lrai"):
        cell = {"loop": "closed", "lengths": "fixed", "callers": 32, "who": who}
        rows.append({**cell, "rates": [100.0, 200.0, 300.0]})
        told = {"loop": "perf_analyzer", "who": who}
        rows += [{**told, "protocol": name, "rate": rate} for name, rate in rates.items()]
    assert [check.holds for check in report.second_opinion(rows)] == held


TOOL = """#!/bin/sh
while [ $# -gt 0 ]; do
  case $1 in -m) model=$2 ;; -i) protocol=$2 ;; -f) out=$2 ;; --input-data) data=$2 ;; esac
  shift
done
grep -q '"shape": \\[3\\]' "$data" || exit 0
[ $model$protocol = oursgrpc ] && exit 0
echo Concurrency,Inferences/Second,p95 latency > "$out"
echo 32,50.5,7000 >> "$out"
"""


def test_what_tritons_own_tool_did_not_measure_is_not_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tool := tmp_path / "perf_analyzer").write_text(TOOL)
    tool.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    bench: Any = SimpleNamespace(
        repository=SimpleNamespace(folder=tmp_path / "models"),
        server=SimpleNamespace(http="localhost:8000", grpc="localhost:8001"),
        loaded=contextlib.nullcontext,
    )
    kind = Kind("fixed", [{"ids": np.array([[1, 2, 3]])}], np.ones((1, 1), np.float32))
    settings, found = [Entry(name, AS_GIVEN, "int8") for name in ("peer", "ours")], list[Any]()
    triton.perf_analyzer(bench, kind, settings, found)
    assert [(row["who"], row["protocol"], row["rate"], row["p95_ms"]) for row in found] == [
        ("peer variant", "http", 50.5, 7.0),
        ("peer variant", "grpc", 50.5, 7.0),
        ("lrai", "http", 50.5, 7.0),
    ]


@pytest.mark.parametrize("lengths", ["azure", "search"])
def test_long_lengths_are_judged_by_what_is_usual_and_not_by_the_luckiest(lengths: str) -> None:
    rates = {"peer fp32": [1.0] * 7, "peer variant": [1.0] * 7, "lrai": [0.9] * 5 + [1.5] * 2}
    cells = itertools.product(dict.fromkeys(("search", lengths)), rates.items())
    rows: list[dict[str, Any]] = [
        {"loop": "closed", "lengths": kind, "callers": 32, "who": who, "rates": rate}
        for kind, (who, rate) in cells
    ]
    rows += [
        {"loop": "overhead", "callers": 1, "who": who, "p50_us": [100.0]}
        for who in (*entries.CONSTANTS, "lrai-lists", "lrai-inline")
    ]
    bare = {(form, "search"): [1.0] for form in ("fp32", "int8")}
    found = report.checks(rows, {}, bare, "int8")
    (one,) = [check for check in found if check.name.startswith(f"{lengths} at 32: to the same")]
    assert one.holds == (lengths == "search")


def test_what_triton_waits_for_more_is_in_the_configuration(tmp_path: Path) -> None:
    artifact: Any = None
    repository = entries.Repository(tmp_path / "r", tmp_path / "m.onnx", artifact, tmp_path)
    peer = Peer("grouped", 32, ragged=True, delay_us=2_000, queue=entries.Queue(4, None))
    repository.peer("m", "fp32", peer)
    text = (tmp_path / "r" / "m" / "config.pbtxt").read_text()
    assert "dynamic_batching { max_queue_delay_microseconds: 2000 default_queue_policy {" in text
    assert "waits 2000 us" in str(peer)
