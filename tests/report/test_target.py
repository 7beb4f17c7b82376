"""What `lrai tune` takes for its target where no runtime serves."""

from __future__ import annotations

from pathlib import Path

import pytest

import lrai_core as lrai
from lrai_report.target import find
from tests.core import small_artifact
from tests.own_runtime import own_runtime


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a model's folder of Triton with two versions, empty as yet."""
    for version in ("9", "10", "notes"):
        (tmp_path / "m" / version).mkdir(parents=True)
    (tmp_path / "m" / "config.pbtxt").write_text('backend: "onnxruntime"\n')
    (tmp_path / "m" / "9" / "model.onnx").write_bytes(b"older")
    return tmp_path / "m"


@pytest.mark.parametrize("place", ["model.onnx", "model.onnx/model.onnx"])
def test_a_model_of_triton_is_the_file_of_its_newest_version(repository: Path, place: str) -> None:
    file = repository / "10" / place
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"newer")
    rows = repository / "rows.npz"
    with own_runtime():
        found = find(str(repository), rows, "auto")
    assert (found.model, found.requests, found.served, found.name) == (file, rows, None, "")


def test_a_model_of_triton_may_be_an_artifact(repository: Path) -> None:
    folder = small_artifact.build(repository / "10" / "model.lrai")
    with own_runtime():
        found = find(str(repository), None, "auto")
    assert found.served is not None
    assert (found.served.path, found.name) == (folder, "")
    assert found.model == folder / "source" / "model.onnx"


@pytest.mark.parametrize("lacks", ["config.pbtxt", "10/model.plan", ""])
def test_a_folder_that_holds_no_such_model_means_nothing(repository: Path, lacks: str) -> None:
    if lacks == "config.pbtxt":
        (repository / lacks).unlink()
    elif lacks:
        (repository / lacks).touch()
    with own_runtime(), pytest.raises(lrai.UsageError, match="is no file or artifact, and no runt"):
        find(str(repository), None, "auto")
