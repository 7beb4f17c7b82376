"""Messages between scheduler and actor, as ZeroMQ frames, and how any message is laid out.

The first frame is one msgspec-encoded message, the rest is raw tensor bytes. Small tensors of a
message share a frame, large ones have their own and are sent without a copy. A peer is not
trusted: whatever does not decode, or points outside its frames, is a `BadFrames`, which the
receiver drops and counts. There is no pickle anywhere.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from errno import ENAMETOOLONG
from functools import lru_cache, partial
from typing import Annotated, Any, Final, TypeVar, cast

import msgspec
import numpy as np
import zmq
from msgspec.msgpack import Decoder, Encoder

from lrai_core.errors import EnvironmentProblem
from lrai_core.protocol import DATATYPES, Array, Signature, datatype_of, decode_bytes, encode_bytes

PROTOCOL_VERSION: Final = 5
OWN_FRAME_BYTES: Final = 64 << 10
_MAX_HEADER_BYTES: Final = 8 << 20
_COUNTED: Final = ("messages_sent", "messages_received", "copied_bytes", "inline_large")
_send: Final[Any] = zmq.backend.Socket.send
_receive: Final[Any] = zmq.backend.Socket.recv
poll: Final[Any] = zmq.backend.zmq_poll
_MORE, _IN = int(zmq.SNDMORE), int(zmq.POLLIN)  # as members of an enum they take microseconds
_datatype_of: Final = lru_cache(256)(datatype_of)

Buffer = bytes | memoryview
Options = Mapping[int, int | bytes]  # of a socket, by ZeroMQ's numbers
# Frame index after the header, offset and size in bytes; -1 is the first shared segment, and so on.
Place = tuple[int, int, int]
_Message = TypeVar("_Message")


class BadFrames(ValueError):
    """Frames that no peer of this version sends."""


class TensorFrame(msgspec.Struct, frozen=True, array_like=True):
    """Where a tensor lies; see `Place`."""

    datatype: str
    shape: Annotated[tuple[int, ...], msgspec.Meta(max_length=64)]
    frame: int
    offset: int
    nbytes: int


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """Shared memory, as `arena` makes it: the numbers of its owner and of the file there."""

    pid: int
    fd: int
    size: int
    id: bytes


class Load(msgspec.Struct, frozen=True, tag=True):
    """To an actor: open this variant, and say when it is ready.

    `files` are checked by their hash before the first parse. `cpus`: the ones to run on, all that
    the process may use if empty. `inline`: it was to run in the runtime's process. `beside`:
    engine, model and weights of other variants that a call may name. `device`: the GPU that it may
    see, every one if empty.
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
    inline: bool = False
    beside: tuple[tuple[str, str, str], ...] = ()
    device: str = ""


class Execute(msgspec.Struct, frozen=True, tag=True):
    """To an actor: join these parts, one tensor per input each, run them and return `outputs`.

    `variant`: the first that was loaded, or one of those beside it.
    """

    batch: int
    outputs: tuple[int, ...]
    parts: tuple[tuple[TensorFrame, ...], ...]
    segments: tuple[Segment, ...] = ()
    variant: int = 0


class Forget(msgspec.Struct, frozen=True, tag=True):
    """To an actor: nothing will lie in this segment any more."""

    segment: Segment


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
    """From an actor: the outputs of a call, and how long the engine took."""

    batch: int
    engine_seconds: float
    outputs: tuple[TensorFrame, ...]


class Refused(msgspec.Struct, frozen=True, tag=True):
    """From an actor that is well: the engine would not run the batch. `invalid`: for its inputs."""

    batch: int
    message: str
    invalid: bool = True


ToActor = Load | Execute | Forget
FromActor = Hello | Ready | LoadFailed | Executed | Refused

encode: Final = Encoder().encode  # to the header frame of a message


