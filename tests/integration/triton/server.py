"""One real Triton for the tests of this folder, and what they do with it."""

from __future__ import annotations

import contextlib
import shutil
import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gevent
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import np_to_triton_dtype

import lrai_core as lrai
from benchmarks.triton_server import TritonServer

EXPLICIT = ("--model-control-mode=explicit",)


class Triton:
    """A server in explicit model control, its repository, and the runtime of its stubs."""

    def __init__(self, server: TritonServer, repository: Path) -> None:
        self.server, self.repository = server, repository
        self._thread = threading.current_thread()
        self.http = self._new_http()
        self.grpc = triton_grpc.InferenceServerClient(server.grpc)
        self.metrics = server.metrics

    def close(self) -> None:
        """Have gRPC ask no more, which it would try again and again once the server has ended."""
        self.grpc.close()
        self.http.close()

    def put(self, name: str, version: int, model: Path | None) -> None:
        """Put a model into a version directory, under the name that it has there."""
        folder = self.repository / name / str(version)
        folder.mkdir(parents=True)
        if model is not None and model.is_dir():
            shutil.copytree(model, folder / "model.lrai")
        elif model is not None:
            shutil.copy(model, folder / ("model.onnx" if model.suffix == ".onnx" else model.name))

    def load(self, name: str) -> None:
        """Load a model, or load it again."""
        self.http.load_model(name)

    @contextlib.contextmanager
    def serving(self, name: str, models: Mapping[int, Path | None], text: str) -> Iterator[str]:
        """Serve models by version with this configuration; yield their name."""
        try:
            for version, model in models.items():
                self.put(name, version, model)
            (self.repository / name / "config.pbtxt").write_text(text)
            self.load(name)
            yield name
        finally:
            self.http.unload_model(name)
            shutil.rmtree(self.repository / name)

    def ask(
        self,
        name: str,
        inputs: Mapping[str, Any],
        *,
        protocol: str = "http",
        outputs: Sequence[str] = (),
        version: str = "",
        **more: Any,
    ) -> dict[str, Any]:
        """Return the outputs by name; `more` is for the client."""
        kit: Any = triton_http if protocol == "http" else triton_grpc
        given = []
        for key, array in inputs.items():
            given.append(kit.InferInput(key, list(array.shape), np_to_triton_dtype(array.dtype)))
            given[-1].set_data_from_numpy(array)
        wanted = [kit.InferRequestedOutput(output) for output in outputs] or None
        with self._client(protocol) as client:
            answer = client.infer(name, given, model_version=version, outputs=wanted, **more)
        said = answer.get_response() if protocol == "http" else answer.get_response(as_json=True)
        return {one["name"]: answer.as_numpy(one["name"]) for one in said["outputs"]}

    def runtime_models(self) -> list[str]:
        """Return what the runtime of the stubs serves."""
        with self._runtime() as runtime:
            return [model.name for model in runtime.models()]

    def stats(self) -> dict[str, int]:
        """Return what the runtime of the stubs has counted."""
        with self._runtime() as runtime:
            return runtime.stats()

    def figures(self) -> str:
        """Return what the server says on its metrics port."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics") as reply:
            text: str = reply.read().decode()
        return text

    def actor_pid(self, name: str) -> int:
        """Return the process that runs a model."""
        with self._runtime() as runtime:
            for model in runtime.models():
                if model.name.startswith(f"{name}:") and model.actor_pids:
                    return model.actor_pids[0]
        raise LookupError(name)

    @contextlib.contextmanager
    def _client(self, protocol: str) -> Iterator[Any]:
        """Yield a client for this thread: one of HTTP stays in the thread that made it."""
        if protocol == "grpc":
            yield self.grpc
        elif threading.current_thread() is self._thread:
            yield self.http
        else:
            try:
                with contextlib.closing(self._new_http()) as client:
                    yield client
            finally:  # else each thread that was leaves the files of its loop behind
                gevent.get_hub().destroy(destroy_loop=True)

    def _new_http(self) -> Any:
        # Loading a model may mean compiling it.
        return triton_http.InferenceServerClient(self.server.http, network_timeout=600.0)

    def _runtime(self) -> lrai.Runtime:
        folder = str(self.server.runtime.folder)
        return lrai.Runtime(lrai.load_config(call={"runtime.socket_dir": folder}), address="auto")
