"""Servers as process trees: started on chosen CPUs, measured, and ended without a trace."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

HOST: Final = "127.0.0.1"
_CPUS: Final = os.sched_getaffinity(0)  # before any process is put on one of them
_END_SECONDS: Final = 15.0
_KILL_SECONDS: Final = 5.0


class Server:
    """A server on a free port of this machine, with everything that it starts.

    Use it as a context manager: leaving ends it, and kills what does not end by itself.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        cpus: Sequence[int] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Start `command`, in which `{port}` stands for the port.

        Args:
            command: Program and arguments.
            log: File for what it prints; its folder is the working directory.
            cpus: The CPUs that the tree may use from when it is ready; empty for all. Not before,
                see `on_cpus`.
            variables: Added to the environment.
        """
        (self.port,) = free_ports(1)
        self.log, self._cpus = log, cpus
        arguments = [part.format(port=self.port) for part in command]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        with log.open("wb") as output, on_cpus():
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
                env={**os.environ, "PATH": path, **(variables or {})},
                start_new_session=True,  # Ctrl-C is for this program, which then ends the server
            )

    def wait_until_ready(self, path: str, seconds: float = 120.0) -> None:
        """Return once `path` answers 200.

        Raises:
            RuntimeError: The server ended, or did not answer in time; with the end of its log.
        """
        deadline = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < deadline:
            if self._answers(path):
                for _ in range(2):  # who was just about to be started
                    confine(self.processes(), self._cpus)
                return
            time.sleep(0.1)
        tail = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(f"the server did not get ready:\n{tail}")

    def processes(self) -> list[int]:
        """Return the process ids of the tree, the server's own first."""
        return _tree(self._process.pid)

    def memory_bytes(self) -> int:
        """Return the resident memory of the tree; what processes share counts once."""
        return sum(_proportional_set_size(pid) for pid in self.processes())

    def stop(self, grace_seconds: float = _END_SECONDS) -> list[int]:
        """End the server with SIGTERM; return what of its tree was left and had to be killed."""
        tree = self.processes()
        self._process.terminate()
        left = self._wait_for(tree, grace_seconds)
        _signal(left, signal.SIGKILL)
        self._wait_for(left, _KILL_SECONDS)
        return left

    def __enter__(self) -> Self:
        """Return the server."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it; then the runtime that it started, which would wait for another client."""
        if self._process.poll() is not None:  # its workers may have outlived it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            tree = self.processes()
            runtimes = [pid for pid in tree if _is_runtime(pid)]
            theirs = {pid for runtime in runtimes for pid in _tree(runtime)}
            own = [pid for pid in tree if pid not in theirs]
            self._process.terminate()
            left = self._wait_for(own, _END_SECONDS)
            _signal(runtimes, signal.SIGTERM)
            left += self._wait_for(list(theirs), _END_SECONDS)
            _signal(left, signal.SIGKILL)
            self._wait_for(left, _KILL_SECONDS)

    def _answers(self, path: str) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
        try:
            connection.request("GET", path)
            with connection.getresponse() as reply:
                return reply.status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _wait_for(self, pids: Sequence[int], seconds: float) -> list[int]:
        """Return which of the processes live on after that time, or nothing when all ended."""
        deadline = time.monotonic() + seconds
        while (left := [pid for pid in pids if self._alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def _alive(self, pid: int) -> bool:
        if pid == self._process.pid:
            return self._process.poll() is None
        try:
            return _state(pid) != "Z"
        except OSError:
            return False


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used so far, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def on_cpus(cpus: Iterable[int] = _CPUS) -> Iterator[None]:
    """Keep this thread, and what it starts, on these CPUs: by default on all.

    What is started inherits those of the thread that starts it, which may have been put on one, and
    onnxruntime (1.32) uses AMX only where its import finds more. Nobody is to be slower than on a
    machine of its own because of how he is measured.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def confine(pids: Iterable[int], cpus: Collection[int]) -> None:
    """Let processes run on these CPUs alone, with the threads that they have; empty: on any."""
    tasks = (task for pid in pids for task in Path("/proc").glob(f"{pid}/task/*"))
    for task in tasks if cpus else ():
        with contextlib.suppress(OSError):  # it has ended
            os.sched_setaffinity(int(task.name), cpus)


def _ports() -> Iterator[int]:
    """Yield ports in turn, of those that the kernel gives to nobody by itself.

    Of tests that run beside one another each process has its own, so that what is free is free yet
    when a server listens there.
    """
    first = 10_000 + 5_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw2")[2:])
    begin = os.getpid() * 97 % 5_000
    for number in itertools.count(begin):
        yield first + number % 5_000


_in_turn: Final = _ports()


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that are free and differ."""
    found = list[int]()
    while len(found) < count:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port := next(_in_turn)))
            found.append(port)
    return found


def _tree(root: int) -> list[int]:
    """Return a process and all below it, itself first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _parent(entry)):
            children.setdefault(parent, []).append(int(entry.name))
    tree = [root]
    for pid in tree:
        tree += children.get(pid, [])
    return tree


def _signal(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _is_runtime(pid: int) -> bool:
    try:
        return b"lrai_shared.daemon" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _proportional_set_size(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass  # it has just ended
    return 0
