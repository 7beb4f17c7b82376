from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from lrai_core.runtime.version import Deployment, LoadedModel
from lrai_shared import commands
from tests.core.small_artifact import SIGNATURE

LONG = "customer-sentiment-classifier:2026-11-release:c077da8c6304-9f86d081884c7d65"


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


@pytest.mark.parametrize("command", ["status", "deployments"])
def test_a_name_is_shown_whole_where_it_is_longer_than_its_column(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who is to freeze it, say, has to know how it is called."""
    model = LoadedModel(LONG, "1" * 12, "int8", None, SIGNATURE, "idle", [1])
    named = Deployment(LONG, {"1" * 12: 1.0}, {}, "", "", None)
    runtime = SimpleNamespace(
        models=lambda: [model], deployments=lambda: [named], ready=lambda: "idle", stats=dict
    )
    monkeypatch.setattr(commands, "_running", lambda _: contextlib.nullcontext(runtime))
    getattr(commands, command)()
    lines = capsys.readouterr().out.splitlines()
    cells = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert "".join(cells) == LONG


def test_what_is_told_of_a_long_name_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime = SimpleNamespace(rollback=lambda _: "1" * 12)
    monkeypatch.setattr(commands, "_running", lambda _: contextlib.nullcontext(runtime))
    commands.rollback(LONG)
    assert capsys.readouterr().out == f"{LONG} is served by {'1' * 12}\n"
