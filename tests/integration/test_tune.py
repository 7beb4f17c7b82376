"""`lrai tune`: with a real daemon that serves, captures, shadows, switches and goes back."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import numpy_helper
from onnx.helper import make_node

import lrai_core as lrai
from benchmarks import models
from lrai_core.artifact import LatencyPoint
from lrai_core.compiler import search
from lrai_core.compiler.search import Candidate
from lrai_core.verifier.sample import Rows
from lrai_report.compare import Side, answered, differing, measure, sides
from lrai_report.compile import main as compile_main
from lrai_report.live import _shadow, compare_live, switch
from lrai_report.target import Target
from lrai_report.tune import _compile, _is_private, _judge, _refuse_at_once, main
from tests.core import small_artifact
from tests.core.compiler.onnx_files import linear, model, save, value
from tests.integration.test_runtime_faults import wait_until
from tests.own_runtime import daemon_pids, own_runtime
from tests.tiny_models import token_model

pytestmark = pytest.mark.server

LRAI = Path(sys.executable).with_name("lrai")
ROWS = 250


FASTER, ROUNDS = "int8-block32", 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, models.Arrays]:
    """A small network, and rows for it."""
    return models.classifier(tmp_path_factory.mktemp("source") / "wide.onnx", 0)


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """One form is twice as fast, by the profile and when it is served: nothing here is timed."""

    def profile(candidates: Sequence[Candidate], *_: object) -> None:
        for one in candidates:
            one.speedup = 2.0 if one.form == FASTER else 1.0
            ms = 1 / one.speedup
            one.latency = [LatencyPoint(rows=1, length=0, median_ms=ms, spread_ms=0.0)]

    def measure(both: Sequence[Side], requests: Sequence[object], **_: object) -> None:
        assert requests
        for side, rate in zip(both, (100.0, 200.0), strict=True):
            side.requests_per_second += [rate] * ROUNDS
            side.p95_ms += [1e3 / rate] * ROUNDS

    monkeypatch.setattr(search, "profile", profile)
    monkeypatch.setattr("lrai_report.tune.measure", measure)


def tune(*arguments: object) -> int:
    """Run the command here, and return its exit status."""
    try:
        main([str(argument) for argument in arguments])
    except lrai.LraiError as error:
        return error.exit_code
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def cli(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(LRAI), "tune", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=300, check=False
    )


def pasted(said: str) -> list[str]:
    """Run the two commands that were printed; return which variant serves after each."""
    found, lines = list[str](), [one for one in said.splitlines() if one.startswith("switch ")]
    assert [line[:12].strip() for line in lines] == ["switch on", "switch back"]
    with own_runtime(), lrai.Runtime() as runtime:
        for line in lines:
            program, *words = shlex.split(line[12:])
            assert program == "lrai"
            subprocess.run([LRAI, *words], check=True, timeout=60)
            found += [one.variant for one in runtime.models()]
    return found


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
        thread.join()


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Callable[[lrai.Runtime], None]:
    """Return what has each look at the shadow of a runtime wait for 10 rows, however long."""

    def each_look(runtime: lrai.Runtime) -> None:
        def rows() -> int:
            return runtime.stats().get("shadow_compared", 0)

        def nap(_: float) -> None:
            before = rows()
            wait_until(lambda: rows() >= before + 10)

        monkeypatch.setattr("lrai_report.live.time", SimpleNamespace(sleep=nap))

    return each_look


@pytest.mark.usefixtures("faster")
def test_a_served_model_is_tuned_shadowed_applied_and_switched_back(
    source: tuple[Path, models.Arrays], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], compared: Callable[[lrai.Runtime], None],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    file, rows = source
    served = lrai.compile(file, out=tmp_path / "plain.lrai", output_map="softmax", threads=1)
    assert served.manifest.chosen == "fp32"
    name = "wide:4f0c"  # as hosts name what they serve
    with own_runtime(LRAI_RUNTIME_CAPTURE_ROWS="2000"), lrai.Runtime() as runtime:
        runtime.load(served, name=name)
        refused = cli("wide", cwd=tmp_path)
        assert refused.returncode == 3, refused.stderr
        assert "LRAI_RUNTIME_CAPTURE_ROWS=2000" in refused.stderr
        for row in rows["features"][:ROWS]:
            request = lrai.InferenceRequest(model_name=name, inputs={"features": row[None]})
            runtime.infer(request)
        quiet = tune("wide", "--apply", "--minutes", 0.02, "-o", "quiet.lrai")
        assert quiet == 3, "nobody asks, so nothing is compared and nothing applied"
        assert runtime.deployments()[0].shares == {served.version: 1.0}
        with asking(name, rows) as versions:
            arguments = ("--minutes", 0.05, "--price-per-hour", 1, "--json", "figures.json")
            compared(runtime)
            assert tune("wide", "--apply", *arguments) == 0
            new = runtime.deployments()[0]
            tuned = lrai.Artifact.open(tmp_path / "wide-tuned.lrai")
            wait_until(lambda: tuned.version in versions)
            assert runtime.rollback(name).startswith(served.version)
        assert tuned.manifest.chosen == FASTER
        assert new.shares == {tuned.version: 1.0}
        assert new.shadow == {}
        assert set(versions) == {served.version, tuned.version}  # and no request failed
        assert runtime.stats()["shadow_compared"] > 0
    said = capsys.readouterr().out
    for words in (
        "2.00 times as many requests per second",
        "answers     changed to",
        "cost of a million",
        "rows compared",
        f"{name} is served by",
        f"lrai runtime rollback {name}",
    ):
        assert words in said, said
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["gains"] == [2.0] * ROUNDS
    assert len(figures["changed"]) == 20
    assert figures["share_changed"] <= 0.02
    assert len(figures["sides"]) == 2
    for rate, side in zip((100.0, 200.0), figures["sides"].values(), strict=True):
        assert side["requests_per_second"] == [rate] * ROUNDS
        assert side["memory_mb"] > 10
        assert side["cost_per_million"] == pytest.approx(1e6 / 3600 / rate)


@pytest.mark.usefixtures("faster")
def test_a_file_with_requests(
    source: tuple[Path, models.Arrays], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    file, rows = source
    np.savez(tmp_path / "asked.npz", features=rows["features"][:ROWS])
    assert tune(file, "--requests", "asked.npz", "--output-map", "softmax") == 0
    said = capsys.readouterr().out
    assert "the 20 farthest apart" in said
    assert pasted(said) == [FASTER, "fp32"]


@pytest.mark.usefixtures("faster")
def test_an_artifact_that_nobody_serves_with_requests(
    source: tuple[Path, models.Arrays], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    file, rows = source
    lrai.compile(file, out=tmp_path / "plain.lrai", output_map="softmax", threads=1)
    np.savez(tmp_path / "asked.npz", features=rows["features"][:ROWS])
    with own_runtime():
        assert tune("plain.lrai", "--requests", "asked.npz") == 0
    assert pasted(capsys.readouterr().out) == [FASTER, "fp32"]


@pytest.mark.usefixtures("faster")
def test_a_model_of_triton_that_nobody_serves_yet(
    source: tuple[Path, models.Arrays], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    file, rows = source
    Path("models", "wide", "1").mkdir(parents=True)
    shutil.copy(file, "models/wide/1/model.onnx")
    Path("models", "wide", "config.pbtxt").write_text('backend: "onnxruntime"\n')
    np.savez("asked.npz", features=rows["features"][:ROWS])
    with own_runtime():
        told = ("--requests", "asked.npz", "--output-map", "softmax")
        assert tune("models/wide", *told) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("switch")]
    named = "--model-repository models --name wide --version 2"
    assert lines == [
        f"switch on   lrai triton add wide-tuned.lrai {named} --switch",
        "switch back lrai triton remove models/wide",
    ]


def test_both_sides_are_asked_in_turns_and_counted(
    source: tuple[Path, models.Arrays], tmp_path: Path
) -> None:
    file, rows = source
    artifact = lrai.compile(file, out=tmp_path / "m.lrai", threads=1)
    asked = [
        lrai.InferenceRequest(model_name="", inputs={"features": row[None]})
        for row in rows["features"][:8]
    ]
    ticks: list[int] = []
    with sides([(artifact, "fp32"), (artifact, "")]) as both:
        measure(both, asked, callers=2, seconds=0.05, rounds=3, tick=lambda: ticks.append(1))
        assert len(ticks) == 6
        for side in both:
            assert len(side.requests_per_second) == len(side.p95_ms) == 3
            assert side.figures(0.0)["answers"] == side.answers
            assert all(answers > 0 for answers in side.answers)
            assert len(side.answers) == 3
            assert min(side.requests_per_second) > 0
            assert side.memory_mb > 10
        worst = differing(both, asked, artifact, lambda: None)
    assert [one.agrees for one in worst] == [True] * 8
    assert {one.gap for one in worst} == {0.0}


def test_where_nothing_is_gained_it_says_so(tmp_path: Path) -> None:
    # Nothing in it can be quantised: else a busy machine may find that a form of it is faster.
    relu = model(
        [make_node("Relu", ["x"], ["y"])], [value("x", ["n", 8])], [value("y", ["n", 8])], []
    )
    source = save(relu, tmp_path / "small.onnx")
    x = np.random.default_rng(0).standard_normal((ROWS, 8)).astype(np.float32)
    np.savez(tmp_path / "asked.npz", x=x)
    found = cli(source, "--requests", "asked.npz", cwd=tmp_path)
    assert found.returncode == 3, found.stdout + found.stderr
    assert "no gain" in found.stderr
    assert "removed     small-tuned.lrai" in found.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked.npz", "small.onnx"]


def test_without_requests_fp32_is_what_there_is(tmp_path: Path) -> None:
    source = save(linear(), tmp_path / "small.onnx")
    found = cli(source, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "fp32, optimised, is all that can be made without any" in found.stdout
    assert pasted(found.stdout.replace("small-tuned", f"{tmp_path}/small-tuned")) == ["fp32"]
    assert lrai.Artifact.open(tmp_path / "small-tuned.lrai").manifest.chosen == "fp32"


def test_what_would_be_refused_at_the_end_is_refused_at_once(tmp_path: Path) -> None:
    artifact = lrai.compile(save(linear(), tmp_path / "m.onnx"), out=tmp_path / "m.lrai")
    np.savez(tmp_path / "rows.npz", x=np.ones((4, 3), np.float32))
    with own_runtime(), lrai.Runtime() as runtime:
        runtime.load(artifact, name="m")
        (tmp_path / "m-tuned.lrai").mkdir()
        again = cli("m", "--requests", tmp_path / "rows.npz", cwd=tmp_path)
        (tmp_path / "m-tuned.lrai").rmdir()
        runtime.freeze("m", by="ann", reason="audit week")
        frozen = cli("m", "--requests", tmp_path / "rows.npz", cwd=tmp_path)
    assert again.returncode == 2
    assert "m-tuned.lrai exists" in again.stderr
    assert "leave it where it is if it serves" in again.stderr
    assert frozen.returncode == 3
    assert "'m' is frozen: lrai unfreeze ends that" in frozen.stderr
    assert not (tmp_path / "m-tuned.lrai").exists()


@pytest.mark.parametrize(
    ("serves", "said"),
    [
        ({"shares": {"1": 0.95, "2": 0.05}}, "several versions of 'm' answer"),
        ({"shares": {"1": 1.0, "2": 0.0}, "relief": "2"}, "several versions of 'm' answer"),
        ({"copied": "requests are copied"}, "are copied; or compare no live requests"),
    ],
)
def test_what_rollback_would_not_bring_back_is_not_ended(
    serves: dict[str, Any], said: str, tmp_path: Path
) -> None:
    found = Target(tmp_path / "m.onnx", tmp_path / "rows.npz", name="m", **serves)
    with pytest.raises(lrai.ConditionNotMet, match=said):
        _refuse_at_once(found, 1.0, None, apply=True)
    _refuse_at_once(found, 0.0, None, apply=False)


def test_what_lies_where_the_runtime_loads_nothing_from_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRAI_RUNTIME_MODEL_ROOTS", f"{tmp_path}/models")
    found = Target(tmp_path / "m.onnx", tmp_path / "rows.npz", name="m")
    monkeypatch.setattr("lrai_report.tune.find", lambda *_: found)
    out = cli_here("m", "-o", str(tmp_path / "m-tuned.lrai"))
    assert isinstance(out, lrai.UsageError)
    assert "lies in none of the folders to load from" in str(out)


@pytest.mark.parametrize("roots", ["link", "models", "other:link"])
def test_folders_to_load_from_may_be_links_and_relative(
    roots: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where they are loaded from."""
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("link").symlink_to("models")
    monkeypatch.setenv("LRAI_RUNTIME_MODEL_ROOTS", roots)
    found, made = Target(tmp_path / "m.onnx", tmp_path / "rows.npz", name="m"), list[Path]()
    monkeypatch.setattr("lrai_report.tune.find", lambda *_: found)
    monkeypatch.setattr("lrai_report.tune._compile", lambda _, to, *__: made.append(to))
    for step in ("_judge", "compare_live", "switch"):
        monkeypatch.setattr(f"lrai_report.tune.{step}", lambda *_, **__: None)
    for to in ("models/m-tuned.lrai", "link/m-tuned.lrai"):
        assert tune("m", "-o", to) == 0
        assert made.pop() == Path(to)


