"""Forms that a folder keeps: made once, found again, never taken for those of something else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import openvino as ov
import pytest

import lrai_core as lrai
from lrai_core.compiler.model import SharedWeights, declared
from lrai_core.compiler.search import Builder, Built, Material, Reject, Sample, find_builder
from lrai_core.engine.engine import find_engine
from lrai_engines import fusion
from lrai_engines.kept import Kept
from tests.core.compiler.onnx_files import linear, save

Refused = list[tuple[str, str]]


class Asked:
    """A model and rows, of which forms are wanted in a folder that keeps them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.proto, self.rows = folder, linear(64, 32), 20
        self.threads = 1
        self.axis: int | None = 0
        self.output_map = "raw"

    def material(self) -> Material:
        """Write the source anew, as each compilation does, and return what forms are made of."""
        source = self.folder / "sources" / str(len(list(self.folder.rglob("source.onnx"))))
        source.mkdir(parents=True)
        proto, shared = onnx.ModelProto(), SharedWeights(source)
        proto.CopyFrom(self.proto)
        shared.write(proto, source / "source.onnx")
        drawn = np.random.default_rng(1).standard_normal((self.rows, 1, 64)).astype(np.float32)
        signature = declared(proto)
        outputs, inputs = (
            [msgspec.structs.replace(spec, batch_axis=self.axis, **more) for spec in side]
            for side, more in (
                (signature.outputs, {"output_map": self.output_map}),
                (signature.inputs, {}),
            )
        )
        sample = Sample([[row] for row in drawn], outputs, inputs)
        return Material(proto, shared, self.folder / "cache", sample, self.threads)

    def forms(self, builder: Builder) -> tuple[list[Built], Refused]:
        refused: Refused = []
        return list(builder.build(self.material(), lambda *why: refused.append(why))), refused


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    return Asked(tmp_path)


