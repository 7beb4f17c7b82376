"""OpenVINO on the CPU: `pip install 'lrai[openvino]'`.

What it costs beside the engine's work: a shape that no call has had before some milliseconds once,
and one that the call before did not have one or two. A network that is compiled for a shape has no
such cost, and takes memory for its weights. So one is, beside the network for all others, for each
shape that somebody has named, and for calls of one row of a small model whose rows are all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Lock
from typing import Final

import msgspec

from lrai_core.engine.engine import huge_pages, installed_version
from lrai_core.engine.onnxruntime import MEMORY_LACKS
from lrai_core.errors import ArtifactError, EngineError, EnvironmentProblem
from lrai_core.protocol import Array

try:
    import openvino as ov
except ImportError as error:
    why = f"openvino is not installed, or does not load: pip install 'lrai[openvino]' ({error})"
    raise EnvironmentProblem(why) from None

NOTES: Final = "lrai"  # the name in a model under which its `Notes` are
REFUSALS: Final = (RuntimeError, TypeError, ValueError)  # openvino's errors have no base
FLOAT32: Final = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
_MOST_SHAPES: Final = 1 << 14
_MOST_TWICE: Final = 64 << 20  # bytes of weights
_SETTINGS: Final = {
    "CPU_RUNTIME_CACHE_CAPACITY": "200",  # shapes and such: as fast as with 5,000, 80 MB less
    "ENABLE_CPU_PINNING": "NO",  # the process has its CPUs
    "NUM_STREAMS": "1",
    "PERFORMANCE_HINT": "LATENCY",
}
# Where shapes are known, two small layers in int8 become one operator that computes rubbish. What
# convolutions and attention gain by such operators is much, and the gate sees that it is right.
_APART: Final = {"SNIPPETS_MODE": "DISABLE"}


Shapes = tuple[tuple[int, ...], ...]  # one for each input


class Notes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What travels in a model.

    Attributes:
        settings: A value for each key of `FLOAT32`, whose defaults depend on the CPU.
        bounds: The least and the largest integer that an input may hold. Beyond a table the engine
            reads rows of zeros, where onnxruntime refuses the input; and it counts in 32 bits.
        rows: All inputs have as many rows, along their first axis.
        shapes: Of all inputs, in each of the calls that it is compiled for.
    """

    settings: dict[str, str]
    bounds: dict[str, tuple[int, int]]
    rows: bool = False
    shapes: tuple[Shapes, ...] = ()


_notes: Final = msgspec.json.Decoder(Notes)


class OpenVino:
    """Loads models of OpenVINO's own kind, an `.xml` with a `.bin` beside it."""

    name = "openvino"

    def __init__(self) -> None:
        """Find the CPU."""
        self.version = installed_version("openvino")
        self.core = ov.Core()
        self.able = sorted(self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))

    @huge_pages()
    def load(
        self, model: Path, *, weights: Path | None = None, threads: int = 1, optimise: bool = False
    ) -> OpenVinoSession:
        """Return a session; see `Engine.load`. Weights are beside the model, nowhere else."""
        del weights, optimise
        try:
            network = self.core.read_model(model)
            notes = _notes.decode(network.get_rt_info(NOTES).astype(str))
            settings = _SETTINGS | {"INFERENCE_NUM_THREADS": str(threads)}
            settings |= {key: notes.settings[key] for key in FLOAT32}
            if "BF16" not in self.able:
                settings |= {"INFERENCE_PRECISION_HINT": "f32"}  # it was made elsewhere
            shapes = {*notes.shapes}
            if notes.rows and model.with_suffix(".bin").stat().st_size <= _MOST_TWICE:
                shapes.update(_of_one_row(network))
            kinds = {one.get_type_name() for one in network.get_ops()}
            attends = any(  # a classifier's, of matrices, is none
                one.get_type_name() == "Softmax" and len(one.get_output_partial_shape(0)) > 2
                for one in network.get_ops()
            )
            large = "Convolution" in kinds or attends
            apart = _APART if "FakeQuantize" in kinds and not large else {}

            def compiled_for(shapes: Shapes) -> ov.InferRequest:
                known = network.clone()
                known.reshape(dict(enumerate(map(list, shapes))))
                return self.core.compile_model(
                    known, "CPU", settings | apart
                ).create_infer_request()

            request = self.core.compile_model(network, "CPU", settings).create_infer_request()
            return OpenVinoSession(network, request, dict.fromkeys(shapes), compiled_for, notes)
        except (*REFUSALS, KeyError, OSError, msgspec.MsgspecError) as error:
            raise ArtifactError(f"openvino cannot open {model.name}: {reason(error)}") from None

    def profile(
        self, model: Path, feed: Sequence[Array], threads: int, calls: int
    ) -> Iterator[tuple[str, str, float]]:
        """Yield kind, name and milliseconds of every operator of each call with one row.

        What is loaded later is profiled, too, which takes time: this is for a process of its own.
        """
        self.core.set_property("CPU", {"PERF_COUNT": "YES"})
        session = self.load(model, threads=threads)
        for _ in range(calls):
            session.run(feed)
            yield from session.taken()


