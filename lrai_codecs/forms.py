"""How a body is written: its media type, and of JSON the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from lrai_core import RequestError

JSON: Final = "application/json"
LINES: Final = "application/jsonlines"
CSV: Final = "text/csv"
NPY: Final = "application/x-npy"
TRITON: Final = "application/vnd.sagemaker-triton.binary+json"  # what SageMaker calls BINARY
BINARY: Final = "application/octet-stream"  # the protocol's binary tensor data extension
MEDIA_TYPES: Final = (JSON, LINES, CSV, NPY, BINARY)


Layout = Literal["protocol", "instances", "inputs"]


class UnsupportedMediaType(RequestError):
    """The body is of a type that is not read here."""

    http_status = 415


class NotAcceptable(RequestError):
    """The answer cannot be written in any of the types that the caller accepts."""

    http_status = 406


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a request was written, which is how its answer is written by default.

    Attributes:
        media_type: One of `MEDIA_TYPES`.
        layout: Of JSON: `protocol`, the Open Inference Protocol; `instances`, a list of rows or
            records; `inputs`, columns.
        binary: Outputs that the caller wants as bytes behind the JSON; None for all.
    """

    media_type: str = JSON
    layout: Layout = "protocol"
    binary: frozenset[str] | None = frozenset()
