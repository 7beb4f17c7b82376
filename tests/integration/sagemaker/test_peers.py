"""The public tests of the SageMaker inference toolkit for multi-model endpoints, as our cases.

Of `test/integration/local/test_{dummy,mxnet}_multi_model.py` all seven, and of its unit tests those
on bodies and variables that hold for any container. What differs, and why:

* A load is answered with a `status` in words of our own; theirs are those of its model server.
* Models are listed by name, theirs as they were loaded; the contract names no order.
* Numbers in strings (`["42"]`) are no numbers here: a model that takes numbers refuses them.
* Objects in npy files are pickles, which are never read.
* `SAGEMAKER_DEFAULT_INVOCATIONS_ACCEPT` is not looked at: an answer has the form of its request.
* `SAGEMAKER_SAFE_PORT_RANGE` is for containers that need more ports than one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lrai_core as lrai
from tests.core import small_artifact
from tests.integration.sagemaker.conftest import JSON, Container, serving

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return models of float32 [batch, 3] that double."""
    root = tmp_path_factory.mktemp("root")
    for name in ("resnet_152", "resnet_18"):
        (root / name).mkdir()
        small_artifact.build(root / name / "model.lrai")
    return root


@pytest.fixture(scope="module")
def container(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    yield from serving(["", "--multi-model", "--workers", "2"], root, tmp_path_factory)


def load(container: Container, name: str, url: str) -> tuple[int, Any]:
    reply = container.send("POST", "/models", {"model_name": name, "url": url})
    return reply.status, reply.json


def listed(container: Container) -> Any:
    reply = container.get("/models")
    assert reply.status == 200
    return reply.json["models"]


def test_their_story_of_two_models(container: Container, root: Path) -> None:
    assert container.get("/ping").status == 200  # test_ping
    assert listed(container) == []  # test_list_models_empty
    large, little = (
        {"modelName": name, "modelUrl": str(root / name)} for name in ("resnet_152", "resnet_18")
    )
    status, said = load(container, "resnet_152", str(root / "resnet_152"))  # test_load_models
    assert (status, said) == (200, {"status": "model 'resnet_152' is loaded"})
    assert listed(container) == [large]
    status, said = load(container, "resnet_18", str(root / "resnet_18"))
    assert (status, said) == (200, {"status": "model 'resnet_18' is loaded"})
    assert listed(container) == [large, little]
    gone = container.send("DELETE", "/models/resnet_152")  # test_unload_models
    assert (gone.status, gone.json) == (200, {"status": "model 'resnet_152' is unloaded"})
    assert listed(container) == [little]
    assert load(container, "banana", str(root / "banana"))[0] == 404  # test_load_non_existing_model
    # test_unload_non_existing_model
    assert container.send("DELETE", "/models/resnet_152").status == 404
    # test_load_model_multiple_times
    assert load(container, "resnet_18", str(root / "resnet_18"))[0] == 409
    answer = container.post({"instances": [[1, 2, 3]]}, "/models/resnet_18/invoke")
    assert (answer.status, answer.json) == (200, {"predictions": [[2, 4, 6]]})  # test_invocation


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (JSON, b"[[42, 6, 9]]"),  # test_json_to_numpy
        (JSON, b"[[42.0, 6.0, 9.0]]"),
        ("text/csv", b"42,6,9\n"),  # test_csv_to_numpy
        ("text/csv", b"42.0,6.0,9.0\n"),
    ],
)
def test_their_bodies_are_read(doubling: Container, content_type: str, body: bytes) -> None:
    reply = doubling.post(body, Content_Type=content_type, Accept=JSON)
    assert reply.json["predictions"] == [[84, 12, 18]]


@pytest.mark.parametrize("values", [[[42, 6, 9]], [[42.0, 6.0, 9.0]]])
def test_their_arrays_are_read(doubling: Container, values: Any) -> None:
    body = io.BytesIO()
    np.save(body, np.array(values))  # test_npy_to_numpy
    reply = doubling.post(body.getvalue(), Content_Type="application/x-npy", Accept=JSON)
    assert reply.json["predictions"] == [[84, 12, 18]]


def test_a_type_that_cannot_be_read_is_refused(doubling: Container) -> None:
    refused = doubling.post(b"42", Content_Type="application/x-image")  # test_decode_error
    assert refused.status == 415


@pytest.fixture(scope="module")
def doubling(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    lrai.Artifact.open(root / "resnet_18" / "model.lrai")
    yield from serving(["resnet_18/model.lrai"], root, tmp_path_factory)