@pytest.fixture(params=["onnxruntime", "openvino"])
def builder(request: pytest.FixtureRequest) -> Builder:
    return find_builder(request.param)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list of what is optimised, or saved by OpenVINO, from now on."""
    seen, optimise, save_model = list[str](), fusion.optimise, ov.save_model

    def optimised(model: Any, **options: Any) -> Any:
        if options["level"] == "all":
            seen.append("optimised")
        return optimise(model, **options)

    def saved(network: Any, file: Path, **options: Any) -> None:
        seen.append(file.parent.name)
        save_model(network, file, **options)

    monkeypatch.setattr(fusion, "optimise", optimised)
    monkeypatch.setattr(ov, "save_model", saved)
    return seen


def notes(asked: Asked) -> list[Path]:
    return sorted((asked.folder / "cache").glob("*/*.json"))


def folders(asked: Asked) -> list[str]:
    """Return the names of what forms were made in."""
    return [path.name for path in (asked.folder / "cache").glob("*/*/")]


def test_what_was_made_is_found_again_and_why_there_is_nothing_to_make(
    asked: Asked, builder: Builder, written: list[str]
) -> None:
    first = asked.forms(builder)
    assert first[0]
    assert first[1]
    made = len(written)
    assert asked.forms(builder) == first
    assert len(written) == made > 0


def test_what_was_made_with_another_number_of_threads_is_taken(
    asked: Asked, builder: Builder, written: list[str]
) -> None:
    first, made = asked.forms(builder), len(written)
    asked.threads = 2
    assert asked.forms(builder) == first
    assert len(written) == made


def test_what_is_found_runs_with_the_weights_of_another_compilation(
    asked: Asked, builder: Builder
) -> None:
    asked.forms(builder)
    material, told = asked.material(), dict[str, Any]()
    assert material.sample is not None
    row = material.sample.rows[0][0]
    for built in builder.build(material, lambda *_: None):
        weights = material.shared.folder if built.shared else None
        session = builder.engine.load(built.graph, weights=weights, threads=1)
        told[built.form] = session.run([row])[0]
    exact = row @ onnx.numpy_helper.to_array(linear(64, 32).graph.initializer[0])
    for answer in told.values():
        np.testing.assert_allclose(answer, exact, atol=0.5)


@pytest.mark.parametrize(
    "other",
    [{"proto": linear(64, 31)}, {"rows": 21}, {"axis": None}, {"output_map": "softmax"}],
    ids=lambda other: next(iter(other)),
)
def test_what_was_made_of_something_else_is_not_taken(
    asked: Asked, builder: Builder, written: list[str], other: dict[str, Any]
) -> None:
    asked.forms(builder)
    before = set(notes(asked))
    written.clear()
    for name, value in other.items():
        setattr(asked, name, value)
    asked.forms(builder)
    assert written
    assert set(notes(asked)) - before, "it has a place of its own"


def test_what_an_interrupt_left_half_made_is_made_again(
    asked: Asked, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    builder, counted = find_builder("onnxruntime"), fusion.optimise

    def interrupted(model: Any, **options: Any) -> Any:
        if len(written) > 3:
            raise KeyboardInterrupt
        return counted(model, **options)

    with monkeypatch.context() as patched:
        patched.setattr(fusion, "optimise", interrupted)
        with pytest.raises(KeyboardInterrupt):
            asked.forms(builder)
    begun, kept = len(written), notes(asked)
    assert kept
    assert {note.stem for note in kept} == {name.partition(".")[0] for name in folders(asked)}
    found = asked.forms(builder)
    again = len(written) - begun
    asked.folder /= "elsewhere"
    written.clear()
    whole = asked.forms(builder)
    assert [built.form for built in found[0]] == [built.form for built in whole[0]]
    assert 0 < again < len(written)


def empty(note: Path) -> None:
    note.write_bytes(b"")


def of_another_kind(note: Path) -> None:
    note.write_bytes(note.read_bytes().replace(b'"built":[', b'"built":[3,'))


def no_utf8(note: Path) -> None:
    note.write_bytes(note.read_bytes().replace(b'"form":"', b'"form":"\xff'))


def a_path_that_is_a_number(note: Path) -> None:
    of = msgspec.json.decode(note.read_bytes())
    of["built"] = [one | {"graph": 3} for one in of["built"]]
    note.write_bytes(msgspec.json.encode(of))


def a_path_above(note: Path) -> None:
    note.write_bytes(note.read_bytes().replace(b"model.", b"../../../model."))


def a_folder_above(note: Path) -> None:
    note.write_bytes(note.read_bytes().replace(b'"folder":"', b'"folder":"../'))


def of_another_form(note: Path) -> None:
    of = msgspec.json.decode(note.read_bytes())
    of["built"] = [one | {"form": "../../x"} for one in of["built"]]
    note.write_bytes(msgspec.json.encode(of))


def without_its_files(note: Path) -> None:
    folder = note.parent / msgspec.json.decode(note.read_bytes())["folder"]
    next(folder.rglob("model.*")).unlink()


def cut_off(note: Path) -> None:
    folder = note.parent / msgspec.json.decode(note.read_bytes())["folder"]
    file = next(folder.rglob("model.*"))
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage",
    [
        empty,
        of_another_kind,
        no_utf8,
        a_path_that_is_a_number,
        a_path_above,
        a_folder_above,
        of_another_form,
        without_its_files,
        cut_off,
    ],
)
def test_what_is_damaged_is_made_again(
    asked: Asked, builder: Builder, written: list[str], damage: Callable[[Path], None]
) -> None:
    first = asked.forms(builder)
    for note in notes(asked):
        if b'"built":[]' not in note.read_bytes():
            damage(note)
    made = len(written)
    second = asked.forms(builder)
    assert len(written) == 2 * made
    assert [built.form for built in second[0]] == [built.form for built in first[0]]
    assert all(built.graph.is_file() for built in second[0])


def test_what_failed_is_tried_another_time(
    asked: Asked, builder: Builder, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **options: Any) -> Any:
        if options.get("level") != "basic":
            raise RuntimeError if "compress_to_fp16" in options else lrai.CompileError("no memory")
        return optimise(*_, **options)

    optimise = fusion.optimise
    with monkeypatch.context() as patched:
        patched.setattr(fusion, "optimise", failing)
        patched.setattr(ov, "save_model", failing)
        built, refused = asked.forms(builder)
    assert not built
    assert refused
    assert {note.stem for note in notes(asked)} == {
        name.partition(".")[0] for name in folders(asked)
    }
    assert asked.forms(builder)[0]


def test_a_compilation_finds_what_another_has_made(tmp_path: Path, written: list[str]) -> None:
    model = save(linear(64, 32), tmp_path / "m.onnx")
    rows = {"x": np.random.default_rng(1).standard_normal((400, 64)).astype(np.float32)}

    def compiled(name: str, cache: Path | None) -> lrai.Artifact:
        return lrai.compile(model, out=tmp_path / name, evaluation=rows, cache=cache, threads=1)

    compiled("first.lrai", tmp_path / "cache")
    made = len(written)
    second = compiled("second.lrai", tmp_path / "cache")
    assert len(written) == made
    assert {path.name for path in second.path.iterdir()} == {
        path.name for path in compiled("third.lrai", None).path.iterdir()
    }
    x = np.ones((1, 64), np.float32)
    with lrai.Runtime.open(second, name="m") as runtime:
        asked = lrai.InferenceRequest(model_name="m", inputs={"x": x})
        exact = x @ onnx.numpy_helper.to_array(linear(64, 32).graph.initializer[0])
        np.testing.assert_allclose(runtime.infer(asked).outputs["y"], exact, atol=0.5)


def test_no_form_but_fp32_is_begun_when_the_minutes_are_up(asked: Asked) -> None:
    builder, refused = find_builder("onnxruntime"), dict[str, str]()
    whole = {built.form for built in asked.forms(builder)[0]}
    asked.folder /= "elsewhere"
    late = replace(asked.material(), until=-math.inf)
    found = [built.form for built in builder.build(late, refused.__setitem__)]
    assert set(found) == {"fp32"} < whole
    assert set(refused.values()) == {"not made: the minutes are up"}
    assert whole - {"fp32"} <= refused.keys()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return the clock that forms go by: it stands at what `now` is."""
    told = SimpleNamespace(now=0.0)
    told.monotonic = lambda: told.now
    monkeypatch.setattr("lrai_engines.kept.time", told)
    return told


