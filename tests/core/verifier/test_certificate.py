from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lrai_core.artifact import Artifact
from lrai_core.errors import EnvironmentProblem, VerificationError
from lrai_core.verifier.certificate import (
    Certificate,
    Closeness,
    Sampler,
    certificates,
    read_certificate,
    write_certificate,
)
from tests.core import small_artifact


def certificate(manifest_sha256: str = "0" * 64, **change: Any) -> Certificate:
    epsilon = change.pop("epsilon", 0.01)
    plain: dict[str, Any] = {
        "tier": "STATISTICAL",
        "closeness": Closeness(epsilon=epsilon, output_maps={"y": "raw"}),
        "variant": "int8",
        "sampler": Sampler(kind="evaluation", seed=0, rows_sha256="1" * 64),
        "n": 299,
        "failures": (),
        "confidence": 0.95,
        "comparisons": 1,
        "upper_bound": 0.01,
        "assumption": "none",
        "manifest_sha256": manifest_sha256,
        "files": {},
        "environment": {},
        "created": "2026-01-01T00:00:00Z",
    }
    return Certificate(**{**plain, **change})


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return Artifact.open(small_artifact.build(tmp_path / "small.lrai"))


def refusal(path: Path) -> str:
    with pytest.raises(VerificationError) as caught:
        read_certificate(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 400
    return message


def test_a_written_certificate_is_read_as_it_was(artifact: Artifact) -> None:
    written = certificate(failures=(3, 7))
    path = write_certificate(artifact.path, written)
    assert path == artifact.path / "certificates" / f"{written.id}.json"
    assert read_certificate(path) == written
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    Artifact.open(artifact.path)  # the manifest does not know about it


def test_the_id_names_the_variant_and_changes_with_any_content() -> None:
    first = certificate()
    assert first.id.startswith("int8-")
    assert first.id == certificate().id
    others: list[dict[str, Any]] = [
        {"n": 300},
        {"epsilon": 0.02},
        {"failures": (1,)},
        {"files": {"a": "b"}},
    ]
    assert len({first.id, *(certificate(**change).id for change in others)}) == 5


def test_the_statement_says_how_many_how_far_and_how_sure() -> None:
    assert certificate(failures=(1, 2)).statement() == (
        "with 95% confidence, for all but 1.00% of inputs like the evaluation rows no element of "
        "y (raw) of variant int8 differs from the source model by more than 0.01 "
        "(2 failures in 299)"
    )


def test_the_statement_says_which_inputs_it_speaks_about() -> None:
    box = Sampler(kind="box", seed=0, radius=0.25, rows_sha256="1" * 64)
    said = certificate(sampler=box).statement()
    assert "1.00% of inputs within 0.25 of an evaluation row no element" in said


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"null",
        b"\xff\xfe",
        b'{"schema_version": 1, "\x80": 1}',
        b"[" * 100_000,
        b'{"' + b"x" * 1_000_000 + b'": 1}',
    ],
)
def test_a_file_that_is_no_certificate_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.json").write_bytes(content)
    assert "c.json is not a certificate" in refusal(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "has schema 2, this lrai reads 1"),
        ({"tier": "PROVED_BOX"}, "PROVED_BOX"),
        ({"surprise": 1}, "unknown field `surprise`"),
        ({"n": "299"}, "Expected `int`"),
        ({"n": 1.5}, "Expected `int`"),
        ({"upper_bound": None}, "Expected `float`"),
        ({"failures": [None]}, "Expected `int`"),
    ],
)
def test_a_certificate_with_a_wrong_field_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    content = {**msgspec.to_builtins(certificate()), **change}
    (tmp_path / "c.json").write_bytes(msgspec.json.encode(content))
    assert message in refusal(tmp_path / "c.json")


def test_what_is_no_plain_file_of_a_fitting_size_is_refused_unread(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refusal(tmp_path / "missing.json")
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "endless.json").symlink_to("/dev/zero")
    for name in ("folder.json", "pipe.json", "endless.json"):
        assert f"{name} is not a plain file" in refusal(tmp_path / name)
    (tmp_path / "large.json").touch()
    os.truncate(tmp_path / "large.json", 1 << 40)
    assert "has over" in refusal(tmp_path / "large.json")


def test_a_full_disk_is_one_sentence_and_leaves_no_half_certificate(artifact: Artifact) -> None:
    written = certificate()
    folder = artifact.path / "certificates"
    folder.mkdir()
    (folder / f"{written.id}.partial").symlink_to("/dev/full")
    with pytest.raises(EnvironmentProblem, match="the disk is full"):
        write_certificate(artifact.path, written)
    assert list(folder.iterdir()) == []


def test_an_artifact_that_takes_no_file_is_one_sentence() -> None:
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        write_certificate(Path("/proc"), certificate())


def test_only_certificates_of_this_manifest_are_listed_most_telling_first(
    artifact: Artifact,
) -> None:
    assert certificates(artifact) == []
    box = Sampler(kind="box", seed=0, radius=0.25, rows_sha256="1" * 64)
    ranked = [
        certificate(artifact.sha256, upper_bound=0.1, epsilon=0.001),
        certificate(artifact.sha256, upper_bound=0.01, epsilon=0.01),
        certificate(artifact.sha256, upper_bound=0.02, epsilon=0.01),
        certificate(artifact.sha256, upper_bound=0.001, epsilon=0.02),
        certificate(artifact.sha256, upper_bound=0.11, epsilon=1e-6),  # says next to nothing
        certificate(artifact.sha256, upper_bound=0.001, epsilon=1e-6, sampler=box),
        certificate(artifact.sha256, upper_bound=1.0, epsilon=1e-9, sampler=box),
    ]
    for one in (*ranked, certificate("f" * 64, upper_bound=0.001)):
        write_certificate(artifact.path, one)
    assert certificates(artifact) == ranked


def test_more_failures_than_a_reader_takes_are_not_written(artifact: Artifact) -> None:
    most = certificate(n=1 << 30, failures=tuple(range(10**9, 10**9 + 100_000)))
    assert read_certificate(write_certificate(artifact.path, most)) == most
    over = msgspec.structs.replace(most, failures=(*most.failures, (1 << 30) - 1))
    with pytest.raises(VerificationError, match=r"100001 inputs differ .* choose a larger epsilon"):
        write_certificate(artifact.path, over)
