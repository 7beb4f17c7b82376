"""A real Triton server on this machine: its environment, made once, then its start and its end.

The wheel nvidia-pytriton holds the server and its Python backend, so neither a container nor root
is needed. It wants an environment of its own, `.triton`, because it is tied to an older numpy.

    python benchmarks/triton_server.py            # an empty repository, to add models to
    python benchmarks/triton_server.py FOLDER     # with what lies in FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Self

from benchmarks.host import Host, end_on_sigterm
from benchmarks.processes import HOST, Server, free_ports
from lrai_core import EnvironmentProblem, LraiError

ROOT: Final = Path(__file__).resolve().parent.parent
_PYTHON: Final = "3.11"  # the newest that both a stub and numpy 1.26 come for, and lrai runs on
# The stub of this version writes wrong values with numpy 2, and numpy 1.26 needs that ml_dtypes.
_PINS: Final = ("nvidia-pytriton==0.7.0", "numpy==1.26.4", "ml_dtypes==0.5.4")
_PACKAGES: Final = ("nvidia-pytriton", "lrai", "onnxruntime", "numpy")
_STUB: Final = b"triton_python_backend_stub"
_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - where the Python backend keeps its regions


class Prepared(NamedTuple):
    """What a server is started with."""

    environment: Path  # a venv, whose Python the stubs run
    backends: Path


def prepare(root: Path = ROOT) -> Prepared:
    """Return the environment in `root/.triton`, made anew where what it is made of has changed.

    Raises:
        EnvironmentProblem: No Python 3.11, no libpython of it, or pip fails.
    """
    made = Prepared(root / ".triton", root / ".triton" / "backends")
    marker = made.environment / ".ready"
    parts = [(root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    parts += [os.fsencode(root), *(pin.encode() for pin in _PINS)]  # scripts name their folder
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()
    with (root / "pyproject.toml").open() as lock:  # for two test runs that find nothing there
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not marker.is_file() or marker.read_text() != key:
            _make_environment(root, made.environment)
            make_backends(made.environment, made.backends)
            marker.write_text(key)
    _check_library(made.environment)
    return made


def find_python() -> str | None:
    """Return a Python of the stub's version: this one, or the one of that name on PATH."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in (sys.executable, shutil.which(f"python{_PYTHON}")):
        if candidate and _output(candidate, "-c", code).strip() == _PYTHON:
            return candidate
    return None


def make_backends(environment: Path, folder: Path) -> None:
    """Write the backend directory of the server in `environment`: `python`, and ours."""
    package = _package(environment)
    python = folder / "python"
    shutil.rmtree(folder, ignore_errors=True)
    python.mkdir(parents=True)
    # A link to the library is refused: it would lead out of the backend directory.
    shutil.copy(package / "backends" / "python" / "libtriton_python.so", python)
    utils = "triton_python_backend_utils.py"
    (python / utils).symlink_to(package / "backends" / "python" / utils)
    (python / _STUB.decode()).symlink_to(_stub(environment))
    lrai = environment / "bin" / "lrai"
    _run(lrai, "triton", "install", "--backend-directory", folder, env=variables(environment))


def variables(environment: Path) -> dict[str, str]:
    """Return what has to be set for a server, or `lrai triton serve`, to run from `environment`."""
    paths = [environment / "bin", _package(environment) / "bin", os.environ.get("PATH", "")]
    found = {"PATH": os.pathsep.join(map(str, paths))}
    if (folder := _library_folder(environment)) is not None:
        before = os.environ.get("LD_LIBRARY_PATH")
        found["LD_LIBRARY_PATH"] = os.pathsep.join([str(folder), *([before] if before else [])])
    return found


