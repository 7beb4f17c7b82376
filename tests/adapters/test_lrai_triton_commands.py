"""Backends installed, repositories changed and changed back, every planted fault found."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from hypothesis import given, settings
from hypothesis import strategies as st

import lrai_core as lrai
from benchmarks.models import classifier
from lrai_core import artifact as store
from lrai_report.target import find
from lrai_shared.keys import private_folder
from lrai_triton.commands import main, pbtxt, watch
from lrai_triton.served import source_of
from tests.core import small_artifact
from tests.own_runtime import own_runtime
from tests.shared.test_client import Daemon
from tests.tiny_models import token_model

Run = Callable[..., str]
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
ONNX = 'name: "m"\nbackend: "onnxruntime"  # as it came\n'


@pytest.fixture(autouse=True)
def own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the first python3 be the one that runs the tests, and state in a folder of its own."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LRAI_RUNTIME_SOCKET_DIR", str(tmp_path))


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs `lrai triton`, demands an exit code, and returns what it said."""
    monkeypatch.setenv("COLUMNS", "400")  # a message is one line, however long a path in it is

    def run(*arguments: str | Path, code: int = 0) -> str:
        capfd.readouterr()
        with pytest.raises((SystemExit, lrai.LraiError)) as caught:
            main([str(argument) for argument in arguments])
        end = caught.value
        said = "".join(capfd.readouterr())
        if isinstance(end, lrai.LraiError):
            got, said = end.exit_code, f"{said}{end}"
        else:
            assert isinstance(end, SystemExit)
            got = int(end.code or 0)
        assert got == code, f"{got}: {said}"
        return said

    return run


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a classifier and a file of rows that it is judged on."""
    folder = tmp_path_factory.mktemp("classifier")
    # Wide enough for int8 to be faster on any processor.
    model, held_out = classifier(folder / "classifier.onnx", seed=0, hidden=1024)
    np.savez(folder / "rows.npz", features=held_out["features"], label=held_out["label"])
    return model, folder / "rows.npz"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a repository with one model, as onnxruntime serves it."""
    version = tmp_path / "models" / "m" / "1"
    version.mkdir(parents=True)
    token_model(version / "model.onnx")
    (version.parent / "config.pbtxt").write_text(ONNX)
    return tmp_path / "models"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return small_artifact.build(tmp_path / "small.lrai")


@pytest.fixture
def backends(tmp_path: Path) -> Path:
    """Return a backend directory like Triton's, as far as it is looked at."""
    python = tmp_path / "backends" / "python"
    python.mkdir(parents=True)
    (python / "libtriton_python.so").write_bytes(b"\x7fELF")
    stub(python.parent)
    return python.parent


def stub(
    backends: Path, version: str = VERSION, *, numpy: str = "NumpyVersion", end: str = "exit 1"
) -> None:
    script = f"#!/bin/sh\n# libpython{version}.so.1.0 {numpy}\n{end}\n"
    program(backends / "python" / "triton_python_backend_stub", script)


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- install


def test_the_backend_is_installed_once_and_stays_the_same(backends: Path, run: Run) -> None:
    said = run("install", "--backend-directory", backends)
    model = backends / "lrai" / "model.py"
    assert str(model) in said
    assert f"PATH={Path(sys.executable).parent}:$PATH" in said
    before = model.read_text()
    assert "from lrai_triton.model import TritonPythonModel" in before
    run("install", "--backend-directory", backends)
    assert model.read_text() == before


def test_a_file_of_somebody_else_is_replaced_by_force_only(backends: Path, run: Run) -> None:
    model = program(backends / "lrai" / "model.py", "class TritonPythonModel: pass\n")
    assert "--force" in run("install", "--backend-directory", backends, code=2)
    assert "pass" in model.read_text()
    run("install", "--backend-directory", backends, "--force")
    assert "lrai_triton" in model.read_text()


def test_a_folder_that_is_no_backend_directory_is_refused_by_what_it_has(
    tmp_path: Path, run: Run
) -> None:
    (tmp_path / "wrong" / "onnxruntime").mkdir(parents=True)
    said = run("install", "--backend-directory", tmp_path / "wrong", code=5)
    assert "has no python/libtriton_python.so" in said
    assert "it has onnxruntime" in said
    assert "nothing" in run("install", "--backend-directory", tmp_path / "absent", code=5)


