"""An axis is what behaves like one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lrai_core.compiler import axes
from lrai_core.compiler.axes import apply_axes, assume_axes, confirm_axes, with_choices
from lrai_core.compiler.model import Imported, declared
from lrai_core.engine import batching
from lrai_core.engine.onnxruntime import OnnxRuntime
from lrai_core.errors import UsageError
from lrai_core.protocol import Array, OutputMap, Signature, TensorSpec
from tests.core.compiler.onnx_files import linear, model, save, value

TABLE = numpy_helper.from_array(
    np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32), "table"
)
IDS = value("ids", ["batch", "sequence"], TensorProto.INT64)
MASK = value("mask", ["batch", "sequence"], TensorProto.INT64)
LOOK_UP = helper.make_node("Gather", ["table", "ids"], ["words"])
ONE = numpy_helper.from_array(np.ones(1, np.float32))


def masked_sum() -> onnx.ModelProto:
    """Return token vectors and their masked sum: padding changes neither."""
    nodes = [
        LOOK_UP,
        helper.make_node("Cast", ["mask"], ["weight"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["weight", "last"], ["weights"]),
        helper.make_node("Mul", ["words", "weights"], ["tokens"]),
        helper.make_node("ReduceSum", ["tokens", "middle"], ["total"], keepdims=0),
    ]
    constants = [
        TABLE,
        numpy_helper.from_array(np.array([2]), "last"),
        numpy_helper.from_array(np.array([1]), "middle"),
    ]
    outputs = [value("tokens", ["batch", "sequence", 4]), value("total", ["batch", 4])]
    return model(nodes, [IDS, MASK], outputs, constants)


def plain_mean() -> onnx.ModelProto:
    """Return the mean over all tokens, padding included."""
    nodes = [LOOK_UP, helper.make_node("ReduceMean", ["words"], ["y"], axes=[1], keepdims=0)]
    return model(nodes, [IDS], [value("y", ["batch", 4])], [TABLE])


def row_softmax() -> onnx.ModelProto:
    """Return a softmax over the rows: every row depends on the others."""
    nodes = [helper.make_node("Softmax", ["x"], ["y"], axis=0)]
    return model(nodes, [value("x", ["batch", 3])], [value("y", ["batch", 3])])


def found(
    proto: onnx.ModelProto, folder: Path, rows: Sequence[list[Array]] = ()
) -> tuple[Signature, str]:
    signature = declared(proto)
    session = OnnxRuntime().load(save(proto, folder / "m.onnx"))
    return confirm_axes(signature, assume_axes(signature), session, list(rows))


def test_a_masked_model_has_batch_and_length_axes(tmp_path: Path) -> None:
    signature, _ = found(masked_sum(), tmp_path)
    assert [(s.batch_axis, s.length_axis) for s in signature.inputs] == [(0, 1), (0, 1)]
    assert [(s.batch_axis, s.length_axis) for s in signature.outputs] == [(0, 1), (0, None)]
    assert signature.coalescible


def test_two_texts_of_one_symbol_need_not_be_of_one_length(tmp_path: Path) -> None:
    """As exporters write two towers: `sequence` is that of each."""
    proto, other = masked_sum(), masked_sum()
    constants = {tensor.name for tensor in proto.graph.initializer}
    for node in other.graph.node:
        node.input[:] = [name if name in constants else f"{name}2" for name in node.input]
        node.output[:] = [f"{name}2" for name in node.output]
    for entry in (*other.graph.input, *other.graph.output):
        entry.name += "2"
    proto.graph.node.extend(other.graph.node)
    proto.graph.input.extend(other.graph.input)
    proto.graph.output.extend(other.graph.output)
    signature, why = found(proto, tmp_path)
    assert signature.coalescible
    assert [spec.length_axis for spec in signature.inputs] == [None] * 4
    assert "need not be of one length" in why


def test_an_input_that_nothing_reads_is_of_any_length(tmp_path: Path) -> None:
    proto = masked_sum()
    proto.graph.input.append(value("types", ["batch", "sequence"], TensorProto.INT64))
    signature, _ = found(proto, tmp_path)
    assert [spec.length_axis for spec in signature.inputs] == [1, 1, 1]


def test_padding_that_changes_outputs_is_no_length_axis(tmp_path: Path) -> None:
    signature, why = found(plain_mean(), tmp_path)
    assert signature.inputs[0].batch_axis == 0
    assert signature.inputs[0].length_axis is None
    assert "padding with 0 changes the outputs" in why


def test_padding_that_only_the_largest_of_all_tokens_shows_is_no_length_axis(
    tmp_path: Path,
) -> None:
    nodes = [LOOK_UP, helper.make_node("ReduceMax", ["words"], ["y"], axes=[1], keepdims=0)]
    proto = model(nodes, [IDS], [value("y", ["batch", 4])], [TABLE])
    signature, why = found(proto, tmp_path)  # of two tokens, one of which is the padding
    assert signature.inputs[0].length_axis is None
    assert "padding with 0 changes the outputs" in why


def test_padding_that_long_rows_hide_is_no_length_axis(tmp_path: Path) -> None:
    """The largest of many tokens is hardly ever below that of the padding; of few it is."""
    nodes = [LOOK_UP, helper.make_node("ReduceMax", ["words"], ["y"], axes=[1], keepdims=0)]
    proto = model(nodes, [IDS], [value("y", ["batch", 4])], [TABLE])
    random = np.random.default_rng(0)
    rows = [[random.integers(1, 50, (1, length))] for length in range(40, 60)]
    signature, why = found(proto, tmp_path, rows)
    assert signature.inputs[0].length_axis is None
    assert "padding with 0 changes the outputs" in why


def test_padding_that_long_rows_hide_is_none_of_a_model_that_takes_no_single_token(
    tmp_path: Path,
) -> None:
    """As the largest of what a convolution makes of three words at a time."""
    random = np.random.default_rng(0)
    kernel = random.standard_normal((4, 4, 3)).astype(np.float32)
    nodes = [
        LOOK_UP,
        helper.make_node("Transpose", ["words"], ["columns"], perm=[0, 2, 1]),
        helper.make_node("Conv", ["columns", "kernel"], ["triples"]),
        helper.make_node("ReduceMax", ["triples"], ["y"], axes=[2], keepdims=0),
    ]
    constants = [TABLE, numpy_helper.from_array(kernel, "kernel")]
    proto = model(nodes, [IDS], [value("y", ["batch", 4])], constants)
    rows = [[random.integers(1, 50, (1, length))] for length in range(140, 160)]
    signature, why = found(proto, tmp_path, rows)
    assert signature.coalescible
    assert signature.inputs[0].length_axis is None
    assert "padding with 0 changes the outputs" in why


@pytest.mark.parametrize("kind", ["ReduceMax", "ReduceMin"])
@pytest.mark.parametrize("sign", [1, -1])
def test_padding_that_the_sign_of_one_number_hides_is_no_length_axis(
    tmp_path: Path, kind: str, sign: int
) -> None:
    """The largest of numbers is that of the padding only where all of them are negative."""
    nodes = [helper.make_node(kind, ["x"], ["y"], axes=[1], keepdims=0)]
    proto = model(nodes, [value("x", ["batch", "length"])], [value("y", ["batch"])])
    random = np.random.default_rng(0)
    rows = [[sign * random.normal(size=(1, 20)).astype(np.float32)] for _ in range(9)]
    for given in ([], rows):
        signature, why = found(proto, tmp_path, given)
        assert signature.inputs[0].batch_axis == 0
        assert signature.inputs[0].length_axis is None
        assert "padding with 0 changes the outputs" in why


def test_padding_that_few_of_many_rows_show_is_no_length_axis(tmp_path: Path) -> None:
    """Of one number a token, that of the padding hides behind those of most first tokens."""
    table = np.arange(50, dtype=np.float32)[:, None]
    table[0] = 5  # above the tokens 1 to 4 alone
    nodes = [LOOK_UP, helper.make_node("ReduceMax", ["words"], ["y"], axes=[1], keepdims=0)]
    weights = [numpy_helper.from_array(table, "table")]
    proto = model(nodes, [IDS], [value("y", ["batch", 1])], weights)
    random = np.random.default_rng(0)
    rows = [[random.integers(9, 50, (1, 12))] for _ in range(64)]
    for row in rows[5::10]:
        row[0][0, :4] = 1, 3, 2, 4
    signature, why = found(proto, tmp_path, rows)
    assert signature.inputs[0].batch_axis == 0
    assert signature.inputs[0].length_axis is None
    assert "padding with 0 changes the outputs" in why


def test_no_call_of_many_rows_is_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention takes the square: two rows of 2,048 tokens are asked together, not 33."""
    shapes = list[tuple[int, int]]()
    run = batching.run_together

    def counted(session: Any, rows: list[Any], signature: Any) -> Any:
        shapes.append((len(rows), max(row[0].shape[1] for row in rows)))
        return run(session, rows, signature)

    monkeypatch.setattr(axes, "run_together", counted)
    nodes = [LOOK_UP, helper.make_node("Relu", ["words"], ["y"])]
    proto = model(nodes, [IDS], [value("y", ["batch", "sequence", 4])], [TABLE])
    random = np.random.default_rng(0)
    rows = [[random.integers(1, 50, (1, length))] for length in (*range(20, 276), 2048)]
    signature, _ = found(proto, tmp_path, rows)
    assert signature.inputs[0].length_axis == 1
    assert (2, 2048) in shapes
    assert max(count for count, _ in shapes) > 30
    assert all(count == 2 or length <= 64 for count, length in shapes)


