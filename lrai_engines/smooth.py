"""Int8 of matrices whose activations were smoothed: what their columns differ by is in the weights.

Some columns of a transformer's activations are many times as large as the others, and one scale
leaves the others few steps. Divided by a factor per column, with which the weights' rows are
multiplied, activations are easier to round, and weights harder: how far to go is measured (Xiao et
al. 2023, "SmoothQuant", arXiv:2211.10438). What is still much larger is computed in parts, see
`outliers`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
from google.protobuf.message import EncodeError
from onnx import TensorProto, helper

from lrai_core.compiler.search import Quantized, Sample
from lrai_core.engine.engine import Session
from lrai_core.errors import ArtifactError, CompileError, EngineError
from lrai_core.protocol import Array
from lrai_core.verifier.spec import difference
from lrai_engines.mixed import Step, cheapest
from lrai_engines.outliers import Columns, divisible, parts, split
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
# What float32 takes more for an element of a matrix than int8; and for a column of an activation
# what a scale per row takes more than one that is known: six operators that run through it once.
_FLOAT_TIME, _ROW_TIME = 0.6, 100.0
_FAULTS: Final = (ArtifactError, CompileError, EngineError, EncodeError, MemoryError, ValueError)
_SMALLEST, _LARGEST = 1e-20, 1e30  # of a step, and of a weight: beyond, float32 has too few

Pair = tuple[list[Array], list[Array]]  # a row, and what float32 answers
Ranges = dict[str, tuple[Float32, Float32]]  # by activation, of each column


class Smoothings(NamedTuple):
    """What was found of a model's activations.

    Attributes:
        by: How each becomes integers.
        columns: Of those that are computed in parts.
        why: None may have a static scale, "" if they may.
    """

    by: dict[str, Smoothing]
    columns: Columns
    why: str = ""


class SmoothForms:
    """Smoothed int8 of one model; ranges, factors and harms are found once.

    Args:
        sample: Rows to see the activations of; nothing is judged on them.
        threads: Of the engine.
    """

    def __init__(self, sample: Sample, threads: int) -> None:
        self._sample, self._threads = sample, threads
        self._found: dict[str, Any] = {}
        self._tried: dict[tuple[str, frozenset[tuple[str, int]]], float] = {}

    def build(
        self,
        model: onnx.ModelProto,
        *,
        scheme: str,
        share: float = 0.0,
        convolved: onnx.ModelProto | None = None,
    ) -> Made:
        """Return `model` in int8, with this share less harm where that costs least.

        Args:
            model: Weights inline, opset 13 or later. Not modified.
            scheme: Of the activations: `ROW` gives each row a scale of its own when it runs, and
                leaves what harms most in float32. `STATIC` has scales that were found on the
                sample, and gives what harms most a scale per row, or leaves it in float32. `QDQ` is
                that in the standard's operators, without scales per row.
            share: Of the harm, 0 or more, below 1.
            convolved: What `parted` returns as `static_int8` makes it beside attention: what is
                rewritten then.

        Raises:
            NothingToQuantize: No operator qualifies, all would be kept closer, or the same as
                before would be made.
            CompileError: It cannot be told what the activations are, or what int8 does.
        """
        parted, emit = self.parted(model), self._emit(model, scheme)
        if not share:
            return _with_biases(*rewrite(convolved or parted, emit, self.known(model, scheme)))
        emits, does, steps = [emit], [self.harms(model, scheme)], list[Step]()
        layers = {one.weight: one for one in linears(parted)}
        if scheme == STATIC:
            emits.append(self._emit(model, ROW))
            does.append(self.harms(model))
            for activation in {one.activation: 0 for one in layers.values()}:
                theirs = [one for one in layers.values() if one.activation == activation]
                names = [one.weight for one in theirs]
                steps.append(Step(names, 1, _ROW_TIME * len(theirs[0].matrix)))
        emits, does = [*emits, _float32], [*does, {}]
        last = len(does) - 1
        steps += [Step([n], last, _FLOAT_TIME * one.matrix.size) for n, one in layers.items()]
        found = cheapest(does, steps, share)
        if 0 not in (chosen := {*found.values()}) or len(chosen) < 2:
            raise NothingToQuantize("no matrix, or every matrix would be kept closer")
        if self._tried.setdefault((scheme, frozenset(found.items())), share) != share:
            raise NothingToQuantize("it would be a form that was made before")

        def mixed(graph: Graph, layer: Linear) -> str:
            return emits[found[layer.weight]](graph, layer)

        return _with_biases(*rewrite(parted, mixed, does[0]))

    def parted(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return `model` with the columns that smoothed int8 computes in parts."""
        with suppress(CompileError):
            return split(model, self._smoothings(model).columns)
        return model

    def harms(self, model: onnx.ModelProto, scheme: str = ROW) -> dict[str, float]:
        """Return what int8 of each matrix does to the outputs, see `sensitivity.harms`.

        Matrices are those of `parted`. With `QDQ` it is what they do with `STATIC`.

        Raises:
            CompileError: It cannot be told.
        """
        scheme = ROW if scheme == ROW else STATIC

        def find() -> dict[str, float]:
            return harms(self.parted(model), self._sample, self._threads, self._emit(model, scheme))

        found: dict[str, float] = self._once("what each matrix does cannot be told", find, scheme)
        return found

    def known(self, model: onnx.ModelProto, scheme: str = ROW) -> dict[str, float]:
        """Return what `harms` does, nothing where it cannot be told."""
        with suppress(CompileError, OSError):  # a temporary folder may be full
            return self.harms(model, scheme)
        return {}

    def _smoothings(self, model: onnx.ModelProto) -> Smoothings:
        find = partial(smoothings, model, self._sample, self._threads)
        found: Smoothings = self._once("the activations cannot be seen", find)
        return found

    def _emit(self, model: onnx.ModelProto, scheme: str) -> Emit:
        try:
            by, _, why = self._smoothings(model)
        except CompileError:
            if scheme != ROW:
                raise
            return int8_per_row
        if why and scheme != ROW:
            raise CompileError(why)
        return partial(_smoothed, by=by, scheme=scheme)

    def _once(self, what: str, find: Callable[[], object], scheme: str = "") -> Any:
        """Return what was found, or raise why not: it could not be found another time either."""
        key = what + scheme
        if key not in self._found:
            try:
                self._found[key] = find()
            except NothingToQuantize as error:
                self._found[key] = error
            except _FAULTS as error:
                self._found[key] = CompileError(f"{what}: {error}")
        if isinstance(found := self._found[key], CompileError):
            raise found
        return found


