"""How answers of two variants are compared: as the gate compares them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from lrai_core import Artifact, InferenceRequest, InferenceResponse
from lrai_report.compare import Side, differing, measure_of
from tests.core import small_artifact


def side(gap: float) -> Side:
    """Return one whose answers are ones, and so much more."""
    answer = InferenceResponse(
        model_name="m",
        model_version="1",
        id="",
        outputs={"y": np.full((1, 3), 1 + gap, np.float32)},
        parameters={},
    )
    return Side("fp32", cast("Any", SimpleNamespace(infer=lambda _: answer)))


@pytest.mark.parametrize(
    ("demanded", "gap", "agrees", "words"),
    [
        (None, 0.5, False, "relative error <= 1 %"),
        (None, 0.001, True, "relative error <= 1 %"),
        ((1.0, 0.01), 0.5, True, "difference <= 1"),
        ((1.0, 0.01), 1.5, False, "difference <= 1"),
        ((1.0, 0.01), np.nan, False, "difference <= 1"),
    ],
)
def test_of_raw_outputs_a_demanded_closeness_decides_as_it_does_in_the_gate(
    demanded: tuple[float, float] | None, gap: float, agrees: bool, words: str
) -> None:
    manifest = msgspec.structs.replace(small_artifact.manifest(), demanded=demanded)
    artifact = Artifact(Path(), manifest, "0" * 64)
    asked = [InferenceRequest(model_name="", inputs={})]
    (worst,) = differing([side(0.0), side(gap)], asked, artifact, lambda: None)
    assert worst.agrees is agrees
    assert measure_of(artifact) == words
