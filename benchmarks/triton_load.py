"""Callers of a Triton server over HTTP, with the bodies of Triton's own client."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import tritonclient.http as triton
from tritonclient.utils import np_to_triton_dtype

from benchmarks import callers
from benchmarks.callers import Array, Wire
from benchmarks.processes import HOST

_HEADER: Final = re.compile(rb"\r\ninference-header-content-length: *(\d+)", re.IGNORECASE)


class Load(callers.Load):
    """The process with the callers."""

    def __init__(self, port: int, cpu: int) -> None:
        """Start it on one CPU, for the server on a port."""
        super().__init__(port, cpu, Wire(_request, _answer, _version))


def _request(model: str, row: Mapping[str, Array], output: str, timeout_us: int | None) -> bytes:
    """Return a whole HTTP request with the body that Triton's client builds."""
    inputs = []
    for name, array in row.items():
        tensor = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    outputs = [triton.InferRequestedOutput(output, binary_data=True)]
    body, header = triton.InferenceServerClient.generate_request_body(
        inputs, outputs=outputs, timeout=timeout_us
    )
    lines = [
        f"POST /v2/models/{model}/infer HTTP/1.1",
        f"Host: {HOST}",
        "Content-Type: application/octet-stream",
        f"Inference-Header-Content-Length: {header}",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + bytes(body)


def _answer(head: bytes, content: bytes, output: str) -> Array:
    array: Array = _result(head, content).as_numpy(output)
    return array


def _version(head: bytes, content: bytes) -> str:
    return str(_result(head, content).get_response()["model_version"])


def _result(head: bytes, content: bytes) -> triton.InferResult:
    found = _HEADER.search(head)
    return triton.InferenceServerClient.parse_response_body(
        content, header_length=int(found[1]) if found else None
    )
