"""`lrai bentoml init`: what it writes, and what it refuses."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import bentoml
import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

import lrai_bentoml
import lrai_core as lrai
from lrai_bentoml.commands import project
from lrai_core.cli import main
from lrai_wheel.pins import pins
from tests.tiny_models import column_model, token_model

LRAI = Path(sys.executable).with_name("lrai")
WRITTEN = ["service.py", "bentofile.yaml", "requirements.txt", ".bentoignore"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> lrai.Artifact:
    folder = tmp_path_factory.mktemp("tokens")
    return lrai.compile(token_model(folder / "t.onnx"), out=folder / "My Tokens.lrai", threads=1)


@pytest.fixture(scope="module")
def written(tokens: lrai.Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    command = [str(LRAI), "bentoml", "init", str(tokens.path)]
    command += ["--folder", str(folder), "--workers", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "now: bentoml build && bentoml serve" in done.stdout
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, where bentoml, which takes seconds, is imported already."""
    command, said, errors = ["lrai", "bentoml", *map(str, arguments)], StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(errors):
        patch.setattr("sys.argv", command)
        patch.setattr("signal.signal", lambda *_: None)  # which would outlive the command
        with pytest.raises(SystemExit) as ended:
            main()
    status = ended.value.code or 0
    assert isinstance(status, int)
    return subprocess.CompletedProcess(command, status, said.getvalue(), errors.getvalue())


def test_a_project_has_what_build_and_serve_need(written: Path, tokens: lrai.Artifact) -> None:
    assert sorted(path.name for path in written.iterdir()) == sorted([*WRITTEN, "wheels"])
    build: dict[str, Any] = yaml.safe_load((written / "bentofile.yaml").read_text())
    assert build["service"] == "service:MyTokens"
    assert build["models"] == [{"tag": "my-tokens:latest", "alias": "my-tokens:latest"}]
    assert build["labels"]["lrai.artifact"] == tokens.version
    assert build["envs"] == [{"name": "LRAI_LOG", "value": "stderr"}]
    assert build["python"]["lock_packages"] is False
    (wheel,) = build["python"]["wheels"]
    assert (written / wheel).is_file()
    assert "workers=3" in (written / "service.py").read_text()
    ignored = (written / ".bentoignore").read_text().split()
    assert {"wheels/", ".venv/", "__pycache__/"} <= set(ignored)


