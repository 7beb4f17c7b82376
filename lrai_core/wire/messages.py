"""Messages between client, scheduler and actor, as ZeroMQ frames.

The first frame is one msgspec-encoded message, the rest is raw tensor bytes. Small tensors of a
message share a frame, large ones have their own and are sent without a copy. A peer is not
trusted: whatever does not decode, or points outside its frames, is a `BadFrames`, which the
receiver drops and counts. There is no pickle anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
import zmq

from lrai_core import errors
from lrai_core.errors import EnvironmentProblem, LraiError, RequestError
from lrai_core.protocol import (
    DATATYPES,
    Array,
    InferenceRequest,
    InferenceResponse,
    Signature,
    Tensor,
    datatype_of,
    decode_bytes,
    encode_bytes,
)

PROTOCOL_VERSION: Final = 1
_OWN_FRAME_BYTES: Final = 64 << 10
_MAX_HEADER_BYTES: Final = 8 << 20
_MAX_INFER_BYTES: Final = 64 << 10  # of the header, so that it holds a hundred

Buffer = bytes | memoryview
_Message = TypeVar("_Message")


class BadFrames(ValueError):
    """Frames that no peer of this version sends."""


class TensorFrame(msgspec.Struct, frozen=True, array_like=True):
    """Where a tensor lies: frame index after the header, offset and size in bytes."""

    datatype: str
    shape: tuple[int, ...]
    frame: int
    offset: int
    nbytes: int


class Load(msgspec.Struct, frozen=True, tag=True):
    """To an actor: open this variant, and say when it is ready.

    `files` are checked by their hash before the first parse.
    """

    folder: str
    model: str
    weights: str
    engine: str
    optimise: bool
    threads: int
    files: dict[str, tuple[str, int]]
    signature: Signature


class Item(msgspec.Struct, frozen=True, array_like=True):
    """One request inside a batch: its input tensors and the outputs it wants."""

    rows: int
    length: int
    outputs: tuple[int, ...]
    tensors: tuple[TensorFrame, ...]


class Execute(msgspec.Struct, frozen=True, tag=True):
    """To an actor: run these requests as one call."""

    batch: int
    items: tuple[Item, ...]


class Hello(msgspec.Struct, frozen=True, tag=True):
    """From an actor, first: it speaks this version and waits for `Load`."""

    version: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """From an actor: the variant is loaded and has run once."""

    load_seconds: float


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """From an actor: the variant cannot be loaded, for its files or for this machine."""

    message: str
    environment: bool = False


class Executed(msgspec.Struct, frozen=True, tag=True):
    """From an actor: the outputs of a batch, per request, and how long the engine took."""

    batch: int
    engine_seconds: float
    items: tuple[tuple[TensorFrame, ...], ...]


class Refused(msgspec.Struct, frozen=True, tag=True):
    """From an actor that is well: the engine would not run the batch. `invalid`: for its inputs."""

    batch: int
    message: str
    invalid: bool = True


class Attach(msgspec.Struct, frozen=True, tag=True):
    """From a client, first and then as a sign of life. Its first field never moves."""

    version: int
    lrai: str


class Attached(msgspec.Struct, frozen=True, tag=True):
    """To a client, in answer: whom it speaks to, and how many requests may be on their way.

    A session begins when the daemon first hears of a client, or hears of it again after having
    given it up: where it is another than before, what was not answered has to be sent again.
    """

    version: int
    lrai: str
    session: str
    credit: int


class Infer(msgspec.Struct, frozen=True, array_like=True):
    """One request. `key` is the client's, under which it is answered once."""

    key: int
    model_name: str
    model_version: str
    outputs: tuple[str, ...]
    timeout_ms: float | None
    parameters: dict[str, Any]
    names: tuple[str, ...]
    tensors: tuple[TensorFrame, ...]


class Requests(msgspec.Struct, frozen=True, tag=True):
    """From a client: what it asks since the last message, and what it no longer waits for."""

    items: tuple[Infer, ...]
    cancelled: tuple[int, ...] = ()


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """The answer to one request."""

    key: int
    model_name: str
    model_version: str
    parameters: dict[str, Any]
    names: tuple[str, ...]
    tensors: tuple[TensorFrame, ...]


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """The error that one request or call ended with: its class, message and attributes."""

    key: int
    kind: str
    message: str
    attributes: dict[str, Any]


class Replies(msgspec.Struct, frozen=True, tag=True):
    """To a client: what ended since the last message."""

    answers: tuple[Answer, ...] = ()
    failures: tuple[Failure, ...] = ()


class Call(msgspec.Struct, frozen=True, tag=True):
    """From a client: an operation on the runtime, by name."""

    key: int
    operation: str
    arguments: dict[str, str | dict[str, Any] | None]


