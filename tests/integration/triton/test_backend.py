"""A real Triton with models of `backend: "lrai"`, asked over HTTP and gRPC as its users ask."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from onnx import TensorProto, helper
from tritonclient.utils import InferenceServerException, np_to_triton_dtype
from tritonclient.utils import shared_memory as shm

import lrai_core as lrai
from benchmarks.host import Host
from benchmarks.processes import HOST, Server
from benchmarks.triton_server import Prepared, TritonServer, variables
from tests.integration.conftest import sentence
from tests.integration.test_runtime_faults import wait_until
from tests.integration.triton.server import EXPLICIT, Triton
from tests.pause import paused

pytestmark = pytest.mark.server

LRAI = 'backend: "lrai"\n'
PROTOCOLS = ("http", "grpc")
GATE = 1e-4
DTYPES = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64",
          "float16", "float32", "float64", "object")  # fmt: skip


def execution(way: str) -> str:
    """Return the parameter that says how requests are answered."""
    return f'parameters {{ key: "execution" value {{ string_value: "{way}" }} }}\n'


def queued(triton: Triton, name: str) -> float:
    """Return how many requests wait in Triton itself."""
    queue = rf'^nv_inference_pending_request_count{{[^}}]*"{name}"[^}}]*}} (\S+)$'
    return sum(map(float, re.findall(queue, triton.figures(), re.M)))


def identity(folder: Path, datatype: int, shape: list[Any]) -> Path:
    """Write a model that returns its input."""
    values = [helper.make_tensor_value_info(name, datatype, shape) for name in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def encoder(triton: Triton, minilm: Path) -> Iterator[str]:
    """Serve the sentence encoder by the one line."""
    with triton.serving("encoder", {1: minilm}, LRAI) as name:
        yield name


@pytest.fixture(scope="module")
def doubler(triton: Triton, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve a model of three numbers to three numbers."""
    folder = tmp_path_factory.mktemp("identity")
    with triton.serving("three", {1: identity(folder, TensorProto.FLOAT, ["n", 3])}, LRAI) as name:
        yield name


# One line


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_line_serves_the_model_as_onnxruntime_does(
    triton: Triton, encoder: str, minilm_session: onnxruntime.InferenceSession, protocol: str
) -> None:
    random = np.random.default_rng(0)
    for rows, length in ((1, 3), (2, 17), (5, 40)):
        inputs = sentence(random, rows, length)
        (expected,) = minilm_session.run(["sentence_embedding"], inputs)
        answer = triton.ask(encoder, inputs, protocol=protocol)
        np.testing.assert_allclose(answer["sentence_embedding"], expected, atol=GATE)


def test_the_configuration_is_filled_in_from_the_model(triton: Triton, encoder: str) -> None:
    config = triton.http.get_model_config(encoder)
    assert config["max_batch_size"] == 64
    assert {t["name"]: (t["data_type"], t["dims"]) for t in config["input"]} == {
        "input_ids": ("TYPE_INT64", [-1]),
        "attention_mask": ("TYPE_INT64", [-1]),
    }
    assert all(tensor["allow_ragged_batch"] for tensor in config["input"])
    assert "dynamic_batching" in config


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_many_callers_of_many_lengths_get_their_own_answers(
    triton: Triton, encoder: str, minilm_session: onnxruntime.InferenceSession, protocol: str
) -> None:
    random = np.random.default_rng(1)
    asked = [sentence(random, 1, int(length)) for length in random.integers(2, 60, 96)]
    with ThreadPoolExecutor(24) as callers:
        answers = list(callers.map(lambda one: triton.ask(encoder, one, protocol=protocol), asked))
    for one, answer in zip(asked, answers, strict=True):
        (expected,) = minilm_session.run(["sentence_embedding"], one)
        np.testing.assert_allclose(answer["sentence_embedding"], expected, atol=GATE)


def test_an_artifact_answers_as_its_source_does(
    triton: Triton, minilm_fp32: lrai.Artifact, minilm_session: onnxruntime.InferenceSession
) -> None:
    with triton.serving("compiled", {1: minilm_fp32.path}, LRAI) as name:
        inputs = sentence(np.random.default_rng(2), 3, 9)
        (expected,) = minilm_session.run(["sentence_embedding"], inputs)
        np.testing.assert_allclose(
            triton.ask(name, inputs)["sentence_embedding"], expected, atol=GATE
        )


@pytest.mark.parametrize("way", ["lists", "sender", "inline"])
def test_every_way_to_answer_gives_the_same(
    triton: Triton, minilm: Path, minilm_session: onnxruntime.InferenceSession, way: str
) -> None:
    text = LRAI + execution(way)
    random = np.random.default_rng(3)
    asked = [sentence(random, 1, int(length)) for length in random.integers(2, 30, 24)]
    with triton.serving(f"by_{way}", {1: minilm}, text) as name:
        with ThreadPoolExecutor(12) as callers:
            answers = list(callers.map(lambda one: triton.ask(name, one), asked))
        with pytest.raises(InferenceServerException, match="input_ids"):
            triton.ask(name, {"input_ids": np.zeros((1, 2), np.int64)})
    for one, answer in zip(asked, answers, strict=True):
        (expected,) = minilm_session.run(["sentence_embedding"], one)
        np.testing.assert_allclose(answer["sentence_embedding"], expected, atol=GATE)


# Datatypes


