"""Static int8 of a small convolutional network, against float32 in onnxruntime."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import lrai_core as lrai
from lrai_core.artifact import LatencyPoint
from lrai_core.compiler import search
from lrai_core.compiler.search import Sample
from lrai_core.engine.engine import find_engine, isa_class
from lrai_core.errors import CompileError
from lrai_core.protocol import Array, TensorSpec
from lrai_engines.fusion import optimise
from lrai_engines.quantize import SATURATING, NothingToQuantize
from lrai_engines.static import StaticForms, signed, static_int8
from lrai_engines.static_harms import harms, work
from lrai_engines.undefined import goes_undefined
from tests.core.compiler.onnx_files import model, save, value

OUTPUT = TensorSpec(name="y", datatype="FP32", shape=("batch", 10), batch_axis=0)
SHAPE = (3, 16, 16)


def network() -> onnx.ModelProto:
    """Return image -> convolution, relu, convolution, relu, mean, 10 classes."""
    random = np.random.default_rng(0)
    weights = {
        "first": random.standard_normal((16, 3, 3, 3)) / 5,
        "second": random.standard_normal((32, 16, 3, 3)) / 12,
        "last": random.standard_normal((32, 10)) / 5,
    }
    weights["second"] *= np.geomspace(0.01, 1, 32)[:, None, None, None]  # one scale would not do
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "second"], ["c2"], "conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("MatMul", ["f", "last"], ["y"], "classes"),
    ]
    constants = [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()]
    return model(nodes, [value("x", ["batch", *SHAPE])], [value("y", ["batch", 10])], constants)


def images(count: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((count, *SHAPE)).astype(np.float32)


def sample(count: int = 20) -> Sample:
    return Sample([[row[None]] for row in images(count, 1)], (OUTPUT,))


def run(proto: onnx.ModelProto, x: Array) -> Array:
    ready = optimise(proto, level="all").SerializeToString()
    session = ort.InferenceSession(ready, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def distance(found: Array, right: Array) -> float:
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


def test_it_is_close_on_rows_it_has_not_seen_and_alone_as_in_a_batch() -> None:
    proto, x = network(), images(40, 2)
    quantised, _ = static_int8(proto, sample())
    found, right = run(quantised, x), run(proto, x)
    assert 0 < distance(found, right) < (0.06 if isa_class() in SATURATING else 0.04)
    alone = np.concatenate([run(quantised, x[i : i + 1]) for i in range(8)])
    np.testing.assert_allclose(alone, found[:8], atol=1e-5)


@pytest.mark.parametrize(
    ("isa", "most"), [("avx512", 64), ("avx2", 64), ("x86_64", 64), ("vnni", 127), ("amx", 127)]
)
def test_weights_have_7_bits_where_products_of_8_would_saturate(
    monkeypatch: pytest.MonkeyPatch, isa: str, most: int
) -> None:
    monkeypatch.setattr("lrai_engines.static.isa_class", lambda: isa)
    proto, x = network(), images(40, 2)
    quantised, _ = static_int8(proto, sample())
    integers = {
        tuple(tensor.dims): np.abs(numpy_helper.to_array(tensor).astype(int)).max()
        for tensor in quantised.graph.initializer
        if tensor.data_type == TensorProto.INT8 and len(tensor.dims) > 1
    }
    assert integers == {(16, 3, 3, 3): most, (32, 16, 3, 3): most, (32, 10): most}
    assert 0 < distance(run(quantised, x), run(proto, x)) < 0.06


def test_every_operator_with_weights_is_reported_with_its_error() -> None:
    quantised, report = static_int8(network(), sample())
    assert [line.node for line in report] == ["conv1", "conv2", "classes"]
    assert [line.weight_elements for line in report] == [16 * 27, 32 * 144, 320]
    limit = 0.02 if isa_class() in SATURATING else 0.01  # a scale per channel: 1.5e-3 to 3e-3 of it
    assert all(line.bits == 8 and 0 < line.error < limit for line in report)
    scales = {n.input[1] for n in quantised.graph.node if n.op_type == "DequantizeLinear"}
    sizes = {t.name: numpy_helper.to_array(t).size for t in quantised.graph.initializer}
    assert {16, 32} <= {sizes[name] for name in scales}, "a scale per output channel"


def test_what_is_kept_stays_in_float32_and_with_it_what_computes_with_it() -> None:
    quantised, report = static_int8(network(), sample(), keep=["conv1", "classes"])
    assert [line.bits for line in report] == [32, 8, 32]
    assert report[0].why == report[2].why == "kept closer"
    relu = next(node for node in quantised.graph.node if node.name == "relu1")
    assert relu.input[0] == "c1", "nothing is rounded between two operators in float32"


def test_what_comes_before_the_first_weights_and_behind_the_last_is_not_rounded() -> None:
    """Pixels are numbers of 0 to 255 as they come; probabilities in steps of 1/256 say little."""
    proto = network()
    graph = proto.graph
    graph.node[0].input[0], graph.node[-1].output[0] = "scaled", "scores"
    graph.node.insert(0, helper.make_node("Mul", ["pixels", "scale"], ["scaled"], "scale"))
    graph.node.insert(0, helper.make_node("Cast", ["x"], ["pixels"], "float", to=1))
    graph.node.append(helper.make_node("Softmax", ["scores"], ["y"], "softmax"))
    graph.initializer.append(numpy_helper.from_array(np.array(1 / 64, np.float32), "scale"))
    graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    pixels = np.random.default_rng(1).integers(0, 256, (20, *SHAPE)).astype(np.uint8)
    quantised, report = static_int8(proto, Sample([[row[None]] for row in pixels], (OUTPUT,)))
    assert [line.bits for line in report] == [8, 8, 8]
    made_by = {name: node for node in quantised.graph.node for name in node.output}
    by_name = {node.name: node for node in quantised.graph.node}
    assert made_by[by_name["scale"].input[0]] is by_name["float"]
    rounded = made_by[by_name["conv1"].input[0]]
    assert made_by[rounded.input[0]].input[0] == "scaled", "once, where the first weights read it"
    assert made_by[by_name["softmax"].input[0]] is by_name["classes"]
    assert by_name["softmax"].output[0] == "y"
    assert by_name["pool"].input[0] != "r2", "what lies between is in int8"


def test_scores_are_not_rounded_and_what_int8_reads_is() -> None:
    """Scores from -25 to 28 would be .2 apart."""
    proto, x = network(), images(60, 2)
    quantised, _ = static_int8(proto, sample())
    made_by = {name: node for node in quantised.graph.node for name in node.output}
    last = next(node for node in quantised.graph.node if node.name == "classes")
    assert [made_by[name].op_type for name in last.input] == ["DequantizeLinear"] * 2
    assert len(np.unique(run(quantised, x))) > 256, "a byte has no more"
    kinds = {node.op_type for node in optimise(quantised, level="all").graph.node}
    assert "MatMulIntegerToFloat" in kinds
    assert not kinds & {"DequantizeLinear", "MatMul"}


def test_what_is_part_of_a_range_stays_part_of_it() -> None:
    """The quantiser leaves out a Relu where the range of what it gives begins at 0."""
    x = np.random.default_rng(1).standard_normal((40, 8)).astype(np.float32)
    spec = TensorSpec(name="y", datatype="FP32", shape=("batch", 4), batch_axis=0)
    seen = Sample([[row[None]] for row in x], (spec,))
    quantised, report = static_int8(plain(), seen, keep=["second"])
    assert [line.bits for line in report] == [8, 32]
    assert distance(run(quantised, x), run(plain(), x)) < 0.05


def test_a_table_before_the_first_weights_is_in_int8() -> None:
    proto, shape = network(), np.array([-1, *SHAPE])
    size = int(np.prod(SHAPE))
    table = np.random.default_rng(0).standard_normal((50, size)).astype(np.float32)
    proto.graph.node[0].input[0] = "image"
    proto.graph.node.insert(0, helper.make_node("Reshape", ["found", "shape"], ["image"], "shaped"))
    proto.graph.node.insert(0, helper.make_node("Gather", ["table", "x"], ["found"], "look"))
    for name, array in (("table", table), ("shape", shape)):
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    proto.graph.input[0].CopyFrom(value("x", ["batch"], onnx.TensorProto.INT64))
    rows = [[np.array([i], np.int64)] for i in range(20)]
    quantised, _ = static_int8(proto, Sample(rows, (OUTPUT,)))
    kinds = {t.name: t.data_type for t in quantised.graph.initializer if t.dims[:1] == [50]}
    assert set(kinds.values()) <= {onnx.TensorProto.UINT8, onnx.TensorProto.INT8}, kinds


def test_ranges_that_were_found_are_used_again() -> None:
    ranges = bytearray()
    first, _ = static_int8(network(), sample(), ranges=ranges)
    assert ranges
    again, _ = static_int8(network(), sample(1), ranges=ranges)
    assert again.SerializeToString() == first.SerializeToString()


def test_harm_is_what_int8_of_one_operator_does_to_the_output() -> None:
    """Of each measured by itself in the quantised graph, all others in float32."""
    proto, rows = network(), sample(8)
    whole, _ = static_int8(proto, rows)
    found = harms(proto, whole, rows)
    assert list(found) == ["conv1", "conv2", "classes"]
    right = [run(proto, row[0]) for row in rows.rows]
    for name, harm in found.items():
        alone, _ = static_int8(proto, rows, keep=set(found) - {name})
        gaps = [
            np.abs(run(alone, row[0]) - own).max()
            for row, own in zip(rows.rows, right, strict=True)
        ]
        assert harm == pytest.approx(np.mean(np.square(gaps)), rel=0.5), name


def test_the_more_harm_is_kept_out_the_closer_the_form_is() -> None:
    proto, x = network(), images(40, 2)
    forms = StaticForms(sample(), 1)
    right, far, kept = run(proto, x), [], []
    for share in (0.0, 0.3, 0.9):
        made, report = forms.build(proto, share=share)
        far.append(distance(run(made, x), right))
        kept.append(sum(line.bits == 32 for line in report))
        assert sum(line.harm for line in report) == pytest.approx(1)
    assert far[0] > far[1] >= far[2]
    assert kept == [0, 1, 2]
    with pytest.raises(NothingToQuantize, match="a form that was made before"):
        forms.build(proto, share=0.85)


def test_the_first_convolutions_of_few_channels_may_stay_in_float32() -> None:
    proto = network()
    random = np.random.default_rng(4)
    weights = random.standard_normal((3, 1, 3, 3)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weights, "deep"))
    by_channel = helper.make_node("Conv", ["x", "deep"], ["x0"], "conv0", group=3, pads=[1] * 4)
    proto.graph.node.insert(0, by_channel)
    proto.graph.node[1].input[0] = "x0"
    forms, x = StaticForms(sample(), 1), images(40, 2)
    made, report = forms.build(proto, share=0, inner=True)
    slow = [line.node for line in report if line.why == "int8 is no faster here"]
    assert slow == ["conv0", "conv1"]
    assert [line.bits for line in report] == [32, 32, 8, 8]
    whole, _ = forms.build(proto, share=0)
    right = run(proto, x)
    assert distance(run(made, x), right) < distance(run(whole, x), right)
    assert sum(line.harm for line in report) == pytest.approx(1), "of all, as if all were in int8"
    _, report = forms.build(proto, share=0.3, inner=True)
    assert [line.bits for line in report] == [32, 32, 8, 32], "and what does most for its work"
    with pytest.raises(NothingToQuantize, match="a form that was made before"):
        forms.build(proto, share=0.01, inner=True)


def silu() -> onnx.ModelProto:
    """Return the network with SiLU in place of its first Relu."""
    proto = network()
    proto.graph.node[1].op_type, proto.graph.node[1].output[0] = "Sigmoid", "curve"
    proto.graph.node.insert(2, helper.make_node("Mul", ["curve", "c1"], ["r1"], "silu"))
    return proto


def test_a_number_times_a_curve_of_it_is_one_operator_of_float32() -> None:
    proto, x = silu(), images(40, 2)
    made, _ = static_int8(proto, sample())
    kinds = Counter(node.op_type for node in optimise(made, level="all").graph.node)
    assert kinds["QLinearConv"] == 2
    assert kinds["QuickGelu"] == 1
    assert not {"Sigmoid", "QLinearSigmoid", "Mul", "QLinearMul"} & kinds.keys()
    assert 0 < distance(run(made, x), run(proto, x)) < 0.1


def test_a_curve_that_others_read_too_stays_one() -> None:
    proto, x = silu(), images(40, 2)
    proto.graph.node.insert(3, helper.make_node("Add", ["r1", "curve"], ["both"], "again"))
    proto.graph.node[4].input[0] = "both"
    made, _ = static_int8(proto, sample())
    kinds = Counter(node.op_type for node in optimise(made, level="all").graph.node)
    assert not kinds["QuickGelu"]
    assert 0 < distance(run(made, x), run(proto, x)) < 0.1


def test_what_stays_in_float32_shares_no_constant_with_what_does_not() -> None:
    proto = network()
    nought = numpy_helper.from_array(np.zeros(16, np.float32), "nought")
    proto.graph.initializer.append(nought)
    proto.graph.initializer[1].CopyFrom(
        numpy_helper.from_array(
            np.random.default_rng(5).standard_normal((16, 16, 3, 3)).astype(np.float32) / 9,
            "second",
        )
    )
    proto.graph.initializer[2].CopyFrom(
        numpy_helper.from_array(np.ones((16, 10), np.float32), "last")
    )
    for node in proto.graph.node:
        if node.op_type == "Conv":
            node.input.append("nought")
    made, _ = static_int8(proto, sample(), keep={"conv1"})
    known = {tensor.name for tensor in made.graph.initializer}
    own = next(node for node in made.graph.node if node.name == "conv1")
    assert known.issuperset(own.input[1:]), "and none is computed from integers"
    assert [node.op_type for node in optimise(made, level="all").graph.node].count("Conv") == 1
    assert 0 < distance(run(made, images(9, 2)), run(proto, images(9, 2))) < 0.1


def test_where_the_first_operator_reads_many_channels_nothing_stays_for_being_slow() -> None:
    proto = network()
    proto.graph.node.remove(proto.graph.node[0])
    proto.graph.input[0].CopyFrom(value("c1", ["batch", 16, 16, 16]))
    rows = np.random.default_rng(1).standard_normal((20, 1, 16, 16, 16)).astype(np.float32)
    forms = StaticForms(Sample([[row] for row in rows], (OUTPUT,)), 1)
    with pytest.raises(NothingToQuantize, match="a form that was made before"):
        forms.build(proto, share=0, inner=True)
    assert any(line.bits == 32 for line in forms.build(proto, share=0.5, inner=True)[1])


def test_operators_of_one_name_are_told_apart() -> None:
    proto = network()
    proto.graph.node[2].name = proto.graph.node[0].name
    made, report = StaticForms(sample(), 1).build(proto, share=0.5)
    assert len({line.node for line in report}) == 3
    assert distance(run(made, images(20, 3)), run(network(), images(20, 3))) < 0.2


def test_work_of_a_matrix_at_every_place_is_that_of_all_places() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "each")]
    weights = [numpy_helper.from_array(np.zeros((8, 5), np.float32), "w")]
    ends = [value("x", ["batch", 7, 8])], [value("y", ["batch", 7, 5])]
    assert work(model(nodes, *ends, weights)) == {"each": 7 * 8 * 5}


def test_work_is_how_often_a_weight_is_used() -> None:
    assert work(network()) == {"conv1": 16 * 27 * 256, "conv2": 32 * 144 * 256, "classes": 320}


def test_operators_without_names_are_told_apart() -> None:
    proto, x = network(), images(8, 2)
    for node in proto.graph.node:
        node.ClearField("name")
    quantised, report = static_int8(proto, sample(), keep=["lrai:0", "lrai:6"])
    assert [line.bits for line in report] == [32, 8, 32]
    assert 0 < distance(run(quantised, x), run(proto, x)) < 0.06


def test_the_model_is_not_changed_and_nothing_is_said(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    proto = network()
    before = proto.SerializeToString()
    with caplog.at_level(logging.WARNING):
        static_int8(proto, sample())
    assert proto.SerializeToString() == before
    assert capsys.readouterr() == ("", "")
    assert not caplog.records


def plain() -> onnx.ModelProto:
    """Return two layers whose first output is theirs, and whose second is integers."""
    random = np.random.default_rng(0)
    weights = {"w": random.standard_normal((8, 32)) / 3, "v": random.standard_normal((32, 4)) / 5}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "v"], ["y"], "second"),
        helper.make_node("ArgMax", ["y"], ["label"], "best", axis=1, keepdims=0),
    ]
    outputs = [value("y", ["batch", 4]), value("label", ["batch"], onnx.TensorProto.INT64)]
    constants = [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()]
    return model(nodes, [value("x", ["batch", 8])], outputs, constants)


@pytest.mark.parametrize("kind", ["Gemm", "Conv"])
@pytest.mark.parametrize(
    ("low", "high"), [(0.05, None), (-0.4, 0.4), (None, -0.05), (None, 0.5)], ids=str
)
def test_an_answer_keeps_the_bounds_that_no_range_ends_at(
    kind: str, low: float | None, high: float | None
) -> None:
    random = np.random.default_rng(0)
    bounds = {"low": low, "high": high}
    given = ["" if bounds[name] is None else name for name in bounds]
    shape = {"Gemm": (8, 4), "Conv": (4, 8, 1, 1)}[kind]
    nodes = [
        helper.make_node(kind, ["x", "w"], ["h"], "layer"),
        helper.make_node("Clip", ["h", *given], ["y"], "bounded"),
    ]
    arrays = {"w": random.standard_normal(shape) / 5} | {n: b for n, b in bounds.items() if b}
    weights = [numpy_helper.from_array(np.array(a, np.float32), n) for n, a in arrays.items()]
    places = [1, 1] if kind == "Conv" else []
    ends = [value("x", ["batch", 8, *places])], [value("y", ["batch", 4, *places])]
    x = random.standard_normal((40, 8, *places)).astype(np.float32)
    spec = TensorSpec(name="y", datatype="FP32", shape=("batch", 4, *places), batch_axis=0)
    proto = model(nodes, *ends, weights)
    made, report = static_int8(proto, Sample([[row[None]] for row in x], (spec,)))
    assert [line.bits for line in report] == [8]
    for quantised in (made, signed(made, ["y"])):
        found = run(quantised, 9 * x)
        assert low is None or found.min() == np.float32(low)
        assert high is None or found.max() == np.float32(high)
        assert distance(run(quantised, x), run(proto, x)) < 0.1


def test_a_bound_at_0_is_the_end_of_a_range() -> None:
    proto = network()
    for node in proto.graph.node:
        if node.op_type == "Relu":
            node.op_type = "Clip"
            node.input.append("nought")
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "nought"))
    quantised, _ = static_int8(proto, sample())
    assert "Clip" not in {node.op_type for node in quantised.graph.node}


@pytest.mark.parametrize("kind", ["Relu", "Clip"])
@pytest.mark.parametrize("seen", ["r1", "c1"])
def test_what_a_body_reads_is_what_it_was(kind: str, seen: str) -> None:
    """The quantiser leaves out a Relu by who reads it, and knows of readers in the graph alone."""
    proto, x = network(), images(20, 2)
    for node in [node for node in proto.graph.node if node.op_type == "Relu"]:
        node.op_type = kind
        node.input.extend(["nought"] if kind == "Clip" else [])
    if kind == "Clip":
        proto.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "nought"))
    bodies = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("ReduceMin", [seen], [name], name, axes=[1, 2, 3], keepdims=0)],
            name, [], [value(name, ["batch"])],
        )
        for name in ("then", "else")
    }  # fmt: skip
    proto.graph.node.append(helper.make_node("ReduceMax", ["x"], ["most"], "most", keepdims=0))
    proto.graph.node.append(helper.make_node("Cast", ["most"], ["on"], "on", to=TensorProto.BOOL))
    proto.graph.node.append(helper.make_node("If", ["on"], ["least"], "if", **bodies))
    proto.graph.output.append(value("least", ["batch"]))
    least = TensorSpec(name="least", datatype="FP32", shape=("batch",), batch_axis=0)
    made, report = static_int8(proto, Sample(sample().rows, (OUTPUT, least)), guard=frozenset())
    assert {line.bits for line in report} == {8}
    right, found = (
        ort.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, {"x": x}
        )
        for one in (proto, made)
    )
    assert distance(found[0], right[0]) < 0.06
    assert np.abs(found[1] - right[1]).max() < 0.1
    kinds = Counter(node.op_type for node in optimise(made, level="all").graph.node)
    assert kinds["QLinearConv"] == 1 + (seen == "r1"), "one that gives float32 is none"


@pytest.mark.parametrize("columns", [True, False])
def test_plain_layers_are_quantised_too(columns: bool) -> None:
    x = np.random.default_rng(1).standard_normal((40, 8)).astype(np.float32)
    specs = (
        TensorSpec(name="y", datatype="FP32", shape=("batch", 4), batch_axis=0),
        TensorSpec(name="label", datatype="INT64", shape=("batch",), batch_axis=0),
    )
    forms = StaticForms(Sample([[row[None]] for row in x], specs), 1)
    quantised, report = forms.build(plain(), share=0, columns=columns)
    assert [line.scheme for line in report] == ["static_int8"] * 2
    assert sum(line.harm for line in report) == pytest.approx(1)
    sizes = {t.name: numpy_helper.to_array(t).size for t in quantised.graph.initializer}
    scales = {n.input[1] for n in quantised.graph.node if n.op_type == "DequantizeLinear"}
    assert {sizes[name] for name in scales} == ({1, 32, 4} if columns else {1})
    assert 0 < distance(run(quantised, x), run(plain(), x)) < 0.1
    x[3, 5] = np.nan
    assert np.isnan(run(quantised, x)).all(axis=1).tolist() == [i == 3 for i in range(40)]


def test_beside_convolutions_every_channel_has_its_scale() -> None:
    with pytest.raises(NothingToQuantize, match="beside convolutions"):
        StaticForms(sample(), 1).build(network(), share=0, columns=False)


@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("shape", [(1, 4), (1, 1), (1,), ()], ids=str)
def test_a_bias_of_one_row_or_number_is_a_bias(shape: tuple[int, ...], turned: int) -> None:
    """Which scikit-learn's converter writes, and the quantiser would give a scale per column."""
    random = np.random.default_rng(0)
    parts = {"w": random.standard_normal((4, 8) if turned else (8, 4))}
    parts["b"] = random.standard_normal(shape) + np.float64(1)
    weights = [
        numpy_helper.from_array(np.asarray(part, np.float32), name) for name, part in parts.items()
    ]
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "layer", transB=turned)]
    proto = model(nodes, [value("x", ["batch", 8])], [value("y", ["batch", 4])], weights)
    x = random.standard_normal((40, 8)).astype(np.float32)
    spec = TensorSpec(name="y", datatype="FP32", shape=("batch", 4), batch_axis=0)
    made, report = static_int8(proto, Sample([[row[None]] for row in x], (spec,)))
    assert [line.scheme for line in report] == ["static_int8"]
    assert 0 < distance(run(made, x), run(proto, x)) < 0.05


