"""Which dimensions are batch and length: suggested by the graph, confirmed by running the model.

A dimension is an axis only if the model behaves as if it were one: rows together give what each
gives alone, and padding with 0 changes nothing. A file can state the axes instead.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from lrai_core.engine.batching import coalesce, split, synthetic_row
from lrai_core.engine.engine import Session
from lrai_core.errors import UsageError, shorten
from lrai_core.protocol import Array, OutputMap, Signature, TensorSpec

_SAME: Final = 1e-4
_FILE_KEYS: Final = {
    "batch": "batch_axis",
    "length": "length_axis",
    "pad": "pad_value",
    "map": "output_map",
}
Row = list[Array]


def assume_axes(signature: Signature) -> Signature:
    """Return the signature with the axes that the inputs' free dimensions suggest.

    A free dimension 0 common to all inputs is taken for the batch axis, the one other free
    dimension common to all inputs for the length axis.
    """
    free = [
        {symbol: axis for axis, symbol in enumerate(spec.shape) if isinstance(symbol, str)}
        for spec in signature.inputs
    ]
    common = set.intersection(*(set(symbols) for symbols in free))
    batch = {symbol for symbol in common if all(symbols[symbol] == 0 for symbols in free)}
    if not batch:
        return signature
    others = common - batch
    symbol = others.pop() if len(others) == 1 else ""
    return _with_axes(signature, [symbols.get(symbol) for symbols in free])


def confirm_axes(
    signature: Signature, assumed: Signature, session: Session, rows: list[Row]
) -> tuple[Signature, str]:
    """Return the signature with the axes that the model really has, and what was found.

    Args:
        signature: As declared, without axes.
        assumed: From `assume_axes`.
        session: The source model.
        rows: Real single rows read with `assumed`; where there are none, ones are tried.
    """
    if assumed.inputs[0].batch_axis is None:
        return signature, "no batch axis: the inputs share no free first dimension"
    pairs = _pairs(assumed, rows)
    single = _with_axes(signature, [None] * len(signature.inputs))
    alike = [(stretch(a, assumed, 1, length_of(b, assumed)), b) for a, b in pairs]
    if not all(_together_as_alone(single, session, pair) for pair in alike):
        return signature, "no batch axis: a row's outputs depend on the rows beside it"
    if assumed.inputs[0].length_axis is None:
        return single, "batch axis 0; no length axis: the inputs share no second free dimension"
    padded = _output_lengths(
        Signature(inputs=assumed.inputs, outputs=single.outputs), session, pairs[0]
    )
    if all(_together_as_alone(padded, session, pair) for pair in pairs):
        return padded, "batch axis 0, length axis found: padding with 0 changes no output"
    return single, "batch axis 0; no length axis: padding with 0 changes the outputs"


def apply_axes(signature: Signature, file: Path) -> Signature:
    """Return the signature with the axes that a TOML file states.

    The file has a table per tensor under `inputs` and `outputs`, with `batch`, `length`, `pad` and
    `map`.

    Raises:
        UsageError: It cannot be read, or names what the model does not have.
    """
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: {error}") from None
    sides = {"inputs": signature.inputs, "outputs": signature.outputs}
    if unknown := set(tree) - set(sides):
        raise UsageError(f"{file}: unknown table {shorten(min(unknown))!r}; known: inputs, outputs")
    for side, specs in sides.items():
        stated: Mapping[str, Mapping[str, Any]] = tree.get(side, {})
        names = [spec.name for spec in specs]
        if strangers := set(stated) - set(names):
            name = shorten(min(strangers))
            raise UsageError(f"{file}: the model has no {side[:-1]} {name!r}; it has {names}")
        if bad := {key for table in stated.values() for key in table} - set(_FILE_KEYS):
            known = ", ".join(_FILE_KEYS)
            raise UsageError(f"{file}: {shorten(min(bad))!r} is unknown; known: {known}")
        sides[side] = tuple(_stated(spec, stated.get(spec.name, {})) for spec in specs)
    return Signature(inputs=sides["inputs"], outputs=sides["outputs"])


def _stated(spec: TensorSpec, table: Mapping[str, Any]) -> TensorSpec:
    changed = {_FILE_KEYS[key]: value for key, value in table.items()}
    try:
        return msgspec.convert(msgspec.structs.asdict(spec) | changed, TensorSpec)
    except msgspec.ValidationError as error:
        raise UsageError(f"axes of {shorten(spec.name)!r}: {error}") from None


def with_output_map(signature: Signature, output_map: OutputMap) -> Signature:
    """Return the signature with this map on every floating-point output."""
    return Signature(
        inputs=signature.inputs,
        outputs=tuple(
            msgspec.structs.replace(spec, output_map=output_map)
            if spec.datatype.startswith("FP")
            else spec
            for spec in signature.outputs
        ),
    )


def stretch(row: Row, signature: Signature, rows: int, length: int) -> Row:
    """Return `row` repeated to `rows`, and along its length axis repeated or cut to `length`."""
    stretched = []
    for array, spec in zip(row, signature.inputs, strict=True):
        result = array
        if (axis := spec.length_axis) is not None:
            result = np.take(result, np.arange(length) % result.shape[axis], axis=axis)
        if spec.batch_axis is not None and rows != 1:
            result = np.repeat(result, rows, axis=0)
        stretched.append(np.ascontiguousarray(result))
    return stretched


def length_of(row: Row, signature: Signature) -> int:
    """Return the extent of the length axis, 0 where there is none."""
    for array, spec in zip(row, signature.inputs, strict=True):
        if spec.length_axis is not None:
            return int(array.shape[spec.length_axis])
    return 0


def _with_axes(signature: Signature, lengths: list[int | None]) -> Signature:
    """Return the signature with batch axis 0 throughout, and these length axes on the inputs."""
    replace = msgspec.structs.replace
    return Signature(
        inputs=tuple(
            replace(spec, batch_axis=0, length_axis=axis)
            for spec, axis in zip(signature.inputs, lengths, strict=True)
        ),
        outputs=tuple(replace(spec, batch_axis=0) for spec in signature.outputs),
    )


def _pairs(signature: Signature, rows: list[Row]) -> list[tuple[Row, Row]]:
    """Return pairs of single rows, of different lengths where there is a length axis."""
    if len(rows) < 2:
        lengths = ((3, 8), (5, 6))
        return [(synthetic_row(signature, a), synthetic_row(signature, b)) for a, b in lengths]
    ordered = sorted(rows, key=lambda row: length_of(row, signature))
    pairs = []
    for short in (ordered[0], ordered[len(rows) // 2]):
        length = min(length_of(short, signature), max(1, length_of(ordered[-1], signature) - 1))
        pairs.append((stretch(short, signature, 1, length), ordered[-1]))
    return pairs


def _together_as_alone(signature: Signature, session: Session, pair: tuple[Row, Row]) -> bool:
    lengths = [length_of(row, signature) for row in pair]
    together = session.run(coalesce(pair, signature))
    try:
        parts = split(together, signature.outputs, [1, 1], lengths)
    except ValueError:
        return False
    return all(_same(session.run(row), part) for row, part in zip(pair, parts, strict=True))


def _output_lengths(signature: Signature, session: Session, pair: tuple[Row, Row]) -> Signature:
    """Return the signature with a length axis on each output that grows with the inputs'."""
    lengths = tuple(length_of(row, signature) for row in pair)
    outputs = []
    for a, b, spec in zip(*map(session.run, pair), signature.outputs, strict=True):
        moved = [axis for axis in range(1, a.ndim) if (a.shape[axis], b.shape[axis]) == lengths]
        axis = moved[0] if len(moved) == 1 else None
        outputs.append(msgspec.structs.replace(spec, length_axis=axis))
    return Signature(inputs=signature.inputs, outputs=tuple(outputs))


def _same(first: Row, second: Row) -> bool:
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            return False
        if a.dtype.kind not in "fiub":
            if not np.array_equal(a, b):
                return False
        elif not np.allclose(a, b, rtol=_SAME, atol=_SAME, equal_nan=True):
            return False
    return True
