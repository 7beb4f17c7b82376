"""Smoothed int8: against numpy, and on models whose columns differ as those of transformers do."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import helper, numpy_helper

from lrai_core.compiler.search import Sample
from lrai_core.engine.engine import isa_class
from lrai_core.errors import CompileError
from lrai_core.protocol import Array, TensorSpec
from lrai_engines import smooth
from lrai_engines.fusion import optimise
from lrai_engines.quantize import (
    NothingToQuantize,
    Smoothing,
    about_zero,
    int8_per_row,
    int8_qdq,
    int8_static,
    rewrite,
)
from lrai_engines.sensitivity import harms
from lrai_engines.smooth import QDQ, ROW, STATIC, SmoothForms, smoothings
from lrai_engines.undefined import undefined_stays
from tests.core.compiler.onnx_files import linear, model, sharing, value
from tests.engines.test_sensitivity import sample as layered_sample
from tests.engines.test_sensitivity import three_layers

WIDTH = 64


def uneven(count: int, seed: int) -> Array:
    """Return rows of which two columns are a hundred times as large as the others, float32."""
    x = np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)
    x[:, [3, 17]] *= 100
    return x


def two_layers(*, bias: bool = True, opset: int = 17) -> onnx.ModelProto:
    """Return x -> relu(x a + c) b + d, where the uneven columns of x weigh little."""
    random = np.random.default_rng(0)
    a = (random.standard_normal((WIDTH, 48)) / 8).astype(np.float32)
    a[[3, 17]] /= 100
    b = (random.standard_normal((48, 16)) / 7).astype(np.float32)
    c, d = (random.standard_normal(n).astype(np.float32) for n in (48, 16))
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["p"], "first"),
        helper.make_node("Add", ["c", "p"], ["h"]),
        helper.make_node("Relu", ["h" if bias else "p"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["q" if bias else "y"], "second"),
        helper.make_node("Add", ["q", "d"], ["y"]),
    ]
    weights = [numpy_helper.from_array(w, n) for n, w in zip("abcd", (a, b, c, d), strict=True)]
    ends = value("x", ["batch", WIDTH]), value("y", ["batch", 16])
    kept = nodes if bias else [nodes[0], nodes[2], nodes[3]]
    return model(kept, ends[:1], ends[1:], weights if bias else weights[:2], opset=opset)


def sample_of(x: Array, columns: int = 16) -> Sample:
    spec = TensorSpec(name="y", datatype="FP32", shape=("batch", columns), batch_axis=0)
    return Sample([[row[None]] for row in x], (spec,))


def run(proto: onnx.ModelProto, x: Array) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(proto.SerializeToString(), options)
    return np.asarray(session.run(None, {"x": x})[0])


def off(proto: onnx.ModelProto, like: onnx.ModelProto, x: Array) -> float:
    """Return the relative L2 error."""
    right = run(like, x)
    return float(np.linalg.norm(run(proto, x) - right) / np.linalg.norm(right))


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize("scheme", [ROW, STATIC, QDQ])
def test_smoothing_undoes_what_uneven_columns_cost(scheme: str, opset: int) -> None:
    proto, x = two_layers(opset=opset), uneven(64, 5)
    made, report = SmoothForms(sample_of(uneven(64, 1)), 1).build(proto, scheme=scheme)
    onnx.checker.check_model(made)
    plain, _ = rewrite(proto, int8_per_row)
    assert off(optimise(made, level="all"), proto, x) < min(0.03, off(plain, proto, x) / 4)
    assert [(line.node, line.bits) for line in report] == [("first", 8), ("second", 8)]
    assert all(0 < line.error < 0.03 for line in report)


@pytest.mark.parametrize("scheme", [ROW, STATIC])
def test_a_row_has_the_same_bits_alone_and_among_others(scheme: str) -> None:
    made, _ = SmoothForms(sample_of(uneven(64, 1)), 1).build(two_layers(), scheme=scheme)
    made, x = optimise(made, level="all"), uneven(33, 5)
    batch = run(made, x)
    for size in (1, 2, 3, 8):
        assert np.array_equal(run(made, x[:size]), batch[:size])


some_scales = given(
    x=hnp.arrays(np.float32, (3, 8), elements=st.floats(-4, 4, width=32)),
    factor=hnp.arrays(np.float32, 8, elements=st.floats(0.25, 4, width=32)),
    step=st.floats(0.01, 0.1),
    zero=st.integers(0, 255),
)


@settings(deadline=None, max_examples=40)
@some_scales
def test_a_static_scale_rounds_to_its_steps_and_ends_where_its_range_does(
    x: Array, factor: Array, step: float, zero: int
) -> None:
    """With weights that are integers by their scale, all that is lost is the activation's."""
    matrix = np.eye(8, dtype=np.float32)

    def emit(graph: Any, layer: Any) -> str:
        return int8_static(graph, layer, Smoothing(factor, step, zero))

    got = run(rewrite(linear_of(matrix), emit)[0], x)
    step = float(np.float32(step))
    low, high = -zero * step * factor, (255 - zero) * step * factor
    within = np.clip(x, low, high)
    assert np.all(np.abs(got - within) <= (step / 2 * factor) * 1.001 + 1e-5)


