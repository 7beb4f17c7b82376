"""Bodies by their content type: protocol, rows and columns in JSON, lines of JSON, CSV and npy."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Final, cast

import msgspec
import numpy as np

from lrai_codecs.forms import (
    BINARY,
    CSV,
    JSON,
    LINES,
    MEDIA_TYPES,
    NPY,
    TRITON,
    Form,
    Layout,
    NotAcceptable,
    UnsupportedMediaType,
)
from lrai_codecs.protocol import is_protocol, json_encoder, read_protocol, write_protocol
from lrai_codecs.tensors import EXACT, Array, by_name, dtype_of, fit, text
from lrai_core import InferenceRequest, InferenceResponse, InvalidTensor, RequestError, TensorSpec

_any_decoder: Final = msgspec.json.Decoder()
_LAYOUT_KEYS: Final[tuple[Layout, ...]] = ("instances", "inputs")
_fields: Final = threading.Lock()  # of csv's limit, which is the process's
_USUAL_FIELD: Final = csv.field_size_limit()
_TRUTHS: Final = {"true": "1", "false": "0"}
_MOST_EMPTY: Final = 1 << 20  # lines of CSV, each of which takes memory
_MOST_TEXT_BYTES: Final = 1 << 26  # of texts in npy, each of which takes as much as the longest
_NPY_HEADERS: Final = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def decode(
    body: bytes,
    content_type: str,
    inputs: Sequence[TensorSpec],
    *,
    header_length: int | None = None,
) -> tuple[InferenceRequest, Form]:
    """Return the request that a body states, without a model's name, and how it was written.

    Args:
        body: At most as large as the host allows.
        content_type: Of the body, with or without parameters; JSON if empty, or if it is one of
            bytes and no header length is given.
        inputs: What the model declares.
        header_length: The header `Inference-Header-Content-Length`, where there is one: the bytes
            of JSON, with binary tensors behind it.

    Raises:
        UnsupportedMediaType: Of that type nothing is read.
        RequestError: It is malformed.
    """
    media = content_type.partition(";")[0].strip().lower() or JSON
    if (length := header_length) is not None:
        if not 0 < length <= len(body):
            raise RequestError(f"the header counts {length} bytes of JSON of {len(body)} in all")
        return read_protocol(_parsed(body[:length]), body[length:])
    if media in (JSON, BINARY):  # which SDKs send where nobody names a type
        return _json(_parsed(body), inputs)
    form = Form(media_type=media, layout="instances")
    if media == LINES:
        rows = [_parsed(line) for line in body.splitlines() if line.strip()]
        return _request(by_name(rows, inputs), inputs), form
    if media == CSV:
        return _request(_csv(body, inputs, content_type.lower()), inputs), form
    if media == NPY:
        return _request(by_name(_npy(body), inputs), inputs), form
    raise UnsupportedMediaType(f"{media[:60]!r} is not read here: " + ", ".join(MEDIA_TYPES))


def encode(
    response: InferenceResponse, form: Form, accept: str = ""
) -> tuple[bytes, dict[str, str]]:
    """Return the body of an answer and its headers, `Content-Type` among them.

    Args:
        response: The answer.
        form: How the request was written.
        accept: The caller's header `Accept`; the form of the request if empty or `*/*`. The first
            type that is known here is taken; weights do not count.

    Raises:
        NotAcceptable: None of the types is written here, or the answer does not fit it.
    """
    media = _accepted(accept, form)
    outputs = {name: text(output) for name, output in response.outputs.items()}
    if media == CSV:
        return _csv_of(outputs), {"Content-Type": f"{CSV}; charset=utf-8"}
    if media == NPY:
        return _npy_of(outputs), {"Content-Type": NPY}
    if media == LINES:
        lines = list(map(json_encoder(outputs), _rows(outputs)))
        return b"\n".join([*lines, b""]), {"Content-Type": LINES}
    if media == BINARY:
        return write_protocol(response, outputs, form.binary or None)
    if form.layout == "protocol":
        return write_protocol(response, outputs, form.binary)
    if form.layout == "instances":
        return json_encoder(outputs)({"predictions": _rows(outputs)}), {"Content-Type": JSON}
    columns = {name: output.tolist() for name, output in outputs.items()}
    return json_encoder(outputs)({"outputs": columns}), {"Content-Type": JSON}


def _parsed(body: bytes) -> Any:
    try:
        return _any_decoder.decode(body.removeprefix(b"\xef\xbb\xbf"))  # as PowerShell writes it
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        if b"NaN" in body or b"Infinity" in body:  # as Python and numpy's users write them
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(body, parse_float=_finite)
                json.dumps(found, ensure_ascii=False).encode()  # UTF-8 throughout
                return found
        raise RequestError(f"the body is no JSON: {error}") from None


def _finite(number: str) -> float:
    if math.isinf(value := float(number)):
        raise ValueError(number)
    return value


def _json(data: Any, inputs: Sequence[TensorSpec]) -> tuple[InferenceRequest, Form]:
    if is_protocol(data):
        return read_protocol(data)
    layout: Layout = "inputs" if isinstance(data, Mapping) else "instances"
    known = {spec.name for spec in inputs}
    named = data.keys() & known if isinstance(data, Mapping) else {None}
    if not named or (named == {"inputs"} and isinstance(data["inputs"], Mapping)):
        keys = [key for key in _LAYOUT_KEYS if key in data]
        if not keys:
            raise RequestError(
                "the body has neither inputs of the Open Inference Protocol, nor `instances`, nor "
                f"`inputs`, nor the model's {sorted(known)}"
            )
        layout, data = keys[0], data[keys[0]]
    return _request(by_name(data, inputs), inputs), Form(layout=layout)


def _request(given: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> InferenceRequest:
    return InferenceRequest(model_name="", inputs=fit(given, inputs))


def _csv(body: bytes, inputs: Sequence[TensorSpec], content_type: str) -> dict[str, Any]:
    """Return the columns of the inputs, in the model's order or that of a line of their names.

    For a model with one input of two dimensions, a line is a row of features. A first line is one
    of names where the type says so, text/csv; header=present, and where it names the inputs, but
    for a model of a text alone.
    """
    names, texts = [spec.name for spec in inputs], [spec.datatype == "BYTES" for spec in inputs]
    try:
        reader = csv.reader(io.StringIO(body.decode("utf-8-sig"), newline=""), strict=True)
        lines, empty = list[list[str]](), 0
        with _long_fields(len(body)):
            for line in reader:
                # One without anything is a text for a model that takes one; for others it is none.
                empty += not line
                if line or (texts == [True] and empty <= _MOST_EMPTY):
                    lines.append(line)
    except (csv.Error, UnicodeError) as error:
        raise RequestError(f"the body is no CSV in UTF-8: {error}") from None
    if texts == [True] and empty > _MOST_EMPTY:
        raise RequestError(f"the body has {empty} empty lines, {_MOST_EMPTY} are allowed")
    # Also at the end: batch transform cuts a file between any two lines, and joins the answers.
    lines = [line or [""] for line in lines]
    # One text alone may be any text, the name of the input too.
    if lines and "header=present" in content_type.replace(" ", ""):
        names = _header(lines.pop(0), names)
    elif lines and texts != [True] and _names(lines[0], names):
        names = lines.pop(0)
    if not lines:
        raise RequestError("the body has no line of values")
    width = len(lines[0])
    for number, line in enumerate(lines, 1):
        if len(line) != width:
            raise RequestError(f"line {number} has {len(line)} values, the first one {width}")
    known = {spec.name: spec for spec in inputs}
    if len(names) == 1 and len(inputs[0].shape) == 2:
        return {names[0]: _numbers(lines, inputs[0], width)}
    if width != len(names):
        raise RequestError(f"{width} values in a line, {len(names)} are needed: {names}")
    columns = zip(names, zip(*lines, strict=True), strict=True)
    return {name: _numbers(list(column), known[name]) for name, column in columns}


@contextlib.contextmanager
def _long_fields(most: int) -> Iterator[None]:
    """Let a text in CSV be as long as its body, here and now: one longer than is usual."""
    if most <= _USUAL_FIELD:
        yield
        return
    with _fields:
        before = csv.field_size_limit()
        csv.field_size_limit(max(before, most))
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _names(first: list[str], names: list[str]) -> bool:
    """Return whether a line names the inputs; numbers in another order are values."""
    return first == names or (sorted(first) == sorted(names) and not all(map(str.isdecimal, names)))


def _header(first: list[str], names: list[str]) -> list[str]:
    """Return the inputs in the order of a line of names; of one input, whatever it is called."""
    if len(names) == 1:
        return names
    if sorted(first) != sorted(names):
        raise RequestError(f"the first line names {str(first)[:200]}, the model has {names}")
    return first


def _numbers(values: list[Any], spec: TensorSpec, width: int = 1, first: int = 0) -> Array:
    """Return values as pandas writes them: nothing between commas is NaN, and 1.0 is a 1.

    Args:
        values: Texts, or lines of them.
        spec: Of the input.
        width: Values in a line.
        first: How many are before these.
    """
    wanted, each = dtype_of(spec.datatype), np.asarray(values, dtype=np.object_)
    if wanted.kind == "O":
        return each
    try:
        if any("_" in str(one) for one in each.flat):  # which Python's own numbers may have
            raise ValueError
        if wanted.kind in "iu":  # by way of Python's, which numpy does not wrap round
            limits = np.iinfo(wanted)
            whole = [_whole(str(one)) for one in each.flat]
            if not all(limits.min <= one <= limits.max for one in whole):
                raise OverflowError
            return np.asarray(whole, dtype=wanted).reshape(each.shape)
        if wanted.kind == "b":
            flat = [_TRUTHS.get(str(one).strip().lower(), one) for one in each.flat]
            each = np.asarray(flat, dtype=np.object_).reshape(each.shape)
        each[each == ""] = "nan"
        numbers = each.astype(np.float64)
        if any(map(str.isdecimal, "".join(map(str, each[np.isinf(numbers)])))):  # no word for it
            raise OverflowError
        return numbers
    except (ValueError, OverflowError):
        if half := each.size // 2:  # one of both says which: there may be millions
            _numbers(each.flat[:half].tolist(), spec, width, first)
            _numbers(each.flat[half:].tolist(), spec, width, first + half)
        got = f"line {first // width + 1} of values: {str(each.flat[0])[:40]!r}"
        raise InvalidTensor(spec.name, f"{got} is no {spec.datatype}") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)
    if not number.is_integer() or abs(number) >= EXACT:  # which other whole numbers round to
        raise ValueError(text)
    return int(number)


def _npy(body: bytes) -> Array:
    """Return the array of an npy file, without trusting the size that its header states."""
    file = io.BytesIO(body)
    try:
        header = _NPY_HEADERS[np.lib.format.read_magic(file)]
        shape, fortran_order, dtype = header(file, max_header_size=10_000)
        if dtype.hasobject:
            raise RequestError("the body is an npy file of objects, which are pickles")
        data = memoryview(body)[file.tell() :]
        if math.prod(shape) * dtype.itemsize != len(data) or not dtype.itemsize:
            raise RequestError(f"shape {list(shape)} of {dtype} does not fit {len(data)} bytes")
        array = np.frombuffer(data, dtype)
        return array.reshape(shape, order="F" if fortran_order else "C")
    except RequestError:
        raise
    except Exception:  # noqa: BLE001 - numpy reads the header as Python, and raises as that does
        raise RequestError("the body is no npy file") from None


def _accepted(accept: str, form: Form) -> str:
    wanted = [one.partition(";")[0].strip().lower() for one in accept.split(",") if one.strip()]
    for media in wanted or ["*/*"]:
        own = JSON if form.media_type == BINARY else form.media_type
        if media == "*/*":
            return own
        for known in (own, *MEDIA_TYPES):  # that of the request before others of its kind
            if media == known or (media.endswith("/*") and known.startswith(media[:-1])):
                return known
        if media == TRITON:
            return BINARY
    raise NotAcceptable(f"{accept[:60]!r} is not written here: " + ", ".join(MEDIA_TYPES))


def _rows(outputs: Mapping[str, Array]) -> list[Any]:
    """Return one value or record per row, as the rows of all outputs are the same ones."""
    if len({len(output) if output.ndim else -1 for output in outputs.values()}) != 1:
        raise NotAcceptable("the outputs have different numbers of rows; ask for columns")
    columns = [output.tolist() for output in outputs.values()]
    if len(columns) == 1:
        rows = columns[0]
        return rows if isinstance(rows, list) else [rows]
    if not next(iter(outputs.values())).ndim:  # a number each, for all rows
        return [dict(zip(outputs, columns, strict=True))]
    return [dict(zip(outputs, values, strict=True)) for values in zip(*columns, strict=True)]


def _csv_of(outputs: Mapping[str, Array]) -> bytes:
    flat = []
    for name, output in outputs.items():
        if not output.ndim or len(output) != len(next(iter(outputs.values()))):
            raise NotAcceptable(f"output {name!r} has no line for each row; ask for JSON")
        flat.append(output.reshape(len(output), math.prod(output.shape[1:])).tolist())
    lines = list[str]()
    # Python 3.11 quotes a text with a CR where that is in the end of a line, which is cut below.
    writer = csv.writer(cast("Any", SimpleNamespace(write=lines.append)))
    writer.writerows([value for part in row for value in part] for row in zip(*flat, strict=True))
    return "".join(line[:-2] + "\n" for line in lines).encode()


def _npy_of(outputs: Mapping[str, Array]) -> bytes:
    if len(outputs) != 1:
        raise NotAcceptable(f"npy holds one array, the answer has {sorted(outputs)}")
    (array,) = outputs.values()
    file = io.BytesIO()
    if array.dtype.kind == "O":
        texts = [str(one) for one in array.flat]
        takes = 4 * len(texts) * max(map(len, texts), default=0)
        if takes > _MOST_TEXT_BYTES or any(one.endswith("\0") for one in texts):
            raise NotAcceptable("npy has no room for texts as long as these, or that end in NUL")
        array = array.astype(np.str_)
    np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
    return file.getvalue()
