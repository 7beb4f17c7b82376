"""A canary's error rate beside the stable version's, without processes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from lrai_core import (
    ActorError,
    DeadlineExceeded,
    InferenceRequest,
    InferenceResponse,
    InvalidTensor,
    LraiError,
    RequestError,
    load_config,
)
from lrai_core.artifact import Artifact
from lrai_core.config import SchedulerConfig
from lrai_core.errors import Cancelled
from lrai_core.protocol import ValidRequest
from lrai_core.runtime.version import Ended, Version
from lrai_core.scheduler.state import BACKGROUND
from lrai_deployments.measured import keep, measured_here
from lrai_deployments.routing import Route
from tests.core import small_artifact


class Core:
    """Stands for the runtime: judges at once, and keeps what it is told."""

    def __init__(self, seed: int) -> None:
        self.random, self.given_up = Random(seed), list[tuple[str, str]]()
        self.dead, self.full, self.asked = set[str](), set[str](), list[str]()

    def submit(self, function: Any, *arguments: Any) -> None:
        function(*arguments)

    def runs(self, version: Version) -> bool:
        return version.version not in self.dead

    def accept(self, request: InferenceRequest, done: Ended, version: Version) -> None:
        self.asked.append(version.version)
        if version.version in self.full:
            raise DeadlineExceeded("40 requests have to be answered before it")
        done(ActorError("no") if version.version == "canary" else ANSWER)

    def give_up(self, route: Route, version: Version, why: str) -> None:
        self.given_up.append((version.version, why))


def version(label: str) -> Version:
    manifest = small_artifact.manifest()
    return Version(
        "m",
        label,
        Artifact(Path(), manifest, "0" * 64),
        manifest.variants[0],
        None,
        (label,),
        SchedulerConfig(),
    )


STABLE, CANARY = version("stable"), version("canary")
ANSWER = cast("InferenceResponse", object())


def route(seed: int = 0) -> tuple[Core, Route]:
    core = Core(seed)
    return core, Route(cast("Any", core), {STABLE: 0.9, CANARY: 0.1}, {})


def outcome(random: Random, rate: float) -> InferenceResponse | LraiError:
    return ActorError("no") if random.random() < rate else ANSWER


def test_a_canary_is_not_judged_by_fewer_than_twenty_answers() -> None:
    core, made = route()
    for _ in range(300):
        made._count(STABLE, ANSWER)
    for _ in range(19):
        made._count(CANARY, ActorError("no"))
    assert not core.given_up
    made._count(CANARY, ActorError("no"))
    assert core.given_up == [("canary", "canary failed 20 of 20 requests, stable 0 of 300")]


def test_a_canary_is_not_judged_without_anything_beside_it() -> None:
    core, made = route()
    for _ in range(100):
        made._count(CANARY, ActorError("no"))
    assert not core.given_up


def test_the_stable_version_is_never_given_up() -> None:
    core, made = route()
    for _ in range(100):
        made._count(CANARY, ANSWER)
        made._count(STABLE, ActorError("no"))
    assert not core.given_up


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (ActorError("x"), True),
        (DeadlineExceeded("x"), True),
        (Cancelled("x"), False),  # by the caller
        (InvalidTensor("x", "y"), False),
    ],
)
def test_only_faults_of_the_server_count(error: LraiError, counts: bool) -> None:
    core, made = route()
    for _ in range(100):
        made._count(STABLE, ANSWER)
    for _ in range(50):
        made._count(CANARY, error)
    assert bool(core.given_up) is counts


def test_a_canary_as_good_as_the_stable_version_is_seldom_given_up() -> None:
    alarms = 0
    for seed in range(60):
        core, made = route(seed)
        for _ in range(1500):
            label = STABLE if core.random.random() < 0.7 else CANARY
            made._count(label, outcome(core.random, 0.05))
        alarms += bool(core.given_up)
    assert alarms <= 2  # of 60 at 1 %: more than that once in four hundred


def test_a_canary_that_fails_more_often_is_given_up_soon() -> None:
    core, made = route()
    for count in range(5000):  # noqa: B007 - read below
        label = STABLE if core.random.random() < 0.9 else CANARY
        made._count(label, outcome(core.random, 0.01 if label is STABLE else 0.3))
        if core.given_up:
            break
    assert core.given_up
    assert count < 1500


def test_what_is_asked_of_a_canary_by_name_counts_for_it() -> None:
    core, made = route()
    for named in [STABLE] * 300 + [CANARY] * 20:
        made.accept(request(None), lambda _: None, named)
    assert core.given_up == [("canary", "canary failed 20 of 20 requests, stable 0 of 300")]


@pytest.mark.parametrize(
    ("error", "rate", "given_up"),
    [
        (RequestError("the engine refused it"), 0.0, True),
        (RequestError("the engine refused it"), 1.0, False),  # as the stable version does
        (InvalidTensor("x", "y"), 0.0, False),
    ],
)
def test_a_canary_whose_engine_refuses_what_the_stable_ones_takes_is_given_up(
    error: LraiError, rate: float, given_up: bool
) -> None:
    core, made = route()

    def accept(_: InferenceRequest, done: Ended, version: Version) -> None:
        refused = version is CANARY or core.random.random() < rate
        done(error if refused else ANSWER)

    core.accept = accept  # type: ignore[assignment, method-assign]
    for named in [STABLE] * 100 + [CANARY] * 100:
        made.accept(request(None), lambda _: None, named)
    assert not core.given_up, "who names a version may ask for what its engine does not take"
    for _ in range(500):
        made.accept(request(None), lambda _: None)
    assert bool(core.given_up) is given_up


@pytest.mark.parametrize("pinned", [STABLE, CANARY])
def test_what_is_asked_by_name_hides_nothing_of_what_engines_refuse(pinned: Version) -> None:
    """Of requests that name no version, both refuse the same share, or the canary's more."""
    same = pinned is STABLE
    for seed in range(20):
        core, made = route(seed)

        def accept(asked: InferenceRequest, done: Ended, by: Version, core: Core = core) -> None:
            rate = 0.05 if same else 0.5 if by is CANARY else 0.0
            bad = asked.timeout_ms is None and core.random.random() < rate
            done(RequestError("the engine refused it") if bad else ANSWER)

        core.accept = accept  # type: ignore[method-assign, assignment]
        for _ in range(5_000):
            made.accept(request(50.0), lambda _: None, pinned)  # which are right
        for _ in range(4_000):
            made.accept(request(None), lambda _: None)
        assert bool(core.given_up) is not same
        assert same or core.given_up[0][1].startswith("canary refused ")


