"""The guide's commands run as they stand, from the top, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import lrai_sagemaker.commands.serve  # noqa: F401 - whose commands these are
from lrai_sagemaker.commands.app import app
from tests.integration.sagemaker.conftest import free_port

pytestmark = pytest.mark.server

GUIDE = (Path(__file__).parents[3] / "adapters" / "sagemaker" / "README.md").read_text()


def test_the_commands_of_the_guide_run(tmp_path: Path, sockets: Path) -> None:
    script = ["set -eu"]
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL):
        if language == "sh":
            script.append(block)
        elif language == "python":
            script.append(f"python - <<'PYTHON'\n{block}PYTHON\n")
    assert len(script) == 6
    text = "\n".join(script).replace("8080", str(free_port()))
    for short, long in (("--retry 40", "--retry 400"), ("timeout_ms=500", "timeout_ms=60000")):
        assert short in text
        text = text.replace(short, long)  # whatever else this machine does
    place = [str(Path(sys.executable).parent), os.environ["PATH"]]
    done = subprocess.run(
        ["/bin/bash", "-c", text],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": os.pathsep.join(place),
            "LRAI_RUNTIME_SOCKET_DIR": str(sockets),
            "LRAI_ACTOR_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "variant=fp32" in done.stdout
    assert done.stdout.endswith("nothing that the platform would trip over\n")


def test_the_guide_names_every_option_and_every_variable_that_there_is() -> None:
    commands: Any = typer.main.get_command(app)
    rows = re.findall(r"^\| `(--[\w-]+)` \| (.+?) \|", GUIDE, re.MULTILINE)
    told = {option: set(re.findall(r"`(\w+)`", variables)) for option, variables in rows}
    known = {}
    for one in commands.commands["serve"].params:
        if one.param_type_name == "option":
            known[one.opts[0]] = {one.envvar} if isinstance(one.envvar, str) else set(one.envvar)
    assert len(known) > 10
    assert told == known
