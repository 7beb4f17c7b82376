"""Batch transform: many rows to a body, larger bodies, and advice on both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lrai_core as lrai
from tests.core.compiler.onnx_files import linear, save
from tests.integration.sagemaker.conftest import Container, Reply

pytestmark = pytest.mark.server


def serve(models: Path, folder: Path, sockets: Path, **variables: str) -> Container:
    """Start a container as the platform does, for batch transform."""
    variables = {"SAGEMAKER_BATCH": "true", **variables}
    return Container([str(models / "columns.lrai")], folder, sockets, **variables)


def post_csv(container: Container, prices: object, counts: object) -> Reply:
    lines = "".join(f"{price},{count}\n" for price, count in zip(prices, counts, strict=True))  # type: ignore[call-overload]
    return container.post(lines.encode(), Content_Type="text/csv", Accept="text/csv")


def test_a_body_of_more_rows_than_a_request_may_have_is_answered_in_their_order(
    models: Path, tmp_path: Path, sockets: Path
) -> None:
    random = np.random.default_rng(0)
    prices, counts = random.integers(0, 1000, 20_000), random.integers(0, 100, 20_000)
    variables = {"SAGEMAKER_MAX_PAYLOAD_IN_MB": "1", "SAGEMAKER_MAX_CONCURRENT_TRANSFORMS": "4"}
    with serve(models, tmp_path, sockets, **variables) as container:
        container.wait_until_ready()
        reply = post_csv(container, prices, counts)
        assert reply.status == 200, reply.body
        answers = np.array(reply.body.split(), dtype=float)
        np.testing.assert_array_equal(answers, prices * counts)
        wrong = post_csv(container, [*range(10_000), "x"], [1] * 10_001)
        assert (wrong.status, "no FP32" in wrong.json["error"]) == (400, True)
        large = container.post(b"1,2\n" * (1 << 19), Content_Type="text/csv")
        assert large.status == 413


def test_the_advice_is_what_the_platform_sets_or_within_its_bounds(
    models: Path, tmp_path: Path, sockets: Path
) -> None:
    with serve(models, tmp_path, sockets) as container:
        container.wait_until_ready()
        assert container.get("/execution-parameters").json == {
            "MaxConcurrentTransforms": 16,
            "BatchStrategy": "MULTI_RECORD",
            "MaxPayloadInMB": 6,
        }
        assert container.stop() == 0
    variables = {
        "SAGEMAKER_MAX_PAYLOAD_IN_MB": "50",
        "SAGEMAKER_MAX_CONCURRENT_TRANSFORMS": "3",
        "SAGEMAKER_BATCH_STRATEGY": "SINGLE_RECORD",
    }
    with serve(models, tmp_path, sockets, **variables) as container:
        container.wait_until_ready()
        assert container.get("/execution-parameters").json == {
            "MaxConcurrentTransforms": 3,
            "BatchStrategy": "SINGLE_RECORD",
            "MaxPayloadInMB": 50,
        }


def test_of_a_model_of_one_row_lines_come_one_by_one(tmp_path: Path, sockets: Path) -> None:
    proto = linear()
    for entry in (*proto.graph.input, *proto.graph.output):
        entry.type.tensor_type.shape.dim[0].dim_value = 1
    lrai.compile(save(proto, tmp_path / "one.onnx"), out=tmp_path / "columns.lrai", threads=1)
    with serve(tmp_path, tmp_path, sockets) as container:
        container.wait_until_ready()
        assert container.get("/execution-parameters").json["BatchStrategy"] == "SINGLE_RECORD"
