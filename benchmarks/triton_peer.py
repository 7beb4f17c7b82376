"""What LRAI is measured against in Triton: a `model.py` as people write it around ONNX Runtime.

How it runs the requests of a list is said by the configuration's parameters: `way` is `one` (one
by one), `equal` (all of one shape, in one call), `padded` (up to `rows` of them in one call, padded
to the longest) or `constant` (no model at all, an answer that is always the same). The model is the
`model.onnx` of the version, unless the parameter `model` names another file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """What the python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model that the parameters name, with one thread."""
        config = json.loads(args["model_config"])
        parameters = config.get("parameters", {})
        given = {key: value["string_value"] for key, value in parameters.items()}
        self._output = config["output"][0]["name"]
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._way, self._rows = given.get("way", "one"), int(given.get("rows", "1"))
        self._constant = np.ones((1, *map(int, config["output"][0]["dims"])), np.float32)
        if self._way != "constant":
            beside = Path(args["model_repository"], args["model_version"], "model.onnx")
            self._session = _session(given.get("model", str(beside)), given.get("weights", ""))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer a list of requests."""
        if self._way == "constant":
            return [self._response(self._constant) for _ in requests]
        rows = [
            {
                name: pb_utils.get_input_tensor_by_name(request, name).as_numpy()
                for name in self._inputs
            }
            for request in requests
        ]
        answers: list[Any] = []
        size = {"one": 1, "equal": len(rows), "padded": self._rows}[self._way]
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            if len(part) == 1:
                (output,) = self._session.run([self._output], part[0])
                answers.append(self._response(output))
                continue
            (output,) = self._session.run([self._output], self._joined(part))
            answers += [self._response(output[i : i + 1]) for i in range(len(part))]
        return answers

    def _joined(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return requests of one row each as one call."""
        longest = max(row[self._inputs[0]].shape[1] for row in rows)
        joined = {name: np.zeros((len(rows), longest), np.int64) for name in self._inputs}
        for name, array in joined.items():
            for index, row in enumerate(rows):
                array[index, : row[name].shape[1]] = row[name][0]
        return joined

    def _response(self, output: Any) -> Any:
        return pb_utils.InferenceResponse([pb_utils.Tensor(self._output, output)])


def _session(model: str, weights: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if weights:  # of a compiled variant: stored as executed
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        folder = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(folder, weights)
    given = Path(model).read_bytes() if weights else model
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
