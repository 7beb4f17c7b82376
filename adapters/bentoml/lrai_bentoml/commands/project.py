"""`lrai bentoml init`: a project that `bentoml build` and `bentoml serve` take as it is."""

from __future__ import annotations

import contextlib
import json
import keyword
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import bentoml
import typer
import yaml  # type: ignore[import-untyped]
from bentoml.exceptions import BentoMLException

from lrai_bentoml.commands.app import app, out
from lrai_bentoml.commands.saving import save_model
from lrai_bentoml.models import artifact_of, get
from lrai_core import Artifact, EnvironmentProblem, LraiError, TensorSpec, UsageError
from lrai_wheel import build_wheel
from lrai_wheel.pins import extras_of, pins

_SERVICE: Final = '''"""Serve {name} with BentoML, through LRAI."""

import bentoml
import lrai_bentoml
import numpy as np

runner = lrai_bentoml.runner("{tag}")


@bentoml.service(workers={workers})
@bentoml.asgi_app(lrai_bentoml.asgi_app(runner))  # POST /v2/models/{name}/infer: the short path
class {service}:
    """One model, which all workers ask for answers."""

    model = runner

    @bentoml.api
    async def predict({parameters}) -> {returned}:
        """Return what the model makes of it.

{shapes}
        """
{body}


{service}.add_asgi_middleware(lrai_bentoml.Guard)  # limits, callers who leave, Retry-After
'''
_IGNORED: Final = (".venv/", "venv/", "env/", "fresh/", "wheels/", "*.lrai/", "__pycache__/")
_LINE: Final = 50  # characters of arguments in one
# Names that BentoML gives a meaning, or that are used above.
_TAKEN: Final = frozenset(
    {"self", "ctx", "context", "args", "kwargs", "np", "names", "outputs", "dict", "zip"}
)


