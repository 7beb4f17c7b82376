"""The probe that `lrai triton watch` sends, and what `serve` reads from the server's arguments."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lrai_triton.commands import supervise


def tensor(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}


def test_a_probe_is_zeros_of_the_smallest_shape() -> None:
    inputs = [tensor("ids", "INT64", [-1, -1]), tensor("image", "FP16", [-1, 3, 2])]
    body, headers = supervise._zeros(inputs)
    text = int(headers["Inference-Header-Content-Length"])
    sent = json.loads(body[:text])["inputs"]
    assert [given["shape"] for given in sent] == [[1, 1], [1, 3, 2]]
    assert [given["parameters"]["binary_data_size"] for given in sent] == [8, 12]
    assert body[text:] == bytes(20)


@pytest.mark.parametrize(
    ("datatype", "size"), [("BOOL", 1), ("UINT8", 1), ("BF16", 2), ("FP64", 8), ("BYTES", 4)]
)
def test_a_zero_has_the_size_of_its_datatype(datatype: str, size: int) -> None:
    body, headers = supervise._zeros([tensor("x", datatype, [3])])
    assert len(body) - int(headers["Inference-Header-Content-Length"]) == 3 * size


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--http-port=81"], "81"),
        (["--http-port", "81"], "81"),
        (["--http-port=80", "--http-port", "81"], "81"),
        (["--http-port-of-another=81"], "80"),
        (["--id=--http-port=81"], "80"),
        ([], "80"),
    ],
)
def test_options_of_the_server_are_read_in_both_forms(arguments: list[str], value: str) -> None:
    assert supervise._given(arguments, "http-port", "80") == value
