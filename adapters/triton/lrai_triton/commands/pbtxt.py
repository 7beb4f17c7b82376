"""`config.pbtxt` as text: its backend is found and changed without touching anything else.

Its form is protobuf's text format. Comments, layout and the order of fields are the user's.
"""

from __future__ import annotations

import re
from typing import Any, Final

from google.protobuf import json_format, text_format

from lrai_core import ArtifactError, EnvironmentProblem

LRAI: Final = 'backend: "lrai"'
_TOKEN: Final = re.compile(
    r"#[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|[^#\"'{}<>\[\]]+|[^\"']"
)
_FIELD: Final = re.compile(r'(\w+)\s*:\s*"(_*)"', re.ASCII)


def config_of(text: str) -> dict[str, Any]:
    """Return what the text says, in the form that Triton hands to backends.

    Raises:
        ArtifactError: It is no model configuration of Triton's, or has a field that those of the
            tritonclient here have not; says in which line.
        EnvironmentProblem: The definition of those is not installed.
    """
    try:
        from tritonclient.grpc.model_config_pb2 import ModelConfig

        # Triton takes any bytes in comments and strings.
        config = text_format.Parse(text.encode(errors="replace"), ModelConfig())
    except ImportError:
        raise EnvironmentProblem("this needs tritonclient: pip install 'lrai[triton]'") from None
    except text_format.ParseError as error:
        raise ArtifactError(f"config.pbtxt is not as tritonclient reads it: {error}") from None
    options = {"preserving_proto_field_name": True, "always_print_fields_with_no_presence": True}
    return dict(json_format.MessageToDict(config, **options))


def backend_of(text: str) -> str:
    """Return the backend that the text names, or the platform in its place, or nothing.

    Raises:
        ArtifactError: A string or a brace does not end.
    """
    said = said_in(text)
    return said.get("backend") or said.get("platform") or ""


def said_in(text: str) -> dict[str, str]:
    """Return what the strings of the outermost message say, by field; raises the same."""
    # Before a string there may be comments.
    return {n: str(_TOKEN.findall(text[at])[-1][1:-1]) for n, at in _places(text).items()}


def switched(text: str) -> str:
    """Return the text with our backend in place of the one that it names; the rest is as it was."""
    places = _places(text)
    if not {"backend", "platform"} & places.keys():
        return text + ("\n" if text and not text.endswith("\n") else "") + LRAI + "\n"
    platform = 'platform: ""' if "backend" in places else LRAI
    return _replaced(text, {"backend": LRAI, "platform": platform})


def switched_back(text: str, original: str) -> str:
    """Return the text with the backend, or platform, that the original names in place of ours."""
    was = {name: original[place] for name, place in _places(original).items()}
    # Where nothing is named, onnxruntime is what Triton finds for a model.onnx.
    back = {"backend": was.get("backend") or was.get("platform") or 'backend: "onnxruntime"'}
    if {"backend", "platform"} <= was.keys():
        back["platform"] = was["platform"]
    return _replaced(text, back)


def _replaced(text: str, new: dict[str, str]) -> str:
    for name, place in reversed(_places(text).items()):
        text = text[: place.start] + new.get(name, text[place]) + text[place.stop :]
    return text


def _places(text: str) -> dict[str, slice]:
    """Return where the fields of the outermost message that hold a string lie, in their order."""
    masked, depth = "", 0  # the same text without comments, what is nested and what strings hold
    for token in _TOKEN.findall(text):
        depth -= token in ("}", ">", "]")
        shown = f'"{"_" * (len(token) - 2)}"' if token[0] in "\"'" else token
        masked += " " * len(token) if depth or token[0] == "#" else shown
        depth += token in ("{", "<", "[")
    # A lone quote is no token: the lengths differ.
    if depth or len(masked) != len(text) or re.search(r'"_*"\s*"', masked):
        raise ArtifactError("a string or a brace in config.pbtxt does not end, or begin")
    return {found[1]: slice(*found.span()) for found in _FIELD.finditer(masked)}
