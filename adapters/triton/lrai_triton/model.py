"""`backend: "lrai"`: what Triton's Python stub runs for every instance of such a model.

Triton hands lists of requests over; they go to the runtime, which shares calls among all instances
and models, and come back as they were asked. The model itself runs outside this process, unless it
is so quick that the way there would cost more.

Source of the interface: Triton's python backend, from 23.10 on (`triton_python_backend_utils`).
"""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import triton_python_backend_utils as pb_utils

import lrai_core as lrai
from lrai_import.built import artifact_of
from lrai_import.hosted import without_folders, zeros
from lrai_triton.config import complete
from lrai_triton.hostqueue import HostQueue
from lrai_triton.metrics import Metrics
from lrai_triton.served import execution_of, hold, source_of
from lrai_triton.settings import WATCH, settings_of

_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - where Triton and its stubs have theirs
_STEP_BYTES: Final = 1 << 20  # by which a stub's share of it grows, at least

_LOOK_SECONDS: Final = 0.2  # between looks whether a caller has left
_PRIORITY: Final = "lrai_priority"  # a parameter of requests; `priority` Triton keeps to itself
_CODES: Final = {400: "INVALID_ARG", 404: "NOT_FOUND", 499: "CANCELLED", 500: "INTERNAL"}
Outcome = lrai.InferenceResponse | lrai.LraiError
Started = Future[lrai.InferenceResponse] | Outcome


class Cancelled(lrai.LraiError):
    """The caller has left."""

    http_status = 499