@pytest.fixture(scope="module")
def echo(triton: Triton, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve a model that returns an input of every datatype."""
    kinds = {
        dtype: TensorProto.STRING
        if dtype == "object"
        else helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        for dtype in DTYPES
    }
    inputs, outputs = (
        [helper.make_tensor_value_info(f"{end}_{of}", kind, ["n", 2]) for of, kind in kinds.items()]
        for end in "xy"
    )
    nodes = [helper.make_node("Identity", [f"x_{of}"], [f"y_{of}"]) for of in kinds]
    path = tmp_path_factory.mktemp("echo") / "model.onnx"
    onnx.save(
        helper.make_model(
            helper.make_graph(nodes, "g", inputs, outputs),
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=8,
        ),
        path,
    )
    with triton.serving("echo", {1: path}, LRAI) as name:
        yield name


def extremes(dtype: str) -> Any:
    """Return two rows of two values, the least and the largest among them."""
    if dtype == "object":
        return np.array([["a", "b\0c"], ["", "é" * 300]], object)
    if dtype == "bool":
        return np.array([[True, False], [False, True]])
    info: Any = np.finfo(dtype) if dtype.startswith("float") else np.iinfo(dtype)
    return np.array([[info.min, info.max], [0, 1]], dtype)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_datatype_comes_back_as_it_went(
    triton: Triton, echo: str, protocol: str, dtype: str
) -> None:
    given = {f"x_{of}": extremes(of) for of in DTYPES}
    answer = triton.ask(echo, given, protocol=protocol, outputs=[f"y_{dtype}"])
    assert list(answer) == [f"y_{dtype}"]
    own, values = answer[f"y_{dtype}"], extremes(dtype)
    if dtype == "object":
        own = np.array([text.decode() for text in own.flat], object).reshape(own.shape)
    assert own.dtype == values.dtype
    assert own.tolist() == values.tolist()


# What is refused


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": np.zeros((1, 4), np.float32)}, "unexpected shape|'x'"),
        ({"x": np.zeros((1, 3), np.float64)}, "datatype|data-type"),
        ({"z": np.zeros((1, 3), np.float32)}, "'?z'?"),
        ({"x": np.zeros((0, 3), np.float32)}, "row|batch|shape|byte size"),
        ({"x": np.zeros((100, 3), np.float32)}, "64"),
        ({"x": np.zeros(3, np.float32)}, "shape"),
    ],
)
def test_what_does_not_fit_is_refused_by_a_sentence_without_paths(
    triton: Triton, doubler: str, protocol: str, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(InferenceServerException, match=message) as caught:
        triton.ask(doubler, inputs, protocol=protocol)
    assert not re.search(r"/\w+/|shm_region|psm_|Traceback", str(caught.value))
    assert triton.ask(doubler, {"x": np.ones((1, 3), np.float32)})["y"].tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_text_that_is_not_utf_8_is_refused_alone(
    triton: Triton, tmp_path: Path, protocol: str
) -> None:
    model = identity(tmp_path, TensorProto.STRING, ["n", 1])
    with triton.serving("texts", {1: model}, LRAI) as name:
        with pytest.raises(InferenceServerException, match="'x': an element is not UTF-8"):
            triton.ask(name, {"x": np.array([[b"\xff\xfe"]], object)}, protocol=protocol)
        answer = triton.ask(name, {"x": np.array([[b"ok"]], object)}, protocol=protocol)
        assert answer["y"].tolist() == [[b"ok"]]


def test_nan_is_the_models_business_unless_it_is_to_be_refused(
    triton: Triton, doubler: str, tmp_path: Path
) -> None:
    nan = {"x": np.full((1, 3), np.nan, np.float32)}
    assert np.isnan(triton.ask(doubler, nan)["y"]).all()
    refusing = 'parameters { key: "limits.nan_policy" value { string_value: "reject" } }\n'
    model = identity(tmp_path, TensorProto.FLOAT, ["n", 3])
    with triton.serving("strict", {1: model}, LRAI + refusing + execution("inline")) as name:
        with pytest.raises(InferenceServerException, match="NaN"):
            triton.ask(name, nan)
        assert triton.ask(name, {"x": np.ones((1, 3), np.float32)})["y"].shape == (1, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LRAI + 'max_batch_size: 8\noutput { name: "y" data_type: TYPE_FP64 dims: [3] }',
         "output 'y': data_type is TYPE_FP64, not TYPE_FP32"),
        (LRAI + 'max_batch_size: 8\ninput { name: "x" data_type: TYPE_FP32 dims: [4] }',
         r"input 'x': dims are \[4\], the model has \[3\]"),
        (LRAI + 'parameters { key: "execution" value { string_value: "fast" } }',
         "execution is 'fast', allowed: auto, lists, sender, inline"),
        (LRAI + 'parameters { key: "scheduler.slo" value { string_value: "5" } }',
         r"unknown setting 'scheduler\.slo'"),
        (LRAI + 'parameters { key: "require.delta" value { string_value: "0.001" } }',
         "certificate"),
        (LRAI + 'parameters { key: "variant" value { string_value: "int3" } }', "int3"),
        (LRAI + 'max_batch_size: 8 input { name: "x" dims: [3] } input { name: "x" dims: [3] }',
         "input: one of them stands twice"),
        (LRAI + "instance_group { kind: KIND_CPU passive: true }",
         "instance_group: all are passive, and a request would crash Triton itself"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_met_is_refused_by_its_field(
    triton: Triton, tmp_path: Path, text: str, message: str
) -> None:
    model = identity(tmp_path, TensorProto.FLOAT, ["n", 3])
    assert_refused(triton, model, text, message)


def assert_refused(triton: Triton, model: Path, text: str, message: str) -> None:
    """Check what a client of either protocol learns of a load: why, and no folder of the server."""
    triton.put("refused", 1, model)
    (triton.repository / "refused" / "config.pbtxt").write_text(text)
    try:
        for client in (triton.http, triton.grpc):
            with pytest.raises(InferenceServerException, match=message) as caught:
                client.load_model("refused")
            said = str(caught.value).replace("source/weights.bin", "")  # a name in an artifact
            assert "/" not in said
    finally:
        triton.http.unload_model("refused")
        shutil.rmtree(triton.repository / "refused")


@pytest.mark.parametrize("way", ["inline", "lists", "sender"])
@pytest.mark.parametrize("tensors", ["", "data_type: TYPE_FP32 dims: [1]"])
def test_a_tensor_without_dimensions_is_one_number_for_triton(
    triton: Triton, tmp_path: Path, way: str, tensors: str
) -> None:
    """As onnxruntime's backend has it; Triton itself knows no tensor without dimensions."""
    values: dict[str, list[Any]] = {"x": ["n", 3], "k": [], "y": ["n", 3], "m": []}
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in values.items()]
    nodes = [
        helper.make_node("Mul", ["x", "k"], ["y"]),
        helper.make_node("ReduceMean", ["y"], ["m"], keepdims=0),
    ]
    graph = helper.make_graph(nodes, "g", infos[:2], infos[2:])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "m.onnx")
    text = LRAI + execution(way)
    if tensors:
        whole = "data_type: TYPE_FP32 dims: [-1, 3]"
        text += f'input [{{ name: "x" {whole} }}, {{ name: "k" {tensors} }}]\n'
        text += f'output [{{ name: "y" {whole} }}, {{ name: "m" {tensors} }}]\n'
    given = {"x": np.full((2, 3), 2, np.float32), "k": np.array([3], np.float32)}
    with triton.serving("numbers", {1: tmp_path / "m.onnx"}, text) as name:
        for protocol in PROTOCOLS:
            answer = triton.ask(name, given, protocol=protocol)
            np.testing.assert_array_equal(answer["y"], np.full((2, 3), 6, np.float32))
            np.testing.assert_array_equal(answer["m"], np.array([6], np.float32))


