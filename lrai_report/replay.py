"""One artifact under several policies: real calls on this machine, and what their callers saw.

The policies differ in nothing but who shares a call with whom: each has an actor of its own, with
the same variant, engine and threads, and one batch at a time goes to it.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import selectors
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lrai_core import (
    Artifact,
    DeadlineExceeded,
    InferenceRequest,
    LraiError,
    QueueFull,
    Runtime,
    Signature,
    TensorSpec,
    UsageError,
)
from lrai_report.own import own_config
from lrai_report.trace import Arrivals

POLICIES: Final = {
    "planner": "lrai as it is set here, with one actor: calls are shared where that saves time, "
    "and the most urgent request leads",
    "one-by-one": "lrai with scheduler.max_batch_rows = 1: each request in a call of its own",
    "fifo-8": "the classic dynamic batcher: what waits, in order of arrival, at most 8 rows a "
    "call, padded to the longest; it knows no deadlines",
}
_FIFO_ROWS: Final = 8
# What fifo puts together is one request for the runtime: the limits of one are for its parts.
_JOINED: Final = dict.fromkeys(("limits.request_bytes", "scheduler.max_queue_bytes"), 1 << 40) | {
    "limits.request_rows": 1 << 20
}
CALLERS: Final = 4  # enough that a request waits whenever the actor is free
_WINDOWS: Final = 3
_OTHER_EXTENT: Final = 4  # of a free dimension that is neither batch nor length
_PATIENCE: Final = 5.0  # deadlines after which a caller is gone whom nobody has answered
_TICK_SECONDS: Final = 0.25

Inputs = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one policy made of one part of a trace.

    Attributes:
        latencies: Seconds from the arrival, in the trace, to the answer; infinite without one.
        refused: Requests that were refused or given up with an error; the others without an answer
            had none when their caller left.
        seconds: Up to the last answer, or the last arrival if that is later.
        rows: Of the requests that were answered.
        calls: Calls of the engine.
        lag_seconds: How late requests were sent, 99th percentile: this machine's own part.
    """

    latencies: NDArray[np.float64]
    refused: int
    seconds: float
    rows: int
    calls: int
    lag_seconds: float


class MadeUp:
    """Inputs that most models accept, of any size up to a largest: cut from one set of arrays."""

    def __init__(
        self,
        signature: Signature,
        arrivals: Arrivals,
        most_bytes: int,
        kept: Sequence[Sequence[NDArray[Any]]] = (),
    ) -> None:
        """Make the largest that these need.

        Args:
            signature: Of the model.
            arrivals: Whose sizes are made.
            most_bytes: Of a request.
            kept: Rows that the artifact was judged on. Of texts, and of inputs with free sizes that
                the trace does not tell, these are asked: what they take depends on what they hold.

        Raises:
            UsageError: It has over `most_bytes`.
        """
        rows, length = int(arrivals.rows.max()), int(arrivals.lengths.max())
        self._specs = signature.inputs
        self._real = _real(kept, self._specs, rows)
        shapes = [
            [rows, *self._real[spec.name].shape[1:]]
            if spec.name in self._real
            else _shape(spec, rows, length)
            for spec in self._specs
        ]
        kinds = [_dtype(spec) for spec in self._specs]
        size = sum(
            math.prod(shape) * kind.itemsize for shape, kind in zip(shapes, kinds, strict=True)
        )
        if size > most_bytes:
            raise UsageError(
                f"a request of {rows} rows of length {length} has {size:,} bytes; "
                f"limits.request_bytes allows {most_bytes:,}"
            )
        random = np.random.default_rng(0)
        self._arrays = [
            _values(shape, kind, random) for shape, kind in zip(shapes, kinds, strict=True)
        ]

    def cut(self, rows: int, length: int, turn: int = 0) -> Inputs:
        """Return inputs of that size; views. Of real rows, others at every turn."""
        cuts = {}
        for made, spec in zip(self._arrays, self._specs, strict=True):
            array = self._real.get(spec.name, made)
            window = [slice(None)] * array.ndim
            if spec.name in self._real:
                start = turn % (len(array) - rows + 1)
                window[0] = slice(start, start + rows)
            elif spec.batch_axis is not None:
                window[spec.batch_axis] = slice(rows)
            if spec.length_axis is not None:
                window[spec.length_axis] = slice(length)
            cuts[spec.name] = np.asarray(array[tuple(window)], array.dtype)  # a scalar is none
        return cuts


