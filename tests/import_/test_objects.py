"""Models in memory become a file that is compiled as any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

import lrai_core as lrai
from lrai_core.engine.engine import find_engine
from lrai_import.objects import to_onnx

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, about itself
ROWS = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))


def run(file: Path, *rows: Any) -> list[Any]:
    return find_engine("onnxruntime").load(file).run(rows)


@pytest.mark.parametrize("exported", [False, True])
def test_a_module_or_a_program_of_pytorch_is_written_and_compiled(
    tmp_path: Path, exported: bool
) -> None:
    module = network()
    expected = module(torch.from_numpy(ROWS)).detach().numpy()
    rows = {0: torch.export.Dim("batch", min=1, max=1024)}
    program = torch.export.export(module.eval(), (torch.from_numpy(ROWS),), dynamic_shapes=(rows,))
    file = to_onnx(program if exported else module, {"input": ROWS}, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").stat().st_size >= 64 * 8 * 4
    assert np.allclose(run(file, ROWS)[0], expected, atol=1e-5)
    assert np.allclose(run(file, ROWS[:1])[0], expected[:1], atol=1e-5)
    artifact = lrai.compile(file, out=tmp_path / "m.lrai", threads=1)
    assert artifact.manifest.signature.inputs[0].batch_axis == 0


def test_an_estimator_is_written_from_its_table(tmp_path: Path) -> None:
    x, y = load_iris(return_X_y=True)
    table = x.astype(np.float32)
    model = LogisticRegression(max_iter=500).fit(table, y)
    file = to_onnx(model, {"measures": table}, tmp_path / "m.onnx")
    assert (run(file, table)[0] == model.predict(table)).mean() > 0.99


def test_what_is_there_is_replaced_whole(tmp_path: Path) -> None:
    sizes = []
    for _ in range(2):
        to_onnx(network(), {"input": ROWS}, tmp_path / "m.onnx")
        sizes.append((tmp_path / "m.onnx.data").stat().st_size)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("model", "inputs", "says"),
    [
        (
            object(),
            {"x": ROWS},
            r"the model is a builtins\.object; what can be converted is of torch",
        ),
        (network(), {"x": ROWS.astype(complex)}, r"input 'x' is complex128 \[20, 8\]; needed are"),
        (network(), {"x": np.float32(1)}, r"input 'x' is float32 \[\]; needed are rows"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_a_sentence(
    tmp_path: Path, model: object, inputs: dict[str, Any], says: str
) -> None:
    with pytest.raises(lrai.UsageError, match=says):
        to_onnx(model, inputs, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
