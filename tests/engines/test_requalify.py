"""An artifact made on another machine: what of it is right and fast here, and who goes by that."""

from __future__ import annotations

import json
import os
import re
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import lrai_core as lrai
from lrai_core import confidence
from lrai_core.artifact import (
    GateResult,
    LatencyPoint,
    Target,
    Variant,
    write_lines,
    write_manifest,
)
from lrai_core.compiler import search
from lrai_core.compiler.search import Candidate
from lrai_core.errors import CalibrationError, EngineError
from lrai_core.fairness import Disparity
from lrai_core.verifier import verifier
from lrai_core.verifier.certificate import Spec, certificates
from lrai_deployments.measured import keep, place
from lrai_engines import requalify as command
from lrai_engines.requalify import requalify
from tests.core import small_artifact
from tests.core.compiler.onnx_files import linear, save
from tests.own_runtime import own_runtime

X = np.ones((2, 3), np.float32)


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRAI_RUNTIME_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Have variants be as fast as they are told to be: their speed-up here, by id."""
    paces = {"int8": 2.0}

    def profile(candidates: Sequence[Candidate], *_: object) -> None:
        for one in candidates:
            one.speedup = paces.get(one.form, 1.0)
            point = LatencyPoint(rows=1, length=0, median_ms=1 / one.speedup, spread_ms=0.0)
            one.latency = [point]

    monkeypatch.setattr(search, "profile", profile)
    return paces


def foreign(path: Path, *, factor: float = 2.001, rows: int = 200) -> lrai.Artifact:
    """Return an artifact of another machine, which certified there what it serves."""
    small_artifact.build(
        path, factor=factor, evaluation=small_artifact.rows(rows) if rows else None
    )
    target = msgspec.to_builtins(small_artifact.manifest().target)
    small_artifact.rewrite(path, {"target": target | {"isa": "mill"}})
    artifact = lrai.Artifact.open(path)
    if rows:
        (made,) = verifier.verify(artifact, Spec(epsilon=0.01))
        file = path / "certificates" / f"{made.id}.json"
        file.write_text(file.read_text().replace(made.environment, "mill with onnxruntime 1"))
    return artifact


def serving(artifact: lrai.Artifact) -> tuple[str, str | None, list[str]]:
    """Return who serves it, by which certificate, and the kinds of events that were seen."""
    seen: list[lrai.Event] = []
    with lrai.Runtime.open(artifact.path, name="m", observers=[seen.append]) as runtime:
        (model,) = runtime.models()
        answer = runtime.infer(lrai.InferenceRequest(model_name="m", inputs={"x": X}))
        assert answer.parameters["variant"] == model.variant
        assert answer.model_version == artifact.version
        assert np.abs(answer.outputs["y"] - 2).max() < 0.01
        return model.variant, model.certificate, [event.kind for event in seen]


def run(artifact: lrai.Artifact, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises((SystemExit, lrai.ConditionNotMet)) as ended:
        command.main([str(artifact.path)])
    end = ended.value
    return capsys.readouterr().out + (f"exit 3: {end}" if isinstance(end, lrai.LraiError) else "")


def test_what_is_right_and_faster_here_serves_with_a_certificate_of_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = foreign(tmp_path / "m.lrai")
    before = (artifact.path / "manifest.json").read_bytes()
    variant, certificate, kinds = serving(artifact)
    assert (variant, certificate) == ("fp32", None)
    assert "variant_refused" in kinds
    said = run(artifact, capsys)
    assert "made for mill with onnxruntime" in said
    assert "* serves here, from the next load on: int8" in said
    variant, certificate, kinds = serving(artifact)
    assert variant == "int8"
    assert "variant_refused" not in kinds
    (own,) = [c for c in certificates(artifact, "int8") if c.id == certificate]
    assert own.epsilon == 0.01
    assert own.environment == verifier.environment(artifact.variants[0])
    assert (artifact.path / "manifest.json").read_bytes() == before


def test_a_certificate_is_demanded_of_what_was_measured_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact, demand = foreign(tmp_path / "m.lrai"), {"epsilon": 0.01, "delta": 0.02}
    with pytest.raises(lrai.ConditionNotMet, match="made for another processor class"):
        lrai.Runtime.open(artifact.path, require=demand).close()
    run(artifact, capsys)
    with lrai.Runtime.open(artifact.path, require=demand) as runtime:
        assert runtime.models()[0].variant == "int8"
    with pytest.raises(lrai.ConditionNotMet, match="no certificate that meets"):
        lrai.Runtime.open(artifact.path, require=demand | {"epsilon": 1e-4}).close()


def test_what_is_wrong_here_does_not_serve_however_fast(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = foreign(tmp_path / "m.lrai", factor=2.2)
    assert "exit 3: no variant but fp32 is right here and faster" in run(artifact, capsys)
    assert serving(artifact)[0] == "fp32"
    with lrai.Runtime.open(artifact) as runtime:
        runtime.load(artifact.path, name="n", variant="int8")
        assert {model.variant for model in runtime.models()} == {"fp32"}, "as before"


def test_what_is_no_faster_here_does_not_serve(
    tmp_path: Path, told: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    told["int8"] = 1.03
    artifact = foreign(tmp_path / "m.lrai")
    assert "exit 3" in run(artifact, capsys)
    assert serving(artifact)[0] == "fp32"


@pytest.mark.parametrize("home", [True, False])
def test_where_the_source_optimised_here_is_fastest_it_serves(
    tmp_path: Path, told: dict[str, float], capsys: pytest.CaptureFixture[str], *, home: bool
) -> None:
    """Also where the machine at home is of the same class, so that all would fit."""
    artifact = foreign(tmp_path / "m.lrai")
    if home:
        target = msgspec.to_builtins(small_artifact.manifest().target)
        small_artifact.rewrite(artifact.path, {"target": target})
        artifact = lrai.Artifact.open(artifact.path)
        assert serving(artifact)[0] == "int8"
    told.update(int8=0.5, fp32=0.5)  # as a graph laid out for other registers is
    said = run(artifact, capsys)
    assert "exit 3: no variant but fp32 is right here and faster: the source model" in said
    variant, _, kinds = serving(artifact)
    assert variant == "fp32"
    assert "variant_refused" in kinds, "the graph of fp32 is not what serves"


def test_what_is_wrong_here_does_not_serve_though_home_is_of_the_same_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = foreign(tmp_path / "m.lrai", factor=2.2)
    target = msgspec.to_builtins(small_artifact.manifest().target)
    small_artifact.rewrite(artifact.path, {"target": target})
    artifact = lrai.Artifact.open(artifact.path)
    assert "exit 3" in run(artifact, capsys)
    assert serving(artifact)[0] == "fp32"


def test_what_another_version_of_the_engine_measured_counts_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = foreign(tmp_path / "m.lrai")
    target = msgspec.to_builtins(small_artifact.manifest().target)
    small_artifact.rewrite(artifact.path, {"target": target})
    artifact = lrai.Artifact.open(artifact.path)
    told_here = requalify(artifact, threads=1).manifest
    older = msgspec.structs.replace(told_here.target, engine_version="1.31.0")
    stale = msgspec.structs.replace(told_here, target=older, chosen="fp32")
    keep(artifact, stale, lrai.load_config())
    assert serving(artifact)[0] == "int8", "as at home, which is here"


def test_the_bound_of_what_was_demanded_elsewhere_pays_for_all_forms_and_the_checker_agrees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = foreign(tmp_path / "m.lrai")
    small_artifact.rewrite(artifact.path, {"demanded": [0.01, 0.016], "candidates": 5})
    artifact = lrai.Artifact.open(artifact.path)
    (made,) = verifier.verify(artifact, Spec(epsilon=0.01))
    run(artifact, capsys)
    own = next(c for c in certificates(artifact, "int8"))
    assert own.upper_bound == pytest.approx(1 - 0.01 ** (1 / 200))  # 5 % shared by five
    assert lrai.check(own, artifact).holds
    assert made.upper_bound == own.upper_bound


def with_a_farther_one(path: Path, rows: int, factor: float = 2.2) -> lrai.Artifact:
    """Return an artifact whose int8 is wrong here, with a right form that was farther at home."""
    artifact = foreign(path, factor=factor, rows=rows)
    variants = [msgspec.to_builtins(variant) for variant in artifact.variants]
    variants.insert(0, {**variants[0], "id": "int8-far", "model": "variants/fp32/model.onnx"})
    (artifact.path / "manifest.json").unlink()
    log = [{"event": "searched", "form": "int8 without P", "gap": 0.1}]
    log.append({"event": "searched", "form": "int8-far", "gap": 0.2})
    write_lines(artifact.path / "quantization.jsonl", log)
    built = msgspec.convert([*variants], tuple[Variant, ...])
    write_manifest(artifact.path, msgspec.structs.replace(artifact.manifest, variants=built))
    return lrai.Artifact.open(path)


def test_the_closest_at_home_is_judged_first_and_the_first_that_fails_ends_it(
    tmp_path: Path,
) -> None:
    found = requalify(with_a_farther_one(tmp_path / "m.lrai", rows=170), threads=1)
    assert "relative error" in found.verdicts["int8"]
    assert found.verdicts["int8-far"] == "int8 is closer, and failed"


@pytest.mark.parametrize("factor", [2.2, 2.001], ids=["fails", "passes"])
def test_where_rows_are_many_each_has_its_part_of_the_error_whatever_becomes_of_others(
    tmp_path: Path, told: dict[str, float], factor: float
) -> None:
    """What follows has to pass by its own half, of which 300 rows without a fault are enough."""
    artifact = with_a_farther_one(tmp_path / "m.lrai", rows=300, factor=factor)
    told["int8-far"] = 3.0
    found = requalify(artifact, threads=1)
    assert "relative error" in found.verdicts["int8"]
    least = 1 - confidence.upper_bound(0, 300, 1 - 0.05 / 2)
    assert f"at least {confidence.percent(least, -1)}" in found.verdicts["int8-far"]
    assert found.manifest.chosen == "int8-far"


def test_memory_that_long_calls_lack_leaves_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, float]
) -> None:
    artifact, profiles = foreign(tmp_path / "m.lrai"), list[int]()
    told["int8"] = 3.0
    first = search.profile

    def profile(*given: Any) -> None:
        profiles.append(1)
        if len(profiles) > 1:
            raise EngineError("no memory")
        first(*given)

    monkeypatch.setattr(search, "profile", profile)
    found = requalify(artifact, threads=1)
    assert len(profiles) == 2
    assert found.manifest.chosen == "int8"


def test_where_memory_was_wanted_the_smallest_that_is_right_here_serves(
    tmp_path: Path, told: dict[str, float]
) -> None:
    artifact = foreign(tmp_path / "m.lrai")
    told["int8"] = 1.01  # for speed that would not do
    assert requalify(artifact, threads=1).manifest.chosen == "fp32"
    variants = [msgspec.to_builtins(variant) for variant in artifact.variants]
    sizes = {"int8": 10, "fp32": 40}
    given = [variant | {"size_bytes": sizes[variant["id"]]} for variant in variants]
    small_artifact.rewrite(artifact.path, {"objective": "memory", "variants": given})
    wanted = lrai.Artifact.open(artifact.path)
    assert requalify(wanted, threads=1).manifest.chosen == "int8"
    told["int8"] = 0.99
    assert requalify(wanted, threads=1).manifest.chosen == "fp32"


@pytest.mark.parametrize("threads", [1, 2])
def test_variants_serve_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    artifact = with_a_farther_one(tmp_path / "m.lrai", rows=300, factor=2.001)
    times = {"int8": (1.0, 3.0), "int8-far": (3.0, 1.5)}

    def profile(candidates: Sequence[Candidate], *_: object) -> None:
        for one in candidates:
            one.latency = [
                LatencyPoint(rows=rows, length=0, median_ms=ms, spread_ms=0.0)
                for rows, ms in zip((1, 8), times.get(one.form, (4.0, 4.0)), strict=True)
            ]
            one.speedup = {"int8": 2.3, "int8-far": 1.9}.get(one.form, 1.0)

    monkeypatch.setattr(search, "profile", profile)
    manifest = requalify(artifact, threads=threads).manifest
    assert (manifest.chosen, manifest.together) == ("int8", ("int8-far",))


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b'{"event": 3}', b'{"event": "searched", "gap": "x"}']
)
def test_a_log_that_is_none_is_said_to_be(tmp_path: Path, line: bytes) -> None:
    artifact = foreign(tmp_path / "m.lrai")
    (artifact.path / "manifest.json").unlink()
    (artifact.path / "quantization.jsonl").write_bytes(line)
    write_manifest(artifact.path, artifact.manifest)
    with pytest.raises(lrai.ArtifactError, match=r"quantization\.jsonl cannot be read"):
        requalify(lrai.Artifact.open(artifact.path), threads=1)


def test_what_was_compiled_with_groups_is_not_judged_without_them(tmp_path: Path) -> None:
    artifact = foreign(tmp_path / "m.lrai")
    variants = [msgspec.to_builtins(variant) for variant in artifact.variants]
    disparity = Disparity("sex", "demographic_parity", 0.1, 0.1, 0.005, ("f", "m"))
    gate = GateResult(passed=True, why="", rows=200, measure="", disparities=(disparity,))
    variants[0]["gate"] = msgspec.to_builtins(gate)
    small_artifact.rewrite(artifact.path, {"variants": variants})
    found = requalify(lrai.Artifact.open(artifact.path), threads=1)
    assert found.verdicts["int8"] == "groups can only be judged at home"
    assert found.manifest.chosen == "fp32"


def labelled(path: Path, lines: list[list[Any]], asked: dict[str, Any]) -> lrai.Artifact:
    """Return an artifact whose int8 is farther than 1 % and right, with labels of its rows."""
    artifact = foreign(path, factor=2.05, rows=400)
    (artifact.path / "manifest.json").unlink()
    write_lines(artifact.path / "labels.jsonl", lines)
    write_lines(artifact.path / "quantization.jsonl", [{"event": "asked", **asked}])
    write_manifest(artifact.path, artifact.manifest)
    return lrai.Artifact.open(path)


def classes() -> list[list[Any]]:
    return [["label"], *([int(row[0].argmax())] for row in small_artifact.rows(400).inputs)]


def test_what_was_judged_by_labels_is_judged_by_them_here(tmp_path: Path) -> None:
    found = requalify(labelled(tmp_path / "m.lrai", classes(), {}), threads=1)
    assert "top1 loss is 0.00%, at most 0.92%; 1.00% allowed" in found.verdicts["int8"]
    assert found.manifest.chosen == "int8"
    assert "accuracy was judged at home" not in found.manifest.variants[0].why
    without = requalify(foreign(tmp_path / "n.lrai", factor=2.05), threads=1)
    assert "relative error" in without.verdicts["int8"]
    assert without.manifest.chosen == "fp32"


def test_what_was_demanded_of_accuracy_is_demanded_here(tmp_path: Path) -> None:
    lines = classes()
    del lines[201:]
    with pytest.raises(lrai.ArtifactError, match="200 lines of 400 rows"):
        requalify(labelled(tmp_path / "l.lrai", lines, {}), threads=1)
    asked = {"metric": "top5", "max_accuracy_loss": 0.05, "epsilon": None, "groups": []}
    with pytest.raises(CalibrationError, match="top5 says nothing of 3 classes"):
        requalify(labelled(tmp_path / "n.lrai", classes(), asked), threads=1)


def test_where_rows_are_too_few_for_labels_agreement_judges(tmp_path: Path) -> None:
    """Of which 409 are needed here, and 400 were kept."""
    strict = labelled(tmp_path / "m.lrai", classes(), {"max_accuracy_loss": 0.009})
    assert "relative error" in requalify(strict, threads=1).verdicts["int8"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (["x"], "invalid literal"),
        ([1.5], "Expected `bool | int | str`"),
        ([1 << 70], "cannot be read"),
        ([1, "f"], "argument 401 is longer"),
        ([], "argument 401 is shorter"),
        ({}, "Expected `array`"),
        ([7], "labels are 0 to 7, classes 0 to 2"),
    ],
)
def test_labels_that_are_none_are_said_to_be(tmp_path: Path, line: Any, why: str) -> None:
    lines: list[Any] = [*classes()[:-1], line]
    with pytest.raises((lrai.ArtifactError, CalibrationError), match=re.escape(why)):
        requalify(labelled(tmp_path / "m.lrai", lines, {}), threads=1)


def test_what_was_judged_by_groups_is_judged_by_them_here(
    tmp_path: Path, told: dict[str, float]
) -> None:
    """By the margin that was demanded, for which the rows of another one would not do."""
    told["int8-row"] = 2.0
    proto = linear(classes=2)
    x = np.random.default_rng(1).standard_normal((1000, 8)).astype(np.float32)
    scores = x @ numpy_helper.to_array(proto.graph.initializer[0])
    artifact = lrai.compile(
        save(proto, tmp_path / "m.onnx"),
        out=tmp_path / "m.lrai",
        evaluation={"x": x, "label": scores[:, 1] > scores[:, 0], "sex": np.arange(1000) % 2},
        groups=["sex"],
        max_disparity=0.1,
        max_accuracy_loss=0.05,
        threads=1,
    )
    assert artifact.manifest.chosen == "int8-row"
    target = msgspec.to_builtins(artifact.manifest.target) | {"isa": "mill"}
    small_artifact.rewrite(artifact.path, {"target": target})
    found = requalify(lrai.Artifact.open(artifact.path), threads=1)
    assert found.manifest.chosen == "int8-row"
    gate = found.manifest.variant("int8-row").gate
    assert gate is not None
    assert set(gate.groups["sex"]) == {"0", "1"}
    assert {one.attribute for one in gate.disparities} == {"sex"}
    (artifact.path / "manifest.json").unlink()
    (artifact.path / "labels.jsonl").unlink()
    before = msgspec.structs.replace(artifact.manifest, target=msgspec.convert(target, Target))
    write_manifest(artifact.path, before)
    found = requalify(lrai.Artifact.open(artifact.path), threads=1)
    assert found.verdicts["int8-row"] == "groups can only be judged at home"


def test_what_loads_and_does_not_run_is_told_and_the_others_are_judged(tmp_path: Path) -> None:
    artifact = foreign(tmp_path / "m.lrai")
    graph = artifact.path / "variants" / "int8" / "model.onnx"
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 3]) for n in "xy"]
    shape = helper.make_tensor("s", TensorProto.INT64, [2], [7, 7])
    node = helper.make_node("Reshape", ["x", "s"], ["y"])
    made = helper.make_graph([node], "g", values[:1], values[1:], [shape])
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    graph.write_bytes(proto.SerializeToString())
    write_manifest(artifact.path, artifact.manifest)
    found = requalify(lrai.Artifact.open(artifact.path), threads=1)
    assert "cannot run the model" in found.verdicts["int8"]
    assert "relative error" in found.verdicts["fp32"]


@pytest.mark.parametrize("where", ["", "requalified"])
def test_nothing_is_written_where_others_may_write(tmp_path: Path, where: str) -> None:
    artifact = foreign(tmp_path / "m.lrai")
    folder = tmp_path / "state" / where
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(lrai.EnvironmentProblem, match="others may write to it"):
        keep(artifact, artifact.manifest, lrai.load_config())
    assert not list(folder.glob("**/*.json"))


def test_a_daemon_takes_the_folder_that_was_made_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LRAI_RUNTIME_STATE_DIR")
    with own_runtime() as folder:
        artifact = foreign(tmp_path / "m.lrai")
        assert f"kept in {folder}" in run(artifact, capsys)
        with lrai.Runtime.open(artifact.path, name="m", address="auto") as runtime:
            assert [model.variant for model in runtime.models()] == ["int8"]


def test_what_cannot_be_opened_here_is_told_and_left_out(tmp_path: Path) -> None:
    artifact = foreign(tmp_path / "m.lrai")
    variants = [msgspec.to_builtins(variant) for variant in artifact.variants]
    variants[0]["engine"] = "tensorrt"
    small_artifact.rewrite(artifact.path, {"variants": variants})
    found = requalify(lrai.Artifact.open(artifact.path), threads=1)
    assert "the engine 'tensorrt' is not installed" in found.verdicts["int8"]
    assert found.manifest.chosen == "fp32"


def test_closeness_that_was_demanded_is_demanded_here(tmp_path: Path) -> None:
    artifact = foreign(tmp_path / "m.lrai")
    small_artifact.rewrite(artifact.path, {"demanded": [0.0015, 0.05]})
    found = requalify(lrai.Artifact.open(artifact.path), threads=1)
    assert "rows differ by more than epsilon 0.0015" in found.verdicts["int8"]
    assert found.manifest.chosen == "fp32"


@pytest.mark.parametrize(
    ("rows", "message"), [(0, "kept no evaluation rows: .*--keep-evaluation N"), (20, "needs 149")]
)
def test_too_few_rows_are_refused(tmp_path: Path, rows: int, message: str) -> None:
    artifact = foreign(tmp_path / "m.lrai", rows=rows)
    with pytest.raises((lrai.UsageError, CalibrationError), match=message):
        requalify(artifact, threads=1)


def test_a_certificate_that_cannot_be_written_is_said_and_the_rest_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = foreign(tmp_path / "m.lrai")

    def refuse(*_: object) -> None:
        raise lrai.EnvironmentProblem("it cannot be written: Read-only file system")

    monkeypatch.setattr(command, "write_certificate", refuse)
    assert "was not kept: it cannot be written" in run(artifact, capsys)
    assert serving(artifact)[:2] == ("int8", None)


def _of_another(path: Path) -> None:
    content = json.loads(path.read_bytes())
    content["files"]["source/model.onnx"]["sha256"] = "0" * 64
    path.write_text(json.dumps(content))


def _without_the_chosen(path: Path) -> None:
    content = json.loads(path.read_bytes())
    content["variants"] = [one for one in content["variants"] if one["id"] != "int8"]
    path.write_text(json.dumps(content))


def _elsewhere(path: Path) -> None:
    content = json.loads(path.read_bytes())
    content["variants"][0]["model"] = "../../other.onnx"
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "spoil",
    [
        _of_another,
        _without_the_chosen,
        _elsewhere,
        lambda path: path.write_text("{"),
        lambda path: path.write_bytes(b"\x80\x04pickle"),
        lambda path: path.chmod(0o666),
        lambda path: path.parent.chmod(0o777),
        lambda path: (
            path.rename(path.with_suffix(".it")),
            path.symlink_to(path.with_suffix(".it")),
        ),
    ],
)
def test_what_may_not_be_believed_is_not_used(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], object],
) -> None:
    artifact = foreign(tmp_path / "m.lrai")
    run(artifact, capsys)
    assert serving(artifact)[0] == "int8"
    spoil(place(artifact, lrai.load_config()))
    assert serving(artifact)[0] == "fp32"
    assert "what was measured of small is not used" in caplog.text


def test_what_is_kept_is_its_users_alone(tmp_path: Path) -> None:
    artifact, config = foreign(tmp_path / "m.lrai"), lrai.load_config()
    keep(artifact, artifact.manifest, config)
    path = place(artifact, config)
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_what_does_not_fit_on_the_disk_leaves_nothing_there(tmp_path: Path) -> None:
    artifact, config = foreign(tmp_path / "m.lrai", rows=0), lrai.load_config()
    kept = keep(artifact, artifact.manifest, config)
    before, limits = kept.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(lrai.EnvironmentProblem, match="File too large"):
            keep(artifact, artifact.manifest, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(kept.parent.iterdir()) == [kept]
    assert kept.read_bytes() == before


def test_what_is_kept_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, sync = set[int](), os.fsync

    def synced(handle: int) -> None:
        written.add(os.fstat(handle).st_ino)
        sync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    artifact = foreign(tmp_path / "m.lrai", rows=0)
    kept = keep(artifact, artifact.manifest, lrai.load_config())
    assert {kept.stat().st_ino, kept.parent.stat().st_ino} <= written


@pytest.mark.parametrize("key", ["runtime.state_dir", "runtime.address"])
@pytest.mark.usefixtures("no_temporary_folder")
def test_without_a_temporary_folder_the_setting_to_use_is_named(key: str, tmp_path: Path) -> None:
    artifact = foreign(tmp_path / "m.lrai", rows=0)
    with pytest.raises(lrai.EnvironmentProblem, match=r"set runtime\.state_dir"):
        keep(artifact, artifact.manifest, lrai.load_config(environ={}))
    own = lrai.load_config(environ={}, call={key: str(tmp_path / "own")})
    assert keep(artifact, artifact.manifest, own).is_relative_to(tmp_path / "own")
