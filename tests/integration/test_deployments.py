"""Versions that change while requests run: real actors, real signals, a ledger of requests."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import lrai_core as lrai
from lrai_deployments.deployments import Deployments
from lrai_deployments.routing import Route
from lrai_deployments.running import memory_bytes
from lrai_deployments.state import How
from tests.core import small_artifact
from tests.integration.test_cli import run
from tests.integration.test_runtime_faults import Load, config, kill, pid_of, wait_until
from tests.pause import pause

pytestmark = pytest.mark.server

ONES = {"x": np.ones((1, 3), np.float32)}
STRANGE_ACTOR = """
import os, sys
from pathlib import Path
from lrai_core.actor import actor
from lrai_core.errors import EngineError

class Strange:
    def __init__(self, session):
        self._session = session

    def run(self, arrays, outputs):
        if how.read_text() == "die":
            os.kill(os.getpid(), 9)
        if how.read_text() == "well":
            return self._session.run(arrays, outputs)
        raise EngineError("out of memory")

def load(self, message):
    strange = how.exists()  # before it says that it is ready
    ordinary(self, message)
    if strange:
        self._sessions = [Strange(self._sessions[0])]

how, ordinary = Path(__file__).with_name("how"), actor.Actor._load
actor.Actor._load = load
actor.main(sys.argv[1:])
"""

SEEING_ACTOR = """
import os, sys
from lrai_core.actor import actor

class Seeing:
    def load(self, *_, **__):
        self.device = float(os.environ["CUDA_VISIBLE_DEVICES"])  # as CUDA looks, once
        return self

    def run(self, arrays, outputs=None):
        return [arrays[0] * 0 + self.device]

actor.find_engine = lambda name: Seeing()
actor.main(sys.argv[1:])
"""


def patient(**values: Any) -> lrai.LraiConfig:
    """Return a configuration in which an actor that is stopped for a while does not hang."""
    return config(**{"actor.hang_seconds": 60} | values)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Return artifacts that multiply by their key."""
    folder = tmp_path_factory.mktemp("small")
    return {
        times: small_artifact.build(folder / f"times-{times:g}.lrai", factor=times)
        for times in (2.0, 3.0, 4.0, 5.0)
    }


@pytest.fixture
def strange(tmp_path: Path) -> tuple[str, Callable[[str], None]]:
    """Return an interpreter, and what makes actors that it starts `die`, `refuse` or do `well`."""

    def become(how: str) -> None:
        (tmp_path / "how").write_text(how)

    return interpreter(tmp_path, STRANGE_ACTOR), become


def interpreter(folder: Path, actor: str) -> str:
    """Return an interpreter that runs this in an actor's place."""
    (folder / "actor.py").write_text(actor)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nshift 3\nexec {sys.executable} -P {folder}/actor.py "$@"\n')
    python.chmod(0o700)
    return str(python)


@contextmanager
def under_load(runtime: lrai.Runtime, callers: int) -> Iterator[Load]:
    load = Load(runtime, "m", [ONES], callers)
    try:
        yield load
    finally:
        load.stop()


def version(path: Path) -> str:
    return lrai.Artifact.open(path).version


def deployments(runtime: lrai.Runtime) -> Deployments:
    assert isinstance(runtime._backend, Deployments)
    return runtime._backend


def ask(runtime: lrai.Runtime, **more: Any) -> float:
    given: dict[str, Any] = {"model_name": "m", "inputs": ONES}
    return float(runtime.infer(lrai.InferenceRequest(**(given | more))).outputs["y"][0, 0])


def test_requests_under_way_while_versions_change_are_all_answered(
    small: dict[float, Path],
) -> None:
    with lrai.Runtime.open(small[2.0], name="m", config=config()) as runtime:
        with under_load(runtime, callers=8) as load:
            for times in (3.0, 2.0):
                time.sleep(0.3)
                swapped = runtime.swap("m", small[times])
                (model,) = runtime.models()
                assert model.version == swapped == version(small[times])
                assert runtime.ready() in ("ok", "idle")
            time.sleep(0.3)
        ledger = load.ledger
    assert not ledger.refused
    assert ledger.sent == len(ledger.answered)
    assert {float(outputs["y"][0, 0]) for _, outputs in ledger.answered} == {2.0, 3.0}


def test_what_the_old_version_has_accepted_is_answered_by_it(small: dict[float, Path]) -> None:
    with lrai.Runtime.open(small[2.0], name="m", config=patient()) as runtime:
        actor = pid_of(runtime, "m")
        pause(actor)
        ids = [runtime.submit(lrai.InferenceRequest(model_name="m", inputs=ONES)) for _ in range(9)]
        swap = threading.Thread(target=runtime.swap, args=("m", small[3.0]))
        swap.start()
        wait_until(lambda: len(runtime.models()) == 1 and pid_of(runtime, "m") != actor)
        assert ask(runtime) == 3.0
        assert swap.is_alive()
        kill(actor, signal.SIGCONT)
        assert {float(runtime.result(i).outputs["y"][0, 0]) for i in ids} == {2.0}
        swap.join(60)
        wait_until(lambda: not Path(f"/proc/{actor}").exists())


@pytest.mark.parametrize("share", [None, 0.5])
@pytest.mark.parametrize("kept", [5, 0])
@pytest.mark.parametrize("how", ["die", "refuse"])
def test_a_version_that_fails_its_warm_up_is_not_switched_to_and_has_no_share(
    how: str,
    kept: int,
    share: float | None,
    small: dict[float, Path],
    strange: tuple[str, Callable[[str], None]],
    tmp_path: Path,
) -> None:
    """Without kept rows, too: only that a made-up one is no valid input says nothing of it."""
    rows = small_artifact.rows(kept) if kept else None
    new = small_artifact.build(tmp_path / "n.lrai", factor=3.0, evaluation=rows)
    python, become = strange
    with lrai.Runtime.open(
        small[2.0], name="m", config=config(**{"actor.python": python})
    ) as runtime:
        before = runtime.models()[0].actor_pids
        canary = partial(runtime.load, name="m", share=share)
        change = canary if share else partial(runtime.swap, "m")
        become(how)
        words = {"die": r"(lost an actor|could not be answered)", "refuse": "out of memory"}
        with under_load(runtime, callers=2) as load:
            with pytest.raises(lrai.ConditionNotMet, match=f"warming up m@.*{words[how]}"):
                change(new)
            (model,) = runtime.models()
            assert (model.version, model.actor_pids) == (version(small[2.0]), before)
        assert runtime.deployments()[0].shares == {version(small[2.0]): 1.0}
        assert not load.ledger.refused
        assert {float(o["y"][0, 0]) for _, o in load.ledger.answered} == {2.0}


def test_a_warm_up_runs_every_size_that_was_measured_and_may_be_called(
    small: dict[float, Path], tmp_path: Path
) -> None:
    new, heard = small_artifact.build(tmp_path / "n.lrai", factor=3.0), list[lrai.Event]()
    manifest = json.loads((new / "manifest.json").read_text())
    for variant in manifest["variants"]:
        (point,) = variant["latency"]
        variant["latency"] = [point | {"rows": rows} for rows in (1, 3, 16, 17, 64)]
    small_artifact.rewrite(new, {"variants": manifest["variants"]})
    settings = config(**{"scheduler.max_batch_rows": 16})
    with lrai.Runtime(settings, observers=[heard.append]) as runtime:
        runtime.load(small[2.0], name="m")
        swapped = runtime.swap("m", new)
        wait_until(lambda: any(e.attributes.get("change") == "swap" for e in heard))
    calls = [e for e in heard if e.kind == "batch_dispatched"]
    assert [(e.model, e.attributes["rows"]) for e in calls] == [
        (f"m@{swapped}", rows) for rows in (1, 3, 16)
    ]


def test_a_version_whose_artifact_was_replaced_is_not_gone_back_to(
    small: dict[float, Path], tmp_path: Path
) -> None:
    path = small_artifact.build(tmp_path / "m.lrai", factor=4.0)
    with lrai.Runtime.open(path, name="m", config=config()) as runtime:
        runtime.swap("m", small[3.0])
        shutil.rmtree(path)
        small_artifact.build(path, factor=5.0)
        with pytest.raises(lrai.ConditionNotMet, match="no longer holds"):
            runtime.rollback("m")
        assert ask(runtime) == 3.0


def test_a_link_that_leads_elsewhere_by_now_changes_nothing_of_what_was_loaded_by_it(
    small: dict[float, Path], tmp_path: Path
) -> None:
    """As releases do: `current` leads to the newest one."""
    link, moved = tmp_path / "current", str(tmp_path / "moved.lrai")
    link.symlink_to(small[2.0])
    state = tmp_path / "state" / "deployments.json"
    with lrai.Runtime(config(**{"runtime.state_dir": str(state.parent)})) as runtime:
        runtime.load(link, name="m")
        link.unlink()
        link.symlink_to(small[3.0])
        kill(pid_of(runtime, "m"))
        assert ask(runtime) == 2.0
        runtime.swap("m", link)
        assert ask(runtime) == 3.0
        assert runtime.rollback("m") == version(small[2.0])
        assert runtime.deployments()[0].artifact == str(small[2.0])
        runtime.unload("m")
        link.unlink()
        link.symlink_to(shutil.copytree(small[4.0], moved))
        runtime.load(link, name="n")
        kept = state.read_bytes()
    state.write_bytes(kept)  # as a kill leaves it
    link.unlink()
    link.symlink_to(small[4.0])
    shutil.rmtree(moved)
    with lrai.Runtime(config(**{"runtime.state_dir": str(state.parent)})) as runtime:
        deployments(runtime).restore()
        assert ask(runtime, model_name="n") == 4.0


def test_a_version_that_does_not_meet_its_requirements_is_not_switched_to(
    small: dict[float, Path], tmp_path: Path
) -> None:
    broken = small_artifact.build(tmp_path / "broken.lrai", factor=3.0)
    model = broken / "variants/int8/model.onnx"
    model.write_bytes(bytes(model.stat().st_size))
    with lrai.Runtime.open(small[2.0], name="m", config=config()) as runtime:
        with pytest.raises(lrai.ConditionNotMet, match="no certificate"):
            runtime.swap("m", small[3.0], require={"delta": 0.5})
        with pytest.raises(lrai.ArtifactError):
            runtime.swap("m", broken)
        with pytest.raises(lrai.ModelNotFound):
            runtime.swap("n", small[3.0])
        assert [model.version for model in runtime.models()] == [version(small[2.0])]
        assert ask(runtime) == 2.0


