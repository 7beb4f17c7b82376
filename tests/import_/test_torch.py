"""Modules of PyTorch: what is traced at one size answers as the module at others, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lrai_core import CompileError, TensorSpec
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
        CompileError, match=r"traced, answers otherwise for . rows and free extents"
    ):
        convert(Means(branch), TABLE)


def test_what_torch_says_of_the_cause_is_what_is_told() -> None:
    with pytest.raises(CompileError, match="Means cannot be converted: ") as refused:
        convert(Means(lambda x: x.sum() > 0), TABLE)
    assert "\x1b" not in str(refused.value)
    assert "Failed to export the model" not in str(refused.value)
