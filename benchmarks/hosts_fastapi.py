"""A plain FastAPI container, as it stands beside SageMaker's: around ONNX Runtime, or around LRAI.

Bodies are what `lrai sagemaker serve` takes too, and are read and written with msgspec, without
FastAPI's own checks: no container is faster at it. The session is opened as people open it, which
is without asking for huge pages, as LRAI does for its own. `HOSTS_SERVED` says what is served.

    python -m benchmarks.hosts_fastapi PORT WORKERS
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from numpy.typing import NDArray
from uvicorn.supervisors import Multiprocess

from benchmarks.processes import HOST

Array = NDArray[Any]
Row = dict[str, Array]

OUTPUT: Final = "sentence_embedding"


class Served(msgspec.Struct, frozen=True):
    """What a peer serves.

    Attributes:
        model: An ONNX file, or an artifact for LRAI.
        weights: Folder of the weights, where they lie outside a compiled variant.
        lrai: Whether LRAI serves it.
    """

    model: str
    weights: str = ""
    lrai: bool = False

    def text(self) -> str:
        """Return it as the environment carries it."""
        return msgspec.json.encode(self).decode()


class Body(msgspec.Struct, frozen=True):
    """What is posted."""

    inputs: dict[str, list[list[int]]]


_body: Final = msgspec.json.Decoder(Body)


def served() -> Served:
    """Return what the environment says."""
    return msgspec.json.decode(os.environ["HOSTS_SERVED"], type=Served)


def decode(body: bytes) -> Row:
    """Return the inputs by name, int64 [rows, tokens]."""
    given = _body.decode(body).inputs
    return {name: np.array(values, np.int64) for name, values in given.items()}


def encode(output: Array) -> bytes:
    """Return the body of an answer."""
    return msgspec.json.encode({"outputs": {OUTPUT: output.tolist()}})


@cache
def session(what: Served) -> Any:
    """Return the process's session of one thread; a compiled variant runs as it is stored."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if what.weights:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        folder = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(folder, what.weights)
    given = Path(what.model).read_bytes() if what.weights else what.model
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def run(engine: Any, ids: Array, mask: Array | None = None) -> Array:
    """Return the embeddings of rows of one length, which have no padding unless `mask` says so."""
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids) if mask is None else mask}
    output: Array = engine.run([OUTPUT], inputs)[0]
    return output


def groups(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the indices of rows that are equally long, together."""
    found: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        found[len(row)].append(index)
    return list(found.values())


def main() -> None:
    """Serve until told to end.

    With workers, the sockets of uvicorn's own command wait for acknowledgements, 40 ms each answer.
    """
    port, workers = map(int, sys.argv[1:])
    listening = socket.create_server((HOST, port), backlog=2_048)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited by what it accepts
    application = "benchmarks.hosts_fastapi:create"
    config = uvicorn.Config(application, factory=True, access_log=False, workers=workers)
    server = uvicorn.Server(config)
    if workers == 1:
        server.run([listening])
    else:
        Multiprocess(config, [listening]).run()


def create() -> FastAPI:
    """Return the application of one worker."""
    what = served()
    return _around_lrai(what) if what.lrai else _around_onnxruntime(what)


def _around_onnxruntime(what: Served) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        session(what)
        yield

    app, one = FastAPI(lifespan=lifespan), ThreadPoolExecutor(1)

    def answer(row: Row) -> Array:
        return run(session(what), row["input_ids"], row["attention_mask"])

    async def inline(request: Request) -> Response:
        return _sent(answer(decode(await request.body())))

    async def threaded(request: Request) -> Response:
        row = decode(await request.body())
        return _sent(await asyncio.get_running_loop().run_in_executor(one, answer, row))

    app.post("/invocations")(inline)
    app.post("/threaded")(threaded)
    app.get("/ping")(_ping)
    return app


def _around_lrai(what: Served) -> FastAPI:
    import lrai_core as lrai

    alone = os.environ["HOSTS_WORKERS"] == "1"  # then it need not share the model with others
    config = lrai.load_config(call={"actor.isolation": "inline"} if alone else {})
    address = "embedded" if alone else "auto"

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        opened = lrai.Runtime.open(what.model, address=address, name="minilm", config=config)
        with opened as runtime:
            app.state.runtime = runtime
            yield

    app = FastAPI(lifespan=lifespan)

    async def invocations(request: Request) -> Response:
        asked = lrai.InferenceRequest(model_name="minilm", inputs=decode(await request.body()))
        answer = await app.state.runtime.infer_async(asked)
        return _sent(answer.outputs[OUTPUT])

    app.post("/invocations")(invocations)
    app.get("/ping")(_ping)
    return app


async def _ping() -> dict[str, bool]:
    return {"ready": True}


def _sent(output: Array) -> Response:
    return Response(encode(output), media_type="application/json")


if __name__ == "__main__":
    main()