def test_the_first_python3_on_the_path_is_the_one_that_counts(
    backends: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    lacks = f"#!/bin/sh\necho {VERSION}\necho \"No module named 'lrai_triton'\" >&2; exit 1\n"
    other = program(tmp_path / "other" / "python3", lacks)
    monkeypatch.setenv("PATH", f"{other.parent}{os.pathsep}{os.environ['PATH']}")
    said = run("install", "--backend-directory", backends, code=5)
    assert "No module named 'lrai_triton'" in said
    assert f"{other} -m pip install '.[triton]' in lrai's checkout" in said
    assert not (backends / "lrai").exists()
    run("install", "--backend-directory", backends, "--python", sys.executable)


def test_a_python_without_lrai_is_refused_for_real(
    backends: Path, tmp_path: Path, run: Run
) -> None:
    script = f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n'
    bare = program(tmp_path / "bare" / "python3", script)
    said = run("install", "--backend-directory", backends, "--python", bare, code=5)
    assert "cannot import lrai_triton: ModuleNotFoundError" in said


def test_a_python_that_is_not_there_is_named(backends: Path, run: Run) -> None:
    said = run("install", "--backend-directory", backends, "--python", "python3.0", code=5)
    assert "there is no python3.0 on PATH" in said


def test_numpy_that_the_stub_reads_wrongly_is_refused(
    backends: Path, tmp_path: Path, run: Run
) -> None:
    python = program(tmp_path / "new" / "python3", f"#!/bin/sh\necho {VERSION}\necho 2.4.6\n")
    run("install", "--backend-directory", backends, "--python", python)
    shutil.rmtree(backends / "lrai")
    stub(backends, numpy="")
    said = run("install", "--backend-directory", backends, "--python", python, code=5)
    assert f"{python} -m pip install 'numpy<2'" in said
    assert not (backends / "lrai").exists()


# --- doctor


def test_nothing_is_wrong_with_what_lrai_made(
    backends: Path, repository: Path, artifact: Path, run: Run
) -> None:
    run("install", "--backend-directory", backends)
    run("add", artifact, "--model-repository", repository, "--name", "small")
    (repository / "README").write_text("no model")
    where = ("--backend-directory", backends, "--model-repository", repository)
    assert "nothing is wrong" in run("doctor", *where)
    assert "nothing is wrong" in run("doctor")


def config(text: str) -> Callable[[Path], Any]:
    return lambda entry: (entry / "config.pbtxt").write_text(f'backend: "lrai"\n{text}')


def target(entry: Path) -> None:
    other = {"isa": "z80", "engine": "onnxruntime", "engine_version": "0.1", "threads": 1}
    small_artifact.rewrite(entry / "1" / "model.lrai", {"target": other})


def in_artifact(name: str, replacement: bytes) -> Callable[[Path], Any]:
    return lambda entry: (entry / "1" / "model.lrai" / name).write_bytes(replacement)


MODEL_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no version": (lambda entry: shutil.rmtree(entry / "1"), "holds neither model.onnx nor"),
    "neither": (lambda entry: shutil.rmtree(entry / "1" / "model.lrai"), "holds neither"),
    "both": (lambda entry: token_model(entry / "1" / "model.onnx"), "holds both"),
    "target": (
        target,
        "compiled for z80 with onnxruntime 0.1, this is .*: the next best or fp32 serves, unless",
    ),
    "changed": (in_artifact("source/weights.bin", bytes(256)), "weights.bin has changed since"),
    "truncated": (in_artifact("manifest.json", b"{"), "manifest.json cannot be read"),
    "datatype": (
        config('max_batch_size: 8 input [ { name: "x" data_type: TYPE_INT8 dims: [ 3 ] } ]'),
        "input 'x': data_type is TYPE_INT8, not TYPE_FP32",
    ),
    "dims": (
        config('max_batch_size: 8\ninput { name: "x" data_type: TYPE_FP32 dims: 4 }'),
        r"input 'x': dims are \[4\], the model has \[3\]",
    ),
    "twice": (
        config('max_batch_size: 8 input [ { name: "x" dims: 3 }, { name: "x" dims: 3 } ]'),
        "input: one of them stands twice in the configuration",
    ),
    "output": (
        config('max_batch_size: 8 output [ { name: "z", data_type: TYPE_FP32, dims: [ 3 ] } ]'),
        "output 'z' is none of the model's",
    ),
    "parameter": (
        config('parameters { key: "scheduler.speed" value { string_value: "9" } }'),
        "unknown setting 'scheduler.speed'",
    ),
    "bare setting": (
        config('parameters { key: "latency_slo_ms" value { string_value: "9" } }'),
        "parameter 'latency_slo_ms' is not read, scheduler.latency_slo_ms would be",
    ),
    "string": (
        config("parameters {\n key: 'x"),
        "a string or a brace in config.pbtxt does not end",
    ),
    "brace": (
        config("parameters {\n key: 'x'"),
        "a string or a brace in config.pbtxt does not end",
    ),
    "certificate": (
        config('parameters { key: "require.delta" value { string_value: "0.01" } }'),
        "variant int8 has no certificate that meets the requirement .delta=0.01.",
    ),
    "number": (config("max_batch_size: many"), "config.pbtxt is not as tritonclient reads it: 2:"),
    "field": (config("max_batchsize: 8"), 'no field named "max_batchsize"'),
    "name": (config('name: "large"'), "name is 'large': Triton serves no model whose folder is"),
    "no version of its policy": (
        config("version_policy { specific { versions: [5] } }"),
        "version_policy in .* leaves version 1 out: name it there",
    ),
    "platform": (
        lambda entry: (entry / "config.pbtxt").write_text('platform: "lrai"\n'),
        "platform is 'lrai', which Triton refuses",
    ),
    "passive": (
        config("instance_group { kind: KIND_CPU passive: true }"),
        "instance_group: all are passive, and a request would crash Triton itself",
    ),
    "kind": (config("input: 3"), "config.pbtxt is not as tritonclient reads it: 2:"),
}


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_the_doctor_finds_what_is_wrong_with_a_model(
    fault: str, repository: Path, artifact: Path, run: Run
) -> None:
    plant, words = MODEL_FAULTS[fault]
    run("add", artifact, "--model-repository", repository, "--name", "small")
    plant(repository / "small")
    said = run("doctor", "--model-repository", repository, code=3)
    assert re.search(words, said), said
    assert said.startswith(f"- {repository / 'small' / '1'}: ")
    assert "1 problem(s)" in said


@pytest.mark.parametrize("group", ["kind: KIND_GPU", "gpus: [0]"])
def test_the_doctor_finds_instances_on_gpus_where_there_are_none(
    repository: Path, artifact: Path, run: Run, monkeypatch: pytest.MonkeyPatch, group: str
) -> None:
    run("add", artifact, "--model-repository", repository, "--name", "small")
    config(f"instance_group [ {{ kind: KIND_CPU }}, {{ {group} }} ]")(repository / "small")
    glob, devices = Path.glob, list[Path]()

    def as_here(folder: Path, pattern: str) -> Any:
        return devices if folder == Path("/dev") else glob(folder, pattern)

    monkeypatch.setattr(Path, "glob", as_here)
    said = run("doctor", "--model-repository", repository, code=3)
    assert f"{repository / 'small' / '1'}: instance_group names GPUs, of which this machine" in said
    devices.append(Path("/dev/nvidia3"))
    assert "nothing is wrong" in run("doctor", "--model-repository", repository)


def test_the_doctor_looks_at_models_that_are_served_as_they_are(repository: Path, run: Run) -> None:
    entry = repository / "m"
    text = 'backend: "lrai"\ninput { name: "nope" data_type: TYPE_FP64 dims: [77] }\n'
    (entry / "config.pbtxt").write_text(text)
    said = run("doctor", "--model-repository", repository, code=3)
    assert "input 'nope' is none of the model's" in said
    (entry / "config.pbtxt").write_text('backend: "lrai"\n')
    assert "nothing is wrong" in run("doctor", "--model-repository", repository)
    (entry / "1" / "model.onnx").write_text("no model")
    assert "model.onnx cannot be used" in run("doctor", "--model-repository", repository, code=3)


