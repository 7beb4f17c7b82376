"""What int8 does to the outputs, one matrix at a time.

A few matrices do most of it: in MiniLM-L6 four of 36, behind the first four layers' GELU, do three
quarters. What is known of each is what decides where precision is spent.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from lrai_core.compiler.search import Sample
from lrai_core.engine.engine import Session, find_engine
from lrai_core.executor import on_all_cpus
from lrai_core.protocol import Array
from lrai_core.verifier.spec import difference
from lrai_engines.quantize import Emit, Graph, Linear, int8_per_row, linears, rewrite

SWITCHES: Final = "lrai:switches"
_SECONDS: Final = 15.0  # for all matrices and rows
_MOST: Final = 32  # rows
LARGEST: Final = 1e3  # of one difference: beyond, none is worse than another


def harms(
    model: onnx.ModelProto, sample: Sample, threads: int = 1, emit: Emit = int8_per_row
) -> dict[str, float]:
    """Return for each matrix the mean squared difference that it makes to the mapped outputs.

    One graph holds every product in both precisions, and a switch for each that takes one or the
    other. Squares, because the differences of several matrices add up like those of random errors.

    Args:
        model: Standard operators, weights inline. Not modified.
        sample: Rows that nothing else is judged on; as many as 15 seconds allow, 1 to 32.
        threads: Of the engine.
        emit: Writes a layer in int8.

    Raises:
        CompileError: No matrix qualifies.
        ArtifactError: onnxruntime does not take the graph.
        EngineError: The model does not run on the sample.
        EncodeError, ValueError: The graph would be 2 GB or larger.
    """
    names = list(dict.fromkeys(layer.weight for layer in linears(model)))
    return switched_on(_switched(model, names, emit), names, sample, threads)


def switched_on(
    model: onnx.ModelProto, names: Sequence[str], sample: Sample, threads: int
) -> dict[str, float]:
    """Return for each of these the mean squared difference that its switch makes, as `harms` does.

    Args:
        model: With one more input than the sample's rows, `SWITCHES`, float32 [names].
        names: Of what the switches turn to int8.
        sample: See `harms`.
        threads: Of the engine.
    """
    session = opened(model, threads)
    off = np.zeros(len(names), np.float32)
    squares: list[list[float]] = [[] for _ in names]
    began = time.perf_counter()
    for done, row in enumerate(sample.rows[:_MOST]):
        if done and (time.perf_counter() - began) * (done + 1) / done > _SECONDS:
            break
        right = session.run([*row, off])
        each = ([*row, on] for on in np.eye(len(names), dtype=np.float32))
        for own, outputs in zip(squares, on_all_cpus(session.run, each, threads), strict=True):
            own.append(min(difference(right, outputs, sample.outputs), LARGEST) ** 2)
    return {name: statistics.fmean(own) for name, own in zip(names, squares, strict=True)}


def finite(array: Array) -> bool:
    """Return whether it holds numbers alone."""
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def numbers(sample: Sample, most: int) -> list[list[Array]]:
    """Return the first rows that hold numbers alone; no others are read."""
    return list(islice((row for row in sample.rows if all(map(finite, row))), most))


def opened(model: onnx.ModelProto, threads: int) -> Session:
    """Return a session on a model with its weights inline.

    Raises:
        ArtifactError: onnxruntime does not take it.
        EncodeError, ValueError: It is 2 GB or larger.
    """
    with tempfile.TemporaryDirectory(prefix="lrai-sensitivity-") as folder:
        file = Path(folder, "model.onnx")
        file.write_bytes(model.SerializeToString())
        return find_engine("onnxruntime").load(file, threads=threads, optimise=True)


def _switched(model: onnx.ModelProto, names: list[str], emit: Emit) -> onnx.ModelProto:
    """Return `model` with one more input, float32 [matrices]: 1 at the place of what is int8."""

    def both(graph: Graph, layer: Linear) -> str:
        y = layer.product
        exact = graph.constant(f"{layer.weight}:float32", layer.matrix, np.float32)
        exact = graph.add("MatMul", [layer.activation, exact], f"{y}:float32")
        scheme = emit(graph, replace(layer, product=f"{y}:int8"))
        place = graph.constant(f"{layer.weight}:place", [names.index(layer.weight)], np.int64)
        switch = graph.add("Gather", [SWITCHES, place], f"{layer.weight}:switch")
        gap = graph.add("Sub", [f"{y}:int8", exact], f"{y}:gap")
        graph.add("Add", [exact, graph.add("Mul", [gap, switch], f"{y}:taken")], y)
        return scheme

    switched, _ = rewrite(model, both)
    shape = [len(names)]
    given = helper.make_tensor_value_info(SWITCHES, TensorProto.FLOAT, shape)
    switched.graph.input.append(given)
    return switched
