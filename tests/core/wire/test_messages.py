from __future__ import annotations

import contextlib
import errno
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lrai_core.errors import EnvironmentProblem
from lrai_core.protocol import DATATYPES, Array
from lrai_core.wire import messages
from lrai_core.wire.messages import BadFrames, Execute, Packer, TensorFrame, unpack
from lrai_shared import messages as session
from tests.core.small_artifact import SIGNATURE

NUMERIC = [dtype for name, dtype in DATATYPES.items() if name != "BYTES"]

TO_ACTOR: list[messages.ToActor] = [
    messages.Load(
        "/folder", "model.onnx", "", "onnxruntime", True, 2, {"a": ("0" * 64, 3)}, SIGNATURE
    ),
    Execute(7, (0,), ((TensorFrame("FP32", (2, 3), 0, 0, 24),),)),
]
FROM_ACTOR: list[messages.FromActor] = [
    messages.Hello(1),
    messages.Ready(0.5),
    messages.LoadFailed("no"),
    messages.Executed(7, 0.25, (TensorFrame("FP32", (2, 3), 0, 0, 24),)),
    messages.Refused(7, "no"),
]
PLACE = TensorFrame("FP32", (2, 3), 0, 0, 24)
FORM = session.Form("m", "1", ("y",), {"priority": 1}, ("x",), ("FP32",), ((2, 3),))
FROM_CLIENT: list[session.FromClient] = [
    session.Attach(1, "0.1"),
    session.Requests((session.Infer(3, session.encode_form(FORM), 20.5, ((0, 0, 24),)),), (1, 2)),
    session.Call(4, "load", {"artifact": "/a.lrai", "name": "", "require": {"delta": 0.1}}),
]
TO_CLIENT: list[session.ToClient] = [
    session.Attached(1, "0.1", "abc", 16),
    session.Replies(
        (session.Answer(3, "m", "1", {"variant": "int8"}, ("y",), (PLACE,)),),
        (session.Failure(5, "QueueFull", "full", {"limit": 4}),),
    ),
    session.Returned(4, ["m"]),
]
DECODERS: list[tuple[Any, list[Any]]] = [
    (messages.decode_to_actor, TO_ACTOR),
    (messages.decode_from_actor, FROM_ACTOR),
    (session.decode_from_client, FROM_CLIENT),
    (session.decode_to_client, TO_CLIENT),
]


@pytest.mark.parametrize(("decode", "own"), DECODERS)
def test_a_message_survives_the_wire(decode: Any, own: list[Any]) -> None:
    for message in own:
        assert decode(messages.encode(message)) == message
        assert decode(memoryview(messages.encode(message))) == message


@pytest.mark.parametrize(("decode", "own"), DECODERS)
def test_a_message_in_the_wrong_direction_is_refused(decode: Any, own: list[Any]) -> None:
    for _, others in DECODERS:
        for message in others:
            if message not in own:
                with pytest.raises(BadFrames):
                    decode(messages.encode(message))


def packed(given_: list[Array]) -> tuple[list[TensorFrame], list[messages.Buffer]]:
    packer = Packer()
    return list(packer.pack(given_)), packer.frames()


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
TENSORS = st.one_of(
    arrays.arrays(
        st.sampled_from(NUMERIC),
        arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        elements=None,
    ),
    st.lists(TEXT, max_size=4).map(lambda words: np.array([*words, None], dtype=object)[:-1]),
)


@given(st.lists(TENSORS, max_size=5))
def test_tensors_survive_the_frames_bit_for_bit(given_: list[Array]) -> None:
    places, frames = packed(given_)
    for array, place in zip(given_, places, strict=True):
        found = unpack(place, [bytes(frame) for frame in frames])
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        if array.dtype == np.object_:
            assert found.tolist() == array.tolist()
        else:
            assert found.tobytes() == array.tobytes()
            assert found.flags.aligned


def test_small_tensors_share_a_frame_and_a_large_one_is_not_copied() -> None:
    large = np.zeros(1 << 16, np.float32)
    places, frames = packed([np.ones(3, np.int8), large, np.ones(2, np.float64)])
    assert [place.frame for place in places] == [0, 1, 0]
    assert len(frames) == 2
    assert np.shares_memory(np.frombuffer(frames[1], np.float32), large)
    assert unpack(places[2], frames).tolist() == [1.0, 1.0]


def test_an_unpacked_tensor_cannot_be_written_to() -> None:
    places, frames = packed([np.zeros(2, np.float32)])
    array = unpack(places[0], frames)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


@pytest.mark.parametrize(
    "tensor",
    [
        TensorFrame("FP31", (1,), 0, 0, 4),
        TensorFrame("FP32", (1,), 1, 0, 4),
        TensorFrame("FP32", (1,), -1, 0, 4),
        TensorFrame("FP32", (1,), 0, -4, 4),
        TensorFrame("FP32", (1,), 0, -16, 4),
        TensorFrame("FP32", (1,), 0, 16, 4),
        TensorFrame("FP32", (-1,), 0, 0, 4),
        TensorFrame("FP32", (-1, -1), 0, 0, 4),
        TensorFrame("FP32", (0,), 0, 0, -4),
        TensorFrame("FP32", (2,), 0, 0, 4),
        TensorFrame("FP32", (1 << 62, 4), 0, 0, 0),
        TensorFrame("FP32", (0, 1 << 62, 1 << 62), 0, 0, 0),
        TensorFrame("FP32", (0, 1 << 64), 0, 0, 0),
        TensorFrame("FP32", (1,) * 65, 0, 0, 4),
        TensorFrame("BYTES", (1 << 40,), 0, 0, 16),
        TensorFrame("BYTES", (1,), 0, 0, 3),
        TensorFrame("BYTES", (0, 1 << 62, 1 << 62), 0, 0, 0),
    ],
)
def test_a_tensor_outside_its_frame_is_refused(tensor: TensorFrame) -> None:
    with pytest.raises(BadFrames):
        unpack(tensor, [b"\xff" * 16])