def test_the_doctor_names_what_a_command_that_was_killed_has_left(
    repository: Path, artifact: Path, run: Run, tmp_path: Path
) -> None:
    code = """
import os, sys
from lrai_core import artifact
artifact.sync = lambda _: os._exit(9)  # as if it was killed once all is written
from lrai_triton.commands import main
main(sys.argv[1:])
"""
    named = ("--model-repository", str(repository), "--name")
    for more in (("new",), ("m", "--version", "7", "--switch")):
        command = [sys.executable, "-P", "-c", code, "add", str(artifact), *named, *more]
        assert subprocess.run(command, check=False).returncode == 9
    left = [*repository.glob(".new.*"), *(repository / "m").glob(".7.*")]
    (left[0] / "config.pbtxt").write_text('backend: "lrai"\n')  # as if it was killed later
    shutil.rmtree(left[0] / "1")  # and somebody had begun to delete it
    said = run("doctor", "--model-repository", repository, code=3)
    assert len(left) == 2
    assert "2 problem(s)" in said
    for path in left:
        assert f"- {path} was left half made: delete it, if no add runs" in said
        shutil.rmtree(path)
    assert "nothing is wrong" in run("doctor", "--model-repository", repository)


def test_the_doctor_finds_an_entry_that_leads_nowhere(repository: Path, run: Run) -> None:
    (repository / "README").write_text("no model")
    (repository / "other").symlink_to(repository / "m")
    assert "nothing is wrong" in run("doctor", "--model-repository", repository)
    (repository / "gone").symlink_to(repository / "moved")
    said = run("doctor", "--model-repository", repository, code=3)
    assert f"{repository / 'gone'} is a link to nothing: Triton may not start" in said
    assert "1 problem(s)" in said


def test_a_configuration_that_is_not_utf_8_is_read_as_triton_does(
    repository: Path, run: Run
) -> None:
    said = b"# \xe9\nbackend: 'lrai'\nparameters { key: 'note' value { string_value: '\xe9' } }\n"
    (repository / "m" / "config.pbtxt").write_bytes(said)
    assert "nothing is wrong" in run("doctor", "--model-repository", repository)


def test_a_configuration_that_cannot_be_read_is_named(
    repository: Path, artifact: Path, run: Run
) -> None:
    entry = repository / "m"
    (entry / "config.pbtxt").unlink()
    (entry / "config.pbtxt").mkdir()
    where = ("--model-repository", repository)
    add = ("add", artifact, *where, "--name", "m", "--version", "2")
    for command in (add, ("compile", entry), ("remove", entry)):
        assert f"Is a directory: '{entry / 'config.pbtxt'}'" in run(*command, code=5)
    assert "config.pbtxt" in run("doctor", *where, code=3)


HOST_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "library": (lambda b: (b / "python" / "libtriton_python.so").unlink(), "it has lrai, python"),
    "no stub": (
        lambda b: (b / "python" / "triton_python_backend_stub").unlink(),
        "has no python/triton_python_backend_stub; link the one",
    ),
    "libpython": (
        lambda b: stub(b, end="echo 'loading shared libraries: libpython3.so.1' >&2; exit 127"),
        "the stub cannot start: loading shared libraries: libpython3.so.1",
    ),
    "version": (lambda b: stub(b, "3.10"), f"the stub is of Python 3.10, but .* of {VERSION}"),
    "file": (lambda b: shutil.rmtree(b / "lrai"), "model.py is not lrai's"),
}


@pytest.mark.parametrize("fault", HOST_FAULTS)
def test_the_doctor_finds_what_is_wrong_with_an_installation(
    fault: str, backends: Path, run: Run
) -> None:
    plant, words = HOST_FAULTS[fault]
    run("install", "--backend-directory", backends)
    plant(backends)
    said = run("doctor", "--backend-directory", backends, code=3)
    assert re.search(words, said), said


def test_the_doctor_finds_numpy_that_the_stub_reads_wrongly(
    backends: Path, tmp_path: Path, run: Run
) -> None:
    run("install", "--backend-directory", backends)
    python = program(tmp_path / "new" / "python3", f"#!/bin/sh\necho {VERSION}\necho 2.4.6\n")
    stub(backends, numpy="")
    said = run("doctor", "--backend-directory", backends, "--python", python, code=3)
    assert "numpy 2.4.6 is newer than the stub" in said


def test_the_doctor_finds_too_little_shared_memory(
    monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=32 << 20))
    assert "shared memory has 32 MiB, 64 are needed" in run("doctor", code=3)


def test_the_doctor_finds_a_folder_of_sockets_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LRAI_RUNTIME_SOCKET_DIR", str(tmp_path / "file"))
    assert "no folder for state" in run("doctor", code=3)


def test_the_doctor_says_what_it_has_not_looked_at(
    backends: Path, repository: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "nothing is wrong; not looked at: --backend-directory; not looked at: --model-repository"
    )
    assert words in run("doctor")
    monkeypatch.setattr("lrai_triton.commands.install.BACKENDS", str(backends))
    said = run("doctor", "--model-repository", repository, code=3)
    assert "not looked at" not in said
    assert "model.py is not lrai's" in said, "that is where Triton's images have it"


