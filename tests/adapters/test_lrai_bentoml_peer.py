"""BentoML's own tests of its frameworks, rewritten for this one.

From BentoML's `tests/integration/frameworks/test_frameworks.py` and `models/onnx.py`, at 1.4.40.

| there | here |
|---|---|
| `test_wrong_module_load_exc` | as it is; the message names both modules |
| `test_generic_arguments` | labels and metadata, beside our own; no custom objects (pickles), no signatures (of legacy runners) |
| `test_get`, `test_load` | as they are; what is loaded is an artifact |
| `test_runnable`, `test_runner_batching` | as calls of our runner, one by one and at the same time |
| `test_runner_cpu_multi_threading` | threads are a setting of the model's actor |
| `onnx_pytorch_model`, `onnx_rf_model`, `onnx_le_models` | one output, several outputs, text |
| `test_backward_warnings`, `test_model_options_init`, `test_get_runnable`, `test_get_service`, `test_runner_nvidia_gpu` | nothing of that is here: legacy runners, options that are none, GPUs |
"""  # noqa: E501 - a table

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import bentoml
import numpy as np
import onnx
import onnxruntime
import pytest
from bentoml.exceptions import NotFound
from onnx import TensorProto, helper

import lrai_bentoml
import lrai_core as lrai
from benchmarks.models import classifier
from tests.tiny_models import token_model

EMBEDDED = {"runtime.address": "embedded", "actor.threads": 1}


class Case(NamedTuple):
    """A model, and inputs that are asked for at the same time."""

    name: str
    make: Callable[[Path], Path]
    inputs: list[tuple[Any, ...]]


def plain(folder: Path) -> Path:
    return classifier(folder / "classifier.onnx", seed=0)[0]


def several(folder: Path) -> Path:
    return token_model(folder / "tokens.onnx")


def text(folder: Path) -> Path:
    """Write a model that numbers words: string [batch] to int64 [batch]."""
    node = helper.make_node(
        "LabelEncoder", ["words"], ["numbers"], domain="ai.onnx.ml",
        keys_strings=["cat", "dog"], values_int64s=[1, 2], default_int64=0,
    )  # fmt: skip
    words = helper.make_tensor_value_info("words", TensorProto.STRING, ["batch"])
    numbers = helper.make_tensor_value_info("numbers", TensorProto.INT64, ["batch"])
    graph = helper.make_graph([node], "text", [words], [numbers])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), folder / "text.onnx")
    return folder / "text.onnx"


RANDOM = np.random.default_rng(0)
CASES = [
    Case("one", plain, [(RANDOM.normal(size=(n, 64)).astype(np.float32),) for n in (1, 2, 3)]),
    Case("several", several, [(np.full((n, 4), n), np.ones((n, 4), np.int64)) for n in (1, 2)]),
    Case("text", text, [(np.array(["dog", "cat"], object),), (np.array(["cow"], object),)]),
]


class Saved(NamedTuple):
    case: Case
    source: Path
    model: bentoml.Model
    runner: lrai_bentoml.Runner

    def expected(self, inputs: tuple[Any, ...]) -> list[Any]:
        session = onnxruntime.InferenceSession(self.source)
        names = [one.name for one in session.get_inputs()]
        return list(session.run(None, dict(zip(names, inputs, strict=True))))

    def check(self, answer: Any, inputs: tuple[Any, ...]) -> None:
        expected = self.expected(inputs)
        got = answer if isinstance(answer, tuple) else (answer,)
        assert isinstance(answer, tuple) == (len(expected) > 1)
        for one, wanted in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, wanted, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Saved]:
    case: Case = request.param
    source = case.make(tmp_path_factory.mktemp(case.name))
    model = lrai_bentoml.import_model(f"peer-{case.name}", source, options={"threads": 1})
    runner = lrai_bentoml.runner(model.tag, settings=EMBEDDED)
    yield Saved(case, source, model, runner)
    runner.close()


def test_wrong_module_load_exc() -> None:
    with bentoml.models.create("wrong_module", module=__name__) as model:
        pass
    for given in (model.tag, model):
        with pytest.raises(NotFound, match=f"{model.tag} was saved by {__name__}"):
            lrai_bentoml.load_model(given)


def test_generic_arguments(saved: Saved) -> None:
    given: dict[str, Any] = {
        "labels": {"pytest-label-N4nr": "4mH7", "pytest-label-7q72": "3mDd"},
        "metadata": {"pytest-metadata-vSW4": [0, 9, 2], "pytest-metadata-qJJ3": "Wy5M"},
    }
    artifact = lrai_bentoml.load_model(saved.model)
    model = lrai_bentoml.save_model("generic", artifact, **given)
    assert given["labels"].items() <= model.info.labels.items()
    assert {key: model.info.metadata[key] for key in given["metadata"]} == given["metadata"]
    with pytest.raises(TypeError, match="custom_objects"):
        lrai_bentoml.save_model("generic", artifact, custom_objects={"a": 1})  # type: ignore[call-arg]


def test_get(saved: Saved) -> None:
    assert lrai_bentoml.get(saved.model.tag) == saved.model
    assert lrai_bentoml.get(str(saved.model.tag)) == saved.model
    assert lrai_bentoml.get(saved.model.tag).info.name == f"peer-{saved.case.name}"


def test_load(saved: Saved) -> None:
    artifact = lrai_bentoml.load_model(saved.model)
    with lrai.Runtime.open(artifact, address="embedded") as runtime:
        names = [spec.name for spec in artifact.manifest.signature.inputs]
        for inputs in saved.case.inputs:
            asked = dict(zip(names, inputs, strict=True))
            answer = runtime.infer(lrai.InferenceRequest(model_name="", inputs=asked))
            outputs = tuple(answer.outputs.values())
            saved.check(outputs if len(outputs) > 1 else outputs[0], inputs)


def test_runnable(saved: Saved) -> None:
    for inputs in saved.case.inputs:
        saved.check(saved.runner.run(*inputs), inputs)


def test_runner_batching(saved: Saved) -> None:
    async def together() -> list[Any]:
        return await asyncio.gather(*[saved.runner.async_run(*one) for one in saved.case.inputs])

    for answer, inputs in zip(asyncio.run(together()), saved.case.inputs, strict=True):
        saved.check(answer, inputs)
