"""Messages between a client and the daemon, in the frames of `lrai_core.wire.messages`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from lrai_core import InferenceRequest, InferenceResponse, LraiError, RequestError, Tensor, errors
from lrai_core.wire.messages import (
    BadFrames,
    Buffer,
    Packer,
    TensorFrame,
    decode,
    encode,
    unpack,
    view,
)

_MAX_INFER_BYTES: Final = 64 << 10  # of the header, so that it holds a hundred


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
    arguments: dict[str, Any]


class Returned(msgspec.Struct, frozen=True, tag=True):
    """To a client: what an operation gave."""

    key: int
    value: Any


FromClient = Attach | Requests | Call
ToClient = Attached | Replies | Returned

_from_client: Final[msgspec.msgpack.Decoder[FromClient]] = msgspec.msgpack.Decoder(FromClient)
_infer: Final = msgspec.msgpack.Decoder(Infer)
_to_client: Final[msgspec.msgpack.Decoder[ToClient]] = msgspec.msgpack.Decoder(ToClient)


def decode_from_client(header: Buffer) -> FromClient:
    """Return the message from a client that `header` holds."""
    return decode(_from_client, header)


def decode_to_client(header: Buffer) -> ToClient:
    """Return the message to a client that `header` holds."""
    return decode(_to_client, header)


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
        header = encode(item)
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
