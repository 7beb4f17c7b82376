"""The checker on certificates that the verifier issued, and on those that somebody improved."""

from __future__ import annotations

import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import TensorProto, helper

from lrai_core.artifact import Artifact, FileEntry, sha256_file
from lrai_core.confidence import upper_bound
from lrai_core.errors import ArtifactError, ConditionNotMet, UsageError, VerificationError
from lrai_core.verifier import verifier
from lrai_core.verifier.certificate import Certificate, Spec, read_certificate, write_certificate
from lrai_core.verifier.check import Verdict, check, require_certificate
from lrai_core.verifier.sample import Rows, save_rows
from lrai_core.verifier.spec import round_up
from lrai_core.verifier.verifier import verify
from tests.core import small_artifact

CANDIDATES = 5
ROWS = 80


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The variant is off by 0.1 % of the input: 0.001 to 0.002, more than 0.0015 on some rows."""
    path = tmp_path_factory.mktemp("check") / "small.lrai"
    rows = small_artifact.rows(ROWS)
    small_artifact.build(path, factor=2.001, evaluation=rows, candidates=CANDIDATES)
    return Artifact.open(path)


@pytest.fixture(scope="module")
def clean(artifact: Artifact) -> Certificate:
    return verify(artifact, Spec(epsilon=0.003))[0]


@pytest.fixture(scope="module")
def failing(artifact: Artifact) -> Certificate:
    return verify(artifact, Spec(epsilon=0.0015))[0]


@pytest.fixture(scope="module")
def box(artifact: Artifact) -> Certificate:
    return verify(artifact, Spec(epsilon=0.003, radius=0.1, samples=200, seed=3))[0]


def changed(certificate: Certificate, **change: Any) -> Certificate:
    return msgspec.structs.replace(certificate, **change)


def objections(certificate: Certificate, artifact: Artifact) -> str:
    verdict = check(certificate, artifact)
    assert not verdict.holds
    assert verdict.certificate == certificate.id
    return "; ".join(verdict.objections)


def test_what_the_verifier_issues_holds(
    artifact: Artifact, clean: Certificate, failing: Certificate, box: Certificate
) -> None:
    for certificate in (clean, failing, box):
        verdict = check(certificate, artifact)
        assert verdict.objections == ()
        assert verdict.holds
        all_of_them = (
            f"{certificate.samples} of {certificate.samples} draws, run again here, came out as it"
        )
        assert all_of_them in verdict.confirmed[-1]
        assert "the artifact's own copy; --source checks with the original" in verdict.confirmed[-2]


def test_the_figures_are_those_of_the_sample(
    clean: Certificate, failing: Certificate, box: Certificate
) -> None:
    assert (clean.samples, clean.failures, clean.comparisons) == (ROWS, (), CANDIDATES)
    assert clean.upper_bound == pytest.approx(1 - (0.05 / CANDIDATES) ** (1 / ROWS))
    expected = [
        index
        for index, row in enumerate(small_artifact.rows(ROWS).inputs)
        if float(row[0].max()) * 0.001 > 0.0015
    ]
    assert list(failing.failures) == expected
    assert 0 < len(expected) < ROWS
    assert (box.samples, box.comparisons, box.sampler) == (200, CANDIDATES, "box")


def test_a_certificate_is_checked_from_its_file_and_the_path_of_the_artifact(
    artifact: Artifact, clean: Certificate
) -> None:
    file = artifact.path / "certificates" / f"{clean.id}.json"
    assert read_certificate(file) == clean
    assert check(file, artifact.path).holds
    assert check(str(file), str(artifact.path)).holds


WIDE = {"upper_bound": 1.0}
CHANGES: list[tuple[str, Callable[[Certificate], dict[str, Any]]]] = [
    ("schema_version is 2, 1 follows", lambda c: {"schema_version": 2}),
    ("tier is PROVED_BOX, STATISTICAL follows", lambda c: {"tier": "PROVED_BOX"}),
    ("manifest_sha256 is 0000", lambda c: {"manifest_sha256": "0" * 64}),
    ("no variant 'int4'; the artifact has int8, fp32", lambda c: {"variant": "int4"}),
    ("variant is , int8 follows", lambda c: {"variant": ""}),
    ("came out as it says, but for 1: [3]", lambda c: {"variant": "fp32", "failures": (3,)} | WIDE),
    ("output_maps is {'y': 'softmax'}, {'y': 'raw'}", lambda c: {"output_maps": {"y": "softmax"}}),
    ("output_maps is {}, {'y': 'raw'}", lambda c: {"output_maps": {}}),
    ("upper_bound is", lambda c: {"confidence": 0.99}),
    ("upper_bound is", lambda c: {"upper_bound": c.upper_bound * 0.999}),
    ("upper_bound is -1.0", lambda c: {"upper_bound": -1.0}),
    ("upper_bound is nan", lambda c: {"upper_bound": math.nan}),
    ("comparisons is 1, 5 follows", lambda c: {"comparisons": 1} | WIDE),
    ("comparisons is 100", lambda c: {"comparisons": 10**18}),
    ("failures are not draws of the sample", lambda c: {"failures": (5, 4)} | WIDE),
    ("failures are not draws of the sample", lambda c: {"failures": (4, 4)} | WIDE),
    ("failures are not draws of the sample", lambda c: {"failures": (-1,)} | WIDE),
    ("failures are not draws of the sample", lambda c: {"failures": (c.samples,)} | WIDE),
    ("seed is 7, 0 follows", lambda c: {"seed": 7}),
    ("samples is 81, 80 follows", lambda c: {"samples": c.samples + 1}),
    ("samples is 79, 80 follows", lambda c: {"samples": c.samples - 1} | WIDE),
    (
        "assumption is every input there is, future",
        lambda c: {"assumption": "every input there is"},
    ),
    ("assumption is", lambda c: {"radius": 0.5}),
    ("environment is mill, ", lambda c: {"environment": "mill"}),
    ("environment is , ", lambda c: {"environment": ""}),
    ("came out as it says, but for", lambda c: {"epsilon": 0.0014}),
]


@pytest.mark.parametrize(("objection", "change"), CHANGES)
def test_a_changed_field_is_objected_to(
    artifact: Artifact,
    clean: Certificate,
    objection: str,
    change: Callable[[Certificate], dict[str, Any]],
) -> None:
    assert objection in objections(changed(clean, **change(clean)), artifact)


def test_no_field_of_a_certificate_goes_unchecked() -> None:
    touched = {name for _, change in CHANGES for name in change(_any_certificate())}
    says_nothing_checkable = {"created", "issuer"}
    assert touched | says_nothing_checkable == set(Certificate.__struct_fields__)


def _any_certificate() -> Certificate:
    from tests.core.verifier.test_certificate import certificate

    return certificate()


def test_a_wider_bound_than_due_is_still_true(artifact: Artifact, clean: Certificate) -> None:
    assert check(changed(clean, upper_bound=0.9), artifact).holds


def test_a_box_pays_for_the_candidates_too(artifact: Artifact, box: Certificate) -> None:
    cheap = changed(box, comparisons=1, upper_bound=1.0)
    assert "comparisons is 1, 5 follows" in objections(cheap, artifact)


def test_a_box_is_not_the_evaluation_rows(artifact: Artifact, box: Certificate) -> None:
    found = objections(changed(box, radius=0.0), artifact)
    assert "assumption is future inputs are an evaluation row with uniform noise" in found
    assert "samples is 200, 80 follows" in found


@pytest.mark.parametrize("radius", [1e39, 1e42])
def test_a_box_of_infinite_inputs_certifies_nothing(tmp_path: Path, radius: float) -> None:
    """Any two models agree there: this variant trebles where the source doubles."""
    path = small_artifact.build(tmp_path / "a.lrai", factor=3, evaluation=small_artifact.rows(80))
    wrong = Artifact.open(path)
    with pytest.raises(VerificationError, match="use a smaller radius"):
        verify(wrong, Spec(epsilon=0.003, radius=radius))
    (failing,) = verify(wrong, Spec(epsilon=0.003, radius=0.1))
    assert len(failing.failures) == failing.samples
    rows = verifier.evaluation(wrong)
    forged = verifier.issue(wrong, changed(failing, radius=radius), rows, ())
    assert "use a smaller radius" in objections(forged, wrong)


def test_another_variants_certificate_is_found_by_running_again(artifact: Artifact) -> None:
    exact = verify(artifact, Spec(epsilon=1e-6, variant="fp32"))[0]
    assert "but for 80" in objections(changed(exact, variant="int8"), artifact)


def test_hidden_failures_are_found_by_running_again(
    artifact: Artifact, failing: Certificate
) -> None:
    liar = changed(failing, failures=(), upper_bound=0.99)
    assert "came out as it says, but for" in objections(liar, artifact)


def test_a_tighter_epsilon_than_measured_is_found_by_running_again(
    artifact: Artifact, clean: Certificate, box: Certificate
) -> None:
    for certificate in (clean, box):
        liar = changed(certificate, epsilon=0.0014)
        assert "came out as it says, but for" in objections(liar, artifact)


def test_invented_failures_are_found_by_running_again(
    artifact: Artifact, clean: Certificate
) -> None:
    assert "[7]" in objections(changed(clean, failures=(7,), upper_bound=0.99), artifact)


def test_an_epsilon_below_the_checkers_own_tolerance_is_no_way_round_it(tmp_path: Path) -> None:
    rows = small_artifact.rows(20)
    path = small_artifact.build(tmp_path / "a.lrai", factor=2.0000005, evaluation=rows)
    artifact = Artifact.open(path)
    honest = verify(artifact, Spec(epsilon=1e-5))[0]
    liar = changed(honest, epsilon=1e-9)
    assert "came out as it says, but for" in objections(liar, artifact)


def test_a_box_with_another_seed_or_radius_is_another_sample(tmp_path: Path) -> None:
    path = small_artifact.build(
        tmp_path / "a.lrai", factor=2.001, evaluation=small_artifact.rows(10)
    )
    artifact = Artifact.open(path)
    found = verify(artifact, Spec(epsilon=0.0017, radius=0.2, samples=64))[0]
    assert 0 < len(found.failures) < 64
    for change in ({"seed": 1}, {"radius": 0.3}):
        assert "came out as it says, but for" in objections(changed(found, **change), artifact)


def test_changed_files_are_refused_even_when_the_artifact_was_opened_before(
    tmp_path: Path, artifact: Artifact, clean: Certificate
) -> None:
    copy = tmp_path / "copy.lrai"
    shutil.copytree(artifact.path, copy)
    opened = Artifact.open(copy, verify=False)
    assert check(clean, opened).holds
    model = copy / "variants/int8/model.onnx"
    other = small_artifact.graph(2.5)
    assert len(other) == model.stat().st_size
    model.write_bytes(other)
    with pytest.raises(ArtifactError, match="has changed"):
        check(clean, opened)


def test_another_model_under_a_new_manifest_is_not_what_was_certified(
    tmp_path: Path, artifact: Artifact, clean: Certificate
) -> None:
    copy = tmp_path / "copy.lrai"
    shutil.copytree(artifact.path, copy)
    model = copy / "variants/int8/model.onnx"
    model.write_bytes(small_artifact.graph(2.5))
    entry = FileEntry(sha256=sha256_file(model), size_bytes=model.stat().st_size)
    files = {**artifact.manifest.files, "variants/int8/model.onnx": entry}
    small_artifact.rewrite(copy, {"files": msgspec.to_builtins(files)})
    assert f"manifest_sha256 is {clean.manifest_sha256}, " in objections(clean, Artifact.open(copy))


def test_evaluation_rows_that_cannot_be_read_are_an_objection(
    tmp_path: Path, artifact: Artifact, clean: Certificate
) -> None:
    copy = tmp_path / "copy.lrai"
    shutil.copytree(artifact.path, copy)
    (copy / "evaluation.msgpack.gz").write_bytes(b"no archive")
    entry = FileEntry(sha256=sha256_file(copy / "evaluation.msgpack.gz"), size_bytes=10)
    files = {**artifact.manifest.files, "evaluation.msgpack.gz": entry}
    small_artifact.rewrite(copy, {"files": msgspec.to_builtins(files)})
    assert "evaluation.msgpack.gz cannot be read" in objections(clean, Artifact.open(copy))


def test_one_hidden_failure_is_found_however_the_seed_is_chosen(
    artifact: Artifact, failing: Certificate
) -> None:
    for hidden in failing.failures:
        rest = tuple(index for index in failing.failures if index != hidden)
        assert f"but for 1: [{hidden}]" in objections(changed(failing, failures=rest), artifact)


def test_of_a_large_sample_another_part_is_run_each_time(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrai_core.verifier.check._ALL", 2048)
    certificate = verify(artifact, Spec(epsilon=0.0015, radius=0.1, samples=4000))[0]
    drawn: list[int] = []
    draw = verifier.draw

    def recorded(*arguments: Any) -> Any:
        drawn.append(arguments[2])
        return draw(*arguments)

    monkeypatch.setattr(verifier, "draw", recorded)
    runs = []
    for seed in (None, None, 1, 1):
        drawn.clear()
        verdict = check(certificate, artifact, seed=seed)
        assert verdict.holds
        assert f"{len(drawn)} of 4000 draws, run again here" in verdict.confirmed[-1]
        assert "by themselves they bound the share by" in verdict.confirmed[-1]
        assert set(certificate.failures[:512]) <= set(drawn)
        runs.append(set(drawn))
    assert runs[0] != runs[1]
    assert runs[2] == runs[3]
    part = {*np.random.default_rng(1).choice(4000, 2048, replace=False).tolist()}
    error = 0.05 / certificate.comparisons  # of several candidates, as the certificate pays for it
    bound = upper_bound(len(part & {*certificate.failures}), 2048, 1 - error)
    assert certificate.comparisons > 1
    told = check(certificate, artifact, seed=1).confirmed[-1]
    assert told.endswith(f"the share by {round_up(bound):g}")
    assert all(2048 <= len(run) <= 2048 + 512 for run in runs)


def test_what_was_demanded_is_stated_to_the_last_digit(artifact: Artifact) -> None:
    certificate = verify(artifact, Spec(epsilon=0.12345649, radius=0.1, samples=50))[0]
    assert "by more than 0.12345649 (" in certificate.statement()


def with_rows(artifact: Artifact, path: Path, rows: Rows) -> Artifact:
    """Return a copy of the artifact with these evaluation rows."""
    shutil.copytree(artifact.path, path)
    save_rows(path / "evaluation.msgpack.gz", rows)
    file = path / "evaluation.msgpack.gz"
    entry = FileEntry(sha256=sha256_file(file), size_bytes=file.stat().st_size)
    files = {**artifact.manifest.files, "evaluation.msgpack.gz": entry}
    small_artifact.rewrite(path, {"files": msgspec.to_builtins(files)})
    return Artifact.open(path)


def test_other_rows_under_a_new_manifest_are_another_sample(
    tmp_path: Path, artifact: Artifact, clean: Certificate
) -> None:
    fewer = small_artifact.rows(ROWS).take(range(50))
    other = with_rows(artifact, tmp_path / "a.lrai", fewer)
    moved = changed(clean, manifest_sha256=other.sha256)
    assert "samples is 80, 50 follows from the files" in objections(moved, other)


def test_a_row_that_is_listed_twice_is_no_second_row(
    tmp_path: Path, artifact: Artifact, clean: Certificate
) -> None:
    twice = small_artifact.rows(ROWS).take([*range(ROWS), 0])
    other = with_rows(artifact, tmp_path / "a.lrai", twice)
    assert "a row is listed twice" in objections(clean, other)


def test_a_certificate_of_no_rows_is_none(
    tmp_path: Path, artifact: Artifact, clean: Certificate
) -> None:
    bare = Artifact.open(small_artifact.build(tmp_path / "bare.lrai", candidates=CANDIDATES))
    empty = with_rows(artifact, tmp_path / "empty.lrai", Rows([], None, []))
    for other in (bare, empty):
        moved = changed(clean, manifest_sha256=other.sha256)
        assert "has no evaluation rows" in objections(moved, other)
        with pytest.raises(ConditionNotMet, match="it has none"):
            require_certificate(other, "int8", {})
        with pytest.raises(VerificationError, match="has no evaluation rows"):
            verify(other, Spec(epsilon=1.0, radius=0.1))


def test_the_original_model_can_stand_in_for_the_artifacts_copy(
    tmp_path: Path, artifact: Artifact, clean: Certificate
) -> None:
    (tmp_path / "same.onnx").write_bytes(small_artifact.graph(2.0))
    (tmp_path / "other.onnx").write_bytes(small_artifact.graph(3.0))
    verdict = check(clean, artifact, source=tmp_path / "same.onnx")
    assert verdict.holds
    assert not any("own copy" in line for line in verdict.confirmed)
    verdict = check(clean, artifact, source=str(tmp_path / "other.onnx"))
    assert "came out as it says, but for 80" in verdict.objections[0]
    with pytest.raises(ArtifactError, match=r"cannot open missing\.onnx"):
        check(clean, artifact, source=tmp_path / "missing.onnx")


def test_a_source_with_other_inputs_is_an_objection(
    tmp_path: Path, artifact: Artifact, clean: Certificate
) -> None:
    shapes: list[list[str | int]] = [["batch", 4], ["batch"]]
    for number, shape in enumerate(shapes):
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
        node = helper.make_node("Neg", ["x"], ["y"])
        made = helper.make_graph([node], "g", values[:1], values[1:])
        proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        (tmp_path / f"{number}.onnx").write_bytes(proto.SerializeToString())
        verdict = check(clean, artifact, source=tmp_path / f"{number}.onnx")
        assert "source and variant do not run on its draws" in verdict.objections[0]


def test_what_is_certified_elsewhere_says_so_and_claims_nothing_of_here(
    artifact: Artifact, clean: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = artifact.manifest.target
    assert clean.environment == f"{target.isa} with onnxruntime {target.engine_version}"
    monkeypatch.setattr(verifier, "isa_class", lambda: "mill")
    monkeypatch.setattr(verifier, "installed_version", lambda _: "99.0")
    (there,) = verify(artifact, Spec(epsilon=0.003))
    assert there.environment == "mill with onnxruntime 99.0"
    assert check(there, artifact).holds
    assert "environment is" in objections(clean, artifact)
    monkeypatch.undo()
    assert "environment is mill with onnxruntime 99.0" in objections(there, artifact)


def test_what_was_demanded_is_at_the_whole_level_only_where_it_was_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "small.lrai"
    rows = small_artifact.rows(100)
    small_artifact.build(path, factor=2.001, evaluation=rows, candidates=CANDIDATES)
    small_artifact.rewrite(path, {"demanded": [0.003, 0.03]})
    demanded = Artifact.open(path)
    assert verify(demanded, Spec(epsilon=0.003))[0].upper_bound <= 0.03
    monkeypatch.setattr(verifier, "isa_class", lambda: "mill")
    bound = verify(demanded, Spec(epsilon=0.003))[0].upper_bound
    assert bound == pytest.approx(1 - 0.01 ** (1 / 100))  # 5 % shared by five candidates


def test_what_was_demanded_at_home_is_still_shown_where_it_was_measured_again(
    tmp_path: Path,
) -> None:
    """Then the manifest says that nothing was demanded; what was certified before is as true."""
    path, asked = tmp_path / "small.lrai", {"epsilon": 0.003, "delta": 0.03}
    rows = small_artifact.rows(100)
    small_artifact.build(path, factor=2.001, evaluation=rows, candidates=CANDIDATES)
    small_artifact.rewrite(path, {"demanded": [0.003, 0.03]})
    home = Artifact.open(path)
    (own,) = verify(home, Spec(epsilon=0.003))
    again = Artifact(path, msgspec.structs.replace(home.manifest, demanded=None), home.sha256)
    assert require_certificate(again, "int8", asked).id == own.id
    with pytest.raises(ConditionNotMet):
        require_certificate(again, "int8", asked | {"delta": 0.02})


def test_the_draws_of_a_box_are_not_held_in_memory(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[Any]] = []
    most = 0
    draw = verifier.draw

    def counted(*arguments: Any) -> Any:
        nonlocal most
        drawn = draw(*arguments)
        seen.extend(map(weakref.ref, drawn))
        most = max(most, sum(array() is not None for array in seen))
        return drawn

    monkeypatch.setattr(verifier, "draw", counted)
    verify(artifact, Spec(epsilon=0.003, radius=0.1, samples=100))
    assert most < 5


@pytest.fixture(scope="module")
def issued(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An artifact with an evaluation and a box certificate of int8, and nothing else."""
    path = tmp_path_factory.mktemp("issued") / "small.lrai"
    shutil.copytree(artifact.path, path, ignore=shutil.ignore_patterns("certificates"))
    copy = Artifact.open(path)
    verify(copy, Spec(epsilon=0.003))
    verify(copy, Spec(epsilon=0.003, radius=0.1, samples=4000))
    return copy


