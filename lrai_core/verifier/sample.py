"""Rows to judge a model on: read from untrusted files, checked, told apart by their hash."""

from __future__ import annotations

import gzip
import hashlib
import tokenize
import zipfile
import zlib
from collections import UserList
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final

import msgspec
import numpy as np

from lrai_core import protocol
from lrai_core.config import LimitsConfig
from lrai_core.errors import CalibrationError, RequestError, VerificationError, shorten
from lrai_core.protocol import Array, Signature, Tensor, TensorSpec, encode_bytes, validate

Data = str | Path | Mapping[str, Any]
LABEL: Final = "label"
_MOST_GROUPS: Final = 64  # of one column
_KEPT_BYTES, _MOST_KEPT_BYTES = 16 << 20, 256 << 20  # unasked, and at most
_ONE_ROW: Final = LimitsConfig(request_bytes=1 << 62, request_rows=1, nan_policy="reject")
_UNREADABLE: Final = (  # what numpy and zipfile raise on bytes that are not theirs
    OSError, ValueError, EOFError, LookupError, TypeError, RuntimeError, SyntaxError, MemoryError,
    OverflowError, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_KEPT_ROWS: Final = 1 << 16
_Stored = tuple[tuple[tuple[int, ...], bytes], ...]  # an empty tuple takes no memory when read
_AtMost = Annotated[tuple[msgspec.Raw, ...], msgspec.Meta(max_length=_KEPT_ROWS)]  # not copied


class _Read(UserList[Any]):
    """Rows that are read when they are taken: those of a file may be too many for memory.

    In `data` is what reads each.
    """

    def __getitem__(self, at: Any) -> Any:
        """Return a row, or the rows of a slice, which are not read yet."""
        return _Read(self.data[at]) if isinstance(at, slice) else self.data[at]()


@dataclass(frozen=True, slots=True)
class Rows:
    """Single-row inputs, each without the padding that its length axis makes superfluous.

    Attributes:
        inputs: Per row one array per input, in the signature's order.
        labels: One label per row, or None.
        hashes: sha256 of each row's content.
        groups: By column of groups the group of each row.
    """

    inputs: list[list[Array]] | _Read
    labels: Array | None
    hashes: list[bytes]
    groups: dict[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.inputs)

    def take(self, indices: Sequence[int]) -> Rows:
        """Return the rows at these indices."""
        chosen = list(indices)
        labels = None if self.labels is None else self.labels[chosen]
        groups = {name: column[chosen] for name, column in self.groups.items()}
        inputs = type(self.inputs)([getattr(self.inputs, "data", self.inputs)[i] for i in chosen])
        return Rows(inputs, labels, [self.hashes[i] for i in chosen], groups)


def read_rows(
    data: Data, signature: Signature, what: str, groups: Sequence[str] = ()
) -> tuple[Rows, int]:
    """Return the distinct rows of `data`, and how many repeated rows were left out.

    Args:
        data: `.npz` with one array per input (rows along the first axis) and optionally `label`;
            `.npy` for a model with one input; or the same as a mapping.
        signature: Of the model.
        what: What the data is for, for messages: `evaluation`, `calibration`.
        groups: Columns that say to which group a row belongs; they may be inputs too.

    Raises:
        CalibrationError: Missing, unreadable, empty, wrong names, datatypes or shapes, or NaN.
    """
    names = [spec.name for spec in signature.inputs]
    wanted = list(dict.fromkeys((*names, *groups)))
    arrays = {name: np.atleast_1d(array) for name, array in _load(data, wanted, what).items()}
    counts = sorted({len(array) for array in arrays.values()})
    if len(counts) != 1 or counts == [0]:
        raise CalibrationError(f"{what}: no rows, or different numbers of rows: {counts}")
    labels = None if LABEL in names else arrays.get(LABEL)
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iub"):
        got = f"{labels.dtype} {list(labels.shape)}: leave it out to judge by agreement with fp32"
        raise CalibrationError(f"{what}: {LABEL!r} must be one integer per row, is {got}")
    columns = {s.name: _column(arrays[s.name], s, what) for s in signature.inputs}
    given = ({name: column[i, ...] for name, column in columns.items()} for i in range(*counts))
    told = {name: _groups(arrays[name], name, what) for name in groups}
    rows, kept = _distinct(given, signature, what)
    return Rows(rows.inputs, labels, rows.hashes, told).take(kept), len(rows) - len(kept)


def disjoint(first: Rows, second: Rows, what: str) -> None:
    """Check by hash that no row is in both.

    Raises:
        CalibrationError: One is.
    """
    if shared := set(first.hashes) & set(second.hashes):
        raise CalibrationError(f"{what} share {len(shared)} rows; none may judge what saw it")


def save_rows(path: Path, rows: Rows, most: int | None = None) -> Rows:
    """Write the first rows to be run again, and return those.

    At most `most`, and what fits 256 MiB, or where it is None what fits 16 MiB. The file is gzipped
    msgpack: per row and input the shape, and the content as on the wire.
    """
    sizes = accumulate(len(_encode(row)) for row in rows.inputs)
    room = _KEPT_BYTES if most is None else _MOST_KEPT_BYTES
    kept = rows.take(range(len([*takewhile(room.__ge__, sizes)]))[:_KEPT_ROWS][:most])
    stored = msgspec.msgpack.encode([msgspec.Raw(_encode(row)) for row in kept.inputs])
    path.write_bytes(gzip.compress(stored, compresslevel=6, mtime=0))
    return kept


def load_rows(path: Path, signature: Signature, most: int | None = None) -> Rows:
    """Return what `save_rows` kept, or the first `most` of it, without a look at the others.

    Raises:
        VerificationError: The file cannot be read, holds more than is ever kept, a row twice, or
            one that the model does not take.
    """
    try:
        with gzip.open(path) as stream:
            content = stream.read(_MOST_KEPT_BYTES + 64)  # what is longer is cut, and so refused
        stored = msgspec.msgpack.decode(content, type=_AtMost)
        read = (msgspec.msgpack.decode(row, type=_Stored) for row in stored[:most])
        rows, kept = _distinct((_tensors(row, signature) for row in read), signature, path.name)
    except (*_UNREADABLE, msgspec.MsgspecError, CalibrationError) as e:
        raise VerificationError(f"{path.name} cannot be read: {shorten(str(e), 200)}") from None
    if len(kept) < len(rows):
        raise VerificationError(f"{path.name}: a row is listed twice")
    return Rows(list(rows.inputs), None, rows.hashes)  # they are in memory


def _load(data: Data, names: list[str], what: str) -> dict[str, Array]:
    if isinstance(data, Mapping):
        return _named(data, names, what)
    path = Path(data)
    try:
        if path.suffix == ".npy" and len(names) == 1:
            return {names[0]: np.asarray(np.lib.format.open_memmap(path, mode="r"))}
        if path.suffix == ".npz":
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
                given = _named(dict.fromkeys(archive), names, what)  # before any is unpacked
                return {name: _member(archive, name, stream) for name in given}
    except _UNREADABLE as error:
        why = shorten(str(error), 200)
        raise CalibrationError(f"{what}: {path.name} cannot be read: {why}") from None
    raise CalibrationError(f"{what}: {path.name}: .npz is needed (.npy for a model with one input)")


def _named(arrays: Mapping[str, Any], names: list[str], what: str) -> dict[str, Array]:
    """Return all arrays if they have the right names."""
    if not set(arrays) ^ set(names) <= {LABEL}.difference(names):
        got = shorten(", ".join(map(repr, arrays)), 150) or "nothing"
        need = shorten(", ".join(map(repr, names)), 150)
        raise CalibrationError(f"{what}: got arrays {got}, needed {need} and optionally {LABEL!r}")
    return dict(arrays)


def _member(archive: Any, name: str, stream: BinaryIO) -> Array:
    """Return an array of an archive: mapped, where it is stored as it is."""
    if (info := archive.zip.NameToInfo.get(f"{name}.npy")) is None or info.compress_type:
        return np.asarray(archive[name])
    stream.seek(info.header_offset + 26)  # the lengths of its name, and of what follows that
    start = info.header_offset + 30 + int(np.frombuffer(stream.read(4), "<u2").sum())
    whole = np.asarray(np.memmap(stream, np.uint8, "r", start, (info.file_size,)))
    if zlib.crc32(whole.data) != info.CRC:
        raise zipfile.BadZipFile(f"{name} has changed since it was written")
    stream.seek(start + np.lib.format.MAGIC_LEN)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject:
        raise ValueError(f"{name!r} holds objects of Python; of texts make an array of str")
    return whole[stream.tell() - start :].view(dtype).reshape(shape, order="F" if fortran else "C")


def _column(array: Array, spec: TensorSpec, what: str) -> Array:
    """Return rows along a new first axis; a table of one column may be without its second.

    Raises:
        CalibrationError: They lack an axis, and it is not clear that it is the batch: where steps
            come first, each row would be one step of a batch of steps.
    """
    array = array[:, np.newaxis] if (array.ndim, *spec.shape[1:]) == (1, 1) else array
    first, *others = spec.shape or (1,)
    more, axis = array.ndim - len(spec.shape), spec.batch_axis  # 1: each row has all dimensions
    unclear = isinstance(first, str) and "batch" not in first.lower()
    unclear = unclear and (more == 1 and axis == 0 and array.shape[1] > 1 if more else axis is None)
    if unclear and any(isinstance(one, str) for one in others):
        name, shape = shorten(spec.name, 40), shorten(", ".join(map(str, spec.shape)), 90)
        got = f"{what}: {name!r} is {[*array.shape]}, and dimension 0 of [{shape}] is not known"
        yes = (f"[inputs.{name}] in --axes FILE says batch = 0", "a row has a dimension less")[more]
        no = f"if not, {len(array)} rows of [{shape}] are needed, and that table empty"
        raise CalibrationError(f"{got} to be the batch: if it is, {yes}; {no}")
    return array if more else array[:, np.newaxis]


def _fitted(row: Any, spec: TensorSpec) -> Any:
    """Return an array in the declared datatype if only rounding is lost; else as it is."""
    wanted = protocol.DATATYPES[spec.datatype]
    kinds = {wanted.kind, "" if isinstance(row, Tensor) else row.dtype.kind}
    if kinds != {"f"} and not kinds <= set("biu"):
        return row
    with np.errstate(over="ignore"):  # what does not fit becomes infinity, and is refused
        converted = np.require(row, wanted, ["A"])
    return converted if kinds == {"f"} or (converted == row).all() else row


def _groups(column: Array, name: str, what: str) -> Array:
    """Return the group of each row as text."""
    if column.ndim != 1 or column.dtype.kind not in "biuUOS":
        got = f"{column.dtype} {list(column.shape)}"
        raise CalibrationError(f"{what}: {name!r} must be one text or integer per row, got {got}")
    values = [v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in column]
    if not 2 <= (count := len(set(values))) <= _MOST_GROUPS:
        allowed = f"2 to {_MOST_GROUPS} are allowed"
        raise CalibrationError(f"{what}: {name!r} has {count} groups, {allowed}")
    return np.array(values)


def _distinct(
    given: Iterable[Mapping[str, Any]], signature: Signature, what: str
) -> tuple[Rows, list[int]]:
    """Return the rows, each checked and trimmed; and which stay, one of equal ones, drawn.

    Their labels and groups may differ, and be sorted: the first would not speak for the others.

    Raises:
        CalibrationError: The model does not take a row.
    """
    inputs, hashes = _Read(), list[bytes]()

    def read(row: Mapping[str, Any]) -> list[Array]:
        fitted = {s.name: _fitted(row[s.name], s) for s in signature.inputs}
        request = protocol.InferenceRequest(model_name="", inputs=fitted)
        return _trim(validate(request, signature, _ONE_ROW).arrays, signature)

    for i, row in enumerate(given):
        try:
            hashes.append(hashlib.sha256(_encode(read(row))).digest())
        except RequestError as error:
            raise CalibrationError(f"{what}: row {i}: {shorten(str(error), 200)}") from None
        inputs.data.append(partial(read, row))
    order = np.random.default_rng(0).permutation(len(hashes)).tolist()
    return Rows(inputs, None, hashes), sorted({hashes[i]: i for i in order}.values())


def _trim(row: Sequence[Array], signature: Signature) -> list[Array]:
    """Cut off the end of the length axis where every input holds its pad value."""
    axes = {i: s.length_axis for i, s in enumerate(signature.inputs) if s.length_axis is not None}
    filled = (np.nonzero(row[i] != signature.inputs[i].pad_value)[axis] for i, axis in axes.items())
    used = max((int(places.max(initial=0)) + 1 for places in filled), default=1)
    return [a.take(range(used), axes[i]) if i in axes else a for i, a in enumerate(row)]


def _encode(row: list[Array]) -> bytes:
    """Return a row as it is stored and hashed; the signature knows names and datatypes."""
    tensors = [(a.shape, encode_bytes(a) if a.dtype == np.object_ else a.tobytes()) for a in row]
    return msgspec.msgpack.encode(tensors)


def _tensors(row: _Stored, signature: Signature) -> dict[str, Tensor]:
    return {
        spec.name: Tensor(name=spec.name, datatype=spec.datatype, shape=shape, data=data)
        for spec, (shape, data) in zip(signature.inputs, row, strict=True)
    }
