"""What stands in the way of a Triton server, said before anything is installed or started."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

import lrai_core as lrai
from benchmarks import triton_server
from benchmarks.processes import free_ports


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a checkout of nothing but what the environment is made of."""
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "pyproject.toml").write_text("")
    (root / "constraints.txt").write_text("numpy==2.4.6\nonnx==1.23.2\nml_dtypes==0.6.0\n")
    return root


def programs(folder: Path, **scripts: str) -> str:
    """Write programs; return the PATH on which there are no others."""
    folder.mkdir()
    for name, script in scripts.items():
        program = folder / name.replace("_", ".")
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o700)
    return str(folder)


def test_without_python_3_11_a_sentence_says_so_and_nothing_is_made(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    # As the shim of a version manager that has not got it.
    monkeypatch.setenv("PATH", programs(tmp_path / "bin", python3_11="exit 127"))
    assert triton_server.find_python() is None
    with pytest.raises(lrai.EnvironmentProblem, match=r"needs Python 3\.11 here"):
        triton_server.prepare(root)
    assert not (root / ".triton").exists()


def test_an_install_that_fails_is_said_and_done_again_next_time(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        'case "$*" in *version_info*) echo 3.11 ;; '
        '*venv*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;; '
        "*) echo no such wheel >&2; exit 1 ;; esac"
    )
    tools = {name: f'exec {shutil.which(name)} "$@"' for name in ("mkdir", "cp")}
    python = Path(programs(tmp_path / "bin", python=script, **tools), "python")
    monkeypatch.setattr(sys, "executable", str(python))
    for _ in range(2):
        with pytest.raises(lrai.EnvironmentProblem, match="no such wheel"):
            triton_server.prepare(root)
    assert (root / ".triton" / "constraints.txt").read_text() == "onnx==1.23.2"


def test_without_its_libpython_a_sentence_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = (
        "echo '	libpython3.11.so.1.0 => not found'; echo '	libm.so.6 => /lib/libm.so.6 (0x0)'"
    )
    monkeypatch.setenv("PATH", programs(tmp_path / "bin", ldd=missing))
    (tmp_path / "pyvenv.cfg").write_text(f"home = {tmp_path}/bin\n")
    with pytest.raises(lrai.EnvironmentProblem, match=r"apt-get install libpython3\.11") as caught:
        triton_server._check_library(tmp_path)
    assert "libpython3.11.so.1.0" in str(caught.value)


def test_a_python_that_has_its_own_libpython_lends_it_to_the_stub(tmp_path: Path) -> None:
    for folder in ("bin", "lib"):
        (tmp_path / "python" / folder).mkdir(parents=True)
    (tmp_path / "pyvenv.cfg").write_text(f"home = {tmp_path}/python/bin\n")
    assert "LD_LIBRARY_PATH" not in triton_server.variables(tmp_path)
    (tmp_path / "python" / "lib" / "libpython3.11.so.1.0").touch()
    found = triton_server.variables(tmp_path)["LD_LIBRARY_PATH"]
    assert found.split(":")[0] == f"{tmp_path}/python/lib"


def test_ports_are_free_and_differ() -> None:
    assert len(set(free_ports(20))) == 20
