"""What the stub runs, beside a stand-in for the module that Triton brings: no server, no memory."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

import lrai_core as lrai
from lrai_triton.settings import WATCH
from tests.core import small_artifact

REGION = "a_name_that_nobody_may_learn"
POOL_BYTES = 1 << 20
CODES = "INVALID_ARG", "NOT_FOUND", "UNAVAILABLE", "CANCELLED"


class Tensor:
    """Of Triton's: it copies texts at once, and can fail."""

    refused = ""

    def __init__(self, name: str, array: NDArray[Any]) -> None:
        if self.refused and array.flat[0] == self.refused:
            raise RuntimeError(f"Failed to increase the shared memory pool of {REGION}")
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        return self._array

    def shape(self) -> tuple[int, ...]:
        return self._array.shape


class Error:
    """As Triton's, which has a code of each name as an attribute."""

    def __init__(self, message: str, code: str) -> None:
        self.message, self.code = message, code


class Response:
    """As Triton's was until 25.01."""

    def __init__(self, output_tensors: Sequence[Tensor] = (), error: Error | None = None) -> None:
        """__init__(self, output_tensors: list, error: object = None) -> None."""
        self.error, self.parameters = error, dict[str, Any]()
        self.outputs = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}


class TellingResponse(Response):
    """As Triton's is from 25.02 on."""

    def __init__(
        self,
        output_tensors: Sequence[Tensor] = (),
        error: Error | None = None,
        parameters: dict[str, Any] | None = None,
    ) -> None:
        """__init__(self, output_tensors: list, error: object, parameters: object) -> None."""
        super().__init__(output_tensors, error)
        self.parameters = parameters or {}


class Request:
    """As Triton's; `said` are its parameters."""

    def __init__(
        self, inputs: dict[str, NDArray[Any]], identity: str = "", said: str = "{}"
    ) -> None:
        self._inputs, self._identity, self._said = inputs, identity, said
        self.wanted: Collection[str] = ()

    def inputs(self) -> list[Tensor]:
        return [Tensor(*pair) for pair in self._inputs.items()]

    def request_id(self) -> str:
        return self._identity

    def parameters(self) -> str:
        return self._said

    def requested_output_names(self) -> Collection[str]:
        return self.wanted

    def timeout(self) -> int:
        return 0

    def is_cancelled(self) -> bool:
        return False