def test_the_file_that_the_configuration_names_is_served(triton: Triton, tmp_path: Path) -> None:
    """As by onnxruntime's backend, also where another model has the usual name."""
    for folder, width in (("usual", 3), ("named", 5)):
        (tmp_path / folder).mkdir()
        identity(tmp_path / folder, TensorProto.FLOAT, ["n", width])
    triton.put("named", 1, tmp_path / "usual" / "model.onnx")
    shutil.copy(tmp_path / "named" / "model.onnx", triton.repository / "named" / "1" / "net.onnx")
    text = f'{LRAI}default_model_filename: "net.onnx"\n'
    with triton.serving("named", {}, text) as name:
        x = np.ones((2, 5), np.float32)
        np.testing.assert_array_equal(triton.ask(name, {"x": x})["y"], x)


def test_a_version_without_a_model_or_with_a_damaged_one_is_refused(
    triton: Triton, tmp_path: Path, minilm_fp32: lrai.Artifact
) -> None:
    empty, garbage = tmp_path / "notes.txt", tmp_path / "model.onnx"
    empty.write_text("nothing")
    garbage.write_bytes(b"\x08\x07garbage" * 100)
    damaged = tmp_path / "damaged.lrai"
    shutil.copytree(minilm_fp32.path, damaged)
    (damaged / "manifest.json").write_bytes(b"{}")
    (without := tmp_path / "without.lrai").mkdir()
    for model, message in (
        (without, r"model\.lrai is not an artifact"),
        (empty, r"holds neither model\.onnx nor model\.lrai"),
        (garbage, r"model\.onnx cannot be used"),
        (damaged, "manifest"),
    ):
        assert_refused(triton, model, LRAI, message)


def test_an_artifact_that_was_changed_after_it_was_compiled_is_refused(
    triton: Triton, tmp_path: Path, minilm_fp32: lrai.Artifact
) -> None:
    changed = tmp_path / "changed.lrai"
    shutil.copytree(minilm_fp32.path, changed)
    (weights,) = changed.glob("source/weights.bin")
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    assert_refused(triton, changed, LRAI, r"weights\.bin")


def test_a_runtime_that_cannot_be_reached_is_said_without_where_it_would_be(
    triton: Triton, tmp_path: Path
) -> None:
    nowhere = 'parameters { key: "runtime.address" value { string_value: "/proc/nowhere" } }\n'
    model = identity(tmp_path, TensorProto.FLOAT, ["n", 3])
    words = "no folder nowhere: .*; see runtime.address, runtime.socket_dir and its log"
    assert_refused(triton, model, LRAI + nowhere + execution("lists"), words)
    assert "no folder /proc/nowhere" in triton.server.log.read_text(errors="replace")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_errors_have_the_codes_of_their_protocol(
    triton: Triton, encoder: str, protocol: str
) -> None:
    inputs = sentence(np.random.default_rng(6), 1, 8)
    codes = {"http": ("400", "503"), "grpc": ("INVALID_ARGUMENT", "UNAVAILABLE")}
    invalid, unavailable = codes[protocol]
    with pytest.raises(InferenceServerException, match="an integer is needed") as caught:
        triton.ask(encoder, inputs, protocol=protocol, parameters={"lrai_priority": "high"})
    assert caught.value.status().endswith(invalid)
    with pytest.raises(InferenceServerException, match="ms allowed") as caught:
        triton.ask(encoder, inputs, protocol=protocol, timeout=1)  # of a microsecond
    assert caught.value.status().endswith(unavailable)
    said = {"lrai_priority": -1, "another's": True}
    assert triton.ask(encoder, inputs, protocol=protocol, parameters=said, priority=3)


