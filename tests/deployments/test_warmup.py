"""The rows that a version is run with before it serves."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest

import lrai_core as lrai
from lrai_core.artifact import EVALUATION
from lrai_core.runtime.version import Version
from lrai_deployments.warmup import warm_up
from tests.core import small_artifact


def test_real_rows_are_asked_however_many_are_kept(tmp_path: Path) -> None:
    rows, heard = small_artifact.rows(100), list[Any]()
    artifact = lrai.Artifact.open(small_artifact.build(tmp_path / "m.lrai", evaluation=rows))
    artifact.manifest.files[EVALUATION] = msgspec.structs.replace(
        artifact.manifest.files[EVALUATION], size_bytes=200 << 20
    )
    refused = Future[lrai.InferenceResponse]()
    refused.set_exception(lrai.RequestError("x is out of range"))

    def start(request: lrai.InferenceRequest, _: Version) -> Future[lrai.InferenceResponse]:
        heard.append(request.inputs["x"])
        return refused

    config = lrai.LraiConfig()
    core: Any = SimpleNamespace(config=config, pids=lambda _: {"a": 1}, start=start)
    (variant, _), limits = artifact.manifest.variants, config.scheduler
    version = Version("m", artifact.version, artifact, variant, None, ("m",), limits)
    with pytest.raises(lrai.ConditionNotMet, match=r"warming up m with 1 row.*: x is out of range"):
        warm_up(core, version)
    np.testing.assert_array_equal(heard, [cast("Any", rows.inputs[0][0])])