class OpenVinoSession:
    """A compiled model, and others for some shapes; each has one request, used again.

    For a shape it is compiled at the first call that has it, in which it stays as it is where
    memory lacks for another.
    A request takes any array: it casts other datatypes, repeats the last input where one is not
    given, and reads beyond what it has where shapes do not agree. So each is checked before.
    """

    def __init__(
        self,
        network: ov.Model,
        request: ov.InferRequest,
        fixed: dict[Shapes, ov.InferRequest | None],
        compiled_for: Callable[[Shapes], ov.InferRequest],
        notes: Notes,
    ) -> None:
        self._network, self._outputs = network, range(len(network.outputs))
        self._request = self._last = request
        self._fixed, self._compiled_for = fixed, compiled_for
        # The network's names: what is compiled has those of operators that were left out, too.
        bounds = [[notes.bounds[n] for n in i.names if n in notes.bounds] for i in network.inputs]
        if sum(map(len, bounds)) != len(notes.bounds):
            raise ValueError("its notes speak of inputs that it does not have")
        self._inputs = [
            (i.element_type.to_dtype(), len(i.partial_shape), own[0] if own else None)
            for i, own in zip(request.model_inputs, bounds, strict=True)
        ]
        self._first = int(notes.rows)
        self._fit: set[tuple[tuple[int, ...], ...]] = set()  # shapes but for rows
        self._one_at_a_time = Lock()

    def run(self, arrays: Sequence[Array], outputs: Sequence[int] | None = None) -> list[Array]:
        """Return the outputs, copied; see `Session.run`."""
        if len(arrays) != len(self._inputs):
            raise _refused(f"{len(arrays)} inputs given, {len(self._inputs)} needed")
        for index, (array, wanted) in enumerate(zip(arrays, self._inputs, strict=True)):
            dtype, rank, bounds = wanted
            if array.dtype != dtype or array.ndim != rank:
                given = f"{array.dtype} of rank {array.ndim}"
                raise _refused(f"input {index} is {given}, {dtype} of rank {rank} is needed")
            if bounds and array.size and not bounds[0] <= array.min() <= array.max() <= bounds[1]:
                raise _refused(f"an index of input {index} is outside {list(bounds)}")
        try:
            with self._one_at_a_time:
                shapes = tuple([array.shape for array in arrays])
                self._last = self._request_for(shapes)
                results = self._last.infer(list(arrays))
        except REFUSALS as error:
            why = reason(error)
            raise _refused(why, invalid=not any(lack in why for lack in MEMORY_LACKS)) from None
        return [results[i] for i in (self._outputs if outputs is None else outputs)]

    def _request_for(self, shapes: Shapes) -> ov.InferRequest:
        """Return what takes inputs of these shapes; refuse such that do not agree."""
        if (known := self._fixed.get(shapes)) is not None:
            return known
        apart = tuple([shape[self._first :] for shape in shapes])
        if apart not in self._fit:
            self._network.reshape(dict(enumerate(map(list, shapes))))
            if len(self._fit) < _MOST_SHAPES:
                self._fit.add(apart)
        if shapes not in self._fixed:
            return self._request
        self._fixed[shapes] = self._request
        with suppress(*REFUSALS), huge_pages():
            self._fixed[shapes] = self._compiled_for(shapes)
        return self._fixed[shapes]

    def taken(self) -> Iterator[tuple[str, str, float]]:
        """Yield kind, name and milliseconds of the operators of the last call; see `profile`."""
        for one in self._last.profiling_info:
            yield one.node_type, one.node_name, one.real_time / timedelta(milliseconds=1)


def _of_one_row(network: ov.Model) -> list[Shapes]:
    """Return the shapes of a call of one row, if all of them but rows is known."""
    shapes = [[*i.partial_shape] for i in network.inputs]
    free = {at for shape in shapes for at, dim in enumerate(shape) if dim.is_dynamic}
    if free != {0}:
        return []
    return [tuple((1, *(dim.get_length() for dim in shape[1:])) for shape in shapes)]


def _refused(why: str, *, invalid: bool = True) -> EngineError:
    return EngineError(f"openvino cannot run the model: {why}", invalid=invalid)


def reason(error: BaseException) -> str:
    """Return openvino's message without its places in the source and folders, on one line."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check "))]
    words = " ".join(told or [type(error).__name__]).split()
    return " ".join(Path(word).name if "/" in word else word for word in words)[:300]
