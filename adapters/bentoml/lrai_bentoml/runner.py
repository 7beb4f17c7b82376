"""The runner: what a service asks instead of a session.

All workers of all services of this user ask one runtime, which holds each model once and shares
calls among them, unless `LRAI_RUNTIME` or a setting says otherwise; or a service has one worker and
the model is quick: that runs in it, see `lrai_import.hosted`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from types import SimpleNamespace
from typing import Any

import bentoml
from bentoml.exceptions import BentoMLException
from bentoml.models import BentoModel
from msgspec.structs import replace

import lrai_core as lrai
from lrai_bentoml.errors import bento_errors
from lrai_bentoml.hooks import install, seconds_of, workers_of
from lrai_bentoml.models import artifact_of, get
from lrai_codecs import fit, text
from lrai_import.held import Held
from lrai_import.hosted import Asked, asked


@dataclass(frozen=True, slots=True)
class Serving:
    """The model in a runtime, as this process is attached to it; `tag`: its own, in the store."""

    held: Held
    tag: bentoml.Tag
    signature: lrai.Signature

    def request(self, args: Sequence[Any], inputs: Mapping[str, Any]) -> lrai.InferenceRequest:
        """Return the request that values state, in the order of the model's inputs or by name."""
        names = [spec.name for spec in self.signature.inputs]
        given = {**dict(zip(names, args, strict=False)), **inputs}
        if len(given) < len(args) + len(inputs):
            got = f"got {len(args)} values, and {sorted(inputs)} by name"
            raise lrai.RequestError(f"{got}; the model takes {names}")
        inputs = fit(given, self.signature.inputs)
        return lrai.InferenceRequest(model_name=self.held.name, inputs=inputs)

    def addressed(self, request: lrai.InferenceRequest) -> lrai.InferenceRequest:
        """Return a request for this model."""
        return replace(request, model_name=self.held.name, model_version="")

    def named(self, answer: lrai.InferenceResponse) -> lrai.InferenceResponse:
        """Return the answer under the name and version that BentoML knows."""
        return replace(answer, model_name=self.tag.name, model_version=self.tag.version or "")