class Server:
    """A runtime that answers under one policy."""

    def __init__(self, policy: str, runtime: Runtime, signature: Signature) -> None:
        self.runtime = runtime
        self._inputs = signature.inputs
        self._most_rows = _FIFO_ROWS if signature.coalescible else 1
        self._room = runtime.config.scheduler.max_queue_rows
        self._fifo = policy.startswith("fifo")
        self._waiting: deque[tuple[Inputs, int, asyncio.Future[None]]] = deque()
        self._waiting_rows = 0
        self._batcher: asyncio.Task[None] | None = None

    @classmethod
    def open(cls, policy: str, artifact: Artifact) -> Server:
        """Start a runtime for the policy and load the artifact; `close` ends it."""
        alone: dict[str, Any] = {"actor.replicas": 1, "actor.devices": ""}
        settings = alone | (_JOINED if policy.startswith("fifo") else {})
        if policy != "planner":
            settings["scheduler.max_batch_rows"] = 1
        runtime = Runtime.open(artifact, config=own_config(settings), address="embedded")
        return cls(policy, runtime, artifact.manifest.signature)

    def close(self) -> None:
        """End the runtime and its actor."""
        self.runtime.close()

    async def infer(self, inputs: Inputs, rows: int, seconds: float | None = None) -> None:
        """Return when the answer is there; `seconds` is for how long the caller waits, at most.

        Raises:
            DeadlineExceeded: Given up; not by fifo, which does not look.
            QueueFull: No room.
        """
        if not self._fifo:
            await self._call(inputs, None if seconds is None else seconds * 1e3)
            return
        if self._waiting_rows + rows > self._room:
            full = f"the queue holds {self._waiting_rows} rows, {rows} more exceed its {self._room}"
            raise QueueFull(full, limit=self._room, retry_after_seconds=1.0)
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((inputs, rows, answered))
        self._waiting_rows += rows
        if self._batcher is None or self._batcher.done():
            self._batcher = asyncio.create_task(self._batches())
        await answered

    async def settle(self) -> None:
        """Return when nothing is inside any more; the runtime has no event for that."""
        while self._waiting or self.runtime.stats()["outstanding_rows"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def _call(self, inputs: Inputs, timeout_ms: float | None = None) -> None:
        await self.runtime.infer_async(
            InferenceRequest(model_name="", inputs=inputs, timeout_ms=timeout_ms)
        )

    async def _batches(self) -> None:
        while taken := self._take():
            try:
                await self._call(join([inputs for inputs, _ in taken], self._inputs))
            except LraiError as error:
                for _, answered in taken:
                    if not answered.done():
                        answered.set_exception(error)
            else:
                for _, answered in taken:
                    if not answered.done():
                        answered.set_result(None)

    def _take(self) -> list[tuple[Inputs, asyncio.Future[None]]]:
        taken: list[tuple[Inputs, asyncio.Future[None]]] = []
        total = 0
        while self._waiting:
            inputs, rows, answered = self._waiting[0]
            if taken and total + rows > self._most_rows:
                break
            self._waiting.popleft()
            self._waiting_rows -= rows
            if not answered.done():  # its caller has not left
                taken.append((inputs, answered))
                total += rows
        return taken


def join(requests: Sequence[Inputs], specs: Sequence[TensorSpec]) -> Inputs:
    """Return the rows of several requests as those of one, padded to the longest."""
    if len(requests) == 1:
        return requests[0]
    joined = {}
    for spec in specs:
        arrays, axis = [request[spec.name] for request in requests], spec.length_axis
        if axis is not None:
            longest = max(array.shape[axis] for array in arrays)
            pad = "" if spec.datatype == "BYTES" else spec.pad_value
            arrays = [_pad(array, axis, longest, pad) for array in arrays]
        joined[spec.name] = np.concatenate(arrays)
    return joined


def precise_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop that sleeps as long as it is told to; epoll knows milliseconds only."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


async def capacity(server: Server, arrivals: Arrivals, made_up: MadeUp, seconds: float) -> float:
    """Return how many of these requests are answered per second while there are always some."""
    sizes = itertools.cycle(list(zip(arrivals.rows, arrivals.lengths, strict=True)))
    turns = itertools.count()
    loop = asyncio.get_running_loop()

    async def caller(end: float) -> int:
        answered = 0
        while not answered or loop.time() < end:
            rows, length = map(int, next(sizes))
            await server.infer(made_up.cut(rows, length, next(turns)), rows)
            answered += 1
        return answered

    rates = []
    for _ in range(_WINDOWS):
        start = loop.time()
        callers = [caller(start + seconds / _WINDOWS) for _ in range(CALLERS)]
        rates.append(sum(await asyncio.gather(*callers)) / (loop.time() - start))
    return float(np.median(rates))


async def replay(
    server: Server,
    arrivals: Arrivals,
    made_up: MadeUp,
    deadline_seconds: float,
    tick: Callable[[float], None],
) -> Outcome:
    """Send every request at its moment, and return what became of them.

    Args:
        server: Nothing else asks it meanwhile.
        arrivals: From the first moment on.
        made_up: Inputs of their sizes.
        deadline_seconds: After the arrival; what passes it is late, and ends where the policy
            looks at deadlines.
        tick: Told now and then how many seconds of the trace are over.
    """
    loop = asyncio.get_running_loop()
    count = len(arrivals.seconds)
    latencies, lags = np.full(count, np.inf), np.zeros(count)
    refused: list[int] = []
    failures: list[BaseException] = []
    asking: set[asyncio.Task[None]] = set()

    async def ask(index: int, due: float, inputs: Inputs, rows: int) -> None:
        try:
            await server.infer(inputs, rows, due + deadline_seconds - loop.time())
        except (DeadlineExceeded, QueueFull):
            refused.append(index)
        else:
            latencies[index] = loop.time() - due

    def ended(task: asyncio.Task[None]) -> None:
        asking.discard(task)
        if not task.cancelled() and (failure := task.exception()):
            failures.append(failure)

    calls_before = server.runtime.stats().get("batch_completed", 0)
    start, ticked = loop.time(), 0.0
    sizes = zip(arrivals.seconds.tolist(), arrivals.rows, arrivals.lengths, strict=True)
    for index, (at, rows, length) in enumerate(sizes):
        await asyncio.sleep(max(0.0, start + at - loop.time()))  # also where it is late: to hear
        now = loop.time() - start
        if now - ticked > _TICK_SECONDS:
            ticked = now
            tick(now)
        lags[index] = now - at
        inputs = made_up.cut(int(rows), int(length), index)
        task = asyncio.create_task(ask(index, start + at, inputs, int(rows)))
        asking.add(task)
        task.add_done_callback(ended)
        if failures:
            break
    if asking and not failures:
        await asyncio.wait(asking, timeout=_PATIENCE * deadline_seconds)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await server.settle()
    if failures:
        raise failures[0]
    answered = np.isfinite(latencies)
    last = float(np.max(arrivals.seconds[answered] + latencies[answered], initial=0))
    return Outcome(
        latencies=latencies,
        refused=len(refused),
        seconds=max(last, float(arrivals.seconds[-1])),
        rows=int(arrivals.rows[answered].sum()),
        calls=server.runtime.stats().get("batch_completed", 0) - calls_before,
        lag_seconds=float(np.percentile(lags, 99)),
    )


def _pad(array: NDArray[Any], axis: int, length: int, value: float | str) -> NDArray[Any]:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - array.shape[axis])
    return np.pad(array, widths, constant_values=value)


