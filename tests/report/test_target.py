"""What `lrai tune` takes for its target where no runtime serves."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

import lrai_core as lrai
from lrai_report.target import find
from lrai_triton.commands.repository import _check_backend
from tests.core import small_artifact
from tests.integration.test_cli import run
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


def test_a_model_of_triton_is_called_what_its_configuration_says(repository: Path) -> None:
    (repository / "config.pbtxt").write_text('default_model_filename: "net.onnx"\n')
    for name in ("model.onnx", "net.onnx"):
        (repository / "10" / name).touch()
    with own_runtime():
        assert find(str(repository), None, "auto").model == repository / "10" / "net.onnx"


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


@pytest.mark.parametrize(
    ("text", "on", "back"),
    [
        ('platform: "onnxruntime_onnx"', " --switch", "lrai triton remove {}"),
        ('# backend: "lrai"', " --switch", "lrai triton remove {}"),
        ('name: "m" backend : "lrai"', "", "rm -r {}/11"),
    ],
)
def test_a_model_of_triton_comes_with_the_commands_that_switch_it(
    repository: Path, text: str, on: str, back: str
) -> None:
    (repository / "10" / "model.onnx").write_bytes(b"newer")
    (repository / "config.pbtxt").write_text(f"max_batch_size: 8\n{text}\n")
    with own_runtime():
        found = find(str(repository), None, "auto")
    told = f"--model-repository {repository.parent} --name m --version 11{on}"
    words = f"lrai triton add 'a b.lrai' {told}", back.format(repository)
    assert found.commands(Path("a b.lrai")) == words


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"config.pbtxt": 'platform: "tensorflow_graphdef"'}, False),
        ({"config.pbtxt": 'platform: "ensemble"'}, False),
        ({"config.pbtxt": "max_batch_size: 8"}, True),
        ({"config.pbtxt": 'platform: "" # backend: "python"'}, True),
        ({"config.pbtxt.lrai-original": "max_batch_size: 8"}, False),
        ({"configs/gpu.pbtxt": 'backend: "onnxruntime"'}, False),
        ({"configs/gpu.pbtxt": "x: 1", "configs/cpu.pbtxt": 'backend: "lrai"'}, True),
        (
            {"configs/gpu.pbtxt": "x: 1", "config.pbtxt": 'name: "m" platform: "" backend: "lrai"'},
            True,
        ),
    ],
)
def test_a_model_of_triton_that_cannot_be_taken_over_comes_without_commands(
    repository: Path, change: dict[str, str], told: bool
) -> None:
    """`lrai triton add` refuses it: the two are to agree."""
    (repository / "10" / "model.onnx").write_bytes(b"newer")
    (repository / "configs").mkdir()
    for name, text in change.items():
        (repository / name).write_text(f"{text}\n")
    with own_runtime():
        found = find(str(repository), None, "auto")
    assert bool(found.commands(Path("m.lrai"))) is told
    with pytest.raises(lrai.UsageError) if not told else nullcontext():
        _check_backend(repository, switch=True)


@pytest.mark.parametrize("name", ["my model", "_m", "größe"])
def test_a_model_of_triton_whose_name_is_refused_comes_without_commands(
    repository: Path, name: str
) -> None:
    (repository / "10" / "model.onnx").write_bytes(b"newer")
    entry = repository.rename(repository.with_name(name))
    with own_runtime():
        assert find(str(entry), None, "auto").commands(Path("m.lrai")) == ()


def test_a_folder_is_called_as_it_is_wherever_it_is_named_from(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "10" / "model.onnx").write_bytes(b"newer")
    monkeypatch.chdir(repository)
    with own_runtime():
        found = find(".", None, "auto")
    assert " --name m " in found.commands(Path("m.lrai"))[0]


def test_of_what_does_not_run_it_is_said_why(tmp_path: Path) -> None:
    artifact = small_artifact.build(tmp_path / "m.lrai")
    label = lrai.Artifact.open(artifact).version
    how = {"version": label, "artifact": str(artifact)}
    record = {"versions": {label: how}, "shares": {label: 1.0}, "away": True}
    frozen = {"by": "ann", "reason": "audit week", "since": ""}
    lost = {**record, "versions": {label: {**how, "artifact": str(tmp_path / "absent")}}}
    kept = {"m": record, "f": {**lost, "away": False, "frozen": frozen}}
    with own_runtime() as sockets:
        state = sockets / f"lrai-{os.geteuid()}"
        state.mkdir(mode=0o700)
        told = json.dumps({"stopped": False, "deployments": kept})
        (state / "deployments.json").write_text(told)
        with lrai.Runtime(address="auto"):
            with pytest.raises(lrai.ConditionNotMet, match="'m' is not loaded: it made room"):
                find("m", None, "auto")
            with pytest.raises(lrai.ConditionNotMet, match="'f' is not loaded, and frozen"):
                find("f", None, "auto")
            assert "made room" in run("runtime", "deployments", code=0)


def test_what_lies_in_no_repository_comes_with_commands_of_the_runtime(tmp_path: Path) -> None:
    artifact, written = small_artifact.build(tmp_path / "m.lrai"), Path("a b.lrai")
    (file := tmp_path / "f.onnx").touch()
    rows = tmp_path / "rows.npz"
    load = "lrai runtime load 'a b.lrai' --name"
    with own_runtime():
        assert find(str(file), None, "auto").commands(written) == (
            f"{load} f",
            "lrai runtime unload f",
        )
        assert find(str(file), rows, "auto").commands(written) == (
            f"{load} f",
            "lrai runtime swap f 'a b.lrai' --variant fp32",
        )
        found = find(str(artifact), rows, "auto")
    name = lrai.Artifact.open(artifact).manifest.name
    assert found.commands(written, "/run/lrai") == (
        f"{load} {name} --address /run/lrai",
        f"lrai runtime swap {name} {artifact} --address /run/lrai",
    )
    _, back = replace(found, uri="models:/m/1").commands(written, "/run/lrai")
    told = f"-t lrai:/run/lrai --name {name} -m models:/m/1"
    assert back == f"mlflow deployments update {told}"
