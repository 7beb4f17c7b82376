"""The operators of onnxruntime-extensions that make tokens of text, and no other of them.

The library has operators that read files by name; a graph that asks for one is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError

from lrai_core.errors import ArtifactError, EnvironmentProblem, shorten

_OPERATORS: Final = (
    *("BertTokenizer", "GPT2Tokenizer", "SentencepieceTokenizer"),
    *("StringEqual", "StringRegexReplace"),
)
_ALLOWED: Final = {("ai.onnx.contrib", operator) for operator in _OPERATORS}
_ENGINE_DOMAINS: Final = {  # those of onnxruntime itself; the library has two, and may get more
    *("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"),
    "com.ms.internal.nhwc",
}


def register(options: ort.SessionOptions, model: str | bytes) -> None:
    """Let a session have what its graph asks for; an entry point of the group `lrai.operators`.

    Args:
        options: Of the session.
        model: The graph, or its file.

    Raises:
        ArtifactError: The graph asks for an operator that is not allowed, or cannot be read.
        EnvironmentProblem: The library is not installed.
    """
    try:
        content = model if isinstance(model, bytes) else Path(model).read_bytes()
        proto = onnx.load_model_from_string(content)
        bpe = [n.attribute for n in _nodes(proto) if n.op_type == "GPT2Tokenizer"]
        words = [json.loads(a.s) for own in bpe for a in own if a.name == "vocab"]
        # An id as large as their number the library (0.15) writes beyond what it has allocated.
        if any(not {*own.values()} <= {*range(len(own))} for own in words):
            raise ArtifactError("the vocabulary of a GPT2Tokenizer has ids with a gap")
    except (DecodeError, OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ArtifactError(f"the graph cannot be read: {shorten(str(error))}") from None
    asked = {(n.domain, n.op_type) for n in _nodes(proto) if n.domain not in _ENGINE_DOMAINS}
    if refused := sorted(asked - _ALLOWED):
        domain, operator = map(shorten, refused[0])
        known = ", ".join(_OPERATORS)
        raise ArtifactError(f"operator {operator!r} of {domain} is none of those allowed: {known}")
    spec = find_spec("onnxruntime_extensions")  # importing it would bring more than the library
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    libraries = [file for folder in folders for file in Path(folder).glob("_extensions_pydll*.so")]
    if not libraries:
        raise EnvironmentProblem("the model takes text: pip install 'lrai[text]'")
    # What was looked at is what is run: no other format that the same bytes may be.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.register_custom_ops_library(str(libraries[0]))


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    bodies = [model.graph, *model.functions]
    while bodies:
        for node in bodies.pop().node:
            yield node
            for attribute in node.attribute:
                bodies += [attribute.g, *attribute.graphs]
