"""The `parameters` of a model configuration, as LRAI's settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple, cast, get_args

from lrai_core import UsageError
from lrai_import.hosted import Asked, asked
from lrai_triton.config import MAX_BATCH_SIZE

Execution = Literal["auto", "lists", "sender", "inline"]

WATCH: Final = "lrai-watch"  # id of the requests by which `lrai triton watch` asks who is alive
# Triton's onnxruntime backend has keys of its own, of which one is for us, too.
_OURS: Final = re.compile(r"variant|execution|(?!session\.|memory\.|ep\.).*\..*")
_THREADS: Final = "intra_op_thread_count"


class Settings(NamedTuple):
    """What a model configuration asks for.

    Attributes:
        asked: Of LRAI.
        execution: How requests are answered.
        instances: Of the model.
        size: `max_batch_size`; 0 where Triton hands requests over one by one.
    """

    asked: Asked
    execution: Execution
    instances: int
    size: int


def instances_of(model_config: Mapping[str, Any]) -> int:
    """Return how many there are to be of a model, 1 where nothing is said."""
    groups = model_config.get("instance_group", [])  # each has so many instances on each GPU
    return max(1, sum(int(g.get("count", 1)) * max(1, len(g.get("gpus", []))) for g in groups))


def settings_of(model_config: Mapping[str, Any]) -> Settings:
    """Return what the parameters of a configuration say; the rest is as everywhere.

    No call has more rows than `max_batch_size`, unless the parameter for that says so.

    Raises:
        UsageError: An unknown parameter, or a value that is not allowed.
    """
    said = {k: str(v["string_value"]) for k, v in model_config.get("parameters", {}).items()}
    given = {key: value for key, value in said.items() if _OURS.fullmatch(key)}
    if _THREADS in said:
        given.setdefault("actor.threads", said[_THREADS])
    execution = given.pop("execution", "auto")
    if execution not in (allowed := get_args(Execution)):
        raise UsageError(f"execution is {execution!r}, allowed: {', '.join(allowed)}")
    size = int(model_config.get("max_batch_size", 0))
    wanted = asked(given).limited(size * (size != MAX_BATCH_SIZE))  # which nobody has written
    return Settings(wanted, cast("Execution", execution), instances_of(model_config), size)
