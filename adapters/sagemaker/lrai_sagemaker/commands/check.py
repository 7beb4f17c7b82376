"""`lrai sagemaker check`: play the platform against a container, before the platform does."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
import typer
from rich.table import Table

from lrai_core import Artifact, ConditionNotMet, EnvironmentProblem, UsageError
from lrai_import.hosted import zeros
from lrai_sagemaker.commands.app import app, out
from lrai_sagemaker.commands.contract import Container

Target = Annotated[list[str], typer.Argument(help="URL, or a command, which is run meanwhile.")]
Sample = Annotated[Path | None, typer.Option("--artifact", help="Model, to ask it zeros.")]
Payload = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, readable=True, help="A body that the model takes."),
]
ContentType = Annotated[str, typer.Option(help="Type of the payload.")]
ModelUrl = Annotated[str, typer.Option(help="Path of a model there: check a multi-model one.")]
Start = Annotated[float, typer.Option(help="Time until /ping has to say 200.")]
Grace = Annotated[float, typer.Option(help="Time between SIGTERM and SIGKILL.")]


@app.command(context_settings={"allow_interspersed_args": False})
def check(
    target: Target,
    artifact: Sample = None,
    payload: Payload = None,
    content_type: ContentType = "application/json",
    model_url: ModelUrl = "",
    start_seconds: Start = 480.0,
    grace_seconds: Grace = 30.0,
) -> None:
    """Ask a container all that SageMaker would, and say what a deployment would trip over.

    A command is run as in a container: on the port of SAGEMAKER_BIND_TO_PORT, until SIGTERM. Exit
    status 3: there is something.
    """
    body = payload.read_bytes() if payload else _zeros(artifact) if artifact else b""
    url, process = urlsplit(target[0]), None
    try:
        port = url.port or (80 if url.scheme == "http" else _free_port())
    except ValueError:
        raise UsageError(f"{target[0][:80]!r} has no port from 0 to 65535") from None
    host = url.hostname or "127.0.0.1"
    if url.scheme == "http" and target[1:]:
        raise UsageError(f"options come before the URL, not {target[1][:80]!r} behind it")
    if url.scheme != "http":
        environ = {**os.environ, "SAGEMAKER_BIND_TO_PORT": str(port)}
        environ |= {"SAGEMAKER_MULTI_MODEL": "true"} if model_url else {}
        try:
            process = subprocess.Popen(
                target, env=environ, stdin=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            hint = ", and http://HOST:PORT is needed for what runs" * (":" in target[0])
            raise EnvironmentProblem(
                f"{target[0]!r} cannot be run: {error.strerror}{hint}"
            ) from None
    there = Container(host, port, (body, content_type), model_url, process)
    try:
        found = there.check(start_seconds, grace_seconds)
    finally:
        if process is not None:  # it may not have ended by itself
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started, too
            process.wait()
    if not body:
        out.print("without --payload or --artifact nothing was asked that the model could answer")
    if found:
        table = Table("where", "found", "wanted")
        for finding in found:
            table.add_row(*finding)
        out.print(table)
        raise ConditionNotMet(f"{len(found)} problem(s), as said above")
    out.print("nothing that the platform would trip over")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _zeros(path: Path) -> bytes:
    rows = zeros(Artifact.open(path).manifest.signature.inputs)
    return msgspec.json.encode({"inputs": {name: array.tolist() for name, array in rows.items()}})