def test_a_canary_whose_judge_is_late_is_judged_once_by_all_that_it_has_done() -> None:
    core, made = route()
    due = list[Any]()
    core.submit = lambda *judge: due.append(judge)  # type: ignore[method-assign]
    for _ in range(300):
        made._count(STABLE, ANSWER)
    for _ in range(100):
        made._count(CANARY, ActorError("no"))
    ((judge, *arguments),) = due
    due.clear()
    judge(*arguments)
    assert core.given_up == [("canary", "canary failed 100 of 100 requests, stable 0 of 300")]
    made._count(CANARY, ANSWER)
    assert not due
    made._count(CANARY, ActorError("no"))
    assert len(due) == 1


def test_the_guard_still_decides_after_very_many_failures() -> None:
    core, made = route()
    made._answers.update({STABLE: 10_000_000, CANARY: 10_000_000})
    made._failures.update({STABLE: 1, CANARY: 4_999_999})
    made._count(CANARY, ActorError("no"))
    assert core.given_up


def test_relief_takes_what_would_be_late_and_nothing_else() -> None:
    stable, relief = version("stable"), version("relief")  # a request takes 1 ms by the profile
    made = Route(cast("Any", Core(0)), {stable: 1.0}, {}, relief, slo_ms=2.5)

    def too_late(timeout_ms: float | None) -> bool:
        return made._too_late(stable, request(timeout_ms))

    assert (too_late(None), too_late(0.5), too_late(1.5)) == (False, True, False)
    stable.inside = 2
    assert (too_late(None), too_late(2.5), too_late(3.5)) == (True, True, False)
    relief.inside = 1000
    assert not too_late(3.5)
    without = Route(cast("Any", Core(0)), {stable: 1.0}, {}, relief)
    assert not without._too_late(stable, request(None))


def test_relief_takes_what_the_others_have_no_time_for() -> None:
    core, stable, relief = Core(0), version("stable"), version("relief")
    made = Route(cast("Any", core), {stable: 1.0}, {}, relief)
    core.full = {"stable"}
    made.accept(request(50.0), lambda _: None)
    assert core.asked == ["stable", "relief"]
    with pytest.raises(DeadlineExceeded):
        made.accept(request(50.0), lambda _: None, stable)  # who is named answers, or nobody
    core.full |= {"relief"}
    with pytest.raises(DeadlineExceeded):
        made.accept(request(50.0), lambda _: None)
    core.full, core.dead = {"stable"}, {"relief"}
    with pytest.raises(DeadlineExceeded):
        made.accept(request(50.0), lambda _: None)
    assert core.asked == ["stable", "relief", "stable", "stable", "relief", "stable"]