def test_a_certificate_that_meets_every_demand_is_returned(issued: Artifact) -> None:
    assert require_certificate(issued, "int8", {}).sampler == "evaluation"
    everything: dict[str, Any] = {
        "tier": "STATISTICAL",
        "sampler": "box",
        "epsilon": 0.003,
        "delta": 0.01,
        "confidence": 0.95,
    }
    assert require_certificate(issued, "int8", everything).sampler == "box"


@pytest.mark.parametrize(
    "require",
    [
        {"tier": "PROVED_BOX"},
        {"sampler": "all"},
        {"epsilon": 0.0029},
        {"delta": 0.01},  # the box meets it, and was not asked for
        {"delta": 0.01, "sampler": "evaluation"},
        {"confidence": 0.96},
        {"epsilon": math.nan},
        {"delta": -1},
    ],
)
def test_a_demand_that_is_not_met_is_refused_with_what_there_is(
    issued: Artifact, require: dict[str, Any]
) -> None:
    with pytest.raises(ConditionNotMet, match=r"variant int8 has no certificate .*with 95% confi"):
        require_certificate(issued, "int8", require)


def test_little_confidence_has_to_be_asked_for(tmp_path: Path, artifact: Artifact) -> None:
    path = tmp_path / "a.lrai"
    shutil.copytree(artifact.path, path, ignore=shutil.ignore_patterns("certificates"))
    copy = Artifact.open(path)
    verify(copy, Spec(epsilon=0.003, confidence=0.5))
    with pytest.raises(ConditionNotMet, match="with 50% confidence"):
        require_certificate(copy, "int8", {})
    assert require_certificate(copy, "int8", {"confidence": 0.5}).confidence == 0.5


