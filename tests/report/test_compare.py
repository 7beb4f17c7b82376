"""How two variants are compared: in answers as the gate does, in time by the same requests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from lrai_core import Artifact, InferenceRequest, InferenceResponse, LraiConfig
from lrai_report.compare import Side, _asked, differing, measure, measure_of, sides
from tests.core import small_artifact


def side(*gaps: float) -> Side:
    """Return one whose answers are ones, and so much more, one for each output."""
    outputs = {
        name: np.full((1, 3), 1 + gap, np.float32)
        for name, gap in zip("yzv"[: len(gaps)], gaps, strict=True)
    }
    answer = InferenceResponse(
        model_name="m", model_version="1", id="", outputs=outputs, parameters={}
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


@pytest.mark.parametrize(
    ("gaps", "agrees", "gap", "said"),
    [
        ((0.0, 0.5, 0.0), False, 0.5, "z: [0] 1.5"),
        ((0.001, 0.0, 0.002), True, 0.002, "v: [0] 1.002"),
    ],
)
def test_of_several_outputs_it_is_the_one_farthest_apart_that_is_shown(
    gaps: tuple[float, ...], agrees: bool, gap: float, said: str
) -> None:
    manifest = small_artifact.manifest()
    (one,) = manifest.signature.outputs
    outputs = tuple(msgspec.structs.replace(one, name=name) for name in "yzv")
    signature = msgspec.structs.replace(manifest.signature, outputs=outputs)
    several = msgspec.structs.replace(manifest, signature=signature)
    artifact = Artifact(Path(), several, "0" * 64)
    asked = [InferenceRequest(model_name="", inputs={})]
    (worst,) = differing([side(0, 0, 0), side(*gaps)], asked, artifact, lambda: None)
    assert worst.agrees is agrees
    assert worst.gap == pytest.approx(gap, rel=1e-3)
    assert (worst.first, worst.second) == (f"{said[0]}: [0] 1", said)


def test_every_round_begins_at_other_requests_and_at_the_same_for_both_sides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun = list[tuple[str, list[str]]]()

    async def asked(
        runtime: Any, requests: Sequence[InferenceRequest], *_: object
    ) -> tuple[list[float], float]:
        begun.append((runtime.name, [request.model_name for request in requests]))
        return [0.001, 0.002], 1.0

    monkeypatch.setattr("lrai_report.compare._asked", asked)
    names = ("fp32", "int8")
    both = [
        Side(one, cast("Any", SimpleNamespace(infer=lambda _: None, name=one))) for one in names
    ]
    requests = [InferenceRequest(model_name=name, inputs={}) for name in "abcdef"]
    measure(both, requests, callers=1, seconds=1.0, rounds=3, tick=lambda: None)
    for name in names:
        own = ["".join(order) for side, order in begun if side == name]
        assert own == ["abcdef", "cdefab", "efabcd"]
    assert both[0].p95_ms == [2.0] * 3  # what was seen, and nothing between


def test_every_caller_is_answered_once_however_short_a_round_is() -> None:
    async def infer(_: InferenceRequest) -> None:
        await asyncio.sleep(0)

    runtime: Any = SimpleNamespace(infer_async=infer)
    requests = [InferenceRequest(model_name="", inputs={})]
    latencies, took = asyncio.run(_asked(runtime, requests, 3, 0.0))
    assert len(latencies) == 3
    assert 0 < max(latencies) <= took


def test_callers_find_room_in_the_queue_whatever_it_holds_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = list[LraiConfig]()

    def opened(config: LraiConfig, **_: Any) -> Any:
        given.append(config)
        serving = SimpleNamespace(variant="fp32")
        return SimpleNamespace(
            load=lambda *_, **__: None, models=lambda: [serving], close=lambda: None
        )

    monkeypatch.setattr("lrai_report.compare.Runtime", opened)
    monkeypatch.setenv("LRAI_SCHEDULER_MAX_QUEUE_ROWS", "4")
    with sides([(Artifact(Path(), small_artifact.manifest(), "0" * 64), "")]):
        (config,) = given
    assert config.scheduler.max_queue_rows > 1_000_000
    assert config.scheduler.max_queue_bytes > 1 << 40
