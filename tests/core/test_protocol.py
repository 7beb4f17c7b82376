from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lrai_core.config import LimitsConfig
from lrai_core.errors import InvalidTensor, RequestError
from lrai_core.protocol import (
    DATATYPES,
    Array,
    InferenceRequest,
    Signature,
    Tensor,
    TensorSpec,
    ValidRequest,
    as_text,
    datatype_of,
    decode_bytes,
    encode_bytes,
    validate,
)

NUMERIC = sorted(set(DATATYPES) - {"BYTES"})
LIMITS = LimitsConfig()


def spec(
    name: str, datatype: str = "FP32", shape: tuple[int | str, ...] = ("batch", 3), **more: Any
) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=shape, **{"batch_axis": 0, **more})


TABLE = Signature(inputs=(spec("x"),), outputs=(spec("y"), spec("z")))
TOKENS = Signature(
    inputs=(
        spec("ids", "INT64", ("batch", "sequence"), length_axis=1),
        spec("mask", "INT64", ("batch", "sequence"), length_axis=1),
    ),
    outputs=(spec("y"),),
)
WORDS = Signature(inputs=(spec("words", "BYTES", ("batch",)),), outputs=(spec("y"),))


def checked(
    inputs: Mapping[str, Array | Tensor],
    signature: Signature = TABLE,
    *,
    limits: LimitsConfig = LIMITS,
    outputs: tuple[str, ...] = (),
) -> ValidRequest:
    request = InferenceRequest(model_name="m", inputs=inputs, outputs=outputs)
    return validate(request, signature, limits)


def refusal(
    inputs: Mapping[str, Array | Tensor],
    signature: Signature = TABLE,
    *,
    limits: LimitsConfig = LIMITS,
    outputs: tuple[str, ...] = (),
) -> str:
    with pytest.raises(RequestError) as caught:
        checked(inputs, signature, limits=limits, outputs=outputs)
    assert caught.value.http_status == 400
    return str(caught.value)


def raw(
    shape: tuple[int, ...], data: bytes | memoryview, datatype: str = "FP32", name: str = "x"
) -> Tensor:
    return Tensor(name=name, datatype=datatype, shape=shape, data=data)


def test_a_fitting_request_comes_back_with_rows_group_and_all_outputs() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    valid = checked({"x": x})
    assert valid.arrays[0] is x
    assert (valid.rows, valid.length, valid.outputs, valid.nbytes) == (2, 0, (0, 1), 24)


def test_raw_content_becomes_the_array_it_describes() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for data in (x.tobytes(), memoryview(x.tobytes()), x.data):
        np.testing.assert_array_equal(checked({"x": raw((2, 3), data)}).arrays[0], x)


def test_arrays_come_out_in_the_order_of_the_signature_whatever_the_callers() -> None:
    ids, mask = np.full((1, 4), 7), np.ones((1, 4), dtype=np.int64)
    valid = checked({"mask": mask, "ids": ids}, TOKENS)
    assert valid.arrays[0] is ids
    assert valid.arrays[1] is mask
    assert (valid.rows, valid.length) == (1, 4)


def test_wanted_outputs_keep_the_callers_order() -> None:
    assert checked({"x": np.zeros((1, 3), np.float32)}, outputs=("z", "y")).outputs == (1, 0)


def test_a_datatype_that_the_protocol_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="datatype 'BF16' of 'x' is unknown"):
        spec("x", "BF16")


@pytest.mark.parametrize("datatype", NUMERIC)
def test_every_datatype_survives_raw_content_bit_for_bit(datatype: str) -> None:
    values = np.arange(6).reshape(2, 3).astype(DATATYPES[datatype])
    signature = Signature(inputs=(spec("x", datatype),), outputs=())
    valid = checked({"x": raw((2, 3), values.tobytes(), datatype)}, signature)
    assert valid.arrays[0].dtype == DATATYPES[datatype]
    assert valid.arrays[0].tobytes() == values.tobytes()


@pytest.mark.parametrize("datatype", NUMERIC)
def test_the_name_of_a_dtype_is_the_key_it_came_from(datatype: str) -> None:
    assert datatype_of(DATATYPES[datatype]) == datatype
    assert datatype_of(DATATYPES[datatype].newbyteorder(">")) == datatype


