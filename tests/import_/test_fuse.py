"""Several models as one, against each by itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import lrai_core as lrai
from lrai_core import CompileError
from lrai_import.fuse import Fused, _feed, command, fuse
from lrai_import.onnx import load
from lrai_report.compile import main as compile_
from lrai_report.inspect import inspect
from lrai_report.log import fused as fused_of
from lrai_report.log import logged
from lrai_report.page import page
from tests.core.compiler.onnx_files import model, value

LRAI = Path(sys.executable).with_name("lrai")
WIDTH = 32
ROWS_TIMED = r"\n1 row\(s\): .* ms as one\n32 row\(s\): .* ms as one\n"


def weights(seed: int, *shape: int) -> Any:
    return (np.random.default_rng(seed).standard_normal(shape) / shape[0] ** 0.5).astype(np.float32)


def headed(
    trunk: int, head: int, *, classes: int = 3, prefix: str = "", gemm: bool = False, depth: int = 2
) -> onnx.ModelProto:
    """Return x -> layers by the seed `trunk` -> a head by the seed `head`; names have a prefix."""
    nodes, constants, at = [], [], "x"
    for layer in range(depth):
        name = f"{prefix}w{layer}"
        constants.append(numpy_helper.from_array(weights(trunk + layer, WIDTH, WIDTH), name))
        nodes.append(helper.make_node("MatMul", [at, name], [f"{prefix}p{layer}"]))
        nodes.append(helper.make_node("Relu", [f"{prefix}p{layer}"], [f"{prefix}h{layer}"]))
        at = f"{prefix}h{layer}"
    last = weights(head, WIDTH, classes)
    if gemm:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(last.T), f"{prefix}v"))
        constants.append(numpy_helper.from_array(weights(head + 1, classes), f"{prefix}b"))
        read = [at, f"{prefix}v", f"{prefix}b"]
        nodes.append(helper.make_node("Gemm", read, [f"{prefix}y"], transB=1))
    else:
        constants.append(numpy_helper.from_array(last, f"{prefix}v"))
        nodes.append(helper.make_node("MatMul", [at, f"{prefix}v"], [f"{prefix}y"]))
    symbol = f"{prefix or 'batch'}"
    inputs, outputs = [value("x", [symbol, WIDTH])], [value(f"{prefix}y", [symbol, classes])]
    return model(nodes, inputs, outputs, constants)


def run(proto: onnx.ModelProto, **feed: Any) -> dict[str, Any]:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


def kinds(fused: Fused) -> dict[str, int]:
    found = [node.op_type for node in fused.model.graph.node]
    return {kind: found.count(kind) for kind in found}


X = np.random.default_rng(9).standard_normal((5, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("gemm", [False, True])
def test_a_trunk_runs_once_whatever_its_values_are_called(gemm: bool) -> None:
    one, two = headed(1, 50, gemm=gemm), headed(1, 60, classes=4, prefix="z", gemm=gemm)
    fused = fuse({"one": one, "two": two})
    onnx.checker.check_model(fused.model)
    assert (fused.operators, fused.shared, fused.joined) == (10, 4, 1)
    head = "Gemm" if gemm else "MatMul"
    assert kinds(fused)[head] == (1 if gemm else 3)  # both heads are one product
    assert [given.name for given in fused.model.graph.input] == ["x"]
    assert fused.outputs == {"one": ["y"], "two": ["zy"]}
    found = run(fused.model, x=X)
    np.testing.assert_allclose(found["y"], run(one, x=X)["y"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["zy"], run(two, x=X)["zy"], rtol=1e-5, atol=1e-6)
    free = {d.dim_param for v in fused.model.graph.output for d in v.type.tensor_type.shape.dim}
    assert free == {"batch", ""}, "one free extent has one name"


def held_in_constants(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Return the model with each weight in a Constant, whose tensor is called `name`."""
    nodes = []
    for weight in proto.graph.initializer:
        tensor = onnx.TensorProto()
        tensor.CopyFrom(weight)
        tensor.name = name
        nodes.append(helper.make_node("Constant", [], [weight.name], value=tensor))
    graph = [*nodes, *proto.graph.node]
    return model(graph, proto.graph.input, proto.graph.output)


