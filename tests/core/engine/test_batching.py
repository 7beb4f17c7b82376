"""Row i of the answer belongs to caller i: a model that tells every element apart is the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrai_core.engine.batching import (
    coalesce,
    length_of,
    run_together,
    shuffled_batches,
    split,
    stretch,
    synthetic_row,
)
from lrai_core.errors import EngineError
from lrai_core.protocol import Array, Signature, TensorSpec

FREE = ("batch", "sequence")


def spec(name: str, datatype: str, shape: tuple[int | str, ...], **more: Any) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=shape, batch_axis=0, **more)


TOKENS = Signature(
    inputs=(
        spec("ids", "INT64", FREE, length_axis=1, pad_value=-7),
        spec("mask", "INT64", FREE, length_axis=1),
        spec("bias", "FP32", ("batch", 2)),
    ),
    outputs=(
        spec("tokens", "INT64", ("batch", "sequence", 2), length_axis=1),
        spec("pooled", "FP32", ("batch", 2)),
        spec("turned", "INT64", ("batch", 2, "sequence"), length_axis=2),
    ),
)


def run(arrays: list[Array]) -> list[Array]:
    """Answer per row from that row's unpadded part only, as a model that honours its mask does."""
    ids, mask, bias = arrays
    tokens = np.stack([ids * 3 + 1, ids * mask], axis=2)
    pooled = bias + (ids * mask).sum(axis=1, keepdims=True).astype(np.float32)
    return [tokens, pooled, tokens.transpose(0, 2, 1)]


@dataclass(frozen=True)
class Caller:
    """One request: inputs, how many rows and tokens, and the outputs it wants."""

    arrays: list[Array]
    rows: int
    length: int
    outputs: tuple[int, ...]


@st.composite
def callers(draw: st.DrawFn) -> list[Caller]:
    made = []
    for number in range(draw(st.integers(1, 6))):
        rows, length = draw(st.integers(1, 5)), draw(st.integers(1, 7))
        ids = 1 + np.arange(rows * length).reshape(rows, length) + 1000 * number
        bias = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2) / 7 + number
        outputs = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
        made.append(Caller([ids, np.ones_like(ids), bias], rows, length, tuple(outputs)))
    return made


def answers(requests: list[Caller]) -> list[list[Array]]:
    """Return what the actor would reply: one call, split, and the wanted outputs of each."""
    outputs = run(coalesce([request.arrays for request in requests], TOKENS))
    parts = split(
        outputs,
        TOKENS.outputs,
        [request.rows for request in requests],
        [request.length for request in requests],
    )
    return [[part[i] for i in one.outputs] for part, one in zip(parts, requests, strict=True)]


def wrong(requests: list[Caller], given_: list[list[Array]]) -> list[int]:
    """Return the callers whose answer is not, bit for bit, what they get alone."""
    found = []
    for number, (request, own) in enumerate(zip(requests, given_, strict=True)):
        alone = run(request.arrays)
        expected = [alone[index] for index in request.outputs]
        if len(own) != len(expected) or any(
            a.shape != b.shape or a.dtype != b.dtype or a.tobytes() != b.tobytes()
            for a, b in zip(own, expected, strict=True)
        ):
            found.append(number)
    return found


@given(callers())
def test_every_caller_gets_its_own_rows_bit_for_bit(requests: list[Caller]) -> None:
    assert wrong(requests, answers(requests)) == []


@given(callers().filter(lambda requests: len(requests) > 1), st.data())
def test_the_check_notices_two_rows_that_are_swapped_on_purpose(
    requests: list[Caller], data: st.DataObject
) -> None:
    outputs = run(coalesce([request.arrays for request in requests], TOKENS))
    rows = [request.rows for request in requests]
    owner = np.repeat(np.arange(len(requests)), rows)
    first = data.draw(st.integers(0, len(owner) - 1))
    second = data.draw(st.sampled_from(np.flatnonzero(owner != owner[first]).tolist()))
    order = np.arange(len(owner))
    order[[first, second]] = order[[second, first]]
    swapped = split(
        [output[order] for output in outputs],
        TOKENS.outputs,
        rows,
        [request.length for request in requests],
    )
    everything = [Caller(one.arrays, one.rows, one.length, (0, 1, 2)) for one in requests]
    assert wrong(everything, swapped) == sorted({int(owner[first]), int(owner[second])})