@settings(deadline=None, max_examples=40)
@some_scales
def test_without_a_zero_point_the_range_is_covered_with_steps_half_as_large_again(
    x: Array, factor: Array, step: float, zero: int
) -> None:
    low, high = -zero * step * factor, (255 - zero) * step * factor
    x = np.clip(x, low, high).astype(np.float32)

    def emit(graph: Any, layer: Any) -> str:
        return int8_qdq(graph, layer, Smoothing(factor, step, zero))

    made = rewrite(linear_of(np.eye(8, dtype=np.float32)), emit)[0]
    about = about_zero(step, zero)
    (kind,) = (t.data_type for t in made.graph.initializer if t.name.endswith(":qdq:zero"))
    assert kind == (onnx.TensorProto.UINT8 if about is None else onnx.TensorProto.INT8)
    got = run(made, x)
    assert np.all(np.abs(got - x) <= ((about or step) / 2 * factor) * 1.001 + 1e-5)


@pytest.mark.parametrize(
    ("zero", "larger"), [(0, None), (64, None), (65, 190 / 127), (128, 128 / 127), (255, None)]
)
def test_ranges_that_lie_on_one_side_of_zero_keep_their_zero_point(
    zero: int, larger: float | None
) -> None:
    assert about_zero(2.0, zero) == (larger and pytest.approx(2 * larger))


def linear_of(matrix: Array) -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "product")]
    ends = value("x", ["batch", len(matrix)]), value("y", ["batch", matrix.shape[1]])
    return model(nodes, ends[:1], ends[1:], [numpy_helper.from_array(matrix, "w")])


@pytest.mark.parametrize("scheme", [ROW, STATIC, QDQ])
def test_a_column_that_was_never_seen_may_be_used_all_the_same(scheme: str) -> None:
    """Those of rare categories are such, beside many that were seen."""
    seen = np.eye(WIDTH, dtype=np.float32)[: WIDTH - 8]
    rare = np.eye(WIDTH, dtype=np.float32)[WIDTH - 8 :]
    proto = two_layers(bias=False)
    assert off(SmoothForms(sample_of(seen), 1).build(proto, scheme=scheme)[0], proto, rare) < 0.05


@pytest.mark.parametrize(
    ("scheme", "instead"),
    [(ROW, "dynamic_int8_per_row"), (STATIC, "dynamic_int8_per_row"), (QDQ, "float32")],
)
def test_an_activation_that_was_never_seen_has_no_static_scale(scheme: str, instead: str) -> None:
    """One that says what is missing is such, where rows of which something is are not looked at."""
    proto = two_layers(bias=False)
    zero = numpy_helper.from_array(np.zeros((), np.float32), "zero")
    proto.graph.initializer.append(zero)
    proto.graph.node.insert(1, helper.make_node("Clip", ["p", "", "zero"], ["c"]))
    proto.graph.node[2].input[0] = "c"  # whose Relu is then 0
    _, report = SmoothForms(sample_of(uneven(16, 1)), 1).build(proto, scheme=scheme)
    assert report[1].scheme == instead


