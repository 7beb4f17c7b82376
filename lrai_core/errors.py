"""Every error that LRAI raises on purpose, with the status of a host and the CLI's exit code.

* LraiError                      500, exit 1
  + RequestError                 400, the caller's fault
    - InvalidTensor              400
    - ModelNotFound              404
    - DeadlineExceeded           504
      . Cancelled                504, nobody is told
    - QueueFull                  429
  + NotReady                     503, exit 5
    - ActorError                 503, exit 5
      . PoisonRequest            500, exit 5, sent again it would kill again
  + EngineError                  400, exit 4, the engine cannot run these inputs
  + UsageError                   exit 2
  + ConditionNotMet              exit 3, a gate, certificate or freeze says no
  + UnusableFile                 exit 4
    - ArtifactError              exit 4
    - CompileError               exit 4
      . UnsupportedOperator      exit 4
      . CalibrationError         exit 4
    - VerificationError          exit 4
  + EnvironmentProblem           exit 5, disk, permission, missing extra
    - OutOfResources             507, exit 5, of memory or disk
      . MemoryBudgetExceeded     507, exit 5

Messages state what was got and what was allowed; attributes carry the data. Nothing here names a
path below the artifact or a memory name to a remote caller.
"""

from __future__ import annotations

from typing import Final

VERSION: Final = "0.1.0"  # of lrai: here, for the lowest layer may have to say it


class LraiError(Exception):
    """What every deliberate error derives from."""

    http_status: int = 500
    exit_code: int = 1


class RequestError(LraiError):
    """The request cannot be served as it stands; sending it again unchanged will not help."""

    http_status = 400
    exit_code = 2


class InvalidTensor(RequestError):
    """A tensor does not match what the model declares.

    Attributes:
        tensor: Name of the tensor as the caller gave it, shortened to 120 characters.
    """

    def __init__(self, tensor: str, message: str) -> None:
        self.tensor = shorten(tensor)
        super().__init__(f"tensor {self.tensor!r}: {message}")


class ModelNotFound(RequestError):
    """No model of that name (and version) is loaded."""

    http_status = 404


class DeadlineExceeded(RequestError):
    """The deadline passed, or cannot be met any more."""

    http_status = 504
    retry_after_seconds: float = 1.0


class Cancelled(DeadlineExceeded):
    """Whoever asked is gone, so nobody is told."""


class QueueFull(RequestError):
    """The bounded queue has no room.

    Attributes:
        limit: The bound that was hit, in the unit that the message names.
        retry_after_seconds: When trying again makes sense.
    """

    http_status = 429

    def __init__(self, message: str, *, limit: int, retry_after_seconds: float) -> None:
        self.limit, self.retry_after_seconds = limit, retry_after_seconds
        super().__init__(message)


class NotReady(LraiError):
    """The runtime is loading, draining or closed."""

    http_status = 503
    exit_code = 5
    retry_after_seconds: float | None = 1.0


class ActorError(NotReady):
    """The model's process failed and the request could not be answered by its replacement."""


class PoisonRequest(ActorError):
    """Each process that took the request has died of it, so nobody is asked to send it again."""

    http_status = 500
    retry_after_seconds = None


class EngineError(LraiError):
    """The engine will not run the model on these inputs.

    Attributes:
        invalid: Whether the inputs are to blame, rather than memory or the engine.
    """

    http_status = 400
    exit_code = 4

    def __init__(self, message: str, *, invalid: bool = False) -> None:
        self.invalid = invalid
        super().__init__(message)


class UsageError(LraiError):
    """Arguments that do not fit, an output that exists."""

    exit_code = 2


class ConditionNotMet(LraiError):
    """A gate, a required certificate or a freeze says no. A normal result, not a crash."""

    exit_code = 3


class UnusableFile(LraiError):
    """A model, a data set or an artifact that cannot be used."""

    exit_code = 4


class ArtifactError(UnusableFile):
    """The artifact is changed, truncated, newer than this version, or reaches outside itself."""


class CompileError(UnusableFile):
    """The model cannot be compiled."""


class UnsupportedOperator(CompileError):
    """The model holds an operator that no engine here implements."""


class CalibrationError(CompileError):
    """Calibration or evaluation data that cannot be used."""


class VerificationError(UnusableFile):
    """A certificate or specification that cannot be read or does not belong to the artifact."""


class EnvironmentProblem(LraiError):
    """The machine stands in the way: disk, permission, a missing extra."""

    exit_code = 5


class OutOfResources(EnvironmentProblem):
    """There is too little memory or disk for it at the moment."""

    http_status = 507


class MemoryBudgetExceeded(OutOfResources):
    """A model does not fit `runtime.memory_mib` beside those that cannot be unloaded for it."""


def shorten(text: str, limit: int = 120) -> str:
    """Return `text` fit for an error message: printable, and at most `limit` characters."""
    printable = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return printable if len(printable) <= limit else printable[: limit - 1] + "…"
