"""`lrai bench` as a person meets it, and what it says before it begins."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.progress import Progress

from lrai_core import (
    ActorError,
    Artifact,
    ArtifactError,
    EnvironmentProblem,
    InferenceRequest,
    LraiError,
    QueueFull,
    RequestError,
    UsageError,
)
from lrai_report import bench
from lrai_report.figures import Figures
from lrai_report.plan import Plan
from lrai_report.replay import Outcome, Server
from lrai_report.trace import Arrivals
from tests.core import small_artifact
from tests.report.played import Played, server

LRAI = Path(sys.executable).with_name("lrai")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_artifact.build(tmp_path_factory.mktemp("artifact") / "small.lrai")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    lines = [f"{index / 150:.4f},{1 + index % 3}" for index in range(150)]
    path.write_text("\n".join(["Time,rows", *lines]), encoding="utf-8")
    return path


@pytest.mark.server
def test_a_trace_is_replayed_and_what_came_of_it_is_shown_and_written(
    artifact: Path, trace: Path, tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    options = "--rate 100 --seconds 0.5 --rounds 2 --deadline-ms 500 --policies planner,fifo-8"
    done = subprocess.run(
        [LRAI, "bench", trace, artifact, *options.split(), "--json", file],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "160"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for words in (
        "trace.csv: 150 requests in 1 s",
        "100 requests/s",
        "500 ms: as asked",
        "under 100 requests in a round say little",
        "on time",
        "fifo-8      █",
        "p95 latency over the 1 s",
    ):
        assert words in done.stdout
    written = json.loads(file.read_text(encoding="utf-8"))
    assert done.stdout.rstrip().endswith(written["verdict"])
    assert (written["rate_per_second"], written["deadline_ms"]) == (100, 500)
    assert sum(written["requests"]) == 100
    assert list(written["policies"]) == ["planner", "fifo-8"]
    for policy in written["policies"].values():
        assert len(policy["rounds"]) == 2
        assert policy["median"]["on_time"] > 0.5
        assert policy["median"]["p50_ms"] > 0


@pytest.mark.server
@pytest.mark.parametrize(("fails", "other"), [("_show", "figures"), ("_write", "planner: ")])
def test_figures_that_cannot_be_printed_are_written_and_the_other_way_round(
    fails: str,
    other: str,
    artifact: Path,
    trace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: object) -> None:
        raise EnvironmentProblem("as is tested")

    monkeypatch.setattr(bench, "_WARM_UP_SECONDS", 0.1)
    monkeypatch.setattr(bench, fails, failing)
    options = "--rate 20 --seconds 0.5 --rounds 1 --deadline-ms 500 --policies planner"
    file = tmp_path / "figures.json"
    with pytest.raises(EnvironmentProblem, match="as is tested"):
        bench.main([str(trace), str(artifact), *options.split(), "--json", str(file)])
    found = [path.stem for path in tmp_path.glob("*.json")] + capsys.readouterr().out.splitlines()
    assert [line for line in found if line.startswith(other)]


@pytest.mark.server
def test_the_rate_is_a_share_of_what_one_by_one_answers_where_none_is_given(
    tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = small_artifact.build(tmp_path / "small.lrai")
    target = Artifact.open(artifact).manifest.target
    small_artifact.rewrite(artifact, {"target": msgspec.structs.replace(target, isa="other")})
    monkeypatch.setattr(bench, "_CAPACITY_SECONDS", 0.3)
    monkeypatch.setattr(bench, "_WARM_UP_SECONDS", 0.1)
    monkeypatch.setattr(os, "getloadavg", lambda: (77.7, 1.0, 1.0))
    trace.write_text("rate\n0\n50\n", encoding="utf-8")  # the first second is silent
    options = "--seconds 1.5 --rounds 1 --policies planner"
    with pytest.raises(SystemExit) as ended:
        bench.main([str(trace), str(artifact), *options.split()])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("rate"))
    assert "0.7 of the" in line
    line = line.replace(",", "")
    rate, capacity = float(line.split()[1]), float(line.split("0.7 of the ")[1].split()[0])
    assert rate == pytest.approx(0.7 * capacity, rel=0.01)
    assert "deadline  10 ms: 10 x a large request (p95) alone, 1 ms by the profile" in shown
    assert "note      other work is going on (load 77.7 on " in shown
    assert "made for another processor or engine version: the source model served" not in shown
    assert "int8 was made for another processor or engine version: fp32 served" in shown
    assert "planner: " in shown.splitlines()[-1]


def test_the_policies_take_turns_and_do_so_in_going_first(artifact: Path) -> None:
    log: list[str] = []

    class Logged(Played):
        def __init__(self, name: str) -> None:
            super().__init__()
            self._name = name

        async def infer_async(self, request: InferenceRequest) -> None:
            log.append(self._name)

    one = Arrivals(np.array([0.0]), np.array([0]), np.array([1]))
    plan = Plan(Artifact.open(artifact), 1.0, 0.0, 10.0, "as asked", 0.5, [one] * 4)
    servers = {name: server("planner", Logged(name)) for name in "abc"}
    with Progress(disable=True) as bar:
        results = asyncio.run(bench._play(servers, plan, [], bar, bar.add_task("")))
    assert "".join(log) == "abc" + "bca" + "cab" + "abc"
    assert [len(outcomes) for outcomes in results.values()] == [4, 4, 4]


@pytest.mark.parametrize(
    "error", [RequestError("no token 1"), RequestError("5000 rows, at most"), ActorError("it died")]
)
def test_made_up_requests_are_said_not_to_be_answered_whosever_fault_that_is(
    artifact: Path, error: Exception
) -> None:
    one = Arrivals(np.array([0.0]), np.array([4]), np.array([1]))
    servers = {"planner": server("planner", Played(error=error))}
    measured = bench._measure(servers, one, Artifact.open(artifact), [], wanted=False)
    with pytest.raises(
        ArtifactError, match=f"^made-up requests like these are not answered: {error}"
    ):
        asyncio.run(measured)


@pytest.mark.parametrize("policy", ["planner", "fifo-8"])
def test_requests_that_fill_the_queue_are_not_said_to_be_ones_that_the_model_does_not_answer(
    artifact: Path, policy: str
) -> None:
    wide = Arrivals(np.array([0.0]), np.array([4]), np.array([2000]))
    full = QueueFull(
        "the queue holds 4000 rows, 2000 more exceed its 4096", limit=1, retry_after_seconds=1.0
    )
    played = Played() if policy == "fifo-8" else Played(error=full)
    measured = bench._measure(
        {policy: server(policy, played)}, wide, Artifact.open(artifact), [], wanted=False
    )
    words = (
        "too many: the queue holds [0-9]000 rows, 2000 more .*; a larger scheduler.max_queue_rows"
    )
    with pytest.raises(UsageError, match=words):
        asyncio.run(measured)


def test_requests_that_were_sent_late_are_told(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = Arrivals(np.array([0.0]), np.array([4]), np.array([1]))
    plan = Plan(Artifact.open(artifact), 1.0, 0.0, 10.0, "as asked", 0.5, [one])
    found = {"planner": [Figures(1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0)]}
    for lag_seconds, told in ((0.0009, False), (0.0011, True)):
        outcome = Outcome(np.array([0.001]), 0, 1.0, rows=1, calls=1, lag_seconds=lag_seconds)
        bench._show({"planner": [outcome]}, found, plan)
        assert ("1.1 ms late" in capsys.readouterr().out) is told


@pytest.mark.server
def test_an_interrupted_replay_ends_with_130_and_leaves_no_process(
    artifact: Path, trace: Path
) -> None:
    with subprocess.Popen(
        [LRAI, "bench", trace, artifact, "--rate", "50", "--policies", "planner,fifo-8"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout is not None
            while not child.stdout.readline().startswith("deadline"):  # the replay begins
                assert child.poll() is None
            actors = children(child.pid)
            assert len(actors) == 2
            child.send_signal(signal.SIGINT)
            _, said = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 130
    assert "Traceback" not in said
    assert "lrai: interrupted" in said
    assert [pid for pid in actors if Path(f"/proc/{pid}").exists()] == []


def children(pid: int) -> set[int]:
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                found.add(int(status.parent.name))
    return found


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (["--policies", "planner,lifo"], UsageError, "'lifo' is none; allowed: planner, one-by"),
        (["--lengths", "8-64"], UsageError, r"--lengths is '8-64'; LOW..HIGH from 1 to"),
        (["--lengths", "0..4"], UsageError, r"--lengths is '0..4'"),
        (["--lengths", "9..4"], UsageError, r"--lengths is '9..4'"),
        (["--lengths", "4..9"], UsageError, "the model has no length axis"),
        (["--json", "nowhere/figures.json"], UsageError, "or lies in none that exists"),
        (["--json", "."], UsageError, "it is a folder"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_loaded(
    artifact: Path, trace: Path, options: list[str], error: type[LraiError], words: str
) -> None:
    with pytest.raises(error, match=words):
        bench.main([str(trace), str(artifact), *options])


@pytest.mark.parametrize("option", ["rate", "seconds", "deadline_ms"])
def test_what_is_no_number_is_refused_though_typer_lets_it_pass(
    artifact: Path, trace: Path, option: str
) -> None:
    """As 0.20 does: NaN is neither below the least nor above the most."""
    given: dict[str, Any] = {option: math.nan}
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} is no number"):
        bench.bench(trace, artifact, **given)


def test_a_deadline_that_never_comes_is_none(artifact: Path, trace: Path) -> None:
    options = "--deadline-ms inf --rate 20 --seconds 0.5 --rounds 1 --policies planner"
    with pytest.raises(SystemExit) as ended:
        bench.main([str(trace), str(artifact), *options.split()])
    assert ended.value.code == 2


def test_more_requests_than_memory_should_hold_are_refused(artifact: Path, trace: Path) -> None:
    options = "--rate 100000 --rounds 100"
    with pytest.raises(UsageError, match=r"^100,000 requests/s .*: over 1,000,000 requests; a low"):
        bench.main([str(trace), str(artifact), *options.split()])


def test_it_is_said_beforehand_about_how_many_minutes_it_takes(
    artifact: Path, trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(Server, "open", ended)
    options = "--rate 1 --seconds 3600 --rounds 3 --policies planner"
    with pytest.raises(InterruptedError):
        bench.main([str(trace), str(artifact), *options.split()])
    assert "about 180 minutes: 1 policies" in capsys.readouterr().out


@pytest.mark.server
def test_an_unusable_trace_or_artifact_ends_with_exit_4(trace: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        bench.main([str(trace), str(tmp_path)])
    trace.write_text("time\nsoon\n", encoding="utf-8")
    small_artifact.build(tmp_path / "small.lrai")
    done = subprocess.run(
        [LRAI, "bench", trace, tmp_path / "small.lrai"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 4
    assert f"{trace}, line 2: the time is 'soon'" in done.stderr.replace("\n", " ")


def test_figures_that_cannot_be_written_are_an_environment_problem(
    artifact: Path, tmp_path: Path
) -> None:
    one = Arrivals(np.array([0.0]), np.array([8]), np.array([1]))
    plan = Plan(Artifact.open(artifact), 1.0, 0.0, 10.0, "as asked", 1.0, [one])
    found = {"planner": [Figures(0.0, np.inf, np.inf, np.inf, 0.0, 1.0, 0.0)]}
    with pytest.raises(EnvironmentProblem, match="cannot be written: Is a directory"):
        bench._write(tmp_path, Path("trace.csv"), plan, found, "said")
    bench._write(tmp_path / "f.json", Path("trace.csv"), plan, found, "said")
    written = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert written["policies"]["planner"]["median"]["p50_ms"] is None
