"""What the SageMaker adapter does without a server: tars, options, models in folders, the check."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import httpx
import pytest

import lrai_core as lrai
from lrai_codecs import counted
from lrai_import.hosted import zeros
from lrai_sagemaker.app import _refused, create
from lrai_sagemaker.commands import claims, main, tars
from lrai_sagemaker.commands.serve import Drain, _required
from lrai_sagemaker.commands.supervisor import _GRACE_SECONDS, Supervisor
from lrai_sagemaker.commands.tars import package, unpacked
from lrai_sagemaker.logs import one_line
from lrai_sagemaker.models import artifact_in
from lrai_sagemaker.names import AlreadyLoaded, Names
from lrai_sagemaker.settings import Settings
from tests.core import small_artifact


@pytest.fixture
def artifact(tmp_path: Path) -> lrai.Artifact:
    return lrai.Artifact.open(small_artifact.build(tmp_path / "small.lrai"))


def test_the_same_artifact_gives_the_same_tar(artifact: lrai.Artifact, tmp_path: Path) -> None:
    package(artifact, tmp_path / "one.tar.gz")
    copy = shutil.copytree(artifact.path, tmp_path / "elsewhere" / "other.lrai")
    for path in copy.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    package(lrai.Artifact.open(copy), tmp_path / "two.tar.gz")
    assert (tmp_path / "one.tar.gz").read_bytes() == (tmp_path / "two.tar.gz").read_bytes()


def test_a_tar_holds_plain_files_of_nobody(artifact: lrai.Artifact, tmp_path: Path) -> None:
    (artifact.path / "certificates").mkdir()
    (artifact.path / "certificates" / "c.json.partial").write_text("{")
    package(artifact, tmp_path / "model.tar.gz")
    with tarfile.open(tmp_path / "model.tar.gz") as archive:
        members = archive.getmembers()
    assert all(member.isreg() for member in members)
    assert {(m.uid, m.gid, m.mtime, m.mode, m.uname) for m in members} == {(0, 0, 0, 0o644, "")}
    names = [member.name for member in members]
    assert names == sorted(names)
    assert "model.lrai/manifest.json" in names
    assert not any("partial" in name for name in names)


def test_a_tar_unpacks_to_what_was_packed(artifact: lrai.Artifact, tmp_path: Path) -> None:
    package(artifact, tmp_path / "model.tar.gz")
    folder = unpacked(tmp_path / "model.tar.gz", tmp_path)
    assert artifact_in(folder).sha256 == artifact.sha256
    lrai.Artifact.open(folder / "model.lrai", verify=True)


def test_what_exists_is_not_overwritten(artifact: lrai.Artifact, tmp_path: Path) -> None:
    (tmp_path / "model.tar.gz").write_text("mine")
    with pytest.raises(lrai.UsageError, match="exists"):
        package(artifact, tmp_path / "model.tar.gz")
    assert (tmp_path / "model.tar.gz").read_text() == "mine"


def test_a_tar_that_cannot_be_written_leaves_nothing(
    artifact: lrai.Artifact, tmp_path: Path
) -> None:
    with pytest.raises(lrai.EnvironmentProblem, match="cannot be written"):
        package(artifact, tmp_path / "gone" / "model.tar.gz")
    with pytest.raises(lrai.EnvironmentProblem, match="cannot be written: Not a directory"):
        package(artifact, artifact.path / "manifest.json" / "model.tar.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["small.lrai"]


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> bytes:
    """Return a tar of one member, which may state more bytes than it has."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size = kind, link, size
    return entry.tobuf() + bytes(10_240 if size else 1024)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (member("../out"), "outside"),
        (member("a/../../out"), "outside"),
        (member("/etc/x/out"), None),  # the leading / is dropped
        (member("link", tarfile.SYMTYPE, "/etc/passwd"), "'link', no file"),
        (member("link", tarfile.LNKTYPE, "../x"), "'link', no file"),
        (member("pipe", tarfile.FIFOTYPE), "'pipe', no file"),
        (member("disk", tarfile.BLKTYPE), "'disk', no file"),
        (member("large", size=1 << 50), "too much, for this disk or its size"),
        (member("short", size=100_000), "no whole and safe tar"),
        (member("long", tarfile.XHDTYPE, size=1 << 30), "an attribute has 1073741824 bytes"),
        (member("long", tarfile.GNUTYPE_LONGNAME, size=1 << 30), "an attribute has"),
        (b"no tar", "no whole and safe tar"),
        (b"", "no whole and safe tar"),
        (b"\x1f\x8b\x08\x00cut", "no whole and safe tar"),
    ],
)
@pytest.mark.parametrize("how", [{"filter": "data"}, {"set_attrs": False}], ids=["data", "old"])
def test_a_tar_is_not_trusted(
    tmp_path: Path,
    content: bytes,
    said: str | None,
    how: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not by a Python either whose `extract` knows no filters, as Debian 12's."""
    monkeypatch.setattr(tars, "_PLAINLY", how)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.tar.gz").write_bytes(content)
    (tmp_path / "scratch").mkdir()
    if said is None:
        folder = unpacked(tmp_path / "in", tmp_path / "scratch")
        assert (folder / "etc" / "x" / "out").is_file()
    else:
        with pytest.raises(lrai.ArtifactError, match=said):
            unpacked(tmp_path / "in", tmp_path / "scratch")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "scratch"}


