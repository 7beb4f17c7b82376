"""What `mlflow.pyfunc` serves: requests of MLflow into LRAI's, answers as `mlflow.onnx` gives."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from mlflow.environment_variables import MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException, get_error_code
from mlflow.models import Model
from mlflow.models.model import MLMODEL_FILE_NAME
from numpy.typing import NDArray

import lrai_core as lrai
from lrai_codecs import by_name, dtype_of, fit, in_turn, rows_at_a_time, text
from lrai_import.held import Held, running, when_gone
from lrai_mlflow.settings import settings_of
from lrai_mlflow.watch import Watch, is_worker, tell_cap, workers_told

Answer = dict[str, NDArray[Any]] | pd.DataFrame
DATA: Final = "model.lrai"  # beside MLmodel
FLAVOR_NAME: Final = "lrai"
_log: Final = logging.getLogger("mlflow.lrai")  # of those that MLflow shows in its servers


class ServedModel:
    """One artifact in a runtime, which the threads of this process share, and other processes.

    It is let go when it is collected, and at the latest when the process exits.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any] | None = None) -> None:
        """Load it, or find it loaded.

        Args:
            path: Of the artifact inside a saved model.
            settings: `model_config`: see `settings_of`.

        Raises:
            MlflowException: The artifact cannot be served as the settings demand.
        """
        with mlflow_errors():
            data, asked = Path(path), settings_of(settings)
            if data.name != DATA or not data.with_name(MLMODEL_FILE_NAME).is_file():
                raise lrai.ArtifactError(f"no {DATA} beside an MLmodel: changed after saving")
            saved = Model.load(str(data.parent))
            artifact = opened(data.parent, saved)  # every file hashed, for it may be found loaded
            workers = workers_told() if is_worker() else 0
            if is_worker():
                asked = asked.within(MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.get())
            held = Held(artifact, asked.placed(artifact, workers))
        self.held, self._signature = held, artifact.manifest.signature
        self._rows_a_second = rows_a_second(artifact, held.variant)
        self._in_parts = not is_worker()  # who asks over the network has limits
        source = origin(saved)
        self._by_row, self._columns = not is_onnx(source), source.get("source_columns", [])
        when_gone(self, held.close)
        if is_worker():
            _log.info("LRAI serves %s: %s", artifact.manifest.name, held.variant)
            tell_cap(artifact, held.variant)
            Watch(held, asked.config.actor.start_timeout_seconds)

    def predict(self, data: Any, params: Mapping[str, Any] | None = None) -> Answer:
        """Return the outputs by name: arrays, or for a DataFrame a DataFrame.

        Any number of rows, but in a server's worker, where `limits.request_rows` is the most.

        Args:
            data: Arrays or lists by input name; for a model with one input also the array itself;
                a DataFrame whose columns are the inputs or, for a model with one input, its
                features; or records, a list of dictionaries.
            params: `timeout_ms`: how long the caller will wait; `outputs`: names of those wanted,
                with commas between them.

        Raises:
            MlflowException: The request was refused, with the status that says why.
        """
        with mlflow_errors():
            if isinstance(data, pd.DataFrame) and not len(data):
                kinds = {one.name: dtype_of(one.datatype) for one in self._signature.outputs}
                names = [name for name in _wanted(params or {}) if name in kinds] or kinds
                return pd.DataFrame({name: np.zeros(0, kinds[name]) for name in names})
            table = ordered(data, self._columns)
            request = to_lrai(table, self._signature.inputs, params or {}, self.held.name)
            config, most = self.held.runtime.config, sys.maxsize
            if self._in_parts:  # calls of about a second: nobody has to wait for one for long
                config = running(config) or config  # its limits count, not those of this process
                most = min(rows_at_a_time(request, config), self._rows_a_second)
            response = in_turn(self.held.infer, request, self._signature, most, config)
        return from_lrai(response, data, by_row=self._by_row)


def opened(folder: Path, saved: Model, *, verify: bool = True) -> lrai.Artifact:
    """Return the artifact in a saved model; a warning where another lrai has saved it.

    Args:
        folder: Of the model.
        saved: What its `MLmodel` says.
        verify: See `Artifact.open`.

    Raises:
        ArtifactError: It has changed since it was saved, or is newer than this version.
    """
    its, ours = saved.flavors.get(FLAVOR_NAME, {}).get("lrai_version", "?"), lrai.__version__
    artifact = lrai.Artifact.open(folder / DATA, verify=verify)
    if its != ours and verify:  # who looks at it again was told
        _log.warning("the model was saved by lrai %s, and is served by lrai %s", its, ours)
    return artifact


