"""Hostile and broken model files are refused in one sentence; what kills a parser kills a child."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper, numpy_helper

from lrai_core.errors import CompileError, EnvironmentProblem, LraiError, UnsupportedOperator
from lrai_core.executor import on_all_cpus
from lrai_import.probe import Probe, probe
from tests.core.compiler.onnx_files import linear, model, save, value, with_external_data

WEIGHT = np.zeros(32, np.float32).tobytes()


def test_a_good_model_is_described(tmp_path: Path) -> None:
    found = probe(save(linear(), tmp_path / "m.onnx"))
    assert (found.opset, found.external) == (17, ())


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="cannot be read"):  # onnx takes text only
        probe(save(linear(), tmp_path / os.fsdecode(b"m\xff.onnx")))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="No such file"):
        probe(tmp_path / "absent.onnx")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="is not a file"):
        probe(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an onnx model", b"\x00" * 64])
def test_what_is_not_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(CompileError, match="not an ONNX model"):
        probe(tmp_path / "m.onnx")


@pytest.mark.parametrize("part", [0.3, 0.9, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, part: float) -> None:
    whole = linear(64, 64).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(CompileError, match=r"m\.onnx: not a"):
        probe(tmp_path / "m.onnx")


def test_an_unknown_custom_operator_is_named(tmp_path: Path) -> None:
    proto = model(
        [helper.make_node("Magic", ["x"], ["y"], name="wand", domain="com.example")],
        [value("x", ["n", 4])],
        [value("y", ["n", 4])],
        domains=[("com.example", 1)],
    )
    with pytest.raises(UnsupportedOperator, match=r"com\.example:Magic \(node 'wand'\)"):
        probe(save(proto, tmp_path / "m.onnx"))


def test_an_unknown_operator_inside_a_branch_is_named(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Nonsense", ["x"], ["out"], name="deep")],
        "branch",
        [],
        [value("out", [1])],
    )
    proto = model(
        [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)],
        [value("x", [1]), value("c", [], onnx.TensorProto.BOOL)],
        [value("y", [1])],
    )
    with pytest.raises(UnsupportedOperator, match=r"Nonsense \(node 'deep'\)"):
        probe(save(proto, tmp_path / "m.onnx"))


def test_a_dynamic_rank_is_refused_by_name(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(CompileError, match="input 'x' has a dynamic rank"):
        probe(save(proto, tmp_path / "m.onnx"))


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "a/../../b", "..\\x", "C:/x"])
def test_external_data_that_leaves_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(WEIGHT)
    with pytest.raises(
        CompileError, match=r"outside the directory|relative path|regular file"
    ) as refused:
        probe(with_external_data(folder / "m.onnx", location))
    assert str(tmp_path) not in str(refused.value)


def test_external_data_behind_a_symlink_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(WEIGHT)
    (folder / "w.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(CompileError, match=r"(symbolic link|outside model directory).* cp -rL "):
        probe(with_external_data(folder / "m.onnx", "w.bin"))


def test_external_data_through_a_linked_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "w.bin").write_bytes(WEIGHT)
    (folder / "data").symlink_to(tmp_path / "other")
    with pytest.raises(CompileError, match=r"(symbolic link|outside model directory).* cp -rL "):
        probe(with_external_data(folder / "m.onnx", "data/w.bin"))


def test_external_data_that_is_a_hard_link_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(WEIGHT)
    os.link(tmp_path / "secret.bin", folder / "w.bin")
    with pytest.raises(CompileError, match=r"multiple hard links.* cp -rL "):
        probe(with_external_data(folder / "m.onnx", "w.bin"))


def test_external_data_beyond_its_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHT)
    with pytest.raises(CompileError, match="exceeds available data"):
        probe(with_external_data(tmp_path / "m.onnx", "w.bin", length=str(1 << 60)))


@pytest.mark.parametrize(
    ("key", "text"), [("basepath", "/etc"), ("__class__", "x"), ("offset", "-1")]
)
def test_malformed_external_data_is_refused(tmp_path: Path, key: str, text: str) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHT)
    path = with_external_data(tmp_path / "m.onnx", "w.bin")
    proto = onnx.load(path, load_external_data=False)
    entry = proto.graph.initializer[0].external_data.add()
    entry.key, entry.value = key, text
    with pytest.raises(CompileError, match=r"^m\.onnx: "):
        probe(save(proto, path))


def test_good_external_data_is_listed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "w.bin").write_bytes(WEIGHT)
    assert probe(with_external_data(tmp_path / "m.onnx", "data/w.bin")).external == ("data/w.bin",)


def test_a_child_that_dies_is_a_refused_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(linear(), tmp_path / "m.onnx")
    killer = tmp_path / "python"
    killer.write_text("#!/bin/sh\nkill -SEGV $$\n")
    killer.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killer))
    with pytest.raises(CompileError, match=r"signal 11.*damaged or hostile"):
        probe(path)


def test_whatever_bits_of_a_file_are_flipped_a_child_dies_of_it_at_most(tmp_path: Path) -> None:
    """The first, a sign, has onnxruntime divide the least integer by -1: no integer holds that."""
    nodes = [
        helper.make_node("Div", ["zero", "less"], ["quotient"]),
        helper.make_node("Cast", ["quotient"], ["factor"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "factor"], ["y"], name="product"),
    ]
    weights = [
        numpy_helper.from_array(np.array([number]), name)
        for name, number in (("zero", 0), ("less", -1))
    ]
    ends = [value("x", ["n", 2])], [value("y", ["n", 2])]
    whole = model(nodes, *ends, weights).SerializeToString()
    random = np.random.default_rng(1)
    flips = [np.array([8 * (whole.index(bytes(8)) + 8) - 1])]
    flips += [random.integers(0, 8 * len(whole), count) for count in (1, 1, 1, 1, 2, 2, 3, 4, 8)]

    def probed(bits: npt.NDArray[np.int64]) -> Probe | LraiError:
        content = bytearray(whole)
        for bit in bits.tolist():
            content[bit // 8] ^= 1 << bit % 8
        path = tmp_path / f"{'-'.join(map(str, bits))}.onnx"
        path.write_bytes(content)
        try:
            return probe(path)
        except LraiError as error:
            return error

    found = list(on_all_cpus(probed, flips, threads=1))
    assert {Probe, CompileError} <= {type(one) for one in found}


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where temporary files go, here and in children."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)  # what is known already
    return folder


@pytest.mark.parametrize("opset", [17, 13])
def test_what_kills_who_runs_it_costs_a_child_at_most(
    tmp_path: Path, scratch: Path, opset: int
) -> None:
    """The dividend is known when it runs only, so that nothing is folded when it is loaded."""
    nodes = [
        helper.make_node("Mul", ["x", "none"], ["nothing"]),
        helper.make_node("Cast", ["nothing"], ["whole"], to=onnx.TensorProto.INT64),
        helper.make_node("Add", ["whole", "zero"], ["dividend"]),
        helper.make_node("Div", ["dividend", "less"], ["y"]),
    ]
    weights = [
        numpy_helper.from_array(np.zeros(1, np.float32), "none"),
        numpy_helper.from_array(np.array([np.iinfo(np.int64).min]), "zero"),  # its sign is flipped
        numpy_helper.from_array(np.array([-1]), "less"),
    ]
    ends = [value("x", ["n", 2])], [value("y", ["n", 2], onnx.TensorProto.INT64)]
    path = save(model(nodes, *ends, weights, opset=opset), tmp_path / "m.onnx")
    with pytest.raises(CompileError, match=r"was killed \(signal 8\); the file may be damaged"):
        probe(path)
    assert [one.name for one in scratch.iterdir()] == []
    lrai = Path(sys.executable).with_name("lrai")
    command = [str(lrai), "compile", str(path), "-o", str(tmp_path / "m.lrai")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr
    assert done.stderr.startswith("lrai: m.onnx cannot be read: its process was killed (signal 8)")
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_without_room_for_temporary_files_nothing_is_said_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(EnvironmentProblem, match="no folder for temporary files: No such file"):
        probe(save(linear(), tmp_path / "m.onnx"))