def test_that_all_are_full_is_no_fault_of_the_canary_that_relieves_the_others() -> None:
    core, stable, canary = Core(0), version("stable"), version("cheaper")
    made = Route(cast("Any", core), {stable: 0.9, canary: 0.1}, {}, canary)
    for _ in range(300):
        made.accept(request(50.0), lambda _: None)
    core.full = {"stable", "cheaper"}
    for stable.inside in (0, 1000):  # then it would be late by its profile, too
        for _ in range(200):
            with pytest.raises(DeadlineExceeded):
                made.accept(request(50.0), lambda _: None)
    assert not core.given_up
    assert made._failures[stable] == made._failures[canary] == 0, "they are judged by the same"


def test_a_canary_that_relieves_the_others_is_not_judged_by_what_is_late() -> None:
    """It is given what would be late elsewhere, so that more of what it has is."""
    core = Core(0)
    made = Route(cast("Any", core), {STABLE: 0.9, CANARY: 0.1}, {}, CANARY)
    core.accept = lambda _, done, __: done(DeadlineExceeded("it was not run"))  # type: ignore[method-assign, assignment]
    for _ in range(300):
        made._count(STABLE, ANSWER)
    STABLE.inside = 1000
    try:
        for _ in range(200):
            made.accept(request(50.0), lambda _: None)
    finally:
        STABLE.inside = 0
    assert not core.given_up


def test_a_canary_that_fails_what_it_takes_as_relief_is_given_up() -> None:
    core = Core(0)
    made = Route(cast("Any", core), {STABLE: 0.9, CANARY: 0.1}, {}, CANARY)
    for _ in range(300):
        made._count(STABLE, ANSWER)
    core.full = {"stable"}
    for _ in range(20):
        made.accept(request(50.0), lambda _: None)
    assert core.given_up == [("canary", "canary failed 20 of 20 requests, stable 0 of 300")]


def test_relief_takes_nothing_of_a_version_whose_answers_are_to_be_its_own() -> None:
    """As one that is loaded beside others, which relief serves already."""
    core, plain, own, relief = Core(0), version("plain"), version("own"), version("relief")
    own.limits = SchedulerConfig(deterministic=True)
    made = Route(cast("Any", core), {plain: 0.5, own: 0.5}, {}, relief)
    core.full = {"plain", "own"}
    for _ in range(40):
        with suppress(DeadlineExceeded):
            made.accept(request(50.0), lambda _: None)
    assert set(core.asked) == {"plain", "own", "relief"}
    assert core.asked.count("relief") == core.asked.count("plain")
    core.full, core.asked, own.inside = set(), [], 1000  # it would be late by its profile, too
    for _ in range(40):
        made.accept(request(50.0), lambda _: None)
    assert set(core.asked) == {"plain", "own"}


def test_no_copy_goes_to_the_relief_that_answers() -> None:
    core, stable, relief = Core(0), version("stable"), version("relief")
    made = Route(cast("Any", core), {stable: 1.0}, {relief: 1.0}, relief)
    core.full = {"stable"}
    made.accept(request(50.0), lambda _: None)
    assert core.asked == ["stable", "relief"]


def test_the_shares_of_the_dead_are_taken_by_who_runs() -> None:
    core, (one, two, three) = Core(0), (version("one"), version("two"), version("three"))
    made = Route(cast("Any", core), {one: 0.5, two: 0.3, three: 0.2}, {})
    core.dead = {"one"}
    for _ in range(2000):
        made.accept(request(None), lambda _: None)
    assert set(core.asked) == {"two", "three"}
    assert 0.55 < core.asked.count("two") / 2000 < 0.65
    core.dead, core.asked = {"one", "two", "three"}, []
    for _ in range(200):  # nobody is better: each is told of its own
        made.accept(request(None), lambda _: None)
    assert set(core.asked) == {"one", "two", "three"}


def request(timeout_ms: float | None) -> InferenceRequest:
    return InferenceRequest(model_name="m", inputs={}, timeout_ms=timeout_ms)


def test_copies_are_what_nobody_waits_for() -> None:
    core, shadow = Core(0), version("shadow")
    made = Route(cast("Any", core), {STABLE: 1.0}, {shadow: 1.0})
    priorities = dict[str, object]()

    def accept(asked: InferenceRequest, done: Ended, to: Version) -> SimpleNamespace:
        priorities[to.version] = asked.parameters.get("priority", 0)
        x = np.ones((1, 3), np.float32)
        return SimpleNamespace(request=ValidRequest((x,), 1, 0, (0,), ("g",), x.nbytes))

    core.accept = accept  # type: ignore[method-assign,assignment]
    core.config = SimpleNamespace(scheduler=SchedulerConfig())  # type: ignore[attr-defined]
    made.accept(request(None), lambda _: None)
    assert priorities == {"stable": 0, "shadow": BACKGROUND}


