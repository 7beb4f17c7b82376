"""Forms that a folder keeps: made once, found again, never taken for those of something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lrai_core as lrai
from lrai_engines import fusion
from tests.core.compiler.onnx_files import linear, save

Compile = Callable[..., lrai.Artifact]


@pytest.fixture
def compiled(tmp_path: Path) -> Compile:
    """Compile `linear()` on 400 rows into a folder of its own, with a cache beside it."""
    model = save(linear(), tmp_path / "m.onnx")
    rows = np.random.default_rng(1).standard_normal((400, 8)).astype(np.float32)
    numbers = iter(range(100))

    def once(**arguments: Any) -> lrai.Artifact:
        out = tmp_path / f"{next(numbers)}.lrai"
        given: dict[str, Any] = {"threads": 1, "cache": tmp_path / "cache"} | arguments
        return lrai.compile(model, out=out, evaluation={"x": rows}, **given)

    return once


@pytest.fixture
def optimised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list of the graphs that the optimizer is given from now on."""
    seen, optimise = list[str](), fusion.optimise

    def counted(model: Any, **options: Any) -> Any:
        if options["level"] == "all":
            seen.append(str(options.get("disabled", ())))
        return optimise(model, **options)

    monkeypatch.setattr(fusion, "optimise", counted)
    return seen


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_what_was_made_is_not_made_again(
    compiled: Compile, optimised: list[str], tmp_path: Path
) -> None:
    first = compiled()
    assert optimised
    optimised.clear()
    kept = files(tmp_path / "cache")
    second = compiled(max_accuracy_loss=0.02)
    assert not optimised
    assert files(tmp_path / "cache") == kept
    assert {v.id for v in second.manifest.variants} >= {"fp32"}
    assert files(first.path / "source") != files(second.path / "source")
    x = np.ones((1, 8), np.float32)
    with lrai.Runtime.open(second, name="m") as runtime:
        asked = lrai.InferenceRequest(model_name="m", inputs={"x": x})
        answer = runtime.infer(asked).outputs
    with lrai.Runtime.open(first, name="m") as runtime:
        for name, array in runtime.infer(asked).outputs.items():
            np.testing.assert_allclose(answer[name], array, rtol=0.1, atol=0.1)


def test_an_artifact_holds_nothing_of_the_cache(compiled: Compile) -> None:
    with_cache, without = compiled(keep=1), compiled(keep=1, cache=None)
    names = [
        {path.relative_to(a.path).parts for path in files(a.path)} for a in (with_cache, without)
    ]
    assert len(names[0] ^ names[1]) == 2  # the certificates, which have their own names


@pytest.mark.parametrize("other", [{"seed": 1}, {"threads": 2}])
def test_what_was_made_of_something_else_is_not_taken(
    compiled: Compile, optimised: list[str], other: dict[str, Any]
) -> None:
    compiled()
    optimised.clear()
    compiled(**other)
    assert optimised


def test_what_an_interrupt_left_half_made_is_made_again(
    compiled: Compile, optimised: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    count, counted = 0, fusion.optimise

    def interrupted(model: Any, **options: Any) -> Any:
        nonlocal count
        count += options["level"] == "all"
        if count > 3:
            raise KeyboardInterrupt
        return counted(model, **options)

    with monkeypatch.context() as patched:
        patched.setattr(fusion, "optimise", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compiled()
    assert not list(tmp_path.glob("*.lrai"))
    kept, begun = files(tmp_path / "cache"), len(optimised)
    assert kept
    assert not [path for path in kept if any(part.startswith(".") for part in path.parts)]
    compiled()
    again = len(optimised) - begun
    assert files(tmp_path / "cache") > kept
    optimised.clear()
    compiled(cache=tmp_path / "other")
    assert 0 < again < len(optimised)


def test_a_damaged_note_means_that_the_form_is_made_again(
    compiled: Compile, optimised: list[str], tmp_path: Path
) -> None:
    compiled()
    optimised.clear()
    for number, note in enumerate(sorted((tmp_path / "cache").glob("*/*.json"))):
        note.write_bytes([b"", b"{", b'{"built": 3, "refused": []}', b"\xff"][number % 4])
    compiled()
    assert optimised


def test_why_a_form_was_refused_is_told_again(compiled: Compile) -> None:
    def refused(artifact: lrai.Artifact) -> set[str]:
        text = (artifact.path / "quantization.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        every = [one for one in lines if one["event"] == "candidate" and not one["kept"]]
        return {one["form"] for one in every if " x fp32" not in one["why"]}

    first = refused(compiled())
    assert first
    assert refused(compiled()) == first