def test_what_is_half_made_when_the_minutes_are_up_is_made_again(
    asked: Asked, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*given: Any, **options: Any) -> Any:
        if options["level"] == "all" and notes(asked):  # fp32 is there
            clock.now = 2.0
        return optimise(*given, **options)

    optimise, refused = fusion.optimise, dict[str, str]()
    builder, material = find_builder("onnxruntime"), replace(asked.material(), until=1.0)
    with monkeypatch.context() as patched:
        patched.setattr(fusion, "optimise", slow)
        built = [one.form for one in builder.build(material, refused.__setitem__)]
    half = built[-1]
    assert built.count(half) == 1
    assert half != "fp32"
    assert "not made: the minutes are up" in [why for n, why in refused.items() if f"{half} (" in n]
    assert half not in [note.stem for note in notes(asked)]
    assert half in [one.form for one in asked.forms(builder)[0]]
    assert half in [note.stem for note in notes(asked)]


def test_what_is_whole_when_the_minutes_are_up_is_kept(
    asked: Asked, clock: SimpleNamespace
) -> None:
    def make(home: Path, reject: Reject) -> Iterator[Built]:
        for name in ("first", "second"):
            file = home / name / "model.onnx"
            file.parent.mkdir()
            file.touch()
            clock.now += 1.0
            yield Built("int8-row", "int8", file, 0)

    kept = Kept(replace(asked.material(), until=1.0), find_engine("onnxruntime"))
    first = list(kept.forms("int8-row", make, lambda *_: None))
    assert [built.graph.parent.name for built in first] == ["first", "second"]
    assert clock.now == 2.0
    assert list(kept.forms("int8-row", make, lambda *_: None)) == first