@pytest.mark.parametrize("dtype", ["c16", "M8[s]", "V4"])
def test_a_dtype_without_a_name_in_the_protocol_is_refused(dtype: str) -> None:
    with pytest.raises(RequestError, match="not a datatype of the protocol"):
        datatype_of(np.dtype(dtype))


def test_foreign_byte_order_and_strides_are_made_native_and_contiguous() -> None:
    x = np.arange(12, dtype=">f4").reshape(3, 4).T[:2, :3]
    (array,) = checked({"x": x}).arrays
    assert array.dtype == np.dtype("<f4")
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array, x)


def test_bytes_that_are_no_truth_value_are_refused() -> None:
    flags = Signature(inputs=(spec("x", "BOOL"),), outputs=())
    for held, right in ((bytes([1, 0, 1]), True), (bytes([1, 2, 0]), False), (b"\0\0\xff", False)):
        for x in (raw((1, 3), held, "BOOL"), np.frombuffer(held, bool).reshape(1, 3)):
            if right:
                assert checked({"x": x}, flags).arrays[0].tolist() == [[True, False, True]]
            else:
                assert "bytes other than 0 and 1" in refusal({"x": x}, flags)
    scalar = Signature(inputs=(TensorSpec(name="x", datatype="BOOL", shape=()),), outputs=())
    assert "bytes other than 0 and 1" in refusal({"x": raw((), b"\2", "BOOL")}, scalar)


