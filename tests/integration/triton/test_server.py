"""The server that the tests of this folder share, and how servers start and end."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from benchmarks.processes import HOST
from benchmarks.triton_server import Prepared, TritonServer, prepare
from tests.integration.test_runtime_faults import wait_until
from tests.integration.triton.models import WIDTH, config, plain
from tests.integration.triton.server import Triton
from tests.pause import pause

pytestmark = pytest.mark.server


GIVEN = {"x": np.arange(2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)}


def test_a_model_that_is_added_answers_over_both_protocols_and_has_a_stub(
    triton: Triton, tmp_path: Path
) -> None:
    with triton.serving("echo", {1: plain(tmp_path)}, config("python")):
        for protocol in ("http", "grpc"):
            answer = triton.ask("echo", GIVEN, protocol=protocol)
            np.testing.assert_array_equal(answer["y"], GIVEN["x"])
        (stub,) = triton.server.stub_pids()["echo"]
        assert os.getpgid(stub) == triton.server.pid
    wait_until(lambda: "echo" not in triton.server.stub_pids())
    with pytest.raises(InferenceServerException):
        triton.ask("echo", GIVEN)


def test_the_server_listens_on_loopback_alone(triton: Triton) -> None:
    sockets = {f"socket:[{inode}]": where for where, inode in listening()}
    held = set[str]()
    for entry in Path(f"/proc/{triton.server.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            held.add(str(entry.readlink()))
    found = {where for name, where in sockets.items() if name in held}
    server = triton.server
    assert found == {server.http, server.grpc, server.metrics}


def listening() -> list[tuple[str, str]]:
    """Return address and inode of each socket that listens, of either version of IP."""
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            address, port = fields[1].split(":")
            if fields[3] == "0A":
                host = HOST if address.endswith("0100007F") else address  # gRPC's is mapped to IPv6
                found.append((f"{host}:{int(port, 16)}", fields[9]))
    return found


def test_the_environment_is_made_once(prepared: Prepared) -> None:
    made = (prepared.environment / ".ready").stat().st_mtime_ns
    assert prepare() == prepared
    assert (prepared.environment / ".ready").stat().st_mtime_ns == made


def test_a_server_that_does_not_start_says_why_and_leaves_nothing(
    prepared: Prepared, tmp_path: Path
) -> None:
    server = TritonServer(tmp_path / "nowhere", **prepared._asdict())
    with pytest.raises(RuntimeError, match=r"nowhere"), server:
        pass
    assert not server.running()
    assert not server.runtime.folder.exists()


def test_a_server_ends_with_its_stubs_and_its_runtime_alone(
    triton: Triton, prepared: Prepared, tmp_path: Path
) -> None:
    # A daemon is started by a stub, in a session of its own.
    plain(tmp_path / "held" / "1", "import lrai_core; self.r = lrai_core.Runtime(address='auto')")
    (tmp_path / "held" / "config.pbtxt").write_text(config("python"))
    cpu = min(os.sched_getaffinity(0))
    with TritonServer(tmp_path, **prepared._asdict(), cpus=[cpu]) as server:
        with contextlib.closing(Triton(server, tmp_path)) as its:
            its.ask("held", GIVEN)
        (stub,) = server.stub_pids()["held"]
        (daemon,) = server.runtime.daemons()
        assert os.sched_getaffinity(stub) == {cpu}
        assert regions(server)
        pause(server.pid)  # so that it hears no SIGTERM
        assert set(server.stop(grace_seconds=1)) == {server.pid, stub}
        assert daemon in server.runtime.daemons()
    for pid in (server.pid, stub, daemon):
        wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists())  # type: ignore[misc]
    assert not regions(server)
    assert triton.http.is_server_live()


def regions(server: TritonServer) -> list[Path]:
    """Return the shared memory that a server has, or has left behind."""
    return list(Path("/dev/shm").glob(f"{server._regions}*"))  # noqa: S108 - names are read
