"""Which version answers a request, and what is done where a version does not do well.

A canary is judged by its error rate beside the stable version's: exact binomial bounds, at an error
probability that is spent over all looks, so that looking often does not make a false alarm likely.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from lrai_core import InferenceRequest, InferenceResponse, LraiError
from lrai_core.confidence import lower_bound, upper_bound
from lrai_core.runtime.embedded import Ended, Version
from lrai_core.scheduler.scheduler import Pending
from lrai_core.verifier.spec import difference

if TYPE_CHECKING:
    from lrai_deployments.deployments import Deployments

_FEWEST_ANSWERS: Final = 20  # of a canary that is judged
_FALSE_ALARM: Final = 0.01  # probability that a canary as good as the stable version ever fails
_LEAST_ERROR: Final = 1e-12
_COPIES: Final = 8  # of the places in the queue, copies take at most one in so many
_LAST: Final = 1 << 30  # a copy's priority

Outcome = InferenceResponse | LraiError


@dataclass(slots=True)
class _Count:
    """What a version has answered."""

    answers: int = 0
    failures: int = 0  # that are the server's, not the caller's
    next_look: int = 1  # at so many failures


class Route:
    """How requests that name no version are shared out; thread-safe."""

    def __init__(
        self, core: Deployments, shares: Mapping[Version, float], shadow: Mapping[Version, float]
    ) -> None:
        """Serve nothing yet.

        Args:
            core: Runs the versions, and is told of a canary that has failed.
            shares: Of the requests, positive.
            shadow: At most one version, and the share of the requests of which a copy goes to it.
        """
        self._core, self._versions = core, list(shares)
        self._cumulative = list(accumulate(shares.values()))
        self._stable = max(shares, key=shares.__getitem__)
        self._canaries = {v for v, share in shares.items() if share < shares[self._stable]}
        self._shadow, self._sampled = next(iter(shadow), None), sum(shadow.values())
        self._lock = threading.Lock()
        self._counts = {version: _Count() for version in shares}
        self._looks = self._copied_rows = 0

    def accept(self, request: InferenceRequest, done: Ended) -> Pending:
        """See `Embedded.accept`."""
        random = self._core.random
        (version,) = random.choices(self._versions, cum_weights=self._cumulative)
        shadow = self._shadow if random.random() < self._sampled else None
        original: Future[Outcome] = Future()

        def ended(outcome: Outcome) -> None:
            if shadow is not None and isinstance(outcome, InferenceResponse):
                kept = {name: array.copy() for name, array in outcome.outputs.items()}
                original.set_result(replace(outcome, outputs=kept))  # the caller may write to his
            done(outcome)
            self._count(version, outcome)

        try:
            pending = self._core.accept(request, ended, version)
        except LraiError as error:
            self._count(version, error)
            raise
        if shadow is not None:
            names = [spec.name for spec in version.signature.inputs]
            inputs = {n: a.copy() for n, a in zip(names, pending.request.arrays, strict=True)}
            copy = replace(request, inputs=inputs, parameters={"priority": _LAST})
            self._send(copy, pending.request.rows, original, shadow)
        return pending

    def _send(
        self, copy: InferenceRequest, rows: int, original: Future[Outcome], to: Version
    ) -> None:
        """Send a copy, unless too many are on their way: callers must find room in the queue."""
        with self._lock:
            if self._copied_rows + rows > self._core.config.scheduler.max_queue_rows // _COPIES:
                return
            self._copied_rows += rows

        def ended(outcome: Outcome) -> None:
            with self._lock:
                self._copied_rows -= rows
            original.add_done_callback(
                lambda first: self._core.submit(self._compare, first.result(), outcome, to)
            )

        try:
            self._core.accept(copy, ended, to)
        except LraiError as error:
            ended(error)

    def _compare(self, original: InferenceResponse, copy: Outcome, to: Version) -> None:
        if isinstance(copy, LraiError):
            why = type(copy).__name__
            self._core.events.emit("shadow_failed", to.name, version=to.version, reason=why)
            return
        specs = [spec for spec in to.signature.outputs if spec.name in original.outputs]
        pairs = [(original.outputs[spec.name], copy.outputs[spec.name]) for spec in specs]
        each = to.signature.coalescible  # the map of an output works on rows
        rows = [slice(i, i + 1) for i in range(len(pairs[0][0]))] if each else [...]
        worst = max(
            difference([a[row] for a, _ in pairs], [b[row] for _, b in pairs], specs)
            for row in rows
        )
        self._core.events.emit("shadow_compared", to.name, version=to.version, difference=worst)

    def _count(self, version: Version, outcome: Outcome) -> None:
        failed = isinstance(outcome, LraiError) and outcome.http_status >= 500
        with self._lock:
            count = self._counts[version]
            count.answers += 1
            count.failures += failed
            enough = count.answers >= _FEWEST_ANSWERS and count.failures >= count.next_look
            look = failed and enough and version in self._canaries
            if look:
                self._looks += 1
                count.next_look = count.failures + 1 + count.failures // 10
        if look:
            self._core.submit(self._judge, version, self._looks)

    def _judge(self, version: Version, looks: int) -> None:
        bad, good = replace(self._counts[version]), replace(self._counts[self._stable])
        confidence = 1 - max(_FALSE_ALARM / (2 * looks * (looks + 1)), _LEAST_ERROR)
        if not good.answers:
            return
        worst = upper_bound(good.failures, good.answers, confidence)
        if lower_bound(bad.failures, bad.answers, confidence) > worst:
            why = f"{version.version} failed {bad.failures} of {bad.answers} requests"
            beside = f"{self._stable.version} {good.failures} of {good.answers}"
            self._core.give_up(self, version, f"{why}, {beside}")
