"""SavedModels of TensorFlow, imported and compared with it, in processes that it has alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lrai_core as lrai
from lrai_core import CompileError, EnvironmentProblem
from lrai_core.engine.engine import find_engine
from lrai_import import described
from lrai_import.onnx import Job
from lrai_import.saved_model import convert

PROGRAM = Path(__file__).with_name("saved_models.py")
LRAI = Path(sys.executable).with_name("lrai")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with SavedModels, and what TensorFlow answers."""
    folder = tmp_path_factory.mktemp("tensorflow")
    done = subprocess.run(
        [sys.executable, "-P", PROGRAM, folder], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    return folder


def test_a_signature_that_a_description_names_answers_as_in_tensorflow(
    made: Path, tmp_path: Path
) -> None:
    notes: list[str] = []
    (made / "served.toml").write_text('model = "columns"\nsignature = "scores"\n')
    found = described.load(made / "served.toml", notes.append)
    assert notes == []  # it was compared
    assert str(made).encode() not in found.model.SerializeToString()
    file = tmp_path / "imported.onnx"
    file.write_bytes(found.model.SerializeToString())
    known = np.load(made / "columns.npz")
    session = find_engine("onnxruntime").load(file)
    signature = lrai.declared(found.model)
    inputs = [one.name for one in signature.inputs]
    assert sorted(inputs) == ["kind", "x"]
    assert {one.shape[0] for one in signature.inputs} == {"batch"}
    rows = [known[name].astype(object) if name == "kind" else known[name] for name in inputs]
    names = [one.name for one in signature.outputs]
    got = dict(zip(names, session.run(rows), strict=True))
    assert np.allclose(got["scores"], known["scores"], atol=1e-4)
    assert np.array_equal(got["best"], known["best"])


def test_a_network_of_keras_is_compiled_and_tensorflow_says_nothing(
    made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "picture.lrai"
    done = subprocess.run(
        [LRAI, "compile", made / "picture", "-o", out], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    assert not done.stderr
    assert "tensorflow" not in done.stdout.lower()
    artifact = lrai.Artifact.open(out)
    (image,) = artifact.manifest.signature.inputs
    assert (image.name, image.batch_axis, image.shape[1:]) == ("image", 0, (16, 16, 3))
    known = np.load(made / "picture.npz")
    session = find_engine("onnxruntime").load(artifact.file(artifact.manifest.source.file))
    assert np.allclose(session.run([known["image"]])[0], known["scores"], atol=1e-4)


@pytest.mark.parametrize(
    ("job", "says"),
    [
        ("columns:", "^True batch batch$"),  # serving_default, compared
        ("columns:scores", "^True batch batch$"),
        ("columns:pairs", r"^True a\.0 x\.0$"),  # as many of one as of the other they need not be
        ("columns:apart", "^True batch batch$"),  # each row is answered by itself
        ("columns:lengths", "^UnsupportedOperator: .*StringLength"),
        ("columns:lesser", "^CompileError: .* 'lesser', its own are: .*scores.*; a .toml"),
        ("columns:ranks", "^CompileError: input 'x' has a dynamic rank; give it a shape$"),
        ("unsigned:", "^CompileError: .* no signature 'serving_default', its own are: none"),
        ("damaged:", "^CompileError: the SavedModel cannot be converted: "),
    ],
)
def test_what_cannot_be_converted_is_said_in_a_sentence(made: Path, job: str, says: str) -> None:
    said = json.loads((made / "said.json").read_text())[job]
    assert re.search(says, said), said
    assert str(made) not in said
    assert "\n" not in said


def test_a_folder_of_something_else_is_refused_saying_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"without saved_model\.pb; needed is a SavedModel$"):
        lrai.compile(tmp_path, out=tmp_path / "m.lrai")


def test_what_is_missing_is_said_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    says = r"^tensorflow is needed: pip install 'lrai\[tensorflow\]'$"
    with pytest.raises(EnvironmentProblem, match=says):
        convert(Job("folder", "", "m.onnx"))
