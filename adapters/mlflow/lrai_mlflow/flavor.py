"""The functions of a flavor: save, log and load an artifact as a model of MLflow."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from mlflow import pyfunc
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelInputExample, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME, ModelInfo
from mlflow.models.utils import _save_example
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS
from mlflow.tracking._model_registry import DEFAULT_AWAIT_MAX_SLEEP_SECONDS
from mlflow.tracking.artifact_utils import _download_artifact_from_uri
from mlflow.types import Schema
from mlflow.types import TensorSpec as MlflowTensorSpec
from mlflow.utils.file_utils import get_total_file_size
from mlflow.utils.model_utils import _get_flavor_configuration, _validate_and_copy_code_paths

import lrai_core
from lrai_codecs import dtype_of
from lrai_core import Artifact, TensorSpec, certificates, load_config
from lrai_mlflow.environment import CONDA, PYTHON, write_environment
from lrai_mlflow.serving import ServedModel, mlflow_errors

FLAVOR_NAME: Final = "lrai"
_MODULE: Final = "lrai_mlflow"  # stored in saved models
_DATA: Final = "model.lrai"


def save_model(
    lrai_model: Artifact | str | Path,
    path: str | Path,
    mlflow_model: Model | None = None,
    signature: ModelSignature | Literal[False] | None = None,
    input_example: ModelInputExample | None = None,
    pip_requirements: Sequence[str] | str | None = None,
    extra_pip_requirements: Sequence[str] | str | None = None,
    code_paths: list[str] | None = None,
    metadata: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
) -> None:
    """Write an artifact to `path` as a model of MLflow, with all that serving it takes.

    The environment is that of this process: pinned requirements, constraints for what these bring,
    and lrai's own wheel inside the model.

    Args:
        lrai_model: An artifact or the path of one. It is checked, and copied.
        path: Local folder, empty or not there yet.
        mlflow_model: The model that this flavor is added to.
        signature: The artifact's own by default; False for none. MLflow refuses a DataFrame where a
            signature has another free dimension than the rows, which a model without one takes.
        input_example: Stored, and tried when the model is logged.
        pip_requirements: In place of the default ones; lrai's wheel is added if they lack lrai.
        extra_pip_requirements: In addition to the default ones.
        code_paths: Files and folders of Python code to carry.
        metadata: Stored in the model.
        model_config: Settings of lrai, by their dotted names or as the tree of `lrai.toml`.

    Raises:
        MlflowException: The artifact is missing, changed or newer than this version.
    """
    with mlflow_errors():
        load_config(host=_settings(model_config))
        given = lrai_model.path if isinstance(lrai_model, Artifact) else lrai_model
        artifact = Artifact.open(given)
        own = [c.id for c in certificates(artifact) if c.variant == artifact.manifest.chosen]
    target = Path(path).absolute()
    if target.exists() and any(target.iterdir()):
        raise MlflowException(f"{target} exists and is not empty", RESOURCE_ALREADY_EXISTS)
    target.mkdir(parents=True, exist_ok=True)
    code = _validate_and_copy_code_paths(code_paths, target)
    shutil.copytree(artifact.path, target / _DATA)

    model = Model() if mlflow_model is None else mlflow_model
    if signature is not False:
        model.signature = signature or signature_of(artifact)
    if input_example is not None:
        _save_example(model, input_example, str(target))
    if metadata is not None:
        model.metadata = metadata
    pyfunc.add_to_model(
        model,
        loader_module=_MODULE,
        data=_DATA,
        code=code,
        conda_env=CONDA,
        python_env=PYTHON,
        model_config=model_config,
    )
    model.add_flavor(
        FLAVOR_NAME,
        data=_DATA,
        code=code,
        lrai_version=lrai_core.__version__,
        artifact_version=artifact.version,
        manifest_sha256=artifact.sha256,
        variant=artifact.manifest.chosen,
        certificate=own[0] if own else None,
    )
    write_environment(target, pip_requirements, extra_pip_requirements)
    model.model_size_bytes = get_total_file_size(target)
    model.save(str(target / MLMODEL_FILE_NAME))


def log_model(
    lrai_model: Artifact | str | Path,
    name: str | None = None,
    *,
    registered_model_name: str | None = None,
    signature: ModelSignature | Literal[False] | None = None,
    input_example: ModelInputExample | None = None,
    await_registration_for: int | None = DEFAULT_AWAIT_MAX_SLEEP_SECONDS,
    pip_requirements: Sequence[str] | str | None = None,
    extra_pip_requirements: Sequence[str] | str | None = None,
    code_paths: list[str] | None = None,
    metadata: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    params: dict[str, Any] | None = None,
    tags: dict[str, Any] | None = None,
    model_type: str | None = None,
    step: int = 0,
    model_id: str | None = None,
) -> ModelInfo:
    """Save an artifact as a model of the current run, and return what MLflow says of it.

    Arguments are those of `save_model`, and of every flavor's `log_model`.
    """
    logged: ModelInfo = Model.log(
        artifact_path=None,
        name=name,
        flavor=import_module(_MODULE),
        lrai_model=lrai_model,
        registered_model_name=registered_model_name,
        signature=signature,
        input_example=input_example,
        await_registration_for=await_registration_for,
        pip_requirements=pip_requirements,
        extra_pip_requirements=extra_pip_requirements,
        code_paths=code_paths,
        metadata=metadata,
        model_config=model_config,
        params=params,
        tags=tags,
        model_type=model_type,
        step=step,
        model_id=model_id,
    )
    return logged


def load_model(model_uri: str, dst_path: str | None = None) -> Artifact:
    """Return the artifact inside a model, checked.

    Args:
        model_uri: Any address of a model that MLflow knows.
        dst_path: Existing folder to download into.

    Raises:
        MlflowException: No model of this flavor, or an artifact that cannot be used.
    """
    local = _download_artifact_from_uri(artifact_uri=str(model_uri), output_path=dst_path)
    configuration = _get_flavor_configuration(model_path=local, flavor_name=FLAVOR_NAME)
    with mlflow_errors():
        return Artifact.open(Path(local) / configuration["data"])


def signature_of(artifact: Artifact) -> ModelSignature:
    """Return the artifact's inputs and outputs as MLflow states them, -1 for a free dimension."""
    declared = artifact.manifest.signature
    return ModelSignature(inputs=_schema(declared.inputs), outputs=_schema(declared.outputs))


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> ServedModel:
    """Return what `mlflow.pyfunc` calls."""
    return ServedModel(path, _settings(model_config))


def _schema(specs: Sequence[TensorSpec]) -> Schema:
    return Schema(
        [
            MlflowTensorSpec(
                np.dtype(np.str_) if spec.datatype == "BYTES" else dtype_of(spec.datatype),
                tuple(extent if isinstance(extent, int) else -1 for extent in spec.shape),
                spec.name,
            )
            for spec in specs
        ]
    )


def _settings(tree: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return dotted names to values, of a tree of any depth."""
    flat: dict[str, Any] = {}
    for name, value in (tree or {}).items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{below}": deep for below, deep in _settings(value).items()}
        else:
            flat[name] = value
    return flat
