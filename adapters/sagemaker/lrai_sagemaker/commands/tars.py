"""Tars of models: written for the platform, and unpacked without being trusted."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import shutil
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from lrai_core import Artifact, ArtifactError, EnvironmentProblem, UsageError

# Without owners and modes of the tar's; before 3.11.4, as on Debian 12, in other words.
_PLAINLY: Final[dict[str, Any]] = (
    {"filter": "data"} if hasattr(tarfile, "data_filter") else {"set_attrs": False}
)
_SUFFIXES: Final = (".tar.gz", ".tgz", ".tar")
# Of compressions that end early, and of times and names that no file can have.
_BAD_TARS: Final = (
    *(gzip.BadGzipFile, lzma.LZMAError, ValueError, OverflowError),
    RecursionError,  # of attributes of attributes
)
_MOST_MEMBERS: Final = 10_000
_MOST_HEADER_BYTES: Final = 1 << 20
_MOST_TIMES, _PLAIN_BYTES = 100, 1 << 26  # of a tar that it may hold; with so many in any case
_FOLDER: Final = "model.lrai"
_UNPACKED: Final = "model-"  # begins the name of a folder with what was in a tar


class _Entry(tarfile.TarInfo):
    """An entry whose long names and attributes, which are read whole, are not too long."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        plain = self.type in (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE)
        if not plain and self.size > _MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"an attribute has {self.size} bytes")
        if self.type in (tarfile.GNUTYPE_SPARSE, tarfile.XGLTYPE):
            raise tarfile.ReadError("it has files with holes, or attributes of all files")
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return] # is not in typeshed

    def _proc_gnusparse_10(self, *_: object) -> None:
        raise tarfile.ReadError("it has files with holes")


def package(artifact: Artifact, out: Path) -> None:
    """Write the tar that the platform fetches and unpacks; the same artifact gives the same bytes.

    Raises:
        UsageError: `out` exists.
        EnvironmentProblem: It cannot be written.
    """
    if os.path.lexists(out):
        raise UsageError(f"{out} exists; choose another name or remove it")
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with (
            partial.open("wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=0) as stream,
            tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for path in sorted(artifact.path.rglob("*")):
                if path.is_file() and path.suffix != ".partial":  # a certificate being written
                    _add(archive, path, f"{_FOLDER}/{path.relative_to(artifact.path).as_posix()}")
        partial.rename(out)
    except OSError as error:
        raise EnvironmentProblem(f"{out} cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):  # it is said above what stands in the way
            partial.unlink()


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    """Add a file as nobody's, of 1970, with mode 0644: its bytes are all that tells it apart."""
    entry = tarfile.TarInfo(name)
    entry.size = path.stat().st_size
    with path.open("rb") as content:
        archive.addfile(entry, content)


def unpacked(place: Path, scratch: Path) -> Path:
    """Return the folder of a model, which may be given as a tar, or as a folder with only a tar.

    Args:
        place: From where the model comes.
        scratch: Where a new folder for what is unpacked is made; its name has the tar's hash.

    Raises:
        ArtifactError: The tar is damaged, or holds anything but files in folders.
        EnvironmentProblem: It cannot be unpacked here.
    """
    with suppress(OSError):  # who opens the folder says what is wrong with it
        if place.is_file():
            return _unpack(place, scratch)
        tars = [path for path in place.glob("*") if path.name.endswith(_SUFFIXES)]
        if len(tars) == 1 and not any(place.glob("*.lrai")):
            return _unpack(tars[0], scratch)
    return place


def _unpack(tar: Path, scratch: Path) -> Path:
    try:
        with tar.open("rb") as file:
            into = scratch / (_UNPACKED + hashlib.file_digest(file, "sha256").hexdigest())
        into.mkdir(mode=0o700)
        room = min(shutil.disk_usage(into).free, _PLAIN_BYTES + _MOST_TIMES * tar.stat().st_size)
        with tarfile.open(tar, tarinfo=_Entry) as archive:
            for count, member in enumerate(archive, 1):
                room -= member.size
                plain = (member.isreg() or member.isdir()) and member.sparse is None
                if not plain or count > _MOST_MEMBERS or room < 0:
                    over, other = "too much, for this disk or its size", member.name[:80]
                    why = over if plain else f"{other!r}, no file"
                    raise ArtifactError(f"{tar.name} holds {why}")
                member.name = member.name.lstrip("/")
                if not (into / member.name).resolve().is_relative_to(into.resolve()):
                    raise tarfile.TarError(f"{member.name[:80]!r} lies outside of it")
                archive.extract(member, into, **_PLAINLY)
    except (tarfile.TarError, EOFError, zlib.error, *_BAD_TARS) as error:
        raise ArtifactError(f"{tar.name} is no whole and safe tar: {error}") from None
    except OSError as error:
        raise EnvironmentProblem(f"{tar.name} cannot be unpacked: {error.strerror}") from None
    return into
