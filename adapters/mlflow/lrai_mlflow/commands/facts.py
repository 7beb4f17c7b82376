"""What an artifact knows of itself, in the forms that MLflow keeps: metadata, tags, metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import mlflow
import msgspec
import numpy as np
from mlflow.entities import Metric
from mlflow.models import ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.types import ParamSchema, ParamSpec, Schema
from mlflow.types import TensorSpec as MlflowTensorSpec
from mlflow.utils.time import get_current_time_millis

import lrai_core
from lrai_codecs import dtype_of, text
from lrai_core import Artifact, TensorSpec, certificates
from lrai_core.artifact import EVALUATION, QUANTIZATION_LOG
from lrai_core.verifier.sample import load_rows
from lrai_mlflow import serving
from lrai_mlflow.flavor import of_ours
from lrai_mlflow.settings import flat

_PREFIX: Final = "lrai."
_TYPES: Final = {"timeout_ms": "double", "outputs": "string"}  # of `params`
_PARAMS: Final = ParamSchema([ParamSpec(name, kind, None) for name, kind in _TYPES.items()])
_GATE: Final = ("agreement", "agreement_bound", "accuracy_loss", "accuracy_loss_bound")


def signature_of(artifact: Artifact) -> ModelSignature:
    """Return the artifact's inputs and outputs as MLflow states them, -1 for a free dimension."""
    declared = artifact.manifest.signature
    inputs, outputs = _schema(declared.inputs), _schema(declared.outputs)
    return ModelSignature(inputs=inputs, outputs=outputs, params=_PARAMS)


def opened(given: Artifact | str | Path) -> Artifact:
    """Return an artifact, every file of it hashed now."""
    return Artifact.open(given.path if isinstance(given, Artifact) else given)


def facts_of(artifact: Artifact) -> dict[str, Any]:
    """Return what the model's metadata says: the variant, the gate, what is certified of it."""
    manifest = artifact.manifest
    chosen = manifest.variant(manifest.chosen)
    return {
        "lrai_version": lrai_core.__version__,
        "artifact_version": artifact.version,
        "source_sha256": manifest.source.sha256,
        "variant": chosen.id,
        "precision": chosen.precision,
        "why": chosen.why,
        "speedup": chosen.speedup,
        "batch_effect": chosen.batch_effect,
        "size_bytes": chosen.size_bytes,
        "gate": msgspec.json.decode(msgspec.json.encode(chosen.gate)),  # as it is read again
        "target": msgspec.to_builtins(manifest.target),
        "certificates": [
            {"id": c.id, "tier": c.tier, "epsilon": c.epsilon, "upper_bound": c.upper_bound}
            | {"confidence": c.confidence, "statement": c.statement()}
            for c in certificates(artifact, chosen.id)
        ],
    }


def tags_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags by which a logged or registered model is found."""
    tags = {name: str(facts[name]) for name in ("lrai_version", "artifact_version", "variant")}
    if facts["certificates"]:
        tags["certificate"] = facts["certificates"][0]["id"]
    return {_PREFIX + name.removeprefix("lrai_"): value for name, value in tags.items()}


def metrics_of(facts: Mapping[str, Any]) -> dict[str, float]:
    """Return what was measured; what does not apply to this model is left out."""
    gate = facts["gate"] or {}
    found = {name: facts[name] for name in ("speedup", "batch_effect", "size_bytes")}
    found |= {name: gate.get(name) for name in _GATE} | ({} if gate else {"batch_effect": None})
    found |= {f"difference_{at}": value for at, value in gate.get("difference", {}).items()}
    for certificate in facts["certificates"][:1]:
        found |= {f"certificate_{n}": certificate[n] for n in ("epsilon", "upper_bound")}
    return {_PREFIX + name: float(value) for name, value in found.items() if value is not None}


def log_facts(artifact: Artifact, facts: Mapping[str, Any], logged: ModelInfo, step: int) -> None:
    """Log the metrics to the run, if one is active, and its logged model; its log to the run."""
    if (run := mlflow.active_run()) is None:
        return
    run_id = run.info.run_id
    now, client = get_current_time_millis(), mlflow.MlflowClient()
    metrics = [
        Metric(name, value, now, step, logged.model_id, run_id=run_id)
        for name, value in metrics_of(facts).items()
    ]
    client.log_batch(run_id, metrics=metrics)
    if QUANTIZATION_LOG in artifact.manifest.files:
        folder = f"lrai/{logged.model_id or artifact.version}"
        client.log_artifact(run_id, str(artifact.file(QUANTIZATION_LOG)), folder)


def example_of(artifact: Artifact) -> dict[str, Any] | None:
    """Return the first row of the evaluation sample by input; None where no sample was kept."""
    if EVALUATION not in artifact.manifest.files:
        return None
    signature = artifact.manifest.signature
    rows = load_rows(artifact.file(EVALUATION), signature, 1).inputs
    if not rows:
        return None
    named = zip(signature.inputs, rows[0], strict=True)
    return {spec.name: np.asarray(text(array)) for spec, array in named}


def _schema(specs: Sequence[TensorSpec]) -> Schema:
    made: list[Any] = []
    for spec in specs:
        kind = np.dtype(np.str_) if spec.datatype == "BYTES" else dtype_of(spec.datatype)
        shape = tuple(extent if isinstance(extent, int) else -1 for extent in spec.shape)
        made.append(MlflowTensorSpec(kind, shape, spec.name))
    return Schema(made)


def saved_model(folder: str, *, verify: bool = True) -> tuple[Artifact, dict[str, Any]]:
    """Return the artifact in a saved model, and what else that says: what a deployment goes by.

    That is the names of its `columns`, if it has any, `by_row` of `from_lrai`, and the settings
    `saved` with it.

    Raises:
        UsageError: It is of another flavor.
        ArtifactError: See `serving.opened`.
    """
    model = of_ours(folder)
    saved = flat(model.flavors.get("python_function", {}).get("config") or {})  # `model_config`
    for key in ("actor.isolation", "runtime.address"):  # where it runs, who deploys it says
        saved.pop(key, None)
    inputs = model.signature and model.signature.inputs
    named = inputs and inputs.has_input_names() and not inputs.is_tensor_spec()
    source = serving.origin(model)
    columns = source.get("source_columns") or (inputs.input_names() if named else [])
    said = {"columns": columns, "by_row": not serving.is_onnx(source), "saved": saved}
    return serving.opened(Path(folder), model, verify=verify), said
