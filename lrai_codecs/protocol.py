"""The Open Inference Protocol over HTTP: JSON, and the binary tensor data extension."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np

from lrai_codecs.forms import BINARY, JSON, Form
from lrai_codecs.tensors import Array, array_of, datatype_of, dtype_of
from lrai_core import (
    InferenceRequest,
    InferenceResponse,
    InvalidTensor,
    RequestError,
    Tensor,
    TensorSpec,
)

_MOST_DIMENSIONS: Final = 16  # as of binary tensors


class _Tensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Infer(msgspec.Struct):
    inputs: list[_Tensor]
    id: str = ""
    outputs: list[_Output] = []
    parameters: dict[str, Any] = {}


def is_protocol(data: Any) -> bool:
    """Return whether parsed JSON means to follow the protocol: its inputs state shape or type."""
    inputs = data.get("inputs") if isinstance(data, Mapping) else None
    first = inputs[0] if isinstance(inputs, list) and inputs else None
    return isinstance(first, Mapping) and bool({"shape", "datatype"} & first.keys())


def read_protocol(data: Any, behind: bytes = b"") -> tuple[InferenceRequest, Form]:
    """Return the request of parsed JSON and of the bytes of its binary tensors behind it.

    Raises:
        RequestError: It does not follow the protocol.
    """
    try:
        stated = msgspec.convert(data, _Infer)
    except msgspec.ValidationError as error:
        problem = f"the body does not follow the Open Inference Protocol: {error}"
        raise RequestError(problem) from None
    tensors: dict[str, Array | Tensor] = {}
    view, position = memoryview(behind), 0
    for tensor in stated.inputs:
        if tensor.name in tensors:
            raise InvalidTensor(tensor.name, "given twice")
        if len(tensor.shape) > _MOST_DIMENSIONS:  # before their product, which takes hours
            problem = f"{len(tensor.shape)} dimensions, at most {_MOST_DIMENSIONS} are allowed"
            raise InvalidTensor(tensor.name, problem)
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            tensors[tensor.name] = _listed(tensor)
            continue
        if type(size) is not int or not 0 <= size <= len(view) - position:
            left = len(view) - position
            given = str(size)[:40]
            raise InvalidTensor(tensor.name, f"binary_data_size {given}, {left} bytes are left")
        tensors[tensor.name] = Tensor(
            name=tensor.name,
            datatype=tensor.datatype,
            shape=tuple(tensor.shape),
            data=view[position : position + size],
        )
        position += size
    if position != len(view):
        raise RequestError(f"{len(view) - position} bytes are left over behind the tensors")
    every = stated.parameters.get("binary_data_output") is True
    named = {o.name for o in stated.outputs if o.parameters.get("binary_data", every) is True}
    request = InferenceRequest(
        model_name="",
        id=stated.id,
        inputs=tensors,
        outputs=tuple(one.name for one in stated.outputs),
        timeout_ms=_timeout(stated.parameters),
    )
    return request, Form(binary=None if every and not stated.outputs else frozenset(named))


def _listed(tensor: _Tensor) -> Array:
    if tensor.data is None:
        raise InvalidTensor(tensor.name, "has neither data nor binary_data_size")
    wanted = dtype_of(tensor.datatype)
    array = array_of(tensor.name, tensor.data, wanted)
    if array.dtype != wanted and array.size:
        raise InvalidTensor(tensor.name, f"its data is no {tensor.datatype}")
    if min(tensor.shape, default=0) < 0 or math.prod(tensor.shape) != array.size:
        raise InvalidTensor(tensor.name, f"shape {tensor.shape}, but {array.size} elements")
    try:
        return array.astype(wanted, copy=False).reshape(tensor.shape)
    except (ValueError, OverflowError):
        raise InvalidTensor(tensor.name, "its shape is no array's") from None


def _timeout(parameters: Mapping[str, Any]) -> float | None:
    """Return `timeout`, in microseconds as Triton has it, in milliseconds."""
    timeout = parameters.get("timeout")
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int) or not 0 < timeout < 1 << 63:
        given = repr(timeout)[:40]
        raise RequestError(f"timeout {given}: a number of microseconds is needed")
    return timeout / 1000


def write_protocol(
    response: InferenceResponse, outputs: Mapping[str, Array], binary: frozenset[str] | None
) -> tuple[bytes, dict[str, str]]:
    """Return an answer's body and headers; `binary` as in `Form`."""
    stated, behind = [], []
    for name, array in outputs.items():
        tensor: dict[str, Any] = {"name": name, "shape": array.shape}
        tensor["datatype"] = datatype_of(array)
        if binary is None or name in binary:
            behind.append(_bytes_of(array))
            tensor["parameters"] = {"binary_data_size": len(behind[-1])}
        else:
            tensor["data"] = array.ravel().tolist()
        stated.append(tensor)
    head = json_encoder(outputs)(
        {
            "model_name": response.model_name,
            "model_version": response.model_version,
            "id": response.id,
            "parameters": {k: v for k, v in response.parameters.items() if v is not None},
            "outputs": stated,
        }
    )
    if not behind:
        return head, {"Content-Type": JSON}
    headers = {"Content-Type": BINARY, "Inference-Header-Content-Length": str(len(head))}
    return b"".join([head, *behind]), headers


def json_encoder(outputs: Mapping[str, Array]) -> Callable[[Any], bytes]:
    """Return what writes content made of these outputs as JSON; NaN is null.

    Where there is infinity, which JSON has not, it is `Infinity`, and NaN `NaN`, as Python's own
    module and TensorFlow Serving write them: null would be read as NaN.
    """
    if any(array.dtype.kind == "f" and np.isinf(array).any() for array in outputs.values()):
        return _with_infinity
    return msgspec.json.encode


def _with_infinity(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


def _bytes_of(array: Array) -> bytes:
    if array.dtype.kind != "O":
        return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    texts = [str(element).encode() for element in array.ravel()]
    return b"".join(len(one).to_bytes(4, "little") + one for one in texts)


def declared(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    """Return what the protocol's metadata of a model says of its inputs or outputs."""
    shapes = [[n if isinstance(n, int) else -1 for n in spec.shape] for spec in specs]
    return [
        {"name": spec.name, "datatype": spec.datatype, "shape": shape}
        for spec, shape in zip(specs, shapes, strict=True)
    ]