def test_products_add_what_is_added_next() -> None:
    """In either order; static scales leave one operator where there were two."""
    proto = two_layers()
    made, _ = SmoothForms(sample_of(uneven(32, 1)), 1).build(proto, scheme=STATIC)
    counts = Counter(node.op_type for node in made.graph.node)
    assert (counts["MatMulIntegerToFloat"], counts["Add"]) == (2, 0)
    rows, _ = SmoothForms(sample_of(uneven(32, 1)), 1).build(proto, scheme=ROW)
    assert Counter(node.op_type for node in rows.graph.node)["Add"] == 2


@pytest.mark.parametrize("reader", ["operator", "caller", "body"])
def test_a_product_that_something_else_reads_stays(reader: str) -> None:
    proto = two_layers()
    if reader == "caller":
        proto.graph.output.append(value("q", ["batch", 16]))
    elif reader == "operator":
        proto.graph.node.append(helper.make_node("Neg", ["q"], ["z"]))
        proto.graph.output.append(value("z", ["batch", 16]))
    else:
        body = helper.make_graph(
            [helper.make_node("Neg", ["q"], ["z1"])], "body", [], [value("z1", ["batch", 16])]
        )
        proto.graph.node.append(
            helper.make_node("If", ["yes"], ["z"], then_branch=body, else_branch=body)
        )
        proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
        proto.graph.output.append(value("z", ["batch", 16]))
    given = sample_of(uneven(32, 1))
    outputs = [TensorSpec(name=v.name, datatype="FP32", shape=("batch", 16), batch_axis=0)
               for v in proto.graph.output]  # fmt: skip
    made, _ = SmoothForms(Sample(given.rows, outputs), 1).build(proto, scheme=STATIC)
    assert Counter(node.op_type for node in made.graph.node)["Add"] == 1, "that of the first layer"
    assert off(made, proto, uneven(8, 5)) < 0.03


def test_a_vector_that_is_no_bias_is_added_as_it_was() -> None:
    """One number, or a vector as long as there are rows, has no place in the product."""
    for other in (np.full(1, 2, np.float32), np.ones((4, 16), np.float32)):
        proto = two_layers()
        proto.graph.initializer[3].CopyFrom(numpy_helper.from_array(other, "d"))
        made, _ = SmoothForms(sample_of(uneven(32, 1)), 1).build(proto, scheme=STATIC)
        assert Counter(node.op_type for node in made.graph.node)["Add"] == 1
        assert off(made, proto, uneven(4, 5)) < 0.03


def test_layers_that_share_an_activation_or_a_weight_share_its_integers() -> None:
    matrix = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    weights = [numpy_helper.from_array(matrix, name) for name in "wv"]
    proto = model(sharing(), [value("x", ["batch", 8])], [value("y", ["batch", 8])], weights)
    x = np.random.default_rng(1).standard_normal((32, 8)).astype(np.float32)
    for scheme in (ROW, STATIC, QDQ):
        made, _ = SmoothForms(sample_of(x, 8), 1).build(proto, scheme=scheme)
        counts = Counter(node.op_type for node in made.graph.node)
        assert counts["QuantizeLinear"] == 2
        assert off(made, proto, x) < 0.04


@pytest.mark.parametrize(
    ("scheme", "closer"), [(STATIC, "float32"), (ROW, "float32"), (QDQ, "float32")]
)
def test_what_harms_most_is_closer(scheme: str, closer: str) -> None:
    """In this model that is the second matrix, see `three_layers`: each row has the outlier."""
    forms = SmoothForms(layered_sample(16), 1)
    known = forms.harms(three_layers())
    most = max(known, key=lambda name: known[name])
    _, report = forms.build(three_layers(), scheme=scheme, share=0.01)
    assert [line.scheme == closer for line in report] == [name == most for name in "abc"]
    assert sum(line.harm for line in report) == pytest.approx(1)
    with pytest.raises(NothingToQuantize, match="a form that was made before"):
        forms.build(three_layers(), scheme=scheme, share=0.02)
    with pytest.raises(NothingToQuantize, match="no matrix, or every matrix"):
        forms.build(three_layers(), scheme=scheme, share=1 - 1e-12)


