"""The way of an existing model repository to LRAI and back, as `make triton-demo` shows it."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import lrai_core as lrai
from benchmarks import models
from benchmarks.triton_demo import answered, stand_in
from benchmarks.triton_server import Prepared, TritonServer, make_backends, variables
from tests.integration.triton.server import EXPLICIT, Triton

pytestmark = pytest.mark.server

CONFIG = """\
backend: "onnxruntime"  # by hand
max_batch_size: 16
input [ { name: "features" data_type: TYPE_FP32 dims: [ 64 ] } ]
output [ { name: "logits" data_type: TYPE_FP32 dims: [ 10 ] } ]
dynamic_batching { }
"""


def test_one_line_then_compiled_then_switched_back(prepared: Prepared, tmp_path: Path) -> None:
    entry, rows = tmp_path / "models" / "classifier", tmp_path / "rows.npz"
    (entry / "1").mkdir(parents=True)
    config = entry / "config.pbtxt"
    config.write_text(CONFIG)
    source, held_out = models.classifier(entry / "1" / "model.onnx", seed=0, hidden=1024)
    np.savez(rows, features=held_out["features"][:1_000], label=held_out["label"][:1_000])
    make_backends(prepared.environment, tmp_path / "backends")
    stand_in(tmp_path / "backends")
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    asked = held_out["features"][1_000:1_016]
    (expected,) = session.run(None, {"features": asked})

    def lrai_triton(*arguments: str) -> None:
        command = [str(prepared.environment / "bin" / "lrai"), "triton", *arguments]
        environment = {**os.environ, **variables(prepared.environment)}
        subprocess.run(command, check=True, env=environment, capture_output=True)

    with TritonServer(
        entry.parent,
        environment=prepared.environment,
        backends=tmp_path / "backends",
        arguments=EXPLICIT,
        env={"LRAI_ACTOR_THREADS": "1"},
    ) as server:
        triton = Triton(server, entry.parent)

        def assert_right(worst: float, *, by: str = "") -> None:
            triton.load("classifier")
            before, protocols = answered(server, "classifier"), ("http", "grpc")
            for protocol in protocols:
                got = triton.ask("classifier", {"features": asked}, protocol=protocol)["logits"]
                assert got.shape == expected.shape
                assert (got.argmax(1) == expected.argmax(1)).mean() >= 0.9
                assert np.abs(got - expected).max() <= worst
            ours = {by: len(protocols)} if by else {}
            assert answered(server, "classifier", (before + Counter(ours)).total()) - before == ours

        assert_right(1e-6)
        config.write_text(CONFIG.replace('"onnxruntime"', '"lrai"'))
        assert_right(1e-4, by="version 1, fp32")
        lrai_triton("compile", str(entry), "--evaluation", str(rows), "--threads", "1")
        chosen = lrai.Artifact.open(entry / "2" / "model.lrai").manifest.chosen
        assert chosen != "fp32"
        assert_right(np.inf, by=f"version 2, {chosen}")
        lrai_triton("add", str(source), "--model-repository", str(entry.parent), "--name", "other")
        triton.load("other")
        got = triton.ask("other", {"features": asked})["logits"]
        assert np.abs(got - expected).max() <= 1e-4
        lrai_triton("remove", str(entry))
        assert config.read_text() == CONFIG
        assert_right(1e-6)
