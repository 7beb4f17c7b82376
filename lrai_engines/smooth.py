"""Int8 of matrices whose activations were smoothed: what their columns differ by is in the weights.

Some columns of a transformer's activations are many times as large as the others, and one scale
leaves the others few steps. Divided by a factor per column, with which the weights' rows are
multiplied, activations are easier to round, and weights harder: how far to go is measured (Xiao et
al. 2023, "SmoothQuant", arXiv:2211.10438).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

import numpy as np
import onnx
from google.protobuf.message import EncodeError
from onnx import TensorProto, helper

from lrai_core.compiler.search import Quantized, Sample
from lrai_core.engine.engine import Session
from lrai_core.errors import ArtifactError, CompileError, EngineError
from lrai_core.protocol import Array
from lrai_core.verifier.spec import difference
from lrai_engines.mixed import worst
from lrai_engines.quantize import (
    FLOAT32,
    Emit,
    Float32,
    Graph,
    Linear,
    Made,
    NothingToQuantize,
    Smoothing,
    constants,
    int8_per_row,
    int8_qdq,
    int8_static,
    linears,
    read,
    rewrite,
)
from lrai_engines.sensitivity import LARGEST, finite, harms, numbers, opened

ROW: Final = "row"
STATIC: Final = "static"
QDQ: Final = "qdq"

_STRENGTHS: Final = (0.0, 0.5, 0.6, 0.7, 0.8)  # of the factors; 0 for none
_LEAST: Final = 0.25  # of the mean range: what was small in the sample need not stay so
_MOST: Final = 128  # rows of the sample
_FEWEST: Final = 2
_JUDGED: Final = 32  # of them, for each strength
_SECONDS: Final = 10.0  # for the first, and about that for the second
_LEVELS: Final = 255
_INPUTS: Final = 5  # of a product as `int8_static` writes it
_ROUNDED: Final = (
    "_DequantizeLinear_Output"  # what onnxruntime's quantiser calls what it has rounded
)
_FAULTS: Final = (ArtifactError, CompileError, EngineError, EncodeError, MemoryError, ValueError)
_SMALLEST, _LARGEST = 1e-20, 1e30  # of a step, and of a weight: beyond, float32 has too few

Pair = tuple[list[Array], list[Array]]  # a row, and what float32 answers
Ranges = dict[str, tuple[Float32, Float32]]  # by activation, of each column


class SmoothForms:
    """Smoothed int8 of one model; ranges, factors and harms are found once.

    Args:
        sample: Rows to see the activations of; nothing is judged on them.
        threads: Of the engine.
    """

    def __init__(self, sample: Sample, threads: int) -> None:
        self._sample, self._threads = sample, threads
        self._found: dict[str, Any] = {}
        self._tried: dict[tuple[str, frozenset[str]], float] = {}

    def build(
        self,
        model: onnx.ModelProto,
        *,
        scheme: str,
        share: float = 0.0,
        convolved: onnx.ModelProto | None = None,
    ) -> Made:
        """Return `model` in int8, but closer where this share of the harm is done.

        Args:
            model: Weights inline, opset 13 or later. Not modified.
            scheme: Of the activations: `ROW` gives each row a scale of its own when it runs, and
                leaves what harms most in float32. `STATIC` has scales that were found on the
                sample, and gives what harms most a scale per row. `QDQ` is that in the standard's
                operators, and leaves what harms most in float32.
            share: Of the harm, 0 or more, below 1.
            convolved: `model` as `static_int8` makes it beside attention: what is rewritten then.

        Raises:
            NothingToQuantize: No operator qualifies, all would be kept closer, or the same as
                before would be made.
            CompileError: It cannot be told what the activations are, or what int8 does.
        """
        emit = self._emit(model, scheme)
        if not share:
            return _with_biases(*rewrite(convolved or model, emit, self.known(model)))
        known = self.harms(model)
        keep = worst(known, {one.weight: one.matrix.size for one in linears(model)}, share)
        if len(keep) in (0, len(known)):
            raise NothingToQuantize("no matrix, or every matrix would be kept closer")
        if self._tried.setdefault((scheme, frozenset(keep)), share) != share:
            raise NothingToQuantize("it would be a form that was made before")
        closer = self._emit(model, ROW) if scheme == STATIC else _float32

        def mixed(graph: Graph, layer: Linear) -> str:
            return (closer if layer.weight in keep else emit)(graph, layer)

        return _with_biases(*rewrite(model, mixed, known))

    def harms(self, model: onnx.ModelProto) -> dict[str, float]:
        """Return what int8 by row of each matrix does to the outputs, see `sensitivity.harms`.

        With static scales the same matrices do most.

        Raises:
            CompileError: It cannot be told.
        """
        find = partial(harms, model, self._sample, self._threads, self._emit(model, ROW))
        found: dict[str, float] = self._once("what each matrix does cannot be told", find)
        return found

    def known(self, model: onnx.ModelProto) -> dict[str, float]:
        """Return what `harms` does, nothing where it cannot be told."""
        with suppress(CompileError, OSError):  # a temporary folder may be full
            return self.harms(model)
        return {}

    def _emit(self, model: onnx.ModelProto, scheme: str) -> Emit:
        find = partial(smoothings, model, self._sample, self._threads)
        try:
            by, why = self._once("the activations cannot be seen", find)
        except CompileError:
            if scheme != ROW:
                raise
            return int8_per_row
        if why and scheme != ROW:
            raise CompileError(why)
        return partial(_smoothed, by=by, scheme=scheme)

    def _once(self, what: str, find: Callable[[], object]) -> Any:
        """Return what was found, or raise why not: it could not be found another time either."""
        if what not in self._found:
            try:
                self._found[what] = find()
            except NothingToQuantize as error:
                self._found[what] = error
            except _FAULTS as error:
                self._found[what] = CompileError(f"{what}: {error}")
        if isinstance(found := self._found[what], CompileError):
            raise found
        return found


def smoothings(
    model: onnx.ModelProto, sample: Sample, threads: int
) -> tuple[dict[str, Smoothing], str]:
    """Return how each activation becomes integers, and why none may have a static scale, or "".

    The strength is the one that the outputs err least by. Ranges are those of one half of the rows
    while it is found on the other. What no operator gives, what was always 0, or what holds what is
    no number, has no smoothing.

    Args:
        model: Standard operators, weights inline. Not modified.
        sample: Of its rows at most 128 are seen, or as many as 10 seconds allow; as long, beside
            what making ten models takes, may the strength take.
        threads: Of the engine.

    Raises:
        NothingToQuantize: No operator qualifies.
        CompileError: Rows are too few.
        ArtifactError, EncodeError, ValueError: onnxruntime does not take the graph.
        EngineError: The model does not run on the sample.
    """
    peaks = dict[str, Float32]()  # of the weights that an activation's columns meet
    for layer in linears(model):
        own = np.abs(layer.matrix).max(axis=1)
        peaks[layer.activation] = np.maximum(own, peaks.get(layer.activation, own))
    if not peaks:
        raise NothingToQuantize("no MatMul or Gemm has a constant float32 matrix")
    rows = numbers(sample, _MOST)
    if len(rows) < _FEWEST:
        raise CompileError(
            f"of {len(sample.rows)} rows {len(rows)} are finite, {_FEWEST} are needed"
        )
    seen = [_ranges(model, list(peaks), rows[half::2], threads) for half in (0, 1)]
    session, pairs, began = opened(model, threads), list[Pair](), time.perf_counter()
    for row in rows[1::2][:_JUDGED]:
        pairs.append((row, session.run(row)))
        spent = (time.perf_counter() - began) * 2 * len(_STRENGTHS)
        if len(pairs) >= _FEWEST and spent * (len(pairs) + 1) / len(pairs) > _SECONDS:
            break
    why = _undefined(session, max(pairs, key=lambda pair: sum(map(finite, pair[1]))))
    del session  # its weights
    errors = [
        sum(
            _error(model, _smoothing_of(seen[0], peaks, strength), scheme, pairs, sample, threads)
            for scheme in (ROW, STATIC)
        )
        for strength in _STRENGTHS
    ]
    both = {name: (*one, *seen[1][name]) for name, one in seen[0].items() if name in seen[1]}
    whole = {n: (np.minimum(a, c), np.maximum(b, d)) for n, (a, b, c, d) in both.items()}
    return _smoothing_of(whole, peaks, _STRENGTHS[int(np.argmin(errors))]), why


def _undefined(session: Session, pair: Pair) -> str:
    """Return why integers would not do, "" if they do: they have no value for what is no number.

    Noughts are what makes it of what is none: a mask of nothing but minus infinity, a mean of none.
    """
    row, right = pair
    for place, array in enumerate(row):
        try:
            told = session.run([*row[:place], np.zeros_like(array), *row[place + 1 :]])
        except EngineError:
            continue  # then int8 refuses them too
        if any(finite(own) and not finite(one) for own, one in zip(right, told, strict=True)):
            return "float32 answers noughts with what is no number, which static scales would not"
    return ""


def _ranges(
    model: onnx.ModelProto, names: Sequence[str], rows: Sequence[list[Array]], threads: int
) -> Ranges:
    """Return the range of these activations' columns, where the graph gives or is given them."""
    inputs = [value.name for value in model.graph.input]
    there = {value.name for value in model.graph.output}
    made = there.union(*(node.output for node in model.graph.node))
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in names
        if name in made and name not in there
    )
    outputs = [value.name for value in probe.graph.output]
    session, found, began = opened(probe, threads), Ranges(), time.perf_counter()
    for done, row in enumerate(rows):
        if done and (time.perf_counter() - began) * (done + 1) / done > _SECONDS / 2:
            break
        arrays = dict(zip([*inputs, *outputs], [*row, *session.run(row)], strict=True))
        for name in names:
            array = arrays.get(name)
            if array is not None and array.size:
                vectors = array.reshape(-1, array.shape[-1])
                low, high = vectors.min(axis=0), vectors.max(axis=0)
                least, most = found.get(name, (low, high))
                found[name] = np.minimum(least, low), np.maximum(most, high)
    return {name: one for name, one in found.items() if np.isfinite(one).all()}


