"""Start a server, ask it, end it: a program for a network namespace, which nobody can look into.

    python ask_inside.py PORT COMMAND ...

It writes `told.json` into the working directory.
"""

from __future__ import annotations

import fcntl
import json
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, Final

_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 1  # of an interface: linux/sockios.h, linux/if.h
_READY_SECONDS: Final = 120.0
_BODY: Final = {"input_ids": [[3, 14, 15]], "attention_mask": [[1, 1, 1]]}


def main(port: int, command: list[str]) -> None:
    """Ask the server that `command` starts on `port`."""
    routes = Path("/proc/net/route").read_text().splitlines()[1:]
    if not routes:
        raise_loopback()
    server = subprocess.Popen(command)
    try:
        wait_until_ready(server, port)
        told = {
            "isolated": not routes,
            "answer": json.loads(ask(port, "/predict", _BODY)),
            "about": json.loads(ask(port, "/v2/models/tokens")),
            "figures": ask(port, "/metrics").decode(),
        }
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    Path("told.json").write_text(json.dumps(told))


def raise_loopback() -> None:
    """Set the interface up, which a new namespace has down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        name = b"lo".ljust(16, b"\0")
        got = fcntl.ioctl(any_socket, _GET_FLAGS, name + bytes(24))
        (flags,) = struct.unpack_from("h", got, 16)
        fcntl.ioctl(any_socket, _SET_FLAGS, name + struct.pack("h", flags | _UP) + bytes(22))


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    """Return once it says so.

    Raises:
        RuntimeError: It ended, or says nothing.
    """
    deadline = time.monotonic() + _READY_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            ask(port, "/readyz")
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise RuntimeError("the server did not get ready")


def ask(port: int, path: str, body: Any = None) -> bytes:
    """Return what it answers."""
    data = None if body is None else json.dumps(body).encode()
    address = f"http://127.0.0.1:{port}{path}"
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:  # noqa: S310 - of this machine
        content: bytes = reply.read()
    return content


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
