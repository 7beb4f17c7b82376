"""The guide's commands run from the top in an empty folder, and its Python compiles."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lrai_bentoml
from benchmarks.host import Host
from benchmarks.processes import free_ports

pytestmark = pytest.mark.server

GUIDE = Path(__file__).parents[3] / "adapters" / "bentoml" / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)


def test_its_commands_run_from_the_top_in_an_empty_folder(tmp_path: Path) -> None:
    commands = [block for block in blocks("sh") if "pip install" not in block]
    script = "set -eux -o pipefail\n" + "\n".join(commands)
    script = script.replace("3000", str(*free_ports(1)))
    patience = "server_ready_timeout=60"
    assert patience in script
    script = script.replace(patience, f"{patience}0")  # whatever else this machine does
    with Host() as host:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        variables = {
            "PATH": path,
            "BENTOML_HOME": str(tmp_path / "home"),
            "LRAI_RUNTIME_SOCKET_DIR": str(host.folder),
        }
        folder = tmp_path / "empty"
        folder.mkdir()
        (elsewhere,) = re.findall(r"^(bentoml import [^#\n]*)", GUIDE.read_text(), re.MULTILINE)
        script += f"\nBENTOML_HOME={tmp_path / 'elsewhere'} {elsewhere}"
        done = subprocess.run(
            ["/bin/bash", "-c", script], cwd=folder, env={**os.environ, **variables}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=580, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "'name': 'logits'" in done.stdout
    assert list((tmp_path / "elsewhere" / "bentos" / "classifier").glob("*/bento.yaml"))


def test_the_names_in_its_python_exist() -> None:
    for block in blocks("python"):
        compile(block, str(GUIDE), "exec")
        names = re.findall(r"lrai_bentoml\.(\w+)", block)
        assert names
        assert all(hasattr(lrai_bentoml, name) for name in names)
