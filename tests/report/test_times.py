"""Where the time of a call goes: kinds of operators that the graph has, and reasons where not."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import lrai_core as lrai
from benchmarks import models
from lrai_report.page import page
from lrai_report.times import _CALLS, _profile, times
from tests.core import small_artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> lrai.Artifact:
    """Return wide layers that nobody has trained: int8 is faster, and their time can be told.

    The profiler knows whole microseconds, and what takes less has none.
    """
    folder, random = tmp_path_factory.mktemp("times"), np.random.default_rng(0)
    layers, sizes = list[tuple[Any, Any]](), (64, 1024, 1024, 10)
    for width, units in pairwise(sizes):
        weight = random.standard_normal((width, units)) / width**0.5
        layers.append((weight.astype(np.float32), np.zeros(units, np.float32)))
    source = models.mlp_onnx(folder / "c.onnx", layers)
    rows = {"features": random.standard_normal((900, 64)).astype(np.float32)}
    rows["label"] = onnxruntime.InferenceSession(source).run(None, rows)[0].argmax(axis=1)
    asked: dict[str, Any] = {"output_map": "softmax", "max_accuracy_loss": 0.2}
    return lrai.compile(source, out=folder / "c.lrai", evaluation=rows, **asked)


def test_every_kind_of_operator_of_the_graph_has_its_time_and_no_other(
    artifact: lrai.Artifact,
) -> None:
    spent, why = times(artifact, artifact.variants)
    assert not why
    for at, variant in enumerate(artifact.variants):
        graph = onnx.load(artifact.file(variant.model), load_external_data=False).graph
        assert {kind for kind, own in spent.items() if own[at]} <= {n.op_type for n in graph.node}
        # A call takes what its operators take, and what is between them, which here is more.
        assert 0 < sum(own[at] for own in spent.values()) < 50
    assert any("Gemm" in kind or "MatMul" in kind for kind in list(spent)[:2])


def test_what_a_loop_runs_is_counted_once_and_with_all_its_turns(tmp_path: Path) -> None:
    rows: tuple[str, list[Any]] = ("FLOAT", ["n", 3])
    truth: tuple[str, list[Any]] = ("BOOL", [])

    def value(name: str, kind: str, shape: list[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape)

    turn = helper.make_graph(
        [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Not", ["off"], ["on"])],
        "turn",
        [value("i", "INT64", []), value("go", *truth), value("a", *rows)],
        [value("on", *truth), value("b", *rows)],
        [numpy_helper.from_array(np.array(False), "off")],
    )
    nodes = [
        helper.make_node("Loop", ["turns", "", "x"], ["y"], body=turn),
        helper.make_node("Mul", ["y", "y"], ["z"]),
    ]
    constants = [numpy_helper.from_array(np.array(7), "turns")]
    graph = helper.make_graph(nodes, "g", [value("x", *rows)], [value("z", *rows)], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, tmp_path / "m.onnx")
    manifest = SimpleNamespace(target=SimpleNamespace(threads=1))
    opened: Any = SimpleNamespace(manifest=manifest, file=lambda name: tmp_path / name)
    variant: Any = SimpleNamespace(weights="", model="m.onnx")
    seen = Counter(kind for kind, *_ in _profile(opened, variant, [np.ones((1, 3), np.float32)]))
    assert {"Relu", "Mul"} <= seen.keys() <= {"Relu", "Mul", "Not"}
    assert set(seen.values()) == {_CALLS}


def test_they_stand_in_the_page(artifact: lrai.Artifact) -> None:
    shown = page(artifact)
    assert "Where the time of one row goes" in shown
    assert "onnxruntime's profiler" in shown


def test_a_graph_that_does_not_run_costs_the_table_and_nothing_else(tmp_path: Path) -> None:
    path = small_artifact.build(tmp_path / "m.lrai")
    graph = path / "variants" / "int8" / "model.onnx"
    graph.write_bytes(b"x" * graph.stat().st_size)
    artifact = lrai.Artifact.open(path, verify=False)
    spent, why = times(artifact, artifact.variants)
    assert (spent, why.partition(":")[0]) == ({}, "it does not run")
    assert "It was not measured: it does not run" in page(artifact)


def test_what_was_made_for_another_machine_or_engine_says_so(tmp_path: Path) -> None:
    path = small_artifact.build(tmp_path / "m.lrai")
    small_artifact.rewrite(path, {"target": {**_target(), "isa": "mill"}})
    artifact = lrai.Artifact.open(path)
    spent, why = times(artifact, artifact.variants)
    assert not spent
    assert why.startswith("made for mill with onnxruntime")


def _target() -> dict[str, object]:
    target = small_artifact.manifest().target
    return {name: getattr(target, name) for name in target.__struct_fields__}
