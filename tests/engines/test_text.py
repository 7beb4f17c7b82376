"""Of onnxruntime-extensions a graph may have the tokenizer, and nothing that reads files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import lrai_engines.text as text
from lrai_core.compiler.search import Sample
from lrai_core.engine.engine import find_engine
from lrai_core.errors import ArtifactError, EnvironmentProblem
from lrai_core.protocol import TensorSpec
from lrai_engines.undefined import goes_undefined
from lrai_import.described import load
from tests.core.compiler.onnx_files import model, value
from tests.tiny_models import text_model


def reader(path: Path, *, inside: bool, domain: str = "ai.onnx.contrib") -> Path:
    """Write a model with an operator of the library that is none for text."""
    operator = "ImageReader" if domain == "ai.onnx.contrib" else "DecodeImage"
    read = helper.make_node(operator, ["name"], ["pixels"], domain=domain)
    name = helper.make_tensor_value_info("name", TensorProto.STRING, [1])
    nodes, inputs = [read], [name]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, None)
    if inside:
        body = helper.make_graph([read], "then", [], [pixels])
        nodes = [helper.make_node("If", ["on"], ["pixels"], then_branch=body, else_branch=body)]
        inputs.append(helper.make_tensor_value_info("on", TensorProto.BOOL, []))
    domains = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)]
    graph = helper.make_graph(nodes, "reader", inputs, [pixels])
    model = helper.make_model(graph, opset_imports=domains, ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("inside", [False, True])
def test_an_operator_that_reads_files_is_refused(tmp_path: Path, inside: bool) -> None:
    with pytest.raises(
        ArtifactError, match=r"'ImageReader' of ai.onnx.contrib is none of those allowed"
    ):
        find_engine("onnxruntime").load(reader(tmp_path / "m.onnx", inside=inside))


def test_the_other_domain_of_the_library_is_refused(tmp_path: Path) -> None:
    model = onnx.load(text_folder_model(tmp_path))
    other = onnx.load(reader(tmp_path / "m.onnx", inside=False, domain="com.microsoft.extensions"))
    model.graph.node.extend(other.graph.node)
    model.graph.input.extend(other.graph.input)
    model.opset_import.append(helper.make_opsetid("com.microsoft.extensions", 1))
    onnx.save(model, tmp_path / "both.onnx")
    with pytest.raises(ArtifactError, match="DecodeImage"):
        find_engine("onnxruntime").load(tmp_path / "both.onnx")
    with pytest.raises(ArtifactError, match=r"'DecodeImage' of com.microsoft.extensions is none"):
        text.register(ort.SessionOptions(), str(tmp_path / "both.onnx"))


def test_what_is_looked_at_is_what_runs(tmp_path: Path) -> None:
    model = onnx.load(text_folder_model(tmp_path))
    model.ir_version, model.producer_name = 8, ""
    content = model.SerializeToString()
    model.producer_name = (
        "ORTM"  # onnxruntime would take bytes with these at this place for its own
    )
    marked = model.SerializeToString()
    assert marked[4:8] == b"ORTM" != content[4:8]
    (tmp_path / "marked.onnx").write_bytes(marked)
    (tmp_path / "weights").mkdir()
    with pytest.raises(ArtifactError):  # in one format or the other, it is not run unseen
        find_engine("onnxruntime").load(tmp_path / "marked.onnx", weights=tmp_path / "weights")


def text_folder_model(folder: Path) -> Path:
    model = load(text_model(folder / "text.onnx"), print).model
    (folder / "whole.onnx").write_bytes(model.SerializeToString())
    return folder / "whole.onnx"


def test_a_graph_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        text.register(ort.SessionOptions(), b"\xff")
    with pytest.raises(ArtifactError, match="cannot be read"):
        text.register(ort.SessionOptions(), str(tmp_path / "none.onnx"))


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(text_model(tmp_path / "m.onnx"), print).model
    monkeypatch.setattr(text, "find_spec", lambda _: None)
    (tmp_path / "whole.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EnvironmentProblem, match=r"pip install 'lrai\[text\]'"):
        find_engine("onnxruntime").load(tmp_path / "whole.onnx")


@pytest.mark.parametrize(
    ("vocabulary", "says"),
    [
        ('{"a": 0, "b": 2}', "ids with a gap"),
        ('{"a": 0, "b": -4294967294}', "ids with a gap"),  # the same, cut to 32 bits
        ('["a"]', "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 9_999, "cannot be read"),
    ],
)
def test_a_vocabulary_that_the_library_would_overrun_is_refused(vocabulary: str, says: str) -> None:
    own = helper.make_node(
        "GPT2Tokenizer",
        ["t"],
        ["i", "m"],
        "t",
        domain="ai.onnx.contrib",
        vocab=vocabulary,
        merges="a b",
    )
    body = helper.make_graph([own], "then", [], [])
    inside = helper.make_node("If", ["on"], [], then_branch=body, else_branch=body)
    model = helper.make_model(helper.make_graph([inside], "g", [], []))
    with pytest.raises(ArtifactError, match=says):
        text.register(ort.SessionOptions(), model.SerializeToString())


def test_texts_alone_are_as_those_together(tmp_path: Path) -> None:
    model = load(text_model(tmp_path / "m.onnx"), print).model
    (tmp_path / "whole.onnx").write_bytes(model.SerializeToString())
    session = find_engine("onnxruntime").load(tmp_path / "whole.onnx")
    texts = np.array(["the", "a longer one, with more words", "", "thing"], np.object_)
    together = session.run([texts])[0]
    for index in range(len(texts)):
        assert np.allclose(session.run([texts[index : index + 1]])[0][0], together[index])


def imputing() -> tuple[onnx.ModelProto, Sample]:
    """Return whether a text is "yes", and eight numbers with 0 for NaN -> a layer."""
    nodes = [
        helper.make_node("StringEqual", ["text", "yes"], ["is"], domain="ai.onnx.contrib"),
        helper.make_node("Cast", ["is"], ["one"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["one", "axis"], ["column"]),
        helper.make_node("IsNaN", ["x"], ["none"]),
        helper.make_node("Where", ["none", "zero", "x"], ["known"]),
        helper.make_node("Concat", ["column", "known"], ["all"], axis=1),
        helper.make_node("MatMul", ["all", "w"], ["y"], "layer"),
    ]
    weights = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    constants = [
        numpy_helper.from_array(array, name)
        for name, array in (
            ("axis", np.array([1])),
            ("zero", np.zeros((), np.float32)),
            ("w", weights),
            ("yes", np.array(["yes"], np.object_)),
        )
    ]
    ends = (
        [value("text", ["batch"], TensorProto.STRING), value("x", ["batch", 8])],
        [value("y", ["batch", 4])],
    )
    proto = model(nodes, *ends, constants, domains=[("ai.onnx.contrib", 1)])
    spec = TensorSpec(name="y", datatype="FP32", shape=("batch", 4), batch_axis=0)
    row = [np.array(["yes"], np.object_), np.ones((1, 8), np.float32)]
    return proto, Sample([row], (spec,))


def test_a_model_of_text_that_looks_for_what_is_no_number_is_left_to_it() -> None:
    assert not goes_undefined(*imputing())
