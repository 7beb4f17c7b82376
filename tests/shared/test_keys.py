from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
import zmq
from zmq.auth import load_certificate

import lrai_core as lrai
from lrai_shared.client import Attached
from lrai_shared.keys import client_end, make_keys, server_end


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def machine(keys: Path, tmp_path: Path) -> Path:
    """Return the folder of a client that has got its two files."""
    folder = tmp_path / "machine"
    folder.mkdir()
    for file in make_keys(keys, "ann"):
        shutil.copy(file, folder)
    return folder


def config(roots: str) -> lrai.LraiConfig:
    return lrai.load_config(call={"runtime.model_roots": roots})


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_secret_is_nobody_elses(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        files = make_keys(tmp_path / "keys", "ann")
    finally:
        os.umask(before)
    keys = tmp_path / "keys"
    assert files == [keys / "server.key", keys / "clients" / "ann.key_secret"]
    assert {mode(keys), mode(keys / "clients")} == {0o700}
    secrets = [keys / "server.key_secret", keys / "clients" / "ann.key_secret"]
    assert {mode(secret) for secret in secrets} == {0o600}
    for secret in secrets:
        public = secret.with_suffix(".key")
        assert load_certificate(public) == (load_certificate(secret)[0], None)
        assert b"secret-key" not in public.read_bytes()


def test_keys_are_made_once_and_no_client_gets_those_of_another(keys: Path) -> None:
    server = (keys / "server.key_secret").read_bytes()
    first, second = make_keys(keys, "ann")[1], make_keys(keys, "b.o-b_2")[1]
    assert first.read_bytes() != second.read_bytes()
    before = first.read_bytes()
    first.rename(first.with_name("moved"))  # to the client's machine
    with pytest.raises(lrai.UsageError, match="'ann' has keys"):
        make_keys(keys, "ann")
    assert first.with_name("moved").read_bytes() == before
    assert make_keys(keys) == []
    assert (keys / "server.key_secret").read_bytes() == server


def test_a_full_disk_leaves_no_half_of_a_pair_that_is_taken_for_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path | str, name: str) -> None:
        Path(folder, f"{name}.key").write_text("public")
        Path(folder, f"{name}.key_secret").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    keys = tmp_path / "keys"
    for client in ("", "ann"):
        with monkeypatch.context() as patch:
            patch.setattr("lrai_shared.keys.create_certificates", full)
            with pytest.raises(lrai.EnvironmentProblem, match="No space left"):
                make_keys(keys, client)
        assert not list(keys.rglob(f"{client or 'server'}*"))
        for file in make_keys(keys, client) or [keys / "server.key", keys / "server.key_secret"]:
            assert load_certificate(file)[0]


@pytest.mark.parametrize("name", ["../ann", "a/b", "/ann", "clients/", "."])
def test_a_client_has_a_name_and_no_path(keys: Path, name: str) -> None:
    before = set(keys.rglob("*"))
    with pytest.raises(lrai.UsageError, match="no name"):
        make_keys(keys, name)
    assert set(keys.rglob("*")) == before


def test_a_folder_that_others_may_enter_gets_no_keys(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(lrai.EnvironmentProblem, match="only its owner"):
        make_keys(tmp_path)
    with pytest.raises(lrai.EnvironmentProblem, match="no folder"):
        make_keys(tmp_path / "absent" / "keys")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "address",
    [
        "tcp://127.0.0.1:5000",
        "tcp://127.0.0.1:5000?keys=",
        "tcp://127.0.0.1?keys=/k",
        "tcp://127.0.0.1:0?keys=/k",
        "tcp://127.0.0.1:http?keys=/k",
        "tcp://a;b:5000?keys=/k",
        "tcp://user@host:5000?keys=/k",
        "TCP://127.0.0.1:5000?keys=/k",
        "http://127.0.0.1:5000?keys=/k",
        "ipc:///tmp/x?keys=/k",
        "inproc://x",
        "://",
        "tcp://",
        "tcp://h:5000?keys=/k\n",
    ],
)
def test_what_is_no_address_with_keys_is_refused_by_both_ends(address: str) -> None:
    for attempt in (
        lambda: Attached(lrai.load_config(), address),
        lambda: lrai.Runtime(address=address),
        lambda: server_end(address, config("/")),
    ):
        with pytest.raises(lrai.UsageError, match=r"tcp://HOST:PORT\?keys=FOLDER is needed"):
            attempt()


def test_a_port_that_no_machine_has_is_refused(keys: Path) -> None:
    with pytest.raises(lrai.UsageError, match="port 99999: at most 65535 is possible"):
        client_end(f"tcp://127.0.0.1:99999?keys={keys}")


def test_without_a_host_it_is_this_one(keys: Path, machine: Path) -> None:
    assert client_end(f"tcp://:5000?keys={machine}")[0] == "tcp://127.0.0.1:5000"
    assert client_end(f"tcp://far-1.example:5000?keys={machine}")[0] == "tcp://far-1.example:5000"
    assert server_end(f"tcp://:5000?keys={keys}", config("/"))[0] == "tcp://127.0.0.1:5000"
    assert server_end(f"tcp://*:5000?keys={keys}", config("/"))[0] == "tcp://*:5000"


def test_a_server_lets_nobody_in_where_nobody_asks_for_keys(keys: Path) -> None:
    _, folder, options = server_end(f"tcp://:5000?keys={keys}", config("/"))
    assert folder == keys
    assert options[zmq.CURVE_SERVER] == options[zmq.ZAP_ENFORCE_DOMAIN] == 1
    assert options[zmq.ZAP_DOMAIN]


@pytest.mark.parametrize("roots", ["", ":", "::", "models", "/models:models"])
def test_a_server_says_from_where_models_may_come(keys: Path, roots: str) -> None:
    with pytest.raises(lrai.UsageError, match=rf"model_roots is '{roots}'; .* from / on"):
        server_end(f"tcp://127.0.0.1:7000?keys={keys}", config(roots))


def test_nobody_can_fill_the_memory_with_a_frame(keys: Path) -> None:
    *_, options = server_end(f"tcp://127.0.0.1:7000?keys={keys}", config("/models:"))
    assert int(options[zmq.MAXMSGSIZE]) < 100 << 20


def test_a_client_needs_two_files_that_hold_keys(machine: Path) -> None:
    address = f"tcp://:5000?keys={machine}"
    secret, server = machine / "ann.key_secret", machine / "server.key"

    def fails(kind: type[lrai.LraiError], words: str) -> None:
        with pytest.raises(kind, match=words):
            Attached(lrai.load_config(), address)

    shutil.copy(secret, machine / "second.key_secret")
    fails(lrai.UsageError, "server.key and one NAME.key_secret")
    (machine / "second.key_secret").unlink()
    secret.chmod(0o640)
    fails(lrai.EnvironmentProblem, "others may not read it")
    secret.chmod(0o600)
    whole = secret.read_text()
    secret.write_text(server.read_text())  # a public key in place of the secret one
    fails(lrai.EnvironmentProblem, "has to hold a secret key")
    secret.write_text(whole.replace("secret-key = ", "secret-key = x"))
    fails(lrai.EnvironmentProblem, "Invalid argument")
    secret.write_text(whole)
    for rubbish in (b"\xff\x00", b"curve\n"):
        server.write_bytes(rubbish)
        fails(lrai.UsageError, "server.key and one NAME.key_secret")
    server.unlink()
    fails(lrai.UsageError, "server.key and one NAME.key_secret")
    with pytest.raises(lrai.UsageError, match=r"server\.key and one NAME"):
        client_end(f"tcp://:5000?keys={machine / 'absent'}")
