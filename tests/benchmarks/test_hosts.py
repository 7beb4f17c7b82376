"""What the benchmark of the hosts sends and reads, which sides it compares, what it concludes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from benchmarks import hosts_report as report
from benchmarks.callers import Answers, Figures
from benchmarks.harness import console
from benchmarks.hosts_fastapi import decode, encode, groups
from benchmarks.hosts_load import answer, body_of, request
from benchmarks.hosts_parts import Parts
from benchmarks.hosts_servers import BENTO, HOSTS, MLFLOW, SAGEMAKER, sides_of

ROW = {"input_ids": np.array([[101, 7, 102]]), "attention_mask": np.array([[1, 1, 1]])}
BARE = {("fp32", "search"): [100.0, 200.0, 100.0], ("variant", "search"): [200.0, 400.0, 200.0]}


def side(
    file: str, rates: Sequence[float], callers: int = 32, host: str = SAGEMAKER, **more: Any
) -> dict[str, Any]:
    found = {"loop": "closed", "host": host, "form": file, "path": "API", "file": file, "who": file}
    figures = {"rates": list(rates), "mean_ms": [10.0], "cpu_us": {"actors": 2_000.0}}
    return {**found, "workers": 1, "lengths": "search", "callers": callers, **figures, **more}


def failing(rows: list[dict[str, Any]]) -> list[str]:
    return [check.name for check in report.checks(rows, BARE, {}) if not check.holds]


def test_a_container_of_fastapi_reads_what_is_sent_and_is_understood() -> None:
    read = decode(body_of("inputs", ROW))
    assert {name: array.tolist() for name, array in read.items()} == {
        name: array.tolist() for name, array in ROW.items()
    }
    output = np.array([[0.1, -3e-8]], np.float32)
    np.testing.assert_array_equal(answer(b"", encode(output), "sentence_embedding"), output)


@pytest.mark.parametrize(
    "said",
    [
        [[1.5, 2]],
        {"predictions": {"sentence_embedding": [[1.5, 2]]}},
        {"id": "a", "sentence_embedding": [[1.5, 2]]},
    ],
)
def test_answers_of_every_host_are_read(said: Any) -> None:
    found = answer(b"", json.dumps(said).encode(), "sentence_embedding")
    assert found.dtype == np.float32
    assert found.tolist() == [[1.5, 2.0]]


def test_a_request_states_its_path_and_its_length() -> None:
    head, _, body = request("rows /batched", ROW, "", None).partition(b"\r\n\r\n")
    assert head.startswith(b"POST /batched HTTP/1.1\r\n")
    assert f"Content-Length: {len(body)}".encode() in head.split(b"\r\n")
    assert json.loads(body) == {"rows": [[101, 7, 102]]}


def test_rows_of_one_length_are_together() -> None:
    assert groups([[1], [2, 3], [4], []]) == [[0, 2], [1], [3]]


def test_every_host_has_both_files_and_lrai_on_every_path_and_with_all_workers() -> None:
    for host in HOSTS:
        sides = sides_of(host, (1, 4))
        paths = {one.path for one in sides}
        found = {(one.path, one.file, one.workers) for one in sides}
        assert found == {
            (p, f, n) for p in paths for f in ("fp32", "variant", "lrai") for n in (1, 4)
        }
    further = [one for one in sides_of(BENTO, (1,), (4,)) if one.workers == 4]
    assert {one.file for one in further} == {"lrai"}


def test_lrai_is_compared_with_the_fastest_peer_of_its_own_path() -> None:
    ours, slow = side("lrai", [300]), side("variant", [100])
    fast, inside = side("variant", [200]), side("variant", [900], path="mount")
    rows = [ours, slow, fast, inside, side("variant", [999], workers=4)]
    assert report.best_peer(rows, ours, "variant") is fast


def test_ratios_are_taken_within_rounds() -> None:
    assert report.ratio(side("lrai", [20, 200, 20]), side("fp32", [10, 100, 10])).median == 2


def test_all_holds_where_lrai_gains_as_much_as_the_bare_engine() -> None:
    for callers in (1, 8, 32):
        peers = [side("fp32", [100.0] * 3, callers), side("variant", [180.0] * 3, callers)]
        assert failing([*peers, side("lrai", [200.0] * 3, callers)]) == []


def test_the_engine_s_gain_and_the_gain_over_the_same_file_are_demanded() -> None:
    rows = [side("fp32", [100.0] * 3), side("variant", [160.0] * 3), side("lrai", [168.0] * 3)]
    names = failing(rows)
    assert len(names) == 3  # of bare 84 %, 1.68 x fp32, 1.05 x the same file
    assert sum("bare engine's speed-up, 2.00" in name for name in names) == 1


def test_elsewhere_it_is_enough_not_to_be_behind() -> None:
    rows = [
        side(file, [100.0 + 75 * (file != "fp32")] * 3, host=MLFLOW) for file in ("fp32", "variant")
    ]
    assert failing([*rows, side("lrai", [175.0] * 3, host=MLFLOW)]) == []
    assert len(failing([*rows, side("lrai", [169.0] * 3, host=MLFLOW)])) == 3


def test_weights_that_several_processes_hold_are_a_failure() -> None:
    memory = {"loop": "memory", "host": MLFLOW, "path": "API", "file": "lrai", "who": "lrai"}
    assert failing([{**memory, "workers": 4, "engines": 1}]) == []
    assert len(failing([{**memory, "workers": 4, "engines": 4}])) == 1
    assert len(failing([{**memory, "workers": 4, "engines": 0}])) == 1


def test_wrong_answers_are_a_failure() -> None:
    nothing = np.zeros(50)
    cosines = np.array([1.0] * 48 + [0.5] * 2)
    figures = Figures(1.0, nothing, nothing, {200: 50}, "", 2e-4, cosines)
    answers = {"MLflow, mlflow.onnx, fp32": Answers(), "MLflow, lrai": Answers()}
    for shown in answers.values():
        shown.add(figures)
    held = [check.holds for check in report.checks([], BARE, answers)]
    assert held == [False, False, False], "too far, too often, and one that is another's"


def test_the_shares_of_the_latency_are_a_whole_or_said_not_to_add_up() -> None:
    parts = {(SAGEMAKER, file): Parts(500.0, 1_000.0) for file in ("fp32", "variant", "lrai")}
    cpu_us = dict.fromkeys(("host", "daemon", "actors"), 2_000.0)
    rows = [
        side(file, [1], way="", p50_ms=[1.0], p95_ms=[1.0], cpu_us=cpu_us)
        for file in ("fp32", "variant", "lrai")
    ]
    assert report.shares(rows[2], BARE, parts) == pytest.approx((0.05, 0.65, 0.2, 0.1))
    assert report.shares(rows[0], BARE, parts) == (0.05, None, 1.0, 0.1)
    with console.capture() as said:
        report.show(rows, BARE, parts, 1, "int8")
    _, _, table = said.get().partition("Where the latency goes")
    assert "estimated" in table
    cells = [line.split()[2:7] for line in table.splitlines() if "search, 32" in line]
    assert ["fp32", "5.0", "-", "100.0", "10.0"] in cells
    assert ["lrai", "5.0", "65.0", "20.0", "10.0"] in cells
