"""A shared runtime of a benchmark's own: where it lives, what it holds, and its end.

Everything lies in one temporary folder, so nobody else's daemon is touched, and every process of
the runtime names that folder in its command line, by which it is found.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn, Self

import numpy as np

from lrai_core import LraiConfig, load_config

_END_SECONDS: Final = 10.0
_SPAWN: Final = multiprocessing.get_context("spawn")


class Held(NamedTuple):
    """What a process holds."""

    pss_bytes: int  # its own memory, and its share of what it has together with others
    own_bytes: int  # of that, what lies in no file: where leaks show
    shared_bytes: int  # of that, in memory files and /dev/shm
    descriptors: int
    memory_files: int  # of the descriptors


class Failed(NamedTuple):
    """Sent by a process that cannot go on."""

    why: str


class Host:
    """The folder of one shared runtime. Leaving it as a context ends whatever runs there."""

    def __init__(self, **settings: Any) -> None:
        """Make the folder; processes start when somebody attaches.

        Args:
            **settings: Of the runtime, `section__name`.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="lrai-"))  # short: it is part of socket paths
        self.address = str(self.folder / f"lrai-{os.geteuid()}")  # also what `auto` finds there
        self.settings = {key.replace("__", "."): value for key, value in settings.items()}
        self.settings["runtime.socket_dir"] = str(self.folder)

    @property
    def config(self) -> LraiConfig:
        """The settings of whoever attaches."""
        return load_config(call=self.settings)

    def daemons(self) -> list[int]:
        """Return the daemon's process id, none while it is dead."""
        return _processes(b"lrai_shared.daemon", f"\0{self.address}\0".encode())

    def actors(self) -> list[int]:
        """Return the process ids of the actors, the daemon's and those of embedded runtimes."""
        return _processes(b"lrai_core.actor.actor", f"ipc://{self.folder}/".encode())

    def close(self) -> None:
        """End the daemon and its actors, kill what does not end, and remove the folder."""
        for pid in self.daemons():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _END_SECONDS
        while (left := [*self.daemons(), *self.actors()]) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        """Return the host."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


class ProcessError(RuntimeError):
    """A process of the benchmark's own has ended, failed, or says nothing."""

    def __init__(self, why: str, *, failed: bool = False) -> None:
        """Say why; `failed` where it has raised."""
        super().__init__(why)
        self.failed = failed


class Helper:
    """A process of the benchmark's own with a line to it. Leaving it as a context ends it."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        """Start a process that runs `target(line, *arguments)`, a function of a module."""
        self.line, theirs = _SPAWN.Pipe()
        self._process: SpawnProcess = _SPAWN.Process(
            target=_help, args=(target, theirs, *arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid or 0

    def ask(self, *message: Any) -> Any:
        """Send it a message and return what it answers."""
        self.line.send(message)
        return self.hear()

    def hear(self, seconds: float = 120.0) -> Any:
        """Return the next thing that it sends.

        Raises:
            ProcessError: It has ended, failed, or says nothing.
        """
        try:
            if not self.line.poll(seconds):
                raise ProcessError(f"process {self.pid} said nothing for {seconds:g} s")
            said = self.line.recv()
        except (EOFError, ConnectionResetError):
            raise ProcessError(f"process {self.pid} has ended") from None
        if isinstance(said, Failed):
            raise ProcessError(f"process {self.pid} failed: {said.why}", failed=True)
        return said

    def wait(self, seconds: float) -> bool:
        """Return whether it ends in that time."""
        self._process.join(seconds)
        return self._process.exitcode is not None

    def close(self) -> None:
        """End it, whatever it does."""
        self.line.close()  # it ends by itself when it listens
        if not self.wait(_END_SECONDS / 5):
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        """Return the process."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.close()


def held(pid: int) -> Held:
    """Return what a process holds; nothing where it has just ended."""
    fields: dict[str, int] = {}
    links: list[str] = []
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, value, _ = line.split()
            fields[name] = int(value) << 10
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                links.append(str(entry.readlink()))
    return Held(
        fields.get("Pss:", 0),
        fields.get("Pss_Anon:", 0),
        fields.get("Pss_Shmem:", 0),
        len(links),
        sum(link.startswith(("/memfd:", "/dev/shm/")) for link in links),  # noqa: S108 - reads names
    )


def end_on_sigterm() -> None:
    """Have SIGTERM end this program as Ctrl-C does: with everything that it started."""
    signal.signal(signal.SIGTERM, _end)


def _help(target: Callable[..., None], line: Connection, *arguments: Any) -> None:
    """Run a helper: Ctrl-C is for the program, which then ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        target(line, *arguments)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the program is gone or done with it
        pass
    except Exception as error:  # noqa: BLE001 - edge: the program is told, and fails
        line.send(Failed(repr(error)))


def _end(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def _processes(program: bytes, word: bytes) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes()
            if program in command and word in command:
                found.append(int(process.name))
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """Return a quantile in the unit of the values, nan of none."""
    return float(np.quantile(values, share)) if len(values) else float("nan")
