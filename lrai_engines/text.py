"""The operator of onnxruntime-extensions that makes tokens of text, and no other of them.

The library has operators that read files by name; a graph that asks for one is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError

from lrai_core.errors import ArtifactError, EnvironmentProblem, shorten

_DOMAIN: Final = "ai.onnx.contrib"
_ALLOWED: Final = {"BertTokenizer"}


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
        if isinstance(model, bytes):
            proto = onnx.load_model_from_string(model)
        else:
            proto = onnx.load(model, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise ArtifactError(f"the graph cannot be read: {shorten(str(error))}") from None
    asked = {node.op_type for node in _nodes(proto) if node.domain == _DOMAIN}
    if refused := sorted(asked - _ALLOWED):
        allowed = ", ".join(sorted(_ALLOWED))
        raise ArtifactError(f"operator {shorten(refused[0])!r} of {_DOMAIN} is not {allowed}")
    spec = find_spec("onnxruntime_extensions")  # importing it would bring more than the library
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    libraries = [file for folder in folders for file in Path(folder).glob("_extensions_pydll*.so")]
    if not libraries:
        raise EnvironmentProblem("the model takes text: pip install 'lrai[text]'")
    options.register_custom_ops_library(str(libraries[0]))


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    bodies = [model.graph, *model.functions]
    while bodies:
        for node in bodies.pop().node:
            yield node
            for attribute in node.attribute:
                bodies += [attribute.g] if attribute.HasField("g") else []
                bodies += attribute.graphs
