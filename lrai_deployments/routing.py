"""Which version answers a request, and what is done where a version does not do well.

A canary is judged by its error rate beside the stable version's: exact binomial bounds, at an error
probability that is spent over all looks, so that looking often does not make a false alarm likely.
That is of independent failures: what one death of an actor makes late counts one by one.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from lrai_core import (
    DeadlineExceeded,
    InferenceRequest,
    InferenceResponse,
    LraiError,
    QueueFull,
    RequestError,
    TensorSpec,
)
from lrai_core.confidence import lower_bound, upper_bound
from lrai_core.errors import Cancelled
from lrai_core.protocol import Array, ValidRequest
from lrai_core.runtime.version import Ended, Version
from lrai_core.scheduler.state import BACKGROUND, Pending
from lrai_core.verifier.spec import FAR, agreement, difference, raw_as

if TYPE_CHECKING:
    from lrai_deployments.kept import Kept

_FEWEST_ANSWERS: Final = 20  # of a canary that is judged
_FALSE_ALARM: Final = 0.01  # probability that a canary as good as the stable version ever fails
_LEAST_ERROR: Final = 1e-12
_COPIES: Final = 8  # of the places in the queue, copies take at most one in so many

Outcome = InferenceResponse | LraiError
Original = Future[InferenceResponse | None]  # that a copy is compared with, if it is kept


class Route:
    """How requests that name no version are shared out; thread-safe."""

    def __init__(
        self,
        core: Kept,
        shares: Mapping[Version, float],
        shadow: Mapping[Version, float],
        relief: Version | None = None,
        slo_ms: float = 0.0,
    ) -> None:
        """Serve nothing yet.

        Args:
            core: Runs the versions, and is told of a canary that has failed.
            shares: Of the requests, positive.
            shadow: At most one version, and the share of the requests of which a copy goes to it.
            relief: Takes what the others could not answer in time.
            slo_ms: The time of a request that names none; 0 for as long as it takes.
        """
        self._relief, self._slo_ms = relief, slo_ms
        self._alone_ms = {version: _alone_ms(version) for version in shares}
        self._core, self._shares = core, shares
        self._stable = max(shares, key=shares.__getitem__)
        self._canaries = {v for v, share in shares.items() if share < shares[self._stable]}
        self._shadow, self._sampled = next(iter(shadow), None), sum(shadow.values())
        self._lock = threading.Lock()
        self._answers, self._failures = Counter[Version](), Counter[Version]()
        self._shared, self._refusals = Counter[Version](), Counter[Version]()  # of those by share
        self._to_judge = set[Version]()  # soon
        self._copied_rows = self._copied_bytes = 0

    def accept(
        self, request: InferenceRequest, done: Ended, named: Version | None = None
    ) -> Pending:
        """See `Embedded.accept`. `named`: who is to answer, whatever its share."""
        original = Original()
        version = drawn = named or self._drawn()
        relief = None if named else self._relief
        if relief is None or version.limits.deterministic or not self._core.runs(relief):
            relief = None
        elif self._too_late(version, request):
            version, relief = relief, None
        shadow = self._shadow if self._core.random.random() < self._sampled else None
        shadow = None if shadow is version else shadow  # which would agree with itself

        def ended(outcome: Outcome) -> None:
            if shadow is not None:
                kept = None  # nothing to compare with, or no memory for it
                with suppress(MemoryError):
                    if isinstance(outcome, InferenceResponse):  # the caller may write to his
                        outputs = {name: array.copy() for name, array in outcome.outputs.items()}
                        kept = replace(outcome, outputs=outputs)
                original.set_result(kept)
            done(outcome)
            self._count(version, outcome, drawn=named is None and version is drawn)

        try:
            try:
                pending = self._core.accept(request, ended, version)
            except DeadlineExceeded:  # by the pace of late
                if relief is None:
                    raise
                version, shadow = relief, None if shadow is relief else shadow
                pending = self._core.accept(request, ended, version)
        except LraiError as error:
            self._count(version, error)
            raise
        if shadow is not None and self._may_copy(pending.request):
            # By its name: once it is gone, nobody answers in its place.
            own = {"model_version": shadow.version, "parameters": {"priority": BACKGROUND}}
            copy = replace(request, timeout_ms=None, **own)
            names = [spec.name for spec in version.signature.inputs]
            self._send(copy, names, pending.request, original)
        return pending

    def _drawn(self) -> Version:
        """Return a version by its share; of one that was given up, others take it."""
        drawn = self._draw(self._shares)
        if self._core.runs(drawn):
            return drawn
        running = {v: share for v, share in self._shares.items() if self._core.runs(v)}
        return self._draw(running) if running else drawn

    def _draw(self, shares: Mapping[Version, float]) -> Version:
        return self._core.random.choices(list(shares), list(shares.values()))[0]

    def _too_late(self, version: Version, request: InferenceRequest) -> bool:
        """Whether what is inside takes longer than the request has, if each were run alone."""
        allowed_ms = self._slo_ms if request.timeout_ms is None else request.timeout_ms
        return 0 < allowed_ms < (version.inside + 1) * self._alone_ms[version]

    def _may_copy(self, request: ValidRequest) -> bool:
        """Take room for a copy, unless too many are under way: callers must find room, too."""
        most = self._core.config.scheduler
        with self._lock:
            rows, nbytes = self._copied_rows + request.rows, self._copied_bytes + request.nbytes
            if rows > most.max_queue_rows // _COPIES or nbytes > most.max_queue_bytes // _COPIES:
                return False
            self._copied_rows, self._copied_bytes = rows, nbytes
        return True

    def _send(
        self,
        copy: InferenceRequest,
        names: Sequence[str],
        request: ValidRequest,
        original: Original,
    ) -> None:
        """Ask the shadow a copy, with inputs of its own: the caller may write to the others."""

        def ended(outcome: Outcome) -> None:
            original.add_done_callback(
                lambda first: self._core.submit(self._compare, first.result(), outcome, request)
            )

        try:
            inputs = {n: a.copy() for n, a in zip(names, request.arrays, strict=True)}
            self._core.accept(replace(copy, inputs=inputs), ended, self._shadow)
        except LraiError as error:
            ended(error)
        except MemoryError:
            ended(DeadlineExceeded("no memory for a copy"))

    def _compare(
        self, original: InferenceResponse | None, copy: Outcome, request: ValidRequest
    ) -> None:
        with self._lock:
            self._copied_rows -= request.rows
            self._copied_bytes -= request.nbytes
        if original is None or isinstance(copy, DeadlineExceeded | QueueFull):
            return  # that there was no time or room for a copy says nothing of the version
        emit, name = self._core.events.emit, original.model_name
        if isinstance(copy, LraiError) or not original.outputs.keys() <= copy.outputs.keys():
            emit("shadow_failed", name, reason=type(copy).__name__)
            return
        judged = self._shadow or self._stable  # after the maps that the copy's version declares
        specs = [s for s in judged.signature.outputs if s.name in original.outputs]
        # `Measured` says what was demanded at home.
        demanded = getattr(judged.artifact, "demanded", judged.artifact.manifest.demanded)
        alike, epsilon = (raw_as("derived", specs), demanded[0]) if demanded else (specs, FAR)
        for pair in _rows(specs, original.outputs, copy.outputs):
            far = difference(*pair, specs)
            told: dict[str, Any] = {"version": copy.model_version, "difference": far}
            emit("shadow_compared", name, **told)
            if not agreement(*pair, alike) or far > epsilon:
                emit("shadow_differs", name, **told)

    def _count(self, version: Version, outcome: Outcome, *, drawn: bool = False) -> None:
        """Count an answer or a failure of the server, not of the caller; look into the latter.

        What an engine refuses is the one or the other: of `drawn` versions each refuses as much of
        what callers get wrong, so more is its own. These are judged by themselves.
        """
        # Where all are full, whoever relieves the others is late with their requests, too.
        late = self._relief is not None and isinstance(outcome, DeadlineExceeded)
        if late or isinstance(outcome, Cancelled):
            return
        failed = isinstance(outcome, LraiError) and outcome.http_status >= 500
        refused = drawn and type(outcome) is RequestError
        with self._lock:
            self._answers[version] += 1
            self._failures[version] += failed
            self._shared[version] += drawn
            self._refusals[version] += refused
            enough = self._answers[version] >= _FEWEST_ANSWERS
            judged = (failed or refused) and enough and version in self._canaries - self._to_judge
            if judged:
                self._to_judge.add(version)
        if judged:
            self._core.submit(self._judge, version)

    def _judge(self, version: Version) -> None:
        stable = self._stable
        failed, refused = (self._failures, self._answers), (self._refusals, self._shared)
        with self._lock:
            self._to_judge.discard(version)
            found = [[(bad[v], of[v]) for v in (version, stable)] for bad, of in (failed, refused)]
        for kind, ((bad, n), (also_bad, m)) in zip(("failed", "refused"), found, strict=True):
            confidence = 1 - max(_FALSE_ALARM / (4 * max(bad, 1) * (bad + 1)), _LEAST_ERROR)
            if m and lower_bound(bad, n, confidence) > upper_bound(also_bad, m, confidence):
                beside = f"{stable.version} {also_bad} of {m}"
                why = f"{version.version} {kind} {bad} of {n} requests, {beside}"
                self._core.give_up(self, version, why)
                break


def _rows(
    specs: Sequence[TensorSpec], first: Mapping[str, Array], second: Mapping[str, Array]
) -> Iterator[tuple[list[Array], list[Array]]]:
    """Yield what two versions say of each row, of all at once where outputs have no rows."""
    both = [(first[spec.name], second[spec.name]) for spec in specs]
    counts = {len(array) for pair in both for array in pair if array.ndim}
    if any(spec.batch_axis is None for spec in specs) or len(counts) != 1:
        yield [a for a, _ in both], [b for _, b in both]
        return
    for row in range(*counts):
        yield [a[row : row + 1] for a, _ in both], [b[row : row + 1] for _, b in both]


def _alone_ms(version: Version) -> float:
    """Return what a request takes by the profile; 0 where there is none."""
    alone = [point.median_ms for point in version.variant.latency if point.rows == 1]
    return median(alone) / len(version.actors) if alone else 0.0