def cli_here(*arguments: str) -> BaseException | None:
    """Run the command in this process; return what ended it."""
    try:
        main(arguments)
    except (lrai.LraiError, SystemExit) as end:
        return end
    return None


def test_who_interrupts_a_switch_is_told_how_to_go_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runtime goes on with it: what it may serve by now stays where it is."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def compiled(*_: object) -> SimpleNamespace:
        written.mkdir()
        return SimpleNamespace(version="4f0c")

    written = tmp_path / "m-tuned.lrai"
    found = Target(tmp_path / "m.onnx", tmp_path / "rows.npz", name="m")
    for name, does in (
        ("find", lambda *_: found),
        ("_compile", compiled),
        ("_judge", lambda *_: None),
        ("compare_live", lambda *_, **__: None),
        ("switch", interrupted),
    ):
        monkeypatch.setattr(f"lrai_report.tune.{name}", does)
    end = cli_here("m", "--apply", "-o", str(written))
    assert isinstance(end, SystemExit)
    assert end.code == 130
    left, back = capsys.readouterr().out.splitlines()[-2:]
    assert left.endswith("go back if lrai runtime deployments says 4f0c")
    assert back == "switch back lrai runtime rollback m"
    assert written.exists()
    written.rmdir()
    monkeypatch.setattr("lrai_report.tune.compare_live", interrupted)
    cli_here("m", "--apply", "-o", str(written))
    assert not written.exists()


