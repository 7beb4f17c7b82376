"""The forms that a folder keeps, so that another compilation of the same model need not make them.

Each lies in a folder of its own. What is told of it lies beside that, and is written last: what an
interrupt left half made is made again.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from lrai_core.compiler.search import Built, Material, Reject
from lrai_core.engine.engine import Engine, installed_version, isa_class

Make = Callable[[Path, Reject], Iterable[Built]]


class _Form(msgspec.Struct):
    """What became of a form: one file for each set of passes, and what was refused, and why."""

    built: list[Built]
    refused: list[tuple[str, str]]


class Kept:
    """The forms of one model, made of the same rows, for one engine, and this processor."""

    def __init__(self, material: Material, engine: Engine) -> None:
        """Find the folder for what is made of this."""
        self._folder = material.folder / _digest(material, engine)

    def forms(self, name: str, make: Make, reject: Reject) -> Iterator[Built]:
        """Yield what was made of a form before, or else what `make` makes in an empty folder."""
        home = self._folder / name
        try:
            form = msgspec.json.decode(_told(home).read_bytes(), type=_Form, dec_hook=_path)
        except (OSError, msgspec.DecodeError):
            try:
                form = self._made(home, make)
            except OSError as error:  # the disk may be full
                reject(name, str(error))
                return
        for refused in form.refused:
            reject(*refused)
        for built in form.built:
            yield built._replace(graph=home / built.graph)

    def _made(self, home: Path, make: Make) -> _Form:
        form, draft = _Form([], []), home.with_name(f".{home.name}.{secrets.token_hex(4)}")
        draft.mkdir(parents=True)
        try:
            for built in make(draft, lambda *refused: form.refused.append(refused)):
                form.built.append(built._replace(graph=built.graph.relative_to(draft)))
            told = _told(draft)
            told.write_bytes(msgspec.json.encode(form, enc_hook=os.fspath))
            shutil.rmtree(home, ignore_errors=True)
            draft.rename(home)
            told.rename(_told(home))
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            _told(draft).unlink(missing_ok=True)
        return form


def _told(home: Path) -> Path:
    return home.with_name(f"{home.name}.json")


def _digest(material: Material, engine: Engine) -> str:
    """Return what tells apart what forms are made of."""
    made_by = (installed_version("lrai"), installed_version("onnxruntime"))
    told: tuple[Any, ...] = (*made_by, engine.name, engine.version, isa_class(), material.threads)
    found = hashlib.sha256(repr(told).encode())
    for file in sorted(material.shared.folder.iterdir()):
        with file.open("rb") as content:
            found.update(hashlib.file_digest(content, "sha256").digest())
    for row in material.sample.rows if material.sample else ():
        for array in row:
            found.update(f"{array.dtype}{array.shape}".encode())
            found.update(
                repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
            )
    return found.hexdigest()[:16]


def _path(kind: type[Any], value: object) -> Any:
    if kind is not Path or not isinstance(value, str):
        raise NotImplementedError(f"{kind} is never kept")
    return Path(value)
