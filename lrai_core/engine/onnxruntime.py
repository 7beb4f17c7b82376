"""The engine of every base install: onnxruntime on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal

from lrai_core.engine.engine import huge_pages
from lrai_core.errors import ArtifactError, CompileError, EngineError, UnsupportedOperator
from lrai_core.protocol import Array

# onnxruntime (1.32) leaves AMX alone, and int8 takes 1.4 times as long, where its import finds the
# thread bound to one CPU, as it is where each actor has a core of its own.
_CPUS: Final = os.sched_getaffinity(0)
with suppress(OSError):  # it has none of these
    os.sched_setaffinity(0, {*_CPUS, *range(os.cpu_count() or 1)})
import onnxruntime as ort  # noqa: E402
from onnxruntime.capi import onnxruntime_pybind11_state as state  # noqa: E402

with suppress(OSError):  # who may not set it has not set it above
    os.sched_setaffinity(0, _CPUS)

_ERRORS = (v for v in vars(state).values() if isinstance(v, type) and issubclass(v, Exception))
# onnxruntime's have no base of their own.
REFUSALS: Final[tuple[type[Exception], ...]] = (*_ERRORS, RuntimeError, ValueError)
_LACKING: Final = ("not a registered", "No Op registered", "implementation for")
MEMORY_LACKS: Final = ("Failed to allocate", "bad_alloc", "bad allocation")
# After a call its threads would wait awake for the next one for 45 ms, at the expense of who has
# work then: another session of this process, or the host. This is longer than between operators.
_SPIN_US: Final = 500
_LEVELS: Final = {"none": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "all": "ORT_ENABLE_ALL"}


class OnnxRuntime:
    """Loads ONNX graphs. Stored variants run as they are: no graph optimisation at load."""

    name = "onnxruntime"
    version: str = ort.__version__

    def load(
        self, model: Path, *, weights: Path | None = None, threads: int = 1, optimise: bool = False
    ) -> OnnxRuntimeSession:
        """Return a session; see `Engine.load`."""
        options = session_options(threads, "all" if optimise else "none", weights)
        # Without a path of its own a graph may take its external data from a folder of ours.
        given = str(model) if weights is None else model.read_bytes()
        try:
            with huge_pages() as before:
                session = open_session(given, options)
        except REFUSALS as error:
            raise ArtifactError(f"onnxruntime cannot open {model.name}: {reason(error)}") from None
        return OnnxRuntimeSession(session, before)


class OnnxRuntimeSession:
    """One onnxruntime session."""

    # What Python puts around the session's own `run` takes as long as a small model.
    _run: Callable[..., list[Array]]

    def __init__(self, session: ort.InferenceSession, before: Set[int]) -> None:
        self._session, self._run, self._before = session, session._sess.run, before  # noqa: SLF001
        self._inputs = [value.name for value in session.get_inputs()]
        self._outputs = [value.name for value in session.get_outputs()]
        self._largest_bytes = -1

    def run(self, arrays: Sequence[Array], outputs: Sequence[int] | None = None) -> list[Array]:
        """Return the outputs; see `Session.run`."""
        names = self._outputs if outputs is None else [self._outputs[i] for i in outputs]
        feed, size = {}, 0
        try:
            for name, array in zip(self._inputs, arrays, strict=True):
                feed[name], size = array, size + array.nbytes
            if size > self._largest_bytes:  # it may take more memory than before, and keep it
                self._largest_bytes = size
                return huge_pages(self._before)(self._run)(names, feed, None)
            return self._run(names, feed, None)
        except REFUSALS as error:
            # What is no lack of memory is in the inputs.
            invalid = not any(lack in str(error) for lack in MEMORY_LACKS)
            why = f"onnxruntime cannot run the model: {reason(error)}"
            raise EngineError(why, invalid=invalid) from None


def session_options(
    threads: int, level: Literal["none", "basic", "all"], weights: Path | None
) -> ort.SessionOptions:
    """Return options for one call at a time, silent but for errors that are raised anyway.

    Args:
        threads: Of one call.
        level: Of graph optimisation: "basic" keeps to standard operators, "all" fuses for this CPU.
        weights: Folder of the external data of a graph that is given as bytes.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[level])
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    if weights is not None:
        folder = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(folder, str(weights))
    return options


def open_session(
    model: str | bytes, options: ort.SessionOptions, **how: Any
) -> ort.InferenceSession:
    """Return a session on a graph or its file; operators of a plugin are added where it asks.

    A plugin is an entry point of the group `lrai.operators`, named like the operators' domain.
    """
    how["providers"] = ["CPUExecutionProvider"]
    try:
        return ort.InferenceSession(model, options, **how)
    except REFUSALS as error:
        from importlib.metadata import entry_points  # 2 MB that an actor can do without

        for plugin in entry_points(group="lrai.operators"):
            if plugin.name in str(error):
                plugin.load()(options, model)
                return ort.InferenceSession(model, options, **how)
        raise


def reason(error: BaseException) -> str:
    """Return onnxruntime's message without codes, source locations and folders, on one line."""
    text = " ".join(str(error).split())
    text = text.rpartition(" : ")[2] or text
    return " ".join(Path(word).name if "/" in word else word for word in text.split())[:300]


def refusal(error: BaseException, message: str) -> CompileError:
    """Return `message` as the error that fits onnxruntime's.

    Only the text of its error tells whether an operator that it lacks is the reason.
    """
    lacking = any(words in str(error) for words in _LACKING)
    return UnsupportedOperator(message) if lacking else CompileError(message)