def test_of_equal_harm_the_smaller_matrix_is_closer(monkeypatch: pytest.MonkeyPatch) -> None:
    equal = {"a": 1.0, "b": 1.0}
    monkeypatch.setattr(smooth, "harms", lambda *_: equal)
    forms = SmoothForms(sample_of(uneven(16, 1)), 1)
    _, report = forms.build(two_layers(), scheme=ROW, share=0.5)
    assert [line.scheme for line in report] == ["dynamic_int8_per_row", "float32"]


def test_where_nothing_does_harm_nothing_is_closer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smooth, "harms", lambda *_: {"a": 0.0, "b": 0.0})
    with pytest.raises(NothingToQuantize, match="no matrix, or every matrix"):
        SmoothForms(sample_of(uneven(16, 1)), 1).build(two_layers(), scheme=ROW, share=0.5)


@pytest.mark.parametrize("isa", [isa_class(), "avx2"])
def test_ranges_and_harms_are_found_once(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    """Of weights of 8 bits one does .89 of the harm, of 7 bits .91, and with the next one .95."""
    monkeypatch.setattr("lrai_engines.quantize.isa_class", lambda: isa)
    calls = list[str]()

    def counted(name: str, function: Any) -> Any:
        def call(*given: Any) -> Any:
            calls.append(name)
            return function(*given)

        return call

    monkeypatch.setattr(smooth, "harms", counted("harms", harms))
    monkeypatch.setattr(smooth, "smoothings", counted("smoothings", smoothings))
    forms = SmoothForms(layered_sample(16), 1)
    for scheme in (STATIC, ROW, QDQ):
        forms.build(three_layers(), scheme=scheme)
        for share in (0.01, 0.93):
            forms.build(three_layers(), scheme=scheme, share=share)
    assert calls == ["smoothings", "harms", "harms"], "with static scales, and with those per row"


def test_why_it_cannot_be_done_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[int]()

    def counted(*given: Any) -> Any:
        calls.append(1)
        return smoothings(*given)

    monkeypatch.setattr(smooth, "smoothings", counted)
    wrong = Sample([[np.zeros((1, 3), np.float32)]] * 4, layered_sample().outputs)
    forms = SmoothForms(wrong, 1)
    for share in (0.0, 0.5):
        with pytest.raises(CompileError, match="the activations cannot be seen"):
            forms.build(three_layers(), scheme=STATIC, share=share)
    assert len(calls) == 1


def test_rows_that_are_no_numbers_are_not_looked_at() -> None:
    x = uneven(32, 1)
    x[::4, 0] = np.inf
    made, _ = SmoothForms(sample_of(x), 1).build(two_layers(), scheme=STATIC)
    assert off(made, two_layers(), uneven(8, 5)) < 0.03
    x[1:] = np.nan
    forms = SmoothForms(sample_of(x), 1)
    with pytest.raises(CompileError, match="of 32 rows 0 are finite, 2 are needed"):
        forms.build(two_layers(), scheme=STATIC)
    made, _ = forms.build(two_layers(), scheme=ROW)
    assert made == rewrite(two_layers(), int8_per_row)[0], "which takes no sample"


@pytest.mark.parametrize("row", [0, 1])
def test_an_activation_that_is_no_number_is_quantised_by_its_rows(row: int) -> None:
    """Whichever half of the sample it is seen in."""
    x = np.abs(uneven(16, 1)) + 1
    x[row] *= -1
    proto = logarithm()
    _, report = SmoothForms(sample_of(x), 1).build(proto, scheme=ROW)
    assert [line.scheme for line in report] == ["dynamic_int8_per_row"] * 2
    by, _, why = smoothings(proto, sample_of(x), 1)
    assert (set(by), bool(why)) == ({"x"}, True)


def logarithm() -> onnx.ModelProto:
    """Return x -> log(x a) b, of positive a."""
    proto = two_layers(bias=False)
    proto.graph.node[1].op_type = "Log"
    a = np.abs(numpy_helper.to_array(proto.graph.initializer[0]))
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(a, "a"))
    return proto


def test_static_scales_are_not_for_what_answers_noughts_with_no_number() -> None:
    """A mask of nothing but minus infinity is such, and a mean of none."""
    x = np.abs(uneven(16, 1)) + 1
    forms = SmoothForms(sample_of(x), 1)
    with pytest.raises(CompileError, match="float32 answers noughts with what is no number"):
        forms.build(logarithm(), scheme=STATIC)
    made, _ = forms.build(logarithm(), scheme=ROW)
    assert not np.isfinite(run(made, np.zeros((1, WIDTH), np.float32))).any()
    assert off(made, logarithm(), x) < 0.03


