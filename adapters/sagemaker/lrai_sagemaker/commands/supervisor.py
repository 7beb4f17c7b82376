"""The first process of a container: it holds the model, and keeps workers running until its end.

uvicorn has a supervisor too, which imports the program of its parent into each worker, the compiler
with it; starts a worker that cannot work again for ever; and watches none that is alone.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, Final

import msgspec

from lrai_core import Artifact, EnvironmentProblem, LraiError, Runtime, UsageError
from lrai_import.held import Held
from lrai_sagemaker.commands import claims
from lrai_sagemaker.commands.tars import unpacked
from lrai_sagemaker.logs import log, one_line, set_up_log
from lrai_sagemaker.models import artifact_in
from lrai_sagemaker.settings import Settings, asked_of, listen

_LOOK_SECONDS: Final = 0.05
_LOAD_AGAIN_SECONDS: Final = 1.0
_START_AGAIN_SECONDS: Final = 5.0  # where the machine had no process, or no memory, to give
_MOST_DEATHS, _WINDOW_SECONDS = 10, 60.0
_MOST_FAILED: Final = 10  # starts in a row while no worker is there
_SAID: Final = (2, 3, 4, 5)  # exit statuses of a worker that cannot serve, and has said why
_SWEEP_SECONDS: Final = 10.0
_GRACE_SECONDS: Final = 2.0  # beside draining, and for the runtime; after 30 s the platform kills

Worker = subprocess.Popen[bytes] | None  # None: it could not be started yet


class Supervisor:
    """Workers on one socket, attached to one runtime; none where the only one has the model.

    Attributes:
        held: The one model, in the runtime, once it is loaded there.
    """

    def __init__(
        self, settings: Settings, runtime: Runtime | None, on: socket.socket, *own: BinaryIO
    ) -> None:
        self._settings, self._runtime, self._listening = settings, runtime, on
        self._scratch, many = Path(settings.scratch), runtime and settings.multi_model
        self._claims = own  # which workers have too: they go on for a moment if this is killed
        if runtime and many and (claim := claims.claim(runtime, self._scratch.name)):
            self._claims += (claim,)
        self._workers: list[Worker] = []
        self._deaths, self._start_at, self._failed = list[float](), 0.0, 0
        self._problem: LraiError | None = None
        self._signal = self._status = 0  # the status is a worker's
        self.held: Held | None = None

    def run(self) -> int:
        """Return the exit status: 0 after SIGTERM, 130 after Ctrl-C.

        Raises:
            LraiError: The model cannot be served, or workers keep dying, or none can be started.
        """
        signal.signal(signal.SIGTERM, self._told)
        signal.signal(signal.SIGINT, self._told)
        self._workers = [self._start() for _ in range(self._settings.workers)]
        if self._runtime and not self._settings.multi_model:
            threading.Thread(target=self._keep_loaded, name="lrai-load", daemon=True).start()
        elif self._runtime:
            threading.Thread(target=self._sweep, name="lrai-sweep", daemon=True).start()
        try:
            while not self._is_over():
                time.sleep(_LOOK_SECONDS)
                self._workers = [self._alive(worker) for worker in self._workers]
        finally:
            self._end()
        if self._problem is not None:
            raise self._problem
        return self._status or (130 if self._signal == signal.SIGINT else 0)

    def _is_over(self) -> bool:
        return bool(self._signal or self._problem or self._status)

    def _told(self, number: int, _: object) -> None:
        self._signal = number

    def _start(self) -> Worker:
        listening, told = self._listening.fileno(), msgspec.json.encode(self._settings).decode()
        command = [sys.executable, "-P", "-m", "lrai_sagemaker.worker", told]
        command += [str(listening), str(os.getpid())]
        passed = [listening, *(claim.fileno() for claim in self._claims)]
        try:  # in a group of its own: Ctrl-C comes from here alone
            return subprocess.Popen(command, pass_fds=passed, process_group=0)
        except OSError as error:
            log.warning("a worker cannot be started: %s", error.strerror)
            self._start_at = time.monotonic() + _START_AGAIN_SECONDS
            return None

    def _alive(self, worker: Worker) -> Worker:
        """Return the worker, or another one in its place, but where all is about to end."""
        now = time.monotonic()
        lives = worker.poll() is None if worker else now < self._start_at
        if lives or self._is_over():
            return worker
        if worker is None:
            worker = self._start()
            self._failed = 0 if worker or any(self._workers) else self._failed + 1
            if self._failed > _MOST_FAILED:
                self._problem = EnvironmentProblem("no worker could be started, see above")
            return worker
        self._deaths = [at for at in self._deaths if now - at < _WINDOW_SECONDS]
        if not self._runtime and worker.returncode in _SAID and not self._deaths:
            self._status = worker.returncode  # it has said why, and that is to be the last line
            return worker
        log.warning("worker %d ended with status %d", worker.pid, worker.returncode)
        self._deaths.append(now)
        if len(self._deaths) > max(_MOST_DEATHS, 3 * self._settings.workers):
            often = f"{len(self._deaths)} deaths of workers in {_WINDOW_SECONDS:g} s, see above"
            self._problem = EnvironmentProblem(often)
            return worker
        return self._start()

    def _keep_loaded(self) -> None:
        """Load the model, and again where somebody has stopped the runtime or unloaded it."""
        try:
            artifact = Artifact.open(self._settings.artifact, verify=False)
            self.held = Held(artifact, asked_of(self._settings), self._settings.model)
        except LraiError as error:
            self._problem = error
            return
        except OSError as error:  # of the file that says so
            self._problem = EnvironmentProblem(f"the model cannot be held: {error.strerror}")
            return
        while not self._is_over():
            with suppress(LraiError):  # it does not answer, of which ping tells
                self.held.kept_state()
            time.sleep(_LOAD_AGAIN_SECONDS)

    def _sweep(self) -> None:
        """Let go of what containers have left that were killed; of their workers as they end."""
        while self._runtime and not self._is_over():
            with suppress(LraiError, OSError):  # the runtime, or the disk, does not answer
                claims.sweep(self._runtime, self._scratch)
            time.sleep(_SWEEP_SECONDS)

    def _end(self) -> None:
        """Have the workers answer what they have accepted, and end them."""
        self._listening.close()  # else who comes now is accepted, and answered by nobody
        workers = list(filter(None, self._workers))
        for worker in workers:
            worker.terminate()
        deadline = time.monotonic() + self._settings.drain_seconds + _GRACE_SECONDS
        for worker in workers:
            try:
                worker.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("worker %d was killed: it did not end in time", worker.pid)
                worker.kill()


def serve(given: Settings) -> int:
    """Serve until told to end; return the exit status.

    Raises:
        LraiError: The model, the port or the machine stand in the way.
    """
    config = asked_of(given).config
    if config.runtime.address == "embedded":
        raise UsageError("runtime.address is embedded; workers share a runtime: auto, or a folder")
    place = config.runtime.socket_dir or None
    try:
        scratch = TemporaryDirectory(prefix=claims.PREFIX, dir=place)
        mine = claims.own(Path(scratch.name))
    except OSError as error:
        raise EnvironmentProblem(f"no temporary folder can be made: {error.strerror}") from None
    with scratch as folder, mine, listen(given) as listening, ExitStack() as at_the_end:
        own, claimed = {"scratch": folder}, [mine]
        if not given.multi_model:
            artifact = artifact_in(unpacked(Path(given.folder).resolve(), Path(folder)))
            artifact, locks = claims.together(artifact, Path(folder))
            at_the_end.callback(claims.forget, Path(folder))
            claimed += map(at_the_end.enter_context, locks)
            own["artifact"] = str(artifact.path)
            own["model"] = f"{artifact.manifest.name}:{artifact.version}"
        given = msgspec.structs.replace(given, **own)
        with nullcontext() if asked_of(given).here else Runtime(config) as runtime:
            log.info("serving on %s:%d", *listening.getsockname()[:2])
            supervisor = Supervisor(given, runtime, listening, *claimed)
            try:
                return supervisor.run()
            finally:  # for so long, as a runtime may hang, and the platform kills
                last = threading.Thread(
                    target=lambda: _let_go(supervisor.held, runtime, Path(folder).name), daemon=True
                )
                last.start()
                last.join(_GRACE_SECONDS)


def _let_go(held: Held | None, runtime: Runtime | None, container: str) -> None:
    """Leave nothing in a runtime that others use; of many models nobody else can find the names."""
    with suppress(LraiError, OSError):  # it is gone, or does not answer
        if held is not None:
            held.close()
        if runtime:
            claims.let_go(runtime, container)


def main(settings: Settings) -> int:
    """Serve; say in one line what stands in the way."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the first process of all has none
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    set_up_log(settings.log_level)
    try:
        return serve(settings)
    except LraiError as error:
        log.error("%s", one_line(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(msgspec.json.decode(sys.argv[1], type=Settings)))
