"""`lrai compile`: what its options say."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrai_core import UsageError
from lrai_report.compile import main


@pytest.mark.parametrize("calls", ["8y16", "x16", "8x", "8x16x1", "-8", "8x16;1x16", "²x8"])
def test_calls_that_are_no_rows_and_length_are_refused(tmp_path: Path, calls: str) -> None:
    with pytest.raises(UsageError, match="rows and length are needed, as 1x16,8x128"):
        main([str(tmp_path / "m.onnx"), "-o", str(tmp_path / "m.lrai"), f"--calls={calls}"])


def test_calls_are_told_by_rows_and_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[object]()

    def compile(*_: object, calls: object, **__: object) -> None:
        told.append(calls)
        raise UsageError("enough")

    monkeypatch.setattr("lrai_core.compile", compile)
    for calls in ("1x16, 8x128", "1,8", ""):
        with pytest.raises(UsageError, match="enough"):
            main([str(tmp_path / "m.onnx"), "-o", str(tmp_path / "m.lrai"), f"--calls={calls}"])
    assert told == [[(1, 16), (8, 128)], [(1, 0), (8, 0)], []]
