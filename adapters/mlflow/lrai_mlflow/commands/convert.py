"""A logged model of another flavor as one of this: a new version that knows its origin."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from importlib.metadata import entry_points
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
) -> ModelInfo:
    """Compile a logged model of another flavor, log it as one of lrai's, and return that.

    It keeps the inputs of its signature, or that it has none, so that it takes the requests that it
    took; its outputs are those of the ONNX model, a row of them for a row. It keeps its example and
    its metadata; not what its Python code took, which it has no more. Tags name what it was made of
    (`lrai.source_…`), metadata too.

    Args:
        model_uri: Of a model of onnx, pytorch, sklearn, lightgbm or xgboost.
        name: Of the logged model; by default that of the registered one, or `model`.
        registered_model_name: Where it becomes a new version; by default the registered model that
            `model_uri` names, if it names one.
        evaluation: See `lrai_core.compile`; without it only fp32 is kept. A DataFrame has the
            columns of a request, in any order, and may have others.
        metric: See `lrai_core.compile`, as for the two that follow.
        output_map: How outputs are compared.
        threads: To measure with.
        allow_pickle: Open a model that could run code of whoever made it. That happens in a child
            process, and not where picklescan finds something; it is a precaution, no sandbox.

    Raises:
        MlflowException: It is of none of these flavors, could run code, or cannot be converted.
    """
    with mlflow_errors(), tempfile.TemporaryDirectory(prefix="lrai-convert-") as scratch:
        (to := Path(scratch, "source")).mkdir()  # else it would stay where MLflow puts it
        folder = Path(_download_artifact_from_uri(str(model_uri), output_path=str(to)))
        model = Model.load(str(folder))
        example = model.load_input_example(str(folder))  # before the work, for it may not be there
        registered = registered_model_name or _registered(str(model_uri))
        called = name or re.sub(r"[/:.%\"']", "_", registered or "model")  # not all is allowed
        (converter,) = entry_points(group="lrai.converters", name="mlflow")
        source, flavor = converter.load()(folder, Path(scratch), allow_pickle=allow_pickle)
        artifact = lrai.compile(
            source,
            out=Path(scratch, re.sub(r"[^\w.-]", "_", called) + ".lrai"),
            evaluation=_rows(evaluation, source, model.signature),
            metric=metric,
            output_map=output_map,
            threads=threads,
        )
        origin = {
            "source_uri": str(model_uri),
            "source_model_id": model.model_id or model.model_uuid,
            "source_run_id": model.run_id,
            "source_flavor": flavor,
        }
        return log_model(
            artifact,
            name=called,
            registered_model_name=registered,
            signature=_signature(model, artifact) if model.signature else False,
            input_example=example,
            metadata={**(model.metadata or {}), "lrai_origin": origin},
            tags={f"lrai.{key}": str(value) for key, value in origin.items() if value},
        )


def _rows(
    given: str | Path | Mapping[str, Any] | pd.DataFrame | None,
    source: Path,
    signature: ModelSignature | None,
) -> str | Path | Mapping[str, Any] | None:
    """Return rows to judge on; of a table the columns of the signature, as requests have them."""
    if not isinstance(given, pd.DataFrame):
        return given
    inputs = signature and signature.inputs
    if inputs and inputs.has_input_names() and not inputs.is_tensor_spec():
        names = [one.name for one in inputs.inputs if one.required or one.name in given.columns]
        if missing := [name for name in names if name not in given.columns]:
            raise lrai.UsageError(f"evaluation has no columns {missing}; the model takes {names}")
        given = given[names]
    memory_bytes = _MEMORY_BYTES + 4 * source.stat().st_size
    told = lrai.run_task(told_by, str(source), memory_bytes=memory_bytes, timeout_seconds=_SECONDS)
    return to_lrai(given, told.inputs, {}, "").inputs


def told_by(source: str) -> lrai.Signature:
    """Return what an ONNX file declares. In a child process, which it may kill."""
    return lrai.declared(onnx.load(source, load_external_data=False))


def _signature(model: Model, artifact: lrai.Artifact) -> ModelSignature:
    own = signature_of(artifact)
    given = model.signature.inputs or own.inputs
    return ModelSignature(inputs=given, outputs=own.outputs, params=own.params)


def _registered(model_uri: str) -> str | None:
    """Return the registered model that an address names, None where it names none."""
    if not model_uri.startswith("models:/"):
        return None
    found: str | None = _parse_model_uri(model_uri).name
    return found