def rows_a_second(artifact: lrai.Artifact, variant: str) -> int:
    """Return how many rows a call has that takes a second, as the profile tells; one at least."""
    points = artifact.manifest.variant(variant).latency
    rows, ms = max(((one.rows, one.median_ms) for one in points), key=itemgetter(1), default=(1, 0))
    return max(1, int(rows / ms * 1e3)) if ms else sys.maxsize


@contextlib.contextmanager
def mlflow_errors() -> Iterator[None]:
    """Turn LRAI's errors into MLflow's, which its scoring server answers with the same status."""
    try:
        yield
    except lrai.LraiError as error:
        wait = getattr(error, "retry_after_seconds", None)
        more = {} if wait is None else {"retry_after_seconds": wait}
        # What only loading and converting raise is about what was asked for.
        unusable = isinstance(error, lrai.ArtifactError | lrai.CompileError)
        asked = unusable or isinstance(error, lrai.ConditionNotMet | lrai.UsageError)
        status = 400 if asked else error.http_status
        raise MlflowException(str(error), get_error_code(status), **more) from error


def to_lrai(
    data: Any, inputs: Sequence[lrai.TensorSpec], params: Mapping[str, Any], model_name: str
) -> lrai.InferenceRequest:
    """Return the request that `data` states; what does not fit is for the runtime to refuse."""
    return lrai.InferenceRequest(
        model_name=model_name,
        inputs=fit(_by_name(data, inputs), inputs),
        outputs=_wanted(params),
        timeout_ms=params.get("timeout_ms"),
    )


def _wanted(params: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, (params.get("outputs") or "").split(","))))


def from_lrai(response: lrai.InferenceResponse, data: Any, *, by_row: bool = False) -> Answer:
    """Return the answer in the form that `mlflow.onnx` gives to a request of this form.

    That is, for a DataFrame of scalars, each output flattened into a column: of k numbers a row
    there are k times as many rows. A DataFrame with lists in its cells, which `mlflow.onnx`
    refuses, is answered row by row with arrays in the cells, and so is any other `by_row`. Where
    there is a row for each row, it has that one's index, by which pandas joins them.
    """
    outputs = {name: text(output) for name, output in response.outputs.items()}
    if not isinstance(data, pd.DataFrame):
        return outputs
    sizes = {output.size for output in outputs.values()}
    flat = len(sizes) == 1 and not any(map(_holds_lists, map(data.get, data.columns)))
    flat = flat and (not by_row or sizes == {len(data)})
    answer = pd.DataFrame({n: o.reshape(-1) if flat else list(o) for n, o in outputs.items()})
    if len(answer) == len(data):
        answer.index = data.index
    return answer


def origin(model: Model) -> dict[str, Any]:
    """Return what a saved model says of the one that it was made of; nothing where of none."""
    return (model.metadata or {}).get("lrai_origin") or {}


def is_onnx(source: Mapping[str, Any]) -> bool:
    """Return whether what was made of this takes the place of a model of `mlflow.onnx`."""
    return bool(source.get("source_flavor", "onnx") == "onnx")


def ordered(data: Any, columns: Sequence[str]) -> Any:
    """Return a table with these columns, in this order; as it is where there are no names.

    Raises:
        UsageError: Some are missing.
    """
    if not isinstance(data, pd.DataFrame) or not columns or data.columns.dtype.kind == "i":
        return data
    if missing := [name for name in columns if name not in data.columns]:
        raise lrai.UsageError(f"columns {missing} are missing; the model takes {columns}")
    return data[columns]


def _by_name(data: Any, inputs: Sequence[lrai.TensorSpec]) -> dict[str, Any]:
    if not isinstance(data, pd.DataFrame):
        return by_name(data, inputs)
    names = [spec.name for spec in inputs]
    if len(names) == 1 and list(data.columns) != names:
        mixed = inputs[0].datatype.strip("U").startswith("INT") and data.dtypes.nunique() > 1
        # Of columns of several kinds numpy makes real numbers, which not all whole ones are.
        whole = data.to_numpy(dtype=object).tolist() if mixed else _values(data, inputs[0])
        return {names[0]: whole}
    return {one.name: _column(data[one.name], one) for one in inputs if one.name in data.columns}


def _column(column: pd.Series[Any], spec: lrai.TensorSpec) -> Any:
    return column.tolist() if _holds_lists(column) else _values(column, spec)


def _values(data: pd.DataFrame | pd.Series[Any], spec: lrai.TensorSpec) -> NDArray[Any]:
    """Return the values; NaN among real numbers where pandas has a word of its own (Int64)."""
    values = data.to_numpy()
    missing = values.dtype.kind == "O" and spec.datatype.startswith("FP")
    return data.to_numpy(na_value=np.nan) if missing else values


def _holds_lists(column: pd.Series[Any] | None) -> bool:
    return column is not None and len(column) > 0 and isinstance(column.iloc[0], list | np.ndarray)
