"""Graph fusion ahead of time: onnxruntime's offline optimizer, with chosen passes switched off.

The optimised graph is stored in the artifact and later loaded with every optimisation disabled, so
what was measured is what runs.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import helper

from lrai_core.engine.onnxruntime import REFUSALS, open_session, reason, refusal, session_options
from lrai_engines.quantize import read

DISABLEABLE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("default", ()),
    ("unfused", ("SkipLayerNormFusion", "BiasGeluFusion")),
)
"""Sets of optimizer passes to switch off, each a candidate to measure: (name, `disabled`).

SkipLayerNormFusion makes MiniLM-L6 slower (float32 3 to 8 %, int8 10 to 20 %), and BiasGeluFusion
(float32 1 to 3 %, int8 2 to 5 % where its bias is apart; onnxruntime 1.32, AMX-class Xeon).

Each of the two alone is not tried. Where both have something to do (MiniLM-L6 with its shapes
annotated, 1 and 8 rows of 32 tokens, float32 and int8 by row) without the first alone it takes .97
to 1.02 of the time that it takes without both, and without the second alone 1.08 to 1.14; and with
two sets more a small encoder of that kind takes 1.4 times as long to compile (processor time).
"""
_CONTRIB = "com.microsoft"
_CURVES = ("Sigmoid", "HardSigmoid")
_NEVER = ("WeightBiasQuantization",)  # quantises, per tensor, what a form keeps in float32
# Rounds before a pooling in place of behind it, whose kernel for integers is several times slower
# than that of float32 convolutions (a small network of both, 8 rows: 415 us for 255). Where the
# convolution before it is in int8 too, it reads what that gives, and this belongs to it.
_BEFORE_POOLING = "QDQPropagationTransformer"


def optimise(
    model: onnx.ModelProto,
    *,
    level: Literal["basic", "all"],
    disabled: Sequence[str] = (),
    threads: int = 1,
    weights: Path | None = None,
) -> onnx.ModelProto:
    """Return `model` as onnxruntime's CPU provider would execute it.

    It is to be loaded with ORT_DISABLE_ALL.

    Inputs and outputs keep their names, types and shapes. With "all" the result may hold operators
    and layouts that only this CPU's instruction set runs.

    Args:
        model: Below 2 GB without its external data. Not modified.
        level: "basic" keeps to standard operators and suits later quantisation; "all" fuses.
        disabled: Names of onnxruntime optimizer passes to leave out; unknown names have no effect.
        threads: For the constant folding that the optimizer does.
        weights: Folder of the model's external data, which the result goes on to refer to.

    Raises:
        UnsupportedOperator: The CPU provider has no kernel for an operator of the model.
        CompileError: onnxruntime rejects the model, or it is 2 GB or larger.

    Source: onnxruntime "Graph optimizations", offline mode.
    """
    options = session_options(threads, level, weights)
    never = [*_NEVER, *[_BEFORE_POOLING] * _pools_float32(model)]
    model = _with_curves(model) if level == "all" else model
    # No inference happens here, so packing the weights would only cost a second copy of them.
    options.add_session_config_entry("session.disable_prepacking", "1")
    with tempfile.TemporaryDirectory(prefix="lrai-fusion-") as folder:
        target = Path(folder, "optimised.onnx")
        options.optimized_model_filepath = str(target)
        try:
            open_session(
                model.SerializeToString(), options, disabled_optimizers=[*disabled, *never]
            )
            return onnx.load(target, load_external_data=False)
        except (*REFUSALS, EncodeError, DecodeError) as error:
            problem = f"onnxruntime cannot optimise the model: {reason(error)}"
            raise refusal(error, problem) from error


def _pools_float32(model: onnx.ModelProto) -> bool:
    """Return whether a pooling reads what is not of int8, directly or by way of a convolution."""
    rounded = set[str]()
    for node in model.graph.node:
        if node.op_type == "MaxPool" and node.input[0] not in rounded:
            return True
        of_it = node.op_type in ("Conv", "Relu", "Clip", "MaxPool") and node.input[0] in rounded
        if of_it or node.op_type == "DequantizeLinear":
            rounded.update(node.output)
    return False


def curves(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Yield what gives a curve of a number, and what multiplies it by that number: SiLU, HardSwish.

    Nothing else reads the curve.
    """
    made = {name: node for node in model.graph.node for name in node.output}
    readers = Counter(name for node in model.graph.node for name in read(node))
    readers.update(value.name for value in model.graph.output)
    for node in (node for node in model.graph.node if node.op_type == "Mul"):
        for x, value in (node.input, node.input[::-1]):
            curve = made.get(value)
            known = curve is not None and curve.op_type in _CURVES and readers[value] == 1
            if curve is not None and known and curve.input[0] == x:
                yield curve, node


def _with_curves(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return `model`, in which SiLU of what integers stand for is one operator.

    onnxruntime's pass makes one of two, but not behind DequantizeLinear, which it has one for each
    that reads it.
    """
    made = {name: node for node in model.graph.node for name in node.output}
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}

    def rounded(curve: onnx.NodeProto) -> bool:
        before = made.get(curve.input[0])
        if before is None or before.op_type != "DequantizeLinear":
            return False
        return kinds.get(before.input[1]) == onnx.TensorProto.FLOAT

    pairs = [pair for pair in curves(model) if pair[0].op_type == "Sigmoid" and rounded(pair[0])]
    if not pairs:
        return model
    gone = {curve.output[0] for curve, _ in pairs}
    one = {
        product.output[0]: helper.make_node(
            "QuickGelu", curve.input, product.output, product.name, domain=_CONTRIB, alpha=1.0
        )
        for curve, product in pairs
    }
    nodes = [one.get(n.output[0], n) for n in model.graph.node if n.output[0] not in gone]
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    if all(opset.domain != _CONTRIB for opset in result.opset_import):
        result.opset_import.append(helper.make_opsetid(_CONTRIB, 1))
    return result
