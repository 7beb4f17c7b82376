from __future__ import annotations

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrai_core.errors import CalibrationError, VerificationError
from lrai_core.protocol import Array, Signature, TensorSpec
from lrai_core.verifier import sample
from lrai_core.verifier.sample import Rows, disjoint, load_rows, read_rows, save_rows
from tests.core import small_artifact

TABLE = small_artifact.SIGNATURE
TOKENS = Signature(
    inputs=tuple(
        TensorSpec(
            name=name,
            datatype="INT64",
            shape=("batch", "sequence"),
            batch_axis=0,
            length_axis=1,
            pad_value=pad,
        )
        for name, pad in (("ids", 9), ("mask", 0))
    ),
    outputs=(),
)


def x(count: int = 4) -> Array:
    return np.arange(count * 3, dtype=np.float32).reshape(count, 3)


def floats(values: object) -> Array:
    return np.array(values, dtype=np.float32)


def refusal(data: Any, signature: Signature = TABLE) -> str:
    with pytest.raises(CalibrationError) as caught:
        read_rows(data, signature, "evaluation")
    message = str(caught.value)
    assert message.startswith("evaluation: ")
    assert message.isprintable()
    assert len(message) < 400
    return message


def test_rows_come_one_by_one_with_their_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", x=x(), label=np.arange(4))
    rows, repeated = read_rows(tmp_path / "e.npz", TABLE, "evaluation")
    assert (len(rows), repeated) == (4, 0)
    assert [row[0].shape for row in rows.inputs] == [(1, 3)] * 4
    np.testing.assert_array_equal(np.concatenate([row[0] for row in rows.inputs]), x())
    assert rows.labels is not None
    assert rows.labels.tolist() == [0, 1, 2, 3]


