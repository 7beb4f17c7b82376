"""What LRAI is measured against in Triton: a `model.py` as people write it around ONNX Runtime.

How it runs the requests of a list is said by the configuration's parameters: `way` is `one` (one
by one), `equal` (all of one shape, in one call), `padded` (up to `rows` of them in one call, padded
to the longest), `grouped` (those of one length in one call, without padding) or `constant` (no
model at all, an answer that is always the same). The model is the `model.onnx` of the version,
unless the parameter `model` names another file. Nobody asks for huge pages here, as LRAI does.
"""

from __future__ import annotations

import json
import os
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
        answers: list[Any] = [None] * len(rows)
        for indices in self._calls(rows):
            part = [rows[index] for index in indices]
            joined = part[0] if len(part) == 1 else self._joined(part)
            (output,) = self._session.run([self._output], joined)
            for place, index in enumerate(indices):
                own = output if len(part) == 1 else output[place : place + 1]
                answers[index] = self._response(own)
        return answers

    def _calls(self, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
        """Return the indices of the requests that share a call, for every call."""
        if self._way == "grouped":
            lengths: dict[int, list[int]] = {}
            for index, row in enumerate(rows):
                lengths.setdefault(row[self._inputs[0]].shape[1], []).append(index)
            return list(lengths.values())
        size = {"one": 1, "equal": len(rows), "padded": self._rows}[self._way]
        places = range(len(rows))
        return [list(places[first : first + size]) for first in range(0, len(rows), size)]

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
    # Bound to one CPU, as all of the server is here, onnxruntime (1.32) would not use AMX.
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    import onnxruntime

    os.sched_setaffinity(0, cpus)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if weights:  # of a compiled variant: stored as executed
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        folder = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(folder, weights)
    given = Path(model).read_bytes() if weights else model
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