def decode(decoder: Decoder[_Message], header: Buffer) -> _Message:
    """Return the message that `header` holds.

    Raises:
        BadFrames: It is not one that `decoder` reads.
    """
    if len(header) > _MAX_HEADER_BYTES:
        raise BadFrames("header too large")
    try:
        return decoder.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TypeError) as error:
        raise BadFrames(str(error)) from None


decode_to_actor: Final[Callable[[Buffer], ToActor]] = partial(decode, Decoder(ToActor))
decode_from_actor: Final[Callable[[Buffer], FromActor]] = partial(decode, Decoder(FromActor))


class Line(zmq.Socket[bytes]):
    """A socket that counts what goes over it.

    It asks ZeroMQ itself: what Python puts around that takes several times as long.
    """

    tally: dict[str, int]

    def counts(self, peer: str) -> dict[str, int]:
        """Return the messages to and from `peer`, and how tensors went: copied, or inline."""
        return {f"{peer}_{name}": count for name, count in self.tally.items()}

    def say(self, message: msgspec.Struct, *head: bytes) -> None:
        """Send a message without tensors, behind the frames in `head`."""
        self.tell([*head, encode(message)])

    def tell(self, frames: Sequence[Buffer], *, copy: bool = True) -> None:
        """Send frames as one message."""
        self.tally["messages_sent"] += 1
        for frame in frames[:-1]:
            _send(self, frame, _MORE, copy)
        _send(self, frames[-1], 0, copy)

    def hear(self) -> list[memoryview]:
        """Return the frames of the next message."""
        parts = [_receive(self, 0, copy=False)]
        while parts[-1].more:
            parts.append(_receive(self, 0, copy=False))
        self.tally["messages_received"] += 1
        return [memoryview(part) for part in parts]


def listen(address: str, options: Options | None = None) -> Line:
    """Return a ROUTER that peers `connect` to, alone in its context.

    Raises:
        EnvironmentProblem: There can be no socket at `address`.
    """
    return _open(zmq.ROUTER, "bind", address, options or {})


def connect(address: str, identity: bytes, options: Options | None = None) -> Line:
    """Return a DEALER that the peer at `address` knows by `identity`.

    Raises:
        EnvironmentProblem: There can be no socket at `address`.
    """
    return _open(zmq.DEALER, "connect", address, {zmq.ROUTING_ID: identity, **(options or {})})


def receive(socket: Line) -> Iterator[list[memoryview]]:
    """Yield the messages that are there, as frames; never wait."""
    while poll([(socket, _IN)], 0):  # an error would tell it later
        yield socket.hear()


class Packer:
    """Lays tensors out over frames: small ones joined, large ones on their own or in no frame.

    `segments` are those that tensors lie in which are not sent at all.
    """

    def __init__(self, share: Callable[[Buffer], tuple[Segment, int] | None] | None = None) -> None:
        """Start with nothing.

        Args:
            share: Returns the shared memory in which the bytes of a large tensor lie, and where;
                None where they do not.
        """
        self._share, self._small = share, bytearray()
        self._large: list[Buffer] = []
        self.segments: tuple[Segment, ...] = ()

    def pack(self, arrays: Iterable[Array]) -> tuple[TensorFrame, ...]:
        """Place arrays; they must not change until the frames are sent."""
        tensors = map(contents, arrays)
        return tuple([TensorFrame(kind, shape, *self.place(data)) for kind, shape, data in tensors])

    def place(self, data: Buffer) -> Place:
        """Place the bytes of a tensor, which must not change until the frames are sent."""
        size = len(data)
        if size >= OWN_FRAME_BYTES:
            if self._share is not None and (found := self._share(data)) is not None:
                segment, offset = found
                self.segments += (segment,) if segment not in self.segments else ()
                return -1 - self.segments.index(segment), offset, size
            self._large.append(data)
            return len(self._large), 0, size
        self._small += bytes(-len(self._small) % 8)  # numpy reads aligned views
        self._small += data
        return 0, len(self._small) - size, size

    def frames(self) -> list[Buffer]:
        """Return the frames that follow the header."""
        return [memoryview(self._small).toreadonly(), *self._large]

    def send(self, socket: Line, message: msgspec.Struct, *head: bytes) -> None:
        """Send a message and its tensors, behind the frames in `head`; only large ones uncopied."""
        socket.tally["copied_bytes"] += len(self._small)
        socket.tally["inline_large"] += len(self._large)
        socket.tell([*head, encode(message), *self.frames()], copy=not self._large)


