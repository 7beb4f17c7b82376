"""The contract over HTTP, in one worker: ping, invocations, models, advice for batch transform."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

import lrai_core as lrai
from lrai_codecs import HungUp, Reply, Room, counted, failure, in_parts, read, respond, unless_gone
from lrai_import.held import Questions
from lrai_import.hosted import warm_up
from lrai_sagemaker.logs import log, one_line
from lrai_sagemaker.names import Named, Names, unknown
from lrai_sagemaker.settings import MEBIBYTE, Settings

ATTRIBUTES: Final = "x-amzn-sagemaker-custom-attributes"
_TARGET: Final = "x-amzn-sagemaker-target-model"
_PING_SECONDS: Final = 1.5  # the platform waits for two
_CHANGES: Final = 8  # models loaded and unloaded at a time
_full: Final = counted(10.0)  # how often there was no room


class _Load(msgspec.Struct):
    model_name: str
    url: str


class Endpoint:
    """What one worker answers. One thread asks the runtime how it is, others load and unload."""

    def __init__(self, settings: Settings, runtime: lrai.Runtime) -> None:
        self._settings, self._runtime = settings, runtime
        self._most_bytes = settings.payload_mb * MEBIBYTE or runtime.config.limits.request_bytes
        self._names = Names(settings, runtime)
        self._questions = Questions()
        self._changes = ThreadPoolExecutor(_CHANGES, "lrai-models")
        self._actors, self._answered = list[int](), False  # who serves, and whether they have
        self._said = "not asked yet"
        self._room = Room(max(runtime.config.scheduler.max_queue_bytes, self._most_bytes))
        if not settings.multi_model:
            its = lrai.Artifact.open(settings.artifact, verify=False).manifest
            self._named = Named(name=its.name, url="", key=settings.model, signature=its.signature)

    async def ping(self, _: Request) -> Response:
        """Answer 200 where the model is loaded as required, and answers; else 503 and why."""
        how = self._names.unready if self._settings.multi_model else self._unready
        try:
            why = await self._questions.soon(how, _PING_SECONDS)
        except TimeoutError:
            why = f"the model has not answered within {_PING_SECONDS} s"
        except lrai.LraiError as error:
            why = str(error)
        if why != self._said:
            log.log(logging.WARNING if why else logging.INFO, "ping: %s", one_line(why or "ready"))
            self._said = why
        return _sent(failure(lrai.NotReady(why))) if why else Response()

    async def invoke(self, request: Request) -> Response:
        """Answer a request for the model."""
        return await self._answer(request, self._named, lrai.NotReady("the model is not loaded"))

    async def invoke_named(self, request: Request) -> Response:
        """Answer a request for a model of a multi-model endpoint."""
        name = request.path_params.get("name", request.headers.get(_TARGET, ""))
        named, gone = self._names.find(name), unknown(name)
        try:
            return await self._answer(request, named, gone)
        except lrai.ActorError as error:  # what kills each actor is not to be sent again
            loaded = await asyncio.to_thread(self._names.loaded)
            if named in loaded or not error.retry_after_seconds:
                raise
            raise gone from None  # it was given up; who is told so loads it again

    async def load(self, request: Request) -> Response:
        """Load a model under a name."""
        body = await self._read(request, 1 << 16)  # a name and a path
        try:
            given = msgspec.json.decode(body, type=_Load)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise lrai.RequestError(f"model_name and url are needed: {error}") from None
        await self._changed("loaded", self._names.load, given.model_name, given.url)
        return _json({"status": f"model {given.model_name!r} is loaded"})

    async def unload(self, request: Request) -> Response:
        """Unload a name."""
        await self._changed("unloaded", self._names.unload, name := request.path_params["name"])
        return _json({"status": f"model {name!r} is unloaded"})

    async def models(self, _: Request) -> Response:
        """List the names that are in memory."""
        loaded = await asyncio.to_thread(self._names.loaded)  # not behind who loads
        return _json({"models": [{"modelName": m.name, "modelUrl": m.url} for m in loaded]})

    async def model(self, request: Request) -> Response:
        """Tell the path of a name that is in memory."""
        name = request.path_params["name"]
        for loaded in await asyncio.to_thread(self._names.loaded):
            if loaded.name == name:
                return _json({"modelName": loaded.name, "modelUrl": loaded.url})
        raise unknown(name)

    async def advice(self, _: Request) -> Response:
        """Say how batch transform does best: many rows to a body, and bodies side by side."""
        mebibytes, how = max(1, min(100, self._most_bytes // MEBIBYTE)), self._settings.strategy
        if not (self._settings.multi_model or self._named.signature.coalescible):
            how = "SINGLE_RECORD"  # the model takes no more at a time
        said = {"MaxConcurrentTransforms": self._settings.concurrency, "BatchStrategy": how}
        return _json(said | {"MaxPayloadInMB": mebibytes})

    def _unready(self) -> str:
        model = next((m for m in self._runtime.models() if m.name == self._named.key), None)
        if model is None:
            return "the model is not loaded"
        if model.state not in ("ok", "idle"):
            return f"the model is {model.state}"
        if self._settings.require is not None and model.certificate is None:
            return "no certificate speaks of what serves"
        if model.actor_pids != self._actors:
            self._actors, self._answered = model.actor_pids, False
        if not self._answered:  # where it is full of others, the first answer is enough
            warm_up(self._runtime, self._named.key, self._named.signature)
            self._answered = True
        return ""

    async def _changed(self, what: str, change: Callable[..., None], name: str, *more: str) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._changes, change, name, *more)
        except (lrai.RequestError, lrai.NotReady, lrai.MemoryBudgetExceeded):
            raise
        except lrai.LraiError as error:
            # With its paths: those are for the log.
            log.warning("model %r: %s", name, one_line(error))
            # At 507 the platform unloads another one; at 400 it tells whoever asked.
            kind = type(error) if isinstance(error, lrai.OutOfResources) else lrai.RequestError
            raise kind(f"the model cannot be {what}; the log says why") from None

    async def _answer(self, request: Request, named: Named, gone: lrai.LraiError) -> Response:
        begun, headers, given = time.monotonic(), request.headers, dict[str, Any]()
        outputs, timeout_ms = _wanted(headers.get(ATTRIBUTES, ""))

        async def infer(asked: lrai.InferenceRequest) -> lrai.InferenceResponse:
            stated = [ms for ms in (asked.timeout_ms, timeout_ms) if ms is not None]
            spent_ms = (time.monotonic() - begun) * 1e3
            left_ms = max(0.0, min(stated) - spent_ms) if stated else None
            own = {"model_name": named.key, "outputs": outputs or asked.outputs}
            asked = msgspec.structs.replace(asked, timeout_ms=left_ms, **own)
            runtime = self._runtime
            answer = await in_parts(runtime.infer_async, asked, named.signature, runtime.config)
            self._answered = True
            given.update(answer.parameters, version=answer.model_version)
            return msgspec.structs.replace(answer, model_name=named.name)

        try:
            with self._room.held() as took:
                body = await self._read(request, self._most_bytes, took)
                answer = respond(infer, named.signature.inputs, headers, body, took)
                response = _sent(await unless_gone(request.receive, answer))
        except lrai.ModelNotFound:  # whose words name other models
            raise gone from None
        except asyncio.CancelledError:  # draining took too long
            raise lrai.NotReady("the container is ending") from None
        said = ";".join(f"{key}={value}" for key, value in given.items() if value is not None)
        response.headers[ATTRIBUTES] = said[:1024]  # as the platform allows
        return response

    async def _read(self, request: Request, most: int, *took: Callable[[int], None]) -> bytes:
        try:
            async with asyncio.timeout(self._settings.answer_seconds):
                return await read(request.stream(), request.headers, most, *took)
        except TimeoutError:
            raise lrai.DeadlineExceeded("the body did not come in time") from None
        except ClientDisconnect:
            raise HungUp("the caller has hung up") from None


def create(settings: Settings, runtime: lrai.Runtime) -> Starlette:
    """Return the application of one worker."""
    endpoint = Endpoint(settings, runtime)
    # The second is where boto3's client asks, so that it can be pointed at a container.
    invocations = ("/invocations", "/endpoints/{endpoint}/invocations")
    invoke = endpoint.invoke_named if settings.multi_model else endpoint.invoke
    routes = [
        *(Route(path, invoke, methods=["POST"]) for path in invocations),
        Route("/ping", endpoint.ping),
        Route("/execution-parameters", endpoint.advice),
    ]
    if settings.multi_model:
        routes += [
            Route("/models", endpoint.models, methods=["GET"]),
            Route("/models", endpoint.load, methods=["POST"]),
            Route("/models/{name:path}/invoke", endpoint.invoke_named, methods=["POST"]),
            Route("/models/{name:path}", endpoint.model, methods=["GET"]),
            Route("/models/{name:path}", endpoint.unload, methods=["DELETE"]),
        ]
    handlers: Any = {lrai.LraiError: _refused, HTTPException: _no_such_route, Exception: _broken}
    return Starlette(routes=routes, exception_handlers=handlers)


def _wanted(attributes: str) -> tuple[tuple[str, ...], float | None]:
    """Return the outputs and the milliseconds that custom attributes ask for.

    They are written `KEY=VALUE;KEY=VALUE`; what else they say is the caller's own business.
    """
    pairs = [one.partition("=") for one in attributes.split(";")]
    said = {key.strip().lower(): value for key, _, value in pairs}
    try:
        timeout_ms = float(said["timeout_ms"]) if "timeout_ms" in said else None
    except ValueError:
        timeout_ms = 0.0
    if timeout_ms is not None and not timeout_ms > 0:
        got = said["timeout_ms"][:40]
        raise lrai.RequestError(f"{ATTRIBUTES}: timeout_ms is {got!r}, a number above 0 is needed")
    return tuple(filter(None, map(str.strip, said.get("outputs", "").split(",")))), timeout_ms


async def _refused(asked: Request, why: Any) -> Response:
    often = next(_full) if why.http_status == 429 else ""  # a line each would hide all others
    if often is not None:
        level = logging.WARNING if why.http_status >= 500 else logging.INFO
        log.log(level, one_line(f"{asked.method} {asked.url.path} {why.http_status}: {why}{often}"))
    return _sent(failure(why))


async def _no_such_route(_: Request, error: Any) -> Response:
    return _json({"error": error.detail}, error.status_code)


async def _broken(*_: Any) -> Response:  # the server logs what it was
    return _json({"error": "a bug; the log has more"}, 500)


def _json(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def _sent(reply: Reply) -> Response:
    return Response(reply.body, reply.status, dict(reply.headers))