def test_as_many_copies_are_made_as_are_asked_for() -> None:
    core, shadow = Core(0), version("shadow")
    made, asked = Route(cast("Any", core), {STABLE: 1.0}, {shadow: 0.25}), list[str]()

    def accept(_: InferenceRequest, done: Ended, to: Version) -> SimpleNamespace:
        asked.append(to.version)
        done(ANSWER)
        x = np.ones((1, 3), np.float32)
        return SimpleNamespace(request=ValidRequest((x,), 1, 0, (0,), ("g",), x.nbytes))

    core.accept = accept  # type: ignore[method-assign,assignment]
    core.config = SimpleNamespace(scheduler=SchedulerConfig())  # type: ignore[attr-defined]
    for _ in range(400):
        made.accept(request(None), lambda _: None)
    assert asked.count("stable") == 400
    assert 70 < asked.count("shadow") < 130


class Large(np.ndarray[Any, Any]):
    """An array of which no copy finds room."""

    def copy(self, *_: Any, **__: Any) -> Any:
        raise MemoryError


@pytest.mark.parametrize("large", ["request", "answer"])
def test_where_memory_lacks_for_a_copy_the_caller_has_his_answer(large: str) -> None:
    core, shadow = Core(0), version("shadow")
    made, told = Route(cast("Any", core), {STABLE: 1.0}, {shadow: 1.0}), list[object]()
    arrays = {one: np.ones((1, 3), np.float32) for one in ("request", "answer")}
    arrays[large] = arrays[large].view(Large)
    said = InferenceResponse(
        model_name="m", model_version="1", id="", outputs={"y": arrays["answer"]}, parameters={}
    )

    def accept(asked: InferenceRequest, done: Ended, to: Version) -> SimpleNamespace:
        core.asked.append(to.version)
        done(said)
        x = arrays["request"]
        return SimpleNamespace(request=ValidRequest((x,), 1, 0, (0,), ("g",), x.nbytes))

    core.accept = accept  # type: ignore[method-assign,assignment]
    core.config = SimpleNamespace(scheduler=SchedulerConfig())  # type: ignore[attr-defined]
    core.events = SimpleNamespace(emit=lambda *_, **__: None)  # type: ignore[attr-defined]
    made.accept(request(None), told.append)
    assert told == [said]
    assert core.asked == ["stable", *["shadow"] * (large == "answer")]
    assert (made._copied_rows, made._copied_bytes) == (0, 0), "its room is given back"


def test_a_shadow_may_have_one_output_more() -> None:
    _, made = route()
    told = list[str]()
    made._core.events = cast("Any", SimpleNamespace(emit=lambda kind, *_, **__: told.append(kind)))

    def said(*names: str) -> InferenceResponse:
        outputs: dict[str, Any] = dict.fromkeys(names, np.ones((1, 3), np.float32))
        return InferenceResponse(
            model_name="m", model_version="1", id="", outputs=outputs, parameters={}
        )

    request = ValidRequest((), 1, 0, (), (), 0)
    made._compare(said("y"), said("y", "z"), request)
    assert told == ["shadow_compared"]
    made._compare(said("y", "z"), said("y"), request)
    assert told[1:] == ["shadow_failed"]


@pytest.mark.parametrize(
    ("demanded", "gap", "differs"),
    [(None, 0.5, True), ((1.0, 0.01), 0.5, False), ((1.0, 0.01), 1.5, True), (None, 0.001, False)],
)
@pytest.mark.parametrize("requalified", [False, True])
def test_of_raw_outputs_a_demanded_closeness_decides_as_it_does_in_the_gate(
    tmp_path: Path,
    demanded: tuple[float, float] | None,
    gap: float,
    differs: bool,
    requalified: bool,
) -> None:
    core, shadow = Core(0), version("shadow")
    manifest = msgspec.structs.replace(shadow.artifact.manifest, demanded=demanded)
    shadow.artifact = Artifact(Path(), manifest, "0" * 64)
    if requalified:
        config = load_config(call={"runtime.state_dir": str(tmp_path)})
        keep(shadow.artifact, msgspec.structs.replace(manifest, demanded=None), config)
        shadow.artifact = measured_here(shadow.artifact, config)
        assert shadow.artifact.manifest.demanded is None
    made, told = Route(cast("Any", core), {STABLE: 1.0}, {shadow: 1.0}), list[str]()
    made._core.events = cast("Any", SimpleNamespace(emit=lambda kind, *_, **__: told.append(kind)))
    first, second = (
        InferenceResponse(model_name="m", model_version="1", id="", outputs={"y": y}, parameters={})
        for y in (np.ones((1, 3), np.float32), np.full((1, 3), 1 + gap, np.float32))
    )
    made._compare(first, second, ValidRequest((), 1, 0, (), (), 0))
    assert told == ["shadow_compared", *["shadow_differs"] * differs]
