"""Keys, and what goes by them: the way to a daemon from other machines.

It is CURVE, as ZeroMQ has it: each end proves that it has the secret key to a public one that the
other end knows, and what they say is encrypted. Keys are files as `zmq.auth` writes them. Nothing
goes over TCP without them, and nobody is heard who has not proved one.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import zmq
from zmq.auth import create_certificates, load_certificate

from lrai_core import EnvironmentProblem, LraiConfig, UsageError
from lrai_core.errors import shorten
from lrai_core.wire import messages as wire

_ADDRESS: Final = re.compile(r"tcp://([\w.*-]*):([1-9]\d{0,4})\?keys=(.+)", re.ASCII)
_DOMAIN: Final = "lrai"
_MOST_PORT: Final = 65_535
# A line on which the other end does not answer is given up. Its answer may be behind large tensors.
_TCP: Final[wire.Options] = {zmq.HEARTBEAT_IVL: 5000, zmq.HEARTBEAT_TIMEOUT: 30_000}


_HEADER_BYTES: Final = 16 << 20  # of a message, beside its largest tensor


class Listener:
    """A daemon's socket for other machines, and the thread that asks who may come in."""

    def __init__(self, address: str, config: LraiConfig) -> None:
        """Let in whose public key lies in `clients` of the folder of keys when they come.

        Args:
            address: As `tcp://HOST:PORT?keys=FOLDER`, without a host on the loopback alone.
            config: Of the runtime.

        Raises:
            UsageError: See `server_end`.
            EnvironmentProblem: Likewise, or the endpoint is not to be had.
        """
        from zmq.auth.thread import ThreadAuthenticator

        endpoint, folder, options = server_end(address, config)
        self.line, self._clients = wire.listen(endpoint, options), folder / "clients"
        self._guard = ThreadAuthenticator(self.line.context)
        self._guard.configure_curve_callback(_DOMAIN, self)
        self._guard.start()

    def close(self, linger_ms: int) -> None:
        """Let nobody in any more, and close the socket when what is left has been sent."""
        if self._guard.is_alive():  # else it would be waited for, for ever
            self._guard.stop()
        self.line.context.destroy(linger=linger_ms)

    def callback(self, _domain: str, key: bytes) -> bool:
        """Return whether to let in who has proved this key; for `zmq.auth`, in its thread."""
        with suppress(Exception):  # one would end the thread, and nobody got in any more
            return any(_load(file)[0] == key for file in self._clients.glob("*.key"))
        return False


def server_end(address: str, config: LraiConfig) -> tuple[str, Path, wire.Options]:
    """Return where a daemon listens, the folder of keys, and the options of its socket.

    Raises:
        UsageError: It is no address with keys, or whoever comes could have anything loaded.
        EnvironmentProblem: The server's keys are not there, or others may read or add some.
    """
    endpoint, folder = _parse(address)
    roots = [Path(root) for root in config.runtime.model_roots.split(":") if root]
    if not roots or not all(root.is_absolute() for root in roots):
        given = shorten(repr(config.runtime.model_roots))
        needed = "to listen, set it to the folders artifacts may lie in, from / on"
        raise UsageError(f"runtime.model_roots is {given}; {needed}")
    options: wire.Options = {
        **_load_pair(folder / "server.key_secret"),
        zmq.MAXMSGSIZE: config.limits.request_bytes + _HEADER_BYTES,  # until a key is proved, too
        zmq.HANDSHAKE_IVL: 5000,  # who has not proved a key by then is cut off
        zmq.CURVE_SERVER: 1,
        zmq.ZAP_DOMAIN: _DOMAIN.encode(),
        zmq.ZAP_ENFORCE_DOMAIN: 1,  # where nobody asks for keys, nobody gets in
        zmq.ROUTER_HANDOVER: 1,  # to who comes again while its last line seems to be there
    }
    return endpoint, private_folder(folder), options


def client_end(address: str) -> tuple[str, wire.Options]:
    """Return where a client connects to, and the options of its socket.

    Raises:
        UsageError: It is no address with keys, or the folder does not have the two files.
        EnvironmentProblem: They hold no keys, or others may read the secret one.
    """
    endpoint, folder = _parse(address)
    secrets, (server, _) = list(folder.glob("*.key_secret")), _load(folder / "server.key")
    if len(secrets) != 1 or not server:
        raise UsageError(f"{folder} needs server.key and one NAME.key_secret, of lrai runtime keys")
    return endpoint, {**_load_pair(secrets[0]), zmq.CURVE_SERVERKEY: server, zmq.SNDTIMEO: 0}


def make_keys(folder: Path, client: str = "") -> list[Path]:
    """Make the keys of a server where there are none, and those of a client.

    Returns:
        The two files that the client needs; none without a client.

    Raises:
        UsageError: `client` is no name, or has keys already.
        EnvironmentProblem: The folder is not this user's alone, or cannot be written to.
    """
    clients = private_folder(private_folder(folder) / "clients")
    try:
        if client and (Path(client).name != client or (clients / f"{client}.key").exists()):
            known = f"{shorten(client)!r} has keys in {clients} already, or is no name there"
            raise UsageError(known)
        if not (folder / "server.key_secret").exists():
            _make_pair(folder, "server", "key", "key_secret")
        if client:
            _make_pair(clients, client, "key_secret", "key")
    except OSError as error:
        raise EnvironmentProblem(f"no keys in {folder}: {error.strerror}") from None
    return [folder / "server.key", clients / f"{client}.key_secret"] if client else []


def _make_pair(folder: Path, name: str, *kinds: str) -> None:
    """Make two files, whole or not at all: the last of `kinds` says that they are there."""
    with TemporaryDirectory(dir=folder) as half:
        create_certificates(half, name)
        Path(half, f"{name}.key_secret").chmod(0o600)  # until now, the folder kept others away
        for kind in kinds:
            Path(half, f"{name}.{kind}").replace(folder / f"{name}.{kind}")


def private_folder(folder: Path) -> Path:
    """Return a folder, made if it is not there.

    Raises:
        EnvironmentProblem: It is not this user's alone: what lies there could be anybody's.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        info = folder.lstat()
    except OSError as error:
        raise EnvironmentProblem(f"no folder {folder}: {error.strerror}") from None
    mine = stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid()
    if not mine or info.st_mode & 0o077:
        raise EnvironmentProblem(f"{folder} has to be a folder that only its owner, you, may enter")
    return folder


def _parse(address: str) -> tuple[str, Path]:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        needed = "tcp://HOST:PORT?keys=FOLDER is needed, nothing goes without keys"
        raise UsageError(f"{shorten(address)!r}: {needed}; see lrai runtime keys")
    host, port, folder = match.groups()
    if int(port) > _MOST_PORT:
        raise UsageError(f"port {port}: at most {_MOST_PORT} is possible")
    return f"tcp://{host or '127.0.0.1'}:{port}", Path(folder)


def _load(file: Path) -> tuple[bytes, bytes]:
    """Return the public and the secret key that a file holds, each empty where it holds none."""
    with suppress(OSError, ValueError, IndexError):  # the last of a line that was cut
        public, secret = load_certificate(file)
        return public, secret or b""
    return b"", b""


def _load_pair(file: Path) -> wire.Options:
    public, secret = _load(file)
    if not secret or file.stat().st_mode & 0o077:
        raise EnvironmentProblem(f"{file} has to hold a secret key, and others may not read it")
    return {**_TCP, zmq.CURVE_PUBLICKEY: public, zmq.CURVE_SECRETKEY: secret}