class Returned(msgspec.Struct, frozen=True, tag=True):
    """To a client: what an operation gave."""

    key: int
    value: Any


ToActor = Load | Execute
FromActor = Hello | Ready | LoadFailed | Executed | Refused
FromClient = Attach | Requests | Call
ToClient = Attached | Replies | Returned

_encoder: Final = msgspec.msgpack.Encoder()
_to_actor: Final[msgspec.msgpack.Decoder[ToActor]] = msgspec.msgpack.Decoder(ToActor)
_from_actor: Final[msgspec.msgpack.Decoder[FromActor]] = msgspec.msgpack.Decoder(FromActor)
_from_client: Final[msgspec.msgpack.Decoder[FromClient]] = msgspec.msgpack.Decoder(FromClient)
_infer: Final = msgspec.msgpack.Decoder(Infer)
_to_client: Final[msgspec.msgpack.Decoder[ToClient]] = msgspec.msgpack.Decoder(ToClient)


def failure(key: int, error: BaseException) -> Failure:
    """Return an error as it goes over the wire; of one that is a bug, only its class is told."""
    if not isinstance(error, LraiError):
        error = LraiError(f"the runtime failed: {type(error).__name__}")
    return Failure(key, type(error).__name__, str(error), vars(error))


def error_of(failed: Failure) -> LraiError:
    """Return the error that `failure` was made of."""
    kind = getattr(errors, failed.kind, None)
    known = isinstance(kind, type) and issubclass(kind, LraiError)
    chosen: type[LraiError] = kind if known else LraiError  # type: ignore[assignment] # as known
    error = chosen.__new__(chosen)
    error.args = (failed.message,)
    error.__dict__.update(failed.attributes)
    return error


def checked(item: Infer) -> Infer:
    """Return a request as the other end will read it; one bad request must not spoil a message.

    Raises:
        RequestError: It cannot be sent.
    """
    try:
        header = _encoder.encode(item)
        if len(header) > _MAX_INFER_BYTES:
            raise RequestError(
                f"{len(header)} bytes beside tensors, {_MAX_INFER_BYTES} are allowed"
            )
        return _infer.decode(header)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise RequestError(f"the request cannot be sent: {error}") from None


def request_of(item: Infer, frames: Sequence[Buffer]) -> InferenceRequest:
    """Return the request that a client sent, its tensors unchecked views of `frames`.

    Raises:
        BadFrames: A tensor does not lie inside its frame.
    """
    inputs = {
        name: Tensor(name=name, datatype=t.datatype, shape=t.shape, data=view(t, frames))
        for name, t in zip(item.names, item.tensors, strict=False)
    }
    return InferenceRequest(
        model_name=item.model_name,
        model_version=item.model_version,
        inputs=inputs,
        outputs=item.outputs,
        timeout_ms=item.timeout_ms,
        parameters=item.parameters,
    )


def encode(message: ToActor | FromActor | FromClient | ToClient) -> bytes:
    """Return the header frame of a message."""
    return _encoder.encode(message)


def decode_to_actor(header: Buffer) -> ToActor:
    """Return the message to an actor that `header` holds."""
    return _decode(_to_actor, header)


def decode_from_actor(header: Buffer) -> FromActor:
    """Return the message from an actor that `header` holds."""
    return _decode(_from_actor, header)


def decode_from_client(header: Buffer) -> FromClient:
    """Return the message from a client that `header` holds."""
    return _decode(_from_client, header)


def decode_to_client(header: Buffer) -> ToClient:
    """Return the message to a client that `header` holds."""
    return _decode(_to_client, header)


def listen(address: str) -> zmq.Socket[bytes]:
    """Return a ROUTER that peers `connect` to, alone in its context.

    Raises:
        EnvironmentProblem: There can be no socket at `address`.
    """
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)  # bounded by admission: one batch per actor
    socket.setsockopt(zmq.MAXMSGSIZE, 1 << 32)
    _open(socket, socket.bind, address)
    return socket


def connect(address: str, identity: bytes) -> zmq.Socket[bytes]:
    """Return a DEALER that the peer at `address` knows by `identity`.

    Raises:
        EnvironmentProblem: There can be no socket at `address`.
    """
    socket = zmq.Context().socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)  # bounded by credit, or by the one batch that is answered
    socket.setsockopt(zmq.ROUTING_ID, identity)
    _open(socket, socket.connect, address)
    return socket


