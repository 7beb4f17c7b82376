"""Modules of PyTorch: what is traced at one size answers as the module at others, or is refused."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from lrai_core import CompileError, TensorSpec
from lrai_import.objects import to_onnx
from lrai_import.onnx import load
from lrai_import.torch import convert

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, about itself
TABLE = (TensorSpec(name="x", datatype="FP32", shape=("n", "length")),)


class Means(torch.nn.Module):
    """The mean of a row, which is told apart by its size."""

    def __init__(self, branch: Any) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.branch(x):
            x = x[:, -16:] * 2
        return x.mean(1)


def test_a_module_of_any_size_is_converted() -> None:
    made = convert(Means(lambda _: False), TABLE)
    assert [dim.dim_param for dim in made.graph.input[0].type.tensor_type.shape.dim] != ["", ""]


@pytest.mark.parametrize("branch", [lambda x: x.shape[1] > 16, lambda x: x.shape[0] > 1])
def test_a_branch_on_an_extent_is_refused(branch: Any) -> None:
    with pytest.raises(
        CompileError, match=r"traced, gives other answers for . rows and free extents"
    ):
        convert(Means(branch), TABLE)


PICTURES = (TensorSpec(name="x", datatype="FP32", shape=("n", "height", "width")),)


@pytest.mark.parametrize(
    "branch",
    [
        lambda x: x.shape[1] > x.shape[2],
        lambda x: x.shape[1] < x.shape[2],
        lambda x: x.shape[1] != x.shape[2],
    ],
)
def test_a_branch_on_which_extent_is_larger_is_refused(branch: Any) -> None:
    with pytest.raises(CompileError, match=r"answers for 2 rows and free extents of 20, (17|23)"):
        convert(Means(branch), PICTURES)
    convert(Means(lambda _: False), PICTURES)


class Longer(torch.nn.Module):
    """Goes by which of two inputs is longer."""

    def forward(self, q: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return q.mean(1) - d.mean(1) if q.shape[1] > d.shape[1] else q.mean(1) + d.mean(1)


def test_a_branch_on_which_input_is_longer_is_refused() -> None:
    both = tuple(TensorSpec(name=n, datatype="FP32", shape=("n", f"{n}.1")) for n in "qd")
    with pytest.raises(CompileError, match="traced, gives other answers"):
        convert(Longer(), both)
    alike = tuple(TensorSpec(name=n, datatype="FP32", shape=("n", "length")) for n in "qd")
    convert(Longer(), alike)  # whose extents are the same by what is declared


class Beside(torch.nn.Module):
    """Gives back what it was given, too."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return x.mean(1), x, x


def test_an_output_that_is_an_input_has_a_name_of_its_own() -> None:
    made = convert(Beside(), TABLE)
    onnx.checker.check_model(made, full_check=True)
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    session = onnxruntime.InferenceSession(made.SerializeToString())
    mean, *same = session.run(None, {"x": x})
    np.testing.assert_allclose(mean, x.mean(1), rtol=1e-5)
    assert len(same) == 2
    assert all(np.array_equal(one, x) for one in same)


class Many(torch.nn.Module):
    """The sum of what each of many inputs is in the mean."""

    def forward(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        d: torch.Tensor,
        e: torch.Tensor,
        f: torch.Tensor,
        g: torch.Tensor,
        h: torch.Tensor,
    ) -> torch.Tensor:
        return torch.stack([one.mean(1) for one in (a, b, c, d, e, f, g, h)]).sum(0)


def test_many_free_extents_are_as_many_sizes() -> None:
    """Each of another extent, down to the least that there can be."""
    inputs = [TensorSpec(name=n, datatype="FP32", shape=("n", f"{n}.1")) for n in "abcdefgh"]
    assert len(convert(Many(), inputs).graph.input) == 8


def test_what_torch_says_of_the_cause_is_what_is_told() -> None:
    with pytest.raises(CompileError, match="Means cannot be converted: ") as refused:
        convert(Means(lambda x: x.sum() > 0), TABLE)
    assert "\x1b" not in str(refused.value)
    assert "Failed to export the model" not in str(refused.value)


class Less(torch.nn.Module):
    """The first less twice the second, which is seen where they change places."""

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return first - 2 * second


def table(name: str) -> TensorSpec:
    return TensorSpec(name=name, datatype="FP32", shape=("n", "length"))


@pytest.mark.parametrize("names", [["first", "second"], ["second", "first"]])
def test_inputs_are_those_that_forward_names_so(names: list[str]) -> None:
    """As a signature may have them in the order of a tokenizer's dict."""
    made = convert(Less(), [table(name) for name in names])
    session = onnxruntime.InferenceSession(made.SerializeToString())
    given = {"first": np.ones((2, 3), np.float32), "second": np.full((2, 3), 5, np.float32)}
    assert session.run(None, given)[0].tolist() == [[-9] * 3] * 2


