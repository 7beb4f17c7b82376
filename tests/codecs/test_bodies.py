"""Every body that is read, the ones that are not, and answers in the form that was asked for."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import given
from hypothesis import strategies as st

from lrai_codecs import MEDIA_TYPES, Form, NotAcceptable, UnsupportedMediaType, decode, encode
from lrai_core import InferenceResponse, InvalidTensor, RequestError, TensorSpec
from lrai_core.config import LimitsConfig
from lrai_core.protocol import Signature, validate

X = TensorSpec(name="x", datatype="FP32", shape=("n", 3), batch_axis=0)
AGE = TensorSpec(name="age", datatype="INT32", shape=("n",), batch_axis=0)
JOB = TensorSpec(name="job", datatype="BYTES", shape=("n",), batch_axis=0)
OUT = TensorSpec(name="y", datatype="FP32", shape=("n",), batch_axis=0)
ROWS = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.5]]


def npy(array: np.ndarray[Any, Any], version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    return file.getvalue()


def protocol(**changes: Any) -> bytes:
    tensor = {"name": "x", "shape": [2, 3], "datatype": "FP32", "data": ROWS} | changes
    return json.dumps({"id": "7", "inputs": [tensor]}).encode()


def values(body: bytes, kind: str, inputs: list[TensorSpec], **more: Any) -> list[list[Any]]:
    """Return what the runtime would take of a body, in the order of the inputs."""
    request, _ = decode(body, kind, inputs, **more)
    signature = Signature(inputs=tuple(inputs), outputs=(OUT,))
    return [array.tolist() for array in validate(request, signature, LimitsConfig()).arrays]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (protocol(), "application/json"),
        (protocol(data=[1, 2, 3, 4, 5, 6.5]), ""),
        (json.dumps({"instances": ROWS}).encode(), "application/json; charset=utf-8"),
        (protocol(), "application/octet-stream"),
        (json.dumps({"instances": ROWS}).encode(), "application/octet-stream"),
        (json.dumps(ROWS).encode(), "application/octet-stream; charset=utf-8"),
        (json.dumps({"inputs": ROWS}).encode(), "Application/JSON"),
        (json.dumps({"inputs": {"x": ROWS}}).encode(), "application/json"),
        (json.dumps({"x": ROWS}).encode(), "application/json"),
        (json.dumps(ROWS).encode(), "application/json"),
        (json.dumps([{"x": row} for row in ROWS]).encode(), "application/json"),
        (b"[1, 2, 3]\n\n[4, 5, 6.5]\n", "application/jsonlines"),
        (b'{"x": [1, 2, 3]}\n{"x": [4, 5, 6.5]}', "application/jsonlines"),
        (b"1,2,3\r\n4,5,6.5\r\n", "text/csv"),
        (b"\xef\xbb\xbf1,2,3\n4,5,6.5", "text/csv; charset=utf-8"),
        (b"\xef\xbb\xbf" + json.dumps({"instances": ROWS}).encode(), "application/json"),
        (b"\xef\xbb\xbf" + protocol(), ""),
        (b"\xef\xbb\xbf[1, 2, 3]\n[4, 5, 6.5]\n", "application/jsonlines"),
        (npy(np.array(ROWS, np.float32)), "application/x-npy"),
        (npy(np.asfortranarray(np.array(ROWS)), (2, 0)), "application/x-npy"),
    ],
)
def test_all_forms_of_a_matrix_are_one_tensor(body: bytes, kind: str) -> None:
    assert values(body, kind, [X]) == [ROWS]


@pytest.mark.parametrize(
    "body", [b'{"inputs": {"inputs": [[1, 2, 3]]}}', b'{"inputs": [[1, 2, 3]]}', b"[[1, 2, 3]]"]
)
def test_an_input_may_be_called_inputs(body: bytes) -> None:
    spec = TensorSpec(name="inputs", datatype="FP32", shape=("n", 3), batch_axis=0)
    assert values(body, "application/json", [spec]) == [[[1, 2, 3]]]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"instances": [{"age": 3, "job": "a,b"}, {"age": 4, "job": "c"}]}', ""),
        (b'{"inputs": {"age": [3, 4], "job": ["a,b", "c"]}}', ""),
        (b'3,"a,b"\n4,c\n', "text/csv"),
        (b'job,age\n"a,b",3\nc,4\n', "text/csv"),
        (b'{"age": 3, "job": "a,b"}\n{"age": 4, "job": "c"}', "application/jsonlines"),
    ],
)
def test_all_forms_of_columns_are_the_same_tensors(body: bytes, kind: str) -> None:
    assert values(body, kind, [AGE, JOB]) == [[3, 4], ["a,b", "c"]]


@pytest.mark.parametrize("binary", [True, False])
def test_what_tritons_client_writes_is_read_and_what_is_written_it_reads(binary: bool) -> None:
    x = np.array(ROWS, np.float32)
    job = np.array(["a", "\u00e9\0"], np.object_)
    sent = [triton.InferInput("x", [2, 3], "FP32"), triton.InferInput("job", [2], "BYTES")]
    for tensor, array in zip(sent, (x, job), strict=True):
        tensor.set_data_from_numpy(array, binary_data=binary)
    wanted = [triton.InferRequestedOutput("y", binary_data=binary)]
    body, length = triton.InferenceServerClient.generate_request_body(sent, outputs=wanted)
    kind = "application/octet-stream" if binary else "application/json"
    assert values(body, kind, [X, JOB], header_length=length) == [ROWS, ["a", "\u00e9\0"]]

    request, form = decode(body, kind, [X, JOB], header_length=length)
    assert request.outputs == ("y",)
    outputs = {"y": np.array([0.1, np.inf if binary else 3], np.float32), "job": job}
    written, headers = encode(answer(outputs), form)
    result = triton.InferenceServerClient.parse_response_body(
        written, header_length=int(headers.get("Inference-Header-Content-Length", len(written)))
    )
    assert np.array_equal(result.as_numpy("y"), outputs["y"])
    assert [
        str(item, "utf-8") if isinstance(item, bytes) else item for item in result.as_numpy("job")
    ] == list(job)


def test_bytes_that_are_no_truth_value_are_refused() -> None:
    flag = TensorSpec(name="f", datatype="BOOL", shape=("n",), batch_axis=0)
    for held in (b"\1\0", b"\1\2"):
        given = np.frombuffer(held, bool)
        (sent := triton.InferInput("f", [2], "BOOL")).set_data_from_numpy(given)
        body, length = triton.InferenceServerClient.generate_request_body([sent])
        bodies = (body, "application/octet-stream", length), (npy(given), "application/x-npy", None)
        for content, kind, header in bodies:
            if held == b"\1\0":
                assert values(content, kind, [flag], header_length=header) == [[True, False]]
            else:
                with pytest.raises(InvalidTensor, match="bytes other than 0 and 1"):
                    values(content, kind, [flag], header_length=header)


def test_the_protocols_timeout_is_in_microseconds() -> None:
    tensor = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}
    body = json.dumps({"inputs": [tensor], "parameters": {"timeout": 1500}}).encode()
    assert decode(body, "", [X])[0].timeout_ms == 1.5
    for wrong in ("1", -1, 0, True, 1.5):
        body = json.dumps({"inputs": [tensor], "parameters": {"timeout": wrong}}).encode()
        with pytest.raises(RequestError, match="microseconds"):
            decode(body, "", [X])


@pytest.mark.parametrize(
    ("body", "kind", "problem"),
    [
        (b"", "application/json", "no JSON"),
        (b"{", "application/json", "no JSON"),
        (b'"\xff"', "application/json", "no JSON"),
        (b"[" * 100_000, "application/json", "no JSON"),
        (b"[NaN", "application/json", "no JSON"),
        (b"3", "application/json", "got a int"),
        (b'{"rows": [[1]]}', "application/json", "neither inputs of the Open"),
        (protocol(shape=[2, 2]), "", "shape \\[2, 2\\], but 6 elements"),
        (protocol(shape=[-2, -3]), "", "but 6 elements"),
        (protocol(shape="2"), "", "Open Inference Protocol: Expected"),
        (protocol(datatype="INT32"), "", "its data is no INT32"),
        (protocol(datatype="FP8"), "", "'FP8' is not a datatype"),
        (protocol(data=None), "", "neither data nor binary_data_size"),
        (protocol(data=["1"] * 6), "", "its data is no FP32"),
        (protocol(data=[[1], [1, 2]]), "", "different shapes"),
        (protocol(shape=[0, 1 << 63], data=[]), "", "its shape is no array's"),
        (protocol(shape=[1] * 17, data=[1]), "", "17 dimensions, at most 16"),
        (protocol(shape=[(1 << 63) - 1] * 20_000), "", "20000 dimensions, at most 16"),
        (protocol()[:-1] + b', "parameters": {"timeout": ' + b"9" * 400 + b"}}", "", "timeout"),
        (protocol(parameters={"binary_data_size": 24}), "", "binary_data_size 24, 0 bytes"),
        (protocol(parameters={"binary_data_size": -1}), "", "binary_data_size -1"),
        (b"", "text/csv", "no line of values"),
        (b"1,2,3\n4,5\n", "text/csv", "line 2 has 2 values"),
        (b"1,2,3\n4,5,x\n", "text/csv", "tensor .x.: line 2 of values: .x. is no FP32"),
        (b"1,2,3\n4," + b"z" * 99 + b",x\n", "text/csv", "line 2 of values: .z{40}. is no FP32"),
        (b'1,2,"3\n', "text/csv", "no CSV"),
        (b"\xff,1,2", "text/csv", "no CSV"),
        (b"[1]\n{", "application/jsonlines", "no JSON"),
        (b"", "application/x-npy", "no npy"),
        (npy(np.zeros(3))[:-1], "application/x-npy", "does not fit 23 bytes"),
        (b"abc", "application/octet-stream", "no JSON"),
    ],
)
def test_malformed_bodies_say_what_is_wrong(body: bytes, kind: str, problem: str) -> None:
    with pytest.raises(RequestError, match=problem) as caught:
        decode(body, kind, [X])
    assert caught.value.http_status == 400


@pytest.mark.parametrize(
    ("header", "other"),
    [
        (b"{'descr': '<f8', ", b"{'descr': ('<f8',), "),
        (b"}  ", b"   "),
        (b"'shape': (3,)", b"'shape': " + b"-" * 3000 + b"1"),
        (b"'shape': (3,)", b"'shape': (-1, -3)"),
    ],
)
def test_a_damaged_npy_file_is_the_callers_fault(header: bytes, other: bytes) -> None:
    whole = npy(np.zeros(3))
    assert header in whole
    length = int.from_bytes(whole[8:10], "little")
    text = whole[10 : 10 + length].replace(header, other)
    body = whole[:8] + len(text).to_bytes(2, "little") + text + whole[10 + length :]
    with pytest.raises(RequestError, match=r"no npy file|does not fit"):
        decode(body, "application/x-npy", [X])


def test_csv_is_read_as_pandas_writes_it() -> None:
    flags = TensorSpec(name="f", datatype="BOOL", shape=("n", 2), batch_axis=0)
    pairs = TensorSpec(name="i", datatype="INT64", shape=("n", 2), batch_axis=0)
    (found,) = values(b"1,,3\n4,5,nan\n", "text/csv", [X])
    np.testing.assert_array_equal(found, [[1, np.nan, 3], [4, 5, np.nan]])
    assert values(b"True,False\n0,1\n", "text/csv", [flags]) == [[[True, False], [False, True]]]
    assert values(b"1.0,-2\n3,4.0\n", "text/csv", [pairs]) == [[[1, -2], [3, 4]]]
    assert values(b"a\n\nb\n\n", "text/csv", [JOB]) == [["a", "", "b", ""]]
    assert values(b"\n", "text/csv", [JOB]) == [[""]]  # as batch transform cuts a file
    for body, spec in (
        (b"True,yes\n", flags),
        (b"True,\n", flags),
        (b"1,\n", pairs),
        (b"1,9007199254740994.0\n", pairs),
    ):
        with pytest.raises(RequestError):
            values(body, "text/csv", [spec])


def test_a_text_that_is_the_name_of_its_input_is_a_text() -> None:
    name = JOB.name.encode()
    assert values(name + b"\nb\n", "text/csv", [JOB]) == [[JOB.name, "b"]]
    assert values(name + b"\nb\n", "text/csv; Header=present", [JOB]) == [["b"]]
    assert values(b"review\nb\n", "text/csv; header=present", [JOB]) == [["b"]]


def test_a_header_that_is_said_to_be_there_is_no_row() -> None:
    table, present = b"width,height,depth\n1,2,3\n", "text/csv;header=present"
    assert values(table, present, [X]) == [[[1, 2, 3]]]
    assert values(b"job,age\na,1\n", present, [AGE, JOB]) == [[1], ["a"]]
    with pytest.raises(RequestError, match=r"names \['a', 'b'\], the model has \['age', 'job'\]"):
        values(b"a,b\n1,x\n", present, [AGE, JOB])


def test_a_line_of_numbers_that_are_names_in_another_order_is_a_row() -> None:
    inputs = [TensorSpec(name=name, datatype="FP32", shape=("n",)) for name in "01"]
    assert values(b"1,0\n3,4\n", "text/csv", inputs) == [[1, 3], [0, 4]]
    assert values(b"0,1\n3,4\n", "text/csv", inputs) == [[3], [4]]  # as pandas names columns
    assert values(b"1,0\n3,4\n", "text/csv; header=present", inputs) == [[4], [3]]


@pytest.mark.parametrize("more", [{"data": []}, {"parameters": {"binary_data_size": 0}}])
def test_a_tensor_of_very_many_dimensions_is_refused_before_they_are_multiplied(
    more: dict[str, Any],
) -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [2**63 - 1] * 200_000} | more
    body = json.dumps({"inputs": [tensor]}).encode()
    with pytest.raises(InvalidTensor, match="200000 dimensions, at most 16"):
        values(body, "application/json", [TensorSpec(name="x", datatype="FP32", shape=("n",))])


def test_a_long_text_in_csv_is_a_text() -> None:
    text, before = "a" * 200_000, csv.field_size_limit()
    assert values(text.encode(), "text/csv", [JOB]) == [[text]]
    assert csv.field_size_limit() == before  # which is the host's, too


def test_a_csv_of_short_fields_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrai_codecs.bodies._fields", None)  # whose turn it would have to await
    assert values(b"1,2,3\n", "text/csv", [X]) == [[[1, 2, 3]]]
    assert values(b"inf,-inf,2\n", "text/csv", [X]) == [[[math.inf, -math.inf, 2]]]


def test_what_python_writes_of_numbers_that_are_none_is_read() -> None:
    body = json.dumps({"instances": [[math.nan, math.inf, -math.inf]]}).encode()
    (found,) = values(body, "application/json", [X])
    np.testing.assert_array_equal(found, [[np.nan, np.inf, -np.inf]])
    with pytest.raises(RequestError):
        values(b'{"age": [NaN], "job": ["a"]}', "application/json", [AGE, JOB])
    with pytest.raises(RequestError, match="no JSON"):
        values(b'{"x": [NaN', "application/json", [X])
    with pytest.raises(RequestError, match="no JSON"):  # as in a body without NaN
        values(b"[[NaN, 1e400, 3]]", "application/json", [X])


@pytest.mark.parametrize("form", [Form(), Form(layout="instances"), Form(layout="inputs")])
def test_infinity_is_not_written_as_what_is_missing(form: Form) -> None:
    given = answer({"y": np.array([1, np.inf, -np.inf, np.nan], np.float32)})
    body, _ = encode(given, form)
    assert b"[1.0,Infinity,-Infinity,NaN]" in body
    lines, _ = encode(given, form, "application/jsonlines")
    assert lines == b"1.0\nInfinity\n-Infinity\nNaN\n"


def test_an_answer_of_many_lines_is_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, isinf = list[int](), np.isinf

    def looking(array: np.ndarray[Any, Any]) -> Any:
        looked.append(array.size)
        return isinf(array)

    monkeypatch.setattr(np, "isinf", looking)
    many = answer({"y": np.zeros((4000, 8), np.float32)})
    body, _ = encode(many, Form(), "application/jsonlines")
    assert body.count(b"\n") == 4000
    assert looked == [32_000]


def test_a_body_with_half_a_character_is_refused_whatever_else_it_holds() -> None:
    with pytest.raises(RequestError, match="no JSON"):
        decode(b'{"id": "NaN\\ud800", "inputs": []}', "application/json", [X])


def test_a_header_that_names_a_column_twice_is_none() -> None:
    a, b = (TensorSpec(name=one, datatype="FP32", shape=("n",), batch_axis=0) for one in "ab")
    with pytest.raises(RequestError):
        values(b"a,b,a\n1,2,3\n", "text/csv", [a, b])
    assert values(b"b,a\n1,2\n", "text/csv", [a, b]) == [[2], [1]]


@pytest.mark.parametrize(
    "accept", ["application/octet-stream", "application/vnd.sagemaker-triton.binary+json"]
)
def test_who_accepts_binary_tensors_alone_gets_them(accept: str) -> None:
    _, form = decode(b'{"instances": [[1, 2, 3]]}', "application/json", [X])
    answer = InferenceResponse(
        model_name="m",
        model_version="1",
        id="",
        outputs={"y": np.ones((1, 3), np.float32)},
        parameters={},
    )
    body, headers = encode(answer, form, accept)
    length = int(headers["Inference-Header-Content-Length"])
    assert headers["Content-Type"] == "application/octet-stream", "`respond` says more"
    assert body[length:] == np.ones(3, np.float32).tobytes()


def test_an_output_says_otherwise_than_all_of_them() -> None:
    body = {
        "inputs": [{"name": "x", "shape": [2, 3], "datatype": "FP32", "data": ROWS}],
        "outputs": [{"name": "y"}, {"name": "t", "parameters": {"binary_data": False}}],
        "parameters": {"binary_data_output": True},
    }
    _, form = decode(json.dumps(body).encode(), "application/json", [X])
    assert form.binary == frozenset({"y"})


@pytest.mark.parametrize("kind", ["application/json", "application/jsonlines"])
def test_text_for_numbers_takes_no_more_memory_than_it_has(kind: str) -> None:
    """An array of texts has room for the longest at each place."""
    rows = ["A" * 1_000_000, *[""] * 2_000]
    lines = "\n".join(map(json.dumps, rows))
    body = json.dumps({"instances": rows}) if kind == "application/json" else lines
    tracemalloc.start()
    try:
        with pytest.raises(InvalidTensor, match="'x'"):
            values(body.encode(), kind, [X])
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("levels", [70, 500, 900])
def test_lists_in_lists_are_no_tensor_however_deep(levels: int) -> None:
    body = b'{"instances": ' + b"[" * levels + b"1" + b"]" * levels + b"}"
    with pytest.raises(RequestError):
        values(body, "application/json", [X])


def test_lines_of_nothing_take_no_memory() -> None:
    body = b"\n" * 2_200_000
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="no line of values"):
            decode(body, "text/csv", [X])
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()
    with pytest.raises(RequestError, match="2200000 empty lines, 1048576 are allowed"):
        decode(body, "text/csv", [JOB])


def test_bytes_behind_the_tensors_are_refused() -> None:
    head = protocol(data=None, parameters={"binary_data_size": 24})
    for extra, length in ((b"x", len(head)), (b"", 0), (b"", len(head) + 25)):
        with pytest.raises(RequestError):
            decode(head + bytes(24) + extra, "", [X], header_length=length)


def test_a_tensor_given_twice_is_refused() -> None:
    tensor = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}
    with pytest.raises(InvalidTensor, match="given twice"):
        decode(json.dumps({"inputs": [tensor, tensor]}).encode(), "", [X])


def test_an_npy_file_can_neither_be_a_pickle_nor_claim_memory() -> None:
    pickled = io.BytesIO()
    np.lib.format.write_array(pickled, np.array([{}], object), allow_pickle=True)
    with pytest.raises(RequestError, match="pickles"):
        decode(pickled.getvalue(), "application/x-npy", [X])
    huge = npy(np.zeros((2, 3))).replace(b"(2, 3), }   ", b"(2, 9999), }")
    huge = huge.replace(b"(2, 9999)", b"(9**9, 9)")
    for body in (huge, npy(np.zeros((2, 3))).replace(b"(2, 3)", b"(2, 9)")):
        with pytest.raises(RequestError):
            decode(body, "application/x-npy", [X])


def test_an_unknown_type_is_named_with_those_that_are_read() -> None:
    with pytest.raises(UnsupportedMediaType, match=r"'image/png' is not read.*text/csv") as caught:
        decode(b"", "image/png", [X])
    assert caught.value.http_status == 415


@given(st.binary(max_size=300), st.sampled_from(["", *MEDIA_TYPES]))
def test_no_body_gets_anything_but_a_request_or_a_refusal(body: bytes, kind: str) -> None:
    for length in (None, 10):
        with contextlib.suppress(RequestError):  # any other error fails the test
            decode(body, kind, [AGE, JOB], header_length=length)


def answer(outputs: dict[str, np.ndarray[Any, Any]]) -> InferenceResponse:
    return InferenceResponse(
        model_name="m", model_version="1", id="7", outputs=outputs, parameters={"variant": "int8"}
    )


ONE = answer({"y": np.array([[0.5], [np.nan]], np.float32)})
TWO = answer({"y": np.array([1, 2], np.int64), "t": np.array(["a", b"b"], object)})

WORDS = answer({"w": np.array([["a", b"bc"]], object)})
NONE = answer({"boxes": np.zeros((0, 4), np.float32)})  # a detector that found nothing
NUMBERS = answer({"a": np.array(1.5), "b": np.array(2)})


@pytest.mark.parametrize(
    ("response", "form", "accept", "body"),
    [
        (ONE, Form(layout="instances"), "", b'{"predictions":[[0.5],[null]]}'),
        (TWO, Form(layout="instances"), "", b'{"predictions":[{"y":1,"t":"a"},{"y":2,"t":"b"}]}'),
        (TWO, Form(layout="inputs"), "*/*", b'{"outputs":{"y":[1,2],"t":["a","b"]}}'),
        (TWO, Form(layout="instances"), "text/html, text/csv;q=0.5", b"1,a\n2,b\n"),
        (ONE, Form(media_type="text/csv", layout="instances"), "", b"0.5\nnan\n"),
        (TWO, Form(), "application/jsonlines", b'{"y":1,"t":"a"}\n{"y":2,"t":"b"}\n'),
        (ONE, Form(), "application/x-npy", npy(ONE.outputs["y"])),
        (WORDS, Form(), "application/x-npy", npy(np.array([["a", "bc"]]))),
        (NONE, Form(), "text/csv", b""),
        (NUMBERS, Form(layout="instances"), "", b'{"predictions":[{"a":1.5,"b":2}]}'),
        (TWO, Form(layout="instances"), "text/*", b"1,a\n2,b\n"),
        (TWO, Form(media_type="text/csv"), "text/*", b"1,a\n2,b\n"),
        (
            TWO,
            Form(media_type="text/csv", layout="inputs"),
            "application/*",
            b'{"outputs":{"y":[1,2],"t":["a","b"]}}',
        ),
    ],
)
def test_answers_are_written_as_asked(
    response: InferenceResponse, form: Form, accept: str, body: bytes
) -> None:
    written, headers = encode(response, form, accept)
    assert written == body
    assert headers["Content-Type"]


def test_a_text_with_ends_of_lines_in_csv_is_one_text() -> None:
    texts = ["a\rb", "c\nd", "e\r\nf", ",", '"', "g", ""]
    body, _ = encode(answer({"y": np.array(texts, object)}), Form(), "text/csv")
    assert values(body, "text/csv", [JOB]) == [texts]
    assert body.endswith(b'\ng\n""\n'), "lines end as ever"


def test_an_npy_file_is_not_as_large_as_its_longest_text_in_each_row() -> None:
    texts = np.array(["a" * 10_000, *["b"] * 10_000], object)
    tracemalloc.start()
    try:
        with pytest.raises(NotAcceptable, match="npy"):
            encode(answer({"y": texts}), Form(), "application/x-npy")
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_the_protocols_answer_names_model_variant_and_tensors() -> None:
    body, headers = encode(TWO, Form())
    assert headers == {"Content-Type": "application/json"}
    assert json.loads(body) == {
        "model_name": "m",
        "model_version": "1",
        "id": "7",
        "parameters": {"variant": "int8"},
        "outputs": [
            {"name": "y", "shape": [2], "datatype": "INT64", "data": [1, 2]},
            {"name": "t", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]},
        ],
    }


@pytest.mark.parametrize(
    ("response", "accept", "problem"),
    [
        (ONE, "image/png", "not written here"),
        (TWO, "application/x-npy", "npy holds one array"),
        (answer({"y": np.array(["a\0"], object)}), "application/x-npy", "end in NUL"),
        (answer({"y": np.zeros(2), "z": np.zeros(3)}), "text/csv", "'z' has no line for each row"),
        (answer({"y": np.ones(())}), "text/csv", "no line for each row"),
        (
            answer({"y": np.zeros(2), "z": np.zeros(3)}),
            "application/jsonlines",
            "different numbers",
        ),
    ],
)
def test_an_answer_that_does_not_fit_is_not_acceptable(
    response: InferenceResponse, accept: str, problem: str
) -> None:
    with pytest.raises(NotAcceptable, match=problem) as caught:
        encode(response, Form(), accept)
    assert caught.value.http_status == 406


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        ("UINT8", "300"), ("UINT8", "-1"), ("INT32", "4294967297"), ("UINT64", "-1"),
        ("INT8", "1.5"), ("INT64", "9007199254740993.0"), ("FP32", "1e400"), ("FP64", "-1e999"),
    ],
)  # fmt: skip
def test_a_number_in_csv_that_does_not_fit_is_refused(datatype: str, value: str) -> None:
    spec = TensorSpec(name="x", datatype=datatype, shape=("n", 2), batch_axis=0)
    with pytest.raises(InvalidTensor, match=f"line 1 of values: .* is no {datatype}"):
        decode(f"1,{value}\n".encode(), "text/csv", [spec])
    request, _ = decode(b"1, 2\n3,4\n", "text/csv", [spec])
    assert np.asarray(request.inputs["x"]).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("datatype", ["INT32", "FP32", "BOOL"])
def test_what_only_python_takes_for_a_number_is_refused_in_csv(datatype: str) -> None:
    spec = TensorSpec(name="x", datatype=datatype, shape=("n", 2), batch_axis=0)
    with pytest.raises(InvalidTensor, match=f"line 1 of values: .* is no {datatype}"):
        decode(b"1_2,3\n", "text/csv", [spec])
