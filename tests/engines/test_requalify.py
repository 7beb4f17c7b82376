"""An artifact made on another machine: what of it is right and fast here, and who goes by that."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

import lrai_core as lrai
from lrai_core.artifact import LatencyPoint
from lrai_core.compiler import search
from lrai_core.compiler.search import Candidate
from lrai_core.errors import CalibrationError
from lrai_core.verifier import verifier
from lrai_core.verifier.certificate import Spec, certificates
from lrai_deployments.measured import keep, place
from lrai_engines import requalify as command
from lrai_engines.requalify import requalify
from tests.core import small_artifact

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
    assert "* serves here, from the next start of a runtime on: int8" in said
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
    lacks = pytest.raises(lrai.UsageError, match="no variant 'int8'; the artifact has fp32")
    with lrai.Runtime.open(artifact) as runtime, lacks:
        runtime.load(artifact.path, name="n", variant="int8")


def test_what_is_no_faster_here_does_not_serve(
    tmp_path: Path, told: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    told["int8"] = 1.03
    artifact = foreign(tmp_path / "m.lrai")
    assert "exit 3" in run(artifact, capsys)
    assert serving(artifact)[0] == "fp32"


def test_where_the_source_optimised_here_is_fastest_it_serves_and_nothing_is_kept(
    tmp_path: Path, told: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = foreign(tmp_path / "m.lrai")
    run(artifact, capsys)
    kept = place(artifact, lrai.load_config())
    assert kept.exists()
    told.update(int8=0.5, fp32=0.5)  # as a graph laid out for other registers is
    assert "exit 3" in run(artifact, capsys)
    assert not kept.exists()
    assert serving(artifact)[0] == "fp32"


def test_what_cannot_be_opened_here_is_told_and_left_out(tmp_path: Path) -> None:
    artifact = foreign(tmp_path / "m.lrai")
    variants = [msgspec.to_builtins(variant) for variant in artifact.variants]
    variants[0]["engine"] = "tensorrt"
    small_artifact.rewrite(artifact.path, {"variants": variants})
    found = requalify(lrai.Artifact.open(artifact.path), threads=1)
    assert "the engine 'tensorrt' is not installed" in found.verdicts["int8"]
    assert found.manifest is not None
    assert [variant.id for variant in found.manifest.variants] == ["fp32"]


def test_closeness_that_was_demanded_is_demanded_here(tmp_path: Path) -> None:
    artifact = foreign(tmp_path / "m.lrai")
    small_artifact.rewrite(artifact.path, {"demanded": [0.0015, 0.05]})
    found = requalify(lrai.Artifact.open(artifact.path), threads=1)
    assert "rows differ by more than epsilon 0.0015" in found.verdicts["int8"]
    assert found.manifest is not None
    assert found.manifest.chosen == "fp32"


@pytest.mark.parametrize(("rows", "message"), [(0, "kept no evaluation rows"), (20, "needs 149")])
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
