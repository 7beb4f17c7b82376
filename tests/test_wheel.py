"""The wheel that travels inside models: what it holds, and that it builds itself."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

from lrai_wheel import build_wheel
from lrai_wheel.pins import pins

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def test_the_wheel_holds_code_and_nothing_else(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        assert re.fullmatch(rf"lrai-{version('lrai')}\+g[0-9a-f]{{12}}\.dist-info", info)
        assert wheel.name == f"{info.removesuffix('.dist-info')}-py3-none-any.whl"
        packages = {name.partition("/")[0] for name in names} - {info}
        shipped = tomllib.loads(PYPROJECT.read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
        assert packages == {Path(package).name for package in shipped["packages"]}
        code = [name for name in names if not name.startswith(info)]
        assert all(name.endswith((".py", "py.typed")) for name in code)
        assert {"lrai_core/actor/actor.py", "lrai_core/py.typed"} <= set(code)
        assert {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD")} <= set(names)
        stated = info.removesuffix(".dist-info").removeprefix("lrai-")
        assert f"\nVersion: {stated}\n".encode() in archive.read(f"{info}/METADATA")
        assert b"Requires-Dist: onnxruntime" in archive.read(f"{info}/METADATA")
        assert b"lrai_core.cli:main" in archive.read(f"{info}/entry_points.txt")


def test_the_same_code_gives_the_same_wheel(tmp_path: Path) -> None:
    first, second = build_wheel(tmp_path / "a"), build_wheel(tmp_path / "b")
    assert first.name == second.name
    assert hashlib.sha256(first.read_bytes()).digest() == (
        hashlib.sha256(second.read_bytes()).digest()
    )


def test_an_installed_wheel_builds_itself_and_other_code_gets_another_name(tmp_path: Path) -> None:
    wheel, target = build_wheel(tmp_path), tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(target), str(wheel)], check=True)
    program = (
        "import lrai_wheel as w, hashlib, pathlib, sys;"
        "assert w.__file__.startswith(sys.argv[1]), w.__file__;"
        "built = w.build_wheel(pathlib.Path(sys.argv[1], 'wheels'));"
        "sys.stdout.write(f'{built.name} {hashlib.sha256(built.read_bytes()).hexdigest()}')"
    )

    def build_there() -> str:
        return subprocess.run(
            [sys.executable, "-c", program, str(target)],
            env={**os.environ, "PYTHONPATH": str(target)},
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    assert build_there() == f"{wheel.name} {hashlib.sha256(wheel.read_bytes()).hexdigest()}"
    with (target / "lrai_core" / "errors.py").open("a") as module:
        module.write("# changed\n")
    assert build_there().split()[0] != wheel.name
    assert not list((target / "wheels").glob("*.part"))


def test_pins_are_the_versions_of_what_an_extra_brings_here() -> None:
    base, more = set(pins("")), set(pins("bentoml"))
    assert f"numpy=={version('numpy')}" in base
    assert f"starlette=={version('starlette')}" in more - base  # brought by bentoml itself
    assert base < more
    assert not any(pin.startswith("lrai==") for pin in more)
