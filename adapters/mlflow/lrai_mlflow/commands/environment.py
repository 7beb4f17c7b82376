"""The environment to serve a saved model in: pins, constraints on what they bring, the wheel."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import yaml  # type: ignore[import-untyped]
from mlflow.utils.environment import (
    _mlflow_conda_env,
    _overwrite_pip_deps,
    _process_conda_env,
    _process_pip_requirements,
    _PythonEnv,
    _validate_env_arguments,
)
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from lrai_core import Artifact
from lrai_wheel import build_wheel
from lrai_wheel.pins import extras_of, installed_version, pins

_CONDA: Final = "conda.yaml"
_PYTHON: Final = "python_env.yaml"
_WHEELS: Final = "wheels"
_PINNED: Final = "mlflow-skinny pandas numpy msgspec onnx onnxruntime pyzmq"


def write_environment(
    model: Path,
    pip_requirements: Sequence[str] | str | None,
    extra_pip_requirements: Sequence[str] | str | None,
    conda_env: dict[str, Any] | str | None,
    artifact: Artifact,
) -> dict[str, str]:
    """Write the files that MLflow makes an environment from, and the wheel, into `model`.

    Args:
        model: Folder of the model.
        pip_requirements: In place of the default ones, which are this process's versions; text is
            the path of a file of them, as in all of MLflow. Without lrai in it the wheel is added.
        extra_pip_requirements: In addition to the default ones.
        conda_env: In place of both, or the path of a file of it; the wheel is added likewise.
        artifact: The model.

    Returns:
        The files' names, as `pyfunc.add_to_model` wants them.

    Raises:
        ValueError: More than one of the three is given.
    """
    _validate_env_arguments(conda_env, pip_requirements, extra_pip_requirements)
    constraints_file = model / "constraints.txt"
    conda: dict[str, Any] = {}
    if conda_env is not None:
        conda, requirements, constraints = _process_conda_env(conda_env)
    elif pip_requirements is not None:
        _, requirements, constraints = _process_pip_requirements(None, _lines(pip_requirements))
    else:
        extras = extras_of(artifact)
        _write(constraints_file, pins("mlflow", *extras))
        wanted = [*default_requirements(extras.values()), *_lines(extra_pip_requirements or [])]
        wanted.append(f"-c {constraints_file}")
        _, requirements, constraints = _process_pip_requirements(None, wanted)
    if all(_name(requirement) != "lrai" for requirement in requirements):
        # By its version: pip reads a path in the file as one from where it runs.
        version = build_wheel(model / _WHEELS).name.split("-")[1]
        requirements += [f"--find-links {_WHEELS}", f"lrai=={version}"]
    if constraints:
        _write(constraints_file, constraints)
    _write(model / "requirements.txt", requirements)
    if not conda:
        conda = _mlflow_conda_env(additional_pip_deps=requirements, install_mlflow=False)
    conda = _overwrite_pip_deps(conda, requirements)
    (model / _CONDA).write_text(yaml.safe_dump(conda, sort_keys=False), encoding="utf-8")
    _PythonEnv.current().to_yaml(str(model / _PYTHON))
    return {"conda_env": _CONDA, "python_env": _PYTHON}


def default_requirements(packages: Iterable[str]) -> list[str]:
    """Return the pinned packages that serving imports; our wheel is not among them."""
    found = {name: installed_version(name) for name in (*_PINNED.split(), *packages)}
    return [f"{name}=={version}" for name, version in found.items() if version]


def _name(requirement: str) -> str:
    try:
        return canonicalize_name(Requirement(requirement).name)
    except InvalidRequirement:  # a path or an address
        return re.split(r"[-.@]", Path(requirement.partition("#")[0]).name)[0]


def _lines(requirements: Sequence[str] | str) -> list[str]:
    return [f"-r {requirements}"] if isinstance(requirements, str) else list(requirements)


def _write(file: Path, lines: Sequence[str]) -> None:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
