"""What `hosts.py` sends to a server, and how answers are read: JSON, as each host takes it."""

from __future__ import annotations

import json
from typing import Any, Final

import numpy as np

from benchmarks.callers import Array, Row, Wire
from benchmarks.processes import HOST


def body_of(form: str, row: Row) -> bytes:
    """Return the body that states a row.

    Args:
        form: `inputs`, columns below that key; `named`, the columns themselves; `rows`, a list of
            the token ids alone.
        row: int64 arrays [1, tokens] by name.
    """
    content: dict[str, Any] = {name: array.tolist() for name, array in row.items()}
    if form == "inputs":
        content = {"inputs": content}
    elif form == "rows":
        content = {"rows": row["input_ids"].tolist()}
    return json.dumps(content, separators=(",", ":")).encode()


def request(target: str, row: Row, _output: str, _timeout_us: int | None) -> bytes:
    """Return a whole HTTP request for `FORM PATH`."""
    form, _, path = target.partition(" ")
    body = body_of(form, row)
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {HOST}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def answer(_head: bytes, content: bytes, output: str) -> Array:
    """Return the output, float32 [rows, width], alone in the answer or below the names it has."""
    said = json.loads(content)
    while isinstance(said, dict):
        said = said.get(output, next(iter(said.values())))
    return np.array(said, np.float32)


WIRE: Final = Wire(request, answer)
