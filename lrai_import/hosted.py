"""What a host asks for a model: its settings, the runtime that is to serve it, a first answer.

All processes of a user share a runtime unless something says otherwise. Where nothing does, and one
process alone serves a model, a quick one runs in that process: there the way to another costs more
than it takes, see decision 13.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median_low
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrai_codecs import dtype_of
from lrai_core import (
    OWN_SETTINGS,
    Artifact,
    InferenceRequest,
    LraiConfig,
    LraiError,
    Runtime,
    Signature,
    TensorSpec,
    UsageError,
    explain_config,
    load_config,
)
from lrai_core.verifier.verifier import environment

_log: Final = logging.getLogger("lrai.hosted")
_QUICK_MS: Final = 10.0  # the way to an actor adds about one
_REQUIRE: Final = "require."
_FOLDERS: Final = re.compile(r"(?:ipc://|(?<![\w.:/]))(/[^\s'\"/]+)/(?:[^\s'\"]*/)?")  # of paths
_TIME: Final = "scheduler.default_timeout_ms"
_MOST_ELEMENTS: Final = 1 << 28  # of a row that is made up, as of an actor's
_ROWS: Final = "scheduler.max_batch_rows"
_WHERE: Final = (  # who sets one of these wants processes of the model's own
    *("runtime.address", "runtime.memory_mib", "runtime.capture_rows"),  # who tunes asks that one
    "runtime.state_dir",  # which is one runtime's, and a host has one for each model in itself
    *("actor.isolation", "actor.replicas", "actor.devices", "actor.python"),
)
# Of zeros, which a model need not take; not those of a queue that is full, or of no such model.
_REFUSALS: Final = frozenset(range(400, 429)) - {404}


class Asked(NamedTuple):
    """What was asked for.

    Attributes:
        config: Of this process, and of a shared runtime that it starts.
        own: Of the model alone, by dotted key.
        rest: Those of a runtime that were asked for with the model, likewise.
        require: Of its certificate; None for nothing.
        variant: To serve instead of the chosen one; empty for that.
        free: Nothing says where the model runs.
        timed: Something says how long a request may take that states no time.
        here: In this process.
        host_ms: The host's time for a request; 0 where it has none.
    """

    config: LraiConfig
    own: dict[str, Any]
    rest: dict[str, Any]
    require: dict[str, Any] | None
    variant: str
    free: bool
    timed: bool
    here: bool = False
    host_ms: float = 0.0

    @property
    def how(self) -> Any:
        """Return what `Runtime.load` and `swap` want to be told by name."""
        return {"variant": self.variant, "require": self.require, "settings": self.own or None}

    @property
    def mark(self) -> str:
        """Return what tells a model asked for like this from others of its artifact, if anything.

        A runtime that has one under a name does not look at the settings of who asks again.
        """
        said = json.dumps([self.own, self.variant], sort_keys=True, default=str)
        return f":{hashlib.sha256(said.encode()).hexdigest()[:8]}" * bool(self.own or self.variant)

    @property
    def inline(self) -> bool:
        """Return whether the model is to run in the process of its runtime."""
        return bool(self.own.get("actor.isolation", self.config.actor.isolation) == "inline")

    @property
    def latency_slo_ms(self) -> float:
        """Return the time that the model promises, 0 for none."""
        slo_ms = self.own.get("scheduler.latency_slo_ms")
        return self.config.scheduler.latency_slo_ms if slo_ms is None else float(slo_ms)

    def placed(self, artifact: Artifact, processes: int) -> Asked:
        """Return the same, with the model in this process where that is best.

        Args:
            artifact: Of the model.
            processes: That serve it, 0 where that is not known.
        """
        wanted = self.free and processes == 1 and is_quick(artifact, self.variant)
        return self.in_process() if wanted else self

    def within(self, seconds: float) -> Asked:
        """Return the same, with the host's time for a request where nothing says another one.

        After it the host answers in any case, and what is still computed is for nobody. A runtime
        that others share, too, does not give up what they asked for any sooner.
        """
        if self.timed or not seconds:
            return self
        ms, usual = min(max(1.0, seconds * 1e3), 1e9), self.config.scheduler  # as it may be set
        if not self.here and ms <= usual.default_timeout_ms:
            return self._replace(host_ms=ms)
        config = replace(self.config, scheduler=replace(usual, default_timeout_ms=ms))
        return self._replace(config=config, rest={**self.rest, _TIME: ms}, host_ms=ms)

    def limited(self, rows: int) -> Asked:
        """Return the same, with no call of more rows than a host's knob says; 0: it says nothing.

        Where a setting of the model says more, that counts, and a warning names both.
        """
        most = int(float(self.own.get(_ROWS, self.config.scheduler.max_batch_rows)))
        if 0 < rows < most and _ROWS in self.own:
            words = "%s is %d: calls may exceed max_batch_size, which is %d"
            _log.warning(words, _ROWS, most, rows)
        elif 0 < rows < most:
            return self._replace(own={**self.own, _ROWS: rows})
        return self

    def in_process(self) -> Asked:
        """Return the same, with the model in this process, which keeps no state of its own.

        What `lrai requalify` found lies in the state folder, which the address still names.
        """
        given = self.config.runtime
        state = given.state_dir or given.address * given.address.startswith("/")
        address = str(Path(state).absolute()) if state else "embedded"
        runtime = replace(given, address=address, state_dir="", capture_rows=0)
        own = {**self.own, "actor.isolation": "inline"}
        config = replace(self.config, runtime=runtime)
        inside = self._replace(config=config, own=own, here=True)
        return inside.within(self.host_ms / 1e3)


def asked(given: Mapping[str, Any]) -> Asked:
    """Return what settings by dotted key say; values may be text.

    Besides LRAI's own they are `variant`, and `require.tier`, `require.epsilon` and so on.

    Raises:
        UsageError: An unknown setting, or a value that is not allowed.
    """
    left, require = dict(given), dict[str, Any]()
    for key in [key for key in left if key.startswith(_REQUIRE)]:
        what, value = key.removeprefix(_REQUIRE), left.pop(key)
        try:
            require[what] = value if what in ("tier", "sampler") else float(value)
        except (TypeError, ValueError):
            raise UsageError(f"{key} is {value!r}, a number is needed") from None
    variant = str(left.pop("variant", ""))
    own = {key: left.pop(key) for key in list(left) if key in OWN_SETTINGS}
    load_config(environ={}, host=own)  # for its errors: a runtime that serves others keeps its own
    origins = {setting.key: setting.origin for setting in explain_config(host=left)}
    said = [key for key in _WHERE if origins[key] != "default" or key in own]
    shared = {} if "runtime.address" in said else {"LRAI_RUNTIME": "auto"}
    # An empty variable says nothing.
    config = load_config(environ=shared | {n: v for n, v in os.environ.items() if v}, host=left)
    return Asked(config, own, left, require or None, variant, not said, origins[_TIME] != "default")


def load(runtime: Runtime, artifact: Artifact, name: str, **how: Any) -> str:
    """Load it as `Runtime.load` would; return the variant that serves, and log it.

    A warning where that is none that was asked for, which was made for other machines.
    """
    runtime.load(artifact, name=name, **how)
    manifest, wanted = artifact.manifest, how.get("variant") or artifact.manifest.chosen
    mine = (m.variant for m in runtime.models() if (m.name, m.version) == (name, artifact.version))
    serving, made_for = next(mine, wanted), manifest.made_for(manifest.variant(wanted))
    if serving != wanted and made_for != environment(manifest.variant(wanted)):
        words = "model %s: %s serves in place of %s, made for %s; lrai requalify measures it here"
        _log.warning(words, name, serving, wanted, made_for)
    _log.info("model %s is loaded: %s", name, serving)
    return serving


def is_quick(artifact: Artifact, variant: str = "") -> bool:
    """Return whether one row takes less than ten milliseconds by the variant's profile.

    Of one that was made for other machines, in whose place another one serves, nobody knows. What
    was measured without real rows tells of the longest one alone, and nothing where a dimension
    that is neither batch nor length is free.
    """
    manifest = artifact.manifest
    wanted = manifest.variant(variant or manifest.chosen)
    alone = [point.median_ms for point in wanted.latency if point.rows == 1]
    mine = manifest.made_for(wanted) == environment(wanted)
    if wanted.gate is None and alone:  # made-up rows, in which other free dimensions are 4
        specs = manifest.signature.inputs
        free = [(one, i) for one in specs for i, n in enumerate(one.shape) if isinstance(n, str)]
        mine &= all(axis in (one.batch_axis, one.length_axis) for one, axis in free)
        alone = [max(alone)]
    return mine and bool(alone) and median_low(alone) < _QUICK_MS


def zeros(specs: Sequence[TensorSpec]) -> dict[str, NDArray[Any]]:
    """Return one row of zeros and empty texts, of the smallest shape.

    Raises:
        UsageError: It would be larger than any: whoever made the artifact says how large.
    """
    shapes = {one.name: [n if isinstance(n, int) else 1 for n in one.shape] for one in specs}
    if (large := max(map(math.prod, shapes.values()), default=0)) > _MOST_ELEMENTS:
        raise UsageError(f"a row of {large} elements is too large to be made up")
    fill = {spec.name: "" if spec.datatype == "BYTES" else 0 for spec in specs}
    return {s.name: np.full(shapes[s.name], fill[s.name], dtype_of(s.datatype)) for s in specs}


def warm_up(runtime: Runtime, name: str, signature: Signature) -> None:
    """Have a model answer a row of zeros, which it may refuse.

    Raises:
        LraiError: It does not answer.
    """
    ms = runtime.config.scheduler.default_timeout_ms  # not what the model promises everybody
    row = zeros(signature.inputs)
    try:
        runtime.infer(InferenceRequest(model_name=name, inputs=row, timeout_ms=ms))
    except LraiError as error:
        if error.http_status not in _REFUSALS:
            raise


def without_folders(words: str) -> str:
    """Return an error without the folders of this machine, for who asks may be anywhere.

    Names in a graph may look like paths: those of nothing stay.
    """
    for at in [found.start() for found in re.finditer("/[^/.]", words)]:
        there = str(next(p for p in Path(words[at:]).parents if os.access(p, os.F_OK)))
        # Spaces in it are of its name: a folder of the same length that has none stands for it.
        mask = "/usr".ljust(len(there), "/") if " " in there else there
        words = words[:at] + mask + words[at + len(there) :]
    return _FOLDERS.sub(lambda found: "" if os.access(found[1], os.F_OK) else found[0], words)
