"""A project of `lrai bentoml init`: built, exported, and served where nothing of it was."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bentoml
import msgspec
import numpy as np
import onnxruntime
import pytest

import lrai_bentoml
import lrai_core as lrai
from benchmarks.host import Host
from benchmarks.processes import HOST, free_ports
from lrai_wheel.pins import pins
from tests.integration.bento import wheelhouse

pytestmark = pytest.mark.server

BIN = Path(sys.executable).parent
IDS = [[3, 14, 15]]
BENTOML = [sys.executable, "-m", "bentoml"]
NOTHING_HERE = {"PYTHONPATH": ""}  # where this checkout may be found
# Of BentoML's own template; whatever else hadolint finds is ours.
NOT_OURS = {"DL3008", "DL3009", "DL3046", "DL3066", "DL4006", "SC3009"}


def run(command: Sequence[str | Path], folder: Path, **variables: str) -> str:
    """Return what a command says that ends well."""
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **variables}, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(
    token_source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, bentoml.Bento]:
    """Return a project, and the Bento that was built of it at once."""
    folder = tmp_path_factory.mktemp("project")
    artifact = lrai.compile(token_source, out=folder / "tokens.lrai", threads=1)
    run([BIN / "lrai", "bentoml", "init", artifact.path], folder)
    (folder / "lrai.toml").write_text("[scheduler]\nmax_batch_rows = 32\n")
    path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    said = run([*BENTOML, "build"], folder, **path)
    (tag,) = re.findall(r'Bento\(tag="(tokens:\w+)"\)', said)
    return folder, bentoml.get(tag)


def test_a_bento_holds_service_model_and_lrai_and_nothing_else(
    built: tuple[Path, bentoml.Bento],
) -> None:
    _, bento = built
    root = Path(bento.path)
    assert {path.name for path in (root / "src").iterdir()} == {
        *("service.py", "bentofile.yaml", "lrai.toml")
    }
    (wheel,) = (root / "env" / "python" / "wheels").iterdir()
    assert wheel.name.startswith("lrai-")
    (model,) = bento.info.all_models
    assert model.tag == lrai_bentoml.get("tokens:latest").tag
    assert model.alias == "tokens:latest"
    requirements = (root / "env" / "python" / "requirements.txt").read_text().splitlines()
    assert f"bentoml=={bentoml.__version__}" in requirements
    assert set(pins("bentoml")) <= set(requirements)


def test_its_dockerfile_is_as_clean_as_the_template_of_bentoml(
    built: tuple[Path, bentoml.Bento],
) -> None:
    _, bento = built
    file = Path(bento.path, "env", "docker", "Dockerfile")
    done = subprocess.run(
        [BIN / "hadolint", "--format", "json", file], capture_output=True, text=True, check=False
    )
    found: list[dict[str, Any]] = msgspec.json.decode(done.stdout)
    assert {one["code"] for one in found} <= NOT_OURS
    assert not [one for one in found if one["level"] == "error"]
    content = file.read_text()
    assert "env/python/install.sh" in content
    assert "ARG LRAI_LOG=stderr\nENV LRAI_LOG=$LRAI_LOG\n" in content  # the runtime's log


def test_a_bento_serves_where_nothing_was_with_the_network_cut(
    built: tuple[Path, bentoml.Bento], token_source: Path, tmp_path: Path
) -> None:
    _, bento = built
    archive = tmp_path / "tokens.bento"
    bento.export(str(archive))
    home = tmp_path / "home"  # empty
    there = {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "true"}
    run([*BENTOML, "import", archive], tmp_path, **there)
    # What is the latest there is not what the Bento was built with.
    newer = "import lrai_bentoml, sys; lrai_bentoml.save_model('tokens', sys.argv[1])"
    artifact = lrai_bentoml.load_model("tokens:latest")
    run([sys.executable, "-c", newer, artifact.path], tmp_path, **there)

    environment = prepare(home / "bentos" / "tokens" / str(bento.tag.version), tmp_path)
    told = serve(bento, environment, tmp_path, there)
    session = onnxruntime.InferenceSession(token_source)
    mean, tokens = session.run(None, {"input_ids": IDS, "attention_mask": np.ones_like(IDS)})
    np.testing.assert_allclose(told["answer"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(told["answer"]["tokens"], tokens, rtol=1e-5)
    (model,) = bento.info.all_models
    assert told["about"]["versions"] == [model.tag.version]
    assert "lrai_runtime_up 1.0" in told["figures"]
    assert told["isolated"]


def prepare(bento: Path, scratch: Path) -> Path:
    """Run the install.sh of a Bento in a new environment that has wheels and no index."""
    names = [pin.partition("==")[0] for pin in pins("bentoml")]
    wheels = wheelhouse.fill(scratch / "wheelhouse", names)
    environment = scratch / "environment"
    venv.create(environment, with_pip=True)
    variables = {
        "PATH": f"{environment / 'bin'}:/usr/bin:/bin",
        "VIRTUAL_ENV": str(environment),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_NO_COMPILE": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    run(["bash", bento / "env" / "python" / "install.sh"], scratch, **variables)
    program = "import lrai_bentoml, lrai_core; print(lrai_core.__file__)"
    where = run([environment / "bin" / "python", "-c", program], scratch, **NOTHING_HERE)
    assert where.startswith(str(environment)), "lrai is that of the Bento"
    return environment


def serve(
    bento: bentoml.Bento, environment: Path, scratch: Path, there: Mapping[str, str]
) -> dict[str, Any]:
    """Return what a server without a network answered."""
    python, program = environment / "bin" / "python", Path(__file__).with_name("ask_inside.py")
    port = str(*free_ports(1))
    with Host() as host:
        variables = {
            **there,
            **NOTHING_HERE,
            "PATH": f"{environment / 'bin'}:/usr/bin:/bin",
            "LRAI_RUNTIME_SOCKET_DIR": str(host.folder),
            "LRAI_ACTOR_THREADS": "1",
        }
        command = [python, program, port, environment / "bin" / "bentoml", "serve", bento.tag]
        # A machine that gives processes no network of their own cannot show this.
        cut = ["unshare", "--map-root-user", "--net", *map(str, command)]
        run([*cut, "--host", HOST, "-p", port], scratch, **variables)
    told: dict[str, Any] = msgspec.json.decode((scratch / "told.json").read_bytes())
    return told