@pytest.mark.parametrize("turned", ["Gemm", "ConvTranspose"])
def test_weights_that_are_read_along_both_axes_have_a_scale_per_output_of_each(turned: str) -> None:
    """As of an autoencoder whose halves share them."""
    random, place = np.random.default_rng(0), [3, 3] * (turned == "ConvTranspose")
    tied = (random.standard_normal((6, 4, *place)) / 3).astype(np.float32)
    turn: dict[str, Any] = {} if place else {"transB": 1}
    first, second = ("Conv", turned) if place else (turned, "MatMul")
    nodes = [
        helper.make_node(first, ["x", "tied"], ["h"], "encoder", **turn),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node(second, ["r", "tied"], ["y"], "decoder"),
    ]
    shape = [4, *(8 for _ in place)]
    ends = [value("x", ["batch", *shape])], [value("y", ["batch", *shape])]
    proto = model(nodes, *ends, [numpy_helper.from_array(tied, "tied")])
    x = random.standard_normal((40, *shape)).astype(np.float32)
    spec = TensorSpec(name="y", datatype="FP32", shape=("batch", *shape), batch_axis=0)
    made, report = static_int8(proto, Sample([[row[None]] for row in x], (spec,)))
    assert [line.weight_elements for line in report] == [tied.size] * 2
    assert 0 < distance(run(made, x), run(proto, x)) < 0.05
    makers = {name: node for node in made.graph.node for name in node.output}
    sizes = {tensor.name: list(tensor.dims) for tensor in made.graph.initializer}
    scales = [
        sizes[makers[node.input[1]].input[1]]
        for node in made.graph.node
        if node.name in ("encoder", "decoder")
    ]
    assert scales == [[6], [4]]