class Stub:
    """The module under test, in a process that Triton seems to have started.

    Attributes:
        utils: What Triton brings.
        log: What was written to its log.
        region: Its shared memory.
        free_bytes: Of the machine's.
        lists: Triton makes them; else requests come one by one.
        inputs: Of the configuration, which Triton has had filled in.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.log, self.free_bytes = folder, list[str](), 1 << 30
        self.lists, self.inputs = True, [{"name": "x"}]
        self.region = folder / "shm" / REGION
        self.region.parent.mkdir()
        self.grow(POOL_BYTES)
        (version := folder / "models" / "m" / "1").mkdir(parents=True)
        small_artifact.build(version / "model.lrai")
        self.utils = SimpleNamespace(
            Tensor=type("Tensor", (Tensor,), {}),
            TritonError=type("TritonError", (Error,), {code: code for code in CODES}),
            InferenceResponse=Response,
            TritonModelException=RuntimeError,
            Logger=SimpleNamespace(log_error=self.log.append),
            MetricFamily=Family,
            TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        )
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", self.utils)
        monkeypatch.delitem(sys.modules, "lrai_triton.model", raising=False)
        self.module: Any = importlib.import_module("lrai_triton.model")
        arguments = ("stub", str(version / "model.py"), REGION)
        monkeypatch.setattr(self.module, "_argument", arguments.__getitem__)
        monkeypatch.setattr(self.module, "_MEMORY", self.region.parent)
        monkeypatch.setattr(
            os, "statvfs", lambda _: SimpleNamespace(f_bavail=self.free_bytes, f_frsize=1)
        )

    def grow(self, size: int) -> None:
        with self.region.open("ab") as region:
            region.truncate(size)

    def load(self, **parameters: str) -> Any:
        """Return the model, served in this process unless the parameters say otherwise."""
        said = {"execution": "inline"} | {k.replace("__", "."): v for k, v in parameters.items()}
        config: dict[str, Any] = {
            "name": "m", "max_batch_size": 64, "input": self.inputs, "output": [{"name": "y"}],
            "parameters": {key: {"string_value": value} for key, value in said.items()},
        }  # fmt: skip
        config |= {"dynamic_batching": {}} if self.lists else {}
        args = {"model_config": json.dumps(config), "model_name": "m", "model_version": "1"}
        model = self.module.TritonPythonModel()
        model.initialize(args | {"model_repository": str(self.folder / "models" / "m")})
        return model


class Family:
    """Of metrics, which count nothing."""

    COUNTER = "counter"

    def __init__(self, *_: str) -> None:
        self.Metric = lambda labels: SimpleNamespace(increment=lambda _: labels)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    yield Stub(tmp_path, monkeypatch)
    sys.modules.pop("lrai_triton.model", None)  # it has the stand-in


@pytest.fixture
def model(stub: Stub) -> Iterator[Any]:
    """Yield a model of three numbers to three numbers."""
    made = stub.load()
    yield made
    made.finalize()


def test_how_long_requests_waited_is_not_guessed_where_they_come_one_by_one(stub: Stub) -> None:
    (tensor,) = small_artifact.SIGNATURE.inputs
    alone = [msgspec.structs.replace(tensor, name=name, batch_axis=None) for name in "xy"]
    signature = lrai.Signature(inputs=(alone[0],), outputs=(alone[1],))
    artifact = stub.folder / "models" / "m" / "1" / "model.lrai"
    small_artifact.rewrite(artifact, {"signature": msgspec.to_builtins(signature)})
    stub.lists = False
    model = stub.load()
    for _ in range(2):
        assert model._queue.take([20_000]) == [19.0]
        model._queue.answered()
    model.finalize()


def row(value: float = 1.0) -> dict[str, NDArray[Any]]:
    return {"x": np.full((1, 3), value, np.float32)}


def answering(
    model: Any, monkeypatch: pytest.MonkeyPatch, *answers: Any, certificate: str | None = None
) -> list[Any]:
    """Have the runtime answer with these arrays, as output y; return what it is asked."""
    asked = list[Any]()

    def start_all(requests: Sequence[Any]) -> list[lrai.InferenceResponse]:
        asked.extend(requests)
        told: dict[str, Any] = {"model_name": "m", "model_version": "1", "id": ""}
        said = {"variant": "fp32", "certificate": certificate}
        return [
            lrai.InferenceResponse(outputs={"y": y}, parameters=said, **told)
            for y, _ in zip(answers, requests, strict=True)
        ]

    monkeypatch.setattr(model._held.runtime, "start_all", start_all)
    return asked


def texts(size: int) -> NDArray[Any]:
    return np.array([["a" * size]], object)


def codes(responses: Sequence[Any]) -> list[str]:
    return [response.error.code if response.error else "" for response in responses]


# Memory


def test_a_text_takes_what_it_is_long_and_not_what_a_pointer_takes(
    stub: Stub, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.free_bytes = 0
    answering(model, monkeypatch, texts(3 << 20), texts(5), texts(POOL_BYTES // 2), texts(600_000))
    responses = model.execute([Request(row()) for _ in range(4)])
    assert codes(responses) == ["UNAVAILABLE", "", "", "UNAVAILABLE"]
    assert "no memory left" in responses[0].error.message
    assert REGION not in responses[0].error.message
    assert responses[1].outputs["y"].tolist() == [["aaaaa"]]


class Garbled(Request):
    """Whose parameters are no text; what Triton's binding raises of them."""

    def parameters(self) -> str:
        return b"\xff".decode()


