"""What MLflow says of a model, before anything is opened; all else is in the integration tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types import TensorSpec as MlflowTensorSpec
from mlflow.types.schema import Array

from lrai_core import ArtifactError, CompileError, TensorSpec
from lrai_import import mlflow
from lrai_import.mlflow import inputs_of, runs_code, to_onnx
from lrai_import.sklearn import width


@pytest.mark.parametrize(
    ("flavor", "configuration", "files", "why"),
    [
        ("sklearn", {"serialization_format": "skops"}, ["model.skops"], ""),
        ("sklearn", {"serialization_format": "pickle"}, ["model.pkl"], "a pickle (model.pkl)"),
        ("sklearn", {}, ["model.bin"], "a pickle (model.pkl)"),  # what MLflow takes it for, too
        (
            "sklearn",
            {"serialization_format": "skops", "skops_trusted_types": ["os.system"]},
            ["model.skops"],
            "types that skops is to trust: os.system",
        ),
        (
            "sklearn",  # which imports that, and skops calls what it takes for the class of a list
            {
                "serialization_format": "skops",
                "skops_trusted_types": ["sklearn.utils._testing.check_output"],
            },
            ["model.skops"],
            "types that skops is to trust: sklearn.utils._testing.check_output",
        ),
        (
            "lightgbm",
            {"skops_trusted_types": ["lightgbm.basic.Booster", "collections.OrderedDict"]},
            ["model.skops"],
            "",
        ),
        ("lightgbm", {}, ["model.pkl"], "a pickle (model.pkl)"),
        ("lightgbm", {"model_class": "lightgbm.basic.Booster"}, ["model.lgb"], ""),
        (
            "lightgbm",
            {"model_class": "lightgbm.any", "data": "model.bin"},
            ["model.bin"],
            "a pickle (model.bin)",
        ),
        (
            "lightgbm",
            {"model_class": "lightgbm.sklearn.LGBMModel", "serialization_format": "skops"},
            ["model.skops"],
            "",
        ),
        (
            "lightgbm",
            {"model_class": "lightgbm", "data": "model.bin"},  # which MLflow opens as a pickle
            ["model.bin"],
            "a pickle (model.bin)",
        ),
        ("xgboost", {"model_class": "xgboost.sklearn.XGBClassifier"}, ["model.ubj"], ""),
        ("xgboost", {"model_class": "subprocess.Popen"}, ["model.ubj"], "as a subprocess.Popen"),
        ("pytorch", {}, ["data/model.pt2"], "a pickle (data)"),  # of its constants
        ("pytorch", {"model_data": "data/w.bin"}, ["data/w.bin"], "a pickle (data/w.bin)"),
        ("pytorch", {"code": "code"}, ["data/model.pt2"], "Python code of its own"),
    ],
)
def test_what_could_run_code_is_known_before_it_is_opened(
    tmp_path: Path, flavor: str, configuration: dict[str, Any], files: list[str], why: str
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = runs_code(tmp_path, flavor, configuration)
    assert why in found
    assert bool(found) == bool(why)


@pytest.mark.parametrize(("version", "safe"), [("0.12.1", False), ("0.13", True), ("", True)])
def test_a_skops_that_may_run_code_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, safe: bool
) -> None:
    monkeypatch.setattr(mlflow, "installed_version", lambda name: version * (name == "skops"))
    skops = {"serialization_format": "skops"}
    for flavor, more in (("sklearn", {}), ("lightgbm", {"model_class": "lightgbm.LGBMModel"})):
        found = runs_code(tmp_path, flavor, skops | more)
        assert found == ("" if safe else "it is of skops, which below 0.13 may run code")


@pytest.mark.parametrize(
    "data", ["../private/model.ubj", "/etc/passwd", "link", "linked/model.ubj"]
)
@pytest.mark.parametrize(
    ("flavor", "key", "more"),
    [
        ("onnx", "data", {}),
        ("lightgbm", "data", {}),
        ("xgboost", "data", {"model_class": "xgboost.sklearn.XGBClassifier"}),
        ("sklearn", "pickled_model", {"serialization_format": "skops"}),
        ("sklearn", "pickled_model", {}),
        ("pytorch", "model_data", {}),
    ],
)
def test_data_outside_of_a_model_is_not_read(
    tmp_path: Path, flavor: str, key: str, more: dict[str, str], data: str
) -> None:
    (folder := tmp_path / "model").mkdir()
    (private := tmp_path / "private").mkdir()
    (private / "model.ubj").touch()
    (folder / "link").symlink_to(private / "model.ubj")
    (folder / "linked").symlink_to(private)
    Model(flavors={flavor: {key: data, **more}}).save(str(folder / "MLmodel"))
    with pytest.raises(ArtifactError, match="the model's data lies outside of it"):
        to_onnx(folder, tmp_path, allow_pickle=True)


def test_columns_and_tensors_of_a_signature_become_inputs() -> None:
    columns = Schema([ColSpec(DataType.double, "price"), ColSpec(DataType.string, "kind")])
    assert inputs_of(Model(signature=ModelSignature(inputs=columns))) == (
        TensorSpec(name="price", datatype="FP64", shape=("batch",)),
        TensorSpec(name="kind", datatype="BYTES", shape=("batch",)),
    )
    tensors = Schema([MlflowTensorSpec(np.dtype("int64"), (-1, -1), "ids")])
    assert inputs_of(Model(signature=ModelSignature(inputs=tensors))) == (
        TensorSpec(name="ids", datatype="INT64", shape=("batch", "ids.1")),
    )
    unnamed = Schema([MlflowTensorSpec(np.dtype("float32"), (-1, 4))])
    assert inputs_of(Model(signature=ModelSignature(inputs=unnamed)))[0].name == "input_0"
    assert inputs_of(Model()) == ()
    torch = Model(signature=ModelSignature(inputs=columns), flavors={"pytorch": {}})
    assert inputs_of(torch) == (  # which MLflow gives all columns as one tensor
        TensorSpec(name="features", datatype="FP32", shape=("batch", 2)),
    )


def test_a_column_that_no_tensor_can_hold_is_named() -> None:
    lists = Schema([ColSpec(Array(DataType.double), "history")])
    with pytest.raises(CompileError, match="column 'history'"):
        inputs_of(Model(signature=ModelSignature(inputs=lists)))


def test_a_table_is_as_wide_as_its_columns() -> None:
    one = TensorSpec(name="a", datatype="FP32", shape=("batch",))
    assert width([one, one]) == 2
    assert width([TensorSpec(name="x", datatype="FP32", shape=("batch", 7))]) == 7
    with pytest.raises(CompileError, match="one table of known width"):
        width([TensorSpec(name="x", datatype="FP32", shape=("batch", "n"))])
    with pytest.raises(CompileError, match="the inputs: none"):
        width([])
