"""One table through the core and every adapter: the same requests have the same outcomes."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tokenizers
import tritonclient.http as triton_http
from mlflow.models import ModelSignature
from numpy.typing import NDArray
from PIL import Image
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

import lrai_bentoml
import lrai_core as lrai
import lrai_mlflow
from benchmarks.processes import HOST, Server
from tests.integration.mlflow_server import post, start
from tests.integration.sagemaker.conftest import Container
from tests.integration.test_runtime_faults import python, wait_until
from tests.integration.triton.server import Triton
from tests.own_runtime import daemon_pids, own_runtime
from tests.pause import pause
from tests.tiny_models import (
    DATATYPES,
    WORDS,
    column_model,
    datatype_model,
    picture_model,
    text_model,
    token_model,
    tokenizer,
)

pytestmark = pytest.mark.server

Array = NDArray[Any]
MODELS = {
    "c_tokens": token_model,
    "c_columns": column_model,
    "c_kinds": datatype_model,
    "c_text": text_model,
    "c_picture": picture_model,
}
MOST_ROWS = 64  # of one request; Triton's own limit of a list, too
MOST_BYTES = 1 << 16
MOST_QUEUED = 16 * MOST_ROWS
LIMITS = {
    "limits.request_rows": str(MOST_ROWS),
    "limits.request_bytes": str(MOST_BYTES),
    "limits.nan_policy": "reject",
    "scheduler.max_queue_rows": str(MOST_QUEUED),
}
SHARED = ("shared", "triton", "mlflow", "bentoml", "sagemaker")
# Where nothing says where models run, and as hosts are installed: in the process that is asked.
INLINE = tuple(f"{name}, inline" for name in ("embedded", *SHARED[1:]))
HOSTS = ("embedded", *SHARED, *INLINE)
ONE, ONE_MODEL = ("mlflow, inline", "sagemaker, inline"), ("c_tokens",)  # they serve no other
TRITON, SAGEMAKER, BENTOML = (
    tuple(host for host in HOSTS if host.startswith(name))
    for name in ("triton", "sagemaker", "bentoml")
)
WAYS = dict.fromkeys(TRITON, ("HTTP", "gRPC")) | dict.fromkeys(BENTOML, ("mounted", "API"))
MOUNTED, API = (tuple(f"{host}, {way}" for host in BENTOML) for way in WAYS["bentoml"])
GRPC = {"INVALID_ARGUMENT": 400, "NOT_FOUND": 404, "INTERNAL": 500, "UNAVAILABLE": 503}
DEADLY = 13  # tokens, of which an actor dies
_ACTOR = f"""
import os, signal, sys
from lrai_core.actor.actor import Actor, main

execute = Actor._execute

def mortal(self, message, frames):
    if any(part[0].shape[-1:] == ({DEADLY},) for part in message.parts):
        os.kill(os.getpid(), signal.SIGKILL)
    execute(self, message, frames)

Actor._execute = mortal
main(sys.argv[1:])
"""
_SERVICE = """
import bentoml
import numpy as np

import lrai_bentoml

models = [lrai_bentoml.runner(tag) for tag in {tags}]

@bentoml.service
@bentoml.asgi_app(lrai_bentoml.asgi_app(*models))
class Conformance:
    {names} = models
{apis}
Conformance.add_asgi_middleware(lrai_bentoml.Guard)
"""
_API = """
    @bentoml.api
    async def ask_{name}(self, {parameters}) -> dict[str, np.ndarray]:
        made = await self.{name}.async_run({inputs})
        return dict(zip({outputs}, made if isinstance(made, tuple) else (made,), strict=True))
"""


@dataclass(frozen=True)
class Case:
    """A request, and what has to come of it.

    Attributes:
        status: Of HTTP, and of the core's error.
        says: In every refusal, but for hosts that keep it to their log.
        other: Statuses of hosts that have none of their own for it, or of ways to ask them.
        silent: Ways that say that there was an error, and no more.
        without: Hosts, or ways, that cannot state such a request.
        full: Whether it finds the queue full.
    """

    name: str
    model: str
    inputs: Mapping[str, Array]
    outputs: tuple[str, ...] = ()
    timeout_ms: float | None = None
    status: int = 200
    says: str = ""
    other: Mapping[str, int] = field(default_factory=dict)
    silent: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    full: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a host answered: outputs, or why not, and when it says that trying again makes sense."""

    status: int
    outputs: Mapping[str, Array]
    text: str = ""
    retry_after_seconds: float | None = None


