"""What `lrai tune` prints can be pasted."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest

from lrai_report import live


@pytest.mark.parametrize("address", ["", "tcp://10.0.0.1:7000?keys=/my keys"])
def test_a_command_is_one_line_that_a_shell_reads_as_it_was_meant(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(live, "runtime_of", lambda _: nullcontext())
    name, written = "search:1:4f0c2ab13c9d", Path("my models", "search-tuned.lrai")
    live.switch(name, {}, written, address, apply=False)
    on, back = capsys.readouterr().out.splitlines()
    more = ["--address", address] if address else []
    assert shlex.split(on.removeprefix("switch on")) == [
        *("lrai", "runtime", "swap", name, str(written)), *more
    ]  # fmt: skip
    assert shlex.split(back.removeprefix("switch back")) == [
        *("lrai", "runtime", "rollback", name), *more
    ]  # fmt: skip
