"""Row i belongs to caller i: hundreds of concurrent callers on a real model with a length axis."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lrai_core as lrai
from tests.integration.conftest import sentence

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def runtime(minilm_fp32: lrai.Artifact) -> Iterator[lrai.Runtime]:
    config = lrai.load_config(call={"actor.threads": 1})
    with lrai.Runtime.open(minilm_fp32, config=config) as opened:
        yield opened


callers = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from((3, 4, 5, 7, 11, 12, 16, 23, 40))),
    min_size=100,
    max_size=300,
)


async def ask_all(runtime: lrai.Runtime, payloads: Sequence[dict[str, Any]]) -> list[Any]:
    requests = [lrai.InferenceRequest(model_name="minilm", inputs=p) for p in payloads]
    answers = await asyncio.gather(*(runtime.infer_async(r) for r in requests))
    return [answer.outputs["sentence_embedding"] for answer in answers]


def mismatches(answers: Sequence[Any], expected: Sequence[Any], tolerance: float) -> list[int]:
    """Return the callers whose answer is not theirs."""
    return [
        i
        for i, (got, want) in enumerate(zip(answers, expected, strict=True))
        if got.shape != want.shape or not np.abs(got - want).max() <= tolerance
    ]


@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(shapes=callers, seed=st.integers(0, 2**32 - 1))
def test_row_i_comes_back_to_caller_i(
    runtime: lrai.Runtime,
    minilm_fp32: lrai.Artifact,
    minilm_session: onnxruntime.InferenceSession,
    shapes: list[tuple[int, int]],
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    payloads = [sentence(random, rows, length) for rows, length in shapes]
    expected = [minilm_session.run(None, payload)[0] for payload in payloads]
    dispatched = runtime.stats().get("batch_dispatched", 0)
    answers = asyncio.run(ask_all(runtime, payloads))
    calls = runtime.stats()["batch_dispatched"] - dispatched
    effect = minilm_fp32.manifest.variant("fp32").batch_effect

    assert effect == 1e-4
    assert calls < len(payloads), "nothing was coalesced, so nothing was tested"
    assert not mismatches(answers, expected, effect)

    first = 0
    other = next(i for i, s in enumerate(shapes) if s[0] == shapes[0][0] and i != first)
    answers[first], answers[other] = answers[other], answers[first]
    assert mismatches(answers, expected, effect) == [first, other]


def test_a_caller_gets_the_outputs_it_asked_for(runtime: lrai.Runtime) -> None:
    payload = sentence(np.random.default_rng(0), 2, 9)
    wanted = lrai.InferenceRequest(
        model_name="minilm", inputs=payload, outputs=("sentence_embedding",), id="mine"
    )
    answer = runtime.infer(wanted)
    assert list(answer.outputs) == ["sentence_embedding"]
    assert answer.id == "mine"
    assert answer.parameters["variant"] == "fp32"
