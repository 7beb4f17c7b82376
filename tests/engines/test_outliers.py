"""Columns in parts: the same answers, fewer steps lost, and only where each column is by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from lrai_core.compiler.search import Sample
from lrai_core.protocol import Array, TensorSpec
from lrai_engines import smooth
from lrai_engines.fusion import optimise
from lrai_engines.mixed import Step, cheapest, worst
from lrai_engines.outliers import divisible, parts, split
from lrai_engines.smooth import QDQ, ROW, STATIC, SmoothForms
from tests.core.compiler.onnx_files import model, sharing, value

IN, WIDE = 24, 512


def constant(name: str, array: Array) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(array, np.float32), name)


def encoder(*, gemm: bool = False, gated: bool = False, outlier: float = 1.0) -> onnx.ModelProto:
    """Return x -> gelu(x a + c) b + d, as exporters write it; one column of a is much larger.

    Args:
        gemm: With matrices the other way round, and biases in the operator.
        gated: Times sigmoid(x g), as in SwiGLU.
        outlier: Times as large.
    """
    random = np.random.default_rng(0)
    a = random.standard_normal((IN, WIDE)) / 5
    a[:, 7] *= outlier
    b, g = random.standard_normal((WIDE, 16)) / 22, random.standard_normal((IN, WIDE)) / 5
    c, d = random.standard_normal(WIDE) / 9, random.standard_normal(16)
    b[7] /= outlier
    if gemm:
        first = [helper.make_node("Gemm", ["x", "a", "c"], ["h"], "first", transB=1)]
        last = [helper.make_node("Gemm", ["t", "b", "d"], ["y"], "second", transB=1)]
        a, b = a.T, b.T
    else:
        first = [helper.make_node("MatMul", ["x", "a"], ["p"], "first")]
        first += [helper.make_node("Add", ["c", "p"], ["h"])]
        last = [helper.make_node("MatMul", ["t", "b"], ["q"], "second")]
        last += [helper.make_node("Add", ["q", "d"], ["y"])]
    gelu = [
        helper.make_node("Div", ["h", "root"], ["e"]),
        helper.make_node("Erf", ["e"], ["f"]),
        helper.make_node("Add", ["f", "one"], ["g1"]),
        helper.make_node("Mul", ["h", "g1"], ["g2"]),
        helper.make_node("Mul", ["g2", "half"], ["s" if gated else "t"]),
    ]
    gate = [
        helper.make_node("MatMul", ["x", "g"], ["v"], "gate"),
        helper.make_node("Sigmoid", ["v"], ["w"]),
        helper.make_node("Mul", ["w", "s"], ["t"]),
    ]
    weights = [constant(n, w) for n, w in zip("abcd", (a, b, c, d), strict=True)]
    scalars = zip(("root", "one", "half"), (np.sqrt(2), 1, 0.5), strict=True)
    weights += [constant(name, np.array(number)) for name, number in scalars]
    weights += [constant("g", g)] * gated
    ends = value("x", ["batch", IN]), value("y", ["batch", 16])
    return model([*first, *gelu, *gate * gated, *last], ends[:1], ends[1:], weights)


def run(proto: onnx.ModelProto, x: Array) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(proto.SerializeToString(), options)
    return np.asarray(session.run(None, {"x": x})[0])


def rows(count: int, seed: int, columns: int = IN) -> Array:
    return np.random.default_rng(seed).standard_normal((count, columns)).astype(np.float32)


def some_columns(count: int = WIDE) -> Any:
    """Return some once, the seventh three times and the last twice."""
    counts = np.ones(count, np.int64)
    counts[[7, -1]] = 3, 2
    return np.arange(count).repeat(counts)


@pytest.mark.parametrize("gemm", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_a_model_in_parts_answers_as_it_did(gemm: bool, gated: bool) -> None:
    proto, x = encoder(gemm=gemm, gated=gated, outlier=9), rows(5, 1)
    before = proto.SerializeToString()
    proto = onnx.shape_inference.infer_shapes(proto)  # what it says of widths is true no more
    made = split(proto, {"t": some_columns()})
    onnx.checker.check_model(made, full_check=True)
    widths = {tuple(t.dims) for t in made.graph.initializer}
    assert (WIDE + 3,) in widths
    assert (WIDE,) not in widths
    assert np.allclose(run(made, x), run(proto, x), rtol=1e-4, atol=1e-5)
    assert encoder(gemm=gemm, gated=gated, outlier=9).SerializeToString() == before


def test_a_matrix_that_gives_and_takes_is_there_as_both() -> None:
    """Of (x w + x v) w the first w has more columns, the second more rows."""
    weights = [constant(name, rows(WIDE, at, WIDE)) for at, name in enumerate("wv")]
    ends = value("x", ["batch", WIDE]), value("y", ["batch", WIDE])
    proto, x = model(sharing(), ends[:1], ends[1:], weights), rows(3, 5, WIDE)
    made, right = split(proto, {"c": some_columns()}), run(proto, x)
    assert {tuple(t.dims) for t in made.graph.initializer} == {(WIDE, WIDE + 3), (WIDE + 3, WIDE)}
    assert np.linalg.norm(run(made, x) - right) < 1e-5 * np.linalg.norm(right)


def test_without_columns_it_is_the_same_model() -> None:
    proto = encoder()
    assert split(proto, {}) is proto


def test_columns_that_are_computed_each_by_itself_are_found() -> None:
    assert set(divisible(encoder())) == set(divisible(encoder(gated=True))) == {"t"}


def _answered(proto: onnx.ModelProto) -> None:
    proto.graph.output.append(value("h", ["batch", WIDE]))


def _read_elsewhere(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(helper.make_node("ReduceMax", ["h"], ["z"], keepdims=0))
    proto.graph.output.append(value("z", []))


def _read_in_a_body(proto: onnx.ModelProto) -> None:
    inner = helper.make_node("ReduceMax", ["t"], ["m"], keepdims=0)
    body = helper.make_graph([inner], "body", [], [value("m", [])])
    node = helper.make_node("If", ["yes"], ["z"], then_branch=body, else_branch=body)
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    proto.graph.node.append(node)
    proto.graph.output.append(value("z", []))


def _normed(proto: onnx.ModelProto) -> None:
    proto.graph.node[3].op_type = "Softmax"


def _of_the_caller(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].input[0] = "bias"
    proto.graph.input.append(value("bias", [WIDE]))


def _beside_the_caller(proto: onnx.ModelProto) -> None:
    """Of a column that the caller gives there is one."""
    proto.graph.node[3].input[0] = "x"
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = WIDE
    proto.graph.initializer[0].CopyFrom(constant("a", rows(WIDE, 0, WIDE)))


def _by_rows(proto: onnx.ModelProto) -> None:
    """A table of several rows, as of places."""
    proto.graph.initializer[2].CopyFrom(constant("c", rows(1, 0, WIDE).repeat(2, 0)))


def _changing(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[1] = "m"
    proto.graph.node.insert(0, helper.make_node("Identity", ["a"], ["m"]))


def _also_added(proto: onnx.ModelProto) -> None:
    """What is multiplied is also what the product is added to."""
    proto.graph.initializer[1].CopyFrom(constant("b", rows(WIDE, 0, WIDE)))
    proto.graph.initializer[3].CopyFrom(constant("d", rows(1, 0, WIDE)[0]))
    proto.graph.node[-2].CopyFrom(helper.make_node("Gemm", ["t", "b", "t"], ["q"]))
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = WIDE


@pytest.mark.parametrize(
    "change",
    [_answered, _read_elsewhere, _read_in_a_body, _normed, _of_the_caller, _beside_the_caller,
     _by_rows, _changing, _also_added],
)  # fmt: skip
def test_columns_that_something_else_has_to_do_with_are_left(change: Any) -> None:
    proto = encoder()
    change(proto)
    onnx.checker.check_model(proto, full_check=True)
    assert divisible(proto) == {}


def test_few_columns_are_left() -> None:
    proto = encoder()
    for place, narrow in ((0, rows(IN, 0, 256)), (1, rows(256, 1, 16)), (2, rows(1, 0, 256)[0])):
        proto.graph.initializer[place].CopyFrom(constant("abc"[place], narrow))
    assert divisible(proto) == {}


@given(st.integers(0, 1 << 16), st.floats(0.2, 4), st.integers(1, 20))
def test_the_largest_part_is_as_small_as_it_can_be(seed: int, spread: float, large: int) -> None:
    random = np.random.default_rng(seed)
    high = np.exp(random.standard_normal(600) * spread).astype(np.float32)
    high[random.integers(0, 600, large)] *= random.uniform(1, 30)
    low = -high * random.uniform(0, 1.2, 600).astype(np.float32)
    whole, counts = np.maximum(high, -low), parts(low, high)

    def needed(largest: float) -> int:
        return int(np.ceil(whole / (largest * (1 - 1e-6))).sum())

    if counts is None:
        assert needed(whole.max() / 1.25) > 616
    else:
        assert counts.sum() == 616
        assert (whole / counts).max() < whole.max() / 1.25
        assert needed((whole / counts).max()) > 616


def sample_of(x: Array) -> Sample:
    return Sample(
        [[row[None]] for row in x],
        (TensorSpec(name="y", datatype="FP32", shape=("batch", 16), batch_axis=0),),
    )


@pytest.mark.parametrize("scheme", [STATIC, ROW, QDQ])
def test_an_outlier_takes_the_steps_of_the_others_no_more(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto, x = encoder(outlier=40), rows(64, 5)
    right, errors = run(proto, x), []
    for known in (divisible(proto), {}):
        monkeypatch.setattr(smooth, "divisible", lambda _, known=known: known)
        monkeypatch.setattr(smooth, "_STRENGTHS", (0.0,))
        forms = SmoothForms(sample_of(rows(64, 1)), 1)
        made, report = forms.build(proto, scheme=scheme)
        onnx.checker.check_model(made)
        assert [line.node for line in report] == ["first", "second"]
        found = run(optimise(made, level="all"), x)
        errors.append(float(np.linalg.norm(found - right) / np.linalg.norm(right)))
    assert errors[0] < errors[1] / 2


def test_in_parts_a_row_has_the_same_bits_alone_and_among_others() -> None:
    made, _ = SmoothForms(sample_of(rows(64, 1)), 1).build(encoder(outlier=40), scheme=STATIC)
    made, x = optimise(made, level="all"), rows(9, 5)
    assert any(WIDE + 16 in t.dims for t in made.graph.initializer)
    batch = run(made, x)
    for size in (1, 2, 5):
        assert np.array_equal(run(made, x[:size]), batch[:size])


harm = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(1e-9, 1), min_size=1)


@given(harm, st.floats(0.05, 0.95), st.integers(0, 99))
def test_with_two_levels_those_that_harm_most_for_their_work_are_closer(
    harms: dict[str, float], share: float, seed: int
) -> None:
    sizes = np.random.default_rng(seed).uniform(1, 9, len(harms)).tolist()
    work = dict(zip(harms, sizes, strict=True))
    found = cheapest([harms, {}], [Step([name], 1, work[name]) for name in harms], share)
    closer = {name for name, level in found.items() if level}
    assert closer == worst(harms, work, share) or sum(harms[n] for n in closer) == pytest.approx(
        share * sum(harms.values())
    )


@given(harm, st.floats(0.05, 0.95), st.floats(0.1, 1.5))
def test_with_more_levels_the_harm_is_less_by_that_share(
    harms: dict[str, float], share: float, part: float
) -> None:
    between = {name: one * part for name, one in harms.items()}  # which may do more harm, too
    levels = [harms, between, {}]
    steps = [Step([*harms], 1, 0.3)] + [Step([name], 2, 0.6) for name in harms]
    found = cheapest(levels, steps, share)
    left = sum(levels[at].get(name, 0.0) for name, at in found.items())
    assert left <= (1 - share) * sum(harms.values()) * (1 + 1e-9)
    assert part < 1 or 1 not in found.values(), "what saves nothing is not taken"


def test_what_saves_most_for_its_time_comes_first() -> None:
    levels = [{"a": 8.0, "b": 8.0, "c": 1.0}, {"a": 2.0, "b": 7.0, "c": 0.9}, {}]
    steps = [Step([name], level, time) for name in "abc" for level, time in ((1, 0.1), (2, 0.6))]
    assert cheapest(levels, steps, 0.3) == {"a": 1, "b": 0, "c": 0}
    assert cheapest(levels, steps, 0.6) == {"a": 1, "b": 2, "c": 0}
    dear = [one._replace(time=99.0) if one.names == ["b"] else one for one in steps]
    assert cheapest(levels, dear, 0.4) == {"a": 2, "b": 0, "c": 0}


def test_what_is_closer_already_stays_so_where_others_follow() -> None:
    levels = [{"a": 9.0, "b": 4.0, "c": 4.0}, {"a": 8.0, "b": 1.0, "c": 1.0}, {}]
    steps = [Step(["a"], 2, 1.0), Step(["a", "b", "c"], 1, 1.0)]
    assert cheapest(levels, steps, 0.5) == {"a": 2, "b": 0, "c": 0}
    assert cheapest(levels, steps, 0.8) == {"a": 2, "b": 1, "c": 1}


@pytest.mark.parametrize("harms", [[{"a": 0.0}, {}], [{"a": 1.0}, {"a": 1.0}]])
def test_where_nothing_is_saved_nothing_is_closer(harms: list[dict[str, float]]) -> None:
    assert cheapest(harms, [Step(["a"], 1, 1.0)], 0.5) == {"a": 0}
