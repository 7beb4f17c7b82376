"""What `lrai tune` does with a runtime that serves: copies of live requests, and the switch."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from lrai_core import (
    Artifact,
    ConditionNotMet,
    EnvironmentProblem,
    LraiError,
    MemoryBudgetExceeded,
    ModelNotFound,
    Runtime,
    UsageError,
    load_config,
)
from lrai_core.runtime.embedded import find_backend
from lrai_report.terminal import progress, say

_TRIES: Final = 60  # once a second, to unload what got copies
_LIVE_SECONDS: Final = 1.0  # between two looks at the shadow
_MOST_CHANGED: Final = 0.02  # of the live answers: what the gate allows, if nothing is demanded
_CHANGED: Final = "deployment_changed"  # how often, in what a runtime counts
# None of them goes down while a runtime lives, and the first one has counted what is done here.
_COUNTS: Final = (_CHANGED, "request_accepted", "actor_started", "shadow_compared")
_LEAST_COMPARED: Final = 30  # live rows, before anything is switched for them


def runtime_of(address: str) -> Runtime:
    """Return the shared runtime that is meant where none is said to be; none is started for this.

    Raises:
        EnvironmentProblem: None runs.
    """
    config = load_config()
    own = config.runtime.address
    where = address or ("auto" if own == "embedded" else own)
    if not find_backend("ipc").runs(config, where):
        raise EnvironmentProblem("no runtime runs that could serve it")
    return Runtime(config, address=where)


def compare_live(
    name: str,
    before: Mapping[str, float],
    written: Path,
    minutes: float,
    address: str,
    *,
    apply: bool,
) -> None:
    """Copy live requests to a new artifact for a while.

    Args:
        name: Under which the runtime serves.
        before: The shares of its versions, when it was begun.
        written: The artifact.
        minutes: For which requests are copied; 0 for none.
        address: Of the runtime; empty for the usual one.
        apply: It is to serve, so enough has to be compared.

    Raises:
        ConditionNotMet: The name was changed meanwhile, or live requests say no.
    """
    with runtime_of(address) as runtime:
        _check_same(runtime, name, before)
        seen = _shadow(runtime, name, written, minutes, address) if minutes else _LEAST_COMPARED
        if apply and seen < _LEAST_COMPARED:
            why = f"{seen} live rows were compared, {_LEAST_COMPARED} are needed"
            how = command("swap", name, str(written), address=address)
            raise ConditionNotMet(f"not applied: {why} (longer: --minutes); or anyway: {how}")


def switch(
    name: str, before: Mapping[str, float], written: Path, address: str, *, apply: bool
) -> None:
    """Switch to it, or say how; see `compare_live`.

    Raises:
        ConditionNotMet: The name was changed meanwhile.
    """
    with runtime_of(address) as runtime:
        if apply:
            _check_same(runtime, name, before)
            version = runtime.swap(name, written.absolute())
            say("applied", f"{name} is served by {version}")
        else:
            say("switch on", command("swap", name, str(written), address=address))
        say("switch back", command("rollback", name, address=address))


def _check_same(runtime: Runtime, name: str, before: Mapping[str, float]) -> None:
    shares = _deployment(runtime, name).shares
    now, then = ({v: round(n, 6) for v, n in s.items() if n} for s in (shares, before))
    if now != then:
        served = ", ".join(now)
        raise ConditionNotMet(f"{name!r} was changed meanwhile: {served} serves; tune that")


def _shadow(runtime: Runtime, name: str, written: Path, minutes: float, address: str) -> int:
    """Have copies of the live requests answered by it; return how many rows were compared.

    Raises:
        ConditionNotMet: It fails, or says something else more often than the gate allows.
    """
    artifact = Artifact.open(written, verify=False)
    version, (_, most) = artifact.version, artifact.manifest.demanded or (0.0, _MOST_CHANGED)
    end, loaded = command("unload", name, "--version", version, address=address), False
    say("copies", f"are answered by it for a while; if this is killed, so ends that: {end}")
    try:
        runtime.load(written.absolute(), name=name, share=0.0)
        loaded = True
        now = _deployment(runtime, name)
        _check_alone(runtime, name, version, address)
        shares = {label: share for label, share in now.shares.items() if label != version}
        began = ended = runtime.stats()
        runtime.route(name, shares, {version: 1.0}, now.relief)
        total = math.ceil(minutes * 60 / _LIVE_SECONDS)
        with progress("live requests, copied", total) as tick:
            for _ in range(total):
                time.sleep(_LIVE_SECONDS)
                before, ended = ended, runtime.stats()
                if any(ended.get(kind, 0) < before.get(kind, 0) for kind in _COUNTS):
                    why = "the runtime was started again meanwhile, and counts from 0"
                    raise ConditionNotMet(f"live requests tell nothing: {why}; {written} stays")
                if ended.get(_CHANGED) != before.get(_CHANGED):  # what tells how waits for loads
                    _check_alone(runtime, name, version, address)
                tick()
    except MemoryBudgetExceeded as error:  # nobody else is unloaded for a trial
        say("live", f"not compared: {error}")
        return 0
    finally:
        _unload(runtime, name, version, end, loaded=loaded)
    seen, differ, failed = (
        ended.get(kind, 0) - began.get(kind, 0)
        for kind in ("shadow_compared", "shadow_differs", "shadow_failed")
    )
    say("live", f"{seen} rows compared, {differ} changed, {failed} failed")
    if failed or differ > most * seen:
        said = f"on live requests {differ} of {seen} changed, {failed} failed"
        raise ConditionNotMet(f"{said}; {written} stays, to be looked into")
    return seen


def _check_alone(runtime: Runtime, name: str, version: str, address: str) -> None:
    """Check that no others get copies.

    Raises:
        ConditionNotMet: Others do.
    """
    if others := copied(runtime.deployments(save=False), address, (name, version)):
        raise ConditionNotMet(f"{others}; what copies say is counted for all names together")


def copied(served: Iterable[Any], address: str, but: tuple[str, str] = ("", "")) -> str:
    """Return who gets copies of requests, but for one version, and what ends that; or nothing."""
    for one in served:
        for version in one.shadow:
            if (one.name, version) != but:
                end = command("unload", one.name, "--version", version, address=address)
                return f"requests to {one.name!r} are copied to {version}; this ends it: {end}"
    return ""


def _unload(runtime: Runtime, name: str, version: str, end: str, *, loaded: bool) -> None:
    """End the version that got copies, though it may still be loading; say where it stays."""
    problem: LraiError | None = None
    for _ in range(_TRIES):
        try:
            runtime.unload(name, version)
        except UsageError as error:  # another change is under way, which may be its loading
            problem = error
            time.sleep(1)
        except ModelNotFound:
            return  # it never came so far
        except LraiError as error:
            problem = error
            break
        else:
            return
    if not loaded and not isinstance(problem, UsageError):
        return
    say("left", f"{version} is still loaded, and gets copies ({problem}): {end}")


def command(*words: str, address: str) -> str:
    """Return a command of `lrai runtime`, to be pasted."""
    return shlex.join(["lrai", "runtime", *words, *(["--address", address] if address else [])])


def _deployment(runtime: Runtime, name: str) -> Any:
    for found in runtime.deployments():
        if found.name == name:
            return found
    raise ConditionNotMet(f"{name!r} is no longer served")