def test_a_tar_of_very_many_files_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "model.tar", "w") as archive:
        for number in range(10_001):
            archive.addfile(tarfile.TarInfo(str(number)), io.BytesIO())
    (tmp_path / "scratch").mkdir()
    with pytest.raises(lrai.ArtifactError, match="too much"):
        unpacked(tmp_path, tmp_path / "scratch")


def test_a_tar_that_holds_much_more_than_it_takes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars, "_PLAIN_BYTES", 1 << 16)
    (tmp_path / "scratch").mkdir()
    for extent, told in ((1 << 16, None), (1 << 22, "too much, for this disk or its size")):
        entry = tarfile.TarInfo("zeros")
        entry.size = extent
        with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as archive:
            archive.addfile(entry, io.BytesIO(bytes(extent)))
        with pytest.raises(lrai.ArtifactError, match=told) if told else contextlib.nullcontext():
            unpacked(tmp_path, tmp_path / "scratch")


def test_what_was_unpacked_is_used_together_for_as_long_as_it_is_whole(
    artifact: lrai.Artifact, tmp_path: Path
) -> None:
    package(artifact, tmp_path / "model.tar.gz")
    with contextlib.ExitStack() as containers:

        def come(name: str) -> tuple[Path, Path]:
            (scratch := tmp_path / f"{claims.PREFIX}{name}").mkdir()
            containers.enter_context(claims.own(scratch))
            found = artifact_in(unpacked(tmp_path / "model.tar.gz", scratch))
            found, locks = claims.together(found, scratch)
            for lock in locks:
                containers.enter_context(lock)
            lrai.Artifact.open(found.path, verify=True)
            return found.path, scratch

        (first, _), (second, scratch) = come("first"), come("second")
        assert first == second
        assert not second.is_relative_to(scratch)
        (graph, *_) = first.glob("variants/*/*.onnx")
        graph.write_bytes(bytes(graph.stat().st_size))
        third, scratch = come("third")
        assert third.is_relative_to(scratch)
        claims.forget(scratch)
        assert first.is_dir(), "others have it"
    (tmp_path / "next").mkdir()
    claims.forget(tmp_path / "next")
    assert not list(tmp_path.glob(f"{claims.PREFIX}*"))


def test_only_a_folder_with_nothing_but_a_tar_is_unpacked(
    artifact: lrai.Artifact, tmp_path: Path
) -> None:
    package(artifact, tmp_path / "model.tar.gz")
    assert unpacked(tmp_path, tmp_path) == tmp_path  # it holds small.lrai too