def contents(array: Array, room_bytes: int = 1 << 62) -> tuple[str, tuple[int, ...], Buffer]:
    """Return datatype, shape and little-endian, row-major bytes of an array.

    Raises:
        ValueError: It holds more texts than fit `room_bytes` where they are read, or what is none.
    """
    datatype = _datatype_of(array.dtype)
    if datatype == "BYTES":
        return datatype, array.shape, encode_bytes(array, room_bytes)
    plain = np.asarray(array, DATATYPES[datatype], order="C")
    return datatype, plain.shape, plain.data.cast("B") if plain.size else b""


def view(place: Place, frames: Sequence[Buffer], shared: Sequence[Buffer] = ()) -> memoryview:
    """Return the bytes of a tensor inside `frames` or shared memory.

    Raises:
        BadFrames: It does not lie inside its frame or segment.
    """
    index, offset, size = place
    if not -len(shared) <= index < len(frames):
        raise BadFrames("tensor outside the message")
    frame = memoryview(frames[index] if index >= 0 else shared[-1 - index])
    if offset < 0 or size < 0 or offset + size > len(frame):
        raise BadFrames("tensor outside its frame")
    return frame[offset : offset + size]


def unpack(tensor: TensorFrame, frames: Sequence[Buffer], shared: Sequence[Buffer] = ()) -> Array:
    """Return a view of a tensor inside `frames` or shared memory, read-only.

    Raises:
        BadFrames: The tensor does not lie inside its frame, or its shape does not match its bytes.
    """
    data = view((tensor.frame, tensor.offset, tensor.nbytes), frames, shared)
    try:
        dtype, count = DATATYPES[tensor.datatype], math.prod(tensor.shape)
        if tensor.datatype == "BYTES":
            return decode_bytes(data, count).reshape(tensor.shape)
        if count * dtype.itemsize != tensor.nbytes:
            raise BadFrames("shape and bytes of a tensor differ")
        # A negative extent makes the product differ, or numpy refuse the shape.
        return np.frombuffer(data, dtype).reshape(tensor.shape)
    except (KeyError, ValueError) as error:
        raise BadFrames(str(error)) from None


def _open(kind: int, bind_or_connect: str, address: str, options: Options) -> Line:
    context = zmq.Context()
    with suppress(OSError):  # a sandbox has none
        # ZeroMQ's threads choose what glibc remembers of this one: after calls of grpc's, the old.
        if os.sched_getscheduler(0) == os.SCHED_BATCH:
            context.set(zmq.THREAD_SCHED_POLICY, os.SCHED_BATCH)
    # Sends are bounded by credit, by admission (one batch per actor), and by the batch answered.
    ours: Options = {zmq.LINGER: 0, zmq.SNDHWM: 0, zmq.MAXMSGSIZE: 1 << 32}
    try:
        # What sends without a copy need is there before this process runs out of descriptors.
        zmq.Frame(b"0", copy=False)
        socket = cast("Line", context.socket(kind, socket_class=Line))
        socket.__dict__["tally"] = dict.fromkeys(_COUNTED, 0)
        for option, value in {**ours, **options}.items():
            socket.setsockopt(option, value)
        getattr(socket, bind_or_connect)(address)
    except (zmq.ZMQError, OSError) as error:
        context.destroy(linger=0)
        shorter = ", set runtime.socket_dir to a shorter path" * (error.errno == ENAMETOOLONG)
        raise EnvironmentProblem(f"no socket at {address}: {error.strerror}{shorter}") from None
    return socket
