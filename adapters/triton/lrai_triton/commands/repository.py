"""`lrai triton add`, `compile` and `remove`: entries of a model repository, and one line of theirs.

Triton takes every folder of an entry whose name begins with a number for a version, so what is
being written, or was moved aside, is named otherwise.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Final

import typer

from lrai_core import Artifact, ArtifactError, CompileError, EnvironmentProblem, UsageError
from lrai_core.artifact import disk_errors, sync, writing
from lrai_triton.commands.app import END_SECONDS, PROGRAM, app, out
from lrai_triton.commands.pbtxt import LRAI, backend_of, config_of, said_in, switched, switched_back
from lrai_triton.served import onnx_of
from lrai_triton.settings import settings_of

CONFIG: Final = "config.pbtxt"
_ORIGINAL: Final = "config.pbtxt.lrai-original"
_WRITTEN: Final = "# Written by `lrai triton`; what is not here comes from the model.\n"
_SETTING: Final = re.compile(r"(\w+\.\w+|variant|execution|intra_op_thread_count)=([^\"\\\n]*)")
_FORM: Final = "SECTION.NAME=VALUE, variant=... or execution=..."

Repository = Annotated[Path, typer.Option(exists=True, help="Folder that tritonserver serves.")]
Settings = Annotated[list[str], typer.Option(help=f"{_FORM}, see `lrai config`; repeat for more.")]
# A larger one ends Triton.
Version = Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Needed if it has any.")]
Entry = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a model.")]
Compiled = Annotated[Path, typer.Argument(help="Folder of a model; all options come behind it.")]
Switch = Annotated[bool, typer.Option("--switch", help="Take the entry over from onnxruntime.")]


@app.command()
def add(
    model: Annotated[Path, typer.Argument(exists=True, help="Artifact, NAME.lrai, or ONNX.")],
    model_repository: Repository,
    name: Annotated[str, typer.Option(help="Name of the model.")],
    version: Version = None,
    setting: Settings = [],  # noqa: B006 - typer's form of a list; it is not changed
    *,
    switch: Switch = False,
) -> None:
    """Add MODEL to a repository, as a new entry or as one more version of an entry.

    A new entry gets a config.pbtxt of a few lines; Triton learns the rest from the model. An ONNX
    file is read first. Weights beside one are not copied: compile it, and add the artifact.
    """
    entry, settings = model_repository / name, dict[str, str]()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        allowed = "letters, digits and . _ - are, beginning with a letter or digit"
        raise UsageError(f"{name[:80]!r} is no name for a model: {allowed}")
    for text in setting:
        if not (pair := _SETTING.fullmatch(text)):
            raise UsageError(f"--setting is {text[:80]!r}, {_FORM} is needed, see `lrai config`")
        settings[pair[1]] = pair[2]
    settings_of({"parameters": {key: {"string_value": settings[key]} for key in settings}})
    if entry.is_dir() and (settings or version is None):
        raise UsageError(f"{entry} exists; --version, without --setting, adds to it")
    if entry.is_dir():
        _check_backend(entry, switch=switch)
    _publish(entry, 1 if version is None else version, model, _new_config(name, settings))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def compile(context: typer.Context, entry: Compiled, *, switch: Switch = False) -> None:
    """Compile an entry's newest model.onnx, and add the artifact as its next version.

    Every option of `lrai compile` can be given behind ENTRY: --evaluation FILE, --calibration,
    --metric, --output-map, --epsilon, --delta, --threads, --keep and so on.

    Exit status 3: forms were made, and none passed the gate; the repository is as it was. If
    nothing can be quantised, as in trees, the status is 0, and fp32 is added.
    """
    if not entry.is_dir():
        raise UsageError(f"{entry} is no folder of a model, which comes before all options")
    entry = entry.resolve() if entry.name == ".." else entry  # else a link's own name counts
    versions = versions_of(entry)
    name = said_in(text_of(entry / CONFIG)).get("default_model_filename", "")
    if not (sources := [one for v in versions if (one := onnx_of(entry / str(v), name)).is_file()]):
        raise UsageError(f"no version of {entry} holds a {name or 'model.onnx'} to compile")
    _check_backend(entry, switch=switch)
    # Elsewhere, since a server that polls the repository reloads an entry that changes.
    with tempfile.TemporaryDirectory(prefix="lrai-") as scratch:
        made = Path(scratch, f"{entry.absolute().name}.lrai")
        command = [*PROGRAM, "compile", str(sources[-1]), *context.args, "--output", str(made)]
        # In a group of its own: Ctrl-C comes from here alone, as a second one would cut off what
        # the first has it put away.
        child = subprocess.Popen(command, process_group=0)
        try:
            child.wait()
        finally:
            child.terminate()  # then it leaves nothing
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(END_SECONDS)
            child.kill()
        if child.returncode:
            raise typer.Exit(child.returncode)
        # Now: another one may have been added meanwhile.
        _publish(entry, max(versions_of(entry), default=0) + 1, made, _new_config(made.stem, {}))


@app.command()
def remove(entry: Entry) -> None:
    """Undo what was added to an entry: onnxruntime serves it again.

    Its config.pbtxt becomes what it was, byte for byte. If it was edited since, only its backend is
    changed back; if lrai wrote it, it is renamed. Versions that are artifacts, which onnxruntime
    cannot read, are moved aside within the entry, from where `add` takes them again. Nothing is
    deleted: to get rid of a model, delete its folder.
    """
    versions = versions_of(entry)
    ours, done = [v for v in versions if (entry / str(v) / "model.lrai").exists()], list[str]()
    if ours == versions:
        raise UsageError(f"{entry} has nothing that onnxruntime can serve; delete the folder")
    # There may be an original though the backend was changed back by hand.
    if not (ours or (entry / _ORIGINAL).exists() or backend_of(text_of(entry / CONFIG)) == "lrai"):
        raise UsageError(f"{entry} has nothing of lrai's")
    with contextlib.ExitStack() as undo, disk_errors(entry):
        for folder in (entry / str(version) for version in ours):
            aside = Path(tempfile.mkdtemp(prefix=f"lrai-{folder.name}-", dir=entry))
            aside.rmdir()  # a folder takes its place as it is, a link does not
            folder.rename(aside)
            undo.callback(aside.rename, folder)
            done.append(f"version {folder.name} was moved to {aside}")
        done.append(f"its config.pbtxt {_switch_back(entry)}")
        undo.pop_all()
    out.print(*done, sep="\n")


def text_of(file: Path) -> str:
    """Return every byte of a file as text; nothing where there is none."""
    return file.read_bytes().decode(errors="surrogateescape") if file.exists() else ""


def versions_of(entry: Path) -> list[int]:
    """Return the versions of an entry, lowest first."""
    return sorted(int(p.name) for p in entry.glob("*/") if re.fullmatch(r"0|[1-9][0-9]*", p.name))


def check_configs(entry: Path) -> None:
    """Refuse an entry that has configurations of other names, of which none is for us."""
    others = sorted((entry / "configs").glob("*.pbtxt"))
    if others and not any(backend_of(text_of(one)) == "lrai" for one in others):
        raise UsageError(f"{entry}/configs, of which --model-config-name takes one, has no {LRAI}")


def left_out(entry: Path, version: int) -> str:
    """Return what the configuration says against serving a version, nothing if that is nothing."""
    with contextlib.suppress(ArtifactError, EnvironmentProblem):  # then nobody can tell
        policy = config_of(text_of(entry / CONFIG)).get("version_policy", {})
        if "specific" in policy and str(version) not in policy["specific"]["versions"]:
            return f"version_policy in {entry / CONFIG} leaves version {version} out: name it there"
    return ""


def _new_config(name: str, settings: dict[str, str]) -> str:
    parameter = 'parameters {{ key: "{}" value {{ string_value: "{}" }} }}\n'
    said = "".join(parameter.format(*pair) for pair in settings.items())
    return f'{_WRITTEN}name: "{name}"\n{LRAI}\n{said}'


def _check_backend(entry: Path, *, switch: bool) -> None:
    """Refuse an entry that could not serve an artifact, before anything is done to it."""
    if not os.access(entry, os.W_OK):
        raise EnvironmentProblem(f"{entry}: cannot be written")
    backend = backend_of(text_of(entry / CONFIG)) or "onnxruntime"
    if backend != "lrai" and not (switch and backend.startswith("onnxruntime")):
        raise UsageError(f"{backend} serves {entry}; --switch takes it over from onnxruntime only")
    if backend != "lrai" and (entry / _ORIGINAL).exists():
        raise UsageError(f"{entry / _ORIGINAL} exists; `lrai triton remove {entry}` first")
    if backend != "lrai":
        check_configs(entry)


def _publish(entry: Path, version: int, model: Path, config: str) -> None:
    """Make a version of a model, and have lrai serve its entry; on an error nothing is left."""
    new = not entry.is_dir()
    was = list[tuple[Path, str | None]]()
    try:
        with writing(entry if new else entry / str(version)) as folder:
            target = folder / str(version) if new else folder
            target.mkdir(exist_ok=True)
            if model.is_dir():
                shutil.copytree(Artifact.open(model).path, target / "model.lrai")
            else:
                name = said_in(text_of(entry / CONFIG)).get("default_model_filename", "")
                _check_onnx(Path(shutil.copy2(model, onnx_of(target, name))), model.name)
            # Now: another command may have switched it while this one copied.
            files = entry / CONFIG, entry / _ORIGINAL
            was = [(file, text_of(file) if file.exists() else None) for file in files]
            _switch(folder if new else entry, config)
    except BaseException:  # a disk may be found full when all is written
        if not new and not os.path.lexists(entry / str(version)):  # else it is somebody else's
            for file, before in was:
                if before is None:
                    file.unlink(missing_ok=True)
                elif text_of(file) != before:
                    _replace(file, before)
        raise
    why = left_out(entry, version) or "by default Triton serves the highest one"
    out.print(f"version {version} is there; {why}, after")
    out.print(f"curl -X POST localhost:8000/v2/repository/models/{entry.absolute().name}/load")
    out.print('(under `lrai triton serve` with -H "lrai-key: $TRITON_REPOSITORY_KEY")')


def _check_onnx(copy: Path, name: str) -> None:
    """Refuse what could not be served from where it lies: no ONNX, or weights left behind."""
    (importer,) = entry_points(group="lrai.importers", name="onnx")
    try:
        importer.load()(copy, lambda _: None)
    except CompileError as error:
        raise CompileError(f"{name} cannot be added: {error}; lrai compile may take it") from None


def _switch(entry: Path, config: str) -> None:
    """Have the entry name our backend; keep what it had; write `config` where it had nothing."""
    if backend_of(text := text_of(entry / CONFIG)) == "lrai":
        return
    if (entry / CONFIG).exists():
        shutil.copy2(entry / CONFIG, entry / _ORIGINAL)
        config = switched(text)
    _replace(entry / CONFIG, config)


def _switch_back(entry: Path) -> str:
    """Undo `_switch`, and return what became of config.pbtxt."""
    config, original = entry / CONFIG, entry / _ORIGINAL
    text, was = text_of(config), text_of(original)
    if original.exists() and text in ("", switched(was)):
        _replace(config, was)  # a link stays one
        original.unlink()
        return "is what it was before"
    if text.startswith(_WRITTEN):
        names = (f"{CONFIG}.lrai{'-' * (n > 1)}{n if n > 1 else ''}" for n in itertools.count(1))
        aside = next(entry / name for name in names if not (entry / name).exists())
        config.replace(aside)
        return f"was written by lrai, and is {aside.name} now"
    if edited := backend_of(text) == "lrai":
        _replace(config, switched_back(text, was))
    original.unlink(missing_ok=True)
    became = "had been changed back by hand", "was edited, so only its backend was changed back"
    return became[edited]


def _replace(config: Path, text: str) -> None:
    """Replace the content at once: a server may be reading.

    It keeps its place, its mode and, as far as this user may say so, its owner and group.
    """
    config = config.resolve()
    temporary = config.with_name(f".{CONFIG}")
    try:
        temporary.write_bytes(text.encode(errors="surrogateescape"))
        sync(temporary)  # else a power cut may leave nothing of either
        if config.exists():
            shutil.copymode(config, temporary)
            # The group also where not the owner.
            for owner in ((-1, (its := config.stat()).st_gid), (its.st_uid, -1)):
                with contextlib.suppress(OSError):
                    os.chown(temporary, *owner)
        temporary.replace(config)
    finally:
        temporary.unlink(missing_ok=True)