def test_of_two_changes_of_a_name_at_once_one_is_refused(
    small: dict[float, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused, go_on = list[str](), threading.Event()

    def swap(times: float) -> None:
        try:
            runtime.swap("m", small[times])
        except lrai.UsageError as error:
            refused.append(str(error))
            go_on.set()

    # The first one is under way until there was a second one.
    monkeypatch.setattr("lrai_deployments.deployments.warm_up", lambda *_: go_on.wait(60))
    with lrai.Runtime.open(small[2.0], name="m", config=config()) as runtime:
        threads = [threading.Thread(target=swap, args=(times,)) for times in (3.0, 4.0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert refused == ["another change of 'm' is under way"]
        assert len(runtime.models()) == 1
        assert ask(runtime) in (3.0, 4.0)


def test_who_starts_anew_with_what_was_replaced_is_served_by_what_replaced_it(
    folder: Path, small: dict[float, Path]
) -> None:
    with lrai.Runtime.open(small[2.0], name="m", address="auto") as runtime:
        runtime.swap("m", small[3.0])
        with lrai.Runtime.open(small[2.0], name="m", address="auto") as worker:
            assert ask(worker) == 3.0
        with pytest.raises(lrai.UsageError, match="loaded already"):
            runtime.load(small[4.0], name="m")
        with pytest.raises(lrai.ConditionNotMet, match="no certificate"):
            runtime.load(small[2.0], name="m", require={"tier": "STATISTICAL", "epsilon": 1e-9})
        runtime.swap("m", small[4.0])
        for earlier in (2.0, 3.0):
            with lrai.Runtime.open(small[earlier], name="m", address="auto") as worker:
                assert ask(worker) == 4.0


def test_a_version_goes_back_to_the_one_before(small: dict[float, Path]) -> None:
    with lrai.Runtime.open(small[2.0], name="m", config=config()) as runtime:
        with pytest.raises(lrai.ConditionNotMet, match="no version to go back to"):
            runtime.rollback("m")
        runtime.swap("m", small[3.0])
        assert ask(runtime) == 3.0
        assert runtime.rollback("m") == version(small[2.0])
        assert ask(runtime) == 2.0
        (deployment,) = runtime.deployments()
        assert deployment.shares == {version(small[2.0]): 1.0}
        assert deployment.previous == version(small[3.0])


def test_a_version_goes_back_to_one_that_has_not_its_new_output(
    small: dict[float, Path], tmp_path: Path
) -> None:
    more = small_artifact.build(tmp_path / "more.lrai", factor=3.0, more_outputs=("z",))
    with lrai.Runtime.open(small[2.0], name="m", config=config()) as runtime:
        runtime.swap("m", more)
        with pytest.raises(lrai.ConditionNotMet, match=r"lacks outputs of what serves, .z.;"):
            runtime.swap("m", small[4.0])
        assert runtime.rollback("m") == version(small[2.0])
        assert ask(runtime) == 2.0


def test_what_goes_back_while_there_is_a_canary_is_the_canary(small: dict[float, Path]) -> None:
    two, three = version(small[2.0]), version(small[3.0])
    with lrai.Runtime.open(small[2.0], name="m", config=config()) as runtime:
        runtime.load(small[3.0], name="m", share=0.25)
        assert runtime.rollback("m") == two
        assert {ask(runtime) for _ in range(30)} == {2.0}
        for three_has in (0.75, 0.4):  # up, and down again
            runtime.route("m", {two: 1 - three_has, three: three_has})
        assert runtime.rollback("m") == two
        runtime.route("m", {three: 1.0})
        runtime.route("m", {two: 0.1, three: 0.9})  # the one that was loaded first is the canary
        assert runtime.rollback("m") == three
        runtime.route("m", {two: 0.1, three: 0.9})
        runtime.unload("m", two)
        assert runtime.rollback("m") == two, "what served before, when only one serves"


@pytest.mark.parametrize("away", [True, False])
def test_what_an_unloaded_canary_has_accepted_is_answered_by_it(
    small: dict[float, Path], *, away: bool
) -> None:
    """Also one that requests were routed away from, as it is done before."""
    three = version(small[3.0])
    with lrai.Runtime.open(small[2.0], name="m", config=patient()) as runtime:
        runtime.load(small[3.0], name="m", share=0.5)
        (actor,) = [pid for m in runtime.models() if m.version == three for pid in m.actor_pids]
        pause(actor)
        asked = lrai.InferenceRequest(model_name="m", model_version=three, inputs=ONES)
        ids = [runtime.submit(asked) for _ in range(9)]
        if away:
            runtime.route("m", {version(small[2.0]): 1.0})
        unload = threading.Thread(target=runtime.unload, args=("m", three))
        unload.start()
        wait_until(lambda: len(runtime.models()) == 1)
        assert ask(runtime) == 2.0
        kill(actor, signal.SIGCONT)
        assert {float(runtime.result(i).outputs["y"][0, 0]) for i in ids} == {3.0}
        unload.join(60)
        assert not unload.is_alive()


@pytest.mark.parametrize("share", [None, 0.6])
def test_what_a_model_has_accepted_is_answered_before_it_is_unloaded(
    small: dict[float, Path], share: float | None
) -> None:
    """Where that is asked for; who comes meanwhile is told that it is not loaded."""
    two = version(small[2.0])
    with lrai.Runtime.open(small[2.0], name="m", config=patient()) as runtime:
        if share is not None:
            runtime.load(small[3.0], name="m", share=share)
        (actor,) = [pid for m in runtime.models() if m.version == two for pid in m.actor_pids]
        pause(actor)
        asked = lrai.InferenceRequest(model_name="m", model_version=two, inputs=ONES)
        ids = [runtime.submit(asked) for _ in range(9)]
        unload = threading.Thread(target=runtime.unload, args=("m",), kwargs={"drain": True})
        unload.start()
        wait_until(lambda: runtime.models() == [])
        with pytest.raises(lrai.ModelNotFound):
            ask(runtime)
        assert runtime.ready() == "idle", "others would be asked nothing meanwhile"
        assert unload.is_alive()
        kill(actor, signal.SIGCONT)
        assert {float(runtime.result(i).outputs["y"][0, 0]) for i in ids} == {2.0}
        unload.join(60)
        assert not unload.is_alive()


def test_what_lies_on_a_mount_that_is_gone_keeps_nobody_from_starting(
    small: dict[float, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its share is kept for it, and whoever does not want it any more unloads it."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    there = {"m": str(small[2.0]), "gone": str(small[3.0])}
    how = {"variant": "", "require": None, "settings": None}
    kept = {
        name: {
            "versions": {label: {**how, "version": label, "artifact": path}},
            "shares": {label: 1},
        }
        for name, path in there.items()
        for label in [version(Path(path))]
    }
    told = json.dumps({"stopped": False, "deployments": kept})
    (state / "deployments.json").write_text(told)
    reopen = Deployments._reopen

    def stale(self: Deployments, how: Any) -> lrai.Artifact:
        if how.artifact == there["gone"]:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return reopen(self, how)

    monkeypatch.setattr(Deployments, "_reopen", stale)
    with lrai.Runtime(config(**{"runtime.state_dir": str(state)})) as runtime:
        deployments(runtime).restore(lambda: False)  # as a daemon does
        assert ask(runtime, model_name="m") == 2.0
        assert [one.name for one in runtime.deployments()] == ["m", "gone"]
        runtime.unload("gone")
        assert [one.name for one in runtime.deployments()] == ["m"]
        with pytest.raises(lrai.ModelNotFound):
            runtime.unload("gone")


def test_a_canary_is_held_to_what_the_version_beside_it_is(small: dict[float, Path]) -> None:
    with lrai.Runtime(config()) as runtime:
        runtime.load(small[2.0], name="m", settings={"scheduler.max_batch_rows": 3})
        runtime.load(small[3.0], name="m", share=0.5)
        (record,) = deployments(runtime)._records.values()
        kept = {how.settings["scheduler.max_batch_rows"] for how in record.versions.values()}  # type: ignore[index]
        assert kept == {3}


def test_requests_are_shared_out_as_the_shares_say(small: dict[float, Path]) -> None:
    two, three = version(small[2.0]), version(small[3.0])
    with lrai.Runtime.open(small[2.0], name="m", config=config()) as runtime:
        with pytest.raises(lrai.UsageError, match=r"loaded already: swap replaces it"):
            runtime.load(small[3.0], name="m")
        runtime.load(small[3.0], name="m", share=0.25)
        assert runtime.deployments()[0].shares == {two: 0.75, three: 0.25}
        count = 400
        threes = sum(ask(runtime) == 3.0 for _ in range(count))
        assert abs(threes - count / 4) < 4 * (count * 0.25 * 0.75) ** 0.5
        assert ask(runtime, model_version=two) == 2.0
        assert ask(runtime, model_version=three) == 3.0
        runtime.route("m", {three: 1})
        assert {ask(runtime) for _ in range(20)} == {3.0}
        assert ask(runtime, model_name="", model_version=two) == 2.0
        assert runtime.rollback("m") == two
        assert {ask(runtime) for _ in range(20)} == {2.0}
        with pytest.raises(lrai.UsageError, match="answers for 'm': route requests elsewhere"):
            runtime.unload("m", two)
        runtime.unload("m", three)
        with pytest.raises(lrai.ModelNotFound, match=f"has version {two}"):
            ask(runtime, model_version=three)


@pytest.mark.parametrize(
    ("shares", "shadow", "error"),
    [
        ({"two": 0.9}, {}, "the shares add up to 0.9, 1 is needed"),
        ({"two": 1.5}, {}, "from 0 to 1"),
        ({"two": "all"}, {}, "from 0 to 1"),
        ({"two": 1.0, "other": 0.0}, {}, "has versions .*, not 'other'"),
        ({"two": 1.0}, {"other": 0.5}, "not 'other'"),
    ],
)
def test_shares_are_checked(
    small: dict[float, Path], shares: dict[str, Any], shadow: dict[str, float], error: str
) -> None:
    two = version(small[2.0])
    with lrai.Runtime.open(small[2.0], name="m", config=config()) as runtime:
        given = {two if label == "two" else label: share for label, share in shares.items()}
        with pytest.raises(lrai.LraiError, match=error):
            runtime.route("m", given, shadow)
        assert runtime.deployments()[0].shares == {two: 1.0}


def test_copies_go_to_the_shadow_and_are_compared_and_never_returned(
    small: dict[float, Path], strange: tuple[str, Callable[[str], None]]
) -> None:
    heard, python = list[lrai.Event](), strange[0]
    three, count = version(small[3.0]), 40
    runtime = lrai.Runtime(patient(**{"actor.python": python}), observers=[heard.append])
    with runtime:
        runtime.load(small[2.0], name="m")
        runtime.load(small[3.0], name="m", share=0)
        with pytest.raises(lrai.UsageError, match="2 versions are shadows, at most one may be"):
            runtime.route("m", {three: 1.0}, shadow={three: 0.5, version(small[2.0]): 0.5})
        runtime.route("m", {version(small[2.0]): 1}, shadow={three: 1})
        assert {ask(runtime) for _ in range(count)} == {2.0}
        wait_until(lambda: [e.kind for e in heard].count("shadow_compared") == count)
        assert runtime.stats()["shadow_compared"] == count
        told = [e.attributes for e in heard if e.kind == "shadow_compared"]
        assert told == [{"version": three, "difference": 1.0}] * count
        wait_until(lambda: runtime.stats()["shadow_differs"] == count)  # that it differs comes last
        shadow = next(m.actor_pids[0] for m in runtime.models() if m.version == three)
        pause(shadow)  # nobody waits for a shadow
        started = time.monotonic()
        assert {ask(runtime) for _ in range(600)} == {2.0}  # more than copies may wait
        assert time.monotonic() - started < 50  # one that waited would for a minute
        assert runtime.stats()["outstanding_rows"] <= 512
        kill(shadow, signal.SIGCONT)


def test_a_shadow_that_fails_is_counted_and_harms_nobody(
    small: dict[float, Path], strange: tuple[str, Callable[[str], None]]
) -> None:
    python, become = strange
    with lrai.Runtime.open(
        small[2.0], name="m", config=config(**{"actor.python": python})
    ) as runtime:
        become("well")
        runtime.load(small[3.0], name="m", share=0)
        runtime.route("m", {version(small[2.0]): 1}, shadow={version(small[3.0]): 1})
        become("refuse")
        assert {ask(runtime) for _ in range(20)} == {2.0}
        wait_until(lambda: runtime.stats().get("shadow_failed") == 20)
        assert runtime.deployments()[0].frozen is None


def test_a_canary_that_fails_is_taken_back_and_the_deployment_frozen(
    small: dict[float, Path], strange: tuple[str, Callable[[str], None]], tmp_path: Path
) -> None:
    python, become = strange
    settings = {"actor.python": python, "runtime.state_dir": str(tmp_path / "state")}
    failed = 0
    with lrai.Runtime.open(small[2.0], name="m", config=config(**settings)) as runtime:
        become("well")
        runtime.load(small[3.0], name="m", share=0.25)
        ask(runtime, model_version=version(small[2.0]))
        # Once that was written, however slow the disk: who judges canaries waits for it.
        wait_until((tmp_path / "state/traffic/m/sketch.json").is_file)
        become("refuse")
        for _ in range(600):
            try:
                assert ask(runtime) == 2.0
            except lrai.ActorError:
                failed += 1
        assert 20 <= failed < 100  # of some 150, had nobody stopped it
        wait_until(lambda: runtime.deployments()[0].frozen is not None)  # once that is written
        (deployment,) = runtime.deployments()
        assert deployment.shares == {version(small[2.0]): 1.0, version(small[3.0]): 0.0}
        assert deployment.frozen is not None
        assert deployment.frozen.by == "canary guard"
        assert re.search(rf"{version(small[3.0])} failed \d+ of", deployment.frozen.reason)
        with pytest.raises(lrai.ConditionNotMet, match="frozen by canary guard"):
            runtime.swap("m", small[4.0])
    with lrai.Runtime(config(**settings)) as runtime:
        with pytest.raises(lrai.ConditionNotMet, match="frozen by canary guard"):
            runtime.load(small[4.0], name="m")
        runtime.unfreeze("m", "ann", "it was the disk")
    lines = [json.loads(x) for x in (tmp_path / "state/audit.jsonl").read_text().splitlines()]
    assert [line["change"] for line in lines] == ["load", "load", "canary_failed", "unfreeze"]
    assert (lines[-1]["by"], lines[-1]["reason"]) == ("ann", "it was the disk")


def test_a_name_whose_start_takes_long_keeps_no_other_canary_in_place(
    small: dict[float, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    two, three, go_on = version(small[2.0]), version(small[3.0]), threading.Event()
    with lrai.Runtime(config()) as runtime:
        core = deployments(runtime)
        monkeypatch.setattr(core, "_fall_back", lambda _: go_on.wait(60))
        for name in ("m", "n", "o"):
            runtime.load(small[2.0], name=name)
            runtime.load(small[3.0], name=name, share=0.25)
        runtime.swap("o", small[4.0])
        core.lost("o")
        with core.changing("m"):  # as while another version of it starts
            for name in ("m", "n"):
                core.submit(core.give_up, core._routes[name], core.find(name, three), "it failed")
            frozen = {"m": False, "n": True, "o": False}
            wait_until(lambda: {d.name: bool(d.frozen) for d in runtime.deployments()} == frozen)
            assert {ask(runtime) for _ in range(30)} == {2.0}
        wait_until(lambda: runtime.deployments()[0].frozen is not None)
        assert runtime.deployments()[0].shares == {two: 1.0, three: 0.0}
        go_on.set()


def test_a_frozen_deployment_serves_on_and_does_not_change(small: dict[float, Path]) -> None:
    with lrai.Runtime.open(small[2.0], name="m", config=config()) as runtime:
        with pytest.raises(lrai.UsageError, match="a name and a reason are needed"):
            runtime.freeze("m", "ann", " ")
        runtime.freeze("m", "ann", "audit week")
        changes: list[Callable[[], object]] = [
            lambda: runtime.swap("m", small[3.0]),
            lambda: runtime.load(small[3.0], name="m", share=0.5),
            lambda: runtime.route("m", {version(small[2.0]): 1}),
            lambda: runtime.rollback("m"),
            lambda: runtime.unload("m"),
            lambda: runtime.freeze("m", "bob", "me too"),
        ]
        for change in changes:
            with pytest.raises(lrai.ConditionNotMet, match=r"frozen by ann at 20.*: audit week"):
                change()
        assert ask(runtime) == 2.0
        runtime.unfreeze("m", "ann", "it is over")
        with pytest.raises(lrai.UsageError, match="no model 'm' is frozen"):
            runtime.unfreeze("m", "ann", "it is over")
        runtime.swap("m", small[3.0])
        assert ask(runtime) == 3.0


@pytest.fixture
def folder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Return the folder of a daemon, which is stopped in the end."""
    parent = tmp_path_factory.mktemp("s")
    monkeypatch.setenv("LRAI_RUNTIME_SOCKET_DIR", str(parent))
    monkeypatch.setenv("LRAI_ACTOR_THREADS", "1")
    folder = parent / f"lrai-{os.geteuid()}"
    yield folder
    run("runtime", "stop", code=0)


def daemon_of(runtime: lrai.Runtime) -> int:
    status = Path(f"/proc/{runtime.models()[0].actor_pids[0]}/stat").read_text()
    return int(status.rpartition(")")[2].split()[1])


def test_what_a_killed_daemon_served_the_next_one_serves_and_keeps_frozen(
    folder: Path, small: dict[float, Path]
) -> None:
    two, three = version(small[2.0]), version(small[3.0])
    with lrai.Runtime.open(small[4.0], address="auto", name="m") as runtime:
        runtime.swap("m", small[2.0])
        runtime.load(small[3.0], name="m", share=0.5)
        runtime.route("m", {two: 0.75, three: 0.25}, shadow={three: 0.5})
        runtime.freeze("m", "ann", "audit week")
        before = runtime.deployments()
        pids = {pid for model in runtime.models() for pid in model.actor_pids}
        kill(daemon_of(runtime))
        assert {ask(runtime) for _ in range(60)} == {2.0, 3.0}
        assert runtime.deployments() == before
        assert before[0].previous == version(small[4.0])
        assert not pids & {pid for model in runtime.models() for pid in model.actor_pids}
        assert stat.S_IMODE((folder / "deployments.json").stat().st_mode) == 0o600
        assert stat.S_IMODE((folder / "audit.jsonl").stat().st_mode) == 0o600
    run("runtime", "stop", code=0)
    run("runtime", "start", code=0)
    with lrai.Runtime(address="auto") as runtime:
        assert runtime.models() == []
        assert "frozen by ann" in run("runtime", "load", small[4.0], "--name", "m", code=3)
        assert runtime.load(small[2.0], name="m") == "m"  # as it was when it was frozen
        assert "by ann: audit week" in run("runtime", "deployments", code=0)
        run("unfreeze", "m", "--by", "bob", "--reason", "it is over", code=0)
        run("freeze", "m", "--by", "bob", "--reason", "it is not", code=0)
        run("runtime", "swap", "m", small[3.0], code=3)
        run("runtime", "unfreeze", "m", "--by", "bob", "--reason", "it is now", code=0)
        assert three in run("runtime", "swap", "m", small[3.0], code=0)
        assert two in run("runtime", "rollback", "m", code=0)
        run("runtime", "load", small[3.0], "--name", "m", "--share", "0", code=0)
        run("runtime", "route", "m", f"{two}=0.5", f"{three}=.5", "--shadow", f"{two}=1", code=0)
        run("runtime", "route", "m", two, code=2)
        assert runtime.deployments()[0].shares == {two: 0.5, three: 0.5}
        run("runtime", "unload", "m", "--version", two, code=0)
        assert runtime.deployments()[0].shares == {three: 1.0}
    lines = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
    changes = [line["change"] for line in lines]
    assert changes[:6] == ["load", "swap", "load", "route", "freeze", "restore"]
    assert changes[6:12] == ["load", "unfreeze", "freeze", "unfreeze", "swap", "rollback"]
    assert all(line["when"].endswith("+00:00") and line["by"] for line in lines)


@pytest.mark.usefixtures("folder")
def test_versions_that_change_in_a_shared_runtime_lose_and_mix_nothing_under_a_steady_load(
    small: dict[float, Path],
) -> None:
    order = [2.0, 3.0, 5.0, 2.0]
    asked, over = list[Future[lrai.InferenceResponse]](), threading.Event()

    def load() -> None:
        due = time.monotonic()
        while not over.is_set():
            number = len(asked) + 1
            inputs = {"x": np.array([[number] * 3, [-number] * 3], np.float32)}
            asked.append(runtime.start(lrai.InferenceRequest(model_name="m", inputs=inputs)))
            due += 0.005
            time.sleep(max(0.0, due - time.monotonic()))

    def go_on() -> None:
        known = len(asked)
        wait_until(lambda: len(asked) > known + 40)

    with lrai.Runtime.open(small[order[0]], address="auto", name="m") as runtime:
        caller = threading.Thread(target=load)
        caller.start()
        try:
            for times in order[1:]:
                go_on()
                runtime.swap("m", small[times])
            go_on()
        finally:
            over.set()
            caller.join()
        answers = [future.result(30) for future in asked]
    factors = {version(small[times]): times for times in order}
    by = [factors[answer.model_version] for answer in answers]
    assert [times for times, _ in itertools.groupby(by)] == order, "each after the one before"
    for number, (times, answer) in enumerate(zip(by, answers, strict=True), 1):
        assert answer.outputs["y"].tolist() == [[number * times] * 3, [-number * times] * 3]


def test_what_was_used_longest_ago_makes_room(
    small: dict[float, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(pids: Sequence[int]) -> int:  # how much they share depends on who else runs
        assert all(memory_bytes([pid]) > 1 << 20 for pid in pids)
        return len(pids) * 100 << 20

    monkeypatch.setattr("lrai_deployments.running.memory_bytes", counted)
    budget = 250  # MiB, for two of them
    with lrai.Runtime(patient(**{"runtime.memory_mib": budget})) as runtime:
        for name, times in (("a", 2.0), ("b", 3.0)):
            runtime.load(small[times], name=name)
        ask(runtime, model_name="a")
        runtime.load(small[4.0], name="c")
        assert {model.name for model in runtime.models()} == {"a", "c"}
        actor = pid_of(runtime, "a")
        pause(actor)
        identity = runtime.submit(lrai.InferenceRequest(model_name="a", inputs=ONES))
        runtime.freeze("c", "ann", "it is needed")
        with pytest.raises(lrai.MemoryBudgetExceeded, match=rf"needs .* of {budget} MiB") as full:
            runtime.load(small[5.0], name="d")
        assert full.value.http_status == 507
        runtime.unfreeze("c", "ann", "not any more")
        runtime.load(small[5.0], name="d")  # in place of c: a was used before, but is at work
        kill(actor, signal.SIGCONT)
        assert runtime.result(identity).outputs["y"][0, 0] == 2.0
        assert {model.name for model in runtime.models()} == {"a", "d"}
        assert [deployment.name for deployment in runtime.deployments()] == ["a", "d"]
        with pytest.raises(lrai.MemoryBudgetExceeded):  # of what answers nobody yet
            runtime.load(small[3.0], name="d", share=0.0)
        assert {model.name for model in runtime.models()} == {"a", "d"}


def test_what_can_make_no_room_for_it_costs_nobody_its_place(
    small: dict[float, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrai_deployments.running.memory_bytes", lambda pids: len(pids) * 100 << 20)
    with lrai.Runtime(patient(**{"runtime.memory_mib": 350})) as runtime:
        for name, times in (("idle", 2.0), ("kept", 3.0), ("busy", 4.0)):
            runtime.load(small[times], name=name)
        runtime.freeze("kept", "ann", "it is needed")
        actor = pid_of(runtime, "busy")
        pause(actor)
        runtime.submit(lrai.InferenceRequest(model_name="busy", inputs=ONES))
        monkeypatch.setattr(
            "lrai_deployments.running.memory_bytes", lambda pids: len(pids) * 200 << 20
        )
        with pytest.raises(lrai.MemoryBudgetExceeded):
            runtime.load(small[5.0], name="more")
        assert {model.name for model in runtime.models()} == {"idle", "kept", "busy"}
        kill(actor, signal.SIGCONT)


def test_who_shares_the_requests_of_a_name_makes_no_room(
    small: dict[float, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a canary with a hundredth of the requests has all of them, and nothing to go back to."""
    monkeypatch.setattr("lrai_deployments.running.memory_bytes", lambda pids: len(pids) * 100 << 20)
    with lrai.Runtime(patient(**{"runtime.memory_mib": 350})) as runtime:
        runtime.load(small[2.0], name="m")
        runtime.load(small[3.0], name="m", share=0.25)
        runtime.load(small[4.0], name="n")
        runtime.load(small[5.0], name="o")  # in place of the one that was used since
        assert {model.name for model in runtime.models()} == {"m", "o"}
        assert runtime.rollback("m") == version(small[2.0])
        runtime.load(small[4.0], name="n")
        (stable,) = [model for model in runtime.models() if model.name == "m"]
        assert stable.version == version(small[2.0])


def test_a_name_that_made_room_is_served_as_before_for_who_loads_what_was_replaced(
    small: dict[float, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrai_deployments.running.memory_bytes", lambda pids: len(pids) * 100 << 20)
    state = tmp_path / "state" / "deployments.json"
    limits = config(**{"runtime.memory_mib": 250, "runtime.state_dir": str(state.parent)})
    with lrai.Runtime(limits) as runtime:
        runtime.load(small[2.0], name="m", settings={"scheduler.max_batch_rows": 3})
        runtime.swap("m", small[3.0])
        for name in ("n", "o"):
            runtime.load(small[4.0], name=name)
        (before,) = [one for one in runtime.deployments() if one.name == "m"]
        assert (before.shares, before.artifact) == ({version(small[3.0]): 1.0}, "")
        assert [one.name for one in runtime.deployments() if one.away] == ["m"]
        assert {model.name for model in runtime.models()} == {"n", "o"}
        with pytest.raises(lrai.ModelNotFound):
            ask(runtime)
        kept = state.read_bytes()
    state.write_bytes(kept)  # as a kill leaves it
    with lrai.Runtime(limits) as runtime:
        deployments(runtime).restore()
        assert runtime.stats()["actor_started"] == 2, "it is not started in the place of others"
        load = partial(deployments(runtime).load, name="m", shared=True)
        for asked in (2.0, 3.0):
            load(str(small[asked]), settings={"scheduler.max_batch_rows": 3})
            assert ask(runtime) == 3.0
            (now,) = [one for one in runtime.deployments() if one.name == "m"]
            assert (now.shares, now.previous) == (before.shares, version(small[2.0]))
            assert not now.away
            assert deployments(runtime).find("m").limits.max_batch_rows == 3
            for name in (f"p{asked}", f"q{asked}"):
                runtime.load(small[5.0], name=name)
        assert "m" not in {model.name for model in runtime.models()}
        load(str(small[3.0]), settings={"scheduler.max_batch_rows": 4})  # as it is wanted now
        assert ask(runtime) == 3.0
        assert runtime.rollback("m") == version(small[2.0])
        runtime.unload("m")
        assert "m" not in {one.name for one in runtime.deployments()}


def test_what_made_room_and_has_moved_is_kept_where_it_lies_now(
    small: dict[float, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrai_deployments.running.memory_bytes", lambda pids: len(pids) * 100 << 20)
    there = Path(shutil.copytree(small[3.0], tmp_path / "there.lrai"))
    state = tmp_path / "state" / "deployments.json"
    limits = config(**{"runtime.memory_mib": 250, "runtime.state_dir": str(state.parent)})
    with lrai.Runtime(limits) as runtime:
        runtime.load(small[2.0], name="m")
        runtime.swap("m", there)
        for name in ("n", "o"):
            runtime.load(small[4.0], name=name)
        moved = there.rename(tmp_path / "moved.lrai")
        runtime.load(moved, name="m")
        assert ask(runtime) == 3.0
        kept = state.read_bytes()
    state.write_bytes(kept)  # as a kill leaves it
    with lrai.Runtime(limits) as runtime:
        deployments(runtime).restore()
        assert ask(runtime) == 3.0
        assert runtime.rollback("m") == version(small[2.0])


def test_what_does_not_run_makes_room_for_good_with_what_does(
    small: dict[float, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrai_deployments.running.memory_bytes", lambda pids: len(pids) * 100 << 20)
    state = tmp_path / "state" / "deployments.json"
    with lrai.Runtime(config(**{"runtime.state_dir": str(state.parent)})) as runtime:
        runtime.load(small[2.0], name="m")
        runtime.swap("m", small[3.0])
        runtime.load(small[5.0], name="m", share=0.0)
        runtime.route("m", {version(small[3.0]): 1.0}, shadow={version(small[5.0]): 1.0})
        kept = state.read_bytes()
    state.write_bytes(kept)
    with lrai.Runtime(
        config(**{"runtime.memory_mib": 250, "runtime.state_dir": str(state.parent)})
    ) as runtime:
        core, reopen = deployments(runtime), deployments(runtime)._reopen

        def unreachable(how: How) -> Any:
            if how.version == version(small[5.0]):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return reopen(how)

        monkeypatch.setattr(core, "_reopen", unreachable)
        core.restore()
        assert ask(runtime) == 3.0
        for name in ("n", "o"):
            runtime.load(small[4.0], name=name)
        (now,) = [one for one in runtime.deployments() if one.name == "m"]
        assert now.away
        assert (now.shares, now.shadow) == ({version(small[3.0]): 1.0}, {})


def test_where_what_made_room_cannot_be_started_what_is_asked_for_serves(
    small: dict[float, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrai_deployments.running.memory_bytes", lambda pids: len(pids) * 100 << 20)
    with lrai.Runtime(config(**{"runtime.memory_mib": 250})) as runtime:
        runtime.load(small[2.0], name="m")
        runtime.swap("m", small[3.0])
        for name in ("n", "o"):
            runtime.load(small[4.0], name=name)
        core, add = deployments(runtime), deployments(runtime).add

        def refused(opened: lrai.Artifact, *arguments: Any, **more: Any) -> Any:
            if opened.version == version(small[3.0]):
                raise lrai.ConditionNotMet("made for another engine version")
            return add(opened, *arguments, **more)

        monkeypatch.setattr(core, "add", refused)
        core.load(str(small[2.0]), name="m", shared=True)
        assert ask(runtime) == 2.0


@pytest.mark.parametrize("becomes", [None, 5.0])
def test_where_what_made_room_is_lost_what_is_asked_for_serves(
    small: dict[float, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, becomes: float | None
) -> None:
    monkeypatch.setattr("lrai_deployments.running.memory_bytes", lambda pids: len(pids) * 100 << 20)
    replaced = Path(shutil.copytree(small[3.0], tmp_path / "replaced.lrai"))
    with lrai.Runtime(config(**{"runtime.memory_mib": 250})) as runtime:
        runtime.load(small[2.0], name="m")
        runtime.swap("m", replaced)
        for name in ("n", "o"):
            runtime.load(small[4.0], name=name)
        shutil.rmtree(replaced)
        if becomes:
            shutil.copytree(small[becomes], replaced)
        deployments(runtime).load(str(small[2.0]), name="m", shared=True)
        assert ask(runtime) == 2.0
        (now,) = [one for one in runtime.deployments() if one.name == "m"]
        assert (now.shares, now.away) == ({version(small[2.0]): 1.0}, False)


def test_what_is_under_way_at_the_end_does_not_bring_back_what_has_ended(
    small: dict[float, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, under_way, ended = tmp_path / "state", threading.Event(), threading.Event()
    limits = config(**{"runtime.state_dir": str(state)})
    with lrai.Runtime.open(small[2.0], name="m", config=limits) as runtime:
        store = deployments(runtime)._store
        write = store.write

        def slow(records: Any, *, stopped: bool = False) -> None:
            if not stopped:
                under_way.set()
                ended.wait(1)  # which is to wait for this
            write(records, stopped=stopped)
            if stopped:
                ended.set()

        monkeypatch.setattr(store, "write", slow)
        route = partial(runtime.route, "m", {version(small[2.0]): 1.0})
        change = threading.Thread(target=route)
        change.start()
        assert under_way.wait(60)
    change.join(60)
    assert json.loads((state / "deployments.json").read_bytes())["stopped"]
    with lrai.Runtime(limits) as runtime:
        deployments(runtime).restore()
        assert runtime.models() == []


def test_artifacts_come_from_the_folders_that_are_allowed(
    small: dict[float, Path], tmp_path: Path
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    there = small_artifact.build(inside / "m.lrai")
    (inside / "link.lrai").symlink_to(small[3.0])
    (inside / "folder").symlink_to(small[3.0].parent)
    roots = {"runtime.model_roots": f":/nowhere:{inside}:"}  # of which the empty ones are none
    with lrai.Runtime.open(there, name="m", config=config(**roots)) as runtime:
        for path in (
            small[3.0],
            inside / "link.lrai",
            inside / "folder" / small[3.0].name,
            inside / ".." / ".." / small[3.0].parent.name / small[3.0].name,
            Path(f"{inside}-beside"),
        ):
            with pytest.raises(lrai.ConditionNotMet, match=r"runtime\.model_roots"):
                runtime.load(path, name="n")
            with pytest.raises(lrai.ConditionNotMet, match=r"runtime\.model_roots"):
                runtime.swap("m", path)
        for url in ("http://127.0.0.1:1/m.lrai", "file:///etc", "s3://bucket/m.lrai"):
            with pytest.raises(lrai.UsageError, match="nothing is fetched"):
                runtime.load(url)
        assert ask(runtime) == 2.0


def test_replicas_share_the_requests_and_the_cpus(small: dict[float, Path]) -> None:
    settings = {"actor.restart_limit": 1, "actor.restart_window_seconds": 60}
    with lrai.Runtime(config(**settings)) as runtime:
        runtime.load(small[2.0], name="m", settings={"actor.replicas": 2})
        (model,) = runtime.models()
        assert len(set(model.actor_pids)) == 2
        if len(os.sched_getaffinity(0)) > 1:
            first, second = (os.sched_getaffinity(pid) for pid in model.actor_pids)
            assert first
            assert second
            assert not first & second
        for lost in (1, 2):  # the second time it is given up
            kill(runtime.models()[0].actor_pids[0])
            wait_until(lambda lost=lost: runtime.stats().get("actor_lost", 0) == lost)  # type: ignore[misc]
            assert ask(runtime) == 2.0
            wait_until(lambda lost=lost: len(runtime.models()[0].actor_pids) == 2 or lost == 2)  # type: ignore[misc]
        wait_until(lambda: runtime.stats().get("model_failed") == 1)
        assert len(runtime.models()[0].actor_pids) == 1
        assert {ask(runtime) for _ in range(20)} == {2.0}
        assert runtime.ready() in ("ok", "idle")


def test_each_device_has_an_actor_whose_engine_sees_no_other(
    small: dict[float, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrai_core.scheduler.scheduler.available_cpus", lambda: 2)  # for both calls
    own = {"actor.devices": "3, 5", "actor.threads": 1, "scheduler.max_batch_rows": 1}
    python = interpreter(tmp_path, SEEING_ACTOR)
    with lrai.Runtime(config(**{"actor.python": python})) as runtime:
        runtime.load(small[2.0], name="m", settings=own)
        request = lrai.InferenceRequest(model_name="m", inputs=ONES)

        def answers() -> set[float]:
            asked = [runtime.start(request) for _ in range(20)]
            return {float(one.result().outputs["y"][0, 0]) for one in asked}

        wait_until(lambda: answers() == {3.0, 5.0})
        assert len(runtime.models()[0].actor_pids) == 2


def test_traffic_is_sketched_always_and_captured_where_that_was_asked_for(
    small: dict[float, Path], tmp_path: Path
) -> None:
    settings = {"runtime.capture_rows": 20}
    kept = tmp_path / "traffic"
    with (
        lrai.Runtime(config()) as runtime,
        pytest.raises(lrai.UsageError, match=r"capture_rows needs runtime\.state_dir"),
    ):
        runtime.load(small[3.0], name="n", settings=settings)
    state = config(**{"runtime.state_dir": str(tmp_path)})
    with lrai.Runtime.open(small[2.0], name="m", config=state) as runtime:
        runtime.load(small[3.0], name="a/b", settings=settings)
        for name in ("m", "a/b"):
            for _ in range(30):
                ask(runtime, model_name=name)
        runtime.unload("a/b")
        assert (kept / "a%2Fb" / "captured.npz").is_file()
    assert msgspec.json.decode((kept / "m" / "sketch.json").read_bytes())["requests"] == 30
    assert not (kept / "m" / "captured.npz").exists()
    with np.load(kept / "a%2Fb" / "captured.npz", allow_pickle=False) as captured:
        assert captured["x"].shape == (20, 3)


def test_under_pressure_a_cheaper_version_takes_what_would_be_late(
    small: dict[float, Path],
) -> None:
    room = patient(**{"scheduler.max_queue_rows": 20_000})
    with lrai.Runtime.open(small[2.0], name="m", config=room) as runtime:
        runtime.load(small[3.0], name="m", share=0.0)
        shares = {version(small[2.0]): 1.0}
        with pytest.raises(lrai.ModelNotFound):
            runtime.route("m", shares, relief="none")
        runtime.route("m", shares, relief=version(small[3.0]))
        assert {ask(runtime, timeout_ms=10_000) for _ in range(9)} == {2.0}
        two = version(small[2.0])
        (stopped,) = (pid for m in runtime.models() if m.version == two for pid in m.actor_pids)
        pause(stopped)
        asked = lrai.InferenceRequest(model_name="m", inputs=ONES, timeout_ms=600_000)
        waiting = [runtime.submit(asked) for _ in range(10_000)]  # of 1 ms each by the profile
        hurried = lrai.InferenceRequest(model_name="m", inputs=ONES, timeout_ms=9000)
        relieved = runtime.infer(hurried)
        assert float(relieved.outputs["y"][0, 0]) == 3.0
        assert relieved.model_version == version(small[3.0])
        kill(stopped, signal.SIGCONT)
        assert {float(runtime.result(i).outputs["y"][0, 0]) for i in waiting} == {2.0}
        (found,) = runtime.deployments()
        assert found.relief == version(small[3.0])
        runtime.unload("m", version(small[3.0]))
        assert runtime.deployments()[0].relief == ""


def test_a_deterministic_model_steps_to_no_other_version(small: dict[float, Path]) -> None:
    with lrai.Runtime(config()) as runtime:
        runtime.load(small[2.0], name="m", settings={"scheduler.deterministic": True})
        runtime.load(small[3.0], name="m", share=0.0)
        with pytest.raises(lrai.UsageError, match=r"scheduler\.deterministic never does"):
            runtime.route("m", {version(small[2.0]): 1.0}, relief=version(small[3.0]))


def test_a_version_that_cannot_be_written_off_serves_on(
    small: dict[float, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full once made every request for it spin for ever, and the runtime with it."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    limits = {"runtime.memory_mib": 10_000, "runtime.state_dir": str(tmp_path / "state")}
    with lrai.Runtime.open(small[2.0], name="m", config=config(**limits)) as runtime:
        deployments(runtime).config = lrai.load_config(call=limits | {"runtime.memory_mib": 1})
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            with pytest.raises(lrai.MemoryBudgetExceeded):
                runtime.load(small[3.0], name="n")
        assert ask(runtime) == 2.0


def test_a_change_is_undone_and_a_canary_given_up_where_no_file_can_be_opened(
    small: dict[float, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two, three, state = version(small[2.0]), version(small[3.0]), tmp_path / "state"

    def none_left(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    limits = config(**{"runtime.state_dir": str(state)})
    with lrai.Runtime.open(small[2.0], name="m", config=limits) as runtime:
        runtime.load(small[3.0], name="m", share=0.25)
        core, kept = deployments(runtime), (state / "deployments.json").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(core._store, "note", none_left)
            with pytest.raises(OSError, match="Too many open files"):
                runtime.route("m", {three: 1.0})
            assert (state / "deployments.json").read_bytes() == kept
            assert runtime.deployments()[0].shares == {two: 0.75, three: 0.25}
            patch.setattr(core._store, "write", none_left)
            core.give_up(core._routes["m"], core.find("m", three), "it failed")
            wait_until(lambda: runtime.deployments()[0].frozen is not None)
            assert runtime.deployments()[0].shares == {two: 1.0, three: 0.0}


def test_nobody_answers_copies_for_a_shadow_that_is_gone(small: dict[float, Path]) -> None:
    """The stable version once did, and agreed with itself."""
    two, three, ended = version(small[2.0]), version(small[3.0]), list[object]()
    told = ("shadow_failed", "shadow_compared")
    with lrai.Runtime.open(small[2.0], name="m", config=config()) as runtime:
        runtime.load(small[3.0], name="m", share=0.0)
        runtime.route("m", {two: 1.0}, shadow={three: 1.0})
        route = deployments(runtime)._routes["m"]  # which a request may still go by
        runtime.unload("m", three)
        route.accept(lrai.InferenceRequest(model_name="m", inputs=ONES), ended.append)
        wait_until(lambda: any(kind in runtime.stats() for kind in told))
        assert [kind for kind in told if kind in runtime.stats()] == ["shadow_failed"]


def assert_a_load_brings_back(
    runtime: lrai.Runtime, twice: Path, how: Path, *, shared: bool = True
) -> None:
    """Wait until `m` is dead, let its actors live, and have `twice` loaded under its name."""
    for _ in range(3):  # one that has answered before is given up after another request
        with pytest.raises(lrai.ActorError):
            ask(runtime)
    wait_until(lambda: runtime.models()[0].state == "dead")
    how.unlink()
    assert deployments(runtime).load(str(twice), name="m", shared=shared) == "m"
    assert ask(runtime) == 2.0


@pytest.mark.parametrize("shared", [True, False])
def test_who_loads_a_model_that_is_dead_has_it_started_anew(
    small: dict[float, Path],
    strange: tuple[str, Callable[[str], None]],
    tmp_path: Path,
    *,
    shared: bool,
) -> None:
    python, become = strange
    limits = {"actor.python": python, "actor.restart_limit": 1}
    become("die")
    with lrai.Runtime.open(small[2.0], name="m", config=config(**limits)) as runtime:
        assert_a_load_brings_back(runtime, small[2.0], tmp_path / "how", shared=shared)
        assert runtime.deployments()[0].previous == "", "it is not what served before itself"


def test_who_loads_what_was_replaced_by_what_is_dead_has_it_back(
    small: dict[float, Path], strange: tuple[str, Callable[[str], None]], tmp_path: Path
) -> None:
    python, become = strange
    limits = {"actor.python": python, "actor.restart_limit": 1}
    with lrai.Runtime.open(small[2.0], name="m", config=config(**limits)) as runtime:
        runtime.swap("m", small[3.0])
        become("die")
        kill(pid_of(runtime, "m"))
        assert_a_load_brings_back(runtime, small[2.0], tmp_path / "how")


def test_a_load_that_is_refused_leaves_a_dead_version_what_it_is(small: dict[float, Path]) -> None:
    """Callers are told to come again, and not that there is no such model."""
    three = small[3.0]
    with lrai.Runtime.open(
        small[2.0], name="m", config=config(**{"actor.restart_limit": 1})
    ) as runtime:
        kill_for_good(runtime, runtime.swap("m", three))
        with pytest.raises(lrai.UsageError, match="load it without a share"):
            runtime.load(three, name="m", share=0.5)
        runtime.freeze("m", "ann", "audit week")
        with pytest.raises(lrai.ConditionNotMet, match="frozen by ann"):
            runtime.load(small[2.0], name="m")
        assert [(m.version, m.state) for m in runtime.models()] == [(version(three), "dead")]
        assert runtime.ready() == "dead"
        with pytest.raises(lrai.ActorError):
            ask(runtime)
        runtime.load(three, name="m")
        assert ask(runtime) == 3.0


@contextmanager
def one_of_two_dead(
    small: dict[float, Path], strange: tuple[str, Callable[[str], None]], tmp_path: Path
) -> Iterator[lrai.Runtime]:
    """Yield a runtime in which the version with three quarters of the requests is given up."""
    python, become = strange
    limits = {"actor.python": python, "actor.restart_limit": 1}
    become("die")
    with lrai.Runtime.open(small[2.0], name="m", config=config(**limits)) as runtime:
        (tmp_path / "how").unlink()
        runtime.load(small[3.0], name="m", share=0.25)
        become("die")
        with pytest.raises(lrai.ActorError):
            ask(runtime, model_version=version(small[2.0]))
        wait_until(lambda: "dead" in {model.state for model in runtime.models()})
        (tmp_path / "how").unlink()
        yield runtime


def test_others_answer_for_a_version_that_is_dead(
    small: dict[float, Path], strange: tuple[str, Callable[[str], None]], tmp_path: Path
) -> None:
    with one_of_two_dead(small, strange, tmp_path) as runtime:
        assert {ask(runtime) for _ in range(50)} == {3.0}
        with pytest.raises(lrai.ActorError):
            ask(runtime, model_version=version(small[2.0]))


def kill_for_good(runtime: lrai.Runtime, label: str) -> None:
    """Kill the actors of a version until it is given up."""

    def dead() -> bool:
        (model,) = [model for model in runtime.models() if model.version == label]
        for pid in model.actor_pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return model.state == "dead"

    wait_until(dead)


def test_what_served_before_does_again_where_a_version_is_given_up(
    small: dict[float, Path],
) -> None:
    limits = config(**{"actor.restart_limit": 1})
    with lrai.Runtime.open(small[2.0], name="m", config=limits) as runtime:
        kill_for_good(runtime, runtime.swap("m", small[3.0]))
        with pytest.raises(lrai.ActorError):
            ask(runtime)
        wait_until(lambda: runtime.deployments()[0].frozen is not None)
        (now,) = runtime.deployments()
        assert now.frozen is not None
        assert (now.frozen.by, now.shares) == ("crash guard", {version(small[2.0]): 1.0})
        assert version(small[3.0]) in now.frozen.reason
        assert ask(runtime) == 2.0
        assert len(runtime.models()) == 1


def test_what_served_before_and_still_runs_is_not_started_again(small: dict[float, Path]) -> None:
    limits, two = config(**{"actor.restart_limit": 1}), version(small[2.0])
    with lrai.Runtime.open(small[2.0], name="m", config=limits) as runtime:
        runtime.load(small[3.0], name="m", share=0.5)
        runtime.route("m", {version(small[3.0]): 1.0})
        (before,) = [model.actor_pids for model in runtime.models() if model.version == two]
        kill_for_good(runtime, version(small[3.0]))
        with pytest.raises(lrai.ActorError):
            ask(runtime)
        wait_until(lambda: runtime.deployments()[0].frozen is not None)
        assert (ask(runtime), ask(runtime, model_version=two)) == (2.0, 2.0)
        (after,) = [model.actor_pids for model in runtime.models() if model.version == two]
        assert after == before


def test_a_version_that_gets_copies_of_no_request_is_no_shadow(small: dict[float, Path]) -> None:
    two, three, four = (version(small[times]) for times in (2.0, 3.0, 4.0))
    with lrai.Runtime.open(small[2.0], name="m", config=config()) as runtime:
        for times in (3.0, 4.0):
            runtime.load(small[times], name="m", share=0)
        runtime.route("m", {two: 1.0}, {three: 0.5})
        runtime.route("m", {two: 1.0}, {three: 0.0})
        assert runtime.deployments()[0].shadow == {}
        runtime.route("m", {two: 1.0}, {three: 0.0, four: 0.5})
        assert runtime.deployments()[0].shadow == {four: 0.5}
        with pytest.raises(lrai.ModelNotFound, match="not 'other'"):
            runtime.route("m", {two: 1.0}, {"other": 0.0})


@pytest.mark.parametrize("by_hand", [True, False])
def test_who_gets_copies_or_relieves_does_so_after_others_go_back(
    small: dict[float, Path], *, by_hand: bool
) -> None:
    two, three, four, five = (version(small[times]) for times in (2.0, 3.0, 4.0, 5.0))
    limits = config(**{"actor.restart_limit": 1})
    with lrai.Runtime.open(small[2.0], name="m", config=limits) as runtime:
        for times in (3.0, 4.0, 5.0):
            runtime.load(small[times], name="m", share=0)
        runtime.route("m", {three: 1.0}, {four: 0.5}, five)
        if by_hand:
            assert runtime.rollback("m") == two
        else:
            kill_for_good(runtime, three)
            with pytest.raises(lrai.ActorError):
                ask(runtime)
            wait_until(lambda: runtime.deployments()[0].frozen is not None)
        (now,) = runtime.deployments()
        assert (now.shares[two], now.shadow, now.relief) == (1.0, {four: 0.5}, five)
        if by_hand:  # to whom nobody goes back for these
            runtime.route("m", {two: 0.5, three: 0.5}, {three: 0.5}, three)
            assert runtime.rollback("m") == two
            (now,) = runtime.deployments()
            assert (now.shares[two], now.shadow, now.relief) == (1.0, {}, "")


def test_what_was_left_by_hand_does_not_come_back_by_itself(small: dict[float, Path]) -> None:
    limits = config(**{"actor.restart_limit": 1})
    with lrai.Runtime.open(small[2.0], name="m", config=limits) as runtime:
        runtime.swap("m", small[3.0])
        kill_for_good(runtime, runtime.rollback("m"))
        for _ in range(3):
            with pytest.raises(lrai.ActorError):
                ask(runtime)
        deployments(runtime)._changers.shutdown()  # which waits for whoever would bring it back
        (now,) = runtime.deployments()
        assert (now.frozen, now.shares) == (None, {version(small[2.0]): 1.0})


def test_after_a_rollback_what_served_before_a_later_version_comes_back(
    small: dict[float, Path],
) -> None:
    limits, two = config(**{"actor.restart_limit": 1}), version(small[2.0])
    with lrai.Runtime.open(small[2.0], name="m", config=limits) as runtime:
        runtime.swap("m", small[3.0])
        runtime.rollback("m")
        runtime.load(small[4.0], name="m", share=0.25)
        runtime.route("m", {version(small[4.0]): 1.0})
        kill_for_good(runtime, version(small[4.0]))
        with pytest.raises(lrai.ActorError):
            ask(runtime)
        wait_until(lambda: runtime.deployments()[0].frozen is not None)
        assert (ask(runtime), ask(runtime, model_version=two)) == (2.0, 2.0)


def test_what_was_left_by_hand_stays_so_for_the_next_runtime_and_who_loads_again(
    small: dict[float, Path], tmp_path: Path
) -> None:
    limits = config(**{"actor.restart_limit": 1, "runtime.state_dir": str(tmp_path / "state")})
    with lrai.Runtime.open(small[2.0], name="m", config=limits) as runtime:
        runtime.swap("m", small[3.0])
        runtime.rollback("m")
        deployments(runtime).keeps = True  # as if it had been killed
    with lrai.Runtime(limits) as runtime:
        core = deployments(runtime)
        core.restore()
        kill_for_good(runtime, version(small[2.0]))
        runtime.load(small[2.0], name="m")
        kill_for_good(runtime, version(small[2.0]))
        for _ in range(3):
            with pytest.raises(lrai.ActorError):
                ask(runtime)
        core._changers.shutdown()  # which waits for whoever would bring it back
        (now,) = runtime.deployments()
        assert (now.frozen, now.shares) == (None, {version(small[2.0]): 1.0})


def test_nothing_falls_back_to_what_is_no_longer_there(
    small: dict[float, Path], tmp_path: Path
) -> None:
    limits = config(**{"actor.restart_limit": 1})
    shutil.copytree(small[2.0], first := tmp_path / "first.lrai")
    with lrai.Runtime.open(first, name="m", config=limits) as runtime:
        kill_for_good(runtime, runtime.swap("m", small[3.0]))
        shutil.rmtree(first)
        core = deployments(runtime)
        for _ in range(3):
            with pytest.raises(lrai.ActorError):
                ask(runtime)
        core._changers.shutdown()  # who is asked to fall back has been
        (now,) = runtime.deployments()
        assert (now.frozen, now.shares) == (None, {version(small[3.0]): 1.0})
        runtime.load(small[3.0], name="m")  # by hand it goes on
        assert ask(runtime) == 3.0


def test_a_dead_version_takes_its_place_among_the_others_again(
    small: dict[float, Path], strange: tuple[str, Callable[[str], None]], tmp_path: Path
) -> None:
    with one_of_two_dead(small, strange, tmp_path) as runtime:
        shares = runtime.deployments()[0].shares
        assert deployments(runtime).load(str(small[2.0]), name="m", shared=True) == "m"
        assert ask(runtime, model_version=version(small[2.0])) == 2.0
        assert runtime.deployments()[0].shares == shares
        assert {ask(runtime) for _ in range(50)} == {2.0, 3.0}


def test_who_loads_what_is_dead_beside_others_needs_no_shared_runtime(
    small: dict[float, Path], strange: tuple[str, Callable[[str], None]], tmp_path: Path
) -> None:
    with one_of_two_dead(small, strange, tmp_path) as runtime:
        assert runtime.load(small[2.0], name="m") == "m"
        assert len(runtime.models()) == 2
        assert {ask(runtime) for _ in range(50)} == {2.0, 3.0}


def test_nobody_goes_back_to_a_version_that_is_dead(
    small: dict[float, Path], strange: tuple[str, Callable[[str], None]], tmp_path: Path
) -> None:
    with one_of_two_dead(small, strange, tmp_path) as runtime:
        runtime.route("m", {version(small[3.0]): 1.0})
        with pytest.raises(lrai.ConditionNotMet, match="does not run any more"):
            runtime.route("m", {version(small[2.0]): 1.0})
        runtime.rollback("m")  # which starts it anew
        assert ask(runtime) == 2.0


def test_an_artifact_of_other_inputs_does_not_take_the_requests_of_a_name(
    small: dict[float, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.lrai"
    shutil.copytree(small[3.0], other)
    signature = msgspec.json.decode((other / "manifest.json").read_bytes())["signature"]
    signature["inputs"][0]["name"] = "z"
    small_artifact.rewrite(other, {"signature": signature})
    with lrai.Runtime.open(small[2.0], name="m", config=config()) as runtime:
        changes: list[Callable[[], object]] = [
            lambda: runtime.swap("m", other),
            lambda: runtime.load(other, name="m", share=0.5),
        ]
        told = r"takes .z. FP32 \[-1, 3\], what serves takes .x. FP32 \[-1, 3\];"
        for change in changes:
            with pytest.raises(lrai.ConditionNotMet, match=told):
                change()
        assert [model.name for model in runtime.models()] == ["m"]


def test_what_can_never_fit_costs_nobody_its_place(small: dict[float, Path]) -> None:
    with lrai.Runtime.open(small[2.0], name="m", config=config()) as runtime:
        core = deployments(runtime)
        core.config = lrai.load_config(call={"runtime.memory_mib": 1_000})
        with pytest.raises(lrai.MemoryBudgetExceeded):
            core._make_room("huge", 5_000 << 20)
        assert ask(runtime) == 2.0


def test_a_frozen_name_takes_what_served_and_as_it_was_loaded(
    small: dict[float, Path], tmp_path: Path
) -> None:
    settings = {"runtime.state_dir": str(tmp_path)}
    with lrai.Runtime.open(small[2.0], name="m", config=config(**settings)) as runtime:
        runtime.load(small[3.0], name="m", share=0.25)
        runtime.route("m", {version(small[2.0]): 1.0})
        runtime.freeze("m", "ann", "audit week")
    with lrai.Runtime(config(**settings)) as runtime:
        for wrong, variant in ((small[3.0], ""), (small[2.0], "fp32")):
            with pytest.raises(lrai.ConditionNotMet, match="frozen by ann"):
                runtime.load(wrong, name="m", variant=variant)
        runtime.load(small[2.0], name="m")
        assert ask(runtime) == 2.0


def test_a_frozen_canary_stays_one_whoever_loads_first(
    small: dict[float, Path], tmp_path: Path
) -> None:
    settings = {"runtime.state_dir": str(tmp_path)}
    stable, canary = version(small[2.0]), version(small[3.0])
    shares = {stable: 0.75, canary: 0.25}
    with lrai.Runtime.open(small[2.0], name="m", config=config(**settings)) as runtime:
        runtime.load(small[3.0], name="m", share=0.25)
        runtime.freeze("m", "ann", "audit week")
    with lrai.Runtime(config(**settings)) as runtime:
        runtime.load(small[3.0], name="m")
        assert runtime.deployments()[0].shares == shares
        assert ask(runtime) == 3.0, "who is there answers"
        runtime.load(small[2.0], name="m")
        (found,) = runtime.deployments()
        assert found.shares == shares
        assert found.frozen is not None
        assert {ask(runtime) for _ in range(100)} == {2.0, 3.0}


def test_a_frozen_version_that_is_there_is_not_started_twice(
    small: dict[float, Path], tmp_path: Path
) -> None:
    with lrai.Runtime.open(small[2.0], name="m", config=config()) as runtime:
        runtime.freeze("m", "ann", "audit week")
        with pytest.raises(lrai.ConditionNotMet, match="frozen by ann"):
            runtime.load(small[2.0], name="m")
        assert len(runtime.models()) == 1
        assert ask(runtime) == 2.0


def test_a_frozen_version_that_is_away_keeps_its_share(
    small: dict[float, Path], tmp_path: Path
) -> None:
    settings = {"runtime.state_dir": str(tmp_path / "state")}
    away = Path(shutil.copytree(small[2.0], tmp_path / "away.lrai"))
    shares = {version(away): 0.75, version(small[3.0]): 0.25}
    with lrai.Runtime.open(away, name="m", config=config(**settings)) as runtime:
        runtime.load(small[3.0], name="m", share=0.25)
        runtime.freeze("m", "ann", "audit week")
        kept = (tmp_path / "state" / "deployments.json").read_bytes()
    (tmp_path / "state" / "deployments.json").write_bytes(kept)  # as after a kill
    shutil.rmtree(away)
    for _ in range(2):
        with lrai.Runtime(config(**settings)) as runtime:
            deployments(runtime).restore()
            assert runtime.deployments()[0].shares == shares
            assert ask(runtime) == 3.0
        (tmp_path / "state" / "deployments.json").write_bytes(kept)
    shutil.copytree(small[2.0], away)
    with lrai.Runtime(config(**settings)) as runtime:
        deployments(runtime).restore()
        assert {ask(runtime) for _ in range(100)} == {2.0, 3.0}


def test_a_name_that_is_away_is_kept_by_who_lets_it_be_changed(
    small: dict[float, Path], tmp_path: Path
) -> None:
    settings = {"runtime.state_dir": str(tmp_path / "state")}
    state, mount, off = tmp_path / "state" / "deployments.json", tmp_path / "m", tmp_path / "off"
    mount.mkdir()
    two, three = (Path(shutil.copytree(small[f], mount / f"{f:g}.lrai")) for f in (2.0, 3.0))
    with lrai.Runtime.open(two, name="m", config=config(**settings)) as runtime:
        runtime.swap("m", three)
        runtime.freeze("m", "ann", "audit week")
        kept = state.read_bytes()
    state.write_bytes(kept)  # as after a kill
    mount.rename(off)
    with lrai.Runtime(config(**settings)) as runtime:
        deployments(runtime).restore()
        runtime.unfreeze("m", "ann", "it is over")
        (found,) = runtime.deployments()
        assert (found.shares, found.previous) == (
            {version(off / "3.lrai"): 1.0},
            version(small[2.0]),
        )
        assert found.frozen is None
        kept = state.read_bytes()
    state.write_bytes(kept)
    off.rename(mount)
    with lrai.Runtime(config(**settings)) as runtime:
        deployments(runtime).restore()
        assert ask(runtime) == 3.0
        assert runtime.rollback("m") == version(two)


def test_a_share_is_given_to_what_comes_beside_others_and_nothing_else(
    small: dict[float, Path],
) -> None:
    with lrai.Runtime(config()) as runtime:
        with pytest.raises(lrai.UsageError, match="no version of 'm' serves"):
            runtime.load(small[2.0], name="m", share=0.05)
        with pytest.raises(lrai.UsageError, match="a share is a number from 0 to 1"):
            runtime.load(small[2.0], name="m", share=7)
        assert runtime.models() == []
        runtime.load(small[2.0], name="m")
        load = partial(deployments(runtime).load, str(small[3.0]), name="m", shared=True)
        load(share=0.25)
        load(share=0.25)
        with pytest.raises(lrai.UsageError, match=r"a share of 0.25: route changes that"):
            load(share=0.05)


def test_what_cannot_be_kept_costs_nobody_what_is(small: dict[float, Path], tmp_path: Path) -> None:
    settings = {"runtime.state_dir": str(tmp_path)}
    with lrai.Runtime.open(small[2.0], name="m", config=config(**settings)) as runtime:
        runtime.freeze("m", "ann", "audit week")
        wrong: Any = None
        with pytest.raises(lrai.UsageError, match="an argument is none that can be kept"):
            deployments(runtime).load(str(small[3.0]), name="n", variant=wrong)
        assert [one.name for one in runtime.models()] == ["m"]
    with lrai.Runtime(config(**settings)) as runtime:
        assert [one.name for one in runtime.deployments()] == ["m"]


def test_a_version_that_was_given_up_relieves_nobody(
    small: dict[float, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    two, three = version(small[2.0]), version(small[3.0])
    with lrai.Runtime.open(small[2.0], name="m", config=config()) as runtime:
        runtime.load(small[3.0], name="m", share=0.0)
        core = deployments(runtime)
        runtime.route("m", {two: 1.0}, relief=three)
        monkeypatch.setattr(Route, "_too_late", lambda *_: True)
        assert ask(runtime) == 3.0
        monkeypatch.setattr(core, "runs", lambda version: version.version != three)
        assert ask(runtime) == 2.0
        for more in ({"relief": three}, {"shadow": {three: 1.0}}):
            with pytest.raises(lrai.ConditionNotMet, match="does not run any more"):
                runtime.route("m", {two: 1.0}, **more)


def test_a_canary_of_a_frozen_name_is_taken_back_and_a_late_verdict_does_nothing(
    small: dict[float, Path], tmp_path: Path
) -> None:
    old, new = version(small[2.0]), version(small[3.0])
    settings = {"runtime.state_dir": str(tmp_path)}
    with lrai.Runtime.open(small[2.0], name="m", config=config(**settings)) as runtime:
        core = deployments(runtime)
        runtime.load(small[3.0], name="m", share=0.25)
        before, canary = core._routes["m"], core.find("m", new)
        runtime.route("m", {old: 0.4, new: 0.6})
        core.give_up(before, canary, "it failed when it was the canary")
        assert runtime.deployments()[0].shares == {old: 0.4, new: 0.6}
        runtime.freeze("m", "ann", "audit week")
        core.give_up(core._routes["m"], core.find("m", old), "it failed")
        core._changers.shutdown()
        (found,) = runtime.deployments()
        assert found.shares == {old: 0.0, new: 1.0}
        assert found.frozen is not None
        assert found.frozen.by == "ann"


def test_a_canary_that_is_taken_back_leaves_the_shadow_and_the_relief_of_another_version(
    small: dict[float, Path],
) -> None:
    two, three, four = (version(small[number]) for number in (2.0, 3.0, 4.0))
    with lrai.Runtime(config()) as runtime:
        core = deployments(runtime)
        for name, beside in (("another", four), ("its own", three)):
            runtime.load(small[2.0], name=name)
            runtime.load(small[3.0], name=name, share=0.25)
            runtime.load(small[4.0], name=name, share=0.0)
            shares = {two: 0.75, three: 0.25}
            runtime.route(name, shares, shadow={beside: 0.5}, relief=beside)
            core.give_up(core._routes[name], core.find(name, three), "it failed")
        core._changers.shutdown()
        another, own = sorted(runtime.deployments(), key=lambda one: one.name)
        assert another.shares == own.shares == {two: 1.0, three: 0.0, four: 0.0}
        assert (another.shadow, another.relief) == ({four: 0.5}, four)
        assert (own.shadow, own.relief) == ({}, "")


def test_a_version_that_could_not_start_for_now_keeps_its_share_of_what_was_kept(
    small: dict[float, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, add = version(small[2.0]), version(small[3.0]), Deployments.add
    state = tmp_path / "state"
    settings = {"runtime.state_dir": str(state)}
    with lrai.Runtime.open(small[2.0], name="m", config=config(**settings)) as runtime:
        runtime.load(small[3.0], name="m", share=0.25)
        left = (state / "deployments.json").read_bytes()
    (state / "deployments.json").write_bytes(left)  # as a kill would leave it

    def fails(self: Deployments, artifact: lrai.Artifact, *more: Any) -> Any:
        if artifact.version == old:
            raise lrai.EnvironmentProblem("the model was not loaded in time")
        return add(self, artifact, *more)

    monkeypatch.setattr(Deployments, "add", fails)
    with lrai.Runtime(config(**settings)) as runtime:
        deployments(runtime).restore()
        assert ask(runtime) == 3.0
        assert runtime.deployments()[0].shares == {old: 0.75, new: 0.25}
        kept = msgspec.json.decode((state / "deployments.json").read_bytes())
        assert kept["deployments"]["m"]["shares"] == {old: 0.75, new: 0.25}
        monkeypatch.setattr(Deployments, "add", add)
        with pytest.raises(lrai.UsageError, match="is loaded already"):
            runtime.load(small[2.0], name="m", settings={"actor.threads": 1})  # not as it was
        # Whoever wants it has it back, a worker of a host too.
        deployments(runtime).load(str(small[2.0]), name="m", shared=True)
        assert {ask(runtime) for _ in range(60)} == {2.0, 3.0}
        assert runtime.deployments()[0].shares == {old: 0.75, new: 0.25}


def test_a_signal_to_a_whole_service_that_meets_an_actor_at_its_start_loses_no_name(
    small: dict[float, Path], tmp_path: Path
) -> None:
    """As `systemctl stop` sends it while a runtime restores: an actor ignores it only later."""
    state, python = tmp_path / "state", tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -TERM $$\nsleep 60\n")
    python.chmod(0o700)
    settings = {"runtime.state_dir": str(state)}
    with lrai.Runtime.open(small[2.0], name="m", config=config(**settings)):
        left = (state / "deployments.json").read_bytes()
    (state / "deployments.json").write_bytes(left)  # as a kill would leave it
    with lrai.Runtime(config(**settings, **{"actor.python": str(python)})) as runtime:
        deployments(runtime).restore()
        assert runtime.models() == []
        assert (state / "deployments.json").read_bytes() == left


def test_what_serves_in_place_of_a_variant_is_what_its_next_worker_means(
    small: dict[float, Path], tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign.lrai"
    shutil.copytree(small[3.0], foreign)
    target = msgspec.json.decode((foreign / "manifest.json").read_bytes())["target"]
    small_artifact.rewrite(foreign, {"target": target | {"isa": "other"}})
    with lrai.Runtime(config()) as runtime:
        for _ in range(2):  # two workers
            deployments(runtime).load(str(foreign), name="m", variant="int8", shared=True)
        assert ask(runtime) == 2.0
        with pytest.raises(lrai.UsageError, match="is loaded already"):
            deployments(runtime).load(str(small[2.0]), name="m", variant="int8", shared=True)


def test_a_swap_and_its_warm_up_leave_what_was_captured(
    small: dict[float, Path], tmp_path: Path
) -> None:
    settings = {"runtime.capture_rows": 20}
    captured = tmp_path / "traffic" / "m" / "captured.npz"
    with lrai.Runtime(config(**{"runtime.state_dir": str(tmp_path)})) as runtime:
        runtime.load(small[2.0], name="m", settings=settings)
        for _ in range(5):
            ask(runtime)
        runtime.deployments()
        assert captured.is_file()
        runtime.swap("m", small[3.0], settings={})  # captures nothing
        assert ask(runtime) == 3.0
        wait_until(lambda: (captured.parent / "sketch.json").stat().st_size > 0)
    with np.load(captured, allow_pickle=False) as kept:
        assert kept["x"].shape == (5, 3)


def test_who_does_not_read_what_was_asked_need_not_have_it_written(
    small: dict[float, Path], tmp_path: Path
) -> None:
    sketch = tmp_path / "traffic" / "m" / "sketch.json"

    def written() -> int:
        return int(msgspec.json.decode(sketch.read_bytes())["requests"])

    with lrai.Runtime(config(**{"runtime.state_dir": str(tmp_path)})) as runtime:
        runtime.load(small[2.0], name="m")
        ask(runtime)
        wait_until(sketch.is_file)  # as the first request has it
        ask(runtime)
        (found,) = runtime.deployments(save=False)
        assert found.traffic == str(sketch.parent)
        assert written() == 1
        assert runtime.deployments() == [found]
        assert written() == 2


def test_a_path_that_is_no_utf_8_is_refused_and_ends_nothing(
    small: dict[float, Path], tmp_path: Path
) -> None:
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe9l.lrai")
    shutil.copytree(small[3.0], strange)
    (tmp_path / "link.lrai").symlink_to(strange)
    named = Path(os.fsdecode(os.fsencode(tmp_path) + b"/nam\xe9d.lrai"))
    named.symlink_to(tmp_path / "small.lrai")
    settings = {"runtime.model_roots": str(tmp_path)}
    with lrai.Runtime(config(**settings)) as runtime:
        shutil.copytree(small[2.0], tmp_path / "small.lrai")
        runtime.load(tmp_path / "small.lrai", name="m")
        for path in (strange, tmp_path / "link.lrai", named):
            with pytest.raises(lrai.ConditionNotMet, match="has to be UTF-8"):
                runtime.load(path, name="n")
        assert ask(runtime) == 2.0


def test_a_path_with_a_nul_is_refused_and_of_what_was_kept_costs_its_own_name_alone(
    small: dict[float, Path], tmp_path: Path
) -> None:
    """A file that somebody has changed by hand, say: no runtime started any more."""
    label, state = version(small[2.0]), tmp_path / "state"
    state.mkdir(mode=0o700)
    how = {"variant": "", "require": None, "settings": None, "version": label}
    kept = {
        name: {"versions": {label: how | {"artifact": path}}, "shares": {label: 1}}
        for name, path in (("gone", "/nowhere\0.lrai"), ("m", str(small[2.0])))
    }
    told = json.dumps({"stopped": False, "deployments": kept})
    (state / "deployments.json").write_text(told)
    with lrai.Runtime(config(**{"runtime.state_dir": str(state)})) as runtime:
        deployments(runtime).restore(lambda: False)  # as a daemon does
        assert [one.name for one in runtime.deployments()] == ["m"]
        assert ask(runtime, model_name="m") == 2.0
        with pytest.raises(lrai.ConditionNotMet, match="NUL"):
            runtime.load("/nowhere\0.lrai", name="n")
