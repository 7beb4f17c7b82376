"""What reading a body and writing an answer take in each host, by the functions that do it there.

They run alone, in a process of their own on the servers' CPU, for inside a server their clock would
count what else that CPU does.
"""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

import lrai_core as lrai
from benchmarks.callers import Array, Row
from benchmarks.hosts_load import body_of
from benchmarks.hosts_servers import BENTO, MLFLOW, SAGEMAKER, SERVE

_ROUNDS: Final = 5
_OUTPUT: Final = "sentence_embedding"


class Parts(NamedTuple):
    """What a request takes, in us: the best of a few rounds, the mean over its rows."""

    decode: float
    encode: float


def measure(
    line: Connection, cpu: int, rows: Sequence[Row], artifact: str, variables: dict[str, str]
) -> None:
    """Send the parts by host and form; a helper's target.

    Args:
        line: Where they are sent.
        cpu: Of the servers.
        rows: That are asked for.
        artifact: Path of what LRAI serves.
        variables: That the services of BentoML are imported with.
    """
    os.sched_setaffinity(0, {cpu})
    os.environ.update(variables)
    answer = np.random.default_rng(0).normal(size=(1, 384)).astype(np.float32)
    found = {**_mlflow(rows, answer, artifact), **_containers(rows, answer, artifact)}
    line.send({**found, **_bentoml(rows, answer, artifact)})


def _parts(bodies: Sequence[Any], decode: Callable[[Any], Any], encode: Callable[[], Any]) -> Parts:
    return Parts(_best(bodies, decode), _best(bodies, lambda _: encode()))


def _best(bodies: Sequence[Any], function: Callable[[Any], Any]) -> float:
    took = []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        for body in bodies:
            function(body)
        took.append(time.perf_counter() - begun)
    return min(took) / len(bodies) * 1e6


def _response(answer: Array) -> lrai.InferenceResponse:
    return lrai.InferenceResponse(
        model_name="minilm", model_version="1", id="1", outputs={_OUTPUT: answer}, parameters={}
    )


def _containers(rows: Sequence[Row], answer: Array, artifact: str) -> dict[tuple[str, str], Parts]:
    from benchmarks import hosts_fastapi
    from lrai_codecs import decode, encode

    bodies = [body_of("inputs", row) for row in rows]
    inputs = lrai.Artifact.open(artifact, verify=False).manifest.signature.inputs
    _, form = decode(bodies[0], "application/json", inputs)
    response = _response(answer)
    plain = _parts(bodies, hosts_fastapi.decode, lambda: hosts_fastapi.encode(answer))
    ours = _parts(
        bodies,
        lambda body: decode(body, "application/json", inputs),
        lambda: encode(response, form),
    )
    return {
        (SAGEMAKER, "FastAPI"): plain,
        (SAGEMAKER, "lrai in FastAPI"): plain,
        (SAGEMAKER, SERVE): ours,
        (BENTO, "mounted"): plain,
        (BENTO, "lrai, mounted"): ours,
    }


def _mlflow(rows: Sequence[Row], answer: Array, artifact: str) -> dict[tuple[str, str], Parts]:
    from mlflow.models import Model
    from mlflow.models.utils import _enforce_schema
    from mlflow.pyfunc.scoring_server import _parse_json_data, predictions_to_json

    import lrai_mlflow
    from lrai_mlflow.serving import from_lrai, to_lrai

    opened = lrai.Artifact.open(artifact, verify=False)
    signature, inputs = lrai_mlflow.signature_of(opened), opened.manifest.signature.inputs
    metadata, schema = Model(signature=signature), signature.inputs
    response = _response(answer)

    def read(body: str) -> Any:
        return _enforce_schema(_parse_json_data(body, metadata, schema).data, schema)

    def written(outputs: Any) -> str:
        file = io.StringIO()
        predictions_to_json(outputs, file)
        return file.getvalue()

    bodies = [body_of("inputs", row).decode() for row in rows]
    return {
        (MLFLOW, "mlflow.onnx"): _parts(bodies, read, lambda: written({_OUTPUT: answer})),
        (MLFLOW, "lrai"): _parts(
            bodies,
            lambda body: to_lrai(read(body), inputs, {}, "minilm"),
            lambda: written(from_lrai(response, {})),
        ),
    }


def _bentoml(rows: Sequence[Row], answer: Array, artifact: str) -> dict[tuple[str, str], Parts]:
    from _bentoml_impl.serde import JSONSerde, Payload  # type: ignore[import-untyped]

    from benchmarks.hosts_bento import Plain
    from lrai_codecs import fit

    serde, apis = JSONSerde(), Plain.apis  # type: ignore[attr-defined]
    inputs = lrai.Artifact.open(Path(artifact), verify=False).manifest.signature.inputs
    loop = asyncio.new_event_loop()

    def read(name: str, body: bytes) -> Any:
        return serde.deserialize_model(Payload((body,)), apis[name].input_spec)

    def read_and_fit(body: bytes) -> Any:
        given = read("predict", body)
        return fit({name: getattr(given, name) for name in ("input_ids", "attention_mask")}, inputs)

    def written() -> Any:
        return loop.run_until_complete(apis["predict"].output_spec.to_http_response(answer, serde))

    named = [body_of("named", row) for row in rows]
    listed = [body_of("rows", row) for row in rows]
    found = {
        (BENTO, "async"): _parts(named, lambda body: read("predict", body), written),
        (BENTO, "batchable"): _parts(listed, lambda body: read("batched", body), written),
        (BENTO, "lrai"): _parts(named, read_and_fit, written),
    }
    loop.close()
    return found