def tokens(rows: int, length: int, **changes: Array) -> dict[str, Array]:
    ids = np.arange(rows * length, dtype=np.int64).reshape(rows, length) % 100
    mask = np.ones_like(ids)
    mask[:, 1 + length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask} | changes


def kinds() -> dict[str, Array]:
    made: dict[str, Array] = {}
    for name in DATATYPES:
        spec = {"FLOAT16": "float16", "FLOAT": "float32", "DOUBLE": "float64", "BOOL": "bool"}
        if name == "STRING":
            made[f"in_{name}"] = np.array(["", "é😀", 'a "b", c'], np.object_)
            continue
        dtype = np.dtype(spec.get(name, name.lower()))
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)  # numpy, and so MLflow, takes a larger number for a real one
            most = min(limits.max, np.iinfo(np.int64).max)
            made[f"in_{name}"] = np.array([limits.min, 1, most], dtype)
        else:
            made[f"in_{name}"] = np.array([0, 0.1, -3], np.float64).astype(dtype)
    return made


def photograph(rows: int, height: int, width: int) -> dict[str, Array]:
    """Return the pixels of a JPEG file, so many times."""
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg")
    return {"photo": np.stack([np.asarray(Image.open(file))] * rows)}


def encoded(texts: Array) -> dict[str, Array]:
    """Return what the library tokenizers makes of texts."""
    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer(WORDS)))
    library.enable_padding()
    library.enable_truncation(16)
    found = library.encode_batch([str(text) for text in texts])
    return {
        "input_ids": np.array([text.ids for text in found]),
        "attention_mask": np.array([text.attention_mask for text in found]),
    }


def prepared(pixels: Array) -> dict[str, Array]:
    """Return what Pillow makes of pixels: the shorter side 10, the centre, scaled."""
    made = []
    for picture in pixels:
        height, width = (side * 10 // min(picture.shape[:2]) for side in picture.shape[:2])
        small = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - 8) / 2), round((height - 8) / 2)
        cut = np.asarray(small.crop((left, top, left + 8, top + 8)), np.float32) / 255
        made.append((cut - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])
    return {"image": np.stack(made).transpose(0, 3, 1, 2).astype(np.float32)}


def named(host: str, way: str) -> str:
    """Return what a host is called where it is asked in that way."""
    return f"{host}, {way}" if way else host