def test_a_bias_beside_weights_that_are_int8_already_is_one() -> None:
    random = np.random.default_rng(0)
    arrays: dict[str, Array] = {
        "wq": random.integers(-127, 127, (8, 4)).astype(np.int8),
        "ws": np.full(4, 0.01, np.float32),
        "b": random.standard_normal((1, 4)).astype(np.float32),
        "v": random.standard_normal((4, 4)).astype(np.float32),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["wq", "ws"], ["w"], "weights", axis=1),
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], "first"),
        helper.make_node("MatMul", ["h", "v"], ["y"], "second"),
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    proto = model(nodes, [value("x", ["batch", 8])], [value("y", ["batch", 4])], weights)
    x = random.standard_normal((40, 8)).astype(np.float32)
    spec = TensorSpec(name="y", datatype="FP32", shape=("batch", 4), batch_axis=0)
    made, report = static_int8(proto, Sample([[row[None]] for row in x], (spec,)))
    assert [line.bits for line in report] == [32, 8]
    assert 0 < distance(run(made, x), run(proto, x)) < 0.05


def test_an_operator_named_like_its_output_is_quantised() -> None:
    proto = network()
    proto.graph.node[-1].name = proto.graph.output[0].name
    x = np.random.default_rng(1).standard_normal((4, *SHAPE)).astype(np.float32)
    quantised, _ = static_int8(proto, sample())
    assert distance(run(quantised, x), run(proto, x)) < 0.1


