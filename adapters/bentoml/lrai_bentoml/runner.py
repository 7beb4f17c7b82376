"""The runner: what a service asks instead of a session.

All workers of all services of this user ask one runtime, which holds each model once and shares
calls among them. The address is `auto` unless `LRAI_RUNTIME` or a setting says otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import bentoml
import msgspec
from bentoml.exceptions import BentoMLException
from bentoml.models import BentoModel

import lrai_core as lrai
from lrai_bentoml.errors import bento_errors
from lrai_bentoml.hooks import install
from lrai_bentoml.models import artifact_of, get
from lrai_codecs import fit, text


@dataclass(frozen=True, slots=True)
class _Serving:
    """A runtime that serves the model, as this process is attached to it.

    Attributes:
        name: Of the model, in the runtime.
        version: Of the model, in the store.
    """

    runtime: lrai.Runtime
    name: str
    version: str
    signature: lrai.Signature


@dataclass(slots=True)
class _Here:
    """What a runner is asked for, and what has come of it in this process."""

    variant: str
    require: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    serving: Any = None  # a _Serving
    lock: threading.Lock = field(default_factory=threading.Lock)


class Runner(BentoModel):  # type: ignore[misc] # which type checkers are not shown
    """One model of the store, served by LRAI; nothing is loaded until it is needed.

    As an attribute of a service's class it is one of the service's models, which `bentoml build`
    packs in the version that it finds. And it brings the hooks that the class does not have itself:
    the model is checked before workers start and loaded before one answers, `/readyz` and `/livez`
    say whether it makes progress, `/metrics` has the runtime's figures beside BentoML's.
    """

    tag: bentoml.Tag
    _here: _Here

    def __init__(
        self,
        tag: bentoml.Tag | str,
        *,
        variant: str = "",
        require: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Take what is asked for.

        Args:
            tag: Of a model that `save_model` has saved, or the alias that a Bento gives to one.
            variant: Serve this variant instead of the chosen one.
            require: Refuse to serve unless its certificate is at least this good, see
                `Runtime.open`.
            settings: Of LRAI, by dotted key: those that a model may have of its own are this
                model's; those of a runtime count where this process starts it.
        """
        super().__init__(tag)
        here = _Here(variant, require, settings or {})
        object.__setattr__(self, "_here", here)  # BentoML's class is frozen

    async def async_run(self, *args: Any, **inputs: Any) -> Any:
        """Return the outputs for arrays or lists, in the model's order or by input name.

        As with `bentoml.onnx`, that is the array of a model with one output, else a tuple.

        Raises:
            BentoMLException: The request was refused, with the status that says why.
        """
        with bento_errors():
            await self.attach()
        return _outputs(await self.infer_async(self._request(args, inputs)))

    def run(self, *args: Any, **inputs: Any) -> Any:
        """Return the same, for an API that is no coroutine."""
        return _outputs(self.infer(self._request(args, inputs)))

    async def infer_async(self, request: lrai.InferenceRequest) -> lrai.InferenceResponse:
        """Return the answer to a request that may name outputs, a timeout or a priority.

        Cancelling it takes the request out of the queue.
        """
        with bento_errors():
            return await self.ask(request)

    def infer(self, request: lrai.InferenceRequest) -> lrai.InferenceResponse:
        """Return the same, blocking."""
        with bento_errors():
            serving = self._serving()
            return self._named(serving.runtime.infer(_addressed(request, serving)), serving)

    async def ask(self, request: lrai.InferenceRequest) -> lrai.InferenceResponse:
        """Return the same as `infer_async`, with LRAI's errors as they are."""
        serving = await self.attach()
        answer = await serving.runtime.infer_async(_addressed(request, serving))
        return self._named(answer, serving)

    @property
    def signature(self) -> lrai.Signature:
        """What the model takes and gives."""
        return self._serving().signature

    @property
    def version(self) -> str:
        """Of the model, in the store."""
        return self._serving().version

    @property
    def shared(self) -> bool:
        """Whether the runtime is that of other processes too."""
        return self._serving().runtime.config.runtime.address != "embedded"

    def state(self) -> str:
        """Return `ok` or `idle` for a model that makes progress, `stalled` for one that will again.

        `dead`: it is not loaded, or the runtime cannot be reached.
        """
        with contextlib.suppress(lrai.LraiError, BentoMLException):
            serving = self._serving()
            mine = [m.state for m in serving.runtime.models() if m.name == serving.name]
            return next((state for state in ("ok", "idle", "stalled") if state in mine), "dead")
        return "dead"

    def stats(self) -> dict[str, int]:
        """Return what the runtime has counted, over all its models."""
        return self._serving().runtime.stats()

    def check(self) -> None:
        """Check every file of the model, without serving it.

        Raises:
            BentoMLException: It is missing, or has changed since it was saved.
        """
        artifact_of(get(str(self.tag)))

    def load(self) -> None:
        """Load the model, or find it loaded by another worker; return when it is ready.

        Raises:
            BentoMLException: It cannot be served as asked for.
        """
        with bento_errors():
            self._serving()

    async def attach(self) -> _Serving:
        """Load the model if this process has not yet, without holding up the event loop."""
        return self._here.serving or await asyncio.to_thread(self._serving)

    def close(self) -> None:
        """Let go of the runtime, which ends half a minute after the last process has."""
        with self._here.lock:
            serving, self._here.serving = self._here.serving, None
        if serving is not None:
            serving.runtime.close()

    def to_info(self, alias: str | None = None) -> Any:
        """Return what a Bento writes down: the exact version, under the name that is asked for.

        So a Bento serves what it was built with, whatever its store calls the latest.
        """
        return BentoModel.to_info(self, alias or str(self.tag))

    def __get__(self, instance: Any, owner: type | None = None) -> Runner:
        """Return the runner itself, and not the model in the store."""
        return self

    def __set_name__(self, owner: type, name: str) -> None:
        """Have the class of the service look after the model."""
        install(owner, self)

    def _serving(self) -> _Serving:
        with self._here.lock:
            if self._here.serving is None:
                self._here.serving = self._open()
            return self._here.serving

    def _open(self) -> _Serving:
        here = self._here
        own = {key: value for key, value in here.settings.items() if key in lrai.OWN_SETTINGS}
        host = {key: value for key, value in here.settings.items() if key not in own}
        config = lrai.load_config(environ={"LRAI_RUNTIME": "auto", **os.environ}, host=host)
        stored = get(str(self.tag))
        artifact = artifact_of(stored, verify=False)  # the actor hashes what it opens
        name = f"{stored.tag}:{artifact.version[:12]}"  # two models never meet under one
        runtime = lrai.Runtime(config)
        try:
            runtime.load(
                artifact, name=name, variant=here.variant, require=here.require, settings=own
            )
        except BaseException:
            runtime.close()
            raise
        return _Serving(runtime, name, stored.tag.version or "", artifact.manifest.signature)

    def _request(self, args: Sequence[Any], inputs: Mapping[str, Any]) -> lrai.InferenceRequest:
        with bento_errors():
            specs = self.signature.inputs
            names = [spec.name for spec in specs]
            given = {**dict(zip(names, args, strict=False)), **inputs}
            if len(given) < len(args) + len(inputs):
                got = f"got {len(args)} values, and {sorted(inputs)} by name"
                raise lrai.RequestError(f"{got}; the model takes {names}")
            return lrai.InferenceRequest(model_name="", inputs=fit(given, specs))

    def _named(self, answer: lrai.InferenceResponse, serving: _Serving) -> lrai.InferenceResponse:
        """Return the answer under the name and version that BentoML knows."""
        named = {"model_name": self.tag.name, "model_version": serving.version}
        return msgspec.structs.replace(answer, **named)


runner = Runner  # called as in the rest of BentoML


def _addressed(request: lrai.InferenceRequest, serving: _Serving) -> lrai.InferenceRequest:
    return msgspec.structs.replace(request, model_name=serving.name, model_version="")


def _outputs(answer: lrai.InferenceResponse) -> Any:
    arrays = tuple(text(output) for output in answer.outputs.values())
    return arrays[0] if len(arrays) == 1 else arrays