def _error(
    model: onnx.ModelProto,
    by: Mapping[str, Smoothing],
    scheme: str,
    pairs: Sequence[Pair],
    sample: Sample,
    threads: int,
) -> float:
    """Return the logarithm of the mean squared difference to what the rows' answers are."""
    session = opened(rewrite(model, partial(_smoothed, by=by, scheme=scheme))[0], threads)
    told = [difference(right, session.run(row), sample.outputs) for row, right in pairs]
    return math.log(sum(min(gap, LARGEST) ** 2 for gap in told) / len(told) + 1e-30)


def _smoothing_of(
    ranges: Ranges, peaks: Mapping[str, Float32], strength: float
) -> dict[str, Smoothing]:
    """Return the smoothing of each activation.

    Columns are divided by their range to the power of `strength`, and by the weights' to the rest.
    A column that was never seen counts as the mean one: it may be used all the same.

    Source: Xiao et al. 2023, equation 4; here at least 1, so that nothing grows too large.
    """
    found = dict[str, Smoothing]()
    for name, (low, high) in ranges.items():
        most, weights = np.maximum(high, -low).astype(float), peaks[name].astype(float)
        if not most.any():
            continue
        factor = np.ones_like(weights)
        if strength and weights.any():
            seen = most[most > 0].mean()
            most = np.where(most > 0, np.maximum(most, _LEAST * seen), seen)
            weights = np.maximum(weights, _LEAST * weights.mean())
            powers = strength * np.log(most) - (1 - strength) * np.log(weights)
            factor = np.exp(powers - powers.min())
        least = min((low / factor).min(), 0.0)
        step = (max((high / factor).max(), 0.0) - least) / _LEVELS
        if step > _SMALLEST and (peaks[name] * factor).max() < _LARGEST:
            own = factor.astype(np.float32) if strength else None
            found[name] = Smoothing(own, float(step), round(-least / step))
    return found


