"""`backend: "lrai"`: what Triton's Python stub runs for every instance of such a model.

Triton hands lists of requests over; they go to the runtime, which shares calls among all instances
and models, and come back as they were asked. The model itself runs outside this process, unless it
is so quick that the way there would cost more.

Source of the interface: Triton's python backend, from 23.10 on (`triton_python_backend_utils`).
"""

from __future__ import annotations

import json
import os
import shutil
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import triton_python_backend_utils as pb_utils

from lrai_core import (
    InferenceRequest,
    InferenceResponse,
    InvalidTensor,
    LraiError,
    ModelNotFound,
    NotReady,
)
from lrai_import.built import artifact_of
from lrai_import.hosted import zeros
from lrai_triton.config import complete
from lrai_triton.hostqueue import HostQueue
from lrai_triton.metrics import Metrics
from lrai_triton.served import execution_of, hold, source_of
from lrai_triton.settings import WATCH, settings_of

_MEMORY: Final = "/dev/shm"  # noqa: S108 - where Triton and its stubs have theirs
_LARGE_BYTES: Final = 1 << 20  # of an answer: what there is room for is looked at from here on

_LOOK_SECONDS: Final = 0.2  # between looks whether a caller has left
_CODES: Final = {400: "INVALID_ARG", 404: "NOT_FOUND", 499: "CANCELLED"} | dict.fromkeys(
    (429, 503, 504, 507), "UNAVAILABLE"
)
Started = Future[InferenceResponse] | InferenceResponse | LraiError


class Cancelled(LraiError):
    """The caller has left."""

    http_status = 499