class Runner(BentoModel):  # type: ignore[misc] # which type checkers are not shown
    """One model of the store, served by LRAI; nothing is loaded until it is needed.

    As an attribute of a service's class it is one of the service's models, which `bentoml build`
    packs in the version that it finds. And it brings the hooks that the class does not have itself:
    the model is checked before workers start and loaded before one answers, `/readyz` and `/livez`
    say whether it makes progress, `/metrics` has the runtime's figures beside BentoML's.
    """

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
            tag: Of a model that `save_model` has saved.
            variant: Serve this variant instead of the chosen one.
            require: Refuse to serve unless its certificate is at least this good, see
                `Runtime.open`.
            settings: Of LRAI, by dotted key: those that a model may have of its own are this
                model's; those of a runtime count where this process starts it.
        """
        super().__init__(tag)
        # Read now: as long as a service is imported, its folder is the working folder everywhere.
        with bento_errors():
            own = asked({"variant": variant, **(settings or {})})
        wanted = own if require is None else own._replace(require=dict(require))
        here = SimpleNamespace(asked=wanted, serving=None, owners=(), names=(), lock=Lock())
        object.__setattr__(self, "_here", here)  # BentoML's class is frozen

    async def async_run(self, *args: Any, **inputs: Any) -> Any:
        """Return the outputs for arrays or lists, in the model's order or by input name.

        As with `bentoml.onnx`, that is the array of a model with one output, else a tuple.

        Raises:
            BentoMLException: The request was refused, with the status that says why.
        """
        with bento_errors():
            serving = await self.attach()
            return _outputs(await serving.held.infer_async(serving.request(args, inputs)))

    def run(self, *args: Any, **inputs: Any) -> Any:
        """Return the same, for an API that is no coroutine."""
        with bento_errors():
            serving = self.load()
            return _outputs(serving.held.infer(serving.request(args, inputs)))

    async def infer_async(self, request: lrai.InferenceRequest) -> lrai.InferenceResponse:
        """Return the answer to a request that may name outputs, a timeout or a priority.

        Cancelling it takes the request out of the queue.
        """
        with bento_errors():
            return await self.ask(request)

    def infer(self, request: lrai.InferenceRequest) -> lrai.InferenceResponse:
        """Return the same, blocking."""
        with bento_errors():
            serving = self.load()
            return serving.named(serving.held.infer(serving.addressed(request)))

    async def ask(self, request: lrai.InferenceRequest) -> lrai.InferenceResponse:
        """Return the same as `infer_async`, with LRAI's errors as they are."""
        serving = await self.attach()
        return serving.named(await serving.held.infer_async(serving.addressed(request)))

    @property
    def shared(self) -> str:
        """Which runtime it is, where that is one of other processes too; else nothing."""
        how = one.held.settings if (one := self._here.serving) else self._asked()
        own, where = how.here, how.config.runtime
        return "" if own or where.address == "embedded" else where.socket_dir + where.address

    def state(self) -> str:
        """Return `ok` or `idle` for a model that makes progress, `stalled` for one that will again.

        A model that the runtime has unloaded or given up is loaded again. `dead`: that failed, or
        the runtime cannot be reached.
        """
        with contextlib.suppress(lrai.LraiError, BentoMLException):
            return self.load().held.kept_state()
        return "dead"

    def alive(self) -> bool:
        """Return whether it makes progress, or will by itself: one that hangs in here will not."""
        state = self.state()
        heals = state == "stalled" and bool(self.shared or not self.load().held.settings.inline)
        return heals or state in {"ok", "idle"}

    def stats(self) -> dict[str, int]:
        """Return what the runtime has counted, over all its models."""
        return self.load().held.runtime.stats()

    def check(self) -> None:
        """Check every file of the model, and load it once, before workers start.

        What fails here fails once, and not in workers that are started again for ever. And BentoML
        ends what a worker has started along with it: not the runtime, which others share.

        Raises:
            BentoMLException: The model is missing, has changed, or cannot be served as asked for.
        """
        artifact_of(get(str(self.tag)))
        self.load()
        if not self.shared:
            self.close()  # a worker has it

    def load(self, *services: str) -> Serving:
        """Load the model, or find it loaded by another worker; return when it is ready.

        Args:
            services: Whose time a request has, by the names that BentoML has for them. Where the
                model runs they do not say: who starts workers asks before any has a name.

        Raises:
            BentoMLException: It cannot be served as asked for.
        """
        with self._here.lock, bento_errors():
            self._here.names += services
            self._here.serving = self._here.serving or self._open()
            return self._here.serving  # type: ignore[no-any-return]

    async def attach(self) -> Serving:
        """Load the model if this process has not yet, without holding up the event loop."""
        return self._here.serving or await asyncio.to_thread(self.load)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Let go of the model, which is unloaded when the last process has."""
        serving, self._here.serving = self._here.serving, None
        if serving is not None:
            serving.held.close()

    def to_info(self, alias: str | None = None) -> Any:
        """Return what a Bento writes down: the exact version, under the name that is asked for.

        So a Bento serves what it was built with, whatever its store calls the latest.
        """
        return BentoModel.to_info(self, alias or str(self.tag))

    def __get__(self, _: Any, __: type | None = None) -> Runner:
        """Return the runner itself, and not the model in the store."""
        return self

    def __set_name__(self, owner: type, name: str) -> None:
        """Have the class of the service look after the model."""
        self._here.owners += (owner.__name__,)
        # With `batchable=True` an API hands over so many at most, and no call is to have more.
        sizes = [a.max_batch_size for a in vars(owner).values() if getattr(a, "batchable", False)]
        self._here.asked = self._here.asked.limited(min(sizes, default=0))
        install(owner, name, self)

    def _asked(self) -> Asked:
        artifact, here = artifact_of(get(str(self.tag)), verify=False), self._here
        timed = here.asked.within(seconds_of({*(here.names or here.owners)}))
        return timed.placed(artifact, workers_of({*here.owners}))  # type: ignore[no-any-return]

    def _open(self) -> Serving:
        asked, stored = self._asked(), get(str(self.tag))
        artifact = artifact_of(stored, verify=False)  # the actor hashes what it opens
        name = f"{stored.tag}:{artifact.version[:12]}{asked.mark}"
        return Serving(Held(artifact, asked, name), stored.tag, artifact.manifest.signature)


runner = Runner  # called as in the rest of BentoML


def _outputs(answer: lrai.InferenceResponse) -> Any:
    arrays = tuple(text(output) for output in answer.outputs.values())
    return arrays[0] if len(arrays) == 1 else arrays
