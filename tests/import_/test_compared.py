"""What is converted answers as what it was made from, or is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from lrai_core import CompileError, TensorSpec
from lrai_import.compared import Model, compare, made_up
from tests.core.compiler.onnx_files import linear, save

INPUTS = (TensorSpec(name="x", datatype="FP32", shape=("batch", 8)),)
WEIGHT = numpy_helper.to_array(linear().graph.initializer[0])

Rows = Mapping[str, Any]


def right(rows: Rows) -> list[Any]:
    return [rows["x"] @ WEIGHT]


def wrong_for_several(rows: Rows) -> list[Any]:
    return [right(rows)[0] * len(rows["x"])]


def refuses_several(rows: Rows) -> list[Any]:
    if len(rows["x"]) > 1:
        raise ValueError("one at a time")
    return right(rows)


def refuses_all(rows: Rows) -> list[Any]:
    raise ValueError("never")


def random(rows: Rows) -> list[Any]:
    return [np.random.default_rng().standard_normal((len(rows["x"]), 4))]


@pytest.mark.parametrize(
    ("model", "compared"),
    [(right, True), (refuses_several, True), (refuses_all, False), (random, False)],
)
def test_what_answers_alike_is_compared_where_the_model_answers(
    tmp_path: Path, model: Model, compared: bool
) -> None:
    made = save(linear(), tmp_path / "m.onnx")
    assert compare(model, made, INPUTS, what="it", why="no matter") is compared


def test_what_answers_otherwise_is_refused_saying_at_which_size(tmp_path: Path) -> None:
    made = save(linear(), tmp_path / "m.onnx")
    says = "^it gives other answers for 3 rows and free extents of 40: as it is$"
    with pytest.raises(CompileError, match=says):
        compare(wrong_for_several, made, INPUTS, what="it", why="as it is")


def test_what_is_small_altogether_is_compared_by_its_own_size(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(WEIGHT * np.float32(1e-3), proto.graph.initializer[0].name)
    )
    made = save(proto, tmp_path / "m.onnx")
    with pytest.raises(CompileError, match="gives other answers"):
        compare(lambda rows: [1e-3 * right(rows)[0][:, ::-1]], made, INPUTS, what="it", why="so")


def test_what_has_nothing_free_is_run_no_more_often_than_rows_differ(tmp_path: Path) -> None:
    made, asked = save(linear(), tmp_path / "m.onnx"), list[int]()

    def model(rows: Rows) -> list[Any]:
        asked.append(len(rows["x"]))
        return right(rows)

    assert compare(model, made, INPUTS, what="it", why="no matter")
    assert len(asked) == 2 * len(set(asked)), "twice each, to see whether it repeats itself"


def test_made_up_rows_are_texts_where_texts_are_wanted() -> None:
    rows = made_up(TensorSpec(name="t", datatype="BYTES", shape=("batch", 2)), 3, fill=1)
    assert rows.tolist() == [["1", "1"]] * 3
    whole = made_up(TensorSpec(name="n", datatype="UINT8", shape=("batch", "wide")), 1)
    assert whole.dtype == np.uint8
    assert whole.shape == (1, 8)
