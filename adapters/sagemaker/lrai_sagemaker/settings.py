"""What `lrai sagemaker serve` was told, as every process of the container gets it."""

from __future__ import annotations

import socket
from typing import Any, Final, Literal

import msgspec

from lrai_core import Artifact, EnvironmentProblem
from lrai_import.hosted import Asked, asked

Strategy = Literal["SINGLE_RECORD", "MULTI_RECORD"]
MEBIBYTE: Final = 1 << 20


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of one container.

    Attributes:
        folder: Of the model; of a multi-model endpoint the one that model paths may not leave.
        require: Of the certificate of what serves; None for nothing.
        payload_mb: Largest body, in MiB; 0 for what `limits.request_bytes` allows.
        answer_seconds: Within which the platform wants an answer.
        drain_seconds: For what is being answered when the container is told to end.
        concurrency: Requests at a time that batch transform is advised to send.
        strategy: What batch transform is advised to put into a body.
        scratch: Folder of this container's processes alone, gone when it ends.
        model: The name that the runtime knows the model by; empty in a multi-model endpoint.
        artifact: Path of the model; likewise.
    """

    folder: str
    multi_model: bool = False
    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1
    require: dict[str, Any] | None = None
    payload_mb: int = 6
    answer_seconds: float = 60.0
    drain_seconds: float = 25.0
    concurrency: int = 16
    strategy: Strategy = "MULTI_RECORD"
    log_level: str = "info"
    scratch: str = ""
    model: str = ""
    artifact: str = ""


def asked_of(settings: Settings) -> Asked:
    """Return LRAI's settings here, and of the model of one worker where it has that in itself."""
    waits = {"scheduler.default_timeout_ms": settings.answer_seconds * 1e3}
    given = asked(waits)._replace(require=settings.require)
    if not settings.artifact:
        return given
    return given.placed(Artifact.open(settings.artifact, verify=False), settings.workers)


def listen(settings: Settings) -> socket.socket:
    """Return the socket that all workers accept from.

    Raises:
        EnvironmentProblem: It is taken, or none of this machine's.
    """
    host, port = settings.host, settings.port
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise EnvironmentProblem(f"{host}:{port} cannot be served: {error.strerror}") from None
