"""A logged model of another flavor as one of this: a new version that knows its origin."""

from __future__ import annotations

import inspect
import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from operator import methodcaller
from pathlib import Path
from typing import Any, Final, Literal

import onnx
import pandas as pd
from mlflow.models import Model, ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.store.artifact.utils.models import _parse_model_uri
from mlflow.tracking.artifact_utils import _download_artifact_from_uri

import lrai_core as lrai
from lrai_mlflow.commands.facts import signature_of
from lrai_mlflow.flavor import log_model
from lrai_mlflow.serving import mlflow_errors, to_lrai

_MEMORY_BYTES: Final = 8 << 30  # address space, of which libraries reserve much and use little
_SECONDS: Final = 300.0
_LABEL: Final = "label"  # of a row, for `lrai_core.compile`
_OWN: Final = {"model", "out", "evaluation", "progress"}  # arguments that are `convert`'s
_SPLIT: Final = methodcaller("split", ",")
_KINDS: Final[dict[str, Any]] = {"int": int, "float": float, "Sequence[str]": _SPLIT}


def convert(
    model_uri: str,
    *,
    name: str | None = None,
    registered_model_name: str | None = None,
    evaluation: str | Path | Mapping[str, Any] | pd.DataFrame | None = None,
    metric: Literal["top1", "top5"] = "top1",
    output_map: Literal["raw", "softmax", "l2_normalised"] = "raw",
    threads: int = 0,
    allow_pickle: bool = False,
    options: Mapping[str, Any] | None = None,
    **log: Any,
) -> ModelInfo:
    """Compile a logged model of another flavor, log it as one of lrai's, and return that.

    It keeps the inputs of its signature, or that it has none, so that it takes the requests that it
    took: of a table whose columns have names the ones that it was fitted with, in any order. Its
    outputs are those of the ONNX model, a row of them for a row. It keeps its example and its
    metadata; not what its Python code took, which it has no more. Tags name what it was made of
    (`lrai.source_…`), metadata too.

    Args:
        model_uri: Of a model of onnx, pytorch, sklearn, lightgbm or xgboost.
        name: Of the logged model; by default that of the registered one, or `model`.
        registered_model_name: Where it becomes a new version; by default the registered model that
            `model_uri` names, if it names one.
        evaluation: See `lrai_core.compile`; without it only fp32 is kept. A DataFrame has the
            columns of a request, in any order, and may have others; `label`, unless it is one of
            the request's, has the labels, by which `metric` judges.
        metric: See `lrai_core.compile`, as for the two that follow.
        output_map: How outputs are compared.
        threads: To measure with.
        allow_pickle: Open a model that could run code of whoever made it. That happens in a child
            process, and not where picklescan finds something; it is a precaution, no sandbox.
        options: More of `lrai_core.compile`, by name: `max_accuracy_loss`, `engines`, `cache`, …
        log: Of `log_model`, by name: `pip_requirements`, `model_config`, `step`, …; metadata and
            tags beside those that it has here, others in place of them.

    Raises:
        MlflowException: It is of none of these flavors, could run code, or cannot be converted.
        TypeError: `log_model` takes no such argument.
    """
    inspect.signature(log_model).bind("", **log)  # before the work
    with mlflow_errors(), tempfile.TemporaryDirectory(prefix="lrai-convert-") as scratch:
        how: dict[str, Any] = {"metric": metric, "output_map": output_map, "threads": threads}
        _known(how := how | dict(options or {}))
        (to := Path(scratch, "source")).mkdir()  # else it would stay where MLflow puts it
        folder = Path(_download_artifact_from_uri(str(model_uri), output_path=str(to)))
        model = Model.load(str(folder))
        carried = model.metadata or {}
        told = str((model.saved_input_example_info or {}).get("artifact_path", ""))
        if not (folder / told).resolve().is_relative_to(folder.resolve()):  # it would be published
            raise lrai.ArtifactError("the model's example lies outside of it")
        example = model.load_input_example(str(folder))  # before the work, for it may not be there
        registered = registered_model_name or _registered(str(model_uri))
        called = name or re.sub(r"[/:.%\"']", "_", registered or "model")  # not all is allowed
        (converter,) = entry_points(group="lrai.converters", name="mlflow")
        source, flavor, fitted = converter.load()(folder, Path(scratch), allow_pickle=allow_pickle)
        artifact = lrai.compile(
            source,
            out=Path(scratch, re.sub(r"[^\w.-]", "_", called) + ".lrai"),
            evaluation=_rows(evaluation, source, model.signature, fitted),
            **how,
        )
        origin = {
            "source_uri": str(model_uri), "source_model_id": model.model_id or model.model_uuid,
            "source_run_id": model.run_id, "source_flavor": flavor,
        }  # fmt: skip
        tags = {f"lrai.{k}": str(v) for k, v in origin.items() if v}
        asked = model.signature and model.signature.inputs
        if len(artifact.manifest.signature.inputs) == 1 and not (asked and asked.is_tensor_spec()):
            origin["source_columns"] = fitted  # of a table, which has no names any more
        own = {
            "signature": _signature(model, artifact) if model.signature else False,
            "input_example": example,
            **log,
            "metadata": carried | (log.get("metadata") or {}) | {"lrai_origin": origin},
            "tags": tags | (log.get("tags") or {}),
        }
        return log_model(artifact, name=called, registered_model_name=registered, **own)