def test_noughts_that_float32_refuses_say_nothing() -> None:
    """As where they are no index."""
    nodes = [
        helper.make_node("Sub", ["ids", "one"], ["i"]),
        helper.make_node("Gather", ["table", "i"], ["row"]),
        helper.make_node("MatMul", ["row", "w"], ["y"], "product"),
    ]
    random, kind = np.random.default_rng(0), onnx.TensorProto.INT64
    weights = [
        numpy_helper.from_array(np.array(100, np.int64), "one"),
        numpy_helper.from_array(random.standard_normal((8, 16)).astype(np.float32), "table"),
        numpy_helper.from_array(random.standard_normal((16, 4)).astype(np.float32), "w"),
    ]
    proto = model(nodes, [value("ids", ["batch"], kind)], [value("y", ["batch", 4])], weights)
    rows: list[list[Array]] = [[np.full(1, 100 + i % 8)] for i in range(16)]
    made, report = SmoothForms(Sample(rows, sample_of(uneven(1, 1), 4).outputs), 1).build(
        proto, scheme=STATIC
    )
    assert [line.scheme for line in report] == ["static_int8"]
    assert made.graph.node[-1].op_type == "MatMulIntegerToFloat"


def test_outputs_that_are_no_numbers_anyway_say_nothing() -> None:
    """As scores of classes that are masked."""
    proto = two_layers()
    proto.graph.node[-1].output[0] = "z"
    mask = np.where(np.arange(16) < 4, -np.inf, 0).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(mask, "mask"))
    proto.graph.node.append(helper.make_node("Add", ["z", "mask"], ["y"]))
    _, report = SmoothForms(sample_of(uneven(16, 1)), 1).build(proto, scheme=STATIC)
    assert {line.scheme for line in report} == {"static_int8"}


def test_numbers_so_large_that_their_mean_is_none_are_no_reason_to_give_up() -> None:
    """A raster has them where it has nothing; the other activation is smoothed all the same."""
    x = uneven(32, 1)
    x[::2, :4] = np.finfo(np.float32).max
    proto = two_layers(bias=False)
    by = smoothings(proto, sample_of(x), 1).by
    assert all(0 < one.step < np.inf and 0 <= one.zero <= 255 for one in by.values())
    assert all(one.factor is None or (one.factor >= 1).all() for one in by.values())


def test_the_model_is_not_changed_and_one_without_matrices_is_refused() -> None:
    proto = two_layers()
    before = proto.SerializeToString()
    SmoothForms(sample_of(uneven(8, 1)), 1).build(proto, scheme=STATIC, share=0.01)
    assert proto.SerializeToString() == before
    bare = model(
        [helper.make_node("Relu", ["x"], ["y"])],
        [value("x", ["batch", 4])],
        [value("y", ["batch", 4])],
    )
    with pytest.raises(CompileError, match="no MatMul or Gemm"):
        SmoothForms(sample_of(np.ones((8, 4), np.float32), 4), 1).build(bare, scheme=ROW)


def test_a_single_matrix_is_not_mixed() -> None:
    x = np.random.default_rng(1).standard_normal((16, 8)).astype(np.float32)
    with pytest.raises(NothingToQuantize, match="every matrix"):
        SmoothForms(sample_of(x, 4), 1).build(linear(), scheme=STATIC, share=0.3)


@pytest.mark.parametrize("what", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scheme", [ROW, STATIC])
def test_a_row_that_is_no_number_has_no_answer_and_others_have_theirs(
    scheme: str, what: float
) -> None:
    """As float32, whose Relu passes it on; integers have no value for it."""
    given = sample_of(uneven(32, 1))
    made, _ = SmoothForms(given, 1).build(two_layers(), scheme=scheme)
    stays = undefined_stays(made, given.outputs)
    x = uneven(4, 5)
    right = run(made, x)
    x[2, 7] = what
    found = run(stays, x)
    assert np.isnan(found[2]).all()
    assert np.array_equal(found[[0, 1, 3]], right[[0, 1, 3]])
