"""An artifact of the chosen variant alone: the same answers, its certificates, and nothing else."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import lrai_core as lrai
from benchmarks.models import classifier
from lrai_core.verifier.certificate import Spec, write_certificate
from lrai_deployments.measured import keep
from lrai_engines import slim as command
from lrai_engines.requalify import requalify
from lrai_engines.slim import slim
from lrai_wheel.pins import extras_of
from tests.core import small_artifact


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a model with weights worth sharing, and its artifact."""
    folder = tmp_path_factory.mktemp("slim")
    model, rows = classifier(folder / "c.onnx", 0, hidden=512)
    rows = {name: array[:1000] for name, array in rows.items()}
    lrai.compile(
        model,
        out=folder / "c.lrai",
        evaluation=rows,
        output_map="softmax",
        max_accuracy_loss=0.05,
        threads=1,
        keep_evaluation=300,
    )
    return model, folder / "c.lrai"


@pytest.fixture(scope="module")
def slimmed(original: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> lrai.Artifact:
    return slim(original[1], tmp_path_factory.mktemp("slimmed") / "c.lrai")


def answers(
    path: Path, x: NDArray[np.float32], variant: str = ""
) -> tuple[str, NDArray[np.float32]]:
    with lrai.Runtime() as runtime:
        runtime.load(path, name="m", variant=variant)
        answer = runtime.infer(lrai.InferenceRequest(model_name="m", inputs={"features": x}))
        return str(answer.parameters["variant"]), answer.outputs["logits"]


def test_it_answers_as_the_chosen_variant_did_bit_for_bit(
    original: tuple[Path, Path], slimmed: lrai.Artifact
) -> None:
    x = np.random.default_rng(0).normal(size=(7, 64)).astype(np.float32)
    chosen = lrai.Artifact.open(original[1]).manifest.chosen
    assert slimmed.manifest.chosen == chosen
    whole = answers(original[1], x, chosen)  # fp32 may serve beside it
    own = answers(slimmed.path, x)
    assert own[0] == whole[0]
    np.testing.assert_array_equal(own[1], whole[1])


def test_every_variant_has_its_weights_in_a_file_that_is_mapped(
    original: tuple[Path, Path], slimmed: lrai.Artifact
) -> None:
    for artifact in (lrai.Artifact.open(original[1]), slimmed):
        for variant in artifact.variants:
            proto = onnx.load(artifact.file(variant.model), load_external_data=False)
            inline = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
            assert inline < 16 << 10, variant.id
            assert variant.size_bytes > 200 << 10


def test_it_holds_one_variant_and_what_speaks_of_it(slimmed: lrai.Artifact) -> None:
    names = {file.relative_to(slimmed.path).parts[0] for file in slimmed.path.rglob("*")}
    kept = {"manifest.json", "variants", "certificates"}
    assert names == kept | {"evaluation.msgpack.gz", "quantization.jsonl"}
    (variant,) = slimmed.variants
    folder = slimmed.path / "variants" / variant.id
    assert [f.name for f in slimmed.path.joinpath("variants").iterdir()] == [variant.id]
    assert variant.size_bytes == sum(file.stat().st_size for file in folder.iterdir())
    lrai.Artifact.open(slimmed.path)  # every hash


def test_it_is_as_private_as_what_it_is_made_of(tmp_path: Path) -> None:
    """Which may hold requests of users."""
    small_artifact.build(tmp_path / "m.lrai").chmod(0o700)
    assert stat.S_IMODE(slim(tmp_path / "m.lrai", tmp_path / "s.lrai").path.stat().st_mode) == 0o700
    assert stat.S_IMODE(slim(tmp_path / "m.lrai").path.stat().st_mode) == 0o700


def test_its_certificates_hold_against_the_original(
    original: tuple[Path, Path], slimmed: lrai.Artifact
) -> None:
    model, whole = original
    assert slimmed.manifest.source.sha256 == lrai.Artifact.open(whole).manifest.source.sha256
    (certificate,) = lrai.certificates(slimmed)
    assert certificate.samples == 300
    assert lrai.check(certificate, slimmed, source=model).holds
    with pytest.raises(lrai.UsageError, match="the artifact is slim"):
        lrai.check(certificate, slimmed)
    with lrai.Runtime.open(slimmed, require={"epsilon": certificate.epsilon}) as runtime:
        assert runtime.models()[0].certificate == certificate.id


def test_in_its_place_it_is_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = small_artifact.build(tmp_path / "m.lrai", evaluation=small_artifact.rows(20))
    slim(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.lrai"]
    assert [variant.id for variant in lrai.Artifact.open(path).variants] == ["int8"]
    with pytest.raises(lrai.UsageError, match=r"m\.lrai is slim already"):
        slim(path)


def test_on_another_machine_it_says_that_it_cannot_serve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_artifact.build(tmp_path / "m.lrai", evaluation=small_artifact.rows(200))
    with pytest.raises(SystemExit):
        command.main([str(path)])
    assert "m.lrai: int8 alone" in capsys.readouterr().out
    whole = small_artifact.build(tmp_path / "whole.lrai", evaluation=small_artifact.rows(200))
    small_artifact.rewrite(whole, {"target": {**_target(), "isa": "mill"}})
    with pytest.raises(lrai.ConditionNotMet, match="it would serve nowhere else"):
        slim(whole)
    assert (whole / "source").exists()
    small_artifact.rewrite(path, {"target": {**_target(), "isa": "mill"}})
    with pytest.raises(lrai.ConditionNotMet, match="source model cannot serve in its place"):
        lrai.Runtime.open(path).close()
    with pytest.raises(lrai.UsageError, match="the artifact is slim"):
        requalify(lrai.Artifact.open(path))


def test_where_it_cannot_take_the_place_everything_is_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_artifact.build(tmp_path / "m.lrai", evaluation=small_artifact.rows(20))
    before, real = lrai.Artifact.open(path), Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.suffix == ".slim":
            raise OSError(errno.EBUSY, "Device or resource busy")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(lrai.EnvironmentProblem, match="cannot be replaced, use -o"):
        slim(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.lrai"]
    assert lrai.Artifact.open(path).sha256 == before.sha256


def test_certificates_that_cannot_be_issued_again_are_left_behind(tmp_path: Path) -> None:
    path = small_artifact.build(tmp_path / "m.lrai", evaluation=small_artifact.rows(200))
    (own,) = lrai.verify(lrai.Artifact.open(path), Spec(epsilon=0.01))
    write_certificate(path, msgspec.structs.replace(own, created="2026-01-01T00:00:00Z"))
    for change in ({"samples": 5000}, {"radius": 0.1, "samples": 1 << 31}, {"environment": "x"}):
        odd = msgspec.structs.replace(own, **change)
        write_certificate(path, odd)
    slimmed = slim(path, tmp_path / "s.lrai")
    found = lrai.certificates(slimmed)
    assert {c.samples for c in found} == {200}
    assert len(found) <= 2


def test_what_it_needs_is_still_told(slimmed: lrai.Artifact) -> None:
    assert extras_of(slimmed) == {"onnxruntime": "onnxruntime"}


def _target() -> dict[str, object]:
    target = small_artifact.manifest().target
    return {name: getattr(target, name) for name in target.__struct_fields__}


def test_what_was_found_wrong_here_is_not_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRAI_RUNTIME_STATE_DIR", str(tmp_path / "state"))
    artifact = lrai.Artifact.open(small_artifact.build(tmp_path / "m.lrai"))
    assert artifact.manifest.chosen == "int8"
    found = msgspec.structs.replace(artifact.manifest, chosen="fp32")
    keep(artifact, found, lrai.load_config())
    with pytest.raises(lrai.ConditionNotMet, match="requalify found that fp32 is to serve here"):
        slim(artifact.path, tmp_path / "slim.lrai")
