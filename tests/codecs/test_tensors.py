"""Values in the usual forms, fitted to a model without a change to any of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lrai_codecs import by_name, dtype_of, fit
from lrai_codecs.tensors import array_of
from lrai_core import InferenceRequest, InvalidTensor, RequestError, Signature, TensorSpec
from lrai_core.config import LimitsConfig
from lrai_core.protocol import validate

IDS = TensorSpec(name="ids", datatype="INT64", shape=("n", "length"), batch_axis=0)
AGE = TensorSpec(name="age", datatype="FP32", shape=("n", 1), batch_axis=0)
JOB = TensorSpec(name="job", datatype="BYTES", shape=("n", 1), batch_axis=0)


@pytest.mark.parametrize(
    "data",
    [
        {"age": [30, 41], "job": ["a", "b"]},
        [{"age": 30, "job": "a"}, {"age": 41, "job": "b"}],
        [{"job": "a", "age": 30}, {"age": 41, "job": "b"}],
    ],
)
def test_columns_and_records_are_the_same_tensors(data: Any) -> None:
    arrays = fit(by_name(data, [AGE, JOB]), [AGE, JOB])
    assert arrays["age"].dtype == np.float32
    assert arrays["age"].tolist() == [[30], [41]]
    assert arrays["job"].tolist() == [["a"], ["b"]]


def test_values_alone_are_those_of_a_model_with_one_input() -> None:
    assert by_name([[1, 2]], [IDS]) == {"ids": [[1, 2]]}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ([[1, 2]], "got a list"),
        ("text", "got a str"),
        (None, "got a NoneType"),
        ([{"age": 1, "job": "a"}, {"age": 1}], "record 1 has other names"),
    ],
)
def test_other_forms_are_refused_by_what_they_are(data: Any, problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        by_name(data, [AGE, JOB])


def test_json_has_one_kind_of_number() -> None:
    assert fit({"age": [1_700_000_001, 3]}, [AGE])["age"].dtype == np.float32
    assert fit({"ids": [[1.0, 2]]}, [IDS])["ids"].tolist() == [[1, 2]]
    with pytest.raises(InvalidTensor, match="the model takes FP32"):
        fit({"age": ["1.5"]}, [AGE])


def test_large_integers_are_those_that_were_sent() -> None:
    """Of which numpy would make real numbers, where one is beyond 2^63 or has a point."""
    wide = TensorSpec(name="wide", datatype="UINT64", shape=("n", 2))
    sent = [[2**63 + 1, 7]]
    assert fit({"wide": sent}, [wide])["wide"].tolist() == sent
    assert fit({"ids": [[2**53 + 1, 1.0]]}, [IDS])["ids"].tolist() == [[2**53 + 1, 1]]
    for rounded in (1_000_000_000_000_000_001.0, 2.0**53):  # which others round to as well
        assert fit({"ids": [[rounded, 1]]}, [IDS])["ids"].dtype.kind == "f", "it is refused as one"


def test_null_among_real_numbers_is_nan_and_nothing_else_is() -> None:
    assert np.isnan(fit({"age": [None, 1.5]}, [AGE])["age"]).tolist() == [[True], [False]]
    with pytest.raises(InvalidTensor, match=r"'ids': holds text, null, objects or .* INT64"):
        fit({"ids": [[None, 1]]}, [IDS])


def validate_alone(given: dict[str, Any]) -> None:
    request = InferenceRequest(model_name="", inputs=fit(given, [AGE]))
    validate(request, Signature(inputs=(AGE,), outputs=()), LimitsConfig())


@pytest.mark.parametrize("value", [["1", 2.0], ["1", None], [None, b"1"], [1, 2, "inf"]])
def test_text_is_no_number_whatever_stands_beside_it(value: Any) -> None:
    with pytest.raises(InvalidTensor, match=r"'age': .* the model takes FP32"):
        validate_alone({"age": value})
    with pytest.raises(InvalidTensor, match=r"'age': .* the model takes FP32"):
        validate_alone({"age": np.array(value, dtype=object)})


@pytest.mark.parametrize("value", [[[1.5]], [[2**63]]])
def test_what_would_be_changed_keeps_its_own_dtype(value: Any) -> None:
    assert fit({"ids": value}, [IDS])["ids"].dtype != np.int64


@pytest.mark.parametrize("value", [[[-(2**70)]], [["1"]], [["1", 2]], [[None, 2]]])
def test_what_is_no_array_of_numbers_is_not_taken_for_text(value: Any) -> None:
    """A shared runtime, which knows no model when it writes a request, would speak of text."""
    with pytest.raises(InvalidTensor, match=r"'ids': .* the model takes INT64"):
        fit({"ids": value}, [IDS])


@pytest.mark.parametrize("value", [[[1], [1, 2]], [[1], 2], [[[1]], [[1, 2]]]])
def test_rows_of_different_shapes_are_named(value: Any) -> None:
    with pytest.raises(InvalidTensor, match="'age': its rows have different shapes"):
        fit({"age": value}, [AGE])


def test_text_keeps_nul_characters() -> None:
    assert fit({"job": ["a\0", "\0"]}, [JOB])["job"].tolist() == [["a\0"], ["\0"]]


def test_datatypes_have_their_dtypes() -> None:
    assert [dtype_of(name).name for name in ("FP16", "UINT8", "BOOL", "BYTES")] == [
        "float16",
        "uint8",
        "bool",
        "object",
    ]
    for name in ("FP8", "", "STR", "FLOAT32;"):
        with pytest.raises(RequestError, match="is not a datatype"):
            dtype_of(name)


def test_whole_numbers_that_another_parser_made_an_array_of_fit_an_input_of_real_ones() -> None:
    """As MLflow's table of whole numbers only, or BentoML's tensors."""
    array = array_of("x", np.array([[20_000_001, 5]]), np.dtype(np.float32))
    assert array.dtype == np.float32
    assert array.tolist() == [[20_000_000.0, 5.0]]


@pytest.mark.parametrize(("value", "dtype"), [(70_000.0, np.float16), (1e39, np.float32)])
def test_a_number_does_not_become_infinite(value: float, dtype: type) -> None:
    with pytest.raises(InvalidTensor, match="holds a number beyond what float"):
        array_of("x", [[value]], np.dtype(dtype))
    assert array_of("x", [[float("inf")]], np.dtype(dtype)).tolist() == [[float("inf")]]
