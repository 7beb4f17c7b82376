"""`lrai tune`: with a real daemon that serves, captures, shadows, switches and goes back."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import lrai_core as lrai
from benchmarks import models
from tests.core.compiler.onnx_files import linear, save
from tests.own_runtime import own_runtime

pytestmark = pytest.mark.server

LRAI = Path(sys.executable).with_name("lrai")
ROWS = 250


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, models.Arrays]:
    """A network wide enough for int8 to be faster, served, on any processor, and rows for it."""
    random, sizes = np.random.default_rng(0), (64, 1536, 1536, 1536, 1536, 64)
    layers = [
        (
            random.normal(scale=(2 / inputs) ** 0.5, size=(inputs, outputs)).astype(np.float32),
            np.zeros(outputs, np.float32),
        )
        for inputs, outputs in pairwise(sizes)
    ]
    folder = tmp_path_factory.mktemp("wide")
    rows = random.standard_normal((ROWS, 64)).astype(np.float32)
    return models.mlp_onnx(folder / "wide.onnx", layers), {"features": rows}


def tune(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(LRAI), "tune", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=300, check=False
    )


@contextmanager
def asking(name: str, rows: models.Arrays) -> Iterator[list[str]]:
    """Have requests on their way all the time; yield the versions that answered, in order."""
    ended, versions = threading.Event(), list[str]()

    def ask() -> None:
        with lrai.Runtime() as runtime:
            while not ended.is_set():
                row = rows["features"][len(versions) % ROWS][None]
                request = lrai.InferenceRequest(model_name=name, inputs={"features": row})
                versions.append(runtime.infer(request).model_version)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield versions
    finally:
        ended.set()
        thread.join(30)


def test_a_served_model_is_tuned_shadowed_applied_and_switched_back(
    wide: tuple[Path, models.Arrays], tmp_path: Path
) -> None:
    source, rows = wide
    served = lrai.compile(
        source, out=tmp_path / "plain.lrai", output_map="l2_normalised", threads=1
    )
    assert served.manifest.chosen == "fp32"
    with own_runtime(LRAI_RUNTIME_CAPTURE_ROWS="2000"), lrai.Runtime() as runtime:
        runtime.load(served, name="wide:4f0c")  # as hosts name what they serve
        refused = tune("wide", cwd=tmp_path)
        assert refused.returncode == 3, refused.stderr
        assert "LRAI_RUNTIME_CAPTURE_ROWS=2000" in refused.stderr
        for row in rows["features"][:ROWS]:
            request = lrai.InferenceRequest(model_name="wide:4f0c", inputs={"features": row[None]})
            runtime.infer(request)
        with asking("wide:4f0c", rows) as versions:
            found = tune(
                "wide", "--apply", "--minutes", 0.05, "--seconds", 0.5, "--rounds", 3,
                "--price-per-hour", 1, "--json", "figures.json", cwd=tmp_path,
            )  # fmt: skip
            assert found.returncode == 0, found.stdout + found.stderr
            new = runtime.deployments()[0]
            assert runtime.rollback("wide:4f0c").startswith(served.version)
        tuned = lrai.Artifact.open(tmp_path / "wide-tuned.lrai")
        assert tuned.manifest.chosen != "fp32"
        assert new.shares == {tuned.version: 1.0}
        assert new.shadow == {}
        assert set(versions) == {served.version, tuned.version}  # and no request failed
        assert runtime.stats()["shadow_compared"] > 0
    for words in (
        "times as many requests per second",
        "answers changed",
        "cost of a million",
        "rows compared",
        "wide:4f0c is served by",
        "lrai runtime rollback wide:4f0c",
    ):
        assert words in found.stdout, found.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert min(figures["gains"]) > 1
    assert len(figures["changed"]) == 20
    assert figures["share_changed"] <= 0.02


def test_a_file_with_requests(wide: tuple[Path, models.Arrays], tmp_path: Path) -> None:
    source, rows = wide
    np.savez(tmp_path / "asked.npz", features=rows["features"][:ROWS])
    found = tune(
        source, "--requests", "asked.npz", "--output-map", "l2_normalised", "--seconds", 0.5,
        "--rounds", 3, cwd=tmp_path,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    assert "serve wide-tuned.lrai" in found.stdout
    assert "the 20 farthest apart" in found.stdout


def test_where_nothing_is_gained_it_says_so(tmp_path: Path) -> None:
    source = save(linear(), tmp_path / "small.onnx")
    x = np.random.default_rng(0).standard_normal((ROWS, 8)).astype(np.float32)
    np.savez(tmp_path / "asked.npz", x=x)
    found = tune(source, "--requests", "asked.npz", cwd=tmp_path)
    assert found.returncode == 3, found.stdout + found.stderr
    assert "no gain" in found.stderr


def test_without_requests_fp32_is_what_there_is(tmp_path: Path) -> None:
    source = save(linear(), tmp_path / "small.onnx")
    found = tune(source, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "fp32, optimised, is all that can be made without any" in found.stdout
    assert lrai.Artifact.open(tmp_path / "small-tuned.lrai").manifest.chosen == "fp32"


def test_a_name_that_is_not_served_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with own_runtime(), lrai.Runtime() as runtime:
        runtime.load(lrai.compile(save(linear(), tmp_path / "m.onnx"), out=tmp_path / "m.lrai"))
        found = tune("nobody", cwd=tmp_path)
    assert found.returncode == 2
    assert "'nobody' is no file, artifact or name: there is 'm'" in found.stderr