def test_a_model_with_one_input_reads_npy_and_both_take_a_path_as_text(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", x())
    assert len(read_rows(str(tmp_path / "e.npy"), TABLE, "evaluation")[0]) == 4


def test_a_table_of_one_column_may_be_given_as_a_column() -> None:
    one = TensorSpec(name="x", datatype="FP32", shape=("batch", 1), batch_axis=0)
    for column in (x()[:, 0], x()[:, :1]):
        rows, _ = read_rows({"x": column}, Signature(inputs=(one,), outputs=()), "evaluation")
        assert [row[0].tolist() for row in rows.inputs] == [[[value]] for value in x()[:, 0]]


def test_repeated_rows_are_left_out_and_one_of_each_stays_in_order() -> None:
    data = x()[[2, 0, 2, 1, 0]]
    rows, repeated = read_rows({"x": data, "label": np.arange(5)}, TABLE, "evaluation")
    assert repeated == 2
    assert rows.labels is not None
    assert len(set(rows.labels.tolist()) & {0, 2}) == len(set(rows.labels.tolist()) & {1, 4}) == 1
    assert rows.labels.tolist() == sorted(rows.labels.tolist())
    np.testing.assert_array_equal(np.concatenate([r[0] for r in rows.inputs]), data[rows.labels])


def test_what_labels_say_of_repeated_rows_is_the_same_however_they_are_sorted() -> None:
    """Of 2,000 rows four times each, of which three have the label 1."""
    one = TensorSpec(name="x", datatype="FP32", shape=("batch", 1), batch_axis=0)
    data, labels = np.tile(np.arange(2_000, dtype=np.float32), 4), np.repeat([0, 1, 1, 1], 2_000)
    for order in (np.arange(8_000), np.arange(8_000)[::-1]):
        given = {"x": data[order], "label": labels[order]}
        rows, _ = read_rows(given, Signature(inputs=(one,), outputs=()), "evaluation")
        assert rows.labels is not None
        assert rows.labels.mean() == pytest.approx(0.75, abs=0.04)


def test_padding_is_cut_off_where_every_input_holds_its_pad_value() -> None:
    ids = np.array([[1, 2, 9, 9], [1, 9, 9, 9], [9, 9, 9, 9], [1, 2, 3, 4]])
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    rows, _ = read_rows({"ids": ids, "mask": mask}, TOKENS, "evaluation")
    assert [row[0].tolist() for row in rows.inputs] == [[[1, 2, 9]], [[1]], [[9]], [[1, 2, 3, 4]]]
    assert [row[1].shape for row in rows.inputs] == [(1, 3), (1, 1), (1, 1), (1, 4)]


def test_a_row_is_the_same_row_however_far_it_was_padded() -> None:
    short, long = np.array([[1, 2, 9]]), np.array([[1, 2, 9, 9, 9]])
    one = read_rows({"ids": short, "mask": short != 9}, _int_mask(), "evaluation")[0]
    other = read_rows({"ids": long, "mask": long != 9}, _int_mask(), "evaluation")[0]
    assert one.hashes == other.hashes


def _int_mask() -> Signature:
    return TOKENS


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "got arrays nothing, needed 'x'"),
        ({"y": x()}, "got arrays 'y', needed 'x' and optionally 'label'"),
        ({"x": x(), "z": x()}, "got arrays 'x', 'z', needed 'x'"),
        ({"x": x(), "\0" * 100_000: x()}, "needed 'x'"),
        ({str(n): x() for n in range(1000)}, "needed 'x'"),
        ({"x": x(0)}, "no rows"),
        ({"x": x()[0]}, "row 0: tensor 'x': shape [] has 0 dimensions, [batch, 3] is needed"),
        ({"x": x()[:, :2]}, "row 0: tensor 'x': dimension 1 is 2, [batch, 3] is needed"),
        ({"x": x(), "label": np.arange(3)}, "different numbers of rows: [3, 4]"),
        ({"x": x(), "label": np.arange(4.0)}, "is float64 [4]: leave it out to judge by agreement"),
        ({"x": x(), "label": np.zeros((4, 1), int)}, "one integer per row"),
        ({"x": x(), "label": np.array(1)}, "different numbers of rows"),
        ({"x": x().astype(np.int32)}, "datatype INT32, the model takes FP32"),
        ({"x": x().astype(str)}, "datatype BYTES, the model takes FP32"),
        ({"x": x().astype(complex)}, "dtype complex128 is not a datatype"),
        ({"x": floats([[0, 1, 2], [0, np.nan, 2]])}, "row 1: tensor 'x': holds NaN or infinity"),
        ({"x": floats([[0, 1, np.inf]])}, "row 0: tensor 'x': holds NaN or infinity"),
        ({"x": np.array([[0, 1, 1e300]])}, "row 0: tensor 'x': holds NaN"),  # no float32
    ],
)
def test_data_that_does_not_fit_is_refused_with_got_and_needed(
    data: dict[str, Any], message: str
) -> None:
    assert message in refusal(data)


def test_a_wider_float_is_taken_and_a_wider_integer_if_nothing_is_lost() -> None:
    assert read_rows({"x": x().astype(np.float64)}, TABLE, "e")[0].inputs[0][0].dtype == np.float32
    narrow = Signature(
        inputs=(TensorSpec(name="x", datatype="INT8", shape=("n",), batch_axis=0),), outputs=()
    )
    assert read_rows({"x": np.array([1, -2])}, narrow, "e")[0].inputs[1][0].tolist() == [-2]
    assert "the model takes INT8" in refusal({"x": np.array([1, 200])}, narrow)
    assert "the model takes INT8" in refusal({"x": np.array([1.0])}, narrow)


def test_text_becomes_text_and_anything_else_is_refused() -> None:
    words = Signature(
        inputs=(TensorSpec(name="w", datatype="BYTES", shape=("n",), batch_axis=0),), outputs=()
    )
    rows, _ = read_rows({"w": np.array([b"a", b"b"])}, words, "evaluation")
    assert [row[0].tolist() for row in rows.inputs] == [["a"], ["b"]]
    assert "the model takes BYTES" in refusal({"w": np.arange(2)}, words)
    assert "not UTF-8" in refusal({"w": np.array([b"\xff"])}, words)
    assert "text is needed" in refusal({"w": np.array([None])}, words)


