"""Quantisation against onnxruntime in float32, numpy, and onnxruntime's own quantiser."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from lrai_core.compiler.search import Quantized, Sample
from lrai_core.engine.engine import isa_class
from lrai_core.errors import CompileError
from lrai_core.protocol import TensorSpec
from lrai_engines.blocks import matmul_nbits
from lrai_engines.fusion import optimise
from lrai_engines.mixed import mixed_int4
from lrai_engines.quantize import (
    Emit,
    NothingToQuantize,
    Smoothing,
    int8_per_row,
    int8_qdq,
    int8_static,
    rewrite,
    weights_int8,
)  # fmt: skip
from lrai_engines.undefined import goes_undefined, undefined_stays
from tests.core.compiler.onnx_files import sharing

Array = npt.NDArray[Any]
Scheme = Callable[[onnx.ModelProto], tuple[onnx.ModelProto, list[Quantized]]]

SATURATES = isa_class() in ("avx512", "avx2", "x86_64")  # so weights have 7 bits


def by_row(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[Quantized]]:
    return rewrite(model, int8_per_row)


PER_ROW: dict[str, Scheme] = {"per_row": by_row}
SCHEMES: dict[str, Scheme] = {
    **PER_ROW,
    "nbits_32": lambda model: matmul_nbits(model, block_size=32),
    "nbits_64": lambda model: matmul_nbits(model, block_size=64),
}


def graph(
    nodes: list[onnx.NodeProto], constants: dict[str, Array], x: tuple[Any, ...], opset: int = 17
) -> onnx.ModelProto:
    """Return a model from `x` of that shape to `y` of the same rank, both float32."""
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(x))],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )


def linear(matrix: Array, opset: int = 17) -> onnx.ModelProto:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "linear")
    return graph([node], {"w": matrix}, (None, matrix.shape[0]), opset)


def mlp(kind: str, opset: int = 17, seed: int = 0) -> onnx.ModelProto:
    """Return 48 -> 96 -> 10 with a ReLU; its layers are MatMul and Add, or Gemm (`transB` 0, 1)."""
    random = np.random.default_rng(seed)
    constants: dict[str, Array] = {}
    nodes = []
    value = "x"
    for index, (k, n) in enumerate([(48, 96), (96, 10)]):
        output, weight, bias = ("hidden", "y")[index], f"w{index}", f"b{index}"
        matrix = random.standard_normal((k, n)).astype(np.float32) / np.float32(k**0.5)
        constants[weight] = np.ascontiguousarray(matrix.T) if kind == "transposed" else matrix
        constants[bias] = random.standard_normal(n).astype(np.float32)
        if kind == "matmul":
            nodes.append(helper.make_node("MatMul", [value, weight], [f"m{index}"], f"fc{index}"))
            nodes.append(helper.make_node("Add", [f"m{index}", bias], [output]))
        else:
            transposed = int(kind == "transposed")
            nodes.append(
                helper.make_node(
                    "Gemm", [value, weight, bias], [output], f"fc{index}", transB=transposed
                )
            )
        if index == 0:
            nodes.append(helper.make_node("Relu", [output], ["active"]))
            value = "active"
    return graph(nodes, constants, (None, 48), opset)


def run(model: onnx.ModelProto, x: Array) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"x": x})[0])


def rows(count: int, columns: int, seed: int = 1) -> Array:
    """Return rows whose magnitudes differ by a factor of up to 1,000, float32."""
    random = np.random.default_rng(seed)
    scale = 10.0 ** random.uniform(-2, 1, (count, 1))
    return (random.standard_normal((count, columns)) * scale).astype(np.float32)


def relative_error(got: Array, wanted: Array) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("kind", ["matmul", "gemm", "transposed"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_stays_within_two_percent_of_float32(
    scheme: str, kind: str, opset: int
) -> None:
    model = mlp(kind, opset)
    x = np.random.default_rng(2).standard_normal((16, 48)).astype(np.float32)
    quantized, report = SCHEMES[scheme](model)
    onnx.checker.check_model(quantized)
    assert relative_error(run(optimise(quantized, level="all"), x), run(model, x)) < 0.02
    assert [line.node for line in report] == ["fc0", "fc1"]
    assert [line.weight_elements for line in report] == [48 * 96, 96 * 10]
    most = 0.02 if SATURATES and not scheme.startswith("nbits") else 0.01
    assert all(line.bits == 8 and 0 < line.error < most and not line.why for line in report)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_product_of_a_product_is_quantised_too(scheme: str) -> None:
    random = np.random.default_rng(4)
    weights = {name: random.standard_normal((8, 8)).astype(np.float32) for name in ("v", "w")}
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["p"], "first"),
        helper.make_node("MatMul", ["p", "w"], ["y"], "second"),
    ]
    model, x = graph(nodes, weights, (8, 8)), rows(8, 8)
    quantized, _ = SCHEMES[scheme](model)
    found = run(optimise(quantized, level="all"), x)
    assert relative_error(found, run(model, x)) < (0.04 if SATURATES else 0.02)


@pytest.mark.parametrize("kind", ["matmul", "gemm"])
@pytest.mark.parametrize("scheme", [*PER_ROW, "nbits_32", "nbits_64"])
def test_a_row_gets_the_same_bits_alone_and_among_others(scheme: str, kind: str) -> None:
    model = optimise(SCHEMES[scheme](mlp(kind))[0], level="all")
    x = rows(33, 48)
    batch = run(model, x)
    for size in (1, 2, 3, 8):
        assert np.array_equal(run(model, x[:size]), batch[:size])


@pytest.mark.parametrize("scheme", PER_ROW)
def test_activations_of_rank_three_are_quantised_by_their_last_axis(scheme: str) -> None:
    matrix = np.random.default_rng(0).standard_normal((24, 8)).astype(np.float32)
    flat = PER_ROW[scheme](linear(matrix))[0]
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "linear")
    deep = PER_ROW[scheme](graph([node], {"w": matrix}, (None, None, 24)))[0]
    x = rows(12, 24)
    assert np.array_equal(run(deep, x.reshape(3, 4, 24)).reshape(12, 8), run(flat, x))


@settings(deadline=None, max_examples=40)
@given(
    x=hnp.arrays(np.float32, (3, 8), elements=st.floats(-1e6, 1e6, width=32)),
    matrix=hnp.arrays(np.float32, (8, 5), elements=st.floats(-1e3, 1e3, width=32)),
    scheme=st.sampled_from(sorted(PER_ROW)),
)
def test_per_row_products_err_by_at_most_half_a_step_of_each_factor(
    x: Array, matrix: Array, scheme: str
) -> None:
    got = run(PER_ROW[scheme](linear(matrix))[0], x).astype(np.float64)
    exact, wide = x.astype(np.float64), matrix.astype(np.float64)
    x_step = np.abs(exact).max(axis=1, keepdims=True) / 127
    w_step = np.abs(wide).max(axis=0, keepdims=True) / (64 if SATURATES else 127)
    # |xw - x'w'| <= |x| |w - w'| + |x - x'| |w'|, each difference at most half a step
    restored = np.abs(wide) + w_step / 2
    bound = np.abs(exact).sum(axis=1, keepdims=True) * w_step / 2
    bound = bound + x_step / 2 * restored.sum(axis=0, keepdims=True)
    assert np.all(np.abs(got - exact @ wide) <= bound * 1.0001 + 1e-18)


@pytest.mark.parametrize(
    ("isa", "most"),  # of 64 two products with 255 are what int16 holds at most
    [
        *(("avx512", 64), ("avx2", 64), ("x86_64", 64)),
        *(("vnni", 127), ("amx", 127), ("avx-vnni", 127), ("neon-dot", 127)),
    ],
)
@pytest.mark.parametrize("scheme", ["row", "static", "qdq", "weights"])
def test_weights_have_7_bits_where_products_of_8_would_saturate(
    monkeypatch: pytest.MonkeyPatch, scheme: str, isa: str, most: int
) -> None:
    monkeypatch.setattr("lrai_engines.quantize.isa_class", lambda: isa)
    known = Smoothing(None, 0.05, 128)
    emits: dict[str, Emit] = {
        "row": int8_per_row,
        "static": partial(int8_static, smoothing=known),
        "qdq": partial(int8_qdq, smoothing=known),
    }
    model = linear(np.random.default_rng(0).standard_normal((48, 16)).astype(np.float32))
    made, _ = rewrite(model, emits[scheme]) if scheme in emits else weights_int8(model)
    (weight,) = (t for t in made.graph.initializer if list(t.dims) == [48, 16])
    assert weight.data_type == TensorProto.INT8
    peaks = np.abs(numpy_helper.to_array(weight).astype(int)).max(axis=0)
    assert peaks.tolist() == [most] * 16, "each column has all the bits that there are"


@pytest.mark.parametrize("scheme", PER_ROW)
def test_rows_and_columns_of_zeros_give_zeros(scheme: str) -> None:
    matrix = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
    matrix[:, 1] = 0
    matrix[:, 2] = 1e-44  # subnormal: its scale would round to zero
    x = rows(3, 16)
    x[1] = 0
    model, _ = PER_ROW[scheme](linear(matrix))
    got = run(optimise(model, level="all"), x)
    assert np.isfinite(got).all()
    assert not got[1].any()
    assert not got[:, 1:3].any()


@settings(deadline=None, max_examples=40)
@given(
    matrix=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 40), st.integers(1, 6)),
        # not so small that the norm of the matrix, where it is not 0, underflows
        elements=st.sampled_from([0.0, 1e-3, -1.0]) | st.floats(-1e3, -1, width=32),
    ),
    block_size=st.sampled_from([16, 32]),
)
def test_blocks_of_weights_come_back_within_half_a_step(matrix: Array, block_size: int) -> None:
    model, report = matmul_nbits(linear(matrix), block_size=block_size, accuracy_level=1)
    k = matrix.shape[0]
    got = run(model, np.eye(k, dtype=np.float32))  # the product with 1 is the dequantised weight
    for start in range(0, k, block_size):
        block = matrix[start : start + block_size]
        step = np.abs(block).max(axis=0) / 127
        assert np.all(np.abs(got[start : start + block_size] - block) <= step * 0.5001 + 1e-37)
    if matrix.any():
        assert report[0].error == pytest.approx(relative_error(got, matrix), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_of_two_activations_stay_in_float32(scheme: str) -> None:
    matrix = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["q"], "project"),
        helper.make_node("Transpose", ["q"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "t"], ["y"], "attend"),
    ]
    model, report = SCHEMES[scheme](graph(nodes, {"w": matrix}, (None, None, 32)))
    assert [node.op_type for node in model.graph.node if node.name == "attend"] == ["MatMul"]
    assert (report[0].bits, report[0].why) == (8, "")
    assert (report[1].bits, report[1].why) == (32, "the second operand is not constant")


@pytest.mark.parametrize("scheme", PER_ROW)
def test_layers_that_share_an_activation_or_a_weight_share_its_integers(scheme: str) -> None:
    matrix = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    model, _ = SCHEMES[scheme](graph(sharing(), {"w": matrix, "v": matrix}, (None, 8)))
    count = Counter(node.op_type for node in model.graph.node)
    assert count["QuantizeLinear"] == 2
    stored = [t for t in model.graph.initializer if t.data_type == TensorProto.INT8]
    assert len(stored) == 2
    assert run(model, rows(4, 8)).shape == (4, 8)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_that_something_else_reads_is_kept(scheme: str) -> None:
    matrix = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    body = helper.make_graph(
        [helper.make_node("Add", ["p", "w"], ["r"])],
        "body",
        [],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["p"], ["s"])],
        "other",
        [],
        [helper.make_tensor_value_info("s", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], "linear"),
        helper.make_node("If", ["yes"], ["y"], then_branch=body, else_branch=other),
    ]
    model = graph(nodes, {"w": matrix, "yes": np.array(True)}, (8, 8))
    x = rows(8, 8)
    assert relative_error(run(SCHEMES[scheme](model)[0], x), run(model, x)) < 0.02


def test_a_weight_in_a_constant_node_is_quantised_and_the_node_dropped() -> None:
    matrix = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(matrix)),
        helper.make_node("MatMul", ["x", "w"], ["y"], "linear"),
    ]
    model, report = by_row(graph(nodes, {}, (None, 8)))
    assert report[0].bits == 8
    assert "Constant" not in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_model_given_is_not_modified(scheme: str) -> None:
    model = mlp("transposed")
    before = model.SerializeToString(deterministic=True)
    SCHEMES[scheme](model)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_quantised_twice_has_nothing_left_to_quantise(scheme: str) -> None:
    with pytest.raises(NothingToQuantize, match="no MatMul or Gemm of 0"):
        SCHEMES[scheme](SCHEMES[scheme](mlp("matmul"))[0])


@pytest.mark.parametrize("attributes", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}])
def test_a_scaled_or_transposed_gemm_is_left_alone(attributes: dict[str, Any]) -> None:
    matrix = np.eye(4, dtype=np.float32)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm", **attributes)
    model = graph([node], {"w": matrix, "b": matrix[0]}, (4, 4))
    with pytest.raises(NothingToQuantize):
        by_row(model)


@pytest.mark.parametrize(
    "matrix", [np.eye(4), np.ones((2, 4, 4), "f"), np.full((4, 4), np.inf, "f")]
)
def test_weights_that_are_no_finite_float32_matrix_are_left_alone(matrix: Array) -> None:
    with pytest.raises(NothingToQuantize):
        by_row(linear(matrix))


def test_a_weight_that_a_caller_may_override_is_left_alone() -> None:
    model = linear(np.eye(4, dtype=np.float32))
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 4]))
    with pytest.raises(NothingToQuantize):
        by_row(model)


def test_a_weight_outside_the_model_is_left_alone() -> None:
    model = linear(np.eye(4, dtype=np.float32))
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "weights.bin")
    with pytest.raises(NothingToQuantize):
        by_row(model)


def test_an_opset_without_the_operators_is_refused() -> None:
    with pytest.raises(CompileError, match="needs opset 13 or later, the model has 12"):
        by_row(mlp("matmul", opset=12))


def two_layers() -> onnx.ModelProto:
    random = np.random.default_rng(0)
    weights = {
        "small": random.standard_normal((32, 32)).astype(np.float32),
        "large": random.standard_normal((32, 64)).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "small"], ["hidden"], "first"),
        helper.make_node("MatMul", ["hidden", "large"], ["y"], "second"),
    ]
    return graph(nodes, weights, (None, 32))


def test_four_bits_restore_what_they_can_hold_and_are_half_of_eight() -> None:
    """Odd numbers of rows too: a block of 32 is filled up with noughts."""
    random = np.random.default_rng(0)
    integers = random.integers(-8, 8, (70, 24))
    integers[[0, 32, 64]] = -8  # so every block's range ends where it should
    matrix = (integers * random.uniform(0.5, 2, 24)).astype(np.float32)
    four, report = mixed_int4(linear(matrix), {"w": 1.0}, share=0)
    eight, _ = matmul_nbits(linear(matrix), block_size=32)
    assert [(line.bits, line.scheme) for line in report] == [(4, "matmul_4_bits")]
    assert report[0].error < 1e-6
    assert len(four.SerializeToString()) < 0.65 * len(eight.SerializeToString())
    got = run(four, np.eye(70, dtype=np.float32))
    assert relative_error(got, matrix) < 0.01  # of the activations' int8


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_of_four_and_eight_bits_the_worst_matrix_gets_eight(share: float) -> None:
    model, harms = two_layers(), {"small": 1.0, "large": 3.0}
    mixed, report = mixed_int4(model, harms, share=share)
    assert [line.bits for line in report] == ([4, 8] if share else [4, 4])
    assert [line.harm for line in report] == [0.25, 0.75]
    x = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    assert 0.01 < relative_error(run(mixed, x), run(model, x)) < 0.15


def test_a_range_that_ends_early_is_closer_than_one_that_holds_all() -> None:
    """The usual one of 4 bits has the largest weight at its end."""
    matrix = np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32)
    _, report = mixed_int4(linear(matrix), {"w": 1.0}, share=0)
    blocks = matrix.T.reshape(64, -1, 32)
    at = np.abs(blocks).argmax(axis=2, keepdims=True)
    step = np.take_along_axis(blocks, at, axis=2) / -8
    usual = np.clip(np.rint(blocks / step), -8, 7) * step
    assert report[0].error < 0.99 * relative_error(usual, blocks)


def encoder(rows_: int, columns: int, *, axis: int = 0, reads: int = 1) -> onnx.ModelProto:
    """Return x, as ids, -> rows of a table -> a matrix; `reads` operators read the table."""
    random = np.random.default_rng(0)
    table = random.standard_normal((rows_, columns)).astype(np.float32)
    table *= np.geomspace(0.01, 10, rows_).astype(np.float32)[:, None]
    matrix = random.standard_normal((columns, 8)).astype(np.float32)
    nodes = [helper.make_node("Cast", ["x"], ["ids"], to=TensorProto.INT64)]
    nodes += [
        helper.make_node("Gather", ["table", "ids"], [f"e{i}"], f"g{i}", axis=axis)
        for i in range(reads)
    ]
    nodes.append(helper.make_node("Sum", [f"e{i}" for i in range(reads)], ["e"]))
    nodes.append(helper.make_node("MatMul", ["e", "w"], ["y"], "linear"))
    return graph(nodes, {"table": table, "w": matrix}, (None,))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("reads", [1, 2])
def test_a_large_table_of_embeddings_is_int8_with_a_scale_per_row(
    scheme: Scheme, reads: int
) -> None:
    model = encoder(4096, 64, reads=reads)
    quantised, report = scheme(model)
    tables = [line for line in report if line.op_type == "Gather"]
    assert len(tables) == reads
    assert {(t.bits, t.scheme, t.weight_elements) for t in tables} == {(8, "int8_rows", 4096 * 64)}
    assert all(0 < line.error < 0.01 for line in tables)
    assert quantised.ByteSize() < 0.3 * model.ByteSize()
    for index in (0, 1, 4095, 7, -1):  # alone: rows of all magnitudes
        ids = np.array([index], np.float32)
        assert relative_error(run(quantised, ids), run(model, ids)) < (
            0.04 if SATURATES else 0.02
        )  # 7 bits


def test_an_index_beyond_the_table_is_still_refused() -> None:
    quantised, _ = by_row(encoder(4096, 64))
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument, match="out of data"):
        run(quantised, np.array([4096], np.float32))


@pytest.mark.parametrize("model", [encoder(512, 64), encoder(64, 4096, axis=1)])
def test_a_small_table_or_one_that_columns_are_read_of_is_left_alone(
    model: onnx.ModelProto,
) -> None:
    quantised, report = by_row(model)
    assert [(line.op_type, line.bits) for line in report] == [("MatMul", 8)]
    assert "table" in {tensor.name for tensor in quantised.graph.initializer}


def test_a_table_alone_is_no_reason_for_a_form() -> None:
    model = encoder(4096, 64)
    model.graph.node[-1].op_type = "Mod"
    with pytest.raises(NothingToQuantize, match="no MatMul or Gemm of 0"):
        by_row(model)


@pytest.mark.parametrize("none", [np.nan, np.inf])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_what_is_no_number_makes_none(scheme: Scheme, none: float) -> None:
    """Integers would have one for it, and nobody would be told."""
    random = np.random.default_rng(0)
    quantised, _ = scheme(linear(random.standard_normal((64, 32)).astype(np.float32)))
    spec = TensorSpec(name="y", datatype="FP32", shape=("batch", 32), batch_axis=0)
    x = random.standard_normal((4, 64)).astype(np.float32)
    before = run(quantised, x)
    defined = undefined_stays(quantised, (spec,))
    np.testing.assert_array_equal(run(defined, x), before)
    x[1, 5] = none
    assert np.isnan(run(defined, x)[1]).all()


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_what_is_no_number_makes_none_in_every_precision(
    scheme: Scheme, side: str, kind: int
) -> None:
    """And no sum of halves becomes infinite by itself."""
    random = np.random.default_rng(0)
    matrix = random.standard_normal((64, 32)).astype(np.float32)
    given, told = ("x0", "y") if side == "input" else ("x", "y0")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "linear")]
    if side == "input":
        nodes.insert(0, helper.make_node("Cast", ["x0"], ["x"], to=TensorProto.FLOAT))
    else:
        nodes.append(helper.make_node("Cast", ["y"], ["y0"], to=kind))
    proto = graph(nodes, {"w": matrix}, (None, 64))
    proto.graph.input[0].CopyFrom(
        helper.make_tensor_value_info(
            given, kind if side == "input" else TensorProto.FLOAT, ["n", 64]
        )
    )
    proto.graph.output[0].CopyFrom(
        helper.make_tensor_value_info(
            told, kind if side == "output" else TensorProto.FLOAT, ["n", 32]
        )
    )
    dtype = helper.tensor_dtype_to_np_dtype(proto.graph.input[0].type.tensor_type.elem_type)
    x = (1e4 * random.random((4, 64))).astype(dtype)
    rows = Sample(
        [[x[:1]]], (TensorSpec(name=told, datatype="FP32", shape=("n", 32), batch_axis=0),)
    )
    assert goes_undefined(proto, rows)
    quantised, _ = scheme(proto)
    defined = optimise(undefined_stays(quantised, rows.outputs), level="all")
    session = ort.InferenceSession(defined.SerializeToString())
    before = session.run(None, {given: x})[0]
    assert np.isfinite(before).all() or dtype == np.float32
    x[1, 5] = np.nan
    own = session.run(None, {given: x})[0]
    assert np.isnan(own[1]).all()
    np.testing.assert_array_equal(own[::2], before[::2])


@pytest.mark.parametrize("columns", [32, 20_000])
def test_what_keeps_a_row_undefined_takes_less_than_what_int8_saves(columns: int) -> None:
    random = np.random.default_rng(0)
    proto = linear(random.standard_normal((100, columns)).astype(np.float32))
    quantised, _ = by_row(proto)
    spec = TensorSpec(name="y", datatype="FP32", shape=("batch", columns), batch_axis=0)
    defined = undefined_stays(quantised, (spec,))
    assert defined.ByteSize() - quantised.ByteSize() <= 300_000
    x = random.standard_normal((3, 100)).astype(np.float32)
    x[1, 5] = np.nan
    assert np.isnan(run(defined, x)).all(axis=1).tolist() == [False, True, False]


def test_an_input_without_rows_makes_no_rows() -> None:
    """All are undefined where it is, and otherwise the answer has as many as there were."""
    random = np.random.default_rng(0)
    matrix = random.standard_normal((16, 8)).astype(np.float32)
    nodes = [
        helper.make_node("Mul", ["x", "t"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "w"], ["y"], "linear"),
    ]
    proto = graph(nodes, {"w": matrix}, (None, 16))
    proto.graph.input.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, [16]))
    y = TensorSpec(name="y", datatype="FP32", shape=("n", 8), batch_axis=0)
    x = TensorSpec(name="x", datatype="FP32", shape=("n", 16), batch_axis=0)
    t = TensorSpec(name="t", datatype="FP32", shape=(16,), batch_axis=None)
    quantised, _ = by_row(proto)
    session = ort.InferenceSession(undefined_stays(quantised, (y,), (x, t)).SerializeToString())
    feeds = {"x": random.standard_normal((3, 16)).astype(np.float32), "t": np.ones(16, np.float32)}
    assert session.run(None, feeds)[0].shape == (3, 8)
    feeds["t"][3] = np.inf
    assert np.isnan(session.run(None, feeds)[0]).all()


def test_an_output_that_no_operator_gives_stays_as_it_is() -> None:
    matrix = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    proto = linear(matrix)
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "priors"))
    proto.graph.output.append(helper.make_tensor_value_info("priors", TensorProto.FLOAT, [3]))
    y = TensorSpec(name="y", datatype="FP32", shape=("n", 32), batch_axis=0)
    priors = TensorSpec(name="priors", datatype="FP32", shape=(3,))
    quantised, _ = by_row(proto)
    session = ort.InferenceSession(undefined_stays(quantised, (y, priors)).SerializeToString())
    found = session.run(["priors"], {"x": np.zeros((2, 64), np.float32)})[0]
    np.testing.assert_array_equal(found, np.ones(3))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_table_that_is_multiplied_too_has_scales_of_both_kinds(scheme: Scheme) -> None:
    random = np.random.default_rng(0)
    table = random.standard_normal((1024, 256)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["x"], ["ids"], to=TensorProto.INT64),
        helper.make_node("ReduceMax", ["ids"], ["one"], axes=[1], keepdims=0),
        helper.make_node("Gather", ["table", "one"], ["a"], "look"),
        helper.make_node("MatMul", ["x", "table"], ["b"], "mix"),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    proto = graph(nodes, {"table": table}, (None, 1024))
    x = random.random((5, 1024)).astype(np.float32)
    assert relative_error(run(scheme(proto)[0], x), run(proto, x)) < 0.05


def test_a_table_of_the_largest_numbers_there_are_is_left_alone() -> None:
    """As a mask of attention is: its integers times a scale would be infinite."""
    mask = np.triu(np.full((512, 512), np.finfo(np.float32).min, np.float32), 1)
    model = encoder(512, 512)
    (table,) = [tensor for tensor in model.graph.initializer if tensor.name == "table"]
    table.CopyFrom(numpy_helper.from_array(mask, "table"))
    _, report = by_row(model)
    (line,) = [line for line in report if line.op_type == "Gather"]
    assert line.bits == 32
    assert line.why == "the table is not finite, or nearly so"


def test_a_model_that_looks_for_what_is_no_number_is_left_to_it() -> None:
    nodes = [
        helper.make_node("IsNaN", ["x"], ["none"]),
        helper.make_node("Where", ["none", "zero", "x"], ["known"]),
        helper.make_node("MatMul", ["known", "w"], ["y"], "linear"),
    ]
    matrix = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    imputing = graph(nodes, {"w": matrix, "zero": np.zeros(1, np.float32)}, (None, 64))
    spec = TensorSpec(name="y", datatype="FP32", shape=("batch", 32), batch_axis=0)
    rows = Sample([[np.ones((1, 64), np.float32)]], (spec,))
    assert not goes_undefined(imputing, rows)
    assert goes_undefined(linear(matrix), rows)
    shorter = Sample([[np.ones((1, 63), np.float32)]], (spec,))
    assert goes_undefined(linear(matrix), shorter), "what cannot be asked has no number for none"
    with pytest.raises(CompileError, match="float32 cannot be asked about NaN"):
        goes_undefined(imputing, shorter)


def test_a_model_that_looks_for_it_in_some_columns_only_stays_as_it_is() -> None:
    """What int8 answers would be NaN to a row to which float32 has an answer."""
    nodes = [
        helper.make_node("IsNaN", ["x"], ["none"]),
        helper.make_node("And", ["none", "imputed"], ["filled"]),
        helper.make_node("Where", ["filled", "zero", "x"], ["known"]),
        helper.make_node("MatMul", ["known", "w"], ["y"], "linear"),
    ]
    weights = {
        "w": np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32),
        "zero": np.zeros(1, np.float32),
        "imputed": np.arange(64) < 10,
    }
    spec = TensorSpec(name="y", datatype="FP32", shape=("batch", 32), batch_axis=0)
    rows = Sample([[np.ones((1, 64), np.float32)]], (spec,))
    with pytest.raises(CompileError, match="answers NaN where some of its columns are"):
        goes_undefined(graph(nodes, weights, (None, 64)), rows)


def test_pictures_of_which_a_pool_drops_a_corner_have_static_forms() -> None:
    """Its maximum of NaN and a number may be either: that is no imputing."""
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["a"]),
        helper.make_node("MaxPool", ["a"], ["b"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "w"], ["y"], "linear"),
    ]
    weights = {
        "k": random.standard_normal((4, 1, 3, 3)).astype(np.float32),
        "w": random.standard_normal((4 * 13 * 13, 32)).astype(np.float32),
    }
    spec = TensorSpec(name="y", datatype="FP32", shape=("batch", 32), batch_axis=0)
    rows = Sample([[np.ones((1, 1, 28, 28), np.float32)]], (spec,))
    assert goes_undefined(graph(nodes, weights, (None, 1, 28, 28)), rows)


@pytest.mark.parametrize("columns", [32, 20_000])
@pytest.mark.parametrize("shape", [(100,), (50, 2), (3, 8, 8)])
def test_large_numbers_are_numbers_whatever_they_add_up_to(
    shape: tuple[int, ...], columns: int
) -> None:
    """As a mask of attention holds, or what a raster has where there is nothing."""
    x = np.full((3, *shape), np.finfo(np.float32).min, np.float32)
    size, random = int(np.prod(shape)), np.random.default_rng(0)
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Clip", ["flat", "low", "high"], ["near"]),
        helper.make_node("MatMul", ["near", "w"], ["y"], "linear"),
    ]
    weights = {
        "w": random.standard_normal((size, columns)).astype(np.float32),
        "low": np.array(-1, np.float32),
        "high": np.array(1, np.float32),
    }
    proto = graph(nodes, weights, (None, *shape))
    quantised, _ = by_row(proto)
    spec = TensorSpec(name="y", datatype="FP32", shape=("batch", columns), batch_axis=0)
    defined = undefined_stays(quantised, (spec,))
    np.testing.assert_array_equal(run(defined, x), run(quantised, x))
    x[1].flat[5] = np.nan
    assert np.isnan(run(defined, x)).all(axis=1).tolist() == [False, True, False]


def test_what_is_no_number_for_one_of_two_towers_leaves_the_other_alone() -> None:
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal((64, 32)).astype(np.float32) for name in "uv"}
    nodes = [helper.make_node("MatMul", [side, w], [f"{side}:out"], side)
             for side, w in zip(("user", "item"), "uv", strict=True)]  # fmt: skip
    value = helper.make_tensor_value_info
    proto = helper.make_model(
        helper.make_graph(
            nodes, "towers",
            [value(side, TensorProto.FLOAT, ["n", 64]) for side in ("user", "item")],
            [value(f"{side}:out", TensorProto.FLOAT, ["n", 32]) for side in ("user", "item")],
            [numpy_helper.from_array(array, name) for name, array in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
    )  # fmt: skip
    x = random.standard_normal((2, 64)).astype(np.float32)
    specs = tuple(
        TensorSpec(name=f"{side}:out", datatype="FP32", shape=("n", 32), batch_axis=0)
        for side in ("user", "item")
    )
    pairs = goes_undefined(proto, Sample([[x[:1], x[:1]]], specs))
    assert pairs == {("user", "user:out"), ("item", "item:out")}
    quantised, _ = by_row(proto)
    guarded = undefined_stays(quantised, specs, (), pairs)
    session = ort.InferenceSession(guarded.SerializeToString(), providers=["CPUExecutionProvider"])
    none = x.copy()
    none[0, 3] = np.nan
    user, item = session.run(None, {"user": x, "item": none})
    assert np.isfinite(user).all()
    assert np.isnan(item[0]).all()
    assert np.isfinite(item[1]).all()
