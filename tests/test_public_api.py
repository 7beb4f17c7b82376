"""What users may rely on. A difference here is a change that the CHANGELOG has to tell."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import lrai_core

SNAPSHOT = Path(__file__).with_name("public_api.txt")


def described() -> str:
    """Return every public name with its parameters and defaults, and the methods of classes."""
    lines = []
    for name in lrai_core.__all__:
        found = getattr(lrai_core, name)
        if not callable(found):
            lines.append(f"{name} = {', '.join(sorted(found))}")
            continue
        lines.append(f"{name}{parameters(found)}")
        if isinstance(found, type):
            lines += [f"    .{member}" for member in members(found)]
    return "\n".join(lines) + "\n"


def parameters(found: Any) -> str:
    if isinstance(found, type) and issubclass(found, Exception) and "__init__" not in vars(found):
        return f"({found.__bases__[0].__name__})"
    given = inspect.signature(found)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in given.parameters.values()]
    return str(given.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def members(kind: type) -> list[str]:
    found = []
    for name, value in sorted(vars(kind).items()):
        inner = value.__func__ if isinstance(value, classmethod) else value
        if name.startswith("_"):
            continue
        if inspect.isfunction(inner):
            found.append(f"{name}{parameters(inner)}")
        elif isinstance(value, property | cached_property):
            found.append(name)
    return found


def test_the_public_api_is_the_one_in_the_snapshot() -> None:
    # When a change is meant: python -m tests.test_public_api, and a line in the CHANGELOG.
    assert described() == SNAPSHOT.read_text(encoding="utf-8")


def imported(block: list[ast.stmt]) -> dict[str, str]:
    """Return the names that a block re-exports from lrai_core, and their modules."""
    seen = {}
    for node in block:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lrai_core."):
            for alias in node.names:
                assert alias.asname == alias.name, "only `X as X` is a re-export"
                seen[alias.name] = (node.module or "").removeprefix("lrai_core.")
    return seen


TREE = ast.parse(Path(lrai_core.__file__).read_text(encoding="utf-8"))
WORDS = imported(TREE.body)


def test_the_names_are_sorted_and_public() -> None:
    assert list(lrai_core.__all__) == sorted([*WORDS, *lrai_core._HOMES])
    assert not [name for name in lrai_core.__all__ if name.startswith("_")]


def test_what_is_imported_late_is_what_type_checkers_see() -> None:
    (block,) = [
        node
        for node in TREE.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    assert all(isinstance(node, ast.ImportFrom) for node in block.body)
    assert imported(block.body) == lrai_core._HOMES


def test_every_public_name_is_there_and_defined_where_it_is_said_to_be() -> None:
    for name, home in (WORDS | lrai_core._HOMES).items():
        found = getattr(lrai_core, name)
        if callable(found):
            assert found.__module__ == f"lrai_core.{home}"
        else:  # a constant does not know where it is from
            assert found is getattr(import_module(f"lrai_core.{home}"), name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Runtimes'"):
        getattr(lrai_core, "Runtimes")  # noqa: B009 - mypy knows that it is not there


def test_dir_and_star_know_the_names() -> None:
    assert {*lrai_core.__all__, "__version__"} <= set(dir(lrai_core))
    code = "from lrai_core import *; assert Runtime and Tensor"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_and_its_words_loads_neither_engine_nor_compiler() -> None:
    code = (
        "import sys, lrai_core; lrai_core.InferenceRequest; lrai_core.QueueFull; lrai_core.Event;"
        "lrai_core.load_config; lrai_core.Tensor;"
        "heavy = {'onnxruntime', 'onnx', 'onnx_ir', 'typer', 'rich', 'zmq'} & set(sys.modules);"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    SNAPSHOT.write_text(described(), encoding="utf-8")