def test_a_file_of_texts_that_are_objects_says_what_texts_are_to_be(tmp_path: Path) -> None:
    """As a column of pandas has them."""
    words = Signature(
        inputs=(TensorSpec(name="w", datatype="BYTES", shape=("n",), batch_axis=0),), outputs=()
    )
    np.savez(tmp_path / "rows.npz", w=np.array(["a", "b"], object))
    with pytest.raises(CalibrationError, match="'w' holds objects of Python; of texts make an arr"):
        read_rows(tmp_path / "rows.npz", words, "evaluation")
    np.savez(tmp_path / "rows.npz", w=np.array(["a", "b"], str))
    assert len(read_rows(tmp_path / "rows.npz", words, "evaluation")[0]) == 2


def test_a_scalar_input_is_one_number_per_row() -> None:
    scalar = Signature(inputs=(TensorSpec(name="x", datatype="FP32", shape=()),), outputs=())
    rows, _ = read_rows({"x": floats([1, 2])}, scalar, "evaluation")
    assert [row[0].shape for row in rows.inputs] == [(), ()]
    assert "[] is needed" in refusal({"x": np.ones((2, 2), np.float32)}, scalar)


def test_without_a_batch_axis_rows_are_stacked_in_front() -> None:
    fixed = Signature(inputs=(TensorSpec(name="x", datatype="FP32", shape=(2, 3)),), outputs=())
    rows, _ = read_rows({"x": np.zeros((1, 2, 3), np.float32)}, fixed, "evaluation")
    assert rows.inputs[0][0].shape == (2, 3)


def test_inputs_of_one_row_that_contradict_each_other_are_refused() -> None:
    data = {"ids": np.ones((2, 3), int), "mask": np.ones((2, 4), int)}
    assert "row 0: tensor 'mask': has length 4, other inputs have 3" in refusal(data, TOKENS)


def test_an_input_may_be_called_label() -> None:
    spec = TensorSpec(name="label", datatype="FP32", shape=("n", 3), batch_axis=0)
    rows, _ = read_rows({"label": x()}, Signature(inputs=(spec,), outputs=()), "evaluation")
    assert (len(rows), rows.labels) == (4, None)


def test_an_array_that_is_not_wanted_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "e.npz", x=x(), bomb=np.zeros(1000))
    unpacked, read = [], np.lib.format.read_array

    def recorded(*arguments: Any, **options: Any) -> Array:
        unpacked.append(read(*arguments, **options))
        return unpacked[-1]

    monkeypatch.setattr("numpy.lib._npyio_impl.format.read_array", recorded)
    message = "got arrays 'x', 'bomb', needed 'x' and optionally 'label'"
    assert message in refusal(tmp_path / "e.npz")
    assert unpacked == []


def store(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content))
    return path


def test_an_evaluation_file_that_unpacks_to_too_much_is_refused_before_it_is(
    tmp_path: Path,
) -> None:
    nothing = bytes([0xDD]) + (1 << 28).to_bytes(4, "big") + b"\x90" * (1 << 28)
    path = store(tmp_path / "evaluation.msgpack.gz", nothing)
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(VerificationError, match="cannot be read: Expected `array` of length"):
        load_rows(path, TABLE)
    assert tracemalloc.get_traced_memory()[1] < 400 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "cannot be read"),
        ([[[1, 3], bytes(12)]] * 2, "cannot be read"),
        ([[[1, 4], bytes(16)]], "dimension 1 is 4"),
        ([[[3], bytes(12)]], "has 1 dimensions"),
        ([[[1, 3], bytes(11)]], "got 11 bytes"),
        ([[[1, -3], bytes(12)]], "negative"),
        ([[[1 << 62, 3], b""]], "needs more than memory"),
        ([[[2, 3], bytes(24)]], "2 rows, at most 1"),
        ([[[1, 3], np.array([1, 2, np.nan], np.float32).tobytes()]], "holds NaN"),
        ([[[1, 3], "text"]], "Expected `bytes`"),
        ([[[1, 3]]], "Expected `array` of length 2"),
        ({}, "Expected `array`"),
    ],
)
def test_a_stored_row_that_the_model_does_not_take_is_refused(
    tmp_path: Path, row: Any, message: str
) -> None:
    path = store(tmp_path / "evaluation.msgpack.gz", msgspec.msgpack.encode([row]))
    with pytest.raises(VerificationError, match="cannot be read") as caught:
        load_rows(path, TABLE)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_row_is_no_second_row_for_being_padded_further(tmp_path: Path) -> None:
    two = Signature(inputs=TOKENS.inputs[:1], outputs=())
    short, long = np.array([[1, 2]]), np.array([[1, 2, 9]])
    rows = [[[array.shape, array.tobytes()]] for array in (short, long)]
    path = store(tmp_path / "evaluation.msgpack.gz", msgspec.msgpack.encode(rows))
    with pytest.raises(VerificationError, match="a row is listed twice"):
        load_rows(path, two)


