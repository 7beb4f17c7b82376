from __future__ import annotations

import sys
from typing import Any

import pytest

from lrai_shared import commands


@pytest.mark.parametrize(
    ("command", "see"),
    [
        ("swap", "deployments"),
        ("freeze", "deployments"),
        *((command, "status") for command in ("start", "drain", "stop")),
        ("status", ""),
    ],
)
def test_who_interrupts_what_the_runtime_goes_on_with_is_told_so(
    command: str, see: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**_: Any) -> None:
        sys.exit(130)

    monkeypatch.setattr(commands, "app", interrupted)
    with pytest.raises(SystemExit, match="130"):
        commands.main([command])
    told = f"the runtime goes on with it, see lrai runtime {see}\n" if see else ""
    assert capsys.readouterr().out == told