def _smoothed(graph: Graph, layer: Linear, *, by: Mapping[str, Smoothing], scheme: str) -> str:
    """Write a layer in int8; where its activation was not seen, as int8 can without."""
    smoothing = by.get(layer.activation.removesuffix(_ROUNDED))
    if smoothing is None:
        return _float32(graph, layer) if scheme == QDQ else int8_per_row(graph, layer)
    if scheme == ROW:
        return int8_per_row(graph, layer, smoothing.factor)
    return (int8_qdq if scheme == QDQ else int8_static)(graph, layer, smoothing)


def _float32(graph: Graph, layer: Linear) -> str:
    graph.errors[layer.weight] = 0.0
    weight = graph.constant(f"{layer.weight}:float32", layer.matrix, np.float32)
    graph.add("MatMul", [layer.activation, weight], layer.product)
    return FLOAT32


def _with_biases(model: onnx.ModelProto, report: list[Quantized]) -> Made:
    """Let products add the vector that is added to them next: one operator for two."""
    known, nodes = constants(model), model.graph.node
    readers = Counter(name for node in nodes for name in read(node))
    readers.update(value.name for value in model.graph.output)
    products = {n.output[0]: n for n in nodes if n.op_type == "MatMulIntegerToFloat"}
    for node in [node for node in nodes if node.op_type == "Add"]:
        for product, vector in (node.input, reversed(node.input)):
            of, bias = products.get(product), known.get(vector)
            if of is None or bias is None or readers[product] > 1 or len(of.input) != _INPUTS:
                continue
            weight = known.get(of.input[1])  # another's product may have none that is known
            if weight is not None and list(bias.dims) == list(weight.dims[1:]):
                of.input.extend(["", vector])
                of.output[0] = node.output[0]
                nodes.remove(node)
                break
    return model, report
