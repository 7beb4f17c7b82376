"""The guide's commands run from the top in a folder with a model repository, as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest

import lrai_core as lrai
from benchmarks.host import Host
from benchmarks.processes import HOST, free_ports
from benchmarks.triton_demo import stand_in
from benchmarks.triton_server import Prepared, variables
from tests.integration.triton.test_demo import CONFIG

pytestmark = pytest.mark.server

# Without weights that could be quantised: `compile` adds fp32, at once, and on every machine.
CLASSIFIER = """
<ir_version: 8, opset_import: ["" : 17]>
total (float[batch, 64] features) => (float[batch, 10] logits)
<int64[1] axis = {1}, float[10] factors = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}>
{
    total = ReduceSum<keepdims = 1>(features, axis)
    logits = Mul(total, factors)
}
"""
ENCODER = """
<ir_version: 8, opset_import: ["" : 17]>
total (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask)
    => (float[batch, 1] sentence_embedding)
<int64[1] axis = {1}>
{
    kept = Mul(input_ids, attention_mask)
    total = ReduceSum<keepdims = 1>(kept, axis)
    sentence_embedding = Cast<to = 1>(total)
}
"""
GUIDE = (Path(__file__).parents[3] / "adapters" / "triton" / "README.md").read_text()


def until(command: str) -> str:
    return f"\ntimeout 60 bash -c 'until {command}; do sleep 0.2; done'"


def script(backends: Path) -> str:
    """Return the guide's commands; the server is in the background, on ports of its own.

    Left out is what a server needs no second time: packages, the other way to start it, an image.
    """
    port, grpc, metrics = free_ports(3)
    own = f"--backend-directory={backends} --http-port={port} --grpc-port={grpc}"
    own += f" --metrics-port={metrics} --allow-gpu-metrics=false --exit-timeout-secs=5"
    found = ["set -euo pipefail", "trap 'kill $(jobs -p) || true; wait' EXIT"]
    _, _, sections = GUIDE.partition("\n## ")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", sections, re.DOTALL | re.MULTILINE):
        if block.startswith("backend: "):  # which is written by hand
            found.append(f'sed -i \'s/^backend: "[^"]*"/{block.strip()}/\' models/m/config.pbtxt')
        elif language == "python":
            found.append(f"python3 - <<'PYTHON'\n{block}PYTHON")
        elif language == "sh" and "docker" not in block:
            found.append(block)
    assert len(found) == 12
    text = "\n".join(found)
    for pattern, instead in {
        r"\$\(openssl .*?\)": "secret",  # a program that not every machine has
        r"^(python3 -m pip|PATH=/FOLDER).*": "",
        r"^lrai triton serve -- .*": rf"\g<0> {own} &> server.log &"
        f"{until('curl -sf localhost:8000/v2/health/ready')}",
        r"^lrai triton watch .*": r"\g<0> &> watch.log &"
        f"{until('grep watching watch.log')}",
        "/opt/tritonserver/backends": str(backends),
        "localhost:8000": f"{HOST}:{port}",
    }.items():
        text, changed = re.subn(pattern, instead, text, flags=re.MULTILINE)
        assert changed, pattern
    return text


def test_its_commands_run_from_the_top_in_front_of_a_server(
    prepared: Prepared, tmp_path: Path
) -> None:
    backends, folder = tmp_path / "backends", tmp_path / "folder"
    entry = folder / "models" / "m"
    (entry / "1").mkdir(parents=True)
    (entry / "config.pbtxt").write_text(CONFIG)
    for place in (entry / "1", folder):
        onnx.save(onnx.parser.parse_model(CLASSIFIER), place / "model.onnx")
    rows = np.random.default_rng(0).normal(size=(1_000, 64)).astype(np.float32)
    np.savez(folder / "rows.npz", features=rows)
    onnx.save(onnx.parser.parse_model(ENCODER), tmp_path / "minilm.onnx")
    made = lrai.compile(tmp_path / "minilm.onnx", out=folder / "minilm.lrai", threads=1)
    shutil.copytree(made.path, folder / "minilm-2.lrai")
    shutil.copytree(prepared.backends / "python", backends / "python", symlinks=True)
    stand_in(backends)
    (folder / "server.log").touch()
    with Host() as host:
        own = {"LRAI_RUNTIME_SOCKET_DIR": str(host.folder), "LRAI_ACTOR_THREADS": "1"}
        done = subprocess.run(
            ["/bin/bash", "-c", script(backends)],
            cwd=folder,
            env={**os.environ, **variables(prepared.environment), **own},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=400,
            check=False,
        )
    said = done.stdout + (folder / "server.log").read_text(errors="replace")[-4000:]
    assert done.returncode == 0, said
    assert '{"error"' not in done.stdout, said
    assert f"[[{101 + 7592 + 102}.]]" in done.stdout, said
    assert (entry / "config.pbtxt").read_text() == CONFIG
    assert len(list(entry.glob("lrai-2-*"))) == 1
    assert {place.name for place in (folder / "models" / "minilm").iterdir()} > {"1", "2"}