def test_an_extent_that_an_input_has_twice_is_no_length(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["mask"], ["weights"], to=TensorProto.FLOAT),
        LOOK_UP,
        helper.make_node("MatMul", ["weights", "words"], ["y"]),
    ]
    mask = value("mask", ["batch", "sequence", "sequence"], TensorProto.INT64)
    proto = model(nodes, [IDS, mask], [value("y", ["batch", "sequence", 4])], [TABLE])
    assert assume_axes(declared(proto)).inputs[0].length_axis is None
    signature, why = found(proto, tmp_path, [[np.ones((1, 6), int), np.ones((1, 6, 6), int)]] * 3)
    assert signature.inputs[0].batch_axis == 0
    assert "no length axis" in why


def test_an_output_without_a_shape_has_the_one_that_follows(tmp_path: Path) -> None:
    proto = masked_sum()
    proto.graph.output[1].type.tensor_type.ClearField("shape")
    signature, _ = found(proto, tmp_path)
    assert [spec.shape[1:] for spec in signature.outputs] == [("sequence", 4), (4,)]
    assert signature.coalescible


def test_real_rows_of_one_length_still_show_that_padding_matters(tmp_path: Path) -> None:
    rows = [[np.full((1, 6), i, np.int64)] for i in range(1, 20)]
    signature, _ = found(plain_mean(), tmp_path, rows)
    assert signature.inputs[0].length_axis is None


