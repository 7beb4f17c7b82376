"""A model that a host's process holds in a runtime; and what was built for one, kept by content."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import lrai_core as lrai
from lrai_import.built import artifact_of, state_folder
from lrai_import.held import Held, lock_folder, when_gone
from lrai_import.hosted import asked
from tests.core import small_artifact
from tests.core.compiler.onnx_files import with_external_data
from tests.own_runtime import daemon_pids, own_runtime
from tests.tiny_models import token_model

ROW = {"x": np.ones((1, 3), np.float32)}


@pytest.fixture
def artifact(tmp_path: Path) -> Iterator[lrai.Artifact]:
    with own_runtime():
        yield lrai.Artifact.open(small_artifact.build(tmp_path / "small.lrai"))


def answers(held: Held) -> bool:
    try:
        held.runtime.infer(lrai.InferenceRequest(model_name=held.name, inputs=ROW))
    except lrai.ModelNotFound:
        return False
    return True


def test_a_lock_that_was_deleted_by_its_age_takes_no_model_from_who_came_later(
    artifact: lrai.Artifact, tmp_path: Path
) -> None:
    first = Held(artifact, asked({}), "m")
    folder = lrai.load_config().runtime.socket_dir
    (lock,) = Path(folder).glob("*/held/*.held")
    lock.unlink()
    second = Held(artifact, asked({}), "m")
    first.close()
    assert answers(second)
    second.close()
    with lrai.Runtime() as runtime:
        assert runtime.models() == []


_HOLDS = """
import os, sys
from lrai_core import Artifact
from lrai_import.held import Held
from lrai_import.hosted import asked
Held(Artifact.open(sys.argv[1]), asked({}), "former")
os._exit(0)
"""


@pytest.mark.parametrize("asked_for", [True, False])
def test_what_the_next_runtime_serves_on_ends_where_no_host_asks_for_it(
    artifact: lrai.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, asked_for: bool
) -> None:
    """As in a container that is started anew, with its state on a volume."""
    monkeypatch.setenv("LRAI_RUNTIME_STATE_DIR", str(tmp_path / "state"))
    subprocess.run([sys.executable, "-P", "-c", _HOLDS, str(artifact.path)], check=True)
    sockets = Path(lrai.load_config().runtime.socket_dir)
    (pid,) = daemon_pids(sockets)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not daemon_pids(sockets))
    shutil.rmtree(sockets / f"lrai-{os.geteuid()}")
    with lrai.Runtime() as runtime:
        assert [one.name for one in runtime.models()] == ["former"]
    helds = [Held(artifact, asked({}), name) for name in ["former"] * asked_for + ["m"]]
    names = {one.name for one in helds[-1].runtime.models()}
    assert names == ({"former", "m"} if asked_for else {"m"})
    for held in helds:
        held.close()


def test_who_cannot_write_beside_the_record_has_its_model_all_the_same(
    artifact: lrai.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRAI_RUNTIME_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "held").touch()  # where the folder would be
    held, killed = (Held(artifact, asked({}), name) for name in ("m", "killed"))
    assert {one.name for one in held.runtime.models()} == {"m", "killed"}
    assert killed._lock is not None
    killed._lock.close()  # as where its process was
    Held(artifact, asked({}), "n").close()
    assert {one.name for one in held.runtime.models()} == {"m"}
    killed.close()
    held.close()


def test_what_the_runtime_has_unloaded_is_loaded_again(artifact: lrai.Artifact) -> None:
    held = Held(artifact, asked({}), "m")
    held.runtime.unload("m")
    assert not answers(held)
    held.load_again()
    deadline = time.monotonic() + 30
    while not answers(held):
        held.load_again()  # while it is under way, that is all
        assert time.monotonic() < deadline
        time.sleep(0.02)
    held.close()


def test_what_a_link_led_to_is_loaded_again_though_it_was_moved(
    artifact: lrai.Artifact, tmp_path: Path
) -> None:
    """As releases do, whose workers are started anew later."""
    link = tmp_path / "current"
    link.symlink_to(tmp_path)
    held = Held(lrai.Artifact.open(link / artifact.path.name), asked({}))
    (newer := tmp_path / "newer").mkdir()
    small_artifact.build(newer / artifact.path.name, factor=5.0)
    link.unlink()
    link.symlink_to(newer)
    held.runtime.unload(held.name)
    held._load()
    assert answers(held)
    held.close()


def test_where_no_thread_can_be_started_who_asks_next_has_it_loaded_again(
    artifact: lrai.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(artifact, asked({}), "m")
    held.runtime.unload("m")

    def refused(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("lrai_import.held.threading.Thread.start", refused)
        held.load_again()
    assert not answers(held)
    held.load_again()
    wait_until(lambda: answers(held))
    held.close()


def test_what_is_gone_is_loaded_again_for_who_asks_it(artifact: lrai.Artifact) -> None:
    held = Held(artifact, asked({}), "m")
    held.runtime.unload("m")
    request = lrai.InferenceRequest(model_name="m", inputs=ROW)
    with pytest.raises(lrai.NotReady, match="had unloaded the model, which is loaded again"):
        held.infer(request)
    deadline = time.monotonic() + 30
    while not answers(held):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert held.infer(request).outputs
    held.close()


def test_what_is_gone_is_loaded_again_where_its_state_is_asked_for(artifact: lrai.Artifact) -> None:
    held = Held(artifact, asked({}), "m")
    assert held.kept_state() in {"ok", "idle"}
    held.runtime.unload("m")
    assert held.state() == "dead"
    assert held.kept_state() == "stalled"
    assert state_after_loading(held) in {"ok", "idle"}
    aside = artifact.path.rename(artifact.path.with_suffix(".aside"))
    held.runtime.unload("m")
    assert held.kept_state() in {"stalled", "dead"}  # where it is tried at once, it may have failed
    assert state_after_loading(held) == "dead"
    aside.rename(artifact.path)
    deadline = time.monotonic() + 30
    while held.kept_state() not in {"ok", "idle"}:  # it is tried again
        assert time.monotonic() < deadline
        time.sleep(0.02)
    held.close()


@pytest.mark.parametrize("address", ["auto", "embedded"])
def test_what_was_given_up_is_loaded_again_where_its_state_is_asked_for(
    artifact: lrai.Artifact, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("LRAI_ACTOR_RESTART_LIMIT", "1")
    held = Held(artifact, asked({"runtime.address": address}), "m")

    def lost(count: int) -> bool:
        return held.runtime.stats().get("actor_lost") == count

    for deaths in (1, 2):  # which is one too many
        (pid,) = held.runtime.models()[0].actor_pids
        os.kill(pid, signal.SIGKILL)
        wait_until(partial(lost, deaths))
        wait_until(lambda: held.state() in {"idle", "dead"})
    assert held.state() == "dead"
    assert held.kept_state() == "stalled"
    assert state_after_loading(held) in {"ok", "idle"}
    assert answers(held)
    held.close()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_settings_that_the_shared_runtime_does_not_have_are_named(
    artifact: lrai.Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = asked({"limits.nan_policy": "reject", "limits.request_rows": "9", "variant": "fp32"})
    own = asked({"actor.threads": 1, "runtime.address": "embedded", "limits.request_rows": 9})
    Held(artifact, wanted, "m").close()  # which starts it
    Held(artifact, own, "m").close()
    assert "keeps what it was started with" not in caplog.text
    others = {"limits.nan_policy": "pass", "limits.request_rows": 9, "actor.threads": 2}
    Held(artifact, asked(others), "m").close()
    told = "limits.nan_policy: the shared runtime keeps what it was started with"
    assert [text.startswith(told) for text in caplog.messages if "keeps" in text] == [True]


def test_folders_that_are_named_from_here_are_those_that_the_runtime_has(
    artifact: lrai.Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    here = {"runtime.state_dir": "state", "runtime.model_roots": ".:more/"}
    for _ in range(2):  # of which the first one starts it
        Held(artifact, asked(here), "m").close()
    assert "keeps what it was started with" not in caplog.text
    Held(artifact, asked(here | {"runtime.state_dir": "elsewhere"}), "m").close()
    assert "runtime.state_dir: the shared runtime keeps" in caplog.text


def state_after_loading(held: Held) -> str:
    deadline = time.monotonic() + 30
    while (state := held.kept_state()) == "stalled":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return state


def test_who_asks_for_a_model_inline_of_a_shared_runtime_is_refused(
    artifact: lrai.Artifact,
) -> None:
    with pytest.raises(lrai.LraiError, match="inline"):
        Held(artifact, asked({"actor.isolation": "inline"}))


def test_in_a_process_of_its_own_a_model_leaves_what_others_keep_alone(
    artifact: lrai.Artifact, tmp_path: Path
) -> None:
    settings = asked({"runtime.state_dir": str(tmp_path / "state")})
    helds = [Held(artifact, settings.in_process(), name) for name in ("m", "n")]
    assert all(map(answers, helds))
    for held in helds:
        held.close()


def test_what_was_built_is_built_again_where_a_part_of_it_is_gone(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source = token_model(tmp_path / "source" / "model.onnx")
    config = lrai.load_config(call={"runtime.socket_dir": str(tmp_path)})
    built = artifact_of(source, config)
    assert artifact_of(source, config).sha256 == built.sha256
    (only,) = state_folder(config).glob("*.lrai")
    next((only / "source").iterdir()).unlink()
    left = only.with_name(f".{only.name}.0badcafe")  # by a build that was killed
    left.mkdir()
    assert artifact_of(source, config).path == built.path
    lrai.Artifact.open(only)
    assert not left.exists()


def test_other_weights_in_a_file_of_their_own_are_another_model(tmp_path: Path) -> None:
    """Where an image gives all files one time, and a graph is as large as before."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "w.bin").write_bytes(np.ones(32, np.float32).tobytes())
    source = with_external_data(tmp_path / "source" / "model.onnx", "w.bin")
    config = lrai.load_config(call={"runtime.socket_dir": str(tmp_path)})
    found = []
    for _ in range(2):
        os.utime(tmp_path / "source" / "w.bin", (0, 0))
        found.append(artifact_of(source, config).sha256)
        (tmp_path / "source" / "w.bin").write_bytes(np.zeros(32, np.float32).tobytes())
    assert found[0] != found[1]


