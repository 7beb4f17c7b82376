"""The artifact: the directory that `compile` writes, read only after every file was checked.

`manifest.json` names every other file with its size and sha256, and is itself named by the
certificates beside it. Nothing in here parses a model.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, TypeVar

import msgspec

from lrai_core import errors
from lrai_core.errors import ArtifactError, EnvironmentProblem, OutOfResources, UsageError, shorten
from lrai_core.fairness import Disparity
from lrai_core.protocol import Signature

# msgspec 0.22 learns a type when it first reads one, and dies of two threads that do so at once.
_reading: Final = threading.Lock()

SCHEMA_VERSION: Final = 2  # of manifests; since 2 of calls that somebody has named
MANIFEST: Final = "manifest.json"
QUANTIZATION_LOG: Final = "quantization.jsonl"
CERTIFICATES: Final = "certificates"
EVALUATION: Final = "evaluation.msgpack.gz"
LABELS: Final = "labels.jsonl"  # of its rows: the columns, then theirs of each
_PLAIN: Final = "an artifact holds plain files only"
_MAX_MANIFEST_BYTES: Final = 16 << 20
_REFUSALS = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EIO}
_REFUSALS |= {errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ESTALE}
Record = TypeVar("Record", bound=msgspec.Struct)


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what the manifest is made of: strict, immutable."""


class FileEntry(_Record, frozen=True, kw_only=True):
    """Size and hash of one file."""

    sha256: str
    size_bytes: int


class Source(_Record, frozen=True, kw_only=True):
    """The model as it was given.

    Attributes:
        file: The graph inside the artifact; its weights are external data beside it. Empty in a
            slim artifact, which has what serves and nothing else.
        sha256: Of the file that was given, and of its external data in order of name.
        opset: Of the default domain, after an upgrade.
    """

    file: str
    sha256: str
    opset: int
    operators: int


class Target(_Record, frozen=True, kw_only=True):
    """What the variants were optimised for and measured on."""

    isa: str
    engine: str
    engine_version: str
    threads: int


class LatencyPoint(_Record, frozen=True, kw_only=True):
    """Measured time of one call.

    Attributes:
        rows: Rows in the call.
        length: Extent of the length axis, 0 where there is none.
        median_ms: Median over the interleaved rounds.
        spread_ms: Interquartile range over the same.
        named: It is one of the signature's calls, which an engine may be compiled for.
    """

    rows: Annotated[int, msgspec.Meta(ge=1)]
    length: int
    median_ms: Annotated[float, msgspec.Meta(gt=0)]
    spread_ms: float
    named: bool = False


class GateResult(_Record, frozen=True, kw_only=True):
    """What the gate measured for one variant against the source model.

    Attributes:
        passed: Whether every condition held.
        why: The condition that decided, in a sentence.
        rows: Gate rows.
        measure: What agreement means, for example `cosine >= 0.99`.
        agreement: Share of rows that agree, alone; None with labels.
        agreement_bound: Its one-sided lower bound, the worse of alone and batched; at 95 %, or at
            more where the error is parted among the forms judged, as in `gate.errors`.
        accuracy_loss: Metric of the source less that of the variant; None without labels.
        accuracy_loss_bound: Its one-sided upper bound, likewise.
        difference: Quantiles (p50, p90, p99, max) of the largest difference per row after the
            output map.
        groups: By column and group how the variant's decisions fare, alone.
        disparities: What it does to differences between groups, the worse of alone and batched.
    """

    passed: bool
    why: str
    rows: int
    measure: str
    agreement: float | None = None
    agreement_bound: float | None = None
    accuracy_loss: float | None = None
    accuracy_loss_bound: float | None = None
    difference: dict[str, float] = {}
    groups: dict[str, dict[str, dict[str, float]]] = {}
    disparities: tuple[Disparity, ...] = ()


class Variant(_Record, frozen=True, kw_only=True):
    """One executable form of the model.

    Attributes:
        id: Name inside the artifact: `fp32`, `int8-row`, …
        engine_version: That it was measured with; empty where it is the target's.
        model: The graph, relative to the artifact.
        weights: Folder of its external data, relative to the artifact; empty where there is none.
        size_bytes: Bytes that serving it has to read: graph, and external data that it refers to.
        speedup: Latency of fp32 over that of this variant, geometric mean over the profile but for
            its long calls, that three of four rounds reach.
        batch_effect: Twice the element difference to the same row run alone, see the gate; of no
            rows 1e-4, unmeasured.
    """

    id: Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
    engine: str
    engine_version: str = ""
    precision: str
    model: str
    weights: str = ""
    size_bytes: int
    passes_off: tuple[str, ...] = ()
    latency: tuple[LatencyPoint, ...] = ()
    speedup: float = 1.0
    gate: GateResult | None = None
    batch_effect: float = 0.0
    why: str = ""