def test_the_check_notices_answers_swapped_between_two_callers() -> None:
    ids = np.arange(1, 4).reshape(1, 3)
    bias = np.zeros((1, 2), np.float32)
    requests = [Caller([ids + n, np.ones_like(ids), bias], 1, 3, (0,)) for n in (0, 10)]
    assert wrong(requests, answers(requests)[::-1]) == [0, 1]


def test_hundreds_of_rows_in_one_call_come_back_in_order() -> None:
    random = np.random.default_rng(0)
    requests = []
    for number in range(300):
        rows, length = int(random.integers(1, 9)), int(random.integers(1, 40))
        ids = random.integers(1, 1 << 40, (rows, length))
        bias = np.full((rows, 2), number, np.float32)
        requests.append(Caller([ids, np.ones_like(ids), bias], rows, length, (2, 0, 1)))
    assert wrong(requests, answers(requests)) == []


def test_padding_is_the_declared_value_at_the_end_and_nowhere_else() -> None:
    short, long = np.array([[1, 2]]), np.array([[3, 4, 5], [6, 7, 8]])
    bias = np.zeros((1, 2), np.float32)
    ids, mask, joined = coalesce(
        [
            [short, np.ones_like(short), bias],
            [long, np.ones_like(long), np.zeros((2, 2), np.float32)],
        ],
        TOKENS,
    )
    assert ids.tolist() == [[1, 2, -7], [3, 4, 5], [6, 7, 8]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert joined.shape == (3, 2)


@pytest.mark.parametrize("datatype", ["float16", "float32", "int8", "uint64", "bool"])
def test_joining_keeps_the_dtype_though_the_pad_value_is_a_float(datatype: str) -> None:
    padded = Signature(inputs=(spec("x", "FP32", FREE, length_axis=1, pad_value=1.0),), outputs=())
    arrays = [np.zeros((1, n), dtype=datatype) for n in (1, 2)]
    (joined,) = coalesce([[array] for array in arrays], padded)
    assert joined.dtype == np.dtype(datatype)
    assert joined[0, 1] == 1


def test_text_is_joined_as_text() -> None:
    words = Signature(inputs=(spec("words", "BYTES", ("batch",)),), outputs=())
    (joined,) = coalesce([[np.array(["a"], object)], [np.array(["b", "c"], object)]], words)
    assert joined.tolist() == ["a", "b", "c"]


def test_text_of_different_lengths_is_padded_with_empty_text() -> None:
    words = Signature(inputs=(spec("words", "BYTES", FREE, length_axis=1),), outputs=())
    long, short = np.array([["a", "b"]], object), np.array([["c"]], object)
    (joined,) = coalesce([[long], [short]], words)
    assert joined.tolist() == [["a", "b"], ["c", ""]]


def test_a_single_request_passes_through_uncopied_both_ways() -> None:
    ids = np.ones((1, 3), dtype=np.int64)
    assert coalesce([[ids, ids, ids]], TOKENS)[0] is ids
    ((own,),) = split([ids], TOKENS.outputs[:1], [1], [3])
    assert np.shares_memory(own, ids)
    assert own.shape == ids.shape


def rows_of(lengths: list[int]) -> list[list[Array]]:
    ids = [1 + np.arange(length).reshape(1, length) + 100 * i for i, length in enumerate(lengths)]
    return [[one, np.ones_like(one), np.zeros((1, 2), np.float32)] for one in ids]


@pytest.mark.parametrize("lengths", [[3], [3, 5, 2]])
def test_rows_that_are_padded_further_than_to_the_longest_are_answered_at_their_own_lengths(
    lengths: list[int],
) -> None:
    seen = list[tuple[int, ...]]()

    class Session:
        def run(self, arrays: Any, outputs: Any = None) -> list[Array]:
            assert outputs is None
            seen.extend(array.shape for array in arrays[:2])
            assert (arrays[0][:, 6:] == -7).all()
            return run(arrays)

    rows = rows_of(lengths)
    found = run_together(Session(), rows, TOKENS, 9)
    assert seen == [(len(rows), 9)] * 2
    for own, row in zip(found, rows, strict=True):
        for a, b in zip(own, run(row), strict=True):
            np.testing.assert_array_equal(a, b)


def test_rows_are_shared_out_among_the_calls_that_come_most_and_each_is_in_one_batch() -> None:
    calls = ((8, 16), (1, 16), (4, 64), (32, 512))
    signature = Signature(inputs=TOKENS.inputs, outputs=TOKENS.outputs, calls=calls)
    lengths = [4 + i % 40 for i in range(400)]
    batches = list(shuffled_batches(rows_of(lengths), signature))
    assert sorted(i for batch, _ in batches for i in batch) == list(range(400))
    for count, length in calls:
        own = [batch for batch, to in batches if (len(batch), to) == (count, length)]
        assert len(own) >= 1
        assert sum(map(len, own)) <= 80
        assert all(lengths[i] <= length for batch in own for i in batch)
    assert sum(len(batch) for batch, to in batches if not to) >= 80
    first = list(shuffled_batches(rows_of(lengths), TOKENS))
    assert {to for _, to in first} == {0}
    few = Signature(inputs=TOKENS.inputs, outputs=TOKENS.outputs, calls=((8, 4),))
    assert {to for _, to in shuffled_batches(rows_of([4] * 7 + [5] * 30), few)} == {0}


def test_answers_are_views_not_copies() -> None:
    output = np.arange(6.0).reshape(3, 2)
    parts = split([output], TOKENS.outputs[1:2], [1, 2], [0, 0])
    assert all(np.shares_memory(part[0], output) for part in parts)


@pytest.mark.parametrize("shape", [(2, 2), (4, 2), ()])
def test_an_output_without_the_rows_that_went_in_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"output 'pooled' has shape .* for 3 rows"):
        split([np.zeros(shape)], TOKENS.outputs[1:2], [1, 2], [0, 0])


