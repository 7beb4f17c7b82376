"""A slim artifact where there is little: on one core, in 512 MB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import lrai_core as lrai
from lrai_engines.slim import slim
from tests.integration.conftest import sentence

pytestmark = pytest.mark.server

MOST_BYTES = 512_000_000
PROGRAM = """
import os, resource, sys
from pathlib import Path

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
# Of what is its own alone: of address space libraries reserve more than they use.
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[4]),) * 2)

import numpy as np
import lrai_core as lrai

def peak(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

inputs = dict(np.load(sys.argv[2]))
with lrai.Runtime.open(sys.argv[1]) as runtime:
    answer = runtime.infer(lrai.InferenceRequest(model_name="minilm", inputs=inputs))
    actors = runtime.models()[0].actor_pids
    cores = {core for pid in (0, *actors) for core in os.sched_getaffinity(pid)}
    print(len(actors), len(cores), sum(map(peak, [os.getpid(), *actors])))
np.save(sys.argv[3], answer.outputs["sentence_embedding"])
"""


def test_it_runs_on_one_core_in_512_mb(
    minilm_fp32: lrai.Artifact, minilm_session: onnxruntime.InferenceSession, tmp_path: Path
) -> None:
    """With 90 MB of weights in float32, and sentences as long as they get: less is easier."""
    slimmed = slim(minilm_fp32.path, tmp_path / "s.lrai")
    inputs = sentence(np.random.default_rng(0), rows=8, length=128)
    np.savez(tmp_path / "inputs.npz", **inputs)
    files = [slimmed.path, tmp_path / "inputs.npz", tmp_path / "answer.npy"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, files), str(MOST_BYTES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    actors, cores, peak = map(int, done.stdout.split())
    assert (actors, cores) == (1, 1)
    assert slimmed.variants[0].size_bytes < peak <= MOST_BYTES
    answer = np.load(tmp_path / "answer.npy")
    np.testing.assert_allclose(answer, minilm_session.run(None, inputs)[0], atol=1e-4)
