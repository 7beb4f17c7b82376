"""Which dimensions are batch and length: suggested by the graph, confirmed by running the model.

A dimension is an axis only if the model behaves as if it were one: rows together give what each
gives alone, and padding with 0 changes nothing. A file can state the axes instead.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import chain, islice, product
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from msgspec.structs import asdict, replace

from lrai_core.engine.batching import length_of, run_together, stretch, synthetic_row
from lrai_core.engine.engine import Session
from lrai_core.errors import EngineError, UsageError, shorten
from lrai_core.protocol import Array, OutputMap, Shapes, Signature

_SAME: Final = 1e-4
# Splits of inputs into shorter and longer ones, elements of a short row, rows of a call, elements
# of more than two: at most. (Attention takes the square of how long they are.)
_MOST_SPLITS, _SHORT, _TOGETHER, _AREA = 256, 16, 8, 512
Row = list[Array]

_FINITE: Final = msgspec.Meta(ge=-3.41e38, le=3.41e38)  # as JSON has them, and float32


class _Stated(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an axes file says of one tensor; the field's name is the specification's."""

    batch_axis: int | None = msgspec.field(name="batch", default=None)
    length_axis: int | None = msgspec.field(name="length", default=None)
    pad_value: Annotated[float, _FINITE] = msgspec.field(name="pad", default=0)
    output_map: OutputMap = msgspec.field(name="map", default="raw")


class _AxesFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    inputs: dict[str, dict[str, Any]] = {}
    outputs: dict[str, dict[str, Any]] = {}


