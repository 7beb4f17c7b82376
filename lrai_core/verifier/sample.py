"""Rows to judge a model on: read from untrusted files, checked, told apart by their hash."""

from __future__ import annotations

import hashlib
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from lrai_core.config import LimitsConfig
from lrai_core.errors import CalibrationError, RequestError, VerificationError, shorten
from lrai_core.protocol import DATATYPES, Array, InferenceRequest, Signature, TensorSpec, validate

LABEL: Final = "label"
_ROW_HASHES: Final = "row_sha256"
_INPUT: Final = "input/"
_KEPT_BYTES: Final = 16 << 20
_PADDED_BYTES: Final = 128 << 20  # of the same rows as they are stored
_LOADED_BYTES: Final = 256 << 20  # with the hashes
_ONE_ROW: Final = LimitsConfig(request_bytes=sys.maxsize, request_rows=1, nan_policy="reject")
_UNREADABLE: Final = (  # what numpy and zipfile raise on bytes that are not theirs
    OSError, ValueError, EOFError, LookupError, TypeError, RuntimeError, SyntaxError, MemoryError,
    OverflowError, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rows:
    """Single-row inputs, each without the padding that its length axis makes superfluous.

    Attributes:
        inputs: Per row one array per input, in the signature's order.
        labels: One label per row, or None.
        hashes: sha256 of each row's content.
    """

    inputs: list[list[Array]]
    labels: Array | None
    hashes: list[bytes]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.inputs)

    def take(self, indices: Sequence[int]) -> Rows:
        """Return the rows at these indices."""
        return Rows(
            [self.inputs[i] for i in indices],
            None if self.labels is None else self.labels[list(indices)],
            [self.hashes[i] for i in indices],
        )


def digest(hashes: Sequence[bytes]) -> str:
    """Return the sha256 over all row hashes, in order."""
    return hashlib.sha256(b"".join(hashes)).hexdigest()


def read_rows(
    data: str | Path | Mapping[str, Any], signature: Signature, what: str
) -> tuple[Rows, int]:
    """Return the distinct rows of `data`, and how many repeated rows were left out.

    Args:
        data: `.npz` with one array per input (rows along the first axis) and optionally `label`;
            `.npy` for a model with one input; or the same as a mapping.
        signature: Of the model.
        what: What the data is for, for messages: `evaluation`, `calibration`.

    Raises:
        CalibrationError: Missing, unreadable, empty, wrong names, datatypes or shapes, or NaN.
    """
    names = {spec.name for spec in signature.inputs}
    loaded = data if isinstance(data, Mapping) else _load(Path(data), signature, what)
    arrays = {name: np.atleast_1d(array) for name, array in loaded.items()}
    counts = sorted({len(array) for array in arrays.values()})
    labels = None if LABEL in names else arrays.pop(LABEL, None)
    if arrays.keys() != names:
        raise CalibrationError(
            f"{what}: got arrays {_list(arrays)}, needed {_list(names)} and optionally {LABEL!r}"
        )
    if len(counts) != 1:
        raise CalibrationError(f"{what}: arrays have different numbers of rows: {counts}")
    if counts == [0]:
        raise CalibrationError(f"{what}: no rows")
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iub"):
        raise CalibrationError(f"{what}: {LABEL!r} must be one integer per row")
    columns = {spec.name: _cast(arrays[spec.name], spec) for spec in signature.inputs}
    ranks = {spec.name: len(spec.shape) for spec in signature.inputs}
    inputs = []
    for i in range(counts[0]):
        row = {
            name: column[i : i + 1] if column.ndim == ranks[name] else np.asarray(column[i])
            for name, column in columns.items()
        }
        try:
            valid = validate(InferenceRequest(model_name="", inputs=row), signature, _ONE_ROW)
        except RequestError as error:
            raise CalibrationError(f"{what}: row {i}: {_brief(error)}") from None
        inputs.append(_trim(valid.arrays, signature))
    hashes = [_hash(row) for row in inputs]
    first = {digest: i for i, digest in reversed(list(enumerate(hashes)))}
    rows = Rows(inputs, labels, hashes).take(sorted(first.values()))
    return rows, len(inputs) - len(rows)


def disjoint(first: Rows, second: Rows, what: str) -> None:
    """Check by hash that no row is in both.

    Raises:
        CalibrationError: One is.
    """
    if shared := set(first.hashes) & set(second.hashes):
        raise CalibrationError(
            f"{what} share {len(shared)} rows; a row may judge only what never saw it"
        )


def kept(rows: Rows) -> int:
    """Return how many of the first rows `save_rows` keeps: those that fit 16 MiB, and no text."""
    size, largest = 0, [0] * len(rows.inputs[0]) if len(rows) else []
    for count, row in enumerate(rows.inputs):
        size += sum(array.nbytes for array in row)
        largest = [max(most, array.nbytes) for most, array in zip(largest, row, strict=True)]
        padded = sum(largest) * (count + 1)
        text = any(array.dtype == np.object_ for array in row)
        if size > _KEPT_BYTES or padded > _PADDED_BYTES or text:
            return count
    return len(rows)


