"""Requests and responses of the Open Inference Protocol, and the one place that checks them.

Everything behind `validate` trusts what it returns: arrays of the declared datatype and rank, whose
element count matches their bytes, with one row count and one length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from lrai_core.config import LimitsConfig
from lrai_core.errors import InvalidTensor, RequestError, shorten

Array = NDArray[Any]
OutputMap = Literal["raw", "softmax", "l2_normalised", "derived"]

_INTEGERS: Final = [f"{sign}INT{bits}" for sign in ("U", "") for bits in (8, 16, 32, 64)]
DATATYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    **{name: np.dtype(name.lower()) for name in _INTEGERS},
    **{f"FP{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "BYTES": np.dtype(np.object_),
}
_DATATYPE_OF: Final = {dtype: name for name, dtype in DATATYPES.items()}
_MAX_DIMENSIONS: Final = 16
_TEXT_BYTES: Final = 64  # of memory, at least, that an element of a BYTES tensor takes


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a model declares about one input or output.

    Attributes:
        name: As in the ONNX graph.
        datatype: A key of `DATATYPES`.
        shape: One entry per dimension: an integer, or the symbol of a free dimension.
        batch_axis: 0 where rows can be coalesced along dimension 0, else None.
        length_axis: The dimension that may be padded, else None.
        pad_value: What fills the padded part of an input; outputs are sliced back.
        output_map: How differences on an output are judged; what is `derived` from another output,
            like the largest of its elements, by that one alone.
    """

    name: str
    datatype: str
    shape: tuple[int | str, ...]
    batch_axis: int | None = None
    length_axis: int | None = None
    pad_value: float = 0
    output_map: OutputMap = "raw"

    def __post_init__(self) -> None:
        """Refuse axes that the shape does not have."""
        length = self.length_axis
        if self.datatype not in DATATYPES:
            raise ValueError(f"datatype {shorten(self.datatype)!r} of {self.name!r} is unknown")
        if self.batch_axis not in (None, 0) or (self.batch_axis == 0 and not self.shape):
            raise ValueError(f"batch axis {self.batch_axis} of {self.name!r}: only 0 can be one")
        if length is not None and not 0 < length < len(self.shape):
            raise ValueError(f"length axis {length} of {self.name!r} is none of its dimensions")


Specs = Sequence[TensorSpec]
# Of a call: its rows, and the length that they are padded to, 0 where there is none.
_Rows = Annotated[int, msgspec.Meta(ge=1, le=4096)]
_Length = Annotated[int, msgspec.Meta(ge=0, le=65536)]
Shapes = Annotated[tuple[tuple[_Rows, _Length], ...], msgspec.Meta(max_length=64)]


