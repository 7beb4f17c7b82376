"""OpenVINO as a second engine: its forms, what it refuses, and an artifact that it serves."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import lrai_core as lrai
from lrai_core.artifact import LatencyPoint
from lrai_core.compiler import search
from lrai_core.compiler.model import SharedWeights
from lrai_core.compiler.search import Candidate, Material, Sample
from lrai_core.engine.engine import Session, find_engine, installed_version, isa_class
from lrai_core.errors import ArtifactError, CompileError, EngineError, EnvironmentProblem
from lrai_core.protocol import Array, TensorSpec
from lrai_engines.forms import OnnxRuntimeForms
from lrai_engines.openvino import OpenVino
from lrai_engines.openvino_forms import OpenVinoForms, _bounds
from lrai_engines.sensitivity import harms
from lrai_engines.smooth import smoothings
from lrai_engines.static_harms import harms as static_harms
from lrai_report.page import page
from lrai_report.times import times
from tests.core.compiler.onnx_files import linear, model, save, value
from tests.core.small_artifact import rewrite
from tests.engines.test_sensitivity import sample as layered_sample
from tests.engines.test_sensitivity import three_layers
from tests.engines.test_smooth import sample_of, two_layers, uneven
from tests.engines.test_static import attending, bounding, images, network
from tests.engines.test_static import sample as images_sample

OURS = OpenVino()
FORMS = OpenVinoForms(OURS)
INT8 = "openvino-int8-128"


def material(proto: onnx.ModelProto, folder: Path) -> Material:
    """Return what forms are made of, with a sample that OpenVINO's do not look at."""
    shared, moved = SharedWeights(folder), onnx.ModelProto()
    moved.CopyFrom(proto)
    shared.write(moved, folder / "source.onnx")
    return Material(moved, shared, folder, Sample([], ()), 1)


def forms(proto: onnx.ModelProto, folder: Path) -> dict[str, Path]:
    """Return the file of every form that is made, and be told of no fault of the model."""
    refused: list[str] = []
    made = FORMS.build(material(proto, folder), lambda form, why: refused.append(f"{form}: {why}"))
    found = {built.form: built.graph for built in made}
    known = ("this CPU has no", "nothing to quantise", "no row to see", "are needed")
    assert all(any(words in line for words in known) for line in refused), refused
    return found


def reference(proto: onnx.ModelProto, *arrays: Array) -> list[Array]:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    found: list[Array] = session.run(None, dict(zip(names, arrays, strict=True)))
    return found


def table_model() -> onnx.ModelProto:
    """Return ids [batch, length] -> rows of a table of 5, and of one of 9, by the same ids."""
    random = np.random.default_rng(0)
    tables = [numpy_helper.from_array(random.normal(size=(n, 2)).astype(np.float32), f"t{n}")
              for n in (5, 9)]  # fmt: skip
    nodes = [
        helper.make_node("Gather", ["t9", "ids"], ["wide"]),
        helper.make_node("Cast", ["ids"], ["cast"], to=TensorProto.INT32),
        helper.make_node("Gather", ["t5", "cast"], ["narrow"]),
    ]
    outputs = [value(name, ["batch", "length", 2]) for name in ("wide", "narrow")]
    return model(nodes, [value("ids", ["batch", "length"], TensorProto.INT64)], outputs, tables)


def session_of(proto: onnx.ModelProto, folder: Path, form: str = "openvino-fp32") -> Session:
    return OURS.load(forms(proto, folder)[form])