class TritonPythonModel:
    """What the stub looks for."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Fill in what config.pbtxt leaves open, from the model."""
        with _refusal():
            settings = settings_of(auto_complete_model_config.as_dict())
            artifact = artifact_of(source_of(_version_folder()), settings.asked.config)
            complete(auto_complete_model_config, artifact.manifest.signature)
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model, or find it loaded by another instance."""
        with _refusal():
            model_config = json.loads(args["model_config"])
            settings = settings_of(model_config)
            folder = Path(args["model_repository"], args["model_version"])
            artifact = artifact_of(source_of(folder), settings.asked.config)
            signature = artifact.manifest.signature
            complete(pb_utils.ModelConfig(args["model_config"]), signature)  # for its errors
            name = f"{args['model_name']}:{args['model_version']}"
            execution = execution_of(artifact, settings)
            self._held = hold(name, artifact, settings, execution)
        self._texts = {spec.name for spec in signature.inputs if spec.datatype == "BYTES"}
        told: dict[str, Any] = {"model_version": "", "id": "", "parameters": {}, "model_name": name}
        self._alive = InferenceResponse(outputs=zeros(signature.outputs), **told)
        self._metrics = Metrics(pb_utils, args["model_name"], args["model_version"])
        self._sent_bytes = _LARGE_BYTES  # at most, of an answer
        self._rows = int(model_config["max_batch_size"]) > 1  # requests have any number of them
        self._queue = HostQueue(int(model_config["max_batch_size"]), settings)
        self.execute = self._send_later if execution == "sender" else self._lists

    def is_ready(self) -> bool:
        """Return whether the model makes progress; servers that know this hook ask it."""
        with suppress(LraiError):
            # One that was unloaded for others is loaded again by the request that comes next.
            return self._held.state(gone="idle") in ("ok", "idle")
        return False

    def finalize(self) -> None:
        """Let go of the model."""
        self._held.close()
        self._metrics.close()

    def _lists(self, requests: Sequence[Any]) -> list[Any]:
        """Return the responses to a list of requests, in its order."""
        answers = self._start(requests)
        _wait(requests, answers)
        self._queue.answered()
        outcomes, self._sent_bytes = self._with_room(map(_outcome, answers))
        pairs = zip(requests, outcomes, strict=True)
        return [self._response(request, outcome) for request, outcome in pairs]

    def _send_later(self, requests: Sequence[Any]) -> None:
        """Have each request answered when its answer is there, and take the next list at once."""
        for request, answer in zip(requests, self._start(requests), strict=True):
            send = partial(self._send, request, request.get_response_sender())
            if isinstance(answer, Future):
                answer.add_done_callback(send)
            else:
                send(answer)

    def _send(self, request: Any, sender: Any, answer: Started) -> None:
        # The request is held until now, as its tensors are read where they lie.
        done = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            # Once `send` has failed for want of memory nothing more can be sent, not even that.
            (outcome,), sent_bytes = self._with_room([_outcome(answer)])
            sender.send(self._response(request, outcome), flags=done)
            self._sent_bytes = max(self._sent_bytes, sent_bytes)
        except Exception as error:  # noqa: BLE001 - edge: this is nobody's call
            pb_utils.Logger.log_error(f"an answer could not be sent: {type(error).__name__}")

    def _with_room(
        self, outcomes: Iterable[InferenceResponse | LraiError]
    ) -> tuple[list[InferenceResponse | LraiError], int]:
        """Return what there is shared memory for, errors for the rest, and how much that takes.

        What has gone through once has its place in Triton's pool, which never shrinks. Where one
        answer does not fit, Triton would refuse all that go with it, and say where its memory is.
        """
        fitting, total = list[InferenceResponse | LraiError](), 0
        for outcome in outcomes:
            outputs = {} if isinstance(outcome, LraiError) else outcome.outputs
            more = total + sum(array.nbytes for array in outputs.values())
            lacks_bytes = more - self._sent_bytes
            if lacks_bytes > 0 and 2 * lacks_bytes > shutil.disk_usage(_MEMORY).free:
                lacks = "the server has no shared memory left for the answer"
                fitting.append(NotReady(lacks))
                continue
            fitting.append(outcome)
            total = more
        return fitting, max(self._sent_bytes, total)

    def _start(self, requests: Sequence[Any]) -> list[Started]:
        rows = [int(request.inputs()[0].shape()[0]) for request in requests] if self._rows else ()
        allowed = self._queue.take([request.timeout() for request in requests], rows)
        asked = [self._request(*pair) for pair in zip(requests, allowed, strict=True)]
        right = [one for one in asked if isinstance(one, InferenceRequest)]
        started = iter(self._held.runtime.start_all(right))
        return [next(started) if isinstance(one, InferenceRequest) else one for one in asked]

    def _request(
        self, request: Any, timeout_ms: float | None
    ) -> InferenceRequest | InferenceResponse | LraiError:
        if request.request_id() == WATCH:  # no request of a user's: the model is not asked, and
            return self._alive  # nothing of it captured; an actor that hangs is found without
        try:
            inputs = {tensor.name(): self._array(tensor) for tensor in request.inputs()}
        except LraiError as error:
            return error
        return InferenceRequest(
            model_name=self._held.name,
            inputs=inputs,
            outputs=tuple(request.requested_output_names()),
            timeout_ms=timeout_ms,
        )

    def _array(self, tensor: Any) -> Any:
        array = tensor.as_numpy()
        if tensor.name() in self._texts and array.dtype.kind == "O":
            try:
                texts = [text.decode() for text in array.flat]
            except UnicodeDecodeError:
                raise InvalidTensor(tensor.name(), "an element is not UTF-8") from None
            array = np.array([*texts, None], object)[:-1].reshape(array.shape)
        return array

    def _response(self, request: Any, outcome: InferenceResponse | LraiError) -> Any:
        asked = request.request_id() != WATCH  # who looks after all models wants none of them
        if isinstance(outcome, ModelNotFound):  # the runtime has unloaded it: it is Triton's yet
            if asked:
                self._held.load_again()
            outcome = NotReady("the runtime had unloaded the model, which is loaded again")
        if asked:
            self._metrics.count(outcome)
        if isinstance(outcome, LraiError):
            code = getattr(pb_utils.TritonError, _CODES.get(outcome.http_status, "INTERNAL"))
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(outcome), code))
        outputs = outcome.outputs.items()
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in outputs]
        )


def _wait(requests: Sequence[Any], answers: Sequence[Started]) -> None:
    """Return when all have ended; who leaves meanwhile is taken out of the queue.

    One wait for all: a thread that is woken for every answer takes the core from the model.
    """
    pairs = zip(answers, requests, strict=True)
    waiting = {answer: request for answer, request in pairs if isinstance(answer, Future)}
    while waiting:
        left = wait(waiting, _LOOK_SECONDS).not_done
        waiting = {answer: waiting[answer] for answer in left}
        for answer in left:  # `wait` does not see that one was cancelled
            if waiting[answer].is_cancelled() and answer.cancel():  # a message, there and back
                del waiting[answer]


def _outcome(answer: Started) -> InferenceResponse | LraiError:
    try:
        return answer.result() if isinstance(answer, Future) else answer
    except CancelledError:
        return Cancelled("cancelled")
    except LraiError as error:
        return error


def _version_folder() -> Path:
    """Return the folder of the version that is being configured.

    Triton tells it only in the stub's command line: the path of a `model.py` in it, which a shared
    backend does not need.
    """
    return Path(os.fsdecode(Path("/proc/self/cmdline").read_bytes().split(b"\0")[1])).parent


@contextmanager
def _refusal() -> Iterator[None]:
    try:
        yield
    except LraiError as error:
        told = str(error).replace(f"{_version_folder()}/", "")  # whoever asked for it to be loaded
        raise pb_utils.TritonModelException(told) from None
    except Exception as error:  # noqa: BLE001 - edge: a traceback would tell a client our paths
        pb_utils.Logger.log_error(traceback.format_exc())
        raise pb_utils.TritonModelException(f"the log tells more: {type(error).__name__}") from None