@app.command()
def init(
    model: Annotated[
        str, typer.Argument(help="Artifact, a directory NAME.lrai; or the tag of a saved model.")
    ],
    folder: Annotated[Path, typer.Option(help="Folder to write to.")] = Path(),
    name: Annotated[
        str, typer.Option(help="Name to save an artifact under; by default its own.")
    ] = "",
    workers: Annotated[int, typer.Option(min=1, help="Processes that take requests.")] = 2,
) -> None:
    """Write a project around MODEL, which is saved if it is an artifact; nothing is overwritten.

    It takes one. Of a service of several, the class in service.py has a runner for each: save the
    others by lrai_bentoml.save_model, and add other = lrai_bentoml.runner("OTHER:latest") to it.
    """
    names = ("service.py", "bentofile.yaml", "requirements.txt", ".bentoignore")
    if there := [name for name in names if (folder / name).exists()]:
        raise UsageError(f"{', '.join(there)}: there already, and nothing is overwritten")
    with _explained():
        folder.mkdir(parents=True, exist_ok=True)
        if Path(model).is_dir():
            artifact = Artifact.open(model)
            stored = save_model(name or _tag_name(artifact.manifest.name), artifact)
            tag = f"{stored.tag.name}:latest"
        elif "/" in model or Path(model).is_file():
            what = "a file: lrai compile makes an artifact of it" if Path(model).is_file() else ""
            raise UsageError(f"{model!r} is {what or 'neither an artifact nor a tag'}")
        elif name:
            raise UsageError(f"--name {name!r} is for an artifact; {model!r} is saved already")
        else:
            stored, tag = get(model), model if ":" in model else f"{model}:latest"
            artifact = artifact_of(stored)
        wheel = build_wheel(folder / "wheels")
        service = _class_name(stored.tag.name)
        texts = (
            _service(service, stored.tag.name, tag, workers, artifact),
            _bentofile(service, tag, stored, wheel.name),
            "\n".join(
                ["# What lrai and BentoML were built and tested with.", *_requirements(artifact)]
            ),
            "\n".join([*_IGNORED, *_home(stored, folder)]),
        )
        made = list[Path]()
        try:
            for file, content in zip(names, texts, strict=True):
                with (folder / file).open("x", encoding="utf-8") as stream:
                    made.append(folder / file)
                    stream.write(content.rstrip("\n") + "\n")
        except BaseException:  # else the next one would find them there already
            for path in made:
                path.unlink(missing_ok=True)
            raise
    out.print(f"wrote {', '.join(names)} and wheels/{wheel.name} for {stored.tag}")
    out.print("now: bentoml build && bentoml serve")


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Raise what BentoML or the disk objects to as an error of the command line."""
    try:
        yield
    except BentoMLException as error:
        if isinstance(error.__cause__, LraiError):
            raise error.__cause__ from None
        raise UsageError(str(error)) from None
    except ValueError as error:  # of a tag that can be none
        raise UsageError(str(error)) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""  # of a full disk it is not known
        raise EnvironmentProblem(f"{where}{error.strerror or error}") from None


def _service(service: str, name: str, tag: str, workers: int, artifact: Artifact) -> str:
    """Return service.py: an API with a parameter per input of the model."""
    declared = artifact.manifest.signature
    arguments = _identifiers(declared.inputs)
    parameters = "".join(f"        {argument}: np.ndarray,\n" for argument in arguments)
    asked = ", ".join(arguments)
    if len(asked) > _LINE:
        asked = "".join(f"\n            {argument}," for argument in arguments) + "\n        "
    asked = f"await self.model.async_run({asked})"
    if len(declared.outputs) == 1:
        returned, body = "np.ndarray", f"        return {asked}"
    else:
        returned = "dict[str, np.ndarray]"
        quoted = [json.dumps(spec.name, ensure_ascii=False) for spec in declared.outputs]
        names = "".join(f"            {name},\n" for name in quoted)
        body = f"        names = (\n{names}        )\n        outputs = {asked}\n"
        body += "        return dict(zip(names, outputs, strict=True))"
    shapes = [_shape(spec) for spec in declared.inputs]
    shapes += [f"returned {_shape(spec)}" for spec in declared.outputs]
    return _SERVICE.format(
        name=name,
        tag=tag,
        workers=workers,
        service=service,
        parameters=f"\n        self,\n{parameters}    ",
        returned=returned,
        shapes="\n".join(f"        {line}" for line in shapes),
        body=body,
    )


def _bentofile(service: str, tag: str, stored: bentoml.Model, wheel: str) -> str:
    labels = {key: value for key, value in stored.info.labels.items() if key.startswith("lrai.")}
    content: dict[str, Any] = {
        "service": f"service:{service}",
        "labels": labels,
        "include": ["*.py", "lrai.toml"],
        # Under the alias the service finds the version that the Bento was built with, whatever the
        # store that it is imported into calls the latest.
        "models": [{"tag": tag, "alias": tag}],
        "envs": [{"name": "LRAI_LOG", "value": "stderr"}],  # else it is gone with the container
        "python": {
            "requirements_txt": "./requirements.txt",
            "wheels": [f"./wheels/{wheel}"],
            "lock_packages": False,
        },
    }
    return str(yaml.safe_dump(content, sort_keys=False))


def _requirements(artifact: Artifact) -> list[str]:
    """Return pins; that of BentoML is added when a Bento is built."""
    return [pin for pin in pins("bentoml", *extras_of(artifact)) if not pin.startswith("bentoml==")]


def _home(stored: bentoml.Model, folder: Path) -> list[str]:
    """Return BentoML's own folder where it lies in the project, which would pack itself."""
    home = Path(stored.path).resolve().parents[2]
    root = folder.resolve()
    return [f"{home.relative_to(root)}/"] if home.is_relative_to(root) and home != root else []


def _shape(spec: TensorSpec) -> str:
    """Return what a docstring says of a tensor, without what would end it."""
    said = f"{spec.name}: {spec.datatype} [{', '.join(map(str, spec.shape))}]"
    return re.sub(r"[^ -!#-\[\]-~]", "?", said)


def _identifiers(specs: Sequence[TensorSpec]) -> list[str]:
    """Return a Python name per tensor, distinct, which BentoML takes for a parameter."""
    names: list[str] = []
    for spec in specs:
        name = re.sub(r"\W", "_", spec.name, flags=re.ASCII).strip("_") or "tensor"
        name = f"tensor_{name}" if name[0].isdigit() or keyword.iskeyword(name) else name
        while name in _TAKEN or name in names:
            name += "_"
        names.append(name)
    return names


def _tag_name(name: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("._-") or "model"


def _class_name(name: str) -> str:
    words = "".join(word.capitalize() for word in re.split(r"[^a-zA-Z0-9]+", name))
    fine = words[:1].isalpha() and not keyword.iskeyword(words)
    return words if fine else f"Model{words}"