class Manifest(_Record, frozen=True, kw_only=True):
    """All of `manifest.json`."""

    schema_version: int
    lrai_version: str
    created: str
    name: str
    source: Source
    signature: Signature
    variants: tuple[Variant, ...]
    chosen: str
    together: tuple[str, ...] = ()  # serve beside it, each the calls that it is fastest at
    # Forms judged on the gate rows: certificates on the same rows pay for them.
    candidates: Annotated[int, msgspec.Meta(ge=1, lt=1 << 20)] = 1
    demanded: tuple[float, float] | None = None  # epsilon, and the share that may exceed it
    objective: str = "latency"  # by which the chosen one was
    target: Target
    files: dict[str, FileEntry]

    def made_for(self, variant: Variant) -> str:
        """Return the processor class and the engine that a variant was made for."""
        version = variant.engine_version or self.target.engine_version
        return f"{self.target.isa} with {variant.engine} {version}"

    def serving(self, variant_id: str = "") -> tuple[Variant, ...]:
        """Return the variants that serve: one that is named alone, or the chosen one and others."""
        ids = (variant_id,) if variant_id else dict.fromkeys((self.chosen, *self.together))
        return tuple(map(self.variant, ids))

    def variant(self, variant_id: str) -> Variant:
        """Return the variant of that id.

        Raises:
            UsageError: There is none, or there are several: nobody could tell whose proof it is.
        """
        if len(found := [variant for variant in self.variants if variant.id == variant_id]) == 1:
            return found[0]
        known = ", ".join(v.id for v in self.variants)
        raise UsageError(f"no variant {shorten(variant_id)!r}; the artifact has {known}")


@dataclass(frozen=True, slots=True)
class Artifact:
    """A checked artifact.

    Attributes:
        path: The directory.
        manifest: Its content.
        version: First 12 digits of the manifest's sha256: the model version of every reply.
        sha256: The manifest's sha256.
    """

    path: Path
    manifest: Manifest
    sha256: str

    @property
    def version(self) -> str:
        """Return the model version that replies carry."""
        return self.sha256[:12]

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Return every variant that passed the gate, fp32 among them."""
        return self.manifest.variants

    @property
    def engines(self) -> tuple[str, ...]:
        """Return the names of the engines that its variants run on, the chosen variant's first."""
        return tuple(dict.fromkeys(variant.engine for variant in self.variants))

    def file(self, relative: str) -> Path:
        """Return the path of a file that the manifest names."""
        if not relative:
            raise UsageError("the artifact is slim: this needs its source model (check: --source)")
        if relative not in self.manifest.files:
            raise ArtifactError(f"the manifest does not name {shorten(relative)!r}")
        return self.path / relative

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Artifact:
        """Return the artifact at `path`.

        Args:
            path: The directory.
            verify: Hash every file; False checks names, kinds and sizes only, for callers whose
                child process hashes what it loads.

        Raises:
            ArtifactError: Not an artifact, changed, truncated, newer, or with a link or a file in
                it that the manifest does not name.
        """
        folder = Path(path)
        manifest, sha256 = _read_manifest(folder)
        graphs = {variant.model for variant in manifest.variants}
        needed = {manifest.chosen, *manifest.together}
        if manifest.source.file:  # else it is slim
            graphs, needed = {manifest.source.file, *graphs}, {"fp32", *needed}
        if unhashed := graphs - manifest.files.keys():
            raise ArtifactError(f"the manifest does not hash {shorten(min(unhashed))!r}")
        folders = {str(PurePosixPath(name).parent) for name in manifest.files}
        if empty := {variant.weights for variant in manifest.variants} - {"", *folders}:
            where = shorten(min(empty))
            raise ArtifactError(f"the manifest hashes nothing in the weights folder {where!r}")
        if missing := needed - {variant.id for variant in manifest.variants}:
            raise ArtifactError(f"the manifest has no variant {shorten(min(missing))!r}")
        _check_kinds(folder, manifest.files)
        _check_strangers(folder, manifest.files)
        if verify:
            check_files(folder, manifest.files)
        return cls(folder, manifest, sha256)

    def files_of(self, variant: Variant) -> dict[str, FileEntry]:
        """Return the files that serving `variant` reads, with their hashes."""
        folders = (str(PurePosixPath(variant.model).parent), variant.weights)
        files = self.manifest.files.items()
        return {name: entry for name, entry in files if str(PurePosixPath(name).parent) in folders}


