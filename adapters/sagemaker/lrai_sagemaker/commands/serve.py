"""`lrai sagemaker serve` and `package`: what a container runs, and what it is given."""

from __future__ import annotations

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import typer

from lrai_core import Artifact, EnvironmentProblem, UsageError, load_config
from lrai_import.hosted import asked
from lrai_sagemaker.commands.app import app, out
from lrai_sagemaker.commands.tars import package as package_artifact
from lrai_sagemaker.settings import MEBIBYTE, Settings, Strategy

LogLevel = Literal["debug", "info", "warning", "error", "critical"]
_MODEL: Final = "/opt/ml/model"
_MODELS: Final = "/opt/ml/models"
_MOST_MB: Final = 100  # of all bodies that batch transform has on their way
_TIMEOUT: Final = ["LRAI_SAGEMAKER_TIMEOUT", "SAGEMAKER_MODEL_SERVER_TIMEOUT"]
_HOST: Final = "Who is answered: 0.0.0.0 for all, which our image sets."
_CERTIFICATE: Final = "To demand, as in epsilon=0.1,delta=0.01."

Folder = Annotated[Path | None, typer.Argument(help=f"{_MODEL}, or {_MODELS} of many models.")]
Multi = Annotated[bool, typer.Option(envvar="SAGEMAKER_MULTI_MODEL", help="Serve many models.")]
Host = Annotated[str, typer.Option(envvar="LRAI_SAGEMAKER_HOST", help=_HOST)]
Port = Annotated[
    int, typer.Option(envvar="SAGEMAKER_BIND_TO_PORT", min=0, max=65535, help="0: any free one.")
]
Workers = Annotated[
    int, typer.Option(envvar="SAGEMAKER_MODEL_SERVER_WORKERS", min=1, help="Processes for HTTP.")
]
Require = Annotated[str, typer.Option(envvar="LRAI_SAGEMAKER_REQUIRE", help=_CERTIFICATE)]
Payload = Annotated[
    int,
    typer.Option(envvar="SAGEMAKER_MAX_PAYLOAD_IN_MB", min=0, help="MiB; 0: limits.request_bytes."),
]
Seconds = Annotated[
    float, typer.Option(envvar=_TIMEOUT, min=0, max=1e6, help="Per answer; 0: 60, batch 3600.")
]
Drain = Annotated[
    float,
    typer.Option(envvar="LRAI_SAGEMAKER_DRAIN", min=0, max=25, help="To answer after SIGTERM."),
]
Batch = Annotated[bool, typer.Option(envvar="SAGEMAKER_BATCH", help="For batch transform.")]
_ADVISED: Final = "What /execution-parameters advises"
_TRANSFORMS: Final = "SAGEMAKER_MAX_CONCURRENT_TRANSFORMS"
_LEVEL: Final = "LRAI_SAGEMAKER_LOG_LEVEL"
_OWN: Final = "LRAI_SAGEMAKER_"
_LINK: Final = re.compile("_SERVICE_|_PORT")  # what Kubernetes tells of a service of that name
_KNOWN: Final = {_LEVEL, *(_OWN + name for name in ("HOST", "REQUIRE", "TIMEOUT", "DRAIN"))}
Concurrency = Annotated[
    int,
    typer.Option(
        envvar=_TRANSFORMS, min=0, help=f"{_ADVISED}; 0: as 100 MB of bodies allow, 16 at most."
    ),
]
Strategies = Annotated[
    Strategy, typer.Option(envvar="SAGEMAKER_BATCH_STRATEGY", help=f"{_ADVISED}.")
]
Level = Annotated[
    LogLevel, typer.Option(envvar=_LEVEL, case_sensitive=False, help="Least level to log.")
]


@app.command()
def serve(
    folder: Folder = None,
    multi_model: Multi = False,  # noqa: FBT002 - typer's form of a flag, in what follows, too
    host: Host = "127.0.0.1",
    port: Port = 8080,
    workers: Workers = 1,
    require: Require = "",
    max_payload_mb: Payload = 6,
    timeout_seconds: Seconds = 0.0,
    drain_seconds: Drain = 25.0,
    batch: Batch = False,  # noqa: FBT002
    max_concurrent_transforms: Concurrency = 0,
    batch_strategy: Strategies = "MULTI_RECORD",
    log_level: Level = "info",
) -> None:
    """Serve a model as SageMaker has it, with /ping and /invocations, until SIGTERM.

    Each option can also be set by a variable; the platform sets some of them. Several workers share
    a runtime. Without --host only this machine is answered. After SIGTERM it answers what it has
    accepted, and ends.
    """
    own = {name for name, value in os.environ.items() if value and name.startswith(_OWN)}
    if unknown := min((name for name in own - _KNOWN if not _LINK.search(name)), default=""):
        known = ", ".join(sorted(_KNOWN))  # else a certificate would be demanded in vain
        raise UsageError(f"environment: {unknown[:80]} is no setting; known: {known}")
    largest_mb = max_payload_mb or min(100, load_config().limits.request_bytes // MEBIBYTE)
    settings = Settings(
        folder=str(folder or (_MODELS if multi_model else _MODEL)),
        multi_model=multi_model,
        host=host,
        port=port,
        workers=workers,
        require=_required(require),
        payload_mb=max_payload_mb,
        answer_seconds=timeout_seconds or (3600.0 if batch else 60.0),
        drain_seconds=drain_seconds,
        concurrency=max_concurrent_transforms or min(16, _MOST_MB // max(1, largest_mb)) or 1,
        strategy=batch_strategy,
        log_level=log_level,
    )
    if not all(map(find_spec, ("starlette", "uvicorn"))):
        raise EnvironmentProblem("serving needs more packages: pip install 'lrai[sagemaker]'")
    # In this process's place: what the command line needs would be in memory as long as it serves.
    program = [sys.executable, "-P", "-m", "lrai_sagemaker.commands.supervisor"]
    sys.stdout.flush()
    os.execv(program[0], [*program, msgspec.json.encode(settings).decode()])  # noqa: S606 - no shell


@app.command()
def package(
    artifact: Annotated[Path, typer.Argument(help="A directory NAME.lrai; every file is checked.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, model.tar.gz.")],
) -> None:
    """Write the tar that SageMaker fetches; the same artifact gives the same bytes."""
    package_artifact(Artifact.open(artifact), output)
    out.print(f"{output} has {output.stat().st_size / MEBIBYTE:.1f} MiB")


def _required(text: str) -> dict[str, Any] | None:
    """Return the demands of `KEY=VALUE,KEY=VALUE`; the core knows the keys."""
    pairs = [pair.strip().partition("=") for pair in text.split(",") if text]
    return asked({f"require.{key}": value for key, _, value in pairs}).require
