"""The compiler's log in an artifact, `quantization.jsonl`, which may be of anybody."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Annotated, Final

import msgspec

from lrai_core import Artifact, ArtifactError

_LOG: Final = "quantization.jsonl"
_MOST_BYTES: Final = 64 << 20
_FUSED: Final = "fused: "  # how the note of `lrai fuse` begins


class Event(msgspec.Struct, frozen=True):
    """A line of the compiler's log; what it has no field for is left out."""

    event: str
    form: str = ""
    kept: bool = False
    why: str = ""
    speedup: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0
    gap: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    batch_effect: float | None = None  # of what the gate saw
    chosen: str = ""
    variant: str = ""
    node: str = ""
    op_type: str = ""
    bits: int = 0
    scheme: str = ""
    weight_elements: int = 0
    error: float = 0.0
    harm: float = 0.0
    max_accuracy_loss: float = 0.01
    max_disparity: float = 0.01
    calibration: bool = False
    axes: bool = False
    keep_evaluation: int | None = None
    minutes: float | None = None
    seed: int = 0
    engines: tuple[str, ...] = ()
    keep: int = 0  # logs of earlier versions do not tell it


def logged(artifact: Artifact) -> Iterator[Event]:
    """Yield the lines of the log, none where there is no log.

    Raises:
        ArtifactError: It cannot be read.
    """
    if _LOG not in artifact.manifest.files:
        return
    file = artifact.file(_LOG)
    if file.stat().st_size > _MOST_BYTES:
        raise ArtifactError(f"{_LOG} is over {_MOST_BYTES >> 20} MB")
    decode = msgspec.json.Decoder(Event).decode
    try:
        for line in file.read_bytes().splitlines():
            yield decode(line)
    except (OSError, msgspec.MsgspecError) as error:
        raise ArtifactError(f"{_LOG} cannot be read: {str(error)[:200]}") from None


def fused(found: Iterable[Event]) -> str:
    """Return what was noted of models that are one, empty of a model that was one before."""
    return next((e.why for e in found if e.event == "note" and e.why.startswith(_FUSED)), "")


def models(found: Iterable[Event]) -> list[str]:
    """Return what `lrai compile` was given, as far as the log tells."""
    told = fused(found).removeprefix(_FUSED).partition("; ")[0]
    with suppress(ValueError):  # quotes that do not end
        return [*shlex.split(told), "--fuse"] if told else ["MODEL"]
    return ["MODEL"]
