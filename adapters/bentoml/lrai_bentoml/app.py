"""The short path: the Open Inference Protocol over HTTP, mounted into a service.

    @bentoml.service
    @bentoml.asgi_app(lrai_bentoml.asgi_app(model))  # POST /v2/models/NAME/infer

A body goes to the runtime without BentoML's own types in between. Besides JSON and the binary
tensor extension it may be any that `lrai_codecs` reads.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import bentoml
import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

import lrai_core as lrai
from lrai_bentoml.guard import CLIENT_LEFT, TooLarge
from lrai_bentoml.hooks import progress
from lrai_bentoml.runner import Runner, Serving
from lrai_codecs import PayloadTooLarge, Reply, Room, declared, failure, read, respond

Endpoint = Callable[[Request], Awaitable[Reply]]


def asgi_app(*runners: Runner, limit_bytes: int = 0) -> Starlette:
    """Return an application that answers for these models, each under the name of its tag.

    `limit_bytes`: of a body, by default `limits.request_bytes` of `LRAI_*` and `lrai.toml`.
    """
    by_name = {runner.tag.name: runner for runner in runners}
    if len(by_name) < len(runners):
        raise lrai.UsageError("two models have one name: each model of an app needs its own")
    config = lrai.load_config()
    limit_bytes = limit_bytes or config.limits.request_bytes
    room = Room(max(limit_bytes, config.scheduler.max_queue_bytes))

    async def named(request: Request) -> tuple[Runner, Serving]:
        name, version = request.path_params["model"], request.path_params.get("version")
        if name not in by_name:
            raise lrai.ModelNotFound(f"model {name[:120]!r}: there are {sorted(by_name)}")
        serving = await by_name[name].attach()
        if version not in (None, serving.tag.version):
            raise lrai.ModelNotFound(f"version {version[:120]!r}: there is {serving.tag.version!r}")
        return by_name[name], serving

    async def infer(request: Request) -> Reply:
        (runner, serving), headers = await named(request), dict(request.headers)
        with room.held() as took:
            body = await read(request.stream(), headers, limit_bytes, took)
            return await respond(runner.ask, serving.signature.inputs, headers, body, took)

    async def model(request: Request) -> Reply:
        _, serving = await named(request)
        about = {"name": serving.tag.name, "versions": [serving.tag.version], "platform": "lrai"}
        inputs, outputs = declared(serving.signature.inputs), declared(serving.signature.outputs)
        return _json({**about, "inputs": inputs, "outputs": outputs})

    async def ready(request: Request) -> Reply:
        well = await progress((await named(request))[:1] if request.path_params else runners)
        return _json({"ready": well}, 200 if well else 503)

    async def live(_: Request) -> Reply:
        return _json({"live": True})

    async def server(_: Request) -> Reply:
        about = {"name": "lrai", "version": lrai.__version__}
        return _json(about | {"extensions": ["binary_tensor_data"]})

    paths = {"/v2": server, "/v2/health/live": live, "/v2/health/ready": ready}
    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        paths |= {path: model, f"{path}/ready": ready, f"{path}/infer": infer}
    every = [(at, _answering(one), "POST" if one is infer else "GET") for at, one in paths.items()]
    return Starlette(routes=[Route(at, answer, methods=[method]) for at, answer, method in every])


def _answering(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint of starlette's, which answers errors too."""

    async def answer(request: Request) -> Response:
        try:
            reply = await endpoint(request)
        except ClientDisconnect:
            reply = Reply(status=CLIENT_LEFT)
        except TooLarge as error:
            reply = failure(PayloadTooLarge(str(error)))
        except bentoml.exceptions.BentoMLException:  # of the store: its paths are not for callers
            reply = failure(lrai.NotReady("the model is not loaded"))
        except lrai.LraiError as error:
            reply = failure(error)
        return Response(reply.body, reply.status, reply.headers)

    return answer


def _json(content: Any, status: int = 200) -> Reply:
    headers = {"Content-Type": "application/json"}
    return Reply(status=status, headers=headers, body=msgspec.json.encode(content))