class Packer:
    """Lays tensors out over frames: small ones joined, large ones on their own."""

    def __init__(self) -> None:
        self._small = bytearray()
        self._large: list[Buffer] = []

    def pack(self, arrays: Iterable[Array]) -> tuple[TensorFrame, ...]:
        """Place arrays; they must not change until the frames are sent."""
        return tuple(self.place(*contents(array)) for array in arrays)

    def place(self, datatype: str, shape: tuple[int, ...], data: Buffer) -> TensorFrame:
        """Place the bytes of a tensor, which must not change until the frames are sent."""
        size = len(data)
        if size >= _OWN_FRAME_BYTES:
            self._large.append(data)
            return TensorFrame(datatype, shape, len(self._large), 0, size)
        self._small += bytes(-len(self._small) % 8)  # numpy reads aligned views
        offset = len(self._small)
        self._small += data
        return TensorFrame(datatype, shape, 0, offset, size)

    def frames(self) -> list[Buffer]:
        """Return the frames that follow the header."""
        return [memoryview(self._small).toreadonly(), *self._large]

    def send(self, socket: zmq.Socket[bytes], *head: bytes) -> None:
        """Send the frames in `head` and those of the tensors; only large ones without a copy."""
        socket.send_multipart([*head, *self.frames()], copy=not self._large)


def answer(key: int, response: InferenceResponse, packer: Packer) -> Answer:
    """Return a response as it goes over the wire; `packer` takes its tensors."""
    return Answer(
        key,
        response.model_name,
        response.model_version,
        dict(response.parameters),
        tuple(response.outputs),
        packer.pack(response.outputs.values()),
    )


def response_of(answered: Answer, identity: str, frames: Sequence[Buffer]) -> InferenceResponse:
    """Return the response that `answer` was made of, to the request with this id.

    Raises:
        BadFrames: A tensor does not lie inside its frame, or one has no name.
    """
    arrays = [unpack(tensor, frames).copy() for tensor in answered.tensors]
    if len(arrays) != len(answered.names):
        raise BadFrames("names and tensors differ")
    return InferenceResponse(
        model_name=answered.model_name,
        model_version=answered.model_version,
        id=identity,
        outputs=dict(zip(answered.names, arrays, strict=True)),
        parameters=answered.parameters,
    )


def contents(array: Array) -> tuple[str, tuple[int, ...], Buffer]:
    """Return datatype, shape and little-endian, row-major bytes of an array."""
    datatype = datatype_of(array.dtype)
    if datatype == "BYTES":
        return datatype, array.shape, encode_bytes(array)
    plain = np.asarray(array, DATATYPES[datatype], order="C")
    return datatype, plain.shape, plain.data.cast("B") if plain.size else b""


def view(tensor: TensorFrame, frames: Sequence[Buffer]) -> memoryview:
    """Return the bytes of a tensor inside `frames`.

    Raises:
        BadFrames: It does not lie inside its frame.
    """
    if not 0 <= tensor.frame < len(frames):
        raise BadFrames("tensor outside the message")
    frame, end = memoryview(frames[tensor.frame]), tensor.offset + tensor.nbytes
    if tensor.offset < 0 or tensor.nbytes < 0 or end > len(frame):
        raise BadFrames("tensor outside its frame")
    return frame[tensor.offset : end]


def unpack(tensor: TensorFrame, frames: Sequence[Buffer]) -> Array:
    """Return a view of a tensor inside `frames`, read-only.

    Raises:
        BadFrames: The tensor does not lie inside its frame, or its shape does not match its bytes.
    """
    if tensor.datatype not in DATATYPES:
        raise BadFrames("unknown datatype")
    if any(extent < 0 for extent in tensor.shape):
        raise BadFrames("negative extent")
    data, count = view(tensor, frames), math.prod(tensor.shape)
    dtype = DATATYPES[tensor.datatype]
    text = tensor.datatype == "BYTES"
    if not text and count * dtype.itemsize != tensor.nbytes:
        raise BadFrames("shape and bytes of a tensor differ")
    try:
        flat = decode_bytes(data, count) if text else np.frombuffer(data, dtype=dtype)
        return flat.reshape(tensor.shape)
    except ValueError as error:
        raise BadFrames(str(error)) from None


def _open(socket: zmq.Socket[bytes], bind_or_connect: Callable[[str], Any], address: str) -> None:
    try:
        bind_or_connect(address)
    except zmq.ZMQError as error:
        socket.context.destroy(linger=0)
        raise EnvironmentProblem(
            f"no socket at {address}, set runtime.socket_dir to a shorter path: {error.strerror}"
        ) from None


def _decode(decoder: msgspec.msgpack.Decoder[_Message], header: Buffer) -> _Message:
    if len(header) > _MAX_HEADER_BYTES:
        raise BadFrames("header too large")
    try:
        return decoder.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadFrames(str(error)) from None
