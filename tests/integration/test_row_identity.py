"""Row i belongs to caller i: hundreds of concurrent callers on a real model with a length axis."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lrai_core as lrai
from lrai_core.artifact import LatencyPoint
from lrai_core.compiler import search
from lrai_engines import forms
from tests.integration.conftest import sentence
from tests.pause import pause
from tests.tiny_models import token_model

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


@contextlib.contextmanager
def at_once(runtime: lrai.Runtime) -> Iterator[None]:
    """Have what is asked meanwhile wait, so that it shares calls."""
    pids = [pid for model in runtime.models() for pid in model.actor_pids]
    for pid in pids:
        pause(pid)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> lrai.Artifact:
    folder = tmp_path_factory.mktemp("tokens")
    return lrai.compile(token_model(folder / "tokens.onnx"), out=folder / "tokens.lrai", threads=1)


@pytest.mark.parametrize("isolation", ["process", "inline"])
def test_callers_that_share_a_call_get_the_outputs_that_each_asked_for(
    tokens: lrai.Artifact, isolation: str
) -> None:
    wanted = [("mean",), ("tokens",), ("tokens", "mean"), ()] * 4
    payloads = [sentence(np.random.default_rng(i), 1, 3 + i) for i in range(len(wanted))]
    for payload in payloads:
        payload["input_ids"] %= 100
    requests = [
        lrai.InferenceRequest(model_name="tokens", inputs=payload, outputs=names)
        for payload, names in zip(payloads, wanted, strict=True)
    ]
    seen = list[lrai.Event]()
    settings = {"actor.threads": 1, "actor.hang_seconds": 60, "actor.isolation": isolation}
    config = lrai.load_config(call=settings)
    with lrai.Runtime.open(tokens, config=config, observers=[seen.append]) as runtime:
        with at_once(runtime):
            started = runtime.start_all(requests)
        answers = [one.result(60) if isinstance(one, Future) else one for one in started]
    calls = [event.attributes["requests"] for event in seen if event.kind == "batch_dispatched"]
    assert max(calls) > 4, "more than want the same"
    session = onnxruntime.InferenceSession(tokens.path.with_suffix(".onnx"))
    for answer, names, payload in zip(answers, wanted, payloads, strict=True):
        assert isinstance(answer, lrai.InferenceResponse)
        expected = dict(zip(("mean", "tokens"), session.run(None, payload), strict=True))
        assert list(answer.outputs) == [*(names or expected)]
        for name, array in answer.outputs.items():
            np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6)


def test_a_row_in_int8_is_the_same_alone_and_among_others(
    classifier_rows: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = classifier_rows
    made, evaluation = forms.forms, {name: array[:1500] for name, array in rows.items()}

    def profile(candidates: Sequence[search.Candidate], *_: object) -> None:
        for one in candidates:
            ms = 0.1 if one.form == "int8-row" else 1.0
            one.latency = [LatencyPoint(rows=1, length=0, median_ms=ms, spread_ms=0.0)]
            one.speedup = 1 / ms

    monkeypatch.setattr(search, "profile", profile)
    monkeypatch.setattr(forms, "forms", lambda *what: {"int8-row": made(*what)["int8-row"]})
    out = tmp_path / "classifier.lrai"
    artifact = lrai.compile(model, out=out, evaluation=evaluation, threads=1)
    variant = artifact.manifest.variant("int8-row")
    assert artifact.manifest.chosen == variant.id
    mates = rows["features"][:60] * np.where(np.arange(60) % 3, 1, 50)[:, None].astype(np.float32)
    requests = [
        lrai.InferenceRequest(model_name="classifier", inputs={"features": mate[None]})
        for mate in mates
    ]
    config = lrai.load_config(call={"actor.threads": 1, "actor.hang_seconds": 60})
    with lrai.Runtime.open(artifact, config=config) as runtime:
        alone = [runtime.infer(request) for request in requests]
        before = runtime.stats()["batch_dispatched"]
        with at_once(runtime):
            ids = [runtime.submit(request) for request in requests]
        shared = [runtime.result(identity) for identity in ids]
        calls = runtime.stats()["batch_dispatched"] - before
    assert calls < len(mates) // 3, "so that most shared one"
    assert {answer.parameters["variant"] for answer in (*alone, *shared)} == {"int8-row"}
    for one, other in zip(alone, shared, strict=True):
        apart = np.abs(one.outputs["logits"] - other.outputs["logits"]).max()
        assert apart <= variant.batch_effect
