"""The short path: the Open Inference Protocol over HTTP, mounted into a service.

    @bentoml.service
    @bentoml.asgi_app(lrai_bentoml.asgi_app(model))  # POST /v2/models/NAME/infer

A body goes to the runtime without BentoML's own types in between. Besides JSON and the binary
tensor extension it may be any that `lrai_codecs` reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from bentoml.exceptions import BentoMLException
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

import lrai_core as lrai
from lrai_bentoml.guard import CLIENT_CLOSED_REQUEST, TooLarge
from lrai_bentoml.hooks import soon
from lrai_bentoml.runner import Runner
from lrai_codecs import PayloadTooLarge, Reply, failure, read, respond

_MODEL = "/v2/models/{model}"
_VERSION = f"{_MODEL}/versions/{{version}}"


def asgi_app(*runners: Runner) -> Starlette:
    """Return an application that answers for these models, each under the name of its tag."""
    by_name = {runner.tag.name: runner for runner in runners}
    limit_bytes = lrai.load_config().limits.request_bytes

    async def named(request: Request) -> Runner:
        name, version = request.path_params["model"], request.path_params.get("version")
        if name not in by_name:
            raise lrai.ModelNotFound(f"model {name[:120]!r}: there are {sorted(by_name)}")
        await by_name[name].attach()
        if version not in (None, by_name[name].version):
            there = by_name[name].version
            raise lrai.ModelNotFound(f"version {version[:120]!r}: there is {there!r}")
        return by_name[name]

    async def infer(request: Request) -> Reply:
        runner, headers = await named(request), dict(request.headers)
        body = await read(request.stream(), headers, limit_bytes)
        return await respond(runner.ask, runner.signature.inputs, headers, body)

    async def model(request: Request) -> Reply:
        runner = await named(request)
        sides = {side: _told(getattr(runner.signature, side)) for side in ("inputs", "outputs")}
        about = {"name": runner.tag.name, "versions": [runner.version], "platform": "lrai"}
        return _json({**about, **sides})

    async def ready(request: Request) -> Reply:
        asked = [await named(request)] if request.path_params else runners
        states = await asyncio.gather(*[soon(runner.state) for runner in asked])
        well = {"ok", "idle"}.issuperset(states)
        return _json({"ready": well}, 200 if well else 503)

    async def live(_: Request) -> Reply:
        return _json({"live": True})

    async def server(_: Request) -> Reply:
        about = {"name": "lrai", "version": lrai.__version__}
        return _json({**about, "extensions": ["binary_tensor_data"]})

    asks = {"/v2": server, "/v2/health/live": live, "/v2/health/ready": ready}
    for path in (_MODEL, _VERSION):
        asks |= {path: model, f"{path}/ready": ready}
    routes = [Route(path, _answering(endpoint)) for path, endpoint in asks.items()]
    sent = [f"{path}/infer" for path in (_MODEL, _VERSION)]
    return Starlette(
        routes=[*routes, *[Route(p, _answering(infer), methods=["POST"]) for p in sent]]
    )


def _answering(
    endpoint: Callable[[Request], Awaitable[Reply]],
) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint of starlette's, which answers errors too."""

    async def answer(request: Request) -> Response:
        try:
            reply = await endpoint(request)
        except ClientDisconnect:
            reply = Reply(status=CLIENT_CLOSED_REQUEST)
        except TooLarge as error:
            reply = failure(PayloadTooLarge(str(error)))
        except BentoMLException:  # of the store, whose paths are not for callers
            reply = failure(lrai.NotReady("the model is not loaded"))
        except lrai.LraiError as error:
            reply = failure(error)
        return Response(reply.body, reply.status, reply.headers)

    return answer


def _told(specs: Sequence[lrai.TensorSpec]) -> list[dict[str, Any]]:
    shapes = [[n if isinstance(n, int) else -1 for n in spec.shape] for spec in specs]
    return [
        {"name": spec.name, "datatype": spec.datatype, "shape": shape}
        for spec, shape in zip(specs, shapes, strict=True)
    ]


def _json(content: Any, status: int = 200) -> Reply:
    headers = {"Content-Type": "application/json"}
    return Reply(status=status, headers=headers, body=msgspec.json.encode(content))