@pytest.mark.parametrize(("other", "operators"), [("initializers", 13), ("constants", 16)])
def test_a_constant_is_what_it_holds_whatever_its_tensor_is_called(
    other: str, operators: int
) -> None:
    one, two = held_in_constants(headed(1, 50), "one"), headed(1, 60, classes=4)
    two = held_in_constants(two, "two") if other == "constants" else two
    fused = fuse({"one": one, "two": two})
    onnx.checker.check_model(fused.model)
    again = 2 * (other == "constants")  # the trunk's weights, if they are operators
    assert (fused.operators, fused.shared, fused.joined) == (operators, 4 + again, 1)
    assert kinds(fused) == {"MatMul": 3, "Relu": 2, "Split": 1, "Identity": 2}
    found = run(fused.model, x=X)
    np.testing.assert_allclose(found["one.y"], run(one, x=X)["y"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["two.y"], run(two, x=X)["y"], rtol=1e-5, atol=1e-6)


def test_what_differs_is_kept_apart_and_outputs_of_one_name_get_their_models() -> None:
    models = {f"m{i}": headed(10 * i, 50 + i) for i in range(4)}
    fused = fuse(models)
    assert (fused.shared, fused.joined) == (0, 3), "only the first layers read one value"
    assert [output.name for output in fused.model.graph.output] == [f"m{i}.y" for i in range(4)]
    found = run(fused.model, x=X)
    for name, proto in models.items():
        right = run(proto, x=X)["y"]
        np.testing.assert_allclose(found[f"{name}.y"], right, rtol=1e-5, atol=1e-6)


def test_products_of_one_model_stay_as_they_are() -> None:
    nodes = [helper.make_node("MatMul", ["x", w], [f"{w}y"]) for w in "qkv"]
    constants = [numpy_helper.from_array(weights(i, WIDTH, WIDTH), w) for i, w in enumerate("qkv")]
    outputs = [value(f"{w}y", ["batch", WIDTH]) for w in "qkv"]
    attention = model(nodes, [value("x", ["batch", WIDTH])], outputs, constants)
    assert fuse({"a": attention, "b": attention}).joined == 0
    assert fuse({"a": attention, "b": attention}).shared == 3


def test_the_same_model_twice_is_that_model_once() -> None:
    fused = fuse({"a": headed(1, 50), "b": headed(1, 50)})
    assert fused.shared == 5
    found = run(fused.model, x=X)
    assert np.array_equal(found["a.y"], found["b.y"])


def test_inputs_that_differ_in_shape_stay_two() -> None:
    other = headed(1, 50)
    other.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 5
    fused = fuse({"a": headed(1, 50), "b": other})
    assert [given.name for given in fused.model.graph.input] == ["x", "b.x"]
    assert fused.shared == 0
    found = run(fused.model, x=X, **{"b.x": X})
    assert np.array_equal(found["a.y"], found["b.y"])


def test_what_is_drawn_is_drawn_again() -> None:
    node = helper.make_node("RandomNormalLike", ["x"], ["y"])
    noise = model([node], [value("x", ["batch", 4])], [value("y", ["batch", 4])])
    fused = fuse({"a": noise, "b": noise})
    assert fused.shared == 0
    found = run(fused.model, x=np.zeros((3, 4), np.float32))
    assert not np.array_equal(found["a.y"], found["b.y"])


def test_control_flow_is_refused() -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])], "b", [], [value("z", ["batch", 4])]
    )
    flag = numpy_helper.from_array(np.array(True), "flag")
    node = helper.make_node("If", ["flag"], ["y"], then_branch=body, else_branch=body)
    proto = model([node], [value("x", ["batch", 4])], [value("y", ["batch", 4])], [flag])
    with pytest.raises(CompileError, match="a: If is control flow"):
        fuse({"a": proto, "b": proto})


def test_models_of_two_opsets_meet_at_the_newer_one() -> None:
    newer = headed(1, 60, prefix="z")
    newer.opset_import[0].version = 18
    fused = fuse({"a": headed(1, 50), "b": newer})
    assert fused.shared == 4
    assert [o.version for o in fused.model.opset_import] == [18]


def test_versions_of_a_domain_that_contradict_are_refused() -> None:
    one, two = headed(1, 50), headed(1, 60, prefix="z")
    for version, proto in ((1, one), (2, two)):
        proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", version))
    fuse({"a": one, "b": two})  # neither uses it
    for proto in (one, two):
        name = proto.graph.input[0].name
        proto.graph.node.append(helper.make_node("Scaler", [name], ["s"], domain="ai.onnx.ml"))
    with pytest.raises(CompileError, match=r"b needs version 2 of 'ai\.onnx\.ml'"):
        fuse({"a": one, "b": two})


