"""Values as hosts receive them, fitted to the tensors that a model declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lrai_core import InvalidTensor, RequestError, TensorSpec

Array = NDArray[Any]

_INTEGERS: Final = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
EXACT: Final = 1 << 53  # below it, whole numbers are float64's own
_MOST_DEPTH: Final = 64  # of lists in lists: numpy's most dimensions
_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "BYTES": np.dtype(np.object_),
    **{name.upper(): np.dtype(name) for name in _INTEGERS},
    **{f"FP{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
}


def dtype_of(datatype: str) -> np.dtype[Any]:
    """Return the numpy dtype of a datatype of the Open Inference Protocol; objects for BYTES.

    Raises:
        RequestError: The protocol has no such datatype.
    """
    try:
        return _DTYPES[datatype]
    except KeyError:
        raise RequestError(f"{datatype[:20]!r} is not a datatype of the protocol") from None


def datatype_of(array: Array) -> str:
    """Return the protocol's name of an array's datatype, BYTES where it is none of numbers."""
    return next((name for name, dtype in _DTYPES.items() if dtype == array.dtype), "BYTES")


def by_name(data: Any, inputs: Sequence[TensorSpec]) -> dict[str, Any]:
    """Return values by input name, of what was given in one of the usual forms.

    Args:
        data: Columns, a mapping of input names; records, a list of such mappings with the same
            keys, one per row; or, for a model with one input, the values themselves.
        inputs: What the model declares.

    Raises:
        RequestError: It is none of these.
    """
    names = [spec.name for spec in inputs]
    if isinstance(data, Mapping):
        return {str(name): value for name, value in data.items()}
    if isinstance(data, list) and data and all(isinstance(record, Mapping) for record in data):
        keys = data[0].keys()
        for row, record in enumerate(data):
            if record.keys() != keys:
                raise RequestError(f"record {row} has other names than the first one")
        return {str(name): [record[name] for record in data] for name in keys}
    if len(names) == 1 and isinstance(data, np.ndarray | list):
        return {names[0]: data}
    raise RequestError(
        f"got a {type(data).__name__}; needed: values by input name, or records, with "
        + ", ".join(map(repr, names))
    )


def fit(given: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Return arrays of what was given by name, as the model takes them where nothing is lost.

    A column of scalars becomes [rows, 1] where the model has that shape. A real number is rounded
    to the model's precision, as JSON knows one only; no other value is changed. Numbers that do not
    fit keep their own dtype, for the runtime to refuse.

    Raises:
        InvalidTensor: The rows of a tensor have different shapes, or there is more than numbers in
            one of numbers.
    """
    specs = {spec.name: spec for spec in inputs}
    return {name: _fit(name, value, specs.get(name)) for name, value in given.items()}


def lossless(array: Array, wanted: np.dtype[Any]) -> Array:
    """Return `array` with the dtype that is wanted, or as it is where that would change a value."""
    if array.dtype == wanted or array.dtype.kind not in "biuf" or wanted.kind not in "biuf":
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(wanted)
    real = array.dtype.kind == wanted.kind == "f"
    return cast if real or np.array_equal(cast, array) else array


def array_of(name: str, value: Any, wanted: np.dtype[Any]) -> Array:
    """Return numbers or texts, nested or not, as an array; null among real numbers is NaN.

    Raises:
        InvalidTensor: The rows have different shapes.
    """
    if isinstance(value, np.ndarray) and value.dtype == wanted and wanted.kind != "O":
        return value  # as hosts have it that go by a schema
    try:
        if wanted.kind == "O" and not isinstance(value, np.ndarray):
            return np.asarray(value, dtype=np.object_)  # numpy's own texts lose NULs at their ends
        if wanted.kind != "O" and _holds_text(value):  # of which numpy makes each as long as any
            return np.asarray(value, None if isinstance(value, np.ndarray) else np.object_)
        array = np.asarray(value)
        if array.dtype.kind == "O" and wanted.kind == "f":
            array = np.asarray(value, dtype=np.float64)
        elif array.dtype.kind in "iu" and wanted.kind == "f":
            array = array.astype(np.float64)  # JSON has one kind of number, whoever has parsed it
        elif isinstance(value, list) and array.dtype.kind == "f" and wanted.kind in "iu":
            exact = np.asarray(value, dtype=np.object_)  # of which float64 would round some
            cast = exact.astype(wanted)
            real = (one for one in exact.ravel().tolist() if isinstance(one, float))
            rounded = any(abs(one) >= EXACT for one in real)
            return array if rounded or (cast.astype(np.object_) != exact).any() else cast
    except (TypeError, ValueError, OverflowError, MemoryError) as error:
        if "inhomogeneous" in str(error):
            raise InvalidTensor(name, "its rows have different shapes") from None
        raise InvalidTensor(name, f"holds what is no {wanted}") from None
    fitted = lossless(array, wanted)
    if fitted is not array and np.any(np.isinf(fitted) & np.isfinite(array)):
        raise InvalidTensor(name, f"holds a number beyond what {wanted} can")
    return fitted


def _holds_text(value: Any) -> bool:
    level, depth = [value], 0
    while depth <= _MOST_DEPTH:  # deeper, it is no array
        kinds = set(map(type, level))
        if any(issubclass(kind, str | bytes | np.str_ | np.bytes_) for kind in kinds):
            return True
        if np.ndarray in kinds and any(_is_text(v) for v in level if isinstance(v, np.ndarray)):
            return True
        if not kinds & {list, tuple}:
            return False
        lists = (one for one in level if isinstance(one, list | tuple))
        level, depth = list(chain.from_iterable(lists)), depth + 1
    return False


def _is_text(array: Array) -> bool:
    kind = array.dtype.kind
    return kind in "US" or (kind == "O" and any(isinstance(v, str | bytes) for v in array.flat))


def text(output: Array) -> Array:
    """Return `output` with text in place of the protocol's bytes."""
    if output.dtype.kind != "O":
        return output
    decode = np.frompyfunc(lambda item: item.decode() if isinstance(item, bytes) else item, 1, 1)
    return np.asarray(decode(output), dtype=np.object_)


def _fit(name: str, value: Any, spec: TensorSpec | None) -> Array:
    if spec is None:  # an input that the model does not have, which the runtime names
        return np.zeros(0)
    array = array_of(name, value, dtype_of(spec.datatype))
    if array.dtype.kind == "O" and spec.datatype != "BYTES":  # a shared runtime takes it for text
        what = f"holds text, null, objects or too large a number: the model takes {spec.datatype}"
        raise InvalidTensor(name, what)
    if array.ndim == 1 and len(spec.shape) == 2 and spec.shape[1] == 1:
        return array.reshape(-1, 1)
    return array