def test_what_multiplies_activations_has_other_forms() -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"], "scores"),
    ]
    attention = model(nodes, [value("x", ["batch", 8])], [value("y", ["batch", "batch"])])
    with pytest.raises(NothingToQuantize, match="multiplies activations"):
        static_int8(attention, sample())


@pytest.mark.parametrize("none", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_makes_none_and_costs_its_neighbours_nothing(none: float) -> None:
    """Integers would have one for it; float32 answers infinity with NaN here too."""
    quantised, _ = static_int8(network(), sample())
    x = images(3, 5)
    right = run(quantised, x)
    x[1, 0, 3, 4] = none
    own = run(quantised, x)
    assert np.isnan(own[1]).all()
    assert np.array_equal(own[::2], right[::2])


@pytest.mark.parametrize(
    ("declared", "shape"),
    [
        (["batch", 128], (3, 128)),
        (["batch", 14_000], (3, 14_000)),
        (["batch", "width"], (3, 40)),
        (["batch", "steps", 6], (3, 7, 6)),
        (["batch", "steps", 200], (3, 7, 200)),
        (["batch", "height", "width", 3], (3, 4, 5, 3)),
        (["batch", 4, 5, 3], (3, 4, 5, 3)),
        (["batch", 3, 80, 60], (3, 3, 80, 60)),
        (["batch", "channels", 8, "width"], (3, 3, 8, 6)),
    ],
    ids=str,
)
@pytest.mark.parametrize("none", [np.nan, -np.inf])
def test_inputs_of_any_shape_keep_what_is_no_number(
    declared: list[str | int], shape: tuple[int, ...], none: float
) -> None:
    weight = np.random.default_rng(0).standard_normal((1, 5)).astype(np.float32)
    inner = list(range(1, len(shape)))
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], "mean", axes=inner, keepdims=0),
        helper.make_node("Reshape", ["m", "rows"], ["r"], "reshape"),
        helper.make_node("MatMul", ["r", "w"], ["y"], "classes"),
    ]
    constants = [
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(np.array([-1, 1]), "rows"),
    ]
    proto = model(nodes, [value("x", declared)], [value("y", ["batch", 5])], constants)
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    spec = TensorSpec(name="y", datatype="FP32", shape=("batch", 5), batch_axis=0)
    quantised, _ = static_int8(proto, Sample([[row[None]] for row in x], (spec,)))
    right = run(quantised, x)
    assert distance(right, run(proto, x)) < 0.1
    x[(1, *np.array(shape[1:]) - 1)] = none
    own = run(quantised, x)
    assert np.isnan(own[1]).all()
    assert np.array_equal(own[::2], right[::2])