def options_of(given: Sequence[str] | None) -> dict[str, Any]:
    """Return options of `lrai_core.compile` that are written KEY=VALUE, several values with commas.

    Raises:
        UsageError: There is no such option, or the value is none of its kind.
    """
    found: dict[str, Any] = dict(one.partition("=")[::2] for one in given or ())
    for key, parameter in _known(found).items():
        kind = str(parameter.annotation).removesuffix(" | None")
        try:
            found[key] = _KINDS.get(kind, str)(found[key])
        except ValueError:
            raise lrai.UsageError(f"{key} is {found[key][:60]!r}, {kind} is needed") from None
    return found


def _known(given: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    """Return what `lrai_core.compile` says of options that it is given.

    Raises:
        UsageError: One of them is none.
    """
    options = {k: v for k, v in inspect.signature(lrai.compile).parameters.items() if k not in _OWN}
    if unknown := given.keys() - options:
        raise lrai.UsageError(f"no option {min(unknown)[:60]!r}; there are {', '.join(options)}")
    return {key: options[key] for key in given}


def _rows(
    given: str | Path | Mapping[str, Any] | pd.DataFrame | None,
    source: Path,
    signature: ModelSignature | None,
    fitted: Sequence[str] = (),
) -> str | Path | Mapping[str, Any] | None:
    """Return rows to judge on; of a table the columns that requests have, and the labels."""
    if not isinstance(given, pd.DataFrame):
        return given
    memory_bytes = _MEMORY_BYTES + 4 * source.stat().st_size
    told = lrai.run_task(told_by, str(source), memory_bytes=memory_bytes, timeout_seconds=_SECONDS)
    inputs, names = signature and signature.inputs, list(given.columns)
    if fitted and len(told.inputs) == 1:
        names = [*fitted]
    elif inputs and inputs.has_input_names() and not inputs.is_tensor_spec():
        names = [one.name for one in inputs.inputs if one.required or one.name in given.columns]
    elif not any(one.name == _LABEL or one.shape[1:] == (len(names),) for one in told.inputs):
        names = [name for name in names if name != _LABEL]
    if missing := [name for name in names if name not in given.columns]:
        raise lrai.UsageError(f"evaluation has no columns {missing}; the model takes {names}")
    labels = {n: given[n].to_numpy() for n in given.columns if n == _LABEL and n not in names}
    return {**to_lrai(given[names], told.inputs, {}, "").inputs, **labels}


def told_by(source: str) -> lrai.Signature:
    """Return what an ONNX file declares. In a child process, which it may kill."""
    return lrai.declared(onnx.load(source, load_external_data=False))


def _signature(model: Model, artifact: lrai.Artifact) -> ModelSignature:
    own = signature_of(artifact)
    given = model.signature.inputs or own.inputs
    return ModelSignature(inputs=given, outputs=own.outputs, params=own.params)


def _registered(uri: str) -> str | None:
    """Return the registered model that an address names, None where it names none."""
    found: str | None = _parse_model_uri(uri).name if uri.startswith("models:/") else None
    return found