def _refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return it so that who is refused something learns no folder.

    The stub tells a client the files of all frames that Python has where an error leaves it: so
    that is one frame, and its file a name.
    """

    def called(*given: Any) -> Any:
        try:
            return function(*given)
        except lrai.LraiError as error:
            pb_utils.Logger.log_error(words := str(error))
            words = without_folders(words)
        except Exception as error:  # noqa: BLE001 - edge: its words may be of our folders, too
            pb_utils.Logger.log_error(traceback.format_exc())
            words = f"the log tells more: {type(error).__name__}"
        raise pb_utils.TritonModelException(words)

    called.__code__ = called.__code__.replace(co_filename="lrai_triton")
    return called


class TritonPythonModel:
    """What the stub looks for."""

    @staticmethod
    @_refusing
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Fill in what config.pbtxt leaves open, from the model."""
        given = auto_complete_model_config.as_dict()  # what is changed in it arrives
        source = source_of(Path(_argument(1)).parent, given.get("default_model_filename", ""))
        complete(given, artifact_of(source, settings_of(given).asked.config).manifest.signature)
        return auto_complete_model_config

    @_refusing
    def initialize(self, args: dict[str, str]) -> None:
        """Load the model, or find it loaded by another instance."""
        model_config = json.loads(args["model_config"])
        settings = settings_of(model_config)
        if "dynamic_batching" not in model_config:  # nor is it filled in: requests come one by one
            settings = settings._replace(size=0)
        folder = Path(args["model_repository"], args["model_version"])
        source = source_of(folder, model_config.get("default_model_filename", ""))
        artifact = artifact_of(source, settings.asked.config)
        signature = artifact.manifest.signature
        complete(model_config, signature, fill=False)  # for its errors
        name = f"{args['model_name']}:{args['model_version']}"
        execution = execution_of(artifact, settings)
        self._held = hold(name, artifact, settings, execution)
        self._scalars = [spec.name for spec in signature.inputs if not spec.shape]  # Triton has [1]
        told: dict[str, Any] = {"model_version": "", "id": "", "parameters": {}, "model_name": name}
        self._alive = lrai.InferenceResponse(outputs=zeros(signature.outputs), **told)
        self._metrics = Metrics(pb_utils, args["model_name"], args["model_version"])
        self._pool = Path(_MEMORY, _argument(2))  # Triton's memory that this stub's tensors lie in
        self._inside: dict[int, int] = {}  # bytes there of each request that is not answered
        # From 25.02 on; what pybind11 says of a function names its arguments.
        self._tells = "parameters" in str(pb_utils.InferenceResponse.__init__.__doc__)
        self._queue, self._rows = HostQueue(settings), settings.size > 1  # any number
        self.execute = _refusing(self._send_later if execution == "sender" else self._lists)
        self._waiting: dict[int, tuple[Any, Future[Any]]] = {}  # requests, and what answers them
        self._looking, self._ended = threading.Lock(), threading.Event()
        self._beside = threading.Thread(target=self._run_beside, daemon=True)
        self._beside.start()

    @_refusing
    def is_ready(self) -> bool:
        """Return whether the model makes progress; servers that know this hook ask it."""
        with suppress(lrai.LraiError):
            # One that was unloaded for others is loaded again by the request that comes next.
            return self._held.state(gone="idle") in ("ok", "idle")
        return False

    def finalize(self) -> None:
        """Let go of the model."""
        self._held.close()
        self._ended.set()
        self._beside.join()
        self._metrics.write()

    def _lists(self, requests: Sequence[Any]) -> list[Any]:
        """Return the responses to a list of requests, in its order."""
        answers = self._start(requests)
        # Once for all: a thread that is woken for every answer takes the core from the model.
        left = [answer for answer in answers if isinstance(answer, Future)]
        _ = wait(left) if len(left) > 1 else [*map(_outcome, left)]
        self._queue.answered()
        return self._responses(requests, answers)

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
            sender.send(*self._responses([request], [answer]), flags=done)
        except Exception as error:  # noqa: BLE001 - edge: this is nobody's call
            pb_utils.Logger.log_error(f"an answer could not be sent: {type(error).__name__}")

    def _run_beside(self) -> None:
        """Take out of the queue what those who have left asked for; tell what was counted."""
        before, server = set[int](), os.getppid()
        # One that was killed answers no message, and a stub that waits for it does not end.
        while not self._ended.wait(_LOOK_SECONDS) and os.getppid() == server:
            for key in before:  # which was there a look ago: to ask the server is a message
                with suppress(Exception):  # edge: who cannot be asked about has not left
                    self._look_at(key)
            before = set(self._waiting)
            self._metrics.write()

    def _look_at(self, key: int) -> None:
        with self._looking:
            pair = self._waiting.get(key)
            if pair is None or pair[1].done() or not pair[0].is_cancelled():
                return
        pair[1].cancel()  # which answers it, where answers go one by one

    def _start(self, requests: Sequence[Any]) -> list[Started]:
        rows = [int(request.inputs()[0].shape()[0]) for request in requests] if self._rows else ()
        allowed = self._queue.take([request.timeout() for request in requests], rows)
        asked = [self._request(*pair) for pair in zip(requests, allowed, strict=True)]
        right = [one for one in asked if isinstance(one, lrai.InferenceRequest)]
        started = iter(self._held.runtime.start_all(right))
        found = [next(started) if isinstance(one, lrai.InferenceRequest) else one for one in asked]
        pairs = zip(requests, found, strict=True)
        self._waiting |= {id(one): (one, its) for one, its in pairs if isinstance(its, Future)}
        return found

    def _request(self, request: Any, timeout_ms: float | None) -> lrai.InferenceRequest | Outcome:
        # Triton drops nothing of lists that it has made up, as it does while another one runs. To
        # ask it is a message: not after short ones.
        if self._queue.ran > _LOOK_SECONDS:
            with suppress(Exception):  # edge: who cannot be asked about has not left
                if request.is_cancelled():
                    return Cancelled("cancelled")
        try:
            name, said = request.request_id(), json.loads(p) if (p := request.parameters()) else {}
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        except ValueError:  # Python's own: of id or parameters
            return lrai.RequestError("no UTF-8")
        inputs |= {n: inputs[n].reshape(()) for n in self._scalars if n in inputs}
        self._inside[id(request)] = _bytes_of(inputs)
        # No request of a user's: the model is not asked, and nothing of it captured; an actor that
        # hangs is found without.
        if name == WATCH and not any(map(np.any, inputs.values())):
            return self._alive
        return lrai.InferenceRequest(
            model_name=self._held.name,
            inputs=inputs,
            id=name,
            # They come as a set. In this order onnxruntime's backend gives them.
            outputs=tuple(sorted(request.requested_output_names())),
            timeout_ms=timeout_ms,
            parameters={"priority": said.get(_PRIORITY, 0)},
        )

    def _responses(self, requests: Sequence[Any], answers: Sequence[Started]) -> list[Any]:
        """Return what there is memory for, errors for the rest.

        Where one answer does not fit, Triton would refuse all that go with it, and say where its
        memory is.
        """
        room_bytes, responses = self._room_bytes(), list[Any]()
        for request, answer in zip(requests, answers, strict=True):
            outcome, tensors = _outcome(answer), list[Any]()
            if isinstance(outcome, lrai.InferenceResponse):
                try:
                    taken_bytes = _bytes_of(outcome.outputs)
                    if taken_bytes > room_bytes:
                        raise MemoryError
                    # Of what has no dimensions this makes [1].
                    made = [(n, np.ascontiguousarray(a)) for n, a in outcome.outputs.items()]
                    tensors = [pb_utils.Tensor(*pair) for pair in made]
                    room_bytes -= taken_bytes
                except Exception as error:  # noqa: BLE001 - edge: others' answers go with it
                    pb_utils.Logger.log_error(f"an answer is left out: {type(error).__name__}")
                    outcome = lrai.NotReady("the server has no memory left for the answer")
            responses.append(self._response(outcome, tensors))
            self._inside.pop(id(request), None)
            with self._looking:  # the server must not be asked about what it has the answer to
                self._waiting.pop(id(request), None)
        return responses

    def _room_bytes(self) -> int:
        """Return how much is sure to find a place in Triton's memory.

        That is what is free of the part that this stub has, which never shrinks; or half of what
        nobody has yet, as it grows by more than it lacks, and others grow, too.
        """
        disk = os.statvfs(_MEMORY)
        room_bytes = disk.f_bavail * disk.f_frsize // 2 - _STEP_BYTES
        with suppress(OSError):  # another server may name it otherwise
            # A list, for others change it meanwhile.
            room_bytes = max(room_bytes, self._pool.stat().st_size - sum([*self._inside.values()]))
        return room_bytes

    def _response(self, outcome: Outcome, tensors: list[Any]) -> Any:
        if isinstance(outcome, lrai.ModelNotFound):  # the runtime has unloaded what Triton has yet
            self._held.load_again()
            outcome = lrai.NotReady("the runtime had unloaded the model, which is loaded again")
        if outcome is not self._alive:  # probes are nobody's requests
            self._metrics.count(outcome)
        if isinstance(outcome, lrai.LraiError):
            code = getattr(pb_utils.TritonError, _CODES.get(outcome.http_status, "UNAVAILABLE"))
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(outcome), code))
        said = {key: value for key, value in outcome.parameters.items() if value is not None}
        return pb_utils.InferenceResponse(tensors, **({"parameters": said} if self._tells else {}))


def _bytes_of(tensors: Mapping[str, Any]) -> int:
    """Return what tensors take in Triton's memory at most: a KiB each beside what they hold."""
    texts = [text for array in tensors.values() if array.dtype.hasobject for text in array.flat]
    as_bytes = [text if isinstance(text, bytes) else text.encode() for text in texts]  # as it came
    return sum(1024 + int(array.nbytes) for array in tensors.values()) + sum(map(len, as_bytes))


def _outcome(answer: Started) -> Outcome:
    try:
        return answer.result() if isinstance(answer, Future) else answer
    except CancelledError:
        return Cancelled("cancelled")
    except lrai.LraiError as error:
        return error


def _argument(index: int) -> str:
    """Return an argument of the stub: its first is a `model.py` in the version directory.

    A shared backend has none there, but while a version is being configured Triton tells in no
    other way which one it is. The second is the name of its shared memory.
    """
    return os.fsdecode(Path("/proc/self/cmdline").read_bytes().split(b"\0")[index])