def test_rows_that_only_their_owner_may_read_stay_so(tmp_path: Path) -> None:
    rows = tmp_path / "rows.npz"
    np.savez(rows, x=np.ones((4, 3), np.float32))
    for mode, private in ((0o600, True), (0o644, False)):
        rows.chmod(mode)
        assert _is_private(Target(tmp_path / "m.onnx", rows)) is private
    assert _is_private(Target(tmp_path / "m.onnx", rows, captured=True))
    assert not _is_private(Target(tmp_path / "m.onnx", None))


def test_what_serves_says_what_is_demanded_of_what_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_artifact.build(tmp_path / "m.lrai")
    small_artifact.rewrite(path, {"demanded": (0.02, 0.05), "objective": "memory"})
    artifact, asked = lrai.Artifact.open(path), dict[str, Any]()

    def compiled(model: Path, **arguments: Any) -> None:
        asked.update(arguments, mask=os.umask(0o022))

    monkeypatch.setattr("lrai_report.tune.compile_model", compiled)

    def answering(_: object, __: object, tick: Callable[[], None]) -> dict[str, Any]:
        for _row in range(3):
            tick()
        return {"x": np.ones((1, 3))}

    monkeypatch.setattr("lrai_report.tune.answered", answering)
    before = os.umask(0o022)
    found = Target(tmp_path / "m.onnx", tmp_path / "rows.npz", artifact, captured=True)
    _compile(found, tmp_path / "m-tuned.lrai", "", ())
    assert os.umask(before) == 0o022
    assert "2 of 3 captured rows were not answered" in capsys.readouterr().out
    demanded = {"epsilon": 0.02, "delta": 0.05, "objective": "memory", "mask": 0o077}
    assert {key: asked[key] for key in demanded} == demanded
    assert asked["keep_evaluation"] == 1 << 16