def test_only_a_certificate_that_follows_from_the_files_meets_a_demand(
    tmp_path: Path, artifact: Artifact, clean: Certificate
) -> None:
    path = tmp_path / "a.lrai"
    shutil.copytree(artifact.path, path, ignore=shutil.ignore_patterns("certificates"))
    copy = Artifact.open(path)
    forged = [
        changed(clean, upper_bound=1e-9),
        changed(clean, comparisons=1),
        changed(clean, environment="mill"),
        changed(clean, variant="fp32"),
        changed(clean, manifest_sha256="f" * 64),
    ]
    for certificate in forged:
        write_certificate(path, certificate)
    with pytest.raises(ConditionNotMet, match=r"\(any\): it has none"):
        require_certificate(copy, "int8", {})
    write_certificate(path, clean)
    assert require_certificate(copy, "int8", {}) == clean


@pytest.mark.parametrize(
    ("require", "message"),
    [
        ({"epsilom": 1}, "epsilom is 1; known: tier, sampler, and the numbers epsilon, delta and"),
        ({"epsilon": "small"}, "epsilon is 'small'; known: .*the numbers epsilon"),
        ({"delta": True}, "delta is True"),
        ({"confidence": None}, "confidence is None"),
    ],
)
def test_a_demand_that_means_nothing_is_a_usage_error(
    issued: Artifact, require: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        require_certificate(issued, "int8", require)


def test_a_certificate_that_cannot_be_read_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"missing\.json cannot be read"):
        check(tmp_path / "missing.json", artifact)


