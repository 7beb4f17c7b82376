"""Served elsewhere: in an environment of its own, from an image; and the guide as it stands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import lrai_core as lrai
import lrai_mlflow
from benchmarks.processes import HOST, free_ports
from tests.integration.mlflow_server import SERVE, post, processes_with, start
from tests.own_runtime import own_runtime
from tests.tiny_models import token_model

pytestmark = pytest.mark.server

GUIDE = Path(__file__).parents[2] / "adapters" / "mlflow" / "README.md"
GOOD = {"inputs": {"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}}
BIN = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def sockets() -> Iterator[Path]:
    with own_runtime() as folder:
        yield folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    artifact = lrai.compile(
        token_model(tmp_path / "tokens.onnx"), out=tmp_path / "tokens.lrai", threads=1
    )
    lrai_mlflow.save_model(artifact, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.timeout(600)
def test_a_moved_model_is_served_in_an_environment_of_its_own(saved: Path, tmp_path: Path) -> None:
    """By MLflow's default manager, which wants pyenv: where there is none it has to say so."""
    moved = saved.rename(tmp_path / "elsewhere")
    with tempfile.TemporaryDirectory() as home:
        variables = {"MLFLOW_ENV_ROOT": home, "PYTHONPATH": ""}
        if shutil.which("pyenv") is None:
            command = [*SERVE, "-m", str(moved), "-h", HOST, "-p", "0"]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=300, check=False,
                env={**os.environ, **variables},
            )  # fmt: skip
            assert done.returncode != 0
            assert "Could not find the pyenv binary" in done.stderr
            return
        with start(moved, tmp_path, env_manager="virtualenv", variables=variables) as server:
            server.wait_until_ready("/ping", seconds=400)
            assert post(server.port, GOOD).status == 200
            ours = [command for command in processes_with(home).values() if "-m lrai_" in command]
            assert any("lrai_shared.daemon" in command for command in ours)
            assert all(command.startswith(home) for command in ours), ours
            (installed,) = Path(home).rglob("site-packages/lrai_mlflow/flavor.py")
            assert installed.read_text() == Path(lrai_mlflow.flavor.__file__).read_text()


def test_an_image_can_be_made_of_a_model(saved: Path, tmp_path: Path) -> None:
    """No container runs here: the file is linted, and pip finds what the image will install."""
    command = [sys.executable, "-m", "mlflow", "models", "generate-dockerfile"]
    command += ["-m", str(saved), "-d", str(tmp_path / "image")]
    subprocess.run(command, check=True, capture_output=True)
    dockerfile = tmp_path / "image" / "Dockerfile"
    text = dockerfile.read_text()
    assert "COPY model_dir/model /opt/ml/model" in text
    linted = subprocess.run(
        [BIN / "hadolint", "--format", "json", dockerfile], capture_output=True, check=False
    )
    worst = [found for found in json.loads(linted.stdout) if found["level"] == "error"]
    assert worst == []
    model = tmp_path / "image" / "model_dir" / "model"
    install = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet"]
    own = model / "own.txt"  # what is ours of the requirements, as the image has it elsewhere
    own.write_text("\n".join((model / "requirements.txt").read_text().splitlines()[-2:]))
    subprocess.run([*install, "--no-index", "-r", str(own)], check=True, cwd="/")


def test_the_guide_runs_from_the_top_in_an_empty_folder(tmp_path: Path, sockets: Path) -> None:
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks[0][1].startswith("pip install")
    (port,) = free_ports(1)
    script = ["set -euo pipefail", "set -m", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    for language, block in blocks[1:]:
        if language == "sh":
            script.append(block.replace("5123", str(port)))  # which somebody else may have
        elif name := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / name[1]).write_text(block)
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("MLFLOW_ALLOW_FILE_STORE")
    done = subprocess.run(
        ["/bin/bash", "-c", "\n".join(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert '"label": 0' in done.stdout
    assert '"label": 2' in done.stdout
    assert "lrai deployment flowers is created" in done.stdout
    assert {"0.1", "0.9"} <= set(re.findall(r"'share': ([\d.]+)", done.stdout))
    assert "Deployment flowers is deleted" in done.stdout
