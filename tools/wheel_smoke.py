"""Check an installed wheel: the modules named come from it, and `lrai` compiles an ONNX file."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
from onnx import TensorProto, helper


def main(modules: list[str]) -> int:
    """Import `modules` and run `lrai`; any fault is an exception."""
    for name in modules:
        where = Path(str(importlib.import_module(name).__file__))
        if not where.is_relative_to(sys.prefix):
            raise RuntimeError(f"{name} came from {where}, not from the wheel")
    lrai = Path(sys.executable).with_name("lrai")
    subprocess.run([lrai, "--help"], check=True, capture_output=True)
    compile_a_file(lrai)
    print(f"wheel works: {', '.join(modules)}")
    return 0


def compile_a_file(lrai: Path) -> None:
    """Compile a model of one operator, which takes the importer's entry point."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "graph", values[:1], values[1:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with tempfile.TemporaryDirectory() as folder:
        file, artifact = Path(folder, "model.onnx"), Path(folder, "model.lrai")
        onnx.save(model, file)
        subprocess.run([lrai, "compile", file, "-o", artifact], check=True, capture_output=True)
        if not (artifact / "manifest.json").is_file():
            raise RuntimeError(f"lrai compile left no artifact at {artifact}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