def smoothings(model: onnx.ModelProto, sample: Sample, threads: int) -> Smoothings:
    """Return how each activation becomes integers.

    The strengths are those that the outputs err least by: first one for all, then another beside
    what is computed in parts, which needs less of it. Ranges are those of one half of the rows
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
    between = divisible(model)
    tries = 2 * len(_STRENGTHS) * (2 if between else 1)
    session, pairs, began = opened(model, threads), list[Pair](), time.perf_counter()
    for row in rows[1::2][:_JUDGED]:
        pairs.append((row, session.run(row)))
        spent = (time.perf_counter() - began) * tries
        if len(pairs) >= _FEWEST and spent * (len(pairs) + 1) / len(pairs) > _SECONDS:
            break
    why = _undefined(session, max(pairs, key=lambda pair: sum(map(finite, pair[1]))))
    del session  # its weights

    @cache
    def errs(strength: float, parted: float) -> float:
        by, columns = _smoothing_of(seen[0], peaks, strength, between, parted)
        own = split(model, columns)
        each = (_error(own, by, scheme, pairs, sample, threads) for scheme in (ROW, STATIC))
        return sum(each)

    best = min(_STRENGTHS, key=lambda one: errs(one, one))
    parted = best
    if _smoothing_of(seen[0], peaks, best, between, best)[1]:
        best = min(_STRENGTHS, key=lambda one: errs(one, parted))
    both = {name: (*one, *seen[1][name]) for name, one in seen[0].items() if name in seen[1]}
    whole = {n: (np.minimum(a, c), np.maximum(b, d)) for n, (a, b, c, d) in both.items()}
    return Smoothings(*_smoothing_of(whole, peaks, best, between, parted), why)


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
    ranges: Ranges,
    peaks: Mapping[str, Float32],
    strength: float,
    between: Collection[str] = (),
    parted: float = 0.0,
) -> tuple[dict[str, Smoothing], Columns]:
    """Return the smoothing of each activation, and the columns of those computed in parts.

    Columns are divided by their range to the power of `strength`, and by the weights' to the rest.
    A column that was never seen counts as the mean one: it may be used all the same. Of `between`
    what is left of the largest is divided by the number of its parts; their strength is `parted`.

    Source: Xiao et al. 2023, equation 4; here at least 1, so that nothing grows too large.
    """
    found, columns = dict[str, Smoothing](), dict[str, Any]()
    for name, (low, high) in ranges.items():
        most, weights = np.maximum(high, -low).astype(float), peaks[name].astype(float)
        if not most.any():
            continue
        factor, power = np.ones_like(weights), parted if name in between else strength
        if power and weights.any():
            seen = most[most > 0].mean()
            most = np.where(most > 0, np.maximum(most, _LEAST * seen), seen)
            weights = np.maximum(weights, _LEAST * weights.mean())
            powers = power * np.log(most) - (1 - power) * np.log(weights)
            factor = np.exp(powers - powers.min())
        if (peaks[name] * factor).max() >= _LARGEST:
            continue
        counts = parts(low / factor, high / factor) if name in between else None
        if counts is not None:
            factor, columns[name] = factor * counts, np.arange(len(counts)).repeat(counts)
        least = min((low / factor).min(), 0.0)
        step = (max((high / factor).max(), 0.0) - least) / _LEVELS
        if step > _SMALLEST:
            own = factor[columns.get(name, slice(None))].astype(np.float32)
            plain = not power and counts is None
            found[name] = Smoothing(None if plain else own, float(step), round(-least / step))
    return found, columns


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