def test_outputs_of_few_and_of_many_columns_both_keep_what_is_no_number() -> None:
    """And an input of 28 numbers beside an image of 28 lines."""
    random = np.random.default_rng(0)
    weights = {"few": (28, 10), "many": (28, 128), "side": (28, 10)}
    constants = [
        numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)
        for name, shape in weights.items()
    ]
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], "mean", axes=[1], keepdims=0),
        helper.make_node("MatMul", ["m", "few"], ["f"], "first"),
        helper.make_node("MatMul", ["m", "many"], ["b"], "second"),
        helper.make_node("MatMul", ["n", "side"], ["s"], "third"),
        helper.make_node("Add", ["f", "s"], ["a"], "both"),
    ]
    inputs = [value("x", ["batch", 28, 28]), value("n", ["batch", 28])]
    outputs = [value("a", ["batch", 10]), value("b", ["batch", 128])]
    proto = model(nodes, inputs, outputs, constants)
    x = random.standard_normal((3, 28, 28)).astype(np.float32)
    n = random.standard_normal((3, 28)).astype(np.float32)
    specs = [
        TensorSpec(name=name, datatype="FP32", shape=("batch", width), batch_axis=0)
        for name, width in (("a", 10), ("b", 128))
    ]
    rows = [[x[i : i + 1], n[i : i + 1]] for i in range(3)]
    of = Sample(rows, specs)
    quantised, _ = static_int8(proto, of, guard=goes_undefined(proto, of))
    ready = optimise(quantised, level="all").SerializeToString()
    session = ort.InferenceSession(ready, providers=["CPUExecutionProvider"])
    x[1, 27, 27] = np.nan
    n[2, 0] = np.inf
    a, b = session.run(["a", "b"], {"x": x, "n": n})
    assert np.isnan(a).all(axis=1).tolist() == [False, True, True]
    assert np.isnan(b).all(axis=1).tolist() == [False, True, False]
    assert np.isfinite(b[2]).all()


def test_large_numbers_are_numbers() -> None:
    """What they add up to is none."""
    quantised, _ = static_int8(network(), sample())
    assert np.isfinite(run(quantised, np.full((2, *SHAPE), 3e38, np.float32))).all()


def test_without_a_batch_axis_all_is_no_number() -> None:
    whole = TensorSpec(name="y", datatype="FP32", shape=("batch", 10))
    quantised, _ = static_int8(network(), Sample(sample().rows, (whole,)))
    x = images(2, 5)
    assert np.isfinite(run(quantised, x)).all()
    x[1, 0, 3, 4] = np.nan
    assert np.isnan(run(quantised, x)).all()


@pytest.mark.parametrize("count", [1, 16, 33, 128])
def test_every_row_of_the_sample_tells_of_the_activations(count: int) -> None:
    """The first row is the largest: without it the others' answers saturate."""
    rows = [[row[None]] for row in images(count, 1)]
    rows[0][0] *= 8
    quantised, _ = static_int8(network(), Sample(rows, (OUTPUT,)))
    right, own = run(network(), rows[0][0]), run(quantised, rows[0][0])
    assert distance(own, right) < 0.1


def test_rows_that_take_long_are_as_many_as_the_time_allows_and_one_in_any_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone, _ = static_int8(network(), sample(1))
    monkeypatch.setattr("lrai_engines.static._LONGEST", 0.0)
    made, _ = static_int8(network(), sample(20))
    assert made.SerializeToString() == alone.SerializeToString()