def test_a_scalar_input_stays_a_scalar() -> None:
    scalar = Signature(inputs=(TensorSpec(name="x", datatype="FP32", shape=()),), outputs=())
    assert checked({"x": np.array(3, np.float32)}, scalar).arrays[0].shape == ()
    assert checked({"x": raw((), b"\0\0\0\0")}, scalar).arrays[0].shape == ()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "tensor 'x': missing"),
        (
            {"x": np.zeros((1, 3), np.float32), "q": np.zeros(1)},
            "'q': the model has no such .* 'x'",
        ),
        ({"x": np.zeros((1, 3))}, "datatype FP64, the model takes FP32"),
        ({"x": np.zeros((1, 3), np.int32)}, "datatype INT32, the model takes FP32"),
        ({"x": np.array([["a"] * 3])}, "datatype BYTES, the model takes FP32"),
        ({"x": [[1.0, 2.0, 3.0]]}, "got a list, a numpy array is needed"),
        ({"x": None}, "got a NoneType"),
        ({"x": np.zeros(3, np.float32)}, r"shape \[3\] has 1 dimensions, \[batch, 3\] is needed"),
        ({"x": np.zeros((1, 1, 3), np.float32)}, "has 3 dimensions"),
        ({"x": np.zeros((1, 4), np.float32)}, r"dimension 1 is 4, \[batch, 3\] is needed"),
        ({"x": np.zeros((0, 3), np.float32)}, "dimension 0 is 0, at least 1 is needed"),
        ({"x": raw((1, 3), b"\0" * 12, "FP64")}, "datatype FP64, the model takes FP32"),
        ({"x": raw((1, 3), b"\0" * 11)}, r"\[1, 3\] needs 3 elements of 4 bytes, got 11 bytes"),
        ({"x": raw((2, 3), b"\0" * 12)}, "needs 6 elements of 4 bytes, got 12 bytes"),
        ({"x": raw((1, 3), b"")}, "got 0 bytes"),
        ({"x": raw((-1, 3), b"\0" * 12)}, "dimension 0 is negative"),
        ({"x": raw((-1, -3), b"\0" * 12)}, "dimension 0 is negative"),
        ({"x": raw((0, 3), b"")}, "dimension 0 is 0"),
        ({"x": raw((1 << 63, 3), b"\0" * 12)}, r"dimension 0 is 2\^63 or more"),
        ({"x": raw((10**5000, 3), b"\0" * 12)}, r"dimension 0 is 2\^63 or more"),
        ({"x": raw(((1 << 62) + 1, 4), b"\0" * 16)}, "needs more than memory, got 16 bytes"),
        ({"x": raw((1 << 31, 1 << 31, 4), b"")}, "needs more than memory, got 0 bytes"),
        ({"x": raw((1,) * 17, b"\0" * 4)}, "17 dimensions, at most 16 are allowed"),
        ({"x": raw((0, 1 << 62), b"")}, "out of range"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_with_got_and_allowed(
    inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidTensor, match=message):
        checked(inputs)


@given(
    st.lists(st.integers(-(1 << 70), 1 << 70) | st.integers(-2, 4), max_size=18),
    st.binary(max_size=64),
    st.sampled_from([*NUMERIC, "BYTES", "FP128", ""]),
)
@example([0, 1 << 62, 1 << 62], b"", "FP32")
@example([1 << 32, 1 << 32, 1 << 32], b"", "FP32")  # the product overflows to 0 in 64 bits
def test_declared_shape_and_bytes_agree_or_the_request_is_refused(
    shape: list[int], data: bytes, datatype: str
) -> None:
    given_ = raw(tuple(shape), data, datatype)
    for declared in ("FP32", "INT8", "BYTES"):
        signature = Signature(
            inputs=(TensorSpec(name="x", datatype=declared, shape=("",) * len(shape)),), outputs=()
        )
        try:
            (array,) = checked({"x": given_}, signature).arrays
        except RequestError:
            continue
        assert datatype == declared
        assert array.shape == tuple(shape)
        if declared != "BYTES":
            assert array.tobytes() == data
            assert math.prod(shape) * array.itemsize == len(data)


def test_a_shape_that_lies_is_refused_before_anything_is_allocated() -> None:
    import tracemalloc

    tracemalloc.start()
    try:
        refusal({"x": raw((1 << 40, 3), b"\0" * 12)})
        refusal({"words": raw((1 << 40,), b"\0" * 12, "BYTES", "words")}, WORDS)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_lengths_must_agree_and_symbols_are_left_to_the_engine() -> None:
    message = refusal({"ids": np.ones((2, 3), int), "mask": np.ones((2, 4), int)}, TOKENS)
    assert "has length 4, other inputs have 3" in message
    square = Signature(inputs=(spec("x", shape=("n", "n"), batch_axis=None),), outputs=())
    given = InferenceRequest(model_name="m", inputs={"x": np.zeros((2, 3), np.float32)})
    assert validate(given, square, LimitsConfig()).arrays[0].shape == (2, 3)


def test_axes_with_other_symbols_must_agree_all_the_same() -> None:
    loose = Signature(
        inputs=(
            spec("a", "INT64", ("n", "s"), length_axis=1),
            spec("b", "INT64", ("m", "t"), length_axis=1),
        ),
        outputs=(),
    )
    two = np.ones((2, 3), int)
    assert "has 1 rows, other inputs have 2" in refusal({"a": two, "b": two[:1]}, loose)
    assert "has length 2, other inputs have 3" in refusal({"a": two, "b": two[:, :2]}, loose)


def test_too_many_bytes_or_rows_are_refused_by_their_limit() -> None:
    x = np.zeros((4, 3), np.float32)
    assert checked({"x": x}, limits=LimitsConfig(request_bytes=48, request_rows=4)).rows == 4
    tight = LimitsConfig(request_bytes=47)
    assert "one request has 47 at most, see limits.request_bytes" in refusal({"x": x}, limits=tight)
    assert "48 bytes, at most 47" in refusal({"x": raw((4, 3), x.tobytes())}, limits=tight)
    said = refusal({"x": x}, limits=LimitsConfig(request_rows=3))
    assert "4 rows, at most 3: see limits.request_rows" in said


def test_the_bytes_of_all_tensors_count_together() -> None:
    ids = np.ones((1, 4), dtype=np.int64)
    both = {name: raw((1, 4), ids.tobytes(), "INT64", name) for name in ("ids", "mask")}
    assert checked(both, TOKENS, limits=LimitsConfig(request_bytes=64)).nbytes == 64
    refusal(both, TOKENS, limits=LimitsConfig(request_bytes=63))


def test_text_counts_with_its_length_and_not_as_pointers() -> None:
    words = np.array(["a" * 1000, "b"], dtype=object)
    assert checked({"words": words}, WORDS).nbytes >= 1001
    assert "one request has 500 at most" in refusal(
        {"words": words}, WORDS, limits=LimitsConfig(request_bytes=500)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
def test_nan_and_infinity_follow_the_policy(value: float, datatype: str) -> None:
    signature = Signature(inputs=(spec("x", datatype),), outputs=())
    x = np.array([[0, value, 1]], dtype=DATATYPES[datatype])
    passed = checked({"x": x}, signature)
    np.testing.assert_array_equal(passed.arrays[0], x)
    reject = LimitsConfig(nan_policy="reject")
    for given_ in (x, raw((1, 3), x.tobytes(), datatype)):
        assert "holds NaN or infinity" in refusal({"x": given_}, signature, limits=reject)


@given(st.lists(st.floats(width=32), min_size=3, max_size=3), st.sampled_from(["pass", "reject"]))
@example([1e-45, -1e-45, 5e-39], "reject")  # denormal numbers are numbers
def test_reject_lets_exactly_the_finite_through(
    values: list[float], policy: Literal["pass", "reject"]
) -> None:
    limits = LimitsConfig(nan_policy=policy)
    x = np.array([values], dtype=np.float32)
    if policy == "pass" or all(map(math.isfinite, values)):
        assert checked({"x": x}, limits=limits).arrays[0].tobytes() == x.tobytes()
    else:
        refusal({"x": x}, limits=limits)


def test_text_is_given_to_the_model_as_text_however_it_came() -> None:
    expected = ["nul\0in", "Grüße", ""]
    data = b"".join(len(w.encode()).to_bytes(4, "little") + w.encode() for w in expected)
    for given_ in (
        np.array(expected, dtype=object),
        np.array([word.encode() for word in expected], dtype=object),
        np.array(expected),
        raw((3,), data, "BYTES", "words"),
    ):
        (array,) = checked({"words": given_}, WORDS).arrays
        assert array.tolist() == expected
        assert {type(word) for word in array} == {str}


@pytest.mark.parametrize(
    ("element", "message"),
    [
        (b"\xff\xfe", "not UTF-8"),
        ("half\ud800", "not UTF-8"),
        (None, "a NoneType, text is needed"),
        (10**12, "a int, text is needed"),  # bytes(10**12) would be a terabyte
        (1.5, "a float, text is needed"),
    ],
)
def test_an_element_that_is_no_text_is_refused(element: object, message: str) -> None:
    assert message in refusal({"words": np.array([element], dtype=object)}, WORDS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x02\0\0\0ab", "cannot hold 2 length-prefixed"),
        (b"\x02\0\0\0ab\x05\0\0\0ab", "element 1 is cut short"),
        (b"\x02\0\0\0ab\xff\xff\xff\xff", "element 1 is cut short"),
        (b"\0\0\0\0\0\0\0\0!", "1 bytes are left over after 2 elements"),
        (b"\x01\0\0\0\xff\0\0\0\0", "not UTF-8"),
    ],
)
def test_text_that_is_cut_short_or_left_over_is_refused(data: bytes, message: str) -> None:
    assert message in refusal({"words": raw((2,), data, "BYTES", "words")}, WORDS)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_text_survives_the_wire_form(words: list[str]) -> None:
    array = as_text(np.array([*words, ""], dtype=object)[:-1])
    assert decode_bytes(encode_bytes(array), len(words)).tolist() == words


@pytest.mark.parametrize("element", [3, 1.5, None, b"\xff", "\ud800"])
def test_what_is_no_text_is_not_encoded(element: object) -> None:
    with pytest.raises(ValueError, match="an element is"):
        encode_bytes(np.array([element, "x"], dtype=object))


@given(st.binary(max_size=40), st.integers(0, 6))
def test_any_bytes_decode_to_text_or_a_value_error(data: bytes, count: int) -> None:
    try:
        array = decode_bytes(data, count)
    except ValueError:
        return
    assert encode_bytes(array) == data


@pytest.mark.parametrize(
    "name",
    ["a" * (1 << 20), "nul\0in", "../../etc/passwd", "line\nbreak", "\x1b]0;title\a", "\ud800"],
)
def test_hostile_names_leave_short_printable_messages(name: str) -> None:
    x = np.zeros((1, 3), np.float32)
    messages = [
        refusal({name: x}),
        refusal({"x": x}, outputs=(name,)),
        refusal({"x": raw((1, 3), x.tobytes(), name)}),
    ]
    for message in messages:
        assert message.isprintable()
        assert len(message) < 300


def test_an_output_the_model_lacks_is_refused_with_those_it_has() -> None:
    message = refusal({"x": np.zeros((1, 3), np.float32)}, outputs=("w",))
    assert message == "the model has no output 'w'; it has 'y', 'z'"


def test_requests_that_differ_in_batch_and_length_only_share_a_group() -> None:
    def group(rows: int, length: int) -> object:
        ids = np.ones((rows, length), dtype=np.int64)
        return checked({"ids": ids, "mask": ids}, TOKENS).group

    assert group(1, 4) == group(3, 9)
    wide = Signature(inputs=(spec("x", shape=("batch", "width")),), outputs=(spec("y"),))
    groups = {checked({"x": np.zeros((n, 3), np.float32)}, wide).group for n in (1, 2)}
    groups.add(checked({"x": np.zeros((1, 4), np.float32)}, wide).group)
    assert len(groups) == 2


def test_rows_of_a_model_without_a_batch_axis_never_share_a_call() -> None:
    fixed = Signature(inputs=(spec("x", shape=(1, 3), batch_axis=None),), outputs=())
    x = np.zeros((1, 3), np.float32)
    valid = [checked({"x": x}, fixed) for _ in range(50)]
    assert len({one.group for one in valid}) == 50
    assert {one.rows for one in valid} == {1}


def test_an_output_without_a_batch_axis_makes_a_model_uncoalescible() -> None:
    assert TABLE.coalescible
    loss = TensorSpec(name="loss", datatype="FP32", shape=())
    assert not Signature(inputs=TABLE.inputs, outputs=(*TABLE.outputs, loss)).coalescible


@pytest.mark.parametrize("axes", [{"batch_axis": 1}, {"length_axis": 0}, {"length_axis": 2}])
def test_a_spec_has_only_axes_that_its_shape_has(axes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="axis"):
        TensorSpec(name="x", datatype="FP32", shape=("n", 3), **axes)  # type: ignore[arg-type]


def test_texts_are_counted_before_they_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes its time and memory, though it be empty."""
    text = TensorSpec(name="s", datatype="BYTES", shape=("n", 1), batch_axis=0)
    signature = Signature(inputs=(text,), outputs=())
    count = 1 << 21
    many = Tensor(name="s", datatype="BYTES", shape=(count, 1), data=bytes(4 * count))
    monkeypatch.setattr("lrai_core.protocol.decode_bytes", lambda *_: pytest.fail("it was read"))
    with pytest.raises(InvalidTensor, match="2097152 elements, at most 1048576 are left"):
        validate(InferenceRequest(model_name="", inputs={"s": many}), signature, LimitsConfig())


@pytest.mark.parametrize("dtype", [np.object_, np.str_, np.bytes_])
def test_texts_in_an_array_are_as_many_as_in_a_binary_tensor(
    dtype: type[np.generic], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is answered in one process must not be refused where it is sent to another."""
    limits = LimitsConfig(request_bytes=1 << 16)
    few, many = np.full(1024, "a", dtype), np.full(1025, "a", dtype)
    fits = validate(InferenceRequest(model_name="", inputs={"words": few}), WORDS, limits)
    assert (fits.rows, fits.nbytes) == (1024, 9 * 1024)
    monkeypatch.setattr("lrai_core.protocol.as_text", lambda _: pytest.fail("it was read"))
    for each in (many, raw((1025,), encode_bytes(many), "BYTES", "words")):
        with pytest.raises(InvalidTensor, match="1025 elements, at most 1024 are left"):
            validate(InferenceRequest(model_name="", inputs={"words": each}), WORDS, limits)


def test_an_output_is_named_once() -> None:
    """Each name would be a copy of it."""
    message = refusal({"x": np.zeros((1, 3), np.float32)}, outputs=("y",) * 1_000 + ("z",))
    assert message == "1001 outputs are named, 2 different ones"