def test_the_model_of_a_folder_is_the_only_one_there(
    artifact: lrai.Artifact, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").touch()
    assert artifact_in(tmp_path).path == artifact.path
    assert artifact_in(artifact.path).path == artifact.path
    small_artifact.build(tmp_path / "more.lrai")
    with pytest.raises(lrai.ArtifactError, match=r"holds more\.lrai, notes\.txt, small\.lrai"):
        artifact_in(tmp_path)
    with pytest.raises(lrai.ArtifactError, match="No such file"):
        artifact_in(tmp_path / "gone")
    with pytest.raises(lrai.ArtifactError, match="File name too long"):  # as where nobody may look
        artifact_in(unpacked(tmp_path / ("n" * 300), tmp_path))


def test_a_model_of_another_lrai_is_told_of(
    artifact: lrai.Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small_artifact.rewrite(artifact.path, {"lrai_version": "9.9.9\n"})
    artifact_in(tmp_path)
    told = f"small.lrai was compiled by lrai 9.9.9 , and is served by lrai {lrai.__version__}"
    assert [record.getMessage() for record in caplog.records] == [told]
    caplog.clear()
    small_artifact.rewrite(artifact.path, {"lrai_version": lrai.__version__})
    artifact_in(artifact.path)
    assert not caplog.records
    small_artifact.rewrite(artifact.path, {"lrai_version": "9.9.9", "surprise": 1})
    with pytest.raises(lrai.ArtifactError, match=r"written by lrai 9\.9\.9, this is lrai"):
        artifact_in(tmp_path)


def test_a_model_behind_a_link_is_refused(artifact: lrai.Artifact, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.lrai").symlink_to(artifact.path)
    with pytest.raises(lrai.ArtifactError, match="link"):
        artifact_in(tmp_path / "in")


def test_zeros_are_of_the_smallest_shape_and_the_right_type() -> None:
    specs = [("a", "INT64", ("n", 3)), ("b", "BYTES", ("n",)), ("c", "BOOL", (2, "m"))]
    inputs = tuple(lrai.TensorSpec(name=n, datatype=d, shape=s) for n, d, s in specs)
    found = zeros(inputs)
    assert {name: array.tolist() for name, array in found.items()} == {
        "a": [[0, 0, 0]],
        "b": [""],
        "c": [[False], [False]],
    }
    assert found["a"].dtype == "int64"


class Runtime:
    """Loads what it is told, and answers with an error if it is given one."""

    def __init__(self, error: lrai.LraiError | None = None) -> None:
        self.there, self._error = dict[str, lrai.Signature](), error
        self.config, self.state = lrai.load_config(environ={}), "ok"
        self.drained = list[str]()

    def load(self, artifact: lrai.Artifact, *, name: str, require: object) -> None:
        assert require is None
        self.there[name] = artifact.manifest.signature

    def infer(self, request: lrai.InferenceRequest) -> None:
        assert request.model_name in self.there
        assert request.timeout_ms == self.config.scheduler.default_timeout_ms
        if self._error is not None:
            raise self._error

    def unload(self, name: str, *, drain: bool = False) -> None:
        if name not in self.there:
            raise lrai.ModelNotFound("no such model")
        del self.there[name]
        self.drained += [name] * drain

    def deployments(self, *, save: bool) -> list[SimpleNamespace]:
        assert not save
        return self.models()

    def models(self) -> list[SimpleNamespace]:
        told = {"state": self.state, "version": "1", "variant": "fp32"}
        return [SimpleNamespace(name=name, **told) for name in self.there]


def names_of(tmp_path: Path, runtime: Runtime) -> Names:
    scratch = tmp_path / "scratch-1"
    scratch.mkdir(exist_ok=True)
    settings = Settings(folder=str(tmp_path), multi_model=True, scratch=str(scratch))
    return Names(settings, cast("lrai.Runtime", runtime))


@pytest.mark.parametrize(
    "refusal",
    [
        lrai.InvalidTensor("x", "zeros"),
        None,
        lrai.QueueFull("full", limit=1, retry_after_seconds=1),
    ],
)
def test_a_model_that_answers_is_loaded_though_it_refuses_zeros(
    artifact: lrai.Artifact, tmp_path: Path, refusal: lrai.LraiError | None
) -> None:
    names = names_of(tmp_path, runtime := Runtime(refusal))
    names.load("a", "small.lrai")
    assert list(runtime.there) == [f"a:{artifact.version}:1"]
    assert [named.name for named in names.loaded()] == ["a"]


def test_a_model_that_does_not_answer_is_not_loaded(
    artifact: lrai.Artifact, tmp_path: Path
) -> None:
    del artifact
    names = names_of(tmp_path, runtime := Runtime(lrai.ActorError("it died")))
    with pytest.raises(lrai.ActorError):
        names.load("a", "small.lrai")
    assert runtime.there == {}
    assert not names.loaded()
    with pytest.raises(lrai.ModelNotFound, match="'a' is not loaded"):
        names.find("a")


def test_a_name_whose_model_was_unloaded_to_make_room_is_free(
    artifact: lrai.Artifact, tmp_path: Path
) -> None:
    del artifact
    names = names_of(tmp_path, runtime := Runtime())
    names.load("a", "small.lrai")
    runtime.there.clear()
    assert not names.loaded()
    names.load("a", "small.lrai")
    with pytest.raises(AlreadyLoaded):
        names.load("a", "small.lrai")


def test_a_model_that_was_given_up_may_be_loaded_again(
    artifact: lrai.Artifact, tmp_path: Path
) -> None:
    del artifact
    names = names_of(tmp_path, runtime := Runtime())
    names.load("a", "small.lrai")
    runtime.state = "dead"
    assert not names.loaded()
    names.load("a", "small.lrai")
    runtime.state = "ok"
    assert [named.name for named in names.loaded()] == ["a"]


def test_a_model_whose_loading_failed_late_has_a_name(
    artifact: lrai.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime may go on with what nobody waits for any more; it must not stay for ever."""
    del artifact
    names, load = names_of(tmp_path, runtime := Runtime()), runtime.load

    def late(*given: Any, **how: Any) -> None:
        load(*given, **how)
        raise lrai.NotReady("the runtime did not answer")

    monkeypatch.setattr(runtime, "load", late)
    with pytest.raises(lrai.NotReady):
        names.load("a", "small.lrai")
    assert [named.name for named in names.loaded()] == ["a"]
    with pytest.raises(AlreadyLoaded):
        names.load("a", "small.lrai")
    names.unload("a")
    assert runtime.there == {}
    assert not names.loaded()


def test_a_model_that_is_unloaded_to_make_room_before_it_answers_has_too_little(
    artifact: lrai.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del artifact
    names = names_of(tmp_path, runtime := Runtime())

    def evicted(_: object) -> None:
        runtime.there.clear()
        raise lrai.ModelNotFound("no model 'a:1:1' is loaded; loaded: 'of others'")

    monkeypatch.setattr(runtime, "infer", evicted)
    with pytest.raises(lrai.MemoryBudgetExceeded, match="another model took its room"):
        names.load("a", "small.lrai")
    assert not names.loaded()
    with pytest.raises(lrai.ModelNotFound, match="'a' is not loaded"):
        names.find("a")


@pytest.mark.parametrize(
    ("suffix", "place", "status"),
    [(".partial", "/dev/full", 507), (".lock", "gone/lock", 400), (".partial", "gone/name", 400)],
)
def test_what_the_disk_refuses_is_no_bug_and_leaves_nothing(
    artifact: lrai.Artifact,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    suffix: str,
    place: str,
    status: int,
) -> None:
    """At 507 the platform unloads another model, and asks again."""
    del artifact
    names = names_of(tmp_path, runtime := Runtime())
    file = names._file("a", suffix)
    file = file.with_name(file.name[-8:]) if suffix == ".lock" else file
    file.symlink_to(place)
    app = create(names._settings, cast("lrai.Runtime", runtime))

    async def load() -> httpx.Response:
        here = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=here, base_url="http://here") as client:
            return await client.post("/models", json={"model_name": "a", "url": "small.lrai"})

    reply = asyncio.run(load())
    assert (reply.status_code, runtime.there) == (status, {})
    assert reply.json() == {"error": "the model cannot be loaded; the log says why"}
    why = "the disk is full" if status == 507 else "cannot be written: No such file or directory"
    assert f"model 'a': {tmp_path}/scratch-1: {why}" in caplog.messages
    file.unlink(missing_ok=suffix == ".partial")
    assert not list((tmp_path / "scratch-1").glob("*.partial"))
    assert asyncio.run(load()).status_code == 200


def test_what_a_name_has_accepted_is_answered_before_it_is_unloaded(
    artifact: lrai.Artifact, tmp_path: Path
) -> None:
    names = names_of(tmp_path, runtime := Runtime())
    names.load("a", "small.lrai")
    names.unload("a")
    assert runtime.drained == [f"a:{artifact.version}:1"]


def test_names_of_models_that_are_gone_are_no_files_for_ever(
    artifact: lrai.Artifact, tmp_path: Path
) -> None:
    del artifact
    names, scratch = names_of(tmp_path, runtime := Runtime()), tmp_path / "scratch-1"
    for name in "abcd":
        names.load(name, "small.lrai")
    runtime.there = {key: of for key, of in runtime.there.items() if key.startswith("d:")}
    with pytest.raises(lrai.ModelNotFound, match="'a' is not loaded"):
        names.unload("a")
    assert names_in(scratch) == ["b", "c", "d"]
    for name in "bd":  # for c it is too early, and d is in memory
        os.utime(names._file(name, ".name"), (1, 1))
    with names._changing("b"):
        names.load("e", "small.lrai")
    assert names_in(scratch) == ["b", "c", "d", "e"]  # who is at b may be about to load it
    names.load("f", "small.lrai")
    assert names_in(scratch) == ["c", "d", "e", "f"]
    assert {len(file.stem) for file in scratch.glob("*.lock")} == {3}  # 4096 at most


def names_in(scratch: Path) -> list[str]:
    return sorted(json.loads(file.read_text())["name"] for file in scratch.glob("*.name"))


class Ended:
    """Stands for a worker that has ended at once, and has said why."""

    pid, returncode = 1, lrai.ArtifactError.exit_code

    def poll(self) -> int:
        return self.returncode

    def terminate(self) -> None:
        pass

    def wait(self, _: float) -> int:
        return self.returncode


def test_that_there_is_no_room_is_said_once_in_a_while_and_what_else_is_refused_each_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lrai_sagemaker.app._full", counted(3600.0))
    asked = cast("Any", SimpleNamespace(method="POST", url=SimpleNamespace(path="/invocations")))
    full = lrai.QueueFull("4096 rows wait", limit=4096, retry_after_seconds=1.0)
    wrong = lrai.RequestError("no such input")
    with caplog.at_level("INFO"):
        for error in (full, wrong, full, wrong, full):
            assert asyncio.run(_refused(asked, error)).status_code == error.http_status
    lines = ["POST /invocations 429: 4096 rows wait", *["POST /invocations 400: no such input"] * 2]
    assert caplog.messages == lines


class Living(Ended):
    """Stands for a worker that goes on until it is told to end."""

    def poll(self) -> None:  # type: ignore[override]
        return None


def test_a_worker_that_cannot_serve_has_the_last_word_and_no_successor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started = list[Ended]()

    def start() -> Ended:
        started.append(Ended())
        return started[-1]

    monkeypatch.setattr("signal.signal", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        supervisor = Supervisor(Settings(folder="model"), None, listening)
        monkeypatch.setattr(supervisor, "_start", start)
        assert supervisor.run() == lrai.ArtifactError.exit_code
    assert len(started) == 1
    assert not caplog.messages


def supervised(
    monkeypatch: pytest.MonkeyPatch, start: Callable[[], Ended], workers: int = 1
) -> Supervisor:
    """Return a supervisor without a runtime whose workers are what `start` gives, if anything."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: start())
    listening = cast("socket.socket", SimpleNamespace(fileno=lambda: 0, close=lambda: None))
    return Supervisor(Settings(folder="model", workers=workers), None, listening)


def test_a_worker_that_the_machine_has_no_room_for_is_started_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = list[None]()

    def start() -> Ended:
        tried.append(None)
        if len(tried) < 3:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        supervisor._told(signal.SIGTERM, None)
        return Ended()

    supervisor = supervised(monkeypatch, start)
    assert supervisor._start() is None
    assert supervisor._alive(None) is None
    assert len(tried) == 1  # not at each look
    monkeypatch.setattr(supervisor, "_start_at", 0.0)
    monkeypatch.setattr("lrai_sagemaker.commands.supervisor._START_AGAIN_SECONDS", 0.0)
    assert supervisor.run() == 0
    assert caplog.messages == [f"a worker cannot be started: {os.strerror(errno.EAGAIN)}"] * 2


@pytest.mark.parametrize("workers", [1, 4, 64])
@pytest.mark.parametrize("first", ["none", "lives"])
def test_workers_that_can_never_be_started_end_the_container_that_has_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, workers: int, first: str
) -> None:
    clock, started = SimpleNamespace(now=0.0), list[float]()

    def sleep(_: float) -> None:
        clock.now += 1.0
        if clock.now > 1000.0:
            supervisor._told(signal.SIGTERM, None)

    def start() -> Ended:
        started.append(clock.now)
        if first == "lives" and len(started) == 1:
            return Living()
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    told = SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep)
    supervisor = supervised(monkeypatch, start, workers)
    monkeypatch.setattr("lrai_sagemaker.commands.supervisor.time", told)
    if first == "lives":
        assert supervisor.run() == 0
        assert clock.now > 1000.0
        return
    with pytest.raises(lrai.EnvironmentProblem, match=r"^no worker could be started, see above$"):
        supervisor.run()
    assert 50.0 < clock.now < 100.0, "what the machine lacks may come back"
    assert set(caplog.messages) == {f"a worker cannot be started: {os.strerror(errno.ENOMEM)}"}


def test_a_container_has_ended_before_the_platform_kills_it() -> None:
    _, option = get_args(Drain)
    ending = 2 * _GRACE_SECONDS  # workers that do not end, then the runtime
    assert option.max + ending < 30
    with pytest.raises(SystemExit) as refused:
        main(["serve", "--drain-seconds", str(option.max + 1)])
    assert refused.value.code == lrai.UsageError.exit_code


def test_demands_are_read() -> None:
    assert _required("epsilon=0.1, delta=1e-2,tier=STATISTICAL") == {
        "epsilon": 0.1,
        "delta": 0.01,
        "tier": "STATISTICAL",
    }
    assert _required("") is None
    for wrong in ("epsilon", "epsilon=", "epsilon=a", "epsilon=1=2", "epsilon=1,,"):
        with pytest.raises(lrai.UsageError, match=r"require\..* is .*, a number is needed"):
            _required(wrong)


def test_a_line_of_the_log_is_one() -> None:
    assert one_line("a\n  b\x1b[31m\x00c") == "a b?[31m?c"
    assert len(one_line("x" * 10_000)) == 2000


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, {"folder": "/opt/ml/model", "port": 8080, "host": "127.0.0.1", "answer_seconds": 60}),
        ({"SAGEMAKER_MULTI_MODEL": "true"}, {"folder": "/opt/ml/models", "multi_model": True}),
        (
            {"SAGEMAKER_BIND_TO_PORT": "9000", "SAGEMAKER_MODEL_SERVER_WORKERS": "3"},
            {"port": 9000, "workers": 3},
        ),
        (
            {"SAGEMAKER_BATCH": "true", "SAGEMAKER_MAX_PAYLOAD_IN_MB": "20"},
            {"answer_seconds": 3600, "payload_mb": 20, "concurrency": 5},
        ),
        ({"SAGEMAKER_MAX_PAYLOAD_IN_MB": "0"}, {"payload_mb": 0, "concurrency": 1}),
        ({"SAGEMAKER_MAX_PAYLOAD_IN_MB": "500"}, {"payload_mb": 500, "concurrency": 1}),
        ({"SAGEMAKER_MODEL_SERVER_TIMEOUT": "20"}, {"answer_seconds": 20}),
        ({"LRAI_SAGEMAKER_REQUIRE": "epsilon=1"}, {"require": {"epsilon": 1.0}}),
    ],
)
def test_what_the_platform_sets_reaches_the_supervisor(
    variables: dict[str, str], told: dict[str, object]
) -> None:
    program = (
        "import os, sys\n"
        "os.execv = lambda program, command: print(command[-1])\n"
        "from lrai_sagemaker.commands import main\n"
        "main(['serve'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.items() <= json.loads(done.stdout).items()


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("LRAI_SAGEMAKER_REQUIRED", "epsilon=1", "no setting; known: LRAI_SAGEMAKER_DRAIN, "),
        ("LRAI_SAGEMAKER_TIMEOUT", "inf", "less than or equal to"),
    ],
)
def test_a_variable_of_this_host_that_means_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    why: str,
) -> None:
    monkeypatch.setattr("os.execv", lambda *_: pytest.fail("it serves"))
    monkeypatch.setenv(name, value)
    with pytest.raises((SystemExit, lrai.UsageError)) as refused:
        main(["serve"])
    assert why in " ".join(capsys.readouterr().err.replace("\u2502", "").split()) + str(
        refused.value
    )


