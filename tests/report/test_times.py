"""Where the time of a call goes: kinds of operators that the graph has, and reasons where not."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import lrai_core as lrai
from benchmarks import models
from lrai_report.page import page
from lrai_report.times import times
from tests.core import small_artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> lrai.Artifact:
    """Return a wide classifier, so that int8 is chosen on any processor."""
    folder = tmp_path_factory.mktemp("times")
    source, held = models.classifier(folder / "c.onnx", 7, hidden=1024, layers=1)
    rows = {name: values[:900] for name, values in held.items()}
    return lrai.compile(source, out=folder / "c.lrai", evaluation=rows, output_map="softmax")


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
