"""`lrai triton install` and `doctor`: the backend in its place, and what stands in its way."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Annotated, Any, Final

import typer

import lrai_core as lrai
from lrai_core.artifact import disk_errors
from lrai_core.runtime.embedded import find_backend
from lrai_core.verifier.check import require_certificate
from lrai_core.verifier.verifier import environment
from lrai_import.built import artifact_of, state_folder
from lrai_triton.commands.app import BACKENDS, app, out
from lrai_triton.commands.pbtxt import backend_of, config_of
from lrai_triton.commands.repository import CONFIG, check_configs, left_out, text_of, versions_of
from lrai_triton.config import complete
from lrai_triton.served import source_of
from lrai_triton.settings import settings_of

_MODEL: Final = '''"""LRAI as a backend of Triton; put here by `lrai triton install`."""

from lrai_triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_ASK = "import sys; print(sys.version[:4]); import lrai_triton, numpy; print(numpy.__version__)"
_LIBRARY: Final = Path("python", "libtriton_python.so")
_STUB: Final = Path("python", "triton_python_backend_stub")

Backends = Annotated[Path, typer.Option(help="As tritonserver has it; it holds python/.")]
Python = Annotated[str, typer.Option(help="What will be python3 on the PATH of the server.")]
Folder = Annotated[Path | None, typer.Option(help="Triton's folder of backends, with lrai/ in it.")]
Entries = Annotated[Path | None, typer.Option(exists=True, help="Folder of models to look at.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is not lrai's.")]


@app.command()
def install(backend_directory: Backends, python: Python = "", *, force: Force = False) -> None:
    """Put the backend, the two lines of lrai/model.py, into Triton's backend directory.

    It runs in the stub of Triton's own python backend, which takes its packages from the first
    python3 on the PATH of the server. That Python is checked first, and has to have lrai.
    """
    _check_backend(backend_directory)
    path = _check_python(backend_directory, python)
    model = backend_directory / "lrai" / "model.py"
    if text_of(model) not in ("", _MODEL) and not force:
        raise lrai.UsageError(f"{model} is not lrai's; --force replaces it")
    with disk_errors(model):
        model.parent.mkdir(exist_ok=True)
        model.write_text(_MODEL)
    out.print(f"{model} is in place, for a tritonserver with PATH={path.parent}:$PATH")


@app.command()
def doctor(
    backend_directory: Folder = None, model_repository: Entries = None, python: Python = ""
) -> None:
    """Say what is wrong with an installation and with the models of a repository.

    Run it as the user, and with the PATH, that the server has. Exit code 3: something is wrong.
    """
    config = settings_of({}).asked.config  # as the stub of a model without parameters has it
    checks: list[tuple[Any, ...]] = [(_check_memory,), (state_folder, config), (_attach, config)]
    if folder := backend_directory or (Path(BACKENDS) if Path(BACKENDS).is_dir() else None):
        checks += [(_check_backend, folder), (_check_file, folder), (_check_python, folder, python)]
    # What `add` writes, until it is whole: Triton takes it for a model, and may not start for it.
    cut = sorted(model_repository.rglob(f".*.{'[0-9a-f]' * 8}")) if model_repository else []
    entries = sorted({*model_repository.glob("*")} - {*cut}) if model_repository else []
    checks += [(_check_version, e / str(v)) for e in entries for v in versions_of(e) or [1]]
    checks += [(_demand, 0, f"{one} was left half made: delete it, if no add runs") for one in cut]
    wrong = 0
    for check, *arguments in checks:
        try:
            check(*arguments)
        except (lrai.LraiError, OSError) as problem:
            wrong += 1
            where = f"{arguments[0]}: " if check is _check_version else ""
            out.print(f"- {where}{problem}")
    given = {"backend-directory": folder, "model-repository": model_repository}
    left = "".join(f"; not looked at: --{what}" for what, path in given.items() if path is None)
    if wrong:
        raise lrai.ConditionNotMet(f"{wrong} problem(s), as said above{left}")
    out.print(f"nothing is wrong{left}")


def _demand(holds: object, problem: str) -> None:
    if not holds:
        raise lrai.EnvironmentProblem(problem)


def _check_backend(backends: Path) -> None:
    """Refuse a folder without Triton's own python backend, whose stub runs ours."""
    found = ", ".join(sorted(path.name for path in backends.glob("*"))) or "nothing"
    without = f"{backends} has no {_LIBRARY}, which runs shared backends; it has {found}"
    _demand((backends / _LIBRARY).is_file(), without)
    without = f"{backends} has no {_STUB}; link the one of your Python from python_backend_stubs"
    _demand(shutil.which(backends / _STUB), without)
    done = subprocess.run([backends / _STUB], capture_output=True, text=True, check=False)
    _demand(done.returncode != 127, f"the stub cannot start: {done.stderr.strip()[:500]}")


