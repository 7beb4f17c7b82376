from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrai_core.artifact import Artifact
from lrai_core.confidence import upper_bound
from lrai_core.errors import ArtifactError
from lrai_core.verifier import verifier
from lrai_core.verifier.certificate import Spec
from lrai_core.verifier.sample import Rows
from tests.core import small_artifact

ROWS = Rows(
    [[np.full((1, 3), n, np.float32), np.full((1, 2), n, np.int64)] for n in range(5)], None, []
)


def box(radius: float, seed: int = 0) -> Spec:
    return Spec(epsilon=1.0, radius=radius, seed=seed)


def test_an_evaluation_draw_is_the_row_itself() -> None:
    for index in range(5):
        assert verifier.draw(Spec(epsilon=1.0, seed=7), ROWS, index) is ROWS.inputs[index]


@given(st.integers(0, 10_000), st.integers(0, 1 << 40), st.floats(1e-6, 0.4))
def test_a_box_draw_is_a_row_with_noise_within_the_radius_and_its_integers_untouched(
    index: int, seed: int, radius: float
) -> None:
    noisy, whole = verifier.draw(box(radius, seed), ROWS, index)
    base = whole[0, 0]
    assert (whole == base).all()
    assert noisy.dtype == np.float32
    assert (np.abs(noisy - base) <= radius * (1 + 1e-6) + 1e-6).all()


def test_the_same_draw_gives_the_same_bits_and_another_gives_others() -> None:
    def bits(index: int, seed: int) -> bytes:
        return verifier.draw(box(0.1, seed), ROWS, index)[0].tobytes()

    assert bits(3, 1) == bits(3, 1)
    assert len({bits(3, 1), bits(4, 1), bits(3, 2)}) == 3


def test_a_box_draws_from_all_rows_and_to_both_sides() -> None:
    drawn = [verifier.draw(box(0.1), ROWS, index) for index in range(200)]
    assert {int(whole[0, 0]) for _, whole in drawn} == set(range(5))
    noise = np.concatenate([noisy - whole[0, 0] for noisy, whole in drawn])
    assert abs(noise.mean()) < 0.01
    assert noise.max() > 0.09
    assert noise.min() < -0.09


def test_gaps_come_draw_by_draw_each_run_alone(tmp_path: Path) -> None:
    rows = small_artifact.rows(5)
    path = small_artifact.build(tmp_path / "a.lrai", factor=3.0, evaluation=rows)
    gaps = verifier.gaps(Artifact.open(path), Spec(epsilon=1.0, variant="int8"), rows, [4, 0, 1])
    assert list(gaps) == pytest.approx(
        [float(rows.inputs[i][0].max()) for i in (4, 0, 1)], abs=1e-6
    )


def test_failing_are_those_above_epsilon_and_those_that_are_no_number() -> None:
    assert verifier.failing([0.1, 0.2, 0.3, math.nan, math.inf], 0.2) == (2, 3, 4)


def test_nothing_is_certified_of_a_model_that_was_changed_since_it_was_opened(
    tmp_path: Path,
) -> None:
    path = small_artifact.build(tmp_path / "a.lrai", evaluation=small_artifact.rows(5))
    opened = Artifact.open(path)
    model = path / opened.manifest.variant("int8").model
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    with pytest.raises(ArtifactError, match="differs"):
        verifier.verify(opened, Spec(epsilon=1.0, variant="int8"))


@pytest.mark.parametrize("candidates", [1, 5])
def test_the_bound_pays_for_every_candidate(tmp_path: Path, candidates: int) -> None:
    rows = small_artifact.rows(59)
    path = small_artifact.build(tmp_path / "a.lrai", evaluation=rows, candidates=candidates)
    issued = verifier.issue(Artifact.open(path), Spec(epsilon=1.0), rows, ())
    assert issued.upper_bound == pytest.approx(1 - (0.05 / candidates) ** (1 / 59))


@pytest.mark.parametrize(
    ("spec", "failures", "bound"),
    [
        (Spec(epsilon=1.0), (), 0.05),
        (Spec(epsilon=1.5), (), 0.05),  # what holds for a smaller epsilon
        (Spec(epsilon=0.5), (), 1 - 0.01 ** (1 / 59)),
        (Spec(epsilon=1.0), (3,), None),  # its own bound is beyond what was demanded
        (Spec(epsilon=1.0, confidence=0.99), (), 1 - 0.002 ** (1 / 59)),
        (Spec(epsilon=1.0, radius=0.1, samples=59), (), 1 - 0.01 ** (1 / 59)),
    ],
)
def test_what_was_demanded_beforehand_is_not_paid_for_twice(
    tmp_path: Path, spec: Spec, failures: tuple[int, ...], bound: float | None
) -> None:
    rows = small_artifact.rows(59)
    path = small_artifact.build(tmp_path / "a.lrai", evaluation=rows, candidates=5)
    small_artifact.rewrite(path, {"demanded": [1.0, 0.05]})
    issued = verifier.issue(Artifact.open(path), spec, rows, failures)
    paid = upper_bound(len(failures), 59, 1 - (1 - spec.confidence) / 5)
    assert issued.upper_bound == pytest.approx(paid if bound is None else bound)
