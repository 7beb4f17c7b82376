"""Sizes that a model takes, and the deadline that its profile suggests."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from lrai_core import Artifact, UsageError
from lrai_core.artifact import LatencyPoint
from lrai_report.plan import sized, suggest_deadline
from lrai_report.trace import Arrivals, Counts, Trace
from tests.core import small_artifact

POINTS = ((1, 8, 2.0), (1, 32, 6.0), (4, 32, 20.0))


def made(points: tuple[tuple[int, int, float], ...] = POINTS, *, length: bool = True) -> Artifact:
    """Return an artifact without files, with a profile, and a length axis or none."""
    manifest = small_artifact.manifest()
    (spec,) = manifest.signature.inputs
    if length:
        spec = msgspec.structs.replace(spec, shape=("batch", "length"), length_axis=1)
    profile = tuple(
        LatencyPoint(rows=rows, length=length, median_ms=ms, spread_ms=0.0)
        for rows, length, ms in points
    )
    manifest = msgspec.structs.replace(
        manifest,
        signature=msgspec.structs.replace(manifest.signature, inputs=(spec,)),
        variants=tuple(msgspec.structs.replace(v, latency=profile) for v in manifest.variants),
    )
    return Artifact(Path("made.lrai"), manifest, "0" * 64)


def arrivals(lengths: list[int], rows: list[int] | None = None) -> Arrivals:
    count = len(lengths)
    return Arrivals(
        np.arange(count, dtype=np.float64), np.array(lengths), np.array(rows or [1] * count)
    )


@pytest.mark.parametrize(
    ("trace", "wanted", "lengths", "drawn", "words"),
    [
        (arrivals([5, 32]), None, [5, 32], None, "2 requests in 1 s, lengths 5..32"),
        (arrivals([5, 99]), None, [8, 32], None, "2 requests in 1 s, lengths 5..99 as 8..32"),
        (arrivals([0, 9]), None, [8, 32], None, "2 requests in 1 s, lengths 0..9 as 8..32"),
        (arrivals([5, 32]), (1, 64), [1, 64], None, "2 requests in 1 s, lengths 5..32 as 1..64"),
        (arrivals([0, 0]), None, [0, 0], (8, 32), "2 requests in 1 s; lengths drawn from 8..32"),
        (arrivals([0, 0]), (2, 3), [0, 0], (2, 3), "2 requests in 1 s; lengths drawn from 2..3"),
        (
            Counts(np.array([1.0, 4.0])), None, None, (8, 32),
            "2 s, 2.5 requests/s; lengths drawn from 8..32",
        ),
        (
            Counts(np.array([40_000.0, 41_000.0])), None, None, (8, 32),
            "2 s, 40,500 requests/s; lengths drawn from 8..32",
        ),
    ],
)  # fmt: skip
def test_lengths_are_those_that_the_model_was_measured_with_or_those_that_are_wanted(
    trace: Trace,
    wanted: tuple[int, int] | None,
    lengths: list[int] | None,
    drawn: tuple[int, int] | None,
    words: str,
) -> None:
    fitted, found, said = sized(trace, made(), wanted)
    assert (found, said) == (drawn, words)
    if isinstance(fitted, Arrivals):
        assert fitted.lengths.tolist() == lengths


def test_a_model_without_the_axes_gets_neither_lengths_nor_rows() -> None:
    plain = made(length=False)
    fitted, drawn, words = sized(arrivals([5, 9], rows=[1, 3]), plain, None)
    assert isinstance(fitted, Arrivals)
    assert (fitted.lengths.tolist(), fitted.rows.tolist(), drawn) == ([0, 0], [1, 3], None)
    assert words == "2 requests in 1 s; its lengths are not used, for the model has no length axis"
    (spec,) = plain.manifest.signature.inputs
    spec = msgspec.structs.replace(spec, batch_axis=None)
    signature = msgspec.structs.replace(plain.manifest.signature, inputs=(spec,))
    manifest = msgspec.structs.replace(plain.manifest, signature=signature)
    alone = Artifact(plain.path, manifest, plain.sha256)
    fitted, _, words = sized(arrivals([0, 0], rows=[1, 3]), alone, None)
    assert isinstance(fitted, Arrivals)
    assert fitted.rows.tolist() == [1, 1]
    assert "of one row each, for the model has no batch axis" in words


def test_the_deadline_is_ten_times_what_a_large_request_takes_alone_by_the_profile() -> None:
    usual = [8] * 90
    for lengths, rows, expected in (
        ([*usual, *[20] * 10], None, 40),  # halfway between the two
        ([*usual, *[64] * 10], None, 120),  # beyond the profile: in proportion
        ([*usual, *[8] * 10], [*[1] * 90, *[5] * 10], 100),
        ([*usual, *[8] * 8, 64, 64], None, 20),  # the few that are larger still do not count
    ):
        found, _ = suggest_deadline(made(), arrivals(lengths, rows))
        assert found == pytest.approx(expected)
    _, words = suggest_deadline(made(((1, 8, 2345.0),)), arrivals([8, 8]))
    assert words == "10 x a large request (p95) alone, 2,345 ms by the profile"
    short = made(((1, 0, 0.01),), length=False)
    assert suggest_deadline(short, arrivals([0, 0])) == (
        10, "10 x a large request (p95) alone, 0.01 ms by the profile, but at least 10 ms"
    )  # fmt: skip


def test_without_a_profile_deadline_and_lengths_have_to_be_given() -> None:
    with pytest.raises(UsageError, match="give --deadline-ms"):
        suggest_deadline(made(()), arrivals([8, 8]))
    with pytest.raises(UsageError, match="--lengths is needed"):
        sized(arrivals([8, 8]), made(()), None)