@pytest.mark.usefixtures("no_temporary_folder")
def test_without_a_temporary_folder_the_setting_to_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(lrai.EnvironmentProblem, match=r"runtime\.state_dir: No usable"):
        state_folder(lrai.load_config(environ={}))
    own = lrai.load_config(environ={}, call={"runtime.state_dir": str(tmp_path)})
    assert state_folder(own) == tmp_path / "built"
    own = lrai.load_config(environ={}, call={"runtime.address": str(tmp_path)})
    assert lock_folder(own) == tmp_path / "held"


def test_a_link_where_the_folder_for_state_should_be_is_none(tmp_path: Path) -> None:
    """Whoever made it could have it lead elsewhere later."""
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / f"lrai-{os.geteuid()}").symlink_to(tmp_path / "mine")
    config = lrai.load_config(environ={}, call={"runtime.socket_dir": str(tmp_path)})
    with pytest.raises(lrai.EnvironmentProblem, match="this user's alone"):
        state_folder(config)


def test_what_nobody_has_any_more_is_closed_by_a_thread_of_its_own() -> None:
    class Owner:
        pass

    closed = queue.Queue[int]()
    owner = Owner()
    when_gone(owner, lambda: closed.put(threading.get_ident()))
    del owner
    assert closed.get(timeout=10) != threading.get_ident()


def test_what_was_replaced_is_not_loaded_under_the_name_of_what_was_there(
    artifact: lrai.Artifact, tmp_path: Path
) -> None:
    held = Held(artifact, asked({}), "m")
    held.runtime.unload("m")
    shutil.rmtree(artifact.path)
    small_artifact.build(tmp_path / "small.lrai", factor=3.0)
    with pytest.raises(lrai.ArtifactError, match="was replaced"):
        held._load()
    assert not answers(held)
    held.close()