@pytest.mark.parametrize(("demanded", "compared"), [(None, 2_000), ((0.02, 0.001), 20_000)])
def test_of_many_rows_so_many_are_compared_as_tell_of_what_is_demanded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    demanded: tuple[float, float] | None,
    compared: int,
) -> None:
    path, counts = small_artifact.build(tmp_path / "m.lrai"), list[int]()
    small_artifact.rewrite(path, {"demanded": demanded})
    row = [np.ones((1, 3), np.float32)]
    monkeypatch.setattr("lrai_report.tune.evaluation", lambda _: Rows([row] * 30_000, None, []))
    both = [SimpleNamespace(variant=name) for name in ("fp32", "int8")]
    monkeypatch.setattr("lrai_report.tune.sides", lambda _: nullcontext(both))

    def measured(_: object, requests: Sequence[object], **__: object) -> None:
        counts.append(len(requests))

    def told(_: object, requests: Sequence[object], *__: object) -> None:
        counts.append(len(requests))
        raise InterruptedError

    monkeypatch.setattr("lrai_report.tune.measure", measured)
    monkeypatch.setattr("lrai_report.tune.differing", told)
    found = Target(tmp_path / "m.onnx", tmp_path / "rows.npz")
    with pytest.raises(InterruptedError):
        _judge(found, lrai.Artifact.open(path), 1, 0.2, 3, 0.0, {})
    assert counts == [compared] * 2


