"""Graph fusion ahead of time: onnxruntime's offline optimizer, with chosen passes switched off.

The optimised graph is stored in the artifact and later loaded with every optimisation disabled, so
what was measured is what runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import onnx
from google.protobuf.message import DecodeError, EncodeError

from lrai_core.engine.onnxruntime import REFUSALS, open_session, reason, refusal, session_options

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
