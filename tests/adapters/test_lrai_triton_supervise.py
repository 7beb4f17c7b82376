"""The probe that `lrai triton watch` sends, and what `serve` reads from the server's arguments."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

import lrai_core as lrai
from lrai_triton.commands import supervise
from tests.own_runtime import daemon_pids, own_runtime


def tensor(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}


def test_a_probe_is_zeros_of_the_smallest_shape() -> None:
    inputs = [tensor("ids", "INT64", [-1, -1]), tensor("image", "FP16", [-1, 3, 2])]
    body, headers = supervise._zeros(inputs)
    text = int(headers["Inference-Header-Content-Length"])
    sent = json.loads(body[:text])["inputs"]
    assert [given["shape"] for given in sent] == [[1, 1], [1, 3, 2]]
    assert [given["parameters"]["binary_data_size"] for given in sent] == [8, 12]
    assert body[text:] == bytes(20)


@pytest.mark.parametrize(
    ("datatype", "size"), [("BOOL", 1), ("UINT8", 1), ("BF16", 2), ("FP64", 8), ("BYTES", 4)]
)
def test_a_zero_has_the_size_of_its_datatype(datatype: str, size: int) -> None:
    body, headers = supervise._zeros([tensor("x", datatype, [3])])
    assert len(body) - int(headers["Inference-Header-Content-Length"]) == 3 * size


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--http-port=81"], "81"),
        (["--http-port", "81"], "81"),
        (["--http-port=80", "--http-port", "81"], "81"),
        (["--http-port-of-another=81"], "80"),
        (["--id=--http-port=81"], "80"),
        ([], "80"),
    ],
)
def test_options_of_the_server_are_read_in_both_forms(arguments: list[str], value: str) -> None:
    assert supervise._given(arguments, "http-port", "80") == value


def started(folder: Path, *arguments: str, watched: bool = True, status: int = 7) -> list[str]:
    """Return what `serve` starts a server with; that is one which ends at once, with `status`."""
    backend = folder / "backends" / "lrai"
    backend.mkdir(parents=True, exist_ok=True)
    (backend / "model.py").touch()
    program = folder / "bin" / "tritonserver"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/given\nexit {status}\n')
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    with own_runtime(PATH=path) as sockets:
        given = [f"--backend-directory={backend.parent}", *arguments]
        with pytest.raises(typer.Exit) as ended:
            supervise.serve(given, watched=watched)
        assert ended.value.exit_code == status
        assert daemon_pids(sockets) == [], "the runtime that it started ends with it"
    return (folder / "given").read_text().splitlines()[1:]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_REPOSITORY_KEY", "k")  # else it stays behind


@pytest.mark.timeout(180)
def test_all_models_are_loaded_where_none_is_named(tmp_path: Path) -> None:
    assert started(tmp_path)[:2] == ["--model-control-mode=explicit", "--load-model=*"]
    kept = signal.getsignal(signal.SIGTERM)
    assert getattr(kept, "__name__", "") != "forward", "the process is as it was"


@pytest.mark.timeout(180)
def test_where_some_are_named_these_are_loaded(tmp_path: Path) -> None:
    given = started(tmp_path, "--load-model=m")
    assert given[:2] == ["--load-model=m", "--model-control-mode=explicit"]
    assert "--load-model=*" not in given


@pytest.mark.timeout(180)
def test_loading_is_restricted_whatever_the_repository_is_called(tmp_path: Path) -> None:
    given = started(tmp_path, "--model-repository=/srv/non-restricted-models")
    assert "--http-restricted-api=model-repository:lrai-key=k" in given
    assert "--grpc-restricted-protocol=model-repository:lrai-key=k" in given


def test_a_stub_of_a_repository_in_a_cloud_is_known_by_its_instance(tmp_path: Path) -> None:
    model = tmp_path / "folderAb" / "1" / "model.py"
    model.parent.mkdir(parents=True)
    model.touch()
    argv = ["/python_backend_stub", str(model), "region", "1", "2", "3", "b", "m_0_1", "r", "-f"]
    program, quiet = shutil.which("tail"), subprocess.DEVNULL  # which waits
    with subprocess.Popen(argv, executable=program, stdout=quiet, stderr=quiet) as stub:
        try:
            assert supervise._stubs("m") == {"1": [stub.pid]}
            assert supervise._stubs("m_0") == {}
        finally:
            stub.kill()


@pytest.mark.timeout(180)
def test_a_server_that_the_watch_could_not_ask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lrai.UsageError, match="--no-watch"):
        started(tmp_path, "--allow-http=false")
    assert started(tmp_path, "--allow-http=false", watched=False) == ["--allow-http=false"]
