from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from lrai_core import EnvironmentProblem
from lrai_core.runtime.version import Freeze
from lrai_deployments.state import How, Record, Store

LABELS = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5, unique=True)
SHARE = st.floats(0, 1)


def record(*labels: str) -> Record:
    """Return a record in which the first version has every share."""
    made = Record()
    for label in reversed(labels):
        made = made.beside(How(version=label), 1.0)
    return replace(made, previous=How())


@given(LABELS, st.lists(SHARE, min_size=5, max_size=5))
def test_shares_add_up_to_one_whoever_comes_and_goes(
    labels: list[str], shares: list[float]
) -> None:
    made = record("first")
    for label, share in zip(labels, shares, strict=False):
        made = made.beside(How(version=label), share)
        assert made.shares[label] == share
        assert sum(made.shares.values()) == pytest.approx(1)
    for label in labels:
        made = made.without(label)
        assert made.shares.keys() == made.versions.keys()
        assert sum(made.shares.values()) == pytest.approx(1) or not made.serves
    assert list(made.versions) == ["first"]


def test_who_comes_beside_others_again_leaves_them_all_that_it_does_not_take() -> None:
    both = record("a").beside(How(version="b"), 0.25).beside(How(version="c"), 0.2)
    again = both.beside(How("int8", version="b"), 0.4)
    assert again.shares == pytest.approx({"a": 0.45, "c": 0.15, "b": 0.4})
    assert again.versions["b"].variant == "int8"


def test_another_stable_version_is_remembered_as_the_one_to_go_back_from() -> None:
    made = record("a", "b")
    assert made.stable == "a"
    assert made.shared_out({"a": 0.6, "b": 0.4}, {}).previous.version == ""
    assert made.shared_out({"a": 0.4, "b": 0.6}, {}).previous.version == "a"
    assert made.shared_out({"b": 1.0}, {"a": 0.5}).without("a").shadow == {}


def test_all_that_served_is_known_to_have_served() -> None:
    made = record("a-2")
    for label in "bcd":
        made = Record().beside(How(version=label), 1.0).follows(made)
    assert made.previous.version == "c"
    assert [made.was(label) for label in "abcde"] == [True, True, True, False, False]
    assert made.beside(How(version="e"), 0.9).was("d")


def test_who_overtakes_the_stable_version_is_one_to_go_back_from() -> None:
    both = record("a").beside(How(version="b"), 0.9)
    assert (both.stable, both.previous.version) == ("b", "a")
    assert record("a").beside(How(version="b"), 0.1).previous.version == ""


def test_what_was_written_is_read(tmp_path: Path) -> None:
    how = How("int8", {"delta": 0.5}, {"actor.replicas": 2}, "a", "/m.lrai")
    made = Record({"a": how}, {"a": 1.0}, {}, "a", how, Freeze("ann", "why", "2026-01-01"))
    store = Store(str(tmp_path / "state"))
    assert store.read() == ({}, True)
    store.write({"m": made})
    store.note(change="load", model="m\n")
    store.close()
    store = Store(str(tmp_path / "state"))
    assert store.read() == ({"m": made}, False)
    store.write({}, stopped=True)
    assert store.read() == ({}, True)
    store.note(change="unload", model="m")
    files = list((tmp_path / "state").iterdir())
    assert {file.name for file in files} == {"deployments.json", "audit.jsonl", "state.lock"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    lines = (tmp_path / "state" / "audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["model"] for line in lines] == ["m\n", "m"]
    assert all(json.loads(line)["when"].endswith("+00:00") for line in lines)


def test_what_an_earlier_release_wrote_is_read(tmp_path: Path) -> None:
    """It did not write down that what served before was left by a rollback."""
    store = Store(str(tmp_path / "state"))
    store.write({"m": replace(record("a"), left=True)})
    file = tmp_path / "state" / "deployments.json"
    kept = json.loads(file.read_text())
    assert kept["deployments"]["m"].pop("left")
    file.write_text(json.dumps(kept))
    assert store.read() == ({"m": record("a")}, False)


def test_one_runtime_at_a_time_keeps_its_state_in_a_folder(tmp_path: Path) -> None:
    first = Store(str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="holds the state of another runtime"):
        Store(str(tmp_path))
    first.note(model="m")
    (tmp_path / "audit.jsonl").rename(tmp_path / "audit.jsonl.1")  # as who rotates logs does
    with pytest.raises(EnvironmentProblem, match="holds the state of another runtime"):
        Store(str(tmp_path))
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(sleeps, pass_fds=[first._held]) as child:  # has it as a fork has
        try:
            first.close()
            Store(str(tmp_path)).close()
        finally:
            child.kill()


def test_a_line_that_was_cut_does_not_spoil_the_next(tmp_path: Path) -> None:
    store, log = Store(str(tmp_path)), tmp_path / "audit.jsonl"
    store.note(model="a")
    with log.open("ab") as stream:
        stream.write(b'{"model": "cut')  # as a kill or a full disk leaves it
    store.note(model="b")
    store.note(model="c")
    lines = log.read_text().splitlines()
    assert [json.loads(lines[at])["model"] for at in (0, 2, 3)] == ["a", "b", "c"]
    store.close()


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"a": 1}', b"\xff", b"[" * 100_000, b'{"stopped": 1}']
)
def test_a_file_that_cannot_be_read_is_told_of_and_kept_aside(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "deployments.json").write_bytes(content)
    store = Store(str(tmp_path))
    assert store.read() == ({}, True)
    store.close()
    (message,) = caplog.messages
    assert "cannot be read" in message
    assert (tmp_path / "deployments.corrupt").read_bytes() == content
    assert not (tmp_path / "deployments.json").exists()


def test_a_pipe_in_place_of_the_file_is_told_of_and_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(tmp_path / "deployments.json")
    store = Store(str(tmp_path))
    assert store.read() == ({}, True)
    store.close()
    assert "cannot be read (it is no file)" in caplog.text
    assert (tmp_path / "deployments.corrupt").is_fifo()


def full(_: int) -> None:
    """Be a disk on which nothing more can be written."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_change_that_cannot_be_written_down_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    store.write({"m": record("a")})
    there = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(EnvironmentProblem, match="the disk is full"):
            store.write({})
    assert store.read()[0] == {"m": record("a")}
    assert sorted(tmp_path.iterdir()) == there


@pytest.mark.parametrize("name", ["deployments.json", "audit.jsonl"])
def test_a_folder_in_place_of_a_file_is_told_of(tmp_path: Path, name: str) -> None:
    """As containers make one where what is to be mounted is not there."""
    store = Store(str(tmp_path))
    (tmp_path / name).mkdir()
    with pytest.raises(EnvironmentProblem, match=f"{name}: cannot be written: Is a directory"):
        store.write({}) if name == "deployments.json" else store.note(change="load")
    store.close()


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFSOCK])
def test_what_is_no_file_in_place_of_the_log_is_told_of(kind: int, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    os.mknod(tmp_path / "audit.jsonl", kind | 0o600)
    with pytest.raises(EnvironmentProblem, match=r"audit\.jsonl: cannot be written: it is no file"):
        store.note(change="load")
    store.close()


def test_what_was_stopped_on_a_full_disk_is_not_served_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    store.write({"m": record("a")})
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(EnvironmentProblem, match="the disk is full"):
        store.write({}, stopped=True)
    assert store.read() == ({}, True)


def test_without_a_folder_nothing_is_kept() -> None:
    store = Store("")
    store.write({"m": record("a")})
    store.note(change="load")
    assert store.read() == ({}, True)
    store.close()
