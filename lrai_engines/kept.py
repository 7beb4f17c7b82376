"""The forms that a folder keeps, so that another compilation of the same model need not make them.

Each lies in a folder of its own name, which nothing changes or removes: who uses it may be another
process. What is told of it is written last, so what an interrupt left half made is made again. What
is kept is loaded here, as the model is: both have to come from somebody who is trusted.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
from msgspec.structs import replace

from lrai_core.compiler.search import Built, Material, Reject
from lrai_core.engine.engine import Engine, installed_version, isa_class
from lrai_engines.quantize import NothingToQuantize

Make = Callable[[Path, Reject], Iterable[Built]]

_LIBRARIES = ("lrai", "onnx", "onnxruntime", "numpy")
LATE = "not made: the minutes are up"


class _Told(msgspec.Struct, forbid_unknown_fields=True):
    """What became of a form.

    Attributes:
        folder: Its name.
        size_bytes: Of all that lies there.
        built: For each set of passes; paths are relative to the folder.
        why: There is nothing to make.
    """

    folder: str
    size_bytes: int
    built: list[Built]
    why: str = ""


class Kept:
    """The forms of one model, made of the same rows, for one engine, and this processor."""

    def __init__(self, material: Material, engine: Engine) -> None:
        """Find the folder for what is made of this."""
        self._home, self._until = material.folder / _digest(material, engine), material.until

    def forms(self, name: str, make: Make, reject: Reject) -> Iterator[Built]:
        """Yield what was made of a form before, or else what `make` makes in an empty folder.

        What failed is tried another time, unless it has said that there is nothing to quantise, as
        is what there was no time for.

        Raises:
            OSError: The folder cannot be written.
        """
        if (told := self._find(name)) is None and is_late(name, self._until):
            reject(name, LATE)
            return
        told = told or self._made(name, make, reject)
        if told.why:
            reject(name, f"nothing to quantise: {told.why}")
        for built in told.built:
            yield replace(built, graph=self._home / told.folder / built.graph)

    def _find(self, name: str) -> _Told | None:
        """Return what is told of a form that is whole, and lies where it should."""
        try:
            content = (self._home / f"{name}.json").read_bytes()
            told = msgspec.json.decode(
                content, type=_Told, dec_hook=lambda kind, value: kind(value)
            )
        except (OSError, ValueError, RecursionError, msgspec.MsgspecError):
            return None
        inside = Path(told.folder).name == told.folder and all(
            built.form == name and not built.graph.is_absolute() and ".." not in built.graph.parts
            for built in told.built
        )
        whole = inside and _size(self._home / told.folder) == told.size_bytes
        return told if whole else None

    def _made(self, name: str, make: Make, reject: Reject) -> _Told:
        folder, failed = self._home / f"{name}.{secrets.token_hex(4)}", list[str]()
        folder.mkdir(parents=True)

        def refuse(form: str, why: str) -> None:
            failed.append(form)
            reject(form, why)

        told = _Told(folder.name, 0, [])
        try:
            for built in make(folder, refuse):
                told.built.append(replace(built, graph=built.graph.relative_to(folder)))
        except NothingToQuantize as error:
            told.why = str(error)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if not failed:
            told.size_bytes = _size(folder)
            draft = self._home / f"{folder.name}.draft"
            draft.write_bytes(msgspec.json.encode(told, enc_hook=os.fspath))
            draft.rename(self._home / f"{name}.json")
        elif not told.built:  # else this compilation uses it
            shutil.rmtree(folder, ignore_errors=True)
        return told


def is_late(form: str, until: float) -> bool:
    """Return whether no more of a form is to be made; fp32 is in any case."""
    return form != "fp32" and time.monotonic() > until


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _digest(material: Material, engine: Engine) -> str:
    """Return what tells apart what forms are made of, and by what."""
    sample, versions = material.sample, [installed_version(name) for name in _LIBRARIES]
    sides = (sample.inputs, sample.outputs, sample.calls) if sample else ()
    able = getattr(engine, "able", ())  # which the class of the processor does not tell
    told = (versions, engine.name, engine.version, able, isa_class(), sides)
    found = hashlib.sha256(repr(told).encode())
    sources = Path(__file__).parent.glob("*.py")
    for file in (*sorted(sources), *sorted(material.shared.folder.iterdir())):
        with file.open("rb") as content:
            found.update(hashlib.file_digest(content, "sha256").digest())
    for row in sample.rows if sample else ():
        for array in row:
            found.update(f"{array.dtype}{array.shape}".encode())
            found.update(
                repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
            )
    return found.hexdigest()[:16]
