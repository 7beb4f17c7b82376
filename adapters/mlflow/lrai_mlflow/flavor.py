"""The functions of a flavor: save, log and load an artifact as a model of MLflow."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal

from mlflow import pyfunc
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelInputExample, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME, ModelInfo
from mlflow.models.utils import _save_example
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS
from mlflow.tracking._model_registry import DEFAULT_AWAIT_MAX_SLEEP_SECONDS
from mlflow.tracking.artifact_utils import _download_artifact_from_uri
from mlflow.utils.file_utils import get_total_file_size
from mlflow.utils.model_utils import (
    _add_code_from_conf_to_system_path,
    _copy_extra_files,
    _validate_and_copy_code_paths,
)

from lrai_core import Artifact, UsageError
from lrai_mlflow.serving import DATA, FLAVOR_NAME, ServedModel, mlflow_errors, opened
from lrai_mlflow.settings import settings_of

_MODULE: Final = "lrai_mlflow"  # stored in saved models


def save_model(
    lrai_model: Artifact | str | Path,
    path: str | Path,
    mlflow_model: Model | None = None,
    signature: ModelSignature | Literal[False] | None = None,
    input_example: ModelInputExample | Literal[False] | None = None,
    pip_requirements: Sequence[str] | str | None = None,
    extra_pip_requirements: Sequence[str] | str | None = None,
    conda_env: dict[str, Any] | str | None = None,
    code_paths: list[str] | None = None,
    extra_files: list[str] | None = None,
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
        input_example: Stored, and tried when the model is logged; by default the first row of the
            artifact's evaluation sample, if it has one and the signature is of tensors; False for
            none.
        pip_requirements: In place of the default ones; lrai's wheel is added if they lack lrai.
        extra_pip_requirements: In addition to the default ones.
        conda_env: In place of both: an environment of conda, or the path of one.
        code_paths: Files and folders of Python code to carry.
        extra_files: Files to carry, by path or address.
        metadata: Stored in the model, beside what the gate and the certificates say: `lrai`.
        model_config: Settings of lrai, by their dotted names or as the tree of `lrai.toml`;
            `require.…` of the certificate, and `variant`.

    Raises:
        MlflowException: The artifact is missing, changed or newer than this version.
    """
    from lrai_mlflow.commands.environment import write_environment  # serving needs neither
    from lrai_mlflow.commands.facts import example_of, facts_of, opened, signature_of

    with mlflow_errors():
        settings_of(model_config)
        artifact = opened(lrai_model)
        facts = facts_of(artifact)
        example = input_example
        columns = signature and signature.inputs and not signature.inputs.is_tensor_spec()
        if example is None and not columns:  # of tensors, which such a signature refuses
            example = example_of(artifact)
    target = Path(path).absolute()
    if target.exists() and any(target.iterdir()):
        raise MlflowException(f"{target} exists and is not empty", RESOURCE_ALREADY_EXISTS)
    with ExitStack() as undone:
        undone.callback(
            shutil.rmtree, target, ignore_errors=True
        )  # else a second try finds it full
        target.mkdir(parents=True, exist_ok=True)
        code = _validate_and_copy_code_paths(code_paths, target)
        shutil.copytree(artifact.path, target / DATA)

        model = Model() if mlflow_model is None else mlflow_model
        if signature is not False:
            model.signature = signature or signature_of(artifact)
        if example is not None and example is not False:
            _save_example(model, example, str(target))
        model.metadata = {"lrai": facts} | (model.metadata or {}) | (metadata or {})
        environment = write_environment(
            target, pip_requirements, extra_pip_requirements, conda_env, artifact
        )
        pyfunc.add_to_model(
            model,
            loader_module=_MODULE,
            data=DATA,
            code=code,
            model_config=model_config,
            **environment,
        )
        model.add_flavor(
            FLAVOR_NAME,
            data=DATA,
            code=code,
            lrai_version=facts["lrai_version"],
            artifact_version=artifact.version,
            manifest_sha256=artifact.sha256,
            variant=facts["variant"],
            certificate=facts["certificates"][0]["id"] if facts["certificates"] else None,
            **_copy_extra_files(extra_files, str(target)),
        )
        model.model_size_bytes = get_total_file_size(target)
        model.save(str(target / MLMODEL_FILE_NAME))
        undone.pop_all()


def log_model(
    lrai_model: Artifact | str | Path,
    name: str | None = None,
    *,
    registered_model_name: str | None = None,
    signature: ModelSignature | Literal[False] | None = None,
    input_example: ModelInputExample | Literal[False] | None = None,
    await_registration_for: int | None = DEFAULT_AWAIT_MAX_SLEEP_SECONDS,
    pip_requirements: Sequence[str] | str | None = None,
    extra_pip_requirements: Sequence[str] | str | None = None,
    conda_env: dict[str, Any] | str | None = None,
    code_paths: list[str] | None = None,
    extra_files: list[str] | None = None,
    metadata: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    params: dict[str, Any] | None = None,
    tags: dict[str, Any] | None = None,
    model_type: str | None = None,
    step: int = 0,
    model_id: str | None = None,
) -> ModelInfo:
    """Save an artifact as a model of the current run, and return what MLflow says of it.

    The model's tags name variant, version and certificate. In a run, what the gate measured becomes
    metrics (`lrai.…`), and `quantization.jsonl`, which tells all that was tried, an artifact.

    Arguments are those of `save_model`, and of every flavor's `log_model`.
    """
    from lrai_mlflow.commands.facts import facts_of, log_facts, opened, tags_of

    with mlflow_errors():
        artifact = opened(lrai_model)
        facts = facts_of(artifact)
    logged: ModelInfo = Model.log(
        artifact_path=None,
        name=name,
        flavor=import_module(_MODULE),
        lrai_model=artifact,
        registered_model_name=registered_model_name,
        signature=signature,
        input_example=input_example,
        await_registration_for=await_registration_for,
        pip_requirements=pip_requirements,
        extra_pip_requirements=extra_pip_requirements,
        conda_env=conda_env,
        code_paths=code_paths,
        extra_files=extra_files,
        metadata=metadata,
        model_config=model_config,
        params=params,
        tags=tags_of(facts) | (tags or {}),
        model_type=model_type,
        step=step,
        model_id=model_id,
    )
    log_facts(artifact, facts, logged, step)
    return logged


def load_model(model_uri: str, dst_path: str | None = None) -> Artifact:
    """Return the artifact inside a model, checked; code that it carries can be imported then.

    Args:
        model_uri: Any address of a model that MLflow knows.
        dst_path: Existing folder to download into.

    Raises:
        MlflowException: No model of this flavor, or an artifact that cannot be used.
    """
    local = _download_artifact_from_uri(artifact_uri=str(model_uri), output_path=dst_path)
    with mlflow_errors():
        artifact = opened(Path(local), model := of_ours(local))
    _add_code_from_conf_to_system_path(local, model.flavors[FLAVOR_NAME])
    return artifact


def of_ours(folder: str) -> Model:
    """Return a saved model.

    Raises:
        UsageError: It is of another flavor.
    """
    model = Model.load(folder)
    if FLAVOR_NAME not in model.flavors:
        got = ", ".join(model.flavors)
        how = "`lrai mlflow convert URI` makes one of onnx, pytorch, sklearn and tree models"
        raise UsageError(f"the model has the flavors {got}, lrai is needed: {how}")
    return model


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> ServedModel:
    """Return what `mlflow.pyfunc` calls."""
    return ServedModel(path, model_config)