def test_fp32_gives_what_onnxruntime_gives_for_any_number_of_rows(tmp_path: Path) -> None:
    proto, random = linear(96, 32), np.random.default_rng(1)
    session = session_of(proto, tmp_path)
    for rows in (1, 3, 1, 40):
        x = random.standard_normal((rows, 96)).astype(np.float32)
        (found,) = session.run([x])
        np.testing.assert_allclose(found, reference(proto, x)[0], atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("ends", ["scores", "chances"])
@pytest.mark.parametrize("extents", [(5, 16, 3), (13, 32, 4), (32, 16, 2), (100, 50, 5)])
def test_int8_of_small_layers_gives_one_row_what_it_gives_many(
    tmp_path: Path, extents: tuple[int, int, int], ends: str, seed: int
) -> None:
    """Two of them in one operator of OpenVINO's gave rubbish (2026.4.1, with VNNI)."""
    random, (width, inner, classes) = np.random.default_rng(seed), extents
    sizes = {"v": (width, inner), "a": (inner,), "w": (inner, classes), "b": (classes,)}
    weights = [
        numpy_helper.from_array(
            (random.standard_normal(size) / size[0] ** (len(size) / 2 - 0.5)).astype(np.float32), n
        )
        for n, size in sizes.items()
    ]
    nodes = [
        helper.make_node("Gemm", ["x", "v", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w", "b"], ["z"]),
        helper.make_node("Softmax" if ends == "chances" else "Identity", ["z"], ["y"]),
    ]
    proto = model(nodes, [value("x", ["batch", width])], [value("y", ["batch", classes])], weights)
    rows = random.standard_normal((40, 1, width)).astype(np.float32)
    sides = [
        TensorSpec(name=name, datatype="FP32", shape=("batch", extent), batch_axis=0)
        for name, extent in (("y", classes), ("x", width))
    ]
    sample = Sample([[row] for row in rows], sides[:1], sides[1:])
    asked, tried = replace(material(proto, tmp_path), sample=sample), 0
    for built in FORMS.build(asked, lambda *_: None):
        if built.precision == "int8":
            session, tried = OURS.load(built.graph), tried + 1
            (together,) = session.run([np.concatenate(rows)])
            alone = np.concatenate([session.run([row])[0] for row in rows])
            np.testing.assert_allclose(alone, together, atol=0.05, err_msg=built.form)
    assert tried > 2


def test_int8_is_close_smaller_and_says_what_it_did(tmp_path: Path) -> None:
    proto = linear(256, 512)
    built = {b.form: b for b in FORMS.build(material(proto, tmp_path), lambda *_: None)}
    size = {form: sum(f.stat().st_size for f in b.graph.parent.iterdir())
            for form, b in built.items()}  # fmt: skip
    assert size[INT8] < 0.4 * size["openvino-fp32"]
    (operator,) = built[INT8].operators
    assert (operator.bits, operator.scheme, operator.weight_elements) == (
        8,
        "weights_int8",
        1 << 17,
    )
    x = np.random.default_rng(2).standard_normal((24, 256)).astype(np.float32)
    (found,), (right,) = OURS.load(built[INT8].graph).run([x]), reference(proto, x)
    error = np.linalg.norm(found - right) / np.linalg.norm(right)
    assert 0 < error < 0.02


def test_static_int8_is_made_of_convolutions_and_keeps_what_is_no_number(tmp_path: Path) -> None:
    made, proto = material(network(), tmp_path), network()
    made = replace(made, sample=images_sample())
    built = {b.form: b for b in FORMS.build(made, lambda *_: None)}
    assert {"openvino-int8-static", "openvino-int8-static-50"} <= built.keys()
    x = images(5, 2)
    right = reference(proto, x)[0]
    far = {}
    for form in ("openvino-int8-static", "openvino-int8-static-50"):
        session = OURS.load(built[form].graph)
        (found,) = session.run([x])
        far[form] = np.linalg.norm(found - right) / np.linalg.norm(right)
        odd = x.copy()
        odd[1, 0, 3, 4] = np.nan
        (own,) = session.run([odd])
        assert np.isnan(own[1]).all()
        assert np.array_equal(own[::2], found[::2])
    assert 0 < far["openvino-int8-static-50"] < far["openvino-int8-static"] < 0.1


def test_infinity_that_a_model_bounds_has_an_answer_in_every_form(tmp_path: Path) -> None:
    proto, x = bounding("Clip"), np.random.default_rng(1).standard_normal((60, 16))
    x = (3 * x).astype(np.float32)
    spec = TensorSpec(name="y", datatype="FP32", shape=("batch", 4), batch_axis=0)
    sample = Sample([[row[None]] for row in x], (spec,))
    given = replace(material(proto, tmp_path), sample=sample)
    rows = x[:5].copy()
    rows[1, 3], rows[2, 4], rows[3], rows[4, 2] = np.inf, -np.inf, np.inf, np.nan
    right, seen = reference(proto, rows)[0], set[str]()
    for built in FORMS.build(given, lambda *_: None):
        if built.form.startswith("openvino-int8"):
            (found,) = OURS.load(built.graph).run([rows])
            assert np.linalg.norm(found[:4] - right[:4]) < 0.15 * np.linalg.norm(right[:4])
            assert np.isnan(found[4]).all()
            seen.add(built.form)
    assert {"openvino-int8-static", "openvino-int8-smooth", INT8} <= seen


def test_beside_attention_convolutions_are_static_int8_and_matrices_smoothed(
    tmp_path: Path,
) -> None:
    given = replace(material(attending(), tmp_path), sample=images_sample())
    built = {b.form: b for b in FORMS.build(given, lambda *_: None)}
    x = images(5, 2)
    right = reference(attending(), x)[0]
    for form, int8 in (("openvino-int8-static", 2), ("openvino-int8-smooth-static", 5)):
        assert sum(line.bits == 8 for line in built[form].operators) == int8
        session = OURS.load(built[form].graph)
        (found,) = session.run([x])
        assert 0 < np.linalg.norm(found - right) / np.linalg.norm(right) < 0.05
        odd = x.copy()
        odd[1, 0, 3, 4] = np.nan
        (own,) = session.run([odd])
        assert np.isnan(own[1]).all()
        assert np.isfinite(own[::2]).all()


def test_smoothed_int8_is_close_and_keeps_what_is_no_number(tmp_path: Path) -> None:
    proto = two_layers()
    given = replace(material(proto, tmp_path), sample=sample_of(uneven(64, 1)))
    built = {b.form: b for b in FORMS.build(given, lambda *_: None)}
    x = uneven(5, 2)
    right, found = reference(proto, x)[0], {}
    for form in ("openvino-int8-smooth", INT8):
        session = OURS.load(built[form].graph)
        (found[form],) = session.run([x])
        odd = x.copy()
        odd[1, 3] = np.nan
        (own,) = session.run([odd])
        assert np.isnan(own[1]).all()
        assert np.array_equal(own[::2], found[form][::2])
    smooth, groups = (
        float(np.linalg.norm(y - right) / np.linalg.norm(right)) for y in found.values()
    )
    assert 0 < smooth < min(0.03, groups)


@pytest.mark.parametrize("kind", ["smooth", "static"])
def test_what_one_engine_finds_of_a_model_serves_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Its forms that keep the same closer are no repetition of the other's."""
    made = {"smooth": (three_layers(), layered_sample(16)), "static": (network(), images_sample())}
    proto, sample = made[kind]
    calls = Counter[str]()

    def counted(name: str, function: Any) -> Any:
        def call(*given: Any) -> Any:
            calls[name] += 1
            return function(*given)

        return call

    monkeypatch.setattr("lrai_engines.smooth.harms", counted("smooth harms", harms))
    monkeypatch.setattr("lrai_engines.smooth.smoothings", counted("smoothings", smoothings))
    monkeypatch.setattr("lrai_engines.static.harms", counted("static harms", static_harms))
    (tmp_path / "source").mkdir()
    given = material(proto, tmp_path / "source")
    given = replace(given, sample=sample, folder=tmp_path / "forms")
    both = (OnnxRuntimeForms(find_engine("onnxruntime")), FORMS)
    found = {one.form for builder in both for one in builder.build(given, lambda *_: None)}
    share = {"smooth": 30, "static": 25}[kind]
    assert {f"int8-{kind}-{share}", f"openvino-int8-{kind}-50"} <= found
    assert calls[f"{kind} harms"]
    assert calls.pop("smooth harms") == 2, "with static scales, and with those per row"
    assert set(calls.values()) == {1}


def test_an_answer_stays_what_it_is_when_the_next_call_runs(tmp_path: Path) -> None:
    session = session_of(linear(), tmp_path)
    first = session.run([np.ones((2, 8), np.float32)])[0]
    before = first.copy()
    session.run([np.zeros((2, 8), np.float32)])
    np.testing.assert_array_equal(first, before)


def test_outputs_come_in_the_order_asked_for(tmp_path: Path) -> None:
    session, ids = session_of(table_model(), tmp_path), np.array([[0, 4]])
    wide, narrow = reference(table_model(), ids)
    for wanted, right in ((None, [wide, narrow]), ([1, 0], [narrow, wide]), ([1], [narrow])):
        for found, expected in zip(session.run([ids], wanted), right, strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("index", [-6, 5, 1 << 40])
def test_an_index_beyond_the_smallest_table_is_refused_as_onnxruntime_does(
    tmp_path: Path, index: int
) -> None:
    session = session_of(table_model(), tmp_path)
    with pytest.raises(EngineError, match=r"an index of input 0 is outside \[-5, 4\]") as caught:
        session.run([np.array([[0, index]])])
    assert caught.value.invalid
    assert len(session.run([np.array([[-5, 4]])])) == 2
    assert session.run([np.zeros((0, 3), np.int64)])[0].shape == (0, 3, 2)


def computed(kind: str) -> onnx.ModelProto:
    """Return a model that reads a table by what is computed of its ids."""
    table = numpy_helper.from_array(np.ones((5, 2), np.float32), "t")
    one, shape = (numpy_helper.from_array(np.array(v), n) for v, n in ((1, "one"), ([1], "last")))
    ids, y = value("ids", ["batch", "length"], TensorProto.INT64), value("y", ["any"])
    gather = helper.make_node("Gather", ["t", "at"], ["y"])
    nodes = {
        "sum": [helper.make_node("Add", ["ids", "one"], ["at"]), gather],
        "GatherND": [
            helper.make_node("Unsqueeze", ["ids", "last"], ["at"]),
            helper.make_node("GatherND", ["t", "at"], ["y"]),
        ],
        "positions": [
            helper.make_node("Size", ["ids"], ["count"]),
            helper.make_node("Sub", ["one", "one"], ["none"]),
            helper.make_node("Range", ["none", "count", "one"], ["at"]),
            gather,
        ],
        "extent": [
            helper.make_node("Shape", ["ids"], ["shape"]),
            helper.make_node("Gather", ["shape", "one"], ["y0"]),
            helper.make_node("Cast", ["y0"], ["y"], to=TensorProto.FLOAT),
        ],
        "reshaped": [helper.make_node("Reshape", ["ids", "last"], ["at"]), gather],
        "counted": [
            helper.make_node("Size", ["ids"], ["count"]),
            helper.make_node("Sub", ["count", "one"], ["at"]),
            gather,
        ],
        "embedded": [
            helper.make_node(
                "EmbedLayerNormalization", ["ids", "", "t"], ["y"], domain="com.microsoft"
            )
        ],
    }
    tables = [table, one, shape]
    return model(nodes[kind], [ids], [y], tables)


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        ("sum", True),
        ("GatherND", True),
        ("positions", True),
        ("counted", True),
        ("embedded", True),
        ("extent", False),
        ("reshaped", False),
    ],
)
def test_an_index_that_nobody_could_check_is_refused(kind: str, refused: bool) -> None:
    if refused:
        with pytest.raises(CompileError, match="by an index that the engine does not check"):
            _bounds(computed(kind))
        return
    wide = -(1 << 31), (1 << 31) - 1
    assert _bounds(computed(kind)) == {"ids": (-5, 4) if kind == "reshaped" else wide}


def test_an_index_in_a_body_of_a_body_is_refused() -> None:
    def body(nodes: Sequence[onnx.NodeProto]) -> onnx.GraphProto:
        return helper.make_graph(nodes, "body", [], [value("z", [])])

    def chosen(inner: onnx.GraphProto) -> onnx.NodeProto:
        return helper.make_node("If", ["yes"], ["z"], then_branch=inner, else_branch=inner)

    gather = helper.make_node("Gather", ["t", "ids"], ["z"])
    proto = computed("reshaped")
    proto.graph.node.append(chosen(body([chosen(body([gather]))])))
    with pytest.raises(CompileError, match="an index inside of If"):
        _bounds(proto)


@pytest.mark.parametrize("kind", ["cast", "reshaped"])
def test_an_index_is_checked_where_the_engine_leaves_out_what_is_between(
    tmp_path: Path, kind: str
) -> None:
    """What it leaves out lends the input its name, which may come first in the alphabet."""
    table = numpy_helper.from_array(np.arange(10, dtype=np.float32).reshape(5, 2), "t")
    shape = numpy_helper.from_array(np.array([-1, 3]), "shape")
    between = {
        "cast": helper.make_node("Cast", ["ids"], ["/at"], to=TensorProto.INT64),
        "reshaped": helper.make_node("Reshape", ["ids", "shape"], ["/at"]),
    }
    nodes = [between[kind], helper.make_node("Gather", ["t", "/at"], ["y"])]
    datatype = {"cast": TensorProto.INT32, "reshaped": TensorProto.INT64}[kind]
    ends = [value("ids", ["batch", 3], datatype)], [value("y", ["batch", 3, 2])]
    session = session_of(model(nodes, *ends, [table, shape]), tmp_path)
    ids = np.array([[0, 4, -5]], np.int32 if kind == "cast" else np.int64)
    np.testing.assert_array_equal(session.run([ids])[0][0, :, 0], [0, 8, 0])
    for wrong in (5, -6):
        ids[0, 1] = wrong
        with pytest.raises(EngineError, match=r"an index of input 0 is outside \[-5, 4\]"):
            session.run([ids])


@pytest.mark.parametrize("value_of", [1 << 31, -(1 << 31) - 1])
def test_integers_beyond_what_the_engine_counts_in_are_refused(
    tmp_path: Path, value_of: int
) -> None:
    nodes = [helper.make_node("Cast", ["n"], ["y"], to=TensorProto.FLOAT)]
    ends = [value("n", ["batch", 2], TensorProto.INT64)], [value("y", ["batch", 2])]
    session = session_of(model(nodes, *ends, []), tmp_path)
    largest = np.array([[(1 << 31) - 1, -(1 << 31)]])
    np.testing.assert_allclose(session.run([largest])[0], largest.astype(np.float32))
    with pytest.raises(EngineError, match="input 0 is outside") as caught:
        session.run([np.array([[0, value_of]])])
    assert caught.value.invalid


def refusals(proto: onnx.ModelProto, folder: Path) -> dict[str, str]:
    """Return why forms are not made, which is no fault of this CPU's or of a lack of rows."""
    refused: dict[str, str] = {}
    made = [built.form for built in FORMS.build(material(proto, folder), refused.__setitem__)]
    assert made or "openvino" in refused
    return refused if not made else {}


@pytest.mark.parametrize(
    "kind", ["Add", "CumSum", "Div", "Mod", "Mul", "Neg", "Pow", "ReduceProd", "ReduceSum", "Sub"]
)
@pytest.mark.parametrize("after", ["Identity", "Unsqueeze", "Cast"])
@pytest.mark.parametrize("datatype", [TensorProto.INT64, TensorProto.INT32], ids=str)
def test_integers_that_are_computed_with_are_left_to_onnxruntime(
    tmp_path: Path, kind: str, after: str, datatype: int
) -> None:
    """Such as the hour of a time in seconds, for which float32 has not enough bits."""
    floats, binary = after == "Cast", ("Add", "Div", "Mod", "Mul", "Pow", "Sub")
    dtype = np.float32 if floats else helper.tensor_dtype_to_np_dtype(datatype)
    other: dict[str, Array] = {"CumSum": np.array(1), "ReduceSum": np.array([1])}
    other |= {name: np.array(24, dtype) for name in binary}
    arrays = {"last": np.array([2]), "w": np.ones((1, 1), np.float32)}
    given = {"Unsqueeze": ["last"]}.get(after, [])
    first = helper.make_node(after, ["time", *given], ["t"])
    if floats:
        first.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
    second = helper.make_node(kind, ["t", *["other"] * (kind in other)], ["hours"])
    if kind == "Mod":
        second.attribute.append(helper.make_attribute("fmod", 1))
    if kind in other:
        arrays["other"] = other[kind]
    nodes = [
        first,
        second,
        helper.make_node("Cast", ["hours"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["number", "w"], ["y"]),
    ]
    ends = [value("time", ["batch", 1], datatype)], [value("y", ["any"])]
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    why = {"openvino": f"{kind} of integers, which the engine does in 32 bits"}
    assert refusals(model(nodes, *ends, weights), tmp_path) == ({} if floats else why)


@pytest.mark.parametrize("to", ["INT64", "UINT32", "INT8", "UINT8", "INT32", "FLOAT16"])
def test_numbers_that_become_integers_that_are_cut_otherwise_are_left_to_onnxruntime(
    tmp_path: Path, to: str
) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["whole"], to=getattr(TensorProto, to)),
        helper.make_node("Cast", ["whole"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["number", "w"], ["y"]),
    ]
    weights = [numpy_helper.from_array(np.ones((1, 1), np.float32), "w")]
    proto = model(nodes, [value("x", ["batch", 1])], [value("y", ["batch", 1])], weights)
    why = {"openvino": "Cast of numbers to integers that the engine cuts otherwise"}
    assert refusals(proto, tmp_path) == ({} if to in ("INT32", "FLOAT16") else why)


def test_an_integer_that_the_engine_does_not_have_is_none_of_its_answers(tmp_path: Path) -> None:
    large = numpy_helper.from_array(np.array(-(1 << 40)), "large")
    ends = [value("n", ["batch", 1], TensorProto.INT64)], [value("y", ["any"], TensorProto.INT64)]
    nodes = [helper.make_node("Max", ["n", "large"], ["y"])]
    why = {"openvino": "Max of an integer that has more than 32 bits"}
    assert refusals(model(nodes, *ends, [large]), tmp_path) == why


@pytest.mark.parametrize("datatype", [TensorProto.INT64, TensorProto.INT32], ids=str)
@pytest.mark.parametrize("kind", ["Equal", "Less", "ReduceMax", "Cast", "Identity"])
def test_integers_are_compared_as_far_as_float32_has_them(
    tmp_path: Path, kind: str, datatype: int
) -> None:
    end = (1 << 24) - 1
    more: dict[str, dict[str, Any]] = {
        "Cast": {"to": TensorProto.BOOL},
        "ReduceMax": {"keepdims": 0, "axes": [1]},
    }
    given = ["n", "end"] if kind in ("Equal", "Less") else ["n"]
    nodes = [
        helper.make_node(kind, given, ["found"], **more.get(kind, {})),
        helper.make_node("Cast", ["found"], ["y"], to=TensorProto.FLOAT),
    ]
    dtype = helper.tensor_dtype_to_np_dtype(datatype)
    ends = [value("n", ["batch", 2], datatype)], [value("y", ["any"])]
    proto = model(nodes, *ends, [numpy_helper.from_array(np.array(end, dtype), "end")])
    session = session_of(proto, tmp_path)
    rows = np.array([[end, end + 1], [-end, end - 1], [0, -end - 1]], dtype)
    np.testing.assert_array_equal(session.run([rows])[0], reference(proto, rows)[0])
    rows[0, 0] = end + 2
    if kind == "Identity":
        assert session.run([rows])
    else:
        with pytest.raises(EngineError, match="input 0 is outside"):
            session.run([rows])


@pytest.mark.parametrize(
    ("extent", "places", "refused"),
    [
        ("length", 5, True),
        ("length", -2, True),
        ("length", [0, 1], True),
        ("length", 0, False),
        ("length", -1, False),
        ("length", [0, -1], False),
        (6, 5, False),
        (6, -6, False),
        (6, [2, 4], False),
    ],
)
def test_a_place_that_may_not_be_there_is_left_to_onnxruntime(
    tmp_path: Path, extent: int | str, places: int | list[int], refused: bool
) -> None:
    """The engine reads zeros there, where onnxruntime refuses the request."""
    index = numpy_helper.from_array(np.array(places), "place")
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        helper.make_node("Gather", ["h", "place"], ["y"], axis=1),
    ]
    proto = model(nodes, [value("x", ["batch", extent])], [value("y", ["any"])], [index])
    why = {"openvino": "Gather of a place that what is sent may not have"} if refused else {}
    assert refusals(proto, tmp_path) == why


def test_a_transformer_answers_as_before(tmp_path: Path) -> None:
    """Its mask is made floats before it is computed with, and it computes with its own shapes."""
    random, free = np.random.default_rng(0), ["batch", "length"]
    arrays: dict[str, Array] = {
        name: random.standard_normal(shape).astype(np.float32)
        for name, shape in (("table", (50, 8)), ("each", (8, 24)), ("places", (1, 16, 8)))
    }
    arrays |= {"one": np.ones((), np.float32), "far": np.array(-1e4, np.float32)}
    arrays |= {name: np.array([n]) for n, name in enumerate(("first", "second", "third"))}
    arrays |= {"4": np.array([4]), "3": np.array([3]), "0": np.array(0), "1": np.array(1)}
    arrays |= {"2": np.array(2), "mid": np.array([1, 2]), "8": np.array([8])}
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["words"]),
        helper.make_node("Shape", ["ids"], ["shape"]),
        helper.make_node("Slice", ["shape", "second", "third"], ["length"]),
        helper.make_node("Slice", ["places", "first", "length", "second"], ["positions"]),
        helper.make_node("Add", ["words", "positions"], ["x"]),
        helper.make_node("Slice", ["shape", "first", "second"], ["rows"]),
        helper.make_node("Mul", ["length", "second"], ["same"]),
        helper.make_node("Concat", ["rows", "same", "3", "third", "4"], ["heads"], axis=0),
        helper.make_node("MatMul", ["x", "each"], ["joint"]),
        helper.make_node("Reshape", ["joint", "heads"], ["split"]),
        helper.make_node("Transpose", ["split"], ["qkv"], perm=[2, 0, 3, 1, 4]),
        *(helper.make_node("Gather", ["qkv", n], [f"of{n}"], axis=0) for n in "012"),
        helper.make_node("Transpose", ["of1"], ["keys"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["of0", "keys"], ["scores"]),
        helper.make_node("Unsqueeze", ["mask", "mid"], ["wide"]),
        helper.make_node("Cast", ["wide"], ["seen"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["one", "seen"], ["hidden"]),
        helper.make_node("Mul", ["hidden", "far"], ["bias"]),
        helper.make_node("Add", ["scores", "bias"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "of2"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["back"], perm=[0, 2, 1, 3]),
        helper.make_node("Concat", ["rows", "length", "8"], ["flat"], axis=0),
        helper.make_node("Reshape", ["back", "flat"], ["out"]),
        helper.make_node("Gather", ["out", "0"], ["y"], axis=1),
    ]
    inputs = [value(name, free, TensorProto.INT64) for name in ("ids", "mask")]
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    proto = model(nodes, inputs, [value("y", ["batch", 8])], weights)
    built = {b.form: b.graph for b in FORMS.build(material(proto, tmp_path), lambda *_: None)}
    session = OURS.load(built["openvino-fp32"])
    for rows, length in ((1, 3), (4, 9)):
        ids = random.integers(0, 50, (rows, length))
        mask = np.ones((rows, length), np.int64)
        mask[:, 2:] = random.integers(0, 2, (rows, length - 2))
        (found,) = session.run([ids, mask])
        np.testing.assert_allclose(found, reference(proto, ids, mask)[0], atol=1e-4)


@pytest.mark.parametrize(
    ("declared", "most", "requests"),
    [
        (["batch", 3, 4], 64 << 20, 2),
        (["batch", "length", 4], 64 << 20, 1),
        (["batch", 3, 4], 0, 1),
    ],
    ids=["known", "free", "large"],
)
def test_calls_of_one_row_have_a_model_of_their_own_where_all_rows_are_alike(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    declared: list[str | int],
    most: int,
    requests: int,
) -> None:
    monkeypatch.setattr("lrai_engines.openvino._MOST_TWICE", most)
    weight = numpy_helper.from_array(np.arange(8, dtype=np.float32).reshape(4, 2), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Relu", ["p"], ["y"])]
    ends = [value("x", declared)], [value("y", [*declared[:2], 2]), value("p", [*declared[:2], 2])]
    spec = TensorSpec(name="x", datatype="FP32", shape=tuple(declared), batch_axis=0)
    made_of = material(model(nodes, *ends, [weight]), tmp_path)
    made_of = replace(made_of, sample=Sample([], (), (spec,)))
    session = OURS.load(next(FORMS.build(made_of, lambda *_: None)).graph)
    assert 1 + len(session._fixed) == requests
    x = np.random.default_rng(0).standard_normal((5, 3, 4)).astype(np.float32)
    right = x @ numpy_helper.to_array(weight)
    for count in (1, 5, 1, 2):
        y, p = session.run([x[:count]])
        np.testing.assert_allclose(p, right[:count], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(y, np.maximum(right[:count], 0), rtol=1e-5, atol=1e-6)
        assert np.array_equal(session.run([x[:count]], [1])[0], p)
    with pytest.raises(EngineError):
        session.run([x[:1, :, :3]])


def in_calls(proto: onnx.ModelProto, folder: Path, *more: str) -> tuple[Session, list[str]]:
    """Return a session on its fp32, compiled for calls of 1x4 and 3x8, and what was refused."""
    spec = TensorSpec(
        name="ids", datatype="INT64", shape=("n", "l", *more), batch_axis=0, length_axis=1
    )
    sample, refused = Sample([], (), (spec,), ((1, 4), (3, 8))), list[str]()
    made_of = replace(material(proto, folder), sample=sample)
    built = FORMS.build(made_of, lambda form, why: refused.append(f"{form}: {why}"))
    return OURS.load(next(iter(built)).graph), refused


def test_calls_that_come_most_have_a_model_of_their_own_which_answers_the_same(
    tmp_path: Path,
) -> None:
    session, refused = in_calls(table_model(), tmp_path)
    assert not refused
    assert session._fixed == {((1, 4),): None, ((3, 8),): None}  # type: ignore[attr-defined]
    (tmp_path / "free").mkdir()
    free, _ = in_calls(table_model(), tmp_path / "free")
    free._fixed = {}  # type: ignore[attr-defined]
    for rows, length in ((3, 8), (1, 4), (2, 4), (3, 8), (1, 8), (1, 4)):
        ids = np.random.default_rng(0).integers(0, 5, (rows, length))
        for a, b in zip(session.run([ids]), free.run([ids]), strict=True):
            assert a.tolist() == b.tolist()
    assert len({id(session._request), *map(id, session._fixed.values())}) == 3  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="an index of input 0 is outside"):
        session.run([np.full((1, 4), 5)])


def test_where_memory_lacks_for_a_model_of_its_own_a_call_has_the_one_of_all(
    tmp_path: Path,
) -> None:
    session, _ = in_calls(table_model(), tmp_path)
    session._compiled_for = raising(RuntimeError("std::bad_alloc"))  # type: ignore[attr-defined]
    ids = np.zeros((1, 4), np.int64)
    assert session.run([ids])[0].shape == session.run([ids])[0].shape == (1, 4, 2)
    assert session._fixed[((1, 4),)] is session._request  # type: ignore[attr-defined]


def test_calls_that_do_not_tell_all_dimensions_have_no_model_of_their_own(tmp_path: Path) -> None:
    session, refused = in_calls(table_model(), tmp_path, "more")
    assert refused == ["calls: openvino is compiled for none: an input has one more free dimension"]
    assert session._fixed == {}  # type: ignore[attr-defined]


def test_a_lack_of_memory_is_no_fault_of_the_inputs(tmp_path: Path) -> None:
    session = session_of(table_model(), tmp_path)
    lacking = SimpleNamespace(infer=raising(RuntimeError("Exception: std::bad_alloc")))
    session._request = lacking  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="bad_alloc") as caught:
        session.run([np.zeros((1, 2), np.int64)])
    assert not caught.value.invalid


def raising(error: Exception) -> Callable[[object], None]:
    def run(_: object) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ([], "0 inputs given, 1 needed"),
        ([np.zeros((2, 9), np.float32)], "dimension=9 .* doesn't match .*=8"),
        ([np.zeros((2, 8, 1), np.float32)], "float32 of rank 3, float32 of rank 2 is needed"),
        ([np.zeros(8, np.float32)], "float32 of rank 1, float32 of rank 2 is needed"),
        ([np.zeros((2, 8), np.float64)], "input 0 is float64 of rank 2, float32 of rank 2"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_and_the_next_are_answered(
    tmp_path: Path, arrays: Sequence[Array], said: str
) -> None:
    session = session_of(linear(), tmp_path)
    with pytest.raises(EngineError, match=said) as caught:
        session.run(arrays)
    assert str(tmp_path) not in str(caught.value)
    assert session.run([np.zeros((2, 8), np.float32)])[0].shape == (2, 4)


def test_a_shape_that_fits_what_is_declared_but_not_the_weights_is_refused(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "features"
    session = session_of(proto, tmp_path)
    with pytest.raises(EngineError, match="openvino cannot run the model"):
        session.run([np.zeros((2, 9), np.float32)])
    assert session.run([np.zeros((2, 8), np.float32)])[0].shape == (2, 4)


def test_a_first_axis_that_is_no_batch_is_checked_at_every_call(tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.ones((4, 2), np.float32), "table")
    nodes = [helper.make_node("Add", ["x", "table"], ["y"])]
    session = session_of(
        model(nodes, [value("x", ["n", 2])], [value("y", ["n", 2])], [table]), tmp_path
    )
    assert session.run([np.zeros((4, 2), np.float32)])[0].tolist() == [[1, 1]] * 4
    with pytest.raises(EngineError, match="openvino cannot run the model"):
        session.run([np.zeros((5, 2), np.float32)])


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_notes(file: Path) -> None:
    file.write_text(file.read_text().replace("settings", "sittings"))


def with_a_setting_of_its_own(file: Path) -> None:
    text = file.read_text().replace("INFERENCE_PRECISION_HINT", "CACHE_DIR")
    file.write_text(text)


@pytest.mark.parametrize("spoil", [cut, without_notes, with_a_setting_of_its_own, Path.unlink])
def test_a_file_that_it_cannot_read_is_an_error_without_a_folder(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    file = forms(linear(), tmp_path)["openvino-fp32"]
    spoil(file)
    with pytest.raises(ArtifactError, match=r"openvino cannot open model\.xml: ") as caught:
        OURS.load(file)
    assert str(tmp_path) not in str(caught.value)


def test_a_model_that_it_cannot_run_is_told_of_and_costs_nothing_else(tmp_path: Path) -> None:
    node = helper.make_node("Det", ["x"], ["y"])  # which onnxruntime has
    proto = model([node], [value("x", ["batch", 2, 2])], [value("y", ["batch"])], [])
    refused: dict[str, str] = {}
    assert list(FORMS.build(material(proto, tmp_path), refused.__setitem__)) == []
    assert "Det" in refused["openvino-fp32"]


def test_a_model_that_onnxruntime_cannot_run_is_refused_once(tmp_path: Path) -> None:
    own = [helper.make_node("OfMyOwn", ["x"], ["y"], domain="mine")]
    proto = model(own, [value("x", ["batch", 2])], [value("y", ["batch", 2])], [])
    proto.opset_import.add(domain="mine", version=1)
    refused: dict[str, str] = {}
    assert list(FORMS.build(material(proto, tmp_path), refused.__setitem__)) == []
    assert "OfMyOwn" in refused["openvino"]


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lrai_engines.openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'lrai\[openvino\]'"):
        find_engine("openvino")


def compiled(folder: Path, milliseconds: dict[str, tuple[float, float]]) -> lrai.Artifact:
    """Return an artifact of `linear(256, 512)`, as if forms took so long for 1 and for 64 rows.

    A smaller matrix takes a fast machine less than the microsecond that profilers count in.
    """
    rows = np.random.default_rng(3).standard_normal((600, 256)).astype(np.float32)

    def profile(candidates: Sequence[Candidate], *_: object) -> None:
        for one in candidates:
            times = milliseconds.get(one.form, (4.0, 256.0))
            one.latency = [
                LatencyPoint(rows=count, length=0, median_ms=ms, spread_ms=0.0)
                for count, ms in zip((1, 64), times, strict=True)
            ]
            one.speedup = math.sqrt(4.0 * 256.0 / math.prod(times))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "profile", profile)
        return lrai.compile(
            save(linear(256, 512), folder / "m.onnx"),
            out=folder / "m.lrai",
            evaluation={"x": rows},
            engines=["openvino"],
            output_map="l2_normalised",
            keep=3,
            threads=1,
        )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> lrai.Artifact:
    """An artifact whose chosen form is OpenVINO's int8, faster than int8 by row at any size."""
    return compiled(
        tmp_path_factory.mktemp("served"), {INT8: (1.0, 64.0), "int8-row": (2.0, 128.0)}
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> lrai.Artifact:
    """An artifact that serves in int8 by row, and calls of many rows in OpenVINO's int8."""
    return compiled(tmp_path_factory.mktemp("both"), {"int8-row": (0.1, 40.0), INT8: (2.0, 4.0)})


def request(x: Array) -> lrai.InferenceRequest:
    return lrai.InferenceRequest(model_name="m", inputs={"x": x})


def test_a_compiled_artifact_is_certified_checked_and_served_by_it(served: lrai.Artifact) -> None:
    chosen = served.manifest.variant(served.manifest.chosen)
    version = installed_version("openvino")
    assert (chosen.id, chosen.engine, chosen.engine_version) == (INT8, "openvino", version)
    assert chosen.precision == "int8"
    assert served.engines == ("openvino", "onnxruntime")
    (certificate,) = lrai.certificates(served)
    assert certificate.environment == f"{isa_class()} with openvino {version}"
    file = served.path / "certificates" / f"{certificate.id}.json"
    assert lrai.check(file, served.path).holds
    x = np.random.default_rng(4).standard_normal((5, 256)).astype(np.float32)
    with lrai.Runtime.open(served, name="m") as runtime:
        assert runtime.models()[0].variant == INT8
        answer = runtime.infer(request(x))
    assert answer.parameters == {"variant": INT8, "certificate": certificate.id}
    right = reference(linear(256, 512), x)[0]
    error = np.linalg.norm(answer.outputs["y"] - right) / np.linalg.norm(right)
    assert 0 < error < 0.02


def test_where_its_engine_is_another_the_next_variant_serves(
    served: lrai.Artifact, tmp_path: Path
) -> None:
    path = tmp_path / "older.lrai"
    shutil.copytree(served.path, path)
    variants = [msgspec.to_builtins(variant) for variant in served.variants]
    variants[0]["engine_version"] = "2020.1"
    rewrite(path, {"variants": variants})
    seen: list[lrai.Event] = []
    with lrai.Runtime.open(lrai.Artifact.open(path), name="m", observers=[seen.append]) as runtime:
        assert runtime.models()[0].variant == "int8-row"
    (refused,) = [event for event in seen if event.kind == "variant_refused"]
    here = f"{isa_class()} with openvino {installed_version('openvino')}"
    assert refused.attributes["variant"] == INT8
    assert refused.attributes["made_for"] == f"{isa_class()} with openvino 2020.1"
    assert refused.attributes["here"] == here


def test_what_is_faster_for_some_calls_alone_serves_beside_another_or_not_at_all(
    both: lrai.Artifact, tmp_path: Path
) -> None:
    """Where its partner's engine is another, float32 serves, which is faster in the mean."""
    path = tmp_path / "older.lrai"
    shutil.copytree(both.path, path)
    variants = {one.id: msgspec.to_builtins(one) for one in both.variants}
    chosen, beside = variants[both.manifest.chosen], variants[both.manifest.together[0]]
    beside["speedup"] = 0.8
    rewrite(path, {"variants": list(variants.values())})
    with lrai.Runtime.open(lrai.Artifact.open(path), name="m") as runtime:
        assert runtime.models()[0].variant == chosen["id"]
    chosen["engine_version"] = "2020.1"
    rewrite(path, {"variants": list(variants.values())})
    with lrai.Runtime.open(lrai.Artifact.open(path), name="m") as runtime:
        assert runtime.models()[0].variant == "fp32"


def test_an_engine_that_is_not_there_is_named_before_any_work(tmp_path: Path) -> None:
    known = "engine .tensorrt. is unknown; known: onnxruntime, openvino"
    with pytest.raises(lrai.UsageError, match=known):
        lrai.compile(tmp_path / "none.onnx", out=tmp_path / "m.lrai", engines=["tensorrt"])


def test_serving_with_another_engine_does_not_bring_this_one(served: lrai.Artifact) -> None:
    code = (
        "import sys, lrai_core as lrai\n"
        f"with lrai.Runtime.open(lrai.Artifact.open({str(served.path)!r})): pass\n"
        "print('openvino' in sys.modules, 'onnx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_report_says_where_its_time_goes_by_its_own_kinds(served: lrai.Artifact) -> None:
    chosen = served.manifest.variant(served.manifest.chosen)
    spent, why = times(served, (served.manifest.variant("fp32"), chosen))
    assert not why
    own = {kind: taken for kind, taken in spent.items() if kind.endswith(" (openvino)")}
    assert "FullyConnected (openvino)" in own
    assert all(before == 0 < after < 50 for before, after in own.values())
    assert all(before > 0 == after for k, (before, after) in spent.items() if k not in own)
    assert len(spent) > len(own)
    assert "FullyConnected (openvino)" in page(served)


def test_what_is_faster_for_some_calls_is_kept_to_serve_those(
    both: lrai.Artifact, served: lrai.Artifact
) -> None:
    assert (both.manifest.chosen, both.manifest.together) == ("int8-row", (INT8,))
    assert {c.variant for c in lrai.certificates(both)} == {"int8-row", INT8}
    assert served.manifest.together == (), "nowhere faster: a spare"
    assert len(served.variants) == 3
    log = (both.path / "quantization.jsonl").read_text()
    assert "beside int8-row: calls get 3.16 x as fast" in log


@pytest.mark.parametrize("isolation", ["process", "inline"])
def test_each_call_is_run_by_the_variant_that_is_fastest_at_it(
    both: lrai.Artifact, isolation: str
) -> None:
    x = np.random.default_rng(5).standard_normal((64, 256)).astype(np.float32)
    right, own = (
        reference(linear(256, 512), x)[0],
        {c.variant: c.id for c in lrai.certificates(both)},
    )
    with lrai.Runtime() as runtime:
        runtime.load(both, name="m", settings={"actor.isolation": isolation})
        answers = {rows: runtime.infer(request(x[:rows])) for rows in (1, 64)}
        runtime.load(both, name="one", variant=INT8)
        alone = runtime.infer(lrai.InferenceRequest(model_name="one", inputs={"x": x[:1]}))
        runtime.load(both, name="same", settings={"scheduler.deterministic": True})
        same = runtime.infer(lrai.InferenceRequest(model_name="same", inputs={"x": x}))
    for rows, answer in answers.items():
        by = {1: "int8-row", 64: INT8}[rows]
        assert answer.parameters == {"variant": by, "certificate": own[by]}
        error = np.linalg.norm(answer.outputs["y"] - right[:rows]) / np.linalg.norm(right[:rows])
        assert 0 < error < 0.02
    assert alone.parameters["variant"] == INT8, "it was asked for"
    assert same.parameters["variant"] == "int8-row", "equal inputs have equal answers"


def test_callers_who_share_a_call_are_told_who_ran_it(both: lrai.Artifact) -> None:
    x = np.random.default_rng(6).standard_normal((200, 256)).astype(np.float32)
    right = reference(linear(256, 512), x)[0]
    with lrai.Runtime.open(both, name="m") as runtime, ThreadPoolExecutor(64) as callers:
        answers = list(callers.map(lambda i: runtime.infer(request(x[i : i + 1])), range(200)))
    for answer, expected in zip(answers, right, strict=True):
        found = answer.outputs["y"][0]
        assert found @ expected / np.linalg.norm(found) / np.linalg.norm(expected) > 0.999
    own = {c.variant: c.id for c in lrai.certificates(both)}
    told = {(answer.parameters["variant"], answer.parameters["certificate"]) for answer in answers}
    assert told <= set(own.items())


def test_a_variant_without_the_certificate_that_is_required_does_not_serve(
    both: lrai.Artifact, tmp_path: Path
) -> None:
    path = tmp_path / "one.lrai"
    shutil.copytree(both.path, path)
    (missing,) = [c.id for c in lrai.certificates(both) if c.variant == INT8]
    (path / "certificates" / f"{missing}.json").unlink()
    x = np.zeros((64, 256), np.float32)
    for require, by in ((None, INT8), ({"tier": "STATISTICAL"}, "int8-row")):
        artifact = lrai.Artifact.open(path)
        with lrai.Runtime.open(artifact, name="m", require=require) as runtime:
            assert runtime.infer(request(x)).parameters["variant"] == by


def test_where_only_the_second_fits_it_serves_and_where_only_the_first_that_does(
    both: lrai.Artifact, tmp_path: Path
) -> None:
    for index, by in ((0, INT8), (1, "int8-row")):
        path = tmp_path / f"{index}.lrai"
        shutil.copytree(both.path, path)
        variants = [msgspec.to_builtins(variant) for variant in both.variants]
        variants[index]["engine_version"] = "2020.1"
        rewrite(path, {"variants": variants})
        with lrai.Runtime.open(lrai.Artifact.open(path), name="m") as runtime:
            for rows in (1, 64):
                answer = runtime.infer(request(np.zeros((rows, 256), np.float32)))
                assert answer.parameters["variant"] == by


def test_a_manifest_that_names_a_partner_it_has_not_is_refused(
    both: lrai.Artifact, tmp_path: Path
) -> None:
    path = tmp_path / "odd.lrai"
    shutil.copytree(both.path, path)
    rewrite(path, {"together": ["int8-none"]})
    with pytest.raises(ArtifactError, match="has no variant 'int8-none'"):
        lrai.Artifact.open(path)


def test_it_reports_to_nobody_and_leaves_nothing_in_the_home(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "CI"}
    program = "import lrai_engines.openvino, lrai_engines.openvino_forms, sys; "
    program += "print(sys.modules['openvino_telemetry'])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env=environ | {"HOME": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "None\n"
    assert not list(tmp_path.iterdir())