PLACES = st.builds(
    TensorFrame,
    st.sampled_from([*DATATYPES, "FP31"]),
    st.lists(st.integers(-2, 4) | st.integers(-(1 << 63), (1 << 64) - 1), max_size=5).map(tuple),
    st.integers(-1, 2),
    st.integers(-1, 20) | st.integers(-(1 << 63), (1 << 64) - 1),
    st.integers(-1, 20) | st.integers(-(1 << 63), (1 << 64) - 1),
)


@given(PLACES, st.lists(st.binary(max_size=32), max_size=2))
def test_any_tensor_frame_is_unpacked_as_declared_or_refused(
    tensor: TensorFrame, frames: list[bytes]
) -> None:
    try:
        array = unpack(tensor, frames)
    except BadFrames:
        return
    assert array.shape == tensor.shape
    if tensor.datatype != "BYTES":
        part = frames[tensor.frame][tensor.offset : tensor.offset + tensor.nbytes]
        assert array.tobytes() == part
        assert array.itemsize * math.prod(tensor.shape) == tensor.nbytes


def read_every_way(header: bytes) -> None:
    for decode, _ in DECODERS:
        with contextlib.suppress(BadFrames):
            decode(header)


@given(st.binary(max_size=200))
@example(b"\x91" * 100_000)
@example(b"\x82\xa4type\xa5Hello\xa1x" + b"\x91" * 100_000)  # nested deeper than any stack
@example(b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93.")  # a pickle
@example(b"\xa1\xff")
@example(b"")
@example(messages.encode(FROM_CLIENT[2]).replace(b"\xa5delta", b"\x80delta"))  # a map as a key
def test_any_bytes_are_a_message_or_bad_frames_and_nothing_else(header: bytes) -> None:
    read_every_way(header)


@given(st.sampled_from([message for _, own in DECODERS for message in own]), st.data())
def test_a_damaged_message_is_a_message_or_bad_frames_and_nothing_else(
    message: Any, data: st.DataObject
) -> None:
    header = bytearray(messages.encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    read_every_way(bytes(header[: data.draw(st.integers(0, len(header)))]))
    read_every_way(bytes(header))


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(
    st.sampled_from(["Load", "Hello", "Executed", "Fork", "Attach", "Requests", "Call", "Replies"]),
    st.dictionaries(
        st.sampled_from(["version", "batch", "items", "files", "key", "arguments", "cancelled"]),
        VALUES,
    ),
)
def test_well_formed_msgpack_of_the_wrong_content_is_bad_frames(
    tag: str, fields: dict[str, Any]
) -> None:
    read_every_way(msgspec.msgpack.encode({"type": tag, **fields}))


def test_a_header_over_its_limit_is_refused_unread() -> None:
    with pytest.raises(BadFrames, match="too large"):
        messages.decode_to_actor(bytes((8 << 20) + 1))


def test_no_line_of_ours_takes_pickles() -> None:
    """Some methods of ZeroMQ's sockets do, which a list of banned modules does not see."""
    root = Path(__file__).parents[3]
    sources = [*root.glob("lrai_*/**/*.py"), *root.glob("adapters/*/lrai_*/**/*.py")]
    assert len(sources) > 100
    banned = re.compile("recv_pyobj|send_pyobj|recv_json")
    assert [path for path in sources if banned.search(path.read_text("utf-8"))] == []


_LARGE_WITHOUT_DESCRIPTORS = """
import os, resource, sys
import numpy as np
from lrai_core.wire import messages

heard, said = messages.listen(sys.argv[1]), messages.connect(sys.argv[1], b"me")
said.say(messages.Hello(1))
heard.hear()
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
try:
    while True:
        os.open(os.devnull, os.O_RDONLY)
except OSError:
    pass
packer = messages.Packer()
packer.pack([np.zeros(messages.OWN_FRAME_BYTES, np.int8)])
packer.send(said, messages.Hello(1))
assert heard.poll(10_000)
assert [len(frame) for frame in heard.hear()][2:] == [0, messages.OWN_FRAME_BYTES]
os._exit(0)
"""


def test_the_first_large_tensor_is_sent_though_no_descriptor_is_left() -> None:
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-c", _LARGE_WITHOUT_DESCRIPTORS, f"ipc://{folder}/s"]
        subprocess.run(argv, check=True, timeout=60)


def test_a_socket_for_which_no_descriptor_is_left_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def none_left(*_: Any, **__: Any) -> Any:
        raise zmq.ZMQError(errno.EMFILE)

    zmq.Frame(b"0", copy=False)  # else ZeroMQ's own thread would have none either
    monkeypatch.setattr("zmq.Context.socket", none_left)
    with pytest.raises(EnvironmentProblem, match="Too many open files"):
        messages.listen(f"ipc://{tmp_path}/s")