def _shape(spec: TensorSpec, rows: int, length: int) -> list[int]:
    shape = [extent if isinstance(extent, int) else _OTHER_EXTENT for extent in spec.shape]
    for axis, extent in ((spec.batch_axis, rows), (spec.length_axis, length)):
        if axis is not None:
            shape[axis] = extent
    return shape


def is_told(spec: TensorSpec) -> bool:
    """Return whether a trace tells the size of an input: no text, no size but rows and length."""
    free = [axis for axis, extent in enumerate(spec.shape) if not isinstance(extent, int)]
    return spec.datatype != "BYTES" and set(free) <= {spec.batch_axis, spec.length_axis}


def _real(
    kept: Sequence[Sequence[NDArray[Any]]], specs: Sequence[TensorSpec], rows: int
) -> dict[str, NDArray[Any]]:
    """Return real values of the inputs whose sizes are not told, over again where rows are few."""
    wanted = [i for i, s in enumerate(specs) if not is_told(s) and s.batch_axis == 0]
    wanted = [i for i in wanted if specs[i].length_axis is None] if kept else []
    alike = [row for row in kept if all(row[i].shape == kept[0][i].shape for i in wanted)]
    count = max(rows, len(alike))
    return {
        specs[i].name: np.resize(
            np.concatenate([row[i] for row in alike]), (count, *alike[0][i].shape[1:])
        )
        for i in wanted
    }


def _dtype(spec: TensorSpec) -> np.dtype[Any]:
    name = spec.datatype.lower().replace("fp", "float")
    return np.dtype(np.object_ if name == "bytes" else name)


def _values(shape: list[int], dtype: np.dtype[Any], random: np.random.Generator) -> NDArray[Any]:
    """Return noise for floats, and bits for integers: they are tokens, segments and masks alike."""
    if dtype.kind == "f":
        return random.standard_normal(shape).astype(dtype)
    if dtype.kind == "O":
        return np.full(shape, "a", dtype)
    first = np.arange(shape[-1]) == 0 if shape else True  # is never masked
    return (random.integers(0, 2, shape) | first).astype(dtype)