def test_what_is_empty_or_what_kubernetes_says_of_a_service_is_no_variable_of_this_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = list[str]()
    monkeypatch.setattr("os.execv", lambda _, command: told.append(command[-1]))
    monkeypatch.setenv("LRAI_SAGEMAKER_TIMEOUTS", "")
    monkeypatch.setenv("LRAI_SAGEMAKER_PORT_8080_TCP", "tcp://10.0.0.1:8080")
    with pytest.raises(SystemExit):
        main(["serve"])
    assert json.loads(*told)["answer_seconds"] == 60


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("lrai_sagemaker.worker", ["typer", "rich", "onnx", "onnxruntime", "boto3", "botocore"]),
        (
            "lrai_sagemaker.commands.supervisor",
            ["typer", "rich", "onnx", "onnxruntime", "boto3", "uvicorn", "starlette"],
        ),
        ("lrai_sagemaker", ["starlette", "uvicorn", "typer"]),
    ],
)
def test_what_serves_imports_nothing_heavy(module: str, without: list[str]) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    assert not set(done.stdout.split()) & set(without)


class Serving:
    """A runtime that serves what it is told to."""

    def __init__(self, config: lrai.LraiConfig) -> None:
        self.config, self.names = config, list[str]()

    def deployments(self, *, save: bool) -> list[Any]:
        assert not save
        return [SimpleNamespace(name=name) for name in self.names]

    def unload(self, name: str) -> None:
        self.names.remove(name)


def test_what_a_container_was_loading_when_it_was_killed_is_let_go_of_when_it_is_there(
    tmp_path: Path,
) -> None:
    (tmp_path / "runtime").mkdir(0o700)
    config = lrai.load_config(call={"runtime.address": str(tmp_path / "runtime")})
    runtime: Any = Serving(config)
    scratch = tmp_path / "lrai-sagemaker-mine"
    claim = claims.claim(runtime, "lrai-sagemaker-gone")
    assert claim is not None
    (file,) = tmp_path.rglob("*.models")
    file.with_name("lrai-sagemaker-a.models").mkdir()  # what is none keeps nobody from the others
    file.with_name("lrai-sagemaker-z.models").mkdir()
    runtime.names = ["m:gone", "m:mine"]
    claims.sweep(runtime, scratch)
    assert runtime.names == ["m:gone", "m:mine"], "it lives"
    claim.close()
    for name in ("m:gone", "late:gone"):
        runtime.names.append(name)
        claims.sweep(runtime, scratch)
        assert runtime.names == ["m:mine"]
        assert file.is_file()
    os.utime(file, (0, 0))
    claims.sweep(runtime, scratch)
    assert not file.exists()