@pytest.mark.parametrize("isa", [isa_class(), "avx2"])
def test_weights_that_are_int8_already_may_have_no_zero_point(
    monkeypatch: pytest.MonkeyPatch, isa: str
) -> None:
    """Of 8 bits they are: without VNNI what they multiply stays in float32, lest it saturate."""
    monkeypatch.setattr("lrai_engines.static.isa_class", lambda: isa)
    random = np.random.default_rng(0)
    integers = random.integers(-127, 127, (8, 3, 3, 3)).astype(np.int8)
    constants: dict[str, Array] = {"wq": integers, "ws": np.full(8, 0.01, np.float32)}
    constants["last"] = random.standard_normal((8, 10)).astype(np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["wq", "ws"], ["w"], "weights", axis=0),
        helper.make_node("Conv", ["x", "w"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("MatMul", ["f", "last"], ["y"], "classes"),
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    proto = model(nodes, [value("x", ["batch", *SHAPE])], [value("y", ["batch", 10])], weights)
    quantised, report = static_int8(proto, sample())
    assert {line.node: line.bits for line in report} == {"conv": 32, "classes": 8}
    (conv,) = (node for node in quantised.graph.node if node.name == "conv")
    assert (conv.input[0] == "x") is (isa in SATURATING)
    assert distance(run(quantised, images(4, 3)), run(proto, images(4, 3))) < 0.1


@pytest.mark.parametrize("between", ["Split", "Pad", "Relu"])
def test_what_is_quantised_already_is_left_alone(between: str) -> None:
    """For the range of a part of what has one already the quantiser would wait for ever."""
    plain = network()
    plain.graph.node[-1].op_type = "Gemm"  # a MatMul would be taken for attention
    proto, _ = static_int8(plain, sample())
    graph = proto.graph
    place = next(i for i, node in enumerate(graph.node) if node.name == "conv2")
    given = [graph.node[place].input[0], *{"Split": ["halves"], "Pad": ["edges"]}.get(between, [])]
    outputs = ["part", "rest"] if between == "Split" else ["part"]
    node = helper.make_node(between, given, outputs, "between")
    if between == "Split":
        node.attribute.append(helper.make_attribute("axis", 2))
    graph.node.insert(place, node)
    edges = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    graph.initializer.append(numpy_helper.from_array(np.array([8, 8]), "halves"))
    graph.initializer.append(numpy_helper.from_array(edges, "edges"))
    graph.node[place + 1].input[0] = "part"
    with pytest.raises(NothingToQuantize, match="it is quantised already"):
        static_int8(proto, sample())


def test_an_operator_may_be_named_like_what_it_gives() -> None:
    proto = network()
    for node in proto.graph.node:
        node.name = node.output[0]
    whole, _ = static_int8(proto, sample())
    found = harms(proto, whole, sample())
    assert set(found) == {"c1", "c2", "y"}
    assert min(found.values()) > 0


def test_ranges_about_zero_need_no_zero_point() -> None:
    """Those of what a Relu gives begin at 0, and keep theirs; the answers stay as close."""
    made, _ = static_int8(network(), sample())
    before = made.SerializeToString()
    found = signed(made)
    assert made.SerializeToString() == before
    points = {t.name: t for t in found.graph.initializer}
    kinds = Counter(
        (points[node.input[2]].data_type, int(numpy_helper.to_array(points[node.input[2]])))
        for node in found.graph.node
        if node.op_type == "QuantizeLinear"
    )
    assert kinds.keys() >= {(TensorProto.INT8, 0), (TensorProto.UINT8, 0)}
    x = images(8, 5)
    right, old, new = (run(proto, x) for proto in (network(), made, found))
    assert np.linalg.norm(new - right) < 1.5 * np.linalg.norm(old - right)


@pytest.mark.parametrize(
    "kind", ["clipped", "last", "shared", "integers", "output", "computed", "none"]
)
def test_what_more_depends_on_keeps_its_zero_point(kind: str) -> None:
    """Of what the quantiser found already, or of a range that does what an operator did."""
    pair = [numpy_helper.from_array(np.array(0.1, np.float32), "scale"),
            numpy_helper.from_array(np.array(120, np.uint8), "point")]  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "point"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "point"], ["y"]),
    ]
    ends = [value("x", ["batch", 4])], [value("y", ["batch", 4])]
    if kind == "clipped":  # of what an output gives the range ends where it does, anyway
        nodes[1].output[0] = "rounded"
        nodes.append(helper.make_node("Identity", ["rounded"], ["y"]))
    elif kind == "shared":
        nodes.append(helper.make_node("Cast", ["point"], ["other"], to=TensorProto.FLOAT))
        ends[1].append(value("other", []))
    elif kind == "integers":
        nodes.append(helper.make_node("Cast", ["q"], ["other"], to=TensorProto.FLOAT))
        ends[1].append(value("other", ["batch", 4]))
    elif kind == "output":
        ends[1].append(value("q", ["batch", 4], TensorProto.UINT8))
    elif kind == "computed":
        nodes.insert(0, helper.make_node("Identity", ["point"], ["same"]))
        nodes[1].input[2] = nodes[2].input[2] = "same"
    elif kind == "none":
        for node in nodes:
            del node.input[2]
    proto = model(nodes, *ends, pair if kind != "none" else pair[:1])
    clipped = {"clipped": ["x"], "last": ["y"]}  # the quantiser gives an output's name to the end
    assert signed(proto, clipped.get(kind, [])) == proto
    x = np.linspace(-12, 13, 8, dtype=np.float32).reshape(2, 4)
    if kind == "clipped":
        changed = signed(proto)
        assert changed != proto
        assert np.abs(run(changed, x) - run(proto, x)).max() < 1.5


def test_where_all_is_kept_nothing_is_left() -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], "only")]
    weight = numpy_helper.from_array(np.ones((2, 3, 1, 1), np.float32), "w")
    inputs, outputs = [value("x", ["batch", *SHAPE])], [value("y", ["batch", 2, 16, 16])]
    with pytest.raises(NothingToQuantize, match="no operator is left"):
        static_int8(model(nodes, inputs, outputs, [weight]), sample(), keep=["only"])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no row to see activations of"),
        ([[np.full((1, *SHAPE), np.nan, np.float32)]], "no row to see activations of"),
        ([[np.zeros((1, 4, 16, 16), np.float32)]], "onnxruntime cannot quantise the model: "),
        ([[np.zeros((1, *SHAPE), np.float64)]], "onnxruntime cannot quantise the model: "),
    ],
)
def test_a_sample_of_no_use_is_a_reason_not_a_crash(rows: list[list[Array]], said: str) -> None:
    with pytest.raises(CompileError, match=said) as caught:
        static_int8(network(), Sample(rows, (OUTPUT,)))
    assert "/" not in str(caught.value)


def test_a_row_that_is_not_finite_tells_nothing() -> None:
    rows = sample()
    odd = Sample([[np.full((1, *SHAPE), np.inf, np.float32)], *rows.rows], (OUTPUT,))
    x = images(4, 4)
    found, right = (run(static_int8(network(), given)[0], x) for given in (odd, rows))
    np.testing.assert_array_equal(found, right)


def test_a_constant_sample_does_not_divide_by_nothing() -> None:
    rows = [[np.zeros((1, *SHAPE), np.float32)] for _ in range(3)]
    quantised, _ = static_int8(network(), Sample(rows, (OUTPUT,)))
    assert np.isfinite(run(quantised, images(4, 3))).all()