def test_names_that_forward_does_not_have_go_by_their_places() -> None:
    made = convert(Less(), [table("a"), table("b")])
    assert [value.name for value in made.graph.input] == ["a", "b"]


def test_names_that_lie_elsewhere_are_refused() -> None:
    with pytest.raises(CompileError, match="has second, a, which is not how forward begins: first"):
        convert(Less(), [table("second"), table("a")])


FOUR = (TensorSpec(name="input", datatype="FP32", shape=("n", 4)),)


def learning(layer: torch.nn.Module) -> torch.nn.Module:
    """Return a network in training, as torch makes them."""
    return torch.nn.Sequential(torch.nn.Linear(4, 4), layer)


def exported(model: torch.nn.Module) -> Any:
    rows = {"input": {0: torch.export.Dim.AUTO}}
    return torch.export.export(model, (torch.randn(3, 4),), dynamic_shapes=rows).module()


def state(model: torch.nn.Module) -> dict[str, list[Any]]:
    return {name: value.tolist() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("layer", [torch.nn.BatchNorm1d(4), torch.nn.Dropout()])
def test_a_module_that_torch_fx_traced_is_converted_as_in_evaluation(
    layer: torch.nn.Module,
) -> None:
    model = torch.fx.symbolic_trace(learning(layer))
    before = state(model)
    made = convert(model, FOUR)
    assert state(model) == before
    rows = np.random.default_rng(0).normal(3, 5, (6, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(made.SerializeToString())
    with torch.no_grad():
        right = model.eval()(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(session.run(None, {"input": rows})[0], right, atol=1e-4)


def test_a_program_that_was_exported_in_training_is_refused_and_left_as_it_was() -> None:
    model = exported(learning(torch.nn.BatchNorm1d(4)))
    before = state(model)
    with pytest.raises(CompileError, match=r"or it was exported in training: call eval\(\) before"):
        convert(model, FOUR)
    assert state(model) == before
    convert(exported(learning(torch.nn.BatchNorm1d(4)).eval()), FOUR)


class Noisy(torch.nn.Module):
    """Never the same, in evaluation too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


def test_what_answers_never_twice_alike_is_said_not_to_be_compared(tmp_path: Path) -> None:
    for layer, says in ((Noisy(), True), (torch.nn.ReLU(), False)):
        told = list[str]()
        load(to_onnx(learning(layer), FOUR, tmp_path / "m.onnx"), told.append)
        assert any("what was traced is not compared" in one for one in told) == says


class Told(torch.nn.Module):
    """Gives what it finds by names, of which some are those of inputs or of what is inside."""

    def __init__(self, how: Any = dict) -> None:
        super().__init__()
        self.linear, self.how = torch.nn.Linear(4, 4), how

    def forward(self, x: torch.Tensor) -> Any:
        inner = self.linear(x)
        pair = [inner + 1, self.linear.bias]
        told = {"mul": inner, "linear": inner * 2, "x": x, "pair": pair, "rows": x.shape[0]}
        return self.how(**told)


@pytest.mark.parametrize(
    ("how", "given"),
    [(dict, "x"), (dict, "mul"), (namedtuple("Answer", "mul linear x pair rows"), "linear.weight")],
)
def test_outputs_have_the_names_that_a_module_gives_them(how: Any, given: str) -> None:
    module = Told(how)
    made = convert(module, (TensorSpec(name=given, datatype="FP32", shape=("n", 4)),))
    onnx.checker.check_model(made, full_check=True)
    session = onnxruntime.InferenceSession(made.SerializeToString())
    names = ["mul", "linear", "x", "pair.0", "pair.1", "rows"]
    assert [one.name for one in session.get_outputs()] == [
        f"{name}_output" if name == given else name for name in names
    ]
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    mul, doubled, same, more, bias, rows = session.run(None, {given: x})
    inner = module.linear(torch.from_numpy(x)).detach().numpy()
    for found, expected in ((mul, inner), (doubled, inner * 2), (same, x), (more, inner + 1)):
        np.testing.assert_allclose(found, expected, 1e-4, 1e-5)
    assert np.array_equal(bias, module.linear.bias.detach().numpy())
    assert rows == 3


@pytest.mark.parametrize("given", ["linear", "linear.weight"])
def test_an_input_may_be_named_like_what_is_inside(given: str) -> None:
    module = torch.nn.Sequential(OrderedDict(linear=torch.nn.Linear(4, 2)))
    spec = TensorSpec(name=given, datatype="FP32", shape=("n", 4))
    made = convert(module, (spec,))
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(made.SerializeToString())
    [found] = session.run(None, {given: x})
    np.testing.assert_allclose(found, module(torch.from_numpy(x)).detach().numpy(), 1e-4, 1e-5)
