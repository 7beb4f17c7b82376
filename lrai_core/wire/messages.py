"""Messages between scheduler and actor, as ZeroMQ frames, and how any message is laid out.

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

from lrai_core.errors import EnvironmentProblem
from lrai_core.protocol import DATATYPES, Array, Signature, datatype_of, decode_bytes, encode_bytes

PROTOCOL_VERSION: Final = 1
_OWN_FRAME_BYTES: Final = 64 << 10
_MAX_HEADER_BYTES: Final = 8 << 20

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

    `files` are checked by their hash before the first parse. `cpus`: the ones to run on, all that
    the process may use if empty.
    """

    folder: str
    model: str
    weights: str
    engine: str
    optimise: bool
    threads: int
    files: dict[str, tuple[str, int]]
    signature: Signature
    cpus: tuple[int, ...] = ()


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


ToActor = Load | Execute
FromActor = Hello | Ready | LoadFailed | Executed | Refused

_encoder: Final = msgspec.msgpack.Encoder()
_to_actor: Final[msgspec.msgpack.Decoder[ToActor]] = msgspec.msgpack.Decoder(ToActor)
_from_actor: Final[msgspec.msgpack.Decoder[FromActor]] = msgspec.msgpack.Decoder(FromActor)


def encode(message: msgspec.Struct) -> bytes:
    """Return the header frame of a message."""
    return _encoder.encode(message)


def decode(decoder: msgspec.msgpack.Decoder[_Message], header: Buffer) -> _Message:
    """Return the message that `header` holds.

    Raises:
        BadFrames: It is not one that `decoder` reads.
    """
    if len(header) > _MAX_HEADER_BYTES:
        raise BadFrames("header too large")
    try:
        return decoder.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadFrames(str(error)) from None


def decode_to_actor(header: Buffer) -> ToActor:
    """Return the message to an actor that `header` holds."""
    return decode(_to_actor, header)


def decode_from_actor(header: Buffer) -> FromActor:
    """Return the message from an actor that `header` holds."""
    return decode(_from_actor, header)


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