@pytest.mark.parametrize("name", ["missing.npz", "missing.npy"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    assert f"{name} cannot be read: [Errno 2] No such file" in refusal(tmp_path / name)


def test_another_kind_of_file_is_refused_by_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("x\n1\n")
    assert ".npz is needed" in refusal(tmp_path / "e.csv")
    np.save(tmp_path / "e.npy", np.ones((2, 2), int))
    assert ".npz is needed" in refusal(tmp_path / "e.npy", TOKENS)


def test_a_file_with_pickles_is_refused_unread(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", x=np.array([{"a": 1}], dtype=object))
    assert "cannot be read" in refusal(tmp_path / "e.npz")


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "array",
    [x(), x().astype(">f8"), np.asfortranarray(x().astype(np.float64))],
    ids=["float32", "big-endian", "by column"],
)
def test_rows_of_an_archive_are_what_was_written(
    tmp_path: Path, write: Callable[..., None], array: Array
) -> None:
    write(tmp_path / "e.npz", label=np.arange(4), x=array)
    rows, _ = read_rows(tmp_path / "e.npz", TABLE, "evaluation")
    np.testing.assert_array_equal(np.concatenate([row[0] for row in rows.inputs]), x())
    for (own,) in rows.inputs:
        assert own.dtype == np.dtype(np.float32)
        assert own.flags.c_contiguous
        assert own.flags.aligned
    assert rows.labels is not None
    assert rows.labels.tolist() == [0, 1, 2, 3]


def test_an_archive_that_has_changed_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", x=x())
    content = bytearray((tmp_path / "e.npz").read_bytes())
    content[content.index(x()[1].tobytes())] ^= 1
    (tmp_path / "e.npz").write_bytes(content)
    assert "x has changed since it was written" in refusal(tmp_path / "e.npz")


def test_objects_of_a_file_are_no_texts(tmp_path: Path) -> None:
    """Mapped, they would be addresses."""
    spec = TensorSpec(name="w", datatype="BYTES", shape=("n",), batch_axis=0)
    np.savez(tmp_path / "e.npz", w=np.array(["a", "b"], object))
    signature = Signature(inputs=(spec,), outputs=())
    assert "cannot be read" in refusal(tmp_path / "e.npz", signature)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", b"\0" * 1000])
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_a_file_that_is_something_else_is_refused(
    tmp_path: Path, content: bytes, suffix: str
) -> None:
    (tmp_path / f"e{suffix}").write_bytes(content)
    refusal(tmp_path / f"e{suffix}")


def test_an_array_that_calls_itself_an_archive_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", x())
    (tmp_path / "e.npy").rename(tmp_path / "e.npz")
    refusal(tmp_path / "e.npz")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "e.npz"
    np.savez(path, x=x())
    save_rows(path.with_name("evaluation.msgpack.gz"), small_artifact.rows(5))
    return path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")  # numpy, of headers it repairs and old names of types
def test_a_damaged_file_is_read_or_refused_and_nothing_else(
    saved: Path, data: st.DataObject
) -> None:
    evaluation = saved.with_name("evaluation.msgpack.gz")
    inside = saved.with_name("inside")
    inside.write_bytes(gzip.decompress(evaluation.read_bytes()))
    for file in (saved, evaluation, inside):
        content = bytearray(file.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
        damaged = file.with_name(f"damaged-{file.name}")
        damaged.write_bytes(content if data.draw(st.booleans()) else content[:at])
        try:
            if file is saved:
                read_rows(damaged, TABLE, "evaluation")
            elif file is evaluation:
                load_rows(damaged, TABLE)
            else:
                load_rows(store(damaged, damaged.read_bytes()), TABLE)
        except (CalibrationError, VerificationError) as error:
            assert len(str(error)) < 400  # noqa: PT017 - it may be raised, and then it is short


def test_sets_that_share_a_row_are_refused_with_how_many() -> None:
    first, second = small_artifact.rows(5, seed=1), small_artifact.rows(5, seed=2)
    disjoint(first, second, "search and gate")
    with pytest.raises(CalibrationError, match="search and gate share 2 rows"):
        disjoint(first, Rows([], None, [*second.hashes, *first.hashes[:2]]), "search and gate")


def test_taken_rows_keep_inputs_labels_and_hashes_together() -> None:
    rows, _ = read_rows({"x": x(), "label": np.arange(4)}, TABLE, "evaluation")
    taken = rows.take([3, 1])
    assert taken.hashes == [rows.hashes[3], rows.hashes[1]]
    assert np.shares_memory(taken.inputs[0][0], rows.inputs[3][0])
    assert taken.labels is not None
    assert taken.labels.tolist() == [3, 1]
    assert read_rows({"x": x()}, TABLE, "evaluation")[0].take([0]).labels is None


def test_saved_rows_come_back_with_their_hashes(tmp_path: Path) -> None:
    ids = np.array([[1, 2, 9], [3, 9, 9]])
    scalar = Signature(inputs=(TensorSpec(name="x", datatype="FP32", shape=()),), outputs=())
    fixed = Signature(inputs=(TensorSpec(name="x", datatype="FP32", shape=(2, 3)),), outputs=())
    for signature, rows in (
        (scalar, read_rows({"x": floats([1, 2])}, scalar, "e")[0]),
        (fixed, read_rows({"x": np.arange(12.0).reshape(2, 2, 3)}, fixed, "e")[0]),
        (TABLE, small_artifact.rows(6)),
        (TOKENS, read_rows({"ids": ids, "mask": (ids != 9).astype(int)}, TOKENS, "e")[0]),
    ):
        kept = save_rows(tmp_path / "evaluation.msgpack.gz", rows)
        found = load_rows(tmp_path / "evaluation.msgpack.gz", signature)
        assert found.hashes == rows.hashes == kept.hashes
        for row, original in zip(found.inputs, rows.inputs, strict=True):
            for a, b in zip(row, original, strict=True):
                np.testing.assert_array_equal(a, b)


def test_only_the_first_rows_that_fit_the_room_are_kept(tmp_path: Path) -> None:
    wide = Signature(
        inputs=(TensorSpec(name="x", datatype="UINT8", shape=("n", "w"), batch_axis=0),), outputs=()
    )
    big = np.zeros((3, 7 << 20), np.uint8)
    big[:, 0] = range(3)
    rows, _ = read_rows({"x": big}, wide, "evaluation")
    kept = save_rows(tmp_path / "evaluation.msgpack.gz", rows)
    found = load_rows(tmp_path / "evaluation.msgpack.gz", wide)
    assert found.hashes == kept.hashes == rows.hashes[:2]


def test_one_long_row_costs_only_its_own_length(tmp_path: Path) -> None:
    long, short = np.ones((1, 1 << 16), np.int64), np.ones((1, 1), np.int64)
    rows = Rows([[long, long], *[[short, short]] * 1000], None, [b""] * 1001)
    assert len(save_rows(tmp_path / "evaluation.msgpack.gz", rows)) == 1001
    assert len(save_rows(tmp_path / "evaluation.msgpack.gz", Rows([], None, []))) == 0


def test_as_much_as_is_ever_kept_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, path = small_artifact.rows(200), tmp_path / "evaluation.msgpack.gz"
    for room in range(1000, 1030):
        monkeypatch.setattr(sample, "_KEPT_BYTES", room)
        kept = save_rows(path, rows)
        assert 0 < len(kept) < 200
        assert load_rows(path, TABLE).hashes == kept.hashes


def test_what_is_asked_for_is_kept_beyond_what_is_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, path = small_artifact.rows(200), tmp_path / "evaluation.msgpack.gz"
    monkeypatch.setattr(sample, "_KEPT_BYTES", 1000)
    assert len(save_rows(path, rows)) < 100
    assert len(save_rows(path, rows, 150)) == len(load_rows(path, TABLE)) == 150
    monkeypatch.setattr(sample, "_MOST_KEPT_BYTES", 1000)
    assert 0 < len(save_rows(path, rows, 150)) < 100


def test_of_many_rows_the_first_are_read_without_the_others(tmp_path: Path) -> None:
    rows = [[[[1, 3], floats([[i, 0, 0]]).tobytes()]] for i in range(3)]
    path = store(
        tmp_path / "evaluation.msgpack.gz", msgspec.msgpack.encode([*rows, *[["none of its"]] * 9])
    )
    found = load_rows(path, TABLE, 2)
    assert [row[0][0, 0] for row in found.inputs] == [0, 1]
    with pytest.raises(VerificationError, match="cannot be read"):
        load_rows(path, TABLE)


def test_text_is_kept_as_text(tmp_path: Path) -> None:
    words = Signature(
        inputs=(TensorSpec(name="w", datatype="BYTES", shape=("n",), batch_axis=0),), outputs=()
    )
    rows, _ = read_rows({"w": np.array(["a", "b"])}, words, "evaluation")
    save_rows(tmp_path / "evaluation.msgpack.gz", rows)
    found = load_rows(tmp_path / "evaluation.msgpack.gz", words)
    assert [row[0].tolist() for row in found.inputs] == [["a"], ["b"]]
    assert found.hashes == rows.hashes


def test_a_row_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    rows = small_artifact.rows(3)
    save_rows(tmp_path / "evaluation.msgpack.gz", rows.take([0, 1, 2, 1]))
    with pytest.raises(VerificationError, match="a row is listed twice"):
        load_rows(tmp_path / "evaluation.msgpack.gz", TABLE)


@pytest.mark.parametrize(
    ("shape", "clear"),
    [
        (("seq", "batch", 3), False),
        (("x.0", "x.1", 3), False),
        (("batch_size", "seq", 3), True),
        (("n", 5, 3), True),
        ((1, "height", "width"), True),
    ],
)
def test_a_row_that_would_be_one_step_of_a_batch_of_steps_is_refused(
    shape: tuple[int | str, ...], clear: bool
) -> None:
    steps = np.random.default_rng(0).standard_normal((4, 5, 3)).astype(np.float32)
    first = TensorSpec(name="x", datatype="FP32", shape=shape)
    signature = Signature(inputs=(first,), outputs=())
    if clear:
        rows, _ = read_rows({"x": steps}, signature, "evaluation")
        assert rows.inputs[0][0].shape == (1, 5, 3)
    else:
        words = refusal({"x": steps}, signature)
        named = ", ".join(map(str, shape))
        assert f"'x' is [4, 5, 3], and dimension 0 of [{named}] is not known to be" in words
        assert f"[inputs.x] in --axes FILE says batch = 0; if not, 4 rows of [{named}]" in words
        batched = Signature(inputs=(msgspec.structs.replace(first, batch_axis=0),), outputs=())
        read_rows({"x": steps}, batched, "evaluation")
        said = refusal({"x": steps[:, :, None]}, batched)  # which --axes may say already
        assert "is, a row has a dimension less; if not, 4 rows of" in said
        rows, _ = read_rows({"x": steps[:, :, None]}, signature, "evaluation")
        assert rows.inputs[0][0].shape == (5, 1, 3)


def test_kept_rows_that_are_nested_deeply_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.msgpack.gz"
    path.write_bytes(gzip.compress(b"\x91" * 5_000 + b"\xc0"))
    with pytest.raises(VerificationError, match="cannot be read"):
        load_rows(path, TABLE)
