from __future__ import annotations

import numpy as np
import pytest

import lrai_core as lrai
from lrai_core.errors import EngineError, PoisonRequest
from lrai_core.wire.messages import BadFrames, Packer, Place, encode
from lrai_shared import messages


@pytest.mark.parametrize(
    "error",
    [
        lrai.QueueFull("full", limit=4, retry_after_seconds=0.5),
        lrai.InvalidTensor("x\n", "has 2 rows"),
        EngineError("no", invalid=True),
        *(kind("why") for kind in (lrai.LraiError, lrai.NotReady, lrai.ActorError, PoisonRequest)),
        *(kind("why") for kind in (lrai.ConditionNotMet, lrai.DeadlineExceeded, lrai.UsageError)),
    ],
)
def test_an_error_arrives_as_what_it_was(error: lrai.LraiError) -> None:
    replies = messages.Replies(failures=(messages.failure(3, error),))
    again = messages.decode_to_client(encode(replies))
    assert isinstance(again, messages.Replies)
    arrived = messages.error_of(again.failures[0])
    assert (type(arrived), str(arrived), vars(arrived)) == (type(error), str(error), vars(error))
    assert arrived.http_status == error.http_status


def test_of_a_bug_only_its_class_is_told() -> None:
    error = messages.error_of(messages.failure(3, FileNotFoundError(2, "no", "/home/of/others")))
    assert (type(error), str(error)) == (lrai.LraiError, "the runtime failed: FileNotFoundError")


@pytest.mark.parametrize("kind", ["shorten", "annotations", "__builtins__", "int", "", "Exception"])
def test_an_error_of_an_unknown_class_is_the_root_of_all(kind: str) -> None:
    assert type(messages.error_of(messages.Failure(1, kind, "why", {}))) is lrai.LraiError


def no_memory(place: Place) -> memoryview:
    raise AssertionError(place)


def test_a_request_and_its_answer_survive_the_wire() -> None:
    packer, x = Packer(), np.arange(6, dtype=np.float32).reshape(2, 3)
    form = messages.Form("m", "1", ("y",), {"priority": 1}, ("x",), ("FP32",), ((2, 3),))
    item = messages.Infer(3, messages.encode_form(form), 20.5, (packer.place(x.tobytes()),))
    asked = messages.request_of(item, packer.frames(), no_memory)
    tensor = asked.inputs["x"]
    assert isinstance(tensor, lrai.Tensor)
    assert (tensor.datatype, tensor.shape, bytes(tensor.data)) == ("FP32", (2, 3), x.tobytes())
    assert (asked.model_name, asked.model_version, asked.outputs) == ("m", "1", ("y",))
    assert (asked.timeout_ms, asked.parameters) == (20.5, {"priority": 1})

    given_ = lrai.InferenceResponse(
        model_name="m", model_version="1", id="7", outputs={"y": x}, parameters={"variant": "int8"}
    )
    packer = Packer()
    arrived = messages.response_of(messages.answer(3, given_, packer), "7", packer.frames())
    np.testing.assert_array_equal(arrived.outputs["y"], x)
    arrived.outputs["y"][0] = 0  # the caller's own
    assert (arrived.id, arrived.model_name, arrived.parameters) == ("7", "m", {"variant": "int8"})


def test_a_form_that_no_client_would_send_is_not_kept() -> None:
    form = messages.Form("m", "", ("y" * 100,) * 1000, {}, (), (), ())
    with pytest.raises(BadFrames, match="form too large"):
        messages.decode_form(encode(form))


@pytest.mark.parametrize(("characters", "kept"), [(100, True), (2000, False)])
def test_only_short_forms_are_kept(characters: int, *, kept: bool) -> None:
    """Whoever asks for what is refused, each time in another long form, costs no memory."""
    form = encode(messages.Form("m" * characters, "", (), {}, (), (), ()))
    assert messages.decode_form(form).model_name == "m" * characters
    assert (messages.decode_form(form) is messages.decode_form(form)) == kept


def test_a_hundred_of_the_largest_requests_fit_a_header() -> None:
    with pytest.raises(lrai.RequestError, match="65536 are allowed"):
        messages.encode_form(messages.Form("m" * 65536, "", (), {}, (), (), ()))
    form = messages.encode_form(messages.Form("m" * 65000, "", (), {}, (), (), ()))
    item = messages.Infer(1, form, None, ())
    header = encode(messages.Requests((item,) * 100))
    assert isinstance(messages.decode_from_client(header), messages.Requests)