class Signature(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """Inputs and outputs of a model, in the graph's order.

    Attributes:
        inputs: What a request has.
        outputs: What an answer has.
        calls: Those that come most, if somebody has said so: forms are measured and judged in them,
            and engines that gain by it are compiled for them.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    calls: Shapes = ()

    @cached_property
    def passed(self) -> dict[tuple[Any, ...], ValidRequest]:
        """What was valid so far, without arrays, by form; see `wire.forms`."""
        return {}

    @cached_property
    def coalescible(self) -> bool:
        """Whether rows of different requests may share a call: every tensor has a batch axis."""
        return all(spec.batch_axis == 0 for spec in (*self.inputs, *self.outputs))


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor as a host received it: not yet checked.

    `data` is the little-endian, row-major content; BYTES elements are each preceded by their length
    as a 32-bit integer (Open Inference Protocol, binary tensor data extension).
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One caller's tensors for one model.

    Attributes:
        inputs: Arrays by input name, or unchecked `Tensor`s by input name. Arrays are not copied:
            do not write to them before the answer is there.
        outputs: Names of the outputs wanted, in that order; empty for all.
        timeout_ms: How long the caller will wait, from arrival. None for the configured default.
    """

    model_name: str
    inputs: Mapping[str, Array | Tensor]
    model_version: str = ""
    id: str = ""
    outputs: tuple[str, ...] = ()
    timeout_ms: float | None = None
    parameters: Mapping[str, Any] = msgspec.field(default_factory=dict)


class InferenceResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one request; `parameters` name the variant and the certificate behind it."""

    model_name: str
    model_version: str
    id: str
    outputs: Mapping[str, Array]
    parameters: Mapping[str, Any]


class ValidRequest(msgspec.Struct, frozen=True):
    """What the scheduler trusts.

    Attributes:
        arrays: C-contiguous, in the order of the signature's inputs, of the declared dtype.
        rows: Items along the batch axis, at least 1; 1 where there is none.
        length: Extent of the length axis, 0 where there is none.
        outputs: Indices into the signature's outputs, in the caller's order.
        group: What must be equal for two requests to share a call.
        nbytes: Bytes of all arrays.
    """

    arrays: tuple[Array, ...]
    rows: int
    length: int
    outputs: tuple[int, ...]
    group: tuple[Any, ...]
    nbytes: int


def datatype_of(dtype: np.dtype[Any]) -> str:
    """Return the Open Inference Protocol name of a numpy dtype, strings as BYTES.

    Raises:
        RequestError: The protocol has no such datatype.
    """
    if dtype.kind in "OSU":
        return "BYTES"
    if (found := _DATATYPE_OF.get(dtype.newbyteorder("="))) is None:
        raise RequestError(f"dtype {dtype} is not a datatype of the protocol")
    return found


def validate(request: InferenceRequest, signature: Signature, limits: LimitsConfig) -> ValidRequest:
    """Check `request` against `signature` once, and return what may be trusted from then on.

    Raises:
        InvalidTensor: A tensor is unknown, missing, or of the wrong datatype, rank, dimension or
            size.
        RequestError: Too many rows or bytes, or an output that the model does not have.
    """
    known = {spec.name: spec for spec in signature.inputs}
    if wrong := [name for name in request.inputs if name not in known]:
        raise InvalidTensor(wrong[0], f"the model has no such input; it has {_names(known)}")
    arrays, nbytes = list[Array](), 0
    for name, spec in known.items():
        if name not in request.inputs:
            raise InvalidTensor(name, "missing")
        try:
            array = _array(request.inputs[name], spec, limits.request_bytes - nbytes)
            _check_shape(array.shape, spec)
        except ValueError as error:
            raise InvalidTensor(name, str(error)) from None
        nbytes += array.nbytes + (sum(map(len, array.flat)) if spec.datatype == "BYTES" else 0)
        if nbytes > limits.request_bytes:
            words = f"{nbytes} bytes; one request has {limits.request_bytes} at most"
            raise RequestError(f"{words}, see limits.request_bytes")
        check_values(array, spec, limits)
        arrays.append(array)
    rows, length = _extents(arrays, signature.inputs)
    if rows > limits.request_rows:
        raise RequestError(f"{rows} rows, at most {limits.request_rows}: see limits.request_rows")
    outputs = _outputs(request.outputs, signature)
    group = _group(arrays, signature) if signature.coalescible else (object(),)
    return ValidRequest(tuple(arrays), rows, length, outputs, group, nbytes)


def encode_bytes(array: Array, room_bytes: int = 1 << 62) -> bytes:
    """Return the protocol's wire form of a BYTES tensor: length-prefixed elements, row-major.

    Raises:
        ValueError: An element is no text, or they are more than fit `room_bytes`.
    """
    check_texts("BYTES", array.shape, room_bytes)
    texts = [_text(element).encode() for element in array.ravel()]
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


def decode_bytes(data: bytes | memoryview, count: int) -> Array:
    """Return `count` elements of a BYTES tensor as an object array of `str`.

    Raises:
        ValueError: The data holds more or fewer elements, or an element is cut short or not UTF-8.
    """
    view, position = memoryview(data), 0
    if count * 4 > len(view):
        raise ValueError(f"{len(view)} bytes cannot hold {count} length-prefixed elements")
    elements = np.empty(count, dtype=np.object_)
    for index in range(count):
        end = position + 4
        position = end + int.from_bytes(view[position:end], "little")
        if end > len(view) or position > len(view):
            raise ValueError(f"element {index} is cut short")
        elements[index] = _text(bytes(view[end:position]))
    if position != len(view):
        raise ValueError(f"{len(view) - position} bytes are left over after {count} elements")
    return elements


def check_texts(datatype: str, shape: Iterable[int], room_bytes: int) -> None:
    """Count what is of BYTES before any of it is read: whoever reads texts has no other work.

    Raises:
        ValueError: It is more than fits `room_bytes`.
    """
    if datatype == "BYTES" and (count := math.prod(shape)) > (most := room_bytes // _TEXT_BYTES):
        raise ValueError(f"{count} elements, at most {most} are left for this request")


def as_text(array: Array) -> Array:
    """Return an array of strings or UTF-8 bytes as an object array of `str`, as engines take it.

    Raises:
        ValueError: An element is neither.
    """
    return np.array([_text(each) for each in array.ravel()], np.object_).reshape(array.shape)


def _text(element: object) -> str:
    try:
        if isinstance(element, bytes):
            return element.decode()
        if isinstance(element, str):
            element.encode()  # half a surrogate pair is no text
            return str(element)
    except UnicodeError:
        raise ValueError("an element is not UTF-8 text") from None
    raise ValueError(f"an element is a {type(element).__name__}, text is needed")


def _array(given: Array | Tensor, spec: TensorSpec, room_bytes: int) -> Array:
    """Return what was given as an array; a `ValueError` says why it cannot be one."""
    if not isinstance(given, Tensor | np.ndarray):
        raise InvalidTensor(spec.name, f"got a {type(given).__name__}, a numpy array is needed")
    got = given.datatype if isinstance(given, Tensor) else datatype_of(given.dtype)
    if got != spec.datatype:
        raise ValueError(f"datatype {shorten(got, 20)}, the model takes {spec.datatype}")
    if isinstance(given, Tensor):
        return _decode(given, room_bytes)
    check_texts(got, given.shape, room_bytes)
    return as_text(given) if got == "BYTES" else np.asarray(given, dtype=DATATYPES[got], order="C")


def _decode(tensor: Tensor, room_bytes: int) -> Array:
    shape, dtype = tensor.shape, DATATYPES[tensor.datatype]
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{len(shape)} dimensions, at most {_MAX_DIMENSIONS} are allowed")
    for axis, extent in enumerate(shape):
        if not 0 <= extent < 1 << 63:
            raise ValueError(f"dimension {axis} is {'negative' if extent < 0 else '2^63 or more'}")
    # Exact: Python integers do not overflow.
    count, size = math.prod(shape), memoryview(tensor.data).nbytes
    if size > room_bytes:
        raise ValueError(f"{size} bytes, at most {max(room_bytes, 0)} are left for this request")
    check_texts(tensor.datatype, shape, room_bytes)
    if tensor.datatype == "BYTES":
        return decode_bytes(tensor.data, count).reshape(shape)
    if count * dtype.itemsize != size:
        need = "more than memory" if count >> 63 else f"{count} elements of {dtype.itemsize} bytes"
        raise ValueError(f"shape {list(shape)} needs {need}, got {size} bytes")
    try:
        return np.frombuffer(tensor.data, dtype=dtype).reshape(shape)
    except ValueError:  # no elements, but a dimension beyond what an array can have
        raise ValueError(f"shape {list(shape)} is out of range") from None


def _check_shape(shape: tuple[int, ...], spec: TensorSpec) -> None:
    """Refuse what the declaration rules out; that symbols agree is the engine's to say.

    Exporters give one to extents that may differ: two texts' lengths, or height and width.
    """
    if len(shape) != len(spec.shape):
        raise ValueError(f"shape {[*shape]} has {len(shape)} dimensions, {_shape(spec)} is needed")
    for axis, (got, allowed) in enumerate(zip(shape, spec.shape, strict=True)):
        if isinstance(allowed, int) and got != allowed:
            raise ValueError(f"dimension {axis} is {got}, {_shape(spec)} is needed")
        if got == 0 and axis in (spec.batch_axis, spec.length_axis):
            raise ValueError(f"dimension {axis} is 0, at least 1 is needed")


def check_values(array: Array, spec: TensorSpec, limits: LimitsConfig) -> None:
    """Refuse what the limits do not allow in an array.

    Raises:
        InvalidTensor: It holds NaN or infinity, and they are rejected; or what is no BOOL.
    """
    if limits.nan_policy == "reject" and array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidTensor(spec.name, "holds NaN or infinity, which are not taken here")
    if array.dtype.kind == "b" and array.view(np.uint8).max(initial=0) > 1:
        raise InvalidTensor(spec.name, "holds bytes other than 0 and 1, which are no BOOL")


def _extents(arrays: Iterable[Array], specs: tuple[TensorSpec, ...]) -> tuple[int, int]:
    rows, length = 0, 0
    for array, spec in zip(arrays, specs, strict=True):
        count = rows if spec.batch_axis is None else array.shape[0]
        extent = length if spec.length_axis is None else array.shape[spec.length_axis]
        if rows and count != rows:
            raise InvalidTensor(spec.name, f"has {count} rows, other inputs have {rows}")
        if length and extent != length:
            raise InvalidTensor(spec.name, f"has length {extent}, other inputs have {length}")
        rows, length = count, extent
    return max(rows, 1), length


def _outputs(wanted: tuple[str, ...], signature: Signature) -> tuple[int, ...]:
    index = {spec.name: i for i, spec in enumerate(signature.outputs)}
    if len(wanted) > len({*wanted}):  # each would be copied
        raise RequestError(f"{len(wanted)} outputs are named, {len({*wanted})} different ones")
    if wrong := [name for name in wanted if name not in index]:
        raise RequestError(f"the model has no output {shorten(wrong[0])!r}; it has {_names(index)}")
    return tuple(index[name] for name in wanted) or tuple(index.values())


def _group(arrays: Iterable[Array], signature: Signature) -> tuple[Any, ...]:
    """Return the shapes with batch and length axes left open."""
    return tuple(
        tuple([-1 if axis in (0, spec.length_axis) else n for axis, n in enumerate(array.shape)])
        for array, spec in zip(arrays, signature.inputs, strict=True)
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(repr(shorten(name)) for name in names)


def _shape(spec: TensorSpec) -> str:
    return "[" + ", ".join(str(extent) or "any" for extent in spec.shape) + "]"
