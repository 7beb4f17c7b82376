"""The offline optimizer against onnxruntime's own, online one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from lrai_core.compiler.model import SharedWeights
from lrai_core.compiler.search import Material
from lrai_core.engine.engine import find_engine
from lrai_core.errors import CompileError, UnsupportedOperator
from lrai_engines import fusion
from lrai_engines.forms import OnnxRuntimeForms
from lrai_engines.fusion import DISABLEABLE, optimise
from tests.core.compiler.onnx_files import linear

Array = npt.NDArray[Any]

WIDTH = 8


def encoder_block() -> onnx.ModelProto:
    """Return x + GELU(x W), then LayerNormalization, written out as an exporter does it."""
    random = np.random.default_rng(0)
    constants = {
        "w": random.standard_normal((WIDTH, WIDTH)).astype(np.float32),
        "b": random.standard_normal(WIDTH).astype(np.float32),
        "gain": np.ones(WIDTH, np.float32),
        "root": np.array(2**0.5, np.float32),
        "one": np.array(1, np.float32),
        "half": np.array(0.5, np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["h"]),
        helper.make_node("Div", ["h", "root"], ["d"]),
        helper.make_node("Erf", ["d"], ["e"]),
        helper.make_node("Add", ["e", "one"], ["f"]),
        helper.make_node("Mul", ["h", "f"], ["g"]),
        helper.make_node("Mul", ["g", "half"], ["gelu"]),
        helper.make_node("Add", ["gelu", "x"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "gain", "b"], ["y"]),
    ]
    return model_of(nodes, constants, ["batch", "sequence", WIDTH])


def model_of(
    nodes: list[onnx.NodeProto],
    constants: dict[str, Array],
    shape: list[int | str],
    given: list[int | str] | None = None,
) -> onnx.ModelProto:
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, given or shape)],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
        ir_version=8,
    )


def run(model: onnx.ModelProto, x: Array, level: ort.GraphOptimizationLevel) -> Array:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"x": x})[0])


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("level", ["basic", "all"])
@pytest.mark.parametrize("disabled", [passes for _, passes in DISABLEABLE])
def test_the_optimised_model_answers_as_onnxruntime_does(
    level: Literal["basic", "all"], disabled: tuple[str, ...]
) -> None:
    model = encoder_block()
    x = np.random.default_rng(1).standard_normal((2, 3, WIDTH)).astype(np.float32)
    wanted = run(model, x, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    optimised = optimise(model, level=level, disabled=disabled)
    got = run(optimised, x, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", ["basic", "all"])
def test_inputs_and_outputs_keep_their_names_and_shapes(level: Literal["basic", "all"]) -> None:
    model = encoder_block()
    optimised = optimise(model, level=level)
    assert list(optimised.graph.input) == list(model.graph.input)
    assert list(optimised.graph.output) == list(model.graph.output)


def test_basic_keeps_to_standard_operators_and_all_fuses_them() -> None:
    basic = optimise(encoder_block(), level="basic")
    assert {node.domain for node in basic.graph.node} <= {"", "ai.onnx"}
    assert operators(optimise(basic, level="all"))["BiasGelu"] == 1


def test_a_disabled_pass_is_left_out() -> None:
    passes = dict(DISABLEABLE)
    fused = operators(optimise(encoder_block(), level="all", disabled=passes["default"]))
    plain = operators(optimise(encoder_block(), level="all", disabled=passes["unfused"]))
    for kind in ("SkipLayerNormalization", "BiasGelu"):
        assert (fused[kind], plain[kind]) == (1, 0)


@pytest.mark.parametrize(
    ("model", "built"), [(encoder_block(), ["default", "unfused", "gelu"]), (linear(), ["default"])]
)
def test_a_form_is_built_once_for_all_sets_of_passes_that_make_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: onnx.ModelProto, built: list[str]
) -> None:
    more = ("gelu", ("BiasGeluFusion",)), ("unknown", ("NoSuchFusion",))
    monkeypatch.setattr(fusion, "DISABLEABLE", (*DISABLEABLE, *more))
    (shared := SharedWeights(tmp_path)).write(model, tmp_path / "source.onnx")
    material = Material(model, shared, tmp_path, None, 1)
    found = OnnxRuntimeForms(find_engine("onnxruntime")).build(material, lambda *_: None)
    assert [dict(fusion.DISABLEABLE)[name] for name in built] == [one.passes_off for one in found]


@pytest.mark.parametrize("convolved", [False, True])
def test_a_pooling_runs_in_int8_only_where_what_it_reads_does(convolved: bool) -> None:
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("MaxPool", ["c"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Reshape", ["p", "flat"], ["f"]),
        helper.make_node("QuantizeLinear", ["f", "step", "zero"], ["integers"]),
        helper.make_node(
            "MatMulIntegerToFloat",
            ["integers", "weight", "step", "step", "zero"],
            ["y"],
            domain="com.microsoft",
        ),
    ]
    if convolved:  # as the quantiser writes it
        nodes[0].input[0] = "rounded"
        nodes.insert(0, helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"]))
        nodes.insert(1, helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["rounded"]))
    constants: dict[str, Array] = {
        "kernel": random.standard_normal((16, 3, 3, 3)).astype(np.float32),
        "step": np.array(0.1, np.float32),
        "zero": np.array(128, np.uint8),
        "weight": random.integers(-9, 9, (64, 4)).astype(np.int8),
        "flat": np.array([-1, 64], np.int64),
    }
    graph = model_of(nodes, constants, ["batch", 3, 4, 4], ["batch", 4])
    made = {name: node for node in optimise(graph, level="all").graph.node for name in node.output}
    pooling = next(node for node in made.values() if "MaxPool" in node.op_type)
    rounded = made[pooling.input[0]].op_type == "QuantizeLinear"
    assert rounded == convolved
    x = random.standard_normal((2, 3, 4, 4)).astype(np.float32)
    right = run(graph, x, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    found = run(optimise(graph, level="all"), x, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    np.testing.assert_allclose(found, right, atol=0.2)


def test_behind_a_convolution_of_float32_a_pooling_is_not_rounded_before_int8() -> None:
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("MaxPool", ["c"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("QuantizeLinear", ["p", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["second", "own"], ["weight"]),
        helper.make_node("Conv", ["rounded", "weight"], ["d"], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["d", "step", "zero"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "step", "zero"], ["y"]),
    ]
    constants: dict[str, Array] = {
        "first": random.standard_normal((16, 3, 3, 3)).astype(np.float32) / 5,
        "second": random.integers(-9, 9, (16, 16, 3, 3)).astype(np.int8),
        "step": np.array(0.1, np.float32),
        "own": np.array(0.01, np.float32),
        "zero": np.array(128, np.uint8),
    }
    graph = model_of(nodes, constants, ["batch", 3, 8, 8], ["batch", 16, 4, 4])
    ready = optimise(graph, level="all")
    made = {name: node for node in ready.graph.node for name in node.output}
    assert any(node.op_type == "QLinearConv" for node in made.values())
    pooling = next(node for node in made.values() if "MaxPool" in node.op_type)
    assert made[pooling.input[0]].op_type == "Conv"
    x = random.standard_normal((2, 3, 8, 8)).astype(np.float32)
    right = run(graph, x, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    found = run(ready, x, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    np.testing.assert_allclose(found, right, atol=0.2)


def test_the_model_given_is_not_modified() -> None:
    model = encoder_block()
    before = model.SerializeToString(deterministic=True)
    optimise(model, level="all")
    assert model.SerializeToString(deterministic=True) == before


def test_nothing_is_logged_about_this_cpu(capfd: pytest.CaptureFixture[str]) -> None:
    optimise(encoder_block(), level="all")
    assert capfd.readouterr() == ("", "")


def test_an_operator_that_onnxruntime_does_not_have_is_unsupported() -> None:
    unknown = model_of([helper.make_node("NoSuch", ["x"], ["y"])], {}, [2])
    with pytest.raises(UnsupportedOperator, match="NoSuch"):
        optimise(unknown, level="basic")
    without_kernel = model_of([helper.make_node("Relu", ["x"], ["y"])], {}, [2])
    for value in (without_kernel.graph.input[0], without_kernel.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.INT16
    with pytest.raises(UnsupportedOperator, match="Relu"):
        optimise(without_kernel, level="basic")


def test_a_model_that_onnxruntime_rejects_is_a_compile_error() -> None:
    model = model_of([helper.make_node("Add", ["x", "missing"], ["y"])], {}, [2])
    with pytest.raises(CompileError, match="cannot optimise the model"):
        optimise(model, level="basic")