def test_the_engines_of_what_serves_are_tried_where_no_others_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = small_artifact.manifest()
    names = ("onnxruntime", "openvino", "openvino", "elsewhere", "onnxruntime")
    variants = (msgspec.structs.replace(manifest.variants[1], engine=name) for name in names)
    manifest = msgspec.structs.replace(manifest, variants=tuple(variants))
    served = lrai.Artifact(tmp_path, manifest, "0" * 64)
    found = Target(tmp_path / "m.onnx", tmp_path / "rows.npz", served)
    there = {"openvino": "2026.1", "onnxruntime": "1.27"}
    monkeypatch.setattr(
        "lrai_report.tune.environment", lambda one: f"amx with {there.get(one.engine, 'none')}"
    )
    tried = list[Sequence[str]]()
    monkeypatch.setattr("lrai_report.tune.find", lambda *_: found)
    monkeypatch.setattr("lrai_report.tune._compile", lambda *given: tried.append(given[-1]))
    monkeypatch.setattr("lrai_report.tune._judge", lambda *_: None)
    for named in ((), ("--engine", "elsewhere")):
        assert tune("m", "-o", tmp_path / "m-tuned.lrai", *named) == 0
    assert tried == [["openvino"], ["elsewhere"]]


@pytest.mark.parametrize("apply", [True, False])
def test_what_is_switched_is_said_to_be_kept_by_a_command_of_its_host(
    apply: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = tmp_path / "models" / "m"
    (entry / "4").mkdir(parents=True)
    (entry / "config.pbtxt").write_text('backend: "lrai"\n')
    found = Target(tmp_path / "m.onnx", tmp_path / "rows.npz", name="m:4f0c", entry=entry)
    monkeypatch.setattr("lrai_report.tune.find", lambda *_: found)
    for step in ("_compile", "_judge", "compare_live", "switch"):
        monkeypatch.setattr(f"lrai_report.tune.{step}", lambda *_, **__: None)
    assert tune("m", "-o", tmp_path / "t.lrai", *["--apply"] * apply) == 0
    said = capsys.readouterr().out
    named = f"--model-repository {tmp_path / 'models'} --name m --version 5"
    assert f"to keep it  lrai triton add {tmp_path / 't.lrai'} {named}\n" in said
    assert f"and back    rm -r {entry / '5'}\n" in said


def test_a_name_that_is_not_served_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with own_runtime(), lrai.Runtime() as runtime:
        runtime.load(lrai.compile(save(linear(), tmp_path / "m.onnx"), out=tmp_path / "m.lrai"))
        found = cli("nobody", cwd=tmp_path)
    assert found.returncode == 2
    assert "'nobody' is no file, artifact or name: there is 'm'" in found.stderr


def test_a_folder_that_is_served_means_what_serves(tmp_path: Path) -> None:
    lrai.compile(save(linear(), tmp_path / "m.onnx"), out=tmp_path / "m.lrai")
    alone = cli(tmp_path / "m.lrai", cwd=tmp_path)
    assert alone.returncode == 2
    assert "is not served, so nothing is captured: give --requests" in alone.stderr
    with own_runtime(), lrai.Runtime() as runtime:
        runtime.load(tmp_path / "m.lrai", name="other")
        found = cli(tmp_path / "m.lrai", cwd=tmp_path)
    assert found.returncode == 3
    assert "of the requests to 'other' none are captured" in found.stderr


def test_what_does_not_serve_is_not_tuned_in_the_place_of_what_does(tmp_path: Path) -> None:
    first = lrai.compile(save(linear(), tmp_path / "m.onnx"), out=tmp_path / "m.lrai")
    other = save(linear(classes=2), tmp_path / "n.onnx")
    second = lrai.compile(other, out=tmp_path / "n.lrai")
    np.savez(rows := tmp_path / "rows.npz", x=np.ones((4, 8), np.float32))
    with own_runtime(), lrai.Runtime() as runtime:
        runtime.load(first, name="m")
        runtime.load(second, name="m", share=0.0)
        beside = cli(tmp_path / "n.lrai", "--requests", rows, cwd=tmp_path)
        shutil.rmtree(tmp_path / "m.lrai")
        shutil.copytree(tmp_path / "n.lrai", tmp_path / "m.lrai")  # and not loaded
        since = cli("m", "--requests", rows, cwd=tmp_path)
    for found in (beside, since):
        assert found.returncode == 3
        said = f"is version {second.version}, but what serves most of 'm' is {first.version}"
        assert said in found.stderr


def test_no_runtime_is_started_to_be_asked(tmp_path: Path) -> None:
    with own_runtime() as sockets:
        found = cli("nobody", cwd=tmp_path)
        assert daemon_pids(sockets) == []
    assert found.returncode == 2
    assert "'nobody' is no file or artifact, and no runtime runs" in found.stderr


@pytest.mark.parametrize(
    ("serves", "several"),
    [
        ({"shares": {"1": 1.0, "2": 0.0}}, False),
        ({"shares": {"1": 0.9, "2": 0.1}}, True),
        ({"shares": {"1": 1.0}, "relief": "2"}, True),
    ],
)
def test_where_others_serve_beside_it_is_said_that_rollback_does_not_bring_them_back(
    serves: dict[str, Any],
    several: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = Target(tmp_path / "m.onnx", tmp_path / "rows.npz", name="m", **serves)
    monkeypatch.setattr("lrai_report.tune.find", lambda *_: found)
    for step in ("_compile", "_judge", "compare_live", "switch"):
        monkeypatch.setattr(f"lrai_report.tune.{step}", lambda *_, **__: None)
    assert tune("m", "-o", tmp_path / "m-tuned.lrai") == 0
    assert ("rollback brings one of them back" in capsys.readouterr().out) == several


def test_rows_that_do_not_tell_groups_are_not_tuned_on_where_what_serves_was_judged_by_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disparity = SimpleNamespace(gate=SimpleNamespace(disparities=("sex",)))
    served = SimpleNamespace(manifest=SimpleNamespace(name="m"), variants=[disparity])
    found = Target(tmp_path / "m.onnx", tmp_path / "rows.npz", served, "m")  # type: ignore[arg-type]
    monkeypatch.setattr("lrai_report.tune.find", lambda *_: found)
    out = cli_here("m", "-o", str(tmp_path / "m-tuned.lrai"))
    assert isinstance(out, lrai.ConditionNotMet)
    assert "do not tell groups of people" in str(out)


def test_what_was_changed_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    artifact = lrai.compile(save(linear(), tmp_path / "m.onnx"), out=tmp_path / "m.lrai")
    with own_runtime(), lrai.Runtime() as runtime:
        runtime.load(artifact, name="m")
        before = "m", {"0" * 12: 1.0}
        for step in (partial(compare_live, minutes=0), switch):
            with pytest.raises(lrai.ConditionNotMet, match="'m' was changed meanwhile"):
                step(*before, tmp_path / "m.lrai", address="", apply=True)
        assert runtime.deployments()[0].previous == ""


def test_what_live_requests_disagree_with_is_not_applied(
    source: tuple[Path, models.Arrays], tmp_path: Path, compared: Callable[[lrai.Runtime], None]
) -> None:
    file, rows = source
    other, _ = models.classifier(tmp_path / "other.onnx", 1)
    served = lrai.compile(file, out=tmp_path / "wide.lrai", output_map="softmax", threads=1)
    lrai.compile(other, out=tmp_path / "other.lrai", output_map="softmax", threads=1)
    with own_runtime(), lrai.Runtime() as runtime:
        runtime.load(served, name="m")
        before = runtime.deployments()[0].shares
        compared(runtime)
        with asking("m", rows), pytest.raises(lrai.ConditionNotMet, match="on live requests"):
            compare_live("m", before, tmp_path / "other.lrai", 0.05, "", apply=True)
        now = runtime.deployments()[0]
        assert (now.shares, now.shadow) == (before, {})


def test_a_runtime_that_is_killed_while_live_requests_are_compared_tells_nothing(
    source: tuple[Path, models.Arrays], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one goes on where it was, copies and all, but counts from 0."""
    file, rows = source
    served = lrai.compile(file, out=tmp_path / "wide.lrai", output_map="softmax", threads=1)
    lrai.compile(file, out=tmp_path / "new.lrai", output_map="raw", threads=1)
    naps = iter(range(10))
    with own_runtime() as sockets, lrai.Runtime() as runtime:
        runtime.load(served, name="m")
        before = runtime.deployments()[0].shares

        def nap(seconds: float, sleep: Callable[[float], None] = time.sleep) -> None:
            sleep(seconds)
            if threading.current_thread() is threading.main_thread() and next(naps) == 1:
                os.kill(daemon_pids(sockets)[0], signal.SIGKILL)

        monkeypatch.setattr("lrai_report.live.time", SimpleNamespace(sleep=nap))
        no = pytest.raises(lrai.ConditionNotMet, match="the runtime was started again meanwhile")
        with asking("m", rows), no:
            compare_live("m", before, tmp_path / "new.lrai", 4 / 60, "", apply=True)
        now = runtime.deployments()[0]
        assert (now.shares, now.shadow) == (before, {})


@pytest.mark.parametrize(
    ("demanded", "differ", "refused"),
    [(None, 3, True), ((0.1, 0.05), 3, False), ((0.1, 0.05), 6, True), ((0.1, 0.01), 2, True)],
)
def test_of_live_answers_as_many_may_differ_as_of_those_that_the_gate_saw(
    demanded: tuple[float, float] | None,
    differ: int,
    refused: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = small_artifact.build(tmp_path / "m.lrai")
    small_artifact.rewrite(written, {"demanded": demanded})
    compared = {"shadow_compared": 100, "shadow_differs": differ}
    stats = iter([{}, *[compared] * 3])
    serves = SimpleNamespace(name="m", shares={"1": 1.0}, shadow={}, relief="")
    nothing = dict.fromkeys(("load", "route", "unload"), lambda *_, **__: None)
    runtime: Any = SimpleNamespace(
        stats=lambda: next(stats), deployments=lambda **_: [serves], **nothing
    )
    monkeypatch.setattr("lrai_report.live.time.sleep", lambda _: None)
    no = pytest.raises(lrai.ConditionNotMet, match="on live requests")
    with no if refused else nullcontext():
        assert _shadow(runtime, "m", written, 0.05, "") == 100


def test_a_few_live_answers_switch_nothing_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = iter([29, 30, 29])
    monkeypatch.setattr("lrai_report.live.runtime_of", lambda _: nullcontext())
    monkeypatch.setattr("lrai_report.live._check_same", lambda *_: None)
    monkeypatch.setattr("lrai_report.live._shadow", lambda *_: next(seen))
    written = tmp_path / "m-tuned.lrai"
    compare_live("m", {}, written, 1.0, "", apply=False)
    compare_live("m", {}, written, 1.0, "", apply=True)
    compare_live("m", {}, written, 0.0, "", apply=True)
    few = "29 live rows were compared, 30 are needed .*: lrai runtime swap m .*m-tuned.lrai"
    with pytest.raises(lrai.ConditionNotMet, match=few):
        compare_live("m", {}, written, 1.0, "", apply=True)


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("rates", [(100.0, 103.0), (100.0, 99.0)])
def test_what_serves_no_more_requests_is_no_gain(
    source: tuple[Path, models.Arrays],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rates: tuple[float, float],
) -> None:
    def measured(both: Sequence[Side], *_: object, **__: object) -> None:
        for side, rate in zip(both, rates, strict=True):
            side.requests_per_second += [rate] * ROUNDS
            side.p95_ms += [1e3 / rate] * ROUNDS

    monkeypatch.setattr("lrai_report.tune.measure", measured)
    monkeypatch.chdir(tmp_path)
    file, rows = source
    np.savez(tmp_path / "asked.npz", features=rows["features"][:ROWS])
    assert tune(file, "--requests", "asked.npz", "--output-map", "softmax") == 3
    said = capsys.readouterr().out
    assert "serve wide-tuned.lrai" not in said
    assert "removed     wide-tuned.lrai" in said
    assert not Path("wide-tuned.lrai").exists()


def test_captured_requests_that_the_model_refuses_are_left_out(tmp_path: Path) -> None:
    artifact = lrai.compile(token_model(tmp_path / "m.onnx"), out=tmp_path / "m.lrai")
    ids = np.array([[1, 2], [5000, 1], [3, 0]])
    np.savez(tmp_path / "captured.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    ticks: list[int] = []
    kept = answered(artifact, tmp_path / "captured.npz", lambda: ticks.append(1))
    assert kept["input_ids"].tolist() == [[1, 2], [3, 0]]
    assert len(ticks) == 3


@pytest.mark.usefixtures("faster")
def test_where_the_map_is_what_refuses_every_form_another_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of scores of classes that a host serves: it builds what it is given without a map."""
    monkeypatch.chdir(tmp_path)
    proto = linear()
    weight = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weight[0] = 12.0  # which takes the steps of int8 from the others, and is multiplied by 0
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    served = lrai.compile(save(proto, tmp_path / "m.onnx"), out=tmp_path / "m.lrai", threads=1)
    x = np.random.default_rng(0).standard_normal((ROWS, 8)).astype(np.float32)
    x[:, 0] = 0.0
    np.savez("asked.npz", x=x)
    tuned = cli_here(str(served.path), "--requests", "asked.npz", "-o", "t.lrai")
    compiled = None
    try:
        compile_main(["m.onnx", "-o", "c.lrai", "--evaluation", "asked.npz", "--threads", "1"])
    except lrai.ConditionNotMet as error:
        compiled = error
    for end, begins in ((tuned, "no gain: "), (compiled, "no form but fp32 passed")):
        assert isinstance(end, lrai.ConditionNotMet)
        assert str(end).startswith(begins)
        assert f"; closest was {FASTER}: 2.00 x fp32; relative error <= 1 % on " in str(end)
        assert "%: --output-map softmax, if these are scores of classes" in str(end)
