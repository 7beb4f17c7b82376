"""`lrai tune` without a runtime: what it refuses, says and leaves."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lrai_core as lrai
from lrai_core.verifier.sample import Rows
from lrai_report.compare import Worst
from lrai_report.target import Target
from lrai_report.tune import _compile, _judge, _refuse_at_once, _write, main, tune
from tests.core import small_artifact


def side(variant: str, rate: float, answers: int = 100) -> Any:
    """Return what was measured of a variant, without measuring it."""
    told = {"requests_per_second": [rate] * 3, "p95_ms": [1e3 / rate] * 3, "memory_mb": 10.0}
    return SimpleNamespace(
        variant=variant,
        requests_per_second=[rate] * 3,
        answers=[answers, 200, 200],
        figures=lambda price: told,
    )


def measured(monkeypatch: pytest.MonkeyPatch, rate: float, answers: int = 100) -> None:
    """Have what is made answer so many requests, and what serves a hundred."""
    both = [side("fp32", 100.0, answers), side("int8", rate)]
    row = [np.ones((1, 3), np.float32)]
    monkeypatch.setattr("lrai_report.tune.evaluation", lambda _: Rows([row], None, []))
    monkeypatch.setattr("lrai_report.tune.sides", lambda _: nullcontext(both))
    monkeypatch.setattr("lrai_report.tune.measure", lambda *_, **__: None)
    same = [Worst(0.0, True, "1", "1")]
    monkeypatch.setattr("lrai_report.tune.differing", lambda *_: same)


def test_a_price_that_is_no_number_is_refused_before_anything_is_looked_for() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["nothing-of-that-name", "--price-per-hour", "inf"])
    assert ended.value.code == 2


def test_the_help_says_what_it_takes_from_callers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "compiling and measuring take the CPUs" in said
    assert "two more copies of the model lie in memory, outside runtime.memory_mib" in said


@pytest.mark.parametrize("option", ["price_per_hour", "seconds", "minutes"])
def test_what_is_no_number_is_refused_though_typer_lets_it_pass(option: str) -> None:
    """As 0.20 does: NaN is neither below the least nor above the most."""
    given: dict[str, Any] = {option: math.nan}
    with pytest.raises(lrai.UsageError, match=f"--{option.replace('_', '-')} is no number"):
        tune("nothing-of-that-name", **given)


def test_figures_that_json_has_no_word_for_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        _write(tmp_path / "figures.json", {"gains": [math.nan]}, private=False)


@pytest.mark.parametrize("place", ["figures.json", "link.json", "new.json"])
def test_figures_of_captured_requests_are_for_their_owner_alone_whatever_lay_there(
    place: str, tmp_path: Path
) -> None:
    (tmp_path / "figures.json").write_text("of old")
    (tmp_path / "figures.json").chmod(0o644)
    (tmp_path / "link.json").symlink_to("figures.json")
    file = tmp_path / place
    _write(file, {"gains": [2.0]}, private=True)
    assert json.loads(file.read_text()) == {"gains": [2.0]}
    assert file.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "link.json").is_symlink()
    _write(file, {"gains": [3.0]}, private=True)
    assert json.loads(file.read_text()) == {"gains": [3.0]}
    assert len(list(tmp_path.iterdir())) == 2 + (place == "new.json")


def test_figures_go_into_a_pipe_and_stay_as_public_as_the_requests_are(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    heard = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    _write(pipe, {"gains": [2.0]}, private=True)
    assert json.loads(os.read(heard, 1000)) == {"gains": [2.0]}
    os.close(heard)
    assert pipe.is_fifo()
    (file := tmp_path / "figures.json").touch(0o644)
    _write(file, {"gains": [2.0]}, private=False)
    assert file.stat().st_mode & 0o777 == 0o644


def test_figures_of_what_nothing_is_measured_of_are_refused_at_once(tmp_path: Path) -> None:
    """Without requests there is fp32 alone, and who asked for figures would look for them."""
    found, file = Target(tmp_path / "m.onnx", None), tmp_path / "figures.json"
    with pytest.raises(lrai.UsageError, match="--json: nothing is measured without requests"):
        _refuse_at_once(found, 1.0, file, apply=False)
    _refuse_at_once(found, 1.0, None, apply=False)


def test_it_is_said_under_which_settings_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The host that serves may have others, by which nothing is gained."""
    monkeypatch.setenv("LRAI_ACTOR_THREADS", "3")
    monkeypatch.setenv("LRAI_SCHEDULER_DETERMINISTIC", "1")
    measured(monkeypatch, 200.0)
    artifact = lrai.Artifact.open(small_artifact.build(tmp_path / "m.lrai"))
    found, figures = Target(tmp_path / "m.onnx", tmp_path / "rows.npz"), dict[str, Any]()
    _judge(found, artifact, 1, 0.2, 3, 0.0, figures)
    under = ["scheduler.deterministic = True", "actor.threads = 3", "actor.replicas = 1"]
    assert figures["settings"] == under
    assert f"with {', '.join(under)}, as set here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rate", "fails", "error", "said"),
    [
        (200.0, "", None, ["gain"]),
        (200.0, "_write", lrai.EnvironmentProblem, ["gain", "kept"]),
        (200.0, "compare_live", lrai.ConditionNotMet, ["gain", "kept"]),
        (200.0, "switch", lrai.EnvironmentProblem, ["gain", "kept"]),
        (200.0, "compare_live", KeyboardInterrupt, ["gain", "removed"]),
        (100.0, "", lrai.ConditionNotMet, ["removed"]),
        (100.0, "_write", lrai.EnvironmentProblem, ["removed"]),
        (200.0, "differing", lrai.ActorError, ["removed"]),
        (200.0, "measure", ValueError, ["removed"]),
    ],
)
def test_what_an_error_leaves_is_what_was_judged_to_be_faster_and_that_is_said(
    rate: float,
    fails: str,
    error: type[BaseException] | None,
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(*_: object, **__: object) -> None:
        assert error
        raise error("as is tested")

    written, file = tmp_path / "m-tuned.lrai", tmp_path / "figures.json"
    found = Target(tmp_path / "m.onnx", tmp_path / "rows.npz", name="m")
    measured(monkeypatch, rate)
    monkeypatch.setattr("lrai_report.tune.find", lambda *_: found)
    monkeypatch.setattr(
        "lrai_report.tune._compile", lambda *_: lrai.Artifact.open(small_artifact.build(written))
    )
    for step in ("compare_live", "switch"):
        monkeypatch.setattr(f"lrai_report.tune.{step}", lambda *_, **__: None)
    if fails:
        monkeypatch.setattr(f"lrai_report.tune.{fails}", failing)
    ended = SystemExit if error is None or error is KeyboardInterrupt else error
    with pytest.raises(ended):
        main(["m", "--apply", "-o", str(written), "--json", str(file)])
    told = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [word for word in told if word in ("gain", "kept", "removed")] == said
    assert written.exists() is ("removed" not in said)
    assert file.exists() is (fails not in ("_write", "differing", "measure"))


def test_the_share_of_answers_that_change_is_said_to_be_of_distinct_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(monkeypatch, 200.0)
    told = [Worst(1.0, False, "1", "2"), *[Worst(0.0, True, "1", "1")] * 3]
    monkeypatch.setattr("lrai_report.tune.differing", lambda *_: told)
    artifact = lrai.Artifact.open(small_artifact.build(tmp_path / "m.lrai"))
    figures = dict[str, Any]()
    _judge(Target(tmp_path / "m.onnx", tmp_path / "rows.npz"), artifact, 1, 0.2, 3, 0.0, figures)
    assert "changed to 1 of 4 distinct requests (25.00%)" in capsys.readouterr().out
    shares = ("share_changed", "distinct_changed", "distinct_compared")
    assert [figures[key] for key in shares] == [0.25, 1, 4]


@pytest.mark.parametrize(("answers", "few"), [(99, True), (100, False)])
def test_a_percentile_of_few_answers_is_said_to_be_one(
    answers: int,
    few: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured(monkeypatch, 200.0, answers)
    artifact = lrai.Artifact.open(small_artifact.build(tmp_path / "m.lrai"))
    _judge(Target(tmp_path / "m.onnx", tmp_path / "rows.npz"), artifact, 1, 0.2, 3, 0.0, {})
    said = "under 100 answers in a round say little of p95: more --seconds would help"
    assert (said in capsys.readouterr().out) is few


@pytest.mark.parametrize("given", [True, False])
def test_what_the_compiler_leaves_out_of_the_requests_is_said(
    given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of none it says what is of no use here: which option of its own command takes some."""

    def compiled(*_: object, progress: Callable[[lrai.Step], None], **__: object) -> None:
        progress(lrai.Step("note", "evaluation: 7 repeated rows left out"))

    monkeypatch.setattr("lrai_report.tune.compile_model", compiled)
    found = Target(tmp_path / "m.onnx", tmp_path / "rows.npz" if given else None)
    _compile(found, tmp_path / "t.lrai", "", ())
    said = capsys.readouterr().out
    assert said == "note        evaluation: 7 repeated rows left out\n" * given


@pytest.mark.parametrize(
    ("apply", "fails", "error", "told"),
    [
        (True, "switch", lrai.NotReady, True),
        (True, "switch", lrai.ActorError, False),
        (True, "switch", lrai.ConditionNotMet, False),
        (True, "compare_live", lrai.NotReady, False),
        (False, "switch", lrai.NotReady, False),
    ],
)
def test_a_switch_that_outlasts_the_clients_patience_may_still_come_and_that_is_said(
    apply: bool,
    fails: str,
    error: type[lrai.LraiError],
    told: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error("the runtime did not answer within 60 s")

    written = tmp_path / "m-tuned.lrai"
    found = Target(tmp_path / "m.onnx", tmp_path / "rows.npz", name="m")
    made = lrai.Artifact.open(small_artifact.build(tmp_path / "made.lrai"))
    for step, does in (
        ("find", lambda *_: found),
        ("_compile", lambda *_: made),
        ("_judge", lambda *_: None),
        ("compare_live", lambda *_, **__: None),
        ("switch", lambda *_, **__: None),
        (fails, failing),
    ):
        monkeypatch.setattr(f"lrai_report.tune.{step}", does)
    with pytest.raises(error):
        main(["m", "-o", str(written), *["--apply"] * apply])
    _, kept, *more = capsys.readouterr().out.splitlines()
    assert kept.startswith("kept")
    assert bool(more) is told
    if told:
        left, back = more
        assert left.endswith(f"go back if lrai runtime deployments says {made.version}")
        assert back == "switch back lrai runtime rollback m"
