"""What is deployed with containers: no container runs here, so their files are looked at."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

DEPLOY = Path(__file__).parents[1] / "deploy"
DOCKERFILE = (DEPLOY / "triton" / "Dockerfile").read_text()
SAGEMAKER = (DEPLOY / "sagemaker" / "Dockerfile").read_text()
RUNTIME: dict[str, Any] = yaml.safe_load(
    (DEPLOY / "triton" / "kserve-servingruntime.yaml").read_text()
)

# What a ClusterServingRuntime may hold, by type: of KServe's definition (v1alpha1, August 2026) the
# part that a runtime of one container could need. A list is of such items; a key that ends with !
# has to be there; * stands for any.
TEXTS = {"*": str}
RESOURCES = {"limits": TEXTS, "requests": TEXTS}
SECURITY = {
    "allowPrivilegeEscalation": bool,
    "capabilities": {"add": [str], "drop": [str]},
    "privileged": bool,
    "readOnlyRootFilesystem": bool,
    "runAsGroup": int,
    "runAsNonRoot": bool,
    "runAsUser": int,
}
CONTAINER = {
    "args": [str],
    "command": [str],
    "env": [{"name!": str, "value": str}],
    "image": str,
    "imagePullPolicy": str,
    "name!": str,
    "ports": [{"containerPort!": int, "name": str, "protocol": str}],
    "resources": RESOURCES,
    "securityContext": SECURITY,
    "volumeMounts": [{"mountPath!": str, "name!": str, "readOnly": bool}],
    "workingDir": str,
}
SPEC = {
    "annotations": TEXTS,
    "containers!": [CONTAINER],
    "disabled": bool,
    "labels": TEXTS,
    "multiModel": bool,
    "nodeSelector": TEXTS,
    "protocolVersions": [str],
    "supportedModelFormats": [{"autoSelect": bool, "name!": str, "priority": int, "version": str}],
    "volumes": [{"emptyDir": {"medium": str, "sizeLimit": str}, "name!": str}],
}
SERVING_RUNTIME = {
    "apiVersion!": str,
    "kind!": str,
    "metadata!": {"annotations": TEXTS, "labels": TEXTS, "name!": str},
    "spec!": SPEC,
}


def faults(value: Any, allowed: Any, where: str = "") -> list[str]:
    """Return every place that holds something else than it may, or lacks what it needs."""
    if isinstance(allowed, list):
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [
            f for i, item in enumerate(value) for f in faults(item, allowed[0], f"{where}[{i}]")
        ]
    if not isinstance(allowed, dict):
        return [] if type(value) is allowed else [f"{where} is no {allowed.__name__}"]
    if not isinstance(value, dict):
        return [f"{where} is no object"]
    known = {key.rstrip("!"): kind for key, kind in allowed.items()}
    found = [
        f"{where}.{k[:-1]} is missing" for k in allowed if k[-1] == "!" and k[:-1] not in value
    ]
    for key, item in value.items():
        kind = known.get(key, known.get("*"))
        found += (
            [f"{where}.{key} is unknown"] if kind is None else faults(item, kind, f"{where}.{key}")
        )
    return found


def test_the_kserve_runtime_is_one() -> None:
    assert faults(RUNTIME, SERVING_RUNTIME) == []
    assert (RUNTIME["apiVersion"], RUNTIME["kind"]) == (
        "serving.kserve.io/v1alpha1",
        "ClusterServingRuntime",
    )


@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        ("port", 8000, ".spec.port is unknown"),
        ("containers", [{"image": "i"}], ".spec.containers[0].name is missing"),
        ("multiModel", "yes", ".spec.multiModel is no bool"),
        ("annotations", {"prometheus.kserve.io/port": 8002}, ".spec.annotations"),
    ],
)
def test_what_kserve_would_refuse_is_found(place: str, value: Any, fault: str) -> None:
    (found,) = faults({**RUNTIME, "spec": {**RUNTIME["spec"], place: value}}, SERVING_RUNTIME)
    assert found.startswith(fault)


def test_the_kserve_runtime_gives_the_server_what_the_stock_one_does() -> None:
    (container,) = RUNTIME["spec"]["containers"]
    assert container["args"] == [
        "--model-store=/mnt/models",
        "--grpc-port=9000",
        "--http-port=8080",
        "--allow-grpc=true",
        "--allow-http=true",
    ]
    assert "command" not in container  # the image's own, which ends where these begin
    assert '"lrai", "triton", "serve", "--"]' in DOCKERFILE
    assert container["securityContext"]["runAsUser"] == 1000
    assert not any(entry.get("autoSelect") for entry in RUNTIME["spec"]["supportedModelFormats"])


def test_the_image_is_pinned_and_its_user_is_not_root() -> None:
    (image,) = re.findall(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"nvcr\.io/nvidia/tritonserver:\d\d\.\d\d-py3", image)
    assert RUNTIME["spec"]["containers"][0]["image"].endswith(image.partition(":")[2])
    users = re.findall(r"^USER (\d+)", DOCKERFILE, re.MULTILINE)
    assert users[-1:] == ["1000"]


def test_the_image_for_sagemaker_is_pinned_and_says_what_it_can() -> None:
    (image,) = re.findall(r"^FROM (\S+)$", SAGEMAKER, re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", image)
    assert not re.search("^USER", SAGEMAKER, re.MULTILINE), "the platform expects root"
    labels = re.findall(r"com\.amazonaws\.sagemaker\.capabilities\.([\w-]+)=true", SAGEMAKER)
    assert labels == ["multi-models", "accept-bind-to-port"]
    assert 'ENTRYPOINT ["lrai", "sagemaker"]\nCMD ["serve"]\n' in SAGEMAKER
    assert not re.search(r"\b(boto3|awscli|sagemaker-inference)\b", SAGEMAKER)