def test_too_few_outputs_are_refused() -> None:
    with pytest.raises(ValueError, match="argument 2 is longer"):
        split([np.zeros((3, 2))], TOKENS.outputs, [1, 2], [0, 0])


@pytest.mark.parametrize("shape", [(), (1,), ("n",), ("n", "l"), (1, 0), (3, 5000), ("n", 2, 3)])
@pytest.mark.parametrize("datatype", ["INT64", "BOOL", "UINT8", "FP16", "FP32", "BYTES"])
def test_a_made_up_row_has_the_shape_that_is_declared(
    shape: tuple[int | str, ...], datatype: str
) -> None:
    spec = TensorSpec(name="x", datatype=datatype, shape=shape)
    (row,) = synthetic_row(Signature(inputs=(spec,), outputs=()), 7)
    assert row.shape == tuple(4 if isinstance(extent, str) else extent for extent in shape)
    if row.dtype.kind in "iub" and row.size:
        assert set(row.ravel().tolist()) <= {0, 1}
        assert np.all(row[..., 0] if shape else row), "the first is never masked"


def test_a_row_that_no_memory_holds_is_not_made() -> None:
    spec = TensorSpec(name="x", datatype="FP32", shape=("n", 1 << 40))
    with pytest.raises(EngineError, match="is too large"):
        synthetic_row(Signature(inputs=(spec,), outputs=()), 1)


def test_stretch_leaves_a_scalar_one() -> None:
    """As a temperature for all rows: with a dimension more it would be refused."""
    scalar = TensorSpec(name="temperature", datatype="FP32", shape=())
    table = TensorSpec(name="x", datatype="FP32", shape=("n", 2))
    row: list[Array] = [np.full((), 2, np.float32), np.ones((1, 2), np.float32)]
    signature = Signature(inputs=(scalar, table), outputs=())
    assert [array.shape for array in stretch(row, signature, 4, 0)] == [(), (1, 2)]


def test_stretch_repeats_rows_and_cuts_or_repeats_lengths() -> None:
    row = [np.array([[1, 2, 3]]), np.array([[1, 1, 0]]), np.array([[0.5, 1.5]])]
    assert length_of(row, TOKENS) == 3
    ids, mask, bias = stretch(row, TOKENS, 2, 5)
    assert ids.tolist() == [[1, 2, 3, 1, 2]] * 2
    assert mask.tolist() == [[1, 1, 0, 1, 1]] * 2
    assert bias.tolist() == [[0.5, 1.5]] * 2
