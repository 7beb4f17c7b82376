"""What every form says of the operators in it, whichever of them is kept."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from lrai_core.errors import CompileError, EngineError
from lrai_engines.forms import forms, joint
from lrai_engines.quantize import NothingToQuantize
from lrai_engines.smooth import ROW, STATIC, SmoothForms
from lrai_engines.static import StaticForms
from tests.engines.test_sensitivity import sample as layered_sample
from tests.engines.test_sensitivity import three_layers
from tests.engines.test_static import attending, network, sample


def test_every_form_tells_what_each_operator_does_to_the_outputs() -> None:
    material: Any = SimpleNamespace(found={}, threads=1, objective="memory")
    told = dict[str, float]()
    for form, build in forms(material, layered_sample(16)).items():
        with suppress(NothingToQuantize):
            told[form] = sum(line.harm for line in build(three_layers())[1])
    whole = {"int8-smooth", "int8-row", "int8-static", "int8-block32", "int8-block128", "int4"}
    assert whole < told.keys()
    assert told == pytest.approx(dict.fromkeys(told, 1.0))


def test_of_convolutions_and_matrices_in_one_form_the_shares_are_of_both_together() -> None:
    smooth, static = SmoothForms(sample(), 1), StaticForms(sample(), 1)
    _, report = joint(smooth, static, STATIC, attending())
    told = {line.node: line.harm for line in report if line.bits == 8}
    assert told.keys() == {"conv1", "conv2", "qkv", "proj", "classes"}
    assert sum(told.values()) == pytest.approx(1)
    known = smooth.known(attending(), STATIC)
    every = sum(static.harms.values()) + sum(known.values())
    assert told["conv1"] == pytest.approx(static.harms["conv1"] / every)
    assert told["proj"] == pytest.approx(known["proj"] / every)


def test_where_that_cannot_be_told_forms_are_made_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: object) -> None:
        raise EngineError("no")

    monkeypatch.setattr("lrai_engines.smooth.harms", failing)
    monkeypatch.setattr("lrai_engines.static.harms", failing)
    smooth, static = SmoothForms(layered_sample(16), 1), StaticForms(sample(), 1)
    for report in (
        smooth.build(three_layers(), scheme=ROW)[1],
        static.build(network(), share=0)[1],
    ):
        assert {line.harm for line in report} == {0.0}
    with pytest.raises(CompileError, match="what each matrix does cannot be told: no"):
        smooth.build(three_layers(), scheme=ROW, share=0.5)
    with pytest.raises(CompileError, match="what each operator does cannot be told: no"):
        static.build(network(), share=0.5)