def test_rows_are_timed_in_front_alone_where_nothing_free_has_a_name() -> None:
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None, 4])
    proto = model([helper.make_node("Relu", ["x"], ["y"])], [given], [value("y", ["rows"])], [])
    assert {name: array.shape for name, array in _feed(proto, 32)} == {"x": (32, 8, 4)}


def cli(folder: Path, *arguments: str, command: str = "fuse") -> subprocess.CompletedProcess[str]:
    words = [str(LRAI), command, *arguments]
    return subprocess.run(words, capture_output=True, text=True, cwd=folder, check=False)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two models that share most."""
    paths = [tmp_path / "one.onnx", tmp_path / "two.onnx"]
    for path, seed, prefix in zip(paths, (50, 70), ("", "z"), strict=True):
        onnx.save(headed(1, seed, prefix=prefix, depth=12), path)
    return paths


@pytest.fixture
def gained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have one model take half the time, however busy this machine is."""
    monkeypatch.setattr("lrai_import.fuse._times", lambda *_: (2e-3, 1e-3))


@pytest.mark.usefixtures("gained")
def test_the_command_writes_what_compiles_and_each_model_can_be_asked(
    tmp_path: Path, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command(files, tmp_path / "both.onnx")
    said = capsys.readouterr().out
    assert "24 of 50 operators need not run again" in said
    assert re.search(ROWS_TIMED, said)
    assert "one: y\ntwo: zy" in said
    artifact = lrai.compile(tmp_path / "both.onnx", out=tmp_path / "both.lrai")
    assert artifact.manifest.signature.coalescible
    with lrai.Runtime.open(artifact, name="m") as runtime:
        request = lrai.InferenceRequest(model_name="m", inputs={"x": X}, outputs=("zy",))
        answer = runtime.infer(request)
    assert list(answer.outputs) == ["zy"]
    right = run(onnx.load(files[1]), x=X)["zy"]
    np.testing.assert_allclose(answer.outputs["zy"], right, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("gained")
@pytest.mark.parametrize("why", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_half_a_file_does_not_stay(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch, why: BaseException
) -> None:
    def cut(path: Path, _: bytes) -> None:
        path.touch()
        raise why

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", cut)
        with pytest.raises((lrai.EnvironmentProblem, KeyboardInterrupt)):
            command(files, tmp_path / "both.onnx")
    assert not (tmp_path / "both.onnx").exists()


@pytest.mark.usefixtures("files")
def test_what_this_machine_takes_decides(tmp_path: Path) -> None:
    done = cli(tmp_path, "one.onnx", "two.onnx", "-o", "both.onnx")
    assert done.returncode in (0, 3), done.stderr  # a busy one may say either
    assert re.search(ROWS_TIMED, done.stdout)
    assert (tmp_path / "both.onnx").exists() is (done.returncode == 0)


@pytest.mark.usefixtures("gained")
def test_compile_takes_several_as_one_if_it_is_told_to(tmp_path: Path, files: list[Path]) -> None:
    out = ("-o", str(tmp_path / "both.lrai"), "--threads", "1")
    for given in (("one.onnx", "two.onnx"), ("one.onnx", "--fuse")):
        done = cli(tmp_path, *given, *out, command="compile")
        assert done.returncode == 2, done.stderr
        assert "--fuse" in done.stderr
        assert not (tmp_path / "both.lrai").exists()
    with pytest.raises(SystemExit) as end:
        compile_([*map(str, files), "--fuse", *out])
    assert not end.value.code
    outputs = lrai.Artifact.open(tmp_path / "both.lrai").manifest.signature.outputs
    assert [spec.name for spec in outputs] == ["y", "zy"]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["both.lrai", "one.onnx", "two.onnx"]


@pytest.mark.usefixtures("gained")
def test_the_artifact_says_of_which_models_it_is_and_what_that_saves(
    tmp_path: Path, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "both.lrai"
    with pytest.raises(SystemExit) as end:
        compile_([*map(str, files), "--fuse", "-o", str(out), "--threads", "1"])
    assert not end.value.code
    capsys.readouterr()
    artifact = lrai.Artifact.open(out)
    note = fused_of(logged(artifact))
    assert note.startswith("fused: one.onnx two.onnx; 24 of 50 operators need not run again, 1 pro")
    assert re.search(r"; [\d.]+ MB apart, [\d.]+ MB as one; ", note)
    for rows in (1, 32):
        assert f"; {rows} row(s): 2 ms apart, 1 ms as one; " in note
    assert note.endswith("; one: y; two: zy; every request sends x")
    assert str(tmp_path) not in note
    inspect(out)
    assert note in " ".join(capsys.readouterr().out.split())
    shown = page(artifact)
    assert note in shown
    assert "lrai compile one.onnx two.onnx --fuse -o both.lrai" in shown


@pytest.mark.usefixtures("files")
def test_what_was_measured_is_no_part_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[Path]
) -> None:
    notes, found = list[str](), []
    for name, seconds in (("a", 1e-3), ("b", 1.5e-3)):
        monkeypatch.setattr("lrai_import.fuse._times", lambda *_, one=seconds: (3e-3, one))
        command(files, tmp_path / f"{name}.onnx")
        found.append(load(tmp_path / f"{name}.onnx", notes.append))
    first, second = found
    assert ["1.5 ms as one" in note for note in notes] == [False, True]
    assert first.sha256 == second.sha256
    assert first.model == second.model


@pytest.mark.usefixtures("gained")
def test_models_of_different_inputs_are_asked_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(small("x", "y"), tmp_path / "a.onnx")
    onnx.save(small("z", "w"), tmp_path / "b.onnx")
    command([tmp_path / "a.onnx", tmp_path / "b.onnx"], tmp_path / "both.onnx")
    assert "\na: y\nb: w\nevery request sends x, z\n" in capsys.readouterr().out
    artifact = lrai.compile(tmp_path / "both.onnx", out=tmp_path / "both.lrai", threads=1)
    sent = {name: np.ones((2, 4), np.float32) for name in "xz"}
    with lrai.Runtime.open(artifact, name="m") as runtime:
        asked = lrai.InferenceRequest(model_name="m", inputs=sent, outputs=("y",))
        assert list(runtime.infer(asked).outputs) == ["y"]
        alone = lrai.InferenceRequest(model_name="m", inputs={"x": sent["x"]}, outputs=("y",))
        with pytest.raises(lrai.InvalidTensor, match="'z': missing"):
            runtime.infer(alone)


@pytest.mark.parametrize(
    ("alone_ms", "together_ms"),
    [(1.04, 1.04), (0.99, 3.0), (3.0, 0.99)],  # at one row, and at 32, for 1 ms as one
)
def test_where_nothing_is_gained_or_some_is_lost_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone_ms: float, together_ms: float
) -> None:
    def times(*given: Any) -> tuple[float, float]:
        return {1: alone_ms, 32: together_ms}[given[-1]] / 1e3, 1e-3

    monkeypatch.setattr("lrai_import.fuse._times", times)
    files = [tmp_path / "one.onnx", tmp_path / "two.onnx"]
    for seed, file in enumerate(files):
        onnx.save(headed(10 * seed, 50), file)
    least = min(alone_ms, together_ms)
    said = (
        rf"not fused: {least:.2f} to .* times as fast; 1 row\(s\): {alone_ms:g} ms apart, 1 ms as "
        rf"one; 32 row\(s\): {together_ms:g} ms apart, 1 ms as one"
    )
    with pytest.raises(lrai.ConditionNotMet, match=said):
        command(files, tmp_path / "both.onnx")
    assert not (tmp_path / "both.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["one.onnx"], "several files of different names are needed, got 1 called 'one'"),
        (["one.onnx", "two.onnx", "one.onnx"], "of different names are needed, got 2 called 'one'"),
        (["one.onnx", "two.onnx"], "both.onnx exists"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "both.onnx").touch()
    done = cli(tmp_path, *arguments, "-o", "both.onnx")
    assert done.returncode == 2
    assert said in done.stderr


def test_a_datatype_is_part_of_what_an_input_is() -> None:
    other = headed(1, 50)
    node = helper.make_node("Cast", ["x"], ["xf"], to=TensorProto.FLOAT)
    other.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    other.graph.node[0].input[0] = "xf"
    other.graph.node.insert(0, node)
    fused = fuse({"a": headed(1, 50), "b": other})
    assert [given.name for given in fused.model.graph.input] == ["x", "b.x"]


def small(given: str, result: str, inner: str = "dense") -> onnx.ModelProto:
    nodes = [helper.make_node("Relu", [given], [inner]), helper.make_node("Neg", [inner], [result])]
    return model(nodes, [value(given, ["batch", 4])], [value(result, ["batch", 4])])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (small("x", "hidden"), small("hidden", "y")),
        (small("hidden", "y"), small("x", "hidden")),
        (small("x", "y"), small("x", "b/dense")),
        (small("x", "b.y"), small("x", "y")),
        (small("x", "a/dense"), small("x", "a/dense")),
    ],
)
def test_names_that_meet_are_told_apart(first: onnx.ModelProto, second: onnx.ModelProto) -> None:
    fused = fuse({"a": first, "b": second})
    onnx.checker.check_model(fused.model)
    x = np.arange(-4, 4, dtype=np.float32).reshape(2, 4)
    found = run(fused.model, **{given.name: x for given in fused.model.graph.input})
    assert len(found) == 2
    for array in found.values():
        assert np.array_equal(array, -np.maximum(x, 0))


def test_an_output_that_is_an_input_is_still_one() -> None:
    node = helper.make_node("Neg", ["x"], ["y"])
    same = model([node], [value("x", [2, 4])], [value("y", [2, 4]), value("x", [2, 4])])
    fused = fuse({"a": same, "b": small("z", "w")})
    onnx.checker.check_model(fused.model)
    x = np.ones((2, 4), np.float32)
    found = run(fused.model, x=x, z=x)
    assert np.array_equal(found[fused.outputs["a"][1]], x)


def test_free_extents_of_two_inputs_stay_two() -> None:
    nodes = [helper.make_node("Neg", ["x"], ["p"]), helper.make_node("Neg", ["e"], ["q"])]
    inputs = [value("x", ["nodes", 4]), value("e", ["edges", 3])]
    graphs = model(nodes, inputs, [value("p", ["nodes", 4]), value("q", ["edges", 3])])
    fused = fuse({"a": graphs, "b": small("z", "w")})
    symbols = {
        given.name: given.type.tensor_type.shape.dim[0].dim_param
        for given in (*fused.model.graph.input, *fused.model.graph.output)
    }
    assert symbols == {"x": "nodes", "e": "edges", "z": "batch", "p": "nodes", "q": "edges",
                       "w": "batch"}  # fmt: skip


@pytest.mark.parametrize("bias", ["", "row", "one", "rows"])
def test_a_gemm_is_joined_with_whatever_bias_it_has(bias: str) -> None:
    shapes = {"row": (3,), "one": (1,), "rows": (5, 3)}
    models = {}
    for name, seed in (("a", 1), ("b", 2)):
        constants = [numpy_helper.from_array(weights(seed, WIDTH, 3), "w")]
        if bias:
            constants.append(numpy_helper.from_array(weights(seed, *shapes[bias]), "c"))
        node = helper.make_node("Gemm", ["x", "w", "c" if bias else ""], ["y"])
        inputs, outputs = [value("x", ["batch", WIDTH])], [value("y", ["batch", 3])]
        models[name] = model([node], inputs, outputs, constants)
    fused = fuse(models)
    assert fused.joined == (bias != "rows")
    found = run(fused.model, x=X)
    for name, proto in models.items():
        np.testing.assert_allclose(found[f"{name}.y"], run(proto, x=X)["y"], rtol=1e-4, atol=1e-5)


def test_sparse_weights_are_refused() -> None:
    sparse = headed(1, 50)
    tensor = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(1, np.float32), "s"),
        numpy_helper.from_array(np.zeros(1, np.int64), "i"),
        [4, 4],
    )
    sparse.graph.sparse_initializer.append(tensor)
    with pytest.raises(CompileError, match="a has sparse weights"):
        fuse({"a": sparse, "b": headed(1, 60)})