def test_the_service_is_code_as_one_would_write_it(written: Path) -> None:
    service = written / "service.py"
    for check in (["format", "--check"], ["check", "--select", "E,F,I,N,UP,B,SIM"]):
        command = [sys.executable, "-m", "ruff", *check, "--isolated", "--line-length", "100"]
        done = subprocess.run([*command, service], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_requirements_pin_what_is_here(written: Path) -> None:
    lines = (written / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if not line.startswith("#")]
    assert set(wanted) == {pin for pin in pins("bentoml") if not pin.startswith("bentoml==")}
    names = {line.partition("==")[0] for line in wanted}
    assert {"numpy", "onnxruntime", "pyzmq", "msgspec", "starlette", "uvicorn"} <= names
    assert not {"lrai", "bentoml", "mlflow-skinny", "torch"} & names


@pytest.mark.parametrize("there", WRITTEN)
def test_nothing_is_overwritten(tokens: lrai.Artifact, tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("mine")
    models = len(bentoml.models.list())
    done = run("init", tokens.path, "--folder", tmp_path)
    assert done.returncode == 2
    assert f"{there}: there already" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"
    assert len(bentoml.models.list()) == models


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing:latest"], 2, "missing"),
        (["missing:latest", "--name", "x"], 2, "is for an artifact"),
        (["{empty}"], 4, "manifest"),
        (["../../no-such-folder"], 2, "no-such-folder"),
        (["missing:latest", "--workers", "0"], 2, "workers"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_sentence(
    arguments: Sequence[str], code: int, message: str, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    given_ = [argument.format(empty=empty) for argument in arguments]
    done = run("init", *given_, "--folder", tmp_path / "project")
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "project" / "service.py").exists()


@pytest.mark.parametrize("why", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_was_cut_off_is_written_again(
    tokens: lrai.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: BaseException
) -> None:
    opened = Path.open

    def full(_: str) -> None:
        raise why

    def cut(path: Path, mode: str = "r", **options: Any) -> Any:
        stream = opened(path, mode, **options)
        if path.name == WRITTEN[2]:
            monkeypatch.setattr(stream, "write", full)
        return stream

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", cut)
        assert run("init", tokens.path, "--folder", tmp_path).returncode in (5, 130)
    assert not [name for name in WRITTEN if (tmp_path / name).exists()]
    assert run("init", tokens.path, "--folder", tmp_path).returncode == 0


def test_a_folder_that_cannot_be_written_is_a_sentence(tokens: lrai.Artifact) -> None:
    done = run("init", tokens.path, "--folder", "/proc/lrai")
    assert done.returncode == 5
    assert "/proc/lrai" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_saved_model_is_served_by_its_tag(tokens: lrai.Artifact, tmp_path: Path) -> None:
    stored = lrai_bentoml.save_model("kept", tokens)
    models = len(bentoml.models.list())
    assert run("init", stored.tag, "--folder", tmp_path).returncode == 0
    assert f'runner("{stored.tag}")' in (tmp_path / "service.py").read_text()
    assert len(bentoml.models.list()) == models


def test_a_home_inside_the_project_does_not_pack_itself(
    tokens: lrai.Artifact, tmp_path: Path
) -> None:
    class Stored:
        path = tmp_path / "project" / "home" / "models" / "kept" / "1"

    Stored.path.mkdir(parents=True)
    assert project._home(Stored, tmp_path / "project") == ["home/"]  # type: ignore[arg-type]
    assert project._home(Stored, tmp_path / "other") == []  # type: ignore[arg-type]


def test_a_model_with_one_output_is_answered_with_an_array(tmp_path: Path) -> None:
    artifact = lrai.compile(column_model(tmp_path / "c.onnx"), out=tmp_path / "c.lrai", threads=1)
    service = project._service("Columns", "columns", "columns:latest", 1, artifact)
    assert ") -> np.ndarray:" in service
    assert "return await self.model.async_run(price, count)" in service
    ast.parse(service)


@pytest.mark.parametrize("name", ["args", "kwargs", "ctx", "context"])
def test_an_input_keeps_off_names_that_bentoml_gives_a_meaning(name: str) -> None:
    spec = lrai.TensorSpec(name=name, datatype="FP32", shape=("n",))
    assert project._identifiers([spec]) == [f"{name}_"]


@pytest.mark.parametrize("name", ["none", "true", "false"])
def test_a_model_may_be_called_what_python_means_otherwise(name: str) -> None:
    ast.parse(f"class {project._class_name(name)}: pass")


NAMES = st.text(min_size=1, max_size=30) | st.sampled_from(["self", "class", "a:0", "a.0", "dict"])


@given(st.lists(NAMES, min_size=1, max_size=6, unique=True))
def test_any_names_of_tensors_make_a_service(names: list[str]) -> None:
    specs = tuple(
        lrai.TensorSpec(name=name, datatype="FP32", shape=(names[0], 3)) for name in names
    )
    manifest: Any = type("Manifest", (), {"signature": lrai.Signature(inputs=specs, outputs=specs)})
    artifact: Any = type("Artifact", (), {"manifest": manifest})
    tree = ast.parse(project._service("Model", "model", "model:latest", 1, artifact))
    (service,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    (predict,) = [node for node in service.body if isinstance(node, ast.AsyncFunctionDef)]
    arguments = [argument.arg for argument in predict.args.args]
    assert len(set(arguments)) == len(names) + 1
    assert not set(arguments[1:]) & project._TAKEN
    if len(names) > 1:
        assigned = next(node for node in predict.body if isinstance(node, ast.Assign))
        assert ast.literal_eval(assigned.value) == tuple(names)


@given(st.text(max_size=40))
def test_any_name_of_an_artifact_makes_a_tag_and_a_class(name: str) -> None:
    tag = project._tag_name(name)
    assert bentoml.Tag.from_taglike(tag).name == tag
    assert project._class_name(tag).isidentifier()


def test_help_says_what_to_do_for_a_service_of_several_models() -> None:
    said = " ".join(run("init", "--help").stdout.split())
    assert "It takes one." in said
    for name in ("save_model", "runner"):
        assert f"lrai_bentoml.{name}" in said
        assert hasattr(lrai_bentoml, name)