def test_a_caller_that_hangs_up_in_the_middle_harms_nobody(triton: Triton, doubler: str) -> None:
    host, port = triton.server.http.split(":")
    head = f"POST /v2/models/{doubler}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n\r\n"
    for cut in (len(head) // 2, len(head), len(head) + 20):
        with socket.create_connection((host, int(port))) as line:
            line.sendall((head + '{"inputs": [{"name": "x", "sha').encode()[:cut])
    assert triton.ask(doubler, {"x": np.ones((1, 3), np.float32)})["y"].tolist() == [[1, 1, 1]]


def test_large_texts_are_bounded_like_any_request(triton: Triton, tmp_path: Path) -> None:
    small = 'parameters { key: "limits.request_bytes" value { string_value: "100000" } }\n'
    model = identity(tmp_path, TensorProto.STRING, ["n", 1])
    with triton.serving("large", {1: model}, LRAI + small + execution("inline")) as name:
        for size in (1, 90_000):
            x = np.array([[b"a" * size]], object)
            assert triton.ask(name, {"x": x})["y"].tolist() == x.tolist()
        with pytest.raises(InferenceServerException, match="one request has 100000 at most"):
            triton.ask(name, {"x": np.array([[b"a" * 200_000]], object)})


# What Triton's users expect


def test_requested_outputs_alone_come_back(triton: Triton, encoder: str) -> None:
    inputs = sentence(np.random.default_rng(4), 1, 5)
    answer = triton.ask(encoder, inputs, outputs=["sentence_embedding"])
    assert list(answer) == ["sentence_embedding"]


def test_two_versions_serve_side_by_side(triton: Triton, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    models = {
        n: identity(folder, TensorProto.FLOAT, ["n", n])
        for n, folder in zip((1, 2), folders, strict=True)
    }
    text = LRAI + "version_policy: { all {} }\n"
    with triton.serving("versions", models, text) as name:
        for version in (1, 2):
            x = np.ones((1, version), np.float32)
            assert triton.ask(name, {"x": x}, version=str(version))["y"].shape == (1, version)


@pytest.mark.parametrize(
    ("policy", "serves"), [("specific { versions: [1] }", 1), ("latest { num_versions: 1 }", 2)]
)
def test_a_version_that_the_policy_leaves_out_is_not_served(
    triton: Triton, tmp_path: Path, policy: str, serves: int
) -> None:
    models = {}
    for n in (1, 2):
        (folder := tmp_path / str(n)).mkdir()
        models[n] = identity(folder, TensorProto.FLOAT, ["n", n])
    with triton.serving("policy", models, f"{LRAI}version_policy: {{ {policy} }}\n") as name:
        x = np.ones((1, serves), np.float32)
        for version in ("", str(serves)):
            assert triton.ask(name, {"x": x}, version=version)["y"].tolist() == x.tolist()
        with pytest.raises(InferenceServerException, match="version"):
            triton.ask(name, {"x": x}, version=str(3 - serves))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_clients_may_hand_tensors_over_and_get_them_in_shared_memory(
    triton: Triton, doubler: str, protocol: str
) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    kit: Any = triton_http if protocol == "http" else triton_grpc
    client: Any = triton.http if protocol == "http" else triton.grpc
    given, wanted = kit.InferInput("x", list(x.shape), "FP32"), kit.InferRequestedOutput("y")
    regions = dict[str, Any]()
    try:
        for tensor in (given, wanted):
            name = tensor.name()
            key = f"/lrai_test_{name}_{os.getpid()}"
            regions[name] = shm.create_shared_memory_region(name, key, x.nbytes)
            client.register_system_shared_memory(name, key, x.nbytes)
            tensor.set_shared_memory(name, x.nbytes)
        shm.set_shared_memory_region(regions["x"], [x])
        client.infer(doubler, [given], outputs=[wanted])
        answer = shm.get_contents_as_numpy(regions["y"], np.float32, x.shape).copy()
        np.testing.assert_array_equal(answer, x)
    finally:
        client.unregister_system_shared_memory()
        for region in regions.values():
            shm.destroy_shared_memory_region(region)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("sequence", [7, "seven"])
def test_requests_of_a_sequence_are_answered_each_for_itself(
    triton: Triton, doubler: str, protocol: str, sequence: int | str
) -> None:
    for value in (1, 2):
        x = np.full((1, 3), value, np.float32)
        said: dict[str, Any] = {"sequence_start": value == 1, "sequence_end": value == 2}
        answer = triton.ask(doubler, {"x": x}, protocol=protocol, sequence_id=sequence, **said)
        np.testing.assert_array_equal(answer["y"], x)


def test_a_trace_of_the_caller_has_what_triton_saw_of_his_request(
    prepared: Prepared, tmp_path: Path
) -> None:
    entry = tmp_path / "repository" / "traced"
    (entry / "1").mkdir(parents=True)
    identity(entry / "1", TensorProto.FLOAT, ["n", 3])
    (entry / "config.pbtxt").write_text(LRAI)
    traces = {
        "http": "0af7651916cd43dd8448eb211c80319c",
        "grpc": "4bf92f3577b34da6a3ce929d0e0e4736",
    }
    x = np.ones((1, 3), np.float32)
    with collector() as (url, told):
        settings = ["mode=opentelemetry", "level=TIMESTAMPS", "rate=1", f"opentelemetry,url={url}"]
        settings.append("opentelemetry,bsp_schedule_delay=100")  # ms between what it sends
        options = [f"--trace-config={setting}" for setting in settings]
        with (
            TritonServer(entry.parent, **prepared._asdict(), arguments=options) as server,
            contextlib.closing(Triton(server, entry.parent)) as triton,
        ):
            for protocol, trace in traces.items():
                parent = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
                answer = triton.ask("traced", {"x": x}, protocol=protocol, headers=parent)
                np.testing.assert_array_equal(answer["y"], x)

            def all_told() -> bool:
                spans = b"".join(told)  # in JSON, or not: then the trace is 16 bytes
                forms = [(trace.encode(), bytes.fromhex(trace)) for trace in traces.values()]
                own = all(any(form in spans for form in either) for either in forms)
                return own and b"compute" in spans

            wait_until(all_told, 60)  # now: a server whose time to exit is over tells no more


@contextlib.contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """Yield where spans may be sent, and what was sent there."""
    told = list[bytes]()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer((HOST, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_port}/v1/traces", told
        finally:
            server.shutdown()
            thread.join()


def test_instances_and_models_share_one_runtime_and_the_last_one_unloads(
    triton: Triton, minilm_fp32: lrai.Artifact
) -> None:
    text = LRAI + "instance_group { count: 2 kind: KIND_CPU }\n"
    with triton.serving("twice", {1: minilm_fp32.path}, text) as name:
        triton.ask(name, sentence(np.random.default_rng(5), 1, 4))
        loaded = [model for model in triton.runtime_models() if model.startswith("twice:1:")]
        assert len(loaded) == 1, "two instances, one model"
    deadline = time.monotonic() + 60
    while any(model.startswith("twice:") for model in triton.runtime_models()):
        assert time.monotonic() < deadline, "nobody holds it any more"
        time.sleep(0.1)


def test_what_lrai_counts_stands_beside_tritons_own_figures(
    triton: Triton, doubler: str, encoder: str
) -> None:
    for _ in range(3):
        triton.ask(doubler, {"x": np.ones((1, 3), np.float32)})
    parted = sentence(np.random.default_rng(6), 1, 8)
    parted["attention_mask"] = parted["attention_mask"][:, :5]
    with pytest.raises(InferenceServerException, match="attention_mask"):
        triton.ask(encoder, parted, protocol="grpc")
    labels = rf'[^}}]*model="{doubler}"[^}}]*variant="fp32"[^}}]*'
    answered = rf"lrai_answered_total{{{labels}}} ([\d.e+]+)"
    refused = rf'lrai_refused_total{{[^}}]*model="{encoder}"[^}}]*reason="InvalidTensor"[^}}]*}} '

    def all_stand() -> bool:
        text = triton.figures()
        found = re.search(answered, text)
        ours = found and float(found[1]) >= 3 and re.search(refused, text)
        return bool(ours) and "nv_inference_request_success" in text

    wait_until(all_stand, 60)  # a stub writes now and then


WHOLE = """
input { name: "input_ids" data_type: TYPE_INT64 dims: [-1, -1] }
input { name: "attention_mask" data_type: TYPE_INT64 dims: [-1, -1] }
output { name: "sentence_embedding" data_type: TYPE_FP32 dims: [-1, 384] }
"""
OUTSIDE = 'parameters { key: "actor.isolation" value { string_value: "process" } }\n'


@pytest.mark.parametrize("shapes", ["", WHOLE], ids=["in lists", "one by one"])
def test_requests_that_come_together_share_calls(
    triton: Triton, minilm: Path, minilm_session: onnxruntime.InferenceSession, shapes: str
) -> None:
    with triton.serving("shares", {1: minilm}, LRAI + OUTSIDE + shapes) as name:
        assert_shared(triton, name, minilm_session)


def test_so_do_those_of_a_configuration_that_triton_was_told_not_to_complete(
    prepared: Prepared,
    tmp_path: Path,
    minilm_fp32: lrai.Artifact,
    minilm_session: onnxruntime.InferenceSession,
) -> None:
    """Which has no `dynamic_batching`, so that they come one by one."""
    (repository := tmp_path / "repository").mkdir()
    text = LRAI + OUTSIDE + "max_batch_size: 8" + WHOLE.replace("dims: [-1, ", "dims: [")
    with (
        TritonServer(
            repository,
            **prepared._asdict(),
            arguments=(*EXPLICIT, "--disable-auto-complete-config"),
            env={"LRAI_ACTOR_THREADS": "1", "LRAI_ACTOR_HANG_SECONDS": "60"},  # some are stopped
        ) as server,
        contextlib.closing(Triton(server, repository)) as triton,
        triton.serving("written", {1: minilm_fp32.path}, text) as name,
    ):
        assert "dynamic_batching" not in triton.http.get_model_config(name)
        assert_shared(triton, name, minilm_session)


def assert_shared(triton: Triton, name: str, session: onnxruntime.InferenceSession) -> None:
    """Check that requests of callers who ask at the same time get their answers in few calls."""
    random = np.random.default_rng(9)
    asked = [sentence(random, 1, 30) for _ in range(64)]
    triton.ask(name, asked[0])
    before = triton.stats()

    def all_wait() -> bool:
        """Return whether all have come: to the runtime, or to Triton's queue before it."""
        accepted = triton.stats()["request_accepted"] - before["request_accepted"]
        return accepted + queued(triton, name) == len(asked)

    with ThreadPoolExecutor(len(asked)) as callers, paused(triton.actor_pid(name)):
        answered = callers.map(lambda one: triton.ask(name, one), asked)
        wait_until(all_wait)
    answers = list(answered)
    after = triton.stats()
    for one, answer in zip(asked, answers, strict=True):
        (expected,) = session.run(["sentence_embedding"], one)
        np.testing.assert_allclose(answer["sentence_embedding"], expected, atol=GATE)
    assert after["request_answered"] - before["request_answered"] == len(asked)
    assert after["batch_completed"] - before["batch_completed"] <= len(asked) // 2


def test_no_call_has_more_rows_than_max_batch_size(triton: Triton, minilm: Path) -> None:
    text = LRAI + execution("sender") + "max_batch_size: 4\n"
    asked = sentence(np.random.default_rng(9), 1, 30)
    with triton.serving("small", {1: minilm}, text) as name:
        before = triton.stats().get("batch_completed", 0)
        with ThreadPoolExecutor(32) as callers:
            list(callers.map(lambda _: triton.ask(name, asked), range(96)))
        assert triton.stats()["batch_completed"] - before >= 96 // 4


@pytest.mark.parametrize("size", [0, 4])
def test_a_model_whose_rows_depend_on_one_another_keeps_them(
    triton: Triton, tmp_path: Path, size: int
) -> None:
    """As of a file that was quantised dynamically: there one scale is for all rows."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in "xy"]
    mean = helper.make_node("ReduceMean", ["x"], ["m"], axes=[0])
    nodes = [mean, helper.make_node("Sub", ["x", "m"], ["y"])]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    asked = np.random.default_rng(3).normal(size=(24, 3, 3)).astype(np.float32)
    text = LRAI + f"max_batch_size: {size}\n"
    with triton.serving("mean", {1: tmp_path / "model.onnx"}, text) as name:
        config = triton.http.get_model_config(name)
        assert config["input"][0]["dims"] == ([3] if size else [-1, 3])
        assert "dynamic_batching" not in config
        with ThreadPoolExecutor(8) as callers:
            answers = list(callers.map(lambda x: triton.ask(name, {"x": x})["y"], asked))
    for x, answer in zip(asked, answers, strict=True):
        np.testing.assert_allclose(answer, x - x.mean(0), atol=GATE)


def test_what_the_queue_has_no_room_for_waits_in_the_stub(
    prepared: Prepared, tmp_path: Path
) -> None:
    few = {"LRAI_SCHEDULER_MAX_QUEUE_BYTES": str(4 << 20), "LRAI_ACTOR_THREADS": "1"}
    folder = tmp_path / "repository" / "large" / "1"
    folder.mkdir(parents=True)
    identity(folder, TensorProto.FLOAT, ["n", 1 << 18])  # numbers, of a MiB
    (folder.parent / "config.pbtxt").write_text(LRAI + execution("lists"))
    x = np.ones((1, 1 << 18), np.float32)
    with TritonServer(tmp_path / "repository", **prepared._asdict(), env=few) as server:

        def ask(_: int) -> Any:
            given = triton_grpc.InferInput("x", list(x.shape), "FP32")
            given.set_data_from_numpy(x)
            with triton_grpc.InferenceServerClient(server.grpc) as client:
                return client.infer("large", [given]).as_numpy("y")

        with ThreadPoolExecutor(24) as callers:
            for answer in callers.map(ask, range(48)):
                np.testing.assert_array_equal(answer, x)


@pytest.mark.parametrize("way", ["lists", "sender"])
def test_what_a_caller_who_leaves_has_asked_is_not_computed(
    triton: Triton, minilm: Path, way: str
) -> None:
    rows = 8  # of one request, which is a call for itself
    alone = f'parameters {{ key: "scheduler.max_batch_rows" value {{ string_value: "{rows}" }} }}\n'
    # All eight are one list, for which Triton waits.
    alone += f"max_batch_size: {8 * rows}\n"
    alone += "dynamic_batching { max_queue_delay_microseconds: 600000000 }\n"
    inputs = []
    for name, array in sentence(np.random.default_rng(6), rows, 30).items():
        kind = np_to_triton_dtype(array.dtype)
        inputs.append(triton_grpc.InferInput(name, list(array.shape), kind))
        inputs[-1].set_data_from_numpy(array)
    seen: list[Any] = []
    with triton.serving(f"left-{way}", {1: minilm}, LRAI + execution(way) + alone) as name:
        before = triton.stats()

        def counted(what: str) -> int:
            return triton.stats().get(what, 0) - before.get(what, 0)

        def start() -> Any:
            return triton.grpc.async_infer(name, inputs, lambda result, error: seen.append(error))

        def all_wait() -> bool:
            return counted("request_accepted") + queued(triton, name) == len(calls)

        calls = list[Any]()
        with paused(triton.actor_pid(name)):  # in the first one, when the last three are cancelled
            for _ in range(8):  # in this order: by themselves they overtake each other
                calls.append(start())
                wait_until(all_wait)
            wait_until(lambda: counted("request_accepted") == len(calls))
            for call in calls[-3:]:
                call.cancel()
            wait_until(lambda: counted("request_failed") == 3)
        wait_until(lambda: len(seen) == len(calls), 60)
        assert counted("request_answered") == counted("batch_completed") == 5
        assert sum(error is None for error in seen) == 5
        refused = rf'lrai_refused_total{{[^}}]*model="{name}"[^}}]*"Cancelled"[^}}]*}} 3'
        wait_until(lambda: re.search(refused, triton.figures()) is not None)


def test_inline_what_a_caller_who_leaves_has_waiting_is_not_computed(
    triton: Triton, minilm: Path
) -> None:
    def asked(rows: int, length: int) -> list[Any]:
        inputs = []
        for name, array in sentence(np.random.default_rng(6), rows, length).items():
            kind = np_to_triton_dtype(array.dtype)
            inputs.append(triton_grpc.InferInput(name, list(array.shape), kind))
            inputs[-1].set_data_from_numpy(array)
        return inputs

    def figure(what: str) -> float:
        found = re.findall(rf'^{what}{{[^}}]*"left-inline"[^}}]*}} (\S+)$', triton.figures(), re.M)
        return sum(map(float, found))

    errors: list[Any] = []
    text = LRAI + execution("inline") + "max_batch_size: 24\n"
    with triton.serving("left-inline", {1: minilm}, text) as name:

        def start(inputs: list[Any]) -> Any:
            return triton.grpc.async_infer(name, inputs, lambda result, error: errors.append(error))

        def arrived() -> float:
            """Return how many have come, but for the one that runs."""
            seen = "nv_inference_request_success", "nv_inference_pending_request_count"
            return sum(map(figure, seen))

        long, short = asked(24, 300), asked(1, 8)
        for _ in range(2):  # each a list of its own; one runs when the other waits
            start(long)
        wait_until(lambda: arrived() >= 1)
        calls = [start(short) for _ in range(12)]
        wait_until(lambda: arrived() >= 13)
        for call in calls[:-2]:
            call.cancel()
        wait_until(lambda: len(errors) == 14, 60)
        ended = "lrai_answered_total", "lrai_refused_total", "nv_inference_request_failure"
        wait_until(lambda: sum(map(figure, ended)) == 14)
        assert figure("lrai_answered_total") == sum(error is None for error in errors) == 4


def test_a_model_of_ours_is_a_step_of_an_ensemble(triton: Triton, doubler: str) -> None:
    text = f"""
platform: "ensemble"
max_batch_size: 64
input {{ name: "a" data_type: TYPE_FP32 dims: [3] }}
output {{ name: "b" data_type: TYPE_FP32 dims: [3] }}
ensemble_scheduling {{
  step {{
    model_name: "{doubler}" model_version: -1
    input_map {{ key: "x" value: "a" }} output_map {{ key: "y" value: "b" }}
  }}
}}
"""
    with triton.serving("steps", {1: None}, text) as name:
        a = np.full((2, 3), 7, np.float32)
        np.testing.assert_array_equal(triton.ask(name, {"a": a})["b"], a)


CALLER = """
import asyncio
import json

import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    EXECUTE

def asked(request):
    x = pb_utils.Tensor("x", pb_utils.get_input_tensor_by_name(request, "a").as_numpy())
    said = json.loads(request.parameters() or "{}")
    return pb_utils.InferenceRequest(
        model_name="MODEL", requested_output_names=["y"], inputs=[x], parameters=said
    )

def answered(answer):
    if answer.has_error():
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(answer.error().message()))
    y = pb_utils.get_output_tensor_by_name(answer, "y").as_numpy()
    return pb_utils.InferenceResponse([pb_utils.Tensor("b", y)])
"""
AT_ONCE = """
    def execute(self, requests):
        return [answered(asked(request).exec()) for request in requests]
"""
LATER = """
    async def execute(self, requests):
        answers = [asked(request).async_exec() for request in requests]
        return [*map(answered, await asyncio.gather(*answers))]
"""


@pytest.mark.parametrize("execute", [AT_ONCE, LATER], ids=["exec", "async_exec"])
def test_a_model_of_ours_answers_a_call_of_another_model(
    triton: Triton, doubler: str, tmp_path: Path, execute: str
) -> None:
    caller = tmp_path / "model.py"
    caller.write_text(CALLER.replace("    EXECUTE", execute).replace("MODEL", doubler))
    text = (
        'backend: "python"\nmax_batch_size: 8\n'
        'input { name: "a" data_type: TYPE_FP32 dims: [3] }\n'
        'output { name: "b" data_type: TYPE_FP32 dims: [3] }\n'
        "dynamic_batching {}\n"
    )
    with triton.serving("bls", {1: caller}, text) as name:
        asked = [np.full((1, 3), value, np.float32) for value in range(16)]
        with ThreadPoolExecutor(8) as callers:
            answers = list(callers.map(lambda a: triton.ask(name, {"a": a})["b"], asked))
        np.testing.assert_array_equal(answers, asked)
        with pytest.raises(InferenceServerException, match="an integer is needed") as caught:
            triton.ask(name, {"a": asked[0]}, parameters={"lrai_priority": "high"})
        assert "/" not in str(caught.value)
        np.testing.assert_array_equal(triton.ask(name, {"a": asked[1]})["b"], asked[1])


def test_warm_up_of_the_configuration_runs_before_the_first_caller(
    triton: Triton, tmp_path: Path
) -> None:
    text = (
        LRAI
        + execution("lists")
        + """
max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: [3] }
output { name: "y" data_type: TYPE_FP32 dims: [3] }
model_warmup {
  name: "zeros" batch_size: 2
  inputs { key: "x" value { data_type: TYPE_FP32 dims: [3] zero_data: true } }
}
"""
    )
    before = triton.stats().get("request_accepted", 0)  # it may not run yet
    with triton.serving("warm", {1: identity(tmp_path, TensorProto.FLOAT, ["n", 3])}, text) as name:
        assert triton.stats()["request_accepted"] > before
        assert triton.ask(name, {"x": np.ones((4, 3), np.float32)})["y"].shape == (4, 3)


# Faults


class Load:
    """Callers in threads, until told to stop; every answer is checked."""

    def __init__(self, ask: Callable[[], None], callers: int = 4) -> None:
        self.failures: list[str] = []
        self.answered = 0
        self.longest_seconds = 0.0
        self._ask, self._stop, self._lock = ask, threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._run) for _ in range(callers)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            begun = time.monotonic()
            try:
                self._ask()
            except (InferenceServerException, AssertionError) as error:
                with self._lock:
                    self.failures.append(str(error))
            else:
                with self._lock:
                    self.answered += 1
                    self.longest_seconds = max(self.longest_seconds, time.monotonic() - begun)


def test_an_actor_that_is_killed_costs_time_and_no_answer(triton: Triton, minilm: Path) -> None:
    inputs = sentence(np.random.default_rng(7), 1, 12)
    with triton.serving("isolated", {1: minilm}, LRAI + execution("lists")) as name:
        expected = triton.ask(name, inputs)["sentence_embedding"]

        def ask() -> None:
            answer = triton.ask(name, inputs)["sentence_embedding"]
            np.testing.assert_allclose(answer, expected, atol=GATE)

        with Load(ask) as load:
            _wait_until_grown(load)
            for _ in range(2):
                os.kill(triton.actor_pid(name), signal.SIGKILL)
                _wait_until_grown(load)
    assert load.failures == []
    assert load.longest_seconds < 60  # within two seconds, says benchmarks/triton_faults.py


def _wait_until_grown(load: Load) -> None:
    """Return once it is answered again: one who asks may still have had the answer from before."""
    wanted = load.answered + 20
    wait_until(lambda: load.answered >= wanted, 90)


LITTLE = 'mount -t tmpfs -o size=8m none /dev/shm && exec "$@"'


@pytest.mark.parametrize("way", ["inline", "lists", "sender"])
def test_what_has_no_room_in_shared_memory_is_refused_and_an_answer_names_none(
    prepared: Prepared, tmp_path: Path, way: str
) -> None:
    times = 64  # the text, in an answer
    (entry := tmp_path / "models" / "long" / "1").mkdir(parents=True)
    repeated(entry / "model.onnx", times)
    (entry.parent / "config.pbtxt").write_text(LRAI + execution(way))
    needed = variables(prepared.environment)
    triton = shutil.which("tritonserver", path=needed["PATH"])
    assert triton is not None
    command = ["unshare", "--map-root-user", "--mount", "sh", "-ec", LITTLE, "sh", triton]
    command += [f"--model-repository={entry.parents[1]}", f"--http-address={HOST}"]
    command += [f"--backend-directory={prepared.backends}", "--http-port={port}"]
    command += ["--allow-grpc=false", "--allow-metrics=false", "--exit-timeout-secs=5"]
    with Host() as host:
        own = {"LRAI_RUNTIME_SOCKET_DIR": str(host.folder), "LRAI_ACTOR_THREADS": "1"}
        with (
            Server(command, tmp_path / "log", variables=needed | own) as server,
            triton_http.InferenceServerClient(f"{HOST}:{server.port}") as client,
        ):
            server.wait_until_ready("/v2/health/ready")

            def ask(size: int) -> int:
                given = triton_http.InferInput("x", [1, 1], "BYTES")
                given.set_data_from_numpy(np.array([[b"a" * size]], object))
                (answer,) = client.infer("long", [given]).as_numpy("y")
                return sum(map(len, answer))

            for _ in range(2):
                assert ask(1000) == 1000 * times
                with pytest.raises(InferenceServerException, match="no memory left") as caught:
                    ask(200_000)
                assert caught.value.status() == "503"
                assert not re.search(r"shm|pool|key|/", str(caught.value))
            assert ask(20_000) == 20_000 * times, "for this there is"
            with pytest.raises(InferenceServerException, match="memory") as caught:
                ask(9 << 20)  # which reaches no backend: Triton has no room for it
            assert caught.value.status() == "500"
            assert ask(1000) == 1000 * times


def repeated(path: Path, times: int) -> None:
    """Write a model that gives a text so many times."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.STRING, ["n", width])
        for name, width in (("x", 1), ("y", times))
    ]
    nodes = [helper.make_node("Concat", ["x"] * times, ["y"], axis=1)]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)


def test_reloads_and_another_version_under_load_fail_nobody(
    triton: Triton, minilm: Path, minilm_fp32: lrai.Artifact
) -> None:
    inputs = sentence(np.random.default_rng(8), 1, 8)
    with triton.serving("moving", {1: minilm}, LRAI) as name:
        expected = triton.ask(name, inputs)["sentence_embedding"]

        def ask() -> None:
            answer = triton.ask(name, inputs)["sentence_embedding"]
            np.testing.assert_allclose(answer, expected, atol=GATE)

        with Load(ask) as load:
            _wait_until_grown(load)
            triton.load(name)
            _wait_until_grown(load)
            triton.put(name, 2, minilm_fp32.path)
            triton.load(name)
            assert triton.http.is_model_ready(name, "2")
            _wait_until_grown(load)
    assert load.failures == []
