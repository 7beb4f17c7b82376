"""Who serves a name, and how much of it each: load, swap, canaries, shadows, freezes."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import zip_longest
from typing import Annotated, Any, Final

import msgspec
from msgspec.structs import replace

import lrai_core as lrai
from lrai_core.runtime.embedded import Terms
from lrai_core.runtime.version import Deployment, Version
from lrai_deployments.kept import LOST, Kept, freeze_of
from lrai_deployments.state import How, Record
from lrai_deployments.traffic import forget_aged
from lrai_deployments.warmup import warm_up

_log = logging.getLogger(__name__)
_AGAIN_SECONDS: Final = 60.0
_SHARES: Final = dict[str, Annotated[float, msgspec.Meta(ge=0, le=1)]]


class Deployments(Kept):
    """An embedded runtime whose names have versions; thread-safe."""

    def _is_served(self, known: Version, new: lrai.Artifact, variant: str, terms: Terms) -> bool:
        """Return whether a version is the new artifact's, and of this variant if one is named.

        Raises:
            ConditionNotMet: It is, but does not meet the terms.
        """
        if known.artifact.version != new.version or variant not in ("", known.variant.id):
            return False
        if terms is not None:
            if known.certificate is None:  # the source model may serve in its place
                raise lrai.ConditionNotMet(f"no certificate speaks of what serves {known.name!r}")
            for own, _ in ((known.variant, None), *known.beside):  # each answers some calls
                self._certificate(new, own, terms)
        return True

    def load(
        self,
        artifact: str,
        *,
        name: str = "",
        variant: str = "",
        require: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        shared: bool = False,
        share: float | None = None,
    ) -> str:
        """See `Runtime.load`. `shared`: to find the same version and variant loaded is no error."""
        opened = self.open(artifact)
        name, part = name or opened.manifest.name, _shares({"share": share or 0.0})["share"]
        asked = How(variant, require, settings)
        with self.changing(name, wait=shared):
            if shared and not self.scheduler.accepting:  # it has ended meanwhile
                raise lrai.NotReady("the runtime is draining")
            again = self.scheduler.accepting and self._restart_dead(name, opened, share)
            if (shared or again) and self._is_there(name, opened, asked, share):
                return name
            if shared and share is None and self._is_replaced(name, opened, asked):
                return name
            if self._brought_back(name, opened, asked, share):
                return name
            record, served = self._free(name), self._served(name)
            if not served:  # nobody who runs: what was there, if anything, is what served before
                fresh = Record(previous=record.previous, before=record.before, left=record.left)
                other = record.versions and record.stable.partition("-")[0] != opened.version
                record = Record().follows(record) if other else fresh
            if share is not None and not served:
                raise _nobody(name)
            self._is_alike(name, opened)
            if served and share is None:
                many = "swap replaces it, with a share both serve"
                raise lrai.UsageError(f"a model {name[:120]!r} is loaded already: {many}")
            part = part if served else 1.0
            # Beside others it is to be as good as they are, and what is not said stays as it is.
            old = record.versions[record.stable] if record.versions else How()
            how = old.but(artifact, variant, require, settings)
            with self._started(name, opened, how, tried=not part) as (new, loaded):
                if served:
                    warm_up(self, new)
                self._commit(name, record.beside(loaded, part), "load")
        return name

    def _is_there(self, name: str, new: lrai.Artifact, asked: How, share: float | None) -> bool:
        """Return whether a version that is loaded is what is asked for.

        Raises:
            UsageError: It is, with another share.
        """
        record = self._records.get(name, Record())
        for one in self._served(name):
            # Who asks for the same again means what serves in its place, where it cannot.
            same = record.versions.get(one.version, How()).variant == asked.variant
            if self._is_served(one, new, "" if same else asked.variant, asked.require):
                has_now = record.shares.get(one.version, 0.0)
                if share is not None and has_now != share:
                    has = f"{one.version} is loaded with a share of {has_now:g}"
                    raise lrai.UsageError(f"{has}: route changes that")
                return True
        return False

    def _is_replaced(self, name: str, new: lrai.Artifact, asked: How) -> bool:
        """Return whether another version serves in place of this one, started again if need be.

        Whoever starts anew with what was replaced gets what replaced it.
        """
        record = self._records.get(name, Record())
        if not record.was(new.version) or record.serving(new.version):
            return False
        if record.away:
            was = record.versions[record.stable]
            with suppress(*LOST, OSError):  # else what is asked for serves, which lies there
                self._serve_again(name, record, self._reopen(was), was)
        if not self._served(name):
            return False
        self._is_served(now := self.current[name], now.artifact, "", asked.require)
        return True

    def _brought_back(self, name: str, new: lrai.Artifact, asked: How, share: float | None) -> bool:
        """Have a version that is written down, and does not run, serve as it did; or return False.

        One of a frozen name, one beside others that run, or what has made room.
        """
        record = self._records.get(name, Record())
        kept = record.serving(new.version)
        if kept is None or (name, kept.version) in self.versions:
            return False
        plain = share is None and asked.require is None and asked.settings is None
        meanwhile = plain and bool(self._served(name))  # others answer for it
        back = record.away and share is None and asked.settings in (None, kept.settings)
        if asked.variant not in ("", kept.variant) or not (record.frozen or meanwhile or back):
            return False
        own = replace(kept, require=kept.require if asked.require is None else asked.require)
        self._serve_again(name, record, new, own)
        return True

    def _serve_again(self, name: str, record: Record, new: lrai.Artifact, how: How) -> None:
        with self._started(name, new, how, how.version) as (_, loaded):
            self._commit(name, record.again(loaded), "load")

    def swap(
        self,
        name: str,
        artifact: str,
        *,
        variant: str = "",
        require: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> str:
        """See `Runtime.swap`."""
        with self._changed(name) as (name, record):
            how = record.versions[record.stable].but(artifact, variant, require, settings)
            swapped = self._swap(name, record, self.open(artifact), how, "swap")
            self._fell.pop(name, None)
            return swapped

    def rollback(self, name: str) -> str:
        """See `Runtime.rollback`."""
        with self._changed(name) as (name, record):
            how = record.versions.get(record.alone, record.previous)  # first, others go again
            if not how.version:
                raise lrai.ConditionNotMet(f"model {name!r} has had no version to go back to")
            return self._go_back(name, record, how, "rollback")

    def lost(self, name: str) -> None:
        """See `Running.lost`. What served before is to serve again, where there is something."""
        record, now = self._records.get(name, Record()), time.monotonic()
        there = record.previous.version and not (record.left or record.frozen)
        if there and now >= self._fell.get(name, 0.0):
            self._fell[name] = now + _AGAIN_SECONDS  # not at every request
            self.submit(self._fall_back, name, waits=True)

    def _fall_back(self, name: str) -> None:
        """Serve what served before, and freeze that: it is not what was meant to."""
        try:
            with self.changing(name):
                record, lost = self._free(name), self.find(name)
                shares = [one for one in self._served(name) if record.shares.get(one.version)]
                if record.previous.version and not (record.left or any(map(self.runs, shares))):
                    by, why = "crash guard", f"version {lost.version} was given up"
                    to = self._go_back(name, record, record.previous, "fallback")
                    _log.warning("%s: %s: version %s serves again", name, why, to)
                    back = replace(self._records[name], frozen=freeze_of(by, why))
                    self._commit(name, back, "freeze", by, why)
        # As of what is restored.
        except (lrai.LraiError, TypeError, OSError) as error:
            _log.warning("%s: what served before does not serve again: %s", name, error)

    def route(
        self,
        name: str,
        shares: Mapping[str, float],
        shadow: Mapping[str, float] | None = None,
        relief: str = "",
    ) -> None:
        """See `Runtime.route`."""
        given, copies = _shares(shares), _shares(shadow or {})
        with self._changed(name) as (name, record):
            named = given.keys() | copies.keys() | ({relief} if relief else set())
            for label in named - record.versions.keys():
                known = ", ".join(record.versions)
                raise lrai.ModelNotFound(f"{name!r} has versions {known}, not {label[:40]!r}")
            copies = {label: share for label, share in copies.items() if share}  # 0 ends it
            if (total := round(sum(given.values()), 6)) != 1:
                raise lrai.UsageError(f"the shares add up to {total}, 1 is needed")
            if len(copies) > 1:
                raise lrai.UsageError(f"{len(copies)} versions are shadows, at most one may be")
            for label in {label for label, share in given.items() if share} | named - given.keys():
                if not self.runs(self.find(name, label)):
                    raise lrai.ConditionNotMet(f"version {label} of {name!r} does not run any more")
            if relief and any(self._limits(how).deterministic for how in record.versions.values()):
                why = "relief steps to another version, which scheduler.deterministic never does"
                raise lrai.UsageError(why)
            self._commit(name, record.shared_out(given, copies, relief), "route")

    def freeze(self, name: str, by: str, reason: str) -> None:
        """See `Runtime.freeze`."""
        with self._changed(name, wait=True) as (name, record):
            self._commit(name, replace(record, frozen=freeze_of(by, reason)), "freeze", by, reason)

    def unfreeze(self, name: str, by: str, reason: str) -> None:
        """See `Runtime.unfreeze`."""
        freeze_of(by, reason)
        with self.changing(name, wait=True):
            record = self._records.get(name, Record())
            if record.frozen is None:
                raise lrai.UsageError(f"no model {name[:120]!r} is frozen")
            # Of a runtime that was stopped nothing is loaded; what could not be restored is kept.
            ended = self._stopped and not self._served(name)
            there = Record() if ended else replace(record, frozen=None)
            self._commit(name, there, "unfreeze", by, reason)

    def deployments(self, *, save: bool = True) -> list[Deployment]:
        """See `Runtime.deployments`."""
        found = []
        forget_aged(self.config.runtime, self._records)
        for name, record in list(self._records.items()):
            version = self.current.get(name)
            watching = self._watches.get(version.key) if version else None
            if watching and save:
                watching.save()  # for who comes to read it
            artifact = str(version.artifact.path.absolute()) if version else ""
            traffic = str(watching.folder.absolute()) if watching else ""
            shown = (record.shares, record.shadow, record.relief, record.previous.version)
            found.append(Deployment(name, *shown, record.frozen, artifact, traffic, record.away))
        return found

    def unload(self, name: str, version: str = "", *, drain: bool = False) -> None:
        """See `Runtime.unload`."""
        if not version and name in self._records and not self._served(name):
            with self.changing(name, wait=True):  # what could not be restored is listed, too
                if name in self._records and not self._served(name):
                    self._free(name)
                    self._commit(name, Record(), "unload")
                    return
        with self._changed(name, wait=True) as (name, record):
            gone = [one for one in self._served(name) if version in ("", one.version)]
            if version not in ("", *record.versions):
                self.find(name, version)  # for its error
            left = record.without(version) if version else Record()
            if not left.serves:
                raise lrai.UsageError(f"{version} answers for {name!r}: route requests elsewhere")
            self._commit(name, left, "unload")
            answers = {*record.sharing, record.relief}
            gone.sort(key=lambda one: one is not self.current.get(name))  # then nobody else comes
            for one in gone:  # where others stay; copies nobody waits for
                copies = one.version in record.shadow and one.version not in answers
                self.remove(one, drain=(drain or bool(left.versions)) and not copies)

    def _go_back(self, name: str, record: Record, how: How, what: str) -> str:
        there = self.versions.get((name, how.version))
        if how in record.versions.values() and there and self.runs(there):
            left = record.without(how.version, *record.sharing)  # who loses its share goes with it
            new = record.shared_out({how.version: 1.0}, left.shadow, left.relief)
            by_hand = what == "rollback" and how.version != record.stable
            self._commit(name, replace(new, left=by_hand or new.left), what)
            return how.version
        return self._swap(name, record, self._reopen(how), how, what)

    def _swap(self, name: str, record: Record, new: lrai.Artifact, how: How, what: str) -> str:
        self._is_alike(name, new, back=what != "swap")
        old = self._served(name)
        with self._started(name, new, how) as (version, loaded):
            warm_up(self, version)
            swapped = Record().beside(loaded, 1.0).follows(record)
            self._commit(name, replace(swapped, left=what == "rollback"), what)
        for gone in old:
            self.remove(gone)
        return version.version

    def _restart_dead(self, name: str, artifact: lrai.Artifact, share: float | None) -> bool:
        """Start what was given up again, or what is in its place: it is wanted by who loads it.

        Return whether something was: beside others; else it is for who loads it to start it.
        What is refused then leaves it there: all would be told that no such model is loaded.
        """
        record, version = self._records.get(name, Record()), artifact.version
        replaced = record.was(version) and not record.serving(version)
        same = [v for v in self._served(name) if replaced or v.artifact.version == version]
        started = False
        for dead in [v for v in same if self._state(v) == "dead"]:
            if (alone := self._served(name) == [dead]) and replaced:
                self._free(name)
            if alone and share is not None and record.frozen is None:
                raise _nobody(name)
            self.remove(dead, drain=False)
            if self._served(name):  # beside the others; else it is loaded as if for the first time
                try:
                    how = record.versions.get(dead.version, How())
                    own = self._reopen(how) if dead.artifact.version != version else artifact
                    with self._started(name, own, how, dead.version):
                        started = True
                finally:
                    self._apply_what_runs(name, record)
        return started

    def _is_alike(self, name: str, artifact: lrai.Artifact, *, back: bool = False) -> None:
        """Raise where requests for a name would be none for the artifact.

        `back`: it served them before, so that it need not have the outputs that came after it.
        """
        if (there := self.current.get(name)) is None:
            return
        old, new = there.signature, artifact.manifest.signature
        forms = zip_longest(map(_form, old.inputs), map(_form, new.inputs), fillvalue="no more")
        why = [f"takes {b[:200]}, what serves takes {a[:200]}" for a, b in forms if a != b]
        outputs = sorted({spec.name for spec in old.outputs} - {spec.name for spec in new.outputs})
        if outputs and not back:
            why.append(f"lacks outputs of what serves, {str(outputs)[1:-1][:200]}")
        if why:
            raise lrai.ConditionNotMet(f"{artifact.version} {why[0]}; load it under another name")


def _shares(given: Mapping[str, Any]) -> dict[str, float]:
    try:
        return msgspec.convert(dict(given), _SHARES)
    except msgspec.ValidationError as error:
        raise lrai.UsageError(f"a share is a number from 0 to 1: {error}") from None


def _nobody(name: str) -> lrai.UsageError:
    none = f"no version of {name[:120]!r} serves"
    return lrai.UsageError(f"{none} that it could share with: load it without a share")


def _form(spec: lrai.TensorSpec) -> str:
    """Return what a request has to know of an input."""
    fixed = [size if isinstance(size, int) else -1 for size in spec.shape]
    return f"{spec.name!r} {spec.datatype} {fixed}"