def chain() -> dict[str, onnx.ModelProto]:
    """Return a trunk, and a head that reads what it gives under other names."""
    constant = numpy_helper.from_array(weights(90, 3, 2), "w")
    node = helper.make_node("MatMul", ["features", "w"], ["score"])
    inputs, outputs = [value("features", ["rows", 3])], [value("score", ["rows", 2])]
    return {"trunk": headed(1, 50), "head": model([node], inputs, outputs, [constant])}


def test_what_a_model_before_gives_is_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is one request instead of two, whatever calls take."""
    monkeypatch.setattr("lrai_import.fuse._times", lambda *_: (1e-3, 1.01e-3))
    models = chain()
    for name, proto in models.items():
        onnx.save(proto, tmp_path / f"{name}.onnx")
    files = [tmp_path / "trunk.onnx", tmp_path / "head.onnx"]
    command(files, tmp_path / "both.onnx", ["head.features=trunk.y"])
    fused = onnx.load(tmp_path / "both.onnx")
    onnx.checker.check_model(fused, full_check=True)
    assert [given.name for given in fused.graph.input] == ["x"]
    found, y = run(fused, x=X), run(models["trunk"], x=X)["y"]
    np.testing.assert_array_equal(found["y"], y)
    np.testing.assert_array_equal(found["score"], run(models["head"], features=y)["score"])
    assert {d.dim[0].dim_param for d in _shapes(fused)} == {"batch"}


def test_a_chain_by_one_name_keeps_it_and_its_rows() -> None:
    """Exporters name the extents of what is given otherwise than of what is read."""
    models = chain()
    models["trunk"].graph.output[0].CopyFrom(value("features", ["given", 3]))
    models["trunk"].graph.node[-1].output[0] = "features"
    mask = value("mask", ["rows", 2])
    models["head"].graph.input.append(mask)
    models["head"].graph.node[0].output[0] = "product"
    models["head"].graph.node.append(helper.make_node("Mul", ["product", "mask"], ["score"]))
    fused = fuse(models, {"head.features": "trunk.features"})
    onnx.checker.check_model(fused.model)
    assert fused.outputs == {"trunk": ["features"], "head": ["score"]}
    rows = {given.name: _shapes(fused.model)[i].dim[0].dim_param
            for i, given in enumerate(fused.model.graph.input)}  # fmt: skip
    assert rows == {"x": "batch", "mask": "batch"}


@pytest.mark.parametrize("feeds", [["head.features"], ["head.features=trunk.y"] * 2])
def test_a_feed_says_what_reads_what_once(tmp_path: Path, feeds: list[str]) -> None:
    for name, proto in chain().items():
        onnx.save(proto, tmp_path / f"{name}.onnx")
    files = [tmp_path / "trunk.onnx", tmp_path / "head.onnx"]
    told = f"--feed is {feeds[0]!r}, MODEL.INPUT=MODEL.OUTPUT is needed, for each input once"
    with pytest.raises(lrai.UsageError, match=told):
        command(files, tmp_path / "both.onnx", feeds)
    assert not (tmp_path / "both.onnx").exists()


def _shapes(fused: onnx.ModelProto) -> list[onnx.TensorShapeProto]:
    return [v.type.tensor_type.shape for v in (*fused.graph.input, *fused.graph.output)]


@pytest.mark.parametrize(
    ("target", "source", "said"),
    [
        ("head.x", "trunk.y", r"'head.x' is no input to feed; there are head.features, trunk.x"),
        ("head.features", "trunk.z", r"no output 'trunk.z' before head: trunk.y"),
        ("trunk.x", "head.score", r"no output 'head.score' before trunk: none"),
        ("head.features", "wide.y", r"head cannot be fed wide.y: .*batchx4.* is no .*rowsx3"),
        ("head.features", "whole.y", r"head cannot be fed whole.y: .*INT64.* is no .*FLOAT"),
        ("head.features", "flat.y", r"head cannot be fed flat.y: "),
    ],
)
def test_what_cannot_be_fed_is_refused(target: str, source: str, said: str) -> None:
    models = chain()
    if (name := source.partition(".")[0]) not in models:
        shapes: dict[str, list[int | str]] = {"wide": ["batch", 4], "flat": [3]}
        shape = shapes.get(name, ["batch", 3])
        ends = [value(end, shape, TensorProto.INT64 if name == "whole" else 1) for end in "uy"]
        models = {name: model([helper.make_node("Abs", ["u"], ["y"])], ends[:1], ends[1:])} | models
    with pytest.raises(lrai.UsageError, match=said):
        fuse(models, {target: source})
