"""Real models for tests with real processes, compiled once a session, and one real Triton."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import lrai_core as lrai
from benchmarks.models import classifier, minilm_onnx
from benchmarks.triton_server import Prepared, TritonServer, prepare
from tests.integration.triton.server import EXPLICIT, Triton


@pytest.fixture(scope="session")
def classifier_rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return classifier(tmp_path_factory.mktemp("classifier") / "classifier.onnx", seed=0)


@pytest.fixture(scope="session")
def classifier_fp32(
    classifier_rows: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> lrai.Artifact:
    out = tmp_path_factory.mktemp("artifacts") / "classifier.lrai"
    return lrai.compile(classifier_rows[0], out=out, threads=1)


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return minilm_onnx(tmp_path_factory.mktemp("minilm") / "minilm.onnx")


@pytest.fixture(scope="session")
def minilm_fp32(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> lrai.Artifact:
    return lrai.compile(minilm, out=tmp_path_factory.mktemp("artifacts") / "minilm.lrai", threads=1)


@pytest.fixture(scope="session")
def minilm_session(minilm: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(minilm, options)


@pytest.fixture(scope="session")
def prepared() -> Prepared:
    return prepare()


@pytest.fixture(scope="session")
def triton(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """Yield one real Triton for all tests that need one."""
    repository = tmp_path_factory.mktemp("repository")
    with (
        TritonServer(
            repository,
            environment=prepared.environment,
            backends=prepared.backends,
            arguments=EXPLICIT,
            env={"LRAI_ACTOR_THREADS": "1", "LRAI_ACTOR_HANG_SECONDS": "60"},  # some are stopped
        ) as server,
        contextlib.closing(Triton(server, repository)) as served,
    ):
        yield served


def sentence(random: np.random.Generator, rows: int, length: int) -> dict[str, Any]:
    """Return token ids and mask of `rows` sentences without padding."""
    ids = random.integers(1000, 29000, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}