def test_rows_of_one_element_show_no_length_axis(tmp_path: Path) -> None:
    rows = [[np.full((1, 1), i, np.int64)] for i in range(1, 20)]
    signature, why = found(plain_mean(), tmp_path, rows)
    assert signature.coalescible
    assert signature.inputs[0].length_axis is None
    assert "rows of one element do not tell; see --axes" in why


def test_a_model_that_refuses_short_rows_has_axes_by_those_that_it_takes(tmp_path: Path) -> None:
    """As one has that gives the best ten of some items."""
    nodes = [
        helper.make_node("Cast", ["mask"], ["there"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["there", "one"], ["absent"]),
        helper.make_node("Mul", ["absent", "much"], ["penalty"]),
        helper.make_node("Add", ["scores", "penalty"], ["masked"]),
        helper.make_node("TopK", ["masked", "ten"], ["y", "places"], axis=1),
    ]
    constants = [
        numpy_helper.from_array(np.array(1, np.float32), "one"),
        numpy_helper.from_array(np.array(1e9, np.float32), "much"),
        numpy_helper.from_array(np.array([10]), "ten"),
    ]
    mask = value("mask", ["batch", "items"], TensorProto.INT64)
    inputs = [value("scores", ["batch", "items"]), mask]
    proto = model(nodes, inputs, [value("y", ["batch", 10])], constants)
    random = np.random.default_rng(0)
    rows: list[list[Array]] = [
        [random.random((1, length), np.float32), np.ones((1, length), np.int64)]
        for length in range(24, 32)
    ]
    signature, _ = found(proto, tmp_path, rows)
    assert signature.coalescible
    assert [spec.length_axis for spec in signature.inputs] == [1, 1]


def test_a_difference_that_one_place_hardly_makes_is_found(tmp_path: Path) -> None:
    """Rows of one length, over which a mean is taken: one place of many is a small part of it."""
    nodes = [helper.make_node("ReduceMean", ["x"], ["y"], axes=[1], keepdims=1)]
    proto = model(nodes, [value("x", ["batch", "samples"])], [value("y", ["batch", 1])])
    random = np.random.default_rng(0)
    rows = [[1 + random.random((1, 30_000), np.float32) / 9] for _ in range(8)]
    signature, _ = found(proto, tmp_path, rows)
    assert signature.inputs[0].length_axis is None


@pytest.mark.parametrize("shape", [[1, -1], [0, 12]])
def test_a_model_that_refuses_what_an_axis_would_allow_has_not_got_it(
    tmp_path: Path, shape: list[int]
) -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    constants = [numpy_helper.from_array(np.array(shape), "shape")]
    proto = model(nodes, [value("x", ["batch", "n"])], [value("y", ["batch", "m"])], constants)
    rows = [[np.full((1, 12), i, np.float32)] for i in range(1, 9)]
    signature, _ = found(proto, tmp_path, rows)
    assert signature.coalescible == (shape[0] == 0)
    assert signature.inputs[0].length_axis is None


def test_rows_that_depend_on_one_another_have_no_batch_axis(tmp_path: Path) -> None:
    signature, why = found(row_softmax(), tmp_path)
    assert not signature.coalescible
    assert "depend on the rows beside it" in why


@pytest.mark.parametrize("scale", [1e-3, 1e-5, 1e3])
def test_rows_that_depend_on_one_another_do_so_whatever_their_size(
    tmp_path: Path, scale: float
) -> None:
    """Of small answers, as probabilities of what is rare, a difference is small."""
    proto = row_softmax()
    proto.graph.node[0].output[0] = "shares"
    proto.graph.node.append(helper.make_node("Mul", ["shares", "scale"], ["y"]))
    size = numpy_helper.from_array(np.array(scale, np.float32), "scale")
    proto.graph.initializer.append(size)
    assert not found(proto, tmp_path)[0].coalescible
    alone = linear()
    alone.graph.node[0].output[0] = "scores"
    alone.graph.node.append(helper.make_node("Mul", ["scores", "scale"], ["y"]))
    alone.graph.initializer.append(size)
    assert found(alone, tmp_path)[0].coalescible


def test_rows_that_only_many_others_change_have_no_batch_axis(tmp_path: Path) -> None:
    """As where an expert of a mixture takes so many rows of a call, and no more."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["ones"], value=ONE),
        helper.make_node("CumSum", ["ones", "first"], ["place"]),
        helper.make_node("LessOrEqual", ["place", "room"], ["there"]),
        helper.make_node("Where", ["there", "x", "none"], ["y"]),
    ]
    numbers = {"first": np.array(0), "room": np.float32(3), "none": np.float32(0)}
    constants = [numpy_helper.from_array(np.asarray(v), name) for name, v in numbers.items()]
    ends = [value("x", ["batch", 3])], [value("y", ["batch", 3])]
    proto = model(nodes, *ends, constants)
    for rows in ([], [[np.full((1, 3), i, np.float32)] for i in range(1, 5)]):
        assert not found(proto, tmp_path, rows)[0].coalescible


def test_a_length_a_row_that_sizes_the_answer_to_the_longest_has_no_batch_axis(
    tmp_path: Path,
) -> None:
    """As a mask made of lengths: it has as many places as the longest of a call."""
    nodes = [
        helper.make_node("ReduceMax", ["lengths"], ["longest"], keepdims=0),
        helper.make_node("Range", ["none", "longest", "one"], ["places"]),
        helper.make_node("Unsqueeze", ["lengths", "last"], ["each"]),
        helper.make_node("Less", ["places", "each"], ["y"]),
    ]
    numbers = {"none": np.array(0), "one": np.array(1), "last": np.array([1])}
    constants = [numpy_helper.from_array(v, name) for name, v in numbers.items()]
    inputs = [value("lengths", ["batch"], TensorProto.INT64)]
    outputs = [value("y", ["batch", "places"], TensorProto.BOOL)]
    assert not found(model(nodes, inputs, outputs, constants), tmp_path)[0].coalescible


def test_rows_of_which_few_differ_still_show_that_they_depend_on_one_another(
    tmp_path: Path,
) -> None:
    """As on how many steps the slowest of a call takes, which is one of most."""
    nodes = [
        helper.make_node("ReduceMax", ["steps"], ["most"], keepdims=1),
        helper.make_node("Add", ["steps", "most"], ["y"]),
    ]
    ends = [[value(name, ["batch"], TensorProto.INT64)] for name in ("steps", "y")]
    rows: list[list[Array]] = [[np.array([1 + (i == 2)])] for i in range(40)]
    signature, why = found(model(nodes, *ends), tmp_path, rows)
    assert not signature.coalescible
    assert "depend on the rows beside it" in why


def test_an_integer_a_row_that_can_be_nothing_but_one_has_a_batch_axis(tmp_path: Path) -> None:
    """As the row of a table with two, of which none has the number two."""
    two = numpy_helper.from_array(np.ones((2, 4), np.float32), "table")
    inputs = [value("ids", ["batch"], TensorProto.INT64)]
    proto = model([LOOK_UP], inputs, [value("words", ["batch", 4])], [two])
    assert found(proto, tmp_path)[0].coalescible


@pytest.mark.parametrize("kind", ["words", "longest"])
def test_texts_beside_a_longer_one_are_padded(tmp_path: Path, kind: str) -> None:
    """A model that takes their padding for words answers by what it is asked beside."""
    nodes = [
        helper.make_node("StringSplit", ["text"], ["parts", "words"], delimiter=" "),
        helper.make_node("Shape", ["parts"], ["width"], start=1),
        helper.make_node("Sub", ["words", "words"], ["noughts"]),
        helper.make_node("Add", ["noughts", "width"], ["longest"]),
        helper.make_node("Identity", [kind], ["y"]),
    ]
    ends = (
        [value("text", ["batch"], TensorProto.STRING)],
        [value("y", ["batch"], TensorProto.INT64)],
    )
    proto = model(nodes, *ends, opset=20)
    assert found(proto, tmp_path)[0].coalescible == (kind == "words")


def test_a_number_for_all_rows_has_no_batch_axis_and_nothing_is_coalesced(tmp_path: Path) -> None:
    """A loss beside the scores, say."""
    nodes = [
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("ReduceSum", ["x"], ["loss"], keepdims=0),
    ]
    outputs = [value("y", ["batch", 3]), value("loss", [])]
    signature, why = found(model(nodes, [value("x", ["batch", 3])], outputs), tmp_path)
    assert not signature.coalescible
    assert "outputs have no rows" in why


def test_a_fixed_first_dimension_is_no_batch_axis(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    signature, why = found(proto, tmp_path)
    assert not signature.coalescible
    assert "no free first dimension" in why


@pytest.mark.parametrize("made_up", ["", "unk__495"])
def test_first_dimensions_without_a_name_are_the_batch_if_they_behave_so(
    tmp_path: Path, made_up: str
) -> None:
    proto = masked_sum()
    for number, entry in enumerate(proto.graph.input):
        for axis, dim in enumerate(entry.type.tensor_type.shape.dim):
            dim.dim_param = made_up and f"{made_up}{number}{axis}"
    signature, _ = found(proto, tmp_path)
    assert [spec.batch_axis for spec in signature.inputs] == [0, 0]
    assert [spec.length_axis for spec in signature.inputs] == [None, None]
    scores = model(
        [
            helper.make_node("Transpose", ["b"], ["c"], perm=[1, 0]),
            helper.make_node("MatMul", ["a", "c"], ["y"]),
        ],
        [value("a", ["", 4]), value("b", ["", 4])],
        [value("y", ["", ""])],
    )
    for dims in (d for v in scores.graph.input for d in v.type.tensor_type.shape.dim):
        if not dims.dim_value:
            dims.ClearField("dim_param")
    signature, _ = found(scores, tmp_path)  # each of one with each of the other
    assert not signature.coalescible


def test_first_dimensions_of_different_names_are_not_taken_for_the_same() -> None:
    proto = masked_sum()
    proto.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "masks"
    assert assume_axes(declared(proto)).inputs[0].batch_axis is None


def test_labels_that_stay_whatever_is_padded_show_no_length_axis(tmp_path: Path) -> None:
    """Nor does a score that is 1 for whatever is made up."""
    weights = numpy_helper.from_array(np.array([[0.0, 90.0]] * 4, np.float32), "weights")
    nodes = [
        LOOK_UP,
        helper.make_node("ReduceMean", ["words"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("Abs", ["mean"], ["size"]),
        helper.make_node("MatMul", ["size", "weights"], ["scores"]),
    ]
    last = {
        "ArgMax": (helper.make_node("ArgMax", ["scores"], ["y"], axis=1), TensorProto.INT64),
        "Softmax": (helper.make_node("Softmax", ["scores"], ["y"], axis=1), TensorProto.FLOAT),
    }
    each = [
        LOOK_UP,
        helper.make_node("Abs", ["words"], ["sizes"]),
        helper.make_node("MatMul", ["sizes", "weights"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["y"], axis=2),
    ]
    tokens = value("y", ["batch", "sequence", 2])  # of each token, and of one shape a length
    signature, _ = found(model(each, [IDS], [tokens], [TABLE, weights]), tmp_path)
    assert signature.inputs[0].length_axis is None
    for node, kind in last.values():
        out = value("y", ["batch", 1 if kind == TensorProto.INT64 else 2], kind)
        signature, why = found(model([*nodes, node], [IDS], [out], [TABLE, weights]), tmp_path)
        assert signature.coalescible
        assert signature.inputs[0].length_axis is None
        assert "made-up rows do not tell" in why


def test_a_file_states_axes_pad_value_and_map(tmp_path: Path) -> None:
    (tmp_path / "axes.toml").write_text(
        "[inputs.ids]\nbatch = 0\nlength = 1\npad = 7\n[outputs.total]\nmap = 'softmax'\n"
        f"[inputs.mask]\npad = {np.finfo(np.float32).min}\n"
    )
    signature = apply_axes(declared(masked_sum()), tmp_path / "axes.toml")
    ids, mask = signature.inputs
    assert (ids.batch_axis, ids.length_axis, ids.pad_value) == (0, 1, 7)
    assert mask.batch_axis is None
    assert [spec.output_map for spec in signature.outputs] == ["raw", "softmax"]


def test_a_file_that_states_no_map_leaves_what_the_graph_says(tmp_path: Path) -> None:
    (tmp_path / "axes.toml").write_text("[outputs.total]\nbatch = 0\n")
    proto = masked_sum()
    (total,) = (output for output in proto.graph.output if output.name == "total")
    total.doc_string = Imported.DERIVED
    (_, spec) = apply_axes(declared(proto), tmp_path / "axes.toml").outputs
    assert (spec.output_map, spec.batch_axis) == ("derived", 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[input.ids]\nbatch = 0", r"toml: .*unknown field `input`; known: .*inputs.*outputs"),
        ("[inputs.id]\nbatch = 0", r"no input 'id'; it has \['ids', 'mask'\]"),
        ("[inputs.ids]\naxis = 0", r"'ids': .*unknown field `axis`; known: batch, length, pad"),
        ("[inputs.ids]\nbatch = 'x'", "axes of 'ids': Expected"),
        ("[outputs.total]\nmap = 'log'", "axes of 'total': Invalid enum value"),
        ("inputs = 3", r"Expected `object`, got `int` - at `\$\.inputs`"),
        ("[inputs.mask]\npad = -inf", "axes of 'mask': Expected `float` >= -3"),
        ("[inputs.mask]\npad = nan", "axes of 'mask': Expected `float`"),
        ("[inputs.ids]\nlength = 2", "length axis 2 of 'ids' is none of its dimensions"),
        ("not toml", "Expected"),
    ],
)
def test_a_wrong_axes_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "axes.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        apply_axes(declared(masked_sum()), tmp_path / "axes.toml")


def test_output_maps_apply_to_floats_only() -> None:
    nodes = [helper.make_node("ArgMax", ["x"], ["y"], axis=1)]
    proto = model(nodes, [value("x", ["n", 3])], [value("y", ["n", 1], TensorProto.INT64)])
    assert with_choices(declared(proto), "softmax", ()).outputs[0].output_map == "raw"


def test_a_map_that_is_stated_stays_and_a_single_score_has_none() -> None:
    def output(name: str, last: int, output_map: OutputMap = "raw") -> TensorSpec:
        shape = ("n", last)
        return TensorSpec(
            name=name, datatype="FP32", shape=shape, batch_axis=0, output_map=output_map
        )

    outputs = (output("logits", 3), output("vector", 3, "l2_normalised"), output("score", 1))
    asked = with_choices(Signature(inputs=(), outputs=outputs), "softmax", ())
    assert [spec.output_map for spec in asked.outputs] == ["softmax", "l2_normalised", "raw"]


@pytest.mark.parametrize(
    ("batch", "length", "calls", "said"),
    [
        (0, 1, [(8, 0)], "rows and length, as 8x16"),
        (0, None, [(8, 16)], "rows alone, as 8"),
        (0, 1, [(0, 16)], "Expected `int` >= 1"),
        (0, 1, [(1, 1 << 20)], "Expected `int` <= 65536"),
        (0, 1, [(1, 1)] * 65, "length <= 64"),
        (0, 1, "8x16", "Expected `array`, got `str`"),
        (None, None, [(1, 0)], "the model has no batch axis"),
    ],
)
def test_a_call_that_is_none_of_the_model_is_refused(
    batch: int | None, length: int | None, calls: Any, said: str
) -> None:
    spec = TensorSpec(
        name="x", datatype="INT64", shape=("n", "l"), batch_axis=batch, length_axis=length
    )
    signature = Signature(inputs=(spec,), outputs=(spec,))
    with pytest.raises(UsageError, match=f"calls of this model, .*: .*{said}"):
        with_choices(signature, "raw", calls)


def test_calls_that_are_those_of_the_model_are_told_with_it() -> None:
    spec = TensorSpec(name="x", datatype="INT64", shape=("n", "l"), batch_axis=0, length_axis=1)
    signature = with_choices(Signature(inputs=(spec,), outputs=(spec,)), "raw", [[8, 16], (1, 16)])
    assert signature.calls == ((8, 16), (1, 16))
