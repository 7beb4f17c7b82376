"""Messages between a client and the daemon, in the frames of `lrai_core.wire.messages`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Final

import msgspec

from lrai_core import InferenceRequest, InferenceResponse, LraiError, RequestError, Tensor, errors
from lrai_core.wire import messages as wire

_MOST_CHARACTERS: Final = 2000  # of an error, which may name all that a model takes
_FORM_BYTES: Final = 64 << 10  # so that a header holds a hundred
_SHORT_BYTES: Final = 1 << 10  # as forms are; a client may send any, and a longer one is not kept


class Attach(msgspec.Struct, frozen=True, tag=True):
    """From a client, first and then as a sign of life. Its first field never moves.

    `arena`: where the tensors of its requests may lie.
    """

    version: int
    lrai: str
    arena: wire.Segment | None = None


class Attached(msgspec.Struct, frozen=True, tag=True):
    """To a client, in answer: whom it speaks to, and how many requests may be on their way.

    A session begins when the daemon first hears of a client, or hears of it again after having
    given it up: where it is another than before, what was not answered has to be sent again.
    `arena`: the id of the arena that it reads from now on, empty for none, as where a session
    begins: what is on its way may lie in one that is given up. `request_bytes`: the most that a
    request may have.
    """

    version: int
    lrai: str
    session: str
    credit: int
    arena: bytes = b""
    request_bytes: int = 1 << 62


class Form(msgspec.Struct, frozen=True, array_like=True):
    """What requests of one kind have in common.

    It is sent as bytes: of most forms many requests come, and each end reads it once.
    """

    model_name: str
    model_version: str
    outputs: tuple[str, ...]
    parameters: dict[str, Any]
    names: tuple[str, ...]
    datatypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


class Infer(msgspec.Struct, frozen=True, array_like=True):
    """One request. `key` is the client's, under which it is answered once."""

    key: int
    form: bytes
    timeout_ms: float | None
    places: tuple[wire.Place, ...]


class Requests(msgspec.Struct, frozen=True, tag=True):
    """From a client: what it asks since the last message, and what it no longer waits for.

    Attributes:
        items: What it asks.
        cancelled: Keys.
        session: That it knows of. What was sent in an earlier one comes again.
    """

    items: tuple[Infer, ...]
    cancelled: tuple[int, ...] = ()
    session: str = ""


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """The answer to one request."""

    key: int
    model_name: str
    model_version: str
    parameters: dict[str, Any]
    names: tuple[str, ...]
    tensors: tuple[wire.TensorFrame, ...]


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """The error that one request or call ended with: its class, message and attributes."""

    key: int
    kind: str
    message: str
    attributes: dict[str, Any]


class Replies(msgspec.Struct, frozen=True, tag=True):
    """To a client: what ended since the last message.

    `read`: offsets of the blocks in its arena that nobody reads any more, some of them long after
    the request has ended.
    """

    answers: tuple[Answer, ...] = ()
    failures: tuple[Failure, ...] = ()
    read: tuple[int, ...] = ()


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
_form: Final = msgspec.msgpack.Decoder(Form)
_to_client: Final[msgspec.msgpack.Decoder[ToClient]] = msgspec.msgpack.Decoder(ToClient)
decode_from_client: Final = partial(wire.decode, _from_client)
decode_to_client: Final = partial(wire.decode, _to_client)


def failure(key: int, error: BaseException) -> Failure:
    """Return an error as it goes over the wire; of one that is a bug, only its class is told."""
    if not isinstance(error, LraiError):
        error = LraiError(f"the runtime failed: {type(error).__name__}")
    return Failure(key, type(error).__name__, str(error)[:_MOST_CHARACTERS], vars(error))


def error_of(failed: Failure) -> LraiError:
    """Return the error that `failure` was made of."""
    kind = getattr(errors, failed.kind, None)
    known = isinstance(kind, type) and issubclass(kind, LraiError)
    chosen: type[LraiError] = kind if known else LraiError  # type: ignore[assignment] # as known
    error = chosen.__new__(chosen)
    error.args = (failed.message,)
    error.__dict__.update(failed.attributes)
    return error


def encode_form(form: Form) -> bytes:
    """Return a form as it is sent; one bad request must not spoil a message.

    Raises:
        RequestError: The other end could not read it.
    """
    try:
        encoded = wire.encode(form)
        if len(encoded) > _FORM_BYTES:
            raise RequestError(f"{len(encoded)} bytes beside tensors, {_FORM_BYTES} are allowed")
        decode_form(encoded)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise RequestError(f"the request cannot be sent: {error}") from None
    return encoded


def decode_form(encoded: bytes) -> Form:
    """Return the form of a request.

    Raises:
        BadFrames: It is none.
    """
    if len(encoded) > _FORM_BYTES:
        raise wire.BadFrames("form too large")
    return _kept_form(encoded) if len(encoded) <= _SHORT_BYTES else _kept_form.__wrapped__(encoded)


@lru_cache(1024)
def _kept_form(encoded: bytes) -> Form:
    form = wire.decode(_form, encoded)
    if not len(form.names) == len(form.datatypes) == len(form.shapes):
        raise wire.BadFrames("names and tensors differ")
    return form


def request_of(
    item: Infer, frames: Sequence[wire.Buffer], lend: Callable[[wire.Place], memoryview]
) -> InferenceRequest:
    """Return the request that a client sent, its tensors unchecked views.

    Args:
        item: The request.
        frames: Of its message.
        lend: Returns the bytes of a place in shared memory.

    Raises:
        BadFrames: It has no form, or a tensor does not lie inside its frame or segment.
    """
    form = decode_form(item.form)
    if len(item.places) != len(form.names):
        raise wire.BadFrames("names and tensors differ")
    inputs: dict[str, Any] = {}
    tensors = zip(form.names, form.datatypes, form.shapes, item.places, strict=True)
    for name, datatype, shape, place in tensors:
        data = lend(place) if place[0] < 0 else wire.view(place, frames)
        inputs[name] = Tensor(name=name, datatype=datatype, shape=shape, data=data)
    return InferenceRequest(
        model_name=form.model_name,
        model_version=form.model_version,
        inputs=inputs,
        outputs=form.outputs,
        timeout_ms=item.timeout_ms,
        parameters=form.parameters,
    )


def answer(key: int, response: InferenceResponse, packer: wire.Packer) -> Answer:
    """Return a response as it goes over the wire; `packer` takes its tensors."""
    return Answer(
        key,
        response.model_name,
        response.model_version,
        dict(response.parameters),
        tuple(response.outputs),
        packer.pack(response.outputs.values()),
    )


def response_of(
    answered: Answer, identity: str, frames: Sequence[wire.Buffer]
) -> InferenceResponse:
    """Return the response that `answer` was made of, to the request with this id.

    Raises:
        BadFrames: A tensor does not lie inside its frame, or one has no name.
    """
    arrays = [wire.unpack(tensor, frames).copy() for tensor in answered.tensors]
    if len(arrays) != len(answered.names):
        raise wire.BadFrames("names and tensors differ")
    return InferenceResponse(
        model_name=answered.model_name,
        model_version=answered.model_version,
        id=identity,
        outputs=dict(zip(answered.names, arrays, strict=True)),
        parameters=answered.parameters,
    )
