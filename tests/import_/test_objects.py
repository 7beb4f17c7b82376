"""Models in memory are compiled, or become a file that is compiled as any other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

import lrai_core as lrai
from lrai_core.engine.engine import find_engine
from lrai_import.objects import compile, to_onnx

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


def test_a_module_that_was_written_is_described_as_any_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    module = torch.nn.Sequential(*layers, torch.nn.Linear(4, 3))
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    images = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255
    to_onnx(module, {"image": images}, tmp_path / "model.onnx")
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    (tmp_path / "served.toml").write_text(
        'model = "model.onnx"\n[preprocess.photo]\ninput = "image"\n'
        '[postprocess]\nlabels = "labels.txt"\n'
    )
    artifact = lrai.compile(tmp_path / "served.toml", out=tmp_path / "m.lrai", threads=1)
    with lrai.Runtime.open(artifact, name="m") as runtime:
        request = lrai.InferenceRequest(model_name="m", inputs={"photo": pixels})
        labels = runtime.infer(request).outputs["label"]
    best = module(torch.from_numpy(images)).detach().numpy().argmax(axis=1)
    assert labels[:, 0].tolist() == ["abc"[index] for index in best]


def test_numbers_of_another_byte_order_are_numbers(tmp_path: Path) -> None:
    rows = {"input": ROWS.astype(">f4")}
    artifact = lrai.compile(network(), out=tmp_path / "m.lrai", threads=1, calibration=rows)
    assert artifact.manifest.signature.inputs[0].datatype == "FP32"
    to_onnx(network(), {"input": ROWS.astype(">f8").astype(">f4")}, tmp_path / "m.onnx")


def test_a_class_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(lrai.UsageError, match=r"the model is a builtins\.type"):
        lrai.compile(torch.nn.Linear, out=tmp_path / "m.lrai", calibration={"x": ROWS})


def test_what_is_there_is_replaced_whole(tmp_path: Path) -> None:
    sizes = []
    for _ in range(2):
        to_onnx(network(), {"input": ROWS}, tmp_path / "m.onnx")
        sizes.append((tmp_path / "m.onnx.data").stat().st_size)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("why", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_is_there_stays_whole_where_the_new_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: BaseException
) -> None:
    file = to_onnx(network(), {"input": ROWS}, tmp_path / "m.onnx")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"m.onnx", "m.onnx.data"}

    def cut(_: object, to: Path, *, location: str, **__: object) -> None:
        Path(to).write_bytes(b"half")
        Path(to).with_name(location).write_bytes(b"half")
        raise why

    # For what is written here alone: PyTorch's own exporter saves by it, too.
    monkeypatch.setattr("lrai_import.objects.onnx", SimpleNamespace(save=cut))
    with pytest.raises((lrai.CompileError, KeyboardInterrupt)):
        to_onnx(network(), {"input": ROWS}, file)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


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


@pytest.mark.parametrize("double", [False, True])
def test_a_module_is_compiled_as_it_is(tmp_path: Path, double: bool) -> None:
    module = network().double() if double else network()
    rows = {"input": ROWS.astype(float)}  # as numpy has numbers
    artifact = lrai.compile(module, out=tmp_path / "m.lrai", calibration=rows, threads=1)
    (given,) = artifact.manifest.signature.inputs
    kind = "FP64" if double else "FP32"
    assert (given.name, given.datatype, given.shape[1:]) == ("input", kind, (8,))
    assert given.batch_axis == 0


def test_inputs_may_be_told_apart_from_rows(tmp_path: Path) -> None:
    table = lrai.TensorSpec(name="x", datatype="FP32", shape=("n", 8))
    for name, inputs in (("a", {"x": ROWS}), ("b", (table,))):
        artifact = compile(network(), inputs, out=tmp_path / f"{name}.lrai", threads=1)
        assert [one.name for one in artifact.manifest.signature.inputs] == ["x"]


def test_columns_are_those_that_the_model_was_fitted_with(tmp_path: Path) -> None:
    """So a group may be one of them, and another one is not."""
    random = np.random.default_rng(0)
    columns: dict[str, Any] = {
        "age": random.normal(40, 9, 600),
        "sex": random.choice(["f", "m"], 600),
    }
    labels = (columns["age"] > 40).astype(int)
    steps = [("sex", OneHotEncoder(), ["sex"]), ("age", "passthrough", ["age"])]
    model = make_pipeline(ColumnTransformer(steps), LogisticRegression())
    model.fit(pd.DataFrame(columns), labels)
    groups: dict[str, Any] = {"region": random.choice(["north", "south"], 600)}
    np.savez(tmp_path / "rows.npz", **columns, **groups, label=labels)
    artifact = lrai.compile(
        model,
        out=tmp_path / "m.lrai",
        evaluation=tmp_path / "rows.npz",
        groups=["sex", "region"],
        max_disparity=0.2,  # of so few rows
        threads=1,
    )
    inputs = {one.name: one.datatype for one in artifact.manifest.signature.inputs}
    assert inputs == {"age": "FP32", "sex": "BYTES"}


def test_a_table_without_a_name_is_called_features(tmp_path: Path) -> None:
    x, y = load_iris(return_X_y=True)
    np.save(tmp_path / "rows.npy", x)
    model = LogisticRegression(max_iter=500).fit(x, y)
    rows = tmp_path / "rows.npy"
    for name, given in (("a", rows), ("b", None)):  # or as wide as it was fitted with
        out = tmp_path / f"{name}.lrai"
        artifact = lrai.compile(model, out=out, calibration=given, threads=1)
        (table,) = artifact.manifest.signature.inputs
        assert (table.name, table.shape[1:]) == ("features", (4,))


def test_what_cannot_be_compiled_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'out'"):
        compile(network(), {"x": ROWS})
    with pytest.raises(lrai.UsageError, match=r"the model is a builtins\.object; what can be"):
        lrai.compile(object(), out=tmp_path / "m.lrai")
    with pytest.raises(lrai.CompileError, match=r"inputs: give rows"):
        lrai.compile(network(), out=tmp_path / "m.lrai")
    (tmp_path / "rows.npz").write_bytes(b"no archive")
    for rows in ("rows.npz", "none.npz"):
        with pytest.raises(lrai.CompileError, match=rf"^{rows} cannot be read: \S"):
            lrai.compile(network(), out=tmp_path / "m.lrai", evaluation=tmp_path / rows)
    assert not (tmp_path / "m.lrai").exists()
