"""The page for production says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from lrai_core import explain_config

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "operations.md").read_text()
ROW = re.compile(r"^\| `([a-z_.]+)`( \*)? \| `(LRAI_[A-Z_]+)`[^|]* \| ([^|]*)\|", re.MULTILINE)


def test_every_setting_is_on_the_page_with_its_variable_and_default() -> None:
    said = {key: (variable, default.strip()) for key, _, variable, default in ROW.findall(PAGE)}
    known = {one.key: str(one.value) for one in explain_config(environ={})}
    assert {key: default for key, (_, default) in said.items()} == known
    for key, (variable, default) in said.items():
        origins = {s.key: s.origin for s in explain_config(environ={variable: default or "/x"})}
        assert origins[key] == variable


def test_those_that_can_be_a_models_own_are_marked() -> None:
    from lrai_core.config import OWN_SETTINGS

    assert {key for key, own, *_ in ROW.findall(PAGE) if own} == OWN_SETTINGS


def test_images_have_the_engine_that_models_are_compiled_with() -> None:
    pinned = re.search(r"^onnxruntime==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    for host in ("sagemaker", "triton"):
        content = (ROOT / "deploy" / host / "Dockerfile").read_text()
        assert f"\nARG ONNXRUNTIME={pinned[1]}\n" in content
        assert '"onnxruntime==$ONNXRUNTIME"' in content
