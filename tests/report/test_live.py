"""What `lrai tune` makes of a runtime's counts while live requests are copied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lrai_core as lrai
from lrai_report.live import _shadow
from lrai_report.target import find
from lrai_report.tune import _refuse_at_once
from tests.core import small_artifact


class Serving:
    """A runtime that serves `m` and `other`, with what happens in each second of the window."""

    def __init__(self, *seconds: Callable[[Serving], None]) -> None:
        self.m = SimpleNamespace(name="m", shares={"1": 1.0}, shadow={}, relief="")
        self.other = SimpleNamespace(name="other", shares={"7": 1.0}, shadow={}, relief="")
        self.counts = {"deployment_changed": 2, "request_accepted": 10}
        self._seconds = iter(seconds)

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def load(self, *_: object, **__: object) -> None:
        self.counts["deployment_changed"] += 1

    def route(self, name: str, shares: object, shadow: dict[str, float], relief: str) -> None:
        assert name == "m"
        self.m.shadow = shadow
        self.counts["deployment_changed"] += 1

    def unload(self, *_: object) -> None:
        self.m.shadow = {}

    def deployments(self, *, save: bool = True) -> list[Any]:
        return [self.m, self.other]

    def models(self) -> list[Any]:
        return []

    def stats(self) -> dict[str, int]:
        return dict(self.counts)

    def sleep(self, _: float) -> None:
        next(self._seconds)(self)


def answers(serving: Serving) -> None:
    """Have forty requests answered and compared."""
    for kind in ("request_accepted", "shadow_compared"):
        serving.counts[kind] = serving.counts.get(kind, 0) + 40


def copies(serving: Serving) -> None:
    serving.other.shadow = {"8": 1.0}
    serving.counts["deployment_changed"] += 1
    answers(serving)


def copies_no_more(serving: Serving) -> None:
    serving.other.shadow = {}
    serving.counts["deployment_changed"] += 1


@pytest.fixture
def window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return what copies requests for as many seconds as there is something to happen in."""
    written = small_artifact.build(tmp_path / "m.lrai")

    def run(*seconds: Callable[[Serving], None]) -> int:
        serving: Any = Serving(*seconds)
        monkeypatch.setattr("lrai_report.live.time.sleep", serving.sleep)
        try:
            return _shadow(serving, "m", written, len(seconds) / 60, "")
        finally:
            assert serving.m.shadow == {}

    return run


def test_what_is_counted_in_the_window_is_what_was_compared(window: Callable[..., int]) -> None:
    assert window(answers, answers) == 80


@pytest.mark.parametrize("then", [[], [answers], [copies_no_more, answers]])
def test_copies_of_another_name_that_begin_in_the_window_are_not_counted_as_its_own(
    then: list[Callable[[Serving], None]], window: Callable[..., int]
) -> None:
    """The runtime counts what copies say for all names together."""
    said = (
        "requests to 'other' are copied to 8; this ends it: lrai runtime unload other --version 8"
    )
    with pytest.raises(lrai.ConditionNotMet, match=said):
        window(answers, copies, *then)


def test_what_was_counted_while_the_new_one_was_loaded_is_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loading(Serving):
        def load(self, *_: object, **__: object) -> None:
            copies(self)
            copies_no_more(self)

    serving: Any = Loading(answers)
    monkeypatch.setattr("lrai_report.live.time.sleep", serving.sleep)
    assert _shadow(serving, "m", small_artifact.build(tmp_path / "m.lrai"), 1 / 60, "") == 40


def starts_again(serving: Serving) -> None:
    """As after a crash: it goes on with what was copied, and counts from 0."""
    serving.counts = {"request_accepted": 3}


def starts_again_and_is_busy(serving: Serving) -> None:
    serving.counts = {"request_accepted": 1000, "shadow_compared": 1000, "deployment_changed": 1}


@pytest.mark.parametrize("again", [starts_again, starts_again_and_is_busy])
@pytest.mark.parametrize("then", [[], [answers, answers]])
def test_where_the_runtime_was_started_again_its_counts_tell_nothing(
    again: Callable[[Serving], None],
    then: list[Callable[[Serving], None]],
    window: Callable[..., int],
) -> None:
    with pytest.raises(lrai.ConditionNotMet, match="the runtime was started again meanwhile"):
        window(answers, again, *then)


def test_what_ends_the_copies_is_said_before_they_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who is killed says nothing any more, and the runtime goes on with them."""
    written, said = small_artifact.build(tmp_path / "m.lrai"), list[str]()
    version = lrai.Artifact.open(written).version

    class Killed(Serving):
        def load(self, *_: object, **__: object) -> None:
            said.append(capsys.readouterr().out)

    serving: Any = Killed(answers)
    monkeypatch.setattr("lrai_report.live.time.sleep", serving.sleep)
    _shadow(serving, "m", written, 1 / 60, "tcp://there:1")
    end = f"lrai runtime unload m --version {version} --address tcp://there:1\n"
    assert said[0].endswith(end)


def test_what_was_left_by_one_that_was_killed_is_refused_with_what_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, serving = small_artifact.build(tmp_path / "m.lrai"), Serving()
    version = lrai.Artifact.open(artifact).version
    more = {"artifact": str(artifact), "traffic": "", "frozen": None, "away": False}
    serving.m.__dict__.update(more, shares={version: 1.0}, shadow={"8": 1.0})
    monkeypatch.setattr("lrai_report.target.runtime_of", lambda _: serving)
    found = find("m", tmp_path / "rows.npz", "")
    said = "requests to 'm' are copied to 8; this ends it: lrai runtime unload m --version 8; or"
    with pytest.raises(lrai.ConditionNotMet, match=said):
        _refuse_at_once(found, 1.0, None, apply=False)
