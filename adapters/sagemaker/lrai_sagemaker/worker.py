"""One worker process: the application on uvicorn, on a socket that the supervisor has bound."""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import Final

import msgspec
import uvicorn

from lrai_core import Artifact, LraiError, Runtime
from lrai_import.hosted import load
from lrai_sagemaker.app import create
from lrai_sagemaker.logs import log, one_line, set_up_log
from lrai_sagemaker.settings import Settings, asked_of

_KEEP_SECONDS: Final = 75  # longer than the platform keeps a connection that nobody uses


def main(settings: Settings, listening: int, parent: int) -> None:
    """Answer until told to end, or until the supervisor is gone, which may be so at once."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn's own comes in its place
    set_up_log(settings.log_level)

    async def look() -> None:
        server.should_exit |= os.getppid() != parent

    with Runtime((asked := asked_of(settings)).config) as runtime:
        if asked.here:  # else the supervisor has loaded it, or names do
            artifact = Artifact.open(settings.artifact, verify=False)  # the engine's side hashes it
            load(runtime, artifact, settings.model, **asked.how)
        server = uvicorn.Server(uvicorn.Config(
            create(settings, runtime), access_log=False, log_config=None, server_header=False,
            lifespan="off", ws="none", callback_notify=look, timeout_notify=1,
            timeout_graceful_shutdown=round(settings.drain_seconds),
            timeout_keep_alive=_KEEP_SECONDS,
        ))  # fmt: skip
        server.run([socket.socket(fileno=listening)])


if __name__ == "__main__":
    try:
        main(msgspec.json.decode(sys.argv[1], type=Settings), *map(int, sys.argv[2:]))
    except LraiError as error:
        log.error("%s", one_line(error))
        sys.exit(error.exit_code)
