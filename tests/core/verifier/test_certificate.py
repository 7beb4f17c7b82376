from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lrai_core.artifact import Artifact
from lrai_core.errors import EnvironmentProblem, VerificationError
from lrai_core.verifier.certificate import (
    Certificate,
    certificates,
    read_certificate,
    write_certificate,
)
from tests.core import small_artifact


def certificate(manifest_sha256: str = "0" * 64, **change: Any) -> Certificate:
    plain: dict[str, Any] = {
        "epsilon": 0.01,
        "variant": "int8",
        "samples": 299,
        "failures": (),
        "upper_bound": 0.01,
        "comparisons": 1,
        "output_maps": {"y": "raw"},
        "assumption": "none",
        "environment": "here",
        "manifest_sha256": manifest_sha256,
        "issuer": "lrai 0",
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
    write_certificate(artifact.path, written)
    path = artifact.path / "certificates" / f"{written.id}.json"
    assert read_certificate(path) == written
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    Artifact.open(artifact.path)  # the manifest does not know about it


def test_the_id_names_the_variant_and_changes_with_any_content() -> None:
    first = certificate()
    assert first.id.startswith("int8-")
    assert first.id == certificate().id
    others: list[dict[str, Any]] = [
        {"samples": 300},
        {"epsilon": 0.02},
        {"failures": (1,)},
        {"radius": 0.1},
    ]
    assert len({first.id, *(certificate(**change).id for change in others)}) == 5


def test_the_statement_says_how_many_how_far_and_how_sure() -> None:
    assert certificate(failures=(1, 2)).statement() == (
        "with 95% confidence, for all but 1% of inputs like the evaluation rows, each run alone, "
        "no element of y (raw) of variant int8 differs from the source model by more than 0.01 "
        "(2 failures in 299, here)"
    )


def test_the_statement_says_which_inputs_it_speaks_about() -> None:
    said = certificate(radius=0.25).statement()
    assert "1% of inputs within 0.25 of an evaluation row, each run alone, no element" in said
    assert "within 0.12345678 of" in certificate(radius=0.12345678).statement()


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
    assert "c.json cannot be read" in refusal(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 3}, "has schema 3, this version of lrai reads up to 2"),
        ({"schema_version": 3, "surprise": 1}, "has schema 3"),
        ({"tier": "PROVED_BOX"}, "PROVED_BOX"),
        ({"surprise": 1}, "unknown field `surprise`"),
        ({"samples": "299"}, "Expected `int`"),
        ({"samples": 1.5}, "Expected `int`"),
        ({"upper_bound": None}, "Expected `float`"),
        ({"failures": [None]}, "Expected `int`"),
        ({"epsilon": 0.0}, "epsilon is 0.0, it must be above 0"),
        ({"epsilon": -1.0}, "epsilon is -1.0"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"confidence": 0.0}, "confidence is 0.0"),
        ({"confidence": 1e-17}, "confidence is 1e-17"),  # of which the bound has no number
        ({"epsilon": sys.float_info.max}, "above 0 and finite"),  # as far as a NaN is
        ({"confidence": 0.9999999999999999}, "confidence is 0.9999999999999999"),
        ({"samples": 0}, "samples is 0"),
        ({"samples": 10**30}, "samples is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"radius": -0.5}, "radius is -0.5"),
        ({"radius": 1e308}, "radius is 1e+308, it must be 0 or more and below 1e300"),
    ],
)
def test_a_certificate_with_a_wrong_field_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    content = {**msgspec.to_builtins(certificate()), **change}
    (tmp_path / "c.json").write_bytes(msgspec.json.encode(content))
    assert message in refusal(tmp_path / "c.json")


def test_what_is_no_plain_file_of_a_fitting_size_is_refused_unread(tmp_path: Path) -> None:
    assert "cannot be read: [Errno 2] No such file" in refusal(tmp_path / "missing.json")
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "endless.json").symlink_to("/dev/zero")
    for name in ("folder.json", "pipe.json", "endless.json"):
        assert f"{name} is not a plain file" in refusal(tmp_path / name)
    (tmp_path / "large.json").touch()
    os.truncate(tmp_path / "large.json", 1 << 40)
    assert "is over" in refusal(tmp_path / "large.json")


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
    ranked = [
        certificate(artifact.sha256, upper_bound=0.1, epsilon=0.001),
        certificate(artifact.sha256, upper_bound=0.01, epsilon=0.01, samples=10_000),
        certificate(artifact.sha256, upper_bound=0.02, epsilon=0.01),
        certificate(artifact.sha256, upper_bound=0.001, epsilon=0.02, samples=10_000),
        certificate(artifact.sha256, upper_bound=0.11, epsilon=1e-6),  # says next to nothing
        certificate(artifact.sha256, upper_bound=0.001, epsilon=1e-6, radius=0.25, samples=10_000),
        certificate(artifact.sha256, upper_bound=1.0, epsilon=1e-9, radius=0.25),
    ]
    false = certificate(artifact.sha256, upper_bound=1e-4, epsilon=1e-9)  # fewer than that allow
    for one in (*ranked, false, certificate("f" * 64, upper_bound=0.001)):
        write_certificate(artifact.path, one)
    assert certificates(artifact) == ranked


def test_more_failures_than_a_reader_takes_are_not_written(artifact: Artifact) -> None:
    most = certificate(samples=1 << 30, failures=tuple(range(10**9, 10**9 + 100_000)))
    write_certificate(artifact.path, most)
    assert read_certificate(artifact.path / "certificates" / f"{most.id}.json") == most
    over = certificate(samples=1 << 30, failures=tuple(range(10**9, 10**9 + 400_000)))
    with pytest.raises(VerificationError, match="400000 inputs differ, too many to list"):
        write_certificate(artifact.path, over)
    assert len(list((artifact.path / "certificates").iterdir())) == 1
