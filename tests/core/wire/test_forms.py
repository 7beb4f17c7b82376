from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lrai_core import protocol
from lrai_core.config import LimitsConfig
from lrai_core.errors import InvalidTensor, RequestError
from lrai_core.protocol import (
    Array,
    InferenceRequest,
    Signature,
    Tensor,
    TensorSpec,
    ValidRequest,
    validate,
)
from lrai_core.wire import forms
from lrai_core.wire.forms import validate_by_form

LIMITS = LimitsConfig()


def signature(batch: int | None = 0) -> Signature:
    x = TensorSpec(name="x", datatype="FP32", shape=("n", "m"), batch_axis=batch, length_axis=1)
    y = TensorSpec(name="y", datatype="FP32", shape=("n",), batch_axis=batch)
    return Signature(inputs=(x,), outputs=(y, y))


def request(given: Any, outputs: Any = ()) -> InferenceRequest:
    return InferenceRequest(model_name="m", inputs={"x": given}, outputs=outputs)


def raw(shape: Any, data: bytes | memoryview, datatype: str = "FP32") -> Tensor:
    return Tensor(name="x", datatype=datatype, shape=shape, data=data)


def array(rows: int = 2, length: int = 3) -> Array:
    return np.random.default_rng(0).standard_normal((rows, length)).astype(np.float32)


def same(found: ValidRequest, wanted: ValidRequest) -> None:
    for one, other in zip(found.arrays, wanted.arrays, strict=True):
        assert (one.dtype, one.shape, one.flags.c_contiguous) == (other.dtype, other.shape, True)
        np.testing.assert_array_equal(one, other)
    rest = ("rows", "length", "outputs", "group", "nbytes")
    assert [getattr(found, n) for n in rest] == [getattr(wanted, n) for n in rest]


@pytest.mark.parametrize(
    "given",
    [
        array(),
        array(6, 6)[::3, ::2],
        np.asfortranarray(array()),
        array().astype(">f4"),
        raw((2, 3), array().tobytes()),
        raw([2, 3], array().data),
    ],
)
@pytest.mark.parametrize("outputs", [(), ("y",), ["y"]])
def test_what_is_known_by_its_form_is_what_a_full_check_returns(given: Any, outputs: Any) -> None:
    model = signature()
    wanted = validate(request(given, outputs), model, LIMITS)
    for _ in range(3):
        same(validate_by_form(request(given, outputs), model, LIMITS), wanted)


def test_a_form_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = signature(), list[InferenceRequest]()

    def count(asked: InferenceRequest, *arguments: Any) -> ValidRequest:
        calls.append(asked)
        return validate(asked, *arguments)

    monkeypatch.setattr(protocol, "validate", count)
    for value in range(5):
        found = validate_by_form(request(np.full((1, 2), value, np.float32)), model, LIMITS)
        assert found.arrays[0].tolist() == [[value, value]]
    assert len(calls) == 1
    validate_by_form(request(array(3)), model, LIMITS)
    validate_by_form(request(raw((1, 2), bytes(8))), model, LIMITS)
    validate_by_form(request(array(3), ("y",)), model, LIMITS)
    validate_by_form(request(array(3)), signature(), LIMITS)  # another model knows nothing of it
    assert len(calls) == 5


@pytest.mark.parametrize(
    "given",
    [
        array().astype(np.float64),
        array()[0],
        [[1.0, 2.0, 3.0]] * 2,
        raw((2, 3), array().tobytes()[:-4]),
        raw((2, 4), array().tobytes()),
        raw((-2, -3), array().tobytes()),
        raw((2, 3), array().tobytes(), "INT32"),
        raw((2, 3), memoryview(bytes(48)).cast("B", (2, 24))),
    ],
)
def test_what_does_not_fit_is_refused_though_the_like_was_known(given: Any) -> None:
    model = signature()
    for known in (array(), raw((2, 3), array().tobytes()), raw((2, 3), array().data)):
        validate_by_form(request(known), model, LIMITS)
    for _ in range(2):
        with pytest.raises(InvalidTensor):
            validate_by_form(request(given), model, LIMITS)
    with pytest.raises(RequestError, match="no output"):
        validate_by_form(request(array(), ("z",)), model, LIMITS)


@pytest.mark.parametrize("limits", [{"request_bytes": 23}, {"request_rows": 1}])
def test_a_known_form_is_held_against_the_limits_of_today(limits: dict[str, Any]) -> None:
    model = signature()
    validate_by_form(request(array()), model, LIMITS)
    with pytest.raises(RequestError):
        validate_by_form(request(array()), model, LimitsConfig(**limits))


def test_values_are_looked_at_every_time() -> None:
    model, limits = signature(), LimitsConfig(nan_policy="reject")
    validate_by_form(request(array()), model, limits)
    bad = array()
    bad[1, 1] = np.nan
    with pytest.raises(InvalidTensor, match="NaN"):
        validate_by_form(request(bad), model, limits)
    flags = Signature(inputs=(TensorSpec(name="x", datatype="BOOL", shape=("n",)),), outputs=())
    for given in (np.array([True, False]), raw((2,), b"\1\0", "BOOL")):
        validate_by_form(request(given), flags, LIMITS)
    for given in (np.frombuffer(b"\1\2", bool), raw((2,), b"\1\2", "BOOL")):
        with pytest.raises(InvalidTensor, match="bytes other than 0 and 1"):
            validate_by_form(request(given), flags, LIMITS)
    words = Signature(inputs=(TensorSpec(name="x", datatype="BYTES", shape=("n",)),), outputs=())
    validate_by_form(request(np.array(["a"], object)), words, LIMITS)
    with pytest.raises(InvalidTensor):
        validate_by_form(request(np.array([1], object)), words, LIMITS)
    assert not words.passed


def test_requests_of_a_model_that_does_not_coalesce_are_each_a_group_of_their_own() -> None:
    model = signature(None)
    groups = {validate_by_form(request(array()), model, LIMITS).group for _ in range(4)}
    assert len(groups) == 4


def test_no_more_forms_are_kept_than_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "_MOST_FORMS", 3)
    model = signature()
    for rows in range(1, 10):
        assert validate_by_form(request(array(rows)), model, LIMITS).rows == rows
    assert len(model.passed) == 3
