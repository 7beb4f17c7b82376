"""What the compiler's benchmark says that a model takes of memory and of a disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper
from onnx.helper import make_node

import lrai_core as lrai
from benchmarks.compiler_memory import idle_mb, loaded_mb, variant_mb, vocabulary
from tests.core import small_artifact
from tests.core.compiler.onnx_files import model, save, value

IDS, WIDTH = 30_011, 512
TABLE_MB = IDS * WIDTH * 4 / 1e6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the mean of a text's embeddings, of which nearly all is the table."""
    table = np.random.default_rng(0).standard_normal((IDS, WIDTH)).astype(np.float32)
    nodes = [
        make_node("Gather", ["table", "input_ids"], ["embedded"]),
        make_node("ReduceMean", ["embedded"], ["mean"], axes=[1], keepdims=0),
    ]
    inputs = [value("input_ids", ["batch", "sequence"], TensorProto.INT64)]
    tables = [numpy_helper.from_array(table, "table")]
    proto = model(nodes, inputs, [value("mean", ["batch", WIDTH])], tables)
    return save(proto, tmp_path_factory.mktemp("source") / "m.onnx")


@pytest.fixture(scope="module")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> lrai.Artifact:
    return lrai.compile(source, out=tmp_path_factory.mktemp("artifact") / "m.lrai", threads=1)


def test_embeddings_are_memory_though_they_are_mapped(
    source: Path, artifact: lrai.Artifact
) -> None:
    assert vocabulary(source) == {"input_ids": IDS}
    (fp32,) = artifact.variants
    assert variant_mb(artifact, fp32) > 0.9 * TABLE_MB
    assert loaded_mb(source, vocabulary(source), optimise=True) > 0.9 * TABLE_MB


def test_what_serves_and_what_it_shares_is_not_idle(source: Path, artifact: lrai.Artifact) -> None:
    assert source.stat().st_size / 1e6 > TABLE_MB
    assert 0 < idle_mb(artifact) < 0.01 * TABLE_MB


def test_what_does_not_serve_is_idle(tmp_path: Path) -> None:
    path = small_artifact.build(tmp_path / "m.lrai", evaluation=small_artifact.rows(20))
    idle = [*(path / "source").iterdir(), *(path / "variants" / "fp32").iterdir()]
    found = idle_mb(lrai.Artifact.open(path))
    assert found == pytest.approx(sum(file.stat().st_size for file in idle) / 1e6)