def test_what_is_no_text_is_refused_alone(
    stub: Stub, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(model, monkeypatch, row()["x"])
    assert codes(model.execute([Garbled(row()), Request(row())])) == ["INVALID_ARG", ""]
    assert not model._inside


def test_what_requests_hold_is_not_there_for_answers(
    stub: Stub, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.free_bytes = 0
    large = {"x": np.ones((60_000, 3), np.float32)}  # 720 kB of the 1 MiB
    answering(model, monkeypatch, large["x"])
    assert codes(model.execute([Request(large)])) == ["UNAVAILABLE"]
    assert codes(model.execute([Request(row())])) == [""], "it is given back"


def test_that_there_was_room_does_not_mean_that_it_was_taken(
    stub: Stub, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(model, monkeypatch, texts(3 << 20))
    assert codes(model.execute([Request(row())])) == [""]
    stub.free_bytes = 0  # others were quicker, and Triton has refused that answer
    assert codes(model.execute([Request(row())])) == ["UNAVAILABLE"]
    stub.grow(4 << 20)
    assert codes(model.execute([Request(row())])) == [""]


def test_what_is_nearly_all_that_is_left_is_not_begun(
    stub: Stub, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(model, monkeypatch, texts(3 << 20))
    stub.free_bytes = 7 << 20  # of which others may take as much meanwhile
    assert codes(model.execute([Request(row())])) == ["UNAVAILABLE"]
    stub.free_bytes = 9 << 20
    assert codes(model.execute([Request(row())])) == [""]


def test_an_answer_that_cannot_be_handed_over_is_the_error_of_its_request(
    stub: Stub, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(model, monkeypatch, texts(1), texts(2))
    stub.utils.Tensor.refused = "aa"
    responses = model.execute([Request(row()), Request(row())])
    assert codes(responses) == ["", "UNAVAILABLE"]
    assert REGION not in responses[1].error.message
    assert stub.log == ["an answer is left out: RuntimeError"]


# What comes with a request, and with its answer


def test_priority_and_id_go_to_the_runtime(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(model, monkeypatch, texts(1), texts(1))
    said = json.dumps({"lrai_priority": -2, "other": "of another's"})
    model.execute([Request(row(), "seven", said), Request(row())])
    assert [one.id for one in asked] == ["seven", ""]
    assert [one.parameters for one in asked] == [{"priority": -2}, {"priority": 0}]


def test_outputs_come_in_one_order_whatever_that_of_a_set_is(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answering(model, monkeypatch, row()["x"], row()["x"])
    requests = Request(row()), Request(row())
    requests[0].wanted, requests[1].wanted = ("a", "c", "b"), ("c", "b", "a")
    model.execute(requests)
    assert [one.outputs for one in asked] == [("a", "b", "c")] * 2


def test_a_priority_that_is_none_is_refused_alone(model: Any) -> None:
    wrong = Request(row(), said=json.dumps({"lrai_priority": "high"}))
    responses = model.execute([wrong, Request(row())])
    assert codes(responses) == ["INVALID_ARG", ""]
    assert "priority is 'high', an integer is needed" in responses[0].error.message


def test_an_answer_names_its_variant_where_triton_has_a_place_for_it(stub: Stub) -> None:
    stub.utils.InferenceResponse = TellingResponse
    model = stub.load()
    try:
        wrong = Request({"x": np.ones((1, 4), np.float32)})
        told = [response.parameters for response in model.execute([Request(row()), wrong])]
        (variant,) = [one.variant for one in model._held.runtime.models()]
    finally:
        model.finalize()
    assert told == [{"variant": variant}, {}], "a certificate that there is not is left out"


def test_an_answer_names_its_certificate_where_there_is_one(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.utils.InferenceResponse = TellingResponse
    model = stub.load()
    answering(model, monkeypatch, row()["x"], certificate="statistical-1")
    (response,) = model.execute([Request(row())])
    model.finalize()
    assert response.parameters == {"variant": "fp32", "certificate": "statistical-1"}


def test_a_probe_is_answered_by_the_stub_and_who_has_its_id_by_the_model(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answering(model, monkeypatch, row(5.0)["x"])
    counted = list[Any]()
    monkeypatch.setattr(model._metrics, "count", counted.append)
    probe, other = model.execute([Request(row(0.0), WATCH), Request(row(1.0), WATCH)])
    assert probe.outputs["y"].tolist() == [[0, 0, 0]]
    assert other.outputs["y"].tolist() == [[5, 5, 5]]
    assert len(asked) == len(counted) == 1


# Whether it is ready


@pytest.mark.parametrize(
    ("state", "ready"), [("ok", True), ("idle", True), ("stalled", False), ("dead", False)]
)
def test_a_model_is_ready_that_makes_progress(
    model: Any, monkeypatch: pytest.MonkeyPatch, state: str, *, ready: bool
) -> None:
    assert model.is_ready()
    others = [SimpleNamespace(name="another's", state="dead" if ready else "ok")]
    mine = SimpleNamespace(name=model._held.name, state=state)
    monkeypatch.setattr(model._held.runtime, "models", lambda: [*others, mine])
    assert model.is_ready() is ready


def test_a_model_that_was_unloaded_for_others_is_ready_until_it_does_not_load_again(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model._held.runtime, "models", list)
    assert model.is_ready()
    monkeypatch.setattr(model._held, "_failed", True)
    assert not model.is_ready()


def test_a_model_is_not_ready_whose_runtime_does_not_answer(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unheard() -> None:
        raise lrai.NotReady("the runtime does not answer")

    monkeypatch.setattr(model._held.runtime, "models", unheard)
    assert not model.is_ready()


def test_a_stub_imports_nothing_heavy() -> None:
    without = "torch", "onnx", "openvino", "pandas", "mlflow", "rich", "typer", "onnxruntime"
    program = (
        "import sys, types\n"
        "utils = 'triton_python_backend_utils'\n"
        "sys.modules[utils] = types.ModuleType(utils)\n"
        "import lrai_triton.model\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    assert not set(done.stdout.split()) & set(without)


# Who leaves


class Leaving(Request):
    """Whose caller may leave. Triton must not be asked whether he did once it has the answer."""

    def __init__(self) -> None:
        super().__init__(row())
        self.left = self.late = False
        self.looked, self.sent = threading.Event(), list[Any]()

    def is_cancelled(self) -> bool:
        self.late |= bool(self.sent)
        self.looked.set()
        return self.left

    def get_response_sender(self) -> Leaving:
        return self

    def send(self, response: Any, flags: int) -> None:
        self.sent.append(response)


class Unaskable(Leaving):
    """Of whom Triton cannot be asked."""

    def is_cancelled(self) -> bool:
        super().is_cancelled()
        raise RuntimeError(f"Failed to increase the shared memory pool of {REGION}")


class Asked(Future[Any]):
    """What a runtime has in its queue; who waits for several learns that one was cancelled."""

    def cancel(self) -> bool:
        return super().cancel() and not self.set_running_or_notify_cancel()  # once


@pytest.mark.parametrize("other", [Leaving, Unaskable])
@pytest.mark.parametrize("way", ["lists", "sender"])
def test_what_a_caller_who_leaves_has_asked_is_taken_out_of_the_queue(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, way: str, other: type[Leaving]
) -> None:
    monkeypatch.setattr(stub.module, "_LOOK_SECONDS", 0.005)
    here = {"runtime__address": "embedded", "actor__isolation": "inline"}
    model, queued = stub.load(execution=way, **here), (Asked(), Asked())
    monkeypatch.setattr(model._held.runtime, "start_all", lambda _: queued)
    stays, leaves = other(), Leaving()
    told: dict[str, Any] = {"model_name": "m", "model_version": "1", "id": "", "parameters": {}}
    with ThreadPoolExecutor(1) as server:
        given = server.submit(model.execute, [stays, leaves])
        stays.looked.wait()
        leaves.left = True
        wait([queued[1]], 30)
        for one in queued:
            if not one.done():
                one.set_result(lrai.InferenceResponse(outputs={"y": row()["x"]}, **told))
        listed = given.result()
    model.finalize()
    assert codes(listed or [*stays.sent, *leaves.sent]) == ["", "CANCELLED"]
    assert (listed is None) == (way == "sender")
    assert not model._waiting
    assert not any(one.late for one in (stays, leaves))


@pytest.mark.parametrize("other", [Leaving, Unaskable])
def test_who_left_while_a_long_list_ran_before_is_not_computed_for(
    stub: Stub, model: Any, monkeypatch: pytest.MonkeyPatch, other: type[Leaving]
) -> None:
    answering(model, monkeypatch, row()["x"], row()["x"])
    stays, leaves = other(), Leaving()
    leaves.left = True
    assert codes(model.execute([stays, leaves])) == ["", ""]
    assert not leaves.looked.is_set(), "to ask is a message, and no list ran before"
    monkeypatch.setattr(model._queue, "take", lambda timeouts, _: [None] * len(timeouts))
    model._queue.ran = stub.module._LOOK_SECONDS + 0.1
    asked = answering(model, monkeypatch, row()["x"])
    assert codes(model.execute([stays, leaves])) == ["", "CANCELLED"]
    assert len(asked) == 1
    assert not model._inside


def test_where_triton_was_told_to_fill_nothing_in_requests_come_one_by_one(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {"runtime__address": "embedded", "actor__isolation": "inline"}
    stub.lists = False
    model, request = stub.load(execution="auto", **here), Leaving()
    for _ in range(2):
        assert model._queue.take([20_000]) == [19.0], "nothing is guessed"
        model._queue.answered()
    answering(model, monkeypatch, row()["x"])
    assert model.execute([request]) is None, "the next one may come"
    assert codes(request.sent) == [""]
    model.finalize()


# What is told of a model that does not load


def test_a_model_whose_inputs_triton_was_told_not_to_fill_in_is_not_ready_for_none(
    stub: Stub,
) -> None:
    stub.inputs = []
    with pytest.raises(RuntimeError, match="input 'x' of the model is not in the configuration"):
        stub.load()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("/proc/nowhere", "no folder nowhere: .*; see runtime.address, runtime.socket_dir and its"),
        ("tcp://127.0.0.1:9?keys=/proc/no/keys", "keys needs server.key and one NAME.key_secret"),
    ],
)
def test_who_loads_a_model_learns_what_to_set_and_no_folder(
    stub: Stub, address: str, words: str
) -> None:
    with pytest.raises(RuntimeError, match=words) as caught:
        stub.load(execution="lists", runtime__address=address)
    assert "/" not in str(caught.value)
    assert "/proc/no" in stub.log[0]


def test_folders_go_and_names_in_a_graph_stay(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    version = stub.folder / "models" / "m" / "1"
    where = f"{version}/model.onnx and ipc:///proc/1/clients"
    problem = lrai.CompileError(f"node '/encoder/layer.0/Add' in {where} of tcp://10.0.0.5:7000")

    def refuse(*_: Any) -> None:
        raise problem

    monkeypatch.setattr(stub.module, "artifact_of", refuse)
    with pytest.raises(RuntimeError) as caught:
        stub.load()
    wanted = "node '/encoder/layer.0/Add' in model.onnx and clients of tcp://10.0.0.5:7000"
    assert str(caught.value) == wanted
    assert stub.log == [str(problem)]


def test_spaces_in_the_names_of_folders_hide_nothing_of_them(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    (inner := stub.folder / "all my models" / "of May").mkdir(parents=True)
    known = os.access  # a folder of the root may have spaces in its name, too
    monkeypatch.setattr(os, "access", lambda p, mode: str(p) == "/Our Own" or known(p, mode))
    words = f"{inner.parent}/a of '{inner}/b/c' is 3/4 at 5 rows/s, see {inner.parent}/none/d"
    words += " of /Our Own/e"

    def refuse(*_: Any) -> None:
        raise lrai.CompileError(words)

    monkeypatch.setattr(stub.module, "artifact_of", refuse)
    with pytest.raises(RuntimeError) as caught:
        stub.load()
    assert str(caught.value) == "a of 'c' is 3/4 at 5 rows/s, see d of e"


def files(error: BaseException) -> list[str]:
    """Return the files that pybind11 tells of an error: of who raised it, and of who called him."""
    raised = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    called = [frame.f_code.co_filename for frame, _ in traceback.walk_stack(raised)]
    return called[: called.index(__file__)]


def test_whoever_is_refused_something_learns_no_file(
    stub: Stub, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("/proc/nowhere")

    monkeypatch.setattr(model._held, "state", fail)
    monkeypatch.setattr(model._held.runtime, "start_all", fail)
    monkeypatch.setattr(stub.module, "settings_of", fail)
    hooks: list[tuple[Any, tuple[Any, ...]]] = [
        (model.auto_complete_config, (SimpleNamespace(as_dict=dict),)),
        (model.initialize, ({"model_config": "{}"},)),
        (model.execute, ([Request(row())],)),
        (model.is_ready, ()),
    ]
    for hook, given in hooks:
        with pytest.raises(RuntimeError) as caught:
            hook(*given)
        assert str(caught.value) == "the log tells more: OSError"
        assert files(caught.value) == ["lrai_triton"]
        assert "/proc/nowhere" in stub.log.pop()