@pytest.mark.parametrize("kind", ["Slice", "Gather"])
def test_a_number_stays_one_where_int8_would_have_none(kind: str) -> None:
    """Of columns that nobody reads."""
    random = np.random.default_rng(0)
    arrays: dict[str, Array] = {
        "w": random.standard_normal((4, 6)).astype(np.float32),
        "start": np.array([0]),
        "end": np.array([4]),
        "axis": np.array([1]),
        "columns": np.array([0, 2, 4, 7]),
    }
    first = {
        "Slice": helper.make_node("Slice", ["x", "start", "end", "axis"], ["h"], "first"),
        "Gather": helper.make_node("Gather", ["x", "columns"], ["h"], "first", axis=1),
    }[kind]
    nodes = [first, helper.make_node("Gemm", ["h", "w"], ["y"], "linear")]
    used = {name for node in nodes for name in node.input}
    weights = [numpy_helper.from_array(a, n) for n, a in arrays.items() if n in used]
    proto = model(nodes, [value("x", ["batch", 8])], [value("y", ["batch", 6])], weights)
    x = random.standard_normal((20, 8)).astype(np.float32)
    output = TensorSpec(name="y", datatype="FP32", shape=("batch", 6), batch_axis=0)
    rows = Sample([[row[None]] for row in x], (output,))
    x[0, 5] = np.nan
    assert np.isfinite(run(proto, x[:1])).all()
    with pytest.raises(CompileError, match="int8 would not tell them apart"):
        goes_undefined(proto, Sample([[row[None]] for row in x[1:]], rows.outputs))


def test_of_very_many_columns_some_are_looked_at() -> None:
    """Of a sound all that is said is that it has some length; each place of it takes a run."""
    nodes = [
        helper.make_node("ReduceSum", ["x", "axis"], ["sum"], keepdims=1),
        helper.make_node("Gemm", ["sum", "w"], ["y"], "linear"),
    ]
    weights = [
        numpy_helper.from_array(np.ones((1, 4), np.float32), "w"),
        numpy_helper.from_array(np.array([1]), "axis"),
    ]
    spec = TensorSpec(name="y", datatype="FP32", shape=("batch", 4), batch_axis=0)
    rows = Sample([[np.zeros((1, 1 << 16), np.float32)]], (spec,))
    for width in ("samples", 1 << 16):
        ends = [value("x", ["batch", width])], [value("y", ["batch", 4])]
        assert goes_undefined(model(nodes, *ends, weights), rows) == {("x", "y")}


def attending() -> onnx.ModelProto:
    """Return image -> two convolutions, attention between their places, 10 classes, mean."""
    random = np.random.default_rng(0)
    weights: dict[str, Array] = {
        "first": random.standard_normal((32, 3, 3, 3)) / 5,
        "second": random.standard_normal((32, 32, 3, 3)) / 16,
        "qkv": random.standard_normal((32, 96)) / 5,
        "proj": random.standard_normal((32, 32)) / 5,
        "last": random.standard_normal((32, 10)) / 5,
        "root": np.array(32**-0.5),
        "even": np.linspace(0.5, 2, 32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "second"], ["c2"], "conv2", strides=[2, 2]),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("Reshape", ["r2", "places"], ["flat"], "flatten"),
        helper.make_node("Transpose", ["flat"], ["tokens"], "tokens", perm=[0, 2, 1]),
        helper.make_node("LayerNormalization", ["tokens", "even"], ["normed"], "norm"),
        helper.make_node("MatMul", ["normed", "qkv"], ["all"], "qkv"),
        helper.make_node("Split", ["all"], ["q", "k", "v"], "split", axis=2),
        helper.make_node("Transpose", ["k"], ["kt"], "keys", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["scores"], "scores"),
        helper.make_node("Mul", ["scores", "root"], ["scaled"], "scale"),
        helper.make_node("Softmax", ["scaled"], ["shares"], "softmax", axis=-1),
        helper.make_node("MatMul", ["shares", "v"], ["seen"], "mix"),
        helper.make_node("MatMul", ["seen", "proj"], ["out"], "proj"),
        helper.make_node("Add", ["out", "tokens"], ["both"], "residual"),
        helper.make_node("MatMul", ["both", "last"], ["each"], "classes"),
        helper.make_node("ReduceMean", ["each"], ["y"], "mean", axes=[1], keepdims=0),
    ]
    constants = [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()]
    constants.append(numpy_helper.from_array(np.array([0, 32, 49]), "places"))
    return model(nodes, [value("x", ["batch", *SHAPE])], [value("y", ["batch", 10])], constants)


def test_a_convolution_that_cuts_images_up_for_a_transformer_is_left_alone() -> None:
    """It is little of the work, and forms for it would take as long as those for all of it."""
    random = np.random.default_rng(0)
    weights = {"cut": (8, 3, 8, 8), "wide": (8, 4096), "back": (4096, 8), "last": (8, 10)}
    nodes = [
        helper.make_node("Conv", ["x", "cut"], ["c"], "cut", strides=[8, 8]),
        helper.make_node("Reshape", ["c", "places"], ["flat"], "flatten"),
        helper.make_node("Transpose", ["flat"], ["tokens"], "tokens", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["tokens", "wide"], ["h"], "wide"),
        helper.make_node("MatMul", ["h", "back"], ["q"], "back"),
        helper.make_node("MatMul", ["q", "flat"], ["scores"], "scores"),
        helper.make_node("MatMul", ["scores", "q"], ["seen"], "mix"),
        helper.make_node("ReduceMean", ["seen"], ["m"], "mean", axes=[1], keepdims=0),
        helper.make_node("MatMul", ["m", "last"], ["y"], "classes"),
    ]
    constants = [
        numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)
        for name, shape in weights.items()
    ]
    constants.append(numpy_helper.from_array(np.array([0, 8, 4]), "places"))
    ends = [value("x", ["batch", *SHAPE])], [value("y", ["batch", 10])]
    with pytest.raises(NothingToQuantize, match="multiplies activations"):
        static_int8(model(nodes, *ends, constants), sample())


PRODUCTS = ["qkv", "scores", "mix", "proj", "classes"]


def test_beside_attention_convolutions_are_quantised_and_it_is_left_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    proto, x = attending(), images(40, 2)
    quantised, report = static_int8(proto, sample())
    assert not caplog.records
    assert {line.node: line.bits for line in report} == {"conv1": 8, "conv2": 8} | dict.fromkeys(
        PRODUCTS, 32
    )
    made = {name: node.op_type for node in quantised.graph.node for name in node.output}
    by_name = {node.name: node for node in quantised.graph.node}
    assert made[by_name["softmax"].input[0]] == "Mul", "what attention computes is not rounded"
    assert by_name["norm"].input[1] == "even"
    assert by_name["qkv"].input[0] == "normed"
    assert made[by_name["mix"].input[0]] == "Softmax"
    right = run(proto, x)
    assert 0 < distance(run(quantised, x), right) < 0.03
    x[3, 0, 5, 5] = np.nan
    own = run(quantised, x)
    assert np.isnan(own[3]).all()
    assert np.isfinite(np.delete(own, 3, axis=0)).all()