LABELS = np.array(["red", "green", "bleu céleste"], np.object_)
TEXTS = np.array(["The cats!", "é", "", "a b c d e f g h i j k l m n o p q r"], np.object_)
COLUMNS: dict[str, Array] = {
    "price": np.array([1.5, 2, 0.25], np.float32),
    "count": np.array([1, 2, 3], np.int32),
}
IDS = tokens(1, 3)["input_ids"]
CASES = (
    Case("one row", "c_tokens", tokens(1, 3)),
    Case("rows and padding", "c_tokens", tokens(5, 17)),
    Case("as many rows as may be", "c_tokens", tokens(MOST_ROWS, 2)),
    Case(
        "one output of two",
        "c_tokens",
        tokens(2, 4),
        outputs=("mean",),
        without=API,  # `async_run` gives all outputs, and takes no time
    ),
    Case("a column per input", "c_columns", COLUMNS),
    Case("every datatype", "c_kinds", kinds()),
    Case("text", "c_text", {"text": TEXTS}),
    Case("one text", "c_text", {"text": TEXTS[:1]}),
    Case("the pixels of photographs", "c_picture", photograph(2, 40, 23)),
    Case(
        "larger ones, to a label",
        "c_picture",
        photograph(1, 64, 71),
        outputs=("label",),
        without=API,
    ),
    Case(
        "pixels of another kind",
        "c_picture",
        {"photo": np.ones((1, 8, 8, 4), np.uint8)},
        status=400,
        says="photo",
    ),
    Case("a missing input", "c_tokens", {"input_ids": IDS}, status=400, says="attention_mask"),
    Case(
        "an input too many",
        "c_tokens",
        tokens(1, 3, more=IDS),
        status=400,
        says="more",
        without=("mlflow, inline", *API),  # by the signature MLflow drops it, and BentoML
    ),
    Case(
        "another datatype",
        "c_tokens",
        tokens(1, 3, input_ids=np.array([[1.5, 2, 3]])),
        status=400,
        says="input_ids",
        without=("mlflow, inline",),  # by the signature MLflow makes whole numbers of them
    ),
    Case("another rank", "c_tokens", tokens(1, 3, input_ids=IDS[0]), status=400, says="input_ids"),
    Case(
        "lengths that differ",
        "c_tokens",
        tokens(1, 3, attention_mask=np.ones((1, 4), np.int64)),
        status=400,
    ),
    Case(
        "no rows",
        "c_columns",
        {name: array[:0] for name, array in COLUMNS.items()},
        status=400,
        without=TRITON,  # release 2.51 dies of it, with a model of its own, too
    ),
    Case(
        "a row too many",
        "c_tokens",
        tokens(MOST_ROWS + 1, 2),
        status=400,
        says=str(MOST_ROWS),
        without=SAGEMAKER,  # asks in parts
    ),
    Case(
        "an output that is not there",
        "c_tokens",
        tokens(1, 3),
        outputs=("median",),
        status=400,
        says="median",
        without=API,
    ),
    Case(
        "no time at all",
        "c_tokens",
        tokens(1, 3),
        timeout_ms=1e-3,
        status=504,
        other=dict.fromkeys(TRITON, 503),  # Triton's codes have no other
        without=API,
    ),
    Case(
        "an unknown model",
        "c_nobody",
        tokens(1, 3),
        status=404,
        says="c_nobody",
        without=("mlflow", *API),  # a server of one model; a service of APIs
    ),
    Case(
        "a body over the limit",
        "c_tokens",
        tokens(1, MOST_BYTES // 8),
        status=400,
        says=str(MOST_BYTES),
        other=dict.fromkeys(MOUNTED, 413),  # as numbers of JSON it is smaller
    ),
    Case(
        "not a number",
        "c_columns",
        COLUMNS | {"price": np.array([1.5, np.nan, 0.25], np.float32)},
        status=400,
        says="price",
    ),
    Case(
        "a full queue",
        "c_tokens",
        tokens(1, 3),
        status=429,
        says=str(MOST_QUEUED),
        other=dict.fromkeys(TRITON, 503),  # Triton's codes have no other
        without=INLINE,  # which have no actor that could be stopped
        full=True,
    ),
    Case(
        "what an actor dies of",
        "c_tokens",
        tokens(1, DEADLY),
        status=500,
        says="SIGKILL",
        silent=API,
        without=INLINE,  # which die of it
    ),
)
Ask = Callable[[Case], Outcome]


@dataclass(frozen=True)
class Place:
    """Where a host is started: models, sockets, what is set there, and what ends it."""

    folder: Path
    sockets: Path
    settings: Mapping[str, str]
    inline: bool
    stack: contextlib.ExitStack
    request: pytest.FixtureRequest

    def actors(self) -> list[int]:
        """Return the actors of the runtime that processes share; inline, those of quick models."""
        if self.inline and not daemon_pids(self.sockets):
            return []
        with lrai.Runtime(address="auto") as runtime:
            # Of free height and width, so that nobody knows what it takes.
            slow = [m for m in runtime.models() if self.inline and m.name.startswith("c_picture")]
            return [pid for m in runtime.models() if m not in slow for pid in m.actor_pids]

    def asked(self, asks: Mapping[str, Ask]) -> Asked:
        """Return a host that others than this process ask that runtime for, in each way."""
        return Asked(asks, self.actors, partial(lrai.Runtime, address="auto"), self.sockets)


@dataclass(frozen=True)
class Asked:
    """A host: the ways to ask it, its models' processes, its runtime, the folder of its sockets."""

    asks: Mapping[str, Ask]
    actors: Callable[[], list[int]]
    runtime: Callable[[], contextlib.AbstractContextManager[lrai.Runtime]]
    sockets: Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with every model as ONNX file and as artifact."""
    folder = tmp_path_factory.mktemp("conformance")
    for name, make in MODELS.items():
        lrai.compile(make(folder / f"{name}.onnx"), out=folder / f"{name}.lrai", threads=1)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[[Case], dict[str, Array]]:
    """Return what onnxruntime answers to a case."""
    sessions = {
        name: onnxruntime.InferenceSession(
            folder / f"{name}.onnx", providers=["CPUExecutionProvider"]
        )
        for name in MODELS
    }

    def run(case: Case) -> dict[str, Array]:
        session = sessions[case.model]
        if case.model == "c_text":
            mean, _ = session.run(None, encoded(case.inputs["text"]))
            return {"mean": mean, "tokens": mean}  # pooled, which the model does itself, too
        if case.model == "c_picture":
            (scores,) = session.run(None, prepared(case.inputs["photo"]))
            scores = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
            best = np.argsort(-scores)[:, :2]
            found = {
                "scores": scores,
                "label": LABELS[best],
                "score": np.take_along_axis(scores, best, 1),
            }
            return {name: found[name] for name in case.outputs or found}
        names = list(case.outputs) or [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(case.inputs)), strict=True))

    return run


@pytest.fixture(scope="module")
def deadly(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return an interpreter of actors that may be killed by what they are asked."""
    return python(tmp_path_factory.mktemp("actor"), _ACTOR)


@pytest.fixture(scope="module")
def host(request: pytest.FixtureRequest, folder: Path, deadly: str) -> Iterator[Asked]:
    """Yield a host that serves the models, started once for all cases."""
    name, _, inline = request.param.partition(", ")
    if name == "triton":
        request.getfixturevalue("triton")  # first: what is set here is not for its other tests
    # Actors are stopped here, and are not to be taken for dead.
    actors = {"actor.python": deadly, "actor.hang_seconds": "60"}
    settings = LIMITS | ({} if inline else actors)
    said = {"LRAI_" + key.upper().replace(".", "_"): value for key, value in settings.items()}
    with contextlib.ExitStack() as stack:
        address = "" if inline else "auto"
        sockets = stack.enter_context(own_runtime(LRAI_RUNTIME=address, **said))
        yield _HOSTS[name](Place(folder, sockets, settings, bool(inline), stack, request))


def actors_of(runtime: lrai.Runtime) -> list[int]:
    return [pid for model in runtime.models() for pid in model.actor_pids]


def through_core(address: str, place: Place) -> Asked:
    config = lrai.load_config(call={"actor.isolation": "inline"} if place.inline else {})
    runtime = place.stack.enter_context(lrai.Runtime(config, address=address))
    for name in MODELS:
        runtime.load(place.folder / f"{name}.lrai", name=name)
    return Asked(
        {"": partial(ask_core, runtime)},
        partial(actors_of, runtime),
        lambda: contextlib.nullcontext(runtime),
        place.sockets,
    )


def ask_core(runtime: lrai.Runtime, case: Case) -> Outcome:
    request = lrai.InferenceRequest(
        model_name=case.model, inputs=case.inputs, outputs=case.outputs, timeout_ms=case.timeout_ms
    )
    try:
        return Outcome(200, runtime.infer(request).outputs)
    except lrai.LraiError as error:
        wait = getattr(error, "retry_after_seconds", None)
        return Outcome(error.http_status, {}, str(error), wait)


def through_triton(place: Place) -> Asked:
    server: Triton = place.request.getfixturevalue("triton")
    said = {"runtime.socket_dir": str(place.sockets), **place.settings}
    said |= {} if place.inline else {"execution": "lists"}
    lines = ['backend: "lrai"'] + [
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
        for key, value in said.items()
    ]
    for name in MODELS:
        model = {1: place.folder / f"{name}.lrai"}
        place.stack.enter_context(server.serving(name, model, "\n".join(lines)))
    over_http = partial(ask_protocol, server.server.port, "/v2/models/{}/infer")
    asks = {"HTTP": over_http, "gRPC": partial(ask_grpc, server)}
    return place.asked({way: partial(ask_triton, ask) for way, ask in asks.items()})


def ask_triton(ask: Ask, case: Case) -> Outcome:
    """Ask Triton, which keeps the rows apart and has no tensor without dimensions beside them."""
    if case.model in ("c_tokens", "c_picture"):
        return ask(case)
    columns = {name: array.reshape(-1, 1) for name, array in case.inputs.items()}
    outcome = ask(replace(case, inputs=columns))
    flat = case.model != "c_text"
    outputs = {
        name: array.reshape(-1) if flat else array for name, array in outcome.outputs.items()
    }
    return replace(outcome, outputs=outputs)


def ask_grpc(server: Triton, case: Case) -> Outcome:
    """Ask Triton by gRPC; the status is that which its code is over HTTP."""
    more: dict[str, Any] = {"protocol": "grpc", "outputs": case.outputs}
    if case.timeout_ms is not None:
        more["timeout"] = int(case.timeout_ms * 1e3)
    try:
        return Outcome(200, server.ask(case.model, case.inputs, **more))
    except InferenceServerException as error:
        code = error.status().removeprefix("StatusCode.")
        return Outcome(GRPC[code], {}, error.message())


def through_bentoml(place: Place) -> Asked:
    apis = list[str]()
    for name in MODELS:
        artifact = place.folder / f"{name}.lrai"
        lrai_bentoml.save_model(name, artifact)
        signature = lrai.Artifact.open(artifact).manifest.signature
        inputs = [spec.name for spec in signature.inputs]
        parts = {
            "parameters": ", ".join(f"{one}: np.ndarray" for one in inputs),
            "inputs": ", ".join(inputs),  # in the model's order, as the guide has it
            "outputs": [spec.name for spec in signature.outputs],
        }
        apis.append(_API.format(name=name, **parts))
    parts = {"tags": [f"{name}:latest" for name in MODELS], "names": ", ".join(MODELS)}
    service = place.folder / "service"
    service.mkdir(exist_ok=True)
    (service / "service.py").write_text(_SERVICE.format(apis="".join(apis), **parts))
    command = [sys.executable, "-m", "bentoml", "serve", "service", "--host", HOST, "-p", "{port}"]
    server = place.stack.enter_context(Server(command, place.folder / "bentoml.log"))
    server.wait_until_ready("/readyz")
    mounted = partial(ask_protocol, server.port, "/v2/models/{}/infer")
    return place.asked({"mounted": mounted, "API": partial(ask_api, server.port)})


def ask_api(port: int, case: Case) -> Outcome:
    """Ask an API of a service as BentoML's clients do, by JSON."""
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    with contextlib.closing(connection):
        body = json.dumps({name: array.tolist() for name, array in case.inputs.items()})
        headers = {"Content-Type": "application/json"}
        connection.request("POST", f"/ask_{case.model}", body, headers)
        reply = connection.getresponse()
        content = reply.read()
    if reply.status != 200:  # without the page that pydantic has on each of its errors
        text = re.sub(r'"url":"[^"]*"', "", content.decode())
        return Outcome(reply.status, {}, text, wait_of(reply))
    return Outcome(200, {name: np.array(value) for name, value in json.loads(content).items()})


def through_sagemaker(place: Place) -> Asked:
    if place.inline:
        (model,) = ONE_MODEL
        arguments, way = [str(place.folder / f"{model}.lrai")], "/invocations"
    else:
        arguments, way = ["", "--multi-model"], "/models/{}/invoke"
    address = "" if place.inline else "auto"
    made = Container(arguments, place.folder, place.sockets, LRAI_RUNTIME=address)
    container = place.stack.enter_context(made)
    container.wait_until_ready()
    for name in () if place.inline else MODELS:
        named = {"model_name": name, "url": str(place.folder / f"{name}.lrai")}
        loaded = container.post(named, "/models")
        assert loaded.status == 200, loaded.body
    return place.asked({"": partial(ask_protocol, container.port, way)})


def ask_protocol(port: int, path: str, case: Case) -> Outcome:
    """Ask by the Open Inference Protocol, as Triton's own client writes and reads it."""
    given = []
    for name, array in case.inputs.items():
        given.append(
            triton_http.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        )
        given[-1].set_data_from_numpy(array)
    wanted = [triton_http.InferRequestedOutput(name) for name in case.outputs] or None
    timeout_us = None if case.timeout_ms is None else int(case.timeout_ms * 1e3)
    body, length = triton_http.InferenceServerClient.generate_request_body(
        given, outputs=wanted, timeout=timeout_us
    )
    if wanted is None:  # as Triton's client asks for all outputs: in binary
        body = _with_binary_outputs(body, length)
        length = len(body) - sum(map(_size, case.inputs.values()))
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/octet-stream"}
        headers |= {} if length is None else {"Inference-Header-Content-Length": str(length)}
        connection.request("POST", path.format(case.model), bytes(body), headers)
        reply = connection.getresponse()
        content, said = reply.read(), reply.headers.get("Inference-Header-Content-Length")
    if reply.status != 200:
        return Outcome(reply.status, {}, content.decode(), wait_of(reply))
    result = triton_http.InferenceServerClient.parse_response_body(
        content, header_length=None if said is None else int(said)
    )
    names = [output["name"] for output in result.get_response()["outputs"]]
    return Outcome(200, {name: result.as_numpy(name) for name in names})


def wait_of(reply: http.client.HTTPResponse) -> float | None:
    said = reply.headers.get("Retry-After")
    return None if said is None else float(said)


def through_mlflow(place: Place) -> Asked:
    servers = dict[str, Server]()
    for name in ONE_MODEL if place.inline else MODELS:
        artifact, saved = (
            place.folder / f"{name}.lrai",
            place.folder / f"mlflow-{name}-{place.inline}",
        )
        signature = lrai_mlflow.signature_of(lrai.Artifact.open(artifact))
        if not place.inline:  # MLflow itself looks at no input then
            signature = ModelSignature(params=signature.params)
        lrai_mlflow.save_model(artifact, saved, signature=signature)
        servers[name] = place.stack.enter_context(start(saved, place.folder))
    for server in servers.values():
        server.wait_until_ready("/ping")
    ports = {name: server.port for name, server in servers.items()}
    return place.asked({"": partial(ask_mlflow, ports)})


def ask_mlflow(ports: Mapping[str, int], case: Case) -> Outcome:
    body: dict[str, Any] = {"inputs": {k: v.tolist() for k, v in case.inputs.items()}}
    params = {"outputs": ",".join(case.outputs), "timeout_ms": case.timeout_ms}
    body["params"] = {name: value for name, value in params.items() if value}
    reply = post(ports[case.model], body)
    if reply.status != 200:
        text = json.dumps(reply.content, ensure_ascii=False)
        return Outcome(reply.status, {}, text, reply.content.get("retry_after_seconds"))
    return Outcome(200, {k: np.array(v) for k, v in reply.content["predictions"].items()})


def _with_binary_outputs(body: bytes, length: int | None) -> bytes:
    head = json.loads(body[:length])
    head.setdefault("parameters", {})["binary_data_output"] = True
    return json.dumps(head).encode() + body[len(body) if length is None else length :]


def _size(array: Array) -> int:
    if array.dtype.kind != "O":
        return array.nbytes
    return sum(4 + len(str(text).encode()) for text in array.ravel())


_HOSTS: dict[str, Callable[[Place], Asked]] = {
    "embedded": partial(through_core, "embedded"),
    "shared": partial(through_core, "auto"),
    "triton": through_triton,
    "mlflow": through_mlflow,
    "bentoml": through_bentoml,
    "sagemaker": through_sagemaker,
}


@pytest.mark.parametrize(
    ("host", "asked"),  # together: pytest would sort the servers by ways
    [
        pytest.param(host, (way, case), id=f"{named(host, way)}, {case.name}")
        for host in HOSTS
        for way in WAYS.get(host, ("",))
        for case in CASES
        if not {host, named(host, way)}.intersection(case.without)
        and not (host in ONE and case.model not in ONE_MODEL)
    ],
    indirect=["host"],
    scope="module",
)
def test_every_host_answers_alike(
    host: Asked,
    asked: tuple[str, Case],
    expected: Callable[[Case], dict[str, Array]],
    request: pytest.FixtureRequest,
) -> None:
    (way, case), place = asked, request.node.callspec.params["host"]
    name = named(place, way)
    with full_queue(host, expected) if case.full else contextlib.nullcontext():
        outcome = host.asks[way](case)
    status = case.other.get(place, case.other.get(name, case.status))
    assert outcome.status == status, outcome.text
    if case.status == 200:
        check(outcome, expected(case))
    else:
        assert (case.says in outcome.text) == (name not in case.silent)
        assert "/" not in outcome.text, "a path"
        again = case.status in (429, 504) and place not in TRITON  # which has no place for it
        assert (outcome.retry_after_seconds is not None) == again


@pytest.mark.parametrize("host", ["embedded", *SHARED], indirect=True, scope="module")
def test_every_host_outlives_an_actor(
    host: Asked, expected: Callable[[Case], dict[str, Array]]
) -> None:
    before = set(host.actors())
    assert before
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert_answers(host, expected)
    wait_until(lambda: not before & set(host.actors()))  # also those of models that nobody asks


@pytest.mark.parametrize("host", SHARED, indirect=True, scope="module")
def test_every_host_outlives_its_runtime(
    host: Asked, expected: Callable[[Case], dict[str, Array]]
) -> None:
    (before,) = daemon_pids(host.sockets)
    os.kill(before, signal.SIGKILL)
    assert_answers(host, expected)
    assert daemon_pids(host.sockets) != [before]


@pytest.mark.parametrize("host", INLINE, indirect=True, scope="module")
def test_every_host_has_a_quick_model_in_itself(
    host: Asked, expected: Callable[[Case], dict[str, Array]]
) -> None:
    assert_answers(host, expected)
    assert not host.actors()


@contextlib.contextmanager
def full_queue(host: Asked, expected: Callable[[Case], dict[str, Array]]) -> Iterator[None]:
    """Have as many rows wait as may, while actors stand still; then all of them are answered."""
    case = Case("", "c_tokens", tokens(MOST_ROWS, 2))
    with host.runtime() as runtime:
        (name,) = {one.name for one in runtime.models() if one.name.startswith(case.model)}
        request = lrai.InferenceRequest(model_name=name, inputs=case.inputs)
        stopped = host.actors()
        try:
            for pid in stopped:
                pause(pid)
            waiting = [runtime.start(request) for _ in range(MOST_QUEUED // MOST_ROWS)]
            wait_until(lambda: runtime.stats()["outstanding_rows"] == MOST_QUEUED)
            yield
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        for answer in waiting:
            check(Outcome(200, answer.result(60).outputs), expected(case))


def assert_answers(host: Asked, expected: Callable[[Case], dict[str, Array]]) -> None:
    case = CASES[1]
    for ask in host.asks.values():
        outcome = ask(case)
        assert outcome.status == 200, outcome.text
        check(outcome, expected(case))


def check(outcome: Outcome, right: Mapping[str, Array]) -> None:
    assert set(outcome.outputs) == set(right)
    for output, array in right.items():
        got = outcome.outputs[output]
        assert got.shape == array.shape
        if array.dtype.kind == "O":
            texts = [item.decode() if isinstance(item, bytes) else item for item in got.ravel()]
            assert texts == list(array.ravel())
        elif array.dtype.kind == "f":
            np.testing.assert_allclose(got.astype(array.dtype), array, rtol=1e-5, atol=1e-6)
        else:
            assert np.array_equal(got.astype(array.dtype), array)
