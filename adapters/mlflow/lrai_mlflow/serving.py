"""What `mlflow.pyfunc` serves: requests of MLflow into LRAI's, answers as `mlflow.onnx` gives."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException, get_error_code
from numpy.typing import NDArray

from lrai_codecs import by_name, fit, text
from lrai_core import (
    Artifact,
    InferenceRequest,
    InferenceResponse,
    LraiError,
    Runtime,
    TensorSpec,
    load_config,
)

Array = NDArray[Any]
Answer = dict[str, Array] | pd.DataFrame


class ServedModel:
    """One artifact behind one embedded runtime, which the threads of the server share.

    The runtime is closed when the model is collected, and at the latest when the process exits.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        with mlflow_errors():
            artifact = Artifact.open(path, verify=False)  # the actor hashes what it opens
            self._runtime = Runtime.open(artifact, config=load_config(host=settings))
        self._inputs = artifact.manifest.signature.inputs
        weakref.finalize(self, self._runtime.close)

    def predict(self, data: Any, params: Mapping[str, Any] | None = None) -> Answer:
        """Return the outputs by name: arrays, or for a DataFrame a DataFrame.

        Args:
            data: Arrays or lists by input name; for a model with one input also the array itself;
                a DataFrame whose columns are the inputs or, for a model with one input, its
                features; or records, a list of dictionaries.
            params: `timeout_ms`: how long the caller will wait.

        Raises:
            MlflowException: The request was refused, with the status that says why.
        """
        with mlflow_errors():
            request = to_lrai(data, self._inputs, params or {})
            response = self._runtime.infer(request)
        return from_lrai(response, data)


@contextlib.contextmanager
def mlflow_errors() -> Iterator[None]:
    """Turn LRAI's errors into MLflow's, which its scoring server answers with the same status."""
    try:
        yield
    except LraiError as error:
        wait = getattr(error, "retry_after_seconds", None)
        more = {} if wait is None else {"retry_after_seconds": wait}
        raise MlflowException(str(error), get_error_code(error.http_status), **more) from error


def to_lrai(data: Any, inputs: Sequence[TensorSpec], params: Mapping[str, Any]) -> InferenceRequest:
    """Return the request that `data` states; what does not fit is for the runtime to refuse."""
    return InferenceRequest(
        model_name="",
        inputs=fit(_by_name(data, inputs), inputs),
        timeout_ms=params.get("timeout_ms"),
    )


def from_lrai(response: InferenceResponse, data: Any) -> Answer:
    """Return the answer in the form that `mlflow.onnx` gives to a request of this form.

    That is, for a DataFrame of scalars, each output flattened into a column. A DataFrame with lists
    in its cells, which `mlflow.onnx` refuses, is answered row by row with arrays in the cells.
    """
    outputs = {name: text(output) for name, output in response.outputs.items()}
    if not isinstance(data, pd.DataFrame):
        return outputs
    sizes = {output.size for output in outputs.values()}
    if len(sizes) == 1 and not any(map(_holds_lists, map(data.get, data.columns))):
        return pd.DataFrame({name: output.reshape(-1) for name, output in outputs.items()})
    return pd.DataFrame({name: list(output) for name, output in outputs.items()})


def _by_name(data: Any, inputs: Sequence[TensorSpec]) -> dict[str, Any]:
    if not isinstance(data, pd.DataFrame):
        return by_name(data, inputs)
    names = [spec.name for spec in inputs]
    if len(names) == 1 and list(data.columns) != names:
        return {names[0]: data.to_numpy()}
    return {name: _column(data[name]) for name in names if name in data.columns}


def _column(column: pd.Series[Any]) -> Any:
    return column.tolist() if _holds_lists(column) else column.to_numpy()


def _holds_lists(column: pd.Series[Any] | None) -> bool:
    return column is not None and len(column) > 0 and isinstance(column.iloc[0], list | np.ndarray)
