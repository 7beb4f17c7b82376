"""What the compiler is given for an ONNX file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from lrai_core import CompileError, UnsupportedOperator
from lrai_import.onnx import load
from tests.core.compiler.onnx_files import linear, model, save, value, with_external_data

WEIGHT = np.arange(32, dtype=np.float32)


def test_a_model_is_given_as_it_is_and_nothing_is_said(tmp_path: Path) -> None:
    notes: list[str] = []
    path = save(linear(), tmp_path / "m.onnx")
    found = load(path, notes.append)
    assert (found.model, found.opset, notes) == (linear(), 17, [])
    given = hashlib.sha256(path.read_bytes()).digest()
    assert found.sha256 == hashlib.sha256(given).hexdigest()


def test_external_data_is_inline_and_in_the_hash(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    path = with_external_data(tmp_path / "m.onnx", "w.bin")
    first = load(path, print)
    weight = numpy_helper.to_array(first.model.graph.initializer[0])
    assert np.array_equal(weight.ravel(), WEIGHT)
    (tmp_path / "w.bin").write_bytes(np.flip(WEIGHT).tobytes())
    assert load(path, print).sha256 != first.sha256


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    twice = helper.make_function(
        "local",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 17)],
    )
    nodes = [helper.make_node("Twice", ["x"], ["y"], domain="local")]
    proto = model(nodes, [value("x", ["n"])], [value("y", ["n"])], domains=[("local", 1)])
    proto.functions.append(twice)
    found = load(save(proto, tmp_path / "m.onnx"), print).model
    assert not found.functions
    assert [node.op_type for node in found.graph.node] == ["Add"]


def test_an_older_opset_is_upgraded_and_told(tmp_path: Path) -> None:
    notes: list[str] = []
    found = load(save(linear(opset=11), tmp_path / "m.onnx"), notes.append)
    assert (found.opset, notes) == (17, ["opset 11 upgraded to 17"])
    assert [(o.domain, o.version) for o in found.model.opset_import] == [("", 17)]


def test_weights_that_are_inputs_too_are_weights(tmp_path: Path) -> None:
    """As in every file before version 4 of the format."""
    proto = linear(opset=9)
    proto.graph.input.append(value("w", [8, 4]))
    proto.ir_version = 3
    imported = load(save(proto, tmp_path / "m.onnx"), list[str]().append)
    assert [given.name for given in imported.model.graph.input] == ["x"]
    assert imported.model.ir_version >= 4
    onnx.checker.check_model(imported.model)


def test_an_opset_that_cannot_be_upgraded_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["y"], to="INT64")]
    outputs = [value("y", ["n"], onnx.TensorProto.INT64)]
    proto = model(nodes, [value("x", ["n"])], outputs, opset=5)
    with pytest.raises(UnsupportedOperator, match=r"opset 5 and cannot be upgraded to 17: .*Cast"):
        load(save(proto, tmp_path / "m.onnx"), print)


def test_what_the_child_refuses_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*arguments: object) -> onnx.ModelProto:
        raise AssertionError("read in this process")

    (tmp_path / "m.onnx").write_bytes(b"not an onnx model")
    monkeypatch.setattr(onnx, "load", read)
    with pytest.raises(CompileError, match="not an ONNX model"):
        load(tmp_path / "m.onnx", print)


@pytest.mark.parametrize(
    ("opset", "mode", "scale"),
    [
        *((9, "linear", 1.7), (9, "nearest", 2.0)),  # Upsample, which does not shrink
        *((10, "linear", 1.7), (10, "linear", 0.5), (10, "nearest", 2.0)),
    ],
)
def test_old_resizing_stays_as_it_was(tmp_path: Path, opset: int, mode: str, scale: float) -> None:
    """Before opset 11 coordinates were asymmetric, which onnx's converter does not say."""
    kind = "Upsample" if opset < 10 else "Resize"
    scales = numpy_helper.from_array(np.array([1, 1, scale, scale], np.float32), "scales")
    node = helper.make_node(kind, ["x", "scales"], ["y"], mode=mode)
    given, made_of = value("x", ["n", 1, 12, 12]), value("y", ["n", 1, "h", "w"])
    proto = model([node], [given], [made_of], [scales], opset=opset)
    path = save(proto, tmp_path / "m.onnx")
    x = np.random.default_rng(0).normal(size=(1, 1, 12, 12)).astype(np.float32)
    (right,) = onnxruntime.InferenceSession(path).run(None, {"x": x})
    made = load(path, list[str]().append).model.SerializeToString()
    (found,) = onnxruntime.InferenceSession(made).run(None, {"x": x})
    np.testing.assert_allclose(found, right, atol=1e-5)


def test_what_answers_otherwise_at_a_newer_opset_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Hardmax", ["x"], ["y"], axis=1)
    inputs, outputs = [value("x", ["n", 3, 4])], [value("y", ["n", 3, 4])]
    proto = model([node], inputs, outputs, opset=11)
    with pytest.raises(
        UnsupportedOperator, match="brought to opset 17 the model gives other answers"
    ):
        load(save(proto, tmp_path / "m.onnx"), print)


@pytest.mark.parametrize("opset", [13, 17])
def test_a_negative_extent_is_a_free_one(tmp_path: Path, opset: int) -> None:
    proto = linear(opset=opset)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    found = load(save(proto, tmp_path / "m.onnx"), print).model
    assert not found.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value")
