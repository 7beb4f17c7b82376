"""Peers of the compiler's benchmark: networks in torch, and Olive in an environment of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper

from benchmarks import compiler_peers, compiler_torch, models
from benchmarks.compiler_models import Model
from benchmarks.compiler_olive import Olive
from benchmarks.compiler_peers import _ort, cell_shapes, executed, openvino_run

Array = NDArray[Any]


def test_torch_says_what_the_file_says_of_an_mlp(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    features = generator.standard_normal((300, 8)).astype(np.float32)
    labels = (features[:, 0] > 0).astype(np.int64)
    path = models.train_mlp(tmp_path / "mlp.onnx", features, labels, (16, 16))
    same(path, compiler_torch.mlp(path), {"features": features[:5]})


def test_torch_says_what_the_file_says_of_an_encoder(tmp_path: Path) -> None:
    config = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 8,
        "layer_norm_eps": 1e-12,
    }
    path = models.encoder_onnx(tmp_path / "encoder.onnx", weights(2, 8), config)
    ids, mask = np.array([[1, 5, 9, 2], [1, 7, 2, 0]]), np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    same(path, compiler_torch.encoder(path), {"input_ids": ids, "attention_mask": mask})


def weights(layers: int, width: int) -> dict[str, Array]:
    """Return those of a small BERT."""
    generator = np.random.default_rng(1)
    shapes = {
        "embeddings.word_embeddings.weight": (10, width),
        "embeddings.position_embeddings.weight": (6, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
    }
    for layer in range(layers):
        at = f"encoder.layer.{layer}"
        sides = {
            f"{at}.attention.self.query": (width, width),
            f"{at}.attention.self.key": (width, width),
            f"{at}.attention.self.value": (width, width),
            f"{at}.attention.output.dense": (width, width),
            f"{at}.intermediate.dense": (4 * width, width),
            f"{at}.output.dense": (width, 4 * width),
            f"{at}.attention.output.LayerNorm": (width,),
            f"{at}.output.LayerNorm": (width,),
        }
        for name, shape in sides.items():
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]
    return {
        name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }


def same(path: Path, module: Callable[..., Any], feed: dict[str, Array]) -> None:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        own = module(*map(torch.from_numpy, feed.values())).numpy()
    np.testing.assert_allclose(own, session.run(None, feed)[0], atol=1e-5)


OLIVE = """
from pathlib import Path


def main(arguments, called_as_console_script):
    asked = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    print("what libraries say is no answer")
    if asked["--precision"] == "fp32":
        raise SystemExit(f"not {asked['--precision']}")
    Path(asked["-o"]).mkdir()
    Path(asked["-o"], "model.onnx").write_text(f"{asked['--precision']} of {asked['-m']}")
"""


def python(folder: Path, olive: str) -> Path:
    """Return an interpreter that finds this as Olive, and nothing of what this one is told."""
    package = folder / "olive" / "cli"
    package.mkdir(parents=True)
    (package / "launcher.py").write_text(olive)
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


def test_olive_makes_what_it_can_in_a_process_of_its_own(tmp_path: Path) -> None:
    with Olive(python(tmp_path, OLIVE), tmp_path) as olive:
        failed, made = olive.made(Path("model.onnx"), tmp_path)
        assert (failed.form, failed.error) == ("fp32", "SystemExit: not fp32")
        assert (made.form, made.error) == ("int8", "")
        assert made.file.read_text() == "int8 of model.onnx"


def test_an_environment_without_olive_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is none"):
        Olive(python(tmp_path, "raise ImportError('there is none')"), tmp_path)
    with pytest.raises(SystemExit, match="No such file"):
        Olive(tmp_path / "no" / "python", tmp_path)


def test_an_olive_that_ends_is_no_peer(tmp_path: Path) -> None:
    source = "import os\n\n\ndef main(*_, **__):\n    os._exit(1)\n"
    with Olive(python(tmp_path, source), tmp_path) as olive:
        for made in olive.made(Path("model.onnx"), tmp_path):
            assert made.error == "its process has ended"


def test_onnxruntime_is_called_as_directly_as_by_lrai(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    labels = (features[:, 0] > 0).astype(np.int64)
    path = models.train_mlp(tmp_path / "mlp.onnx", features, labels, (16,))
    feed = {"features": features[:5]}
    meant = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feed)
    monkeypatch.delattr(ort.InferenceSession.__mro__[1], "run")
    for own, right in zip(_ort(path, (), 1)(feed), meant, strict=True):
        np.testing.assert_array_equal(own, right)


def test_openvino_is_compiled_for_the_shapes_that_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ov = pytest.importorskip("openvino")
    features = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    labels = (features[:, 0] > 0).astype(np.int64)
    path = models.train_mlp(tmp_path / "mlp.onnx", features, labels, (16,))
    unseen = [{"features": features[:1]}]
    model = Model("mlp", path, {}, unseen, "softmax", [(1, 0), (8, 0)])
    assert cell_shapes(model) == {((1, 8),), ((8, 8),)}
    compiled, real = list[bool](), ov.Core.compile_model

    def compile_model(self: Any, network: Any, *rest: Any) -> Any:
        compiled.append(network.is_dynamic())
        return real(self, network, *rest)

    monkeypatch.setattr(ov.Core, "compile_model", compile_model)
    network = ov.Core().read_model(path)
    run = openvino_run(network, "f32", cell_shapes(model), 1)
    free = openvino_run(network, "f32", frozenset(), 1)
    for rows in (1, 8, 8, 3, 5, 1):
        feed = {"features": features[:rows]}
        np.testing.assert_allclose(run(feed)[0], free(feed)[0], atol=1e-5)
    assert compiled == [True, False, False, True]  # free, one row, eight rows, any other


@pytest.mark.parametrize(("isa", "most"), [("avx2", 64), ("avx512", 64), ("vnni", 127)])
@pytest.mark.parametrize("build", [compiler_peers._dynamic, compiler_peers._static])
def test_weights_have_seven_bits_where_sums_of_products_may_overflow(
    build: Callable[..., None], isa: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_peers, "isa_class", lambda: isa)
    features = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    labels = (features[:, 0] > 0).astype(np.int64)
    path = models.train_mlp(tmp_path / "mlp.onnx", features, labels, (16,))
    unseen = [{"features": features[:1]}]
    model = Model("mlp", path, {"features": features}, unseen, "softmax", [(1, 0)])
    build(model, out := tmp_path / "out.onnx")
    arrays = [onnx.numpy_helper.to_array(one) for one in onnx.load(out).graph.initializer]
    weights = [array for array in arrays if array.dtype == np.int8 and array.ndim == 2]
    assert max(np.abs(array.astype(int)).max() for array in weights) == most


def test_a_file_that_is_run_as_another_is_no_other_peer(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    labels = (features[:, 0] > 0).astype(np.int64)
    source = models.train_mlp(tmp_path / "mlp.onnx", features, labels, (16,))
    copy = onnx.load(source)
    copy.graph.node[0].input[0] = "same"
    copy.graph.node.insert(0, helper.make_node("Identity", ["features"], ["same"]))
    onnx.save(copy, tmp_path / "copy.onnx")
    deeper = models.train_mlp(tmp_path / "deeper.onnx", features, labels, (16, 16))
    assert executed(tmp_path / "copy.onnx") == executed(source) != executed(deeper)