def _check_file(backends: Path) -> None:
    ours = text_of(model := backends / "lrai" / "model.py") == _MODEL
    _demand(ours, f"{model} is not lrai's: lrai triton install puts it there")


def _check_python(backends: Path, python: str) -> Path:
    """Return the interpreter whose packages the stub takes, once it has what that needs."""
    path = Path(shutil.which(python or "python3") or "").absolute()
    _demand(path.is_file(), f"there is no {python or 'python3'} on PATH to take packages from")
    # As the stub does: from no folder of ours, and without PYTHONPATH.
    command = [str(path), "-E", "-c", _ASK]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    version, numpy, *_ = [*done.stdout.split(), "", ""]
    stub = (backends / _STUB).read_bytes() if (backends / _STUB).is_file() else b""
    wanted = stub.partition(b"libpython")[2][:4].decode(errors="replace") or version
    other = f"the stub is of Python {wanted}, but {path}, whose packages it takes, is of {version};"
    _demand(version in ("", wanted), f"{other} name another by --python, or link another stub")
    # By this name pybind11 looks for numpy 2, ever since it knows it; before, values are wrong.
    less = "" if b"NumpyVersion" in stub else " 'numpy<2'"
    why = done.stderr.strip().rpartition("\n")[2][:200]
    lacks = f"{path}, whose packages the stub takes, cannot import lrai_triton: {why};"
    mended = f"{path} -m pip install"
    _demand(done.returncode == 0, f"{lacks} {mended} '.[triton]'{less} in lrai's checkout")
    newer = f"numpy {numpy} is newer than the stub, which gives wrong values with it;"
    _demand(not less or numpy.startswith("1."), f"{newer} {mended}{less}")
    return path


def _check_memory() -> None:
    size = shutil.disk_usage("/dev/shm").total >> 20  # noqa: S108 - where Triton puts tensors
    _demand(size >= 64, f"shared memory has {size} MiB, 64 are needed; docker has --shm-size")


def _attach(config: lrai.LraiConfig) -> None:
    """Attach to the shared runtime, where one runs already."""
    if (where := config.runtime.address) != "embedded" and find_backend("ipc").runs(config, where):
        lrai.Runtime(config).close()


def _check_version(folder: Path) -> None:
    """Refuse a version of ours that Triton could not load, or that is not served as compiled."""
    # Whatever it was: Triton then lists nothing of the repository, nor starts with all models.
    _demand(folder.parent.exists(), f"{folder.parent} is a link to nothing: Triton may not start")
    text = text_of(folder.parent / CONFIG)
    if backend_of(text) != "lrai":
        return
    check_configs(folder.parent)
    config, number = config_of(text), int(folder.name)
    _demand(config["backend"], "platform is 'lrai', which Triton refuses: it is a backend")
    other = f"name is {config['name']!r}: Triton serves no model whose folder is called otherwise"
    _demand(config["name"] in ("", folder.parent.name), other)
    gpus = any(one["kind"] == "KIND_GPU" or one["gpus"] for one in config["instance_group"])
    none = "instance_group names GPUs, of which this machine shows none: Triton does not load it"
    _demand(not gpus or any(Path("/dev").glob("nvidia[0-9]*")), none)
    newest = number >= max(versions_of(folder.parent), default=0)
    if newest and (why := left_out(folder.parent, number)):
        # Triton loads no model without a version.
        _demand(not all(left_out(folder.parent, v) for v in versions_of(folder.parent)), why)
        out.print(f"{folder}: {why}")
    full = {one.key.rpartition(".")[2]: one.key for one in lrai.explain_config()}
    for key in config.get("parameters", {}):
        _demand(key not in full, f"parameter {key!r} is not read, {full.get(key)} would be")
    settings, source = settings_of(config), source_of(folder, config["default_model_filename"])
    compiled = source.name == "model.lrai"
    if not compiled and not newest:
        return  # it would have to be built
    found = lrai.Artifact.open(source) if compiled else artifact_of(source, settings.asked.config)
    complete(config, found.manifest.signature)
    chosen = found.manifest.variant(settings.asked.variant or found.manifest.chosen)
    if compiled:
        made, here = found.manifest.made_for(chosen), environment(chosen)
        words = "the next best or fp32 serves, unless lrai requalify has found better"
        _demand(made == here, f"it was compiled for {made}, this is {here}: {words}")
    if settings.asked.require:
        require_certificate(found, chosen.id, settings.asked.require)