def check_files(folder: Path, files: dict[str, FileEntry]) -> None:
    """Compare size and sha256 of every file.

    Raises:
        ArtifactError: The first file that differs, by its name inside the artifact.
    """
    _check_kinds(folder, files)
    for name, entry in files.items():
        try:
            found = sha256_file(folder / name)
        except OSError as error:
            raise EnvironmentProblem(f"{name} cannot be read: {error.strerror}") from None
        if found != entry.sha256:
            changed = "has changed since the artifact was written"
            raise ArtifactError(f"{name} {changed}: sha256 differs")


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def writing(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `out` that becomes `out` when the block ends well.

    Everything is flushed to the disk before the rename, so `out` is whole or absent. On any error
    and on Ctrl-C the sibling is removed.

    Raises:
        UsageError: `out` exists.
        EnvironmentProblem: The disk is full, read-only or not permitted.
    """
    if os.path.lexists(out):
        raise UsageError(f"{out} exists; choose another name or remove it")
    # Named before it is made, so that no moment is left in which Ctrl-C would forget it.
    temporary = out.absolute().parent / f".{out.name}.{secrets.token_hex(4)}"
    try:
        with disk_errors(out):
            temporary.mkdir()
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            if os.path.lexists(out):
                raise UsageError(f"{out} exists; it appeared while this was being written")
            temporary.rename(out)
            sync(out.absolute().parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn what a disk refuses inside the block into one sentence about `target`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfResources(f"{target}: the disk is full") from error
        if error.errno in _REFUSALS:
            raise EnvironmentProblem(f"{target}: cannot be written: {error.strerror}") from error
        raise


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` with the hashes of all files that `folder` holds now."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.partition("/")[0] not in (MANIFEST, CERTIFICATES):
            files[name] = FileEntry(sha256=sha256_file(path), size_bytes=path.stat().st_size)
    content = msgspec.json.encode(msgspec.structs.replace(manifest, files=files))
    (folder / MANIFEST).write_bytes(msgspec.json.format(content, indent=1) + b"\n")


def write_lines(path: Path, records: Sequence[Any]) -> None:
    """Write one JSON document a line; numbers may be of numpy."""
    path.write_bytes(msgspec.json.Encoder(enc_hook=lambda v: v.item()).encode_lines(records))


def read_record(path: Path, kind: type[Record], most: int) -> tuple[Record, str]:
    """Return what a plain JSON file of at most `most` bytes holds, and its sha256.

    Raises:
        ArtifactError: It is something else, or of a newer schema.
        OSError: It cannot be opened.
    """
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise ArtifactError(f"{path} is not a plain file")
    if info.st_size > most:
        raise ArtifactError(f"{path} is over {most} bytes")
    raw, by = path.read_bytes(), ""
    try:
        with _reading:
            head = msgspec.json.decode(raw, type=_Head)
            its, ours = shorten(head.lrai_version), errors.VERSION
            other = "maybe by another build of it" if its == ours else f"this is lrai {ours}"
            by = f"; written by lrai {its}, {other}: install that one, or compile again" * bool(its)
            if (schema := head.schema_version) > SCHEMA_VERSION:
                known = f"this version of lrai reads up to {SCHEMA_VERSION}; install a newer lrai"
                raise ArtifactError(f"{path} has schema {schema}, {known}{by}")
            return msgspec.json.decode(raw, type=kind), hashlib.sha256(raw).hexdigest()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{path.name} cannot be read: {shorten(str(error), 200)}{by}") from None


class _Head(msgspec.Struct):
    schema_version: int
    lrai_version: str = ""  # of those that do not say it, which are no manifests


def _read_manifest(folder: Path) -> tuple[Manifest, str]:
    try:
        if stat.S_ISLNK(folder.lstat().st_mode):
            raise ArtifactError(f"{folder} is a link; name the directory itself")
        if stat.S_ISLNK((folder / MANIFEST).lstat().st_mode):
            raise ArtifactError(f"{folder}: {MANIFEST} is not a plain file")
        return read_record(folder / MANIFEST, Manifest, _MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        why = f"there is no {MANIFEST}" if error.errno == errno.ENOENT else "it is a file"
        raise ArtifactError(f"{folder} is not an artifact: {why}") from None
    except PermissionError:
        raise EnvironmentProblem(f"{folder}: no permission to read it") from None


def _check_kinds(folder: Path, files: dict[str, FileEntry]) -> None:
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or "\\" in name or ".." in parts:
            raise ArtifactError(f"the manifest names {shorten(name)!r}, which leaves the artifact")
        if not name.isprintable():
            raise ArtifactError(f"the manifest names {shorten(name)!r}, which no artifact holds")
        try:
            for depth in range(1, len(parts)):
                if not stat.S_ISDIR(folder.joinpath(*parts[:depth]).lstat().st_mode):
                    raise ArtifactError(f"{name} lies behind a link; {_PLAIN}")
            info = folder.joinpath(*parts).lstat()
        except (FileNotFoundError, NotADirectoryError):
            raise ArtifactError(f"{shorten(name)} is missing from the artifact") from None
        except OSError as error:
            raise ArtifactError(f"{shorten(name)} cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(info.st_mode):
            raise ArtifactError(f"{name} is a link or a special file; {_PLAIN}")
        if info.st_size != entry.size_bytes:
            raise ArtifactError(f"{name} has {info.st_size} bytes, {entry.size_bytes} were written")


def _check_strangers(folder: Path, files: dict[str, FileEntry]) -> None:
    """Refuse what the manifest does not name, but for itself and plain files of certificates."""
    for path in folder.rglob("*"):  # does not follow links
        name = path.relative_to(folder).as_posix()
        certificate = path.parent == folder / CERTIFICATES and path.suffix in (".json", ".partial")
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:  # a certificate was finished meanwhile
            continue
        known = name in files or name == MANIFEST or certificate
        if not (stat.S_ISDIR(mode) or (stat.S_ISREG(mode) and known)):
            raise ArtifactError(f"{shorten(name)} is no file that the manifest names")


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