def save_rows(path: Path, rows: Rows, signature: Signature) -> None:
    """Write all hashes, and the first rows (see `kept`), so that a sample can be run again."""
    columns: dict[str, Array] = {
        _ROW_HASHES: np.frombuffer(b"".join(rows.hashes), np.uint8).reshape(-1, 32)
    }
    if count := kept(rows):
        for index, spec in enumerate(signature.inputs):
            columns[_INPUT + spec.name] = _stack([r[index] for r in rows.inputs[:count]], spec)
    np.savez_compressed(path, allow_pickle=False, **columns)


def load_rows(path: Path, signature: Signature) -> tuple[Rows, list[bytes]]:
    """Return what `save_rows` kept, and the hashes of all rows.

    Raises:
        VerificationError: The file cannot be read, a row does not match its hash, or two have one.
    """
    names = {_INPUT + spec.name: spec.name for spec in signature.inputs}
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            size = sum(info.file_size for info in archive.zip.infolist())
            if size > _LOADED_BYTES:
                raise VerificationError(f"{path.name} holds {size} bytes, over {_LOADED_BYTES}")
            hashes = [bytes(row) for row in archive[_ROW_HASHES]]
            arrays = {name: archive[key] for key, name in names.items() if key in archive.files}
    except _UNREADABLE as error:
        raise VerificationError(f"{path.name} cannot be read: {_brief(error)}") from None
    try:
        rows = read_rows(arrays, signature, path.name)[0] if arrays else Rows([], None, [])
    except CalibrationError as error:
        raise VerificationError(str(error)) from None
    if rows.hashes != hashes[: len(rows)]:
        raise VerificationError(f"{path.name}: rows do not match their hashes")
    if len(set(hashes)) != len(hashes):
        raise VerificationError(f"{path.name}: a row is listed twice")
    return rows, hashes


def _load(path: Path, signature: Signature, what: str) -> Mapping[str, Array]:
    names = [spec.name for spec in signature.inputs]
    try:
        if path.suffix == ".npy" and len(names) == 1:
            return {names[0]: np.lib.format.open_memmap(path, mode="r")}
        if path.suffix != ".npz":
            raise CalibrationError(
                f"{what}: {path.name}: .npz is needed (.npy for a model with one input)"
            )
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            if unknown := set(archive.files) - {*names, LABEL}:  # and is not unpacked
                raise CalibrationError(
                    f"{what}: array {shorten(min(unknown))!r} is no input; inputs: {_list(names)}"
                )
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise CalibrationError(f"{what}: {path} does not exist") from None
    except _UNREADABLE as error:
        raise CalibrationError(f"{what}: {path.name} cannot be read: {_brief(error)}") from None


def _cast(column: Array, spec: TensorSpec) -> Array:
    """Return the column in the declared datatype, or as it is if more than rounding were lost."""
    wanted = DATATYPES[spec.datatype]
    floats = column.dtype.kind == wanted.kind == "f"
    if not floats and not (column.dtype.kind in "biu" and wanted.kind in "biu"):
        return column
    with np.errstate(over="ignore"):  # what does not fit becomes infinity, and is refused
        converted = column.astype(wanted, copy=False)
    return converted if floats or (converted == column).all() else column


def _trim(row: Sequence[Array], signature: Signature) -> list[Array]:
    """Cut off the end of the length axis where every input holds its pad value."""
    used, trimmed = 1, list(row)
    for array, spec in zip(row, signature.inputs, strict=True):
        if spec.length_axis is not None:
            filled = np.nonzero(array != spec.pad_value)[spec.length_axis]
            used = max(used, int(filled.max(initial=0)) + 1)
    for index, spec in enumerate(signature.inputs):
        if spec.length_axis is not None:
            trimmed[index] = row[index].take(range(used), spec.length_axis)
    return trimmed


def _stack(arrays: list[Array], spec: TensorSpec) -> Array:
    """Return the arrays along a new first axis, padded to the largest."""
    shape = np.max([array.shape for array in arrays], axis=0).astype(int)
    stacked = np.full((len(arrays), *shape), spec.pad_value, arrays[0].dtype)
    for index, array in enumerate(arrays):
        window: Any = (index, *map(slice, array.shape))
        stacked[window] = array
    return stacked


def _hash(row: list[Array]) -> bytes:
    digest = hashlib.sha256()
    for array in row:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(
            repr(array.tolist()).encode() if array.dtype == np.object_ else array.tobytes()
        )
    return digest.digest()


def _brief(error: BaseException) -> str:
    return shorten(str(error), 200)


def _list(names: Any) -> str:
    return shorten(", ".join(repr(shorten(str(name), 60)) for name in names), 150) or "nothing"
