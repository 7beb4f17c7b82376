"""What a model takes of memory in a process that loads it alone, as an actor does, and of a disk.

What is mapped is memory once it is read: models of text are given every id of their vocabulary.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import TensorProto, helper
from onnx.external_data_helper import ExternalDataInfo

import lrai_core as lrai

Ids = Mapping[str, int]  # by input how many there are

_LENGTH: Final = 128  # tokens of a call
_PROGRAM: Final = """
import json
import sys
from pathlib import Path

import numpy as np

from lrai_core.engine.engine import find_engine

model, weights, engine, optimise, ids, length = sys.argv[1:]
folder = Path(weights) if weights else None
session = find_engine(engine).load(Path(model), weights=folder, optimise=optimise == "True")
kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(uint8)": np.uint8}
inputs = session._session.get_inputs() if engine == "onnxruntime" else []
ids, feed, calls = json.loads(ids), {}, 3  # so that what is mapped is there
for value in inputs:
    free = [1] + [int(length) if ids else 1] * len(value.shape)
    shape = [n if isinstance(n, int) else other for n, other in zip(value.shape, free)]
    feed[value.name] = np.ones(shape, kinds[value.type])
    calls = max(calls, -(-ids.get(value.name, 0) // feed[value.name].size))
for call in range(calls * bool(feed)):
    for name, count in ids.items():
        array = feed[name]
        array.flat = (call * array.size + np.arange(array.size)) % count
    session.run([*feed.values()])
held, library = 0, False  # of libraries it has a share, which others change as they come and go
for line in Path("/proc/self/smaps").read_text().splitlines():
    name, *values = line.split()
    if not name.endswith(":"):  # of a mapping: its addresses, and its file
        # Code that an engine has made for this model lies in no file: it counts.
        library = "/" in line and ("x" in values[0] or ".so" in line.rpartition("/")[2])
    elif name == "Pss:":
        held += int(values[0]) * (not library)
print(held)
"""


def vocabulary(source: Path) -> dict[str, int]:
    """Return of a graph the inputs that rows of a table are read by, and how many rows it has."""
    graph = onnx.load(source, load_external_data=False).graph
    tables = {tensor.name: tensor.dims[0] for tensor in graph.initializer if len(tensor.dims) == 2}
    given = {value.name for value in graph.input}
    reads = [node.input for node in graph.node if node.op_type == "Gather"]
    return {at: tables[table] for table, at in reads if table in tables and at in given}


def loaded_mb(
    model: Path, ids: Ids, *, weights: str = "", engine: str = "onnxruntime", optimise: bool = False
) -> float:
    """Return the proportional set size above that of a process with a model of one operator.

    Libraries do not count: both processes have them.

    `ids`: of the source's `vocabulary`, all of which the model is asked.
    """
    return _pss_mb(model, ids, weights, engine, optimise) - _floor_mb(engine)


def variant_mb(artifact: lrai.Artifact, variant: lrai.Variant) -> float:
    """Return the same of a variant, as an actor loads it."""
    weights = str(artifact.path / variant.weights) if variant.weights else ""
    ids = vocabulary(artifact.file(artifact.manifest.source.file))
    return loaded_mb(artifact.file(variant.model), ids, weights=weights, engine=variant.engine)


def idle_mb(artifact: lrai.Artifact) -> float:
    """Return what the models in an artifact take of a disk beside those that serve.

    These are fp32, where it does not serve, the source, by which the gate's rows are run again, and
    others that are kept. They share tensors with one another, and with those that serve.
    """
    models = ("source/", "variants/")
    held = (e.size_bytes for n, e in artifact.manifest.files.items() if n.startswith(models))
    read = dict[tuple[str, int], int]()  # bytes, by file and place
    for variant in artifact.manifest.serving():
        for name, entry in artifact.files_of(variant).items():
            if not (variant.weights and name.startswith(f"{variant.weights}/")):
                read[name, 0] = entry.size_bytes
        if variant.weights:
            graph = onnx.load(artifact.file(variant.model), load_external_data=False).graph
            for tensor in graph.initializer:
                if tensor.data_location == TensorProto.EXTERNAL:
                    place: Any = ExternalDataInfo(tensor)
                    file = f"{variant.weights}/{place.location}"
                    read[file, place.offset or 0] = place.length or 0
    return (sum(held) - sum(read.values())) / 1e6


@cache
def _floor_mb(engine: str) -> float:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    node = helper.make_node("Neg", ["x"], ["y"])
    graph = helper.make_graph([node], "one", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 17)]
    with tempfile.TemporaryDirectory(prefix="lrai-memory-") as folder:
        path = Path(folder, "one.onnx")
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
        return _pss_mb(path, {}, "", engine, optimise=True)


def _pss_mb(model: Path, ids: Ids, weights: str, engine: str, optimise: bool) -> float:  # noqa: FBT001
    arguments = [str(model), weights, engine, str(optimise), json.dumps(ids), str(_LENGTH)]
    command = [sys.executable, "-P", "-c", _PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024 / 1e6
