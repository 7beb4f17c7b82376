"""Versions that are exchanged while requests run: real actors, real signals, a ledger of requests."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

import lrai_core as lrai
from tests.core import small_artifact
from tests.integration.test_runtime_faults import Load, config

pytestmark = pytest.mark.server

ONES = {"x": np.ones((1, 3), np.float32)}


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Return artifacts that multiply by their key."""
    folder = tmp_path_factory.mktemp("small")
    return {
        times: small_artifact.build(folder / f"times-{times:g}.lrai", factor=times)
        for times in (2.0, 3.0, 4.0)
    }


def test_requests_under_way_while_versions_change_are_all_answered(
    small: dict[float, Path],
) -> None:
    with lrai.Runtime.open(small[2.0], name="m", config=config()) as runtime:
        load = Load(runtime, "m", [ONES], callers=8)
        for times in (3.0, 2.0):
            time.sleep(0.3)
            version = runtime.swap("m", small[times])
            (model,) = runtime.models()
            assert model.version == version == lrai.Artifact.open(small[times]).version
            assert runtime.ready() in ("ok", "idle")
        time.sleep(0.3)
        ledger = load.stop()
    assert not ledger.refused
    assert ledger.sent == len(ledger.answered)
    assert {float(outputs["y"][0, 0]) for _, outputs in ledger.answered} == {2.0, 3.0}