def test_the_doctor_finds_a_runtime_that_no_stub_could_attach_to(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = private_folder(tmp_path / f"lrai-{os.geteuid()}")
    assert "nothing is wrong" in run("doctor")
    daemon = Daemon(folder)
    daemon.version = 99
    thread = threading.Thread(target=daemon.welcome)
    thread.start()
    try:
        assert "it speaks protocol 99 of lrai" in run("doctor", code=3)
    finally:
        thread.join()
        daemon.close()


# --- add


def test_an_artifact_becomes_an_entry(repository: Path, artifact: Path, run: Run) -> None:
    said = run("add", artifact, "--model-repository", repository, "--name", "small")
    assert "curl -X POST localhost:8000/v2/repository/models/small/load" in said
    assert "lrai-key: $TRITON_REPOSITORY_KEY" in said
    assert lrai.Artifact.open(repository / "small" / "1" / "model.lrai").manifest.name == "small"
    text = (repository / "small" / "config.pbtxt").read_text()
    assert 'name: "small"\nbackend: "lrai"\n' in text


def test_an_onnx_file_becomes_an_entry_with_settings(
    repository: Path, tmp_path: Path, run: Run
) -> None:
    model = token_model(tmp_path / "t.onnx")
    where = ("--model-repository", repository, "--name", "tokens", "--version", "7")
    given = {"scheduler.latency_slo_ms": "50", "variant": "fp32", "intra_op_thread_count": "2"}
    settings = [word for pair in given.items() for word in ("--setting", "=".join(pair))]
    run("add", model, *where, *settings)
    assert (repository / "tokens" / "7" / "model.onnx").read_bytes() == model.read_bytes()
    found = pbtxt.config_of((repository / "tokens" / "config.pbtxt").read_text())
    assert found["parameters"] == {key: {"string_value": text} for key, text in given.items()}
    assert found["backend"] == "lrai"


def test_version_0_is_one_that_can_be_added(repository: Path, artifact: Path, run: Run) -> None:
    where = ("--model-repository", repository, "--name", "m", "--switch")
    assert "version 0 is there" in run("add", artifact, *where, "--version", "0")
    assert (repository / "m" / "0" / "model.lrai").is_dir()


BAD_ADDS = {
    "entry exists": ("--name m", "--version, without"),
    "version exists": ("--name m --version 1 --switch", "1 exists"),
    "settings of an entry": ("--name m --version 2 --setting variant=a", "--setting"),
    "served by another": ("--name m --version 2", "onnxruntime serves"),
    "leaves the repository": ("--name ../x", "no name for a model"),
    "name": ("--name _m", "beginning with a letter or digit"),
    "version that would end Triton": (f"--name n --version {2**63}", "9223372036854775807"),
    "version of more digits than a name": (f"--name n --version {'9' * 300}", "--version"),
    "no pair": ("--name n --setting variant", "SECTION.NAME=VALUE, variant=... or execution=..."),
    "no section": ("--name n --setting latency_slo_ms=50", "SECTION.NAME=VALUE, variant=..."),
    "ends the string": ('--name n --setting variant="}#', "SECTION.NAME=VALUE"),
    "unknown setting": ("--name n --setting scheduler.speed=9", "unknown setting"),
    "wrong value": ("--name n --setting runtime.memory_mib=many", "type int"),
}


@pytest.mark.parametrize("case", BAD_ADDS)
def test_what_cannot_be_added_leaves_nothing(
    case: str, repository: Path, artifact: Path, run: Run
) -> None:
    arguments, words = BAD_ADDS[case]
    before = content(repository)
    said = run("add", artifact, "--model-repository", repository, *arguments.split(), code=2)
    assert words in said
    assert content(repository) == before
    assert not list(repository.glob("**/.*"))


def test_a_damaged_artifact_is_not_added(repository: Path, artifact: Path, run: Run) -> None:
    (artifact / "source" / "weights.bin").write_bytes(bytes(256))
    where = ("--model-repository", repository, "--name", "small")
    assert "has changed since" in run("add", artifact, *where, code=4)
    assert [path.name for path in repository.iterdir()] == ["m"]


def test_what_is_no_onnx_model_is_not_added(repository: Path, tmp_path: Path, run: Run) -> None:
    (other := tmp_path / "weights.pt").write_bytes(b"PK\x03\x04 of another kind")
    said = run("add", other, "--model-repository", repository, "--name", "small", code=4)
    assert re.search("weights.pt cannot be added: .*not an ONNX model.*lrai compile", said), said
    assert [path.name for path in repository.iterdir()] == ["m"]


def test_an_onnx_file_is_not_added_without_its_weights(
    repository: Path, tmp_path: Path, run: Run
) -> None:
    model = onnx.load(repository / "m" / "1" / "model.onnx")
    apart: dict[str, Any] = {"location": "weights.bin", "size_threshold": 0}
    onnx.save(model, tmp_path / "apart.onnx", save_as_external_data=True, **apart)
    where = ("--model-repository", repository, "--name", "m", "--version", "2", "--switch")
    before = content(repository)
    said = run("add", tmp_path / "apart.onnx", *where, code=4)
    assert re.search("apart.onnx cannot be added: .*weights.bin.*lrai compile", said), said
    assert content(repository) == before


def test_what_is_not_there_is_named(repository: Path, tmp_path: Path, run: Run) -> None:
    where = ("--model-repository", repository, "--name", "small")
    assert "does not exist" in run("add", tmp_path / "absent.onnx", *where, code=2)
    assert not (repository / "small").exists()
    nowhere = ("--model-repository", tmp_path / "nowhere", "--name", "small")
    assert "does not exist" in run("add", token_model(tmp_path / "t.onnx"), *nowhere, code=2)


# --- switching one line, compile, and back


@pytest.mark.timeout(180)  # with the training and compiling of `judged`
def test_compile_adds_a_version_that_answers_as_the_model_does(
    repository: Path, judged: tuple[Path, Path], run: Run
) -> None:
    model, evaluation = judged
    entry = repository / "m"
    shutil.copy(model, entry / "1" / "model.onnx")
    options = ("--evaluation", evaluation, "--output-map", "softmax", "--threads", "1")
    said = run("compile", entry, "--switch", *options)
    assert "chosen" in said
    assert re.search(r"[\d.]+ x fp32", said)
    assert "version 2 is there" in said
    artifact = lrai.Artifact.open(entry / "2" / "model.lrai")
    assert artifact.manifest.name == "m"
    assert artifact.manifest.chosen != "fp32"
    assert not (entry / "2" / "model.onnx").exists()
    x = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    (wanted,) = onnxruntime.InferenceSession(model).run(None, {"features": x})
    with lrai.Runtime.open(artifact, address="embedded") as runtime:
        answer = runtime.infer(lrai.InferenceRequest(model_name="m", inputs={"features": x}))
    assert answer.parameters["variant"] == artifact.manifest.chosen
    (got,) = answer.outputs.values()
    # It was judged by its softmax on rows of a class each, and these are noise: near, not equal.
    assert np.linalg.norm(got - wanted) <= 0.2 * np.linalg.norm(wanted)


def test_an_interrupted_compilation_leaves_nothing_behind(
    repository: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler is told to end once, and has the time to put away what it has."""
    left = tmp_path / "left"
    stand_in = f"""
import os, pathlib, signal, time
assert os.getpgrp() == os.getpid(), "Ctrl-C in a terminal would come to both"
signal.signal(signal.SIGTERM, signal.default_int_handler)
left = pathlib.Path({str(left)!r})
left.mkdir()
try:
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
finally:
    time.sleep(1)
    left.rmdir()
    pathlib.Path({str(tmp_path / "ended")!r}).touch()
"""
    monkeypatch.setattr("lrai_triton.commands.repository.PROGRAM", (sys.executable, "-c", stand_in))
    before = content(repository)
    run("compile", repository / "m", "--switch", code=130)
    assert (tmp_path / "ended").exists()
    assert not left.exists()
    assert content(repository) == before


def test_a_version_that_somebody_adds_while_it_is_compiled_takes_no_others_place(
    repository: Path, artifact: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two compilations of one entry at once, whose end takes long to come."""
    entry = repository / "m"
    stand_in = f"""
import shutil, sys
shutil.copytree({str(entry / "1")!r}, {str(entry / "2")!r})
shutil.copytree({str(artifact)!r}, sys.argv[-1])
"""
    monkeypatch.setattr("lrai_triton.commands.repository.PROGRAM", (sys.executable, "-c", stand_in))
    assert "version 3 is there" in run("compile", entry, "--switch")
    lrai.Artifact.open(entry / "3" / "model.lrai")
    assert content(entry / "2") == content(entry / "1")


def test_options_before_the_entry_are_told_where_they_belong(repository: Path, run: Run) -> None:
    said = run("compile", "--threads", "1", "--switch", repository / "m", code=2)
    assert "--threads is no folder of a model, which comes before all options" in said


def test_a_failing_gate_leaves_the_repository_as_it_was(
    repository: Path, judged: tuple[Path, Path], run: Run
) -> None:
    model, evaluation = judged
    entry = repository / "m"
    shutil.copy(model, entry / "1" / "model.onnx")
    before = content(repository)
    options = ("--evaluation", evaluation, "--epsilon", "1e-9", "--threads", "1")
    assert "passed the gate" in run("compile", entry, "--switch", *options, code=3)
    assert content(repository) == before


def test_switching_there_and_back_leaves_every_byte(repository: Path, run: Run) -> None:
    entry = repository / "m"
    text = b'# \xff not UTF-8\r\nname: "m"\r\n  platform :"onnxruntime_onnx" , # a line\r\n'
    (entry / "config.pbtxt").write_bytes(text)
    (entry / "config.pbtxt").chmod(0o640)
    before = content(entry)
    assert "--switch" in run("compile", entry, "--threads", "1", code=2)
    assert content(entry) == before
    run("compile", entry, "--switch", "--threads", "1")
    assert (entry / "config.pbtxt.lrai-original").read_bytes() == text
    changed = text.replace(b'platform :"onnxruntime_onnx"', b'backend: "lrai"')
    assert (entry / "config.pbtxt").read_bytes() == changed
    said = run("remove", entry)
    assert "is what it was before" in said
    aside = re.search(r"version 2 was moved to (\S+)", said)
    assert aside is not None
    assert Path(aside[1], "model.lrai", "manifest.json").is_file()
    assert (entry / "config.pbtxt").stat().st_mode & 0o777 == 0o640
    shutil.rmtree(aside[1])
    assert content(entry) == before


@pytest.mark.parametrize("config", [True, False])
def test_a_disk_that_is_found_full_in_the_end_leaves_the_entry_as_it_was(
    repository: Path, artifact: Path, run: Run, monkeypatch: pytest.MonkeyPatch, *, config: bool
) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if not config:
        (repository / "m" / "config.pbtxt").unlink(missing_ok=True)
    before = content(repository)
    where = ("--model-repository", repository, "--name", "m", "--version", "2", "--switch")
    with monkeypatch.context() as patched:
        patched.setattr("lrai_core.artifact.sync", full)
        assert "the disk is full" in run("add", artifact, *where, code=5)
    assert content(repository) == before


def test_a_configuration_is_on_the_disk_before_it_takes_the_place_of_what_was_there(
    repository: Path, artifact: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, synced, fsync = repository / "m" / "config.pbtxt", list[tuple[bytes, bytes]](), os.fsync

    def seen(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name == ".config.pbtxt":
            synced.append((path.read_bytes(), config.read_bytes()))
        fsync(descriptor)

    config.write_text(ONNX)
    monkeypatch.setattr(os, "fsync", seen)
    where = ("--model-repository", repository, "--name", "m", "--version", "2", "--switch")
    run("add", artifact, *where)
    assert synced == [(config.read_bytes(), ONNX.encode())]


@pytest.mark.parametrize("name", ["m", "fresh"])
def test_who_is_second_leaves_the_entry_to_who_was_first(
    repository: Path, artifact: Path, run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    where = ("--model-repository", repository, "--name", name, "--version", "2", "--switch")
    synced, first = store.sync, dict[str, bytes]()

    def meanwhile(path: Path) -> None:
        if not first:
            first["begun"] = b""
            run("add", artifact, *where)
            there = content(repository / name).items()
            first.update((file, data) for file, data in there if not file.startswith("."))
        synced(path)

    monkeypatch.setattr("lrai_core.artifact.sync", meanwhile)
    assert "appeared while this was being written" in run("add", artifact, *where, code=2)
    del first["begun"]
    assert content(repository / name) == first


def test_a_copy_that_fails_undoes_nothing_of_what_others_did_meanwhile(
    repository: Path, artifact: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ("--model-repository", repository, "--name", "m", "--switch", "--version")
    copy, found = shutil.copytree, dict[str, bytes]()

    def meanwhile(*_: Any) -> None:
        monkeypatch.setattr(shutil, "copytree", copy)
        run("add", artifact, *where, "2")
        there = content(repository / "m").items()
        found.update((file, data) for file, data in there if not file.startswith("."))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", meanwhile)
    run("add", artifact, *where, "3", code=5)
    assert content(repository / "m") == found
    assert b'backend: "lrai"' in found["config.pbtxt"]


def test_a_version_that_is_a_link_is_moved_aside_as_one(
    repository: Path, artifact: Path, run: Run, tmp_path: Path
) -> None:
    where = ("--model-repository", repository, "--name", "m", "--version", "2", "--switch")
    before = content(repository)
    run("add", artifact, *where)
    shutil.move(repository / "m" / "2", tmp_path / "v2")
    (repository / "m" / "2").symlink_to(tmp_path / "v2")
    run("remove", repository / "m")
    (aside,) = (repository / "m").glob("lrai-2-*")
    assert aside.readlink() == tmp_path / "v2"
    aside.unlink()
    assert content(repository) == before


def test_a_config_that_cannot_be_changed_back_keeps_the_versions_in_place(
    repository: Path, artifact: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: Path) -> str:
        raise PermissionError(errno.EROFS, "Read-only file system")

    where = ("--model-repository", repository, "--name", "m", "--version", "2", "--switch")
    run("add", artifact, *where)
    before = content(repository)
    monkeypatch.setattr("lrai_triton.commands.repository._switch_back", refused)
    assert "Read-only file system" in run("remove", repository / "m", code=5)
    assert content(repository) == before


@pytest.mark.parametrize("backend", ["onnxruntime", "lrai"])
def test_what_tune_says_of_a_repository_switches_on_and_goes_back(
    repository: Path, artifact: Path, run: Run, backend: str
) -> None:
    entry = repository / "m"
    config = entry / "config.pbtxt"
    config.write_text(before := ONNX.replace("onnxruntime", backend))
    with own_runtime():
        found = find(str(entry), None, "auto")
    on, back = map(shlex.split, found.commands(artifact))
    assert (on[:2], "--switch" in on) == (["lrai", "triton"], backend == "onnxruntime")
    run(*on[2:])
    assert (entry / "2" / "model.lrai").is_dir()
    assert pbtxt.backend_of(config.read_text()) == "lrai"
    if backend == "lrai":
        subprocess.run(back, check=True)
    else:
        assert back[:2] == ["lrai", "triton"]
        run(*back[2:])
    assert (config.read_text(), (entry / "2").exists()) == (before, False)


def test_what_was_moved_aside_can_be_added_again(repository: Path, run: Run) -> None:
    entry = repository / "m"
    run("compile", entry, "--switch", "--threads", "1")
    run("remove", entry)
    (aside,) = entry.glob("lrai-2-*")
    assert not aside.name[0].isdigit()  # Triton would take it for a version
    where = ("--model-repository", repository, "--name", "m", "--version", "2", "--switch")
    run("add", aside / "model.lrai", *where)
    assert (entry / "2" / "model.lrai" / "manifest.json").is_file()


def test_after_a_hand_edit_only_the_backend_is_changed_back(repository: Path, run: Run) -> None:
    config = repository / "m" / "config.pbtxt"
    run("compile", config.parent, "--switch", "--threads", "1")
    edited = config.read_text() + "max_batch_size: 4  # by hand\n"
    config.write_text(edited)
    assert "was edited" in run("remove", config.parent)
    assert config.read_text() == edited.replace('"lrai"', '"onnxruntime"')
    assert not (config.parent / "config.pbtxt.lrai-original").exists()


def test_a_line_that_was_switched_by_hand_is_switched_back(repository: Path, run: Run) -> None:
    config = repository / "m" / "config.pbtxt"
    config.write_text(ONNX.replace("onnxruntime", "lrai"))
    run("compile", config.parent, "--threads", "1")
    assert not (config.parent / "config.pbtxt.lrai-original").exists()
    run("remove", config.parent)
    assert config.read_text() == ONNX


def test_an_entry_without_a_config_has_none_again(repository: Path, run: Run) -> None:
    entry = repository / "m"
    (entry / "config.pbtxt").unlink()
    assert "onnxruntime serves" in run("compile", entry, "--threads", "1", code=2)
    run("compile", entry, "--switch", "--threads", "1")
    assert 'backend: "lrai"' in (entry / "config.pbtxt").read_text()
    assert "config.pbtxt.lrai now" in run("remove", entry)
    assert not (entry / "config.pbtxt").exists()


def test_what_lrai_wrote_is_renamed_over_nothing_that_is_there(repository: Path, run: Run) -> None:
    entry = repository / "m"
    (entry / "config.pbtxt").unlink()
    for n, name in enumerate(("config.pbtxt.lrai", "config.pbtxt.lrai-2")):
        run("compile", entry, "--switch", "--threads", "1")
        text = (entry / "config.pbtxt").read_text() + f"max_batch_size: {n + 1}  # by hand\n"
        (entry / "config.pbtxt").write_text(text)
        assert f"{name} now" in run("remove", entry)
        assert (entry / name).read_text() == text
    assert "max_batch_size: 1 " in (entry / "config.pbtxt.lrai").read_text()


def test_a_configuration_that_lies_elsewhere_stays_there(
    repository: Path, tmp_path: Path, run: Run
) -> None:
    config = repository / "m" / "config.pbtxt"
    real = config.rename(tmp_path / "kept.pbtxt")
    real.chmod(0o600)
    config.symlink_to(real)
    run("compile", config.parent, "--switch", "--threads", "1")
    assert config.is_symlink()
    assert 'backend: "lrai"' in real.read_text()
    assert real.stat().st_mode & 0o777 == 0o600
    run("remove", config.parent)
    assert config.is_symlink()
    assert real.read_text() == ONNX


def test_a_configuration_keeps_whose_it_is(repository: Path, artifact: Path, run: Run) -> None:
    config = repository / "m" / "config.pbtxt"
    owner = (12345, 23456) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(config, *owner)
    config.chmod(0o640)
    where = ("--model-repository", repository, "--name", "m", "--version", "2", "--switch")
    changes = {"lrai": ("add", artifact, *where), "onnxruntime": ("remove", config.parent)}
    for backend, arguments in changes.items():
        run(*arguments)
        assert f'backend: "{backend}"' in config.read_text()
        there = config.stat()
        assert ((there.st_uid, there.st_gid), there.st_mode & 0o777) == (owner, 0o640)


def test_who_may_not_give_a_configuration_away_keeps_it(
    repository: Path, artifact: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[tuple[int, int]]()

    def refused(_: Path, user: int, group: int) -> None:
        asked.append((user, group))
        raise PermissionError(errno.EPERM, "Operation not permitted")

    config = repository / "m" / "config.pbtxt"
    monkeypatch.setattr(os, "chown", refused)
    where = ("--model-repository", repository, "--name", "m", "--version", "2", "--switch")
    run("add", artifact, *where)
    assert asked == [(-1, config.stat().st_gid), (config.stat().st_uid, -1)]
    assert 'backend: "lrai"' in config.read_text()


def test_who_changed_the_backend_back_by_hand_can_begin_anew(repository: Path, run: Run) -> None:
    entry = repository / "m"
    run("compile", entry, "--switch", "--threads", "1")
    shutil.rmtree(entry / "2")
    (entry / "config.pbtxt").write_text(ONNX)
    assert "lrai triton remove" in run("compile", entry, "--switch", "--threads", "1", code=2)
    run("remove", entry)
    assert (entry / "config.pbtxt").read_text() == ONNX
    assert "version 2 is there" in run("compile", entry, "--switch", "--threads", "1")


def test_a_model_of_several_files_lies_in_a_folder_of_its_name(repository: Path, run: Run) -> None:
    entry = repository / "m"
    model = (entry / "1" / "model.onnx").rename(entry / "aside")
    (entry / "1" / "model.onnx").mkdir()
    model.rename(entry / "1" / "model.onnx" / "model.onnx")
    assert source_of(entry / "1", "").is_file()
    assert "version 2 is there" in run("compile", entry, "--switch", "--threads", "1")
    assert "nothing is wrong" in run("doctor", "--model-repository", repository)


def test_what_onnxruntime_could_not_serve_is_not_given_back(
    repository: Path, artifact: Path, run: Run
) -> None:
    run("add", artifact, "--model-repository", repository, "--name", "small")
    before = content(repository)
    assert "delete the folder" in run("remove", repository / "small", code=2)
    assert "does not exist" in run("remove", repository / "absent", code=2)
    assert content(repository) == before


def test_an_entry_that_lrai_never_had_is_left_alone(repository: Path, run: Run) -> None:
    before = content(repository)
    assert "nothing of lrai's" in run("remove", repository / "m", code=2)
    assert content(repository) == before


def test_the_newest_model_is_compiled_into_the_next_version(repository: Path, run: Run) -> None:
    entry = repository / "m"
    shutil.copytree(entry / "1", entry / "3")
    for ignored in ("lrai-9-x", "010", "latest", ".11"):
        (entry / ignored).mkdir()
    assert "version 4 is there" in run("compile", entry, "--switch", "--threads", "1")
    (entry / "3" / "model.onnx").unlink()
    (entry / "1" / "model.onnx").unlink()
    assert "no version" in run("compile", entry, code=2)


def test_the_file_that_a_configuration_names_is_the_one_that_is_compiled_and_added(
    repository: Path, run: Run
) -> None:
    """As onnxruntime serves it: what lies beside it under the usual name is another model."""
    entry = repository / "m"
    (entry / "1" / "model.onnx").rename(entry / "1" / "net.onnx")
    (entry / "1" / "model.onnx").write_bytes(b"another")
    (entry / "config.pbtxt").write_text(f'{ONNX}\ndefault_model_filename: "net.onnx"\n')
    run("compile", entry, "--switch", "--threads", "1")
    where = ("--model-repository", repository, "--name", "m", "--version")
    run("add", entry / "1" / "net.onnx", *where, "3")
    assert [path.name for path in (entry / "3").iterdir()] == ["net.onnx"]
    assert "nothing is wrong" in run("doctor", "--model-repository", repository)
    (entry / "1" / "net.onnx").unlink()
    (entry / "3" / "net.onnx").unlink()
    assert "holds a net.onnx to compile" in run("compile", entry, code=2)


@pytest.mark.parametrize("name", ["../../../kept", "sub/net.onnx", "..", "."])
def test_a_file_that_is_named_by_a_path_is_neither_read_nor_written(
    repository: Path, run: Run, name: str
) -> None:
    entry, kept = repository / "m", repository.parent / "kept"
    kept.write_text("what somebody has there")
    (entry / "config.pbtxt").write_text(f'backend: "lrai"\ndefault_model_filename: "{name}"\n')
    where = ("--model-repository", repository, "--name", "m", "--version", "3")
    told = f"default_model_filename is '{name}'"
    assert told in run("add", entry / "1" / "model.onnx", *where, code=2)
    assert told in run("compile", entry, code=2)
    assert kept.read_text() == "what somebody has there"
    assert sorted(path.name for path in entry.iterdir()) == ["1", "config.pbtxt"]


def test_a_backend_that_is_not_onnxruntime_is_not_taken_over(repository: Path, run: Run) -> None:
    config = repository / "m" / "config.pbtxt"
    config.write_text('backend: "tensorrt"')
    assert "tensorrt serves" in run("compile", config.parent, "--switch", code=2)
    config.write_text('backend: "open')
    assert "does not end" in run("compile", config.parent, "--switch", code=4)


def test_an_entry_that_is_called_by_two_dots_has_its_own_name(
    repository: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "m" / "config.pbtxt").unlink()
    monkeypatch.chdir(repository / "m" / "1")
    assert "/v2/repository/models/m/load" in run("compile", "..", "--switch")
    assert 'name: "m"' in (repository / "m" / "config.pbtxt").read_text()
    assert lrai.Artifact.open(repository / "m" / "2" / "model.lrai").manifest.name == "m"


def test_nothing_is_compiled_for_an_entry_that_cannot_be_written(
    repository: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, access = repository / "m", os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("it was compiled"))
    assert f"{entry}: cannot be written" in run("compile", entry, "--switch", code=5)


def test_an_original_that_is_there_is_never_overwritten(repository: Path, run: Run) -> None:
    entry = repository / "m"
    (entry / "config.pbtxt.lrai-original").write_text("of old")
    assert "lrai triton remove" in run("compile", entry, "--switch", "--threads", "1", code=2)
    assert (entry / "config.pbtxt.lrai-original").read_text() == "of old"


POLICY = "version_policy { specific { versions: [1, 7] } }\n"


def test_a_version_that_the_policy_leaves_out_is_said_to_be_so(
    repository: Path, artifact: Path, run: Run
) -> None:
    (repository / "m" / "config.pbtxt").write_text(ONNX + POLICY)
    where = ("--model-repository", repository, "--name", "m", "--switch", "--version")
    said = run("add", artifact, *where, "2")
    words = f"version_policy in {repository / 'm' / 'config.pbtxt'} leaves version 2 out: name it"
    assert words in said
    assert "serves the highest" not in said
    said = run("doctor", "--model-repository", repository)
    assert f"{repository / 'm' / '2'}: {words}" in said
    assert "nothing is wrong" in said, "somebody may want it so"
    assert "version_policy" not in run("add", artifact, *where, "7")
    assert "version_policy" not in run("doctor", "--model-repository", repository)


def test_what_is_served_by_another_configuration_is_not_switched(
    repository: Path, artifact: Path, run: Run
) -> None:
    """Triton's --model-config-name has it read another file."""
    (others := repository / "m" / "configs").mkdir()
    for name in ("large", "small"):
        (others / f"{name}.pbtxt").write_text(ONNX)
    before = content(repository)
    words = 'm/configs, of which --model-config-name takes one, has no backend: "lrai"'
    where = ("--model-repository", repository, "--name", "m", "--version", "2", "--switch")
    assert words in run("compile", repository / "m", "--switch", "--threads", "1", code=2)
    assert words in run("add", artifact, *where, code=2)
    assert content(repository) == before
    (repository / "m" / "config.pbtxt").write_text('backend: "lrai"\n')
    assert words in run("doctor", "--model-repository", repository, code=3)
    (others / "small.pbtxt").write_text('backend: "lrai"\n')
    assert "nothing is wrong" in run("doctor", "--model-repository", repository)


# --- the text of a configuration


def message_type() -> Any:
    """Return a message like a model configuration, as far as its text is generated below."""
    file = descriptor_pb2.FileDescriptorProto(name="like_triton.proto", syntax="proto3")
    made = file.message_type.add(name="Config")
    for number, name in enumerate(("name", "platform", "backend"), 1):
        made.field.add(name=name, number=number, type=9, label=1)  # an optional string
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Config"))


Message = message_type()
COMMENTS = [' # backend: "no"\n', "#'\n", '# "{[<\n']
STRINGS = ['"m"', "'m'", r'"backend: \"no\""', "'backend: \"no\" {'", '"# no"', r'"\\"', '"é }"']
blanks = st.sampled_from(["", " ", "\n", "\t", "\r\n", *COMMENTS])
strings = st.sampled_from([*STRINGS, "''"])
numbers = st.sampled_from(["1", "-1", "TYPE_FP32", "true", "1.5e3"])
ends = st.sampled_from(["\n", " ", ",", ";", " # end\n"])


@st.composite
def nested(draw: st.DrawFn) -> str:
    """Return a field that is a message, with fields in it that are named like ours."""
    names = st.sampled_from(["backend", "platform", "key", "dims"])
    values = strings | numbers | st.builds("[{}, {}]".format, numbers, numbers)
    inner = st.builds("{}{}:{}{}{}".format, names, blanks, blanks, values, ends)
    body = draw(st.lists(inner | nested(), max_size=3))
    opener, closer = draw(st.sampled_from([("{", "}"), ("<", ">")]))
    name = draw(st.sampled_from(["input", "parameters", "backend_config", "x"]))
    colon = draw(st.sampled_from(["", ":", " : "]))
    between = [draw(blanks) for _ in range(3)]
    return f"{name}{colon}{between[0]}{opener}{between[1]}{' '.join(body)}{between[2]}{closer}\n"


others = st.builds(
    "{}{}:{}{}{}".format,
    st.sampled_from(["default_model_filename", "my_backend", "backend2", "max_batch_size"]),
    blanks,
    blanks,
    strings | numbers,
    ends,
)
texts = st.lists(others | nested() | blanks, max_size=5).map(" ".join)


@given(texts, st.sampled_from(["backend", "platform"]), blanks, ends, texts)
@settings(max_examples=150, deadline=None)
def test_everything_but_the_one_field_stays(
    before: str, name: str, blank: str, end: str, after: str
) -> None:
    before += "\n"  # which ends a comment
    text = before + f'{name}{blank}:{blank}"onnxruntime"' + end + after
    text_format.Parse(text, Message(), allow_unknown_field=True)  # it is in the form at all
    switched = pbtxt.switched(text)
    assert switched == before + 'backend: "lrai"' + end + after
    assert text_format.Parse(switched, Message(), allow_unknown_field=True).backend == "lrai"
    assert pbtxt.backend_of(switched) == "lrai"
    assert pbtxt.switched_back(switched, text) == text
    assert pbtxt.backend_of(text) == "onnxruntime"


@given(texts)
@settings(deadline=None)
def test_without_a_backend_a_line_is_added(text: str) -> None:
    parsed = text_format.Parse(text, Message(), allow_unknown_field=True)
    assert (pbtxt.backend_of(text), parsed.backend) == ("", "")
    switched = pbtxt.switched(text)
    assert switched.startswith(text)
    assert text_format.Parse(switched, Message(), allow_unknown_field=True).backend == "lrai"


def test_of_backend_and_platform_only_the_backend_is_left() -> None:
    text = 'platform: "onnxruntime_onnx", backend: "onnxruntime"\ninput { name: "x" }'
    switched = pbtxt.switched(text)
    assert switched == 'platform: "", backend: "lrai"\ninput { name: "x" }'
    assert pbtxt.switched_back(switched, text) == text


@given(st.text(alphabet="backend:\"' \n{}[]<>#\\,;x", max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        switched = pbtxt.switched(text)
    except lrai.ArtifactError:
        return
    assert pbtxt.backend_of(switched) == "lrai"


@pytest.mark.parametrize(
    ("answers", "silent_seconds", "usual_seconds", "dead"),
    [(1, 0.0, 0, False), (0, 0.0, 0, True), (0, 30.0, 0, False), (0, 0.0, 60, False)],
)
def test_who_answers_others_while_a_probe_waits_is_slow_and_not_dead(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answers: int,
    silent_seconds: float,
    usual_seconds: int,
    dead: bool,
) -> None:
    answered = itertools.count(step=answers) if answers else itertools.repeat(0)

    def ask(url: str, path: str, *rest: Any) -> tuple[int, Any]:
        if path.endswith("/infer"):
            raise TimeoutError
        success = {"count": next(answered), "ns": usual_seconds * 10**9}
        counts = {"success": success, "fail": {"count": 0}}
        stats = [{"version": "1", "inference_stats": counts}]
        return 200, {"model_stats": stats} if path.endswith("/stats") else {"inputs": []}

    monkeypatch.setattr(watch, "_ask", ask)
    monkeypatch.setattr(watch._Model, "start", lambda model: None)
    model = watch._Model("http://nowhere", "m", 1.0, silent_seconds, tmp_path)
    found = [model._dead("1", model._count()["1"], [1]) for _ in range(2)][-1]
    assert ("it has given no answer for" in found) is dead
