"""Which matrix does what harm, against a model that was made so that it is known."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from lrai_core.compiler.search import Sample
from lrai_core.protocol import Array, TensorSpec
from lrai_core.verifier.spec import difference
from lrai_engines.quantize import int8_per_row, rewrite
from lrai_engines.sensitivity import harms
from tests.core.compiler.onnx_files import model, value

OUTPUT = TensorSpec(name="y", datatype="FP32", shape=("batch", 16), batch_axis=0)


def three_layers(*, shared: bool = False) -> onnx.ModelProto:
    """Return x -> relu(x a) -> relu(. b) -> . c, where a row into b has an outlier."""
    random = np.random.default_rng(0)
    a, b, c = (random.standard_normal((16, 16)).astype(np.float32) / 4 for _ in "abc")
    a[:, 0] *= 300  # one element of a row so large that int8 has no steps left for the others
    b[0] *= 1e-3
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["ha"]),
        helper.make_node("Relu", ["ha"], ["ra"]),
        helper.make_node("MatMul", ["ra", "b"], ["hb"]),
        helper.make_node("Relu", ["hb"], ["rb"]),
        helper.make_node("MatMul", ["rb", "b" if shared else "c"], ["y"]),
    ]
    weights = [numpy_helper.from_array(w, n) for n, w in zip("abc", (a, b, c), strict=True)]
    ends = [value(name, ["batch", 16]) for name in "xy"]
    return model(nodes, ends[:1], ends[1:], weights[: 2 if shared else 3])


def sample(rows: int = 8) -> Sample:
    random = np.random.default_rng(1)
    x: list[list[Array]] = [[random.random((1, 16), np.float32)] for _ in range(rows)]
    return Sample(x, (OUTPUT,))


def test_the_matrix_behind_an_outlier_is_found() -> None:
    found = harms(three_layers(), sample())
    assert set(found) == {"a", "b", "c"}
    assert found["b"] > 20 * max(found["a"], found["c"])


def test_the_harms_of_all_are_about_that_of_all_together() -> None:
    """So that to keep a share of them closer takes away about that share."""
    import onnxruntime as ort

    proto, rows = three_layers(), sample()
    sessions = [
        ort.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"])
        for one in (proto, rewrite(proto, int8_per_row)[0])
    ]
    gaps = []
    for (x,) in rows.rows:
        right, found = (session.run(None, {"x": x})[0] for session in sessions)
        gaps.append(np.abs(right - found).max() ** 2)
    assert sum(harms(proto, rows).values()) == pytest.approx(np.mean(gaps), rel=0.5)


def test_a_matrix_that_two_operators_share_counts_once() -> None:
    assert set(harms(three_layers(shared=True), sample())) == {"a", "b"}


def test_the_model_is_not_changed() -> None:
    proto = three_layers()
    before = proto.SerializeToString()
    harms(proto, sample())
    assert proto.SerializeToString() == before


@pytest.mark.parametrize(("seconds", "least", "most"), [(1.0, 4, 31), (5.0, 2, 3), (8.0, 1, 1)])
def test_it_ends_when_its_time_is_over(
    seconds: float, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count()
    clock = SimpleNamespace(perf_counter=lambda: seconds * next(ticks))  # other threads have theirs
    monkeypatch.setattr("lrai_engines.sensitivity.time", clock)
    runs: list[int] = []

    def counted(*given: Any) -> float:
        runs.append(1)
        return difference(*given)

    monkeypatch.setattr("lrai_engines.sensitivity.difference", counted)
    harms(three_layers(), sample(32))
    assert 3 * least <= len(runs) <= 3 * most