class TritonServer(Server):
    """A server on three free ports of this machine, with a shared runtime of its own.

    Use it as a context manager: entering waits until it is ready, leaving ends the server, its
    stubs, and the daemon that they have started.

    Attributes:
        http: Address for HTTP requests, `127.0.0.1:PORT`.
        grpc: Likewise for gRPC.
        metrics: Likewise of the metrics, which are at `/metrics` there.
        runtime: The shared runtime that stubs attach to, unless `env` names another one.
    """

    def __init__(
        self,
        repository: Path,
        *,
        environment: Path,
        backends: Path,
        arguments: Sequence[str] = (),
        cpus: Sequence[int] | None = None,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        """Start the server; it is not ready yet.

        Args:
            repository: Model repository.
            environment: From `prepare`.
            backends: Likewise.
            arguments: More of the server's own.
            cpus: The CPUs that it and its stubs may use; all by default.
            env: Added to the environment; `LRAI_RUNTIME_SOCKET_DIR` names another's runtime.
            log: File for what it prints; by default one that goes when the server ends.
        """
        self.runtime, self._environment = Host(), environment
        grpc_port, metrics_port = free_ports(2)
        # Regions are found by it, should the server be killed.
        self._regions = f"lrai-{grpc_port}-"
        command = [
            str(_package(environment) / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={self._regions}",
            *(f"--{protocol}-address={HOST}" for protocol in ("http", "grpc", "metrics")),
            f"--grpc-port={grpc_port}",
            f"--metrics-port={metrics_port}",
            "--allow-gpu-metrics=false",
            "--exit-timeout-secs=5",
            *arguments,
        ]
        own = {"LRAI_RUNTIME_SOCKET_DIR": str(self.runtime.folder)}
        try:
            super().__init__(
                [*map(_escape, command), "--http-port={port}"],
                log or self.runtime.folder / "tritonserver.log",
                cpus=cpus or (),
                variables=variables(environment) | own | dict(env or {}),
            )
        except OSError:
            self.runtime.close()
            raise
        self.http = f"{HOST}:{self.port}"
        self.grpc, self.metrics = f"{HOST}:{grpc_port}", f"{HOST}:{metrics_port}"

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    def versions(self) -> dict[str, str]:
        """Return the version that the server says it has, and those of its stubs' environment."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", "/v2")
            found = {"triton": str(json.loads(connection.getresponse().read())["version"])}
        code = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
        python = str(self._environment / "bin" / "python")
        said = _output(python, "-P", "-c", code, *_PACKAGES, **variables(self._environment))
        return found | dict(zip(_PACKAGES, said.split(), strict=False))

    def stub_pids(self) -> dict[str, list[int]]:
        """Return the process ids of the stubs that live, by model."""
        return stubs(self.processes())

    def running(self) -> bool:
        """Return whether the server has not ended."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Return the server's exit status, once it has ended."""
        return self._process.wait()

    def stop(self, grace_seconds: float = 15.0) -> list[int]:
        """End the server with SIGTERM; return what of its process group had to be killed.

        The daemon is no member of that group. It ends afterwards, when no stub asks it any more.
        """
        members = [pid for pid in self.processes() if _group(pid) == self.pid]
        self._process.terminate()
        left = self._wait_for(members, grace_seconds)
        if left:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._wait_for(left, grace_seconds)
        return left

    def close(self) -> None:
        """End whatever of it still runs, and remove what it leaves behind."""
        if self.running():
            self.stop()
        self.runtime.close()
        for region in _SHARED_MEMORY.glob(f"{self._regions}*"):
            region.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        """Return the server once it is ready.

        Raises:
            RuntimeError: It does not get ready; with the end of its log.
        """
        try:
            self.wait_until_ready("/v2/health/ready")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.close()


def stubs(pids: Iterable[int]) -> dict[str, list[int]]:
    """Return which of these processes are stubs, by model."""
    found: dict[str, list[int]] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if words[0].endswith(_STUB):  # the next word is REPOSITORY/MODEL/VERSION/model.py
                model = Path(os.fsdecode(words[1])).parents[1].name
                found.setdefault(model, []).append(pid)
    return found


def main() -> int:
    """Start a server in the foreground; return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("repository", nargs="?", type=Path, help="an empty one by default")
    arguments = parser.parse_args()
    end_on_sigterm()
    try:
        started = time.monotonic()
        made = prepare()
        print(f"the environment is ready after {time.monotonic() - started:.1f} s", flush=True)
        repository = arguments.repository or made.environment / "repository"
        if arguments.repository is None:
            repository.mkdir(exist_ok=True)
        return _serve(made, repository.absolute())
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (LraiError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return error.exit_code if isinstance(error, LraiError) else 1


def _serve(made: Prepared, repository: Path) -> int:
    """Print where a server listens, then what it says, until it ends."""
    started = time.monotonic()
    # Models can be loaded and unloaded, and what lies there at the start is loaded.
    arguments = ["--model-control-mode=explicit", "--load-model=*"]
    with TritonServer(repository, **made._asdict(), arguments=arguments) as server:
        print(f"the server is ready after {time.monotonic() - started:.1f} s: process {server.pid}")
        print(f"http     http://{server.http}\ngrpc     {server.grpc}")
        print(f"metrics  http://{server.metrics}/metrics\nmodels   {repository}", flush=True)
        with server.log.open(errors="replace") as said:
            while (line := said.readline()) or server.running():
                print(line, end="", flush=True)
                if not line:
                    time.sleep(0.2)
        return server.wait()


def _make_environment(root: Path, environment: Path) -> None:
    """Make the venv, with lrai as it lies in `root`."""
    python = find_python()
    if python is None:
        raise EnvironmentProblem(
            f"Triton's Python backend needs Python {_PYTHON} here, this is Python "
            f"{sys.version.partition(' ')[0]}, and no python{_PYTHON} that works is on PATH"
        )
    shutil.rmtree(environment, ignore_errors=True)
    _run(python, "-m", "venv", environment)
    pinned = tuple(f"{pin.partition('==')[0]}==" for pin in _PINS)
    lines = (root / "constraints.txt").read_text().splitlines()
    constraints = environment / "constraints.txt"
    constraints.write_text("\n".join(line for line in lines if not line.startswith(pinned)))
    pip = (environment / "bin" / "python", "-m", "pip", "--disable-pip-version-check")
    _run(*pip, "install", "-q", "-c", constraints, "-e", f"{root}[text]", *_PINS)


def _check_library(environment: Path) -> None:
    """Raise where the stub would not start for lack of libpython, which venvs do not bring."""
    missing = [
        line.split()[0]
        for line in _output("ldd", _stub(environment), **variables(environment)).splitlines()
        if line.endswith("not found")
    ]
    if missing:
        raise EnvironmentProblem(
            f"Triton's Python backend needs {', '.join(missing)}, which is not on this system: "
            f"apt-get install libpython{_PYTHON}"
        )


def _library_folder(environment: Path) -> Path | None:
    """Return where the interpreter of the environment keeps its libpython, None for the system's.

    One that was built by hand, or by pyenv, has its own, and the system may have none or another.
    """
    for line in (environment / "pyvenv.cfg").read_text().splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "home":
            folder = Path(value.strip()).resolve().parent / "lib"
            return folder if (folder / f"libpython{_PYTHON}.so.1.0").is_file() else None
    return None


def _package(environment: Path) -> Path:
    packages = environment / "lib" / f"python{_PYTHON}" / "site-packages"
    return packages / "pytriton" / "tritonserver"


def _stub(environment: Path) -> Path:
    return _package(environment) / "python_backend_stubs" / _PYTHON / _STUB.decode()


def _run(*command: str | Path, env: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})}
    )
    if done.returncode:
        words = " ".join(map(str, command))
        raise EnvironmentProblem(f"{words} failed:\n{(done.stderr or done.stdout)[-2000:]}")


def _output(*command: str | Path, **variables: str) -> str:
    """Return what a program prints, nothing where it fails or is not there."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, **variables}
        ).stdout
    except OSError:
        return ""


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def _escape(part: str) -> str:
    """Return an argument as a format string that stands for itself."""
    return part.replace("{", "{{").replace("}", "}}")


if __name__ == "__main__":
    sys.exit(main())