def test_harms_of_convolutions_beside_attention_are_told() -> None:
    proto, x = attending(), images(40, 2)
    made, report = StaticForms(sample(), 1).build(proto, share=0.3)
    assert [line.node for line in report if line.bits == 8] in (["conv1"], ["conv2"])
    assert sum(line.harm for line in report) == pytest.approx(1)
    assert 0 < distance(run(made, x), run(proto, x)) < 0.02


def test_a_network_with_attention_has_int8_convolutions_that_pass_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By themselves, and with its matrices smoothed; what is no number stays that in both."""
    paces = {"fp32": 1.0, "int8-static": 2.0, "int8-smooth-static": 3.0}

    def profile(candidates: Sequence[search.Candidate], *_: object) -> None:
        for one in candidates:
            one.speedup = paces.get(one.form, 0.5)
            ms = 1 / one.speedup
            one.latency = [LatencyPoint(rows=1, length=0, median_ms=ms, spread_ms=0.0)]

    monkeypatch.setattr(search, "profile", profile)
    artifact = lrai.compile(
        save(attending(), tmp_path / "m.onnx"),
        out=tmp_path / "m.lrai",
        threads=1,
        evaluation={"x": images(300, 7)},
        output_map="l2_normalised",
        keep=3,
    )
    assert [variant.id for variant in artifact.variants] == [*reversed(paces)]
    x = images(8, 8)
    right = run(attending(), x)
    x[3, 0, 5, 5] = np.nan
    for variant in artifact.variants[:2]:
        graph, weights = artifact.file(variant.model), artifact.path / variant.weights
        kinds = Counter(n.op_type for n in onnx.load(graph, load_external_data=False).graph.node)
        assert kinds["QLinearConv"] == 2
        assert kinds["MatMulIntegerToFloat"] == (3 if "smooth" in variant.id else 0)
        assert not kinds["ReduceMax"], "no scale is found while it runs"
        (own,) = find_engine("onnxruntime").load(graph, weights=weights).run([x])
        assert np.isnan(own).all(axis=1).tolist() == [i == 3 for i in range(8)]
        assert 0 < distance(np.delete(own, 3, 0), np.delete(right, 3, 0)) < 0.05


def test_a_model_that_looks_for_what_is_no_number_does_so_in_int8_too() -> None:
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("IsNaN", ["x"], ["none"], "look"),
        helper.make_node("Where", ["none", "zero", "x"], ["known"], "fill"),
        helper.make_node("Gemm", ["known", "w"], ["y"], "linear"),
    ]
    weights = {"w": random.standard_normal((64, 32)), "zero": np.zeros(1)}
    constants = [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()]
    ends = [value("x", ["batch", 64])], [value("y", ["batch", 32])]
    proto = model(nodes, *ends, constants)
    rows = random.standard_normal((40, 64)).astype(np.float32)
    output = TensorSpec(name="y", datatype="FP32", shape=("batch", 32), batch_axis=0)
    forms = StaticForms(Sample([[row[None]] for row in rows], (output,)), 1)
    quantised, _ = forms.build(proto, share=0)
    rows[3, 7] = np.nan
    assert distance(run(quantised, rows), run(proto, rows)) < 0.05
    plain = model(nodes[2:], [value("known", ["batch", 64])], ends[1], constants[:1])
    forms = StaticForms(Sample([[row[None]] for row in rows[:3]], (output,)), 1)
    quantised, _ = forms.build(plain, share=0)
    session = ort.InferenceSession(quantised.SerializeToString())
    (found,) = session.run(None, {"known": rows})
    assert np.isnan(found[3]).all()
    assert np.isfinite(found[:3]).all()


def bounding(first: str, *between: int) -> onnx.ModelProto:
    """Return 16 numbers -> what `first` makes of them, two layers."""
    random = np.random.default_rng(0)
    weights = {"w": random.standard_normal((16, 32)) / 4, "v": random.standard_normal((32, 4)) / 5}
    if first == "Clip":
        weights |= {"low": np.array(-2.0), "high": np.array(2.0)}
    nodes = [
        helper.make_node(first, ["x", *([] if first != "Clip" else ["low", "high"])], ["k"], "k"),
        helper.make_node("MatMul", ["k", "w"], ["h"], "first"),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "v"], ["y"], "second"),
    ]
    constants = [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()]
    ends = [value("x", ["batch", *between, 16])], [value("y", ["batch", *between, 4])]
    return model(nodes, *ends, constants)


@pytest.mark.parametrize("between", [(), (3,)], ids=str)
@pytest.mark.parametrize(
    ("first", "signs"), [("Clip", "+-"), ("Tanh", "+-"), ("Relu", "-"), ("Neg", "")]
)
def test_infinity_to_which_float32_has_an_answer_has_one_in_int8(
    first: str, signs: str, between: tuple[int, ...]
) -> None:
    """Such a model bounds what it is given before the first weights read it; NaN it passes on."""
    proto, x = (
        bounding(first, *between),
        np.random.default_rng(1).standard_normal((40, *between, 16)),
    )
    x = (3 * x).astype(np.float32)
    spec = TensorSpec(name="y", datatype="FP32", shape=("batch", *between, 4), batch_axis=0)
    of = Sample([[row[None]] for row in x], (spec,))
    pairs = goes_undefined(proto, of)
    assert pairs == {("x", "y"), *(("x", "y", sign) for sign in signs)}
    made, _ = static_int8(proto, of, guard=pairs)
    rows = x[:6].copy()
    rows[1, ..., 3], rows[2, ..., 4], rows[3], rows[4] = np.inf, -np.inf, np.inf, -np.inf
    rows[5].flat[[2, 3]] = np.nan, np.inf
    own, right = run(made, rows), run(proto, rows)
    answered = [True, "+" in signs, "-" in signs, "+" in signs, "-" in signs, False]
    for row, (found, wanted) in enumerate(zip(own, right, strict=True)):
        assert np.isfinite(found).all() == answered[row]
        assert np.isnan(found).all() != answered[row]
        assert not answered[row] or np.abs(found - wanted).max() <= 0.2 * np.abs(wanted).max()


def test_infinity_that_weights_read_has_no_answer_in_int8_though_it_ends_as_a_number() -> None:
    """Integers would have one for it that is another: a sigmoid of it is 0 or 1."""
    proto = bounding("Neg")
    proto.graph.node[-1].output[0] = "scores"
    proto.graph.node.append(helper.make_node("Sigmoid", ["scores"], ["y"], "end"))
    x = np.random.default_rng(1).standard_normal((1, 16)).astype(np.float32)
    spec = TensorSpec(name="y", datatype="FP32", shape=("batch", 4), batch_axis=0)
    assert goes_undefined(proto, Sample([[x]], (spec,))) == {("x", "y")}
