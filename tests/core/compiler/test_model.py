"""Which importer reads a file, and what is said where none can."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
from onnx import helper

import lrai_core as lrai
from lrai_core.compiler import model as module
from lrai_core.compiler.model import load_model
from tests.core.compiler.onnx_files import linear, model, save, value

Notes = list[str]


def import_odd(path: Path, notify: Callable[[str], None]) -> lrai.Imported:
    """Stand for the importer of another framework."""
    if not path.read_bytes():
        raise lrai.CompileError(f"{path.name}: empty")
    notify("exported")
    return lrai.Imported(model=linear(), sha256="ab", opset=17)


def import_folder(path: Path, notify: Callable[[str], None]) -> lrai.Imported:
    """Stand for the importer of folders."""
    return lrai.Imported(model=linear(), sha256=path.name, opset=17)


ONNX, ODD = "lrai_import.onnx:load", f"{__name__}:{import_odd.__name__}"


def install(monkeypatch: pytest.MonkeyPatch, **importers: str) -> None:
    """Let these be the importers, by suffix: `module:function`."""

    def entry_points(*, group: str) -> EntryPoints:
        assert group == "lrai.importers"
        return EntryPoints(EntryPoint(name, place, group) for name, place in importers.items())

    monkeypatch.setattr(module, "entry_points", entry_points)


def test_an_onnx_file_is_read_by_the_importer_that_is_installed(tmp_path: Path) -> None:
    proto, source = load_model(save(linear(), tmp_path / "m.onnx"), Notes().append)
    assert proto == linear()
    assert (source.opset, source.operators) == (17, 1)


@pytest.mark.parametrize("name", ["m", "m.bin", "m.ONNX", "m.onnx.backup"])
def test_onnx_is_read_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    proto, _ = load_model(save(linear(), tmp_path / name), Notes().append)
    assert proto == linear()


def test_a_suffix_is_read_by_the_importer_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, onnx=ONNX, odd=ODD)
    (tmp_path / "m.odd").write_bytes(b"an odd model")
    notes = Notes()
    proto, source = load_model(tmp_path / "m.odd", notes.append)
    assert proto == linear()
    assert (source.sha256, source.operators, notes) == ("ab", 1, ["exported"])
    (tmp_path / "m.odd").write_bytes(b"")
    with pytest.raises(lrai.CompileError, match=r"^m\.odd: empty$"):
        load_model(tmp_path / "m.odd", notes.append)


def test_a_folder_is_read_by_the_importer_of_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, onnx=ONNX, SavedModel=f"{__name__}:{import_folder.__name__}")
    (tmp_path / "m.onnx").mkdir()
    assert load_model(tmp_path / "m.onnx", Notes().append)[1].sha256 == "m.onnx"


def test_a_name_that_no_file_can_have_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(lrai.CompileError, match="File name too long"):
        load_model(tmp_path / ("m" * 300), Notes().append)


def test_a_suffix_without_importer_is_refused_naming_those_that_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, onnx=ONNX, odd=ODD)
    (tmp_path / "m.pt").write_bytes(b"no ONNX")
    with pytest.raises(
        lrai.CompileError, match=r"not an ONNX model.*no importer is for '\.pt', .*odd, onnx"
    ) as refused:
        load_model(tmp_path / "m.pt", Notes().append)
    assert refused.value.exit_code == 4


def test_an_operator_is_still_named_under_another_suffix(tmp_path: Path) -> None:
    node = helper.make_node("Magic", ["x"], ["y"], name="wand", domain="com.example")
    domains = [("com.example", 1)]
    proto = model([node], [value("x", ["n"])], [value("y", ["n"])], domains=domains)
    with pytest.raises(lrai.UnsupportedOperator, match=r"wand.*no importer is for '\.bin'"):
        load_model(save(proto, tmp_path / "m.bin"), Notes().append)


@pytest.mark.parametrize(
    "importers",
    [{}, {"odd": ODD}, {"onnx": "lrai_import.absent:load"}, {"onnx": "lrai_import.onnx:absent"}],
)
def test_an_install_without_the_importer_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, importers: dict[str, str]
) -> None:
    install(monkeypatch, **importers)
    path = save(linear(), tmp_path / "m.onnx")
    with pytest.raises(
        lrai.EnvironmentProblem, match=r"^the importer of onnx files is not.*install lrai again$"
    ) as refused:
        lrai.compile(path, out=tmp_path / "m.lrai")
    assert refused.value.exit_code == 5
    assert not (tmp_path / "m.lrai").exists()


def compile_odd(model: object, **options: Any) -> tuple[object, dict[str, Any]]:
    """Stand for what compiles models in memory."""
    return model, options


def test_what_is_no_file_is_compiled_by_the_importer_of_objects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, Object=f"{__name__}:{compile_odd.__name__}")
    given = object()
    made: Any = lrai.compile(given, out="m.lrai", threads=2)
    assert made[0] is given
    assert made[1] | {"out": "m.lrai", "threads": 2, "keep": None} == made[1]
    with pytest.raises(lrai.EnvironmentProblem, match="importer of onnx files is not installed"):
        lrai.compile(Named("m.onnx"), out="m.lrai")


class Named:
    """A path of another library."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return self.path
