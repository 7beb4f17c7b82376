"""What `lrai tune` prints can be pasted."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from lrai_report import live, terminal


@pytest.mark.parametrize("address", ["", "tcp://10.0.0.1:7000?keys=/my keys"])
def test_a_command_is_one_line_that_a_shell_reads_as_it_was_meant(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal.out, "_width", 40)
    written = str(Path("my models", "search-tuned.lrai"))
    words = ("swap", "search:1:4f0c2ab13c9d", written)
    terminal.say("switch on", live._command(*words, address=address))
    (line,) = capsys.readouterr().out.splitlines()
    more = ["--address", address] if address else []
    assert shlex.split(line.removeprefix("switch on")) == ["lrai", "runtime", *words, *more]