def test_another_machine_or_engine_is_objected_to(
    artifact: Artifact, clean: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifier, "isa_class", lambda: "mill")
    assert ", mill with" in objections(clean, artifact)
    monkeypatch.undo()
    monkeypatch.setattr(verifier, "installed_version", lambda _: "99.0")
    assert "with onnxruntime 99.0 follows" in objections(clean, artifact)


def test_a_verdict_holds_exactly_without_objections() -> None:
    assert Verdict("c", True, ("yes",), ()).holds


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0, it must be above 0"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"epsilon": float("inf")}, "epsilon is inf"),
        ({"epsilon": 1.0, "radius": -0.1}, "radius is -0.1"),
        ({"epsilon": 1.0, "radius": float("inf")}, "radius is inf"),
        ({"epsilon": 1.0, "samples": 0}, "samples is 0"),
        ({"epsilon": 1.0, "confidence": 1.0}, "confidence is 1.0"),
        ({"epsilon": 1.0, "seed": -1}, "seed is -1"),
    ],
)
def test_a_specification_of_nothing_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Spec(**wrong)


def test_without_evaluation_rows_nothing_is_certified(tmp_path: Path) -> None:
    artifact = Artifact.open(small_artifact.build(tmp_path / "a.lrai"))
    with pytest.raises(VerificationError, match="has no evaluation rows"):
        verify(artifact, Spec(epsilon=1.0))
    assert not (artifact.path / "certificates").exists()


def test_the_chosen_variant_is_certified_unless_another_is_named(
    artifact: Artifact, clean: Certificate
) -> None:
    assert clean.variant == "int8"
    exact = verify(artifact, Spec(epsilon=1e-6, variant="fp32"))[0]
    assert (exact.variant, exact.failures) == ("fp32", ())
    assert check(exact, artifact).holds
    assert exact.assumption == verifier.ASSUMPTIONS["evaluation"]


def test_a_certificate_that_says_next_to_nothing_meets_no_demand(artifact: Artifact) -> None:
    vacuous = verify(artifact, Spec(epsilon=1e-9))[0]
    assert vacuous.upper_bound == 1.0
    with pytest.raises(ConditionNotMet, match="no certificate that meets"):
        require_certificate(artifact, "int8", {"epsilon": 1e-9})
    assert require_certificate(artifact, "int8", {"epsilon": 1e-9, "delta": 1.0}) == vacuous