def assume_axes(signature: Signature) -> Signature:
    """Return the signature with the axes that the inputs' free dimensions suggest.

    A free dimension 0 common to all inputs, or of matrices and more that have no name for it, is
    taken for the batch axis, the one other free dimension common to all inputs for the length axis.
    """
    free = [{d: axis for axis, d in enumerate(s.shape) if type(d) is str} for s in signature.inputs]
    common = set.intersection(*(set(symbols) for symbols in free))
    batch = {symbol for symbol in common if all(symbols[symbol] == 0 for symbols in free)}
    if not batch and any(s.shape[:-1][:1] != (f"{s.name}.0",) for s in signature.inputs):
        return signature
    others = {s for s in common - batch if all(i.shape.count(s) == 1 for i in signature.inputs)}
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
    pairs = _pairs(assumed, rows, session)
    session.run(pairs[0][1])  # what does not run at all is no question of axes
    longest, single = max(1, length_of(pairs[0][1], assumed)), _with_axes(signature)
    # Two may be alike, or more than two too many, as of what an expert of a mixture takes.
    some = [*chain(*pairs), *(rows or chain(*pairs))][: max(2, min(_TOGETHER, _AREA // longest))]
    if not _together_as_alone(single, session, [stretch(x, assumed, 1, longest) for x in some]):
        return signature, "no batch axis: outputs have no rows, or depend on the rows beside it"
    if assumed.inputs[0].length_axis is None:
        return single, "batch axis 0; no length axis: the inputs share no second free dimension"
    padded = _output_lengths(replace(single, inputs=assumed.inputs), session, pairs[0])
    # Among many elements a few of padding may not show, nor in few rows, as the largest hides 0: so
    # of many the shortest cuts that run are asked, too, beside one that is somewhat longer.
    many = 2 * rows[:: len(rows) // 16 + 1] or [synthetic_row(assumed, n) for n in range(1, 17)]
    for least in range(1, min(_SHORT + 1, longest)):
        with suppress(EngineError):
            cut = [stretch(x, assumed, 1, least + 4 * i // len(many)) for i, x in enumerate(many)]
            cut.append(stretch(some[1], assumed, 1, min(longest, 2 * _SHORT)))
            pairs.append(cut * all(map(session.run, cut)))
            break
    if not all(_together_as_alone(padded, session, group) for group in pairs):
        return single, "batch axis 0; no length axis: padding with 0 changes the outputs"
    if _apart(session, assumed, pairs[0][1]):
        return single, "batch axis 0; no length axis: the inputs need not be of one length"
    if all(length_of(a, assumed) == length_of(b, assumed) for a, b in pairs[:2]):
        return single, "batch axis 0; no length axis: rows of one element do not tell; see --axes"
    if len(rows) < 2 and not any(_tells(session, pair) for pair in pairs[:2]):
        return single, "batch axis 0; no length axis: made-up rows do not tell; give --evaluation"
    return padded, "batch axis 0, length axis found: padding with 0 changes no output"


def apply_axes(signature: Signature, file: Path) -> Signature:
    """Return the signature with the axes that a TOML file states.

    The file has a table per tensor under `inputs` and `outputs`, with `batch`, `length`, `pad` and
    `map`.

    Raises:
        UsageError: It cannot be read, or names what the model does not have.
    """
    try:
        tree = msgspec.toml.decode(file.read_bytes(), type=_AxesFile)
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        problem = shorten(str(error), 200)
        raise UsageError(f"{file}: {problem}; known: tables in inputs and in outputs") from None
    for side in ("inputs", "outputs"):
        specs = {spec.name: spec for spec in getattr(signature, side)}
        for name, table in getattr(tree, side).items():
            if name not in specs:
                problem = f"the model has no {side[:-1]} {shorten(name)!r}; it has {list(specs)}"
                raise UsageError(f"{file}: {problem}")
            try:
                stated = msgspec.convert({"map": specs[name].output_map, **table}, _Stated)
                specs[name] = replace(specs[name], **asdict(stated))
            except ValueError as error:
                problem = f"axes of {shorten(name)!r}: {shorten(str(error), 200)}"
                raise UsageError(f"{file}: {problem}; known: batch, length, pad, map") from None
        signature = replace(signature, **{side: tuple(specs.values())})
    return signature


def with_choices(signature: Signature, output_map: OutputMap, calls: Any) -> Signature:
    """Return the signature with these calls, and this map where none is stated and one makes sense.

    That is on every floating-point output with more than a single element a row, of which a map
    over the last axis would leave nothing.

    Raises:
        UsageError: A call is none of this model, or they are too many.
    """
    outputs = list(signature.outputs)
    for i, spec in enumerate(outputs):
        single = spec.shape[spec.batch_axis is not None :][-1:] in ((), (1,))
        if spec.datatype.startswith("FP") and spec.output_map == "raw" and not single:
            outputs[i] = replace(spec, output_map=output_map)
    has_length = any(spec.length_axis is not None for spec in signature.inputs)
    try:
        shapes = msgspec.convert(calls, Shapes)
        if shapes and not signature.coalescible:
            raise ValueError("the model has no batch axis")
        if {bool(length) for _, length in shapes} - {has_length}:
            raise ValueError("rows and length, as 8x16" if has_length else "rows alone, as 8")
    except ValueError as error:  # msgspec's are
        raise UsageError(f"calls of this model, {shorten(str(calls))}: {error}") from None
    return replace(signature, outputs=tuple(outputs), calls=shapes)


def _with_axes(signature: Signature, lengths: list[int | None] | None = None) -> Signature:
    """Return the signature with batch axis 0 throughout, and these length axes on the inputs."""
    pairs = zip(signature.inputs, lengths or [None] * len(signature.inputs), strict=True)
    inputs = [replace(spec, batch_axis=0, length_axis=axis) for spec, axis in pairs]
    outputs = [replace(spec, batch_axis=0 if spec.shape else None) for spec in signature.outputs]
    return Signature(inputs=tuple(inputs), outputs=tuple(outputs))


def _pairs(signature: Signature, rows: list[Row], session: Session) -> list[list[Row]]:
    """Return pairs of single rows, of different lengths where there is a length axis."""
    if len(rows) < 2:
        a, b, c, d = (synthetic_row(signature, n) for n in (3, 8, 5, 6))
        with suppress(EngineError):  # one integer a row may be a length, which is 1 in all others
            two = [x + x if x.size == 1 and x.dtype.kind in "iu" else x for x in d]
            _, d = session.run(two), two
        # Beside ones, padding is a token that was not there.
        return [[a, b], [[np.ones_like(x) if x.dtype.kind in "iub" else x for x in c], d]]
    ordered = sorted(rows, key=lambda row: length_of(row, signature))
    half = max(1, length_of(ordered[-1], signature) // 2)
    cut = [(row, min(length_of(row, signature), half)) for row in ordered[:: len(rows) // 2][:2]]
    return [[stretch(row, signature, 1, length), ordered[-1]] for row, length in cut]


def _together_as_alone(signature: Signature, session: Session, rows: list[Row]) -> bool:
    with suppress(ValueError, EngineError):
        return all(map(_same, map(session.run, rows), run_together(session, rows, signature)))
    return False


def _output_lengths(signature: Signature, session: Session, pair: list[Row]) -> Signature:
    """Return the signature with a length axis on each output that grows with the inputs'.

    Of a model that does not run on the shorter row, none does.
    """
    lengths = tuple(length_of(row, signature) for row in pair)
    outputs, answers = [], [session.run(pair[1])] * 2
    with suppress(EngineError):
        answers[0] = session.run(pair[0])
    for a, b, spec in zip(*answers, signature.outputs, strict=True):
        moved = [axis for axis in range(1, a.ndim) if (a.shape[axis], b.shape[axis]) == lengths]
        outputs.append(replace(spec, length_axis=moved[0] if len(moved) == 1 else None))
    return Signature(inputs=signature.inputs, outputs=tuple(outputs))


def _same(first: Row, second: Row) -> bool:
    return all(a.shape == b.shape and _alike(a, b) for a, b in zip(first, second, strict=True))


def _alike(a: Array, b: Array) -> bool:
    """Return whether they are, but for rounding: of what is small altogether, by its own size."""
    if a.dtype == np.object_:
        return bool((a == b).all())
    size = np.abs(a.astype(np.float64)).max(initial=0.01, where=np.isfinite(a))
    return np.allclose(a, b, _SAME, _SAME * min(1.0, size), equal_nan=True)


def _apart(session: Session, signature: Signature, row: Row) -> bool:
    """Return whether some inputs may be longer than others, as of two texts, and it matters."""
    short, long = (stretch(row, signature, 1, length) for length in (2, 3))
    for x in islice(product(short[:1], *zip(short[1:], long[1:], strict=True)), 1, _MOST_SPLITS):
        with suppress(EngineError):
            if not _same(session.run([*x]), session.run(short)):  # else nothing reads the longer
                return True
    return False


def _tells(session: Session, pair: list[Row]) -> bool:
    """Return whether numbers with fractions differ between rows: labels may stay, come what may."""
    both = zip(*map(session.run, pair), strict=True)
    cut = ((a, b, tuple(map(slice, map(min, a.shape, b.shape)))) for a, b in both)  # one is longer
    return any(a.dtype.kind == "f" and not _same([a[at]], [b[at]]) for a, b, at in cut)
