"""Files that commands write."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import lrai_core as lrai
from lrai_report import bench, page
from lrai_report.figures import Figures
from lrai_report.plan import Plan
from lrai_report.terminal import write
from lrai_report.trace import Arrivals
from lrai_report.tune import _write
from tests.core import small_artifact


@contextmanager
def full_disk() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(lrai.EnvironmentProblem, match="cannot be written: File too large"):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("old", ["of old", None])
@pytest.mark.parametrize("command", ["report", "bench", "tune", "tune of captured requests"])
def test_what_does_not_fit_on_the_disk_leaves_what_lay_there(
    command: str, old: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = lrai.Artifact.open(small_artifact.build(tmp_path / "m.lrai"))
    monkeypatch.setattr(page, "times", lambda *_: ({}, "not here"))
    file = tmp_path / "file"
    if old is not None:
        file.write_text(old)
    if command == "report":
        with full_disk():
            page.report(artifact.path, file)
    elif command == "bench":
        one = Arrivals(np.array([0.0]), np.array([8]), np.array([1]))
        plan = Plan(artifact, 1.0, 0.0, 10.0, "as asked", 1.0, [one])
        found = {"planner": [Figures(0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0)]}
        with full_disk():
            bench._write(file, Path("trace.csv"), plan, found, "said")
    else:
        with full_disk():
            _write(file, {"gains": [2.0] * 9}, private="captured" in command)
    left = {one.name: one for one in tmp_path.iterdir()}
    assert left.keys() == {"m.lrai", *["file"] * (old is not None)}
    assert old is None or left["file"].read_text() == old


def test_a_file_in_a_folder_that_takes_no_other_is_written_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file := tmp_path / "file").write_text("of old")
    before = file.stat().st_ino
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root may write into every folder
    write(file, "new")
    assert (file.read_text(), file.stat().st_ino) == ("new", before)


def test_a_file_that_others_may_not_read_stays_so(tmp_path: Path) -> None:
    (file := tmp_path / "file").touch(0o600)
    write(file, "new")
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("new", 0o600)
