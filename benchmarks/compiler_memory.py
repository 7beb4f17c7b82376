"""What a model takes of memory in a process that loads it alone, as an actor does."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Final

import onnx
from onnx import TensorProto, helper

import lrai_core as lrai

_PROGRAM: Final = """
import sys
from pathlib import Path

import numpy as np

from lrai_core.engine.engine import find_engine

model, weights, engine, optimise = sys.argv[1:]
folder = Path(weights) if weights else None
session = find_engine(engine).load(Path(model), weights=folder, optimise=optimise == "True")
kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(uint8)": np.uint8}
inputs = session._session.get_inputs() if engine == "onnxruntime" else []
feed = [np.ones([n if isinstance(n, int) else 1 for n in v.shape], kinds[v.type]) for v in inputs]
for _ in range(3 * bool(feed)):  # so that what is mapped is there
    session.run(feed)
text = Path("/proc/self/smaps_rollup").read_text()
print(int(text.partition("\\nPss:")[2].split()[0]))
"""


def loaded_mb(
    model: Path, *, weights: str = "", engine: str = "onnxruntime", optimise: bool = False
) -> float:
    """Return the proportional set size above that of a process with a model of one operator."""
    return _pss_mb(model, weights, engine, optimise) - _floor_mb(engine)


def variant_mb(artifact: lrai.Artifact, variant: lrai.Variant) -> float:
    """Return the same of a variant, as an actor loads it."""
    weights = str(artifact.path / variant.weights) if variant.weights else ""
    return loaded_mb(artifact.file(variant.model), weights=weights, engine=variant.engine)


@cache
def _floor_mb(engine: str) -> float:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    node = helper.make_node("Neg", ["x"], ["y"])
    graph = helper.make_graph([node], "one", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 17)]
    with tempfile.TemporaryDirectory(prefix="lrai-memory-") as folder:
        path = Path(folder, "one.onnx")
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
        return _pss_mb(path, "", engine, optimise=True)


def _pss_mb(model: Path, weights: str, engine: str, optimise: bool) -> float:  # noqa: FBT001
    command = [sys.executable, "-P", "-c", _PROGRAM, str(model), weights, engine, str(optimise)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024 / 1e6
