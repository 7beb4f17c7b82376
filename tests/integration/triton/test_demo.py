"""The way of an existing model repository to LRAI and back, as `make triton-demo` shows it."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import lrai_core as lrai
from benchmarks import models
from benchmarks.triton_demo import answered, set_up
from benchmarks.triton_server import TritonServer, variables
from lrai_core.compiler.gate import Conditions
from tests.integration.triton.server import EXPLICIT, Triton

pytestmark = pytest.mark.server

CONFIG = """\
backend: "onnxruntime"  # by hand
max_batch_size: 16
input [ { name: "features" data_type: TYPE_FP32 dims: [ 64 ] } ]
output [ { name: "logits" data_type: TYPE_FP32 dims: [ 10 ] } ]
dynamic_batching { }
"""


def test_one_line_then_compiled_then_switched_back(tmp_path: Path) -> None:
    entry, rows = tmp_path / "models" / "classifier", tmp_path / "rows.npz"
    (entry / "1").mkdir(parents=True)
    config = entry / "config.pbtxt"
    config.write_text(CONFIG)
    source, held_out = models.classifier(entry / "1" / "model.onnx", seed=0, hidden=1024)
    np.savez(rows, features=held_out["features"][:1_000], label=held_out["label"][:1_000])
    made = set_up(None, tmp_path)
    assert made.backends == tmp_path / "backends", "another one is added"
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    labels, parts = held_out["label"][1_000:2_600], np.split(held_out["features"][1_000:2_600], 100)
    expected = np.concatenate([session.run(None, {"features": part})[0] for part in parts])

    def lrai_triton(*arguments: str) -> None:
        command = [str(made.environment / "bin" / "lrai"), "triton", *arguments]
        environment = {**os.environ, **variables(made.environment)}
        subprocess.run(command, check=True, env=environment, capture_output=True)

    with (
        TritonServer(
            entry.parent, **made._asdict(), arguments=EXPLICIT, env={"LRAI_ACTOR_THREADS": "1"}
        ) as server,
        closing(Triton(server, entry.parent)) as triton,
    ):

        def ask(name: str, rows: Any, protocol: str = "http") -> Any:
            return triton.ask(name, {"features": rows}, protocol=protocol)["logits"]

        def assert_right(worst: float, *, share: float = 1.0, by: str = "") -> None:
            triton.load("classifier")
            before, protocols = answered(server, "classifier"), ("http", "grpc")
            for protocol in protocols:
                got = np.concatenate([ask("classifier", part, protocol) for part in parts])
                assert got.shape == expected.shape
                assert (np.abs(got - expected).max(1) <= worst).mean() >= share
                right, was_right = ((of.argmax(1) == labels).mean() for of in (got, expected))
                assert was_right - right <= Conditions().max_accuracy_loss
            ours = {by: len(parts) * len(protocols)} if by else {}
            assert answered(server, "classifier", (before + Counter(ours)).total()) - before == ours

        assert_right(1e-6)
        config.write_text(CONFIG.replace('"onnxruntime"', '"lrai"'))
        assert_right(1e-4, by="version 1, fp32")
        lrai_triton("compile", str(entry), "--evaluation", str(rows), "--threads", "1")
        manifest = lrai.Artifact.open(entry / "2" / "model.lrai").manifest
        chosen = manifest.variant(manifest.chosen)
        assert chosen.id != "fp32"
        assert chosen.gate is not None
        # Of rows that the gate has not seen a few more may lie beyond what 99 % of its own keep to.
        by = f"version 2, {chosen.id}"
        assert_right(chosen.gate.difference["p99"], share=0.95, by=by)
        lrai_triton("add", str(source), "--model-repository", str(entry.parent), "--name", "other")
        triton.load("other")
        assert np.abs(ask("other", parts[0]) - expected[:16]).max() <= 1e-4
        lrai_triton("remove", str(entry))
        assert config.read_text() == CONFIG
        assert_right(1e-6)
